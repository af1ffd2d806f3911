//! `vhost-user-net` on a tap in a namespace, seen from both sides: rings, and a packet socket on the interface.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::{Guest, RING_SIZE, check_idle, net_daemon, plain, wait_counter, wait_until};
use tests::driver::net::{LONG_HEADER_LEN, RawNet, Received};
use tests::driver::raw::RawOptions;
use tests::frames::{self, BROADCAST, GSO_TCPV4, HEADER_LEN, Header, NEEDS_CSUM, mac, numbered};
use tests::netns::packet::PacketSocket;
use tests::netns::{Namespace, open};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};

const INTERFACE: &str = "the interface";
const LIMIT: Duration = Duration::from_secs(10);
const MSS: u16 = 1448;
/// `VHOST_USER_SEND_RARP`
const SEND_RARP: u32 = 19;
/// `VHOST_USER_NET_SET_MTU`
const NET_SET_MTU: u32 = 20;
/// Config space `status`: the link is up.
const LINK_UP: u16 = 1;

/// A namespace with a tap, on which nobody speaks by themselves.
fn namespace() -> Result<Namespace> {
    let namespace = Namespace::new()?;
    namespace.add_tap("tap0", 1)?;
    namespace.sysctl("net.ipv6.conf.tap0.disable_ipv6", "1")?;
    namespace.ip("link set tap0 up mtu 9000")?;
    Ok(namespace)
}

/// A guest and what is seen of it on its tap.
struct Line {
    guest: Guest,
    socket: PacketSocket,
    daemon: Daemon,
    namespace: Namespace,
}

impl Line {
    fn new(options: &RawOptions) -> Result<Self> {
        Self::with(&[], options, 64, &[2048])
    }

    fn with(args: &[&str], options: &RawOptions, chains: u16, sizes: &[usize]) -> Result<Self> {
        let namespace = namespace()?;
        let daemon = net_daemon().inside(&namespace.root()).args(["--tap", "tap0"]).args(args).start()?;
        let guest = Guest::join_with(daemon.socket(), mac(1), options, chains, sizes)?;
        let socket = open::packet(&namespace, "tap0")?;
        Ok(Self { guest, socket, daemon, namespace })
    }

    /// The next frame that the guest sent, as it came to the host.
    fn incoming(&self) -> Result<(Header, Vec<u8>)> {
        let passed =
            self.socket.find(LIMIT, |passed| !passed.outgoing)?.context("A frame does not arrive")?;
        Ok((passed.header, passed.frame))
    }

    fn check_both_ways(&mut self) -> Result<()> {
        let frame = numbered(mac(1), mac(9), 1, 60);
        self.guest.send(&frame)?;
        ensure!(self.incoming()? == (Header::default(), frame), "Another frame arrived");
        let frame = numbered(mac(9), mac(1), 2, 1514);
        self.socket.send(Header::default(), &frame)?;
        self.guest.expect(&frame)
    }

