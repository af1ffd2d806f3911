//! The device: its features and configuration space, what it is asked to be, and what is known of the guest.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Pid;
use thiserror::Error;
use vhost_user_daemon::device::read_config_space;
use vhost_user_daemon::{
    ConfigNotifier, Device, RING_FEATURES, SharedRegion, error_limited, info_limited, warn_limited,
};

use crate::api::{Counters, GuestStatistics, Statistics, Status, Target, What};
use crate::config::{Config, Features};
use crate::memory::check::check;
use crate::memory::{Granularity, Ledger, PAGE};
use crate::queues::QUEUES;
use crate::state::{Answer, State};
use crate::state_file::{Saved, StateFile};
use crate::worker::BalloonWorker;

/// How long who sets a target may have to wait until it is in the state file.
const SETTLE: Duration = Duration::from_millis(100);

/// How a balloon is offered.
#[derive(Clone, Debug)]
pub struct BalloonOptions {
    /// What it is asked to be at first, bytes.
    pub size: u64,
    /// What the guest keeps whatever is asked for, bytes.
    pub min_guest_memory: u64,
    /// How often statistics are asked for, seconds; 0: only on demand.
    pub statistics_interval: u64,
    /// Offer reports of free pages.
    pub reporting: bool,
    /// Offer that the guest takes pages back when it is short of memory.
    pub deflate_on_oom: bool,
    /// What is given back to the host.
    pub granularity: Granularity,
    /// Share of a processor that the guest may make the daemon use, percent.
    pub max_cpu: u32,
}

/// Who wants to know what happens. Called from any thread, and not to block.
pub trait Observer: Send + Sync + 'static {
    /// Something happened.
    fn happened(&self, what: What);

    /// The guest's statistics came.
    fn statistics_came(&self);
}

/// Why a target is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TargetError {
    /// Not exactly one of the members is given.
    #[error("Give one of balloon_bytes and guest_bytes")]
    NotOne,
    /// The guest's memory is not known.
    #[error(
        "How much memory the guest has is not known before its balloon driver runs: set balloon_bytes, or wait until it \
         does"
    )]
    MemoryUnknown,
    /// More than the device can be asked for.
    #[error("{0} bytes are more than a balloon can have: at most 16 TiB less a page")]
    TooLarge(u64),
}

/// A balloon.
pub struct Balloon {
    options: BalloonOptions,
    notifier: ConfigNotifier,
    observer: Box<dyn Observer>,
    state: Mutex<State>,
    ledger: Mutex<Ledger>,
    state_file: Option<StateFile>,
}

impl Balloon {
    /// A balloon that tells `observer` what happens, tells the front end's driver of new targets by `notifier`, and goes on
    /// with what is in `state_file` if there is something.
    pub fn new(
        options: BalloonOptions,
        notifier: ConfigNotifier,
        observer: Box<dyn Observer>,
        state_file: Option<StateFile>,
    ) -> Self {
        let saved = state_file.as_ref().and_then(StateFile::saved);
        let requested = saved.map_or(options.size, |saved| saved.requested_bytes) / PAGE * PAGE;
        let config = saved.map_or_else(Config::default, |saved| Config {
            num_pages: 0,
            actual: saved.actual_pages,
            poison_val: saved.poison_val,
        });
        let mut state = State::new(requested, config, options.statistics_interval);
        state.config.num_pages = state.target_pages(options.min_guest_memory);
        let ledger = Mutex::new(Ledger::new(options.granularity));
        Self { options, notifier, observer, state: Mutex::new(state), ledger, state_file }
    }

    /// How it is offered.
    pub fn options(&self) -> &BalloonOptions {
        &self.options
    }

    /// Asks the guest for another size of the balloon. It follows as it can.
    pub fn set_target(&self, target: Target) -> Result<(), TargetError> {
        let mut state = self.state();
        let bytes = match (target.balloon_bytes, target.guest_bytes) {
            (Some(bytes), None) => bytes,
            (None, Some(_)) if state.guest_bytes == 0 => return Err(TargetError::MemoryUnknown),
            (None, Some(bytes)) => state.guest_bytes.saturating_sub(bytes),
            _ => return Err(TargetError::NotOne),
        };
        if bytes / PAGE > u32::MAX.into() {
            return Err(TargetError::TooLarge(bytes));
        }
        let requested = bytes / PAGE * PAGE;
        let is_new = state.requested != requested;
        state.requested = requested;
        self.update_target(&mut state);
        self.save(&state);
        let target_bytes = state.target_bytes();
        drop(state);
        if let Some(file) = &self.state_file {
            file.settle(SETTLE);
        }
        if is_new {
            self.observer.happened(What::Target { requested_bytes: requested, target_bytes });
        }
        // Told again also if nothing has changed: a guest that took pages back because it was short of memory, or that gave
        // up, tries once more.
        self.notifier.notify();
        Ok(())
    }

