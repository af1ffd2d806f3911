//! What a daemon implements: a [`Device`], and a [`Worker`] for each of its queues or for a few of them together.
//!
//! The rest of this crate turns them into a vhost-user back end. A device answers for features and configuration
//! space; its workers move data and know nothing of front ends or threads:
//!
//! ```text
//! kick, or a file ──> pass: batch().pop() ──> parse, execute ──> complete() ──> publish() ──┐
//! of the worker's       ^                                                                     │
//!                       ├──────────────── a pass that found something to do ──────────────────┤
//!                       └── rest: ask for kicks, and wait for one, or for what is in flight ──┘
//! ```

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Pid;

use crate::ring::SharedRing;

/// A virtio device behind a vhost-user socket. One object serves all connections, one after the other.
pub trait Device: Send + Sync + 'static {
    /// What serves [`Device::queues_per_worker`] of the queues.
    type Worker: Worker;

    /// Number of queues, at most 64.
    fn num_queues(&self) -> usize;

    /// The flag by which the daemon offers more queues, for those who ask for more than there are.
    fn queues_flag(&self) -> &'static str {
        "--num-queues"
    }

    /// Queues that one worker serves: those that belong together, such as both directions of a network interface. The
    /// last worker may have fewer.
    fn queues_per_worker(&self) -> usize {
        1
    }

    /// Whether every queue completes its chains in the order in which it popped them. Then the used index alone tells
    /// where to go on after the daemon was killed, and the front end is not asked to keep memory for chains in flight
    /// (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`).
    fn keeps_order(&self) -> bool {
        false
    }

    /// Whether all that its worker has [in flight](Worker::in_flight) is completed before a queue is disabled, and not only
    /// before it is stopped: what the driver did before is not to be acted upon later.
    fn drains_when_disabled(&self) -> bool {
        false
    }

    /// The messages of the vhost-user text that only network devices get, if this is one.
    fn network(&self) -> Option<&dyn Network> {
        None
    }

    /// How long a worker with nothing to do looks at its rings before it asks for kicks and sleeps: saves a driver that
    /// waits for each answer the kick, and the worker the wake-up. It is not done while it does not pay.
    fn poll_limit(&self) -> Duration {
        Duration::ZERO
    }

    /// The largest queue size that a driver may choose: a power of two.
    fn max_queue_size(&self) -> u16;

    /// The virtio feature bits offered: those of the device type, and the ring features
    /// [`RING_FEATURES`](crate::RING_FEATURES). The bits of the vhost-user transport are added elsewhere.
    fn features(&self) -> u64;

    /// The driver and the front end agreed on `features`, a part of those offered. Called again when they change.
    fn set_features(&self, features: u64);

    /// Fills `data` with the configuration space from `offset` on. Bytes beyond its end stay zero, as `data` comes in.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver (or, when a guest was migrated here, the front end) writes `data` to the configuration space at
    /// `offset`. Anything may arrive: some front ends relay one field, others the whole space. `false` if it has no
    /// field that can be written, or no possible value for it; the front end is told so.
    fn write_config(&self, offset: usize, data: &[u8]) -> bool;

    /// The front end is about to share `regions`: all at once, or some more. `peer` is its process, if that is known. Fails
    /// with the reason, and the remedy, if the device cannot work with them; they are refused then.
    fn check_memory(&self, regions: &[SharedRegion<'_>], peer: Option<Pid>) -> Result<(), String> {
        let _ = (regions, peer);
        Ok(())
    }

    /// A front end has connected, and the device was reset for it.
    fn connected(&self) {}

    /// The front end has left, and the device will be reset.
    fn disconnected(&self) {}

    /// A front end has connected or left, or resets the device: what the last driver chose is forgotten, and what it held is
    /// given up. Nothing is in flight.
    fn reset(&self);

    /// Makes worker `index` for a new connection: the one of the queues from `index * queues_per_worker()` on. It is
    /// dropped when the connection ends, after all it had in flight was completed.
    fn new_worker(self: &Arc<Self>, index: usize) -> io::Result<Self::Worker>;
}

