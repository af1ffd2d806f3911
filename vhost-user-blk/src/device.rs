//! What all queues of a disk share: the image, the features, the write cache mode and the serial number.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost_user_daemon::device::read_config_space;
use vhost_user_daemon::{Device, RING_FEATURES};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use zerocopy::IntoBytes;

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
    /// Whether writes may wait for a flush to become durable. If so, the driver can choose otherwise.
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
    /// The driver was set up with another process, or migrated here, and may have switched the cache off there.
    suspected: AtomicBool,
}

impl Disk {
    /// Offers `image` as a disk.
    pub fn new(image: Image, options: DiskOptions) -> Self {
        Self {
            image: Arc::new(image),
            writeback: AtomicBool::new(options.writeback),
            flushes: AtomicBool::new(true),
            suspected: AtomicBool::new(false),
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
    /// (virtio 1.3 text, section 5.2.6.2), or it is not known to flush.
    pub fn is_write_through(&self) -> bool {
        !self.has_write_cache() || self.suspected.load(Ordering::Relaxed)
    }

    fn has_write_cache(&self) -> bool {
        self.writeback.load(Ordering::Relaxed) && self.flushes.load(Ordering::Relaxed)
    }

    /// The driver goes on with a ring that it set up before. No front end says again whether the driver has switched the
    /// cache off; if it has, it never flushes, and all it writes must be durable. Until a flush proves the contrary.
    pub fn suspect(&self) {
        self.suspected.store(true, Ordering::Relaxed);
    }

    /// The driver flushes.
    pub fn trust(&self) {
        self.suspected.store(false, Ordering::Relaxed);
    }

    fn config(&self) -> BlkConfig {
        BlkConfig::new(&self.image, self.options.num_queues, self.options.queue_size, self.has_write_cache())
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
        read_config_space(self.config().as_bytes(), offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> bool {
        let value = WRITEBACK_OFFSET.checked_sub(offset).and_then(|index| data.get(index));
        match value {
            // `--cache writethrough` is the host's decision.
            Some(value @ (0 | 1))
                if !self.image.is_read_only() && (*value == 0 || self.options.writeback) =>
            {
                self.writeback.store(*value == 1, Ordering::Relaxed);
                self.trust();
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
        self.trust();
    }

    fn new_worker(self: &Arc<Self>, _index: usize) -> io::Result<BlkWorker> {
        BlkWorker::new(Arc::clone(self), self.options.engine, self.options.queue_size)
            .map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageOptions;

    fn disk(writeback: bool) -> (Arc<Disk>, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let options = ImageOptions {
            path: file.path().to_owned(),
            read_only: false,
            direct: false,
            logical_block_size: None,
        };
        let engine = EngineChoice::Sync;
        let options_of_disk =
            DiskOptions { serial: [0; ID_BYTES], num_queues: 1, queue_size: 16, writeback, engine };
        (Arc::new(Disk::new(Image::open(&options).unwrap(), options_of_disk)), file)
    }

    fn shown(disk: &Disk) -> u8 {
        let mut field = [9];
        disk.read_config(WRITEBACK_OFFSET, &mut field);
        field[0]
    }

    #[test]
    fn a_driver_that_went_on_is_trusted_once_it_flushes() {
        let (disk, _file) = disk(true);
        assert!(!disk.is_write_through());
        disk.suspect();
        assert!(disk.is_write_through());
        assert_eq!(shown(&disk), 1, "the setting itself is what the front end compares with");
        disk.trust();
        assert!(!disk.is_write_through());
        disk.suspect();
        assert!(disk.write_config(WRITEBACK_OFFSET, &[1]), "the driver has just said that it flushes");
        assert!(!disk.is_write_through());
    }

    #[test]
    fn what_the_driver_switches_off_stays_off() {
        let (disk, _file) = disk(true);
        assert!(disk.write_config(WRITEBACK_OFFSET, &[0]));
        disk.reset();
        assert!(disk.is_write_through() && shown(&disk) == 0);
        assert!(disk.write_config(WRITEBACK_OFFSET, &[1]));
        assert!(!disk.is_write_through());
        disk.set_features(0);
        assert!(disk.is_write_through(), "a driver without FLUSH never flushes");
    }

    #[test]
    fn write_through_by_the_host_is_binding() {
        let (disk, _file) = disk(false);
        assert!(!disk.write_config(WRITEBACK_OFFSET, &[1]));
        assert!(disk.is_write_through() && shown(&disk) == 0);
    }
}
