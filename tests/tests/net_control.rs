//! The control queue of `vhost-user-net`, as front ends such as crosvm and libkrun pass it on: what the driver says there
//! and what comes of it, on a tap and on a switch.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::{Guest, LINK_LOCAL, check_idle, net_daemon, plain, wait_counter, wait_until};
use tests::driver::net::{CONTROL_ERR, CONTROL_OK, RawNet, Rx, Tx, control_command};
use tests::driver::raw::RawOptions;
use tests::driver::ring::RawRing;
use tests::frames::{self, BROADCAST, Header, mac, numbered, tagged};
use tests::netns::packet::PacketSocket;
use tests::netns::{Namespace, open};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST,
    VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};

const INTERFACE: &str = "the interface";
const LIMIT: Duration = Duration::from_secs(10);
/// `VHOST_USER_SEND_RARP`
const SEND_RARP: u32 = 19;
/// Config space `status`: announce yourself.
const ANNOUNCE: u16 = 2;

/// A driver that uses everything that the control queue has for its filter.
fn filtering() -> RawOptions {
    plain()
        .with(VIRTIO_NET_F_CTRL_VQ)
        .with(VIRTIO_NET_F_CTRL_RX)
        .with(VIRTIO_NET_F_CTRL_RX_EXTRA)
        .with(VIRTIO_NET_F_CTRL_VLAN)
        .with(VIRTIO_NET_F_CTRL_MAC_ADDR)
}

/// Carries out a command, and returns the acknowledgement.
fn command(ring: &mut RawRing, class: u32, command: u32, data: &[u8]) -> Result<u8> {
    let outcome = ring.execute(&control_command(class as u8, command as u8, data))?;
    ensure!(outcome.used_len == 1, "{} bytes were written", outcome.used_len);
    outcome.status.context("No acknowledgement")
}

/// Carries out a command that has to be fine.
fn ordered(ring: &mut RawRing, class: u32, number: u32, data: &[u8]) -> Result<()> {
    let ack = command(ring, class, number, data)?;
    ensure!(ack == CONTROL_OK, "Command {number} of class {class} is answered by {ack}");
    Ok(())
}

/// A guest with a control queue, and its tap.
struct Line {
    guest: Guest,
    control: RawRing,
    socket: PacketSocket,
    daemon: Daemon,
    /// Frames sent at the tap so far.
    sent: u64,
    namespace: Namespace,
}

impl Line {
    fn new(options: &RawOptions) -> Result<Self> {
        let namespace = Namespace::new()?;
        namespace.add_tap("tap0", 1)?;
        namespace.sysctl("net.ipv6.conf.tap0.disable_ipv6", "1")?;
        namespace.ip("link set tap0 up")?;
        let daemon = net_daemon().inside(&namespace.root()).args(["--tap", "tap0"]).start()?;
        let mut guest = Guest::join(daemon.socket(), mac(1), options)?;
        let control = guest.net.control(1, 16)?;
        let socket = open::packet(&namespace, "tap0")?;
        Ok(Self { guest, control, socket, daemon, sent: 0, namespace })
    }

    fn ordered(&mut self, class: u32, number: u32, data: &[u8]) -> Result<()> {
        ordered(&mut self.control, class, number, data)?;
        // The queues' worker has seen it when it looks the next time.
        self.guest.settle()
    }

    fn mode(&mut self, mode: u32, on: bool) -> Result<()> {
        self.ordered(VIRTIO_NET_CTRL_RX, mode, &[on.into()])
    }

    /// Which of these destinations reach the guest.
    fn reached(&mut self, to: &[[u8; 6]]) -> Result<Vec<[u8; 6]>> {
        let frames: Vec<_> = to.iter().map(|to| numbered(mac(9), *to, 1, 60)).collect();
        let arrived = self.passed(&frames)?;
        Ok(arrived.iter().map(|frame| *frame.first_chunk().expect("an address")).collect())
    }

