//! Which operations may keep a thread waiting.
//!
//! Handing an operation to another thread costs more than most operations take. So it is done here and now, unless the
//! file system is known to answer late: one behind a network always, one on disks for a while after it was seen to.

use std::os::fd::BorrowedFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use rustix::fs::fstatfs;

/// An operation that took longer may have waited: several times what the hand-over costs.
pub const SLOW: Duration = Duration::from_micros(100);

/// How long operations are handed over after one that waited, and looked at closely after one that may have.
const WARY: Duration = Duration::from_millis(100);

/// Zero of the clock.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// How a file system answers.
#[derive(Debug)]
pub struct Pace {
    medium: Medium,
    /// `RWF_NOWAIT` is known not to work here.
    no_nowait: AtomicBool,
    /// Nanoseconds after [`START`] until which operations count as slow.
    slow_until: AtomicU64,
    /// The same, until which it is looked at closely whether they wait.
    suspected_until: AtomicU64,
}

/// The beginning of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    start: Instant,
    /// How often the thread had slept.
    sleeps: Option<i64>,
}

/// What is behind a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    /// Memory of the host: nothing waits.
    Memory,
    /// A disk: what is cached does not wait.
    Disk,
    /// Another machine or process, which may not answer at all.
    Remote,
    /// No files, but the kernel's own state: /proc.
    Kernel,
}

impl Default for Pace {
    /// The pace of a disk.
    fn default() -> Self {
        Self::new(Medium::Disk)
    }
}

impl Pace {
    /// The pace of the file system that `file` is on.
    pub fn of(file: BorrowedFd<'_>) -> Self {
        Self::new(fstatfs(file).map_or(Medium::Disk, |statfs| medium(statfs.f_type as u32)))
    }

    fn new(medium: Medium) -> Self {
        Self {
            medium,
            no_nowait: AtomicBool::new(false),
            slow_until: AtomicU64::new(0),
            suspected_until: AtomicU64::new(0),
        }
    }

    /// Whether reads say if they would have to wait.
    pub fn knows_nowait(&self) -> bool {
        self.medium != Medium::Memory && !self.no_nowait.load(Ordering::Relaxed)
    }

    /// Notes that they do not.
    pub fn forget_nowait(&self) {
        self.no_nowait.store(true, Ordering::Relaxed);
    }

    /// Whether the files are the kernel's own, whose reading may wait for anything or give the host away.
    pub fn is_kernel(&self) -> bool {
        self.medium == Medium::Kernel
    }

    /// Whether what is not cached is to be left to another thread.
    pub fn may_wait(&self) -> bool {
        match self.medium {
            Medium::Memory => false,
            Medium::Remote | Medium::Kernel => true,
            Medium::Disk => {
                let until = self.slow_until.load(Ordering::Relaxed);
                until != 0 && now() < until
            }
        }
    }

    /// Whether nothing that is asked of it ever waits.
    pub fn is_memory(&self) -> bool {
        self.medium == Medium::Memory
    }

    /// Whether anything that is asked of it may wait, cached or not.
    pub fn is_remote(&self) -> bool {
        self.medium == Medium::Remote
    }

    /// An operation begins.
    pub fn begin(&self) -> Mark {
        let suspected = now() < self.suspected_until.load(Ordering::Relaxed);
        Mark { start: Instant::now(), sleeps: if suspected { sleeps() } else { None } }
    }

    /// The operation is done. One that took long has not always waited for the storage: on a busy host it may just not have
    /// had a processor. So the next ones are asked whether they sleep, which costs a system call before and after.
    pub fn end(&self, mark: Mark) {
        if self.medium != Medium::Disk || mark.start.elapsed() <= SLOW {
            return;
        }
        let until = now() + WARY.as_nanos() as u64;
        self.suspected_until.store(until, Ordering::Relaxed);
        if mark.sleeps.is_some_and(|before| sleeps().is_some_and(|after| after > before)) {
            self.slow_until.store(until, Ordering::Relaxed);
        }
    }
}

/// How often this thread has slept: its voluntary context switches.
fn sleeps() -> Option<i64> {
    getrusage(UsageWho::RUSAGE_THREAD).ok().map(|usage| usage.voluntary_context_switches())
}

fn now() -> u64 {
    START.elapsed().as_nanos() as u64
}

/// What is behind file systems of this type (statfs(2), `f_type`).
fn medium(kind: u32) -> Medium {
    match kind {
        // tmpfs, ramfs, hugetlbfs
        0x0102_1994 | 0x8584_58f6 | 0x9584_58f6 => Medium::Memory,
        // procfs
        0x9fa0 => Medium::Kernel,
        // NFS, CIFS, SMB2, SMB, FUSE, 9P, Ceph, AFS, kAFS, Coda, Lustre, GFS2, OCFS2
        0x6969 | 0xff53_4d42 | 0xfe53_4d42 | 0x517b | 0x6573_5546 | 0x0102_1997 | 0x00c3_6400
        | 0x5346_414f | 0x6b41_4653 | 0x7375_7245 | 0x0bd0_0bd0 | 0x0116_1970 | 0x7461_636f => Medium::Remote,
        _ => Medium::Disk,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(pace: &Pace, act: impl FnOnce()) {
        let mark = pace.begin();
        act();
        pace.end(mark);
    }

    fn sleep() {
        std::thread::sleep(4 * SLOW);
    }

    fn work() {
        let start = Instant::now();
        while start.elapsed() < 4 * SLOW {}
    }

    #[test]
    fn a_disk_that_lets_wait_twice_is_slow_for_a_while() {
        let pace = Pace::new(Medium::Disk);
        operation(&pace, || {});
        operation(&pace, sleep);
        assert!(!pace.may_wait(), "it may have been the processor's fault");
        operation(&pace, sleep);
        assert!(pace.may_wait());
    }

    #[test]
    fn what_computes_for_long_does_not_wait() {
        let pace = Pace::new(Medium::Disk);
        for _ in 0..5 {
            operation(&pace, work);
        }
        assert!(!pace.may_wait());
    }

    #[test]
    fn what_is_behind_a_file_system_does_not_change() {
        for (medium, waits) in [(Medium::Memory, false), (Medium::Remote, true)] {
            let pace = Pace::new(medium);
            for _ in 0..3 {
                operation(&pace, sleep);
            }
            assert_eq!(pace.may_wait(), waits);
        }
    }
}
