//! Metrics of the host and of all guests, in the text format of Prometheus.

use vhost_user_daemon::control::metrics::{Kind, Page};

use super::api::{GuestStatus, ManagerStatus};
use super::model::{Guest, Host, Usage};

/// What is measured of each guest that says something of itself.
type OfUsage = (&'static str, &'static str, fn(&Usage) -> f64);

#[expect(clippy::cast_precision_loss, reason = "metrics are floating-point numbers")]
const USAGE: [OfUsage; 6] = [
    ("balloon_manager_guest_total_bytes", "Memory that the guest's kernel manages.", |usage| {
        usage.total as f64
    }),
    (
        "balloon_manager_guest_available_bytes",
        "Memory that the guest could have without swapping.",
        |usage| usage.available as f64,
    ),
    ("balloon_manager_guest_free_bytes", "Unused memory of the guest.", |usage| usage.free as f64),
    ("balloon_manager_guest_swap_in_bytes_per_second", "What the guest reads from its swap.", |usage| {
        usage.swap_in
    }),
    ("balloon_manager_guest_swap_out_bytes_per_second", "What the guest writes to its swap.", |usage| {
        usage.swap_out
    }),
    (
        "balloon_manager_guest_major_faults_per_second",
        "Pages that the guest has to read from disk.",
        |usage| usage.major_faults,
    ),
];

/// What is known of each guest: its name, what it is, and how to get it.
type OfGuest = (&'static str, &'static str, fn(&GuestStatus) -> Option<u64>);

const GUEST: [OfGuest; 11] = [
    ("balloon_manager_guest_memory_bytes", "The guest's memory with an empty balloon.", |of| {
        Some(of.guest.memory)
    }),
    ("balloon_manager_guest_min_bytes", "Less than this the guest is never left.", |of| Some(of.guest.min)),
    ("balloon_manager_guest_max_bytes", "More than this the guest never gets.", |of| Some(of.guest.max)),
    ("balloon_manager_guest_shares", "The guest's weight when memory is short.", |of| {
        Some(of.guest.shares.into())
    }),
    ("balloon_manager_guest_balloon_bytes", "Size of the guest's balloon.", |of| Some(of.guest.balloon)),
    ("balloon_manager_guest_target_bytes", "What the balloon was last asked to be.", |of| {
        Some(of.guest.target)
    }),
    ("balloon_manager_guest_resident_bytes", "What the host holds of the guest's memory.", |of| {
        Some(of.guest.resident)
    }),
    ("balloon_manager_guest_wish_bytes", "Memory that the policy wants the guest to have.", |of| {
        of.wish_bytes
    }),
    ("balloon_manager_guest_inactive", "1 if the guest is left alone.", |of| Some(of.guest.inactive.into())),
    ("balloon_manager_guest_ignored", "1 if the configuration says to ignore the guest.", |of| {
        Some(of.ignored.into())
    }),
    ("balloon_manager_guest_reachable", "1 if the guest's balloon answers.", |of| {
        Some(of.failure.is_none().into())
    }),
];

/// The page of metrics.
pub fn page(status: &ManagerStatus) -> Page {
    let mut page = Page::new();
    host(&mut page, &status.host);
    let mut single = |name, kind, help: &str, value: u64| page.single(name, kind, help, value);
    single(
        "balloon_manager_reserved_bytes",
        Kind::Gauge,
        "Memory promised to virtual machines that are about to start.",
        status.reserved_bytes,
    );
    single(
        "balloon_manager_budget_bytes",
        Kind::Gauge,
        "What all guests can have together.",
        status.budget_bytes,
    );
    single(
        "balloon_manager_overcommitted_bytes",
        Kind::Gauge,
        "What the guests need and the budget does not have.",
        status.overcommitted_bytes,
    );
    single(
        "balloon_manager_critical",
        Kind::Gauge,
        "1 if the host is about to run out of memory.",
        status.critical.into(),
    );
    single("balloon_manager_ticks_total", Kind::Counter, "How often it was decided.", status.ticks);
    single(
        "balloon_manager_policy_failures_total",
        Kind::Counter,
        "How often the script failed, and the built-in policy decided.",
        status.policy_failures,
    );
    single(
        "balloon_manager_dry_run",
        Kind::Gauge,
        "1 if nothing is sent to balloons.",
        status.dry_run.into(),
    );
    for (name, help, value) in GUEST {
        let mut family = page.family(name, Kind::Gauge, help);
        for of in &status.guests {
            if let Some(value) = value(of) {
                family.sample(&[("guest", &of.guest.name)], value);
            }
        }
    }
    for (name, help, value) in USAGE {
        let mut family = page.family(name, Kind::Gauge, help);
        for Guest { name, usage, .. } in status.guests.iter().map(|of| &of.guest) {
            if let Some(usage) = usage {
                family.sample(&[("guest", name)], value(usage));
            }
        }
    }
    let mut family = page.family(
        "balloon_manager_guest_oom_kills_total",
        Kind::Counter,
        "Processes that the guest killed for want of memory, since the manager knows it.",
    );
    for of in &status.guests {
        family.sample(&[("guest", &of.guest.name)], of.oom_kills);
    }
    page
}

fn host(page: &mut Page, host: &Host) {
    let mut gauge = |name, help, value: f64| page.single(name, Kind::Gauge, help, value);
    #[expect(clippy::cast_precision_loss, reason = "metrics are floating-point numbers")]
    let (total, available) = (host.total as f64, host.available as f64);
    gauge("balloon_manager_host_total_bytes", "Memory of the host, or of the cgroup that is shared.", total);
    gauge(
        "balloon_manager_host_available_bytes",
        "Memory of these that could be had without swapping.",
        available,
    );
    gauge("balloon_manager_host_swap_in_bytes_per_second", "What is read from swap.", host.swap_in);
    gauge("balloon_manager_host_swap_out_bytes_per_second", "What is written to swap.", host.swap_out);
    gauge(
        "balloon_manager_host_pressure_some_percent",
        "Share of the last ten seconds in which some task waited for memory.",
        host.psi_some,
    );
    gauge(
        "balloon_manager_host_pressure_full_percent",
        "Share of the last ten seconds in which all tasks waited for memory.",
        host.psi_full,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_told_apart_by_labels() {
        let guest = |name: &str, usage| GuestStatus {
            guest: Guest { name: name.into(), memory: 4096, usage, ..Guest::default() },
            oom_kills: 3,
            ..GuestStatus::default()
        };
        let usage = Usage { available: 17, ..Usage::default() };
        let status = ManagerStatus {
            guests: vec![guest("a", Some(usage)), guest("b\"", None)],
            host: Host { total: 1 << 40, psi_some: 1.5, ..Host::default() },
            ticks: 9,
            ..ManagerStatus::default()
        };
        let page = page(&status);
        let text = page.as_str();
        for line in [
            "balloon_manager_host_total_bytes 1099511627776",
            "balloon_manager_host_pressure_some_percent 1.5",
            "balloon_manager_ticks_total 9",
            "balloon_manager_guest_memory_bytes{guest=\"a\"} 4096",
            "balloon_manager_guest_memory_bytes{guest=\"b\\\"\"} 4096",
            "balloon_manager_guest_available_bytes{guest=\"a\"} 17",
            "balloon_manager_guest_oom_kills_total{guest=\"a\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing:\n{text}");
        }
        // Nothing is made up for a guest that says nothing.
        assert!(!text.contains("available_bytes{guest=\"b"), "{text}");
        // Every metric is begun once.
        let mut begun: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let all = begun.len();
        begun.sort_unstable();
        begun.dedup();
        assert_eq!(begun.len(), all);
    }
}
