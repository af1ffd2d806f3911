//! Requests through io_uring: many with one system call, all in flight at once.
#![expect(unsafe_code, reason = "the kernel is given pointers that outlive the call")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use libc::iovec;
use vhost_user_daemon::error_limited;

use super::blocking::{PUNCH, ZERO, is_missing, is_transient, is_unsupported, shrunk};
use super::operation::{rest, total_len};
use super::{Image, Job, Operation, Range};

/// The image, as the only registered file.
const IMAGE: Fixed = Fixed(0);

/// One ring and the jobs in it.
pub(super) struct Uring<J: Job> {
    ring: IoUring,
    slots: Vec<Option<Slot<J>>>,
    free: Vec<u32>,
    /// The eventfd that also ends a wait, and the tag of the poll on it.
    watched: Option<(Arc<OwnedFd>, u64)>,
    /// Polls started so far.
    polls: u32,
}

/// A job in flight.
struct Slot<J> {
    job: J,
    /// Submissions that have not come back.
    pending: u32,
    /// Bytes transferred so far.
    done: usize,
    /// What is left after a short transfer; the kernel reads it, so it stays here until the job is done.
    rest: Vec<iovec>,
    /// The first error.
    error: Option<io::Error>,
    retries: u32,
    /// The flush at the end of a durable discard or zeroing is under way.
    flushing: bool,
}

// SAFETY: the iovecs in `rest` point where those of the job do.
unsafe impl<J: Job + Send> Send for Uring<J> {}

/// The slot of a [`Tag`] that belongs to no job: polls, and their removal.
const NO_SLOT: u32 = u32::MAX;

/// What is known of a submission when it comes back: the slot, and the range that it was for.
#[derive(Clone, Copy)]
struct Tag {
    slot: u32,
    range: u32,
}

impl Tag {
    fn encode(self) -> u64 {
        u64::from(self.slot) << 32 | u64::from(self.range)
    }

    fn decode(value: u64) -> Self {
        Self { slot: (value >> 32) as u32, range: value as u32 }
    }
}

