//! The receive queue: frames into the buffers that a guest posted (virtio 1.3 text, section 5.1.6.3 and 5.1.6.4).
//!
//! Chains are popped ahead and kept until a frame fills them. They go back to the ring when it stops; see
//! [`Ring::epoch`].

use std::collections::VecDeque;

use libc::iovec;
use vhost_user_daemon::{Chain, Ring, Source};
use zerocopy::IntoBytes;

use crate::ethernet::{HEADER_LEN, MAX_TAGS, TAG_LEN};
use crate::features::Features;
use crate::vnet::VnetHeader;

/// The longest frame: 64 KiB of packet with an Ethernet header and VLAN tags.
pub const MAX_FRAME: usize = 65535 + HEADER_LEN + MAX_TAGS * TAG_LEN;

/// Buffers of a chain, or of some together: room is left for one more of ours in a system call (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1000;

/// Chains popped at a time: enough for the longest frame in the buffers of one page or less that drivers post.
const AHEAD: usize = 64;

/// Where the field `num_buffers` lies in the header.
const NUM_BUFFERS: usize = std::mem::offset_of!(VnetHeader, num_buffers);

/// Why a frame was not received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReceived {
    /// The guest has not posted enough buffers; it may do so later.
    NoBuffers,
    /// It does not fit into any buffers that this guest posts.
    TooLong,
}

/// The buffers of one receive queue.
#[derive(Default)]
pub struct Receiver {
    chains: VecDeque<Chain>,
    spare: Vec<Chain>,
    epoch: u32,
    queue_size: usize,
    header_len: usize,
    mergeable: bool,
    /// Chains that were given back as no frame fits in them.
    undersized: u64,
}

impl Receiver {
    /// Looks at the ring, and pops chains if there are few. `false` if it does not run, so that nothing can be received.
    pub fn begin(&mut self, ring: &mut Ring, features: Features) -> bool {
        self.header_len = features.header_len();
        self.mergeable = features.is_mergeable();
        let running = self.pop(ring, AHEAD);
        self.drop_undersized(ring);
        running
    }

    /// Pops until there are `wanted` chains, or no more in the ring.
    fn pop(&mut self, ring: &mut Ring, wanted: usize) -> bool {
        let kept = self.chains.len();
        let running = match ring.batch() {
            None => false,
            Some(mut batch) => {
                self.queue_size = batch.queue_size().into();
                while self.chains.len() < wanted.min(self.queue_size) {
                    let mut chain = self.spare.pop().unwrap_or_default();
                    // One that cannot be followed has no buffers, and counts as undersized.
                    if batch.pop(&mut chain).is_none() {
                        self.spare.push(chain);
                        break;
                    }
                    self.chains.push_back(chain);
                }
                true
            }
        };
        // Known only after the ring was looked at.
        if self.epoch != ring.epoch() {
            self.epoch = ring.epoch();
            self.forget(kept);
        }
        running
    }

    /// Lets go of the first `count` chains, which the ring has taken back.
    fn forget(&mut self, count: usize) {
        self.spare.extend(self.chains.drain(..count).map(|mut chain| {
            chain.clear();
            chain
        }));
    }

    /// Whether the chains are still ours to write to.
    fn is_current(&self, ring: &Ring) -> bool {
        self.epoch == ring.epoch()
    }

    /// Gives back the chains at the front that cannot take any frame, in their order.
    fn drop_undersized(&mut self, ring: &mut Ring) {
        // Of mergeable buffers the first has to hold the header only.
        let least = if self.mergeable { self.header_len } else { self.header_len + HEADER_LEN };
        while let Some(chain) = self.chains.front()
            && (chain.writable_len() < least as u64 || chain.writable().len() > MAX_BUFFERS)
        {
            self.undersized += 1;
            self.complete_front(ring, 0);
        }
    }

    /// Chains that were undersized since this was last asked.
    pub fn take_undersized(&mut self) -> u64 {
        std::mem::take(&mut self.undersized)
    }

    /// Changes when what was put into [`Receiver::buffers`] is lost.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether there is a buffer for a frame.
    pub fn is_ready(&self) -> bool {
        !self.chains.is_empty()
    }

    /// Bytes of the header before each frame.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Adds the buffers of the first `chains` chains to `iovecs`, or of one for a driver that does not merge them, and
    /// returns how many bytes they hold.
    pub fn buffers(&self, chains: usize, iovecs: &mut Vec<iovec>) -> usize {
        let chains = if self.mergeable { chains } else { 1 };
        let mut len = 0;
        for chain in self.chains.iter().take(chains) {
            if iovecs.len() + chain.writable().len() > MAX_BUFFERS {
                break;
            }
            for buffer in chain.writable() {
                len += buffer.iov_len;
                iovecs.push(*buffer);
            }
        }
        len
    }

