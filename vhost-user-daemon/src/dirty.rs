//! The dirty log of live migration: which guest pages this process wrote.
//!
//! vhost-user text, section "Migration": while `VHOST_F_LOG_ALL` is acknowledged, the back end sets one bit for each
//! 4 KiB page of guest memory that it writes, in the shared memory that `VHOST_USER_SET_LOG_BASE` brought. Bit `n % 8`
//! of byte `n / 8` stands for page `n` of the guest's address space. The front end clears bits concurrently, so every
//! access is an atomic read-modify-write.
#![expect(unsafe_code, reason = "the log is memory shared with the front end")]

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vm_memory::{FileOffset, MmapRegion};

use crate::memory::{Memory, guest_address};

/// Bytes of guest memory that one bit stands for.
pub const LOG_PAGE: u64 = 4096;

/// The largest log that is mapped: enough for 64 TiB of guest address space.
const MAX_LOG_SIZE: u64 = (64 << 40) / LOG_PAGE / 8;

/// The dirty log of one connection. It is off until both a log and `LOG_ALL` were given, and then costs one atomic
/// operation per page written; while off it costs one load per completed batch.
#[derive(Debug, Default)]
pub struct DirtyLog {
    enabled: AtomicBool,
    map: RwLock<Option<Arc<MmapRegion<()>>>>,
}

impl DirtyLog {
    /// Maps `size` bytes at `offset` of `file` as the log, replacing the one before (`SET_LOG_BASE`).
    ///
    /// Fails when the file is smaller than that, or cannot be mapped.
    pub fn set_base(&self, file: File, offset: u64, size: u64) -> io::Result<()> {
        // A mapping that reaches beyond its file would kill this process at the first mark.
        let fits =
            offset.checked_add(size).is_some_and(|end| file.metadata().is_ok_and(|file| end <= file.len()));
        if size == 0 || size > MAX_LOG_SIZE || !fits {
            let error = format!("Dirty log of {size} bytes at {offset} of its file");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let map =
            MmapRegion::from_file(FileOffset::new(file, offset), size as usize).map_err(io::Error::other)?;
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(map));
        Ok(())
    }

    /// Starts or stops logging (`VHOST_F_LOG_ALL` in `SET_FEATURES`).
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::SeqCst);
    }

    /// Whether writes have to be marked. Ask after the write, not before: a write that ended before logging began is
    /// in the front end's first full copy.
    #[inline]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Marks `len` bytes of guest memory from guest address `addr` on. Pages beyond the log's end are left out, as the
    /// front end said that it does not want them.
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 || !self.is_enabled() {
            return;
        }
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let Some(map) = map.as_ref() else { return };
        let last = addr.saturating_add(len - 1) / LOG_PAGE;
        for page in addr / LOG_PAGE..=last.min((map.size() as u64 * 8).saturating_sub(1)) {
            // SAFETY: page / 8 is less than the size of the mapping, which `map` keeps alive.
            let byte = unsafe { AtomicU8::from_ptr(map.as_ptr().add((page / 8) as usize)) };
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }

    /// Marks the first `written` bytes of `iovecs`, which point into `memory`.
    pub(crate) fn mark_iovecs(&self, memory: &Memory, iovecs: &[libc::iovec], written: u64) {
        let mut left = written;
        for iovec in iovecs {
            let len = left.min(iovec.iov_len as u64);
            if len == 0 {
                break;
            }
            if let Some(addr) = guest_address(memory, iovec.iov_base.cast()) {
                self.mark(addr, len);
            }
            left -= len;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    fn log(size: u64) -> (DirtyLog, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let log = DirtyLog::default();
        log.set_base(file.try_clone().unwrap(), 0, size).unwrap();
        (log, file)
    }

    fn bytes(file: &mut File) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn marks_every_touched_page_and_only_while_enabled() {
        let (log, mut file) = log(2);
        log.mark(0, 1);
        assert_eq!(bytes(&mut file), [0, 0]);
        log.set_enabled(true);
        log.mark(LOG_PAGE - 1, 2);
        log.mark(9 * LOG_PAGE, LOG_PAGE);
        assert_eq!(bytes(&mut file), [0b11, 0b10]);
        log.set_enabled(false);
        log.mark(5 * LOG_PAGE, 1);
        assert_eq!(bytes(&mut file), [0b11, 0b10]);
    }

    #[test]
    fn pages_beyond_the_log_are_left_out() {
        let (log, mut file) = log(1);
        log.set_enabled(true);
        log.mark(7 * LOG_PAGE, u64::MAX);
        log.mark(u64::MAX, 1);
        assert_eq!(bytes(&mut file), [0b1000_0000]);
    }

    #[test]
    fn a_log_larger_than_its_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let log = DirtyLog::default();
        assert!(log.set_base(file.try_clone().unwrap(), 0, 8192).is_err());
        assert!(log.set_base(file.try_clone().unwrap(), 0, 0).is_err());
        assert!(log.set_base(file, 0, u64::MAX).is_err());
    }
}
