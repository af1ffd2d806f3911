//! Going on with a session that another process began, or this one with another front end.
//!
//! A guest that has the share mounted knows nothing of the daemon's end: it sends what it would have sent, and its ring
//! comes with the requests that the old process had not answered. So a session is taken up when the first request of a
//! connection is no Tversion, and the state file has one.
//!
//! | what | becomes |
//! |---|---|
//! | a fid that names a file | the same; the file is looked for when the fid is used, and `ESTALE` if it is not found |
//! | an open file or directory | opened again with its flags (nothing is made or cut); if that fails, `EIO` until the Tclunk |
//! | its locks | taken again; if somebody else has got one, the file is as one that could not be opened |
//! | an extended attribute that is read or written | `EIO`; so is its Tclunk, if it was written |
//! | a file without a name, open or not | lost, as above |
//!
//! A file is found as [`locator`](crate::host::locator) says: without handles not if it, or a directory above it, was
//! renamed since its fid was made.
//!
//! # Requests that were in flight
//! They are executed again, or for the first time: nobody knows which ([`Call::replayed`](super::Call)). For most it makes no
//! difference. A Twalk, Tattach, Tlopen or Tlcreate may find its own fid made, and makes it again; a Tclunk or Tremove that
//! finds none has succeeded. What remains is seen by the guest: Tmkdir, Tsymlink, Tmknod and Tlink may answer
//! `EEXIST`, Trenameat, Tunlinkat and Trename `ENOENT`, though they did their work; an append may be there twice; a Twalk that
//! moves its own fid (Linux sends it for the 17th directory and deeper) may look for the names from where they led; and a
//! Tlopen with `O_TRUNC` cuts once more what this client cannot have written meanwhile.
//!
//! # What else changes
//! Inode numbers on file systems other than the first share's, which are numbered in the order in which they are seen.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use log::{info, warn};
use rustix::io::Errno;
use vhost_user_daemon::warn_limited;

use super::fid::{Fid, Opened, Role};
use super::journal::Loaded;
use super::saved::{SavedFid, SavedLock, SavedRole, SavedSession, SavedShare};
use super::session::Session;
use super::{Locks, Server};
use crate::host::node::SavedNode;
use crate::host::open::is_write;
use crate::host::{Caller, Node, Share};
use crate::protocol::open_flag;

/// What became of a session that was taken up.
#[derive(Debug, Default)]
struct Count {
    fids: usize,
    open: usize,
    locks: usize,
    lost: usize,
}

impl Session {
    /// Writes down that a session begins.
    pub(super) fn note_begin(&self, msize: u32) {
        if let Some(journal) = self.fids.journal() {
            journal.begin(SavedSession { msize, shares: saved_shares(&self.server) });
        }
    }

    /// Takes up the session in the state file. `EIO`: there is none.
    pub(super) fn recover(&self) -> Result<(), Errno> {
        let Some(journal) = self.fids.journal() else {
            warn_limited!(
                "A guest goes on with a session that this daemon has not seen the beginning of: it gets errors until it mounts \
                 again (with --state-file, guests outlive the daemon)"
            );
            return Err(Errno::IO);
        };
        let Some(Loaded { session, fids }) = journal.load() else {
            warn_limited!(
                "A guest goes on with a session that the state file has nothing of: it gets errors until it mounts again"
            );
            return Err(Errno::IO);
        };
        let shares: Vec<_> = session.shares.iter().map(|saved| self.find_share(saved)).collect();
        let mut roots = HashMap::new();
        let mut count = Count::default();
        for (number, saved, locks) in fids {
            let share = shares.get(saved.share as usize).and_then(Option::as_ref);
            let restored = share
                .and_then(|share| {
                    let fid = self.restore(share, &saved, &locks, &mut roots, &mut count);
                    self.fids.restore(number, fid).ok()
                })
                .is_some();
            if restored {
                count.fids += 1;
            } else {
                count.lost += 1;
                journal.gone(number);
            }
        }
        self.set_msize(session.msize.min(self.server.options().max_msize));
        let Count { fids, open, locks, lost } = count;
        let text = format!("A guest's session goes on: {fids} fids, {open} of them open, {locks} locks");
        if lost == 0 {
            info!("{text}");
        } else {
            warn!("{text}; {lost} fids are lost with the files or locks that they were for");
        }
        Ok(())
    }

    /// The share that a session was about, if it still is the same.
    fn find_share(&self, saved: &SavedShare) -> Option<Arc<Share>> {
        let shares = saved_shares(&self.server);
        let index = shares.iter().position(|share| share == saved)?;
        self.server.shares().get(index).cloned()
    }

    fn restore(
        &self,
        share: &Arc<Share>,
        saved: &SavedFid,
        locks: &[SavedLock],
        roots: &mut HashMap<(u32, u64, u64), (SavedNode, Arc<Node>)>,
        count: &mut Count,
    ) -> Fid {
        // Most fids have one root, which is one node.
        let key = (saved.share, saved.root.dev(), saved.root.ino());
        let root = match roots.get(&key) {
            Some((known, root)) if *known == saved.root => Arc::clone(root),
            _ => {
                let root = Node::restore(share, &saved.root);
                roots.insert(key, (saved.root.clone(), Arc::clone(&root)));
                root
            }
        };
        let node =
            if saved.node == saved.root { Arc::clone(&root) } else { Node::restore(share, &saved.node) };
        let mut fid = Fid { node, root, uid: saved.uid, role: Role::Path };
        let role = match saved.role {
            SavedRole::Path => return fid,
            SavedRole::Lost(unfinished) => Err(unfinished),
            SavedRole::File(flags) => self.reopen(&fid, flags, locks).map_err(|_| false),
            SavedRole::Directory(flags) => self.reopen_directory(&fid, flags).map_err(|_| false),
        };
        fid.role = match role {
            Ok(role) => {
                count.open += 1;
                count.locks += locks.len();
                role
            }
            Err(unfinished) => {
                count.lost += 1;
                Role::Lost(unfinished)
            }
        };
        fid
    }

    fn reopen(&self, fid: &Fid, flags: u32, locks: &[SavedLock]) -> Result<Role, Errno> {
        let only_once = open_flag::TRUNCATE | open_flag::EXCLUSIVE;
        if is_write(flags) {
            self.server.check_writable()?;
        }
        fid.node.share().host().enter(Caller { uid: fid.uid, gid: 0 }, &[&fid.node])?;
        let count = self.reserve_open()?;
        let pin = fid.node.pin()?;
        let file = fid.node.open_file(flags & !only_once)?;
        if self.server.options().locks == Locks::Host {
            for lock in locks {
                if self.take(fid, &file, lock.kind(), &lock.range())?.is_some() {
                    return Err(Errno::IO);
                }
            }
        }
        Ok(Role::File(Opened { file, flags: flags & !only_once, _count: count, _pin: pin }))
    }

    fn reopen_directory(&self, fid: &Fid, flags: u32) -> Result<Role, Errno> {
        fid.node.share().host().enter(Caller { uid: fid.uid, gid: 0 }, &[&fid.node])?;
        let count = self.reserve_open()?;
        let pin = fid.node.pin()?;
        let file = Mutex::new(fid.node.open_directory()?);
        Ok(Role::Directory(Opened { file, flags, _count: count, _pin: pin }))
    }
}

fn saved_shares(server: &Server) -> Vec<SavedShare> {
    let saved = |share: &Arc<Share>| {
        let (dev, ino) = share.root_identity();
        SavedShare { name: share.name().to_vec(), dev, ino }
    };
    server.shares().iter().map(saved).collect()
}
