//! Whether the memory that a front end shares can be given back: found out before the guest relies on it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};
use rustix::fs::{FileType, OFlags, SealFlags, Stat, fcntl_get_seals, fcntl_getfl, fstat, major, minor};
use thiserror::Error;

/// Why memory cannot be given back.
#[derive(Debug, Error)]
pub enum Unusable {
    /// The file cannot be looked at.
    #[error("The file of a memory region cannot be examined")]
    Unknown(#[source] io::Error),
    /// The front end opened the file for reading only.
    #[error(
        "The guest's memory was shared read-only, and nothing of it can be given back: have the front end open it for \
         writing, or start the daemon with --no-discard"
    )]
    ReadOnly,
    /// The memfd has a seal against writing.
    #[error(
        "The guest's memory has a seal against writing (F_SEAL_WRITE), and nothing of it can be given back: have the \
         front end leave it out, or start the daemon with --no-discard"
    )]
    Sealed,
    /// It is no file with holes.
    #[error(
        "The guest's memory is no regular file, and nothing of it can be given back: use a memfd or a file on tmpfs or \
         hugetlbfs (QEMU: -object memory-backend-memfd,share=on), or start the daemon with --no-discard"
    )]
    NoFile,
    /// The front end mapped the file privately: the guest does not see what is in it.
    #[error(
        "Process {pid} has the guest's memory mapped privately, so that nothing of it can be given back and the guest \
         cannot be served: make it shared (QEMU: share=on for the memory backend)"
    )]
    Private {
        /// The front end.
        pid: i32,
    },
}

/// Checks that holes can be made in `file`, whose bytes from `offset` on are `size` bytes of guest memory, and that `peer`
/// would notice, as far as can be seen.
pub fn check(file: BorrowedFd<'_>, offset: u64, size: u64, peer: Option<i32>) -> Result<(), Unusable> {
    let stat = fstat(file).map_err(|error| Unusable::Unknown(error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Unusable::NoFile);
    }
    let flags = fcntl_getfl(file).map_err(|error| Unusable::Unknown(error.into()))?;
    if !flags.contains(OFlags::RDWR) && !flags.contains(OFlags::WRONLY) {
        return Err(Unusable::ReadOnly);
    }
    // Other files than memfds have no seals, which is an error.
    if fcntl_get_seals(file.as_fd())
        .is_ok_and(|seals| seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE))
    {
        return Err(Unusable::Sealed);
    }
    match peer {
        Some(pid) if is_private(pid, &stat, offset, size) => Err(Unusable::Private { pid }),
        _ => Ok(()),
    }
}

/// Whether process `pid` maps these bytes of the file, but privately. `false` if that cannot be seen: it is of another user,
/// or hidden.
fn is_private(pid: i32, stat: &Stat, offset: u64, size: u64) -> bool {
    let Ok(maps) = Process::new(pid).and_then(|process| process.maps()) else {
        log::debug!("The mappings of process {pid} cannot be seen");
        return false;
    };
    let of_the_file: Vec<&MemoryMap> = maps
        .iter()
        .filter(|map| {
            let len = map.address.1 - map.address.0;
            let is_file = !matches!(map.pathname, MMapPath::Anonymous);
            is_file
                && map.inode == stat.st_ino
                && map.dev == (major(stat.st_dev) as i32, minor(stat.st_dev) as i32)
                && map.offset < offset.saturating_add(size)
                && offset < map.offset.saturating_add(len)
        })
        .collect();
    !of_the_file.is_empty() && of_the_file.iter().all(|map| map.perms.contains(MMPermissions::PRIVATE))
}
