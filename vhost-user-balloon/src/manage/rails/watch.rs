//! Whether balloons do what they are asked for.

use std::collections::BTreeMap;

use crate::manage::account::PAGE;
use crate::manage::model::Guest;
use crate::manage::policy::Event;

/// A balloon that has not moved towards its target for so long does not get there, seconds.
const PATIENCE: f64 = 3.0;
/// It is asked for nothing more for so long, seconds.
const REST: f64 = 60.0;
/// A balloon is at its target if it is as close as this, bytes.
const CLOSE: u64 = 4 << 20;

/// What is to be said of a balloon at this moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Watched {
    /// It has made no progress for long enough: its target should become what it is.
    pub gives_up: bool,
    /// It is asked for nothing more for a while.
    pub resting: bool,
    /// The guest has taken memory back that it was not asked to take.
    pub took_back: bool,
    /// How long it may have grown since it was last asked to, seconds; `None` if it never was.
    pub since_inflated: Option<f64>,
}

/// What is remembered of a balloon.
#[derive(Clone, Copy, Debug)]
struct Memory {
    balloon: u64,
    target: u64,
    /// When it was at its target, or moved towards it.
    moved: f64,
    rests_until: f64,
    inflated: Option<f64>,
}

/// Watches balloons.
#[derive(Debug, Default)]
pub(super) struct Watch {
    balloons: BTreeMap<String, Memory>,
}

impl Watch {
    /// Looks at all balloons. What it says is in the order of these guests; all others are forgotten.
    pub fn look(&mut self, guests: &[&Guest], now: f64, events: &mut Vec<Event>) -> Vec<Watched> {
        let mut before = std::mem::take(&mut self.balloons);
        let mut said = Vec::with_capacity(guests.len());
        for guest in guests {
            let mut memory = before.remove(&guest.name).unwrap_or(Memory {
                balloon: guest.balloon,
                target: guest.target,
                moved: now,
                rests_until: now,
                inflated: None,
            });
            let watched = memory.look(guest, now);
            if watched.gives_up {
                events.push(Event::NoProgress {
                    guest: guest.name.clone(),
                    target: guest.target,
                    balloon: guest.balloon,
                });
            }
            self.balloons.insert(guest.name.clone(), memory);
            said.push(watched);
        }
        said
    }

    /// This guest's balloon is asked to grow.
    pub fn inflates(&mut self, guest: &str, now: f64) {
        if let Some(memory) = self.balloons.get_mut(guest) {
            memory.inflated = Some(now);
        }
    }
}

impl Memory {
    fn look(&mut self, guest: &Guest, now: f64) -> Watched {
        let away = guest.balloon.abs_diff(guest.target);
        let asked_anew = guest.target != self.target;
        let closer = away + PAGE <= self.balloon.abs_diff(guest.target);
        if away <= CLOSE || asked_anew || closer || guest.inactive {
            self.moved = now;
        }
        let asked_to_shrink = guest.target.min(self.target) < self.balloon;
        let took_back = guest.balloon < self.balloon && !asked_to_shrink;
        // What the balloon's daemon says of it counts at once, although its guest is left alone because of it: nobody else
        // would ever end what it is trying to do.
        let stuck = guest.stuck && guest.balloon < guest.target;
        let gives_up = (stuck || now - self.moved >= PATIENCE) && now >= self.rests_until;
        if gives_up {
            self.rests_until = now + REST;
        }
        self.balloon = guest.balloon;
        self.target = guest.target;
        Watched {
            gives_up,
            resting: now < self.rests_until,
            took_back,
            since_inflated: self.inflated.map(|then| now - then),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn look(watch: &mut Watch, now: f64, balloon: u64, target: u64) -> Watched {
        let guest =
            Guest { name: "a".into(), balloon: balloon * MIB, target: target * MIB, ..Guest::default() };
        watch.look(&[&guest], now, &mut Vec::new())[0]
    }

    #[test]
    fn a_balloon_that_moves_is_waited_for() {
        let mut watch = Watch::default();
        for now in 0..20 {
            let watched = look(&mut watch, f64::from(now), now as u64, 1000);
            assert!(!watched.gives_up && !watched.resting && !watched.took_back);
        }
    }

    #[test]
    fn a_balloon_that_stands_is_given_up_once() {
        let mut watch = Watch::default();
        let given_up: Vec<_> =
            (0..70).filter(|now| look(&mut watch, f64::from(*now), 10, 1000).gives_up).collect();
        assert_eq!(given_up, [3, 63]);
        assert!(look(&mut watch, 70.0, 10, 1000).resting);
        // At its target it has all the time in the world.
        let mut watch = Watch::default();
        assert!((0..70).all(|now| !look(&mut watch, f64::from(now), 1000, 1000).gives_up));
    }

    #[test]
    fn a_guest_takes_back_only_what_it_was_not_asked_to_take() {
        let mut watch = Watch::default();
        look(&mut watch, 0.0, 1000, 1000);
        assert!(!look(&mut watch, 1.0, 900, 800).took_back);
        assert!(!look(&mut watch, 2.0, 800, 800).took_back);
        assert!(look(&mut watch, 3.0, 799, 800).took_back);
        // It was asked to take back some, and has not had the time to hear that it may keep the rest.
        look(&mut watch, 4.0, 799, 100);
        assert!(!look(&mut watch, 5.0, 500, 600).took_back);
    }

    #[test]
    fn who_is_gone_is_forgotten() {
        let mut watch = Watch::default();
        look(&mut watch, 0.0, 10, 1000);
        watch.inflates("a", 0.0);
        assert_eq!(look(&mut watch, 2.0, 10, 1000).since_inflated, Some(2.0));
        watch.look(&[], 3.0, &mut Vec::new());
        assert_eq!(look(&mut watch, 4.0, 10, 1000).since_inflated, None);
    }
}
