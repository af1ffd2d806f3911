//! A virtio network device behind a vhost-user socket: so far what it is made of.

pub mod control;
pub mod ethernet;
pub mod filter;
pub mod offload;
pub mod pcap;
pub mod port;
pub mod vnet;
