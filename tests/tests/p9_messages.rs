//! Each message of 9P2000.L towards `vhost-user-9p`: what it does on the host, what it answers, and how it fails.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::Result;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, statvfs};
use rustix::io::Errno;
use tests::driver::ninep::flags::{
    self, GETATTR_BASIC, LOCK_SUCCESS, LOCK_UNLCK, LOCK_WRLCK, QTDIR, QTFILE, QTSYMLINK, REMOVEDIR,
};
use tests::driver::ninep::raw::request;
use tests::driver::ninep::share::ROOT;
use tests::driver::ninep::wire::{Data, Lock, SetAttr, Time};
use tests::driver::ninep::{Attr, Client, R, Share, T};

/// What the daemon says is the best length of I/O for the client's msize.
const IOUNIT: u32 = (512_000 - 24) / 4096 * 4096;
/// Not the identity of anybody: leave it as it is.
const NOBODY: u32 = u32::MAX;

/// Checks attributes against the host's.
fn check_attr(attr: &Attr, path: &Path) -> Result<()> {
    let host = fs::symlink_metadata(path)?;
    let kind = if host.is_dir() {
        QTDIR
    } else if host.is_symlink() {
        QTSYMLINK
    } else {
        QTFILE
    };
    let time = |sec: i64, nsec: i64| Time { sec: sec as u64, nsec: nsec as u64 };
    let expected = Attr {
        qid: tests::driver::ninep::Qid { kind, version: attr.qid.version, path: host.ino().wrapping_sub(2) },
        mode: host.mode(),
        uid: host.uid(),
        gid: host.gid(),
        nlink: host.nlink(),
        rdev: attr.rdev,
        size: host.size(),
        blksize: IOUNIT.into(),
        blocks: host.blocks(),
        atime: time(host.atime(), host.atime_nsec()),
        mtime: time(host.mtime(), host.mtime_nsec()),
        ctime: time(host.ctime(), host.ctime_nsec()),
        ..*attr
    };
    assert_eq!(*attr, expected, "{}", path.display());
    assert_eq!(attr.valid & GETATTR_BASIC, GETATTR_BASIC, "the basic attributes are there");
    if attr.valid & flags::GETATTR_BTIME != 0 {
        let born = host.created()?.duration_since(std::time::UNIX_EPOCH)?;
        assert_eq!(attr.btime, Time { sec: born.as_secs(), nsec: born.subsec_nanos().into() });
    }
    Ok(())
}

#[test]
fn getattr_is_the_hosts_stat() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![1; 12345])?;
    fs::create_dir_all(share.join("dir/sub"))?;
    symlink("some/target", share.join("link"))?;
    mknodat(CWD, share.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0)?;
    fs::hard_link(share.join("file"), share.join("second"))?;
    fs::set_permissions(share.join("file"), Permissions::from_mode(0o4751))?;
    let mut client = share.client()?;
    for name in ["", "file", "second", "dir", "link", "fifo"] {
        let attr = client.stat(name)?;
        check_attr(&attr, &share.join(name))?;
        if name != "fifo" {
            assert_ne!(attr.qid.version, 0, "{name}: a version of 0 means that it must not be cached");
        }
    }
    assert_eq!(client.stat("file")?.qid, client.stat("second")?.qid);
    // Linux asks for a part and takes what it gets.
    let fid = client.at("file")?;
    for mask in [0, 1, 0x200, GETATTR_BASIC, u64::MAX] {
        let attr = client.getattr_of(fid, mask)?;
        assert_eq!(attr.qid, client.stat("file")?.qid, "mask {mask:#x}");
        assert_eq!(attr.valid & !flags::GETATTR_ALL, 0);
    }
    Ok(())
}

#[test]
fn a_qid_version_follows_the_content() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    let mut client = share.client()?;
    let mut last = client.stat("file")?.qid;
    for content in ["a", "bb", "ccc"] {
        fs::write(share.join("file"), content)?;
        let qid = client.stat("file")?.qid;
        assert_ne!(qid.version, last.version, "{content}");
        assert_eq!(qid.path, last.path);
        last = qid;
    }
    Ok(())
}

#[test]
fn open_answers_qid_and_iounit() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "content")?;
    fs::create_dir(share.join("dir"))?;
    let mut client = share.client()?;
    for (name, flags) in [("file", flags::RDONLY), ("file", flags::RDWR), ("dir", flags::RDONLY)] {
        let fid = client.at(name)?;
        let qid = client.getattr(fid)?.qid;
        client.expect(&T::Lopen { fid, flags }, &R::Lopen { qid, iounit: IOUNIT });
        assert!(client.lopen(fid, flags).is_err(), "a fid is opened once");
    }
    // A smaller msize has a smaller unit, in files and in attributes.
    client.version(8192)?;
    client.attach(ROOT, b"")?;
    let fid = client.at("file")?;
    assert_eq!(client.getattr(fid)?.blksize, 4096);
    assert_eq!(client.lopen(fid, flags::RDONLY)?.1, 4096);
    Ok(())
}

