//! What a person does with QEMU's monitor while a guest runs.
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Longest time to wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How often to look whether QEMU listens.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A connection to the monitor of a guest that has one by [`super::Guest::monitor`].
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
    /// Those that came while an answer was awaited.
    events: Vec<Value>,
}

impl Monitor {
    /// Connects to the monitor at `path`, as soon as QEMU listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + TIMEOUT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                // QEMU has not made the socket yet, or does not listen at it yet.
                Err(_) if Instant::now() < deadline => thread::sleep(LOOK_EVERY),
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("Cannot connect to QEMU's monitor at {}", path.display()));
                }
            }
        };
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut monitor = Self { reader: BufReader::new(stream), events: Vec::new() };
        monitor.line()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes a command, and returns what it does.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.reader.get_mut(), "{request}")?;
        loop {
            let mut answer = self.line().with_context(|| format!("No answer to {command}"))?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if answer.get("error").is_some() {
                bail!("QEMU answers {command} by {answer}");
            }
            self.events.push(answer);
        }
    }

    /// Waits until the device of this id is gone: for what `device_del` asks, the guest has to agree.
    pub fn wait_deleted(&mut self, id: &str) -> Result<()> {
        let is_it = |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id;
        let mut is_gone = std::mem::take(&mut self.events).iter().any(is_it);
        while !is_gone {
            is_gone = is_it(&self.line().with_context(|| format!("The device {id} stays"))?);
        }
        Ok(())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU has closed its monitor");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
