//! Positioned reads and writes between files and memory that may be shared with a guest.
#![expect(unsafe_code, reason = "system calls on raw guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{c_int, iovec};

/// Reads into `buffers` from `offset` on, at most `UIO_MAXIOV` of them. Returns the bytes read, 0 at the end of file.
///
/// `flags` are those of preadv2(2), such as `RWF_NOWAIT`.
///
/// # Safety
/// The buffers must be mapped. They may be shared with others.
pub unsafe fn preadv(file: impl AsFd, buffers: &[iovec], offset: u64, flags: c_int) -> io::Result<usize> {
    // SAFETY: as promised by the caller.
    let result = unsafe {
        libc::preadv2(
            file.as_fd().as_raw_fd(),
            buffers.as_ptr(),
            buffers.len() as c_int,
            offset as i64,
            flags,
        )
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Writes `buffers` at `offset`, at most `UIO_MAXIOV` of them. Returns the bytes written.
///
/// `flags` are those of pwritev2(2), such as `RWF_DSYNC`.
///
/// # Safety
/// As for [`preadv`].
pub unsafe fn pwritev(file: impl AsFd, buffers: &[iovec], offset: u64, flags: c_int) -> io::Result<usize> {
    // SAFETY: as promised by the caller.
    let result = unsafe {
        libc::pwritev2(
            file.as_fd().as_raw_fd(),
            buffers.as_ptr(),
            buffers.len() as c_int,
            offset as i64,
            flags,
        )
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
