//! `vhost-user-net --switch` seen from rings: who gets which frame.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::{Guest, LINK_LOCAL, net_daemon, plain, wait_counter, wait_until};
use tests::driver::net::{RawNet, TIMEOUT};
use tests::driver::raw::RawOptions;
use tests::frames::{self, BROADCAST, mac, numbered, tagged};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
};

/// A switch with a guest at each port.
struct Lan {
    daemon: Daemon,
    guests: Vec<Guest>,
}

impl Lan {
    /// Ports with these options, and guests with addresses that end with 1, 2 and so on.
    fn new(ports: &[&str]) -> Result<Self> {
        Self::with(ports, &plain())
    }

    fn with(ports: &[&str], options: &RawOptions) -> Result<Self> {
        let daemon = ports.iter().fold(net_daemon().arg("--switch"), |builder, port| builder.port(port));
        let daemon = daemon.start()?;
        let guests =
            (1..).zip(daemon.sockets()).map(|(number, socket)| Guest::join(socket, mac(number), options));
        let guests = guests.collect::<Result<_>>()?;
        Ok(Self { daemon, guests })
    }

    /// Sends `frame` from one guest: those in `to` get `arrives`, and the others the next frame that everybody gets.
    fn check(&mut self, from: usize, frame: &[u8], to: &[usize], arrives: &[u8]) -> Result<()> {
        self.guests[from].send(frame)?;
        for &guest in to {
            self.guests[guest].expect(arrives)?;
        }
        Ok(())
    }

    /// Nobody has got anything else than what was looked at. For ports that all reach each other: guest `from` sends to
    /// everybody.
    fn check_nothing_else(&mut self, from: usize) -> Result<()> {
        let marker = numbered(self.guests[from].mac, BROADCAST, u64::MAX, 60);
        self.guests[from].send(&marker)?;
        for (index, guest) in self.guests.iter_mut().enumerate() {
            if index == from {
                ensure!(guest.receive_ready()?.is_empty(), "guest {index} got a frame");
            } else {
                guest.expect(&marker)?;
            }
        }
        Ok(())
    }

    /// Nobody has a frame now. Frames are delivered before they are completed, so nothing is on the way either.
    fn check_quiet(&mut self) -> Result<()> {
        for (index, guest) in self.guests.iter_mut().enumerate() {
            let ready = guest.receive_ready()?;
            ensure!(ready.is_empty(), "guest {index} got {ready:02x?}");
        }
        Ok(())
    }

    fn wait_counter(&mut self, guest: usize, name: &str, number: u64) -> Result<()> {
        let port = self.daemon.sockets()[guest].display().to_string();
        wait_counter(&mut self.daemon, &port, name, number)
    }
}

#[test]
fn broadcasts_and_unknown_addresses_reach_all_others() -> Result<()> {
    let mut lan = Lan::new(&["", "", ""])?;
    for to in [BROADCAST, mac(99), [0x33, 0x33, 0, 0, 0, 1]] {
        let frame = numbered(mac(1), to, 7, 100);
        lan.check(0, &frame, &[1, 2], &frame)?;
    }
    lan.check_nothing_else(1)?;
    lan.wait_counter(0, "tx_flooded", 3)?;
    lan.wait_counter(0, "tx_frames", 3)?;
    lan.wait_counter(2, "rx_frames", 4)
}

#[test]
fn a_known_address_reaches_one_port() -> Result<()> {
    let mut lan = Lan::new(&["", "", ""])?;
    let hello = numbered(mac(2), BROADCAST, 0, 60);
    lan.check(1, &hello, &[0, 2], &hello)?;
    for number in 0..3 {
        let frame = numbered(mac(1), mac(2), number, 1514);
        lan.check(0, &frame, &[1], &frame)?;
    }
    let reply = numbered(mac(2), mac(1), 4, 60);
    lan.check(1, &reply, &[0], &reply)?;
    lan.check_nothing_else(2)?;
    lan.wait_counter(0, "tx_flooded", 0)
}

#[test]
fn a_frame_to_the_sender_s_own_port_goes_nowhere() -> Result<()> {
    let mut lan = Lan::new(&["", ""])?;
    let hello = numbered(mac(1), BROADCAST, 0, 60);
    lan.check(0, &hello, &[1], &hello)?;
    lan.check(0, &numbered(mac(1), mac(1), 1, 60), &[], &[])?;
    lan.check_nothing_else(1)?;
    // Two were sent when the guest came.
    lan.wait_counter(0, "tx_nowhere", 3)
}

