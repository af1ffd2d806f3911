//! Defects of `vhost-user-net` that a review found, each as a front end or a guest runs into it.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::{Guest, counters, net_daemon, plain, wait_until};
use tests::driver::net::{RawNet, TIMEOUT};
use tests::driver::net_fixture::TapFixture;
use tests::driver::raw::Layout;
use tests::frames::{self, BROADCAST, Header, mac, numbered};
use tests::peer::{Kind, Place};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};

/// A switch with ports of these options.
fn switch(ports: &[&str]) -> Result<Daemon> {
    ports.iter().fold(net_daemon().arg("--switch"), |builder, port| builder.port(port)).start()
}

/// A guest can write to a frame while the daemon looks at it: the address that was checked has to be the one that the
/// others get.
#[test]
fn a_source_that_changes_after_the_look_does_not_pass() -> Result<()> {
    const BATCH: usize = 64;
    const ROUNDS: usize = 500;
    let mut daemon = switch(&[",mac=02:00:00:00:00:01", ""])?;
    let sockets = daemon.sockets().to_vec();
    let own = [2, 0, 0, 0, 0, 1];
    let mut sender = Guest::join(&sockets[0], own, &plain())?;
    let mut receiver = Guest::join(&sockets[1], mac(2), &plain())?;
    receiver.post(64);
    let request = sender.tx.request(Header::default(), &numbered(own, mac(2), 7, 60));
    let chains: Vec<_> = (0..BATCH).map(|_| sender.tx.ring.prepare(&request).0).collect();
    let last_of_source = sender.tx.header_len() as u64 + 11;
    let places: Vec<_> = chains.iter().map(|chain| chain[0].addr + last_of_source).collect();
    let memory = sender.net.device.memory().clone();
    let stop = AtomicBool::new(false);
    let passed = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for byte in [0xee, own[5]] {
                    for &place in &places {
                        memory.write(place, &[byte]);
                    }
                }
            }
        });
        let mut exchange = || -> Result<usize> {
            let mut passed = 0;
            for _ in 0..ROUNDS {
                for chain in &chains {
                    sender.tx.ring.add_chain(chain);
                }
                sender.tx.ring.kick();
                for _ in &chains {
                    sender.tx.ring.wait_used(TIMEOUT).context("A frame is not taken")?;
                }
                for received in receiver.receive_ready()? {
                    ensure!(received.frame[6..12] == own, "A frame from {:02x?}", &received.frame[6..12]);
                    passed += 1;
                }
            }
            Ok(passed)
        };
        let passed = exchange();
        stop.store(true, Ordering::Relaxed);
        passed
    })?;
    // Both were seen, so the guest was fast enough for a try.
    ensure!(passed > 0, "No frame passed");
    let port = sockets[0].display().to_string();
    wait_until("a frame is refused", || {
        Ok(counters(&mut daemon, &port)?.get("tx_spoofed").is_some_and(|&refused| refused > 0))
    })
}

/// Cloud Hypervisor serves the control queue itself and passes on neither it nor its commands: all pairs that run are in
/// use then.
#[test]
fn all_pairs_are_used_without_a_control_queue() -> Result<()> {
    const FLOWS: u16 = 32;
    for options in [plain().with(VIRTIO_NET_F_MQ), plain().with(VIRTIO_NET_F_MQ).with(VIRTIO_NET_F_CTRL_VQ)] {
        let fixture = TapFixture::with_queues::<&str>(2, [])?;
        let mut net = fixture.connect(&options)?;
        let (first, _first_tx) = net.pair(0, 256, 2 * FLOWS)?;
        let (second, _second_tx) = net.pair(1, 256, 2 * FLOWS)?;
        let mut pairs = [(first, 0), (second, 0)];
        let addresses = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
        wait_until("both pairs got a frame", || {
            for flow in 0..FLOWS {
                let frame = frames::udp4(mac(2), mac(1), addresses, [1000 + 37 * flow, flow], b"text");
                fixture.packets.send(Header::default(), &frame)?;
            }
            for (rx, got) in &mut pairs {
                while rx.receive(Duration::from_millis(20))?.is_some() {
                    *got += 1;
                    rx.post(&[2048]);
                }
                rx.ring.kick();
            }
            Ok(pairs.iter().all(|&(_, got)| got > 0))
        })?;
    }
    Ok(())
}

