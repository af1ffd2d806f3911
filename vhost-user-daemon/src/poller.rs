//! What a worker waits for besides kicks: a file of the host (its port), a moment in time, or a ring of its doorbell. All
//! in one epoll instance, so that the thread has to watch one file only: [`Worker::event_fd`](crate::Worker::event_fd).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Wakes a worker from another thread.
#[derive(Clone, Debug)]
pub struct Doorbell(Arc<Bell>);

#[derive(Debug)]
struct Bell {
    file: OwnedFd,
    rung: AtomicBool,
}

impl Doorbell {
    /// Makes the worker look at what was left for it.
    pub fn ring(&self) {
        // Full means that it was rung already. In this order: what the worker takes notice of, it also has to read.
        let _ = rustix::io::write(&self.0.file, &1u64.to_ne_bytes());
        self.0.rung.store(true, Ordering::SeqCst);
    }
}

/// When to wake up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// The port has something to read.
    pub read: bool,
    /// The port takes something to write.
    pub write: bool,
    /// It is this late.
    pub at: Option<Instant>,
}

/// The epoll instance of one worker.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
    timer: OwnedFd,
    doorbell: Doorbell,
    /// The port that is registered, by its number, and for what.
    port: Option<(RawFd, EventFlags)>,
    /// The file that the port has besides, by its number.
    control: Option<RawFd>,
    timer_at: Option<Instant>,
}

impl Poller {
    /// Waits for its doorbell only.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        for fd in [timer.as_fd(), bell.as_fd()] {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)?;
        }
        let doorbell = Doorbell(Arc::new(Bell { file: bell, rung: AtomicBool::new(false) }));
        Ok(Self { epoll, timer, doorbell, port: None, control: None, timer_at: None })
    }

    /// The way to wake the worker.
    pub fn doorbell(&self) -> Doorbell {
        self.doorbell.clone()
    }

    /// Takes notice of the doorbell and the time, so that neither wakes the worker again. `true` if the bell was rung.
    pub fn acknowledge(&mut self) -> bool {
        let mut count = [0; 8];
        if self.timer_at.is_some_and(|at| at <= Instant::now()) {
            self.timer_at = None;
            // Nothing to read means that it has just been set anew.
            let _ = rustix::io::read(&self.timer, &mut count);
        }
        let rung = self.doorbell.0.rung.swap(false, Ordering::SeqCst);
        if rung {
            let _ = rustix::io::read(&self.doorbell.0.file, &mut count);
        }
        rung
    }

    /// Waits until there is something to do.
    pub fn wait(&self) -> io::Result<()> {
        match poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The port was closed: another one may have its number.
    pub fn forget_port(&mut self) {
        self.port = None;
        self.control = None;
    }

    /// Also waits until `control` has something to say, if that is `wanted` now.
    pub fn watch(&mut self, control: Option<BorrowedFd<'_>>, wanted: bool) {
        let wanted = control.filter(|_| wanted).map(|fd| fd.as_raw_fd());
        if let Some(fd) = control
            && wanted != self.control
        {
            self.register(fd, if wanted.is_some() { EventFlags::IN } else { EventFlags::empty() });
            self.control = wanted;
        }
    }

    /// Waits for `interest` from now on. `port` may be another one each time, if the one before was forgotten.
    pub fn arm(&mut self, port: Option<BorrowedFd<'_>>, interest: Interest) {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, interest.read);
        flags.set(EventFlags::OUT, interest.write);
        let wanted = port.filter(|_| !flags.is_empty()).map(|port| (port.as_raw_fd(), flags));
        if wanted != self.port {
            if let Some(port) = port {
                self.register(port, flags);
            }
            self.port = wanted;
        }
        if interest.at != self.timer_at {
            self.timer_at = interest.at;
            self.set_timer(interest.at);
        }
    }

    // Fails only when the kernel is out of memory, and then the worker wakes up at the next kick.
    fn register(&self, port: BorrowedFd<'_>, flags: EventFlags) {
        let data = EventData::new_u64(0);
        if flags.is_empty() {
            let _ = epoll::delete(&self.epoll, port);
        } else if epoll::modify(&self.epoll, port, data, flags) == Err(Errno::NOENT) {
            let _ = epoll::add(&self.epoll, port, data, flags);
        }
    }

    fn set_timer(&self, at: Option<Instant>) {
        // Zero switches it off.
        let after = at.map_or(Duration::ZERO, |at| {
            at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1))
        });
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: after.as_secs() as i64, tv_nsec: after.subsec_nanos().into() },
        };
        // Errors are those of a wrong call.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn is_readable(poller: &Poller, timeout: Duration) -> bool {
        let timeout = Timespec::try_from(timeout).unwrap();
        poll(&mut [PollFd::new(poller, PollFlags::IN)], Some(&timeout)).unwrap() == 1
    }

    #[test]
    fn it_wakes_for_what_it_is_armed_for() {
        let mut poller = Poller::new().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::write(&theirs, b"x").unwrap();
        let soon = Duration::ZERO;
        assert!(!is_readable(&poller, soon));
        poller.arm(Some(ours.as_fd()), Interest { read: true, ..Interest::default() });
        assert!(is_readable(&poller, soon));
        poller.arm(Some(ours.as_fd()), Interest::default());
        assert!(!is_readable(&poller, soon));
        poller.arm(Some(ours.as_fd()), Interest { write: true, ..Interest::default() });
        assert!(is_readable(&poller, soon));
        poller.arm(None, Interest::default());
        poller.forget_port();
        drop(ours);
        assert!(!is_readable(&poller, soon));

        let at = Instant::now() + Duration::from_millis(20);
        poller.arm(None, Interest { at: Some(at), ..Interest::default() });
        assert!(is_readable(&poller, Duration::from_secs(10)));
        assert!(Instant::now() >= at);
        assert!(!poller.acknowledge());
        assert!(!is_readable(&poller, soon));

        poller.doorbell().ring();
        assert!(is_readable(&poller, soon));
        assert!(poller.acknowledge());
        assert!(!is_readable(&poller, soon));
    }

    /// Whatever the bell and the one who takes notice of it do at the same time: it is heard, and then it is quiet.
    #[test]
    fn the_doorbell_is_heard_and_then_quiet() {
        let mut poller = Poller::new().unwrap();
        let doorbell = poller.doorbell();
        let end = Instant::now() + Duration::from_millis(500);
        let (mut lost, mut stuck) = (0, 0);
        // What to ring, and what was rung.
        let (wanted, rung) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1.. {
                    while wanted.load(Ordering::SeqCst) < round {
                        std::hint::spin_loop();
                    }
                    if wanted.load(Ordering::SeqCst) == u64::MAX {
                        return;
                    }
                    doorbell.ring();
                    rung.store(round, Ordering::SeqCst);
                }
            });
            for round in 1.. {
                if Instant::now() >= end {
                    break;
                }
                wanted.store(round, Ordering::SeqCst);
                let mut heard = false;
                while rung.load(Ordering::SeqCst) < round {
                    heard |= poller.acknowledge();
                }
                heard |= poller.acknowledge();
                lost += u64::from(!heard);
                stuck += u64::from(is_readable(&poller, Duration::ZERO));
            }
            wanted.store(u64::MAX, Ordering::SeqCst);
        });
        assert_eq!((lost, stuck), (0, 0));
    }
}