#[test]
fn an_address_moves_with_its_frames() -> Result<()> {
    let mut lan = Lan::new(&["", "", ""])?;
    let hello = numbered(mac(1), BROADCAST, 0, 60);
    lan.check(0, &hello, &[1, 2], &hello)?;
    let roaming = mac(50);
    let to_it = numbered(mac(1), roaming, 1, 60);
    for port in [1, 2] {
        // It stays at a port for a second, whatever is sent elsewhere.
        wait_until("the address has moved", || {
            let hello = numbered(roaming, mac(1), 0, 60);
            lan.check(port, &hello, &[0], &hello)?;
            lan.guests[0].send(&to_it)?;
            let mut arrived = Vec::new();
            for (index, guest) in lan.guests.iter_mut().enumerate() {
                arrived.extend(guest.receive_ready()?.into_iter().map(|received| (index, received.frame)));
            }
            ensure!(arrived.iter().all(|(_, frame)| *frame == to_it), "{arrived:02x?}");
            Ok(arrived == [(port, to_it.clone())])
        })?;
    }
    Ok(())
}

#[test]
fn isolated_ports_reach_only_the_others() -> Result<()> {
    let mut lan = Lan::new(&["", ",isolated=on", ",isolated=on"])?;
    let frame = numbered(mac(2), BROADCAST, 1, 60);
    lan.check(1, &frame, &[0], &frame)?;
    let frame = numbered(mac(3), BROADCAST, 2, 60);
    lan.check(2, &frame, &[0], &frame)?;
    // Known, and not reached all the same.
    lan.check(1, &numbered(mac(2), mac(3), 3, 60), &[], &[])?;
    lan.check(1, &numbered(mac(2), mac(99), 3, 60), &[0], &numbered(mac(2), mac(99), 3, 60))?;
    let frame = numbered(mac(1), mac(3), 4, 60);
    lan.check(0, &frame, &[2], &frame)?;
    lan.check_nothing_else(0)?;
    lan.wait_counter(1, "tx_nowhere", 3)
}

#[test]
fn an_access_port_has_one_vlan_and_a_trunk_has_all() -> Result<()> {
    let mut lan = Lan::new(&[",vlan=7", "", ",vlan=7", ",vlan=8"])?;
    let frame = numbered(mac(1), BROADCAST, 1, 100);
    lan.check(0, &frame, &[2], &frame)?;
    lan.guests[1].expect(&tagged(&frame, 7))?;

    let frame = numbered(mac(2), BROADCAST, 2, 100);
    lan.check(1, &tagged(&frame, 7), &[0, 2], &frame)?;
    lan.check(1, &tagged(&frame, 8), &[3], &frame)?;
    // Other VLANs, and none, have no other port.
    lan.check(1, &tagged(&frame, 9), &[], &[])?;
    lan.check(1, &frame, &[], &[])?;
    // The bits beside the VLAN's number do not matter.
    lan.check(1, &tagged(&frame, 0xe007), &[0, 2], &frame)?;

    // Known addresses, each in its VLAN.
    let frame = numbered(mac(2), mac(1), 3, 100);
    lan.check(1, &tagged(&frame, 7), &[0], &frame)?;
    lan.check(1, &tagged(&frame, 8), &[3], &frame)?;
    let frame = numbered(mac(1), mac(2), 4, 100);
    lan.check(0, &frame, &[1], &tagged(&frame, 7))?;
    lan.check_quiet()
}

#[test]
fn an_access_port_sends_no_tags() -> Result<()> {
    let mut lan = Lan::new(&[",vlan=7", "", ",vlan=8"])?;
    let frame = numbered(mac(1), BROADCAST, 1, 100);
    for vlan in [7, 8, 9] {
        lan.check(0, &tagged(&frame, vlan), &[], &[])?;
    }
    lan.check_quiet()?;
    lan.wait_counter(0, "tx_spoofed", 3)?;
    // A tag that only has a priority names no VLAN.
    lan.check(0, &tagged(&frame, 0xa000), &[], &[])?;
    let received = lan.guests[1].receive()?.frame;
    ensure!(received[12..14] == [0x81, 0] && received[14..16] == [0, 7], "{received:02x?}");
    ensure!(received[16..] == frame[12..]);
    lan.wait_counter(0, "tx_spoofed", 3)
}

#[test]
fn a_trunk_passes_tags_to_a_trunk() -> Result<()> {
    let mut lan = Lan::new(&["", ""])?;
    for vlan in [1, 4095, 0xe001] {
        let frame = tagged(&numbered(mac(1), BROADCAST, 1, 100), vlan);
        lan.check(0, &frame, &[1], &frame)?;
    }
    // An address is learned in its VLAN: in another one it is not known.
    lan.check_nothing_else(1)
}

