//! 9P2000.L towards `vhost-user-9p`: sessions, fids, walks, and how requests lie in descriptors. Replies are compared
//! byte by byte.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use anyhow::Result;
use rustix::io::Errno;
use tests::driver::ninep::flags::{
    self, GETATTR_ALL, NO_FID, NO_TAG, NO_UNAME, QTDIR, QTFILE, QTSYMLINK, VERSION,
};
use tests::driver::ninep::raw::request;
use tests::driver::ninep::share::ROOT;
use tests::driver::ninep::wire::{Data, Lock, SetAttr};
use tests::driver::ninep::{Client, Options, Qid, R, Share, T};

/// The longest msize that the daemon agrees on by default.
const MAX_MSIZE: u32 = 1 << 20;
/// A fid that no test uses for a file.
const UNKNOWN: u32 = 0x1234_5678;

/// The qid's path of a file on the share's own file system: Linux adds 2 to have the inode number.
fn path_of(path: &Path) -> u64 {
    fs::symlink_metadata(path).expect("a file of the test's own").ino().wrapping_sub(2)
}

/// The qid of what a fid is, by `Tgetattr`.
fn qid(client: &mut Client, fid: u32) -> Qid {
    client.getattr(fid).expect("attributes of a fid").qid
}

/// The kind and path of qids, without the version, which is the server's own affair.
fn identities(qids: &[Qid]) -> Vec<(u8, u64)> {
    qids.iter().map(|qid| (qid.kind, qid.path)).collect()
}

#[test]
fn the_config_space_has_the_tag() -> Result<()> {
    for (args, tag) in [(&[][..], "share"), (&["--tag", "a longer tag"], "a longer tag")] {
        let share = Share::new(args)?;
        let client = share.connect(&Options::default())?;
        let mut expected = (tag.len() as u16).to_le_bytes().to_vec();
        expected.extend(tag.as_bytes());
        assert_eq!(client.device().config(0, expected.len() as u32)?, expected);
    }
    Ok(())
}

#[test]
fn versions_are_agreed_on() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.connect(&Options::default())?;
    for (msize, version, answer, answered) in [
        (4096, VERSION, 4096, VERSION),
        (8192, VERSION, 8192, VERSION),
        (131_096, VERSION, 131_096, VERSION),
        (512_000, VERSION, 512_000, VERSION),
        (8192, b"9P1999", 8192, b"unknown"),
        (8192, b"", 8192, b"unknown"),
        (8192, b"9P2000.L ", 8192, b"unknown"),
        (8192, b"HTTP/1.1", 8192, b"unknown"),
    ] {
        client.expect(&T::Version { msize, version }, &R::Version { msize: answer, version: answered });
    }
    for msize in [0, 1, 24, 4095] {
        client.expect_error(&T::Version { msize, version: VERSION }, Errno::INVAL);
    }
    for msize in [MAX_MSIZE, MAX_MSIZE + 1, u32::MAX] {
        let (answer, version) = client.version(msize)?;
        assert_eq!(version, VERSION);
        assert!((512_000..=MAX_MSIZE).contains(&answer), "{msize} is answered by {answer}");
    }
    Ok(())
}

#[test]
fn the_largest_message_is_an_option() -> Result<()> {
    let share = Share::new(["--max-msize", "65536"])?;
    let mut client = share.connect(&Options::default())?;
    client.expect(
        &T::Version { msize: 512_000, version: VERSION },
        &R::Version { msize: 65536, version: VERSION },
    );
    client.attach(ROOT, b"")?;
    let fid = client.create(ROOT, "file", 0o644)?;
    client.write(fid, 0, &vec![7; 60_000])?;
    client.write(fid, 60_000, &vec![7; 60_000])?;
    // A reply is never longer than what was agreed on, whatever the buffers hold.
    let data = client.read(fid, 0, 400_000)?;
    assert!((4096..=65536 - 11).contains(&data.len()), "{} bytes", data.len());
    assert!(data.iter().all(|&byte| byte == 7));
    Ok(())
}