    /// Receives a TCP packet with this payload in segments of `MSS` bytes.
    fn expect_segments(&mut self, payload: &[u8]) -> Result<()> {
        let mut together = Vec::new();
        while together.len() < payload.len() {
            let received = self.guest.receive()?;
            ensure!(received.header.gso_type == 0, "{:?}", received.header);
            ensure!(received.header.flags & NEEDS_CSUM == 0, "{:?}", received.header);
            let (sequence, data) = frames::tcp_segment(&received.frame)?;
            ensure!(sequence == 1 + together.len() as u32, "{sequence} after {}", together.len());
            ensure!(data.len() <= MSS.into());
            together.extend(data);
        }
        ensure!(together == payload);
        Ok(())
    }
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

fn tcp4(payload: &[u8]) -> Vec<u8> {
    frames::tcp4(mac(9), mac(1), [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()], [1000, 80], payload)
}

#[test]
fn what_the_kernel_can_do_is_offered() -> Result<()> {
    let namespace = namespace()?;
    let host = [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM];
    let tso = [
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
    ];
    let ufo = [VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO];
    for (offloads, expected) in [
        ("all", [&host[..], &tso, &ufo].concat()),
        ("none", Vec::new()),
        ("csum", host.to_vec()),
        ("tso", [&host[..], &tso].concat()),
    ] {
        let daemon =
            net_daemon().inside(&namespace.root()).args(["--tap", "tap0", "--offloads", offloads]).start()?;
        let net = RawNet::connect(daemon.socket(), &plain())?;
        let offered = net.device.frontend.get_features()?;
        for feature in [&host[..], &tso, &ufo].concat() {
            let is_offered = offered & 1 << feature != 0;
            assert_eq!(is_offered, expected.contains(&feature), "feature {feature} with {offloads}");
        }
    }
    Ok(())
}

#[test]
fn frames_pass_with_every_header() -> Result<()> {
    let legacy = plain().without(VIRTIO_F_VERSION_1);
    for (options, len, sizes) in [
        (legacy, HEADER_LEN, &[2048][..]),
        (legacy, HEADER_LEN, &[10, 1514]),
        (legacy.with(VIRTIO_NET_F_MRG_RXBUF), LONG_HEADER_LEN, &[500]),
        (plain(), LONG_HEADER_LEN, &[1, 11, 14, 1500]),
        (plain().with(VIRTIO_NET_F_MRG_RXBUF), LONG_HEADER_LEN, &[26]),
        (plain().with(VIRTIO_NET_F_MRG_RXBUF), LONG_HEADER_LEN, &[20, 20]),
    ] {
        let mut line = Line::with(&[], &options, (RING_SIZE / sizes.len() as u16).min(100), sizes)?;
        assert_eq!(line.guest.net.header_len(), len);
        for (number, length) in [(1, 60), (2, 1514), (3, 22), (4, 1514)] {
            let frame = numbered(mac(9), mac(1), number, length);
            line.socket.send(Header::default(), &frame)?;
            let Received { header, num_buffers, frame: arrived, used } = line.guest.receive()?;
            assert_eq!((header, &arrived), (Header::default(), &frame));
            assert_eq!(num_buffers.unwrap_or(1), used.len() as u16);
            assert_eq!(used.iter().sum::<u32>() as usize, len + length);
            let frame = numbered(mac(1), mac(9), number, length);
            line.guest.send(&frame)?;
            assert_eq!(line.incoming()?, (Header::default(), frame));
        }
        wait_counter(&mut line.daemon, INTERFACE, "rx_frames", 4)?;
    }
    Ok(())
}

/// The kernel does what the driver has not said it can do itself.
#[test]
fn received_offloads_follow_what_the_driver_took() -> Result<()> {
    let data = payload(30_000);
    let mergeable = plain().with(VIRTIO_NET_F_MRG_RXBUF);
    let csum = mergeable.with(VIRTIO_NET_F_GUEST_CSUM);
    let whole = |options: &RawOptions| -> Result<bool> {
        let mut line = Line::new(options)?;
        let mut frame = tcp4(&data);
        let header = frames::leave_segmentation(&mut frame, MSS)?;
        line.socket.send(header, &frame)?;
        if !options_have(options, VIRTIO_NET_F_GUEST_TSO4) {
            // With GUEST_CSUM the segments' checksums may be left undone.
            if !options_have(options, VIRTIO_NET_F_GUEST_CSUM) {
                line.expect_segments(&data)?;
            }
            return Ok(false);
        }
        let received = line.guest.receive()?;
        ensure!(received.header.gso_type == GSO_TCPV4 && received.header.gso_size == MSS);
        ensure!(received.header.flags & NEEDS_CSUM != 0);
        ensure!(received.frame == frame);
        ensure!(received.num_buffers == Some((LONG_HEADER_LEN + frame.len()).div_ceil(2048) as u16));
        wait_counter(&mut line.daemon, INTERFACE, "rx_large", 1)?;
        Ok(true)
    };
    assert!(!whole(&plain())?);
    assert!(!whole(&plain().without(VIRTIO_F_VERSION_1))?);
    assert!(!whole(&mergeable)?);
    assert!(whole(&csum.with(VIRTIO_NET_F_GUEST_TSO4))?);
    // A checksum alone.
    for (options, undone) in [(plain(), false), (csum, true)] {
        let mut line = Line::new(&options)?;
        let complete = tcp4(&payload(500));
        let mut frame = complete.clone();
        let header = frames::leave_checksum(&mut frame)?;
        line.socket.send(header, &frame)?;
        let received = line.guest.receive()?;
        assert_eq!(received.header.flags & NEEDS_CSUM != 0, undone);
        assert_eq!(received.frame, if undone { frame } else { complete });
    }
    Ok(())
}

fn options_have(options: &RawOptions, feature: u32) -> bool {
    options.features & 1 << feature != 0
}

/// A front end that comes back with other features gets other frames.
#[test]
fn offloads_change_with_the_front_end() -> Result<()> {
    let able =
        plain().with(VIRTIO_NET_F_MRG_RXBUF).with(VIRTIO_NET_F_GUEST_CSUM).with(VIRTIO_NET_F_GUEST_TSO4);
    let data = payload(10_000);
    let mut frame = tcp4(&data);
    let header = frames::leave_segmentation(&mut frame, MSS)?;
    let mut line = Line::new(&able)?;
    for _ in 0..2 {
        line.socket.send(header, &frame)?;
        assert!(line.guest.receive()?.frame == frame);
        for options in [plain().without(VIRTIO_F_VERSION_1), able] {
            let Line { guest, socket, daemon, namespace } = line;
            drop(guest);
            let guest = Guest::join(daemon.socket(), mac(1), &options)?;
            line = Line { guest, socket, daemon, namespace };
            if options_have(&options, VIRTIO_F_VERSION_1) {
                break;
            }
            line.socket.send(header, &frame)?;
            line.expect_segments(&data)?;
        }
    }
    Ok(())
}

#[test]
fn what_the_driver_leaves_undone_is_left_to_the_kernel() -> Result<()> {
    let options = plain().with(VIRTIO_NET_F_CSUM).with(VIRTIO_NET_F_HOST_TSO4);
    let mut line = Line::new(&options)?;
    let mut frame = tcp4(&payload(1000));
    let header = frames::leave_checksum(&mut frame)?;
    line.guest.send_with(header, &frame)?;
    let (seen, arrived) = line.incoming()?;
    assert_eq!((seen.flags & NEEDS_CSUM, seen.csum_start, seen.csum_offset), (NEEDS_CSUM, 34, 16));
    assert_eq!(arrived, frame);

    let mut frame = tcp4(&payload(60_000));
    let header = frames::leave_segmentation(&mut frame, MSS)?;
    for cuts in [&[][..], &[12], &[12, 66, 4096, 8192, 30_000]] {
        let request = line.guest.tx.request(header, &frame).cut(cuts, &[]);
        line.guest.tx.execute(&request)?;
        let (seen, arrived) = line.incoming()?;
        assert_eq!((seen.gso_type, seen.gso_size), (GSO_TCPV4, MSS));
        assert!(arrived == frame);
    }
    wait_counter(&mut line.daemon, INTERFACE, "tx_large", 3)
}

#[test]
fn a_header_that_does_not_fit_its_frame_is_dropped_and_counted() -> Result<()> {
    let options = plain().with(VIRTIO_NET_F_CSUM).with(VIRTIO_NET_F_HOST_TSO4);
    let mut line = Line::new(&options)?;
    let mut frame = tcp4(&payload(4000));
    let good = frames::leave_segmentation(&mut frame, MSS)?;
    let behind = frame.len() as u16;
    let bad = [
        ("a checksum behind the frame", Header { csum_start: behind, ..good }),
        ("a checksum far behind it", Header { csum_start: u16::MAX, csum_offset: u16::MAX, ..good }),
        ("an unknown type", Header { gso_type: 2, ..good }),
        ("another unknown type", Header { gso_type: 0x7f, ..good }),
        ("segments of nothing", Header { gso_size: 0, ..good }),
    ];
    for (count, (what, header)) in (1..).zip(bad) {
        line.guest.send_with(header, &frame)?;
        line.guest.send_with(good, &frame)?;
        let (seen, arrived) = line.incoming()?;
        ensure!(seen.gso_type == GSO_TCPV4 && arrived == frame, "{what}: {seen:?}");
        wait_counter(&mut line.daemon, INTERFACE, "tx_bad_frame", count).with_context(|| what.to_owned())?;
    }
    line.guest.send(&[1; 13])?;
    line.guest.send(&[])?;
    line.check_both_ways()?;
    wait_counter(&mut line.daemon, INTERFACE, "tx_bad_frame", 7)
}

#[test]
fn a_frame_that_fits_in_no_buffer_is_lost_alone() -> Result<()> {
    let mut line = Line::with(&[], &plain(), 8, &[1012])?;
    line.socket.send(Header::default(), &numbered(mac(9), mac(1), 1, 1001))?;
    let frame = numbered(mac(9), mac(1), 2, 1000);
    line.socket.send(Header::default(), &frame)?;
    line.guest.expect(&frame)?;
    wait_counter(&mut line.daemon, INTERFACE, "rx_too_long", 1)
}

#[test]
fn frames_wait_in_the_tap_for_buffers() -> Result<()> {
    for options in [plain(), plain().with(VIRTIO_NET_F_MRG_RXBUF)] {
        let mut line = Line::with(&[], &options, 0, &[1600])?;
        for number in 0..200 {
            line.socket.send(Header::default(), &numbered(mac(9), mac(1), number, 1514))?;
        }
        check_idle(&line.daemon)?;
        // The other direction goes on.
        let frame = numbered(mac(1), mac(9), 1, 60);
        line.guest.send(&frame)?;
        assert_eq!(line.incoming()?.1, frame);
        line.guest.post(20);
        for number in 0..200 {
            assert_eq!(frames::number(&line.guest.receive()?.frame), Some(number));
        }
        wait_counter(&mut line.daemon, INTERFACE, "rx_frames", 200)?;
    }
    Ok(())
}

/// More than the tap's queue holds.
#[test]
fn a_tap_that_overflows_costs_nothing() -> Result<()> {
    let mut line = Line::with(&[], &plain(), 2, &[2048])?;
    let frames: Vec<_> = (0..8).map(|number| numbered(mac(9), mac(1), number, 200)).collect();
    line.socket.blast(Header::default(), &frames, 3000, Duration::from_millis(300))?;
    check_idle(&line.daemon)?;
    for _ in 0..2 {
        line.guest.receive_once()?;
    }
    line.guest.post(50);
    // A new one comes behind those that the kernel kept, and there is room for it once it took some of them.
    let marker = numbered(mac(9), mac(1), 99, 60);
    wait_until("what the tap held is over", || {
        line.socket.send(Header::default(), &marker)?;
        Ok(line.guest.receive_ready()?.iter().any(|received| received.frame == marker))
    })
}

/// Too few buffers for a frame that was read already: it waits for more.
#[test]
fn a_frame_waits_for_enough_mergeable_buffers() -> Result<()> {
    let mut line = Line::with(&[], &plain().with(VIRTIO_NET_F_MRG_RXBUF), 2, &[512])?;
    let frame = numbered(mac(9), mac(1), 1, 1514);
    line.socket.send(Header::default(), &frame)?;
    check_idle(&line.daemon)?;
    line.guest.post(1);
    check_idle(&line.daemon)?;
    line.guest.post(1);
    line.guest.expect(&frame)?;
    line.check_both_ways()
}

#[test]
fn a_quiet_interface_costs_nothing() -> Result<()> {
    let mut line = Line::new(&plain())?;
    check_idle(&line.daemon)?;
    line.check_both_ways()?;
    check_idle(&line.daemon)?;
    drop(line.guest);
    check_idle(&line.daemon)
}

#[test]
fn frames_beyond_the_limit_wait_in_the_tap() -> Result<()> {
    let mut line = Line::with(&["--rate-limit-rx", "packets=10:5"], &plain(), 64, &[2048])?;
    let start = std::time::Instant::now();
    for number in 0..20 {
        line.socket.send(Header::default(), &numbered(mac(9), mac(1), number, 60))?;
    }
    for number in 0..20 {
        assert_eq!(frames::number(&line.guest.receive()?.frame), Some(number));
    }
    // 15 of them had to wait, at 100 ms each.
    ensure!(start.elapsed() > Duration::from_millis(1200), "all came in {:?}", start.elapsed());
    Ok(())
}

#[test]
fn a_guest_that_moved_here_is_announced() -> Result<()> {
    for options in [plain(), plain().without(VIRTIO_F_VERSION_1)] {
        let options = options.with_protocol(VhostUserProtocolFeatures::RARP);
        let mut line = Line::new(&options)?;
        let moved = [2, 0x11, 0x22, 0x33, 0x44, 0x55];
        let body = [&moved[..], &[0; 2]].concat();
        assert_eq!(line.guest.net.device.wire.acknowledged(SEND_RARP, &body, &[])?, 0);
        let (header, frame) = line.incoming()?;
        assert_eq!((header, frame.len()), (Header::default(), 60));
        assert_eq!(frame[..14], [&BROADCAST[..], &moved, &[0x80, 0x35]].concat());
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&moved[..], &moved[..]));
        line.check_both_ways()?;
    }
    Ok(())
}

