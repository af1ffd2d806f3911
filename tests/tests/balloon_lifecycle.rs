//! What a balloon outlives: stops, boots, front ends that go and come, the daemon's own end, memory that is added.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{SealFlags, fcntl_add_seals};
use serde_json::json;
use tests::driver::balloon::fixture::{PATIENCE, wait_until};
use tests::driver::balloon::memory::{BLOCK, BLOCK_PAGES, PAGE, Pages, RINGS};
use tests::driver::balloon::{Backing, BalloonFixture, Driver, MUST_TELL_HOST, Options, Role, Shape};
use tests::driver::memory::SharedMemory;
use tests::driver::raw::{Layout, PROTOCOL_FEATURES, RawDevice};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

/// Long enough for everything that is done a little later; what must not happen has not happened then.
const A_WHILE: Duration = Duration::from_millis(100);
const FREE_MEMORY: u16 = 4;

/// Where a queue goes on, of where the device said that it was, its used index, and its avail index.
type Base = fn(u16, u16, u16) -> u16;

/// A driver that has marked all of its memory by 1.
fn marked(fixture: &BalloonFixture, options: &Options) -> Result<(Driver, Pages)> {
    let driver = fixture.driver(options)?;
    let pages = driver.pages.clone();
    pages.mark_all(pages.all(), 1);
    Ok((driver, pages))
}

fn wait_gone(pages: &Pages, pfns: &[u64]) -> Result<()> {
    wait_until("pages are gone", || Ok(pages.there(pfns.iter().copied())?.is_empty()))
}

#[test]
fn statistics_go_on_wherever_the_queue_does() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    let mut driver = fixture.driver(&Options::default())?;
    driver.give_stats(&[(FREE_MEMORY, 1)]);
    // The buffer is with the device: it was taken from the queue, and not given back.
    let bases: [(&str, Base); 4] = [
        ("as the device said", |said, _, _| said),
        ("behind the used index", |_, used, _| used),
        ("behind the buffer, as cloud-hypervisor does", |_, _, avail| avail),
        ("in front of everything", |_, _, _| 0),
    ];
    for round in 0..3 {
        for (what, base) in bases {
            driver.stop()?;
            let said = driver.base(Role::Stats);
            driver.cont_from(|role, ring| match role {
                Role::Stats => base(said, ring.used_idx(), ring.avail_idx()),
                _ => ring.used_idx(),
            })?;
            let value = 4096 * (round + 2);
            let answer = driver.answer_stats(control.ask_statistics(), &[(FREE_MEMORY, value)]);
            let answer = answer.with_context(|| format!("{what}, round {round}"))?;
            assert_eq!(answer["free_memory"], value, "{what}");
        }
    }
    fixture.stop()
}

#[test]
fn what_a_stopped_queue_holds_is_served_when_it_goes_on() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = marked(&fixture, &Options::default().without(MUST_TELL_HOST))?;
    for round in 0..10 {
        let given: Vec<u64> = pages.block(round % 4).collect();
        driver.stop()?;
        let numbers = tests::driver::balloon::driver::narrow(&given);
        driver.submit(Role::Inflate, &[&numbers]);
        thread::sleep(Duration::from_millis(5));
        assert!(!driver.is_done(Role::Inflate), "a stopped queue is served");
        pages.check_marked(given.iter().copied(), 1)?;
        driver.cont()?;
        driver.finish(Role::Inflate)?;
        pages.check_gone(given.iter().copied())?;
        driver.deflate_all(given.iter().copied())?;
        pages.mark_all(given, 1);
    }
    pages.check_marked(pages.all(), 1)
}

#[test]
fn what_was_put_off_is_done_although_the_queues_stop() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = marked(&fixture, &Options::default())?;
    let given: Vec<u64> = pages.block(0).chain(pages.block(1).step_by(2)).collect();
    driver.inflate_all(given.iter().copied())?;
    for role in driver.options().roles() {
        driver.device.frontend.set_vring_enable(driver.options().index(role), false)?;
    }
    // Before it is said that they are disabled: a guest that has lost its driver may use them.
    pages.check_gone(given.iter().copied())?;
    driver.stop()?;
    driver.cont()?;
    driver.deflate_all(given.iter().copied())?;
    pages.mark_all(given, 1);
    thread::sleep(A_WHILE);
    pages.check_marked(pages.all(), 1)?;
    fixture.wait_number("ballooned_bytes", 0)
}

