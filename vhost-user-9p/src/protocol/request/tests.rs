//! The decoder against an encoder of its own, against messages that lie, and against garbage.

use proptest::prelude::*;

use super::*;

/// Writes a message, field by field.
struct Encoder(Vec<u8>);

impl Encoder {
    fn new(kind: u8, tag: u16) -> Self {
        let mut bytes = vec![0, 0, 0, 0, kind];
        bytes.extend(tag.to_le_bytes());
        Self(bytes)
    }

    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn string(mut self, value: &[u8]) -> Self {
        self = self.u16(value.len() as u16);
        self.0.extend(value);
        self
    }

    fn names(mut self, names: &[&[u8]]) -> Self {
        self = self.u16(names.len() as u16);
        names.iter().fold(self, |encoder, name| encoder.string(name))
    }

    fn range(self, range: &LockRange<'_>) -> Self {
        self.u64(range.start).u64(range.length).u32(range.proc_id).string(range.client_id)
    }

    /// With `more` bytes behind this, which the size includes.
    fn finish(mut self, more: usize) -> Vec<u8> {
        let size = (self.0.len() + more) as u32;
        self.0[..4].copy_from_slice(&size.to_le_bytes());
        self.0
    }
}

const TAG: u16 = 0x1234;

/// The message that says `request`; a Twrite without its data.
fn encode(request: &Request<'_>) -> Vec<u8> {
    let e = |kind| Encoder::new(kind, TAG);
    match *request {
        Request::Version { msize, version } => e(100).u32(msize).string(version),
        Request::Auth { afid, uname, aname, n_uname } => {
            e(102).u32(afid).string(uname).string(aname).u32(n_uname)
        }
        Request::Attach { fid, afid, uname, aname, n_uname } => {
            e(104).u32(fid).u32(afid).string(uname).string(aname).u32(n_uname)
        }
        Request::Flush { oldtag } => e(108).u16(oldtag),
        Request::Walk { fid, newfid, names } => {
            e(110).u32(fid).u32(newfid).names(&names.iter().collect::<Vec<_>>())
        }
        Request::Read { fid, offset, count } => e(116).u32(fid).u64(offset).u32(count),
        Request::Write { fid, offset, count } => {
            return e(118).u32(fid).u64(offset).u32(count).finish(count as usize);
        }
        Request::Clunk { fid } => e(120).u32(fid),
        Request::Remove { fid } => e(122).u32(fid),
        Request::Statfs { fid } => e(8).u32(fid),
        Request::Lopen { fid, flags } => e(12).u32(fid).u32(flags),
        Request::Lcreate { fid, name, flags, mode, gid } => {
            e(14).u32(fid).string(name).u32(flags).u32(mode).u32(gid)
        }
        Request::Symlink { dfid, name, target, gid } => e(16).u32(dfid).string(name).string(target).u32(gid),
        Request::Mknod { dfid, name, mode, major, minor, gid } => {
            e(18).u32(dfid).string(name).u32(mode).u32(major).u32(minor).u32(gid)
        }
        Request::Rename { fid, dfid, name } => e(20).u32(fid).u32(dfid).string(name),
        Request::Readlink { fid } => e(22).u32(fid),
        Request::Getattr { fid, mask } => e(24).u32(fid).u64(mask),
        Request::Setattr { fid, attributes: a } => {
            let e = e(26).u32(fid).u32(a.valid.bits()).u32(a.mode).u32(a.uid).u32(a.gid).u64(a.size);
            e.u64(a.atime.sec).u64(a.atime.nsec).u64(a.mtime.sec).u64(a.mtime.nsec)
        }
        Request::Xattrwalk { fid, newfid, name } => e(30).u32(fid).u32(newfid).string(name),
        Request::Xattrcreate { fid, name, size, flags } => e(32).u32(fid).string(name).u64(size).u32(flags),
        Request::Readdir { fid, offset, count } => e(40).u32(fid).u64(offset).u32(count),
        Request::Fsync { fid, datasync } => e(50).u32(fid).u32(datasync.into()),
        Request::Lock { fid, flags, range } => e(52).u32(fid).u8(range.kind).u32(flags).range(&range),
        Request::Getlock { fid, range } => e(54).u32(fid).u8(range.kind).range(&range),
        Request::Link { dfid, fid, name } => e(70).u32(dfid).u32(fid).string(name),
        Request::Mkdir { dfid, name, mode, gid } => e(72).u32(dfid).string(name).u32(mode).u32(gid),
        Request::Renameat { olddirfid, oldname, newdirfid, newname } => {
            e(74).u32(olddirfid).string(oldname).u32(newdirfid).string(newname)
        }
        Request::Unlinkat { dirfid, name, flags } => e(76).u32(dirfid).string(name).u32(flags),
    }
    .finish(0)
}