#[test]
fn open_flags_that_make_no_sense_here_are_ignored() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "content")?;
    let mut client = share.client()?;
    let ignored = [
        flags::CREATE,
        flags::NOCTTY,
        flags::NONBLOCK,
        flags::FASYNC,
        flags::DIRECT,
        flags::LARGEFILE,
        flags::NOFOLLOW,
        flags::NOATIME,
        flags::CLOEXEC,
        flags::SYNC,
        flags::CREATE | flags::EXCL,
        0x8000_0000,
    ];
    for more in ignored {
        let fid = client.open("file", flags::RDWR | more)?;
        // Odd offsets and lengths, which O_DIRECT would refuse.
        assert_eq!(client.read(fid, 1, 3)?, b"ont", "flags {more:#o}");
        assert_eq!(client.write(fid, 1, b"ONT")?, 3, "flags {more:#o}");
        client.write(fid, 1, b"ont")?;
        client.clunk(fid)?;
    }
    assert_eq!(fs::read(share.join("file"))?, b"content");
    assert_eq!(client.open("file", flags::DIRECTORY), Err(Errno::NOTDIR));
    Ok(())
}

#[test]
fn open_flags_do_what_they_say() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "content")?;
    let mut client = share.client()?;
    let reader = client.open("file", flags::RDONLY)?;
    client.expect_error(&T::Write { fid: reader, offset: 0, data: Data(b"x") }, Errno::BADF);
    let writer = client.open("file", flags::WRONLY)?;
    client.expect_error(&T::Read { fid: writer, offset: 0, count: 1 }, Errno::BADF);
    let appender = client.open("file", flags::WRONLY | flags::APPEND)?;
    client.expect(&T::Write { fid: appender, offset: 0, data: Data(b"+1") }, &R::Write { count: 2 });
    client.write(appender, 0, b"+2")?;
    assert_eq!(fs::read(share.join("file"))?, b"content+1+2");
    client.open("file", flags::WRONLY | flags::TRUNC)?;
    assert_eq!(fs::read(share.join("file"))?, b"");
    assert_eq!(client.read(reader, 0, 10)?, b"");
    Ok(())
}

#[test]
fn only_files_and_directories_are_opened() -> Result<()> {
    let share = Share::plain()?;
    let node =
        |name: &str, kind, device| mknodat(CWD, share.join(name), kind, Mode::from_raw_mode(0o666), device);
    node("fifo", FileType::Fifo, 0)?;
    node("socket", FileType::Socket, 0)?;
    // Device nodes need a privilege that the tests may not have.
    let mut special = vec!["fifo", "socket"];
    if node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3)).is_ok() {
        node("loop", FileType::BlockDevice, rustix::fs::makedev(7, 0))?;
        special.extend(["null", "loop"]);
    }
    fs::create_dir(share.join("dir"))?;
    symlink("dir", share.join("link"))?;
    let mut client = share.client()?;
    for name in special {
        for open in
            [flags::RDONLY, flags::WRONLY, flags::RDWR | flags::NONBLOCK, flags::RDONLY | flags::TRUNC]
        {
            assert_eq!(client.open(name, open), Err(Errno::NXIO), "{name}, flags {open:#o}");
        }
    }
    assert_eq!(client.open("link", flags::RDONLY), Err(Errno::LOOP));
    for open in [flags::WRONLY, flags::RDWR, flags::RDWR | flags::TRUNC] {
        assert_eq!(client.open("dir", open), Err(Errno::ISDIR), "flags {open:#o}");
    }
    Ok(())
}

#[test]
fn create_makes_a_file_and_opens_it() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.clone_fid(ROOT)?;
    let (qid, iounit) = client.lcreate(fid, "new", flags::RDWR | flags::CREATE, 0o646)?;
    assert_eq!(iounit, IOUNIT);
    assert_eq!(qid, client.getattr(fid)?.qid, "the fid is the new file");
    check_attr(&client.getattr(fid)?, &share.join("new"))?;
    assert_eq!(fs::metadata(share.join("new"))?.mode(), 0o100_646, "the umask is the guest's");
    client.write(fid, 0, b"content")?;
    assert_eq!(client.read(fid, 3, 10)?, b"tent");
    // A fid that is no directory, and one that is open.
    assert!(client.lcreate(fid, "x", flags::RDWR, 0o644).is_err());
    let file = client.at("new")?;
    assert_eq!(client.lcreate(file, "x", flags::RDWR, 0o644), Err(Errno::NOTDIR));
    // Without O_EXCL a file that is there is opened, and cut if it says so.
    let fid = client.clone_fid(ROOT)?;
    client.lcreate(fid, "new", flags::RDWR | flags::CREATE, 0o600)?;
    assert_eq!(client.read(fid, 0, 10)?, b"content");
    let fid = client.clone_fid(ROOT)?;
    assert_eq!(
        client.lcreate(fid, "new", flags::RDWR | flags::CREATE | flags::EXCL, 0o600),
        Err(Errno::EXIST)
    );
    client.lcreate(fid, "new", flags::RDWR | flags::CREATE | flags::TRUNC, 0o600)?;
    assert_eq!(fs::metadata(share.join("new"))?.len(), 0);
    assert_eq!(fs::metadata(share.join("new"))?.mode() & 0o7777, 0o646);
    Ok(())
}

