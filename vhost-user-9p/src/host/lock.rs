//! Byte-range locks on the host (fcntl(2), "Open file description locks"), for Tlock and Tgetlock.
//!
//! Such a lock belongs to an open file description: it conflicts with those of all other ones, also in the same process,
//! and goes away when the description is closed. So each [`Owner`] of locks, a process of the client, has a description
//! of its own. Where a process's own POSIX locks all go when it closes any file of that inode, these are
//! given up one by one. The client's kernel, which keeps every lock as well, has told its processes and open files apart
//! before it asks; the locks here are there for everybody else. The kernel does not look for deadlocks between such
//! owners.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::sys;

mod owner;
mod waiters;

pub use owner::{Holding, Holdings, LockRequest, Owner, OwnerId, Owners};
pub use waiters::{MAX_WAITERS, WaitError, WaitId, Waiters};

/// What is asked of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A shared lock. The file has to be open for reading.
    Read,
    /// An exclusive lock. The file has to be open for writing.
    Write,
    /// No lock. Never fails because of others.
    Unlock,
}

/// A lock that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// [`Kind::Read`] or [`Kind::Write`].
    pub kind: Kind,
    /// First byte.
    pub start: u64,
    /// Number of bytes; 0 is up to the end of the file.
    pub length: u64,
    /// The process on the host that holds it; -1 if it is an open file's.
    pub pid: i32,
}

/// A range as the kernel takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: i64,
    pub(super) length: i64,
}

impl Range {
    /// `EINVAL`: the start is beyond every file. `EOVERFLOW`: the end is. fcntl(2) takes signed numbers, where a negative
    /// length is a range before the start: nothing that the protocol knows.
    fn new(start: u64, length: u64) -> Result<Self, Errno> {
        let start = i64::try_from(start).map_err(|_| Errno::INVAL)?;
        let length = i64::try_from(length).map_err(|_| Errno::OVERFLOW)?;
        // The last byte may have the largest number.
        start.checked_add((length - 1).max(0)).ok_or(Errno::OVERFLOW)?;
        Ok(Self { start, length })
    }
}

/// Fails unless there is such a range: `EINVAL`, `EOVERFLOW`.
pub fn check_range(start: u64, length: u64) -> Result<(), Errno> {
    Range::new(start, length).map(drop)
}

