//! Ethernet frames for tests, with headers that are right.
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use etherparse::PacketBuilder;
use pcap_file::pcap::{PcapPacket, PcapReader, PcapWriter};

/// The address of every interface.
pub const BROADCAST: [u8; 6] = [0xff; 6];
/// The length of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;

/// The length of the legacy virtio-net header, which packet sockets use.
pub const HEADER_LEN: usize = 10;
/// Header `flags`: the checksum from `csum_start` on is still to be filled in at `csum_offset`.
pub const NEEDS_CSUM: u8 = 1;
/// Header `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// Header `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;

/// The fields of a virtio-net header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// [`NEEDS_CSUM`] and others.
    pub flags: u8,
    /// [`GSO_TCPV4`] and others; 0 for a frame as it goes over a wire.
    pub gso_type: u8,
    /// The length of all headers of the frame, which its segments repeat.
    pub hdr_len: u16,
    /// The payload of each segment.
    pub gso_size: u16,
    /// Where the checksummed part starts.
    pub csum_start: u16,
    /// Where in that part the checksum is.
    pub csum_offset: u16,
}

impl Header {
    /// The header's bytes, without the buffer count that only the longer form has.
    pub fn bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let fields = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (to, field) in bytes[2..].chunks_exact_mut(2).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// Reads the header's first [`HEADER_LEN`] bytes.
    pub fn parse(bytes: &[u8]) -> Self {
        let field = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: field(2),
            gso_size: field(4),
            csum_start: field(6),
            csum_offset: field(8),
        }
    }
}

/// A locally administered unicast address that ends with `number`.
pub const fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

/// A frame of a protocol that no stack knows (0x88b5, for experiments), of `len` bytes, with `number` in its first
/// eight bytes of payload.
pub fn numbered(from: [u8; 6], to: [u8; 6], number: u64, len: usize) -> Vec<u8> {
    assert!(len >= ETHERNET_LEN + 8, "{len} bytes have no place for a number");
    let mut frame = [&to[..], &from, &[0x88, 0xb5], &number.to_be_bytes()].concat();
    frame.extend((frame.len()..len).map(|at| (at as u8) ^ (number as u8)));
    frame
}

/// The number of a [`numbered`] frame whose every byte is right.
pub fn number(frame: &[u8]) -> Option<u64> {
    let addresses = frame.first_chunk::<12>()?;
    let number = u64::from_be_bytes(*frame.get(ETHERNET_LEN..)?.first_chunk()?);
    let (to, from) = (addresses.first_chunk()?, addresses.last_chunk()?);
    (frame == numbered(*from, *to, number, frame.len())).then_some(number)
}

/// A UDP packet in a frame.
pub fn udp4(
    from: [u8; 6],
    to: [u8; 6],
    addresses: [Ipv4Addr; 2],
    ports: [u16; 2],
    payload: &[u8],
) -> Vec<u8> {
    let [source, target] = addresses.map(|address| address.octets());
    let builder = PacketBuilder::ethernet2(from, to).ipv4(source, target, 64).udp(ports[0], ports[1]);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).expect("a payload that fits");
    frame
}

/// A TCP segment in a frame, of any length up to that of the largest IP packet.
pub fn tcp4(
    from: [u8; 6],
    to: [u8; 6],
    addresses: [Ipv4Addr; 2],
    ports: [u16; 2],
    payload: &[u8],
) -> Vec<u8> {
    let [source, target] = addresses.map(|address| address.octets());
    let builder =
        PacketBuilder::ethernet2(from, to).ipv4(source, target, 64).tcp(ports[0], ports[1], 1, 65_000);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.ack(1).write(&mut frame, payload).expect("a payload that fits");
    frame
}

/// A TCP segment over IPv6 in a frame.
pub fn tcp6(
    from: [u8; 6],
    to: [u8; 6],
    addresses: [Ipv6Addr; 2],
    ports: [u16; 2],
    payload: &[u8],
) -> Vec<u8> {
    let [source, target] = addresses.map(|address| address.octets());
    let builder =
        PacketBuilder::ethernet2(from, to).ipv6(source, target, 64).tcp(ports[0], ports[1], 1, 65_000);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.ack(1).write(&mut frame, payload).expect("a payload that fits");
    frame
}

