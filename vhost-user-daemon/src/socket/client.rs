//! A socket on which the front end listens, and to which the daemon connects.
//!
//! The path belongs to the virtual machine monitor, which makes the socket when it starts and removes it when it
//! ends, and which may start after the daemon. So whatever the monitor or its user can still put right is tried
//! again: a path or directory that is missing, nobody who listens, missing permissions. What cannot become right by
//! itself is refused at the start: a path that is too long, or where something else than a socket stands.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{self, FileType};
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, SocketFlags};

use super::SocketError;
use super::keeper::Link;
use super::path::{MAX_PATH, describe, new_socket};

/// The path of a socket on which the front end listens, now or later.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    /// Connects in place of this process, which cannot find the path.
    keeper: Option<Link>,
}

impl Target {
    /// Checks the path. Nothing is made there, and nobody is called: a front end may wait for exactly one connection.
    pub(super) fn new(path: &Path) -> Result<Self, SocketError> {
        if path.file_name().is_none() {
            return Err(SocketError::NoFileName { path: path.into() });
        }
        if path.as_os_str().len() > MAX_PATH {
            return Err(SocketError::PathTooLong { path: path.into() });
        }
        if let Ok(stat) = fs::stat(path) {
            let file_type = FileType::from_raw_mode(stat.st_mode);
            if file_type != FileType::Socket {
                return Err(SocketError::Occupied { path: path.into(), kind: describe(file_type) });
            }
        }
        Ok(Self { path: path.into(), keeper: None })
    }

    /// Leaves connecting to a keeper.
    pub(super) fn keep_by(&mut self, link: Link) {
        self.keeper = Some(link);
    }

    /// The path of the front end's socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Connects, without waiting for anything. The stream is in blocking mode.
    pub fn connect(&self) -> Result<UnixStream, ConnectError> {
        self.try_connect().map_err(|error| ConnectError::new(self.path.clone(), error))
    }

    fn try_connect(&self) -> Result<UnixStream, Errno> {
        match &self.keeper {
            Some(keeper) => keeper.connect().map(UnixStream::from),
            None => self.connect_by_path(),
        }
    }

    /// Connects, as a process that finds the path.
    pub(super) fn connect_by_path(&self) -> Result<UnixStream, Errno> {
        // In blocking mode, connect(2) would wait for room in the backlog.
        let socket = new_socket(SocketFlags::NONBLOCK)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(&self.path)?)?;
        rustix::io::ioctl_fionbio(&socket, false)?;
        Ok(UnixStream::from(socket))
    }
}

/// Why a daemon could not connect to its front end this time. Another time it may.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no socket, or one on which nobody listens.
    #[error(
        "Nobody listens on socket {}: start the virtual machine monitor as the server (QEMU: server=on for the \
         chardev)",
        path.display()
    )]
    Nobody {
        /// The path of the socket.
        path: PathBuf,
    },

    /// The socket or a directory above it is not accessible.
    #[error(
        "Access to socket {} is denied: run the daemon as the user of the virtual machine monitor, or give it write \
         permission for the socket and search permission for its directories",
        path.display()
    )]
    Denied {
        /// The path of the socket.
        path: PathBuf,
    },

    /// Others are waiting to be accepted.
    #[error("Socket {} has no room for another connection: stop the other daemons that use it", path.display())]
    Busy {
        /// The path of the socket.
        path: PathBuf,
    },

    /// The socket is one for datagrams or packets.
    #[error("Socket {} is not a stream socket: choose another path", path.display())]
    WrongType {
        /// The path of the socket.
        path: PathBuf,
    },

    /// Something else.
    #[error("Cannot connect to socket {}", path.display())]
    Other {
        /// The path of the socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ConnectError {
    fn new(path: PathBuf, error: Errno) -> Self {
        match error {
            Errno::NOENT | Errno::CONNREFUSED => Self::Nobody { path },
            Errno::ACCESS | Errno::PERM => Self::Denied { path },
            Errno::AGAIN => Self::Busy { path },
            Errno::PROTOTYPE => Self::WrongType { path },
            error => Self::Other { path, source: error.into() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::{Socket, SocketOptions};
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixDatagram, UnixListener};
    use tempfile::TempDir;

    fn place() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        (directory, path)
    }

    fn open(path: &Path) -> Result<Socket, SocketError> {
        Socket::open(&SocketOptions { path: path.into(), client: true, ..SocketOptions::default() })
    }

    fn target(path: &Path) -> Target {
        match open(path).unwrap() {
            Socket::Connecting(target) => target,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_connection_is_made_and_nothing_else() {
        let (directory, path) = place();
        let target = target(&path);
        assert!(matches!(target.connect(), Err(ConnectError::Nobody { .. })));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "no socket and no lock file");

        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let socket = open(&path).unwrap();
        assert_eq!(socket.to_string(), format!("socket {}", path.display()));
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "nobody was called");
        let mut ours = target.connect().unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        assert!(!rustix::fs::fcntl_getfl(&ours).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
        theirs.write_all(b"x").unwrap();
        ours.read_exact(&mut [0]).unwrap();
        drop((target, socket));
        assert!(path.exists(), "the path is the front end's");
    }

    #[test]
    fn what_can_become_right_is_tried_again() {
        let (directory, path) = place();
        let early = target(&directory.path().join("later/a.sock"));
        assert!(matches!(early.connect(), Err(ConnectError::Nobody { .. })));

        let target = target(&path);
        let socket = new_socket(SocketFlags::empty()).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert!(matches!(target.connect(), Err(ConnectError::Nobody { .. })));
        rustix::net::listen(&socket, 0).unwrap();
        let _waiting = target.connect().unwrap();
        assert!(matches!(target.connect(), Err(ConnectError::Busy { .. })));

        fs::remove_file(&path).unwrap();
        let datagram = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(target.connect(), Err(ConnectError::WrongType { .. })));
        drop(datagram);
        fs::remove_file(&path).unwrap();
        symlink(&path, &path).unwrap();
        assert!(matches!(target.connect(), Err(ConnectError::Other { .. })));
    }

    /// Not by connecting: nothing is forbidden to root.
    #[test]
    fn missing_permission_is_named() {
        let error = ConnectError::new("/run/a.sock".into(), Errno::ACCESS).to_string();
        assert!(error.starts_with("Access to socket /run/a.sock is denied: run the daemon as"), "{error}");
    }

    #[test]
    fn what_cannot_become_right_is_refused_at_once() {
        let (directory, path) = place();
        fs::write(&path, "precious").unwrap();
        let error = open(&path).unwrap_err().to_string();
        assert!(error.contains("a.sock is a regular file, not a socket: choose"), "{error}");
        let error = open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("is a directory"), "{error}");
        let long = directory.path().join("x".repeat(MAX_PATH));
        assert!(matches!(open(&long), Err(SocketError::PathTooLong { .. })));
        assert!(matches!(open(Path::new("/")), Err(SocketError::NoFileName { .. })));
        // A link to a socket is as good as the socket.
        let link = directory.path().join("link");
        fs::remove_file(&path).unwrap();
        let _listener = UnixListener::bind(&path).unwrap();
        symlink(&path, &link).unwrap();
        target(&link).connect().unwrap();
    }
}
