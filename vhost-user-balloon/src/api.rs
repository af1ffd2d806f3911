//! The JSON that is spoken on the control socket of a balloon: by the daemon, by `ctl`, and by the manager.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`Status`] |
//! | `PUT /v1/target`, a [`Target`] | [`Status`] |
//! | `GET /v1/statistics?fresh=1&timeout_ms=1000` | [`Statistics`]; 504 if the guest does not answer in time |
//! | `GET /v1/events?past=10` | a stream of [`Event`]s, one a line, which begins with the last ones if that is asked for |
//! | `GET /metrics` | Prometheus text |
//! | `GET /healthz` | 200 |
//! | `GET /balloon`, `PATCH /balloon`, `PUT /balloon` | [`FirecrackerBalloon`], as Firecracker's API |
//! | `GET /balloon/statistics` | [`Statistics`], which has the names of Firecracker's |
//! | `PATCH /balloon/statistics` | [`StatisticsInterval`], as Firecracker's |
//!
//! An error has a status of 400 and up, and an [`Fault`] as its body. Sizes are bytes where the name says so, and
//! otherwise as in Firecracker's API (pages of 4 KiB, MiB).

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Why a request was refused.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// What is wrong and what to do, for a person. Firecracker's name.
    pub fault_message: String,
}

/// What is wanted of the balloon: exactly one of the members.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Size of the balloon: what the guest is asked to do without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon_bytes: Option<u64>,
    /// What is left to the guest. Needs a guest that is connected, whose memory is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_bytes: Option<u64>,
}

/// What the balloon is about at the moment.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// No driver uses the balloon.
    Absent,
    /// The balloon has its target size.
    Idle,
    /// The guest is giving memory.
    Inflating,
    /// The guest is taking memory back.
    Deflating,
    /// The target is not reached and nothing has moved for three seconds: the guest has nothing to give.
    Stalled,
    /// The guest takes memory back that the host does not have (hugetlbfs): it waits.
    Held,
}

/// Everything about a balloon.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// A front end is connected.
    pub connected: bool,
    /// What is going on.
    pub activity: Activity,
    /// What the front end has shared of the guest's memory: nearly always all of it. 0 until the driver has started.
    pub guest_memory_bytes: u64,
    /// What the host holds of it now (`st_blocks`), measured. 0 as long as the memory is not known.
    pub resident_bytes: u64,
    /// Size of the balloon that was asked for.
    pub requested_bytes: u64,
    /// The same, or less if the guest would keep less than its minimum.
    pub target_bytes: u64,
    /// Size of the balloon, as the guest says.
    pub actual_bytes: u64,
    /// What the guest keeps whatever is asked for.
    pub min_guest_memory_bytes: u64,
    /// Pages of the guest in the balloon, as the daemon has counted them.
    pub ballooned_bytes: u64,
    /// Of these, what was given back to the host.
    pub released_bytes: u64,
    /// Of these, what will be given back in a moment.
    pub pending_bytes: u64,
    /// Of these, what cannot be given back because the rest of its huge page is not in the balloon.
    pub held_bytes: u64,
    /// What was negotiated: `statistics`, `reporting`, `deflate-on-oom`, `must-tell-host`, `page-poison`.
    pub features: Vec<String>,
    /// How often statistics are asked for. 0: only on demand.
    pub statistics_interval_s: u64,
    /// What the guest said at last.
    pub statistics: Option<Statistics>,
    /// What has happened since the daemon started.
    pub counters: Counters,
}

