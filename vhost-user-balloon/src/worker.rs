//! The queues: pages that come and go, statistics, reports; and giving back, while there is nothing more urgent to do.
//!
//! With a driver that promises to ask for its pages before it uses them, requests to inflate are answered at once, and
//! what they bring is given back to the host afterwards: complete blocks of 2 MiB as soon as they are complete, the rest
//! when nothing has come for 10 ms. Without that promise, and for reports always, giving back comes first.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost_user_daemon::bell::Bell;
use vhost_user_daemon::memory::{Memory, regions};
use vhost_user_daemon::poller::{Doorbell, Interest, Poller};
use vhost_user_daemon::{Chain, Progress, Ring, SharedRing, Worker, warn_limited};

use crate::config::Features;
use crate::device::Balloon;
use crate::memory::{Ledger, MemoryFile, NoHugePage, Noted, PAGE, Region, Urgency};
use crate::queues::{QUEUES, Role, roles};
use crate::request::{self, MAX_REQUEST, Pages};
use crate::work_limit::WorkLimit;

/// Chains that are served in one pass of a queue.
const BATCH: usize = 32;

/// Page numbers after which a queue has had its share of a pass.
const SHARE: usize = MAX_REQUEST / 4;

/// How long nothing has to come before blocks that are not complete are given back.
const QUIET: Duration = Duration::from_millis(10);

/// Blocks that may wait at the same time.
const MAX_PENDING: usize = 256;

/// The queue for deflation, in both ways to number them.
const DEFLATE_QUEUE: usize = 1;

/// How often a deflation that waits for huge pages tries again.
const RETRY: Duration = Duration::from_millis(100);

/// Serves all queues of a balloon.
pub struct BalloonWorker {
    device: Arc<Balloon>,
    poller: Poller,
    bell: Bell,
    chain: Chain,
    buffer: Vec<u8>,
    pages: Pages,
    limit: WorkLimit,
    blocked_until: Option<Instant>,
    /// The memory map that the ledger knows.
    map: Option<Arc<Memory>>,
    /// When pages came at last.
    last_inflate: Instant,
    /// The buffer that the guest gave for statistics.
    statistics: Option<Held>,
    /// Requests for statistics up to this one were passed on.
    sent: u64,
    /// The guest has its buffer back and is to fill it, or has just primed it.
    awaited: bool,
    /// The buffer is there, and could be given back.
    can_ask: bool,
    /// When they were asked for at last.
    asked_at: Option<Instant>,
    deflation: Option<HeldDeflation>,
    /// A queue is about to stop, and all that waits has to be given back first.
    draining: bool,
}

/// A chain that is completed later.
#[derive(Clone, Copy, Debug)]
struct Held {
    head: u16,
    /// That of its ring when it was popped.
    epoch: u32,
}

/// A request to deflate that waits for huge pages.
struct HeldDeflation {
    chain: Held,
    pages: Pages,
    /// The page that there is no huge page for.
    next: usize,
    retry_at: Instant,
}

impl BalloonWorker {
    /// The worker of `device`, for one connection.
    pub fn new(device: Arc<Balloon>) -> io::Result<Self> {
        let poller = Poller::new()?;
        let bell = Bell::new(poller.as_fd())?;
        let limit = WorkLimit::new(device.options().max_cpu);
        // What was asked of the guest before and not answered is asked again.
        let sent = device.state().answered;
        Ok(Self {
            device,
            poller,
            bell,
            chain: Chain::default(),
            buffer: Vec::new(),
            pages: Pages::default(),
            limit,
            blocked_until: None,
            map: None,
            last_inflate: Instant::now(),
            statistics: None,
            sent,
            awaited: false,
            can_ask: false,
            asked_at: None,
            deflation: None,
            draining: false,
        })
    }

    /// The way to wake it.
    pub fn doorbell(&self) -> Doorbell {
        self.poller.doorbell()
    }

    /// Serves the queues, and gives something back. `true` if there was something to do.
    fn work(&mut self, rings: &[SharedRing]) -> bool {
        let device = Arc::clone(&self.device);
        let mut ledger = device.ledger();
        self.follow_memory(rings, &mut ledger);
        let mut running = [false; QUEUES];
        for (running, ring) in running.iter_mut().zip(rings) {
            *running = ring.lock().is_running();
        }
        let features = device.state().features;
        let roles = roles(features, running);
        device.set_running(running[0]);
        let mut busy = false;
        if self.draining {
            // Nothing new, or a guest could make this last for ever.
            busy |= self.give_back(&mut ledger);
            self.draining = ledger.has_pending(Urgency::All);
        } else {
            self.forget_void_deflation(rings);
            self.can_ask = false;
            for (ring, role) in rings.iter().zip(roles) {
                busy |= self.serve(&mut ring.lock(), role, features, &mut ledger);
            }
        }
        if !running[0] && !self.draining {
            // Who comes next may be another driver, whose guest uses what the last one gave.
            ledger.suspend();
        }
        busy |= self.give_back(&mut ledger);
        if let Some(error) = ledger.take_failure() {
            device.release_failed(&error);
        }
        busy
    }

