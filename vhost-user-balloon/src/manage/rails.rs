//! The rails: what no policy can break.
//!
//! A policy's wishes become targets of balloons here, by these rules:
//! - No guest is left less than its minimum, nor given more than its maximum. As long as there is enough for all, it is
//!   left what it uses and 5 % too.
//! - Memory is given only where it is there: donors shrink first, and others grow by what has come in, unless the host
//!   has it available anyway. If the reserve is in use and the wishes are more than the budget, they are cut by shares.
//! - Balloons grow slowly (from free memory faster) and shrink at once; small changes are left out.
//! - Guests that do not obey or say nothing are left alone.
//! - A guest that is out of memory gets some at once, before all others.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::account::{
    PAGE, Taker, available, budget, ceiling, comfortable_floor, critical, divide, floor, held, managed,
    percent, short,
};
use super::config::Parameters;
use super::model::{Guest, Snapshot, Wishes};
use super::policy::Event;

mod watch;

use watch::{Watch, Watched};

/// A guest with less of its memory available is out of memory, percent.
const EMERGENCY_PERCENT: f64 = 3.0;
/// If there was not enough for all within so many seconds, it is no emergency, but how things are.
const LATELY: f64 = 60.0;
/// The part of its balloon that a guest gets in an emergency.
const EMERGENCY_PART: u64 = 4;

/// Why a balloon gets a new target.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The policy wants the guest to have more.
    Give,
    /// The policy wants the guest to have less.
    Take,
    /// The guest is out of memory.
    Emergency,
    /// The host is out of memory, and the policy did not do enough about it.
    OverBudget,
    /// The balloon does not get where it should: it may stay where it is.
    NoProgress,
}

impl fmt::Display for Why {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self {
            Self::Give => "give",
            Self::Take => "take",
            Self::Emergency => "emergency",
            Self::OverBudget => "over-budget",
            Self::NoProgress => "no-progress",
        })
    }
}

/// A new target for a balloon.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Order {
    /// The guest's name.
    pub guest: String,
    /// Size that its balloon should have, bytes.
    pub balloon_bytes: u64,
    /// Why.
    pub why: Why,
}

/// What the rails made of a policy's wishes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// What is to be sent, by guest's name. Balloons that are not mentioned keep their targets.
    pub orders: Vec<Order>,
    /// What has happened.
    pub events: Vec<Event>,
}

/// The rails, and what they remember from snapshot to snapshot.
#[derive(Debug, Default)]
pub struct Rails {
    watch: Watch,
    critical: bool,
    over: bool,
    told_over: bool,
    /// When there was not enough for all.
    short_at: Option<f64>,
    /// Guests that are out of memory.
    emergencies: BTreeSet<String>,
}

/// A guest on its way through the rails.
struct Car<'a> {
    guest: &'a Guest,
    watched: Watched,
    /// What it has, and what was already promised to it, bytes.
    base: u64,
    /// What it should have, bytes.
    want: u64,
    why: Option<Why>,
}

impl Rails {
    /// Makes orders of a policy's wishes. To be called once for each snapshot, in order of time.
    pub fn apply(&mut self, snapshot: &Snapshot, wishes: &Wishes, parameters: &Parameters) -> Outcome {
        let mut events = Vec::new();
        self.watch_host(snapshot, parameters, &mut events);

        let mut guests: Vec<&Guest> = snapshot.guests.iter().filter(|guest| guest.memory > 0).collect();
        guests.sort_by(|one, other| one.name.cmp(&other.name));
        let watched = self.watch.look(&guests, snapshot.now, &mut events);

        let budget = budget(snapshot, parameters);
        let short = short(&guests, budget, parameters);
        if short {
            self.short_at = Some(snapshot.now);
        }
        let mut cars: Vec<Car> = guests
            .iter()
            .zip(watched)
            .map(|(guest, watched)| Car::new(guest, watched, wishes.get(&guest.name).copied(), short))
            .collect();
        if self.over {
            self.keep_budget(budget, short, &mut cars, &mut events);
        } else {
            self.told_over = false;
        }
        // What is given to a guest in an emergency must not have to be taken back in the next moment.
        let lately_short = self.short_at.is_some_and(|then| snapshot.now - then < LATELY);
        let mut emergencies = BTreeSet::new();
        for car in &mut cars {
            if car.rescue(lately_short) {
                if !self.emergencies.contains(&car.guest.name) {
                    events.push(Event::GuestEmergency { guest: car.guest.name.clone() });
                }
                emergencies.insert(car.guest.name.clone());
            }
        }
        self.emergencies = emergencies;
        let grants = give(snapshot, budget, parameters, &cars);

        let mut orders = Vec::new();
        for (car, grant) in cars.iter().zip(grants) {
            let inflate = car.inflate(self.critical, parameters);
            if let Some(order) = car.order(grant, inflate, parameters) {
                if order.balloon_bytes > car.guest.target {
                    self.watch.inflates(&car.guest.name, snapshot.now);
                }
                orders.push(order);
            }
        }
        Outcome { orders, events }
    }

