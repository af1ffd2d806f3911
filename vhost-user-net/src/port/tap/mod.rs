//! Interfaces of the kernel whose other end is this process: taps (`Documentation/networking/tuntap.rst`) and macvtaps.
//!
//! Every frame has a virtio-net header in front, of the length set by [`Tap::set_header_len`].

mod error;
mod monitor;
mod sys;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libc::c_int;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};

use crate::vnet::{HEADER_LEN, LEGACY_HEADER_LEN, Offloads};
pub use error::TapError;
pub use monitor::LinkMonitor;
use sys::Interfaces;

/// The device node of the tun driver.
const TUN: &str = "/dev/net/tun";

/// `TUNSETIFF` for frames with Ethernet and virtio-net headers, and nothing else in front.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Queues that the kernel allows an interface (`MAX_TAP_QUEUES`).
const MAX_QUEUES: usize = 256;

/// What is wanted of a tap.
#[derive(Clone, Copy, Debug)]
pub struct TapOptions {
    /// Queue pairs to open, at least one. The descriptors decide where they are given.
    pub queues: usize,
    /// The MTU to set, if any: bytes of payload in a frame.
    pub mtu: Option<u16>,
}

/// An open tap or macvtap. Dropping it closes the queues; an interface that [`open`](Self::open) created is then gone.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<OwnedFd>,
    /// The queues that are attached, if queues can be attached and detached. The lock also orders the calls that do so.
    attached: Option<Mutex<Vec<bool>>>,
    interfaces: Interfaces,
    supported: Offloads,
}

/// Which driver is behind a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tun,
    Macvtap,
}

impl Tap {
    /// Bytes of the longest frame that the kernel sends, with its headers.
    pub const MAX_FRAME: usize = HEADER_LEN + 18 + 65535;

    /// Opens the interface `name`: an existing tap, an existing macvtap, or else a new tap, which is brought up. With a '/'
    /// in it, `name` is the path of a macvtap's device node.
    ///
    /// An existing interface that is down is left so, with a warning.
    ///
    /// Where the kernel can detach queues (all but taps without `IFF_MULTI_QUEUE`), all of them start detached, and the
    /// kernel drops what is sent to the interface: see [`set_queue_enabled`](Self::set_queue_enabled). Headers have
    /// [`HEADER_LEN`] bytes and no offload is on.
    pub fn open(name: &str, options: &TapOptions) -> Result<Self, TapError> {
        let interfaces = Interfaces::open().map_err(setup(name, "socket"))?;
        if name.contains('/') {
            let (name, queues) = open_node(Path::new(name), options)?;
            return Self::new(name, queues, Kind::Macvtap, interfaces, options);
        }
        if !is_valid(name) {
            return Err(TapError::Name { name: name.to_owned() });
        }
        match interfaces.driver(name) {
            Ok(driver) if driver.name == "tun" && driver.bus == "tun" => {
                Err(TapError::NotTap { name: name.to_owned(), kind: "a tun".to_owned() })
            }
            Ok(driver) if driver.name == "tun" => {
                let queues = open_tun(name, options, true)?;
                Self::new(name.to_owned(), queues, Kind::Tun, interfaces, options)
            }
            Ok(driver) if driver.name == "macvlan" => {
                let index = interfaces.index(name).map_err(setup(name, "SIOCGIFINDEX"))?;
                let path = PathBuf::from(format!("/dev/tap{index}"));
                let (_, queues) = open_node(&path, options)?;
                // The node may be that of an interface with the same number in another network namespace.
                if local_name(queues[0].as_fd(), &interfaces).is_ok_and(|found| found == name) {
                    Self::new(name.to_owned(), queues, Kind::Macvtap, interfaces, options)
                } else {
                    Err(TapError::NoMacvtap { path })
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                let queues = open_tun(name, options, false)?;
                let tap = Self::new(name.to_owned(), queues, Kind::Tun, interfaces, options)?;
                let up = tap.interfaces.enable(name);
                up.map_err(|source| TapError::Up { name: name.to_owned(), source })?;
                return Ok(tap);
            }
            // A driver without a name, such as that of the loopback interface.
            Err(_) => Err(TapError::NotTap { name: name.to_owned(), kind: "of another kind".to_owned() }),
            Ok(driver) => {
                let kind = format!("of driver {}", driver.name);
                Err(TapError::NotTap { name: name.to_owned(), kind })
            }
        }
        .inspect(Self::warn_if_down)
    }

    /// Takes over queues of one interface that somebody else has opened.
    ///
    /// Each must be a tap's with `IFF_NO_PI` and `IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` if there are several, or a
    /// macvtap's. The interface may be in another network namespace; its MTU is then out of reach. Queues start as
    /// [`open`](Self::open) says.
    pub fn from_fds(fds: Vec<OwnedFd>, options: &TapOptions) -> Result<Self, TapError> {
        let mut first: Option<(String, Kind)> = None;
        for fd in &fds {
            let (name, kind) = examine(fd, fds.len())?;
            match &first {
                None => first = Some((name, kind)),
                Some((other, _)) if *other != name => {
                    let fd = fd.as_raw_fd();
                    return Err(TapError::FdInterface { fd, name, other: other.clone() });
                }
                Some(_) => {}
            }
            let flags = rustix::fs::fcntl_getfl(fd).map_err(io::Error::from);
            flags.and_then(|flags| Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)).map_err(
                |source| TapError::Setup {
                    name: first.as_ref().map_or_else(String::new, |(name, _)| name.clone()),
                    call: "F_SETFL",
                    source,
                },
            )?;
        }
        let (name, kind) = first.ok_or(TapError::NoFd)?;
        let interfaces = Interfaces::open().map_err(setup(&name, "socket"))?;
        let tap = Self::new(name, fds, kind, interfaces, options)?;
        tap.warn_if_down();
        Ok(tap)
    }

