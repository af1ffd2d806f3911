//! A capture of the frames that pass, in the format that Wireshark and tcpdump read: pcap with nanoseconds.
//!
//! Frames are collected in memory and written in blocks of whole records. A disk that fails or is full ends the capture
//! and nothing else.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::mem;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use pcap_file::{DataLink, Endianness, TsResolution};
use thiserror::Error;

/// Bytes of a frame that are captured at most: what Wireshark takes for Ethernet.
pub const MAX_SNAP_LEN: u32 = 262_144;

/// Bytes that are collected before they are written.
const BLOCK: usize = 64 << 10;

/// Longest time that a frame waits for the block to fill up, if another one comes.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes of the header of a file.
const FILE_HEADER_LEN: usize = 24;

/// Why a capture cannot begin.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// The file cannot be opened.
    #[error("Cannot create the capture {}; its directory must exist and be writable", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A pipe or a device.
    #[error(
        "Cannot capture to {}, which is no regular file: its reader could hold up the guest; \
         capture to a file, and watch it with 'tail -c +1 -f FILE | wireshark -k -i -'",
        path.display()
    )]
    NotAFile {
        /// What it is.
        path: PathBuf,
    },
    /// The file cannot be written.
    #[error("Cannot write to the capture {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A file that frames of both directions are captured to, by any number of threads.
///
/// What is collected is written on drop.
#[derive(Debug)]
pub struct Capture {
    path: PathBuf,
    snap_len: usize,
    stopped: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    /// Bytes of whole records in the file.
    written: u64,
    /// Since the epoch.
    last_flush: Duration,
    block: Block,
    /// The frame that is being captured.
    frame: Vec<u8>,
}

impl Capture {
    /// Creates the file, or empties it, for frames of which at most `snap_len` bytes are kept; 0 is for all of them.
    ///
    /// Only its owner may read it, because it holds what guests say in confidence.
    pub fn create(path: &Path, snap_len: u32) -> Result<Self, CaptureError> {
        let create = |source| CaptureError::Create { path: path.to_owned(), source };
        // A pipe without a reader is not waited for.
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(flags)
            .open(path)
            .map_err(create)?;
        if !file.metadata().map_err(create)?.is_file() {
            return Err(CaptureError::NotAFile { path: path.to_owned() });
        }
        let write = |source| CaptureError::Write { path: path.to_owned(), source };
        let capture = Self::to_file(file, path, snap_len).map_err(write)?;
        // The header of the file, so that what is wrong shows now.
        capture.state().flush().map_err(write)?;
        Ok(capture)
    }

