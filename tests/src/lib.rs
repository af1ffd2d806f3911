//! What the integration tests, benches and the demo share.
pub mod cgroup;
pub mod daemon;
pub mod demo;
pub mod driver;
pub mod frames;
pub mod guest;
pub mod netns;
pub mod outcomes;
pub mod peer;
pub mod process;
pub mod provision;
pub mod share;
pub mod testpmd;
