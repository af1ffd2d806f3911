//! The lock file next to a socket.
//!
//! The holder removes the file in the end, which has a race of its own: a second daemon can have opened the file just
//! before, and then it locks what is no longer at the path, while a third one makes a new file and locks that. So a
//! lock counts only if its file is still at the path after locking.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process;

use rustix::fs::{self, AtFlags, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::SocketError;

/// What is appended to the socket's path for the lock file.
const SUFFIX: &str = ".lock";

/// What tells one file from another, whatever their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl From<Stat> for FileId {
    fn from(stat: Stat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// A locked lock file. Dropping it releases the lock and leaves the file to be removed, which is up to the holder
/// and must come first.
#[derive(Debug)]
pub(super) struct Lock {
    /// The lock lasts as long as this is open.
    _file: File,
    name: OsString,
    id: FileId,
}

impl Lock {
    /// Locks the file that belongs to the socket `name`, whose whole path is `path`, in `directory`.
    pub(super) fn acquire(directory: &OwnedFd, path: &Path, name: &OsStr) -> Result<Self, SocketError> {
        let mut lock_name = name.to_owned();
        lock_name.push(SUFFIX);
        let failed =
            |error: io::Error| SocketError::Lock { lock: path.with_file_name(&lock_name), source: error };
        loop {
            // Not blocking, in case that somebody put a FIFO there.
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = fs::openat(directory, &lock_name, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|error| failed(error.into()))?;
            let mut file = File::from(file);
            match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => (),
                Err(Errno::WOULDBLOCK) => {
                    return Err(SocketError::InUse { path: path.into(), user: holder(&mut file) });
                }
                Err(error) => return Err(failed(error.into())),
            }
            let id = FileId::from(fs::fstat(&file).map_err(|error| failed(error.into()))?);
            match fs::statat(directory, &lock_name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if id == stat.into() => {
                    // Only for the message that another daemon may have to print.
                    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", process::id()));
                    return Ok(Self { _file: file, name: lock_name, id });
                }
                // The daemon that had the lock ended and removed the file in between. Each turn of the loop means
                // that one has ended, so there is an end to it.
                Ok(_) | Err(Errno::NOENT) => (),
                Err(error) => return Err(failed(error.into())),
            }
        }
    }

    /// The file's name in its directory.
    pub(super) fn name(&self) -> &OsStr {
        &self.name
    }

    pub(super) fn id(&self) -> FileId {
        self.id
    }
}

/// Who holds a lock, as far as its file tells.
fn holder(lock: &mut File) -> String {
    let mut text = String::new();
    let pid = lock.take(16).read_to_string(&mut text).ok().and_then(|_| text.trim().parse::<u32>().ok());
    pid.map_or_else(|| "another daemon".into(), |pid| format!("another daemon (process {pid})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    fn acquire(directory: &TempDir) -> Result<Lock, SocketError> {
        let path = directory.path().join("a.sock");
        Lock::acquire(&File::open(directory.path()).unwrap().into(), &path, path.file_name().unwrap())
    }

    #[test]
    fn a_lock_has_one_holder() {
        let directory = tempfile::tempdir().unwrap();
        let lock = acquire(&directory).unwrap();
        assert_eq!(lock.name(), "a.sock.lock");
        let error = acquire(&directory).unwrap_err();
        assert!(
            error.to_string().contains(&format!("another daemon (process {})", process::id())),
            "{error}"
        );
    }

    #[test]
    fn a_holder_that_left_no_number_is_still_a_holder() {
        let directory = tempfile::tempdir().unwrap();
        let _lock = acquire(&directory).unwrap();
        for content in [&b""[..], b"x", b"\xff\xfe", &[b'1'; 1000]] {
            fs::write(directory.path().join("a.sock.lock"), content).unwrap();
            let error = acquire(&directory).unwrap_err();
            assert!(error.to_string().contains("in use by another daemon: stop"), "{error}");
        }
    }

    #[test]
    fn a_lock_file_that_is_none_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let lock = directory.path().join("a.sock.lock");
        symlink("target", &lock).unwrap();
        let error = acquire(&directory).unwrap_err();
        assert!(matches!(error, SocketError::Lock { .. }), "{error}");
        assert!(error.to_string().contains("a.sock.lock"), "{error}");
        assert!(!directory.path().join("target").exists());
        fs::remove_file(&lock).unwrap();
        fs::create_dir(&lock).unwrap();
        assert!(matches!(acquire(&directory), Err(SocketError::Lock { .. })));
    }
}
