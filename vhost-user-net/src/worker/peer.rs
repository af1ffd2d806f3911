//! A pair on a peer behind a unix socket: frames are collected in private buffers, many to a system call.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use vhost_user_daemon::{Ring, SharedRing, Source};
use zerocopy::{FromZeros, IntoBytes};

use super::{BUDGET, Received, State, record};
use crate::counters::Counter;
use crate::device::Nic;
use crate::offload::checksum;
use crate::port::peer::{Fill, Flush, Peer};
use crate::receive::{NotReceived, Receiver};
use crate::transmit::{Batched, Sent, Transmitter};
use crate::vnet::{FLAG_NEEDS_CSUM, GSO_NONE, VnetHeader};
use vhost_user_daemon::poller::Poller;

/// The one pair of a peer.
pub(super) struct PeerPair {
    /// Put back into the interface in the end.
    peer: Option<Box<Peer>>,
    nic: Arc<Nic>,
    receiver: Receiver,
    transmitter: Transmitter,
    /// Bytes are left in the peer's buffer.
    blocked: bool,
    /// The rate limit has admitted the peer's next frame, which waits for more buffers.
    admitted: bool,
}

impl PeerPair {
    /// Takes the peer of `nic`.
    pub(super) fn new(nic: &Arc<Nic>) -> Self {
        Self {
            peer: nic.take_peer(),
            nic: Arc::clone(nic),
            receiver: Receiver::default(),
            transmitter: Transmitter::default(),
            blocked: false,
            admitted: false,
        }
    }

    /// Connects if it is time, and tells the guest about the link.
    pub(super) fn connect(&mut self, poller: &mut Poller) {
        let Some(peer) = &mut self.peer else { return };
        if peer.is_connected() {
            self.nic.set_link(true);
            return;
        }
        self.nic.set_link(false);
        self.blocked = false;
        self.admitted = false;
        // The descriptor was closed, and its number may come again.
        poller.forget_port();
        if peer.connect(Instant::now()) {
            self.nic.set_link(true);
        }
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.peer.as_ref().and_then(|peer| peer.fd())
    }

    pub(super) fn control_fd(&self) -> Option<BorrowedFd<'_>> {
        self.peer.as_ref().and_then(|peer| peer.control_fd())
    }

    pub(super) fn next_retry(&self) -> Option<Instant> {
        self.peer.as_ref().filter(|peer| !peer.is_connected()).and_then(|peer| peer.next_retry())
    }

    pub(super) fn wants_to_write(&self) -> bool {
        self.blocked
    }

    pub(super) fn transmit(&mut self, ring: &mut Ring, state: &mut State) -> Batched {
        let Some(peer) = self.peer.as_deref_mut() else { return Batched::Empty };
        if self.blocked && peer.flush() == Flush::Blocked {
            return Batched::Blocked;
        }
        let header_len = state.features.header_len();
        let State { tx_throttle, tally, capture, .. } = state;
        let batched = self.transmitter.batch(ring, header_len, tx_throttle, tally, |chain, len, _| {
            let mut header = VnetHeader::new_zeroed();
            if chain.read(&mut header.as_mut_bytes()[..header_len]).is_err() || header.check(len).is_err() {
                return Sent::Dropped(Counter::TxBadFrame);
            }
            let sent = send(peer, &header, chain.source());
            if sent != Sent::Blocked {
                record(capture.as_ref(), chain.source());
            }
            sent
        });
        self.blocked = peer.flush() == Flush::Blocked;
        batched
    }

    pub(super) fn receive(&mut self, ring: &SharedRing, state: &mut State) -> Received {
        let ring = &mut *ring.lock();
        let running = self.receiver.begin(ring, state.features);
        let received = if running { self.receive_some(ring, state) } else { Received::Stopped };
        state.tally.add(Counter::RxBadBuffer, self.receiver.take_undersized());
        ring.publish();
        received
    }

    fn receive_some(&mut self, ring: &mut Ring, state: &mut State) -> Received {
        let Self { peer: Some(peer), receiver, admitted, .. } = self else { return Received::Stopped };
        let mut left = BUDGET;
        while left > 0 {
            let Some(frame) = peer.frame() else {
                match peer.fill() {
                    Fill::Some => continue,
                    Fill::Empty | Fill::Disconnected => return Received::Empty,
                }
            };
            left -= 1;
            let len = frame.len();
            let source = Source::new(frame);
            if !state.is_wanted(|start| source.clone().read(start)) {
                state.tally.count(Counter::RxFiltered);
            } else if !receiver.is_ready() {
                return Received::Starved;
            } else if !*admitted && let Err(again) = state.admit_rx(len) {
                return Received::Throttled(again);
            } else {
                // What a peer sends is whole: checksums are there, segments are cut.
                match receiver.deliver(ring, &VnetHeader::default(), [source, Source::new(&[])]) {
                    Ok(()) => state.tally.received(len),
                    Err(NotReceived::TooLong) => state.tally.count(Counter::RxTooLong),
                    Err(NotReceived::NoBuffers) => {
                        *admitted = true;
                        return Received::Starved;
                    }
                }
                *admitted = false;
                state.record(source);
            }
            peer.consume();
        }
        Received::Some
    }

    /// Sends a frame of our own. Lost if the peer does not take it now, as frames may be.
    pub(super) fn send(&mut self, frame: &[u8]) {
        if let Some(peer) = self.peer.as_deref_mut() {
            send(peer, &VnetHeader::default(), Source::new(frame));
            self.blocked = peer.flush() == Flush::Blocked;
        }
    }
}

impl Drop for PeerPair {
    fn drop(&mut self) {
        if let Some(peer) = self.peer.take() {
            self.nic.return_peer(peer);
        }
    }
}

/// Puts a frame into the peer's buffer, which is flushed when it is full.
fn send(peer: &mut Peer, header: &VnetHeader, mut frame: Source<'_>) -> Sent {
    if !peer.is_connected() {
        return Sent::Dropped(Counter::TxLinkDown);
    }
    // Segmentation was not offered.
    if header.gso_type != GSO_NONE {
        return Sent::Dropped(Counter::TxBadFrame);
    }
    for _ in 0..2 {
        let Some(place) = peer.reserve(frame.len()) else {
            match peer.flush() {
                Flush::Done => continue,
                Flush::Blocked => return Sent::Blocked,
                Flush::Disconnected => return Sent::Dropped(Counter::TxLinkDown),
            }
        };
        frame.read(place);
        if header.flags & FLAG_NEEDS_CSUM != 0 && checksum::complete(place, header).is_err() {
            return Sent::Dropped(Counter::TxBadFrame);
        }
        peer.commit();
        return Sent::Done;
    }
    // No room in an empty buffer: more than the protocol has.
    Sent::Dropped(Counter::TxBadFrame)
}
