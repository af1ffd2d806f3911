use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::json;
use vhost_user_daemon::control::{Bell, Endpoint, Handler, Method, Reply, Request, Response, Server};
use vhost_user_daemon::socket::Socket;

use super::view::tests::status;
use super::*;
use crate::api::{Activity, Status, Target};

/// Enough for whatever has to happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon whose guest does at once what it is asked for.
pub(crate) struct FakeBalloon {
    state: Arc<FakeState>,
    _server: Server,
}

pub(crate) struct FakeState {
    pub status: Mutex<Status>,
    pub requests: AtomicU64,
    pub garbage: AtomicBool,
    pub endless: AtomicBool,
}

impl Handler for FakeState {
    fn handle(&self, request: &Request) -> Reply {
        self.requests.fetch_add(1, Ordering::SeqCst);
        if self.endless.load(Ordering::SeqCst) {
            return Response::text("application/json", "0,".repeat(1 << 20)).into();
        }
        if self.garbage.load(Ordering::SeqCst) {
            return Response::json(&json!({ "balloons": "many" })).into();
        }
        let mut status = self.status.lock().unwrap();
        let response = match (request.method, &*request.path) {
            (Method::Get, "/v1/status") => Response::json(&*status),
            (Method::Put, "/v1/target") => match request.json::<Target>() {
                Ok(target) => {
                    let bytes = target.balloon_bytes.unwrap();
                    status.resident_bytes =
                        status.resident_bytes.min(status.guest_memory_bytes.saturating_sub(bytes));
                    (status.target_bytes, status.actual_bytes) = (bytes, bytes);
                    Response::json(&*status)
                }
                Err(response) => response,
            },
            (Method::Get, "/v1/statistics") if request.query("fresh") == Some("1") => {
                let statistics = status.statistics.as_mut().unwrap();
                statistics.age_ms = 0;
                Response::json(statistics)
            }
            _ => Response::not_found(request),
        };
        response.into()
    }
}

impl FakeBalloon {
    pub fn start(path: &Path, status: Status) -> Self {
        let state = Arc::new(FakeState {
            status: Mutex::new(status),
            requests: AtomicU64::new(0),
            garbage: AtomicBool::new(false),
            endless: AtomicBool::new(false),
        });
        let handler: Arc<dyn Handler> = Arc::clone(&state) as _;
        let socket = Socket::open_private(path).unwrap();
        let server = Server::start(&Bell::new().unwrap(), vec![Endpoint::socket(socket, handler)]).unwrap();
        Self { state, _server: server }
    }

    pub fn change(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.state.status.lock().unwrap());
    }

    pub fn target(&self) -> u64 {
        self.state.status.lock().unwrap().target_bytes
    }
}

fn guests(sockets: &[PathBuf], directory: Option<&Path>, dry_run: bool, config: &str) -> Guests {
    let options =
        GuestsOptions { sockets: sockets.to_vec(), directory: directory.map(Path::to_owned), dry_run };
    let config = Arc::new(Config::parse(config).unwrap());
    Guests::new(&options, config, Instant::now()).unwrap()
}

fn now(guests: &Guests) -> f64 {
    guests.epoch.elapsed().as_secs_f64()
}

