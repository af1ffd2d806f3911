//! What travels in front of a frame, and what may be left undone in it: the virtio-net header (virtio 1.3 text, section
//! 5.1.6, `struct virtio_net_hdr`), which taps speak as well.

use bitflags::bitflags;
use thiserror::Error;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ethernet::{self, ETHERTYPE_IPV4, ETHERTYPE_IPV6};

/// Bytes of a header with `num_buffers`: of a driver that took VERSION_1 or MRG_RXBUF.
pub const HEADER_LEN: usize = 12;
/// Bytes of a legacy header.
pub const LEGACY_HEADER_LEN: usize = 10;

/// Checksum at `csum_start + csum_offset` is still to be computed, from `csum_start` to the end (`flags`).
pub const FLAG_NEEDS_CSUM: u8 = 1;
/// All checksums were verified (`flags`).
pub const FLAG_DATA_VALID: u8 = 2;

/// No segmentation (`gso_type`).
pub const GSO_NONE: u8 = 0;
/// TCP over IPv4, to be cut into segments of `gso_size`.
pub const GSO_TCPV4: u8 = 1;
/// A UDP datagram over IPv4 or IPv6, to be cut into IP fragments.
pub const GSO_UDP: u8 = 3;
/// TCP over IPv6, to be cut into segments of `gso_size`.
pub const GSO_TCPV6: u8 = 4;
/// UDP over IPv4 or IPv6, to be cut into datagrams with `gso_size` bytes of payload.
pub const GSO_UDP_L4: u8 = 5;
/// Bit beside the type: the TCP header has CWR set.
pub const GSO_ECN: u8 = 0x80;

/// The header. A legacy one lacks the last field.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct VnetHeader {
    /// `FLAG_…`
    pub flags: u8,
    /// `GSO_…`
    pub gso_type: u8,
    /// Bytes of all headers from the first of the frame on: a hint, not to be relied on.
    pub hdr_len: U16,
    /// Bytes of payload in each segment.
    pub gso_size: U16,
    /// Where checksumming starts, from the beginning of the frame.
    pub csum_start: U16,
    /// Where the checksum is to be put, from `csum_start`.
    pub csum_offset: U16,
    /// Chains that a received frame takes up.
    pub num_buffers: U16,
}

/// Where TCP has its checksum, from the beginning of its header.
pub const TCP_CSUM_OFFSET: u16 = 16;
/// Where UDP has its checksum, from the beginning of its header.
pub const UDP_CSUM_OFFSET: u16 = 6;

/// Bytes of a TCP header without options.
const TCP_HEADER_LEN: usize = 20;
/// Bytes of a UDP header.
const UDP_HEADER_LEN: usize = 8;

/// Why a frame cannot be what its header says.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// A `gso_type` that the text does not know, or with [`GSO_ECN`] on something else than TCP.
    #[error("GSO type {0:#x} in a vnet header is unknown")]
    GsoType(u8),
    /// Segments without payload, or larger than any frame.
    #[error("GSO size {0} in a vnet header is out of range")]
    GsoSize(u16),
    /// A frame that is to be segmented, with checksums that are not to be computed.
    #[error("GSO type {0:#x} in a vnet header comes without NEEDS_CSUM")]
    GsoWithoutChecksum(u8),
    /// The field is not where the protocol has its checksum.
    #[error("Checksum offset {offset} in a vnet header is not that of GSO type {gso_type:#x}")]
    ChecksumOffset {
        /// Type of the frame.
        gso_type: u8,
        /// What its header says.
        offset: u16,
    },
    /// The field is not in the frame.
    #[error("A vnet header puts the checksum at {start} + {offset} of a frame of {frame_len} bytes")]
    ChecksumBeyondFrame {
        /// `csum_start`
        start: u16,
        /// `csum_offset`
        offset: u16,
        /// Bytes of the frame.
        frame_len: usize,
    },
}

