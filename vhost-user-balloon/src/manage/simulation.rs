//! A simulation of a host and six guests, by which policies can be compared: the same loads from fixed seeds, the same
//! guests, and numbers for what matters.
//!
//! The guests are simple: programs need what a curve says, page cache fills what they leave, a balloon moves at a finite
//! rate, and what programs miss is swapped. Only comparisons mean something, not the numbers by themselves.
#![expect(clippy::cast_precision_loss, reason = "memory is far from having 2^52 bytes")]

mod load;
mod world;

use std::fmt;

use serde::Serialize;

use self::load::{Curve, GIB, SECONDS};
use self::world::{Machine, STEP, World};
use super::account::{PAGE, ceiling, floor};
use super::config::Parameters;
use super::model::{Policy, Snapshot, Wishes};
use super::policy::{Decider, Script};

/// MOM's rule as a script.
pub const MOM: &str = include_str!("../../policies/mom.rhai");
/// Proxmox's rule as a script.
pub const PROXMOX: &str = include_str!("../../policies/proxmox.rhai");
/// The example to begin with.
pub const PROPORTIONAL: &str = include_str!("../../policies/proportional.rhai");

/// Memory of the simulated host, bytes.
const HOST: f64 = 24.0 * GIB;
/// What it needs for itself, bytes.
const HOST_OWN: f64 = 1.2 * GIB;
/// Memory of each simulated guest, bytes.
const GUEST: f64 = 8.0 * GIB;
/// Its minimum, bytes.
const GUEST_MIN: f64 = GIB;
/// Scripts that come with the program are stopped after so many operations.
const OPERATIONS: u64 = 200_000;

/// A load for all guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// One guest after the other is busy.
    Rolling,
    /// Two guests are always busy, and four never.
    BusyAndIdle,
    /// All guests need a lot for a few seconds now and then.
    Spiky,
    /// All guests are busy at the same time, and need more than the host has. The first has four times the shares.
    AllAtOnce,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Rolling, Self::BusyAndIdle, Self::Spiky, Self::AllAtOnce];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rolling => "rolling bursts",
            Self::BusyAndIdle => "2 busy, 4 idle",
            Self::Spiky => "spiky",
            Self::AllAtOnce => "all at once",
        }
    }

    fn curves(self, seed: u64) -> Vec<Curve> {
        match self {
            Self::Rolling => load::rolling(seed),
            Self::BusyAndIdle => load::busy_and_idle(seed),
            Self::Spiky => load::spiky(seed),
            Self::AllAtOnce => load::all_at_once(seed),
        }
    }

    fn world(self, seed: u64) -> World {
        let machines = self.curves(seed).into_iter().enumerate().map(|(index, curve)| {
            let shares = if index == 0 && self == Self::AllAtOnce { 4000 } else { 1000 };
            // Unasked, they do not speak all at the same time.
            let speaks = 0.15 * (index + 1) as f64;
            Machine::new(format!("guest{index}"), GUEST, GUEST_MIN, shares, curve, speaks)
        });
        World::new(HOST, HOST_OWN, machines.collect())
    }
}

/// Who decides in a simulation.
#[derive(Debug)]
pub struct Contender {
    name: String,
    period: f64,
    /// Guests are asked what they use before each decision. If not, it is what they said within the last second.
    asks: bool,
    brain: Brain,
}

#[derive(Debug)]
enum Brain {
    /// Nobody.
    None,
    /// A policy on our rails.
    Railed(Box<Decider>),
    /// A policy by itself, within minima and maxima.
    Bare(Box<Script>),
}

impl Contender {
    /// No balloon moves.
    pub fn none() -> Self {
        Self { name: "none".into(), period: 1.0, asks: true, brain: Brain::None }
    }

    /// The built-in policy.
    pub fn builtin(parameters: &Parameters) -> Self {
        let decider = Decider::with(parameters.clone(), None);
        let name = format!("built-in, {} s", parameters.period_seconds);
        Self { name, period: parameters.period_seconds, asks: true, brain: Brain::Railed(Box::new(decider)) }
    }

    /// A script, on the rails that every script runs on.
    pub fn script(name: &str, script: Script, parameters: &Parameters) -> Self {
        let decider = Decider::with(parameters.clone(), Some(script));
        let name = format!("{name}, {} s", parameters.period_seconds);
        Self { name, period: parameters.period_seconds, asks: true, brain: Brain::Railed(Box::new(decider)) }
    }

    /// A script without rails but minima and maxima, every `period` seconds: for rules that have limits of their own.
    pub fn bare_script(name: &str, script: Script, period: f64) -> Self {
        Self { name: format!("{name}, {period} s"), period, asks: true, brain: Brain::Bare(Box::new(script)) }
    }

    /// The same, but it does not ask the guests before it decides.
    #[must_use]
    pub fn unasked(self) -> Self {
        Self { name: format!("{}, old statistics", self.name), asks: false, ..self }
    }

