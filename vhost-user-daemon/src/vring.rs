//! The ring state that `vhost-user-backend` keeps for us, with the gaps of its own vring types closed.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};

use crate::memory::{SharedMemory, snapshot};

/// A virtqueue as the control plane sees it: addresses, indices, eventfds, enabled or not.
///
/// It is the crate's `VringMutex`, but
/// - the eventfds of the front end are made non-blocking, so that none of them can hold up a worker;
/// - the used index is taken from guest memory in one step with setting it: QEMU sends the addresses of a running ring
///   anew when a migration begins, and what a worker publishes in between must not be forgotten;
/// - a new call eventfd is written to at once: QEMU exchanges it after the ring was started, and what was completed
///   until then would go unnoticed;
/// - a kick that somebody else already consumed is no error, which would end the worker for good (QEMU reads the kick
///   eventfd itself when it takes a ring back, and a worker may be just about to do the same);
/// - a ring that the guest broke is remembered until it is started anew, and reported through the error eventfd.
#[derive(Clone)]
pub struct Vring {
    state: VringMutex<SharedMemory>,
    memory: SharedMemory,
    extra: Arc<Extra>,
}

#[derive(Default)]
struct Extra {
    broken: AtomicBool,
    starts: AtomicU32,
    kick: Mutex<Option<Arc<OwnedFd>>>,
    error: Mutex<Option<File>>,
}

impl Vring {
    /// Stops the ring until the front end starts it again, and tells the front end (vhost-user text,
    /// `VHOST_USER_SET_VRING_ERR`).
    pub(crate) fn set_broken(&self) {
        if !self.extra.broken.swap(true, Ordering::Relaxed)
            && let Some(error) = &*self.extra.error.lock().unwrap_or_else(PoisonError::into_inner)
        {
            // An error here means that nobody listens.
            let _ = rustix::io::write(error, &1u64.to_ne_bytes());
        }
    }

    /// The eventfd that the guest kicks, for a worker that watches it while it waits for something else.
    pub(crate) fn kick(&self) -> Option<Arc<OwnedFd>> {
        self.extra.kick.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How often the ring was started, or told where to start, so that a worker notices that it was started anew.
    pub(crate) fn starts(&self) -> u32 {
        self.extra.starts.load(Ordering::Relaxed)
    }

    /// Whether [`Vring::set_broken`] was called since the ring was started.
    pub(crate) fn is_broken(&self) -> bool {
        self.extra.broken.load(Ordering::Relaxed)
    }
}

/// Makes an eventfd (or, with User Mode Linux, a socket) of the front end non-blocking.
fn nonblocking(file: Option<File>) -> Option<File> {
    if let Some(file) = &file
        && let Ok(flags) = rustix::fs::fcntl_getfl(file)
    {
        // Fails for no kind of file that can be waited for.
        let _ = rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK);
    }
    file
}

impl<'a> VringStateGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl<'a> VringStateMutGuard<'a, SharedMemory> for Vring {
    type G = MutexGuard<'a, VringState<SharedMemory>>;
}

impl VringT<SharedMemory> for Vring {
    fn new(mem: SharedMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        let state = VringMutex::new(mem.clone(), max_queue_size)?;
        Ok(Self { state, memory: mem, extra: Arc::default() })
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<SharedMemory>> {
        self.state.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<SharedMemory>> {
        self.state.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.state.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.state.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.state.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.state.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.state.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.state.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), QueueError> {
        self.state.set_queue_info(desc_table, avail_ring, used_ring)?;
        self.extra.broken.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.state.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        // User Mode Linux does not stop a ring that its guest gives up, and starts it anew. It is not looked at until its kick
        // eventfd comes, because its memory may be used for other things by now.
        self.state.set_queue_ready(false);
        self.state.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        let mut state = self.state.get_mut();
        let queue = state.get_queue_mut();
        let memory = snapshot(&self.memory);
        // The caller has just read the same index from the same place, before it let go of the lock.
        let now = queue.used_idx(&*memory, Ordering::Acquire).map_or(idx, |now| now.0);
        queue.set_next_used(now);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.state.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.state.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.state.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        if ready {
            self.extra.broken.store(false, Ordering::Relaxed);
            self.extra.starts.fetch_add(1, Ordering::Relaxed);
        }
        self.state.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        // Out of file descriptors is the only way to fail, and costs nothing but speed.
        let copy = file.as_ref().and_then(|file| file.try_clone().ok()).map(|file| Arc::new(file.into()));
        *self.extra.kick.lock().unwrap_or_else(PoisonError::into_inner) = copy;
        self.state.set_kick(nonblocking(file));
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.state.read_kick() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(self.get_ref().is_enabled()),
            result => result,
        }
    }

    fn set_call(&self, file: Option<File>) {
        self.state.set_call(nonblocking(file));
        // Fails when the other end is full or gone; neither is a loss.
        let _ = self.state.signal_used_queue();
    }

    fn set_err(&self, file: Option<File>) {
        *self.extra.error.lock().unwrap_or_else(PoisonError::into_inner) = nonblocking(file);
    }
}