    fn to_file(file: File, path: &Path, snap_len: u32) -> io::Result<Self> {
        let snap_len = if snap_len == 0 { MAX_SNAP_LEN } else { snap_len.min(MAX_SNAP_LEN) };
        let state = State {
            file,
            written: 0,
            last_flush: Duration::ZERO,
            block: Block::new(snap_len)?,
            frame: Vec::new(),
        };
        Ok(Self {
            path: path.to_owned(),
            snap_len: snap_len as usize,
            stopped: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    /// Captures a frame of `len` bytes that lies in pieces, which need not be more than is captured.
    pub fn frame(&self, len: usize, pieces: &[&[u8]]) {
        self.frame_with(len, |buffer| {
            let mut filled = 0;
            for piece in pieces {
                let room = &mut buffer[filled..];
                let part = piece.len().min(room.len());
                room[..part].copy_from_slice(&piece[..part]);
                filled += part;
            }
            filled
        });
    }

    /// Captures a frame of `len` bytes, of which `fill` writes the first ones to the buffer that it gets, and says how
    /// many. The buffer has as many bytes as are captured.
    pub fn frame_with(&self, len: usize, fill: impl FnOnce(&mut [u8]) -> usize) {
        let Some(mut state) = self.running() else {
            return;
        };
        let State { frame, block, .. } = &mut *state;
        frame.resize(len.min(self.snap_len), 0);
        let filled = fill(frame).min(frame.len());
        // With the lock held, so that the times in the file do not run backwards unless the clock does.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut outcome = block.push(now, len, &frame[..filled]);
        let is_due = block.len >= BLOCK || now.saturating_sub(state.last_flush) >= FLUSH_INTERVAL;
        if outcome.is_ok() && is_due {
            state.last_flush = now;
            outcome = state.flush();
        }
        self.stop_on_error(outcome, &mut state);
    }

    /// Writes what is collected to the file.
    pub fn flush(&self) {
        if let Some(mut state) = self.running() {
            let outcome = state.flush();
            self.stop_on_error(outcome, &mut state);
        }
    }

    /// Whether the capture ended because the file could not be written.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn stop_on_error(&self, outcome: io::Result<()>, state: &mut State) {
        let Err(error) = outcome else {
            return;
        };
        self.stopped.store(true, Ordering::Relaxed);
        let end = match state.file.set_len(state.written) {
            Ok(()) => "the file ends with the last frame that was written whole",
            Err(_) => "the last frame in the file may be cut off",
        };
        log::error!("Capturing to {} ends: {error}; {end}", self.path.display());
    }

    /// The state, unless the capture is stopped.
    fn running(&self) -> Option<MutexGuard<'_, State>> {
        if self.is_stopped() {
            return None;
        }
        // It may have been stopped by the thread that had the lock.
        Some(self.state()).filter(|_| !self.is_stopped())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.flush();
    }
}

impl State {
    /// Writes the block. If that fails, the file may hold a part of it behind `written`.
    fn flush(&mut self) -> io::Result<()> {
        let bytes = self.block.take()?;
        // Each block comes with a header, of which the file gets one.
        let new = if self.written == 0 { &bytes[..] } else { &bytes[FILE_HEADER_LEN..] };
        self.file.write_all(new)?;
        self.written += new.len() as u64;
        Ok(())
    }
}

/// Records that wait to be written, behind a header. Nothing in memory fails to be written, whatever the types say.
#[derive(Debug)]
struct Block {
    header: PcapHeader,
    writer: PcapWriter<Vec<u8>>,
    len: usize,
}

impl Block {
    fn new(snaplen: u32) -> io::Result<Self> {
        let header = PcapHeader {
            snaplen,
            datalink: DataLink::ETHERNET,
            ts_resolution: TsResolution::NanoSecond,
            endianness: Endianness::native(),
            ..PcapHeader::default()
        };
        let writer = PcapWriter::with_header(Vec::new(), header).map_err(io::Error::other)?;
        Ok(Self { header, writer, len: 0 })
    }

    fn push(&mut self, time: Duration, frame_len: usize, bytes: &[u8]) -> io::Result<()> {
        // A caller that captures more than there is was wrong about the length.
        let frame_len = frame_len.max(bytes.len()) as u32;
        let packet = PcapPacket::new(time, frame_len, bytes);
        self.len += self.writer.write_packet(&packet).map_err(io::Error::other)?;
        Ok(())
    }

    fn take(&mut self) -> io::Result<Vec<u8>> {
        let next = PcapWriter::with_header(Vec::new(), self.header).map_err(io::Error::other)?;
        self.len = 0;
        Ok(mem::replace(&mut self.writer, next).into_writer())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcap::PcapReader;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, SealFlags};
    use std::io::{Read, Seek};
    use std::os::unix::fs::PermissionsExt;
    use std::{fs, thread};

    /// The lengths of the frames and what is there of them.
    fn read(file: impl Read) -> Vec<(u32, Vec<u8>)> {
        let mut reader = PcapReader::new(file).unwrap();
        assert_eq!(reader.header().ts_resolution, TsResolution::NanoSecond);
        assert_eq!(reader.header().datalink, DataLink::ETHERNET);
        let mut frames = Vec::new();
        // The other method refuses what is longer than it was captured.
        while let Some(packet) = reader.next_raw_packet() {
            let packet = packet.unwrap();
            assert!(packet.ts_frac < 1_000_000_000);
            frames.push((packet.orig_len, packet.data.into_owned()));
        }
        frames
    }

    fn captured(snap_len: u32, capture: impl FnOnce(&Capture)) -> Vec<(u32, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("frames.pcap");
        let to = Capture::create(&path, snap_len).unwrap();
        capture(&to);
        drop(to);
        read(File::open(&path).unwrap())
    }

    #[test]
    fn frames_are_cut_to_the_snap_length() {
        let frames = captured(10, |capture| {
            capture.frame(8, &[b"abcd", b"", b"efgh"]);
            capture.frame(26, &[b"abcdefgh", b"ijklmnop", b"qrstuvwxyz"]);
            capture.frame_with(1514, |buffer| {
                assert_eq!(buffer.len(), 10);
                buffer.fill(7);
                buffer.len()
            });
            // Only a part is at hand.
            capture.frame(9000, &[b"abc"]);
            capture.frame(0, &[]);
        });
        let expected: Vec<(u32, Vec<u8>)> = vec![
            (8, b"abcdefgh".to_vec()),
            (26, b"abcdefghij".to_vec()),
            (1514, vec![7; 10]),
            (9000, b"abc".to_vec()),
            (0, vec![]),
        ];
        assert_eq!(frames, expected);
    }

