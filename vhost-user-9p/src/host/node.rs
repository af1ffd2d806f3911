//! Files of a share that a client has walked to.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::descriptors::PathFd;
use super::locator::Locator;
use super::name::Name;
use super::pace::Pace;
use super::share::Share;
use super::stat::Stat;

/// How a step from a directory to one of its entries is resolved: it stays below, and follows nothing.
const STEP: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// Directories that are climbed to find out whether a directory lies in the share.
const MAX_DEPTH: usize = 4096;

/// A file of a share, whatever its names are and become, and even when it has none any more.
///
/// It holds the file itself, open with `O_PATH`, and no path: what the host or the guest renames or replaces does not
/// concern it. Where there are more nodes than descriptors for them, one that was not used for a while holds a
/// [`Locator`] instead, and opens the file when it is used again. A file that has no name any more stays open.
#[derive(Debug)]
pub struct Node {
    share: Arc<Share>,
    place: Mutex<Place>,
    /// Since the last time that somebody looked for descriptors to close.
    used: AtomicBool,
    /// Those who need the file to stay open.
    pins: AtomicUsize,
    dev: u64,
    ino: u64,
    pace: Arc<Pace>,
    /// The bits of `S_IFMT`, as the guest sees them.
    kind: u32,
    /// The same, as they are.
    host_kind: u32,
    /// What is written down of it, of one that many fids refer to.
    saved: OnceLock<Box<SavedNode>>,
}

/// What of a node can be written down, for another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedNode {
    locator: Locator,
    kind: u32,
    host_kind: u32,
}

impl SavedNode {
    /// A file that is not found.
    #[cfg(test)]
    pub(crate) fn nowhere(dev: u64, ino: u64) -> Self {
        Self { locator: Locator::nowhere(dev, ino), kind: libc::S_IFREG, host_kind: libc::S_IFREG }
    }

    /// The number of the file system.
    pub fn dev(&self) -> u64 {
        self.locator.dev
    }

    /// The inode number.
    pub fn ino(&self) -> u64 {
        self.locator.ino
    }
}

/// How the file is had.
#[derive(Debug)]
enum Place {
    Open(Arc<PathFd>),
    Closed(Box<Locator>),
}

