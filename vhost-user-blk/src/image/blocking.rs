//! Operations done to the end in the calling thread: the `sync` engine, and what the `io_uring` engine does itself
//! because asking the ring would only be slower.
#![expect(unsafe_code, reason = "guest memory is handed to system calls")]

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use libc::iovec;
use log::error;
use rustix::fs::{FallocateFlags, fallocate};

use super::operation::{rest, total_len};
use super::sys::{block_discard, block_zeroout, gather, scatter};
use super::{Image, Kind, Operation, Range};
use vhost_user_daemon::file_io::{preadv, pwritev};

/// How often an operation is tried again that the kernel could not do at this moment.
pub(super) const MAX_RETRIES: u32 = 64;

/// Bytes that go through a bounce buffer, or are zeroed by writing, at a time.
const CHUNK: usize = 256 << 10;

/// Memory for O_DIRECT, and for zeroes, aligned to a page.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// Whether the page cache answers `RWF_NOWAIT` on this file; tmpfs, for one, does not.
pub(super) fn supports_nowait(file: &File) -> bool {
    let mut byte = 0u8;
    let buffer = iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: the buffer is the byte above.
    let result = unsafe { preadv(file, &[buffer], 0, libc::RWF_NOWAIT) };
    !matches!(result, Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP))
}

/// Whether O_DIRECT takes buffers and offsets that are aligned to 512 bytes and no more.
pub(super) fn takes_direct_sectors(file: &File) -> bool {
    let mut page = Page([0; 4096]);
    let buffer = iovec { iov_base: page.0[512..].as_mut_ptr().cast(), iov_len: 512 };
    // SAFETY: the buffer is a part of the page above.
    unsafe { preadv(file, &[buffer], 512, 0) }.is_ok()
}

