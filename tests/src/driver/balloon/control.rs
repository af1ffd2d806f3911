//! What a person does with curl on the daemon's control socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Longest time to wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How often to look at what nothing signals.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A control socket.
#[derive(Clone, Debug)]
pub struct Control {
    path: PathBuf,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status, such as 200.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body of a success.
    pub fn json(&self) -> Result<Value> {
        ensure!((200..300).contains(&self.status), "It answers {}: {}", self.status, self.body);
        if self.body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&self.body).with_context(|| format!("This is no JSON: {}", self.body))
    }
}

impl Control {
    /// The socket at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Sends a request on a connection of its own, and returns the answer, whatever it says.
    pub fn request(&self, method: &str, target: &str, body: Option<&Value>) -> Result<Answer> {
        let mut reader = self.send(method, target, body)?;
        let (status, is_chunked, length) = head(&mut reader)?;
        let mut bytes = Vec::new();
        if is_chunked {
            while let Some(mut chunk) = chunk(&mut reader)? {
                bytes.append(&mut chunk);
            }
        } else if let Some(length) = length {
            bytes.resize(length, 0);
            reader.read_exact(&mut bytes)?;
        } else {
            reader.read_to_end(&mut bytes)?;
        }
        Ok(Answer { status, body: String::from_utf8(bytes)? })
    }

    /// What `GET` gives.
    pub fn get(&self, target: &str) -> Result<Value> {
        self.request("GET", target, None)?.json().with_context(|| format!("GET {target}"))
    }

    /// What `PUT` gives.
    pub fn put(&self, target: &str, body: &Value) -> Result<Value> {
        self.request("PUT", target, Some(body))?.json().with_context(|| format!("PUT {target} {body}"))
    }

    /// Asks for a balloon of this many bytes.
    pub fn set_target(&self, bytes: u64) -> Result<Value> {
        self.put("/v1/target", &serde_json::json!({ "balloon_bytes": bytes }))
    }

    /// Everything about the balloon.
    pub fn status(&self) -> Result<Value> {
        self.get("/v1/status")
    }

    /// A number of the status, such as `actual_bytes` or `counters/duplicates`.
    pub fn number(&self, name: &str) -> Result<u64> {
        let status = self.status()?;
        let value = status.pointer(&format!("/{name}")).and_then(Value::as_u64);
        value.with_context(|| format!("The status has no number {name}: {status}"))
    }

    /// Asks the guest for statistics, and waits until they are there. Its driver has to run, or to be about to.
    pub fn fresh_statistics(&self) -> Result<Value> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let answer = self.request("GET", "/v1/statistics?fresh=1&timeout_ms=15000", None)?;
            // The daemon looks at queues that start or go on a moment later than it is told of them.
            if answer.status != 409 || Instant::now() > deadline {
                return answer.json();
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// The same in a thread that ends when they are there.
    pub fn ask_statistics(&self) -> JoinHandle<Result<Value>> {
        let control = self.clone();
        thread::spawn(move || control.fresh_statistics())
    }

    /// The events from now on.
    pub fn events(&self) -> Result<Events> {
        let mut reader = self.send("GET", "/v1/events", None)?;
        let (status, is_chunked, _) = head(&mut reader)?;
        ensure!(status == 200, "The events are refused by {status}");
        Ok(Events { reader, is_chunked, bytes: Vec::new() })
    }

    fn send(&self, method: &str, target: &str, body: Option<&Value>) -> Result<BufReader<UnixStream>> {
        let stream = UnixStream::connect(&self.path)
            .with_context(|| format!("Cannot connect to {}", self.path.display()))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let body = body.map(Value::to_string);
        let length = body
            .as_ref()
            .map(|body| format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{}\r\n{}",
            length.unwrap_or_default(),
            body.unwrap_or_default()
        );
        (&stream).write_all(request.as_bytes())?;
        Ok(BufReader::new(stream))
    }
}

/// The stream of events.
pub struct Events {
    reader: BufReader<UnixStream>,
    is_chunked: bool,
    bytes: Vec<u8>,
}

impl Events {
    /// Waits this long for each event: a guest takes its time on a loaded machine.
    pub fn with_limit(self, limit: Duration) -> Result<Self> {
        self.reader.get_ref().set_read_timeout(Some(limit))?;
        Ok(self)
    }

    /// The next event.
    pub fn next_event(&mut self) -> Result<Value> {
        loop {
            if let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                if line.len() > 1 {
                    return Ok(serde_json::from_slice(&line)?);
                }
                continue;
            }
            if self.is_chunked {
                let Some(mut more) = chunk(&mut self.reader)? else { bail!("The events have ended") };
                self.bytes.append(&mut more);
            } else {
                let read = self.reader.read_until(b'\n', &mut self.bytes)?;
                ensure!(read != 0, "The events have ended");
            }
        }
    }

    /// Waits for an event of this name.
    pub fn wait_for(&mut self, name: &str) -> Result<Value> {
        loop {
            let event = self.next_event().with_context(|| format!("There is no event {name}"))?;
            if event["event"] == name {
                return Ok(event);
            }
        }
    }
}

/// Reads the head of an answer: its status, whether its body comes in chunks, the body's length.
fn head(reader: &mut impl BufRead) -> Result<(u16, bool, Option<usize>)> {
    let first = line(reader)?;
    let status = first.split(' ').nth(1).and_then(|word| word.parse().ok());
    let status = status.with_context(|| format!("This is no answer of HTTP: {first:?}"))?;
    let (mut is_chunked, mut length) = (false, None);
    loop {
        let header = line(reader)?.to_ascii_lowercase();
        let Some((name, value)) = header.split_once(':') else { break };
        match (name, value.trim()) {
            ("transfer-encoding", "chunked") => is_chunked = true,
            ("content-length", value) => length = Some(value.parse()?),
            _ => {}
        }
    }
    Ok((status, is_chunked, length))
}

fn chunk(reader: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
    let size = usize::from_str_radix(&line(reader)?, 16).context("A chunk has no size")?;
    let mut bytes = vec![0; size];
    reader.read_exact(&mut bytes)?;
    line(reader)?;
    Ok((size != 0).then_some(bytes))
}

fn line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    ensure!(reader.read_line(&mut line)? != 0, "The connection was closed before the answer");
    Ok(line.trim_end().to_owned())
}
