//! Network namespaces of the tests' own: nothing here touches the host's network, and nothing is left of it when a
//! test ends, however it ends. An ordinary user can make them as well as root.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use tests::netns::Namespace;
//!
//! let namespace = Namespace::new()?;
//! namespace.add_tap("tap0", 1)?;
//! namespace.ip("address add 192.0.2.1/24 dev tap0")?;
//! namespace.ip("link set tap0 up")?;
//! # Ok(())
//! # }
//! ```
//!
//! A [`Namespace`] is a user, a network and a mount namespace, in which the caller is root. Programs enter it by an
//! [`Entry`]: as its root, or as an ordinary user without any capability. What a test itself wants to do inside, it
//! does with file descriptors that were opened there ([`open`]): a tap, a packet socket, a TCP listener.
pub mod open;
pub mod packet;
mod sys;

use std::ffi::{OsStr, OsString};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::process::{self, Process};
use crate::provision;

/// A new namespace is ready within milliseconds; a loaded machine may take far longer to start anything.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Longest run of a small tool such as `ip`.
const TOOL_LIMIT: Duration = Duration::from_secs(60);
/// The device that taps are made through.
const TUN: &str = "/dev/net/tun";

/// What the process that holds a namespace does: `/sys` and `/run` are made to match it, and then it waits for the
/// end of its input, which comes when the test drops it or is killed. Some containers forbid to mount a sysfs;
/// only device nodes of macvtaps would be missed.
const HOLD: &str =
    "mount -t sysfs sys /sys 2>/dev/null || true; mount -t tmpfs run /run && echo ready && exec cat";

/// A namespace. It ends with the last process inside, and those end with the test.
#[derive(Debug)]
pub struct Namespace {
    holder: Process,
}

