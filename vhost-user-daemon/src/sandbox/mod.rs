//! Confinement of the process: namespaces, Landlock, capabilities, seccomp.
//!
//! A daemon works for a guest that is not trusted. Should the guest ever take it over, what it then can reach is what
//! this module leaves: the files that are open, the directories that are shared, threads, memory, and UNIX sockets.
//!
//! # How to use it
//!
//! [`Sandbox::enter`] is called once, after every host resource is open and before any thread is started: threads
//! that exist would stay outside, so it refuses. That makes an order for `main`:
//!
//! 1. parse the flags, start the logger;
//! 2. open what has a path (images, logs, a state file), [hold the signals](crate::hold_signals), and open the socket:
//!    [`Socket::from_args`];
//! 3. look up what comes from a database (`--socket-group` is by the socket; names of users and groups);
//! 4. [`Sandbox::enter`], with the directories that are served and the sockets;
//! 5. make the device, start threads, [`serve`](crate::serve()).
//!
//! ```no_run
//! use std::path::Path;
//! use vhost_user_daemon::sandbox::{CapabilitySet, Needs, Sandbox, SandboxArgs};
//! use vhost_user_daemon::socket::Socket;
//!
//! # fn run(args: &SandboxArgs, mut socket: Socket) -> anyhow::Result<()> {
//! let mut sandbox = Sandbox::new(args.sandbox);
//! let share = sandbox.directory(Path::new("/srv/share"), false);
//! sandbox.keep_capabilities(CapabilitySet::CHOWN | CapabilitySet::DAC_OVERRIDE);
//! sandbox.need(Needs::HOST_OWNERS);
//! let entered = sandbox.enter(&mut [&mut socket])?;
//! let root = &entered.directories[share].fd;
//! # Ok(()) }
//! ```
//!
//! A daemon without directories (blk, net, balloon) leaves them out: it then has no path at all. What it opens while
//! it serves, say an image by a name that comes with a control command, has to be opened before, or is in a directory
//! of the sandbox.
//!
//! # What is done
//!
//! | | `namespace` | `landlock` | `none` |
//! |---|---|---|---|
//! | file system | an empty one with the directories in it | the host's, where other files can be neither opened nor changed | the host's |
//! | attributes of other files (`stat`, `chmod`) | no | what the user may | the same |
//! | network | none | none | the host's |
//! | abstract UNIX sockets | none | none from Linux 6.12 on | the host's |
//! | UNIX sockets with a path | those in the directories | what the user may use; from 7.1 on none | what the user may use |
//! | signals to other processes | none from Linux 6.12 on | the same | what the user may |
//! | seccomp | yes | yes | no |
//! | capabilities | those that are asked for | the same | the same |
//! | no_new_privs | yes | yes | yes |
//! | core dumps, ptrace by the same user | no | no | yes |
//!
//! `auto` takes the first of namespaces and Landlock that can be had, and logs a warning if there is neither; seccomp
//! is left then. Whether namespaces can be had is tried in a child process, because they cannot be left again.
//!
//! Without CAP_SYS_ADMIN it takes a user namespace, in which the files of other users belong to nobody (65534), and
//! which makes other capabilities worthless for the host's files. What the guest sees must not depend on which sandbox
//! the host happens to have. So `auto` does not use one for a process that [shows owners](Needs::HOST_OWNERS), and
//! nothing uses one that would lose capabilities.
//!
//! What was open stays open. So a daemon must not keep a directory of the host open in namespaces: `..` leads from
//! there to all of the host, and so a parent process must not pass one on either. For this reason [`Sandbox::enter`] takes the sockets: a second process, which stays
//! outside, removes the socket in the end, and connects to a front end with `--client` (see `keeper.rs`). It is there
//! for sockets with a path only, and not with `none`. A control socket
//! is one of the sockets. Other files that have to be removed in the end need the same, or stay.
//!
//! Mounts have `noexec`, on which `access(X_OK)` says no for every file, and `nosymfollow`. Landlock alone has no
//! effect on attributes, so that who promises [read-only](Sandbox::directory) has to refuse changes itself as well.
//!
//! The filter of system calls is a short list of what is refused, not of what is allowed: see `seccomp.rs`. Whatever
//! the list, a filter makes each system call about 30 ns slower. Landlock makes opening a file 0.5 us slower, and
//! 0.1 us for each directory between the file and the shared one; nothing else.