/// Whether an operation has to be tried again, with the number of tries so far.
pub(super) fn is_transient(error: &io::Error, retries: u32) -> bool {
    retries < MAX_RETRIES && matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

impl Image {
    /// Does `operation`, however long it takes.
    pub(super) fn execute(&self, operation: Operation<'_>) -> io::Result<()> {
        let result = self.try_execute(operation);
        if let Err(error) = &result {
            self.note_failure(operation, error);
        }
        result
    }

    /// Remembers a failure after which no later flush can be believed.
    ///
    /// The kernel reports that it could not write a page once, and then takes the page for clean: the data is lost, and
    /// the next fdatasync(2) says that all is well. Past the page cache a failed write is its own report.
    pub(super) fn note_failure(&self, operation: Operation<'_>, error: &io::Error) {
        if operation.is_durable() && self.direct.is_none() && !self.lost_writes.swap(true, Ordering::Relaxed)
        {
            error!("The host could not store what was written ({error}): all flushes fail from now on");
        }
    }

    /// Fails if what an operation promises can no longer be kept.
    pub(super) fn check(&self, operation: Operation<'_>) -> io::Result<()> {
        if operation.is_durable() && self.lost_writes.load(Ordering::Relaxed) {
            return Err(io::Error::other(
                "data was lost before: check the host's storage, then restart the daemon",
            ));
        }
        Ok(())
    }

    fn try_execute(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::Read { offset, buffers } => self.transfer(buffers, offset, Direction::Read),
            Operation::Write { offset, buffers, durable } => {
                self.transfer(buffers, offset, Direction::Write { durable })
            }
            Operation::Flush => self.flush(),
            Operation::Discard { ranges, durable } => {
                ranges.iter().try_for_each(|range| self.discard_range(*range))?;
                self.flush_if(durable)
            }
            Operation::WriteZeroes { ranges, durable } => {
                ranges.iter().try_for_each(|range| self.zero_range(*range))?;
                self.flush_if(durable)
            }
        }
    }

    /// Reads what the page cache holds, without waiting for the disk. `false` if some of it is missing.
    pub(super) fn read_cached(&self, buffers: &[iovec], offset: u64) -> bool {
        // SAFETY: the buffers of an operation are mapped.
        unsafe { preadv(&self.file, buffers, offset, libc::RWF_NOWAIT) }
            .is_ok_and(|len| len == total_len(buffers))
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }

    fn flush_if(&self, durable: bool) -> io::Result<()> {
        if durable { self.flush() } else { Ok(()) }
    }

    /// Whether O_DIRECT would refuse these buffers.
    pub(super) fn needs_bounce(&self, buffers: &[iovec]) -> bool {
        self.direct.is_some_and(|direct| {
            let memory = direct.memory as usize - 1;
            let length = direct.offset as usize - 1;
            buffers
                .iter()
                .any(|buffer| buffer.iov_base as usize & memory != 0 || buffer.iov_len & length != 0)
        })
    }

    fn transfer(&self, buffers: &[iovec], offset: u64, direction: Direction) -> io::Result<()> {
        if self.needs_bounce(buffers) {
            return self.bounce(buffers, offset, direction);
        }
        let mut left;
        let (mut buffers, mut offset, mut retries) = (buffers, offset, 0);
        while !buffers.is_empty() {
            match self.transfer_once(buffers, offset, direction) {
                Ok(0) => return Err(shrunk()),
                Ok(done) if done == total_len(buffers) => break,
                Ok(done) => {
                    left = rest(buffers, done);
                    buffers = &left;
                    offset += done as u64;
                    retries = 0;
                }
                Err(error) if is_transient(&error, retries) => retries += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn transfer_once(&self, buffers: &[iovec], offset: u64, direction: Direction) -> io::Result<usize> {
        // SAFETY: the buffers of an operation are mapped.
        unsafe {
            match direction {
                Direction::Read => preadv(&self.file, buffers, offset, 0),
                Direction::Write { durable } => {
                    pwritev(&self.file, buffers, offset, if durable { libc::RWF_DSYNC } else { 0 })
                }
            }
        }
    }

    /// Transfers through aligned memory of our own, a bounded piece at a time.
    fn bounce(&self, buffers: &[iovec], offset: u64, direction: Direction) -> io::Result<()> {
        let total = total_len(buffers);
        let mut pages = vec![Page([0; 4096]); total.min(CHUNK).div_ceil(size_of::<Page>())];
        let base: *mut u8 = pages.as_mut_ptr().cast();
        let mut done = 0;
        while done < total {
            let len = (total - done).min(CHUNK);
            let piece = iovec { iov_base: base.cast(), iov_len: len };
            // SAFETY: `pages` has at least `len` bytes, which are initialised, and nobody else refers to them here.
            let bytes = unsafe { std::slice::from_raw_parts_mut(base, len) };
            if let Direction::Write { .. } = direction {
                // SAFETY: the buffers of an operation are mapped, and no objects of this process.
                unsafe { gather(buffers, done, bytes) };
            }
            self.transfer(&[piece], offset + done as u64, direction)?;
            if let Direction::Read = direction {
                // SAFETY: as above; the reference ended with the transfer and is made anew.
                unsafe { scatter(std::slice::from_raw_parts(base, len), buffers, done) };
            }
            done += len;
        }
        Ok(())
    }

    /// Gives a range back to the host.
    pub(super) fn discard_range(&self, range: Range) -> io::Result<()> {
        match self.kind {
            _ if range.len == 0 => Ok(()),
            Kind::BlockDevice => ignore_missing(block_discard(&self.file, range.offset, range.len)),
            Kind::File => ignore_missing(self.allocate(PUNCH, range)),
        }
    }

    /// Makes a range read as zeroes by the cheapest means that there is.
    pub(super) fn zero_range(&self, range: Range) -> io::Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        if range.unmap {
            match self.allocate(PUNCH, range) {
                Err(error) if is_unsupported(&error) => {}
                result => return result,
            }
        }
        if self.kind == Kind::BlockDevice {
            return block_zeroout(&self.file, range.offset, range.len);
        }
        if !self.no_zero_range.load(Ordering::Relaxed) {
            match self.allocate(ZERO, range) {
                Err(error) if is_unsupported(&error) => self.no_zero_range.store(true, Ordering::Relaxed),
                result => return result,
            }
        }
        self.write_zeroes(range)
    }

    fn allocate(&self, flags: FallocateFlags, range: Range) -> io::Result<()> {
        let mut retries = 0;
        loop {
            match fallocate(&self.file, flags, range.offset, range.len).map_err(io::Error::from) {
                Err(error) if is_transient(&error, retries) => retries += 1,
                result => return result,
            }
        }
    }

    fn write_zeroes(&self, range: Range) -> io::Result<()> {
        let len = range.len.min(CHUNK as u64) as usize;
        let mut pages = vec![Page([0; 4096]); len.div_ceil(size_of::<Page>())];
        let mut done = 0;
        while done < range.len {
            let piece = iovec {
                iov_base: pages.as_mut_ptr().cast(),
                iov_len: (range.len - done).min(len as u64) as usize,
            };
            self.transfer(&[piece], range.offset + done, Direction::Write { durable: false })?;
            done += piece.iov_len as u64;
        }
        Ok(())
    }
}

/// Which way data goes.
#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write { durable: bool },
}

/// Gives blocks back; the range reads as zeroes.
pub(super) const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
/// Zeroes a range and keeps it allocated.
pub(super) const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// Whether the file system or device lacks the operation, rather than failed at it.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    is_missing(error) || error.raw_os_error() == Some(libc::EINVAL)
}

/// Whether the host cannot do this at all. A discard is a hint, which may then be ignored.
pub(super) fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV))
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if is_missing(&error) { Ok(()) } else { Err(error) })
}

/// The end of the file came before the end of the disk.
pub(super) fn shrunk() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become smaller")
}

#[cfg(test)]
mod tests {
    use super::super::ImageOptions;
    use super::*;

    #[test]
    fn after_a_failed_flush_no_promise_is_given() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let image = Image::open(&ImageOptions {
            path: file.path().to_owned(),
            read_only: false,
            direct: false,
            logical_block_size: None,
        })
        .unwrap();
        let write = |durable| Operation::Write { offset: 0, buffers: &[], durable };
        let failure = io::Error::from_raw_os_error(libc::EIO);
        image.note_failure(write(false), &failure);
        assert!(image.check(Operation::Flush).is_ok(), "a write that failed was reported and is not cached");
        image.note_failure(Operation::Flush, &failure);
        assert!(image.check(Operation::Flush).is_err());
        assert!(image.check(write(true)).is_err());
        assert!(image.check(write(false)).is_ok());
        assert!(image.check(Operation::Read { offset: 0, buffers: &[] }).is_ok());
    }
}
