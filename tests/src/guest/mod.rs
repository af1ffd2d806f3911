//! Linux guests that use the daemons: one boots, runs a shell script and powers off.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! # let socket = std::path::Path::new("/run/blk");
//! use tests::guest::{BlkOptions, Guest, Vmm};
//!
//! let report = Guest::new(Vmm::Qemu)
//!     .cpus(2)
//!     .blk(socket, BlkOptions { num_queues: 2, ..BlkOptions::default() })
//!     .script("report sectors $(cat /sys/block/vda/size)")
//!     .run()?
//!     .check()?;
//! assert_eq!(report.value("sectors")?, "2048");
//! # Ok(())
//! # }
//! ```
//!
//! The script runs in busybox's shell with `set -ex`: a command that fails ends it. Its standard output comes back
//! in the [`Report`]; its standard error and a trace of its commands go to the guest's console, which every error
//! quotes. The functions that it can call are in `functions.sh`.
mod initramfs;
mod qemu;
pub mod qmp;
mod running;
mod terminal;
mod transcript;
mod uml;

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::{NamedTempFile, TempDir};

pub use self::running::{Report, Running};

use self::initramfs::Initramfs;
use crate::provision::{self, Modules, Series};

/// How long the guest's own watchdog waits after the host's limit.
const WATCHDOG_GRACE: Duration = Duration::from_secs(60);

/// What runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU with virtio-pci devices.
    Qemu,
    /// User Mode Linux.
    Uml,
}

impl Vmm {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Qemu, Self::Uml];

    /// The driver of the transport that the devices are found by, which some kernels have built in.
    fn transport(self) -> &'static str {
        match self {
            Self::Qemu => "virtio_pci",
            Self::Uml => "virtio_uml",
        }
    }

    /// The terminal that carries the channel.
    fn channel(self) -> &'static str {
        match self {
            Self::Qemu => "/dev/ttyS1",
            Self::Uml => "/dev/tty1",
        }
    }
}

impl fmt::Display for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "QEMU",
            Self::Uml => "User Mode Linux",
        })
    }
}

/// How a guest attaches a block device.
#[derive(Debug, Clone, Copy)]
pub struct BlkOptions {
    /// Its request queues; User Mode Linux uses one.
    pub num_queues: u16,
    /// How often QEMU tries to reach a daemon that went away; without it the device stays dead.
    pub reconnect: Option<Duration>,
}

impl Default for BlkOptions {
    fn default() -> Self {
        Self { num_queues: 1, reconnect: None }
    }
}

/// How a guest attaches a network interface.
#[derive(Debug, Clone, Copy)]
pub struct NetOptions {
    /// Its pairs of queues; User Mode Linux uses one.
    pub queue_pairs: u16,
    /// The address that QEMU gives it, instead of one that QEMU makes up. User Mode Linux takes the daemon's, or makes
    /// one up itself.
    pub mac: Option<[u8; 6]>,
    /// The largest packet that QEMU tells the guest of (`host_mtu`). User Mode Linux asks the daemon.
    pub mtu: Option<u16>,
    /// How often QEMU tries to reach a daemon that went away; without it the device stays dead.
    pub reconnect: Option<Duration>,
    /// Whether QEMU listens at the socket, for a daemon that connects; it boots the guest when one has.
    pub is_server: bool,
    /// More options of QEMU's virtio-net-pci, such as `,guest_tso4=off`.
    pub device: &'static str,
}

impl Default for NetOptions {
    fn default() -> Self {
        Self { queue_pairs: 1, mac: None, mtu: None, reconnect: None, is_server: false, device: "" }
    }
}

/// How a guest attaches a shared directory. Its tag is the daemon's matter.
#[derive(Debug, Clone, Copy)]
pub struct NinepOptions {
    /// Its request queues. Linux uses one.
    pub num_queues: u16,
    /// The descriptors of a queue. Linux puts up to 128 of them into a request, or one that refers to a table.
    pub queue_size: u16,
    /// The bytes of the configuration that the guest may read: the length of the tag, and the tag.
    pub config_size: u16,
}