#[test]
fn reads_and_writes_move_bytes() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir(share.join("dir"))?;
    let mut client = share.client()?;
    let unopened = client.clone_fid(ROOT)?;
    client.expect_error(&T::Read { fid: unopened, offset: 0, count: 10 }, Errno::BADF);
    client.expect_error(&T::Write { fid: unopened, offset: 0, data: Data(b"x") }, Errno::BADF);
    let dir = client.open("dir", flags::RDONLY)?;
    client.expect_error(&T::Read { fid: dir, offset: 0, count: 10 }, Errno::ISDIR);

    let fid = client.create(ROOT, "file", 0o644)?;
    client.expect(&T::Read { fid, offset: 0, count: 10 }, &R::Read { data: Data(b"") });
    client.expect(&T::Write { fid, offset: 0, data: Data(b"") }, &R::Write { count: 0 });
    client.expect(&T::Write { fid, offset: 3, data: Data(b"abc") }, &R::Write { count: 3 });
    client.expect(&T::Read { fid, offset: 0, count: 100 }, &R::Read { data: Data(b"\0\0\0abc") });
    client.expect(&T::Read { fid, offset: 4, count: 1 }, &R::Read { data: Data(b"b") });
    client.expect(&T::Read { fid, offset: 4, count: 0 }, &R::Read { data: Data(b"") });
    client.expect(&T::Read { fid, offset: 6, count: 1 }, &R::Read { data: Data(b"") });
    client.expect(&T::Read { fid, offset: 1 << 40, count: 5000 }, &R::Read { data: Data(b"") });
    client.expect_error(&T::Read { fid, offset: u64::MAX, count: 10 }, Errno::INVAL);
    client.expect_error(&T::Write { fid, offset: u64::MAX, data: Data(b"x") }, Errno::INVAL);

    // Sizes around pages and the limit of copies, past any cache of the client.
    for len in [1, 1023, 1024, 1025, 4095, 4096, 4097, 65536, IOUNIT as usize, 512_000 - 24] {
        let data: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
        assert_eq!(client.write(fid, 5, &data)?, len as u32);
        assert_eq!(client.read(fid, 5, len as u32)?, data, "{len} bytes");
        let mut host = vec![0; len];
        fs::File::open(share.join("file"))?.read_exact_at(&mut host, 5)?;
        assert_eq!(host, data, "{len} bytes");
    }
    Ok(())
}

#[test]
fn a_read_of_more_than_a_reply_holds_is_short() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![5; 100_000])?;
    let mut client = share.client()?;
    client.version(8192)?;
    client.attach(ROOT, b"")?;
    let fid = client.open("file", flags::RDONLY)?;
    for count in [8182, 9000, 100_000] {
        let data = client.read(fid, 0, count)?;
        assert!((4096..=8192 - 11).contains(&data.len()), "{} of {count} bytes", data.len());
        assert!(data.iter().all(|&byte| byte == 5));
    }
    Ok(())
}

