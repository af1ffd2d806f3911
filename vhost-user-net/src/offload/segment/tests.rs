//! Each segment is compared with the one that `etherparse` writes from the fields that it must have.

use etherparse::{
    Ethernet2Header, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options, Ipv6Extensions,
    Ipv6Header, Ipv6RawExtHeader, Ipv6RoutingExtensions, SingleVlanHeader, TcpHeader, TransportHeader,
    UdpHeader, VlanId, ether_type,
};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::vnet::FLAG_NEEDS_CSUM;

/// A frame before it has its lengths and checksums.
#[derive(Clone, Debug)]
struct Frame {
    tags: usize,
    ip: IpHeaders,
    transport: TransportHeader,
}

impl Frame {
    /// Offset of the transport header.
    fn transport_offset(&self) -> usize {
        14 + 4 * self.tags + self.ip.header_len()
    }

    fn write(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = self.clone();
        let number = if frame.is_tcp() { IpNumber::TCP } else { IpNumber::UDP };
        frame.ip.set_next_headers(number);
        // etherparse 0.21 returns the type of IPv4 for both from there.
        let mut ether_type = if frame.ip.ipv6().is_some() { ether_type::IPV6 } else { ether_type::IPV4 };
        frame.ip.set_payload_len(frame.transport.header_len() + payload.len()).unwrap();
        if let TransportHeader::Udp(udp) = &mut frame.transport {
            udp.length = (8 + payload.len()) as u16;
        }
        match &mut frame.ip {
            IpHeaders::Ipv4(ip, _) => {
                ip.header_checksum = ip.calc_header_checksum();
                frame.transport.update_checksum_ipv4(ip, payload).unwrap();
            }
            IpHeaders::Ipv6(ip, _) => frame.transport.update_checksum_ipv6(ip, payload).unwrap(),
        }
        let mut tags = Vec::new();
        for tag in 0..frame.tags {
            let vlan_id = VlanId::try_new(tag as u16 + 7).unwrap();
            tags.push(SingleVlanHeader { ether_type, vlan_id, ..SingleVlanHeader::default() });
            ether_type = ether_type::VLAN_TAGGED_FRAME;
        }
        let mut out = Vec::new();
        Ethernet2Header { source: [2; 6], destination: [4; 6], ether_type }.write(&mut out).unwrap();
        tags.iter().rev().for_each(|tag| tag.write(&mut out).unwrap());
        frame.ip.write(&mut out).unwrap();
        frame.transport.write(&mut out).unwrap();
        out.extend(payload);
        out
    }

    fn is_tcp(&self) -> bool {
        matches!(self.transport, TransportHeader::Tcp(_))
    }

    fn header(&self, gso_size: u16) -> VnetHeader {
        let ipv6 = matches!(self.ip, IpHeaders::Ipv6(..));
        VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type: match (self.is_tcp(), ipv6) {
                (false, _) => GSO_UDP_L4,
                (true, false) => GSO_TCPV4,
                (true, true) => GSO_TCPV6 | GSO_ECN,
            },
            gso_size: gso_size.into(),
            csum_start: (self.transport_offset() as u16).into(),
            csum_offset: if self.is_tcp() { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET }.into(),
            ..VnetHeader::default()
        }
    }

    /// The frame as a driver sends it: what is left to the device holds anything.
    fn unfinished(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = self.write(payload);
        let start = self.transport_offset();
        let field = start + usize::from(if self.is_tcp() { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET });
        frame[field..field + 2].copy_from_slice(&[0xab, 0xcd]);
        frame
    }

    /// The segment with the payload from `offset` on.
    fn segment(&self, index: usize, offset: usize, is_last: bool) -> Self {
        let mut frame = self.clone();
        if let IpHeaders::Ipv4(ip, _) = &mut frame.ip {
            ip.identification = ip.identification.wrapping_add(index as u16);
        }
        if let TransportHeader::Tcp(tcp) = &mut frame.transport {
            tcp.sequence_number = tcp.sequence_number.wrapping_add(offset as u32);
            tcp.cwr &= index == 0;
            tcp.fin &= is_last;
            tcp.psh &= is_last;
        }
        frame
    }
}

fn any_ip() -> impl Strategy<Value = IpHeaders> {
    let ipv4 = (any::<[u8; 4]>(), any::<[u8; 4]>(), any::<u16>(), 0..=10usize).prop_map(
        |(source, destination, identification, words)| {
            let mut ip =
                Ipv4Header { time_to_live: 64, source, destination, identification, ..Default::default() };
            ip.dont_fragment = true;
            ip.options = Ipv4Options::try_from(&[1; 40][..words * 4]).unwrap();
            IpHeaders::Ipv4(ip, Ipv4Extensions::default())
        },
    );
    let ipv6 = (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<[bool; 3]>()).prop_map(
        |(source, destination, [hop_by_hop, options, routing])| {
            let raw = |payload: &[u8]| Ipv6RawExtHeader::new_raw(IpNumber::TCP, payload).unwrap();
            let routing = routing.then(|| Ipv6RoutingExtensions {
                // Type 2, no segments left.
                routing: raw(&[2, 0, 0, 0, 0, 0]),
                final_destination_options: None,
            });
            let extensions = Ipv6Extensions {
                hop_by_hop_options: hop_by_hop.then(|| raw(&[1, 4, 0, 0, 0, 0])),
                destination_options: options.then(|| raw(&[0; 14])),
                routing,
                ..Default::default()
            };
            IpHeaders::Ipv6(
                Ipv6Header { hop_limit: 64, source, destination, ..Default::default() },
                extensions,
            )
        },
    );
    prop_oneof![ipv4, ipv6]
}

