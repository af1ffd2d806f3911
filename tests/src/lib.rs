//! What the integration tests, benches and the demo share.
pub mod daemon;
pub mod driver;
pub mod guest;
pub mod provision;