mod error;
mod landlock;
mod namespace;
mod privileges;
mod seccomp;
mod sys;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use ::landlock::RulesetCreated;
use bitflags::bitflags;
use clap::{Args, ValueEnum};
use log::{info, warn};
use rustix::fs::{Mode, OFlags, open};
pub use rustix::thread::CapabilitySet;

pub use self::error::SandboxError;
use crate::cli::chain;
use crate::serve;
use crate::socket::{Keeper, Socket};

/// The flag about the sandbox.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct SandboxArgs {
    /// Confine the daemon, so that a guest that takes it over does not get at the rest of the host
    #[arg(long, value_name = "KIND", value_enum, default_value_t, help_heading = "Security")]
    pub sandbox: SandboxChoice,
}

/// The values of `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SandboxChoice {
    /// The strongest that the system allows and that changes nothing for the guest; a warning if there is none
    #[default]
    Auto,
    /// Namespaces of its own: the daemon sees nothing but what it serves
    Namespace,
    /// Landlock rules: the kernel refuses to open other files
    Landlock,
    /// Neither, and no filter of system calls: for debuggers, or where a supervisor confines the daemon
    None,
}

/// The sandbox that a process is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// Namespaces.
    Namespace {
        /// With a user namespace, in which only the own user and group have a name.
        user: bool,
    },
    /// Landlock rules.
    Landlock,
    /// Nothing but dropped capabilities, and with `auto` the filter of system calls.
    None,
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace { user: true } => f.write_str("namespaces, one of users among them"),
            Self::Namespace { user: false } => f.write_str("namespaces"),
            Self::Landlock => f.write_str("Landlock"),
            Self::None => f.write_str("none"),
        }
    }
}

bitflags! {
    /// What a process still does inside that most do not.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Needs: u8 {
        /// It shows or sets the owners of files (`st_uid`, `chown`, POSIX ACLs). `auto` then uses no user namespace,
        /// which knows one user only.
        const HOST_OWNERS = 1;
        /// It calls `open_by_handle_at`, which takes CAP_DAC_READ_SEARCH. That finds files anywhere on the file
        /// system, shared or not, and Landlock refuses some that are shared.
        const FILE_HANDLES = 1 << 1;
        /// It makes or uses io_uring.
        const IO_URING = 1 << 2;
    }
}

/// What a process needs once it serves: everything else is taken from it.
#[derive(Clone, Debug)]
pub struct Sandbox {
    choice: SandboxChoice,
    shares: Vec<Share>,
    keep: CapabilitySet,
    needs: Needs,
}

/// A directory that stays reachable.
#[derive(Clone, Debug)]
struct Share {
    path: PathBuf,
    read_only: bool,
}

/// What a process has inside its sandbox.
#[derive(Debug)]
pub struct Entered {
    /// The directories, in the order of the calls of [`Sandbox::directory`].
    pub directories: Vec<EnteredDirectory>,
    /// `/proc/self/fd` as an `O_PATH` descriptor: `openat` on it with the number of an `O_PATH` descriptor for a name
    /// opens that file for good, for any thread of the process. The path `/proc/self/fd/N` works as well.
    pub proc_self_fd: OwnedFd,
    /// The sandbox that it is.
    pub confinement: Confinement,
    /// The capabilities that are left: what was asked for, as far as the process had it.
    pub capabilities: CapabilitySet,
}

/// A directory that stayed reachable.
#[derive(Debug)]
pub struct EnteredDirectory {
    /// An `O_PATH` descriptor.
    pub fd: OwnedFd,
    /// The directory is the root of a mount of its own: read-only if asked for, without set-user-ID bits, devices,
    /// programs and symbolic links for those who open its files here, which does not keep any of them from being
    /// stored. `..` does not lead out of it, but to an empty directory, and from a directory that the host moved out
    /// of it, it leads nowhere.
    ///
    /// Otherwise it is the directory as the host sees it.
    pub is_mount_root: bool,
}

/// One of the ways to be confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Namespace,
    Landlock,
}

/// What is known before anything is done.
struct Situation {
    /// Namespaces take a user namespace.
    user: bool,
    /// The capabilities to keep.
    keep: CapabilitySet,
    /// The directories, as the host sees them.
    directories: Vec<OwnedFd>,
}