#[test]
fn the_mtu_is_that_of_the_tap() -> Result<()> {
    let options = plain()
        .with(VIRTIO_NET_F_MTU)
        .with(VIRTIO_NET_F_STATUS)
        .with_protocol(VhostUserProtocolFeatures::MTU);
    let mut line = Line::with(&["--mtu", "1400"], &options, 8, &[2048])?;
    let config = line.guest.net.config()?;
    assert_eq!((config.mtu, config.status & LINK_UP, config.duplex), (1400, LINK_UP, 1));
    let mtu =
        |line: &Line| -> Result<bool> { Ok(line.namespace.ip("link show tap0")?.contains("mtu 1400 ")) };
    assert!(mtu(&line)?);
    // A guest's smaller one is no reason to change it, a larger one is.
    let set =
        |line: &Line, mtu: u64| line.guest.net.device.wire.acknowledged(NET_SET_MTU, &mtu.to_le_bytes(), &[]);
    assert_eq!(set(&line, 1300)?, 0);
    assert!(mtu(&line)?);
    assert_eq!(set(&line, 9000)?, 0);
    assert!(line.namespace.ip("link show tap0")?.contains("mtu 9000 "));
    assert_ne!(set(&line, 1 << 16)?, 0);
    let frame = numbered(mac(1), mac(9), 1, 9014);
    line.guest.send(&frame)?;
    assert_eq!(line.incoming()?.1, frame);
    Ok(())
}

