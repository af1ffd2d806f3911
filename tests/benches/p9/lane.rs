//! One virtqueue with a fixed number of places for requests, each with buffers of its own: what a guest's driver does,
//! and nothing else that would cost time.
//!
//! A request is a chain in an indirect table, in the shape that Linux gives to requests of 9P and FUSE alike: a header
//! that the device reads, data that it reads, a header that it writes, data that it writes; data in one descriptor for
//! each page. Completions are found by looking at the used ring without a pause, never by a call signal.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tests::driver::raw::{GuestMemory, RawDevice};
use tests::driver::ring::{Arena, Desc, INDIRECT, NEXT, Placement, RawRing, WRITE};

/// Guest memory of each subject.
pub const MEMORY: usize = 40 << 20;
/// Descriptors of the ring: what QEMU's device has.
pub const RING_SIZE: u16 = 128;
/// Places for requests.
pub const SLOTS: usize = 40;
/// Room for the data of a request.
pub const DATA: usize = 480 << 10;
/// Room for a header in either direction.
pub const HEADER: usize = 4096;

/// The first MiB stays empty: in a machine's memory firmware lies there.
const RING_AT: u64 = 1 << 20;
const UNUSED_RING_AT: u64 = RING_AT + (64 << 10);
const SLOTS_AT: u64 = 2 << 20;
/// Table, two headers, data.
const SLOT_LEN: u64 = (3 * HEADER + DATA) as u64;
/// Longest time without any completion.
const LIMIT: Duration = Duration::from_secs(10);
/// Looking at the clock costs more than looking at the ring.
const LOOKS: u32 = 4096;

/// How many bytes of each kind a request has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Header that the device reads.
    pub request: usize,
    /// Data that the device reads.
    pub sent: usize,
    /// Header that the device writes.
    pub reply: usize,
    /// Data that the device writes.
    pub received: usize,
}

/// How the device is told of new requests.
pub enum Kick {
    /// By the ring's eventfd, which the device was given.
    Ring,
    /// By an eventfd of the device's own.
    Device(OwnedFd),
}

/// The driver's side of the queue.
pub struct Lane {
    ring: RawRing,
    kick: Kick,
    piece: usize,
    shapes: Vec<Shape>,
    /// Places of requests whose replies nobody waits for.
    posted: Vec<bool>,
    kicked_at: u16,
    /// How often the device asked to be kicked.
    pub kicks: u64,
    /// Requests so far.
    pub requests: u64,
}

/// Where the ring lies that requests go to.
pub fn placement() -> Placement {
    at(RING_AT)
}

/// Where a ring lies that is there for the device's sake alone.
pub fn unused_placement() -> Placement {
    at(UNUSED_RING_AT)
}

fn at(desc: u64) -> Placement {
    Placement { size: RING_SIZE, desc, avail: desc + 0x4000, used: desc + 0x5000, base: 0 }
}

/// An empty ring without memory to hand out.
pub fn ring(memory: &Arc<GuestMemory>, placement: Placement, event_idx: bool) -> Result<RawRing> {
    Ok(RawRing::new(Arc::clone(memory), placement, event_idx, Arena::new(0, 0))?)
}

fn table(slot: usize) -> u64 {
    SLOTS_AT + slot as u64 * SLOT_LEN
}

fn request_at(slot: usize) -> u64 {
    table(slot) + HEADER as u64
}

fn reply_at(slot: usize) -> u64 {
    table(slot) + 2 * HEADER as u64
}

fn data_at(slot: usize) -> u64 {
    table(slot) + 3 * HEADER as u64
}

impl Lane {
    /// Takes over a ring that the device knows. `piece` is the most bytes of data in a descriptor.
    pub fn new(ring: RawRing, kick: Kick, piece: usize) -> Self {
        let kicked_at = ring.avail_idx();
        let (shapes, posted) = (vec![Shape::default(); SLOTS], vec![false; SLOTS]);
        let mut lane = Self { ring, kick, piece, shapes, posted, kicked_at, kicks: 0, requests: 0 };
        // Slot n always uses descriptor n; only what its table says changes.
        let heads: Vec<Desc> = (0..SLOTS).map(|slot| Desc::readable(table(slot), 0).with(INDIRECT)).collect();
        lane.ring.write_descs(&heads);
        lane
    }

    /// Writes a request's header.
    pub fn write_request(&self, slot: usize, bytes: &[u8]) {
        self.ring.memory().write(request_at(slot), bytes);
    }

    /// Reads the start of a reply's header.
    pub fn read_reply(&self, slot: usize, bytes: &mut [u8]) {
        self.ring.memory().read(reply_at(slot), bytes);
    }

