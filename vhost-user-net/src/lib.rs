//! A virtio network device behind a vhost-user socket: so far its host side.

pub mod ethernet;
pub mod port;
pub mod vnet;
