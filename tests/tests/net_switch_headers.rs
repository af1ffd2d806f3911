//! `vhost-user-net --switch` seen from rings: headers of two lengths, buffers of all sizes, and what a sender leaves
//! undone and a receiver may not be able to do.

use anyhow::{Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::{BUFFERS, Guest, RING_SIZE, net_daemon, plain, wait_counter};
use tests::driver::net::LONG_HEADER_LEN;
use tests::driver::raw::RawOptions;
use tests::driver::ring::Desc;
use tests::frames::{self, BROADCAST, GSO_TCPV4, HEADER_LEN, Header, NEEDS_CSUM, mac, numbered};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};

/// Header `flags`: the checksums were verified.
const DATA_VALID: u8 = 2;
/// Beside the GSO type: CWR is set.
const GSO_ECN: u8 = 0x80;
/// What segments hold.
const MSS: u16 = 1448;

/// A driver that leaves everything undone.
fn sends_all() -> RawOptions {
    plain().with(VIRTIO_NET_F_CSUM).with(VIRTIO_NET_F_HOST_TSO4).with(VIRTIO_NET_F_HOST_TSO6)
}

/// A driver that does everything itself, also for others.
fn takes_all() -> RawOptions {
    plain()
        .with(VIRTIO_NET_F_MRG_RXBUF)
        .with(VIRTIO_NET_F_GUEST_CSUM)
        .with(VIRTIO_NET_F_GUEST_TSO4)
        .with(VIRTIO_NET_F_GUEST_TSO6)
}

/// One who sends, and one who receives.
struct Pair {
    daemon: Daemon,
    from: Guest,
    to: Guest,
}

impl Pair {
    fn new(sends: &RawOptions, receives: &RawOptions) -> Result<Self> {
        Self::with(sends, receives, &[2048])
    }

    fn with(sends: &RawOptions, receives: &RawOptions, sizes: &[usize]) -> Result<Self> {
        Self::with_chains(sends, receives, BUFFERS.min(RING_SIZE / sizes.len() as u16), sizes)
    }

    /// The receiver posts `chains` chains of buffers of these sizes.
    fn with_chains(sends: &RawOptions, receives: &RawOptions, chains: u16, sizes: &[usize]) -> Result<Self> {
        let daemon = net_daemon().arg("--switch").port("").port("").start()?;
        let [from, to] = [0, 1].map(|port| daemon.sockets()[port].clone());
        let to = Guest::join_with(&to, mac(2), receives, chains, sizes)?;
        Ok(Self { from: Guest::join(&from, mac(1), sends)?, to, daemon })
    }

    /// Sends a frame and receives the same.
    fn pass(&mut self, frame: &[u8]) -> Result<()> {
        self.from.send(frame)?;
        self.to.expect(frame)
    }

    fn wait_counter(&mut self, port: usize, name: &str, number: u64) -> Result<()> {
        let port = self.daemon.sockets()[port].display().to_string();
        wait_counter(&mut self.daemon, &port, name, number)
    }
}

fn tcp4(payload: &[u8]) -> Vec<u8> {
    frames::tcp4(mac(1), mac(2), [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()], [1000, 80], payload)
}

