//! A rate limit for bytes and for operations, for a worker that must not sleep.
//!
//! A [`Throttle`] answers at once: an operation is admitted, or the time is given at which to ask again. Until then the
//! operation stays where it is (in the ring, in the host's socket), and the worker serves others.
//!
//! The token buckets are those of the `governor` crate. One of its cells stands for a slice of time at the limited rate,
//! not for a byte: what an operation costs is then a number of nanoseconds, and a fraction of one is carried over to the
//! next operation, so that a rate holds exactly from 1 byte per second to far above 10 GB/s, although `governor`
//! counts in `u32` and gives a cell no less than a nanosecond.

use std::cell::Cell;
use std::num::{NonZeroU32, NonZeroU64};
use std::str::FromStr;
use std::time::{Duration, Instant};

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use thiserror::Error;

/// Default burst, as the time in which the rate lets that much pass.
pub const DEFAULT_BURST_TIME: Duration = Duration::from_millis(100);

/// Smallest default burst in bytes: the largest frame that QEMU handles (`NET_BUFSIZE`), so that one of 64 KiB with its
/// headers passes in one go.
pub const MIN_DEFAULT_BURST_BYTES: u64 = 68 << 10;

/// Smallest default burst in operations: a batch of a worker.
pub const MIN_DEFAULT_BURST_OPERATIONS: u64 = 64;

/// Shortest time that filling a bucket takes: a smaller burst is raised to what passes in it. A worker is not woken with
/// greater precision, so that it could never reach the rate, and would be woken all the time to try.
pub const MIN_BURST_TIME: Duration = Duration::from_millis(1);

/// Longest time that filling a bucket takes. A greater burst would never be there, and `governor` counts in 64 bits.
const MAX_BURST_TIME: Duration = Duration::from_secs(366 * 24 * 3600);

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// How much may pass.
///
/// Parsed from `RATE[:BURST]`, each a number with one of the suffixes `k`, `M`, `G` (powers of 1000) or `Ki`, `Mi`,
/// `Gi` (powers of 1024), and `B` where one likes: `100M`, `12.5MiB:1MiB`. Without a burst it is what passes in
/// [`DEFAULT_BURST_TIME`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes or operations per second.
    pub per_second: NonZeroU64,
    /// Bytes or operations that may pass at once after a quiet time, and at least what passes in [`MIN_BURST_TIME`].
    pub burst: NonZeroU64,
}

/// The limits of one direction or one queue. The default is none.
///
/// Parsed from `bytes=RATE[:BURST]`, `packets=RATE[:BURST]`, or both with a comma between; `operations` is another name
/// for `packets`. A burst that is not given is at least [`MIN_DEFAULT_BURST_BYTES`] or
/// [`MIN_DEFAULT_BURST_OPERATIONS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Limit on bytes.
    pub bytes: Option<Rate>,
    /// Limit on operations, whatever their size.
    pub operations: Option<Rate>,
}

/// Why a text is no rate or no set of limits.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ParseError {
    /// A number does not parse.
    #[error(
        "'{0}' is no number; write digits with one of the suffixes k, M, G, Ki, Mi, Gi, such as 100M or 12.5Mi"
    )]
    Number(String),
    /// A number is above 2^64 - 1.
    #[error("'{0}' is too large")]
    TooLarge(String),
    /// A rate or burst of zero.
    #[error("'{0}' would let nothing pass; leave the limit out for none")]
    Zero(String),
    /// A part that does not begin with a known key.
    #[error(
        "'{0}' is no limit; write bytes=RATE[:BURST] or packets=RATE[:BURST], with a comma between the two"
    )]
    Key(String),
    /// A key that comes twice.
    #[error("'{0}' is given twice; write each limit once")]
    Twice(String),
}

impl Rate {
    /// Parses `RATE[:BURST]` with a lower bound for the default burst.
    fn parse(text: &str, min_default_burst: u64) -> Result<Self, ParseError> {
        let (rate, burst) = match text.split_once(':') {
            Some((rate, burst)) => (rate, Some(burst)),
            None => (text, None),
        };
        let per_second = parse_number(rate)?;
        let burst = if let Some(burst) = burst {
            parse_number(burst)?
        } else {
            let default = u128::from(per_second.get()) * DEFAULT_BURST_TIME.as_nanos() / NANOS_PER_SECOND;
            NonZeroU64::new((default as u64).max(min_default_burst)).unwrap_or(NonZeroU64::MIN)
        };
        Ok(Self { per_second, burst })
    }
}

