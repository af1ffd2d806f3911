//! Each protocol against a small peer.

use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendFlags, accept, bind, listen, recv, send};
use tempfile::TempDir;

use super::*;

/// A frame that differs from others.
fn frame(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|index| (seed * 31 + index * 7 + (index >> 8)) as u8).collect()
}

/// A frame as it is in a stream.
fn prefixed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

fn put(peer: &mut Peer, frame: &[u8]) -> bool {
    let Some(room) = peer.reserve(frame.len()) else {
        return false;
    };
    room.copy_from_slice(frame);
    peer.commit();
    true
}

fn take(peer: &mut Peer) -> Option<Vec<u8>> {
    let frame = peer.frame()?.to_vec();
    peer.consume();
    Some(frame)
}

/// Waits until the peer's descriptor is ready.
fn wait(peer: &Peer, flags: PollFlags) {
    let fd = peer.fd().expect("a connection");
    poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None).expect("the descriptor becomes ready");
}

/// Fills until a frame is there.
fn receive(peer: &mut Peer) -> Vec<u8> {
    loop {
        if let Some(frame) = take(peer) {
            return frame;
        }
        wait(peer, PollFlags::IN);
        assert_ne!(peer.fill(), Fill::Disconnected);
    }
}

struct Server {
    directory: TempDir,
    listener: UnixListener,
}

impl Server {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("peer")).unwrap();
        Self { directory, listener }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("peer")
    }

    fn connect(&self) -> (Peer, UnixStream) {
        let mut peer = Peer::new(Address::Stream(self.path()));
        assert!(peer.connect(Instant::now()));
        (peer, self.listener.accept().unwrap().0)
    }
}

#[test]
fn a_stream_may_come_byte_by_byte() {
    let server = Server::new();
    let (mut peer, mut stream) = server.connect();
    assert_eq!(peer.fill(), Fill::Empty);
    for len in [MIN_FRAME, 60, 300] {
        let sent = frame(len, len);
        for byte in prefixed(&sent) {
            assert_eq!(peer.frame(), None);
            stream.write_all(&[byte]).unwrap();
            assert_eq!(peer.fill(), Fill::Some);
        }
        assert_eq!(take(&mut peer), Some(sent));
    }
    assert_eq!(peer.fill(), Fill::Empty);
}

#[test]
fn one_call_receives_many_frames_of_a_stream() {
    let server = Server::new();
    let (mut peer, mut stream) = server.connect();
    let frames: Vec<Vec<u8>> = (0..100).map(|seed| frame(seed, MIN_FRAME + seed * 10)).collect();
    stream.write_all(&frames.iter().flat_map(|frame| prefixed(frame)).collect::<Vec<u8>>()).unwrap();
    let received: Vec<Vec<u8>> = frames.iter().map(|_| receive(&mut peer)).collect();
    assert!(received == frames);
    assert_eq!(peer.frame(), None);
    let counters = peer.counters();
    assert_eq!(counters.rx_frames, 100);
    assert!(counters.rx_calls <= 5, "{counters:?}");
}

#[test]
fn a_stream_continues_where_it_was_cut() {
    let server = Server::new();
    let (mut peer, mut stream) = server.connect();
    sockopt::set_socket_send_buffer_size(peer.fd().unwrap(), 5000).unwrap();
    let frames: Vec<Vec<u8>> = (0..400)
        .map(|seed| frame(seed, if seed % 50 == 0 { MAX_FRAME } else { MIN_FRAME + seed * 13 % 3000 }))
        .collect();
    let expected: Vec<u8> = frames.iter().flat_map(|frame| prefixed(frame)).collect();
    let total = expected.len();
    let reader = std::thread::spawn(move || {
        let mut received = vec![0; total];
        // Odd pieces.
        for piece in received.chunks_mut(4099) {
            stream.read_exact(piece).unwrap();
        }
        (received, stream)
    });

    let mut blocked = 0;
    let mut frames = frames.iter().peekable();
    loop {
        while frames.peek().is_some_and(|frame| put(&mut peer, frame)) {
            frames.next();
        }
        match peer.flush() {
            Flush::Done if frames.peek().is_none() => break,
            Flush::Done => {}
            Flush::Blocked => {
                blocked += 1;
                wait(&peer, PollFlags::OUT);
            }
            Flush::Disconnected => panic!("connected"),
        }
    }
    let (received, _stream) = reader.join().unwrap();
    assert!(received == expected);
    assert!(blocked > 0, "the socket was never full");
    assert_eq!(peer.counters().tx_frames, 400);
}

