//! Taps, each test in a network namespace of its own.
//!
//! They need unshare(1), ip(8), and a `/dev/net/tun` that may be opened.

mod namespace;
mod sys;

use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR, c_int};
use namespace::{exists, has_other_users, ip, isolated, unprivileged};
use vhost_user_net::port::tap::{LinkMonitor, Tap, TapError, TapOptions};
use vhost_user_net::vnet::{FLAG_NEEDS_CSUM, HEADER_LEN, LEGACY_HEADER_LEN, Offloads};

const FLAGS: c_int = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
/// How long to wait for what must come.
const LONG: Duration = Duration::from_secs(30);
const ETHERNET_LEN: usize = 14;
const IPV4_LEN: usize = 20;

fn open(name: &str, queues: usize) -> Result<Tap, TapError> {
    Tap::open(name, &TapOptions { queues, mtu: None })
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn refusal(result: Result<Tap, TapError>) -> String {
    result.expect_err("refused").to_string()
}

/// Gives the interface an address, and a neighbour that never has to be asked for.
fn configure(interface: &str) {
    ip(&format!("link set {interface} address 02:00:00:00:00:01"));
    ip(&format!("addr add 10.9.0.1/24 dev {interface}"));
    ip(&format!("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev {interface}"));
}

/// A socket that talks to the neighbour.
fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("10.9.0.1:0").expect("the address is configured");
    socket.connect("10.9.0.2:7").expect("the neighbour is reachable");
    socket.set_read_timeout(Some(LONG)).expect("a socket option");
    socket
}

/// The next frame of a queue that carries `payload` in UDP over IPv4; others, such as those of IPv6, are dropped.
fn read_udp(tap: &Tap, queue: usize, header: usize, payload: &[u8]) -> Option<Vec<u8>> {
    std::iter::from_fn(|| sys::read(tap, queue)).find(|frame| {
        let frame = &frame[header..];
        frame[12..14] == [8, 0] && frame[ETHERNET_LEN + 9] == 17 && frame.ends_with(payload)
    })
}

/// A datagram from the neighbour with a virtio-net header of `header` zeroes in front.
fn udp_frame(header: usize, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut ipv4 = vec![0x45, 0];
    ipv4.extend(((IPV4_LEN + 8 + payload.len()) as u16).to_be_bytes());
    ipv4.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let sum: u32 = ipv4.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ipv4[10..12].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = vec![0; header];
    frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    frame.extend(ipv4);
    frame.extend(7u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend(((8 + payload.len()) as u16).to_be_bytes());
    // No checksum.
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

#[test]
fn a_new_tap_is_up_and_ends_with_the_process() {
    isolated("a_new_tap_is_up_and_ends_with_the_process", || {
        let tap = Tap::open("t0", &TapOptions { queues: 1, mtu: Some(9000) }).unwrap();
        assert!(exists("t0"));
        assert_eq!((tap.name(), tap.queues()), ("t0", 1));
        assert!(tap.is_up());
        assert_eq!(tap.mtu().unwrap(), 9000);
        drop(tap);
        assert!(!exists("t0"));
    });
}

#[test]
fn an_existing_tap_is_used_and_left() {
    isolated("an_existing_tap_is_used_and_left", || {
        ip("tuntap add dev t0 mode tap");
        // One queue of a tap that may have many, and one that has no header before it is opened.
        ip("tuntap add dev t1 mode tap multi_queue");
        for name in ["t0", "t1"] {
            let tap = open(name, 1).unwrap();
            assert!(!tap.is_up(), "it was down and is left so");
            ip(&format!("link set {name} up"));
            assert!(tap.is_up());
            drop(tap);
            assert!(exists(name));
        }
        // Again after it was closed.
        assert!(open("t0", 1).unwrap().is_up());
        // Where it has a new name, it is found all the same.
        let tap = open("t0", 1).unwrap();
        ip("link set t0 name renamed");
        assert!(tap.is_up());
        assert_eq!(tap.mtu().unwrap(), 1500);
    });
}

#[test]
fn frames_pass_both_ways() {
    isolated("frames_pass_both_ways", || {
        let tap = open("t0", 1).unwrap();
        configure("t0");
        let socket = socket();
        let port = socket.local_addr().unwrap().port();
        for header in [HEADER_LEN, LEGACY_HEADER_LEN] {
            tap.set_header_len(header).unwrap();
            socket.send(b"to the guest").unwrap();
            let frame = read_udp(&tap, 0, header, b"to the guest").expect("the frame");
            assert_eq!(frame.len(), header + ETHERNET_LEN + IPV4_LEN + 8 + 12);
            assert_eq!(frame[header..header + 6], [2, 0, 0, 0, 0, 2]);
            assert!(frame[..LEGACY_HEADER_LEN].iter().all(|&byte| byte == 0), "nothing is left undone");

            let frame = udp_frame(header, port, b"to the host");
            assert_eq!(sys::write(&tap, 0, &frame).unwrap(), frame.len());
            let mut buffer = [0; 100];
            let len = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], b"to the host");
        }
        assert!(sys::read(&tap, 0).is_none(), "an empty queue does not block");
        assert!(tap.set_header_len(11).is_err());

        let frame = udp_frame(LEGACY_HEADER_LEN, port, b"");
        assert!(
            sys::write(&tap, 0, &frame[..LEGACY_HEADER_LEN + 13]).is_err(),
            "less than an Ethernet header"
        );
        ip("link set t0 down");
        assert_eq!(sys::write(&tap, 0, &frame).unwrap_err().raw_os_error(), Some(libc::EIO));
        ip("link del t0");
        assert!(Tap::is_gone(&sys::write(&tap, 0, &frame).unwrap_err()));
        assert!(!tap.is_up());
    });
}

