//! `vhost-user-net` on a peer behind a unix socket, seen from both sides: rings, and what passt and others speak.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::{Guest, RING_SIZE, check_idle, net_daemon, plain, wait_counter, wait_until};
use tests::driver::net::{RawNet, TIMEOUT};
use tests::driver::raw::RawOptions;
use tests::frames::{self, BROADCAST, Header, mac, numbered};
use tests::peer::{Kind, Peer, Place, prefixed};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};

const INTERFACE: &str = "the interface";
const LIMIT: Duration = Duration::from_secs(10);
/// `VHOST_USER_SEND_RARP`
const SEND_RARP: u32 = 19;
/// Config space `status`: the link is up.
const LINK_UP: u16 = 1;

/// A guest and its peer.
struct Line {
    guest: Guest,
    peer: Peer,
    place: Place,
    daemon: Daemon,
}

/// What is asked for of a device with a link.
fn with_link() -> RawOptions {
    plain()
        .with(VIRTIO_NET_F_STATUS)
        .with(VIRTIO_NET_F_CSUM)
        .with_protocol(VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::RARP)
}

impl Line {
    fn new(kind: Kind) -> Result<Self> {
        Self::with(kind, &[], &with_link(), 64, &[2048])
    }

    fn with(kind: Kind, args: &[&str], options: &RawOptions, chains: u16, sizes: &[usize]) -> Result<Self> {
        let place = Place::new(kind)?;
        let listener = place.listen()?;
        let daemon = net_daemon().arg(kind.flag()).arg(place.path()).args(args).start()?;
        // The device connects when there is somebody to connect for.
        let net = RawNet::connect(daemon.socket(), options)?;
        let peer = listener.accept().with_context(|| format!("{kind:?}\n{}", daemon.stderr()))?;
        daemon.wait_stderr("Connected to", LIMIT)?;
        Self { guest: Guest::start(net, mac(1), chains, sizes)?, peer, place, daemon }.past_settling()
    }

    /// Takes the frames off the line by which the guest saw that its queues are served.
    fn past_settling(mut self) -> Result<Self> {
        for _ in 0..2 {
            self.peer.receive()?;
        }
        Ok(self)
    }

    fn wait_link(&mut self, up: bool) -> Result<()> {
        wait_until("the link has changed", || Ok((self.guest.net.config()?.status & LINK_UP != 0) == up))
    }

    /// A frame each way.
    fn check_both_ways(&mut self) -> Result<()> {
        let frame = numbered(mac(1), mac(9), 1, 60);
        self.guest.send(&frame)?;
        ensure!(self.peer.receive()? == frame, "Another frame arrived");
        let frame = numbered(mac(9), mac(1), 2, 1514);
        self.peer.send(&frame)?;
        self.guest.expect(&frame)
    }
}

#[test]
fn frames_pass_both_ways() -> Result<()> {
    for kind in Kind::ALL {
        let mut line = Line::new(kind)?;
        for (number, len) in [(1, 60), (2, 1514), (3, 22), (4, 9014), (5, 65_000)] {
            let frame = numbered(mac(1), mac(9), number, len);
            line.guest.send(&frame)?;
            assert!(line.peer.receive()? == frame, "{kind:?}, {len} bytes");
        }
        for (number, len) in [(1, 60), (2, 1514), (3, 22), (4, 2036)] {
            let frame = numbered(mac(9), mac(1), number, len);
            line.peer.send(&frame)?;
            line.guest.expect(&frame).with_context(|| format!("{kind:?}, {len} bytes"))?;
        }
        wait_counter(&mut line.daemon, INTERFACE, "rx_frames", 4)?;
        wait_counter(&mut line.daemon, INTERFACE, "tx_frames", 7)?;
        check_idle(&line.daemon)?;
    }
    Ok(())
}

