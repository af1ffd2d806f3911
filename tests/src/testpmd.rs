//! DPDK's `dpdk-testpmd` as a front end without a guest: its driver `net_virtio_user` connects to a daemon, or lets
//! one connect, and sends and receives at full speed.
//!
//! It never negotiates `EVENT_IDX`. Its threads poll, so each run should be short.
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::netns::Namespace;
use crate::process::{self, Process};
use crate::provision;

const START_LIMIT: Duration = Duration::from_secs(60);
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
const PROMPT: &str = "testpmd> ";
/// How often statistics are asked for by those who wait for something in them.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What it does with frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Sends UDP packets in frames of this many bytes, from 198.18.0.1 to 198.18.0.2 and to a hardware address that
    /// nobody has.
    Transmit(u16),
    /// Receives and throws away.
    Receive,
    /// Sends each frame back with its addresses exchanged.
    Echo,
    /// Sends the TCP segments of a capture file over and over, of any length, which the device has to cut into segments
    /// with this many bytes of payload.
    Segment {
        /// The file.
        capture: PathBuf,
        /// Payload bytes of each segment.
        size: u16,
    },
}

/// How to run it.
#[derive(Debug, Clone)]
pub struct Options {
    /// What it does.
    pub mode: Mode,
    /// Pairs of queues.
    pub queue_pairs: u16,
    /// Descriptors in each ring.
    pub queue_size: u16,
    /// Whether it listens at the socket, for a daemon that connects, again and again.
    pub is_server: bool,
    /// Whether it takes large TCP segments (`GUEST_TSO4`, `GUEST_TSO6`), in several buffers each.
    pub large_receive: bool,
    /// More options of the driver, such as `,mrg_rxbuf=0`.
    pub device: &'static str,
}

impl Options {
    /// One pair of queues and nothing special.
    pub fn new(mode: Mode) -> Self {
        Self { mode, queue_pairs: 1, queue_size: 256, is_server: false, large_receive: false, device: "" }
    }
}

/// What its port has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Frames received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames received that were wrong.
    pub rx_errors: u64,
    /// Frames that the device took.
    pub tx_packets: u64,
    /// Bytes that the device took.
    pub tx_bytes: u64,
}

/// A running testpmd; it is killed when dropped.
#[derive(Debug)]
pub struct Testpmd {
    process: Process,
    terminal: File,
}

impl Testpmd {
    /// Starts it in a namespace (for its files in `/run`, not for its network) with a device at `socket`, and lets it
    /// forward frames. As a server it returns at once; [`Testpmd::start_forwarding`] is the caller's then.
    pub fn start(namespace: &Namespace, socket: &Path, options: &Options) -> Result<Self> {
        let mut command = provision::testpmd()?;
        command.args(["--lcores", &lcores()?, "--no-pci", "--no-huge", "-m", "256", "--no-telemetry"]);
        let mut device = format!(
            "net_virtio_user0,path={},queues={},queue_size={}{}",
            socket.display(),
            options.queue_pairs,
            options.queue_size,
            options.device
        );
        if options.is_server {
            device += ",server=1";
        }
        command.arg("--vdev").arg(device);
        let mut program = Vec::new();
        match &options.mode {
            Mode::Transmit(length) => program.push(format!("--txpkts={length}")),
            Mode::Segment { capture, .. } => {
                command.arg("--vdev").arg(format!("net_pcap0,rx_pcap={},infinite_rx=1", capture.display()));
                program.push("--mbuf-size=65500".to_owned());
            }
            Mode::Receive | Mode::Echo => {}
        }
        if options.large_receive {
            // UDP_CKSUM, TCP_CKSUM, TCP_LRO and SCATTER. The virtio driver asks for GUEST_TSO4 without the GUEST_CSUM that
            // it depends on (virtio 1.3, 5.1.3.1) unless it has the checksums to check as well.
            program.extend(["--enable-lro", "--enable-scatter", "--rx-offloads=0x201c"].map(String::from));
        }
        command.args(["--", "-i", "--nb-cores=1"]).args(program);
        let (queues, size) = (options.queue_pairs, options.queue_size);
        command.args([format!("--rxq={queues}"), format!("--txq={queues}")]);
        command.args([format!("--rxd={size}"), format!("--txd={size}")]);
        command.arg(match options.mode {
            // The capture's port is on the program's other side.
            Mode::Segment { .. } => "--total-num-mbufs=2048",
            _ => "--total-num-mbufs=8192",
        });
        let mut command = namespace.root().wrap(&command);
        // To a pipe it would write in large pieces, long after the prompt behind them.
        let (ours, theirs) = terminal().context("Cannot make a terminal for dpdk-testpmd")?;
        command.stdin(theirs.try_clone()?).stdout(theirs).stderr(Stdio::piped());
        let process = Process::spawn_with_output(command, ours.try_clone()?);
        let mut testpmd = Self { process: process.context("Cannot start dpdk-testpmd")?, terminal: ours };
        testpmd.wait_prompt(0, START_LIMIT)?;
        testpmd.configure(&options.mode)?;
        Ok(testpmd)
    }

