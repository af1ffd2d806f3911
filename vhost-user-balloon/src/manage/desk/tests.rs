use std::path::{Path, PathBuf};
use std::thread;

use tempfile::TempDir;
use vhost_user_daemon::control::{Client, ClientError, Endpoint, Server};
use vhost_user_daemon::socket::Socket;

use super::*;
use crate::manage::model::{Guest, Host};

const GIB: u64 = 1 << 30;

struct Served {
    desk: Arc<Desk>,
    path: PathBuf,
    _server: Server,
    _directory: TempDir,
}

fn serve() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("manager.sock");
    let desk = Desk::new().unwrap();
    let socket = Socket::open_private(&path).unwrap();
    let endpoint = Endpoint::socket(socket, Arc::new(Private(Arc::clone(&desk))));
    let server = Server::start(desk.bell(), vec![endpoint]).unwrap();
    Served { desk, path, _server: server, _directory: directory }
}

fn snapshot(now: f64, available: u64) -> Snapshot {
    let guest = Guest { name: "a".into(), memory: 4 * GIB, resident: 4 * GIB, min: GIB, ..Guest::default() };
    let host = Host { total: 16 * GIB, available: available * GIB, ..Host::default() };
    Snapshot { now, host, guests: vec![guest], reserved: 0 }
}

/// Begins to reserve memory for `name`, and gives the answer when there is one.
fn reserve(path: &Path, name: &str, gib: u64) -> thread::JoinHandle<Result<Reservation, u16>> {
    let request = ReservationRequest { name: name.into(), bytes: gib * GIB, timeout_s: 100, expires_s: 100 };
    let mut client = Client::new(path);
    thread::spawn(move || {
        client.set_timeout(Duration::from_secs(100));
        client.post("/v1/reservations", &request).map_err(|error| status_of(&error))
    })
}

fn status_of(error: &ClientError) -> u16 {
    match error {
        ClientError::Refused { status, .. } => *status,
        other => panic!("{other}"),
    }
}

/// Waits until the desk is asked for so much in all.
fn wait_for(desk: &Desk, gib: u64) {
    while desk.lock().admission.reserved() != gib * GIB {
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_reservation_is_answered_when_the_memory_is_there() {
    let Served { desk, path, .. } = &serve();
    let mut client = Client::new(path);
    assert_eq!(reserve(path, "vm", 4).join().unwrap(), Err(503));
    assert_eq!(desk.admit(&snapshot(0.0, 2), GIB), 0);
    let answer = reserve(path, "vm", 4);
    wait_for(desk, 4);
    assert_eq!(desk.admit(&snapshot(1.0, 2), GIB), 4 * GIB);
    let listed: Vec<Reservation> = client.get("/v1/reservations").unwrap();
    assert!(listed.len() == 1 && !listed[0].granted && !answer.is_finished());
    // The same again is refused, and the first one goes on.
    assert_eq!(reserve(path, "vm", 4).join().unwrap(), Err(409));
    desk.admit(&snapshot(2.0, 5), GIB);
    let granted = answer.join().unwrap().unwrap();
    assert!(granted.granted && granted.bytes == 4 * GIB && granted.remaining_s == 100);
    client.delete::<()>("/v1/reservations/vm").unwrap();
    assert_eq!(status_of(&client.delete::<()>("/v1/reservations/vm").unwrap_err()), 404);
    assert_eq!(desk.admit(&snapshot(3.0, 5), GIB), 0);
}

#[test]
fn a_reservation_that_fails_is_answered_too() {
    let Served { desk, path, .. } = &serve();
    desk.admit(&snapshot(0.0, 2), GIB);
    assert_eq!(reserve(path, "vm", 40).join().unwrap(), Err(409));
    let answer = reserve(path, "vm", 4);
    wait_for(desk, 4);
    desk.admit(&snapshot(100.0, 2), GIB);
    assert_eq!(answer.join().unwrap(), Err(504));
    let answer = reserve(path, "vm", 4);
    wait_for(desk, 4);
    Client::new(path).delete::<()>("/v1/reservations/vm").unwrap();
    assert_eq!(answer.join().unwrap(), Err(409));
}

#[test]
fn who_leaves_does_not_want_memory_any_more() {
    let Served { desk, path, .. } = &serve();
    desk.admit(&snapshot(0.0, 2), GIB);
    let request = ReservationRequest { name: "vm".into(), bytes: 4 * GIB, timeout_s: 100, expires_s: 100 };
    let mut client = Client::new(path);
    client.set_timeout(Duration::from_millis(50));
    client.post::<Reservation>("/v1/reservations", &request).unwrap_err();
    drop(client);
    // The server sees at some time that it has gone.
    let mut now = 0.0;
    while desk.admit(&snapshot(now, 2), GIB) != 0 {
        now += 0.001;
        thread::sleep(Duration::from_millis(5));
    }
    // Memory that is there is not granted to nobody.
    let events = desk.feed.subscribe(10);
    drop(events);
    assert!(desk.lock().waits.is_empty());
}

#[test]
fn the_status_the_metrics_and_the_health_are_shown() {
    let Served { desk, path, .. } = &serve();
    let mut client = Client::new(path);
    assert_eq!(status_of(&client.get_text("/healthz").unwrap_err()), 503);
    let status = ManagerStatus { ticks: 7, policy: "built-in".into(), ..ManagerStatus::default() };
    desk.show(status.clone());
    assert_eq!(client.get::<ManagerStatus>("/v1/status").unwrap(), status);
    assert_eq!(client.get_text("/healthz").unwrap(), "ok\n");
    assert!(client.get_text("/metrics").unwrap().contains("\nballoon_manager_ticks_total 7\n"));
    for (status, target) in [(404, "/"), (404, "/v1/nothing"), (405, "/v1/reservations/vm")] {
        assert_eq!(status_of(&client.get_text(target).unwrap_err()), status, "{target}");
    }
    let bad = client.post::<Reservation>("/v1/reservations", &"vm").unwrap_err();
    assert_eq!(status_of(&bad), 400);
}

#[test]
fn events_are_told_with_those_of_the_policy() {
    let Served { desk, path, .. } = &serve();
    desk.tell(What::Pressure);
    desk.tell(What::HostBack);
    let mut lines = Client::new(path).stream::<serde_json::Value>("/v1/events?past=1").unwrap();
    desk.tell_of_policy(policy::Event::HostCritical);
    let mut next = || lines.next().unwrap().unwrap()["event"].clone();
    assert_eq!([next(), next()], ["host-back", "host-critical"]);
}

#[test]
fn the_public_sees_metrics_only() {
    let desk = Desk::new().unwrap();
    let public = Public(desk);
    let get = |path: &str| {
        let request = Request { method: Method::Get, path: path.into(), query: vec![], body: vec![] };
        match public.handle(&request) {
            Reply::Now(response) => response.status,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        ["/metrics", "/healthz", "/v1/status", "/v1/events", "/v1/reservations"].map(get),
        [200, 503, 404, 404, 404]
    );
}
