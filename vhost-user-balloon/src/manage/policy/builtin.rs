//! The built-in policy.
//!
//! | state of the host | each guest gets |
//! |---|---|
//! | comfortable | all that it can have: nothing is taken |
//! | plenty | its wish, and a part of the rest by shares |
//! | tight | its claim, and a part of the rest towards its wish |
//! | scarce | what is essential, and a part of the rest towards its claim |
//! | and not even enough for that | as much of it as its shares say, and in any case its minimum |
//!
//! Wishes and claims are those of [`Demand`]. In scarcity memory is taken first from whom it costs least: from the guest
//! with the fewest shares for each byte that it has (min-funding revocation, Waldspurger 2002), where bytes that it has and
//! does not use can be taxed.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::comfort::Comfort;
use super::demand::{Demand, Need};
use crate::manage::account::{
    self, Taker, available, budget, ceiling, divide, floor, held, managed, percent,
};
use crate::manage::config::Parameters;
use crate::manage::model::{Guest, Policy, Snapshot, Wishes};

/// State of the host, as the built-in policy sees it.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Nothing is taken.
    #[default]
    Comfortable,
    /// There is enough for all wishes.
    Plenty,
    /// There is enough for all claims.
    Tight,
    /// There is not.
    Scarce,
}

impl fmt::Display for Mode {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self {
            Self::Comfortable => "comfortable",
            Self::Plenty => "plenty",
            Self::Tight => "tight",
            Self::Scarce => "scarce",
        })
    }
}

/// What the built-in policy thinks of the host and its guests: for metrics and for scripts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Assessment {
    /// State of the host.
    pub mode: Mode,
    /// The host is about to run out of memory.
    pub critical: bool,
    /// What all managed guests can have together, bytes.
    pub budget: u64,
    /// What they wish together, bytes.
    pub wishes: u64,
    /// What they claim together, bytes.
    pub claims: u64,
    /// What single guests need, by name. Guests that say nothing are not in it.
    pub needs: BTreeMap<String, Need>,
}

impl Assessment {
    /// What is claimed and not there, bytes.
    pub fn overcommitted(&self) -> u64 {
        self.claims.saturating_sub(self.budget)
    }
}

/// The built-in policy.
#[derive(Debug)]
pub struct Builtin {
    parameters: Parameters,
    demands: BTreeMap<String, Demand>,
    comfort: Comfort,
    critical: bool,
    last: Option<f64>,
    assessment: Assessment,
}

impl Builtin {
    /// A policy that has seen nothing yet.
    pub fn new(parameters: Parameters) -> Self {
        Self {
            parameters,
            demands: BTreeMap::new(),
            comfort: Comfort::default(),
            critical: false,
            last: None,
            assessment: Assessment::default(),
        }
    }

    /// Goes on with other parameters.
    pub fn configure(&mut self, parameters: Parameters) {
        self.parameters = parameters;
    }

    /// What it thinks of the snapshot that it saw last.
    pub fn assessment(&self) -> &Assessment {
        &self.assessment
    }

    /// What every guest should have. As [`Policy::decide`], which cannot fail here.
    pub fn wishes(&mut self, snapshot: &Snapshot) -> Wishes {
        let elapsed = self.last.map_or(0.0, |last| (snapshot.now - last).max(0.0));
        self.last = Some(snapshot.now);
        self.critical = account::critical(&snapshot.host, self.critical, &self.parameters);
        let mut guests: Vec<&Guest> = snapshot.guests.iter().collect();
        guests.sort_by(|one, other| one.name.cmp(&other.name));
        let needs = self.observe(&guests, elapsed);
        let calm = self.comfort.watch(snapshot, &self.parameters);

        let managed: Vec<(&Guest, Need)> = guests
            .iter()
            .filter(|guest| managed(guest))
            .filter_map(|guest| Some((*guest, *needs.get(&guest.name)?)))
            .collect();
        let budget = budget(snapshot, &self.parameters);
        let wishes: u64 = managed.iter().map(|(_, need)| need.wish).sum();
        let claims: u64 = managed.iter().map(|(_, need)| need.claim).sum();
        let mode = if calm {
            Mode::Comfortable
        } else if wishes <= budget {
            Mode::Plenty
        } else if claims <= budget {
            Mode::Tight
        } else {
            Mode::Scarce
        };
        self.assessment = Assessment { mode, critical: self.critical, budget, wishes, claims, needs };
        if mode == Mode::Comfortable {
            return self.let_go(snapshot, &guests);
        }
        let parts = match mode {
            Mode::Comfortable | Mode::Plenty => plenty(budget, &managed),
            Mode::Tight => tight(budget, &managed),
            Mode::Scarce => scarce(budget, &managed, &self.parameters),
        };
        managed.iter().zip(parts).map(|((guest, _), part)| (guest.name.clone(), part)).collect()
    }