fn parse_number(text: &str) -> Result<NonZeroU64, ParseError> {
    let number = parse_size::parse_size(text).map_err(|error| match error {
        parse_size::Error::PosOverflow => ParseError::TooLarge(text.to_owned()),
        _ => ParseError::Number(text.to_owned()),
    })?;
    NonZeroU64::new(number).ok_or_else(|| ParseError::Zero(text.to_owned()))
}

impl FromStr for Rate {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::parse(text, 1)
    }
}

impl FromStr for Limits {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut limits = Self::default();
        for part in text.split(',') {
            let (key, rate) = part.split_once('=').ok_or_else(|| ParseError::Key(part.to_owned()))?;
            let (limit, min_default_burst) = match key {
                "bytes" => (&mut limits.bytes, MIN_DEFAULT_BURST_BYTES),
                "packets" | "operations" => (&mut limits.operations, MIN_DEFAULT_BURST_OPERATIONS),
                _ => return Err(ParseError::Key(part.to_owned())),
            };
            if limit.replace(Rate::parse(rate, min_default_burst)?).is_some() {
                return Err(ParseError::Twice(key.to_owned()));
            }
        }
        Ok(limits)
    }
}

/// Holds a stream of operations to its [`Limits`].
#[derive(Debug)]
pub struct Throttle {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Throttle {
    /// Makes a throttle with full buckets.
    pub fn new(limits: &Limits) -> Self {
        Self::starting_at(limits, Instant::now())
    }

    fn starting_at(limits: &Limits, start: Instant) -> Self {
        Self {
            bytes: limits.bytes.as_ref().map(|rate| Bucket::new(rate, start)),
            operations: limits.operations.as_ref().map(|rate| Bucket::new(rate, start)),
        }
    }

    /// Whether everything is admitted, so that a caller need not read the clock.
    pub fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }

    /// Admits one operation of `bytes`, or says when to ask again.
    ///
    /// What a refused operation has paid so far is kept for the next call: asking again for the same operation does
    /// not pay twice, and where another one is asked for instead, it is set against that one. An operation larger than
    /// the burst pays in parts, and is admitted once all of it is paid. The time that is returned is always later than
    /// `now`.
    pub fn admit(&mut self, bytes: u64, now: Instant) -> Result<(), Instant> {
        // Each bucket is asked even if the other refuses, so that the two waiting times do not add up.
        let bytes = self.bytes.as_mut().map_or(Ok(None), |bucket| bucket.pay(bytes, now).map(Some));
        let operations = self.operations.as_mut().map_or(Ok(None), |bucket| bucket.pay(1, now).map(Some));
        let (bytes, operations) = match (bytes, operations) {
            (Ok(bytes), Ok(operations)) => (bytes, operations),
            (Err(when), Err(other)) => return Err(when.max(other)),
            (Err(when), Ok(_)) | (Ok(_), Err(when)) => return Err(when),
        };
        if let (Some(bucket), Some(cost)) = (&mut self.bytes, bytes) {
            bucket.settle(&cost);
        }
        if let (Some(bucket), Some(cost)) = (&mut self.operations, operations) {
            bucket.settle(&cost);
        }
        Ok(())
    }
}

/// The clock that `governor` reads: what the caller said.
#[derive(Debug)]
struct GivenTime(Cell<Instant>);

impl Clock for GivenTime {
    type Instant = Instant;

    fn now(&self) -> Instant {
        self.0.get()
    }
}

/// One token bucket. A cell is a slice of time.
#[derive(Debug)]
struct Bucket {
    limiter: RateLimiter<NotKeyed, InMemoryState, GivenTime, NoOpMiddleware<Instant>>,
    /// What a cell is worth, in units (bytes, operations) times 10^-9.
    cell: u128,
    /// Cells that are taken at once at most.
    ///
    /// Half a burst: while a larger amount is waited for, the bucket never has to be full, and a worker that asks
    /// again a little late loses nothing.
    part: NonZeroU32,
    /// Cells taken for the operation that is waiting.
    paid: u64,
    /// What the operations so far cost beyond whole cells, below `cell`.
    carry: u128,
}

/// What one operation costs.
#[derive(Debug)]
struct Cost {
    cells: u64,
    carry: u128,
}

