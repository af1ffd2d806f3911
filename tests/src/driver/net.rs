//! A network interface driven by hand: frames in chains of any shape, and every mistake that a driver can make.
//!
//! A pair of queues is an [`Rx`] and a [`Tx`], which can go to threads of their own. What is sent is a
//! [`Request`], so its header and frame can be cut into descriptors anywhere; what is received may be spread over
//! buffers of any size.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::raw::{RawDevice, RawOptions};
use super::request::{Outcome, Request, UNTOUCHED};
use super::ring::{DESC_LEN, Desc, INDIRECT, RawRing, linked};
use crate::frames::{HEADER_LEN, Header};

/// The length of the header since virtio 1.0: the legacy one and the number of buffers.
pub const LONG_HEADER_LEN: usize = HEADER_LEN + 2;
/// Longest time to wait for a frame that will come.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Control queue: the command was done.
pub const CONTROL_OK: u8 = 0;
/// Control queue: it was not.
pub const CONTROL_ERR: u8 = 1;

/// The config space of a network device (virtio 1.3, 5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The interface's address.
    pub mac: [u8; 6],
    /// 1: the link is up. 2: announce yourself.
    pub status: u16,
    /// Most pairs of queues.
    pub max_queue_pairs: u16,
    /// The largest packet.
    pub mtu: u16,
    /// In megabits a second.
    pub speed: u32,
    /// 1: full duplex.
    pub duplex: u8,
}

impl NetConfig {
    /// The length of these fields.
    pub const LEN: u32 = 17;

    /// Reads the fields.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let short = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        Some(Self {
            mac: *bytes.first_chunk()?,
            status: short(6)?,
            max_queue_pairs: short(8)?,
            mtu: short(10)?,
            speed: u32::from_le_bytes(*bytes.get(12..)?.first_chunk()?),
            duplex: *bytes.get(16)?,
        })
    }
}

/// A connected interface; its queues are started one by one.
pub struct RawNet {
    /// The device.
    pub device: RawDevice,
}

impl RawNet {
    /// Connects and negotiates.
    pub fn connect(socket: &Path, options: &RawOptions) -> io::Result<Self> {
        Ok(Self { device: RawDevice::connect(socket, options)? })
    }

    /// Whether a frame may come in several chains.
    fn is_mergeable(&self) -> bool {
        self.device.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// The length of the header of each frame, as it was negotiated.
    pub fn header_len(&self) -> usize {
        if self.device.has(VIRTIO_F_VERSION_1) || self.is_mergeable() { LONG_HEADER_LEN } else { HEADER_LEN }
    }

    /// Starts the receive queue of a pair, which has no buffers at first.
    pub fn rx(&mut self, pair: usize, size: u16) -> io::Result<Rx> {
        let rx = self.lay_out_rx(pair, size)?;
        self.device.start(2 * pair, &rx.ring)?;
        Ok(rx)
    }

    /// Prepares the receive queue of a pair, without a word to the daemon: for buffers that are there before
    /// [`RawDevice::start`].
    pub fn lay_out_rx(&self, pair: usize, size: u16) -> io::Result<Rx> {
        let ring = self.device.lay_out(2 * pair, RawDevice::default_placement(2 * pair, size))?;
        Ok(Rx {
            ring,
            header_len: self.header_len(),
            is_mergeable: self.is_mergeable(),
            posted: HashMap::new(),
        })
    }

    /// Starts the transmit queue of a pair.
    pub fn tx(&mut self, pair: usize, size: u16) -> io::Result<Tx> {
        let ring = self.device.ring(2 * pair + 1, size)?;
        Ok(Tx { ring, header_len: self.header_len() })
    }

    /// Starts both queues of a pair, the receive queue with `buffers` buffers that hold the longest frame of an
    /// Ethernet.
    pub fn pair(&mut self, pair: usize, size: u16, buffers: u16) -> io::Result<(Rx, Tx)> {
        let mut rx = self.rx(pair, size)?;
        for _ in 0..buffers {
            rx.post(&[2048]);
        }
        rx.ring.kick();
        Ok((rx, self.tx(pair, size)?))
    }

    /// Starts the control queue, which is behind those of `pairs` pairs.
    pub fn control(&mut self, pairs: usize, size: u16) -> io::Result<RawRing> {
        self.device.ring(2 * pairs, size)
    }

    /// Reads the config space.
    pub fn config(&mut self) -> io::Result<NetConfig> {
        let bytes = self.device.config(0, NetConfig::LEN)?;
        NetConfig::parse(&bytes).ok_or_else(|| io::Error::other("The config space is too short"))
    }
}

/// A command for the control queue (virtio 1.3, 5.1.6.5); its [`Outcome`]'s status is the acknowledgement.
pub fn control_command(class: u8, command: u8, data: &[u8]) -> Request {
    Request {
        readable: [&[class, command], data].concat(),
        readable_cuts: vec![2],
        writable: 1,
        writable_cuts: Vec::new(),
        indirect: false,
        align: 1,
    }
}

/// A frame that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its header.
    pub header: Header,
    /// The header's number of buffers, if it has this field.
    pub num_buffers: Option<u16>,
    /// The frame.
    pub frame: Vec<u8>,
    /// The used length of each chain that it came in.
    pub used: Vec<u32>,
}