fn any_transport() -> impl Strategy<Value = TransportHeader> {
    let tcp = (any::<u32>(), any::<[bool; 4]>(), 0..=10usize).prop_map(
        |(sequence, [fin, psh, cwr, ece], words)| {
            let mut tcp = TcpHeader::new(1, 2, sequence, 4);
            (tcp.fin, tcp.psh, tcp.cwr, tcp.ece, tcp.ack) = (fin, psh, cwr, ece, true);
            tcp.set_options_raw(&[1; 40][..words * 4]).unwrap();
            TransportHeader::Tcp(tcp)
        },
    );
    let udp = (any::<u16>(), any::<u16>()).prop_map(|(source_port, destination_port)| {
        TransportHeader::Udp(UdpHeader { source_port, destination_port, length: 0, checksum: 0 })
    });
    prop_oneof![tcp, udp]
}

fn any_frame() -> impl Strategy<Value = Frame> {
    (0..=2usize, any_ip(), any_transport()).prop_map(|(tags, ip, transport)| Frame { tags, ip, transport })
}

fn plain(tcp: bool) -> Frame {
    let ip = Ipv4Header {
        time_to_live: 64,
        source: [10, 0, 0, 1],
        destination: [10, 0, 0, 2],
        ..Default::default()
    };
    let transport = if tcp {
        TransportHeader::Tcp(TcpHeader::new(1, 2, 3, 4))
    } else {
        TransportHeader::Udp(UdpHeader { source_port: 1, destination_port: 2, length: 0, checksum: 0 })
    };
    Frame { tags: 0, ip: IpHeaders::Ipv4(ip, Ipv4Extensions::default()), transport }
}

proptest! {
    #[test]
    fn segments_are_those_that_etherparse_writes(
        frame in any_frame(),
        gso_size in 100u16..9000,
        payload in prop::collection::vec(any::<u8>(), 0..12_000),
    ) {
        let whole = frame.unfinished(&payload);
        let mut segments = Segments::new(&whole, &frame.header(gso_size)).unwrap();
        let count = segments.remaining();
        let mut out = vec![0; segments.max_len()];
        let mut chunks: Vec<&[u8]> = payload.chunks(gso_size.into()).collect();
        if chunks.is_empty() {
            chunks.push(&[]);
        }
        prop_assert_eq!(count, chunks.len());
        for (index, chunk) in chunks.iter().enumerate() {
            let len = segments.next_into(&mut out).unwrap();
            let expected = frame.segment(index, index * usize::from(gso_size), index + 1 == count);
            prop_assert_eq!(&out[..len], expected.write(chunk));
        }
        prop_assert_eq!(segments.next_into(&mut out), None);
        prop_assert_eq!(segments.remaining(), 0);
    }

    #[test]
    fn any_change_to_a_good_frame_is_survived(
        frame in any_frame(),
        gso_size: u16,
        changes in prop::collection::vec((0usize..120, any::<u8>()), 0..4),
        cut in 0usize..3000,
        header_change in prop::option::of((0usize..10, any::<u8>())),
    ) {
        let mut whole = frame.unfinished(&[7; 2800]);
        for (at, byte) in changes {
            if let Some(place) = whole.get_mut(at) {
                *place = byte;
            }
        }
        whole.truncate(cut);
        let mut header = frame.header(gso_size);
        if let Some((at, byte)) = header_change {
            header.as_mut_bytes()[at] = byte;
        }
        check_bounds(&whole, &header);
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300), header: [u8; 12]) {
        check_bounds(&bytes, &VnetHeader::read_from_bytes(&header).unwrap());
    }
}

/// Whatever it is that gets through: it ends, and every byte is accounted for.
fn check_bounds(frame: &[u8], header: &VnetHeader) {
    if let Ok(mut segments) = Segments::new(frame, header) {
        let (mut count, mut payload_len) = (0, 0);
        let headers_len = segments.layout.payload;
        let max_len = segments.max_len();
        while let Some((headers, payload)) = segments.next_parts() {
            assert_eq!(headers.len(), headers_len);
            assert!(headers.len() + payload.len() <= max_len);
            count += 1;
            payload_len += payload.len();
        }
        assert!(count <= MAX_TCP_SEGMENTS);
        assert_eq!(headers_len + payload_len, frame.len());
    }
}

