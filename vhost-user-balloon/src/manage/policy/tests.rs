use proptest::prelude::*;

use super::*;
use crate::manage::model::{Guest, Host, Usage};

const GIB: u64 = 1 << 30;

/// A host that is short of memory, at this time.
fn snapshot(now: f64) -> Snapshot {
    let guest = |name: &str| Guest {
        name: name.into(),
        memory: 4 * GIB,
        max: 4 * GIB,
        shares: 1000,
        resident: 7 * GIB / 2,
        usage: Some(Usage { available: 3 * GIB, free: GIB, ..Usage::default() }),
        ..Guest::default()
    };
    let host = Host { total: 10 * GIB, available: GIB, ..Host::default() };
    Snapshot { now, host, guests: vec![guest("a"), guest("b")], reserved: 0 }
}

fn decider(text: &str) -> Decider {
    let parameters = Parameters::default();
    let script = Script::new(text, 200_000, &parameters);
    Decider::with(parameters, Some(script))
}

/// What the built-in policy decides in the same place.
fn builtin(now: f64) -> Decision {
    let mut decider = Decider::with(Parameters::default(), None);
    decider.decide(&snapshot(0.0));
    decider.decide(&snapshot(now))
}

#[test]
fn it_can_be_sent_to_a_thread() {
    fn sendable<T: Send>() {}
    sendable::<Decider>();
}

#[test]
fn a_script_decides_on_our_rails() {
    let decision =
        decider("fn decide(host, guests, config) { #{ a: 0, b: guests[1].memory } }").decide(&snapshot(0.0));
    assert!(!decision.fallback);
    assert_eq!(decision.wishes["a"], 0);
    // Not at once, and not the other.
    let [order] = &decision.orders[..] else { panic!("{decision:?}") };
    assert!(order.guest == "a" && order.balloon_bytes < GIB, "{order:?}");
}

#[test]
fn a_script_that_fails_is_replaced_and_reported_once() {
    let failing = "fn decide(host, guests, config, state) {
        let calls = if `calls` in state { state.calls } else { 0 };
        state.calls = calls + 1;
        if calls == 1 || calls == 2 { throw `no idea` }
        if calls == 3 { loop { } }
        #{}
    }";
    let mut decider = decider(failing);
    let decisions: Vec<_> = (0..5).map(|now| decider.decide(&snapshot(f64::from(now)))).collect();
    let reported = |decision: &Decision| -> Vec<String> {
        let failures = decision.events.iter().filter_map(|event| match event {
            Event::PolicyFailed { reason } => Some(reason.clone()),
            Event::PolicyRecovered => Some("recovered".into()),
            _ => None,
        });
        failures.collect()
    };
    let fallback: Vec<_> = decisions.iter().map(|decision| decision.fallback).collect();
    assert_eq!(fallback, [false, true, true, true, false]);
    assert_eq!(decisions[1].wishes, builtin(1.0).wishes);
    assert!(!decisions[1].orders.is_empty());
    assert!(reported(&decisions[0]).is_empty());
    assert!(reported(&decisions[1])[0].contains("no idea"));
    assert!(reported(&decisions[2]).is_empty());
    assert!(reported(&decisions[3])[0].contains("operations"), "{:?}", decisions[3]);
    assert_eq!(reported(&decisions[4]), ["recovered"]);
}

#[test]
fn a_script_that_is_none_is_replaced() {
    for text in ["fn decide(", "let x = 1;", "fn decide(host, guests, config) { 42 }"] {
        let decision = decider(text).decide(&snapshot(0.0));
        assert!(decision.fallback);
        assert!(decision.events.iter().any(|event| matches!(event, Event::PolicyFailed { .. })));
        assert!(!decision.wishes.is_empty());
    }
}

#[test]
fn a_configuration_is_obeyed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("own.rhai");
    std::fs::write(&file, "fn decide(host, guests, config) { #{ a: 1 } }").unwrap();
    let text = format!("[policy]\nheadroom = 2\n[script]\nfile = {file:?}\n");
    let mut decider = Decider::new(&Config::parse(&text).unwrap());
    let decision = decider.decide(&snapshot(0.0));
    assert_eq!(decision.wishes["a"], 1);
    // The built-in policy is asked in any case: 1 GiB is used, and twice that and the cushion are needed.
    assert_eq!(decision.assessment.needs["a"].claim, 2 * GIB + (128 << 20));
    // No file, no script.
    std::fs::remove_file(&file).unwrap();
    assert!(Decider::new(&Config::parse(&text).unwrap()).decide(&snapshot(0.0)).fallback);
}

#[test]
fn a_new_configuration_does_not_forget_what_is_known() {
    let mut decider = Decider::with(Parameters::default(), None);
    decider.decide(&snapshot(0.0));
    // There would be enough for somebody who has never seen that there was not.
    let mut better = snapshot(1.0);
    better.host.available = 19 * GIB / 10;
    decider.configure(&Config::parse("policy.headroom = 1.5").unwrap());
    let decision = decider.decide(&better);
    assert_eq!((decision.assessment.mode, decision.events), (Mode::Plenty, vec![]));
    assert_eq!(decision.assessment.needs["a"].claim, 3 * GIB / 2 + (128 << 20));
}

#[test]
fn the_state_of_the_host_is_an_event() {
    let mut decider = Decider::with(Parameters::default(), None);
    let events = decider.decide(&snapshot(0.0)).events;
    assert_eq!(events, [Event::Mode { mode: Mode::Plenty, before: Mode::Comfortable }]);
    assert_eq!(decider.decide(&snapshot(1.0)).events, []);
    let json = serde_json::to_string(&events[0]).unwrap();
    assert_eq!(json, r#"{"event":"mode","mode":"plenty","before":"comfortable"}"#);
}

proptest! {
    #[test]
    fn nothing_that_guests_say_does_harm(
        said in prop::collection::vec(any::<([u64; 6], [f64; 3], bool, bool)>(), 3),
        available in 0..10 * GIB,
    ) {
        let mut decider = Decider::with(Parameters::default(), None);
        for now in 0..3 {
            let mut snapshot = snapshot(f64::from(now));
            snapshot.host.available = available;
            for (guest, (numbers, rates, has_balloon, inactive)) in snapshot.guests.iter_mut().zip(&said[now as usize..]) {
                guest.balloon = numbers[0];
                guest.inactive = *inactive;
                guest.usage = Some(Usage {
                    total: numbers[1],
                    available: numbers[2],
                    free: numbers[3],
                    balloon: has_balloon.then_some(numbers[4]),
                    oom_kills: numbers[5],
                    swap_in: rates[0],
                    swap_out: rates[1],
                    major_faults: rates[2],
                });
            }
            for order in decider.decide(&snapshot).orders {
                prop_assert!(order.balloon_bytes <= 4 * GIB, "{order:?}");
            }
        }
    }
}
