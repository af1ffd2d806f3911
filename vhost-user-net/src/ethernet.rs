//! The Ethernet header with its VLAN tags (IEEE 802.3, 802.1Q).

/// A hardware address.
pub type Mac = [u8; 6];

/// The address of all stations.
pub const BROADCAST: Mac = [0xff; 6];

/// Bytes of both addresses.
pub const ADDRESSES_LEN: usize = 12;

/// Bytes of a header without tags.
pub const HEADER_LEN: usize = 14;
/// Bytes of a VLAN tag.
pub const TAG_LEN: usize = 4;
/// Tags that are looked through: a customer's in a provider's.
pub const MAX_TAGS: usize = 2;

/// IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// A VLAN tag follows (802.1Q).
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// A VLAN tag of a provider follows (802.1ad).
pub const ETHERTYPE_QINQ: u16 = 0x88a8;

/// What a frame carries, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// What the last tag, or the header, announces.
    pub ethertype: u16,
    /// Where that begins.
    pub payload: usize,
}

/// Finds what a frame carries, behind up to [`MAX_TAGS`] VLAN tags. `None` if it ends before.
pub fn parse(frame: &[u8]) -> Option<Ethernet> {
    let mut payload = HEADER_LEN;
    let mut tags = 0;
    loop {
        let ethertype = u16::from_be_bytes(*frame.get(payload - 2..)?.first_chunk()?);
        if !matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_QINQ) || tags == MAX_TAGS {
            return Some(Ethernet { ethertype, payload });
        }
        payload += TAG_LEN;
        tags += 1;
    }
}

/// Bytes that tell where a frame belongs.
pub const START_LEN: usize = HEADER_LEN + TAG_LEN;

/// The first bytes of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Start([u8; START_LEN]);

impl Start {
    /// The beginning of a frame. `bytes` past the end of a short one are zero.
    pub fn new(bytes: [u8; START_LEN]) -> Self {
        Self(bytes)
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8; START_LEN] {
        &self.0
    }

    /// Where it goes to.
    pub fn destination(&self) -> Mac {
        std::array::from_fn(|at| self.0[at])
    }

    /// Where it comes from.
    pub fn source(&self) -> Mac {
        std::array::from_fn(|at| self.0[6 + at])
    }

    /// Whether it has a VLAN tag.
    pub fn is_tagged(&self) -> bool {
        self.0[ADDRESSES_LEN..HEADER_LEN] == ETHERTYPE_VLAN.to_be_bytes()
    }

    /// The VLAN in its tag; 0 without one, and for a tag that only has a priority.
    pub fn vlan(&self) -> u16 {
        if self.is_tagged() { u16::from_be_bytes([self.0[14], self.0[15]]) & 0xfff } else { 0 }
    }

    /// The addresses.
    pub fn addresses(&self) -> &[u8] {
        &self.0[..ADDRESSES_LEN]
    }

    /// The addresses and a tag of `vlan`.
    pub fn with_tag(&self, vlan: u16) -> [u8; ADDRESSES_LEN + TAG_LEN] {
        let mut bytes = [0; ADDRESSES_LEN + TAG_LEN];
        bytes[..ADDRESSES_LEN].copy_from_slice(self.addresses());
        bytes[ADDRESSES_LEN..HEADER_LEN].copy_from_slice(&ETHERTYPE_VLAN.to_be_bytes());
        bytes[HEADER_LEN..].copy_from_slice(&vlan.to_be_bytes());
        bytes
    }
}

/// Whether an address means several receivers.
pub fn is_group(mac: Mac) -> bool {
    mac[0] & 1 == 1
}

/// Whether an address is for the bridge at the end of the wire, and never forwarded (IEEE 802.1D, table 7-10): spanning
/// tree, flow control, link aggregation.
pub fn is_link_local(mac: Mac) -> bool {
    mac[..5] == [0x01, 0x80, 0xc2, 0, 0] && mac[5] < 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(types: &[u16]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        for ethertype in types {
            frame.extend(ethertype.to_be_bytes());
            frame.extend([0, 1]);
        }
        frame.truncate(frame.len() - 2);
        frame
    }

    #[test]
    fn tags_are_looked_through() {
        let parsed = |types: &[u16]| parse(&frame(types)).map(|e| (e.ethertype, e.payload));
        assert_eq!(parsed(&[ETHERTYPE_IPV4]), Some((ETHERTYPE_IPV4, 14)));
        assert_eq!(parsed(&[ETHERTYPE_VLAN, ETHERTYPE_IPV6]), Some((ETHERTYPE_IPV6, 18)));
        assert_eq!(parsed(&[ETHERTYPE_QINQ, ETHERTYPE_VLAN, ETHERTYPE_IPV4]), Some((ETHERTYPE_IPV4, 22)));
        assert_eq!(parsed(&[ETHERTYPE_VLAN; 3]), Some((ETHERTYPE_VLAN, 22)));
        assert_eq!(parsed(&[ETHERTYPE_VLAN]), None);
        assert_eq!(parse(&[0; 13]), None);
        assert_eq!(parse(&[]), None);
    }
}
