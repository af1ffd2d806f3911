//! A balloon without a device.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use tempfile::TempDir;
use vhost_user_balloon::api::{Activity, Counters, GuestStatistics, Statistics, Status, Target, What};
use vhost_user_balloon::control::{self, Announcer, Controlled, Offered};
use vhost_user_balloon::device::{Observer, TargetError};
use vhost_user_daemon::control::{Bell, Client, Feed, Server};
use vhost_user_daemon::socket::Socket;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// What the guest of a [`Fake`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// It follows the target, a step each time that the status is looked at.
    Follows,
    /// It does nothing.
    Silent,
    /// Its driver has no statistics.
    Mute,
}

pub struct State {
    pub status: Status,
    pub guest: Guest,
    asked: u64,
    answered: u64,
}

pub struct Fake {
    state: Mutex<State>,
    announcer: Announcer,
}

impl Fake {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The guest's statistics come.
    pub fn answer(&self) {
        let mut state = self.state();
        state.answered = state.asked;
        state.status.statistics = Some(statistics());
        drop(state);
        self.announcer.statistics_came();
    }

    /// Whether somebody waits for statistics.
    pub fn is_asked(&self) -> bool {
        let state = self.state();
        state.asked != state.answered
    }
}

impl Controlled for Fake {
    fn status(&self) -> Status {
        const STEP: u64 = 300 * MIB;
        let mut state = self.state();
        let status = &mut state.status;
        let shown = status.clone();
        if self_follows(status) {
            let (actual, target) = (status.actual_bytes, status.target_bytes);
            status.actual_bytes = target.clamp(actual.saturating_sub(STEP), actual + STEP);
            status.resident_bytes = status.guest_memory_bytes.saturating_sub(status.actual_bytes);
            status.activity = match status.actual_bytes.cmp(&target) {
                std::cmp::Ordering::Equal => Activity::Idle,
                std::cmp::Ordering::Less => Activity::Inflating,
                std::cmp::Ordering::Greater => Activity::Deflating,
            };
        }
        shown
    }

    fn set_target(&self, target: Target) -> Result<(), TargetError> {
        let mut state = self.state();
        let guest = state.guest;
        let status = &mut state.status;
        let memory = status.guest_memory_bytes;
        let bytes = match target {
            Target { balloon_bytes: Some(bytes), guest_bytes: None } => bytes,
            Target { balloon_bytes: None, guest_bytes: Some(_) } if memory == 0 => {
                return Err(TargetError::MemoryUnknown);
            }
            Target { balloon_bytes: None, guest_bytes: Some(bytes) } => memory.saturating_sub(bytes),
            _ => return Err(TargetError::NotOne),
        };
        if bytes > 16 << 40 {
            return Err(TargetError::TooLarge(bytes));
        }
        status.requested_bytes = bytes;
        status.target_bytes = bytes.min(memory.saturating_sub(status.min_guest_memory_bytes));
        status.activity = if guest == Guest::Follows { Activity::Inflating } else { Activity::Absent };
        let what =
            What::Target { requested_bytes: status.requested_bytes, target_bytes: status.target_bytes };
        drop(state);
        self.announcer.happened(what);
        Ok(())
    }

    fn statistics(&self) -> Option<Statistics> {
        self.state().status.statistics
    }

    fn ask_statistics(&self) -> Option<u64> {
        let mut state = self.state();
        if state.guest == Guest::Mute {
            return None;
        }
        state.asked += 1;
        let asked = state.asked;
        let follows = state.guest == Guest::Follows;
        drop(state);
        if follows {
            self.answer();
        }
        Some(asked)
    }

    fn statistics_after(&self, request: u64) -> Option<Statistics> {
        let state = self.state();
        if state.answered >= request { state.status.statistics } else { None }
    }

    fn set_statistics_interval(&self, seconds: u64) {
        self.state().status.statistics_interval_s = seconds;
    }

    fn offered(&self) -> Offered {
        Offered { deflate_on_oom: true, free_page_reporting: false }
    }
}

fn self_follows(status: &Status) -> bool {
    matches!(status.activity, Activity::Inflating | Activity::Deflating)
}

/// A guest of 4 GiB that is left 512 MiB at least.
fn status() -> Status {
    Status {
        version: "1.2.3".into(),
        pid: 42,
        connected: true,
        activity: Activity::Idle,
        guest_memory_bytes: 4 * GIB,
        resident_bytes: 4 * GIB,
        requested_bytes: 0,
        target_bytes: 0,
        actual_bytes: 0,
        min_guest_memory_bytes: GIB / 2,
        ballooned_bytes: 0,
        released_bytes: 0,
        pending_bytes: 0,
        held_bytes: 0,
        features: vec!["statistics".into(), "deflate-on-oom".into()],
        statistics_interval_s: 0,
        statistics: None,
        counters: Counters::default(),
    }
}

pub fn statistics() -> Statistics {
    Statistics {
        target_pages: 512,
        actual_pages: 256,
        target_mib: 2,
        actual_mib: 1,
        age_ms: 1500,
        last_update: 1_700_000_000,
        guest: GuestStatistics {
            swap_in: Some(8192),
            swap_out: Some(4096),
            major_faults: Some(7),
            minor_faults: Some(70),
            free_memory: Some(GIB),
            total_memory: Some(4 * GIB),
            available_memory: Some(2 * GIB),
            disk_caches: Some(512 * MIB),
            hugetlb_allocations: Some(5),
            hugetlb_failures: Some(6),
            ..GuestStatistics::default()
        },
    }
}

/// A fake balloon that is served.
pub struct Fixture {
    pub path: PathBuf,
    pub fake: Arc<Fake>,
    pub feed: Feed,
    server: Option<Server>,
    _directory: TempDir,
}

impl Fixture {
    pub fn new(guest: Guest) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let bell = Bell::new().unwrap();
        let feed = control::feed(&bell);
        let state = State { status: status(), guest, asked: 0, answered: 0 };
        let fake = Arc::new(Fake { state: Mutex::new(state), announcer: Announcer::new(&bell, &feed) });
        let socket = Socket::open_private(&path).unwrap();
        let server =
            control::serve(&bell, feed.clone(), socket, Arc::clone(&fake) as Arc<dyn Controlled>).unwrap();
        Self { path, fake, feed, server: Some(server), _directory: directory }
    }

    pub fn client(&self) -> Client {
        Client::new(&self.path)
    }

    /// Ends the daemon.
    pub fn end(&mut self) {
        self.server = None;
    }
}
