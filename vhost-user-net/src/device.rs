//! What all queues of a network interface share: features, address, link, filter, counters.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;
use vhost_user_daemon::device::read_config_space;
use vhost_user_daemon::throttle::Limits;
use vhost_user_daemon::{ConfigNotifier, Device, Network, RING_FEATURES, info_limited, warn_limited};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MQ,
};

use zerocopy::IntoBytes;

use crate::config::{NetConfig, STATUS_ANNOUNCE, STATUS_LINK_UP};
use crate::counters::Counters;
use crate::features::{self, Features};
use crate::filter::Filter;
use crate::pcap::Capture;
use crate::port::peer::Peer;
use crate::port::tap::Tap;
use crate::switch::{Member, Switch};
use crate::vnet::Offloads;
use crate::worker::NicWorker;
use vhost_user_daemon::poller::Doorbell;

/// Where the address lies in the configuration space; the only field that a driver may write, if it is a legacy one.
const MAC_BYTES: usize = 6;

/// Guests that wait to be announced: one, unless the front end does not know what it wants.
const MAX_ANNOUNCEMENTS: usize = 16;

/// Mbit/s that a guest is told if there is no limit: taps and unix sockets have no speed of their own.
const SPEED: u32 = 10_000;

/// How an interface is offered.
#[derive(Clone, Debug)]
pub struct NicOptions {
    /// The address that the guest shall use; without one, its front end or driver chooses.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the guest shall use.
    pub mtu: Option<u16>,
    /// Pairs of queues, each with a worker of its own.
    pub queue_pairs: u16,
    /// Largest queue size, a power of two.
    pub queue_size: u16,
    /// What may be offered, as far as the port can do it.
    pub offloads: Offloads,
    /// What the guest may receive in a second.
    pub rx_limits: Limits,
    /// What it may transmit.
    pub tx_limits: Limits,
}

/// What an interface is attached to.
pub enum Attachment {
    /// A tap or macvtap.
    Tap(Arc<Tap>),
    /// A process at the other end of a unix socket. Taken by the worker of the first pair, and put back when the front end
    /// leaves.
    Peer(Mutex<Option<Box<Peer>>>),
    /// A switch inside this process.
    Switch {
        /// The switch.
        switch: Arc<Switch>,
        /// The number of this guest's port.
        port: usize,
        /// The port's receive side.
        member: Arc<Member>,
    },
}

/// A network interface of a guest.
pub struct Nic {
    options: NicOptions,
    attachment: Attachment,
    notifier: ConfigNotifier,
    counters: Arc<Counters>,
    capture: Option<Arc<Capture>>,
    /// What the port can do with frames of the guest, and the guest with frames of the port.
    offered: Features,
    /// What the driver took.
    features: AtomicU64,
    /// What it can receive at the moment, in bits of [`Offloads`].
    receivable: AtomicU32,
    /// Pairs that the driver uses, as far as it says so by the control queue.
    active_pairs: AtomicU16,
    /// The driver's control queue has been seen running.
    controlled: AtomicBool,
    link_up: AtomicBool,
    announce: AtomicBool,
    filter: Mutex<Arc<Filter>>,
    /// Changes with the filter.
    filter_generation: AtomicU32,
    /// Guests that were migrated here and have to be announced.
    announcements: Mutex<Vec<[u8; 6]>>,
    doorbells: Mutex<Vec<Option<Doorbell>>>,
}

impl Nic {
    /// Offers an interface on `attachment`.
    pub fn new(
        options: NicOptions,
        attachment: Attachment,
        notifier: ConfigNotifier,
        counters: Arc<Counters>,
        capture: Option<Arc<Capture>>,
    ) -> Self {
        let (send, receive) = match &attachment {
            // The kernel takes whatever taps can give, and USO like that since the same release.
            Attachment::Tap(tap) => (Offloads::all() & tap.supported_offloads(), tap.supported_offloads()),
            Attachment::Peer(_) => (Offloads::CSUM, Offloads::empty()),
            Attachment::Switch { .. } => (Offloads::all() - Offloads::UFO, Offloads::all() - Offloads::UFO),
        };
        let mut offered = RING_FEATURES
            | features::ALWAYS.0
            | Features::offering(send & options.offloads, receive & options.offloads).0;
        for (bit, wanted) in [
            (features::MAC, options.mac.is_some()),
            (features::MTU, options.mtu.is_some()),
            (features::MQ, options.queue_pairs > 1),
        ] {
            offered |= if wanted { bit.0 } else { 0 };
        }
        let pairs = options.queue_pairs;
        let nic = Self {
            offered: Features(offered),
            link_up: AtomicBool::new(match &attachment {
                Attachment::Tap(tap) => tap.is_up(),
                Attachment::Peer(_) => false,
                Attachment::Switch { .. } => true,
            }),
            filter: Mutex::new(Arc::new(Filter::new(options.mac.unwrap_or_default(), false))),
            options,
            attachment,
            notifier,
            counters,
            capture,
            features: AtomicU64::new(0),
            receivable: AtomicU32::new(0),
            active_pairs: AtomicU16::new(pairs),
            controlled: AtomicBool::new(false),
            announce: AtomicBool::new(false),
            filter_generation: AtomicU32::new(0),
            announcements: Mutex::default(),
            doorbells: Mutex::new(vec![None; pairs.into()]),
        };
        nic.reset();
        nic
    }