/// A receive queue.
pub struct Rx {
    /// The ring.
    pub ring: RawRing,
    header_len: usize,
    is_mergeable: bool,
    posted: HashMap<u16, Vec<(u64, usize)>>,
}

impl Rx {
    /// Publishes a chain of buffers of these sizes; [`RawRing::kick`] tells the device. Returns its head.
    pub fn post(&mut self, sizes: &[usize]) -> u16 {
        let buffers = self.buffers(sizes);
        let head = self.ring.add_chain(&chain_of(&buffers));
        self.posted.insert(head, buffers);
        head
    }

    /// The same in an indirect table.
    pub fn post_indirect(&mut self, sizes: &[usize]) -> u16 {
        let buffers = self.buffers(sizes);
        let table = self.ring.write_indirect(&chain_of(&buffers));
        let desc = Desc::readable(table, (sizes.len() * DESC_LEN) as u32).with(INDIRECT);
        let head = self.ring.add_chain(&[desc]);
        self.posted.insert(head, buffers);
        head
    }

    /// Publishes a chain exactly as it is, of which [`Rx::receive`] knows nothing.
    pub fn post_raw(&mut self, chain: &[Desc]) -> u16 {
        self.ring.add_chain(chain)
    }

    fn buffers(&mut self, sizes: &[usize]) -> Vec<(u64, usize)> {
        let alloc = |&size: &usize| {
            let address = self.ring.arena.alloc(size, 2);
            self.ring.memory().write(address, &vec![UNTOUCHED; size]);
            (address, size)
        };
        sizes.iter().map(alloc).collect()
    }

    /// The buffers of a chain that is not back yet.
    pub fn posted(&self, head: u16) -> Option<&[(u64, usize)]> {
        self.posted.get(&head).map(Vec::as_slice)
    }

    /// The next frame; `None` if there is none in time, or not all of it.
    pub fn receive(&mut self, timeout: Duration) -> io::Result<Option<Received>> {
        let deadline = Instant::now() + timeout;
        let Some((mut bytes, first)) = self.next_chain(deadline)? else {
            return Ok(None);
        };
        if bytes.len() < self.header_len {
            return Err(io::Error::other(format!("{first} bytes came, which are less than a header")));
        }
        let mut used = vec![first];
        let num_buffers =
            bytes[HEADER_LEN..self.header_len].first_chunk().map(|field| u16::from_le_bytes(*field));
        if self.is_mergeable {
            for _ in 1..num_buffers.unwrap_or(1) {
                let Some((more, len)) = self.next_chain(deadline)? else {
                    return Ok(None);
                };
                bytes.extend(more);
                used.push(len);
            }
        }
        let frame = bytes.split_off(self.header_len);
        Ok(Some(Received { header: Header::parse(&bytes), num_buffers, frame, used }))
    }

