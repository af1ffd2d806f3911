//! The messages of 9P2000.L: requests [`T`] and replies [`R`].

use super::flags::HEADER_LEN;
use super::wire::{Attr, Data, Field, Lock, Qid, Reader, SetAttr, Statfs};

/// One side's messages: name, number, and fields in the order of the wire.
macro_rules! messages {
    ($(#[$doc:meta])* $side:ident { $($name:ident = $number:literal { $($field:ident: $kind:ty),* })* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "messages and fields have the names that the protocol's text gives them")]
        pub enum $side<'a> {
            $($name { $($field: $kind),* },)*
        }

        impl<'a> $side<'a> {
            /// The message's number.
            pub fn number(&self) -> u8 {
                match self {
                    $(Self::$name { .. } => $number,)*
                }
            }

            fn put_fields(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$name { $($field),* } => {
                        $($field.put(out);)*
                    })*
                }
            }

            fn get_fields(number: u8, reader: &mut Reader<'a>) -> Option<Self> {
                Some(match number {
                    $($number => Self::$name { $($field: reader.get()?),* },)*
                    _ => return None,
                })
            }

            /// Appends the whole message to `out`.
            pub fn encode_to(&self, tag: u16, out: &mut Vec<u8>) {
                let start = out.len();
                0_u32.put(out);
                self.number().put(out);
                tag.put(out);
                self.put_fields(out);
                let size = (out.len() - start) as u32;
                out[start..start + 4].copy_from_slice(&size.to_le_bytes());
            }

            /// The whole message.
            pub fn encode(&self, tag: u16) -> Vec<u8> {
                let mut out = Vec::new();
                self.encode_to(tag, &mut out);
                out
            }

            /// The tag and the message that `bytes` are, exactly.
            pub fn decode(bytes: &'a [u8]) -> Option<(u16, Self)> {
                let mut reader = Reader::new(bytes);
                let size: u32 = reader.get()?;
                let number = reader.get()?;
                let tag = reader.get()?;
                let message = Self::get_fields(number, &mut reader)?;
                (size as usize == bytes.len() && reader.remaining() == 0).then_some((tag, message))
            }
        }
    };
}

