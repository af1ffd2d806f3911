//! A set of the pages of one block, as bits.

use std::ops::Range;

/// Bytes of a page, the unit of the balloon (virtio 1.3 text, section 5.5.6: always 4096).
pub const PAGE: u64 = 4096;

/// Pages of a block: what one bit set covers, and one huge page of x86-64 and of aarch64.
pub const BLOCK_PAGES: usize = 512;

/// Bytes of a block.
pub const BLOCK: u64 = PAGE * BLOCK_PAGES as u64;

const WORD: usize = u64::BITS as usize;

/// Some of the pages of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bits([u64; BLOCK_PAGES / WORD]);

impl Bits {
    /// All pages.
    pub const ALL: Self = Self([u64::MAX; BLOCK_PAGES / WORD]);

    /// Whether `page` is in the set.
    pub fn contains(&self, page: usize) -> bool {
        self.0[page / WORD] >> (page % WORD) & 1 == 1
    }

    /// Adds `page`; `false` if it was there.
    pub fn insert(&mut self, page: usize) -> bool {
        let is_new = !self.contains(page);
        self.0[page / WORD] |= 1 << (page % WORD);
        is_new
    }

    /// Takes `page` out; `false` if it was not there.
    pub fn remove(&mut self, page: usize) -> bool {
        let was_there = self.contains(page);
        self.0[page / WORD] &= !(1 << (page % WORD));
        was_there
    }

    /// Adds all of `pages`.
    pub fn insert_range(&mut self, pages: Range<usize>) {
        for (index, word) in self.0.iter_mut().enumerate() {
            *word |= word_mask(index, &pages);
        }
    }

    /// Takes all of `pages` out, and returns how many of them were there.
    pub fn remove_range(&mut self, pages: Range<usize>) -> usize {
        let mut removed = 0;
        for (index, word) in self.0.iter_mut().enumerate() {
            let mask = word_mask(index, &pages);
            removed += (*word & mask).count_ones() as usize;
            *word &= !mask;
        }
        removed
    }

    /// Whether all of `pages` are in the set.
    pub fn contains_all(&self, pages: &Range<usize>) -> bool {
        self.0.iter().enumerate().all(|(index, word)| !word & word_mask(index, pages) == 0)
    }

    /// Pages in the set.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it is the whole block.
    pub fn is_full(&self) -> bool {
        *self == Self::ALL
    }

    /// The pages that are in this set and not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|index| self.0[index] & !other.0[index]))
    }

    /// The groups of `unit` pages, a power of two, that are in the set as a whole.
    #[must_use]
    pub fn whole_units(&self, unit: usize) -> Self {
        if unit == 1 {
            return *self;
        }
        let mut whole = Self::default();
        for first in (0..BLOCK_PAGES).step_by(unit) {
            let pages = first..first + unit;
            if self.contains_all(&pages) {
                whole.insert_range(pages);
            }
        }
        whole
    }

    /// The runs of neighbours in the set, from the first to the last, each as long as possible.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let first = self.next(from, true)?;
            let end = self.next(first, false).unwrap_or(BLOCK_PAGES);
            from = end;
            Some(first..end)
        })
    }

    /// The first page from `from` on that is in the set, or is not.
    fn next(&self, from: usize, present: bool) -> Option<usize> {
        let mut index = from / WORD;
        let mut mask = u64::MAX.checked_shl((from % WORD) as u32).unwrap_or(0);
        while index < self.0.len() {
            let word = if present { self.0[index] } else { !self.0[index] } & mask;
            if word != 0 {
                return Some(index * WORD + word.trailing_zeros() as usize);
            }
            mask = u64::MAX;
            index += 1;
        }
        None
    }
}

/// The bits of word `index` that belong to `pages`.
fn word_mask(index: usize, pages: &Range<usize>) -> u64 {
    let first = index * WORD;
    let start = pages.start.clamp(first, first + WORD) - first;
    let end = pages.end.clamp(first, first + WORD) - first;
    let below = |bit: usize| if bit == WORD { u64::MAX } else { (1 << bit) - 1 };
    below(end) & !below(start)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn bits(pages: &BTreeSet<usize>) -> Bits {
        let mut bits = Bits::default();
        for page in pages {
            assert!(bits.insert(*page));
        }
        bits
    }

    fn pages() -> impl Strategy<Value = BTreeSet<usize>> {
        // Runs as well as single pages: few choices for the start make neighbours.
        proptest::collection::vec((0..BLOCK_PAGES, 1usize..70), 0..12).prop_map(|runs| {
            runs.into_iter().flat_map(|(first, len)| first..(first + len).min(BLOCK_PAGES)).collect()
        })
    }

    proptest! {
        #[test]
        fn it_is_a_set(model in pages(), first in 0..=BLOCK_PAGES, len in 0..=BLOCK_PAGES) {
            let set = bits(&model);
            let range = first..(first + len).min(BLOCK_PAGES);
            for page in 0..BLOCK_PAGES {
                prop_assert_eq!(set.contains(page), model.contains(&page));
            }
            prop_assert_eq!(set.len(), model.len());
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert_eq!(set.contains_all(&range), range.clone().all(|page| model.contains(&page)));
            let mut less = set;
            prop_assert_eq!(less.remove_range(range.clone()), model.range(range.clone()).count());
            prop_assert_eq!(less, bits(&model.iter().copied().filter(|page| !range.contains(page)).collect()));
            prop_assert_eq!(set.without(&less), bits(&model.range(range.clone()).copied().collect()));
            let mut more = set;
            more.insert_range(range.clone());
            prop_assert_eq!(more, bits(&model.iter().copied().chain(range).collect()));
        }

        #[test]
        fn runs_are_maximal_and_complete(model in pages()) {
            let set = bits(&model);
            let runs: Vec<_> = set.runs().collect();
            prop_assert_eq!(runs.iter().cloned().flatten().collect::<BTreeSet<_>>(), model);
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "neighbours are one run");
            }
        }

        #[test]
        fn units_are_whole_or_not_there(model in pages(), shift in 0u32..=9) {
            let unit = 1 << shift;
            let whole = bits(&model).whole_units(unit);
            for page in 0..BLOCK_PAGES {
                let first = page / unit * unit;
                prop_assert_eq!(whole.contains(page), (first..first + unit).all(|page| model.contains(&page)));
            }
        }
    }
}
