use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

/// Where the guest's memory begins in these tests, for there to be something before it.
const BASE: u64 = 16 << 20;

/// A guest with one region of `blocks` blocks, whose memory is all there.
struct Guest {
    file: Arc<File>,
    ledger: Ledger,
    pages: u64,
}

impl Guest {
    fn new(blocks: u64, granularity: Granularity) -> Self {
        let file = Arc::new(File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap()));
        ftruncate(&file, blocks * BLOCK).unwrap();
        let mut guest = Self { file, ledger: Ledger::new(granularity), pages: blocks * BLOCK_PAGES as u64 };
        guest.fill(0..guest.pages);
        guest.ledger.set_regions(guest.regions());
        guest.ledger.set_told(true);
        guest.ledger.confirm();
        guest
    }

    fn regions(&self) -> Vec<Region> {
        let file = MemoryFile::new(Arc::clone(&self.file)).unwrap();
        vec![Region { guest: BASE, len: self.pages * PAGE, file, offset: 0 }]
    }

    fn pfn(page: u64) -> u64 {
        BASE / PAGE + page
    }

    /// Writes the number of each page, plus one, to it.
    fn fill(&self, pages: std::ops::Range<u64>) {
        for page in pages {
            self.file.write_all_at(&(page + 1).to_le_bytes(), page * PAGE).unwrap();
        }
    }

    /// Whether the page has what `fill` wrote.
    fn is_filled(&self, page: u64) -> bool {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, page * PAGE).unwrap();
        match u64::from_le_bytes(bytes) {
            0 => false,
            number if number == page + 1 => true,
            number => panic!("page {page} has what was in page {number}"),
        }
    }

    fn inflate(&mut self, page: u64) -> Noted {
        self.ledger.inflate(Self::pfn(page))
    }

    fn deflate(&mut self, page: u64) -> Noted {
        self.ledger.deflate(Self::pfn(page)).unwrap()
    }

    fn release_all(&mut self) -> u64 {
        std::iter::from_fn(|| self.ledger.release(Urgency::All)).sum()
    }

    fn resident_pages(&self) -> u64 {
        self.ledger.resident_bytes() / PAGE
    }
}

#[test]
fn what_is_given_is_given_back_and_nothing_else() {
    let mut guest = Guest::new(4, Granularity::Auto);
    assert_eq!(guest.resident_pages(), guest.pages);
    let pages = [3, 4, 5, 511, 512, 513, 1000];
    for page in pages {
        assert_eq!(guest.inflate(page), Noted::Changed);
        assert_eq!(guest.inflate(page), Noted::Unchanged);
    }
    assert_eq!(guest.ledger.pending_bytes(), 7 * PAGE);
    assert_eq!(guest.ledger.release(Urgency::Complete), None, "no block is complete");
    assert_eq!(guest.release_all(), 7 * PAGE);
    assert_eq!(guest.ledger.totals().calls, 4, "3 to 5, 511, 512 to 513, 1000");
    assert_eq!((guest.ledger.released_bytes(), guest.ledger.pending_bytes()), (7 * PAGE, 0));
    assert_eq!(guest.resident_pages(), guest.pages - 7);
    for page in 0..guest.pages {
        assert_eq!(guest.is_filled(page), !pages.contains(&page), "page {page}");
    }
}

#[test]
fn a_complete_block_is_one_call() {
    let mut guest = Guest::new(2, Granularity::Auto);
    // As Linux does: from above.
    for page in (0..BLOCK_PAGES as u64 + 3).rev() {
        guest.inflate(page);
    }
    assert_eq!(guest.ledger.release(Urgency::Complete), Some(BLOCK));
    assert_eq!(guest.ledger.totals().calls, 1);
    assert_eq!(guest.ledger.release(Urgency::Complete), None);
    assert_eq!(guest.release_all(), 3 * PAGE);
}

#[test]
fn what_is_taken_back_before_it_was_given_back_stays() {
    let mut guest = Guest::new(1, Granularity::Auto);
    guest.inflate(7);
    guest.inflate(8);
    assert_eq!(guest.deflate(7), Noted::Changed);
    assert_eq!(guest.deflate(7), Noted::Unchanged);
    assert_eq!(guest.release_all(), PAGE);
    assert!(guest.is_filled(7) && !guest.is_filled(8));
    assert_eq!(guest.deflate(8), Noted::Changed);
    assert_eq!((guest.ledger.ballooned_bytes(), guest.ledger.released_bytes()), (0, 0));
}

#[test]
fn pages_outside_of_the_guest_are_none() {
    let mut guest = Guest::new(1, Granularity::Auto);
    for pfn in [0, BASE / PAGE - 1, BASE / PAGE + guest.pages, u64::MAX, u64::MAX / PAGE, 1 << 52] {
        assert_eq!(guest.ledger.inflate(pfn), Noted::OutOfRange, "{pfn:#x}");
        assert_eq!(guest.ledger.deflate(pfn), Ok(Noted::OutOfRange), "{pfn:#x}");
    }
    assert_eq!(guest.release_all(), 0);
}

