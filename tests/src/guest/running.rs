//! A guest while it runs, and what it has done at the end.
use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tempfile::{NamedTempFile, TempDir};

use super::Vmm;
use super::terminal::{self, Terminal};
use super::transcript::Transcript;
use crate::process::{self, Process};

/// How much of the console an error quotes.
const TAIL_LINES: usize = 25;
/// A guest that has reported its exit status has nothing left to do; one that hangs in its power-off is killed.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(20);

/// What a guest has done.
#[derive(Debug, Clone)]
pub struct Report {
    /// The script's exit status.
    pub exit_status: i32,
    /// The script's standard output.
    pub stdout: String,
    /// What the script reported.
    pub values: BTreeMap<String, String>,
    /// The kernel's messages, the script's standard error and its trace.
    pub console: String,
    /// From the start to the script's first command.
    pub boot: Duration,
    /// From the start to the power-off.
    pub total: Duration,
}

impl Report {
    /// Makes an error of a script that failed.
    pub fn check(self) -> Result<Self> {
        if self.exit_status != 0 {
            bail!(
                "The guest's script ended with exit status {}; its console:\n{}",
                self.exit_status,
                process::tail(&self.console, TAIL_LINES)
            );
        }
        Ok(self)
    }

    /// The value that the script reported as `key`.
    pub fn value(&self, key: &str) -> Result<&str> {
        let value = self.values.get(key).map(String::as_str);
        value.with_context(|| format!("The guest's script did not report {key}"))
    }

    /// The number that the script reported as `key`.
    pub fn number(&self, key: &str) -> Result<u64> {
        let value = self.value(key)?;
        value
            .parse()
            .with_context(|| format!("The guest's script reported {key} as {value:?}, which is no number"))
    }
}

/// A guest that runs. It is killed when dropped.
#[derive(Debug)]
pub struct Running {
    vmm: Vmm,
    process: Process,
    stdin: Option<ChildStdin>,
    start: Instant,
    boot: Option<Duration>,
    deadline: Instant,
    /// What the process has open; removed at the end.
    _files: (NamedTempFile, TempDir),
}

