//! Requests of all forms, good ones and such as no driver should send: what is named is returned to the host, and nothing
//! else ever is.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tests::driver::balloon::driver::{Config, narrow, wide};
use tests::driver::balloon::fixture::wait_until;
use tests::driver::balloon::memory::{BLOCK_PAGES, Content, PAGE, Pages, RINGS};
use tests::driver::balloon::{BalloonFixture, Driver, MUST_TELL_HOST, Options, PAGE_POISON, Role, Shape};
use tests::driver::ring::{Desc, INDIRECT, NEXT, linked};

/// Long enough for everything that is done a little later; what must not happen has not happened then.
const A_WHILE: Duration = Duration::from_millis(100);
/// The bytes of the longest buffer that is looked at.
const MOST: usize = 64 << 10;

/// A daemon, and a driver that has filled all of its memory with mark 1.
struct Setup {
    driver: Driver,
    pages: Pages,
    fixture: BalloonFixture,
}

impl Setup {
    fn new(args: &[&str], options: &Options) -> Result<Self> {
        let fixture = BalloonFixture::new(args)?;
        let driver = fixture.driver(options)?;
        let pages = driver.pages.clone();
        pages.mark_all(pages.all(), 1);
        Ok(Self { driver, pages, fixture })
    }

    /// One whose answers mean that all is done.
    fn strict() -> Result<Self> {
        Self::new(&[], &Options::default().without(MUST_TELL_HOST))
    }

    /// Checks that exactly these pages are gone, and fills them again.
    fn check_only_gone(&mut self, gone: &[u64]) -> Result<()> {
        self.pages.check_gone(gone.iter().copied())?;
        let kept = self.pages.all().into_iter().filter(|pfn| !gone.contains(pfn));
        self.pages.check_marked(kept, 1)?;
        self.driver.deflate_all(gone.iter().copied())?;
        self.pages.mark_all(gone.iter().copied(), 1);
        Ok(())
    }

    /// Checks that nothing is gone but these pages, all of them or none, and fills them again.
    fn check_all_or_none_gone(&mut self, maybe: &[u64]) -> Result<()> {
        let is_gone = self.pages.check_gone(maybe.iter().copied()).is_ok();
        self.check_only_gone(if is_gone { maybe } else { &[] })
    }

    fn counter(&self, name: &str) -> Result<u64> {
        self.fixture.control().number(&format!("counters/{name}"))
    }
}

#[test]
fn page_numbers_come_in_buffers_of_any_cut() -> Result<()> {
    let mut setup = Setup::strict()?;
    let wanted: Vec<u64> = setup.pages.block(1).step_by(3).collect();
    for bytes in [narrow(&wanted), wide(&wanted)] {
        for cuts in [&[][..], &[1], &[4], &[2, 3], &[8, 16, 17], &[7, 100, 101, 103], &[bytes.len() - 1]] {
            let mut pieces = Vec::new();
            let mut from = 0;
            for &cut in cuts.iter().chain([&bytes.len()]) {
                pieces.push(&bytes[from..cut]);
                from = cut;
            }
            setup.driver.execute(Role::Inflate, &pieces)?;
            setup
                .check_only_gone(&wanted)
                .with_context(|| format!("{} bytes cut at {cuts:?}", bytes.len()))?;
        }
    }
    // In a table, one number in each buffer.
    let bytes = narrow(&wanted);
    let ring = setup.driver.ring(Role::Inflate);
    let at = ring.arena.alloc(bytes.len(), 4);
    ring.memory().write(at, &bytes);
    let chain = (0..wanted.len() as u64).map(|index| Desc::readable(at + 4 * index, 4)).collect();
    let table = ring.write_indirect(&linked(chain));
    let table = Desc::readable(table, 16 * wanted.len() as u32).with(INDIRECT);
    setup.driver.execute_chain(Role::Inflate, &[table])?;
    setup.check_only_gone(&wanted)?;
    assert_eq!(setup.counter("malformed")?, 0);
    assert_eq!(setup.counter("duplicates")?, 0);
    assert_eq!(setup.counter("out_of_range")?, 0);
    Ok(())
}

