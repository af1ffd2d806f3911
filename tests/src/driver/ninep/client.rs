//! Requests in memory of their own, many at once, completed in any order.
//!
//! A client has one ring. Each request lies in a slot, which has memory for the largest request and reply and a
//! descriptor of its own; the slot's number is the request's tag. Nothing is shared by two outstanding requests, and a
//! request that was prepared once can be posted again and again.
//!
//! One request at a time goes by [`Client::call`]. Many go by [`Client::prepare`], [`Client::post`], [`Client::kick`],
//! [`Client::next_done`] and [`Client::release`], none of which allocates memory.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::flags::{self, READ_HEADER_LEN};
use super::message::{R, Room, T};
use crate::driver::raw::{GuestMemory, Layout, RawDevice, RawOptions};
use crate::driver::ring::{Arena, DESC_LEN, Desc, INDIRECT, NEXT, NO_INTERRUPT, Placement, RawRing};

/// Longest time to wait for a reply.
const TIMEOUT: Duration = Duration::from_secs(20);
const PAGE: usize = 4096;
/// What each ring's memory starts with: the ring.
const RING_SPACE: usize = 64 << 10;
/// What it ends with: memory for requests that are made by hand.
const RAW_SPACE: usize = 8 << 20;
/// What comes before the pages of a request or reply: a request without data, or a header.
const HEADER_SPACE: usize = 2 * PAGE;
/// The part of the descriptor table that is left for chains that are made by hand: one of this many.
const RAW_SHARE: u16 = 2;

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What is negotiated. The memory's layout is the client's own.
    pub raw: RawOptions,
    /// Number of descriptors of each ring.
    pub ring_size: u16,
    /// Most requests outstanding in each ring.
    pub slots: u16,
    /// What `Tversion` asks for, and the most data of a request or reply.
    pub msize: u32,
    /// Whether a request's descriptors lie in a table of their own. Else they share the ring's.
    pub indirect: bool,
    /// Whether to look at the ring all the time instead of sleeping until the device calls.
    pub polling: bool,
    /// Longest time to wait for a reply.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            raw: RawOptions::ninep(),
            ring_size: 256,
            slots: 64,
            // What Linux asks for at most.
            msize: 512_000,
            indirect: true,
            polling: false,
            timeout: TIMEOUT,
        }
    }
}

impl Options {
    /// The same with another msize.
    #[must_use]
    pub fn msize(self, msize: u32) -> Self {
        Self { msize, ..self }
    }

    /// The same with all descriptors in the ring's own table.
    #[must_use]
    pub fn direct(self) -> Self {
        Self { indirect: false, slots: 4, ..self }
    }

    fn table_space(&self) -> usize {
        ((self.data_space() / PAGE + 8) * DESC_LEN).next_multiple_of(PAGE)
    }

    fn data_space(&self) -> usize {
        (self.msize as usize).next_multiple_of(PAGE)
    }

    fn slot_space(&self) -> usize {
        self.table_space() + 2 * (HEADER_SPACE + self.data_space())
    }

    fn queue_space(&self) -> usize {
        RING_SPACE + usize::from(self.slots) * self.slot_space() + RAW_SPACE
    }
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Prepared,
    Pending,
    Done { used: u32, sequence: u64 },
}

/// What the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Completion {
    /// A slot's request, by its tag.
    Request(u16),
    /// A chain that was made by hand.
    Chain,
}

#[derive(Debug)]
struct Slot {
    /// Where its memory starts: the table, then the request, then the reply.
    base: u64,
    /// What its descriptors were made for.
    shape: Option<(usize, Room)>,
    state: State,
}

/// A request that was answered.
#[derive(Clone, PartialEq, Eq)]
pub struct Reply {
    /// As many bytes as the device says that it wrote.
    pub bytes: Vec<u8>,
    /// How many requests were completed before, on this ring.
    pub sequence: u64,
}

impl Reply {
    /// The message. Bytes that are none are the daemon's mistake.
    pub fn message(&self) -> R<'_> {
        let Some((_, message)) = R::decode(&self.bytes) else {
            panic!("This is no reply: {:?}", &self.bytes[..self.bytes.len().min(64)]);
        };
        message
    }

    /// The tag in the message.
    pub fn tag(&self) -> Option<u16> {
        R::decode(&self.bytes).map(|(tag, _)| tag)
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} as completion {}", R::decode(&self.bytes), self.sequence)
    }
}