#[test]
fn larger_pieces_go_when_they_are_whole() {
    let mut guest = Guest::new(2, Granularity::AtLeast(64 << 10));
    for page in 0..31 {
        guest.inflate(page);
    }
    assert_eq!(guest.release_all(), 16 * PAGE);
    assert_eq!((guest.ledger.released_bytes(), guest.ledger.ballooned_bytes()), (16 * PAGE, 31 * PAGE));
    guest.inflate(31);
    assert_eq!(guest.release_all(), 16 * PAGE);
    // What comes back breaks its piece only.
    guest.deflate(20);
    assert_eq!(guest.ledger.released_bytes(), 16 * PAGE);
    guest.fill(20..21);
    guest.inflate(20);
    assert_eq!(guest.release_all(), 16 * PAGE);
    assert_eq!(guest.resident_pages(), guest.pages - 32);
}

#[test]
fn pieces_of_several_blocks_go_when_they_are_whole() {
    let mut guest = Guest::new(4, Granularity::AtLeast(2 * BLOCK));
    for page in 1..2 * BLOCK_PAGES as u64 {
        guest.inflate(page);
    }
    assert_eq!(guest.release_all(), 0);
    guest.inflate(0);
    assert_eq!(guest.release_all(), 2 * BLOCK);
    guest.deflate(700);
    assert_eq!(guest.ledger.released_bytes(), 0);
    guest.inflate(700);
    assert_eq!(guest.release_all(), 2 * BLOCK);
}

#[test]
fn nothing_goes_if_nothing_may() {
    let mut guest = Guest::new(1, Granularity::Nothing);
    for page in 0..guest.pages {
        guest.inflate(page);
    }
    assert_eq!((guest.release_all(), guest.ledger.report(BASE, BLOCK)), (0, 0));
    assert_eq!(guest.resident_pages(), guest.pages);
    assert_eq!(guest.ledger.ballooned_bytes(), BLOCK);
}

#[test]
fn reports_are_rounded_inwards_and_stay_in_the_guest() {
    let mut guest = Guest::new(1, Granularity::Auto);
    assert_eq!(guest.ledger.report(BASE + 1, 3 * PAGE), 2 * PAGE);
    assert_eq!(guest.ledger.report(BASE + 10 * PAGE, PAGE - 1), 0);
    assert_eq!(guest.ledger.report(BASE - PAGE, 2 * PAGE), 0, "it begins outside");
    assert_eq!(guest.ledger.report(BASE + (guest.pages - 2) * PAGE, u64::MAX), 2 * PAGE, "it ends outside");
    assert_eq!(guest.resident_pages(), guest.pages - 4);
}

#[test]
fn a_memory_map_may_be_cut_differently_and_the_front_end_may_come_back() {
    let mut guest = Guest::new(4, Granularity::Auto);
    guest.inflate(700);
    assert_eq!(guest.release_all(), PAGE);
    guest.inflate(701);
    let whole = guest.regions().remove(0);
    let half = whole.len / 2;
    let upper = Region { guest: BASE + half, len: half, offset: half, ..whole.clone() };
    let lower = Region { len: half, ..whole };
    guest.ledger.set_regions(vec![upper.clone(), lower.clone()]);
    assert_eq!(guest.inflate(700), Noted::Unchanged);
    assert_eq!((guest.ledger.ballooned_bytes(), guest.ledger.released_bytes()), (2 * PAGE, PAGE));
    assert_eq!(guest.release_all(), PAGE);

    // Gone and back: nothing is touched before it is known whether it is the same guest.
    guest.inflate(702);
    guest.ledger.detach();
    guest.ledger.set_regions(vec![lower, upper]);
    assert_eq!(guest.release_all(), 0);
    guest.inflate(703);
    assert_eq!(guest.release_all(), 0);
    guest.ledger.confirm();
    assert_eq!(guest.release_all(), 2 * PAGE);
    guest.inflate(704);
    assert_eq!(guest.ledger.clear(), Ok(()));
    assert_eq!((guest.ledger.ballooned_bytes(), guest.release_all()), (0, 0));
    assert!(guest.is_filled(704));
}

/// What a guest and the host may do, to a page.
#[derive(Clone, Debug)]
enum Step {
    Inflate(u64, u64),
    Deflate(u64, u64),
    Write(u64, u64),
    Report(u64, u64),
    Complete,
    All,
    Again,
    Reboot,
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || (0..3 * BLOCK_PAGES as u64, prop_oneof![1u64..4, 1u64..600]);
    prop_oneof![
        6 => pages().prop_map(|(page, count)| Step::Inflate(page, count)),
        4 => pages().prop_map(|(page, count)| Step::Deflate(page, count)),
        3 => pages().prop_map(|(page, count)| Step::Write(page, count)),
        1 => pages().prop_map(|(page, count)| Step::Report(page, count)),
        2 => Just(Step::Complete),
        2 => Just(Step::All),
        1 => Just(Step::Again),
        1 => Just(Step::Reboot),
    ]
}

