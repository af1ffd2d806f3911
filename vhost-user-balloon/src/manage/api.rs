//! The JSON that is spoken on the manager's own control socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`ManagerStatus`] |
//! | `POST /v1/reservations`, a [`ReservationRequest`] | [`Reservation`], once the memory is there; 409 if it never can be, 504 if it was not in time |
//! | `GET /v1/reservations` | all [`Reservation`]s |
//! | `DELETE /v1/reservations/NAME` | 204 |
//! | `GET /v1/events?past=N` | a stream of [`Event`](super::event::Event)s, one a line, from the last N on |
//! | `GET /metrics` | Prometheus text |
//! | `GET /healthz` | 200 while the manager decides, 503 if it does not |
//!
//! An error has a status of 400 and up, and a [`Fault`](crate::api::Fault) as its body.

use serde::{Deserialize, Serialize};

use super::model::{Guest, Host};
use super::policy::Mode;

/// What the manager knows and does.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct ManagerStatus {
    /// The manager's version.
    pub version: String,
    /// The manager's process.
    pub pid: u32,
    /// It decides, and sends nothing.
    pub dry_run: bool,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// How often it has looked and decided.
    pub ticks: u64,
    /// What decides: `built-in`, or the name of a script.
    pub policy: String,
    /// How often the policy failed, and the built-in one decided.
    pub policy_failures: u64,
    /// The host.
    pub host: Host,
    /// State of the host: `comfortable`, `plenty`, `tight` or `scarce`.
    pub mode: Mode,
    /// The host is about to run out of memory.
    pub critical: bool,
    /// What all guests can have together, bytes.
    pub budget_bytes: u64,
    /// What they need and the budget does not have, bytes.
    pub overcommitted_bytes: u64,
    /// Memory promised to virtual machines that are about to start, bytes.
    pub reserved_bytes: u64,
    /// The guests, sorted by name.
    pub guests: Vec<GuestStatus>,
}

/// What the manager knows of a guest.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct GuestStatus {
    /// Its control socket.
    pub socket: String,
    /// As the policy sees it.
    #[serde(flatten)]
    pub guest: Guest,
    /// How much memory the policy wants it to have, bytes.
    pub wish_bytes: Option<u64>,
    /// Size of the balloon that the manager asked for at last, or would have if this is no dry run, bytes.
    pub decided_bytes: Option<u64>,
    /// The configuration says to leave it alone.
    pub ignored: bool,
    /// Processes that it killed for want of memory, since the manager knows it.
    pub oom_kills: u64,
    /// Why its balloon does not answer.
    pub failure: Option<String>,
}

/// A virtual machine that is about to start.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReservationRequest {
    /// What its guest will be called: the reservation ends when a guest of this name shows up.
    pub name: String,
    /// The memory that it needs.
    pub bytes: u64,
    /// How long to wait for it, seconds.
    #[serde(default = "default_timeout")]
    pub timeout_s: u64,
    /// How long it is kept for a guest that does not show up, seconds.
    #[serde(default = "default_expiry")]
    pub expires_s: u64,
}

/// Long enough for guests that give a few percent of their memory a second.
pub(super) fn default_timeout() -> u64 {
    60
}

/// Long enough for firmware and a kernel.
pub(super) fn default_expiry() -> u64 {
    300
}

/// Memory that is kept for a virtual machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Reservation {
    /// What its guest will be called.
    pub name: String,
    /// How much it is.
    pub bytes: u64,
    /// The memory is there. Otherwise it is still being found.
    pub granted: bool,
    /// Seconds until it is given up: until the wait ends, or until it expires.
    pub remaining_s: u64,
}
