//! The wire format of 9P2000.L: bytes to typed requests and typed replies to bytes, without side effects.
//!
//! | module | holds |
//! |---|---|
//! | [`request`] | decoding of T-messages: total, never panics, borrows from the message |
//! | [`reply`] | encoding of R-messages |
//!
//! The format is that of "Plan 9 Remote Resource Protocol" (intro(5)) with the messages of "9P2000.L" as the Linux client
//! defines them (`include/net/9p/9p.h`). All integers are little endian. A string is a 16-bit length and that many
//! bytes; names are bytes, in no encoding.

pub mod reply;
pub mod request;

pub use reply::Reply;
pub use request::{DecodeError, Request};

/// The version string that is spoken.
pub const VERSION: &[u8] = b"9P2000.L";
/// The answer to a version that is not spoken.
pub const VERSION_UNKNOWN: &[u8] = b"unknown";

/// Bytes of `size[4] type[1] tag[2]`.
pub const HEADER_SIZE: usize = 7;
/// Bytes of a Twrite before its data: header, `fid[4] offset[8] count[4]`.
pub const WRITE_HEADER_SIZE: usize = HEADER_SIZE + 16;
/// Bytes of an Rread or Rreaddir before its data: header and `count[4]`.
pub const READ_HEADER_SIZE: usize = HEADER_SIZE + 4;
/// Bytes of an Rlerror.
pub const ERROR_SIZE: usize = HEADER_SIZE + 4;
/// What clients take off the message size for the data of a Twrite (`P9_IOHDRSZ`).
pub const IO_HEADER_SIZE: u32 = 24;

/// The tag of a Tversion.
pub const NO_TAG: u16 = u16::MAX;
/// The fid that is none.
pub const NO_FID: u32 = u32::MAX;
/// The user id that is none.
pub const NO_UID: u32 = u32::MAX;
/// Most names in one Twalk (`P9_MAXWELEM`).
pub const MAX_WALK: usize = 16;

/// Message types.
#[expect(missing_docs, reason = "the names are those of the protocol")]
pub mod kind {
    pub const RLERROR: u8 = 7;
    pub const TSTATFS: u8 = 8;
    pub const TLOPEN: u8 = 12;
    pub const TLCREATE: u8 = 14;
    pub const TSYMLINK: u8 = 16;
    pub const TMKNOD: u8 = 18;
    pub const TRENAME: u8 = 20;
    pub const TREADLINK: u8 = 22;
    pub const TGETATTR: u8 = 24;
    pub const TSETATTR: u8 = 26;
    pub const TXATTRWALK: u8 = 30;
    pub const TXATTRCREATE: u8 = 32;
    pub const TREADDIR: u8 = 40;
    pub const TFSYNC: u8 = 50;
    pub const TLOCK: u8 = 52;
    pub const TGETLOCK: u8 = 54;
    pub const TLINK: u8 = 70;
    pub const TMKDIR: u8 = 72;
    pub const TRENAMEAT: u8 = 74;
    pub const TUNLINKAT: u8 = 76;
    pub const TVERSION: u8 = 100;
    pub const TAUTH: u8 = 102;
    pub const TATTACH: u8 = 104;
    pub const TFLUSH: u8 = 108;
    pub const TWALK: u8 = 110;
    pub const TREAD: u8 = 116;
    pub const TWRITE: u8 = 118;
    pub const TCLUNK: u8 = 120;
    pub const TREMOVE: u8 = 122;
}

/// What identifies a file on the server: two files are the same if type and path are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qid {
    /// The bits [`Qid::DIR`] and [`Qid::SYMLINK`].
    pub kind: u8,
    /// Changes with the file's content.
    pub version: u32,
    /// Unique among all files of the server.
    pub path: u64,
}

impl Qid {
    /// Bytes on the wire.
    pub const SIZE: usize = 13;
    /// A directory.
    pub const DIR: u8 = 0x80;
    /// A symbolic link.
    pub const SYMLINK: u8 = 0x02;
    /// Any other file.
    pub const FILE: u8 = 0;
}