    /// Which of these frames reach the guest.
    fn passed(&mut self, frames: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        for frame in frames {
            self.socket.send(Header::default(), frame)?;
        }
        // What was filtered and what was not are all there is.
        self.sent += frames.len() as u64;
        let mut arrived = Vec::new();
        let (daemon, guest, sent) = (&mut self.daemon, &mut self.guest, self.sent);
        wait_until("all frames are received or filtered", || {
            arrived.extend(guest.receive_ready()?.into_iter().map(|received| received.frame));
            let counters = tests::driver::lan::counters(daemon, INTERFACE)?;
            let count = |name| counters.get(name).copied().unwrap_or(0);
            Ok(count("rx_frames") + count("rx_filtered") == sent)
        })?;
        arrived.extend(guest.receive_ready()?.into_iter().map(|received| received.frame));
        Ok(arrived)
    }
}

const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const OTHER_GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 2];
const EVERYBODY: [[u8; 6]; 5] = [mac(1), mac(2), BROADCAST, GROUP, OTHER_GROUP];

fn table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
    [unicast, multicast]
        .into_iter()
        .flat_map(|list| [&(list.len() as u32).to_le_bytes()[..], list.as_flattened()].concat())
        .collect()
}

#[test]
fn a_filter_lets_through_what_the_driver_wants() -> Result<()> {
    let mut line = Line::new(&filtering())?;
    // As long as nothing was said.
    assert_eq!(line.reached(&EVERYBODY)?, EVERYBODY);
    line.ordered(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, &mac(1))?;
    line.mode(VIRTIO_NET_CTRL_RX_PROMISC, false)?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(1), BROADCAST]);
    line.ordered(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, &table(&[mac(2)], &[GROUP]))?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(1), mac(2), BROADCAST, GROUP]);
    line.ordered(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, &table(&[], &[OTHER_GROUP]))?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(1), BROADCAST, OTHER_GROUP]);
    line.ordered(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, &mac(2))?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(2), BROADCAST, OTHER_GROUP]);
    line.mode(VIRTIO_NET_CTRL_RX_ALLMULTI, true)?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(2), BROADCAST, GROUP, OTHER_GROUP]);
    line.mode(VIRTIO_NET_CTRL_RX_ALLMULTI, false)?;
    line.mode(VIRTIO_NET_CTRL_RX_ALLUNI, true)?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(1), mac(2), BROADCAST, OTHER_GROUP]);
    line.mode(VIRTIO_NET_CTRL_RX_NOBCAST, true)?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(1), mac(2), OTHER_GROUP]);
    line.mode(VIRTIO_NET_CTRL_RX_NOMULTI, true)?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(1), mac(2)]);
    line.mode(VIRTIO_NET_CTRL_RX_NOUNI, true)?;
    assert_eq!(line.reached(&EVERYBODY)?, [[0; 6]; 0]);
    line.mode(VIRTIO_NET_CTRL_RX_PROMISC, true)?;
    assert_eq!(line.reached(&EVERYBODY)?, EVERYBODY);
    check_idle(&line.daemon)
}

#[test]
fn more_addresses_than_a_filter_holds_are_let_through() -> Result<()> {
    let mut line = Line::new(&filtering())?;
    line.mode(VIRTIO_NET_CTRL_RX_PROMISC, false)?;
    let many: Vec<_> = (0..200).map(|number| [0x33, 0x33, 0, 0, 1, number]).collect();
    line.ordered(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, &table(&[mac(2)], &many))?;
    assert_eq!(line.reached(&EVERYBODY)?, [mac(2), BROADCAST, GROUP, OTHER_GROUP]);
    Ok(())
}

#[test]
fn vlans_are_let_through_one_by_one() -> Result<()> {
    let mut line = Line::new(&filtering())?;
    let frame = numbered(mac(9), BROADCAST, 1, 60);
    // As long as the others: one that is filtered may have been in the buffer before.
    let plain_frame = numbered(mac(9), BROADCAST, 1, 64);
    let all: Vec<_> =
        [7, 8, 4095].iter().map(|vlan| tagged(&frame, *vlan)).chain([plain_frame.clone()]).collect();
    // As long as everything is.
    assert_eq!(line.passed(&all)?, all);
    line.mode(VIRTIO_NET_CTRL_RX_PROMISC, false)?;
    assert_eq!(line.passed(&all)?, [plain_frame.as_slice()]);
    let vlan =
        |line: &mut Line, number, id: u16| line.ordered(VIRTIO_NET_CTRL_VLAN, number, &id.to_le_bytes());
    vlan(&mut line, VIRTIO_NET_CTRL_VLAN_ADD, 7)?;
    vlan(&mut line, VIRTIO_NET_CTRL_VLAN_ADD, 4095)?;
    assert_eq!(line.passed(&all)?, [all[0].clone(), all[2].clone(), plain_frame.clone()]);
    vlan(&mut line, VIRTIO_NET_CTRL_VLAN_DEL, 7)?;
    assert_eq!(line.passed(&all)?, [all[2].clone(), plain_frame]);
    Ok(())
}

