//! The forwarding database of a learning switch (IEEE 802.1Q, 8.8): which addresses are behind which port.
//!
//! Threads share it by reference. What happens for each frame, looking up and learning again what is known, takes a read
//! lock; a change takes the write lock and changes the [generation](Table::generation).
//!
//! A port is given a quota when it opens, and the quotas together do not exceed the capacity: whatever one guest sends,
//! the table does not grow, and there is room for what the others send. At its quota a port learns no more until entries
//! age out, and frames to what is not learned are flooded. Its oldest entries are not replaced, because a guest that
//! makes up addresses would then cause a change, a write lock and an invalidated cache of every other port, with every
//! frame. (Linux bridges decide the same way, `fdb_max_learned`.)
//!
//! An address that is seen at another port moves there, as guests that migrate need it, but once a second at most: two
//! ports that claim the same address, a loop or a thief, do not cause a change with every frame either. An address that
//! is [pinned](Table::pin) does not move.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use thiserror::Error;

use crate::ethernet::Mac;

/// Time after which an address that sends nothing is forgotten (the default of IEEE 802.1Q, table 8-7).
pub const AGEING: Duration = Duration::from_secs(300);

/// How much later than that [`Table::age`] may remove it.
pub const AGEING_SLACK: Duration = Duration::from_secs(10);

const AGEING_SECONDS: u32 = AGEING.as_secs() as u32;

/// A port of the switch, by its number.
pub type Port = u16;

/// Forwarding database of one switch.
#[derive(Debug)]
pub struct Table {
    /// Zero of the table's clock, which counts in seconds.
    start: Instant,
    capacity: usize,
    generation: AtomicU64,
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry, RandomState>,
    ports: BTreeMap<Port, PortState>,
    /// No entry ages out before this second.
    next_expiry: u32,
}

/// VLAN in the upper 16 bits, MAC in the lower 48.
type Key = u64;

#[derive(Debug)]
struct Entry {
    port: Port,
    pinned: bool,
    /// Second in which it came to this port.
    since: u32,
    /// Second in which it was last learned. Written under the read lock.
    seen: AtomicU32,
}

#[derive(Debug)]
struct PortState {
    quota: usize,
    /// Entries that were learned, not the pinned ones.
    learned: usize,
}

/// What became of an address that was to be learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// It was known at this port already.
    Known,
    /// It is new.
    New,
    /// It was at another port.
    Moved,
    /// It came to another port less than a second ago, and stays there for now.
    Held,
    /// It is pinned to another port: the frame is forged.
    Pinned,
    /// The port is at its quota, or not open. The address stays where it is known, if it is.
    Full,
    /// A group address or zero, which no frame may have as its source.
    Invalid,
}

/// Why the table does not take what it is to hold.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TableError {
    /// The port would make the quotas exceed the capacity.
    #[error(
        "{quota} addresses for one more port are too many, of {free} that are left; use fewer ports or a larger table"
    )]
    Capacity {
        /// What was asked for.
        quota: usize,
        /// What is left.
        free: usize,
    },
    /// The port is open already.
    #[error("Port {0} of the switch is open already")]
    PortOpen(Port),
    /// The port is not open.
    #[error("Port {0} of the switch is not open")]
    PortClosed(Port),
    /// No address that one station can have.
    #[error("A group address cannot be the address of a port")]
    Group,
    /// Another port has it.
    #[error("The address belongs to port {0} of the switch already; give each port its own")]
    Pinned(Port),
}

impl Table {
    /// Makes an empty table for at most `capacity` learned addresses.
    pub fn new(capacity: usize, now: Instant) -> Self {
        Self { start: now, capacity, generation: AtomicU64::new(0), inner: RwLock::default() }
    }

    /// Opens a port that may learn up to `quota` addresses.
    pub fn open(&self, port: Port, quota: usize) -> Result<(), TableError> {
        let mut inner = self.write();
        if inner.ports.contains_key(&port) {
            return Err(TableError::PortOpen(port));
        }
        let used: usize = inner.ports.values().map(|state| state.quota).sum();
        let free = self.capacity - used;
        if quota > free {
            return Err(TableError::Capacity { quota, free });
        }
        inner.ports.insert(port, PortState { quota, learned: 0 });
        Ok(())
    }

    /// Closes a port, and forgets all that is behind it.
    pub fn close(&self, port: Port) {
        let mut inner = self.write();
        inner.ports.remove(&port);
        let before = inner.entries.len();
        inner.entries.retain(|_, entry| entry.port != port);
        if inner.entries.len() != before {
            self.changed();
        }
    }

    /// Says that an address is behind this port and no other for as long as the port is open.
    ///
    /// It takes the place of what was learned about that address, and does not count against the quota: pinned
    /// addresses are the operator's, and as many as he configures.
    pub fn pin(&self, port: Port, vlan: u16, mac: Mac, now: Instant) -> Result<(), TableError> {
        if !is_station(mac) {
            return Err(TableError::Group);
        }
        let now = self.seconds(now);
        let key = key(vlan, mac);
        let mut inner = self.write();
        if !inner.ports.contains_key(&port) {
            return Err(TableError::PortClosed(port));
        }
        match inner.entries.get(&key) {
            Some(entry) if entry.pinned && entry.port == port => return Ok(()),
            Some(entry) if entry.pinned => return Err(TableError::Pinned(entry.port)),
            _ => {}
        }
        inner.remove(key);
        inner.entries.insert(key, Entry { port, pinned: true, since: now, seen: now.into() });
        self.changed();
        Ok(())
    }