impl<J: Job> Uring<J> {
    /// A ring for `depth` jobs on `file`. Fails where io_uring is missing or forbidden.
    pub fn new(file: &File, depth: u16) -> io::Result<Self> {
        let ring = IoUring::builder().build(u32::from(depth))?;
        // Waits with a time-out (Linux 5.11), and polls that report more than once (5.13, as tagged resources).
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_resource_tagging() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel is older than Linux 5.13"));
        }
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self {
            ring,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..u32::from(depth)).rev().collect(),
            watched: None,
            polls: 0,
        })
    }

    /// Takes over a job. There must be room: fewer than `depth` jobs are in flight.
    pub fn start(&mut self, job: J) {
        let slot = self.free.pop().expect("the caller counts the jobs in flight");
        let operation = job.operation();
        let pending = match operation {
            Operation::Discard { ranges, .. } | Operation::WriteZeroes { ranges, .. } => ranges.len() as u32,
            _ => 1,
        };
        for range in 0..pending {
            let tag = Tag { slot, range };
            self.push(&entry(operation, range as usize).user_data(tag.encode()));
        }
        self.slots[slot as usize] =
            Some(Slot { job, pending, done: 0, rest: Vec::new(), error: None, retries: 0, flushing: false });
    }

    fn push(&mut self, entry: &Entry) {
        loop {
            // SAFETY: the pointers in the entry lead to guest memory and iovecs that belong to a job or to its slot.
            // Both stay in `slots` until the submission has come back, and `drop` waits for that as well.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.submit();
        }
    }

    /// Hands all that was started to the kernel.
    pub fn submit(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR)) => {}
                // The kernel is short of memory, or wants completions taken first: those in flight will free some.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    self.wait(Duration::from_millis(10));
                }
                Err(error) => {
                    // Nothing else is possible by the interface. The requests stay queued for the next call.
                    error_limited!("io_uring takes no submissions: {error}");
                    return;
                }
            }
        }
    }

    /// Moves the jobs that are done to `done`; continues those that are not.
    pub fn reap(&mut self, image: &Image, done: &mut Vec<(J, io::Result<()>)>) {
        let mut again = Vec::new();
        let Self { ring, slots, free, watched, .. } = self;
        for completion in ring.completion() {
            let tag = Tag::decode(completion.user_data());
            if tag.slot == NO_SLOT {
                let ended = !cqueue::more(completion.flags());
                watched.take_if(|(_, poll)| ended && *poll == tag.encode());
                continue;
            }
            let Some(slot) = &mut slots[tag.slot as usize] else {
                continue;
            };
            let result = match completion.result() {
                negative @ ..0 => Err(io::Error::from_raw_os_error(-negative)),
                bytes => Ok(bytes as usize),
            };
            match slot.complete(tag, result, image) {
                Next::Submit(entry) => again.push(entry.user_data(tag.encode())),
                Next::Wait => {}
                Next::Done => {
                    if let Some(slot) = slots[tag.slot as usize].take() {
                        free.push(tag.slot);
                        done.push((slot.job, slot.error.map_or(Ok(()), Err)));
                    }
                }
            }
        }
        for entry in &again {
            self.push(entry);
        }
        if !again.is_empty() {
            self.submit();
        }
    }

    /// Jobs that were started and not given back.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Lets everything written to the eventfd `kick` end a wait as well, instead of the one before.
    pub fn watch(&mut self, kick: Option<&Arc<OwnedFd>>) {
        match (&self.watched, kick) {
            (Some((watched, _)), Some(kick)) if Arc::ptr_eq(watched, kick) => return,
            (None, None) => return,
            _ => {}
        }
        self.polls = self.polls.wrapping_add(1);
        let tag = Tag { slot: NO_SLOT, range: self.polls }.encode();
        if let Some((_, before)) = self.watched.take() {
            self.push(
                &opcode::PollRemove::new(before).build().user_data(Tag { slot: NO_SLOT, range: 0 }.encode()),
            );
        }
        if let Some(kick) = kick {
            // Reports every write by itself, so that the eventfd need not be read in between.
            let poll = opcode::PollAdd::new(Fd(kick.as_raw_fd()), libc::POLLIN as u32).multi(true);
            self.push(&poll.build().user_data(tag));
            self.watched = Some((Arc::clone(kick), tag));
        }
    }

    /// Submits what was started, and waits until there is something to reap, or until `timeout`.
    pub fn wait(&mut self, timeout: Duration) {
        let timeout = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
        // Returns early for a signal, and with an error at the time-out. The caller looks for itself.
        let _ = self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout));
    }
}

impl<J: Job> Drop for Uring<J> {
    fn drop(&mut self) {
        // The kernel must not write to guest memory that is unmapped, and maybe something else by then.
        self.submit();
        while self.in_flight() > 0 {
            self.wait(Duration::from_secs(1));
            for completion in self.ring.completion() {
                let tag = Tag::decode(completion.user_data());
                if let Some(Some(slot)) = self.slots.get_mut(tag.slot as usize) {
                    slot.pending -= 1;
                    if slot.pending == 0 {
                        self.slots[tag.slot as usize] = None;
                        self.free.push(tag.slot);
                    }
                }
            }
        }
        // The kernel takes the ring apart some time later; the image is to be free at once. There is no remedy if not.
        let _ = self.ring.submitter().unregister_files();
    }
}

/// What follows when a submission came back.
enum Next {
    /// Submit this as well, with the same tag.
    Submit(Entry),
    /// Others of the same job are still under way.
    Wait,
    /// The job is done.
    Done,
}