    /// Everything about the balloon.
    pub fn status(&self) -> Status {
        let (ballooned, released, pending, resident, totals) = {
            let ledger = self.ledger();
            (
                ledger.ballooned_bytes(),
                ledger.released_bytes(),
                ledger.pending_bytes(),
                ledger.resident_bytes(),
                ledger.totals(),
            )
        };
        let state = self.state();
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            connected: state.connected,
            activity: state.activity(),
            guest_memory_bytes: state.guest_bytes,
            resident_bytes: resident,
            requested_bytes: state.requested,
            target_bytes: state.target_bytes(),
            actual_bytes: state.actual_bytes(),
            min_guest_memory_bytes: self.options.min_guest_memory,
            ballooned_bytes: ballooned,
            released_bytes: released,
            pending_bytes: pending,
            held_bytes: ballooned.saturating_sub(released + pending),
            features: if state.running { state.features.names() } else { Vec::new() },
            statistics_interval_s: state.interval,
            statistics: state.statistics(),
            counters: Counters {
                released_bytes: totals.bytes,
                releases: totals.calls,
                release_us: totals.time.as_micros() as u64,
                release_errors: totals.errors,
                config_changes: self.notifier.sent(),
                ..state.counters
            },
        }
    }

    /// What the guest said at last.
    pub fn statistics(&self) -> Option<Statistics> {
        self.state().statistics()
    }

    /// Asks the guest for statistics, and returns the number of this request; `None` if it has none.
    pub fn ask_statistics(&self) -> Option<u64> {
        let mut state = self.state();
        if !state.running || !state.features.contains(Features::STATISTICS) {
            return None;
        }
        state.asked += 1;
        state.ring();
        Some(state.asked)
    }

    /// The answer to request `number`, or a later one.
    pub fn statistics_after(&self, number: u64) -> Option<Statistics> {
        let state = self.state();
        if state.answered >= number { state.statistics() } else { None }
    }

    /// Asks for statistics this often from now on, in seconds; 0: only on demand.
    pub fn set_statistics_interval(&self, seconds: u64) {
        let mut state = self.state();
        state.interval = seconds;
        state.ring();
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds out what the driver is asked for now; whether that is something else than before.
    fn update_target(&self, state: &mut State) -> bool {
        let pages = state.target_pages(self.options.min_guest_memory);
        let changed = state.config.num_pages != pages;
        if changed {
            state.config.num_pages = pages;
            state.target_changed = Instant::now();
            state.moved();
            state.ring();
        }
        changed
    }

    fn save(&self, state: &State) {
        if let Some(file) = &self.state_file {
            file.save(Saved {
                requested_bytes: state.requested,
                actual_pages: state.config.actual,
                poison_val: state.config.poison_val,
            });
        }
    }

    /// The guest's memory is `bytes` from now on.
    pub(crate) fn set_guest_bytes(&self, bytes: u64) {
        let mut state = self.state();
        state.guest_bytes = bytes;
        if self.options.min_guest_memory >= bytes && state.requested > 0 {
            warn_limited!(
                "The guest has {bytes} bytes of memory, and --min-guest-memory leaves it all of them: the balloon stays \
                 empty"
            );
        }
        if self.update_target(&mut state) {
            drop(state);
            self.notifier.notify();
        }
    }

    /// A driver uses the balloon, or does not any more.
    pub(crate) fn set_running(&self, running: bool) {
        let mut state = self.state();
        if state.running != running {
            state.running = running;
            state.moved();
        }
    }

    /// The driver has started from nothing.
    pub(crate) fn driver_started(&self, ledger: &mut Ledger) {
        let huge = ledger.clear();
        let mut state = self.state();
        if huge.is_err() {
            complain_of_huge_pages();
        }
        state.config.actual = 0;
        state.complete = true;
        state.statistics = None;
        state.held = false;
        state.oom_bytes = 0;
        state.counters.driver_starts += 1;
        state.moved();
        self.save(&state);
        let guest_memory_bytes = state.guest_bytes;
        drop(state);
        info_limited!("The guest's balloon driver has started");
        self.observer.happened(What::DriverStarted { guest_memory_bytes });
    }

    /// Sends the events that have become due, and returns when the next one will.
    pub(crate) fn send_due_events(&self) -> Option<Instant> {
        let (events, next) = self.state().due_events();
        for mut what in events {
            if let What::Actual { resident_bytes, .. } | What::Reached { resident_bytes, .. } = &mut what {
                *resident_bytes = self.ledger().resident_bytes();
            }
            self.observer.happened(what);
        }
        next
    }

    /// A deflation waits for huge pages, `bytes` of them, or goes on.
    pub(crate) fn set_held(&self, bytes: Option<u64>) {
        let mut state = self.state();
        if state.held == bytes.is_some() {
            return;
        }
        state.held = bytes.is_some();
        state.moved();
        let what = match bytes {
            Some(bytes) => {
                state.counters.deflates_held += 1;
                warn_limited!(
                    "The host has no huge page for what the guest takes back out of its balloon, so the guest waits: add \
                     some (vm.nr_hugepages)"
                );
                What::DeflateHeld { bytes }
            }
            None => What::DeflateResumed,
        };
        drop(state);
        self.observer.happened(what);
    }

    /// Whether statistics are to be asked for after request `sent`, and up to which request that answers them all.
    pub(crate) fn wanted_statistics(&self, sent: u64) -> Option<u64> {
        let state = self.state();
        (state.asked > sent).then_some(state.asked)
    }

    /// The interval of the statistics, if there is one.
    pub(crate) fn statistics_interval(&self) -> Option<Duration> {
        let interval = self.state().interval;
        (interval > 0).then(|| Duration::from_secs(interval))
    }

    /// Statistics came that answer all requests up to `answered`.
    pub(crate) fn take_statistics(&self, numbers: GuestStatistics, answered: u64) {
        let mut state = self.state();
        state.statistics = Some(Answer { numbers, came: Instant::now(), date: SystemTime::now() });
        state.answered = answered;
        drop(state);
        self.observer.statistics_came();
    }

    /// Memory could not be given back.
    pub(crate) fn release_failed(&self, error: &io::Error) {
        error_limited!("Memory of the guest cannot be given back to the host: {error}");
        let due = State::is_due(&mut self.state().failure_event);
        if due {
            self.observer.happened(What::ReleaseFailed { reason: error.to_string() });
        }
    }
}

