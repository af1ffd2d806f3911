//! The requests.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use vhost_user_balloon::api::{Activity, Event, FirecrackerBalloon, Statistics, Status, What};
use vhost_user_balloon::control::metrics;
use vhost_user_daemon::control::metrics::Page;
use vhost_user_daemon::control::{ClientError, KEPT_EVENTS, MAX_CLIENTS};

use crate::fake::{Fixture, GIB, Guest, MIB, statistics};

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (u16, String) {
    match result {
        Err(ClientError::Refused { status, message, .. }) => (status, message),
        other => panic!("{other:?}"),
    }
}

/// Sends bytes, and gives all that comes back.
fn raw(fixture: &Fixture, input: &[u8]) -> String {
    let mut stream = UnixStream::connect(&fixture.path).unwrap();
    stream.write_all(input).unwrap();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut output = Vec::new();
    let _ = stream.read_to_end(&mut output);
    String::from_utf8(output).unwrap()
}

#[test]
fn a_target_is_set_and_shown() {
    let fixture = Fixture::new(Guest::Follows);
    let mut client = fixture.client();
    let status: Status = client.put("/v1/target", &json!({"balloon_bytes": GIB})).unwrap();
    assert_eq!((status.requested_bytes, status.target_bytes), (GIB, GIB));
    let status: Status = client.put("/v1/target", &json!({"guest_bytes": 3 * GIB})).unwrap();
    assert_eq!(status.requested_bytes, GIB);
    let status: Status = client.put("/v1/target", &json!({"guest_bytes": 0})).unwrap();
    assert_eq!((status.requested_bytes, status.target_bytes), (4 * GIB, 4 * GIB - GIB / 2));
    assert_eq!(client.get::<Status>("/v1/status").unwrap().target_bytes, 4 * GIB - GIB / 2);
}

#[test]
fn targets_that_cannot_be_are_refused_with_the_reason() {
    let fixture = Fixture::new(Guest::Follows);
    let mut client = fixture.client();
    for (body, word) in [
        (json!({}), "one of balloon_bytes and guest_bytes"),
        (json!({"balloon_bytes": 1, "guest_bytes": 2}), "one of"),
        (json!({"balloon_bytes": -1}), "-1"),
        (json!({"balloon_bytes": "1G"}), "1G"),
        (json!({"ballon_bytes": 1}), "ballon_bytes"),
        (json!({"balloon_bytes": u64::MAX}), "16 TiB"),
        (json!([]), "body"),
    ] {
        let (status, message) = refused(client.put::<Status>("/v1/target", &body));
        assert!(status == 400 && message.contains(word), "{body}: {status} {message}");
    }
    fixture.fake.state().status.guest_memory_bytes = 0;
    let (status, message) = refused(client.put::<Status>("/v1/target", &json!({"guest_bytes": 1})));
    assert!(status == 409 && message.contains("balloon_bytes"), "{message}");
    assert_eq!(fixture.fake.state().status.requested_bytes, 0);
}

#[test]
fn statistics_are_those_that_came_or_new_ones() {
    let fixture = Fixture::new(Guest::Follows);
    let mut client = fixture.client();
    let (status, message) = refused(client.get::<Statistics>("/v1/statistics"));
    assert!(status == 409 && message.contains("fresh=1"), "{message}");
    assert_eq!(client.get::<Statistics>("/v1/statistics?fresh=1").unwrap(), statistics());
    assert_eq!(client.get::<Statistics>("/v1/statistics?fresh=0").unwrap(), statistics());
    assert_eq!(client.get::<Status>("/v1/status").unwrap().statistics, Some(statistics()));
    for query in ["fresh=yes", "fresh=1&timeout_ms=x", "fresh=1&timeout_ms=60001"] {
        assert_eq!(refused(client.get::<Statistics>(&format!("/v1/statistics?{query}"))).0, 400, "{query}");
    }
    fixture.fake.state().guest = Guest::Mute;
    assert_eq!(refused(client.get::<Statistics>("/v1/statistics?fresh=1")).0, 409);
}

