//! Guests that mean harm or know no better: every request comes back, and the daemon goes on serving.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use tests::driver::ninep::flags::{
    self, GETATTR_ALL, LOCK_BLOCK, LOCK_WRLCK, NO_FID, NO_TAG, NO_UNAME, VERSION,
};
use tests::driver::ninep::message::Room;
use tests::driver::ninep::raw::{Returned, request};
use tests::driver::ninep::share::ROOT;
use tests::driver::ninep::wire::{Data, Lock, SetAttr};
use tests::driver::ninep::{Client, Options, R, Share, T};
use tests::driver::request::UNTOUCHED;
use tests::driver::ring::{Desc, INDIRECT, NEXT, Next, WRITE};
use tests::driver::usage::Footprint;

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);
const TAG: u16 = 0x2a2b;

/// A share whose daemon can be looked at from outside by an ordinary user too, which a user namespace would forbid.
fn watched() -> Result<Share> {
    Share::new(["--sandbox", "none"])
}

/// One of each message, with lengths in it where it can have them.
fn requests() -> Vec<T<'static>> {
    let lock = || Lock { kind: LOCK_WRLCK, start: 1, length: 2, proc_id: 3, client_id: b"guest".to_vec() };
    vec![
        T::Statfs { fid: ROOT },
        T::Lopen { fid: 1, flags: flags::RDONLY },
        T::Lcreate { fid: 1, name: b"name", flags: flags::RDWR, mode: 0o644, gid: 0 },
        T::Symlink { dfid: ROOT, name: b"name", target: b"target", gid: 0 },
        T::Mknod { dfid: ROOT, name: b"name", mode: 0o010_644, major: 0, minor: 0, gid: 0 },
        T::Rename { fid: 1, dfid: ROOT, name: b"name" },
        T::Readlink { fid: 1 },
        T::Getattr { fid: ROOT, mask: GETATTR_ALL },
        T::Setattr { fid: 1, attr: SetAttr::default() },
        T::Xattrwalk { fid: ROOT, newfid: 2, name: b"user.name" },
        T::Xattrcreate { fid: 1, name: b"user.name", size: 5, flags: 0 },
        T::Readdir { fid: 1, offset: 0, count: 512 },
        T::Fsync { fid: 1, datasync: 0 },
        T::Lock { fid: 1, kind: LOCK_WRLCK, flags: 0, start: 0, length: 0, proc_id: 1, client_id: b"guest" },
        T::Getlock { fid: 1, lock: lock() },
        T::Link { dfid: ROOT, fid: 1, name: b"name" },
        T::Mkdir { dfid: ROOT, name: b"name", mode: 0o755, gid: 0 },
        T::Renameat { olddirfid: ROOT, oldname: b"old", newdirfid: ROOT, newname: b"new" },
        T::Unlinkat { dirfid: ROOT, name: b"name", flags: 0 },
        T::Version { msize: 8192, version: VERSION },
        T::Auth { afid: 2, uname: b"user", aname: b"share", n_uname: 0 },
        T::Attach { fid: 2, afid: NO_FID, uname: b"user", aname: b"", n_uname: NO_UNAME },
        T::Flush { oldtag: 1 },
        T::Walk { fid: ROOT, newfid: 2, names: vec![b"one", b"two", b"three"] },
        T::Read { fid: 1, offset: 0, count: 100 },
        T::Write { fid: 1, offset: 0, data: Data(b"content") },
        T::Clunk { fid: 1 },
        T::Remove { fid: 1 },
    ]
}

/// Sends bytes that are no good request, in an arrangement of their own, and takes what comes back.
fn send(client: &mut Client, bytes: &[u8], room: usize) -> Result<Returned> {
    let returned = client.exchange(&request(bytes, room)).with_context(|| format!("after {bytes:02x?}"))?;
    ensure!(returned.is_clean(), "{bytes:02x?}: behind the used length of {} is written", returned.used);
    Ok(returned)
}