/// As with QEMU, which has the control queue itself.
#[test]
fn without_a_control_queue_there_is_no_filter() -> Result<()> {
    for options in [plain(), plain().with(VIRTIO_NET_F_CTRL_VQ)] {
        let mut line = Line::new(&options)?;
        assert_eq!(line.reached(&EVERYBODY)?, EVERYBODY);
        let frame = tagged(&numbered(mac(9), BROADCAST, 1, 60), 7);
        assert_eq!(line.passed(std::slice::from_ref(&frame))?, [frame]);
    }
    Ok(())
}

/// A front end that comes back has a driver that has said nothing yet.
#[test]
fn a_filter_goes_with_its_driver() -> Result<()> {
    let mut line = Line::new(&filtering())?;
    line.mode(VIRTIO_NET_CTRL_RX_PROMISC, false)?;
    assert_eq!(line.reached(&EVERYBODY)?, [BROADCAST]);
    let Line { guest, control, socket, daemon, sent, namespace } = line;
    drop((guest, control));
    let mut guest = Guest::join(daemon.socket(), mac(1), &filtering())?;
    let control = guest.net.control(1, 16)?;
    let mut line = Line { guest, control, socket, daemon, sent, namespace };
    assert_eq!(line.reached(&EVERYBODY)?, EVERYBODY);
    Ok(())
}

#[test]
fn a_switch_filters_as_well() -> Result<()> {
    let mut daemon = net_daemon().arg("--switch").port("").port("").start()?;
    let [one, two] = [0, 1].map(|port| daemon.sockets()[port].clone());
    let mut from = Guest::join(&one, mac(1), &plain())?;
    let mut to = Guest::join(&two, mac(2), &filtering())?;
    let mut control = to.net.control(1, 16)?;
    ordered(&mut control, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, &mac(2))?;
    ordered(&mut control, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, &[0])?;
    to.settle()?;
    from.send(&numbered(mac(1), mac(3), 1, 60))?;
    let frame = numbered(mac(1), mac(2), 2, 60);
    from.send(&frame)?;
    to.expect(&frame)?;
    wait_counter(&mut daemon, &two.display().to_string(), "rx_filtered", 1)
}

/// Guests on an access port get no tags, so that their filter has nothing to say about the VLAN; those on a trunk do.
#[test]
fn a_filter_sees_frames_with_the_tag_that_the_guest_gets() -> Result<()> {
    let mut daemon = net_daemon().arg("--switch").port(",vlan=7").port("").start()?;
    let sockets = daemon.sockets().to_vec();
    let mut guests = Vec::new();
    for (number, socket) in (1..).zip(&sockets) {
        let mut guest = Guest::join(socket, mac(number), &filtering())?;
        let mut control = guest.net.control(1, 16)?;
        ordered(&mut control, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, &[0])?;
        guest.settle()?;
        guests.push((guest, control));
    }
    let [(access, _), (trunk, control)] = &mut guests[..] else { unreachable!() };
    let frame = numbered(mac(2), BROADCAST, 1, 60);
    trunk.send(&tagged(&frame, 7))?;
    access.expect(&frame)?;
    let frame = numbered(mac(1), BROADCAST, 2, 60);
    access.send(&frame)?;
    assert!(trunk.receive_ready()?.is_empty());
    wait_counter(&mut daemon, &sockets[1].display().to_string(), "rx_filtered", 1)?;
    ordered(control, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[7, 0])?;
    trunk.settle()?;
    access.send(&frame)?;
    trunk.expect(&tagged(&frame, 7))
}

