//! Any bytes in any chain.

use std::io;
use std::time::Duration;

use super::client::Client;
use super::message::R;
use crate::driver::request::{Request, UNTOUCHED};

/// Longest time to wait for a chain.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A chain that the device has.
#[derive(Clone, Debug)]
pub struct Outstanding {
    /// Its head.
    pub head: u16,
    /// The addresses and lengths of the buffers for the device to write, in order.
    pub writable: Vec<(u64, usize)>,
}

/// A chain that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Returned {
    /// The used length.
    pub used: u32,
    /// All that the device could write to; [`UNTOUCHED`] is what was there before.
    pub data: Vec<u8>,
    /// How many requests were completed before, on this ring.
    pub sequence: u64,
}

impl Returned {
    /// The bytes that the device says that it wrote.
    pub fn written(&self) -> &[u8] {
        &self.data[..self.data.len().min(self.used as usize)]
    }

    /// The tag and message in them, if they are one.
    pub fn message(&self) -> Option<(u16, R<'_>)> {
        R::decode(self.written())
    }

    /// Whether nothing behind the used length was written to.
    pub fn is_clean(&self) -> bool {
        self.used as usize <= self.data.len()
            && self.data[self.used as usize..].iter().all(|&byte| byte == UNTOUCHED)
    }
}

/// A request of these bytes in one descriptor, with room for `room` bytes in another.
pub fn request(bytes: &[u8], room: usize) -> Request {
    Request {
        readable: bytes.to_vec(),
        readable_cuts: Vec::new(),
        writable: room,
        writable_cuts: Vec::new(),
        indirect: false,
        align: 1,
    }
}

impl Client {
    /// Sends a request in any descriptors.
    pub fn send_raw(&mut self, request: &Request) -> Outstanding {
        let (chain, writable) = self.ring().prepare(request);
        Outstanding { head: self.send_chain(&chain), writable }
    }

    /// Waits until it comes back.
    pub fn wait_raw(&mut self, outstanding: &Outstanding) -> io::Result<Returned> {
        self.wait_raw_timeout(outstanding, TIMEOUT).ok_or_else(|| {
            io::Error::new(io::ErrorKind::TimedOut, format!("A chain is kept: {}", self.ring().describe()))
        })
    }

    /// Waits until it comes back, `None` after `timeout`.
    pub fn wait_raw_timeout(&mut self, outstanding: &Outstanding, timeout: Duration) -> Option<Returned> {
        let (used, sequence) = self.wait_chain(outstanding.head, timeout)?;
        let memory = self.ring().memory();
        let data = outstanding.writable.iter().flat_map(|&(addr, len)| memory.read_vec(addr, len)).collect();
        Some(Returned { used, data, sequence })
    }

    /// Sends a request in any descriptors and waits until it comes back.
    pub fn exchange(&mut self, request: &Request) -> io::Result<Returned> {
        let outstanding = self.send_raw(request);
        self.wait_raw(&outstanding)
    }
}
