//! What the guest says of its memory, once or again and again.

use std::thread;
use std::time::{Duration, Instant};

use vhost_user_daemon::control::ClientError;

use super::units::{ago, size};
use super::{Session, columns};
use crate::api::{GuestStatistics, Statistics, Status};

/// After how many lines the head of the columns is printed again.
const HEAD_EVERY: u64 = 20;

impl Session<'_> {
    fn statistics(&mut self, fresh: bool) -> Result<Statistics, ClientError> {
        self.client.get(if fresh { "/v1/statistics?fresh=1" } else { "/v1/statistics" })
    }

    /// Prints what the guest says.
    pub(super) fn stats(&mut self, fresh: bool) -> anyhow::Result<()> {
        let statistics = self.statistics(fresh)?;
        self.print(&statistics, table)
    }

    /// Prints what the guest says as virsh does.
    pub(super) fn dommemstat(&mut self, fresh: bool) -> anyhow::Result<()> {
        if fresh {
            self.statistics(true)?;
        }
        let status: Status = self.client.get("/v1/status")?;
        let statistics = virsh(&status);
        if self.json {
            let object: serde_json::Map<_, _> =
                statistics.into_iter().map(|(name, number)| (name.into(), number.into())).collect();
            return self.print(&object, |_| String::new());
        }
        for (name, number) in statistics {
            writeln!(self.output, "{name} {number}")?;
        }
        Ok(())
    }

    /// Prints a line every `interval`, until there is an error.
    pub(super) fn watch(&mut self, interval: Duration, fresh: bool) -> anyhow::Result<()> {
        let mut before: Option<(Instant, GuestStatistics)> = None;
        let mut next = Instant::now();
        for line in 0_u64.. {
            let mut status: Status = self.client.get("/v1/status")?;
            // Where nobody else asks, the same numbers again and again would be no news.
            if fresh || status.statistics_interval_s == 0 {
                match self.statistics(true) {
                    // A guest that does not answer is seen by the age of its numbers.
                    Ok(_) | Err(ClientError::Refused { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
                status = self.client.get("/v1/status")?;
            }
            let now = Instant::now();
            // No statistics are no reason to end: the guest may be booting.
            let guest = status.statistics.map(|statistics| statistics.guest).unwrap_or_default();
            let rates = before.map(|(then, old)| Rates::between(&old, &guest, now.duration_since(then)));
            before = Some((now, guest));
            let head = if line % HEAD_EVERY == 0 { HEAD } else { "" };
            self.print(&status, |status| {
                format!("{head}{}", row(status, &guest, rates.unwrap_or_default()))
            })?;
            next = (next + interval).max(now);
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        Ok(())
    }
}

/// What the guest says, with the names of Firecracker's API.
fn table(statistics: &Statistics) -> String {
    let guest = &statistics.guest;
    let bytes = |number: Option<u64>| number.map(size);
    let count = |number: Option<u64>| number.map(|number| number.to_string());
    let rows = [
        ("available_memory", bytes(guest.available_memory)),
        ("free_memory", bytes(guest.free_memory)),
        ("disk_caches", bytes(guest.disk_caches)),
        ("total_memory", bytes(guest.total_memory)),
        ("swap_in", bytes(guest.swap_in)),
        ("swap_out", bytes(guest.swap_out)),
        ("major_faults", count(guest.major_faults)),
        ("minor_faults", count(guest.minor_faults)),
        ("hugetlb_allocations", count(guest.hugetlb_allocations)),
        ("hugetlb_failures", count(guest.hugetlb_failures)),
        ("oom_kill", count(guest.oom_kill)),
        ("alloc_stall", count(guest.alloc_stall)),
        ("async_scan", bytes(guest.async_scan)),
        ("direct_scan", bytes(guest.direct_scan)),
        ("async_reclaim", bytes(guest.async_reclaim)),
        ("direct_reclaim", bytes(guest.direct_reclaim)),
        ("balloon", Some(format!("{} of {} MiB", statistics.actual_mib, statistics.target_mib))),
        ("last_update", Some(ago(statistics.age_ms))),
    ];
    let known: Vec<_> = rows.into_iter().filter_map(|(name, text)| Some((name, text?))).collect();
    columns(&known)
}

/// The statistics of `virsh dommemstat`, in its order: memory in KiB, `last_update` in seconds since 1970, and counts.
/// What is not known is left out.
fn virsh(status: &Status) -> Vec<(&'static str, u64)> {
    let kib = |bytes: u64| bytes / 1024;
    let guest = status.statistics.map(|statistics| statistics.guest).unwrap_or_default();
    // What virsh calls actual is what the balloon leaves.
    let actual = status.guest_memory_bytes.checked_sub(status.actual_bytes).filter(|bytes| *bytes != 0);
    let rows = [
        ("actual", actual.map(kib)),
        ("swap_in", guest.swap_in.map(kib)),
        ("swap_out", guest.swap_out.map(kib)),
        ("major_fault", guest.major_faults),
        ("minor_fault", guest.minor_faults),
        ("unused", guest.free_memory.map(kib)),
        ("available", guest.total_memory.map(kib)),
        ("usable", guest.available_memory.map(kib)),
        ("last_update", status.statistics.map(|statistics| statistics.last_update)),
        ("disk_caches", guest.disk_caches.map(kib)),
        ("hugetlb_pgalloc", guest.hugetlb_allocations),
        ("hugetlb_pgfail", guest.hugetlb_failures),
        ("rss", (status.guest_memory_bytes != 0).then(|| kib(status.resident_bytes))),
    ];
    rows.into_iter().filter_map(|(name, number)| Some((name, number?))).collect()
}

/// What has changed, for each second.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    swap_in: Option<u64>,
    swap_out: Option<u64>,
    major_faults: Option<u64>,
}

impl Rates {
    fn between(old: &GuestStatistics, new: &GuestStatistics, time: Duration) -> Self {
        let rate = |old: Option<u64>, new: Option<u64>| {
            // It counts from 0 again when the guest has booted.
            let change = u128::from(new?.saturating_sub(old?));
            Some((change * 1_000_000 / time.as_micros().max(1)) as u64)
        };
        Self {
            swap_in: rate(old.swap_in, new.swap_in),
            swap_out: rate(old.swap_out, new.swap_out),
            major_faults: rate(old.major_faults, new.major_faults),
        }
    }
}

const HEAD: &str = "   BALLOON     TARGET   RESIDENT  AVAILABLE       FREE     CACHES  SWAP-IN/s SWAP-OUT/s   MAJFLT/s         AGE\n";

/// A line below [`HEAD`].
fn row(status: &Status, guest: &GuestStatistics, rates: Rates) -> String {
    let unknown = || "-".to_owned();
    let bytes = |number: Option<u64>| number.map_or_else(unknown, size);
    format!(
        "{:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>11}\n",
        size(status.actual_bytes),
        size(status.target_bytes),
        size(status.resident_bytes),
        bytes(guest.available_memory),
        bytes(guest.free_memory),
        bytes(guest.disk_caches),
        bytes(rates.swap_in),
        bytes(rates.swap_out),
        rates.major_faults.map_or_else(unknown, |number| number.to_string()),
        status.statistics.map_or_else(unknown, |statistics| ago(statistics.age_ms)),
    )
}
