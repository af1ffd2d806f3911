//! One queue of a disk: pop, parse, execute, finish.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use vhost_user_daemon::{Chain, Progress, Ring, SharedRing, Worker, warn_limited};
use zerocopy::{FromZeros, IntoBytes};

use crate::device::Disk;
use crate::image::{Engine, EngineChoice, EngineError, Job, Operation, Range};
use crate::request::{self, Header, Limits, MAX_SEGMENTS, Request, Segment, Status};

/// Data moved in the worker's own thread before the guest is told of what is done so far, in bytes.
const PUBLISH_AFTER: u64 = 512 << 10;

/// Chains taken at a time from an image that answers at once, out of the page cache: the guest works on the first
/// while the worker is at the next. With a queue of 32 this makes 2.3 times the requests that all at once do, at three
/// quarters of their CPU time, since neither side has to be woken so often.
const CACHED_BATCH: usize = 8;

/// Requests that are not submitted before the worker finds nothing else to do.
const SUBMIT_WITH_WAIT: usize = 4;

/// Serves one queue of a [`Disk`].
#[expect(clippy::vec_box, reason = "tasks move between these lists and the engine all the time, as pointers")]
pub struct BlkWorker {
    disk: Arc<Disk>,
    limits: Limits,
    engine: Engine<Box<Task>>,
    depth: usize,
    /// Tasks that are not in use, with the memory that their chains have allocated.
    spare: Vec<Box<Task>>,
    popped: Vec<Box<Task>>,
    done: Vec<(Box<Task>, io::Result<()>)>,
}

/// A chain on its way through the worker.
#[derive(Debug, Default)]
pub struct Task {
    chain: Chain,
    step: Step,
    ranges: Vec<Range>,
    durable: bool,
}

/// What is to be done with a chain.
#[derive(Clone, Copy, Debug, Default)]
enum Step {
    /// Execute this.
    Execute(Request),
    /// Answer with this status.
    Finish(Status),
    /// It is no request: give it back, with a status if there is a place for it.
    #[default]
    Return,
}

// SAFETY: the iovecs and ranges are on the heap and not touched before the engine gives the task back; the chain holds the
// memory map that its iovecs point into.
#[expect(unsafe_code, reason = "a promise about pointers")]
unsafe impl Job for Box<Task> {
    fn operation(&self) -> Operation<'_> {
        let durable = self.durable;
        match self.step {
            Step::Execute(Request::In { offset }) => {
                Operation::Read { offset, buffers: self.chain.writable() }
            }
            Step::Execute(Request::Out { offset }) => {
                Operation::Write { offset, buffers: self.chain.readable(), durable }
            }
            Step::Execute(Request::Discard) => Operation::Discard { ranges: &self.ranges, durable },
            Step::Execute(Request::WriteZeroes) => Operation::WriteZeroes { ranges: &self.ranges, durable },
            // The others never reach the engine; a flush does no harm.
            _ => Operation::Flush,
        }
    }
}

impl Task {
    /// Splits header and status off the chain, and says what is to be done with it.
    fn parse(&mut self, limits: &Limits) -> Step {
        if self.chain.take_last_byte().is_err() {
            return Step::Return;
        }
        let mut header = Header::new_zeroed();
        if self.chain.read(header.as_mut_bytes()).is_err() {
            return Step::Finish(Status::IoError);
        }
        let parsed = request::parse(&header, self.chain.readable_len(), self.chain.writable_len(), limits)
            .and_then(|request| match request {
                Request::Discard | Request::WriteZeroes => {
                    self.parse_segments(request, limits).map(|()| request)
                }
                _ => Ok(request),
            });
        match parsed {
            Ok(Request::Discard | Request::WriteZeroes) if self.ranges.is_empty() => Step::Finish(Status::Ok),
            Ok(request) => Step::Execute(request),
            Err(status) => Step::Finish(status),
        }
    }

    fn parse_segments(&mut self, request: Request, limits: &Limits) -> Result<(), Status> {
        let mut segments = [Segment::new_zeroed(); MAX_SEGMENTS as usize];
        // `request::parse` has checked the length.
        let count = self.chain.readable_len() as usize / size_of::<Segment>();
        let segments = &mut segments[..count];
        self.chain.read(segments.as_mut_bytes()).map_err(|_| Status::IoError)?;
        request::parse_segments(request, segments, limits, &mut self.ranges)
    }

    /// Bytes that are moved.
    fn data_len(&self) -> u64 {
        match self.step {
            Step::Execute(Request::In { .. }) => self.chain.writable_len(),
            Step::Execute(Request::Out { .. }) => self.chain.readable_len(),
            _ => 0,
        }
    }
}

impl BlkWorker {
    /// A worker for a queue of at most `queue_size` descriptors.
    pub fn new(disk: Arc<Disk>, choice: EngineChoice, queue_size: u16) -> Result<Self, EngineError> {
        Ok(Self {
            limits: disk.limits(),
            engine: Engine::new(Arc::clone(disk.image()), choice, queue_size)?,
            disk,
            depth: queue_size.into(),
            spare: Vec::new(),
            popped: Vec::new(),
            done: Vec::new(),
        })
    }