#[test]
fn nothing_is_served_before_a_version() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.connect(&Options::default())?;
    assert!(client.attach(ROOT, b"").is_err());
    assert!(client.getattr(ROOT).is_err());
    assert!(client.walk(ROOT, 1, &["a"]).is_err());
    client.start_session()?;
    client.check_serves()
}

#[test]
fn a_new_version_ends_the_session() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    client.version(8192)?;
    for fid in [ROOT, fid] {
        client.expect_error(&T::Getattr { fid, mask: GETATTR_ALL }, Errno::BADF);
    }
    client.attach(ROOT, b"")?;
    assert_eq!(client.stat("file")?.size, 0);
    Ok(())
}

#[test]
fn a_new_connection_has_a_fresh_session() -> Result<()> {
    let share = Share::plain()?;
    drop(share.client()?);
    let mut client = share.connect(&Options::default())?;
    assert!(client.getattr(ROOT).is_err(), "fids of the last connection are gone");
    client.start_session()?;
    client.check_serves()
}

#[test]
fn authentication_is_not_required() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.connect(&Options::default())?;
    client.version(8192)?;
    let auth = T::Auth { afid: 5, uname: b"root", aname: b"", n_uname: 0 };
    client.expect_error(&auth, Errno::NOENT);
    // The afid was not made.
    client.expect_error(&T::Clunk { fid: 5 }, Errno::BADF);
    Ok(())
}

#[test]
fn attaches_go_to_the_share() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir_all(share.join("sub/dir"))?;
    fs::write(share.join("file"), "")?;
    let mut client = share.connect(&Options::default())?;
    client.version(8192)?;
    let root = (QTDIR, path_of(share.path()));
    let below = (QTDIR, path_of(&share.join("sub/dir")));
    let attaches: [(&[u8], &[u8], u32, _); 6] = [
        (b"nobody", b"", NO_UNAME, root),
        (b"nobody", b"/", NO_UNAME, root),
        (b"", b"", 0, root),
        (b"", b"/", 1000, root),
        (b"nobody-knows-this-user", b"", NO_UNAME, root),
        (b"", b"/sub/dir", 0, below),
    ];
    for (fid, (uname, aname, n_uname, expected)) in (0..).zip(attaches) {
        let qid = client.attach_as(fid, uname, aname, n_uname)?;
        assert_eq!((qid.kind, qid.path), expected, "{}", String::from_utf8_lossy(aname));
    }
    for aname in [&b"missing"[..], b"/missing", b"/sub/missing", b"/../outside", b"../outside", b"/sub/dir\0"]
    {
        let attach = T::Attach { fid: 50, afid: NO_FID, uname: b"", aname, n_uname: 0 };
        client.expect_error(&attach, Errno::NOENT);
    }
    assert!(client.attach(50, b"/file").is_err(), "a file is no root");
    assert_eq!(client.attach(0, b""), Err(Errno::BADF), "a fid in use");
    // `..` of a subdirectory's attach is that subdirectory.
    client.walk(5, 51, &[".."])?;
    assert_eq!(qid(&mut client, 51).path, below.1, "`..` at the root of an attach");
    Ok(())
}

#[test]
fn exports_have_names() -> Result<()> {
    let other = tests::driver::ninep::share::scratch()?;
    fs::write(other.path().join("there"), "x")?;
    let export = format!("other={}", other.path().display());
    let share = Share::new(["--export", &export])?;
    let mut client = share.client()?;
    client.attach(7, b"other")?;
    let there = client.at_fid(7, &["there"])?;
    assert_eq!(client.getattr(there)?.size, 1);
    assert_eq!(client.at("there"), Err(Errno::NOENT));
    assert_eq!(client.attach(8, b"others"), Err(Errno::NOENT));
    Ok(())
}

