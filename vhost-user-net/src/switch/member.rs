//! A guest's port: its receive queues, into which the threads of all other ports write.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost_user_daemon::throttle::{Limits, Throttle};
use vhost_user_daemon::{SharedRing, Source};

use crate::counters::{Counter, Counters, Tally};
use crate::ethernet::START_LEN;
use crate::features::Features;
use crate::filter::Filter;
use crate::receive::{NotReceived, Receiver};
use crate::transmit::admit;
use crate::vnet::{Offloads, VnetHeader};

/// The receive queues of a guest.
pub struct Member {
    queues: Vec<Mutex<Lane>>,
    /// One bit for each queue that runs.
    running: AtomicU64,
    counters: Arc<Counters>,
}

/// One receive queue, and what its guest wants to get in it.
pub(super) struct Lane {
    ring: Option<SharedRing>,
    receiver: Receiver,
    /// The ring ran when the lane was locked.
    running: bool,
    guest: Guest,
    throttle: Throttle,
    tally: Tally,
}

/// What a guest has negotiated.
#[derive(Clone, Default, PartialEq)]
pub struct Guest {
    /// The features that its driver took.
    pub features: Features,
    /// What it can receive.
    pub receivable: Offloads,
    /// What it wants to receive.
    pub filter: Option<Arc<Filter>>,
}

impl Member {
    /// A guest with `queues` receive queues, each of which gets at most `limits`.
    pub fn new(queues: usize, limits: &Limits, counters: Arc<Counters>) -> Self {
        let lane = || Lane {
            ring: None,
            receiver: Receiver::default(),
            running: false,
            guest: Guest::default(),
            throttle: Throttle::new(limits),
            tally: Tally::default(),
        };
        Self {
            queues: (0..queues).map(|_| Mutex::new(lane())).collect(),
            running: AtomicU64::new(0),
            counters,
        }
    }

    /// The counters of the port.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Hands over the ring of a queue, and what its guest wants.
    pub fn attach(&self, queue: usize, ring: &SharedRing, guest: Guest) {
        let mut lane = self.lock(queue);
        lane.ring = Some(ring.clone());
        lane.guest = guest;
        // Buffers that lie in memory of before are let go of.
        lane.begin();
    }

    /// Takes the ring back: the front end has left.
    pub fn detach(&self, queue: usize) {
        self.set_running(queue, false);
        let mut lane = self.lock(queue);
        lane.ring = None;
        lane.receiver = Receiver::default();
    }

    /// Whether frames may be put into a queue.
    pub fn set_running(&self, queue: usize, running: bool) {
        if running {
            self.running.fetch_or(1 << queue, Ordering::Relaxed);
        } else {
            self.running.fetch_and(!(1 << queue), Ordering::Relaxed);
        }
    }

    /// One of the running queues, the same one for the same `hint`, so that frames keep their order.
    pub(super) fn lane(&self, hint: usize) -> Option<MutexGuard<'_, Lane>> {
        let mut running = self.running.load(Ordering::Relaxed);
        for _ in 0..hint.checked_rem(running.count_ones() as usize)? {
            running &= running - 1;
        }
        Some(self.lock(running.trailing_zeros() as usize))
    }

    fn lock(&self, queue: usize) -> MutexGuard<'_, Lane> {
        self.queues[queue].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lane {
    /// Prepares to receive some frames.
    pub(super) fn begin(&mut self) {
        self.running =
            self.ring.as_ref().is_some_and(|ring| self.receiver.begin(&mut ring.lock(), self.guest.features));
    }

    /// What the guest can receive.
    pub(super) fn receivable(&self) -> Offloads {
        self.guest.receivable
    }

    /// Receives the frame that consists of `pieces` and begins with `start`, or counts why not.
    pub(super) fn receive(&mut self, header: &VnetHeader, start: &[u8; START_LEN], pieces: [Source<'_>; 2]) {
        let len = pieces[0].len() + pieces[1].len();
        let Some(ring) = self.ring.as_ref().filter(|_| self.running) else {
            return self.tally.count(Counter::RxNoBuffer);
        };
        if self.guest.filter.as_ref().is_some_and(|filter| !filter.accepts(&start[..len.min(START_LEN)])) {
            return self.tally.count(Counter::RxFiltered);
        }
        if admit(&mut self.throttle, len).is_err() {
            return self.tally.count(Counter::RxThrottled);
        }
        let mut header = *header;
        if !self.guest.receivable.contains(Offloads::CSUM) {
            // It does not know any flag.
            header.flags = 0;
        }
        match self.receiver.deliver(&mut ring.lock(), &header, pieces) {
            Ok(()) => self.tally.received(len),
            Err(NotReceived::NoBuffers) => self.tally.count(Counter::RxNoBuffer),
            Err(NotReceived::TooLong) => self.tally.count(Counter::RxTooLong),
        }
    }

    /// Counts a frame that cannot be made fit for the guest.
    pub(super) fn refuse(&mut self) {
        self.tally.count(Counter::RxImpossible);
    }

    /// Shows the guest what it got.
    pub(super) fn end(&mut self, counters: &Counters) {
        if let Some(ring) = &self.ring {
            ring.lock().publish();
        }
        self.tally.add(Counter::RxBadBuffer, self.receiver.take_undersized());
        counters.take(&mut self.tally);
    }
}
