use proptest::prelude::*;

use super::*;
use crate::manage::model::{Host, Usage};

const GIB: u64 = 1 << 30;

/// A guest of 8 GiB that has this much, and uses this much of it, GiB.
fn guest(name: &str, held: f64, used: f64) -> Guest {
    let bytes = |gib: f64| (gib * GIB as f64) as u64;
    Guest {
        name: name.into(),
        memory: 8 * GIB,
        min: GIB,
        max: 8 * GIB,
        shares: 1000,
        balloon: 8 * GIB - bytes(held),
        target: 8 * GIB - bytes(held),
        resident: bytes(held),
        usage: Some(Usage { available: bytes(held) - bytes(used), ..Usage::default() }),
        ..Guest::default()
    }
}

/// A host of 100 GiB with these guests, and so much available.
fn snapshot(now: f64, available: f64, guests: Vec<Guest>) -> Snapshot {
    let host = Host { total: 100 * GIB, available: (available * GIB as f64) as u64, ..Host::default() };
    Snapshot { now, host, guests, reserved: 0 }
}

fn builtin() -> Builtin {
    Builtin::new(Parameters::default())
}

/// What others on the host use if this much is the budget of all these guests.
fn with_budget(budget: f64, guests: Vec<Guest>) -> Snapshot {
    let resident: u64 = guests.iter().map(|guest| guest.resident).sum();
    let others = 95.0 - budget;
    snapshot(0.0, 100.0 - others - resident as f64 / GIB as f64, guests)
}

fn gib(wishes: &Wishes, name: &str) -> f64 {
    wishes[name] as f64 / GIB as f64
}

#[test]
fn nothing_is_taken_from_anybody_while_the_host_is_comfortable() {
    let mut policy = builtin();
    let wishes = policy.wishes(&snapshot(0.0, 50.0, vec![guest("a", 8.0, 1.0), guest("b", 3.0, 1.0)]));
    assert_eq!(policy.assessment().mode, Mode::Comfortable);
    assert_eq!(wishes, Wishes::from([("a".into(), 8 * GIB), ("b".into(), 8 * GIB)]));
}

#[test]
fn no_more_is_given_back_than_keeps_the_host_comfortable() {
    let wishes = builtin().wishes(&snapshot(0.0, 17.0, vec![guest("a", 1.0, 0.5), guest("b", 1.0, 0.5)]));
    assert!((gib(&wishes, "a") - 2.0).abs() < 0.01 && (gib(&wishes, "b") - 2.0).abs() < 0.01, "{wishes:?}");
}

#[test]
fn what_a_starting_machine_was_promised_is_not_available() {
    let mut policy = builtin();
    policy.wishes(&Snapshot { reserved: 40 * GIB, ..snapshot(0.0, 50.0, vec![guest("a", 8.0, 1.0)]) });
    assert_ne!(policy.assessment().mode, Mode::Comfortable);
}

#[test]
fn plenty_is_wishes_and_the_rest_by_shares() {
    let mut policy = builtin();
    let mut big = guest("b", 4.0, 2.0);
    big.shares = 3000;
    let wishes = policy.wishes(&with_budget(10.0, vec![guest("a", 4.0, 2.0), big]));
    assert_eq!(policy.assessment().mode, Mode::Plenty);
    // 2 * 1.25 + 0.125 each, and 4.75 are left.
    assert!((gib(&wishes, "a") - (2.625 + 4.75 / 4.0)).abs() < 0.01, "{wishes:?}");
    assert!((gib(&wishes, "b") - (2.625 + 4.75 * 3.0 / 4.0)).abs() < 0.01, "{wishes:?}");
}

#[test]
fn peaks_count_only_where_there_is_enough() {
    let mut policy = builtin();
    policy.wishes(&with_budget(10.0, vec![guest("a", 7.0, 6.0), guest("b", 2.0, 1.0)]));
    // The budget of 5 is enough for 1.375 each, but not for what the first wished a moment ago.
    let mut later = with_budget(5.0, vec![guest("a", 4.0, 1.0), guest("b", 2.0, 1.0)]);
    later.now = 1.0;
    let wishes = policy.wishes(&later);
    assert_eq!(policy.assessment().mode, Mode::Tight);
    assert!((gib(&wishes, "a") - (5.0 - 1.375)).abs() < 0.1, "{wishes:?}");
    assert!((gib(&wishes, "b") - 1.375).abs() < 0.1, "{wishes:?}");
}

