//! A 9P2000.L client over a virtqueue of our own.
//!
//! The codec here is independent of the server's: both follow the protocol's text, and a mistake in one of them shows.
//!
//! * [`wire`] puts fields into bytes and takes them out; [`message`] is the table of all messages; [`flags`] has the
//!   protocol's numbers.
//! * [`client`] sends requests and receives replies, many at once; [`calls`] has a function for each message.
//! * [`raw`] sends any bytes in any chain.
//! * [`share`] starts `vhost-user-9p` on a temporary folder, [`jail`] beside one that must not be reached.

pub mod calls;
pub mod client;
pub mod flags;
pub mod jail;
pub mod message;
pub mod raw;
pub mod resume;
pub mod share;
pub mod wire;

pub use client::{Client, Options};
pub use message::{R, T};
pub use share::Share;
pub use wire::{Attr, Qid};
