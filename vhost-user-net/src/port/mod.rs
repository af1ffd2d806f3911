//! The host side of a network interface: where frames come from and go to.
//!
//! Nothing here knows virtio queues or vhost-user. A [`tap`] speaks virtio-net headers, so that checksums and
//! segmentation may be left to the kernel. A [`peer`] on a socket takes and gives complete frames only.

pub mod peer;
pub mod tap;
