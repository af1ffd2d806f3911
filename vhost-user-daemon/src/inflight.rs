//! Which chains are in flight, noted in memory that outlives this process.
//!
//! The front end keeps the memory. When a daemon was killed, the next one finds there which chains its predecessor had
//! taken and not completed, and does them again before anything else: no request of the guest is lost, in whatever order
//! they were completed. (A request may be done twice; for a disk that is the same as once.)
//!
//! vhost-user text, section "Inflight I/O tracking", "Split virtqueue". All of the memory is written by the front end as
//! well, so nothing in it is believed without a check.
#![expect(unsafe_code, reason = "the memory is shared with the front end")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

/// Bytes before the descriptors' entries: features (8), version (2), number of entries (2), head of the last batch (2),
/// used index (2).
const HEADER: usize = 16;
/// Bytes of an entry: in flight (1), padding (5), next in the batch (2), counter (8).
const ENTRY: usize = 16;
/// What the memory of each queue is aligned to.
const ALIGNMENT: usize = 64;
/// The only version there is.
const VERSION: u16 = 1;

const VERSION_OFFSET: usize = 8;
const COUNT_OFFSET: usize = 10;
const LAST_BATCH_OFFSET: usize = 12;
const USED_IDX_OFFSET: usize = 14;
const NEXT_OFFSET: usize = 6;
const COUNTER_OFFSET: usize = 8;

/// The memory of all queues.
#[derive(Debug)]
pub(crate) struct InflightMemory {
    map: MmapRegion<()>,
    num_queues: u16,
    queue_size: u16,
}

/// Bytes that `num_queues` queues of `queue_size` need.
fn memory_size(num_queues: u16, queue_size: u16) -> usize {
    usize::from(num_queues) * stride(queue_size)
}

fn stride(queue_size: u16) -> usize {
    (HEADER + ENTRY * usize::from(queue_size)).next_multiple_of(ALIGNMENT)
}

/// Makes the memory for `num_queues` queues of `queue_size`, empty, and tells its size (`GET_INFLIGHT_FD`).
pub(crate) fn create(num_queues: u16, queue_size: u16) -> io::Result<(OwnedFd, u64)> {
    let size = memory_size(num_queues, queue_size) as u64;
    let fd = memfd_create("vhost-user-inflight", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, size)?;
    Ok((fd, size))
}

impl InflightMemory {
    /// Maps memory that an earlier [`create`] made, maybe in another process (`SET_INFLIGHT_FD`).
    pub fn adopt(fd: OwnedFd, size: u64, offset: u64, num_queues: u16, queue_size: u16) -> io::Result<Self> {
        let file = File::from(fd);
        let needed = memory_size(num_queues, queue_size);
        let fits =
            offset.checked_add(size).is_some_and(|end| file.metadata().is_ok_and(|file| end <= file.len()));
        if !fits || size < needed as u64 || queue_size == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{size} bytes at {offset} for {num_queues} queues of {queue_size}"),
            ));
        }
        // A mapping starts at a page, so everything in it is aligned.
        let map = MmapRegion::from_file(FileOffset::new(file, offset), needed).map_err(io::Error::other)?;
        Ok(Self { map, num_queues, queue_size })
    }

    /// The part of queue `index`, if the queue has `size` descriptors at most.
    pub fn queue(self: &Arc<Self>, index: usize, size: u16) -> Option<InflightQueue> {
        if index >= self.num_queues.into() || size > self.queue_size {
            return None;
        }
        let start = index * stride(self.queue_size);
        Some(InflightQueue { memory: Arc::clone(self), start, size, counter: 0 })
    }
}

/// What is noted for one queue.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    memory: Arc<InflightMemory>,
    start: usize,
    size: u16,
    /// The number of the next chain, so that chains are done again in their order.
    counter: u64,
}

