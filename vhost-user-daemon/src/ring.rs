//! The split virtqueue as a worker uses it: chains out of the available ring, a batch of used entries back, and no
//! more notifications in either direction than needed.
//!
//! Virtio 1.3 text, section 2.7 (split virtqueues): 2.7.6 available ring, 2.7.8 used ring, 2.7.7 and 2.7.10
//! notification suppression.
#![expect(unsafe_code, reason = "the rings are memory shared with the guest")]
#![expect(clippy::cast_ptr_alignment, reason = "Layout::resolve checks it")]

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost_user_backend::{VringState, VringT};
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT};

use crate::chain::{Chain, ChainError, DESCRIPTOR_SIZE};
use crate::dirty::DirtyLog;
use crate::inflight::{InflightMemory, InflightQueue};
use crate::memory::{Memory, SharedMemory, host_ptr, snapshot};
use crate::vring::Vring;
use crate::warn_limited;

/// One queue, for the worker that serves it.
///
/// The lock that the control plane shares is held only while chains are popped or used entries written, never during
/// I/O.
pub struct Ring {
    index: usize,
    vring: Vring,
    memory: SharedMemory,
    log: Arc<DirtyLog>,
    stopped: Arc<AtomicBool>,
    used: Vec<UsedElement>,
    shared_inflight: SharedInflight,
    inflight: Option<InflightQueue>,
    /// Chains that a process before this one had in flight.
    again: VecDeque<u16>,
    /// How often the ring had been started when it was last looked at.
    starts: u32,
    /// Chains popped and not completed.
    outstanding: u16,
    /// The memory map that they were popped with, by its address: they keep it, so that no other can have the same.
    popped_with: usize,
    /// Chains are completed in the order in which they were popped, so that those not completed can be popped again.
    keeps_order: bool,
    /// Counts how often what was popped has become void.
    epoch: u32,
    /// The guest was asked to kick.
    armed: bool,
}

/// A ring that more than one thread may use.
#[derive(Clone)]
pub struct SharedRing(Arc<Mutex<Ring>>);

impl SharedRing {
    pub(crate) fn new(ring: Ring) -> Self {
        Self(Arc::new(Mutex::new(ring)))
    }

    /// The ring, for this thread alone. Two rings are locked at a time only by a thread that holds one of its own worker
    /// and takes one into which frames are delivered.
    pub fn lock(&self) -> MutexGuard<'_, Ring> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory for chains in flight that the front end keeps, if it does.
pub(crate) type SharedInflight = Arc<Mutex<Option<Arc<InflightMemory>>>>;

/// An entry of the used ring: the head of a chain and the bytes written into it.
#[derive(Clone, Copy, Debug)]
struct UsedElement {
    head: u16,
    len: u32,
}

impl Ring {
    /// The ring of queue `index`. While `stopped` is set nothing is popped. `keeps_order`: see
    /// [`Device::keeps_order`](crate::Device::keeps_order).
    pub(crate) fn new(
        index: usize,
        vring: Vring,
        memory: SharedMemory,
        log: Arc<DirtyLog>,
        stopped: Arc<AtomicBool>,
        shared_inflight: SharedInflight,
        keeps_order: bool,
    ) -> Self {
        Self {
            index,
            vring,
            memory,
            log,
            stopped,
            used: Vec::new(),
            shared_inflight,
            inflight: None,
            again: VecDeque::new(),
            starts: 0,
            outstanding: 0,
            popped_with: 0,
            keeps_order,
            epoch: 0,
            armed: true,
        }
    }

    /// Changes when the chains popped so far are no longer the worker's: the ring was stopped or started, or the front end
    /// exchanged the memory that they lie in. They are popped again, and are not to be written or completed.
    ///
    /// Only for devices that [keep the order](crate::Device::keeps_order) of their chains. Look at it after
    /// [`Ring::batch`], which takes them back.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether chains were popped with a memory map that the front end has exchanged since: the next [`Ring::batch`] takes
    /// them back.
    pub fn is_stale(&self) -> bool {
        self.outstanding > 0 && Arc::as_ptr(&snapshot(&self.memory)) as usize != self.popped_with
    }

    /// Puts the last `count` chains that were popped back, to be popped again.
    pub fn unpop(&mut self, count: u16) {
        let count = count.min(self.outstanding);
        self.outstanding -= count;
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        queue.set_next_avail(queue.next_avail().wrapping_sub(count));
    }

    /// The memory map of the moment.
    pub fn memory(&self) -> Arc<Memory> {
        snapshot(&self.memory)
    }

    /// The log in which a device marks what it wrote to guest memory.
    pub fn dirty_log(&self) -> &DirtyLog {
        &self.log
    }

