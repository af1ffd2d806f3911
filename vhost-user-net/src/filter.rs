//! The receive filter that a driver programs through the control queue (virtio 1.3 text, sections 5.1.6.5.1 to
//! 5.1.6.5.3), with the order of rules that QEMU has.

use bitflags::bitflags;

use crate::control::{Command, RxMode, VLANS};
use crate::ethernet::{self, BROADCAST, ETHERTYPE_VLAN, Mac};

/// Addresses that each of the two tables holds. With more of them than that, all of the kind are received.
pub const MAX_ADDRESSES: usize = 64;

/// Bytes from the beginning of a frame that a filter looks at: up to the number in a VLAN tag.
pub const FRAME_START: usize = 16;

const VLAN_WORDS: usize = VLANS as usize / 64;

bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Modes: u8 {
        const PROMISC = 1;
        const ALL_MULTI = 1 << 1;
        const ALL_UNI = 1 << 2;
        const NO_MULTI = 1 << 3;
        const NO_UNI = 1 << 4;
        const NO_BCAST = 1 << 5;
    }
}

/// Which frames a driver wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    modes: Modes,
    mac: Mac,
    /// `None`: too many for the table.
    unicast: Option<Vec<Mac>>,
    multicast: Option<Vec<Mac>>,
    /// A bit for each VLAN that is received.
    vlans: [u64; VLAN_WORDS],
}

impl Filter {
    /// The state after a reset: everything is received until the driver says otherwise.
    ///
    /// `vlan_filter` is whether the driver acked `VIRTIO_NET_F_CTRL_VLAN`: once it leaves promiscuous mode, it then
    /// receives only the VLANs that it has added.
    pub fn new(mac: Mac, vlan_filter: bool) -> Self {
        Self {
            modes: Modes::PROMISC,
            mac,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans: [if vlan_filter { 0 } else { u64::MAX }; VLAN_WORDS],
        }
    }

    /// Does what a command asks for. `false` if it is none for a filter.
    pub fn apply(&mut self, command: &Command) -> bool {
        match *command {
            Command::RxMode { mode, on } => self.modes.set(mode.into(), on),
            Command::MacTable { unicast, multicast } => {
                self.unicast = table(unicast);
                self.multicast = table(multicast);
            }
            Command::MacAddress(mac) => self.mac = mac,
            Command::Vlan { id, add } => {
                let (word, bit) = vlan_bit(id);
                if add {
                    self.vlans[word] |= bit;
                } else {
                    self.vlans[word] &= !bit;
                }
            }
            Command::AnnounceAck | Command::Pairs(_) | Command::Offloads(_) => return false,
        }
        true
    }

    /// The own address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Changes the own address; for drivers without `VIRTIO_NET_F_CTRL_MAC_ADDR`, which write it to the configuration
    /// space.
    pub fn set_mac(&mut self, mac: Mac) {
        self.mac = mac;
    }

    /// Whether the driver wants a frame that begins so; [`FRAME_START`] bytes are enough. It gets none that is too short
    /// to have a destination.
    pub fn accepts(&self, start_of_frame: &[u8]) -> bool {
        let Some(&destination) = start_of_frame.first_chunk::<6>() else {
            return false;
        };
        if self.modes.contains(Modes::PROMISC) {
            return true;
        }
        if let Some(vlan) = vlan(start_of_frame) {
            let (word, bit) = vlan_bit(vlan);
            if self.vlans[word] & bit == 0 {
                return false;
            }
        }
        if destination == BROADCAST {
            !self.modes.contains(Modes::NO_BCAST)
        } else if ethernet::is_group(destination) {
            !self.modes.contains(Modes::NO_MULTI)
                && (self.modes.contains(Modes::ALL_MULTI) || is_in(self.multicast.as_deref(), destination))
        } else {
            !self.modes.contains(Modes::NO_UNI)
                && (self.modes.contains(Modes::ALL_UNI)
                    || destination == self.mac
                    || is_in(self.unicast.as_deref(), destination))
        }
    }
}

impl From<RxMode> for Modes {
    fn from(mode: RxMode) -> Self {
        match mode {
            RxMode::Promisc => Self::PROMISC,
            RxMode::AllMulti => Self::ALL_MULTI,
            RxMode::AllUni => Self::ALL_UNI,
            RxMode::NoMulti => Self::NO_MULTI,
            RxMode::NoUni => Self::NO_UNI,
            RxMode::NoBcast => Self::NO_BCAST,
        }
    }
}