#[test]
fn readdir_lists_each_entry_once() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir(share.join("dir"))?;
    for i in 0..300 {
        fs::write(share.join(format!("dir/file-{i:03}")), "")?;
    }
    symlink("x", share.join("dir/link"))?;
    fs::create_dir(share.join("dir/sub"))?;
    mknodat(CWD, share.join("dir/fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0)?;
    let mut expected: Vec<String> = (0..300).map(|i| format!("file-{i:03}")).collect();
    expected.extend([".", "..", "link", "sub", "fifo"].map(String::from));
    expected.sort();

    let mut client = share.client()?;
    let fid = client.open("dir", flags::RDONLY)?;
    let all = client.list(fid)?;
    let mut names: Vec<String> =
        all.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect();
    names.sort();
    assert_eq!(names, expected);
    for entry in &all {
        let (path, kind) = match entry.name.as_slice() {
            b"." => ("dir".to_owned(), 4),
            b".." => (String::new(), 4),
            b"sub" => ("dir/sub".to_owned(), 4),
            b"link" => ("dir/link".to_owned(), 10),
            b"fifo" => ("dir/fifo".to_owned(), 1),
            name => (format!("dir/{}", String::from_utf8_lossy(name)), 8),
        };
        let qid = client.stat(&path)?.qid;
        assert_eq!((entry.qid.kind, entry.qid.path), (qid.kind, qid.path), "{path:?}");
        assert_eq!(entry.kind, kind, "{path:?}");
    }
    // The same by small replies, and again from the start: offsets are positions, not a state.
    for count in [64, 100, 511, 1024, 4096] {
        let mut again = Vec::new();
        let mut offset = 0;
        loop {
            let tag = client.submit(&T::Readdir { fid, offset, count });
            let reply = client.wait(tag);
            assert!(reply.bytes.len() <= 11 + count as usize, "{} bytes for {count}", reply.bytes.len());
            let R::Readdir { data } = reply.message() else { panic!("{reply:?}") };
            let entries = tests::driver::ninep::wire::dirents(data.0).expect("whole entries");
            let Some(last) = entries.last() else { break };
            offset = last.offset;
            again.extend(entries);
        }
        assert_eq!(again, all, "count {count}");
    }
    // Every entry's offset leads to the next.
    for (entry, next) in all.iter().zip(&all[1..]).step_by(17) {
        assert_eq!(client.readdir(fid, entry.offset, 4096)?.first(), Some(next));
    }
    let end = all.last().map_or(0, |entry| entry.offset);
    client.expect(&T::Readdir { fid, offset: end, count: 4096 }, &R::Readdir { data: Data(b"") });
    Ok(())
}

#[test]
fn readdir_needs_an_open_directory_and_room() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("a-name-that-takes-some-room"), "")?;
    let mut client = share.client()?;
    let closed = client.clone_fid(ROOT)?;
    client.expect_error(&T::Readdir { fid: closed, offset: 0, count: 4096 }, Errno::BADF);
    let file = client.open("a-name-that-takes-some-room", flags::RDONLY)?;
    client.expect_error(&T::Readdir { fid: file, offset: 0, count: 4096 }, Errno::NOTDIR);
    let dir = client.open("", flags::RDONLY)?;
    // An empty reply would be the end of the directory.
    for count in [0, 1, 10, 24] {
        client.expect_error(&T::Readdir { fid: dir, offset: 0, count }, Errno::INVAL);
    }
    assert_eq!(client.list(dir)?.len(), 3);
    Ok(())
}

#[test]
fn setattr_sets_what_is_valid() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "0123456789")?;
    let path = share.join("file");
    let mut client = share.client()?;
    let fid = client.at("file")?;
    let all = SetAttr {
        valid: 0,
        mode: 0o600,
        uid: 12,
        gid: 34,
        size: 4,
        atime: Time { sec: 1_000_000_000, nsec: 123_456_789 },
        mtime: Time { sec: 1_100_000_000, nsec: 987_654_321 },
    };
    let before = fs::metadata(&path)?;
    client.expect(&T::Setattr { fid, attr: all }, &R::Setattr {});
    let after = fs::metadata(&path)?;
    assert_eq!(
        (after.mode(), after.uid(), after.gid(), after.size(), after.atime(), after.mtime()),
        (before.mode(), before.uid(), before.gid(), before.size(), before.atime(), before.mtime()),
        "nothing is valid"
    );
    let mut set = |valid| client.setattr(fid, SetAttr { valid, ..all });
    set(flags::SETATTR_MODE)?;
    assert_eq!(fs::metadata(&path)?.mode(), 0o100_600);
    set(flags::SETATTR_SIZE)?;
    assert_eq!(fs::read(&path)?, b"0123");
    set(flags::SETATTR_ATIME | flags::SETATTR_ATIME_SET)?;
    let now = fs::metadata(&path)?;
    assert_eq!((now.atime(), now.atime_nsec()), (1_000_000_000, 123_456_789));
    assert!(now.mtime() > 1_100_000_000);
    set(flags::SETATTR_MTIME | flags::SETATTR_MTIME_SET)?;
    let now = fs::metadata(&path)?;
    assert_eq!((now.mtime(), now.mtime_nsec()), (1_100_000_000, 987_654_321));
    assert_eq!(now.atime(), 1_000_000_000);
    set(flags::SETATTR_MTIME | flags::SETATTR_CTIME)?;
    let now = fs::metadata(&path)?;
    assert!(now.mtime() > 1_100_000_000, "without the _SET flag it is now");
    assert_eq!(now.atime(), 1_000_000_000);
    set(flags::SETATTR_ATIME)?;
    assert!(fs::metadata(&path)?.atime() > 1_000_000_000);
    set(flags::SETATTR_CTIME)?;
    // Several at once.
    set(flags::SETATTR_MODE | flags::SETATTR_SIZE | flags::SETATTR_MTIME | flags::SETATTR_MTIME_SET)?;
    assert_eq!(fs::metadata(&path)?.mtime(), 1_100_000_000, "the size was set before the time");
    client.truncate(fid, 1 << 33)?;
    assert_eq!(fs::metadata(&path)?.len(), 1 << 33);
    assert_eq!(client.truncate(fid, u64::MAX), Err(Errno::INVAL));
    let dir = client.clone_fid(ROOT)?;
    assert_eq!(client.truncate(dir, 0), Err(Errno::ISDIR));
    Ok(())
}