#[test]
fn a_tag_shifts_what_the_header_says() -> Result<()> {
    let options = plain().with(VIRTIO_NET_F_CSUM).with(VIRTIO_NET_F_GUEST_CSUM);
    let mut lan = Lan::with(&[",vlan=7", ""], &options)?;
    let addresses = [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()];
    for (from, to, is_tcp) in [(0, 1, true), (1, 0, false)] {
        let (source, target) = (lan.guests[from].mac, lan.guests[to].mac);
        let whole = if is_tcp {
            frames::tcp4(source, target, addresses, [1, 2], &[5; 700])
        } else {
            frames::udp4(source, target, addresses, [1, 2], &[5; 700])
        };
        let mut plain = whole.clone();
        let plain_header = frames::leave_checksum(&mut plain)?;
        let mut with_tag = tagged(&whole, 7);
        let tagged_header = frames::leave_checksum(&mut with_tag)?;
        assert_eq!(tagged_header.csum_start, plain_header.csum_start + 4);
        let (sent, arrives) = if from == 0 {
            ((plain_header, &plain), (tagged_header, &with_tag))
        } else {
            ((tagged_header, &with_tag), (plain_header, &plain))
        };
        lan.guests[from].send_with(sent.0, sent.1)?;
        let received = lan.guests[to].receive()?;
        assert_eq!((received.header, &received.frame), arrives);
    }
    Ok(())
}

#[test]
fn a_tag_shifts_the_checksum_that_is_filled_in() -> Result<()> {
    let daemon = net_daemon().arg("--switch").port(",vlan=7").port("").start()?;
    let [access, trunk] = [0, 1].map(|port| daemon.sockets()[port].clone());
    let sends = plain().with(VIRTIO_NET_F_CSUM);
    let mut access = Guest::join(&access, mac(1), &sends)?;
    let mut trunk = Guest::join(&trunk, mac(2), &sends)?;
    let addresses = [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()];
    let whole = frames::udp4(mac(1), mac(2), addresses, [1, 2], &[5; 701]);
    let mut frame = whole.clone();
    let header = frames::leave_checksum(&mut frame)?;
    access.send_with(header, &frame)?;
    trunk.expect(&tagged(&whole, 7))?;

    let whole = frames::tcp4(mac(2), mac(1), addresses, [1, 2], &[5; 701]);
    let mut frame = tagged(&whole, 7);
    let header = frames::leave_checksum(&mut frame)?;
    trunk.send_with(header, &frame)?;
    access.expect(&whole)
}

/// A checksum that lies in the tag, or behind the end when the tag is gone.
#[test]
fn a_header_that_does_not_fit_without_the_tag_is_not_passed_on() -> Result<()> {
    let options = plain().with(VIRTIO_NET_F_CSUM).with(VIRTIO_NET_F_GUEST_CSUM);
    let mut lan = Lan::with(&[",vlan=7", ""], &options)?;
    let frame = tagged(&numbered(mac(2), BROADCAST, 1, 60), 7);
    let bad = frames::Header { flags: frames::NEEDS_CSUM, csum_offset: 62, ..Default::default() };
    lan.guests[1].send_with(bad, &frame)?;
    // Nothing is behind the tag, not even a type.
    lan.check(1, &frame[..16], &[], &[])?;
    let next = numbered(mac(2), BROADCAST, 2, 60);
    lan.check(1, &tagged(&next, 7), &[0], &next)?;
    lan.wait_counter(0, "rx_impossible", 2)
}

#[test]
fn an_address_of_the_operator_s_choice_is_the_guest_s_own() -> Result<()> {
    let options = plain();
    let mut lan = Lan::with(&[",mac=02:00:00:00:00:01", "", ""], &options)?;
    let config = lan.guests[0].net.config()?;
    assert_eq!(config.mac, mac(1));
    assert_ne!(lan.guests[0].net.device.frontend.get_features()? & 1 << VIRTIO_NET_F_MAC, 0);

    // Known before it has sent anything.
    let frame = numbered(mac(2), mac(1), 1, 60);
    lan.check(1, &frame, &[0], &frame)?;
    // It uses no other address.
    lan.check(0, &numbered(mac(9), BROADCAST, 2, 60), &[], &[])?;
    lan.wait_counter(0, "tx_spoofed", 1)?;
    // Nobody else uses its address.
    lan.check(1, &numbered(mac(1), BROADCAST, 3, 60), &[], &[])?;
    lan.wait_counter(1, "tx_spoofed", 1)?;
    let frame = numbered(mac(3), mac(1), 4, 60);
    lan.check(2, &frame, &[0], &frame)?;
    let frame = numbered(mac(1), mac(3), 5, 60);
    lan.check(0, &frame, &[2], &frame)?;
    lan.check_nothing_else(1)
}

