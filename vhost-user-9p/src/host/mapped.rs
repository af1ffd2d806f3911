//! The mapped-xattr model: owner, mode and device number of the guest in extended attributes, so that an unprivileged daemon
//! can keep them. Trees are those of QEMU's `security_model=mapped-xattr`, bit by bit.
//!
//! | attribute | value |
//! |---|---|
//! | `user.virtfs.uid`, `user.virtfs.gid` | owner, 32 bits, little endian |
//! | `user.virtfs.mode` | type and permissions as in stat(2), 32 bits, little endian |
//! | `user.virtfs.rdev` | device number as makedev(3) makes it, 64 bits, little endian; QEMU sets it with every mknod |
//! | `user.virtfs.system.posix_acl_*` | access control lists, see [`XattrPolicy::mapped`](super::xattr::XattrPolicy::mapped) |
//!
//! Directories are directories. All else is a regular file on the host, which belongs to the daemon: a symbolic link has its
//! target as content, and a device node, FIFO or socket is empty. Each attribute may be missing (chown in the guest of
//! a file that was made on the host sets two of them); then that of the host's inode counts.
//!
//! Whoever can write to the tree on the host can write the attributes too. So they decide about what a guest *sees*, and
//! never about what is done: only a regular file of the host becomes something else for the guest, nothing becomes a
//! directory, and no device number is ever used. What is followed or opened is decided by the type of the host's
//! inode, and a symbolic link on the host stays one, which nobody follows.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags, XattrFlags, fstat};
use rustix::io::{Errno, pread};

use super::idmap::GuestId;
use super::proc_fd::ProcFd;
use super::xattr::File;

/// Permissions of a regular file on the host, unless `--fmode` says otherwise.
pub const DEFAULT_FILE_MODE: u32 = 0o600;
/// Permissions of a directory on the host, unless `--dmode` says otherwise.
pub const DEFAULT_DIRECTORY_MODE: u32 = 0o700;

/// Longest target of a symbolic link (`PATH_MAX`).
pub const MAX_TARGET: usize = 4096;

const UID: &CStr = c"user.virtfs.uid";
const GID: &CStr = c"user.virtfs.gid";
const MODE: &CStr = c"user.virtfs.mode";
const RDEV: &CStr = c"user.virtfs.rdev";

/// The bits of a mode that are no type.
const PERMISSIONS: u32 = 0o7777;

/// What the attributes of an inode say, or what is to be changed of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedAttributes {
    /// Owner.
    pub uid: Option<GuestId>,
    /// Group.
    pub gid: Option<GuestId>,
    /// Type and permissions: as they stand there, see [`MappedAttributes::mode`].
    pub mode: Option<u32>,
    /// Device number. It is only read if the mode is that of a device node.
    pub rdev: Option<u64>,
}

/// Reads the attributes: a call for each, as each of them may be missing.
///
/// What cannot be an attribute of the model (by its size) counts as missing, and so does what the host does not let us read.
pub fn read(file: File<'_>) -> Result<MappedAttributes, Errno> {
    let uid = number(file, UID)?.map(u32::from_le_bytes).map(GuestId);
    let gid = number(file, GID)?.map(u32::from_le_bytes).map(GuestId);
    let mode = number(file, MODE)?.map(u32::from_le_bytes);
    let device = mode.is_some_and(|mode| {
        matches!(FileType::from_raw_mode(mode), FileType::CharacterDevice | FileType::BlockDevice)
    });
    let rdev = if device { number(file, RDEV)?.map(u64::from_le_bytes) } else { None };
    Ok(MappedAttributes { uid, gid, mode, rdev })
}

