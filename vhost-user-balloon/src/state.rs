//! What a balloon knows at the moment: what it was asked for, and what the guest has said and done.

use std::time::{Duration, Instant, SystemTime};

use vhost_user_daemon::poller::Doorbell;

use crate::api::{Activity, Counters, GuestStatistics, Statistics, What};
use crate::config::{Config, Features};
use crate::memory::PAGE;

/// How long nothing has to move before a balloon that has not its target size counts as stalled.
pub const STALL: Duration = Duration::from_secs(3);

/// Least time between two events of a kind that a guest can cause as often as it likes.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// How long after a change of the target the guest may still be following the one before.
const SETTLE: Duration = Duration::from_secs(1);

/// What is known at the moment. Locked for moments only, so that no front end waits.
#[expect(clippy::struct_excessive_bools, reason = "they are independent of each other")]
pub struct State {
    /// What the balloon is asked to be, bytes, whole pages.
    pub requested: u64,
    /// When the target was last another one.
    pub target_changed: Instant,
    /// The configuration space.
    pub config: Config,
    /// What was negotiated.
    pub features: Features,
    /// All of the guest's memory, bytes; 0 if it is not known.
    pub guest_bytes: u64,
    /// A front end is there.
    pub connected: bool,
    /// A driver uses the balloon.
    pub running: bool,
    /// This process has seen the driver start, so that it knows all pages in the balloon.
    pub complete: bool,
    /// A deflation waits for huge pages.
    pub held: bool,
    /// When something last moved, or was to move.
    pub progress: Instant,
    /// It was said that nothing moves.
    pub stalled: bool,
    /// The guest has said that the balloon has another size, which has to be told.
    pub actual_moved: bool,
    /// When it was last said what the size of the balloon is, other than the target.
    pub actual_event: Option<Instant>,
    /// When it was last said that the target is reached.
    pub reached_event: Option<Instant>,
    /// When it was last said that memory could not be given back.
    pub failure_event: Option<Instant>,
    /// When it was last said that the guest was short of memory.
    pub oom_event: Option<Instant>,
    /// Taken back since the last event.
    pub oom_bytes: u64,
    /// What happened so far.
    pub counters: Counters,
    /// What the guest said at last.
    pub statistics: Option<Answer>,
    /// Requests for statistics so far.
    pub asked: u64,
    /// The last request for statistics that was answered.
    pub answered: u64,
    /// How often they are asked for, seconds.
    pub interval: u64,
    /// Wakes the worker.
    pub doorbell: Option<Doorbell>,
}

/// What the guest said, and when.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The numbers.
    pub numbers: GuestStatistics,
    /// When they came.
    pub came: Instant,
    /// The same as a date.
    pub date: SystemTime,
}

impl State {
    /// A state as a daemon starts with.
    pub fn new(requested: u64, config: Config, interval: u64) -> Self {
        let now = Instant::now();
        Self {
            requested,
            target_changed: now,
            config,
            features: Features::empty(),
            guest_bytes: 0,
            connected: false,
            running: false,
            complete: false,
            held: false,
            progress: now,
            stalled: false,
            actual_moved: false,
            actual_event: None,
            reached_event: None,
            failure_event: None,
            oom_event: None,
            oom_bytes: 0,
            counters: Counters::default(),
            statistics: None,
            asked: 0,
            answered: 0,
            interval,
            doorbell: None,
        }
    }

    /// Pages that the driver is asked for: no more than leaves the guest its minimum. As long as it is not known how much
    /// memory the guest has, no more than it has given: it is not to let go of that because its front end has come back.
    pub fn target_pages(&self, min_guest_memory: u64) -> u32 {
        let limit = match self.guest_bytes {
            0 if min_guest_memory > 0 => self.actual_bytes(),
            0 => u64::MAX,
            guest_bytes => guest_bytes.saturating_sub(min_guest_memory),
        };
        u32::try_from(self.requested.min(limit) / PAGE).unwrap_or(u32::MAX)
    }

