//! Tries a policy on a recording: what it would have decided, against what was done.
//!
//! The guests of a recording do what they did, so this is no simulation: it is told how a balloon of another size would
//! have changed what the guest had available, and what the host had to hold, to a first approximation. A guest that was
//! left more is taken to have touched as large a part of it as of what it had; one that was left less is taken to have used
//! as much as before.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::account::percent;
use super::config::Config;
use super::event::Size;
use super::model::{Guest, Snapshot, Usage};
use super::policy::{Decider, Event};
use super::record::{Line, ReadError, Tick, read};

/// A guest with less of its memory available is in distress, percent.
const DISTRESS_PERCENT: f64 = 3.0;

/// And so is one that reads more than this from its swap, bytes a second.
const DISTRESS_SWAP_IN: f64 = (1 << 20) as f64;

/// Policies give all but the reserve: a host is short if it has less of it, by more than what lies in rounding and delay.
const SHORT: f64 = 0.8;

/// More time than this between two snapshots is a time in which the manager did not run, seconds.
const GAP: f64 = 30.0;

/// What came of decisions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Seconds in which the host had less available than four fifths of what it should keep for itself.
    pub over_budget_s: f64,
    /// Seconds in which a guest was short of memory, of all guests together.
    pub distress_s: f64,
    /// What went into balloons and out of them, bytes.
    pub moved_bytes: u64,
    /// The most that was in all balloons at once, bytes.
    pub most_ballooned_bytes: u64,
    /// Targets that were sent.
    pub orders: u64,
}

/// Where two policies disagree most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// When, milliseconds since 1970.
    pub ts_ms: u64,
    /// About which guest.
    pub guest: String,
    /// Size of its balloon, bytes.
    pub done_bytes: u64,
    /// What it would have been, bytes.
    pub would_bytes: u64,
}

/// What came out of a replay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Snapshots in the recording.
    pub ticks: u64,
    /// Time that they span, without gaps, seconds.
    pub seconds: f64,
    /// What was done.
    pub done: Tally,
    /// What would have been done.
    pub would: Tally,
    /// How often the script would have failed.
    pub policy_failures: u64,
    /// Why it failed at first.
    pub policy_failure: Option<String>,
    /// The largest difference.
    pub largest_difference: Option<Difference>,
}

/// A decision of the replay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Would {
    /// When, milliseconds since 1970.
    pub ts_ms: u64,
    /// About which guest.
    pub guest: String,
    /// Size that its balloon would have been asked for, bytes.
    pub balloon_bytes: u64,
    /// Size of it in the recording at that moment, bytes.
    pub done_bytes: u64,
}

/// A replay that goes on.
#[derive(Debug)]
pub struct Replay {
    /// Decides instead of what the recording says.
    config: Option<Config>,
    reserve_percent: f64,
    decider: Decider,
    /// The balloons as they would be, by guest.
    balloons: BTreeMap<String, Balloon>,
    /// The last snapshot's time, and its balloons, by guest.
    last: Option<(f64, BTreeMap<String, u64>)>,
    summary: Summary,
}

/// A balloon as it would be.
#[derive(Clone, Copy, Debug)]
struct Balloon {
    size: u64,
    target: u64,
    /// The guest's memory: another one is another guest.
    memory: u64,
}

impl Replay {
    /// Decides by `config`, or if there is none, by that of the recording.
    pub fn new(config: Option<Config>) -> Self {
        let used = config.clone().unwrap_or_default();
        Self {
            reserve_percent: used.policy.reserve_percent,
            decider: Decider::new(&used),
            config,
            balloons: BTreeMap::new(),
            last: None,
            summary: Summary::default(),
        }
    }

    /// Replays a whole recording, and calls `each` for every decision.
    pub fn run(mut self, path: &Path, mut each: impl FnMut(&Would)) -> Result<Summary, ReadError> {
        for line in read(path)? {
            match line? {
                Line::Configuration(config) if self.config.is_none() => {
                    self.reserve_percent = config.policy.reserve_percent;
                    self.decider = Decider::new(&config);
                }
                Line::Configuration(_) => {}
                Line::Tick(tick) => self.tick(&tick).iter().for_each(&mut each),
            }
        }
        Ok(self.summary)
    }