/// A guest that boots anew has all of its memory, whatever the one before gave away a moment ago.
#[test]
fn a_guest_that_boots_anew_has_an_empty_balloon() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    let (mut driver, pages) = marked(&fixture, &Options::default())?;
    control.set_target(2048 * PAGE)?;
    driver.wait_target(2048)?;
    for round in 2..30 {
        driver.inflate_all(pages.block(0).chain(pages.block(2).step_by(2)))?;
        driver.set_actual(768)?;
        if round % 3 == 0 {
            thread::sleep(Duration::from_millis(round));
        }
        match round % 2 {
            0 => driver.reset(),
            _ => driver.reboot(),
        }?;
        // Nothing of the balloon was taken back, and all of it is in use.
        pages.mark_all(pages.all(), round);
        let config = driver.config()?;
        assert_eq!(
            (config.num_pages, config.actual),
            (2048, 0),
            "the target stays, and the balloon is empty"
        );
        fixture.wait_number("ballooned_bytes", 0)?;
        if round % 5 == 0 {
            thread::sleep(Duration::from_millis(30));
        }
        pages.check_marked(pages.all(), round).with_context(|| format!("round {round}"))?;
    }
    thread::sleep(A_WHILE);
    pages.check_marked(pages.all(), 29)?;
    // The page that is given again is a new one.
    driver.inflate_all(pages.block(0))?;
    wait_gone(&pages, &pages.block(0).collect::<Vec<_>>())?;
    assert_eq!(control.number("counters/duplicates")?, 0);
    assert_eq!(control.number("counters/driver_starts")?, 29);
    Ok(())
}

#[test]
fn another_guest_keeps_its_memory() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    fixture.control().set_target(BLOCK)?;
    let mut previous: Option<(Driver, Pages)> = None;
    for round in 0..10 {
        let (mut driver, pages) = marked(&fixture, &Options::default().shape(Shape::SMALL[round % 5]))?;
        if let Some((_, old)) = &previous {
            // The one that has left has lost nothing that it did not give.
            old.check_marked(old.all().into_iter().filter(|pfn| !old.block(0).contains(pfn)), 1)?;
        }
        assert_eq!(driver.config()?.num_pages, BLOCK_PAGES as u32);
        assert_eq!(driver.config()?.actual, 0);
        driver.inflate_all(pages.block(0))?;
        driver.set_actual(BLOCK_PAGES as u32)?;
        if round % 2 == 0 {
            thread::sleep(Duration::from_millis(20));
        }
        driver.close();
        previous = Some((driver, pages));
    }
    let (mut driver, pages) = marked(&fixture, &Options::default())?;
    thread::sleep(A_WHILE);
    pages.check_marked(pages.all(), 1)?;
    driver.check_serves()
}

/// The guest begins anew while nobody serves it, and has filled its memory when somebody does again.
#[test]
fn a_guest_that_booted_while_it_was_alone_keeps_its_memory() -> Result<()> {
    for granularity in ["auto", "2M"] {
        let fixture = BalloonFixture::new(["--granularity", granularity])?;
        let options = Options::default();
        for round in 0..6 {
            let (mut driver, pages) = marked(&fixture, &options)?;
            driver.inflate_all(pages.block(0).chain(pages.block(2).step_by(2)))?;
            if round % 2 == 0 {
                thread::sleep(Duration::from_millis(20));
            }
            driver.close();
            let control = fixture.control();
            wait_until("the daemon has noticed", || Ok(control.status()?["connected"] == false))?;
            pages.mark_all(pages.all(), 2);
            let memory = Arc::clone(pages.memory());
            let mut driver = Driver::connect_without_rings(fixture.socket(), &options, memory)?;
            thread::sleep(Duration::from_millis(15));
            pages.check_marked(pages.all(), 2).with_context(|| format!("{granularity}, before it starts"))?;
            driver.start_rings()?;
            driver.check_serves()?;
            let last = pages.all().len() - 1;
            pages
                .check_marked(pages.all().into_iter().take(last), 2)
                .with_context(|| granularity.to_owned())?;
            fixture.wait_number("ballooned_bytes", 0)?;
            // The rest of a block of which the guest before gave a part.
            driver.inflate_all(pages.block(2).skip(1).step_by(2))?;
            thread::sleep(Duration::from_millis(20));
            pages.check_marked(pages.block(2).step_by(2), 2).with_context(|| granularity.to_owned())?;
        }
    }
    Ok(())
}