bitflags::bitflags! {
    /// Which attributes a Tgetattr asks for and an Rgetattr has.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct GetattrMask: u64 {
        /// File type and permissions.
        const MODE = 0x0001;
        /// Number of links.
        const NLINK = 0x0002;
        /// Owner.
        const UID = 0x0004;
        /// Group.
        const GID = 0x0008;
        /// Device number of a device node.
        const RDEV = 0x0010;
        /// Time of last access.
        const ATIME = 0x0020;
        /// Time of last change of the content.
        const MTIME = 0x0040;
        /// Time of last change of anything.
        const CTIME = 0x0080;
        /// Inode number.
        const INO = 0x0100;
        /// Size in bytes.
        const SIZE = 0x0200;
        /// Blocks of 512 bytes in use.
        const BLOCKS = 0x0400;
        /// All that stat(2) has.
        const BASIC = 0x07ff;
        /// Time of creation.
        const BTIME = 0x0800;
        /// Generation of the inode.
        const GEN = 0x1000;
        /// A number that changes with the content.
        const DATA_VERSION = 0x2000;
    }

    /// Which attributes a Tsetattr changes.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SetattrMask: u32 {
        /// Permissions.
        const MODE = 0x001;
        /// Owner.
        const UID = 0x002;
        /// Group.
        const GID = 0x004;
        /// Size.
        const SIZE = 0x008;
        /// Time of last access: now, unless ATIME_SET.
        const ATIME = 0x010;
        /// Time of last change of the content: now, unless MTIME_SET.
        const MTIME = 0x020;
        /// Time of last change of anything; the host keeps it by itself.
        const CTIME = 0x040;
        /// The time of last access is given.
        const ATIME_SET = 0x080;
        /// The time of last change is given.
        const MTIME_SET = 0x100;
    }
}

/// A time as the protocol has it: seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds; negative before 1970, in two's complement.
    pub sec: u64,
    /// Nanoseconds.
    pub nsec: u64,
}

/// The attributes in an Rgetattr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Which fields hold something.
    pub valid: GetattrMask,
    /// The file's qid.
    pub qid: Qid,
    /// File type and permissions, as in stat(2).
    pub mode: u32,
    /// Owner, as the guest knows it.
    pub uid: u32,
    /// Group, as the guest knows it.
    pub gid: u32,
    /// Number of links.
    pub nlink: u64,
    /// Device number of a device node, in the kernel's encoding (`new_encode_dev`).
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// What I/O is best done in, in bytes.
    pub blksize: u64,
    /// Blocks of 512 bytes in use.
    pub blocks: u64,
    /// Time of last access.
    pub atime: Time,
    /// Time of last change of the content.
    pub mtime: Time,
    /// Time of last change of anything.
    pub ctime: Time,
    /// Time of creation.
    pub btime: Time,
    /// Generation of the inode.
    pub generation: u64,
    /// A number that changes with the content.
    pub data_version: u64,
}

/// What a Tsetattr carries. Only fields named in `valid` mean something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of Attributes")]
pub struct SetAttributes {
    pub valid: SetattrMask,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub atime: Time,
    pub mtime: Time,
}

/// The figures in an Rstatfs, as in statfs(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of statfs(2)")]
pub struct Statfs {
    pub kind: u32,
    pub bsize: u32,
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
    pub fsid: u64,
    pub namelen: u32,
}

/// A byte range to lock: Tlock, Tgetlock and Rgetlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockRange<'a> {
    /// [`LockRange::READ`], [`LockRange::WRITE`] or [`LockRange::UNLOCK`].
    pub kind: u8,
    /// First byte.
    pub start: u64,
    /// Number of bytes; 0 is up to the end of the file, wherever that comes to be.
    pub length: u64,
    /// The process in the guest.
    pub proc_id: u32,
    /// The guest's name.
    pub client_id: &'a [u8],
}

impl LockRange<'_> {
    /// A shared lock.
    pub const READ: u8 = 0;
    /// An exclusive lock.
    pub const WRITE: u8 = 1;
    /// No lock.
    pub const UNLOCK: u8 = 2;
    /// In the flags of a Tlock: wait for the lock.
    pub const FLAG_BLOCK: u32 = 1;
}

/// The status in an Rlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LockStatus {
    /// The lock is held.
    Success = 0,
    /// Somebody else has it.
    Blocked = 1,
    /// It cannot be had.
    Error = 2,
}

/// The flags of Tlopen and Tlcreate (`P9_DOTL_*`): the values of Linux on x86, on every architecture.
#[expect(missing_docs, reason = "the names are those of open(2)")]
pub mod open_flag {
    pub const ACCESS_MODE: u32 = 0o3;
    pub const WRITE_ONLY: u32 = 0o1;
    pub const READ_WRITE: u32 = 0o2;
    pub const CREATE: u32 = 0o100;
    pub const EXCLUSIVE: u32 = 0o200;
    pub const TRUNCATE: u32 = 0o1000;
    pub const APPEND: u32 = 0o2000;
    pub const DSYNC: u32 = 0o1_0000;
    pub const DIRECT: u32 = 0o4_0000;
    pub const DIRECTORY: u32 = 0o20_0000;
    pub const NOFOLLOW: u32 = 0o40_0000;
    pub const NOATIME: u32 = 0o100_0000;
    pub const SYNC: u32 = 0o400_0000;
}

/// The flag of Tunlinkat that asks for a directory to be removed.
pub const UNLINK_DIRECTORY: u32 = 0x200;
/// The flags of Txattrcreate, as in setxattr(2).
pub const XATTR_CREATE: u32 = 1;
/// Replace an attribute that exists.
pub const XATTR_REPLACE: u32 = 2;
