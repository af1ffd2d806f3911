//! Linux guests on vhost-user-net and a tap: they reach the host, and large frames, several queues and every MTU work.
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::net_daemon;
use tests::driver::net_fixture::TAP;
use tests::frames::BROADCAST;
use tests::guest::{Guest, NetOptions, Report, Vmm};
use tests::netns::{Namespace, open};
use tests::process::Process;

const STEP: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(20);
/// The longest frame with an MTU of 1500.
const FULL_FRAME: u64 = 1514;

/// A host in a namespace, which is 192.0.2.1 and fd00::1 on the tap of a daemon.
struct Host {
    daemon: Daemon,
    namespace: Namespace,
}

impl Host {
    fn new(queue_pairs: u16, args: &[&str]) -> Result<Self> {
        let namespace = Namespace::new()?;
        namespace.add_tap(TAP, queue_pairs)?;
        let daemon = net_daemon()
            .inside(&namespace.root())
            .args(["--tap", TAP, "--num-queue-pairs", &queue_pairs.to_string()])
            .args(args)
            .start()?;
        namespace.ip(&format!("link set {TAP} up"))?;
        namespace.ip(&format!("address add 192.0.2.1/24 dev {TAP}"))?;
        namespace.ip(&format!("address add fd00::1/64 dev {TAP} nodad"))?;
        Ok(Self { daemon, namespace })
    }

    /// A guest on it, in which `net_up` is still to be called.
    fn guest(&self, vmm: Vmm, options: NetOptions) -> Guest {
        Guest::new(vmm).net(self.daemon.socket(), options).module("ipv6").timeout(Duration::from_secs(240))
    }