/// Checks what came back for a request that must be refused as malformed.
fn check_malformed(bytes: &[u8], returned: &Returned) {
    let what = format!("{bytes:02x?} was answered by {returned:?}");
    match bytes.get(5..7) {
        // With a tag there is an answer to it.
        Some(tag) => {
            let tag = u16::from_le_bytes([tag[0], tag[1]]);
            let expected = R::Lerror { ecode: Errno::INVAL.raw_os_error() as u32 }.encode(tag);
            assert_eq!(returned.written(), expected, "{what}");
        }
        None => assert_eq!(returned.used, 0, "{what}"),
    }
}

#[test]
fn a_message_that_is_cut_off_is_refused() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    for message in requests() {
        let whole = message.encode(TAG);
        // Datasync may be missing from an older client's Tfsync.
        let shortest_fsync = matches!(message, T::Fsync { .. }).then_some(11);
        for len in (0..whole.len()).filter(|&len| Some(len) != shortest_fsync) {
            // The size in the message is that of the whole one, or what is there.
            let mut cut = whole[..len].to_vec();
            check_malformed(&cut, &send(&mut client, &cut, 4096)?);
            if len >= 4 {
                cut[..4].copy_from_slice(&(len as u32).to_le_bytes());
                check_malformed(&cut, &send(&mut client, &cut, 4096)?);
            }
        }
    }
    assert_eq!(fs::read_dir(share.path())?.count(), 0, "nothing was made");
    client.check_serves()
}

#[test]
fn a_message_whose_size_lies_is_refused() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    for message in requests() {
        let whole = message.encode(TAG);
        let len = whole.len() as u32;
        for size in [0, 1, 6, len - 1, len + 1, len + 100, 0x7fff_ffff, u32::MAX] {
            let mut lying = whole.clone();
            lying[..4].copy_from_slice(&size.to_le_bytes());
            let returned = send(&mut client, &lying, 4096)?;
            // A shorter size may leave bytes behind the message that are not looked at; what is in front of them
            // must be refused, which it is as the message is cut off then.
            check_malformed(&lying, &returned);
        }
    }
    assert_eq!(fs::read_dir(share.path())?.count(), 0, "nothing was made");
    client.check_serves()
}

#[test]
fn every_length_inside_of_a_message_may_lie() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    for message in requests() {
        let whole = message.encode(TAG);
        for at in 7..whole.len() - 1 {
            for value in [0xff, 0x80, 0x7f, whole[at].wrapping_add(1), whole[at].wrapping_sub(1)] {
                let mut lying = whole.clone();
                lying[at] = value;
                // What it is now may be a good request; it is answered in any case, with one of the two messages.
                let returned = send(&mut client, &lying, 4096)?;
                let Some((tag, reply)) = returned.message() else {
                    panic!("{lying:02x?} was answered by {returned:?}")
                };
                assert_eq!(tag, TAG);
                let is_error = matches!(reply, R::Lerror { .. });
                assert!(is_error || reply.number() == lying[4] + 1, "{lying:02x?}: {reply:?}");
            }
        }
        client.start_session()?;
    }
    Ok(())
}

#[test]
fn replies_that_do_not_fit_harm_nobody() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![1; 10_000])?;
    let mut client = share.client()?;
    for message in requests() {
        for room in [0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 20, 24, 26, 66, 67, 159] {
            fs::write(share.join("file"), vec![1; 10_000])?;
            client.start_session()?;
            client.walk(ROOT, 1, &["file"])?;
            let bytes = message.encode(TAG);
            let returned = send(&mut client, &bytes, room)?;
            let what = format!("{message:?} with {room} bytes of room: {returned:?}");
            assert!(returned.used as usize <= room, "{what}");
            // A whole message or nothing.
            if returned.used != 0 {
                let Some((tag, _)) = returned.message() else { panic!("{what}") };
                assert!(tag == TAG, "{what}");
            } else {
                assert!(room < 11 || matches!(message, T::Version { .. }), "{what}");
            }
        }
        for name in ["name", "new"] {
            let _ = fs::remove_file(share.join(name)).or_else(|_| fs::remove_dir(share.join(name)));
        }
    }
    client.start_session()?;
    client.check_serves()
}