fn tcp6(payload: &[u8]) -> Vec<u8> {
    let addresses = ["2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap()];
    frames::tcp6(mac(1), mac(2), addresses, [1000, 80], payload)
}

/// Bytes that do not repeat with any segment size.
fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

#[test]
fn every_length_of_header_on_both_sides() -> Result<()> {
    let legacy = plain().without(VIRTIO_F_VERSION_1);
    let kinds = [
        (legacy, HEADER_LEN),
        (legacy.with(VIRTIO_NET_F_MRG_RXBUF), LONG_HEADER_LEN),
        (plain(), LONG_HEADER_LEN),
        (plain().with(VIRTIO_NET_F_MRG_RXBUF), LONG_HEADER_LEN),
    ];
    for (sends, send_len) in &kinds {
        for (receives, receive_len) in &kinds {
            let mut pair = Pair::new(sends, receives)?;
            assert_eq!((pair.from.net.header_len(), pair.to.net.header_len()), (*send_len, *receive_len));
            for (number, len) in [(1, 60), (2, 1514), (3, 22)] {
                let frame = numbered(mac(1), mac(2), number, len);
                pair.from.send(&frame)?;
                let received = pair.to.receive()?;
                assert_eq!((received.header, &received.frame), (Header::default(), &frame));
                assert_eq!(received.used, [(receive_len + len) as u32]);
                assert_eq!(received.num_buffers, (*receive_len == LONG_HEADER_LEN).then_some(1));
            }
        }
    }
    Ok(())
}

#[test]
fn a_frame_is_spread_over_mergeable_buffers() -> Result<()> {
    for size in [26, 64, 128, 1000, 1526] {
        let mut pair = Pair::with(&plain(), &plain().with(VIRTIO_NET_F_MRG_RXBUF), &[size])?;
        for (number, len) in [(1, 1514), (2, 60), (3, 64 - 12), (4, 65 - 12), (5, 1514)] {
            let frame = numbered(mac(1), mac(2), number, len);
            pair.from.send(&frame)?;
            let received = pair.to.receive()?;
            assert_eq!((received.header, &received.frame), (Header::default(), &frame), "buffers of {size}");
            let chains = (LONG_HEADER_LEN + len).div_ceil(size);
            assert_eq!(received.num_buffers, Some(chains as u16));
            // All chains but the last are full.
            let (last, full) = received.used.split_last().unwrap();
            assert!(full.iter().all(|used| *used as usize == size), "{full:?} of {size}");
            assert_eq!(full.len() * size + *last as usize, LONG_HEADER_LEN + len);
        }
    }
    Ok(())
}

#[test]
fn a_frame_is_spread_over_the_buffers_of_a_chain() -> Result<()> {
    for sizes in [&[12, 1514][..], &[10, 2, 1514], &[1, 1, 1, 9, 60, 700, 800], &[2048]] {
        let mut pair = Pair::with(&plain(), &plain(), sizes)?;
        for (number, len) in [(1, 60), (2, 1514), (3, 800)] {
            pair.pass(&numbered(mac(1), mac(2), number, len))?;
        }
    }
    Ok(())
}

#[test]
fn a_frame_that_fits_in_no_buffer_is_lost_alone() -> Result<()> {
    let mut pair = Pair::with(&plain(), &plain(), &[12 + 1000])?;
    pair.pass(&numbered(mac(1), mac(2), 1, 1000))?;
    pair.from.send(&numbered(mac(1), mac(2), 2, 1001))?;
    pair.pass(&numbered(mac(1), mac(2), 3, 1000))?;
    pair.wait_counter(1, "rx_too_long", 1)?;
    pair.wait_counter(1, "rx_frames", 2)
}

#[test]
fn a_buffer_without_room_for_any_frame_comes_back_empty() -> Result<()> {
    let mut pair = Pair::with(&plain(), &plain(), &[2048])?;
    // Behind the good ones, which are used up first.
    let small = pair.to.rx.post(&[12]);
    let wrong = {
        let address = pair.to.rx.ring.arena.alloc(2048, 2);
        pair.to.rx.post_raw(&[Desc::readable(address, 2048)])
    };
    for number in 0..u64::from(BUFFERS) {
        pair.from.send(&numbered(mac(1), mac(2), number, 60))?;
        ensure!(pair.to.receive()?.used == [72]);
    }
    for head in [small, wrong] {
        let used = pair.to.rx.ring.wait_used(tests::driver::net::TIMEOUT);
        assert_eq!(used, Some((head.into(), 0)));
    }
    pair.pass(&numbered(mac(1), mac(2), 99, 60))?;
    pair.wait_counter(1, "rx_bad_buffer", 2)
}

#[test]
fn a_checksum_stays_undone_for_who_can_do_it() -> Result<()> {
    let mut pair = Pair::new(&sends_all(), &takes_all())?;
    for whole in [tcp4(&payload(1000)), tcp6(&payload(7))] {
        let mut frame = whole;
        let header = frames::leave_checksum(&mut frame)?;
        pair.from.send_with(header, &frame)?;
        let received = pair.to.receive()?;
        assert_eq!((received.header, received.frame), (header, frame));
    }
    Ok(())
}

#[test]
fn a_checksum_is_filled_in_for_who_cannot() -> Result<()> {
    for receives in [plain(), plain().with(VIRTIO_NET_F_MRG_RXBUF), plain().without(VIRTIO_F_VERSION_1)] {
        let mut pair = Pair::new(&sends_all(), &receives)?;
        for whole in [tcp4(&payload(1000)), tcp4(&payload(1)), tcp6(&payload(7))] {
            let mut frame = whole.clone();
            let header = frames::leave_checksum(&mut frame)?;
            pair.from.send_with(header, &frame)?;
            pair.to.expect(&whole)?;
        }
    }
    Ok(())
}

#[test]
fn a_large_frame_stays_whole_for_who_can_cut_it() -> Result<()> {
    let mut pair = Pair::new(&sends_all(), &takes_all())?;
    for whole in [tcp4(&payload(65_000)), tcp6(&payload(65_000)), tcp4(&payload(3000))] {
        let mut frame = whole;
        let header = frames::leave_segmentation(&mut frame, MSS)?;
        pair.from.send_with(header, &frame)?;
        let received = pair.to.receive()?;
        assert_eq!(received.header, header);
        assert!(received.frame == frame);
        assert_eq!(received.used.len(), (LONG_HEADER_LEN + frame.len()).div_ceil(2048));
        assert_eq!(received.num_buffers, Some(received.used.len() as u16));
    }
    pair.wait_counter(1, "rx_large", 3)?;
    pair.wait_counter(0, "tx_large", 3)
}

/// Sends a large frame, and receives it in segments.
fn check_segments(pair: &mut Pair, whole: &[u8], gso_bits: u8, mss: u16) -> Result<()> {
    let (first, data) = frames::tcp_segment(whole)?;
    let mut frame = whole.to_vec();
    let mut header = frames::leave_segmentation(&mut frame, mss)?;
    header.gso_type |= gso_bits;
    pair.from.send_with(header, &frame)?;
    let mut together = Vec::new();
    while together.len() < data.len() {
        let received = pair.to.receive()?;
        ensure!(received.header == Header::default(), "{:?}", received.header);
        let (sequence, payload) = frames::tcp_segment(&received.frame)?;
        ensure!(
            sequence == first.wrapping_add(together.len() as u32),
            "{sequence} follows {}",
            together.len()
        );
        let expected = usize::from(mss).min(data.len() - together.len());
        ensure!(payload.len() == expected, "{} bytes in a segment of {expected}", payload.len());
        together.extend(payload);
    }
    ensure!(together == data);
    Ok(())
}

#[test]
fn a_large_frame_is_cut_for_who_cannot() -> Result<()> {
    let receivers = [
        plain(),
        plain().without(VIRTIO_F_VERSION_1),
        plain().with(VIRTIO_NET_F_GUEST_CSUM).with(VIRTIO_NET_F_MRG_RXBUF),
    ];
    for receives in receivers {
        let mut pair = Pair::new(&sends_all(), &receives)?;
        for (whole, mss) in [
            (tcp4(&payload(60_000)), MSS),
            (tcp6(&payload(60_000)), 1428),
            (tcp4(&payload(2896)), MSS),
            (tcp4(&payload(100)), MSS),
        ] {
            check_segments(&mut pair, &whole, 0, mss)?;
        }
        pair.pass(&numbered(mac(1), mac(2), 1, 60))?;
    }
    Ok(())
}

/// More segments than buffers that are taken from the ring at a time.
#[test]
fn every_segment_finds_the_buffer_that_was_posted_for_it() -> Result<()> {
    for receives in [plain(), plain().with(VIRTIO_NET_F_MRG_RXBUF)] {
        let mut pair = Pair::with_chains(&sends_all(), &receives, RING_SIZE, &[2048])?;
        check_segments(&mut pair, &tcp4(&payload(60_000)), 0, 600)?;
    }
    Ok(())
}

#[test]
fn one_version_of_ip_may_be_cut_and_the_other_not() -> Result<()> {
    let able =
        plain().with(VIRTIO_NET_F_MRG_RXBUF).with(VIRTIO_NET_F_GUEST_CSUM).with(VIRTIO_NET_F_GUEST_TSO4);
    let mut pair = Pair::new(&sends_all(), &able)?;
    check_segments(&mut pair, &tcp6(&payload(10_000)), 0, MSS)?;
    let mut frame = tcp4(&payload(10_000));
    let header = frames::leave_segmentation(&mut frame, MSS)?;
    pair.from.send_with(header, &frame)?;
    let received = pair.to.receive()?;
    assert_eq!((received.header, &received.frame), (header, &frame));
    // With CWR it takes a feature of its own.
    check_segments(&mut pair, &tcp4(&payload(10_000)), GSO_ECN, MSS)?;
    drop(pair);

    let mut pair = Pair::new(&sends_all(), &able.with(VIRTIO_NET_F_GUEST_ECN))?;
    let header = Header { gso_type: header.gso_type | GSO_ECN, ..header };
    pair.from.send_with(header, &frame)?;
    let received = pair.to.receive()?;
    assert_eq!((received.header, &received.frame), (header, &frame));
    Ok(())
}

/// What a guest says about checksums is nothing that another one could rely on.
#[test]
fn nobody_is_told_that_a_guest_s_frame_is_verified() -> Result<()> {
    let mut pair = Pair::new(&sends_all(), &takes_all())?;
    let frame = numbered(mac(1), mac(2), 1, 60);
    for flags in [DATA_VALID, DATA_VALID | 4, 0xfe] {
        pair.from.send_with(Header { flags, ..Header::default() }, &frame)?;
        pair.to.expect(&frame)?;
    }
    let mut frame = tcp4(&payload(100));
    let header = frames::leave_checksum(&mut frame)?;
    pair.from.send_with(Header { flags: NEEDS_CSUM | DATA_VALID, ..header }, &frame)?;
    let received = pair.to.receive()?;
    assert_eq!((received.header, received.frame), (header, frame));
    Ok(())
}

#[test]
fn a_header_that_does_not_fit_its_frame_is_dropped_and_counted() -> Result<()> {
    let mut pair = Pair::new(&sends_all(), &takes_all())?;
    let mut frame = tcp4(&payload(4000));
    let good = frames::leave_segmentation(&mut frame, MSS)?;
    let behind = frame.len() as u16;
    let bad = [
        ("a checksum behind the frame", Header { csum_start: behind, ..good }),
        ("a checksum at its end", Header { gso_type: 0, gso_size: 0, csum_start: behind - 17, ..good }),
        ("a checksum far behind it", Header { csum_start: u16::MAX, csum_offset: u16::MAX, ..good }),
        ("a checksum elsewhere", Header { csum_offset: 6, ..good }),
        ("an unknown type", Header { gso_type: 2, ..good }),
        ("another unknown type", Header { gso_type: 0x7f, ..good }),
        ("nothing but CWR", Header { gso_type: GSO_ECN, ..good }),
        ("segments of nothing", Header { gso_size: 0, ..good }),
        ("segments without a checksum", Header { flags: 0, ..good }),
    ];
    for (count, (what, header)) in (1..).zip(bad) {
        pair.from.send_with(header, &frame)?;
        pair.from.send_with(good, &frame)?;
        let received = pair.to.receive()?;
        ensure!((received.header, &received.frame) == (good, &frame), "{what}: {:?} came", received.header);
        pair.wait_counter(0, "tx_bad_frame", count)?;
    }
    pair.wait_counter(0, "tx_frames", 9)
}

#[test]
fn a_large_frame_that_cannot_be_cut_is_dropped_for_who_needs_it_cut() -> Result<()> {
    let mut pair = Pair::new(&sends_all(), &plain())?;
    // It says TCP over IPv4, and carries something else.
    let frame = numbered(mac(1), mac(2), 1, 4000);
    let header = Header {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: MSS,
        csum_start: 34,
        csum_offset: 16,
    };
    pair.from.send_with(header, &frame)?;
    pair.pass(&numbered(mac(1), mac(2), 2, 60))?;
    pair.wait_counter(1, "rx_impossible", 1)
}

#[test]
fn frames_of_impossible_lengths_are_dropped_and_counted() -> Result<()> {
    let mut pair = Pair::new(&plain(), &takes_all())?;
    let longest = 65_535 + 14 + 8;
    pair.from.send(&numbered(mac(1), BROADCAST, 1, 22)[..14])?;
    assert_eq!(pair.to.receive()?.frame.len(), 14);
    pair.pass(&numbered(mac(1), mac(2), 2, 60))?;
    pair.from.send(&[1; 13])?;
    pair.from.send(&[])?;
    pair.from.send(&numbered(mac(1), mac(2), 3, longest + 1))?;
    let frame = numbered(mac(1), mac(2), 4, longest);
    pair.from.send(&frame)?;
    assert!(pair.to.receive()?.frame == frame);
    pair.wait_counter(0, "tx_bad_frame", 3)?;
    // Not even a header.
    let short = pair.from.tx.request(Header::default(), &[]).truncated(LONG_HEADER_LEN - 1);
    pair.from.tx.execute(&short)?;
    pair.pass(&numbered(mac(1), mac(2), 5, 60))?;
    pair.wait_counter(0, "tx_bad_frame", 4)
}

#[test]
fn a_frame_is_the_same_however_its_chain_is_cut() -> Result<()> {
    let mut pair = Pair::new(&sends_all(), &plain())?;
    let whole = tcp4(&payload(1201));
    let mut frame = whole.clone();
    let header = frames::leave_checksum(&mut frame)?;
    for cuts in [&[12][..], &[10], &[1, 2, 3, 11, 12, 13, 26, 27], &[12, 46], &[5, 600, 601, 602]] {
        for indirect in [false, true] {
            let request = pair.from.tx.request(header, &frame).cut(cuts, &[]);
            pair.from.tx.execute(&if indirect { request.indirect() } else { request })?;
            pair.to.expect(&whole)?;
        }
    }
    Ok(())
}
