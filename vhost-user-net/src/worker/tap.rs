//! A pair on one queue of a tap: the kernel reads from and writes to the guest's buffers itself.
#![expect(unsafe_code, reason = "system calls on guest memory")]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use libc::iovec;
use vhost_user_daemon::{Ring, SharedRing, error_limited, warn_limited};

use super::{BUDGET, Received, State, frame_of, record};
use crate::counters::Counter;
use crate::ethernet;
use crate::port::tap::Tap;
use crate::receive::{MAX_FRAME, NotReceived, Receiver};
use crate::transmit::{Batched, Sent, Transmitter};
use crate::vnet::HEADER_LEN;

/// One queue of a tap.
pub(super) struct TapPair {
    tap: Arc<Tap>,
    queue: usize,
    /// The kernel steers frames to this queue.
    attached: bool,
    /// The interface was deleted.
    gone: bool,
    receiver: Receiver,
    transmitter: Transmitter,
    iovecs: Iovecs,
    /// Chains offered to the kernel: as many as the last frames took. What is longer ends up in `overflow`, and is copied.
    chains: usize,
    overflow: Box<[u8]>,
    pending: Option<Pending>,
}

/// Room for the arguments of a system call.
#[derive(Default)]
struct Iovecs(Vec<iovec>);

// SAFETY: what is in it has no meaning after the call, and is never looked at again.
unsafe impl Send for Iovecs {}

/// A frame that was read and could not be received yet.
#[derive(Clone, Copy)]
struct Pending {
    /// Bytes with the header.
    total: usize,
    /// Bytes of it that are in chains.
    room: usize,
    /// Of the receiver, when these were its chains.
    epoch: u32,
    /// The rate limit has admitted it, and it was recorded.
    admitted: bool,
}

impl TapPair {
    /// A pair on queue `queue` of `tap`.
    pub(super) fn new(tap: Arc<Tap>, queue: usize) -> Self {
        Self {
            tap,
            queue,
            attached: false,
            gone: false,
            receiver: Receiver::default(),
            transmitter: Transmitter::default(),
            iovecs: Iovecs::default(),
            chains: 1,
            overflow: vec![0; HEADER_LEN + MAX_FRAME].into(),
            pending: None,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.tap.queue_fd(self.queue)
    }

    pub(super) fn transmit(&mut self, ring: &mut Ring, state: &mut State) -> Batched {
        let header_len = state.features.header_len();
        let State { tx_throttle, tally, capture, .. } = state;
        let (tap, queue) = (&self.tap, self.queue);
        self.transmitter.batch(ring, header_len, tx_throttle, tally, |chain, _, _| {
            loop {
                // SAFETY: the buffers lie in guest memory that the chain keeps mapped.
                let written = unsafe { tap.write(queue, chain.readable()) };
                let Err(error) = written else {
                    record(capture.as_ref(), frame_of(chain, header_len));
                    return Sent::Done;
                };
                match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => return Sent::Blocked,
                    Some(libc::EINVAL | libc::EMSGSIZE) => return Sent::Dropped(Counter::TxBadFrame),
                    Some(libc::EIO | libc::EBADFD) => return Sent::Dropped(Counter::TxLinkDown),
                    _ => {
                        warn_limited!("{} does not take a frame: {error}", tap.name());
                        return Sent::Dropped(Counter::TxRefused);
                    }
                }
            }
        })
    }

    pub(super) fn receive(&mut self, ring: &SharedRing, state: &mut State) -> Received {
        let ring = &mut *ring.lock();
        let running = self.receiver.begin(ring, state.features);
        self.attach(running && self.queue < state.nic.active_pairs());
        let received = if running { self.receive_some(ring, state) } else { Received::Stopped };
        state.tally.add(Counter::RxBadBuffer, self.receiver.take_undersized());
        ring.publish();
        received
    }