#[test]
fn the_control_queue_is_behind_the_pairs_that_the_driver_knows() -> Result<()> {
    let daemon = net_daemon().args(["--switch", "--num-queue-pairs", "3"]).port("").start()?;
    for (options, pairs) in [(filtering(), 1), (filtering().with(VIRTIO_NET_F_MQ), 3)] {
        let mut net = RawNet::connect(daemon.socket(), &options)?;
        assert_eq!(net.config()?.max_queue_pairs, 3);
        let _pair = net.pair(0, 16, 4)?;
        let mut control = net.control(pairs, 16)?;
        ordered(&mut control, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, &[1])?;
        let request = control_command(9, 0, &[]);
        assert_eq!(control.execute(&request)?.status, Some(CONTROL_ERR));
    }
    check_idle(&daemon)
}

/// Frames of a queue that its guest does not use come in another one.
#[test]
fn the_driver_says_how_many_pairs_it_uses() -> Result<()> {
    let daemon = net_daemon().args(["--switch", "--num-queue-pairs", "2"]).port("").port("").start()?;
    let [one, two] = [0, 1].map(|port| daemon.sockets()[port].clone());
    let mut source = RawNet::connect(&one, &plain().with(VIRTIO_NET_F_MQ))?;
    let (_first, (_, mut second)) = (source.pair(0, 64, 4)?, source.pair(1, 64, 4)?);

    let options = plain().with(VIRTIO_NET_F_MQ).with(VIRTIO_NET_F_CTRL_VQ);
    let mut target = RawNet::connect(&two, &options)?;
    let mut pairs = [target.pair(0, 64, 32)?, target.pair(1, 64, 32)?];
    let mut control = target.control(2, 16)?;
    let settle = |pairs: &mut [(Rx, Tx); 2]| -> Result<()> {
        for (_, tx) in pairs {
            // See Guest::settle.
            tx.send(&numbered(mac(2), LINK_LOCAL, 0, 60))?;
            tx.send(&numbered(mac(2), LINK_LOCAL, 0, 60))?;
        }
        Ok(())
    };
    settle(&mut pairs)?;
    for (number, (count, ack, queue)) in (0..).zip([
        (1, CONTROL_OK, 0),
        (2, CONTROL_OK, 1),
        (0, CONTROL_ERR, 1),
        (3, CONTROL_ERR, 1),
        (1, CONTROL_OK, 0),
    ]) {
        assert_eq!(command(&mut control, VIRTIO_NET_CTRL_MQ, 0, &u16::to_le_bytes(count))?, ack);
        settle(&mut pairs)?;
        second.send(&numbered(mac(1), BROADCAST, number, 60))?;
        let received = pairs[queue].0.receive(LIMIT)?.context("A frame does not arrive")?;
        assert_eq!(frames::number(&received.frame), Some(number));
    }
    Ok(())
}

#[test]
fn a_tap_uses_as_many_queues_as_the_driver() -> Result<()> {
    let namespace = Namespace::new()?;
    namespace.add_tap("tap0", 2)?;
    namespace.sysctl("net.ipv6.conf.tap0.disable_ipv6", "1")?;
    namespace.ip("link set tap0 up")?;
    let daemon =
        net_daemon().inside(&namespace.root()).args(["--tap", "tap0", "--num-queue-pairs", "2"]).start()?;
    let options = plain().with(VIRTIO_NET_F_MQ).with(VIRTIO_NET_F_CTRL_VQ);
    let mut net = RawNet::connect(daemon.socket(), &options)?;
    let mut pairs = [net.pair(0, 256, 200)?, net.pair(1, 256, 200)?];
    let mut control = net.control(2, 16)?;
    let socket = open::packet(&namespace, "tap0")?;
    for (count, both) in [(1, false), (2, true), (1, false)] {
        ordered(&mut control, VIRTIO_NET_CTRL_MQ, 0, &u16::to_le_bytes(count))?;
        for (_, tx) in &mut pairs {
            tx.send(&numbered(mac(1), BROADCAST, 0, 60))?;
            tx.send(&numbered(mac(1), BROADCAST, 0, 60))?;
        }
        // The kernel spreads what belongs to different flows.
        for port in 0..64 {
            let addresses = [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()];
            let frame = frames::udp4(mac(9), mac(1), addresses, [1000 + port, 80], b"text");
            socket.send(Header::default(), &frame)?;
        }
        let mut counts = [0; 2];
        wait_until("all frames arrive", || {
            for ((rx, _), count) in pairs.iter_mut().zip(&mut counts) {
                while rx.receive(Duration::ZERO)?.is_some() {
                    rx.post(&[2048]);
                    rx.ring.kick();
                    *count += 1;
                }
            }
            Ok(counts.iter().sum::<u32>() == 64)
        })?;
        assert_eq!(counts[1] > 0, both, "{counts:?} with {count} pairs");
        assert_ne!(counts[0], 0, "{counts:?} with {count} pairs");
    }
    check_idle(&daemon)
}

