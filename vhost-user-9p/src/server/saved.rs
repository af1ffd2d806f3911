//! What of a session can be written down.

use serde::{Deserialize, Serialize};

use crate::host::lock::Kind;
use crate::host::node::SavedNode;
use crate::protocol::LockRange;

/// A session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSession {
    /// The message size agreed on.
    pub msize: u32,
    /// What is served, in the order in which fids name it.
    pub shares: Vec<SavedShare>,
}

/// A directory that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedShare {
    /// The name to attach to.
    pub name: Vec<u8>,
    /// Number of the file system.
    pub dev: u64,
    /// Inode number of the directory.
    pub ino: u64,
}

/// A fid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFid {
    /// The guest's user who attached.
    pub uid: u32,
    /// Index of the share.
    pub share: u32,
    /// Where the client attached.
    pub root: SavedNode,
    /// The file.
    pub node: SavedNode,
    /// What the fid is used for.
    pub role: SavedRole,
}

/// What a fid is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedRole {
    /// Naming the file.
    Path,
    /// I/O on a file that was opened with these flags of the client.
    File(u32),
    /// Reading a directory.
    Directory(u32),
    /// Something that is not kept. `true`: its Tclunk was to have an effect.
    Lost(bool),
}

/// A lock on a range of a file, taken through a fid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedLock {
    /// The client's name, and the process there.
    pub owner: (Vec<u8>, u32),
    /// Exclusive, shared, or with `None` an end of all locks in the range.
    pub exclusive: Option<bool>,
    /// First byte.
    pub start: u64,
    /// The byte behind the last one; the largest number is behind all bytes.
    pub end: u64,
}

impl SavedLock {
    /// What a Tlock for this range has done.
    pub fn new(range: &LockRange<'_>) -> Self {
        let exclusive = match range.kind {
            LockRange::READ => Some(false),
            LockRange::WRITE => Some(true),
            _ => None,
        };
        let end = if range.length == 0 { u64::MAX } else { range.start.saturating_add(range.length) };
        Self { owner: (range.client_id.to_vec(), range.proc_id), exclusive, start: range.start, end }
    }

    /// What is to be taken.
    pub fn kind(&self) -> Kind {
        match self.exclusive {
            Some(true) => Kind::Write,
            Some(false) => Kind::Read,
            None => Kind::Unlock,
        }
    }

    /// The range and whose it is, as in a Tlock.
    pub fn range(&self) -> LockRange<'_> {
        let kind = match self.exclusive {
            Some(true) => LockRange::WRITE,
            Some(false) => LockRange::READ,
            None => LockRange::UNLOCK,
        };
        let length = if self.end == u64::MAX { 0 } else { self.end - self.start };
        LockRange { kind, start: self.start, length, proc_id: self.owner.1, client_id: &self.owner.0 }
    }

    /// What becomes of `locks` taken through the same fid when this one is taken: those of other processes stay.
    pub fn apply(self, locks: &mut Vec<Self>) {
        let mut left = Vec::with_capacity(locks.len() + 1);
        for lock in locks.drain(..) {
            if lock.owner != self.owner || lock.end <= self.start || self.end <= lock.start {
                left.push(lock);
                continue;
            }
            if lock.start < self.start {
                left.push(Self { end: self.start, ..lock.clone() });
            }
            if self.end < lock.end {
                left.push(Self { start: self.end, ..lock });
            }
        }
        if self.exclusive.is_some() {
            left.push(self);
        }
        *locks = left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_takes_the_place_of_those_in_its_range() {
        let lock_of = |proc_id, exclusive, start, length| {
            let kind = match exclusive {
                Some(true) => LockRange::WRITE,
                Some(false) => LockRange::READ,
                None => LockRange::UNLOCK,
            };
            SavedLock::new(&LockRange { kind, start, length, proc_id, client_id: b"guest" })
        };
        let lock = |exclusive, start, length| lock_of(1, exclusive, start, length);
        let mut locks = Vec::new();
        lock(Some(true), 0, 0).apply(&mut locks);
        lock(Some(false), 10, 10).apply(&mut locks);
        assert_eq!(locks, [lock(Some(true), 0, 10), lock(Some(true), 20, 0), lock(Some(false), 10, 10)]);
        lock(None, 5, 10).apply(&mut locks);
        assert_eq!(locks, [lock(Some(true), 0, 5), lock(Some(true), 20, 0), lock(Some(false), 15, 5)]);
        lock_of(2, Some(false), 6, 1).apply(&mut locks);
        lock(None, 0, 0).apply(&mut locks);
        assert_eq!(locks, [lock_of(2, Some(false), 6, 1)], "another process has its own");
    }
}
