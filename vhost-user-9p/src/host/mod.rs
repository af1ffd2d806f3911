//! The host's file system as the server uses it: files and directories below those that are shared, and nothing else.
//!
//! Nothing here knows of virtio, of fids, or of messages. Errors are numbers of errno(3), as the client gets them.
//!
//! | module | holds |
//! |---|---|
//! | [`share`] | a directory that is served |
//! | [`node`] | a file that was walked to: one step at a time, following nothing |
//! | [`name`] | one component of a path |
//! | [`open`] | files that are open, for their content |
//! | [`directory`] | directories that are open, for their entries |
//! | [`entry`] | making, linking, renaming and removing |
//! | [`attributes`] | changing attributes |
//! | [`stat`], [`qid`] | attributes, and the identity that the client sees |
//! | [`descriptors`], [`locator`] | having more nodes than descriptors |
//! | [`pace`] | which operations may keep a thread waiting |
//! | [`identity`] | acting as the guest's user, thread by thread |
//! | [`idmap`] | which user of the host a guest's user is |
//! | [`lock`] | byte-range locks, and waiting for them |
//! | [`mapped`] | owners, modes and devices in extended attributes |
//! | [`proc_fd`] | from a descriptor that names an inode to one that is open |
//! | [`xattr`] | extended attributes of any inode, and which of them a guest may see and set |

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use clap::ValueEnum;
use rustix::fs::{major, minor};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

pub mod attributes;
pub mod descriptors;
pub mod directory;
pub mod entry;
pub mod identity;
pub mod idmap;
pub mod locator;
pub mod lock;
pub mod mapped;
pub mod name;
pub mod node;
pub mod open;
pub mod pace;
pub mod proc_fd;
pub mod qid;
pub mod share;
pub mod stat;
mod sys;
pub mod xattr;

pub use self::directory::OpenDirectory;
pub use self::name::Name;
pub use self::node::Node;
pub use self::open::OpenFile;
pub use self::share::Share;
pub use self::stat::Stat;

use self::descriptors::Descriptors;
use self::idmap::{GuestId, HostId, Ids, Squash};
use self::pace::Pace;
use self::proc_fd::ProcFd;
use self::qid::{Multidevs, QidVersion, Qids};
use self::xattr::XattrPolicy;
use crate::protocol::NO_UID;

/// Whose the guest's files are on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SecurityModel {
    /// The guest's users and modes are the host's: needs root, or the capabilities that root has over files
    Passthrough,
    /// All files belong to the daemon's user; owner, mode and device as the guest sees them are kept in extended
    /// attributes (user.virtfs.*), as QEMU does
    MappedXattr,
    /// All files belong to the daemon's user, and the guest sees that
    None,
}

/// How files are served.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose the files are.
    pub model: SecurityModel,
    /// Permissions of new files on the host, with mapped attributes.
    pub fmode: u32,
    /// Permissions of new directories on the host, with mapped attributes.
    pub dmode: u32,
    /// Which extended attributes the guest may see and change.
    pub xattr: XattrPolicy,
    /// Guest users and groups to host users and groups.
    pub ids: Ids,
    /// What is done about several file systems.
    pub multidevs: Multidevs,
    /// What makes a qid's version.
    pub qid_version: QidVersion,
    /// `O_DIRECT` is passed on to the host.
    pub direct_io: bool,
    /// Files may be found again by their handles, if the process may do so.
    pub file_handles: bool,
}

/// For whom something is done: ids of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The user.
    pub uid: u32,
    /// The group that new files get.
    pub gid: u32,
}

/// What all shares have in common.
#[derive(Debug)]
pub struct Host {
    options: Options,
    proc: ProcFd,
    qids: Qids,
    descriptors: Descriptors,
    /// The daemon's own user and group.
    daemon: (HostId, HostId),
    /// Users of the guest are somebody else here.
    guarded: bool,
    /// How the file systems below the shares answer, by their numbers.
    paces: Mutex<HashMap<u64, Arc<Pace>>>,
}

impl Host {
    /// Serves files as `options` say. `proc` is the way to open files again.
    pub fn new(options: Options, proc: ProcFd) -> Self {
        let qids = Qids::new(options.multidevs, options.qid_version);
        let guarded = options.ids.is_guarded();
        let daemon = (HostId(geteuid().as_raw()), HostId(getegid().as_raw()));
        Self {
            options,
            proc,
            qids,
            descriptors: Descriptors::new(),
            daemon,
            guarded,
            paces: Mutex::default(),
        }
    }

    /// How the file system `dev` answers, which `file` is on.
    fn pace(&self, dev: u64, file: BorrowedFd<'_>) -> Arc<Pace> {
        let mut paces = self.paces.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(paces.entry(dev).or_insert_with(|| Arc::new(Pace::of(file))))
    }

    /// How files are served.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Makes qids.
    pub fn qids(&self) -> &Qids {
        &self.qids
    }

    /// How many files are open to be named.
    pub fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// The way to open files again.
    pub fn proc_fd(&self) -> &ProcFd {
        &self.proc
    }

