//! A device served to a front end over a real socket: what the link adds to the stock crates.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures as ProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_daemon::socket::Socket;
use vhost_user_daemon::{ConfigNotifier, Device, Progress, RING_FEATURES, SharedRing, ServeOptions, Worker, serve};

const SET_FEATURES: u32 = 2;
const SET_VRING_ENABLE: u32 = 18;
const NEED_REPLY: u32 = 8;

/// A device whose configuration space is a number.
#[derive(Default)]
struct Number(AtomicU64);

struct Nothing;

impl Device for Number {
    type Worker = Nothing;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> u16 {
        16
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn set_features(&self, _features: u64) {}

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.0.load(Ordering::SeqCst).to_le_bytes();
        if let Some(bytes) = bytes.get(offset..) {
            let len = bytes.len().min(data.len());
            data[..len].copy_from_slice(&bytes[..len]);
        }
    }

    fn write_config(&self, _offset: usize, _data: &[u8]) -> bool {
        false
    }

    fn reset(&self) {}

    fn new_worker(self: &Arc<Self>, _index: usize) -> io::Result<Nothing> {
        Ok(Nothing)
    }
}

impl Worker for Nothing {
    fn pass(&mut self, _rings: &[SharedRing]) -> Progress {
        Progress::Idle
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn wait(&mut self, _timeout: Duration, _kick: Option<&Arc<OwnedFd>>) {}
}

/// A device that is being served, until the test ends.
struct Served {
    path: PathBuf,
    device: Arc<Number>,
    notifier: ConfigNotifier,
    _directory: tempfile::TempDir,
}

impl Served {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let device = Arc::new(Number::default());
        let notifier = ConfigNotifier::default();
        let (served, channel) = (Arc::clone(&device), notifier.clone());
        // Ends with the process, as a daemon does without a signal.
        thread::spawn(move || {
            serve(&served, &channel, &Socket::Listening(listener.into()), ServeOptions::default()).unwrap();
        });
        Self { path, device, notifier, _directory: directory }
    }

    fn front_end(&self) -> Frontend {
        let mut front_end = Frontend::connect(&self.path, 2).unwrap();
        front_end.set_owner().unwrap();
        let features = front_end.get_features().unwrap();
        let offered = front_end.get_protocol_features().unwrap();
        assert!(offered.contains(ProtocolFeatures::CONFIG | ProtocolFeatures::BACKEND_REQ));
        front_end.set_protocol_features(offered & !ProtocolFeatures::STATUS).unwrap();
        front_end.set_features(features & !VhostUserVirtioFeatures::LOG_ALL.bits()).unwrap();
        front_end
    }
}

#[test]
fn a_changed_configuration_reaches_the_front_end() {
    let served = Served::new();
    assert!(!served.notifier.notify().unwrap(), "nobody is there to be told");
    let mut front_end = served.front_end();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    front_end.set_backend_request_fd(&theirs.as_raw_fd()).unwrap();
    // The next answer comes after the channel was taken over.
    front_end.get_features().unwrap();

    served.device.0.store(0x1234, Ordering::SeqCst);
    assert!(served.notifier.notify().unwrap());
    let mut message = [0u8; 12];
    ours.read_exact(&mut message).unwrap();
    let words: Vec<u32> =
        message.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [2, 1, 0], "CONFIG_CHANGE_MSG of version 1 without a body, that asks for no answer");
    let flags = VhostUserConfigFlags::empty();
    assert_eq!(front_end.get_config(0, 8, flags, &[0; 8]).unwrap().1, 0x1234u64.to_le_bytes());
    // Behind the end of the configuration space there are zeroes, as many as were asked for.
    assert_eq!(front_end.get_config(7, 16, flags, &[0; 16]).unwrap().1, [0; 16]);
}

#[test]
fn the_channel_ends_with_the_front_end() {
    let served = Served::new();
    for _ in 0..3 {
        let mut front_end = served.front_end();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        front_end.set_backend_request_fd(&theirs.as_raw_fd()).unwrap();
        front_end.get_features().unwrap();
        assert!(served.notifier.notify().unwrap());
        drop(front_end);
        // A new connection is served after the old one is cleared away.
        drop(served.front_end());
        served.front_end();
        assert!(!served.notifier.notify().unwrap());
    }
}

/// A front end that never reads its channel cannot hold up the daemon.
#[test]
fn a_deaf_front_end_holds_nobody_up() {
    let served = Served::new();
    let mut front_end = served.front_end();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    front_end.set_backend_request_fd(&theirs.as_raw_fd()).unwrap();
    front_end.get_features().unwrap();
    let full = (0..1_000_000).find_map(|_| served.notifier.notify().err());
    assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
    front_end.get_features().unwrap();
}

/// Sends a message with NEED_REPLY and gives the acknowledgement.
fn acknowledged(stream: &mut UnixStream, request: u32, body: &[u8]) -> u64 {
    let header = [request, 1 | NEED_REPLY, body.len() as u32];
    let header: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&[&header, body].concat()).unwrap();
    let mut reply = [0u8; 20];
    stream.read_exact(&mut reply).unwrap();
    u64::from_ne_bytes(reply[12..].try_into().unwrap())
}

/// DPDK and QEMU 8.2 enable rings before they set the features, and User Mode Linux sets the features once more
/// without the bit that all else depends on.
#[test]
fn rings_may_be_enabled_in_any_order() {
    let served = Served::new();
    let mut stream = UnixStream::connect(&served.path).unwrap();
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let acks = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIG;
    assert_eq!(acknowledged(&mut stream, 16, &acks.bits().to_ne_bytes()), 0);
    let enable = |index: u32, on: u32| [index.to_ne_bytes(), on.to_ne_bytes()].concat();
    assert_eq!(acknowledged(&mut stream, SET_VRING_ENABLE, &enable(1, 1)), 0);
    assert_eq!(acknowledged(&mut stream, SET_FEATURES, &(RING_FEATURES | protocol).to_ne_bytes()), 0);
    assert_eq!(acknowledged(&mut stream, SET_FEATURES, &RING_FEATURES.to_ne_bytes()), 0);
    assert_eq!(acknowledged(&mut stream, SET_VRING_ENABLE, &enable(1, 0)), 0);
    // What is wrong is refused, and the connection lives on.
    assert_eq!(acknowledged(&mut stream, SET_VRING_ENABLE, &enable(2, 1)), 1);
    assert_eq!(acknowledged(&mut stream, SET_VRING_ENABLE, &enable(0, 2)), 1);
    assert_eq!(acknowledged(&mut stream, SET_FEATURES, &u64::MAX.to_ne_bytes()), 1);
    assert_eq!(acknowledged(&mut stream, SET_FEATURES, &[0; 3]), 1);
    assert_eq!(acknowledged(&mut stream, SET_VRING_ENABLE, &enable(0, 1)), 0);
}