impl VnetHeader {
    /// Checks what a sender says about its frame of `frame_len` bytes, before anyone relies on it (5.1.6.2.1, and the
    /// rules of Linux in `virtio_net_hdr_to_skb`, so that a tap does not refuse what passed here).
    ///
    /// Unknown flags are ignored, as the text asks of a device.
    pub fn check(&self, frame_len: usize) -> Result<(), HeaderError> {
        let ecn = self.gso_type & GSO_ECN != 0;
        // The least that is there of the transport header, and where that has its checksum if it matters.
        let (transport_len, csum_offset) = match self.gso_type & !GSO_ECN {
            GSO_NONE if !ecn => (0, None),
            GSO_TCPV4 | GSO_TCPV6 => (TCP_HEADER_LEN, Some(TCP_CSUM_OFFSET)),
            GSO_UDP if !ecn => (UDP_HEADER_LEN, None),
            GSO_UDP_L4 if !ecn => (UDP_HEADER_LEN, Some(UDP_CSUM_OFFSET)),
            _ => return Err(HeaderError::GsoType(self.gso_type)),
        };
        // Linux refuses 0xffff too, which has a meaning of its own there (GSO_BY_FRAGS).
        if self.gso_type != GSO_NONE && matches!(self.gso_size.get(), 0 | u16::MAX) {
            return Err(HeaderError::GsoSize(self.gso_size.get()));
        }
        let (start, offset) = (self.csum_start.get(), self.csum_offset.get());
        if self.flags & FLAG_NEEDS_CSUM == 0 {
            // Fragments share the checksum of their datagram, which may be there already.
            return if csum_offset.is_some() {
                Err(HeaderError::GsoWithoutChecksum(self.gso_type))
            } else {
                Ok(())
            };
        }
        if csum_offset.is_some_and(|expected| expected != offset) {
            return Err(HeaderError::ChecksumOffset { gso_type: self.gso_type, offset });
        }
        if usize::from(start) + transport_len.max(usize::from(offset) + 2) > frame_len {
            return Err(HeaderError::ChecksumBeyondFrame { start, offset, frame_len });
        }
        Ok(())
    }

    /// What a receiver must have acked to be given the frame as it is.
    ///
    /// `start_of_frame` reaches as far as the EtherType behind the VLAN tags; it is looked at for UDP segmentation only,
    /// whose header leaves open which version of IP it is.
    pub fn needs(&self, start_of_frame: &[u8]) -> Offloads {
        let mut needs = Offloads::empty();
        needs.set(Offloads::CSUM, self.flags & FLAG_NEEDS_CSUM != 0);
        needs.set(Offloads::ECN, self.gso_type & GSO_ECN != 0);
        needs |= match self.gso_type & !GSO_ECN {
            GSO_TCPV4 => Offloads::TSO4,
            GSO_TCPV6 => Offloads::TSO6,
            GSO_UDP => Offloads::UFO,
            GSO_UDP_L4 => match ethernet::parse(start_of_frame) {
                Some(ethernet) if ethernet.ethertype == ETHERTYPE_IPV4 => Offloads::USO4,
                Some(ethernet) if ethernet.ethertype == ETHERTYPE_IPV6 => Offloads::USO6,
                _ => Offloads::USO4 | Offloads::USO6,
            },
            _ => Offloads::empty(),
        };
        needs
    }
}

