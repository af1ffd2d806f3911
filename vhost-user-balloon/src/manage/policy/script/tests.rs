use super::*;
use crate::manage::model::{Host, Usage};
use crate::manage::simulation::{MOM, PROPORTIONAL, PROXMOX};

const GIB: u64 = 1 << 30;

fn guest(name: &str) -> Guest {
    Guest {
        name: name.into(),
        memory: 4 * GIB,
        max: 4 * GIB,
        shares: 1000,
        resident: 2 * GIB,
        usage: Some(Usage { available: 3 * GIB, free: GIB, ..Usage::default() }),
        ..Guest::default()
    }
}

fn snapshot() -> Snapshot {
    let host = Host { total: 16 * GIB, available: GIB, ..Host::default() };
    Snapshot { now: 1.0, host, guests: vec![guest("a"), guest("b")], reserved: 0 }
}

fn script(text: &str) -> Script {
    Script::new(text, 200_000, &Parameters::default())
}

fn decide(text: &str) -> Result<Wishes, String> {
    script(text).decide(&snapshot())
}

/// Why a script cannot decide.
fn failure(text: &str) -> String {
    decide(text).expect_err("this script is wrong")
}

#[test]
fn a_script_decides() {
    let wishes = decide(
        "fn decide(host, guests, config) {
            let wishes = #{};
            for guest in guests {
                if guest.active { wishes[guest.name] = guest.used * 2; }
            }
            wishes
        }",
    );
    assert_eq!(wishes.unwrap(), Wishes::from([("a".into(), 2 * GIB), ("b".into(), 2 * GIB)]));
    // Floating point will do.
    let wishes = decide("fn decide(host, guests, config) { #{ a: config.headroom * guests[0].used } }");
    assert_eq!(wishes.unwrap(), Wishes::from([("a".into(), 5 * GIB / 4)]));
}

#[test]
fn everything_that_is_said_to_be_there_is_there() {
    let mut keys = Vec::new();
    for (object, names) in [
        ("host", "now total available reserved budget swap_in swap_out psi_some psi_full comfortable"),
        ("guests[0]", "name memory held balloon target resident min max shares inactive active"),
        ("guests[0]", "total used available free swap_in swap_out major_faults oom_kills"),
    ] {
        keys.extend(names.split(' ').map(|name| format!("{object}.{name}")));
    }
    // Every parameter is there, by the name that it has in the file.
    let parameters = serde_json::to_value(Parameters::default()).unwrap();
    let parameters = parameters.as_object().unwrap().keys();
    keys.extend(parameters.map(|name| format!("config.{}", name.replace('-', "_"))));
    for key in keys {
        let text =
            format!("fn decide(host, guests, config) {{ if {key} == () {{ throw `missing` }} #{{}} }}");
        decide(&text).unwrap_or_else(|error| panic!("{key}: {error}"));
    }
}

#[test]
fn silent_guests_are_not_active() {
    let mut snapshot = snapshot();
    snapshot.guests[1].usage = None;
    let mut script = script(
        "fn decide(host, guests, config) {
            if guests[1].active || guests[1].used != () { throw `it says nothing` }
            #{ b: 1 }
        }",
    );
    assert_eq!(script.decide(&snapshot), Ok(Wishes::from([("b".into(), 1)])));
}

#[test]
fn state_lasts() {
    let mut script = script(
        "fn decide(host, guests, config, state) {
            state.calls = if `calls` in state { state.calls + 1 } else { 1 };
            #{ a: state.calls }
        }",
    );
    for call in 1..4 {
        assert_eq!(script.decide(&snapshot()), Ok(Wishes::from([("a".into(), call)])));
    }
}

#[test]
fn what_is_no_script_is_said() {
    let text = failure("fn decide(host, guests, config) { #{ }");
    assert!(text.contains("line 1"), "{text}");
    assert!(script("let").check().is_err());
    let text = failure("fn decide(host) { #{} }");
    assert!(text.contains("fn decide(host, guests, config)"), "{text}");
}

#[test]
fn a_missing_file_is_said() {
    let config = ScriptConfig { file: "/no/such/file.rhai".into(), operations: 1000 };
    let text = Script::load(&config, &Parameters::default()).check().unwrap_err();
    assert!(text.contains("/no/such/file.rhai"), "{text}");
}