/// A front end with one ring. The connection ends with the last of its clients.
pub struct Client {
    ring: RawRing,
    options: Options,
    slots: Vec<Slot>,
    free: Vec<u16>,
    scratch: Vec<u8>,
    chain: Vec<Desc>,
    /// The avail index that the device was told of.
    told: u16,
    sequence: u64,
    /// The next descriptor for a chain that is made by hand.
    next_raw: u16,
    /// Such chains that came back: used length and sequence.
    raw_done: HashMap<u16, (u32, u64)>,
    /// The group of new files.
    pub gid: u32,
    pub(super) next_fid: u32,
    pub(super) msize: u32,
    device: Arc<Mutex<RawDevice>>,
}

impl Client {
    /// Connects to a daemon, without a word of 9P.
    pub fn connect(socket: &Path, options: &Options) -> io::Result<Self> {
        let mut clients = Self::connect_queues(socket, options, 1)?;
        Ok(clients.remove(0))
    }

    /// Connects with several rings, each with a client that can go to a thread of its own. All share one session.
    pub fn connect_queues(socket: &Path, options: &Options, queues: usize) -> io::Result<Vec<Self>> {
        let layout = Layout::Sized(queues * options.queue_space());
        let memory = Arc::new(GuestMemory::new(layout)?);
        let device = RawDevice::connect_with(socket, &options.raw, Arc::clone(&memory))?;
        let event_idx = device.has(VIRTIO_RING_F_EVENT_IDX);
        let device = Arc::new(Mutex::new(device));
        (0..queues)
            .map(|queue| {
                let base = (queue * options.queue_space()) as u64;
                let raw = base + (options.queue_space() - RAW_SPACE) as u64;
                let avail = base + DESC_LEN as u64 * u64::from(options.ring_size);
                let used = (avail + 6 + 2 * u64::from(options.ring_size)).next_multiple_of(PAGE as u64);
                let placement = Placement { size: options.ring_size, desc: base, avail, used, base: 0 };
                let arena = Arena::new(raw, RAW_SPACE as u64);
                let ring = RawRing::new(Arc::clone(&memory), placement, event_idx, arena)?;
                lock(&device).start(queue, &ring)?;
                if options.polling {
                    ring.set_avail_flags(NO_INTERRUPT);
                }
                Ok(Self::new(ring, base, options, Arc::clone(&device)))
            })
            .collect()
    }

    fn new(ring: RawRing, base: u64, options: &Options, device: Arc<Mutex<RawDevice>>) -> Self {
        let slots = (0..options.slots)
            .map(|slot| Slot {
                base: base + (RING_SPACE + usize::from(slot) * options.slot_space()) as u64,
                shape: None,
                state: State::Free,
            })
            .collect();
        let mut client = Self {
            ring,
            options: *options,
            slots,
            free: (0..options.slots).rev().collect(),
            scratch: Vec::new(),
            chain: Vec::new(),
            told: 0,
            sequence: 0,
            next_raw: 0,
            raw_done: HashMap::new(),
            gid: rustix::process::getegid().as_raw(),
            next_fid: 1,
            msize: options.msize,
            device,
        };
        client.next_raw = client.first_raw();
        assert!(client.descs_per_slot() > 0, "{options:?} has fewer descriptors than slots");
        client
    }

