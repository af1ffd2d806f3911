//! The life of `vhost-user-net` on a tap: front ends and guests that come and go, daemons that are replaced, the end.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;
use tests::daemon::{Builder, Daemon};
use tests::driver::lan::{net_daemon, plain, wait_until};
use tests::driver::net::{RawNet, TIMEOUT};
use tests::driver::net_fixture::{TAP, TapFixture, quiet_tap};
use tests::driver::usage::Footprint;
use tests::driver::wire::{FLAG_VERSION, WireFrontend, vring_state};
use tests::frames::{BROADCAST, Header, mac, number, numbered};
use tests::guest::{Guest, NetOptions, Running, Vmm};
use tests::netns::{Namespace, open};
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;

const STEP: Duration = Duration::from_secs(120);
/// Long enough for a loaded machine to end a process.
const END_LIMIT: Duration = Duration::from_secs(10);
const RECONNECT: Duration = Duration::from_millis(100);
const SIZE: u16 = 128;

#[test]
fn front_ends_come_and_go() -> Result<()> {
    const ROUNDS: u64 = 30;
    let fixture = TapFixture::new::<&str>([])?;
    let pid = fixture.daemon.pid();
    let mut first = None;
    for round in 0..ROUNDS {
        let mut net = fixture.connect(&plain())?;
        let (mut rx, mut tx) = net.pair(0, SIZE, 4)?;
        fixture.check_passes(&mut rx, &mut tx, round)?;
        // Looked at while one is served: the daemon has let go of those before it then. The first rounds may allocate what
        // stays.
        if round == 5 {
            first = Some(Footprint::of(pid)?);
        } else if round == ROUNDS - 1 {
            let before = first.context("a footprint")?;
            wait_until("a thread that has ended is gone", || {
                Ok(Footprint::of(pid)?.threads == before.threads)
            })?;
            let after = Footprint::of(pid)?;
            assert_eq!(before.fds, after.fds);
            assert!(after.mappings <= before.mappings + 2, "{before:?}, {after:?}");
        }
    }
    Ok(())
}

/// A front end that is killed leaves whatever it was in the middle of.
#[test]
fn a_front_end_that_vanishes_in_the_middle_of_traffic_is_replaced() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    for round in 0..5 {
        let mut net = fixture.connect(&plain())?;
        let (rx, mut tx) = net.pair(0, SIZE, 4)?;
        for marker in 0..100 {
            let request = tx.request(Header::default(), &numbered(mac(1), BROADCAST, marker, 1000));
            tx.ring.submit(&request);
            fixture.packets.send(Header::default(), &numbered(mac(2), BROADCAST, marker, 1000))?;
        }
        tx.ring.kick();
        drop((rx, tx, net));
        // What waited in the tap is for the next one, and old.
        let mut net = fixture.connect(&plain())?;
        let (mut rx, mut tx) = net.pair(0, SIZE, 100)?;
        while rx.receive(Duration::from_millis(100))?.is_some() {}
        fixture.packets.drain()?;
        fixture.check_passes(&mut rx, &mut tx, round)?;
    }
    Ok(())
}

/// As a migration or a pause of the guest does it.
#[test]
fn rings_are_stopped_and_go_on_where_they_were() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&plain())?;
    let (mut rx, mut tx) = net.pair(0, SIZE, 16)?;
    for round in 0..4_u16 {
        fixture.check_passes(&mut rx, &mut tx, round.into())?;
        // Buffers that the device has looked at and not filled are the guest's.
        assert_eq!(net.device.frontend.get_vring_base(0)?, u32::from(round) + 1);
        assert_eq!(net.device.frontend.get_vring_base(1)?, 2 * u32::from(round) + 1);
        let frame = numbered(mac(1), BROADCAST, 1000 + u64::from(round), 60);
        let request = tx.request(Header::default(), &frame);
        tx.ring.submit(&request);
        tx.ring.kick();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(tx.ring.pop_used(), None, "a ring that is stopped");
        net.device.start(0, &rx.ring)?;
        net.device.start(1, &tx.ring)?;
        tx.ring.wait_used(TIMEOUT).context("what waited is not sent")?;
        let passed = fixture.packets.find(TIMEOUT, |passed| !passed.outgoing)?.context("it is not sent")?;
        assert_eq!(passed.frame, frame);
    }
    Ok(())
}