    /// How it is offered.
    pub fn options(&self) -> &NicOptions {
        &self.options
    }

    /// What it is attached to.
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }

    /// What passed, and what did not.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Where frames are recorded.
    pub fn capture(&self) -> Option<&Arc<Capture>> {
        self.capture.as_ref()
    }

    /// What the driver took.
    pub fn acked(&self) -> Features {
        Features(self.features.load(Ordering::Relaxed))
    }

    /// What the guest can receive at the moment.
    pub fn receivable(&self) -> Offloads {
        Offloads::from_bits_truncate(self.receivable.load(Ordering::Relaxed))
    }

    /// Pairs that the driver uses.
    pub fn active_pairs(&self) -> usize {
        self.active_pairs.load(Ordering::Relaxed).into()
    }

    /// The control queue, if the driver has one.
    pub fn control_queue(&self) -> Option<usize> {
        self.acked().control_queue(self.options.queue_pairs)
    }

    /// The filter that the driver set up, if it was offered to: front ends such as QEMU have one of their own.
    pub fn filter(&self) -> Option<Arc<Filter>> {
        let acked = self.acked();
        (acked.has(VIRTIO_NET_F_CTRL_VQ)
            && (acked.has(VIRTIO_NET_F_CTRL_RX) || acked.has(VIRTIO_NET_F_CTRL_VLAN)))
        .then(|| Arc::clone(&lock(&self.filter)))
    }

    /// Changes whenever [`Nic::filter`] does.
    pub fn filter_generation(&self) -> u32 {
        self.filter_generation.load(Ordering::Acquire)
    }

    /// Changes the filter, and lets the workers know.
    pub fn update_filter<T>(&self, change: impl FnOnce(&mut Filter) -> T) -> T {
        let result = change(Arc::make_mut(&mut lock(&self.filter)));
        self.filter_generation.fetch_add(1, Ordering::Release);
        // Some look at it only when they are woken.
        self.ring_doorbells();
        result
    }

    /// The control queue runs. From now on it says how many pairs are in use, beginning with one (section 5.1.6.5.6). It
    /// does not run if the front end has taken the feature, but serves that queue itself, as Cloud Hypervisor does.
    pub fn control_runs(&self) {
        if !self.controlled.swap(true, Ordering::Relaxed) && self.acked().has(VIRTIO_NET_F_MQ) {
            self.set_active_pairs(1);
        }
    }

    /// The driver uses `pairs` pairs from now on. `false` if there are not as many.
    pub fn set_active_pairs(&self, pairs: u16) -> bool {
        if !(1..=self.options.queue_pairs).contains(&pairs) {
            return false;
        }
        self.active_pairs.store(pairs, Ordering::Relaxed);
        self.ring_doorbells();
        true
    }

    /// The driver can receive what these bits say from now on. `false` if one was not negotiated, or that does not work.
    pub fn set_receivable(&self, bits: Features) -> bool {
        bits.0 & !self.acked().guest_bits().0 == 0 && self.apply_receivable(bits.receivable())
    }

    /// Sets everything up for a driver that took these features, as if it were new.
    fn take_features(&self, acked: Features) {
        self.features.store(acked.0, Ordering::SeqCst);
        if let Attachment::Tap(tap) = &self.attachment
            && let Err(error) = tap.set_header_len(acked.header_len())
        {
            warn!("{} does not take headers of {} bytes: {error}", tap.name(), acked.header_len());
        }
        self.apply_receivable(acked.receivable());
        self.active_pairs.store(self.options.queue_pairs, Ordering::Relaxed);
        self.controlled.store(false, Ordering::Relaxed);
        let filters_vlans = acked.has(VIRTIO_NET_F_CTRL_VLAN);
        self.update_filter(|filter| {
            *filter = Filter::new(self.options.mac.unwrap_or_default(), filters_vlans);
        });
    }

    fn apply_receivable(&self, offloads: Offloads) -> bool {
        // To set them takes a lock that all interfaces of the host share.
        if self.receivable.swap(offloads.bits(), Ordering::Relaxed) == offloads.bits() {
            return true;
        }
        if let Attachment::Tap(tap) = &self.attachment
            && let Err(error) = tap.set_offloads(offloads)
        {
            warn_limited!("The offloads of {} cannot be set to {offloads:?}: {error}", tap.name());
            return false;
        }
        true
    }

    /// The port can or cannot pass frames any more.
    pub fn set_link(&self, up: bool) {
        if self.link_up.swap(up, Ordering::SeqCst) != up {
            info_limited!("The link is {}", if up { "up" } else { "down" });
            self.notifier.notify();
        }
    }

    /// Whether frames can pass, as far as the guest was told.
    pub fn is_link_up(&self) -> bool {
        self.link_up.load(Ordering::SeqCst)
    }

    /// The driver has announced itself.
    pub fn announced(&self) {
        self.announce.store(false, Ordering::SeqCst);
    }

    /// The peer, for the worker that serves it.
    pub fn take_peer(&self) -> Option<Box<Peer>> {
        if let Attachment::Peer(peer) = &self.attachment { lock(peer).take() } else { None }
    }

    /// Keeps the peer for the next worker: a front end that comes back finds the connection as it was.
    pub fn return_peer(&self, returned: Box<Peer>) {
        if let Attachment::Peer(peer) = &self.attachment {
            *lock(peer) = Some(returned);
        }
    }

    /// Guests to be announced, and forgotten here.
    pub fn take_announcements(&self) -> Vec<[u8; 6]> {
        std::mem::take(&mut *lock(&self.announcements))
    }

    fn ring_doorbells(&self) {
        lock(&self.doorbells).iter().flatten().for_each(Doorbell::ring);
    }

    fn config(&self) -> NetConfig {
        let mut status = 0;
        if self.is_link_up() {
            status |= STATUS_LINK_UP;
        }
        if self.announce.load(Ordering::SeqCst) {
            status |= STATUS_ANNOUNCE;
        }
        let limit = self.options.tx_limits.bytes.as_ref().map(|rate| rate.per_second.get() * 8 / 1_000_000);
        let speed = limit.map_or(SPEED, |limit| limit.clamp(1, SPEED.into()) as u32);
        NetConfig::new(
            self.options.mac.unwrap_or_default(),
            status,
            self.options.queue_pairs,
            self.options.mtu.unwrap_or_default(),
            speed,
        )
    }
}

