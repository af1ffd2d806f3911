//! What passed through a port, and what did not and why.
//!
//! Directions are the guest's: it receives (rx) and transmits (tx).

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// What is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter {
            $($(#[$doc])* $variant,)*
        }

        /// The names, in the order of the counters.
        const NAMES: &[&str] = &[$($name,)*];
    };
}

counters! {
    /// Frames received by the guest.
    RxFrames = "rx_frames",
    /// Their bytes.
    RxBytes = "rx_bytes",
    /// Frames that were larger than the MTU of Ethernet, as segmentation was left to the guest.
    RxLarge = "rx_large",
    /// Frames for which the guest had posted no buffers.
    RxNoBuffer = "rx_no_buffer",
    /// Frames that do not fit the guest's buffers.
    RxTooLong = "rx_too_long",
    /// Frames that the guest's filter holds off.
    RxFiltered = "rx_filtered",
    /// Frames beyond the rate limit, where they cannot wait.
    RxThrottled = "rx_throttled",
    /// Frames while the other side was not there.
    RxLinkDown = "rx_link_down",
    /// Frames that the guest cannot take, and that cannot be turned into ones that it can.
    RxImpossible = "rx_impossible",
    /// Buffers in which no frame fits.
    RxBadBuffer = "rx_bad_buffer",
    /// Frames transmitted by the guest.
    TxFrames = "tx_frames",
    /// Their bytes.
    TxBytes = "tx_bytes",
    /// Frames larger than the MTU of Ethernet, whose segmentation was left to us.
    TxLarge = "tx_large",
    /// Chains that cannot be followed.
    TxBadChain = "tx_bad_chain",
    /// Frames too short, too long, or with a header that does not fit them.
    TxBadFrame = "tx_bad_frame",
    /// Frames that the host refused.
    TxRefused = "tx_refused",
    /// Frames while the peer was not there.
    TxLinkDown = "tx_link_down",
    /// Frames with the address or the VLAN of somebody else.
    TxSpoofed = "tx_spoofed",
    /// Frames that nobody on the switch is allowed to get.
    TxNowhere = "tx_nowhere",
    /// Frames copied to more than one port.
    TxFlooded = "tx_flooded",
}

const COUNT: usize = NAMES.len();

/// Counters of one thread, to be added to those of the port now and then.
#[derive(Clone, Copy, Debug)]
pub struct Tally([u64; COUNT]);

impl Default for Tally {
    fn default() -> Self {
        Self([0; COUNT])
    }
}

/// A frame of this length or more was not cut into segments.
const LARGE: usize = 1519;

impl Tally {
    /// Counts one.
    pub fn count(&mut self, counter: Counter) {
        self.0[counter as usize] += 1;
    }

    /// Counts several.
    pub fn add(&mut self, counter: Counter, number: u64) {
        self.0[counter as usize] += number;
    }

    /// Counts a frame of `len` bytes that the guest received.
    pub fn received(&mut self, len: usize) {
        self.count(Counter::RxFrames);
        self.add(Counter::RxBytes, len as u64);
        self.add(Counter::RxLarge, (len >= LARGE).into());
    }

    /// Counts a frame of `len` bytes that the guest transmitted.
    pub fn transmitted(&mut self, len: usize) {
        self.count(Counter::TxFrames);
        self.add(Counter::TxBytes, len as u64);
        self.add(Counter::TxLarge, (len >= LARGE).into());
    }
}

/// Counters of a port, shared by its threads.
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; COUNT]);

impl Counters {
    /// Adds what a thread has counted, and sets that back to zero.
    pub fn take(&self, tally: &mut Tally) {
        for (counter, number) in self.0.iter().zip(&mut tally.0) {
            if *number > 0 {
                counter.fetch_add(std::mem::take(number), Ordering::Relaxed);
            }
        }
    }

    /// The number counted so far.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize].load(Ordering::Relaxed)
    }
}

/// All that are not zero, as `name=number` with spaces between.
impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (name, counter) in NAMES.iter().zip(&self.0) {
            let number = counter.load(Ordering::Relaxed);
            if number > 0 {
                write!(f, "{separator}{name}={number}")?;
                separator = " ";
            }
        }
        if separator.is_empty() { f.write_str("no frames") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happened_is_shown() {
        let counters = Counters::default();
        assert_eq!(counters.to_string(), "no frames");
        let mut tally = Tally::default();
        tally.transmitted(60);
        tally.received(64000);
        tally.count(Counter::TxFlooded);
        counters.take(&mut tally);
        counters.take(&mut tally);
        assert_eq!(
            counters.to_string(),
            "rx_frames=1 rx_bytes=64000 rx_large=1 tx_frames=1 tx_bytes=60 tx_flooded=1"
        );
    }
}