/// Whether all checksums of an IP packet in a frame are right; an error for what is no TCP or UDP packet.
pub fn checksums_are_right(frame: &[u8]) -> Result<bool> {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    let packet = SlicedPacket::from_ethernet(frame).context("It is no packet")?;
    let net = packet.net.context("It is no IP packet")?;
    let transport = packet.transport.context("It has no transport header")?;
    let right = match (&net, &transport) {
        (NetSlice::Ipv4(ip), transport) => {
            let header = ip.header().to_header();
            let transport_right = match transport {
                TransportSlice::Tcp(tcp) => {
                    tcp.to_header().calc_checksum_ipv4(&header, tcp.payload())? == tcp.checksum()
                }
                TransportSlice::Udp(udp) => {
                    udp.to_header().calc_checksum_ipv4(&header, udp.payload())? == udp.checksum()
                }
                _ => anyhow::bail!("It is neither TCP nor UDP"),
            };
            header.header_checksum == header.calc_header_checksum() && transport_right
        }
        (NetSlice::Ipv6(ip), transport) => {
            let header = ip.header().to_header();
            match transport {
                TransportSlice::Tcp(tcp) => {
                    tcp.to_header().calc_checksum_ipv6(&header, tcp.payload())? == tcp.checksum()
                }
                TransportSlice::Udp(udp) => {
                    udp.to_header().calc_checksum_ipv6(&header, udp.payload())? == udp.checksum()
                }
                _ => anyhow::bail!("It is neither TCP nor UDP"),
            }
        }
        _ => anyhow::bail!("It is no IP packet"),
    };
    Ok(right)
}

/// The frame with a VLAN tag.
pub fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(12);
    [addresses, &[0x81, 0], &vlan.to_be_bytes(), rest].concat()
}

/// What a sender has to know of an IP packet to leave something undone in it.
struct Transport {
    is_v6: bool,
    is_tcp: bool,
    start: usize,
    /// Of the pseudo header.
    sum: u16,
}

fn transport(frame: &[u8]) -> Result<Transport> {
    let mut at = 12;
    while frame.get(at..at + 2) == Some(&[0x81, 0]) {
        at += 4;
    }
    let network = at + 2;
    let is_v6 = frame[at..network] == [0x86, 0xdd];
    let (start, protocol, addresses) = if is_v6 {
        (network + 40, frame[network + 6], network + 8..network + 40)
    } else {
        ensure!(frame[at..network] == [8, 0], "It is no IP packet");
        let len = usize::from(frame[network] & 15) * 4;
        (network + len, frame[network + 9], network + 12..network + 20)
    };
    ensure!(matches!(protocol, 6 | 17), "It is neither TCP nor UDP");
    let words =
        frame[addresses].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let len = (frame.len() - start) as u32;
    let mut sum = words.sum::<u32>() + u32::from(protocol) + (len & 0xffff) + (len >> 16);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    Ok(Transport { is_v6, is_tcp: protocol == 6, start, sum: sum as u16 })
}

