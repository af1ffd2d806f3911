//! Sockets that keep frames apart: one frame is one message.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{SocketAddrUnix, SocketType, bind};
use tempfile::TempPath;

use super::sys::{self, BATCH};
use super::{BUFFER, Counters, MAX_FRAME, MIN_FRAME, closed, socket, socket_to};

/// From the beginning of one slot to that of the next: an odd number of cache lines, so that the beginnings of all slots
/// do not compete for the same place in the cache.
const STRIDE: usize = (MAX_FRAME.div_ceil(64) | 1) * 64;

/// A connected socket, with what is to be sent and what was received.
#[derive(Debug)]
pub(super) struct Datagram {
    socket: OwnedFd,
    /// Where the socket is bound. Removed with it.
    _path: Option<TempPath>,
    /// Whether an empty message is the end of the connection.
    has_end: bool,
    ended: bool,
    output: Box<[u8]>,
    /// Frames in `output` that are to be sent: beginning and length.
    unsent: Vec<(usize, usize)>,
    reserved: Option<(usize, usize)>,
    slots: Box<[u8]>,
    /// Frames in `slots` that were not consumed: slot and length.
    unread: VecDeque<(usize, usize)>,
    /// What one call received. Kept for its memory.
    received: Vec<sys::Received>,
}

impl Datagram {
    fn new(socket: OwnedFd, path: Option<TempPath>, has_end: bool) -> Self {
        Self {
            socket,
            _path: path,
            has_end,
            ended: false,
            output: vec![0; BUFFER].into(),
            unsent: Vec::with_capacity(BATCH),
            reserved: None,
            // Pages of slots that are never filled so far are not there either.
            slots: vec![0; BATCH * STRIDE].into(),
            unread: VecDeque::with_capacity(BATCH),
            received: Vec::with_capacity(BATCH),
        }
    }

    /// A connection of messages (`SOCK_SEQPACKET`).
    pub(super) fn connect_seqpacket(path: &Path) -> io::Result<Self> {
        Ok(Self::new(socket_to(path, SocketType::SEQPACKET)?, None, true))
    }

    /// A datagram socket that the peer can answer to, as it has a path of its own.
    pub(super) fn connect_dgram(path: &Path) -> io::Result<Self> {
        // Connected first: at no time can anyone but the peer send to it.
        let socket = socket_to(path, SocketType::DGRAM)?;
        let own = bind_near(&socket, path)?;
        Ok(Self::new(socket, Some(own), false))
    }

    /// A datagram socket that is bound and connected.
    pub(super) fn adopt(socket: OwnedFd, path: TempPath) -> Self {
        Self::new(socket, Some(path), false)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn reserve(&mut self, len: usize) -> Option<&mut [u8]> {
        let start = self.unsent.last().map_or(0, |(start, len)| start + len);
        if self.unsent.len() == BATCH || start + len > BUFFER {
            return None;
        }
        self.reserved = Some((start, len));
        Some(&mut self.output[start..start + len])
    }

    pub(super) fn commit(&mut self) {
        self.unsent.extend(self.reserved.take());
    }

    /// Whether everything was sent; if not, the peer's queue is full.
    pub(super) fn flush(&mut self, counters: &mut Counters) -> io::Result<bool> {
        let mut done = 0;
        let result = loop {
            let unsent = &self.unsent[done..];
            if unsent.is_empty() {
                break Ok(true);
            }
            counters.tx_calls += 1;
            match sys::send_many(self.socket.as_fd(), &self.output, unsent) {
                Ok(sent) => {
                    counters.tx_frames += sent as u64;
                    done += sent;
                    // The next one was refused, mostly because the queue is full. If not, the next call tells.
                    if sent < unsent.len() {
                        break Ok(false);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => break Ok(false),
                    // Longer than the send buffer, or no memory for it. The socket would be called writable all the time,
                    // so to wait is no way out.
                    Some(libc::EMSGSIZE | libc::ENOBUFS | libc::ENOMEM) => {
                        counters.tx_dropped += 1;
                        done += 1;
                    }
                    _ => break Err(error),
                },
            }
        };
        self.unsent.drain(..done);
        // Room is at the end only.
        if let Some(&(base, _)) = self.unsent.first()
            && let Some(&(last, len)) = self.unsent.last()
            && base > 0
        {
            self.output.copy_within(base..last + len, 0);
            for (start, _) in &mut self.unsent {
                *start -= base;
            }
        }
        result
    }

    /// Frames that are not sent yet.
    pub(super) fn queued(&self) -> u64 {
        self.unsent.len() as u64
    }

    /// Whether anything came.
    pub(super) fn fill(&mut self, counters: &mut Counters) -> io::Result<bool> {
        if !self.unread.is_empty() {
            return Ok(true);
        }
        if self.ended {
            return Err(closed());
        }
        self.received.clear();
        counters.rx_calls += 1;
        let result = sys::receive_many(self.socket.as_fd(), &mut self.slots, STRIDE, &mut self.received);
        if let Err(error) = result {
            return match error.raw_os_error() {
                Some(libc::EINTR) => Ok(true),
                Some(libc::EAGAIN) => Ok(false),
                _ => Err(error),
            };
        }
        for (slot, received) in self.received.iter().enumerate() {
            if received.len == 0 && self.has_end {
                self.ended = true;
                break;
            }
            if received.truncated || !(MIN_FRAME..=MAX_FRAME).contains(&received.len) {
                counters.rx_dropped += 1;
            } else {
                self.unread.push_back((slot, received.len));
            }
        }
        if self.ended && self.unread.is_empty() {
            return Err(closed());
        }
        Ok(true)
    }

    pub(super) fn frame(&self) -> Option<&[u8]> {
        self.unread.front().map(|&(slot, len)| &self.slots[slot * STRIDE..][..len])
    }

    pub(super) fn consume(&mut self, counters: &mut Counters) {
        if self.unread.pop_front().is_some() {
            counters.rx_frames += 1;
        }
    }
}

/// Binds a datagram socket next to `path`, where whoever made that can find it, or else among the temporary files. The
/// peer has to be allowed to write to it: it belongs to the same user, or is root.
pub(super) fn bind_near(socket: &OwnedFd, path: &Path) -> io::Result<TempPath> {
    let bind_in = |directory: &Path| {
        // The peer may have another working directory.
        let directory = std::fs::canonicalize(directory)?;
        let bound = tempfile::Builder::new().prefix(".vhost-user-net-").make_in(directory, |path| {
            bind(socket, &SocketAddrUnix::new(path)?)?;
            Ok(())
        })?;
        Ok::<_, io::Error>(bound.into_temp_path())
    };
    let beside = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    bind_in(beside.unwrap_or(Path::new("."))).or_else(|_| bind_in(&std::env::temp_dir()))
}

/// A datagram socket without a name or a peer.
pub(super) fn unconnected() -> io::Result<OwnedFd> {
    socket(SocketType::DGRAM)
}