#[test]
fn both_forms_of_page_numbers_are_told_apart() -> Result<()> {
    let mut setup = Setup::strict()?;
    let first = setup.pages.block(0).start;
    // One number, two, page 0 in front and behind: zeroes in every second place are what tells the long form.
    for wanted in [vec![first], vec![first, first + 9], (first..first + 512).collect()] {
        setup.driver.execute(Role::Inflate, &[&wide(&wanted)])?;
        setup.check_only_gone(&wanted).with_context(|| format!("{} long numbers", wanted.len()))?;
        setup.driver.execute(Role::Inflate, &[&narrow(&wanted)])?;
        setup.check_only_gone(&wanted).with_context(|| format!("{} short numbers", wanted.len()))?;
        // Taken back in the long form, too.
        setup.driver.inflate(&wanted)?;
        setup.driver.execute(Role::Deflate, &[&wide(&wanted)])?;
        setup.pages.mark_all(wanted.iter().copied(), 1);
        assert_eq!(setup.fixture.control().number("ballooned_bytes")?, 0);
    }
    // Windows sends 512 numbers in a page of memory. Above 4 GiB too they fit into 4 bytes.
    let options = Options::default().without(MUST_TELL_HOST).shape(Shape::SMALL[2]);
    let mut setup = Setup::new(&[], &options)?;
    let high: Vec<u64> = setup.pages.all().into_iter().rev().take(512).collect();
    assert!(high[511] * PAGE > Shape::HIGH);
    setup.driver.execute(Role::Inflate, &[&wide(&high)])?;
    setup.check_only_gone(&high)
}

#[test]
fn long_buffers_are_taken_and_longer_ones_do_no_harm() -> Result<()> {
    let rest = 80 << 20;
    let options = Options { rest, ..Options::default().without(MUST_TELL_HOST) };
    let mut setup = Setup::new(&[], &options)?;
    let all = setup.pages.all();
    for (what, wanted) in [
        ("as many as fit", &all[..MOST / 4]),
        ("one less", &all[1..MOST / 4]),
        ("one, in a long buffer of the same number", &vec![all[9]; 16000]),
    ] {
        setup.driver.execute(Role::Inflate, &[&narrow(wanted)])?;
        let mut gone = wanted.to_vec();
        gone.dedup();
        setup.check_only_gone(&gone).context(what)?;
    }
    setup.driver.execute(Role::Inflate, &[&wide(&all[..MOST / 8])])?;
    setup.check_only_gone(&all[..MOST / 8])?;
    for len in [MOST + 1, MOST + 4, MOST + 4096, 200_000] {
        // The surplus may be taken or refused, but nothing that is not in the buffer goes.
        let mut bytes = narrow(&all[..len.div_ceil(4).min(all.len())]);
        bytes.resize(len, 0);
        setup.driver.execute(Role::Inflate, &[&bytes]).with_context(|| format!("{len} bytes"))?;
        setup.pages.check_marked(all.iter().copied().skip(len.div_ceil(4)), 1)?;
        setup.driver.deflate_all(all.iter().copied())?;
        setup.pages.mark_all(all.iter().copied(), 1);
    }
    setup.driver.check_serves()
}

#[test]
fn buffers_with_nothing_useful_are_counted() -> Result<()> {
    let mut setup = Setup::strict()?;
    let pfn = setup.pages.block(0).start;
    for role in [Role::Inflate, Role::Deflate] {
        // A request for nothing is a request.
        setup.driver.execute(role, &[&[]]).with_context(|| format!("nothing to {role:?}"))?;
        for (what, bytes) in [("1 byte", vec![9]), ("3 bytes", vec![0, 8, 0])] {
            let before = setup.counter("malformed")?;
            setup.driver.execute(role, &[&bytes]).with_context(|| format!("{what} to {role:?}"))?;
            assert_eq!(setup.counter("malformed")?, before + 1, "{what} to {role:?}");
        }
    }
    setup.check_only_gone(&[])?;
    // What is left over of a number is no number.
    for surplus in 1..4 {
        let mut bytes = narrow(&[pfn, pfn + 2, pfn + 4]);
        bytes.extend(&narrow(&[pfn + 6])[..surplus]);
        setup.driver.execute(Role::Inflate, &[&bytes])?;
        // Refused as a whole, or taken without the rest.
        setup
            .check_all_or_none_gone(&[pfn, pfn + 2, pfn + 4])
            .with_context(|| format!("{surplus} more bytes"))?;
    }
    // Buffers for the device to write to are no numbers.
    let addr = setup.driver.ring(Role::Inflate).arena.alloc(4, 4);
    setup.driver.ring(Role::Inflate).memory().write(addr, &narrow(&[pfn]));
    setup.driver.execute_chain(Role::Inflate, &[Desc::writable(addr, 4)])?;
    setup.check_only_gone(&[])?;
    setup.driver.check_serves()
}

