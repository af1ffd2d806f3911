//! Building and running the daemons under test.
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use command_fds::{CommandFdExt, FdMapping};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::netns::Entry;
use crate::process::{self, Process};
use crate::provision::progress;

/// A first build of a daemon with all its dependencies on a slow, busy machine.
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);
/// A build that has nothing to do is over sooner, and not worth a word.
const SILENT_BUILD: Duration = Duration::from_secs(2);
/// A daemon listens within milliseconds; a loaded machine may take far longer to start anything.
const START_LIMIT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Builds the binary `name` of the workspace in the caller's own profile (once per process) and returns its path.
///
/// It is built by `cargo build --package NAME`, so a plain `cargo test -p tests` always tests the daemon's present
/// source. `CARGO_TARGET_DIR` and the like are honoured because cargo itself says where the binary is.
///
/// `VHOST_USER_TEST_BIN` may name a folder with binaries to test instead, such as installed ones.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("VHOST_USER_TEST_BIN").filter(|folder| !folder.is_empty()) {
        let path = Path::new(&folder).join(name);
        ensure!(path.exists(), "VHOST_USER_TEST_BIN names {}, which has no {name}", path.display());
        return Ok(path);
    }
    built(name, name)
}

/// Builds a program of this package that tests start as a process of its own, and returns its path.
pub(crate) fn helper(name: &str) -> Result<PathBuf> {
    built(env!("CARGO_PKG_NAME"), name)
}

fn built(package: &str, name: &str) -> Result<PathBuf> {
    static BUILT: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    // Held during the build: a second caller waits for the first one's result.
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    if let Some(path) = built.get(name) {
        return Ok(path.clone());
    }
    let path = build(package, name).with_context(|| format!("Cannot build {name}"))?;
    built.insert(name.to_owned(), path.clone());
    Ok(path)
}

fn build(package: &str, name: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args(["build", "--package", package, "--bin", name]);
    cargo.args(["--message-format", "json-render-diagnostics"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn(cargo).context("Cannot start cargo")?;
    let mut status = process.wait(SILENT_BUILD)?;
    if status.is_none() {
        progress(&format!("building {name}"));
        status = process.wait(BUILD_LIMIT)?;
    }
    let status =
        status.with_context(|| format!("cargo did not end within {} minutes", BUILD_LIMIT.as_secs() / 60))?;
    ensure!(status.success(), "cargo failed ({}):\n{}", process::describe(status), process.stderr().text());
    for line in process.stdout().bytes_from(0).split(|&byte| byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else {
            continue;
        };
        if message["reason"] == "compiler-artifact"
            && message["target"]["name"] == name
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(path.into());
        }
    }
    bail!("cargo reported no executable")
}

/// A daemon that is about to be started.
#[derive(Debug)]
pub struct Builder {
    name: String,
    program: Option<PathBuf>,
    sockets: Vec<PathBuf>,
    ports: Vec<String>,
    entry: Option<Entry>,
    fds: Vec<FdMapping>,
    is_client: bool,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    start_limit: Duration,
    file_limit: Option<u32>,
}

impl Builder {
    /// Runs `program` instead of the workspace's binary of that name.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// Listens at `socket` instead of in a temporary folder: for a daemon that replaces another one.
    #[must_use]
    pub fn socket(mut self, socket: impl Into<PathBuf>) -> Self {
        self.sockets.push(socket.into());
        self
    }

    /// Adds a socket of a daemon that serves several, with this behind its path, such as `,isolated=on`. The first
    /// call is about the first socket.
    #[must_use]
    pub fn port(mut self, options: &str) -> Self {
        self.ports.push(options.to_owned());
        self
    }

    /// Runs it in a namespace.
    #[must_use]
    pub fn inside(mut self, entry: &Entry) -> Self {
        self.entry = Some(entry.clone());
        self
    }

    /// Gives it an open file under the number `number`.
    #[must_use]
    pub fn fd(mut self, number: RawFd, file: OwnedFd) -> Self {
        self.fds.push(FdMapping { parent_fd: file, child_fd: number });
        self
    }

    /// Makes it connect to its socket (`--client`) instead of listening there.
    #[must_use]
    pub fn client(mut self) -> Self {
        self.is_client = true;
        self
    }

    /// Adds one argument. `--socket-path` is added by itself.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.envs.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// How long the daemon may take until it listens.
    #[must_use]
    pub fn start_limit(mut self, limit: Duration) -> Self {
        self.start_limit = limit;
        self
    }

    /// Lets it have at most this many files open.
    #[must_use]
    pub fn file_limit(mut self, limit: u32) -> Self {
        self.file_limit = Some(limit);
        self
    }

    /// Builds the daemon if need be, starts it and waits until its sockets accept connections. A client is not waited
    /// for.
    pub fn start(self) -> Result<Daemon> {
        let program = match self.program {
            Some(program) => program,
            None => binary(&self.name)?,
        };
        // A socket's path is limited to 107 bytes, so the folder lies in the short default place.
        let folder = TempDir::with_prefix("vhost-user-").context("Cannot make a folder for a socket")?;
        let mut sockets = self.sockets;
        for index in sockets.len()..self.ports.len().max(1) {
            let name = if index == 0 { "socket".to_owned() } else { format!("socket{index}") };
            sockets.push(folder.path().join(name));
        }
        let mut command = Command::new(program);
        for (index, socket) in sockets.iter().enumerate() {
            let mut value = socket.clone().into_os_string();
            value.push(self.ports.get(index).map_or("", String::as_str));
            command.arg("--socket-path").arg(value);
        }
        if self.is_client {
            command.arg("--client");
        }
        command.args(self.args).envs(self.envs);
        if let Some(limit) = self.file_limit {
            let mut limited = Command::new("/bin/sh");
            limited.args(["-c", "ulimit -n \"$0\" && exec \"$@\""]).arg(limit.to_string());
            limited.arg(command.get_program()).args(command.get_args());
            limited.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            command = limited;
        }
        if let Some(entry) = &self.entry {
            command = entry.wrap(&command);
        }
        command.fd_mappings(self.fds).context("Two files are to have one number")?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let process = Process::spawn(command).with_context(|| format!("Cannot start {}", self.name))?;
        let mut daemon = Daemon { name: self.name, process, sockets, _folder: folder };
        if !self.is_client {
            daemon.wait_listening(self.start_limit)?;
        }
        Ok(daemon)
    }
}

/// A running daemon. It is killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    process: Process,
    sockets: Vec<PathBuf>,
    _folder: TempDir,
}

