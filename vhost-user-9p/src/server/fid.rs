//! The client's handles for files.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::journal::Journal;
use super::saved::{SavedFid, SavedRole};
use super::xattr::{XattrRead, XattrWrite};
use super::{Reserved, Server};
use crate::host::node::Pin;
use crate::host::{Node, OpenDirectory, OpenFile};
use crate::protocol::NO_FID;

/// A handle of the client for a file.
#[derive(Debug)]
pub struct Fid {
    /// The file.
    pub node: Arc<Node>,
    /// Where the client attached: it comes no higher than this.
    pub root: Arc<Node>,
    /// The guest's user who attached; [`NO_UID`](crate::protocol::NO_UID) for nobody in particular.
    pub uid: u32,
    /// What it is used for.
    pub role: Role,
}

/// What a [`Fid`] is used for.
#[derive(Debug)]
pub enum Role {
    /// Naming the file.
    Path,
    /// I/O on a regular file.
    File(Opened<OpenFile>),
    /// Reading a directory. One Treaddir at a time: the next one goes on where the last one ended.
    Directory(Opened<Mutex<OpenDirectory>>),
    /// Reading an extended attribute, or the list of their names.
    XattrRead(XattrRead),
    /// Writing an extended attribute, which takes effect at the Tclunk.
    XattrWrite(Mutex<XattrWrite>),
    /// None any more: it was lost with the process that had it. `true`: so was what its Tclunk was to do.
    Lost(bool),
}

/// Something open, which counts as such.
#[derive(Debug)]
pub struct Opened<T> {
    /// What is open.
    pub file: T,
    /// The client's flags.
    pub flags: u32,
    pub(super) _count: Reserved,
    pub(super) _pin: Pin,
}

impl Fid {
    /// A fid that names another file for the same user.
    #[must_use]
    pub fn at(&self, node: Arc<Node>) -> Self {
        Self { node, root: Arc::clone(&self.root), uid: self.uid, role: Role::Path }
    }

    /// A fid for the same file, with a role.
    pub(super) fn with(&self, role: Role) -> Self {
        Self { node: Arc::clone(&self.node), root: Arc::clone(&self.root), uid: self.uid, role }
    }

    /// What of it can be written down.
    fn save(&self, server: &Server) -> SavedFid {
        let role = match &self.role {
            Role::Path => SavedRole::Path,
            Role::File(opened) => SavedRole::File(opened.flags),
            Role::Directory(opened) => SavedRole::Directory(opened.flags),
            Role::XattrRead(_) => SavedRole::Lost(false),
            Role::XattrWrite(_) => SavedRole::Lost(true),
            Role::Lost(unfinished) => SavedRole::Lost(*unfinished),
        };
        let share = server.shares().iter().position(|share| Arc::ptr_eq(share, self.node.share()));
        SavedFid {
            uid: self.uid,
            share: share.map_or(u32::MAX, |index| index as u32),
            root: self.root.save_once(),
            node: if Arc::ptr_eq(&self.root, &self.node) { self.root.save_once() } else { self.node.save() },
            role,
        }
    }

    /// Whether its Tclunk does something that may fail.
    fn is_unfinished(&self) -> bool {
        matches!(self.role, Role::XattrWrite(_) | Role::Lost(true))
    }

    /// The regular file that is open.
    pub fn file(&self) -> Result<&OpenFile, Errno> {
        match &self.role {
            Role::File(opened) => Ok(&opened.file),
            Role::Lost(_) => Err(Errno::IO),
            _ => Err(Errno::BADF),
        }
    }
}

/// The fids of a session.
#[derive(Debug)]
pub struct Fids {
    map: Mutex<HashMap<u32, Arc<Fid>, foldhash::fast::RandomState>>,
    limit: usize,
    /// Where changes are written down, and what fids are of.
    journal: Option<(Arc<Journal>, Arc<Server>)>,
}

impl Fids {
    /// No fids, and room for as many as the server allows. Changes are noted in `journal`.
    pub fn new(server: &Arc<Server>, journal: Option<Arc<Journal>>) -> Self {
        let journal = journal.map(|journal| (journal, Arc::clone(server)));
        Self { map: Mutex::default(), limit: server.options().max_fids, journal }
    }

    /// Where changes are written down.
    pub fn journal(&self) -> Option<&Arc<Journal>> {
        self.journal.as_ref().map(|(journal, _)| journal)
    }

    fn save(&self, fid: &Fid) -> Option<SavedFid> {
        self.journal.as_ref().map(|(_, server)| fid.save(server))
    }

    /// Writes down what a fid stands for. The map is locked, so that the order is that of the changes.
    fn note(&self, fid: u32, saved: Option<SavedFid>) {
        if let (Some(journal), Some(saved)) = (self.journal(), saved) {
            journal.fid(fid, saved);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Fid>, foldhash::fast::RandomState>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a fid stands for at this moment.
    pub fn get(&self, fid: u32) -> Result<Arc<Fid>, Errno> {
        self.lock().get(&fid).cloned().ok_or(Errno::BADF)
    }

    /// Whether a fid can be made, as far as can be told.
    pub fn check_free(&self, fid: u32) -> Result<(), Errno> {
        let map = self.lock();
        if fid == NO_FID || map.contains_key(&fid) { Err(Errno::BADF) } else { self.check_room(map.len()) }
    }

    fn check_room(&self, len: usize) -> Result<(), Errno> {
        if len >= self.limit { Err(Errno::NFILE) } else { Ok(()) }
    }

    /// Makes a fid. One that is in use is left alone: `EBADF`.
    pub fn insert(&self, fid: u32, value: Fid) -> Result<(), Errno> {
        let saved = self.save(&value);
        self.insert_saved(fid, value, saved)
    }

    /// Makes a fid that is written down already.
    pub fn restore(&self, fid: u32, value: Fid) -> Result<(), Errno> {
        self.insert_saved(fid, value, None)
    }

    fn insert_saved(&self, fid: u32, value: Fid, saved: Option<SavedFid>) -> Result<(), Errno> {
        let mut map = self.lock();
        self.check_room(map.len())?;
        match map.entry(fid) {
            Entry::Vacant(vacant) if fid != NO_FID => {
                vacant.insert(Arc::new(value));
                self.note(fid, saved);
                Ok(())
            }
            _ => Err(Errno::BADF),
        }
    }

    /// Gives `fid`, which stands for `old`, another meaning. Fails if it has got one already: `EBADF`.
    pub fn replace(&self, fid: u32, old: &Arc<Fid>, value: Fid) -> Result<(), Errno> {
        let saved = self.save(&value);
        match self.lock().get_mut(&fid) {
            Some(current) if Arc::ptr_eq(current, old) => {
                *current = Arc::new(value);
                self.note(fid, saved);
                Ok(())
            }
            _ => Err(Errno::BADF),
        }
    }

    /// Ends a fid.
    pub fn remove(&self, fid: u32) -> Result<Arc<Fid>, Errno> {
        let mut map = self.lock();
        let removed = map.remove(&fid).ok_or(Errno::BADF)?;
        if let Some(journal) = self.journal()
            && !removed.is_unfinished()
        {
            journal.gone(fid);
        }
        Ok(removed)
    }

    /// What the Tclunk of a removed fid had to do is done.
    pub fn finish(&self, fid: u32, removed: &Fid) {
        if let Some(journal) = self.journal()
            && removed.is_unfinished()
            && !self.lock().contains_key(&fid)
        {
            journal.gone(fid);
        }
    }

    /// Ends all fids, without a note.
    pub fn clear(&self) {
        let fids = std::mem::take(&mut *self.lock());
        drop(fids);
    }
}