    /// The eventfd that the guest kicks.
    pub(crate) fn kick(&self) -> Option<Arc<OwnedFd>> {
        self.vring.kick()
    }

    /// Whether chains could be popped, if there are any.
    pub fn is_running(&self) -> bool {
        let state = self.vring.get_mut();
        !self.stopped.load(Ordering::Relaxed)
            && !self.vring.is_broken()
            && state.get_queue().ready()
            && state.is_enabled()
    }

    /// Starts to pop chains; `None` while the ring is stopped, disabled or broken.
    pub fn batch(&mut self) -> Option<Batch<'_>> {
        if self.stopped.load(Ordering::Relaxed) || self.vring.is_broken() {
            return None;
        }
        let mut state = self.vring.get_mut();
        if !state.get_queue().ready() || !state.is_enabled() {
            return None;
        }
        let memory = snapshot(&self.memory);
        let map = Arc::as_ptr(&memory) as usize;
        if self.keeps_order
            && self.outstanding > 0
            && map != self.popped_with
            && self.vring.starts() == self.starts
        {
            let queue = state.get_queue_mut();
            queue.set_next_avail(queue.next_avail().wrapping_sub(self.outstanding));
            self.outstanding = 0;
            self.epoch = self.epoch.wrapping_add(1);
        }
        self.popped_with = map;
        // The front end may be exchanging a region; the worker is woken when the memory map is whole again.
        let layout = Layout::resolve(&memory, &state)?;
        let starts = self.vring.starts();
        let start = (starts != self.starts).then(|| match layout.used_idx() {
            0 => Start::Fresh,
            _ => Start::Resumed,
        });
        if starts != self.starts {
            self.starts = starts;
            self.outstanding = 0;
            self.epoch = self.epoch.wrapping_add(1);
            self.armed = true;
            let shared = self.shared_inflight.lock().unwrap_or_else(PoisonError::into_inner);
            self.inflight = shared.as_ref().and_then(|shared| shared.queue(self.index, layout.size));
            self.again.clear();
            let used_idx = layout.used_idx();
            if let Some(again) = self.inflight.as_mut().and_then(|inflight| inflight.recover(used_idx)) {
                // Whatever the front end believes: these were taken, and all before them is used.
                state.get_queue_mut().set_next_avail(used_idx.wrapping_add(again.len() as u16));
                self.again = again.into();
            } else if self.keeps_order {
                // All before it is done, whatever base the front end gives: DPDK's virtio-user says 0 to a back end that
                // comes back.
                state.get_queue_mut().set_next_avail(used_idx);
            }
        }
        let next_avail = state.get_queue().next_avail();
        let available = layout.avail_idx().wrapping_sub(next_avail);
        if available > layout.size {
            drop(state);
            self.break_ring("the available index jumped by more than the queue size");
            return None;
        }
        if std::mem::take(&mut self.armed) {
            // The worker looks at the ring by itself from now on.
            write_notifications(&self.log, state.get_queue(), &layout, false);
        }
        Some(Batch {
            index: self.index,
            outstanding: &mut self.outstanding,
            state,
            memory,
            layout,
            available,
            start,
            inflight: self.inflight.as_mut(),
            again: &mut self.again,
        })
    }

    /// Notes that the chain starting at `head` is done, with `len` bytes written from the front of its device-writable
    /// part. The guest sees it at the next [`Ring::publish`].
    pub fn complete(&mut self, head: u16, len: u32) {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.used.push(UsedElement { head, len });
    }

    /// Shows the guest all chains completed since the last call, and notifies it once if it wants to know.
    pub fn publish(&mut self) {
        if self.used.is_empty() {
            return;
        }
        let mut state = self.vring.get_mut();
        let memory = snapshot(&self.memory);
        // Kept for later while the front end exchanges a region.
        let Some(layout) = Layout::resolve(&memory, &state) else { return };
        let old = state.get_queue().next_used();
        let mut next = old;
        for element in &self.used {
            if let Some(inflight) = &self.inflight {
                inflight.prepare(element.head);
            }
            layout.write_used(next, *element);
            next = next.wrapping_add(1);
        }
        layout.set_used_idx(next);
        if let Some(inflight) = &self.inflight {
            inflight.complete(self.used.iter().map(|element| element.head), next);
        }
        self.used.clear();
        let queue = state.get_queue_mut();
        queue.set_next_used(next);
        // The driver writes the event index, then looks at the used index; we the other way round.
        fence(Ordering::SeqCst);
        let notify = if queue.event_idx_enabled() {
            needs_event(layout.used_event(), next, old)
        } else {
            layout.avail_flags() & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        };
        if self.log.is_enabled() {
            self.log.mark(queue.used_ring(), layout.used_len() as u64);
        }
        if notify && let Some(call) = state.get_call() {
            // Fails when the other end is full or gone. Full means that a notification is pending already.
            let _ = call.notify();
        }
    }

