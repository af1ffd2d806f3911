//! A program behind a stream socket, such as passt: takes all frames, and sends some when asked to.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::frame::Frame;

/// A listener that is not connected yet.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    folder: TempDir,
}

/// A connected peer.
pub struct Peer {
    stream: UnixStream,
    reader: Option<JoinHandle<()>>,
    _folder: TempDir,
}

impl Listener {
    /// Listens in a temporary folder.
    pub fn new() -> Result<Self> {
        let folder = TempDir::with_prefix("net-bench-")?;
        let path = folder.path().join("peer");
        let socket = UnixListener::bind(&path).context("Cannot listen")?;
        Ok(Self { socket, path, folder })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the daemon, and throws away what it sends from then on.
    pub fn accept(self) -> Result<Peer> {
        let (stream, _) = self.socket.accept()?;
        let mut input = stream.try_clone()?;
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            while input.read(&mut buffer).is_ok_and(|len| len > 0) {}
        });
        Ok(Peer { stream, reader: Some(reader), _folder: self.folder })
    }
}

impl Peer {
    /// Sends a frame over and over for `duration`, `per_call` of them in each call.
    pub fn send(&self, frame: &Frame, per_call: usize, duration: Duration) -> Result<()> {
        let len = u32::try_from(frame.bytes.len())?;
        let frames = [&len.to_be_bytes()[..], &frame.bytes].concat().repeat(per_call);
        let start = Instant::now();
        while start.elapsed() < duration {
            (&self.stream).write_all(&frames).context("Cannot send to the daemon")?;
        }
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails if the daemon was first.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