#[test]
fn a_front_end_that_comes_back_finds_its_balloon() -> Result<()> {
    for shape in Shape::SMALL {
        let fixture = BalloonFixture::plain()?;
        let (mut driver, pages) = marked(&fixture, &Options::default().shape(shape))?;
        driver.give_stats(&[(FREE_MEMORY, 1)]);
        let given: Vec<u64> = pages.block(0).chain(pages.block(2).step_by(2)).collect();
        driver.inflate_all(given.iter().copied())?;
        driver.set_actual(given.len() as u32)?;
        wait_gone(&pages, &given)?;
        driver.reconnect(fixture.socket())?;
        assert_eq!(driver.config()?.actual, given.len() as u32, "{shape:?}");
        fixture.wait_number("ballooned_bytes", given.len() as u64 * PAGE)?;
        // The rest of a block of which there was a part.
        driver.inflate_all(pages.block(2).skip(1).step_by(2))?;
        wait_gone(&pages, &pages.block(2).collect::<Vec<_>>())?;
        driver.deflate_all(pages.block(0).chain(pages.block(2)))?;
        pages.mark_all(pages.block(0).chain(pages.block(2)), 1);
        fixture.wait_number("ballooned_bytes", 0)?;
        assert_eq!(fixture.control().number("counters/duplicates")?, 0);
        let answer = driver.answer_stats(fixture.control().ask_statistics(), &[(FREE_MEMORY, 12_345)])?;
        assert_eq!(answer["free_memory"], 12_345);
        thread::sleep(A_WHILE);
        pages.check_marked(pages.all(), 1)?;
    }
    Ok(())
}

/// User Mode Linux forgets that it knows of SET_VRING_ENABLE, has no GET_VRING_BASE, and asks for the features once more
/// when its driver goes: the memory of the rings is used for other things then.
#[test]
fn rings_that_user_mode_linux_gives_up_are_left_alone() -> Result<()> {
    let fixture = BalloonFixture::new(["--stats-interval", "1"])?;
    let control = fixture.control();
    let options = Options::default();
    let memory = Arc::new(options.shape.memory_of(options.rest)?);
    let mut driver = Driver::connect_without_rings(fixture.socket(), &options, memory)?;
    let pages = driver.pages.clone();
    pages.mark_all(pages.all(), 1);
    let features = driver.device.features() & !(1 << PROTOCOL_FEATURES);
    for round in 1..6 {
        driver.device.frontend.set_features(features)?;
        driver.announce_rings()?;
        driver.give_stats(&[(FREE_MEMORY, 4096)]);
        driver.inflate_all(pages.block(0).chain(pages.block(2).step_by(2)))?;
        driver.deflate_all(pages.block(0).chain(pages.block(2).step_by(2)))?;
        pages.mark_all(pages.all(), 1);
        fixture.wait_number("counters/driver_starts", round)?;
        driver.device.frontend.get_features()?;
        // Something that could be taken for rings with new chains.
        pages.memory().write(0, &vec![0xAA; RINGS as usize]);
        for role in Role::ALL {
            let ring = driver.ring(role);
            let placement = ring.placement();
            let next = ring.avail_idx();
            ring.memory().store_u16(placement.avail + 2, next.wrapping_add(3));
            ring.memory().write(placement.avail + 4, &[0; 256]);
            ring.memory().store_u16(placement.used + 2, next);
        }
        let junk = pages.memory().read_vec(0, RINGS as usize);
        // All that could make the daemon look at its queues.
        control.set_target(round * PAGE)?;
        let _ = control.request("GET", "/v1/statistics?fresh=1&timeout_ms=100", None)?;
        for role in Role::ALL {
            driver.ring(role).kick();
        }
        thread::sleep(if round == 1 { Duration::from_millis(1200) } else { A_WHILE });
        // The next driver begins; this much says nothing about where its rings are.
        driver.device.frontend.set_features(features)?;
        for role in Role::ALL {
            let index = options.index(role);
            driver.device.frontend.set_vring_num(index, options.ring_size)?;
            driver.device.frontend.set_vring_base(index, 0)?;
            driver.ring(role).kick();
        }
        control.set_target(round * PAGE + PAGE)?;
        thread::sleep(Duration::from_millis(10));
        let found = pages.memory().read_vec(0, RINGS as usize);
        let first = found.iter().zip(&junk).position(|(found, junk)| found != junk);
        ensure!(first.is_none(), "Round {round}: memory that was a ring is written to at {first:x?}");
        pages.check_marked(pages.all(), 1).with_context(|| format!("round {round}"))?;
    }
    assert_eq!(control.number("counters/malformed")?, 0);
    fixture.stop()
}

