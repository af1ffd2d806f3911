//! A rate limiter for log lines that a guest or a front end can cause.
//!
//! Each call site of [`warn_limited!`](crate::warn_limited) and its sisters owns one [`Site`] in a `static`. A site
//! lets [`BURST`] lines through at once and refills one line per [`INTERVAL`]; what it swallows is counted and
//! announced by the next line that gets through, so that a reader knows that the log has a gap.
//!
//! A suppressed line costs one clock read and two relaxed atomic additions: nothing is formatted, allocated or locked.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that one call site may log back to back after a quiet time.
pub const BURST: u64 = 10;

/// Time after which a call site that used up its [`BURST`] may log one more line.
pub const INTERVAL: Duration = Duration::from_secs(1);

const INTERVAL_NS: u64 = INTERVAL.as_nanos() as u64;

/// How far the schedule may run ahead of the clock while lines still get through.
const TOLERANCE_NS: u64 = (BURST - 1) * INTERVAL_NS;

/// The sites that logged at least once, for [`sites`].
static SITES: Mutex<Vec<&'static Site>> = Mutex::new(Vec::new());

/// Zero of the limiter's clock.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// One rate-limited place in the source: its limiter and its counters.
///
/// The limiter is the "virtual scheduling" form of a leaky bucket (GCRA, ITU-T I.371): its whole state is the one
/// instant at which the bucket will be full again, so a compare-and-swap on one word replaces a lock.
#[derive(Debug)]
pub struct Site {
    file: &'static str,
    line: u32,
    /// Nanoseconds after [`START`] at which the full burst is available again.
    full_at: AtomicU64,
    /// Lines swallowed since the last one that got through.
    pending: AtomicU64,
    /// Lines swallowed since the process started.
    total: AtomicU64,
    registered: AtomicBool,
}

impl Site {
    /// Makes the state for the call site at `file`:`line`.
    pub const fn new(file: &'static str, line: u32) -> Self {
        Self {
            file,
            line,
            full_at: AtomicU64::new(0),
            pending: AtomicU64::new(0),
            total: AtomicU64::new(0),
            registered: AtomicBool::new(false),
        }
    }

    /// Asks for one line now. `None`: swallow it. `Some`: log it, and append the value (empty when nothing was
    /// swallowed) to the message.
    pub fn permit(&'static self) -> Option<Suppressed> {
        let permit = self.permit_at(START.elapsed());
        if permit.is_some() && !self.registered.swap(true, Relaxed) {
            // Each site comes here once in the life of the process, so the lock and the allocation are not a cost.
            SITES.lock().unwrap_or_else(PoisonError::into_inner).push(self);
        }
        permit
    }

    /// [`permit`](Self::permit) with the clock as an argument.
    fn permit_at(&self, now: Duration) -> Option<Suppressed> {
        // 584 years fit.
        let now = now.as_nanos() as u64;
        let admitted = self.full_at.fetch_update(Relaxed, Relaxed, |full_at| {
            (full_at.saturating_sub(now) <= TOLERANCE_NS).then(|| full_at.max(now) + INTERVAL_NS)
        });
        if admitted.is_ok() {
            Some(Suppressed(self.pending.swap(0, Relaxed)))
        } else {
            self.pending.fetch_add(1, Relaxed);
            self.total.fetch_add(1, Relaxed);
            None
        }
    }

    /// Source file of the call site, as `file!()` gives it.
    pub fn file(&self) -> &'static str {
        self.file
    }

    /// Line of the call site in its source file.
    pub fn line(&self) -> u32 {
        self.line
    }

    /// Lines that this site swallowed since the process started.
    pub fn suppressed(&self) -> u64 {
        self.total.load(Relaxed)
    }
}

/// Lines that were swallowed before the one that carries this value.
///
/// Displays as nothing, or as ` (N similar messages suppressed)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suppressed(pub u64);

impl fmt::Display for Suppressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            1 => f.write_str(" (1 similar message suppressed)"),
            n => write!(f, " ({n} similar messages suppressed)"),
        }
    }
}

/// Every rate-limited site that has logged so far; [`Site::suppressed`] of each is fit for a metrics page.
pub fn sites() -> Vec<&'static Site> {
    SITES.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// `error!` for what a guest or a front end can cause: see [`log::limit`](crate::log::limit).
#[macro_export]
macro_rules! error_limited {
    ($($arg:tt)+) => { $crate::__log_limited!(Error, $($arg)+) };
}

/// `warn!` for what a guest or a front end can cause: see [`log::limit`](crate::log::limit).
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)+) => { $crate::__log_limited!(Warn, $($arg)+) };
}

/// `info!` for what a guest or a front end can cause: see [`log::limit`](crate::log::limit).
#[macro_export]
macro_rules! info_limited {
    ($($arg:tt)+) => { $crate::__log_limited!(Info, $($arg)+) };
}