/// Polls until something is so.
fn until(guests: &mut Guests, mut so: impl FnMut(&[Guest]) -> bool) -> Vec<What> {
    let deadline = Instant::now() + PATIENCE;
    let mut events = Vec::new();
    loop {
        events.extend(guests.poll(PATIENCE));
        let snapshot = guests.snapshot(now(guests));
        if so(&snapshot) {
            return events;
        }
        assert!(Instant::now() < deadline, "it is still {snapshot:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn balloons_are_seen_and_told() {
    let directory = tempfile::tempdir().unwrap();
    let paths = ["a.sock", "b.sock"].map(|name| directory.path().join(name));
    // Its statistics are old, and new ones are to be had.
    let a = FakeBalloon::start(&paths[0], status(0, 60_000));
    let _b = FakeBalloon::start(&paths[1], status(1 << 30, 0));
    let mut guests = guests(&paths, None, false, "[guests.a]\nshares = 7");
    assert_eq!(guests.scan().len(), 2);
    assert!(guests.scan().is_empty());
    assert!(until(&mut guests, |guests| guests.iter().all(|guest| guest.usage.is_some())).is_empty());
    let snapshot = guests.snapshot(now(&guests));
    let seen: Vec<_> = snapshot
        .iter()
        .map(|guest| (guest.name.as_str(), guest.shares, guest.balloon, guest.inactive))
        .collect();
    assert_eq!(seen, [("a", 7, 0, false), ("b", 1000, 1 << 30, false)]);
    guests.send("a", 2 << 30);
    guests.send("nobody", 1);
    until(&mut guests, |guests| guests[0].balloon == 2 << 30);
    guests.release(PATIENCE);
    assert_eq!(a.target(), 0);
}

#[test]
fn nothing_is_sent_in_a_dry_run_nor_to_guests_that_are_ignored() {
    let directory = tempfile::tempdir().unwrap();
    let paths = ["a.sock", "b.sock"].map(|name| directory.path().join(name));
    let balloons = paths.each_ref().map(|path| FakeBalloon::start(path, status(1 << 20, 0)));
    let untouched = |balloon: &FakeBalloon| balloon.target() == 1 << 20;
    let mut dry = guests(&paths, None, true, "");
    dry.scan();
    dry.poll(PATIENCE);
    dry.send("a", 0);
    dry.release(PATIENCE);
    dry.poll(PATIENCE);
    assert!(balloons.iter().all(untouched));
    let mut guests = guests(&paths, None, false, "guests.b.ignore = true");
    guests.scan();
    guests.poll(PATIENCE);
    let snapshot = guests.snapshot(now(&guests));
    assert_eq!(snapshot.len(), 1);
    guests.release(PATIENCE);
    assert!(!untouched(&balloons[0]) && untouched(&balloons[1]));
    let status = guests.status(now(&guests), &snapshot);
    let ignored: Vec<_> = status.iter().map(|guest| (guest.ignored, guest.guest.memory > 0)).collect();
    assert_eq!(ignored, [(false, true), (true, true)]);
    guests.configure(Arc::new(Config::parse("guests.a.ignore = true").unwrap()));
    guests.send("a", 7 << 20);
    guests.send("b", 7 << 20);
    guests.poll(PATIENCE);
    assert_eq!([balloons[0].target(), balloons[1].target()], [0, 7 << 20]);
}

#[test]
fn a_daemon_that_hangs_delays_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let paths = ["a.sock", "hangs.sock"].map(|name| directory.path().join(name));
    let _a = FakeBalloon::start(&paths[0], status(0, 0));
    // Somebody connects, and nobody answers.
    let _hangs = UnixListener::bind(&paths[1]).unwrap();
    let mut guests = guests(&paths, None, false, "");
    guests.scan();
    // Were the one that hangs waited for, this would take as long.
    assert!(guests.poll(Duration::from_millis(50)).is_empty());
    let mut polls = 0;
    let events = loop {
        // Patience that nobody may need any more.
        let events = guests.poll(Duration::from_secs(3600));
        polls += 1;
        let snapshot = guests.snapshot(now(&guests));
        assert!(!snapshot[0].inactive && snapshot[1].inactive, "{snapshot:?}");
        if !events.is_empty() {
            break events;
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert!(polls > 3, "{polls}");
    assert!(matches!(&events[..], [What::GuestLost { guest, .. }] if guest == "hangs"), "{events:?}");
    // It is asked again, and told of once.
    for _ in 0..5 {
        assert!(guests.poll(Duration::from_secs(3600)).is_empty());
    }
}

#[test]
fn a_daemon_may_go_and_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let mut guests = guests(std::slice::from_ref(&path), None, false, "");
    guests.scan();
    let events = guests.poll(PATIENCE);
    assert!(
        matches!(&events[..], [What::GuestLost { reason, .. }] if reason.contains("does not exist")),
        "{events:?}"
    );
    assert_eq!(guests.poll(PATIENCE), []);
    let balloon = FakeBalloon::start(&path, status(0, 0));
    let events = until(&mut guests, |guests| !guests[0].inactive);
    assert_eq!(events, [What::GuestBack { guest: "a".into() }]);
    balloon.state.garbage.store(true, Ordering::SeqCst);
    let events = until(&mut guests, |guests| guests[0].inactive);
    assert!(
        matches!(&events[..], [What::GuestLost { reason, .. }] if reason.contains("not understood")),
        "{events:?}"
    );
    assert!(guests.status(0.0, &[])[0].failure.is_some());
    balloon.state.garbage.store(false, Ordering::SeqCst);
    until(&mut guests, |guests| !guests[0].inactive);
    // Nobody reads on and on.
    balloon.state.endless.store(true, Ordering::SeqCst);
    let events = until(&mut guests, |guests| guests[0].inactive);
    assert!(
        matches!(&events[..], [What::GuestLost { reason, .. }] if reason.contains("does not speak HTTP")),
        "{events:?}"
    );
    balloon.state.endless.store(false, Ordering::SeqCst);
    until(&mut guests, |guests| !guests[0].inactive);
    drop(balloon);
    let events = until(&mut guests, |guests| guests[0].inactive);
    assert!(matches!(&events[..], [What::GuestLost { .. }]), "{events:?}");
}

#[test]
fn a_guest_is_told_of_when_it_is_stuck_or_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let balloon = FakeBalloon::start(&path, status(0, 0));
    let mut guests = guests(&[path], None, false, "");
    guests.scan();
    assert_eq!(guests.poll(PATIENCE), []);
    balloon.change(|status| status.activity = Activity::Held);
    let events = guests.poll(PATIENCE);
    assert!(matches!(&events[..], [What::GuestStuck { reason, .. }] if reason.contains("huge pages")));
    balloon.change(|status| status.connected = false);
    assert_eq!(guests.poll(PATIENCE), [What::GuestEnded { guest: "a".into() }]);
}

#[test]
fn a_directory_is_followed() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut guests = guests(&[], Some(directory.path()), false, "");
    assert!(guests.scan().is_empty());
    let a = FakeBalloon::start(&path("a.sock"), status(0, 0));
    let socket = path("a.sock").display().to_string();
    assert_eq!(guests.scan(), [What::GuestAppeared { guest: "a".into(), socket }]);
    guests.poll(PATIENCE);
    assert_eq!(guests.snapshot(now(&guests)).len(), 1);
    let _b = FakeBalloon::start(&path("b.control"), status(0, 0));
    drop(a);
    let events = guests.scan();
    assert!(
        matches!(&events[..], [What::GuestVanished { guest: a }, What::GuestAppeared { guest: b, .. }] if a == "a" && b == "b"),
        "{events:?}"
    );
    assert_eq!(guests.socket("b"), Some(&*path("b.control")));
    // Guests do not go because nobody can see them.
    drop(directory);
    assert!(guests.scan().is_empty());
}

#[test]
fn names_are_told_apart() {
    let options =
        GuestsOptions { sockets: vec!["/a/x.sock".into(), "/b/x.sock".into()], ..GuestsOptions::default() };
    let error = Guests::new(&options, Arc::default(), Instant::now()).unwrap_err();
    assert!(error.to_string().contains("called x"), "{error}");
    let options = GuestsOptions { directory: Some("/nonexistent".into()), ..GuestsOptions::default() };
    let error = Guests::new(&options, Arc::default(), Instant::now()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent"), "{error}");
}