#[test]
fn unknown_messages_are_not_supported() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    // Tlerror, replies, Terror, and the messages of plain 9P2000.
    for number in [0, 1, 6, 7, 9, 10, 11, 13, 25, 77, 101, 106, 107, 112, 114, 124, 126, 128, 200, 255] {
        let bytes = [&[15, 0, 0, 0, number, 0x34, 0x12][..], &[0; 8]].concat();
        let returned = client.exchange(&request(&bytes, 64))?;
        let expected = R::Lerror { ecode: Errno::OPNOTSUPP.raw_os_error() as u32 };
        assert_eq!(returned.written(), expected.encode(0x1234), "message {number}");
        assert!(returned.is_clean());
    }
    client.check_serves()
}

#[test]
fn a_fid_that_is_unknown_is_a_bad_one() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    let mut client = share.client()?;
    let file = client.at("file")?;
    let fid = UNKNOWN;
    let requests = [
        T::Statfs { fid },
        T::Lopen { fid, flags: 0 },
        T::Lcreate { fid, name: b"x", flags: 0, mode: 0o644, gid: 0 },
        T::Symlink { dfid: fid, name: b"x", target: b"y", gid: 0 },
        T::Mknod { dfid: fid, name: b"x", mode: 0o010_644, major: 0, minor: 0, gid: 0 },
        T::Rename { fid, dfid: ROOT, name: b"x" },
        T::Rename { fid: file, dfid: fid, name: b"x" },
        T::Readlink { fid },
        T::Getattr { fid, mask: GETATTR_ALL },
        T::Setattr { fid, attr: SetAttr::default() },
        T::Xattrwalk { fid, newfid: 99, name: b"user.x" },
        T::Xattrcreate { fid, name: b"user.x", size: 1, flags: 0 },
        T::Readdir { fid, offset: 0, count: 512 },
        T::Fsync { fid, datasync: 0 },
        T::Lock { fid, kind: 0, flags: 0, start: 0, length: 0, proc_id: 1, client_id: b"me" },
        T::Getlock { fid, lock: Lock::default() },
        T::Link { dfid: fid, fid: file, name: b"x" },
        T::Link { dfid: ROOT, fid, name: b"x" },
        T::Mkdir { dfid: fid, name: b"x", mode: 0o755, gid: 0 },
        T::Renameat { olddirfid: fid, oldname: b"file", newdirfid: ROOT, newname: b"x" },
        T::Renameat { olddirfid: ROOT, oldname: b"file", newdirfid: fid, newname: b"x" },
        T::Unlinkat { dirfid: fid, name: b"file", flags: 0 },
        T::Walk { fid, newfid: 99, names: vec![] },
        T::Walk { fid, newfid: 99, names: vec![b"file"] },
        T::Walk { fid, newfid: fid, names: vec![] },
        T::Read { fid, offset: 0, count: 10 },
        T::Read { fid, offset: 0, count: 8192 },
        T::Write { fid, offset: 0, data: Data(b"data") },
        T::Write { fid, offset: 0, data: Data(&[0; 8192]) },
        T::Clunk { fid },
        T::Remove { fid },
    ];
    for request in requests {
        client.expect_error(&request, Errno::BADF);
    }
    client.expect_error(&T::Getattr { fid: NO_FID, mask: GETATTR_ALL }, Errno::BADF);
    client.expect_error(&T::Getattr { fid: 99, mask: GETATTR_ALL }, Errno::BADF);
    assert_eq!(fs::read_dir(share.path())?.count(), 1, "nothing was made");
    Ok(())
}

