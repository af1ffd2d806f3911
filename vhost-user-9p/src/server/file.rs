//! Tlopen, Tlcreate, Tread, Twrite, Tfsync, Tstatfs: the content of files.
#![expect(
    clippy::unused_self,
    reason = "requests are methods of the session, even those that need nothing of it"
)]

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{fdatasync, fstatfs, fsync};
use rustix::io::Errno;

use super::fid::{Fid, Opened, Role};
use super::session::{Call, Outcome, Session};
use super::{Buffers, StatfsType};
use crate::host::Name;
use crate::host::open::{Nowait, is_write};
use crate::protocol::{READ_HEADER_SIZE, Reply, Statfs, kind, open_flag};

/// What statfs(2) calls 9P (`V9FS_MAGIC`).
const V9FS_MAGIC: u32 = 0x0102_1997;

impl Session {
    /// Tlopen: a fid that names a file becomes one for its content.
    pub(super) fn lopen(&self, fid: u32, flags: u32, call: &Call, reply: &mut Reply) -> Result<(), Errno> {
        let from = call.fid()?;
        match from.role {
            Role::Path => {}
            // It was opened, and the client has not learnt of it.
            _ if call.replayed => {}
            _ => return Err(Errno::BADF),
        }
        let count = self.reserve_open()?;
        let pin = from.node.pin()?;
        let role = if from.node.is_dir() {
            if is_write(flags) {
                return Err(Errno::ISDIR);
            }
            Role::Directory(Opened {
                file: Mutex::new(from.node.open_directory()?),
                flags,
                _count: count,
                _pin: pin,
            })
        } else {
            if flags & open_flag::DIRECTORY != 0 {
                return Err(Errno::NOTDIR);
            }
            if flags & open_flag::TRUNCATE != 0 {
                from.node.share().host().act_for(Self::caller(from, 0))?;
            }
            Role::File(Opened { file: from.node.open_file(flags)?, flags, _count: count, _pin: pin })
        };
        let qid = Self::qid(from, &from.node.stat()?);
        self.fids.replace(fid, from, from.with(role))?;
        reply.begin(kind::TLOPEN).qid(qid).u32(self.iounit());
        Ok(())
    }

    /// Tlcreate: makes and opens a file in the directory that the fid names; from then on it is that file's.
    pub(super) fn lcreate(
        &self,
        fid: u32,
        name: &[u8],
        (flags, mode, gid): (u32, u32, u32),
        call: &Call,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let from = call.fid()?;
        match &from.role {
            Role::Path => {}
            Role::File(_) if call.replayed => {
                // It was made, and the client has not learnt of it.
                let qid = Self::qid(from, &from.node.stat()?);
                reply.begin(kind::TLCREATE).qid(qid).u32(self.iounit());
                return Ok(());
            }
            _ => return Err(Errno::BADF),
        }
        let count = self.reserve_open()?;
        let name = Name::create(name)?;
        let flags = if call.replayed { flags & !open_flag::EXCLUSIVE } else { flags };
        let (node, stat, file) = from.node.create(name, flags, mode, Self::caller(from, gid))?;
        let qid = Self::qid(from, &stat);
        let mut value = from.at(Arc::clone(&node));
        value.role = Role::File(Opened { file, flags, _count: count, _pin: node.pin()? });
        self.fids.replace(fid, from, value)?;
        reply.begin(kind::TLCREATE).qid(qid).u32(self.iounit());
        Ok(())
    }

