//! Fields as bytes: all numbers are little-endian, a string has its length in two bytes before it.

use std::fmt;

/// What a message is decoded from.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from the start on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (now, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(now)
    }

    /// The next field.
    pub fn get<F: Field<'a>>(&mut self) -> Option<F> {
        F::get(self)
    }
}

/// What a message is made of.
pub trait Field<'a>: Sized {
    /// Appends the field's bytes.
    fn put(&self, out: &mut Vec<u8>);
    /// Takes the field; `None` if it is cut off.
    fn get(reader: &mut Reader<'a>) -> Option<Self>;
}

macro_rules! numbers {
    ($($number:ty)*) => {$(
        impl Field<'_> for $number {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }

            fn get(reader: &mut Reader<'_>) -> Option<Self> {
                Some(Self::from_le_bytes(*reader.take(size_of::<Self>())?.first_chunk()?))
            }
        }
    )*};
}

numbers!(u8 u16 u32 u64);

/// A string, `len[2] bytes[len]`. Names are bytes, whatever they mean.
impl<'a> Field<'a> for &'a [u8] {
    fn put(&self, out: &mut Vec<u8>) {
        let len = u16::try_from(self.len()).expect("a string has at most 65,535 bytes");
        len.put(out);
        out.extend(*self);
    }

    fn get(reader: &mut Reader<'a>) -> Option<Self> {
        let len = reader.get::<u16>()?;
        reader.take(len.into())
    }
}

/// The names of a `Twalk`, `count[2] count*(name[s])`.
impl<'a> Field<'a> for Vec<&'a [u8]> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u16).put(out);
        for name in self {
            name.put(out);
        }
    }

    fn get(reader: &mut Reader<'a>) -> Option<Self> {
        let count = reader.get::<u16>()?;
        (0..count).map(|_| reader.get()).collect()
    }
}

/// The qids of an `Rwalk`, `count[2] count*(qid[13])`.
impl Field<'_> for Vec<Qid> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u16).put(out);
        for qid in self {
            qid.put(out);
        }
    }

    fn get(reader: &mut Reader<'_>) -> Option<Self> {
        let count = reader.get::<u16>()?;
        (0..count).map(|_| reader.get()).collect()
    }
}

/// The data of a read or write, `count[4] data[count]`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Data<'a>(pub &'a [u8]);

impl fmt::Debug for Data<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl<'a> Field<'a> for Data<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.0.len() as u32).put(out);
        out.extend(self.0);
    }

    fn get(reader: &mut Reader<'a>) -> Option<Self> {
        let len = reader.get::<u32>()?;
        reader.take(len as usize).map(Self)
    }
}

/// Fields one behind the other.
macro_rules! record {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $kind,)*
        }

        impl Field<'_> for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }

            fn get(reader: &mut Reader<'_>) -> Option<Self> {
                Some(Self { $($field: reader.get()?,)* })
            }
        }
    };
}

record! {
    /// What names a file, `type[1] version[4] path[8]`.
    Qid {
        /// The kind of file, such as [`super::flags::QTDIR`].
        kind: u8,
        /// Changes with the file's content.
        version: u32,
        /// Differs for any two files.
        path: u64,
    }
}

record! {
    /// A point in time.
    Time {
        /// Seconds since 1970.
        sec: u64,
        /// And nanoseconds.
        nsec: u64,
    }
}

record! {
    /// The answer to a `Tgetattr`.
    Attr {
        /// Which of these fields mean something, such as [`super::flags::GETATTR_BASIC`].
        valid: u64,
        /// Which file it is.
        qid: Qid,
        /// Type and permissions.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Number of names.
        nlink: u64,
        /// The device of a device node.
        rdev: u64,
        /// In bytes.
        size: u64,
        /// The best length of reads and writes.
        blksize: u64,
        /// Space on the disk, in units of 512 bytes.
        blocks: u64,
        /// Last access.
        atime: Time,
        /// Last change of the content.
        mtime: Time,
        /// Last change of attributes.
        ctime: Time,
        /// Birth.
        btime: Time,
        /// The generation.
        generation: u64,
        /// The version of the content.
        data_version: u64,
    }
}

record! {
    /// What a `Tsetattr` sets.
    SetAttr {
        /// Which of these fields are meant, such as [`super::flags::SETATTR_MODE`].
        valid: u32,
        /// Permissions.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// In bytes.
        size: u64,
        /// Last access.
        atime: Time,
        /// Last change of the content.
        mtime: Time,
    }
}

record! {
    /// The answer to a `Tstatfs`.
    Statfs {
        /// The file system's magic number.
        kind: u32,
        /// The unit of the numbers of blocks.
        bsize: u32,
        /// All blocks.
        blocks: u64,
        /// Free blocks.
        bfree: u64,
        /// Free blocks for ordinary users.
        bavail: u64,
        /// All inodes.
        files: u64,
        /// Free inodes.
        ffree: u64,
        /// The file system's id.
        fsid: u64,
        /// The longest name.
        namelen: u32,
    }
}

/// A byte range and whose it is: `Tgetlock`, its answer, and most of a `Tlock`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lock {
    /// Such as [`super::flags::LOCK_WRLCK`].
    pub kind: u8,
    /// The first byte.
    pub start: u64,
    /// The number of bytes; 0: to the end.
    pub length: u64,
    /// The client's process.
    pub proc_id: u32,
    /// The client's name.
    pub client_id: Vec<u8>,
}

impl Field<'_> for Lock {
    fn put(&self, out: &mut Vec<u8>) {
        self.kind.put(out);
        self.start.put(out);
        self.length.put(out);
        self.proc_id.put(out);
        self.client_id.as_slice().put(out);
    }

    fn get(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            kind: reader.get()?,
            start: reader.get()?,
            length: reader.get()?,
            proc_id: reader.get()?,
            client_id: Vec::from(<&[u8]>::get(reader)?),
        })
    }
}

/// An entry of a directory, `qid[13] offset[8] type[1] name[s]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// Which file it is.
    pub qid: Qid,
    /// Where the next entry is.
    pub offset: u64,
    /// `DT_REG` and its like.
    pub kind: u8,
    /// The name.
    pub name: Vec<u8>,
}

impl Field<'_> for Dirent {
    fn put(&self, out: &mut Vec<u8>) {
        self.qid.put(out);
        self.offset.put(out);
        self.kind.put(out);
        self.name.as_slice().put(out);
    }

    fn get(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            qid: reader.get()?,
            offset: reader.get()?,
            kind: reader.get()?,
            name: Vec::from(<&[u8]>::get(reader)?),
        })
    }
}

/// The entries of an `Rreaddir`; `None` if the last one is cut off.
pub fn dirents(data: &[u8]) -> Option<Vec<Dirent>> {
    let mut reader = Reader::new(data);
    let mut entries = Vec::new();
    while reader.remaining() > 0 {
        entries.push(reader.get()?);
    }
    Some(entries)
}
