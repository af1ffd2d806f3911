//! Which way a request goes to the disk.
//!
//! | request | page cache, RWF_NOWAIT works (ext4, xfs, ...) | page cache, otherwise (tmpfs) | O_DIRECT |
//! |---|---|---|---|
//! | a read, alone | preadv2(RWF_NOWAIT), io_uring if not cached | preadv | io_uring |
//! | reads, several | io_uring, one submission for all | preadv | io_uring |
//! | write | pwritev: io_uring would hand it to a kernel thread, which costs half as much again | pwritev | io_uring |
//! | flush | io_uring | fdatasync | io_uring |
//! | discard, zeroes | io_uring for files, ioctl for devices | fallocate, ioctl | as with the page cache |
//!
//! On tmpfs every request through io_uring is handed to a kernel thread, four times as dear as doing it here.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Once;
use std::time::Duration;

use log::info;
use thiserror::Error;

use super::uring::Uring;
use super::{Image, Job, Kind, Operation};

/// How I/O is done (`--io-engine`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineChoice {
    /// The better one for each request and image; `sync` where io_uring is forbidden
    #[default]
    Auto,
    /// io_uring for everything that it can do
    #[value(name = "io_uring")]
    IoUring,
    /// preadv and pwritev, one request at a time for each queue
    Sync,
}

/// The chosen engine cannot be used.
#[derive(Debug, Error)]
#[error("io_uring cannot be used here: choose --io-engine auto or sync")]
pub struct EngineError(#[source] io::Error);

/// What does the I/O of one queue. It holds the jobs that are in flight.
pub struct Engine<J: Job> {
    image: Arc<Image>,
    choice: EngineChoice,
    uring: Option<Uring<J>>,
}

impl<J: Job> Engine<J> {
    /// An engine for `image` with room for `depth` jobs.
    ///
    /// Fails only when io_uring was asked for by name. With `auto` its absence is said once and `sync` taken.
    pub fn new(image: Arc<Image>, choice: EngineChoice, depth: u16) -> Result<Self, EngineError> {
        let wanted = match choice {
            EngineChoice::Auto => image.direct.is_some() || image.nowait,
            EngineChoice::IoUring => true,
            EngineChoice::Sync => false,
        };
        let uring = match wanted.then(|| Uring::new(&image.file, depth)).transpose() {
            Ok(uring) => uring,
            Err(error) if choice == EngineChoice::Auto => {
                static SAID: Once = Once::new();
                SAID.call_once(|| {
                    info!("io_uring cannot be used here ({error}): requests are done one at a time");
                });
                None
            }
            Err(error) => return Err(EngineError(error)),
        };
        Ok(Self { image, choice, uring })
    }

    /// Starts `job`, or does it at once and gives it back with the result. `alone` says that nothing else is waiting
    /// or in flight.
    ///
    /// What was started reaches the kernel at the next [`Engine::submit`] or [`Engine::wait`].
    pub fn start(&mut self, job: J, alone: bool) -> Option<(J, io::Result<()>)> {
        let operation = job.operation();
        if let Err(error) = self.image.check(operation) {
            return Some((job, Err(error)));
        }
        if self.is_inline(operation) {
            let result = self.image.execute(operation);
            return Some((job, result));
        }
        if let Operation::Read { offset, buffers } = operation
            && alone
            && self.choice == EngineChoice::Auto
            && self.image.nowait
            && self.image.read_cached(buffers, offset)
        {
            return Some((job, Ok(())));
        }
        match &mut self.uring {
            Some(uring) => uring.start(job),
            None => unreachable!("without io_uring every operation is done inline"),
        }
        None
    }

    /// Whether the operation is done here rather than by io_uring.
    fn is_inline(&self, operation: Operation<'_>) -> bool {
        if self.uring.is_none() {
            return true;
        }
        match operation {
            Operation::Read { buffers, .. } => self.image.needs_bounce(buffers),
            Operation::Write { buffers, .. } => {
                (self.choice == EngineChoice::Auto && self.image.direct.is_none())
                    || self.image.needs_bounce(buffers)
            }
            Operation::Flush => self.image.read_only,
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => self.image.kind == Kind::BlockDevice,
        }
    }

    /// Whether most requests can be expected to be done as soon as they are submitted.
    pub fn is_cached(&self) -> bool {
        self.image.direct.is_none()
    }

    /// Hands what was started to the kernel.
    pub fn submit(&mut self) {
        if let Some(uring) = &mut self.uring {
            uring.submit();
        }
    }

    /// Moves the jobs that are done to `done`, with their results.
    pub fn reap(&mut self, done: &mut Vec<(J, io::Result<()>)>) {
        if let Some(uring) = &mut self.uring {
            uring.reap(&self.image, done);
        }
    }

    /// Jobs started and not yet given back.
    pub fn in_flight(&self) -> usize {
        self.uring.as_ref().map_or(0, Uring::in_flight)
    }

    /// Submits what was started, and waits until a job may be done, until something is written to the eventfd `kick`,
    /// or until `timeout`. The eventfd is not read.
    pub fn wait(&mut self, timeout: Duration, kick: Option<&Arc<OwnedFd>>) {
        if let Some(uring) = &mut self.uring {
            uring.watch(kick);
            uring.wait(timeout);
        }
    }
}