#[test]
fn only_what_the_peer_can_take_is_offered() -> Result<()> {
    let place = Place::new(Kind::Stream)?;
    let daemon = net_daemon().arg("--stream").arg(place.path()).start()?;
    let net = RawNet::connect(daemon.socket(), &plain())?;
    let offered = net.device.frontend.get_features()?;
    assert_ne!(offered & 1 << VIRTIO_NET_F_CSUM, 0);
    assert_ne!(offered & 1 << VIRTIO_NET_F_MRG_RXBUF, 0);
    for feature in [
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_UFO,
        VIRTIO_NET_F_HOST_USO,
    ] {
        assert_eq!(offered & 1 << feature, 0, "feature {feature}");
    }
    drop(net);
    let daemon = net_daemon().arg("--stream").arg(place.path()).args(["--offloads", "none"]).start()?;
    let net = RawNet::connect(daemon.socket(), &plain())?;
    assert_eq!(net.device.frontend.get_features()? & 1 << VIRTIO_NET_F_CSUM, 0);
    Ok(())
}

#[test]
fn buffers_and_headers_of_every_kind() -> Result<()> {
    let legacy = with_link().without(VIRTIO_F_VERSION_1);
    for (options, sizes) in [
        (legacy, &[10, 2038][..]),
        (legacy.with(VIRTIO_NET_F_MRG_RXBUF), &[300]),
        (with_link(), &[1, 2, 9, 2048]),
        (with_link().with(VIRTIO_NET_F_MRG_RXBUF), &[300]),
    ] {
        let mut line = Line::with(Kind::Stream, &[], &options, 32, sizes)?;
        for (number, len) in [(1, 60), (2, 1514), (3, 22)] {
            let frame = numbered(mac(9), mac(1), number, len);
            line.peer.send(&frame)?;
            line.guest.expect(&frame)?;
            line.guest.send(&frame)?;
            assert_eq!(line.peer.receive()?, frame);
        }
    }
    Ok(())
}

#[test]
fn a_checksum_is_filled_in_and_segmentation_is_refused() -> Result<()> {
    for kind in Kind::ALL {
        let mut line = Line::new(kind)?;
        let addresses = [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()];
        for whole in [
            frames::tcp4(mac(1), mac(9), addresses, [1, 2], &[7; 901]),
            frames::udp4(mac(1), mac(9), addresses, [1, 2], b"text"),
        ] {
            let mut frame = whole.clone();
            let header = frames::leave_checksum(&mut frame)?;
            line.guest.send_with(header, &frame)?;
            assert_eq!(line.peer.receive()?, whole);
            let beyond = Header { csum_start: frame.len() as u16, ..header };
            line.guest.send_with(beyond, &frame)?;
        }
        let mut frame = frames::tcp4(mac(1), mac(9), addresses, [1, 2], &[7; 4000]);
        let header = frames::leave_segmentation(&mut frame, 1448)?;
        line.guest.send_with(header, &frame)?;
        line.check_both_ways()?;
        wait_counter(&mut line.daemon, INTERFACE, "tx_bad_frame", 3)?;
    }
    Ok(())
}

#[test]
fn frames_wait_for_a_peer_that_does_not_read() -> Result<()> {
    /// More than a socket and the device's own buffer hold.
    const FRAMES: u64 = 2000;
    const LEN: usize = 9500;
    /// No more than the ring's memory holds.
    const WINDOW: u64 = 80;
    for kind in Kind::ALL {
        let mut line = Line::new(kind)?;
        let Line { guest, peer, daemon, .. } = &mut line;
        let tx = &mut guest.tx;
        let (mut submitted, mut back) = (0, 0);
        let mut go_on = |until: u64, patience: Duration| -> bool {
            while back < until {
                while submitted < (back + WINDOW).min(FRAMES) {
                    let frame = numbered(mac(1), mac(9), submitted, LEN);
                    let request = tx.request(Header::default(), &frame);
                    tx.ring.submit(&request);
                    submitted += 1;
                }
                tx.ring.kick();
                if tx.ring.wait_used(patience).is_none() {
                    return false;
                }
                back += 1;
            }
            true
        };
        ensure!(!go_on(FRAMES, Duration::from_millis(300)), "{kind:?}: nothing waits");
        check_idle(daemon)?;
        std::thread::scope(|scope| -> Result<()> {
            let reader = scope.spawn(|| -> Result<()> {
                for number in 0..FRAMES {
                    let frame = peer.receive().with_context(|| format!("{kind:?}, frame {number}"))?;
                    ensure!(frames::number(&frame) == Some(number), "{kind:?}, frame {number}");
                }
                Ok(())
            });
            ensure!(go_on(FRAMES, TIMEOUT), "{kind:?}: a chain does not come back");
            reader.join().expect("no panic")
        })?;
        line.check_both_ways()?;
    }
    Ok(())
}