/// What the fields of requests are made of.
#[derive(Clone, Debug)]
struct Fields {
    small: [u32; 5],
    large: [u64; 5],
    byte: u8,
    flag: bool,
    strings: [Vec<u8>; 2],
    names: Vec<u8>,
    count: usize,
}

impl Fields {
    fn new(small: [u32; 5], large: [u64; 5], byte: u8, strings: [Vec<u8>; 2], names: &[Vec<u8>]) -> Self {
        let names: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
        let encoded = Encoder(vec![]).names(&names).0[2..].to_vec();
        let flag = byte % 2 == 1;
        Self { small, large, byte, flag, strings, names: encoded, count: names.len() }
    }

    /// Fixed ones, none of which looks like another.
    fn sample() -> Self {
        Self::new(
            [0x0102_0304, 0x1112_1314, 0x2122_2324, 0x3132_3334, 0x4142_4344],
            [1 << 63, 0x5152_5354_5556_5758, u64::MAX, 0, 0x6162_6364_6566_6768],
            0x77,
            [b"some name".to_vec(), b"the other name".to_vec()],
            &[b"usr".to_vec(), b"".to_vec(), b"\xff/\0".to_vec()],
        )
    }

    /// One request of each type.
    #[expect(clippy::many_single_char_names, reason = "the numbers have no meaning")]
    fn requests(&self) -> Vec<Request<'_>> {
        let [a, b, c, d, e] = self.small;
        let [long, length, mask, sec, nsec] = self.large;
        let [name, other] = self.strings.each_ref().map(Vec::as_slice);
        let range = LockRange { kind: self.byte, start: long, length, proc_id: b, client_id: name };
        let attributes = SetAttributes {
            valid: SetattrMask::from_bits_truncate(b),
            mode: c,
            uid: d,
            gid: e,
            size: long,
            atime: Time { sec, nsec },
            mtime: Time { sec: mask, nsec: length },
        };
        vec![
            Request::Version { msize: a, version: name },
            Request::Auth { afid: a, uname: name, aname: other, n_uname: b },
            Request::Attach { fid: a, afid: b, uname: name, aname: other, n_uname: c },
            Request::Flush { oldtag: a as u16 },
            Request::Walk { fid: a, newfid: b, names: Names { count: self.count, bytes: &self.names } },
            Request::Read { fid: a, offset: long, count: b },
            Request::Write { fid: a, offset: long, count: b >> 8 },
            Request::Clunk { fid: a },
            Request::Remove { fid: a },
            Request::Statfs { fid: a },
            Request::Lopen { fid: a, flags: b },
            Request::Lcreate { fid: a, name, flags: b, mode: c, gid: d },
            Request::Symlink { dfid: a, name, target: other, gid: b },
            Request::Mknod { dfid: a, name, mode: b, major: c, minor: d, gid: e },
            Request::Rename { fid: a, dfid: b, name },
            Request::Readlink { fid: a },
            Request::Getattr { fid: a, mask },
            Request::Setattr { fid: a, attributes },
            Request::Xattrwalk { fid: a, newfid: b, name },
            Request::Xattrcreate { fid: a, name, size: long, flags: b },
            Request::Readdir { fid: a, offset: long, count: b },
            Request::Fsync { fid: a, datasync: self.flag },
            Request::Lock { fid: a, flags: c, range },
            Request::Getlock { fid: a, range },
            Request::Link { dfid: a, fid: b, name },
            Request::Mkdir { dfid: a, name, mode: b, gid: c },
            Request::Renameat { olddirfid: a, oldname: name, newdirfid: b, newname: other },
            Request::Unlinkat { dirfid: a, name, flags: b },
        ]
    }
}