#[test]
fn owners_change_one_by_one() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    symlink("file", share.join("link"))?;
    let before = fs::metadata(share.join("file"))?;
    let mut client = share.client()?;
    let owner = |name: &str| {
        let now = fs::symlink_metadata(share.join(name)).unwrap();
        (now.uid(), now.gid())
    };
    let fid = client.at("file")?;
    let mut set = |valid, uid, gid| client.setattr(fid, SetAttr { valid, uid, gid, ..SetAttr::default() });
    if !rustix::process::geteuid().is_root() {
        // Without the privilege only one's own identity can be set.
        set(flags::SETATTR_UID | flags::SETATTR_GID, before.uid(), before.gid())?;
        assert_eq!(set(flags::SETATTR_UID, before.uid() + 1, 0), Err(Errno::PERM));
        return Ok(());
    }
    set(flags::SETATTR_UID, 1234, 77)?;
    assert_eq!(owner("file"), (1234, before.gid()));
    set(flags::SETATTR_GID, 77, 2345)?;
    assert_eq!(owner("file"), (1234, 2345));
    set(flags::SETATTR_UID | flags::SETATTR_GID, 5, 6)?;
    assert_eq!(owner("file"), (5, 6));
    set(flags::SETATTR_UID | flags::SETATTR_GID, NOBODY, 7)?;
    assert_eq!(owner("file"), (5, 7), "chown(2) leaves -1 as it is");
    let link = client.at("link")?;
    client.chown(link, 8, 9)?;
    assert_eq!((owner("link"), owner("file")), ((8, 9), (5, 7)), "a link is not followed");
    Ok(())
}

#[test]
fn nodes_of_every_kind_are_made() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let check = |client: &mut Client, name: &str, qid: tests::driver::ninep::Qid| -> Result<()> {
        let attr = client.stat(name)?;
        assert_eq!((attr.qid.kind, attr.qid.path), (qid.kind, qid.path), "{name}");
        check_attr(&attr, &share.join(name))
    };
    let qid = client.mkdir(ROOT, "dir", 0o751)?;
    check(&mut client, "dir", qid)?;
    assert_eq!(fs::metadata(share.join("dir"))?.mode(), 0o040_751);
    let qid = client.symlink(ROOT, "link", "../any/\u{e9}/target")?;
    check(&mut client, "link", qid)?;
    assert_eq!(fs::read_link(share.join("link"))?, Path::new("../any/\u{e9}/target"));
    let qid = client.mknod(ROOT, "fifo", 0o010_622, (0, 0))?;
    check(&mut client, "fifo", qid)?;
    assert!(fs::metadata(share.join("fifo"))?.file_type().is_fifo());
    let qid = client.mknod(ROOT, "socket", 0o140_622, (0, 0))?;
    check(&mut client, "socket", qid)?;
    let qid = client.mknod(ROOT, "plain", 0o100_622, (0, 0))?;
    check(&mut client, "plain", qid)?;
    assert_eq!(fs::metadata(share.join("plain"))?.mode(), 0o100_622);
    if rustix::process::geteuid().is_root() {
        client.mknod(ROOT, "null", 0o020_666, (1, 3))?;
        let rdev = fs::metadata(share.join("null"))?.rdev();
        assert_eq!((rustix::fs::major(rdev), rustix::fs::minor(rdev)), (1, 3));
        // As Linux decodes it (`new_decode_dev` or the plain number: both agree on small ones).
        assert_eq!(client.stat("null")?.rdev, rdev);
    }
    for name in ["dir", "link", "fifo", "plain"] {
        assert_eq!(client.mkdir(ROOT, name, 0o755), Err(Errno::EXIST));
        assert_eq!(client.symlink(ROOT, name, "x"), Err(Errno::EXIST));
        assert_eq!(client.mknod(ROOT, name, 0o010_644, (0, 0)), Err(Errno::EXIST));
    }
    let file = client.at("plain")?;
    assert_eq!(client.mkdir(file, "x", 0o755), Err(Errno::NOTDIR));
    assert_eq!(client.symlink(ROOT, "empty", ""), Err(Errno::NOENT));
    assert_eq!(client.symlink(ROOT, "long", [b'x'; 4096]), Err(Errno::NAMETOOLONG));
    client.symlink(ROOT, "longest", [b'x'; 4095])?;
    let fid = client.at("longest")?;
    client.expect(&T::Readlink { fid }, &R::Readlink { target: &[b'x'; 4095] });
    let fid = client.at("plain")?;
    client.expect_error(&T::Readlink { fid }, Errno::INVAL);
    Ok(())
}

