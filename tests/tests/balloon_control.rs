//! The control socket of a balloon that a driver uses, and the program that talks to it.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::driver::balloon::fixture::{PATIENCE, balloon_command};
use tests::driver::balloon::memory::{PAGE, REST, RINGS};
use tests::driver::balloon::{BalloonFixture, Follower, Options};
use tests::driver::usage::cpu_time;
use tests::process;

const MIB: u64 = 1 << 20;
/// All memory of the guest.
const MEMORY: u64 = RINGS + REST;

/// A daemon and a driver that does what it is asked for. The host holds all of its memory.
fn living(args: &[&str]) -> Result<(BalloonFixture, Follower)> {
    let fixture = BalloonFixture::new(args)?;
    let driver = fixture.driver(&Options::default())?;
    driver.pages.mark_all(driver.pages.all(), 1);
    Ok((fixture, Follower::new(driver)))
}

#[test]
fn a_person_moves_memory_by_the_program() -> Result<()> {
    let (fixture, guest) = living(&[])?;
    let ctl = |args: &[&str]| fixture.ctl(args).with_context(|| format!("{args:?}"));
    let status = || -> Result<Value> { Ok(serde_json::from_str(&ctl(&["status", "--json"])?)?) };
    assert_eq!(status()?["resident_bytes"], MEMORY);
    ctl(&["target", "8M", "--wait"])?;
    let now = status()?;
    assert_eq!((&now["actual_bytes"], &now["resident_bytes"]), (&json!(8 * MIB), &json!(MEMORY - 8 * MIB)));
    assert_eq!(now["activity"], "idle", "{now}");
    assert!(ctl(&["status"])?.contains("8.00 MiB"), "{}", ctl(&["status"])?);
    ctl(&["target", "--guest", "20M", "--wait"])?;
    assert_eq!(status()?["actual_bytes"], MEMORY - 20 * MIB);
    // KiB, as with virsh.
    ctl(&["setmem", &(28 << 10).to_string(), "--wait"])?;
    assert_eq!(status()?["actual_bytes"], 4 * MIB);
    let fresh: Value = serde_json::from_str(&ctl(&["stats", "--fresh", "--json"])?)?;
    assert_eq!((&fresh["free_memory"], &fresh["actual_mib"]), (&json!(28 * MIB), &json!(4)));
    let dommemstat = ctl(&["dommemstat"])?;
    let line = format!("rss {}\n", (MEMORY - 12 * MIB) >> 10);
    assert!(dommemstat.contains("unused 28672\n") && dommemstat.contains(&line), "{dommemstat}");
    ctl(&["target", "0", "--wait"])?;
    assert_eq!(status()?["actual_bytes"], 0);
    let driver = guest.end()?;
    driver.pages.check_marked(driver.pages.block(9), 1)?;
    fixture.stop()
}

#[test]
fn the_program_says_what_is_wrong() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let error = fixture.ctl(&["stats", "--fresh"]).err().context("There is no guest")?;
    assert!(format!("{error:#}").contains("driver does not run"), "{error:#}");
    let error = fixture.ctl(&["target", "8M", "--wait", "0.2"]).err().context("There is no guest")?;
    assert!(format!("{error:#}").contains("no driver"), "{error:#}");
    let error = fixture.ctl(&["target", "--guest", "8M"]).err().context("Its memory is unknown")?;
    assert!(format!("{error:#}").contains("memory"), "{error:#}");
    let mut command = balloon_command()?;
    command.args(["ctl", "--socket", "/nowhere/at/all", "status"]);
    let output = process::run_unchecked(command, PATIENCE)?;
    let text = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("/nowhere/at/all") && text.lines().count() == 1, "{text}");
    Ok(())
}

#[test]
fn events_tell_what_happens() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    let mut events = control.events()?;
    let driver = fixture.driver(&Options::default())?;
    events.wait_for("connected")?;
    let started = events.wait_for("driver-started")?;
    assert_eq!(started["guest_memory_bytes"], MEMORY, "{started}");
    let guest = Follower::new(driver);
    control.set_target(8 * MIB)?;
    let target = events.wait_for("target")?;
    assert_eq!((&target["requested_bytes"], &target["target_bytes"]), (&json!(8 * MIB), &json!(8 * MIB)));
    let reached = events.wait_for("reached")?;
    assert_eq!(reached["actual_bytes"], 8 * MIB, "{reached}");
    assert!(reached["ts_ms"].as_u64() >= target["ts_ms"].as_u64(), "{reached} after {target}");
    // A driver that does not follow any more.
    let mut driver = guest.end()?;
    control.set_target(12 * MIB)?;
    let stalled = events.wait_for("stalled")?;
    assert_eq!((&stalled["actual_bytes"], &stalled["target_bytes"]), (&json!(8 * MIB), &json!(12 * MIB)));
    assert_eq!(control.status()?["activity"], "stalled");
    driver.close();
    events.wait_for("disconnected")?;
    fixture.stop()
}

/// The samples of a page of metrics.
fn samples(page: &str) -> Result<HashMap<String, f64>> {
    let lines = page.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| {
            let (name, value) =
                line.rsplit_once(' ').with_context(|| format!("This is no sample: {line}"))?;
            Ok((name.to_owned(), value.parse()?))
        })
        .collect()
}