    /// The attributes of `file`, which may be open with `O_PATH`, as the security model has them.
    pub fn stat(&self, file: BorrowedFd<'_>) -> Result<Stat, Errno> {
        let mut stat = Stat::of(file)?;
        if self.is_mapped() {
            let mapped = mapped::read(xattr::File::Path(&self.proc, file))?;
            stat.mode = mapped.mode(stat.host_mode);
            stat.uid = mapped.uid.map_or(stat.uid, |GuestId(uid)| uid);
            stat.gid = mapped.gid.map_or(stat.gid, |GuestId(gid)| gid);
            if let Some(device) = mapped.rdev {
                stat.rdev = (major(device), minor(device));
            }
        }
        Ok(stat)
    }

    /// Whether owners and modes are kept in extended attributes.
    pub fn is_mapped(&self) -> bool {
        self.options.model == SecurityModel::MappedXattr
    }

    /// The user that the guest sees as a file's owner.
    pub fn guest_uid(&self, uid: u32) -> u32 {
        if self.is_mapped() { uid } else { self.options.ids.uid_to_guest(HostId(uid)).0 }
    }

    /// The group that the guest sees.
    pub fn guest_gid(&self, gid: u32) -> u32 {
        if self.is_mapped() { gid } else { self.options.ids.gid_to_guest(HostId(gid)).0 }
    }

    /// The host's user for one that the guest names: `EINVAL` if there is none.
    pub fn host_uid(&self, uid: u32) -> Result<u32, Errno> {
        self.options.ids.uid_to_host(GuestId(uid)).map(|HostId(uid)| uid).ok_or(Errno::INVAL)
    }

    /// The host's group for one that the guest names: `EINVAL` if there is none.
    pub fn host_gid(&self, gid: u32) -> Result<u32, Errno> {
        self.options.ids.gid_to_host(GuestId(gid)).map(|HostId(gid)| gid).ok_or(Errno::INVAL)
    }

    /// Before anything is done to `nodes` for a user: makes the calling thread act as the host's user, where that makes a
    /// difference to all that follows.
    ///
    /// What the guest has checked is not checked again, unless the guest's view is not the host's. Where users are squashed
    /// the host checks for all of them, as they may say that they are anybody. Where ids are mapped, it checks where
    /// an owner has no id in the guest, as in a user namespace: what belongs to others is not the guest's to judge.
    pub fn enter(&self, caller: Caller, nodes: &[&Arc<Node>]) -> Result<(), Errno> {
        if self.options.model != SecurityModel::Passthrough {
            return Ok(());
        }
        if !self.guarded {
            // Another machine goes by the user, whatever this one would allow.
            let remote = nodes.iter().any(|node| node.pace().is_remote());
            return if remote { self.act_for(caller) } else { Ok(()) };
        }
        let ids = &self.options.ids;
        let nobody = caller.uid == NO_UID;
        let uid = if nobody { Some(ids.squash_to.uid) } else { ids.uid_to_host(GuestId(caller.uid)) };
        let uid = uid.ok_or(Errno::PERM)?;
        let check = nobody
            || ids.squash != Squash::None
            || nodes.is_empty()
            || !nodes.iter().all(|node| self.knows_owner(node));
        if check {
            identity::assume_unprivileged(uid, ids.squash_to.gid)
        } else {
            identity::assume(uid, ids.squash_to.gid)
        }
    }

    /// Whether the owner and the group of a file have ids in the guest.
    fn knows_owner(&self, node: &Arc<Node>) -> bool {
        let ids = &self.options.ids;
        node.stat().is_ok_and(|stat| ids.uids.knows(HostId(stat.uid)) && ids.gids.knows(HostId(stat.gid)))
    }

    /// Makes the calling thread act as the host's user for `caller`: what it makes belongs to that user.
    pub fn act_as(&self, caller: Caller) -> Result<(), Errno> {
        if self.options.model != SecurityModel::Passthrough {
            return Ok(());
        }
        let ids = &self.options.ids;
        if self.guarded {
            let gid = ids.gid_to_host(GuestId(caller.gid)).ok_or(Errno::PERM)?;
            // The user is there since the request began.
            return identity::assume_gid(gid);
        }
        if caller.uid == NO_UID {
            return self.act_as_daemon();
        }
        let uid = ids.uid_to_host(GuestId(caller.uid)).ok_or(Errno::PERM)?;
        identity::assume(uid, ids.gid_to_host(GuestId(caller.gid)).ok_or(Errno::PERM)?)
    }

    /// Makes the calling thread act as the user, where the group makes no difference: for what changes a file's content.
    pub fn act_for(&self, caller: Caller) -> Result<(), Errno> {
        if self.options.model != SecurityModel::Passthrough || self.guarded {
            // As it was when the request began.
            return Ok(());
        }
        if caller.uid == NO_UID {
            return self.act_as_daemon();
        }
        identity::assume_uid(self.options.ids.uid_to_host(GuestId(caller.uid)).ok_or(Errno::PERM)?)
    }

    /// Makes the calling thread one that may give a file any mode: the guest has checked with the user's groups in view,
    /// which the host does not know.
    pub fn act_for_mode(&self) -> Result<(), Errno> {
        match self.options.model {
            SecurityModel::Passthrough if self.guarded => identity::raise(),
            _ => self.act_as_daemon(),
        }
    }

    fn act_as_daemon(&self) -> Result<(), Errno> {
        match self.options.model {
            SecurityModel::Passthrough => identity::assume_privileged(self.daemon.0, self.daemon.1),
            _ => Ok(()),
        }
    }
}
