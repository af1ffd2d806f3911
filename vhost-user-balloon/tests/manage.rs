//! The manager as a process: its flags, its signals, its sockets.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_user_daemon::control::{Bell, Client, Endpoint, Handler, Method, Reply, Request, Response, Server};
use vhost_user_daemon::socket::Socket;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-user-balloon");

/// Enough for whatever has to happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon with a guest of 1 GiB that does at once what it is asked for: only its target changes.
struct Balloon {
    target: Arc<Mutex<u64>>,
    _server: Server,
}

struct Answers(Arc<Mutex<u64>>);

impl Handler for Answers {
    fn handle(&self, request: &Request) -> Reply {
        let mut target = self.0.lock().unwrap();
        if request.method == Method::Put {
            let body: Value = serde_json::from_slice(&request.body).unwrap();
            *target = body["balloon_bytes"].as_u64().unwrap();
        }
        if request.path == "/v1/statistics" {
            return Response::fault(504, "The guest sleeps").into();
        }
        Response::json(&json!({
            "version": "0", "pid": 1, "connected": true, "activity": "idle", "guest_memory_bytes": 1 << 30,
            "resident_bytes": 1 << 20, "requested_bytes": *target, "target_bytes": *target, "actual_bytes": *target,
            "min_guest_memory_bytes": 0, "ballooned_bytes": *target, "released_bytes": 0, "pending_bytes": 0,
            "held_bytes": 0, "features": ["statistics", "deflate-on-oom"], "statistics_interval_s": 0,
            "statistics": null, "counters": {},
        }))
        .into()
    }
}

impl Balloon {
    fn start(path: &Path, target: u64) -> Self {
        let target = Arc::new(Mutex::new(target));
        let socket = Socket::open_private(path).unwrap();
        let endpoint = Endpoint::socket(socket, Arc::new(Answers(Arc::clone(&target))));
        Self { target, _server: Server::start(&Bell::new().unwrap(), vec![endpoint]).unwrap() }
    }

    fn target(&self) -> u64 {
        *self.target.lock().unwrap()
    }
}

/// A manager of the directory `guests`, and everything else that it has.
struct Manager {
    child: Child,
    control: PathBuf,
    directory: TempDir,
}

impl Manager {
    fn start(flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("guests")).unwrap();
        fs::write(path("config"), "[guests.a]\nshares = 5\n").unwrap();
        let control = path("manager.sock");
        let child = Command::new(DAEMON)
            .arg("manage")
            .args([Path::new("--directory"), &path("guests"), Path::new("--config"), &path("config")])
            .args([Path::new("--control-socket"), &control, Path::new("--record"), &path("record")])
            .args(flags)
            .stderr(fs::File::create(path("log")).unwrap())
            .spawn()
            .unwrap();
        let manager = Self { child, control, directory };
        manager.until(|status| status["ticks"].as_u64().unwrap_or(0) > 0);
        manager
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Asks for the status until something is so.
    fn until(&self, so: impl Fn(&Value) -> bool) -> Value {
        self.wait(|| Client::new(&self.control).get("/v1/status").ok().filter(|status| so(status)))
    }