/// Keeps a node's file open: one whose content is open must not get lost when its name does.
#[derive(Debug)]
pub struct Pin(Arc<Node>);

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.pins.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Node {
    /// The file behind `file`, which is open with `O_PATH`, and its attributes.
    pub(super) fn new(share: &Arc<Share>, file: OwnedFd) -> Result<(Arc<Self>, Stat), Errno> {
        let host = share.host();
        let stat = host.stat(file.as_fd())?;
        let pace = if stat.dev == share.root_identity().0 {
            Arc::clone(share.pace())
        } else {
            host.pace(stat.dev, file.as_fd())
        };
        if pace.is_kernel() {
            return Err(Errno::ACCESS);
        }
        let node = Arc::new(Self {
            share: Arc::clone(share),
            place: Mutex::new(Place::Open(host.descriptors().hold(file))),
            used: AtomicBool::new(true),
            pins: AtomicUsize::new(0),
            dev: stat.dev,
            ino: stat.ino,
            pace,
            kind: stat.file_type(),
            host_kind: stat.host_mode & libc::S_IFMT,
            saved: OnceLock::new(),
        });
        host.descriptors().enlist(Arc::downgrade(&node));
        Ok((node, stat))
    }

    /// The directory that is shared.
    pub(super) fn root(share: &Arc<Share>) -> Result<(Arc<Self>, Stat), Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = || openat(share.root(), c".", flags, Mode::empty());
        Self::new(share, share.host().descriptors().open(open)?)
    }

    /// The entry `name` of this directory. A symbolic link is not followed.
    pub fn child(self: &Arc<Self>, name: Name<'_>) -> Result<(Arc<Self>, Stat), Errno> {
        if !self.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = self.file()?;
        let open = || openat2(&*directory, name.as_bytes(), flags, Mode::empty(), STEP);
        let file = self.share.host().descriptors().open(open)?;
        let (node, stat) = Self::new(&self.share, file)?;
        self.share.host().qids().check_crossing(self.dev, node.dev)?;
        Ok((node, stat))
    }

    /// The directory that this one is in, but never one above `root`: that is its own parent.
    pub fn parent(self: &Arc<Self>, root: &Self) -> Result<(Arc<Self>, Stat), Errno> {
        if !self.is_dir() {
            return Err(Errno::NOTDIR);
        }
        if self.is_same(root) || (self.dev, self.ino) == self.share.root_identity() {
            return Self::new(&self.share, self.up(c".")?);
        }
        let file = self.up(c"..")?;
        if !self.share.is_mount_root() {
            self.share.check_inside(file.as_fd(), MAX_DEPTH)?;
        }
        Self::new(&self.share, file)
    }

    fn up(self: &Arc<Self>, step: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = self.file()?;
        self.share.host().descriptors().open(|| openat(&*file, step, flags, Mode::empty()))
    }

    /// The file of a share that another process has written down. It is looked for when it is used.
    pub fn restore(share: &Arc<Share>, saved: &SavedNode) -> Arc<Self> {
        let is_root_device = saved.locator.dev == share.root_identity().0;
        Arc::new(Self {
            // What is on another file system is not looked at before it is used.
            pace: if is_root_device { Arc::clone(share.pace()) } else { Arc::default() },
            share: Arc::clone(share),
            place: Mutex::new(Place::Closed(Box::new(saved.locator.clone()))),
            used: AtomicBool::new(true),
            pins: AtomicUsize::new(0),
            dev: saved.locator.dev,
            ino: saved.locator.ino,
            kind: saved.kind,
            host_kind: saved.host_kind,
            saved: OnceLock::new(),
        })
    }

    /// What another process needs to find the file. One that has no name any more is not found.
    pub fn save(&self) -> SavedNode {
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let locator = match &*place {
            Place::Open(file) => Locator::of(&self.share, file.as_fd())
                .unwrap_or_else(|_| Locator::nowhere(self.dev, self.ino)),
            Place::Closed(locator) => (**locator).clone(),
        };
        SavedNode { locator, kind: self.kind, host_kind: self.host_kind }
    }

    /// The same as it was when this was first asked.
    pub fn save_once(&self) -> SavedNode {
        (**self.saved.get_or_init(|| Box::new(self.save()))).clone()
    }

    /// The share that the file belongs to.
    pub fn share(&self) -> &Arc<Share> {
        &self.share
    }

    /// The file, open with `O_PATH`. `ESTALE`: it was closed, and is not found again.
    pub fn file(self: &Arc<Self>) -> Result<Arc<PathFd>, Errno> {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody depends on the order of this: what was used a moment ago is closed at worst.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        match &*place {
            Place::Open(file) => Ok(Arc::clone(file)),
            Place::Closed(locator) => {
                let descriptors = self.share.host().descriptors();
                let file = descriptors.hold(descriptors.open(|| locator.open(&self.share))?);
                *place = Place::Open(Arc::clone(&file));
                drop(place);
                descriptors.enlist(Arc::downgrade(self));
                Ok(file)
            }
        }
    }

    /// Keeps the file open from now on.
    pub fn pin(self: &Arc<Self>) -> Result<Pin, Errno> {
        // Counted first: from then on it is not closed, and if it was it is opened.
        self.pins.fetch_add(1, Ordering::Relaxed);
        let pin = Pin(Arc::clone(self));
        self.file().map(|_| pin)
    }

    /// Gives up the descriptor, if it was not used since this was last asked and the file is found without it.
    pub(super) fn close(&self) -> bool {
        if self.used.swap(false, Ordering::Relaxed) {
            return false;
        }
        // Whoever has it locked is using it.
        let Ok(mut place) = self.place.try_lock() else { return false };
        let Place::Open(file) = &*place else { return false };
        if self.pins.load(Ordering::Relaxed) > 0 {
            return false;
        }
        match Locator::of(&self.share, file.as_fd()) {
            Ok(locator) => {
                *place = Place::Closed(Box::new(locator));
                true
            }
            Err(_) => false,
        }
    }

    /// The attributes of the moment.
    pub fn stat(self: &Arc<Self>) -> Result<Stat, Errno> {
        self.share.host().stat(self.file()?.as_fd())
    }

    /// The file's type: the bits of `S_IFMT`.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// The file's type on the host, which is what opening depends on.
    pub(super) fn host_kind(&self) -> u32 {
        self.host_kind
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    /// The number of its file system.
    pub fn dev(&self) -> u64 {
        self.dev
    }

    /// How fast its storage answers.
    pub fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// The inode number.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Whether both are one file.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }
}

/// Whether `file` lies in the directory that `is_root` knows: climbs up until there, or to where there is no more up.
pub(super) fn climb(
    file: BorrowedFd<'_>,
    is_root: impl Fn(&Stat) -> bool,
    limit: usize,
) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut here = openat(file, c".", flags, Mode::empty())?;
    let mut stat = Stat::of(&here)?;
    for _ in 0..limit {
        if is_root(&stat) {
            return Ok(());
        }
        let up = openat(&here, c"..", flags, Mode::empty())?;
        let above = Stat::of(&up)?;
        if (above.dev, above.ino) == (stat.dev, stat.ino) {
            break;
        }
        (here, stat) = (up, above);
    }
    // The host moved the directory out of the share.
    Err(Errno::NOENT)
}
