//! Random messages, many at once and in any buffers: each is answered, in order with its flush, nothing outside of the
//! share is seen or changed, and the daemon serves on.

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::symlink;

use anyhow::Result;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tests::driver::ninep::flags;
use tests::driver::ninep::jail::{Jail, SECRET};
use tests::driver::ninep::message::Room;
use tests::driver::ninep::raw::request;
use tests::driver::ninep::share::ROOT;
use tests::driver::ninep::wire::{Data, Lock, SetAttr, Time};
use tests::driver::ninep::{Client, R, T};

/// Requests that are outstanding at once.
const BATCH: usize = 12;

fn runner(cases: u32) -> TestRunner {
    // A failure prints its input, which is then written down as a test of its own.
    TestRunner::new(Config { cases, failure_persistence: None, max_shrink_iters: 500, ..Config::default() })
}

fn name() -> impl Strategy<Value = &'static [u8]> {
    prop_oneof![
        7 => Just(&b"a"[..]),
        7 => Just(&b"b"[..]),
        4 => Just(&b"c"[..]),
        3 => Just(&b".."[..]),
        1 => Just(&b"."[..]),
        1 => Just(&b""[..]),
        1 => Just(&b"a/b"[..]),
        1 => Just(&b"../outside"[..]),
        1 => Just(&b"a\0b"[..]),
        2 => Just(&b"link"[..]),
        1 => Just(&b"up"[..]),
        1 => Just(&[b'n'; 255][..]),
        1 => Just(&[b'n'; 256][..]),
    ]
}

fn xattr_name() -> impl Strategy<Value = &'static [u8]> {
    prop_oneof![
        4 => Just(&b"user.x"[..]),
        1 => Just(&b""[..]),
        1 => Just(&b"user."[..]),
        1 => Just(&b"trusted.x"[..]),
        1 => Just(&b"security.capability"[..]),
        1 => Just(&b"system.posix_acl_access"[..]),
        1 => Just(&b"user.virtfs.uid"[..]),
        1 => Just(&[b'u'; 300][..]),
    ]
}

fn aname() -> impl Strategy<Value = &'static [u8]> {
    prop_oneof![
        Just(&b""[..]),
        Just(&b"/"[..]),
        Just(&b"/a"[..]),
        Just(&b"/../outside"[..]),
        Just(&b"/link/dir"[..]),
        Just(&b"other"[..])
    ]
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..10_u64, 2 => 0..100_000_u64, 1 => any::<u64>(), 1 => Just(u64::MAX), 1 => Just(1 << 63)]
}

fn count() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..5000_u32, 1 => 0..200_000_u32, 1 => any::<u32>()]
}

fn lock() -> impl Strategy<Value = Lock> {
    (0..4_u8, number(), number()).prop_map(|(kind, start, length)| Lock {
        kind,
        start,
        length,
        proc_id: 1,
        client_id: b"guest".to_vec(),
    })
}