    /// Brings queues of one interface into the state in which a tap starts.
    fn new(
        name: String,
        queues: Vec<OwnedFd>,
        kind: Kind,
        interfaces: Interfaces,
        options: &TapOptions,
    ) -> Result<Self, TapError> {
        let mut multi_queue = kind == Kind::Macvtap;
        for queue in &queues {
            let (_, flags) = sys::interface(queue.as_fd()).map_err(setup(&name, "TUNGETIFF"))?;
            // Flags of a multi-queue tap are those of the process that opened it first.
            if flags & libc::IFF_VNET_HDR == 0 || sys::has_packet_info(queue.as_fd()) {
                return Err(TapError::NoHeader { name });
            }
            multi_queue |= flags & libc::IFF_MULTI_QUEUE != 0;
        }
        let attached = multi_queue.then(|| Mutex::new(vec![true; queues.len()]));
        let mut tap = Self { name, queues, attached, interfaces, supported: Offloads::empty() };
        // The last queue takes the number of one that is detached: from the end on, none moves.
        for queue in (0..tap.queues()).rev() {
            tap.set_queue_enabled(queue, false).map_err(setup(&tap.name, "TUNSETQUEUE"))?;
        }
        tap.set_header_len(HEADER_LEN).map_err(setup(&tap.name, "TUNSETVNETHDRSZ"))?;
        tap.supported = tap.probe_offloads();
        tap.set_offloads(Offloads::empty()).map_err(setup(&tap.name, "TUNSETOFFLOAD"))?;
        if let Some(mtu) = options.mtu {
            tap.set_mtu(mtu)?;
        }
        Ok(tap)
    }

    fn warn_if_down(&self) {
        if self.is_local() && !self.interfaces.is_enabled(&self.name).unwrap_or(true) {
            log::warn!("Interface {0} is down: bring it up with `sudo ip link set {0} up`", self.name);
        }
    }

    /// The name that the interface had when it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many queues are open.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// What the kernel can leave to the reader of frames ([`set_offloads`](Self::set_offloads)). It takes the same from a
    /// writer at any time.
    pub fn supported_offloads(&self) -> Offloads {
        self.supported
    }

    /// Tries what `TUNSETOFFLOAD` accepts. `USO4` and `USO6` came with Linux 6.2. `UFO` is accepted by all kernels; those
    /// from 4.14 on never send such frames, but take them.
    fn probe_offloads(&self) -> Offloads {
        [
            Offloads::CSUM,
            Offloads::TSO4,
            Offloads::TSO6,
            Offloads::TSO4 | Offloads::ECN,
            Offloads::UFO,
            Offloads::USO4 | Offloads::USO6,
        ]
        .into_iter()
        .filter(|&offloads| {
            sys::set_offload(self.queues[0].as_fd(), (offloads | Offloads::CSUM).bits()).is_ok()
        })
        .fold(Offloads::empty(), |all, offloads| all | offloads)
    }

