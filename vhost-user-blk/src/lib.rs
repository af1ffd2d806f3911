//! A virtio block device behind a vhost-user socket.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`config`] | the configuration space that the driver reads |
//! | [`request`] | guest bytes to a typed request, without side effects |
//! | [`device`] | features, write cache mode, serial: what all queues share |
//! | [`worker`] | a queue: pop, parse, execute, finish |
//! | [`image`] | the host side: files, locks, O_DIRECT, io_uring |
//!
//! A request's way: `worker` pops a chain and splits off header and status byte, [`request::parse`] says what it asks
//! for or which status refuses it, [`image::Engine`] does it, and `worker` writes the status and completes the chain.

pub mod args;
pub mod config;
pub mod device;
pub mod image;
pub mod request;
pub mod worker;
