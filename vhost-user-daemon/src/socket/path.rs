//! A listening socket at a path of the file system.
//!
//! # Theory of operation
//!
//! A UNIX socket outlives the process that made it, and nothing keeps two processes from fighting over one path: the
//! second one cannot bind, unless it removes the file first, and then the first one listens where nobody can reach
//! it. So a daemon locks `PATH.lock` (flock(2)) for as long as it lives, and only the holder of the lock may remove
//! or make the socket. The kernel drops the lock when a daemon is killed, however that happens; the files that it
//! leaves behind are taken over by the next one.
//!
//! Programs that do not know of the lock (QEMU, another implementation of this daemon) are noticed by connecting to
//! the socket: only if that is refused does nobody listen. A daemon of ours is never disturbed that way, because the
//! lock is tried first.
//!
//! Nobody can connect until `listen` is called, which happens when owner and mode are as they shall be. The mode is
//! set on the socket before it is bound, which Linux uses for the file, rather than by the umask, which belongs to
//! the whole process.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::unistd::Group;
use rustix::fs::{self, AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::keeper::Link;
use super::lock::{FileId, Lock};
use super::{Listener, SocketError};

/// Bytes that fit into `sun_path` of unix(7) beside its terminating NUL. Linux can do without the NUL, but many
/// front ends cannot.
pub(super) const MAX_PATH: usize = 107;

/// Front ends that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Creates a socket at `path` and listens on it. Its mode is 0700, or 0770 with `group` (a name or a number).
pub(super) fn listen(path: &Path, group: Option<&str>) -> Result<Listener, SocketError> {
    let group = group.map(|name| find_group(name).map(|gid| (name, gid))).transpose()?;
    listen_with(path, Mode::RWXU, group)
}

/// Creates a socket at `path`, and listens on it, for the own user alone: its mode is 0600.
pub(super) fn listen_privately(path: &Path) -> Result<Listener, SocketError> {
    listen_with(path, Mode::RUSR | Mode::WUSR, None)
}

fn listen_with(path: &Path, mode: Mode, group: Option<(&str, Gid)>) -> Result<Listener, SocketError> {
    let mut claim = Claim::new(path)?;
    claim.remove_stale()?;
    let listener = claim.bind(mode, group)?;
    Ok(Listener { claim: Some(claim), listener })
}

fn find_group(group: &str) -> Result<Gid, SocketError> {
    match group.parse() {
        // chown(2) takes this number for "leave it as it is".
        Ok(u32::MAX) => return Err(SocketError::NoGroup { group: group.into() }),
        Ok(number) => return Ok(Gid::from_raw(number)),
        Err(_) => (),
    }
    match Group::from_name(group) {
        Ok(Some(found)) => Ok(Gid::from_raw(found.gid.as_raw())),
        Ok(None) => Err(SocketError::NoGroup { group: group.into() }),
        Err(error) => Err(SocketError::GroupLookup { group: group.into(), source: error.into() }),
    }
}

/// The right to a socket path: holds the lock, and removes in the end what it made.
#[derive(Debug)]
pub(super) struct Claim {
    place: Place,
    path: PathBuf,
    name: OsString,
    lock: Lock,
    /// The socket, once it is made.
    socket: Option<FileId>,
}

/// From where the files are removed.
#[derive(Debug)]
enum Place {
    /// The directory, reachable whatever happens to its path.
    Directory(OwnedFd),
    /// It cannot be reached, and another process sees to it.
    Kept(Link),
}

impl Claim {
    /// Locks `path`.
    fn new(path: &Path) -> Result<Self, SocketError> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(SocketError::NoFileName { path: path.into() });
        };
        if path.as_os_str().len() > MAX_PATH {
            return Err(SocketError::PathTooLong { path: path.into() });
        }
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = fs::open(parent, flags, Mode::empty()).map_err(|error| match error {
            Errno::NOENT => SocketError::NoDirectory { directory: parent.into() },
            error => SocketError::Directory { directory: parent.into(), source: error.into() },
        })?;
        let lock = Lock::acquire(&directory, path, name)?;
        Ok(Self {
            place: Place::Directory(directory),
            path: path.into(),
            name: name.into(),
            lock,
            socket: None,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn directory(&self) -> Option<BorrowedFd<'_>> {
        match &self.place {
            Place::Directory(directory) => Some(directory.as_fd()),
            Place::Kept(_) => None,
        }
    }

    /// The directory, which is there until the socket is kept.
    fn open_directory(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.directory().ok_or(Errno::BADF)
    }

    /// What stands at the path.
    fn stat(&self) -> Result<Stat, Errno> {
        fs::statat(self.open_directory()?, &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Leaves the removal to a keeper, and lets go of the directory.
    pub(super) fn keep_by(&mut self, link: Link) {
        self.place = Place::Kept(link);
    }

    /// Clears the path of a socket on which nobody listens.
    fn remove_stale(&self) -> Result<(), SocketError> {
        let path = || self.path.clone();
        let stat = match self.stat() {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => {
                return Err(SocketError::Probe { path: path(), source: error.into() });
            }
        };
        let file_type = FileType::from_raw_mode(stat.st_mode);
        if file_type != FileType::Socket {
            return Err(SocketError::Occupied { path: path(), kind: describe(file_type) });
        }
        match self.probe() {
            Err(Errno::CONNREFUSED) => (),
            Err(Errno::NOENT) => return Ok(()),
            // EAGAIN: its backlog is full. EPROTOTYPE: it is alive, but not a stream socket.
            Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
                return Err(SocketError::InUse { path: path(), user: "another program".into() });
            }
            Err(error) => {
                return Err(SocketError::Probe { path: path(), source: error.into() });
            }
        }
        log::info!("Removing socket {}, which a daemon that was killed left behind", self.path.display());
        match self.open_directory().and_then(|fd| fs::unlinkat(fd, &self.name, AtFlags::empty())) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(SocketError::RemoveStale { path: path(), source: error.into() }),
        }
    }

    /// Connects to the socket at the path and hangs up.
    fn probe(&self) -> Result<(), Errno> {
        let socket = new_socket(SocketFlags::NONBLOCK)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(&self.path)?)
    }

    /// Makes the socket and listens on it.
    fn bind(&mut self, mode: Mode, group: Option<(&str, Gid)>) -> Result<UnixListener, SocketError> {
        let socket = self.create(mode).map_err(|error| self.cannot_listen(error))?;
        if let Some((name, gid)) = group {
            self.open_to_group(gid).map_err(|error| SocketError::Group {
                path: self.path.clone(),
                group: name.into(),
                source: error.into(),
            })?;
        }
        rustix::net::listen(&socket, BACKLOG).map_err(|error| self.cannot_listen(error))?;
        Ok(UnixListener::from(socket))
    }

    fn cannot_listen(&self, error: Errno) -> SocketError {
        SocketError::Listen { path: self.path.clone(), source: error.into() }
    }

    fn create(&mut self, mode: Mode) -> Result<OwnedFd, Errno> {
        let socket = new_socket(SocketFlags::empty())?;
        fs::fchmod(&socket, mode)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&self.path)?)?;
        self.socket = Some(self.stat()?.into());
        Ok(socket)
    }

    /// Lets a group connect to the socket.
    ///
    /// Goes through a descriptor that is known to be the socket's: in a directory that others can write to, the name
    /// may have become a link to a file of which they want the owner and mode changed.
    fn open_to_group(&self, group: Gid) -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(self.open_directory()?, &self.name, flags, Mode::empty())?;
        if self.socket != Some(fs::fstat(&file)?.into()) {
            return Err(Errno::STALE);
        }
        fs::chownat(&file, "", None, Some(group), AtFlags::EMPTY_PATH)?;
        // An O_PATH descriptor cannot be passed to fchmod(2).
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        fs::chmodat(CWD, link, Mode::RWXU | Mode::RWXG, AtFlags::empty())
    }

    /// Removes what was made, as far as it is still there.
    pub(super) fn remove_files(&self) {
        match &self.place {
            Place::Directory(directory) => {
                if let Some(socket) = self.socket {
                    self.remove(directory, &self.name, socket);
                }
                // Last, and before the descriptor is closed: the lock covers every change of the directory.
                self.remove(directory, self.lock.name(), self.lock.id());
            }
            Place::Kept(link) => link.remove(),
        }
    }

    /// Removes a file from the directory if it still is the one that is meant.
    fn remove(&self, directory: &OwnedFd, name: &OsStr, id: FileId) {
        let removed = fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).and_then(|stat| {
            if id == stat.into() { fs::unlinkat(directory, name, AtFlags::empty()) } else { Ok(()) }
        });
        // Management software such as libvirt removes the socket itself.
        if let Err(error) = removed
            && error != Errno::NOENT
        {
            let error = io::Error::from(error);
            log::warn!("Cannot remove {}: {error}", self.path.with_file_name(name).display());
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.remove_files();
    }
}