#[test]
fn numbers_that_repeat_or_are_no_pages_are_counted() -> Result<()> {
    for shape in Shape::SMALL {
        let options = Options::default().without(MUST_TELL_HOST).shape(shape);
        let mut setup = Setup::new(&[], &options)?;
        let pfn = setup.pages.block(1).start;
        // Twice in one request, and again in another.
        setup.driver.inflate(&[pfn, pfn + 1, pfn])?;
        assert_eq!(setup.counter("duplicates")?, 1, "{shape:?}");
        setup.driver.inflate(&[pfn + 1, pfn + 2])?;
        assert_eq!(setup.counter("duplicates")?, 2, "{shape:?}");
        assert_eq!(setup.fixture.control().number("ballooned_bytes")?, 3 * PAGE);
        setup.check_only_gone(&[pfn, pfn + 1, pfn + 2]).with_context(|| format!("{shape:?}"))?;
        // Taken back although they were never given.
        setup.driver.deflate(&[pfn, pfn + 5])?;
        assert_eq!(setup.counter("duplicates")?, 4, "{shape:?}");
        setup.check_only_gone(&[]).with_context(|| format!("{shape:?}"))?;

        let end = setup.pages.memory().end() / PAGE;
        let bad = [end, end + 1, end + BLOCK_PAGES, 0x0fff_ffff, 0x7fff_ffff, 0xffff_ffff];
        let gap = [RINGS / PAGE + 6144, Shape::HIGH / PAGE - 1];
        let is_split = end > Shape::HIGH / PAGE;
        let bad: Vec<u64> = bad.into_iter().chain(gap.into_iter().filter(|_| is_split)).collect();
        for role in [Role::Inflate, Role::Deflate] {
            let before = setup.counter("out_of_range")?;
            setup.driver.execute(role, &[&narrow(&bad)])?;
            assert_eq!(setup.counter("out_of_range")?, before + bad.len() as u64, "{shape:?} {role:?}");
        }
        setup.check_only_gone(&[]).with_context(|| format!("{shape:?}"))?;
        // Good ones among bad ones, and numbers that would overflow an address.
        let mixed: Vec<u64> = bad.iter().flat_map(|&bad| [bad, pfn, pfn + 7]).collect();
        setup.driver.inflate(&mixed)?;
        setup.check_only_gone(&[pfn, pfn + 7]).with_context(|| format!("{shape:?}"))?;
        setup.driver.execute(Role::Inflate, &[&wide(&[pfn | 1 << 63, u64::MAX, pfn | 0xffff_0000 << 32])])?;
        setup.check_all_or_none_gone(&[pfn]).with_context(|| format!("{shape:?}"))?;
        setup.driver.check_serves()?;
    }
    Ok(())
}

#[test]
fn the_edges_of_regions_are_pages_as_others() -> Result<()> {
    for shape in Shape::SMALL {
        let options = Options::default().without(MUST_TELL_HOST).shape(shape);
        let mut setup = Setup::new(&[], &options)?;
        let all = setup.pages.all();
        let edges: Vec<u64> = setup
            .pages
            .memory()
            .regions()
            .iter()
            .flat_map(|region| [region.start / PAGE, region.range().end / PAGE - 1])
            .filter(|pfn| all.contains(pfn))
            .collect();
        setup.driver.inflate(&edges)?;
        setup.check_only_gone(&edges).with_context(|| format!("{shape:?}"))?;
        // Everything but the edges.
        let inner: Vec<u64> = all.into_iter().filter(|pfn| !edges.contains(pfn)).collect();
        setup.driver.inflate_all(inner.iter().copied())?;
        setup.check_only_gone(&inner).with_context(|| format!("{shape:?}"))?;
    }
    Ok(())
}

