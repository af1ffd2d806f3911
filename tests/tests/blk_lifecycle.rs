//! The life of `vhost-user-blk`: several queues, front ends that come and go, images that cannot be opened, the end.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tests::driver::blk::{Op, Options, Slot};
use tests::driver::fixture::{BlkFixture, IMAGE_LEN, blk_command, check_serves, pattern, scratch};
use tests::driver::raw::RawOptions;
use tests::driver::usage::{Footprint, cpu_time};
use tests::driver::wire::{FLAG_VERSION, WireFrontend};
use tests::process;
use vhost::vhost_user::message::FrontendReq;

const BLOCK: usize = 4096;
/// Long enough for a loaded machine to end a process.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A sequence that looks random and is the same in each run.
fn shuffled(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    }
}

/// What a block holds after its `generation`th write.
fn content(offset: u64, generation: u64) -> Vec<u8> {
    pattern(offset + generation * (1 << 40), BLOCK)
}

#[test]
fn a_queue_serves_one_request_after_the_other() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    let mut disk = fixture.disk(&Options::default())?;
    assert_eq!(disk.capacity()?, IMAGE_LEN as u64);
    let queue = disk.queue(0);
    let mut block = vec![0; BLOCK];
    for generation in 1..100 {
        let offset = generation * 3 * BLOCK as u64;
        queue.write(offset, &content(offset, generation))?;
        queue.read(offset, &mut block)?;
        assert_eq!(block, content(offset, generation));
    }
    queue.flush()?;
    queue.write_zeroes(0, 8192, false)?;
    queue.discard(8192, 8192)?;
    let mut start = vec![1; 16384];
    queue.read(0, &mut start)?;
    assert_eq!(start[..8192], [0; 8192]);
    assert!(queue.read(IMAGE_LEN as u64, &mut block).is_err(), "behind the end");
    queue.read(0, &mut block)?;
    Ok(())
}