pub(super) fn new_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags | SocketFlags::CLOEXEC, None)
}

pub(super) fn describe(file_type: FileType) -> &'static str {
    match file_type {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "named pipe",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        _ => "file of unknown type",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::process::Command;
    use std::{env, process, thread};
    use tempfile::TempDir;

    fn place() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        (directory, path)
    }

    /// Makes the socket of a daemon that was killed.
    ///
    /// It never listened: closing a listening one has no effect as long as another test is starting a child process,
    /// which shares it for a moment.
    fn leave_socket(path: &Path) {
        let socket = new_socket(SocketFlags::empty()).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    }

    #[track_caller]
    fn assert_empty(directory: &TempDir) {
        let left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_socket_works_and_leaves_nothing_behind() {
        let (directory, path) = place();
        let listener = listen(&path, None).unwrap();
        assert_eq!(listener.path(), Some(&*path));
        assert!(listener.directory().is_some());
        assert_eq!(mode(&path), 0o700);
        assert_eq!(mode(&directory.path().join("a.sock.lock")), 0o600);
        let _front_end = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert_empty(&directory);
    }

    #[test]
    fn a_private_socket_is_for_its_user() {
        let (directory, path) = place();
        let listener = listen_privately(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert_empty(&directory);
    }

    #[test]
    fn a_group_gets_access() {
        let (directory, path) = place();
        // Every user may give a file to a group of their own.
        let gid = rustix::process::getegid();
        let listener = listen(&path, Some(&gid.as_raw().to_string())).unwrap();
        assert_eq!(mode(&path), 0o770);
        assert_eq!(fs::metadata(&path).unwrap().gid(), gid.as_raw());
        drop(listener);
        if let Some(group) = Group::from_gid(gid.as_raw().into()).unwrap() {
            drop(listen(&path, Some(&group.name)).unwrap());
        }
        for nobody in ["no-such-group", "4294967295", "-1", ""] {
            let error = listen(&path, Some(nobody)).unwrap_err();
            assert!(matches!(error, SocketError::NoGroup { .. }), "{error}");
        }
        assert_empty(&directory);
    }

    #[test]
    fn two_daemons_do_not_share_a_path() {
        let (directory, path) = place();
        let first = listen(&path, None).unwrap();
        let error = listen(&path, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "Socket {} is in use by another daemon (process {}): stop that or choose another path",
                path.display(),
                process::id()
            )
        );
        // The first one was not even asked.
        first.set_nonblocking(true).unwrap();
        assert_eq!(first.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        UnixStream::connect(&path).unwrap();
        drop(first);
        drop(listen(&path, None).unwrap());
        assert_empty(&directory);
    }

    #[test]
    fn what_a_killed_daemon_left_is_taken_over() {
        let (directory, path) = place();
        leave_socket(&path);
        fs::write(directory.path().join("a.sock.lock"), "12345678901\n").unwrap();
        let listener = listen(&path, None).unwrap();
        let lock = fs::read_to_string(directory.path().join("a.sock.lock")).unwrap();
        assert_eq!(lock, format!("{}\n", process::id()));
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert_empty(&directory);
    }

    #[test]
    fn the_socket_of_another_program_is_respected() {
        let (_directory, path) = place();
        let other = UnixListener::bind(&path).unwrap();
        let error = listen(&path, None).unwrap_err();
        assert!(error.to_string().contains("in use by another program"), "{error}");
        other.accept().unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(!path.with_file_name("a.sock.lock").exists());
        drop(other);

        fs::remove_file(&path).unwrap();
        let _datagram = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(listen(&path, None), Err(SocketError::InUse { .. })));
    }

    #[test]
    fn a_program_too_busy_to_answer_still_has_its_socket() {
        let (_directory, path) = place();
        let socket = new_socket(SocketFlags::empty()).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        assert!(matches!(listen(&path, None), Err(SocketError::InUse { .. })));
    }

    #[test]
    fn other_files_are_not_touched() {
        let (directory, path) = place();
        fs::write(&path, "precious").unwrap();
        let error = listen(&path, None).unwrap_err().to_string();
        assert!(error.contains("a.sock is a regular file, not a socket: choose"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");

        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = listen(&path, None).unwrap_err().to_string();
        assert!(error.contains("is a directory"), "{error}");

        fs::remove_dir(&path).unwrap();
        symlink("elsewhere.sock", &path).unwrap();
        let error = listen(&path, None).unwrap_err().to_string();
        assert!(error.contains("is a symbolic link"), "{error}");

        fs::remove_file(&path).unwrap();
        assert_empty(&directory);
    }

    #[test]
    fn bad_paths_are_named() {
        let (directory, path) = place();
        let long = directory.path().join("x".repeat(MAX_PATH));
        assert!(matches!(listen(&long, None), Err(SocketError::PathTooLong { .. })));

        let error = listen(&directory.path().join("gone/a.sock"), None).unwrap_err().to_string();
        assert!(error.contains("/gone does not exist: create it"), "{error}");

        fs::write(&path, "").unwrap();
        let error = listen(&path.join("b.sock"), None).unwrap_err();
        assert!(matches!(error, SocketError::Directory { .. }), "{error}");

        for path in ["/", "..", "/tmp/.."] {
            assert!(matches!(listen(Path::new(path), None), Err(SocketError::NoFileName { .. })), "{path}");
        }
    }

    #[test]
    fn the_longest_path_works() {
        let (directory, _) = place();
        let rest = MAX_PATH - directory.path().as_os_str().len() - 1;
        let path = directory.path().join("x".repeat(rest));
        let listener = listen(&path, None).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert_empty(&directory);
    }

    #[test]
    fn only_our_own_files_are_removed() {
        let (directory, path) = place();
        let listener = listen(&path, None).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        let lock = directory.path().join("a.sock.lock");
        fs::remove_file(&lock).unwrap();
        fs::write(&lock, "").unwrap();
        drop(listener);
        assert!(fs::metadata(&path).unwrap().file_type().is_socket());
        assert!(lock.exists());
    }

    #[test]
    fn files_that_are_gone_already_are_no_trouble() {
        let (directory, path) = place();
        let listener = listen(&path, None).unwrap();
        fs::remove_file(&path).unwrap();
        fs::remove_file(directory.path().join("a.sock.lock")).unwrap();
        drop(listener);
        assert_empty(&directory);
    }

    #[test]
    fn a_directory_that_moves_is_cleaned_up() {
        let (directory, _) = place();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        fs::create_dir(&old).unwrap();
        let listener = listen(&old.join("a.sock"), None).unwrap();
        fs::rename(&old, &new).unwrap();
        drop(listener);
        assert_eq!(fs::read_dir(&new).unwrap().count(), 0);
    }

    #[test]
    fn one_of_many_gets_the_path_and_none_is_left_without() {
        let (directory, path) = place();
        let inside = std::sync::atomic::AtomicU32::new(0);
        let served = std::sync::atomic::AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        match listen(&path, None) {
                            Ok(listener) => {
                                use std::sync::atomic::Ordering::SeqCst;
                                assert_eq!(inside.fetch_add(1, SeqCst), 0);
                                UnixStream::connect(&path).unwrap();
                                listener.accept().unwrap();
                                served.fetch_add(1, SeqCst);
                                inside.fetch_sub(1, SeqCst);
                            }
                            Err(SocketError::InUse { .. }) => thread::yield_now(),
                            Err(error) => panic!("{error:?}"),
                        }
                    }
                });
            }
        });
        assert_ne!(served.into_inner(), 0);
        assert_empty(&directory);
    }

    /// Not a test of its own: runs in a child process of the test below, which sets its umask.
    #[test]
    #[ignore = "child of another test"]
    fn child() {
        let (_directory, path) = place();
        let group = rustix::process::getegid().as_raw().to_string();
        let private = listen(&path, None).map(|_listener| mode(&path)).unwrap();
        let shared = listen(&path, Some(&group)).map(|_listener| mode(&path)).unwrap();
        eprintln!("modes {private:o} {shared:o}");
    }

    #[test]
    fn the_umask_of_the_caller_does_not_matter() {
        for umask in ["000", "022", "077"] {
            let output = Command::new("sh")
                .args(["-c", &format!(r#"umask {umask}; exec "$0" "$@""#)])
                .arg(env::current_exe().unwrap())
                .args(["--exact", "socket::path::tests::child", "--ignored", "--nocapture"])
                .output()
                .unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(stderr.contains("modes 700 770"), "{umask}: {stderr}");
        }
    }
}
