//! Locks between two guests and the host, which share a directory by two daemons.
use std::io::Write;
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use tests::guest::{Guest, Running, Vmm};
use tests::process::Process;
use tests::provision;
use tests::share::{Server, Share, default_model};

const LIMIT: Duration = Duration::from_secs(300);
const STEP: Duration = Duration::from_secs(120);
const AGENT: &str = include_str!("agent.py");

/// Somebody who locks a file.
trait Agent {
    fn tell(&mut self, line: &str);
    fn expect(&mut self, text: &str);

    /// Sends an action under a name that was not used yet, and expects its outcome.
    fn act(&mut self, name: &str, action: &str, outcome: &str) {
        self.tell(&format!("{name} {action}"));
        self.expect(&format!("{name} {outcome}"));
    }
}

impl Agent for Running {
    fn tell(&mut self, line: &str) {
        self.send(line).unwrap();
    }

    fn expect(&mut self, text: &str) {
        self.wait_for(text, STEP).unwrap();
    }
}

/// A process of the host.
struct OnHost {
    process: Process,
    input: ChildStdin,
}

impl OnHost {
    fn new(share: &Share) -> Self {
        let root = provision::debian().unwrap().folder;
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 3>&1", "sh"]).arg(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg(root.join("usr/bin/python3"));
        command.env("PYTHONHOME", root.join("usr")).args(["-B", "-c", AGENT]).arg(share.path().join("file"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::spawn(command).unwrap();
        let input = process.take_stdin().unwrap();
        let mut agent = Self { process, input };
        agent.expect("ready");
        agent
    }
}

impl Agent for OnHost {
    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    fn expect(&mut self, text: &str) {
        let mark = format!("announce {text}\x1e");
        let look = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(&mark).then_some(());
        let found = self.process.stdout().wait_until(Instant::now() + STEP, look);
        found.unwrap_or_else(|| {
            panic!(
                "no {text:?} on the host: {}{}",
                self.process.stdout().text(),
                self.process.stderr().text()
            )
        });
    }
}

fn in_guest(share: &Share) -> Running {
    let script = "
share_up locks none
debian_up /mnt
cp /agent.py /debian/tmp
debian python3 -B /tmp/agent.py /mnt/file
";
    share
        .attach(Guest::new(Vmm::Qemu).timeout(LIMIT))
        .debian()
        .file("agent.py", AGENT)
        .script(script)
        .spawn()
        .unwrap()
}

#[test]
fn guests_and_host_respect_each_others_locks() {
    let first = Share::new("locks").unwrap();
    if Server::of_environment().unwrap() == Server::Qemu {
        // It says yes to everybody.
        return;
    }
    let second = Share::of(first.path(), "locks", default_model(), &[] as &[&str]).unwrap();
    std::fs::write(first.path().join("file"), [0; 100]).unwrap();
    let (mut one, mut two) = (in_guest(&first), in_guest(&second));
    let mut host = OnHost::new(&first);
    one.expect("ready");
    two.expect("ready");

    // Parts of a file, by fcntl.
    one.act("a", "try write 10 10", "got");
    two.act("b", "try write 15 1", "refused");
    host.act("c", "try read 19 5", "refused");
    two.act("d", "try write 20 10", "got");
    host.act("e", "try write 25 1", "refused");
    host.act("f", "try read 0 10", "got");
    one.act("g", "try read 0 5", "got");
    two.act("h", "try write 0 1", "refused");

    // Waiting: for a guest, and for the host.
    two.tell("i wait write 10 10");
    one.act("j", "try free 10 10", "got");
    two.expect("i got");
    two.tell("k wait write 5 5");
    host.act("l", "try free 0 10", "got");
    two.expect("k got");
    host.tell("m wait write 20 10");
    two.act("n", "try free 0 100", "got");
    host.expect("m got");

    // A guest that goes away lets go.
    one.act("o", "try write 50 10", "got");
    two.act("p", "try write 50 1", "refused");
    one.kill();
    two.act("q", "wait write 50 1", "got");
    two.tell("r end");
    two.wait().unwrap().check().unwrap();
    drop(host);
    first.stop().unwrap();
    second.stop().unwrap();
}

#[test]
fn a_lock_belongs_to_whom_the_guest_says() {
    let share = Share::new("locks").unwrap();
    if Server::of_environment().unwrap() == Server::Qemu {
        // It says yes to everybody.
        return;
    }
    std::fs::write(share.path().join("file"), [0; 100]).unwrap();
    let mut guest = in_guest(&share);
    let mut host = OnHost::new(&share);
    guest.expect("ready");

    // flock(2), however the file is open.
    guest.act("a", "reader write", "got");
    host.act("b", "try read 50 1", "refused");
    // Whatever else the process, or a child, closes.
    guest.act("c", "look", "got");
    host.act("d", "try read 50 1", "refused");
    guest.act("e", "inherit", "got");
    host.act("f", "try read 50 1", "refused");
    guest.act("g", "reader free", "got");
    host.act("h", "try write 50 1", "got");
    guest.act("i", "writer read", "refused");
    host.act("j", "try free 0 0", "got");
    // Two files of a process share.
    guest.act("k", "writer read", "got");
    guest.act("l", "reader read", "got");
    guest.act("m", "writer free", "got");
    host.act("n", "try write 50 1", "refused");
    guest.act("o", "reader free", "got");
    host.act("p", "try write 50 1", "got");
    host.act("q", "try free 0 0", "got");

    // fcntl(2): the process is not in its own way, and gives up through one file what it has taken through another.
    guest.act("r", "try write 0 10", "got");
    guest.act("s", "other write 5 10", "got");
    host.act("t", "try write 14 1", "refused");
    guest.act("u", "other free 0 15", "got");
    host.act("v", "try write 0 15", "got");
    guest.tell("w end");
    guest.wait().unwrap().check().unwrap();
    drop(host);
    share.stop().unwrap();
}
