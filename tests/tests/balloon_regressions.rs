//! What was found wrong with balloons once.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use tests::driver::balloon::driver::narrow;
use tests::driver::balloon::huge::{HugePages, MEMORY, available, driver_in_use, options};
use tests::driver::balloon::memory::{BLOCK, BLOCK_PAGES};
use tests::driver::balloon::{BalloonFixture, MUST_TELL_HOST, Options, Role};
use tests::driver::usage::cpu_time;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// Long enough for everything that is done a little later; what must not happen has not happened then.
const A_WHILE: Duration = Duration::from_millis(100);

/// Checks that the daemon does not use the processor.
fn check_idle(fixture: &BalloonFixture, what: &str) -> Result<()> {
    thread::sleep(A_WHILE);
    let before = cpu_time(fixture.daemon.pid())?;
    thread::sleep(Duration::from_secs(1));
    let used = cpu_time(fixture.daemon.pid())?.saturating_sub(before);
    assert!(used < Duration::from_millis(50), "{used:?} in a second in which nothing happened: {what}");
    Ok(())
}

/// Given back together, huge pages still come back one by one.
#[test]
fn huge_pages_in_larger_pieces_come_back_each_by_itself() -> Result<()> {
    let huge_pages = HugePages::new(MEMORY)?;
    let fixture = BalloonFixture::new(["--granularity", "4M"])?;
    let (mut driver, pages) = driver_in_use(&fixture, &options())?;
    let mut events = fixture.control().events()?;
    driver.inflate_all(pages.block(0).chain(pages.block(1)))?;
    fixture.wait_until("huge pages are free", || Ok(available()? == 2))?;
    driver.deflate(&[pages.block(0).start])?;
    pages.mark(pages.block(0).start, 2);
    let thief = huge_pages.take(1)?;
    driver.submit(Role::Deflate, &[&narrow(&[pages.block(1).start])]);
    events.wait_for("deflate-held").context("there is no huge page for it")?;
    assert!(!driver.is_done(Role::Deflate));
    drop(thief);
    driver.finish(Role::Deflate)?;
    pages.mark(pages.block(1).start, 2);
    driver.deflate_all(pages.block(0).chain(pages.block(1)).skip(1))?;
    assert_eq!(available()?, 0);
    // Whole again, they go again, whichever page was the one that came back.
    driver.inflate_all(pages.block(1).rev().chain(pages.block(0)))?;
    fixture.wait_until("huge pages are free", || Ok(available()? == 2))
}

/// The balloon of a driver that is gone is nobody's, whatever the next driver promises.
#[test]
fn nothing_is_given_back_between_two_drivers() -> Result<()> {
    let _huge_pages = HugePages::new(MEMORY)?;
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = driver_in_use(&fixture, &options().without(MUST_TELL_HOST))?;
    // Kept, as this driver would use them without asking.
    driver.inflate_all(pages.block(0).chain(pages.block(1)))?;
    driver.stop()?;
    // The guest boots, and another driver comes.
    pages.mark_all(pages.all(), 2);
    driver.device.frontend.set_features(driver.device.features() | 1 << MUST_TELL_HOST)?;
    driver.device.frontend.set_mem_table(&pages.memory().table())?;
    thread::sleep(A_WHILE);
    assert_eq!(available()?, 0);
    driver.start_rings()?;
    driver.inflate(&[pages.block(3).start])?;
    thread::sleep(A_WHILE);
    assert_eq!(available()?, 0);
    pages.check_marked(pages.all().into_iter().filter(|pfn| *pfn != pages.block(3).start), 2)
}