/// The bytes of the whole message, with the data of a Twrite that is not there.
fn claimed(message: &[u8]) -> usize {
    u32::from_le_bytes(message[..4].try_into().unwrap()) as usize
}

fn with_size(message: &[u8], size: usize) -> Vec<u8> {
    let mut message = message.to_vec();
    message[..4].copy_from_slice(&(size as u32).to_le_bytes());
    message
}

#[test]
fn every_type_is_decoded() {
    let fields = Fields::sample();
    let requests = fields.requests();
    assert_eq!(requests.len(), 28);
    for request in &requests {
        let message = encode(request);
        let size = claimed(&message);
        assert_eq!(Request::decode(&message, size), Ok(*request));
        let header = Header::decode(&message).unwrap();
        assert_eq!((header.size as usize, header.kind, header.tag), (size, message[4], TAG));
    }
}

/// One of each kind of field, as the bytes stand in the protocol's text.
#[test]
fn bytes_are_read_as_written() {
    let version = b"\x15\0\0\0\x64\xff\xff\x00\xd0\x07\0\x08\09P2000.L";
    assert_eq!(
        Request::decode(version, version.len()),
        Ok(Request::Version { msize: 512_000, version: b"9P2000.L" })
    );
    let lock = b"\x25\0\0\0\x34\x01\0\x02\0\0\0\x01\x01\0\0\0\x03\0\0\0\0\0\0\0\
        \x04\0\0\0\0\0\0\0\x05\0\0\0\x02\0vm";
    let lock = with_size(lock, lock.len());
    let range = LockRange { kind: 1, start: 3, length: 4, proc_id: 5, client_id: b"vm" };
    assert_eq!(Request::decode(&lock, lock.len()), Ok(Request::Lock { fid: 2, flags: 1, range }));
    let walk = b"\x16\0\0\0\x6e\x01\0\x02\0\0\0\x03\0\0\0\x02\0\x01\0a\0\0";
    let Ok(Request::Walk { fid: 2, newfid: 3, names }) = Request::decode(walk, walk.len()) else {
        panic!("This is a Twalk");
    };
    assert_eq!(names.iter().collect::<Vec<_>>(), [&b"a"[..], b""]);
}

#[test]
fn a_message_that_ends_early_is_refused() {
    let fields = Fields::sample();
    for request in fields.requests() {
        let message = encode(&request);
        let size = claimed(&message);
        for cut in 0..message.len() {
            // The buffers end early.
            let part = &message[..cut];
            assert!(Request::decode(part, cut).is_err(), "{request:?} cut to {cut}");
            // So they do, though more was said to have arrived.
            assert!(Request::decode(part, size).is_err(), "{request:?} cut to {cut}");
            // The size says so as well.
            if cut >= HEADER_SIZE {
                let part = with_size(part, cut);
                let result = Request::decode(&part, cut);
                match request {
                    Request::Fsync { fid, .. } if cut == HEADER_SIZE + 4 => {
                        assert_eq!(result, Ok(Request::Fsync { fid, datasync: false }));
                    }
                    _ => assert!(result.is_err(), "{request:?} cut to {cut}: {result:?}"),
                }
            }
        }
    }
}

