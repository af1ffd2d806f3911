//! What a policy sees, and what it says. Live operation, replay and simulation use the same types.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The host and its guests at one moment.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Snapshot {
    /// Seconds since the manager (or the simulation) started: only differences matter.
    pub now: f64,
    /// The host.
    pub host: Host,
    /// The guests, sorted by name.
    pub guests: Vec<Guest>,
    /// Memory that was promised to virtual machines that are about to start, and is not used yet, bytes.
    pub reserved: u64,
}

/// The host, or the part of it (a cgroup) that the guests may use.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Host {
    /// All of its memory, bytes.
    pub total: u64,
    /// What could be had without swapping (`MemAvailable`), bytes.
    pub available: u64,
    /// Read from swap, bytes a second.
    pub swap_in: f64,
    /// Written to swap, bytes a second.
    pub swap_out: f64,
    /// Share of the last ten seconds in which some task waited for memory, percent (PSI, `some avg10`).
    pub psi_some: f64,
    /// The same for all tasks at once (`full avg10`).
    pub psi_full: f64,
}

/// A guest, by its balloon.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Guest {
    /// What the administrator calls it: the name of its socket, without `.sock`, unless the configuration says otherwise.
    pub name: String,
    /// All of its memory, with an empty balloon, bytes. 0 as long as it is not known.
    pub memory: u64,
    /// Less than this it is never left, bytes.
    pub min: u64,
    /// More than this it never gets, bytes; at most `memory`.
    pub max: u64,
    /// Its weight when memory is short, against those of the others.
    pub shares: u32,
    /// Size of its balloon, bytes.
    pub balloon: u64,
    /// What its balloon was last asked to be, bytes.
    pub target: u64,
    /// What the host holds of its memory, bytes.
    pub resident: u64,
    /// What it says of itself; `None` if it says nothing, or what it said is too old or makes no sense.
    pub usage: Option<Usage>,
    /// The balloon does not do what it was asked for, or cannot be reached: the guest is left alone.
    pub inactive: bool,
    /// Its balloon can be reached and does not get to its target, as it says itself: it should not be made to go on trying.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stuck: bool,
    /// Its balloon shrinks when the guest is short of memory by itself (`deflate-on-oom`).
    pub deflates_on_oom: bool,
}

/// What a guest says of its memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Usage {
    /// Memory that its kernel manages at the moment, bytes. Without deflate-on-oom what is in the balloon is not in it.
    pub total: u64,
    /// What could be had without swapping, bytes.
    pub available: u64,
    /// Unused, bytes.
    pub free: u64,
    /// Size of the balloon when it said so, bytes, if that is not the size now: what a balloon takes from the guest in the
    /// meantime must not look as if the guest used less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<u64>,
    /// Read from swap, bytes a second.
    pub swap_in: f64,
    /// Written to swap, bytes a second.
    pub swap_out: f64,
    /// Pages that had to be read from disk, a second.
    pub major_faults: f64,
    /// Processes killed for want of memory since the last snapshot.
    pub oom_kills: u64,
}

/// What a policy says: how much memory each guest should be left, bytes. Guests that are not mentioned stay as they are.
pub type Wishes = BTreeMap<String, u64>;

/// Says how much memory each guest should have.
pub trait Policy {
    /// Looks at a snapshot, and says what each guest should have. Called once for each, in order of time.
    ///
    /// Fails with the reason, for a person, if it cannot say: then the built-in policy is asked.
    fn decide(&mut self, snapshot: &Snapshot) -> Result<Wishes, String>;
}