    /// A server for iperf3 on the host.
    fn iperf3(&self) -> Result<Process> {
        let mut command = self.namespace.program("iperf3")?;
        command
            .args(["--server", "--forceflush"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let server = Process::spawn(command).context("Cannot start iperf3")?;
        let listens = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains("listening").then_some(());
        server
            .stdout()
            .wait_until(Instant::now() + STEP, listens)
            .with_context(|| format!("iperf3 does not listen: {}", server.stderr().text()))?;
        Ok(server)
    }

    fn stop(mut self) -> Result<()> {
        let status = self.daemon.terminate(STOP)?;
        ensure!(status.success(), "{status}: {}", self.daemon.stderr());
        Ok(())
    }
}

/// Gives the guest its addresses, and checks both ways to the host.
const UP: &str = "
net_up eth0 192.0.2.2/24 fd00::2/64
wait_ping 192.0.2.1
ping -c 3 fd00::1
ping -c 3 192.0.2.1
";

/// Bytes on an interface for each frame.
fn mean(bytes: u64, packets: u64) -> u64 {
    bytes / packets.max(1)
}

fn data_passes_both_ways_in_large_frames(vmm: Vmm) {
    let host = Host::new(1, &[]).unwrap();
    let _server = host.iperf3().unwrap();
    let script = UP.to_owned()
        + "
iperf3 --client 192.0.2.1 --bytes 64M
announce sent
await receive
iperf3 --client 192.0.2.1 --bytes 64M --reverse
announce received
await end
iperf3 --client fd00::1 --bytes 16M
iperf3 --client fd00::1 --bytes 16M --reverse
";
    let mut guest = host.guest(vmm, NetOptions::default()).program("iperf3").script(script).spawn().unwrap();
    let count = || host.namespace.counters(TAP).unwrap();
    let start = count();
    guest.wait_for("sent", STEP).unwrap();
    let sent = count().since(&start);
    guest.send("receive").unwrap();
    let start = count();
    guest.wait_for("received", STEP).unwrap();
    let received = count().since(&start);
    guest.send("end").unwrap();
    guest.wait().unwrap().check().unwrap();

    // What the guest sent, the tap received; and frames longer than the MTU allows can only be unsegmented ones.
    assert!(sent.rx_bytes > 64 << 20, "{sent:?}");
    assert!(mean(sent.rx_bytes, sent.rx_packets) > 2 * FULL_FRAME, "{sent:?}");
    assert!(received.tx_bytes > 64 << 20, "{received:?}");
    assert!(mean(received.tx_bytes, received.tx_packets) > 2 * FULL_FRAME, "{received:?}");
    assert_eq!((sent.rx_dropped, received.tx_dropped), (0, 0));
    host.stop().unwrap();
}

/// Without any offload the same data passes in many small frames.
fn data_passes_without_offloads(vmm: Vmm) {
    let host = Host::new(1, &["--offloads", "none"]).unwrap();
    let _server = host.iperf3().unwrap();
    let script = UP.to_owned()
        + "
iperf3 --client 192.0.2.1 --bytes 8M
iperf3 --client 192.0.2.1 --bytes 8M --reverse
";
    let guest = host.guest(vmm, NetOptions::default()).program("iperf3").script(script);
    guest.run().unwrap().check().unwrap();
    let count = host.namespace.counters(TAP).unwrap();
    assert!(count.rx_bytes > 8 << 20 && count.tx_bytes > 8 << 20, "{count:?}");
    assert!(mean(count.rx_bytes, count.rx_packets) <= FULL_FRAME, "{count:?}");
    assert!(mean(count.tx_bytes, count.tx_packets) <= FULL_FRAME, "{count:?}");
    host.stop().unwrap();
}

/// A file goes to the host and back; each side looks at what the other got.
fn files_arrive_as_they_were(vmm: Vmm) {
    let host = Host::new(1, &[]).unwrap();
    let listener = open::tcp_listener(&host.namespace, "192.0.2.1:7").unwrap();
    let echo = std::thread::spawn(move || -> std::io::Result<Vec<u8>> {
        use std::io::{Read, Write};
        let (mut connection, _) = listener.accept()?;
        let mut bytes = vec![0; 20 << 20];
        connection.read_exact(&mut bytes)?;
        connection.write_all(&bytes)?;
        Ok(bytes)
    });
    let script = UP.to_owned()
        + "
dd if=/dev/urandom of=/tmp/file bs=1M count=20
nc 192.0.2.1 7 </tmp/file >/tmp/copy
report bytes $(stat -c %s /tmp/copy)
cmp /tmp/file /tmp/copy
report checksum $(sha256sum </tmp/file | head -c 64)
";
    let report = host.guest(vmm, NetOptions::default()).script(script).run().unwrap().check().unwrap();
    assert_eq!(report.number("bytes").unwrap(), 20 << 20);
    let bytes = echo.join().unwrap().unwrap();
    let mut sum = std::process::Command::new("sha256sum");
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &bytes).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let sum = sum.stdin(file).output().unwrap();
    assert!(String::from_utf8_lossy(&sum.stdout).starts_with(report.value("checksum").unwrap()));
    host.stop().unwrap();
}

/// Checks that packets of `size` bytes fill one frame each, in both directions.
const JUMBO: &str = "
report mtu $(cat /sys/class/net/eth0/mtu)
ping -c 5 -s 8972 192.0.2.1
";

fn check_jumbo(vmm: Vmm, options: NetOptions, args: &[&str]) {
    let host = Host::new(1, &[&["--mtu", "9000"], args].concat()).unwrap();
    let packets = open::packet(&host.namespace, TAP).unwrap();
    let report = host.guest(vmm, options).script(UP.to_owned() + JUMBO).run().unwrap().check().unwrap();
    assert_eq!(report.number("mtu").unwrap(), 9000);
    for outgoing in [false, true] {
        let full = packets
            .find(Duration::from_secs(5), |passed| passed.outgoing == outgoing && passed.frame.len() == 9014);
        full.unwrap().unwrap_or_else(|| panic!("no full frame, outgoing: {outgoing}"));
    }
    host.stop().unwrap();
}

fn an_mtu_of_9000_is_used(vmm: Vmm) {
    let mtu = (vmm == Vmm::Qemu).then_some(9000);
    check_jumbo(vmm, NetOptions { mtu, ..NetOptions::default() }, &[]);
}

#[test]
fn an_mtu_of_9000_is_used_without_mergeable_buffers() {
    let options = NetOptions { mtu: Some(9000), device: ",mrg_rxbuf=off", ..NetOptions::default() };
    check_jumbo(Vmm::Qemu, options, &[]);
    check_jumbo(Vmm::Qemu, options, &["--offloads", "none"]);
}

/// Large frames without mergeable buffers: each of the guest's buffers holds 64 KiB.
#[test]
fn large_frames_arrive_in_large_buffers() {
    let host = Host::new(1, &[]).unwrap();
    let _server = host.iperf3().unwrap();
    let script = UP.to_owned() + "iperf3 --client 192.0.2.1 --bytes 64M --reverse\n";
    let options = NetOptions { device: ",mrg_rxbuf=off", ..NetOptions::default() };
    host.guest(Vmm::Qemu, options).program("iperf3").script(script).run().unwrap().check().unwrap();
    let count = host.namespace.counters(TAP).unwrap();
    assert!(
        count.tx_bytes > 64 << 20 && mean(count.tx_bytes, count.tx_packets) > 2 * FULL_FRAME,
        "{count:?}"
    );
    host.stop().unwrap();
}

/// The driver of a legacy device, whose header is shorter.
#[test]
fn a_legacy_driver_is_served() {
    for device in
        [",disable-modern=on,disable-legacy=off", ",disable-modern=on,disable-legacy=off,mrg_rxbuf=off"]
    {
        let host = Host::new(1, &[]).unwrap();
        let _server = host.iperf3().unwrap();
        let script = UP.to_owned()
            + "iperf3 --client 192.0.2.1 --bytes 16M\niperf3 --client 192.0.2.1 --bytes 16M --reverse\n";
        let options = NetOptions { device, ..NetOptions::default() };
        host.guest(Vmm::Qemu, options).program("iperf3").script(script).run().unwrap().check().unwrap();
        host.stop().unwrap();
    }
}

/// How often each queue of a guest was heard of: interrupts of the two for receiving, kicks of the two for sending.
fn queues(report: &Report) -> Vec<u64> {
    let interrupts = |name: &str| -> u64 {
        let text = report.value("interrupts").unwrap();
        let line = text.lines().find(|line| line.trim_end().ends_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
        line.split_whitespace().skip(1).map_while(|count| count.parse::<u64>().ok()).sum()
    };
    let kicks = |name: &str| -> u64 {
        let text = report.value("statistics").unwrap();
        let count = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "));
        count.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    };
    vec![interrupts("-input.0"), interrupts("-input.1"), kicks("tx0_kicks"), kicks("tx1_kicks")]
}

#[test]
fn two_pairs_of_queues_are_used() {
    let host = Host::new(2, &[]).unwrap();
    let _server = host.iperf3().unwrap();
    let script = UP.to_owned()
        + "
report pairs \"$(ethtool -l eth0 | tail -n 2)\"
iperf3 --client 192.0.2.1 --bytes 64M --parallel 8
iperf3 --client 192.0.2.1 --bytes 64M --parallel 8 --reverse
report statistics \"$(ethtool -S eth0)\"
report interrupts \"$(cat /proc/interrupts)\"
# Back to one, and to two again, while it runs.
ethtool -L eth0 combined 1
wait_ping 192.0.2.1
iperf3 --client 192.0.2.1 --bytes 8M --parallel 4 --reverse
ethtool -L eth0 combined 2
wait_ping 192.0.2.1
iperf3 --client 192.0.2.1 --bytes 8M --parallel 4 --reverse
";
    let options = NetOptions { queue_pairs: 2, ..NetOptions::default() };
    let guest = host.guest(Vmm::Qemu, options).cpus(2).program("iperf3").program("ethtool").script(script);
    let report = guest.run().unwrap().check().unwrap();
    assert!(report.value("pairs").unwrap().contains("Combined:\t2"), "{report:?}");
    let queues = queues(&report);
    assert!(queues.iter().all(|&count| count > 10), "{queues:?}");
    host.stop().unwrap();
}

/// Two guests with a VLAN of their own, their taps on a bridge; the host need not know VLANs.
fn a_vlan_passes(vmm: Vmm) {
    let namespace = Namespace::new().unwrap();
    namespace.ip("link add dev bridge0 type bridge").unwrap();
    namespace.ip("link set bridge0 up").unwrap();
    let daemon = |tap: &str| {
        namespace.add_tap(tap, 1).unwrap();
        namespace.ip(&format!("link set {tap} up master bridge0")).unwrap();
        net_daemon().inside(&namespace.root()).args(["--tap", tap]).start().unwrap()
    };
    let (first, second) = (daemon("tap1"), daemon("tap2"));
    let up = |number: u8| {
        format!(
            "
net_up eth0
ip link add link eth0 name eth0.5 type vlan id 5
net_up eth0.5 198.51.100.{number}/24
"
        )
    };
    let guest = |vmm, daemon: &Daemon, script: String| {
        let guest = Guest::new(vmm).net(daemon.socket(), NetOptions::default());
        guest
            .module("8021q")
            .program("iperf3")
            .timeout(Duration::from_secs(240))
            .script(script)
            .spawn()
            .unwrap()
    };
    let mut server = guest(
        Vmm::Uml,
        &first,
        up(1) + "announce up\niperf3 --server --one-off\niperf3 --server --one-off\n",
    );
    server.wait_for("up", STEP).unwrap();
    let script = up(2)
        + "
wait_ping 198.51.100.1
iperf3 --client 198.51.100.1 --bytes 8M
# The server starts again.
until iperf3 --client 198.51.100.1 --bytes 8M --reverse; do sleep 0.2; done
";
    guest(vmm, &second, script).wait().unwrap().check().unwrap();
    server.wait().unwrap().check().unwrap();
    let count = namespace.counters("tap2").unwrap();
    assert!(count.rx_bytes > 8 << 20 && count.tx_bytes > 8 << 20, "{count:?}");
}

/// User Mode Linux asks the daemon; QEMU answers such questions itself.
#[test]
fn a_guest_learns_of_its_address_and_of_the_link() {
    let host = Host::new(1, &["--mac", "52:54:00:aa:bb:cc"]).unwrap();
    let script = "
net_up eth0
report address $(cat /sys/class/net/eth0/address)
wait_carrier() { until [ \"$(cat /sys/class/net/eth0/carrier)\" = $1 ]; do sleep 0.1; done; }
wait_carrier 1
announce up
wait_carrier 0
announce down
wait_carrier 1
";
    let mut guest = host.guest(Vmm::Uml, NetOptions::default()).script(script).spawn().unwrap();
    guest.wait_for("up", STEP).unwrap();
    host.namespace.ip(&format!("link set {TAP} down")).unwrap();
    guest.wait_for("down", STEP).unwrap();
    host.namespace.ip(&format!("link set {TAP} up")).unwrap();
    let report = guest.wait().unwrap().check().unwrap();
    assert_eq!(report.value("address").unwrap(), "52:54:00:aa:bb:cc");
    host.stop().unwrap();
}

#[test]
fn the_guests_address_is_the_one_that_qemu_gives_it() {
    let host = Host::new(1, &[]).unwrap();
    let packets = open::packet(&host.namespace, TAP).unwrap();
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    let options = NetOptions { mac: Some(mac), ..NetOptions::default() };
    host.guest(Vmm::Qemu, options).script(UP).run().unwrap().check().unwrap();
    let request = packets.find(STOP, |passed| !passed.outgoing && passed.frame.starts_with(&BROADCAST));
    let request = request.unwrap().expect("the guest asks for the host's address");
    assert_eq!(request.frame[6..12], mac);
    host.stop().unwrap();
}

tests::for_both_guests!(
    data_passes_both_ways_in_large_frames,
    data_passes_without_offloads,
    files_arrive_as_they_were,
    an_mtu_of_9000_is_used,
    a_vlan_passes,
);