#[test]
fn one_call_sends_many_frames_to_a_stream() {
    let server = Server::new();
    let (mut peer, mut stream) = server.connect();
    for seed in 0..64 {
        assert!(put(&mut peer, &frame(seed, 60)));
    }
    assert_eq!(peer.flush(), Flush::Done);
    let counters = peer.counters();
    assert_eq!((counters.tx_frames, counters.tx_calls), (64, 1));
    let mut received = vec![0; 64 * 64];
    stream.read_exact(&mut received).unwrap();
    assert_eq!(received[63 * 64..], prefixed(&frame(63, 60)));
}

#[test]
fn a_stream_comes_back() {
    let server = Server::new();
    let now = Instant::now();
    let mut peer = Peer::new(Address::Stream(server.path()));
    assert!(peer.next_retry().is_some_and(|at| at <= Instant::now()));
    assert_eq!((peer.flush(), peer.fill()), (Flush::Disconnected, Fill::Disconnected));
    assert!(peer.reserve(60).is_none());
    assert!(peer.connect(now + RETRY));
    assert_eq!(peer.next_retry(), None);

    // The rest of a frame will never come; a complete one is not lost.
    let (mut stream, _) = server.listener.accept().unwrap();
    stream.write_all(&prefixed(&frame(1, 60))).unwrap();
    stream.write_all(&prefixed(&frame(2, 60))[..30]).unwrap();
    drop(stream);
    assert_eq!(peer.fill(), Fill::Some);
    assert_eq!(peer.fill(), Fill::Some);
    assert_eq!(take(&mut peer), Some(frame(1, 60)));
    assert!(put(&mut peer, &frame(3, 60)));
    assert_eq!(peer.fill(), Fill::Disconnected);
    assert!(!peer.is_connected() && peer.fd().is_none());
    assert_eq!(peer.counters().tx_dropped, 1);

    let Server { directory, listener } = server;
    drop(listener);
    let path = directory.path().join("peer");
    let retry = peer.next_retry().unwrap();
    assert_eq!(retry, now + RETRY * 2);
    assert!(!peer.connect(retry));
    std::fs::remove_file(&path).unwrap();
    assert!(!peer.connect(retry + RETRY));
    let listener = UnixListener::bind(path).unwrap();
    assert!(!peer.connect(retry + RETRY), "it is not time yet");
    assert!(peer.connect(retry + RETRY * 2));
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(&prefixed(&frame(4, 60))).unwrap();
    assert_eq!(receive(&mut peer), frame(4, 60));
    assert_eq!(peer.counters().connections, 2);

    // A writer finds out as well.
    drop(stream);
    assert!(put(&mut peer, &frame(5, 60)));
    assert_eq!(peer.flush(), Flush::Disconnected);
}

#[test]
fn an_impossible_length_ends_the_connection() {
    let server = Server::new();
    for len in [0, MIN_FRAME as u32 - 1, MAX_FRAME as u32 + 1, u32::MAX] {
        let (mut peer, mut stream) = server.connect();
        stream.write_all(&prefixed(&frame(1, 60))).unwrap();
        stream.write_all(&len.to_be_bytes()).unwrap();
        stream.write_all(&[0; 1000]).unwrap();
        assert_eq!(receive(&mut peer), frame(1, 60));
        assert_eq!(peer.frame(), None);
        assert_eq!(peer.fill(), Fill::Disconnected);
        assert!(peer.connect(peer.next_retry().unwrap()), "and makes a new one");
        // That of `peer`, before that of the next round.
        server.listener.accept().unwrap();
    }
}

#[test]
fn only_possible_frames_find_room() {
    let server = Server::new();
    let (mut peer, _stream) = server.connect();
    for len in [0, MIN_FRAME - 1, MAX_FRAME + 1, usize::MAX] {
        assert!(peer.reserve(len).is_none());
    }
    // Reserved again instead of committed.
    assert!(peer.reserve(MAX_FRAME).is_some());
    assert!(peer.reserve(MIN_FRAME).is_some());
    peer.commit();
    peer.commit();
    assert_eq!(peer.flush(), Flush::Done);
    assert_eq!(peer.counters().tx_frames, 1);
    let mut count = 0;
    while put(&mut peer, &frame(0, MAX_FRAME)) {
        count += 1;
    }
    assert_eq!(count, BUFFER / (MAX_FRAME + 4));
}

