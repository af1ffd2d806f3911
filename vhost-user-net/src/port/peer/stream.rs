//! QEMU's stream protocol: a big-endian length of 32 bits in front of each frame.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send};

use super::{BUFFER, Counters, MAX_FRAME, MIN_FRAME, closed, socket_to};

/// Bytes of the length.
const PREFIX: usize = 4;

/// A connection, with what is to be sent and what was received.
#[derive(Debug)]
pub(super) struct Stream {
    socket: OwnedFd,
    output: Box<[u8]>,
    /// The part of `output` that is to be sent. It may begin within a frame.
    unsent: std::ops::Range<usize>,
    /// Bytes reserved after it.
    reserved: usize,
    /// Frames in `output` since it was empty.
    queued: u64,
    input: Box<[u8]>,
    /// The part of `input` that was received and not consumed. It begins with a length.
    unread: std::ops::Range<usize>,
}

impl Stream {
    pub(super) fn connect(path: &std::path::Path) -> io::Result<Self> {
        Ok(Self {
            socket: socket_to(path, SocketType::STREAM)?,
            output: vec![0; BUFFER].into(),
            unsent: 0..0,
            reserved: 0,
            queued: 0,
            input: vec![0; BUFFER].into(),
            unread: 0..0,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn reserve(&mut self, len: usize) -> Option<&mut [u8]> {
        let room = PREFIX + len;
        if self.unsent.end + room > BUFFER {
            if self.unsent.len() + room > BUFFER {
                return None;
            }
            self.output.copy_within(self.unsent.clone(), 0);
            self.unsent = 0..self.unsent.len();
        }
        self.reserved = room;
        let (prefix, frame) = self.output[self.unsent.end..][..room].split_at_mut(PREFIX);
        prefix.copy_from_slice(&(len as u32).to_be_bytes());
        Some(frame)
    }

    pub(super) fn commit(&mut self) {
        self.unsent.end += self.reserved;
        self.queued += u64::from(self.reserved > 0);
        self.reserved = 0;
    }

    /// Whether everything was sent; if not, the socket is full.
    pub(super) fn flush(&mut self, counters: &mut Counters) -> io::Result<bool> {
        while !self.unsent.is_empty() {
            counters.tx_calls += 1;
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.socket, &self.output[self.unsent.clone()], flags) {
                Ok(sent) => self.unsent.start += sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        counters.tx_frames += self.queued;
        self.queued = 0;
        self.unsent = 0..0;
        Ok(true)
    }

    /// Frames that are not sent yet, or not known to be.
    pub(super) fn queued(&self) -> u64 {
        self.queued
    }

    /// Whether anything came.
    pub(super) fn fill(&mut self, counters: &mut Counters) -> io::Result<bool> {
        if let Some(len) = self.next_len().filter(|len| !is_possible(*len)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("frame length {len} is impossible, the stream is out of step"),
            ));
        }
        if self.unread.start > 0 {
            self.input.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        if self.unread.end == BUFFER {
            // Frames that the caller left, as one alone does not fill the buffer.
            return Ok(true);
        }
        counters.rx_calls += 1;
        match recv(&self.socket, &mut self.input[self.unread.end..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) if self.frame().is_none() => Err(closed()),
            Ok((_, received)) => {
                self.unread.end += received;
                Ok(true)
            }
            Err(Errno::INTR) => Ok(true),
            Err(Errno::AGAIN) => Ok(self.frame().is_some()),
            Err(error) => Err(error.into()),
        }
    }

    /// The length at the beginning of the unread part.
    fn next_len(&self) -> Option<usize> {
        let prefix = self.input[self.unread.clone()].first_chunk::<PREFIX>()?;
        Some(u32::from_be_bytes(*prefix) as usize)
    }

    pub(super) fn frame(&self) -> Option<&[u8]> {
        let len = self.next_len().filter(|len| is_possible(*len))?;
        self.input[self.unread.clone()].get(PREFIX..PREFIX + len)
    }

    pub(super) fn consume(&mut self, counters: &mut Counters) {
        if let Some(frame) = self.frame() {
            self.unread.start += PREFIX + frame.len();
            counters.rx_frames += 1;
        }
    }
}

fn is_possible(len: usize) -> bool {
    (MIN_FRAME..=MAX_FRAME).contains(&len)
}
