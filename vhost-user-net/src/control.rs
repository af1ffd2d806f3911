//! What a driver asks for through the control queue: guest bytes to a typed command.
//!
//! Virtio 1.3 text, section 5.1.6.5. Everything here is pure and total: any bytes give a command or a refusal.

use thiserror::Error;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST,
    VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
};

use crate::ethernet::Mac;

/// Bytes of class and command in front of the payload (`struct virtio_net_ctrl`).
pub const HEADER_LEN: usize = 2;

/// Bytes that a command may have, header included: enough for MAC tables of 2700 addresses, of which a filter keeps 64.
pub const MAX_LEN: usize = 16 << 10;

/// The status byte at the end of a command: done (`VIRTIO_NET_OK`).
pub const ACK_OK: u8 = 0;
/// The status byte at the end of a command: not done (`VIRTIO_NET_ERR`).
pub const ACK_ERROR: u8 = 1;

/// Number of VLANs.
pub const VLANS: u16 = 4096;

/// A command of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// Switch a receive mode on or off (5.1.6.5.1).
    RxMode {
        /// Which one.
        mode: RxMode,
        /// Whether it is to be on.
        on: bool,
    },
    /// Receive these addresses besides the own one, and forget those of before (5.1.6.5.2).
    MacTable {
        /// Addresses of stations.
        unicast: &'a [Mac],
        /// Addresses of groups.
        multicast: &'a [Mac],
    },
    /// Change the own address (5.1.6.5.2.1).
    MacAddress(Mac),
    /// Receive a VLAN, or no longer (5.1.6.5.3).
    Vlan {
        /// Its number, below [`VLANS`].
        id: u16,
        /// Whether it is to be received.
        add: bool,
    },
    /// The driver has announced itself (5.1.6.5.4).
    AnnounceAck,
    /// Use so many pairs of queues, from 1 to 32768 (5.1.6.5.5).
    Pairs(u16),
    /// Leave these undone in received frames, and nothing else: feature bits of `VIRTIO_NET_F_GUEST_…` (5.1.6.5.8).
    Offloads(u64),
}

/// What a device receives whatever its addresses (5.1.6.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxMode {
    /// Everything.
    Promisc,
    /// All multicast.
    AllMulti,
    /// All unicast.
    AllUni,
    /// No multicast.
    NoMulti,
    /// No unicast.
    NoUni,
    /// No broadcast.
    NoBcast,
}

/// Why a command is refused. The driver is told [`ACK_ERROR`] in any case.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// A command that does not exist, or is not served.
    #[error("Command {command} of class {class} is not supported")]
    Unknown {
        /// Its class.
        class: u8,
        /// Its number.
        command: u8,
    },
    /// The payload ends too early.
    #[error("The command has too few bytes")]
    Truncated,
    /// A number that is out of range.
    #[error("The command has a value that is out of range")]
    Value,
}

impl Command<'_> {
    /// The feature that the driver must have acked to use the command, as a bit number.
    pub fn feature(&self) -> u32 {
        match self {
            Self::RxMode { mode: RxMode::Promisc | RxMode::AllMulti, .. } | Self::MacTable { .. } => {
                VIRTIO_NET_F_CTRL_RX
            }
            Self::RxMode { .. } => VIRTIO_NET_F_CTRL_RX_EXTRA,
            Self::MacAddress(_) => VIRTIO_NET_F_CTRL_MAC_ADDR,
            Self::Vlan { .. } => VIRTIO_NET_F_CTRL_VLAN,
            Self::AnnounceAck => VIRTIO_NET_F_GUEST_ANNOUNCE,
            Self::Pairs(_) => VIRTIO_NET_F_MQ,
            Self::Offloads(_) => VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        }
    }
}

