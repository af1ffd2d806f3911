//! Attributes of host files.

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, Statx, StatxFlags, StatxTimestamp, makedev, statx};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A time of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970; negative before.
    pub sec: i64,
    /// Nanoseconds.
    pub nsec: u32,
}

impl From<StatxTimestamp> for Timestamp {
    fn from(time: StatxTimestamp) -> Self {
        Self { sec: time.tv_sec, nsec: time.tv_nsec }
    }
}

/// What statx(2) says of a file, with owner, mode and device as the guest's security model has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of statx(2)")]
pub struct Stat {
    pub dev: u64,
    pub ino: u64,
    pub mode: u32,
    /// The mode without regard to the security model.
    pub host_mode: u32,
    /// Host user.
    pub uid: u32,
    /// Host group.
    pub gid: u32,
    pub nlink: u64,
    /// The device that a device node stands for.
    pub rdev: (u32, u32),
    pub size: u64,
    pub blocks: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    /// Where the file system keeps it.
    pub btime: Option<Timestamp>,
}

impl Stat {
    /// The attributes of the file behind `file`, which may be open with O_PATH.
    pub fn of(file: impl AsFd) -> Result<Self, Errno> {
        let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::BTIME)?;
        Ok(Self::from(&stat))
    }

    /// The bits of `S_IFMT`.
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.file_type() == libc::S_IFDIR
    }
}

impl From<&Statx> for Stat {
    fn from(stat: &Statx) -> Self {
        let has_btime = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        Self {
            dev: makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            mode: stat.stx_mode.into(),
            host_mode: stat.stx_mode.into(),
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            nlink: stat.stx_nlink.into(),
            rdev: (stat.stx_rdev_major, stat.stx_rdev_minor),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.into(),
            mtime: stat.stx_mtime.into(),
            ctime: stat.stx_ctime.into(),
            btime: has_btime.then(|| stat.stx_btime.into()),
        }
    }
}
