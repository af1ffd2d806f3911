//! Waiting for locks: a thread for each, which sleeps in the kernel until it has its lock.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::{Pid, gettid};
use thiserror::Error;

use super::{Kind, Range};
use crate::host::sys;

/// Most locks that are waited for at a time, unless said otherwise.
pub const MAX_WAITERS: usize = 64;

/// How long a thread has to notice that it was interrupted, before it is interrupted again.
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(1);

/// Bytes of a waiting thread's stack. It makes a few calls, and the callback.
const STACK_SIZE: usize = 256 << 10;

/// One that waits. No two of a [`Waiters`] have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WaitId(u64);

/// Why a lock is not waited for.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum WaitError {
    /// As many wait as may, or no thread can be made: let the client try again later.
    #[error("Too many locks are waited for already")]
    Busy,
    /// The range is none.
    #[error("No such range can be locked: {0}")]
    Range(Errno),
}

/// The locks that are waited for, at most a fixed number of them. Dropping this cancels all.
pub struct Waiters {
    shared: Arc<Shared>,
    limit: usize,
}

/// What the threads have in common with the owner.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// A thread has left.
    left: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    /// Those whose callbacks have not returned.
    waiting: HashMap<WaitId, Waiter>,
}

#[derive(Default)]
struct Waiter {
    /// The thread, from before it begins to wait until after it has ended waiting.
    thread: Option<Pid>,
    cancelled: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change below is a single step, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a waiting thread does.
    fn run(&self, id: WaitId, file: &OwnedFd, kind: Kind, range: Range) -> Result<(), Errno> {
        loop {
            {
                let mut state = self.lock();
                let waiter = state.waiting.get_mut(&id).expect("only this thread removes it");
                if waiter.cancelled {
                    return Err(Errno::INTR);
                }
                waiter.thread = Some(gettid());
            }
            // A signal that arrives between the check above and the call has no effect: it is sent again.
            let result = sys::set_lock(file.as_fd(), kind, range, true);
            let mut state = self.lock();
            let waiter = state.waiting.get_mut(&id).expect("only this thread removes it");
            waiter.thread = None;
            match result {
                // Stopped and continued, or a debugger.
                Err(Errno::INTR) if !waiter.cancelled => {}
                result => return result,
            }
        }
    }
}

impl Waiters {
    /// Room for `limit` waiting threads; [`MAX_WAITERS`] is a good number. They are made when they are needed.
    pub fn new(limit: usize) -> Self {
        Self { shared: Arc::default(), limit }
    }

    /// Waits in a thread of its own until the lock is taken, and calls `done` there, once: with the result, or with `EINTR`
    /// after [`Waiters::cancel`]. `done` must not call any function of this, and may be called before
    /// this function returns.
    ///
    /// Call [`super::try_lock`] before: nearly all locks are free. The thread begins as a copy of the calling one: with its
    /// ids and capabilities.
    pub fn wait(
        &self,
        file: Arc<OwnedFd>,
        kind: Kind,
        start: u64,
        length: u64,
        done: Box<dyn FnOnce(Result<(), Errno>) + Send>,
    ) -> Result<WaitId, WaitError> {
        let range = Range::new(start, length).map_err(WaitError::Range)?;
        sys::ready_for_interrupts();
        let mut state = self.shared.lock();
        if state.waiting.len() >= self.limit {
            return Err(WaitError::Busy);
        }
        let id = WaitId(state.next);
        state.next += 1;
        state.waiting.insert(id, Waiter::default());
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name("lock".to_owned()).stack_size(STACK_SIZE);
        let spawned = thread.spawn(move || {
            sys::let_interrupts_in();
            let result = shared.run(id, &file, kind, range);
            // The lock goes with the last descriptor, and that is not to be this one after `done` was told.
            drop(file);
            done(result);
            shared.lock().waiting.remove(&id);
            shared.left.notify_all();
        });
        if spawned.is_err() {
            state.waiting.remove(&id);
            return Err(WaitError::Busy);
        }
        Ok(id)
    }

    /// Ends the wait, if it has not ended yet, and returns after `done` has: with `EINTR`, and then the lock was not
    /// taken, or with what came before, which may be the lock.
    ///
    /// The caller must hold nothing that `done` waits for.
    pub fn cancel(&self, id: WaitId) {
        self.cancel_those(|waiting| waiting == id);
    }

