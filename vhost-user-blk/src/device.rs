//! What all queues of a disk share: the image, the features, the write cache mode and the serial number.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost_user_daemon::{Device, RING_FEATURES};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::config::{BlkConfig, WRITEBACK_OFFSET};
use crate::image::{EngineChoice, EngineError, Image};
use crate::request::{ID_BYTES, Limits};
use crate::worker::BlkWorker;

/// How a disk is offered.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// What GET_ID returns, padded with zeroes.
    pub serial: [u8; ID_BYTES],
    /// Queues, each with a worker of its own.
    pub num_queues: u16,
    /// Largest queue size, a power of two.
    pub queue_size: u16,
    /// Whether writes wait for a flush to become durable, until the driver chooses otherwise.
    pub writeback: bool,
    /// How I/O is done.
    pub engine: EngineChoice,
}

/// A disk.
pub struct Disk {
    image: Arc<Image>,
    options: DiskOptions,
    /// The write cache is on (`writeback` in the configuration space).
    writeback: AtomicBool,
    /// The driver took the feature FLUSH, without which it never flushes.
    flushes: AtomicBool,
}

impl Disk {
    /// Offers `image` as a disk.
    pub fn new(image: Image, options: DiskOptions) -> Self {
        Self {
            image: Arc::new(image),
            writeback: AtomicBool::new(options.writeback),
            flushes: AtomicBool::new(true),
            options,
        }
    }

    /// Fails if the chosen engine cannot be used, before a front end finds out.
    pub fn check_engine(self: &Arc<Self>) -> Result<(), EngineError> {
        BlkWorker::new(Arc::clone(self), self.options.engine, self.options.queue_size).map(drop)
    }

    /// The image behind the disk.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// What GET_ID returns.
    pub fn serial(&self) -> &[u8; ID_BYTES] {
        &self.options.serial
    }

    /// What requests have to keep to.
    pub fn limits(&self) -> Limits {
        Limits {
            capacity: self.image.size(),
            block_size: self.image.logical_block_size(),
            read_only: self.image.is_read_only(),
            discard: self.image.can_discard(),
        }
    }

    /// Whether a write has to be durable when it completes: the cache is off, or the driver has no means to flush it
    /// (virtio 1.3 text, section 5.2.6.2).
    pub fn is_write_through(&self) -> bool {
        !self.writeback.load(Ordering::Relaxed) || !self.flushes.load(Ordering::Relaxed)
    }

    fn config(&self) -> BlkConfig {
        BlkConfig::new(
            &self.image,
            self.options.num_queues,
            self.options.queue_size,
            !self.is_write_through(),
        )
    }
}

impl Device for Disk {
    type Worker = BlkWorker;

    fn num_queues(&self) -> usize {
        self.options.num_queues.into()
    }

    fn max_queue_size(&self) -> u16 {
        self.options.queue_size
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_MQ;
        let by_image = if self.image.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_CONFIG_WCE | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        let discard = if self.image.can_discard() { 1 << VIRTIO_BLK_F_DISCARD } else { 0 };
        RING_FEATURES | always | by_image | discard
    }

    fn set_features(&self, features: u64) {
        self.flushes.store(features & (1 << VIRTIO_BLK_F_FLUSH) != 0, Ordering::Relaxed);
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> bool {
        let value = WRITEBACK_OFFSET.checked_sub(offset).and_then(|index| data.get(index));
        match value {
            Some(value @ (0 | 1)) if !self.image.is_read_only() => {
                self.writeback.store(*value == 1, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    fn reset(&self) {
        // A cache that the driver switched off stays off: QEMU resets the device at every reboot, and does not say again
        // what it has told the driver.
        self.writeback.fetch_and(self.options.writeback, Ordering::Relaxed);
        self.flushes.store(true, Ordering::Relaxed);
    }

    fn new_worker(self: &Arc<Self>, _index: usize) -> io::Result<BlkWorker> {
        BlkWorker::new(Arc::clone(self), self.options.engine, self.options.queue_size)
            .map_err(io::Error::other)
    }
}