#[test]
fn offloads_are_what_the_reader_takes() {
    isolated("offloads_are_what_the_reader_takes", || {
        let tap = open("t0", 1).unwrap();
        configure("t0");
        let tso = Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        assert!(tap.supported_offloads().contains(Offloads::CSUM | tso), "{:?}", tap.supported_offloads());

        let socket = socket();
        let flags = || {
            socket.send(b"checksum").unwrap();
            read_udp(&tap, 0, HEADER_LEN, b"checksum").expect("the frame")[0]
        };
        assert_eq!(flags(), 0, "none is on at first");
        tap.set_offloads(Offloads::CSUM).unwrap();
        assert_eq!(flags(), FLAG_NEEDS_CSUM);
        // A set that the kernel does not take as it is.
        tap.set_offloads(tso | Offloads::USO4).unwrap();
        assert_eq!(flags(), 0);
        tap.set_offloads(Offloads::all()).unwrap();
        assert_eq!(flags(), FLAG_NEEDS_CSUM);
        tap.set_offloads(Offloads::empty()).unwrap();
        assert_eq!(flags(), 0);
    });
}

#[test]
fn frames_are_spread_over_the_attached_queues() {
    isolated("frames_are_spread_over_the_attached_queues", || {
        let tap = open("t0", 2).unwrap();
        configure("t0");
        assert!(tap.is_up(), "with all queues detached");
        let sockets: Vec<UdpSocket> = (0..64).map(|_| socket()).collect();
        // How many of 64 flows each queue gets.
        let counts = || {
            for socket in &sockets {
                socket.send(b"flow").unwrap();
            }
            [0, 1].map(|queue| std::iter::from_fn(|| read_udp(&tap, queue, HEADER_LEN, b"flow")).count())
        };
        assert_eq!(counts(), [0, 0]);
        tap.set_queue_enabled(1, true).unwrap();
        tap.set_queue_enabled(1, true).unwrap();
        assert_eq!(counts(), [0, 64]);
        tap.set_queue_enabled(0, true).unwrap();
        let [first, second] = counts();
        assert!(first > 0 && second > 0 && first + second == 64, "{first} + {second}");
        tap.set_queue_enabled(1, false).unwrap();
        tap.set_queue_enabled(1, false).unwrap();
        assert_eq!(counts(), [64, 0]);
        assert!(tap.set_queue_enabled(2, true).is_err());

        // Frames that waited are lost with the queue.
        sockets[0].send(b"flow").unwrap();
        tap.set_queue_enabled(0, false).unwrap();
        tap.set_queue_enabled(0, true).unwrap();
        assert!(read_udp(&tap, 0, HEADER_LEN, b"flow").is_none());

        // The one queue of a tap without IFF_MULTI_QUEUE is always attached.
        let single = open("t1", 1).unwrap();
        single.set_queue_enabled(0, false).unwrap();
        assert!(single.is_up());
    });
}

#[test]
fn what_is_no_usable_tap_is_named() {
    isolated("what_is_no_usable_tap_is_named", || {
        assert!(matches!(open("lo", 1), Err(TapError::NotTap { .. })));
        ip("link add veth0 type veth peer name veth1");
        let text = refusal(open("veth0", 1));
        assert!(text.contains("veth0 is of driver veth, not a tap"), "{text}");
        ip("tuntap add dev tun0 mode tun");
        assert!(refusal(open("tun0", 1)).contains("a tun, not a tap"));

        let tap = open("t0", 1).unwrap();
        let text = refusal(open("t0", 1));
        assert!(text.contains("Tap t0 is in use by another process"), "{text}");
        drop(tap);

        ip("tuntap add dev single mode tap");
        let text = refusal(open("single", 2));
        assert!(text.contains("ip tuntap add dev single mode tap user $USER vnet_hdr multi_queue"), "{text}");
        assert!(matches!(open("many", 257), Err(TapError::TooManyQueues { .. })));
        assert!(!exists("many"));

        for flags in [IFF_TAP | IFF_NO_PI, IFF_TAP | IFF_VNET_HDR] {
            let other = sys::queue("bare", flags | IFF_MULTI_QUEUE).unwrap();
            assert!(matches!(open("bare", 1), Err(TapError::NoHeader { .. })));
            drop(other);
        }

        assert!(matches!(open("/dev/null", 1), Err(TapError::NotTap { .. })));
        assert!(matches!(open("/dev/net/tun", 1), Err(TapError::NotTap { .. })));
        assert!(matches!(open("/dev/tap-of-nothing", 1), Err(TapError::NoMacvtap { .. })));
    });
}