    /// Takes notice of a new memory map.
    fn follow_memory(&mut self, rings: &[SharedRing], ledger: &mut Ledger) {
        let Some(ring) = rings.first() else { return };
        let map = ring.lock().memory();
        if self.map.as_ref().is_some_and(|known| Arc::ptr_eq(known, &map)) {
            return;
        }
        let found: Vec<Region> = regions(&map)
            .filter_map(|region| {
                let file = MemoryFile::new(region.file)
                    .inspect_err(|error| warn_limited!("Guest memory cannot be examined: {error}"))
                    .ok()?;
                Some(Region { guest: region.guest_address, len: region.size, file, offset: region.offset })
            })
            .collect();
        self.map = Some(map);
        // None at all is a front end that has not yet said, or that has unplugged the device.
        if !found.is_empty() {
            ledger.set_regions(found);
            self.device.set_guest_bytes(ledger.guest_bytes());
        }
    }

    /// Serves one queue. `true` if there was something to do.
    fn serve(
        &mut self,
        ring: &mut Ring,
        role: Option<Role>,
        features: Features,
        ledger: &mut Ledger,
    ) -> bool {
        let (mut busy, mut pages) = (false, 0);
        for _ in 0..BATCH {
            if pages >= SHARE {
                break;
            }
            let Some(mut batch) = ring.batch() else { break };
            if role == Some(Role::Inflate) {
                if batch.is_fresh() {
                    self.device.driver_started(ledger);
                    self.awaited = true;
                } else {
                    ledger.confirm();
                }
            }
            // The chain that waits is void after a stop, and comes again.
            if role == Some(Role::Deflate) && self.deflation.is_some() {
                drop(batch);
                if !self.resume_deflation(ring, ledger) {
                    break;
                }
                busy = true;
                continue;
            }
            let popped = batch.pop(&mut self.chain);
            drop(batch);
            match popped {
                None => break,
                Some(Err(_)) => {
                    self.device.state().counters.malformed += 1;
                    ring.complete(self.chain.head(), 0);
                }
                Some(Ok(())) => match role {
                    Some(Role::Inflate) => self.inflate(ring, features, ledger),
                    Some(Role::Deflate) => self.deflate(ring, ledger),
                    Some(Role::Statistics) => self.keep_statistics(ring),
                    Some(Role::Reporting) => self.report(ring, features, ledger),
                    None => {
                        self.device.state().counters.malformed += 1;
                        ring.complete(self.chain.head(), 0);
                    }
                },
            }
            busy = true;
            pages += self.pages.numbers.len();
        }
        if role == Some(Role::Statistics) {
            busy |= self.ask_statistics(ring);
        }
        ring.publish();
        self.chain.clear();
        busy
    }

    /// Reads the page numbers of the chain; `false` if they make no sense.
    fn read_pages(&mut self) -> bool {
        let len = self.chain.readable_len();
        self.buffer.resize(len.min(MAX_REQUEST as u64) as usize, 0);
        len <= MAX_REQUEST as u64
            && self.chain.read(&mut self.buffer).is_ok()
            && self.pages.parse(&self.buffer).is_some()
    }

    fn inflate(&mut self, ring: &mut Ring, features: Features, ledger: &mut Ledger) {
        let is_request = self.read_pages();
        let before = ledger.ballooned_bytes();
        let (mut duplicates, mut out_of_range) = (0, 0);
        if is_request {
            for number in &self.pages.numbers {
                match ledger.inflate(*number) {
                    Noted::Changed => {}
                    Noted::Unchanged => duplicates += 1,
                    Noted::OutOfRange => out_of_range += 1,
                }
            }
            self.last_inflate = Instant::now();
            if !features.contains(Features::MUST_TELL_HOST) {
                while ledger.release(Urgency::All).is_some() {}
            }
        }
        let mut state = self.device.state();
        state.counters.inflate_requests += 1;
        state.counters.inflated_bytes += ledger.ballooned_bytes() - before;
        state.counters.duplicates += duplicates;
        state.counters.out_of_range += out_of_range;
        state.counters.malformed += u64::from(!is_request);
        drop(state);
        ring.complete(self.chain.head(), 0);
    }