impl Daemon {
    /// Prepares to start the workspace's daemon `name`.
    pub fn builder(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            program: None,
            sockets: Vec::new(),
            ports: Vec::new(),
            entry: None,
            fds: Vec::new(),
            is_client: false,
            args: Vec::new(),
            envs: Vec::new(),
            start_limit: START_LIMIT,
            file_limit: None,
        }
    }

    fn wait_listening(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        for socket in self.sockets.clone() {
            while !is_listening(self.pid(), &socket) {
                if let Some(status) = self.process.wait(POLL_INTERVAL)? {
                    bail!(
                        "{} ended before it listened ({}):\n{}",
                        self.name,
                        process::describe(status),
                        self.stderr()
                    );
                }
                if Instant::now() >= deadline {
                    bail!(
                        "{} does not listen at {} after {} s:\n{}",
                        self.name,
                        socket.display(),
                        limit.as_secs(),
                        self.stderr()
                    );
                }
            }
        }
        Ok(())
    }

    /// Where it listens; the first place if there are several.
    pub fn socket(&self) -> &Path {
        &self.sockets[0]
    }

    /// Where it listens, port by port.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has written to its standard error so far.
    pub fn stderr(&self) -> String {
        self.process.stderr().text()
    }

    /// Waits until its standard error contains `text`.
    pub fn wait_stderr(&self, text: &str, limit: Duration) -> Result<()> {
        let found = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(text).then_some(());
        self.process.stderr().wait_until(Instant::now() + limit, found).with_context(|| {
            format!("{} did not say {text:?} within {} s:\n{}", self.name, limit.as_secs(), self.stderr())
        })
    }

    /// Waits until it ends by itself. A daemon that still runs after `limit` is an error of kind `TimedOut`.
    pub fn wait(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        self.process.wait(limit)?.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{} runs on after {} s", self.name, limit.as_secs()),
            )
        })
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        self.process.signal(signal)
    }

    /// Sends SIGTERM and waits for the end. A daemon that still runs after `limit` is an error of kind `TimedOut`.
    pub fn terminate(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        self.process.signal(Signal::TERM)?;
        self.wait(limit)
    }

    /// Kills it without warning, as a crash or the kernel's out-of-memory killer would.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// Whether some process in the network namespace of `pid` accepts connections at `socket`.