    /// Watches the host's state, which lasts a little longer than its cause.
    fn watch_host(&mut self, snapshot: &Snapshot, parameters: &Parameters, events: &mut Vec<Event>) {
        let was = self.critical;
        self.critical = critical(&snapshot.host, was, parameters);
        if self.critical != was {
            events.push(if self.critical { Event::HostCritical } else { Event::HostRecovered });
        }
        let mark = if self.over { parameters.comfortable_percent } else { parameters.reserve_percent * 0.8 };
        self.over = self.critical || available(snapshot) < percent(snapshot.host.total, mark);
    }

    /// The reserve is in use: cuts what is wanted to the budget, by shares, but not below what guests cannot do without.
    fn keep_budget(&mut self, budget: u64, short: bool, cars: &mut [Car], events: &mut Vec<Event>) {
        let mut cut: Vec<&mut Car> = cars.iter_mut().filter(|car| managed(car.guest)).collect();
        let wanted: u64 = cut.iter().map(|car| car.want).sum();
        if wanted <= budget {
            return;
        }
        let takers: Vec<_> = cut
            .iter()
            .map(|car| Taker {
                low: car.least(short).min(car.want),
                high: car.want,
                weight: f64::from(car.guest.shares),
            })
            .collect();
        let parts = divide(budget, &takers);
        let missing = parts.iter().sum::<u64>().saturating_sub(budget);
        for (car, part) in cut.iter_mut().zip(parts) {
            if part < car.want {
                car.want = part;
                car.why = Some(Why::OverBudget);
            }
        }
        // Some bytes are lost to rounding, and a page is not worth a word.
        if missing > PAGE * cut.len() as u64 && !std::mem::replace(&mut self.told_over, true) {
            events.push(Event::OverBudget { missing });
        }
    }
}

impl<'a> Car<'a> {
    fn new(guest: &'a Guest, watched: Watched, wish: Option<u64>, short: bool) -> Self {
        let asked = guest.memory.saturating_sub(guest.target);
        let mut car = Self { guest, watched, base: asked.max(held(guest)), want: asked, why: None };
        if let Some(wish) = wish {
            car.want = wish;
        }
        car.want = car.want.clamp(car.least(short), ceiling(guest));
        car
    }

    /// Less than this it is not left.
    fn least(&self, short: bool) -> u64 {
        let floor = floor(self.guest);
        // What it uses is a reason not to take, but none to give: that is up to the policy.
        if short { floor } else { comfortable_floor(self.guest).min(held(self.guest).max(floor)) }
    }

    /// Whether the guest is out of memory, by itself or in the opinion of its kernel.
    fn emergency(&self) -> bool {
        let low = self.guest.usage.is_some_and(|usage| {
            usage.oom_kills > 0 || usage.available < percent(held(self.guest), EMERGENCY_PERCENT)
        });
        self.guest.balloon > 0 && (low || self.watched.took_back)
    }

    /// Gives to a guest that is out of memory: not where memory is short, for then shares decide; but always where
    /// processes are killed.
    fn rescue(&mut self, lately_short: bool) -> bool {
        if !self.emergency() || lately_short && !self.killed() {
            return false;
        }
        let want = held(self.guest) + (self.guest.balloon / EMERGENCY_PART).max(PAGE);
        self.want = self.want.max(want).min(ceiling(self.guest));
        self.why = Some(Why::Emergency);
        true
    }

    fn killed(&self) -> bool {
        self.watched.took_back || self.guest.usage.is_some_and(|usage| usage.oom_kills > 0)
    }

