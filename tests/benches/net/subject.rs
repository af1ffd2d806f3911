//! The daemon that is measured: what it cost, by the clock of its process, and what it did, by its own counters.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use tempfile::TempDir;
use tests::daemon::{Builder, Daemon};
use tests::driver::usage::{Footprint, cpu_time};
use tests::process::Process;

use super::Run;

const LIMIT: Duration = Duration::from_secs(10);
/// Time between two looks at the counters, which have to agree.
const SETTLE: Duration = Duration::from_millis(20);
/// Time that perf gets to attach itself.
const ATTACH: Duration = Duration::from_millis(300);
const REPORT: &str = "Counters of ";

/// System calls that are told apart.
const CALLS: [&str; 14] = [
    "readv",
    "writev",
    "sendto",
    "recvfrom",
    "sendmmsg",
    "recvmmsg",
    "epoll_wait",
    "epoll_ctl",
    "poll",
    "ppoll",
    "read",
    "write",
    "futex",
    "timerfd_settime",
];

/// What passed through one interface.
pub type Counters = BTreeMap<String, u64>;

/// A running daemon.
pub struct Subject {
    daemon: Daemon,
}

/// Everything so far.
struct Mark {
    counters: Vec<Counters>,
    cpu: Duration,
    sleeps: u64,
}

impl Subject {
    /// Starts it.
    pub fn start(builder: Builder) -> Result<Self> {
        Ok(Self { daemon: builder.start()? })
    }

    /// The place of its socket number `index`.
    pub fn socket(&self, index: usize) -> &Path {
        &self.daemon.sockets()[index]
    }

    /// What it holds.
    pub fn footprint(&self) -> Result<Footprint> {
        Ok(Footprint::of(self.daemon.pid())?)
    }

    fn reports(&self) -> Vec<Counters> {
        let text = self.daemon.stderr();
        text.lines().filter_map(|line| parse_report(line.split_once(REPORT)?.1)).collect()
    }

    /// The counters of all interfaces, as it reports them when asked.
    pub fn counters(&mut self) -> Result<Vec<Counters>> {
        let interfaces = self.daemon.sockets().len();
        let before = self.reports().len();
        self.daemon.signal(Signal::USR1)?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut reports = self.reports();
            if reports.len() >= before + interfaces {
                return Ok(reports.split_off(before));
            }
            ensure!(Instant::now() < deadline, "The daemon does not report: {}", self.daemon.stderr());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until it has nothing to do.
    fn mark(&mut self) -> Result<Mark> {
        let deadline = Instant::now() + LIMIT;
        let mut counters = self.counters()?;
        loop {
            std::thread::sleep(SETTLE);
            let again = self.counters()?;
            if again == counters {
                break;
            }
            counters = again;
            ensure!(Instant::now() < deadline, "The daemon does not come to rest: {counters:?}");
        }
        Ok(Mark { counters, cpu: cpu_time(self.daemon.pid())?, sleeps: sleeps(self.daemon.pid())? })
    }

    /// Measures what `load` costs per frame that is counted as `counter` at interface `index`. The load returns how
    /// long it took.
    pub fn measure(
        &mut self,
        index: usize,
        counter: &str,
        load: impl FnOnce() -> Result<Duration>,
    ) -> Result<Run> {
        let before = self.mark()?;
        let elapsed = load()?;
        let after = self.mark()?;
        let since_at = |index: usize, name: &str| {
            let get = |mark: &Mark| mark.counters[index].get(name).copied().unwrap_or_default();
            get(&after) - get(&before)
        };
        let since = |name: &str| since_at(index, name);
        let direction = &counter[..2];
        let frames = since(counter);
        ensure!(frames > 0, "No {counter}: {:?}", after.counters);
        Ok(Run {
            frames,
            large: since(&format!("{direction}_large")),
            lost: (0..after.counters.len()).map(|index| since_at(index, "rx_no_buffer")).sum(),
            cpu: after.cpu.saturating_sub(before.cpu),
            elapsed,
            sleeps: after.sleeps - before.sleeps,
        })
    }

    /// CPU time while nothing happens.
    pub fn idle(&self, rest: Duration) -> Result<Duration> {
        std::thread::sleep(SETTLE);
        let before = cpu_time(self.daemon.pid())?;
        std::thread::sleep(rest);
        Ok(cpu_time(self.daemon.pid())?.saturating_sub(before))
    }

    /// Counts its system calls during a load, by name, and the sum of all; and the frames.
    pub fn count_calls(
        &mut self,
        index: usize,
        counter: &str,
        load: impl FnOnce() -> Result<Duration>,
    ) -> Result<(Run, Vec<(String, u64)>)> {
        let folder = TempDir::new()?;
        let summary = folder.path().join("summary");
        let events: Vec<String> = CALLS.iter().map(|name| format!("syscalls:sys_enter_{name}")).collect();
        let mut perf = Command::new("perf");
        perf.args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-e", &events.join(",")]);
        perf.args(["-p", &self.daemon.pid().to_string(), "-o"]).arg(&summary);
        perf.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut perf = Process::spawn(perf)
            .context("Cannot start perf, which counts system calls: install it (package linux-perf)")?;
        if let Some(status) = perf.wait(ATTACH)? {
            bail!("perf cannot count system calls ({status}), which takes root: {}", perf.stderr().text());
        }
        let run = self.measure(index, counter, load)?;
        perf.signal(Signal::INT)?;
        perf.wait(LIMIT)?.context("perf does not end")?;
        Ok((run, parse_perf(&fs::read_to_string(&summary)?)))
    }
}

/// `NAME: a=1 b=2`, or `NAME: no frames`.
fn parse_report(text: &str) -> Option<Counters> {
    let (_, pairs) = text.rsplit_once(": ")?;
    let pairs = pairs.split_whitespace().filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
}

/// Lines `COUNT,,EVENT,...`.
fn parse_perf(summary: &str) -> Vec<(String, u64)> {
    let parse = |line: &str| {
        let mut fields = line.split(',');
        let count = fields.next()?.parse().ok()?;
        let event = fields.nth(1)?;
        let name = event.strip_prefix("syscalls:sys_enter_").unwrap_or("all");
        Some((name.to_owned(), count))
    };
    summary.lines().filter_map(parse).collect()
}

/// How often the threads of a process went to sleep so far.
fn sleeps(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that has just ended has no status.
        let status = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        sum += line.map_or(Ok(0), |count| count.trim().parse())?;
    }
    Ok(sum)
}
