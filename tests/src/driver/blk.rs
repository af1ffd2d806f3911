//! A disk on the other end of a socket, driven as a guest drives it.
//!
//! [`Disk::open`] connects, and [`Disk::take_queues`] hands out queues that can go to threads of their own.
//! A queue works in one of two ways: one request at a time ([`Queue::read`] and its like), or with many
//! outstanding ([`Queue::run`], made of [`Queue::submit`], [`Queue::kick`] and [`Queue::reap`]).
#![expect(unsafe_code, reason = "virtio-driver takes raw pointers to memory that it shares with the device")]

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkTransport, VirtioFeatureFlags,
};

use super::memory::SharedMemory;

/// Descriptors that a request takes: header, data and status byte.
const DESCS_PER_REQUEST: usize = 3;
/// Longest time without any completion before requests count as lost.
const TIMEOUT: Duration = Duration::from_secs(20);

/// How to open a disk.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of queues.
    pub queues: usize,
    /// Most requests outstanding in each queue.
    pub depth: usize,
    /// Longest transfer of a request, in bytes.
    pub max_transfer: usize,
    /// Virtio features to ask for; those that the device lacks are left out.
    pub features: u64,
}

impl Default for Options {
    fn default() -> Self {
        let blk = VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::BLK_SIZE
            | VirtioBlkFeatureFlags::SEG_MAX
            | VirtioBlkFeatureFlags::CONFIG_WCE
            | VirtioBlkFeatureFlags::MQ
            | VirtioBlkFeatureFlags::RO
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES;
        let ring = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        Self { queues: 1, depth: 32, max_transfer: 64 << 10, features: blk.bits() | ring.bits() }
    }
}

impl Options {
    /// The number of descriptors in each ring.
    pub fn queue_size(&self) -> usize {
        (self.depth * DESCS_PER_REQUEST).next_power_of_two()
    }
}

/// One request. Offsets and lengths are in bytes; data is in the request's slot of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are what the variants say")]
pub enum Op {
    /// Reads to the slot.
    Read { offset: u64, len: usize },
    /// Writes from the slot.
    Write { offset: u64, len: usize },
    /// Makes finished writes durable.
    Flush,
    /// Gives blocks back.
    Discard { offset: u64, len: u64 },
    /// Zeroes a range, giving blocks back if `unmap`.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

/// The part of shared memory that belongs to one request.
#[derive(Clone, Copy, Debug)]
pub struct Slot<'a> {
    memory: &'a SharedMemory,
    offset: usize,
    len: usize,
}

impl Slot<'_> {
    /// The size in bytes.
    pub fn capacity(&self) -> usize {
        self.len
    }

    /// Copies in `data` from the start on.
    pub fn write(&self, data: &[u8]) {
        assert!(data.len() <= self.len, "{} bytes are more than a slot", data.len());
        self.memory.write(self.offset, data);
    }

    /// Copies out from the start on.
    pub fn read(&self, out: &mut [u8]) {
        assert!(out.len() <= self.len, "{} bytes are more than a slot", out.len());
        self.memory.read(self.offset, out);
    }
}

type Transport = Arc<RwLock<Box<VirtioBlkTransport>>>;

/// A connected disk.
pub struct Disk {
    queues: Vec<Queue>,
    transport: Transport,
}

impl Disk {
    /// Connects to a daemon.
    pub fn open(socket: &Path, options: &Options) -> io::Result<Self> {
        let path = socket.to_str().ok_or_else(|| io::Error::other("A socket path is UTF-8 here"))?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, options.features)?);
        let descs = u16::try_from(options.queue_size())
            .map_err(|_| io::Error::other("Too many requests in a queue"))?;
        let rings = VirtioBlkQueue::setup_queues(transport.as_mut(), options.queues, descs)?;
        let transport: Transport = Arc::new(RwLock::new(transport));
        let queues = rings
            .into_iter()
            .enumerate()
            .map(|(index, ring)| Queue::new(index, ring, &transport, options))
            .collect::<io::Result<_>>()?;
        Ok(Self { queues, transport })
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.transport.read().unwrap_or_else(PoisonError::into_inner).get_features()
    }

    /// Asks for the config space.
    pub fn config(&self) -> io::Result<VirtioBlkConfig> {
        self.transport.read().unwrap_or_else(PoisonError::into_inner).get_config()
    }

    /// The disk's size in bytes.
    pub fn capacity(&self) -> io::Result<u64> {
        let config = self.config()?;
        Ok(config.capacity.to_native() * 512)
    }

    /// A queue by its number.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// All queues, to use each in a thread of its own. The connection ends with the last of them and the disk.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }
}

/// One queue of a disk, with shared memory for as many requests as it is deep.
pub struct Queue {
    // `ring` points into memory of the transport and requests point into `buffers`: fields drop in this order.
    ring: VirtioBlkQueue<'static, (Op, usize)>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    free: Vec<usize>,
    depth: usize,
    slot_len: usize,
    timeout: Duration,
    _transport: Transport,
    buffers: SharedMemory,
}

impl Queue {
    fn new(
        index: usize,
        mut ring: VirtioBlkQueue<'static, (Op, usize)>,
        transport: &Transport,
        options: &Options,
    ) -> io::Result<Self> {
        let buffers = SharedMemory::new(options.depth * options.max_transfer)?;
        let mut guard = transport.write().unwrap_or_else(PoisonError::into_inner);
        guard.map_mem_region(buffers.address() as usize, buffers.len(), buffers.as_raw_fd(), 0)?;
        ring.set_used_notif_enabled(false);
        Ok(Self {
            ring,
            notifier: guard.get_submission_notifier(index),
            call: guard.get_completion_fd(index),
            free: (0..options.depth).rev().collect(),
            depth: options.depth,
            slot_len: options.max_transfer,
            timeout: TIMEOUT,
            _transport: Arc::clone(transport),
            buffers,
        })
    }