    #[test]
    fn a_capture_without_frames_is_a_capture() {
        assert_eq!(captured(0, |_| ()), []);
    }

    #[test]
    fn zero_keeps_whole_frames() {
        let frame = vec![5; 65_550];
        assert_eq!(captured(0, |capture| capture.frame(frame.len(), &[&frame])), [(65_550, frame.clone())]);
    }

    #[test]
    fn what_is_flushed_is_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("frames.pcap");
        fs::write(&path, vec![9; 100_000]).unwrap();
        let capture = Capture::create(&path, 0).unwrap();
        for number in 1..=3 {
            capture.frame(3, &[b"abc"]);
            capture.flush();
            capture.flush();
            assert_eq!(read(File::open(&path).unwrap()).len(), number);
        }
    }

    #[test]
    fn only_the_owner_reads_a_capture() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("frames.pcap");
        let _capture = Capture::create(&path, 0).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0);
    }

    #[test]
    fn what_cannot_be_captured_to_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Capture::create(&dir.path().join("no/frames.pcap"), 0).unwrap_err();
        assert!(matches!(error, CaptureError::Create { .. }), "{error}");
        assert!(error.to_string().contains("no/frames.pcap"), "{error}");
        let error = Capture::create(Path::new("/dev/null"), 0).unwrap_err();
        assert!(matches!(error, CaptureError::NotAFile { .. }), "{error}");
    }

    #[test]
    fn threads_capture_to_one_file() {
        const THREADS: u8 = 4;
        const FRAMES: usize = 1000;
        let frames = captured(0, |capture| {
            thread::scope(|scope| {
                for thread in 0..THREADS {
                    scope.spawn(move || (0..FRAMES).for_each(|_| capture.frame(200, &[&[thread; 200]])));
                }
            });
        });
        assert_eq!(frames.len(), usize::from(THREADS) * FRAMES);
        for thread in 0..THREADS {
            let own = frames.iter().filter(|(len, data)| *len == 200 && *data == [thread; 200]);
            assert_eq!(own.count(), FRAMES);
        }
    }

    #[test]
    fn a_full_device_stops_the_capture_and_nothing_else() {
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let capture = Capture::to_file(file, Path::new("/dev/full"), 0).unwrap();
        capture.frame(3, &[b"abc"]);
        assert!(capture.is_stopped());
        capture.frame_with(3, |_| panic!("Nothing is captured any more"));
        capture.flush();
    }

    #[test]
    fn a_disk_that_fills_up_leaves_whole_frames() {
        const SIZE: u64 = 200_000;
        // A file that cannot grow takes a part of what would make it, as a disk does.
        let mut file = File::from(
            rustix::fs::memfd_create("capture", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap(),
        );
        file.set_len(SIZE).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW).unwrap();
        let capture = Capture::to_file(file.try_clone().unwrap(), Path::new("memfd"), 0).unwrap();
        let mut count = 0;
        while !capture.is_stopped() {
            capture.frame(1514, &[&[count as u8; 1514]]);
            count += 1;
            assert!(count < 1000, "The capture does not stop");
        }
        drop(capture);
        file.rewind().unwrap();
        let frames = read(file);
        assert!(frames.len() > 80 && frames.len() < count, "{} of {count}", frames.len());
        for (number, (len, data)) in frames.iter().enumerate() {
            assert_eq!((*len, data), (1514, &vec![number as u8; 1514]));
        }
    }

    proptest! {
        #[test]
        fn the_file_holds_what_was_captured(
            snap_len in 1u32..300,
            frames in prop::collection::vec(
                prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..4),
                0..50,
            ),
        ) {
            let read = captured(snap_len, |capture| {
                for pieces in &frames {
                    let slices: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
                    capture.frame(pieces.concat().len(), &slices);
                }
            });
            prop_assert_eq!(read.len(), frames.len());
            for ((len, data), pieces) in read.iter().zip(&frames) {
                let whole = pieces.concat();
                prop_assert_eq!(*len as usize, whole.len());
                prop_assert_eq!(data, &whole[..whole.len().min(snap_len as usize)]);
            }
        }
    }
}
