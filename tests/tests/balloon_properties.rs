//! Random lives of a guest's pages against a model of what each may hold.

use std::collections::BTreeMap;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tests::driver::balloon::fixture::wait_until;
use tests::driver::balloon::huge::{HugePages, available};
use tests::driver::balloon::memory::{BLOCK_PAGES, Content, PAGE, Pages};
use tests::driver::balloon::{Backing, BalloonFixture, Driver, MUST_TELL_HOST, Numbering, Options, Shape};

/// Pages that take part: two blocks and a little more, from the middle of one on.
const PAGES: usize = 1300;
/// Huge pages of the default memory.
const HUGE_PAGES: u64 = 16;

/// What a guest does.
#[derive(Clone, Debug)]
enum Step {
    /// Gives those of its pages in this range, each so many.
    Inflate(Range<usize>, usize),
    /// Takes those in the balloon back.
    Deflate(Range<usize>, usize),
    /// Writes to its pages.
    Write(Range<usize>),
    /// Reports its pages in this range as free.
    Report(Range<usize>),
    /// Gives pages that are in the balloon, and takes pages that are not.
    Nonsense(Range<usize>),
    /// Lets some milliseconds pass.
    Wait(u64),
    /// Is paused.
    Stop,
    /// Its front end goes and comes.
    Reconnect,
    /// Boots.
    Reset,
}

fn range() -> impl Strategy<Value = Range<usize>> {
    (0..PAGES, prop_oneof![1..20_usize, 1..600_usize, Just(PAGES)])
        .prop_map(|(start, len)| start..(start + len).min(PAGES))
}

fn step() -> impl Strategy<Value = Step> {
    let step = prop_oneof![3 => Just(1_usize), 1 => 2..40_usize];
    prop_oneof![
        8 => (range(), step.clone()).prop_map(|(range, step)| Step::Inflate(range, step)),
        8 => (range(), step).prop_map(|(range, step)| Step::Deflate(range, step)),
        5 => range().prop_map(Step::Write),
        2 => range().prop_map(Step::Report),
        2 => range().prop_map(Step::Nonsense),
        3 => (0..15_u64).prop_map(Step::Wait),
        1 => Just(Step::Stop),
        1 => Just(Step::Reconnect),
        1 => Just(Step::Reset),
    ]
}

/// What a page is, as the guest knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// The guest's, with this mark.
    Written(u64),
    /// The guest's, with this mark or zeroes.
    Unsure(u64),
    /// In the balloon; it held this mark.
    Given(u64),
}

impl Page {
    fn mark(self) -> u64 {
        let (Self::Written(mark) | Self::Unsure(mark) | Self::Given(mark)) = self;
        mark
    }

    fn is_given(self) -> bool {
        matches!(self, Self::Given(_))
    }
}

struct Model {
    pages: BTreeMap<u64, Page>,
    pfns: Vec<u64>,
    mark: u64,
}

impl Model {
    fn chosen(&self, range: &Range<usize>, step: usize, given: bool) -> Vec<u64> {
        let chosen = self.pfns[range.clone()].iter().copied().step_by(step);
        chosen.filter(|pfn| self.pages[pfn].is_given() == given).collect()
    }

    fn set(&mut self, pfns: &[u64], page: impl Fn(Page) -> Page) {
        for pfn in pfns {
            let now = self.pages[pfn];
            self.pages.insert(*pfn, page(now));
        }
    }

    fn check(&self, pages: &Pages) -> Result<()> {
        for (&pfn, &page) in &self.pages {
            let content = match page {
                Page::Given(_) => continue,
                Page::Written(_) | Page::Unsure(_) => pages.content(pfn),
            };
            let is_right = match page {
                Page::Written(mark) => content == Content::Marked(mark),
                _ => content == Content::Marked(page.mark()) || content == Content::Zero,
            };
            ensure!(is_right, "Page {pfn:#x} should be {page:?} and holds {content:?}");
        }
        Ok(())
    }
}

