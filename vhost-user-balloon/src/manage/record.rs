//! What was seen and decided, for an administrator who wants to try another policy on yesterday: one line of JSON each
//! time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::config::Config;
use super::event::unix_ms;
use super::model::{Snapshot, Wishes};
use super::rails::Order;

/// A line of a recording.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// From here on, it was decided by this configuration.
    Configuration(Box<Config>),
    /// The host and its guests at one moment, and what was decided.
    Tick(Box<Tick>),
}

/// One moment.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Tick {
    /// Milliseconds since 1970.
    pub ts_ms: u64,
    /// What was seen.
    pub snapshot: Snapshot,
    /// What the policy wished for.
    pub wishes: Wishes,
    /// What was sent to balloons, or would have been in a dry run.
    pub orders: Vec<Order>,
    /// Nothing was sent.
    pub dry_run: bool,
}

/// Writes a recording of bounded size.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    /// When the file has so many bytes, it becomes the old one (`PATH.1`), and a new one is begun.
    limit: u64,
    file: File,
    written: u64,
    /// The last configuration: every file begins with it.
    configuration: Vec<u8>,
}

impl Recorder {
    /// Goes on with the recording at `path`. It and the one before it, `path` with `.1` at its end, have about `limit`
    /// bytes each at most.
    pub fn open(path: &Path, limit: u64, config: &Config) -> io::Result<Self> {
        // Not a pipe: nobody may have to read it for the manager to start.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().create(true).append(true).read(true).custom_flags(flags).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no ordinary file"));
        }
        let written = cut_torn_line(&file)?;
        let mut recorder = Self { path: path.to_owned(), limit, file, written, configuration: Vec::new() };
        recorder.configure(config)?;
        Ok(recorder)
    }

    /// From here on, another configuration decides.
    pub fn configure(&mut self, config: &Config) -> io::Result<()> {
        self.configuration = line(&Line::Configuration(Box::new(config.clone())))?;
        self.write(&self.configuration.clone())
    }

    /// Writes what was seen and decided.
    pub fn tick(&mut self, tick: Tick) -> io::Result<()> {
        let tick = line(&Line::Tick(Box::new(tick)))?;
        if self.written > 0 && self.written + tick.len() as u64 > self.limit {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            fs::rename(&self.path, old)?;
            self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            self.written = 0;
            self.write(&self.configuration.clone())?;
        }
        self.write(&tick)
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        // At once, so that a manager that is killed leaves whole lines.
        self.file.write_all(line)?;
        self.written += line.len() as u64;
        Ok(())
    }
}

/// Removes a last line that is not whole, which a full disk has left: what is written next would make nonsense of it. Gives
/// the length of the file.
fn cut_torn_line(file: &File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let mut end = length;
    let mut block = vec![0; 64 << 10];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.read_exact_at(part, start)?;
        if let Some(at) = part.iter().rposition(|byte| *byte == b'\n') {
            end = start + at as u64 + 1;
            break;
        }
        end = start;
    }
    if end < length {
        file.set_len(end)?;
    }
    Ok(end)
}

impl Tick {
    /// What happens at this moment.
    pub fn now(snapshot: &Snapshot, wishes: &Wishes, orders: &[Order], dry_run: bool) -> Self {
        let (snapshot, wishes, orders) = (snapshot.clone(), wishes.clone(), orders.to_vec());
        Self { ts_ms: unix_ms(), snapshot, wishes, orders, dry_run }
    }
}

fn line(line: &Line) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    Ok(text)
}

/// Why a recording cannot be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("Recording {} cannot be read: check that it exists and who may read it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line is not one of a recording.
    #[error("Line {line} of {} is not one of a recording of this version", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Reads a recording, line by line. A last line that is not whole, because the manager was killed, is left out.
