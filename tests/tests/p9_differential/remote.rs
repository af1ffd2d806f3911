//! The operations by 9P, in the messages that Linux sends for them.

use rustix::io::Errno;
use tests::driver::ninep::flags::{self, REMOVEDIR};
use tests::driver::ninep::share::ROOT;
use tests::driver::ninep::wire::{SetAttr, Time};
use tests::driver::ninep::{Attr, Client};

use super::super::{Op, Outcome, SLOTS, Subject, content, describe};

/// A folder of a share and the files that are open in it.
pub struct Remote<'a> {
    client: &'a mut Client,
    top: u32,
    slots: [Option<u32>; SLOTS],
}

fn show(attr: &Attr) -> String {
    let mtime = Some((attr.mtime.sec as i64, attr.mtime.nsec as i64));
    describe(attr.mode, attr.nlink, attr.size, attr.uid, attr.gid, mtime)
}

fn done<T>(result: Result<T, Errno>) -> Outcome {
    result.map(|_| String::new())
}

impl<'a> Remote<'a> {
    pub fn new(client: &'a mut Client, name: &str) -> Result<Self, Errno> {
        let top = client.at_fid(ROOT, &[name])?;
        Ok(Self { client, top, slots: [None; SLOTS] })
    }

    /// Does something with a fid for what lies at `names`.
    fn with(&mut self, names: &[&str], act: impl FnOnce(&mut Self, u32) -> Outcome) -> Outcome {
        let fid = self.client.at_fid(self.top, names)?;
        let outcome = act(self, fid);
        self.client.clunk(fid)?;
        outcome
    }

    /// Does something with a fid for the directory of `place`, and the last name.
    fn parent(
        &mut self,
        place: &[&'static str],
        act: impl FnOnce(&mut Self, u32, &str) -> Outcome,
    ) -> Outcome {
        let (last, names) = place.split_last().expect("a place has a name");
        self.with(names, |this, fid| act(this, fid, last))
    }

    fn slot(&self, slot: usize) -> Result<u32, Errno> {
        self.slots[slot].ok_or(Errno::BADF)
    }

    fn fill(&mut self, slot: usize, fid: u32) -> Result<(), Errno> {
        match self.slots[slot].replace(fid) {
            Some(old) => self.client.clunk(old),
            None => Ok(()),
        }
    }

    fn create(&mut self, op: &Op) -> Outcome {
        let Op::Create { slot, place, exclusive, truncate, mode } = op else { unreachable!("a create") };
        let mut open = flags::RDWR | flags::CREATE;
        open |= if *exclusive { flags::EXCL } else { 0 };
        open |= if *truncate { flags::TRUNC } else { 0 };
        self.parent(place, |this, dfid, name| {
            let fid = this.client.clone_fid(dfid)?;
            if let Err(error) = this.client.lcreate(fid, name, open, *mode) {
                this.client.clunk(fid)?;
                return Err(error);
            }
            done(this.fill(*slot, fid))
        })
    }

    fn by_slot(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Close(slot) => {
                let fid = self.slots[*slot].take().ok_or(Errno::BADF)?;
                done(self.client.clunk(fid))
            }
            Op::Write { slot, offset, len } => {
                let fid = self.slot(*slot)?;
                Ok(format!("{} bytes", self.client.write(fid, *offset, &content(*offset, *len))?))
            }
            Op::Read { slot, offset, len } => {
                let fid = self.slot(*slot)?;
                Ok(format!("{:?}", self.client.read(fid, *offset, *len as u32)?))
            }
            Op::Truncate { slot, size } => {
                let fid = self.slot(*slot)?;
                done(self.client.truncate(fid, *size))
            }
            Op::StatOpen(slot) => {
                let fid = self.slot(*slot)?;
                Ok(show(&self.client.getattr(fid)?))
            }
            Op::ChmodOpen(slot, mode) => {
                let fid = self.slot(*slot)?;
                done(self.client.chmod(fid, *mode))
            }
            Op::Sync(slot) => {
                let fid = self.slot(*slot)?;
                done(self.client.fsync(fid, 0))
            }
            _ => unreachable!("an operation on an open file"),
        }
    }

    fn list(&mut self, place: &[&str]) -> Outcome {
        self.with(place, |this, fid| {
            this.client.lopen(fid, flags::RDONLY | flags::DIRECTORY)?;
            let mut names: Vec<_> = this
                .client
                .list(fid)?
                .into_iter()
                .map(|entry| {
                    let kind = match entry.kind {
                        1 => "Fifo",
                        4 => "Directory",
                        8 => "RegularFile",
                        10 => "Symlink",
                        _ => "another kind",
                    };
                    (entry.name, kind.to_owned())
                })
                .collect();
            names.sort();
            Ok(format!("{names:?}"))
        })
    }

