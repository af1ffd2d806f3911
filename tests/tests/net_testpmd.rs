//! DPDK's testpmd as a front end that nobody here wrote: its driver, its shared memory, its idea of the protocol.
#![expect(clippy::cast_precision_loss, clippy::float_cmp, reason = "lengths of frames on average")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use tempfile::TempDir;
use tests::daemon::{Builder, Daemon};
use tests::frames::{self, GSO_TCPV4, Header, NEEDS_CSUM, mac};
use tests::netns::{Namespace, open};
use tests::testpmd::{Mode, Options, Testpmd};

const TAP: &str = "tap0";
/// Any step of a test; a loaded machine may take long.
const LIMIT: Duration = Duration::from_secs(60);
/// Frames that show that it was no accident.
const MANY: u64 = 1000;
/// Payload of each segment of a large frame.
const SEGMENT: u16 = 1448;
const LARGE: usize = 64_000;

fn namespace() -> Result<Namespace> {
    let namespace = Namespace::new()?;
    // No frames but those of the tests.
    namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
    Ok(namespace)
}

/// A daemon on a new tap, with more flags.
fn daemon(namespace: &Namespace, queues: u16) -> Result<Builder> {
    namespace.add_tap(TAP, queues)?;
    namespace.ip(&format!("link set {TAP} up"))?;
    Ok(builder(namespace))
}

fn builder(namespace: &Namespace) -> Builder {
    Daemon::builder("vhost-user-net").inside(&namespace.root()).args(["--tap", TAP])
}

/// A TCP segment that is longer than any Ethernet takes, with the header that says how to cut it.
fn large_frame() -> (Header, Vec<u8>) {
    let addresses = ["198.18.0.1", "198.18.0.2"].map(|address| address.parse().expect("an address"));
    let header = Header {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: SEGMENT,
        csum_start: 34,
        csum_offset: 16,
    };
    (header, frames::tcp4(mac(9), mac(0), addresses, [9, 9], &vec![0x5a; LARGE - 54]))
}

