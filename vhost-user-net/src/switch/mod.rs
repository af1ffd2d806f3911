//! A switch between the guests of this process, and perhaps one port to the outside.
//!
//! It has no thread of its own: whoever has a frame carries it to where it belongs. The worker of a guest that transmits
//! copies a frame from that guest's memory straight into the buffers that another guest posted, once, and notifies that
//! guest at the end of the batch. A guest without buffers loses the frame, so that it holds up nobody.
//!
//! | module | holds |
//! |---|---|
//! | `table` | which address was seen behind which port |
//! | `sender` | a port's way into the switch: learning, filtering, forwarding, flooding |
//! | `member` | a guest's port: the receive queues that others write to |
//! | `uplink` | the port to the outside: a tap or a peer |
//!
//! A thread holds the lock of one output at a time, besides the ring that it takes frames from, which nobody else wants.

mod member;
mod output;
mod sender;
mod table;
mod uplink;

use std::sync::Arc;
use std::time::Instant;

use vhost_user_daemon::error_limited;

pub use self::member::{Guest, Member};
pub use self::sender::{Burst, Sender};
pub use self::table::TableError;
pub use self::uplink::{Uplink, UplinkPort};

use self::output::Output;
use self::table::Table;
use crate::ethernet::Mac;

/// Addresses that are learned of one port: a guest with more has its frames flooded.
const QUOTA: usize = 1024;

/// VLAN of frames without a tag, on ports that belong to none.
pub const NO_VLAN: u16 = 0;

/// What a port may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortOptions {
    /// It exchanges frames only with ports that are not isolated.
    pub isolated: bool,
    /// It belongs to this VLAN, and neither sends nor gets tags: an access port. Without one, the port has all VLANs, with
    /// their tags.
    pub vlan: Option<u16>,
    /// It may send from this address only, and nobody else may.
    pub mac: Option<[u8; 6]>,
}

/// One port.
struct Port {
    options: PortOptions,
    output: Output,
}

/// The switch. Ports are numbered in the order in which they were added.
pub struct Switch {
    ports: Vec<Port>,
    table: Table,
}

/// Makes a switch.
#[derive(Default)]
pub struct SwitchBuilder {
    ports: Vec<Port>,
}

impl SwitchBuilder {
    /// Adds the port of a guest, and returns its number.
    pub fn member(&mut self, member: Arc<Member>, options: PortOptions) -> usize {
        self.add(Port { options, output: Output::Member(member) })
    }

    /// Adds the port to the outside, and returns its number.
    pub fn uplink(&mut self, uplink: Arc<Uplink>) -> usize {
        self.add(Port { options: PortOptions::default(), output: Output::Uplink(uplink) })
    }

    fn add(&mut self, port: Port) -> usize {
        self.ports.push(port);
        self.ports.len() - 1
    }

    /// The switch with all ports that were added. Fails if two of them have the same address.
    pub fn build(self) -> Result<Arc<Switch>, TableError> {
        let table = Table::new(QUOTA * self.ports.len(), Instant::now());
        let switch = Switch { ports: self.ports, table };
        for port in 0..switch.ports.len() {
            switch.open(port)?;
        }
        Ok(Arc::new(switch))
    }
}

impl Switch {
    /// Forgets what was learned about a port: its guest has left.
    fn forget(&self, port: usize) {
        self.table.close(port as u16);
        if let Err(error) = self.open(port) {
            error_limited!("A port of the switch cannot be opened again: {error}");
        }
    }

    fn open(&self, port: usize) -> Result<(), TableError> {
        let number = port as u16;
        self.table.open(number, QUOTA)?;
        let PortOptions { mac, vlan, .. } = self.ports[port].options;
        mac.map_or(Ok(()), |mac| self.table.pin(number, vlan.unwrap_or(NO_VLAN), mac, Instant::now()))
    }

    /// Whether the operator gave an address to another port, which is there in `vlan`: a trunk is in all of them, and the
    /// table has its address in one only.
    fn belongs_to_another(&self, port: usize, vlan: u16, mac: Mac) -> bool {
        self.ports.iter().enumerate().any(|(other, Port { options, .. })| {
            other != port && options.mac == Some(mac) && options.vlan.is_none_or(|own| own == vlan)
        })
    }

    /// Whether frames may go from one port to the other.
    fn is_allowed(&self, from: usize, to: usize, vlan: u16) -> bool {
        let (source, target) = (&self.ports[from].options, &self.ports[to].options);
        from != to && !(source.isolated && target.isolated) && target.vlan.is_none_or(|own| own == vlan)
    }
}
