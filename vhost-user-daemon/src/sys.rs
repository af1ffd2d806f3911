//! The operations on raw file descriptors that no crate offers safely.
#![expect(unsafe_code, reason = "raw file descriptors")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Closes file descriptors that `vhost-user-backend` registers by number and forgets to close: one for each worker of
/// each connection.
pub(crate) fn close_forgotten(fds: Vec<RawFd>) {
    for fd in fds {
        // SAFETY: the crate gave up the ownership when it turned the object into a number, and the threads that waited
        // for it have ended.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

/// How many bytes sent on `socket` the other end has not read yet. Counts some of the kernel's own, too, so that only 0
/// says something by itself.
pub(crate) fn unread_bytes(socket: &impl AsRawFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes one integer, to where it is told.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { Ok(bytes.max(0) as usize) } else { Err(io::Error::last_os_error()) }
}
