//! The Internet checksum (RFC 1071), and frames that came without theirs.

use crate::vnet::{FLAG_NEEDS_CSUM, HeaderError, UDP_CSUM_OFFSET, VnetHeader};

/// A ones' complement sum of 16-bit words that grows piece by piece.
///
/// The pieces are what one byte string was cut into: each may have an odd length, and the next one goes on in the middle
/// of the word. The words are those of memory; the sum does not care for byte order (RFC 1071, section 2 B), and its
/// result is bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksum {
    sum: u64,
    odd: bool,
}

impl Checksum {
    /// Starts with nothing.
    pub const fn new() -> Self {
        Self { sum: 0, odd: false }
    }

    /// Adds a piece.
    pub fn add(&mut self, bytes: &[u8]) {
        let sum = fold(sum(bytes));
        self.sum += u64::from(if self.odd { sum.swap_bytes() } else { sum });
        self.odd ^= bytes.len() % 2 == 1;
    }

    /// Adds a number as its big endian bytes. Only after pieces whose length is even in sum.
    pub fn add_u16(&mut self, value: u16) {
        debug_assert!(!self.odd, "A word begins at an even offset");
        self.sum += u64::from(value.to_be());
    }

    /// The complement of the sum, as it is written into a header. A receiver that sums up everything, with this in its
    /// place, gets zero from the same function.
    pub fn finish(self) -> [u8; 2] {
        (!fold(self.sum)).to_ne_bytes()
    }

    /// [`finish`](Self::finish) with zero written as 0xffff, which is the same number to every receiver and does not
    /// mean "none" to one of UDP (RFC 768).
    pub fn finish_nonzero(self) -> [u8; 2] {
        match self.finish() {
            [0, 0] => [0xff, 0xff],
            bytes => bytes,
        }
    }
}