fn table(addresses: &[Mac]) -> Option<Vec<Mac>> {
    (addresses.len() <= MAX_ADDRESSES).then(|| addresses.to_vec())
}

fn is_in(table: Option<&[Mac]>, address: Mac) -> bool {
    table.is_none_or(|table| table.contains(&address))
}

/// The VLAN that a frame is tagged with.
fn vlan(frame: &[u8]) -> Option<u16> {
    let [ethertype @ .., high, low] = *frame.get(12..)?.first_chunk::<4>()?;
    (u16::from_be_bytes(ethertype) == ETHERTYPE_VLAN).then(|| u16::from_be_bytes([high, low]) % VLANS)
}

/// Where the bit of a VLAN is.
fn vlan_bit(id: u16) -> (usize, u64) {
    let id = id % VLANS;
    (usize::from(id / 64), 1 << (id % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn untagged(destination: Mac) -> Vec<u8> {
        [&destination[..], &[2; 6], &[8, 0, 0x45, 0]].concat()
    }

    fn tagged(destination: Mac, vlan: u16) -> Vec<u8> {
        // With a priority, which does not belong to the number.
        [&destination[..], &[2; 6], &[0x81, 0], &(vlan | 0xe000).to_be_bytes()].concat()
    }

    /// A filter that is no longer promiscuous.
    fn filter(vlan_filter: bool) -> Filter {
        let mut filter = Filter::new(OWN, vlan_filter);
        assert!(filter.apply(&Command::RxMode { mode: RxMode::Promisc, on: false }));
        filter
    }

    /// Whether frames to the own address, another one, a group, and all are received.
    fn accepts(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, BROADCAST].map(|destination| filter.accepts(&untagged(destination)))
    }

    #[test]
    fn everything_is_received_at_first() {
        for vlan_filter in [false, true] {
            let filter = Filter::new(OWN, vlan_filter);
            assert_eq!(accepts(&filter), [true; 4]);
            assert!(filter.accepts(&tagged(OTHER, 5)));
        }
        assert!(!Filter::new(OWN, false).accepts(&[0; 5]));
    }

    #[test]
    fn each_mode_does_what_it_says() {
        let own = [true, false, false, true];
        assert_eq!(accepts(&filter(false)), own);
        for (mode, expected) in [
            (RxMode::Promisc, [true; 4]),
            (RxMode::AllMulti, [true, false, true, true]),
            (RxMode::AllUni, [true, true, false, true]),
            (RxMode::NoMulti, own),
            (RxMode::NoUni, [false, false, false, true]),
            (RxMode::NoBcast, [true, false, false, false]),
        ] {
            let mut filter = filter(false);
            assert!(filter.apply(&Command::RxMode { mode, on: true }));
            assert_eq!(accepts(&filter), expected, "{mode:?}");
            assert!(filter.apply(&Command::RxMode { mode, on: false }));
            assert_eq!(accepts(&filter), own, "{mode:?}");
        }
        // "None" is stronger than "all" and than the tables.
        let mut filter = filter(false);
        filter.apply(&Command::MacTable { unicast: &[OTHER], multicast: &[GROUP] });
        for mode in [RxMode::AllMulti, RxMode::AllUni, RxMode::NoMulti, RxMode::NoUni] {
            filter.apply(&Command::RxMode { mode, on: true });
        }
        assert_eq!(accepts(&filter), [false, false, false, true]);
    }

    #[test]
    fn tables_add_addresses_and_overflow_to_all() {
        let mut filter = filter(false);
        assert!(filter.apply(&Command::MacTable { unicast: &[OTHER], multicast: &[] }));
        assert_eq!(accepts(&filter), [true, true, false, true]);
        assert!(filter.apply(&Command::MacTable { unicast: &[], multicast: &[GROUP] }));
        assert_eq!(accepts(&filter), [true, false, true, true]);
        let many: Vec<Mac> = (0..=MAX_ADDRESSES as u8).map(|number| [6, 0, 0, 0, 0, number]).collect();
        filter.apply(&Command::MacTable { unicast: &many[1..], multicast: &[] });
        assert_eq!(accepts(&filter), [true, false, false, true]);
        filter.apply(&Command::MacTable { unicast: &many, multicast: &many });
        assert_eq!(accepts(&filter), [true; 4]);
        filter.apply(&Command::MacTable { unicast: &[], multicast: &[] });
        assert_eq!(accepts(&filter), [true, false, false, true]);
    }

    #[test]
    fn the_own_address_changes() {
        let mut filter = filter(false);
        assert!(filter.apply(&Command::MacAddress(OTHER)));
        assert_eq!((filter.mac(), accepts(&filter)), (OTHER, [false, true, false, true]));
        filter.set_mac(OWN);
        assert_eq!(accepts(&filter), [true, false, false, true]);
    }

    #[test]
    fn vlans_are_filtered_only_if_the_driver_can_add_them() {
        let everything = filter(false);
        let mut filter = filter(true);
        for vlan in [0, 1, 63, 64, 4095] {
            let frame = tagged(OWN, vlan);
            assert!(everything.accepts(&frame));
            assert!(!filter.accepts(&frame));
            assert!(filter.apply(&Command::Vlan { id: vlan, add: true }));
            assert!(filter.accepts(&frame));
            assert!(!filter.accepts(&tagged(OTHER, vlan)));
            assert!(filter.apply(&Command::Vlan { id: vlan, add: false }));
            assert!(!filter.accepts(&frame));
        }
        // What has no tag is in no VLAN.
        assert!(filter.accepts(&untagged(OWN)));
    }

    #[test]
    fn other_commands_are_not_its_business() {
        let mut filter = filter(false);
        for command in [Command::AnnounceAck, Command::Pairs(2), Command::Offloads(0)] {
            assert!(!filter.apply(&command));
        }
    }

    /// The function `receive_filter` of QEMU, rule by rule.
    fn qemu(filter: &Filter, frame: &[u8]) -> bool {
        let has = |mode| filter.modes.contains(mode);
        if has(Modes::PROMISC) {
            return true;
        }
        if frame[12..14] == [0x81, 0] {
            let vlan = usize::from(frame[14] & 0xf) << 8 | usize::from(frame[15]);
            if filter.vlans[vlan >> 6] & 1 << (vlan & 63) == 0 {
                return false;
            }
        }
        let is_listed =
            |table: &Option<Vec<Mac>>| table.as_ref().unwrap().iter().any(|mac| frame[..6] == *mac);
        if frame[0] & 1 != 0 {
            if frame[..6] == [0xff; 6] {
                return !has(Modes::NO_BCAST);
            } else if has(Modes::NO_MULTI) {
                return false;
            } else if has(Modes::ALL_MULTI) || filter.multicast.is_none() {
                return true;
            }
            is_listed(&filter.multicast)
        } else {
            if has(Modes::NO_UNI) {
                return false;
            } else if has(Modes::ALL_UNI) || filter.unicast.is_none() || frame[..6] == filter.mac {
                return true;
            }
            is_listed(&filter.unicast)
        }
    }

    proptest! {
        #[test]
        fn decides_as_qemu_does(
            modes in 0u8..64,
            vlan_filter: bool,
            vlans in prop::collection::vec(0..VLANS, 0..3),
            tables in any::<[[bool; 2]; 2]>(),
            overflow in 0..4usize,
        ) {
            let mut filter = Filter::new(OWN, vlan_filter);
            filter.modes = Modes::from_bits_retain(modes);
            let many = vec![[6; 6]; MAX_ADDRESSES + 1];
            let pick = |[a, b]: [bool; 2]| [a.then_some(OTHER), b.then_some(GROUP)].into_iter().flatten().collect();
            let [unicast, multicast]: [Vec<Mac>; 2] = tables.map(pick);
            filter.apply(&Command::MacTable {
                unicast: if overflow == 1 { &many } else { &unicast },
                multicast: if overflow == 2 { &many } else { &multicast },
            });
            for id in &vlans {
                filter.apply(&Command::Vlan { id: *id, add: true });
            }
            for destination in [OWN, OTHER, GROUP, BROADCAST] {
                prop_assert_eq!(filter.accepts(&untagged(destination)), qemu(&filter, &untagged(destination)));
                for vlan in vlans.iter().copied().chain([0, 7]) {
                    let frame = tagged(destination, vlan);
                    prop_assert_eq!(filter.accepts(&frame), qemu(&filter, &frame));
                }
            }
        }

        #[test]
        fn any_frame_is_survived(frame in prop::collection::vec(any::<u8>(), 0..30), promisc: bool) {
            let mut filter = Filter::new(OWN, true);
            filter.apply(&Command::RxMode { mode: RxMode::Promisc, on: promisc });
            prop_assert!(frame.len() >= 6 || !filter.accepts(&frame));
            filter.accepts(&frame);
        }
    }
}
