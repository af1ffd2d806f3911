//! Something for a guest to reach, without any privilege: a network stack in user space (passt) in a network namespace
//! that stands for this host, and another namespace that stands for the world outside.
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::netns::{Namespace, open};
use crate::process::Process;
use crate::provision;

/// The address of the host, which passt gives to the guest as well.
pub(super) const HOST: &str = "192.0.2.10";
/// An address that is only reached through the host's gateway.
pub(super) const SERVER: &str = "203.0.113.1";
/// Where the server gives back what it was sent.
pub(super) const PORT: u16 = 7;

const GATEWAY: &str = "192.0.2.1";
/// passt makes its socket within milliseconds; a loaded machine may take far longer to start anything.
const START_LIMIT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The namespaces and what runs in them.
pub(super) struct Outside {
    passt: Process,
    socket: PathBuf,
    _folder: TempDir,
    _namespaces: [Namespace; 2],
}

impl Outside {
    /// Makes all of it.
    pub(super) fn start() -> Result<Self> {
        let host = Namespace::new()?;
        let world = host.neighbour()?;
        host.add_veth("up0", &world, "down0")?;
        host.ip(&format!("address add {HOST}/24 dev up0"))?;
        host.ip(&format!("route add default via {GATEWAY}"))?;
        world.ip(&format!("address add {GATEWAY}/24 dev down0"))?;
        world.ip(&format!("address add {SERVER}/32 dev lo"))?;
        let listener = open::tcp_listener(&world, &format!("{SERVER}:{PORT}"))?;
        // It ends with the process.
        std::thread::spawn(move || give_back(&listener));

        let folder = TempDir::with_prefix("passt-").context("Cannot make a temporary folder")?;
        let socket = folder.path().join("socket");
        let mut command = provision::program("passt")?.command();
        command.args(["--foreground", "--ipv4-only", "--socket"]).arg(&socket);
        let mut command = host.ordinary_user().wrap(&command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let passt = Process::spawn(command).context("Cannot start passt")?;
        let mut outside = Self { passt, socket, _folder: folder, _namespaces: [host, world] };
        outside.wait_socket()?;
        Ok(outside)
    }

    fn wait_socket(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while !self.socket.exists() {
            let ended = self.passt.wait(POLL_INTERVAL)?.is_some();
            ensure!(!ended && Instant::now() < deadline, "passt made no socket:\n{}", self.messages());
        }
        Ok(())
    }

    /// Where passt is reached.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process id of passt.
    pub(super) fn pid(&self) -> u32 {
        self.passt.pid()
    }

    /// What passt has said so far.
    pub(super) fn messages(&self) -> String {
        self.passt.stderr().text()
    }
}

/// Takes all that a connection brings, and gives it back then.
fn give_back(listener: &TcpListener) {
    for mut connection in listener.incoming().flatten() {
        let mut bytes = Vec::new();
        // The guest compares, and fails if anything is missing.
        let _ = connection.read_to_end(&mut bytes).and_then(|_| connection.write_all(&bytes));
    }
}