#[test]
fn four_queues_work_at_once() -> Result<()> {
    for engine in ["io_uring", "sync"] {
        let fixture = BlkFixture::new(["--num-queues", "4", "--io-engine", engine])?;
        let mut disk = fixture.disk(&Options { queues: 4, ..Options::default() })?;
        let part = IMAGE_LEN as u64 / 4;
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..)
                .zip(disk.take_queues())
                .map(|(index, mut queue)| {
                    scope.spawn(move || -> Result<()> {
                        let start = part * index;
                        // Every block once, in an order of this queue's own, then all of them back.
                        let blocks = part / BLOCK as u64;
                        let order = (0..blocks).map(|i| start + (i * 389 % blocks) * BLOCK as u64);
                        let mut writes = order.clone();
                        let next = |slot: Slot<'_>| {
                            let offset = writes.next()?;
                            slot.write(&content(offset, index + 1));
                            Some(Op::Write { offset, len: BLOCK })
                        };
                        let mut failures = 0;
                        let written =
                            queue.run(32, next, |_, result, _| failures += u32::from(result.is_err()))?;
                        assert_eq!((written, failures), (blocks, 0));
                        queue.flush()?;

                        let mut reads = order;
                        let mut block = vec![0; BLOCK];
                        let next = |_: Slot<'_>| Some(Op::Read { offset: reads.next()?, len: BLOCK });
                        let read = queue.run(32, next, |op, result, slot| {
                            result.expect("a read succeeds");
                            let Op::Read { offset, .. } = op else { unreachable!("only reads") };
                            slot.read(&mut block);
                            assert!(block == content(offset, index + 1), "queue {index}, offset {offset}");
                        })?;
                        assert_eq!(read, blocks);
                        Ok(())
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
        })?;
        for (index, start) in (0..4).map(|index| (index, part * index)) {
            for offset in (start..start + part).step_by(BLOCK) {
                assert!(fixture.image_bytes(offset, BLOCK)? == content(offset, index + 1), "offset {offset}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_front_end_may_leave_in_the_middle_of_its_requests() -> Result<()> {
    let fixture = BlkFixture::new(["--num-queues", "2"])?;
    let options = Options { queues: 2, ..Options::default() };
    let mut random = shuffled(1);
    for round in 0..20 {
        let mut disk = fixture.disk(&options).with_context(|| format!("connection {round}"))?;
        for index in 0..2 {
            let queue = disk.queue(index);
            for _ in 0..32 {
                let offset = random() % (IMAGE_LEN / BLOCK) as u64 * BLOCK as u64;
                // Each write repeats what is there, so that the image stays predictable whichever writes arrive.
                if random().is_multiple_of(2) {
                    queue.submit(Op::Read { offset, len: BLOCK }, |_| ())?;
                } else {
                    queue.submit(Op::Write { offset, len: BLOCK }, |slot| {
                        slot.write(&pattern(offset, BLOCK));
                    })?;
                }
            }
            queue.kick()?;
        }
        if round % 2 == 0 {
            disk.queue(0).reap(|_, result, _| result.expect("requests succeed"))?;
        }
    }
    let mut disk = fixture.disk(&options)?;
    let mut block = vec![0; BLOCK];
    for offset in (0..IMAGE_LEN as u64).step_by(BLOCK) {
        disk.queue(0).read(offset, &mut block)?;
        assert!(block == pattern(offset, BLOCK), "offset {offset}");
    }
    Ok(())
}

#[test]
fn a_second_connection_does_not_disturb_the_first() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    let mut disk = fixture.disk(&Options::default())?;
    let mut block = vec![0; BLOCK];
    // A daemon may make the second one wait or turn it away.
    let seconds: Vec<_> = (0..3).filter_map(|_| WireFrontend::connect(fixture.socket()).ok()).collect();
    for second in &seconds {
        let _ = second.send(FrontendReq::SET_OWNER as u32, FLAG_VERSION, &[], &[]);
        let _ = second.send(FrontendReq::GET_FEATURES as u32, FLAG_VERSION, &[], &[]);
        let _ = second.send(FrontendReq::GET_VRING_BASE as u32, FLAG_VERSION, &[0; 8], &[]);
    }
    for round in 0..200 {
        let offset = round * BLOCK as u64;
        disk.queue(0).write(offset, &content(offset, 1))?;
        disk.queue(0).read(offset, &mut block)?;
        assert!(block == content(offset, 1), "round {round}");
    }
    assert_eq!(disk.capacity()?, IMAGE_LEN as u64, "its protocol works too");
    drop((disk, seconds));
    let mut disk = fixture.disk(&Options::default())?;
    disk.queue(0).read(0, &mut block)?;
    assert!(block == content(0, 1), "and the next one is served");
    Ok(())
}

#[test]
fn a_thousand_connections_leave_nothing_behind() -> Result<()> {
    let fixture = BlkFixture::new(["--num-queues", "2"])?;
    let pid = fixture.daemon.pid();
    let connect = || -> Result<()> {
        let mut device = fixture.raw(&RawOptions::default())?;
        check_serves(&mut device.ring(0, 64)?)?;
        check_serves(&mut device.ring(1, 64)?)
    };
    for _ in 0..10 {
        connect()?;
    }
    std::thread::sleep(Duration::from_millis(500));
    let before = Footprint::of(pid)?;
    for round in 0..1000 {
        connect().with_context(|| format!("connection {round}"))?;
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut after = Footprint::of(pid)?;
    while (after.fds > before.fds || after.threads > before.threads) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        after = Footprint::of(pid)?;
    }
    assert!(after.fds <= before.fds, "file descriptors: {before:?} -> {after:?}");
    assert!(after.threads <= before.threads, "threads: {before:?} -> {after:?}");
    assert!(after.mappings <= before.mappings + 8, "mappings: {before:?} -> {after:?}");
    assert!(after.rss_kib <= before.rss_kib + 1024, "memory: {before:?} -> {after:?}");
    Ok(())
}

#[test]
fn an_idle_daemon_uses_no_cpu() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    let mut disk = fixture.disk(&Options::default())?;
    let mut block = vec![0; BLOCK];
    for round in 0..100 {
        disk.queue(0).read(round * BLOCK as u64, &mut block)?;
    }
    std::thread::sleep(Duration::from_millis(300));
    let before = cpu_time(fixture.daemon.pid())?;
    std::thread::sleep(Duration::from_secs(1));
    let spent = cpu_time(fixture.daemon.pid())?.checked_sub(before).unwrap_or_default();
    assert!(spent < Duration::from_millis(5), "{spent:?} in a second without requests");
    Ok(())
}

/// Whoever sees that the daemon listens may end it at once.
#[test]
fn a_daemon_that_has_just_begun_ends_in_order() -> Result<()> {
    for round in 0..40 {
        let mut fixture = BlkFixture::new::<&str>([])?;
        let status = fixture.daemon.terminate(END_LIMIT)?;
        assert!(status.success(), "round {round}: {status}\n{}", fixture.daemon.stderr());
        assert!(!fixture.daemon.socket().exists(), "round {round}: the socket is left behind");
    }
    Ok(())
}

#[test]
fn sigterm_under_load_ends_well_and_keeps_what_was_flushed() -> Result<()> {
    for cache in ["writeback", "direct"] {
        let mut fixture = BlkFixture::new(["--cache", cache])?;
        let mut disk = fixture.disk(&Options::default())?;
        let mut queue = disk.take_queues().remove(0);
        queue.set_timeout(Duration::from_secs(2));
        let writer = std::thread::spawn(move || {
            let blocks = IMAGE_LEN as u64 / BLOCK as u64;
            let mut flushed = 0;
            loop {
                let batch = flushed..flushed + 8;
                let mut more = batch.clone();
                let next = |slot: Slot<'_>| {
                    let number = more.next()?;
                    let offset = number % blocks * BLOCK as u64;
                    slot.write(&content(offset, 1 + number / blocks));
                    Some(Op::Write { offset, len: BLOCK })
                };
                let mut good = true;
                let written = queue.run(8, next, |_, result, _| good &= result.is_ok());
                if !good {
                    return (flushed, Err(anyhow::anyhow!("a write failed")));
                }
                // Once the daemon is gone nothing completes any more.
                if written.is_err() || queue.flush().is_err() {
                    return (flushed, Ok(()));
                }
                flushed = batch.end;
            }
        });
        std::thread::sleep(Duration::from_millis(500));
        let status = fixture.daemon.terminate(END_LIMIT)?;
        assert_eq!(status.code(), Some(0), "--cache {cache}: {}", fixture.daemon.stderr());
        let (flushed, result) = writer.join().expect("the writer does not panic");
        result?;
        drop(disk);
        assert!(flushed > 0, "--cache {cache}: something was flushed");

        let blocks = IMAGE_LEN as u64 / BLOCK as u64;
        for number in flushed.saturating_sub(blocks)..flushed {
            let offset = number % blocks * BLOCK as u64;
            let found = fixture.image_bytes(offset, BLOCK)?;
            // The block may have been written again without a flush.
            let old = content(offset, 1 + number / blocks);
            let new = content(offset, 2 + number / blocks);
            assert!(
                found == old || (number + blocks < flushed + 8 && found == new),
                "--cache {cache}: block {number}"
            );
        }
        assert!(!fixture.socket().exists(), "--cache {cache}: the socket is removed");
    }
    Ok(())
}

#[test]
fn exit_on_disconnect_ends_with_the_first_front_end() -> Result<()> {
    let mut fixture = BlkFixture::new(["--exit-on-disconnect"])?;
    let mut disk = fixture.disk(&Options::default())?;
    let mut block = vec![0; BLOCK];
    disk.queue(0).read(0, &mut block)?;
    drop(disk);
    let status = fixture.daemon.wait(END_LIMIT)?;
    assert_eq!(status.code(), Some(0), "{}", fixture.daemon.stderr());
    Ok(())
}

/// Starts a daemon on `image`, which must end at once with status 1 and one line that names the image.
fn check_start_fails(what: &str, image: &Path) -> Result<()> {
    let folder = scratch()?;
    let mut command = blk_command()?;
    command.arg("--socket-path").arg(folder.path().join("socket")).arg("--blk-file").arg(image);
    let output = process::run_unchecked(command, Duration::from_secs(10)).context(what.to_owned())?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{what}: {stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{what}: {stderr}");
    assert!(stderr.contains(&image.display().to_string()), "{what} names its path: {stderr}");
    assert!(!folder.path().join("socket").exists(), "{what}: no socket is left behind");
    Ok(())
}

#[test]
fn an_image_that_cannot_be_served_is_one_clear_line() -> Result<()> {
    let folder = scratch()?;
    let path = |name: &str| folder.path().join(name);
    check_start_fails("a missing image", &path("missing"))?;
    check_start_fails("a folder", folder.path())?;
    fs::write(path("empty"), b"")?;
    check_start_fails("an empty image", &path("empty"))?;
    fs::write(path("small"), [0; 511])?;
    check_start_fails("an image smaller than a sector", &path("small"))?;
    mknodat(CWD, path("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    check_start_fails("a FIFO", &path("fifo"))?;
    check_start_fails("a character device", Path::new("/dev/zero"))?;
    let _listener = std::os::unix::net::UnixListener::bind(path("socket"))?;
    check_start_fails("a socket", &path("socket"))?;
    std::os::unix::fs::symlink(path("loop"), path("loop"))?;
    check_start_fails("a symbolic link to itself", &path("loop"))?;
    fs::write(path("file"), [0; 512])?;
    check_start_fails("a path through a file", &path("file/image"))
}

#[test]
fn an_image_in_use_by_another_daemon_is_refused() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    check_start_fails("an image in use", fixture.image())?;
    // The lock ends with its daemon, and the first one was not disturbed.
    let mut disk = fixture.disk(&Options::default())?;
    let mut block = vec![0; BLOCK];
    disk.queue(0).read(0, &mut block)?;
    assert!(block == pattern(0, BLOCK));
    Ok(())
}

#[test]
fn an_image_of_odd_length_is_served_up_to_its_last_whole_sector() -> Result<()> {
    let fixture = BlkFixture::with_len(64 * 512 + 8, [] as [&str; 0])?;
    let mut disk = fixture.disk(&Options::default())?;
    assert_eq!(disk.capacity()?, 64 * 512);
    let mut sector = vec![0; 512];
    disk.queue(0).read(63 * 512, &mut sector)?;
    assert!(sector == pattern(63 * 512, 512));
    assert!(disk.queue(0).read(64 * 512, &mut sector).is_err(), "the rest is not there");
    assert_eq!(
        File::open(fixture.image())?.metadata()?.len(),
        64 * 512 + 8,
        "and the image keeps its length"
    );
    Ok(())
}
