//! What the numbers of a snapshot mean: what guests have and use, and what there is for all of them.
#![expect(clippy::cast_precision_loss, reason = "memory is far from having 2^52 bytes")]

use super::config::Parameters;
use super::model::{Guest, Host, Snapshot};

/// No guest is left less than this, whatever its minimum: a Linux kernel and its first programs need it.
pub const LEAST: u64 = 64 << 20;
/// The unit of balloons, bytes.
pub const PAGE: u64 = 4096;
/// With so much of the host's memory available, pressure is not for want of it, percent.
const MOST_PERCENT: f64 = 50.0;
/// Less of the host's memory available than this is an emergency of the host, percent.
const CRITICAL_PERCENT: f64 = 2.5;
/// More time than this in which nothing got on for want of memory is one too, percent (PSI, `full avg10`).
const CRITICAL_PSI: f64 = 5.0;
/// And more than this written to the host's swap, bytes a second.
const CRITICAL_SWAP_OUT: f64 = (8 << 20) as f64;

/// So many percent of a size.
pub fn percent(size: u64, percent: f64) -> u64 {
    (size as f64 * percent / 100.0) as u64
}

/// What a guest has at the moment: its memory without what is in the balloon.
pub fn held(guest: &Guest) -> u64 {
    guest.memory.saturating_sub(guest.balloon)
}

/// What a guest cannot do without at the moment, its kernel's own memory included; `None` if it does not say.
///
/// `MemTotal` is not asked: it shrinks with the balloon or does not, as deflate-on-oom was negotiated.
pub fn used(guest: &Guest) -> Option<u64> {
    let usage = guest.usage?;
    let then = guest.memory.saturating_sub(usage.balloon.unwrap_or(guest.balloon));
    Some(then.saturating_sub(usage.available))
}

/// More than this a guest never gets.
pub fn ceiling(guest: &Guest) -> u64 {
    guest.max.min(guest.memory)
}

/// Less than this a guest is never left.
pub fn floor(guest: &Guest) -> u64 {
    guest.min.max(LEAST).min(ceiling(guest))
}

/// Less than this a guest is not left unless memory is [`short`]: what it uses and 5 %.
pub fn comfortable_floor(guest: &Guest) -> u64 {
    let used = used(guest).unwrap_or(0);
    percent(used, 105.0).max(floor(guest)).min(ceiling(guest))
}

/// What a guest should have before any other gets headroom: what it uses and 5 %, and the cushion.
pub fn essential(guest: &Guest, parameters: &Parameters) -> u64 {
    comfortable_floor(guest).saturating_add(parameters.cushion).min(ceiling(guest))
}

/// Whether there is not even enough for what is essential. Then shares decide, and only minima are sure.
pub fn short(guests: &[&Guest], budget: u64, parameters: &Parameters) -> bool {
    let essential: u64 =
        guests.iter().filter(|guest| managed(guest)).map(|guest| essential(guest, parameters)).sum();
    essential > budget
}

/// Whether memory can be taken from a guest: its balloon obeys, and it says what it uses.
pub fn managed(guest: &Guest) -> bool {
    guest.memory > 0 && !guest.inactive && guest.usage.is_some()
}

/// What is available on the host and not promised to virtual machines that are about to start.
pub fn available(snapshot: &Snapshot) -> u64 {
    snapshot.host.available.saturating_sub(snapshot.reserved)
}

/// What all managed guests can have together: the host's memory without what everything else uses (guests that cannot
/// be managed too), what is promised to new ones, and the reserve.
pub fn budget(snapshot: &Snapshot, parameters: &Parameters) -> u64 {
    let host = &snapshot.host;
    let resident: u64 =
        snapshot.guests.iter().filter(|guest| managed(guest)).map(|guest| guest.resident).sum();
    let others = host.total.saturating_sub(host.available).saturating_sub(resident);
    host.total
        .saturating_sub(others)
        .saturating_sub(snapshot.reserved)
        .saturating_sub(percent(host.total, parameters.reserve_percent))
}

/// Whether the host has memory to spare, so that nothing need be taken from guests.
///
/// Where most of the memory is available, tasks do not wait because of guests: some other cgroup is at its limit.
pub fn comfortable(snapshot: &Snapshot, parameters: &Parameters) -> bool {
    let (host, free) = (&snapshot.host, available(snapshot));
    free >= percent(host.total, parameters.comfortable_percent)
        && (host.psi_some < parameters.comfortable_psi || free >= percent(host.total, MOST_PERCENT))
}

/// Whether the host is about to run out of memory. It is until the reserve is there again.
///
/// Pressure and swapping with a lot of memory available are not for want of memory that guests could give: some other
/// cgroup is at its limit.
pub fn critical(host: &Host, was: bool, parameters: &Parameters) -> bool {
    let share = 100.0 * host.available as f64 / host.total.max(1) as f64;
    let least = if was { parameters.reserve_percent.max(CRITICAL_PERCENT) * 0.8 } else { CRITICAL_PERCENT };
    let calm = if was { 0.5 } else { 1.0 };
    share < least
        || share < parameters.comfortable_percent
            && (host.psi_full > calm * CRITICAL_PSI || host.swap_out > calm * CRITICAL_SWAP_OUT)
}

/// What one of several takers can have.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Taker {
    /// It gets this in any case.
    pub low: u64,
    /// It gets no more than this.
    pub high: u64,
    /// Between these, it gets in proportion to this.
    pub weight: f64,
}

