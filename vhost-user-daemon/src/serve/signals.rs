//! The signals of a daemon, and what tells its threads to end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use log::error;
use nix::sys::signal::{SigSet, Signal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};

use super::DRAIN_TIMEOUT;

/// Keeps back what would end a process that does not catch it yet: the signals that [`serve`](crate::serve()) answers.
/// Those that come wait for it.
///
/// Call it in the thread that will serve, before anybody can see that there is a socket and take the daemon for one that
/// is ready: told to end in between, it would leave the socket behind.
pub fn hold_signals() -> io::Result<()> {
    Ok(answered().thread_block()?)
}

fn answered() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1].into_iter().collect()
}

/// SIGTERM, SIGINT and SIGUSR1 as file descriptors that become readable.
pub(super) struct Signals {
    /// The process has to end, and within [`DRAIN_TIMEOUT`]: by a signal, or because of an error.
    ending: Event,
    /// The threads that serve have to end: as above, or because nobody is left to be served.
    stop: Event,
    /// A report is asked for.
    report: Event,
}

impl Signals {
    /// Catches the signals, and starts the thread that ends the process if it has not ended some time after: no matter
    /// which other thread hangs, and in what.
    pub fn install() -> io::Result<Self> {
        let signals = Self { ending: Event::new()?, stop: Event::new()?, report: Event::new()? };
        for signal in [SIGTERM, SIGINT] {
            // In this order: where `stop` is seen, `ending` is seen too.
            signals.ending.happens_on(signal)?;
            signals.stop.happens_on(signal)?;
        }
        signals.report.happens_on(SIGUSR1)?;
        // Caught, so that a guest that writes beyond the largest file that the process may make (ulimit -f) gets an error
        // (EFBIG) and not the daemon's end.
        signal_hook::flag::register(SIGXFSZ, Arc::default())?;
        let watched = signals.ending.receiver.try_clone()?;
        thread::Builder::new().name("watchdog".into()).spawn(move || {
            if wait(&[watched.as_fd()], None).is_ok() {
                thread::sleep(DRAIN_TIMEOUT);
                error!("Requests in flight did not finish within {} seconds", DRAIN_TIMEOUT.as_secs());
                std::process::exit(1);
            }
        })?;
        // What was held back comes now.
        answered().thread_unblock()?;
        Ok(signals)
    }

    /// Ends the threads that serve.
    pub fn stop(&self) {
        self.stop.happen();
    }

    /// Does what SIGTERM does.
    pub fn end(&self) {
        self.ending.happen();
        self.stop.happen();
    }

    /// Readable once the process has to end.
    pub fn ending(&self) -> BorrowedFd<'_> {
        self.ending.receiver.as_fd()
    }

    /// Readable once the threads that serve have to end.
    pub fn stopped(&self) -> BorrowedFd<'_> {
        self.stop.receiver.as_fd()
    }

    /// Readable after SIGUSR1, until [`take_report`](Self::take_report).
    pub fn report(&self) -> BorrowedFd<'_> {
        self.report.receiver.as_fd()
    }

    /// Forgets the signals that asked for a report until now.
    pub fn take_report(&self) {
        while !matches!(recv(&self.report.receiver, &mut [0; 64], RecvFlags::DONTWAIT), Ok((0, _)) | Err(_)) {
        }
    }
}

/// Something that happens: `receiver` becomes readable, and stays so until it is read.
struct Event {
    receiver: UnixStream,
    sender: UnixStream,
}

impl Event {
    fn new() -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        Ok(Self { receiver, sender })
    }

    fn happens_on(&self, signal: i32) -> io::Result<()> {
        signal_hook::low_level::pipe::register(signal, self.sender.try_clone()?)?;
        Ok(())
    }

    fn happen(&self) {
        // When there is no room, it has happened often enough.
        let _ = send(&self.sender, &[0], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

/// Waits until one of `fds` is readable or closed, and gives the place of the first that is; `None` after `timeout`.
pub(super) fn wait(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Option<usize>> {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        match poll(&mut polled, timeout.as_ref()) {
            // Signals run on any thread. Whoever gave a timeout is content with a longer one.
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(polled.iter().position(|fd| !fd.revents().is_empty())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_stays_until_it_is_taken() {
        let event = Event::new().unwrap();
        let happened = || wait(&[event.receiver.as_fd()], Some(Duration::ZERO)).unwrap().is_some();
        assert!(!happened());
        // More often than there is room for.
        (0..100_000).for_each(|_| event.happen());
        assert!(happened() && happened());
    }

    #[test]
    fn reports_are_taken_together() {
        let signals = Signals {
            ending: Event::new().unwrap(),
            stop: Event::new().unwrap(),
            report: Event::new().unwrap(),
        };
        (0..1000).for_each(|_| signals.report.happen());
        signals.take_report();
        assert_eq!(wait(&[signals.report()], Some(Duration::ZERO)).unwrap(), None);
        signals.end();
        let fds = [signals.report(), signals.ending(), signals.stopped()];
        assert_eq!(wait(&fds, None).unwrap(), Some(1));
        assert_eq!(wait(&fds[2..], None).unwrap(), Some(0));
    }
}