#[test]
fn a_message_that_is_too_long_is_refused() {
    let fields = Fields::sample();
    for request in fields.requests() {
        let message = encode(&request);
        let size = claimed(&message);
        for more in [1, 2, 4, 100] {
            let mut longer = with_size(&message, size + more);
            assert!(Request::decode(&longer, size + more).is_err(), "{request:?}");
            longer.resize(message.len() + more, 0);
            assert!(Request::decode(&longer, size + more).is_err(), "{request:?}");
            // What stands behind the message in its buffer is not part of it.
            let longer = with_size(&longer, size);
            assert_eq!(Request::decode(&longer, size + more), Ok(request));
        }
    }
}

#[test]
fn sizes_that_lie_are_refused() {
    let fields = Fields::sample();
    for request in fields.requests() {
        let message = encode(&request);
        let size = claimed(&message);
        for lie in (0..HEADER_SIZE).chain([size - 1, size + 1, 1 << 31, u32::MAX as usize]) {
            assert!(Request::decode(&with_size(&message, lie), size).is_err(), "{request:?} {lie}");
        }
    }
}

/// Each 16-bit length and count in every message: shorter, longer, and as long as can be.
#[test]
fn lengths_of_strings_that_lie_are_refused() {
    let fields = Fields::sample();
    let mut lengths = 0;
    for request in fields.requests() {
        let message = encode(&request);
        let strings: &[&[u8]] = &[&fields.strings[0], &fields.strings[1], b"usr", b"\xff/\0"];
        let mut places: Vec<usize> = strings
            .iter()
            .filter_map(|string| {
                let wanted = [&(string.len() as u16).to_le_bytes(), *string].concat();
                message.windows(wanted.len()).position(|window| window == wanted)
            })
            .collect();
        if matches!(request, Request::Walk { .. }) {
            places.push(HEADER_SIZE + 8);
        }
        for place in places {
            lengths += 1;
            let honest = u16::from_le_bytes([message[place], message[place + 1]]);
            for lie in [0, 1, honest - 1, honest + 1, 17, 255, 256, 0x7fff, u16::MAX] {
                if lie == honest {
                    continue;
                }
                let mut message = message.clone();
                message[place..place + 2].copy_from_slice(&lie.to_le_bytes());
                let result = Request::decode(&message, message.len());
                assert!(result.is_err(), "{request:?} with {lie} at {place}: {result:?}");
            }
        }
    }
    // 15 messages with one or two strings, and a Twalk's two and its count.
    assert_eq!(lengths, 22);
}

#[test]
fn a_walk_has_sixteen_names_at_most() {
    for count in [0, 1, 16, 17, 18] {
        let names = vec![&b"name"[..]; count];
        let message = Encoder::new(110, TAG).u32(1).u32(2).names(&names).finish(0);
        let result = Request::decode(&message, message.len());
        if count <= MAX_WALK {
            let Ok(Request::Walk { names: decoded, .. }) = result else {
                panic!("{result:?}");
            };
            assert_eq!((decoded.len(), decoded.is_empty()), (count, count == 0));
            assert_eq!(decoded.iter().collect::<Vec<_>>(), names);
        } else {
            assert!(matches!(result, Err(DecodeError::Malformed { kind: 110, .. })));
        }
    }
}

#[test]
fn the_data_of_a_write_may_be_elsewhere() {
    let write = Request::Write { fid: 1, offset: 2, count: 100 };
    let message = encode(&write);
    assert_eq!(message.len(), WRITE_HEADER_SIZE);
    assert_eq!(Request::decode(&message, 123), Ok(write));
    // All or part of it is in the same buffer.
    for there in [1, 99, 100, 150] {
        let mut message = message.clone();
        message.resize(WRITE_HEADER_SIZE + there, 0xaa);
        assert_eq!(Request::decode(&message, 123.max(message.len())), Ok(write));
    }
    // The count and the size do not agree.
    for size in [23, 122, 124, 1000] {
        assert!(Request::decode(&with_size(&message, size), 2000).is_err());
    }
    let largest = encode(&Request::Write { fid: 1, offset: 2, count: u32::MAX - 23 });
    assert!(Request::decode(&largest, u32::MAX as usize).is_ok());
    let wrapped = Encoder::new(118, TAG).u32(1).u64(2).u32(u32::MAX).finish(0);
    assert!(Request::decode(&wrapped, wrapped.len()).is_err());
}