#[test]
fn data_goes_no_further_than_the_buffers() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![0x11; 100_000])?;
    for i in 0..500 {
        fs::write(share.join(format!("entry-{i:03}")), "")?;
    }
    let mut client = share.client()?;
    let file = client.open("file", flags::RDONLY)?;
    let dir = client.open("", flags::RDONLY)?;
    for count in [100, 5000, 100_000, 0x7fff_ffff, u32::MAX] {
        for room in [11, 12, 50, 100, 4096, 20_000] {
            // CVE-2026-9238: the reply to a Treaddir is made for the buffers, not for what the guest says.
            for message in
                [T::Read { fid: file, offset: 0, count }, T::Readdir { fid: dir, offset: 0, count }]
            {
                let returned = send(&mut client, &message.encode(TAG), room)?;
                let what = format!("{message:?} with {room} bytes of room, used {}", returned.used);
                let Some((TAG, reply)) = returned.message() else { panic!("{what}") };
                match reply {
                    R::Read { data } => {
                        assert!(
                            data.0.len() <= room - 11 && data.0.iter().all(|&byte| byte == 0x11),
                            "{what}"
                        );
                    }
                    R::Readdir { data } => {
                        let entries = tests::driver::ninep::wire::dirents(data.0);
                        assert!(entries.is_some_and(|entries| !entries.is_empty()), "{what}");
                    }
                    R::Lerror { .. } => {}
                    other => panic!("{what}: {other:?}"),
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_write_has_the_data_that_it_says() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    for (count, has) in [(10, 5), (5, 10), (u32::MAX, 10), (0x8000_0000, 0), (1, 0), (0, 1)] {
        let mut bytes = T::Write { fid, offset: 0, data: Data(&vec![b'x'; has]) }.encode(TAG);
        bytes[19..23].copy_from_slice(&u32::to_le_bytes(count));
        check_malformed(&bytes, &send(&mut client, &bytes, 100)?);
    }
    assert_eq!(fs::read(share.join("file"))?, b"");
    client.check_serves()
}

#[test]
fn a_message_longer_than_the_msize_is_refused() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    client.version(8192)?;
    client.attach(ROOT, b"")?;
    client.walk(ROOT, fid, &["file"])?;
    client.lopen(fid, flags::RDWR)?;
    let bytes = T::Write { fid, offset: 0, data: Data(&vec![b'x'; 60_000]) }.encode(TAG);
    check_malformed(&bytes, &send(&mut client, &bytes, 100)?);
    assert_eq!(client.getattr(fid)?.size, 0);
    Ok(())
}

#[test]
fn chains_that_are_no_request_come_back_empty() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let end = client.device().memory().end();
    let bytes = T::Getattr { fid: ROOT, mask: GETATTR_ALL }.encode(TAG);
    let (addr, back) = {
        let ring = client.ring();
        let addr = ring.arena.alloc(bytes.len(), 16);
        ring.memory().write(addr, &bytes);
        (addr, ring.arena.alloc(4096, 16))
    };
    let head = Desc::readable(addr, bytes.len() as u32).with(NEXT);
    let tail = Desc::writable(back, 4096);
    let table = |client: &mut Client, descs: &[Desc]| {
        let at = client.ring().write_indirect(descs);
        Desc::readable(at, descs.len() as u32 * 16).with(INDIRECT)
    };
    let own = table(&mut client, &[head.to(Next::Entry(0))]);
    let circle = table(&mut client, &[head, tail.with(NEXT).to(Next::Entry(0))]);
    let outside = table(&mut client, &[head.to(Next::Index(9)), tail]);
    let good = table(&mut client, &[head, tail]);
    let nested = table(&mut client, &[good]);
    let cases = [
        ("its own successor", vec![head.to(Next::Entry(0))]),
        ("a circle", vec![head, tail.with(NEXT).to(Next::Entry(0))]),
        ("next outside of the table", vec![head.to(Next::Index(u16::MAX)), tail]),
        ("an own successor in a table", vec![own]),
        ("a circle in a table", vec![circle]),
        ("next outside of an indirect table", vec![outside]),
        ("a table in a table", vec![nested]),
        ("an empty table", vec![Desc { len: 0, ..good }]),
        ("a table of 17 bytes", vec![Desc { len: 17, ..good }]),
        ("a table outside of memory", vec![Desc { addr: end, ..good }]),
        ("a request outside of memory", vec![Desc { addr: end, ..head }, tail]),
        ("a reply outside of memory", vec![head, Desc { addr: end - 100, ..tail }]),
        ("a reply at a wrapping address", vec![head, Desc { addr: u64::MAX - 100, ..tail }]),
        ("a request behind a reply", vec![tail.with(NEXT), Desc { flags: 0, ..head }]),
        ("nothing to write to", vec![Desc { flags: 0, ..head }]),
        ("nothing to read", vec![tail]),
    ];
    for (what, chain) in cases {
        let head = client.send_chain(&chain);
        let (used, _) = client.wait_chain(head, PATIENCE).with_context(|| format!("{what} is kept"))?;
        assert_eq!(used, 0, "{what}");
        client.check_serves().context(what)?;
    }
    // An empty buffer or two are nothing wrong.
    let head = client.send_chain(&[
        head,
        Desc::readable(addr, 0).with(NEXT),
        Desc::writable(back, 0).with(NEXT | WRITE),
        tail,
    ]);
    let (used, _) = client.wait_chain(head, PATIENCE).context("a chain with empty buffers is kept")?;
    assert!(used == 160 || used == 0, "used {used}");
    client.check_serves()
}

#[test]
fn a_tag_may_be_in_use_twice() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    let mut client = share.client()?;
    let second = share.another::<&str>([])?;
    let mut owner = second.client()?;
    let theirs = owner.open("file", flags::RDWR)?;
    let all = Lock { kind: LOCK_WRLCK, proc_id: 1, ..Lock::default() };
    owner.lock(theirs, &all, 0)?;
    // Two locks that wait, with one tag; and good requests with that tag too.
    let lock = T::Lock {
        fid: client.open("file", flags::RDWR)?,
        kind: LOCK_WRLCK,
        flags: LOCK_BLOCK,
        start: 0,
        length: 0,
        proc_id: 1,
        client_id: b"",
    }
    .encode(TAG);
    let waiting = [client.send_raw(&request(&lock, 64)), client.send_raw(&request(&lock, 64))];
    for _ in 0..10 {
        let attr = T::Getattr { fid: ROOT, mask: GETATTR_ALL }.encode(TAG);
        let returned = client.exchange(&request(&attr, 4096))?;
        assert!(returned.used != 0, "{returned:?}");
    }
    client.expect(&T::Flush { oldtag: TAG }, &R::Flush {});
    owner.lock(theirs, &Lock { kind: flags::LOCK_UNLCK, ..all }, 0)?;
    for outstanding in waiting {
        client.wait_raw(&outstanding)?;
    }
    // Tflush of itself, and the tag of no request.
    let flush = T::Flush { oldtag: TAG }.encode(TAG);
    assert_eq!(client.exchange(&request(&flush, 64))?.written(), R::Flush {}.encode(TAG));
    let flush = T::Flush { oldtag: NO_TAG }.encode(NO_TAG);
    assert_eq!(client.exchange(&request(&flush, 64))?.written(), R::Flush {}.encode(NO_TAG));
    client.check_serves()
}

