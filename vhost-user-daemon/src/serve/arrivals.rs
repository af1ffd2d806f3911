//! The front ends of one socket, one after the other.

use std::io;
use std::mem::{self, Discriminant};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::error;

use super::ServeError;
use super::signals::{Signals, wait};
use crate::cli::chain;
use crate::info_limited;
use crate::socket::{ConnectError, Socket, Target};

/// How long to wait before accepting again when the process is out of file descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// How long after an attempt to connect the next one is made, whatever became of the first.
const CONNECT_RETRY: Duration = Duration::from_millis(500);

/// Waits for front ends.
pub(super) struct Arrivals<'a> {
    socket: &'a Socket,
    signals: &'a Signals,
    /// When the last front end was connected to, or nobody was there.
    last_attempt: Option<Instant>,
    /// The one connection of a [`Socket::Connected`] was given out.
    used_up: bool,
}

impl<'a> Arrivals<'a> {
    pub fn new(socket: &'a Socket, signals: &'a Signals) -> Self {
        Self { socket, signals, last_attempt: None, used_up: false }
    }

    /// Readable while another front end waits. Always `None` where they do not come by themselves.
    pub fn queue(&self) -> Option<BorrowedFd<'a>> {
        match self.socket {
            Socket::Listening(listener) => Some(listener.as_fd()),
            Socket::Connecting(_) | Socket::Connected(_) => None,
        }
    }

    /// Waits for the next front end. `None` when there will be none: the daemon has to end, or nobody else can come.
    pub fn next(&mut self) -> Result<Option<UnixStream>, ServeError> {
        match self.socket {
            Socket::Connected(_) if self.used_up => Ok(None),
            Socket::Connected(stream) => {
                self.used_up = true;
                stream.try_clone().map(Some).map_err(ServeError::Connection)
            }
            Socket::Listening(listener) => loop {
                if wait(&[self.signals.stopped(), listener.as_fd()], None).map_err(ServeError::Wait)?
                    == Some(0)
                {
                    return Ok(None);
                }
                match listener.accept() {
                    Ok((stream, _)) => return Ok(Some(stream)),
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                        ) => {}
                    Err(error) => {
                        error!("A front end cannot be accepted: {error}");
                        if self.stopped_within(ACCEPT_RETRY)? {
                            return Ok(None);
                        }
                    }
                }
            },
            Socket::Connecting(target) => self.connect(target),
        }
    }

    /// Connects to the front end as soon as it listens.
    fn connect(&mut self, target: &Target) -> Result<Option<UnixStream>, ServeError> {
        let mut known: Option<Discriminant<ConnectError>> = None;
        loop {
            // Also after a connection, which the front end may have closed at once.
            let pause =
                self.last_attempt.map_or(Duration::ZERO, |last| CONNECT_RETRY.saturating_sub(last.elapsed()));
            if self.stopped_within(pause)? {
                return Ok(None);
            }
            self.last_attempt = Some(Instant::now());
            match target.connect() {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) => {
                    let kind = mem::discriminant(&error);
                    if known.replace(kind) != Some(kind) {
                        info_limited!(
                            "Waiting for the front end, trying every {} ms: {}",
                            CONNECT_RETRY.as_millis(),
                            chain(&error)
                        );
                    }
                }
            }
        }
    }

    /// Waits, unless the daemon has to end.
    fn stopped_within(&self, time: Duration) -> Result<bool, ServeError> {
        let stopped = wait(&[self.signals.stopped()], Some(time)).map_err(ServeError::Wait)?;
        Ok(stopped.is_some())
    }
}
