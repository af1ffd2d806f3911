//! What a guest puts into its buffers, as values. Total: any bytes have a meaning, or none.

use crate::api::GuestStatistics;

/// Bytes of a request that are looked at: 16,384 page numbers. Linux sends 256, Windows 512 of twice the size.
pub const MAX_REQUEST: usize = 64 << 10;

/// The page numbers of a request to inflate or deflate (virtio 1.3 text, section 5.5.6).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Guest addresses divided by 4096.
    pub numbers: Vec<u64>,
    /// Page 0 may be meant as well.
    ///
    /// The text has numbers of 32 bits. Windows on 64 bits writes numbers of 64 bits, whose upper halves look like more
    /// pages with number 0. Giving page 0 to the host because of that would destroy what the guest has there; taking it
    /// back too often does no harm.
    pub maybe_zero: bool,
}

impl Pages {
    /// Reads the page numbers in `bytes`; `None` if there are none, or something else.
    pub fn parse(&mut self, bytes: &[u8]) -> Option<()> {
        self.numbers.clear();
        self.maybe_zero = false;
        if bytes.is_empty() || !bytes.len().is_multiple_of(4) {
            return None;
        }
        let numbers = bytes.as_chunks().0.iter().map(|bytes| u64::from(u32::from_le_bytes(*bytes)));
        self.numbers.extend(numbers);
        let (pairs, rest) = self.numbers.as_chunks::<2>();
        if rest.is_empty() && !pairs.is_empty() && pairs.iter().all(|[_, upper]| *upper == 0) {
            self.maybe_zero = true;
            let mut even = true;
            self.numbers.retain(|_| {
                even = !even;
                !even
            });
        }
        Some(())
    }
}

/// Bytes of one statistic.
const ENTRY: usize = 10;

/// Reads a buffer of statistics (virtio 1.3 text, sections 5.5.6.3 and 5.5.6.4). Tags that are not known are left out; the
/// last of several of a kind counts. Tags from 10 on are those of Linux, since 6.12.
pub fn statistics(bytes: &[u8]) -> GuestStatistics {
    let mut statistics = GuestStatistics::default();
    for entry in bytes.as_chunks::<ENTRY>().0 {
        let (tag, value) = entry.split_at(2);
        let value = value.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let field = match u16::from_le_bytes([tag[0], tag[1]]) {
            0 => &mut statistics.swap_in,
            1 => &mut statistics.swap_out,
            2 => &mut statistics.major_faults,
            3 => &mut statistics.minor_faults,
            4 => &mut statistics.free_memory,
            5 => &mut statistics.total_memory,
            6 => &mut statistics.available_memory,
            7 => &mut statistics.disk_caches,
            8 => &mut statistics.hugetlb_allocations,
            9 => &mut statistics.hugetlb_failures,
            10 => &mut statistics.oom_kill,
            11 => &mut statistics.alloc_stall,
            12 => &mut statistics.async_scan,
            13 => &mut statistics.direct_scan,
            14 => &mut statistics.async_reclaim,
            15 => &mut statistics.direct_reclaim,
            _ => continue,
        };
        *field = Some(value);
    }
    statistics
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(words: &[u32]) -> Option<Pages> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut pages = Pages::default();
        pages.parse(&bytes).map(|()| pages)
    }

    #[test]
    fn numbers_of_both_sizes_are_read() {
        let pages = |numbers: &[u64], maybe_zero| Some(Pages { numbers: numbers.to_vec(), maybe_zero });
        assert_eq!(parse(&[7, 8, 9]), pages(&[7, 8, 9], false));
        assert_eq!(parse(&[7, 8]), pages(&[7, 8], false));
        assert_eq!(parse(&[7, 0, 8, 0]), pages(&[7, 8], true));
        assert_eq!(parse(&[7, 0, 8, 1]), pages(&[7, 0, 8, 1], false));
        assert_eq!(parse(&[7]), pages(&[7], false));
        assert_eq!(parse(&[7, 0]), pages(&[7], true));
        assert_eq!(parse(&[]), None);
        assert_eq!(Pages::default().parse(&[0; 6]), None);
    }

    #[test]
    fn statistics_are_read_by_their_tags() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 1u64 << 33), (10, 3), (65_535, 9), (4, u64::MAX)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.push(1);
        let expected =
            GuestStatistics { free_memory: Some(u64::MAX), oom_kill: Some(3), ..GuestStatistics::default() };
        assert_eq!(statistics(&bytes), expected);
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            statistics(&bytes);
            let mut pages = Pages::default();
            prop_assert_eq!(pages.parse(&bytes).is_some(), !bytes.is_empty() && bytes.len().is_multiple_of(4));
            prop_assert!(pages.numbers.len() <= bytes.len() / 4);
        }
    }
}