impl Namespace {
    /// Makes one, in which only the loopback interface exists, and is up.
    pub fn new() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "--mount", "--propagation", "private", "--"]);
        Self::hold(command)
    }

    /// Makes another one that [`Namespace::add_veth`] can connect to this one: both belong to the same root.
    pub fn neighbour(&self) -> Result<Self> {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "--mount", "--propagation", "private", "--"]);
        Self::hold(self.root().wrap(&unshare))
    }

    /// Starts the process that holds a namespace, by a command that makes one for the program behind it.
    fn hold(mut command: Command) -> Result<Self> {
        command.args(["sh", "-c", HOLD]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let holder = Process::spawn(command).context("Cannot start unshare (package util-linux)")?;
        let ready = |bytes: &[u8]| bytes.starts_with(b"ready\n").then_some(());
        holder.stdout().wait_until(Instant::now() + START_LIMIT, ready).with_context(|| {
            format!(
                "Cannot make a namespace: {}. The tests need user namespaces; where they are switched off, \
                 `sysctl user.max_user_namespaces=10000`, `kernel.unprivileged_userns_clone=1` or \
                 `kernel.apparmor_restrict_unprivileged_userns=0` brings them back",
                holder.stderr().text().trim()
            )
        })?;
        let namespace = Self { holder };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// How programs enter it as its root.
    pub fn root(&self) -> Entry {
        let pid = self.holder.pid();
        Entry::default()
            .then(["nsenter", "--target", &pid.to_string(), "--user", "--preserve-credentials"])
            .then(["--net", "--mount", "--"])
            .then(END_WITH_PARENT)
    }

    /// How programs enter it as an ordinary user: user 1000, who has no capability, neither in this namespace nor
    /// in any other, and no way to get one.
    ///
    /// On the host that user is whoever runs the tests, and may open what they may.
    pub fn ordinary_user(&self) -> Entry {
        let pid = self.holder.pid();
        Entry::default()
            .then(["nsenter", "--target", &pid.to_string(), "--user", "--preserve-credentials"])
            .then(["--net", "--mount", "--"])
            // The capabilities of a new user namespace's maker are lost when anybody but root starts a program.
            .then(["unshare", "--user", "--map-user=1000", "--map-group=1000", "--"])
            .then(["setpriv", "--no-new-privs", "--"])
            .then(END_WITH_PARENT)
    }

    /// How programs enter its network alone, with all the rights on the host's files that whoever runs the tests has.
    /// Only root can.
    pub fn network(&self) -> Entry {
        let pid = self.holder.pid();
        Entry::default().then(["nsenter", "--target", &pid.to_string(), "--net", "--"]).then(END_WITH_PARENT)
    }

    /// A command that runs `program` of the host inside, as root.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.root().wrap(&Command::new(program))
    }

    /// A command that runs a program of [`provision::program`] inside, as root.
    pub fn program(&self, name: &str) -> Result<Command> {
        Ok(self.root().wrap(&provision::program(name)?.command()))
    }

    /// Runs a program of [`provision::program`] inside, as root, and returns its output. The arguments are separated
    /// by spaces.
    pub fn run(&self, name: &str, args: &str) -> Result<String> {
        let mut command = self.program(name)?;
        command.args(args.split_whitespace());
        let output =
            process::run(command, TOOL_LIMIT).with_context(|| format!("Cannot run {name} {args}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs iproute2's `ip` with these arguments, separated by spaces, and returns its output.
    pub fn ip(&self, args: &str) -> Result<String> {
        self.run("ip", args)
    }

    /// Writes a setting below `/proc/sys`, such as `net.ipv4.ip_forward`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let mut command = self.command("sh");
        command.args(["-c", "printf %s \"$1\" >\"$2\"", "sh", value, &path]);
        process::run(command, TOOL_LIMIT).with_context(|| format!("Cannot set {name} to {value:?}"))?;
        Ok(())
    }

    /// Makes a persistent tap with virtio-net headers, which is down. More queues than one make it a multi-queue tap.
    pub fn add_tap(&self, name: &str, queues: u16) -> Result<()> {
        check_tun()?;
        let multi_queue = if queues > 1 { "multi_queue" } else { "" };
        self.ip(&format!("tuntap add dev {name} mode tap vnet_hdr {multi_queue}"))?;
        Ok(())
    }

    /// Makes a pair of interfaces that are each other's far end, the second one in a [`Namespace::neighbour`]; both are
    /// up.
    pub fn add_veth(&self, name: &str, other: &Self, other_name: &str) -> Result<()> {
        let pid = other.holder.pid();
        self.ip(&format!("link add dev {name} type veth peer name {other_name} netns {pid}"))?;
        self.ip(&format!("link set dev {name} up"))?;
        other.ip(&format!("link set dev {other_name} up"))?;
        Ok(())
    }

    /// What has passed through an interface so far.
    pub fn counters(&self, interface: &str) -> Result<Counters> {
        let text = self.ip(&format!("-json -statistics link show dev {interface}"))?;
        Counters::parse(&text).with_context(|| format!("Cannot understand ip's statistics: {text}"))
    }

    /// Whether an interface has a carrier; the interface must be up.
    pub fn has_carrier(&self, interface: &str) -> Result<bool> {
        let text = self.ip(&format!("link show dev {interface}"))?;
        ensure!(text.contains("UP"), "{interface} is down: {text}");
        Ok(!text.contains("NO-CARRIER"))
    }

    /// Waits until an interface has a carrier.
    pub fn wait_carrier(&self, interface: &str) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while !self.has_carrier(interface)? {
            ensure!(
                Instant::now() < deadline,
                "{interface} has no carrier after {} s",
                START_LIMIT.as_secs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// The kernel kills what is inside when the thread that started it ends.
const END_WITH_PARENT: [&str; 4] = ["setpriv", "--pdeathsig", "KILL", "--"];

/// The way into a namespace: the words before a program's command line. The last of them replaces itself by the
/// program, so that this has the process id that the caller gets. The caller's thread must outlive the program.
#[derive(Debug, Clone, Default)]
pub struct Entry {
    words: Vec<OsString>,
}

impl Entry {
    fn then<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.words.extend(words.into_iter().map(OsString::from));
        self
    }

    /// The same command inside. Only the program, its arguments and its environment are taken over.
    pub fn wrap(&self, command: &Command) -> Command {
        let mut words = self.words.iter().map(OsString::as_os_str).chain([command.get_program()]);
        let mut wrapped = Command::new(words.next().unwrap_or_default());
        wrapped.args(words).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        wrapped
    }
}

/// The counts of an interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames that the interface received (that a tap's owner wrote).
    pub rx_packets: u64,
    /// Bytes of these.
    pub rx_bytes: u64,
    /// Frames that it received and nobody wanted.
    pub rx_dropped: u64,
    /// Frames that it sent (that a tap's owner read).
    pub tx_packets: u64,
    /// Bytes of these.
    pub tx_bytes: u64,
    /// Frames that it could not send (that a tap's owner did not read).
    pub tx_dropped: u64,
}

impl Counters {
    fn parse(json: &str) -> Option<Self> {
        let value: serde_json::Value = serde_json::from_str(json).ok()?;
        let stats = &value[0]["stats64"];
        let field = |direction: &str, name: &str| stats[direction][name].as_u64();
        Some(Self {
            rx_packets: field("rx", "packets")?,
            rx_bytes: field("rx", "bytes")?,
            rx_dropped: field("rx", "dropped")?,
            tx_packets: field("tx", "packets")?,
            tx_bytes: field("tx", "bytes")?,
            tx_dropped: field("tx", "dropped")?,
        })
    }

    /// What has passed since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            rx_packets: self.rx_packets - earlier.rx_packets,
            rx_bytes: self.rx_bytes - earlier.rx_bytes,
            rx_dropped: self.rx_dropped - earlier.rx_dropped,
            tx_packets: self.tx_packets - earlier.tx_packets,
            tx_bytes: self.tx_bytes - earlier.tx_bytes,
            tx_dropped: self.tx_dropped - earlier.tx_dropped,
        }
    }
}

/// Says loudly why this user can have no tap on this host.
fn check_tun() -> Result<()> {
    std::fs::File::options().read(true).write(true).open(TUN).with_context(|| {
        format!(
            "Cannot open {TUN}, and tests of taps need it: `sudo modprobe tun && sudo chmod 0666 {TUN}` makes it \
             what it is on most distributions (a namespace's taps are then its owner's own), or run them as root"
        )
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(command: Command) -> String {
        String::from_utf8(process::run(command, TOOL_LIMIT).unwrap().stdout).unwrap()
    }

    #[test]
    fn only_a_loopback_is_inside() {
        let namespace = Namespace::new().unwrap();
        let links: serde_json::Value =
            serde_json::from_str(&namespace.ip("-json link show").unwrap()).unwrap();
        let names: Vec<&str> =
            links.as_array().unwrap().iter().filter_map(|link| link["ifname"].as_str()).collect();
        assert_eq!(names, ["lo"]);
        assert!(namespace.has_carrier("lo").unwrap());
    }

    #[test]
    fn two_namespaces_are_connected_by_a_pair() {
        let here = Namespace::new().unwrap();
        let there = here.neighbour().unwrap();
        here.add_veth("a", &there, "b").unwrap();
        here.ip("address add 192.0.2.1/24 dev a").unwrap();
        there.ip("address add 192.0.2.2/24 dev b").unwrap();
        here.wait_carrier("a").unwrap();
        let before = here.counters("a").unwrap();
        let listener = open::tcp_listener(&there, "192.0.2.2:7").unwrap();
        let _connection = open::tcp_connection(&here, "192.0.2.2:7").unwrap();
        listener.accept().unwrap();
        assert!(here.counters("a").unwrap().since(&before).tx_packets >= 2);
    }

    #[test]
    fn an_ordinary_user_can_do_nothing() {
        let namespace = Namespace::new().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "id -u; grep -E 'Cap(Inh|Prm|Eff|Amb)' /proc/self/status"]);
        let text = output(namespace.ordinary_user().wrap(&command));
        let (id, capabilities) = text.split_once('\n').unwrap();
        assert_eq!(id, "1000");
        assert_eq!(capabilities.lines().count(), 4);
        assert!(capabilities.lines().all(|line| line.ends_with("\t0000000000000000")), "{capabilities}");
        let mut command = provision::program("ip").unwrap().command();
        command.args(["link", "add", "x", "type", "bridge"]);
        let error =
            process::run(namespace.ordinary_user().wrap(&command), TOOL_LIMIT).unwrap_err().to_string();
        assert!(error.contains("not permitted"), "{error}");
    }

    /// Nobody but the test has the holder's input open, so a test that is killed ends it.
    #[test]
    fn a_namespace_ends_with_its_owner() {
        let mut namespace = Namespace::new().unwrap();
        drop(namespace.holder.take_stdin());
        assert!(namespace.holder.wait(START_LIMIT).unwrap().is_some());
    }

    #[test]
    fn a_program_inside_ends_with_the_thread_that_started_it() {
        let namespace = Namespace::new().unwrap();
        let mut program = std::thread::scope(|scope| {
            let start = || {
                let mut command = namespace.command("sh");
                command.args(["-c", "echo started; exec sleep 1000"]).stdout(Stdio::piped());
                let process = Process::spawn(command).unwrap();
                let ready = |bytes: &[u8]| (!bytes.is_empty()).then_some(());
                process.stdout().wait_until(Instant::now() + START_LIMIT, ready).unwrap();
                process
            };
            scope.spawn(start).join().unwrap()
        });
        let status = program.wait(START_LIMIT).unwrap().expect("it ended");
        assert_eq!(process::describe(status), "killed by signal 9");
    }

    #[test]
    fn what_passes_an_interface_is_counted() {
        let namespace = Namespace::new().unwrap();
        let before = namespace.counters("lo").unwrap();
        let socket = open::udp_socket(&namespace, "127.0.0.1:0").unwrap();
        socket.send_to(&[0; 100], socket.local_addr().unwrap()).unwrap();
        let passed = namespace.counters("lo").unwrap().since(&before);
        assert_eq!((passed.tx_packets, passed.rx_packets, passed.rx_bytes), (1, 1, 128));
    }
}