#[test]
fn an_address_of_a_trunk_is_its_own_in_each_vlan() -> Result<()> {
    let mut lan = Lan::new(&[",mac=02:00:00:00:00:01", ",vlan=7", ",vlan=7"])?;
    lan.check(1, &numbered(mac(1), BROADCAST, 1, 60), &[], &[])?;
    lan.check_quiet()?;
    lan.wait_counter(1, "tx_spoofed", 1)
}

#[test]
fn nobody_sends_as_a_group() -> Result<()> {
    let mut lan = Lan::new(&["", ""])?;
    lan.check(0, &numbered([3, 0, 0, 0, 0, 1], BROADCAST, 1, 60), &[], &[])?;
    lan.check_nothing_else(0)?;
    lan.wait_counter(0, "tx_spoofed", 1)
}

#[test]
fn what_is_for_the_bridge_itself_is_not_forwarded() -> Result<()> {
    let mut lan = Lan::new(&["", ""])?;
    for last in 0..16 {
        let mut to = LINK_LOCAL;
        to[5] = last;
        lan.check(0, &numbered(mac(1), to, 1, 60), &[], &[])?;
    }
    // The address behind them is an ordinary group.
    let frame = numbered(mac(1), [0x01, 0x80, 0xc2, 0, 0, 0x10], 2, 60);
    lan.check(0, &frame, &[1], &frame)?;
    lan.check_nothing_else(1)?;
    lan.wait_counter(0, "tx_nowhere", 18)
}

#[test]
fn a_guest_leaves_and_comes_back() -> Result<()> {
    let mut lan = Lan::new(&["", "", ""])?;
    let hello = numbered(mac(3), BROADCAST, 0, 60);
    lan.check(2, &hello, &[0, 1], &hello)?;
    let socket = lan.daemon.sockets()[2].clone();
    for round in 0..3 {
        drop(lan.guests.pop());
        // What was known of it is forgotten with it, so that its frames reach the others instead.
        wait_until("the guest's address is forgotten", || {
            lan.guests[0].send(&numbered(mac(1), mac(3), round, 60))?;
            Ok(!lan.guests[1].receive_ready()?.is_empty())
        })?;
        lan.guests.push(Guest::join(Path::new(&socket), mac(3), &plain())?);
        let frame = numbered(mac(1), BROADCAST, 10 + round, 60);
        lan.check(0, &frame, &[1, 2], &frame)?;
        lan.check(2, &hello, &[0, 1], &hello)?;
        let frame = numbered(mac(1), mac(3), 20 + round, 60);
        lan.check(0, &frame, &[2], &frame)?;
        lan.check_nothing_else(1)?;
    }
    Ok(())
}

#[test]
fn two_pairs_of_queues() -> Result<()> {
    let daemon = net_daemon().args(["--switch", "--num-queue-pairs", "2"]).port("").port("").start()?;
    let [one, two] = [0, 1].map(|port| daemon.sockets()[port].clone());
    // Without a control queue both pairs are in use when they are enabled, as with QEMU.
    let options = plain().with(VIRTIO_NET_F_MQ);
    let mut source = RawNet::connect(&one, &options)?;
    assert_eq!(source.config()?.max_queue_pairs, 2);
    let (_, mut first) = source.pair(0, 64, 16)?;
    let (_, mut second) = source.pair(1, 64, 16)?;
    let mut target = RawNet::connect(&two, &options)?;
    let mut pairs = [target.pair(0, 64, 32)?, target.pair(1, 64, 32)?];
    let lldp = numbered(mac(2), LINK_LOCAL, 0, 60);
    for (_, tx) in &mut pairs {
        // See Guest::settle.
        tx.send_all(&[&lldp])?;
        tx.send_all(&[&lldp])?;
    }
    for number in 0..20 {
        first.send(&numbered(mac(1), BROADCAST, number, 60))?;
        second.send(&numbered(mac(1), BROADCAST, 100 + number, 60))?;
    }
    // A sender's queue has its own receive queue.
    for (start, (rx, _)) in [0, 100].into_iter().zip(&mut pairs) {
        for number in 0..20 {
            let received = rx.receive(TIMEOUT)?.expect("a frame");
            assert_eq!(frames::number(&received.frame), Some(start + number));
        }
    }
    // With one of them switched off, everything comes by the other.
    target.device.frontend.set_vring_enable(2, false)?;
    target.device.frontend.set_vring_enable(3, false)?;
    wait_until("the other queue is used", || {
        second.send(&numbered(mac(1), BROADCAST, 300, 60))?;
        Ok(pairs[0].0.receive(Duration::ZERO)?.is_some())
    })
}