proptest! {
    #[test]
    fn a_stream_may_come_in_any_pieces(
        lens in prop::collection::vec(MIN_FRAME..2000, 1..20),
        pieces in prop::collection::vec(1..3000_usize, 1..20),
    ) {
        let server = Server::new();
        let (mut peer, mut stream) = server.connect();
        let frames: Vec<Vec<u8>> = lens.iter().enumerate().map(|(seed, &len)| frame(seed, len)).collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| prefixed(frame)).collect();
        let mut bytes = &bytes[..];
        let mut received = Vec::new();
        for &piece in pieces.iter().cycle() {
            let (now, rest) = bytes.split_at(piece.min(bytes.len()));
            stream.write_all(now).unwrap();
            bytes = rest;
            prop_assert_eq!(peer.fill(), Fill::Some);
            // Some are left for the next time.
            if piece % 2 == 0 || bytes.is_empty() {
                received.extend(std::iter::from_fn(|| take(&mut peer)));
            }
            if bytes.is_empty() {
                break;
            }
        }
        prop_assert!(received == frames);
    }
}

#[test]
fn seqpacket_keeps_frames_apart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("peer");
    let listener = socket(SocketType::SEQPACKET).unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 4).unwrap();
    let mut peer = Peer::new(Address::Seqpacket(path));
    assert!(peer.connect(Instant::now()));
    let server = accept(&listener).unwrap();

    for seed in 0..10 {
        assert!(put(&mut peer, &frame(seed, 60 + seed)));
    }
    assert_eq!(peer.flush(), Flush::Done);
    assert_eq!((peer.counters().tx_frames, peer.counters().tx_calls), (10, 1));
    for seed in 0..10 {
        let mut buffer = [0; 100];
        let (len, _) = recv(&server, &mut buffer, RecvFlags::empty()).unwrap();
        assert_eq!(buffer[..len], frame(seed, 60 + seed));
    }

    assert_eq!(peer.fill(), Fill::Empty);
    for len in [MIN_FRAME - 1, MIN_FRAME, MAX_FRAME + 1, MAX_FRAME] {
        send(&server, &frame(len, len), SendFlags::empty()).unwrap();
    }
    drop(server);
    assert_eq!(peer.fill(), Fill::Some);
    assert_eq!(peer.fill(), Fill::Some, "frames come before the end");
    assert_eq!(take(&mut peer), Some(frame(MIN_FRAME, MIN_FRAME)));
    assert!(take(&mut peer) == Some(frame(MAX_FRAME, MAX_FRAME)));
    assert_eq!(peer.frame(), None);
    assert_eq!(peer.fill(), Fill::Disconnected);
    let counters = peer.counters();
    assert_eq!((counters.rx_frames, counters.rx_dropped, counters.rx_calls), (2, 2, 2));
    assert!(peer.connect(peer.next_retry().unwrap()));
}

