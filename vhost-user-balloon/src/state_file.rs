//! What outlives the daemon: the target, and what the driver says only once.
//!
//! The file is one line of JSON, written anew in place. Which pages are in the balloon is not in it: what was given back
//! stays given back, and a page that the guest takes back needs no entry. What is lost with a daemon that is killed
//! is the count of pages, and pages of its last 10 milliseconds that were not given back yet.
//!
//! A thread of its own writes it: on a host that is short of memory, or whose disk is busy, a write can take seconds, and
//! neither a guest nor an administrator is to wait for that.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vhost_user_daemon::error_limited;

/// Bytes of the file: more than the line can have, so that a shorter one covers the one before.
const SIZE: usize = 256;

/// What is kept.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// What the balloon was asked to be.
    pub requested_bytes: u64,
    /// What the driver said that it is.
    pub actual_pages: u32,
    /// What the driver fills free pages with.
    pub poison_val: u32,
}

/// Why a state file cannot be used.
#[derive(Debug, Error)]
pub enum StateFileError {
    /// It cannot be opened.
    #[error("State file {path} cannot be opened for reading and writing")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is something else in it.
    #[error("{path} is no state file of vhost-user-balloon: give another name, or remove it")]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Another daemon has it.
    #[error("State file {path} is in use by another daemon: give each one its own")]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

/// An open state file. Dropping it waits until all is written.
#[derive(Debug)]
pub struct StateFile {
    saved: Option<Saved>,
    desk: Arc<Desk>,
    writer: Option<JoinHandle<()>>,
}

/// What the thread is to write.
#[derive(Debug, Default)]
struct Desk {
    work: Mutex<Work>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Work {
    /// The last state, if it was not written yet.
    next: Option<Saved>,
    is_writing: bool,
    has_ended: bool,
}

impl Desk {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what there is to write, until the end.
    fn write(&self, file: &File, path: &Path) {
        loop {
            let idle = |work: &mut Work| work.next.is_none() && !work.has_ended;
            let work = self.changed.wait_while(self.work(), idle);
            let mut work = work.unwrap_or_else(PoisonError::into_inner);
            let Some(saved) = work.next.take() else { return };
            work.is_writing = true;
            drop(work);
            if let Err(error) = write(file, saved) {
                error_limited!("State file {} cannot be written: {error}", path.display());
            }
            self.work().is_writing = false;
            self.changed.notify_all();
        }
    }
}

fn write(file: &File, saved: Saved) -> io::Result<()> {
    let line = serde_json::to_string(&saved)?;
    file.write_all_at(format!("{line:<width$}\n", width = SIZE - 1).as_bytes(), 0)
}

impl StateFile {
    /// Opens the state file at `path`, or makes it, and reads what is in it.
    pub fn open(path: &Path) -> Result<Self, StateFileError> {
        let failed = |source| StateFileError::Open { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::AGAIN => StateFileError::InUse { path: path.to_owned() },
            error => failed(error.into()),
        })?;
        let foreign = || StateFileError::Foreign { path: path.to_owned() };
        let len = file.metadata().map_err(failed)?.len();
        let saved = match usize::try_from(len) {
            Ok(0) => None,
            Ok(len @ 1..=SIZE) => {
                let mut bytes = vec![0; len];
                file.read_exact_at(&mut bytes, 0).map_err(failed)?;
                // Nothing but zeroes is what a power failure of the host may leave.
                let is_void = bytes.iter().all(|byte| *byte == 0);
                (!is_void).then(|| serde_json::from_slice(&bytes)).transpose().map_err(|_| foreign())?
            }
            _ => return Err(foreign()),
        };
        let desk = Arc::<Desk>::default();
        let writer = {
            let (desk, path) = (Arc::clone(&desk), path.to_owned());
            let writer = thread::Builder::new().name("state-file".into());
            writer.spawn(move || desk.write(&file, &path)).map_err(failed)?
        };
        Ok(Self { saved, desk, writer: Some(writer) })
    }

    /// What was in it when it was opened.
    pub fn saved(&self) -> Option<Saved> {
        self.saved
    }

    /// Has `saved` written, and does not wait for it. To the page cache, which is enough for a daemon that is killed.
    pub fn save(&self, saved: Saved) {
        self.desk.work().next = Some(saved);
        self.desk.changed.notify_all();
    }

    /// Waits until all is written, but no longer than `patience`.
    pub fn settle(&self, patience: Duration) {
        let busy = |work: &mut Work| work.next.is_some() || work.is_writing;
        // Too long is no error: it will be written.
        let _ = self.desk.changed.wait_timeout_while(self.desk.work(), patience, busy);
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        self.desk.work().has_ended = true;
        self.desk.changed.notify_all();
        if let Some(writer) = self.writer.take() {
            // A panic of the thread has been reported where it happened.
            let _ = writer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let file = StateFile::open(&path).unwrap();
        assert_eq!(file.saved(), None);
        let saved = Saved { requested_bytes: u64::MAX, actual_pages: u32::MAX, poison_val: u32::MAX };
        file.save(saved);
        let other = StateFile::open(&path).unwrap_err();
        assert!(matches!(other, StateFileError::InUse { .. }), "{other}");
        file.save(Saved { requested_bytes: 5, ..Saved::default() });
        drop(file);
        let file = StateFile::open(&path).unwrap();
        assert_eq!(file.saved(), Some(Saved { requested_bytes: 5, ..Saved::default() }));
    }

    #[test]
    fn the_last_of_many_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let file = StateFile::open(&path).unwrap();
        let states = (0..1000).map(|requested_bytes| Saved { requested_bytes, ..Saved::default() });
        states.for_each(|saved| file.save(saved));
        file.settle(Duration::from_secs(10));
        assert!(std::fs::read_to_string(&path).unwrap().contains(":999,"));
    }

    #[test]
    fn a_file_that_a_power_failure_left_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        std::fs::write(&path, [0; SIZE]).unwrap();
        assert_eq!(StateFile::open(&path).unwrap().saved(), None);
    }

    #[test]
    fn files_of_others_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        for text in ["hello", "{\"requested_bytes\":1}", &"x".repeat(300)] {
            std::fs::write(&path, text).unwrap();
            let error = StateFile::open(&path).unwrap_err();
            assert!(matches!(error, StateFileError::Foreign { .. }), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