    fn deflate(&mut self, ring: &mut Ring, ledger: &mut Ledger) {
        let chain = Held { head: self.chain.head(), epoch: ring.epoch() };
        let is_request = self.read_pages();
        {
            let mut state = self.device.state();
            state.counters.deflate_requests += 1;
            state.counters.malformed += u64::from(!is_request);
        }
        if !is_request {
            ring.complete(chain.head, 0);
            return;
        }
        let pages = std::mem::take(&mut self.pages);
        self.go_on_deflating(HeldDeflation { chain, pages, next: 0, retry_at: Instant::now() }, ring, ledger);
    }

    /// Lets go of a request that waits for huge pages if its queue was stopped meanwhile: it comes again.
    fn forget_void_deflation(&mut self, rings: &[SharedRing]) {
        let epoch = rings.get(DEFLATE_QUEUE).map(|ring| ring.lock().epoch());
        if self.deflation.as_ref().is_some_and(|deflation| Some(deflation.chain.epoch) != epoch) {
            self.deflation = None;
            self.device.set_held(None);
        }
    }

    /// Goes on with a request that waits for huge pages. `false` if it still does, or is not there any more.
    fn resume_deflation(&mut self, ring: &mut Ring, ledger: &mut Ledger) -> bool {
        let Some(deflation) = self.deflation.take() else { return false };
        if deflation.chain.epoch != ring.epoch() {
            self.device.set_held(None);
            return true;
        }
        if Instant::now() < deflation.retry_at {
            self.deflation = Some(deflation);
            return false;
        }
        self.go_on_deflating(deflation, ring, ledger);
        self.deflation.is_none()
    }

    fn go_on_deflating(&mut self, mut deflation: HeldDeflation, ring: &mut Ring, ledger: &mut Ledger) {
        let before = ledger.ballooned_bytes();
        let (mut duplicates, mut out_of_range) = (0, 0);
        let mut result = Ok(());
        while let Some(number) = deflation.pages.numbers.get(deflation.next) {
            match ledger.deflate(*number) {
                Ok(Noted::Changed) => {}
                Ok(Noted::Unchanged) => duplicates += 1,
                Ok(Noted::OutOfRange) => out_of_range += 1,
                Err(NoHugePage) => {
                    result = Err(NoHugePage);
                    break;
                }
            }
            deflation.next += 1;
        }
        if deflation.pages.maybe_zero && result.is_ok() {
            result = ledger.deflate(0).map(drop);
        }
        let after = ledger.ballooned_bytes();
        let mut state = self.device.state();
        state.counters.deflated_bytes += before - after;
        state.counters.duplicates += duplicates;
        state.counters.out_of_range += out_of_range;
        state.deflated(before - after, after);
        drop(state);
        if result.is_ok() {
            ring.complete(deflation.chain.head, 0);
            self.pages = deflation.pages;
            self.device.set_held(None);
        } else {
            let left = deflation.pages.numbers.len().saturating_sub(deflation.next).max(1) as u64;
            deflation.retry_at = Instant::now() + RETRY;
            self.deflation = Some(deflation);
            self.device.set_held(Some(left * PAGE));
        }
    }

    /// Takes the statistics out of the guest's buffer, and keeps that until it is asked again.
    fn keep_statistics(&mut self, ring: &mut Ring) {
        if let Some(old) = self.statistics.take()
            && old.epoch == ring.epoch()
        {
            ring.complete(old.head, 0);
        }
        self.statistics = Some(Held { head: self.chain.head(), epoch: ring.epoch() });
        // After a pause the guest's buffer is still the one from before.
        if std::mem::take(&mut self.awaited) {
            let len = self.chain.readable_len().min(MAX_REQUEST as u64) as usize;
            self.buffer.resize(len, 0);
            if self.chain.read(&mut self.buffer).is_ok() {
                self.device.take_statistics(request::statistics(&self.buffer), self.sent);
            }
        }
    }

    /// Gives the buffer back if somebody wants statistics, and it is there. `true` if it did.
    fn ask_statistics(&mut self, ring: &mut Ring) -> bool {
        let Some(buffer) = self.statistics.filter(|buffer| buffer.epoch == ring.epoch()) else {
            self.statistics = None;
            return false;
        };
        self.can_ask = ring.is_running();
        let now = Instant::now();
        let interval = self.device.statistics_interval();
        let due = interval.is_some_and(|interval| self.asked_at.is_none_or(|at| at + interval <= now));
        let wanted = self.device.wanted_statistics(self.sent);
        if !due && wanted.is_none() || !self.can_ask {
            return false;
        }
        self.can_ask = false;
        self.asked_at = Some(now);
        self.sent = wanted.unwrap_or(self.sent);
        self.awaited = true;
        self.statistics = None;
        ring.complete(buffer.head, 0);
        true
    }

