//! Disk requests with any header, any split over descriptors, and any mistake.

use std::io;
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::ring::{Desc, INDIRECT, RawRing, linked};

/// Status: done.
pub const OK: u8 = 0;
/// Status: failed.
pub const IOERR: u8 = 1;
/// Status: the device does not know such a request.
pub const UNSUPP: u8 = 2;

/// The flag of a segment that allows (`WRITE_ZEROES`) the device to give the blocks back.
pub const UNMAP: u32 = 1;

/// The length of a request's header.
pub const HEADER_LEN: usize = 16;
/// The unit in which requests count.
pub const SECTOR: usize = 512;

/// What buffers for the device to write are filled with before, to see what it wrote.
pub const UNTOUCHED: u8 = 0xA5;

/// Longest time to wait for one request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A range of a `DISCARD` or `WRITE_ZEROES` request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Segment {
    /// The first sector.
    pub sector: u64,
    /// How many sectors.
    pub num_sectors: u32,
    /// [`UNMAP`], or reserved bits.
    pub flags: u32,
}

impl Segment {
    /// A range without flags.
    pub fn new(sector: u64, num_sectors: u32) -> Self {
        Self { sector, num_sectors, flags: 0 }
    }

    /// The same with flags.
    #[must_use]
    pub fn flags(self, flags: u32) -> Self {
        Self { flags, ..self }
    }

    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.num_sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

/// A request before it is laid out in memory.
#[derive(Clone, Debug)]
pub struct Request {
    /// All that the device reads: the header, then data.
    pub readable: Vec<u8>,
    /// Where `readable` is cut into descriptors, in ascending order.
    pub readable_cuts: Vec<usize>,
    /// How many bytes the device may write, the status byte included.
    pub writable: usize,
    /// Where the writable bytes are cut into descriptors, in ascending order.
    pub writable_cuts: Vec<usize>,
    /// Whether the descriptors lie in an indirect table.
    pub indirect: bool,
    /// The alignment of each buffer in guest memory.
    pub align: u64,
}

impl Request {
    /// A request in the layout of Linux: header, data and status byte each in descriptors of their own.
    pub fn new(kind: u32, sector: u64, payload: &[u8], room: usize) -> Self {
        let mut readable = Vec::with_capacity(HEADER_LEN + payload.len());
        readable.extend(kind.to_le_bytes());
        readable.extend(0_u32.to_le_bytes());
        readable.extend(sector.to_le_bytes());
        readable.extend(payload);
        Self {
            readable,
            readable_cuts: vec![HEADER_LEN],
            writable: room + 1,
            writable_cuts: vec![room],
            indirect: false,
            align: SECTOR as u64,
        }
    }

    /// `IN`: reads `len` bytes.
    pub fn read(sector: u64, len: usize) -> Self {
        Self::new(VIRTIO_BLK_T_IN, sector, &[], len)
    }

    /// `OUT`: writes `data`.
    pub fn write(sector: u64, data: &[u8]) -> Self {
        Self::new(VIRTIO_BLK_T_OUT, sector, data, 0)
    }

    /// `FLUSH`.
    pub fn flush() -> Self {
        Self::new(VIRTIO_BLK_T_FLUSH, 0, &[], 0)
    }

    /// `GET_ID` with `len` bytes of room.
    pub fn id(len: usize) -> Self {
        Self::new(VIRTIO_BLK_T_GET_ID, 0, &[], len)
    }

    /// `DISCARD`.
    pub fn discard(segments: &[Segment]) -> Self {
        let payload: Vec<u8> = segments.iter().flat_map(|segment| segment.bytes()).collect();
        Self::new(VIRTIO_BLK_T_DISCARD, 0, &payload, 0)
    }

    /// `WRITE_ZEROES`.
    pub fn write_zeroes(segments: &[Segment]) -> Self {
        let payload: Vec<u8> = segments.iter().flat_map(|segment| segment.bytes()).collect();
        Self::new(VIRTIO_BLK_T_WRITE_ZEROES, 0, &payload, 0)
    }