impl Situation {
    /// A user namespace is only for those who have no capability to lose.
    fn check_capabilities(&self) -> Result<(), SandboxError> {
        if self.user && !self.keep.is_empty() {
            return Err(SandboxError::CapabilitiesLost { capabilities: privileges::names(self.keep) });
        }
        Ok(())
    }
}

impl Sandbox {
    /// A sandbox in which nothing is left.
    pub fn new(choice: SandboxChoice) -> Self {
        Self { choice, shares: Vec::new(), keep: CapabilitySet::empty(), needs: Needs::empty() }
    }

    /// Keeps a directory reachable, through [`Entered::directories`], in which this returns its index.
    ///
    /// Its path is looked up by [`enter`](Self::enter). With `read_only`, nothing can be changed in it: files can
    /// neither be made nor written to, and in namespaces their attributes cannot be changed either.
    pub fn directory(&mut self, path: &Path, read_only: bool) -> usize {
        self.shares.push(Share { path: path.into(), read_only });
        self.shares.len() - 1
    }

    /// Keeps these capabilities, as far as the process has them, permitted and effective. All others go, from the
    /// bounding set too, and no other program can get any.
    pub fn keep_capabilities(&mut self, capabilities: CapabilitySet) {
        self.keep |= capabilities;
    }

    /// Keeps something possible that most daemons do not do.
    pub fn need(&mut self, needs: Needs) {
        self.needs |= needs;
    }

    /// Enters the sandbox, and logs which one it is.
    ///
    /// `sockets` are those that the daemon goes on to use: what they need of the file system stays reachable for
    /// them. The service manager too, if there is one (`$NOTIFY_SOCKET`).
    ///
    /// The process must have one thread.
    pub fn enter(self, sockets: &mut [&mut Socket]) -> Result<Entered, SandboxError> {
        let count = fs::read_dir("/proc/self/task").map_err(SandboxError::Proc)?.count();
        if count != 1 {
            return Err(SandboxError::Threads { count });
        }
        serve::connect_to_service_manager();
        let held = privileges::held()?;
        let mut situation = Situation {
            user: !held.contains(CapabilitySet::SYS_ADMIN),
            keep: self.keep & held,
            directories: self
                .shares
                .iter()
                .map(|share| open_directory(&share.path))
                .collect::<Result<_, _>>()?,
        };
        let kind = self.choose(&situation)?;
        if kind.is_some() {
            start_keeper(sockets)?;
        }
        if kind == Some(Kind::Namespace) {
            situation.directories = namespace::enter(situation.user, &self.shares)?;
        }
        let proc_self_fd = open_path(Path::new("/proc/self/fd")).map_err(SandboxError::Proc)?;
        let rules = match kind {
            Some(Kind::Landlock) => Some(self.rules(&situation)?),
            Some(Kind::Namespace) => landlock::prepare_scope().ok(),
            None => None,
        };
        privileges::drop_all_but(situation.keep)?;
        if let Some(rules) = rules {
            rules.restrict_self().map_err(|error| SandboxError::Landlock(error.into()))?;
        }
        if self.choice != SandboxChoice::None {
            privileges::hide()?;
            self.filter_system_calls();
        }
        let confinement = match kind {
            Some(Kind::Namespace) => Confinement::Namespace { user: situation.user },
            Some(Kind::Landlock) => Confinement::Landlock,
            None => Confinement::None,
        };
        info!("Sandbox: {confinement}; capabilities: {}", privileges::names(situation.keep));
        let is_mount_root = kind == Some(Kind::Namespace);
        let directories =
            situation.directories.into_iter().map(|fd| EnteredDirectory { fd, is_mount_root }).collect();
        Ok(Entered { directories, proc_self_fd, confinement, capabilities: situation.keep })
    }

    /// The kind of sandbox that is asked for, or the first that can be had.
    fn choose(&self, situation: &Situation) -> Result<Option<Kind>, SandboxError> {
        match self.choice {
            SandboxChoice::None => return Ok(None),
            SandboxChoice::Landlock => return Ok(Some(Kind::Landlock)),
            SandboxChoice::Namespace => {
                if situation.user && self.needs.contains(Needs::HOST_OWNERS) {
                    warn!(
                        "In a user namespace, the files of other users belong to user 65534: to see their owners, \
                         use --sandbox landlock or run the daemon with CAP_SYS_ADMIN"
                    );
                }
                return situation.check_capabilities().map(|()| Some(Kind::Namespace));
            }
            SandboxChoice::Auto => {}
        }
        let mut reasons = Vec::new();
        for kind in [Kind::Namespace, Kind::Landlock] {
            let problem = match kind {
                Kind::Namespace => self.try_namespace(situation),
                Kind::Landlock => self.rules(situation).map(drop).map_err(|error| chain(&error)),
            };
            match problem {
                Ok(()) => {
                    for reason in reasons {
                        info!("{reason}");
                    }
                    return Ok(Some(kind));
                }
                Err(reason) => reasons.push(reason),
            }
        }
        warn!(
            "There is no sandbox for the daemon, whose user's files are open to it: {}",
            reasons.join("; ")
        );
        Ok(None)
    }

