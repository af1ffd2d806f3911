//! A guest reaches the outside through passt: daemon and passt belong to an ordinary user without any capability.
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tests::daemon::{Daemon, is_listening};
use tests::driver::lan::net_daemon;
use tests::guest::{Guest, NetOptions, Vmm};
use tests::netns::{Namespace, open};
use tests::process::Process;
use tests::provision;

const STEP: Duration = Duration::from_secs(120);
/// The server of the outside.
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// Somewhere with a way out, and the outside.
struct Outside {
    /// Where passt and the daemon are.
    inside: Namespace,
    /// Where the servers are.
    world: Namespace,
    folder: TempDir,
}

impl Outside {
    fn new() -> Result<Self> {
        let inside = Namespace::new()?;
        let outside = inside.neighbour()?;
        inside.add_veth("out0", &outside, "in0")?;
        inside.ip("address add 198.51.100.2/24 dev out0")?;
        inside.ip("route add default via 198.51.100.1")?;
        outside.ip("address add 198.51.100.1/24 dev in0")?;
        Ok(Self { inside, world: outside, folder: TempDir::with_prefix("passt-")? })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("passt")
    }

    /// Starts passt, and waits until it listens.
    fn passt(&self) -> Result<Process> {
        let socket = self.socket();
        let mut command = provision::program("passt")?.command();
        command.args(["--foreground", "--socket"]).arg(&socket).args(["--dns", &SERVER.to_string()]);
        // The gateway is the gateway, not the host. And a port of the inside that leads to the guest.
        command.args(["--no-map-gw", "--tcp-ports", "7000"]);
        let mut command = self.inside.ordinary_user().wrap(&command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut passt = Process::spawn(command)?;
        let deadline = Instant::now() + STEP;
        while !is_listening(passt.pid(), &socket) {
            ensure!(
                passt.wait(Duration::from_millis(10))?.is_none() && Instant::now() < deadline,
                "passt does not listen: {}",
                passt.stderr().text()
            );
        }
        Ok(passt)
    }

    fn daemon(&self) -> Result<Daemon> {
        net_daemon().inside(&self.inside.ordinary_user()).arg("--stream").arg(self.socket()).start()
    }

    /// A server that answers questions for any name with [`SERVER`].
    fn serve_names(&self) -> Result<()> {
        let socket = open::udp_socket(&self.world, "198.51.100.1:53")?;
        std::thread::spawn(move || answer_names(&socket));
        Ok(())
    }

    fn listen(&self) -> Result<TcpListener> {
        open::tcp_listener(&self.world, "198.51.100.1:7")
    }
}

/// Answers until the socket fails, which it does not.
fn answer_names(socket: &UdpSocket) {
    let mut buffer = [0; 512];
    while let Ok((len, from)) = socket.recv_from(&mut buffer) {
        if let Some(answer) = answer_of(&buffer[..len]) {
            // Who does not get it asks again.
            let _ = socket.send_to(&answer, from);
        }
    }
}

/// The answer to a question about one name (RFC 1035, section 4): an address for type A, nothing for others.
fn answer_of(query: &[u8]) -> Option<Vec<u8>> {
    const TYPE_A: [u8; 2] = [0, 1];
    let name = query.get(12..)?.iter().position(|&byte| byte == 0)? + 1;
    let question = query.get(12..12 + name + 4)?;
    let is_address = question[name..name + 2] == TYPE_A;
    let mut answer = query[..2].to_vec();
    // A response, recursion desired and available; one question, and an answer or none.
    answer.extend([0x81, 0x80, 0, 1, 0, is_address.into(), 0, 0, 0, 0]);
    answer.extend(question);
    if is_address {
        // The name as in the question, type A, class IN, one minute, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(SERVER.octets());
    }
    Some(answer)
}

/// A guest's way to its address.
const LEASE: &str = "
net_up eth0
udhcpc -i eth0 -n -q -f -t 10 -T 1 -s /dhcp.sh
report lease $(ip -4 address show dev eth0 | awk '/inet/ { print $2 }')
";

fn guest(vmm: Vmm, socket: &Path, script: &str) -> Guest {
    Guest::new(vmm)
        .net(socket, NetOptions::default())
        .file("dhcp.sh", include_str!("net_passt/dhcp.sh"))
        .file("etc/resolv.conf", "")
        .timeout(Duration::from_secs(240))
        .script(LEASE.to_owned() + script)
}

/// What a guest sends; it gets it back.
fn echo(listener: &TcpListener) -> std::io::Result<usize> {
    let (mut connection, _) = listener.accept()?;
    let mut bytes = vec![0; 2 << 20];
    connection.read_exact(&mut bytes)?;
    connection.write_all(&bytes)?;
    Ok(bytes.len())
}

fn a_guest_reaches_the_outside(vmm: Vmm) {
    let outside = Outside::new().unwrap();
    outside.serve_names().unwrap();
    let listener = outside.listen().unwrap();
    let _passt = outside.passt().unwrap();
    let mut daemon = outside.daemon().unwrap();
    let script = "
nslookup -type=a server.example >/tmp/answer
report address $(awk '/^Address/ { print $NF }' /tmp/answer | tail -n 1)
dd if=/dev/urandom of=/tmp/file bs=1M count=2
nc server.example 7 </tmp/file >/tmp/copy
cmp /tmp/file /tmp/copy
announce listening
nc -l -p 7000 >/tmp/word
report word $(cat /tmp/word)
";
    let mut guest = guest(vmm, daemon.socket(), script).spawn().unwrap();
    let echo = std::thread::spawn(move || echo(&listener));
    guest.wait_for("listening", STEP).unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.stderr()));
    assert_eq!(echo.join().unwrap().unwrap(), 2 << 20);
    // The other way: passt accepts at once, and resets what the guest does not accept yet.
    let deadline = Instant::now() + STEP;
    while !guest.values().contains_key("word") && Instant::now() < deadline {
        let connection = open::tcp_connection(&outside.world, "198.51.100.2:7000").context("passt listens");
        // Reset, and tried again.
        let _ = connection.unwrap().write_all(b"hello");
        std::thread::sleep(Duration::from_millis(200));
    }
    let report = guest.wait().unwrap().check().unwrap();
    assert_eq!(report.value("lease").unwrap(), "198.51.100.2/24");
    assert_eq!(report.value("address").unwrap(), SERVER.to_string());
    assert_eq!(report.value("word").unwrap(), "hello");
    assert!(daemon.terminate(STEP).unwrap().success());
}

