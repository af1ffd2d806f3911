//! How much of a processor a guest may make the daemon use.
//!
//! A guest can give and take the same pages for ever, and each of them is work for the host. What is limited is the
//! time of the processor that this takes, whatever the requests are. A guest that does what it is asked for never
//! comes near the limit: moving 30 GiB takes less than the time that may be spent at once.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use vhost_user_daemon::throttle::{Limits, Rate, Throttle};

/// For how long what is not used is saved up.
const SAVED_UP: u64 = 40;

/// What waking up costs, which the thread cannot measure: it happens in the kernel, before and after.
const WAKE_UP: Duration = Duration::from_micros(5);

/// Holds a worker to a share of one processor.
#[derive(Debug)]
pub struct WorkLimit {
    throttle: Throttle,
    owed: u64,
}

impl WorkLimit {
    /// Up to `percent` of one processor; 100 and more is no limit.
    pub fn new(percent: u32) -> Self {
        let bytes = NonZeroU64::new(u64::from(percent) * 10_000_000).filter(|_| percent < 100).map(|rate| {
            // Nanoseconds are what is limited, so that a second has a billion of them.
            Rate { per_second: rate, burst: rate.saturating_mul(NonZeroU64::new(SAVED_UP).unwrap_or(rate)) }
        });
        Self { throttle: Throttle::new(&Limits { bytes, operations: None }), owed: 0 }
    }

    /// Work begins, on this thread.
    pub fn begin(&self) -> Option<Duration> {
        (!self.throttle.is_unlimited()).then(thread_time)
    }

    /// The work that began at `start` has ended, on the same thread.
    pub fn end(&mut self, start: Option<Duration>) {
        if let Some(start) = start {
            self.owed += (thread_time().saturating_sub(start) + WAKE_UP).as_nanos() as u64;
        }
    }

    /// Until when nothing more may be done, if there is such a time.
    pub fn blocked_until(&mut self, now: Instant) -> Option<Instant> {
        if self.owed == 0 {
            return None;
        }
        match self.throttle.admit(self.owed, now) {
            Ok(()) => {
                self.owed = 0;
                None
            }
            Err(at) => Some(at),
        }
    }
}

/// Time of the processor that this thread has used.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spin(time: Duration) {
        let start = thread_time();
        while thread_time().saturating_sub(start) < time {}
    }

    #[test]
    fn what_is_saved_up_is_spent_and_then_it_blocks() {
        let mut limit = WorkLimit::new(1);
        let now = Instant::now();
        let start = limit.begin();
        limit.end(start);
        assert_eq!(limit.blocked_until(now), None);
        // 400 ms are saved up.
        let start = limit.begin();
        spin(Duration::from_millis(450));
        limit.end(start);
        let at = limit.blocked_until(now).expect("more than was saved up");
        assert!(at > now);
        assert_eq!(limit.blocked_until(now + Duration::from_secs(20)), None);
    }

    #[test]
    fn a_hundred_percent_is_no_limit() {
        let mut limit = WorkLimit::new(100);
        let start = limit.begin();
        spin(Duration::from_millis(10));
        limit.end(start);
        assert_eq!(limit.blocked_until(Instant::now()), None);
    }
}