impl Bucket {
    fn new(rate: &Rate, start: Instant) -> Self {
        let per_second = u128::from(rate.per_second.get());
        let burst_time = u128::from(rate.burst.get()) * NANOS_PER_SECOND / per_second;
        let burst_time = burst_time.clamp(MIN_BURST_TIME.as_nanos(), MAX_BURST_TIME.as_nanos());
        // A nanosecond, and more only for a burst of more than 4.3 s, whose nanoseconds a u32 cannot count.
        let period = burst_time / u128::from(u32::MAX) + 1;
        let burst = NonZeroU32::new((burst_time / period) as u32).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::with_period(Duration::from_nanos(period as u64))
            .expect("a period is a nanosecond or more");
        Self {
            limiter: RateLimiter::direct_with_clock(quota.allow_burst(burst), GivenTime(Cell::new(start))),
            cell: per_second * period,
            part: NonZeroU32::new(burst.get() / 2).unwrap_or(NonZeroU32::MIN),
            paid: 0,
            carry: 0,
        }
    }

    /// Takes as many cells as `amount` costs, or as many as there are.
    fn pay(&mut self, amount: u64, now: Instant) -> Result<Cost, Instant> {
        let cost = u128::from(amount) * NANOS_PER_SECOND + self.carry;
        let cost =
            Cost { cells: u64::try_from(cost / self.cell).unwrap_or(u64::MAX), carry: cost % self.cell };
        self.limiter.clock().0.set(now);
        // Ends after a few rounds, for each takes half of what the bucket holds, or all that is asked for.
        while let Some(owed) = cost.cells.checked_sub(self.paid).and_then(NonZeroU64::new) {
            let part = NonZeroU32::try_from(owed).map_or(self.part, |owed| owed.min(self.part));
            match self.limiter.check_n(part) {
                Ok(Ok(())) => self.paid += u64::from(part.get()),
                Ok(Err(not_until)) => return Err(not_until.earliest_possible()),
                Err(_) => unreachable!("a part is not more than the burst"),
            }
        }
        Ok(cost)
    }

