//! Guests that mean harm or know no better: every chain comes back, nobody else's memory is touched, and the daemon's work
//! is bounded.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tests::driver::balloon::driver::narrow;
use tests::driver::balloon::memory::{BLOCK, BLOCK_PAGES, PAGE, Pages};
use tests::driver::balloon::{Backing, BalloonFixture, Driver, MUST_TELL_HOST, Options, Role, Shape};
use tests::driver::ring::{Desc, INDIRECT, NEXT, Next, linked};
use tests::driver::usage::{Footprint, cpu_time};

/// Long enough for everything that is done a little later; what must not happen has not happened then.
const A_WHILE: Duration = Duration::from_millis(100);

fn setup(fixture: &BalloonFixture, options: &Options) -> Result<(Driver, Pages)> {
    let driver = fixture.driver(options)?;
    let pages = driver.pages.clone();
    pages.mark_all(pages.all(), 1);
    Ok((driver, pages))
}

/// Sends a chain that is no good request, and waits until it comes back or, if it is taken for statistics, until it could.
fn send(driver: &mut Driver, role: Role, what: &str, chain: &[Desc]) -> Result<()> {
    let head = driver.submit_chain(role, chain);
    if role != Role::Stats {
        let (id, len) = driver.finish(role).with_context(|| what.to_owned())?;
        assert_eq!((id, len), (u32::from(head), 0), "{what}");
    }
    Ok(())
}

#[test]
fn chains_that_lead_nowhere_come_back() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    for role in Role::ALL {
        let (mut driver, pages) = setup(&fixture, &Options::default())?;
        let end = pages.memory().end();
        let ring = driver.ring(role);
        let size = ring.size();
        let at = ring.arena.alloc(4096, 4096);
        // Numbers of pages that do not exist, whatever is read of it.
        ring.memory().write(at, &[0xff; 4096]);
        let data = Desc::readable(at, 64);
        let table = ring.write_indirect(&[data.with(NEXT), data]);
        let nested = ring.write_indirect(&[Desc::readable(table, 32).with(INDIRECT)]);
        let circle = ring.write_indirect(&[data.with(NEXT), data.with(NEXT).to(Next::Entry(0))]);
        let outside = ring.write_indirect(&[data.with(NEXT).to(Next::Index(7)), data]);
        let many = ring.write_indirect(&vec![data.with(NEXT); 20_000]);
        let indirect = |addr, len| Desc::readable(addr, len).with(INDIRECT);
        let cases = [
            ("its own successor", vec![data.with(NEXT).to(Next::Entry(0))]),
            ("a circle", vec![data.with(NEXT), data.with(NEXT).to(Next::Entry(0))]),
            ("next outside of the table", vec![data.with(NEXT).to(Next::Index(size))]),
            ("next 65535", vec![data.with(NEXT).to(Next::Index(u16::MAX))]),
            ("a buffer to read behind one to write", linked(vec![Desc::writable(at, 64), data])),
            ("a buffer to write behind one to read", linked(vec![data, Desc::writable(at, 64)])),
            ("a buffer of no bytes", vec![Desc::readable(at, 0)]),
            ("many buffers of no bytes", linked(vec![Desc::readable(at, 0); 60])),
            ("a buffer outside of memory", vec![Desc::readable(end, 64)]),
            ("a buffer across the end of memory", vec![Desc::readable(end - 32, 64)]),
            ("a buffer far outside", vec![Desc::readable(1 << 60, 64)]),
            ("a wrapping buffer", vec![Desc::readable(u64::MAX - 3, 64)]),
            ("a buffer that is longer than memory", vec![Desc::readable(at, u32::MAX)]),
            ("bad buffers behind a good one", linked(vec![data, Desc::readable(1 << 60, 64), data])),
            ("an empty table", vec![indirect(table, 0)]),
            ("a table of 15 bytes", vec![indirect(table, 15)]),
            ("a table outside of memory", vec![indirect(end, 32)]),
            ("a table of u32::MAX bytes", vec![indirect(table, u32::MAX)]),
            ("a table in a table", vec![indirect(nested, 16)]),
            ("a circle in a table", vec![indirect(circle, 32)]),
            ("next outside of a table", vec![indirect(outside, 32)]),
            ("a chain of 20,000 buffers", vec![indirect(many, 20_000 * 16)]),
            ("a table and a successor", linked(vec![indirect(table, 32), data])),
        ];
        for (what, chain) in cases {
            send(&mut driver, role, &format!("{role:?}: {what}"), &chain)?;
        }
        driver.check_serves().with_context(|| format!("after bad chains to {role:?}"))?;
        thread::sleep(A_WHILE);
        let last = pages.all().len() - 1;
        pages.check_marked(pages.all().into_iter().take(last), 1).with_context(|| format!("{role:?}"))?;
    }
    assert_ne!(fixture.control().number("counters/malformed")?, 0);
    fixture.stop()
}