    fn receive_some(&mut self, ring: &mut Ring, state: &mut State) -> Received {
        for _ in 0..BUDGET {
            let mut frame = match self.pending.take() {
                Some(pending) if pending.epoch == self.receiver.epoch() => pending,
                // The chains with its beginning are no longer ours.
                Some(_) => {
                    state.tally.count(Counter::RxNoBuffer);
                    continue;
                }
                None if !self.receiver.is_ready() => return Received::Starved,
                None => match self.read() {
                    Ok(frame) => frame,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Received::Empty,
                    Err(error) => return self.read_failed(&error),
                },
            };
            let len = frame.total.saturating_sub(self.receiver.header_len());
            if len < ethernet::HEADER_LEN {
                continue;
            }
            let overflow = frame.total.saturating_sub(frame.room);
            if !frame.admitted {
                let overflow = &self.overflow[..overflow];
                let copy =
                    |out: &mut [u8]| self.receiver.copy_frame(frame.total.min(frame.room), overflow, out);
                if !state.is_wanted(copy) {
                    state.tally.count(Counter::RxFiltered);
                    continue;
                }
                if let Err(again) = state.admit_rx(len) {
                    self.pending = Some(frame);
                    return Received::Throttled(again);
                }
                frame.admitted = true;
                if let Some(capture) = &state.capture {
                    capture.frame_with(len, copy);
                }
            }
            match self.receiver.commit(ring, frame.total, &self.overflow[..overflow]) {
                Ok(chains) => {
                    state.tally.received(len);
                    self.expect(chains);
                }
                Err(NotReceived::TooLong) => state.tally.count(Counter::RxTooLong),
                Err(NotReceived::NoBuffers) => {
                    self.pending = Some(frame);
                    return Received::Starved;
                }
            }
        }
        Received::Some
    }

    /// Reads a frame into the first chains, and what does not fit there into `overflow`.
    fn read(&mut self) -> io::Result<Pending> {
        let iovecs = &mut self.iovecs.0;
        iovecs.clear();
        let room = self.receiver.buffers(self.chains, iovecs);
        let overflow = &mut self.overflow;
        iovecs.push(iovec { iov_base: overflow.as_mut_ptr().cast(), iov_len: overflow.len() });
        loop {
            // SAFETY: the buffers lie in guest memory that the receiver's chains keep mapped, and in `overflow`, which
            // nobody else uses meanwhile.
            match unsafe { self.tap.read(self.queue, iovecs) } {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(total) => {
                    let epoch = self.receiver.epoch();
                    return Ok(Pending { total, room, epoch, admitted: false });
                }
            }
        }
    }

    fn read_failed(&mut self, error: &io::Error) -> Received {
        if !Tap::is_gone(error) {
            warn_limited!("Nothing can be read from {}: {error}", self.tap.name());
            return Received::Empty;
        }
        if !std::mem::replace(&mut self.gone, true) {
            error_limited!(
                "Interface {} was deleted: start the daemon again when it is back",
                self.tap.name()
            );
        }
        // Not waited for any more, as it would be ready for ever.
        Received::Stopped
    }

    /// Takes the next frames to be of the same size as the last, and forgets a long one slowly.
    fn expect(&mut self, chains: usize) {
        let surplus = self.chains.saturating_sub(chains);
        self.chains = self.chains.max(chains) - surplus.div_ceil(8);
    }

    /// Has the kernel steer frames to this queue, or not.
    fn attach(&mut self, attached: bool) {
        if attached != self.attached {
            self.attached = attached;
            if let Err(error) = self.tap.set_queue_enabled(self.queue, attached) {
                warn_limited!("Queue {} of {} cannot be switched: {error}", self.queue, self.tap.name());
            }
        }
    }

    /// Sends a frame of our own. Lost if the tap does not take it now, as frames may be.
    pub(super) fn send(&mut self, frame: &[u8], header_len: usize) {
        let header = &[0u8; HEADER_LEN][..header_len];
        let piece = |bytes: &[u8]| iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: both buffers are ours for the time of the call.
        let _ = unsafe { self.tap.write(self.queue, &[piece(header), piece(frame)]) };
    }
}

impl Drop for TapPair {
    fn drop(&mut self) {
        self.attach(false);
    }
}