    /// Sets what a reader of frames does itself, so what the *guest* can receive (`TUNSETOFFLOAD`).
    ///
    /// What the kernel cannot do by itself is left out of `offloads`: everything without `CSUM`, `ECN` without `TSO4` or
    /// `TSO6`, `USO4` without `USO6` and the other way round. The kernel then does more for the guest, never less.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        sys::set_offload(self.queues[0].as_fd(), possible(offloads & self.supported).bits())
    }

    /// Sets the length of the virtio-net header in front of each frame: [`HEADER_LEN`], or [`LEGACY_HEADER_LEN`]. Its
    /// fields are little-endian on every host.
    pub fn set_header_len(&self, len: usize) -> io::Result<()> {
        if len != HEADER_LEN && len != LEGACY_HEADER_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Of the interface for a tap, of each queue for a macvtap.
        for queue in &self.queues {
            sys::set_header_len(queue.as_fd(), len)?;
            let endian = sys::set_little_endian(queue.as_fd());
            if cfg!(target_endian = "big") {
                endian?;
            }
        }
        Ok(())
    }

    /// Attaches or detaches a queue: frames are spread over the attached ones, and a detached one loses those it holds.
    /// With none attached, the kernel drops what is sent to the interface.
    ///
    /// A second call with the same value does nothing, and so does any call for a tap that was made without
    /// `IFF_MULTI_QUEUE`: its one queue is always attached.
    pub fn set_queue_enabled(&self, queue: usize, enabled: bool) -> io::Result<()> {
        let fd = self.queues.get(queue).ok_or(io::ErrorKind::InvalidInput)?;
        let Some(attached) = &self.attached else {
            return Ok(());
        };
        let mut attached = attached.lock().unwrap_or_else(PoisonError::into_inner);
        if attached[queue] != enabled {
            let flag = if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            sys::set_queue(fd.as_fd(), flag)?;
            attached[queue] = enabled;
        }
        Ok(())
    }

    /// The interface's MTU: bytes of payload in a frame. An error if it is in another network namespace.
    pub fn mtu(&self) -> io::Result<u32> {
        self.local_name().and_then(|name| self.interfaces.mtu(&name))
    }

    /// Sets the MTU, which takes CAP_NET_ADMIN. An MTU that is set already is fine without.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), TapError> {
        let set = || {
            let name = self.local_name()?;
            if self.interfaces.mtu(&name)? == u32::from(mtu) {
                return Ok(());
            }
            self.interfaces.set_mtu(&name, mtu)
        };
        set().map_err(|source| TapError::Mtu { name: self.name.clone(), mtu, source })
    }

    /// Whether frames can pass: the interface is up (`IFF_UP`) and has a carrier.
    ///
    /// The carrier of a tap is there as long as it is open, whether queues are attached or not, unless the administrator
    /// took it away (`ip link set NAME carrier off`); that of a macvtap is the carrier of the interface below. Of a tap in
    /// another network namespace only `IFF_UP` is known, and of a macvtap there nothing: it is taken for up. An interface
    /// that was deleted is down.
    pub fn is_up(&self) -> bool {
        if let Ok(name) = self.local_name() {
            return self.interfaces.has_link(&name).unwrap_or(false);
        }
        // A tap is writable if the interface is up, and broken if it is gone.
        let queue = self.queues[0].as_fd();
        let mut fds = [PollFd::from_borrowed_fd(queue, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok()
            && fds[0].revents() == PollFlags::OUT
            && self.exists()
    }

    /// Whether the interface was not deleted.
    fn exists(&self) -> bool {
        sys::interface(self.queues[0].as_fd()).is_ok()
    }

    /// Whether the interface is in the network namespace in which this tap was opened.
    fn is_local(&self) -> bool {
        self.local_name().is_ok()
    }

    /// The present name of the interface; an error if it is in another network namespace.
    fn local_name(&self) -> io::Result<String> {
        local_name(self.queues[0].as_fd(), &self.interfaces)
    }

    /// Whether an error of [`read`](Self::read) or [`write`](Self::write) says that the interface was deleted. Nothing
    /// works any more, and [`queue_fd`](Self::queue_fd) is ready (`POLLERR`) for ever: stop to wait for it.
    pub fn is_gone(error: &io::Error) -> bool {
        matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::ENOLINK))
    }

    /// The descriptor of a queue, to wait for frames. Panics if there is no such queue.
    pub fn queue_fd(&self, queue: usize) -> BorrowedFd<'_> {
        self.queues[queue].as_fd()
    }
}