impl Running {
    /// Starts `command`, which uses `files`, as a guest that may take `limit` to its end.
    pub(super) fn start(
        vmm: Vmm,
        mut command: Command,
        limit: Duration,
        files: (NamedTempFile, TempDir),
    ) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = Instant::now();
        let mut process = match vmm {
            Vmm::Qemu => Process::spawn(command)?,
            // It has a process of the host for each of its own.
            Vmm::Uml => Process::spawn_group(command)?,
        };
        // A panic of User Mode Linux is an abort, and its core would be the guest's whole memory. Should this fail,
        // the limit that this process has itself holds.
        let no_core = Rlimit { current: Some(0), maximum: Some(0) };
        let _ =
            Pid::from_raw(process.pid().cast_signed()).map(|pid| prlimit(Some(pid), Resource::Core, no_core));
        let stdin = process.take_stdin();
        Ok(Self { vmm, process, stdin, start, boot: None, deadline: start + limit, _files: files })
    }

    /// Waits until the script has announced `text`.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        let deadline = self.deadline.min(Instant::now() + limit);
        self.wait_boot(deadline)?;
        let look = |transcript: &Transcript| transcript.announced.iter().any(|announced| announced == text);
        if look(&self.wait_transcript(deadline, look)) {
            return Ok(());
        }
        Err(self.failure(&format!("did not announce {text:?}"), deadline))
    }

    /// Waits until `text` is in what the channel carried after the first `start` bytes, and returns the length of all up
    /// to its end. For a system that took over by [`super::Guest::new_root`].
    pub fn wait_for_text(&mut self, start: usize, text: &str, limit: Duration) -> Result<usize> {
        let deadline = self.deadline.min(Instant::now() + limit);
        let find = |bytes: &[u8]| {
            let after = bytes.get(start..)?;
            let at = after.windows(text.len()).position(|window| window == text.as_bytes())?;
            Some(start + at + text.len())
        };
        match self.process.stdout().wait_until(deadline, find) {
            Some(length) => Ok(length),
            None => Err(self.failure(&format!("did not say {text:?}"), deadline)),
        }
    }

    /// What the channel carried from `start` to `end`.
    pub fn text(&self, start: usize, end: usize) -> String {
        let bytes = self.process.stdout().bytes_from(start);
        String::from_utf8_lossy(&bytes[..end.saturating_sub(start).min(bytes.len())]).into_owned()
    }

    /// Waits until a system that took over has powered the guest off, and returns its console.
    pub fn wait_power_off(mut self) -> Result<String> {
        let deadline = self.deadline;
        if self.process.wait(deadline.saturating_duration_since(Instant::now()))?.is_none() {
            return Err(self.failure("did not power off", deadline));
        }
        Ok(self.console())
    }

    /// Sends a line to the script, which gets it by `await` or `read`.
    pub fn send(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("The guest's input is closed")?;
        writeln!(stdin, "{line}")
            .and_then(|()| stdin.flush())
            .with_context(|| format!("Cannot send {line:?}"))
    }

    /// The values that the script has reported so far.
    pub fn values(&self) -> BTreeMap<String, String> {
        self.transcript().values
    }

    /// What is on the console so far.
    pub fn console(&self) -> String {
        // A terminal ends lines with both characters.
        self.process.stderr().text().replace("\r\n", "\n")
    }

    /// The id of the process that runs the guest.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What the host holds of the guest's memory, in bytes.
    pub fn resident(&self) -> Result<u64> {
        // It is a file without a name, the largest of its kind.
        let mut largest = None;
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.pid()))? {
            let path = entry?.path();
            // It may have been closed since.
            let (Ok(target), Ok(file)) = (std::fs::read_link(&path), std::fs::metadata(&path)) else {
                continue;
            };
            if file.is_file() && target.to_string_lossy().ends_with(" (deleted)") {
                largest = largest.max(Some((file.len(), file.blocks() * 512)));
            }
        }
        let (_, resident) =
            largest.context("The guest's memory was not found among the files that it has open")?;
        Ok(resident)
    }

    /// Ends the guest as a power failure would.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits until the script has ended and the guest is off.
    pub fn wait(mut self) -> Result<Report> {
        let deadline = self.deadline;
        self.wait_boot(deadline)?;
        let transcript = self.wait_transcript(deadline, |_| false);
        let Some(exit_status) = transcript.exit else {
            return Err(self.failure("did not end its script", deadline));
        };
        if self.process.wait(POWER_OFF_LIMIT)?.is_none() {
            self.process.kill();
        }
        Ok(Report {
            exit_status,
            stdout: transcript.stdout,
            values: transcript.values,
            console: self.console(),
            boot: self.boot.unwrap_or_default(),
            total: self.start.elapsed(),
        })
    }

    /// Connects the guest's channel with the terminal, where a script that calls `shell` gives a person a prompt.
    /// Returns when the script has ended.
    pub fn interact(&mut self) -> Result<()> {
        let mut input = self.stdin.take().context("The guest's input is closed")?;
        let mut terminal = Terminal::enter().context("Cannot set the terminal up")?;
        let mut shown = self.process.stdout().len();
        while !self.transcript().is_complete() && self.process.wait(Duration::ZERO)?.is_none() {
            if input.write_all(&terminal.keys()?).and_then(|()| input.flush()).is_err() {
                // It has powered off since the last look; its end says how.
                break;
            }
            let news = Transcript::parse(&self.process.stdout().bytes_from(shown));
            shown += news.length;
            terminal::show(&news.stdout)?;
        }
        self.stdin = Some(input);
        Ok(())
    }

    fn transcript(&self) -> Transcript {
        Transcript::parse(&self.process.stdout().bytes_from(0))
    }

    fn wait_transcript(&self, deadline: Instant, enough: impl Fn(&Transcript) -> bool) -> Transcript {
        let look = |bytes: &[u8]| {
            let transcript = Transcript::parse(bytes);
            (transcript.is_complete() || enough(&transcript)).then_some(transcript)
        };
        self.process.stdout().wait_until(deadline, look).unwrap_or_else(|| self.transcript())
    }

    fn wait_boot(&mut self, deadline: Instant) -> Result<()> {
        if self.boot.is_none() {
            let transcript = self.wait_transcript(deadline, |transcript| transcript.up);
            if !transcript.up {
                return Err(self.failure("did not boot", deadline));
            }
            self.boot = Some(self.start.elapsed());
        }
        Ok(())
    }

    /// The error for a guest that did not do what it should: says which of its ends it met.
    fn failure(&mut self, what: &str, deadline: Instant) -> anyhow::Error {
        let late = Instant::now() >= deadline;
        let seconds = self.start.elapsed().as_secs();
        // A panicking guest closes its channel a moment before it ends.
        let status = self.process.wait(Duration::from_secs(if late { 0 } else { 2 })).ok().flatten();
        let (transcript, console) = (self.transcript(), self.console());
        let panic = console.lines().position(|line| line.contains("Kernel panic"));
        let mut quoted = process::tail(&console, TAIL_LINES);
        let why = if let Some(failure) = transcript.failure {
            failure
        } else if let Some(at) = panic {
            // What led to it stands before it, and long lists of registers after it.
            let lines: Vec<&str> = console.lines().collect();
            let start = (at + TAIL_LINES / 2).saturating_sub(TAIL_LINES);
            quoted = lines[start..lines.len().min(at + TAIL_LINES / 2)].join("\n");
            lines[at].trim().to_owned()
        } else if let Some(status) = transcript.exit {
            format!("the script ended with exit status {status}")
        } else if let Some(status) = status {
            format!("it ended without a word ({})", process::describe(status))
        } else if late {
            format!("its time was over after {seconds} s")
        } else {
            "its channel was closed".to_owned()
        };
        let output = process::tail(&transcript.stdout, TAIL_LINES);
        anyhow!("The guest in {} {what}: {why}\n--- output\n{output}\n--- console\n{quoted}", self.vmm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_script_is_an_error_that_quotes_the_console() {
        let report = Report {
            exit_status: 3,
            stdout: String::new(),
            values: BTreeMap::from([
                ("size".to_owned(), "12".to_owned()),
                ("name".to_owned(), "vda".to_owned()),
            ]),
            console: "+ false".to_owned(),
            boot: Duration::ZERO,
            total: Duration::ZERO,
        };
        assert_eq!(report.number("size").unwrap(), 12);
        assert!(report.number("name").unwrap_err().to_string().contains("no number"));
        assert!(report.value("absent").is_err());
        let error = report.check().unwrap_err().to_string();
        assert!(error.contains("exit status 3") && error.contains("+ false"), "{error}");
    }
}
