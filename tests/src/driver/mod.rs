//! Front ends without a guest: what drives a daemon from this process.
//!
//! * [`balloon`] is a balloon's driver, and looks at what the host holds of its memory.
//! * [`blk`] is a well-behaved disk driver on top of the crate `virtio-driver`.
//! * [`raw`], [`ring`] and [`request`] are rings by hand, which can be misused in every way.
//! * [`net`] sends and receives frames by such rings, in chains of any shape.
//! * [`lan`] has guests with a pair of queues each, as tests of switches and ports want them.
//! * [`ninep`] is a 9P client with its own codec.
//! * [`wire`] speaks vhost-user frame by frame, for messages that no stock front end sends.
//! * [`fixture`] starts `vhost-user-blk` on a scratch image, [`net_fixture`] `vhost-user-net` on a tap in a namespace;
//!   [`usage`] looks at a daemon from outside.

pub mod balloon;
pub mod blk;
pub mod fixture;
pub mod lan;
pub mod memory;
pub mod net;
pub mod net_fixture;
pub mod ninep;
pub mod raw;
pub mod request;
pub mod ring;
pub mod usage;
pub mod wire;
