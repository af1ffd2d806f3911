//! A device served to a front end over a real socket: what the link adds to the stock crates, and how front ends and
//! daemons come and go.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{env, fs};

use rustix::io::ioctl_fionread;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures as ProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_daemon::serve::ServeError;
use vhost_user_daemon::socket::{Socket, SocketOptions};
use vhost_user_daemon::{
    ConfigNotifier, Device, Progress, RING_FEATURES, ServeOptions, SharedRing, Worker, serve, serve_all,
};
use vmm_sys_util::eventfd::EventFd;

const SET_FEATURES: u32 = 2;
const SET_VRING_ENABLE: u32 = 18;
const NEED_REPLY: u32 = 8;

/// Of each connection of this device a worker is missing.
const BROKEN: u64 = u64::MAX;

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
        if self.0.load(Ordering::SeqCst) == BROKEN {
            Err(io::ErrorKind::OutOfMemory.into())
        } else {
            Ok(Nothing)
        }
    }
}

impl Worker for Nothing {
    fn pass(&mut self, _rings: &[SharedRing]) -> Progress {
        Progress::Idle
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn wait(&mut self, _timeout: Duration, _kicks: &[Arc<OwnedFd>]) {}
}

/// A device that is being served, until the test ends.
struct Served {
    path: PathBuf,
    device: Arc<Number>,
    notifier: ConfigNotifier,
    _directory: TempDir,
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
            serve(&served, &channel, &Socket::Listening(listener.into()), &ServeOptions::default()).unwrap();
        });
        Self { path, device, notifier, _directory: directory }
    }

    fn front_end(&self) -> Frontend {
        self.front_end_with(!ProtocolFeatures::STATUS)
    }

    /// A front end that acknowledges as many of these protocol features as are offered.
    fn front_end_with(&self, known: ProtocolFeatures) -> Frontend {
        let mut front_end = Frontend::connect(&self.path, 2).unwrap();
        front_end.set_owner().unwrap();
        let features = front_end.get_features().unwrap();
        let offered = front_end.get_protocol_features().unwrap();
        assert!(offered.contains(ProtocolFeatures::CONFIG | ProtocolFeatures::BACKEND_REQ));
        front_end.set_protocol_features(offered & known).unwrap();
        front_end.set_features(features & !VhostUserVirtioFeatures::LOG_ALL.bits()).unwrap();
        front_end
    }

    /// A front end with a channel, whose driver uses the device. As QEMU, it knows all protocol features.
    fn running_front_end(&self) -> (Frontend, UnixStream) {
        let mut front_end = self.front_end_with(ProtocolFeatures::all());
        let channel = give_channel(&mut front_end);
        share_memory(&front_end);
        start_ring(&mut front_end, 0);
        (front_end, channel)
    }
}

/// Gives the back end a channel, and returns the front end's side of it.
fn give_channel(front_end: &mut Frontend) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    front_end.set_backend_request_fd(&theirs.as_raw_fd()).unwrap();
    ours
}

/// Shares memory for the rings.
fn share_memory(front_end: &Frontend) {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(0x3000).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 0x3000,
        userspace_addr: 0,
        mmap_offset: 0,
        mmap_handle: memory.as_raw_fd(),
    };
    front_end.set_mem_table(&[region]).unwrap();
}

/// Starts a ring without chains.
fn start_ring(front_end: &mut Frontend, index: usize) {
    let ring = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: 0,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x1000,
        log_addr: None,
    };
    front_end.set_vring_num(index, 16).unwrap();
    front_end.set_vring_addr(index, &ring).unwrap();
    front_end.set_vring_base(index, 0).unwrap();
    front_end.set_vring_kick(index, &EventFd::new(0).unwrap()).unwrap();
    front_end.set_vring_enable(index, true).unwrap();
    // The next answer comes after all of this was done.
    front_end.get_features().unwrap();
}

/// Receives the three words of a message without a body.
fn receive_words(channel: &mut UnixStream) -> Vec<u32> {
    let mut message = [0u8; 12];
    channel.read_exact(&mut message).unwrap();
    message.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect()
}

/// Receives one `CONFIG_CHANGE_MSG`.
fn receive_change(channel: &mut UnixStream) {
    let words = receive_words(channel);
    assert_eq!(words, [2, 1, 0], "CONFIG_CHANGE_MSG of version 1 without a body, that asks for no answer");
}

/// Nothing is there to be read.
fn check_silent(channel: &UnixStream) {
    assert_eq!(ioctl_fionread(channel).unwrap(), 0);
}