pub fn read(path: &Path) -> Result<impl Iterator<Item = Result<Line, ReadError>>, ReadError> {
    let path = path.to_owned();
    let failed = |path: &Path, source| ReadError::Read { path: path.to_owned(), source };
    let file = File::open(&path).map_err(|source| failed(&path, source))?;
    let mut reader = BufReader::new(file);
    let mut number = 0;
    let mut text = Vec::new();
    Ok(std::iter::from_fn(move || {
        text.clear();
        number += 1;
        match reader.read_until(b'\n', &mut text) {
            Err(source) => Some(Err(failed(&path, source))),
            Ok(_) if text.last() != Some(&b'\n') => None,
            Ok(_) => Some(serde_json::from_slice(&text).map_err(|source| ReadError::Line {
                path: path.clone(),
                line: number,
                source,
            })),
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manage::model::{Guest, Host};
    use crate::manage::rails::Why;

    fn tick(now: f64) -> Tick {
        let guest = Guest { name: "a".into(), memory: 1 << 30, ..Guest::default() };
        Tick {
            ts_ms: 5,
            snapshot: Snapshot { now, host: Host::default(), guests: vec![guest], reserved: 7 },
            wishes: Wishes::from([("a".to_owned(), 1 << 29)]),
            orders: vec![Order { guest: "a".into(), balloon_bytes: 1 << 29, why: Why::Take }],
            dry_run: false,
        }
    }

    fn all(path: &Path) -> Vec<Line> {
        read(path).unwrap().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn what_was_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r");
        let config = Config::parse("guests.a.shares = 3").unwrap();
        let mut recorder = Recorder::open(&path, u64::MAX, &config).unwrap();
        recorder.tick(tick(0.1)).unwrap();
        drop(recorder);
        // It goes on where it was.
        let mut recorder = Recorder::open(&path, u64::MAX, &Config::default()).unwrap();
        recorder.tick(tick(1.0 / 3.0)).unwrap();
        let expected = [
            Line::Configuration(Box::new(config)),
            Line::Tick(Box::new(tick(0.1))),
            Line::Configuration(Box::default()),
            Line::Tick(Box::new(tick(1.0 / 3.0))),
        ];
        assert_eq!(all(&path), expected);
    }

    #[test]
    fn a_recording_does_not_grow_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r");
        let limit = 10_000;
        let mut recorder = Recorder::open(&path, limit, &Config::default()).unwrap();
        for now in 0..100 {
            recorder.tick(tick(f64::from(now))).unwrap();
        }
        let old = directory.path().join("r.1");
        for file in [&path, &old] {
            assert!(fs::metadata(file).unwrap().len() <= limit);
            let lines = all(file);
            assert!(matches!(lines[0], Line::Configuration(_)) && lines.len() > 2, "{}", lines.len());
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        let last = Line::Tick(Box::new(tick(99.0)));
        assert_eq!(all(&path).last(), Some(&last));
    }

    #[test]
    fn lines_that_are_not_whole_are_known() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r");
        let mut recorder = Recorder::open(&path, u64::MAX, &Config::default()).unwrap();
        recorder.tick(tick(1.0)).unwrap();
        recorder.file.write_all(b"{\"tick\":{\"ts").unwrap();
        assert_eq!(all(&path).len(), 2);
        recorder.file.write_all(b"\n").unwrap();
        let error = read(&path).unwrap().last().unwrap().unwrap_err();
        assert!(error.to_string().starts_with("Line 3 of "), "{error}");
        assert!(read(&directory.path().join("none")).is_err());
    }

    #[test]
    fn a_recording_goes_on_after_a_full_disk() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r");
        let mut recorder = Recorder::open(&path, u64::MAX, &Config::default()).unwrap();
        recorder.tick(tick(1.0)).unwrap();
        recorder.file.write_all(&vec![b'x'; 200_000]).unwrap();
        let mut recorder = Recorder::open(&path, u64::MAX, &Config::default()).unwrap();
        recorder.tick(tick(2.0)).unwrap();
        assert_eq!(recorder.written, fs::metadata(&path).unwrap().len());
        assert_eq!(all(&path).len(), 4);
        // Nothing but half a line.
        fs::write(&path, "half").unwrap();
        Recorder::open(&path, u64::MAX, &Config::default()).unwrap();
        assert_eq!(all(&path), [Line::Configuration(Box::default())]);
        // A pipe that nobody reads is not waited for.
        assert!(Recorder::open(Path::new("/dev/null"), 1, &Config::default()).is_err());
    }
}
