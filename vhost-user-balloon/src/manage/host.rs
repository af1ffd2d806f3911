//! The host as a policy sees it: all of it, or the part that a cgroup lets the guests have.

mod cgroup;
pub mod psi;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use log::warn;
use procfs::{FromRead, Meminfo, ProcError, VmStat};
use thiserror::Error;

use self::cgroup::Cgroup;
use self::psi::{Pressure, Trigger};
use crate::manage::config::Budget;
use crate::manage::model::Host;

/// Why the host cannot be looked at.
#[derive(Debug, Error)]
pub enum HostError {
    /// A file under /proc, or of a cgroup, cannot be read.
    #[error("{} cannot be read: {remedy}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What would help.
        remedy: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file does not say what it should.
    #[error("{} does not say {what}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// The directory is no cgroup that counts memory.
    #[error(
        "{} is no cgroup (version 2) that counts memory: it has no memory.current. Name a directory under \
         /sys/fs/cgroup that is not the root, and see that its parent has \"memory\" in cgroup.subtree_control",
        .0.display()
    )]
    NoCgroup(PathBuf),
}

/// Looks at the host again and again.
#[derive(Debug)]
pub struct HostSampler {
    proc: PathBuf,
    part: Part,
    /// Where pressure is read from, if the kernel tells.
    pressure: Option<PathBuf>,
    /// When the counters were read at last, seconds, and what they were.
    last: Option<(f64, SwapCounters)>,
    page_size: u64,
}

/// The part of the host that the guests may use.
#[derive(Debug)]
enum Part {
    All,
    /// So many bytes.
    Bytes(u64),
    Cgroup(Cgroup),
}

/// What was read from swap and written to it since some time in the past, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SwapCounters {
    read: u64,
    written: u64,
}

impl HostSampler {
    /// Looks at the part of the host that `budget` names.
    ///
    /// A kernel that does not tell of pressure is warned about once, and counts as one without.
    pub fn new(budget: &Budget) -> Result<Self, HostError> {
        Self::with_proc(Path::new("/proc"), budget)
    }

    /// The same, with another directory in place of /proc.
    pub(crate) fn with_proc(proc: &Path, budget: &Budget) -> Result<Self, HostError> {
        let part = match budget {
            Budget::Auto => Part::All,
            Budget::Bytes(bytes) => Part::Bytes(*bytes),
            Budget::Cgroup(path) => Part::Cgroup(Cgroup::new(path)?),
        };
        let pressure = match &part {
            Part::Cgroup(cgroup) => cgroup.pressure_path(),
            Part::All | Part::Bytes(_) => proc.join("pressure/memory"),
        };
        let pressure = match psi::read(&pressure) {
            Ok(_) => Some(pressure),
            Err(error) => {
                warn!(
                    "{} does not tell of memory pressure ({error}): the kernel needs CONFIG_PSI, and psi=1 on its \
                     command line where CONFIG_PSI_DEFAULT_DISABLED is set. Without it, shortage is only seen by the \
                     memory that is left",
                    pressure.display()
                );
                None
            }
        };
        let mut sampler =
            Self { proc: proc.to_owned(), part, pressure, last: None, page_size: procfs::page_size() };
        // Says now what would be said at every look.
        sampler.sample(0.0)?;
        sampler.last = None;
        Ok(sampler)
    }

    /// The host at this moment, which is `now` seconds after some moment that stays the same.
    ///
    /// Fails if the files cannot be read; the next look may do better.
    pub fn sample(&mut self, now: f64) -> Result<Host, HostError> {
        let meminfo = self.meminfo()?;
        let available = meminfo
            .mem_available
            .ok_or_else(|| HostError::Missing { path: self.proc.join("meminfo"), what: "MemAvailable" })?;
        let (total, available, counters) = match &self.part {
            Part::All => (meminfo.mem_total, available, self.swap_counters()),
            Part::Bytes(bytes) => {
                // As if the host had so much less.
                let total = meminfo.mem_total.min(*bytes);
                (total, available.saturating_sub(meminfo.mem_total - total), self.swap_counters())
            }
            Part::Cgroup(cgroup) => {
                let memory = cgroup.memory(self.page_size)?;
                // What the cgroup may still have, it only gets if the host has it.
                (memory.limit.min(meminfo.mem_total), memory.available().min(available), Some(memory.swap))
            }
        };
        let (swap_in, swap_out) = self.swap_rates(now, counters);
        let pressure: Pressure =
            self.pressure.as_deref().and_then(|path| psi::read(path).ok()).unwrap_or_default();
        Ok(Host {
            total,
            available,
            swap_in,
            swap_out,
            psi_some: pressure.some_avg10,
            psi_full: pressure.full_avg10,
        })
    }