fn message() -> BoxedStrategy<T<'static>> {
    // Few fids, so that they are often in use, but sometimes not.
    let fid = || 0..9_u32;
    let mode = || prop_oneof![4 => Just(0o755_u32), 1 => 0..0o10_000_u32, 1 => any::<u32>()];
    let flags = || prop_oneof![6 => 0..3_u32, 1 => 0..0o4_000_000_u32, 1 => any::<u32>()];
    // Nothing that the host would be sorry to have a device node of: they are in a folder of the test's own.
    let kind = || {
        prop_oneof![Just(0o010_000_u32), Just(0o140_000), Just(0o100_000), Just(0o040_000), Just(0o120_000)]
    };
    let files = prop_oneof![
        3 => (fid(), flags()).prop_map(|(fid, flags)| T::Lopen { fid, flags }),
        3 => (fid(), name(), flags(), mode())
            .prop_map(|(fid, name, flags, mode)| T::Lcreate { fid, name, flags, mode, gid: 0 }),
        1 => (fid(), name(), name()).prop_map(|(dfid, name, target)| T::Symlink { dfid, name, target, gid: 0 }),
        1 => (fid(), name(), kind(), mode()).prop_map(|(dfid, name, kind, mode)| T::Mknod {
            dfid,
            name,
            mode: kind | (mode & 0o7777),
            major: 0,
            minor: 0,
            gid: 0
        }),
        2 => (fid(), name(), mode()).prop_map(|(dfid, name, mode)| T::Mkdir { dfid, name, mode, gid: 0 }),
        1 => (fid(), fid(), name()).prop_map(|(fid, dfid, name)| T::Rename { fid, dfid, name }),
        2 => (fid(), name(), fid(), name())
            .prop_map(|(olddirfid, oldname, newdirfid, newname)| T::Renameat { olddirfid, oldname, newdirfid, newname }),
        1 => (fid(), fid(), name()).prop_map(|(dfid, fid, name)| T::Link { dfid, fid, name }),
        1 => (fid(), name(), prop_oneof![Just(0), Just(0x200), any::<u32>()])
            .prop_map(|(dirfid, name, flags)| T::Unlinkat { dirfid, name, flags }),
        1 => (7..9_u32).prop_map(|fid| T::Remove { fid }),
    ];
    let data = prop_oneof![
        2 => (fid(), number(), count()).prop_map(|(fid, offset, count)| T::Read { fid, offset, count }),
        2 => (fid(), number(), prop_oneof![Just(&b"data"[..]), Just(&[7; 3000][..])])
            .prop_map(|(fid, offset, data)| T::Write { fid, offset: offset % (1 << 30), data: Data(data) }),
        2 => (fid(), number(), count()).prop_map(|(fid, offset, count)| T::Readdir { fid, offset, count }),
        1 => (fid(), any::<u32>()).prop_map(|(fid, datasync)| T::Fsync { fid, datasync }),
        1 => (fid(), fid(), xattr_name()).prop_map(|(fid, newfid, name)| T::Xattrwalk { fid, newfid, name }),
        1 => (fid(), xattr_name(), number(), 0..4_u32)
            .prop_map(|(fid, name, size, flags)| T::Xattrcreate { fid, name, size, flags }),
        1 => (fid(), lock(), 0..4_u32).prop_map(|(fid, lock, flags)| T::Lock {
            fid,
            kind: lock.kind,
            flags,
            start: lock.start,
            length: lock.length,
            proc_id: 1,
            client_id: b"guest"
        }),
        1 => (fid(), lock()).prop_map(|(fid, lock)| T::Getlock { fid, lock }),
    ];
    let others = prop_oneof![
        5 => (fid(), fid(), vec(name(), 0..4))
            .prop_map(|(fid, newfid, names)| T::Walk { fid, newfid, names }),
        2 => (fid(), aname()).prop_map(|(fid, aname)| T::Attach {
            fid,
            afid: u32::MAX,
            uname: b"nobody",
            aname,
            n_uname: u32::MAX
        }),
        1 => (fid(), any::<u64>()).prop_map(|(fid, mask)| T::Getattr { fid, mask }),
        1 => (fid(), 0..0x200_u32, mode(), number(), any::<(u64, u64)>()).prop_map(
            |(fid, valid, mode, size, (sec, nsec))| {
                let time = Time { sec, nsec };
                let attr = SetAttr { valid, mode, uid: 0, gid: 0, size: size % (1 << 30), atime: time, mtime: time };
                T::Setattr { fid, attr }
            }
        ),
        1 => fid().prop_map(|fid| T::Readlink { fid }),
        1 => fid().prop_map(|fid| T::Statfs { fid }),
        1 => (7..9_u32).prop_map(|fid| T::Clunk { fid }),
        1 => any::<u16>().prop_map(|oldtag| T::Flush { oldtag }),
    ];
    prop_oneof![files, data, others].boxed()
}

/// Starts a session in which some fids are something, on a tree that has some of the names.
fn prepare(client: &mut Client, jail: &Jail) -> Result<()> {
    for (target, name) in [("../outside", "link"), ("..", "up")] {
        let link = jail.share.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(target, link)?;
        }
    }
    client.start_session()?;
    // What is there already, from the case before, is as good.
    for name in ["a", "b"] {
        let _ = client.mkdir(ROOT, name, 0o755);
    }
    let _ = client.mknod(ROOT, "c", 0o100_644, (0, 0));
    for (fid, name, open) in [
        (1, "a", None),
        (2, "b", None),
        (3, "c", Some(flags::RDWR)),
        (4, "a", Some(flags::RDONLY)),
        (5, "c", None),
        (6, "link", None),
    ] {
        if client.walk(ROOT, fid, &[name]).is_ok()
            && let Some(open) = open
        {
            let _ = client.lopen(fid, open);
        }
    }
    Ok(())
}

/// Where the reply goes: what Linux has, or anything.
fn room() -> impl Strategy<Value = Option<(usize, usize)>> {
    prop_oneof![3 => Just(None), 1 => (0..300_usize, 0..20_000_usize).prop_map(Some)]
}