#[test]
fn with_must_tell_host_pages_go_a_little_later() -> Result<()> {
    for granularity in ["auto", "4K", "2M"] {
        let mut setup = Setup::new(&["--granularity", granularity], &Options::default())?;
        let pages = setup.pages.clone();
        // A whole block, in requests of Linux, then single pages of others.
        setup.driver.inflate_all(pages.block(0))?;
        let singles: Vec<u64> = pages.block(2).step_by(2).collect();
        setup.driver.inflate_all(singles.iter().copied())?;
        wait_until("the block is gone", || Ok(pages.there(pages.block(0))?.is_empty()))
            .context(granularity)?;
        if granularity == "2M" {
            thread::sleep(A_WHILE);
            pages.check_there(singles.iter().copied())?;
            setup.fixture.wait_number("held_bytes", singles.len() as u64 * PAGE)?;
            // The rest of the block comes.
            setup.driver.inflate_all(pages.block(2).skip(1).step_by(2))?;
            wait_until("it is gone", || Ok(pages.there(pages.block(2))?.is_empty())).context(granularity)?;
            setup.fixture.wait_number("held_bytes", 0)?;
        } else {
            wait_until("they are gone", || Ok(pages.there(singles.iter().copied())?.is_empty()))
                .context(granularity)?;
            setup.check_only_gone(&pages.block(0).chain(singles).collect::<Vec<_>>()).context(granularity)?;
        }
        setup.fixture.wait_number("pending_bytes", 0)?;
    }
    Ok(())
}

#[test]
fn a_page_that_was_taken_back_is_never_taken_away() -> Result<()> {
    let mut setup = Setup::new(&[], &Options::default())?;
    let pages = setup.pages.clone();
    let mut mark = 1;
    for round in 0..300_u64 {
        let given: Vec<u64> = match round % 4 {
            0 => pages.block(3).collect(),
            1 => pages.block(3).step_by(2).collect(),
            2 => vec![pages.block(3).start + round % 512],
            _ => pages.block(3).chain(pages.block(5).step_by(3)).collect(),
        };
        let back: Vec<u64> =
            if round % 3 == 0 { given.iter().copied().step_by(2).collect() } else { given.clone() };
        setup.driver.inflate_all(given.iter().copied())?;
        match round % 5 {
            0 => thread::sleep(Duration::from_millis(11)),
            1 => thread::sleep(Duration::from_millis(9)),
            _ => {}
        }
        setup.driver.deflate_all(back.iter().copied())?;
        mark += 1;
        pages.mark_all(back.iter().copied(), mark);
        if round % 7 == 0 {
            thread::sleep(Duration::from_millis(25));
        }
        pages.check_marked(back.iter().copied(), mark).with_context(|| format!("round {round}"))?;
        let left: Vec<u64> = given.iter().copied().filter(|pfn| !back.contains(pfn)).collect();
        setup.driver.deflate_all(left.iter().copied())?;
        pages.mark_all(left, 1);
        if round % 7 == 1 {
            thread::sleep(Duration::from_millis(25));
            pages.check_marked(back.iter().copied(), mark).with_context(|| format!("round {round}"))?;
        }
        pages.mark_all(back, 1);
    }
    thread::sleep(A_WHILE);
    pages.check_marked(pages.all(), 1)?;
    assert_eq!(setup.counter("duplicates")?, 0);
    setup.fixture.wait_number("ballooned_bytes", 0)
}

