//! Byte-range locks: seen by the host and by other daemons, waited for, and given up.

use std::fs::{self, File};
use std::time::Duration;

use anyhow::Result;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::io::Errno;
use tests::driver::ninep::calls::lock_request;
use tests::driver::ninep::flags::{
    self, GETATTR_ALL, LOCK_BLOCK, LOCK_BLOCKED, LOCK_RDLCK, LOCK_SUCCESS, LOCK_UNLCK, LOCK_WRLCK,
};
use tests::driver::ninep::share::ROOT;
use tests::driver::ninep::wire::{Data, Lock};
use tests::driver::ninep::{Client, R, Share, T};

/// Long enough to see a reply that should not come.
const QUIET: Duration = Duration::from_millis(150);

fn range(kind: u8, start: u64, length: u64) -> Lock {
    Lock { kind, start, length, proc_id: 42, client_id: b"guest".to_vec() }
}

fn flock(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 }
}

/// The same by another process of the guest.
fn by(process: u32, lock: Lock) -> Lock {
    Lock { proc_id: process, ..lock }
}

/// What flock(2) comes as, and the end of it.
fn whole(kind: u8) -> Lock {
    range(kind, 0, 0)
}

/// A file of the share that the host has open, to lock it and to look at locks.
struct Host {
    file: File,
}

impl Host {
    fn open(share: &Share) -> Result<Self> {
        let path = share.join("file");
        Ok(Self { file: File::options().read(true).write(true).create(true).truncate(false).open(path)? })
    }

    /// What the host is told that is in the way of a write lock: kind, start and length.
    fn conflict(&self, start: i64, len: i64) -> Result<Option<(i32, i64, i64)>> {
        let mut lock = flock(libc::F_WRLCK, start, len);
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        let kind = i32::from(lock.l_type);
        Ok((kind != libc::F_UNLCK).then_some((kind, lock.l_start, lock.l_len)))
    }

    fn lock(&self, kind: i32, start: i64, len: i64) -> Result<()> {
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&flock(kind, start, len)))?;
        Ok(())
    }

    fn unlock(&self) -> Result<()> {
        self.lock(libc::F_UNLCK, 0, 0)
    }
}

fn locked(share: &Share) -> Result<(Host, Client, u32)> {
    let host = Host::open(share)?;
    let mut client = share.client()?;
    let fid = client.open("file", flags::RDWR)?;
    Ok((host, client, fid))
}

/// A request for a lock that waits.
fn blocking(fid: u32, lock: &Lock) -> T<'_> {
    lock_request(fid, lock, LOCK_BLOCK)
}

#[test]
fn a_lock_is_seen_by_the_host() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    assert_eq!(host.conflict(0, 0)?, None);
    client.expect(&lock_request(fid, &range(LOCK_WRLCK, 100, 50), 0), &R::Lock { status: LOCK_SUCCESS });
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 100, 50)));
    assert_eq!(host.conflict(0, 100)?, None);
    assert_eq!(host.conflict(150, 0)?, None);
    assert_eq!(host.conflict(149, 1)?, Some((libc::F_WRLCK, 100, 50)));
    // A part becomes a read lock, another part is given up.
    client.lock(fid, &range(LOCK_RDLCK, 100, 10), 0)?;
    client.lock(fid, &range(LOCK_UNLCK, 120, 10), 0)?;
    assert_eq!(host.conflict(100, 1)?, Some((libc::F_RDLCK, 100, 10)));
    assert_eq!(host.conflict(110, 1)?, Some((libc::F_WRLCK, 110, 10)));
    assert_eq!(host.conflict(120, 10)?, None);
    assert_eq!(host.conflict(130, 1)?, Some((libc::F_WRLCK, 130, 20)));
    client.lock(fid, &range(LOCK_UNLCK, 0, 0), 0)?;
    assert_eq!(host.conflict(0, 0)?, None);
    // A length of 0 goes to the end, wherever that is.
    client.lock(fid, &range(LOCK_WRLCK, 1 << 40, 0), LOCK_BLOCK)?;
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 1 << 40, 0)));
    // With the fid goes the lock.
    client.clunk(fid)?;
    assert_eq!(host.conflict(0, 0)?, None);
    Ok(())
}