#[test]
fn the_link_follows_the_tap() -> Result<()> {
    let options = plain().with(VIRTIO_NET_F_STATUS).with_protocol(VhostUserProtocolFeatures::BACKEND_REQ);
    let mut line = Line::new(&options)?;
    let (mut channel, theirs) = UnixStream::pair()?;
    channel.set_read_timeout(Some(LIMIT))?;
    line.guest.net.device.frontend.set_backend_request_fd(&theirs.as_raw_fd())?;
    assert_eq!(line.guest.net.config()?.status, LINK_UP);
    for (state, status) in [("down", 0), ("up", LINK_UP)] {
        line.namespace.ip(&format!("link set tap0 {state}"))?;
        let mut message = [0; 12];
        channel.read_exact(&mut message).context("The front end is told nothing")?;
        assert_eq!(message, [2_u32, 1, 0].map(u32::to_ne_bytes).as_flattened());
        assert_eq!(line.guest.net.config()?.status, status);
        if status == 0 {
            check_idle(&line.daemon)?;
            line.guest.send(&numbered(mac(1), mac(9), 1, 60))?;
            wait_counter(&mut line.daemon, INTERFACE, "tx_link_down", 1)?;
        }
    }
    // The old one has an error of its own to tell.
    line.socket = open::packet(&line.namespace, "tap0")?;
    line.check_both_ways()
}

