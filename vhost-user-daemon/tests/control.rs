//! The control socket, from the outside.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_user_daemon::control::metrics::{Kind, Page};
use vhost_user_daemon::control::{
    Bell, Client, ClientError, Endpoint, Feed, Handler, MAX_CLIENTS, Method, Reply, Request, Response, Server,
};
use vhost_user_daemon::socket::Socket;

/// A number that can be read, set, and waited for.
struct Number {
    number: Arc<AtomicU64>,
    feed: Feed,
}

impl Handler for Number {
    fn handle(&self, request: &Request) -> Reply {
        let now = || Response::json(&self.number.load(Ordering::SeqCst));
        match (request.method, &*request.path) {
            (Method::Get, "/number") => now().into(),
            (Method::Put, "/number") => match request.json::<u64>() {
                Ok(number) => {
                    self.number.store(number, Ordering::SeqCst);
                    self.feed.publish(&number);
                    Response::no_content().into()
                }
                Err(response) => response.into(),
            },
            (Method::Get, "/wait") => {
                let number = Arc::clone(&self.number);
                let timeout = request.query("ms").and_then(|text| text.parse().ok()).unwrap_or(60_000);
                Reply::Later {
                    deadline: Instant::now() + Duration::from_millis(timeout),
                    ready: Box::new(move |_| match number.load(Ordering::SeqCst) {
                        0 => None,
                        number => Some(Response::json(&number)),
                    }),
                }
            }
            (Method::Get, "/events") => Reply::Stream(self.feed.subscribe(0)),
            (_, "/number") => Response::method_not_allowed("GET, PUT").into(),
            _ => Response::not_found(request).into(),
        }
    }
}

struct Fixture {
    _directory: TempDir,
    path: PathBuf,
    bell: Bell,
    number: Arc<AtomicU64>,
    feed: Feed,
    server: Server,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let bell = Bell::new().unwrap();
        let feed = Feed::new(&bell, |lost| format!("\"lost {lost}\""));
        let number = Arc::new(AtomicU64::new(0));
        let handler = Number { number: Arc::clone(&number), feed: feed.clone() };
        let endpoint = Endpoint::socket(Socket::open_private(&path).unwrap(), Arc::new(handler));
        let server = Server::start(&bell, vec![endpoint]).unwrap();
        Self { _directory: directory, path, bell, number, feed, server }
    }

    fn client(&self) -> Client {
        Client::new(&self.path)
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// Opens a connection that holds a place until it is dropped.
    fn occupy(&self) -> BufReader<UnixStream> {
        let mut stream = self.connect();
        stream.write_all(b"GET /events HTTP/1.1\r\n\r\n").unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).unwrap();
        }
        stream
    }
}

/// All that comes until the connection is closed.
fn read_all(mut stream: impl Read) -> String {
    let mut output = Vec::new();
    // Who is refused with something unread gets an error after the answer.
    let _ = stream.read_to_end(&mut output);
    String::from_utf8_lossy(&output).into_owned()
}

#[test]
fn numbers_go_back_and_forth() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    assert_eq!(client.get::<u64>("/number").unwrap(), 0);
    client.put::<()>("/number", &7).unwrap();
    assert_eq!(client.get::<u64>("/number?x=y").unwrap(), 7);
    for (result, wanted) in [
        (client.put::<()>("/number", &"x"), 400),
        (client.post("/number", &1), 405),
        (client.delete("/number"), 405),
        (client.patch("/other", &1), 404),
        (client.get("/"), 404),
    ] {
        assert!(matches!(result, Err(ClientError::Refused { status, .. }) if status == wanted), "{result:?}");
    }
    assert_eq!(client.get::<u64>("/number").unwrap(), 7);
}

