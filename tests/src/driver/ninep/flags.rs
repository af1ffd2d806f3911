//! Numbers of the protocol, as Linux has them in `include/net/9p/9p.h`.

/// The tag of a `Tversion`.
pub const NO_TAG: u16 = u16::MAX;
/// No fid, such as the `afid` of a `Tattach` without authentication.
pub const NO_FID: u32 = u32::MAX;
/// No numeric user, which Linux sends with its first `Tattach`.
pub const NO_UNAME: u32 = u32::MAX;
/// The dialect.
pub const VERSION: &[u8] = b"9P2000.L";

/// The length of each message's `size[4] type[1] tag[2]`.
pub const HEADER_LEN: usize = 7;
/// The length of `Rlerror`, and of what comes before the data in `Rread` and `Rreaddir`.
pub const READ_HEADER_LEN: usize = 11;
/// The length of what comes before the data in `Twrite`.
pub const WRITE_HEADER_LEN: usize = 23;
/// What Linux takes off the msize for the headers of reads and writes (`P9_IOHDRSZ`).
pub const IO_HEADER_LEN: u32 = 24;
/// Most names in a `Twalk`.
pub const MAX_WALK: usize = 16;

/// A qid's type: a directory.
pub const QTDIR: u8 = 0x80;
/// A qid's type: a symbolic link.
pub const QTSYMLINK: u8 = 0x02;
/// A qid's type: anything else.
pub const QTFILE: u8 = 0x00;

/// `Tlopen`, `Tlcreate`: for reading.
pub const RDONLY: u32 = 0;
/// For writing.
pub const WRONLY: u32 = 0o1;
/// For both.
pub const RDWR: u32 = 0o2;
/// Create it.
pub const CREATE: u32 = 0o100;
/// It must not exist.
pub const EXCL: u32 = 0o200;
/// No controlling terminal.
pub const NOCTTY: u32 = 0o400;
/// Cut to nothing.
pub const TRUNC: u32 = 0o1000;
/// Write at the end.
pub const APPEND: u32 = 0o2000;
/// Do not wait.
pub const NONBLOCK: u32 = 0o4000;
/// Signals for I/O.
pub const FASYNC: u32 = 0o20000;
/// Past the page cache.
pub const DIRECT: u32 = 0o40000;
/// Files over 2 GiB.
pub const LARGEFILE: u32 = 0o100_000;
/// It must be a directory.
pub const DIRECTORY: u32 = 0o200_000;
/// It must not be a symbolic link.
pub const NOFOLLOW: u32 = 0o400_000;
/// Do not touch the access time.
pub const NOATIME: u32 = 0o1_000_000;
/// Close it in a new program.
pub const CLOEXEC: u32 = 0o2_000_000;
/// Write through.
pub const SYNC: u32 = 0o4_010_000;

/// `Tunlinkat`: a directory (`P9_DOTL_AT_REMOVEDIR`).
pub const REMOVEDIR: u32 = 0x200;

/// `Tgetattr`: the basic attributes (`P9_STATS_BASIC`).
pub const GETATTR_BASIC: u64 = 0x7ff;
/// All attributes (`P9_STATS_ALL`).
pub const GETATTR_ALL: u64 = 0x3fff;
/// The time of birth.
pub const GETATTR_BTIME: u64 = 0x800;
/// The generation.
pub const GETATTR_GEN: u64 = 0x1000;
/// The data version.
pub const GETATTR_DATA_VERSION: u64 = 0x2000;

/// `Tsetattr`: the mode.
pub const SETATTR_MODE: u32 = 0x1;
/// The owner.
pub const SETATTR_UID: u32 = 0x2;
/// The group.
pub const SETATTR_GID: u32 = 0x4;
/// The size.
pub const SETATTR_SIZE: u32 = 0x8;
/// The access time: now, unless [`SETATTR_ATIME_SET`] comes with it.
pub const SETATTR_ATIME: u32 = 0x10;
/// The modification time: now, unless [`SETATTR_MTIME_SET`] comes with it.
pub const SETATTR_MTIME: u32 = 0x20;
/// The change time: now.
pub const SETATTR_CTIME: u32 = 0x40;
/// The access time that the message has.
pub const SETATTR_ATIME_SET: u32 = 0x80;
/// The modification time that the message has.
pub const SETATTR_MTIME_SET: u32 = 0x100;

/// `Txattrcreate`: it must not exist (`XATTR_CREATE`).
pub const XATTR_CREATE: u32 = 1;
/// It must exist (`XATTR_REPLACE`).
pub const XATTR_REPLACE: u32 = 2;

/// A lock's type: for reading.
pub const LOCK_RDLCK: u8 = 0;
/// For writing.
pub const LOCK_WRLCK: u8 = 1;
/// None.
pub const LOCK_UNLCK: u8 = 2;
/// `Tlock`: wait for it.
pub const LOCK_BLOCK: u32 = 1;
/// `Rlock`: done.
pub const LOCK_SUCCESS: u8 = 0;
/// `Rlock`: somebody else has it.
pub const LOCK_BLOCKED: u8 = 1;
/// `Rlock`: failed.
pub const LOCK_ERROR: u8 = 2;

/// `Rstatfs`: the file system's type (`V9FS_MAGIC`).
pub const V9FS_MAGIC: u32 = 0x0102_1997;
