//! Segmentation in software: a large frame cut into those that the sender would have sent without the offload.
//!
//! The rules are those of Linux (`tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment`): the headers are copied to
//! each segment; lengths, sequence number and IPv4 identification go on; all checksums are computed; CWR stays with the
//! first segment, FIN and PSH with the last.

use thiserror::Error;

use super::checksum::Checksum;
use crate::ethernet::{self, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use crate::vnet::{
    GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, HeaderError, TCP_CSUM_OFFSET, UDP_CSUM_OFFSET, VnetHeader,
};

/// Bytes of headers that a frame may have from Ethernet to transport. Two VLAN tags, IPv4 and TCP with all options come
/// to 142.
pub const MAX_HEADERS: usize = 256;

/// Smallest payload of a TCP segment (Linux, `TCP_MIN_SND_MSS`): no stack sends less, and a frame of 64 KiB in segments
/// of a byte would make its receiver work for a thousand.
pub const MIN_TCP_GSO_SIZE: u16 = 48;

/// Most segments of TCP in a frame: what 64 KiB give with [`MIN_TCP_GSO_SIZE`].
pub const MAX_TCP_SEGMENTS: usize = 65536 / MIN_TCP_GSO_SIZE as usize;

/// Most datagrams of UDP in a frame (Linux, `UDP_MAX_SEGMENTS`).
pub const MAX_UDP_SEGMENTS: usize = 128;

/// IPv6 extension headers that are looked through.
const MAX_EXTENSIONS: usize = 8;

const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
const TCP_HEADER_LEN: usize = 20;
const UDP_HEADER_LEN: usize = 8;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const IPV6_HOP_BY_HOP: u8 = 0;
const IPV6_ROUTING: u8 = 43;
const IPV6_DESTINATION: u8 = 60;

/// Offsets in the headers.
const IPV4_TOTAL_LEN: usize = 2;
const IPV4_ID: usize = 4;
const IPV4_CSUM: usize = 10;
const IPV6_PAYLOAD_LEN: usize = 4;
const TCP_SEQUENCE: usize = 4;
const TCP_DATA_OFFSET: usize = 12;
const TCP_FLAGS: usize = 13;
const UDP_LEN: usize = 4;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Why a frame cannot be segmented.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SegmentError {
    /// The vnet header is wrong in itself.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Nothing to segment, or fragmentation of UDP.
    #[error("GSO type {0:#x} is not segmented in software")]
    GsoType(u8),
    /// The frame ends within its headers.
    #[error("A frame to segment ends within its headers")]
    Truncated,
    /// What the frame carries is not what its GSO type says, or not where its vnet header says.
    #[error("A frame to segment does not carry what its vnet header says")]
    Mismatch,
    /// A fragment, a routing header that is still in use, an extension header that is not known, or too many headers.
    #[error("A frame to segment has IP headers that are not supported")]
    Unsupported,
    /// More segments than any sender makes.
    #[error("A frame would make too many segments of {0} bytes")]
    TooMany(u16),
    /// A segment would be larger than IP can say.
    #[error("A frame would make segments of {0} bytes, which IP cannot carry")]
    TooLarge(u16),
}

/// Where the headers of a frame are.
#[derive(Clone, Copy, Debug)]
struct Layout {
    ipv6: bool,
    tcp: bool,
    /// Offset of the IP header.
    network: usize,
    /// Offset of the TCP or UDP header.
    transport: usize,
    /// Offset of what is cut.
    payload: usize,
}

/// The segments of a frame. They do not need an offload any more: the vnet header of each is zero.
#[derive(Debug)]
pub struct Segments<'a> {
    layout: Layout,
    /// The headers of the latest segment; before the first, those of the frame.
    headers: [u8; MAX_HEADERS],
    /// Flags of TCP that only the last segment gets.
    last_flags: u8,
    /// Sum of the addresses and the protocol.
    pseudo: Checksum,
    gso_size: usize,
    /// What is still to be sent.
    payload: &'a [u8],
    /// Segments that were made.
    made: usize,
}