#[test]
fn fids_run_out_softly() -> Result<()> {
    let share = Share::new(["--max-fids", "100", "--max-open-files", "20", "--sandbox", "none"])?;
    fs::write(share.join("file"), "")?;
    let before = Footprint::of(share.daemon.pid())?;
    let mut client = share.client()?;
    for _ in 0..3 {
        let mut fids = Vec::new();
        let error = loop {
            match client.at_or_error("file") {
                Ok(fid) => fids.push(fid),
                Err(error) => break error,
            }
            assert!(fids.len() <= 100, "the limit holds");
        };
        assert!(matches!(error, Errno::NFILE | Errno::MFILE | Errno::NOMEM), "{error:?}");
        assert!(fids.len() >= 90, "{} fids of 100", fids.len());
        client.check_serves()?;
        let mut opened = 0;
        for &fid in &fids {
            match client.lopen(fid, flags::RDWR) {
                Ok(_) => opened += 1,
                Err(error) => {
                    assert!(matches!(error, Errno::NFILE | Errno::MFILE), "{error:?}");
                    break;
                }
            }
        }
        assert!((1..=20).contains(&opened), "{opened} files are open");
        client.check_serves()?;
        for fid in fids {
            client.clunk(fid)?;
        }
    }
    let after = Footprint::of(share.daemon.pid())?;
    assert!(after.fds < before.fds + 40, "{before:?} became {after:?}");
    Ok(())
}

