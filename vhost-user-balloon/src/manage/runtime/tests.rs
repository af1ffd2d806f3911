use std::fs;

use tempfile::TempDir;

use super::*;
use crate::api::Status;
use crate::manage::config::Budget;
use crate::manage::guests::tests::FakeBalloon;
use crate::manage::guests::view::tests::status;
use crate::manage::host::tests::fake_proc;
use crate::manage::record;

const GIB: u64 = 1 << 30;

/// A manager of a host of 8 GiB, and of guests of 4 GiB that use 1 GiB each.
struct Bench {
    manager: Manager,
    balloons: Vec<FakeBalloon>,
    directory: TempDir,
}

fn bench(guests: &[&str], config: &str, change: impl FnOnce(&mut Options)) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fake_proc(&path("proc"), 6 * GIB, 0);
    fs::create_dir(path("guests")).unwrap();
    let balloons = guests
        .iter()
        .map(|name| FakeBalloon::start(&path(&format!("guests/{name}.sock")), status(0, 0)))
        .collect();
    fs::write(path("config"), config).unwrap();
    let mut options = Options {
        config: Some(path("config")),
        guests: GuestsOptions { directory: Some(path("guests")), ..GuestsOptions::default() },
        record: Some((path("record"), u64::MAX)),
        ..Options::default()
    };
    change(&mut options);
    let host = HostSampler::with_proc(&path("proc"), &Budget::Auto).unwrap();
    let config = load_config(options.config.as_deref()).unwrap();
    let manager = Manager::with_host(options, config, host).unwrap();
    Bench { manager, balloons, directory }
}

impl Bench {
    fn available(&self, bytes: u64) {
        fake_proc(&self.directory.path().join("proc"), bytes, 0);
    }

    /// Ticks until something is so. Each tick's targets are waited for, as a second would.
    fn until(&mut self, mut so: impl FnMut(&[FakeBalloon]) -> bool) {
        for _ in 0..2000 {
            self.manager.tick();
            if so(&self.balloons) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it is still {:?}", self.balloons.iter().map(FakeBalloon::target).collect::<Vec<_>>());
    }

    fn recorded(&self) -> Vec<record::Line> {
        record::read(&self.directory.path().join("record")).unwrap().map(Result::unwrap).collect()
    }
}

#[test]
fn nothing_is_taken_while_there_is_plenty() {
    let mut bench = bench(&["a", "b"], "", |_| ());
    for _ in 0..5 {
        bench.manager.tick();
    }
    assert!(bench.balloons.iter().all(|balloon| balloon.target() == 0));
    let lines = bench.recorded();
    assert_eq!(lines.len(), 6);
    let record::Line::Tick(tick) = &lines[5] else { panic!("{lines:?}") };
    assert_eq!((tick.snapshot.guests.len(), tick.orders.len()), (2, 0));
    assert!(tick.snapshot.guests.iter().all(|guest| guest.usage.is_some()));
}

#[test]
fn memory_is_taken_when_it_is_short() {
    let mut bench =
        bench(&["a", "b"], "policy.inflate-percent = 100\npolicy.emergency-inflate-percent = 100", |_| ());
    bench.manager.tick();
    bench.available(GIB / 2);
    bench.until(|balloons| balloons.iter().any(|balloon| balloon.target() > 0));
    let lines = bench.recorded();
    assert!(lines.iter().any(|line| matches!(line, record::Line::Tick(tick) if !tick.orders.is_empty())));
}

#[test]
fn a_dry_run_decides_and_sends_nothing() {
    let mut bench = bench(&["a"], "", |options| options.guests.dry_run = true);
    bench.manager.tick();
    bench.available(GIB / 8);
    for _ in 0..500 {
        bench.manager.tick();
        if !bench.manager.decided.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(bench.manager.decided["a"] > 0);
    bench.manager.guests.release(PATIENCE);
    assert_eq!(bench.balloons[0].target(), 0);
}

#[test]
fn a_configuration_with_mistakes_is_not_used() {
    let mut bench = bench(&["a"], "guests.a.shares = 5", |_| ());
    let path = bench.directory.path().join("config");
    fs::write(&path, "guests.a.shares = \"many\"").unwrap();
    assert!(!bench.manager.reload());
    assert_eq!(bench.manager.config.guest("a").shares, 5);
    fs::write(&path, "script.file = \"own.rhai\"").unwrap();
    fs::write(bench.directory.path().join("own.rhai"), "this is no script").unwrap();
    assert!(!bench.manager.reload());
    fs::write(&path, "host.memory = \"/nonexistent\"").unwrap();
    assert!(!bench.manager.reload());
    fs::write(&path, "guests.a.shares = 6").unwrap();
    assert!(bench.manager.reload());
    assert_eq!(bench.manager.config.guest("a").shares, 6);
    fs::remove_file(&path).unwrap();
    assert!(!bench.manager.reload());
    bench.manager.tick();
    let lines = bench.recorded();
    assert!(
        matches!(
            &lines[..],
            [record::Line::Configuration(_), record::Line::Configuration(_), record::Line::Tick(_)]
        ),
        "{lines:?}"
    );
}

#[test]
fn a_script_that_fails_does_not_stop_anything() {
    let script = "fn decide(host, guests, cfg) { throw \"no\" }";
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("own.rhai");
    fs::write(&file, script).unwrap();
    let mut bench = bench(&["a"], &format!("script.file = {file:?}"), |_| ());
    bench.manager.tick();
    assert_eq!((bench.manager.ticks, bench.manager.policy_failures), (1, 1));
}

#[test]
fn a_host_that_cannot_be_looked_at_stops_decisions_only() {
    let mut bench = bench(&["a"], "", |_| ());
    bench.manager.tick();
    let meminfo = bench.directory.path().join("proc/meminfo");
    fs::remove_file(&meminfo).unwrap();
    bench.manager.tick();
    assert!(bench.manager.host_lost && bench.manager.ticks == 1);
    bench.available(6 * GIB);
    bench.manager.tick();
    assert!(!bench.manager.host_lost && bench.manager.ticks == 2);
}

#[test]
fn guests_come_and_go_between_ticks() {
    let mut bench = bench(&["a"], "", |_| ());
    bench.manager.tick();
    let path = bench.directory.path().join("guests/b.sock");
    bench.balloons.push(FakeBalloon::start(&path, Status { connected: false, ..status(0, 0) }));
    let watched = [readable(bench.manager.guests.changes().unwrap())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(poll(&mut { watched }, Some(&now)).unwrap(), 1);
    bench.manager.scan();
    bench.manager.tick();
    bench.balloons.remove(0);
    bench.manager.scan();
    bench.manager.tick();
    let lines = bench.recorded();
    let names: Vec<Vec<&str>> = lines
        .iter()
        .filter_map(|line| match line {
            record::Line::Tick(tick) => {
                Some(tick.snapshot.guests.iter().map(|guest| guest.name.as_str()).collect())
            }
            record::Line::Configuration(_) => None,
        })
        .collect();
    assert_eq!(names, [vec!["a"], vec!["a", "b"], vec!["b"]]);
}

#[test]
fn what_cannot_be_used_is_named_at_once() {
    let refused = |options| Manager::new(options).map(drop).unwrap_err();
    let error = refused(Options { config: Some("/nonexistent".into()), ..Options::default() });
    assert!(format!("{error:#}").contains("/nonexistent"), "{error:#}");
    let error = refused(Options { record: Some(("/nonexistent/r".into(), 1)), ..Options::default() });
    assert!(format!("{error:#}").contains("--record"), "{error:#}");
}