/// DPDK's driver stops the rings of a connection that it has not even negotiated.
#[test]
fn rings_may_be_stopped_before_anything_else() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    let wire = WireFrontend::connect(fixture.socket())?;
    for queue in 0..2 {
        wire.send(FrontendReq::SET_VRING_ENABLE as u32, FLAG_VERSION, &vring_state(queue, 0), &[])?;
    }
    for queue in 0..2 {
        let reply = wire.call(FrontendReq::GET_VRING_BASE as u32, &vring_state(queue, 0), &[])?;
        assert_eq!(reply.body, vring_state(queue, 0));
    }
    assert_ne!(wire.call(FrontendReq::GET_FEATURES as u32, &[], &[])?.value()?, 0);
    drop(wire);
    let mut net = fixture.connect(&plain())?;
    let (mut rx, mut tx) = net.pair(0, SIZE, 4)?;
    fixture.check_passes(&mut rx, &mut tx, 1)
}

#[test]
fn a_daemon_ends_when_it_is_told_to() -> Result<()> {
    let mut fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&plain())?;
    let (mut rx, mut tx) = net.pair(0, SIZE, 4)?;
    fixture.check_passes(&mut rx, &mut tx, 1)?;
    let status = fixture.daemon.terminate(END_LIMIT)?;
    assert!(status.success(), "{status}: {}", fixture.daemon.stderr());
    assert!(!fixture.socket().exists());
    // The tap was made by somebody else, and stays.
    fixture.namespace.counters(TAP)?;
    Ok(())
}

/// A tap that the daemon made is gone with it.
#[test]
fn a_tap_is_made_where_there_is_none() -> Result<()> {
    let namespace = Namespace::new()?;
    let mut daemon = net_daemon().inside(&namespace.root()).args(["--tap", TAP]).start()?;
    namespace.ip(&format!("link set {TAP} up"))?;
    let mut net = RawNet::connect(daemon.socket(), &plain())?;
    let (mut rx, mut tx) = net.pair(0, SIZE, 4)?;
    let packets = open::packet(&namespace, TAP)?;
    tx.send(&numbered(mac(1), BROADCAST, 7, 60))?;
    let passed = packets.find(TIMEOUT, |passed| !passed.outgoing)?.context("nothing comes out")?;
    assert_eq!(number(&passed.frame), Some(7));
    packets.send(Header::default(), &numbered(mac(2), BROADCAST, 8, 60))?;
    // The kernel has things of its own to say to a new interface.
    while number(&rx.receive(TIMEOUT)?.context("nothing arrives")?.frame) != Some(8) {
        rx.post(&[2048]);
        rx.ring.kick();
    }
    assert!(daemon.terminate(END_LIMIT)?.success());
    assert!(namespace.counters(TAP).is_err());
    Ok(())
}

/// The queues of a tap that somebody else has opened.
#[test]
fn a_tap_may_be_inherited() -> Result<()> {
    for queues in [1, 2] {
        let namespace = Namespace::new()?;
        let options = open::TapOptions { queues, multi_queue: queues > 1, ..Default::default() };
        let taps = open::tap(&namespace, TAP, options)?;
        let numbers: Vec<String> = (10..10 + queues).map(|number| number.to_string()).collect();
        let mut builder =
            net_daemon().inside(&namespace.ordinary_user()).args(["--tap-fd", &numbers.join(",")]);
        builder = builder.args(["--num-queue-pairs", &queues.to_string()]);
        for (number, tap) in (10..).zip(taps) {
            builder = builder.fd(number, tap);
        }
        let daemon = builder.start()?;
        namespace.sysctl(&format!("net.ipv6.conf.{TAP}.disable_ipv6"), "1")?;
        namespace.ip(&format!("link set {TAP} up"))?;
        let packets = open::packet(&namespace, TAP)?;
        let fixture = TapFixture { daemon, packets, namespace };
        let mut net = fixture.connect(&plain())?;
        let (mut rx, mut tx) = net.pair(0, SIZE, 4)?;
        fixture.check_passes(&mut rx, &mut tx, 1)?;
    }
    Ok(())
}

/// A guest that sends and receives without an end, and says how far it is.
const PING: &str = "
net_up eth0 192.0.2.2/24
wait_ping 192.0.2.1
announce up
while read -r word; do
    [ \"$word\" != end ] || break
    # What is lost meanwhile is asked for again.
    wait_ping 192.0.2.1
    announce \"$word\"
done
";

/// A host in a namespace, which is 192.0.2.1 on the tap of whichever daemon is there.
fn host() -> Result<Namespace> {
    let namespace = quiet_tap(1)?;
    namespace.ip(&format!("address add 192.0.2.1/24 dev {TAP}"))?;
    Ok(namespace)
}

fn builder(namespace: &Namespace, socket: &Path) -> Builder {
    net_daemon().inside(&namespace.root()).args(["--tap", TAP]).socket(socket)
}

/// Checks that the guest still reaches the host.
fn check_guest(guest: &mut Running, word: &str, daemon: &Daemon) {
    guest.send(word).unwrap();
    guest.wait_for(word, STEP).unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.stderr()));
}