    /// What balloons there are to be changed, by name.
    fn decide(&mut self, snapshot: &Snapshot) -> Result<Vec<(String, u64)>, String> {
        match &mut self.brain {
            Brain::None => Ok(Vec::new()),
            Brain::Railed(decider) => {
                let decision = decider.decide(snapshot);
                Ok(decision.orders.into_iter().map(|order| (order.guest, order.balloon_bytes)).collect())
            }
            Brain::Bare(script) => Ok(within_bounds(snapshot, script.decide(snapshot)?)),
        }
    }
}

fn within_bounds(snapshot: &Snapshot, mut wishes: Wishes) -> Vec<(String, u64)> {
    let guests = snapshot.guests.iter();
    guests
        .filter_map(|guest| {
            let wish = wishes.remove(&guest.name)?.clamp(floor(guest), ceiling(guest));
            Some((guest.name.clone(), (guest.memory - wish) / PAGE * PAGE))
        })
        .collect()
}

/// What came out of a simulation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The load.
    pub scenario: &'static str,
    /// Who decided.
    pub policy: String,
    /// Seconds in which a guest's programs missed memory, of all guests together.
    pub swap_seconds: f64,
    /// The same for the first guest.
    pub first_swap_seconds: f64,
    /// What programs missed, times seconds, GiB s.
    pub missing_gib_seconds: f64,
    /// What they would have missed whoever decided, without using more than the host has, GiB s.
    pub unavoidable_gib_seconds: f64,
    /// What was in use and is more than the host has, times seconds, GiB s.
    pub over_gib_seconds: f64,
    /// The most that was in use, percent of the host's memory.
    pub peak_percent: f64,
    /// What went into balloons and out of them, GiB.
    pub moved_gib: f64,
}

/// Simulates a load under a policy. Fails with the reason if a script without rails fails.
pub fn run(scenario: Scenario, seed: u64, contender: &mut Contender) -> Result<Row, String> {
    let mut world = scenario.world(seed);
    let mut next = contender.period;
    while world.now < SECONDS {
        world.step();
        if world.now + STEP / 2.0 < next {
            continue;
        }
        next += contender.period;
        for (name, balloon) in contender.decide(&world.look(contender.asks))? {
            if let Some(machine) = world.machines.iter_mut().find(|machine| machine.name == name) {
                machine.target = balloon as f64;
            }
        }
    }
    let sum = |of: fn(&Machine) -> f64| world.machines.iter().map(of).sum::<f64>();
    Ok(Row {
        scenario: scenario.name(),
        policy: contender.name.clone(),
        swap_seconds: sum(|machine| machine.swap_seconds),
        first_swap_seconds: world.machines.first().map_or(0.0, |machine| machine.swap_seconds),
        missing_gib_seconds: sum(|machine| machine.missing_seconds) / GIB,
        unavoidable_gib_seconds: world.unavoidable_seconds / GIB,
        over_gib_seconds: world.over_seconds / GIB,
        peak_percent: 100.0 * world.peak / world.total(),
        moved_gib: sum(|machine| machine.moved) / GIB,
    })
}

/// What came out of many simulations.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    /// One for each load and policy.
    pub rows: Vec<Row>,
}

impl fmt::Display for Table {
    /// As a table of Markdown.
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        writeln!(
            formatter,
            "| load | policy | guests swap, s | of these guest0 | they miss, GiB s | at least, GiB s | host over, GiB s | host peak, % | moved, GiB |"
        )?;
        writeln!(formatter, "|---|---|--:|--:|--:|--:|--:|--:|--:|")?;
        for row in &self.rows {
            writeln!(
                formatter,
                "| {} | {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} |",
                row.scenario,
                row.policy,
                row.swap_seconds,
                row.first_swap_seconds,
                row.missing_gib_seconds,
                row.unavoidable_gib_seconds,
                row.over_gib_seconds,
                row.peak_percent,
                row.moved_gib,
            )?;
        }
        Ok(())
    }
}

/// Compares the built-in policy with MOM's and Proxmox's rules as published (every 10 seconds, with their own limits), with
/// the example, and with a script of one's own, if there is one.
pub fn compare(seed: u64, parameters: &Parameters, own: Option<&str>) -> Result<Table, String> {
    let mut table = Table::default();
    let script = |text| Script::new(text, OPERATIONS, parameters);
    for scenario in Scenario::ALL {
        let slow = Parameters { period_seconds: 10.0, ..parameters.clone() };
        let mut contenders = vec![
            Contender::none(),
            Contender::bare_script("MOM", script(MOM), 10.0),
            Contender::bare_script("Proxmox", script(PROXMOX), 10.0),
            Contender::script("proportional.rhai", script(PROPORTIONAL), parameters),
            Contender::builtin(&slow),
            Contender::builtin(parameters).unasked(),
            Contender::builtin(parameters),
        ];
        if let Some(own) = own {
            contenders.push(Contender::script("own script", script(own), parameters));
        }
        for contender in &mut contenders {
            table.rows.push(run(scenario, seed, contender)?);
        }
    }
    Ok(table)
}

#[cfg(test)]
mod tests;
