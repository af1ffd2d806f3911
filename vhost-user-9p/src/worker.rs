//! Serves the request queues: takes messages out of chains, has them executed, and gives the chains back with the replies.
//!
//! One thread has all the queues, and does what does not wait itself. What may wait goes to a [`Pool`](crate::pool) or, if
//! it is a lock, to a thread of its own, and completes whenever it does: a slow file does not hold up a fast one.
//!
//! # Tflush
//! The client forgets the old request with the Rflush, and frees its buffers before: so the old request's chain is given back
//! first, in every case. What waits for a lock, or for cold data, is given up and gives its chain back with nothing in
//! it. What is being executed in another thread is waited for.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use vhost_user_daemon::{Progress, SharedRing, Source, Worker, warn_limited};

use crate::host::OpenFile;
use crate::host::lock::{LockRequest, MAX_WAITERS, WaitId, Waiters};
use crate::pool::Pool;
use crate::protocol::{LockStatus, READ_HEADER_SIZE, Request, kind};
use crate::server::place::place;
use crate::server::session::decode_errno;
use crate::server::{Outcome, Place, Session, reply_lock};
use crate::task::{Done, Task, Work, reply_size};
use vhost_user_daemon::bell::Bell;

/// Chains taken at a time: the client works on the first replies while the worker is at the next requests.
const BATCH: usize = 8;

/// Bytes moved before the guest is told of what is done so far.
const PUBLISH_AFTER: usize = 128 << 10;

/// Serves the queues of a device.
#[expect(
    clippy::vec_box,
    reason = "tasks move between these lists and other threads all the time, as pointers"
)]
pub struct NinepWorker {
    session: Arc<Session>,
    pool: Pool<Work>,
    bell: Bell,
    /// Locks that are waited for.
    waiters: Waiters,
    /// Tasks that are not in use, with the memory that they have allocated.
    spare: Vec<Box<Task>>,
    popped: Vec<Box<Task>>,
    done: Vec<Done>,
    /// What is under way elsewhere, by ticket.
    elsewhere: HashMap<u64, Held, foldhash::fast::RandomState>,
    /// A Tversion that waits for all that is under way.
    version: Option<Box<Task>>,
    next_ticket: u64,
    /// Chains that may be outstanding.
    depth: usize,
    /// Locks are given up, so that the rings can stop.
    interrupted: bool,
}

/// A request that is under way elsewhere.
#[expect(clippy::vec_box, reason = "as above")]
struct Held {
    tag: u16,
    work: HeldWork,
    /// Tflushes that wait for it.
    flushes: Vec<Box<Task>>,
}

enum HeldWork {
    /// The task is with the pool.
    Request,
    /// The task is here, what it waits for is being read.
    Read(Box<Task>),
    /// The task is here, and waits for a lock.
    Lock(Box<Task>, Wait),
    /// It was given up, and what is left of it is to be ignored.
    Dropped,
}

/// A lock that is waited for.
struct Wait {
    lock: LockRequest,
    id: WaitId,
    /// It was taken.
    taken: Arc<AtomicBool>,
}

impl NinepWorker {
    /// A worker that has `threads` others to help it, for queues of `depth` descriptors in all.
    pub fn new(session: Arc<Session>, threads: usize, depth: usize) -> std::io::Result<Self> {
        let pool = Pool::new(threads)?;
        Ok(Self {
            session,
            bell: Bell::new(pool.results().doorbell())?,
            pool,
            waiters: Waiters::new(MAX_WAITERS),
            spare: Vec::new(),
            popped: Vec::new(),
            done: Vec::new(),
            elsewhere: HashMap::default(),
            version: None,
            next_ticket: 0,
            depth,
            interrupted: false,
        })
    }

    /// Pops up to a batch of chains from a ring.
    fn pop(&mut self, queue: usize, rings: &[SharedRing]) -> bool {
        let mut ring = rings[queue].lock();
        let Some(mut batch) = ring.batch() else { return false };
        while self.popped.len() < BATCH {
            let mut task = self.spare.pop().unwrap_or_default();
            // A chain that cannot be followed has no buffers, and is given back as it is.
            if batch.pop(&mut task.chain).is_none() {
                self.spare.push(task);
                break;
            }
            task.queue = queue;
            task.ticket = self.next_ticket;
            self.next_ticket += 1;
            self.popped.push(task);
        }
        // Whatever was to stop goes on.
        self.interrupted &= self.popped.is_empty();
        !self.popped.is_empty()
    }