fn complain_of_huge_pages() {
    error_limited!(
        "The guest has started anew, and the host has not enough huge pages for what its balloon had given back: the guest \
         is killed when it touches the missing ones, unless you add some now (vm.nr_hugepages)"
    );
}

impl Device for Balloon {
    type Worker = BalloonWorker;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn queues_flag(&self) -> &'static str {
        "nothing: a balloon has no more"
    }

    fn queues_per_worker(&self) -> usize {
        // What is inflated and deflated has one order.
        QUEUES
    }

    fn keeps_order(&self) -> bool {
        true
    }

    fn drains_when_disabled(&self) -> bool {
        // The next driver may use what this one gave. Some front ends only disable the queues of a driver that goes.
        true
    }

    fn max_queue_size(&self) -> u16 {
        // The largest of the virtio text: crosvm uses what it is offered without asking.
        32_768
    }

    fn features(&self) -> u64 {
        let mut features = Features::MUST_TELL_HOST | Features::STATISTICS | Features::PAGE_POISON;
        features.set(Features::REPORTING, self.options.reporting);
        features.set(Features::DEFLATE_ON_OOM, self.options.deflate_on_oom);
        RING_FEATURES | features.bits()
    }

    fn set_features(&self, features: u64) {
        let features = Features::from_bits_truncate(features);
        self.state().features = features;
        self.ledger().set_told(features.contains(Features::MUST_TELL_HOST));
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_space(&self.state().config.to_bytes(), offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> bool {
        let mut state = self.state();
        let old = state.config;
        if !state.config.write(offset, data) {
            return false;
        }
        if state.config == old {
            return true;
        }
        self.save(&state);
        if state.config.actual == old.actual {
            return true;
        }
        state.moved();
        // The worker says so: who waits here is the guest.
        state.actual_moved = true;
        state.ring();
        true
    }

    fn check_memory(&self, regions: &[SharedRegion<'_>], peer: Option<Pid>) -> Result<(), String> {
        if self.options.granularity == Granularity::Nothing {
            return Ok(());
        }
        let peer = peer.map(|peer| peer.as_raw_nonzero().get());
        regions.iter().try_for_each(|region| {
            check(region.file, region.offset, region.size, peer).map_err(|error| error.to_string())
        })
    }

    fn connected(&self) {
        self.state().connected = true;
        self.observer.happened(What::Connected);
    }

    fn disconnected(&self) {
        self.ledger().detach();
        let mut state = self.state();
        state.connected = false;
        state.running = false;
        state.guest_bytes = 0;
        state.doorbell = None;
        state.held = false;
        state.statistics = None;
        self.update_target(&mut state);
        drop(state);
        self.observer.happened(What::Disconnected);
    }

    /// With a front end there, this is the guest that resets the device: it has all of its memory back.
    fn reset(&self) {
        let mut state = self.state();
        state.features = Features::empty();
        if state.connected {
            state.config.actual = 0;
            state.config.poison_val = 0;
            self.update_target(&mut state);
            self.save(&state);
            drop(state);
            if self.ledger().clear().is_err() {
                complain_of_huge_pages();
            }
        }
    }

    fn new_worker(self: &Arc<Self>, _index: usize) -> io::Result<BalloonWorker> {
        let worker = BalloonWorker::new(Arc::clone(self))?;
        self.state().doorbell = Some(worker.doorbell());
        Ok(worker)
    }
}
