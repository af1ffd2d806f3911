//! The port of a switch to the outside: a tap, or a peer behind a unix socket. It has a thread for what comes in.
#![expect(unsafe_code, reason = "system calls on guest memory")]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use libc::iovec;
use log::error;
use vhost_user_daemon::{Source, warn_limited};
use zerocopy::{FromZeros, IntoBytes};

use super::{Burst, Sender, Switch};
use crate::counters::{Counter, Counters, Tally};
use crate::offload::checksum;
use crate::pcap::Capture;
use crate::port::peer::{Fill, Flush, Peer};
use crate::port::tap::Tap;
use crate::receive::MAX_FRAME;
use crate::vnet::{FLAG_NEEDS_CSUM, HEADER_LEN, Offloads, VnetHeader};
use vhost_user_daemon::poller::{Doorbell, Interest, Poller};

/// Frames taken in before they are shown to their receivers.
const BUDGET: usize = 64;

/// What is at the other end.
pub enum UplinkPort {
    /// A tap with one queue.
    Tap(Tap),
    /// A peer.
    Peer(Box<Peer>),
}

/// The port to the outside.
pub struct Uplink {
    port: Port,
    counters: Arc<Counters>,
    capture: Option<Arc<Capture>>,
    poller: Mutex<Option<Poller>>,
    doorbell: Doorbell,
}

enum Port {
    Tap(Tap),
    Peer(Mutex<Box<Peer>>),
}

/// The port, in the hands of a thread that has frames for it.
pub(super) struct UplinkLane<'a> {
    uplink: &'a Uplink,
    peer: Option<MutexGuard<'a, Box<Peer>>>,
    /// It takes no more for now, and is not asked again.
    blocked: bool,
    tally: Tally,
    iovecs: Vec<iovec>,
}

impl Uplink {
    /// A port to the outside. A tap is set up to take and give all that the switch can, and to be read from.
    pub fn new(port: UplinkPort, counters: Arc<Counters>, capture: Option<Arc<Capture>>) -> io::Result<Self> {
        let port = match port {
            UplinkPort::Tap(tap) => {
                tap.set_offloads(tap.supported_offloads() - Offloads::UFO)?;
                tap.set_queue_enabled(0, true)?;
                Port::Tap(tap)
            }
            UplinkPort::Peer(peer) => Port::Peer(Mutex::new(peer)),
        };
        let poller = Poller::new()?;
        Ok(Self { port, counters, capture, doorbell: poller.doorbell(), poller: Mutex::new(Some(poller)) })
    }

    /// Starts the thread that takes in frames, as port `index` of `switch`. To be called once.
    pub fn start(self: &Arc<Self>, switch: Arc<Switch>, index: usize) -> io::Result<()> {
        let poller = self.poller.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut poller = poller.ok_or(io::ErrorKind::AlreadyExists)?;
        let uplink = Arc::clone(self);
        let mut sender = Sender::new(switch, index, 0);
        thread::Builder::new().name("uplink".into()).spawn(move || {
            let mut buffer = vec![0; HEADER_LEN + MAX_FRAME];
            loop {
                poller.acknowledge();
                let interest = uplink.take_in(&mut sender, &mut buffer, &mut poller);
                let Some(interest) = interest else { continue };
                if let Some(capture) = &uplink.capture {
                    capture.flush();
                }
                uplink.arm(&mut poller, interest);
                if let Err(error) = poller.wait() {
                    error!("The port to the outside is dead: {error}");
                    return;
                }
            }
        })?;
        Ok(())
    }

    fn arm(&self, poller: &mut Poller, interest: Interest) {
        match &self.port {
            Port::Tap(tap) => poller.arm(Some(tap.queue_fd(0)), interest),
            Port::Peer(peer) => {
                let peer = lock(peer);
                poller.arm(peer.fd(), interest);
                poller.watch(peer.control_fd(), interest.read);
            }
        }
    }

    /// Takes in some frames. Says what to wait for, or `None` if there are more.
    fn take_in(&self, sender: &mut Sender, buffer: &mut [u8], poller: &mut Poller) -> Option<Interest> {
        let mut tally = Tally::default();
        let interest = match &self.port {
            Port::Tap(tap) => self.take_from_tap(tap, &mut sender.burst(), buffer, &mut tally),
            Port::Peer(peer) => self.take_from_peer(peer, &mut sender.burst(), poller, &mut tally),
        };
        self.counters.take(&mut tally);
        interest
    }

