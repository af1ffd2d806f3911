#![expect(clippy::cast_precision_loss, reason = "memory is far from having 2^52 bytes")]

use proptest::prelude::*;

use super::*;
use crate::manage::model::{Host, Policy, Usage};
use crate::manage::policy::Builtin;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// A guest of 8 GiB with this balloon, which uses this much. MiB.
fn guest(name: &str, balloon: u64, used: u64) -> Guest {
    let memory = 8 * GIB;
    let available = (memory - balloon * MIB).saturating_sub(used * MIB);
    Guest {
        name: name.into(),
        memory,
        min: GIB,
        max: memory,
        shares: 1000,
        balloon: balloon * MIB,
        target: balloon * MIB,
        resident: memory - balloon * MIB,
        usage: Some(Usage { available, ..Usage::default() }),
        ..Guest::default()
    }
}

/// A host of 100 GiB with these guests, and so much available, MiB.
fn snapshot(available: u64, guests: Vec<Guest>) -> Snapshot {
    let host = Host { total: 100 * GIB, available: available * MIB, ..Host::default() };
    Snapshot { now: 0.0, host, guests, reserved: 0 }
}

fn wish(name: &str, mib: u64) -> Wishes {
    Wishes::from([(name.into(), mib * MIB)])
}

/// The orders, as names and MiB, that fresh rails give.
fn orders(snapshot: &Snapshot, wishes: &Wishes) -> Vec<(String, u64, Why)> {
    orders_of(&mut Rails::default(), snapshot, wishes)
}

fn orders_of(rails: &mut Rails, snapshot: &Snapshot, wishes: &Wishes) -> Vec<(String, u64, Why)> {
    let orders = rails.apply(snapshot, wishes, &Parameters::default()).orders;
    orders.into_iter().map(|order| (order.guest, order.balloon_bytes / MIB, order.why)).collect()
}

fn order(name: &str, mib: u64, why: Why) -> Vec<(String, u64, Why)> {
    vec![(name.into(), mib, why)]
}

#[test]
fn balloons_grow_slowly_and_shrink_at_once() {
    let snapshot = snapshot(50_000, vec![guest("a", 4096, 1000)]);
    // 5 % a second; rails that begin take a second and a half for granted.
    assert_eq!(orders(&snapshot, &wish("a", 2048)), order("a", 4096 + 614, Why::Take));
    assert_eq!(orders(&snapshot, &wish("a", 8192)), order("a", 0, Why::Give));
}

#[test]
fn balloons_grow_faster_from_free_memory() {
    let mut rich = guest("a", 4096, 100);
    rich.usage.as_mut().unwrap().free = 2000 * MIB;
    assert_eq!(orders(&snapshot(50_000, vec![rich]), &wish("a", 2048)), order("a", 5096, Why::Take));
}

#[test]
fn balloons_grow_fast_when_the_host_is_critical() {
    let snapshot = snapshot(2_000, vec![guest("a", 0, 1000)]);
    assert_eq!(orders(&snapshot, &wish("a", 2048)), order("a", 3072, Why::Take));
    let outcome = Rails::default().apply(&snapshot, &Wishes::new(), &Parameters::default());
    assert_eq!(outcome.events, [Event::HostCritical]);
}

#[test]
fn small_changes_are_left_out() {
    let snapshot = snapshot(50_000, vec![guest("a", 4096, 1000)]);
    assert_eq!(orders(&snapshot, &wish("a", 4096 + 15)), []);
    assert_eq!(orders(&snapshot, &wish("a", 4096 + 16)), order("a", 4096 - 16, Why::Give));
    assert_eq!(orders(&snapshot, &wish("a", 4096 - 80)), []);
    assert_eq!(orders(&snapshot, &wish("a", 4096 - 82)), order("a", 4096 + 82, Why::Take));
    // But nothing is left of a balloon for good.
    let snapshot = self::snapshot(50_000, vec![guest("a", 5, 1000)]);
    assert_eq!(orders(&snapshot, &wish("a", 8192)), order("a", 0, Why::Give));
}