    /// The connection.
    pub fn device(&self) -> MutexGuard<'_, RawDevice> {
        lock(&self.device)
    }

    /// Starts the only ring where it is.
    pub fn restart_ring(&self) -> io::Result<()> {
        lock(&self.device).start(0, &self.ring)
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut RawRing {
        &mut self.ring
    }

    /// Starts the ring again after it was stopped, from where it was. For a client that has one ring.
    pub fn restart(&mut self) -> io::Result<()> {
        let base = self.ring.used_idx();
        lock(&self.device).start_from(0, &self.ring, base)
    }

    /// The msize that was agreed on.
    pub fn msize(&self) -> u32 {
        self.msize
    }

    /// How it was connected.
    pub fn options(&self) -> &Options {
        &self.options
    }

    fn descs_per_slot(&self) -> u16 {
        let all = self.options.ring_size - self.options.ring_size / RAW_SHARE;
        if self.options.indirect { u16::from(all >= self.options.slots) } else { all / self.options.slots }
    }

    /// The first descriptor that is for chains that are made by hand.
    fn first_raw(&self) -> u16 {
        self.descs_per_slot() * self.options.slots
    }

    fn out_base(&self, slot: u16) -> u64 {
        self.slots[usize::from(slot)].base + self.options.table_space() as u64
    }

    fn in_base(&self, slot: u16) -> u64 {
        self.out_base(slot) + (HEADER_SPACE + self.options.data_space()) as u64
    }

    /// Lays out a request in a free slot, in the descriptors that Linux makes. Its tag is the slot's number.
    pub fn prepare(&mut self, request: &T<'_>) -> u16 {
        self.prepare_with(request, request.room())
    }

    /// The same in other descriptors.
    pub fn prepare_with(&mut self, request: &T<'_>, room: Room) -> u16 {
        let slot = self.free.pop().expect("a free slot; Options::slots says how many there are");
        self.scratch.clear();
        request.encode_to(slot, &mut self.scratch);
        if matches!(request, T::Version { .. }) {
            self.scratch[5..7].copy_from_slice(&flags::NO_TAG.to_le_bytes());
        }
        let len = self.scratch.len();
        let most = HEADER_SPACE + self.options.data_space();
        assert!(len <= most && room.pages_in <= self.options.data_space(), "{room:?} is more than the msize");
        let out = self.out_base(slot);
        let head = len - room.pages_out;
        self.ring.memory().write(out, &self.scratch[..head]);
        if room.pages_out > 0 {
            assert!(head <= HEADER_SPACE, "a header of {head} bytes");
            self.ring.memory().write(out + HEADER_SPACE as u64, &self.scratch[head..]);
        }
        if self.slots[usize::from(slot)].shape != Some((len, room)) {
            self.describe(slot, len, room);
        }
        self.slots[usize::from(slot)].state = State::Prepared;
        slot
    }

    /// Makes the slot's descriptors.
    fn describe(&mut self, slot: u16, len: usize, room: Room) {
        let (out, back) = (self.out_base(slot), self.in_base(slot));
        let mut chain = std::mem::take(&mut self.chain);
        chain.clear();
        chain.extend(pages(out, len - room.pages_out).map(|(at, len)| Desc::readable(at, len)));
        let data = out + HEADER_SPACE as u64;
        chain.extend(pages(data, room.pages_out).map(|(at, len)| Desc::readable(at, len)));
        if room.header_in > 0 {
            chain.push(Desc::writable(back, room.header_in as u32));
        }
        let data = back + HEADER_SPACE as u64;
        chain.extend(pages(data, room.pages_in).map(|(at, len)| Desc::writable(at, len)));
        let last = chain.len() - 1;
        for desc in &mut chain[..last] {
            *desc = desc.with(NEXT);
        }
        let base = self.slots[usize::from(slot)].base;
        let per_slot = self.descs_per_slot();
        if self.options.indirect {
            self.ring.write_indirect_at(base, &chain);
            let table = Desc::readable(base, (chain.len() * DESC_LEN) as u32).with(INDIRECT);
            self.ring.write_descs_at(slot, &[table]);
        } else {
            assert!(chain.len() <= per_slot.into(), "{} descriptors of {per_slot}", chain.len());
            self.ring.write_descs_at(slot * per_slot, &chain);
        }
        self.chain = chain;
        self.slots[usize::from(slot)].shape = Some((len, room));
    }

    /// Gives the device a request that was prepared, or one that was answered, once more. [`Client::kick`] tells it.
    pub fn post(&mut self, tag: u16) {
        let slot = &mut self.slots[usize::from(tag)];
        assert!(matches!(slot.state, State::Prepared | State::Done { .. }), "tag {tag} is {:?}", slot.state);
        slot.state = State::Pending;
        let head = tag * self.descs_per_slot();
        self.ring.push_head(head);
        self.ring.publish();
    }

    /// Tells the device of what was posted, if it wants to be told.
    pub fn kick(&mut self) {
        if self.ring.wants_kick(self.told) {
            self.ring.kick();
        }
        self.told = self.ring.avail_idx();
    }

    /// Prepares, posts, and kicks. Returns the tag.
    pub fn submit(&mut self, request: &T<'_>) -> u16 {
        let tag = self.prepare(request);
        self.post(tag);
        self.kick();
        tag
    }

    /// Takes the next completion if there is one.
    fn take(&mut self, used: Option<(u32, u32)>) -> Option<Completion> {
        let (id, used) = used?;
        let sequence = self.sequence;
        self.sequence += 1;
        let head = u16::try_from(id).unwrap_or_else(|_| panic!("A used entry has the id {id:#x}"));
        if head >= self.first_raw() {
            assert!(self.raw_done.insert(head, (used, sequence)).is_none(), "Chain {head} came back twice");
            return Some(Completion::Chain);
        }
        let (tag, rest) = (head / self.descs_per_slot(), head % self.descs_per_slot());
        assert_eq!(rest, 0, "Chain {head} came back, which was never posted");
        let slot = &mut self.slots[usize::from(tag)];
        assert_eq!(slot.state, State::Pending, "Request {tag} came back");
        slot.state = State::Done { used, sequence };
        Some(Completion::Request(tag))
    }

    /// Waits for the next completion of anything, `None` after `timeout`.
    fn wait_one(&mut self, timeout: Duration) -> Option<Completion> {
        let used = if self.options.polling { self.spin(timeout) } else { self.ring.wait_used(timeout) };
        self.take(used)
    }

    fn spin(&mut self, timeout: Duration) -> Option<(u32, u32)> {
        const LOOKS: u32 = 1 << 12;
        let mut deadline = None;
        loop {
            for _ in 0..LOOKS {
                if let Some(used) = self.ring.pop_used() {
                    return Some(used);
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if *deadline.get_or_insert(now + timeout) < now {
                return None;
            }
            // The device may share this processor.
            std::thread::yield_now();
        }
    }

    /// The next request that the device answers, or `None` if there is none yet.
    pub fn poll(&mut self) -> Option<u16> {
        loop {
            let used = self.ring.pop_used();
            if let Completion::Request(tag) = self.take(used)? {
                return Some(tag);
            }
        }
    }

    /// Waits for the next request that the device answers.
    pub fn next_done(&mut self) -> u16 {
        loop {
            match self.wait_one(self.options.timeout) {
                Some(Completion::Request(tag)) => return tag,
                Some(Completion::Chain) => {}
                None => panic!("No reply after {:?}: {}", self.options.timeout, self.ring.describe()),
            }
        }
    }

    /// Whether the device has answered the request, among all that it has answered by now.
    pub fn is_done(&mut self, tag: u16) -> bool {
        while self.poll().is_some() {}
        matches!(self.slots[usize::from(tag)].state, State::Done { .. })
    }

    /// The used length of a request that was answered.
    pub fn used(&self, tag: u16) -> u32 {
        match self.slots[usize::from(tag)].state {
            State::Done { used, .. } => used,
            state => panic!("request {tag} is {state:?}"),
        }
    }

    /// The first bytes of the reply to a request that was answered: `size[4] type[1] tag[2]`, and what follows.
    pub fn header(&self, tag: u16) -> [u8; READ_HEADER_LEN] {
        let mut header = [0; READ_HEADER_LEN];
        self.ring.memory().read(self.in_base(tag), &mut header);
        header
    }

    /// The whole reply to a request that was answered.
    pub fn reply(&self, tag: u16) -> Reply {
        let slot = &self.slots[usize::from(tag)];
        let (State::Done { used, sequence }, Some((_, room))) = (slot.state, slot.shape) else {
            panic!("request {tag} is {:?}", slot.state);
        };
        let used = used as usize;
        assert!(used <= room.header_in + room.pages_in, "{used} bytes were written to {room:?}");
        let base = self.in_base(tag);
        let mut bytes = vec![0; used];
        let (head, data) = bytes.split_at_mut(used.min(room.header_in));
        self.ring.memory().read(base, head);
        self.ring.memory().read(base + HEADER_SPACE as u64, data);
        Reply { bytes, sequence }
    }

    /// Gives the slot of a request that is not outstanding back.
    pub fn release(&mut self, tag: u16) {
        let slot = &mut self.slots[usize::from(tag)];
        assert!(matches!(slot.state, State::Prepared | State::Done { .. }), "tag {tag} is {:?}", slot.state);
        slot.state = State::Free;
        self.free.push(tag);
    }

    /// Waits for one request, takes its reply, and gives its slot back.
    pub fn wait(&mut self, tag: u16) -> Reply {
        self.wait_timeout(tag, self.options.timeout).unwrap_or_else(|| {
            panic!("No reply to {tag} after {:?}: {}", self.options.timeout, self.ring.describe())
        })
    }

    /// The same; `None` if there is no reply within `timeout`.
    pub fn wait_timeout(&mut self, tag: u16, timeout: Duration) -> Option<Reply> {
        let deadline = Instant::now() + timeout;
        while !matches!(self.slots[usize::from(tag)].state, State::Done { .. }) {
            self.wait_one(deadline.saturating_duration_since(Instant::now()))?;
        }
        let reply = self.reply(tag);
        self.release(tag);
        Some(reply)
    }

    /// Sends a request and waits for its reply, which has the request's tag and is the right one or `Rlerror`.
    pub fn call(&mut self, request: &T<'_>) -> Reply {
        let tag = self.submit(request);
        let reply = self.wait(tag);
        self.check(request, tag, &reply);
        reply
    }

    /// Sends a request, whose reply must be this byte by byte.
    pub fn expect(&mut self, request: &T<'_>, expected: &R<'_>) {
        let tag = self.submit(request);
        let reply = self.wait(tag);
        let tag = if matches!(request, T::Version { .. }) { flags::NO_TAG } else { tag };
        assert_eq!(R::decode(&reply.bytes), Some((tag, expected.clone())), "the answer to {request:?}");
        assert_eq!(reply.bytes, expected.encode(tag), "the answer to {request:?}");
    }

    /// Sends a request that must fail with this error.
    pub fn expect_error(&mut self, request: &T<'_>, error: Errno) {
        self.expect(request, &R::Lerror { ecode: error.raw_os_error() as u32 });
    }

    /// Checks that `reply` is one to `request`.
    pub fn check(&self, request: &T<'_>, tag: u16, reply: &Reply) {
        let expected = if matches!(request, T::Version { .. }) { flags::NO_TAG } else { tag };
        let Some((tag, message)) = R::decode(&reply.bytes) else {
            panic!("{request:?} was answered by {:?}", reply.bytes);
        };
        assert_eq!(tag, expected, "the tag of {message:?}, which answers {request:?}");
        let is_error = matches!(message, R::Lerror { .. });
        assert!(
            is_error || message.number() == request.number() + 1,
            "{request:?} was answered by {message:?}"
        );
    }

    /// Publishes a chain that is made by hand, and kicks. Returns its head.
    pub fn send_chain(&mut self, chain: &[Desc]) -> u16 {
        let head = self.write_chain(chain);
        self.ring.push_head(head);
        self.ring.publish();
        self.kick();
        head
    }

    /// Writes a chain that is made by hand to the descriptor table without publishing it. Returns its head.
    pub fn write_chain(&mut self, chain: &[Desc]) -> u16 {
        let (count, size) = (chain.len() as u16, self.options.ring_size);
        assert!(count <= size - self.first_raw(), "{count} descriptors do not fit");
        if self.next_raw + count > size {
            self.next_raw = self.first_raw();
        }
        let head = self.next_raw;
        self.next_raw += count;
        self.ring.write_descs_at(head, chain);
        head
    }

    /// Waits for a chain that was made by hand: the used length and the sequence; `None` after `timeout`.
    pub fn wait_chain(&mut self, head: u16, timeout: Duration) -> Option<(u32, u64)> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(done) = self.raw_done.remove(&head) {
                return Some(done);
            }
            self.wait_one(deadline.saturating_duration_since(Instant::now()))?;
        }
    }
}

fn lock(device: &Mutex<RawDevice>) -> MutexGuard<'_, RawDevice> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pieces of a buffer that begins at a page, page by page.
fn pages(base: u64, len: usize) -> impl Iterator<Item = (u64, u32)> {
    (0..len).step_by(PAGE).map(move |at| (base + at as u64, (len - at).min(PAGE) as u32))
}