/// The other direction goes on while one waits.
#[test]
fn a_guest_receives_while_its_peer_does_not_read() -> Result<()> {
    let mut line = Line::new(Kind::Seqpacket)?;
    let tx = &mut line.guest.tx;
    let frame = numbered(mac(1), mac(9), 1, 60_000);
    loop {
        let request = tx.request(Header::default(), &frame);
        tx.ring.submit(&request);
        tx.ring.kick();
        if tx.ring.wait_used(Duration::from_millis(300)).is_none() {
            break;
        }
    }
    for number in 0..10 {
        let frame = numbered(mac(9), mac(1), number, 60);
        line.peer.send(&frame)?;
        line.guest.expect(&frame)?;
    }
    Ok(())
}

#[test]
fn frames_wait_for_a_guest_without_buffers() -> Result<()> {
    const FRAMES: u64 = 1500;
    for kind in Kind::ALL {
        let mut line = Line::with(kind, &[], &with_link(), 0, &[2048])?;
        let Line { guest, peer, daemon, .. } = &mut line;
        std::thread::scope(|scope| -> Result<()> {
            let sender = scope.spawn(|| -> Result<()> {
                for number in 0..FRAMES {
                    peer.send(&numbered(mac(9), mac(1), number, 1000))?;
                }
                Ok(())
            });
            check_idle(daemon)?;
            // The guest still sends.
            guest.send(&numbered(mac(1), mac(9), 1, 60))?;
            guest.post(1);
            assert_eq!(frames::number(&guest.receive_once()?.frame), Some(0), "{kind:?}");
            check_idle(daemon)?;
            guest.post(50);
            for number in 1..FRAMES {
                assert_eq!(frames::number(&guest.receive()?.frame), Some(number), "{kind:?}");
            }
            sender.join().expect("no panic")
        })?;
        assert_eq!(frames::number(&line.peer.receive()?), Some(1));
        wait_counter(&mut line.daemon, INTERFACE, "rx_frames", FRAMES)?;
        wait_counter(&mut line.daemon, INTERFACE, "rx_no_buffer", 0)?;
    }
    Ok(())
}

/// Too few buffers for a frame: it waits, and is recorded once.
#[test]
fn a_frame_waits_for_enough_mergeable_buffers() -> Result<()> {
    let capture = tempfile::NamedTempFile::new()?;
    let path = capture.path().display().to_string();
    let options = with_link().with(VIRTIO_NET_F_MRG_RXBUF);
    let mut line = Line::with(Kind::Stream, &["--pcap", &path], &options, 2, &[512])?;
    let frame = numbered(mac(9), mac(1), 1, 1514);
    line.peer.send(&frame)?;
    check_idle(&line.daemon)?;
    line.guest.post(1);
    check_idle(&line.daemon)?;
    line.guest.post(1);
    line.guest.expect(&frame)?;
    wait_until("the capture is written", || {
        let recorded = frames::read_capture(capture.path())?;
        // Two more when the guest came.
        ensure!(recorded.len() <= 3, "{} frames are recorded", recorded.len());
        Ok(recorded.len() == 3 && recorded[2] == (1514, frame.clone()))
    })
}

#[test]
fn a_frame_that_fits_in_no_buffer_is_lost_alone() -> Result<()> {
    let mut line = Line::with(Kind::Stream, &[], &with_link(), 8, &[1000])?;
    line.peer.send(&numbered(mac(9), mac(1), 1, 1514))?;
    let frame = numbered(mac(9), mac(1), 2, 988);
    line.peer.send(&frame)?;
    line.guest.expect(&frame)?;
    wait_counter(&mut line.daemon, INTERFACE, "rx_too_long", 1)
}

