//! The state of a balloon as a table.

use super::columns;
use super::units::{ago, size};
use crate::api::{Activity, Status};

/// All that a person wants to know of a balloon.
pub(super) fn table(status: &Status) -> String {
    let counters = &status.counters;
    let mut rows = vec![
        ("Balloon", balloon(status)),
        ("Guest", guest(status)),
        ("Resident", resident(status)),
        ("Returned", returned(status)),
    ];
    if let Some(statistics) = &status.statistics {
        let numbers = &statistics.guest;
        let known = [
            (numbers.available_memory, "available"),
            (numbers.free_memory, "free"),
            (numbers.disk_caches, "caches"),
            (numbers.total_memory, "in all"),
        ];
        let known: Vec<_> =
            known.iter().filter_map(|(bytes, name)| Some(format!("{} {name}", size((*bytes)?)))).collect();
        rows.push(("Guest says", format!("{} ({})", known.join(", "), ago(statistics.age_ms))));
    }
    rows.push(("Statistics", interval(status)));
    rows.push(("Features", if status.features.is_empty() { "-".into() } else { status.features.join(", ") }));
    rows.push((
        "So far",
        format!(
            "{} inflated, {} deflated, {} reported free; {} given to the host",
            size(counters.inflated_bytes),
            size(counters.deflated_bytes),
            size(counters.reported_bytes),
            size(counters.released_bytes)
        ),
    ));
    rows.extend(trouble(status).map(|text| ("Trouble", text)));
    rows.push(("Daemon", format!("version {}, process {}", status.version, status.pid)));
    columns(&rows)
}

fn balloon(status: &Status) -> String {
    let (actual, activity) = (size(status.actual_bytes), activity(status.activity));
    format!("{actual} of {}{}, {activity}", size(wanted(status)), minimum(status))
}

/// The size that the balloon is to have.
pub(super) fn wanted(status: &Status) -> u64 {
    // What the guest keeps is not known before.
    if status.guest_memory_bytes == 0 { status.requested_bytes } else { status.target_bytes }
}

/// Why that is not what was asked for.
pub(super) fn minimum(status: &Status) -> String {
    if wanted(status) == status.requested_bytes {
        return String::new();
    }
    let requested = size(status.requested_bytes);
    let reason = match status.min_guest_memory_bytes {
        0 => format!("has {}", size(status.guest_memory_bytes)),
        kept => format!("keeps {}", size(kept)),
    };
    format!(" ({requested} were asked for, but the guest {reason})")
}

/// What is going on.
pub(super) fn activity(activity: Activity) -> &'static str {
    match activity {
        Activity::Absent => "no driver uses it",
        Activity::Idle => "idle",
        Activity::Inflating => "inflating",
        Activity::Deflating => "deflating",
        Activity::Stalled => "stalled: the guest has nothing to give",
        Activity::Held => "held: the guest waits for huge pages that the host does not have",
    }
}

fn guest(status: &Status) -> String {
    let connection = if status.connected { "connected" } else { "not connected" };
    if status.guest_memory_bytes == 0 {
        return format!("{connection}, its memory is not known yet");
    }
    format!(
        "{connection}, {} left to it of {} (at least {})",
        size(status.guest_memory_bytes.saturating_sub(status.actual_bytes)),
        size(status.guest_memory_bytes),
        size(status.min_guest_memory_bytes)
    )
}

fn resident(status: &Status) -> String {
    if status.guest_memory_bytes == 0 {
        return "-".into();
    }
    format!("{} of the host's memory, measured", size(status.resident_bytes))
}

fn returned(status: &Status) -> String {
    let mut parts = vec![format!("{} of the balloon", size(status.released_bytes))];
    if status.pending_bytes != 0 {
        parts.push(format!("{} in a moment", size(status.pending_bytes)));
    }
    if status.held_bytes != 0 {
        parts.push(format!("{} not, as the rest of the huge pages is in use", size(status.held_bytes)));
    }
    parts.join(", ")
}

fn interval(status: &Status) -> String {
    match status.statistics_interval_s {
        0 => "only on demand".into(),
        seconds => format!("every {seconds} s"),
    }
}

/// What should not be, if there is something.
fn trouble(status: &Status) -> Option<String> {
    let counters = &status.counters;
    let counts = [
        (counters.release_errors, "releases failed"),
        (counters.deflates_held, "deflations held"),
        (counters.out_of_range, "pages out of range"),
        (counters.malformed, "malformed requests"),
        (counters.throttled, "times throttled"),
    ];
    let mut known: Vec<_> = counts
        .iter()
        .filter(|(count, _)| *count != 0)
        .map(|(count, name)| format!("{count} {name}"))
        .collect();
    if counters.oom_deflated_bytes != 0 {
        known.push(format!("{} taken back unasked", size(counters.oom_deflated_bytes)));
    }
    (!known.is_empty()).then(|| known.join(", "))
}