/// QEMU tries again and again to connect to a daemon that went away.
#[test]
fn a_guest_outlives_daemons_that_listen() {
    let namespace = host().unwrap();
    let folder = TempDir::with_prefix("vhost-user-").unwrap();
    let socket = folder.path().join("socket");
    let mut daemon = builder(&namespace, &socket).start().unwrap();
    let options = NetOptions { reconnect: Some(RECONNECT), ..NetOptions::default() };
    let mut guest = Guest::new(Vmm::Qemu).net(&socket, options).script(PING).spawn().unwrap();
    guest.wait_for("up", STEP).unwrap();
    for word in ["first", "second", "third"] {
        daemon.kill();
        daemon = builder(&namespace, &socket).start().unwrap();
        check_guest(&mut guest, word, &daemon);
    }
    // In good order as well.
    assert!(daemon.terminate(END_LIMIT).unwrap().success());
    daemon = builder(&namespace, &socket).start().unwrap();
    check_guest(&mut guest, "last", &daemon);
    guest.send("end").unwrap();
    guest.wait().unwrap().check().unwrap();
}

/// QEMU listens, and the daemon tries again and again.
#[test]
fn a_guest_outlives_daemons_that_connect() {
    let namespace = host().unwrap();
    let folder = TempDir::with_prefix("vhost-user-").unwrap();
    let socket = folder.path().join("socket");
    // It is there first.
    let mut daemon = builder(&namespace, &socket).client().start().unwrap();
    let options = NetOptions { is_server: true, ..NetOptions::default() };
    let mut guest = Guest::new(Vmm::Qemu).net(&socket, options).script(PING).spawn().unwrap();
    guest.wait_for("up", STEP).unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.stderr()));
    for word in ["first", "second", "third"] {
        daemon.kill();
        daemon = builder(&namespace, &socket).client().start().unwrap();
        check_guest(&mut guest, word, &daemon);
    }
    guest.send("end").unwrap();
    guest.wait().unwrap().check().unwrap();
    // Another guest takes the place of the first.
    let mut guest = Guest::new(Vmm::Qemu).net(&socket, options).script(PING).spawn().unwrap();
    guest.wait_for("up", STEP).unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.stderr()));
    guest.send("end").unwrap();
    guest.wait().unwrap().check().unwrap();
}

#[test]
fn a_guest_reboots() {
    let namespace = host().unwrap();
    let folder = TempDir::with_prefix("vhost-user-").unwrap();
    let socket = folder.path().join("socket");
    let daemon = builder(&namespace, &socket).start().unwrap();
    // Each time it is up it asks for the word that it is to answer, and whether to go on.
    let script = "
net_up eth0 192.0.2.2/24
wait_ping 192.0.2.1
read -r word
announce \"$word\"
[ \"$word\" = last ] || reboot -f
";
    let guest = Guest::new(Vmm::Qemu).net(&socket, NetOptions::default()).may_reboot();
    let mut guest = guest.timeout(Duration::from_secs(240)).script(script).spawn().unwrap();
    for word in ["first", "second", "last"] {
        let deadline = Instant::now() + STEP;
        // What is sent while it boots is lost.
        loop {
            guest.send(word).unwrap();
            match guest.wait_for(word, Duration::from_secs(1)) {
                Ok(()) => break,
                Err(error) => assert!(Instant::now() < deadline, "{error:#}\n{}", daemon.stderr()),
            }
        }
    }
    guest.wait().unwrap().check().unwrap();
}

/// The driver lets go of the device and takes it again.
#[test]
fn a_driver_is_started_anew() {
    let namespace = host().unwrap();
    let folder = TempDir::with_prefix("vhost-user-").unwrap();
    let socket = folder.path().join("socket");
    let _daemon = builder(&namespace, &socket).start().unwrap();
    let script = "
for round in 1 2 3 4 5; do
    net_up eth0 192.0.2.2/24
    wait_ping 192.0.2.1
    device=$(basename \"$(readlink /sys/class/net/eth0/device)\")
    echo $device >/sys/bus/virtio/drivers/virtio_net/unbind
    echo $device >/sys/bus/virtio/drivers/virtio_net/bind
done
";
    let guest = Guest::new(Vmm::Qemu).net(&socket, NetOptions::default()).script(script);
    guest.run().unwrap().check().unwrap();
}
