//! What lasts from one Tversion to the next, and which request is answered by what.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use rustix::io::Errno;
use vhost_user_daemon::warn_limited;

use super::fid::{Fid, Fids};
use super::journal::Journal;
use super::{Buffers, MIN_MSIZE, Reserved, Server};
use crate::host::Caller;
use crate::host::lock::{LockRequest, Owners};
use crate::protocol::{
    DecodeError, IO_HEADER_SIZE, NO_FID, READ_HEADER_SIZE, Reply, Request, VERSION, VERSION_UNKNOWN, kind,
};

/// What a page of the guest holds: I/O of whole pages is best for it.
const PAGE: u32 = 4096;

/// A client's session: its fids.
#[derive(Debug)]
pub struct Session {
    pub(super) server: Arc<Server>,
    pub(super) fids: Fids,
    /// Who holds locks, or has done so through a file that is still open.
    pub(super) lock_owners: Owners,
    /// The message size agreed on; 0 before a Tversion.
    msize: AtomicU32,
    open: Arc<AtomicUsize>,
    pub(super) xattr_bytes: Arc<AtomicUsize>,
}

/// The fids of a request as they were when it arrived.
#[derive(Debug, Default)]
pub struct Call {
    /// The one that the request is about.
    pub fid: Option<Arc<Fid>>,
    /// The other one, of requests that name two.
    pub other: Option<Arc<Fid>>,
    /// The request may have been executed before, by a process that was killed before the client was told.
    pub replayed: bool,
}

impl Call {
    /// The fid that the request is about.
    pub fn fid(&self) -> Result<&Arc<Fid>, Errno> {
        self.fid.as_ref().ok_or(Errno::BADF)
    }

    /// The other one.
    pub fn other(&self) -> Result<&Arc<Fid>, Errno> {
        self.other.as_ref().ok_or(Errno::BADF)
    }
}

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// The reply is written.
    Replied,
    /// It would have to wait for the host's storage. Nothing has happened yet.
    WouldWait,
    /// The lock is somebody else's, and the client waits for it.
    Locked(LockRequest),
}

/// The number by which clients know an error, of a message that cannot be understood.
pub fn decode_errno(error: DecodeError) -> Errno {
    match error {
        DecodeError::Malformed { .. } => Errno::INVAL,
        DecodeError::UnknownType(_) => Errno::OPNOTSUPP,
    }
}

impl Session {
    /// A session that waits for a Tversion. What it comes to is noted in `journal`, and if no Tversion comes the session
    /// in there is taken up again.
    pub fn new(server: &Arc<Server>, journal: Option<Arc<Journal>>) -> Self {
        Self {
            server: Arc::clone(server),
            fids: Fids::new(server, journal),
            lock_owners: Owners::new(server.options().max_open),
            msize: AtomicU32::new(0),
            open: Arc::default(),
            xattr_bytes: Arc::default(),
        }
    }

    /// The message size agreed on; 0 before there is one.
    pub fn msize(&self) -> u32 {
        self.msize.load(Ordering::Relaxed)
    }

    /// The bytes that I/O is best done in: what fits a message, in whole pages.
    pub(super) fn iounit(&self) -> u32 {
        self.msize().saturating_sub(IO_HEADER_SIZE) / PAGE * PAGE
    }

    /// Bytes of data that the reply to a Tread or Treaddir of `count` may have.
    pub(super) fn clamp(&self, count: u32, buffers: &dyn Buffers) -> usize {
        self.clamp_to(count, buffers.space())
    }

    /// The same, where the buffers have `space` bytes.
    pub fn clamp_to(&self, count: u32, space: usize) -> usize {
        let room = (self.msize() as usize).min(space).saturating_sub(READ_HEADER_SIZE);
        room.min(count as usize)
    }

    /// Takes one of the files that may be open.
    pub(super) fn reserve_open(&self) -> Result<Reserved, Errno> {
        let limit = self.server.options().max_open;
        Reserved::take(&self.open, 1, limit).ok_or_else(|| {
            warn_limited!("The guest has {limit} files open, which is the limit (--max-open-files)");
            Errno::NFILE
        })
    }