#[test]
fn the_work_for_a_frame_is_bounded() {
    let payload = vec![0; 60_000];
    let segments = |tcp: bool, gso_size| {
        let frame = plain(tcp);
        Segments::new(&frame.unfinished(&payload), &frame.header(gso_size))
            .map(|segments| segments.remaining())
    };
    assert_eq!(segments(true, 47), Err(SegmentError::TooMany(47)));
    assert_eq!(segments(true, 48), Ok(1250));
    assert_eq!(segments(false, 468), Err(SegmentError::TooMany(468)));
    assert_eq!(segments(false, 469), Ok(128));
    // More than IP can say, in one piece or in many.
    let mut large = plain(true).unfinished(&payload);
    large.resize(100_000, 0);
    let large = |gso_size| Segments::new(&large, &plain(true).header(gso_size)).map(|s| s.remaining());
    assert_eq!(large(65_534), Err(SegmentError::TooLarge(65_534)));
    assert_eq!(large(48), Err(SegmentError::TooMany(48)));
    assert_eq!(large(1448), Ok(70));
}

#[test]
fn what_is_not_supported_is_refused() {
    let frame = plain(true);
    let good = frame.unfinished(&[0; 3000]);
    let header = frame.header(1000);
    let refused = |frame: &[u8], header: &VnetHeader| Segments::new(frame, header).unwrap_err();
    let changed = |at: usize, byte: u8| {
        let mut frame = good.clone();
        frame[at] = byte;
        refused(&frame, &header)
    };
    assert_eq!(Segments::new(&good, &header).unwrap().remaining(), 3);
    // Version, header length, a fragment, protocol, data offset.
    assert_eq!(changed(14, 0x65), SegmentError::Mismatch);
    assert_eq!(changed(14, 0x44), SegmentError::Mismatch);
    assert_eq!(changed(14, 0x46), SegmentError::Mismatch);
    assert_eq!(changed(20, 0x20), SegmentError::Unsupported);
    assert_eq!(changed(21, 1), SegmentError::Unsupported);
    assert_eq!(changed(23, PROTOCOL_UDP), SegmentError::Mismatch);
    assert_eq!(changed(46, 0x40), SegmentError::Mismatch);
    assert_eq!(changed(12, 9), SegmentError::Mismatch);
    assert_eq!(refused(&good[..60], &VnetHeader { csum_start: 40.into(), ..header }), SegmentError::Mismatch);
    assert_eq!(refused(&good, &VnetHeader { gso_type: GSO_TCPV6, ..header }), SegmentError::Mismatch);
    assert_eq!(refused(&good, &VnetHeader { gso_type: 3, ..header }), SegmentError::GsoType(3));
    assert_eq!(refused(&good, &VnetHeader { gso_type: 0, ..header }), SegmentError::GsoType(0));
    let mut options = good.clone();
    options[46] = 0xf0;
    assert_eq!(refused(&options[..80], &header), SegmentError::Truncated);
    assert_eq!(
        refused(&good, &VnetHeader { flags: 0, ..header }),
        SegmentError::Header(HeaderError::GsoWithoutChecksum(GSO_TCPV4))
    );
}

#[test]
fn ipv6_headers_that_change_the_meaning_are_refused() {
    let raw = Ipv6RawExtHeader::new_raw(IpNumber::TCP, &[2, 1, 0, 0, 0, 0]).unwrap();
    let with = |extensions| {
        let ip = Ipv6Header { hop_limit: 64, ..Default::default() };
        let frame = Frame { ip: IpHeaders::Ipv6(ip, extensions), ..plain(true) };
        Segments::new(&frame.unfinished(&[0; 3000]), &frame.header(1000)).map(|segments| segments.remaining())
    };
    assert_eq!(with(Ipv6Extensions::default()), Ok(3));
    let routing = Some(Ipv6RoutingExtensions { routing: raw, final_destination_options: None });
    assert_eq!(with(Ipv6Extensions { routing, ..Default::default() }), Err(SegmentError::Unsupported));
    let fragment = Some(etherparse::Ipv6FragmentHeader {
        next_header: IpNumber::TCP,
        fragment_offset: 0.try_into().unwrap(),
        more_fragments: false,
        identification: 1,
    });
    assert_eq!(with(Ipv6Extensions { fragment, ..Default::default() }), Err(SegmentError::Unsupported));
    // More headers than are copied.
    let long = Ipv6RawExtHeader::new_raw(IpNumber::TCP, &[0; 254]).unwrap();
    let long = Ipv6Extensions { destination_options: Some(long), ..Default::default() };
    assert_eq!(with(long), Err(SegmentError::Unsupported));
}

#[test]
fn a_buffer_that_is_too_small_loses_nothing() {
    let frame = plain(true);
    let whole = frame.unfinished(&[0; 3000]);
    let mut segments = Segments::new(&whole, &frame.header(2000)).unwrap();
    let mut out = [0; 2054];
    assert_eq!(segments.next_into(&mut out[..2053]), None);
    assert_eq!(segments.remaining(), 2);
    assert_eq!(segments.next_into(&mut out), Some(2054));
    assert_eq!(segments.next_into(&mut out[..1054]), Some(1054));
    assert_eq!(segments.next_into(&mut out), None);
}