    /// What the device wrote to the next chain that comes back, and its used length.
    pub fn next_chain(&mut self, deadline: Instant) -> io::Result<Option<(Vec<u8>, u32)>> {
        let Some((id, len)) = self.ring.wait_used(deadline.saturating_duration_since(Instant::now())) else {
            return Ok(None);
        };
        let head = u16::try_from(id).map_err(io::Error::other)?;
        let buffers = self.posted.remove(&head);
        let buffers =
            buffers.ok_or_else(|| io::Error::other(format!("Chain {id} came back, which was not posted")))?;
        let mut bytes: Vec<u8> =
            buffers.iter().flat_map(|&(address, size)| self.ring.memory().read_vec(address, size)).collect();
        let room = bytes.len();
        if len as usize > room {
            return Err(io::Error::other(format!("{len} bytes were written to {room}")));
        }
        // What the used length does not cover was not written.
        let rest = bytes.split_off(len as usize);
        if let Some(at) = rest.iter().position(|&byte| byte != UNTOUCHED) {
            return Err(io::Error::other(format!(
                "Byte {} was written, and the used length is {len}",
                at + len as usize
            )));
        }
        Ok(Some((bytes, len)))
    }
}

fn chain_of(buffers: &[(u64, usize)]) -> Vec<Desc> {
    linked(buffers.iter().map(|&(address, size)| Desc::writable(address, size as u32)).collect())
}

/// A transmit queue.
pub struct Tx {
    /// The ring.
    pub ring: RawRing,
    header_len: usize,
}

impl Tx {
    /// A frame with its header, in one descriptor. [`Request::cut`] and [`Request::indirect`] give it another shape.
    pub fn request(&self, header: Header, frame: &[u8]) -> Request {
        let mut readable = header.bytes().to_vec();
        readable.resize(self.header_len, 0);
        readable.extend(frame);
        Request {
            readable,
            readable_cuts: Vec::new(),
            writable: 0,
            writable_cuts: Vec::new(),
            indirect: false,
            align: 1,
        }
    }

    /// The length of the header before each frame.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Sends a frame that needs nothing done to it, and waits until the device has taken it.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.execute(&self.request(Header::default(), frame))
    }

    /// Sends what a request holds, and waits until its chain is back.
    pub fn execute(&mut self, request: &Request) -> io::Result<()> {
        let Outcome { used_len, .. } = self.ring.execute(request)?;
        if used_len != 0 {
            return Err(io::Error::other(format!("{used_len} bytes were written to a frame to send")));
        }
        Ok(())
    }

    /// Publishes `frames` at once, tells the device, and waits until all are back.
    pub fn send_all<F: AsRef<[u8]>>(&mut self, frames: &[F]) -> io::Result<()> {
        for frame in frames {
            let request = self.request(Header::default(), frame.as_ref());
            self.ring.submit(&request);
        }
        self.ring.kick();
        for _ in frames {
            self.ring.wait_used(TIMEOUT).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("A frame is not taken: {}", self.ring.describe()),
                )
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_space_is_read() {
        let bytes = [2, 0, 0, 0, 0, 9, 1, 0, 4, 0, 0x28, 0x23, 0x10, 0x27, 0, 0, 1];
        let expected = NetConfig {
            mac: [2, 0, 0, 0, 0, 9],
            status: 1,
            max_queue_pairs: 4,
            mtu: 9000,
            speed: 10_000,
            duplex: 1,
        };
        assert_eq!(NetConfig::parse(&bytes), Some(expected));
        assert_eq!(NetConfig::parse(&bytes[..16]), None);
    }
}