    fn take_from_tap(
        &self,
        tap: &Tap,
        burst: &mut Burst<'_>,
        buffer: &mut [u8],
        tally: &mut Tally,
    ) -> Option<Interest> {
        for _ in 0..BUDGET {
            let room = iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            // SAFETY: the buffer is ours for the time of the call.
            match unsafe { tap.read(0, &[room]) } {
                Ok(total) if total >= HEADER_LEN => {
                    let mut header = VnetHeader::new_zeroed();
                    header.as_mut_bytes().copy_from_slice(&buffer[..HEADER_LEN]);
                    self.pass_on(burst, &header, &buffer[HEADER_LEN..total], tally);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Some(Interest { read: true, ..Interest::default() });
                }
                Err(error) if Tap::is_gone(&error) => {
                    error!("Interface {} was deleted: start the daemon again when it is back", tap.name());
                    return Some(Interest::default());
                }
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    warn_limited!("A frame cannot be read from {}: {error}", tap.name());
                }
                _ => {}
            }
        }
        None
    }

    fn take_from_peer(
        &self,
        peer: &Mutex<Box<Peer>>,
        burst: &mut Burst<'_>,
        poller: &mut Poller,
        tally: &mut Tally,
    ) -> Option<Interest> {
        let mut peer = lock(peer);
        if !peer.is_connected() {
            poller.forget_port();
            if !peer.connect(Instant::now()) {
                return Some(Interest { at: peer.next_retry(), ..Interest::default() });
            }
        }
        let blocked = peer.flush() == Flush::Blocked;
        for _ in 0..BUDGET {
            while peer.frame().is_none() {
                match peer.fill() {
                    Fill::Some => {}
                    Fill::Empty => return Some(Interest { read: true, write: blocked, at: None }),
                    // Looked at again at once.
                    Fill::Disconnected => return None,
                }
            }
            if let Some(frame) = peer.frame() {
                self.pass_on(burst, &VnetHeader::default(), frame, tally);
            }
            peer.consume();
        }
        None
    }

    fn pass_on(&self, burst: &mut Burst<'_>, header: &VnetHeader, frame: &[u8], tally: &mut Tally) {
        if let Some(capture) = &self.capture {
            let mut source = Source::new(frame);
            capture.frame_with(frame.len(), |start| source.read(start));
        }
        match burst.forward(header, Source::new(frame), tally) {
            Ok(()) => tally.transmitted(frame.len()),
            Err(reason) => tally.count(reason),
        }
    }

    /// The port, for a thread that has frames for it.
    pub(super) fn lock(&self) -> UplinkLane<'_> {
        let peer = if let Port::Peer(peer) = &self.port { Some(lock(peer)) } else { None };
        UplinkLane { uplink: self, peer, blocked: false, tally: Tally::default(), iovecs: Vec::new() }
    }
}

impl UplinkLane<'_> {
    /// What may be left undone in frames that leave here.
    pub(super) fn receivable(&self) -> Offloads {
        match &self.uplink.port {
            Port::Tap(tap) => tap.supported_offloads(),
            // Filled in while the frame is copied.
            Port::Peer(_) => Offloads::CSUM,
        }
    }

    /// Lets a frame leave, or counts why not.
    pub(super) fn send(&mut self, header: &VnetHeader, pieces: [Source<'_>; 2]) {
        let len = pieces[0].len() + pieces[1].len();
        let result = match (&self.uplink.port, &mut self.peer) {
            (Port::Tap(tap), _) => write_to_tap(tap, header, pieces, &mut self.iovecs),
            (_, Some(_)) if self.blocked => Err(Counter::RxNoBuffer),
            (_, Some(peer)) => put_into_peer(peer, header, pieces).inspect_err(|reason| {
                self.blocked = *reason == Counter::RxNoBuffer;
            }),
            _ => Err(Counter::RxImpossible),
        };
        match result {
            Ok(()) => self.tally.received(len),
            Err(reason) => self.tally.count(reason),
        }
    }

    /// Counts a frame that cannot be made fit for the other side.
    pub(super) fn refuse(&mut self) {
        self.tally.count(Counter::RxImpossible);
    }

    /// Sends what was collected.
    pub(super) fn end(&mut self) {
        if let Some(peer) = &mut self.peer
            && peer.is_connected()
            && peer.flush() != Flush::Done
        {
            // It is for the thread of the port to wait.
            self.uplink.doorbell.ring();
        }
        self.uplink.counters.take(&mut self.tally);
    }
}

fn write_to_tap(
    tap: &Tap,
    header: &VnetHeader,
    pieces: [Source<'_>; 2],
    iovecs: &mut Vec<iovec>,
) -> Result<(), Counter> {
    let bytes = header.as_bytes();
    iovecs.clear();
    iovecs.push(iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
    iovecs.extend(pieces.iter().flat_map(Source::iovecs));
    // SAFETY: the header lives until the call is over, and so do the sources, which keep mapped what they point to.
    match unsafe { tap.write(0, iovecs) } {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.raw_os_error() {
            Some(libc::EAGAIN) => Counter::RxNoBuffer,
            Some(libc::EIO) => Counter::RxLinkDown,
            _ => Counter::RxImpossible,
        }),
    }
}

fn put_into_peer(peer: &mut Peer, header: &VnetHeader, mut pieces: [Source<'_>; 2]) -> Result<(), Counter> {
    if !peer.is_connected() {
        return Err(Counter::RxLinkDown);
    }
    let len = pieces[0].len() + pieces[1].len();
    for _ in 0..2 {
        let Some(place) = peer.reserve(len) else {
            match peer.flush() {
                Flush::Done => continue,
                // It does not read fast enough; nobody waits for it.
                Flush::Blocked => return Err(Counter::RxNoBuffer),
                Flush::Disconnected => return Err(Counter::RxLinkDown),
            }
        };
        let mut done = 0;
        for piece in &mut pieces {
            done += piece.read(&mut place[done..]);
        }
        if header.flags & FLAG_NEEDS_CSUM != 0 && checksum::complete(place, header).is_err() {
            return Err(Counter::RxImpossible);
        }
        peer.commit();
        return Ok(());
    }
    Err(Counter::RxTooLong)
}

fn lock(peer: &Mutex<Box<Peer>>) -> MutexGuard<'_, Box<Peer>> {
    peer.lock().unwrap_or_else(PoisonError::into_inner)
}