#[test]
fn scarcity_is_divided_by_shares() {
    let mut policy = builtin();
    let mut important = guest("a", 3.0, 3.0);
    important.shares = 3000;
    let wishes = policy.wishes(&with_budget(4.0, vec![important, guest("b", 3.0, 3.0)]));
    assert_eq!(policy.assessment().mode, Mode::Scarce);
    assert!((gib(&wishes, "a") - 3.0).abs() < 0.01 && (gib(&wishes, "b") - 1.0).abs() < 0.01, "{wishes:?}");
    assert_eq!(policy.assessment().overcommitted() / (GIB / 100), 375);
}

#[test]
fn what_is_used_comes_before_headroom() {
    // By shares alone it would be 1.5 for each of the small ones, and 3.5 for the other.
    let guests = vec![guest("a", 4.0, 3.7), guest("b", 2.0, 1.1), guest("c", 2.0, 1.1)];
    let mut policy = builtin();
    let wishes = policy.wishes(&with_budget(6.5, guests));
    assert_eq!(policy.assessment().mode, Mode::Scarce);
    assert!(gib(&wishes, "a") > 3.7 && gib(&wishes, "b") > 1.1 && gib(&wishes, "c") > 1.1, "{wishes:?}");
}

#[test]
fn idle_memory_is_taxed_on_demand() {
    let guests = vec![guest("busy", 4.4, 4.2), guest("idle", 4.0, 2.8)];
    let idle = |tau: f64| {
        let mut policy = Builtin::new(Parameters { tau, ..Parameters::default() });
        // Less than what is used: shares decide.
        gib(&policy.wishes(&with_budget(6.0, guests.clone())), "idle")
    };
    assert!((idle(0.0) - 3.0).abs() < 0.01);
    // An idle byte costs four: a byte of the idle guest costs 1.9, and one of the other 1.14.
    assert!((idle(0.75) - 6.0 * 1.136 / (1.136 + 1.9)).abs() < 0.01, "{}", idle(0.75));
}

#[test]
fn guests_that_say_nothing_are_not_mentioned() {
    let mut silent = guest("silent", 4.0, 1.0);
    silent.usage = None;
    let mut inactive = guest("inactive", 4.0, 1.0);
    inactive.inactive = true;
    let wishes = builtin().wishes(&with_budget(4.0, vec![guest("a", 4.0, 1.0), silent, inactive]));
    assert_eq!(wishes.keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn guests_that_are_gone_are_forgotten() {
    let mut policy = builtin();
    policy.wishes(&with_budget(10.0, vec![guest("a", 7.0, 6.0)]));
    policy.wishes(&with_budget(10.0, vec![]));
    assert!(policy.demands.is_empty());
    policy.wishes(&with_budget(10.0, vec![guest("a", 7.0, 1.0)]));
    assert_eq!(policy.assessment().needs["a"].wish, policy.assessment().needs["a"].claim);
}

fn guests() -> impl Strategy<Value = Vec<Guest>> {
    let one = (0.3..8.0, 0.0..1.0, 1u32..10_000, 0.0..8.0, 0.0..1e8).prop_map(
        |(held, used, shares, min, swap_in)| {
            let mut guest = guest("", held, held * used);
            guest.shares = shares;
            guest.min = (min * GIB as f64) as u64;
            guest.usage.as_mut().unwrap().swap_in = swap_in;
            guest
        },
    );
    prop::collection::vec(one, 0..8).prop_map(|mut guests| {
        for (index, guest) in guests.iter_mut().enumerate() {
            guest.name = format!("guest{index}");
        }
        guests
    })
}

proptest! {
    #[test]
    fn wishes_are_within_bounds_and_budget(guests in guests(), available in 0.0..14.0) {
        let mut policy = builtin();
        let snapshot = snapshot(0.0, available, guests);
        let wishes = policy.wishes(&snapshot);
        prop_assert_eq!(wishes.len(), snapshot.guests.len());
        for guest in &snapshot.guests {
            prop_assert!((floor(guest)..=ceiling(guest)).contains(&wishes[&guest.name]));
        }
        let floors: u64 = snapshot.guests.iter().map(floor).sum();
        let sum: u64 = wishes.values().sum();
        prop_assert!(sum <= policy.assessment().budget.max(floors));
    }

    #[test]
    fn order_of_guests_means_nothing(guests in guests(), available in 0.0..60.0) {
        let mut turned = guests.clone();
        turned.reverse();
        prop_assert_eq!(
            builtin().wishes(&snapshot(0.0, available, guests)),
            builtin().wishes(&snapshot(0.0, available, turned))
        );
    }
}
