//! A directory in which the control sockets of balloons come and go.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

/// What a control socket's name ends in. The first counts if there are both: then the other is the one for the front
/// end, where a manager has no business.
const ENDINGS: [&str; 2] = [".control", ".sock"];

/// A directory of control sockets, which is watched.
#[derive(Debug)]
pub struct DirectoryWatch {
    path: PathBuf,
    inotify: OwnedFd,
}

impl DirectoryWatch {
    /// Watches `path`, which has to exist.
    pub fn new(path: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let changes = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&inotify, path, changes)?;
        Ok(Self { path: path.to_owned(), inotify })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Forgets the changes until now. What they were does not matter: the directory is read as a whole, for changes
    /// can be lost.
    pub fn take_changes(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(&self.inotify, &mut buffer) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The control sockets that are there, by the names of their guests.
    pub fn sockets(&self) -> io::Result<BTreeMap<String, PathBuf>> {
        let mut sockets = BTreeMap::new();
        for ending in ENDINGS {
            for entry in fs::read_dir(&self.path)? {
                let entry = entry?;
                // Gone again, or nobody could spell it.
                let (Ok(file_type), Ok(file_name)) = (entry.file_type(), entry.file_name().into_string())
                else {
                    continue;
                };
                if let Some(name) = file_name.strip_suffix(ending).filter(|name| !name.is_empty())
                    && file_type.is_socket()
                {
                    sockets.entry(name.to_owned()).or_insert_with(|| entry.path());
                }
            }
        }
        Ok(sockets)
    }
}

impl AsFd for DirectoryWatch {
    /// Readable when something has changed, until [`take_changes`](Self::take_changes).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

/// What the guest is called whose control socket is at `path`.
pub fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let stem = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)).filter(|stem| !stem.is_empty());
    stem.unwrap_or(&name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::os::unix::net::UnixListener;

    fn changed(watch: &DirectoryWatch) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn sockets_come_and_go() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let watch = DirectoryWatch::new(directory.path()).unwrap();
        assert!(watch.sockets().unwrap().is_empty() && !changed(&watch));
        for name in ["a.sock", "b.control", "b.sock", "c.other", ".sock"] {
            UnixListener::bind(path(name)).unwrap();
        }
        fs::write(path("file.sock"), "").unwrap();
        assert!(changed(&watch));
        watch.take_changes().unwrap();
        assert!(!changed(&watch));
        let expected = [("a".to_owned(), path("a.sock")), ("b".to_owned(), path("b.control"))];
        assert_eq!(watch.sockets().unwrap(), BTreeMap::from(expected));
        fs::remove_file(path("b.control")).unwrap();
        fs::rename(path("a.sock"), path("z.sock")).unwrap();
        assert!(changed(&watch));
        let expected = [("b".to_owned(), path("b.sock")), ("z".to_owned(), path("z.sock"))];
        assert_eq!(watch.sockets().unwrap(), BTreeMap::from(expected));
        drop(directory);
        assert!(changed(&watch) && watch.sockets().is_err());
    }

    #[test]
    fn only_directories_are_watched() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(DirectoryWatch::new(file.path()).unwrap_err().kind(), io::ErrorKind::NotADirectory);
        assert!(DirectoryWatch::new(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn guests_are_called_as_their_sockets() {
        let names = ["/run/a.sock", "b.control", "/x/c", ".sock"].map(|path| name_of(Path::new(path)));
        assert_eq!(names, ["a", "b", "c", ".sock"]);
    }
}
