//! Qids of host files.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use clap::ValueEnum;
use log::warn;
use rustix::io::Errno;

use super::stat::{Stat, Timestamp};
use crate::protocol::Qid;

/// What is done about files of several host file systems in one share, whose inode numbers may collide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Multidevs {
    /// Give each file system a range of its own
    Remap,
    /// Refuse to cross to another file system
    Forbid,
    /// Show the inode numbers as they are, and warn once
    Warn,
}

/// What makes the version in a qid, by which caching guests see that a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QidVersion {
    /// Time of last change of anything, and size: whoever changed it
    Change,
    /// Time of last modification of the content
    Mtime,
    /// Always the same: only this guest changes the files
    Constant,
}

/// Where the number of a file system stands in a qid path.
const DEVICE_SHIFT: u32 = 48;
/// The number for inode numbers that leave no room for one.
const HASHED: u64 = 0xffff;
/// What the Linux client adds to a qid path to make an inode number (`QID2INO`).
const LINUX_OFFSET: u64 = 2;

/// Makes qids that are unique over all shares of a server.
#[derive(Debug)]
pub struct Qids {
    multidevs: Multidevs,
    version: QidVersion,
    /// The device seen first, most often the only one.
    first: AtomicU64,
    /// All devices in the order in which they were seen.
    devices: RwLock<Vec<u64>>,
    hasher: foldhash::quality::RandomState,
}

impl Qids {
    /// Makes qids by these rules.
    pub fn new(multidevs: Multidevs, version: QidVersion) -> Self {
        Self {
            multidevs,
            version,
            first: AtomicU64::new(u64::MAX),
            devices: RwLock::default(),
            hasher: foldhash::quality::RandomState::default(),
        }
    }

    /// The qid of the file with these attributes.
    pub fn qid(&self, stat: &Stat) -> Qid {
        let kind = match stat.file_type() {
            libc::S_IFDIR => Qid::DIR,
            libc::S_IFLNK => Qid::SYMLINK,
            _ => Qid::FILE,
        };
        Qid { kind, version: self.version(stat), path: self.path(stat.dev, stat.ino) }
    }

    /// The qid path of inode `ino` on `dev`. The Linux client shows it as the inode number of the host, if the file is on
    /// the file system seen first.
    pub fn path(&self, dev: u64, ino: u64) -> u64 {
        let number = if dev == self.first.load(Ordering::Relaxed) { 0 } else { self.number(dev) };
        let path = if ino >> DEVICE_SHIFT == 0 {
            number << DEVICE_SHIFT | ino
        } else if self.multidevs == Multidevs::Warn {
            ino
        } else {
            // No table, which a guest could make grow by looking at files: 48 bits do not meet by accident.
            HASHED << DEVICE_SHIFT | self.hasher.hash_one((dev, ino)) >> (64 - DEVICE_SHIFT)
        };
        path.wrapping_sub(LINUX_OFFSET)
    }

    /// The number of a device, which is new if it was not seen before.
    fn number(&self, dev: u64) -> u64 {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let known = devices.iter().position(|known| *known == dev);
        drop(devices);
        let number = known.unwrap_or_else(|| self.add(dev));
        if self.multidevs == Multidevs::Warn { 0 } else { (number as u64).min(HASHED - 1) }
    }

    fn add(&self, dev: u64) -> usize {
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = devices.iter().position(|known| *known == dev) {
            return number;
        }
        devices.push(dev);
        match devices.len() {
            1 => self.first.store(dev, Ordering::Relaxed),
            2 if self.multidevs == Multidevs::Warn => warn!(
                "The shares hold several file systems: files with the same inode number look like one to the guest (use \
                 --multidevs remap)"
            ),
            _ => {}
        }
        devices.len() - 1
    }

    /// The version of a file: never 0, which tells the Linux client not to cache it.
    fn version(&self, stat: &Stat) -> u32 {
        let mix = |value: u64| (value ^ value >> 32) as u32;
        let time = |time: Timestamp| {
            (time.sec as u64).wrapping_mul(1_000_000_000).wrapping_add(u64::from(time.nsec))
        };
        let version = match self.version {
            QidVersion::Constant => 1,
            QidVersion::Mtime => mix(time(stat.mtime)),
            // Multiplied, so that a size and a time that change together do not cancel each other out.
            QidVersion::Change => {
                mix(time(stat.ctime).wrapping_add(stat.size.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
            }
        };
        version.max(1)
    }

    /// Fails if `dev` may not be crossed to from `from`.
    pub fn check_crossing(&self, from: u64, dev: u64) -> Result<(), Errno> {
        if self.multidevs == Multidevs::Forbid && from != dev { Err(Errno::XDEV) } else { Ok(()) }
    }
}