#[test]
fn a_stream_may_be_cut_anywhere() -> Result<()> {
    let mut line = Line::new(Kind::Stream)?;
    let frames: Vec<_> =
        (0..20).map(|number| numbered(mac(9), mac(1), number, 60 + number as usize)).collect();
    let bytes: Vec<u8> = frames.iter().flat_map(|frame| prefixed(frame)).collect();
    for step in [1, 3, 61, 64, 1000, bytes.len()] {
        for piece in bytes.chunks(step) {
            line.peer.send_bytes(piece)?;
        }
        for frame in &frames {
            line.guest.expect(frame)?;
        }
    }
    Ok(())
}

#[test]
fn the_link_follows_the_peer() -> Result<()> {
    for kind in [Kind::Stream, Kind::Seqpacket, Kind::Vde] {
        let mut line = Line::new(kind)?;
        line.wait_link(true)?;
        let (mut channel, theirs) = UnixStream::pair()?;
        channel.set_read_timeout(Some(LIMIT))?;
        line.guest.net.device.frontend.set_backend_request_fd(&theirs.as_raw_fd())?;
        // Handed over once the next message is answered.
        line.guest.net.config()?;
        let mut told = || -> Result<()> {
            let mut message = [0; 12];
            channel.read_exact(&mut message).context("The front end is told nothing")?;
            let expected = [2_u32, 1, 0].map(u32::to_ne_bytes);
            ensure!(message == expected.as_flattened(), "{message:02x?} is no CONFIG_CHANGE_MSG");
            Ok(())
        };
        {
            line.place.remove()?;
            line.peer = Peer::Stream(UnixStream::pair()?.0);
            told().with_context(|| format!("{kind:?} down"))?;
            line.wait_link(false)?;
            // What is sent now is lost, and nobody waits for it.
            line.guest.send(&numbered(mac(1), mac(9), 1, 60))?;
            line.peer = line.place.listen()?.accept()?;
            told().with_context(|| format!("{kind:?} up"))?;
            line.wait_link(true)?;
            line.check_both_ways()?;
        }
        wait_counter(&mut line.daemon, INTERFACE, "tx_link_down", 1)?;
    }
    Ok(())
}

#[test]
fn a_datagram_peer_comes_back() -> Result<()> {
    let mut line = Line::new(Kind::Dgram)?;
    line.check_both_ways()?;
    line.place.remove()?;
    line.peer = Peer::Stream(UnixStream::pair()?.0);
    // Only who sends finds out.
    wait_until("the link is down", || {
        line.guest.send(&numbered(mac(1), mac(9), 1, 60))?;
        Ok(line.guest.net.config()?.status & LINK_UP == 0)
    })?;
    line.peer = line.place.listen()?.accept()?;
    line.wait_link(true)?;
    line.check_both_ways()
}

#[test]
fn an_impossible_length_ends_the_connection() -> Result<()> {
    for bytes in [&[0, 0, 0, 13][..], &[0, 0, 0, 0], &[0, 1, 0, 0x12], &[0xff; 64]] {
        let mut line = Line::new(Kind::Stream)?;
        let frame = numbered(mac(9), mac(1), 1, 60);
        // Frames before it are fine.
        line.peer.send_bytes(&[&prefixed(&frame), bytes].concat())?;
        line.guest.expect(&frame)?;
        line.peer.wait_closed().with_context(|| format!("{bytes:02x?}"))?;
        if bytes.len() > 4 {
            line.place.remove()?;
            line.peer = line.place.listen()?.accept()?;
            line.wait_link(true)?;
            line.check_both_ways()?;
        }
    }
    Ok(())
}

#[test]
fn messages_that_are_no_frames_are_skipped() -> Result<()> {
    for kind in [Kind::Seqpacket, Kind::Dgram, Kind::Vde] {
        let mut line = Line::new(kind)?;
        line.peer.send(&[1; 13])?;
        line.peer.send(&vec![1; 70_000])?;
        line.check_both_ways()?;
    }
    Ok(())
}

