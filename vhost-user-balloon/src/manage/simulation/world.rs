//! Simulated guests and their host.

use super::load::{Curve, GIB};
use crate::manage::model::{Guest, Host, Snapshot, Usage};

/// Length of a step, seconds.
pub(super) const STEP: f64 = 0.1;
const MIB: f64 = (1u64 << 20) as f64;
/// What a guest's kernel needs.
const KERNEL: f64 = 160.0 * MIB;
/// What a guest's kernel keeps free.
const KEPT_FREE: f64 = 64.0 * MIB;
/// Page cache grows by so much a second, as long as there is room.
const CACHE_RATE: f64 = 40.0 * MIB;
/// The part of page cache that is in use or written to at the moment.
const CACHE_BUSY: f64 = 0.05;
/// Balloons grow by so much a second from free memory and page cache.
const INFLATE_RATE: f64 = GIB;
/// And if programs have to be swapped out for it.
const SQUEEZE_RATE: f64 = 0.1 * GIB;
/// Balloons shrink by so much a second.
const DEFLATE_RATE: f64 = 4.0 * GIB;
/// Free memory that was in use is reported to the host: a third is left after so many seconds.
const REPORT_SECONDS: f64 = 15.0;
/// A guest can read so much a second from its swap.
const SWAP_RATE: f64 = 200.0 * MIB;
/// What programs miss counts from here.
const NOTICEABLE: f64 = 16.0 * MIB;
/// Guests say once in so many seconds what they use, if they are not asked.
const STATISTICS_SECONDS: f64 = 1.0;
/// Pressure is a mean of so many seconds.
const PSI_SECONDS: f64 = 10.0;

/// A simulated guest.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub name: String,
    pub memory: f64,
    pub min: f64,
    pub shares: u32,
    pub curve: Curve,
    pub balloon: f64,
    pub target: f64,
    /// What programs have in memory.
    programs: f64,
    /// What they miss.
    missing: f64,
    cache: f64,
    /// Free memory that the host does not know to be free.
    unreported: f64,
    /// What the guest has said at last, and when it says something again.
    usage: Usage,
    speaks: f64,
    /// Seconds in which programs missed memory.
    pub swap_seconds: f64,
    /// What they missed, times seconds.
    pub missing_seconds: f64,
    /// What went into the balloon and out of it.
    pub moved: f64,
}

impl Machine {
    /// A guest that says what it uses at `speaks` for the first time, in seconds.
    pub fn new(name: String, memory: f64, min: f64, shares: u32, curve: Curve, speaks: f64) -> Self {
        Self {
            usage: Usage::default(),
            speaks,
            name,
            memory,
            min,
            shares,
            curve,
            balloon: 0.0,
            target: 0.0,
            programs: 0.0,
            missing: 0.0,
            cache: 0.0,
            unreported: 0.0,
            swap_seconds: 0.0,
            missing_seconds: 0.0,
            moved: 0.0,
        }
    }

    fn step(&mut self, now: f64) {
        self.move_balloon();
        let room = (self.memory - self.balloon - KERNEL).max(0.0);
        let before = self.programs + self.cache;
        let need = self.curve.at(now);
        self.programs = need.min((room - KEPT_FREE).max(0.0));
        self.missing = need - self.programs;
        let left = (room - KEPT_FREE - self.programs).max(0.0);
        self.cache = (self.cache + CACHE_RATE * STEP).min(left);
        let after = self.programs + self.cache;
        let free = (room - after).max(0.0);
        self.unreported =
            ((self.unreported + before - after).max(0.0) * (-STEP / REPORT_SECONDS).exp()).min(free);
        if self.missing > NOTICEABLE {
            self.swap_seconds += STEP;
            self.missing_seconds += self.missing * STEP;
        }
        if now >= self.speaks {
            self.speaks += STATISTICS_SECONDS;
            self.usage = self.speak();
        }
    }

