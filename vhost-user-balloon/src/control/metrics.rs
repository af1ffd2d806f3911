//! A balloon as Prometheus reads it.
//!
//! What happened since the daemon started is counted, and counted from 0 again by the next daemon. What comes from a
//! guest is what the guest says.

use vhost_user_daemon::control::metrics::{Kind, Page};

use crate::api::{Activity, GuestStatistics, Status};

/// The labels that tell a balloon from the others on a page: none where it is alone.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// A metric with one number for each balloon: its name, its description, and how it is read. `None` is left out.
type Single = (&'static str, &'static str, fn(&Status) -> Option<u64>);

const GAUGES: &[Single] = &[
    ("balloon_up", "The daemon answers.", |_| Some(1)),
    ("balloon_connected", "Whether a front end is connected.", |status| Some(status.connected.into())),
    (
        "balloon_guest_memory_bytes",
        "The guest's memory, with an empty balloon; 0 until it is known.",
        |status| Some(status.guest_memory_bytes),
    ),
    ("balloon_resident_bytes", "What the host holds of the guest's memory, measured.", |status| {
        Some(status.resident_bytes)
    }),
    ("balloon_requested_bytes", "Size of the balloon that was asked for.", |status| {
        Some(status.requested_bytes)
    }),
    ("balloon_target_bytes", "Size that the guest is asked for: it keeps its minimum.", |status| {
        Some(status.target_bytes)
    }),
    ("balloon_actual_bytes", "Size of the balloon, as the guest says.", |status| Some(status.actual_bytes)),
    ("balloon_min_guest_memory_bytes", "What the guest keeps whatever is asked for.", |status| {
        Some(status.min_guest_memory_bytes)
    }),
    ("balloon_pages_bytes", "Pages in the balloon, as the daemon has counted them.", |status| {
        Some(status.ballooned_bytes)
    }),
    ("balloon_pages_released_bytes", "Pages in the balloon that the host has got back.", |status| {
        Some(status.released_bytes)
    }),
    ("balloon_pages_pending_bytes", "Pages in the balloon that the host gets back in a moment.", |status| {
        Some(status.pending_bytes)
    }),
    (
        "balloon_pages_held_bytes",
        "Pages in the balloon that the host cannot get back, because the rest of a huge page is not in it.",
        |status| Some(status.held_bytes),
    ),
    ("balloon_statistics_interval_seconds", "How often the guest is asked for statistics.", |status| {
        Some(status.statistics_interval_s)
    }),
    ("balloon_guest_free_bytes", "Unused memory of the guest.", |status| guest(status)?.free_memory),
    ("balloon_guest_total_bytes", "Memory that the guest's kernel manages.", |status| {
        guest(status)?.total_memory
    }),
    ("balloon_guest_available_bytes", "Memory that the guest could use without swapping.", |status| {
        guest(status)?.available_memory
    }),
    ("balloon_guest_caches_bytes", "Caches of files that the guest could drop.", |status| {
        guest(status)?.disk_caches
    }),
];

const COUNTERS: &[Single] = &[
    ("balloon_inflated_bytes_total", "What came into the balloon.", |status| {
        Some(status.counters.inflated_bytes)
    }),
    ("balloon_deflated_bytes_total", "What went out of the balloon.", |status| {
        Some(status.counters.deflated_bytes)
    }),
    ("balloon_reported_bytes_total", "What the guest has reported as free.", |status| {
        Some(status.counters.reported_bytes)
    }),
    (
        "balloon_reported_kept_bytes_total",
        "What was reported and could not be given to the host.",
        |status| Some(status.counters.reported_kept_bytes),
    ),
    (
        "balloon_released_bytes_total",
        "What was given to the host, from the balloon and by reports.",
        |status| Some(status.counters.released_bytes),
    ),
    ("balloon_releases_total", "Calls that gave memory to the host.", |status| {
        Some(status.counters.releases)
    }),
    ("balloon_release_errors_total", "Calls that could not give memory to the host.", |status| {
        Some(status.counters.release_errors)
    }),
    ("balloon_out_of_range_total", "Page numbers outside of the guest's memory.", |status| {
        Some(status.counters.out_of_range)
    }),
    ("balloon_duplicates_total", "Page numbers that were there already, or were not there.", |status| {
        Some(status.counters.duplicates)
    }),
    ("balloon_malformed_total", "Chains that were no request.", |status| Some(status.counters.malformed)),
    (
        "balloon_oom_deflated_bytes_total",
        "What the guest took back unasked, most likely because it was short of memory.",
        |status| Some(status.counters.oom_deflated_bytes),
    ),
    ("balloon_deflates_held_total", "Deflations that had to wait for huge pages of the host.", |status| {
        Some(status.counters.deflates_held)
    }),
    (
        "balloon_throttled_total",
        "How often the guest had to wait because it caused too much work.",
        |status| Some(status.counters.throttled),
    ),
    ("balloon_config_changes_total", "How often the driver was told to look at its target.", |status| {
        Some(status.counters.config_changes)
    }),
    ("balloon_driver_starts_total", "How often a driver has started from nothing.", |status| {
        Some(status.counters.driver_starts)
    }),
    ("balloon_guest_swap_in_bytes_total", "What the guest has read from its swap.", |status| {
        guest(status)?.swap_in
    }),
    ("balloon_guest_swap_out_bytes_total", "What the guest has written to its swap.", |status| {
        guest(status)?.swap_out
    }),
    ("balloon_guest_major_faults_total", "Page faults of the guest that took reading.", |status| {
        guest(status)?.major_faults
    }),
    ("balloon_guest_minor_faults_total", "Page faults of the guest that took none.", |status| {
        guest(status)?.minor_faults
    }),
    ("balloon_guest_hugetlb_allocations_total", "Huge pages that the guest has had.", |status| {
        guest(status)?.hugetlb_allocations
    }),
    ("balloon_guest_hugetlb_failures_total", "Huge pages that the guest could not have.", |status| {
        guest(status)?.hugetlb_failures
    }),
    ("balloon_guest_oom_kills_total", "Processes that the guest killed for want of memory.", |status| {
        guest(status)?.oom_kill
    }),
    ("balloon_guest_alloc_stalls_total", "Allocations of the guest that had to wait for memory.", |status| {
        guest(status)?.alloc_stall
    }),
    (
        "balloon_guest_async_scan_bytes_total",
        "Memory that the guest looked through in the background.",
        |status| guest(status)?.async_scan,
    ),
    (
        "balloon_guest_direct_scan_bytes_total",
        "Memory that the guest looked through in allocations.",
        |status| guest(status)?.direct_scan,
    ),
    ("balloon_guest_async_reclaim_bytes_total", "Memory that the guest freed in the background.", |status| {
        guest(status)?.async_reclaim
    }),
    ("balloon_guest_direct_reclaim_bytes_total", "Memory that the guest freed in allocations.", |status| {
        guest(status)?.direct_reclaim
    }),
];