    /// Pops nothing more until the front end enables the ring again.
    pub(crate) fn disable(&self) {
        self.vring.set_enabled(false);
    }

    /// Leaves the ring as one that wants every kick: another back end may take it over. Also while it is stopped. What
    /// was popped and not completed goes back.
    pub(crate) fn release(&mut self) {
        self.publish();
        if self.keeps_order {
            // What could not be published has no ring to go to, and was not seen by the guest.
            self.outstanding = self.outstanding.saturating_add(self.used.len() as u16);
            self.unpop(self.outstanding);
        }
        self.used.clear();
        self.epoch = self.epoch.wrapping_add(1);
        self.armed = true;
        let state = self.vring.get_mut();
        let memory = snapshot(&self.memory);
        if let Some(layout) = Layout::resolve(&memory, &state) {
            write_notifications(&self.log, state.get_queue(), &layout, true);
        }
    }

    /// Asks the guest to kick for the next chain, until the next [`Ring::batch`]. `true` if one came in the meantime, so
    /// that the worker has to look once more before it rests.
    pub fn enable_notifications(&mut self) -> bool {
        if self.stopped.load(Ordering::Relaxed) || self.vring.is_broken() {
            return false;
        }
        let state = self.vring.get_mut();
        let queue = state.get_queue();
        if !queue.ready() || !state.is_enabled() {
            return false;
        }
        let memory = snapshot(&self.memory);
        let Some(layout) = Layout::resolve(&memory, &state) else {
            return false;
        };
        self.armed = true;
        write_notifications(&self.log, queue, &layout, true);
        fence(Ordering::SeqCst);
        layout.avail_idx() != queue.next_avail()
    }

    fn break_ring(&self, why: &str) {
        warn_limited!("Queue {} is stopped until the guest resets it: {why}", self.index);
        self.vring.set_broken();
    }
}

/// Tells the guest whether to kick (virtio 1.3 text, section 2.7.10).
fn write_notifications(log: &DirtyLog, queue: &Queue, layout: &Layout, enable: bool) {
    if !queue.event_idx_enabled() {
        layout.set_used_flags(if enable { 0 } else { VRING_USED_F_NO_NOTIFY as u16 });
    } else if enable {
        layout.set_avail_event(queue.next_avail());
    } else {
        // With event indices the driver kicks once per index that we show, so there is nothing to switch off.
        return;
    }
    if log.is_enabled() {
        log.mark(queue.used_ring(), layout.used_len() as u64);
    }
}

/// How a ring was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Fresh,
    Resumed,
}

/// Chains that are being popped; the control plane waits meanwhile.
pub struct Batch<'a> {
    index: usize,
    state: std::sync::MutexGuard<'a, VringState<SharedMemory>>,
    memory: Arc<Memory>,
    layout: Layout,
    /// Chains that the guest had made available when the batch began.
    available: u16,
    start: Option<Start>,
    outstanding: &'a mut u16,
    inflight: Option<&'a mut InflightQueue>,
    again: &'a mut VecDeque<u16>,
}

impl Batch<'_> {
    /// Whether the ring was just started and had been in use before: by a driver that talked to another process, or to
    /// this one before a pause, and has not set the device up anew.
    pub fn is_resumed(&self) -> bool {
        self.start == Some(Start::Resumed)
    }

    /// Whether the ring was just started by a driver that sets the device up from nothing. (Or by one that had used it
    /// for a multiple of 65,536 chains exactly.)
    pub fn is_fresh(&self) -> bool {
        self.start == Some(Start::Fresh)
    }

    /// Entries of the queue: the most chains that can be popped and not completed.
    pub fn queue_size(&self) -> u16 {
        self.layout.size
    }

    /// Pops the next chain into `chain`; `None` when there is none.
    ///
    /// A chain that cannot be followed is popped as well, and has to be completed like any other. It has no buffers,
    /// but [`Chain::write_last_byte`] works if its last byte could be found.
    pub fn pop(&mut self, chain: &mut Chain) -> Option<Result<(), ChainError>> {
        loop {
            let replayed = !self.again.is_empty();
            let head = self.next_head()?;
            if let Some(inflight) = &mut self.inflight {
                inflight.take(head);
            }
            // SAFETY: `resolve` found the whole table of `size` descriptors in this memory map.
            let result = unsafe { chain.fill(&self.memory, self.layout.table, self.layout.size, head) };
            chain.set_replayed(replayed);
            if let Err(error) = &result {
                warn_limited!("Chain {head} of queue {} is refused: {error}", self.index);
                // A head that is no descriptor has no place in the used ring: the driver would not know it.
                if head >= self.layout.size {
                    continue;
                }
            }
            *self.outstanding = self.outstanding.saturating_add(1);
            return Some(result);
        }
    }

    fn next_head(&mut self) -> Option<u16> {
        if let Some(head) = self.again.pop_front() {
            return Some(head);
        }
        self.available = self.available.checked_sub(1)?;
        let queue = self.state.get_queue_mut();
        let next_avail = queue.next_avail();
        queue.set_next_avail(next_avail.wrapping_add(1));
        Some(self.layout.avail_entry(next_avail))
    }
}

