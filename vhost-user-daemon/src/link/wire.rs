//! vhost-user messages on a unix stream socket: framing and file descriptors, nothing of their meaning.
//!
//! vhost-user text, section "Message Specification".

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The longest body that is accepted, as in the crate `vhost`.
const MAX_BODY: u32 = 4096;
/// The most file descriptors that one message carries.
const MAX_FDS: usize = 32;

const VERSION: u32 = 0x1;
const VERSION_MASK: u32 = 0x3;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;

/// The header of a message, in the byte order of the machine.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

/// One message, with the file descriptors that came along.
#[derive(Debug)]
pub(crate) struct Message {
    /// Number of the request.
    pub request: u32,
    /// The sender asks for an answer to a request that has none of its own.
    pub need_reply: bool,
    /// What follows the header.
    pub body: Vec<u8>,
    /// File descriptors in the ancillary data.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// A request without file descriptors.
    pub fn new(request: u32, body: impl Into<Vec<u8>>) -> Self {
        Self { request, need_reply: false, body: body.into(), fds: Vec::new() }
    }

    /// The body as a structure, if it has exactly that size.
    pub fn body_as<T: FromBytes>(&self) -> Option<T> {
        T::read_from_bytes(&self.body).ok()
    }

    /// Receives the next message, blocking. `None` when the other end closed the connection between two messages.
    pub fn receive(stream: &UnixStream) -> io::Result<Option<Self>> {
        let mut raw = [0; size_of::<Header>()];
        let mut fds = Vec::new();
        let first = receive_with_fds(stream, &mut raw, &mut fds)?;
        if first == 0 {
            return Ok(None);
        }
        receive_rest(stream, &mut raw[first..], &mut fds)?;
        let header: Header = zerocopy::transmute!(raw);
        if header.flags & VERSION_MASK != VERSION || header.size > MAX_BODY {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "Message {} with flags {:#x} and {} bytes",
                    header.request, header.flags, header.size
                ),
            ));
        }
        let mut body = vec![0; header.size as usize];
        receive_rest(stream, &mut body, &mut fds)?;
        Ok(Some(Self { request: header.request, need_reply: header.flags & FLAG_NEED_REPLY != 0, body, fds }))
    }

    /// Sends the message as a request.
    pub fn send(&self, stream: &UnixStream) -> io::Result<()> {
        send_with_fds(stream, &self.to_bytes(), &self.fds)
    }

    /// The message as a request, without its file descriptors.
    pub fn to_bytes(&self) -> Vec<u8> {
        let need_reply = if self.need_reply { FLAG_NEED_REPLY } else { 0 };
        encode(self.request, VERSION | need_reply, &self.body)
    }

    /// Sends a part of the bytes of a message.
    pub fn send_part(stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
        send_with_fds(stream, bytes, &[])
    }

    /// Sends `body` and `fds` as the reply to this request.
    pub fn reply(&self, stream: &UnixStream, body: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        send_with_fds(stream, &encode(self.request, VERSION | FLAG_REPLY, body), fds)
    }
}

/// Reads until `buf` is full.
fn receive_rest(stream: &UnixStream, mut buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
    while !buf.is_empty() {
        match receive_with_fds(stream, buf, fds)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => buf = &mut buf[len..],
        }
    }
    Ok(())
}

fn receive_with_fds(stream: &UnixStream, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(stream, &mut [IoSliceMut::new(buf)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("Message with more than {MAX_FDS} files"),
        ));
    }
    Ok(received.bytes)
}

fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let header = Header { request, flags, size: body.len() as u32 };
    [header.as_bytes(), body].concat()
}

fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut sent = 0;
    while sent < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !borrowed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match sendmsg(stream, &[IoSlice::new(&bytes[sent..])], &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => sent += result?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[test]
    fn a_message_arrives_whole_with_its_files() {
        let (left, right) = UnixStream::pair().unwrap();
        let mut sent = Message::new(12, vec![7; 4096]);
        sent.need_reply = true;
        sent.fds = (0..3).map(|_| OwnedFd::from(File::open("/dev/null").unwrap())).collect();
        sent.send(&left).unwrap();
        let received = Message::receive(&right).unwrap().unwrap();
        assert_eq!((received.request, received.need_reply), (12, true));
        assert_eq!(received.body, sent.body);
        assert_eq!(received.fds.len(), 3);
        drop(left);
        assert!(Message::receive(&right).unwrap().is_none());
    }

    #[test]
    fn a_message_may_arrive_byte_by_byte() {
        let (mut left, right) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            for byte in [3u32, VERSION, 2].as_bytes().iter().chain(&[8, 9]) {
                left.write_all(&[*byte]).unwrap();
            }
        });
        assert_eq!(Message::receive(&right).unwrap().unwrap().body, [8, 9]);
        writer.join().unwrap();
    }

    #[test]
    fn nonsense_is_an_error() {
        for header in [[1, 0x2, 0], [1, VERSION, MAX_BODY + 1]] {
            let (mut left, right) = UnixStream::pair().unwrap();
            left.write_all(header.as_bytes()).unwrap();
            assert_eq!(Message::receive(&right).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&[1, 0, 0]).unwrap();
        drop(left);
        assert_eq!(Message::receive(&right).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
