//! Directories that are served.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, openat, readlinkat};
use rustix::io::Errno;

use super::Host;
use super::node::{Node, climb};
use super::pace::Pace;
use super::proc_fd::ProcFd;
use super::stat::Stat;
use super::sys;

/// A directory that is served, under the name by which clients attach to it.
#[derive(Debug)]
pub struct Share {
    host: Arc<Host>,
    name: Vec<u8>,
    root: OwnedFd,
    is_mount_root: bool,
    dev: u64,
    ino: u64,
    pace: Arc<Pace>,
    /// The same directory open for more than its name, with which handles are opened, and the number of its mount.
    handles: Option<(OwnedFd, u64)>,
}

impl Share {
    /// Serves the directory `root` as `name`; an empty name is the default. `is_mount_root`: the directory is the root
    /// of a mount of this process's own, so that the kernel lets nothing out of it.
    pub fn new(
        host: &Arc<Host>,
        name: Vec<u8>,
        root: OwnedFd,
        is_mount_root: bool,
    ) -> Result<Arc<Self>, Errno> {
        let stat = Stat::of(&root)?;
        // The first share's file system is the one whose inode numbers the guest sees unchanged.
        host.qids().path(stat.dev, stat.ino);
        let pace = host.pace(stat.dev, root.as_fd());
        let handles = if host.options().file_handles { try_handles(root.as_fd()).ok() } else { None };
        Ok(Arc::new(Self {
            host: Arc::clone(host),
            name,
            root,
            is_mount_root,
            dev: stat.dev,
            ino: stat.ino,
            pace,
            handles,
        }))
    }

    /// What all shares have in common.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// The name to attach to.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// How fast the storage answers.
    pub(super) fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// The directory itself, as a file to walk from.
    pub fn attach(self: &Arc<Self>) -> Result<(Arc<Node>, Stat), Errno> {
        Node::root(self)
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The file system and the inode number of the directory.
    pub fn root_identity(&self) -> (u64, u64) {
        (self.dev, self.ino)
    }

    /// What file handles are opened with; `None` if they cannot be.
    pub(super) fn handle_root(&self) -> Option<BorrowedFd<'_>> {
        self.handles.as_ref().map(|(root, _)| root.as_fd())
    }

    /// Whether files are opened for users who may not do so by handle.
    pub(super) fn needs_paths(&self) -> bool {
        self.host.options().ids.is_guarded()
    }

    /// The mount on which they are.
    pub(super) fn handle_mount(&self) -> Option<u64> {
        self.handles.as_ref().map(|(_, mount)| *mount)
    }

    pub(super) fn is_mount_root(&self) -> bool {
        self.is_mount_root
    }

    /// The path of `file` below the share, as the host sees it at this moment. `ENOENT`: it has none.
    pub(super) fn path_of(&self, file: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
        let link = |file| {
            let number = ProcFd::name(file);
            readlinkat(self.host.proc_fd(), number.as_c_str(), Vec::new()).map(CString::into_bytes)
        };
        let (root, path) = (link(self.root())?, link(file)?);
        let below = path.strip_prefix(root.as_slice()).ok_or(Errno::NOENT)?;
        match below.strip_prefix(b"/") {
            Some(below) => Ok(below.to_vec()),
            // The root of a mount is a `/` itself.
            None if root == b"/" => Ok(below.to_vec()),
            // The share has a name only from outside.
            None if below.is_empty() => Err(Errno::BUSY),
            None => Err(Errno::NOENT),
        }
    }

    /// Fails unless the directory `file` lies in the share at this moment.
    pub(super) fn check_inside(&self, file: BorrowedFd<'_>, limit: usize) -> Result<(), Errno> {
        climb(file, |stat| (stat.dev, stat.ino) == self.root_identity(), limit)
    }
}

/// A descriptor that file handles can be opened with, if this process may, and the number of the mount.
fn try_handles(root: BorrowedFd<'_>) -> Result<(OwnedFd, u64), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = openat(root, c".", flags, Mode::empty())?;
    let (handle, mount) = sys::name_to_handle(root)?;
    sys::open_by_handle(open.as_fd(), &handle, OFlags::PATH | OFlags::CLOEXEC)?;
    Ok((open, mount))
}