#[test]
fn a_daemon_that_starts_again_knows_its_target() -> Result<()> {
    for is_killed in [true, false] {
        let mut fixture = BalloonFixture::with_state(&[])?;
        let (mut driver, pages) = marked(&fixture, &Options::default())?;
        fixture.control().set_target(1024 * PAGE)?;
        driver.wait_target(1024)?;
        let given: Vec<u64> = pages.block(0).chain(pages.block(2).step_by(2)).collect();
        driver.inflate_all(given.iter().copied())?;
        driver.set_actual(given.len() as u32)?;
        wait_gone(&pages, &given)?;
        if is_killed {
            fixture.daemon.kill();
        } else {
            let status = fixture.daemon.terminate(PATIENCE)?;
            ensure!(status.success(), "{status}: {}", fixture.daemon.stderr());
        }
        fixture.start_again(&[])?;
        driver.reconnect(fixture.socket())?;
        assert_eq!(driver.config()?.num_pages, 1024);
        fixture.wait_number("target_bytes", 1024 * PAGE)?;
        driver.deflate_all(given.iter().copied())?;
        driver.set_actual(0)?;
        pages.mark_all(given, 1);
        driver.inflate_all(pages.block(1))?;
        wait_gone(&pages, &pages.block(1).collect::<Vec<_>>())?;
        driver.deflate_all(pages.block(1))?;
        pages.mark_all(pages.block(1), 1);
        thread::sleep(A_WHILE);
        pages.check_marked(pages.all(), 1)?;
        fixture.wait_number("ballooned_bytes", 0)?;
        fixture.wait_number("actual_bytes", 0)?;
        fixture.stop()?;
    }
    Ok(())
}

#[test]
fn a_daemon_dies_in_the_middle_of_everything() -> Result<()> {
    let mut fixture = BalloonFixture::with_state(&[])?;
    let (mut driver, pages) = marked(&fixture, &Options::default())?;
    for round in 2..12 {
        let given: Vec<u64> = pages.block(round % 5).collect();
        driver.inflate_all(given.iter().copied())?;
        driver.deflate_all(given.iter().copied().step_by(2))?;
        pages.mark_all(given.iter().copied().step_by(2), 1);
        fixture.daemon.kill();
        fixture.start_again(&[])?;
        driver.reconnect(fixture.socket())?;
        driver.deflate_all(given.iter().copied().skip(1).step_by(2))?;
        pages.mark_all(given, 1);
        thread::sleep(Duration::from_millis(15));
        pages.check_marked(pages.all(), 1).with_context(|| format!("round {round}"))?;
        driver.check_serves()?;
        pages.mark_all(pages.all(), 1);
    }
    Ok(())
}

#[test]
fn a_state_file_that_is_no_good_is_told_of() -> Result<()> {
    let mut fixture = BalloonFixture::with_state(&["--size", "2M"])?;
    let state = fixture.state_file();
    for junk in [&b"{"[..], b"not a state file at all", b"{\"requested_bytes\":1}", &[0xff; 5000]] {
        fixture.daemon.kill();
        std::fs::write(&state, junk)?;
        let error = fixture.start_again(&["--size", "2M"]).err().context("It is taken")?;
        let (text, path) = (format!("{error:#}"), state.display().to_string());
        assert!(text.contains(&path) && text.contains("state file"), "{text}");
        // It may be something that somebody needs.
        assert_eq!(std::fs::read(&state)?, junk);
    }
    std::fs::write(&state, "")?;
    fixture.start_again(&["--size", "2M"])?;
    let mut driver = fixture.driver(&Options::default())?;
    assert_eq!(driver.config()?.num_pages, 512);
    driver.check_serves()
}