/// Only Twrite has data that may be left out.
#[test]
fn other_messages_are_there_whole() {
    let clunk = with_size(&encode(&Request::Clunk { fid: 1 }), 100);
    assert!(Request::decode(&clunk, 100).is_err());
}

#[test]
fn unknown_types_are_told_from_malformed_messages() {
    let fields = Fields::sample();
    let known: Vec<u8> = fields.requests().iter().map(|request| encode(request)[4]).collect();
    for kind in 0..=u8::MAX {
        let message = Encoder::new(kind, TAG).u32(1).finish(0);
        let result = Request::decode(&message, message.len());
        assert_eq!(result == Err(DecodeError::UnknownType(kind)), !known.contains(&kind), "{kind}");
    }
    for len in 0..HEADER_SIZE {
        assert_eq!(
            Request::decode(&[200; HEADER_SIZE][..len], len),
            Err(DecodeError::Malformed { kind: 0, size: 0, len })
        );
        assert_eq!(Header::decode(&[200; HEADER_SIZE][..len]), None);
    }
}

fn string() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => proptest::collection::vec(any::<u8>(), 0..40),
        1 => proptest::collection::vec(any::<u8>(), 65_000..=65_535),
    ]
}

fn fields() -> impl Strategy<Value = Fields> {
    let names = proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..30), 0..=MAX_WALK);
    (any::<[u32; 5]>(), any::<[u64; 5]>(), any::<u8>(), [string(), string()], names)
        .prop_map(|(small, large, byte, strings, names)| Fields::new(small, large, byte, strings, &names))
}

/// What is decoded says all that the message says.
fn check_canonical(message: &[u8], len: usize) {
    let Ok(request) = Request::decode(message, len) else {
        return;
    };
    let again = encode(&request);
    match request {
        // Not every value of these fields is told from others.
        Request::Fsync { .. } | Request::Setattr { .. } => {
            assert_eq!(Request::decode(&again, again.len()), Ok(request));
        }
        Request::Write { .. } => {
            assert_eq!(again[..5], message[..5]);
            assert_eq!(again[HEADER_SIZE..], message[HEADER_SIZE..WRITE_HEADER_SIZE]);
        }
        _ => {
            assert_eq!(again[..5], message[..5]);
            assert_eq!(again[HEADER_SIZE..], message[HEADER_SIZE..claimed(message)]);
        }
    }
}

proptest! {
    #[test]
    fn requests_survive(fields in fields()) {
        for request in fields.requests() {
            let message = encode(&request);
            prop_assert_eq!(Request::decode(&message, claimed(&message)), Ok(request));
        }
    }

    #[test]
    fn garbage_is_refused_or_understood(
        kind in prop_oneof![any::<u8>(), (4..62_u8).prop_map(|half| half * 2)],
        body in proptest::collection::vec(prop_oneof![3 => 0..4_u8, 1 => any::<u8>()], 0..200),
        more in 0..3_usize,
    ) {
        let mut message = Encoder::new(kind, TAG);
        message.0.extend(body);
        let message = message.finish(0);
        check_canonical(&message, message.len());
        check_canonical(&message, message.len() + more);
    }

    #[test]
    fn messages_with_changed_bytes_are_refused_or_understood(
        which in 0..28_usize,
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        more in 0..100_usize,
    ) {
        let fields = Fields::sample();
        let mut message = encode(&fields.requests()[which]);
        for (index, byte) in changes {
            let index = index.index(message.len());
            message[index] = byte;
        }
        check_canonical(&message, message.len() + more);
    }

    #[test]
    fn raw_garbage_never_panics(
        message in proptest::collection::vec(any::<u8>(), 0..100),
        more in any::<u32>(),
    ) {
        check_canonical(&message, message.len() + more as usize);
    }
}