    fn wait<T>(&self, mut so: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = so() {
                return value;
            }
            assert!(Instant::now() < deadline, "it does not happen; the log:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Runs `manage` with other words, about this manager.
    fn ask(&self, words: &[&str]) -> Output {
        let command = Command::new(DAEMON)
            .arg("manage")
            .args(words)
            .arg("--control-socket")
            .arg(&self.control)
            .output();
        command.unwrap()
    }

    fn end(mut self) -> String {
        self.signal(Signal::TERM);
        let status = self.child.wait().unwrap();
        let log = self.log();
        assert!(status.success(), "{status}: {log}");
        assert!(!self.control.exists());
        log
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(output: &Output) -> String {
    String::from_utf8([&output.stdout[..], &output.stderr].concat()).unwrap()
}

#[test]
fn a_manager_lives_with_its_guests() {
    let manager = Manager::start(&["--release-on-exit"]);
    let balloon = Balloon::start(&manager.path("guests/a.control"), 64 << 20);
    let status = manager.until(|status| status["guests"][0]["memory"] == 1 << 30);
    assert_eq!((&status["guests"][0]["name"], &status["guests"][0]["shares"]), (&json!("a"), &json!(5)));
    let output = manager.ask(&["status"]);
    assert!(output.status.success() && text(&output).contains("no statistics"), "{output:?}");

    // Another daemon hangs: nobody cares.
    let _hung = UnixListener::bind(manager.path("guests/hung.control")).unwrap();
    manager.until(|status| status["guests"][1]["failure"].is_string());
    drop(balloon);
    manager.until(|status| status["guests"].as_array().unwrap().len() == 1);
    let balloon = Balloon::start(&manager.path("guests/a.control"), 64 << 20);
    manager.until(|status| status["guests"][0]["memory"] == 1 << 30);

    let log = manager.end();
    assert_eq!(balloon.target(), 0);
    for line in [
        "Guest a is managed",
        "Guest a is gone",
        "Guest hung is left alone",
        "all guests get their memory back",
    ] {
        assert!(log.contains(line), "{line} is missing:\n{log}");
    }
}

#[test]
fn a_configuration_is_read_again() {
    let manager = Manager::start(&["--dry-run"]);
    let balloon = Balloon::start(&manager.path("guests/a.control"), 64 << 20);
    manager.until(|status| status["guests"][0]["shares"] == 5);
    fs::write(manager.path("config"), "[guests.a]\nshares = 0\n").unwrap();
    manager.signal(Signal::HUP);
    manager.wait(|| manager.log().contains("is not used, the old one stays").then_some(()));
    fs::write(manager.path("config"), "[guests.a]\nshares = 7\n").unwrap();
    manager.signal(Signal::HUP);
    manager.until(|status| status["guests"][0]["shares"] == 7);
    let output = manager.ask(&["check", "--config", "/nonexistent"]);
    assert!(!output.status.success());
    let record = manager.path("record");
    let replay = Command::new(DAEMON).args(["manage", "replay", "--json"]).arg(&record).output().unwrap();
    let summary: Value = serde_json::from_slice(&replay.stdout).unwrap();
    assert!(summary["ticks"].as_u64().unwrap() > 0, "{summary}");
    manager.end();
    assert_eq!(balloon.target(), 64 << 20);
}

#[test]
fn memory_is_reserved() {
    let manager = Manager::start(&[]);
    let output = manager.ask(&["reserve", "--name", "vm", "1M"]);
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output).starts_with("1 MiB is reserved for vm, which has 300 s to start"), "{output:?}");
    manager.until(|status| status["reserved_bytes"] == 1 << 20);
    let output = manager.ask(&["reserve", "--name", "large", "1000T"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("does not fit"), "{output:?}");
    // The guest shows up.
    let _balloon = Balloon::start(&manager.path("guests/vm.control"), 0);
    manager.until(|status| status["reserved_bytes"] == 0);
    let output = manager.ask(&["reserve", "--name", "vm", "--cancel"]);
    assert!(text(&output).contains("There is no reservation for vm"), "{output:?}");
    manager.end();
}

#[test]
fn metrics_are_for_everybody() {
    let manager = Manager::start(&["--metrics-listen", "127.0.0.1:0"]);
    let log = manager.log();
    let address =
        log.split("http://").nth(1).and_then(|rest| rest.split("/metrics").next()).unwrap().to_owned();
    let get = |path: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(get("/metrics").contains("\nballoon_manager_host_available_bytes "));
    assert!(get("/healthz").starts_with("HTTP/1.1 200 "));
    assert!(get("/v1/status").starts_with("HTTP/1.1 404 "));
    manager.end();
}

#[test]
fn events_are_followed() {
    let manager = Manager::start(&[]);
    let mut events = Command::new(DAEMON)
        .args(["manage", "events", "--control-socket"])
        .arg(&manager.control)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let (sender, receiver) = mpsc::channel();
    let reader = thread::spawn(move || lines.for_each(|line| sender.send(line.unwrap()).unwrap()));
    // Until it listens, it is told of nothing.
    let mut round = 0;
    let line = manager.wait(|| {
        round += 1;
        drop(Balloon::start(&manager.path(&format!("guests/{round}.control")), 0));
        receiver.try_recv().ok()
    });
    let event: Value = serde_json::from_str(&line).unwrap();
    assert!(event["event"].is_string() && event["ts_ms"].as_u64().unwrap() > 0, "{event}");
    manager.end();
    assert!(events.wait().unwrap().success());
    reader.join().unwrap();
}

#[test]
fn what_cannot_be_done_is_said_on_one_line() {
    let fails = |words: &[&str]| {
        let output = Command::new(DAEMON).arg("manage").args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = text(&output);
        text.lines().last().unwrap().to_owned()
    };
    assert!(fails(&[]).contains("--directory"));
    assert!(fails(&["--directory", "/nonexistent"]).contains("/nonexistent"));
    assert!(fails(&["--directory", "/", "--config", "/nonexistent"]).contains("/nonexistent"));
    assert!(fails(&["status", "--control-socket", "/nonexistent"]).contains("/nonexistent"));
    assert!(fails(&["replay", "/nonexistent"]).contains("/nonexistent"));
}
