//! The loads, and who makes them.

use std::time::{Duration, Instant};

use anyhow::Result;
use tempfile::TempDir;
use tests::daemon::{Builder, Daemon};
use tests::frames;
use tests::netns::packet::PacketSocket;
use tests::netns::{Namespace, open};
use tests::testpmd::{Mode, Options, Testpmd};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF};

use super::floor::{Memory, TX_QUEUE_LEN, Tap, burst, offer};
use super::frame::{Frame, LARGE, SEGMENT};
use super::guest::{Guest, drive};
use super::peer::{Listener, Peer};
use super::subject::Subject;
use super::{Args, Outcome, Run};

/// Time in which nothing happens.
pub const REST: Duration = Duration::from_secs(1);
const TAP: &str = "tap0";
const FLOOR: &str = "floor0";
/// Descriptors of testpmd's rings.
const QUEUE_SIZE: u16 = 1024;
/// The same for large frames, of which it has no more buffers.
const LARGE_QUEUE_SIZE: u16 = 256;

/// One load.
pub struct Workload {
    pub name: &'static str,
    kind: Kind,
    /// Bytes of each frame.
    len: usize,
}

enum Kind {
    /// testpmd transmits through a tap.
    TapTx,
    /// testpmd receives from a tap, frames as they come.
    TapRxTestpmd,
    /// A guest receives from a tap, bursts that wait for its buffers.
    TapRx,
    /// From guest to guest.
    Switch,
    /// From testpmd to testpmd.
    SwitchTestpmd,
    /// To a peer behind a stream socket.
    StreamTx,
    /// From a peer that sends this many frames in each call.
    StreamRx(usize),
}

const fn workload(name: &'static str, kind: Kind, len: usize) -> Workload {
    Workload { name, kind, len }
}

pub const WORKLOADS: [Workload; 18] = [
    workload("tap tx 64", Kind::TapTx, 64),
    workload("tap tx 1514", Kind::TapTx, 1514),
    workload("tap tx 64000 TSO", Kind::TapTx, LARGE),
    workload("tap rx 60", Kind::TapRx, 60),
    workload("tap rx 1514", Kind::TapRx, 1514),
    workload("tap rx 64000 LRO", Kind::TapRx, LARGE),
    workload("tap rx 60 testpmd", Kind::TapRxTestpmd, 60),
    workload("tap rx 1514 testpmd", Kind::TapRxTestpmd, 1514),
    workload("tap rx 64000 testpmd", Kind::TapRxTestpmd, LARGE),
    workload("switch 64", Kind::Switch, 64),
    workload("switch 1514", Kind::Switch, 1514),
    workload("switch 64 testpmd", Kind::SwitchTestpmd, 64),
    workload("switch 1514 testpmd", Kind::SwitchTestpmd, 1514),
    workload("stream tx 64", Kind::StreamTx, 64),
    workload("stream tx 1514", Kind::StreamTx, 1514),
    workload("stream rx 64 x1", Kind::StreamRx(1), 64),
    workload("stream rx 64 x32", Kind::StreamRx(32), 64),
    workload("stream rx 1514 x32", Kind::StreamRx(32), 1514),
];

/// Makes the load for some time.
trait Load {
    /// The interface whose counter tells the frames, and the counter.
    fn counter(&self) -> (usize, &'static str);
    /// Returns how long frames were sent.
    fn make(&mut self, duration: Duration) -> Result<Duration>;
    /// What the same costs without a daemon.
    fn floors(&self) -> &'static [(&'static str, Memory)] {
        &[]
    }
    /// Measures a floor.
    fn floor(&mut self, _memory: Memory, _duration: Duration) -> Result<Run> {
        anyhow::bail!("This load has no floor")
    }
}