/// What is known of a page that was ever given.
#[derive(Clone, Copy, Debug, Default)]
struct Naive {
    ballooned: bool,
    /// It may have been given back since it was written to.
    lost: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Against a model that knows pages only: what is not in the balloon is never touched, what is given back was given,
    /// and in the end all that can be given back is.
    #[test]
    fn only_pages_in_the_balloon_are_given_back(steps in proptest::collection::vec(step(), 1..40), shift in 0u32..=10) {
        let unit = 1 << shift;
        let mut guest = Guest::new(3, Granularity::AtLeast(unit * PAGE));
        let mut model: BTreeMap<u64, Naive> = BTreeMap::new();
        let all = guest.pages;
        let clip = |page: u64, count: u64| page..(page + count).min(all);
        for step in steps {
            match step {
                Step::Inflate(page, count) => for page in clip(page, count) {
                    let was = std::mem::replace(&mut model.entry(page).or_default().ballooned, true);
                    let noted = guest.inflate(page);
                    prop_assert_eq!(noted, if was { Noted::Unchanged } else { Noted::Changed });
                    model.entry(page).or_default().lost = true;
                },
                Step::Deflate(page, count) => for page in clip(page, count) {
                    let was = std::mem::replace(&mut model.entry(page).or_default().ballooned, false);
                    let noted = guest.deflate(page);
                    prop_assert_eq!(noted, if was { Noted::Changed } else { Noted::Unchanged });
                },
                // A guest writes only to what it has.
                Step::Write(page, count) => for page in clip(page, count) {
                    let naive = model.entry(page).or_default();
                    if !naive.ballooned {
                        naive.lost = false;
                        guest.fill(page..page + 1);
                    }
                },
                Step::Report(page, count) => {
                    let range = clip(page, count);
                    if range.clone().all(|page| !model.get(&page).is_some_and(|naive| naive.ballooned)) {
                        guest.ledger.report(BASE + page * PAGE, (range.end - range.start) * PAGE);
                        range.for_each(|page| model.entry(page).or_default().lost = true);
                    }
                }
                Step::Complete => { guest.ledger.release(Urgency::Complete); }
                Step::All => {
                    guest.release_all();
                    prop_assert!(!guest.ledger.has_pending(Urgency::All));
                }
                Step::Again => guest.ledger.set_regions(guest.regions()),
                Step::Reboot => {
                    guest.ledger.clear().unwrap();
                    for naive in model.values_mut() {
                        naive.ballooned = false;
                    }
                }
            }
            let ballooned = model.values().filter(|naive| naive.ballooned).count() as u64;
            prop_assert_eq!(guest.ledger.ballooned_bytes(), ballooned * PAGE);
            prop_assert!(guest.ledger.released_bytes() + guest.ledger.pending_bytes() <= ballooned * PAGE);
        }
        guest.release_all();
        let ballooned = |page: u64| model.get(&page).is_some_and(|naive| naive.ballooned);
        let mut whole = 0;
        for first in (0..guest.pages).step_by(unit as usize) {
            let pages = first..(first + unit).min(guest.pages);
            let is_whole = pages.clone().all(ballooned) && pages.end == first + unit;
            whole += if is_whole { unit } else { 0 };
            for page in pages {
                if is_whole {
                    prop_assert!(!guest.is_filled(page), "page {} should be gone", page);
                } else if !model.get(&page).is_some_and(|naive| naive.lost) {
                    prop_assert!(guest.is_filled(page), "page {} is lost", page);
                }
            }
        }
        prop_assert_eq!(guest.ledger.released_bytes(), whole * PAGE);
    }
}

/// Without a promise to ask, a guest may use a page and say so at the same time as it gives the next one.
#[test]
fn what_was_given_back_is_not_given_back_again_unless_the_guest_asks_first() {
    let mut guest = Guest::new(1, Granularity::Auto);
    guest.ledger.set_told(false);
    guest.inflate(3);
    guest.inflate(5);
    assert_eq!(guest.release_all(), 2 * PAGE);
    guest.fill(3..4);
    guest.fill(5..6);
    guest.inflate(4);
    assert_eq!(guest.release_all(), PAGE);
    assert!(guest.is_filled(3) && !guest.is_filled(4) && guest.is_filled(5));
}

/// For the same reason, pieces are not waited for.
#[test]
fn a_piece_is_not_put_together_unless_the_guest_asks_first() {
    let mut guest = Guest::new(1, Granularity::AtLeast(64 << 10));
    guest.ledger.set_told(false);
    guest.inflate(0);
    assert_eq!(guest.release_all(), PAGE);
    guest.fill(0..1);
    for page in 1..16 {
        guest.inflate(page);
    }
    assert_eq!(guest.release_all(), 15 * PAGE);
    assert!(guest.is_filled(0));
}

#[test]
fn nothing_is_given_back_while_no_driver_runs() {
    let mut guest = Guest::new(1, Granularity::Auto);
    guest.inflate(3);
    guest.ledger.suspend();
    guest.ledger.set_regions(guest.regions());
    assert!(!guest.ledger.has_pending(Urgency::All));
    assert_eq!((guest.release_all(), guest.ledger.ballooned_bytes()), (0, PAGE));
    guest.ledger.confirm();
    assert_eq!(guest.release_all(), PAGE);
}
