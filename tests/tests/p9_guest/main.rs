//! Linux guests on shared directories: what a program relies on, and what several guests and the host do at once.
//!
//! User Mode Linux is left out: Debian's packages of it have no 9p over virtio (`CONFIG_NET_9P_VIRTIO`), and to build that
//! module takes the kernel's source, 150 MB.
mod lifecycle;
mod locks;
mod probes;
mod together;