#[test]
fn a_capture_has_all_frames() -> Result<()> {
    let capture = tempfile::NamedTempFile::new()?;
    let path = capture.path().display().to_string();
    let options = plain()
        .with(VIRTIO_NET_F_MRG_RXBUF)
        .with(VIRTIO_NET_F_GUEST_CSUM)
        .with(VIRTIO_NET_F_GUEST_TSO4)
        .with(VIRTIO_NET_F_CSUM)
        .with(VIRTIO_NET_F_HOST_TSO4);
    let mut line = Line::with(&["--pcap", &path], &options, 100, &[1000])?;
    let mut expected = Vec::new();
    for _ in 0..2 {
        // See Guest::settle.
        expected.push(numbered(mac(1), tests::driver::lan::LINK_LOCAL, 0, 60));
    }
    for (number, len) in [(1, 60), (2, 1514), (3, 5000)] {
        let frame = numbered(mac(1), mac(9), number, len);
        line.guest.send(&frame)?;
        expected.push(frame);
        let frame = numbered(mac(9), mac(1), number, len);
        line.socket.send(Header::default(), &frame)?;
        assert!(line.guest.receive()?.frame == frame);
        expected.push(frame);
    }
    let mut frame = tcp4(&payload(40_000));
    let header = frames::leave_segmentation(&mut frame, MSS)?;
    line.socket.send(header, &frame)?;
    assert!(line.guest.receive()?.frame == frame);
    expected.push(frame.clone());
    line.guest.send_with(header, &frame)?;
    expected.push(frame);
    wait_until("the capture has all frames", || {
        Ok(frames::read_capture(capture.path())?.len() >= expected.len())
    })?;
    for (number, (recorded, expected)) in
        frames::read_capture(capture.path())?.iter().zip(&expected).enumerate()
    {
        ensure!(recorded.0 as usize == expected.len(), "frame {number} has {} bytes", recorded.0);
        ensure!(recorded.1 == *expected, "frame {number}");
    }
    line.daemon.terminate(LIMIT)?;
    assert_eq!(frames::read_capture(capture.path())?.len(), expected.len());
    Ok(())
}

#[test]
fn a_capture_may_have_the_beginning_of_frames_only() -> Result<()> {
    let capture = tempfile::NamedTempFile::new()?;
    let path = capture.path().display().to_string();
    let mut line = Line::with(&["--pcap", &path, "--pcap-snaplen", "40"], &plain(), 8, &[2048])?;
    line.check_both_ways()?;
    wait_until("the capture has all frames", || Ok(frames::read_capture(capture.path())?.len() == 4))?;
    let recorded = frames::read_capture(capture.path())?;
    assert_eq!(recorded[2], (60, numbered(mac(1), mac(9), 1, 60)[..40].to_vec()));
    assert_eq!(recorded[3], (1514, numbered(mac(9), mac(1), 2, 1514)[..40].to_vec()));
    Ok(())
}
