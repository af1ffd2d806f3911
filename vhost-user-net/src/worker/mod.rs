//! Both queues of a pair, or the control queue: pop, pass on, complete.
//!
//! One thread serves both directions: what answers a frame is mostly there by the time the frame is passed on, and is then
//! found without another wake-up.

mod control;
mod peer;
mod switch;
mod tap;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use vhost_user_daemon::throttle::Throttle;
use vhost_user_daemon::{Chain, Progress, SharedRing, Source, Worker};

use crate::counters::Tally;
use crate::device::{Attachment, Nic};
use crate::ethernet::START_LEN;
use crate::features::Features;
use crate::filter::Filter;
use crate::pcap::Capture;
use crate::transmit::{Batched, admit};
use vhost_user_daemon::poller::{Doorbell, Interest, Poller};

/// Frames received before the other direction has its turn.
const BUDGET: usize = 64;

/// Serves the queues of one pair, or the control queue.
pub struct NicWorker {
    first_queue: usize,
    poller: Poller,
    port: Port,
    receive: Received,
    transmit: Batched,
    /// Commands of the driver take locks of the host.
    control_throttle: Throttle,
    /// When the next one may be carried out.
    control_wait: Option<Instant>,
    state: State,
}

/// What both directions need.
struct State {
    nic: Arc<Nic>,
    features: Features,
    rx_throttle: Throttle,
    tx_throttle: Throttle,
    tally: Tally,
    capture: Option<Arc<Capture>>,
    filter: Option<Arc<Filter>>,
    filter_generation: Option<u32>,
}

/// The host side of a pair.
enum Port {
    Tap(tap::TapPair),
    Peer(peer::PeerPair),
    Switch(switch::SwitchPair),
    /// None: this worker has the control queue, or a pair that its port does not have.
    None,
}

/// How far receiving got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Received {
    /// There may be more.
    Some,
    /// The port has nothing.
    Empty,
    /// The guest has posted no buffers.
    Starved,
    /// Other threads fill the guest's buffers: there is nothing to wait for.
    Elsewhere,
    /// The ring does not run.
    Stopped,
    /// The rate limit is reached: try again then.
    Throttled(Instant),
}

impl NicWorker {
    /// The worker of pair `index`, or of the control queue behind the pairs.
    pub fn new(nic: Arc<Nic>, index: usize) -> io::Result<Self> {
        let has_pair = index < nic.options().queue_pairs.into();
        let port = match nic.attachment() {
            _ if !has_pair => Port::None,
            Attachment::Tap(tap) => Port::Tap(tap::TapPair::new(Arc::clone(tap), index)),
            Attachment::Peer(_) => Port::Peer(peer::PeerPair::new(&nic)),
            Attachment::Switch { switch, port, member } => {
                Port::Switch(switch::SwitchPair::new(Arc::clone(switch), *port, Arc::clone(member), index))
            }
        };
        let options = nic.options();
        let mut worker = Self {
            first_queue: 2 * index,
            poller: Poller::new()?,
            port,
            receive: Received::Stopped,
            transmit: Batched::Empty,
            control_throttle: Throttle::new(&control::LIMITS),
            control_wait: None,
            state: State {
                features: Features::default(),
                rx_throttle: Throttle::new(&options.rx_limits),
                tx_throttle: Throttle::new(&options.tx_limits),
                tally: Tally::default(),
                capture: nic.capture().cloned(),
                filter: None,
                filter_generation: None,
                nic,
            },
        };
        worker.port.connect(&mut worker.poller);
        worker.arm();
        Ok(worker)
    }

    /// The way to wake it.
    pub fn doorbell(&self) -> Doorbell {
        self.poller.doorbell()
    }

    /// Waits for what either direction waits for.
    fn arm(&mut self) {
        let throttled = |batched| if let Batched::Throttled(at) = batched { Some(at) } else { None };
        let received = |received| if let Received::Throttled(at) = received { Some(at) } else { None };
        let at =
            [throttled(self.transmit), received(self.receive), self.port.next_retry(), self.control_wait];
        let interest = Interest {
            read: self.receive == Received::Empty,
            write: self.transmit == Batched::Blocked || self.port.wants_to_write(),
            at: at.into_iter().flatten().min(),
        };
        self.poller.arm(self.port.fd(), interest);
        self.poller.watch(self.port.control_fd(), interest.read);
    }
}

impl Worker for NicWorker {
    fn pass(&mut self, rings: &[SharedRing]) -> Progress {
        let called = self.poller.acknowledge();
        let state = &mut self.state;
        state.refresh();
        let mut busy = false;
        let control = state.nic.control_queue();
        if let Some(ring) = control.and_then(|queue| rings.get(queue.wrapping_sub(self.first_queue))) {
            let ring = &mut *ring.lock();
            if ring.is_running() {
                state.nic.control_runs();
            }
            self.control_wait = None;
            match control::serve(ring, &state.nic, &mut self.control_throttle) {
                Ok(any) => busy |= any,
                Err(again) => self.control_wait = Some(again),
            }
        }
        self.port.connect(&mut self.poller);
        if called && self.first_queue == 0 {
            for mac in state.nic.take_announcements() {
                self.port.announce(mac, state.features.header_len());
            }
        }
        if let [receive, transmit] = rings
            && control != Some(self.first_queue)
        {
            if self.receive == Received::Stopped {
                // Whoever sees that the guest transmits may answer: it has to be ready to receive by then.
                self.receive = self.port.receive(receive, state);
            }
            self.transmit = self.port.transmit(transmit, state);
            self.receive = self.port.receive(receive, state);
            busy |= self.transmit == Batched::Sent || self.receive == Received::Some;
        }
        state.nic.counters().take(&mut state.tally);
        if busy { Progress::Busy } else { Progress::Idle }
    }

