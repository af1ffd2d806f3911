//! What a tap costs whoever uses it: one thread that writes to it or reads from it, and does nothing else.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use tests::netns::packet::PacketSocket;
use tests::netns::{Namespace, open};

use super::frame::Frame;
use super::guest::{BUFFER, RECEIVE_QUEUE};
use super::{LONG_HEADER_LEN, Run, sys};

/// Looking at the clock for each frame would be a cost of its own.
const LOOK_EVERY: usize = 64;
/// Larger than any cache of today.
const COLD: usize = 256 << 20;
const RING: usize = 2 << 20;
/// Frames that a tap's queue holds.
pub const TX_QUEUE_LEN: u64 = 4096;
const LIMIT: Duration = Duration::from_secs(10);
/// Time without a frame after which no more are under way.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// The memory that frames are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Always the same.
    Hot,
    /// As much as [`Guest`](super::guest::Guest) has, in turn, in pieces of the same size.
    Ring,
    /// As much as no cache holds, in turn.
    Cold,
    /// The same, in pieces as above.
    ColdPieces,
}

/// A tap with nobody behind it.
pub struct Tap {
    fd: OwnedFd,
    /// Sends frames to whoever reads from the tap.
    socket: PacketSocket,
    space: Vec<u8>,
}

impl Tap {
    /// Makes one.
    pub fn new(namespace: &Namespace, name: &str) -> Result<Self> {
        let fd = open::tap(namespace, name, open::TapOptions::default())?.pop().context("No tap")?;
        rustix::io::ioctl_fionbio(&fd, true)?;
        sys::take_large_frames(&fd).context("The tap takes no offloads")?;
        namespace.ip(&format!("link set {name} txqueuelen {TX_QUEUE_LEN} up"))?;
        let socket = open::packet(namespace, name)?;
        Ok(Self { fd, socket, space: Vec::new() })
    }

    /// Memory for as many frames as it holds, each in `stride` bytes.
    fn space(&mut self, memory: Memory, stride: usize) -> &mut [u8] {
        if self.space.is_empty() {
            // Written once, or all of it would be the same page of zeroes.
            self.space = vec![1; COLD];
        }
        let len = match memory {
            Memory::Hot => stride,
            Memory::Ring => RING,
            Memory::Cold | Memory::ColdPieces => COLD,
        };
        &mut self.space[..len]
    }

    /// Writes a frame over and over for `duration`.
    pub fn write(&mut self, frame: &Frame, memory: Memory, duration: Duration) -> Result<Run> {
        let packet = frame.with_header();
        let (header, bytes) = packet.split_at(LONG_HEADER_LEN);
        let stride = bytes.len().next_multiple_of(64);
        for place in self.space(memory, stride).chunks_exact_mut(stride) {
            place[..bytes.len()].copy_from_slice(bytes);
        }
        let len = self.space(memory, stride).len();
        let mut places = self.space[..len].chunks_exact(stride).map(|place| &place[..bytes.len()]).cycle();

        let start = Instant::now();
        let cpu = thread_time();
        let mut frames = 0;
        while start.elapsed() < duration {
            for place in places.by_ref().take(LOOK_EVERY) {
                let written = rustix::io::writev(&self.fd, &[IoSlice::new(header), IoSlice::new(place)])
                    .context("Cannot write to the tap")?;
                ensure!(written == packet.len(), "A part of a frame was written");
                frames += 1;
            }
        }
        Ok(Run {
            frames,
            large: if frame.is_large() { frames } else { 0 },
            cpu: thread_time().saturating_sub(cpu),
            elapsed: start.elapsed(),
            ..Run::default()
        })
    }

    /// Reads what is sent at the tap for `duration`: bursts that wait in its queue, or frames as they come.
    pub fn read(
        &mut self,
        frame: &Frame,
        memory: Memory,
        in_bursts: bool,
        duration: Duration,
    ) -> Result<Run> {
        let stride = frame.with_header().len().next_multiple_of(BUFFER);
        let len = self.space(memory, stride).len();
        let piece = if matches!(memory, Memory::Ring | Memory::ColdPieces) { BUFFER } else { stride };
        let places = self.space[..len].chunks_exact_mut(stride);
        let mut reader = Reader {
            tap: &self.fd,
            places: places.map(|place| place.chunks_mut(piece).map(IoSliceMut::new).collect()).collect(),
            next: 0,
            run: Run::default(),
        };
        let start = Instant::now();
        let socket = &self.socket;
        // The sender is another thread, as it is for the daemon: what a processor has just written is cheap to read there.
        if in_bursts {
            let (full, is_full) = mpsc::channel();
            let (empty, is_empty) = mpsc::channel();
            std::thread::scope(|scope| {
                let sender = scope.spawn(move || -> Result<()> {
                    while start.elapsed() < duration {
                        burst(socket, frame)?;
                        if full.send(()).is_err() || is_empty.recv().is_err() {
                            break;
                        }
                    }
                    Ok(())
                });
                while is_full.recv().is_ok() {
                    reader.read(Timespec::default())?;
                    if empty.send(()).is_err() {
                        break;
                    }
                }
                drop(empty);
                sender.join().expect("no panic")
            })?;
        } else {
            std::thread::scope(|scope| {
                let sender = scope.spawn(|| offer(socket, frame, duration));
                reader.read(QUIET)?;
                sender.join().expect("no panic")
            })?;
        }
        Ok(Run { elapsed: start.elapsed(), ..reader.run })
    }
}

/// Sends a frame over and over for `duration`, faster or slower than it is received.
pub fn offer(socket: &PacketSocket, frame: &Frame, duration: Duration) -> Result<()> {
    let sent = socket.blast(frame.header, std::slice::from_ref(&frame.bytes), u64::MAX, duration)?;
    ensure!(sent > 0, "Nothing was sent");
    Ok(())
}

/// Sends as many frames as fill all receive buffers of a [`Guest`](super::guest::Guest).
pub fn burst(socket: &PacketSocket, frame: &Frame) -> Result<()> {
    let buffers = if frame.is_large() { frame.with_header().len().div_ceil(BUFFER) } else { 1 };
    let count = u64::from(RECEIVE_QUEUE) / buffers as u64;
    let sent = socket.blast(frame.header, std::slice::from_ref(&frame.bytes), count, LIMIT)?;
    ensure!(sent == count, "{sent} of {count} frames found room in the tap's queue");
    Ok(())
}

/// Reads from a tap into one place after the other.
struct Reader<'a> {
    tap: &'a OwnedFd,
    places: Vec<Vec<IoSliceMut<'a>>>,
    next: usize,
    run: Run,
}

impl Reader<'_> {
    /// Reads until nothing comes for some time. The first frame may take longer.
    fn read(&mut self, quiet: Timespec) -> Result<()> {
        let cpu = thread_time();
        let mut patience = Timespec { tv_sec: 5, tv_nsec: 0 };
        loop {
            match poll(&mut [PollFd::new(self.tap, PollFlags::IN)], Some(&patience)) {
                Ok(0) => break,
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            patience = quiet;
            self.run.sleeps += 1;
            loop {
                match rustix::io::readv(self.tap, &mut self.places[self.next]) {
                    Ok(len) => {
                        self.run.frames += 1;
                        self.run.large += u64::from(len > 2 * BUFFER);
                    }
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(error).context("Cannot read from the tap"),
                }
                self.next = (self.next + 1) % self.places.len();
            }
        }
        self.run.cpu += thread_time().saturating_sub(cpu);
        Ok(())
    }
}

/// The CPU time of this thread so far.
fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