#[test]
fn links_and_renames_move_names() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir_all(share.join("a"))?;
    fs::create_dir_all(share.join("b/full/of"))?;
    fs::write(share.join("a/file"), "content")?;
    let mut client = share.client()?;
    let (a, b) = (client.at("a")?, client.at("b")?);
    let file = client.at("a/file")?;

    client.expect(&T::Link { dfid: b, fid: file, name: b"second" }, &R::Link {});
    assert_eq!(client.getattr(file)?.nlink, 2);
    client.expect_error(&T::Link { dfid: b, fid: file, name: b"second" }, Errno::EXIST);
    assert_eq!(client.link(ROOT, a, "dir"), Err(Errno::PERM), "no links to directories");
    assert_eq!(client.link(file, file, "x"), Err(Errno::NOTDIR));

    let request = T::Renameat { olddirfid: b, oldname: b"second", newdirfid: a, newname: b"third" };
    client.expect(&request, &R::Renameat {});
    client.expect_error(&request, Errno::NOENT);
    assert!(share.join("a/third").exists() && !share.join("b/second").exists());
    client.expect(&T::Rename { fid: file, dfid: b, name: b"moved" }, &R::Rename {});
    assert_eq!(fs::read(share.join("b/moved"))?, b"content");
    assert!(!share.join("a/file").exists());
    assert_eq!(client.getattr(file)?.nlink, 2, "the fid is still that file");
    // What rename(2) refuses.
    assert_eq!(client.renameat(b, "moved", ROOT, "a"), Err(Errno::ISDIR));
    assert_eq!(client.renameat(ROOT, "a", b, "moved"), Err(Errno::NOTDIR));
    assert_eq!(client.renameat(ROOT, "a", b, "full"), Err(Errno::NOTEMPTY));
    assert_eq!(client.renameat(ROOT, "b", b, "x"), Err(Errno::INVAL));
    assert_eq!(client.renameat(ROOT, "a", file, "x"), Err(Errno::NOTDIR));
    assert!(client.rename(ROOT, a, "root").is_err(), "the root has no name");
    assert_eq!(client.renameat(a, "third", a, "third"), Ok(()));
    Ok(())
}

#[test]
fn unlinking_and_removing() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir_all(share.join("full/of"))?;
    for name in ["one", "two", "three"] {
        fs::write(share.join(name), name)?;
    }
    symlink("one", share.join("link"))?;
    let mut client = share.client()?;
    let unlink = |name, flags| T::Unlinkat { dirfid: ROOT, name, flags };
    client.expect(&unlink(b"link", 0), &R::Unlinkat {});
    assert!(share.join("one").exists(), "a link is not followed");
    client.expect(&unlink(b"one", 0), &R::Unlinkat {});
    client.expect_error(&unlink(b"one", 0), Errno::NOENT);
    client.expect_error(&unlink(b"full", 0), Errno::ISDIR);
    client.expect_error(&unlink(b"full", REMOVEDIR), Errno::NOTEMPTY);
    client.expect_error(&unlink(b"two", REMOVEDIR), Errno::NOTDIR);
    client.expect_error(&unlink(b"two", 1), Errno::INVAL);

    // Tremove frees the fid whether it works or not.
    let fid = client.at("two")?;
    client.expect(&T::Remove { fid }, &R::Remove {});
    client.expect_error(&T::Clunk { fid }, Errno::BADF);
    assert!(!share.join("two").exists());
    let fid = client.at("full")?;
    client.expect_error(&T::Remove { fid }, Errno::NOTEMPTY);
    client.expect_error(&T::Clunk { fid }, Errno::BADF);
    let fid = client.at("full/of")?;
    client.remove(fid)?;
    let fid = client.clone_fid(ROOT)?;
    assert!(client.remove(fid).is_err(), "the root is not removed");
    client.expect_error(&T::Clunk { fid }, Errno::BADF);
    client.check_serves()
}

#[test]
fn statfs_says_9p_and_the_hosts_numbers() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let statfs = client.statfs(ROOT)?;
    let host = statvfs(share.path())?;
    assert_eq!(statfs.kind, flags::V9FS_MAGIC);
    assert_eq!(u64::from(statfs.bsize), host.f_bsize);
    assert_eq!(statfs.blocks, host.f_blocks);
    assert_eq!(statfs.files, host.f_files);
    assert_eq!(u64::from(statfs.namelen), host.f_namemax);
    assert!(statfs.bavail <= statfs.bfree && statfs.bfree <= statfs.blocks && statfs.ffree <= statfs.files);
    let share = Share::new(["--statfs-type", "host"])?;
    let mut client = share.client()?;
    assert_ne!(client.statfs(ROOT)?.kind, flags::V9FS_MAGIC);
    Ok(())
}

