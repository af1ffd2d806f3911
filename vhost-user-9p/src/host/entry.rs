//! Making, linking, renaming and removing directory entries.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, linkat, makedev, mkdirat, mknodat, openat, openat2,
    readlinkat, renameat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::idmap::GuestId;
use super::mapped::{self, MappedAttributes};
use super::name::Name;
use super::node::Node;
use super::open::{OpenFile, host_flags};
use super::proc_fd::ProcFd;
use super::stat::Stat;
use super::xattr::File;
use super::{Caller, SecurityModel};
use crate::protocol::{NO_UID, open_flag};

/// Bytes of the longest target of a symbolic link.
const MAX_TARGET: usize = 4096;

impl Node {
    /// Makes and opens a regular file in this directory. One that exists is opened, unless the flags say `O_EXCL`.
    pub fn create(
        self: &Arc<Self>,
        name: Name<'_>,
        flags: u32,
        mode: u32,
        caller: Caller,
    ) -> Result<(Arc<Self>, Stat, OpenFile), Errno> {
        let host = self.share().host();
        let open_flags = host_flags(flags, host.options().direct_io);
        let directory = self.file()?;
        host.act_as(caller)?;
        // A name that exists may be of a FIFO or a device, whose opening has effects: it is looked at first.
        let create = open_flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let permissions = self.host_mode(mode, libc::S_IFREG);
        let open = || openat(&*directory, name.as_bytes(), create, permissions);
        match host.descriptors().open(open) {
            Ok(file) => {
                let adopted = self.adopt(name, file.as_fd(), libc::S_IFREG | mode & 0o7777, None, caller);
                let (node, stat) = adopted?;
                Ok((node, stat, OpenFile::new(file, open_flags)))
            }
            Err(Errno::EXIST) if flags & open_flag::EXCLUSIVE == 0 => {
                let (node, _) = self.child(name)?;
                // It need not belong to whoever the directory belongs to.
                host.enter(caller, &[&node])?;
                let file = node.open_file(flags)?;
                // The file may have been cut.
                let stat = node.stat()?;
                Ok((node, stat, file))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a directory in this one.
    pub fn make_directory(
        self: &Arc<Self>,
        name: Name<'_>,
        mode: u32,
        caller: Caller,
    ) -> Result<Stat, Errno> {
        let directory = self.file()?;
        self.share().host().act_as(caller)?;
        mkdirat(&*directory, name.as_bytes(), self.host_mode(mode, libc::S_IFDIR))?;
        if !self.is_mapped() {
            return Ok(self.child(name)?.1);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&*directory, name.as_bytes(), flags, Mode::empty())?;
        Ok(self.adopt(name, file.as_fd(), libc::S_IFDIR | mode & 0o7777, None, caller)?.1)
    }

    /// Makes a symbolic link in this directory.
    pub fn make_symlink(
        self: &Arc<Self>,
        name: Name<'_>,
        target: &[u8],
        caller: Caller,
    ) -> Result<Stat, Errno> {
        match target {
            b"" => return Err(Errno::NOENT),
            _ if target.len() >= MAX_TARGET => return Err(Errno::NAMETOOLONG),
            _ => {}
        }
        if self.is_mapped() {
            return self.make_mapped(name, libc::S_IFLNK | 0o777, None, target, caller);
        }
        let directory = self.file()?;
        self.share().host().act_as(caller)?;
        symlinkat(target, &*directory, name.as_bytes())?;
        Ok(self.child(name)?.1)
    }

    /// Makes a FIFO, a socket, a device node or a regular file in this directory.
    pub fn make_node(
        self: &Arc<Self>,
        name: Name<'_>,
        mode: u32,
        (major, minor): (u32, u32),
        caller: Caller,
    ) -> Result<Stat, Errno> {
        let kind = match mode & libc::S_IFMT {
            0 => libc::S_IFREG,
            kind @ (libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR | libc::S_IFBLK) => kind,
            libc::S_IFDIR => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        };
        if self.is_mapped() {
            let device = matches!(kind, libc::S_IFCHR | libc::S_IFBLK).then_some((major, minor));
            return self.make_mapped(name, kind | mode & 0o7777, device, b"", caller);
        }
        let directory = self.file()?;
        self.share().host().act_as(caller)?;
        let permissions = self.host_mode(mode, kind);
        let device = makedev(major, minor);
        mknodat(&*directory, name.as_bytes(), FileType::from_raw_mode(kind), permissions, device)?;
        Ok(self.child(name)?.1)
    }

    /// Gives `file` the name `name` in this directory as well.
    pub fn make_link(self: &Arc<Self>, file: &Arc<Self>, name: Name<'_>) -> Result<(), Errno> {
        if file.is_dir() {
            return Err(Errno::PERM);
        }
        let (directory, target) = (self.file()?, file.file()?);
        match linkat(&*target, c"", &*directory, name.as_bytes(), AtFlags::EMPTY_PATH) {
            // The capability for that is missing.
            Err(Errno::NOENT) => {
                let proc = self.share().host().proc_fd();
                let number = ProcFd::name(target.as_fd());
                linkat(proc, number.as_c_str(), &*directory, name.as_bytes(), AtFlags::SYMLINK_FOLLOW)
            }
            result => result,
        }
    }

    /// Renames the entry `name` of this directory.
    pub fn rename(self: &Arc<Self>, name: Name<'_>, to: &Arc<Self>, new_name: Name<'_>) -> Result<(), Errno> {
        renameat(&*self.file()?, name.as_bytes(), &*to.file()?, new_name.as_bytes())
    }

    /// Removes the entry `name` of this directory.
    pub fn unlink(self: &Arc<Self>, name: Name<'_>, is_dir: bool) -> Result<(), Errno> {
        let flags = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        unlinkat(&*self.file()?, name.as_bytes(), flags)
    }

    /// The target of a symbolic link.
    pub fn read_link(self: &Arc<Self>) -> Result<Vec<u8>, Errno> {
        if self.kind() != libc::S_IFLNK {
            return Err(Errno::INVAL);
        }
        let file = self.file()?;
        match self.host_kind() {
            libc::S_IFLNK => readlinkat(&*file, c"", Vec::new()).map(std::ffi::CString::into_bytes),
            _ => mapped::read_target(self.share().host().proc_fd(), file.as_fd()),
        }
    }

    /// The directory that this file is in, and its name there, as the host sees it at this moment: for the messages of
    /// 9P2000 that name a file and not an entry. A file without a name is not found: `ENOENT`.
    pub fn locate(self: &Arc<Self>) -> Result<(Arc<Self>, Vec<u8>), Errno> {
        let path = self.share().path_of(self.file()?.as_fd())?;
        let (directory, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b""[..], &path[..]),
        };
        let directory = if directory.is_empty() { b"." } else { directory };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        let file = openat2(self.share().root(), directory, flags, Mode::empty(), resolve)?;
        let (directory, _) = Self::new(self.share(), file)?;
        let found = directory.child(Name::lookup(name)?)?.0;
        if found.is_same(self) { Ok((directory, name.to_vec())) } else { Err(Errno::NOENT) }
    }

    fn is_mapped(&self) -> bool {
        self.share().host().is_mapped()
    }

    /// The permissions that a new file of type `kind` has on the host.
    fn host_mode(&self, mode: u32, kind: u32) -> Mode {
        let options = self.share().host().options();
        let mode = match options.model {
            SecurityModel::MappedXattr if kind == libc::S_IFDIR => options.dmode,
            SecurityModel::MappedXattr => options.fmode,
            _ => mode & 0o7777,
        };
        Mode::from_raw_mode(mode)
    }

    /// Makes a regular file that stands for something else.
    fn make_mapped(
        self: &Arc<Self>,
        name: Name<'_>,
        mode: u32,
        device: Option<(u32, u32)>,
        content: &[u8],
        caller: Caller,
    ) -> Result<Stat, Errno> {
        let directory = self.file()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&*directory, name.as_bytes(), flags, self.host_mode(0, libc::S_IFREG))?;
        let written = rustix::io::pwrite(&file, content, 0);
        if written != Ok(content.len()) {
            // There is no other way to undo it; the first error is the one that counts.
            let _ = self.unlink(name, false);
            return Err(written.err().unwrap_or(Errno::NOSPC));
        }
        Ok(self.adopt(name, file.as_fd(), mode, device, caller)?.1)
    }

    /// Makes the entry `name`, which was just made and is open as `file`, a file of the share: with the attributes in
    /// place that the host does not keep. If that fails the entry is removed.
    fn adopt(
        self: &Arc<Self>,
        name: Name<'_>,
        file: std::os::fd::BorrowedFd<'_>,
        mode: u32,
        device: Option<(u32, u32)>,
        caller: Caller,
    ) -> Result<(Arc<Self>, Stat), Errno> {
        let adopt = || {
            let node = self.share().host().proc_fd().reopen(file, OFlags::PATH)?;
            if self.is_mapped() {
                let attributes = MappedAttributes {
                    uid: Some(GuestId(caller.uid)).filter(|_| caller.uid != NO_UID),
                    gid: Some(GuestId(caller.gid)),
                    mode: Some(mode),
                    rdev: device.map(|(major, minor)| makedev(major, minor)),
                };
                attributes.write(File::Path(self.share().host().proc_fd(), node.as_fd()))?;
            }
            Self::new(self.share(), node)
        };
        adopt().inspect_err(|_| {
            // There is no other way to undo it; the first error is the one that counts.
            let _ = self.unlink(name, mode & libc::S_IFMT == libc::S_IFDIR);
        })
    }
}