/// Says what the device-readable bytes of a chain ask for. Bytes behind the command are ignored.
pub fn parse(bytes: &[u8]) -> Result<Command<'_>, Refusal> {
    let [class, command, payload @ ..] = bytes else {
        return Err(Refusal::Truncated);
    };
    let unknown = Refusal::Unknown { class: *class, command: *command };
    Ok(match (u32::from(*class), u32::from(*command)) {
        (VIRTIO_NET_CTRL_RX, number) => {
            let mode = RxMode::new(number).ok_or(unknown)?;
            let ([on], _) = take(payload)?;
            Command::RxMode { mode, on: on != 0 }
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
            let (unicast, rest) = take_table(payload)?;
            let (multicast, _) = take_table(rest)?;
            Command::MacTable { unicast, multicast }
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => Command::MacAddress(take(payload)?.0),
        (VIRTIO_NET_CTRL_VLAN, number @ (VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL)) => {
            let id = u16::from_le_bytes(take(payload)?.0);
            if id >= VLANS {
                return Err(Refusal::Value);
            }
            Command::Vlan { id, add: number == VIRTIO_NET_CTRL_VLAN_ADD }
        }
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => Command::AnnounceAck,
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            let pairs = u16::from_le_bytes(take(payload)?.0);
            let allowed = VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN..=VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX;
            if !allowed.contains(&pairs.into()) {
                return Err(Refusal::Value);
            }
            Command::Pairs(pairs)
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            Command::Offloads(u64::from_le_bytes(take(payload)?.0))
        }
        _ => return Err(unknown),
    })
}

impl RxMode {
    fn new(number: u32) -> Option<Self> {
        Some(match number {
            VIRTIO_NET_CTRL_RX_PROMISC => Self::Promisc,
            VIRTIO_NET_CTRL_RX_ALLMULTI => Self::AllMulti,
            VIRTIO_NET_CTRL_RX_ALLUNI => Self::AllUni,
            VIRTIO_NET_CTRL_RX_NOMULTI => Self::NoMulti,
            VIRTIO_NET_CTRL_RX_NOUNI => Self::NoUni,
            VIRTIO_NET_CTRL_RX_NOBCAST => Self::NoBcast,
            _ => return None,
        })
    }
}

/// Takes bytes off the front.
fn take<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), Refusal> {
    bytes.split_first_chunk().map(|(chunk, rest)| (*chunk, rest)).ok_or(Refusal::Truncated)
}

