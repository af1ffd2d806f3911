//! Keeps a second writer away from an image, by the rules of QEMU, so that `qemu-img` and other virtual machines on
//! the same host are kept away as well.
//!
//! QEMU (block/file-posix.c) turns each permission into a byte of the file, and locks these bytes for reading with open
//! file description locks: byte 100 + n while it uses permission n, byte 200 + n while it does not let others use it.
//! Whoever wants permission n looks whether somebody holds 200 + n; whoever forbids it looks at 100 + n. The locks live
//! as long as the file is open; they end with the process, however it ends.

use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use super::sys::{Lock, byte_is_locked, lock_byte};

/// Permissions, by QEMU's numbers.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Where QEMU keeps the permissions in use, and those denied to others.
const USED: i64 = 100;
const DENIED: i64 = 200;

/// What becomes of an attempt to lock an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Locked, until the file is closed.
    Locked,
    /// Somebody else uses the image in a way that does not go together with ours.
    Busy,
    /// The file system knows no locks.
    Unsupported,
}

/// How long [`lock_patiently`] tries.
const PATIENCE: Duration = Duration::from_secs(1);

/// Locks `image` like [`lock`], and waits a moment for its last user to be gone.
///
/// The kernel takes an io_uring apart in the background, also when its process was killed, and the image that is
/// registered in it stays open and locked for some milliseconds more. A supervisor that starts the daemon again at once
/// would otherwise find the image in use.
pub(super) fn lock_patiently(image: &File, read_only: bool) -> io::Result<Outcome> {
    let end = Instant::now() + PATIENCE;
    loop {
        match lock(image, read_only)? {
            Outcome::Busy if Instant::now() < end => thread::sleep(Duration::from_millis(10)),
            outcome => return Ok(outcome),
        }
    }
}

/// Locks `image`: for us alone, or beside other readers if it is opened `read_only`.
fn lock(image: &File, read_only: bool) -> io::Result<Outcome> {
    match try_lock(image, read_only) {
        Ok(true) => Ok(Outcome::Locked),
        Ok(false) => {
            // The locks would stay while the file is open.
            for byte in USED..=DENIED + RESIZE {
                lock_byte(image, byte, Lock::Release)?;
            }
            Ok(Outcome::Busy)
        }
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP)) =>
        {
            Ok(Outcome::Unsupported)
        }
        Err(error) => Err(error),
    }
}

fn try_lock(image: &File, read_only: bool) -> io::Result<bool> {
    let used: &[i64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
    // Nobody else may change what our guest has cached.
    let denied = [WRITE, RESIZE];
    // First lock, then look: of two that start at the same moment at least one sees the other.
    for byte in used.iter().map(|n| USED + n).chain(denied.iter().map(|n| DENIED + n)) {
        match lock_byte(image, byte, Lock::Shared) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(false);
            }
            result => result?,
        }
    }
    for byte in used.iter().map(|n| DENIED + n).chain(denied.iter().map(|n| USED + n)) {
        if byte_is_locked(image, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn one_writer_or_many_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
        let writer = open();
        assert_eq!(lock(&writer, false).unwrap(), Outcome::Locked);
        for read_only in [false, true] {
            assert_eq!(lock(&open(), read_only).unwrap(), Outcome::Busy);
        }
        drop(writer);
        let readers = [open(), open()];
        for reader in &readers {
            assert_eq!(lock(reader, true).unwrap(), Outcome::Locked);
        }
        let late = open();
        assert_eq!(lock(&late, false).unwrap(), Outcome::Busy);
        drop(readers);
        // The failed attempt left nothing behind, although the file is still open.
        assert_eq!(lock(&open(), false).unwrap(), Outcome::Locked);
    }
}
