//! A device connected by hand: guest memory of a chosen layout, negotiated features, and rings to misuse.

use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_driver::{ByteValued, VirtioBlkConfig};

use super::memory::SharedMemory;
use super::ring::{Arena, Placement, RawRing};
use super::wire::WireFrontend;

/// `VHOST_USER_F_PROTOCOL_FEATURES`, negotiated always.
pub const PROTOCOL_FEATURES: u32 = 30;
/// `VHOST_F_LOG_ALL`: log all writes to guest memory.
pub const LOG_ALL: u32 = 26;

/// Longest life of a connection, unless [`RawOptions::life`] says another.
const LIFE_LIMIT: Duration = Duration::from_secs(120);
/// Guest memory that each ring gets: first the ring itself, then its buffers.
const RING_SLICE: u64 = 1 << 20;
/// The part of `RING_SLICE` that holds the ring itself.
const RING_SPACE: u64 = 64 << 10;

/// How the guest's memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One region from address 0.
    One,
    /// Two regions with nothing between 8 MiB and 4 GiB.
    TwoWithGap,
    /// Two regions that touch at 8 MiB, where a buffer can lie across two mappings.
    TwoAdjacent,
    /// One region of this many bytes from address 0.
    Sized(usize),
}

impl Layout {
    /// The first byte behind the first region.
    pub const FIRST_END: u64 = 8 << 20;
    /// Where the second region of [`Layout::TwoWithGap`] starts.
    pub const HIGH: u64 = 4 << 30;

    fn regions(self) -> Vec<(u64, usize)> {
        let half = Self::FIRST_END as usize;
        match self {
            Self::One => vec![(0, 2 * half)],
            Self::TwoWithGap => vec![(0, half), (Self::HIGH, half)],
            Self::TwoAdjacent => vec![(0, half), (Self::FIRST_END, half)],
            Self::Sized(len) => vec![(0, len)],
        }
    }
}

/// A part of the guest's memory, which is a part of a file.
#[derive(Clone, Debug)]
pub struct Region {
    /// The guest address of the first byte.
    pub start: u64,
    /// The file, of which several regions can be parts.
    pub file: Arc<SharedMemory>,
    /// Where in the file the region starts.
    pub offset: usize,
    /// The size in bytes.
    pub len: usize,
}

impl Region {
    /// A whole file.
    pub fn new(start: u64, file: SharedMemory) -> Self {
        Self { start, offset: 0, len: file.len(), file: Arc::new(file) }
    }

    /// The guest addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.start + self.len as u64
    }

    /// The region as vhost-user announces it.
    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.start,
            memory_size: self.len as u64,
            userspace_addr: self.file.address() + self.offset as u64,
            mmap_offset: self.offset as u64,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

/// The guest's memory, by guest address.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Allocates zeroed memory.
    pub fn new(layout: Layout) -> io::Result<Self> {
        let regions = layout
            .regions()
            .into_iter()
            .map(|(address, len)| Ok(Region::new(address, SharedMemory::new(len)?)))
            .collect::<io::Result<_>>()?;
        Ok(Self { regions })
    }

    /// Memory from address 0 on that exists already.
    pub fn of(memory: SharedMemory) -> Self {
        Self { regions: vec![Region::new(0, memory)] }
    }

    /// Memory of any regions.
    pub fn of_regions(regions: Vec<Region>) -> Self {
        Self { regions }
    }

    /// All regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The end of the highest region.
    pub fn end(&self) -> u64 {
        self.regions.iter().map(|region| region.range().end).max().unwrap_or(0)
    }

    /// The regions as vhost-user announces them.
    pub fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.regions.iter().map(Region::info).collect()
    }

    /// The file behind a guest address, the place in it, and the bytes from there to the end of the region.
    pub fn find(&self, address: u64) -> (&SharedMemory, usize, usize) {
        let Some(region) = self.regions.iter().find(|region| region.range().contains(&address)) else {
            panic!("{address:#x} is outside of guest memory");
        };
        let inside = (address - region.start) as usize;
        (&region.file, region.offset + inside, region.len - inside)
    }

    /// The address in this process of a guest address.
    pub fn user_address(&self, address: u64) -> u64 {
        let (memory, offset, _) = self.find(address);
        memory.address() + offset as u64
    }

    /// Copies out, across regions that touch.
    pub fn read(&self, mut address: u64, mut out: &mut [u8]) {
        while !out.is_empty() {
            let (memory, offset, left) = self.find(address);
            let (now, rest) = out.split_at_mut(out.len().min(left));
            memory.read(offset, now);
            address += now.len() as u64;
            out = rest;
        }
    }

    /// Copies out `len` bytes.
    pub fn read_vec(&self, address: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read(address, &mut out);
        out
    }

    /// Copies in, across regions that touch.
    pub fn write(&self, mut address: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let (memory, offset, left) = self.find(address);
            let (now, rest) = data.split_at(data.len().min(left));
            memory.write(offset, now);
            address += now.len() as u64;
            data = rest;
        }
    }

    /// Reads a ring index or flags; see [`SharedMemory::load_u16`].
    pub fn load_u16(&self, address: u64) -> u16 {
        let (memory, offset, _) = self.find(address);
        memory.load_u16(offset)
    }

    /// Writes a ring index or flags; see [`SharedMemory::store_u16`].
    pub fn store_u16(&self, address: u64, value: u16) {
        let (memory, offset, _) = self.find(address);
        memory.store_u16(offset, value);
    }
}

