//! Tgetattr and Tsetattr.
#![expect(
    clippy::unused_self,
    reason = "requests are methods of the session, even those that need nothing of it"
)]

use rustix::io::Errno;

use super::fid::{Fid, Role};
use super::session::Session;
use crate::host::stat::Timestamp;
use crate::protocol::{Attributes, GetattrMask, Reply, SetAttributes, Time, kind};

impl Session {
    pub(super) fn getattr(&self, fid: &Fid, mask: u64, reply: &mut Reply) -> Result<(), Errno> {
        let stat = fid.node.stat()?;
        let host = fid.node.share().host();
        let asked = GetattrMask::from_bits_truncate(mask);
        let mut valid = GetattrMask::BASIC;
        // Hosts do not tell the generation of an inode cheaply. The time of its creation does as well: an inode number
        // that is used again comes with another one.
        valid |= asked & (GetattrMask::BTIME | GetattrMask::GEN);
        if stat.btime.is_none() {
            valid -= GetattrMask::BTIME | GetattrMask::GEN;
        }
        let btime = stat.btime.unwrap_or_default();
        let attributes = Attributes {
            valid,
            qid: host.qids().qid(&stat),
            mode: stat.mode,
            uid: host.guest_uid(stat.uid),
            gid: host.guest_gid(stat.gid),
            nlink: stat.nlink,
            rdev: encode_device(stat.rdev),
            size: stat.size,
            blksize: u64::from(self.iounit()).max(4096),
            blocks: stat.blocks,
            atime: time(stat.atime),
            mtime: time(stat.mtime),
            ctime: time(stat.ctime),
            btime: time(btime),
            generation: (btime.sec as u64) << 30 ^ u64::from(btime.nsec),
            data_version: 0,
        };
        reply.begin(kind::TGETATTR).attributes(&attributes);
        Ok(())
    }

    pub(super) fn setattr(
        &self,
        fid: &Fid,
        attributes: &SetAttributes,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let open = match &fid.role {
            Role::File(opened) if opened.file.check_writable().is_ok() => Some(opened.file.file()),
            _ => None,
        };
        fid.node.set_attributes(attributes, open, Self::caller(fid, 0))?;
        reply.begin(kind::TSETATTR);
        Ok(())
    }
}

fn time(time: Timestamp) -> Time {
    Time { sec: time.sec as u64, nsec: time.nsec.into() }
}

/// A device number as the kernel passes it to programs (`new_encode_dev`).
fn encode_device((major, minor): (u32, u32)) -> u64 {
    u64::from(minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12)
}
