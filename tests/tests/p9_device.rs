//! `vhost-user-9p` as a device: features, a ring that is stopped and goes on, the dirty log, starts and ends.

use std::fs;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, fcntl};
use rustix::io::Errno;
use tests::driver::memory::SharedMemory;
use tests::driver::ninep::calls::lock_request;
use tests::driver::ninep::flags::{self, LOCK_BLOCK, LOCK_BLOCKED, LOCK_SUCCESS, LOCK_WRLCK};
use tests::driver::ninep::raw::request;
use tests::driver::ninep::share::{ROOT, ninep_command, scratch};
use tests::driver::ninep::wire::Lock;
use tests::driver::ninep::{Client, Options, R, Share, T};
use tests::driver::raw::{LOG_ALL, RawOptions};
use tests::process;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const PAGE: u64 = 4096;
/// Long enough for a loaded machine to end a process.
const END_LIMIT: Duration = Duration::from_secs(10);

fn everything() -> Lock {
    Lock { kind: LOCK_WRLCK, proc_id: 1, client_id: b"guest".to_vec(), ..Lock::default() }
}

/// The host's own lock on a file, which goes with the file.
fn host_lock(share: &Share, name: &str) -> Result<fs::File> {
    let file = fs::File::options().read(true).write(true).open(share.join(name))?;
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(file)
}

/// Works a little with files of all sizes.
fn exercise(client: &mut Client, name: &str) -> Result<()> {
    let fid = client.create(ROOT, name, 0o644)?;
    for len in [1, 5000, 30_000] {
        let data: Vec<u8> = (0..len).map(|i| (i * 3 + len) as u8).collect();
        assert_eq!(client.write(fid, 0, &data)?, len as u32);
        assert_eq!(client.read(fid, 0, len as u32)?, data);
    }
    client.clunk(fid)?;
    let dir = client.open("", flags::RDONLY)?;
    assert!(client.list(dir)?.iter().any(|entry| entry.name == name.as_bytes()));
    Ok(client.clunk(dir)?)
}

#[test]
fn every_set_of_features_works() -> Result<()> {
    let share = Share::new(["--queue-size", "1024"])?;
    let all = Options::default();
    let few = Options { slots: 4, msize: 32768, ..all };
    let without = |options: Options, feature| Options { raw: options.raw.without(feature), ..options };
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    let sets = [
        ("all", all),
        ("no event index", without(all, VIRTIO_RING_F_EVENT_IDX)),
        ("no indirect tables", without(few.direct(), VIRTIO_RING_F_INDIRECT_DESC)),
        ("neither", without(without(few.direct(), VIRTIO_RING_F_EVENT_IDX), VIRTIO_RING_F_INDIRECT_DESC)),
        ("memory in slots", Options { raw: all.raw.with_protocol(slots), ..all }),
        ("a driver that polls", Options { polling: true, ..all }),
        ("a long ring", Options { ring_size: 1024, ..all }),
        ("a short ring", Options { ring_size: 16, ..few }),
    ];
    for (index, (what, options)) in sets.into_iter().enumerate() {
        let mut client = share.client_with(&options).context(what)?;
        exercise(&mut client, &format!("file-{index}")).context(what)?;
    }
    Ok(())
}

#[test]
fn a_session_outlives_a_stopped_ring() -> Result<()> {
    // What a front end does when its guest is paused, of which the guest knows nothing.
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    for round in 0..20_u64 {
        client.write(fid, round, b"x")?;
        let base = client.device().frontend.get_vring_base(0)?;
        assert_eq!(base, u32::from(client.ring().used_idx()), "nothing is left undone");
        client.restart()?;
        assert_eq!(client.getattr(fid)?.size, round + 1);
    }
    assert_eq!(client.read(fid, 0, 100)?, [b'x'; 20]);
    Ok(())
}

