//! Decoding of T-messages.

use thiserror::Error;

use super::{HEADER_SIZE, LockRange, MAX_WALK, SetAttributes, SetattrMask, Time, WRITE_HEADER_SIZE, kind};

#[cfg(test)]
mod tests;

/// What a client asks for. Strings are borrowed from the message and hold any bytes.
///
/// The field names are those of the protocol's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "variants and fields are those of the protocol")]
pub enum Request<'a> {
    Version {
        msize: u32,
        version: &'a [u8],
    },
    Auth {
        afid: u32,
        uname: &'a [u8],
        aname: &'a [u8],
        n_uname: u32,
    },
    Attach {
        fid: u32,
        afid: u32,
        uname: &'a [u8],
        aname: &'a [u8],
        n_uname: u32,
    },
    Flush {
        oldtag: u16,
    },
    Walk {
        fid: u32,
        newfid: u32,
        names: Names<'a>,
    },
    Read {
        fid: u32,
        offset: u64,
        count: u32,
    },
    /// Its data follows in the message and is not part of this.
    Write {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Clunk {
        fid: u32,
    },
    Remove {
        fid: u32,
    },
    Statfs {
        fid: u32,
    },
    Lopen {
        fid: u32,
        flags: u32,
    },
    Lcreate {
        fid: u32,
        name: &'a [u8],
        flags: u32,
        mode: u32,
        gid: u32,
    },
    Symlink {
        dfid: u32,
        name: &'a [u8],
        target: &'a [u8],
        gid: u32,
    },
    Mknod {
        dfid: u32,
        name: &'a [u8],
        mode: u32,
        major: u32,
        minor: u32,
        gid: u32,
    },
    Rename {
        fid: u32,
        dfid: u32,
        name: &'a [u8],
    },
    Readlink {
        fid: u32,
    },
    Getattr {
        fid: u32,
        mask: u64,
    },
    Setattr {
        fid: u32,
        attributes: SetAttributes,
    },
    Xattrwalk {
        fid: u32,
        newfid: u32,
        name: &'a [u8],
    },
    Xattrcreate {
        fid: u32,
        name: &'a [u8],
        size: u64,
        flags: u32,
    },
    Readdir {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Fsync {
        fid: u32,
        datasync: bool,
    },
    Lock {
        fid: u32,
        flags: u32,
        range: LockRange<'a>,
    },
    Getlock {
        fid: u32,
        range: LockRange<'a>,
    },
    Link {
        dfid: u32,
        fid: u32,
        name: &'a [u8],
    },
    Mkdir {
        dfid: u32,
        name: &'a [u8],
        mode: u32,
        gid: u32,
    },
    Renameat {
        olddirfid: u32,
        oldname: &'a [u8],
        newdirfid: u32,
        newname: &'a [u8],
    },
    Unlinkat {
        dirfid: u32,
        name: &'a [u8],
        flags: u32,
    },
}

/// The names of a Twalk, at most [`MAX_WALK`], which were checked to be whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names<'a> {
    count: usize,
    bytes: &'a [u8],
}

impl<'a> Names<'a> {
    /// How many names there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether the walk stays where it is.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The names in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut reader = Reader(self.bytes);
        (0..self.count).map_while(move |_| reader.string().ok())
    }
}

/// Why a message cannot be understood.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The message ends before what it has to hold, or holds more, or its size says something else than its length.
    #[error("Message of {len} bytes with a size field of {size} is no whole message of type {kind}")]
    Malformed {
        /// The type in the header.
        kind: u8,
        /// The size in the header.
        size: u32,
        /// Bytes that there are.
        len: usize,
    },
    /// No request has this type.
    #[error("Message type {0} is unknown")]
    UnknownType(u8),
}

/// The first fields of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole message.
    pub size: u32,
    /// The message type.
    pub kind: u8,
    /// What names the request until its reply.
    pub tag: u16,
}

impl Header {
    /// The header at the front of `message`; `None` if that is too short.
    pub fn decode(message: &[u8]) -> Option<Self> {
        let (header, _) = message.split_first_chunk::<HEADER_SIZE>()?;
        let [s0, s1, s2, s3, kind, t0, t1] = *header;
        Some(Self { size: u32::from_le_bytes([s0, s1, s2, s3]), kind, tag: u16::from_le_bytes([t0, t1]) })
    }
}

/// The end of the message came too early.
#[derive(Debug)]
struct Truncated;

/// Takes fields from the front of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Truncated> {
        let (array, rest) = self.0.split_first_chunk::<N>().ok_or(Truncated)?;
        self.0 = rest;
        Ok(*array)
    }

    fn u8(&mut self) -> Result<u8, Truncated> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, Truncated> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Truncated> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Truncated> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<&'a [u8], Truncated> {
        let len = usize::from(self.u16()?);
        let (string, rest) = self.0.split_at_checked(len).ok_or(Truncated)?;
        self.0 = rest;
        Ok(string)
    }

    fn names(&mut self) -> Result<Names<'a>, Truncated> {
        let count = usize::from(self.u16()?);
        if count > MAX_WALK {
            return Err(Truncated);
        }
        let bytes = self.0;
        for _ in 0..count {
            self.string()?;
        }
        Ok(Names { count, bytes })
    }

    fn time(&mut self) -> Result<Time, Truncated> {
        Ok(Time { sec: self.u64()?, nsec: self.u64()? })
    }

    fn attributes(&mut self) -> Result<SetAttributes, Truncated> {
        Ok(SetAttributes {
            valid: SetattrMask::from_bits_truncate(self.u32()?),
            mode: self.u32()?,
            uid: self.u32()?,
            gid: self.u32()?,
            size: self.u64()?,
            atime: self.time()?,
            mtime: self.time()?,
        })
    }

    fn range(&mut self, kind: u8) -> Result<LockRange<'a>, Truncated> {
        Ok(LockRange {
            kind,
            start: self.u64()?,
            length: self.u64()?,
            proc_id: self.u32()?,
            client_id: self.string()?,
        })
    }
}

