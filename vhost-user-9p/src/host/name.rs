//! Names of directory entries: one component, checked before the host sees it.

use rustix::io::Errno;

/// One component of a path. It leads neither up nor further than one step: it is not empty, not `.` or `..`, and has no
/// `/` and no NUL in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a [u8]);

impl<'a> Name<'a> {
    /// The name of an entry that may exist. No entry has a name that is refused: `ENOENT`, or
    /// `ENAMETOOLONG`.
    pub fn lookup(bytes: &'a [u8]) -> Result<Self, Errno> {
        match bytes {
            b"." | b".." => Err(Errno::NOENT),
            _ => Self::plain(bytes).map_err(|error| if error == Errno::INVAL { Errno::NOENT } else { error }),
        }
    }

    /// The name of an entry to be made. `.` and `..` exist everywhere: `EEXIST`.
    pub fn create(bytes: &'a [u8]) -> Result<Self, Errno> {
        match bytes {
            b"." | b".." => Err(Errno::EXIST),
            _ => Self::plain(bytes),
        }
    }

    /// The name of an entry to be removed or renamed. `.` and `..` stay: `EINVAL`.
    pub fn remove(bytes: &'a [u8]) -> Result<Self, Errno> {
        match bytes {
            b"." | b".." => Err(Errno::INVAL),
            _ => Self::plain(bytes),
        }
    }

    fn plain(bytes: &'a [u8]) -> Result<Self, Errno> {
        match bytes {
            b"" => Err(Errno::NOENT),
            _ if bytes.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(Errno::INVAL),
            // What every Linux file system refuses, and what fits the system calls' buffers.
            _ if bytes.len() > 255 => Err(Errno::NAMETOOLONG),
            _ => Ok(Self(bytes)),
        }
    }

    /// The bytes, in no encoding.
    pub fn as_bytes(self) -> &'a [u8] {
        self.0
    }
}
