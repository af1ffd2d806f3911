//! What happens to a balloon besides requests: it is stopped, reset, and its front end goes and comes again.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use super::driver::{Driver, Role};
use crate::driver::raw::RawDevice;
use crate::driver::ring::RawRing;

impl Driver {
    /// Lays out all queues as new ones, and starts them, as a driver does when it is loaded.
    pub fn start_rings(&mut self) -> Result<()> {
        self.rings.clear();
        for role in self.options.roles() {
            let index = self.options.index(role);
            let ring = self.device.ring(index, self.options.ring_size);
            let ring = ring.with_context(|| format!("Cannot start the queue {role:?}"))?;
            self.rings.insert(role, ring);
        }
        Ok(())
    }

    /// The same without a word of enabling them, as User Mode Linux does.
    pub fn announce_rings(&mut self) -> Result<()> {
        self.rings.clear();
        for role in self.options.roles() {
            let index = self.options.index(role);
            let ring =
                self.device.lay_out(index, RawDevice::default_placement(index, self.options.ring_size))?;
            self.device.announce(index, &ring, 0)?;
            self.rings.insert(role, ring);
        }
        Ok(())
    }

    /// Stops all queues, as a front end does when its guest is paused, and remembers where they are.
    pub fn stop(&mut self) -> Result<()> {
        for &role in self.rings.keys() {
            self.device.frontend.set_vring_enable(self.options.index(role), false)?;
        }
        for &role in self.rings.keys() {
            let base = self.device.frontend.get_vring_base(self.options.index(role))?;
            self.bases.insert(role, base as u16);
        }
        Ok(())
    }

    /// Where a queue was when it was stopped.
    pub fn base(&self, role: Role) -> u16 {
        self.bases[&role]
    }

    /// Lets all queues go on from where they were, as the device said.
    pub fn cont(&mut self) -> Result<()> {
        let bases = self.bases.clone();
        self.cont_from(|role, _| bases[&role])
    }

    /// Lets all queues go on from where `base` says.
    pub fn cont_from(&mut self, base: impl Fn(Role, &RawRing) -> u16) -> Result<()> {
        for (&role, ring) in &self.rings {
            let index = self.options.index(role);
            self.device.start_from(index, ring, base(role, ring))?;
        }
        Ok(())
    }

    /// Does what a front end does when the guest boots anew, one that can reset its device: the driver starts from nothing.
    pub fn reset(&mut self) -> Result<()> {
        self.device.frontend.reset_device().context("RESET_DEVICE")?;
        self.negotiate()?;
        self.start_rings()
    }

    /// The same by a front end that cannot reset its device, such as QEMU's generic one.
    pub fn reboot(&mut self) -> Result<()> {
        self.stop()?;
        self.negotiate()?;
        self.start_rings()
    }

    /// Tells features and memory once more.
    fn negotiate(&mut self) -> Result<()> {
        self.device.frontend.set_features(self.device.features()).context("SET_FEATURES")?;
        self.device.frontend.set_mem_table(&self.pages.memory().table()).context("SET_MEM_TABLE")?;
        Ok(())
    }

    /// Ends the connection.
    pub fn close(&mut self) {
        // The daemon may have ended it.
        let _ = self.device.wire.close();
    }

    /// Connects to the daemon at `socket`, with the same memory, and goes on with the same queues, as a front end does
    /// whose guest does not notice.
    pub fn reconnect(&mut self, socket: &Path) -> Result<()> {
        self.close();
        let memory = Arc::clone(self.pages.memory());
        (self.device, self.channel) = Self::open(socket, &self.options, &memory)?;
        self.cont_from(|_, ring| ring.used_idx())
    }
}