/// A request, and room for its reply that is not what Linux has.
type Case = (T<'static>, Option<(usize, usize)>);

/// Sends requests at once, each with a flush behind it, and checks what comes back. Returns how many did what they were
/// to do.
fn run_batch(client: &mut Client, batch: &[Case]) -> Result<usize, TestCaseError> {
    let mut done = 0;
    let mut pairs = Vec::new();
    for (message, room) in batch {
        let room = match *room {
            Some((header_in, pages_in)) => Room { header_in, pages_in, ..message.room() },
            None => Room { pages_in: message.room().pages_in.min(65536), ..message.room() },
        };
        let old = client.prepare_with(message, room);
        client.post(old);
        let flush = client.prepare(&T::Flush { oldtag: old });
        client.post(flush);
        pairs.push((message, old, flush));
    }
    client.kick();
    for (message, old, flush) in pairs {
        let after = client.wait(flush);
        prop_assert_eq!(after.message(), R::Flush {});
        let before = client.wait(old);
        prop_assert!(before.sequence < after.sequence, "{:?} came back after its flush", message);
        if before.bytes.is_empty() {
            continue;
        }
        let reply = R::decode(&before.bytes);
        prop_assert!(reply.is_some(), "{:?} was answered by {:?}", message, before.bytes);
        if let Some((tag, reply)) = reply {
            prop_assert_eq!(tag, old);
            let is_error = matches!(reply, R::Lerror { ecode: 1..4096 });
            done += usize::from(!is_error);
            prop_assert!(is_error || reply.number() == message.number() + 1, "{:?}: {:?}", message, reply);
        }
        let text = String::from_utf8_lossy(&before.bytes);
        prop_assert!(!text.contains(SECRET), "{:?} shows the secret", message);
    }
    Ok(done)
}

#[test]
fn any_messages_are_answered_and_nothing_gets_out() -> Result<()> {
    let model = if rustix::process::geteuid().is_root() { "passthrough" } else { "none" };
    for model in [model, "mapped-xattr"] {
        let jail = Jail::new(&["--security-model", model, "--xattr", "all"])?;
        let client = RefCell::new(jail.share.client()?);
        let cases = vec(vec((message(), room()), 1..BATCH), 1..40);
        let count = Cell::new((0, 0));
        runner(120).run(&cases, |batches| {
            let mut client = client.borrow_mut();
            let fail = |error: &dyn std::fmt::Display| TestCaseError::fail(format!("{error:#}"));
            prepare(&mut client, &jail).map_err(|error| fail(&error))?;
            for batch in &batches {
                let (done, all) = count.get();
                count.set((done + run_batch(&mut client, batch)?, all + batch.len()));
            }
            client.start_session().and_then(|()| client.check_serves()).map_err(|error| fail(&error))?;
            jail.check().map_err(|error| fail(&error))
        })?;
        let (done, all) = count.get();
        println!("{done} of {all} requests did something");
        assert!(done > all / 8, "{done} of {all} requests did something: the rest tells little");
    }
    Ok(())
}

#[test]
fn messages_with_any_bytes_changed_are_answered() -> Result<()> {
    let jail = Jail::new(&[])?;
    let client = RefCell::new(jail.share.client()?);
    let cases = vec((message(), vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), 0..200_usize), 1..30);
    runner(150).run(&cases, |messages| {
        let mut client = client.borrow_mut();
        let fail = |error: &dyn std::fmt::Display| TestCaseError::fail(format!("{error:#}"));
        client.start_session().map_err(|error| fail(&error))?;
        for (message, changes, room) in messages {
            let mut bytes = message.encode(7);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            // A lock that waits would wait here for ever.
            let flush = T::Flush { oldtag: 7 }.encode(8);
            let outstanding = client.send_raw(&request(&bytes, room));
            let tag = u16::from_le_bytes([bytes[5], bytes[6]]);
            client.expect(&T::Flush { oldtag: tag }, &R::Flush {});
            let flushed = client.exchange(&request(&flush, 64)).map_err(|error| fail(&error))?;
            prop_assert_eq!(flushed.written(), R::Flush {}.encode(8));
            let returned = client.wait_raw(&outstanding).map_err(|error| fail(&error))?;
            prop_assert!(returned.is_clean(), "{:02x?}: {:?}", bytes, returned);
            prop_assert!(
                returned.used == 0 || returned.message().is_some(),
                "{:02x?}: {:?}",
                bytes,
                returned
            );
            let text = String::from_utf8_lossy(&returned.data);
            prop_assert!(!text.contains(SECRET), "{:02x?} shows the secret", bytes);
        }
        client.start_session().and_then(|()| client.check_serves()).map_err(|error| fail(&error))?;
        jail.check().map_err(|error| fail(&error))
    })?;
    Ok(())
}