/// A walk that does not clean up by another request when it fails.
trait AtOrError {
    fn at_or_error(&mut self, name: &str) -> Result<u32, Errno>;
}

impl AtOrError for Client {
    fn at_or_error(&mut self, name: &str) -> Result<u32, Errno> {
        let fid = self.new_fid();
        self.walk(ROOT, fid, &[name]).map(|_| fid)
    }
}

#[test]
fn a_million_fids_are_nothing_to_the_process() -> Result<()> {
    let share = watched()?;
    for i in 0..64 {
        fs::write(share.join(format!("{i}")), "")?;
    }
    let mut client = share.client_with(&Options { slots: 128, ..Options::default() })?;
    // Ten thousand fids by 64 files, then all at once gone with the session.
    let mut refused = 0;
    for i in 0..10_000_u32 {
        refused += u32::from(client.walk(ROOT, 1000 + i, &[format!("{}", i % 64)]).is_err());
    }
    client.check_serves()?;
    println!("{refused} of 10,000 were refused");
    client.start_session()?;
    let after = Footprint::of(share.daemon.pid())?;
    assert!(after.fds < 500, "{after:?}");
    Ok(())
}

#[test]
fn nothing_is_left_of_requests_that_fail_or_end() -> Result<()> {
    // CVE-2017-7377 and CVE-2017-8086: memory that every Tattach or Txattrwalk took and nothing gave back.
    let share = watched()?;
    fs::write(share.join("file"), "content")?;
    fs::create_dir(share.join("dir"))?;
    let mut client = share.client()?;
    let file = client.at("file")?;
    client.set_xattr(file, "user.x", b"value", 0)?;
    let round = |client: &mut Client| -> Result<()> {
        assert_eq!(client.attach(50, b""), Ok(client.getattr(ROOT)?.qid));
        assert_eq!(client.attach(50, b""), Err(Errno::BADF));
        client.clunk(50)?;
        assert_eq!(client.attach(50, b"/missing"), Err(Errno::NOENT));
        client.xattrwalk(file, 51, "user.x")?;
        assert_eq!(client.xattrwalk(file, 51, "user.x"), Err(Errno::BADF));
        client.clunk(51)?;
        assert_eq!(client.xattrwalk(file, 51, "user.missing"), Err(Errno::NODATA));
        assert_eq!(client.walk(ROOT, 52, &["dir", "missing"])?.len(), 1);
        let fid = client.open("dir", flags::RDONLY)?;
        client.list(fid)?;
        client.clunk(fid)?;
        let fid = client.clone_fid(ROOT)?;
        let excl = flags::RDWR | flags::CREATE | flags::EXCL;
        assert_eq!(client.lcreate(fid, "file", excl, 0o644), Err(Errno::EXIST));
        client.lcreate(fid, "new", excl, 0o644)?;
        client.remove(fid)?;
        let fid = client.clone_fid(file)?;
        client.xattrcreate(fid, "user.y", 1000, 0)?;
        assert!(client.clunk(fid).is_err(), "less was written than was announced");
        Ok(())
    };
    for _ in 0..50 {
        round(&mut client)?;
    }
    let before = Footprint::of(share.daemon.pid())?;
    for _ in 0..2000 {
        round(&mut client)?;
    }
    let after = Footprint::of(share.daemon.pid())?;
    assert_eq!((after.fds, after.threads), (before.fds, before.threads));
    assert!(after.rss_kib < before.rss_kib + 4096, "{before:?} became {after:?}");
    Ok(())
}