/// Takes the checksum out of a TCP or UDP packet, as a driver does that leaves it to the device, and returns the header
/// that says so.
pub fn leave_checksum(frame: &mut [u8]) -> Result<Header> {
    let Transport { is_tcp, start, sum, .. } = transport(frame)?;
    let offset = if is_tcp { 16 } else { 6 };
    frame[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    let (csum_start, csum_offset) = (start as u16, offset as u16);
    Ok(Header { flags: NEEDS_CSUM, csum_start, csum_offset, ..Header::default() })
}

/// The same for a TCP packet that is to be cut into segments with `gso_size` bytes of payload.
pub fn leave_segmentation(frame: &mut [u8], gso_size: u16) -> Result<Header> {
    let header = leave_checksum(frame)?;
    let start = usize::from(header.csum_start);
    let gso_type = if transport(frame)?.is_v6 { GSO_TCPV6 } else { GSO_TCPV4 };
    let hdr_len = header.csum_start + u16::from(frame[start + 12] >> 4) * 4;
    Ok(Header { gso_type, hdr_len, gso_size, ..header })
}

/// The sequence number and the payload of a TCP packet in a frame whose checksums are right.
pub fn tcp_segment(frame: &[u8]) -> Result<(u32, Vec<u8>)> {
    use etherparse::{SlicedPacket, TransportSlice};
    ensure!(checksums_are_right(frame)?, "A checksum is wrong");
    let packet = SlicedPacket::from_ethernet(frame).context("It is no packet")?;
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { bail!("It is no TCP packet") };
    Ok((tcp.sequence_number(), tcp.payload().to_vec()))
}

/// Writes frames to a capture file.
pub fn write_capture(path: &Path, frames: &[Vec<u8>]) -> Result<()> {
    let file = std::fs::File::create(path).with_context(|| format!("Cannot make {}", path.display()))?;
    // The default length limit of a capture is the longest frame of any kind, so none is cut off.
    let mut writer = PcapWriter::new(file)?;
    for frame in frames {
        let length = u32::try_from(frame.len())?;
        writer.write_packet(&PcapPacket::new(std::time::Duration::ZERO, length, frame))?;
    }
    Ok(())
}

/// The frames in a capture file, as far as it is written: the length that each had, and its bytes that were kept.
pub fn read_capture(path: &Path) -> Result<Vec<(u32, Vec<u8>)>> {
    let file = std::fs::File::open(path).with_context(|| format!("Cannot open {}", path.display()))?;
    let mut reader = PcapReader::new(file)?;
    let mut frames = Vec::new();
    // An error is the end of what was flushed so far. The crate's other way to read does not take frames that were cut.
    while let Some(Ok(packet)) = reader.next_raw_packet() {
        frames.push((packet.orig_len, packet.data.into_owned()));
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_written_and_read() {
        let header = Header {
            flags: 1,
            gso_type: 4,
            hdr_len: 0x0102,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
        };
        assert_eq!(header.bytes()[..4], [1, 4, 2, 1]);
        assert_eq!(Header::parse(&header.bytes()), header);
    }

    #[test]
    fn numbered_frames_are_recognised() {
        let frame = numbered(mac(1), BROADCAST, 77, 1514);
        assert_eq!((frame.len(), number(&frame)), (1514, Some(77)));
        let mut wrong = frame.clone();
        wrong[1000] ^= 1;
        assert_eq!(number(&wrong), None);
        assert_eq!(number(&frame[..1513]), Some(77));
        assert_eq!(number(&frame[..20]), None);
    }

    #[test]
    fn checksums_are_checked() {
        let addresses = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
        let long = [Ipv6Addr::LOCALHOST, Ipv6Addr::LOCALHOST];
        for frame in [
            udp4(mac(1), mac(2), addresses, [1, 2], b"text"),
            tcp4(mac(1), mac(2), addresses, [1, 2], &vec![7; 64_000]),
            tcp6(mac(1), mac(2), long, [1, 2], b"more text"),
        ] {
            assert!(checksums_are_right(&frame).unwrap());
            let mut wrong = frame.clone();
            *wrong.last_mut().unwrap() ^= 1;
            assert!(!checksums_are_right(&wrong).unwrap());
        }
        assert!(checksums_are_right(&numbered(mac(1), mac(2), 0, 60)).is_err());
    }

    #[test]
    fn a_capture_is_read_as_it_was_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let frames = [numbered(mac(1), mac(2), 1, 60), numbered(mac(1), mac(2), 2, 1514)];
        write_capture(file.path(), &frames).unwrap();
        assert_eq!(read_capture(file.path()).unwrap(), frames.map(|frame| (frame.len() as u32, frame)));
    }

    #[test]
    fn what_is_left_undone_is_told() {
        let addresses = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
        let whole = udp4(mac(1), mac(2), addresses, [1, 2], b"text");
        let mut frame = whole.clone();
        let header = leave_checksum(&mut frame).unwrap();
        assert_eq!(header, Header { flags: NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..Header::default() });
        assert!(!checksums_are_right(&frame).unwrap());
        // What the device does.
        let sum = etherparse::checksum::Sum16BitWords::new().add_slice(&frame[34..]).ones_complement();
        frame[40..42].copy_from_slice(&sum.to_ne_bytes());
        assert_eq!(frame, whole);

        let long = [Ipv6Addr::LOCALHOST, Ipv6Addr::LOCALHOST];
        let mut frame = tagged(&tcp6(mac(1), mac(2), long, [1, 2], &[7; 3000]), 5);
        assert_eq!(tcp_segment(&frame).unwrap(), (1, vec![7; 3000]));
        let header = leave_segmentation(&mut frame, 1000).unwrap();
        assert_eq!((header.gso_type, header.gso_size, header.hdr_len), (GSO_TCPV6, 1000, 78));
        assert_eq!((header.csum_start, header.csum_offset), (58, 16));
    }
}
