//! What every vhost-user daemon of this workspace is made of.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the flags that all daemons share, and `--print-capabilities` |
//! | [`control`] | HTTP and JSON on a socket for administrators: server and client, events, metrics |
//! | [`socket`] | where the front end is met: listened on, connected to, inherited, or handed over by systemd |
//! | [`serve`](mod@serve) | the life of a daemon: accept, serve, listen again, end in order |
//! | `link` | the front end's connection: relays to the stock crates, and answers what they refuse |
//! | `backend` | a [`Device`] as the stock crates want it: worker threads, started, drained, stopped |
//! | [`device`] | what a daemon implements: [`Device`] and [`Worker`] |
//! | [`ring`] | a queue as a worker uses it: batches of chains, batches of used entries, notifications |
//! | [`bell`] | what a worker waits for while something is in flight: a doorbell, and kicks |
//! | [`chain`] | a descriptor chain as checked iovecs into guest memory |
//! | [`dirty`] | the dirty log of live migration |
//! | [`file_io`] | preadv and pwritev on iovecs of guest memory |
//! | `inflight` | what is in flight, in memory that outlives a daemon that is killed |
//! | [`sandbox`] | namespaces, Landlock, capabilities, seccomp: entered once, before any thread is started |
//! | [`memory`] | the guest's memory map |
//! | [`poller`] | what a worker waits for besides kicks: a file, a moment, a doorbell |
//! | [`throttle`] | token buckets for bytes and operations, for a worker that never sleeps |
//! | [`log`](mod@log) | set-up of the logger, and macros for what a guest can trigger |
//!
//! A daemon parses its flags, opens what it serves, and calls [`serve()`], or [`serve_all()`] for several devices. Before
//! it has a socket it calls [`hold_signals()`].

mod backend;
pub mod bell;
pub mod chain;
pub mod cli;
pub mod control;
pub mod device;
pub mod dirty;
pub mod file_io;
mod inflight;
mod link;
pub mod log;
pub mod memory;
pub mod poller;
pub mod ring;
pub mod sandbox;
pub mod serve;
pub mod socket;
mod sys;
pub mod throttle;
mod vring;

pub use crate::chain::{Chain, Source};
pub use crate::device::{Device, Network, Progress, SharedRegion, Worker};
pub use crate::link::ConfigNotifier;
pub use crate::ring::{Ring, SharedRing};
pub use crate::serve::{ServeOptions, Served, hold_signals, serve, serve_all};

use vhost::vhost_user::message::VhostUserVirtioFeatures;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The ring features that this crate serves for every device: VERSION_1, INDIRECT_DESC and EVENT_IDX.
pub const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The feature bits that belong to vhost-user, not to the device.
const TRANSPORT_FEATURES: u64 =
    VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | VhostUserVirtioFeatures::LOG_ALL.bits();
