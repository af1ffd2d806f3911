//! A guest that does nothing but pass buffers around: chains are laid out once, and given back as soon as they are used.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use tests::driver::net::RawNet;
use tests::driver::raw::RawOptions;
use tests::driver::ring::{Arena, Desc, NO_INTERRUPT, RawRing, WRITE};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::frame::Frame;

const SEND_QUEUE: u16 = 256;
/// More than are under way, so that no frame is lost for want of a buffer.
/// Buffers of the receive queue.
pub const RECEIVE_QUEUE: u16 = 1024;
/// The size of each.
pub const BUFFER: usize = 2048;
/// Guest memory for receive buffers, behind that of the rings.
const BUFFERS: u64 = 4 << 20;
/// Time without progress after which no more frames are under way.
const QUIET: Duration = Duration::from_millis(20);

const LIMIT: Duration = Duration::from_secs(10);

/// A connected guest with one pair of queues.
pub struct Guest {
    queues: [Queue; 2],
    _net: RawNet,
}

/// A ring whose chains go around.
struct Queue {
    ring: RawRing,
    /// Chains that wait to be given to the device again.
    idle: Vec<u16>,
    /// Used chains go back at once.
    recycles: bool,
}

impl Guest {
    /// Connects, with more features. The guest is ready to receive, and sends `frame` while it is driven, if there is one.
    pub fn connect(socket: &Path, features: &[u32], frame: Option<&Frame>) -> io::Result<Self> {
        let mut options = RawOptions::net().without(VIRTIO_RING_F_EVENT_IDX).without(VIRTIO_NET_F_MAC);
        for feature in features {
            options = options.with(*feature);
        }
        let mut net = RawNet::connect(socket, &options)?;
        let mut receive = Queue::new(net.device.ring(0, RECEIVE_QUEUE)?);
        receive.ring.arena = Arena::new(BUFFERS, 2 * u64::from(RECEIVE_QUEUE) * BUFFER as u64);
        for _ in 0..RECEIVE_QUEUE {
            receive.lay_out(&[0; BUFFER], WRITE);
        }
        receive.start();
        let mut send = Queue::new(net.device.ring(1, SEND_QUEUE)?);
        let packet = frame.map(Frame::with_header);
        for packet in std::iter::repeat_n(packet, SEND_QUEUE.into()).flatten() {
            send.lay_out(&packet, 0);
        }
        Ok(Self { queues: [receive, send], _net: net })
    }

    /// Keeps all receive buffers to itself from now on, until [`Guest::receive_all`]. They are to be used first.
    pub fn withhold(&mut self) {
        self.queues[0].recycles = false;
    }

    /// Gives all receive buffers to the device, and waits until they are used.
    pub fn receive_all(&mut self) -> io::Result<()> {
        self.queues[0].recycle();
        self.wait_used()
    }

    /// Waits until all receive buffers are used.
    pub fn wait_used(&mut self) -> io::Result<()> {
        let queue = &mut self.queues[0];
        let deadline = Instant::now() + LIMIT;
        while queue.idle.len() < RECEIVE_QUEUE.into() {
            if !queue.turn() && Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// Takes what is used. `false` if there was nothing.
    fn turn(&mut self) -> bool {
        let [receive, send] = &mut self.queues;
        receive.turn() | send.turn()
    }
}

impl Queue {
    fn new(ring: RawRing) -> Self {
        ring.set_avail_flags(NO_INTERRUPT);
        Self { ring, idle: Vec::new(), recycles: false }
    }

    /// Makes a chain of one buffer with these contents.
    fn lay_out(&mut self, bytes: &[u8], flags: u16) {
        let address = self.ring.arena.alloc(bytes.len(), 64);
        self.ring.memory().write(address, bytes);
        let desc = Desc::readable(address, bytes.len() as u32).with(flags);
        self.idle.push(self.ring.write_descs(&[desc]));
    }

    /// Gives all chains to the device, again and again.
    fn start(&mut self) {
        self.recycles = true;
        self.recycle();
    }

    /// Gives waiting chains to the device.
    fn recycle(&mut self) {
        let before = self.ring.avail_idx();
        for head in self.idle.drain(..) {
            self.ring.push_head(head);
        }
        self.ring.publish();
        if self.ring.wants_kick(before) {
            self.ring.kick();
        }
    }

    /// Takes what is used. `false` if there was nothing.
    fn turn(&mut self) -> bool {
        let before = self.idle.len();
        while let Some((head, _)) = self.ring.pop_used() {
            self.idle.push(head as u16);
        }
        let moved = self.idle.len() > before;
        if moved && self.recycles {
            self.recycle();
        }
        moved
    }
}

/// Lets the guests send and receive for `duration` by this thread, which polls, and waits until nothing is under way.
/// Returns the time until they stopped sending.
pub fn drive(guests: &mut [&mut Guest], duration: Duration) -> Duration {
    let start = Instant::now();
    for guest in &mut *guests {
        guest.queues[1].start();
    }
    let (mut elapsed, mut last) = (None, start);
    loop {
        let mut moved = false;
        for guest in &mut *guests {
            moved |= guest.turn();
        }
        let now = Instant::now();
        if moved {
            last = now;
        } else if now - last > QUIET && elapsed.is_some() {
            break;
        }
        if elapsed.is_none() && now - start >= duration {
            elapsed = Some(now - start);
            for guest in &mut *guests {
                guest.queues[1].recycles = false;
            }
        }
    }
    elapsed.unwrap_or(duration)
}
