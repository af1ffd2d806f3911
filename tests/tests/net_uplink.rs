//! `vhost-user-net --switch` with a way out, seen from both sides: a peer on a socket, or a tap.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::{Guest, check_idle, net_daemon, plain, wait_counter, wait_until};
use tests::driver::raw::RawOptions;
use tests::frames::{self, BROADCAST, Header, mac, numbered, tagged};
use tests::netns::packet::PacketSocket;
use tests::netns::{Namespace, open};
use tests::peer::{Kind, Peer, Place};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_MRG_RXBUF,
};

const WAY_OUT: &str = "the way out";
const LIMIT: Duration = Duration::from_secs(10);

fn sends_all() -> RawOptions {
    plain().with(VIRTIO_NET_F_CSUM).with(VIRTIO_NET_F_HOST_TSO4)
}

fn tcp4(payload: &[u8]) -> Vec<u8> {
    frames::tcp4(mac(1), mac(9), [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()], [1000, 80], payload)
}

/// A switch with two guests and a peer.
struct WithPeer {
    daemon: Daemon,
    guests: Vec<Guest>,
    place: Place,
    peer: Peer,
}

impl WithPeer {
    fn new(kind: Kind, ports: &[&str]) -> Result<Self> {
        let place = Place::new(kind)?;
        let listener = place.listen()?;
        let builder = net_daemon().args(["--switch", kind.flag()]).arg(place.path());
        let daemon = ports.iter().fold(builder, |builder, port| builder.port(port)).start()?;
        let peer = listener.accept()?;
        daemon.wait_stderr("Connected to", LIMIT)?;
        let guests = (1..).zip(daemon.sockets());
        let guests = guests.map(|(number, socket)| Guest::join(socket, mac(number), &sends_all()));
        let guests = guests.collect::<Result<_>>()?;
        Ok(Self { daemon, guests, place, peer })
    }
}

#[test]
fn frames_pass_between_guests_and_a_peer_of_every_kind() -> Result<()> {
    for kind in Kind::ALL {
        let mut lan = WithPeer::new(kind, &["", ""]).with_context(|| format!("{kind:?}"))?;
        let frame = numbered(mac(1), BROADCAST, 1, 60);
        lan.guests[0].send(&frame)?;
        lan.guests[1].expect(&frame)?;
        assert_eq!(lan.peer.receive()?, frame, "{kind:?}");
        let frame = numbered(mac(9), BROADCAST, 2, 1514);
        lan.peer.send(&frame)?;
        lan.guests[0].expect(&frame)?;
        lan.guests[1].expect(&frame)?;
        // Both are known by now.
        let frame = numbered(mac(9), mac(1), 3, 60);
        lan.peer.send(&frame)?;
        lan.guests[0].expect(&frame)?;
        let frame = numbered(mac(1), mac(9), 4, 60);
        lan.guests[0].send(&frame)?;
        assert_eq!(lan.peer.receive()?, frame, "{kind:?}");
        assert!(lan.guests[1].receive_ready()?.is_empty());
        wait_counter(&mut lan.daemon, WAY_OUT, "rx_frames", 2)?;
        wait_counter(&mut lan.daemon, WAY_OUT, "tx_frames", 2)?;
    }
    Ok(())
}

#[test]
fn nothing_is_left_undone_for_a_peer() -> Result<()> {
    let mut lan = WithPeer::new(Kind::Stream, &[""])?;
    let whole = tcp4(&[7; 901]);
    let mut frame = whole.clone();
    let header = frames::leave_checksum(&mut frame)?;
    lan.guests[0].send_with(header, &frame)?;
    assert_eq!(lan.peer.receive()?, whole);

    let payload: Vec<u8> = (0..50_000).map(|at| (at % 251) as u8).collect();
    let mut frame = tcp4(&payload);
    let header = frames::leave_segmentation(&mut frame, 1448)?;
    lan.guests[0].send_with(header, &frame)?;
    let mut together = Vec::new();
    while together.len() < payload.len() {
        let (sequence, data) = frames::tcp_segment(&lan.peer.receive()?)?;
        ensure!(sequence == 1 + together.len() as u32, "{sequence} after {}", together.len());
        ensure!(data.len() <= 1448);
        together.extend(data);
    }
    assert!(together == payload);
    Ok(())
}