#[test]
fn a_changed_configuration_reaches_the_front_end() {
    let served = Served::new();
    let (mut front_end, mut channel) = served.running_front_end();
    check_silent(&channel);
    served.device.0.store(0x1234, Ordering::SeqCst);
    served.notifier.notify();
    receive_change(&mut channel);
    let flags = VhostUserConfigFlags::empty();
    assert_eq!(front_end.get_config(0, 8, flags, &[0; 8]).unwrap().1, 0x1234u64.to_le_bytes());
    // Behind the end of the configuration space there are zeroes, as many as were asked for.
    assert_eq!(front_end.get_config(7, 16, flags, &[0; 16]).unwrap().1, [0; 16]);
}

/// QEMU's generic device dies of a notification while the guest is paused or has no driver.
#[test]
fn a_change_is_told_when_there_is_a_driver_for_it() {
    let served = Served::new();
    served.notifier.notify();
    let (mut front_end, mut channel) = served.running_front_end();
    receive_change(&mut channel);
    start_ring(&mut front_end, 1);
    check_silent(&channel);
    // A queue that the driver does without for a while changes nothing.
    front_end.set_vring_enable(1, false).unwrap();
    front_end.get_features().unwrap();
    served.notifier.notify();
    receive_change(&mut channel);

    // All are disabled and stopped, in QEMU's order.
    let stops: [fn(&mut Frontend); 2] = [
        |front_end| front_end.set_vring_enable(0, false).unwrap(),
        |front_end| assert_eq!(front_end.get_vring_base(0).unwrap(), 0),
    ];
    for stop in stops {
        stop(&mut front_end);
        front_end.get_features().unwrap();
        served.notifier.notify();
        served.notifier.notify();
        front_end.get_features().unwrap();
        check_silent(&channel);
        start_ring(&mut front_end, 0);
        receive_change(&mut channel);
        check_silent(&channel);
    }
}

/// The front end may stop the device before it reads that something has changed.
#[test]
fn a_change_that_is_read_too_late_is_void() {
    let served = Served::new();
    let (mut front_end, mut channel) = served.running_front_end();
    let notify = |channel: &UnixStream| {
        served.notifier.notify();
        // More than that comes when it is read.
        eventually("a first byte", || (ioctl_fionread(channel).unwrap() > 0).then_some(()));
        assert_eq!(ioctl_fionread(channel).unwrap(), 1);
    };
    let sent = served.notifier.sent();
    notify(&channel);
    assert_eq!(front_end.get_vring_base(0).unwrap(), 0);
    let words = receive_words(&mut channel);
    assert_eq!(words[1..], [1, 0]);
    assert!(words[0] > 0xff, "this is a message that exists");
    check_silent(&channel);
    assert_eq!(served.notifier.sent(), sent);
    // It is told later.
    start_ring(&mut front_end, 0);
    receive_change(&mut channel);
    // It is not void if the device goes on before.
    notify(&channel);
    assert_eq!(front_end.get_vring_base(0).unwrap(), 0);
    start_ring(&mut front_end, 0);
    receive_change(&mut channel);
    assert_eq!(served.notifier.sent(), sent + 2);
    // Another channel takes the place of one that is not read.
    notify(&channel);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    front_end.set_backend_request_fd(&theirs.as_raw_fd()).unwrap();
    receive_change(&mut ours);
    notify(&ours);
    drop((ours, theirs));
    front_end.get_features().unwrap();
}

/// Cloud Hypervisor gives its channel after it has started the rings.
#[test]
fn a_change_that_came_before_the_channel_is_told_by_it() {
    let served = Served::new();
    let mut front_end = served.front_end();
    share_memory(&front_end);
    start_ring(&mut front_end, 0);
    served.notifier.notify();
    let mut channel = give_channel(&mut front_end);
    // Nor does it wait for the rest of a message of which it has read a part.
    eventually("a message", || (ioctl_fionread(&channel).unwrap() > 0).then_some(()));
    assert_eq!(ioctl_fionread(&channel).unwrap(), 12);
    receive_change(&mut channel);
}

#[test]
fn the_channel_ends_with_the_front_end() {
    let served = Served::new();
    for _ in 0..3 {
        let (front_end, mut channel) = served.running_front_end();
        served.notifier.notify();
        receive_change(&mut channel);
        drop(front_end);
        assert_eq!(channel.read(&mut [0]).unwrap(), 0, "the channel is closed");
        served.notifier.notify();
        // A front end without a driver, and a channel, hears nothing of it.
        drop(served.front_end());
        let (_front_end, mut channel) = served.running_front_end();
        receive_change(&mut channel);
    }
}

