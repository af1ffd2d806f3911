//! The feature bits of a network device (virtio 1.3 text, section 5.1.3), and what they say about frames.

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_NET_F_STATUS,
};

use crate::vnet::{HEADER_LEN, LEGACY_HEADER_LEN, Offloads};

/// A set of feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

/// What every network device here offers besides the ring features.
pub const ALWAYS: Features = Features(
    1 << VIRTIO_NET_F_MRG_RXBUF
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_NET_F_CTRL_VQ
        | 1 << VIRTIO_NET_F_CTRL_RX
        | 1 << VIRTIO_NET_F_CTRL_VLAN
        | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
        | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
        | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
        | 1 << VIRTIO_NET_F_SPEED_DUPLEX,
);

/// The bits by which a driver says what it can receive.
const GUEST: [(u32, Offloads); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_GUEST_ECN, Offloads::ECN),
    (VIRTIO_NET_F_GUEST_UFO, Offloads::UFO),
    (VIRTIO_NET_F_GUEST_USO4, Offloads::USO4),
    (VIRTIO_NET_F_GUEST_USO6, Offloads::USO6),
];

/// The bits by which a device says what a driver may send.
const HOST: [(u32, Offloads); 6] = [
    (VIRTIO_NET_F_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_HOST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_HOST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_HOST_ECN, Offloads::ECN),
    (VIRTIO_NET_F_HOST_UFO, Offloads::UFO),
    (VIRTIO_NET_F_HOST_USO, Offloads::USO4.union(Offloads::USO6)),
];

impl Features {
    /// Offers what the driver may send, and what it may want to receive.
    pub fn offering(send: Offloads, receive: Offloads) -> Self {
        let bits = |table: &[(u32, Offloads)], offloads: Offloads| {
            table
                .iter()
                .filter(|(_, needed)| offloads.contains(*needed))
                .fold(0, |bits, (bit, _)| bits | 1 << bit)
        };
        let control =
            if receive.contains(Offloads::CSUM) { 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS } else { 0 };
        Self(bits(&HOST, send) | bits(&GUEST, receive) | control)
    }

    /// What the driver can receive, out of what was offered. Who takes segments takes their unfinished checksums: DPDK's
    /// driver says only the first, although the second is a condition for it (section 5.1.3.1), and knows how to do both.
    pub fn receivable(self) -> Offloads {
        let mut offloads = GUEST
            .iter()
            .filter(|(bit, _)| self.has(*bit))
            .fold(Offloads::empty(), |offloads, (_, offload)| offloads | *offload);
        if !offloads.intersects(Offloads::TSO4 | Offloads::TSO6) {
            offloads.remove(Offloads::ECN);
        }
        if !offloads.is_empty() {
            offloads.insert(Offloads::CSUM);
        }
        offloads
    }

    /// The bits by which the driver says what it can receive.
    #[must_use]
    pub fn guest_bits(self) -> Self {
        Self(GUEST.iter().fold(0, |bits, (bit, _)| bits | self.0 & 1 << bit))
    }

    /// Whether the bit is set.
    pub fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 == 1
    }

    /// The driver takes frames in several chains.
    pub fn is_mergeable(self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Bytes of the header before each frame.
    pub fn header_len(self) -> usize {
        if self.has(VIRTIO_F_VERSION_1) || self.is_mergeable() { HEADER_LEN } else { LEGACY_HEADER_LEN }
    }

    /// Index of the control queue, which lies behind the last pair, or behind the first for a driver that knows of one
    /// only (section 5.1.2).
    pub fn control_queue(self, max_pairs: u16) -> Option<usize> {
        let pairs = if self.has(VIRTIO_NET_F_MQ) { max_pairs } else { 1 };
        self.has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * usize::from(pairs))
    }
}

/// The bit for an address in the configuration space.
pub const MAC: Features = Features(1 << VIRTIO_NET_F_MAC);
/// The bit for an MTU in the configuration space.
pub const MTU: Features = Features(1 << VIRTIO_NET_F_MTU);
/// The bit for more than one pair of queues.
pub const MQ: Features = Features(1 << VIRTIO_NET_F_MQ);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_receives_what_it_took() {
        let all = Features::offering(Offloads::all(), Offloads::all());
        assert_eq!(all.receivable(), Offloads::all());
        assert_eq!(
            Features(1 << VIRTIO_NET_F_GUEST_TSO4).receivable(),
            Offloads::CSUM | Offloads::TSO4,
            "as DPDK asks for it"
        );
        assert_eq!(Features(1 << VIRTIO_NET_F_GUEST_ECN).receivable(), Offloads::empty());
        assert_eq!(Features::offering(Offloads::all(), Offloads::empty()).receivable(), Offloads::empty());
        assert!(Features::offering(Offloads::CSUM, Offloads::empty()).has(VIRTIO_NET_F_CSUM));
    }

    #[test]
    fn only_what_is_received_counts_as_such() {
        let host = Features::offering(Offloads::all(), Offloads::empty());
        assert_eq!(host.guest_bits(), Features(0));
        let guest = Features(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_USO6);
        assert_eq!(Features(host.0 | guest.0).guest_bits(), guest);
    }

    #[test]
    fn the_control_queue_follows_the_pairs_that_the_driver_knows() {
        let control = Features(1 << VIRTIO_NET_F_CTRL_VQ);
        assert_eq!(control.control_queue(4), Some(2));
        assert_eq!(Features(control.0 | MQ.0).control_queue(4), Some(8));
        assert_eq!(MQ.control_queue(4), None);
    }
}