#[test]
fn a_silent_guest_blocks_nobody() {
    let fixture = Fixture::new(Guest::Silent);
    let (status, message) =
        refused(fixture.client().get::<Statistics>("/v1/statistics?fresh=1&timeout_ms=30"));
    assert!(status == 504 && message.contains("30 ms"), "{message}");
    thread::scope(|scope| {
        let get = || {
            let mut client = fixture.client();
            client.set_timeout(Duration::from_secs(60));
            client.get::<Statistics>("/v1/statistics?fresh=1&timeout_ms=60000")
        };
        let waiting: Vec<_> = (0..3).map(|_| scope.spawn(get)).collect();
        while !fixture.fake.is_asked() {
            thread::yield_now();
        }
        assert_eq!(fixture.client().get::<Status>("/v1/status").unwrap().statistics, None);
        while !waiting.iter().all(thread::ScopedJoinHandle::is_finished) {
            fixture.fake.answer();
            thread::yield_now();
        }
        for thread in waiting {
            assert_eq!(thread.join().unwrap().unwrap(), statistics());
        }
    });
}

#[test]
fn firecracker_clients_find_what_they_know() {
    let fixture = Fixture::new(Guest::Follows);
    let mut client = fixture.client();
    let balloon = |client: &mut vhost_user_daemon::control::Client| client.get::<Value>("/balloon").unwrap();
    assert_eq!(
        balloon(&mut client),
        json!({
            "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 0, "free_page_hinting": false,
            "free_page_reporting": false
        })
    );
    let wanted = FirecrackerBalloon {
        amount_mib: 512,
        deflate_on_oom: Some(true),
        stats_polling_interval_s: Some(5),
        ..FirecrackerBalloon::default()
    };
    client.put::<()>("/balloon", &wanted).unwrap();
    assert_eq!(fixture.fake.state().status.requested_bytes, 512 * MIB);
    assert_eq!(fixture.fake.state().status.statistics_interval_s, 5);
    client.patch::<()>("/balloon", &json!({"amount_mib": 100})).unwrap();
    client.patch::<()>("/balloon/statistics", &json!({"stats_polling_interval_s": 9})).unwrap();
    let now = balloon(&mut client);
    assert_eq!((&now["amount_mib"], &now["stats_polling_interval_s"]), (&json!(100), &json!(9)));
    let answer = raw(
        &fixture,
        b"PATCH /balloon HTTP/1.1\r\nContent-Length: 19\r\nContent-Type: application/json\r\n\r\n{\"amount_mib\": 200}",
    );
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");

    assert_eq!(refused(client.get::<Statistics>("/balloon/statistics")).0, 400);
    fixture.fake.answer();
    let numbers: Value = client.get("/balloon/statistics").unwrap();
    assert_eq!(numbers["target_pages"], json!(512));
    assert_eq!(numbers["available_memory"], json!(2 * GIB));
    assert_eq!(numbers.get("oom_kill"), None);
}

#[test]
fn what_firecracker_clients_cannot_have_is_refused() {
    let fixture = Fixture::new(Guest::Follows);
    let mut client = fixture.client();
    for (path, body, word) in [
        ("/balloon", json!({}), "amount_mib"),
        ("/balloon", json!({"amount_mib": "bar"}), "bar"),
        ("/balloon", json!({"amount_mib": -1000}), "-1000"),
        ("/balloon", json!({"amount_mib": 1, "foo": 1}), "foo"),
        ("/balloon", json!({"amount_mib": u64::MAX}), "16 TiB"),
        ("/balloon", json!({"amount_mib": 1, "deflate_on_oom": false}), "--deflate-on-oom"),
        ("/balloon", json!({"amount_mib": 1, "free_page_reporting": true}), "--free-page-reporting"),
        ("/balloon", json!({"amount_mib": 1, "free_page_hinting": true}), "free_page_reporting"),
        ("/balloon", json!({"amount_mib": 1, "stats_polling_interval_s": 65536}), "65535"),
        ("/balloon/statistics", json!({"stats_polling_interval_s": 65536}), "65535"),
        ("/balloon/statistics", json!({"amount_mib": 100}), "amount_mib"),
    ] {
        let (status, message) = refused(client.patch::<()>(path, &body));
        assert!(status == 400 && message.contains(word), "{path} {body}: {status} {message}");
    }
    assert_eq!(fixture.fake.state().status.requested_bytes, 0);
    assert_eq!(fixture.fake.state().status.statistics_interval_s, 0);
}

