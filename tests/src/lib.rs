//! What the integration tests, benches and the demo share.
pub mod daemon;
pub mod demo;
pub mod driver;
pub mod guest;
pub mod process;
pub mod provision;