#[test]
fn the_way_out_is_a_trunk() -> Result<()> {
    let mut lan = WithPeer::new(Kind::Stream, &[",vlan=7", ",vlan=8,isolated=on"])?;
    let frame = numbered(mac(1), BROADCAST, 1, 60);
    lan.guests[0].send(&frame)?;
    assert_eq!(lan.peer.receive()?, tagged(&frame, 7));
    let frame = numbered(mac(9), BROADCAST, 2, 60);
    lan.peer.send(&frame)?;
    lan.peer.send(&tagged(&frame, 8))?;
    lan.guests[1].expect(&frame)?;
    lan.peer.send(&tagged(&frame, 7))?;
    lan.guests[0].expect(&frame)?;
    assert!(lan.guests[1].receive_ready()?.is_empty());
    Ok(())
}

/// A peer that does not read loses frames, and keeps nobody waiting.
#[test]
fn a_slow_peer_holds_up_no_guest() -> Result<()> {
    let mut lan = WithPeer::new(Kind::Stream, &["", ""])?;
    let mut sent = 0;
    let frame = |number| numbered(mac(1), BROADCAST, number, 9000);
    // Far more than a socket's buffers hold; the other guest's buffers are too small for them.
    while sent < 2000 {
        lan.guests[0].send(&frame(sent))?;
        sent += 1;
    }
    let small = numbered(mac(1), mac(2), 3000, 60);
    lan.guests[0].send(&small)?;
    lan.guests[1].expect(&small)?;
    check_idle(&lan.daemon)?;
    // What was taken is whole and in order.
    let mut last = None;
    let mut count = 0;
    lan.guests[1].send(&numbered(mac(2), BROADCAST, 5000, 60))?;
    loop {
        let number = frames::number(&lan.peer.receive()?).context("A frame is damaged")?;
        ensure!(last.is_none_or(|last| last < number), "{number} follows {last:?}");
        last = Some(number);
        count += 1;
        // The rest is sent as soon as there is room; a new frame finds some then.
        if number >= 5000 {
            break;
        }
        if count > 10 {
            lan.guests[1].send(&numbered(mac(2), BROADCAST, 5000 + count, 60))?;
        }
    }
    ensure!(count < 2000, "Nothing was lost");
    let counted = tests::driver::lan::counters(&mut lan.daemon, WAY_OUT)?;
    ensure!(counted.get("rx_no_buffer").is_some_and(|lost| *lost >= 2000 - count), "{counted:?}");
    Ok(())
}

#[test]
fn a_peer_that_is_gone_is_connected_to_again() -> Result<()> {
    let mut lan = WithPeer::new(Kind::Stream, &["", ""])?;
    let WithPeer { daemon, guests, place, peer } = &mut lan;
    place.remove()?;
    drop(std::mem::replace(peer, Peer::Stream(std::os::unix::net::UnixStream::pair()?.0)));
    daemon.wait_stderr("Lost stream socket", LIMIT)?;
    let frame = numbered(mac(1), BROADCAST, 1, 60);
    guests[0].send(&frame)?;
    guests[1].expect(&frame)?;
    wait_counter(daemon, WAY_OUT, "rx_link_down", 1)?;
    let mut peer = place.listen()?.accept()?;
    wait_until("a frame reaches the new peer", || {
        let frame = numbered(mac(1), BROADCAST, 2, 60);
        guests[0].send(&frame)?;
        guests[1].expect(&frame)?;
        Ok(tests::driver::lan::counters(daemon, WAY_OUT)?.contains_key("rx_frames"))
    })?;
    assert_eq!(frames::number(&peer.receive()?), Some(2));
    let frame = numbered(mac(9), mac(1), 3, 60);
    peer.send(&frame)?;
    guests[0].expect(&frame)
}