#[test]
fn walks_give_the_qids_on_the_way() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir_all(share.join("a/b/c"))?;
    fs::write(share.join("a/b/file"), "")?;
    symlink("b", share.join("a/link"))?;
    let mut client = share.client()?;
    let id = |name: &str, kind| (kind, path_of(&share.join(name)));

    client.expect(&T::Walk { fid: ROOT, newfid: 10, names: vec![] }, &R::Walk { qids: vec![] });
    let qids = client.walk(10, 11, &["a", "b", "c"])?;
    assert_eq!(identities(&qids), [id("a", QTDIR), id("a/b", QTDIR), id("a/b/c", QTDIR)]);
    assert_eq!(qids[2], qid(&mut client, 11), "the same qid everywhere");
    // In place.
    assert_eq!(
        identities(&client.walk(11, 11, &["..", "file"])?),
        [id("a/b", QTDIR), id("a/b/file", QTFILE)]
    );
    assert_eq!(identities(&client.walk(10, 12, &["a", "link"])?), [id("a", QTDIR), id("a/link", QTSYMLINK)]);
    assert_eq!(client.readlink(12)?, b"b");

    // A walk that ends early has the qids so far, and makes no fid.
    let qids = client.walk(ROOT, 13, &["a", "b", "missing", "c"])?;
    assert_eq!(identities(&qids), [id("a", QTDIR), id("a/b", QTDIR)]);
    client.expect_error(&T::Getattr { fid: 13, mask: 0 }, Errno::BADF);
    // Through a link, which is not followed, and through a file.
    assert_eq!(client.walk(ROOT, 13, &["a", "link", "c"])?.len(), 2);
    assert_eq!(client.walk(ROOT, 13, &["a", "b", "file", "c"])?.len(), 3);
    client.expect_error(&T::Getattr { fid: 13, mask: 0 }, Errno::BADF);
    // An early end leaves a fid that was to walk in place where it was.
    assert_eq!(client.walk(10, 10, &["a", "missing"])?.len(), 1);
    assert_eq!(qid(&mut client, 10).path, path_of(share.path()));

    // At the first name it is an error.
    client.expect_error(&T::Walk { fid: ROOT, newfid: 13, names: vec![b"missing", b"a"] }, Errno::NOENT);
    client.expect_error(&T::Walk { fid: 11, newfid: 13, names: vec![b"x"] }, Errno::NOTDIR);
    client.expect_error(&T::Walk { fid: 11, newfid: 13, names: vec![b".."] }, Errno::NOTDIR);
    client.expect_error(&T::Walk { fid: 12, newfid: 13, names: vec![b"c"] }, Errno::NOTDIR);
    // newfid is another fid in use.
    client.expect_error(&T::Walk { fid: ROOT, newfid: 11, names: vec![b"a"] }, Errno::BADF);
    client.expect_error(&T::Walk { fid: ROOT, newfid: 11, names: vec![] }, Errno::BADF);
    Ok(())
}

#[test]
fn a_walk_has_at_most_sixteen_names() -> Result<()> {
    let share = Share::plain()?;
    let deep = ["d"; 17].join("/");
    fs::create_dir_all(share.join(&deep))?;
    let mut client = share.client()?;
    let sixteen = client.walk(ROOT, 10, &["d"; 16])?;
    assert_eq!(sixteen.len(), 16);
    assert_eq!(sixteen[15].path, path_of(&share.join(["d"; 16].join("/"))));
    client.expect_error(&T::Walk { fid: ROOT, newfid: 11, names: vec![b"d"; 17] }, Errno::INVAL);
    client.expect_error(&T::Clunk { fid: 11 }, Errno::BADF);
    Ok(())
}