/// Divides an amount among takers in proportion to their weights, within their bounds (water-filling).
///
/// All of it is given away unless all takers have their `high`, and no more than that unless their `low` demand it. The
/// sum does not depend on the order of the takers by more than the rounding of floating point: callers that want the
/// very same result sort them.
pub fn divide(amount: u64, takers: &[Taker]) -> Vec<u64> {
    let at = |level: f64| -> Vec<u64> {
        takers
            .iter()
            .map(|taker| ((level * taker.weight) as u64).clamp(taker.low, taker.high.max(taker.low)))
            .collect()
    };
    let total = |parts: &[u64]| parts.iter().fold(0u64, |sum, part| sum.saturating_add(*part));
    // The least level at which every taker with a weight has all that it can have.
    let all = takers
        .iter()
        .filter(|taker| taker.weight > 0.0)
        .map(|taker| taker.high as f64 / taker.weight)
        .fold(0.0, f64::max)
        * 1.000_001;
    let full = at(all);
    if total(&full) <= amount {
        return full;
    }
    let (mut low, mut high) = (0.0, all);
    // Each step halves what is open; a byte of 2^64 is open after 64.
    for _ in 0..64 {
        let middle = f64::midpoint(low, high);
        if total(&at(middle)) <= amount {
            low = middle;
        } else {
            high = middle;
        }
    }
    at(low)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::model::Usage;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn taker(low: u64, high: u64, weight: f64) -> Taker {
        Taker { low, high, weight }
    }

    #[test]
    fn shares_divide() {
        assert_eq!(divide(400, &[taker(0, 1000, 1.0), taker(0, 1000, 3.0)]), [100, 300]);
        // What one cannot take, the others get.
        assert_eq!(divide(400, &[taker(0, 50, 1.0), taker(0, 1000, 1.0)]), [50, 350]);
        // What one must have, the others do without.
        assert_eq!(divide(400, &[taker(350, 1000, 1.0), taker(0, 1000, 1.0)]), [350, 50]);
        // Enough for all.
        assert_eq!(divide(5000, &[taker(0, 50, 1.0), taker(10, 1000, 2.0)]), [50, 1000]);
        // Not enough for what must be.
        assert_eq!(divide(10, &[taker(20, 50, 1.0), taker(30, 1000, 2.0)]), [20, 30]);
        assert_eq!(divide(10, &[]), [0; 0]);
    }

    proptest! {
        #[test]
        fn a_division_is_within_its_bounds_and_complete(
            amount in 0..64 * GIB,
            takers in prop::collection::vec((0..8 * GIB, 0..8 * GIB, 1u32..10_000), 0..12),
        ) {
            let takers: Vec<_> = takers
                .into_iter()
                .map(|(low, more, weight)| taker(low, low + more, f64::from(weight)))
                .collect();
            let parts = divide(amount, &takers);
            for (part, taker) in parts.iter().zip(&takers) {
                prop_assert!((taker.low..=taker.high).contains(part));
            }
            let given: u64 = parts.iter().sum();
            let lows: u64 = takers.iter().map(|taker| taker.low).sum();
            let highs: u64 = takers.iter().map(|taker| taker.high).sum();
            prop_assert!(given <= amount.max(lows));
            // Rounding loses some bytes for each taker.
            prop_assert!(given + 100_000 >= amount.clamp(lows, highs), "{} of {}", given, amount);
        }
    }

    #[test]
    fn a_guest_uses_what_is_not_available() {
        let usage = Usage { available: GIB, ..Usage::default() };
        let guest =
            Guest { memory: 4 * GIB, max: 4 * GIB, balloon: GIB, usage: Some(usage), ..Guest::default() };
        assert_eq!(used(&guest), Some(2 * GIB));
        // Its balloon has grown since.
        let grown =
            Guest { balloon: 2 * GIB, usage: Some(Usage { balloon: Some(GIB), ..usage }), ..guest.clone() };
        assert_eq!(used(&grown), Some(2 * GIB));
        assert_eq!(floor(&guest), LEAST);
        assert_eq!(comfortable_floor(&guest), percent(2 * GIB, 105.0));
        assert_eq!(ceiling(&Guest { max: u64::MAX, ..guest.clone() }), 4 * GIB);
        // A minimum that is more than the guest has is all that it has.
        assert_eq!(floor(&Guest { min: 9 * GIB, ..guest }), 4 * GIB);
    }

    #[test]
    fn the_budget_is_what_others_leave() {
        let guest = |resident, inactive| Guest {
            memory: 8 * GIB,
            resident,
            inactive,
            usage: Some(Usage::default()),
            ..Guest::default()
        };
        let snapshot = Snapshot {
            host: Host { total: 100 * GIB, available: 80 * GIB, ..Host::default() },
            guests: vec![guest(6 * GIB, false), guest(4 * GIB, true)],
            reserved: 3 * GIB,
            ..Snapshot::default()
        };
        // 20 GiB are used, 6 of them by the one managed guest.
        assert_eq!(budget(&snapshot, &Parameters::default()), (100 - 14 - 3 - 5) * GIB);
    }

    #[test]
    fn an_emergency_lasts_until_the_reserve_is_back() {
        let host = |available| Host { total: 100 * GIB, available: available * GIB, ..Host::default() };
        let parameters = Parameters::default();
        assert!(!critical(&host(3), false, &parameters));
        assert!(critical(&host(2), false, &parameters));
        assert!(critical(&host(3), true, &parameters));
        assert!(!critical(&host(5), true, &parameters));
        // Pressure counts only where memory is short.
        assert!(!critical(&Host { psi_full: 50.0, ..host(50) }, false, &parameters));
        assert!(critical(&Host { psi_full: 50.0, ..host(10) }, false, &parameters));
        assert!(critical(&Host { swap_out: 1e8, ..host(10) }, false, &parameters));
    }
}
