//! Front ends without a guest: what drives a daemon from this process.
//!
//! * [`blk`] is a well-behaved disk driver on top of the crate `virtio-driver`.
//! * [`raw`], [`ring`] and [`request`] are rings by hand, which can be misused in every way.
//! * [`wire`] speaks vhost-user frame by frame, for messages that no stock front end sends.
//! * [`fixture`] starts `vhost-user-blk` on a scratch image, [`usage`] looks at it from outside.

pub mod blk;
pub mod fixture;
pub mod memory;
pub mod raw;
pub mod request;
pub mod ring;
pub mod usage;
pub mod wire;