/// What to negotiate. Connecting fails when the daemon does not offer all of it.
#[derive(Clone, Copy, Debug)]
pub struct RawOptions {
    /// The guest's memory.
    pub layout: Layout,
    /// Virtio features, besides [`PROTOCOL_FEATURES`].
    pub features: u64,
    /// Protocol features. With `CONFIGURE_MEM_SLOTS` memory is announced region by region, as QEMU does then.
    pub protocol: VhostUserProtocolFeatures,
    /// Most rings that will be used.
    pub queues: u16,
    /// After this long the connection is ended, in case that something waits for ever.
    pub life: Duration,
}

impl Default for RawOptions {
    fn default() -> Self {
        let features = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        Self {
            layout: Layout::One,
            features: features.iter().fold(0, |mask, bit| mask | 1 << bit),
            protocol: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG,
            queues: 8,
            life: LIFE_LIMIT,
        }
    }
}

impl RawOptions {
    /// What a network driver asks for that can do nothing special: frames as they go over a wire, in chains of any
    /// shape.
    pub fn net() -> Self {
        let features = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC];
        Self { features: features.iter().fold(0, |mask, bit| mask | 1 << bit), ..Self::default() }
    }

    /// What a 9P driver asks for, as Linux does: the mount tag, indirect tables and event indices.
    pub fn ninep() -> Self {
        /// `VIRTIO_9P_MOUNT_TAG`: the config space has the tag.
        const MOUNT_TAG: u32 = 0;
        Self::net().with(MOUNT_TAG)
    }

    /// Asks for one more virtio feature.
    #[must_use]
    pub fn with(mut self, feature: u32) -> Self {
        self.features |= 1 << feature;
        self
    }

    /// Leaves one virtio feature out.
    #[must_use]
    pub fn without(mut self, feature: u32) -> Self {
        self.features &= !(1 << feature);
        self
    }

    /// Asks for more protocol features.
    #[must_use]
    pub fn with_protocol(mut self, features: VhostUserProtocolFeatures) -> Self {
        self.protocol |= features;
        self
    }

    /// Chooses the memory layout.
    #[must_use]
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }
}

/// Ends a connection that lives too long: the stock front end waits for a reply for ever, whatever the socket's timeout.
struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    fn start(stream: UnixStream, limit: Duration) -> Self {
        let (alive, ended) = mpsc::channel();
        std::thread::spawn(move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("A connection is ended because it has lived for {} s", limit.as_secs());
                // An error means that the other side has closed it already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        Self { _alive: alive }
    }
}

/// A negotiated connection, with memory and without rings at first.
pub struct RawDevice {
    /// The stock front end, for every message that it can send.
    pub frontend: Frontend,
    /// The same socket, for every message that it cannot send.
    pub wire: WireFrontend,
    memory: Arc<GuestMemory>,
    features: u64,
    _watchdog: Watchdog,
}

impl RawDevice {
    /// Connects, negotiates, and announces new memory.
    pub fn connect(socket: &Path, options: &RawOptions) -> io::Result<Self> {
        Self::connect_with(socket, options, Arc::new(GuestMemory::new(options.layout)?))
    }

    /// Connects, negotiates, and announces the memory of a guest that was connected before.
    pub fn connect_with(socket: &Path, options: &RawOptions, memory: Arc<GuestMemory>) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let wire = WireFrontend::from_stream(stream.try_clone()?)?;
        let watchdog = Watchdog::start(stream.try_clone()?, options.life);
        let mut frontend = Frontend::from_stream(stream, options.queues.into());

