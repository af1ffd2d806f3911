//! The transmit queue: frames out of the chains that a guest made available (virtio 1.3 text, section 5.1.6.2).

use std::collections::VecDeque;
use std::time::Instant;

use vhost_user_daemon::throttle::Throttle;
use vhost_user_daemon::{Chain, Ring};

use crate::counters::{Counter, Tally};
use crate::ethernet::HEADER_LEN;
use crate::receive::MAX_FRAME;

/// Chains taken at a time. Frames of a batch go out together, and the guest is told once.
const BATCH: usize = 64;

/// Popped chains on their way out.
#[derive(Default)]
pub struct Transmitter {
    popped: VecDeque<Popped>,
    spare: Vec<Chain>,
    /// The rate limit has admitted the next frame, which was blocked then.
    admitted: bool,
}

struct Popped {
    chain: Chain,
    /// It could be followed.
    whole: bool,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Done,
    /// It is lost for this reason.
    Dropped(Counter),
    /// It has to wait until the host side can take more.
    Blocked,
}

/// How a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batched {
    /// The ring was empty, or does not run.
    Empty,
    /// All that was popped is gone; there may be more.
    Sent,
    /// The host side cannot take more.
    Blocked,
    /// The rate limit is reached: try again then.
    Throttled(Instant),
}

impl Transmitter {
    /// Pops a batch from `ring` and hands it to `send`, chain by chain, with the bytes of the frame; the header of
    /// `header_len` bytes is before it. What cannot be sent now goes back to the ring.
    pub fn batch(
        &mut self,
        ring: &mut Ring,
        header_len: usize,
        throttle: &mut Throttle,
        tally: &mut Tally,
        mut send: impl FnMut(&mut Chain, usize, &mut Tally) -> Sent,
    ) -> Batched {
        self.pop(ring);
        if self.popped.is_empty() {
            return Batched::Empty;
        }
        let mut batched = Batched::Sent;
        while let Some(mut popped) = self.popped.pop_front() {
            let total = popped.chain.readable_len();
            let frame = total.saturating_sub(header_len as u64) as usize;
            let fate = if !popped.whole {
                Sent::Dropped(Counter::TxBadChain)
            } else if !(HEADER_LEN..=MAX_FRAME).contains(&frame) {
                Sent::Dropped(Counter::TxBadFrame)
            } else if !self.admitted
                && let Err(again) = admit(throttle, frame)
            {
                batched = Batched::Throttled(again);
                self.give_back(popped, ring);
                break;
            } else {
                send(&mut popped.chain, frame, tally)
            };
            match fate {
                Sent::Done => tally.transmitted(frame),
                Sent::Dropped(reason) => tally.count(reason),
                Sent::Blocked => {
                    self.admitted = true;
                    batched = Batched::Blocked;
                    self.give_back(popped, ring);
                    break;
                }
            }
            self.admitted = false;
            ring.complete(popped.chain.head(), 0);
            popped.chain.clear();
            self.spare.push(popped.chain);
        }
        batched
    }

    fn pop(&mut self, ring: &mut Ring) {
        let Some(mut batch) = ring.batch() else { return };
        while self.popped.len() < BATCH {
            let mut chain = self.spare.pop().unwrap_or_default();
            match batch.pop(&mut chain) {
                None => {
                    self.spare.push(chain);
                    break;
                }
                Some(result) => self.popped.push_back(Popped { chain, whole: result.is_ok() }),
            }
        }
    }

    /// Returns a chain to the ring, with those after it.
    fn give_back(&mut self, first: Popped, ring: &mut Ring) {
        ring.unpop(self.popped.len() as u16 + 1);
        for mut popped in std::iter::once(first).chain(self.popped.drain(..)) {
            popped.chain.clear();
            self.spare.push(popped.chain);
        }
    }
}

/// Asks the throttle, which is mostly none.
pub fn admit(throttle: &mut Throttle, frame: usize) -> Result<(), Instant> {
    if throttle.is_unlimited() { Ok(()) } else { throttle.admit(frame as u64, Instant::now()) }
}