#[test]
fn indices_that_jump_stop_one_queue_at_most() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    for role in Role::ALL {
        for jump in [129, 1000, 0x8000, 0xffff] {
            let (mut driver, pages) = setup(&fixture, &Options::default())?;
            driver.check_serves()?;
            let ring = driver.ring(role);
            let at = ring.avail_idx();
            ring.set_avail_idx(at.wrapping_add(jump));
            ring.kick();
            for head in [0, 128, 129, u16::MAX] {
                let ring = driver.ring(role);
                ring.push_head(head);
                ring.kick();
            }
            thread::sleep(Duration::from_millis(10));
            let last = pages.all().len() - 1;
            pages.check_marked(pages.all().into_iter().take(last), 1)?;
            let status = fixture.control().status().with_context(|| format!("{role:?} jumps by {jump}"))?;
            assert_eq!(status["connected"], true);
            // A driver that starts anew is served again.
            driver.reboot()?;
            driver.check_serves().with_context(|| format!("{role:?} jumped by {jump}"))?;
        }
    }
    fixture.stop()
}

#[test]
fn statistics_of_any_kind_are_taken() -> Result<()> {
    let fixture = BalloonFixture::new(["--stats-interval", "1"])?;
    let mut driver = fixture.driver(&Options::default())?;
    let noise: Vec<u8> = (0..4096_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let sizes = [0, 1, 2, 9, 10, 11, 4096];
    for &size in &sizes {
        driver.submit(Role::Stats, &[&noise[..size]]);
        thread::sleep(Duration::from_millis(2));
    }
    // Two buffers at once, although there should be one: all but one of them come back.
    let mut back = 0;
    while back < sizes.len() - 1 {
        driver.finish(Role::Stats)?;
        back += 1;
    }
    driver.give_stats(&[(4, u64::MAX), (4, 5), (60_000, 7), (9, 1)]);
    while fixture.control().get("/v1/statistics")?["free_memory"] != 5 {
        driver.finish(Role::Stats)?;
        driver.give_stats(&[(4, u64::MAX), (4, 5), (60_000, 7), (9, 1)]);
    }
    let long = vec![0xff; 300_000];
    driver.submit(Role::Stats, &[&long]);
    driver.check_serves()?;
    fixture.stop()
}

#[test]
fn a_storm_of_requests_costs_a_bounded_part_of_a_processor() -> Result<()> {
    const PERCENT: u32 = 1;
    // More than what is saved up for good guests.
    const WARM_UP: Duration = Duration::from_secs(30);
    const WATCHED: Duration = Duration::from_secs(3);
    for feature in [None, Some(MUST_TELL_HOST)] {
        let options = Options::default();
        let options = feature.map_or(options, |feature| options.without(feature));
        let fixture = BalloonFixture::new(["--max-cpu", &PERCENT.to_string()])?;
        let (mut driver, pages) = setup(&fixture, &options)?;
        let scattered: Vec<u64> = pages.all().into_iter().step_by(2).take(1024).collect();
        let pid = fixture.daemon.pid();
        // As many requests as there is room for, of a thousand pages each that have to be taken from the host one by one.
        let mut storm = |until: &mut dyn FnMut() -> Result<bool>| -> Result<u64> {
            let mut requests = 0;
            while until()? {
                for role in [Role::Inflate, Role::Deflate] {
                    driver.submit(role, &[&narrow(&scattered)]);
                }
                for role in [Role::Inflate, Role::Deflate] {
                    driver.finish(role)?;
                    requests += 1;
                }
                // There is something to be given back again.
                for pfn in &scattered {
                    pages.memory().write(pfn * PAGE, &[1]);
                }
            }
            Ok(requests)
        };
        let start = Instant::now();
        let mut last = cpu_time(pid)?;
        let mut looked = start;
        // Until less than twice the limit is used in a while.
        storm(&mut || {
            if looked.elapsed() < Duration::from_secs(1) {
                return Ok(true);
            }
            let now = cpu_time(pid)?;
            let share = now.saturating_sub(last).as_secs_f64() / looked.elapsed().as_secs_f64();
            (last, looked) = (now, Instant::now());
            Ok(share > f64::from(PERCENT) / 50. && start.elapsed() < WARM_UP)
        })?;
        let (before, start) = (cpu_time(pid)?, Instant::now());
        let requests = storm(&mut || Ok(start.elapsed() < WATCHED))?;
        let used = cpu_time(pid)?.saturating_sub(before).as_secs_f64() / start.elapsed().as_secs_f64();
        assert!(
            used < f64::from(PERCENT) / 100. * 2. + 0.05,
            "{used:.2} of a processor for {requests} requests with --max-cpu {PERCENT}, without {feature:?}"
        );
        assert_ne!(fixture.control().number("counters/throttled")?, 0);
    }
    Ok(())
}

/// One chain can name the same memory as often as it has descriptors.
#[test]
fn a_report_of_everything_again_and_again_comes_back() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = setup(&fixture, &Options::default())?;
    let (first, count) = (pages.all()[0], pages.all().len() as u64);
    let all = Desc::writable(first * PAGE, (count * PAGE) as u32);
    let table = driver.ring(Role::Reporting).write_indirect(&linked(vec![all; 32_768]));
    let chain = [Desc::readable(table, 32_768 * 16).with(INDIRECT)];
    for _ in 0..3 {
        pages.mark_all(pages.all(), 1);
        let head = driver.submit_chain(Role::Reporting, &chain);
        fixture.control().status()?;
        let (id, len) = driver.finish(Role::Reporting)?;
        assert_eq!((id, len), (u32::from(head), 0));
    }
    driver.check_serves()?;
    fixture.stop()
}

