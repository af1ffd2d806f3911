//! The device: features, configuration space, and the session of the guest that uses it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vhost_user_daemon::device::read_config_space;
use vhost_user_daemon::{Device, RING_FEATURES};

use crate::config::{VIRTIO_9P_MOUNT_TAG, config_space};
use crate::server::{Journal, Server, Session};
use crate::worker::NinepWorker;

/// How a server is offered.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The name by which a guest mounts the device.
    pub tag: Vec<u8>,
    /// Request queues. All of them are served by one thread and its helpers.
    pub num_queues: u16,
    /// Largest queue size, a power of two.
    pub queue_size: u16,
    /// Threads for what may wait.
    pub threads: usize,
    /// How long an idle queue is watched before its thread sleeps.
    pub poll_limit: Duration,
}

/// A 9P server as a virtio device.
pub struct Ninep {
    options: DeviceOptions,
    config: Vec<u8>,
    session: Arc<Session>,
}

impl Ninep {
    /// Offers `server` as a device, whose session is kept in `journal`.
    pub fn new(server: &Arc<Server>, options: DeviceOptions, journal: Option<Arc<Journal>>) -> Self {
        let config = config_space(&options.tag);
        Self { options, config, session: Arc::new(Session::new(server, journal)) }
    }
}

impl Device for Ninep {
    type Worker = NinepWorker;

    fn num_queues(&self) -> usize {
        self.options.num_queues.into()
    }

    fn queues_per_worker(&self) -> usize {
        // A Tflush may come by another queue than what it flushes.
        self.num_queues()
    }

    fn max_queue_size(&self) -> u16 {
        self.options.queue_size
    }

    fn poll_limit(&self) -> Duration {
        self.options.poll_limit
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 1 << VIRTIO_9P_MOUNT_TAG
    }

    fn set_features(&self, _features: u64) {}

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn write_config(&self, _offset: usize, _data: &[u8]) -> bool {
        false
    }

    /// Whoever used the device is gone, and with it its session: open files are closed and locks given up. With a state file,
    /// it may come back.
    fn reset(&self) {
        self.session.reset();
    }

    fn new_worker(self: &Arc<Self>, _index: usize) -> io::Result<NinepWorker> {
        let depth = self.num_queues() * usize::from(self.options.queue_size);
        NinepWorker::new(Arc::clone(&self.session), self.options.threads, depth)
    }
}