#[test]
fn a_lock_that_waits_does_not_keep_a_ring_from_stopping() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    let held = host_lock(&share, "file")?;
    let mut client = share.client()?;
    let fid = client.open("file", flags::RDWR)?;
    let wanted = everything();
    let tag = client.submit(&lock_request(fid, &wanted, LOCK_BLOCK));
    client.check_serves()?;
    client.device().frontend.get_vring_base(0)?;
    client.restart()?;
    client.check_serves()?;
    drop(held);
    // Told that it is blocked, a client asks again; or the lock went on waiting.
    match client.wait(tag).message() {
        R::Lock { status: LOCK_SUCCESS } => {}
        R::Lock { status: LOCK_BLOCKED } => assert_eq!(client.lock(fid, &wanted, LOCK_BLOCK)?, LOCK_SUCCESS),
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[test]
fn the_dirty_log_has_what_was_written() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("file"), vec![7; 100_000])?;
    let raw = RawOptions::ninep().with_protocol(VhostUserProtocolFeatures::LOG_SHMFD);
    let mut client = share.client_with(&Options { raw, ..Options::default() })?;
    let fid = client.open("file", flags::RDONLY)?;
    let dir = client.open("", flags::RDONLY)?;
    let end = client.device().memory().end();
    let log = SharedMemory::new((end / PAGE / 8) as usize)?;
    let region =
        VhostUserDirtyLogRegion { mmap_size: log.len() as u64, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    let features = client.device().features();
    client.device().frontend.set_log_base(0, Some(region)).context("SET_LOG_BASE")?;
    client.device().frontend.set_features(features | 1 << LOG_ALL)?;
    let marked = || {
        let mut bits = vec![0; log.len()];
        log.read(0, &mut bits);
        log.fill(0, bits.len(), 0);
        (0..bits.len() as u64 * 8)
            .filter(|page| bits[*page as usize / 8] & 1 << (page % 8) != 0)
            .collect::<Vec<u64>>()
    };
    client.check_serves()?;
    marked();
    for (message, cuts) in [
        (T::Read { fid, offset: 0, count: 60_000 }, vec![11]),
        (T::Read { fid, offset: 0, count: 20_000 }, vec![11, 4096 + 11, 9000]),
        (T::Read { fid, offset: 90_000, count: 60_000 }, vec![11]),
        (T::Readdir { fid: dir, offset: 0, count: 60_000 }, vec![11]),
        (T::Getattr { fid, mask: 0x3fff }, vec![]),
        (T::Read { fid: ROOT, offset: 0, count: 60_000 }, vec![11]),
    ] {
        let mut pieces = request(&message.encode(1), 65536).cut(&[], &cuts);
        pieces.align = PAGE;
        pieces.indirect = true;
        let outstanding = client.send_raw(&pieces);
        let returned = client.wait_raw(&outstanding)?;
        let mut expected = vec![client.ring().placement().used / PAGE];
        let mut left = u64::from(returned.used);
        for (addr, len) in outstanding.writable {
            let written = left.min(len as u64);
            left -= written;
            expected.extend(addr / PAGE..(addr + written).div_ceil(PAGE));
        }
        expected.sort_unstable();
        expected.dedup();
        let found = marked();
        let missing: Vec<_> = expected.iter().filter(|page| !found.contains(page)).collect();
        assert!(missing.is_empty(), "{message:?}: pages {missing:?} are not marked");
        assert!(
            found.len() <= expected.len(),
            "{message:?}: {found:?} are marked, {expected:?} were written"
        );
    }
    Ok(())
}

#[test]
fn what_cannot_be_served_is_said_at_the_start() -> Result<()> {
    let folder = scratch()?;
    fs::write(folder.path().join("file"), "")?;
    let missing = folder.path().join("missing").display().to_string();
    let file = folder.path().join("file").display().to_string();
    let good = folder.path().display().to_string();
    let export = format!("name={missing}");
    let cases: [(&str, Vec<&str>, &str); 8] = [
        ("no directory", vec![], "--shared-dir"),
        ("one that is missing", vec!["--shared-dir", &missing], &missing),
        ("a file", vec!["--shared-dir", &file], &file),
        ("an export that is missing", vec!["--shared-dir", &good, "--export", &export], &missing),
        ("an empty tag", vec!["--shared-dir", &good, "--tag", ""], "--tag"),
        ("a bad map", vec!["--shared-dir", &good, "--uid-map", "1:2"], "--uid-map"),
        ("a mode that is none", vec!["--shared-dir", &good, "--fmode", "9"], "--fmode"),
        ("a message that is too short", vec!["--shared-dir", &good, "--max-msize", "100"], "--max-msize"),
    ];
    for (what, args, expected) in cases {
        let mut command = ninep_command()?;
        command.arg("--socket-path").arg(folder.path().join("socket")).args(args);
        let error = process::run(command, END_LIMIT).err().with_context(|| format!("{what} was accepted"))?;
        let text = format!("{error:#}");
        assert!(text.contains(expected), "{what}: {text}");
    }
    Ok(())
}

#[test]
fn the_end_comes_at_once() -> Result<()> {
    let mut share = Share::plain()?;
    fs::write(share.join("file"), "")?;
    let _held = host_lock(&share, "file")?;
    let mut client = share.client()?;
    let fid = client.open("file", flags::RDWR)?;
    let wanted = everything();
    for _ in 0..10 {
        client.submit(&lock_request(fid, &wanted, LOCK_BLOCK));
    }
    client.check_serves()?;
    let status = share.daemon.terminate(END_LIMIT)?;
    assert!(status.success(), "{status}: {}", share.daemon.stderr());
    Ok(())
}

#[test]
fn a_daemon_that_was_killed_can_be_replaced() -> Result<()> {
    let mut share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    client.write(fid, 0, b"kept")?;
    share.replace_daemon(&[])?;
    let mut client = share.client()?;
    let fid = client.open("file", flags::RDONLY)?;
    assert_eq!(client.read(fid, 0, 100)?, b"kept");
    assert_eq!(client.at("other"), Err(Errno::NOENT));
    Ok(())
}