#[test]
fn a_storm_of_flushes_is_weathered() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![7; 1 << 20])?;
    let mut client = share.client_with(&Options { slots: 100, ..Options::default() })?;
    let fid = client.open("file", flags::RDWR)?;
    for round in 0..50_u64 {
        let mut pairs = Vec::new();
        for i in 0..30 {
            let old = client.prepare(&match i % 3 {
                0 => T::Read { fid, offset: round, count: 200_000 },
                1 => T::Fsync { fid, datasync: 0 },
                _ => T::Write { fid, offset: round, data: Data(&[7; 5000]) },
            });
            client.post(old);
            let flushes: Vec<u16> = (0..2).map(|_| client.prepare(&T::Flush { oldtag: old })).collect();
            for &flush in &flushes {
                client.post(flush);
            }
            pairs.push((old, flushes));
        }
        client.kick();
        for (old, flushes) in pairs {
            let before = client.wait(old);
            for flush in flushes {
                let after = client.wait(flush);
                assert_eq!(after.message(), R::Flush {});
                assert!(before.sequence < after.sequence, "{before:?} after {after:?}");
            }
        }
    }
    client.check_serves()
}

#[test]
fn xattrs_of_any_size_cost_no_memory() -> Result<()> {
    let share = watched()?;
    fs::write(share.join("file"), "")?;
    let mut client = share.client()?;
    let file = client.at("file")?;
    let before = Footprint::of(share.daemon.pid())?;
    // CVE-2026-8348: a guest that only announces xattrs takes no memory.
    for size in [65_537, 1 << 20, 1 << 32, 1 << 63, u64::MAX] {
        let fid = client.clone_fid(file)?;
        if client.xattrcreate(fid, "user.big", size, 0).is_ok() {
            assert!(client.write(fid, size - 1, b"x").is_err(), "at the end of {size} bytes");
        }
        // It may be refused at once or in the end.
        let _ = client.clunk(fid);
    }
    let mut announced = 0;
    for _ in 0..2000 {
        let fid = client.clone_fid(file)?;
        announced += u32::from(client.xattrcreate(fid, "user.big", 65_536, 0).is_ok());
    }
    let after = Footprint::of(share.daemon.pid())?;
    assert!(
        after.rss_kib < before.rss_kib + 64 * 1024,
        "{announced} announced xattrs: {before:?} became {after:?}"
    );
    client.check_serves()?;
    assert_eq!(client.xattr(file, "user.big"), Err(Errno::NODATA));
    Ok(())
}