/// Waits until the host has received at least `count` more frames from the tap; returns the bytes of each on average.
fn wait_received(namespace: &Namespace, count: u64) -> Result<f64> {
    let before = namespace.counters(TAP)?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let since = namespace.counters(TAP)?.since(&before);
        if since.rx_packets >= count {
            return Ok(since.rx_bytes as f64 / since.rx_packets as f64);
        }
        ensure!(Instant::now() < deadline, "Only {} frames came out of {TAP}", since.rx_packets);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A counter of the interface, as the daemon reports it when it is asked now.
fn counter(daemon: &mut Daemon, name: &str) -> Result<u64> {
    let reports = |daemon: &Daemon| daemon.stderr().matches("Counters of ").count();
    let before = reports(daemon);
    daemon.signal(Signal::USR1)?;
    let deadline = Instant::now() + LIMIT;
    while reports(daemon) == before {
        ensure!(Instant::now() < deadline, "The daemon reports no counters: {}", daemon.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
    let text = daemon.stderr();
    let line = text.lines().rfind(|line| line.contains("Counters of ")).context("No report")?;
    let value = line.split_whitespace().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    Ok(value.unwrap_or("0").parse()?)
}

fn transmits_whole_frames(length: u16) -> Result<()> {
    let namespace = namespace()?;
    let daemon = daemon(&namespace, 1)?.start()?;
    let mut testpmd = Testpmd::start(&namespace, daemon.socket(), &Options::new(Mode::Transmit(length)))?;
    testpmd.wait_stats(LIMIT, |stats| stats.tx_packets >= MANY)?;
    ensure!(wait_received(&namespace, MANY)? == f64::from(length), "Frames have another length");
    let socket = open::packet(&namespace, TAP)?;
    let passed = socket.receive(LIMIT)?.context("No frame passes")?;
    assert_eq!((passed.frame.len(), &passed.frame[..6]), (usize::from(length), &mac(0)[..]));
    testpmd.quit()
}

#[test]
fn transmits_64_bytes() -> Result<()> {
    transmits_whole_frames(64)
}

#[test]
fn transmits_1514_bytes() -> Result<()> {
    transmits_whole_frames(1514)
}

#[test]
fn segments_of_64_kilobytes_arrive_whole() -> Result<()> {
    let namespace = namespace()?;
    let mut daemon = daemon(&namespace, 1)?.start()?;
    let folder = TempDir::new()?;
    let capture = folder.path().join("large.pcap");
    let (_, frame) = large_frame();
    frames::write_capture(&capture, std::slice::from_ref(&frame))?;
    let options = Options::new(Mode::Segment { capture, size: SEGMENT });
    let testpmd = Testpmd::start(&namespace, daemon.socket(), &options)?;
    ensure!(wait_received(&namespace, MANY)? == LARGE as f64, "The frames were cut on the way");
    let socket = open::packet(&namespace, TAP)?;
    let passed = socket.receive(LIMIT)?.context("No frame passes")?;
    assert_eq!((passed.header.gso_type, passed.header.gso_size), (GSO_TCPV4, SEGMENT));
    assert_eq!(passed.frame.len(), LARGE);
    assert_eq!(passed.frame[54..], frame[54..]);
    let large = counter(&mut daemon, "tx_large")?;
    ensure!(large >= MANY && counter(&mut daemon, "tx_frames")? >= large, "{large} large frames");
    testpmd.quit()
}

/// Sends frames at the tap until testpmd has received [`MANY`] more.
fn receive_many(
    namespace: &Namespace,
    testpmd: &mut Testpmd,
    header: Header,
    frame: &[u8],
) -> Result<tests::testpmd::Stats> {
    let socket = open::packet(namespace, TAP)?;
    let before = testpmd.stats()?;
    let deadline = Instant::now() + LIMIT;
    loop {
        // Not all at once: testpmd shares its processor with others, and what finds no room is lost.
        socket.blast(header, &[frame.to_vec()], 64, Duration::from_secs(1))?;
        let mut stats = testpmd.stats()?;
        if stats.rx_packets >= before.rx_packets + MANY {
            // Its packets and its bytes belong together when nothing comes any more.
            loop {
                let last = stats;
                stats = testpmd.stats()?;
                if stats == last {
                    return Ok(stats);
                }
                ensure!(Instant::now() < deadline, "dpdk-testpmd does not come to rest: {stats:?}");
            }
        }
        if Instant::now() >= deadline {
            bail!("dpdk-testpmd came from {before:?} to {stats:?}, no further");
        }
    }
}

#[test]
fn receives_small_frames() -> Result<()> {
    let namespace = namespace()?;
    let mut daemon = daemon(&namespace, 1)?.start()?;
    let mut testpmd = Testpmd::start(&namespace, daemon.socket(), &Options::new(Mode::Receive))?;
    let frame = frames::numbered(mac(9), mac(0), 7, 60);
    let stats = receive_many(&namespace, &mut testpmd, Header::default(), &frame)?;
    assert_eq!((stats.rx_bytes, stats.rx_errors), (60 * stats.rx_packets, 0));
    assert_eq!(counter(&mut daemon, "rx_large")?, 0);
    testpmd.quit()
}

/// With buffers of 2 KiB, which are merged.
#[test]
fn receives_large_frames_whole() -> Result<()> {
    let namespace = namespace()?;
    let mut daemon = daemon(&namespace, 1)?.start()?;
    let options = Options { large_receive: true, queue_size: 1024, ..Options::new(Mode::Receive) };
    let mut testpmd = Testpmd::start(&namespace, daemon.socket(), &options)?;
    let (header, frame) = large_frame();
    let stats = receive_many(&namespace, &mut testpmd, header, &frame)?;
    assert_eq!((stats.rx_bytes, stats.rx_errors), (LARGE as u64 * stats.rx_packets, 0));
    ensure!(counter(&mut daemon, "rx_large")? >= MANY, "The daemon counts no large frames");
    testpmd.quit()
}

#[test]
fn two_pairs_of_queues_are_used() -> Result<()> {
    let namespace = namespace()?;
    let daemon = daemon(&namespace, 2)?.args(["--num-queue-pairs", "2"]).start()?;
    let options = Options { queue_pairs: 2, ..Options::new(Mode::Echo) };
    let mut testpmd = Testpmd::start(&namespace, daemon.socket(), &options)?;
    // The kernel chooses a queue by flow.
    let addresses = ["198.18.0.1", "198.18.0.2"].map(|address| address.parse().expect("an address"));
    let flows: Vec<Vec<u8>> =
        (0..64).map(|port| frames::udp4(mac(9), mac(0), addresses, [1000 + port, 9], &[7; 100])).collect();
    let socket = open::packet(&namespace, TAP)?;
    let deadline = Instant::now() + LIMIT;
    loop {
        socket.blast(Header::default(), &flows, 64, Duration::from_secs(1))?;
        let queues = testpmd.queue_stats()?;
        assert_eq!(queues.len(), 2);
        if queues.iter().all(|&(received, sent)| received >= 50 && sent >= 50) {
            break;
        }
        ensure!(Instant::now() < deadline, "Received and sent by queue: {queues:?}");
    }
    testpmd.quit()
}

/// The daemon is killed and started again under a testpmd that listens and goes on.
#[test]
fn traffic_resumes_after_each_restart_of_the_daemon() -> Result<()> {
    let namespace = namespace()?;
    namespace.add_tap(TAP, 1)?;
    namespace.ip(&format!("link set {TAP} up"))?;
    let folder = TempDir::with_prefix("vhost-user-")?;
    let path = folder.path().join("server");
    let start = |path: &Path| builder(&namespace).socket(path).client().start();
    let mut daemon = start(&path)?;
    // It waits for the first connection before it says anything.
    let options = Options { is_server: true, ..Options::new(Mode::Echo) };
    // It is not talked to after this: what it writes when a link goes and comes back gets in between its answers.
    let testpmd = Testpmd::start(&namespace, &path, &options)?;
    let frame = frames::numbered(mac(9), mac(0), 7, 60);
    let socket = open::packet(&namespace, TAP)?;
    for restart in 0..4 {
        if restart > 0 {
            daemon.kill();
            daemon = start(&path)?;
        }
        let before = namespace.counters(TAP)?;
        let came_back = || Ok::<_, anyhow::Error>(namespace.counters(TAP)?.since(&before).rx_packets);
        let deadline = Instant::now() + LIMIT;
        while came_back()? < MANY {
            if Instant::now() >= deadline {
                let (received, sent) =
                    (counter(&mut daemon, "rx_frames")?, counter(&mut daemon, "tx_frames")?);
                let words = daemon.stderr();
                bail!("After {restart} restarts: {received} passed and {sent} came back\n{words}");
            }
            socket.blast(Header::default(), std::slice::from_ref(&frame), 64, Duration::from_secs(1))?;
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    testpmd.kill();
    Ok(())
}
