//! A virtio memory balloon behind a vhost-user socket, a client for its control socket, and a manager for many of them.
//!
//! | module | holds |
//! |---|---|
//! | [`args`], [`sizes`], [`run`](mod@run) | the command line, and from there to a balloon that is served |
//! | [`device`], [`state`] | features, configuration space, the target; what is known of the guest |
//! | [`queues`], [`config`], [`request`] | which queue is which, the configuration space, guest bytes to values |
//! | [`worker`], [`work_limit`] | the queues: pop, note, give back, answer; and how much a guest may make us work |
//! | [`memory`] | the host side: which pages are in the balloon, and how they go back to the host |
//! | [`state_file`] | what outlives the daemon |
//! | [`api`] | the JSON of the control socket |
//! | [`control`] | the control socket: requests, events, metrics |
//! | [`ctl`] | its client on the command line |
//! | [`manage`] | the manager: shares a host's memory among its guests |
//!
//! A page's way: the guest puts its number into a buffer of the inflate queue, [`worker`] pops the chain,
//! [`request::Pages`] reads the numbers, [`memory::Ledger`] notes them, the chain goes back to the guest, and when a block
//! of 2 MiB is complete or nothing more comes, [`memory::MemoryFile::punch`] gives the pages to the host.
#![forbid(unsafe_code)]

pub mod api;
pub mod args;
pub mod config;
pub mod control;
pub mod ctl;
pub mod device;
pub mod manage;
pub mod memory;
pub mod queues;
pub mod request;
pub mod run;
pub mod sizes;
pub mod state;
pub mod state_file;
pub mod work_limit;
pub mod worker;