/// Takes a MAC table off the front (`struct virtio_net_ctrl_mac`).
fn take_table(bytes: &[u8]) -> Result<(&[Mac], &[u8]), Refusal> {
    let (entries, rest) = take(bytes)?;
    let (addresses, _) = rest.as_chunks();
    // The count is the driver's word.
    let addresses = addresses.get(..u32::from_le_bytes(entries) as usize).ok_or(Refusal::Truncated)?;
    Ok((addresses, &rest[size_of_val(addresses)..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Mac = [2, 0, 0, 0, 0, 1];
    const B: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [1, 0, 0x5e, 0, 0, 1];

    /// A MAC table that says it has `entries`.
    fn table(entries: u32, macs: &[Mac]) -> Vec<u8> {
        [&entries.to_le_bytes(), macs.as_flattened()].concat()
    }

    #[test]
    fn each_command_is_understood() {
        let cases: [(&[u8], Command, u32); 14] = [
            (&[0, 0, 1], Command::RxMode { mode: RxMode::Promisc, on: true }, 18),
            (&[0, 1, 0], Command::RxMode { mode: RxMode::AllMulti, on: false }, 18),
            (&[0, 2, 1], Command::RxMode { mode: RxMode::AllUni, on: true }, 20),
            (&[0, 3, 1], Command::RxMode { mode: RxMode::NoMulti, on: true }, 20),
            (&[0, 4, 1], Command::RxMode { mode: RxMode::NoUni, on: true }, 20),
            (&[0, 5, 255], Command::RxMode { mode: RxMode::NoBcast, on: true }, 20),
            (&[1, 1, 2, 0, 0, 0, 0, 1], Command::MacAddress(A), 23),
            (&[2, 0, 0xff, 0x0f], Command::Vlan { id: 4095, add: true }, 19),
            (&[2, 1, 7, 0], Command::Vlan { id: 7, add: false }, 19),
            (&[3, 0], Command::AnnounceAck, 21),
            (&[4, 0, 1, 0], Command::Pairs(1), 22),
            (&[4, 0, 0, 0x80], Command::Pairs(0x8000), 22),
            (&[5, 0, 0x82, 0, 0, 0, 0, 0, 0xc0, 0], Command::Offloads(1 << 1 | 1 << 7 | 3 << 54), 2),
            // More than it takes.
            (&[2, 1, 7, 0, 9, 9], Command::Vlan { id: 7, add: false }, 19),
        ];
        for (bytes, command, feature) in cases {
            assert_eq!(parse(bytes), Ok(command));
            assert_eq!(command.feature(), feature);
        }
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let unknown = |class, command| Err(Refusal::Unknown { class, command });
        let cases: [(&[u8], Result<Command, Refusal>); 17] = [
            (&[], Err(Refusal::Truncated)),
            (&[0], Err(Refusal::Truncated)),
            (&[0, 0], Err(Refusal::Truncated)),
            (&[0, 6, 1], unknown(0, 6)),
            (&[1, 0, 0, 0, 0], Err(Refusal::Truncated)),
            (&[1, 1, 2, 0, 0, 0, 0], Err(Refusal::Truncated)),
            (&[1, 2], unknown(1, 2)),
            (&[2, 0, 0], Err(Refusal::Truncated)),
            (&[2, 0, 0, 0x10], Err(Refusal::Value)),
            (&[2, 2, 0, 0], unknown(2, 2)),
            (&[3, 1], unknown(3, 1)),
            (&[4, 0, 0, 0], Err(Refusal::Value)),
            (&[4, 0, 1, 0x80], Err(Refusal::Value)),
            // RSS.
            (&[4, 1, 0, 0], unknown(4, 1)),
            (&[5, 0, 0, 0, 0, 0, 0, 0, 0], Err(Refusal::Truncated)),
            (&[5, 1, 0, 0, 0, 0, 0, 0, 0, 0], unknown(5, 1)),
            (&[255, 255], unknown(255, 255)),
        ];
        for (bytes, refusal) in cases {
            assert_eq!(parse(bytes), refusal);
        }
    }

    #[test]
    fn mac_tables_are_as_long_as_they_say() {
        let command = |unicast: Vec<u8>, multicast: Vec<u8>| [vec![1, 0], unicast, multicast].concat();
        let good = command(table(2, &[A, B]), table(1, &[GROUP]));
        assert_eq!(parse(&good), Ok(Command::MacTable { unicast: &[A, B], multicast: &[GROUP] }));
        let empty = command(table(0, &[]), table(0, &[]));
        assert_eq!(parse(&empty), Ok(Command::MacTable { unicast: &[], multicast: &[] }));
        // The second count is what follows the first table by its count.
        let short = command(table(1, &[A]), table(1, &[GROUP, GROUP]));
        assert_eq!(parse(&short), Ok(Command::MacTable { unicast: &[A], multicast: &[GROUP] }));
        for lie in [
            command(table(3, &[A, B]), vec![]),
            command(table(u32::MAX, &[A, B]), table(0, &[])),
            command(table(0, &[]), table(1, &[])),
            command(table(0, &[]), table(u32::MAX, &[GROUP])),
            command(table(1, &[A]), vec![]),
        ] {
            assert_eq!(parse(&lie), Err(Refusal::Truncated));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer_that_is_in_bounds(
            header in prop::option::of((0u8..7, 0u8..7)),
            rest in prop::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..300),
        ) {
            let bytes: Vec<u8> = header.into_iter().flat_map(|(class, command)| [class, command]).chain(rest).collect();
            match parse(&bytes) {
                Ok(Command::MacTable { unicast, multicast }) => {
                    prop_assert!(HEADER_LEN + 8 + 6 * (unicast.len() + multicast.len()) <= bytes.len());
                }
                Ok(Command::Vlan { id, .. }) => prop_assert!(id < VLANS),
                Ok(Command::Pairs(pairs)) => prop_assert!((1..=0x8000).contains(&pairs)),
                Ok(_) | Err(_) => {}
            }
        }

        #[test]
        fn good_tables_are_read_whole(
            unicast in prop::collection::vec(any::<Mac>(), 0..100),
            multicast in prop::collection::vec(any::<Mac>(), 0..100),
        ) {
            let tables = [table(unicast.len() as u32, &unicast), table(multicast.len() as u32, &multicast)];
            let bytes = [vec![1, 0], tables.concat()].concat();
            prop_assert_eq!(
                parse(&bytes),
                Ok(Command::MacTable { unicast: &unicast, multicast: &multicast })
            );
            // Every cut is noticed.
            for len in 0..bytes.len() {
                prop_assert!(parse(&bytes[..len]).is_err());
            }
        }
    }
}
