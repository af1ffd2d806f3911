//! The configuration space: the name by which a guest mounts the device.
//!
//! The virtio text has no chapter for the device (it only assigns number 9); this is `struct virtio_9p_config` of Linux's
//! `virtio_9p.h`.

/// The feature bit that says that there is a configuration space, without which Linux refuses the device.
pub const VIRTIO_9P_MOUNT_TAG: u32 = 0;

/// Bytes of the longest tag.
pub const MAX_TAG: usize = 255;

/// The configuration space with this tag: its length, 16 bits, and its bytes.
pub fn config_space(tag: &[u8]) -> Vec<u8> {
    let mut config = (tag.len() as u16).to_le_bytes().to_vec();
    config.extend_from_slice(tag);
    config
}