impl Device for Nic {
    type Worker = NicWorker;

    /// The pairs, and the control queue behind them.
    fn num_queues(&self) -> usize {
        2 * usize::from(self.options.queue_pairs) + 1
    }

    fn queues_flag(&self) -> &'static str {
        "--num-queue-pairs"
    }

    fn queues_per_worker(&self) -> usize {
        2
    }

    fn keeps_order(&self) -> bool {
        true
    }

    fn network(&self) -> Option<&dyn Network> {
        Some(self)
    }

    fn max_queue_size(&self) -> u16 {
        self.options.queue_size
    }

    fn features(&self) -> u64 {
        self.offered.0
    }

    fn set_features(&self, features: u64) {
        // Set again when migration begins, while frames pass.
        if self.acked() != Features(features) {
            self.take_features(Features(features));
        }
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_space(self.config().as_bytes(), offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> bool {
        let Ok(mac) = <[u8; MAC_BYTES]>::try_from(data) else { return false };
        if offset != 0 || self.acked().has(VIRTIO_F_VERSION_1) {
            return false;
        }
        self.update_filter(|filter| filter.set_mac(mac));
        true
    }

    fn reset(&self) {
        self.take_features(Features(0));
        self.announced();
    }

    fn new_worker(self: &Arc<Self>, index: usize) -> io::Result<NicWorker> {
        let worker = NicWorker::new(Arc::clone(self), index)?;
        if let Some(doorbell) = lock(&self.doorbells).get_mut(index) {
            *doorbell = Some(worker.doorbell());
        }
        Ok(worker)
    }
}

impl Network for Nic {
    fn announce(&self, mac: [u8; 6]) {
        let acked = self.acked();
        if acked.has(VIRTIO_NET_F_GUEST_ANNOUNCE) && acked.has(VIRTIO_NET_F_CTRL_VQ) {
            self.announce.store(true, Ordering::SeqCst);
            self.notifier.notify();
        }
        let mut announcements = lock(&self.announcements);
        // Told again and again by a front end, while no worker takes notice, this is once.
        if announcements.len() < MAX_ANNOUNCEMENTS && !announcements.contains(&mac) {
            announcements.push(mac);
        }
        drop(announcements);
        self.ring_doorbells();
    }

    fn set_mtu(&self, mtu: u16) -> Result<(), String> {
        match &self.attachment {
            Attachment::Tap(tap) if tap.mtu().is_ok_and(|now| now < mtu.into()) => {
                tap.set_mtu(mtu).map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    }
}

/// The lock, also after a panic of somebody else.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
