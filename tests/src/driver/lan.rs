//! Guests next to each other: interfaces that send and receive whole frames, and what `vhost-user-net` counted of them.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use super::net::{RawNet, Received, Rx, TIMEOUT, Tx};
use super::raw::RawOptions;
use super::usage::cpu_time;
use crate::daemon::{Builder, Daemon};
use crate::frames::Header;

/// Entries of each ring.
pub const RING_SIZE: u16 = 256;
/// Chains that a guest posts to receive, unless a test says otherwise.
pub const BUFFERS: u16 = 64;
/// A buffer that holds any frame without segmentation left undone.
pub const BUFFER: usize = 2048;

/// Where no switch forwards to (IEEE 802.1D, table 7-10): LLDP.
pub const LINK_LOCAL: [u8; 6] = [0x01, 0x80, 0xc2, 0, 0, 0x0e];

/// How often to look at what nothing signals.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Prepares to start `vhost-user-net`.
pub fn net_daemon() -> Builder {
    Daemon::builder("vhost-user-net")
}

/// What the simplest driver asks for; the address comes from elsewhere.
pub fn plain() -> RawOptions {
    RawOptions::net().without(VIRTIO_NET_F_MAC)
}

/// A guest with one pair of queues.
pub struct Guest {
    /// The interface.
    pub net: RawNet,
    /// Its receive queue.
    pub rx: Rx,
    /// Its transmit queue.
    pub tx: Tx,
    /// Its address.
    pub mac: [u8; 6],
    /// The buffers of each chain that it posts.
    sizes: Vec<usize>,
}

impl Guest {
    /// Connects, posts [`BUFFERS`] buffers, and waits until the device will fill them.
    pub fn join(socket: &Path, mac: [u8; 6], options: &RawOptions) -> Result<Self> {
        Self::join_with(socket, mac, options, BUFFERS, &[BUFFER])
    }

    /// The same with `chains` chains of buffers of these sizes.
    pub fn join_with(
        socket: &Path,
        mac: [u8; 6],
        options: &RawOptions,
        chains: u16,
        sizes: &[usize],
    ) -> Result<Self> {
        let net = RawNet::connect(socket, options)?;
        Self::start(net, mac, chains, sizes)
    }

    /// Starts the first pair of an interface.
    pub fn start(mut net: RawNet, mac: [u8; 6], chains: u16, sizes: &[usize]) -> Result<Self> {
        let descriptors = usize::from(chains) * sizes.len();
        ensure!(descriptors <= RING_SIZE.into(), "A ring does not hold {descriptors} buffers");
        let mut rx = net.rx(0, RING_SIZE)?;
        for _ in 0..chains {
            rx.post(sizes);
        }
        rx.ring.kick();
        let tx = net.tx(0, RING_SIZE)?;
        let mut guest = Self { net, rx, tx, mac, sizes: sizes.to_vec() };
        guest.settle()?;
        Ok(guest)
    }

    /// Waits until the device has taken notice of everything so far: it has looked at all queues when the second of two
    /// frames that go nowhere is back.
    pub fn settle(&mut self) -> Result<()> {
        for _ in 0..2 {
            self.send(&crate::frames::numbered(self.mac, LINK_LOCAL, 0, 60))?;
        }
        Ok(())
    }

    /// Sends a frame as it goes over a wire, and waits until the device has taken it.
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        self.tx.send(frame).context("The device does not take a frame")
    }

    /// Sends a frame with this header.
    pub fn send_with(&mut self, header: Header, frame: &[u8]) -> Result<()> {
        let request = self.tx.request(header, frame);
        self.tx.execute(&request).context("The device does not take a frame")
    }

    /// The next frame, whose buffers are posted again.
    pub fn receive(&mut self) -> Result<Received> {
        let received = self.receive_once()?;
        for _ in &received.used {
            self.rx.post(&self.sizes);
        }
        self.rx.ring.kick();
        Ok(received)
    }

    /// The next frame, whose buffers are not posted again.
    pub fn receive_once(&mut self) -> Result<Received> {
        self.rx.receive(TIMEOUT)?.context("A frame does not arrive")
    }

    /// Receives the next frame, which has to be this one, with nothing left undone, in one chain.
    pub fn expect(&mut self, frame: &[u8]) -> Result<()> {
        let received = self.receive()?;
        ensure!(
            received.frame == frame,
            "Another frame arrived:\n{:02x?}\ninstead of\n{frame:02x?}",
            received.frame
        );
        ensure!(received.header == Header::default(), "It has the header {:?}", received.header);
        if let Some(chains) = received.num_buffers {
            ensure!(usize::from(chains) == received.used.len(), "{chains} buffers in {:?}", received.used);
        }
        Ok(())
    }

    /// The frames that are there already.
    pub fn receive_ready(&mut self) -> Result<Vec<Received>> {
        let mut all = Vec::new();
        while self.rx.ring.used_idx() != self.rx.ring.used_seen() {
            all.push(self.receive()?);
        }
        Ok(all)
    }

    /// Posts more chains.
    pub fn post(&mut self, chains: u16) {
        for _ in 0..chains {
            self.rx.post(&self.sizes);
        }
        self.rx.ring.kick();
    }
}

/// What a port counted. What is not there was zero.
pub type Counters = HashMap<String, u64>;

/// Asks the daemon what `port` has counted: the path of a socket, "the interface" or "the way out".
pub fn counters(daemon: &mut Daemon, port: &str) -> Result<Counters> {
    let before = daemon.stderr().len();
    daemon.signal(Signal::USR1)?;
    let line = format!("Counters of {port}: ");
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let text = daemon.stderr();
        let report = text.get(before..).and_then(|new| new.split_once(&line));
        if let Some((report, _)) = report.and_then(|(_, report)| report.split_once('\n')) {
            let pairs = report.split(' ').filter_map(|pair| pair.split_once('='));
            return pairs.map(|(name, number)| Ok((name.to_owned(), number.parse()?))).collect();
        }
        if Instant::now() > deadline {
            bail!("The daemon does not tell the counters of {port}:\n{text}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits until `port` has counted `number` of `name` and no more: the daemon counts a little later than it acts.
pub fn wait_counter(daemon: &mut Daemon, port: &str, name: &str, number: u64) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let counters = counters(daemon, port)?;
        let now = counters.get(name).copied().unwrap_or(0);
        if now == number {
            return Ok(());
        }
        if now > number || Instant::now() > deadline {
            bail!(
                "{port} has counted {now} of {name} instead of {number}: {counters:?}\n{}",
                daemon.stderr()
            );
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Fails if the daemon works although nothing happens.
pub fn check_idle(daemon: &Daemon) -> Result<()> {
    const WATCHED: Duration = Duration::from_millis(500);
    // What was going on comes to its end.
    std::thread::sleep(Duration::from_millis(50));
    let before = cpu_time(daemon.pid())?;
    std::thread::sleep(WATCHED);
    let used = cpu_time(daemon.pid())?.saturating_sub(before);
    ensure!(used < WATCHED / 50, "{used:?} of {WATCHED:?} were spent\n{}", daemon.stderr());
    Ok(())
}

/// Calls `done` until it says yes.
pub fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !done()? {
        if Instant::now() > deadline {
            bail!("Not within {} s: {what}", TIMEOUT.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}
