//! Opening files, and reading and writing them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fstat};
use rustix::io::Errno;

use super::lock::{Holdings, Kind};
use super::node::Node;
use crate::protocol::open_flag;

/// A regular file that is open.
#[derive(Debug)]
pub struct OpenFile {
    file: Arc<OwnedFd>,
    readable: bool,
    writable: bool,
    direct: bool,
    locks: Holdings,
}

/// What became of a read that was not to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nowait {
    /// As many bytes were read: all that were asked for, or all until the end of the file.
    Done(usize),
    /// It would have to wait.
    WouldWait,
    /// The file system does not tell.
    Unknown,
}

impl OpenFile {
    pub(super) fn new(file: OwnedFd, flags: OFlags) -> Self {
        let mode = flags & OFlags::ACCMODE;
        Self {
            file: Arc::new(file),
            readable: mode != OFlags::WRONLY,
            writable: mode != OFlags::RDONLY,
            direct: flags.contains(OFlags::DIRECT),
            locks: Holdings::default(),
        }
    }

    /// The file, open as the client asked.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Those who hold locks through this file.
    pub fn locks(&self) -> &Holdings {
        &self.locks
    }

    /// Whether reads have to meet the file system's alignment.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Fails unless it is open for reading: `EBADF`.
    pub fn check_readable(&self) -> Result<(), Errno> {
        if self.readable { Ok(()) } else { Err(Errno::BADF) }
    }

    /// Fails unless it is open for writing: `EBADF`.
    pub fn check_writable(&self) -> Result<(), Errno> {
        if self.writable { Ok(()) } else { Err(Errno::BADF) }
    }

    /// Reads what does not have to be waited for. `read` is given the flags of preadv2(2); it reads `len` bytes from
    /// `offset` on.
    pub fn read_nowait(
        &self,
        offset: u64,
        len: usize,
        read: impl FnOnce(i32) -> Result<usize, Errno>,
    ) -> Result<Nowait, Errno> {
        match read(libc::RWF_NOWAIT) {
            // Less than all is the end of the file, or of what is cached; nothing is the end of the file.
            Ok(done) if done == len || done == 0 || self.ends_at(offset.saturating_add(done as u64)) => {
                Ok(Nowait::Done(done))
            }
            Ok(_) | Err(Errno::AGAIN) => Ok(Nowait::WouldWait),
            Err(Errno::OPNOTSUPP) => Ok(Nowait::Unknown),
            Err(error) => Err(error),
        }
    }

    /// Whether the file has nothing from `offset` on. Asking is much cheaper than handing the rest over, and the last read
    /// of most files comes to it.
    fn ends_at(&self, offset: u64) -> bool {
        fstat(&self.file).is_ok_and(|stat| u64::try_from(stat.st_size).is_ok_and(|size| size <= offset))
    }
}

/// The host's flags for those of a Tlopen or Tlcreate.
///
/// What the guest's kernel does itself is left out (`O_NOCTTY`, `O_LARGEFILE`, `FASYNC`), and so is `O_NONBLOCK`, which
/// means nothing on files. `direct`: `O_DIRECT` is passed on.
pub fn host_flags(flags: u32, direct: bool) -> OFlags {
    let mut host = match flags & open_flag::ACCESS_MODE {
        0 => OFlags::RDONLY,
        open_flag::WRITE_ONLY => OFlags::WRONLY,
        _ => OFlags::RDWR,
    };
    for (bit, flag) in [
        (open_flag::TRUNCATE, OFlags::TRUNC),
        (open_flag::APPEND, OFlags::APPEND),
        (open_flag::DSYNC, OFlags::DSYNC),
        (open_flag::SYNC, OFlags::SYNC),
        (open_flag::NOATIME, OFlags::NOATIME),
    ] {
        if flags & bit == bit {
            host |= flag;
        }
    }
    // The bit of __O_SYNC without that of O_DSYNC means the same.
    if flags & open_flag::SYNC != 0 {
        host |= OFlags::SYNC;
    }
    if direct && flags & open_flag::DIRECT != 0 {
        host |= OFlags::DIRECT;
    }
    host
}

/// Whether a file opened with these flags may be changed through them.
pub fn is_write(flags: u32) -> bool {
    flags & open_flag::ACCESS_MODE != 0 || flags & open_flag::TRUNCATE != 0
}

impl Node {
    /// Opens the file by what it is, not by a name. Only regular files and directories have a content here: what is
    /// behind FIFOs, sockets and device nodes belongs to whoever opens them, and that is the guest: `ENXIO`. A symbolic
    /// link is not followed: `ELOOP`.
    pub fn open(self: &Arc<Self>, flags: OFlags) -> Result<OwnedFd, Errno> {
        for kind in [self.kind(), self.host_kind()] {
            match kind {
                libc::S_IFREG | libc::S_IFDIR => {}
                libc::S_IFLNK => return Err(Errno::LOOP),
                _ => return Err(Errno::NXIO),
            }
        }
        let proc = self.share().host().proc_fd();
        let file = self.file()?;
        // A file of a host that is owned by somebody else cannot be opened with O_NOATIME, which is only a wish.
        let open = |flags| {
            let descriptors = self.share().host().descriptors();
            descriptors.open(|| proc.reopen(file.as_fd(), flags | OFlags::NOCTTY))
        };
        match open(flags) {
            Err(Errno::PERM) if flags.contains(OFlags::NOATIME) => open(flags.difference(OFlags::NOATIME)),
            result => result,
        }
    }

    /// Opens a regular file, with the flags of a Tlopen.
    pub fn open_file(self: &Arc<Self>, flags: u32) -> Result<OpenFile, Errno> {
        let flags = host_flags(flags, self.share().host().options().direct_io);
        Ok(OpenFile::new(self.open(flags)?, flags))
    }

    /// Opens the regular file that is open as `file` once more, as a new owner's of locks of which the first is `kind`.
    ///
    /// For reading and writing if it may be written and that is possible, as other kinds may follow. Where it can be
    /// opened in no way that `kind` needs, it is `file` itself; the lock is refused then if that is not open for it.
    pub fn open_for_locks(
        self: &Arc<Self>,
        file: &OpenFile,
        kind: Kind,
        may_write: bool,
    ) -> Result<Arc<OwnedFd>, Errno> {
        // Somebody's lease would be waited for.
        let open = |flags: OFlags| self.open(flags | OFlags::NONBLOCK | OFlags::NOATIME).map(Arc::new);
        let own = || Arc::clone(&file.file);
        if may_write && let Ok(file) = open(OFlags::RDWR) {
            return Ok(file);
        }
        match kind {
            _ if file.readable && file.writable => Ok(own()),
            Kind::Write if !may_write => Err(Errno::BADF),
            Kind::Write => Ok(open(OFlags::WRONLY).unwrap_or_else(|_| own())),
            Kind::Read | Kind::Unlock => Ok(open(OFlags::RDONLY).unwrap_or_else(|_| own())),
        }
    }
}
