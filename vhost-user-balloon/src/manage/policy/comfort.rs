//! Whether the host has memory to spare, so that nothing need be taken from any guest.

use crate::manage::account::{available, comfortable, percent};
use crate::manage::config::Parameters;
use crate::manage::model::Snapshot;

/// The host is comfortable again only with so much more available than is needed to be so, percent of its memory.
const MARGIN_PERCENT: f64 = 5.0;
/// And only after so many seconds of it.
const FIRST_CALM: f64 = 10.0;
/// It is not comfortable if it will not be in so many seconds, should available memory shrink on as it does.
const LOOKAHEAD: f64 = 4.0;
/// If it then is short again within this time, seconds, the next calm has to be twice as long.
const RELAPSE: f64 = 300.0;
/// But no longer than this, seconds.
const LONGEST_CALM: f64 = 900.0;

/// Whether the host is comfortable, with a memory, so that it does not change its mind all the time.
#[derive(Debug, Default)]
pub(super) struct Comfort {
    /// Memory is managed; if not, it is left alone.
    managing: bool,
    /// Since when it need not be.
    calm_since: Option<f64>,
    /// How long that has to last.
    calm: f64,
    /// When it was left alone at last.
    left_at: Option<f64>,
    /// When the host was last looked at, and what was available, bytes.
    last: Option<(f64, u64)>,
}

impl Comfort {
    /// Looks at the host. True: comfortable.
    pub fn watch(&mut self, snapshot: &Snapshot, parameters: &Parameters) -> bool {
        let now = snapshot.now;
        let soon = self.soon_available(snapshot);
        if !self.managing {
            let mark = percent(snapshot.host.total, parameters.comfortable_percent);
            if comfortable(snapshot, parameters) && soon >= mark {
                return true;
            }
            self.managing = true;
            self.calm_since = None;
            // What was given back was soon missing: guests fill what they get. Wait longer before it is tried again.
            let relapse = self.left_at.is_some_and(|left| now - left < RELAPSE.max(self.calm));
            self.calm = if relapse { (self.calm * 2.0).min(LONGEST_CALM) } else { FIRST_CALM };
            return false;
        }
        let margin = percent(snapshot.host.total, parameters.comfortable_percent + MARGIN_PERCENT);
        if !comfortable(snapshot, parameters) || soon < margin {
            self.calm_since = None;
            return false;
        }
        if now - *self.calm_since.get_or_insert(now) < self.calm {
            return false;
        }
        self.managing = false;
        self.left_at = Some(now);
        true
    }

    /// What will be available soon, if it goes on as it does; not more than now.
    fn soon_available(&mut self, snapshot: &Snapshot) -> u64 {
        let free = available(snapshot);
        // The trend is that of the host: a reservation is no use that goes on growing.
        let on_host = snapshot.host.available;
        let Some((then, before)) = self.last.replace((snapshot.now, on_host)) else { return free };
        // Moments that follow close upon each other say little about a trend.
        let elapsed = (snapshot.now - then).max(1.0);
        let shrinks = before.saturating_sub(on_host) as f64 / elapsed;
        free.saturating_sub((shrinks * LOOKAHEAD) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manage::model::Host;

    const GIB: f64 = (1u64 << 30) as f64;

    /// A host of 100 GiB with so much available.
    fn snapshot(now: f64, available: f64) -> Snapshot {
        let host =
            Host { total: (100.0 * GIB) as u64, available: (available * GIB) as u64, ..Host::default() };
        Snapshot { now, host, ..Snapshot::default() }
    }

    #[test]
    fn a_reservation_is_no_trend() {
        let mut comfort = Comfort::default();
        let parameters = Parameters::default();
        assert!(comfort.watch(&snapshot(0.0, 60.0), &parameters));
        let reserved = Snapshot { reserved: (20.0 * GIB) as u64, ..snapshot(1.0, 60.0) };
        assert!(comfort.watch(&reserved, &parameters), "40 % are left");
    }

    /// Says at each second whether the host is comfortable, where so many percent are available.
    fn comfort(available: impl IntoIterator<Item = f64>) -> Vec<bool> {
        let mut comfort = Comfort::default();
        let parameters = Parameters::default();
        (0..)
            .zip(available)
            .map(|(now, available)| comfort.watch(&snapshot(f64::from(now), available), &parameters))
            .collect()
    }

    #[test]
    fn comfort_is_not_believed_at_once() {
        let said = comfort([10.0; 5].into_iter().chain([30.0; 30]));
        assert_eq!(said.iter().position(|calm| *calm), Some(15));
        // A little more than is needed to be comfortable is not enough to become so.
        assert!(!comfort([10.0; 5].into_iter().chain([18.0; 100])).contains(&true));
        // But it is enough to stay so.
        assert!(!comfort([30.0; 5].into_iter().chain((0..100).map(|_| 18.0)).skip(6)).contains(&false));
    }

    #[test]
    fn comfort_ends_before_the_last_of_it_is_gone() {
        let said = comfort([40.0, 36.0, 32.0, 28.0, 24.0]);
        assert_eq!(said, [true, true, true, false, false]);
    }

    #[test]
    fn comfort_that_does_not_last_is_believed_less_and_less() {
        // As soon as guests are given memory, they use it up.
        let mut comfort = Comfort::default();
        let parameters = Parameters::default();
        let mut available = 10.0;
        let mut began = Vec::new();
        for now in 0..10_000 {
            let calm = comfort.watch(&snapshot(f64::from(now), available), &parameters);
            if calm && available > 20.0 {
                began.push(now);
            }
            available = if calm { 10.0 } else { 30.0 };
        }
        assert!((10..20).contains(&began.len()), "{began:?}");
        let waits: Vec<_> = began.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(waits.is_sorted() && *waits.last().unwrap() > 800, "{waits:?}");
    }
}