impl Default for NinepOptions {
    fn default() -> Self {
        Self { num_queues: 1, queue_size: 256, config_size: 64 }
    }
}

/// How a guest attaches a memory balloon.
#[derive(Debug, Clone, Copy)]
pub struct BalloonOptions {
    /// Its queues, of which Linux uses those whose features it takes.
    pub num_queues: u16,
    /// The descriptors of a queue. User Mode Linux has 256.
    pub queue_size: u16,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        Self { num_queues: 5, queue_size: 128 }
    }
}

/// A device of a guest.
#[derive(Debug, Clone)]
enum Device {
    Blk { socket: PathBuf, options: BlkOptions },
    Net { socket: PathBuf, options: NetOptions },
    Ninep { socket: PathBuf, options: NinepOptions },
    NinepInProcess { path: PathBuf, tag: String, security_model: &'static str },
    Virtiofs { socket: PathBuf, tag: String },
    Balloon { socket: PathBuf, options: BalloonOptions },
    BalloonInProcess { device: &'static str },
    Debian,
}

impl Device {
    /// The guest's drivers.
    fn modules(&self) -> &'static [&'static str] {
        match self {
            Self::Blk { .. } | Self::Debian => &["virtio_blk"],
            Self::Net { .. } => &["virtio_net"],
            Self::Ninep { .. } | Self::NinepInProcess { .. } => &["9pnet_virtio", "9p"],
            Self::Virtiofs { .. } => &["virtiofs"],
            Self::Balloon { .. } | Self::BalloonInProcess { .. } => &["virtio_balloon"],
        }
    }
}

/// A guest that is about to boot.
#[derive(Debug, Clone)]
pub struct Guest {
    vmm: Vmm,
    kernel: Series,
    memory_mib: u32,
    cpus: u32,
    devices: Vec<Device>,
    modules: Vec<String>,
    programs: Vec<String>,
    files: Vec<(String, Vec<u8>)>,
    script: String,
    timeout: Duration,
    may_reboot: bool,
    new_root: Option<String>,
    huge_pages: bool,
    hot_plug: bool,
    monitor: Option<PathBuf>,
}

impl Guest {
    /// A guest with one processor, 256 MiB of memory, no devices and two minutes to live.
    pub fn new(vmm: Vmm) -> Self {
        Self {
            vmm,
            kernel: Series::default(),
            memory_mib: 256,
            cpus: 1,
            devices: Vec::new(),
            modules: Vec::new(),
            programs: Vec::new(),
            files: Vec::new(),
            script: String::new(),
            timeout: Duration::from_secs(120),
            may_reboot: false,
            new_root: None,
            huge_pages: false,
            hot_plug: false,
            monitor: None,
        }
    }

    /// Sets which kernel runs in QEMU. User Mode Linux is a kernel itself.
    #[must_use]
    pub fn kernel(mut self, series: Series) -> Self {
        self.kernel = series;
        self
    }

    /// Sets the size of its memory.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Sets the number of its processors. User Mode Linux has one.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Attaches the block device of the daemon that listens at `socket`; the first is the guest's `/dev/vda`.
    #[must_use]
    pub fn blk(mut self, socket: impl Into<PathBuf>, options: BlkOptions) -> Self {
        self.devices.push(Device::Blk { socket: socket.into(), options });
        self
    }

    /// Attaches the network interface of the daemon at `socket`; the first is the guest's `eth0`.
    #[must_use]
    pub fn net(mut self, socket: impl Into<PathBuf>, options: NetOptions) -> Self {
        self.devices.push(Device::Net { socket: socket.into(), options });
        self
    }

    /// Attaches the shared directory of the daemon that listens at `socket`. Only QEMU can: Debian's User Mode Linux has
    /// no 9p over virtio.
    #[must_use]
    pub fn ninep(mut self, socket: impl Into<PathBuf>, options: NinepOptions) -> Self {
        self.devices.push(Device::Ninep { socket: socket.into(), options });
        self
    }