#[test]
fn names_that_are_none_are_not_found() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir(share.join("a"))?;
    fs::write(share.join("a/b"), "")?;
    let mut client = share.client()?;
    let long = [b'x'; 256];
    for name in [&b""[..], b".", b"a/b", b"/", b"/a", b"a/", b"./a", b"../share", b"a\0", b"\0"] {
        client.expect_error(&T::Walk { fid: ROOT, newfid: 10, names: vec![name] }, Errno::NOENT);
    }
    client.expect_error(&T::Walk { fid: ROOT, newfid: 10, names: vec![&long] }, Errno::NAMETOOLONG);
    client.expect_error(
        &T::Walk { fid: ROOT, newfid: 10, names: vec![&vec![b'x'; 60_000]] },
        Errno::NAMETOOLONG,
    );
    let dir = client.at("a")?;
    let file = client.at("a/b")?;
    for (name, error) in [
        (&b"."[..], Errno::EXIST),
        (b"..", Errno::EXIST),
        (b"", Errno::NOENT),
        (b"x/y", Errno::INVAL),
        (b"/x", Errno::INVAL),
        (&long, Errno::NAMETOOLONG),
    ] {
        let fid = client.clone_fid(dir)?;
        for request in [
            T::Lcreate { fid, name, flags: flags::RDWR, mode: 0o644, gid: 0 },
            T::Mkdir { dfid: dir, name, mode: 0o755, gid: 0 },
            T::Symlink { dfid: dir, name, target: b"t", gid: 0 },
            T::Mknod { dfid: dir, name, mode: 0o010_644, major: 0, minor: 0, gid: 0 },
            T::Link { dfid: dir, fid: file, name },
        ] {
            client.expect_error(&request, error);
        }
        client.clunk(fid)?;
        // Where the kernel itself has other errors for `.` and `..`, all that matters is that nothing happens.
        let renameat = |oldname, newname| T::Renameat { olddirfid: dir, oldname, newdirfid: dir, newname };
        for request in [
            renameat(b"b", name),
            renameat(name, b"c"),
            T::Rename { fid: file, dfid: dir, name },
            T::Unlinkat { dirfid: dir, name, flags: 0 },
            T::Unlinkat { dirfid: dir, name, flags: flags::REMOVEDIR },
        ] {
            let reply = client.call(&request);
            assert!(matches!(reply.message(), R::Lerror { .. }), "{request:?}: {reply:?}");
        }
    }
    let left: Vec<_> = fs::read_dir(share.join("a"))?.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["b"]);
    Ok(())
}

#[test]
fn dot_dot_is_the_parent_and_ends_at_the_root() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir_all(share.join("a/b"))?;
    let mut client = share.client()?;
    let root = path_of(share.path());
    let qids = client.walk(ROOT, 10, &["..", "..", "a", "..", "..", "a", "b", "..", "..", ".."])?;
    assert_eq!(qids.len(), 10);
    for at in [0, 1, 3, 4, 8, 9] {
        assert_eq!((qids[at].kind, qids[at].path), (QTDIR, root), "name {at}");
    }
    assert_eq!(qid(&mut client, 10).path, root);
    Ok(())
}

#[test]
fn an_open_fid_is_cloned_and_opened_again() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "content")?;
    fs::create_dir(share.join("dir"))?;
    let mut client = share.client()?;
    for (path, open) in [("file", flags::RDWR), ("dir", flags::RDONLY | flags::DIRECTORY)] {
        let fid = client.open(path, open)?;
        let clone = client.clone_fid(fid)?;
        client.expect_error(&T::Read { fid: clone, offset: 0, count: 10 }, Errno::BADF);
        assert_eq!(client.lopen(clone, flags::RDONLY)?.0, qid(&mut client, fid));
        client.clunk(fid)?;
        match path {
            "file" => assert_eq!(client.read(clone, 0, 100)?, b"content"),
            _ => assert_eq!(client.list(clone)?.len(), 2),
        }
    }
    Ok(())
}

#[test]
fn a_clunked_fid_is_free() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    for _ in 0..3 {
        client.walk::<&str>(ROOT, 9, &[])?;
        client.expect(&T::Clunk { fid: 9 }, &R::Clunk {});
        client.expect_error(&T::Clunk { fid: 9 }, Errno::BADF);
    }
    // The root's fid is one like any other.
    client.walk::<&str>(ROOT, 9, &[])?;
    client.clunk(ROOT)?;
    client.check_serves().unwrap_err();
    assert_eq!(client.getattr(9)?.qid.path, path_of(share.path()));
    Ok(())
}

#[test]
fn a_flush_of_an_unknown_tag_is_answered() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    for oldtag in [0, 1, 500, 0xfffe, NO_TAG] {
        client.expect(&T::Flush { oldtag }, &R::Flush {});
    }
    Ok(())
}

