//! The ioctls of taps and interfaces, and frames to and from buffers that may be a guest's.
#![expect(unsafe_code, reason = "ioctls, and system calls on raw guest memory")]

use std::ffi::CStr;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{c_char, c_int, c_long, c_ulong, c_void, ifreq, iovec};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::Tap;

impl Tap {
    /// Reads one frame, with its virtio-net header, into at most `UIO_MAXIOV` buffers. Returns the bytes read.
    ///
    /// Errors are the kernel's: `EAGAIN` when no frame waits; see also [`Tap::is_gone`]. A frame that is longer than the
    /// buffers is cut without notice: give one byte more than any frame has, or enough for
    /// [`Tap::MAX_FRAME`](Self::MAX_FRAME). `num_buffers` of a 12-byte header is left as it was by older kernels.
    ///
    /// # Safety
    /// The buffers must be mapped, and be none of this process's own objects that others refer to. They may be shared
    /// with a guest.
    pub unsafe fn read(&self, queue: usize, buffers: &[iovec]) -> io::Result<usize> {
        let fd = self.queue_fd(queue).as_raw_fd();
        // Not `libc::readv`, which arms and disarms the cancellation of threads around each call.
        // SAFETY: as promised by the caller.
        let result =
            unsafe { libc::syscall(libc::SYS_readv, c_long::from(fd), buffers.as_ptr(), buffers.len()) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one frame, with its virtio-net header, from at most `UIO_MAXIOV` buffers. Returns the bytes written.
    ///
    /// Errors are the kernel's: `EIO` while the interface is down, `EINVAL` for a frame without an Ethernet header or with
    /// a virtio-net header that does not fit it, `EAGAIN` when a send buffer was set and is full; see also
    /// [`Tap::is_gone`]. In each case nothing was sent.
    ///
    /// # Safety
    /// The buffers must be mapped. They may be shared with a guest.
    pub unsafe fn write(&self, queue: usize, buffers: &[iovec]) -> io::Result<usize> {
        let fd = self.queue_fd(queue).as_raw_fd();
        // Not `libc::writev`, as above.
        // SAFETY: as promised by the caller.
        let result =
            unsafe { libc::syscall(libc::SYS_writev, c_long::from(fd), buffers.as_ptr(), buffers.len()) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

/// Calls `ioctl` with an argument that the request reads or writes.
///
/// # Safety
/// `request` must be one that takes a pointer to a `T`, or to what lies at its beginning.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: as promised by the caller.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, &raw mut *argument) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// An argument for the ioctls on interfaces. A name that is too long is cut; callers check.
fn request(name: &str) -> ifreq {
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as c_char;
    }
    request
}

/// Attaches an open `/dev/net/tun` to the interface, which is created if there is none of this name; or sets the flags of
/// a macvtap queue, whose name does not matter.
pub(super) fn set_interface(fd: BorrowedFd<'_>, name: &str, flags: c_int) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETIFF takes an `ifreq`.
    unsafe { ioctl(fd, libc::TUNSETIFF as c_ulong, &mut request) }
}

/// The name and the flags (`IFF_TAP`, ...) of the interface that a queue belongs to.
pub(super) fn interface(fd: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    let mut request = request("");
    // SAFETY: TUNGETIFF takes an `ifreq`.
    unsafe { ioctl(fd, libc::TUNGETIFF as c_ulong, &mut request) }?;
    let name = request.ifr_name.map(|byte| byte as u8);
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    // SAFETY: TUNGETIFF sets the flags, and every bit pattern is valid.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((String::from_utf8_lossy(name).into_owned(), c_int::from(flags as u16)))
}

/// Whether `struct tun_pi` precedes each frame: of a queue that was opened without `IFF_NO_PI`.
///
/// TUNGETIFF does not tell, as it uses the same bit for `IFF_NOFILTER`. But a write that is too short for a virtio-net
/// header is refused for its length, unless the kernel has to read packet information first, here from nowhere. Nothing is
/// sent.
pub(super) fn has_packet_info(fd: BorrowedFd<'_>) -> bool {
    const SHORT: usize = 9;
    // SAFETY: the kernel reads from an address where nothing is mapped, and says so.
    let result = unsafe { libc::write(fd.as_raw_fd(), std::ptr::null(), SHORT) };
    result == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

/// Attaches (`IFF_ATTACH_QUEUE`) or detaches (`IFF_DETACH_QUEUE`) a queue of a multi-queue interface.
pub(super) fn set_queue(fd: BorrowedFd<'_>, flag: c_int) -> io::Result<()> {
    let mut request = request("");
    request.ifr_ifru.ifru_flags = flag as i16;
    // SAFETY: TUNSETQUEUE takes an `ifreq`.
    unsafe { ioctl(fd, libc::TUNSETQUEUE as c_ulong, &mut request) }
}

/// Sets what the reader of the interface's frames does itself (`TUN_F_…`).
pub(super) fn set_offload(fd: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number.
    let result =
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as libc::Ioctl, c_ulong::from(offloads)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the bytes of the virtio-net header.
pub(super) fn set_header_len(fd: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let mut len = len as c_int;
    // SAFETY: TUNSETVNETHDRSZ takes an `int`.
    unsafe { ioctl(fd, libc::TUNSETVNETHDRSZ as c_ulong, &mut len) }
}

/// Makes the fields of the virtio-net header little-endian, whatever the host is.
pub(super) fn set_little_endian(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut yes: c_int = 1;
    // SAFETY: TUNSETVNETLE takes an `int`.
    unsafe { ioctl(fd, libc::TUNSETVNETLE as c_ulong, &mut yes) }
}

/// The Ethernet address of the interface that `fd` is a queue of; or that `name` names, if `fd` is another socket.
pub(super) fn address(fd: BorrowedFd<'_>, name: &str) -> io::Result<[u8; 6]> {
    let mut request = request(name);
    // SAFETY: SIOCGIFHWADDR takes an `ifreq`, on sockets and on taps.
    unsafe { ioctl(fd, libc::SIOCGIFHWADDR as c_ulong, &mut request) }?;
    // SAFETY: the kernel has set the address, and every bit pattern is valid.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
    Ok(std::array::from_fn(|index| data[index] as u8))
}

/// The interfaces of the network namespace in which this was opened, by name.
#[derive(Debug)]
pub(super) struct Interfaces(OwnedFd);

/// `struct ethtool_value` of linux/ethtool.h.
#[repr(C)]
struct EthtoolValue {
    cmd: u32,
    data: u32,
}

/// `struct ethtool_drvinfo` of linux/ethtool.h.
#[repr(C)]
struct EthtoolDrvinfo {
    cmd: u32,
    driver: [c_char; 32],
    version: [c_char; 32],
    fw_version: [c_char; 32],
    bus_info: [c_char; 32],
    erom_version: [c_char; 32],
    reserved2: [c_char; 12],
    counts: [u32; 5],
}

const ETHTOOL_GDRVINFO: u32 = 3;
const ETHTOOL_GLINK: u32 = 10;

/// Which driver an interface has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Driver {
    /// Such as `tun` or `macvlan`.
    pub(super) name: String,
    /// Such as `tap`.
    pub(super) bus: String,
}

impl Interfaces {
    /// Any socket gives access to the interfaces of its namespace; a UNIX one exists in every kernel.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self(rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?))
    }

    /// The socket.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn request(&self, name: &str, code: c_ulong) -> io::Result<ifreq> {
        let mut request = request(name);
        // SAFETY: the callers pass requests that take an `ifreq`.
        unsafe { ioctl(self.0.as_fd(), code, &mut request) }?;
        Ok(request)
    }

    /// The interface's number; `ENODEV` if there is none of this name.
    pub(super) fn index(&self, name: &str) -> io::Result<u32> {
        let request = self.request(name, libc::SIOCGIFINDEX as c_ulong)?;
        // SAFETY: SIOCGIFINDEX sets it.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex } as u32)
    }

    /// Bytes of payload in a frame.
    pub(super) fn mtu(&self, name: &str) -> io::Result<u32> {
        let request = self.request(name, libc::SIOCGIFMTU as c_ulong)?;
        // SAFETY: SIOCGIFMTU sets it.
        Ok(unsafe { request.ifr_ifru.ifru_mtu } as u32)
    }

    pub(super) fn set_mtu(&self, name: &str, mtu: u16) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_mtu = c_int::from(mtu);
        // SAFETY: SIOCSIFMTU takes an `ifreq`.
        unsafe { ioctl(self.0.as_fd(), libc::SIOCSIFMTU as c_ulong, &mut request) }
    }

    /// Whether the administrator has brought the interface up (`IFF_UP`).
    pub(super) fn is_enabled(&self, name: &str) -> io::Result<bool> {
        let request = self.request(name, libc::SIOCGIFFLAGS as c_ulong)?;
        // SAFETY: SIOCGIFFLAGS sets them.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(c_int::from(flags) & libc::IFF_UP != 0)
    }

    /// Brings the interface up.
    pub(super) fn enable(&self, name: &str) -> io::Result<()> {
        let mut request = self.request(name, libc::SIOCGIFFLAGS as c_ulong)?;
        // SAFETY: SIOCGIFFLAGS has set them.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
        // SAFETY: SIOCSIFFLAGS takes an `ifreq`.
        unsafe { ioctl(self.0.as_fd(), libc::SIOCSIFFLAGS as c_ulong, &mut request) }
    }

    /// Whether the interface is up and has a carrier.
    pub(super) fn has_link(&self, name: &str) -> io::Result<bool> {
        let mut value = EthtoolValue { cmd: ETHTOOL_GLINK, data: 0 };
        // SAFETY: ETHTOOL_GLINK takes an `ethtool_value`.
        unsafe { self.ethtool(name, &mut value) }?;
        Ok(value.data != 0)
    }

    /// The driver of the interface; `ENODEV` if there is no interface of this name.
    pub(super) fn driver(&self, name: &str) -> io::Result<Driver> {
        // SAFETY: all zeroes is a valid value.
        let mut info: EthtoolDrvinfo = unsafe { zeroed() };
        info.cmd = ETHTOOL_GDRVINFO;
        // SAFETY: ETHTOOL_GDRVINFO takes an `ethtool_drvinfo`.
        unsafe { self.ethtool(name, &mut info) }?;
        let text = |bytes: [c_char; 32]| {
            let bytes = bytes.map(|byte| byte as u8);
            CStr::from_bytes_until_nul(&bytes)
                .map(|text| text.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        Ok(Driver { name: text(info.driver), bus: text(info.bus_info) })
    }

    /// # Safety
    /// `argument` must begin with the number of an ethtool command, and be of the type that this command takes.
    unsafe fn ethtool<T>(&self, name: &str, argument: &mut T) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_data = (&raw mut *argument).cast::<c_void>().cast();
        // SAFETY: SIOCETHTOOL takes an `ifreq` whose data are as promised by the caller.
        unsafe { ioctl(self.0.as_fd(), libc::SIOCETHTOOL as c_ulong, &mut request) }
    }
}