    /// Replays a moment.
    fn tick(&mut self, tick: &Tick) -> Vec<Would> {
        let done = &tick.snapshot;
        // The manager was started anew, or the host slept: balloons moved unseen.
        let seconds = self.last.as_ref().map_or(0.0, |(then, _)| done.now - then);
        let gap = !(0.0..GAP).contains(&seconds);
        if gap {
            self.last = None;
            self.balloons.clear();
        }
        let seconds = if gap { 0.0 } else { seconds };
        self.summary.ticks += 1;
        self.summary.seconds += seconds;

        let moved = self.last.as_ref().map_or(0, |(_, before)| moved(done, before));
        count(&mut self.summary.done, done, seconds, self.reserve_percent);
        self.summary.done.moved_bytes += moved;
        self.summary.done.orders += tick.orders.len() as u64;

        self.move_balloons(done);
        let would = self.imagine(done);
        count(&mut self.summary.would, &would, seconds, self.reserve_percent);
        self.compare(tick);

        let decision = self.decider.decide(&would);
        self.summary.policy_failures += u64::from(decision.fallback);
        for event in decision.events {
            if let Event::PolicyFailed { reason } = event {
                self.summary.policy_failure.get_or_insert(reason);
            }
        }
        self.summary.would.orders += decision.orders.len() as u64;
        for order in &decision.orders {
            if let Some(balloon) = self.balloons.get_mut(&order.guest) {
                balloon.target = order.balloon_bytes.min(balloon.memory);
            }
        }
        let sizes = done.guests.iter().map(|guest| (guest.name.clone(), guest.balloon)).collect();
        self.last = Some((done.now, sizes));
        let done_bytes =
            |name: &str| done.guests.iter().find(|guest| guest.name == name).map(|guest| guest.balloon);
        decision
            .orders
            .into_iter()
            .map(|order| Would {
                ts_ms: tick.ts_ms,
                done_bytes: done_bytes(&order.guest).unwrap_or(0),
                guest: order.guest,
                balloon_bytes: order.balloon_bytes,
            })
            .collect()
    }

    /// Balloons follow their targets, as far as their guests can and do.
    fn move_balloons(&mut self, done: &Snapshot) {
        let guests: BTreeMap<&str, &Guest> =
            done.guests.iter().map(|guest| (guest.name.as_str(), guest)).collect();
        self.balloons.retain(|name, balloon| {
            guests.get(name.as_str()).is_some_and(|guest| guest.memory == balloon.memory)
        });
        for (name, guest) in guests {
            let begin = Balloon { size: guest.balloon, target: guest.target, memory: guest.memory };
            let balloon = self.balloons.entry(name.to_owned()).or_insert(begin);
            // One that did not obey would not have obeyed.
            if guest.inactive {
                continue;
            }
            let before = balloon.size;
            if balloon.target <= balloon.size {
                balloon.size = balloon.target;
            } else if let Some(usage) = &guest.usage {
                let room = available(usage, guest, balloon.size);
                balloon.size =
                    balloon.target.min(balloon.size.saturating_add(u64::try_from(room).unwrap_or(0)));
            }
            self.summary.would.moved_bytes += before.abs_diff(balloon.size);
        }
    }

    /// The snapshot, as it would be with the other balloons.
    fn imagine(&self, done: &Snapshot) -> Snapshot {
        let mut would = done.clone();
        let mut host = i128::from(done.host.available);
        for guest in &mut would.guests {
            let Some(balloon) = self.balloons.get(&guest.name) else { continue };
            let more = i128::from(guest.balloon) - i128::from(balloon.size);
            let left = i128::from(guest.memory.saturating_sub(balloon.size));
            let resident = i128::from(guest.resident);
            let held = i128::from(guest.memory.saturating_sub(guest.balloon)).max(1);
            let touched = if more > 0 { resident * left / held } else { resident };
            let resident_then = touched.min(left);
            host += resident - resident_then;
            let on_oom = guest.deflates_on_oom;
            if let Some(usage) = &mut guest.usage {
                let moved = |bytes: u64| to_bytes(i128::from(bytes) + more);
                let total = if on_oom { usage.total } else { moved(usage.total) };
                (usage.total, usage.available, usage.free) =
                    (total, moved(usage.available).min(total), moved(usage.free).min(total));
            }
            guest.resident = to_bytes(resident_then);
            (guest.balloon, guest.target) = (balloon.size, balloon.target);
        }
        would.host.available = to_bytes(host).min(would.host.total);
        would
    }