#[test]
fn missing_privileges_are_named_with_the_command() {
    let name = "missing_privileges_are_named_with_the_command";
    isolated(name, || {
        // The owner needs no capability.
        if !exists("own") {
            ip("tuntap add dev own mode tap user 0 multi_queue");
            ip("link set own up");
            if has_other_users() {
                ip("tuntap add dev foreign mode tap user 1");
            }
        }
        unprivileged(name, || {
            let text = refusal(open("t0", 2));
            for part in [
                "CAP_NET_ADMIN",
                "`sudo ip tuntap add dev t0 mode tap user $USER vnet_hdr multi_queue`",
                "`sudo ip link set t0 up`",
            ] {
                assert!(text.contains(part), "{text}");
            }
            let text = refusal(open("t0", 1));
            assert!(text.contains("vnet_hdr`"), "{text}");

            if exists("foreign") {
                let text = refusal(open("foreign", 1));
                assert!(text.contains("Tap foreign belongs to another user"), "{text}");
            }

            let tap = open("own", 2).unwrap();
            assert!(tap.is_up());
            tap.set_mtu(1500).expect("nothing is to be done");
            let text = tap.set_mtu(9000).unwrap_err().to_string();
            assert!(text.contains("`sudo ip link set own mtu 9000`"), "{text}");
            tap.set_offloads(tap.supported_offloads()).unwrap();
            tap.set_header_len(LEGACY_HEADER_LEN).unwrap();
            tap.set_queue_enabled(1, true).unwrap();
            tap.set_queue_enabled(1, false).unwrap();
        });
    });
}

#[test]
fn inherited_queues_are_checked() {
    isolated("inherited_queues_are_checked", || {
        let from_fds = |fds: Vec<OwnedFd>| Tap::from_fds(fds, &TapOptions { queues: 1, mtu: None });
        let queue = |name: &str, flags| sys::queue(name, flags).unwrap();
        let multi = FLAGS | IFF_MULTI_QUEUE;

        assert!(matches!(from_fds(Vec::new()), Err(TapError::NoFd)));
        for file in ["/dev/null", "/proc/self/exe"] {
            let file = std::fs::File::open(file).unwrap();
            assert!(matches!(from_fds(vec![file.into()]), Err(TapError::FdNotTap { .. })));
        }
        let unattached = std::fs::File::open("/dev/net/tun").unwrap();
        assert!(matches!(from_fds(vec![unattached.into()]), Err(TapError::FdUnattached { .. })));

        for (flags, problem) in [
            (IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, "with IFF_TUN"),
            (IFF_TAP | IFF_VNET_HDR, "without IFF_NO_PI"),
            (IFF_TAP | IFF_NO_PI, "without IFF_VNET_HDR"),
        ] {
            let text = refusal(from_fds(vec![queue("t0", flags)]));
            assert!(text.contains("interface t0") && text.contains(problem), "{text}");
        }
        let single = queue("t0", FLAGS);
        let text = refusal(from_fds(vec![single.try_clone().unwrap(), single]));
        assert!(text.contains("without IFF_MULTI_QUEUE"), "{text}");
        let text = refusal(from_fds(vec![queue("t0", multi), queue("t1", multi)]));
        assert!(text.contains("of interface t1, others are of t0"), "{text}");
        let twice = queue("t0", multi);
        assert!(from_fds(vec![twice.try_clone().unwrap(), twice]).is_err(), "one queue for two");

        // Blocking, with a legacy header: whatever can be changed is.
        let tap = from_fds(vec![queue("t0", multi), queue("t0", multi)]).unwrap();
        assert_eq!((tap.name(), tap.queues()), ("t0", 2));
        ip("link set t0 up");
        configure("t0");
        tap.set_queue_enabled(1, true).unwrap();
        let socket = socket();
        socket.send(b"hello").unwrap();
        let frame = read_udp(&tap, 1, HEADER_LEN, b"hello").expect("the frame");
        assert_eq!(frame.len(), HEADER_LEN + ETHERNET_LEN + IPV4_LEN + 8 + 5);
        assert!(sys::read(&tap, 1).is_none());
        assert!(from_fds(vec![queue("t2", FLAGS)]).is_ok());
    });
}

