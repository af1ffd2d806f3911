//! How many files are kept open only to name them.
//!
//! A guest that caches has a fid for each file that it remembers, which may be a million, and a process may have some
//! thousand files open. So there is a budget: when it is used up, nodes that were not used for a while give up their
//! descriptor, and keep what they find their file again by ([`Locator`](super::locator::Locator)).
//!
//! Which ones is found by the second chance algorithm: nodes with a descriptor stand in a queue. The first one is taken out;
//! if it was used since it was last looked at, it goes to the end of the queue. Each step is paid for by a node that was
//! made or used.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::node::Node;

/// Fewest and most descriptors of the budget.
const BOUNDS: (usize, usize) = (64, 100_000);

/// Descriptors that are given up at a time, and nodes that are looked at for that: more than one for the one that is made,
/// and not all, which may all be in use.
const SOME: (usize, usize) = (4, 16);

/// The same when the process has none left.
const MANY: (usize, usize) = (32, 4096);

/// A file open with `O_PATH`, which counts as such.
#[derive(Debug)]
pub struct PathFd {
    file: OwnedFd,
    count: Arc<AtomicUsize>,
}

impl AsFd for PathFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for PathFd {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The budget of descriptors, and those who have one.
#[derive(Debug)]
pub struct Descriptors {
    limit: usize,
    count: Arc<AtomicUsize>,
    queue: Mutex<VecDeque<Weak<Node>>>,
}

impl Descriptors {
    /// A budget of half of what the process may have open: the other half is for files that are open for their content.
    pub fn new() -> Self {
        let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let half = usize::try_from(limit / 2).unwrap_or(usize::MAX);
        Self::with_limit(half.clamp(BOUNDS.0, BOUNDS.1))
    }

    /// A budget of `limit`.
    pub fn with_limit(limit: usize) -> Self {
        Self { limit, count: Arc::default(), queue: Mutex::default() }
    }

    /// How many descriptors there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Counts a descriptor.
    pub(super) fn hold(&self, file: OwnedFd) -> Arc<PathFd> {
        self.count.fetch_add(1, Ordering::Relaxed);
        Arc::new(PathFd { file, count: Arc::clone(&self.count) })
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Weak<Node>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `node`, which has got a descriptor, give it up one day. If there are too many, others do so now.
    pub(super) fn enlist(&self, node: Weak<Node>) {
        let count = self.count();
        let mut queue = self.queue();
        queue.push_back(node);
        if queue.len() > 2 * count + BOUNDS.0 {
            // Most of them are gone.
            queue.retain(|node| node.strong_count() > 0);
        }
        drop(queue);
        if count > self.limit {
            self.give_up(SOME);
        }
    }

    /// Calls `open`, and once more if the process has no descriptors left and some can be given up.
    pub(super) fn open<T>(&self, open: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        match open() {
            Err(Errno::MFILE) if self.give_up(MANY) > 0 => open(),
            result => result,
        }
    }

    /// Closes up to `wanted` descriptors that were not used for a while, looking at `tries` nodes. Returns how many it were.
    fn give_up(&self, (wanted, tries): (usize, usize)) -> usize {
        let mut closed = 0;
        for _ in 0..tries {
            if closed == wanted {
                break;
            }
            let Some(next) = self.queue().pop_front() else { break };
            let Some(node) = next.upgrade() else { continue };
            if node.close() {
                closed += 1;
            } else {
                self.queue().push_back(next);
            }
        }
        closed
    }
}

impl Default for Descriptors {
    fn default() -> Self {
        Self::new()
    }
}
