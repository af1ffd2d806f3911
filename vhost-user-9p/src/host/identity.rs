//! Acting as the guest's user, thread by thread.
//!
//! The guest checks permissions by itself (with the client's `access=client`; 9P carries no supplementary groups, so the
//! host could not), and the thread keeps the capabilities that make the host agree. What the host does *for* a user is
//! done under that user's ids all the same: they own new files, and reserved blocks and quotas are theirs. One capability is
//! missing while a thread acts for anybody but root: `CAP_FSETID`, so that the kernel clears the set-user-ID and
//! set-group-ID bits of a file when such a user writes to it or truncates it.
//!
//! Only the file system's ids change (setfsuid(2)): signals and ptrace are not affected, and root's way back is open.
//! setfsuid away from 0 takes the file system's capabilities out of the effective set (capabilities(7)), so that they
//! are raised again. Both the ids and the capabilities are the calling thread's alone.
//!
//! That leaves two things to the caller. chmod(2) is done as root: the guest has checked it with the user's supplementary
//! groups in view, and without `CAP_FSETID` the host would take the set-group-ID bit off where the group is one of them.
//! And a group is only needed where a file is made; elsewhere [`assume_uid`] leaves it as it is.
//!
//! Measured: each of the kernel's steps (group, user, capabilities) costs 1.3 us. From root to a user and back it is 3.6 us,
//! with the group 6.2 us, and acting for the same one again 8 ns. Threads therefore stay who they are until somebody else
//! comes.
//!
//! This works in a user namespace too: ids and capabilities are those of the namespace, and an id that it does not map
//! is refused. Only the set-user-ID bits are then cleared by root's writes as well: for them the kernel asks for
//! `CAP_FSETID` over the whole host.

use std::cell::Cell;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, capabilities_secure_bits,
    set_capabilities, set_thread_groups,
};

use super::idmap::HostId;
use super::sys;

/// What [`assume`] needs: without these a daemon serves files as the user that it runs as.
pub const REQUIRED: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// What a sandbox keeps for it: [`REQUIRED`], and what single operations of a guest's root need (file handles, setuid bits,
/// device nodes, `security.capability`).
///
/// `CAP_SYS_RESOURCE` is not among them and never effective in a thread that called [`assume`]: it overrides quotas.
/// `trusted.` attributes and those of `security.` that no module knows need `CAP_SYS_ADMIN` in addition.
pub const KEPT: CapabilitySet = REQUIRED
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// The capabilities that setfsuid(2) drops and raises (`CAP_FS_MASK`).
const FILE_SYSTEM: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::LINUX_IMMUTABLE)
    .union(CapabilitySet::MAC_OVERRIDE)
    .union(CapabilitySet::MKNOD);

/// What only root has in the semantics of files: device nodes, capabilities of programs, `trusted.` attributes. The kernel
/// asks for no owner there.
const ROOT: CapabilitySet =
    CapabilitySet::MKNOD.union(CapabilitySet::SETFCAP).union(CapabilitySet::SYS_ADMIN);

/// Whether this thread can act as any user.
pub fn can_impersonate() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(REQUIRED))
}

/// Whether this thread may open files by their handles, as far as capabilities go: on file systems that belong to a user
/// namespace above it may not.
pub fn can_find_by_handle() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::DAC_READ_SEARCH))
}

/// Which of its permitted capabilities a thread makes effective.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Powers {
    /// All, as root has them.
    Root,
    /// All that do not belong to root's privileges in the semantics of files: the guest has checked.
    User,
    /// None that overrides permissions: the host checks.
    Unprivileged,
}

/// How the calling thread appears to the file system.
#[derive(Clone, Copy)]
struct State {
    uid: u32,
    gid: u32,
    /// `None`: a step failed, and they are to be set anew.
    powers: Option<Powers>,
    /// What may be raised.
    available: CapabilitySets,
    /// Whether setfsuid(2) changes the effective capabilities.
    fixup: bool,
}

thread_local! {
    /// `None` until the thread acts for somebody for the first time.
    static STATE: Cell<Option<State>> = const { Cell::new(None) };
}