/// The sum of the words, neither folded nor complemented. An odd byte at the end counts as a word with a zero after it.
///
/// 32 bits at a time into independent sums of 64 bits, which the compiler turns into vector instructions. They overflow
/// after 16 GiB.
fn sum(bytes: &[u8]) -> u64 {
    const LANES: usize = 8;
    let (blocks, rest) = bytes.as_chunks::<{ LANES * 4 }>();
    let mut lanes = [0u64; LANES];
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let mut sum: u64 = lanes.iter().sum();
    let (words, rest) = rest.as_chunks::<4>();
    for word in words {
        sum += u64::from(u32::from_ne_bytes(*word));
    }
    let (words, rest) = rest.as_chunks::<2>();
    for word in words {
        sum += u64::from(u16::from_ne_bytes(*word));
    }
    if let [last] = rest {
        sum += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    sum
}

/// Brings a sum to 16 bits with end-around carry.
fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

/// Computes the checksum that a frame came without (5.1.6.2, `VIRTIO_NET_HDR_F_NEEDS_CSUM`).
///
/// The sender has put the sum of the pseudo header into the field. A frame that does not need its checksum stays as it
/// is.
pub fn complete(frame: &mut [u8], header: &VnetHeader) -> Result<(), HeaderError> {
    header.check(frame.len())?;
    if header.flags & FLAG_NEEDS_CSUM != 0 {
        let start = usize::from(header.csum_start.get());
        let offset = header.csum_offset.get();
        let field = start + usize::from(offset);
        let mut checksum = Checksum::new();
        checksum.add(&frame[start..]);
        let udp = offset == UDP_CSUM_OFFSET;
        let checksum = if udp { checksum.finish_nonzero() } else { checksum.finish() };
        frame[field..field + 2].copy_from_slice(&checksum);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vnet::TCP_CSUM_OFFSET;
    use etherparse::checksum::Sum16BitWords;
    use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    /// The same by `etherparse`.
    fn reference(bytes: &[u8]) -> [u8; 2] {
        Sum16BitWords::new().add_slice(bytes).ones_complement().to_ne_bytes()
    }

    /// The text of RFC 1071, section 4.1, word by word.
    fn naive(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for word in bytes.chunks(2) {
            sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!sum as u16).to_be_bytes()
    }

    fn checksum(bytes: &[u8]) -> [u8; 2] {
        let mut checksum = Checksum::new();
        checksum.add(bytes);
        checksum.finish()
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let mut sum = Checksum::new();
        sum.add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.finish(), (!0xddf2u16).to_be_bytes());
        assert_eq!(Checksum::new().finish(), [0xff, 0xff]);
        let mut ones = Checksum::new();
        ones.add_u16(0xffff);
        assert_eq!((ones.finish(), ones.finish_nonzero()), ([0, 0], [0xff, 0xff]));
        let large = vec![0xff; 65_535];
        assert_eq!(checksum(&large), naive(&large));
    }

    #[test]
    fn a_datagram_never_says_that_it_has_no_checksum() {
        for (offset, expected) in [(UDP_CSUM_OFFSET, 0xff), (TCP_CSUM_OFFSET, 0)] {
            let header = VnetHeader {
                flags: FLAG_NEEDS_CSUM,
                csum_start: 34.into(),
                csum_offset: offset.into(),
                ..VnetHeader::default()
            };
            // One word that makes the sum 0xffff.
            let mut frame = [0; 60];
            frame[34..36].copy_from_slice(&[0xff, 0xff]);
            complete(&mut frame, &header).unwrap();
            assert_eq!(frame[34 + usize::from(offset)..][..2], [expected; 2]);
        }
    }

    proptest! {
        #[test]
        fn equals_the_reference(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
            prop_assert_eq!(checksum(&bytes), naive(&bytes));
            prop_assert_eq!(checksum(&bytes), reference(&bytes));
        }

        #[test]
        fn does_not_depend_on_the_cuts(pieces in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..70),
            0..20,
        )) {
            let mut sum = Checksum::new();
            for piece in &pieces {
                sum.add(piece);
            }
            prop_assert_eq!(sum.finish(), checksum(&pieces.concat()));
        }

        #[test]
        fn a_completed_frame_has_the_checksum_that_etherparse_computes(
            tcp: bool,
            ipv6: bool,
            payload in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let builder = if ipv6 {
                builder.ipv6([1; 16], [2; 16], 64)
            } else {
                builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            };
            let mut expected = Vec::new();
            if tcp {
                builder.tcp(1, 2, 3, 4).write(&mut expected, &payload).unwrap();
            } else {
                builder.udp(1, 2).write(&mut expected, &payload).unwrap();
            }
            let start = if ipv6 { 54u16 } else { 34 };
            let offset = if tcp { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET };
            let header = VnetHeader {
                flags: FLAG_NEEDS_CSUM,
                csum_start: start.into(),
                csum_offset: offset.into(),
                ..VnetHeader::default()
            };
            // The pseudo header, from what is parsed.
            let sliced = SlicedPacket::from_ethernet(&expected).unwrap();
            let sum = match sliced.net.unwrap() {
                NetSlice::Ipv4(ip) => Sum16BitWords::new()
                    .add_4bytes(ip.header().source()).add_4bytes(ip.header().destination()),
                NetSlice::Ipv6(ip) => Sum16BitWords::new()
                    .add_16bytes(ip.header().source()).add_16bytes(ip.header().destination()),
                NetSlice::Arp(_) => unreachable!("an IP packet was built"),
            };
            prop_assert_eq!(matches!(sliced.transport, Some(TransportSlice::Tcp(_))), tcp);
            let len = (expected.len() - usize::from(start)) as u16;
            let sum = sum.add_2bytes([0, if tcp { 6 } else { 17 }]).add_2bytes(len.to_be_bytes());
            let mut frame = expected.clone();
            let field = usize::from(start + offset);
            frame[field..field + 2].copy_from_slice(&(!sum.ones_complement()).to_ne_bytes());
            complete(&mut frame, &header).unwrap();
            prop_assert_eq!(&frame, &expected);
        }

        #[test]
        fn any_header_is_survived(
            flags: u8, gso_type: u8, numbers: [u16; 3],
            mut frame in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let [gso_size, csum_start, csum_offset] = numbers.map(|number| (number % 256).into());
            let header = VnetHeader { flags, gso_type, gso_size, csum_start, csum_offset, ..VnetHeader::default() };
            let before = frame.clone();
            if complete(&mut frame, &header).is_err() {
                prop_assert_eq!(before, frame);
            }
        }
    }
}
