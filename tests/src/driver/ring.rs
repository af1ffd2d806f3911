//! A split ring whose every byte is under the test's control.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::raw::GuestMemory;

/// Descriptor flag: the chain goes on at `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes to this buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Avail ring flag: the driver wants no call signals.
pub const NO_INTERRUPT: u16 = 1;
/// Used ring flag: the device wants no kicks.
pub const NO_NOTIFY: u16 = 1;

/// The size of a descriptor in memory.
pub const DESC_LEN: usize = 16;

/// How often to look at memory that nothing signals.
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// Where a chain goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// At the descriptor that follows in the list.
    Following,
    /// At an entry of the same list, by position, which makes loops.
    Entry(u16),
    /// At any index of the table, also outside of it.
    Index(u16),
}

/// One descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Length of the buffer.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`] or nonsense.
    pub flags: u16,
    /// The next descriptor.
    pub next: Next,
}

impl Desc {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: 0, next: Next::Following }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: WRITE, next: Next::Following }
    }

    /// The same with more flags.
    #[must_use]
    pub fn with(self, flags: u16) -> Self {
        Self { flags: self.flags | flags, ..self }
    }

    /// The same with another successor.
    #[must_use]
    pub fn to(self, next: Next) -> Self {
        Self { next, ..self }
    }

    fn bytes(self, position: u16, start: u16) -> [u8; DESC_LEN] {
        let next = match self.next {
            Next::Following => start.wrapping_add(position).wrapping_add(1),
            Next::Entry(entry) => start.wrapping_add(entry),
            Next::Index(index) => index,
        };
        let mut bytes = [0; DESC_LEN];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }
}

/// Sets `NEXT` on all but the last, as a well-formed chain has it.
pub fn linked(mut chain: Vec<Desc>) -> Vec<Desc> {
    if let Some((_, init)) = chain.split_last_mut() {
        for desc in init {
            desc.flags |= NEXT;
        }
    }
    chain
}

/// Where the parts of a ring lie in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// Number of descriptors.
    pub size: u16,
    /// The descriptor table.
    pub desc: u64,
    /// The avail ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
    /// The first avail index.
    pub base: u16,
}

/// Guest memory for buffers, handed out in a circle: what was allocated long ago gets overwritten.
#[derive(Clone, Copy, Debug)]
pub struct Arena {
    start: u64,
    len: u64,
    at: u64,
}

impl Arena {
    /// Hands out `len` bytes from `start`.
    pub fn new(start: u64, len: u64) -> Self {
        Self { start, len, at: start }
    }

    /// The next `len` bytes at a multiple of `align`.
    pub fn alloc(&mut self, len: usize, align: u64) -> u64 {
        let len = len as u64;
        let mut at = self.at.next_multiple_of(align);
        if at + len > self.start + self.len {
            at = self.start.next_multiple_of(align);
        }
        assert!(at + len <= self.start + self.len, "{len} bytes do not fit in an arena of {}", self.len);
        self.at = at + len;
        at
    }
}

/// The driver's side of a split ring.
pub struct RawRing {
    memory: Arc<GuestMemory>,
    placement: Placement,
    event_idx: bool,
    kick: EventFd,
    call: EventFd,
    waiter: Epoll,
    signals: u64,
    next_avail: u16,
    next_used: u16,
    next_desc: u16,
    /// Memory for buffers and indirect tables.
    pub arena: Arena,
}

impl RawRing {
    /// Lays out an empty ring in memory. [`super::raw::RawDevice::start`] announces it.
    pub fn new(
        memory: Arc<GuestMemory>,
        placement: Placement,
        event_idx: bool,
        arena: Arena,
    ) -> io::Result<Self> {
        let call = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let waiter = Epoll::new()?;
        waiter.ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let ring = Self {
            memory,
            placement,
            event_idx,
            kick: EventFd::new(EFD_CLOEXEC)?,
            call,
            waiter,
            signals: 0,
            next_avail: placement.base,
            next_used: placement.base,
            next_desc: 0,
            arena,
        };
        ring.memory.store_u16(placement.avail, 0);
        ring.memory.store_u16(placement.avail + 2, placement.base);
        ring.memory.store_u16(placement.used, 0);
        ring.memory.store_u16(placement.used + 2, placement.base);
        ring.set_used_event(placement.base);
        Ok(ring)
    }

    /// Where the ring lies, and where it would start if it were announced now.
    pub fn placement(&self) -> Placement {
        Placement { base: self.next_used, ..self.placement }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.placement.size
    }

    /// The memory that the ring is in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The eventfd that the device signals.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// The eventfd that the device waits for.
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// Writes descriptors to the table, from the next free place on, without publishing anything.
    ///
    /// Places are handed out in a circle. Returns the index of the first.
    pub fn write_descs(&mut self, chain: &[Desc]) -> u16 {
        let count = chain.len() as u16;
        assert!(count <= self.placement.size, "{count} descriptors do not fit in the table");
        if self.next_desc + count > self.placement.size {
            self.next_desc = 0;
        }
        let start = self.next_desc;
        self.next_desc += count;
        self.write_descs_at(start, chain);
        start
    }

    /// Writes descriptors to the table from place `start` on, for a driver that keeps account of the places itself.
    pub fn write_descs_at(&self, start: u16, chain: &[Desc]) {
        for (position, desc) in (0..).zip(chain) {
            let at = self.placement.desc + u64::from(start + position) * DESC_LEN as u64;
            self.memory.write(at, &desc.bytes(position, start));
        }
    }

    /// Writes a table for an `INDIRECT` descriptor to a place of the caller's choice.
    pub fn write_indirect_at(&self, at: u64, table: &[Desc]) {
        for (position, desc) in (0..).zip(table) {
            self.memory.write(at + u64::from(position) * DESC_LEN as u64, &desc.bytes(position, 0));
        }
    }