    fn configure(&mut self, mode: &Mode) -> Result<()> {
        let forward = match mode {
            Mode::Transmit(_) => "txonly",
            Mode::Receive => "rxonly",
            Mode::Echo => "macswap",
            Mode::Segment { .. } => "csum",
        };
        self.command(&format!("set fwd {forward}"))?;
        if let Mode::Segment { size, .. } = mode {
            self.command("port stop 0")?;
            self.command("csum set tcp hw 0")?;
            self.command("csum set ip sw 0")?;
            self.command(&format!("tso set {size} 0"))?;
            self.command("port start 0")?;
        }
        self.command("start")?;
        Ok(())
    }

    /// Gives it a command and returns its answer.
    pub fn command(&mut self, text: &str) -> Result<String> {
        let start = self.process.stdout().len();
        writeln!(self.terminal, "{text}").context("dpdk-testpmd has ended")?;
        self.wait_prompt(start, COMMAND_LIMIT).with_context(|| format!("dpdk-testpmd did not do {text:?}"))
    }

    fn wait_prompt(&mut self, start: usize, limit: Duration) -> Result<String> {
        let answer = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes.get(start..)?).into_owned();
            // The line itself comes back behind the prompt that it was typed at.
            let end = text.rfind(PROMPT)?;
            (text.ends_with(PROMPT)).then(|| text[..end].to_owned())
        };
        self.process.stdout().wait_until(Instant::now() + limit, answer).with_context(|| self.words())
    }

    fn words(&self) -> String {
        let mut words = process::tail(&self.process.stdout().text(), 15);
        let _ = write!(words, "\n{}", process::tail(&self.process.stderr().text(), 15));
        words
    }

    /// Lets it stop, so that its statistics stay as they are.
    pub fn stop_forwarding(&mut self) -> Result<()> {
        self.command("stop").map(drop)
    }

    /// Lets it go on.
    pub fn start_forwarding(&mut self) -> Result<()> {
        self.command("start").map(drop)
    }

    /// What its port has done so far.
    pub fn stats(&mut self) -> Result<Stats> {
        let text = self.command("show port stats 0")?;
        Stats::parse(&text).with_context(|| format!("Cannot understand dpdk-testpmd's statistics: {text}"))
    }

    /// The frames of each queue so far: received, sent.
    pub fn queue_stats(&mut self) -> Result<Vec<(u64, u64)>> {
        let text = self.command("show port xstats 0")?;
        let value = |name: String| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(&name)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse().ok())
        };
        let queue = |index: usize| {
            Some((value(format!("rx_q{index}_good_packets"))?, value(format!("tx_q{index}_good_packets"))?))
        };
        let queues: Vec<_> = (0..).map_while(queue).collect();
        ensure!(!queues.is_empty(), "Cannot understand dpdk-testpmd's statistics: {text}");
        Ok(queues)
    }

    /// Waits until `enough` is true of its statistics, and returns these.
    pub fn wait_stats(&mut self, limit: Duration, enough: impl Fn(&Stats) -> bool) -> Result<Stats> {
        let deadline = Instant::now() + limit;
        loop {
            let stats = self.stats()?;
            if enough(&stats) {
                return Ok(stats);
            }
            if Instant::now() >= deadline {
                bail!("dpdk-testpmd came no further than {stats:?} in {} s", limit.as_secs());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it in good order, which closes the connection.
    pub fn quit(mut self) -> Result<()> {
        // It says goodbye instead of prompting.
        writeln!(self.terminal, "quit").context("dpdk-testpmd has ended")?;
        let status = self.process.wait(COMMAND_LIMIT)?.context("dpdk-testpmd does not end")?;
        ensure!(status.success(), "dpdk-testpmd ended with {}: {}", process::describe(status), self.words());
        Ok(())
    }

    /// Kills it, as a virtual machine monitor may be killed.
    pub fn kill(mut self) {
        self.process.kill();
    }
}

impl Stats {
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let (_, rest) = text.split_once(&format!("{name}:"))?;
            rest.split_whitespace().next()?.parse().ok()
        };
        Some(Self {
            rx_packets: field("RX-packets")?,
            rx_bytes: field("RX-bytes")?,
            rx_errors: field("RX-errors")?,
            tx_packets: field("TX-packets")?,
            tx_bytes: field("TX-bytes")?,
        })
    }
}

/// A terminal that changes nothing on the way: this process's end, and the program's.
fn terminal() -> Result<(File, OwnedFd)> {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    let mut settings = tcgetattr(&theirs)?;
    settings.make_raw();
    tcsetattr(&theirs, OptionalActions::Now, &settings)?;
    Ok((ours.into(), theirs))
}

/// Two threads that run on whichever processors this process may use.
fn lcores() -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status").context("Cannot read /proc/self/status")?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let list = list.context("/proc/self/status names no processors")?.trim();
    Ok(format!("0@({list}),1@({list})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read() {
        let text = "
  ######################## NIC statistics for port 0  ########################
  RX-packets: 3          RX-missed: 0          RX-bytes:  180
  RX-errors: 1
  RX-nombuf:  0
  TX-packets: 50         TX-errors: 0          TX-bytes:  3200
";
        let expected = Stats { rx_packets: 3, rx_bytes: 180, rx_errors: 1, tx_packets: 50, tx_bytes: 3200 };
        assert_eq!(Stats::parse(text), Some(expected));
        assert_eq!(Stats::parse("nothing"), None);
    }
}
