//! The operations on raw file descriptors that no crate offers safely.
#![expect(unsafe_code, reason = "ownership of raw file descriptors")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Closes file descriptors that `vhost-user-backend` registers by number and forgets to close: one for each worker of
/// each connection.
pub(crate) fn close_forgotten(fds: Vec<RawFd>) {
    for fd in fds {
        // SAFETY: the crate gave up the ownership when it turned the object into a number, and the threads that waited
        // for it have ended.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}