impl<'a> Segments<'a> {
    /// Checks whether the frame can be cut as its header asks, and prepares to do so.
    pub fn new(frame: &'a [u8], header: &VnetHeader) -> Result<Self, SegmentError> {
        header.check(frame.len())?;
        let layout = Layout::parse(frame, header)?;
        let (front, payload) = frame.split_at(layout.payload);
        let gso_size = header.gso_size.get();
        let count = payload.len().div_ceil(usize::from(gso_size));
        let too_many = if layout.tcp {
            gso_size < MIN_TCP_GSO_SIZE || count > MAX_TCP_SEGMENTS
        } else {
            count > MAX_UDP_SEGMENTS
        };
        if too_many {
            return Err(SegmentError::TooMany(gso_size));
        }
        if layout.payload - layout.network + payload.len().min(gso_size.into()) > usize::from(u16::MAX) {
            return Err(SegmentError::TooLarge(gso_size));
        }
        let mut headers = [0; MAX_HEADERS];
        headers.get_mut(..front.len()).ok_or(SegmentError::Unsupported)?.copy_from_slice(front);
        let mut last_flags = 0;
        if layout.tcp {
            let flags = &mut headers[layout.transport + TCP_FLAGS];
            last_flags = *flags & (TCP_FIN | TCP_PSH);
            *flags &= !(TCP_FIN | TCP_PSH);
        }
        let pseudo = layout.pseudo_header(frame);
        Ok(Self { layout, headers, last_flags, pseudo, gso_size: gso_size.into(), payload, made: 0 })
    }

    /// Bytes of the largest segment that is left, with its headers.
    pub fn max_len(&self) -> usize {
        self.layout.payload + self.payload.len().min(self.gso_size)
    }

    /// Number of segments that are left.
    pub fn remaining(&self) -> usize {
        // A frame without payload is one segment.
        self.payload.len().div_ceil(self.gso_size).max(usize::from(self.made == 0))
    }

    /// The next segment as its headers and its payload, which stays where it is in the frame.
    pub fn next_parts(&mut self) -> Option<(&[u8], &'a [u8])> {
        if self.remaining() == 0 {
            return None;
        }
        let (payload, rest) = self.payload.split_at(self.gso_size.min(self.payload.len()));
        self.payload = rest;
        if self.made > 0 {
            self.advance();
        }
        self.made += 1;
        if rest.is_empty() && self.layout.tcp {
            self.headers[self.layout.transport + TCP_FLAGS] |= self.last_flags;
        }
        self.finish(payload);
        Some((&self.headers[..self.layout.payload], payload))
    }

    /// Writes the next segment to the beginning of `out`, and returns its length.
    ///
    /// `None` after the last one, and if `out` has less than [`max_len`](Self::max_len) bytes, which leaves all as it is.
    pub fn next_into(&mut self, out: &mut [u8]) -> Option<usize> {
        if out.len() < self.max_len() {
            return None;
        }
        let (headers, payload) = self.next_parts()?;
        let (front, rest) = out.split_at_mut(headers.len());
        front.copy_from_slice(headers);
        rest[..payload.len()].copy_from_slice(payload);
        Some(headers.len() + payload.len())
    }

    /// Turns the headers of one segment into those of the one after it. All but the last have `gso_size` bytes.
    fn advance(&mut self) {
        let Layout { ipv6, tcp, network, transport, .. } = self.layout;
        if !ipv6 && let Some(id) = self.headers[network + IPV4_ID..].first_chunk_mut() {
            *id = u16::from_be_bytes(*id).wrapping_add(1).to_be_bytes();
        }
        if tcp {
            let header = &mut self.headers[transport..];
            if let Some(sequence) = header[TCP_SEQUENCE..].first_chunk_mut() {
                *sequence = u32::from_be_bytes(*sequence).wrapping_add(self.gso_size as u32).to_be_bytes();
            }
            header[TCP_FLAGS] &= !TCP_CWR;
        }
    }

    /// Writes the lengths and the checksums of a segment.
    fn finish(&mut self, payload: &[u8]) {
        let Layout { ipv6, tcp, network, transport, payload: end } = self.layout;
        // Below 64 KiB, as `new` found.
        let transport_len = (end - transport + payload.len()) as u16;
        let ip_len = (end - network + payload.len()) as u16;
        let (front, header) = self.headers[..end].split_at_mut(transport);
        let front = &mut front[network..];
        if ipv6 {
            put(front, IPV6_PAYLOAD_LEN, ip_len - IPV6_HEADER_LEN as u16);
        } else {
            put(front, IPV4_TOTAL_LEN, ip_len);
            put(front, IPV4_CSUM, 0);
            let mut checksum = Checksum::new();
            checksum.add(front);
            front[IPV4_CSUM..IPV4_CSUM + 2].copy_from_slice(&checksum.finish());
        }
        let field = usize::from(if tcp { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET });
        put(header, field, 0);
        if !tcp {
            put(header, UDP_LEN, transport_len);
        }
        let mut checksum = self.pseudo;
        checksum.add_u16(transport_len);
        checksum.add(header);
        checksum.add(payload);
        let checksum = if tcp { checksum.finish() } else { checksum.finish_nonzero() };
        header[field..field + 2].copy_from_slice(&checksum);
    }
}