/// What has happened since the daemon started.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
pub struct Counters {
    /// Requests to inflate.
    pub inflate_requests: u64,
    /// Requests to deflate.
    pub deflate_requests: u64,
    /// Reports of free pages.
    pub reports: u64,
    /// Bytes that came into the balloon.
    pub inflated_bytes: u64,
    /// Bytes that went out of it.
    pub deflated_bytes: u64,
    /// Bytes that were reported as free.
    pub reported_bytes: u64,
    /// Bytes that were given back to the host, of either kind.
    pub released_bytes: u64,
    /// Bytes that were reported, and not given back: hugetlbfs, or poisoned pages.
    pub reported_kept_bytes: u64,
    /// Calls that gave them back.
    pub releases: u64,
    /// Time spent in these calls, microseconds.
    pub release_us: u64,
    /// Calls that failed.
    pub release_errors: u64,
    /// Page numbers outside of the guest's memory.
    pub out_of_range: u64,
    /// Page numbers that were in the balloon already, or deflated without having been there.
    pub duplicates: u64,
    /// Chains that were no request.
    pub malformed: u64,
    /// Pages that the guest took back although it was not asked to, most likely because it was short of memory; or
    /// because it unloaded the driver, or was suspended.
    pub oom_deflated_bytes: u64,
    /// Deflations that had to wait for huge pages.
    pub deflates_held: u64,
    /// How often the guest had to wait because it caused too much work.
    pub throttled: u64,
    /// How often the driver was told to look at its target.
    pub config_changes: u64,
    /// How often a driver started from nothing: boots, reboots, module loads. The end of a pause looks the same if the
    /// guest had given nothing yet.
    pub driver_starts: u64,
}

/// What the guest says about its memory (virtio 1.3 text, section 5.5.6.3), with the names of Firecracker's API.
///
/// Sizes are bytes, the rest counts events since the guest booted. A guest leaves out what it does not know.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names of the specification")]
pub struct Statistics {
    pub target_pages: u64,
    pub actual_pages: u64,
    pub target_mib: u64,
    pub actual_mib: u64,
    /// How old the numbers below are, milliseconds. Not part of Firecracker's API.
    pub age_ms: u64,
    /// When they came, seconds since 1970. Not part of Firecracker's API.
    pub last_update: u64,
    #[serde(flatten)]
    pub guest: GuestStatistics,
}

/// The numbers that come from the guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names of the specification")]
pub struct GuestStatistics {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

/// Firecracker's `/balloon`.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FirecrackerBalloon {
    /// Size of the balloon in MiB.
    pub amount_mib: u64,
    /// Whether the guest takes memory back when it is short of it. Cannot be changed while the daemon runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deflate_on_oom: Option<bool>,
    /// How often statistics are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats_polling_interval_s: Option<u64>,
    /// Never offered here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_page_hinting: Option<bool>,
    /// Whether the guest reports free pages. Cannot be changed while the daemon runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_page_reporting: Option<bool>,
}

/// Firecracker's body of `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StatisticsInterval {
    /// Seconds; 0: only on demand.
    pub stats_polling_interval_s: u64,
}

/// Something that happened: a line of the event stream.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Milliseconds since 1970.
    pub ts_ms: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

impl Event {
    /// Something that happens now.
    pub fn now(what: What) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { ts_ms: since.as_millis() as u64, what }
    }
}

/// What happened.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the members of `Status`")]
pub enum What {
    /// A front end came.
    Connected,
    /// It left.
    Disconnected,
    /// A driver started from nothing: the guest booted, rebooted, or loaded its driver again.
    DriverStarted { guest_memory_bytes: u64 },
    /// Another size was asked for.
    Target { requested_bytes: u64, target_bytes: u64 },
    /// The balloon's size has changed; at most one such line a second.
    Actual { actual_bytes: u64, target_bytes: u64, resident_bytes: u64 },
    /// The balloon has its target size.
    Reached { actual_bytes: u64, resident_bytes: u64 },
    /// See [`Activity::Stalled`].
    Stalled { actual_bytes: u64, target_bytes: u64 },
    /// The guest took memory back that it was not asked to take: it is short of memory.
    OomDeflated { bytes: u64, actual_bytes: u64 },
    /// See [`Activity::Held`].
    DeflateHeld { bytes: u64 },
    /// It goes on.
    DeflateResumed,
    /// Memory could not be given back.
    ReleaseFailed { reason: String },
    /// The reader was too slow: so many events are missing here.
    Lost { events: u64 },
}
