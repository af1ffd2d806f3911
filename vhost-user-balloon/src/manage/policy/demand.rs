//! How much memory a guest needs, by what it uses and has used.

use crate::manage::account::{ceiling, floor, used};
use crate::manage::config::Parameters;
use crate::manage::model::{Guest, Usage};

/// A guest that reads more than this from its swap is short of memory, bytes a second.
const SWAPS: f64 = (5 << 20) as f64;
/// What it is given at first then.
const FIRST_BOOST: f64 = (128 << 20) as f64;
/// Once it is well, it keeps this share of the boost for each second.
const BOOST_KEPT: f64 = 0.95;
/// A smaller boost is none.
const LEAST_BOOST: f64 = (16 << 20) as f64;
/// What a guest uses is seen to grow for so many seconds more: until then nothing can be done for it.
const LOOKAHEAD: f64 = 2.0;
/// Headroom when memory is short.
const LEAST_HEADROOM: f64 = 1.05;

/// What a guest needs, bytes. All of it within what it can have.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Need {
    /// What it uses.
    pub used: u64,
    /// What it should have if there is enough: by what it has used at its peak.
    pub wish: u64,
    /// What it should have if there is not enough for all wishes: by what it uses now.
    pub claim: u64,
    /// What it should have if there is not enough for all claims: the same with hardly any headroom.
    pub essential: u64,
}

/// What is remembered of a guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Demand {
    used: Option<f64>,
    peak: f64,
    boost: f64,
}

impl Demand {
    /// Looks at a guest, `elapsed` seconds after the last time. `None` if it does not say what it uses.
    pub fn observe(
        &mut self,
        guest: &Guest,
        elapsed: f64,
        critical: bool,
        parameters: &Parameters,
    ) -> Option<Need> {
        let usage = guest.usage?;
        let used = used(guest)?;
        let now = used as f64;
        self.peak = now + (self.peak - now).max(0.0) * (-elapsed / parameters.peak_seconds).exp();
        self.watch_distress(&usage, elapsed, parameters);
        let least = LEAST_HEADROOM.min(parameters.headroom);
        let headroom = if critical { least } else { parameters.headroom };
        let growth = self.growth(now, elapsed);
        let need = |used: f64, headroom: f64| {
            let need = used * headroom + parameters.cushion as f64 + self.boost.max(growth);
            (need as u64).clamp(floor(guest), ceiling(guest))
        };
        Some(Need {
            used,
            wish: need(self.peak, headroom),
            claim: need(now, headroom),
            essential: need(now, least),
        })
    }

    /// What a guest will use in addition, soon, if it goes on as it does.
    fn growth(&mut self, now: f64, elapsed: f64) -> f64 {
        let before = self.used.replace(now).unwrap_or(now);
        // Moments that follow close upon each other say little about a trend.
        (now - before).max(0.0) / elapsed.max(1.0) * LOOKAHEAD
    }

    /// More than it seems to need, bytes.
    pub fn boost(&self) -> u64 {
        self.boost as u64
    }

    /// Boosts a guest that swaps or kills: what it uses says no longer what it needs.
    fn watch_distress(&mut self, usage: &Usage, elapsed: f64, parameters: &Parameters) {
        if usage.swap_in > SWAPS || usage.oom_kills > 0 {
            // Doubles once a second, however often it is looked at.
            let grown = if self.boost == 0.0 { FIRST_BOOST } else { self.boost * elapsed.min(1.0).exp2() };
            self.boost = grown.min(parameters.boost_max as f64);
        } else {
            self.boost *= BOOST_KEPT.powf(elapsed);
            if self.boost < LEAST_BOOST {
                self.boost = 0.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn guest(used: u64, swap_in: f64) -> Guest {
        let memory = 8192 * MIB;
        let usage = Usage { available: memory - used, swap_in, ..Usage::default() };
        Guest { memory, max: memory, usage: Some(usage), ..Guest::default() }
    }

    #[test]
    fn peaks_are_wished_for_but_not_claimed() {
        let parameters = Parameters::default();
        let mut demand = Demand::default();
        let need = demand.observe(&guest(4000 * MIB, 0.0), 1.0, false, &parameters).unwrap();
        assert_eq!((need.wish, need.claim), (5128 * MIB, 5128 * MIB));
        let need = demand.observe(&guest(1000 * MIB, 0.0), 50.0, false, &parameters).unwrap();
        assert_eq!(need.claim, 1378 * MIB);
        // A third (1/e) of the difference is left.
        let expected = 1378.0 + 1.25 * 3000.0 / std::f64::consts::E;
        assert!((need.wish as f64 / MIB as f64 - expected).abs() < 1.0);
    }

    #[test]
    fn distress_boosts_up_to_a_limit_and_is_forgotten() {
        let parameters = Parameters::default();
        let mut demand = Demand::default();
        for expected in [128, 256, 512, 1024, 2048, 2048] {
            demand.observe(&guest(1000 * MIB, 1e8), 1.0, false, &parameters).unwrap();
            assert_eq!(demand.boost(), expected * MIB);
        }
        demand.observe(&guest(1000 * MIB, 0.0), 1.0, false, &parameters).unwrap();
        assert_eq!(demand.boost(), (2048.0 * 0.95 * MIB as f64) as u64);
        for _ in 0..100 {
            demand.observe(&guest(1000 * MIB, 0.0), 1.0, false, &parameters).unwrap();
        }
        assert_eq!(demand.boost(), 0);
    }

    #[test]
    fn an_emergency_of_the_host_takes_the_headroom() {
        let need =
            Demand::default().observe(&guest(1000 * MIB, 0.0), 1.0, true, &Parameters::default()).unwrap();
        assert_eq!(need.claim, 1178 * MIB);
    }

    #[test]
    fn what_is_not_said_is_not_guessed() {
        let silent = Guest { usage: None, ..guest(0, 0.0) };
        assert_eq!(Demand::default().observe(&silent, 1.0, false, &Parameters::default()), None);
    }
}
