//! A 9P2000.L file server behind a vhost-user socket.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`run`](mod@run) | from the command line to a directory that is served |
//! | [`device`], [`config`] | the virtio device: features, queues, the mount tag |
//! | [`worker`] | the queues: pop, decode, execute or hand over, give back |
//! | [`task`], [`pool`] | a request on its way, and the threads for what may wait |
//! | [`protocol`] | the messages: bytes to types and back |
//! | [`server`] | the 9P server: sessions, fids, and what each message does |
//! | [`host`] | the files: never outside of what is shared, by file descriptor and not by path |
//!
//! A request's way: `worker` pops a chain, [`task`] takes the message out of it, [`protocol::Request::decode`] says what it
//! asks for, [`server::Session::prepare`] looks its fids up, [`server::place`] says which thread executes it,
//! [`server::Session::execute`] does what it asks for by means of [`host`], and `worker` writes the reply and gives the
//! chain back. `protocol`, `server` and `host` know nothing of virtio.

pub mod args;
pub mod config;
pub mod device;
pub mod host;
pub mod pool;
pub mod protocol;
pub mod run;
pub mod server;
pub mod task;
pub mod worker;
