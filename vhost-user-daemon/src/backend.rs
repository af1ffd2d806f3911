//! Joins a [`Device`] to `vhost-user-backend`: one thread for each worker, started, drained and stopped here.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::TRANSPORT_FEATURES;
use crate::device::{Device, Progress, Worker};
use crate::dirty::DirtyLog;
use crate::memory::SharedMemory;
use crate::ring::{Ring, SharedInflight, SharedRing};
use crate::vring::Vring;

/// How long one wait for requests in flight lasts before the worker looks whether it is to stop.
const WAIT_SLICE: Duration = Duration::from_millis(100);

/// The back end of one connection.
pub(crate) struct Backend<D: Device> {
    device: Arc<D>,
    num_queues: usize,
    queues_per_worker: usize,
    memory: SharedMemory,
    log: Arc<DirtyLog>,
    inflight: SharedInflight,
    /// Set once, at the end of the connection: nothing is popped any more.
    stopped: Arc<AtomicBool>,
    groups: Vec<Group<D::Worker>>,
    exit_events: Mutex<Vec<RawFd>>,
}

/// A worker with its queues, and how the control plane gets at it.
struct Group<W> {
    queues: Mutex<Queues<W>>,
    /// Makes the worker look at its queues again.
    nudge: EventFd,
    /// How many want the worker to let go of its queues.
    claims: AtomicUsize,
}

/// A worker, and its rings once they were looked at for the first time.
struct Queues<W> {
    worker: W,
    rings: Vec<SharedRing>,
    poll: Poll,
}

impl<W: Worker> Queues<W> {
    /// Completes all that is in flight.
    fn drain(&mut self) {
        self.worker.interrupt();
        loop {
            self.worker.pass(&self.rings);
            if self.worker.in_flight() == 0 {
                return;
            }
            self.worker.wait(WAIT_SLICE, &[]);
        }
    }
}

/// Whether looking at the rings pays: whether requests come soon after the last ones were answered.
#[derive(Debug, Default)]
struct Poll {
    limit: Duration,
    /// How often it is left out from now on.
    pause: u32,
    /// How often it was left out before the last try, which was in vain.
    last_pause: u32,
}

impl Poll {
    /// The longest pause after tries in vain.
    const MAX_PAUSE: u32 = 255;

    /// Makes `look` look, again and again, until it finds something: `true`; or until the limit.
    fn run(&mut self, mut look: impl FnMut() -> bool) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        let start = Instant::now();
        while start.elapsed() < self.limit {
            if look() {
                self.last_pause = 0;
                return true;
            }
            std::hint::spin_loop();
        }
        self.last_pause = (2 * self.last_pause + 1).min(Self::MAX_PAUSE);
        self.pause = self.last_pause;
        false
    }
}

impl<W: Worker> Group<W> {
    fn lock(&self) -> MutexGuard<'_, Queues<W>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the queues from the worker, in the middle of its work if need be, which it goes on with afterwards.
    fn claim<T>(&self, act: impl FnOnce(&mut Queues<W>) -> T) -> T {
        self.claims.fetch_add(1, Ordering::SeqCst);
        let result = act(&mut self.lock());
        self.claims.fetch_sub(1, Ordering::SeqCst);
        self.nudge();
        result
    }

    fn nudge(&self) {
        // Full means that it is nudged already.
        let _ = self.nudge.write(1);
    }
}

impl<D: Device> Backend<D> {
    /// The back end for a new connection of `device`, with fresh workers.
    pub fn new(
        device: Arc<D>,
        memory: SharedMemory,
        log: Arc<DirtyLog>,
        inflight: SharedInflight,
    ) -> io::Result<Self> {
        device.reset();
        device.connected();
        let (num_queues, queues_per_worker) = (device.num_queues(), device.queues_per_worker());
        let groups = (0..num_queues.div_ceil(queues_per_worker))
            .map(|index| {
                Ok(Group {
                    queues: Mutex::new(Queues {
                        worker: device.new_worker(index)?,
                        rings: Vec::new(),
                        poll: Poll { limit: device.poll_limit(), ..Poll::default() },
                    }),
                    nudge: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
                    claims: AtomicUsize::new(0),
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            device,
            num_queues,
            queues_per_worker,
            memory,
            log,
            inflight,
            stopped: Arc::default(),
            groups,
            exit_events: Mutex::default(),
        })
    }

    /// Watches what workers wait for besides kicks, in the threads of `daemon`.
    pub fn watch(&self, daemon: &VhostUserDaemon<Arc<Self>>) -> io::Result<()> {
        for (group, handler) in self.groups.iter().zip(daemon.get_epoll_handlers()) {
            let nudged = self.nudged();
            handler.register_listener(group.nudge.as_raw_fd(), EventSet::IN, nudged.into())?;
            if let Some(fd) = group.lock().worker.event_fd() {
                handler.register_listener(fd.as_raw_fd(), EventSet::IN, u64::from(nudged) + 1)?;
            }
        }
        Ok(())
    }

    /// The event that a worker was nudged. The crate keeps the numbers up to the number of queues for itself.
    fn nudged(&self) -> u16 {
        self.num_queues as u16 + 1
    }

    /// Makes the worker of `queue` look at it again.
    pub fn nudge(&self, queue: usize) {
        self.group(queue).nudge();
    }

    /// The front end is about to disable `queue`.
    pub fn disable(&self, queue: usize) {
        if self.device.drains_when_disabled() {
            self.group(queue).claim(|queues| {
                // In one step, or the worker could look in between, and find a queue that is gone.
                if let Some(ring) = queues.rings.get(queue % self.queues_per_worker) {
                    ring.lock().disable();
                }
                queues.drain();
            });
        }
    }

    /// Pops nothing more, and completes what is in flight, however long it takes.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        for group in &self.groups {
            group.claim(|queues| {
                queues.drain();
                queues.rings.iter().for_each(|ring| ring.lock().release());
            });
        }
    }