    /// Asks the kernel to wake the manager when tasks wait for memory, if it tells of pressure.
    ///
    /// Gives no trigger where the manager may not have any; that is said in the log, once for all of them.
    pub fn triggers(&self) -> Vec<Trigger> {
        self.pressure.as_deref().map(psi::triggers).unwrap_or_default()
    }

    fn meminfo(&self) -> Result<Meminfo, HostError> {
        let path = self.proc.join("meminfo");
        Meminfo::from_file(&path).map_err(|error| match error {
            ProcError::Io(source, _) => HostError::Read { path, remedy: "/proc has to be mounted", source },
            ProcError::NotFound(_) | ProcError::PermissionDenied(_) => HostError::Read {
                path,
                remedy: "/proc has to be mounted and readable",
                source: io::ErrorKind::NotFound.into(),
            },
            _ => HostError::Missing { path, what: "how much memory there is" },
        })
    }

    /// `None` if the kernel does not count.
    fn swap_counters(&self) -> Option<SwapCounters> {
        let VmStat(stat) = VmStat::from_file(self.proc.join("vmstat")).ok()?;
        let bytes = |name| {
            let pages = u64::try_from(*stat.get(name)?).ok()?;
            Some(pages.saturating_mul(self.page_size))
        };
        Some(SwapCounters { read: bytes("pswpin")?, written: bytes("pswpout")? })
    }

    /// Bytes a second since the last look.
    fn swap_rates(&mut self, now: f64, counters: Option<SwapCounters>) -> (f64, f64) {
        let Some(counters) = counters else { return (0.0, 0.0) };
        let last = self.last.replace((now, counters));
        let Some((then, last)) = last else { return (0.0, 0.0) };
        (rate(last.read, counters.read, now - then), rate(last.written, counters.written, now - then))
    }
}

/// How fast a counter grows, a second. One that has begun anew, or no time, is no growth.
pub(crate) fn rate(before: u64, after: u64, seconds: f64) -> f64 {
    let grown = after.saturating_sub(before);
    #[expect(clippy::cast_precision_loss, reason = "a rate is about right")]
    if seconds > 0.0 { grown as f64 / seconds } else { 0.0 }
}