    /// Executes what was popped, in the order in which it came.
    fn execute(&mut self, rings: &[SharedRing]) {
        let mut popped = std::mem::take(&mut self.popped);
        let count = popped.len();
        let mut moved = 0;
        let mut later = Vec::new();
        for (index, task) in popped.drain(..).enumerate() {
            if self.version.is_some() {
                // It belongs to the new session, which has not begun.
                later.push(task);
                continue;
            }
            let queue = task.queue;
            moved += self.start(task, index + 1 < count, rings);
            if moved >= PUBLISH_AFTER {
                rings[queue].lock().publish();
                moved = 0;
            }
        }
        popped.append(&mut later);
        self.popped = popped;
    }

    /// Begins a request, and mostly ends it. Returns the bytes that were moved.
    fn start(&mut self, mut task: Box<Task>, others_wait: bool, rings: &[SharedRing]) -> usize {
        if task.read_message().is_err() {
            self.finish(task, rings);
            return 0;
        }
        self.dispatch(task, others_wait, rings)
    }

    /// Begins the request that was read.
    fn dispatch(&mut self, mut task: Box<Task>, others_wait: bool, rings: &[SharedRing]) -> usize {
        let session = Arc::clone(&self.session);
        if session.msize() > 0 && task.message_len() > session.msize() as usize {
            session.fail(Errno::INVAL, &mut task.reply);
            self.finish(task, rings);
            return 0;
        }
        let replayed = task.chain.is_replayed();
        let request = match task.request() {
            Ok(request) => request,
            Err(error) => {
                warn_limited!("A request is refused: {error}");
                session.fail(decode_errno(error), &mut task.reply);
                self.finish(task, rings);
                return 0;
            }
        };
        if task.chain.writable_len() < reply_size(&request) as u64 {
            session.fail(Errno::MSGSIZE, &mut task.reply);
            self.finish(task, rings);
            return 0;
        }
        match request {
            Request::Flush { oldtag } => {
                self.flush(oldtag, task, rings);
                return 0;
            }
            Request::Version { .. } if !self.elsewhere.is_empty() => {
                self.give_up_waiting(rings);
                self.version = Some(task);
                return 0;
            }
            _ => {}
        }
        let call = match session.prepare(&request, replayed) {
            Ok(call) => call,
            Err(error) => {
                session.fail(error, &mut task.reply);
                self.finish(task, rings);
                return 0;
            }
        };
        let thread = place(&request, &call, others_wait || !self.elsewhere.is_empty());
        let pace = call.fid.as_ref().map(|fid| Arc::clone(fid.node.pace()));
        task.call = call;
        let outcome = match thread {
            Place::Elsewhere => {
                self.hand_over(task);
                return 0;
            }
            Place::Here => task.execute(&session, false),
            Place::HereTimed => {
                let mark = pace.as_ref().map(|pace| pace.begin());
                let outcome = task.execute(&session, false);
                if let (Some(pace), Some(mark)) = (pace, mark) {
                    pace.end(mark);
                }
                outcome
            }
        };
        match outcome {
            Outcome::Replied => {
                let moved = task.reply.len() + task.chain.readable_len() as usize;
                self.finish(task, rings);
                moved
            }
            Outcome::WouldWait => {
                self.read_elsewhere(task);
                0
            }
            Outcome::Locked(lock) => {
                self.wait_for(lock, task, rings);
                0
            }
        }
    }

    fn hold(&mut self, ticket: u64, tag: u16, work: HeldWork) {
        self.elsewhere.insert(ticket, Held { tag, work, flushes: Vec::new() });
    }

    /// Has a request executed by another thread.
    fn hand_over(&mut self, task: Box<Task>) {
        self.hold(task.ticket, task.tag, HeldWork::Request);
        self.pool.submit(Work::Request(task, Arc::clone(&self.session)));
    }

    /// Has what a Tread asks for read by another thread.
    fn read_elsewhere(&mut self, task: Box<Task>) {
        let cold = match (task.request(), &task.call.fid) {
            (Ok(Request::Read { offset, count, .. }), Some(fid)) => {
                let direct = fid.file().is_ok_and(OpenFile::is_direct);
                let len = self.session.clamp_to(count, task.chain.writable_len() as usize);
                (!direct).then(|| Work::Read { ticket: task.ticket, fid: Arc::clone(fid), offset, len })
            }
            _ => None,
        };
        match cold {
            Some(work) => {
                self.hold(task.ticket, task.tag, HeldWork::Read(task));
                self.pool.submit(work);
            }
            None => self.hand_over(task),
        }
    }