#[test]
fn fsync_needs_an_open_fid() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir(share.join("dir"))?;
    let mut client = share.client()?;
    client.expect_error(&T::Fsync { fid: ROOT, datasync: 0 }, Errno::BADF);
    let file = client.create(ROOT, "file", 0o644)?;
    let dir = client.open("dir", flags::RDONLY)?;
    for fid in [file, dir] {
        for datasync in [0, 1] {
            client.expect(&T::Fsync { fid, datasync }, &R::Fsync {});
        }
        // Older clients send no datasync.
        let bytes = [&[11, 0, 0, 0, 50, 5, 0][..], &fid.to_le_bytes()].concat();
        assert_eq!(client.exchange(&request(&bytes, 64))?.written(), R::Fsync {}.encode(5));
    }
    Ok(())
}

#[test]
fn xattrs_are_read_in_pieces() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    let value: Vec<u8> = (0..2000).map(|i| i as u8).collect();
    rustix::fs::setxattr(share.join("file"), "user.one", &value, XattrFlags::empty())?;
    rustix::fs::setxattr(share.join("file"), "user.empty", b"", XattrFlags::empty())?;
    let mut client = share.client()?;
    let fid = client.at("file")?;
    client.expect(&T::Xattrwalk { fid, newfid: 50, name: b"user.one" }, &R::Xattrwalk { size: 2000 });
    assert_eq!(client.read(50, 0, 100)?, value[..100]);
    assert_eq!(client.read(50, 1500, 8000)?, value[1500..]);
    assert_eq!(client.read(50, 2000, 100)?, b"");
    assert_eq!(client.read(50, 1 << 40, 100)?, b"");
    client.expect_error(&T::Xattrwalk { fid, newfid: 50, name: b"user.one" }, Errno::BADF);
    client.clunk(50)?;
    client.expect(&T::Xattrwalk { fid, newfid: 50, name: b"user.empty" }, &R::Xattrwalk { size: 0 });
    client.clunk(50)?;
    // What Linux asks for with each write.
    for name in [&b"security.capability"[..], b"user.missing", b"system.posix_acl_access"] {
        client.expect_error(&T::Xattrwalk { fid, newfid: 50, name }, Errno::NODATA);
    }
    client.expect_error(&T::Clunk { fid: 50 }, Errno::BADF);
    let list = client.xattr(fid, "")?;
    let mut names: Vec<&[u8]> = list.split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"user.empty"[..], b"user.one"]);
    assert_eq!(list.last(), Some(&0));
    Ok(())
}

#[test]
fn xattrs_are_set_at_clunk() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    let mut client = share.client()?;
    let host = |name: &str| {
        let mut value = vec![0; 4096];
        let len = rustix::fs::getxattr(share.join("file"), name, &mut value)?;
        value.truncate(len);
        Ok::<_, Errno>(value)
    };
    let fid = client.at("file")?;
    client.set_xattr(fid, "user.a", b"value", 0)?;
    assert_eq!(host("user.a")?, b"value");
    assert_eq!(client.xattr(fid, "user.a")?, b"value");
    // In pieces, and nothing before the clunk.
    let newfid = client.clone_fid(fid)?;
    client.expect(&T::Xattrcreate { fid: newfid, name: b"user.b", size: 6, flags: 0 }, &R::Xattrcreate {});
    client.write(newfid, 0, b"abc")?;
    client.write(newfid, 3, b"def")?;
    assert!(client.write(newfid, 6, b"g").is_err(), "longer than it was to be");
    assert_eq!(host("user.b"), Err(Errno::NODATA));
    client.clunk(newfid)?;
    assert_eq!(host("user.b")?, b"abcdef");
    // Flags, whose errors come with the clunk, which frees the fid all the same.
    for (name, flags, error) in
        [("user.a", flags::XATTR_CREATE, Errno::EXIST), ("user.c", flags::XATTR_REPLACE, Errno::NODATA)]
    {
        let newfid = client.clone_fid(fid)?;
        let result =
            client.xattrcreate(newfid, name, 1, flags).and_then(|()| client.write(newfid, 0, b"x").map(drop));
        assert_eq!(result.and(client.clunk(newfid)), Err(error), "{name}");
        client.expect_error(&T::Clunk { fid: newfid }, Errno::BADF);
    }
    // Less than was announced is not set.
    let newfid = client.clone_fid(fid)?;
    client.xattrcreate(newfid, "user.short", 10, 0)?;
    client.write(newfid, 0, b"12345")?;
    assert!(client.clunk(newfid).is_err());
    assert_eq!(host("user.short"), Err(Errno::NODATA));
    client.expect_error(&T::Clunk { fid: newfid }, Errno::BADF);
    Ok(())
}

