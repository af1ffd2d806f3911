//! Changing attributes.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chownat, ftruncate,
    utimensat,
};
use rustix::io::Errno;

use super::Caller;
use super::idmap::GuestId;
use super::mapped::MappedAttributes;
use super::node::Node;
use super::xattr::File;
use crate::protocol::{NO_UID, SetAttributes, SetattrMask, Time};

impl Node {
    /// Changes what `attributes` names. `open` is the file open for writing, if the client has it so.
    ///
    /// In the order in which none undoes another: a change of size or owner clears setuid bits and changes times.
    pub fn set_attributes(
        self: &Arc<Self>,
        attributes: &SetAttributes,
        open: Option<BorrowedFd<'_>>,
        caller: Caller,
    ) -> Result<(), Errno> {
        let valid = attributes.valid;
        let file = self.file()?;
        if valid.contains(SetattrMask::SIZE) {
            self.truncate(attributes.size, open, caller)?;
        }
        if valid.intersects(SetattrMask::UID | SetattrMask::GID) {
            let id = |mask, id| valid.contains(mask).then_some(id).filter(|id| *id != NO_UID);
            let (uid, gid) = (id(SetattrMask::UID, attributes.uid), id(SetattrMask::GID, attributes.gid));
            self.change_owner(uid, gid, caller)?;
        }
        if valid.contains(SetattrMask::MODE) {
            self.change_mode(attributes.mode)?;
        }
        if valid.intersects(SetattrMask::ATIME | SetattrMask::MTIME) {
            let time = |now, set, time: Time| match (valid.contains(now), valid.contains(set)) {
                (false, _) => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }),
                (true, false) => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }),
                (true, true) if time.nsec >= 1_000_000_000 => Err(Errno::INVAL),
                (true, true) => Ok(Timespec { tv_sec: time.sec as i64, tv_nsec: time.nsec as _ }),
            };
            let times = Timestamps {
                last_access: time(SetattrMask::ATIME, SetattrMask::ATIME_SET, attributes.atime)?,
                last_modification: time(SetattrMask::MTIME, SetattrMask::MTIME_SET, attributes.mtime)?,
            };
            utimensat(&*file, c"", &times, AtFlags::EMPTY_PATH)?;
        } else if valid == SetattrMask::CTIME {
            // The host keeps it by itself; this makes it do so.
            chownat(&*file, c"", None, None, AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    }

    fn truncate(
        self: &Arc<Self>,
        size: u64,
        open: Option<BorrowedFd<'_>>,
        caller: Caller,
    ) -> Result<(), Errno> {
        match self.kind() {
            libc::S_IFDIR => return Err(Errno::ISDIR),
            libc::S_IFREG => {}
            _ => return Err(Errno::INVAL),
        }
        self.share().host().act_for(caller)?;
        match open {
            Some(file) => ftruncate(file, size),
            None => ftruncate(self.open(OFlags::WRONLY)?, size),
        }
    }

    fn change_owner(
        self: &Arc<Self>,
        uid: Option<u32>,
        gid: Option<u32>,
        caller: Caller,
    ) -> Result<(), Errno> {
        let host = self.share().host();
        let file = self.file()?;
        if host.is_mapped() {
            let stat = self.stat()?;
            // As the host does for its own: whoever owns the file now did not give it these bits.
            let executable = stat.mode & 0o111 != 0 && !self.is_dir();
            let clear = if executable { libc::S_ISUID | libc::S_ISGID } else { 0 };
            let mode = (stat.mode & clear != 0).then_some(stat.mode & !clear);
            let (uid, gid) = (uid.map(GuestId), gid.map(GuestId));
            return MappedAttributes { uid, gid, mode, rdev: None }
                .write(File::Path(host.proc_fd(), file.as_fd()));
        }
        let uid = uid.map(|uid| host.host_uid(uid)).transpose()?.map(Uid::from_raw);
        let gid = gid.map(|gid| host.host_gid(gid)).transpose()?.map(Gid::from_raw);
        // Whether set-group-ID bits stay depends on who asks.
        host.act_for(caller)?;
        chownat(&*file, c"", uid, gid, AtFlags::EMPTY_PATH)
    }

    fn change_mode(self: &Arc<Self>, mode: u32) -> Result<(), Errno> {
        let host = self.share().host();
        let file = self.file()?;
        if host.is_mapped() {
            let mode = Some(self.kind() | mode & 0o7777);
            let attributes = MappedAttributes { mode, ..MappedAttributes::default() };
            return attributes.write(File::Path(host.proc_fd(), file.as_fd()));
        }
        if mode & libc::S_ISGID != 0 {
            host.act_for_mode()?;
        }
        host.proc_fd().chmod(file.as_fd(), Mode::from_raw_mode(mode & 0o7777))
    }
}
