//! What a process costs, seen from outside.
#![expect(unsafe_code, reason = "the clock of another process has no safe wrapper")]

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

/// A count of what a process holds at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Open file descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// Memory mappings.
    pub mappings: usize,
    /// Resident memory in KiB.
    pub rss_kib: usize,
}

impl Footprint {
    /// Looks at the process `pid`.
    pub fn of(pid: u32) -> io::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let rss_kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok())
            .ok_or_else(|| io::Error::other(format!("No VmRSS in /proc/{pid}/status")))?;
        Ok(Self {
            fds: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
            threads: fs::read_dir(format!("/proc/{pid}/task"))?.count(),
            mappings: fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().count(),
            rss_kib,
        })
    }
}

/// The CPU time of all threads of `pid` so far, those that ended and io-wq included, in nanosecond resolution.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let mut clock = 0;
    // SAFETY: `clock` is a valid place for the result.
    let error = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut now = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: `now` is a valid place for the result.
    if unsafe { libc::clock_gettime(clock, now.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it filled in `now`.
    let now = unsafe { now.assume_init() };
    Ok(Duration::new(now.tv_sec as u64, now.tv_nsec as u32))
}
