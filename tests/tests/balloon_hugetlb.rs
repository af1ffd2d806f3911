//! Memory of huge pages: whole ones are returned, and a guest never finds that one it takes back has become somebody
//! else's. These tests need root, since they change the number of huge pages for a while.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tests::driver::balloon::driver::narrow;
use tests::driver::balloon::huge::{HugePages, MEMORY, available, driver_in_use, options};
use tests::driver::balloon::memory::{BLOCK, BLOCK_PAGES, Content, PAGE};
use tests::driver::balloon::{Backing, BalloonFixture, Role, Shape};

/// Long enough for everything that is done a little later; what must not happen has not happened then.
const A_WHILE: Duration = Duration::from_millis(100);

/// Waits until the host has got back this many huge pages.
fn wait_available(fixture: &BalloonFixture, count: u64) -> Result<()> {
    let mut last = 0;
    let waited = fixture.wait_until("huge pages are free", || {
        last = available()?;
        Ok(last == count)
    });
    waited.with_context(|| format!("{last} instead of {count} are available"))
}

#[test]
fn whole_huge_pages_are_returned() -> Result<()> {
    let huge = HugePages::new(MEMORY)?;
    for shape in [Shape::One(Backing::Huge), Shape::Split(Backing::Huge)] {
        let fixture = BalloonFixture::plain()?;
        let (mut driver, pages) = driver_in_use(&fixture, &options().shape(shape))?;
        assert_eq!((available()?, pages.resident()?), (0, MEMORY * BLOCK));
        // One page after the other in requests of Linux, each of which has but a part of a huge page.
        driver.inflate_all(pages.block(0).chain(pages.block(2)).chain(pages.block(9)))?;
        wait_available(&fixture, 3)?;
        assert_eq!(pages.resident()?, (MEMORY - 3) * BLOCK);
        fixture.wait_number("resident_bytes", (MEMORY - 3) * BLOCK)?;
        // A part of a huge page is kept until the rest comes, in any order.
        driver.inflate_all(pages.block(4).step_by(2))?;
        driver.inflate_all(pages.block(5).take(511))?;
        thread::sleep(A_WHILE);
        assert_eq!(available()?, 3);
        fixture.wait_number("held_bytes", (256 + 511) * PAGE)?;
        pages.check_marked(pages.block(4).chain(pages.block(5)), 1)?;
        driver.inflate_all(pages.block(4).skip(1).step_by(2))?;
        wait_available(&fixture, 4)?;
        driver.inflate_all(pages.block(5).skip(511))?;
        wait_available(&fixture, 5)?;
        fixture.wait_number("held_bytes", 0)?;
        // Everything is taken back and is there.
        driver.deflate_all([0, 2, 9, 4, 5].into_iter().flat_map(|index| pages.block(index)))?;
        assert_eq!(available()?, 0, "what the guest took back is promised to it");
        pages.mark_all(pages.all(), 2);
        thread::sleep(A_WHILE);
        pages.check_marked(pages.all(), 2)?;
        fixture.wait_number("ballooned_bytes", 0)?;
        fixture.stop()?;
    }
    drop(huge);
    Ok(())
}

#[test]
fn a_page_that_is_taken_back_has_its_huge_page_again() -> Result<()> {
    let huge = HugePages::new(MEMORY)?;
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = driver_in_use(&fixture, &options())?;
    driver.inflate_all(pages.block(0).chain(pages.block(1)))?;
    wait_available(&fixture, 2)?;
    // One small page brings the huge one back, and nobody else gets that.
    let pfn = pages.block(0).start + 77;
    driver.deflate(&[pfn])?;
    assert_eq!(available()?, 1);
    let thief = huge.take(1)?;
    assert_eq!(pages.content(pfn), Content::Zero);
    pages.mark(pfn, 3);
    // The others of it come for nothing.
    driver.deflate_all(pages.block(0).filter(|other| *other != pfn))?;
    pages.check_marked([pfn], 3)?;
    pages.mark_all(pages.block(0), 1);
    thread::sleep(A_WHILE);
    pages.check_marked(pages.block(0), 1)?;
    drop(thief);
    driver.deflate_all(pages.block(1))?;
    pages.mark_all(pages.block(1), 1);
    pages.check_marked(pages.all(), 1)
}

