//! The one step of taking over an inherited file descriptor that the compiler cannot check.
#![expect(unsafe_code, reason = "a number becomes an owned file descriptor here")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// The first number after stdin, stdout and stderr, which belong to the standard library.
const FIRST: RawFd = 3;

/// Why a number is not that of an inherited file descriptor.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// One of the standard streams.
    #[error("File descriptor {fd} is a standard stream: pass one from {FIRST} up")]
    Standard {
        /// The number.
        fd: RawFd,
    },

    /// Nothing is open at this number.
    #[error("File descriptor {fd} is not open: let the program that starts the daemon pass it on")]
    NotOpen {
        /// The number.
        fd: RawFd,
    },

    /// The daemon opened the file itself, or took it over before.
    #[error("File descriptor {fd} is already used by the daemon: pass each one for a single purpose")]
    Taken {
        /// The number.
        fd: RawFd,
    },

    /// The descriptor cannot be marked close-on-exec.
    #[error("Cannot take over file descriptor {fd}")]
    TakeOver {
        /// The number.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
}

/// Takes over a file descriptor that the daemon's parent passed by number, and marks it close-on-exec.
///
/// An inherited descriptor never has the close-on-exec flag, or `exec` would have closed it, while what the daemon
/// opens itself always has. So the flag tells whether a number is free to be taken, and a second attempt fails.
/// Call it early all the same: whoever opens files without the flag defeats the check.
pub fn inherited_fd(fd: RawFd) -> Result<OwnedFd, InheritError> {
    /// Makes the test of the flag and its setting one step.
    static TAKING: Mutex<()> = Mutex::new(());

    if fd < FIRST {
        return Err(InheritError::Standard { fd });
    }
    let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: F_GETFD touches no memory, and a closed descriptor is an error that is handled.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(InheritError::NotOpen { fd });
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(InheritError::Taken { fd });
    }
    // SAFETY: F_SETFD touches no memory, and nobody in this process owns the descriptor whose flag it changes.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(InheritError::TakeOver { fd, source: io::Error::last_os_error() });
    }
    // SAFETY: the descriptor is open. It came from the parent, as it had no close-on-exec flag, and it was not taken
    // before, as that would have set the flag; the mutex excludes a race. So this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn an_inherited_descriptor_is_taken_once() {
        let file = tempfile::tempfile().unwrap();
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        let number = file.into_raw_fd();
        let taken = inherited_fd(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert_eq!(fcntl_getfd(&taken).unwrap(), FdFlags::CLOEXEC);
        assert!(matches!(inherited_fd(number), Err(InheritError::Taken { .. })));
    }

    #[test]
    fn other_numbers_are_refused() {
        for fd in [-1, 0, 1, 2] {
            assert!(matches!(inherited_fd(fd), Err(InheritError::Standard { .. })));
        }
        assert!(matches!(inherited_fd(RawFd::MAX), Err(InheritError::NotOpen { .. })));
        let own = tempfile::tempfile().unwrap();
        assert!(matches!(inherited_fd(own.as_raw_fd()), Err(InheritError::Taken { .. })));
    }
}
