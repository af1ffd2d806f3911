//! The socket on which a daemon meets its front end: created at a path, connected to, inherited, or handed over by
//! systemd.
//!
//! [`Socket::from_args`] implements the socket part of "Backend program conventions" in QEMU's
//! `docs/interop/vhost-user.rst`. All sources end in one of three states: the daemon listens and front ends may come
//! and go, it connects to where the front end listens, or it has one connection and ends with it.

mod client;
mod inherited;
mod keeper;
mod lock;
mod path;
mod sys;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::cli::SocketArgs;
pub use client::{ConnectError, Target};
pub(crate) use keeper::Keeper;
pub use sys::{InheritError, inherited_fd};

/// What a daemon got to meet its front end. All are in blocking mode and closed on `exec`.
#[derive(Debug)]
pub enum Socket {
    /// Front ends connect to this socket.
    Listening(Listener),
    /// The front end listens here, and the daemon connects, again and again.
    Connecting(Target),
    /// The one front end is connected already.
    Connected(UnixStream),
}

/// A socket at a path: what [`Socket::open`] is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketOptions {
    /// The path.
    pub path: PathBuf,
    /// The group, a name or a number, whose members may connect. Without effect for a client, which makes no socket.
    pub group: Option<String>,
    /// Connect to the path, on which the front end listens, instead of listening on it.
    pub client: bool,
}

impl Socket {
    /// Listens at the path of `options`, or gets ready to connect to it.
    ///
    /// Call it before the [sandbox](crate::sandbox) closes, and give it to the sandbox: a client needs the path as
    /// long as it lives, and a listening socket in the end.
    pub fn open(options: &SocketOptions) -> Result<Self, SocketError> {
        if options.client {
            Target::new(&options.path).map(Self::Connecting)
        } else {
            path::listen(&options.path, options.group.as_deref()).map(Self::Listening)
        }
    }

    /// Listens at `path` for the own user and root alone, as a [control](crate::control) socket does: its mode is 0600.
    ///
    /// As with [`open`](Self::open), give it to the sandbox.
    pub fn open_private(path: &Path) -> Result<Self, SocketError> {
        path::listen_privately(path).map(Self::Listening)
    }

    /// Opens the one socket that the command line names, or takes the one that systemd passed if it names none.
    pub fn from_args(args: &SocketArgs) -> Result<Self, SocketError> {
        if let Some(path) = args.socket_path.clone() {
            return Self::open(&SocketOptions {
                path,
                group: args.socket_group.clone(),
                client: args.client,
            });
        }
        match args.fd {
            Some(fd) => Self::inherited(fd),
            // One was asked for, so one is there.
            None => Self::from_systemd(Some(1))?.pop().ok_or(SocketError::NoSource),
        }
    }

    /// Takes over the socket that the daemon's parent passed as file descriptor `fd`, listening or connected.
    pub fn inherited(fd: RawFd) -> Result<Self, SocketError> {
        inherited::open(fd)
    }

    /// Takes over the sockets that systemd passed (`sd_listen_fds(3)`), in the order of the `ListenStream=` lines of
    /// its socket unit: exactly as many as are `wanted`, or all if that is `None`. There is at least one, or it fails.
    ///
    /// A file descriptor can be taken over once, so this can be called once.
    pub fn from_systemd(wanted: Option<usize>) -> Result<Vec<Self>, SocketError> {
        let fds = inherited::listen_fds(|name| std::env::var_os(name), std::process::id(), wanted)?;
        fds.map(inherited::open).collect()
    }

    /// Whether the socket's path has to be found later.
    fn needs_path(&self) -> bool {
        match self {
            Self::Listening(listener) => listener.claim.is_some(),
            Self::Connecting(_) => true,
            Self::Connected(_) => false,
        }
    }

    /// Leaves to a keeper what takes the socket's path.
    fn keep_by(&mut self, link: keeper::Link) {
        match self {
            Self::Listening(Listener { claim: Some(claim), .. }) => claim.keep_by(link),
            Self::Connecting(target) => target.keep_by(link),
            Self::Listening(_) | Self::Connected(_) => {}
        }
    }
}

/// For the log: names the path where there is one.
impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listening(Listener { claim: Some(claim), .. }) => {
                write!(f, "socket {}", claim.path().display())
            }
            Self::Listening(Listener { claim: None, listener }) => {
                f.write_str("inherited listening socket")?;
                match listener.local_addr().ok().as_ref().and_then(SocketAddr::as_pathname) {
                    Some(path) => write!(f, " {}", path.display()),
                    None => Ok(()),
                }
            }
            Self::Connecting(target) => write!(f, "socket {}", target.path().display()),
            Self::Connected(_) => f.write_str("inherited connection"),
        }
    }
}

/// A listening socket, used as the [`UnixListener`] that it derefs to.
///
/// Dropping one that was created at a path removes the socket and its lock file, unless something else has taken
/// the place of either. An inherited socket belongs to whoever made it, and nothing is removed.
#[derive(Debug)]
pub struct Listener {
    // Dropped before the listener: as long as that is open, its inode number cannot be given to another file, and
    // "is the file at the path still ours" has a reliable answer.
    claim: Option<path::Claim>,
    listener: UnixListener,
}

impl Listener {
    /// The path at which the socket was created; `None` for an inherited one.
    pub fn path(&self) -> Option<&Path> {
        self.claim.as_ref().map(path::Claim::path)
    }