    /// Writes a table for an `INDIRECT` descriptor to buffer memory and returns its address.
    ///
    /// [`Next::Entry`] and [`Next::Following`] count from the start of this table.
    pub fn write_indirect(&mut self, table: &[Desc]) -> u64 {
        let at = self.arena.alloc(table.len() * DESC_LEN, 16);
        self.write_indirect_at(at, table);
        at
    }

    /// Puts a head index in the avail ring without publishing it.
    pub fn push_head(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.placement.size);
        self.memory.write(self.placement.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Publishes the heads that were pushed.
    pub fn publish(&self) {
        self.set_avail_idx(self.next_avail);
    }

    /// Sets the avail index to anything, without remembering it.
    pub fn set_avail_idx(&self, index: u16) {
        self.memory.store_u16(self.placement.avail + 2, index);
    }

    /// Writes a chain exactly as it is and publishes it. Returns its head.
    pub fn add_chain(&mut self, chain: &[Desc]) -> u16 {
        let head = self.write_descs(chain);
        self.push_head(head);
        self.publish();
        head
    }

    /// The avail index after all that was pushed.
    pub fn avail_idx(&self) -> u16 {
        self.next_avail
    }

    /// The used index up to which this side has read.
    pub fn used_seen(&self) -> u16 {
        self.next_used
    }

    /// The used index that the device published.
    pub fn used_idx(&self) -> u16 {
        self.memory.load_u16(self.placement.used + 2)
    }

    /// The used ring's flags, such as [`NO_NOTIFY`].
    pub fn used_flags(&self) -> u16 {
        self.memory.load_u16(self.placement.used)
    }

    /// Sets the avail ring's flags, such as [`NO_INTERRUPT`].
    pub fn set_avail_flags(&self, flags: u16) {
        self.memory.store_u16(self.placement.avail, flags);
    }

    /// Asks for a call signal when the used index passes `index` (`EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.memory.store_u16(self.placement.avail + 4 + 2 * u64::from(self.placement.size), index);
    }

    /// The avail index at which the device asks for a kick (`EVENT_IDX`).
    pub fn avail_event(&self) -> u16 {
        self.memory.load_u16(self.placement.used + 4 + 8 * u64::from(self.placement.size))
    }

    /// Wakes the device, whether it asked for it or not.
    pub fn kick(&self) {
        self.kick.write(1).expect("a kick eventfd never fills up");
    }

    /// Whether the device asked to be woken when the avail index goes on from `old` to all that was pushed.
    pub fn wants_kick(&self, old: u16) -> bool {
        if self.event_idx {
            let new = self.next_avail;
            new.wrapping_sub(self.avail_event()).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used_flags() & NO_NOTIFY == 0
        }
    }

    /// Kicks through a new eventfd from now on, which the device has to be told. Returns the old one.
    pub fn renew_kick(&mut self) -> io::Result<EventFd> {
        Ok(std::mem::replace(&mut self.kick, EventFd::new(EFD_CLOEXEC)?))
    }

    /// Waits for calls through a new eventfd from now on, which the device has to be told. Returns the old one.
    pub fn renew_call(&mut self) -> io::Result<EventFd> {
        let call = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        self.waiter.ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        self.waiter.ctl(ControlOperation::Delete, self.call.as_raw_fd(), EpollEvent::default())?;
        Ok(std::mem::replace(&mut self.call, call))
    }

    /// Takes the next used entry, if there is one: the chain's head and the bytes written.
    pub fn pop_used(&mut self) -> Option<(u32, u32)> {
        if self.used_idx() == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.placement.size);
        let mut entry = [0; 8];
        self.memory.read(self.placement.used + 4 + 8 * slot, &mut entry);
        self.next_used = self.next_used.wrapping_add(1);
        let [id, len] =
            [0, 4].map(|at| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]));
        Some((id, len))
    }

    /// Waits for the next used entry as a driver does, asleep until the device calls.
    ///
    /// `None` after the timeout, also when an entry came without a call.
    pub fn wait_used(&mut self, timeout: Duration) -> Option<(u32, u32)> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.pop_used() {
                return Some(used);
            }
            if self.event_idx {
                self.set_used_event(self.next_used);
                if let Some(used) = self.pop_used() {
                    return Some(used);
                }
            }
            if !self.wait_call(deadline.saturating_duration_since(Instant::now())) {
                return None;
            }
        }
    }

    /// Waits until the device has published `count` entries that were not taken yet, without any call.
    pub fn wait_used_count(&self, count: u16, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while self.used_idx().wrapping_sub(self.next_used) < count {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        true
    }

    fn wait_call(&mut self, timeout: Duration) -> bool {
        // Rounded up, so that the last fraction of a millisecond is slept rather than spun away.
        let timeout = timeout.as_millis() as i32 + i32::from(!timeout.is_zero());
        match self.waiter.wait(timeout, &mut [EpollEvent::default()]) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => panic!("Cannot wait for a call: {error}"),
        }
        self.drain_call();
        true
    }

    fn drain_call(&mut self) {
        if let Ok(signals) = self.call.read() {
            self.signals += signals;
        }
    }

    /// Where both sides are, for messages.
    pub fn describe(&self) -> String {
        format!(
            "avail index {}, used index {} of which {} are taken, avail event {}, used flags {:#x}",
            self.next_avail,
            self.used_idx(),
            self.next_used,
            self.avail_event(),
            self.used_flags()
        )
    }

    /// How often the device has called so far.
    pub fn signals(&mut self) -> u64 {
        self.drain_call();
        self.signals
    }
}
