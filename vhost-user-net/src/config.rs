//! The configuration space (virtio 1.3 text, section 5.1.4, `struct virtio_net_config`).

use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

/// `VIRTIO_NET_S_LINK_UP`: frames can pass.
pub const STATUS_LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`: the driver is asked to tell the network where it is.
pub const STATUS_ANNOUNCE: u16 = 2;

/// `DUPLEX_FULL` of Linux.
const FULL_DUPLEX: u8 = 1;

/// The fields, little endian as the text demands.
#[derive(Clone, Copy, Debug, Default, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct NetConfig {
    /// `VIRTIO_NET_F_MAC`: the address that the driver shall use.
    pub mac: [u8; 6],
    /// `VIRTIO_NET_F_STATUS`: `STATUS_…`.
    pub status: U16,
    /// `VIRTIO_NET_F_MQ`: queue pairs.
    pub max_virtqueue_pairs: U16,
    /// `VIRTIO_NET_F_MTU`: bytes of a packet, without the Ethernet header.
    pub mtu: U16,
    /// `VIRTIO_NET_F_SPEED_DUPLEX`: Mbit/s.
    pub speed: U32,
    /// 1 for full duplex.
    pub duplex: u8,
    /// Not offered.
    pub rss_max_key_size: u8,
    /// Not offered.
    pub rss_max_indirection_table_length: U16,
    /// Not offered.
    pub supported_hash_types: U32,
}

impl NetConfig {
    /// What a driver is told.
    pub fn new(mac: [u8; 6], status: u16, queue_pairs: u16, mtu: u16, speed: u32) -> Self {
        Self {
            mac,
            status: status.into(),
            max_virtqueue_pairs: queue_pairs.into(),
            mtu: mtu.into(),
            speed: speed.into(),
            duplex: FULL_DUPLEX,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_text_says() {
        assert_eq!(size_of::<NetConfig>(), 24);
        assert_eq!(std::mem::offset_of!(NetConfig, status), 6);
        assert_eq!(std::mem::offset_of!(NetConfig, mtu), 10);
        assert_eq!(std::mem::offset_of!(NetConfig, duplex), 16);
    }
}
