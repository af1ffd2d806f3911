//! Child processes with collected output and a time limit on everything.
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

/// How long a reader thread may need to see the end of a pipe whose writer is gone.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// The bytes that a child has written so far.
#[derive(Debug, Default)]
pub struct Capture {
    state: Mutex<CaptureState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct CaptureState {
    bytes: Vec<u8>,
    open_pipes: usize,
}

impl Capture {
    fn lock(&self) -> MutexGuard<'_, CaptureState> {
        // A reader that panicked left whole bytes behind: they are still worth showing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything so far, with undecodable bytes replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Waits until `found` has an answer to the bytes so far; `None` when the deadline or the end came first.
    pub fn wait_until<T>(&self, deadline: Instant, mut found: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(answer) = found(&state.bytes) {
                return Some(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.open_pipes == 0 {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How many bytes there are so far.
    pub fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// Whether there are none yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes from `start` on.
    pub fn bytes_from(&self, start: usize) -> Vec<u8> {
        self.lock().bytes.get(start..).unwrap_or_default().to_vec()
    }

    /// Whether nothing more will come.
    pub fn is_closed(&self) -> bool {
        self.lock().open_pipes == 0
    }

    fn wait_closed(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.open_pipes > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn collect(capture: &Arc<Capture>, mut pipe: impl Read + Send + 'static) -> JoinHandle<()> {
    capture.lock().open_pipes += 1;
    let capture = Arc::clone(capture);
    std::thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    capture.lock().bytes.extend_from_slice(&buffer[..n]);
                    capture.changed.notify_all();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        capture.lock().open_pipes -= 1;
        capture.changed.notify_all();
    })
}

/// A child process that is killed when its owner drops it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    own_group: bool,
    status: Option<ExitStatus>,
    stdout: Arc<Capture>,
    stderr: Arc<Capture>,
}

impl Process {
    /// Starts `command` in the caller's process group, so that a Ctrl-C on the terminal reaches it too.
    pub fn spawn(command: Command) -> io::Result<Self> {
        Self::start(command, false)
    }

    /// Starts `command` as the leader of its own process group, which is killed as a whole: for programs that
    /// leave helper processes behind.
    pub fn spawn_group(mut command: Command) -> io::Result<Self> {
        command.process_group(0);
        Self::start(command, true)
    }

    /// Starts `command`, whose standard output is what `output` reads, such as a terminal.
    pub fn spawn_with_output(command: Command, output: impl Read + Send + 'static) -> io::Result<Self> {
        let process = Self::start(command, false)?;
        collect(&process.stdout, output);
        Ok(process)
    }

    fn start(mut command: Command, own_group: bool) -> io::Result<Self> {
        let mut child = command.spawn()?;
        let pidfd = match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e.into());
            }
        };
        let (stdout, stderr) = (Arc::<Capture>::default(), Arc::<Capture>::default());
        // The threads end by themselves when the last writer closes the pipe.
        if let Some(pipe) = child.stdout.take() {
            collect(&stdout, pipe);
        }
        if let Some(pipe) = child.stderr.take() {
            collect(&stderr, pipe);
        }
        Ok(Self { child, pidfd, own_group, status: None, stdout, stderr })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What was written to a piped standard output.
    pub fn stdout(&self) -> &Arc<Capture> {
        &self.stdout
    }

    /// What was written to a piped standard error.
    pub fn stderr(&self) -> &Arc<Capture> {
        &self.stderr
    }

    /// The writing end of a piped standard input; `None` once taken.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Waits for the end of the process. `None`: it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            if !wait_readable(&self.pidfd, limit)? {
                return Ok(None);
            }
            self.status = Some(self.child.wait()?);
            // What the process wrote last is complete before the caller looks at it.
            self.stdout.wait_closed(DRAIN_LIMIT);
            self.stderr.wait_closed(DRAIN_LIMIT);
        }
        Ok(self.status)
    }

    /// Sends `signal` to the process (not to its group). Does nothing once it has ended.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        // A process that was not waited for keeps its id, so the signal cannot reach a stranger.
        if self.wait(Duration::ZERO)?.is_some() {
            return Ok(());
        }
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Kills the process, and its group if it leads one, and waits for it.
    pub fn kill(&mut self) {
        if self.status.is_some() {
            return;
        }
        let pid = Pid::from_child(&self.child);
        // An error means that it is gone already.
        let _ = if self.own_group {
            kill_process_group(pid, Signal::KILL)
        } else {
            kill_process(pid, Signal::KILL)
        };
        self.status = self.child.wait().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn wait_readable(fd: &impl AsFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Runs `command` to its end within `limit` and returns what it wrote; an exit status other than zero is an error
/// that carries the last lines of its output.
pub fn run(command: Command, limit: Duration) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = run_unchecked(command, limit)?;
    if !output.status.success() {
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        bail!("{name} failed ({}):\n{}", describe(output.status), tail(&text, 20));
    }
    Ok(output)
}

/// Like [`run`], but leaves the judgement of the exit status to the caller.
pub fn run_unchecked(mut command: Command, limit: Duration) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn(command).with_context(|| format!("Cannot start {name}"))?;
    let Some(status) = process.wait(limit).with_context(|| format!("Cannot wait for {name}"))? else {
        bail!("{name} did not end within {} s", limit.as_secs());
    };
    let (stdout, stderr) = (process.stdout.bytes_from(0), process.stderr.bytes_from(0));
    Ok(Output { status, stdout, stderr })
}

/// An exit status in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_is_complete_when_a_command_ends() {
        let output = run(sh("echo out; echo err >&2"), Duration::from_secs(10)).unwrap();
        assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    }

    #[test]
    fn a_failing_command_is_an_error_with_its_output() {
        let error = run(sh("echo broken >&2; exit 3"), Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("exit status 3") && error.contains("broken"), "{error}");
    }

    #[test]
    fn a_command_over_its_limit_is_killed() {
        let start = Instant::now();
        let error = run(sh("exec sleep 60"), Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_group_is_killed_as_a_whole() {
        let mut command = sh("sleep 60 & echo $!; wait");
        command.stdout(Stdio::piped());
        let mut process = Process::spawn_group(command).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let helper = process
            .stdout()
            .wait_until(deadline, |bytes| {
                String::from_utf8_lossy(bytes).strip_suffix('\n').map(str::to_owned)
            })
            .unwrap();
        process.kill();
        let gone = || match std::fs::read_to_string(format!("/proc/{helper}/stat")) {
            // An orphan is a zombie until init collects it.
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        while !gone() {
            assert!(Instant::now() < deadline, "process {helper} still runs");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