#[test]
fn an_empty_xattr_is_not_a_removed_one() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    let mut client = share.client()?;
    let fid = client.at("file")?;
    client.set_xattr(fid, "user.a", b"value", 0)?;
    client.set_xattr(fid, "user.a", b"", 0)?;
    assert_eq!(client.xattr(fid, "user.a"), Ok(Vec::new()));
    client.set_xattr(fid, "user.b", b"", flags::XATTR_CREATE)?;
    assert_eq!(client.xattr(fid, "user.b"), Ok(Vec::new()));
    client.remove_xattr(fid, "user.a")?;
    assert_eq!(client.xattr(fid, "user.a"), Err(Errno::NODATA));
    assert_eq!(client.remove_xattr(fid, "user.a"), Err(Errno::NODATA));
    assert_eq!(client.xattr(fid, "")?, b"user.b\0");
    Ok(())
}

#[test]
fn a_getlock_for_nothing_is_answered() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    let lock = Lock { kind: LOCK_WRLCK, start: 10, length: 5, proc_id: 77, client_id: b"guest".to_vec() };
    client
        .expect(&tests::driver::ninep::calls::lock_request(fid, &lock, 0), &R::Lock { status: LOCK_SUCCESS });
    // Linux asks with the type UNLCK, whatever its caller asked for; nobody else has a lock here.
    let asked = Lock { kind: LOCK_UNLCK, ..lock };
    client.expect(&T::Getlock { fid, lock: asked.clone() }, &R::Getlock { lock: asked });
    Ok(())
}

/// CVE-2026-63318 among them: a file that is opened for reading, and cut.
#[test]
fn a_read_only_share_is_never_changed() -> Result<()> {
    let share = Share::new(["--read-only"])?;
    fs::create_dir(share.join("dir"))?;
    fs::write(share.join("file"), "content")?;
    let mut client = share.client()?;
    let file = client.at("file")?;
    for open in [
        flags::WRONLY,
        flags::RDWR,
        flags::RDONLY | flags::TRUNC,
        flags::WRONLY | flags::TRUNC,
        flags::RDWR | flags::APPEND,
    ] {
        client.expect_error(&T::Lopen { fid: file, flags: open }, Errno::ROFS);
    }
    let other = client.clone_fid(ROOT)?;
    let valid = flags::SETATTR_MODE;
    for request in [
        T::Lcreate { fid: other, name: b"new", flags: flags::RDWR, mode: 0o644, gid: 0 },
        T::Lcreate { fid: other, name: b"file", flags: flags::RDONLY, mode: 0o644, gid: 0 },
        T::Symlink { dfid: ROOT, name: b"new", target: b"x", gid: 0 },
        T::Mknod { dfid: ROOT, name: b"new", mode: 0o010_644, major: 0, minor: 0, gid: 0 },
        T::Mkdir { dfid: ROOT, name: b"new", mode: 0o755, gid: 0 },
        T::Link { dfid: ROOT, fid: file, name: b"new" },
        T::Rename { fid: file, dfid: ROOT, name: b"new" },
        T::Renameat { olddirfid: ROOT, oldname: b"file", newdirfid: ROOT, newname: b"new" },
        T::Unlinkat { dirfid: ROOT, name: b"file", flags: 0 },
        T::Unlinkat { dirfid: ROOT, name: b"dir", flags: REMOVEDIR },
        T::Setattr { fid: file, attr: SetAttr { valid, mode: 0o777, ..SetAttr::default() } },
        T::Setattr { fid: file, attr: SetAttr { valid: flags::SETATTR_SIZE, ..SetAttr::default() } },
        T::Setattr { fid: file, attr: SetAttr { valid: flags::SETATTR_MTIME, ..SetAttr::default() } },
        T::Xattrcreate { fid: file, name: b"user.x", size: 0, flags: 0 },
        T::Xattrcreate { fid: file, name: b"user.x", size: 0, flags: flags::XATTR_REPLACE },
    ] {
        client.expect_error(&request, Errno::ROFS);
    }
    let fid = client.clone_fid(file)?;
    client.expect_error(&T::Remove { fid }, Errno::ROFS);
    client.expect_error(&T::Clunk { fid }, Errno::BADF);
    // Reading works as ever.
    client.lopen(file, flags::RDONLY)?;
    assert_eq!(client.read(file, 0, 100)?, b"content");
    client.expect_error(&T::Write { fid: file, offset: 0, data: Data(b"x") }, Errno::BADF);
    client.fsync(file, 0)?;
    let dir = client.open("", flags::RDONLY)?;
    assert_eq!(client.list(dir)?.len(), 4);
    assert_eq!(fs::read(share.join("file"))?, b"content");
    Ok(())
}
