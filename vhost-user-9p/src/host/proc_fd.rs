//! /proc/self/fd: the way from an `O_PATH` descriptor, which only names an inode, to calls that want more.
//!
//! The links in it lead straight to the inode that a descriptor stands for, whatever became of its name. The number in
//! the path is always one of our own descriptors; nothing that a guest chose gets here.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, PROC_SUPER_MAGIC, chmodat, fstatfs, openat};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::sys::{self, Feature};

/// The directory /proc/self/fd of this process.
#[derive(Debug)]
pub struct ProcFd(OwnedFd);

impl From<OwnedFd> for ProcFd {
    /// Takes a descriptor of /proc/self/fd that was opened before /proc went out of reach.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for ProcFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl ProcFd {
    /// Opens /proc/self/fd. `ENOTDIR` or `ENOENT`: /proc is not mounted, or something else is mounted there.
    pub fn open() -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, c"/proc/self/fd", flags, Mode::empty())?;
        if fstatfs(&fd)?.f_type != PROC_SUPER_MAGIC {
            return Err(Errno::NOENT);
        }
        Ok(Self(fd))
    }

    /// The name of `file` in this directory.
    pub fn name(file: BorrowedFd<'_>) -> DecInt {
        DecInt::from_fd(file)
    }

    /// Opens the inode that `file` stands for once more, with `flags` (close-on-exec is added).
    ///
    /// It may have been unlinked or renamed. `ELOOP` for a symbolic link. The caller makes sure that it is no FIFO and no
    /// device: opening one does things or blocks.
    pub fn reopen(&self, file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        // The link in /proc is what has to be followed.
        let flags = flags.difference(OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL) | OFlags::CLOEXEC;
        openat(&self.0, Self::name(file).as_c_str(), flags, Mode::empty())
    }

    /// Sets the permissions of the inode that `file` stands for. `EOPNOTSUPP` for a symbolic link.
    pub fn chmod(&self, file: BorrowedFd<'_>, mode: Mode) -> Result<(), Errno> {
        /// Linux 6.6.
        static FCHMODAT2: Feature = Feature::new();

        FCHMODAT2.or_else(
            || sys::fchmodat2_empty_path(file, mode),
            || chmodat(&self.0, Self::name(file).as_c_str(), mode, AtFlags::empty()),
        )
    }
}

/// The path of `file` below /proc/self/fd, for calls that take no directory. It holds a terminating NUL, and needs no
/// allocation.
pub(super) struct AbsolutePath {
    bytes: [u8; Self::PREFIX.len() + DIGITS + 1],
}

/// Most digits of a descriptor.
const DIGITS: usize = 10;

impl AbsolutePath {
    const PREFIX: &'static [u8] = b"/proc/self/fd/";

    pub(super) fn new(file: BorrowedFd<'_>) -> Self {
        let mut bytes = [0; Self::PREFIX.len() + DIGITS + 1];
        let (prefix, number) = bytes.split_at_mut(Self::PREFIX.len());
        prefix.copy_from_slice(Self::PREFIX);
        let decimal = DecInt::new(file.as_raw_fd());
        let digits = decimal.as_bytes();
        number[..digits.len()].copy_from_slice(digits);
        Self { bytes }
    }

    pub(super) fn as_c_str(&self) -> &std::ffi::CStr {
        std::ffi::CStr::from_bytes_until_nul(&self.bytes).expect("the last byte is never written")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{fstat, symlinkat};
    use std::fs::{self, File};
    use std::io::{Read, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn o_path(path: &std::path::Path) -> OwnedFd {
        openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn an_unlinked_file_is_opened_again() {
        let proc = ProcFd::open().unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"content").unwrap();
        let inode = o_path(file.path());
        drop(file);
        let again = proc.reopen(inode.as_fd(), OFlags::RDWR | OFlags::NOFOLLOW).unwrap();
        let flags = rustix::io::fcntl_getfd(&again).unwrap();
        assert_eq!(flags, rustix::io::FdFlags::CLOEXEC);
        let mut content = String::new();
        File::from(again).read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
    }

    #[test]
    fn a_link_is_not_opened() {
        let proc = ProcFd::open().unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("target"), "x").unwrap();
        symlinkat("target", CWD, dir.path().join("link")).unwrap();
        let link = o_path(&dir.path().join("link"));
        assert_eq!(proc.reopen(link.as_fd(), OFlags::RDONLY).unwrap_err(), Errno::LOOP);
        assert_eq!(proc.chmod(link.as_fd(), Mode::from(0o600)).unwrap_err(), Errno::OPNOTSUPP);
    }

    #[test]
    fn permissions_are_those_of_the_inode() {
        let proc = ProcFd::open().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let inode = o_path(file.path());
        proc.chmod(inode.as_fd(), Mode::from(0o4711)).unwrap();
        assert_eq!(file.path().metadata().unwrap().permissions().mode() & 0o7777, 0o4711);
        // As a kernel before Linux 6.6 does it.
        chmodat(&proc, ProcFd::name(inode.as_fd()).as_c_str(), Mode::from(0o640), AtFlags::empty()).unwrap();
        assert_eq!(file.path().metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    }

    #[test]
    fn the_absolute_path_leads_to_the_inode() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let inode = o_path(file.path());
        let path = AbsolutePath::new(inode.as_fd());
        let found = fs::metadata(path.as_c_str().to_str().unwrap()).unwrap();
        assert_eq!(found.ino(), fstat(&inode).unwrap().st_ino);
    }
}