    /// The same in bytes.
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.config.num_pages) * PAGE
    }

    /// What the guest says the balloon is, bytes.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.config.actual) * PAGE
    }

    /// Wakes the worker.
    pub fn ring(&self) {
        if let Some(doorbell) = &self.doorbell {
            doorbell.ring();
        }
    }

    /// Something moved.
    pub fn moved(&mut self) {
        self.progress = Instant::now();
        self.stalled = false;
    }

    /// What is going on.
    pub fn activity(&self) -> Activity {
        if !self.running {
            Activity::Absent
        } else if self.held {
            Activity::Held
        } else if self.config.actual == self.config.num_pages {
            Activity::Idle
        } else if self.progress.elapsed() >= STALL {
            Activity::Stalled
        } else if self.config.actual < self.config.num_pages {
            Activity::Inflating
        } else {
            Activity::Deflating
        }
    }

    /// The guest took `bytes` back, after which `ballooned` are left.
    pub fn deflated(&mut self, bytes: u64, ballooned: u64) {
        self.moved();
        let below = self.target_bytes().saturating_sub(ballooned).min(bytes);
        if below > 0 && self.complete && self.target_changed.elapsed() >= SETTLE {
            self.counters.oom_deflated_bytes += below;
            self.oom_bytes += below;
        }
    }

    /// What the guest said at last, with what is known besides.
    pub fn statistics(&self) -> Option<Statistics> {
        let answer = self.statistics?;
        Some(Statistics {
            target_pages: self.config.num_pages.into(),
            actual_pages: self.config.actual.into(),
            target_mib: self.target_bytes() >> 20,
            actual_mib: self.actual_bytes() >> 20,
            age_ms: answer.came.elapsed().as_millis() as u64,
            last_update: answer
                .date
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            guest: answer.numbers,
        })
    }

    /// The events that are due now, and when the next one will be. What is resident is left to the caller to fill in.
    pub fn due_events(&mut self) -> (Vec<What>, Option<Instant>) {
        let mut events = Vec::new();
        let mut next = None;
        if self.actual_moved {
            let (actual_bytes, target_bytes) = (self.actual_bytes(), self.target_bytes());
            let reached = actual_bytes == target_bytes;
            let last = if reached { &mut self.reached_event } else { &mut self.actual_event };
            if Self::is_due(last) {
                self.actual_moved = false;
                events.push(if reached {
                    What::Reached { actual_bytes, resident_bytes: 0 }
                } else {
                    What::Actual { actual_bytes, target_bytes, resident_bytes: 0 }
                });
            } else {
                next = last.map(|last| last + EVENT_INTERVAL);
            }
        }
        if self.oom_bytes > 0 {
            if Self::is_due(&mut self.oom_event) {
                let bytes = std::mem::take(&mut self.oom_bytes);
                events.push(What::OomDeflated { bytes, actual_bytes: self.actual_bytes() });
            } else {
                let at = self.oom_event.map(|last| last + EVENT_INTERVAL);
                next = next.into_iter().chain(at).min();
            }
        }
        if self.running && self.config.actual != self.config.num_pages && !self.stalled && !self.held {
            if self.progress.elapsed() >= STALL {
                self.stalled = true;
                events.push(What::Stalled {
                    actual_bytes: self.actual_bytes(),
                    target_bytes: self.target_bytes(),
                });
            } else {
                let at = self.progress + STALL;
                next = Some(next.map_or(at, |next: Instant| next.min(at)));
            }
        }
        (events, next)
    }

    /// Whether an event that the guest causes may be sent now; `last` is when the last one was.
    pub fn is_due(last: &mut Option<Instant>) -> bool {
        let now = Instant::now();
        let due = last.is_none_or(|last| now.duration_since(last) >= EVENT_INTERVAL);
        if due {
            *last = Some(now);
        }
        due
    }
}
