//! The state file: what a session is taken up from by a daemon that replaces this one.
//!
//! It is a journal. Each change of a fid is appended as a record by one write(2) before the guest is answered, so that it is
//! there whatever ends the process; it is not flushed, since with the host the guest ends as well. When the file is some
//! times larger than what counts in it, what counts is copied to a second file, which takes its place: so there are two of
//! them, PATH and PATH.2, both open from the start, because a sandbox has no paths to make others at.
//!
//! | bytes | |
//! |---|---|
//! | 8 | [`MAGIC`] |
//! | 8 | generation, little-endian: the file with the higher one counts |
//! | 4 | CRC-32 of these 16 bytes |
//! | ... | records: length (4 bytes), CRC-32 (4 bytes), a [`Record`] in the format of postcard |
//!
//! The header of a copy is written last: without it the file does not count. A process that is killed leaves a front part of
//! its last record at most, which is cut off; anything else that is wrong was not written by this, and is refused.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::warn;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::saved::{SavedFid, SavedLock, SavedSession};

/// The first bytes of the file. The last one is the version of the format.
pub const MAGIC: [u8; 8] = *b"vu9pst\n1";

/// Bytes before the first record.
const HEADER: usize = 20;

/// Bytes before a record's content.
const FRAME: usize = 8;

/// Bytes of the longest record: two paths and some more.
const MAX_RECORD: usize = 32 << 10;

/// Bytes that a file may have without being copied, and how many times what counts in it.
const SLACK: (u64, u64) = (1 << 20, 4);

/// Bytes that are copied at a time.
const CHUNK: usize = 1 << 20;

/// Why a state file cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// It cannot be opened, read or written.
    #[error("The state file {} cannot be used: check its folder and permissions (--state-file)", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it.
    #[error(
        "The state file {} is in use: end the other daemon, or give each its own (--state-file)",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{} is no state file of this version of vhost-user-9p: choose another path (--state-file)", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Its content was changed.
    #[error(
        "The state file {} is damaged at byte {at}: delete it; a guest that has the share mounted has to mount it again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        at: u64,
    },
}

/// What is written at a time.
#[derive(Debug, Serialize, Deserialize)]
enum Record {
    /// The first record of a file: the session that all others belong to.
    Session(SavedSession),
    /// A fid stands for this from now on.
    Fid(u32, SavedFid),
    /// A fid ends.
    Gone(u32),
    /// A lock was taken or released.
    Lock(u32, SavedLock),
}

/// The state file.
#[derive(Debug)]
pub struct Journal(Mutex<State>);

#[derive(Debug)]
struct State {
    files: [File; 2],
    /// The one that counts.
    active: usize,
    generation: u64,
    /// Bytes that it has.
    end: u64,
    /// Bytes of them that count.
    live: u64,
    session: Option<SavedSession>,
    fids: HashMap<u32, Entry, foldhash::fast::RandomState>,
    /// It could not be written to.
    failed: bool,
}

/// A fid in the file.
#[derive(Debug)]
struct Entry {
    /// Where its record begins, and how long that is.
    at: u64,
    len: usize,
    locks: Vec<SavedLock>,
}