#[test]
fn a_front_end_that_comes_back_finds_the_connection() -> Result<()> {
    for kind in Kind::ALL {
        let Line { guest, mut peer, place, daemon } = Line::new(kind)?;
        drop(guest);
        daemon.wait_stderr("has left", LIMIT)?;
        let frame = numbered(mac(9), mac(1), 7, 60);
        peer.send(&frame)?;
        let guest = Guest::join(daemon.socket(), mac(1), &with_link())?;
        let mut line = Line { guest, peer, place, daemon }.past_settling()?;
        line.guest.expect(&frame)?;
        line.check_both_ways()?;
    }
    Ok(())
}

#[test]
fn a_guest_that_moved_here_is_announced() -> Result<()> {
    for kind in Kind::ALL {
        let mut line = Line::new(kind)?;
        let moved = [2, 0x11, 0x22, 0x33, 0x44, 0x55];
        let body = [&moved[..], &[0; 2]].concat();
        assert_eq!(line.guest.net.device.wire.acknowledged(SEND_RARP, &body, &[])?, 0);
        let frame = line.peer.receive()?;
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..14], [&BROADCAST[..], &moved, &[0x80, 0x35]].concat());
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&moved[..], &moved[..]));
        line.check_both_ways()?;
    }
    Ok(())
}

/// Five frames at once, and then ten in a second: the others wait in the socket.
#[test]
fn frames_beyond_the_limit_wait_in_the_port() -> Result<()> {
    let mut line = Line::with(Kind::Stream, &["--rate-limit-rx", "packets=10:5"], &with_link(), 64, &[2048])?;
    let start = Instant::now();
    for number in 0..20 {
        line.peer.send(&numbered(mac(9), mac(1), number, 60))?;
    }
    for number in 0..20 {
        assert_eq!(frames::number(&line.guest.receive()?.frame), Some(number));
    }
    // 15 of them had to wait, at 100 ms each.
    ensure!(start.elapsed() > Duration::from_millis(1200), "all came in {:?}", start.elapsed());
    wait_counter(&mut line.daemon, INTERFACE, "rx_frames", 20)?;
    check_idle(&line.daemon)
}

#[test]
fn a_busy_line_in_both_directions_loses_nothing() -> Result<()> {
    const FRAMES: u64 = 20_000;
    for kind in Kind::ALL {
        let mut line = Line::with(kind, &[], &with_link(), RING_SIZE / 2, &[2048])?;
        let Line { guest, peer, .. } = &mut line;
        let mut their_end = match peer {
            Peer::Stream(stream) => Peer::Stream(stream.try_clone()?),
            Peer::Messages { socket, .. } => Peer::Messages { socket: socket.try_clone()?, control: None },
        };
        let len = |number: u64| 60 + (number * 131 % 1455) as usize;
        let Guest { rx, tx, .. } = guest;
        std::thread::scope(|scope| -> Result<()> {
            let peer_sends = scope.spawn(|| -> Result<()> {
                for number in 0..FRAMES {
                    peer.send(&numbered(mac(9), mac(1), number, len(number)))?;
                }
                Ok(())
            });
            let peer_receives = scope.spawn(|| -> Result<()> {
                for number in 0..FRAMES {
                    let frame = their_end.receive()?;
                    ensure!(frames::number(&frame) == Some(number), "{number} is something else");
                }
                Ok(())
            });
            let guest_sends = scope.spawn(|| -> Result<()> {
                for start in (0..FRAMES).step_by(100) {
                    let frames: Vec<_> = (start..start + 100)
                        .map(|number| numbered(mac(1), mac(9), number, len(number)))
                        .collect();
                    tx.send_all(&frames)?;
                }
                Ok(())
            });
            for number in 0..FRAMES {
                let frame =
                    rx.receive(TIMEOUT)?.with_context(|| format!("{kind:?}: no frame {number}"))?.frame;
                ensure!(frames::number(&frame) == Some(number), "{number} is something else");
                rx.post(&[2048]);
                rx.ring.kick();
            }
            for thread in [peer_sends, peer_receives, guest_sends] {
                thread.join().expect("no panic").with_context(|| format!("{kind:?}"))?;
            }
            Ok(())
        })?;
    }
    Ok(())
}