    /// Copies the beginning of a frame to `out`, and returns how many bytes it were. Of the frame with its header, the first
    /// `filled` bytes were put into [`Receiver::buffers`], and the rest is in `overflow`.
    pub fn copy_frame(&self, filled: usize, overflow: &[u8], out: &mut [u8]) -> usize {
        let (mut left, mut skipped, mut done) = (filled, 0, 0);
        for chain in &self.chains {
            let mut piece = chain.written().limit(left);
            let len = piece.len();
            piece.skip(self.header_len - skipped);
            skipped += len - piece.len();
            done += piece.read(&mut out[done..]);
            left -= len;
            if left == 0 {
                break;
            }
        }
        done + Source::new(overflow).read(&mut out[done..])
    }

    /// Completes the chains that hold a frame of `total` bytes with its header, of which those in `overflow` are not yet in
    /// the chains: the first were put into [`Receiver::buffers`]. Returns how many chains it were.
    ///
    /// Nothing is completed on failure.
    pub fn commit(&mut self, ring: &mut Ring, total: usize, overflow: &[u8]) -> Result<usize, NotReceived> {
        let count = self.reserve(ring, total)?;
        let mut overflow = Source::new(overflow);
        let mut at = total - overflow.len();
        for chain in self.chains.iter().take(count) {
            let room = chain.writable_len() as usize;
            if at < room {
                chain.write_from(&mut overflow, at);
                at = room;
            }
            at -= room;
        }
        self.finish(ring, total, count);
        Ok(count)
    }

    /// Receives a frame that consists of `pieces`, with `header` before it.
    ///
    /// Nothing is completed on failure.
    pub fn deliver(
        &mut self,
        ring: &mut Ring,
        header: &VnetHeader,
        mut pieces: [Source<'_>; 2],
    ) -> Result<(), NotReceived> {
        if !self.is_current(ring) {
            return Err(NotReceived::NoBuffers);
        }
        let total = self.header_len + pieces[0].len() + pieces[1].len();
        let count = self.reserve(ring, total)?;
        let mut header = Source::new(&header.as_bytes()[..self.header_len]);
        for chain in self.chains.iter().take(count) {
            let mut at = chain.write_from(&mut header, 0);
            for piece in &mut pieces {
                at += chain.write_from(piece, at);
            }
        }
        self.finish(ring, total, count);
        Ok(())
    }

    /// How many chains `total` bytes take up. Pops more if need be.
    fn reserve(&mut self, ring: &mut Ring, total: usize) -> Result<usize, NotReceived> {
        if self.chains.is_empty() {
            // Frames of one burst, or segments of one frame, have used up what was popped before it.
            self.pop(ring, AHEAD);
            self.drop_undersized(ring);
        }
        if !self.mergeable {
            let first = self.chains.front().ok_or(NotReceived::NoBuffers)?;
            return if first.writable_len() >= total as u64 { Ok(1) } else { Err(NotReceived::TooLong) };
        }
        if let Some(count) = self.count(total) {
            return Ok(count);
        }
        let epoch = self.epoch;
        // The ring may also have taken back all that there were, with what is in them.
        if !self.pop(ring, self.queue_size) || self.epoch != epoch {
            return Err(NotReceived::NoBuffers);
        }
        match self.count(total) {
            Some(count) => Ok(count),
            None if self.chains.len() >= self.queue_size && self.queue_size > 0 => Err(NotReceived::TooLong),
            None => Err(NotReceived::NoBuffers),
        }
    }

    fn count(&self, total: usize) -> Option<usize> {
        let mut room = 0;
        for (index, chain) in self.chains.iter().enumerate() {
            room += chain.writable_len();
            if room >= total as u64 {
                return Some(index + 1);
            }
        }
        None
    }

    /// Completes the first `count` chains, which hold `total` bytes.
    fn finish(&mut self, ring: &mut Ring, total: usize, count: usize) {
        if self.header_len > NUM_BUFFERS
            && let Some(first) = self.chains.front()
        {
            first.write_from(&mut Source::new(&(count as u16).to_le_bytes()), NUM_BUFFERS);
        }
        let mut left = total;
        for _ in 0..count {
            let room = self.chains.front().map_or(0, Chain::writable_len);
            let len = (left as u64).min(room) as usize;
            left -= len;
            self.complete_front(ring, len);
        }
        self.drop_undersized(ring);
    }

    fn complete_front(&mut self, ring: &mut Ring, len: usize) {
        if let Some(mut chain) = self.chains.pop_front() {
            chain.log_written(len as u64, ring.dirty_log());
            ring.complete(chain.head(), len as u32);
            chain.clear();
            self.spare.push(chain);
        }
    }
}
