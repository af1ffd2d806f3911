//! vhost-user frame by frame: anything can be sent, and replies are handed over as they are.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Version 1 of the protocol, in the flags of each header.
pub const FLAG_VERSION: u32 = 0x1;
/// The message is a reply.
pub const FLAG_REPLY: u32 = 0x4;
/// The sender wants an acknowledgement (after `REPLY_ACK` was negotiated).
pub const FLAG_NEED_REPLY: u32 = 0x8;

/// `VHOST_USER_SET_STATUS`, which the front end of the crate `vhost` cannot send.
pub const SET_STATUS: u32 = 39;
/// `VHOST_USER_GET_STATUS`, which the front end of the crate `vhost` cannot send.
pub const GET_STATUS: u32 = 40;

/// Longest time to wait for a reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Most file descriptors in a message.
const MAX_FDS: usize = 32;
/// Longest body that is taken from a daemon; a longer one is an error of the daemon.
const MAX_BODY: u32 = 4096;

/// A message as it came from the daemon.
#[derive(Debug)]
pub struct Message {
    /// The request that it is or answers.
    pub request: u32,
    /// The header's flags.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// File descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The body as one number, which most replies are.
    pub fn value(&self) -> io::Result<u64> {
        let bytes = <[u8; 8]>::try_from(self.body.as_slice())
            .map_err(|_| io::Error::other(format!("A body of {} bytes is no number", self.body.len())))?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// The front end's end of the socket.
#[derive(Debug)]
pub struct WireFrontend {
    socket: UnixStream,
}

impl WireFrontend {
    /// Connects to a daemon.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::from_stream(UnixStream::connect(path)?)
    }

    /// Takes over a connected socket.
    pub fn from_stream(socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(REPLY_TIMEOUT))?;
        socket.set_write_timeout(Some(REPLY_TIMEOUT))?;
        Ok(Self { socket })
    }

    /// Ends the connection for all who have it.
    pub fn close(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Both)
    }

    /// Whether messages that are not there yet are waited for.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        self.socket.set_nonblocking(on)
    }

    /// Sends any bytes, with file descriptors attached to the first of them.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::other(format!("{} file descriptors are too many", fds.len())));
            }
            sent +=
                sendmsg(&self.socket, &[IoSlice::new(&bytes[sent..])], &mut control, SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    /// Sends a message with a header that fits the body.
    pub fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&frame(request, flags, body.len() as u32, body), fds)
    }

    /// Receives the next message.
    pub fn receive(&self) -> io::Result<Message> {
        let mut fds = Vec::new();
        let mut header = [0; 12];
        self.receive_exactly(&mut header, &mut fds)?;
        let field =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let size = field(8);
        if size > MAX_BODY {
            return Err(io::Error::other(format!("A reply announces {size} bytes")));
        }
        let mut body = vec![0; size as usize];
        self.receive_exactly(&mut body, &mut fds)?;
        Ok(Message { request: field(0), flags: field(4), body, fds })
    }

    fn receive_exactly(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut buffer[filled..])];
            let received = recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            if received.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += received.bytes;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = message {
                    fds.extend(more);
                }
            }
        }
        Ok(())
    }

    /// Sends a request that has a reply of its own, and returns this.
    pub fn call(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<Message> {
        self.send(request, FLAG_VERSION, body, fds)?;
        self.reply_to(request)
    }

    /// Sends a request with `NEED_REPLY`, and returns the acknowledgement: zero is success.
    pub fn acknowledged(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<u64> {
        self.send(request, FLAG_VERSION | FLAG_NEED_REPLY, body, fds)?;
        self.reply_to(request)?.value()
    }

    fn reply_to(&self, request: u32) -> io::Result<Message> {
        let reply = self.receive()?;
        if reply.request == request && reply.flags & FLAG_REPLY != 0 {
            Ok(reply)
        } else {
            Err(io::Error::other(format!("Request {request} was answered by {reply:?}")))
        }
    }

    /// Waits until the daemon closes the connection; messages that arrive before are thrown away.
    pub fn wait_closed(&self) -> io::Result<()> {
        let mut rest = [0; 4096];
        loop {
            match (&self.socket).read(&mut rest) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// A message with a header that says `size`, whatever `body` is.
pub fn frame(request: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(12 + body.len());
    bytes.extend(request.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// The body of a `SET_VRING_NUM`, `SET_VRING_BASE`, `GET_VRING_BASE` or `SET_VRING_ENABLE`.
pub fn vring_state(index: u32, num: u32) -> Vec<u8> {
    [index.to_le_bytes(), num.to_le_bytes()].concat()
}

/// The body of a `GET_CONFIG` or `SET_CONFIG`.
pub fn config_body(offset: u32, size: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(12 + payload.len());
    for field in [offset, size, flags] {
        body.extend(field.to_le_bytes());
    }
    body.extend(payload);
    body
}