impl<J: Job> Slot<J> {
    fn complete(&mut self, tag: Tag, result: io::Result<usize>, image: &Image) -> Next {
        let operation = self.job.operation();
        match (operation, result) {
            (_, Err(error)) if is_transient(&error, self.retries) => {
                self.retries += 1;
                return Next::Submit(self.entry(tag));
            }
            (Operation::Discard { .. }, Err(error)) if !self.flushing && is_missing(&error) => {}
            (Operation::Read { buffers, .. } | Operation::Write { buffers, .. }, Ok(bytes)) => {
                self.done += bytes;
                if bytes == 0 {
                    self.error = Some(shrunk());
                } else if self.done < total_len(buffers) {
                    self.rest = rest(buffers, self.done);
                    self.retries = 0;
                    return Next::Submit(self.entry(tag));
                }
            }
            // What the file system cannot do by itself is done here, if need be by writing zeroes.
            (Operation::WriteZeroes { ranges, .. }, Err(error))
                if !self.flushing && is_unsupported(&error) =>
            {
                if let Err(error) = image.zero_range(ranges[tag.range as usize]) {
                    self.error.get_or_insert(error);
                }
            }
            (_, Ok(_)) => {}
            (_, Err(error)) => {
                self.error.get_or_insert(error);
            }
        }
        self.pending -= 1;
        if self.pending > 0 {
            return Next::Wait;
        }
        if let Operation::Discard { durable: true, .. } | Operation::WriteZeroes { durable: true, .. } =
            operation
            && self.error.is_none()
            && !self.flushing
        {
            self.flushing = true;
            self.pending = 1;
            return Next::Submit(self.entry(tag));
        }
        if let Some(error) = &self.error {
            image.note_failure(operation, error);
        }
        Next::Done
    }

    /// The submission for what is left of the job.
    fn entry(&self, tag: Tag) -> Entry {
        if self.flushing {
            return flush_entry();
        }
        let done = self.done as u64;
        match self.job.operation() {
            Operation::Read { offset, .. } if done > 0 => read_entry(&self.rest, offset + done),
            Operation::Write { offset, durable, .. } if done > 0 => {
                write_entry(&self.rest, offset + done, durable)
            }
            operation => entry(operation, tag.range as usize),
        }
    }
}

/// The submission for `operation`, or for one of its ranges.
fn entry(operation: Operation<'_>, range: usize) -> Entry {
    match operation {
        Operation::Read { offset, buffers } => read_entry(buffers, offset),
        Operation::Write { offset, buffers, durable } => write_entry(buffers, offset, durable),
        Operation::Flush => flush_entry(),
        Operation::Discard { ranges, .. } => allocate_entry(ranges[range], PUNCH.bits()),
        Operation::WriteZeroes { ranges, .. } => {
            let flags = if ranges[range].unmap { PUNCH } else { ZERO };
            allocate_entry(ranges[range], flags.bits())
        }
    }
}

fn read_entry(buffers: &[iovec], offset: u64) -> Entry {
    match buffers {
        // Saves the kernel the import of an iovec.
        [one] => opcode::Read::new(IMAGE, one.iov_base.cast(), one.iov_len as u32).offset(offset).build(),
        several => opcode::Readv::new(IMAGE, several.as_ptr(), several.len() as u32).offset(offset).build(),
    }
}

fn write_entry(buffers: &[iovec], offset: u64, durable: bool) -> Entry {
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    match buffers {
        [one] => opcode::Write::new(IMAGE, one.iov_base.cast(), one.iov_len as u32)
            .offset(offset)
            .rw_flags(flags as _)
            .build(),
        several => opcode::Writev::new(IMAGE, several.as_ptr(), several.len() as u32)
            .offset(offset)
            .rw_flags(flags as _)
            .build(),
    }
}

fn flush_entry() -> Entry {
    opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build()
}

fn allocate_entry(range: Range, mode: u32) -> Entry {
    opcode::Fallocate::new(IMAGE, range.len).offset(range.offset).mode(mode as i32).build()
}