#[test]
fn an_xattr_fid_is_nothing_else() -> Result<()> {
    // QEMU 2026: unions confused by fstat and fsync on xattr fids; CVE-2017-15038: bytes of the heap in a reply.
    let share = Share::plain()?;
    fs::write(share.join("file"), "content")?;
    let mut client = share.client()?;
    let file = client.at("file")?;
    client.set_xattr(file, "user.x", b"value", 0)?;
    let create = client.clone_fid(file)?;
    client.xattrcreate(create, "user.y", 100, 0)?;
    let walk = client.new_fid();
    client.xattrwalk(file, walk, "user.x")?;
    for fid in [create, walk] {
        for request in [
            T::Lopen { fid, flags: flags::RDWR },
            T::Lcreate { fid, name: b"x", flags: flags::RDWR, mode: 0o644, gid: 0 },
            T::Fsync { fid, datasync: 0 },
            T::Readdir { fid, offset: 0, count: 4096 },
            T::Lock { fid, kind: LOCK_WRLCK, flags: 0, start: 0, length: 0, proc_id: 1, client_id: b"" },
            T::Getlock { fid, lock: Lock::default() },
            T::Walk { fid, newfid: 500, names: vec![b"x"] },
            T::Mkdir { dfid: fid, name: b"x", mode: 0o755, gid: 0 },
            T::Symlink { dfid: fid, name: b"x", target: b"y", gid: 0 },
            T::Unlinkat { dirfid: fid, name: b"file", flags: 0 },
            T::Xattrcreate { fid, name: b"user.z", size: 1, flags: 0 },
        ] {
            let reply = client.call(&request);
            assert!(matches!(reply.message(), R::Lerror { .. }), "{request:?}: {reply:?}");
        }
        // These may work, on the file.
        let _ = client.getattr(fid);
        let _ = client.statfs(fid);
    }
    assert!(client.read(create, 0, 100).is_err(), "a value that is being written is not read");
    assert!(client.write(walk, 0, b"x").is_err(), "a value that is read is not written");
    assert_eq!(client.read(walk, 0, 4096)?, b"value");
    assert_eq!(fs::read_dir(share.path())?.count(), 1);
    Ok(())
}

#[test]
fn offsets_and_counts_at_the_limits_are_refused() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    let dir = client.open("", flags::RDONLY)?;
    for offset in [i64::MAX as u64, 1 << 63, u64::MAX - 1, u64::MAX] {
        assert!(client.write(fid, offset, b"xx").is_err(), "offset {offset:#x}");
        assert!(client.read(fid, offset, 2000).is_err() || offset == i64::MAX as u64, "offset {offset:#x}");
        // A directory's offset is a number of the file system's own; one that is none is an error or the end.
        let reply = client.call(&T::Readdir { fid: dir, offset, count: 4096 });
        assert!(matches!(reply.message(), R::Lerror { .. } | R::Readdir { .. }));
    }
    assert!(client.truncate(fid, 1 << 63).is_err());
    assert_eq!(client.getattr(fid)?.size, 0);
    client.check_serves()
}

#[test]
fn a_version_in_the_midst_of_requests_ends_them() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![7; 1 << 20])?;
    let mut client = share.client()?;
    for _ in 0..30 {
        let fid = client.open("file", flags::RDWR)?;
        let tags: Vec<u16> = (0..30_u64)
            .map(|i| {
                client.prepare(&match i % 3 {
                    0 => T::Read { fid, offset: i, count: 100_000 },
                    1 => T::Fsync { fid, datasync: 0 },
                    _ => T::Clunk { fid },
                })
            })
            .collect();
        let version = client.prepare(&T::Version { msize: 512_000, version: VERSION });
        for &tag in tags.iter().chain([&version]) {
            client.post(tag);
        }
        client.kick();
        for tag in tags {
            client.wait(tag);
        }
        assert!(matches!(client.wait(version).message(), R::Version { .. }));
        client.attach(ROOT, b"")?;
    }
    client.check_serves()
}

#[test]
fn a_reply_is_written_only_where_it_belongs() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![7; 5000])?;
    let mut client = share.client()?;
    let fid = client.open("file", flags::RDONLY)?;
    // In pages, as Linux has them, with more room than count.
    let message = T::Read { fid, offset: 0, count: 100 };
    let room = Room { pages_out: 0, header_in: 11, pages_in: 16384 };
    let tag = client.prepare_with(&message, room);
    client.post(tag);
    client.kick();
    let reply = client.wait(tag);
    assert_eq!(reply.message(), R::Read { data: Data(&[7; 100]) });
    // By hand, to see what is behind.
    let mut pieces = request(&message.encode(TAG), 4096).cut(&[], &[3, 11, 50]);
    pieces.indirect = true;
    let returned = client.exchange(&pieces)?;
    assert_eq!(returned.used, 111);
    assert!(returned.data[111..].iter().all(|&byte| byte == UNTOUCHED));
    Ok(())
}
