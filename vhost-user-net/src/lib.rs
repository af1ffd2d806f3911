//! A virtio network device behind a vhost-user socket.
//!
//! | module | holds |
//! |---|---|
//! | [`args`], [`run`] | the command line, and what it asks for |
//! | [`config`] | the configuration space that the driver reads |
//! | [`features`] | the feature bits, and what they say about frames |
//! | [`device`] | what all queues share: features, address, link, filter, counters |
//! | [`worker`] | a pair of queues, or the control queue: pop, pass on, complete |
//! | [`receive`], [`transmit`] | the two kinds of queues |
//! | [`control`], [`filter`] | commands of the driver, and what it wants to receive |
//! | [`ethernet`] | addresses and VLAN tags |
//! | [`vnet`], [`offload`] | the header before a frame, and what it leaves undone, done in software |
//! | [`port`] | the host side: taps, and peers behind unix sockets |
//! | [`switch`] | the host side: a switch between the guests of this process |
//! | [`counters`], [`pcap`] | what passed |
//!
//! A frame's way out: `worker` pops a chain, and the kernel copies the frame from the guest's memory into a tap; or it is
//! copied into the send buffer of a peer, together with others; or into the memory of another guest. A frame's way in is
//! the same the other way round. No frame is copied twice.

pub mod args;
pub mod config;
pub mod control;
pub mod counters;
pub mod device;
pub mod ethernet;
pub mod features;
pub mod filter;
pub mod offload;
pub mod pcap;
pub mod port;
pub mod receive;
pub mod run;
pub mod switch;
pub mod transmit;
pub mod vnet;
pub mod worker;