#[test]
fn bounds_are_kept() {
    // In ten steps of 5 % and more, whatever the policy wants.
    let mut snapshot = snapshot(50_000, vec![guest("a", 0, 2000)]);
    let mut rails = Rails::default();
    for now in 0..30 {
        snapshot.now = f64::from(now);
        for order in rails.apply(&snapshot, &wish("a", 0), &Parameters::default()).orders {
            let used = snapshot.guests[0].usage.unwrap();
            let taken = order.balloon_bytes - snapshot.guests[0].balloon;
            snapshot.guests[0].usage = Some(Usage { available: used.available - taken, ..used });
            snapshot.guests[0].balloon = order.balloon_bytes;
            snapshot.guests[0].target = order.balloon_bytes;
        }
    }
    // What it uses and 5 %; the last step is not worth it.
    let left = (snapshot.guests[0].memory - snapshot.guests[0].balloon) / MIB;
    assert!((2100..2200).contains(&left), "{left}");

    let mut limited = guest("a", 4096, 1000);
    limited.max = 5 * GIB;
    assert_eq!(
        orders(&self::snapshot(50_000, vec![limited.clone()]), &wish("a", 8192)),
        order("a", 3 * 1024, Why::Give)
    );
    // Its maximum counts even if the policy says nothing.
    limited.max = 3 * GIB;
    assert_eq!(
        orders(&self::snapshot(50_000, vec![limited]), &Wishes::new()),
        order("a", 4096 + 614, Why::Take)
    );
}

#[test]
fn the_minimum_is_due_at_once() {
    // The host has nothing.
    let mut poor = guest("a", 7680, 100);
    poor.min = 2 * GIB;
    let orders = orders(&snapshot(0, vec![poor, guest("b", 0, 8000)]), &Wishes::new());
    assert_eq!(orders[0], ("a".into(), 6 * 1024, Why::Give));
}

#[test]
fn donors_come_first() {
    // There is nothing but the reserve. One guest should give 2 GiB to the other.
    let wishes = Wishes::from([("a".into(), 4 * GIB), ("b".into(), 6 * GIB)]);
    let mut snapshot = snapshot(5 * 1024, vec![guest("a", 2048, 1000), guest("b", 4096, 3000)]);
    let mut rails = Rails::default();
    assert_eq!(orders_of(&mut rails, &snapshot, &wishes), order("a", 2048 + 614, Why::Take));
    // What has come in is given.
    snapshot.now = 1.0;
    snapshot.guests[0].target = (2048 + 614) * MIB;
    snapshot.guests[0].balloon = (2048 + 300) * MIB;
    snapshot.guests[0].resident -= 300 * MIB;
    snapshot.guests[0].usage.as_mut().unwrap().available -= 300 * MIB;
    snapshot.host.available += 300 * MIB;
    let orders = orders_of(&mut rails, &snapshot, &wishes);
    assert_eq!(orders[1], ("b".into(), 4096 - 300, Why::Give), "{orders:?}");
    // What the host has it need not wait for.
    snapshot.host.available = 50 * GIB;
    let orders = self::orders(&snapshot, &wishes);
    assert_eq!(orders[1], ("b".into(), 2048, Why::Give), "{orders:?}");
}

#[test]
fn what_was_promised_is_not_promised_again() {
    // 1 GiB is there, and was promised to the first, which has not taken it yet.
    let mut slow = guest("a", 4096, 1000);
    slow.target = 3072 * MIB;
    let snapshot = snapshot(6 * 1024, vec![slow, guest("b", 4096, 1000)]);
    assert_eq!(orders(&snapshot, &wish("b", 8192)), []);
}

#[test]
fn memory_for_new_machines_is_kept() {
    let mut snapshot = snapshot(50 * 1024, vec![guest("a", 4096, 1000)]);
    snapshot.reserved = 45 * GIB;
    assert_eq!(orders(&snapshot, &wish("a", 8192)), []);
}

