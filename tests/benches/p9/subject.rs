//! The servers that are compared, each with a connected session.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use tempfile::TempDir;
use tests::daemon::Daemon;
use tests::driver::memory::SharedMemory;
use tests::driver::raw::{GuestMemory, RawDevice, RawOptions};
use tests::driver::usage::cpu_time;
use tests::process::Process;
use tests::provision;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::client::Client;
use super::fuse::Fuse;
use super::lane::{self, Kick, Lane, MEMORY};
use super::ninep::NineP;
use super::qtest::{Machine, Qtest};

const START_LIMIT: Duration = Duration::from_secs(10);
const SETTLE: Duration = Duration::from_millis(50);
const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// `VIRTIO_9P_MOUNT_TAG`, which every driver takes.
const MOUNT_TAG: u64 = 1;

/// Who serves the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// `vhost-user-9p --poll-us 0`
    OursKick,
    /// `vhost-user-9p --poll-us 50`
    OursPoll,
    /// `virtiofsd`, its default flags and `--cache never`
    Virtiofsd,
    /// The same with `--thread-pool-size 4`
    VirtiofsdPool,
    /// QEMU's virtio-9p, `security_model=passthrough,multidevs=remap`
    Qemu,
}

impl Kind {
    /// Its column.
    pub fn label(self) -> &'static str {
        match self {
            Self::OursKick => "ours kick",
            Self::OursPoll => "ours poll",
            Self::Virtiofsd => "virtiofsd",
            Self::VirtiofsdPool => "virtiofsd -4",
            Self::Qemu => "QEMU",
        }
    }

    /// Whether it is the one that the others are compared with.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::OursKick | Self::OursPoll)
    }
}

/// What runs.
enum Server {
    Ours(Daemon),
    Other(Process),
    /// With the socket that it takes commands from, which it would miss.
    Qemu(Process, #[expect(dead_code, reason = "kept open")] Qtest),
}

/// A server and a session with it. The session ends first.
pub struct Subject {
    /// Which it is.
    pub kind: Kind,
    /// The session.
    pub client: Box<dyn Client>,
    _device: Option<RawDevice>,
    server: Server,
    _folder: TempDir,
}

/// What all of them get.
pub struct Setting<'a> {
    /// The folder to share.
    pub share: &'a Path,
    /// The most bytes of data in a descriptor.
    pub piece: usize,
    /// More flags for vhost-user-9p.
    pub flags: &'a str,
}

impl Subject {
    /// Starts it and opens a session.
    pub fn start(kind: Kind, setting: &Setting) -> Result<Self> {
        Self::try_start(kind, setting).with_context(|| format!("Cannot start {}", kind.label()))
    }

    fn try_start(kind: Kind, setting: &Setting) -> Result<Self> {
        let folder =
            TempDir::with_prefix_in("p9-", "/dev/shm").context("Cannot make a folder in /dev/shm")?;
        match kind {
            Kind::OursKick | Kind::OursPoll => {
                let poll = if kind == Kind::OursPoll { "50" } else { "0" };
                let builder = Daemon::builder("vhost-user-9p").arg("--shared-dir").arg(setting.share);
                let builder = builder.args(["--poll-us", poll]).args(setting.flags.split_whitespace());
                let daemon = builder.start()?;
                let (device, lane) = attach(daemon.socket(), FEATURES | MOUNT_TAG, 0, setting.piece)
                    .with_context(|| daemon.stderr())?;
                let client = NineP::new(lane).with_context(|| daemon.stderr())?;
                Ok(Self {
                    kind,
                    client: Box::new(client),
                    _device: Some(device),
                    server: Server::Ours(daemon),
                    _folder: folder,
                })
            }
            Kind::Virtiofsd | Kind::VirtiofsdPool => {
                let (process, socket) = virtiofsd(kind, folder.path(), setting.share)?;
                // Queue 0 is for requests of high priority, of which there are none here.
                let (device, lane) =
                    attach(&socket, FEATURES, 1, setting.piece).with_context(|| process.stderr().text())?;
                let client = Fuse::new(lane).with_context(|| process.stderr().text())?;
                Ok(Self {
                    kind,
                    client: Box::new(client),
                    _device: Some(device),
                    server: Server::Other(process),
                    _folder: folder,
                })
            }
            Kind::Qemu => {
                let placement = lane::placement();
                let machine = Machine::start(folder.path(), setting.share, placement, FEATURES | MOUNT_TAG)?;
                let Machine { process, memory, kick, qtest } = machine;
                let ring = lane::ring(&memory, placement, true)?;
                let lane = Lane::new(ring, Kick::Device(kick), setting.piece);
                let client = NineP::new(lane).with_context(|| process.stderr().text())?;
                Ok(Self {
                    kind,
                    client: Box::new(client),
                    _device: None,
                    server: Server::Qemu(process, qtest),
                    _folder: folder,
                })
            }
        }
    }

    /// The CPU time of its process and of those that this has started.
    pub fn cpu_time(&self) -> Result<Duration> {
        let pid = match &self.server {
            Server::Ours(daemon) => daemon.pid(),
            Server::Other(process) | Server::Qemu(process, _) => process.pid(),
        };
        let mut sum = Duration::ZERO;
        for pid in family(pid) {
            sum += cpu_time(pid)?;
        }
        Ok(sum)
    }

    /// What it has said.
    pub fn words(&self) -> String {
        match &self.server {
            Server::Ours(daemon) => daemon.stderr(),
            Server::Other(process) | Server::Qemu(process, _) => process.stderr().text(),
        }
    }
}

/// A process and its children: a sandbox may need a parent outside of it.
fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        next += 1;
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for task in tasks {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    all
}

fn virtiofsd(kind: Kind, folder: &Path, share: &Path) -> Result<(Process, PathBuf)> {
    let socket = folder.join("socket");
    let mut command = provision::program("virtiofsd")?.command();
    command.arg("--socket-path").arg(&socket).arg("--shared-dir").arg(share);
    command.args(["--cache", "never", "--log-level", "warn"]);
    if kind == Kind::VirtiofsdPool {
        command.args(["--thread-pool-size", "4"]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = Process::spawn(command).context("Cannot start virtiofsd")?;
    // The table of listeners that a process of another namespace has is hidden, so the file has to do.
    let deadline = Instant::now() + START_LIMIT;
    while !socket.exists() {
        if process.wait(Duration::from_millis(5))?.is_some() || Instant::now() > deadline {
            bail!("virtiofsd does not listen: {}", process.stderr().text());
        }
    }
    // Between `bind` and `listen` nobody can connect.
    std::thread::sleep(SETTLE);
    Ok((process, socket))
}

/// Connects to a vhost-user device and starts its queues up to number `index`, which is the one to use.
fn attach(socket: &Path, features: u64, index: usize, piece: usize) -> Result<(RawDevice, Lane)> {
    let options = RawOptions {
        features,
        protocol: VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK,
        queues: index as u16 + 1,
        ..RawOptions::default()
    };
    let memory = Arc::new(GuestMemory::of(SharedMemory::new(MEMORY)?));
    let mut device = RawDevice::connect_with(socket, &options, Arc::clone(&memory))?;
    for unused in 0..index {
        lane::start(&mut device, unused, &lane::ring(&memory, lane::unused_placement(), true)?)?;
    }
    let ring = lane::ring(&memory, lane::placement(), true)?;
    lane::start(&mut device, index, &ring)?;
    Ok((device, Lane::new(ring, Kick::Ring, piece)))
}
