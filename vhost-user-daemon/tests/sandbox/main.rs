//! What can and cannot be reached from inside a sandbox.
//!
//! Entering takes a process of one thread, and cannot be undone. So each test starts this program again, as root or as
//! an ordinary user, to enter a sandbox and to try (`inside.rs`), while the test plays the host.

mod inside;
mod sys;

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;
use vhost_user_daemon::control::Client;

/// `nobody`: whoever has no privileges.
const ORDINARY: u32 = 65534;

/// How long the host waits for what happens inside.
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    /// Of the host or, where the tests do not run as root, of a user namespace.
    Root,
    Ordinary,
}

fn main() -> ExitCode {
    if let Ok(case) = env::var("TEST_INSIDE") {
        inside::run(&case);
        return ExitCode::SUCCESS;
    }
    if env::var_os("TEST_MOUNTS").is_some() {
        mounts_of_the_host_come_and_go();
        return ExitCode::SUCCESS;
    }
    let mut trials = Vec::new();
    for user in [User::Root, User::Ordinary] {
        let mut add = |name: &str, test: fn(User, &'static str), choices: &[&'static str]| {
            for &choice in choices {
                let test = move || {
                    test(user, choice);
                    Ok(())
                };
                trials.push(Trial::test(format!("{user:?}::{name}::{choice}").to_lowercase(), test));
            }
        };
        add("only_the_directories_are_reached", files, &["namespace", "landlock"]);
        add("a_directory_that_was_moved_out_is_no_way_out", moved, &["namespace", "landlock"]);
        add("attacks_are_refused", attacks, &["namespace", "landlock", "auto"]);
        add("a_listening_socket_is_removed_in_the_end", listening, &["namespace", "landlock", "none"]);
        add("a_control_socket_is_for_its_user_and_root", control, &["namespace", "landlock", "none"]);
        add("a_killed_daemon_leaves_its_place_to_the_next", killed, &["namespace", "landlock"]);
        add("a_client_connects_again", client, &["namespace", "landlock", "none"]);
        add("a_device_is_served", serving, &["namespace", "landlock", "none"]);
        add("refusals_say_what_to_do", refusals, &["auto"]);
        add("auto_takes_what_there_is", fallback, &["auto"]);
        add("owners_and_capabilities_are_kept", owners, &["auto"]);
    }
    trials.push(Trial::test("mounts_of_the_host_come_and_go", || {
        let mut command = Command::new("unshare");
        if !geteuid().is_root() {
            command.arg("--map-root-user");
        }
        command.args(["--mount", "--propagation", "shared", "--"]);
        let status = command.arg(env::current_exe()?).env("TEST_MOUNTS", "1").status()?;
        if status.success() { Ok(()) } else { Err(status.to_string().into()) }
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Files of a host, and a process in its sandbox.
struct Host {
    user: User,
    choice: &'static str,
    directory: TempDir,
}

impl Host {
    /// `share/file`, `share/sub/inner`, `read-only/file`, and a secret that is outside.
    fn new(user: User, choice: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let host = Self { user, choice, directory };
        for name in ["", "run", "share", "share/sub", "read-only", "outside"] {
            let path = host.path(name);
            fs::create_dir_all(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        for name in ["share/file", "share/sub/inner", "read-only/file", "outside/secret"] {
            fs::write(host.path(name), name).unwrap();
        }
        symlink("../outside/secret", host.path("share/link")).unwrap();
        symlink("file", host.path("share/inner-link")).unwrap();
        fs::copy("/bin/true", host.path("share/program")).unwrap();
        if user == User::Ordinary && geteuid().is_root() {
            for entry in ["", "share", "share/sub", "read-only", "outside"] {
                let path = host.path(entry);
                chown(&path, Some(ORDINARY), Some(ORDINARY)).unwrap();
                for entry in fs::read_dir(&path).unwrap().map(Result::unwrap) {
                    std::os::unix::fs::lchown(entry.path(), Some(ORDINARY), Some(ORDINARY)).unwrap();
                }
            }
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs `case` of `inside.rs`.
    fn start(&self, case: &str) -> Inside {
        let program = if self.user == User::Root && !geteuid().is_root() {
            let mut command = Command::new("unshare");
            command.args(["--map-root-user", "--"]).arg(env::current_exe().unwrap());
            command
        } else {
            // The user need not have access to the directory of the program.
            let mut command = Command::new("/proc/self/exe");
            if self.user == User::Ordinary && geteuid().is_root() {
                command.uid(ORDINARY).gid(ORDINARY);
            }
            command
        };
        self.start_command(program, case)
    }

    fn start_command(&self, mut command: Command, case: &str) -> Inside {
        if self.path("notify").exists() {
            command.env("NOTIFY_SOCKET", self.path("notify"));
        }
        command
            .env("TEST_INSIDE", case)
            .env("TEST_BASE", self.directory.path())
            .env("TEST_CHOICE", self.choice)
            .env_remove("RUST_BACKTRACE")
            .current_dir(self.directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Inside { child, stdout }
    }
}

/// A process in its sandbox.
struct Inside {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Inside {
    /// Waits until it says so.
    fn wait_for(&mut self, line: &str) {
        let mut said = String::new();
        self.stdout.read_line(&mut said).unwrap();
        if said.trim() != line {
            let mut log = String::new();
            self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
            panic!("{said:?} instead of {line:?}: {log}");
        }
    }

    /// Lets it go on.
    fn go_on(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    /// Waits until it has ended well, and returns its log.
    #[track_caller]
    fn finish(mut self) -> String {
        drop(self.child.stdin.take());
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {log}");
        log
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // Nothing to do if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn files(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    host.start("files").finish();
    assert_eq!(fs::read_to_string(host.path("outside/secret")).unwrap(), "outside/secret");
    assert_eq!(fs::read_to_string(host.path("read-only/file")).unwrap(), "read-only/file");
    assert_eq!(fs::read_to_string(host.path("share/sub/moved")).unwrap(), "written", "{choice}");
    assert_eq!(fs::metadata(host.path("share/file")).unwrap().permissions().mode() & 0o7777, 0o4711);
}

fn moved(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    let mut inside = host.start("moved");
    inside.wait_for("open");
    fs::rename(host.path("share/sub"), host.path("outside/sub")).unwrap();
    inside.go_on();
    inside.finish();
}

fn attacks(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    host.start("attacks").finish();
}

fn listening(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    let mut inside = host.start("listening");
    inside.wait_for("listening");
    drop(UnixStream::connect(host.path("socket")).unwrap());
    inside.wait_for("accepted");
    assert!(host.path("socket.lock").exists());
    inside.go_on();
    inside.finish();
    for name in ["socket", "socket.lock"] {
        assert!(!host.path(name).exists(), "{name}");
    }
}

fn control(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    let mut inside = host.start("control");
    inside.wait_for("listening");
    let path = host.path("socket");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let answer: String = Client::new(&path).get("/").unwrap();
    assert_eq!(answer, "well");
    let hides_root = user == User::Ordinary && choice == "namespace";
    if geteuid().is_root() && !hides_root {
        // Even if the mode lets everybody in.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let mut stranger = Command::new("/proc/self/exe");
        stranger.uid(ORDINARY - 1).gid(ORDINARY - 1);
        host.start_command(stranger, "stranger").finish();
    }
    inside.go_on();
    let log = inside.finish();
    assert_eq!(log.contains("Refused process"), geteuid().is_root() && !hides_root, "{log}");
    for name in ["socket", "socket.lock"] {
        assert!(!host.path(name).exists(), "{name}");
    }
}

fn killed(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    let mut inside = host.start("listening");
    inside.wait_for("listening");
    inside.child.kill().unwrap();
    inside.child.wait().unwrap();
    // At once.
    let mut next = host.start("listening");
    next.wait_for("listening");
    // Whoever else has it open has ended, too.
    inside.child.stderr.take().unwrap().read_to_string(&mut String::new()).unwrap();
    drop(UnixStream::connect(host.path("socket")).unwrap());
    next.wait_for("accepted");
    next.go_on();
    next.finish();
    assert!(!host.path("socket").exists() && !host.path("socket.lock").exists());
}

fn client(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    let mut inside = host.start("client");
    inside.wait_for("nobody");
    for _ in 0..2 {
        // The directory is made anew, as service managers do it for each start.
        fs::remove_dir_all(host.path("run")).unwrap();
        fs::create_dir(host.path("run")).unwrap();
        let path = host.path("run/socket");
        let listener = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        inside.go_on();
        let mut fds = [PollFd::new(&listener, PollFlags::IN)];
        let limit = Timespec::try_from(LIMIT).unwrap();
        assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "nobody connects");
        listener.accept().unwrap();
        inside.wait_for("connected");
    }
    inside.finish();
}

fn serving(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    let path = host.path("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    let expect = |state: &str| {
        let mut buffer = [0; 100];
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(std::str::from_utf8(&buffer[..length]).unwrap().trim(), state);
    };
    let mut inside = host.start("serving");
    inside.wait_for("entered");
    // The name is not looked up any more.
    fs::remove_file(path).unwrap();
    expect("READY=1");
    for _ in 0..2 {
        let front_end = vhost::vhost_user::Frontend::connect(host.path("socket"), 1).unwrap();
        assert_eq!(vhost::VhostBackend::get_features(&front_end).unwrap() & 1 << 32, 1 << 32);
        vhost::VhostBackend::set_owner(&front_end).unwrap();
    }
    kill_process(Pid::from_child(&inside.child), Signal::TERM).unwrap();
    expect("STOPPING=1");
    let log = inside.finish();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    assert!(!host.path("socket").exists());
}

fn refusals(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    host.start("refusals").finish();
}

fn fallback(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    let log = host.start("without-namespaces").finish();
    assert!(!log.contains("WARN"), "{log}");
    assert!(log.contains("INFO") && log.contains("Sandbox: Landlock"), "{log}");
    let log = host.start("without-anything").finish();
    assert_eq!(log.matches("WARN").count(), 1, "{log}");
    assert!(log.contains("There is no sandbox") && log.contains("Sandbox: none"), "{log}");
}

fn owners(user: User, choice: &'static str) {
    let host = Host::new(user, choice);
    host.start("owners").finish();
}

/// In a mount namespace of its own, as its root.
fn mounts_of_the_host_come_and_go() {
    let host = Host::new(User::Root, "namespace");
    let mount = |arguments: &[&str]| {
        let place = host.path("share/sub");
        let status = Command::new(arguments[0]).args(&arguments[1..]).arg(place).status().unwrap();
        assert!(status.success());
    };
    let mut inside = host.start_command(Command::new("/proc/self/exe"), "mounts");
    inside.wait_for("entered");
    mount(&["mount", "-t", "tmpfs", "test"]);
    fs::write(host.path("share/sub/new"), "").unwrap();
    inside.go_on();
    inside.wait_for("mounted");
    mount(&["umount"]);
    inside.go_on();
    inside.finish();
}
