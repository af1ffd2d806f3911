//! Joins a [`Device`] to `vhost-user-backend`: one worker thread for each queue, started, drained and stopped here.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::TRANSPORT_FEATURES;
use crate::device::{Device, Progress, Worker};
use crate::dirty::DirtyLog;
use crate::memory::SharedMemory;
use crate::ring::{Ring, SharedInflight};
use crate::vring::Vring;

/// How long one wait for requests in flight lasts before the worker looks whether it is to stop.
const WAIT_SLICE: Duration = Duration::from_millis(100);

/// The back end of one connection.
pub(crate) struct Backend<D: Device> {
    device: Arc<D>,
    memory: SharedMemory,
    log: Arc<DirtyLog>,
    inflight: SharedInflight,
    /// Set once, at the end of the connection: nothing is popped any more.
    stopped: Arc<AtomicBool>,
    queues: Vec<Mutex<Queue<D::Worker>>>,
    /// The rings that were looked at so far.
    vrings: Vec<OnceLock<Vring>>,
    exit_events: Mutex<Vec<RawFd>>,
}

/// A worker, and its ring once the ring was looked at for the first time.
struct Queue<W> {
    worker: W,
    ring: Option<Ring>,
}

impl<W: Worker> Queue<W> {
    /// Completes all that is in flight, and leaves the ring as one that another back end can take over.
    fn drain(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        loop {
            self.worker.pass(ring);
            ring.publish();
            if self.worker.in_flight() == 0 {
                ring.release();
                return;
            }
            self.worker.wait(WAIT_SLICE, None);
        }
    }
}

impl<D: Device> Backend<D> {
    /// The back end for a new connection of `device`, with a fresh worker for each queue.
    pub fn new(
        device: Arc<D>,
        memory: SharedMemory,
        log: Arc<DirtyLog>,
        inflight: SharedInflight,
    ) -> io::Result<Self> {
        device.reset();
        let queues: Vec<_> = (0..device.num_queues())
            .map(|index| Ok(Mutex::new(Queue { worker: device.new_worker(index)?, ring: None })))
            .collect::<io::Result<_>>()?;
        let vrings = (0..queues.len()).map(|_| OnceLock::new()).collect();
        Ok(Self {
            device,
            memory,
            log,
            inflight,
            stopped: Arc::default(),
            queues,
            vrings,
            exit_events: Mutex::default(),
        })
    }

    /// Pops nothing more, and completes what is in flight, however long it takes.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        for index in 0..self.queues.len() {
            self.queue(index).drain();
        }
    }

    /// The eventfds whose ownership `vhost-user-backend` dropped: it registers the raw number and never closes it.
    pub fn take_exit_events(&self) -> Vec<RawFd> {
        std::mem::take(&mut *self.exit_events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn queue(&self, index: usize) -> MutexGuard<'_, Queue<D::Worker>> {
        self.queues[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Device> VhostUserBackend for Backend<D> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.len()
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
        for index in 0..self.queues.len() {
            self.queue(index).drain();
        }
        self.device.reset();
    }

    // The event index is read from the queue itself.
    fn set_event_idx(&self, _enabled: bool) {}

    /// Rings look at the memory map whenever they pop, and requests in flight hold the one that they started with. But a
    /// worker that found its ring gone, as a region was exchanged, has to look again.
    fn update_memory(&self, _memory: SharedMemory) -> io::Result<()> {
        self.vrings.iter().filter_map(OnceLock::get).for_each(Vring::wake);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|index| 1 << index).collect()
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
        self.queue(queue as usize).drain();
        Ok(())
    }

    /// A kick, or a ring that was just started: the same work in each case. Returns when there is nothing to do and
    /// nothing in flight. Never an error, which would end the thread for good.
    fn handle_event(
        &self,
        _event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        let mut queue = self.queue(thread);
        if queue.ring.is_none()
            && let Some(vring) = vrings.first()
        {
            self.vrings[thread].get_or_init(|| vring.clone());
            queue.ring = Some(Ring::new(
                thread,
                vring.clone(),
                self.memory.clone(),
                Arc::clone(&self.log),
                Arc::clone(&self.stopped),
                Arc::clone(&self.inflight),
            ));
        }
        let Queue { worker, ring: Some(ring) } = &mut *queue else { return Ok(()) };
        ring.disable_notifications();
        loop {
            let progress = worker.pass(ring);
            ring.publish();
            let look_again = match progress {
                Progress::Busy => continue,
                Progress::Idle => ring.enable_notifications(),
                Progress::Full => false,
            };
            if !look_again {
                // At the end of the connection whoever stops the queue does the waiting.
                if worker.in_flight() == 0 || self.stopped.load(Ordering::SeqCst) {
                    return Ok(());
                }
                worker.wait(WAIT_SLICE, ring.kick().as_ref());
            }
            ring.disable_notifications();
        }
    }
}