/// Acts as this user and group from now on. Nothing is done if the thread does so already.
///
/// `EPERM`: the capabilities are missing, or the user namespace does not map an id. The thread then acts for whom it can, so
/// the caller must not go on with the operation.
pub fn assume(uid: HostId, gid: HostId) -> Result<(), Errno> {
    let powers = if uid.0 == 0 { Powers::Root } else { Powers::User };
    State::current()?.change(uid.0, gid.0, powers)
}

/// Acts as this user, with the group as it is: for writes and truncation, where a group makes no difference.
///
/// Errors as for [`assume`].
pub fn assume_uid(uid: HostId) -> Result<(), Errno> {
    let state = State::current()?;
    // Whether permissions are checked makes no difference on an open file either.
    let powers = match state.powers {
        _ if uid.0 == 0 => Powers::Root,
        Some(Powers::Unprivileged) if state.uid == uid.0 => Powers::Unprivileged,
        _ => Powers::User,
    };
    state.change(uid.0, state.gid, powers)
}

/// Changes the group and nothing else.
///
/// Errors as for [`assume`].
pub fn assume_gid(gid: HostId) -> Result<(), Errno> {
    let state = State::current()?;
    state.change(state.uid, gid.0, state.powers.unwrap_or(Powers::Unprivileged))
}

/// Adds what root may do, `CAP_FSETID` included, to a thread that acts for a user without being checked. One that is checked
/// stays so.
///
/// Errors as for [`assume`].
pub fn raise() -> Result<(), Errno> {
    let state = State::current()?;
    match state.powers {
        Some(Powers::User) => state.change(state.uid, state.gid, Powers::Root),
        _ => Ok(()),
    }
}

/// Acts as this user and group with all that root may do, `CAP_FSETID` included, whoever the user is: for a daemon that has
/// its capabilities without being root, on its own behalf.
///
/// Errors as for [`assume`].
pub fn assume_privileged(uid: HostId, gid: HostId) -> Result<(), Errno> {
    State::current()?.change(uid.0, gid.0, Powers::Root)
}

/// Acts as this user and group, without the capabilities that override permissions: for a user that the guest did not
/// check, since it was another one there (`--squash`). Root's are not taken away.
///
/// Errors as for [`assume`].
pub fn assume_unprivileged(uid: HostId, gid: HostId) -> Result<(), Errno> {
    let powers = if uid.0 == 0 { Powers::Root } else { Powers::Unprivileged };
    State::current()?.change(uid.0, gid.0, powers)
}

impl State {
    /// The calling thread's state, which is put in order the first time.
    fn current() -> Result<Self, Errno> {
        if let Some(state) = STATE.get() {
            return Ok(state);
        }
        let available = capabilities(None)?;
        let fixup = !capabilities_secure_bits()?.contains(CapabilitiesSecureBits::NO_SETUID_FIXUP);
        if available.effective.contains(CapabilitySet::SETGID) {
            // The daemon's own groups are not the guest's. A user namespace may forbid it, and has none then.
            let _ = set_thread_groups(&[]);
        }
        let state = Self { uid: sys::fsuid(), gid: sys::fsgid(), powers: None, available, fixup };
        STATE.set(Some(state));
        Ok(state)
    }

    fn change(mut self, uid: u32, gid: u32, powers: Powers) -> Result<(), Errno> {
        if self.uid == uid && self.gid == gid && self.powers == Some(powers) {
            return Ok(());
        }
        let result = self.apply(uid, gid, powers);
        STATE.set(Some(self));
        result
    }

    fn apply(&mut self, uid: u32, gid: u32, powers: Powers) -> Result<(), Errno> {
        let before = self.powers.take();
        if self.gid != gid {
            self.gid = sys::set_fsgid(gid);
            if self.gid != gid {
                return Err(Errno::PERM);
            }
        }
        // The step to or from user 0 has an effect on capabilities.
        let crossed = (self.uid == 0) != (uid == 0);
        let done = before == Some(powers) && !(crossed && self.fixup);
        if self.uid != uid {
            self.uid = sys::set_fsuid(uid);
            if self.uid != uid {
                return Err(Errno::PERM);
            }
        }
        if !done {
            set_capabilities(None, CapabilitySets { effective: self.effective(powers), ..self.available })?;
        }
        self.powers = Some(powers);
        Ok(())
    }

