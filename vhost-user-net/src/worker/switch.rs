//! A pair on a switch: the worker carries what its guest transmits to the others; the others fill its guest's buffers.

use std::sync::Arc;

use vhost_user_daemon::{Ring, SharedRing, Source};
use zerocopy::{FromZeros, IntoBytes};

use super::{Received, State, record};
use crate::counters::{Counter, Tally};
use crate::switch::{Guest, Member, Sender, Switch};
use crate::transmit::{Batched, Sent, Transmitter};
use crate::vnet::{FLAG_NEEDS_CSUM, VnetHeader};

/// One pair of a guest on a switch.
pub(super) struct SwitchPair {
    member: Arc<Member>,
    pair: usize,
    sender: Sender,
    transmitter: Transmitter,
    /// What the switch was told of the guest.
    told: Option<(Guest, bool)>,
}

impl SwitchPair {
    /// Pair `pair` of the guest behind port `port`.
    pub(super) fn new(switch: Arc<Switch>, port: usize, member: Arc<Member>, pair: usize) -> Self {
        Self {
            member,
            pair,
            sender: Sender::new(switch, port, pair),
            transmitter: Transmitter::default(),
            told: None,
        }
    }

    pub(super) fn transmit(&mut self, ring: &mut Ring, state: &mut State) -> Batched {
        let header_len = state.features.header_len();
        let State { tx_throttle, tally, capture, .. } = state;
        let mut burst = self.sender.burst();
        self.transmitter.batch(ring, header_len, tx_throttle, tally, |chain, len, tally| {
            let mut header = VnetHeader::new_zeroed();
            if chain.read(&mut header.as_mut_bytes()[..header_len]).is_err() || header.check(len).is_err() {
                return Sent::Dropped(Counter::TxBadFrame);
            }
            // Nobody has verified anything in a guest's frame.
            header.flags &= FLAG_NEEDS_CSUM;
            record(capture.as_ref(), chain.source());
            match burst.forward(&header, chain.source(), tally) {
                Ok(()) => Sent::Done,
                Err(reason) => Sent::Dropped(reason),
            }
        })
    }

    /// Tells the others what they have to know to fill the guest's buffers.
    pub(super) fn receive(&mut self, ring: &SharedRing, state: &mut State) -> Received {
        let (running, outdated) = {
            let ring = ring.lock();
            (ring.is_running() && self.pair < state.nic.active_pairs(), ring.is_stale())
        };
        let guest = Guest {
            features: state.features,
            receivable: state.nic.receivable(),
            filter: state.filter.clone(),
        };
        if outdated || self.told.as_ref().is_none_or(|(known, ran)| *known != guest || *ran != running) {
            // In this order, nobody has a frame for a queue that was stopped.
            if !running {
                self.member.set_running(self.pair, false);
            }
            self.member.attach(self.pair, ring, guest.clone());
            self.member.set_running(self.pair, running);
            self.told = Some((guest, running));
        }
        if running { Received::Elsewhere } else { Received::Stopped }
    }

    /// Sends a frame of our own.
    pub(super) fn send(&mut self, frame: &[u8]) {
        // Fails for a guest that may not use the address.
        let _ =
            self.sender.burst().forward(&VnetHeader::default(), Source::new(frame), &mut Tally::default());
    }
}

impl Drop for SwitchPair {
    fn drop(&mut self) {
        self.member.detach(self.pair);
        if self.pair == 0 {
            self.sender.forget();
        }
    }
}