/// Runs a workload.
pub fn run(workload: &Workload, args: &Args) -> Result<Outcome> {
    let namespace = Namespace::new()?;
    namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
    let (mut subject, mut load) = start(workload, &namespace, args)?;
    let (index, counter) = load.counter();
    let mut ours = Vec::new();
    let mut floors: Vec<(&'static str, Vec<Run>)> =
        load.floors().iter().map(|(label, _)| (*label, Vec::new())).collect();
    // Not counted: memory is touched, caches and branch predictors warm up.
    load.make(args.duration() / 5)?;
    for round in 1..=args.rounds {
        for ((label, memory), (_, runs)) in load.floors().iter().zip(&mut floors) {
            let run = load.floor(*memory, args.duration())?;
            eprintln!("round {round} {:<21} {label:<20} {:>7.0} ns", workload.name, run.cost());
            runs.push(run);
        }
        let run = subject.measure(index, counter, || load.make(args.duration()))?;
        eprintln!(
            "round {round} {:<21} {:<20} {:>7.0} ns  {run:?}",
            workload.name,
            "vhost-user-net",
            run.cost()
        );
        ours.push(run);
    }
    let calls = if args.no_syscalls {
        None
    } else {
        Some(subject.count_calls(index, counter, || load.make(args.duration()))?)
    };
    let idle = subject.idle(REST)?;
    let footprint = subject.footprint()?;
    let (rss_kib, threads) = (footprint.rss_kib, footprint.threads);
    Ok(Outcome { name: workload.name, ours, floors, calls, idle, rss_kib, threads })
}

fn start(workload: &Workload, namespace: &Namespace, args: &Args) -> Result<(Subject, Box<dyn Load>)> {
    let frame = Frame::new(workload.len);
    let builder =
        Daemon::builder("vhost-user-net").inside(&namespace.root()).args(args.flags.split_whitespace());
    let tap = |builder: Builder| -> Result<Subject> {
        let subject = Subject::start(builder.args(["--tap", TAP]))?;
        namespace.ip(&format!("link set {TAP} txqueuelen {TX_QUEUE_LEN} up"))?;
        Ok(subject)
    };
    let switch = |builder: Builder| Subject::start(builder.port("").port("").arg("--switch"));
    Ok(match workload.kind {
        Kind::TapTx => {
            let subject = tap(builder)?;
            let load = TapTx::start(namespace, &subject, frame)?;
            (subject, Box::new(load))
        }
        Kind::TapRx | Kind::TapRxTestpmd => {
            let subject = tap(builder)?;
            let with_testpmd = matches!(workload.kind, Kind::TapRxTestpmd);
            let load = TapRx::start(namespace, &subject, frame, with_testpmd)?;
            (subject, Box::new(load))
        }
        Kind::Switch => {
            let subject = switch(builder)?;
            let guests = [
                Guest::connect(subject.socket(0), &[], Some(&frame))?,
                Guest::connect(subject.socket(1), &[], None)?,
            ];
            (subject, Box::new(Guests(guests)))
        }
        Kind::SwitchTestpmd => {
            let subject = switch(builder)?;
            let options = options(Mode::Receive);
            // Two of them do not share a folder for their files.
            let other = Namespace::new()?;
            let receiver = Testpmd::start(&other, subject.socket(1), &options)?;
            let options = self::options(Mode::Transmit(workload.len as u16));
            let mut sender = Testpmd::start(namespace, subject.socket(0), &options)?;
            sender.stop_forwarding()?;
            (subject, Box::new(SwitchTestpmd { sender, _receiver: receiver, _other: other }))
        }
        Kind::StreamTx | Kind::StreamRx(_) => {
            let listener = Listener::new()?;
            let subject = Subject::start(builder.arg("--stream").arg(listener.path()))?;
            let sends = matches!(workload.kind, Kind::StreamTx);
            let guest = Guest::connect(subject.socket(0), &[], sends.then_some(&frame))?;
            let peer = listener.accept()?;
            match workload.kind {
                Kind::StreamRx(per_call) => (subject, Box::new(StreamRx { guest, peer, frame, per_call })),
                _ => (subject, Box::new(StreamTx { guest, _peer: peer })),
            }
        }
    })
}

fn options(mode: Mode) -> Options {
    let queue_size = if matches!(mode, Mode::Segment { .. }) { LARGE_QUEUE_SIZE } else { QUEUE_SIZE };
    Options { queue_size, ..Options::new(mode) }
}

/// Lets a testpmd transmit for some time.
fn transmit(testpmd: &mut Testpmd, duration: Duration) -> Result<Duration> {
    let start = Instant::now();
    testpmd.start_forwarding()?;
    std::thread::sleep(duration);
    let elapsed = start.elapsed();
    testpmd.stop_forwarding()?;
    Ok(elapsed)
}

struct TapTx {
    testpmd: Testpmd,
    tap: Tap,
    frame: Frame,
    _folder: TempDir,
}

impl TapTx {
    fn start(namespace: &Namespace, subject: &Subject, frame: Frame) -> Result<Self> {
        let tap = Tap::new(namespace, FLOOR)?;
        let folder = TempDir::with_prefix("net-bench-")?;
        let mode = if frame.is_large() {
            let capture = folder.path().join("large.pcap");
            frames::write_capture(&capture, std::slice::from_ref(&frame.bytes))?;
            Mode::Segment { capture, size: SEGMENT }
        } else {
            Mode::Transmit(frame.bytes.len() as u16)
        };
        let mut testpmd = Testpmd::start(namespace, subject.socket(0), &options(mode))?;
        testpmd.stop_forwarding()?;
        Ok(Self { testpmd, tap, frame, _folder: folder })
    }
}

impl Load for TapTx {
    fn counter(&self) -> (usize, &'static str) {
        (0, "tx_frames")
    }

    fn make(&mut self, duration: Duration) -> Result<Duration> {
        transmit(&mut self.testpmd, duration)
    }

    fn floors(&self) -> &'static [(&'static str, Memory)] {
        if self.frame.is_large() {
            &[("write, cold memory", Memory::Cold), ("write, hot memory", Memory::Hot)]
        } else {
            &[("write", Memory::Hot)]
        }
    }

    fn floor(&mut self, memory: Memory, duration: Duration) -> Result<Run> {
        self.tap.write(&self.frame, memory, duration)
    }
}