///
/// Asked of the kernel: a connection made to find out would be the daemon's first front end.
pub fn is_listening(pid: u32, socket: &Path) -> bool {
    // A daemon in a sandbox has left the network namespace in which it listens. Its child, which looks after the socket,
    // has not.
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    std::iter::once(pid).chain(children).any(|pid| {
        // A process that has just ended has no such file.
        let table = std::fs::read(format!("/proc/{pid}/net/unix")).unwrap_or_default();
        String::from_utf8_lossy(&table).lines().any(|line| is_listening_at(line, socket))
    })
}

/// Whether a line of `/proc/net/unix` (`Num RefCount Protocol Flags Type St Inode Path`) is a listener at `socket`.
fn is_listening_at(line: &str, socket: &Path) -> bool {
    /// `__SO_ACCEPTCON` of the kernel's socket flags.
    const ACCEPTS: u32 = 0x1_0000;
    let mut rest = line;
    let mut fields = [""; 7];
    for field in &mut fields {
        let trimmed = rest.trim_start();
        let (word, after) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        (*field, rest) = (word, after);
    }
    u32::from_str_radix(fields[3], 16).is_ok_and(|flags| flags & ACCEPTS != 0) && Path::new(rest) == socket
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_listener_is_found_without_connecting() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a socket");
        assert!(!is_listening(std::process::id(), &path));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(is_listening(std::process::id(), &path));
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(listener);
        assert!(!is_listening(std::process::id(), &path));
    }

    #[test]
    fn a_bound_socket_that_does_not_listen_is_no_listener() {
        let line = |flags: &str| format!("0000000000000000: 00000002 00000000 {flags} 0001 01 10001 /run/s");
        assert!(is_listening_at(&line("00010000"), Path::new("/run/s")));
        assert!(!is_listening_at(&line("00000000"), Path::new("/run/s")));
        assert!(!is_listening_at(&line("00010000"), Path::new("/run/other")));
    }

    #[test]
    fn a_daemon_that_fails_to_start_is_an_error_with_its_words() {
        let error = Daemon::builder("stand-in").program("/bin/ls").start().unwrap_err().to_string();
        assert!(error.contains("stand-in ended before it listened (exit status 2)"), "{error}");
        assert!(error.contains("socket-path"), "{error}");
    }

    /// A script in a daemon's place, which ends at once; what it said.
    fn words_of_a_script(script: &str, prepare: impl FnOnce(Builder) -> Builder) -> String {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("script");
        // Written by another process: a child of this one that had it open for writing would keep it from starting.
        let mut write = Command::new("sh");
        write.args([
            "-c",
            "printf '#!/bin/sh\nexec >&2\n%s\n' \"$1\" >\"$2\" && chmod 755 \"$2\"",
            "sh",
            script,
        ]);
        write.arg(&path);
        process::run(write, START_LIMIT).unwrap();
        let builder = prepare(Daemon::builder("stand-in").program(&path));
        builder.start().unwrap_err().to_string()
    }

    #[test]
    fn a_daemon_runs_in_a_namespace_with_the_files_that_it_gets() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"a line\n").unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let namespace = crate::netns::Namespace::new().unwrap();
        let words = words_of_a_script("id -u; cat <&7; grep -c : /proc/net/dev", |builder| {
            builder.inside(&namespace.ordinary_user()).fd(7, file.into())
        });
        assert!(words.ends_with("\n1000\na line\n1\n"), "{words}");
    }

    #[test]
    fn each_port_has_a_socket_of_its_own() {
        let words =
            words_of_a_script("echo \"$@\"", |builder| builder.port("").port(",vlan=2").socket("/run/first"));
        assert!(words.contains("--socket-path /run/first --socket-path /"), "{words}");
        assert!(words.ends_with("/socket1,vlan=2\n"), "{words}");
    }
}
