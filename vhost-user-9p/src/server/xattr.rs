//! Txattrwalk and Txattrcreate: extended attributes.
#![expect(
    clippy::unused_self,
    reason = "requests are methods of the session, even those that need nothing of it"
)]

use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::Reserved;
use super::fid::{Fid, Role};
use super::session::{Call, Session};
use crate::host::xattr::{Access, File, MAX_NAME, MAX_SIZE};
use crate::protocol::{Reply, XATTR_CREATE, XATTR_REPLACE, kind};

/// Memory that all extended attributes being read or written in a session may take, in bytes.
pub const MAX_TOTAL: usize = 16 << 20;

/// An extended attribute, or the list of their names, as it was when the client asked for it.
#[derive(Debug)]
pub struct XattrRead {
    value: Vec<u8>,
    _memory: Reserved,
}

impl XattrRead {
    /// At most `len` bytes from `offset` on.
    pub fn part(&self, offset: u64, len: usize) -> &[u8] {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.value.len());
        &self.value[start..self.value.len().min(start.saturating_add(len))]
    }
}

/// An extended attribute on its way to the host.
#[derive(Debug)]
pub struct XattrWrite {
    name: Vec<u8>,
    flags: u32,
    size: usize,
    value: Vec<u8>,
    _memory: Reserved,
}

impl XattrWrite {
    /// Takes `len` bytes of the value, which follow those taken so far, from `copy`.
    pub fn put(
        &mut self,
        offset: u64,
        len: usize,
        copy: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<usize, Errno> {
        let start = self.value.len();
        if offset != start as u64 {
            return Err(Errno::INVAL);
        }
        if len > self.size - start {
            return Err(Errno::NOSPC);
        }
        self.value.resize(start + len, 0);
        let copied = copy(&mut self.value[start..]);
        self.value.truncate(start + copied);
        Ok(copied)
    }
}

impl Session {
    /// Txattrwalk: a fid from which an extended attribute is read, or with an empty name the list of names.
    pub(super) fn xattrwalk(
        &self,
        newfid: u32,
        name: &[u8],
        call: &Call,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let from = call.fid()?;
        self.claim(newfid, call)?;
        let host = from.node.share().host();
        let policy = &host.options().xattr;
        let path = from.node.file()?;
        let file = match &from.role {
            // Four times as fast as the other way, and asked with every write(2) of a Linux guest.
            Role::File(opened) => File::Open(opened.file.file()),
            _ => File::Path(host.proc_fd(), path.as_fd()),
        };
        if policy.allows(b"trusted.") {
            // Only root sees them.
            host.act_for(Self::caller(from, 0))?;
        }
        let value = if name.is_empty() {
            policy.filter_list(&file.list()?)
        } else {
            if name.len() > MAX_NAME {
                return Err(Errno::RANGE);
            }
            file.get_vec(&policy.host_name(name, Access::Read)?)?
        };
        let memory = Reserved::take(&self.xattr_bytes, value.len().max(1), MAX_TOTAL).ok_or(Errno::NOMEM)?;
        let size = value.len() as u64;
        let mut fid = from.at(std::sync::Arc::clone(&from.node));
        fid.role = Role::XattrRead(XattrRead { value, _memory: memory });
        self.fids.insert(newfid, fid)?;
        reply.begin(kind::TXATTRWALK).u64(size);
        Ok(())
    }

    /// Txattrcreate: the fid becomes one to which an extended attribute is written.
    pub(super) fn xattrcreate(
        &self,
        fid: u32,
        name: &[u8],
        size: u64,
        flags: u32,
        call: &Call,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let from = call.fid()?;
        if !matches!(from.role, Role::Path) {
            return Err(Errno::BADF);
        }
        if flags & !(XATTR_CREATE | XATTR_REPLACE) != 0 {
            return Err(Errno::INVAL);
        }
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Errno::RANGE);
        }
        let size = usize::try_from(size).ok().filter(|size| *size <= MAX_SIZE).ok_or(Errno::TOOBIG)?;
        let policy = &from.node.share().host().options().xattr;
        let name = policy.host_name(name, Access::Write)?.into_owned();
        let memory = Reserved::take(&self.xattr_bytes, size.max(1), MAX_TOTAL).ok_or(Errno::NOMEM)?;
        let write = XattrWrite { name, flags, size, value: Vec::new(), _memory: memory };
        self.fids.replace(fid, from, from.with(Role::XattrWrite(Mutex::new(write))))?;
        reply.begin(kind::TXATTRCREATE);
        Ok(())
    }

    /// What the Tclunk of an attribute that is written does.
    pub(super) fn finish_xattr(&self, fid: &Fid, write: &Mutex<XattrWrite>) -> Result<(), Errno> {
        let write = write.lock().unwrap_or_else(PoisonError::into_inner);
        if write.value.len() != write.size {
            return Err(Errno::INVAL);
        }
        let host = fid.node.share().host();
        let file = fid.node.file()?;
        let file = File::Path(host.proc_fd(), file.as_fd());
        host.act_for(Self::caller(fid, 0))?;
        if write.name.starts_with(b"system.posix_acl_") {
            // It changes the mode as well.
            host.act_for_mode()?;
        }
        // There is no message to remove an attribute: clients replace it by nothing. Setting it to nothing comes without
        // that flag.
        if write.size == 0 && write.flags & XATTR_REPLACE != 0 {
            return match file.remove(&write.name) {
                Err(Errno::NODATA) if host.options().xattr.removes_quietly(&write.name) => Ok(()),
                result => result,
            };
        }
        file.set(&write.name, &write.value, XattrFlags::from_bits_retain(write.flags))
    }
}
