//! A front end that goes on with another daemon in the middle of everything, as QEMU does when its socket reconnects.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};

use super::client::{Client, Options};
use crate::driver::raw::RawDevice;

/// The memory that a front end keeps for its daemons: which requests are in flight.
pub struct Kept {
    info: VhostUserInflight,
    file: File,
}

impl Kept {
    /// Options with which there is such memory.
    pub fn options() -> Options {
        let options = Options::default();
        Options { raw: options.raw.with_protocol(VhostUserProtocolFeatures::INFLIGHT_SHMFD), ..options }
    }

    /// Asks the daemon of `client` for it, and starts the ring again with it.
    pub fn new(client: &mut Client) -> io::Result<Self> {
        let wanted = VhostUserInflight::new(0, 0, 1, client.options().ring_size);
        let kept = {
            let mut device = client.device();
            let (info, file) = device.frontend.get_inflight_fd(&wanted).map_err(io::Error::other)?;
            device.frontend.get_vring_base(0).map_err(io::Error::other)?;
            Self { info, file }
        };
        kept.start(client)?;
        Ok(kept)
    }

    /// Goes on with the daemon at `socket`, with the same memory, ring, and requests in flight.
    pub fn resume(&self, client: &mut Client, socket: &Path) -> io::Result<()> {
        let memory = Arc::clone(client.device().memory());
        // It may have ended by itself.
        let _ = client.device().wire.close();
        let raw = client.options().raw;
        *client.device() = RawDevice::connect_with(socket, &raw, memory)?;
        self.start(client)
    }

    fn start(&self, client: &mut Client) -> io::Result<()> {
        client
            .device()
            .frontend
            .set_inflight_fd(&self.info, self.file.as_raw_fd())
            .map_err(io::Error::other)?;
        client.restart_ring()
    }
}
