//! Extended attributes of any inode (xattr(7)): symbolic links, devices and unlinked files too.
//!
//! The calls take a [`File`]. What is cheapest on an open file (fgetxattr, 0.5 us) is refused on an `O_PATH` descriptor,
//! also by getxattrat with `AT_EMPTY_PATH`; there the way leads through /proc/self/fd (getxattrat, 1.9 us; before Linux
//! 6.13 an absolute path, 2.9 us). So whoever has the file open anyway says so.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{
    XattrFlags, fgetxattr, fgetxattr_query, flistxattr, flistxattr_query, fremovexattr, fsetxattr, getxattr,
    getxattr_query, listxattr, listxattr_query, removexattr, setxattr,
};
use rustix::io::Errno;

use super::proc_fd::{AbsolutePath, ProcFd};
use super::sys::{self, Feature};

mod policy;

pub use policy::{Access, PolicyError, XattrPolicy};

/// Longest name of an attribute (`XATTR_NAME_MAX`).
pub const MAX_NAME: usize = 255;
/// Largest value of an attribute (`XATTR_SIZE_MAX`) and largest list of names (`XATTR_LIST_MAX`).
pub const MAX_SIZE: usize = 65_536;

/// Linux 6.13. There is no fifth call, so one flag stands for the four.
static XATTRAT: Feature = Feature::new();

/// The inode whose attributes are meant.
#[derive(Clone, Copy, Debug)]
pub enum File<'a> {
    /// An open file.
    Open(BorrowedFd<'a>),
    /// A descriptor that may be `O_PATH`.
    Path(&'a ProcFd, BorrowedFd<'a>),
}

/// A name as the kernel takes it.
struct Name([u8; MAX_NAME + 1]);

impl Name {
    /// `ERANGE`: empty or too long, as the kernel has it. `EINVAL`: a NUL in it.
    fn new(name: &[u8]) -> Result<Self, Errno> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Errno::RANGE);
        }
        if name.contains(&0) {
            return Err(Errno::INVAL);
        }
        let mut bytes = [0; MAX_NAME + 1];
        bytes[..name.len()].copy_from_slice(name);
        Ok(Self(bytes))
    }

    fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).expect("the last byte is never written")
    }
}

impl File<'_> {
    /// Reads the attribute `name` into `buffer` and returns its size; with an empty buffer only that.
    ///
    /// `ENODATA`: there is none. `ERANGE`: the buffer is too small. `EOPNOTSUPP`: the file system has no such
    /// attributes.
    pub fn get(&self, name: &[u8], buffer: &mut [u8]) -> Result<usize, Errno> {
        let name = Name::new(name)?;
        self.get_named(name.as_c_str(), buffer)
    }

    /// [`File::get`] of a name that is known to be one.
    pub(super) fn get_named(&self, name: &CStr, buffer: &mut [u8]) -> Result<usize, Errno> {
        match *self {
            Self::Open(file) if buffer.is_empty() => fgetxattr_query(file, name),
            Self::Open(file) => fgetxattr(file, name, buffer),
            Self::Path(proc, file) => {
                // Both need the buffer, and only one of them runs.
                let buffer = std::cell::Cell::new(buffer);
                XATTRAT.or_else(
                    || {
                        let slice = buffer.take();
                        let result =
                            sys::getxattrat(proc.as_fd(), ProcFd::name(file).as_c_str(), name, slice);
                        buffer.set(slice);
                        result
                    },
                    || get_by_path(file, name, buffer.take()),
                )
            }
        }
    }

    /// The value of the attribute `name`. Errors as for [`File::get`].
    pub fn get_vec(&self, name: &[u8]) -> Result<Vec<u8>, Errno> {
        let name = Name::new(name)?;
        read_all(|buffer| self.get_named(name.as_c_str(), buffer))
    }

    /// The names of the attributes, each followed by a NUL.
    pub fn list(&self) -> Result<Vec<u8>, Errno> {
        read_all(|buffer| match *self {
            Self::Open(file) if buffer.is_empty() => flistxattr_query(file),
            Self::Open(file) => flistxattr(file, buffer),
            Self::Path(proc, file) => {
                let buffer = std::cell::Cell::new(buffer);
                XATTRAT.or_else(
                    || {
                        let slice = buffer.take();
                        let result = sys::listxattrat(proc.as_fd(), ProcFd::name(file).as_c_str(), slice);
                        buffer.set(slice);
                        result
                    },
                    || list_by_path(file, buffer.take()),
                )
            }
        })
    }

    /// Sets the attribute `name`; an empty value is a value.
    ///
    /// `EEXIST` and `ENODATA`: `flags` ask for a new or an existing one. `E2BIG`, `ENOSPC`, `EDQUOT`: too large.
    pub fn set(&self, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<(), Errno> {
        let name = Name::new(name)?;
        let name = name.as_c_str();
        match *self {
            Self::Open(file) => fsetxattr(file, name, value, flags),
            Self::Path(proc, file) => XATTRAT.or_else(
                || sys::setxattrat(proc.as_fd(), ProcFd::name(file).as_c_str(), name, value, flags),
                || setxattr(AbsolutePath::new(file).as_c_str(), name, value, flags),
            ),
        }
    }

    /// Removes the attribute `name`. `ENODATA`: there is none.
    pub fn remove(&self, name: &[u8]) -> Result<(), Errno> {
        let name = Name::new(name)?;
        let name = name.as_c_str();
        match *self {
            Self::Open(file) => fremovexattr(file, name),
            Self::Path(proc, file) => XATTRAT.or_else(
                || sys::removexattrat(proc.as_fd(), ProcFd::name(file).as_c_str(), name),
                || removexattr(AbsolutePath::new(file).as_c_str(), name),
            ),
        }
    }
}