/// What waits for being given back has to be done before a queue stops, and until then its front end waits.
#[test]
fn little_is_left_to_be_given_back_however_it_comes() -> Result<()> {
    const MOST: u64 = 512 * BLOCK;
    let fixture = BalloonFixture::plain()?;
    let driver = Options { rest: 4 * MOST, ..Options::default() };
    let mut driver = fixture.driver(&driver)?;
    let all = driver.pages.all();
    // No two pages of a request are of the same block, and no two are neighbours.
    let given: Vec<u64> = (0..BLOCK_PAGES as usize)
        .step_by(2)
        .flat_map(|first| all.iter().copied().skip(first).step_by(BLOCK_PAGES as usize))
        .collect();
    for chunk in given.chunks(16_000) {
        driver.inflate(chunk)?;
    }
    let pending = fixture.control().number("pending_bytes")?;
    assert!(pending < MOST, "{pending} of {} bytes wait", given.len() as u64 * PAGE);
    driver.stop()
}

#[test]
fn a_storm_leaves_nothing_behind() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = setup(&fixture, &Options::default())?;
    let given: Vec<u64> = pages.all();
    let storm = |driver: &mut Driver| -> Result<()> {
        for round in 0..20 {
            driver.inflate_all(given.iter().copied().skip(round).step_by(3))?;
            driver.execute(Role::Inflate, &[&vec![0xff; 60_000]])?;
            driver.report(&[(given[0], 100), (given[3000], 100)])?;
            driver.deflate_all(given.iter().copied())?;
        }
        Ok(())
    };
    storm(&mut driver)?;
    thread::sleep(A_WHILE);
    let before = Footprint::of(fixture.daemon.pid())?;
    let words = fixture.daemon.stderr().len();
    for _ in 0..3 {
        storm(&mut driver)?;
    }
    thread::sleep(A_WHILE);
    let after = Footprint::of(fixture.daemon.pid())?;
    assert_eq!((before.fds, before.threads, before.mappings), (after.fds, after.threads, after.mappings));
    assert!(after.rss_kib < before.rss_kib + 2048, "{before:?} became {after:?}");
    let more = fixture.daemon.stderr().len() - words;
    assert!(more < 4000, "{more} bytes of messages:\n{}", fixture.daemon.stderr());
    // Nothing of it is left to be done.
    pages.mark_all(pages.all(), 1);
    thread::sleep(A_WHILE);
    pages.check_marked(pages.all(), 1)
}

#[test]
fn an_idle_balloon_costs_nothing() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let (mut driver, pages) = setup(&fixture, &Options::default())?;
    driver.give_stats(&[(4, 1)]);
    driver.inflate_all(pages.block(0).chain(pages.block(2).step_by(2)))?;
    fixture.wait_number("pending_bytes", 0)?;
    thread::sleep(A_WHILE);
    let before = cpu_time(fixture.daemon.pid())?;
    thread::sleep(Duration::from_secs(1));
    let used = cpu_time(fixture.daemon.pid())?.saturating_sub(before);
    assert!(used < Duration::from_millis(20), "{used:?} in a second in which nothing happened");
    Ok(())
}

/// The front end has things of its own in the file of the guest's memory, beside the regions that it shared.
#[test]
fn a_guest_gives_away_only_its_own() -> Result<()> {
    const MARK: [u8; 16] = [7; 16];
    let fixture = BalloonFixture::plain()?;
    for shape in [Shape::Skewed(Backing::Memfd), Shape::Inside(Backing::Tmpfs)] {
        let options = Options::default().without(MUST_TELL_HOST).shape(shape);
        let (mut driver, pages) = setup(&fixture, &options)?;
        let region = &pages.memory().regions()[1];
        let beside: Vec<usize> = (0..region.file.len())
            .step_by(PAGE as usize)
            .filter(|at| !(region.offset..region.offset + region.len).contains(at))
            .collect();
        assert!(!beside.is_empty());
        for &at in &beside {
            region.file.write(at, &MARK);
        }
        let first = region.start / PAGE;
        let wanted: Vec<u64> = (first - 0x2000..first + 0x4000).collect();
        for chunk in wanted.chunks(16_000) {
            driver.inflate(chunk)?;
        }
        driver.report(&[(first - 0x200, 0x400), (first, 0x4000)])?;
        pages.check_gone(pages.all())?;
        for &at in &beside {
            let mut bytes = [0; MARK.len()];
            region.file.read(at, &mut bytes);
            assert_eq!(bytes, MARK, "{shape:?}: {at:#x} beside the region is gone");
        }
        driver.deflate_all(pages.all())?;
        driver.check_serves()?;
    }
    Ok(())
}