impl InflightQueue {
    /// Takes over from a process that is gone: the chains that it had in flight, in the order in which it had taken them.
    /// `None` if nobody has used the memory before. `used_idx` is that of the used ring.
    pub fn recover(&mut self, used_idx: u16) -> Option<Vec<u16>> {
        if self.u16(VERSION_OFFSET).load(Ordering::Acquire) != VERSION {
            self.u16(COUNT_OFFSET).store(self.size, Ordering::Relaxed);
            self.u16(USED_IDX_OFFSET).store(used_idx, Ordering::Relaxed);
            self.u16(VERSION_OFFSET).store(VERSION, Ordering::Release);
            return None;
        }
        // The process ended between showing a batch to the guest and noting that it had.
        let shown = used_idx.wrapping_sub(self.u16(USED_IDX_OFFSET).load(Ordering::Relaxed));
        let mut head = self.u16(LAST_BATCH_OFFSET).load(Ordering::Relaxed);
        for _ in 0..shown.min(self.size) {
            if head >= self.size {
                break;
            }
            self.flag(head).store(0, Ordering::Relaxed);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.u16(USED_IDX_OFFSET).store(used_idx, Ordering::Relaxed);

        let mut taken: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.flag(*head).load(Ordering::Relaxed) == 1)
            .map(|head| (self.count(head).load(Ordering::Relaxed), head))
            .collect();
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(count, _)| count.wrapping_add(1));
        Some(taken.into_iter().map(|(_, head)| head).collect())
    }

    /// Notes that the chain at `head` was taken.
    pub fn take(&mut self, head: u16) {
        if head >= self.size {
            return;
        }
        self.count(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.flag(head).store(1, Ordering::Release);
    }

    /// Notes that the chain at `head` is about to be shown in the used ring.
    pub fn prepare(&self, head: u16) {
        if head >= self.size {
            return;
        }
        let last = self.u16(LAST_BATCH_OFFSET);
        self.next(head).store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        last.store(head, Ordering::Release);
    }

    /// Notes that the chains at `heads` were shown, and that the used index is `used_idx` now.
    pub fn complete(&self, heads: impl Iterator<Item = u16>, used_idx: u16) {
        // What follows must not be seen before the used index, should this process be killed in between.
        fence(Ordering::Release);
        for head in heads.filter(|head| *head < self.size) {
            self.flag(head).store(0, Ordering::Relaxed);
        }
        self.u16(USED_IDX_OFFSET).store(used_idx, Ordering::Release);
    }

    fn entry(&self, head: u16) -> usize {
        debug_assert!(head < self.size);
        HEADER + ENTRY * usize::from(head)
    }

    fn flag(&self, head: u16) -> &AtomicU8 {
        let ptr = self.ptr(self.entry(head));
        // SAFETY: a byte of the entry, mapped as long as `memory` exists.
        unsafe { AtomicU8::from_ptr(ptr) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16(self.entry(head) + NEXT_OFFSET)
    }

    fn count(&self, head: u16) -> &AtomicU64 {
        let ptr = self.ptr(self.entry(head) + COUNTER_OFFSET);
        // SAFETY: 8 aligned bytes of the entry, mapped as long as `memory` exists.
        unsafe { AtomicU64::from_ptr(ptr.cast()) }
    }

    fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: 2 aligned bytes of this queue's part: all offsets are even and inside header or entries.
        unsafe { AtomicU16::from_ptr(self.ptr(offset).cast()) }
    }

    fn ptr(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < stride(self.size));
        self.memory.map.as_ptr().wrapping_add(self.start + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory for two queues of 8, as a front end keeps it, and a way to look at it anew.
    fn memory() -> impl Fn() -> InflightQueue {
        let (fd, size) = create(2, 8).unwrap();
        move || {
            let memory = InflightMemory::adopt(fd.try_clone().unwrap(), size, 0, 2, 8).unwrap();
            Arc::new(memory).queue(1, 8).unwrap()
        }
    }

    #[test]
    fn what_was_taken_and_not_completed_is_found_in_order() {
        let open = memory();
        let mut before = open();
        assert_eq!(before.recover(0xfffe), None);
        for head in [3, 1, 7, 0] {
            before.take(head);
        }
        // Completed out of order, over the end of the index.
        for head in [7, 1] {
            before.prepare(head);
        }
        before.complete([7, 1].into_iter(), 0);
        before.take(7);

        let mut after = open();
        assert_eq!(after.recover(0), Some(vec![3, 0, 7]));
        after.take(2);
        assert_eq!(open().recover(0), Some(vec![3, 0, 7, 2]));
    }

    #[test]
    fn a_batch_that_was_shown_but_not_noted_is_not_done_again() {
        let open = memory();
        let mut before = open();
        before.recover(10);
        for head in [4, 5, 6] {
            before.take(head);
        }
        before.prepare(4);
        before.complete([4].into_iter(), 11);
        before.prepare(6);
        before.prepare(5);
        // Killed before the used index was written: both are done again.
        assert_eq!(open().recover(11), Some(vec![5, 6]));
        // Killed after that: none is.
        assert_eq!(open().recover(13), Some(vec![]));
    }

    #[test]
    fn nonsense_in_the_memory_is_harmless() {
        let open = memory();
        let mut queue = open();
        queue.recover(0);
        queue.take(2);
        queue.u16(LAST_BATCH_OFFSET).store(0xffff, Ordering::Relaxed);
        assert_eq!(open().recover(5), Some(vec![2]));
        queue.u16(LAST_BATCH_OFFSET).store(2, Ordering::Relaxed);
        queue.next(2).store(2, Ordering::Relaxed);
        assert_eq!(open().recover(0x8000), Some(vec![]));
    }

    #[test]
    fn memory_that_is_too_small_is_refused() {
        let (fd, size) = create(1, 8).unwrap();
        for (num_queues, queue_size, size, offset) in [
            (2, 8, size, 0),
            (1, 128, size, 0),
            (1, 8, size, 4096),
            (1, 8, size - 1, 0),
            (1, 8, u64::MAX, 1),
            (1, 0, size, 0),
        ] {
            let fd = fd.try_clone().unwrap();
            assert!(InflightMemory::adopt(fd, size, offset, num_queues, queue_size).is_err());
        }
        let memory = Arc::new(InflightMemory::adopt(fd, size, 0, 1, 8).unwrap());
        assert!(memory.queue(1, 8).is_none() && memory.queue(0, 16).is_none());
    }
}
