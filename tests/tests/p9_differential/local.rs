//! The operations by system calls, in the steps in which a 9P client asks for them: name by name, no link followed.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags, fstat, linkat,
    mkdirat, mknodat, open, openat, readlinkat, renameat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::super::{Op, Outcome, SLOTS, Subject, content, describe};

/// A folder and the files that are open in it.
pub struct Local {
    top: OwnedFd,
    slots: [Option<File>; SLOTS],
}

/// What names an open file to the calls that take paths only.
fn proc_path(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

fn io_error(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn show(stat: &Stat) -> String {
    let mtime = Some((stat.st_mtime, stat.st_mtime_nsec as i64));
    describe(stat.st_mode, stat.st_nlink, stat.st_size as u64, stat.st_uid, stat.st_gid, mtime)
}

fn done<T>(result: Result<T, Errno>) -> Outcome {
    result.map(|_| String::new())
}

impl Local {
    pub fn new(top: &Path) -> Result<Self, Errno> {
        let top = open(top, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { top, slots: Default::default() })
    }

    fn walk(&self, names: &[&str]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut at = openat(&self.top, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        for name in names {
            at = openat(&at, *name, flags, Mode::empty())?;
        }
        Ok(at)
    }

    fn parent<'a>(&self, place: &[&'a str]) -> Result<(OwnedFd, &'a str), Errno> {
        let (last, names) = place.split_last().expect("a place has a name");
        Ok((self.walk(names)?, last))
    }

    fn slot(&self, slot: usize) -> Result<&File, Errno> {
        self.slots[slot].as_ref().ok_or(Errno::BADF)
    }

    /// Opens what a 9P server opens: files and directories.
    fn reopen(fd: &OwnedFd, flags: OFlags) -> Result<File, Errno> {
        let writes = flags.intersects(OFlags::RDWR | OFlags::WRONLY | OFlags::TRUNC);
        match FileType::from_raw_mode(fstat(fd)?.st_mode) {
            kind if kind != FileType::Directory && flags.contains(OFlags::DIRECTORY) => Err(Errno::NOTDIR),
            FileType::Symlink => Err(Errno::LOOP),
            FileType::Directory if writes => Err(Errno::ISDIR),
            FileType::Directory | FileType::RegularFile => {
                open(proc_path(fd), flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
            }
            _ => Err(Errno::NXIO),
        }
    }

    /// Whether it is something that a guest's kernel does by itself or refuses: attributes and permissions of what is
    /// neither a file nor a directory, directories whose group is inherited, and the set-user-ID bits.
    pub fn is_the_guests(&self, op: &Op) -> bool {
        let place = match op {
            Op::Mkdir(_, mode) => return mode & 0o2000 != 0,
            // Which go with a write by anybody but root.
            Op::Create { mode, .. } => return mode & 0o6000 != 0,
            Op::Chmod(_, mode) | Op::ChmodOpen(_, mode) if mode & 0o6000 != 0 => return true,
            Op::SetXattr { place, .. }
            | Op::GetXattr(place, _)
            | Op::RemoveXattr(place, _)
            | Op::ListXattr(place)
            | Op::Chmod(place, _) => place,
            _ => return false,
        };
        let kind = |stat: Stat| FileType::from_raw_mode(stat.st_mode);
        self.walk(place)
            .and_then(fstat)
            .is_ok_and(|stat| !matches!(kind(stat), FileType::RegularFile | FileType::Directory))
    }

    fn create(&mut self, op: &Op) -> Outcome {
        let Op::Create { slot, place, exclusive, truncate, mode } = op else { unreachable!("a create") };
        let (parent, name) = self.parent(place)?;
        let is_special = |stat: Stat| {
            !matches!(
                FileType::from_raw_mode(stat.st_mode),
                FileType::Symlink | FileType::Directory | FileType::RegularFile
            )
        };
        if !exclusive && statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_special) {
            return Err(Errno::NXIO);
        }
        let mut flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        flags.set(OFlags::EXCL, *exclusive);
        flags.set(OFlags::TRUNC, *truncate);
        let file = openat(&parent, name, flags, Mode::from_raw_mode(*mode))?;
        self.slots[*slot] = Some(file.into());
        Ok(String::new())
    }

    fn xattr(&self, op: &Op) -> Outcome {
        let mut value = vec![0; 4096];
        match op {
            Op::SetXattr { place, name, len, create, replace } => {
                let mut flags = XattrFlags::empty();
                flags.set(XattrFlags::CREATE, *create);
                flags.set(XattrFlags::REPLACE, *replace);
                let fd = self.walk(place)?;
                done(rustix::fs::setxattr(proc_path(&fd), *name, &content(0, *len), flags))
            }
            Op::GetXattr(place, name) => {
                let len = rustix::fs::getxattr(proc_path(&self.walk(place)?), *name, &mut value)?;
                Ok(format!("{:?}", &value[..len]))
            }
            Op::RemoveXattr(place, name) => {
                done(rustix::fs::removexattr(proc_path(&self.walk(place)?), *name))
            }
            Op::ListXattr(place) => {
                let len = rustix::fs::listxattr(proc_path(&self.walk(place)?), &mut value)?;
                Ok(format!("{:?}", &value[..len]))
            }
            _ => unreachable!("an operation on xattrs"),
        }
    }

    fn by_slot(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Close(slot) => self.slots[*slot].take().map(|_| String::new()).ok_or(Errno::BADF),
            Op::Write { slot, offset, len } => {
                let data = content(*offset, *len);
                // Here 9P says what is wrong with more precision than write(2), for which it is EBADF.
                if FileType::from_raw_mode(fstat(self.slot(*slot)?)?.st_mode) == FileType::Directory {
                    return Err(Errno::ISDIR);
                }
                let written = self.slot(*slot)?.write_at(&data, *offset).map_err(|error| io_error(&error))?;
                Ok(format!("{written} bytes"))
            }
            Op::Read { slot, offset, len } => {
                let mut data = vec![0; *len];
                let read = self.slot(*slot)?.read_at(&mut data, *offset).map_err(|error| io_error(&error))?;
                Ok(format!("{:?}", &data[..read]))
            }
            Op::Truncate { slot, size } => {
                let file = self.slot(*slot)?;
                // A fid is a file whatever it was opened for, as a path is to truncate(2).
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let writer = File::options().write(true).open(path).map_err(|error| io_error(&error))?;
                done(rustix::fs::ftruncate(&writer, *size))
            }
            Op::StatOpen(slot) => Ok(show(&fstat(self.slot(*slot)?)?)),
            Op::ChmodOpen(slot, mode) => {
                done(rustix::fs::fchmod(self.slot(*slot)?, Mode::from_raw_mode(*mode)))
            }
            Op::Sync(slot) => done(rustix::fs::fsync(self.slot(*slot)?)),
            _ => unreachable!("an operation on an open file"),
        }
    }

    fn list(&self, place: &[&str]) -> Outcome {
        let fd = self.walk(place)?;
        let file = Self::reopen(&fd, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        for entry in Dir::new(file)? {
            let entry = entry?;
            names.push((entry.file_name().to_bytes().to_vec(), format!("{:?}", entry.file_type())));
        }
        names.sort();
        Ok(format!("{names:?}"))
    }
}

impl Subject for Local {
    fn apply(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Mkdir(place, mode) => {
                let (parent, name) = self.parent(place)?;
                done(mkdirat(&parent, name, Mode::from_raw_mode(*mode)))
            }
            Op::Create { .. } => self.create(op),
            Op::Open { slot, place, write, truncate, append } => {
                let mut flags = if *write { OFlags::RDWR } else { OFlags::RDONLY };
                flags.set(OFlags::TRUNC, *truncate && *write);
                flags.set(OFlags::APPEND, *append);
                let file = Self::reopen(&self.walk(place)?, flags)?;
                self.slots[*slot] = Some(file);
                Ok(String::new())
            }
            Op::Close(_)
            | Op::Write { .. }
            | Op::Read { .. }
            | Op::Truncate { .. }
            | Op::StatOpen(_)
            | Op::ChmodOpen(..)
            | Op::Sync(_) => self.by_slot(op),
            Op::Unlink(place) => {
                let (parent, name) = self.parent(place)?;
                done(unlinkat(&parent, name, AtFlags::empty()))
            }
            Op::Rmdir(place) => {
                let (parent, name) = self.parent(place)?;
                done(unlinkat(&parent, name, AtFlags::REMOVEDIR))
            }
            Op::Rename(from, to) => {
                let (from, old) = self.parent(from)?;
                let (to, new) = self.parent(to)?;
                done(renameat(&from, old, &to, new))
            }
            Op::Link(from, to) => {
                let from = self.walk(from)?;
                let (to, name) = self.parent(to)?;
                // Before anything else, such as that the new name is taken.
                if FileType::from_raw_mode(fstat(&from)?.st_mode) == FileType::Directory {
                    return Err(Errno::PERM);
                }
                done(linkat(CWD, proc_path(&from), &to, name, AtFlags::SYMLINK_FOLLOW))
            }
            Op::Symlink(place, target) => {
                let (parent, name) = self.parent(place)?;
                done(symlinkat(*target, &parent, name))
            }
            Op::Readlink(place) => {
                let fd = self.walk(place)?;
                if FileType::from_raw_mode(fstat(&fd)?.st_mode) != FileType::Symlink {
                    return Err(Errno::INVAL);
                }
                Ok(format!("{:?}", readlinkat(&fd, "", Vec::new())?))
            }
            Op::Fifo(place) => {
                let (parent, name) = self.parent(place)?;
                done(mknodat(&parent, name, FileType::Fifo, Mode::from_raw_mode(0o640), 0))
            }
            Op::Stat(place) => Ok(show(&fstat(self.walk(place)?)?)),
            Op::Chmod(place, mode) => {
                let fd = self.walk(place)?;
                match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
                    // The kernel has no modes of links.
                    FileType::Symlink => Err(Errno::OPNOTSUPP),
                    _ => done(rustix::fs::chmod(proc_path(&fd), Mode::from_raw_mode(*mode))),
                }
            }
            Op::TruncateAt(place, size) => {
                let fd = self.walk(place)?;
                match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
                    FileType::Directory => Err(Errno::ISDIR),
                    FileType::RegularFile => {
                        let file = Self::reopen(&fd, OFlags::RDWR)?;
                        done(rustix::fs::ftruncate(&file, *size))
                    }
                    _ => Err(Errno::INVAL),
                }
            }
            Op::Times(place, sec, nsec) => {
                let time = Timespec { tv_sec: *sec, tv_nsec: *nsec };
                let times = Timestamps { last_access: time, last_modification: time };
                done(utimensat(CWD, proc_path(&self.walk(place)?), &times, AtFlags::empty()))
            }
            Op::List(place) => self.list(place),
            Op::SetXattr { .. } | Op::GetXattr(..) | Op::RemoveXattr(..) | Op::ListXattr(_) => self.xattr(op),
        }
    }
}
