//! A function for each message, and the small sequences of them that every client has.

use rustix::io::Errno;

use super::client::Client;
use super::flags::{self, GETATTR_ALL, NO_FID, NO_UNAME};
use super::message::{R, T};
use super::share::ROOT;
use super::wire::{Attr, Data, Dirent, Lock, Qid, SetAttr, Statfs, dirents};

/// The error that an `Rlerror` has.
pub fn errno(ecode: u32) -> Errno {
    assert!((1..4096).contains(&ecode), "Rlerror has the error {ecode}");
    Errno::from_raw_os_error(ecode as i32)
}

/// Sends a request, and takes the value out of the reply.
macro_rules! call {
    ($client:expr, $request:expr, $reply:pat => $value:expr) => {{
        let request = $request;
        let reply = $client.call(&request);
        match reply.message() {
            $reply => Ok($value),
            R::Lerror { ecode } => Err(errno(ecode)),
            other => panic!("{request:?} was answered by {other:?}"),
        }
    }};
}

impl Client {
    /// A fid that was not used before.
    pub fn new_fid(&mut self) -> u32 {
        self.next_fid += 1;
        self.next_fid - 1
    }

    /// `Tversion` for 9P2000.L: the msize and the version.
    pub fn version(&mut self, msize: u32) -> Result<(u32, Vec<u8>), Errno> {
        self.version_as(msize, flags::VERSION)
    }

    /// `Tversion`.
    pub fn version_as(&mut self, msize: u32, version: &[u8]) -> Result<(u32, Vec<u8>), Errno> {
        let result: Result<(u32, Vec<u8>), Errno> = call!(
            self,
            T::Version { msize, version },
            R::Version { msize, version } => (msize, version.to_vec())
        );
        if let Ok((msize, _)) = result {
            self.msize = msize;
        }
        result
    }

    /// `Tauth`.
    pub fn auth(&mut self, afid: u32, uname: &[u8], aname: &[u8]) -> Result<Qid, Errno> {
        call!(self, T::Auth { afid, uname, aname, n_uname: NO_UNAME }, R::Auth { aqid } => aqid)
    }

    /// `Tattach` as Linux's first one.
    pub fn attach(&mut self, fid: u32, aname: &[u8]) -> Result<Qid, Errno> {
        self.attach_as(fid, b"nobody", aname, NO_UNAME)
    }

    /// `Tattach`.
    pub fn attach_as(&mut self, fid: u32, uname: &[u8], aname: &[u8], n_uname: u32) -> Result<Qid, Errno> {
        call!(self, T::Attach { fid, afid: NO_FID, uname, aname, n_uname }, R::Attach { qid } => qid)
    }

    /// `Twalk`.
    pub fn walk<N: AsRef<[u8]>>(&mut self, fid: u32, newfid: u32, names: &[N]) -> Result<Vec<Qid>, Errno> {
        let names = names.iter().map(AsRef::as_ref).collect();
        call!(self, T::Walk { fid, newfid, names }, R::Walk { qids } => qids)
    }

    /// `Twalk` of no name: a new fid for the same file.
    pub fn clone_fid(&mut self, fid: u32) -> Result<u32, Errno> {
        let newfid = self.new_fid();
        let qids = self.walk::<&[u8]>(fid, newfid, &[])?;
        assert_eq!(qids, [], "a clone has no qids");
        Ok(newfid)
    }

    /// A new fid for what lies below `fid`, name by name.
    pub fn at_fid<N: AsRef<[u8]>>(&mut self, fid: u32, names: &[N]) -> Result<u32, Errno> {
        let newfid = self.clone_fid(fid)?;
        for name in names {
            if let Err(error) = self.walk(newfid, newfid, &[name]) {
                self.clunk(newfid)?;
                return Err(error);
            }
        }
        Ok(newfid)
    }