/// A front end that never reads its channel cannot hold up the daemon.
#[test]
fn a_deaf_front_end_holds_nobody_up() {
    let served = Served::new();
    let (front_end, mut channel) = served.running_front_end();
    let sent = served.notifier.sent();
    for _ in 0..100_000 {
        served.notifier.notify();
    }
    front_end.get_features().unwrap();
    // One does for all.
    receive_change(&mut channel);
    check_silent(&channel);
    assert_eq!(served.notifier.sent(), sent + 1);
    served.notifier.notify();
    receive_change(&mut channel);
    assert_eq!(served.notifier.sent(), sent + 2);
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

/// Longer than anything here takes on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Serves devices whose numbers are their places in `sockets`, until the process ends or all have left.
fn serve_numbers(
    numbers: impl IntoIterator<Item = u64>,
    sockets: &[SocketOptions],
    options: &ServeOptions,
) -> Result<(), ServeError> {
    let devices: Vec<_> = numbers.into_iter().map(|number| Arc::new(Number(number.into()))).collect();
    let sockets: Vec<_> = sockets.iter().map(|socket| Socket::open(socket).unwrap()).collect();
    let notifiers: Vec<_> = sockets.iter().map(|_| ConfigNotifier::default()).collect();
    let served: Vec<_> = devices
        .iter()
        .zip(&notifiers)
        .zip(&sockets)
        .map(|((device, notifier), socket)| vhost_user_daemon::Served { device, notifier, socket })
        .collect();
    serve_all(&served, options)
}

fn listening(path: &Path) -> SocketOptions {
    SocketOptions { path: path.into(), ..SocketOptions::default() }
}

fn client(path: &Path) -> SocketOptions {
    SocketOptions { client: true, ..listening(path) }
}

/// Serves on a thread.
fn start(sockets: Vec<SocketOptions>, exit_on_disconnect: bool) -> JoinHandle<()> {
    let options = ServeOptions { exit_on_disconnect, ..ServeOptions::default() };
    thread::spawn(move || serve_numbers(0..sockets.len() as u64, &sockets, &options).unwrap())
}

/// Waits until `attempt` succeeds.
#[track_caller]
fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(Instant::now() < end, "{what} takes too long");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A front end that listens at `path`.
fn listen(path: &Path) -> UnixListener {
    let listener = UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

/// A front end to which a daemon connects.
#[track_caller]
fn accept(listener: &UnixListener) -> Frontend {
    let stream = eventually("connecting", || listener.accept().ok()).0;
    stream.set_nonblocking(false).unwrap();
    Frontend::from_stream(stream, 2)
}

/// A front end that connects to a daemon that may not listen yet.
#[track_caller]
fn connect(path: &Path) -> Frontend {
    Frontend::from_stream(eventually("listening", || UnixStream::connect(path).ok()), 2)
}

/// Whether the daemon answers, and is the one that serves `number`.
#[track_caller]
fn check(front_end: &mut Frontend, number: u64) {
    front_end.set_owner().unwrap();
    front_end.get_features().unwrap();
    let offered = front_end.get_protocol_features().unwrap();
    front_end.set_protocol_features(offered & !ProtocolFeatures::STATUS).unwrap();
    check_again(front_end, number);
}

#[track_caller]
fn check_again(front_end: &mut Frontend, number: u64) {
    let config = front_end.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap().1;
    assert_eq!(config, number.to_le_bytes());
}

#[test]
fn a_client_connects_whenever_the_front_end_listens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    start(vec![client(&path)], false);
    let listener = listen(&path);
    let mut front_end = accept(&listener);
    check(&mut front_end, 0);
    // It has one connection at a time.
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(front_end);
    check(&mut accept(&listener), 0);
    // One that hangs up at once is called again.
    for _ in 0..2 {
        drop(accept(&listener));
    }

    fs::remove_file(&path).unwrap();
    drop(listener);
    let listener = listen(&path);
    check(&mut accept(&listener), 0);
    fs::remove_file(&path).unwrap();
    let left: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_client_can_end_with_its_front_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let daemon = start(vec![client(&path)], true);
    let listener = listen(&path);
    check(&mut accept(&listener), 0);
    daemon.join().unwrap();
    assert!(path.exists(), "the path is the front end's");
}

#[test]
fn front_ends_of_several_sockets_do_not_disturb_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let listener = listen(&path("c"));
    start(vec![listening(&path("a")), listening(&path("b")), client(&path("c"))], false);
    let (mut a, mut b, mut c) = (connect(&path("a")), connect(&path("b")), accept(&listener));
    check(&mut a, 0);
    check(&mut b, 1);
    check(&mut c, 2);
    for _ in 0..3 {
        drop(a);
        check_again(&mut b, 1);
        a = connect(&path("a"));
        check(&mut a, 0);
        check_again(&mut c, 2);
    }
    drop((a, c));
    check_again(&mut b, 1);
    check(&mut accept(&listener), 2);
}

/// It ends when each socket has had a front end and none has one any more.
#[test]
fn several_sockets_end_with_the_last_front_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let daemon = start(vec![listening(&path("a")), listening(&path("b"))], true);
    let mut a = connect(&path("a"));
    check(&mut a, 0);
    drop(a);
    // The other one has not come yet.
    let mut a = connect(&path("a"));
    check(&mut a, 0);
    let mut b = connect(&path("b"));
    check(&mut b, 1);
    drop(a);
    check_again(&mut b, 1);
    let mut a = connect(&path("a"));
    check(&mut a, 0);
    drop(b);
    check_again(&mut a, 0);
    assert!(!daemon.is_finished());
    drop(a);
    daemon.join().unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
}