#[test]
fn other_methods_and_paths_are_refused() {
    let fixture = Fixture::new(Guest::Follows);
    let mut client = fixture.client();
    for path in
        ["/v1/status", "/v1/target", "/v1/statistics", "/v1/events", "/metrics", "/healthz", "/balloon"]
    {
        assert_eq!(refused(client.post::<()>(path, &0)).0, 405, "{path}");
    }
    for path in ["/", "/v1", "/v1/status/", "/balloon/hinting/status", "/v2/status"] {
        assert_eq!(refused(client.get::<()>(path)).0, 404, "{path}");
    }
    assert_eq!(client.get_text("/healthz").unwrap(), "ok\n");
    let answer = raw(&fixture, b"HEAD /healthz HTTP/1.1\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.ends_with("\r\n\r\n"), "{answer}");
}

/// Gives each number in it a value of its own, and lists them.
fn number(value: &mut Value, next: &mut u64, all: &mut Vec<u64>) {
    match value {
        Value::Number(number) => {
            *next += 1;
            *number = (*next).into();
            all.push(*next);
        }
        Value::Object(object) => object.values_mut().for_each(|value| self::number(value, next, all)),
        _ => {}
    }
}

#[test]
fn every_number_of_the_status_is_a_metric() {
    let fixture = Fixture::new(Guest::Follows);
    let mut known = statistics();
    known.guest.oom_kill = Some(0);
    known.guest.alloc_stall = Some(0);
    known.guest.async_scan = Some(0);
    known.guest.direct_scan = Some(0);
    known.guest.async_reclaim = Some(0);
    known.guest.direct_reclaim = Some(0);
    fixture.fake.state().status.statistics = Some(known);
    let mut value: Value = fixture.client().get("/v1/status").unwrap();
    // Numbers that are said by others, or are no measure.
    value.as_object_mut().unwrap().remove("pid");
    for name in ["target_pages", "actual_pages", "target_mib", "actual_mib", "last_update"] {
        value["statistics"].as_object_mut().unwrap().remove(name);
    }
    let (mut next, mut all) = (7_000_000, Vec::new());
    number(&mut value, &mut next, &mut all);
    assert!(all.len() > 40);
    value["pid"] = json!(1);
    let status: Status = serde_json::from_value(value).unwrap();
    let mut page = Page::new();
    metrics::write(&mut page, &[(&[("guest", "a")], &status), (&[("guest", "b")], &status)]);
    let numbers: Vec<&str> = page.as_str().lines().filter_map(|line| line.rsplit(' ').next()).collect();
    for number in all {
        let as_it_is = number.to_string();
        // Microseconds, milliseconds.
        let (us, ms) =
            (format!("7.{:06}", number - 7_000_000), format!("{}.{:03}000", number / 1000, number % 1000));
        let count = numbers.iter().filter(|text| [&*as_it_is, &us, &ms].contains(text)).count();
        assert_eq!(count, 2, "{number}: {}", page.as_str());
    }
    for line in
        ["balloon_activity{guest=\"a\",activity=\"idle\"} 1", "balloon_info{guest=\"b\",version=\"1.2.3\"} 1"]
    {
        assert!(page.as_str().lines().any(|candidate| candidate == line), "{line}");
    }
    let mut names: Vec<_> = page.as_str().lines().filter(|line| line.starts_with("# TYPE")).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn a_guest_that_says_nothing_has_no_metrics_of_its_own() {
    let fixture = Fixture::new(Guest::Silent);
    let page = fixture.client().get_text("/metrics").unwrap();
    assert!(page.contains("\nballoon_resident_bytes 4294967296\n"), "{page}");
    assert!(page.contains("\nballoon_released_bytes_total 0\n"), "{page}");
    assert!(!page.contains("balloon_guest_available_bytes"), "{page}");
    let answer = raw(&fixture, b"GET /metrics HTTP/1.1\r\n\r\n");
    assert!(answer.contains("Content-Type: text/plain; version=0.0.4"), "{answer}");
}

#[test]
fn events_are_told_and_a_slow_reader_learns_what_it_missed() {
    let fixture = Fixture::new(Guest::Follows);
    let mut client = fixture.client();
    client.put::<Status>("/v1/target", &json!({"balloon_bytes": GIB})).unwrap();
    let mut events = client.stream::<Event>("/v1/events?past=5").unwrap();
    let first = events.next().unwrap().unwrap();
    assert_eq!(first.what, What::Target { requested_bytes: GIB, target_bytes: GIB });
    assert!(first.ts_ms > 1_600_000_000_000);
    client.put::<()>("/balloon", &json!({"amount_mib": 1})).unwrap();
    assert_eq!(
        events.next().unwrap().unwrap().what,
        What::Target { requested_bytes: MIB, target_bytes: MIB }
    );
    let total = 100 * KEPT_EVENTS as u64;
    for bytes in 0..total {
        fixture.feed.publish(&Event::now(What::DeflateHeld { bytes }));
    }
    let mut seen = 0;
    let mut lost = 0;
    while seen + lost < total {
        match events.next().unwrap().unwrap().what {
            What::DeflateHeld { bytes } => {
                assert_eq!(bytes, seen + lost);
                seen += 1;
            }
            What::Lost { events } => lost += events,
            other => panic!("{other:?}"),
        }
    }
    assert!(lost > 0 && seen >= KEPT_EVENTS as u64);
    assert_eq!(refused(client.stream::<Event>("/v1/events?past=x")).0, 400);
}

#[test]
fn garbage_and_half_requests_disturb_nobody() {
    let fixture = Fixture::new(Guest::Follows);
    let mut held = Vec::new();
    for start in ["", "PUT /v1/tar", "PUT /v1/target HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"balloon_"] {
        let mut stream = UnixStream::connect(&fixture.path).unwrap();
        stream.write_all(start.as_bytes()).unwrap();
        held.push(stream);
    }
    // The beginning of a vhost-user connection (VHOST_USER_GET_FEATURES).
    let answer = raw(&fixture, &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(raw(&fixture, b"GET / HTTP/1.1\r\nA: b").is_empty());
    let large =
        [b"PUT /v1/target HTTP/1.1\r\nContent-Length: 70000\r\n\r\n", &vec![b'{'; 70_000][..]].concat();
    let mut stream = UnixStream::connect(&fixture.path).unwrap();
    let _ = stream.write_all(&large);
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    assert_eq!(fixture.client().get::<Status>("/v1/status").unwrap().activity, Activity::Idle);
    assert_eq!(held.len(), 3);
}

#[test]
fn many_clients_come_one_after_the_other_and_at_once() {
    let fixture = Fixture::new(Guest::Follows);
    // As many as there may be, each with a connection that is kept.
    thread::scope(|scope| {
        for _ in 0..MAX_CLIENTS {
            scope.spawn(|| {
                let mut client = fixture.client();
                for _ in 0..200 {
                    assert_eq!(client.get::<Status>("/v1/status").unwrap().pid, 42);
                }
            });
        }
    });
    // All of them are idle now, if they are there at all, and make place.
    let mut kept: Vec<_> = (0..4 * MAX_CLIENTS).map(|_| fixture.client()).collect();
    for _ in 0..3 {
        for client in &mut kept {
            assert_eq!(client.get::<Status>("/v1/status").unwrap().pid, 42);
        }
    }
}