#[test]
fn a_lock_of_the_host_is_seen() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    host.lock(libc::F_WRLCK, 10, 10)?;
    for kind in [LOCK_RDLCK, LOCK_WRLCK] {
        client.expect(&lock_request(fid, &range(kind, 0, 0), 0), &R::Lock { status: LOCK_BLOCKED });
        client.expect(&lock_request(fid, &range(kind, 20, 0), 0), &R::Lock { status: LOCK_SUCCESS });
    }
    // UNLCK is what Linux asks for whatever its caller wants to know: a writer is in everybody's way.
    for kind in [LOCK_RDLCK, LOCK_WRLCK, LOCK_UNLCK] {
        let found = client.getlock(fid, &range(kind, 0, 0))?;
        assert_eq!((found.kind, found.start, found.length), (LOCK_WRLCK, 10, 10), "asked with {kind}");
        let free = client.getlock(fid, &range(kind, 0, 10))?;
        assert_eq!(free.kind, LOCK_UNLCK, "asked with {kind}");
    }
    // A reader is only in a writer's way.
    host.lock(libc::F_RDLCK, 10, 10)?;
    for (kind, found) in [(LOCK_RDLCK, LOCK_UNLCK), (LOCK_WRLCK, LOCK_RDLCK), (LOCK_UNLCK, LOCK_UNLCK)] {
        assert_eq!(client.getlock(fid, &range(kind, 0, 20))?.kind, found, "asked with {kind}");
    }
    assert_eq!(client.lock(fid, &range(LOCK_RDLCK, 10, 10), 0)?, LOCK_SUCCESS);
    assert_eq!(client.lock(fid, &range(LOCK_WRLCK, 10, 10), 0)?, LOCK_BLOCKED);
    Ok(())
}

#[test]
fn two_daemons_lock_each_other_out() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut one, fid) = locked(&share)?;
    let second = share.another::<&str>([])?;
    let mut two = second.client()?;
    let other = two.open("file", flags::RDWR)?;
    assert_eq!(one.lock(fid, &range(LOCK_WRLCK, 0, 10), 0)?, LOCK_SUCCESS);
    assert_eq!(two.lock(other, &range(LOCK_WRLCK, 5, 10), 0)?, LOCK_BLOCKED);
    assert_eq!(two.getlock(other, &range(LOCK_UNLCK, 5, 10))?.kind, LOCK_WRLCK);
    let wanted = range(LOCK_WRLCK, 5, 10);
    let tag = two.submit(&blocking(other, &wanted));
    std::thread::sleep(QUIET);
    assert!(!two.is_done(tag), "it waits");
    one.lock(fid, &range(LOCK_UNLCK, 0, 0), 0)?;
    assert_eq!(two.wait(tag).message(), R::Lock { status: LOCK_SUCCESS });
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 5, 10)));
    drop(second);
    assert_eq!(host.conflict(0, 0)?, None, "a daemon's end is its locks' end");
    Ok(())
}

#[test]
fn a_lock_waits_until_it_is_free_and_nothing_else_does() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    host.lock(libc::F_WRLCK, 0, 0)?;
    let wanted = range(LOCK_WRLCK, 0, 10);
    let tag = client.submit(&blocking(fid, &wanted));
    for i in 0..20 {
        client.expect(&T::Flush { oldtag: 0x7000 }, &R::Flush {});
        assert_eq!(client.getattr_of(fid, GETATTR_ALL)?.size, i);
        client.write(fid, i, b"x")?;
    }
    std::thread::sleep(QUIET);
    assert!(!client.is_done(tag));
    host.unlock()?;
    assert_eq!(client.wait(tag).message(), R::Lock { status: LOCK_SUCCESS });
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 0, 10)));
    Ok(())
}

#[test]
fn many_locks_wait_at_once() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, _) = locked(&share)?;
    host.lock(libc::F_WRLCK, 0, 0)?;
    let mut waiting = Vec::new();
    for i in 0..50 {
        let fid = client.open("file", flags::RDWR)?;
        let wanted = range(LOCK_WRLCK, i, 1);
        waiting.push(client.submit(&blocking(fid, &wanted)));
    }
    client.check_serves()?;
    let fid = client.create(ROOT, "other", 0o644)?;
    client.write(fid, 0, b"served all the while")?;
    client.fsync(fid, 0)?;
    assert!(waiting.iter().all(|&tag| !client.is_done(tag)));
    host.unlock()?;
    for tag in waiting {
        assert_eq!(client.wait(tag).message(), R::Lock { status: LOCK_SUCCESS });
    }
    assert!(host.conflict(49, 1)?.is_some());
    Ok(())
}

