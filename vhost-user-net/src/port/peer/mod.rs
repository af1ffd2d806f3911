//! A user-mode network stack, or a switch, on a UNIX socket. Frames are complete, without a virtio-net header.
//!
//! Many frames pass in one system call. To send, frames are collected in a private buffer by [`Peer::reserve`] and
//! [`Peer::commit`], and go out by [`Peer::flush`]. To receive, [`Peer::fill`] fetches what has come, and
//! [`Peer::frame`] and [`Peer::consume`] give one after the other.

mod datagram;
mod stream;
mod sys;
#[cfg(test)]
mod tests;
mod vde;

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
use vhost_user_daemon::{info_limited, warn_limited};

use datagram::Datagram;
use stream::Stream;

/// Bytes of the shortest frame: an Ethernet header.
pub const MIN_FRAME: usize = 14;
/// Bytes of the longest frame: an Ethernet header, a VLAN tag, and the longest IP packet.
pub const MAX_FRAME: usize = 14 + 4 + 65535;

/// Time between two attempts to connect.
const RETRY: Duration = Duration::from_secs(1);
/// Time after which a switch that has not answered is looked at again; it doubles up to [`LONGEST_LOOK`].
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LONGEST_LOOK: Duration = Duration::from_millis(64);

/// Bytes collected for one call, or received by one call of a stream. Holds any frame.
const BUFFER: usize = 256 << 10;
/// What is asked for as a socket's buffers; the kernel cuts it to its limits. As vfkit and gvproxy have it.
const SEND_BUFFER: usize = 1 << 20;
const RECEIVE_BUFFER: usize = 4 << 20;

/// Where a peer is, and how it keeps frames apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// QEMU's stream protocol (`-netdev stream`): passt, gvproxy `-listen-qemu`, socket_vmnet.
    Stream(PathBuf),
    /// `SOCK_SEQPACKET`, one frame a message: slirp4netns `--target-type=bess`, gvproxy `-listen-bess`.
    Seqpacket(PathBuf),
    /// `SOCK_DGRAM`, one frame a datagram: gvproxy `-listen-vfkit`, `-netdev dgram`. Our own socket is bound next to the
    /// peer's, or in the temporary directory if that may not be written to.
    Dgram(PathBuf),
    /// A VDE switch: its directory, or the socket `ctl` in it.
    Vde(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(path) => write!(f, "stream socket {}", path.display()),
            Self::Seqpacket(path) => write!(f, "seqpacket socket {}", path.display()),
            Self::Dgram(path) => write!(f, "datagram socket {}", path.display()),
            Self::Vde(path) => write!(f, "VDE switch {}", path.display()),
        }
    }
}

/// How [`Peer::flush`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything was sent.
    Done,
    /// The rest waits: flush again when the descriptor is writable.
    Blocked,
    /// There is no connection (any more). What was not sent is dropped.
    Disconnected,
}

/// How [`Peer::fill`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Something came, mostly frames. There may be more: fill again after they are consumed.
    Some,
    /// Nothing is there: fill again when the descriptor is readable.
    Empty,
    /// There is no connection (any more).
    Disconnected,
}

/// What a peer was used for, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames handed to the kernel.
    pub tx_frames: u64,
    /// System calls that sent, or tried to.
    pub tx_calls: u64,
    /// Frames that were committed and did not go out, or not completely, as the connection ended or the kernel refused one.
    pub tx_dropped: u64,
    /// Frames consumed.
    pub rx_frames: u64,
    /// System calls that received, or tried to.
    pub rx_calls: u64,
    /// Messages dropped because they were too short or too long for a frame.
    pub rx_dropped: u64,
    /// Connections made.
    pub connections: u64,
}

/// One peer, for one worker. Nothing here blocks.
#[derive(Debug)]
pub struct Peer {
    address: Address,
    link: Link,
    /// When to try to connect, or to look for an answer, if there is no connection.
    retry_at: Instant,
    /// Whether the log knows that there is no connection.
    told: bool,
    counters: Counters,
}

/// The state of the connection.
#[derive(Debug)]
enum Link {
    None,
    /// A switch was asked.
    Handshake {
        handshake: vde::Handshake,
        deadline: Instant,
        wait: Duration,
    },
    Stream(Stream),
    Datagram(Datagram, Option<vde::Control>),
}

