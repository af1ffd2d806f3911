//! What every vhost-user daemon of this workspace is made of.
pub mod cli;
pub mod log;
pub mod socket;