    /// Reads data that came.
    pub fn read_data(&self, slot: usize, bytes: &mut [u8]) {
        self.ring.memory().read(data_at(slot), bytes);
    }

    fn lay_out(&mut self, slot: usize, shape: Shape) {
        if self.shapes[slot] == shape {
            return;
        }
        self.shapes[slot] = shape;
        let mut chain = vec![Desc::readable(request_at(slot), shape.request as u32)];
        let pieces = |len: usize| (0..len).step_by(self.piece).map(move |at| (at as u64, len - at));
        let piece = self.piece;
        for (at, rest) in pieces(shape.sent) {
            chain.push(Desc::readable(data_at(slot) + at, rest.min(piece) as u32));
        }
        if shape.reply > 0 {
            chain.push(Desc::writable(reply_at(slot), shape.reply as u32));
        }
        for (at, rest) in pieces(shape.received) {
            chain.push(Desc::writable(data_at(slot) + at, rest.min(piece) as u32));
        }
        let last = chain.len() - 1;
        for (position, desc) in chain.iter().enumerate() {
            let flags = (desc.flags & WRITE) | if position < last { NEXT } else { 0 };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
            bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(position as u16 + 1).to_le_bytes());
            self.ring.memory().write(table(slot) + 16 * position as u64, &bytes);
        }
        let len = 16 * chain.len() as u32;
        let head = placement().desc + 16 * slot as u64;
        self.ring.memory().write(head + 8, &len.to_le_bytes());
    }

    /// Puts a request in the ring; [`Lane::publish`] shows it to the device.
    pub fn push(&mut self, slot: usize, shape: Shape) {
        self.lay_out(slot, shape);
        self.ring.push_head(slot as u16);
        self.requests += 1;
    }

    /// Shows all that was pushed to the device, and kicks it if it asked for that.
    pub fn publish(&mut self) -> Result<()> {
        self.ring.publish();
        let new = self.ring.avail_idx();
        if self.ring.wants_kick(self.kicked_at) {
            self.kicks += 1;
            match &self.kick {
                Kick::Ring => self.ring.kick(),
                Kick::Device(eventfd) => {
                    rustix::io::write(eventfd, &1u64.to_ne_bytes())?;
                }
            }
        }
        self.kicked_at = new;
        Ok(())
    }

    /// The next completed request, if there is one: its place and the bytes written.
    pub fn poll(&mut self) -> Option<(usize, usize)> {
        let (head, len) = self.ring.pop_used()?;
        Some((head as usize, len as usize))
    }

    /// The next completed request.
    pub fn wait(&mut self) -> Result<(usize, usize)> {
        let mut deadline = None;
        loop {
            for _ in 0..LOOKS {
                if let Some((slot, len)) = self.poll() {
                    ensure!(slot < SLOTS, "The device returned descriptor {slot}");
                    return Ok((slot, len));
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if now > *deadline.get_or_insert(now + LIMIT) {
                bail!("No reply within {} s: {}", LIMIT.as_secs(), self.ring.describe());
            }
        }
    }

    /// Sends one request in place 0 and waits for its reply. Returns the bytes written.
    pub fn call(&mut self, request: &[u8], shape: Shape) -> Result<usize> {
        self.write_request(0, request);
        self.push(0, Shape { request: request.len(), ..shape });
        self.publish()?;
        loop {
            match self.wait()? {
                (0, len) => return Ok(len),
                (slot, _) => self.reaped(slot)?,
            }
        }
    }

    fn reaped(&mut self, slot: usize) -> Result<()> {
        ensure!(std::mem::take(&mut self.posted[slot]), "The device returned {slot}, which it does not have");
        Ok(())
    }

    /// Sends one request whose reply nobody waits for.
    pub fn post(&mut self, request: &[u8], reply: usize) -> Result<()> {
        let slot = loop {
            if let Some(slot) = (1..SLOTS).find(|slot| !self.posted[*slot]) {
                break slot;
            }
            let (slot, _) = self.wait()?;
            self.reaped(slot)?;
        };
        self.posted[slot] = true;
        self.write_request(slot, request);
        self.push(slot, Shape { request: request.len(), reply, ..Shape::default() });
        self.publish()
    }

    /// Waits until the device has nothing left to do.
    pub fn drain(&mut self) -> Result<()> {
        while self.posted.contains(&true) {
            let (slot, _) = self.wait()?;
            self.reaped(slot)?;
        }
        Ok(())
    }
}

/// Announces `ring` as ring `index` of a vhost-user device.
pub fn start(device: &mut RawDevice, index: usize, ring: &RawRing) -> Result<()> {
    let call = ring.call().as_raw_fd();
    device.start(index, ring).with_context(|| format!("Cannot start ring {index} (call signals at {call})"))
}