    /// Waits for a lock on behalf of the client, unless too many do.
    fn wait_for(&mut self, lock: LockRequest, mut task: Box<Task>, rings: &[SharedRing]) {
        let (ticket, tag) = (task.ticket, task.tag);
        let results = Arc::clone(self.pool.results());
        let taken = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&taken);
        let done = Box::new(move |result: Result<(), Errno>| {
            told.store(result.is_ok(), Ordering::Release);
            results.send(Done::Lock { ticket, result });
        });
        let (start, length) = lock.range();
        let waits = self.waiters.wait(lock.file(), lock.kind(), start, length, done);
        if let Ok(id) = waits {
            self.hold(ticket, tag, HeldWork::Lock(task, Wait { lock, id, taken }));
        } else {
            // The client asks again after a while.
            reply_lock(&mut task.reply, LockStatus::Blocked);
            self.finish(task, rings);
        }
    }

    /// Tflush: answered when the old request's chain has been given back.
    fn flush(&mut self, oldtag: u16, mut task: Box<Task>, rings: &[SharedRing]) {
        task.reply.begin(kind::TFLUSH);
        let old = self
            .elsewhere
            .iter()
            .filter(|(_, held)| held.tag == oldtag && !matches!(held.work, HeldWork::Dropped))
            .map(|(ticket, _)| *ticket)
            .max();
        if let Some(ticket) = old
            && let Some(waiting) = self.drop_work(ticket, rings)
        {
            waiting.flushes.push(task);
            return;
        }
        self.finish(task, rings);
    }

    /// Gives up what waits, and gives its chain back with nothing in it. Returns what cannot be given up.
    fn drop_work(&mut self, ticket: u64, rings: &[SharedRing]) -> Option<&mut Held> {
        let held = self.elsewhere.get_mut(&ticket)?;
        match std::mem::replace(&mut held.work, HeldWork::Dropped) {
            HeldWork::Read(task) => self.finish(task, rings),
            HeldWork::Lock(task, wait) => {
                self.waiters.cancel(wait.id);
                if wait.taken.load(Ordering::Acquire) {
                    // Just before, and the client will not know.
                    wait.lock.release();
                }
                self.finish(task, rings);
            }
            HeldWork::Request => {
                let held = self.elsewhere.get_mut(&ticket)?;
                held.work = HeldWork::Request;
                return Some(held);
            }
            HeldWork::Dropped => {}
        }
        None
    }

    /// Gives up all that waits.
    fn give_up_waiting(&mut self, rings: &[SharedRing]) {
        let tickets: Vec<u64> = self.elsewhere.keys().copied().collect();
        for ticket in tickets {
            self.drop_work(ticket, rings);
        }
    }

    /// Finishes what comes back from other threads; `false` if there was nothing.
    fn reap(&mut self, rings: &[SharedRing]) -> bool {
        let mut any = false;
        let mut results = std::mem::take(&mut self.done);
        self.pool.results().take(&mut results);
        for done in results.drain(..) {
            any = true;
            let (ticket, finished) = match done {
                Done::Request(task, Outcome::Locked(lock)) => {
                    self.lock_is_anothers(lock, task, rings);
                    continue;
                }
                Done::Request(task, Outcome::WouldWait) => {
                    self.read_would_wait(task, rings);
                    continue;
                }
                Done::Request(task, Outcome::Replied) => (task.ticket, Some(task)),
                Done::Read { ticket, data } => (ticket, self.finish_read(ticket, data)),
                Done::Lock { ticket, result } => (ticket, self.finish_lock(ticket, result)),
            };
            if let Some(task) = finished {
                self.finish(task, rings);
            }
            if let Some(held) = self.elsewhere.remove(&ticket) {
                for flush in held.flushes {
                    self.finish(flush, rings);
                }
            }
        }
        self.done = results;
        if self.elsewhere.is_empty()
            && let Some(task) = self.version.take()
        {
            any = true;
            self.dispatch(task, false, rings);
        }
        any
    }

    /// Reads what another thread has found not to be cached, unless the client has given it up meanwhile.
    fn read_would_wait(&mut self, task: Box<Task>, rings: &[SharedRing]) {
        let flushes = self.elsewhere.remove(&task.ticket).map_or_else(Vec::new, |held| held.flushes);
        if flushes.is_empty() && self.version.is_none() {
            self.read_elsewhere(task);
            return;
        }
        self.finish(task, rings);
        for flush in flushes {
            self.finish(flush, rings);
        }
    }

    /// Waits for a lock that another thread has found to be somebody else's, unless the client has given it up meanwhile.
    fn lock_is_anothers(&mut self, lock: LockRequest, mut task: Box<Task>, rings: &[SharedRing]) {
        let flushes = self.elsewhere.remove(&task.ticket).map_or_else(Vec::new, |held| held.flushes);
        let gives_up = self.version.is_some() || self.interrupted;
        if flushes.is_empty() && !gives_up {
            self.wait_for(lock, task, rings);
            return;
        }
        if flushes.is_empty() {
            // The client asks again.
            reply_lock(&mut task.reply, LockStatus::Blocked);
        }
        self.finish(task, rings);
        for flush in flushes {
            self.finish(flush, rings);
        }
    }

    fn finish_read(&mut self, ticket: u64, data: Result<Vec<u8>, Errno>) -> Option<Box<Task>> {
        let held = self.elsewhere.get_mut(&ticket)?;
        let HeldWork::Read(mut task) = std::mem::replace(&mut held.work, HeldWork::Dropped) else {
            return None;
        };
        match data {
            Ok(data) => {
                let count = task.chain.write_from(&mut Source::new(&data), READ_HEADER_SIZE);
                task.reply.begin(kind::TREAD).data_in_place(count);
            }
            Err(error) => self.session.fail(error, &mut task.reply),
        }
        Some(task)
    }

    fn finish_lock(&mut self, ticket: u64, result: Result<(), Errno>) -> Option<Box<Task>> {
        let held = self.elsewhere.get_mut(&ticket)?;
        let HeldWork::Lock(mut task, wait) = std::mem::replace(&mut held.work, HeldWork::Dropped) else {
            return None;
        };
        match result {
            Ok(()) => {
                wait.lock.keep();
                if let (Ok(Request::Lock { fid: number, range, .. }), Some(fid)) =
                    (task.request(), &task.call.fid)
                {
                    self.session.note_lock(number, fid, &range);
                }
                reply_lock(&mut task.reply, LockStatus::Success);
            }
            Err(Errno::INTR) => reply_lock(&mut task.reply, LockStatus::Blocked),
            Err(error) => self.session.fail(error, &mut task.reply),
        }
        Some(task)
    }

    /// Gives a chain back with the reply in it, if there is one: the one way out of here for every chain.
    fn finish(&mut self, mut task: Box<Task>, rings: &[SharedRing]) {
        let mut ring = rings[task.queue].lock();
        let len = task.write_reply(ring.dirty_log());
        ring.complete(task.chain.head(), len);
        drop(ring);
        task.clear();
        self.spare.push(task);
    }
}