#[test]
fn a_page_that_was_taken_back_holds_zeroes_or_what_it_held() -> Result<()> {
    for feature in [None, Some(MUST_TELL_HOST)] {
        let options = Options::default();
        let options = feature.map_or(options, |feature| options.without(feature));
        let mut setup = Setup::new(&[], &options)?;
        let pages = setup.pages.clone();
        for round in 0..20_u64 {
            pages.mark_all(pages.all(), round + 2);
            setup.driver.inflate_all(pages.block(0).chain(pages.block(4).step_by(5)))?;
            if round % 2 == 0 {
                thread::sleep(Duration::from_millis(round));
            }
            setup.driver.deflate_all(pages.block(0).chain(pages.block(4).step_by(5)))?;
            for pfn in pages.block(0).chain(pages.block(4)) {
                let content = pages.content(pfn);
                let is_own = content == Content::Marked(round + 2);
                assert!(is_own || content == Content::Zero, "page {pfn:#x}: {content:?}");
                let is_strict = feature.is_some() && pages.block(0).contains(&pfn);
                assert!(!is_strict || content == Content::Zero, "page {pfn:#x}: {content:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn free_pages_that_are_reported_go_before_the_answer() -> Result<()> {
    for feature in [None, Some(MUST_TELL_HOST)] {
        let options = Options::default();
        let options = feature.map_or(options, |feature| options.without(feature));
        let mut setup = Setup::new(&[], &options)?;
        let pages = setup.pages.clone();
        for round in 0..20 {
            let (first, second) = (pages.block(round % 3), pages.block(5));
            setup.driver.report(&[(first.start, BLOCK_PAGES), (second.start, BLOCK_PAGES / 2)])?;
            pages.check_gone(first.clone().chain(second.clone().take(256)))?;
            pages.check_marked(second.clone().skip(256), 1)?;
            // They are the guest's at once.
            pages.mark_all(first.clone().chain(second.clone()), 1);
        }
        thread::sleep(A_WHILE);
        pages.check_marked(pages.all(), 1)?;
        assert_eq!(setup.counter("reports")?, 20);
        assert_eq!(setup.counter("reported_bytes")?, 20 * 768 * PAGE);
        assert_eq!(setup.fixture.control().number("ballooned_bytes")?, 0);
    }
    Ok(())
}

#[test]
fn ranges_of_any_kind_are_reported() -> Result<()> {
    for shape in Shape::SMALL {
        let mut setup = Setup::new(&[], &Options::default().shape(shape))?;
        let pages = setup.pages.clone();
        let (start, end) = (pages.block(1).start * PAGE, pages.memory().end());
        let last = end / PAGE - 1;
        let pfn = start / PAGE;
        for (what, addr, len, gone) in [
            ("a page", start, 4096, vec![pfn]),
            ("part of a page", start, 4095, vec![]),
            ("the other part of it", start + 1, 4095, vec![]),
            ("a page that lies across two", start + 2048, 4096, vec![]),
            ("one page and parts of its neighbours", start + 2048, 8192, vec![pfn + 1]),
            ("nothing", start, 0, vec![]),
            ("the last page", last * PAGE, 4096, vec![last]),
        ] {
            let chain = [Desc::writable(addr, len)];
            setup
                .driver
                .execute_chain(Role::Reporting, &chain)
                .with_context(|| format!("{shape:?}: {what}"))?;
            setup.check_only_gone(&gone).with_context(|| format!("{shape:?}: {what}"))?;
        }
        for (what, addr, len) in [
            ("behind the end", end, 4096),
            ("far behind the end", 1 << 50, 4096),
            ("the last address", u64::MAX - 4095, 4096),
            ("a wrapping end", u64::MAX - 4095, 8192),
        ] {
            // Each alone, and in front of and behind a good one.
            for chain in [
                vec![Desc::writable(addr, len)],
                vec![Desc::writable(addr, len).with(NEXT), Desc::writable(start, 4096)],
                vec![Desc::writable(start, 4096).with(NEXT), Desc::writable(addr, len)],
            ] {
                let what = format!("{shape:?}: {what}, {} ranges", chain.len());
                setup.driver.execute_chain(Role::Reporting, &chain).context(what.clone())?;
                setup.check_all_or_none_gone(&[pfn]).context(what)?;
            }
        }
        // Across the end: what lies inside may go.
        setup.driver.execute_chain(Role::Reporting, &[Desc::writable(end - 4096, 8192)])?;
        setup.check_all_or_none_gone(&[last])?;
        // As long as a descriptor can say.
        setup.driver.execute_chain(Role::Reporting, &[Desc::writable(end - 4096, u32::MAX)])?;
        setup.check_all_or_none_gone(&[last])?;
        // As many as fit into one report of Linux.
        let ranges: Vec<(u64, u64)> = (0..32).map(|index| (pfn + 3 * index, 2)).collect();
        setup.driver.report(&ranges)?;
        let gone: Vec<u64> = (0..32).flat_map(|index| [pfn + 3 * index, pfn + 3 * index + 1]).collect();
        setup.check_only_gone(&gone).with_context(|| format!("{shape:?}"))?;
        // A range that is to be read is none.
        setup.driver.execute_chain(Role::Reporting, &[Desc::readable(start, 4096)])?;
        setup.check_only_gone(&[]).with_context(|| format!("{shape:?}"))?;
    }
    Ok(())
}

#[test]
fn a_report_of_pages_in_the_balloon_changes_nothing_for_them() -> Result<()> {
    let mut setup = Setup::new(&[], &Options::default())?;
    let pages = setup.pages.clone();
    setup.driver.inflate_all(pages.block(0).step_by(2))?;
    setup.driver.report(&[(pages.block(0).start, BLOCK_PAGES)])?;
    pages.check_gone(pages.block(0))?;
    setup.fixture.wait_number("ballooned_bytes", BLOCK_PAGES / 2 * PAGE)?;
    setup.driver.deflate_all(pages.block(0).step_by(2))?;
    pages.mark_all(pages.block(0), 1);
    thread::sleep(A_WHILE);
    pages.check_marked(pages.all(), 1)?;
    setup.fixture.wait_number("ballooned_bytes", 0)?;
    assert_eq!(setup.counter("duplicates")?, 0);
    Ok(())
}

#[test]
fn poisoned_pages_are_not_exchanged_for_zeroes() -> Result<()> {
    let mut setup = Setup::new(&[], &Options::default())?;
    let pages = setup.pages.clone();
    setup.driver.set_config(Config::POISON_VAL, &0xaaaa_aaaa_u32.to_le_bytes())?;
    setup.driver.report(&[(pages.block(0).start, BLOCK_PAGES)])?;
    thread::sleep(A_WHILE);
    pages.check_marked(pages.all(), 1)?;
    assert_eq!(setup.counter("reported_kept_bytes")?, BLOCK_PAGES * PAGE);
    // A guest that fills its free pages with zeroes gets just these.
    setup.driver.set_config(Config::POISON_VAL, &[0; 4])?;
    setup.driver.report(&[(pages.block(0).start, BLOCK_PAGES)])?;
    setup.check_only_gone(&pages.block(0).collect::<Vec<_>>())?;
    // A driver that does not know of poison has none, whatever stands there.
    let mut setup = Setup::new(&[], &Options::default().without(PAGE_POISON))?;
    let _ = setup.driver.set_config(Config::POISON_VAL, &0xaaaa_aaaa_u32.to_le_bytes());
    let pages = setup.pages.clone();
    setup.driver.report(&[(pages.block(0).start, BLOCK_PAGES)])?;
    setup.check_only_gone(&pages.block(0).collect::<Vec<_>>())
}

#[test]
fn without_discards_everything_else_works() -> Result<()> {
    for feature in [None, Some(MUST_TELL_HOST)] {
        let options = Options::default();
        let options = feature.map_or(options, |feature| options.without(feature));
        let mut setup = Setup::new(&["--no-discard"], &options)?;
        let pages = setup.pages.clone();
        let full = pages.resident()?;
        setup.driver.inflate_all(pages.all())?;
        setup.driver.report(&[(pages.block(0).start, BLOCK_PAGES)])?;
        setup.driver.set_actual(6144)?;
        thread::sleep(A_WHILE);
        pages.check_marked(pages.all(), 1)?;
        assert_eq!(pages.resident()?, full);
        setup.fixture.wait_number("actual_bytes", 6144 * PAGE)?;
        setup.fixture.wait_number("ballooned_bytes", 6144 * PAGE)?;
        assert_eq!(setup.counter("released_bytes")?, 0);
        setup.driver.deflate_all(pages.all())?;
        pages.check_marked(pages.all(), 1)?;
        setup.fixture.wait_number("ballooned_bytes", 0)?;
    }
    Ok(())
}