    fn compare(&mut self, tick: &Tick) {
        for guest in &tick.snapshot.guests {
            let Some(balloon) = self.balloons.get(&guest.name) else { continue };
            let largest = self.summary.largest_difference.as_ref();
            let largest = largest.map_or(0, |it| it.done_bytes.abs_diff(it.would_bytes));
            if balloon.size.abs_diff(guest.balloon) > largest {
                self.summary.largest_difference = Some(Difference {
                    ts_ms: tick.ts_ms,
                    guest: guest.name.clone(),
                    done_bytes: guest.balloon,
                    would_bytes: balloon.size,
                });
            }
        }
    }
}

/// What a guest would have available with a balloon of another size, bytes: less than nothing if it would miss memory.
fn available(usage: &Usage, guest: &Guest, balloon: u64) -> i128 {
    i128::from(usage.available) + i128::from(guest.balloon) - i128::from(balloon)
}

fn to_bytes(bytes: i128) -> u64 {
    bytes.clamp(0, i128::from(u64::MAX)) as u64
}

/// What moved since the last snapshot.
fn moved(now: &Snapshot, before: &BTreeMap<String, u64>) -> u64 {
    now.guests
        .iter()
        .filter_map(|guest| Some(guest.balloon.abs_diff(*before.get(&guest.name)?)))
        .fold(0, u64::saturating_add)
}

fn count(tally: &mut Tally, snapshot: &Snapshot, seconds: f64, reserve_percent: f64) {
    let host = &snapshot.host;
    if host.available.saturating_sub(snapshot.reserved) < percent(host.total, SHORT * reserve_percent) {
        tally.over_budget_s += seconds;
    }
    let distressed = snapshot.guests.iter().filter(|guest| in_distress(guest)).count();
    #[expect(clippy::cast_precision_loss, reason = "there are few guests")]
    let distressed = distressed as f64;
    tally.distress_s += seconds * distressed;
    let ballooned = snapshot.guests.iter().map(|guest| guest.balloon).fold(0, u64::saturating_add);
    tally.most_ballooned_bytes = tally.most_ballooned_bytes.max(ballooned);
}

fn in_distress(guest: &Guest) -> bool {
    guest.usage.is_some_and(|usage| {
        let held = guest.memory.saturating_sub(guest.balloon);
        usage.oom_kills > 0
            || usage.swap_in > DISTRESS_SWAP_IN
            || usage.available < percent(held, DISTRESS_PERCENT)
    })
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { done, would, .. } = self;
        writeln!(f, "{} snapshots of {:.0} s", self.ticks, self.seconds)?;
        let mut row =
            |what: &str, done: String, would: String| writeln!(f, "{what:<34} {done:>12} {would:>12}");
        row("", "was done".into(), "would be".into())?;
        let seconds = |seconds: f64| format!("{seconds:.0} s");
        row("host short of its reserve", seconds(done.over_budget_s), seconds(would.over_budget_s))?;
        row("guests in distress", seconds(done.distress_s), seconds(would.distress_s))?;
        let size = |bytes| Size(bytes).to_string();
        row("moved by balloons", size(done.moved_bytes), size(would.moved_bytes))?;
        row("most in balloons", size(done.most_ballooned_bytes), size(would.most_ballooned_bytes))?;
        row("orders", done.orders.to_string(), would.orders.to_string())?;
        if let Some(Difference { guest, done_bytes, would_bytes, .. }) = &self.largest_difference {
            row(&format!("largest difference: {guest}"), size(*done_bytes), size(*would_bytes))?;
        }
        if let Some(reason) = &self.policy_failure {
            writeln!(f, "The script failed {} times, at first: {reason}", self.policy_failures)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