impl Journal {
    /// Opens the state file, or makes it, for this process alone. To be called before a sandbox takes paths away.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let mut second = OsString::from(path);
        second.push(".2");
        let paths = [path.to_owned(), second.into()];
        let mut found = [None, None];
        let mut files = Vec::new();
        for (path, found) in paths.iter().zip(&mut found) {
            let failed = |source| StateError::File { path: path.clone(), source };
            let mut file = open(path).map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => return Err(StateError::InUse { path: path.clone() }),
                result => result.map_err(|error| failed(error.into()))?,
            }
            let mut content = Vec::new();
            file.read_to_end(&mut content).map_err(failed)?;
            *found = generation(&content)
                .map_err(|()| StateError::Foreign { path: path.clone() })?
                .map(|generation| (generation, content));
            files.push(file);
        }
        let files = <[File; 2]>::try_from(files).expect("there are two paths");
        let active = usize::from(
            found[1].as_ref().map(|(generation, _)| generation)
                > found[0].as_ref().map(|(generation, _)| generation),
        );
        let mut state = State {
            files,
            active,
            generation: 0,
            end: 0,
            live: 0,
            session: None,
            fids: HashMap::default(),
            failed: false,
        };
        if let Some((generation, content)) = found[active].take() {
            state.generation = generation;
            let path = &paths[active];
            state.read(&content).map_err(|at| StateError::Damaged { path: path.clone(), at })?;
            let failed = |source| StateError::File { path: path.clone(), source };
            state.files[active].set_len(state.end).map_err(failed)?;
        }
        Ok(Self(Mutex::new(state)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session begins: what was known before is forgotten.
    pub fn begin(&self, session: SavedSession) {
        self.lock().act(|state| {
            state.session = Some(session);
            state.fids.clear();
            state.rewrite()
        });
    }

    /// A fid stands for `saved` from now on.
    pub fn fid(&self, fid: u32, saved: SavedFid) {
        self.lock().act(|state| state.append(&Record::Fid(fid, saved)));
    }

    /// A fid ends.
    pub fn gone(&self, fid: u32) {
        self.lock().act(|state| state.append(&Record::Gone(fid)));
    }

    /// The open file of a fid has taken or given up a lock.
    pub fn locked(&self, fid: u32, lock: SavedLock) {
        self.lock().act(|state| state.append(&Record::Lock(fid, lock)));
    }

    /// The session in the file, with all its fids; `None` if there is none.
    pub fn load(&self) -> Option<Loaded> {
        let state = self.lock();
        let session = state.session.clone().filter(|_| !state.failed)?;
        let mut fids = Vec::with_capacity(state.fids.len());
        for entry in state.fids.values() {
            let mut bytes = vec![0; entry.len];
            state.files[state.active].read_exact_at(&mut bytes, entry.at).ok()?;
            if let Ok(Record::Fid(fid, saved)) = postcard::from_bytes(&bytes[FRAME..]) {
                fids.push((fid, saved, entry.locks.clone()));
            }
        }
        Some(Loaded { session, fids })
    }
}

/// What a state file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The session.
    pub session: SavedSession,
    /// Its fids, in no order, with the locks of the open ones.
    pub fids: Vec<(u32, SavedFid, Vec<SavedLock>)>,
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// The generation of a file; `None` if it does not count, an error if it is none of ours.
fn generation(content: &[u8]) -> Result<Option<u64>, ()> {
    let header = &content[..content.len().min(HEADER)];
    if header.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let header: &[u8; HEADER] = header.try_into().map_err(drop)?;
    let (front, crc) = header.split_at(HEADER - 4);
    if !front.starts_with(&MAGIC) || crc != crc32fast::hash(front).to_le_bytes() {
        return Err(());
    }
    front[MAGIC.len()..].try_into().map(|bytes| Some(u64::from_le_bytes(bytes))).map_err(drop)
}

fn header(generation: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..16].copy_from_slice(&generation.to_le_bytes());
    let crc = crc32fast::hash(&header[..16]);
    header[16..].copy_from_slice(&crc.to_le_bytes());
    header
}

/// A record with its length and CRC.
fn frame(record: &Record) -> Result<Vec<u8>, io::Error> {
    let mut bytes = postcard::to_extend(record, vec![0; FRAME]).map_err(io::Error::other)?;
    let (frame, content) = bytes.split_at_mut(FRAME);
    frame[..4].copy_from_slice(&(content.len() as u32).to_le_bytes());
    frame[4..].copy_from_slice(&crc32fast::hash(content).to_le_bytes());
    Ok(bytes)
}

/// The content of the first record in `bytes`; `None` if it is not there to its end, an error if it was never written so.
fn unframe(bytes: &[u8]) -> Result<Option<&[u8]>, ()> {
    let Some((frame, rest)) = bytes.split_at_checked(FRAME) else { return Ok(None) };
    let number = |bytes: &[u8]| bytes.try_into().map(u32::from_le_bytes).map_err(drop);
    let (len, crc) = (number(&frame[..4])? as usize, number(&frame[4..])?);
    if len > MAX_RECORD {
        return Err(());
    }
    let Some(content) = rest.get(..len) else { return Ok(None) };
    if crc32fast::hash(content) == crc { Ok(Some(content)) } else { Err(()) }
}