#[test]
fn memory_is_added_and_taken_away() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let mut options = Options::default();
    options.raw = options.raw.with_protocol(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let (mut driver, old) = marked(&fixture, &options)?;
    let first: Vec<u64> = old.block(0).chain(old.block(1).step_by(2)).collect();
    driver.inflate_all(first.iter().copied())?;
    wait_gone(&old, &first)?;
    let start = Shape::HIGH;
    for round in 0..5 {
        driver.add_memory(start, Backing::Memfd.file(4 * BLOCK)?)?;
        let pages = driver.pages.clone();
        let added: Vec<u64> = pages.all().into_iter().filter(|pfn| *pfn >= start / PAGE).collect();
        pages.mark_all(added.iter().copied(), 1);
        let (given, kept) = added.split_at(700);
        driver.inflate_all(given.iter().copied())?;
        if round % 2 == 0 {
            wait_gone(&pages, given)?;
        }
        pages.check_marked(kept.iter().copied(), 1)?;
        fixture.wait_number("guest_memory_bytes", (32 << 20) + 4 * BLOCK)?;
        fixture.wait_number("ballooned_bytes", (first.len() + 700) as u64 * PAGE)?;
        if round == 1 {
            driver.deflate_all(given.iter().copied())?;
            fixture.wait_number("ballooned_bytes", first.len() as u64 * PAGE)?;
        }
        driver.remove_memory()?;
        // What was in the balloon of it is not any more, and its numbers are no pages.
        fixture.wait_number("ballooned_bytes", first.len() as u64 * PAGE)?;
        fixture.wait_number("guest_memory_bytes", 32 << 20)?;
        let before = fixture.control().number("counters/out_of_range")?;
        driver.inflate(&given[..3])?;
        fixture.wait_number("counters/out_of_range", before + 3)?;
        pages.check_marked(kept.iter().copied(), 1)?;
    }
    driver.deflate_all(first.iter().copied())?;
    old.mark_all(first, 1);
    old.check_marked(old.all(), 1)
}

#[test]
fn a_table_of_memory_that_is_sent_again_changes_nothing() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = marked(&fixture, &Options::default())?;
    let given: Vec<u64> = pages.block(0).chain(pages.block(2).step_by(2)).collect();
    driver.inflate_all(given.iter().copied())?;
    driver.device.frontend.set_mem_table(&pages.memory().table())?;
    wait_gone(&pages, &given)?;
    fixture.wait_number("ballooned_bytes", given.len() as u64 * PAGE)?;
    driver.deflate_all(given.iter().copied())?;
    pages.mark_all(given, 1);
    thread::sleep(A_WHILE);
    pages.check_marked(pages.all(), 1)?;
    assert_eq!(fixture.control().number("counters/duplicates")?, 0);
    Ok(())
}

/// What a daemon says of memory in such a file.
fn announce(fixture: &BalloonFixture, file: &impl AsRawFd, len: usize) -> Result<()> {
    let device =
        RawDevice::connect(fixture.socket(), &Options::default().raw.layout(Layout::Sized(PAGE as usize)))?;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: len as u64,
        userspace_addr: 1 << 40,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    device.frontend.set_mem_table(&[region])?;
    Ok(())
}

#[test]
fn memory_that_cannot_be_returned_is_refused() -> Result<()> {
    const LEN: usize = 32 << 20;
    let shared = Backing::Tmpfs.file(LEN as u64)?;
    let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
    let read_only = File::open(path)?;
    let sealed = Backing::Memfd.file(LEN as u64)?;
    fcntl_add_seals(sealed.as_fd(), SealFlags::FUTURE_WRITE)?;
    let private = SharedMemory::private(tempfile::tempfile_in("/dev/shm")?, LEN)?;
    rustix::fs::ftruncate(private.as_fd(), LEN as u64)?;
    for (what, file, word) in [
        ("opened for reading only", read_only.as_fd(), "read-only"),
        ("with a seal against writing", sealed.as_fd(), "seal"),
        ("mapped privately", private.as_fd(), "privately"),
    ] {
        let fixture = BalloonFixture::plain()?;
        ensure!(announce(&fixture, &file.as_raw_fd(), LEN).is_err(), "Memory is taken that was {what}");
        fixture.daemon.wait_stderr(word, PATIENCE).context(what)?;
        // The next front end is a better one.
        fixture.driver(&Options::default())?.check_serves().context(what)?;
        announce(&fixture, &shared, LEN).context("Good memory is refused")?;
    }
    Ok(())
}

