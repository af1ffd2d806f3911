//! `vhost-user-net` on a tap in a namespace of its own, as most tests want it.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::lan::net_daemon;
use super::net::{RawNet, Rx, TIMEOUT, Tx};
use super::raw::RawOptions;
use crate::daemon::Daemon;
use crate::frames::{BROADCAST, mac, number, numbered};
use crate::netns::packet::PacketSocket;
use crate::netns::{Namespace, open};

/// The tap's name.
pub const TAP: &str = "tap0";
/// What the daemon calls its port in reports, when it is no switch.
pub const PORT: &str = "the interface";

/// A daemon on [`TAP`] in a namespace. The tap's other side is for [`TapFixture::packets`]; it has no address, and the
/// kernel sends nothing through it by itself.
pub struct TapFixture {
    /// The daemon, which is inside.
    pub daemon: Daemon,
    /// What passes through the tap.
    pub packets: PacketSocket,
    /// The namespace.
    pub namespace: Namespace,
}

impl TapFixture {
    /// Starts a daemon with more flags on a tap with one queue.
    pub fn new<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::with_queues(1, args)
    }

    /// Starts a daemon with more flags on a tap with several queues.
    pub fn with_queues<A: AsRef<OsStr>>(queues: u16, args: impl IntoIterator<Item = A>) -> Result<Self> {
        let namespace = quiet_tap(queues)?;
        let daemon = net_daemon()
            .inside(&namespace.root())
            .args(["--tap", TAP, "--num-queue-pairs", &queues.to_string()])
            .args(args)
            .start()?;
        let packets = open::packet(&namespace, TAP)?;
        Ok(Self { daemon, packets, namespace })
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    /// Connects a device by hand.
    pub fn connect(&self, options: &RawOptions) -> Result<RawNet> {
        let net = RawNet::connect(self.socket(), options);
        net.with_context(|| format!("Cannot connect the raw device:\n{}", self.daemon.stderr()))
    }

    /// Checks that a frame passes in each direction. `marker` tells it from others.
    pub fn check_passes(&self, rx: &mut Rx, tx: &mut Tx, marker: u64) -> Result<()> {
        self.check_sends(tx, marker)?;
        rx.post(&[2048]);
        rx.ring.kick();
        self.packets.send(crate::frames::Header::default(), &numbered(mac(2), BROADCAST, marker, 60))?;
        let received = rx.receive(TIMEOUT)?.context("A frame from the tap does not arrive")?;
        ensure!(number(&received.frame) == Some(marker), "Another frame arrived: {received:?}");
        Ok(())
    }

    /// Checks that the next frame that comes out of the tap is one that is sent now.
    pub fn check_sends(&self, tx: &mut Tx, marker: u64) -> Result<()> {
        let frame = numbered(mac(1), BROADCAST, marker, 60);
        tx.send(&frame)?;
        let passed =
            self.packets.find(TIMEOUT, |passed| !passed.outgoing)?.context("A frame does not come out")?;
        ensure!(passed.frame == frame, "Another frame came out: {passed:?}");
        Ok(())
    }
}

/// A namespace with [`TAP`], which is up and through which nothing passes by itself.
pub fn quiet_tap(queues: u16) -> Result<Namespace> {
    let namespace = Namespace::new()?;
    namespace.add_tap(TAP, queues)?;
    namespace.sysctl(&format!("net.ipv6.conf.{TAP}.disable_ipv6"), "1")?;
    namespace.ip(&format!("link set {TAP} up"))?;
    Ok(namespace)
}