/// A part of the guest's memory, in the file that the front end shares it by (vhost-user text, "Memory region
/// description").
#[derive(Clone, Copy, Debug)]
pub struct SharedRegion<'a> {
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in `file`.
    pub offset: u64,
    /// What the front end mapped.
    pub file: BorrowedFd<'a>,
}

/// Copies a configuration space, of which `bytes` is all there is, from `offset` on: what [`Device::read_config`] does.
pub fn read_config_space(bytes: &[u8], offset: usize, data: &mut [u8]) {
    if let Some(bytes) = bytes.get(offset..) {
        let len = bytes.len().min(data.len());
        data[..len].copy_from_slice(&bytes[..len]);
    }
}

/// The messages for network devices (vhost-user text, `VHOST_USER_PROTOCOL_F_RARP` and `VHOST_USER_PROTOCOL_F_NET_MTU`).
pub trait Network {
    /// The guest with address `mac` was migrated here and does not announce itself: the network is to be told
    /// (`VHOST_USER_SEND_RARP`).
    fn announce(&self, mac: [u8; 6]);

    /// The guest was told to use an MTU of `mtu` bytes (`VHOST_USER_NET_SET_MTU`). Fails with the reason if that does
    /// not work here.
    fn set_mtu(&self, mtu: u16) -> Result<(), String>;
}

/// Serves a queue, or a few that belong together, in a thread of its own.
pub trait Worker: Send + 'static {
    /// Does what can be done now: completes what has finished, pops chains from `rings` and executes or submits them,
    /// and publishes what was completed.
    ///
    /// Never blocks on the guest, and never fails: an error belongs to the request that met it. The rings decide whether
    /// chains may be popped; what was popped before has to be completed in any case, or is taken back by the ring when it
    /// stops if the device [keeps the order](Device::keeps_order). A pass ends after a bounded amount of work.
    fn pass(&mut self, rings: &[SharedRing]) -> Progress;

    /// Nothing is to be done: asks for the kicks, and arms the file, that are to end the rest. `true` if there is something
    /// to do after all.
    fn rest(&mut self, rings: &[SharedRing]) -> bool {
        rings.iter().any(|ring| ring.lock().enable_notifications())
    }

    /// A file that becomes readable when there is something to do besides kicks: asked for once, and watched from then on.
    /// Mostly an epoll instance with what the worker waits for at the moment.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The rings are about to stop: what waits for somebody else than the host's storage, who may take any time, is
    /// to be given up, so that all that is [in flight](Worker::in_flight) ends soon.
    fn interrupt(&mut self) {}

    /// Chains that something else than a pass has to finish.
    fn in_flight(&self) -> usize {
        0
    }

    /// Waits until something in flight has finished, until the guest writes to one of `kicks`, or until `timeout`, whatever
    /// comes first. Called only while something is in flight. The kicks are not to be read.
    ///
    /// Returning early is no error, and neither is missing a kick: it is looked for again.
    ///
    /// It is the worker that waits, and not the thread's epoll: an io_uring completion interrupts epoll_wait(2) with
    /// EINTR before it can be seen there, which costs two system calls more for each wake-up.
    fn wait(&mut self, timeout: Duration, kicks: &[Arc<OwnedFd>]) {
        let _ = (timeout, kicks);
    }
}

/// What a [`Worker::pass`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It popped or completed something, so that there may be more.
    Busy,
    /// There was nothing to do.
    Idle,
    /// There may be chains in the ring, but what is in flight has to be completed first.
    Full,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_configuration_space_can_be_read() {
        let whole = [1, 2, 3, 4];
        for offset in [0, 1, 3, 4, 5, 1 << 40] {
            let mut part = [0; 3];
            read_config_space(&whole, offset, &mut part);
            for (index, byte) in part.iter().enumerate() {
                assert_eq!(
                    *byte,
                    offset.checked_add(index).and_then(|at| whole.get(at)).copied().unwrap_or(0)
                );
            }
        }
    }
}