    fn effective(&self, powers: Powers) -> CapabilitySet {
        let without = match powers {
            Powers::Root => CapabilitySet::SYS_RESOURCE,
            Powers::User => CapabilitySet::SYS_RESOURCE | CapabilitySet::FSETID | ROOT,
            Powers::Unprivileged => CapabilitySet::SYS_RESOURCE | FILE_SYSTEM | ROOT,
        };
        self.available.permitted.difference(without)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::proc_fd::ProcFd;
    use crate::host::xattr;
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use rustix::thread::set_capabilities_secure_bits;
    use std::fs::{self, File, Permissions};
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::Path;
    use std::thread;
    use tempfile::TempDir;

    const USER: HostId = HostId(12_345);
    const GROUP: HostId = HostId(23_456);

    /// Runs `test` in a thread, whose ids may change, in a directory that only root has access to.
    fn run(test: impl FnOnce(&Path) + Send) {
        assert!(can_impersonate(), "This test needs to run as root");
        let dir = TempDir::new().unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
        thread::scope(|scope| scope.spawn(|| test(dir.path())).join().unwrap());
    }

    fn owner(path: &Path) -> (u32, u32) {
        let metadata = fs::metadata(path).unwrap();
        (metadata.uid(), metadata.gid())
    }

    #[test]
    fn new_files_belong_to_the_user() {
        run(|dir| {
            for (i, (uid, gid)) in [(1, 2), (12_345, 23_456), (0, 0), (0, 7), (9, 0)].into_iter().enumerate()
            {
                // Twice: the second does nothing.
                for j in 0..2 {
                    assume(HostId(uid), HostId(gid)).unwrap();
                    let path = dir.join(format!("{i}-{j}"));
                    File::create(&path).unwrap();
                    assert_eq!(owner(&path), (uid, gid));
                }
            }
        });
    }

    #[test]
    fn other_threads_are_not_affected() {
        run(|dir| {
            assume(USER, GROUP).unwrap();
            thread::scope(|scope| {
                // A thread inherits how the file system sees it, and is its own from then on.
                scope.spawn(|| assume(HostId(0), HostId(0)).unwrap()).join().unwrap();
            });
            let path = dir.join("file");
            File::create(&path).unwrap();
            assert_eq!(owner(&path), (USER.0, GROUP.0));
        });
    }

    /// Writes to a file of mode 6755 and returns its mode.
    fn write_to_setuid(dir: &Path) -> u32 {
        let path = dir.join("setuid");
        fs::write(&path, "program").unwrap();
        let mut file = File::options().write(true).open(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o6755)).unwrap();
        file.write_all(b"other").unwrap();
        fs::metadata(&path).unwrap().mode() & 0o7777
    }

    #[test]
    fn setuid_bits_go_when_a_user_writes() {
        run(|dir| {
            assume(HostId(0), HostId(0)).unwrap();
            assert_eq!(write_to_setuid(dir), 0o6755);
            assume_uid(USER).unwrap();
            assert_eq!(write_to_setuid(dir), 0o755);
            assume_uid(HostId(0)).unwrap();
            assert_eq!(write_to_setuid(dir), 0o6755);
        });
    }

    #[test]
    fn the_group_stays_when_only_the_user_changes() {
        run(|dir| {
            assume(USER, GROUP).unwrap();
            assume_uid(HostId(77)).unwrap();
            let path = dir.join("file");
            File::create(&path).unwrap();
            assert_eq!(owner(&path), (77, GROUP.0));
        });
    }