    /// What it wants in addition to what it has or was promised; nothing if it may not have it.
    fn more(&self) -> u64 {
        let left_alone = self.guest.inactive && self.why != Some(Why::Emergency);
        if left_alone { 0 } else { self.want.saturating_sub(self.base) }
    }

    /// How much its balloon may grow now, bytes.
    fn inflate(&self, critical: bool, parameters: &Parameters) -> u64 {
        // Whoever was not asked for long may not catch up.
        let seconds = self.watched.since_inflated.unwrap_or(f64::MAX).min(parameters.period_seconds * 1.5);
        let fast = percent(self.guest.memory, parameters.emergency_inflate_percent * seconds);
        if critical {
            return fast;
        }
        // It does not hurt a guest to give what it does not use for anything, not even as cache.
        let free = self.guest.usage.map_or(0, |usage| usage.free / 2);
        fast.min(free.max(percent(self.guest.memory, parameters.inflate_percent * seconds)))
    }

    /// The new target of its balloon, if it is worth one. `grant` is how much of what it wants in addition is there, and
    /// `inflate` how much its balloon may grow.
    fn order(&self, grant: u64, inflate: u64, parameters: &Parameters) -> Option<Order> {
        let guest = self.guest;
        let order = |balloon_bytes, why| Some(Order { guest: guest.name.clone(), balloon_bytes, why });
        if self.watched.gives_up && guest.balloon < guest.target {
            // It has nothing to give, and its driver would go on trying.
            return order(guest.balloon, Why::NoProgress);
        }
        let emergency = self.why == Some(Why::Emergency);
        if guest.inactive && !emergency {
            return None;
        }
        let keep = if self.want > self.base { self.base + grant } else { self.want };
        // Rounded in favour of the guest.
        let mut balloon = guest.memory.saturating_sub(keep) / PAGE * PAGE;
        if balloon < guest.target {
            let step = guest.target - balloon;
            let worth = step >= parameters.grow_step.max(PAGE)
                || emergency
                || balloon == 0
                || held(guest) < floor(guest);
            return if worth { order(balloon, self.why.unwrap_or(Why::Give)) } else { None };
        }
        if !managed(guest) || self.watched.resting {
            return None;
        }
        // A target that was given stays; from there it goes on as fast as it may.
        balloon = balloon.min((guest.balloon + inflate / PAGE * PAGE).max(guest.target));
        let step = balloon.saturating_sub(guest.target);
        let worth = step > 0 && step >= percent(guest.memory, parameters.shrink_step_percent);
        if worth { order(balloon, self.why.filter(|_| !emergency).unwrap_or(Why::Take)) } else { None }
    }
}

/// Divides what is there among those that want more: first to guests that are out of memory, then to the others, by
/// shares. More than what is there can be had only up to the minimum.
fn give(snapshot: &Snapshot, budget: u64, parameters: &Parameters, cars: &[Car]) -> Vec<u64> {
    let total = snapshot.host.total;
    let free = available(snapshot);
    // What was promised and not taken yet is no longer available.
    let promised: u64 = cars.iter().map(|car| car.base - held(car.guest)).sum();
    let had: u64 = cars.iter().filter(|car| managed(car.guest)).map(|car| car.base).sum();
    let donated = budget.saturating_sub(had);
    let spare = |reserve: f64| free.saturating_sub(promised).saturating_sub(percent(total, reserve));
    let pool = donated.max(spare(parameters.reserve_percent));
    // Where processes are killed, half of the reserve may be used.
    let killed = cars.iter().any(|car| car.why == Some(Why::Emergency) && car.killed());
    let rescue = if killed { pool.max(spare(parameters.reserve_percent / 2.0)) } else { pool };

    let takers = |emergency: bool| -> Vec<Taker> {
        cars.iter()
            .map(|car| {
                let high = if (car.why == Some(Why::Emergency)) == emergency { car.more() } else { 0 };
                // The minimum is due in any case.
                let low = floor(car.guest).saturating_sub(car.base).min(high);
                Taker { low, high, weight: f64::from(car.guest.shares) }
            })
            .collect()
    };
    let first = divide(rescue, &takers(true));
    let rest = pool.saturating_sub(first.iter().sum::<u64>());
    let then = divide(rest, &takers(false));
    first.iter().zip(then).map(|(one, other)| one + other).collect()
}

#[cfg(test)]
mod tests;