/// Not a test of its own: a daemon in a process that signals reach. Says "report" on SIGUSR1.
#[test]
#[ignore = "child of other tests"]
fn child() {
    let paths = |name| {
        let list = env::var_os(name).unwrap_or_default();
        // The empty list has one empty path.
        env::split_paths(&list).filter(|path| path.file_name().is_some()).collect::<Vec<_>>()
    };
    let sockets: Vec<_> = paths("TEST_LISTEN")
        .iter()
        .map(|path| listening(path))
        .chain(paths("TEST_CONNECT").iter().map(|path| client(path)))
        .collect();
    let numbers = (0..sockets.len() as u64).map(|number| {
        if env::var("TEST_BROKEN").is_ok_and(|broken| broken == number.to_string()) { BROKEN } else { number }
    });
    let options =
        ServeOptions { on_report: Some(Arc::new(|| eprintln!("report"))), ..ServeOptions::default() };
    serve_numbers(numbers, &sockets, &options).unwrap();
}

/// A daemon in a process of its own.
struct Process {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    notifications: UnixDatagram,
    directory: TempDir,
}

impl Process {
    /// Starts [`child`] with the sockets `listen` and `connect`, and waits until it catches signals.
    fn start(listen: &[&str], connect: &[&str], broken: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let paths =
            |names: &[&str]| env::join_paths(names.iter().map(|name| directory.path().join(name))).unwrap();
        let notifications = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        notifications.set_read_timeout(Some(LIMIT)).unwrap();
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env("TEST_LISTEN", paths(listen))
            .env("TEST_CONNECT", paths(connect))
            .env("TEST_BROKEN", broken)
            .env("NOTIFY_SOCKET", directory.path().join("notify"))
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let process = Self { child, stderr, notifications, directory };
        assert_eq!(process.notification(), "READY=1");
        process
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What the daemon tells its service manager.
    #[track_caller]
    fn notification(&self) -> String {
        let mut buffer = [0; 64];
        let len = self.notifications.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).trim().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end; whether it was an orderly one, and what was said.
    #[track_caller]
    fn end(mut self) -> (bool, String) {
        let status = eventually("ending", || self.child.try_wait().unwrap());
        let mut text = String::new();
        self.stderr.read_to_string(&mut text).unwrap();
        (status.success(), text)
    }
}

/// A test that fails leaves no process behind.
impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn sigterm_ends_a_client_that_waits() {
    let daemon = Process::start(&[], &["nobody"], "");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.notification(), "STOPPING=1");
    let (orderly, text) = daemon.end();
    assert!(orderly, "{text}");
}

#[test]
fn sigterm_ends_all_sockets() {
    let daemon = Process::start(&["a", "b", "c"], &["d", "e"], "");
    let listener = listen(&daemon.path("d"));
    let (mut a, mut b, mut d) = (connect(&daemon.path("a")), connect(&daemon.path("b")), accept(&listener));
    check(&mut a, 0);
    check(&mut b, 1);
    check(&mut d, 3);
    daemon.signal(Signal::TERM);
    let paths = ["a", "b", "c", "a.lock"].map(|name| daemon.path(name));
    eventually("ending", || (!paths.iter().any(|path| path.exists())).then_some(()));
    assert!(a.get_features().is_err());
    assert!(b.get_features().is_err());
    assert!(d.get_features().is_err());
    let (orderly, text) = daemon.end();
    assert!(orderly, "{text}");
}

#[test]
fn an_error_on_one_socket_ends_all() {
    let daemon = Process::start(&["a", "b"], &[], "1");
    let mut a = connect(&daemon.path("a"));
    check(&mut a, 0);
    let _b = connect(&daemon.path("b"));
    assert_eq!(daemon.notification(), "STOPPING=1");
    let (orderly, text) = daemon.end();
    assert!(!orderly && text.contains("Connection("), "{text}");
    assert!(a.get_features().is_err());
}

#[test]
fn sigusr1_asks_for_a_report() {
    let mut daemon = Process::start(&["a"], &[], "");
    let mut front_end = connect(&daemon.path("a"));
    check(&mut front_end, 0);
    for _ in 0..3 {
        daemon.signal(Signal::USR1);
        let mut line = String::new();
        daemon.stderr.read_line(&mut line).unwrap();
        assert_eq!(line, "report\n");
    }
    check_again(&mut front_end, 0);
    daemon.signal(Signal::TERM);
    let (orderly, text) = daemon.end();
    assert!(orderly, "{text}");
}