    fn move_balloon(&mut self) {
        let before = self.balloon;
        if self.balloon < self.target {
            let spare =
                self.memory - self.balloon - KERNEL - self.programs - CACHE_BUSY * self.cache - KEPT_FREE;
            let easy = spare.clamp(0.0, INFLATE_RATE * STEP);
            self.balloon = self.target.min(self.balloon + easy.max(SQUEEZE_RATE * STEP));
        } else {
            self.balloon = self.target.max(self.balloon - DEFLATE_RATE * STEP);
        }
        self.moved += (self.balloon - before).abs();
    }

    fn resident(&self) -> f64 {
        KERNEL + self.programs + self.cache + self.unreported
    }

    fn speak(&self) -> Usage {
        let room = (self.memory - self.balloon - KERNEL).max(0.0);
        let free = (room - self.programs - self.cache).max(0.0);
        let available = (free + (1.0 - CACHE_BUSY) * self.cache - KEPT_FREE).max(0.0);
        Usage {
            total: (self.memory - KERNEL) as u64,
            available: available as u64,
            free: free as u64,
            balloon: Some(self.balloon as u64),
            swap_in: if self.missing > NOTICEABLE { self.missing.min(SWAP_RATE) } else { 0.0 },
            ..Usage::default()
        }
    }

    /// As a manager sees it: with what the guest says if it is asked now, or with what it has said at last.
    fn look(&self, asked: bool) -> Guest {
        Guest {
            name: self.name.clone(),
            memory: self.memory as u64,
            min: self.min as u64,
            max: self.memory as u64,
            shares: self.shares,
            balloon: self.balloon as u64,
            target: self.target as u64,
            resident: self.resident() as u64,
            usage: Some(if asked { self.speak() } else { self.usage }),
            inactive: false,
            stuck: false,
            deflates_on_oom: true,
        }
    }
}

/// A simulated host and its guests.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub now: f64,
    total: f64,
    /// What the host uses for itself.
    own: f64,
    psi: f64,
    /// More than there is, at the moment.
    over: f64,
    swap_out: f64,
    /// More than there is, times seconds.
    pub over_seconds: f64,
    /// What programs would miss whoever decided, times seconds.
    pub unavoidable_seconds: f64,
    /// The most that was in use.
    pub peak: f64,
    pub machines: Vec<Machine>,
}

impl World {
    pub fn new(total: f64, own: f64, machines: Vec<Machine>) -> Self {
        Self {
            now: 0.0,
            total,
            own,
            psi: 0.0,
            over: 0.0,
            swap_out: 0.0,
            over_seconds: 0.0,
            unavoidable_seconds: 0.0,
            peak: 0.0,
            machines,
        }
    }

    pub fn step(&mut self) {
        self.now += STEP;
        for machine in &mut self.machines {
            machine.step(self.now);
        }
        let used = self.used();
        let over = (used - self.total).max(0.0);
        self.swap_out = (over - self.over).max(0.0) / STEP;
        self.over = over;
        self.over_seconds += over * STEP;
        self.peak = self.peak.max(used);
        let needed: f64 = self.machines.iter().map(|machine| KERNEL + machine.curve.at(self.now)).sum();
        self.unavoidable_seconds += (self.own + needed - self.total).max(0.0) * STEP;
        // Some wait as soon as the kernel has to reclaim, and more when it has to swap.
        let waiting = if over > 0.0 {
            (20.0 + 200.0 * over / self.total).min(100.0)
        } else if used > 0.98 * self.total {
            3.0
        } else {
            0.0
        };
        self.psi += (waiting - self.psi) * STEP / PSI_SECONDS;
    }

    pub fn total(&self) -> f64 {
        self.total
    }

    fn used(&self) -> f64 {
        self.own + self.machines.iter().map(Machine::resident).sum::<f64>()
    }

    /// As a manager sees it, who asks guests or does not.
    pub fn look(&self, asked: bool) -> Snapshot {
        Snapshot {
            now: self.now,
            host: Host {
                total: self.total as u64,
                available: (self.total - self.used()).max(0.0) as u64,
                swap_in: 0.0,
                swap_out: self.swap_out,
                psi_some: self.psi,
                psi_full: self.psi / 2.0,
            },
            guests: self.machines.iter().map(|machine| machine.look(asked)).collect(),
            reserved: 0,
        }
    }
}