    #[test]
    fn the_host_checks_whom_the_guest_did_not() {
        run(|dir| {
            let denied = |path: &str| {
                File::create(dir.join(path)).is_err_and(|e| e.raw_os_error() == Some(libc::EACCES))
            };
            assume_unprivileged(USER, GROUP).unwrap();
            assert!(denied("a"));
            // From one to the other without root in between, in all directions.
            assume(USER, GROUP).unwrap();
            assert!(!denied("b"));
            assume_unprivileged(HostId(1), HostId(1)).unwrap();
            assert!(denied("c"));
            assume_uid(HostId(1)).unwrap();
            assert!(denied("d"));
            assume(HostId(0), HostId(0)).unwrap();
            assert!(!denied("e"));
            // Squashing to root takes nothing away.
            assume_unprivileged(USER, GROUP).unwrap();
            assume_unprivileged(HostId(0), HostId(0)).unwrap();
            assert!(!denied("g"));
        });
    }

    /// From everybody to everybody, with what setfsuid(2) does to capabilities and without.
    #[test]
    fn the_effective_capabilities_are_those_of_the_user() {
        fn effective() -> CapabilitySet {
            capabilities(None).unwrap().effective
        }

        for fixup in [true, false] {
            run(|_| {
                if !fixup {
                    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)
                        .expect("This test needs CAP_SETPCAP");
                }
                let all = capabilities(None).unwrap().permitted.difference(CapabilitySet::SYS_RESOURCE);
                let root = || assume(HostId(0), HostId(0)).map(|()| assert_eq!(effective(), all));
                let user = |uid| {
                    let expected = all.difference(CapabilitySet::FSETID | ROOT);
                    assume(HostId(uid), GROUP).map(|()| assert_eq!(effective(), expected))
                };
                let squashed = || {
                    let expected = all.difference(FILE_SYSTEM | ROOT);
                    assume_unprivileged(USER, GROUP).map(|()| assert_eq!(effective(), expected))
                };
                let privileged =
                    |uid| assume_privileged(HostId(uid), GROUP).map(|()| assert_eq!(effective(), all));
                let steps: [&dyn Fn() -> Result<(), Errno>; 6] =
                    [&root, &|| user(1), &|| user(2), &squashed, &|| privileged(1), &|| privileged(0)];
                for from in steps {
                    for to in steps {
                        from().unwrap();
                        to().unwrap();
                    }
                }
                // After a failure half-way.
                for to in steps {
                    assert_eq!(assume(HostId(u32::MAX), HostId(5)), Err(Errno::PERM));
                    to().unwrap();
                }
            });
        }
    }

    /// Whoever the thread acts for, /proc/self/fd is its own.
    #[test]
    fn files_are_opened_again_as_a_user() {
        run(|dir| {
            let path = dir.join("file");
            fs::write(&path, "content").unwrap();
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let inode = openat(CWD, &path, flags, Mode::empty()).unwrap();
            let reopen = || ProcFd::open()?.reopen(inode.as_fd(), OFlags::RDWR).map(drop);
            assume(USER, GROUP).unwrap();
            assert_eq!(reopen(), Ok(()));
            let xattrs = xattr::File::Path(&ProcFd::open().unwrap(), inode.as_fd()).list();
            assert!(xattrs.is_ok());
            assume_unprivileged(USER, GROUP).unwrap();
            assert_eq!(reopen(), Err(Errno::ACCESS));
            assume(HostId(0), HostId(0)).unwrap();
            ProcFd::open().unwrap().chmod(inode.as_fd(), Mode::from(0o666)).unwrap();
            assume_unprivileged(USER, GROUP).unwrap();
            assert_eq!(reopen(), Ok(()));
        });
    }

    #[test]
    fn no_id_is_refused_and_the_thread_goes_on() {
        run(|dir| {
            assume(USER, GROUP).unwrap();
            assert_eq!(assume(HostId(u32::MAX), GROUP), Err(Errno::PERM));
            assert_eq!(assume(HostId(0), HostId(u32::MAX)), Err(Errno::PERM));
            assume(USER, GROUP).unwrap();
            let path = dir.join("file");
            File::create(&path).unwrap();
            assert_eq!(owner(&path), (USER.0, GROUP.0));
        });
    }

    #[test]
    fn what_is_required_is_kept() {
        assert!(KEPT.contains(REQUIRED));
        assert!(!KEPT.intersects(CapabilitySet::SYS_RESOURCE | CapabilitySet::SYS_ADMIN));
    }
}
