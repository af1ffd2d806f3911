//! The replies, byte by byte.

use super::super::GetattrMask;
use super::*;

const QID: Qid = Qid { kind: Qid::DIR, version: 0x0102_0304, path: 0x1112_1314_1516_1718 };
const QID_BYTES: [u8; 13] = [0x80, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11];
const TAG: u16 = 0xfffe;

/// The bytes of a finished reply to a request of type `request`.
fn reply(request: u8, write: impl FnOnce(&mut Reply)) -> Vec<u8> {
    let mut reply = Reply::default();
    // What was there before leaves no traces.
    reply.begin(kind::TREAD).u64(u64::MAX);
    reply.begin(kind::TREAD).data_in_place(1000);
    reply.begin(request);
    write(&mut reply);
    reply.finish(TAG);
    assert_eq!(reply.len(), reply.bytes().len());
    assert!(!reply.is_error() && !reply.is_empty());
    reply.bytes().to_vec()
}

/// A message of these parts.
fn message(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    [&(body.len() as u32 + 7).to_le_bytes()[..], &[kind, 0xfe, 0xff], &body].concat()
}

#[test]
fn replies_without_a_body_are_their_header() {
    let requests = [
        kind::TFLUSH,
        kind::TCLUNK,
        kind::TREMOVE,
        kind::TRENAME,
        kind::TSETATTR,
        kind::TXATTRCREATE,
        kind::TFSYNC,
        kind::TLINK,
        kind::TRENAMEAT,
        kind::TUNLINKAT,
    ];
    for request in requests {
        assert_eq!(reply(request, |_| {}), [7, 0, 0, 0, request + 1, 0xfe, 0xff]);
    }
}

#[test]
fn an_error_has_a_number() {
    let mut reply = Reply::default();
    assert!(reply.is_empty() && !reply.is_error());
    reply.begin(kind::TGETATTR).u64(1);
    reply.error(95);
    reply.finish(TAG);
    assert!(reply.is_error());
    assert_eq!(reply.bytes(), [11, 0, 0, 0, 7, 0xfe, 0xff, 95, 0, 0, 0]);
    reply.clear();
    assert!(reply.is_empty() && !reply.is_error());
    assert_eq!(reply.len(), 0);
    // Nothing to finish.
    reply.finish(TAG);
    assert!(reply.is_empty());
}

#[test]
fn version_and_qids() {
    let bytes = reply(kind::TVERSION, |r| {
        r.u32(512_000).string(b"9P2000.L");
    });
    assert_eq!(bytes, message(101, &[&[0, 0xd0, 7, 0], &[8, 0], b"9P2000.L"]));
    for (request, answer) in
        [(kind::TATTACH, 105), (kind::TSYMLINK, 17), (kind::TMKNOD, 19), (kind::TMKDIR, 73)]
    {
        let bytes = reply(request, |r| {
            r.qid(QID);
        });
        assert_eq!(bytes, message(answer, &[&QID_BYTES]));
        assert_eq!(bytes.len(), 20);
    }
    for (request, answer) in [(kind::TLOPEN, 13), (kind::TLCREATE, 15)] {
        let bytes = reply(request, |r| {
            r.qid(QID).u32(507_904);
        });
        assert_eq!(bytes, message(answer, &[&QID_BYTES, &[0, 0xc0, 7, 0]]));
        assert_eq!(bytes.len(), 24);
    }
}

#[test]
fn a_walk_answers_thirteen_bytes_for_each_name() {
    for count in [0, 1, 2, 16_u8] {
        let bytes = reply(kind::TWALK, |r| {
            r.u16(count.into());
            for _ in 0..count {
                r.qid(QID);
            }
        });
        assert_eq!(bytes.len(), 13 * usize::from(count) + 9);
        assert_eq!(bytes, message(111, &[&[count, 0], &QID_BYTES.repeat(count.into())]));
    }
}

#[test]
fn attributes_take_160_bytes() {
    let time = |n: u64| Time { sec: n, nsec: n + 1 };
    let attributes = Attributes {
        valid: GetattrMask::all(),
        qid: QID,
        mode: 1,
        uid: 2,
        gid: 3,
        nlink: 4,
        rdev: 5,
        size: 6,
        blksize: 7,
        blocks: 8,
        atime: time(9),
        mtime: time(11),
        ctime: time(13),
        btime: time(15),
        generation: 17,
        data_version: 18,
    };
    let bytes = reply(kind::TGETATTR, |r| {
        r.attributes(&attributes);
    });
    assert_eq!(bytes.len(), 160);
    let small: Vec<u8> = (1..=3_u32).flat_map(u32::to_le_bytes).collect();
    let large: Vec<u8> = (4..=18_u64).flat_map(u64::to_le_bytes).collect();
    assert_eq!(bytes, message(25, &[&0x3fff_u64.to_le_bytes(), &QID_BYTES, &small, &large]));
}