    /// Pops what is available, as far as there is room, and parses it.
    fn pop(&mut self, ring: &mut Ring) {
        let mut room = self.depth - self.engine.in_flight();
        if self.engine.is_cached() {
            room = room.min(CACHED_BATCH);
        }
        let Some(mut batch) = ring.batch() else { return };
        if batch.is_resumed() {
            self.disk.suspect();
        }
        let durable = self.disk.is_write_through();
        while room > 0 {
            let mut task = self.spare.pop().unwrap_or_default();
            task.step = match batch.pop(&mut task.chain) {
                None => {
                    self.spare.push(task);
                    return;
                }
                Some(Ok(())) => task.parse(&self.limits),
                Some(Err(_)) => Step::Return,
            };
            task.durable = durable;
            self.popped.push(task);
            room -= 1;
        }
    }

    /// Executes what was popped, or hands it to the engine.
    fn execute(&mut self, ring: &mut Ring) {
        let alone = self.popped.len() == 1 && self.engine.in_flight() == 0;
        let mut popped = std::mem::take(&mut self.popped);
        let mut moved = 0;
        for task in popped.drain(..) {
            match task.step {
                Step::Return => {
                    // A driver that does not look at the used length may have an old status there.
                    task.chain.write_last_byte(Status::IoError as u8, ring.dirty_log());
                    self.give_back(task, 0, ring);
                }
                Step::Finish(status) => self.finish(task, status, 0, ring),
                Step::Execute(Request::GetId) => {
                    let written = task.chain.write(self.disk.serial());
                    self.finish(task, Status::Ok, written as u64, ring);
                }
                Step::Execute(request) => {
                    if request == Request::Flush {
                        self.disk.trust();
                    }
                    let len = task.data_len();
                    if let Some((task, result)) = self.engine.start(task, alone) {
                        self.complete(task, result, ring);
                        moved += len;
                    }
                    if moved >= PUBLISH_AFTER {
                        ring.publish();
                        moved = 0;
                    }
                }
            }
        }
        self.popped = popped;
    }

    /// Finishes what the engine has done; `false` if there was nothing.
    fn reap(&mut self, ring: &mut Ring) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(&mut done);
        let any = !done.is_empty();
        for (task, result) in done.drain(..) {
            self.complete(task, result, ring);
        }
        self.done = done;
        any
    }

    /// Turns the result of I/O into a status.
    fn complete(&mut self, task: Box<Task>, result: io::Result<()>, ring: &mut Ring) {
        match result {
            Ok(()) => {
                let written =
                    if let Step::Execute(Request::In { .. }) = task.step { task.data_len() } else { 0 };
                self.finish(task, Status::Ok, written, ring);
            }
            Err(error) => {
                warn_limited!("{} failed: {error}", Description(&task));
                // Some of it may have been read.
                task.chain.log_written(task.data_len(), ring.dirty_log());
                self.finish(task, Status::IoError, 0, ring);
            }
        }
    }

    /// Writes the status and completes the chain: the one way out for every request that has a place for a status.
    /// `written` bytes of data lie before it.
    fn finish(&mut self, task: Box<Task>, status: Status, written: u64, ring: &mut Ring) {
        task.chain.log_written(written, ring.dirty_log());
        task.chain.write_last_byte(status as u8, ring.dirty_log());
        self.give_back(task, written as u32 + 1, ring);
    }

    fn give_back(&mut self, mut task: Box<Task>, used_len: u32, ring: &mut Ring) {
        ring.complete(task.chain.head(), used_len);
        task.chain.clear();
        task.ranges.clear();
        self.spare.push(task);
    }
}

impl Worker for BlkWorker {
    fn pass(&mut self, rings: &[SharedRing]) -> Progress {
        let [ring] = rings else { return Progress::Idle };
        let ring = &mut *ring.lock();
        let reaped = self.reap(ring);
        let full = self.engine.in_flight() >= self.depth;
        self.pop(ring);
        let popped = !self.popped.is_empty();
        if popped {
            // A few are submitted together with the wait for them. More are worth a call of their own, as reads from
            // the page cache are done when it returns.
            let many = self.popped.len() > SUBMIT_WITH_WAIT;
            self.execute(ring);
            if many {
                self.engine.submit();
                self.reap(ring);
            }
        }
        ring.publish();
        match (reaped || popped, full) {
            (true, _) => Progress::Busy,
            (false, true) => Progress::Full,
            (false, false) => Progress::Idle,
        }
    }

    fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    fn wait(&mut self, timeout: Duration, kicks: &[Arc<OwnedFd>]) {
        // A worker has one queue.
        self.engine.wait(timeout, kicks.first());
    }
}

/// A task as a person reads it.
struct Description<'a>(&'a Task);

impl std::fmt::Display for Description<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let len = self.0.data_len();
        match self.0.step {
            Step::Execute(Request::In { offset }) => write!(formatter, "Reading {len} bytes at {offset}"),
            Step::Execute(Request::Out { offset }) => write!(formatter, "Writing {len} bytes at {offset}"),
            Step::Execute(Request::Discard) => write!(formatter, "Discarding {} ranges", self.0.ranges.len()),
            Step::Execute(Request::WriteZeroes) => {
                write!(formatter, "Zeroing {} ranges", self.0.ranges.len())
            }
            _ => formatter.write_str("Flushing"),
        }
    }
}
