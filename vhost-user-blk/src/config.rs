//! The configuration space (virtio 1.3 text, section 5.2.4, `struct virtio_blk_config`).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::image::{Image, SECTOR};
use crate::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};

/// Offset of the field `writeback`, the only one that a driver may write.
pub const WRITEBACK_OFFSET: usize = 32;

/// Data buffers that one request may have. Front ends choose queues of 128 descriptors or more, of which header and
/// status take one each; more would only work with indirect descriptors.
const SEG_MAX: u32 = 126;

/// The fields, little endian as the text demands.
#[derive(Clone, Copy, Debug, Default, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlkConfig {
    /// Sectors of 512 bytes.
    pub capacity: U64,
    /// Not offered.
    pub size_max: U32,
    /// `VIRTIO_BLK_F_SEG_MAX`: data buffers of a request.
    pub seg_max: U32,
    /// Not offered: cylinders, heads and sectors.
    pub geometry: [u8; 4],
    /// `VIRTIO_BLK_F_BLK_SIZE`: bytes of a logical block.
    pub blk_size: U32,
    /// `VIRTIO_BLK_F_TOPOLOGY`: logical blocks of a physical one, as a power of two.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Suggested minimum size of a transfer, in logical blocks.
    pub min_io_size: U16,
    /// Suggested size of a transfer, in logical blocks.
    pub opt_io_size: U32,
    /// `VIRTIO_BLK_F_CONFIG_WCE`: 1 if writes are durable only after a flush.
    pub writeback: u8,
    /// Reserved.
    pub unused0: u8,
    /// `VIRTIO_BLK_F_MQ`: queues.
    pub num_queues: U16,
    /// `VIRTIO_BLK_F_DISCARD`: sectors of a segment.
    pub max_discard_sectors: U32,
    /// Segments of a request.
    pub max_discard_seg: U32,
    /// Sectors that discarded ranges are best aligned to.
    pub discard_sector_alignment: U32,
    /// `VIRTIO_BLK_F_WRITE_ZEROES`: sectors of a segment.
    pub max_write_zeroes_sectors: U32,
    /// Segments of a request.
    pub max_write_zeroes_seg: U32,
    /// Zeroing may give space back.
    pub write_zeroes_may_unmap: u8,
    /// Reserved.
    pub unused1: [u8; 3],
}

impl BlkConfig {
    /// What a driver is told about `image`.
    pub fn new(image: &Image, num_queues: u16, queue_size: u16, writeback: bool) -> Self {
        let block = image.logical_block_size();
        let physical_blocks = image.physical_block_size() / block;
        let mut config = Self {
            capacity: (image.size() / SECTOR).into(),
            seg_max: SEG_MAX.min(u32::from(queue_size.saturating_sub(2))).max(1).into(),
            blk_size: block.into(),
            physical_block_exp: physical_blocks.trailing_zeros() as u8,
            min_io_size: (physical_blocks as u16).into(),
            writeback: writeback.into(),
            num_queues: num_queues.into(),
            ..Self::default()
        };
        if image.can_discard() {
            config.max_discard_sectors = MAX_SEGMENT_SECTORS.into();
            config.max_discard_seg = MAX_SEGMENTS.into();
            // Less than that frees nothing.
            config.discard_sector_alignment = (image.physical_block_size() / SECTOR as u32).into();
        }
        if !image.is_read_only() {
            config.max_write_zeroes_sectors = MAX_SEGMENT_SECTORS.into();
            config.max_write_zeroes_seg = MAX_SEGMENTS.into();
            config.write_zeroes_may_unmap = image.can_discard().into();
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_text_says() {
        assert_eq!(size_of::<BlkConfig>(), 60);
        assert_eq!(std::mem::offset_of!(BlkConfig, writeback), WRITEBACK_OFFSET);
        assert_eq!(std::mem::offset_of!(BlkConfig, max_discard_sectors), 36);
        assert_eq!(std::mem::offset_of!(BlkConfig, write_zeroes_may_unmap), 56);
    }
}
