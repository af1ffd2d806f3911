//! The system calls that no crate offers.
#![expect(unsafe_code, reason = "raw system calls")]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_long, c_uint};
use rustix::fs::{Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::thread::Pid;

use super::locator::FileHandle;
use super::lock::{Conflict, Kind, Range};

/// The result of `libc::syscall`.
fn check(result: c_long) -> Result<usize, Errno> {
    usize::try_from(result)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Whether a system call that newer kernels have is there: assumed until one answers `ENOSYS`.
pub(super) struct Feature {
    missing: AtomicBool,
}

impl Feature {
    pub(super) const fn new() -> Self {
        Self { missing: AtomicBool::new(false) }
    }

    /// Calls `new`, or `old` where the kernel does not know it.
    pub(super) fn or_else<T>(
        &self,
        new: impl FnOnce() -> Result<T, Errno>,
        old: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        // Nothing else depends on the flag: at worst a thread asks once more.
        if !self.missing.load(Ordering::Relaxed) {
            match new() {
                Err(Errno::NOSYS) => self.missing.store(true, Ordering::Relaxed),
                result => return result,
            }
        }
        old()
    }
}

/// fchmodat2(2) of the inode that `file`, which may be `O_PATH`, stands for.
pub(super) fn fchmodat2_empty_path(file: BorrowedFd<'_>, mode: Mode) -> Result<(), Errno> {
    // SAFETY: the path is a string.
    check(unsafe {
        libc::syscall(
            libc::SYS_fchmodat2,
            file.as_raw_fd(),
            c"".as_ptr(),
            mode.bits() as c_uint,
            libc::AT_EMPTY_PATH,
        )
    })
    .map(drop)
}

// Since Linux 5.1 a new call has the same distance from the others on every architecture.
const SYS_SETXATTRAT: c_long = libc::SYS_fchmodat2 + 11;
const SYS_GETXATTRAT: c_long = libc::SYS_fchmodat2 + 12;
const SYS_LISTXATTRAT: c_long = libc::SYS_fchmodat2 + 13;
const SYS_REMOVEXATTRAT: c_long = libc::SYS_fchmodat2 + 14;

/// `struct xattr_args` of linux/xattr.h.
#[repr(C, align(8))]
struct XattrArgs {
    value: u64,
    size: u32,
    flags: u32,
}

/// getxattrat(2): follows `path`, which is relative to `dir`. An empty `buffer` asks for the size.
pub(super) fn getxattrat(
    dir: BorrowedFd<'_>,
    path: &CStr,
    name: &CStr,
    buffer: &mut [u8],
) -> Result<usize, Errno> {
    let args = XattrArgs {
        value: buffer.as_mut_ptr() as u64,
        size: u32::try_from(buffer.len()).unwrap_or(u32::MAX),
        flags: 0,
    };
    // SAFETY: both names are strings, and at most `size` bytes are written to the buffer.
    check(unsafe {
        libc::syscall(
            SYS_GETXATTRAT,
            dir.as_raw_fd(),
            path.as_ptr(),
            0,
            name.as_ptr(),
            &raw const args,
            size_of_val(&args),
        )
    })
}

/// setxattrat(2): follows `path`, which is relative to `dir`.
pub(super) fn setxattrat(
    dir: BorrowedFd<'_>,
    path: &CStr,
    name: &CStr,
    value: &[u8],
    flags: XattrFlags,
) -> Result<(), Errno> {
    let size = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
    let args = XattrArgs { value: value.as_ptr() as u64, size, flags: flags.bits() };
    // SAFETY: both names are strings, and `size` bytes are read from the value.
    check(unsafe {
        libc::syscall(
            SYS_SETXATTRAT,
            dir.as_raw_fd(),
            path.as_ptr(),
            0,
            name.as_ptr(),
            &raw const args,
            size_of_val(&args),
        )
    })
    .map(drop)
}

/// listxattrat(2): follows `path`, which is relative to `dir`. An empty `buffer` asks for the size.
pub(super) fn listxattrat(dir: BorrowedFd<'_>, path: &CStr, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the path is a string, and at most the buffer's length is written to it.
    check(unsafe {
        libc::syscall(SYS_LISTXATTRAT, dir.as_raw_fd(), path.as_ptr(), 0, buffer.as_mut_ptr(), buffer.len())
    })
}

/// removexattrat(2): follows `path`, which is relative to `dir`.
pub(super) fn removexattrat(dir: BorrowedFd<'_>, path: &CStr, name: &CStr) -> Result<(), Errno> {
    let flags: c_int = 0;
    // SAFETY: both names are strings.
    check(unsafe { libc::syscall(SYS_REMOVEXATTRAT, dir.as_raw_fd(), path.as_ptr(), flags, name.as_ptr()) })
        .map(drop)
}

/// The calling thread's user for the file system.
pub(super) fn fsuid() -> u32 {
    // (uid_t)-1 is nobody's number, so that nothing changes.
    set_fsuid(u32::MAX)
}

/// The calling thread's group for the file system.
pub(super) fn fsgid() -> u32 {
    set_fsgid(u32::MAX)
}

/// setfsuid(2), which tells nothing about its success. Returns the user that the thread has now.
pub(super) fn set_fsuid(uid: u32) -> u32 {
    // SAFETY: no memory is involved. Other than setresuid(3), this is not passed on to other threads.
    unsafe {
        libc::setfsuid(uid);
        libc::setfsuid(u32::MAX) as u32
    }
}

/// setfsgid(2), as [`set_fsuid`].
pub(super) fn set_fsgid(gid: u32) -> u32 {
    // SAFETY: as in `set_fsuid`.
    unsafe {
        libc::setfsgid(gid);
        libc::setfsgid(u32::MAX) as u32
    }
}

fn flock(kind: Kind, range: Range) -> libc::flock {
    // SAFETY: all zeroes is a valid `flock`, and the process number has to be 0.
    let mut flock: libc::flock = unsafe { std::mem::zeroed() };
    flock.l_type = match kind {
        Kind::Read => libc::F_RDLCK,
        Kind::Write => libc::F_WRLCK,
        Kind::Unlock => libc::F_UNLCK,
    } as i16;
    flock.l_whence = libc::SEEK_SET as i16;
    flock.l_start = range.start;
    flock.l_len = range.length;
    flock
}

/// Takes or releases a lock for the open file; with `wait` it may block, until a signal's handler has run.
pub(super) fn set_lock(file: BorrowedFd<'_>, kind: Kind, range: Range, wait: bool) -> Result<(), Errno> {
    let flock = flock(kind, range);
    let command = if wait { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK };
    // SAFETY: the command reads the structure.
    check(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const flock) }.into()).map(drop)
}