bitflags! {
    /// What a receiver of frames does itself, so that a sender may leave it undone.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Checksums of TCP and UDP.
        const CSUM = 1;
        /// Segmentation of TCP over IPv4.
        const TSO4 = 1 << 1;
        /// Segmentation of TCP over IPv6.
        const TSO6 = 1 << 2;
        /// Segmentation of TCP with CWR set.
        const ECN = 1 << 3;
        /// Fragmentation of UDP.
        const UFO = 1 << 4;
        /// Segmentation of UDP over IPv4.
        const USO4 = 1 << 5;
        /// Segmentation of UDP over IPv6.
        const USO6 = 1 << 6;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tso(gso_type: u8) -> VnetHeader {
        VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type,
            hdr_len: 54.into(),
            gso_size: 1448.into(),
            csum_start: 34.into(),
            csum_offset: TCP_CSUM_OFFSET.into(),
            num_buffers: 0.into(),
        }
    }

    #[test]
    fn what_drivers_send_is_accepted() {
        assert_eq!(VnetHeader::default().check(60), Ok(()));
        assert_eq!(tso(GSO_TCPV4).check(54), Ok(()));
        assert_eq!(tso(GSO_TCPV6 | GSO_ECN).check(9000), Ok(()));
        let udp = VnetHeader { csum_offset: UDP_CSUM_OFFSET.into(), ..tso(GSO_UDP_L4) };
        assert_eq!(udp.check(42), Ok(()));
        assert_eq!(VnetHeader { flags: 0, ..tso(GSO_UDP) }.check(9000), Ok(()));
        // Nothing is said about what a checksum that is not asked for must look like.
        assert_eq!(VnetHeader { flags: 0xfe, gso_type: 0, ..tso(0) }.check(0), Ok(()));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for gso_type in [2, 6, 0x7f, GSO_ECN, GSO_UDP | GSO_ECN, GSO_UDP_L4 | GSO_ECN] {
            assert_eq!(tso(gso_type).check(9000), Err(HeaderError::GsoType(gso_type)));
        }
        for gso_size in [0, 0xffff] {
            let header = VnetHeader { gso_size: gso_size.into(), ..tso(GSO_TCPV4) };
            assert_eq!(header.check(9000), Err(HeaderError::GsoSize(gso_size)));
        }
        let header = VnetHeader { flags: FLAG_DATA_VALID, ..tso(GSO_TCPV6) };
        assert_eq!(header.check(9000), Err(HeaderError::GsoWithoutChecksum(GSO_TCPV6)));
        let header = tso(GSO_UDP_L4);
        assert_eq!(
            header.check(9000),
            Err(HeaderError::ChecksumOffset { gso_type: GSO_UDP_L4, offset: TCP_CSUM_OFFSET })
        );
        let beyond = |frame_len| Err(HeaderError::ChecksumBeyondFrame { start: 34, offset: 16, frame_len });
        assert_eq!(tso(GSO_NONE).check(51), beyond(51));
        assert_eq!(tso(GSO_NONE).check(52), Ok(()));
        assert_eq!(tso(GSO_TCPV4).check(53), beyond(53));
    }

    #[test]
    fn needs_names_each_offload() {
        let mut ipv6 = [0; 18];
        ipv6[12..].copy_from_slice(&[0x81, 0, 0, 7, 0x86, 0xdd]);
        let mut ipv4 = [0; 14];
        ipv4[12..].copy_from_slice(&[8, 0]);
        assert_eq!(VnetHeader::default().needs(&ipv4), Offloads::empty());
        assert_eq!(tso(GSO_NONE).needs(&ipv4), Offloads::CSUM);
        assert_eq!(tso(GSO_TCPV4).needs(&[]), Offloads::CSUM | Offloads::TSO4);
        assert_eq!(tso(GSO_TCPV6 | GSO_ECN).needs(&[]), Offloads::CSUM | Offloads::TSO6 | Offloads::ECN);
        assert_eq!(tso(GSO_UDP).needs(&[]), Offloads::CSUM | Offloads::UFO);
        assert_eq!(tso(GSO_UDP_L4).needs(&ipv4), Offloads::CSUM | Offloads::USO4);
        assert_eq!(tso(GSO_UDP_L4).needs(&ipv6), Offloads::CSUM | Offloads::USO6);
        assert_eq!(tso(GSO_UDP_L4).needs(&[]), Offloads::CSUM | Offloads::USO4 | Offloads::USO6);
    }

    proptest! {
        #[test]
        fn a_checked_checksum_field_is_in_the_frame(bytes: [u8; HEADER_LEN], len in 0usize..70_000) {
            let header = VnetHeader::read_from_bytes(&bytes).unwrap();
            if header.check(len).is_ok() && header.flags & FLAG_NEEDS_CSUM != 0 {
                let end = usize::from(header.csum_start.get()) + usize::from(header.csum_offset.get()) + 2;
                prop_assert!(end <= len);
            }
            header.needs(&bytes);
        }
    }
}