#[test]
fn what_cannot_go_on_is_not_tried_all_the_time() -> Result<()> {
    // Statistics are due, and their queue is switched off.
    let fixture = BalloonFixture::new(["--stats-interval", "1"])?;
    let mut driver = fixture.driver(&Options::default())?;
    driver.give_stats(&[(4, 1)]);
    driver.stats_wanted()?;
    driver.give_stats(&[(4, 1)]);
    let index = driver.options().index(Role::Stats);
    driver.device.frontend.set_vring_enable(index, false)?;
    thread::sleep(Duration::from_secs(1));
    check_idle(&fixture, "statistics")?;
    driver.device.frontend.set_vring_enable(index, true)?;
    driver.stats_wanted()?;
    driver.give_stats(&[(4, 1)]);
    // A queue that its guest broke.
    driver.stats_wanted()?;
    driver.give_stats(&[(4, 1)]);
    thread::sleep(A_WHILE);
    let ring = driver.ring(Role::Stats);
    let at = ring.avail_idx();
    ring.set_avail_idx(at.wrapping_add(1000));
    ring.kick();
    thread::sleep(Duration::from_secs(1));
    check_idle(&fixture, "broken statistics")?;

    // A deflation waits for huge pages, and the guest is shut down.
    let huge_pages = HugePages::new(MEMORY)?;
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = driver_in_use(&fixture, &options())?;
    let mut events = fixture.control().events()?;
    driver.inflate_all(pages.block(0))?;
    fixture.wait_until("a huge page is free", || Ok(available()? == 1))?;
    let thief = huge_pages.take(1)?;
    driver.submit(Role::Deflate, &[&narrow(&[pages.block(0).start])]);
    events.wait_for("deflate-held")?;
    driver.stop()?;
    check_idle(&fixture, "a deflation")?;
    assert_eq!(fixture.control().status()?["activity"], "absent");
    drop(thief);
    driver.cont()?;
    driver.finish(Role::Deflate)?;
    fixture.stop()
}

#[test]
fn a_shorter_interval_of_statistics_counts_at_once() -> Result<()> {
    let fixture = BalloonFixture::new(["--stats-interval", "3600"])?;
    let control = fixture.control();
    let mut driver = fixture.driver(&Options::default())?;
    driver.give_stats(&[(4, 1)]);
    // The first time is at once.
    driver.stats_wanted()?;
    driver.give_stats(&[(4, 2)]);
    fixture.wait_until("statistics came", || Ok(control.get("/v1/statistics")?["free_memory"] == 2))?;
    let answer =
        control.request("PATCH", "/balloon/statistics", Some(&json!({ "stats_polling_interval_s": 1 })))?;
    assert_eq!(answer.status, 204);
    driver.stats_wanted()
}

#[test]
fn a_guest_cannot_drown_events_in_its_own() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    let mut driver = fixture.driver(&Options::default())?;
    control.set_target(100 * 4096)?;
    let mut events = control.events()?;
    for _ in 0..2000 {
        driver.set_actual(99)?;
        driver.set_actual(100)?;
    }
    // What is so in the end is said, if a little later.
    control.set_target(101 * 4096)?;
    driver.set_actual(101)?;
    let mut count = 0;
    loop {
        let event = events.next_event()?;
        assert_ne!(event["event"], "lost");
        count += 1;
        if event["event"] == "reached" && event["actual_bytes"] == 101 * 4096 {
            break;
        }
    }
    assert!(count < 100, "{count} events");
    Ok(())
}

/// A front end that comes back finds its balloon as it was, also before it has said how much memory there is.
#[test]
fn a_balloon_is_not_let_go_while_the_memory_is_unknown() -> Result<()> {
    let fixture = BalloonFixture::new(["--min-guest-memory", "4M"])?;
    let control = fixture.control();
    let mut driver = fixture.driver(&Options::default())?;
    let pages = driver.pages.clone();
    control.set_target(2 * BLOCK)?;
    driver.wait_target(2 * BLOCK_PAGES as u32)?;
    let given: Vec<u64> = pages.block(0).chain(pages.block(1)).collect();
    driver.follow(&given, 0, given.len() as u32)?;
    driver.close();
    fixture.wait_until("the front end has left", || Ok(control.status()?["connected"] == false))?;
    assert_eq!(control.number("target_bytes")?, 2 * BLOCK);
    // A mistyped target is not for those of whom nothing is known.
    control.set_target(1 << 40)?;
    assert_eq!(control.number("target_bytes")?, 2 * BLOCK);
    Ok(())
}
