//! Frames on an interface, past every protocol: sent in large numbers, and looked at as they pass.
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::sys;
use crate::frames::{HEADER_LEN, Header};

/// Packets for each system call.
const BATCH: usize = 32;
/// Room for the longest frame that passes an interface.
const MAX_FRAME: usize = HEADER_LEN + (1 << 17);

/// A frame that passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// Its header.
    pub header: Header,
    /// The frame.
    pub frame: Vec<u8>,
    /// Whether the interface sent it; otherwise it received it.
    pub outgoing: bool,
}

/// A packet socket on one interface.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
}

impl PacketSocket {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends one frame.
    pub fn send(&self, header: Header, frame: &[u8]) -> Result<()> {
        ensure!(
            self.blast(header, &[frame.to_vec()], 1, Duration::from_secs(10))? == 1,
            "A frame was not sent"
        );
        Ok(())
    }

    /// Sends the frames over and over, until there were `count` of them or `limit` has passed; returns how many.
    pub fn blast(&self, header: Header, frames: &[Vec<u8>], count: u64, limit: Duration) -> Result<u64> {
        let packets: Vec<Vec<u8>> =
            frames.iter().map(|frame| [&header.bytes()[..], frame].concat()).collect();
        let mut around = packets.iter().map(Vec::as_slice).cycle();
        let deadline = Instant::now() + limit;
        let mut sent = 0;
        while sent < count && Instant::now() < deadline {
            let batch: Vec<&[u8]> = around.by_ref().take(BATCH.min((count - sent) as usize)).collect();
            let mut rest = &batch[..];
            while !rest.is_empty() && Instant::now() < deadline {
                match sys::send_many(self.socket.as_fd(), rest) {
                    Ok(taken) => {
                        sent += taken as u64;
                        rest = &rest[taken..];
                    }
                    // The interface's queue is full.
                    Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)) => {
                        std::thread::sleep(Duration::from_micros(50));
                    }
                    Err(error) => return Err(error).context("Cannot send to a packet socket"),
                }
            }
        }
        Ok(sent)
    }

    /// The next frame that passes within `limit`.
    pub fn receive(&self, limit: Duration) -> Result<Option<Passed>> {
        let mut buffer = vec![0; MAX_FRAME];
        let deadline = Instant::now() + limit;
        loop {
            match sys::receive(self.socket.as_fd(), &mut buffer) {
                Ok((len, outgoing)) => {
                    ensure!(len >= HEADER_LEN, "A packet of {len} bytes has no header");
                    let header = Header::parse(&buffer);
                    return Ok(Some(Passed { header, frame: buffer[HEADER_LEN..len].to_vec(), outgoing }));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("Cannot receive from a packet socket"),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout =
                Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("Cannot wait for a packet"),
            }
        }
    }

    /// Waits for a frame of which `wanted` is true, throwing away others; `None` if there is none within `limit`.
    pub fn find(&self, limit: Duration, mut wanted: impl FnMut(&Passed) -> bool) -> Result<Option<Passed>> {
        let deadline = Instant::now() + limit;
        while let Some(passed) = self.receive(deadline.saturating_duration_since(Instant::now()))? {
            if wanted(&passed) {
                return Ok(Some(passed));
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Ok(None)
    }

    /// Throws away what has passed so far.
    pub fn drain(&self) -> Result<()> {
        while self.receive(Duration::ZERO)?.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::{Namespace, open};
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn a_tap_passes_what_both_sides_send() {
        let namespace = Namespace::new().unwrap();
        let options = open::TapOptions { queues: 2, multi_queue: true, ..Default::default() };
        let taps = open::tap(&namespace, "tap0", options).unwrap();
        assert_eq!(taps.len(), 2);
        namespace.sysctl("net.ipv6.conf.tap0.disable_ipv6", "1").unwrap();
        namespace.ip("link set tap0 up").unwrap();
        let socket = open::packet(&namespace, "tap0").unwrap();

        let frame = |first: u8| [&[first; 12][..], &[0x88, 0xb5], &[7; 50]].concat();
        let mut tap = std::fs::File::from(taps.into_iter().next().unwrap());
        tap.write_all(&[&[0; 12][..], &frame(2)].concat()).unwrap();
        let passed = socket.receive(LIMIT).unwrap().unwrap();
        assert_eq!(passed, Passed { header: Header::default(), frame: frame(2), outgoing: false });

        drop(socket);
        // With the other queue closed, this one gets everything.
        let socket = open::packet(&namespace, "tap0").unwrap();
        assert_eq!(socket.blast(Header::default(), &[frame(4), frame(6)], 100, LIMIT).unwrap(), 100);
        let mut buffer = [0; 100];
        for first in [4, 6, 4] {
            let len = tap.read(&mut buffer).unwrap();
            assert_eq!(buffer[12..len], frame(first));
        }
        // A tap counts what was read.
        assert_eq!(namespace.counters("tap0").unwrap().tx_packets, 3);
    }

    #[test]
    fn a_tap_of_other_queues_cannot_be_opened() {
        let namespace = Namespace::new().unwrap();
        namespace.add_tap("tap0", 1).unwrap();
        let options = open::TapOptions { multi_queue: true, ..Default::default() };
        let error = open::tap(&namespace, "tap0", options).unwrap_err().to_string();
        assert!(error.contains("Invalid argument"), "{error}");
    }
}
