//! Treaddir: the entries of a directory.
#![expect(
    clippy::unused_self,
    reason = "requests are methods of the session, even those that need nothing of it"
)]

use std::sync::PoisonError;

use rustix::io::Errno;

use super::fid::{Fid, Role};
use super::session::Session;
use crate::host::SecurityModel;
use crate::protocol::{Qid, Reply, kind};

impl Session {
    /// As many entries from `offset` on as `len` bytes hold.
    pub(super) fn readdir(&self, fid: &Fid, offset: u64, len: usize, reply: &mut Reply) -> Result<(), Errno> {
        let directory = match &fid.role {
            Role::Directory(opened) => &opened.file,
            Role::Path if fid.node.is_dir() => return Err(Errno::BADF),
            Role::Path | Role::File(_) => return Err(Errno::NOTDIR),
            Role::Lost(_) => return Err(Errno::IO),
            _ => return Err(Errno::BADF),
        };
        let host = fid.node.share().host();
        let mapped = host.options().model == SecurityModel::MappedXattr;
        let is_root = fid.node.is_same(&fid.root);
        let root = if is_root { Some(host.qids().path(fid.node.dev(), fid.node.ino())) } else { None };
        reply.begin(kind::TREADDIR).begin_entries();
        let mut left = len;
        let mut too_small = false;
        let mut directory = directory.lock().unwrap_or_else(PoisonError::into_inner);
        directory.read(offset, |entry| {
            let size = Reply::entry_size(entry.name);
            if size > left {
                too_small = left == len;
                return false;
            }
            left -= size;
            let kind = match entry.kind {
                libc::DT_DIR => Qid::DIR,
                libc::DT_LNK => Qid::SYMLINK,
                _ => Qid::FILE,
            };
            let path = match root {
                // What is above the share is not the guest's to know.
                Some(root) if entry.name == b".." => root,
                _ => host.qids().path(entry.dev, entry.ino),
            };
            // A regular file may stand for something else.
            let d_type = if mapped && entry.kind == libc::DT_REG { libc::DT_UNKNOWN } else { entry.kind };
            reply.entry(Qid { kind, version: 0, path }, entry.offset, d_type, entry.name);
            true
        })?;
        // No entries means the end of the directory.
        if too_small {
            return Err(Errno::INVAL);
        }
        reply.end_entries();
        Ok(())
    }
}
