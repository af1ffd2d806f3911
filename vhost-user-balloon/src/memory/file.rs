//! The files that a guest's memory lies in: memfds, files on tmpfs or hugetlbfs.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate, fstat, fstatfs};
use rustix::io::Errno;

use super::bits::PAGE;

/// `HUGETLBFS_MAGIC` of the kernel's `magic.h`.
const HUGETLBFS: u64 = 0x9584_58f6;
/// `TMPFS_MAGIC`, also that of memfds.
const TMPFS: u64 = 0x0102_1994;

/// Which file it is: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId(u64, u64);

/// What a file's pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Ordinary pages, which the host finds for the guest whenever it needs them. Of this size: more than 4096 where tmpfs
    /// says that it uses huge pages.
    Ordinary(u64),
    /// Pages of this size out of a pool of which each file reserves what it may need (hugetlbfs). One that is given back
    /// loses its reservation.
    Huge(u64),
}

impl Backing {
    /// Bytes of a page.
    pub fn page_size(self) -> u64 {
        let (Self::Ordinary(size) | Self::Huge(size)) = self;
        size
    }
}

/// An open file with memory of the guest. Clones are the same file.
#[derive(Clone, Debug)]
pub struct MemoryFile {
    file: Arc<File>,
    id: FileId,
    backing: Backing,
}

impl MemoryFile {
    /// Takes a look at `file`.
    pub fn new(file: Arc<File>) -> io::Result<Self> {
        let stat = fstat(&file)?;
        let system = fstatfs(&file)?;
        let backing = match system.f_type as u64 {
            HUGETLBFS => Backing::Huge((system.f_bsize as u64).max(PAGE)),
            // Where it uses huge pages whenever it can, tmpfs says so.
            TMPFS => Backing::Ordinary((stat.st_blksize as u64).max(PAGE)),
            _ => Backing::Ordinary(PAGE),
        };
        Ok(Self { file, id: FileId(stat.st_dev, stat.st_ino), backing })
    }

    /// Which file it is.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// What its pages are.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Bytes that the host holds for it. Not asked for by reading: that would make pages.
    pub fn resident_bytes(&self) -> u64 {
        fstat(&self.file).map_or(0, |stat| stat.st_blocks as u64 * 512)
    }

    /// Gives `len` bytes at `offset` back to the host. All who have the file mapped lose them, and find zeroes there.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Takes `len` bytes at `offset` from the host, where there are none.
    pub fn populate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::empty(), offset, len)
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        loop {
            match fallocate(self.file.as_fd(), flags, offset, len) {
                Err(Errno::INTR) => {}
                result => return result.map_err(Into::into),
            }
        }
    }
}