#[test]
fn any_split_of_a_request_is_served() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let bytes = T::Getattr { fid: ROOT, mask: GETATTR_ALL }.encode(0x55);
    let expected = client.exchange(&request(&bytes, 4096))?;
    assert_eq!(expected.used, 160);
    assert!(expected.is_clean(), "nothing behind the reply is written");
    assert_eq!(expected.message().map(|(tag, _)| tag), Some(0x55));
    for cut in 1..bytes.len() {
        for room in [1, 4, 7, 11, 80, 159, 160] {
            let mut pieces = request(&bytes, 161).cut(&[cut], &[room]);
            pieces.indirect = cut % 2 == 0;
            let returned = client.exchange(&pieces)?;
            assert_eq!(returned.written(), expected.written(), "cut at {cut} and {room}");
            assert!(returned.is_clean());
        }
    }
    // A byte each; the ring's own table is too short for that.
    let every: Vec<usize> = (1..160).collect();
    let returned = client.exchange(&request(&bytes, 160).cut(&every, &every).indirect())?;
    assert_eq!(returned.written(), expected.written());
    Ok(())
}

#[test]
fn descriptors_may_lie_in_the_ring() -> Result<()> {
    let share = Share::plain()?;
    let mut client =
        share.client_with(&Options { ring_size: 128, ..Options::default() }.direct().msize(32768))?;
    let fid = client.create(ROOT, "file", 0o644)?;
    let data: Vec<u8> = (0..30_000_u32).map(|i| (i / 7) as u8).collect();
    assert_eq!(client.write(fid, 0, &data)?, 30_000);
    assert_eq!(client.read(fid, 0, 32_000)?, data);
    assert_eq!(fs::read(share.join("file"))?, data);
    Ok(())
}

#[test]
fn an_error_lands_in_the_header_of_a_zero_copy_read() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    // Linux makes this an 11-byte buffer and pages; expect() reads what was written from there.
    client.expect_error(&T::Read { fid: ROOT, offset: 0, count: 65536 }, Errno::BADF);
    client.expect_error(&T::Readdir { fid: ROOT, offset: 0, count: 65536 }, Errno::BADF);
    let dir = client.open("", flags::RDONLY)?;
    client.expect_error(&T::Read { fid: dir, offset: 0, count: 65536 }, Errno::ISDIR);
    Ok(())
}

#[test]
fn many_requests_are_outstanding_at_once() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![9; 100_000])?;
    for polling in [false, true] {
        let mut client = share.client_with(&Options { polling, ..Options::default() })?;
        let fid = client.open("file", flags::RDONLY)?;
        let requests: Vec<T> = (0..60_u64)
            .map(|i| match i % 3 {
                0 => T::Getattr { fid, mask: GETATTR_ALL },
                1 => T::Read { fid, offset: i, count: 50_000 },
                _ => T::Walk { fid: ROOT, newfid: 1000 + i as u32, names: vec![b"file"] },
            })
            .collect();
        let tags: Vec<u16> = requests.iter().map(|request| client.prepare(request)).collect();
        for &tag in &tags {
            client.post(tag);
        }
        client.kick();
        for (request, tag) in requests.iter().zip(tags) {
            let reply = client.wait(tag);
            client.check(request, tag, &reply);
            match reply.message() {
                R::Getattr { attr } => assert_eq!(attr.size, 100_000),
                R::Read { data } => assert_eq!(data.0, vec![9; 50_000]),
                R::Walk { qids } => assert_eq!(qids.len(), 1),
                other => panic!("{other:?}"),
            }
        }
    }
    Ok(())
}

#[test]
fn several_queues_share_a_session() -> Result<()> {
    let share = Share::new(["--num-queues", "2"])?;
    let mut clients = Client::connect_queues(share.socket(), &Options::default(), 2)?;
    clients[0].start_session()?;
    let fid = clients[0].create(ROOT, "file", 0o644)?;
    clients[1].check_serves()?;
    clients[1].write(fid, 0, b"from the second queue")?;
    assert_eq!(clients[0].read(fid, 5, 100)?, b"the second queue");
    Ok(())
}