    /// Gives back what the guest reports as free.
    fn report(&mut self, ring: &mut Ring, features: Features, ledger: &mut Ledger) {
        let poison = self.device.state().config.poison_val;
        // The pages must keep what the guest has filled them with, and holes are zero (virtio 1.3 text, section 5.5.6.7).
        let keep = features.contains(Features::PAGE_POISON) && poison != 0;
        let (mut reported, mut given_back) = (0, 0);
        for (address, len) in self.chain.writable_ranges() {
            reported += len;
            if !keep {
                given_back += ledger.report(address, len);
            }
        }
        let mut state = self.device.state();
        state.counters.reports += 1;
        state.counters.reported_bytes += reported;
        state.counters.reported_kept_bytes += reported - given_back;
        drop(state);
        ring.complete(self.chain.head(), 0);
    }

    /// What of the balloon may be given back now.
    fn urgency(&self) -> Urgency {
        let all = self.draining || self.last_inflate.elapsed() >= QUIET;
        if all { Urgency::All } else { Urgency::Complete }
    }

    /// Gives one block back, and those that are too many to wait: a queue stops only when none is left. `true` if there was
    /// one.
    fn give_back(&self, ledger: &mut Ledger) -> bool {
        let any = ledger.release(self.urgency()).is_some();
        while ledger.pending_blocks() > MAX_PENDING && ledger.release(Urgency::All).is_some() {}
        any
    }
}

impl Worker for BalloonWorker {
    fn pass(&mut self, rings: &[SharedRing]) -> Progress {
        self.poller.acknowledge();
        if !self.draining {
            let blocked_until = self.limit.blocked_until(Instant::now());
            if blocked_until.is_some() && self.blocked_until.is_none() {
                self.device.state().counters.throttled += 1;
                warn_limited!("The guest causes too much work with its balloon and has to wait");
            }
            self.blocked_until = blocked_until;
            if blocked_until.is_some() {
                return Progress::Idle;
            }
        }
        let start = self.limit.begin();
        let busy = self.work(rings);
        self.limit.end(start);
        if busy { Progress::Busy } else { Progress::Idle }
    }

    fn rest(&mut self, rings: &[SharedRing]) -> bool {
        let events = self.device.send_due_events();
        let at = if self.blocked_until.is_some() {
            [self.blocked_until, events].into_iter().flatten().min()
        } else {
            // What cannot be done at that time is no reason to wake up: the queue may be switched off, or broken.
            let held = self.deflation.as_ref().map(|deflation| deflation.retry_at);
            let held = held.filter(|_| rings.get(DEFLATE_QUEUE).is_some_and(|ring| ring.lock().is_running()));
            let interval = self.device.statistics_interval().filter(|_| self.can_ask);
            let statistics = interval.zip(self.asked_at).map(|(interval, at)| at + interval);
            [held, statistics, events].into_iter().flatten().min()
        };
        self.poller.arm(None, Interest { at, ..Interest::default() });
        if self.blocked_until.is_some() {
            // No kick is asked for: the guest has to wait.
            return false;
        }
        // The queue of a deflation that waits is not looked at, whatever is in it.
        let waits = |index: usize| index == DEFLATE_QUEUE && self.deflation.is_some();
        let rings = rings.iter().enumerate().filter(|(index, _)| !waits(*index));
        rings.fold(false, |more, (_, ring)| ring.lock().enable_notifications() || more)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }

    fn interrupt(&mut self) {
        self.draining = true;
        self.blocked_until = None;
    }

    fn in_flight(&self) -> usize {
        usize::from(self.blocked_until.is_some() || self.device.ledger().has_pending(Urgency::All))
    }

    fn wait(&mut self, timeout: Duration, kicks: &[Arc<OwnedFd>]) {
        if self.draining {
            return;
        }
        let now = Instant::now();
        if let Some(at) = self.blocked_until {
            // Kicks are not looked at, so that they cost nothing.
            self.bell.wait(timeout.min(at.saturating_duration_since(now)), &[]);
        } else {
            let quiet = (self.last_inflate + QUIET).saturating_duration_since(now);
            self.bell.wait(timeout.min(quiet), kicks);
        }
    }
}