fn offloads(bits: &[u32]) -> [u8; 8] {
    bits.iter().fold(0_u64, |mask, bit| mask | 1 << bit).to_le_bytes()
}

/// A driver that can receive large frames, and may change its mind.
fn with_offloads() -> RawOptions {
    plain()
        .with(VIRTIO_NET_F_CTRL_VQ)
        .with(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
        .with(VIRTIO_NET_F_MRG_RXBUF)
        .with(VIRTIO_NET_F_GUEST_CSUM)
        .with(VIRTIO_NET_F_GUEST_TSO4)
}

const ON: [u32; 2] = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4];

/// Sends a large frame, and tells whether it arrives in one piece.
fn arrives_whole(guest: &mut Guest, send: impl FnOnce(Header, &[u8]) -> Result<()>) -> Result<bool> {
    let payload: Vec<u8> = (0..20_000).map(|at| (at % 251) as u8).collect();
    let addresses = [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()];
    let mut frame = frames::tcp4(mac(9), mac(1), addresses, [1000, 80], &payload);
    let header = frames::leave_segmentation(&mut frame, 1448)?;
    send(header, &frame)?;
    let first = guest.receive()?;
    if first.frame == frame {
        ensure!(first.header.gso_size == 1448 && first.header.gso_type == frames::GSO_TCPV4);
        return Ok(true);
    }
    let mut together = frames::tcp_segment(&first.frame)?.1;
    while together.len() < payload.len() {
        let received = guest.receive()?;
        ensure!(received.header.gso_type == 0, "{:?}", received.header);
        together.extend(frames::tcp_segment(&received.frame)?.1);
    }
    ensure!(together == payload);
    Ok(false)
}

#[test]
fn segmentation_is_switched_while_frames_pass_on_a_tap() -> Result<()> {
    let mut line = Line::new(&with_offloads())?;
    let class = VIRTIO_NET_CTRL_GUEST_OFFLOADS;
    for (bits, whole) in [(&[][..], false), (&ON, true), (&[][..], false), (&ON, true)] {
        line.ordered(class, 0, &offloads(bits))?;
        let Line { guest, socket, .. } = &mut line;
        assert_eq!(arrives_whole(guest, |header, frame| socket.send(header, frame))?, whole);
    }
    // What was not negotiated cannot be switched on, and the rest stays as it was.
    let bits = [ON[0], ON[1], VIRTIO_NET_F_GUEST_TSO6];
    assert_eq!(command(&mut line.control, class, 0, &offloads(&bits))?, CONTROL_ERR);
    let Line { guest, socket, .. } = &mut line;
    assert!(arrives_whole(guest, |header, frame| socket.send(header, frame))?);
    Ok(())
}

#[test]
fn segmentation_is_switched_while_frames_pass_on_a_switch() -> Result<()> {
    let daemon = net_daemon().arg("--switch").port("").port("").start()?;
    let [one, two] = [0, 1].map(|port| daemon.sockets()[port].clone());
    let mut to = Guest::join(&two, mac(1), &with_offloads())?;
    let mut control = to.net.control(1, 16)?;
    let options = plain().with(VIRTIO_NET_F_CSUM).with(VIRTIO_NET_F_HOST_TSO4);
    let mut from = Guest::join(&one, mac(9), &options)?;
    assert!(arrives_whole(&mut to, |header, frame| from.send_with(header, frame))?);
    for (bits, whole) in [(&[][..], false), (&ON, true), (&[][..], false)] {
        ordered(&mut control, VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, &offloads(bits))?;
        to.settle()?;
        assert_eq!(arrives_whole(&mut to, |header, frame| from.send_with(header, frame))?, whole);
    }
    Ok(())
}