    fn rest(&mut self, rings: &[SharedRing]) -> bool {
        let control = self.state.nic.control_queue();
        let mut more = false;
        for (offset, ring) in rings.iter().enumerate() {
            let waits_for_kick = if control == Some(self.first_queue + offset) {
                self.control_wait.is_none()
            } else if offset == 0 {
                self.receive == Received::Starved
            } else {
                self.transmit == Batched::Empty
            };
            more |= waits_for_kick && ring.lock().enable_notifications();
        }
        if let Some(capture) = &self.state.capture {
            capture.flush();
        }
        self.arm();
        more
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }
}

impl State {
    /// Takes notice of what the driver has changed.
    fn refresh(&mut self) {
        self.features = self.nic.acked();
        let generation = self.nic.filter_generation();
        if self.filter_generation != Some(generation) {
            self.filter_generation = Some(generation);
            self.filter = self.nic.filter();
        }
    }

    /// Whether the guest wants the frame whose beginning `copy` puts into a buffer.
    fn is_wanted(&self, copy: impl FnOnce(&mut [u8]) -> usize) -> bool {
        self.filter.as_ref().is_none_or(|filter| {
            let mut start = [0; START_LEN];
            let len = copy(&mut start);
            filter.accepts(&start[..len])
        })
    }

    /// Asks the rate limit of received frames.
    fn admit_rx(&mut self, len: usize) -> Result<(), Instant> {
        admit(&mut self.rx_throttle, len)
    }

    /// Records a frame, if frames are recorded.
    fn record(&self, frame: Source<'_>) {
        record(self.capture.as_ref(), frame);
    }
}

/// Records a frame, if there is a capture.
fn record(capture: Option<&Arc<Capture>>, mut frame: Source<'_>) {
    if let Some(capture) = capture {
        capture.frame_with(frame.len(), |start| frame.read(start));
    }
}

/// The frame in a chain that was transmitted, behind its header.
fn frame_of(chain: &Chain, header_len: usize) -> Source<'_> {
    let mut frame = chain.source();
    frame.skip(header_len);
    frame
}

impl Port {
    fn transmit(&mut self, ring: &SharedRing, state: &mut State) -> Batched {
        let ring = &mut *ring.lock();
        let batched = match self {
            Self::Tap(pair) => pair.transmit(ring, state),
            Self::Peer(pair) => pair.transmit(ring, state),
            Self::Switch(pair) => pair.transmit(ring, state),
            Self::None => Batched::Empty,
        };
        ring.publish();
        batched
    }

    fn receive(&mut self, ring: &SharedRing, state: &mut State) -> Received {
        match self {
            Self::Tap(pair) => pair.receive(ring, state),
            Self::Peer(pair) => pair.receive(ring, state),
            Self::Switch(pair) => pair.receive(ring, state),
            Self::None => Received::Stopped,
        }
    }

    /// Connects to what is not connected, if it is time.
    fn connect(&mut self, poller: &mut Poller) {
        if let Self::Peer(pair) = self {
            pair.connect(poller);
        }
    }

    /// Tells the network that the guest with this address is here.
    fn announce(&mut self, mac: [u8; 6], header_len: usize) {
        let frame = rarp(mac);
        match self {
            Self::Tap(pair) => pair.send(&frame, header_len),
            Self::Peer(pair) => pair.send(&frame),
            Self::Switch(pair) => pair.send(&frame),
            Self::None => {}
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tap(pair) => Some(pair.fd()),
            Self::Peer(pair) => pair.fd(),
            Self::Switch(_) | Self::None => None,
        }
    }

    fn control_fd(&self) -> Option<BorrowedFd<'_>> {
        if let Self::Peer(pair) = self { pair.control_fd() } else { None }
    }

    fn next_retry(&self) -> Option<Instant> {
        if let Self::Peer(pair) = self { pair.next_retry() } else { None }
    }

    fn wants_to_write(&self) -> bool {
        matches!(self, Self::Peer(pair) if pair.wants_to_write())
    }
}

/// A reverse ARP request of `mac` for itself, which teaches switches where it is (RFC 903).
fn rarp(mac: [u8; 6]) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    for at in [6, 22, 32] {
        frame[at..at + 6].copy_from_slice(&mac);
    }
    frame[12..14].copy_from_slice(&[0x80, 0x35]);
    // Ethernet, IPv4, their address lengths, request reverse.
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]);
    frame
}