#[test]
fn a_guest_out_of_memory_gets_some_at_once() {
    let snapshot = snapshot(50 * 1024, vec![guest("a", 4096, 4000)]);
    let mut rails = Rails::default();
    let outcome = rails.apply(&snapshot, &Wishes::new(), &Parameters::default());
    assert_eq!(outcome.events, [Event::GuestEmergency { guest: "a".into() }]);
    assert_eq!(outcome.orders[0].balloon_bytes, 3072 * MIB);
    assert_eq!(outcome.orders[0].why, Why::Emergency);
    // It is said once.
    assert_eq!(rails.apply(&snapshot, &Wishes::new(), &Parameters::default()).events, []);
    // So does one that kills its processes.
    let mut kills = snapshot.clone();
    kills.guests[0].usage = Some(Usage { available: GIB, oom_kills: 1, ..Usage::default() });
    assert_eq!(orders(&kills, &Wishes::new()), order("a", 3072, Why::Emergency));
    // And one that helps itself.
    let mut rails = Rails::default();
    let mut helps = self::snapshot(50 * 1024, vec![guest("a", 4096, 1000)]);
    rails.apply(&helps, &Wishes::new(), &Parameters::default());
    helps.guests[0].balloon = 4000 * MIB;
    assert_eq!(orders_of(&mut rails, &helps, &Wishes::new()), order("a", 3000, Why::Emergency));
}

#[test]
fn those_who_say_nothing_are_left_alone() {
    let mut inactive = guest("a", 4096, 1000);
    inactive.inactive = true;
    let mut silent = guest("b", 4096, 1000);
    silent.usage = None;
    let snapshot = snapshot(50 * 1024, vec![inactive, silent]);
    assert_eq!(orders(&snapshot, &Wishes::from([("a".into(), GIB), ("b".into(), GIB)])), []);
    // Silence is no reason to keep what the host does not need.
    assert_eq!(
        orders(&snapshot, &Wishes::from([("a".into(), 8 * GIB), ("b".into(), 8 * GIB)])),
        order("b", 0, Why::Give)
    );
    // In an emergency, an inactive one is given memory too: it may hear it.
    let mut snapshot = snapshot;
    snapshot.guests[0].usage.as_mut().unwrap().oom_kills = 1;
    assert_eq!(orders(&snapshot, &Wishes::new()), order("a", 3072, Why::Emergency));
}

#[test]
fn a_balloon_that_gets_nowhere_is_let_be() {
    let mut rails = Rails::default();
    let mut snapshot = snapshot(50 * 1024, vec![guest("a", 1000, 1000)]);
    let mut said = Vec::new();
    let mut events = Vec::new();
    for now in 0..40 {
        snapshot.now = f64::from(now);
        let outcome = rails.apply(&snapshot, &wish("a", 4096), &Parameters::default());
        events.extend(outcome.events);
        for order in outcome.orders {
            snapshot.guests[0].target = order.balloon_bytes;
            said.push((now, order.balloon_bytes / MIB, order.why));
        }
    }
    assert_eq!(said, [(0, 1614, Why::Take), (4, 1000, Why::NoProgress)]);
    let target = snapshot.guests[0].memory / 1000 * 75 + 1000 * MIB;
    let Event::NoProgress { guest, target: asked, balloon } = &events[0] else { panic!("{events:?}") };
    assert!(
        events.len() == 1 && guest == "a" && *balloon == 1000 * MIB && target - asked < MIB,
        "{events:?}"
    );
}

#[test]
fn a_balloon_that_is_stuck_is_let_be_although_its_guest_is_left_alone() {
    let mut rails = Rails::default();
    let mut snapshot = snapshot(50 * 1024, vec![guest("a", 1000, 1000)]);
    snapshot.guests[0] =
        Guest { target: 4096 * MIB, inactive: true, stuck: true, ..snapshot.guests[0].clone() };
    assert_eq!(orders_of(&mut rails, &snapshot, &Wishes::new()), order("a", 1000, Why::NoProgress));
    // It is told once, and again after a while, if it did not hear.
    snapshot.now = 59.0;
    assert!(orders_of(&mut rails, &snapshot, &Wishes::new()).is_empty());
    snapshot.now = 60.0;
    assert_eq!(orders_of(&mut rails, &snapshot, &Wishes::new()), order("a", 1000, Why::NoProgress));
    // A guest that does not take back what it may have can go on.
    snapshot.guests[0].target = 0;
    snapshot.now = 120.0;
    assert!(orders_of(&mut rails, &snapshot, &Wishes::new()).is_empty());
}