/// Waits for a request that was flushed and for the flush. The request is given back before, with or without an
/// answer; Linux frees it when it sees the `Rflush`. Whether it was answered.
fn flushed(client: &mut Client, old: u16, flush: u16) -> bool {
    let after = client.wait(flush);
    assert_eq!(after.message(), R::Flush {});
    let before = client.wait(old);
    assert!(before.sequence < after.sequence, "the request came back after its flush: {before:?}");
    !before.bytes.is_empty()
}

#[test]
fn a_waiting_lock_is_flushed() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    host.lock(libc::F_WRLCK, 0, 0)?;
    for _ in 0..20 {
        let wanted = range(LOCK_WRLCK, 0, 10);
        let old = client.submit(&blocking(fid, &wanted));
        let flush = client.submit(&T::Flush { oldtag: old });
        assert!(!flushed(&mut client, old, flush), "nobody gave the lock free");
    }
    host.unlock()?;
    // Nothing of it is left: the lock is not taken later.
    std::thread::sleep(QUIET);
    assert_eq!(host.conflict(0, 0)?, None);
    assert_eq!(client.lock(fid, &range(LOCK_WRLCK, 0, 10), 0)?, LOCK_SUCCESS);
    Ok(())
}

#[test]
fn several_flushes_of_one_lock_are_answered() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    host.lock(libc::F_WRLCK, 0, 0)?;
    let wanted = range(LOCK_WRLCK, 0, 10);
    let old = client.submit(&blocking(fid, &wanted));
    let flushes: Vec<u16> = (0..10).map(|_| client.submit(&T::Flush { oldtag: old })).collect();
    let before = client.wait(old);
    for flush in flushes {
        let after = client.wait(flush);
        assert_eq!(after.message(), R::Flush {});
        assert!(before.sequence < after.sequence);
    }
    Ok(())
}

#[test]
fn a_flush_that_meets_the_answer_is_in_order_too() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    let mut answered = 0;
    for _ in 0..200 {
        host.lock(libc::F_WRLCK, 0, 0)?;
        let wanted = range(LOCK_WRLCK, 0, 10);
        let old = client.submit(&blocking(fid, &wanted));
        host.unlock()?;
        let flush = client.submit(&T::Flush { oldtag: old });
        let has_lock = flushed(&mut client, old, flush);
        answered += u32::from(has_lock);
        // A client that saw no answer has no lock, and one that did has.
        assert_eq!(host.conflict(0, 0)?.is_some(), has_lock);
        client.lock(fid, &range(LOCK_UNLCK, 0, 0), 0)?;
    }
    println!("{answered} of 200 were answered");
    Ok(())
}

#[test]
fn a_clunk_or_a_new_session_ends_the_wait() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    host.lock(libc::F_WRLCK, 0, 0)?;
    // A new version while a lock waits: the request comes back, and the daemon serves the new session.
    let wanted = range(LOCK_WRLCK, 0, 10);
    let tag = client.submit(&blocking(fid, &wanted));
    client.start_session()?;
    client.wait(tag);
    // A front end that goes away while a lock waits.
    let fid = client.open("file", flags::RDWR)?;
    client.submit(&blocking(fid, &wanted));
    drop(client);
    let mut client = share.client()?;
    client.check_serves()?;
    host.unlock()?;
    std::thread::sleep(QUIET);
    assert_eq!(host.conflict(0, 0)?, None, "nobody waits any more");
    Ok(())
}

#[test]
fn locks_of_a_closed_connection_are_gone() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    client.lock(fid, &range(LOCK_WRLCK, 0, 0), 0)?;
    drop(client);
    // The daemon notices before it serves the next one.
    share.client()?.check_serves()?;
    assert_eq!(host.conflict(0, 0)?, None);
    Ok(())
}