impl<'a> Request<'a> {
    /// Decodes `message`, of which `len` bytes arrived: `message` itself, or for a Twrite more, since its data may be
    /// left out.
    pub fn decode(message: &'a [u8], len: usize) -> Result<Self, DecodeError> {
        let Some(header) = Header::decode(message) else {
            return Err(DecodeError::Malformed { kind: 0, size: 0, len });
        };
        let malformed = DecodeError::Malformed { kind: header.kind, size: header.size, len };
        let size = header.size as usize;
        // What follows the message in its buffers belongs to nobody.
        if size < HEADER_SIZE || size > len {
            return Err(malformed);
        }
        let end = message.len().min(size);
        let mut reader = Reader(&message[HEADER_SIZE..end]);
        let request = Self::decode_body(header.kind, &mut reader).map_err(|Truncated| malformed)?;
        let request = request.ok_or(DecodeError::UnknownType(header.kind))?;
        let whole = match request {
            Self::Write { count, .. } => size - WRITE_HEADER_SIZE == count as usize,
            _ => end == size && reader.0.is_empty(),
        };
        if whole { Ok(request) } else { Err(malformed) }
    }

    fn decode_body(kind: u8, reader: &mut Reader<'a>) -> Result<Option<Self>, Truncated> {
        let r = reader;
        // Fields are evaluated in the order in which they stand here, which is that of the message.
        Ok(Some(match kind {
            kind::TVERSION => Self::Version { msize: r.u32()?, version: r.string()? },
            kind::TAUTH => {
                Self::Auth { afid: r.u32()?, uname: r.string()?, aname: r.string()?, n_uname: r.u32()? }
            }
            kind::TATTACH => Self::Attach {
                fid: r.u32()?,
                afid: r.u32()?,
                uname: r.string()?,
                aname: r.string()?,
                n_uname: r.u32()?,
            },
            kind::TFLUSH => Self::Flush { oldtag: r.u16()? },
            kind::TWALK => Self::Walk { fid: r.u32()?, newfid: r.u32()?, names: r.names()? },
            kind::TREAD => Self::Read { fid: r.u32()?, offset: r.u64()?, count: r.u32()? },
            kind::TWRITE => Self::Write { fid: r.u32()?, offset: r.u64()?, count: r.u32()? },
            kind::TCLUNK => Self::Clunk { fid: r.u32()? },
            kind::TREMOVE => Self::Remove { fid: r.u32()? },
            kind::TSTATFS => Self::Statfs { fid: r.u32()? },
            kind::TLOPEN => Self::Lopen { fid: r.u32()?, flags: r.u32()? },
            kind::TLCREATE => Self::Lcreate {
                fid: r.u32()?,
                name: r.string()?,
                flags: r.u32()?,
                mode: r.u32()?,
                gid: r.u32()?,
            },
            kind::TSYMLINK => {
                Self::Symlink { dfid: r.u32()?, name: r.string()?, target: r.string()?, gid: r.u32()? }
            }
            kind::TMKNOD => Self::Mknod {
                dfid: r.u32()?,
                name: r.string()?,
                mode: r.u32()?,
                major: r.u32()?,
                minor: r.u32()?,
                gid: r.u32()?,
            },
            kind::TRENAME => Self::Rename { fid: r.u32()?, dfid: r.u32()?, name: r.string()? },
            kind::TREADLINK => Self::Readlink { fid: r.u32()? },
            kind::TGETATTR => Self::Getattr { fid: r.u32()?, mask: r.u64()? },
            kind::TSETATTR => Self::Setattr { fid: r.u32()?, attributes: r.attributes()? },
            kind::TXATTRWALK => Self::Xattrwalk { fid: r.u32()?, newfid: r.u32()?, name: r.string()? },
            kind::TXATTRCREATE => {
                Self::Xattrcreate { fid: r.u32()?, name: r.string()?, size: r.u64()?, flags: r.u32()? }
            }
            kind::TREADDIR => Self::Readdir { fid: r.u32()?, offset: r.u64()?, count: r.u32()? },
            // Older clients leave the second field out.
            kind::TFSYNC => Self::Fsync { fid: r.u32()?, datasync: !r.0.is_empty() && r.u32()? != 0 },
            kind::TLOCK => {
                let (fid, kind, flags) = (r.u32()?, r.u8()?, r.u32()?);
                Self::Lock { fid, flags, range: r.range(kind)? }
            }
            kind::TGETLOCK => {
                let (fid, kind) = (r.u32()?, r.u8()?);
                Self::Getlock { fid, range: r.range(kind)? }
            }
            kind::TLINK => Self::Link { dfid: r.u32()?, fid: r.u32()?, name: r.string()? },
            kind::TMKDIR => Self::Mkdir { dfid: r.u32()?, name: r.string()?, mode: r.u32()?, gid: r.u32()? },
            kind::TRENAMEAT => Self::Renameat {
                olddirfid: r.u32()?,
                oldname: r.string()?,
                newdirfid: r.u32()?,
                newname: r.string()?,
            },
            kind::TUNLINKAT => Self::Unlinkat { dirfid: r.u32()?, name: r.string()?, flags: r.u32()? },
            _ => return Ok(None),
        }))
    }
}
