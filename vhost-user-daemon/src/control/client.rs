//! The other end of a control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::http::{has_token, values};

/// How long a daemon may take for an answer, unless [`Client::set_timeout`] says otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes that an answer can have at most, unless [`Client::set_max_answer`] says otherwise, and a line of a stream.
const MAX_ANSWER: usize = 16 << 20;

/// Bytes that the head of an answer can have at most.
const MAX_HEAD: usize = 16 << 10;

/// Headers that an answer can have at most.
const MAX_HEADERS: usize = 64;

/// How long to wait before connecting again to a socket whose queue is full.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nothing is there.
    #[error("Socket {} does not exist: start the daemon with this --control-socket", path.display())]
    NoSocket {
        /// The path of the socket.
        path: PathBuf,
    },

    /// A daemon that was killed left it behind.
    #[error("Nobody listens on socket {}: the daemon has ended, start it again", path.display())]
    NobodyListens {
        /// The path of the socket.
        path: PathBuf,
    },

    /// The file system does not let this user connect.
    #[error("Socket {} is not for this user: be the one who runs the daemon, or root", path.display())]
    Denied {
        /// The path of the socket.
        path: PathBuf,
    },

    /// There is no connection, for another reason.
    #[error("Cannot connect to socket {}", path.display())]
    Connect {
        /// The path of the socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// Nothing came in time.
    #[error(
        "The daemon on socket {} does not answer within {} s: it may be stopped or overloaded, or this may be another \
         socket than its --control-socket",
        path.display(), timeout.as_secs_f64()
    )]
    Timeout {
        /// The path of the socket.
        path: PathBuf,
        /// How long was waited.
        timeout: Duration,
    },

    /// The connection was closed before there was an answer.
    #[error(
        "The daemon on socket {} closed the connection: its log says why if it has refused this user, otherwise it \
         has ended, or this is another socket than its --control-socket",
        path.display()
    )]
    Closed {
        /// The path of the socket.
        path: PathBuf,
    },

    /// The connection failed.
    #[error("The connection to socket {} failed", path.display())]
    Io {
        /// The path of the socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// What came is not HTTP, or not what this client understands of it.
    #[error("What listens on socket {} does not speak HTTP: give the --control-socket of the daemon", path.display())]
    NotHttp {
        /// The path of the socket.
        path: PathBuf,
    },

    /// The daemon has another idea of the answer.
    #[error(
        "The answer on socket {} to {request} is not understood: use a client of the daemon's version",
        path.display()
    )]
    Answer {
        /// The path of the socket.
        path: PathBuf,
        /// Method and path of the request.
        request: String,
        /// Why.
        source: serde_json::Error,
    },

    /// The daemon refused the request.
    #[error("{message} (socket {}, status {status})", path.display())]
    Refused {
        /// The path of the socket.
        path: PathBuf,
        /// The status code: 400 and up.
        status: u16,
        /// Why, in the daemon's words.
        message: String,
    },
}

/// A client of one daemon. It connects when there is something to ask, and keeps the connection for the next time.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
    max_answer: usize,
    connection: Option<BufReader<UnixStream>>,
}

/// An answer's head.
struct Head {
    status: u16,
    /// How long the body is; up to the end of the connection if that is not said.
    length: Option<usize>,
    close: bool,
}