    /// Shares `path` by QEMU itself, under `tag`: what the daemon is compared with. The security models are QEMU's:
    /// `passthrough` (needs root), `mapped-xattr`, `mapped-file` and `none`.
    #[must_use]
    pub fn ninep_in_process(
        mut self,
        path: impl Into<PathBuf>,
        tag: &str,
        security_model: &'static str,
    ) -> Self {
        self.devices.push(Device::NinepInProcess { path: path.into(), tag: tag.to_owned(), security_model });
        self
    }

    /// Attaches the shared directory of a virtiofs daemon, such as virtiofsd, under `tag`. Only QEMU can.
    #[must_use]
    pub fn virtiofs(mut self, socket: impl Into<PathBuf>, tag: &str) -> Self {
        self.devices.push(Device::Virtiofs { socket: socket.into(), tag: tag.to_owned() });
        self
    }

    /// Attaches the memory balloon of the daemon that listens at `socket`. A guest has one at most.
    #[must_use]
    pub fn balloon(mut self, socket: impl Into<PathBuf>, options: BalloonOptions) -> Self {
        self.devices.push(Device::Balloon { socket: socket.into(), options });
        self
    }

    /// Attaches QEMU's own memory balloon, with more options of its device such as `,free-page-reporting=on`: what the daemon
    /// is compared with. Its path in QEMU's object tree is `/machine/peripheral/balloon`.
    #[must_use]
    pub fn balloon_in_process(mut self, device: &'static str) -> Self {
        self.devices.push(Device::BalloonInProcess { device });
        self
    }

    /// Makes its memory of huge pages, which the host must have. Only QEMU can.
    #[must_use]
    pub fn huge_pages(mut self) -> Self {
        self.huge_pages = true;
        self
    }

    /// Lets QEMU add memory while it runs, and remove and add its balloon: that is the device `balloon` on the bus `root-port`
    /// then, with the character device `device0` if it is the first of all. Only QEMU can.
    #[must_use]
    pub fn hot_plug(mut self) -> Self {
        self.hot_plug = true;
        self
    }

    /// Lets QEMU listen for commands at `path`; see [`qmp::Monitor`].
    #[must_use]
    pub fn monitor(mut self, path: impl Into<PathBuf>) -> Self {
        self.monitor = Some(path.into());
        self
    }

    /// Adds a whole Debian, on a disk that QEMU itself serves read-only. The script mounts it by `debian_up`, and runs
    /// programs in it by `debian`.
    #[must_use]
    pub fn debian(mut self) -> Self {
        self.devices.push(Device::Debian);
        self.module("crc32c_generic").module("ext4")
    }

    /// Loads a kernel module, besides those of the devices. `ext4` and the like; built-in ones are fine.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// Adds what the ext4 file system needs.
    #[must_use]
    pub fn ext4(self) -> Self {
        // ext4 asks for its checksum by an alias, which only modprobe could resolve.
        self.module("crc32c_generic").module("ext4").program("mke2fs").program("e2fsck")
    }

    /// Adds a program that [`provision::program`] knows.
    #[must_use]
    pub fn program(mut self, name: &str) -> Self {
        self.programs.push(name.to_owned());
        self
    }