    /// What single guests need. Guests that are gone are forgotten.
    fn observe(&mut self, guests: &[&Guest], elapsed: f64) -> BTreeMap<String, Need> {
        let mut before = std::mem::take(&mut self.demands);
        let mut needs = BTreeMap::new();
        for guest in guests.iter().filter(|guest| guest.memory > 0) {
            let mut demand = before.remove(&guest.name).unwrap_or_default();
            if let Some(need) = demand.observe(guest, elapsed, self.critical, &self.parameters) {
                needs.insert(guest.name.clone(), need);
            }
            self.demands.insert(guest.name.clone(), demand);
        }
        needs
    }

    /// Gives back to all guests, as far as the host stays comfortable.
    fn let_go(&self, snapshot: &Snapshot, guests: &[&Guest]) -> Wishes {
        let mark = percent(snapshot.host.total, self.parameters.comfortable_percent);
        let rest = available(snapshot).saturating_sub(mark);
        let guests: Vec<_> = guests.iter().filter(|guest| guest.memory > 0 && !guest.inactive).collect();
        let takers: Vec<_> = guests
            .iter()
            .map(|guest| Taker {
                low: 0,
                high: ceiling(guest).saturating_sub(held(guest)),
                weight: f64::from(guest.shares),
            })
            .collect();
        guests
            .iter()
            .zip(divide(rest, &takers))
            .map(|(guest, more)| {
                (guest.name.clone(), (held(guest) + more).clamp(floor(guest), ceiling(guest)))
            })
            .collect()
    }
}

impl Policy for Builtin {
    fn decide(&mut self, snapshot: &Snapshot) -> Result<Wishes, String> {
        Ok(self.wishes(snapshot))
    }
}

/// Wishes, and the rest by shares: who has more memory free than others is not the one who will need it next.
fn plenty(budget: u64, guests: &[(&Guest, Need)]) -> Vec<u64> {
    let wishes: u64 = guests.iter().map(|(_, need)| need.wish).sum();
    let takers: Vec<_> = guests
        .iter()
        .map(|(guest, need)| Taker {
            low: 0,
            high: ceiling(guest).saturating_sub(need.wish),
            weight: f64::from(guest.shares),
        })
        .collect();
    let rest = divide(budget.saturating_sub(wishes), &takers);
    guests.iter().zip(rest).map(|((_, need), more)| need.wish + more).collect()
}

/// Claims, and the rest in proportion to shares and what is missing to the wish.
fn tight(budget: u64, guests: &[(&Guest, Need)]) -> Vec<u64> {
    let claims: u64 = guests.iter().map(|(_, need)| need.claim).sum();
    let takers: Vec<_> = guests
        .iter()
        .map(|(guest, need)| {
            let high = need.wish.saturating_sub(need.claim);
            Taker { low: 0, high, weight: f64::from(guest.shares) * high as f64 }
        })
        .collect();
    let rest = divide(budget.saturating_sub(claims), &takers);
    guests.iter().zip(rest).map(|((_, need), more)| need.claim + more).collect()
}

/// What is essential, and a part of the rest towards claims; or less, if there is not even enough for that.
///
/// Taking always from the guest with the least `shares / (bytes * (f + k * (1 - f)))`, until it is no longer the least, ends
/// where these are equal for all from whom was taken. `f` is the part of its bytes that a guest uses, and `k` what an
/// unused one costs. As what is needed grows, nothing here jumps: a jump would be followed by another one back.
fn scarce(budget: u64, guests: &[(&Guest, Need)], parameters: &Parameters) -> Vec<u64> {
    let price = 1.0 / (1.0 - parameters.tau);
    let weight = |guest: &Guest, need: &Need| {
        let active = (need.used as f64 / held(guest).max(1) as f64).min(1.0);
        f64::from(guest.shares) / (active + price * (1.0 - active))
    };
    let takers: Vec<_> = guests
        .iter()
        .map(|(guest, need)| Taker { low: floor(guest), high: need.essential, weight: weight(guest, need) })
        .collect();
    let first = divide(budget, &takers);
    let takers: Vec<_> = guests
        .iter()
        .zip(&first)
        .map(|((guest, need), first)| Taker {
            low: 0,
            high: need.claim.saturating_sub(*first),
            weight: weight(guest, need),
        })
        .collect();
    let rest = divide(budget.saturating_sub(first.iter().sum()), &takers);
    first.into_iter().zip(rest).map(|(first, more)| first + more).collect()
}

#[cfg(test)]
mod tests;
