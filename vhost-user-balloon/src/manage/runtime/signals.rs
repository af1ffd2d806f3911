//! The manager's signals, as file descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// SIGTERM and SIGINT, and SIGHUP.
pub(super) struct Signals {
    end: UnixStream,
    reload: UnixStream,
}

impl Signals {
    /// Catches the signals from now on.
    pub fn install() -> io::Result<Self> {
        let (end, end_sender) = UnixStream::pair()?;
        pipe::register(SIGINT, end_sender.try_clone()?)?;
        pipe::register(SIGTERM, end_sender)?;
        let (reload, reload_sender) = UnixStream::pair()?;
        pipe::register(SIGHUP, reload_sender)?;
        Ok(Self { end, reload })
    }

    /// Readable once the manager has to end.
    pub fn end(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Readable when the configuration is to be read again, until [`take_reload`](Self::take_reload).
    pub fn reload(&self) -> BorrowedFd<'_> {
        self.reload.as_fd()
    }

    /// Forgets the signals until now.
    pub fn take_reload(&self) {
        while !matches!(recv(&self.reload, &mut [0; 64], RecvFlags::DONTWAIT), Ok((0, _)) | Err(_)) {}
    }
}