fn run(fixture: &BalloonFixture, driver: &mut Driver, steps: &[Step]) -> Result<()> {
    let pages = driver.pages.clone();
    let first = pages.block(1).start - BLOCK_PAGES / 4;
    let all = pages.all();
    let pfns: Vec<u64> = all.iter().copied().filter(|pfn| *pfn >= first).take(PAGES).collect();
    ensure!(pfns.len() == PAGES, "There are too few pages");
    let mut model = Model { pages: pfns.iter().map(|pfn| (*pfn, Page::Written(1))).collect(), pfns, mark: 1 };
    pages.mark_all(model.pfns.iter().copied(), 1);
    for step in steps {
        match step {
            Step::Inflate(range, each) => {
                let chosen = model.chosen(range, *each, false);
                driver.inflate_all(chosen.iter().copied())?;
                model.set(&chosen, |page| Page::Given(page.mark()));
                if !driver.options().has(MUST_TELL_HOST) {
                    check_gone(driver, &chosen)?;
                }
            }
            Step::Deflate(range, each) => {
                let chosen = model.chosen(range, *each, true);
                driver.deflate_all(chosen.iter().copied())?;
                // Some are used at once, others not.
                model.mark += 1;
                let (used, unused) = chosen.split_at(chosen.len() / 2);
                pages.mark_all(used.iter().copied(), model.mark);
                let mark = model.mark;
                model.set(used, |_| Page::Written(mark));
                model.set(unused, |page| Page::Unsure(page.mark()));
            }
            Step::Write(range) => {
                let chosen = model.chosen(range, 1, false);
                model.mark += 1;
                pages.mark_all(chosen.iter().copied(), model.mark);
                let mark = model.mark;
                model.set(&chosen, |_| Page::Written(mark));
            }
            Step::Report(range) => {
                let chosen = model.chosen(range, 1, false);
                let runs = runs(&chosen);
                for report in runs.chunks(16) {
                    driver.report(report)?;
                }
                check_gone(driver, &chosen)?;
                model.set(&chosen, |page| Page::Unsure(page.mark()));
            }
            Step::Nonsense(range) => {
                driver.inflate_all(model.chosen(range, 1, true))?;
                driver.deflate_all(model.chosen(range, 1, false))?;
            }
            Step::Wait(ms) => thread::sleep(Duration::from_millis(*ms)),
            Step::Stop => driver.stop().and_then(|()| driver.cont())?,
            Step::Reconnect => driver.reconnect(fixture.socket())?,
            Step::Reset => {
                driver.reset()?;
                let all = model.pfns.clone();
                model.set(&all, |page| if page.is_given() { Page::Unsure(page.mark()) } else { page });
            }
        }
    }
    model.check(&pages)?;
    let given = model.chosen(&(0..PAGES), 1, true);
    wait_until("what was given is gone", || Ok(check_gone(driver, &given).is_ok()))?;
    fixture.wait_number("ballooned_bytes", given.len() as u64 * PAGE)?;
    thread::sleep(Duration::from_millis(15));
    model.check(&pages)?;
    driver.deflate_all(given)
}

/// Checks that the host holds none of these pages, as far as it can tell.
fn check_gone(driver: &Driver, pfns: &[u64]) -> Result<()> {
    if driver.options().shape.backing() == Backing::Huge {
        return Ok(());
    }
    driver.pages.check_gone(pfns.iter().copied())
}

/// Runs of numbers that follow each other: the first, and how many.
fn runs(pfns: &[u64]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &pfn in pfns {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == pfn => *count += 1,
            _ => runs.push((pfn, 1)),
        }
    }
    runs
}

fn pages_hold_what_they_should(options: Options) -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    // A failure prints its input, which is then written down as a test of its own.
    let config =
        Config { cases: 40, failure_persistence: None, max_shrink_time: 60_000, ..Config::default() };
    let result = TestRunner::new(config).run(&vec(step(), 1..40), |steps| {
        if options.shape.backing() == Backing::Huge {
            // The memory of the case before is a moment away.
            let is_free = || Ok(available()? >= HUGE_PAGES);
            wait_until("huge pages are free", is_free)
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        }
        let mut driver =
            fixture.driver(&options).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        run(&fixture, &mut driver, &steps).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    result.map_err(|error| anyhow::anyhow!("{error}")).with_context(|| fixture.daemon.stderr())
}

#[test]
fn pages_hold_what_they_should_with_must_tell_host() -> Result<()> {
    pages_hold_what_they_should(Options::default())
}

#[test]
fn pages_hold_what_they_should_without_must_tell_host() -> Result<()> {
    let options = Options { numbering: Numbering::Fixed, ..Options::default().without(MUST_TELL_HOST) };
    pages_hold_what_they_should(options)
}

/// Needs root: see `balloon_hugetlb`.
#[test]
fn pages_hold_what_they_should_in_huge_pages() -> Result<()> {
    let _huge = HugePages::new(HUGE_PAGES)?;
    pages_hold_what_they_should(Options::default().shape(Shape::One(Backing::Huge)))
}

#[test]
fn pages_hold_what_they_should_in_skewed_regions() -> Result<()> {
    pages_hold_what_they_should(Options::default().shape(Shape::SMALL[3]))
}