    /// The same request, cut into descriptors elsewhere.
    #[must_use]
    pub fn cut(mut self, readable: &[usize], writable: &[usize]) -> Self {
        self.readable_cuts = readable.to_vec();
        self.writable_cuts = writable.to_vec();
        self
    }

    /// The same request in an indirect table.
    #[must_use]
    pub fn indirect(mut self) -> Self {
        self.indirect = true;
        self
    }

    /// The same request with nothing for the device to write, so without a status byte.
    #[must_use]
    pub fn without_status(mut self) -> Self {
        self.writable = 0;
        self
    }

    /// The same request with only the first `len` bytes for the device to read.
    #[must_use]
    pub fn truncated(mut self, len: usize) -> Self {
        self.readable.truncate(len);
        self
    }
}

/// A request that the device has.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The chain's head.
    pub head: u16,
    /// The addresses and lengths of the buffers for the device to write, in order.
    pub writable: Vec<(u64, usize)>,
}

/// A request that the device gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status byte; `None` if the request has no place for one.
    pub status: Option<u8>,
    /// The used length.
    pub used_len: u32,
    /// The bytes before the status byte.
    pub data: Vec<u8>,
}

impl RawRing {
    /// Lays out a request in guest memory, without publishing it.
    pub fn prepare(&mut self, request: &Request) -> (Vec<Desc>, Vec<(u64, usize)>) {
        let mut chain = Vec::new();
        let mut from = 0;
        for piece in pieces(request.readable.len(), &request.readable_cuts) {
            let addr = self.arena.alloc(piece, request.align);
            self.memory().write(addr, &request.readable[from..from + piece]);
            from += piece;
            chain.push(Desc::readable(addr, piece as u32));
        }
        let mut writable = Vec::new();
        for piece in pieces(request.writable, &request.writable_cuts) {
            let addr = self.arena.alloc(piece, request.align);
            self.memory().write(addr, &vec![UNTOUCHED; piece]);
            writable.push((addr, piece));
            chain.push(Desc::writable(addr, piece as u32));
        }
        let mut chain = linked(chain);
        if request.indirect {
            let len = chain.len() * super::ring::DESC_LEN;
            let table = self.write_indirect(&chain);
            chain = vec![Desc::readable(table, len as u32).with(INDIRECT)];
        }
        (chain, writable)
    }

    /// Publishes a request; [`RawRing::kick`] tells the device.
    pub fn submit(&mut self, request: &Request) -> Pending {
        let (chain, writable) = self.prepare(request);
        Pending { head: self.add_chain(&chain), writable }
    }

    /// Does one request from start to end. No other may be outstanding.
    pub fn execute(&mut self, request: &Request) -> io::Result<Outcome> {
        let pending = self.submit(request);
        self.kick();
        let (id, used_len) = self.wait_used(TIMEOUT).ok_or(io::ErrorKind::TimedOut)?;
        if id != u32::from(pending.head) {
            return Err(io::Error::other(format!("Chain {} came back as {id}", pending.head)));
        }
        Ok(self.outcome(&pending, used_len))
    }

    /// What the device wrote for a request.
    pub fn outcome(&self, pending: &Pending, used_len: u32) -> Outcome {
        let mut data: Vec<u8> =
            pending.writable.iter().flat_map(|&(addr, len)| self.memory().read_vec(addr, len)).collect();
        let status = data.pop();
        Outcome { status, used_len, data }
    }
}

/// The lengths of the pieces that `cuts` make of `len` bytes, empty pieces left out.
fn pieces(len: usize, cuts: &[usize]) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut from = 0;
    for &cut in cuts.iter().filter(|&&cut| cut < len).chain([&len]) {
        if cut > from {
            lengths.push(cut - from);
            from = cut;
        }
    }
    lengths
}