#[test]
fn bad_locks_are_refused() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    fs::create_dir(share.join("dir"))?;
    let closed = client.at("file")?;
    client.expect_error(&lock_request(closed, &range(LOCK_WRLCK, 0, 0), 0), Errno::BADF);
    client.expect_error(&T::Getlock { fid: closed, lock: range(LOCK_WRLCK, 0, 0) }, Errno::BADF);
    for (kind, start, length) in [
        (3, 0, 0),
        (255, 0, 0),
        (LOCK_WRLCK, u64::MAX, 1),
        (LOCK_WRLCK, 1 << 63, 1),
        (LOCK_WRLCK, (1 << 63) - 1, 2),
        (LOCK_WRLCK, 1, u64::MAX),
    ] {
        let reply = client.call(&lock_request(fid, &range(kind, start, length), LOCK_BLOCK));
        let is_refused = matches!(reply.message(), R::Lerror { .. } | R::Lock { status: flags::LOCK_ERROR });
        assert!(is_refused, "type {kind}, {length} bytes at {start}: {reply:?}");
    }
    // Nothing is held, but it is no range all the same.
    client.expect_error(&lock_request(fid, &range(LOCK_UNLCK, u64::MAX, 1), 0), Errno::INVAL);
    assert_eq!(host.conflict(0, 0)?, None);
    Ok(())
}

#[test]
fn locks_can_be_left_to_the_guest() -> Result<()> {
    let share = Share::new(["--locks", "none"])?;
    let (host, mut client, fid) = locked(&share)?;
    host.lock(libc::F_WRLCK, 0, 0)?;
    assert_eq!(client.lock(fid, &range(LOCK_WRLCK, 0, 0), LOCK_BLOCK)?, LOCK_SUCCESS);
    assert_eq!(client.getlock(fid, &range(LOCK_UNLCK, 0, 0))?.kind, LOCK_UNLCK);
    host.unlock()?;
    assert_eq!(host.conflict(0, 0)?, None, "the host has not heard of it");
    Ok(())
}

/// flock(2) takes any lock through any file.
#[test]
fn how_a_file_is_open_makes_no_difference() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, _) = locked(&share)?;
    for (mode, kind, seen) in [
        (flags::RDONLY, LOCK_WRLCK, libc::F_WRLCK),
        (flags::RDONLY, LOCK_RDLCK, libc::F_RDLCK),
        (flags::WRONLY, LOCK_RDLCK, libc::F_RDLCK),
        (flags::WRONLY, LOCK_WRLCK, libc::F_WRLCK),
    ] {
        let fid = client.open("file", mode)?;
        assert_eq!(client.lock(fid, &whole(kind), 0)?, LOCK_SUCCESS, "opened with {mode}");
        assert_eq!(host.conflict(0, 0)?, Some((seen, 0, 0)));
        // From one to the other and back.
        for (kind, seen) in [(LOCK_RDLCK, libc::F_RDLCK), (LOCK_WRLCK, libc::F_WRLCK)] {
            assert_eq!(client.lock(fid, &whole(kind), LOCK_BLOCK)?, LOCK_SUCCESS);
            assert_eq!(host.conflict(0, 0)?, Some((seen, 0, 0)));
        }
        client.lock(fid, &whole(LOCK_UNLCK), 0)?;
        assert_eq!(host.conflict(0, 0)?, None);
        client.clunk(fid)?;
    }
    // It waits for one too.
    let fid = client.open("file", flags::RDONLY)?;
    host.lock(libc::F_RDLCK, 0, 0)?;
    let wanted = whole(LOCK_WRLCK);
    let tag = client.submit(&blocking(fid, &wanted));
    std::thread::sleep(QUIET);
    assert!(!client.is_done(tag));
    host.unlock()?;
    assert_eq!(client.wait(tag).message(), R::Lock { status: LOCK_SUCCESS });
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 0, 0)));
    // The file is not open for anything else by that.
    let write = T::Write { fid, offset: 0, data: Data(b"x") };
    client.expect_error(&write, Errno::BADF);
    Ok(())
}

/// A guest that may not change the files may not keep the host from it either.
#[test]
fn a_share_that_is_read_only_is_locked_for_reading() -> Result<()> {
    let share = Share::plain()?;
    let host = Host::open(&share)?;
    let second = share.another(["--read-only"])?;
    let mut client = second.client()?;
    let fid = client.open("file", flags::RDONLY)?;
    client.expect_error(&lock_request(fid, &whole(LOCK_WRLCK), LOCK_BLOCK), Errno::BADF);
    assert_eq!(client.lock(fid, &whole(LOCK_RDLCK), 0)?, LOCK_SUCCESS);
    client.expect_error(&lock_request(fid, &whole(LOCK_WRLCK), LOCK_BLOCK), Errno::BADF);
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_RDLCK, 0, 0)));
    // Each process has its own, even so.
    assert_eq!(client.lock(fid, &by(43, whole(LOCK_RDLCK)), 0)?, LOCK_SUCCESS);
    client.lock(fid, &whole(LOCK_UNLCK), 0)?;
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_RDLCK, 0, 0)));
    client.lock(fid, &by(43, whole(LOCK_UNLCK)), 0)?;
    assert_eq!(host.conflict(0, 0)?, None);
    Ok(())
}