#[test]
fn a_driver_is_asked_to_announce_itself() -> Result<()> {
    let options = plain()
        .with(VIRTIO_NET_F_CTRL_VQ)
        .with(VIRTIO_NET_F_STATUS)
        .with(VIRTIO_NET_F_GUEST_ANNOUNCE)
        .with_protocol(VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::RARP);
    let mut line = Line::new(&options)?;
    let (mut channel, theirs) = UnixStream::pair()?;
    channel.set_read_timeout(Some(LIMIT))?;
    line.guest.net.device.frontend.set_backend_request_fd(&theirs.as_raw_fd())?;
    assert_eq!(line.guest.net.config()?.status & ANNOUNCE, 0);
    for _ in 0..2 {
        let body = [&mac(1)[..], &[0; 2]].concat();
        assert_eq!(line.guest.net.device.wire.acknowledged(SEND_RARP, &body, &[])?, 0);
        let mut message = [0; 12];
        channel.read_exact(&mut message).context("The front end is told nothing")?;
        assert_eq!(message, [2_u32, 1, 0].map(u32::to_ne_bytes).as_flattened());
        assert_eq!(line.guest.net.config()?.status & ANNOUNCE, ANNOUNCE);
        line.ordered(VIRTIO_NET_CTRL_ANNOUNCE, 0, &[])?;
        assert_eq!(line.guest.net.config()?.status & ANNOUNCE, 0);
    }
    Ok(())
}

#[test]
fn a_command_that_is_none_is_refused_and_the_next_one_fine() -> Result<()> {
    let mut line = Line::new(&filtering())?;
    let long = vec![1; 100_000];
    let bad: &[(u32, u32, &[u8])] = &[
        (99, 0, &[1]),
        (VIRTIO_NET_CTRL_RX, 6, &[1]),
        (VIRTIO_NET_CTRL_RX, 0, &[]),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[2; 5]),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, &[]),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, &[2, 0, 0, 0, 1, 1, 1, 1, 1, 1]),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, &[0xff; 16]),
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[1]),
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[0, 16]),
        (VIRTIO_NET_CTRL_MQ, 0, &[2]),
        (VIRTIO_NET_CTRL_MQ, 0, &[2, 0]),
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, &[0; 7]),
        (VIRTIO_NET_CTRL_RX, 0, &long),
    ];
    for (class, number, data) in bad {
        let ack = command(&mut line.control, *class, *number, data)?;
        ensure!(ack == CONTROL_ERR, "{class}, {number}, {} bytes: {ack}", data.len());
        ordered(&mut line.control, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, &[1])?;
    }
    // Less than a command, and no place for an acknowledgement.
    let request = control_command(0, 0, &[1]);
    let outcome = line.control.execute(&request.clone().truncated(1).cut(&[], &[]))?;
    assert_eq!((outcome.status, outcome.used_len), (Some(CONTROL_ERR), 1));
    let outcome = line.control.execute(&request.clone().without_status())?;
    assert_eq!((outcome.status, outcome.used_len), (None, 0));
    // In any pieces, and in an indirect table.
    for cuts in [&[][..], &[1], &[1, 2], &[2, 3]] {
        let request = control_command(0, 0, &[1, 0, 0]).cut(cuts, &[]).indirect();
        assert_eq!(line.control.execute(&request)?.status, Some(CONTROL_OK));
    }
    // More at once than are carried out in one go.
    let before = line.control.used_idx();
    for _ in 0..16 {
        line.control.submit(&control_command(0, 0, &[1]).indirect());
    }
    line.control.kick();
    for _ in 0..16 {
        line.control.wait_used(LIMIT).context("A command does not come back")?;
    }
    assert_eq!(line.control.used_idx().wrapping_sub(before), 16);
    check_idle(&line.daemon)
}