    /// The directory from which the socket and the lock file are removed in the end, as an `O_PATH` descriptor;
    /// `None` if there is nothing to be removed, or from inside a sandbox, where it is not left to this process.
    pub fn directory(&self) -> Option<BorrowedFd<'_>> {
        self.claim.as_ref().and_then(path::Claim::directory)
    }

    /// Removes the socket and the lock file, unless something else has taken the place of either.
    fn remove_files(&self) {
        if let Some(claim) = &self.claim {
            claim.remove_files();
        }
    }
}

/// Wraps a listener that somebody else cleans up after.
impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self { claim: None, listener }
    }
}

impl Deref for Listener {
    type Target = UnixListener;

    fn deref(&self) -> &UnixListener {
        &self.listener
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Neither a flag nor systemd names a socket.
    #[error("No socket is given: use --socket-path or --fd, or start the daemon from a systemd socket unit")]
    NoSource,

    /// The path does not fit into a socket address.
    #[error(
        "Socket path {} has {} bytes, the system allows {}: choose a shorter one",
        path.display(), path.as_os_str().len(), path::MAX_PATH
    )]
    PathTooLong {
        /// The path of the socket.
        path: PathBuf,
    },

    /// The path ends in `/`, `.` or `..`, so it can only be a directory.
    #[error("Socket path {} names a directory: append a file name", path.display())]
    NoFileName {
        /// The path of the socket.
        path: PathBuf,
    },

    /// The directory of the path is missing.
    #[error("Directory {} does not exist: create it or choose another path", directory.display())]
    NoDirectory {
        /// The directory of the socket.
        directory: PathBuf,
    },

    /// The directory of the path is not usable.
    #[error("Cannot use directory {} for the socket", directory.display())]
    Directory {
        /// The directory of the socket.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The lock file next to the socket cannot be created, opened or locked.
    #[error(
        "Cannot lock {}: let the daemon write to it and to its directory, or choose another path",
        lock.display()
    )]
    Lock {
        /// The path of the lock file.
        lock: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// A live process serves the path.
    #[error("Socket {} is in use by {user}: stop that or choose another path", path.display())]
    InUse {
        /// The path of the socket.
        path: PathBuf,
        /// Who uses it, as far as that is known.
        user: String,
    },

    /// Something that is not a socket stands at the path.
    #[error("{} is a {kind}, not a socket: choose another path", path.display())]
    Occupied {
        /// The path of the socket.
        path: PathBuf,
        /// What stands there.
        kind: &'static str,
    },

    /// It cannot be found out whether somebody listens on the socket at the path.
    #[error(
        "Cannot find out whether existing socket {} is in use: if it is not, remove it; otherwise choose another path",
        path.display()
    )]
    Probe {
        /// The path of the socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The socket that a killed daemon left behind cannot be removed.
    #[error("Cannot remove unused socket {}", path.display())]
    RemoveStale {
        /// The path of the socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The socket cannot be created or listened on.
    #[error("Cannot listen on socket {}", path.display())]
    Listen {
        /// The path of the socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// No group has the name.
    #[error("Group {group} does not exist: create it or choose another --socket-group")]
    NoGroup {
        /// The value of `--socket-group`.
        group: String,
    },

    /// The group database does not answer.
    #[error("Cannot look up group {group}")]
    GroupLookup {
        /// The value of `--socket-group`.
        group: String,
        /// Why.
        source: io::Error,
    },

    /// The socket cannot be given to the group.
    #[error(
        "Cannot give socket {} to group {group}: run the daemon as root or as a member of the group",
        path.display()
    )]
    Group {
        /// The path of the socket.
        path: PathBuf,
        /// The value of `--socket-group`.
        group: String,
        /// Why.
        source: io::Error,
    },

    /// An environment variable of systemd's socket activation is not a number.
    #[error("Environment variable {name} is {value:?}, not a number: unset it or use --socket-path or --fd")]
    ListenVariable {
        /// `LISTEN_PID` or `LISTEN_FDS`.
        name: &'static str,
        /// Its value.
        value: OsString,
    },

    /// Systemd passed another number of sockets than the daemon has devices.
    #[error(
        "systemd passed {count} sockets (LISTEN_FDS), the daemon serves {wanted}: have as many ListenStream= in its \
         socket unit"
    )]
    ListenCount {
        /// How many it passed.
        count: u32,
        /// How many are needed.
        wanted: usize,
    },

    /// The number is not that of an inherited file descriptor.
    #[error(transparent)]
    Inherit(#[from] InheritError),

    /// The descriptor is not a socket.
    #[error("File descriptor {fd} is not a socket: pass a UNIX stream socket")]
    NotSocket {
        /// The number of the file descriptor.
        fd: RawFd,
    },

    /// The descriptor is a socket of another family or type.
    #[error("File descriptor {fd} is another kind of socket: pass a UNIX stream socket")]
    WrongSocket {
        /// The number of the file descriptor.
        fd: RawFd,
    },

    /// The socket does nothing yet.
    #[error(
        "File descriptor {fd} is a socket that neither listens nor is connected: call listen or connect first"
    )]
    Idle {
        /// The number of the file descriptor.
        fd: RawFd,
    },

    /// The descriptor cannot be examined.
    #[error("Cannot use file descriptor {fd} as the socket")]
    Descriptor {
        /// The number of the file descriptor.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
}