    /// A new fid for what lies below [`ROOT`], at a path of names with `/` between them.
    pub fn at(&mut self, path: impl AsRef<[u8]>) -> Result<u32, Errno> {
        let path = path.as_ref();
        let names: Vec<&[u8]> = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()).collect();
        self.at_fid(ROOT, &names)
    }

    /// `Tlopen`: the qid and the iounit.
    pub fn lopen(&mut self, fid: u32, flags: u32) -> Result<(Qid, u32), Errno> {
        call!(self, T::Lopen { fid, flags }, R::Lopen { qid, iounit } => (qid, iounit))
    }

    /// A new fid for the file at a path, opened.
    pub fn open(&mut self, path: impl AsRef<[u8]>, flags: u32) -> Result<u32, Errno> {
        let fid = self.at(path)?;
        if let Err(error) = self.lopen(fid, flags) {
            self.clunk(fid)?;
            return Err(error);
        }
        Ok(fid)
    }

    /// `Tlcreate`: the qid and the iounit.
    pub fn lcreate(
        &mut self,
        fid: u32,
        name: impl AsRef<[u8]>,
        flags: u32,
        mode: u32,
    ) -> Result<(Qid, u32), Errno> {
        let request = T::Lcreate { fid, name: name.as_ref(), flags, mode, gid: self.gid };
        call!(self, request, R::Lcreate { qid, iounit } => (qid, iounit))
    }

    /// A new fid for a new file in the directory `dfid`, open for reading and writing.
    pub fn create(&mut self, dfid: u32, name: impl AsRef<[u8]>, mode: u32) -> Result<u32, Errno> {
        let fid = self.clone_fid(dfid)?;
        if let Err(error) = self.lcreate(fid, name, flags::RDWR | flags::CREATE | flags::EXCL, mode) {
            self.clunk(fid)?;
            return Err(error);
        }
        Ok(fid)
    }

    /// `Tsymlink`.
    pub fn symlink(
        &mut self,
        dfid: u32,
        name: impl AsRef<[u8]>,
        target: impl AsRef<[u8]>,
    ) -> Result<Qid, Errno> {
        let request = T::Symlink { dfid, name: name.as_ref(), target: target.as_ref(), gid: self.gid };
        call!(self, request, R::Symlink { qid } => qid)
    }

    /// `Tmknod`, with the device's major and minor number.
    pub fn mknod(
        &mut self,
        dfid: u32,
        name: impl AsRef<[u8]>,
        mode: u32,
        (major, minor): (u32, u32),
    ) -> Result<Qid, Errno> {
        let request = T::Mknod { dfid, name: name.as_ref(), mode, major, minor, gid: self.gid };
        call!(self, request, R::Mknod { qid } => qid)
    }

    /// `Trename`.
    pub fn rename(&mut self, fid: u32, dfid: u32, name: impl AsRef<[u8]>) -> Result<(), Errno> {
        call!(self, T::Rename { fid, dfid, name: name.as_ref() }, R::Rename {} => ())
    }

    /// `Treadlink`.
    pub fn readlink(&mut self, fid: u32) -> Result<Vec<u8>, Errno> {
        call!(self, T::Readlink { fid }, R::Readlink { target } => target.to_vec())
    }

    /// `Tgetattr` of all attributes.
    pub fn getattr(&mut self, fid: u32) -> Result<Attr, Errno> {
        self.getattr_of(fid, GETATTR_ALL)
    }

    /// `Tgetattr`.
    pub fn getattr_of(&mut self, fid: u32, mask: u64) -> Result<Attr, Errno> {
        call!(self, T::Getattr { fid, mask }, R::Getattr { attr } => attr)
    }

    /// The attributes of what lies at a path.
    pub fn stat(&mut self, path: impl AsRef<[u8]>) -> Result<Attr, Errno> {
        let fid = self.at(path)?;
        let attr = self.getattr(fid);
        self.clunk(fid)?;
        attr
    }

    /// `Tsetattr`.
    pub fn setattr(&mut self, fid: u32, attr: SetAttr) -> Result<(), Errno> {
        call!(self, T::Setattr { fid, attr }, R::Setattr {} => ())
    }

    /// `Tsetattr` of the mode.
    pub fn chmod(&mut self, fid: u32, mode: u32) -> Result<(), Errno> {
        self.setattr(fid, SetAttr { valid: flags::SETATTR_MODE, mode, ..SetAttr::default() })
    }

    /// `Tsetattr` of owner and group.
    pub fn chown(&mut self, fid: u32, uid: u32, gid: u32) -> Result<(), Errno> {
        let valid = flags::SETATTR_UID | flags::SETATTR_GID;
        self.setattr(fid, SetAttr { valid, uid, gid, ..SetAttr::default() })
    }

    /// `Tsetattr` of the size.
    pub fn truncate(&mut self, fid: u32, size: u64) -> Result<(), Errno> {
        self.setattr(fid, SetAttr { valid: flags::SETATTR_SIZE, size, ..SetAttr::default() })
    }

    /// `Txattrwalk`: the value's size.
    pub fn xattrwalk(&mut self, fid: u32, newfid: u32, name: impl AsRef<[u8]>) -> Result<u64, Errno> {
        call!(self, T::Xattrwalk { fid, newfid, name: name.as_ref() }, R::Xattrwalk { size } => size)
    }

    /// The value of an extended attribute, or the list of all names for the name "".
    pub fn xattr(&mut self, fid: u32, name: impl AsRef<[u8]>) -> Result<Vec<u8>, Errno> {
        let newfid = self.new_fid();
        let size = self.xattrwalk(fid, newfid, name)?;
        let value = self.read_full(newfid, size as usize);
        self.clunk(newfid)?;
        value
    }

    /// `Txattrcreate`.
    pub fn xattrcreate(
        &mut self,
        fid: u32,
        name: impl AsRef<[u8]>,
        size: u64,
        flags: u32,
    ) -> Result<(), Errno> {
        call!(self, T::Xattrcreate { fid, name: name.as_ref(), size, flags }, R::Xattrcreate {} => ())
    }

    /// Sets an extended attribute, by a fid of its own.
    pub fn set_xattr(
        &mut self,
        fid: u32,
        name: impl AsRef<[u8]>,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        let newfid = self.clone_fid(fid)?;
        let result = self.xattrcreate(newfid, name, value.len() as u64, flags).and_then(|()| {
            let mut done = 0;
            while done < value.len() {
                let end = value.len().min(done + self.max_io() as usize);
                done += self.write(newfid, done as u64, &value[done..end])? as usize;
            }
            Ok(())
        });
        let clunked = self.clunk(newfid);
        result.and(clunked)
    }

    /// Removes an extended attribute as Linux does.
    pub fn remove_xattr(&mut self, fid: u32, name: impl AsRef<[u8]>) -> Result<(), Errno> {
        self.set_xattr(fid, name, b"", flags::XATTR_REPLACE)
    }

    /// `Treaddir`.
    pub fn readdir(&mut self, fid: u32, offset: u64, count: u32) -> Result<Vec<Dirent>, Errno> {
        call!(
            self,
            T::Readdir { fid, offset, count },
            R::Readdir { data } => dirents(data.0).expect("whole entries in an Rreaddir")
        )
    }

    /// All entries of an open directory, `.` and `..` included.
    pub fn list(&mut self, fid: u32) -> Result<Vec<Dirent>, Errno> {
        let mut all = Vec::new();
        let mut offset = 0;
        loop {
            let entries = self.readdir(fid, offset, self.max_io())?;
            let Some(last) = entries.last() else {
                return Ok(all);
            };
            offset = last.offset;
            all.extend(entries);
        }
    }

    /// `Tfsync`.
    pub fn fsync(&mut self, fid: u32, datasync: u32) -> Result<(), Errno> {
        call!(self, T::Fsync { fid, datasync }, R::Fsync {} => ())
    }

    /// `Tlock`: the status.
    pub fn lock(&mut self, fid: u32, lock: &Lock, flags: u32) -> Result<u8, Errno> {
        call!(self, lock_request(fid, lock, flags), R::Lock { status } => status)
    }

    /// `Tgetlock`.
    pub fn getlock(&mut self, fid: u32, lock: &Lock) -> Result<Lock, Errno> {
        call!(self, T::Getlock { fid, lock: lock.clone() }, R::Getlock { lock } => lock)
    }

    /// `Tlink`.
    pub fn link(&mut self, dfid: u32, fid: u32, name: impl AsRef<[u8]>) -> Result<(), Errno> {
        call!(self, T::Link { dfid, fid, name: name.as_ref() }, R::Link {} => ())
    }

    /// `Tmkdir`.
    pub fn mkdir(&mut self, dfid: u32, name: impl AsRef<[u8]>, mode: u32) -> Result<Qid, Errno> {
        call!(self, T::Mkdir { dfid, name: name.as_ref(), mode, gid: self.gid }, R::Mkdir { qid } => qid)
    }

    /// `Trenameat`.
    pub fn renameat(
        &mut self,
        olddirfid: u32,
        oldname: impl AsRef<[u8]>,
        newdirfid: u32,
        newname: impl AsRef<[u8]>,
    ) -> Result<(), Errno> {
        let (oldname, newname) = (oldname.as_ref(), newname.as_ref());
        call!(self, T::Renameat { olddirfid, oldname, newdirfid, newname }, R::Renameat {} => ())
    }

    /// `Tunlinkat`.
    pub fn unlinkat(&mut self, dirfid: u32, name: impl AsRef<[u8]>, flags: u32) -> Result<(), Errno> {
        call!(self, T::Unlinkat { dirfid, name: name.as_ref(), flags }, R::Unlinkat {} => ())
    }

    /// `Tread`.
    pub fn read(&mut self, fid: u32, offset: u64, count: u32) -> Result<Vec<u8>, Errno> {
        call!(self, T::Read { fid, offset, count }, R::Read { data } => data.0.to_vec())
    }

    /// Reads from the start on: `most` bytes, or less if the file ends before.
    pub fn read_full(&mut self, fid: u32, most: usize) -> Result<Vec<u8>, Errno> {
        let mut all = Vec::new();
        while all.len() < most {
            let count = self.max_io().min((most - all.len()) as u32);
            let more = self.read(fid, all.len() as u64, count)?;
            if more.is_empty() {
                break;
            }
            all.extend(more);
        }
        Ok(all)
    }

    /// `Twrite`: how many bytes were written.
    pub fn write(&mut self, fid: u32, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        call!(self, T::Write { fid, offset, data: Data(data) }, R::Write { count } => count)
    }

    /// `Tclunk`.
    pub fn clunk(&mut self, fid: u32) -> Result<(), Errno> {
        call!(self, T::Clunk { fid }, R::Clunk {} => ())
    }

    /// `Tremove`.
    pub fn remove(&mut self, fid: u32) -> Result<(), Errno> {
        call!(self, T::Remove { fid }, R::Remove {} => ())
    }

    /// `Tstatfs`.
    pub fn statfs(&mut self, fid: u32) -> Result<Statfs, Errno> {
        call!(self, T::Statfs { fid }, R::Statfs { statfs } => statfs)
    }

    /// `Tflush`.
    pub fn flush(&mut self, oldtag: u16) -> Result<(), Errno> {
        call!(self, T::Flush { oldtag }, R::Flush {} => ())
    }

    /// The longest read or write that Linux would send when the server does not say.
    pub fn max_io(&self) -> u32 {
        self.msize - flags::IO_HEADER_LEN
    }
}

/// A `Tlock` for the range of `lock`.
pub fn lock_request(fid: u32, lock: &Lock, flags: u32) -> T<'_> {
    let Lock { kind, start, length, proc_id, client_id } = lock;
    T::Lock { fid, kind: *kind, flags, start: *start, length: *length, proc_id: *proc_id, client_id }
}