/// The first buffer may hold the header and nothing else, so the address to filter by is in the second.
#[test]
fn the_header_may_be_alone_in_the_first_mergeable_buffer() -> Result<()> {
    for control_runs in [false, true] {
        let fixture = TapFixture::new::<&str>([])?;
        let options =
            plain().with(VIRTIO_NET_F_MRG_RXBUF).with(VIRTIO_NET_F_CTRL_VQ).with(VIRTIO_NET_F_CTRL_RX);
        let mut net = fixture.connect(&options)?;
        let own = net.config()?.mac;
        let _control = if control_runs { Some(net.control(1, 64)?) } else { None };
        let mut rx = net.rx(0, 256)?;
        let header_len = net.header_len();
        for _ in 0..8 {
            rx.post(&[header_len]);
            rx.post(&[2048]);
        }
        rx.ring.kick();
        let mut tx = net.tx(0, 256)?;
        fixture.check_sends(&mut tx, 1)?;
        for to in [own, BROADCAST] {
            let frame = numbered(mac(2), to, 2, 80);
            fixture.packets.send(Header::default(), &frame)?;
            let received = rx.receive(TIMEOUT)?;
            let received = received.with_context(|| {
                format!("A frame to {to:02x?} does not arrive:\n{}", fixture.daemon.stderr())
            })?;
            ensure!(received.frame == frame, "Another frame arrived: {received:?}");
            ensure!(received.used == [header_len as u32, 80], "{:?}", received.used);
        }
    }
    Ok(())
}

/// Guests that send keep the memory of those that receive, and let go of it without another frame: it may be unplugged.
#[test]
fn a_removed_region_is_let_go_of_by_the_others() -> Result<()> {
    let daemon = switch(&["", ""])?;
    let slots =
        plain().layout(Layout::TwoWithGap).with_protocol(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let mut sender = Guest::join(&daemon.sockets()[0], mac(1), &plain())?;
    let mut receiver = Guest::join(&daemon.sockets()[1], mac(2), &slots)?;
    let frame = numbered(mac(1), BROADCAST, 1, 60);
    sender.send(&frame)?;
    receiver.expect(&frame)?;
    let maps = format!("/proc/{}/maps", daemon.pid());
    let count = || -> Result<usize> {
        Ok(std::fs::read_to_string(&maps)?.lines().filter(|line| line.contains("test-memory")).count())
    };
    let before = count()?;
    ensure!(before == 3, "{before} regions are mapped");
    let high = receiver.net.device.memory().table()[1];
    receiver.net.device.frontend.remove_mem_region(&high)?;
    wait_until("the region is let go of", || Ok(count()? == before - 1))?;
    sender.send(&frame)?;
    receiver.expect(&frame)
}

/// `GET_VRING_BASE` is answered when nobody delivers any more: all that was taken before is used.
#[test]
fn no_buffer_is_lost_when_a_ring_is_stopped_under_delivery() -> Result<()> {
    const ROUNDS: usize = 200;
    let daemon = switch(&["", "", ""])?;
    let mut receiver = Guest::join(&daemon.sockets()[0], mac(1), &plain())?;
    let senders =
        [(1, mac(2)), (2, mac(3))].map(|(port, mac)| Guest::join(&daemon.sockets()[port], mac, &plain()));
    receiver.send(&numbered(mac(1), BROADCAST, 0, 60))?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let floods = senders.map(|sender| {
            scope.spawn(|| -> Result<()> {
                let mut sender = sender?;
                let frames: Vec<_> =
                    (0..24).map(|number| numbered(sender.mac, mac(1), number, 1400)).collect();
                while !stop.load(Ordering::Relaxed) {
                    sender.tx.send_all(&frames)?;
                }
                Ok(())
            })
        });
        let mut restart = || -> Result<()> {
            for round in 0..ROUNDS {
                for _ in 0..32 {
                    let arrived = receiver.receive()?;
                    ensure!(frames::number(&arrived.frame).is_some(), "A damaged frame: {arrived:?}");
                }
                let base = receiver.net.device.frontend.get_vring_base(0)? as u16;
                let used = receiver.rx.ring.used_idx();
                ensure!(base == used, "Round {round}: the base is {base}, and {used} are used");
                receiver.net.device.start_from(0, &receiver.rx.ring, base)?;
            }
            Ok(())
        };
        let restarted = restart();
        stop.store(true, Ordering::Relaxed);
        for flood in floods {
            flood.join().expect("no panic")?;
        }
        restarted
    })
}