#[test]
fn metrics_are_those_of_the_status() -> Result<()> {
    let (fixture, _guest) = living(&[])?;
    let control = fixture.control();
    fixture.ctl(&["target", "8M", "--wait"])?;
    control.get("/v1/statistics?fresh=1&timeout_ms=15000")?;
    let answer = control.request("GET", "/metrics", None)?;
    assert_eq!(answer.status, 200);
    let samples = samples(&answer.body)?;
    for (name, expected) in [
        ("balloon_up", 1),
        ("balloon_connected", 1),
        ("balloon_actual_bytes", 8 * MIB),
        ("balloon_target_bytes", 8 * MIB),
        ("balloon_resident_bytes", MEMORY - 8 * MIB),
        ("balloon_pages_released_bytes", 8 * MIB),
        ("balloon_inflated_bytes_total", 8 * MIB),
        ("balloon_guest_free_bytes", MEMORY - 8 * MIB),
        ("balloon_driver_starts_total", 1),
        ("balloon_malformed_total", 0),
    ] {
        let found = samples.get(name).with_context(|| format!("{name} is missing in\n{}", answer.body))?;
        assert_eq!(*found as u64, expected, "{name}");
    }
    assert_eq!(control.request("GET", "/healthz", None)?.status, 200);
    Ok(())
}

#[test]
fn who_knows_firecracker_finds_it() -> Result<()> {
    let (fixture, guest) = living(&[])?;
    let control = fixture.control();
    let patch = |target: &str, body: Value| control.request("PATCH", target, Some(&body));
    assert_eq!(patch("/balloon", json!({ "amount_mib": 4 }))?.status, 204);
    let balloon = control.get("/balloon")?;
    assert_eq!((&balloon["amount_mib"], &balloon["deflate_on_oom"]), (&json!(4), &json!(true)), "{balloon}");
    fixture.wait_number("actual_bytes", 4 * MIB)?;
    assert_eq!(patch("/balloon/statistics", json!({ "stats_polling_interval_s": 1 }))?.status, 204);
    fixture.wait_until("statistics come by themselves", || {
        let answer = control.request("GET", "/balloon/statistics", None)?;
        Ok(answer.status == 200 && answer.json()?["actual_pages"] == 4 * MIB / PAGE)
    })?;
    let statistics = control.get("/balloon/statistics")?;
    assert_eq!((&statistics["target_mib"], &statistics["total_memory"]), (&json!(4), &json!(MEMORY)));
    assert_eq!(patch("/balloon", json!({ "amount_mib": 4, "deflate_on_oom": false }))?.status, 400);
    assert_eq!(patch("/balloon", json!({ "amount": 4 }))?.status, 400);
    guest.end()?;
    fixture.stop()
}

#[test]
fn the_socket_is_for_its_owner() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let mode = std::fs::metadata(fixture.control_path())?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let path = fixture.control_path();
    fixture.stop()?;
    assert!(!path.exists(), "the socket is left behind");
    Ok(())
}

/// Clients that are slow, say nothing, or talk nonsense keep neither the guest nor other clients waiting for long.
#[test]
fn bad_clients_disturb_nobody() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    let mut driver = fixture.driver(&Options::default())?;
    let connect = || UnixStream::connect(fixture.control_path());
    for junk in [
        &b"\r\n\r\n"[..],
        b"GET",
        b"GET /v1/status HTTP/9.9\r\n\r\n",
        b"PUT /v1/target HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"PUT /v1/target HTTP/1.1\r\nContent-Length: 10\r\n\r\n{\"ball",
        b"PUT /v1/target HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]",
        b"PUT /v1/target HTTP/1.1\r\nContent-Length: 27\r\n\r\n{\"balloon_bytes\":\"1234567\"}",
        b"PUT /v1/target HTTP/1.1\r\nContent-Length: 21\r\n\r\n{\"balloon_bytes\":-1.5}",
        b"GET /v1/statistics?fresh=1&timeout_ms=99999999999 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0\xff\xfe",
    ] {
        let mut stream = connect()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(junk)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = Vec::new();
        // Closed with an answer or without.
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert!(!text.starts_with("HTTP/1.1 2"), "{:?} got {text}", String::from_utf8_lossy(junk));
        assert_eq!(control.status()?["requested_bytes"], 0);
    }
    // A request without an end.
    let mut endless = connect()?;
    endless.set_write_timeout(Some(Duration::from_millis(100)))?;
    let _ = endless.write_all(&vec![b'a'; 4 << 20]);
    // More clients than are served, of which none says anything: the device does not notice.
    let idle: Vec<UnixStream> = (0..50).map(|_| connect()).collect::<Result<_, _>>()?;
    driver.check_serves()?;
    let before = cpu_time(fixture.daemon.pid())?;
    std::thread::sleep(Duration::from_millis(300));
    let used = cpu_time(fixture.daemon.pid())?.saturating_sub(before);
    assert!(used < Duration::from_millis(60), "{used:?} for clients that say nothing");
    drop(idle);
    fixture.wait_until("clients are served again", || {
        Ok(control.request("GET", "/v1/status", None).is_ok_and(|answer| answer.status == 200))
    })?;
    // Readers of events that do not read.
    let deaf: Vec<_> = (0..4).map(|_| control.events()).collect::<Result<_>>()?;
    for round in 0..3000 {
        driver.set_actual(round)?;
        if round % 10 == 0 {
            control.set_target(u64::from(round) * PAGE)?;
        }
    }
    driver.check_serves()?;
    drop(deaf);
    fixture.stop()
}