    fn xattr(&mut self, op: &Op) -> Outcome {
        match op {
            Op::SetXattr { place, name, len, create, replace } => {
                let mut how = if *create { flags::XATTR_CREATE } else { 0 };
                how |= if *replace { flags::XATTR_REPLACE } else { 0 };
                self.with(place, |this, fid| done(this.client.set_xattr(fid, name, &content(0, *len), how)))
            }
            Op::GetXattr(place, name) => {
                self.with(place, |this, fid| Ok(format!("{:?}", this.client.xattr(fid, name)?)))
            }
            Op::RemoveXattr(place, name) => {
                self.with(place, |this, fid| done(this.client.remove_xattr(fid, name)))
            }
            Op::ListXattr(place) => {
                self.with(place, |this, fid| Ok(format!("{:?}", this.client.xattr(fid, "")?)))
            }
            _ => unreachable!("an operation on xattrs"),
        }
    }

    fn by_place(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Readlink(place) => self.with(place, |this, fid| {
                let target = this.client.readlink(fid)?;
                Ok(format!("{:?}", std::ffi::CString::new(target).expect("a target has no NUL")))
            }),
            Op::Stat(place) => self.with(place, |this, fid| Ok(show(&this.client.getattr(fid)?))),
            Op::Chmod(place, mode) => self.with(place, |this, fid| done(this.client.chmod(fid, *mode))),
            Op::TruncateAt(place, size) => {
                self.with(place, |this, fid| done(this.client.truncate(fid, *size)))
            }
            Op::Times(place, sec, nsec) => {
                let time = Time { sec: *sec as u64, nsec: *nsec as u64 };
                let valid = flags::SETATTR_ATIME
                    | flags::SETATTR_ATIME_SET
                    | flags::SETATTR_MTIME
                    | flags::SETATTR_MTIME_SET;
                let attr = SetAttr { valid, atime: time, mtime: time, ..SetAttr::default() };
                self.with(place, |this, fid| done(this.client.setattr(fid, attr)))
            }
            _ => unreachable!("an operation on a file by its place"),
        }
    }
}

impl Subject for Remote<'_> {
    fn apply(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Mkdir(place, mode) => {
                self.parent(place, |this, dfid, name| done(this.client.mkdir(dfid, name, *mode)))
            }
            Op::Create { .. } => self.create(op),
            Op::Open { slot, place, write, truncate, append } => {
                let mut open = if *write { flags::RDWR } else { flags::RDONLY };
                open |= if *truncate && *write { flags::TRUNC } else { 0 };
                open |= if *append { flags::APPEND } else { 0 };
                let fid = self.client.at_fid(self.top, place)?;
                if let Err(error) = self.client.lopen(fid, open) {
                    self.client.clunk(fid)?;
                    return Err(error);
                }
                done(self.fill(*slot, fid))
            }
            Op::Close(_)
            | Op::Write { .. }
            | Op::Read { .. }
            | Op::Truncate { .. }
            | Op::StatOpen(_)
            | Op::ChmodOpen(..)
            | Op::Sync(_) => self.by_slot(op),
            Op::Unlink(place) => {
                self.parent(place, |this, dfid, name| done(this.client.unlinkat(dfid, name, 0)))
            }
            Op::Rmdir(place) => {
                self.parent(place, |this, dfid, name| done(this.client.unlinkat(dfid, name, REMOVEDIR)))
            }
            Op::Rename(from, to) => self.parent(from, |this, from, old| {
                this.parent(to, |this, to, new| done(this.client.renameat(from, old, to, new)))
            }),
            Op::Link(from, to) => self.with(from, |this, fid| {
                this.parent(to, |this, dfid, name| done(this.client.link(dfid, fid, name)))
            }),
            Op::Symlink(place, target) => {
                self.parent(place, |this, dfid, name| done(this.client.symlink(dfid, name, target)))
            }
            Op::Fifo(place) => {
                self.parent(place, |this, dfid, name| done(this.client.mknod(dfid, name, 0o010_640, (0, 0))))
            }
            Op::List(place) => self.list(place),
            Op::SetXattr { .. } | Op::GetXattr(..) | Op::RemoveXattr(..) | Op::ListXattr(_) => self.xattr(op),
            Op::Readlink(_) | Op::Stat(_) | Op::Chmod(..) | Op::TruncateAt(..) | Op::Times(..) => {
                self.by_place(op)
            }
        }
    }
}

impl Drop for Remote<'_> {
    fn drop(&mut self) {
        for fid in self.slots.into_iter().flatten().chain([self.top]) {
            // A fid that is gone already is a failure that was seen before.
            let _ = self.client.clunk(fid);
        }
    }
}
