//! Tsymlink, Tmknod, Tmkdir, Tlink, Trename, Trenameat, Tunlinkat, Tremove, Treadlink: the entries of directories.
#![expect(
    clippy::unused_self,
    reason = "requests are methods of the session, even those that need nothing of it"
)]

use rustix::io::Errno;

use super::fid::Fid;
use super::session::Session;
use crate::host::Name;
use crate::protocol::{Reply, UNLINK_DIRECTORY, kind};

impl Session {
    pub(super) fn symlink(
        &self,
        directory: &Fid,
        name: &[u8],
        target: &[u8],
        gid: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let caller = Self::caller(directory, gid);
        let stat = directory.node.make_symlink(Name::create(name)?, target, caller)?;
        reply.begin(kind::TSYMLINK).qid(Self::qid(directory, &stat));
        Ok(())
    }

    pub(super) fn mknod(
        &self,
        directory: &Fid,
        name: &[u8],
        mode: u32,
        device: (u32, u32),
        gid: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let caller = Self::caller(directory, gid);
        let stat = directory.node.make_node(Name::create(name)?, mode, device, caller)?;
        reply.begin(kind::TMKNOD).qid(Self::qid(directory, &stat));
        Ok(())
    }

    pub(super) fn mkdir(
        &self,
        directory: &Fid,
        name: &[u8],
        mode: u32,
        gid: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let caller = Self::caller(directory, gid);
        let stat = directory.node.make_directory(Name::create(name)?, mode, caller)?;
        reply.begin(kind::TMKDIR).qid(Self::qid(directory, &stat));
        Ok(())
    }

    pub(super) fn link(
        &self,
        directory: &Fid,
        file: &Fid,
        name: &[u8],
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        directory.node.make_link(&file.node, Name::create(name)?)?;
        reply.begin(kind::TLINK);
        Ok(())
    }

    /// Trename: the file, wherever it is, gets this name in that directory.
    pub(super) fn rename(&self, file: &Fid, to: &Fid, name: &[u8], reply: &mut Reply) -> Result<(), Errno> {
        let new_name = Name::remove(name)?;
        let (directory, old_name) = file.node.locate()?;
        directory.rename(Name::remove(&old_name)?, &to.node, new_name)?;
        reply.begin(kind::TRENAME);
        Ok(())
    }

    pub(super) fn renameat(
        &self,
        (from, old_name): (&Fid, &[u8]),
        (to, new_name): (&Fid, &[u8]),
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        from.node.rename(Name::remove(old_name)?, &to.node, Name::remove(new_name)?)?;
        reply.begin(kind::TRENAMEAT);
        Ok(())
    }

    pub(super) fn unlinkat(
        &self,
        directory: &Fid,
        name: &[u8],
        flags: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        if flags & !UNLINK_DIRECTORY != 0 {
            return Err(Errno::INVAL);
        }
        directory.node.unlink(Name::remove(name)?, flags & UNLINK_DIRECTORY != 0)?;
        reply.begin(kind::TUNLINKAT);
        Ok(())
    }

    /// Tremove: the fid is gone already, whether this works or not.
    pub(super) fn remove(&self, file: &Fid, reply: &mut Reply) -> Result<(), Errno> {
        let (directory, name) = file.node.locate()?;
        directory.unlink(Name::remove(&name)?, file.node.is_dir())?;
        reply.begin(kind::TREMOVE);
        Ok(())
    }

    pub(super) fn readlink(&self, file: &Fid, reply: &mut Reply) -> Result<(), Errno> {
        let target = file.node.read_link()?;
        reply.begin(kind::TREADLINK).string(&target);
        Ok(())
    }
}