/// passt goes away and comes back, and so does the guest's link.
#[test]
fn a_guest_outlives_passt() {
    let outside = Outside::new().unwrap();
    let listener = outside.listen().unwrap();
    let mut daemon = outside.daemon().unwrap();
    let mut passt = outside.passt().unwrap();
    let script = "
wait_carrier() { until [ \"$(cat /sys/class/net/eth0/carrier)\" = $1 ]; do sleep 0.1; done; }
announce leased
wait_carrier 0
announce down
wait_carrier 1
dd if=/dev/urandom of=/tmp/file bs=1M count=2
until nc 198.51.100.1 7 </tmp/file >/tmp/copy; do sleep 0.2; done
cmp /tmp/file /tmp/copy
";
    let mut guest = guest(Vmm::Uml, daemon.socket(), script).spawn().unwrap();
    guest.wait_for("leased", STEP).unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.stderr()));
    passt.kill();
    guest.wait_for("down", STEP).unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.stderr()));
    let _successor = outside.passt().unwrap();
    let echo = std::thread::spawn(move || echo(&listener));
    guest.wait().unwrap().check().unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.stderr()));
    assert_eq!(echo.join().unwrap().unwrap(), 2 << 20);
    assert!(daemon.terminate(STEP).unwrap().success());
}

tests::for_both_guests!(a_guest_reaches_the_outside);