    /// The operation is admitted.
    fn settle(&mut self, cost: &Cost) {
        self.paid -= cost.cells;
        self.carry = cost.carry;
    }
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "a rate is compared with a tolerance")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn rate(per_second: u64, burst: u64) -> Rate {
        Rate { per_second: per_second.try_into().unwrap(), burst: burst.try_into().unwrap() }
    }

    fn bytes(per_second: u64, burst: u64) -> Limits {
        Limits { bytes: Some(rate(per_second, burst)), operations: None }
    }

    /// The burst as it is kept to.
    fn burst(rate: &Rate) -> f64 {
        f64::max(rate.burst.get() as f64, rate.per_second.get() as f64 * MIN_BURST_TIME.as_secs_f64())
    }

    /// Admits operations of `size` for `time`, each as early as it may pass, and returns how many passed.
    fn saturate(throttle: &mut Throttle, start: Instant, time: Duration, size: u64) -> u64 {
        let mut now = start;
        let mut passed = 0;
        while now < start + time {
            match throttle.admit(size, now) {
                Ok(()) => passed += 1,
                Err(when) => now = when,
            }
        }
        passed
    }

    #[test]
    fn rates_parse() {
        assert_eq!("100M".parse(), Ok(rate(100_000_000, 10_000_000)));
        assert_eq!("12.5MiB:1MiB".parse(), Ok(rate(13_107_200, 1 << 20)));
        assert_eq!("1Gi:2k".parse(), Ok(rate(1 << 30, 2000)));
        assert_eq!("5".parse(), Ok(rate(5, 1)));
        for (text, error) in [
            ("", ParseError::Number(String::new())),
            ("fast", ParseError::Number("fast".into())),
            ("-1", ParseError::Number("-1".into())),
            ("1M:", ParseError::Number(String::new())),
            ("1M:2:3", ParseError::Number("2:3".into())),
            ("0", ParseError::Zero("0".into())),
            ("1M:0", ParseError::Zero("0".into())),
            ("99999999999G", ParseError::TooLarge("99999999999G".into())),
        ] {
            assert_eq!(text.parse::<Rate>(), Err(error));
        }
    }

    #[test]
    fn limits_parse() {
        let both = Limits { bytes: Some(rate(100_000_000, 10_000_000)), operations: Some(rate(50_000, 500)) };
        assert_eq!("bytes=100M,packets=50k:500".parse(), Ok(both));
        assert_eq!("operations=50k:500,bytes=100M".parse(), Ok(both));
        assert_eq!("bytes=1k".parse(), Ok(bytes(1000, MIN_DEFAULT_BURST_BYTES)));
        assert_eq!("packets=10".parse(), Ok(Limits { bytes: None, operations: Some(rate(10, 64)) }));
        for (text, error) in [
            ("", ParseError::Key(String::new())),
            ("100M", ParseError::Key("100M".into())),
            ("bits=1", ParseError::Key("bits=1".into())),
            ("bytes=1,", ParseError::Key(String::new())),
            ("bytes=1,bytes=2", ParseError::Twice("bytes".into())),
            ("packets=1,operations=2", ParseError::Twice("operations".into())),
        ] {
            assert_eq!(text.parse::<Limits>(), Err(error));
        }
    }

    #[test]
    fn no_limit_admits_everything() {
        let mut throttle = Throttle::new(&Limits::default());
        assert!(throttle.is_unlimited());
        assert_eq!(throttle.admit(u64::MAX, Instant::now()), Ok(()));
        assert!(!Throttle::new(&bytes(1, 1)).is_unlimited());
    }

    #[test]
    fn rates_are_exact_from_a_byte_to_a_hundred_gigabytes_per_second() {
        for per_second in
            [1, 7, 999, 1_000_003, 1_500_000_000, 3_333_333_333, 10_000_000_000, 100_000_000_000]
        {
            for size in [1, 64, 1514, 65_535] {
                // As many operations as make the burst a small part of it.
                let time = SECOND.mul_f64((size * 2000) as f64 / per_second as f64);
                let (mut throttle, start) = (Throttle::new(&bytes(per_second, size)), Instant::now());
                let passed = saturate(&mut throttle, start, time, size) as f64;
                // The shortest time that an instant can tell, and the burst.
                let excess = per_second as f64 * (1e-9 + MIN_BURST_TIME.as_secs_f64()) / size as f64 + 1.0;
                let allowed = 1990.0..=2010.0 + excess;
                assert!(
                    allowed.contains(&passed),
                    "{per_second} B/s, {size} B: {passed}, {allowed:?} allowed"
                );
            }
        }
    }

    #[test]
    fn a_burst_passes_at_once_and_is_restored_by_a_quiet_time() {
        let (mut throttle, start) = (Throttle::new(&bytes(1_000_000, 10_000)), Instant::now());
        for now in [start, start + SECOND, start + 1000 * SECOND] {
            let passed = (0..100).filter(|_| throttle.admit(1000, now).is_ok()).count();
            assert_eq!(passed, 10);
        }
    }

    #[test]
    fn an_operation_larger_than_the_burst_waits_for_the_whole_of_its_cost() {
        let (mut throttle, start) = (Throttle::new(&bytes(1000, 100)), Instant::now());
        let passed = saturate(&mut throttle, start, 1000 * SECOND, 10_000);
        assert_eq!(passed, 100);
        assert_eq!(saturate(&mut throttle, start + 1000 * SECOND, SECOND, u64::MAX), 0);
    }

    #[test]
    fn a_refused_operation_does_not_pay_twice() {
        // The bytes are there at once, and the operations hold it up: asking every microsecond costs no bytes.
        let limits = Limits { bytes: Some(rate(1000, 1500)), operations: Some(rate(1, 1)) };
        let start = Instant::now();
        let mut throttle = Throttle::starting_at(&limits, start);
        assert_eq!(throttle.admit(500, start), Ok(()));
        for microseconds in 0..1000 {
            assert!(throttle.admit(500, start + Duration::from_micros(microseconds)).is_err());
        }
        assert_eq!(throttle.admit(500, start + SECOND), Ok(()));
        // 1500 bytes less two times 500, and 1000 more: the bucket is full, and that is enough.
        assert!(throttle.admit(1500, start + SECOND).is_err());
        assert_eq!(throttle.admit(1500, start + SECOND * 3 / 2).unwrap_err(), start + 2 * SECOND);
        assert_eq!(throttle.admit(1500, start + 2 * SECOND), Ok(()));
    }

    #[test]
    fn extreme_limits_neither_panic_nor_block() {
        let start = Instant::now();
        for (per_second, burst) in [(1, u64::MAX), (u64::MAX, 1), (u64::MAX, u64::MAX), (1, 1)] {
            let mut throttle = Throttle::new(&bytes(per_second, burst));
            for now in [start, start + SECOND, start, start + 3600 * SECOND] {
                for size in [0, 1, u64::MAX] {
                    if let Err(when) = throttle.admit(size, now) {
                        assert!(when > now);
                    }
                }
            }
        }
    }

    fn any_rate() -> impl Strategy<Value = Rate> {
        (1u64..20_000_000_000, 1u64..1_000_000).prop_map(|(per_second, burst)| rate(per_second, burst))
    }

    proptest! {
        #[test]
        fn in_no_window_does_more_than_rate_times_time_plus_burst_plus_one_operation_pass(
            bytes in any_rate(),
            operations in prop::option::of(any_rate()),
            // Time to let pass as a part of what the operation costs, or not at all; and the size.
            steps in prop::collection::vec((prop_oneof![Just(0.0), 0.0..3.0], 0u64..70_000), 1..60),
        ) {
            let limits = Limits { bytes: Some(bytes), operations };
            let mut now = Instant::now();
            let mut throttle = Throttle::starting_at(&limits, now);
            // Time, bytes, whether it was admitted.
            let mut log: Vec<(Instant, u64, bool)> = Vec::new();
            for (part, size) in steps {
                now += SECOND.mul_f64(part * size as f64 / bytes.per_second.get() as f64);
                let admitted = throttle.admit(size, now).is_ok();
                log.push((now, size, admitted));
            }
            for from in 0..log.len() {
                let (mut amount, mut count) = (0, 0);
                // What was refused may have paid in advance for what came next.
                let largest = log[..=from].iter().map(|entry| entry.1).max().unwrap();
                for &(at, size, admitted) in &log[from..] {
                    amount += if admitted { size } else { 0 };
                    count += u64::from(admitted);
                    let time = (at - log[from].0).as_secs_f64() + 2e-9;
                    let most = bytes.per_second.get() as f64 * time + burst(&bytes) + largest as f64;
                    prop_assert!(amount as f64 <= most, "{amount} bytes, {most} allowed");
                    if let Some(rate) = operations {
                        let most = rate.per_second.get() as f64 * time + burst(&rate) + 1.0;
                        prop_assert!(count as f64 <= most, "{count} operations, {most} allowed");
                    }
                }
            }
        }

        #[test]
        fn a_saturated_stream_gets_its_rate(
            limit in any_rate(),
            sizes in prop::collection::vec(0u64..70_000, 1..20),
        ) {
            let start = Instant::now();
            let mut throttle =
                Throttle::starting_at(&Limits { bytes: Some(limit), operations: None }, start);
            let (mut now, mut passed, mut last) = (start, 0, 0);
            for &size in sizes.iter().cycle().take(2000) {
                while let Err(when) = throttle.admit(size, now) {
                    prop_assert!(when > now, "A refusal that does not end");
                    now = when;
                }
                passed += size;
                last = size;
            }
            let expected = limit.per_second.get() as f64 * (now - start).as_secs_f64();
            prop_assert!(passed as f64 >= 0.95 * expected - last as f64, "{passed} of {expected}");
        }

        #[test]
        fn both_limits_hold_at_once_and_the_tighter_one_is_used_up(size in 1u64..9000) {
            let limits = Limits { bytes: Some(rate(1_000_000, 10_000)), operations: Some(rate(1000, 10)) };
            let start = Instant::now();
            let mut throttle = Throttle::starting_at(&limits, start);
            let passed = saturate(&mut throttle, start, 10 * SECOND, size) as f64;
            let expected = f64::min(10_000.0, 10_000_000.0 / size as f64);
            prop_assert!(passed >= 0.95 * expected && passed <= expected * 1.01 + 12.0, "{passed} of {expected}");
        }

        #[test]
        fn a_worker_that_asks_late_loses_nothing_while_it_waits_for_less_than_half_a_burst(
            size in 500u64..70_000,
            late in 0u64..40_000,
        ) {
            // A burst of 100 ms, and up to 40 ms late each time.
            let (mut throttle, start) = (Throttle::new(&bytes(1_000_000, 100_000)), Instant::now());
            let (mut now, mut passed) = (start, 0);
            while now < start + 10 * SECOND {
                match throttle.admit(size, now) {
                    Ok(()) => passed += size,
                    Err(when) => now = when + Duration::from_micros(late),
                }
            }
            prop_assert!(passed >= 9_500_000, "{passed}");
        }
    }
}