    /// Looks up the fids of a request, and ends those that it ends. To be called in the order in which requests arrive.
    pub fn prepare(&self, request: &Request<'_>, replayed: bool) -> Result<Call, Errno> {
        let two = |fid, other| -> Result<Call, Errno> {
            Ok(Call { fid: Some(self.fids.get(fid)?), other: Some(self.fids.get(other)?), replayed })
        };
        let one = |fid: Result<Arc<Fid>, Errno>| -> Result<Call, Errno> {
            Ok(Call { fid: Some(fid?), other: None, replayed })
        };
        if self.msize() == 0 && !matches!(request, Request::Version { .. }) {
            self.recover()?;
        }
        match *request {
            Request::Version { .. }
            | Request::Auth { .. }
            | Request::Attach { .. }
            | Request::Flush { .. } => Ok(Call { replayed, ..Call::default() }),
            Request::Clunk { fid } | Request::Remove { fid } => match self.fids.remove(fid) {
                // It has ended, and the client has not learnt of it.
                Err(_) if replayed => Ok(Call { replayed, ..Call::default() }),
                removed => one(removed),
            },
            Request::Rename { fid, dfid, .. } | Request::Link { dfid, fid, .. } => two(fid, dfid),
            Request::Renameat { olddirfid, newdirfid, .. } => two(olddirfid, newdirfid),
            Request::Walk { fid, .. }
            | Request::Read { fid, .. }
            | Request::Write { fid, .. }
            | Request::Statfs { fid }
            | Request::Lopen { fid, .. }
            | Request::Lcreate { fid, .. }
            | Request::Symlink { dfid: fid, .. }
            | Request::Mknod { dfid: fid, .. }
            | Request::Readlink { fid }
            | Request::Getattr { fid, .. }
            | Request::Setattr { fid, .. }
            | Request::Xattrwalk { fid, .. }
            | Request::Xattrcreate { fid, .. }
            | Request::Readdir { fid, .. }
            | Request::Fsync { fid, .. }
            | Request::Lock { fid, .. }
            | Request::Getlock { fid, .. }
            | Request::Mkdir { dfid: fid, .. }
            | Request::Unlinkat { dirfid: fid, .. } => one(self.fids.get(fid)),
        }
    }

    /// Does what a request asks for, and writes the reply, an Rlerror if it fails. Without `may_wait` it stops where it
    /// would have to wait for cold data.
    pub fn execute(
        &self,
        request: &Request<'_>,
        call: &Call,
        buffers: &dyn Buffers,
        may_wait: bool,
        reply: &mut Reply,
    ) -> Outcome {
        match self.try_execute(request, call, buffers, may_wait, reply) {
            Ok(outcome) => outcome,
            Err(error) => {
                self.fail(error, reply);
                Outcome::Replied
            }
        }
    }

    /// Writes the reply to a request that failed.
    pub fn fail(&self, error: Errno, reply: &mut Reply) {
        let error = if error == Errno::MFILE {
            // It is not the guest's process that has too many.
            warn_limited!(
                "The daemon has no file descriptors left for the guest: raise its limit (ulimit -n)"
            );
            Errno::NFILE
        } else {
            error
        };
        reply.error(error.raw_os_error().unsigned_abs());
    }