impl Peer {
    /// A peer that is not connected yet.
    pub fn new(address: Address) -> Self {
        Self {
            address,
            link: Link::None,
            retry_at: Instant::now(),
            told: false,
            counters: Counters::default(),
        }
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Connects if there is no connection and it is time to ([`next_retry`](Self::next_retry)). Returns whether there is a
    /// connection; it may be a new one, with another descriptor.
    ///
    /// Attempts are a second apart. The log tells the first that fails in a row, and when there is a connection again.
    pub fn connect(&mut self, now: Instant) -> bool {
        if !self.is_connected() && now >= self.retry_at {
            match self.attempt(now) {
                Ok(Link::Handshake { handshake, deadline, wait }) => {
                    self.retry_at = now + wait;
                    let wait = (wait * 2).min(LONGEST_LOOK);
                    self.link = Link::Handshake { handshake, deadline, wait };
                }
                Ok(link) => {
                    self.link = link;
                    self.told = false;
                    self.retry_at = now + RETRY;
                    self.counters.connections += 1;
                    info_limited!("Connected to {}", self.address);
                }
                Err(error) => {
                    self.retry_at = now + RETRY;
                    if !self.told {
                        self.told = true;
                        warn_limited!(
                            "Cannot connect to {}: {error}; trying again every second",
                            self.address
                        );
                    }
                }
            }
        }
        self.is_connected()
    }

    /// One step to a connection. Takes what was there before.
    fn attempt(&mut self, now: Instant) -> io::Result<Link> {
        let (handshake, deadline, wait) = match (std::mem::replace(&mut self.link, Link::None), &self.address)
        {
            (Link::Handshake { handshake, deadline, wait }, _) => (handshake, deadline, wait),
            (_, Address::Stream(path)) => return Stream::connect(path).map(Link::Stream),
            (_, Address::Seqpacket(path)) => {
                return Datagram::connect_seqpacket(path).map(|datagram| Link::Datagram(datagram, None));
            }
            (_, Address::Dgram(path)) => {
                return Datagram::connect_dgram(path).map(|datagram| Link::Datagram(datagram, None));
            }
            (_, Address::Vde(path)) => (vde::Handshake::start(path)?, now + RETRY, FIRST_LOOK),
        };
        match handshake.finish()? {
            Ok((control, datagram)) => Ok(Link::Datagram(datagram, Some(control))),
            Err(_) if now >= deadline => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer")),
            Err(handshake) => Ok(Link::Handshake { handshake, deadline, wait }),
        }
    }

    /// Whether there is a connection, as far as is known.
    pub fn is_connected(&self) -> bool {
        matches!(self.link, Link::Stream(_) | Link::Datagram(..))
    }

    /// When to call [`connect`](Self::connect), if there is no connection.
    pub fn next_retry(&self) -> Option<Instant> {
        (!self.is_connected()).then_some(self.retry_at)
    }

    /// The descriptor to wait on: readable to [`fill`](Self::fill), writable to [`flush`](Self::flush) what was blocked.
    /// Each connection has another one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::None | Link::Handshake { .. } => None,
            Link::Stream(stream) => Some(stream.fd()),
            Link::Datagram(datagram, _) => Some(datagram.fd()),
        }
    }

    /// A second descriptor of a connection to a VDE switch, on which nothing is sent: when it is readable, the switch has
    /// gone, and [`fill`](Self::fill) will find out.
    pub fn control_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Datagram(_, Some(control)) => Some(control.fd()),
            _ => None,
        }
    }

    /// Room for one frame of `len` bytes, whose content is undefined, at the end of those to be sent. `None` if it is full
    /// and must be [flushed](Self::flush) first, if there is no connection, or if `len` is not
    /// [`MIN_FRAME`]..=[`MAX_FRAME`]. Any possible length finds room after a flush that was [`Flush::Done`].
    pub fn reserve(&mut self, len: usize) -> Option<&mut [u8]> {
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            return None;
        }
        match &mut self.link {
            Link::None | Link::Handshake { .. } => None,
            Link::Stream(stream) => stream.reserve(len),
            Link::Datagram(datagram, _) => datagram.reserve(len),
        }
    }

    /// The frame that was reserved last is complete and will be sent.
    pub fn commit(&mut self) {
        match &mut self.link {
            Link::None | Link::Handshake { .. } => {}
            Link::Stream(stream) => stream.commit(),
            Link::Datagram(datagram, _) => datagram.commit(),
        }
    }

    /// Sends the frames that were committed. A stream that takes only part of a frame gets the rest next time.
    pub fn flush(&mut self) -> Flush {
        let result = match &mut self.link {
            Link::None | Link::Handshake { .. } => return Flush::Disconnected,
            Link::Stream(stream) => stream.flush(&mut self.counters),
            Link::Datagram(datagram, _) => datagram.flush(&mut self.counters),
        };
        match result {
            Ok(true) => Flush::Done,
            Ok(false) => Flush::Blocked,
            Err(error) => {
                self.disconnect(&error);
                Flush::Disconnected
            }
        }
    }

    /// Receives what has come, by at most one system call.
    pub fn fill(&mut self) -> Fill {
        let result = match &mut self.link {
            Link::None | Link::Handshake { .. } => return Fill::Disconnected,
            Link::Stream(stream) => stream.fill(&mut self.counters),
            Link::Datagram(datagram, control) => datagram.fill(&mut self.counters).and_then(|some| {
                // Datagrams tell nothing of the end of the switch.
                if !some && let Some(control) = control {
                    control.check()?;
                }
                Ok(some)
            }),
        };
        match result {
            Ok(true) => Fill::Some,
            Ok(false) => Fill::Empty,
            Err(error) => {
                self.disconnect(&error);
                Fill::Disconnected
            }
        }
    }

    /// The next complete frame that was received.
    pub fn frame(&self) -> Option<&[u8]> {
        match &self.link {
            Link::None | Link::Handshake { .. } => None,
            Link::Stream(stream) => stream.frame(),
            Link::Datagram(datagram, _) => datagram.frame(),
        }
    }

    /// Gives up the frame that [`frame`](Self::frame) returned.
    pub fn consume(&mut self) {
        match &mut self.link {
            Link::None | Link::Handshake { .. } => {}
            Link::Stream(stream) => stream.consume(&mut self.counters),
            Link::Datagram(datagram, _) => datagram.consume(&mut self.counters),
        }
    }

    /// What it was used for.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Ends the connection. The next attempt is due a second after the last one.
    fn disconnect(&mut self, error: &io::Error) {
        self.counters.tx_dropped += match &self.link {
            Link::None | Link::Handshake { .. } => 0,
            Link::Stream(stream) => stream.queued(),
            Link::Datagram(datagram, _) => datagram.queued(),
        };
        self.link = Link::None;
        warn_limited!("Lost {}: {error}; connecting again", self.address);
    }
}

/// The peer ended the connection.
fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection")
}

/// A UNIX socket with large buffers.
fn socket(kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, kind, flags, None)?;
    sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER)?;
    sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER)?;
    Ok(socket)
}

/// A socket that is connected to the one at `path`. UNIX sockets connect at once, or not at all.
fn socket_to(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = socket(kind)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