/// A switch with a guest and a tap, which is looked at from the other side.
struct WithTap {
    guest: Guest,
    socket: PacketSocket,
    namespace: Namespace,
    daemon: Daemon,
}

impl WithTap {
    fn new(options: &RawOptions) -> Result<Self> {
        let namespace = Namespace::new()?;
        namespace.add_tap("tap0", 1)?;
        namespace.sysctl("net.ipv6.conf.tap0.disable_ipv6", "1")?;
        namespace.ip("link set tap0 up mtu 9000")?;
        let daemon =
            net_daemon().inside(&namespace.root()).args(["--switch", "--tap", "tap0"]).port("").start()?;
        let guest = Guest::join(daemon.socket(), mac(1), options)?;
        let socket = open::packet(&namespace, "tap0")?;
        Ok(Self { guest, socket, namespace, daemon })
    }

    /// The next frame that the tap received.
    fn incoming(&self) -> Result<(Header, Vec<u8>)> {
        let passed =
            self.socket.find(LIMIT, |passed| !passed.outgoing)?.context("A frame does not arrive")?;
        Ok((passed.header, passed.frame))
    }
}

#[test]
fn frames_pass_between_a_guest_and_a_tap() -> Result<()> {
    let mut lan = WithTap::new(&plain())?;
    for (number, len) in [(1, 60), (2, 1514)] {
        let frame = numbered(mac(1), BROADCAST, number, len);
        lan.guest.send(&frame)?;
        assert_eq!(lan.incoming()?, (Header::default(), frame));
        let frame = numbered(mac(9), BROADCAST, number, len);
        lan.socket.send(Header::default(), &frame)?;
        lan.guest.expect(&frame)?;
    }
    wait_counter(&mut lan.daemon, WAY_OUT, "rx_frames", 2)?;
    let counters = lan.namespace.counters("tap0")?;
    assert_eq!((counters.rx_packets, counters.tx_packets), (2, 2));
    Ok(())
}

#[test]
fn a_tap_takes_and_gives_what_is_left_undone() -> Result<()> {
    let options =
        sends_all().with(VIRTIO_NET_F_MRG_RXBUF).with(VIRTIO_NET_F_GUEST_CSUM).with(VIRTIO_NET_F_GUEST_TSO4);
    let mut lan = WithTap::new(&options)?;
    let mut frame = tcp4(&vec![7; 40_000]);
    let header = frames::leave_segmentation(&mut frame, 1448)?;
    lan.guest.send_with(header, &frame)?;
    let (seen, arrived) = lan.incoming()?;
    assert_eq!((seen.gso_type, seen.gso_size), (header.gso_type, header.gso_size));
    assert!(arrived == frame);

    lan.socket.send(header, &frame)?;
    let received = lan.guest.receive()?;
    assert_eq!((received.header.gso_type, received.header.gso_size), (header.gso_type, header.gso_size));
    assert_eq!(received.header.flags, frames::NEEDS_CSUM);
    assert!(received.frame == frame);
    Ok(())
}

#[test]
fn a_tap_s_large_frame_is_cut_for_a_guest() -> Result<()> {
    let mut lan = WithTap::new(&plain())?;
    let payload: Vec<u8> = (0..40_000).map(|at| (at % 251) as u8).collect();
    let mut frame = tcp4(&payload);
    let header = frames::leave_segmentation(&mut frame, 1448)?;
    lan.socket.send(header, &frame)?;
    let mut together = Vec::new();
    while together.len() < payload.len() {
        let received = lan.guest.receive()?;
        assert_eq!(received.header, Header::default());
        let (sequence, data) = frames::tcp_segment(&received.frame)?;
        ensure!(sequence == 1 + together.len() as u32, "{sequence} after {}", together.len());
        together.extend(data);
    }
    assert!(together == payload);
    Ok(())
}