    fn try_execute(
        &self,
        request: &Request<'_>,
        call: &Call,
        buffers: &dyn Buffers,
        may_wait: bool,
        reply: &mut Reply,
    ) -> Result<Outcome, Errno> {
        if changes(request) {
            self.server.check_writable()?;
        }
        match (&call.fid, &call.other) {
            (Some(fid), None) => fid.node.share().host().enter(Self::caller(fid, 0), &[&fid.node])?,
            (Some(fid), Some(other)) => {
                fid.node.share().host().enter(Self::caller(fid, 0), &[&fid.node, &other.node])?;
            }
            _ => {}
        }
        match *request {
            Request::Version { msize, version } => self.version(msize, version, reply)?,
            // No authentication is needed: what clients take for that answer is not the same everywhere, but this.
            Request::Auth { .. } => return Err(Errno::NOENT),
            Request::Attach { fid, afid, aname, n_uname, .. } => {
                self.attach(fid, afid, aname, n_uname, call, reply)?;
            }
            Request::Flush { .. } => {
                reply.begin(kind::TFLUSH);
            }
            Request::Walk { fid, newfid, names } => self.walk(fid, newfid, names, call, reply)?,
            Request::Read { offset, count, .. } => {
                return self.read(call.fid()?, offset, count, buffers, may_wait, reply);
            }
            Request::Write { offset, count, .. } => self.write(call.fid()?, offset, count, buffers, reply)?,
            Request::Clunk { .. } if call.replayed && call.fid.is_none() => {
                reply.begin(kind::TCLUNK);
            }
            Request::Remove { .. } if call.replayed && call.fid.is_none() => {
                reply.begin(kind::TREMOVE);
            }
            Request::Clunk { fid } => {
                let result = self.clunk(call.fid()?, reply);
                self.fids.finish(fid, call.fid()?);
                result?;
            }
            Request::Remove { .. } => self.remove(call.fid()?, reply)?,
            Request::Statfs { .. } => self.statfs(call.fid()?, reply)?,
            Request::Lopen { fid, flags } => self.lopen(fid, flags, call, reply)?,
            Request::Lcreate { fid, name, flags, mode, gid } => {
                self.lcreate(fid, name, (flags, mode, gid), call, reply)?;
            }
            Request::Symlink { name, target, gid, .. } => {
                self.symlink(call.fid()?, name, target, gid, reply)?;
            }
            Request::Mknod { name, mode, major, minor, gid, .. } => {
                self.mknod(call.fid()?, name, mode, (major, minor), gid, reply)?;
            }
            Request::Rename { name, .. } => self.rename(call.fid()?, call.other()?, name, reply)?,
            Request::Readlink { .. } => self.readlink(call.fid()?, reply)?,
            Request::Getattr { mask, .. } => self.getattr(call.fid()?, mask, reply)?,
            Request::Setattr { ref attributes, .. } => self.setattr(call.fid()?, attributes, reply)?,
            Request::Xattrwalk { newfid, name, .. } => self.xattrwalk(newfid, name, call, reply)?,
            Request::Xattrcreate { fid, name, size, flags } => {
                self.xattrcreate(fid, name, size, flags, call, reply)?;
            }
            Request::Readdir { offset, count, .. } => {
                self.readdir(call.fid()?, offset, self.clamp(count, buffers), reply)?;
            }
            Request::Fsync { datasync, .. } => self.fsync(call.fid()?, datasync, reply)?,
            Request::Lock { fid, flags, range, .. } => {
                return self.lock(fid, call.fid()?, flags, &range, reply);
            }
            Request::Getlock { range, .. } => self.getlock(call.fid()?, &range, reply)?,
            Request::Link { name, .. } => self.link(call.other()?, call.fid()?, name, reply)?,
            Request::Mkdir { name, mode, gid, .. } => self.mkdir(call.fid()?, name, mode, gid, reply)?,
            Request::Renameat { oldname, newname, .. } => {
                self.renameat((call.fid()?, oldname), (call.other()?, newname), reply)?;
            }
            Request::Unlinkat { name, flags, .. } => self.unlinkat(call.fid()?, name, flags, reply)?,
        }
        Ok(Outcome::Replied)
    }

    /// Begins the session anew.
    fn version(&self, msize: u32, version: &[u8], reply: &mut Reply) -> Result<(), Errno> {
        self.reset();
        let reply = reply.begin(kind::TVERSION);
        if version != VERSION {
            reply.u32(msize.min(self.server.options().max_msize)).string(VERSION_UNKNOWN);
            return Ok(());
        }
        if msize < MIN_MSIZE {
            return Err(Errno::INVAL);
        }
        let msize = msize.min(self.server.options().max_msize);
        self.msize.store(msize, Ordering::Relaxed);
        self.note_begin(msize);
        reply.u32(msize).string(VERSION);
        Ok(())
    }

    /// Sets the message size of a session that is taken up again.
    pub(super) fn set_msize(&self, msize: u32) {
        self.msize.store(msize, Ordering::Relaxed);
    }

    /// Ends the session: all fids, and with them open files and locks. What is written down of it stays.
    pub fn reset(&self) {
        self.msize.store(0, Ordering::Relaxed);
        self.fids.clear();
    }

    /// Whom a request acts for: the user of its fid, with the group that it gives.
    pub(super) fn caller(fid: &Fid, gid: u32) -> Caller {
        Caller { uid: fid.uid, gid }
    }

    /// Whether `newfid` may be made to stand for something else than `fid`. A request that is executed once more may have
    /// made it already.
    pub(super) fn claim(&self, newfid: u32, call: &Call) -> Result<(), Errno> {
        if call.replayed && newfid != NO_FID {
            let _ = self.fids.remove(newfid);
        }
        self.fids.check_free(newfid)
    }
}

/// Whether a request changes something. Opening for writing does as well, but depends on the flags; without that there
/// is nothing to write to.
fn changes(request: &Request<'_>) -> bool {
    match *request {
        Request::Lopen { flags, .. } => crate::host::open::is_write(flags),
        Request::Lcreate { .. }
        | Request::Symlink { .. }
        | Request::Mknod { .. }
        | Request::Rename { .. }
        | Request::Setattr { .. }
        | Request::Xattrcreate { .. }
        | Request::Link { .. }
        | Request::Mkdir { .. }
        | Request::Renameat { .. }
        | Request::Unlinkat { .. }
        | Request::Remove { .. } => true,
        _ => false,
    }
}