fn guest(status: &Status) -> Option<&GuestStatistics> {
    status.statistics.as_ref().map(|statistics| &statistics.guest)
}

/// The values of the label `activity`.
const ACTIVITIES: [(Activity, &str); 6] = [
    (Activity::Absent, "absent"),
    (Activity::Idle, "idle"),
    (Activity::Inflating, "inflating"),
    (Activity::Deflating, "deflating"),
    (Activity::Stalled, "stalled"),
    (Activity::Held, "held"),
];

/// Adds all that is known of balloons to a page. To be called once for a page, with all of them.
pub fn write(page: &mut Page, balloons: &[(Labels<'_>, &Status)]) {
    for (kind, singles) in [(Kind::Gauge, GAUGES), (Kind::Counter, COUNTERS)] {
        for (name, help, value) in singles {
            let known: Vec<_> =
                balloons.iter().filter_map(|(labels, status)| Some((labels, value(status)?))).collect();
            if known.is_empty() {
                continue;
            }
            let mut family = page.family(name, kind, help);
            for (labels, value) in known {
                family.sample(labels, value);
            }
        }
    }

    let mut family = page.family("balloon_info", Kind::Gauge, "The daemon's version.");
    for (labels, status) in balloons {
        family.sample(&with(labels, "version", &status.version), 1);
    }
    let mut family =
        page.family("balloon_activity", Kind::Gauge, "What is going on: 1 for that, 0 for the rest.");
    for (labels, status) in balloons {
        for (activity, name) in ACTIVITIES {
            family.sample(&with(labels, "activity", name), u8::from(status.activity == activity));
        }
    }
    let mut family = page.family("balloon_feature", Kind::Gauge, "What was negotiated with the driver.");
    for (labels, status) in balloons {
        for feature in &status.features {
            family.sample(&with(labels, "feature", feature), 1);
        }
    }
    let mut family = page.family("balloon_requests_total", Kind::Counter, "Requests of the guest.");
    for (labels, status) in balloons {
        let counters = &status.counters;
        family
            .sample(&with(labels, "queue", "inflate"), counters.inflate_requests)
            .sample(&with(labels, "queue", "deflate"), counters.deflate_requests)
            .sample(&with(labels, "queue", "reporting"), counters.reports);
    }
    let mut family = page.family(
        "balloon_release_seconds_total",
        Kind::Counter,
        "Time that it took to give memory to the host.",
    );
    for (labels, status) in balloons {
        family.sample(labels, seconds(status.counters.release_us));
    }
    let mut family =
        page.family("balloon_guest_statistics_age_seconds", Kind::Gauge, "How old what the guest says is.");
    for (labels, status) in balloons {
        if let Some(statistics) = &status.statistics {
            family.sample(labels, seconds(statistics.age_ms.saturating_mul(1000)));
        }
    }
}

fn with<'a>(labels: Labels<'a>, name: &'a str, value: &'a str) -> Vec<(&'a str, &'a str)> {
    [labels, &[(name, value)]].concat()
}

/// Microseconds as seconds.
fn seconds(us: u64) -> String {
    format!("{}.{:06}", us / 1_000_000, us % 1_000_000)
}