#[test]
fn the_socket_is_for_its_user_and_goes_with_the_server() {
    let fixture = Fixture::new();
    let metadata = std::fs::metadata(&fixture.path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let mut client = fixture.client();
    client.get::<u64>("/number").unwrap();
    let idle = fixture.connect();
    let path = fixture.path.clone();
    drop(fixture.server);
    assert!(!path.exists() && !path.with_extension("lock").exists());
    assert_eq!(read_all(idle), "");
    assert!(matches!(client.get::<u64>("/number"), Err(ClientError::NoSocket { .. })));
}

#[test]
fn who_waits_is_answered_when_the_bell_rings_and_disturbs_nobody() {
    let fixture = Fixture::new();
    thread::scope(|scope| {
        let waiting: Vec<_> =
            (0..3).map(|_| scope.spawn(|| fixture.client().get::<u64>("/wait?ms=100000"))).collect();
        let error = fixture.client().get::<u64>("/wait?ms=20").unwrap_err();
        assert!(matches!(error, ClientError::Refused { status: 504, .. }), "{error}");
        assert_eq!(fixture.client().get::<u64>("/number").unwrap(), 0);
        fixture.number.store(5, Ordering::SeqCst);
        fixture.bell.ring();
        for thread in waiting {
            assert_eq!(thread.join().unwrap().unwrap(), 5);
        }
    });
}

#[test]
fn slow_and_strange_clients_disturb_nobody() {
    let fixture = Fixture::new();
    let mut held = Vec::new();
    for start in
        ["", "G", "GET /number HTTP/1.1\r\nA: b", "PUT /number HTTP/1.1\r\nContent-Length: 10\r\n\r\n123"]
    {
        let mut stream = fixture.connect();
        stream.write_all(start.as_bytes()).unwrap();
        held.push(stream);
    }
    for garbage in
        ["\0\u{1}\u{2}\r\n\r\n", "GET\r\n\r\n", "BREW /pot HTTP/1.1\r\n\r\n", "GET / HTTP/9.9\r\n\r\n"]
    {
        let mut stream = fixture.connect();
        stream.write_all(garbage.as_bytes()).unwrap();
        let answer = read_all(stream);
        assert!(answer.starts_with("HTTP/1.1 40"), "{garbage:?}: {answer}");
    }
    // More than it takes, and the refusal gets through all the same.
    let mut stream = fixture.connect();
    let _ = stream.write_all(&vec![b'x'; 1 << 20]);
    let answer = read_all(stream);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    assert_eq!(fixture.client().get::<u64>("/number").unwrap(), 0);
    // Those that are only slow are served in the end.
    let mut slow = held.pop().unwrap();
    slow.write_all(b"4567      ").unwrap();
    drop(slow.shutdown(std::net::Shutdown::Write));
    assert!(read_all(slow).starts_with("HTTP/1.1 204 "));
    assert_eq!(fixture.client().get::<u64>("/number").unwrap(), 1_234_567);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let fixture = Fixture::new();
    let mut stream = fixture.connect();
    let one = |number| {
        format!("PUT /number HTTP/1.1\r\nContent-Length: 1\r\n\r\n{number}GET /number HTTP/1.1\r\n\r\n")
    };
    let requests: String = (0..10).map(one).collect();
    stream.write_all(requests.as_bytes()).unwrap();
    stream.write_all(b"GET /number HTTP/1.0\r\n\r\n").unwrap();
    let answers = read_all(stream);
    let numbers: Vec<&str> = answers.lines().filter(|line| line.len() == 1).collect();
    assert_eq!(numbers, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "9"]);
}

#[test]
fn there_are_so_many_clients_and_no_more() {
    let fixture = Fixture::new();
    // An idle one makes place.
    let mut idle = fixture.client();
    idle.get::<u64>("/number").unwrap();
    let mut readers: Vec<_> = (0..MAX_CLIENTS).map(|_| fixture.occupy()).collect();
    let error = fixture.client().get::<u64>("/number").unwrap_err();
    assert!(matches!(error, ClientError::Refused { status: 503, .. }), "{error}");
    fixture.feed.publish(&"hello");
    for reader in &mut readers {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "\"hello\"\n");
    }
    readers.pop();
    // The server notices that a moment later.
    loop {
        match idle.get::<u64>("/number") {
            Err(ClientError::Refused { status: 503, .. }) => thread::yield_now(),
            result => break assert_eq!(result.unwrap(), 0),
        }
    }
}

#[test]
fn events_reach_a_client_and_a_slow_one_learns_what_it_missed() {
    let fixture = Fixture::new();
    let mut events = fixture.client().stream::<u64>("/events").unwrap();
    let slow = fixture.client().stream::<serde_json::Value>("/events").unwrap();
    for number in 0..10 {
        fixture.client().put::<()>("/number", &number).unwrap();
        assert_eq!(events.next().unwrap().unwrap(), number);
    }
    drop(events);
    let total = 200_000;
    for number in 10..total {
        fixture.feed.publish(&number);
    }
    fixture.feed.publish(&"end");
    let (mut expected, mut lost) = (0, 0);
    for event in slow {
        match event.unwrap() {
            serde_json::Value::Number(number) => {
                assert_eq!(number.as_u64(), Some(expected));
                expected += 1;
            }
            serde_json::Value::String(text) if text == "end" => break,
            serde_json::Value::String(text) => {
                let count: u64 = text.strip_prefix("lost ").unwrap().parse().unwrap();
                expected += count;
                lost += count;
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(expected, total);
    assert!(lost > 0);
}

/// Counts who asked, and shows it as a metric.
struct Metrics(Mutex<u64>);

impl Handler for Metrics {
    fn handle(&self, _: &Request) -> Reply {
        let mut count = self.0.lock().unwrap();
        *count += 1;
        let mut page = Page::new();
        page.single("requests_total", Kind::Counter, "Requests.", *count);
        page.into_response().into()
    }
}

#[test]
fn a_port_has_its_own_handler() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let bell = Bell::new().unwrap();
    let feed = Feed::new(&bell, |_| String::new());
    let endpoints = vec![
        Endpoint::socket(
            Socket::open_private(&path).unwrap(),
            Arc::new(Number { number: Arc::default(), feed }),
        ),
        Endpoint::tcp(listener, Arc::new(Metrics(Mutex::new(0)))),
    ];
    let _server = Server::start(&bell, endpoints).unwrap();
    for count in 1..3 {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        assert!(read_all(stream).ends_with(&format!("\nrequests_total {count}\n")));
    }
    assert_eq!(Client::new(&path).get::<u64>("/number").unwrap(), 0);
}

#[test]
fn a_socket_that_does_not_listen_is_refused() {
    let bell = Bell::new().unwrap();
    let (connected, _other) = UnixStream::pair().unwrap();
    let endpoint = Endpoint::socket(Socket::Connected(connected), Arc::new(Metrics(Mutex::new(0))));
    let error = Server::start(&bell, vec![endpoint]).unwrap_err();
    assert!(error.to_string().contains("does not listen"), "{error}");
    assert!(!Path::new("control").exists());
}