/// The part of `offloads` that `TUNSETOFFLOAD` accepts as one set.
fn possible(offloads: Offloads) -> Offloads {
    if !offloads.contains(Offloads::CSUM) {
        return Offloads::empty();
    }
    let mut offloads = offloads;
    if !offloads.intersects(Offloads::TSO4 | Offloads::TSO6) {
        offloads.remove(Offloads::ECN);
    }
    if !offloads.contains(Offloads::USO4 | Offloads::USO6) {
        offloads.remove(Offloads::USO4 | Offloads::USO6);
    }
    offloads
}

/// The present name of the interface that a queue belongs to, if it is one of `interfaces`.
///
/// The name alone says nothing, as another namespace may have the same one: the addresses must match too.
fn local_name(queue: BorrowedFd<'_>, interfaces: &Interfaces) -> io::Result<String> {
    let (name, _) = sys::interface(queue)?;
    if sys::address(queue, "")? == sys::address(interfaces.fd(), &name)? {
        Ok(name)
    } else {
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }
}

/// For `map_err`: the kernel refused a call for no reason that has a remedy.
fn setup(name: &str, call: &'static str) -> impl FnOnce(io::Error) -> TapError {
    let name = name.to_owned();
    move |source| TapError::Setup { name, call, source }
}

/// Whether the kernel takes the name for an interface (`dev_valid_name`). A '%' would be a pattern.
fn is_valid(name: &str) -> bool {
    (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c == '%' || c == '\0' || c.is_whitespace())
}

fn open_device(path: &Path, missing: impl FnOnce() -> TapError) -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match io::Error::from(error) {
        error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => missing(),
        error if error.kind() == io::ErrorKind::PermissionDenied => {
            TapError::Denied { path: path.to_owned() }
        }
        source => TapError::Open { path: path.to_owned(), source },
    })
}

/// Opens the queues of a tap, which is created if it does not exist.
fn open_tun(name: &str, options: &TapOptions, exists: bool) -> Result<Vec<OwnedFd>, TapError> {
    let queues = options.queues.max(1);
    let name_owned = || name.to_owned();
    if queues > MAX_QUEUES {
        return Err(TapError::TooManyQueues { name: name_owned(), queues });
    }
    let mut flags = if queues > 1 { FLAGS | libc::IFF_MULTI_QUEUE } else { FLAGS };
    let mut fds: Vec<OwnedFd> = Vec::with_capacity(queues);
    while fds.len() < queues {
        let fd = open_device(Path::new(TUN), || TapError::NoTun)?;
        let mut result = sys::set_interface(fd.as_fd(), name, flags);
        let refused = |result: &io::Result<()>| matches!(result, Err(error) if error.raw_os_error() == Some(libc::EINVAL));
        if exists && refused(&result) {
            if queues > 1 {
                return Err(TapError::SingleQueue { name: name_owned(), queues });
            }
            // One queue of a tap that may have many.
            flags |= libc::IFF_MULTI_QUEUE;
            result = sys::set_interface(fd.as_fd(), name, flags);
        }
        result.map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) if exists => {
                TapError::AttachDenied { name: name_owned(), queues }
            }
            Some(libc::EPERM | libc::EACCES) => TapError::CreateDenied { name: name_owned(), queues },
            Some(libc::EBUSY) => TapError::InUse { name: name_owned() },
            Some(libc::E2BIG) => TapError::TooManyQueues { name: name_owned(), queues },
            _ => TapError::Setup { name: name_owned(), call: "TUNSETIFF", source: error },
        })?;
        fds.push(fd);
    }
    Ok(fds)
}

