//! Pressure stall information: how long tasks waited for memory, and a wake-up when that is too long. The kernel's
//! `Documentation/accounting/psi.rst`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use log::info;
use procfs::{FromRead, MemoryPressure, ProcError};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Share of the last ten seconds in which tasks waited for memory, percent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Some task waited.
    pub some_avg10: f64,
    /// All of them did at once.
    pub full_avg10: f64,
}

/// Reads /proc/pressure/memory, or a cgroup's memory.pressure, which look the same.
pub fn read(path: &Path) -> io::Result<Pressure> {
    match MemoryPressure::from_file(path) {
        Ok(pressure) => Ok(Pressure {
            some_avg10: f64::from(pressure.some.avg10),
            full_avg10: f64::from(pressure.full.avg10),
        }),
        Err(ProcError::Io(error, _)) => Err(error),
        Err(ProcError::NotFound(_)) => Err(io::ErrorKind::NotFound.into()),
        Err(ProcError::PermissionDenied(_)) => Err(io::ErrorKind::PermissionDenied.into()),
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error.to_string())),
    }
}

/// What the kernel is asked for: tasks have waited that many microseconds of so many.
struct Wanted {
    what: &'static str,
    stalled_us: u32,
    window_us: u32,
}

/// A sixth of a second of waiting is felt; a twentieth in which nothing went on is worse.
const WANTED: [Wanted; 2] = [
    Wanted { what: "some", stalled_us: 150_000, window_us: 1_000_000 },
    Wanted { what: "full", stalled_us: 50_000, window_us: 1_000_000 },
];

/// A file that has an exceptional condition (`POLLPRI`) when there is pressure; an error (`POLLERR`) when it will
/// never have one again, because its cgroup is gone.
#[derive(Debug)]
pub struct Trigger(File);

impl AsFd for Trigger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Asks the kernel for all wake-ups on `path`.
///
/// None where the process may not ask, which is said in the log.
pub(super) fn triggers(path: &Path) -> Vec<Trigger> {
    let mut triggers = Vec::new();
    for wanted in &WANTED {
        match trigger(path, wanted) {
            Ok(trigger) => triggers.push(trigger),
            Err(error) => {
                info!(
                    "Pressure on {} does not wake the manager ({error}): it looks once a second only. Triggers take a \
                     kernel of 5.2 or later, and CAP_SYS_RESOURCE or a kernel of 6.6 or later",
                    path.display()
                );
                break;
            }
        }
    }
    triggers
}

fn trigger(path: &Path, wanted: &Wanted) -> io::Result<Trigger> {
    // Without privileges the window has to be a multiple of two seconds.
    write_trigger(path, wanted, 1).or_else(|error| match Errno::from_io_error(&error) {
        Some(Errno::INVAL | Errno::PERM) => write_trigger(path, wanted, 2),
        _ => Err(error),
    })
}

fn write_trigger(path: &Path, wanted: &Wanted, factor: u32) -> io::Result<Trigger> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    // The kernel takes the zero at the end for the end, and wants all in one write.
    let text = format!("{} {} {}\0", wanted.what, wanted.stalled_us * factor, wanted.window_us * factor);
    rustix::io::write(&file, text.as_bytes())?;
    Ok(Trigger(file.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn pressure_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let text = "some avg10=1.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=1\n";
        fs::write(&path, text).unwrap();
        assert_eq!(read(&path).unwrap(), Pressure { some_avg10: 1.5, full_avg10: 0.5 });
        fs::write(&path, "nonsense\n").unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
        fs::remove_file(&path).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn triggers_are_written_in_the_kernels_words() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        fs::write(&path, "").unwrap();
        assert_eq!(triggers(&path).len(), 2);
        // Both descriptors wrote at the beginning of an ordinary file: of the longer first one, an end is left.
        assert_eq!(fs::read(&path).unwrap(), b"full 50000 1000000\0\0");
        assert!(triggers(Path::new("/nonexistent")).is_empty());
    }
}