impl State {
    /// Writes something. A state file that does not tell the truth is worse than none.
    fn act(&mut self, write: impl FnOnce(&mut Self) -> io::Result<()>) {
        if self.failed {
            return;
        }
        if let Err(error) = write(self) {
            warn!(
                "The state file cannot be written to, and is given up: a guest will not outlive this process: {error}"
            );
            self.failed = true;
            for file in &self.files {
                // There is nobody else to be told.
                let _ = file.set_len(0);
            }
        }
    }

    /// Takes in the records of a file. The error is where it is damaged.
    fn read(&mut self, content: &[u8]) -> Result<(), u64> {
        self.end = HEADER as u64;
        while let Some(bytes) = content.get(self.end as usize..).filter(|bytes| !bytes.is_empty()) {
            let Some(record) = unframe(bytes).map_err(|()| self.end)? else { return Ok(()) };
            let len = FRAME + record.len();
            let record = postcard::from_bytes(record).map_err(|_| self.end)?;
            self.note(&record, len);
            self.end += len as u64;
        }
        Ok(())
    }

    /// What a record of `len` bytes, which stands at the end, changes.
    fn note(&mut self, record: &Record, len: usize) {
        match record {
            Record::Session(session) => {
                self.session = Some(session.clone());
                self.live = len as u64;
            }
            Record::Fid(fid, _) => {
                self.forget(*fid);
                self.fids.insert(*fid, Entry { at: self.end, len, locks: Vec::new() });
                self.live += len as u64;
            }
            Record::Gone(fid) => self.forget(*fid),
            Record::Lock(fid, lock) => {
                if let Some(entry) = self.fids.get_mut(fid) {
                    lock.clone().apply(&mut entry.locks);
                }
            }
        }
    }

    fn forget(&mut self, fid: u32) {
        if let Some(entry) = self.fids.remove(&fid) {
            self.live -= entry.len as u64;
        }
    }

    fn append(&mut self, record: &Record) -> io::Result<()> {
        let bytes = frame(record)?;
        self.files[self.active].write_all_at(&bytes, self.end)?;
        self.note(record, bytes.len());
        self.end += bytes.len() as u64;
        if self.end > SLACK.0 + SLACK.1 * self.live { self.rewrite() } else { Ok(()) }
    }

    /// Copies what counts to the other file, which counts from then on.
    fn rewrite(&mut self) -> io::Result<()> {
        let (from, to) = (&self.files[self.active], &self.files[1 - self.active]);
        to.set_len(0)?;
        let mut buffer = vec![0; HEADER];
        let mut end = 0;
        if let Some(session) = &self.session {
            buffer.extend(frame(&Record::Session(session.clone()))?);
        }
        let live = (buffer.len() - HEADER) as u64;
        let mut moved = Vec::with_capacity(self.fids.len());
        for (fid, entry) in &self.fids {
            let at = buffer.len();
            moved.push((*fid, end + at as u64));
            buffer.resize(at + entry.len, 0);
            from.read_exact_at(&mut buffer[at..], entry.at)?;
            for lock in &entry.locks {
                buffer.extend(frame(&Record::Lock(*fid, lock.clone()))?);
            }
            if buffer.len() >= CHUNK {
                to.write_all_at(&buffer, end)?;
                end += buffer.len() as u64;
                buffer.clear();
            }
        }
        to.write_all_at(&buffer, end)?;
        end += buffer.len() as u64;
        to.write_all_at(&header(self.generation + 1), 0)?;
        from.set_len(0)?;
        self.generation += 1;
        self.active = 1 - self.active;
        self.end = end;
        self.live = live;
        for (fid, at) in moved {
            if let Some(entry) = self.fids.get_mut(&fid) {
                entry.at = at;
                self.live += entry.len as u64;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