#[test]
fn the_figures_of_a_file_system() {
    let statfs =
        Statfs { kind: 1, bsize: 2, blocks: 3, bfree: 4, bavail: 5, files: 6, ffree: 7, fsid: 8, namelen: 9 };
    let bytes = reply(kind::TSTATFS, |r| {
        r.statfs(&statfs);
    });
    assert_eq!(bytes.len(), 67);
    let large: Vec<u8> = (3..=8_u64).flat_map(u64::to_le_bytes).collect();
    assert_eq!(bytes, message(9, &[&[1, 0, 0, 0, 2, 0, 0, 0], &large, &[9, 0, 0, 0]]));
}

#[test]
fn locks() {
    for (status, byte) in [(LockStatus::Success, 0), (LockStatus::Blocked, 1), (LockStatus::Error, 2)] {
        let bytes = reply(kind::TLOCK, |r| {
            r.lock_status(status);
        });
        assert_eq!(bytes, message(53, &[&[byte]]));
    }
    let range =
        LockRange { kind: LockRange::UNLOCK, start: 1, length: u64::MAX, proc_id: 3, client_id: b"vm" };
    let bytes = reply(kind::TGETLOCK, |r| {
        r.lock_range(&range);
    });
    assert_eq!(bytes, message(55, &[&[2, 1], &[0; 7], &[0xff; 8], &[3, 0, 0, 0, 2, 0], b"vm"]));
}

#[test]
fn links_and_attributes() {
    let bytes = reply(kind::TREADLINK, |r| {
        r.string(b"../target");
    });
    assert_eq!(bytes, message(23, &[&[9, 0], b"../target"]));
    let bytes = reply(kind::TXATTRWALK, |r| {
        r.u64(256);
    });
    assert_eq!(bytes, message(31, &[&[0, 1, 0, 0, 0, 0, 0, 0]]));
}

#[test]
fn a_string_that_is_too_long_is_cut() {
    let bytes = reply(kind::TREADLINK, |r| {
        r.string(&vec![b'a'; 70_000]);
    });
    assert_eq!(bytes, message(23, &[&[0xff, 0xff], &vec![b'a'; 65_535]]));
}

#[test]
fn data_is_here_or_in_place() {
    let bytes = reply(kind::TREAD, |r| r.data(b"data"));
    assert_eq!(bytes, message(117, &[&[4, 0, 0, 0], b"data"]));
    let bytes = reply(kind::TREAD, |r| r.data(b""));
    assert_eq!(bytes, message(117, &[&[0; 4]]));
    let mut reply = Reply::default();
    reply.begin(kind::TREAD).data_in_place(507_904);
    reply.finish(TAG);
    assert_eq!(reply.len(), 507_915);
    assert_eq!(reply.bytes(), [0x0b, 0xc0, 7, 0, 117, 0xfe, 0xff, 0, 0xc0, 7, 0]);
    // The data does not count for what comes next.
    reply.error(5);
    reply.finish(TAG);
    assert_eq!((reply.len(), reply.bytes()[0]), (11, 11));
}

#[test]
fn entries_are_counted_in_bytes() {
    let empty = reply(kind::TREADDIR, |r| {
        r.begin_entries();
        r.end_entries();
    });
    assert_eq!(empty, message(41, &[&[0; 4]]));
    let bytes = reply(kind::TREADDIR, |r| {
        r.begin_entries();
        for (name, offset) in [(&b"."[..], 1), (b"file", i64::MAX as u64)] {
            let before = r.len();
            r.entry(QID, offset, 4, name);
            assert_eq!(r.len() - before, Reply::entry_size(name));
        }
        r.end_entries();
    });
    let first = [&QID_BYTES[..], &[1, 0, 0, 0, 0, 0, 0, 0], &[4, 1, 0], b"."].concat();
    let second =
        [&QID_BYTES[..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f], &[4, 4, 0], b"file"].concat();
    assert_eq!(bytes, message(41, &[&[25 + 28, 0, 0, 0], &first, &second]));
}
