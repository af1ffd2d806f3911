//! The driver's side of a balloon.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};

use super::memory::{PAGE, Pages, REST, RINGS, Shape};
use super::{DEFLATE_ON_OOM, MUST_TELL_HOST, PAGE_POISON, REPORTING, STATS_VQ};
use crate::driver::memory::SharedMemory;
use crate::driver::raw::{GuestMemory, RawDevice, RawOptions};
use crate::driver::ring::{Desc, RawRing, linked};
use crate::driver::wire::{FLAG_NEED_REPLY, WireFrontend};

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE_MSG: u32 = 2;
/// Longest time to wait for one request.
pub const TIMEOUT: Duration = Duration::from_secs(20);
/// Pages of a request of Linux.
pub const LINUX_REQUEST: usize = 256;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Pages that the guest gives.
    Inflate,
    /// Pages that the guest takes back.
    Deflate,
    /// Statistics.
    Stats,
    /// Free pages.
    Reporting,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Inflate, Self::Deflate, Self::Stats, Self::Reporting];
}

/// How queues are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// Without places for queues whose features were not taken, as Linux does it.
    Compact,
    /// As the specification says (virtio 1.3 text, section 5.5.2).
    Fixed,
}

impl Numbering {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Compact, Self::Fixed];
}

/// What to negotiate, and how to use it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The features; the layout in it is not used.
    pub raw: RawOptions,
    /// How the queues are numbered.
    pub numbering: Numbering,
    /// The guest's memory.
    pub shape: Shape,
    /// How much of it the balloon may take.
    pub rest: u64,
    /// Descriptors of each queue.
    pub ring_size: u16,
}

impl Default for Options {
    fn default() -> Self {
        let features = [MUST_TELL_HOST, STATS_VQ, DEFLATE_ON_OOM, PAGE_POISON, REPORTING];
        let raw = features.into_iter().fold(RawOptions::net(), RawOptions::with);
        Self {
            raw: raw
                .with_protocol(VhostUserProtocolFeatures::BACKEND_REQ)
                .with_protocol(VhostUserProtocolFeatures::RESET_DEVICE),
            numbering: Numbering::Compact,
            shape: Shape::One(super::Backing::Memfd),
            rest: REST,
            ring_size: 128,
        }
    }
}

impl Options {
    /// All features but this.
    #[must_use]
    pub fn without(self, feature: u32) -> Self {
        Self { raw: self.raw.without(feature), ..self }
    }

    /// With another memory.
    #[must_use]
    pub fn shape(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    /// Whether a virtio feature is asked for.
    pub fn has(&self, feature: u32) -> bool {
        self.raw.features & 1 << feature != 0
    }

    /// The queues that these features have.
    pub fn roles(&self) -> Vec<Role> {
        let mut roles = vec![Role::Inflate, Role::Deflate];
        roles.extend(self.has(STATS_VQ).then_some(Role::Stats));
        roles.extend(self.has(REPORTING).then_some(Role::Reporting));
        roles
    }

    /// The number of a queue.
    pub fn index(&self, role: Role) -> usize {
        match (role, self.numbering) {
            (Role::Inflate, _) => 0,
            (Role::Deflate, _) => 1,
            (Role::Stats, _) => 2,
            (Role::Reporting, Numbering::Compact) => 2 + usize::from(self.has(STATS_VQ)),
            (Role::Reporting, Numbering::Fixed) => 4,
        }
    }
}

/// The config space (virtio 1.3 text, section 5.5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// What is wanted of the balloon, in pages.
    pub num_pages: u32,
    /// What the driver says of it.
    pub actual: u32,
    /// For hints of free pages.
    pub free_page_hint_cmd_id: u32,
    /// With what free pages are filled.
    pub poison_val: u32,
}

impl Config {
    /// Where [`Config::actual`] lies.
    pub const ACTUAL: u32 = 4;
    /// Where [`Config::poison_val`] lies.
    pub const POISON_VAL: u32 = 12;
    /// The length of the space.
    pub const LEN: u32 = 16;
}