    /// Tread of a file or of an extended attribute.
    pub(super) fn read(
        &self,
        fid: &Fid,
        offset: u64,
        count: u32,
        buffers: &dyn Buffers,
        may_wait: bool,
        reply: &mut Reply,
    ) -> Result<Outcome, Errno> {
        let len = self.clamp(count, buffers);
        let file = match &fid.role {
            Role::File(opened) => &opened.file,
            Role::XattrRead(xattr) => {
                reply.begin(kind::TREAD).data(xattr.part(offset, len));
                return Ok(Outcome::Replied);
            }
            Role::Directory(_) => return Err(Errno::ISDIR),
            Role::Lost(_) => return Err(Errno::IO),
            _ => return Err(Errno::BADF),
        };
        file.check_readable()?;
        check_offset(offset)?;
        let read = |flags| buffers.read_file(file.file(), offset, READ_HEADER_SIZE, len, flags);
        let pace = fid.node.pace();
        let done = if may_wait || !pace.knows_nowait() {
            read(0)?
        } else {
            match file.read_nowait(offset, len, read)? {
                Nowait::Done(done) => done,
                Nowait::WouldWait => return Ok(Outcome::WouldWait),
                Nowait::Unknown => {
                    pace.forget_nowait();
                    return Ok(Outcome::WouldWait);
                }
            }
        };
        reply.begin(kind::TREAD).data_in_place(done);
        Ok(Outcome::Replied)
    }

    /// Twrite to a file or of an extended attribute.
    pub(super) fn write(
        &self,
        fid: &Fid,
        offset: u64,
        count: u32,
        buffers: &dyn Buffers,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let written = match &fid.role {
            Role::File(opened) => {
                opened.file.check_writable()?;
                check_offset(offset)?;
                fid.node.share().host().act_for(Self::caller(fid, 0))?;
                buffers.write_file(opened.file.file(), offset, count as usize)?
            }
            Role::XattrWrite(write) => {
                let mut write = write.lock().unwrap_or_else(PoisonError::into_inner);
                write.put(offset, count as usize, |to| buffers.copy_data(to))?
            }
            Role::Directory(_) => return Err(Errno::ISDIR),
            Role::Lost(_) => return Err(Errno::IO),
            _ => return Err(Errno::BADF),
        };
        reply.begin(kind::TWRITE).u32(written as u32);
        Ok(())
    }

    /// Tfsync of a file or directory that is open.
    pub(super) fn fsync(&self, fid: &Fid, datasync: bool, reply: &mut Reply) -> Result<(), Errno> {
        let sync = |file| if datasync { fdatasync(file) } else { fsync(file) };
        match &fid.role {
            Role::File(Opened { file, .. }) => sync(file.file())?,
            Role::Directory(Opened { file, .. }) => {
                // Not under the lock, as it may take its time.
                let file = file.lock().unwrap_or_else(PoisonError::into_inner).file().try_clone();
                sync(file.map_err(|_| Errno::MFILE)?.as_fd())?;
            }
            Role::Lost(_) => return Err(Errno::IO),
            _ => return Err(Errno::BADF),
        }
        reply.begin(kind::TFSYNC);
        Ok(())
    }

    /// Tstatfs.
    pub(super) fn statfs(&self, fid: &Fid, reply: &mut Reply) -> Result<(), Errno> {
        let host = fstatfs(&*fid.node.file()?)?;
        let statfs = Statfs {
            kind: match self.server.options().statfs_type {
                StatfsType::NineP => V9FS_MAGIC,
                StatfsType::Host => host.f_type as u32,
            },
            // The unit of the counts, which is not always that of I/O.
            bsize: if host.f_frsize > 0 { host.f_frsize } else { host.f_bsize } as u32,
            blocks: host.f_blocks,
            bfree: host.f_bfree,
            bavail: host.f_bavail,
            files: host.f_files,
            ffree: host.f_ffree,
            fsid: fid.node.dev(),
            namelen: host.f_namelen as u32,
        };
        reply.begin(kind::TSTATFS).statfs(&statfs);
        Ok(())
    }
}

/// No file has so much, and preadv2(2) takes -1 for the file's own position.
fn check_offset(offset: u64) -> Result<(), Errno> {
    if i64::try_from(offset).is_ok() { Ok(()) } else { Err(Errno::INVAL) }
}