/// A lock of another open file or a process that is in the way.
pub(super) fn test_lock(file: BorrowedFd<'_>, kind: Kind, range: Range) -> Result<Option<Conflict>, Errno> {
    let mut flock = flock(kind, range);
    // SAFETY: the command reads and writes the structure.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut flock) }.into())?;
    let kind = match c_int::from(flock.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_RDLCK => Kind::Read,
        _ => Kind::Write,
    };
    Ok(Some(Conflict { kind, start: flock.l_start as u64, length: flock.l_len as u64, pid: flock.l_pid }))
}

/// The signal that interrupts a thread's system call. The C library leaves it to programs, and nobody else sends it.
fn interrupt_signal() -> c_int {
    libc::SIGRTMIN()
}

/// Gives the interrupting signal its handler, which does nothing: being called is what ends a system call.
pub(super) fn ready_for_interrupts() {
    extern "C" fn nothing(_: c_int) {}
    static ONCE: Once = Once::new();

    ONCE.call_once(|| {
        // SAFETY: all zeroes is a valid `sigaction`: an empty mask, and no SA_RESTART, so that calls are not begun anew.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
        // SAFETY: the handler is one, and touches nothing. Nobody else has a use for this signal.
        let result = unsafe { libc::sigaction(interrupt_signal(), &raw const action, std::ptr::null_mut()) };
        assert_eq!(result, 0, "The signal has a valid number");
    });
}

/// Unblocks the interrupting signal in the calling thread.
pub(super) fn let_interrupts_in() {
    // SAFETY: all zeroes is a set of signals, which the calls read and write.
    let result = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, interrupt_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut())
    };
    debug_assert_eq!(result, 0);
}

/// Interrupts the system call that a thread of this process is in, if it is in one.
pub(super) fn interrupt(thread: Pid) {
    // SAFETY: no memory is involved. A thread that has ended is an error, which says that it is in no call.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.as_raw_nonzero().get(), interrupt_signal());
    }
}

/// Bytes of the longest file handle.
const MAX_HANDLE: usize = libc::MAX_HANDLE_SZ as usize;

/// `struct file_handle` with room for any.
#[repr(C)]
struct RawHandle {
    len: c_uint,
    kind: c_int,
    bytes: [u8; MAX_HANDLE],
}

/// The handle of the inode that `file`, which may be `O_PATH`, stands for, and the number of the mount it is on.
pub(super) fn name_to_handle(file: BorrowedFd<'_>) -> Result<(FileHandle, u64), Errno> {
    let mut raw = RawHandle { len: MAX_HANDLE as c_uint, kind: 0, bytes: [0; MAX_HANDLE] };
    let mut mount: c_int = 0;
    // SAFETY: the path is a string, and the structure has room for as many bytes as it says.
    check(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut raw,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    })?;
    let bytes = raw.bytes.get(..raw.len as usize).ok_or(Errno::OVERFLOW)?.into();
    Ok((FileHandle { kind: raw.kind, bytes }, mount as u64))
}

/// Opens the file with this handle on the file system that `mount`, which is not `O_PATH`, is on.
pub(super) fn open_by_handle(
    mount: BorrowedFd<'_>,
    handle: &FileHandle,
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let mut raw = RawHandle { len: handle.bytes.len() as c_uint, kind: handle.kind, bytes: [0; MAX_HANDLE] };
    raw.bytes.get_mut(..handle.bytes.len()).ok_or(Errno::STALE)?.copy_from_slice(&handle.bytes);
    // SAFETY: the structure holds as many bytes as it says.
    let file = check(unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw const raw, flags.bits() as c_int)
    })?;
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(file as c_int) })
}