    /// Whether namespaces can be had that change nothing for the guest.
    fn try_namespace(&self, situation: &Situation) -> Result<(), String> {
        if situation.user && self.needs.contains(Needs::HOST_OWNERS) {
            return Err(
                "No namespaces without CAP_SYS_ADMIN: in a user namespace, the owners of files are not \
                        known (--sandbox namespace uses one all the same)"
                    .into(),
            );
        }
        let brief = |error: SandboxError| match error {
            SandboxError::Namespace { step, source } => format!("No namespaces ({step}: {source})"),
            error => chain(&error),
        };
        situation.check_capabilities().map_err(brief)?;
        let attempt = || namespace::enter(situation.user, &self.shares).map(drop).map_err(brief);
        sys::attempt_in_child(attempt)
            .unwrap_or_else(|error| Err(format!("Namespaces cannot be tried: {error}")))
    }

    /// Landlock rules for the directories as they are now.
    fn rules(&self, situation: &Situation) -> Result<RulesetCreated, SandboxError> {
        let shares =
            self.shares.iter().zip(&situation.directories).map(|(share, directory)| landlock::Rule {
                directory: directory.as_fd(),
                access: if share.read_only { landlock::read_only() } else { landlock::read_write() },
            });
        let rules: Vec<_> = shares.collect();
        landlock::prepare(&rules).map_err(|error| SandboxError::Landlock(error.into()))
    }

    /// One of several layers: a daemon is better off without it than not running.
    fn filter_system_calls(&self) {
        let result = seccomp::filter(self.needs)
            .map_err(|error| error.to_string())
            .and_then(|program| sys::install_filter(&program).map_err(|error| error.to_string()));
        if let Err(error) = result {
            warn!("System calls are not filtered, as the kernel has no seccomp for it: {error}");
        }
    }
}

/// Leaves to a process outside what the sockets' paths are needed for.
fn start_keeper(sockets: &mut [&mut Socket]) -> Result<(), SandboxError> {
    let failed = SandboxError::Keeper;
    let (keeper, links) = Keeper::new(sockets).map_err(|error| failed(error.into()))?;
    if !keeper.is_empty() {
        let keep = keeper.fds();
        let run = move || {
            if privileges::hide().is_ok() {
                keeper.run();
            }
        };
        sys::start_child(&keep, run).map_err(failed)?;
    }
    links.hand_out(sockets);
    Ok(())
}

fn open_directory(path: &Path) -> Result<OwnedFd, SandboxError> {
    open_path(path).map_err(|source| SandboxError::Directory { path: path.into(), source })
}

fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct TestArgs {
        #[command(flatten)]
        sandbox: SandboxArgs,
    }

    #[test]
    fn the_flag_takes_four_values() {
        let parse = |arguments: &[&str]| {
            TestArgs::try_parse_from([&["daemon"], arguments].concat()).map(|args| args.sandbox.sandbox)
        };
        assert_eq!(parse(&[]).unwrap(), SandboxChoice::Auto);
        for (name, choice) in [
            ("auto", SandboxChoice::Auto),
            ("namespace", SandboxChoice::Namespace),
            ("landlock", SandboxChoice::Landlock),
            ("none", SandboxChoice::None),
        ] {
            assert_eq!(parse(&["--sandbox", name]).unwrap(), choice);
        }
        let error = parse(&["--sandbox=chroot"]).unwrap_err().to_string();
        assert!(error.contains("namespace"), "{error}");
    }

    #[test]
    fn a_filter_can_be_made_for_all_needs() {
        let most = seccomp::filter(Needs::empty()).unwrap().len();
        let least = seccomp::filter(Needs::all()).unwrap().len();
        assert!(least < most && most < 1000, "{least} {most}");
    }
}