impl Client {
    /// A client for the socket at `path`. Nothing is done yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.into(), timeout: TIMEOUT, max_answer: MAX_ANSWER, connection: None }
    }

    /// Sets how long each request may take in all.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sets how many bytes an answer may have at most: a longer one is an error. For who talks to many daemons, and does not
    /// trust them with its memory.
    pub fn set_max_answer(&mut self, bytes: usize) {
        self.max_answer = bytes.min(MAX_ANSWER);
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks for something. `target` is the path with the query.
    pub fn get<T: DeserializeOwned>(&mut self, target: &str) -> Result<T, ClientError> {
        self.request("GET", target, None)
    }

    /// Sets something. An answer without content is `()`, or the `None` of an option.
    pub fn put<T: DeserializeOwned>(
        &mut self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send_json("PUT", target, body)
    }

    /// Changes something.
    pub fn patch<T: DeserializeOwned>(
        &mut self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send_json("PATCH", target, body)
    }

    /// Does something, exactly once unless there is an error.
    pub fn post<T: DeserializeOwned>(
        &mut self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send_json("POST", target, body)
    }

    /// Removes something.
    pub fn delete<T: DeserializeOwned>(&mut self, target: &str) -> Result<T, ClientError> {
        self.request("DELETE", target, None)
    }

    /// Asks for a text that is not JSON, such as metrics.
    pub fn get_text(&mut self, target: &str) -> Result<String, ClientError> {
        let body = self.exchange("GET", target, None)?;
        String::from_utf8(body).map_err(|_| ClientError::NotHttp { path: self.path.clone() })
    }

    /// Follows a stream of JSON lines, on a connection of its own. It lasts until the daemon ends: there is no time-out
    /// for the next line.
    pub fn stream<T: DeserializeOwned>(&self, target: &str) -> Result<Lines<T>, ClientError> {
        let deadline = Instant::now() + self.timeout;
        let mut connection = self.connect(deadline)?;
        self.send(&mut connection, &request_head("GET", target, None), deadline)?;
        let head = self.read_head(&mut connection, deadline)?;
        if head.status >= 400 {
            let body = self.read_body(&mut connection, &head, deadline)?;
            return Err(self.refused(head.status, &body));
        }
        connection.get_ref().set_read_timeout(None).map_err(|source| self.failed(source))?;
        Ok(Lines {
            path: self.path.clone(),
            request: format!("GET {target}"),
            connection,
            event: PhantomData,
        })
    }

    fn send_json<T: DeserializeOwned>(
        &mut self,
        method: &str,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|source| self.not_understood(method, target, source))?;
        self.request(method, target, Some(&body))
    }

    fn request<T: DeserializeOwned>(
        &mut self,
        method: &str,
        target: &str,
        body: Option<&[u8]>,
    ) -> Result<T, ClientError> {
        let answer = self.exchange(method, target, body)?;
        let answer = if answer.is_empty() { b"null" } else { &answer[..] };
        serde_json::from_slice(answer).map_err(|source| self.not_understood(method, target, source))
    }

    /// Sends a request, and gives the body of the answer.
    fn exchange(&mut self, method: &str, target: &str, body: Option<&[u8]>) -> Result<Vec<u8>, ClientError> {
        let deadline = Instant::now() + self.timeout;
        let mut request = request_head(method, target, body.map(<[u8]>::len));
        request.extend_from_slice(body.unwrap_or_default());
        // The daemon may close a connection that is idle at any moment, or have been started anew. Then the request
        // has to be sent again, which does no harm unless it is one that counts.
        if let Some(mut connection) = self.connection.take()
            && method != "POST"
        {
            match self.exchange_on(&mut connection, &request, deadline) {
                Err(ClientError::Closed { .. } | ClientError::Io { .. }) => {}
                Ok((head, body)) => return self.finish(connection, &head, body),
                Err(error) => return Err(error),
            }
        }
        let mut connection = self.connect(deadline)?;
        let (head, body) = self.exchange_on(&mut connection, &request, deadline)?;
        self.finish(connection, &head, body)
    }

    /// Sends a request on a connection, and reads the answer.
    fn exchange_on(
        &self,
        connection: &mut BufReader<UnixStream>,
        request: &[u8],
        deadline: Instant,
    ) -> Result<(Head, Vec<u8>), ClientError> {
        // A daemon that refuses a request may do so before it has read it whole: its answer says why.
        let sent = self.send(connection, request, deadline);
        let head = match (self.read_head(connection, deadline), sent) {
            (Ok(head), _) => head,
            (Err(_), Err(error)) | (Err(error), Ok(())) => return Err(error),
        };
        let body = self.read_body(connection, &head, deadline)?;
        Ok((head, body))
    }

    /// Keeps the connection if it can be used again.
    fn finish(
        &mut self,
        connection: BufReader<UnixStream>,
        head: &Head,
        body: Vec<u8>,
    ) -> Result<Vec<u8>, ClientError> {
        if !head.close && connection.buffer().is_empty() {
            self.connection = Some(connection);
        }
        if head.status >= 400 { Err(self.refused(head.status, &body)) } else { Ok(body) }
    }

    fn connect(&self, deadline: Instant) -> Result<BufReader<UnixStream>, ClientError> {
        loop {
            match connect(&self.path) {
                Ok(stream) => return Ok(BufReader::new(stream)),
                // Its queue is full.
                Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(CONNECT_RETRY),
                Err(error) => {
                    let path = self.path.clone();
                    return Err(match error {
                        Errno::NOENT | Errno::NOTDIR => ClientError::NoSocket { path },
                        Errno::CONNREFUSED => ClientError::NobodyListens { path },
                        Errno::ACCESS | Errno::PERM => ClientError::Denied { path },
                        Errno::AGAIN => ClientError::Timeout { path, timeout: self.timeout },
                        error => ClientError::Connect { path, source: error.into() },
                    });
                }
            }
        }
    }

    fn send(
        &self,
        connection: &mut BufReader<UnixStream>,
        request: &[u8],
        deadline: Instant,
    ) -> Result<(), ClientError> {
        let stream = connection.get_mut();
        let timed = stream.set_write_timeout(Some(remaining(deadline)));
        timed.and_then(|()| stream.write_all(request)).map_err(|source| self.failed(source))
    }

    /// Reads up to the empty line, and skips answers that say nothing yet (1xx).
    fn read_head(
        &self,
        connection: &mut BufReader<UnixStream>,
        deadline: Instant,
    ) -> Result<Head, ClientError> {
        let not_http = || ClientError::NotHttp { path: self.path.clone() };
        let mut text = Vec::new();
        loop {
            let start = text.len();
            self.read_line(connection, &mut text, deadline)?;
            if text.len() > MAX_HEAD {
                return Err(not_http());
            }
            if !matches!(&text[start..], b"\r\n" | b"\n") {
                // The rest of something else than HTTP may never come.
                if start == 0 && !text.starts_with(b"HTTP/1.") {
                    return Err(not_http());
                }
                continue;
            }
            let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut head = httparse::Response::new(&mut headers);
            match head.parse(&text) {
                Ok(httparse::Status::Complete(_)) => {}
                _ => return Err(not_http()),
            }
            match head.code {
                Some(100..200) => text.clear(),
                Some(status) => return parse_head(status, head.version, head.headers).ok_or_else(not_http),
                None => return Err(not_http()),
            }
        }
    }

    /// Appends a line, with its end, to `line`.
    fn read_line(
        &self,
        connection: &mut BufReader<UnixStream>,
        line: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<(), ClientError> {
        loop {
            self.limit_read(connection, deadline)?;
            let buffer = match connection.fill_buf() {
                Ok([]) => return Err(ClientError::Closed { path: self.path.clone() }),
                Ok(buffer) => buffer,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failed(error)),
            };
            let end = buffer.iter().position(|byte| *byte == b'\n');
            let length = end.map_or(buffer.len(), |end| end + 1);
            line.extend_from_slice(&buffer[..length]);
            connection.consume(length);
            if end.is_some() || line.len() > MAX_HEAD {
                return Ok(());
            }
        }
    }

    fn read_body(
        &self,
        connection: &mut BufReader<UnixStream>,
        head: &Head,
        deadline: Instant,
    ) -> Result<Vec<u8>, ClientError> {
        let mut body = Vec::new();
        let wanted = head.length.unwrap_or(self.max_answer);
        if wanted > self.max_answer {
            return Err(ClientError::NotHttp { path: self.path.clone() });
        }
        while body.len() < wanted {
            self.limit_read(connection, deadline)?;
            let mut buffer = [0; 4096];
            let room = buffer.len().min(wanted - body.len());
            match connection.read(&mut buffer[..room]) {
                Ok(0) if head.length.is_none() => break,
                Ok(0) => return Err(ClientError::Closed { path: self.path.clone() }),
                Ok(length) => body.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(body)
    }

    /// Makes the next read end when the time is over.
    fn limit_read(&self, connection: &BufReader<UnixStream>, deadline: Instant) -> Result<(), ClientError> {
        connection.get_ref().set_read_timeout(Some(remaining(deadline))).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> ClientError {
        failed(&self.path, self.timeout, source)
    }

    fn not_understood(&self, method: &str, target: &str, source: serde_json::Error) -> ClientError {
        ClientError::Answer { path: self.path.clone(), request: format!("{method} {target}"), source }
    }

    fn refused(&self, status: u16, body: &[u8]) -> ClientError {
        #[derive(Deserialize)]
        struct Fault {
            fault_message: String,
        }
        let message = match serde_json::from_slice(body) {
            Ok(Fault { fault_message }) => fault_message,
            Err(_) => "The daemon refused the request and does not say why".into(),
        };
        ClientError::Refused { path: self.path.clone(), status, message }
    }
}

/// The events of a [`Client::stream`]. It ends when the daemon closes the connection.
#[derive(Debug)]
pub struct Lines<T> {
    path: PathBuf,
    request: String,
    connection: BufReader<UnixStream>,
    event: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Iterator for Lines<T> {
    type Item = Result<T, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        let mut limited = (&mut self.connection).take(MAX_ANSWER as u64);
        match limited.read_until(b'\n', &mut line) {
            // The end, possibly in the middle of a line.
            Ok(_) if line.last() != Some(&b'\n') => None,
            Ok(_) => Some(serde_json::from_slice(&line).map_err(|source| ClientError::Answer {
                path: self.path.clone(),
                request: self.request.clone(),
                source,
            })),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => Some(Err(failed(&self.path, Duration::MAX, error))),
        }
    }
}

/// Connects, without waiting. The stream is in blocking mode.
fn connect(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(UnixStream::from(socket))
}

/// The time that is left, at least a moment: zero would mean "for ever".
fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

fn failed(path: &Path, timeout: Duration, source: io::Error) -> ClientError {
    let path = path.into();
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Timeout { path, timeout },
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed { path },
        _ => ClientError::Io { path, source },
    }
}

fn request_head(method: &str, target: &str, length: Option<usize>) -> Vec<u8> {
    let body = length.map_or_else(String::new, |length| {
        format!("Content-Type: application/json\r\nContent-Length: {length}\r\n")
    });
    format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n{body}\r\n")
        .into_bytes()
}

/// `None` if it is more than this client understands.
fn parse_head(status: u16, version: Option<u8>, headers: &[httparse::Header<'_>]) -> Option<Head> {
    if values(headers, "transfer-encoding").next().is_some() {
        return None;
    }
    let length = match values(headers, "content-length").next() {
        _ if status == 204 => Some(0),
        Some(length) => Some(length.parse().ok().filter(|length| *length <= MAX_ANSWER)?),
        None => None,
    };
    let close = length.is_none() || version != Some(1) || has_token(headers, "connection", "close");
    Some(Head { status, length, close })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    /// Answers each connection with a text, in turn, and closes it. Returns what was asked.
    fn answer(path: &Path, answers: &'static [&'static str]) -> thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let serve = |answer: &&str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let length = stream.read(&mut request).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                String::from_utf8_lossy(&request[..length]).into_owned()
            };
            answers.iter().map(serve).collect()
        })
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        (directory, path)
    }

    #[test]
    fn a_socket_that_is_none_is_named_with_the_remedy() {
        let (_directory, path) = place();
        let mut client = Client::new(&path);
        let error = client.get::<()>("/").unwrap_err();
        assert!(matches!(error, ClientError::NoSocket { .. }), "{error}");
        assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
        drop(UnixListener::bind(&path).unwrap());
        // Another test may be starting a child process, which shares the socket for a moment.
        let error = loop {
            match client.get::<()>("/").unwrap_err() {
                ClientError::Closed { .. } | ClientError::Timeout { .. } => thread::yield_now(),
                error => break error,
            }
        };
        assert!(matches!(error, ClientError::NobodyListens { .. }), "{error}");
        if !rustix::process::geteuid().is_root() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
            assert!(matches!(client.get::<()>("/"), Err(ClientError::Denied { .. })));
        }
        let long = Path::new("/").join("x".repeat(200));
        assert!(matches!(Client::new(&long).get::<()>("/"), Err(ClientError::Connect { .. })));
    }

    #[test]
    fn a_daemon_that_says_nothing_is_not_waited_for() {
        let (_directory, path) = place();
        let _listener = UnixListener::bind(&path).unwrap();
        let mut client = Client::new(&path);
        client.set_timeout(Duration::from_millis(50));
        let error = client.get::<()>("/").unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
        assert!(matches!(client.stream::<()>("/"), Err(ClientError::Timeout { .. })));
    }

    #[test]
    fn what_is_not_an_answer_is_an_error() {
        let (_directory, path) = place();
        let thread = answer(
            &path,
            &[
                "",
                "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12",
                "\u{1}\u{2}\n",
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
                "HTTP/1.1 500 X\r\nContent-Length: 1\r\n\r\nx",
                "HTTP/1.1 409 X\r\n\r\n{\"fault_message\": \"No driver\"}",
            ],
        );
        let mut client = Client::new(&path);
        let mut error = || client.get::<u64>("/a").unwrap_err();
        assert!(matches!(error(), ClientError::Closed { .. }));
        assert!(matches!(error(), ClientError::Closed { .. }));
        assert!(matches!(error(), ClientError::NotHttp { .. }));
        assert!(matches!(error(), ClientError::NotHttp { .. }));
        assert!(matches!(error(), ClientError::Answer { .. }));
        assert!(matches!(error(), ClientError::Refused { status: 500, .. }));
        assert!(error().to_string().starts_with("No driver (socket /"));
        assert!(thread.join().unwrap()[0].starts_with("GET /a HTTP/1.1\r\nHost: "));
    }

    #[test]
    fn a_connection_that_was_closed_is_replaced() {
        let (_directory, path) = place();
        let thread = answer(
            &path,
            &[
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1",
                "HTTP/1.1 204 Done\r\n\r\n",
                "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n3",
                "HTTP/1.1 200 OK\r\n\r\n\"a\"\n\"b\"\n\"c",
            ],
        );
        let mut client = Client::new(&path);
        assert_eq!(client.get::<u64>("/").unwrap(), 1);
        client.patch::<()>("/", &5).unwrap();
        assert_eq!(client.post::<Option<u64>>("/", &"x").unwrap(), Some(3));
        let lines: Result<Vec<String>, _> = client.stream("/events").unwrap().collect();
        assert_eq!(lines.unwrap(), ["a", "b"]);
        let requests = thread.join().unwrap();
        assert!(requests[1].ends_with("Content-Length: 1\r\n\r\n5"), "{}", requests[1]);
        assert!(requests[2].starts_with("POST "));
    }
}