/// DPDK's virtio-user starts a ring with base 0 when a back end comes back, whatever is used by then.
#[test]
fn a_ring_that_starts_with_a_wrong_base_goes_on_where_it_was() -> Result<()> {
    let daemon = switch(&["", ""])?;
    let mut sender = Guest::join(&daemon.sockets()[0], mac(1), &plain())?;
    let mut receiver = Guest::join(&daemon.sockets()[1], mac(2), &plain())?;
    let mut sent = 0..;
    // More than the ring has entries the second time: all of them would be available again.
    for frames in [10, 300] {
        let mut pass = |sender: &mut Guest, receiver: &mut Guest, frames| -> Result<()> {
            for number in sent.by_ref().take(frames) {
                let frame = numbered(mac(1), BROADCAST, number, 60);
                sender.send(&frame)?;
                receiver.expect(&frame)?;
            }
            Ok(())
        };
        pass(&mut sender, &mut receiver, frames)?;
        for (guest, index) in [(&mut sender, 1), (&mut receiver, 0)] {
            let ring = if index == 0 { &guest.rx.ring } else { &guest.tx.ring };
            let base = guest.net.device.frontend.get_vring_base(index)?;
            ensure!(base != 0 && base == u32::from(ring.used_idx()), "The base is {base}");
            guest.net.device.start_from(index, ring, 0)?;
        }
        sender.settle()?;
        receiver.settle()?;
        pass(&mut sender, &mut receiver, 10)?;
        ensure!(receiver.receive_ready()?.is_empty(), "A frame arrived twice");
    }
    Ok(())
}

/// A peer that is slow lets frames wait, and each is recorded when it goes.
#[test]
fn a_frame_that_waits_for_the_peer_is_recorded_once() -> Result<()> {
    const FRAMES: usize = 200;
    let capture = tempfile::NamedTempFile::new()?;
    let place = Place::new(Kind::Dgram)?;
    let listener = place.listen()?;
    let daemon =
        net_daemon().arg(Kind::Dgram.flag()).arg(place.path()).arg("--pcap").arg(capture.path()).start()?;
    let net = RawNet::connect(daemon.socket(), &plain())?;
    let mut peer = listener.accept()?;
    daemon.wait_stderr("Connected to", TIMEOUT)?;
    let mut guest = Guest::start(net, mac(1), 8, &[2048])?;
    // Those by which the guest saw that its queues are served.
    let mut expected = Vec::new();
    for _ in 0..2 {
        expected.push(peer.receive()?);
    }
    // Far more than a socket for datagrams keeps.
    let frames: Vec<_> = (0..FRAMES).map(|number| numbered(mac(1), mac(9), number as u64, 60)).collect();
    for frame in &frames {
        let request = guest.tx.request(Header::default(), frame);
        guest.tx.ring.submit(&request);
    }
    guest.tx.ring.kick();
    for frame in &frames {
        ensure!(peer.receive()? == *frame, "Another frame arrived");
    }
    expected.extend(frames);
    let expected: Vec<_> = expected.into_iter().map(|frame| (frame.len() as u32, frame)).collect();
    wait_until("the capture is written", || {
        let recorded = frames::read_capture(capture.path())?;
        ensure!(expected.starts_with(&recorded), "{} frames are recorded", recorded.len());
        Ok(recorded.len() == expected.len())
    })
}