impl Worker for NinepWorker {
    fn pass(&mut self, rings: &[SharedRing]) -> Progress {
        let mut busy = self.reap(rings);
        let mut full = false;
        if self.version.is_none() && !self.popped.is_empty() {
            busy = true;
            self.execute(rings);
        }
        for queue in 0..rings.len() {
            if self.version.is_some() || self.elsewhere.len() >= self.depth {
                full = true;
                break;
            }
            if self.pop(queue, rings) {
                busy = true;
                self.execute(rings);
            }
        }
        for ring in rings {
            ring.lock().publish();
        }
        match (busy, full) {
            (true, _) => Progress::Busy,
            (false, true) => Progress::Full,
            (false, false) => Progress::Idle,
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.pool.results().doorbell())
    }

    fn interrupt(&mut self) {
        // A client that is told that it is blocked asks again.
        self.interrupted = true;
        for held in self.elsewhere.values() {
            if let HeldWork::Lock(_, wait) = &held.work {
                self.waiters.cancel(wait.id);
            }
        }
    }

    fn in_flight(&self) -> usize {
        let counts = |held: &&Held| self.interrupted || !matches!(held.work, HeldWork::Lock(..));
        self.elsewhere.values().filter(counts).count() + self.popped.len()
    }

    fn wait(&mut self, timeout: Duration, kicks: &[Arc<OwnedFd>]) {
        self.bell.wait(timeout, kicks);
    }
}