    /// Number of locks that are waited for.
    pub fn len(&self) -> usize {
        self.shared.lock().waiting.len()
    }

    /// Whether no lock is waited for.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn cancel_those(&self, those: impl Fn(WaitId) -> bool) {
        let mut state = self.shared.lock();
        loop {
            let mut left = true;
            for (_, waiter) in state.waiting.iter_mut().filter(|(id, _)| those(**id)) {
                left = false;
                waiter.cancelled = true;
                // The thread is there as long as its number is, for it takes the lock that we hold to clear it.
                if let Some(thread) = waiter.thread {
                    sys::interrupt(thread);
                }
            }
            if left {
                return;
            }
            let result = self.shared.left.wait_timeout(state, INTERRUPT_INTERVAL);
            state = result.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Waiters {
    fn drop(&mut self) {
        self.cancel_those(|_| true);
    }
}

#[cfg(test)]
mod tests {
    use super::super::try_lock;
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use std::sync::mpsc::{Receiver, TryRecvError, channel};
    use std::time::Instant;
    use tempfile::NamedTempFile;

    /// After this something is stuck.
    const TIMEOUT: Duration = Duration::from_secs(20);

    fn open(file: &NamedTempFile) -> Arc<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        Arc::new(openat(CWD, file.path(), flags, Mode::empty()).unwrap())
    }

    /// A file whose first byte is locked by the first of two descriptors.
    fn locked() -> (NamedTempFile, Arc<OwnedFd>, Arc<OwnedFd>) {
        let file = NamedTempFile::new().unwrap();
        let (holder, other) = (open(&file), open(&file));
        assert_eq!(try_lock(holder.as_fd(), Kind::Write, 0, 1), Ok(true));
        assert_eq!(try_lock(other.as_fd(), Kind::Write, 0, 1), Ok(false));
        (file, holder, other)
    }

    fn wait(waiters: &Waiters, file: &Arc<OwnedFd>) -> (WaitId, Receiver<Result<(), Errno>>) {
        let (sender, receiver) = channel();
        let done = Box::new(move |result| sender.send(result).unwrap());
        (waiters.wait(Arc::clone(file), Kind::Write, 0, 1, done).unwrap(), receiver)
    }

    /// Returns once all that wait do so in the kernel.
    fn until_asleep(waiters: &Waiters) {
        let asleep = || {
            let state = waiters.shared.lock();
            state.waiting.values().all(|waiter| {
                waiter.thread.is_some_and(|thread| {
                    let stat = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
                    std::fs::read_to_string(stat).unwrap().contains(") S ")
                })
            })
        };
        let begin = Instant::now();
        while !asleep() {
            assert!(begin.elapsed() < TIMEOUT, "The threads do not come to wait");
            thread::yield_now();
        }
    }

    #[test]
    fn a_lock_comes_when_it_is_free() {
        let (_file, holder, other) = locked();
        let waiters = Waiters::new(1);
        let (id, done) = wait(&waiters, &other);
        until_asleep(&waiters);
        assert_eq!(done.try_recv(), Err(TryRecvError::Empty));
        assert_eq!(try_lock(holder.as_fd(), Kind::Unlock, 0, 0), Ok(true));
        assert_eq!(done.recv_timeout(TIMEOUT), Ok(Ok(())));
        assert_eq!(try_lock(holder.as_fd(), Kind::Write, 0, 1), Ok(false));
        // Ended already.
        waiters.cancel(id);
        assert!(waiters.is_empty());
    }

    #[test]
    fn a_lock_comes_when_its_holder_is_closed() {
        let (_file, holder, other) = locked();
        let waiters = Waiters::new(1);
        let (_, done) = wait(&waiters, &other);
        drop(holder);
        assert_eq!(done.recv_timeout(TIMEOUT), Ok(Ok(())));
    }

    #[test]
    fn a_cancelled_lock_is_not_taken() {
        let (file, holder, other) = locked();
        let waiters = Waiters::new(1);
        for asleep in [false, true] {
            let (id, done) = wait(&waiters, &other);
            if asleep {
                until_asleep(&waiters);
            }
            waiters.cancel(id);
            assert_eq!(done.try_recv(), Ok(Err(Errno::INTR)));
            assert!(waiters.is_empty());
        }
        drop(holder);
        assert_eq!(try_lock(open(&file).as_fd(), Kind::Write, 0, 1), Ok(true));
    }

    /// Whatever comes first: once `cancel` has returned, the lock is there or it is not.
    #[test]
    fn release_and_cancellation_race() {
        let (file, holder, other) = locked();
        let third = open(&file);
        let waiters = Waiters::new(1);
        let (mut taken, mut not) = (0, 0);
        for round in 0..400_u32 {
            let (id, done) = wait(&waiters, &other);
            if round % 4 == 0 {
                until_asleep(&waiters);
            }
            thread::scope(|scope| {
                scope.spawn(|| {
                    for _ in 0..round % 7 * 100 {
                        std::hint::spin_loop();
                    }
                    try_lock(holder.as_fd(), Kind::Unlock, 0, 0).unwrap();
                });
                waiters.cancel(id);
                let result = done.try_recv().unwrap();
                // The holder may not have released it yet, but nobody who waited may get it.
                while try_lock(holder.as_fd(), Kind::Unlock, 0, 0) != Ok(true) {}
                match result {
                    Ok(()) => {
                        taken += 1;
                        assert_eq!(try_lock(third.as_fd(), Kind::Write, 0, 1), Ok(false));
                        assert_eq!(try_lock(other.as_fd(), Kind::Unlock, 0, 1), Ok(true));
                    }
                    Err(errno) => {
                        not += 1;
                        assert_eq!(errno, Errno::INTR);
                        assert_eq!(try_lock(third.as_fd(), Kind::Write, 0, 1), Ok(true));
                        assert_eq!(try_lock(third.as_fd(), Kind::Unlock, 0, 1), Ok(true));
                    }
                }
            });
            assert_eq!(try_lock(holder.as_fd(), Kind::Write, 0, 1), Ok(true));
        }
        assert_eq!(taken + not, 400);
    }

    #[test]
    fn one_of_many_is_cancelled() {
        let (file, holder, _) = locked();
        let waiters = Waiters::new(8);
        let files: Vec<_> = (0..8).map(|_| open(&file)).collect();
        let waiting: Vec<_> = files.iter().map(|file| wait(&waiters, file)).collect();
        until_asleep(&waiters);
        let sender = Box::new(|_| panic!("There is no room for it"));
        assert_eq!(waiters.wait(Arc::clone(&files[0]), Kind::Write, 0, 1, sender), Err(WaitError::Busy));
        waiters.cancel(waiting[3].0);
        assert_eq!(waiting[3].1.try_recv(), Ok(Err(Errno::INTR)));
        assert_eq!(waiters.len(), 7);
        // The others get the lock one after the other, each by the end of the one before.
        drop((holder, files));
        for (i, (_, done)) in waiting.iter().enumerate() {
            if i != 3 {
                assert_eq!(done.recv_timeout(TIMEOUT), Ok(Ok(())));
            }
        }
    }

    #[test]
    fn dropping_cancels_all() {
        let (file, _holder, _) = locked();
        let waiters = Waiters::new(MAX_WAITERS);
        let files: Vec<_> = (0..MAX_WAITERS).map(|_| open(&file)).collect();
        let waiting: Vec<_> = files.iter().map(|file| wait(&waiters, file)).collect();
        drop(waiters);
        for (_, done) in waiting {
            assert_eq!(done.try_recv(), Ok(Err(Errno::INTR)));
        }
    }

    #[test]
    fn errors_are_reported() {
        let file = NamedTempFile::new().unwrap();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let read_only = Arc::new(openat(CWD, file.path(), flags, Mode::empty()).unwrap());
        let waiters = Waiters::new(1);
        let (_, done) = wait(&waiters, &read_only);
        assert_eq!(done.recv_timeout(TIMEOUT), Ok(Err(Errno::BADF)));
        let done = Box::new(|_| panic!("It does not begin"));
        let result = waiters.wait(read_only, Kind::Read, u64::MAX, 1, done);
        assert_eq!(result, Err(WaitError::Range(Errno::INVAL)));
    }
}