    /// How long to wait without any completion before the call fails with `TimedOut`.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// How many requests are outstanding.
    pub fn outstanding(&self) -> usize {
        self.depth - self.free.len()
    }

    /// Puts a request in the ring; [`Queue::kick`] tells the device. `fill` writes the data of a write to the slot.
    pub fn submit(&mut self, op: Op, fill: impl FnOnce(Slot)) -> io::Result<()> {
        let index = self.free.pop().ok_or_else(|| io::Error::other("The queue is full"))?;
        fill(slot(&self.buffers, self.slot_len, index));
        let result = self.enqueue(op, index);
        if result.is_err() {
            self.free.push(index);
        }
        result
    }

    fn enqueue(&mut self, op: Op, index: usize) -> io::Result<()> {
        let data = self.buffers.as_ptr().wrapping_add(index * self.slot_len);
        let fits = |len: usize| {
            assert!(len <= self.slot_len, "{len} bytes are more than a slot");
            len
        };
        let context = (op, index);
        match op {
            // SAFETY: `fits` keeps the transfer within slot `index` of `buffers`, which is mapped as long as the ring
            // exists and belongs to this request until it completes.
            Op::Read { offset, len } => unsafe { self.ring.read_raw(offset, data, fits(len), context) },
            // SAFETY: as for `Read`.
            Op::Write { offset, len } => unsafe { self.ring.write_raw(offset, data, fits(len), context) },
            Op::Flush => self.ring.flush(context),
            Op::Discard { offset, len } => self.ring.discard(offset, len, context),
            Op::WriteZeroes { offset, len, unmap } => self.ring.write_zeroes(offset, len, unmap, context),
        }
    }

    /// Tells the device of new requests, if it wants to be told.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.ring.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    /// Hands every completed request to `done`, and sleeps until there is one. Returns how many there were.
    ///
    /// Call signals are off while completions are looked at, and one is asked for before sleeping, as Linux does.
    pub fn reap(&mut self, mut done: impl FnMut(Op, io::Result<()>, Slot)) -> io::Result<usize> {
        loop {
            let mut count = 0;
            for completion in self.ring.completions() {
                let (op, index) = completion.context;
                let result = match completion.ret {
                    0 => Ok(()),
                    error => Err(io::Error::from_raw_os_error(-error)),
                };
                done(op, result, slot(&self.buffers, self.slot_len, index));
                self.free.push(index);
                count += 1;
            }
            if count > 0 {
                return Ok(count);
            }
            self.ring.set_used_notif_enabled(true);
            let waited = if self.ring.completions().has_next() { Ok(()) } else { self.wait_call() };
            self.ring.set_used_notif_enabled(false);
            waited?;
        }
    }

    fn wait_call(&self) -> io::Result<()> {
        let timeout = Timespec::try_from(self.timeout).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(self.call.as_ref(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => self.call.read().map(drop),
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps `depth` requests outstanding as long as `next` has more, and waits for the rest.
    ///
    /// `next` writes the data of a write to the slot; `done` looks at the result, and for a read at the slot.
    /// Returns how many requests completed.
    pub fn run(
        &mut self,
        depth: usize,
        mut next: impl FnMut(Slot) -> Option<Op>,
        mut done: impl FnMut(Op, io::Result<()>, Slot),
    ) -> io::Result<u64> {
        assert!(depth <= self.depth, "{depth} requests are more than the queue holds");
        let mut completed = 0;
        let mut more = true;
        loop {
            let before = self.outstanding();
            while more && self.outstanding() < depth {
                let index = *self.free.last().expect("a free slot, since fewer than `depth` are taken");
                match next(slot(&self.buffers, self.slot_len, index)) {
                    Some(op) => self.submit(op, |_| ())?,
                    None => more = false,
                }
            }
            if self.outstanding() == 0 {
                return Ok(completed);
            }
            if self.outstanding() > before {
                self.kick()?;
            }
            completed += self.reap(&mut done)? as u64;
        }
    }

    fn one(&mut self, op: Op, fill: impl FnOnce(Slot), look: impl FnOnce(Slot)) -> io::Result<()> {
        assert_eq!(self.outstanding(), 0, "one request at a time");
        self.submit(op, fill)?;
        self.kick()?;
        let mut look = Some(look);
        let mut outcome = None;
        while outcome.is_none() {
            self.reap(|_, result, slot| {
                if result.is_ok()
                    && let Some(look) = look.take()
                {
                    look(slot);
                }
                outcome = Some(result);
            })?;
        }
        outcome.unwrap_or(Ok(()))
    }

    /// Reads to `out`.
    pub fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.one(Op::Read { offset, len: out.len() }, |_| (), |slot| slot.read(out))
    }

    /// Writes `data`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.one(Op::Write { offset, len: data.len() }, |slot| slot.write(data), |_| ())
    }

    /// Makes finished writes durable.
    pub fn flush(&mut self) -> io::Result<()> {
        self.one(Op::Flush, |_| (), |_| ())
    }

    /// Gives blocks back.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.one(Op::Discard { offset, len }, |_| (), |_| ())
    }

    /// Zeroes a range, giving blocks back if `unmap`.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.one(Op::WriteZeroes { offset, len, unmap }, |_| (), |_| ())
    }
}

fn slot(memory: &SharedMemory, len: usize, index: usize) -> Slot<'_> {
    Slot { memory, offset: index * len, len }
}