    /// The port that an address is behind.
    pub fn lookup(&self, vlan: u16, mac: Mac, now: Instant) -> Option<Port> {
        let now = self.seconds(now);
        let inner = self.read();
        inner.entries.get(&key(vlan, mac)).filter(|entry| !entry.is_expired(now)).map(|entry| entry.port)
    }

    /// Learns that a frame with this source came from this port.
    pub fn learn(&self, port: Port, vlan: u16, mac: Mac, now: Instant) -> Learned {
        if !is_station(mac) {
            return Learned::Invalid;
        }
        let now = self.seconds(now);
        let key = key(vlan, mac);
        if let Some(learned) = self.read().learn_unchanged(port, key, now) {
            return learned;
        }
        let mut inner = self.write();
        // Another thread may have come first.
        if let Some(learned) = inner.learn_unchanged(port, key, now) {
            return learned;
        }
        if inner.expire(now) > 0 {
            self.changed();
        }
        match inner.ports.get_mut(&port) {
            Some(state) if state.learned < state.quota => state.learned += 1,
            _ => return Learned::Full,
        }
        let moved = inner.remove(key);
        inner.entries.insert(key, Entry { port, pinned: false, since: now, seen: now.into() });
        inner.next_expiry = inner.next_expiry.min(now + AGEING_SECONDS);
        self.changed();
        if moved { Learned::Moved } else { Learned::New }
    }

    /// Removes what has not been seen for [`AGEING`], some [`AGEING_SLACK`] later.
    ///
    /// To be called now and then: what is expired is not found anyway, but a sender that [caches](Self::generation)
    /// learns of it here. It is cheap if there is nothing to do.
    pub fn age(&self, now: Instant) {
        let now = self.seconds(now);
        let due = now.saturating_sub(AGEING_SLACK.as_secs() as u32);
        if self.read().next_expiry > due {
            return;
        }
        let mut inner = self.write();
        if inner.expire(now) > 0 {
            self.changed();
        }
    }

    /// A number that changes whenever an address comes, moves or goes.
    ///
    /// A sender that reads it *before* a [lookup](Self::lookup) may use the answer for as long as the number stays the
    /// same.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Number of addresses, pinned ones and those that are about to age out included.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.read().entries.len()
    }

    /// To be called with the write lock held, after the change: whoever sees the new number and looks up finds it.
    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn seconds(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.start).as_secs() as u32
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Learns what changes nothing. `None` if there is something to change.
    fn learn_unchanged(&self, port: Port, key: Key, now: u32) -> Option<Learned> {
        if let Some(entry) = self.entries.get(&key).filter(|entry| !entry.is_expired(now)) {
            if entry.port == port {
                // Once a second, so that threads do not take the cache line from each other all the time.
                if entry.seen.load(Ordering::Relaxed) < now {
                    entry.seen.fetch_max(now, Ordering::Relaxed);
                }
                return Some(Learned::Known);
            }
            if entry.pinned {
                return Some(Learned::Pinned);
            }
            if entry.since == now {
                return Some(Learned::Held);
            }
        }
        let has_room = self.ports.get(&port).is_some_and(|state| state.learned < state.quota);
        // Unless something ages out, which makes room.
        (!has_room && now < self.next_expiry).then_some(Learned::Full)
    }

    /// Removes a learned entry.
    fn remove(&mut self, key: Key) -> bool {
        let Some(entry) = self.entries.remove(&key) else {
            return false;
        };
        if let Some(state) = self.ports.get_mut(&entry.port) {
            state.learned -= 1;
        }
        true
    }

    /// Removes the entries that are expired, and returns how many.
    fn expire(&mut self, now: u32) -> usize {
        if now < self.next_expiry {
            return 0;
        }
        let before = self.entries.len();
        self.next_expiry = u32::MAX;
        self.entries.retain(|_, entry| {
            if entry.is_expired(now) {
                if let Some(state) = self.ports.get_mut(&entry.port) {
                    state.learned -= 1;
                }
                return false;
            }
            if !entry.pinned {
                let expiry = entry.seen.load(Ordering::Relaxed).saturating_add(AGEING_SECONDS);
                self.next_expiry = self.next_expiry.min(expiry);
            }
            true
        });
        before - self.entries.len()
    }
}

impl Entry {
    fn is_expired(&self, now: u32) -> bool {
        !self.pinned && now.saturating_sub(self.seen.load(Ordering::Relaxed)) >= AGEING_SECONDS
    }
}

/// Whether a single station can have this address: neither a group address nor zero.
fn is_station(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

fn key(vlan: u16, mac: Mac) -> Key {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&vlan.to_be_bytes());
    bytes[2..].copy_from_slice(&mac);
    u64::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests;