    /// Gives up what the front end that is gone held by the device: nobody may come after it for long.
    pub fn forget(&self) {
        self.device.disconnected();
        self.device.reset();
    }

    /// The eventfds whose ownership `vhost-user-backend` dropped: it registers the raw number and never closes it.
    pub fn take_exit_events(&self) -> Vec<RawFd> {
        std::mem::take(&mut *self.exit_events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn group(&self, queue: usize) -> &Group<D::Worker> {
        &self.groups[queue / self.queues_per_worker]
    }

    /// The rings of `vrings`, which are those of worker `index`.
    fn new_rings(&self, index: usize, vrings: &[Vring]) -> Vec<SharedRing> {
        let first = index * self.queues_per_worker;
        let ring = |(offset, vring): (usize, &Vring)| {
            SharedRing::new(Ring::new(
                first + offset,
                vring.clone(),
                self.memory.clone(),
                Arc::clone(&self.log),
                Arc::clone(&self.stopped),
                Arc::clone(&self.inflight),
                self.device.keeps_order(),
            ))
        };
        vrings.iter().enumerate().map(ring).collect()
    }
}

impl<D: Device> VhostUserBackend for Backend<D> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.num_queues
    }

    fn max_queue_size(&self) -> usize {
        self.device.max_queue_size().into()
    }

    fn features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn acked_features(&self, features: u64) {
        self.device.set_features(features & !TRANSPORT_FEATURES);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    // The rings are disabled already; what is in flight must not reach the guest after the answer.
    fn reset_device(&self) {
        self.groups.iter().for_each(|group| group.claim(Queues::drain));
        self.device.reset();
    }

    // The event index is read from the queue itself.
    fn set_event_idx(&self, _enabled: bool) {}

    /// Rings look at the memory map whenever they pop, and requests in flight hold the one that they started with. But a
    /// worker that found its ring gone, as a region was exchanged, has to look again; and one that keeps chains for later
    /// has to let go of the old map.
    fn update_memory(&self, _memory: SharedMemory) -> io::Result<()> {
        self.groups.iter().for_each(Group::nudge);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let mask = |first: usize| {
            let last = self.num_queues.min(first + self.queues_per_worker);
            (first..last).fold(0, |mask, queue| mask | 1 << queue)
        };
        (0..self.num_queues).step_by(self.queues_per_worker).map(mask).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without an exit event the thread would never end. Out of file descriptors is the only way to fail, and then
        // the crate fails as well, which needs two more for this thread.
        let (consumer, notifier) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()?;
        self.exit_events.lock().unwrap_or_else(PoisonError::into_inner).push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        // GET_VRING_BASE is answered when nothing is in flight: there is no deadline, as the answer would be wrong.
        let queue = queue as usize;
        self.group(queue).claim(|queues| {
            queues.drain();
            if let Some(ring) = queues.rings.get(queue % self.queues_per_worker) {
                ring.lock().release();
            }
        });
        Ok(())
    }

    /// A kick, a nudge, a ring that was just started: the same work in each case. Returns when there is nothing to do and
    /// nothing in flight. Never an error, which would end the thread for good.
    fn handle_event(&self, event: u16, _events: EventSet, vrings: &[Vring], thread: usize) -> io::Result<()> {
        let group = &self.groups[thread];
        if event == self.nudged() {
            // Cannot fail: nobody else reads it.
            let _ = group.nudge.read();
        }
        let mut queues = group.lock();
        if queues.rings.is_empty() {
            queues.rings = self.new_rings(thread, vrings);
        }
        let Queues { worker, rings, poll } = &mut *queues;
        let mut kicks = Vec::new();
        loop {
            if group.claims.load(Ordering::SeqCst) > 0 {
                // Nudged again by whoever claims the queues.
                return Ok(());
            }
            let look_again = match worker.pass(rings) {
                Progress::Busy => true,
                Progress::Idle => {
                    let claimed = || group.claims.load(Ordering::SeqCst) > 0;
                    worker.in_flight() == 0 && poll.run(|| claimed() || worker.pass(rings) != Progress::Idle)
                        || worker.rest(rings)
                }
                Progress::Full => false,
            };
            if look_again {
                continue;
            }
            // At the end of the connection whoever stops the queue does the waiting.
            if worker.in_flight() == 0 || self.stopped.load(Ordering::SeqCst) {
                return Ok(());
            }
            kicks.clear();
            kicks.extend(rings.iter().filter_map(|ring| ring.lock().kick()));
            worker.wait(WAIT_SLICE, &kicks);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_in_vain_becomes_rare_and_comes_back_when_it_pays() {
        let mut poll = Poll { limit: Duration::from_micros(1), ..Poll::default() };
        let mut tries = 0;
        for _ in 0..10_000 {
            let mut looked = false;
            assert!(!poll.run(|| {
                looked = true;
                false
            }));
            tries += u32::from(looked);
        }
        assert!((8..60).contains(&tries), "{tries} of 10,000");
        while !poll.run(|| true) {}
        assert!(poll.run(|| true), "it paid, so it is done at once");
        assert!(!Poll::default().run(|| true), "without a limit there is no polling");
    }
}