/// What [`File::get`] does before Linux 6.13.
fn get_by_path(file: BorrowedFd<'_>, name: &CStr, buffer: &mut [u8]) -> Result<usize, Errno> {
    let path = AbsolutePath::new(file);
    match buffer {
        [] => getxattr_query(path.as_c_str(), name),
        buffer => getxattr(path.as_c_str(), name, buffer),
    }
}

/// What [`File::list`] does before Linux 6.13.
fn list_by_path(file: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    let path = AbsolutePath::new(file);
    match buffer {
        [] => listxattr_query(path.as_c_str()),
        buffer => listxattr(path.as_c_str(), buffer),
    }
}

/// Reads what may change its size meanwhile.
fn read_all(mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    // Nearly all values fit in, and a miss needs no vector.
    let mut small = [0; 256];
    match read(&mut small) {
        Ok(size) => return Ok(small[..size.min(small.len())].to_vec()),
        Err(Errno::RANGE) => {}
        Err(errno) => return Err(errno),
    }
    // One that grows all the time is read with the largest buffer in the end.
    for attempt in 0.. {
        let size = if attempt < 3 { read(&mut [])?.min(MAX_SIZE) } else { MAX_SIZE };
        let mut value = vec![0; size];
        match read(&mut value) {
            // An empty buffer asks for the size, which then is no size of what was read.
            Ok(size) => {
                value.truncate(size.min(value.len()));
                return Ok(value);
            }
            Err(Errno::RANGE) if attempt < 3 => {}
            Err(errno) => return Err(errno),
        }
    }
    unreachable!("the last attempt returns")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, openat, symlinkat};
    use std::os::fd::OwnedFd;
    use std::path::Path;

    fn o_path(path: &Path) -> OwnedFd {
        openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    /// The same on an open file, through /proc by the new calls and by the old ones.
    #[test]
    fn attributes_are_set_read_listed_and_removed() {
        let proc = ProcFd::open().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let inode = o_path(file.path());
        for file in [File::Open(file.as_file().as_fd()), File::Path(&proc, inode.as_fd())] {
            let mut buffer = [0; 16];
            assert_eq!(file.get(b"user.a", &mut buffer), Err(Errno::NODATA));
            assert_eq!(file.remove(b"user.a"), Err(Errno::NODATA));
            assert_eq!(file.set(b"user.a", b"x", XattrFlags::REPLACE), Err(Errno::NODATA));
            file.set(b"user.a", b"value", XattrFlags::CREATE).unwrap();
            assert_eq!(file.set(b"user.a", b"x", XattrFlags::CREATE), Err(Errno::EXIST));
            assert_eq!(file.get(b"user.a", &mut buffer), Ok(5));
            assert_eq!(&buffer[..5], b"value");
            assert_eq!(file.get(b"user.a", &mut buffer[..2]), Err(Errno::RANGE));
            assert_eq!(file.get(b"user.a", &mut []), Ok(5));
            file.set(b"user.empty", b"", XattrFlags::empty()).unwrap();
            assert_eq!(file.get_vec(b"user.empty"), Ok(vec![]));
            assert_eq!(file.get_vec(b"user.a"), Ok(b"value".to_vec()));
            let list = file.list().unwrap();
            let names: Vec<_> = list.split(|byte| *byte == 0).collect();
            assert!(names.contains(&&b"user.a"[..]) && names.contains(&&b"user.empty"[..]));
            file.remove(b"user.a").unwrap();
            file.remove(b"user.empty").unwrap();
            assert_eq!(file.get_vec(b"user.a"), Err(Errno::NODATA));
        }
    }

    #[test]
    fn kernels_before_6_13_are_served_by_path() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let inode = o_path(file.path());
        let path = AbsolutePath::new(inode.as_fd());
        setxattr(path.as_c_str(), c"user.a", b"value", XattrFlags::empty()).unwrap();
        assert_eq!(File::Open(file.as_file().as_fd()).get_vec(b"user.a"), Ok(b"value".to_vec()));
        let mut buffer = [0; 16];
        assert_eq!(get_by_path(inode.as_fd(), c"user.a", &mut []), Ok(5));
        assert_eq!(get_by_path(inode.as_fd(), c"user.a", &mut buffer), Ok(5));
        assert_eq!(&buffer[..5], b"value");
        assert_eq!(list_by_path(inode.as_fd(), &mut buffer), list_by_path(inode.as_fd(), &mut []));
        assert!(buffer.starts_with(b"user.a\0"));
        let feature = Feature::new();
        for _ in 0..2 {
            assert_eq!(feature.or_else(|| Err(Errno::NOSYS), || Ok(7)), Ok(7));
        }
        assert_eq!(feature.or_else(|| unreachable!("it is missing"), || Ok(7)), Ok(7));
    }

    #[test]
    fn a_large_value_is_read_whole() {
        let proc = ProcFd::open().unwrap();
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let inode = o_path(file.path());
        let file = File::Path(&proc, inode.as_fd());
        let value: Vec<u8> = (0..20_000_u32).map(|i| i as u8).collect();
        file.set(b"user.large", &value, XattrFlags::empty()).unwrap();
        assert_eq!(file.get_vec(b"user.large"), Ok(value));
    }

    #[test]
    fn what_grows_meanwhile_is_read_whole() {
        let mut calls = 0;
        let value = read_all(|buffer| {
            calls += 1;
            if buffer.is_empty() {
                return Ok(1000 + calls);
            }
            if buffer.len() < MAX_SIZE { Err(Errno::RANGE) } else { Ok(MAX_SIZE - 1) }
        });
        assert_eq!(value.unwrap().len(), MAX_SIZE - 1);
        // Gone between the two calls.
        let mut sizes = [Err(Errno::RANGE), Ok(300), Err(Errno::NODATA)].into_iter();
        assert_eq!(read_all(|_| sizes.next().unwrap()), Err(Errno::NODATA));
        // Empty between them: the size that an empty buffer then is answered with is none of ours.
        let mut sizes = [Err(Errno::RANGE), Ok(0), Ok(300)].into_iter();
        assert_eq!(read_all(|_| sizes.next().unwrap()), Ok(vec![]));
    }

    #[test]
    fn a_link_has_attributes_of_its_own() {
        let proc = ProcFd::open().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        std::fs::write(&target, "x").unwrap();
        symlinkat("target", CWD, dir.path().join("link")).unwrap();
        let target = o_path(&target);
        File::Path(&proc, target.as_fd()).set(b"user.a", b"x", XattrFlags::empty()).unwrap();
        let link = o_path(&dir.path().join("link"));
        let link = File::Path(&proc, link.as_fd());
        // The kernel has no user attributes on links; what counts is that the target's are not seen.
        assert_eq!(link.get_vec(b"user.a"), Err(Errno::NODATA));
        assert_eq!(link.set(b"user.b", b"x", XattrFlags::empty()), Err(Errno::PERM));
        assert!(!link.list().unwrap().starts_with(b"user."));
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let file = File::Open(file.as_fd());
        assert_eq!(file.get_vec(b""), Err(Errno::RANGE));
        assert_eq!(file.get_vec(&[b'a'; MAX_NAME + 1]), Err(Errno::RANGE));
        assert_eq!(file.get_vec(b"user.a\0b"), Err(Errno::INVAL));
        assert_eq!(file.set(b"user.a\0b", b"", XattrFlags::empty()), Err(Errno::INVAL));
        assert_eq!(file.remove(b"user.a\0b"), Err(Errno::INVAL));
    }
}