#[test]
fn a_process_is_not_in_its_own_way() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, one) = locked(&share)?;
    let two = client.open("file", flags::RDWR)?;
    assert_eq!(client.lock(one, &range(LOCK_WRLCK, 0, 10), 0)?, LOCK_SUCCESS);
    assert_eq!(client.getlock(two, &range(LOCK_WRLCK, 0, 0))?.kind, LOCK_UNLCK, "its own lock");
    assert_eq!(client.lock(two, &range(LOCK_WRLCK, 5, 10), LOCK_BLOCK)?, LOCK_SUCCESS);
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 0, 15)));
    // What was taken through one is given up, or turned into something else, through the other.
    client.lock(two, &range(LOCK_UNLCK, 0, 5), 0)?;
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 5, 10)));
    assert_eq!(client.lock(one, &range(LOCK_RDLCK, 0, 20), 0)?, LOCK_SUCCESS);
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_RDLCK, 0, 20)));
    client.lock(two, &whole(LOCK_UNLCK), 0)?;
    assert_eq!(host.conflict(0, 0)?, None);
    // So a Tclunk of one leaves the other's alone, whichever it is, and the last one ends them.
    for (first, last) in [(LOCK_WRLCK, LOCK_RDLCK), (LOCK_RDLCK, LOCK_WRLCK)] {
        let [one, two] = [client.open("file", flags::RDONLY)?, client.open("file", flags::WRONLY)?];
        client.lock(one, &range(first, 0, 10), 0)?;
        client.lock(two, &range(last, 10, 10), 0)?;
        client.clunk(one)?;
        assert!(host.conflict(0, 10)?.is_some());
        assert!(host.conflict(10, 10)?.is_some());
        client.clunk(two)?;
        assert_eq!(host.conflict(0, 0)?, None);
    }
    Ok(())
}

#[test]
fn two_processes_are_in_each_others_way() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, one) = locked(&share)?;
    let two = client.open("file", flags::RDWR)?;
    assert_eq!(client.lock(one, &range(LOCK_WRLCK, 0, 10), 0)?, LOCK_SUCCESS);
    let stranger = Lock { client_id: b"another".to_vec(), ..range(LOCK_WRLCK, 5, 10) };
    // Through the same fid as well: it may be inherited.
    for fid in [one, two] {
        for other in [by(43, range(LOCK_WRLCK, 5, 10)), stranger.clone()] {
            client.expect(&lock_request(fid, &other, 0), &R::Lock { status: LOCK_BLOCKED });
            assert_eq!(client.getlock(fid, &other)?.kind, LOCK_WRLCK);
            // Closing a file gives up nothing of others.
            client.lock(fid, &Lock { kind: LOCK_UNLCK, start: 0, length: 0, ..other }, 0)?;
            assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 0, 10)));
        }
    }
    let wanted = by(43, range(LOCK_WRLCK, 5, 10));
    let tag = client.submit(&blocking(two, &wanted));
    std::thread::sleep(QUIET);
    assert!(!client.is_done(tag));
    client.clunk(one)?;
    assert_eq!(client.wait(tag).message(), R::Lock { status: LOCK_SUCCESS });
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 5, 10)));
    client.clunk(two)?;
    assert_eq!(host.conflict(0, 0)?, None);
    Ok(())
}

