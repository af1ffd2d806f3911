//! Tlock and Tgetlock: byte-range locks.

use std::sync::Arc;

use rustix::io::Errno;

use super::Locks;
use super::fid::Fid;
use super::saved::SavedLock;
use super::session::{Outcome, Session};
use crate::host::OpenFile;
use crate::host::lock::{self, Kind, LockRequest, OwnerId};
use crate::protocol::{LockRange, LockStatus, Reply, kind};

/// Writes the reply to a Tlock.
pub fn reply_lock(reply: &mut Reply, status: LockStatus) {
    reply.begin(kind::TLOCK).lock_status(status);
}

fn lock_kind(range: &LockRange<'_>) -> Result<Kind, Errno> {
    match range.kind {
        LockRange::READ => Ok(Kind::Read),
        LockRange::WRITE => Ok(Kind::Write),
        LockRange::UNLOCK => Ok(Kind::Unlock),
        _ => Err(Errno::INVAL),
    }
}

impl Session {
    pub(super) fn lock(
        &self,
        number: u32,
        fid: &Arc<Fid>,
        flags: u32,
        range: &LockRange<'_>,
        reply: &mut Reply,
    ) -> Result<Outcome, Errno> {
        let kind = lock_kind(range)?;
        let file = fid.file()?;
        let wanted = match self.server.options().locks {
            Locks::Host => self.take(fid, file, kind, range)?,
            Locks::None => None,
        };
        match wanted {
            None => {
                self.note_lock(number, fid, range);
                reply_lock(reply, LockStatus::Success);
            }
            Some(mut request) if flags & LockRange::FLAG_BLOCK != 0 => {
                request.begin();
                return Ok(Outcome::Locked(request));
            }
            Some(_) => reply_lock(reply, LockStatus::Blocked),
        }
        Ok(Outcome::Replied)
    }

    /// Writes down that a lock was taken or given up.
    pub fn note_lock(&self, number: u32, fid: &Arc<Fid>, range: &LockRange<'_>) {
        if self.server.options().locks == Locks::Host
            && let Some(journal) = self.fids.journal()
            && self.fids.get(number).is_ok_and(|known| Arc::ptr_eq(&known, fid))
        {
            journal.locked(number, SavedLock::new(range));
        }
    }

    /// Takes or releases a lock, or returns what is to be waited for.
    pub(super) fn take(
        &self,
        fid: &Fid,
        file: &OpenFile,
        kind: Kind,
        range: &LockRange<'_>,
    ) -> Result<Option<LockRequest>, Errno> {
        let &LockRange { start, length, .. } = range;
        let id = self.lock_owner(fid, range);
        if kind == Kind::Unlock {
            lock::check_range(start, length)?;
            // Linux asks for it whenever a file is closed: also for a process that has inherited the file, and which holds
            // nothing. What is its parent's is not its to give up.
            return match self.lock_owners.find(&id) {
                Some(owner) => owner.unlock(file.locks(), start, length).map(|()| None),
                None => Ok(None),
            };
        }
        let may_write = self.server.check_writable().is_ok();
        let open = || fid.node.open_for_locks(file, kind, may_write);
        file.locks().enter(&self.lock_owners, id, (kind, start, length), open)?.lock(kind, start, length)
    }

    fn lock_owner(&self, fid: &Fid, range: &LockRange<'_>) -> OwnerId {
        self.lock_owners.id((fid.node.dev(), fid.node.ino()), range.client_id, range.proc_id)
    }

    pub(super) fn getlock(&self, fid: &Fid, range: &LockRange<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let kind = lock_kind(range)?;
        let file = fid.file()?;
        let conflict = match self.server.options().locks {
            Locks::Host => {
                let owner = self.lock_owners.find(&self.lock_owner(fid, range));
                let file = owner.as_ref().map_or_else(|| file.file(), |owner| owner.file());
                lock::test(file, kind, range.start, range.length)?
            }
            Locks::None => None,
        };
        let answer = match conflict {
            None => LockRange { kind: LockRange::UNLOCK, ..*range },
            Some(conflict) => LockRange {
                kind: if conflict.kind == Kind::Read { LockRange::READ } else { LockRange::WRITE },
                start: conflict.start,
                length: conflict.length,
                // A process of the host, or nobody in particular.
                proc_id: conflict.pid.max(0).unsigned_abs(),
                client_id: range.client_id,
            },
        };
        reply.begin(kind::TGETLOCK).lock_range(&answer);
        Ok(())
    }
}