#[test]
fn a_policy_that_does_nothing_does_not_ruin_the_host() {
    let snapshot = snapshot(1024, vec![guest("a", 0, 3000), guest("b", 0, 3000)]);
    // 99 GiB are used, 83 by others: the budget is 12.
    let orders = orders(&snapshot, &Wishes::new());
    assert_eq!(orders.len(), 2);
    assert!(orders.iter().all(|(_, balloon, why)| *balloon == 2048 && *why == Why::OverBudget), "{orders:?}");
    // It says so if not even that helps.
    let snapshot = self::snapshot(0, vec![guest("a", 7168, 900), guest("b", 7168, 900)]);
    let outcome = Rails::default().apply(&snapshot, &Wishes::new(), &Parameters::default());
    assert!(outcome.events.contains(&Event::OverBudget { missing: 2 * GIB }), "{:?}", outcome.events);
}

/// A host whose guests obey at once, and use all that they have, partly as cache.
#[derive(Clone, Debug)]
struct Obedient {
    others: u64,
    guests: Vec<Guest>,
    used: Vec<u64>,
    now: f64,
}

impl Obedient {
    const TOTAL: u64 = 24 * GIB;

    fn look(&self) -> Snapshot {
        let mut guests = self.guests.clone();
        for (guest, used) in guests.iter_mut().zip(&self.used) {
            guest.resident = held(guest);
            let available = held(guest).saturating_sub(*used);
            guest.usage = Some(Usage { available, ..Usage::default() });
        }
        let used: u64 = self.others + guests.iter().map(held).sum::<u64>();
        let host =
            Host { total: Self::TOTAL, available: Self::TOTAL.saturating_sub(used), ..Host::default() };
        Snapshot { now: self.now, host, guests, reserved: 0 }
    }

    fn obey(&mut self, orders: &[Order]) {
        for order in orders {
            let guest = self.guests.iter_mut().find(|guest| guest.name == order.guest).unwrap();
            guest.balloon = order.balloon_bytes;
            guest.target = order.balloon_bytes;
        }
        self.now += 1.0;
    }
}

fn obedient() -> impl Strategy<Value = Obedient> {
    // Balloon, use, minimum and maximum as parts of the memory; shares.
    let one = (0.0..1.0, 0.0..1.0, 0.0..0.6, 0.0..1.5, 1u32..10_000, 1u64..9);
    (0..6 * GIB, prop::collection::vec(one, 1..7)).prop_map(|(others, parts)| {
        let mut guests = Vec::new();
        let mut used = Vec::new();
        for (index, (balloon, use_, min, max, shares, size)) in parts.into_iter().enumerate() {
            let memory = size * GIB;
            let part = |part: f64| (memory as f64 * part) as u64 / PAGE * PAGE;
            guests.push(Guest {
                name: format!("guest{index}"),
                memory,
                min: part(min),
                max: part(max).max(part(min)),
                shares,
                balloon: part(balloon),
                target: part(balloon),
                ..Guest::default()
            });
            used.push(part(use_));
        }
        Obedient { others, guests, used, now: 0.0 }
    })
}

fn wishes(parts: &[f64]) -> Wishes {
    let name = |index| format!("guest{index}");
    parts.iter().enumerate().map(|(index, part)| (name(index), (part * 8.0 * GIB as f64) as u64)).collect()
}