/// The value of an attribute of exactly `N` bytes.
fn number<const N: usize>(file: File<'_>, name: &CStr) -> Result<Option<[u8; N]>, Errno> {
    let mut value = [0; N];
    match file.get_named(name, &mut value) {
        Ok(size) if size == N => Ok(Some(value)),
        // Links and device nodes of the host have no such attributes (ENODATA or EPERM); a file that the daemon may not read
        // (EACCES) has none for it.
        Ok(_) | Err(Errno::NODATA | Errno::RANGE | Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => {
            Ok(None)
        }
        Err(errno) => Err(errno),
    }
}

impl MappedAttributes {
    /// Sets the attributes that are given and leaves the others.
    ///
    /// It is a call for each, so a crash can leave some of them done. `EPERM` on what has no such attributes: a link or a
    /// device node of the host.
    pub fn write(&self, file: File<'_>) -> Result<(), Errno> {
        let set = |name: &CStr, value: &[u8]| file.set(name.to_bytes(), value, XattrFlags::empty());
        if let Some(GuestId(uid)) = self.uid {
            set(UID, &uid.to_le_bytes())?;
        }
        if let Some(GuestId(gid)) = self.gid {
            set(GID, &gid.to_le_bytes())?;
        }
        if let Some(mode) = self.mode {
            set(MODE, &mode.to_le_bytes())?;
        }
        if let Some(rdev) = self.rdev {
            set(RDEV, &rdev.to_le_bytes())?;
        }
        Ok(())
    }

    /// The mode that the guest sees of an inode whose mode is `real` on the host.
    pub fn mode(&self, real: u32) -> u32 {
        let Some(mapped) = self.mode else {
            return real;
        };
        let (host_kind, mapped_kind) = (FileType::from_raw_mode(real), FileType::from_raw_mode(mapped));
        let believed = host_kind == FileType::RegularFile
            && matches!(
                mapped_kind,
                FileType::Symlink
                    | FileType::Fifo
                    | FileType::Socket
                    | FileType::CharacterDevice
                    | FileType::BlockDevice
            );
        let kind = if believed { mapped_kind } else { host_kind };
        kind.as_raw_mode() | mapped & PERMISSIONS
    }

    /// The mode to store for a chmod to `permissions` (whose type is ignored) of an inode whose mode is `real` on the host: an
    /// inode never changes its type.
    pub fn mode_with_permissions(&self, real: u32, permissions: u32) -> u32 {
        self.mode(real) & !PERMISSIONS | permissions & PERMISSIONS
    }

    /// Whether the guest sees a symbolic link whose target is the content of a regular file.
    pub fn is_link(&self, real: u32) -> bool {
        FileType::from_raw_mode(real) == FileType::RegularFile
            && FileType::from_raw_mode(self.mode(real)) == FileType::Symlink
    }
}

/// The target of a link of the guest, out of the regular file that it is on the host. A longer content is cut to
/// [`MAX_TARGET`].
///
/// `EINVAL`: the inode is no regular file. It is up to the caller to know that it is a link
/// ([`MappedAttributes::is_link`]).
pub fn read_target(proc: &ProcFd, inode: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    if FileType::from_raw_mode(fstat(inode)?.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    let file = proc.reopen(inode, OFlags::RDONLY | OFlags::NOCTTY | OFlags::NONBLOCK)?;
    let mut target = vec![0; MAX_TARGET];
    let mut len = 0;
    while len < target.len() {
        match pread(&file, &mut target[len..], len as u64) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    target.truncate(len);
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, fgetxattr, makedev, mknodat, openat, symlinkat};
    use std::os::fd::{AsFd, OwnedFd};
    use std::path::Path;

    fn o_path(path: &Path) -> OwnedFd {
        openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    /// The value of an attribute, in bytes.
    fn raw(file: &std::fs::File, name: &str) -> Vec<u8> {
        let mut value = [0; 32];
        let len = fgetxattr(file, name, &mut value).unwrap();
        value[..len].to_vec()
    }

    #[test]
    fn the_format_is_that_of_qemu() {
        let proc = ProcFd::open().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let inode = o_path(file.path());
        let node = MappedAttributes {
            uid: Some(GuestId(0x0102_0304)),
            gid: Some(GuestId(5)),
            mode: Some(FileType::CharacterDevice.as_raw_mode() | 0o640),
            rdev: Some(makedev(0x1234, 0x5_6789)),
        };
        node.write(File::Path(&proc, inode.as_fd())).unwrap();
        assert_eq!(raw(file.as_file(), "user.virtfs.uid"), [4, 3, 2, 1]);
        assert_eq!(raw(file.as_file(), "user.virtfs.gid"), [5, 0, 0, 0]);
        assert_eq!(raw(file.as_file(), "user.virtfs.mode"), [0xa0, 0x21, 0, 0]);
        // The C library's dev_t: minor's low byte, major's low 12 bits, minor's rest, major's rest.
        assert_eq!(raw(file.as_file(), "user.virtfs.rdev"), [0x89, 0x34, 0x72, 0x56, 0, 0x10, 0, 0]);
        assert_eq!(read(File::Path(&proc, inode.as_fd())), Ok(node));
        assert_eq!(read(File::Open(file.as_file().as_fd())), Ok(node));
    }

    #[test]
    fn what_is_missing_is_the_hosts() {
        let file = tempfile::tempfile().unwrap();
        let file = File::Open(file.as_fd());
        assert_eq!(read(file), Ok(MappedAttributes::default()));
        assert_eq!(MappedAttributes::default().mode(0o100_644), 0o100_644);
        // As chown does.
        let owner =
            MappedAttributes { uid: Some(GuestId(1)), gid: Some(GuestId(2)), ..MappedAttributes::default() };
        owner.write(file).unwrap();
        assert_eq!(read(file), Ok(owner));
        // As chmod does, and then it has a mode without the rest being set anew.
        let mode = MappedAttributes { mode: Some(0o100_755), ..MappedAttributes::default() };
        mode.write(file).unwrap();
        assert_eq!(read(file), Ok(MappedAttributes { mode: mode.mode, ..owner }));
    }

    #[test]
    fn a_device_number_belongs_to_a_device() {
        let file = tempfile::tempfile().unwrap();
        let file = File::Open(file.as_fd());
        let fifo = MappedAttributes { mode: Some(0o010_644), rdev: Some(7), ..MappedAttributes::default() };
        fifo.write(file).unwrap();
        assert_eq!(read(file), Ok(MappedAttributes { rdev: None, ..fifo }));
    }

    #[test]
    fn garbage_counts_as_missing() {
        let file = tempfile::tempfile().unwrap();
        let file = File::Open(file.as_fd());
        for garbage in [&b""[..], b"1", b"123", b"12345", &[0xff; 300]] {
            for name in [UID, GID, MODE] {
                file.set(name.to_bytes(), garbage, XattrFlags::empty()).unwrap();
            }
            assert_eq!(read(file), Ok(MappedAttributes::default()));
        }
        MappedAttributes { mode: Some(0o060_600), ..MappedAttributes::default() }.write(file).unwrap();
        file.set(RDEV.to_bytes(), b"1234", XattrFlags::empty()).unwrap();
        assert_eq!(read(file).unwrap().rdev, None);
    }

    /// Every mode that anybody can write, for every type of the host's inode.
    #[test]
    fn a_forged_mode_makes_no_directory_and_no_link_to_follow() {
        const TYPES: [u32; 16] = {
            let mut types = [0; 16];
            let mut i = 0;
            while i < 16 {
                types[i] = (i as u32) << 12;
                i += 1;
            }
            types
        };
        for real_type in TYPES {
            for mapped_type in TYPES {
                for extra in [0, 0xffff_0000] {
                    let attributes =
                        MappedAttributes { mode: Some(extra | mapped_type | 0o4711), ..Default::default() };
                    let seen = attributes.mode(real_type | 0o600);
                    assert_eq!(seen & PERMISSIONS, 0o4711);
                    let (seen, real) = (FileType::from_raw_mode(seen), FileType::from_raw_mode(real_type));
                    assert_eq!(seen == FileType::Directory, real == FileType::Directory);
                    if real != FileType::RegularFile {
                        assert_eq!(seen, real);
                        assert!(!attributes.is_link(real_type));
                    }
                }
            }
        }
    }

    #[test]
    fn permissions_change_without_the_type() {
        let link = MappedAttributes { mode: Some(0o120_777), ..MappedAttributes::default() };
        assert_eq!(link.mode_with_permissions(0o100_600, 0o060_644), 0o120_644);
        assert_eq!(MappedAttributes::default().mode_with_permissions(0o040_700, 0o1755), 0o041_755);
    }

    #[test]
    fn a_link_is_the_content_of_a_file() {
        let proc = ProcFd::open().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        std::fs::write(&path, "../some/where").unwrap();
        let inode = o_path(&path);
        assert_eq!(read_target(&proc, inode.as_fd()), Ok(b"../some/where".to_vec()));
        std::fs::write(&path, vec![b'a'; MAX_TARGET + 5]).unwrap();
        assert_eq!(read_target(&proc, inode.as_fd()), Ok(vec![b'a'; MAX_TARGET]));
    }

    /// What is on the host, whatever its attributes say, is neither followed nor opened.
    #[test]
    fn only_regular_files_hold_targets() {
        let proc = ProcFd::open().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (link, fifo) = (dir.path().join("link"), dir.path().join("fifo"));
        symlinkat("/etc/passwd", CWD, &link).unwrap();
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from(0o600), 0).unwrap();
        for path in [&link, &fifo, &dir.path().to_owned()] {
            let inode = o_path(path);
            assert_eq!(read_target(&proc, inode.as_fd()), Err(Errno::INVAL));
            assert_eq!(read(File::Path(&proc, inode.as_fd())), Ok(MappedAttributes::default()));
        }
        let attributes = MappedAttributes { mode: Some(0o100_600), ..MappedAttributes::default() };
        let inode = o_path(&link);
        assert_eq!(attributes.write(File::Path(&proc, inode.as_fd())), Err(Errno::PERM));
    }
}