#[test]
fn a_tap_may_be_in_another_namespace() {
    isolated("a_tap_may_be_in_another_namespace", || {
        // The same name there and here.
        let there = sys::queue("t0", FLAGS).unwrap();
        let (link, events) = mpsc::channel();
        let (tap, monitor) = std::thread::spawn(move || {
            sys::enter_new_network();
            ip("tuntap add dev t0 mode tap");
            ip("link set t0 up mtu 3000");
            let tap = Arc::new(Tap::from_fds(vec![there], &TapOptions { queues: 1, mtu: None }).unwrap());
            let monitor =
                LinkMonitor::start(Arc::clone(&tap), false, move |is_up| link.send(is_up).unwrap()).unwrap();
            (tap, monitor)
        })
        .join()
        .unwrap();
        assert!(!tap.is_up());
        assert!(tap.mtu().is_err());
        ip("link set t0 up");
        assert!(tap.is_up());
        assert!(events.recv_timeout(LONG).unwrap());
        ip("link set t0 down");
        assert!(!events.recv_timeout(LONG).unwrap());
        drop(monitor);
    });
}

#[test]
fn the_monitor_tells_each_change() {
    isolated("the_monitor_tells_each_change", || {
        let tap = Arc::new(open("t0", 2).unwrap());
        // The kernel gives no carrier to a tap without attached queues.
        tap.set_queue_enabled(0, true).unwrap();
        let (link, events) = mpsc::channel();
        let start = |was_up| {
            let link = link.clone();
            LinkMonitor::start(Arc::clone(&tap), was_up, move |is_up| link.send(is_up).unwrap()).unwrap()
        };
        let next = || events.recv_timeout(LONG).expect("a change of the link");

        let monitor = start(false);
        assert!(next(), "a change before the start is told");
        ip("link set t0 down");
        assert!(!next());
        // Other interfaces do not matter.
        ip("link set lo up");
        ip("link set t0 up");
        assert!(next());
        ip("link set t0 carrier off");
        assert!(!next());
        ip("link set t0 carrier on");
        assert!(next());
        drop(monitor);
        assert!(events.try_recv().is_err());

        let monitor = start(true);
        ip("link del t0");
        assert!(!next());
        drop(monitor);
    });
}

#[test]
fn a_macvtap_is_found_by_its_name() {
    isolated("a_macvtap_is_found_by_its_name", || {
        // Device nodes are not of a namespace: the number must be free among all.
        let index = 100_000 + std::process::id();
        ip("link add veth0 type veth peer name veth1");
        ip(&format!("link add link veth0 name mv0 index {index} type macvtap mode bridge"));
        ip("link set veth0 up");
        ip("link set mv0 up");
        let node = format!("/dev/tap{index}");
        if let Err(error) = std::fs::File::options().read(true).write(true).open(&node) {
            // An ordinary user has no access to the node of a new macvtap.
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{node}: {error}");
            let text = refusal(open("mv0", 1));
            assert!(text.contains(&format!("No permission to open {node}")), "{text}");
            return;
        }
        for name in ["mv0", &node] {
            let tap = Tap::open(name, &TapOptions { queues: 2, mtu: Some(1400) }).unwrap();
            assert_eq!((tap.name(), tap.queues()), ("mv0", 2));
            assert_eq!(tap.mtu().unwrap(), 1400);
            let supported = tap.supported_offloads();
            assert!(supported.contains(Offloads::CSUM | Offloads::TSO4), "{supported:?}");
            tap.set_offloads(supported).unwrap();
            tap.set_queue_enabled(0, true).unwrap();
            tap.set_queue_enabled(1, true).unwrap();

            assert!(!tap.is_up(), "the other end of the veth pair is down");
            // The kernel passes the carrier on in its own time.
            ip("link set veth1 up");
            wait_until("the macvtap is up", || tap.is_up());
            ip("link set veth1 down");
            wait_until("the macvtap is down", || !tap.is_up());
        }

        let single = Tap::open("mv0", &TapOptions { queues: 1, mtu: None }).unwrap();
        single.set_queue_enabled(0, true).unwrap();
        ip("link set veth1 up address 02:00:00:00:00:01");
        ip("addr add 10.9.0.1/24 dev veth1");
        let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        let frame = udp_frame(HEADER_LEN, socket.local_addr().unwrap().port(), b"to the host");
        assert_eq!(sys::write(&single, 0, &frame).unwrap(), frame.len());
        let mut buffer = [0; 100];
        let len = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"to the host");
    });
}