/// The one body of the `*_limited!` macros.
///
/// A level that is switched off is asked first: it must neither use up the burst nor count as suppressed.
#[doc(hidden)]
#[macro_export]
macro_rules! __log_limited {
    ($level:ident, $($arg:tt)+) => {{
        static SITE: $crate::log::limit::Site = $crate::log::limit::Site::new(file!(), line!());
        if $crate::log::__log::log_enabled!($crate::log::__log::Level::$level) {
            if let Some(suppressed) = SITE.permit() {
                $crate::log::__log::log!(
                    $crate::log::__log::Level::$level,
                    "{}{suppressed}",
                    format_args!($($arg)+)
                );
            }
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicU32;
    use std::thread;

    const START: Duration = Duration::from_secs(100);

    #[test]
    fn a_burst_passes_then_one_line_per_interval() {
        let site = Site::new("f.rs", 1);
        for _ in 0..BURST {
            assert_eq!(site.permit_at(START), Some(Suppressed(0)));
        }
        assert_eq!(site.permit_at(START), None);
        assert_eq!(site.permit_at(START + Duration::from_nanos(INTERVAL_NS - 1)), None);
        assert_eq!(site.permit_at(START + INTERVAL), Some(Suppressed(2)));
        assert_eq!(site.permit_at(START + INTERVAL), None);
        assert_eq!(site.permit_at(START + 2 * INTERVAL), Some(Suppressed(1)));
    }

    #[test]
    fn the_first_lines_of_a_process_pass() {
        let site = Site::new("f.rs", 1);
        let passed = (0..2 * BURST).filter(|_| site.permit_at(Duration::ZERO).is_some()).count();
        assert_eq!(passed as u64, BURST);
    }

    #[test]
    fn a_quiet_time_restores_the_burst_and_no_more() {
        let site = Site::new("f.rs", 1);
        while site.permit_at(START).is_some() {}
        let later = START + 1000 * INTERVAL;
        let passed = (0..10 * BURST).filter(|_| site.permit_at(later).is_some()).count();
        assert_eq!(passed as u64, BURST);
    }

    #[test]
    fn the_total_survives_the_announcement() {
        let site = Site::new("f.rs", 1);
        for _ in 0..BURST + 5 {
            site.permit_at(START);
        }
        assert_eq!(site.permit_at(START + INTERVAL), Some(Suppressed(5)));
        assert_eq!(site.suppressed(), 5);
    }

    #[test]
    fn a_clock_that_lags_behind_another_thread_is_harmless() {
        let site = Site::new("f.rs", 1);
        assert!(site.permit_at(START + 1000 * INTERVAL).is_some());
        assert_eq!(site.permit_at(START), None);
    }

    #[test]
    fn threads_together_get_one_burst_and_every_line_is_accounted_for() {
        const THREADS: u64 = 4;
        const LINES: u64 = 10_000;
        let site = Site::new("f.rs", 1);
        let (passed, announced) = (AtomicU32::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..LINES {
                        if let Some(suppressed) = site.permit_at(START) {
                            passed.fetch_add(1, Relaxed);
                            announced.fetch_add(suppressed.0, Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(u64::from(passed.load(Relaxed)), BURST);
        assert_eq!(site.suppressed(), THREADS * LINES - BURST);
        assert_eq!(announced.load(Relaxed) + site.pending.load(Relaxed), site.suppressed());
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_plus_one_line_per_interval(
            steps in prop::collection::vec(0u64..3_000_000_000, 1..300)
        ) {
            let site = Site::new("f.rs", 1);
            let mut now = Duration::ZERO;
            let (mut passed, mut announced) = (0u64, 0u64);
            for step in steps.iter().copied() {
                now += Duration::from_nanos(step);
                if let Some(suppressed) = site.permit_at(now) {
                    passed += 1;
                    announced += suppressed.0;
                }
                prop_assert!(passed <= BURST + (now.as_nanos() / INTERVAL.as_nanos()) as u64);
            }
            prop_assert_eq!(passed + site.suppressed(), steps.len() as u64);
            prop_assert!(announced <= site.suppressed());
        }
    }

    #[test]
    fn suppressed_reads_as_a_sentence() {
        assert_eq!(Suppressed(0).to_string(), "");
        assert_eq!(Suppressed(1).to_string(), " (1 similar message suppressed)");
        assert_eq!(Suppressed(7).to_string(), " (7 similar messages suppressed)");
    }

    #[test]
    fn a_site_that_logged_is_listed_once() {
        static SITE: Site = Site::new("listed.rs", 7);
        for _ in 0..3 {
            SITE.permit();
        }
        let listed: Vec<_> = sites().into_iter().filter(|site| site.file() == "listed.rs").collect();
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].line(), 7);
    }
}
