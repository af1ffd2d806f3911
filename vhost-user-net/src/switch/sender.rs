//! A port's way into the switch: what it may send, what is learned from it, and where frames go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost_user_daemon::Source;

use super::output::{Frame, Locked, Scratch};
use super::table::Learned;
use super::{NO_VLAN, Switch};
use crate::counters::{Counter, Tally};
use crate::ethernet::{Mac, START_LEN, Start, is_group, is_link_local};
use crate::vnet::VnetHeader;

/// Frames that leave at a port before its lock is let go of: a frame can be cut into a great many.
const FRAMES_PER_LOCK: usize = 128;

/// How often the same address is learned anew.
const LEARN_AGAIN: Duration = Duration::from_secs(1);

/// A thread that has frames of one port.
pub struct Sender {
    switch: Arc<Switch>,
    port: usize,
    hint: usize,
    known: Known,
    scratch: Scratch,
}

/// The last answers of the table: frames of a flow come together.
#[derive(Default)]
struct Known {
    source: Option<(u16, Mac, Instant)>,
    target: Option<(u16, Mac, Option<usize>)>,
    /// Of the table, when it was asked.
    generation: u64,
    asked: Option<Instant>,
}

/// Some frames one after the other. What they cause is shown to the receivers when this is dropped.
pub struct Burst<'a> {
    switch: &'a Switch,
    port: usize,
    hint: usize,
    known: &'a mut Known,
    scratch: &'a mut Scratch,
    now: Instant,
    current: Option<(usize, Locked<'a>)>,
    /// Frames, or segments of them, that have left there.
    put: usize,
}

impl Sender {
    /// Sends frames of port `port`. Those with the same `hint` keep their order.
    pub fn new(switch: Arc<Switch>, port: usize, hint: usize) -> Self {
        Self { switch, port, hint, known: Known::default(), scratch: Scratch::default() }
    }

    /// Forgets what was learned about the port: its guest has left.
    pub fn forget(&mut self) {
        self.switch.forget(self.port);
        self.known = Known::default();
    }

    /// Starts to send.
    pub fn burst(&mut self) -> Burst<'_> {
        Burst {
            switch: &self.switch,
            port: self.port,
            hint: self.hint,
            known: &mut self.known,
            scratch: &mut self.scratch,
            now: Instant::now(),
            current: None,
            put: 0,
        }
    }
}

impl<'a> Burst<'a> {
    /// Forwards a frame. Fails with what is to be counted if it goes nowhere.
    pub fn forward(
        &mut self,
        header: &VnetHeader,
        bytes: Source<'_>,
        tally: &mut Tally,
    ) -> Result<(), Counter> {
        let mut start = [0; START_LEN];
        bytes.clone().read(&mut start);
        let start = Start::new(start);
        let vlan = self.admit(&start)?;
        let frame = Frame { header: *header, start, bytes, vlan };
        self.learn(vlan, start.source())?;
        match self.target(vlan, start.destination()) {
            Some(port) if self.switch.is_allowed(self.port, port, vlan) => {
                self.put(port, &frame);
                Ok(())
            }
            // To itself, or to somebody whom it may not reach.
            Some(_) => Err(Counter::TxNowhere),
            None => {
                tally.count(Counter::TxFlooded);
                self.flood(&frame);
                Ok(())
            }
        }
    }

    /// Whether the port may send such a frame, and in which VLAN it is.
    fn admit(&self, start: &Start) -> Result<u16, Counter> {
        let options = &self.switch.ports[self.port].options;
        let vlan = match options.vlan {
            None => start.vlan(),
            Some(own) if start.vlan() == NO_VLAN => own,
            Some(_) => return Err(Counter::TxSpoofed),
        };
        let source = start.source();
        if is_group(source) || options.mac.is_some_and(|mac| mac != source) {
            return Err(Counter::TxSpoofed);
        }
        if is_link_local(start.destination()) {
            return Err(Counter::TxNowhere);
        }
        Ok(vlan)
    }

    /// Fails if the address is that of another port.
    fn learn(&mut self, vlan: u16, source: Mac) -> Result<(), Counter> {
        let fresh = self.known.source.is_some_and(|(known_vlan, known, at)| {
            known == source && known_vlan == vlan && self.now < at + LEARN_AGAIN
        });
        // Another port may have shown the same address in between.
        if !fresh || self.known.generation != self.switch.table.generation() {
            if self.switch.belongs_to_another(self.port, vlan, source) {
                return Err(Counter::TxSpoofed);
            }
            self.switch.table.age(self.now);
            if self.switch.table.learn(self.port as u16, vlan, source, self.now) == Learned::Pinned {
                return Err(Counter::TxSpoofed);
            }
            self.known.source = Some((vlan, source, self.now));
        }
        Ok(())
    }

    /// The port behind an address; `None` for one that is not known, or means several.
    fn target(&mut self, vlan: u16, destination: Mac) -> Option<usize> {
        if is_group(destination) {
            return None;
        }
        let generation = self.switch.table.generation();
        let fresh = self.known.asked.is_some_and(|at| self.now < at + LEARN_AGAIN);
        if let Some((known_vlan, known, port)) = self.known.target
            && (known, known_vlan) == (destination, vlan)
            && generation == self.known.generation
            && fresh
        {
            return port;
        }
        let port = self.switch.table.lookup(vlan, destination, self.now).map(usize::from);
        self.known.target = Some((vlan, destination, port));
        self.known.generation = generation;
        self.known.asked = Some(self.now);
        port
    }

    fn flood(&mut self, frame: &Frame<'_>) {
        for port in 0..self.switch.ports.len() {
            if self.switch.is_allowed(self.port, port, frame.vlan) {
                self.put(port, frame);
            }
        }
    }

    /// Lets a frame leave at `port`, whose lock is kept for the next one.
    fn put(&mut self, port: usize, frame: &Frame<'_>) {
        if self.current.as_ref().is_none_or(|(current, _)| *current != port) {
            self.end();
            let switch: &'a Switch = self.switch;
            self.current = switch.ports[port].output.lock(self.hint).map(|locked| (port, locked));
        }
        if let Some((_, locked)) = &mut self.current {
            self.put += locked.put(frame, &self.switch.ports[port].options, self.scratch);
        }
        if self.put >= FRAMES_PER_LOCK {
            // Others have frames for it as well.
            self.end();
        }
    }

    fn end(&mut self) {
        self.put = 0;
        if let Some((_, mut locked)) = self.current.take() {
            locked.end();
        }
    }
}

impl Drop for Burst<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