    /// Adds a file.
    #[must_use]
    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.to_owned(), content.into()));
        self
    }

    /// Sets the script. Its exit status is the guest's.
    #[must_use]
    pub fn script(mut self, script: impl Into<String>) -> Self {
        self.script = script.into();
        self
    }

    /// Sets how long everything may take, from the start to the power-off.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Lets QEMU start the guest anew when it reboots, with the script from its beginning; otherwise that is its end.
    #[must_use]
    pub fn may_reboot(mut self) -> Self {
        self.may_reboot = true;
        self
    }

    /// Lets the system in this folder take over when the script has succeeded, as the root's `/sbin/init`; the guest is that
    /// system's then, and what it does is seen by [`Running::wait_for_text`] and [`Running::wait_power_off`].
    #[must_use]
    pub fn new_root(mut self, folder: &str) -> Self {
        self.new_root = Some(folder.to_owned());
        self
    }

    /// Boots it and waits for its end. A script that fails is a report too: see [`Report::check`]. A guest that
    /// panics, hangs or ends without a word is an error.
    pub fn run(self) -> Result<Report> {
        self.spawn()?.wait()
    }

    /// Boots it and returns at once. The caller's thread must outlive the guest.
    pub fn spawn(self) -> Result<Running> {
        let vmm = self.vmm;
        self.try_spawn().with_context(|| format!("Cannot start a guest in {vmm}"))
    }

    fn try_spawn(self) -> Result<Running> {
        let scratch = TempDir::with_prefix("guest-").context("Cannot make a temporary folder")?;
        let (command, initramfs) = match self.vmm {
            Vmm::Qemu => {
                let kernel = provision::kernel(self.kernel)?;
                let initramfs = initramfs_of(&self, &kernel.modules)?;
                (qemu::command(&self, &kernel, initramfs.path())?, initramfs)
            }
            Vmm::Uml => {
                let uml = provision::uml()?;
                let initramfs = initramfs_of(&self, &uml.modules)?;
                (uml::command(&self, &uml, initramfs.path(), scratch.path())?, initramfs)
            }
        };
        Running::start(self.vmm, command, self.timeout, (initramfs, scratch))
    }
}

/// Writes the root file system of `guest`.
fn initramfs_of(guest: &Guest, modules: &Modules) -> Result<NamedTempFile> {
    let mut archive = Initramfs::new()?;
    archive.busybox(&provision::busybox()?)?;
    for name in &guest.programs {
        archive.program(&provision::program(name)?)?;
    }
    let mut names: Vec<&str> = vec![guest.vmm.transport()];
    names.extend(guest.devices.iter().flat_map(|device| device.modules().iter().copied()));
    names.extend(guest.modules.iter().map(String::as_str));
    archive.modules(&modules.in_load_order(names)?)?;
    let limit = (guest.timeout + WATCHDOG_GRACE).as_secs();
    let mut settings = format!("export CHANNEL={} LIMIT={limit}\n", guest.vmm.channel());
    for name in guest.programs.iter().filter(|name| is_shell_name(name)) {
        // Busybox prefers its own command of that name to the path.
        settings.extend([name, "() { /usr/bin/", name, " \"$@\"; }\n"]);
    }
    if let Some(folder) = &guest.new_root {
        settings.extend(["export NEW_ROOT=", folder, "\n"]);
    }
    archive.file("init", 0o755, include_bytes!("init.sh"))?;
    archive.file("guest/settings", 0o644, settings.as_bytes())?;
    archive.file("guest/functions.sh", 0o644, include_bytes!("functions.sh"))?;
    archive.file("guest/shellrc", 0o644, include_bytes!("shellrc"))?;
    archive.file("guest/script", 0o644, guest.script.as_bytes())?;
    for (path, content) in &guest.files {
        archive.file(path, 0o755, content)?;
    }
    let mut file = NamedTempFile::with_prefix("initramfs-").context("Cannot make a temporary file")?;
    file.write_all(&archive.finish()?).context("Cannot write the guest's root file system")?;
    Ok(file)
}

/// Whether a shell function can have this name.
fn is_shell_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Makes two tests of each function that takes a [`Vmm`]: one in the module `qemu`, one in the module `uml`.
#[macro_export]
macro_rules! for_both_guests {
    ($($name:ident),* $(,)?) => {
        mod qemu {
            $(#[test] fn $name() { super::$name($crate::guest::Vmm::Qemu) })*
        }
        mod uml {
            $(#[test] fn $name() { super::$name($crate::guest::Vmm::Uml) })*
        }
    };
}