/// Reads a small file of the kernel.
fn read(path: PathBuf, remedy: &'static str) -> Result<String, HostError> {
    fs::read_to_string(&path).map_err(|source| HostError::Read { path, remedy, source })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A directory that looks like /proc.
    pub(crate) fn fake_proc(directory: &Path, available: u64, swapped_in: u64) {
        let kib = |bytes: u64| bytes / 1024;
        fs::create_dir_all(directory.join("pressure")).unwrap();
        let meminfo = format!(
            "MemTotal: {} kB\nMemFree: 100 kB\nMemAvailable: {} kB\nBuffers: 0 kB\nCached: 0 kB\nSwapCached: 0 kB\n\
             Active: 0 kB\nInactive: 0 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\nDirty: 0 kB\nWriteback: 0 kB\n\
             Mapped: 0 kB\nSlab: 0 kB\nCommitted_AS: 0 kB\nVmallocTotal: 0 kB\nVmallocUsed: 0 kB\n\
             VmallocChunk: 0 kB\n",
            kib(8 << 30),
            kib(available)
        );
        fs::write(directory.join("meminfo"), meminfo).unwrap();
        let vmstat = format!("nr_free_pages 1\npswpin {swapped_in}\npswpout 7\n");
        fs::write(directory.join("vmstat"), vmstat).unwrap();
        fs::write(
            directory.join("pressure/memory"),
            "some avg10=0.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=1\n",
        )
        .unwrap();
    }

    #[test]
    fn a_host_is_what_proc_says() {
        let proc = tempfile::tempdir().unwrap();
        fake_proc(proc.path(), 3 << 30, 1000);
        let mut sampler = HostSampler::with_proc(proc.path(), &Budget::Auto).unwrap();
        let host = sampler.sample(10.0).unwrap();
        let expected =
            Host { total: 8 << 30, available: 3 << 30, psi_some: 0.5, psi_full: 0.25, ..Host::default() };
        assert_eq!(host, expected);
        fake_proc(proc.path(), 2 << 30, 1512);
        let host = sampler.sample(12.0).unwrap();
        let pages = 256.0;
        #[expect(clippy::cast_precision_loss, reason = "pages are small")]
        let bytes = pages * procfs::page_size() as f64;
        assert_eq!((host.available, host.swap_in, host.swap_out), (2 << 30, bytes, 0.0));
        // A counter that goes back is no rate.
        fake_proc(proc.path(), 2 << 30, 3);
        assert!(sampler.sample(13.0).unwrap().swap_in.abs() < 1e-9);
    }

    #[test]
    fn a_kernel_that_does_not_tell_of_pressure_is_good_enough() {
        let proc = tempfile::tempdir().unwrap();
        fake_proc(proc.path(), 3 << 30, 0);
        fs::remove_dir_all(proc.path().join("pressure")).unwrap();
        fs::remove_file(proc.path().join("vmstat")).unwrap();
        let mut sampler = HostSampler::with_proc(proc.path(), &Budget::Auto).unwrap();
        let host = sampler.sample(1.0).unwrap();
        assert_eq!((host.available, host.psi_some, host.swap_in), (3 << 30, 0.0, 0.0));
        assert!(sampler.triggers().is_empty());
    }

    #[test]
    fn what_is_missing_is_named() {
        let proc = tempfile::tempdir().unwrap();
        let error = HostSampler::with_proc(proc.path(), &Budget::Auto).unwrap_err();
        assert!(error.to_string().contains("meminfo"), "{error}");
        fake_proc(proc.path(), 1 << 30, 0);
        let meminfo = fs::read_to_string(proc.path().join("meminfo")).unwrap();
        fs::write(proc.path().join("meminfo"), meminfo.replace("MemAvailable", "MemUnknown")).unwrap();
        let error = HostSampler::with_proc(proc.path(), &Budget::Auto).unwrap_err();
        assert!(error.to_string().ends_with("does not say MemAvailable"), "{error}");
    }

    #[test]
    fn a_host_can_be_made_smaller() {
        let proc = tempfile::tempdir().unwrap();
        fake_proc(proc.path(), 3 << 30, 0);
        let look = |bytes| {
            let host =
                HostSampler::with_proc(proc.path(), &Budget::Bytes(bytes)).unwrap().sample(0.0).unwrap();
            (host.total, host.available)
        };
        assert_eq!(look(7 << 30), (7 << 30, 2 << 30));
        assert_eq!(look(1 << 30), (1 << 30, 0));
        assert_eq!(look(u64::MAX), (8 << 30, 3 << 30));
    }

    #[test]
    fn this_host_can_be_looked_at() {
        let host = HostSampler::new(&Budget::Auto).unwrap().sample(0.0).unwrap();
        assert!(host.available > 0 && host.available <= host.total, "{host:?}");
    }

    #[test]
    fn a_cgroup_bounds_the_host_and_the_host_the_cgroup() {
        let directory = tempfile::tempdir().unwrap();
        let (proc, slice) = (directory.path().join("proc"), directory.path().join("machine.slice"));
        fake_proc(&proc, 3 << 30, 0);
        cgroup::tests::fake_cgroup(&slice, "2147483648", 1 << 30, 256 << 20);
        let mut sampler = HostSampler::with_proc(&proc, &Budget::Cgroup(slice.clone())).unwrap();
        let host = sampler.sample(1.0).unwrap();
        // 2 GiB less 1 GiB of which 256 MiB are file cache.
        assert_eq!((host.total, host.available), (2 << 30, (1 << 30) + (256 << 20)));
        assert_eq!((host.psi_some, host.psi_full), (9.0, 4.0));
        fake_proc(&proc, 1 << 20, 0);
        assert_eq!(sampler.sample(2.0).unwrap().available, 1 << 20);
        fake_proc(&proc, 3 << 30, 0);
        cgroup::tests::fake_cgroup(&slice, "max", 1 << 30, 0);
        let host = sampler.sample(3.0).unwrap();
        assert_eq!((host.total, host.available), (8 << 30, 3 << 30));
        let error = HostSampler::with_proc(&proc, &Budget::Cgroup(proc.clone())).unwrap_err();
        assert!(error.to_string().contains("is no cgroup"), "{error}");
    }
}