/// The guest waits instead of dying of a bus error.
#[test]
fn a_deflation_waits_for_huge_pages() -> Result<()> {
    let huge = HugePages::new(MEMORY)?;
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    let mut events = control.events()?;
    let (mut driver, pages) = driver_in_use(&fixture, &options())?;
    driver.give_stats(&[(4, 1)]);
    driver.inflate_all(pages.block(0).chain(pages.block(1)).chain(pages.block(2)))?;
    wait_available(&fixture, 3)?;
    // Another guest starts.
    let thief = huge.take(2)?;
    let back: Vec<u64> = pages.block(0).chain(pages.block(1)).step_by(5).collect();
    driver.submit(Role::Deflate, &[&narrow(&back)]);
    events.wait_for("deflate-held")?;
    assert!(!driver.is_done(Role::Deflate));
    assert_eq!(control.status()?["activity"], "held");
    assert_eq!(control.number("counters/deflates_held")?, 1);
    // The rest is served meanwhile.
    pages.mark_all(pages.block(5), 4);
    driver.inflate_all(pages.block(5).step_by(2))?;
    let answer = driver.answer_stats(control.ask_statistics(), &[(4, 8192)])?;
    assert_eq!(answer["free_memory"], 8192);
    assert!(!driver.is_done(Role::Deflate));
    // That guest ends.
    drop(thief);
    driver.finish(Role::Deflate)?;
    events.wait_for("deflate-resumed")?;
    for &pfn in &back {
        assert_eq!(pages.content(pfn), Content::Zero);
        pages.mark(pfn, 9);
    }
    pages.check_marked(back, 9)?;
    assert_eq!(available()?, 1);
    driver.check_serves()
}

/// A deflation that waits does not keep a queue from stopping, and is done when it goes on.
#[test]
fn a_deflation_that_waits_outlives_a_stop() -> Result<()> {
    let huge = HugePages::new(MEMORY)?;
    for life in ["stopped", "reset", "reconnected", "ended"] {
        let fixture = BalloonFixture::plain()?;
        let (mut driver, pages) = driver_in_use(&fixture, &options())?;
        let mut events = fixture.control().events()?;
        driver.inflate_all(pages.block(0))?;
        wait_available(&fixture, 1)?;
        let thief = huge.take(1)?;
        driver.submit(Role::Deflate, &[&narrow(&[pages.block(0).start])]);
        events.wait_for("deflate-held")?;
        match life {
            "stopped" => {
                driver.stop()?;
                assert!(!driver.is_done(Role::Deflate), "the guest would use it");
                driver.cont()?;
                drop(thief);
                driver.finish(Role::Deflate)?;
                pages.mark(pages.block(0).start, 5);
            }
            "reset" => {
                drop(thief);
                driver.reset()?;
                driver.check_serves()?;
            }
            "reconnected" => {
                driver.reconnect(fixture.socket())?;
                assert!(!driver.is_done(Role::Deflate), "the guest would use it");
                drop(thief);
                driver.finish(Role::Deflate)?;
                pages.mark(pages.block(0).start, 5);
            }
            _ => {
                fixture.stop()?;
                continue;
            }
        }
        driver.check_serves().context(life)?;
        fixture.stop()?;
    }
    Ok(())
}

/// A guest uses reported pages without a word, so that nothing could keep it from a page that is not there any more.
#[test]
fn reported_huge_pages_are_kept() -> Result<()> {
    let _huge = HugePages::new(MEMORY)?;
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = driver_in_use(&fixture, &options())?;
    driver.report(&[(pages.block(0).start, BLOCK_PAGES), (pages.block(3).start, 2 * BLOCK_PAGES)])?;
    thread::sleep(A_WHILE);
    assert_eq!(available()?, 0);
    pages.mark_all(pages.all(), 2);
    pages.check_marked(pages.all(), 2)?;
    assert_eq!(fixture.control().number("counters/reported_kept_bytes")?, 3 * BLOCK);
    Ok(())
}

/// Nothing less than a huge page is punched: the kernel would fill the rest with zeroes.
#[test]
fn parts_of_huge_pages_keep_what_they_hold() -> Result<()> {
    let _huge = HugePages::new(MEMORY)?;
    for granularity in ["auto", "4K", "2M"] {
        let fixture = BalloonFixture::new(["--granularity", granularity])?;
        for feature in [None, Some(tests::driver::balloon::MUST_TELL_HOST)] {
            let options = feature.map_or(options(), |feature| options().without(feature));
            let (mut driver, pages) = driver_in_use(&fixture, &options)?;
            for index in 0..8 {
                driver.inflate_all(pages.block(index).step_by(index + 2))?;
            }
            thread::sleep(A_WHILE);
            assert_eq!(available()?, 0);
            pages
                .check_marked(pages.all(), 1)
                .with_context(|| format!("{granularity} without {feature:?}"))?;
            driver.close();
            drop((driver, pages));
            fixture.wait_until("the memory is gone", || Ok(available()? == MEMORY))?;
        }
    }
    Ok(())
}