        frontend.set_owner().map_err(io::Error::other)?;
        let offered = frontend.get_features().map_err(io::Error::other)?;
        let features = options.features | 1 << PROTOCOL_FEATURES;
        if offered & features != features {
            let missing = features & !offered;
            return Err(io::Error::other(format!("The daemon does not offer the features {missing:#x}")));
        }
        let offered = frontend.get_protocol_features().map_err(io::Error::other)?;
        if !offered.contains(options.protocol) {
            let missing = options.protocol - offered;
            return Err(io::Error::other(format!("The daemon does not offer {missing:?}")));
        }
        frontend.set_protocol_features(options.protocol).map_err(io::Error::other)?;
        if options.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_features(features).map_err(io::Error::other)?;

        if options.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for region in memory.table() {
                frontend.add_mem_region(&region).map_err(io::Error::other)?;
            }
        } else {
            frontend.set_mem_table(&memory.table()).map_err(io::Error::other)?;
        }
        Ok(Self { frontend, wire, memory, features, _watchdog: watchdog })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The negotiated virtio features.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether a virtio feature was negotiated.
    pub fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Reads `len` bytes of the config space.
    pub fn config(&mut self, offset: u32, len: u32) -> io::Result<Vec<u8>> {
        let request = vec![0; len as usize];
        let (_, bytes) = self
            .frontend
            .get_config(offset, len, VhostUserConfigFlags::WRITABLE, &request)
            .map_err(io::Error::other)?;
        Ok(bytes)
    }

    /// Reads the config space as its fields.
    pub fn blk_config(&mut self) -> io::Result<VirtioBlkConfig> {
        let bytes = self.config(0, size_of::<VirtioBlkConfig>() as u32)?;
        VirtioBlkConfig::from_slice(&bytes)
            .copied()
            .ok_or_else(|| io::Error::other("The config space is too short"))
    }

    /// Where ring `index` lies by default.
    pub fn default_placement(index: usize, size: u16) -> Placement {
        let base = index as u64 * RING_SLICE;
        let avail = base + 16 * u64::from(size);
        // The used ring is aligned to 4 bytes; page alignment keeps it on a dirty-log page of its own.
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4096);
        Placement { size, desc: base, avail, used, base: 0 }
    }

    /// Starts ring `index` at its default place, with the rest of its slice of memory for buffers.
    pub fn ring(&mut self, index: usize, size: u16) -> io::Result<RawRing> {
        self.ring_at(index, Self::default_placement(index, size))
    }

    /// Starts ring `index` anywhere.
    pub fn ring_at(&mut self, index: usize, placement: Placement) -> io::Result<RawRing> {
        let ring = self.lay_out(index, placement)?;
        self.start(index, &ring)?;
        Ok(ring)
    }

    /// Lays out ring `index` anywhere, without a word to the daemon.
    pub fn lay_out(&self, index: usize, placement: Placement) -> io::Result<RawRing> {
        let arena = Arena::new(index as u64 * RING_SLICE + RING_SPACE, RING_SLICE - RING_SPACE);
        RawRing::new(Arc::clone(&self.memory), placement, self.has(VIRTIO_RING_F_EVENT_IDX), arena)
    }

    /// Announces `ring` as ring `index` and enables it, from the ring's own position on.
    pub fn start(&mut self, index: usize, ring: &RawRing) -> io::Result<()> {
        self.start_from(index, ring, ring.placement().base)
    }

    /// The same from avail index `base` on, for a ring whose driver has not looked at all that the device did.
    pub fn start_from(&mut self, index: usize, ring: &RawRing, base: u16) -> io::Result<()> {
        self.announce(index, ring, base)?;
        self.frontend.set_vring_enable(index, true).map_err(io::Error::other)
    }

    /// Announces `ring` as ring `index`, from avail index `base` on, without enabling it.
    pub fn announce(&mut self, index: usize, ring: &RawRing, base: u16) -> io::Result<()> {
        let placement = ring.placement();
        let config = self.vring_config(&placement);
        let frontend = &mut self.frontend;
        frontend
            .set_vring_num(index, placement.size)
            .and_then(|()| frontend.set_vring_base(index, base))
            .and_then(|()| frontend.set_vring_addr(index, &config))
            .and_then(|()| frontend.set_vring_call(index, ring.call()))
            .and_then(|()| frontend.set_vring_kick(index, ring.kick_fd()))
            .map_err(io::Error::other)
    }

    /// What `SET_VRING_ADDR` says of a ring at `placement`.
    pub fn vring_config(&self, placement: &Placement) -> VringConfigData {
        VringConfigData {
            queue_max_size: placement.size,
            queue_size: placement.size,
            flags: 0,
            desc_table_addr: self.memory.user_address(placement.desc),
            used_ring_addr: self.memory.user_address(placement.used),
            avail_ring_addr: self.memory.user_address(placement.avail),
            log_addr: None,
        }
    }
}