impl Layout {
    /// Finds the headers of a frame, and sees that they are those its vnet header tells of.
    fn parse(frame: &[u8], header: &VnetHeader) -> Result<Self, SegmentError> {
        let tcp = match header.gso_type & !GSO_ECN {
            GSO_TCPV4 | GSO_TCPV6 => true,
            GSO_UDP_L4 => false,
            _ => return Err(SegmentError::GsoType(header.gso_type)),
        };
        let ethernet = ethernet::parse(frame).ok_or(SegmentError::Truncated)?;
        let network = ethernet.payload;
        let (ipv6, (protocol, len)) = match ethernet.ethertype {
            ETHERTYPE_IPV4 => (false, ipv4(&frame[network..])?),
            ETHERTYPE_IPV6 => (true, ipv6(&frame[network..])?),
            _ => return Err(SegmentError::Mismatch),
        };
        let transport = network + len;
        let expected = if tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
        // UDP has one type for both versions.
        if protocol != expected || (tcp && ipv6 != (header.gso_type & !GSO_ECN == GSO_TCPV6)) {
            return Err(SegmentError::Mismatch);
        }
        if usize::from(header.csum_start.get()) != transport {
            return Err(SegmentError::Mismatch);
        }
        let rest = &frame[transport..];
        let len = if tcp {
            usize::from(*rest.get(TCP_DATA_OFFSET).ok_or(SegmentError::Truncated)? >> 4) * 4
        } else {
            UDP_HEADER_LEN
        };
        if tcp && len < TCP_HEADER_LEN {
            return Err(SegmentError::Mismatch);
        }
        if len > rest.len() {
            return Err(SegmentError::Truncated);
        }
        Ok(Self { ipv6, tcp, network, transport, payload: transport + len })
    }

    /// Sums up what does not change from segment to segment of the pseudo header (RFC 9293 3.1, RFC 8200 8.1).
    fn pseudo_header(&self, frame: &[u8]) -> Checksum {
        let addresses = if self.ipv6 { 8..40 } else { 12..20 };
        let mut sum = Checksum::new();
        sum.add(&frame[self.network..][addresses]);
        sum.add_u16(if self.tcp { PROTOCOL_TCP } else { PROTOCOL_UDP }.into());
        sum
    }
}

/// The protocol that an IPv4 packet carries, and the length of its header.
///
/// What it says of its own length does not matter: senders of large packets do not agree on it.
fn ipv4(packet: &[u8]) -> Result<(u8, usize), SegmentError> {
    let header: &[u8; IPV4_HEADER_LEN] = packet.first_chunk().ok_or(SegmentError::Truncated)?;
    let len = usize::from(header[0] & 0xf) * 4;
    if header[0] >> 4 != 4 || len < IPV4_HEADER_LEN {
        return Err(SegmentError::Mismatch);
    }
    if len > packet.len() {
        return Err(SegmentError::Truncated);
    }
    // More fragments, or not the first one.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(SegmentError::Unsupported);
    }
    Ok((header[9], len))
}

/// The protocol that an IPv6 packet carries, and the length of its header with all extension headers.
fn ipv6(packet: &[u8]) -> Result<(u8, usize), SegmentError> {
    let header: &[u8; IPV6_HEADER_LEN] = packet.first_chunk().ok_or(SegmentError::Truncated)?;
    if header[0] >> 4 != 6 {
        return Err(SegmentError::Mismatch);
    }
    let (mut next, mut len) = (header[6], IPV6_HEADER_LEN);
    for _ in 0..=MAX_EXTENSIONS {
        if matches!(next, PROTOCOL_TCP | PROTOCOL_UDP) {
            return Ok((next, len));
        }
        let extension: &[u8; 8] =
            packet.get(len..).and_then(<[u8]>::first_chunk).ok_or(SegmentError::Truncated)?;
        match next {
            IPV6_HOP_BY_HOP | IPV6_DESTINATION => {}
            // With segments left, the address in the pseudo header is not the one in the IPv6 header.
            IPV6_ROUTING if extension[3] == 0 => {}
            _ => return Err(SegmentError::Unsupported),
        }
        next = extension[0];
        len += 8 + usize::from(extension[1]) * 8;
        if len > packet.len() {
            return Err(SegmentError::Truncated);
        }
    }
    Err(SegmentError::Unsupported)
}

/// Writes a number in network byte order.
fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests;