/// Where the three parts of a queue are mapped here.
struct Layout {
    size: u16,
    table: *const u8,
    avail: *mut u8,
    used: *mut u8,
}

impl Layout {
    /// Finds the parts in `memory`. Each must lie in one region; the available and used rings are checked to be aligned
    /// when the front end sets them.
    fn resolve(memory: &Memory, state: &VringState<SharedMemory>) -> Option<Self> {
        let queue = state.get_queue();
        let size = queue.size();
        let count = usize::from(size);
        let layout = Self {
            size,
            table: host_ptr(memory, queue.desc_table(), DESCRIPTOR_SIZE * count)?,
            avail: host_ptr(memory, queue.avail_ring(), 6 + 2 * count)?,
            used: host_ptr(memory, queue.used_ring(), 6 + 8 * count)?,
        };
        // Guest regions are page aligned here and in the guest, but a front end could say otherwise.
        (layout.avail.cast::<u16>().is_aligned() && layout.used.cast::<u32>().is_aligned() && size > 0)
            .then_some(layout)
    }

    fn used_len(&self) -> usize {
        6 + 8 * usize::from(self.size)
    }

    fn avail_u16(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 3 + usize::from(self.size));
        // SAFETY: the available ring has 3 + size 16-bit fields, all mapped and aligned as `resolve` checked.
        unsafe { AtomicU16::from_ptr(self.avail.cast::<u16>().add(index)) }
    }

    fn used_u16(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 3 + 4 * usize::from(self.size));
        // SAFETY: the used ring has 3 + 4 * size 16-bit units, all mapped and aligned as `resolve` checked.
        unsafe { AtomicU16::from_ptr(self.used.cast::<u16>().add(index)) }
    }

    fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail_u16(0).load(Ordering::Relaxed))
    }

    fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail_u16(1).load(Ordering::Acquire))
    }

    fn avail_entry(&self, position: u16) -> u16 {
        u16::from_le(self.avail_u16(2 + usize::from(position % self.size)).load(Ordering::Relaxed))
    }

    fn used_event(&self) -> u16 {
        u16::from_le(self.avail_u16(2 + usize::from(self.size)).load(Ordering::Relaxed))
    }

    fn set_used_flags(&self, flags: u16) {
        self.used_u16(0).store(flags.to_le(), Ordering::Relaxed);
    }

    fn used_idx(&self) -> u16 {
        u16::from_le(self.used_u16(1).load(Ordering::Relaxed))
    }

    fn set_used_idx(&self, idx: u16) {
        self.used_u16(1).store(idx.to_le(), Ordering::Release);
    }

    fn set_avail_event(&self, idx: u16) {
        self.used_u16(2 + 4 * usize::from(self.size)).store(idx.to_le(), Ordering::Relaxed);
    }

    fn write_used(&self, position: u16, element: UsedElement) {
        let offset = 4 + 8 * usize::from(position % self.size);
        let raw = u64::from(element.head) | u64::from(element.len) << 32;
        // SAFETY: the used ring has `size` elements of 8 bytes after its 4-byte header, all mapped.
        unsafe { self.used.add(offset).cast::<u64>().write_unaligned(raw.to_le()) };
    }
}

/// Whether the used index passed the one that the driver waits for, going from `old` to `new` (virtio 1.3 text,
/// section 2.7.10, `vring_need_event`).
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::needs_event;

    proptest! {
        /// The driver is told exactly if the entry that it waits for is among those just added.
        #[test]
        fn an_event_is_needed_if_its_entry_was_added(event in any::<u16>(), old in any::<u16>(), added in 1u16..1024) {
            let naive = (0..added).any(|step| old.wrapping_add(step) == event);
            prop_assert_eq!(needs_event(event, old.wrapping_add(added), old), naive);
        }
    }
}