#[test]
fn memory_that_is_sealed_against_writes_is_told_of() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = marked(&fixture, &Options::default().without(MUST_TELL_HOST))?;
    // QEMU seals its memory against a change of its size, which does not matter.
    let file = Arc::clone(&pages.memory().regions()[0].file);
    fcntl_add_seals(file.as_fd(), SealFlags::GROW | SealFlags::SHRINK)?;
    driver.inflate_all(pages.block(0))?;
    pages.check_gone(pages.block(0))?;
    // This does: the host keeps the pages, and nothing else happens.
    fcntl_add_seals(file.as_fd(), SealFlags::FUTURE_WRITE)?;
    driver.inflate_all(pages.block(1))?;
    pages.check_marked(pages.block(1), 1)?;
    let errors = fixture.control().number("counters/release_errors")?;
    assert_ne!(errors, 0);
    driver.deflate_all(pages.block(0).chain(pages.block(1)))?;
    pages.mark_all(pages.block(0), 1);
    driver.check_serves()
}

#[test]
fn the_end_comes_at_once_and_in_order() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = marked(&fixture, &Options::default())?;
    driver.give_stats(&[(FREE_MEMORY, 1)]);
    let given: Vec<u64> = pages.block(0).chain(pages.block(1).step_by(2)).collect();
    driver.inflate_all(given.iter().copied())?;
    let kept: Vec<u64> = pages.all().into_iter().filter(|pfn| !given.contains(pfn)).collect();
    let (_events, asking) = (fixture.control().events()?, fixture.control().ask_statistics());
    fixture.stop()?;
    // Answered by a refusal, or not at all.
    let Ok(answer) = asking.join() else { panic!("the other thread panicked") };
    assert!(answer.is_err(), "{answer:?}");
    pages.check_marked(kept, 1)
}

#[test]
fn the_guest_keeps_a_minimum() -> Result<()> {
    let fixture = BalloonFixture::new(["--min-guest-memory", "24M"])?;
    let control = fixture.control();
    let mut driver = fixture.driver(&Options::default())?;
    for (asked, granted) in [(4 << 20, 4 << 20), (8 << 20, 8 << 20), (9 << 20, 8 << 20), (1 << 40, 8 << 20)] {
        let status = control.set_target(asked)?;
        assert_eq!(status["target_bytes"], granted, "{status}");
        driver.wait_target((granted / PAGE) as u32)?;
    }
    let status = control.put("/v1/target", &json!({ "guest_bytes": 1 << 20 }))?;
    assert_eq!(status["target_bytes"], 8 << 20, "{status}");
    // It holds for what was asked for before a driver was there, too.
    let fixture = BalloonFixture::new(["--min-guest-memory", "24M", "--size", "30M"])?;
    let mut driver = fixture.driver(&Options::default())?;
    driver.wait_target(2048)?;
    driver.check_serves()
}

#[test]
fn a_guest_that_says_nothing_does_not_keep_anybody_waiting() -> Result<()> {
    let fixture = BalloonFixture::new(["--stats-interval", "1"])?;
    let control = fixture.control();
    let ask = || control.request("GET", "/v1/statistics?fresh=1&timeout_ms=200", None);
    assert!(ask()?.status >= 400, "there is no driver");
    let mut driver = fixture.driver(&Options::default())?;
    assert_eq!(ask()?.status, 504, "it has given no buffer");
    driver.give_stats(&[(FREE_MEMORY, 1)]);
    assert_eq!(ask()?.status, 504, "it has not answered");
    // It does later.
    driver.stats_wanted()?;
    driver.give_stats(&[(FREE_MEMORY, 8192)]);
    wait_until("statistics arrive", || Ok(control.get("/v1/statistics")?["free_memory"] == 8192))?;
    // They are asked for again and again.
    for round in 0..2 {
        driver.stats_wanted().with_context(|| format!("round {round}"))?;
        driver.give_stats(&[(FREE_MEMORY, 4096 * round)]);
    }
    driver.check_serves()
}

/// Two front ends at the same time: the second waits or is refused, and the first does not notice.
#[test]
fn a_second_front_end_does_not_disturb_the_first() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = marked(&fixture, &Options::default())?;
    let stranger = std::os::unix::net::UnixStream::connect(fixture.socket());
    driver.inflate_all(pages.block(0))?;
    wait_gone(&pages, &pages.block(0).collect::<Vec<_>>())?;
    drop(stranger);
    driver.check_serves()?;
    driver.close();
    fixture.driver(&Options::default())?.check_serves()
}
