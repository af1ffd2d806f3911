use super::*;
use crate::manage::model::{Host, Wishes};
use crate::manage::rails::{Order, Why};
use crate::manage::record::Recorder;

const GIB: u64 = 1 << 30;

/// A guest of 8 GiB that uses 2 GiB, on a host of 16 GiB.
fn tick(now: f64, balloon: u64, available: u64) -> Tick {
    let guest = Guest {
        name: "a".into(),
        memory: 8 * GIB,
        min: GIB,
        max: 8 * GIB,
        shares: 1000,
        balloon,
        target: balloon,
        resident: 8 * GIB - balloon,
        usage: Some(Usage { total: 8 * GIB, available: 6 * GIB - balloon, ..Usage::default() }),
        deflates_on_oom: true,
        ..Guest::default()
    };
    let snapshot = Snapshot {
        now,
        host: Host { total: 16 * GIB, available, ..Host::default() },
        guests: vec![guest],
        reserved: 0,
    };
    Tick { ts_ms: (now * 1000.0) as u64, snapshot, wishes: Wishes::new(), orders: Vec::new(), dry_run: false }
}

fn replay(ticks: &[Tick], config: Option<Config>) -> (Summary, Vec<Would>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("r");
    let mut recorder = Recorder::open(&path, u64::MAX, &Config::default()).unwrap();
    for tick in ticks {
        recorder.tick(tick.clone()).unwrap();
    }
    let mut would = Vec::new();
    let summary = Replay::new(config).run(&path, |decision| would.push(decision.clone())).unwrap();
    (summary, would)
}

#[test]
fn a_policy_that_does_nothing_is_as_what_was_done() {
    let ticks: Vec<Tick> = (0..10).map(|now| tick(f64::from(now), 0, 8 * GIB)).collect();
    let (summary, would) = replay(&ticks, None);
    assert_eq!((summary.ticks, would.len()), (10, 0));
    assert!((summary.seconds - 9.0).abs() < 1e-9);
    assert_eq!((summary.done, summary.largest_difference), (summary.would, None));
}

#[test]
fn what_would_have_helped_is_seen() {
    // The host is short of memory, and nobody does anything.
    let ticks: Vec<Tick> = (0..120).map(|now| tick(f64::from(now), 0, GIB / 4)).collect();
    let (summary, would) = replay(&ticks, None);
    assert!((summary.done.over_budget_s - 119.0).abs() < 1e-9, "{summary:?}");
    assert!(summary.would.over_budget_s < summary.done.over_budget_s / 2.0, "{summary:?}");
    assert!(summary.would.moved_bytes > GIB / 2 && summary.would.distress_s < 1.0, "{summary:?}");
    assert!(!would.is_empty() && summary.would.orders == would.len() as u64);
    let difference = summary.largest_difference.clone().unwrap();
    assert!(difference.done_bytes == 0 && difference.would_bytes > GIB / 2);
    let text = summary.to_string();
    assert!(text.contains("119 s") && text.contains("largest difference: a"), "{text}");
}

#[test]
fn what_was_done_is_counted() {
    let order = Order { guest: "a".into(), balloon_bytes: 2 * GIB, why: Why::Take };
    let ticks = [
        Tick { orders: vec![order], ..tick(0.0, 0, 8 * GIB) },
        tick(1.0, 2 * GIB, 10 * GIB),
        // The manager was restarted.
        tick(0.0, 6 * GIB, 14 * GIB),
        tick(1.0, 6 * GIB, 14 * GIB),
    ];
    let (summary, _) = replay(&ticks, None);
    assert_eq!((summary.done.moved_bytes, summary.done.orders), (2 * GIB, 1));
    assert_eq!(summary.done.most_ballooned_bytes, 6 * GIB);
    // With all that it does not need in the balloon, the guest has nothing left.
    assert!((summary.seconds - 2.0).abs() < 1e-9 && (summary.done.distress_s - 1.0).abs() < 1e-9);
}

#[test]
fn guests_keep_what_they_need_in_another_world() {
    let mut replay = Replay::new(None);
    replay.balloons.insert("a".into(), Balloon { size: 3 * GIB, target: 3 * GIB, memory: 8 * GIB });
    let would = replay.imagine(&tick(0.0, GIB, 2 * GIB).snapshot);
    let guest = &would.guests[0];
    // 2 GiB more in the balloon: out of what was available to the guest, and available to the host.
    assert_eq!((guest.balloon, guest.resident, guest.usage.unwrap().available), (3 * GIB, 5 * GIB, 3 * GIB));
    assert_eq!(would.host.available, 4 * GIB);
    replay.balloons.insert("a".into(), Balloon { size: 0, target: 0, memory: 8 * GIB });
    let would = replay.imagine(&tick(0.0, GIB, 2 * GIB).snapshot);
    // All that it had was touched.
    assert_eq!((would.guests[0].resident, would.host.available), (8 * GIB, GIB));
    assert_eq!(would.guests[0].usage.unwrap().available, 6 * GIB);
}

#[test]
fn balloons_do_not_take_what_guests_do_not_have() {
    let mut replay = Replay::new(None);
    replay.balloons.insert("a".into(), Balloon { size: 0, target: 8 * GIB, memory: 8 * GIB });
    replay.move_balloons(&tick(0.0, 0, GIB).snapshot);
    assert_eq!(replay.balloons["a"].size, 6 * GIB);
    // A guest that does not obey stays where it is, and another guest of this name begins where it is.
    let mut other = tick(1.0, GIB, GIB).snapshot;
    other.guests[0].inactive = true;
    replay.balloons.get_mut("a").unwrap().target = 0;
    replay.move_balloons(&other);
    assert_eq!(replay.balloons["a"].size, 6 * GIB);
    other.guests[0].memory = 4 * GIB;
    replay.move_balloons(&other);
    assert_eq!(replay.balloons["a"].size, GIB);
}

#[test]
fn another_configuration_decides_if_it_is_given() {
    let ticks: Vec<Tick> = (0..60).map(|now| tick(f64::from(now), 0, GIB / 4)).collect();
    let slow = Config::parse("policy.inflate-percent = 1\npolicy.emergency-inflate-percent = 1").unwrap();
    let (fast, _) = replay(&ticks, None);
    let (slow, _) = replay(&ticks, Some(slow));
    assert_eq!(slow.done, fast.done);
    assert!(fast.would.over_budget_s + 2.0 < slow.would.over_budget_s, "{fast:?} {slow:?}");
}