proptest! {
    #[test]
    fn no_order_breaks_a_bound(
        host in obedient(),
        parts in prop::collection::vec(0.0..1.2, 7),
        silent in prop::collection::vec(any::<(bool, bool)>(), 7),
    ) {
        let mut snapshot = host.look();
        for (guest, (silent, inactive)) in snapshot.guests.iter_mut().zip(silent) {
            guest.inactive = inactive;
            if silent {
                guest.usage = None;
            }
        }
        let mut rails = Rails::default();
        let parameters = Parameters::default();
        let outcome = rails.apply(&snapshot, &wishes(&parts), &parameters);
        let mut given = 0;
        for order in &outcome.orders {
            let guest = snapshot.guests.iter().find(|guest| guest.name == order.guest).unwrap();
            let left = guest.memory - order.balloon_bytes;
            prop_assert_eq!(order.balloon_bytes % PAGE, 0);
            if order.balloon_bytes > guest.balloon {
                prop_assert!(managed(guest));
                prop_assert!(left >= floor(guest));
                let inflated = order.balloon_bytes - guest.balloon;
                prop_assert!(inflated <= percent(guest.memory, 37.5));
            } else {
                prop_assert!(!guest.inactive || order.why == Why::Emergency);
                prop_assert!(left <= ceiling(guest) + PAGE || order.balloon_bytes == guest.balloon);
                // Up to its minimum a guest is given what is not there, too.
                given += left.saturating_sub(held(guest).max(floor(guest)) + PAGE);
            }
        }
        let budget = budget(&snapshot, &parameters);
        let had: u64 = snapshot.guests.iter().filter(|guest| managed(guest)).map(held).sum();
        let half = percent(Obedient::TOTAL, parameters.reserve_percent / 2.0);
        let there = budget.saturating_sub(had).max(available(&snapshot).saturating_sub(half));
        prop_assert!(given <= there, "{given} of {there}");
    }

    #[test]
    fn any_policy_ends_within_the_budget(host in obedient(), parts in prop::collection::vec(0.0..1.2, 7)) {
        let mut host = host;
        let mut rails = Rails::default();
        let wishes = wishes(&parts);
        for _ in 0..200 {
            let outcome = rails.apply(&host.look(), &wishes, &Parameters::default());
            host.obey(&outcome.orders);
        }
        let snapshot = host.look();
        // Small changes are left out.
        let slack: u64 = snapshot.guests.iter().map(|guest| percent(guest.memory, 1.0) + PAGE).sum();
        let reserve = percent(Obedient::TOTAL, Parameters::default().reserve_percent * 0.8);
        let at_least = snapshot.guests.iter().all(|guest| held(guest) <= comfortable_floor(guest) + percent(guest.memory, 1.0) + PAGE);
        prop_assert!(snapshot.host.available + slack >= reserve || at_least, "{snapshot:#?}");
        for guest in &snapshot.guests {
            prop_assert!(held(guest) + PAGE >= floor(guest));
            prop_assert!(held(guest) <= ceiling(guest) + percent(guest.memory, 1.0) + PAGE);
        }
    }

    #[test]
    fn the_builtin_policy_comes_to_rest(host in obedient()) {
        let mut host = host;
        let mut rails = Rails::default();
        let mut policy = Builtin::new(Parameters::default());
        let mut last = 0;
        for tick in 0..700 {
            let snapshot = host.look();
            let wishes = policy.decide(&snapshot).unwrap();
            let outcome = rails.apply(&snapshot, &wishes, &Parameters::default());
            if !outcome.orders.is_empty() {
                last = tick;
            }
            host.obey(&outcome.orders);
        }
        prop_assert!(last < 600, "still orders at {last}");
    }

    #[test]
    fn the_same_snapshots_give_the_same_orders(host in obedient(), turn in any::<bool>()) {
        let (mut one, mut other) = (Rails::default(), Rails::default());
        let mut policies = [(); 2].map(|()| Builtin::new(Parameters::default()));
        let mut host = host;
        for _ in 0..20 {
            let snapshot = host.look();
            let mut again = snapshot.clone();
            if turn {
                again.guests.reverse();
            }
            let wishes = policies[0].wishes(&snapshot);
            prop_assert_eq!(&wishes, &policies[1].wishes(&again));
            let outcome = one.apply(&snapshot, &wishes, &Parameters::default());
            prop_assert_eq!(&outcome, &other.apply(&again, &wishes, &Parameters::default()));
            host.obey(&outcome.orders);
        }
    }
}
