//! Threads for what may keep a thread waiting.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use rustix::event::{EventfdFlags, eventfd};

/// Work for a thread: it is done, and gives what is sent back.
pub trait Job: Send + 'static {
    /// What comes of it.
    type Done: Send + 'static;

    /// Does it, however long it takes.
    fn run(self) -> Self::Done;
}

/// A fixed number of threads that do jobs, first come, first served, and end with it.
///
/// A queue of its own and not one of the crates for channels: their receivers yield the processor again and again before
/// they sleep, which on a busy host costs more than the jobs.
pub struct Pool<J: Job> {
    queue: Arc<Queue<J>>,
    results: Arc<Results<J::Done>>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// Jobs that no thread has begun.
struct Queue<J> {
    state: Mutex<QueueState<J>>,
    changed: Condvar,
}

struct QueueState<J> {
    jobs: VecDeque<J>,
    /// No more will come.
    closed: bool,
}

impl<J> Queue<J> {
    fn lock(&self) -> MutexGuard<'_, QueueState<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job, once there is one; `None` when there will be none.
    fn next(&self) -> Option<J> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Where what is done in other threads comes back.
pub struct Results<D> {
    done: Mutex<Vec<D>>,
    doorbell: OwnedFd,
}

impl<D> Results<D> {
    fn new() -> io::Result<Self> {
        let doorbell = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { done: Mutex::default(), doorbell })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<D>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a result over, and wakes the receiver.
    pub fn send(&self, done: D) {
        let mut results = self.lock();
        results.push(done);
        if results.len() == 1 {
            // Full means that it is ringing already.
            let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
        }
    }

    /// Moves all results to `to`, in the order in which they came.
    pub fn take(&self, to: &mut Vec<D>) {
        let mut results = self.lock();
        if !results.is_empty() {
            to.append(&mut results);
            // Whatever comes from now on rings again.
            let _ = rustix::io::read(&self.doorbell, &mut [0; 8]);
        }
    }

    /// Readable when there is a result.
    pub fn doorbell(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}

impl<J: Job> Pool<J> {
    /// A pool of `threads`.
    pub fn new(threads: usize) -> io::Result<Self> {
        let state = QueueState { jobs: VecDeque::new(), closed: false };
        let mut pool = Self {
            queue: Arc::new(Queue { state: Mutex::new(state), changed: Condvar::new() }),
            results: Arc::new(Results::new()?),
            threads: Vec::new(),
        };
        for index in 0..threads {
            let (queue, results) = (Arc::clone(&pool.queue), Arc::clone(&pool.results));
            let run = move || {
                while let Some(job) = queue.next() {
                    results.send(job.run());
                }
            };
            pool.threads.push(thread::Builder::new().name(format!("9p-pool-{index}")).spawn(run)?);
        }
        Ok(pool)
    }

    /// Hands a job to the next free thread.
    pub fn submit(&self, job: J) {
        self.queue.lock().jobs.push_back(job);
        self.queue.changed.notify_one();
    }

    /// Where results come back, also from elsewhere.
    pub fn results(&self) -> &Arc<Results<J::Done>> {
        &self.results
    }
}

impl<J: Job> Drop for Pool<J> {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended the process.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Double(u32);

    impl Job for Double {
        type Done = u32;

        fn run(self) -> u32 {
            2 * self.0
        }
    }

    #[test]
    fn every_job_is_done_and_rings() {
        let pool = Pool::new(3).unwrap();
        (0..100).for_each(|number| pool.submit(Double(number)));
        let mut done = Vec::new();
        while done.len() < 100 {
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                pool.results().doorbell(),
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None).unwrap();
            let mut now = Vec::new();
            pool.results().take(&mut now);
            done.append(&mut now);
        }
        done.sort_unstable();
        assert_eq!(done, (0..100).map(|number| 2 * number).collect::<Vec<_>>());
        pool.results().take(&mut done);
        assert_eq!(rustix::io::read(pool.results().doorbell(), &mut [0; 8]), Err(rustix::io::Errno::AGAIN));
    }

    #[test]
    fn jobs_that_were_handed_over_are_done_before_it_ends() {
        let pool = Pool::new(1).unwrap();
        let results = Arc::clone(pool.results());
        (0..10).for_each(|number| pool.submit(Double(number)));
        drop(pool);
        let mut done = Vec::new();
        results.take(&mut done);
        assert_eq!(done.len(), 10);
    }
}
