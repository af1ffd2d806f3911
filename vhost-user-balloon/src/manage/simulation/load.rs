//! What simulated guests need: curves from fixed seeds.

/// Bytes in a GiB.
pub(super) const GIB: f64 = (1u64 << 30) as f64;
/// How long a scenario lasts, seconds.
pub(super) const SECONDS: f64 = 1200.0;
/// Guests in a scenario.
const GUESTS: u64 = 6;

/// The memory that the programs of a guest need: straight lines between points (seconds, bytes).
#[derive(Clone, Debug, Default)]
pub(super) struct Curve {
    points: Vec<(f64, f64)>,
}

impl Curve {
    fn starting(bytes: f64) -> Self {
        Self { points: vec![(0.0, bytes)] }
    }

    /// Stays as it is until `time`, then goes to `bytes` within `ramp` seconds.
    fn step(&mut self, time: f64, ramp: f64, bytes: f64) {
        let (last, now) = self.points.last().copied().unwrap_or_default();
        let time = time.max(last);
        self.points.push((time, now));
        self.points.push((time + ramp, bytes));
    }

    fn end(&self) -> f64 {
        self.points.last().map_or(0.0, |point| point.0)
    }

    /// What is needed at a time, bytes.
    pub fn at(&self, time: f64) -> f64 {
        let next = self.points.partition_point(|point| point.0 <= time);
        match (next.checked_sub(1).map(|last| self.points[last]), self.points.get(next)) {
            (Some((t0, b0)), Some((t1, b1))) => b0 + (b1 - b0) * (time - t0) / (t1 - t0),
            (Some((_, bytes)), None) | (None, Some(&(_, bytes))) => bytes,
            (None, None) => 0.0,
        }
    }
}

/// Numbers that look random and are always the same (SplitMix64): simulations must not change with a library's version.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number from `low` up to `high`.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        low + (high - low) * (mixed >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// One guest after the other is busy: each bursts for 40 seconds or so.
pub(super) fn rolling(seed: u64) -> Vec<Curve> {
    let mut dice = Dice::new(seed);
    let mut curves: Vec<_> = (0..GUESTS).map(|_| Curve::starting(dice.between(0.5, 0.9) * GIB)).collect();
    let mut time = 20.0;
    while time < SECONDS {
        for curve in &mut curves {
            let start = time + dice.between(0.0, 10.0);
            let base = curve.at(0.0);
            curve.step(start, dice.between(8.0, 14.0), dice.between(5.0, 6.5) * GIB);
            curve.step(start + dice.between(40.0, 55.0), dice.between(4.0, 10.0), base);
            time += 40.0;
        }
    }
    curves
}

/// Two guests are always busy, and four never.
pub(super) fn busy_and_idle(seed: u64) -> Vec<Curve> {
    let mut dice = Dice::new(seed);
    (0..GUESTS)
        .map(|guest| {
            let (low, high) = if guest < 2 { (5.0, 7.0) } else { (0.5, 0.9) };
            let mut curve = Curve::starting(dice.between(0.5, 0.9) * GIB);
            while curve.end() < SECONDS {
                let start = curve.end() + dice.between(10.0, 30.0);
                curve.step(start, 10.0, dice.between(low, high) * GIB);
            }
            curve
        })
        .collect()
}

/// All guests need a lot for a few seconds now and then, and within two seconds.
pub(super) fn spiky(seed: u64) -> Vec<Curve> {
    let mut dice = Dice::new(seed);
    (0..GUESTS)
        .map(|_| {
            let base = dice.between(0.6, 1.0) * GIB;
            let mut curve = Curve::starting(base);
            while curve.end() < SECONDS {
                let start = curve.end() + dice.between(30.0, 90.0);
                curve.step(start, 2.0, dice.between(3.0, 6.0) * GIB);
                curve.step(start + 2.0 + dice.between(5.0, 15.0), 2.0, base);
            }
            curve
        })
        .collect()
}

/// Twice, all guests are busy at the same time and need more than the host has.
pub(super) fn all_at_once(seed: u64) -> Vec<Curve> {
    let mut dice = Dice::new(seed);
    (0..GUESTS)
        .map(|_| {
            let base = dice.between(0.8, 1.2) * GIB;
            let mut curve = Curve::starting(base);
            for start in [200.0, 700.0] {
                curve.step(start + dice.between(0.0, 10.0), 20.0, dice.between(5.0, 6.5) * GIB);
                curve.step(start + 250.0 + dice.between(0.0, 50.0), 10.0, base);
            }
            curve
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_lines() {
        let mut curve = Curve::starting(1.0);
        curve.step(10.0, 2.0, 5.0);
        for (time, bytes) in [(0.0, 1.0), (10.0, 1.0), (11.0, 3.0), (12.0, 5.0), (1000.0, 5.0)] {
            assert!((curve.at(time) - bytes).abs() < 1e-9, "at {time}");
        }
    }

    #[test]
    fn scenarios_are_what_they_are_called() {
        let total = |curves: &[Curve], time: u32| -> f64 {
            curves.iter().map(|curve| curve.at(f64::from(time))).sum::<f64>() / GIB
        };
        let peak = |curves: &[Curve]| (0..1200).map(|time| total(curves, time)).fold(0.0, f64::max);
        for seed in 0..10 {
            assert!(peak(&rolling(seed)) < 20.0);
            assert!(peak(&busy_and_idle(seed)) < 19.0);
            assert!(peak(&all_at_once(seed)) > 29.0);
            assert!(peak(&spiky(seed)) > 8.0);
        }
    }
}