/// Locks of flock(2) belong to an open file. Linux gives up everything whenever the process closes one for the same inode.
#[test]
fn a_lock_of_the_whole_file_outlives_another_file_of_its_process() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, one) = locked(&share)?;
    for (kind, seen) in [(LOCK_WRLCK, libc::F_WRLCK), (LOCK_RDLCK, libc::F_RDLCK)] {
        client.lock(one, &whole(kind), 0)?;
        let two = client.open("file", flags::RDONLY)?;
        client.lock(two, &whole(LOCK_UNLCK), 0)?;
        client.clunk(two)?;
        assert_eq!(host.conflict(0, 0)?, Some((seen, 0, 0)));
    }
    // Two that share: the last one ends it.
    let two = client.open("file", flags::RDONLY)?;
    client.lock(two, &whole(LOCK_RDLCK), 0)?;
    client.lock(one, &whole(LOCK_UNLCK), 0)?;
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_RDLCK, 0, 0)));
    client.lock(two, &whole(LOCK_UNLCK), 0)?;
    assert_eq!(host.conflict(0, 0)?, None);
    // One that conflicts is the process's, and so are parts: the last word counts.
    client.lock(one, &whole(LOCK_WRLCK), 0)?;
    client.lock(two, &range(LOCK_RDLCK, 10, 10), 0)?;
    assert_eq!(host.conflict(10, 1)?, Some((libc::F_RDLCK, 10, 10)));
    client.lock(two, &whole(LOCK_UNLCK), 0)?;
    assert_eq!(host.conflict(0, 0)?, None);
    Ok(())
}

/// A child may do to a lock of flock(2) what its parent may, through the same open file.
#[test]
fn a_child_turns_its_parents_lock_into_another() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    client.lock(fid, &whole(LOCK_RDLCK), 0)?;
    assert_eq!(client.lock(fid, &by(43, whole(LOCK_WRLCK)), 0)?, LOCK_SUCCESS);
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 0, 0)));
    // The child ends, and then the parent.
    client.lock(fid, &by(43, whole(LOCK_UNLCK)), 0)?;
    assert_eq!(host.conflict(0, 0)?, Some((libc::F_WRLCK, 0, 0)));
    client.lock(fid, &whole(LOCK_UNLCK), 0)?;
    assert_eq!(host.conflict(0, 0)?, None);
    Ok(())
}

#[test]
fn an_upgrade_that_is_given_up_leaves_the_lock() -> Result<()> {
    let share = Share::plain()?;
    let (host, mut client, fid) = locked(&share)?;
    for lock in [whole(LOCK_RDLCK), range(LOCK_RDLCK, 5, 5)] {
        for free_it in [false, true] {
            client.lock(fid, &lock, 0)?;
            host.lock(libc::F_RDLCK, 0, 0)?;
            let wanted = Lock { kind: LOCK_WRLCK, ..lock.clone() };
            let old = client.submit(&blocking(fid, &wanted));
            if free_it {
                host.unlock()?;
            }
            let flush = client.submit(&T::Flush { oldtag: old });
            let upgraded = flushed(&mut client, old, flush);
            host.unlock()?;
            let kind = if upgraded { libc::F_WRLCK } else { libc::F_RDLCK };
            assert_eq!(host.conflict(0, 0)?, Some((kind, lock.start as i64, lock.length as i64)));
            client.lock(fid, &whole(LOCK_UNLCK), 0)?;
            assert_eq!(host.conflict(0, 0)?, None);
        }
    }
    Ok(())
}

/// Processes that come and go through one fid leave nothing behind.
#[test]
fn many_processes_lock_through_one_file() -> Result<()> {
    let share = Share::new(["--max-open-files", "16"])?;
    let (host, mut client, fid) = locked(&share)?;
    for process in 0..100 {
        assert_eq!(client.lock(fid, &by(process, range(LOCK_WRLCK, 0, 1)), 0)?, LOCK_SUCCESS);
        client.lock(fid, &by(process, whole(LOCK_UNLCK)), 0)?;
    }
    assert_eq!(host.conflict(0, 0)?, None);
    // As many as there may be files.
    for process in 0..16 {
        let lock = by(process, range(LOCK_WRLCK, u64::from(process), 1));
        assert_eq!(client.lock(fid, &lock, 0)?, LOCK_SUCCESS);
    }
    client.expect_error(&lock_request(fid, &by(16, range(LOCK_WRLCK, 16, 1)), 0), Errno::NOLCK);
    client.lock(fid, &by(3, whole(LOCK_UNLCK)), 0)?;
    assert_eq!(client.lock(fid, &by(16, range(LOCK_WRLCK, 16, 1)), 0)?, LOCK_SUCCESS);
    client.clunk(fid)?;
    assert_eq!(host.conflict(0, 0)?, None);
    Ok(())
}