/// A front end and driver.
pub struct Driver {
    /// The connection.
    pub device: RawDevice,
    /// The guest's memory.
    pub pages: Pages,
    /// The daemon's channel to the front end; there is one if `BACKEND_REQ` was asked for.
    pub channel: Option<WireFrontend>,
    pub(super) options: Options,
    pub(super) rings: BTreeMap<Role, RawRing>,
    pub(super) bases: BTreeMap<Role, u16>,
}

impl Driver {
    /// Connects with new memory, and starts all queues.
    pub fn connect(socket: &Path, options: &Options) -> Result<Self> {
        Self::connect_with(socket, options, Arc::new(options.shape.memory_of(options.rest)?))
    }

    /// Connects with memory that is there, and starts all queues.
    pub fn connect_with(socket: &Path, options: &Options, memory: Arc<GuestMemory>) -> Result<Self> {
        let mut driver = Self::connect_without_rings(socket, options, memory)?;
        driver.start_rings()?;
        Ok(driver)
    }

    /// Connects with memory that is there, and starts nothing.
    pub fn connect_without_rings(socket: &Path, options: &Options, memory: Arc<GuestMemory>) -> Result<Self> {
        // The host holds all of the rings' memory from now on, so that only the rest changes.
        memory.write(0, &vec![0; RINGS as usize]);
        let (device, channel) = Self::open(socket, options, &memory)?;
        let pages = Pages::new(memory);
        let (rings, bases) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { device, pages, channel, options: *options, rings, bases })
    }

    pub(super) fn open(
        socket: &Path,
        options: &Options,
        memory: &Arc<GuestMemory>,
    ) -> Result<(RawDevice, Option<WireFrontend>)> {
        let mut device = RawDevice::connect_with(socket, &options.raw, Arc::clone(memory))?;
        if !options.raw.protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            return Ok((device, None));
        }
        let (ours, theirs) = UnixStream::pair()?;
        device.frontend.set_backend_request_fd(&theirs)?;
        Ok((device, Some(WireFrontend::from_stream(ours)?)))
    }

    /// What was asked for.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// A queue.
    pub fn ring(&mut self, role: Role) -> &mut RawRing {
        let Some(ring) = self.rings.get_mut(&role) else { panic!("There is no queue {role:?}") };
        ring
    }

    /// Exchanges the placement of a queue that was not started yet, or was stopped.
    pub fn put_ring(&mut self, role: Role, ring: RawRing) {
        self.rings.insert(role, ring);
    }

    /// Hands over bytes in these pieces, each a buffer that the device reads, and returns at once.
    pub fn submit(&mut self, role: Role, pieces: &[&[u8]]) -> u16 {
        let ring = self.ring(role);
        let chain = pieces
            .iter()
            .map(|piece| {
                let addr = ring.arena.alloc(piece.len(), 4);
                ring.memory().write(addr, piece);
                Desc::readable(addr, piece.len() as u32)
            })
            .collect();
        self.submit_chain(role, &linked(chain))
    }

    /// Hands over a chain as it is, and returns at once.
    pub fn submit_chain(&mut self, role: Role, chain: &[Desc]) -> u16 {
        let ring = self.ring(role);
        let head = ring.add_chain(chain);
        ring.kick();
        head
    }

    /// Waits until the device gives a chain back: its head, and the bytes written.
    pub fn finish(&mut self, role: Role) -> Result<(u32, u32)> {
        let ring = self.ring(role);
        let used = ring.wait_used(TIMEOUT);
        used.with_context(|| format!("The queue {role:?} gives nothing back: {}", self.ring(role).describe()))
    }

    /// Whether the device has given back a chain that was not looked at.
    pub fn is_done(&mut self, role: Role) -> bool {
        let ring = self.ring(role);
        ring.used_idx() != ring.used_seen()
    }

    /// Does one request from start to end, which the device must not write to.
    pub fn execute(&mut self, role: Role, pieces: &[&[u8]]) -> Result<()> {
        let head = self.submit(role, pieces);
        self.expect_back(role, head)
    }

    /// Does one request from start to end, with a chain as it is.
    pub fn execute_chain(&mut self, role: Role, chain: &[Desc]) -> Result<()> {
        let head = self.submit_chain(role, chain);
        self.expect_back(role, head)
    }

    fn expect_back(&mut self, role: Role, head: u16) -> Result<()> {
        let (id, len) = self.finish(role)?;
        ensure!(id == u32::from(head), "Chain {head} of the queue {role:?} came back as {id}");
        ensure!(len == 0, "The device says that it wrote {len} bytes to the queue {role:?}");
        Ok(())
    }

    /// Gives pages in one request.
    pub fn inflate(&mut self, pfns: &[u64]) -> Result<()> {
        self.execute(Role::Inflate, &[&narrow(pfns)])
    }

    /// Takes pages back in one request.
    pub fn deflate(&mut self, pfns: &[u64]) -> Result<()> {
        self.execute(Role::Deflate, &[&narrow(pfns)])
    }

    /// Gives pages as Linux does: in requests of [`LINUX_REQUEST`] pages with falling numbers.
    pub fn inflate_all(&mut self, pfns: impl IntoIterator<Item = u64>) -> Result<()> {
        self.in_requests(pfns, Self::inflate)
    }

    /// Takes pages back as Linux does.
    pub fn deflate_all(&mut self, pfns: impl IntoIterator<Item = u64>) -> Result<()> {
        self.in_requests(pfns, Self::deflate)
    }

    fn in_requests(
        &mut self,
        pfns: impl IntoIterator<Item = u64>,
        mut request: impl FnMut(&mut Self, &[u64]) -> Result<()>,
    ) -> Result<()> {
        let mut pfns: Vec<u64> = pfns.into_iter().collect();
        pfns.reverse();
        pfns.chunks(LINUX_REQUEST).try_for_each(|chunk| request(self, chunk))
    }

    /// Reports ranges of pages as free, in one request: the first page of each, and how many.
    pub fn report(&mut self, ranges: &[(u64, u64)]) -> Result<()> {
        let chain =
            ranges.iter().map(|&(pfn, count)| Desc::writable(pfn * PAGE, (count * PAGE) as u32)).collect();
        self.execute_chain(Role::Reporting, &linked(chain))
    }

    /// Hands over statistics, which the device gives back when it wants new ones.
    pub fn give_stats(&mut self, stats: &[(u16, u64)]) {
        self.submit(Role::Stats, &[&statistics(stats)]);
    }

    /// Waits until the device wants new statistics.
    pub fn stats_wanted(&mut self) -> Result<()> {
        let (_, len) = self.finish(Role::Stats)?;
        ensure!(len == 0, "The device says that it wrote {len} bytes to statistics");
        Ok(())
    }

    /// Gives these statistics whenever the device wants new ones, until somebody who waits for them has ended.
    pub fn answer_stats<T>(&mut self, waiting: JoinHandle<Result<T>>, stats: &[(u16, u64)]) -> Result<T> {
        while !waiting.is_finished() {
            if self.is_done(Role::Stats) {
                self.stats_wanted()?;
                self.give_stats(stats);
            }
            thread::sleep(Duration::from_micros(200));
        }
        waiting.join().unwrap_or_else(|_| bail!("Who waited for statistics has panicked"))
    }

    /// Reads the config space.
    pub fn config(&mut self) -> Result<Config> {
        let bytes = self.device.config(0, Config::LEN)?;
        let (words, rest) = bytes.as_chunks::<4>();
        let [num_pages, actual, free_page_hint_cmd_id, poison_val] = words else {
            bail!("The config space has {} bytes", bytes.len())
        };
        ensure!(rest.is_empty(), "The config space has {} bytes", bytes.len());
        Ok(Config {
            num_pages: u32::from_le_bytes(*num_pages),
            actual: u32::from_le_bytes(*actual),
            free_page_hint_cmd_id: u32::from_le_bytes(*free_page_hint_cmd_id),
            poison_val: u32::from_le_bytes(*poison_val),
        })
    }

    /// Writes a part of the config space, as User Mode Linux does.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let flags = VhostUserConfigFlags::empty();
        self.device.frontend.set_config(offset, flags, bytes).map_err(io::Error::other)
    }

    /// Writes the whole config space, as QEMU does.
    pub fn set_whole_config(&mut self, config: Config) -> io::Result<()> {
        let words = [config.num_pages, config.actual, config.free_page_hint_cmd_id, config.poison_val];
        self.set_config(0, &words.map(u32::to_le_bytes).concat())
    }

    /// Says how large the balloon is.
    pub fn set_actual(&mut self, pages: u32) -> Result<()> {
        Ok(self.set_config(Config::ACTUAL, &pages.to_le_bytes())?)
    }

    /// Waits until the device says that its config space has changed.
    pub fn config_changed(&mut self) -> Result<()> {
        let channel = self.channel.as_ref().context("There is no channel")?;
        let message = channel.receive().context("The device does not say that its config has changed")?;
        ensure!(message.request == CONFIG_CHANGE_MSG && message.body.is_empty(), "It says {message:?}");
        ensure!(message.flags & FLAG_NEED_REPLY == 0, "It waits for an answer to {message:?}");
        Ok(())
    }

    /// Waits until the device wants a balloon of this many pages.
    pub fn wait_target(&mut self, pages: u32) -> Result<()> {
        while self.config()?.num_pages != pages {
            self.config_changed().with_context(|| format!("{pages} pages are not wanted"))?;
        }
        Ok(())
    }

    /// Does what a good driver does until the balloon has this size: takes pages from the start of `pfns`, or gives back
    /// the last that it took.
    pub fn follow(&mut self, pfns: &[u64], from: u32, to: u32) -> Result<()> {
        let (from, to) = (from as usize, to as usize);
        if to > from {
            self.inflate_all(pfns[from..to].iter().copied())?;
        } else {
            self.deflate_all(pfns[to..from].iter().copied())?;
        }
        self.set_actual(to as u32)
    }

    /// Checks that the device serves: gives a page and takes it back, which then is this driver's alone.
    pub fn check_serves(&mut self) -> Result<()> {
        let pfn = *self.pages.all().last().context("There is no page")?;
        self.inflate(&[pfn]).context("A good request is not served")?;
        self.deflate(&[pfn]).context("A good request is not served")?;
        self.pages.mark(pfn, 77);
        self.pages.check_marked([pfn], 77)
    }

    /// Adds a region to the guest's memory while it runs.
    pub fn add_memory(&mut self, start: u64, file: SharedMemory) -> Result<()> {
        let region = crate::driver::raw::Region::new(start, file);
        self.device.frontend.add_mem_region(&region.info())?;
        let mut regions = self.pages.memory().regions().to_vec();
        regions.push(region);
        self.pages = Pages::new(Arc::new(GuestMemory::of_regions(regions)));
        Ok(())
    }

    /// Takes the last region away from the guest's memory.
    pub fn remove_memory(&mut self) -> Result<()> {
        let mut regions = self.pages.memory().regions().to_vec();
        let region = regions.pop().context("There is no memory")?;
        self.device.frontend.remove_mem_region(&region.info())?;
        self.pages = Pages::new(Arc::new(GuestMemory::of_regions(regions)));
        Ok(())
    }
}

/// The numbers of pages in 4 bytes each, as the specification says.
pub fn narrow(pfns: &[u64]) -> Vec<u8> {
    pfns.iter().flat_map(|&pfn| (pfn as u32).to_le_bytes()).collect()
}

/// The numbers of pages in 8 bytes each, as Windows' driver sends them.
pub fn wide(pfns: &[u64]) -> Vec<u8> {
    pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect()
}

/// Statistics as they lie in a buffer (virtio 1.3 text, section 5.5.6.3).
pub fn statistics(stats: &[(u16, u64)]) -> Vec<u8> {
    stats.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}
