//! Namespaces: a view of the host in which there is nothing but the directories that the process needs.
//!
//! The new root is an empty file system that cannot be written to. In it, each directory is a mount of its own, named
//! by its number, and `/proc/self/fd` is the real one, so that a descriptor can be opened again by its path; nothing
//! else of `/proc` can be seen. The network namespace has no interface that is up, and its abstract UNIX sockets are
//! those of this process alone.
//!
//! Mounts are slaves of the host's: what the host mounts beneath a shared directory later appears in it, and what it
//! unmounts goes away, instead of being kept busy by a copy that nobody sees. This is why the directories are attached
//! to the new root: what is not attached gets no such news.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, chmodat, mkdirat, open};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::process::{chdir, fchdir, getegid, geteuid, pivot_root};
use rustix::thread::UnshareFlags;

use super::{SandboxError, Share, sys};

/// Enters new namespaces, among them a user namespace if `user`, and returns the directories.
///
/// Paths are those of the host, and are looked up here.
pub(super) fn enter(user: bool, shares: &[Share]) -> Result<Vec<OwnedFd>, SandboxError> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    if user {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        step("make namespaces with a user namespace", sys::unshare(flags | UnshareFlags::NEWUSER))?;
        // The own user and group keep their numbers. The kernel lets nobody but root map more.
        step("write /proc/self/setgroups", fs::write("/proc/self/setgroups", "deny"))?;
        step("write /proc/self/uid_map", fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")))?;
        step("write /proc/self/gid_map", fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")))?;
    } else {
        step("make namespaces", sys::unshare(flags))?;
    }
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    step("separate the mounts", mount_change("/", slave))?;

    let proc = step("clone /proc/self/fd", clone(Path::new("/proc/self/fd"), false))?;
    let directories: Vec<_> = shares.iter().map(clone_share).collect::<Result<_, _>>()?;

    let root = new_root()?;
    // Anything to mount it on will do, and /proc is there: it was needed just before.
    step("mount the new root", attach(&root, CWD, Path::new("/proc")))?;
    for (index, mount) in directories.iter().enumerate() {
        let name = index.to_string();
        step("make a mount point", mkdirat(&root, &name, Mode::RWXU))?;
        step("mount a directory", attach(mount, &root, Path::new(&name)))?;
    }
    for name in ["proc", "proc/self", "proc/self/fd"] {
        step("make a mount point", mkdirat(&root, name, Mode::RWXU))?;
        // Whatever the umask: threads may act as any user.
        let mode = Mode::RWXU | Mode::XGRP | Mode::XOTH;
        step("make a mount point", chmodat(&root, name, mode, AtFlags::empty()))?;
    }
    step("mount /proc/self/fd", attach(&proc, &root, Path::new("proc/self/fd")))?;
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY;
    step("make the new root read-only", sys::add_mount_attributes(&root, read_only, false))?;

    step("enter the new root", fchdir(&root))?;
    // The old root ends up on top of the new one, from where it is taken away.
    step("pivot_root", pivot_root(".", "."))?;
    step("detach the old root", unmount(".", UnmountFlags::DETACH))?;
    step("enter the new root", chdir("/"))?;
    Ok(directories)
}

fn step<T>(step: &'static str, result: Result<T, impl Into<io::Error>>) -> Result<T, SandboxError> {
    result.map_err(|error| SandboxError::Namespace { step, source: error.into() })
}

/// A file system with nothing in it.
fn new_root() -> Result<OwnedFd, SandboxError> {
    let context = step("make the new root", fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC))?;
    step("configure the new root", fsconfig_set_string(&context, "mode", "0755"))?;
    step("configure the new root", fsconfig_create(&context))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    step("make the new root", fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes))
}

fn clone_share(share: &Share) -> Result<OwnedFd, SandboxError> {
    let mount = clone(&share.path, true).map_err(|error| match error {
        Errno::PERM | Errno::INVAL | Errno::NOSYS => {
            SandboxError::Namespace { step: "clone a directory", source: error.into() }
        }
        error => SandboxError::Directory { path: share.path.clone(), source: error.into() },
    })?;
    // Guests keep what files they like. But the host neither trusts their suid bits nor opens their devices, and
    // whoever serves them follows no links: guests do that themselves.
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
    if share.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let result = match sys::add_mount_attributes(&mount, attributes, true) {
        // Linux before 5.14 does not know this one.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            attributes &= !MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
            sys::add_mount_attributes(&mount, attributes, true)
        }
        result => result,
    };
    step("set the attributes of a directory", result)?;
    Ok(mount)
}

/// A copy of the mount that has `path` for its root.
fn clone(path: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    // open_tree would take a file as well.
    open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(CWD, path, flags)
}

fn attach(mount: &OwnedFd, directory: impl AsFd, name: &Path) -> Result<(), Errno> {
    move_mount(mount, "", directory, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}