/// The names in a directory.
fn names(directory: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(directory.path()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_datagram_peer_can_answer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("peer");
    let mut peer = Peer::new(Address::Dgram(path.clone()));
    let now = Instant::now();
    assert!(!peer.connect(now));
    assert!(names(&directory).is_empty(), "nothing is left behind");

    let server = UnixDatagram::bind(&path).unwrap();
    assert!(peer.connect(now + RETRY));
    assert!(put(&mut peer, &frame(1, 60)));
    assert_eq!(peer.flush(), Flush::Done);
    let mut buffer = [0; 100];
    let (len, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[..len], frame(1, 60));
    let from = from.as_pathname().expect("a path").to_owned();
    assert!(from.starts_with(std::fs::canonicalize(directory.path()).unwrap()), "{}", from.display());
    for len in [0, MIN_FRAME - 1, 60, MAX_FRAME + 1] {
        server.send_to(&frame(len, len), &from).unwrap();
    }
    assert_eq!(receive(&mut peer), frame(60, 60));
    assert_eq!(peer.fill(), Fill::Empty);
    assert_eq!(peer.counters().rx_dropped, 3);
    let stranger = UnixDatagram::unbound().unwrap();
    assert!(stranger.send_to(&frame(1, 60), &from).is_err(), "nobody else can send");

    // A queue that is full, until the server reads.
    server.set_nonblocking(true).unwrap();
    let mut sent = 0;
    loop {
        let flush = if put(&mut peer, &frame(sent, 100)) {
            sent += 1;
            Flush::Done
        } else {
            peer.flush()
        };
        if flush == Flush::Blocked {
            break;
        }
    }
    let mut received = 0;
    while received < sent {
        while let Ok(len) = server.recv(&mut buffer) {
            assert_eq!(buffer[..len], frame(received, 100));
            received += 1;
        }
        wait(&peer, PollFlags::OUT);
        assert_ne!(peer.flush(), Flush::Disconnected);
    }
    assert_eq!(peer.flush(), Flush::Done);

    // Replaced by another server.
    drop(server);
    assert!(put(&mut peer, &frame(2, 60)));
    assert_eq!(peer.flush(), Flush::Disconnected);
    assert!(!from.exists());
    std::fs::remove_file(&path).unwrap();
    let server = UnixDatagram::bind(&path).unwrap();
    assert!(peer.connect(peer.next_retry().unwrap()));
    assert!(put(&mut peer, &frame(3, 60)));
    assert_eq!(peer.flush(), Flush::Done);
    assert_eq!(server.recv(&mut buffer).unwrap(), 60);
    drop(peer);
    assert_eq!(names(&directory), ["peer"]);
}

/// The switch's part of the handshake. Returns its data socket.
fn answer_vde(control: &mut UnixStream, directory: &TempDir) -> UnixDatagram {
    let mut request = [0; 250];
    control.read_exact(&mut request).unwrap();
    let words: Vec<u32> =
        request[..12].chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [0xfeed_face, 3, 0]);
    assert_eq!(request[12..14], (libc::AF_UNIX as u16).to_ne_bytes());
    let path = request[14..122].split(|&byte| byte == 0).next().unwrap();
    assert!(request[122..].starts_with(b"vhost-user-net"));

    let data = directory.path().join("001.7");
    let socket = UnixDatagram::bind(&data).unwrap();
    socket.connect(std::ffi::OsStr::from_bytes(path)).unwrap();
    let mut reply = [0; 110];
    reply[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
    let data = data.as_os_str().as_bytes();
    reply[2..2 + data.len()].copy_from_slice(data);
    // In two parts, as a stream may.
    control.write_all(&reply[..50]).unwrap();
    control.write_all(&reply[50..]).unwrap();
    socket
}

#[test]
fn a_vde_switch_gives_a_port() {
    let directory = tempfile::tempdir().unwrap();
    let outer = names(&directory);
    let switch = TempDir::with_prefix_in("switch", directory.path()).unwrap();
    let ctl = switch.path().join("ctl");
    let listener = UnixListener::bind(&ctl).unwrap();
    for path in [switch.path(), &ctl] {
        let mut peer = Peer::new(Address::Vde(path.to_owned()));
        assert!(!peer.connect(Instant::now()));
        assert!(peer.fd().is_none() && peer.control_fd().is_none());
        let (mut control, _) = listener.accept().unwrap();
        let data = answer_vde(&mut control, &switch);
        assert!(peer.connect(peer.next_retry().unwrap()));
        assert!(peer.control_fd().is_some());

        assert!(put(&mut peer, &frame(1, 60)));
        assert_eq!(peer.flush(), Flush::Done);
        let mut buffer = [0; 100];
        let len = data.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..len], frame(1, 60));
        data.send(&frame(2, 60)).unwrap();
        assert_eq!(receive(&mut peer), frame(2, 60));
        assert_eq!(peer.fill(), Fill::Empty);

        // The switch goes.
        drop(control);
        assert_eq!(peer.fill(), Fill::Disconnected);
        std::fs::remove_file(switch.path().join("001.7")).unwrap();
        assert!(peer.next_retry().is_some());
    }
    drop(switch);
    assert_eq!(names(&directory), outer, "nothing is left behind");
}

#[test]
fn a_vde_switch_that_does_not_answer_is_asked_again() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("ctl")).unwrap();
    let mut peer = Peer::new(Address::Vde(directory.path().to_owned()));
    let start = Instant::now();
    assert!(!peer.connect(start));
    let _silent = listener.accept().unwrap();
    let mut looks = 0;
    while peer.next_retry().unwrap() < start + RETRY {
        assert!(!peer.connect(peer.next_retry().unwrap()));
        looks += 1;
    }
    assert!(looks < 30, "{looks}");
    let last = peer.next_retry().unwrap();
    assert!(!peer.connect(last), "given up");
    let retry = peer.next_retry().unwrap();
    assert_eq!(retry, last + RETRY);
    assert!(!peer.connect(retry));

    // Something else answers.
    let (mut other, _) = listener.accept().unwrap();
    other.write_all(&[7; 110]).unwrap();
    assert!(!peer.connect(peer.next_retry().unwrap()));
    let retry = peer.next_retry().unwrap();
    assert!(!peer.connect(retry));
    let (mut control, _) = listener.accept().unwrap();
    let _data = answer_vde(&mut control, &directory);
    assert!(peer.connect(peer.next_retry().unwrap()));
}
