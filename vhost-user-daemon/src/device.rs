//! What a daemon implements: a [`Device`], and a [`Worker`] for each of its queues.
//!
//! The rest of this crate turns them into a vhost-user back end. A device answers for features and configuration
//! space; its workers move data and know nothing of sockets, eventfds or threads:
//!
//! ```text
//! kick ──> pass: batch().pop() ──> parse, execute ──> complete() ──> publish ──┐
//!            ^                                                                   │
//!            ├──────────────── a pass that found something to do ────────────────┤
//!            └── wait for a kick or for what is in flight, if there is any ──────┘
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::ring::Ring;

/// A virtio device behind a vhost-user socket. One object serves all connections, one after the other.
pub trait Device: Send + Sync + 'static {
    /// What serves one of the queues.
    type Worker: Worker;

    /// Number of queues, at most 64.
    fn num_queues(&self) -> usize;

    /// The largest queue size that a driver may choose: a power of two.
    fn max_queue_size(&self) -> u16;

    /// The virtio feature bits offered: those of the device type, and the ring features
    /// [`RING_FEATURES`](crate::RING_FEATURES). The bits of the vhost-user transport are added elsewhere.
    fn features(&self) -> u64;

    /// The driver and the front end agreed on `features`, a part of those offered. Called again when they change.
    fn set_features(&self, features: u64);

    /// Fills `data` with the configuration space from `offset` on. Bytes beyond its end stay zero, as `data` comes in.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver (or, when a guest was migrated here, the front end) writes `data` to the configuration space at
    /// `offset`. Anything may arrive: some front ends relay one field, others the whole space. `false` if it has no
    /// field that can be written, or no possible value for it; the front end is told so.
    fn write_config(&self, offset: usize, data: &[u8]) -> bool;

    /// A new front end has connected, or the front end resets the device: what the last driver chose is forgotten.
    fn reset(&self);

    /// Makes the worker of queue `index` for a new connection. It is dropped when the connection ends, after all it
    /// had in flight was completed.
    fn new_worker(self: &Arc<Self>, index: usize) -> io::Result<Self::Worker>;
}

/// Serves one queue: what it holds belongs to this queue alone.
pub trait Worker: Send + 'static {
    /// Does what can be done now: completes what has finished, pops chains from `ring` and executes or submits them.
    ///
    /// Never blocks on the guest, and never fails: an error belongs to the request that met it. `ring` decides whether
    /// chains may be popped; what was popped before has to be completed in any case.
    fn pass(&mut self, ring: &mut Ring) -> Progress;

    /// Chains popped and not completed yet.
    fn in_flight(&self) -> usize;

    /// Waits until something in flight has finished, until the guest writes to `kick`, or until `timeout`, whatever
    /// comes first. Called only while something is in flight. `kick` is not to be read.
    ///
    /// Returning early is no error, and neither is missing a kick: it is looked for again.
    ///
    /// It is the worker that waits, and not the thread's epoll: an io_uring completion interrupts epoll_wait(2) with
    /// EINTR before it can be seen there, which costs two system calls more for each wake-up.
    fn wait(&mut self, timeout: Duration, kick: Option<&Arc<OwnedFd>>);
}

/// What a [`Worker::pass`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It popped or completed something, so that there may be more.
    Busy,
    /// There was nothing to do.
    Idle,
    /// There may be chains in the ring, but what is in flight has to be completed first.
    Full,
}
