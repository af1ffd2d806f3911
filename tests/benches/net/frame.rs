//! The frames that all loads consist of.

use std::net::Ipv4Addr;

use tests::frames::{GSO_TCPV4, HEADER_LEN, Header, NEEDS_CSUM, mac, tcp4, udp4};

/// Where they go to: the address that testpmd uses, and nobody has, so that the kernel drops them in `ip_rcv`.
pub const TARGET: [u8; 6] = mac(0);
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 18, 0, 2)];
/// Headers of Ethernet, IPv4 and UDP.
const UDP_HEADERS: usize = 42;
/// Headers of Ethernet, IPv4 and TCP.
const TCP_HEADERS: usize = 54;
/// Payload of each segment of a large frame.
pub const SEGMENT: u16 = 1448;
/// Bytes of a large frame, as in the figures of others.
pub const LARGE: usize = 64_000;

/// A frame, with its header.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The short form.
    pub header: Header,
    /// The frame.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// A UDP packet in `len` bytes, or a TCP segment if it is larger than the MTU of Ethernet.
    pub fn new(len: usize) -> Self {
        if len <= 1514 {
            let bytes = udp4(mac(9), TARGET, ADDRESSES, [9, 9], &vec![0; len - UDP_HEADERS]);
            return Self { header: Header::default(), bytes };
        }
        let header = Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: TCP_HEADERS as u16,
            gso_size: SEGMENT,
            csum_start: 34,
            csum_offset: 16,
        };
        Self { header, bytes: tcp4(mac(9), TARGET, ADDRESSES, [9, 9], &vec![0; len - TCP_HEADERS]) }
    }

    /// Whether it is one that a tap passes on whole only to those who can cut it.
    pub fn is_large(&self) -> bool {
        self.header.gso_type != 0
    }

    /// The long form of the header, and the frame.
    pub fn with_header(&self) -> Vec<u8> {
        [&self.header.bytes()[..], &[0; super::LONG_HEADER_LEN - HEADER_LEN], &self.bytes].concat()
    }
}