messages! {
    /// A request.
    T {
        Statfs = 8 { fid: u32 }
        Lopen = 12 { fid: u32, flags: u32 }
        Lcreate = 14 { fid: u32, name: &'a [u8], flags: u32, mode: u32, gid: u32 }
        Symlink = 16 { dfid: u32, name: &'a [u8], target: &'a [u8], gid: u32 }
        Mknod = 18 { dfid: u32, name: &'a [u8], mode: u32, major: u32, minor: u32, gid: u32 }
        Rename = 20 { fid: u32, dfid: u32, name: &'a [u8] }
        Readlink = 22 { fid: u32 }
        Getattr = 24 { fid: u32, mask: u64 }
        Setattr = 26 { fid: u32, attr: SetAttr }
        Xattrwalk = 30 { fid: u32, newfid: u32, name: &'a [u8] }
        Xattrcreate = 32 { fid: u32, name: &'a [u8], size: u64, flags: u32 }
        Readdir = 40 { fid: u32, offset: u64, count: u32 }
        Fsync = 50 { fid: u32, datasync: u32 }
        Lock = 52 { fid: u32, kind: u8, flags: u32, start: u64, length: u64, proc_id: u32, client_id: &'a [u8] }
        Getlock = 54 { fid: u32, lock: Lock }
        Link = 70 { dfid: u32, fid: u32, name: &'a [u8] }
        Mkdir = 72 { dfid: u32, name: &'a [u8], mode: u32, gid: u32 }
        Renameat = 74 { olddirfid: u32, oldname: &'a [u8], newdirfid: u32, newname: &'a [u8] }
        Unlinkat = 76 { dirfid: u32, name: &'a [u8], flags: u32 }
        Version = 100 { msize: u32, version: &'a [u8] }
        Auth = 102 { afid: u32, uname: &'a [u8], aname: &'a [u8], n_uname: u32 }
        Attach = 104 { fid: u32, afid: u32, uname: &'a [u8], aname: &'a [u8], n_uname: u32 }
        Flush = 108 { oldtag: u16 }
        Walk = 110 { fid: u32, newfid: u32, names: Vec<&'a [u8]> }
        Read = 116 { fid: u32, offset: u64, count: u32 }
        Write = 118 { fid: u32, offset: u64, data: Data<'a> }
        Clunk = 120 { fid: u32 }
        Remove = 122 { fid: u32 }
    }
}

messages! {
    /// A reply.
    R {
        Lerror = 7 { ecode: u32 }
        Statfs = 9 { statfs: Statfs }
        Lopen = 13 { qid: Qid, iounit: u32 }
        Lcreate = 15 { qid: Qid, iounit: u32 }
        Symlink = 17 { qid: Qid }
        Mknod = 19 { qid: Qid }
        Rename = 21 { }
        Readlink = 23 { target: &'a [u8] }
        Getattr = 25 { attr: Attr }
        Setattr = 27 { }
        Xattrwalk = 31 { size: u64 }
        Xattrcreate = 33 { }
        Readdir = 41 { data: Data<'a> }
        Fsync = 51 { }
        Lock = 53 { status: u8 }
        Getlock = 55 { lock: Lock }
        Link = 71 { }
        Mkdir = 73 { qid: Qid }
        Renameat = 75 { }
        Unlinkat = 77 { }
        Version = 101 { msize: u32, version: &'a [u8] }
        Auth = 103 { aqid: Qid }
        Attach = 105 { qid: Qid }
        Flush = 109 { }
        Walk = 111 { qids: Vec<Qid> }
        Read = 117 { data: Data<'a> }
        Write = 119 { count: u32 }
        Clunk = 121 { }
        Remove = 123 { }
    }
}

/// How a request lies in descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// How many bytes at the request's end are data in pages of their own, as Linux sends a large `Twrite`.
    pub pages_out: usize,
    /// How many bytes the reply's first buffer has.
    pub header_in: usize,
    /// How many bytes follow it in pages of their own, as Linux receives a large `Rread`.
    pub pages_in: usize,
}

impl T<'_> {
    /// What Linux sends in pages rather than copied: more than this.
    const ZERO_COPY: usize = 1024;
    /// Room for any reply without data: an `Rreadlink` of `PATH_MAX` is the longest.
    const PLAIN: usize = 4096 + HEADER_LEN + 2;

    /// The descriptors that Linux would make for the request (`p9_virtio_request` and `p9_virtio_zc_request`).
    pub fn room(&self) -> Room {
        let plain = |header_in| Room { pages_out: 0, header_in, pages_in: 0 };
        let data_in = |count: u32| match count as usize {
            count if count > Self::ZERO_COPY => {
                Room { pages_out: 0, header_in: super::flags::READ_HEADER_LEN, pages_in: count }
            }
            count => plain(super::flags::READ_HEADER_LEN + count),
        };
        match self {
            Self::Read { count, .. } | Self::Readdir { count, .. } => data_in(*count),
            Self::Write { data, .. } if data.0.len() > Self::ZERO_COPY => {
                Room { pages_out: data.0.len(), header_in: 4096, pages_in: 0 }
            }
            Self::Walk { names, .. } => plain((HEADER_LEN + 2 + 13 * names.len()).max(11)),
            _ => plain(Self::PLAIN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::ninep::flags;

    /// Checks that a message has these bytes, that they decode to it, and that no shorter or longer bytes do.
    macro_rules! check {
        ($side:ident, $message:expr, $tag:expr, $bytes:expr) => {{
            let message = $message;
            let bytes: &[u8] = $bytes;
            assert_eq!(message.encode($tag), bytes, "{message:?}");
            assert_eq!($side::decode(bytes), Some(($tag, message.clone())));
            for len in 0..bytes.len() {
                assert_eq!($side::decode(&bytes[..len]), None, "{message:?} cut at {len}");
            }
            let longer = [bytes, &[0]].concat();
            assert_eq!($side::decode(&longer), None, "{message:?} with a byte more");
        }};
    }

    #[test]
    fn requests_have_the_bytes_of_the_text() {
        check!(
            T,
            T::Version { msize: 8192, version: flags::VERSION },
            flags::NO_TAG,
            b"\x15\0\0\0\x64\xff\xff\0\x20\0\0\x08\09P2000.L"
        );
        check!(
            T,
            T::Attach { fid: 0, afid: flags::NO_FID, uname: b"nobody", aname: b"", n_uname: flags::NO_UNAME },
            1,
            b"\x1d\0\0\0\x68\x01\0\0\0\0\0\xff\xff\xff\xff\x06\0nobody\0\0\xff\xff\xff\xff"
        );
        check!(
            T,
            T::Walk { fid: 1, newfid: 2, names: vec![b"a", b"bc"] },
            7,
            b"\x18\0\0\0\x6e\x07\0\x01\0\0\0\x02\0\0\0\x02\0\x01\0a\x02\0bc"
        );
        check!(T, T::Flush { oldtag: 0x102 }, 3, b"\x09\0\0\0\x6c\x03\0\x02\x01");
        check!(
            T,
            T::Read { fid: 5, offset: 0x1_0000_0000, count: 4096 },
            9,
            b"\x17\0\0\0\x74\x09\0\x05\0\0\0\0\0\0\0\x01\0\0\0\0\x10\0\0"
        );
        check!(
            T,
            T::Write { fid: 5, offset: 1, data: Data(b"xyz") },
            9,
            b"\x1a\0\0\0\x76\x09\0\x05\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0xyz"
        );
        check!(
            T,
            T::Lock {
                fid: 1,
                kind: flags::LOCK_WRLCK,
                flags: flags::LOCK_BLOCK,
                start: 2,
                length: 3,
                proc_id: 4,
                client_id: b"me"
            },
            9,
            b"\x28\0\0\0\x34\x09\0\x01\0\0\0\x01\x01\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x04\0\0\0\x02\0me"
        );
        check!(
            T,
            T::Lcreate { fid: 1, name: b"f", flags: 0o102, mode: 0o644, gid: 5 },
            2,
            b"\x1a\0\0\0\x0e\x02\0\x01\0\0\0\x01\0f\x42\0\0\0\xa4\x01\0\0\x05\0\0\0"
        );
        check!(
            T,
            T::Setattr {
                fid: 1,
                attr: SetAttr {
                    valid: 0x108,
                    mode: 1,
                    uid: 2,
                    gid: 3,
                    size: 4,
                    atime: super::super::wire::Time { sec: 5, nsec: 6 },
                    mtime: super::super::wire::Time { sec: 7, nsec: 8 },
                }
            },
            2,
            b"\x43\0\0\0\x1a\x02\0\x01\0\0\0\x08\x01\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0\
              \x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0"
        );
    }

    #[test]
    fn replies_have_the_bytes_of_the_text() {
        check!(R, R::Lerror { ecode: 2 }, 1, b"\x0b\0\0\0\x07\x01\0\x02\0\0\0");
        check!(
            R,
            R::Walk { qids: vec![Qid { kind: 0x80, version: 1, path: 2 }] },
            1,
            b"\x16\0\0\0\x6f\x01\0\x01\0\x80\x01\0\0\0\x02\0\0\0\0\0\0\0"
        );
        check!(R, R::Read { data: Data(b"ab") }, 1, b"\x0d\0\0\0\x75\x01\0\x02\0\0\0ab");
        check!(R, R::Clunk {}, 1, b"\x07\0\0\0\x79\x01\0");
        check!(R, R::Lock { status: 1 }, 1, b"\x08\0\0\0\x35\x01\0\x01");
        // The lengths that Linux expects of the two replies with most fields.
        assert_eq!(R::Getattr { attr: Attr::default() }.encode(0).len(), 160);
        assert_eq!(R::Statfs { statfs: Statfs::default() }.encode(0).len(), 67);
    }

    #[test]
    fn an_unknown_number_is_no_message() {
        for number in [0, 6, 10, 11, 106, 112, 124, 126, 255] {
            assert_eq!(T::decode(&[7, 0, 0, 0, number, 0, 0]), None, "{number}");
        }
    }
}