/// Opens the queues of a macvtap by its device node, and finds out its name.
fn open_node(path: &Path, options: &TapOptions) -> Result<(String, Vec<OwnedFd>), TapError> {
    let queues = options.queues.max(1);
    let display = || path.display().to_string();
    let mut fds: Vec<OwnedFd> = Vec::with_capacity(queues.min(MAX_QUEUES));
    while fds.len() < queues {
        let missing = || TapError::NoMacvtap { path: path.to_owned() };
        let fd = open_device(path, missing).map_err(|error| match error {
            TapError::Open { source, .. }
                if !fds.is_empty() && matches!(source.raw_os_error(), Some(libc::EBUSY | libc::E2BIG)) =>
            {
                TapError::TooManyQueues { name: display(), queues }
            }
            error => error,
        })?;
        if driver_of(&fd) != Some(Kind::Macvtap) || sys::interface(fd.as_fd()).is_err() {
            return Err(TapError::NotTap { name: display(), kind: "not the device of a macvtap".to_owned() });
        }
        let flags = FLAGS | libc::IFF_MULTI_QUEUE;
        sys::set_interface(fd.as_fd(), "", flags).map_err(setup(&display(), "TUNSETIFF"))?;
        fds.push(fd);
    }
    let (name, _) = sys::interface(fds[0].as_fd()).map_err(setup(&display(), "TUNGETIFF"))?;
    Ok((name, fds))
}

/// Which driver a descriptor may belong to: that of the device number of `/dev/net/tun`, or one of the others.
fn driver_of(fd: &OwnedFd) -> Option<Kind> {
    let stat = rustix::fs::fstat(fd).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
        return None;
    }
    let tun = rustix::fs::makedev(10, 200);
    Some(if stat.st_rdev == tun { Kind::Tun } else { Kind::Macvtap })
}

/// Checks one of several descriptors from somebody else.
fn examine(fd: &OwnedFd, queues: usize) -> Result<(String, Kind), TapError> {
    let number = fd.as_raw_fd();
    let kind = driver_of(fd).ok_or(TapError::FdNotTap { fd: number })?;
    let (name, flags) = sys::interface(fd.as_fd()).map_err(|error| match error.raw_os_error() {
        Some(libc::EBADFD | libc::ENOLINK) => TapError::FdUnattached { fd: number },
        _ => TapError::FdNotTap { fd: number },
    })?;
    let problem = if flags & libc::IFF_TAP == 0 {
        Some("with IFF_TUN")
    } else if flags & libc::IFF_VNET_HDR == 0 {
        Some("without IFF_VNET_HDR")
    } else if sys::has_packet_info(fd.as_fd()) {
        Some("without IFF_NO_PI")
    } else if queues > 1 && kind == Kind::Tun && flags & libc::IFF_MULTI_QUEUE == 0 {
        Some("without IFF_MULTI_QUEUE")
    } else {
        None
    };
    match problem {
        Some(problem) => Err(TapError::FdFlags { fd: number, name, problem, queues }),
        None => Ok((name, kind)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_are_a_set_that_the_kernel_takes() {
        let tso = Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        let uso = Offloads::USO4 | Offloads::USO6;
        assert_eq!(possible(Offloads::all()), Offloads::all());
        assert_eq!(possible(tso | uso), Offloads::empty());
        assert_eq!(possible(Offloads::CSUM | Offloads::ECN), Offloads::CSUM);
        assert_eq!(possible(Offloads::CSUM | Offloads::USO4 | tso), Offloads::CSUM | tso);
        assert_eq!(possible(Offloads::CSUM | uso), Offloads::CSUM | uso);
    }

    #[test]
    fn names_are_those_of_interfaces() {
        for name in ["t", "tap0", "fifteen-letters", "ünïcödé"] {
            assert!(is_valid(name), "{name}");
        }
        for name in ["", ".", "..", "a b", "a:1", "tap%d", "sixteen-letters-", "a\0"] {
            assert!(!is_valid(name), "{name}");
            assert!(
                matches!(
                    Tap::open(name, &TapOptions { queues: 1, mtu: None }),
                    Err(TapError::Name { .. } | TapError::NoMacvtap { .. })
                ),
                "{name}"
            );
        }
    }
}