struct TapRx {
    receiver: Receiver,
    socket: PacketSocket,
    tap: Tap,
    frame: Frame,
}

enum Receiver {
    Testpmd { _process: Testpmd },
    Guest(Box<Guest>),
}

impl TapRx {
    fn start(namespace: &Namespace, subject: &Subject, frame: Frame, with_testpmd: bool) -> Result<Self> {
        let tap = Tap::new(namespace, FLOOR)?;
        let socket = open::packet(namespace, TAP)?;
        let receiver = if with_testpmd {
            let options = Options { large_receive: frame.is_large(), ..options(Mode::Receive) };
            Receiver::Testpmd { _process: Testpmd::start(namespace, subject.socket(0), &options)? }
        } else {
            let large = [VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4];
            let features = if frame.is_large() { &large[..] } else { &[] };
            let mut guest = Guest::connect(subject.socket(0), features, None)?;
            namespace.wait_carrier(TAP)?;
            guest.withhold();
            burst(&socket, &frame)?;
            guest.wait_used()?;
            Receiver::Guest(Box::new(guest))
        };
        namespace.wait_carrier(TAP)?;
        Ok(Self { receiver, socket, tap, frame })
    }
}

impl Load for TapRx {
    fn counter(&self) -> (usize, &'static str) {
        (0, "rx_frames")
    }

    fn make(&mut self, duration: Duration) -> Result<Duration> {
        let start = Instant::now();
        match &mut self.receiver {
            Receiver::Testpmd { .. } => offer(&self.socket, &self.frame, duration)?,
            Receiver::Guest(guest) => {
                while start.elapsed() < duration {
                    // The whole burst waits in the tap's queue until the guest has buffers.
                    burst(&self.socket, &self.frame)?;
                    guest.receive_all()?;
                }
            }
        }
        Ok(start.elapsed())
    }

    fn floors(&self) -> &'static [(&'static str, Memory)] {
        if self.frame.is_large() {
            &[
                ("read, 2M in pieces", Memory::Ring),
                ("read, cold in pieces", Memory::ColdPieces),
                ("read, cold memory", Memory::Cold),
                ("read, hot memory", Memory::Hot),
            ]
        } else {
            &[("read", Memory::Hot)]
        }
    }

    // testpmd goes on to poll, so that the floor has as much company as the daemon.
    fn floor(&mut self, memory: Memory, duration: Duration) -> Result<Run> {
        let in_bursts = matches!(self.receiver, Receiver::Guest(_));
        self.tap.read(&self.frame, memory, in_bursts, duration)
    }
}

/// The first sends, the second receives.
struct Guests([Guest; 2]);

impl Load for Guests {
    fn counter(&self) -> (usize, &'static str) {
        (1, "rx_frames")
    }

    fn make(&mut self, duration: Duration) -> Result<Duration> {
        let [first, second] = &mut self.0;
        Ok(drive(&mut [first, second], duration))
    }
}

struct SwitchTestpmd {
    sender: Testpmd,
    _receiver: Testpmd,
    _other: Namespace,
}

impl Load for SwitchTestpmd {
    fn counter(&self) -> (usize, &'static str) {
        (0, "tx_frames")
    }

    fn make(&mut self, duration: Duration) -> Result<Duration> {
        transmit(&mut self.sender, duration)
    }
}

struct StreamTx {
    guest: Guest,
    _peer: Peer,
}

impl Load for StreamTx {
    fn counter(&self) -> (usize, &'static str) {
        (0, "tx_frames")
    }

    fn make(&mut self, duration: Duration) -> Result<Duration> {
        Ok(drive(&mut [&mut self.guest], duration))
    }
}

struct StreamRx {
    guest: Guest,
    peer: Peer,
    frame: Frame,
    per_call: usize,
}

impl Load for StreamRx {
    fn counter(&self) -> (usize, &'static str) {
        (0, "rx_frames")
    }

    fn make(&mut self, duration: Duration) -> Result<Duration> {
        let Self { guest, peer, frame, per_call } = self;
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| peer.send(frame, *per_call, duration));
            let elapsed = drive(&mut [guest], duration);
            sender.join().expect("no panic")?;
            Ok(elapsed)
        })
    }
}