/// Takes or releases the lock on `length` bytes from `start` (0: up to the end of the file), without waiting. Returns
/// whether it was done; `false` is another's lock in the way.
///
/// A lock that the same open file has on the range becomes what is asked.
///
/// `EBADF`: the file is not open for that kind, or `O_PATH`. `EINVAL`, `EOVERFLOW`: no such range. `ENOLCK`: too many locks,
/// or the file system has none.
pub fn try_lock(file: BorrowedFd<'_>, kind: Kind, start: u64, length: u64) -> Result<bool, Errno> {
    match sys::set_lock(file, kind, Range::new(start, length)?, false) {
        Ok(()) => Ok(true),
        // Which of the two it is depends on the system, says fcntl(2).
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// A lock that keeps `kind` from being taken on the range; `None` if it could be had. The file's own locks are never in
/// the way.
///
/// A test for [`Kind::Unlock`] is one for [`Kind::Read`]: Linux sends that whatever the caller asked for, and so only
/// those are reported that are in the way of both.
///
/// Errors as for [`try_lock`], but how the file is open makes no difference.
pub fn test(file: BorrowedFd<'_>, kind: Kind, start: u64, length: u64) -> Result<Option<Conflict>, Errno> {
    let kind = if kind == Kind::Unlock { Kind::Read } else { kind };
    sys::test_lock(file, kind, Range::new(start, length)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use std::os::fd::{AsFd, OwnedFd};
    use std::path::Path;

    fn open(path: &Path, flags: OFlags) -> OwnedFd {
        openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn ranges_are_locked_and_tested() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(file.path(), OFlags::RDWR), open(file.path(), OFlags::RDWR));
        let (a, b) = (a.as_fd(), b.as_fd());
        assert_eq!(try_lock(a, Kind::Write, 10, 10), Ok(true));
        assert_eq!(try_lock(a, Kind::Write, 15, 1), Ok(true));
        assert_eq!(try_lock(b, Kind::Read, 0, 11), Ok(false));
        assert_eq!(try_lock(b, Kind::Write, 0, 10), Ok(true));
        let conflict = Conflict { kind: Kind::Write, start: 10, length: 10, pid: -1 };
        assert_eq!(test(b, Kind::Read, 0, 0), Ok(Some(conflict)));
        assert_eq!(test(b, Kind::Unlock, 0, 0), Ok(Some(conflict)));
        assert_eq!(test(b, Kind::Write, 20, 0), Ok(None));
        assert_eq!(test(a, Kind::Write, 10, 10), Ok(None));
        assert_eq!(try_lock(a, Kind::Unlock, 0, 0), Ok(true));
        assert_eq!(test(b, Kind::Write, 10, 10), Ok(None));
    }

    #[test]
    fn readers_share() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(file.path(), OFlags::RDWR), open(file.path(), OFlags::RDWR));
        let (a, b) = (a.as_fd(), b.as_fd());
        assert_eq!(try_lock(a, Kind::Read, 5, 0), Ok(true));
        assert_eq!(try_lock(b, Kind::Read, 0, 0), Ok(true));
        assert_eq!(try_lock(b, Kind::Write, 5, 1), Ok(false));
        assert_eq!(test(b, Kind::Unlock, 0, 0), Ok(None));
        let conflict = Conflict { kind: Kind::Read, start: 5, length: 0, pid: -1 };
        assert_eq!(test(b, Kind::Write, 0, 0), Ok(Some(conflict)));
    }

    #[test]
    fn closing_a_file_releases_its_locks_only() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let [a, b, c] = [(); 3].map(|()| open(file.path(), OFlags::RDWR));
        assert_eq!(try_lock(a.as_fd(), Kind::Write, 0, 1), Ok(true));
        assert_eq!(try_lock(b.as_fd(), Kind::Write, 1, 1), Ok(true));
        drop(b);
        assert_eq!(try_lock(c.as_fd(), Kind::Write, 1, 1), Ok(true));
        assert_eq!(try_lock(c.as_fd(), Kind::Write, 0, 1), Ok(false));
    }

    #[test]
    fn a_lock_needs_a_file_that_is_open_for_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = open(file.path(), OFlags::RDONLY);
        let write = open(file.path(), OFlags::WRONLY);
        let path = open(file.path(), OFlags::PATH);
        assert_eq!(try_lock(read.as_fd(), Kind::Write, 0, 1), Err(Errno::BADF));
        assert_eq!(try_lock(write.as_fd(), Kind::Read, 0, 1), Err(Errno::BADF));
        assert_eq!(try_lock(path.as_fd(), Kind::Read, 0, 1), Err(Errno::BADF));
        assert_eq!(test(path.as_fd(), Kind::Read, 0, 1), Err(Errno::BADF));
        assert_eq!(try_lock(read.as_fd(), Kind::Read, 0, 1), Ok(true));
        assert_eq!(test(read.as_fd(), Kind::Write, 0, 1), Ok(None));
    }

    #[test]
    fn ranges_end_where_files_do() {
        const MAX: u64 = i64::MAX as u64;

        let file = tempfile::tempfile().unwrap();
        for kind in [Kind::Read, Kind::Write, Kind::Unlock] {
            let lock = |start, length| try_lock(file.as_fd(), kind, start, length);
            assert_eq!(lock(MAX, 1), Ok(true));
            assert_eq!(lock(MAX, 0), Ok(true));
            assert_eq!(lock(0, MAX), Ok(true));
            assert_eq!(lock(1, MAX), Ok(true));
            assert_eq!(lock(2, MAX), Err(Errno::OVERFLOW));
            assert_eq!(lock(MAX, 2), Err(Errno::OVERFLOW));
            assert_eq!(lock(0, MAX + 1), Err(Errno::OVERFLOW));
            assert_eq!(lock(0, u64::MAX), Err(Errno::OVERFLOW));
            assert_eq!(lock(MAX + 1, 0), Err(Errno::INVAL));
            assert_eq!(lock(u64::MAX, u64::MAX), Err(Errno::INVAL));
            assert_eq!(test(file.as_fd(), kind, MAX, 2), Err(Errno::OVERFLOW));
        }
    }
}