#[test]
fn a_script_that_fails_says_where() {
    let text = failure("fn decide(host, guests, config) {\n  #{ a: host.total + nobody }\n}");
    assert!(text.contains("nobody") && text.contains("line 2"), "{text}");
    let text = failure("fn decide(host, guests, config) { throw `no idea` }");
    assert!(text.contains("no idea"), "{text}");
    // Arithmetic is checked.
    let text = failure("fn decide(host, guests, config) { #{ a: 9223372036854775807 + guests[0].shares } }");
    assert!(text.contains("overflow"), "{text}");
    failure("fn decide(host, guests, config) { #{ a: 1 / 0 } }");
}

#[test]
fn answers_that_make_no_sense_are_refused() {
    for (answer, reason) in [
        ("42", "not a map"),
        ("()", "not a map"),
        ("#{ a: `much` }", "not a number of bytes"),
        ("#{ a: -1 }", "not a number of bytes"),
        ("#{ a: -1.0 }", "not a number of bytes"),
        ("#{ a: 0.0 / 0.0 }", "not a number of bytes"),
        ("#{ a: 1e300 }", "not a number of bytes"),
        ("#{ nobody: 1 }", "no such guest"),
    ] {
        let text = failure(&format!("fn decide(host, guests, config) {{ {answer} }}"));
        assert!(text.contains(reason), "{answer}: {text}");
    }
}

#[test]
fn a_script_ends() {
    for (helper, body) in [
        ("", "loop { }"),
        ("", "let x = 0; while true { x += 1; } #{}"),
        ("fn again() { again() }", "again()"),
        ("", "let text = `x`; loop { text += text; }"),
        ("", "let list = []; loop { list.push(list); }"),
        ("", "let list = []; loop { list.push(1); }"),
        ("", "let list = []; list.pad(1000000000, 0); #{}"),
        ("", "let map = #{}; let n = 0; loop { n += 1; map[n.to_string()] = n; }"),
    ] {
        let text = failure(&format!("{helper} fn decide(host, guests, config) {{ {body} }}"));
        assert!(text.starts_with("The script failed"), "{body}: {text}");
    }
}

#[test]
fn a_script_that_makes_much_of_each_operation_ends_too() {
    let copies =
        "let a = []; a.pad(16000, 0); for i in 0..60000 { let b = a; b[0] = 1; if b == a { break } } #{}";
    let text = failure(&format!("fn decide(host, guests, config) {{ {copies} }}"));
    assert!(text.contains("takes longer than 500 ms"), "{text}");
    // 0 is no operation, not any number of them.
    let mut script = Script::new("fn decide(host, guests, config) { loop {} }", 0, &Parameters::default());
    script.decide(&snapshot()).unwrap_err();
}

#[test]
fn a_script_prints_a_few_lines_only() {
    let call = Call::new();
    for _ in 0..2 {
        call.begin();
        assert_eq!((0..100).filter(|_| call.may_print()).count(), 16);
    }
}

#[test]
fn a_script_reaches_nothing() {
    for forbidden in [
        "eval(`1`)",
        "import `x` as y;",
        "open_file(`/etc/passwd`)",
        "sleep(1)",
        "sleep(1.0)",
        "let nap = Fn(`sleep`); nap.call(1)",
        "timestamp()",
    ] {
        failure(&format!("fn decide(host, guests, config) {{ {forbidden}; #{{}} }}"));
    }
}

#[test]
fn what_stands_outside_of_functions_does_not_run() {
    assert_eq!(decide("loop {} fn decide(host, guests, config) { #{} }"), Ok(Wishes::new()));
}

#[test]
fn the_examples_decide() {
    for text in [MOM, PROXMOX, PROPORTIONAL] {
        let mut script = script(text);
        script.check().unwrap();
        let wishes = script.decide(&snapshot()).unwrap();
        // The host is full: all of them take something.
        assert!(wishes.values().sum::<u64>() < 8 * GIB, "{wishes:?}");
        // Nothing to do is no reason to fail.
        assert_eq!(script.decide(&Snapshot::default()), Ok(Wishes::new()));
    }
}

#[test]
fn the_examples_cope_with_many_guests() {
    let guests = (0..300).map(|index| guest(&format!("guest{index:03}"))).collect();
    let many = Snapshot { guests, ..snapshot() };
    for text in [MOM, PROXMOX, PROPORTIONAL] {
        assert_eq!(script(text).decide(&many).unwrap().len(), 300);
    }
}
