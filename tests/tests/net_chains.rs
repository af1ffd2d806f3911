//! Frames in chains of every shape, good and bad, by rings by hand.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tests::driver::lan::{counters, wait_counter};
use tests::driver::net::{LONG_HEADER_LEN, TIMEOUT};
use tests::driver::net_fixture::{PORT, TapFixture};
use tests::driver::raw::{Layout, RawOptions};
use tests::driver::ring::{Desc, INDIRECT, NEXT, Next, RawRing};
use tests::driver::usage::cpu_time;
use tests::frames::{BROADCAST, HEADER_LEN, Header, NEEDS_CSUM, mac, number, numbered};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Long enough to see what should not come.
const QUIET: Duration = Duration::from_millis(200);
/// Number of descriptors of the rings.
const SIZE: u16 = 128;

/// Sets of features that differ in what a header looks like and who is woken when.
fn variants() -> Vec<(&'static str, RawOptions)> {
    let net = RawOptions::net();
    vec![
        ("modern", net),
        ("mergeable", net.with(VIRTIO_NET_F_MRG_RXBUF)),
        ("legacy", net.without(VIRTIO_F_VERSION_1)),
        ("legacy and mergeable", net.without(VIRTIO_F_VERSION_1).with(VIRTIO_NET_F_MRG_RXBUF)),
        ("without EVENT_IDX", net.without(VIRTIO_RING_F_EVENT_IDX)),
    ]
}

#[test]
fn a_frame_may_be_cut_anywhere() -> Result<()> {
    for (what, options) in variants() {
        let fixture = TapFixture::new::<&str>([])?;
        let mut net = fixture.connect(&options)?;
        let header = net.header_len();
        assert_eq!(header, if what == "legacy" { HEADER_LEN } else { LONG_HEADER_LEN });
        let mut tx = net.tx(0, SIZE)?;
        let each_byte: Vec<usize> = (1..100).collect();
        let cuts: [&[usize]; 9] = [
            &[],
            &[header],
            &[1],
            &[header - 1],
            &[header + 1],
            &[header, header + 14],
            &[5, header, header + 7, header + 40, header + 41],
            &[header + 59],
            &each_byte,
        ];
        let mut marker = 0;
        for cut in cuts {
            for is_indirect in [false, true] {
                for length in [60, 1514] {
                    marker += 1;
                    let frame = numbered(mac(1), BROADCAST, marker, length);
                    let mut request = tx.request(Header::default(), &frame).cut(cut, &[]);
                    request.indirect = is_indirect;
                    tx.execute(&request)
                        .with_context(|| format!("{what}: {cut:?}, indirect: {is_indirect}"))?;
                    let passed = fixture.packets.receive(TIMEOUT)?.context("it does not come out")?;
                    assert_eq!(passed.frame, frame, "{what}: {cut:?}, indirect: {is_indirect}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_frame_is_received_in_buffers_of_any_shape() -> Result<()> {
    for (what, options) in variants() {
        let fixture = TapFixture::new::<&str>([])?;
        let mut net = fixture.connect(&options)?;
        let header = net.header_len();
        let mut rx = net.rx(0, SIZE)?;
        let shapes: [&[usize]; 8] = [
            &[2048],
            &[header, 1514],
            &[1, header - 1, 1514],
            &[header + 1, 13, 1500],
            &[header + 1514],
            &[header, 14, 20, 20, 1460, 65_536],
            &[4, 4, 4, 1500, 500],
            &[65_550],
        ];
        let mut marker = 0;
        for shape in shapes {
            for length in [60, 1514] {
                for is_indirect in [false, true] {
                    let what = format!("{what}: {shape:?}, indirect: {is_indirect}");
                    marker += 1;
                    if is_indirect {
                        rx.post_indirect(shape)
                    } else {
                        rx.post(shape)
                    };
                    rx.ring.kick();
                    let frame = numbered(mac(2), BROADCAST, marker, length);
                    fixture.packets.send(Header::default(), &frame)?;
                    let received = rx.receive(TIMEOUT).with_context(|| what.clone())?;
                    let received = received.with_context(|| format!("{what}: nothing arrives"))?;
                    assert_eq!(received.frame, frame, "{what}");
                    assert_eq!(received.header, Header::default(), "{what}");
                    assert_eq!(received.used, [(header + length) as u32], "{what}");
                    if header == LONG_HEADER_LEN {
                        assert_eq!(received.num_buffers, Some(1), "{what}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_frame_is_spread_over_mergeable_buffers() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&RawOptions::net().with(VIRTIO_NET_F_MRG_RXBUF))?;
    let mut rx = net.rx(0, SIZE)?;
    let frame = numbered(mac(2), BROADCAST, 1, 1000);
    // Each buffer is filled before the next one is begun: 1012 bytes in pieces.
    let cases: [(&[&[usize]], &[u32]); 4] = [
        (&[&[512], &[512]], &[512, 500]),
        (&[&[12], &[900], &[100]], &[12, 900, 100]),
        (&[&[100, 100], &[300, 400], &[200]], &[200, 700, 112]),
        (&[&[1012]], &[1012]),
    ];
    for (shapes, used) in cases {
        for shape in shapes {
            rx.post(shape);
        }
        rx.ring.kick();
        fixture.packets.send(Header::default(), &frame)?;
        let received = rx.receive(TIMEOUT)?.context("nothing arrives")?;
        assert_eq!((received.frame.as_slice(), received.used.as_slice()), (frame.as_slice(), used));
        assert_eq!(received.num_buffers, Some(used.len() as u16));
    }
    Ok(())
}

/// Publishes `chain`, which must come back with nothing written and nothing sent, and a good frame after it.
fn check_dropped(
    fixture: &TapFixture,
    tx: &mut tests::driver::net::Tx,
    what: &str,
    chain: &[Desc],
) -> Result<()> {
    let head = tx.ring.add_chain(chain);
    tx.ring.kick();
    assert_eq!(tx.ring.wait_used(TIMEOUT), Some((head.into(), 0)), "{what}");
    fixture.check_sends(tx, 7).with_context(|| format!("after {what}"))
}

/// A frame with its header in guest memory.
fn good(ring: &mut RawRing) -> (u64, u32) {
    let bytes = [&[0; LONG_HEADER_LEN][..], &numbered(mac(1), BROADCAST, 99, 100)].concat();
    let address = ring.arena.alloc(bytes.len(), 1);
    ring.memory().write(address, &bytes);
    (address, bytes.len() as u32)
}

#[test]
fn bad_chains_are_dropped() -> Result<()> {
    for layout in [Layout::One, Layout::TwoWithGap, Layout::TwoAdjacent] {
        let fixture = TapFixture::new::<&str>([])?;
        let mut net = fixture.connect(&RawOptions::net().layout(layout))?;
        let end = net.device.memory().end();
        let mut tx = net.tx(0, SIZE)?;
        let (address, len) = good(&mut tx.ring);
        let head = Desc::readable(address, len);
        let table = tx.ring.write_indirect(&[head]);
        let nested = tx.ring.write_indirect(&[Desc::readable(table, 16).with(INDIRECT)]);
        let circle = tx.ring.write_indirect(&[head.with(NEXT).to(Next::Entry(0))]);
        let written = tx.ring.write_indirect(&[Desc::writable(address, len)]);
        let indirect = |address, len| Desc::readable(address, len).with(INDIRECT);
        let mut cases = vec![
            ("its own successor", vec![head.with(NEXT).to(Next::Entry(0))]),
            ("a circle", vec![head.with(NEXT), head.with(NEXT).to(Next::Entry(0))]),
            ("next outside of the table", vec![head.with(NEXT).to(Next::Index(SIZE))]),
            ("next 65535", vec![head.with(NEXT).to(Next::Index(u16::MAX))]),
            ("at the end of memory", vec![Desc::readable(end, len)]),
            ("across the end of memory", vec![Desc::readable(end - 50, len)]),
            ("far outside", vec![Desc::readable(1 << 52, len)]),
            ("at the last address", vec![Desc::readable(u64::MAX, 1)]),
            ("with a wrapping end", vec![Desc::readable(u64::MAX - 50, len)]),
            ("longer than memory", vec![Desc::readable(0, u32::MAX)]),
            ("a good header and a frame far outside", vec![head.with(NEXT), Desc::readable(1 << 52, 60)]),
            ("a table of length 0", vec![indirect(table, 0)]),
            ("a table of 15 bytes", vec![indirect(table, 15)]),
            ("a table of 17 bytes", vec![indirect(table, 17)]),
            ("a table of u32::MAX bytes", vec![indirect(table, u32::MAX - 15)]),
            ("a table outside of memory", vec![indirect(end, 16)]),
            ("a table in a table", vec![indirect(nested, 16)]),
            ("a circle in a table", vec![indirect(circle, 16)]),
            ("a table with a successor", vec![indirect(table, 16).with(NEXT), head]),
            ("nothing but a buffer to write", vec![Desc::writable(address, len)]),
            ("a table with a buffer to write", vec![indirect(written, 16)]),
        ];
        if layout == Layout::TwoWithGap {
            cases.push(("in the gap", vec![Desc::readable(Layout::FIRST_END, len)]));
            cases.push(("across the start of the gap", vec![Desc::readable(Layout::FIRST_END - 50, len)]));
        }
        for (what, chain) in cases {
            check_dropped(&fixture, &mut tx, &format!("{layout:?}: {what}"), &chain)?;
        }
    }
    Ok(())
}

#[test]
fn a_frame_across_two_regions_of_memory_is_sent() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&RawOptions::net().layout(Layout::TwoAdjacent))?;
    let mut tx = net.tx(0, SIZE)?;
    let frame = numbered(mac(1), BROADCAST, 1, 1514);
    let bytes = [&[0; LONG_HEADER_LEN][..], &frame].concat();
    for before in [1, 11, 12, 13, 26, 1000, 1525] {
        let address = Layout::FIRST_END - before;
        net.device.memory().write(address, &bytes);
        tx.ring.add_chain(&[Desc::readable(address, bytes.len() as u32)]);
        tx.ring.kick();
        tx.ring.wait_used(TIMEOUT).context("it does not come back")?;
        let passed = fixture.packets.receive(TIMEOUT)?.context("it does not come out")?;
        assert_eq!(passed.frame, frame, "{before} bytes before the border");
    }
    Ok(())
}

#[test]
fn bad_frames_and_headers_are_dropped_and_counted() -> Result<()> {
    let mut fixture = TapFixture::new::<&str>([])?;
    // With all that a header could mean, so that none of it is bad because it was not negotiated.
    let offloads = [0, 11, 12, 13, 14, 56].into_iter().fold(RawOptions::net(), RawOptions::with);
    let mut net = fixture.connect(&offloads)?;
    let mut tx = net.tx(0, SIZE)?;
    let frame = numbered(mac(1), BROADCAST, 99, 200);
    let csum =
        |csum_start, csum_offset| Header { flags: NEEDS_CSUM, csum_start, csum_offset, ..Header::default() };
    let gso = |gso_type, gso_size| Header { gso_type, hdr_len: 54, gso_size, ..csum(34, 16) };
    let cases: Vec<(&str, Header, Vec<u8>)> = vec![
        ("no frame", Header::default(), Vec::new()),
        ("less than an Ethernet header", Header::default(), frame[..13].to_vec()),
        ("more than any frame", Header::default(), vec![0xff; 70_000]),
        ("a checksum that starts behind the frame", csum(200, 0), frame.clone()),
        ("a checksum at the end of the frame", csum(100, 99), frame.clone()),
        ("a checksum at the last offset", csum(u16::MAX, u16::MAX), frame.clone()),
        ("an unknown kind of segments", gso(2, 100), frame.clone()),
        ("another unknown kind of segments", gso(0x7f, 100), frame.clone()),
        ("segments without payload", gso(1, 0), frame.clone()),
        ("nothing but segmentation", gso(0x80, 100), frame.clone()),
    ];
    let count = cases.len() as u64;
    for (what, header, frame) in cases {
        let request = tx.request(header, &frame);
        tx.execute(&request).context(what)?;
        fixture.check_sends(&mut tx, 7).with_context(|| format!("after {what}"))?;
    }
    for len in 0..LONG_HEADER_LEN as u32 {
        let (address, _) = good(&mut tx.ring);
        check_dropped(&fixture, &mut tx, "a part of a header", &[Desc::readable(address, len)])?;
    }
    drop((tx, net));
    let counted = counters(&mut fixture.daemon, PORT)?;
    let [bad, chain] = ["tx_bad_frame", "tx_bad_chain"].map(|name| counted.get(name).copied().unwrap_or(0));
    assert_eq!(bad + chain, count + LONG_HEADER_LEN as u64, "{bad} bad frames, {chain} bad chains");
    Ok(())
}

#[test]
fn bad_buffers_come_back_and_the_next_frame_arrives() -> Result<()> {
    for options in [RawOptions::net(), RawOptions::net().with(VIRTIO_NET_F_MRG_RXBUF)] {
        let mut fixture = TapFixture::new::<&str>([])?;
        let mut net = fixture.connect(&options)?;
        let end = net.device.memory().end();
        let (mut rx, mut tx) = net.pair(0, SIZE, 0)?;
        let table = rx.ring.write_indirect(&[Desc::writable(0x8000, 2048)]);
        let room = Desc::writable(rx.ring.arena.alloc(2048, 1), 2048);
        let read = Desc { flags: 0, ..room };
        let cases = [
            ("nothing to write", vec![read]),
            ("its own successor", vec![room.with(NEXT).to(Next::Entry(0))]),
            ("at the end of memory", vec![Desc::writable(end, 2048)]),
            ("across the end of memory", vec![Desc::writable(end - 100, 2048)]),
            ("with a wrapping end", vec![Desc::writable(u64::MAX - 100, 2048)]),
            ("a table of length 0", vec![Desc::readable(table, 0).with(INDIRECT)]),
            ("a table outside of memory", vec![Desc::readable(end, 16).with(INDIRECT)]),
            ("a table with a successor", vec![Desc::readable(table, 16).with(INDIRECT | NEXT), room]),
        ];
        let count = cases.len() as u64;
        for (marker, (what, chain)) in (1..).zip(cases) {
            let head = rx.post_raw(&chain);
            rx.post(&[2048]);
            rx.ring.kick();
            let frame = numbered(mac(2), BROADCAST, marker, 100);
            fixture.packets.send(Header::default(), &frame)?;
            // It may come back before there is a frame or with it.
            let used = rx.ring.wait_used(TIMEOUT);
            assert_eq!(used, Some((head.into(), 0)), "{what}");
            let received = rx.receive(TIMEOUT)?.with_context(|| format!("after {what}"))?;
            assert_eq!(received.frame, frame, "{what}");
        }
        fixture.packets.drain()?;
        fixture.check_sends(&mut tx, 7)?;
        drop((rx, tx, net));
        wait_counter(&mut fixture.daemon, PORT, "rx_bad_buffer", count)?;
    }
    Ok(())
}

#[test]
fn a_frame_that_no_buffer_holds_is_dropped_and_counted() -> Result<()> {
    let mut fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&RawOptions::net())?;
    let mut rx = net.rx(0, SIZE)?;
    for shape in [&[500][..], &[12, 100, 100], &[12], &[1]] {
        let head = rx.post(shape);
        rx.ring.kick();
        fixture.packets.send(Header::default(), &numbered(mac(2), BROADCAST, 1, 1000))?;
        let room: usize = shape.iter().sum();
        // Either the buffers come back empty, or the next frame that fits gets them.
        if room >= 12 + 60 {
            fixture.packets.send(Header::default(), &numbered(mac(2), BROADCAST, 2, 60))?;
        }
        let (id, len) = rx.ring.wait_used(TIMEOUT).context("the buffers stay away")?;
        assert_eq!(id, u32::from(head));
        assert!(len == 0 || len == 72, "{len} bytes in {shape:?}");
        rx.post(&[2048]);
        rx.ring.kick();
        fixture.packets.send(Header::default(), &numbered(mac(2), BROADCAST, 3, 1000))?;
        loop {
            let received = rx.ring.wait_used(TIMEOUT).context("the next frame stays away")?;
            if received.1 == 1012 {
                break;
            }
        }
    }
    drop((rx, net));
    let counted = counters(&mut fixture.daemon, PORT)?;
    assert!(counted.contains_key("rx_too_long"), "{counted:?}");
    Ok(())
}

#[test]
fn frames_wait_in_the_tap_for_buffers() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&RawOptions::net())?;
    let (mut rx, mut tx) = net.pair(0, SIZE, 0)?;
    for marker in 1..=20 {
        fixture.packets.send(Header::default(), &numbered(mac(2), BROADCAST, marker, 60))?;
    }
    fixture.packets.drain()?;
    // The other direction goes on meanwhile, and nothing spins.
    fixture.check_sends(&mut tx, 7)?;
    let before = cpu_time(fixture.daemon.pid())?;
    std::thread::sleep(Duration::from_millis(500));
    let spent = cpu_time(fixture.daemon.pid())?.saturating_sub(before);
    assert!(spent < Duration::from_millis(50), "{spent:?} in half a second without anything to do");
    for marker in 1..=20 {
        rx.post(&[2048]);
        if marker % 5 == 0 {
            rx.ring.kick();
            for marker in marker - 4..=marker {
                let received = rx.receive(TIMEOUT)?.with_context(|| format!("frame {marker} is lost"))?;
                assert_eq!(number(&received.frame), Some(marker));
            }
        }
    }
    assert!(rx.receive(QUIET)?.is_none());
    Ok(())
}

#[test]
fn buffers_posted_before_the_ring_starts_are_used() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&RawOptions::net())?;
    let mut rx = net.lay_out_rx(0, SIZE)?;
    for _ in 0..4 {
        rx.post(&[2048]);
    }
    net.device.start(0, &rx.ring)?;
    // Without any kick.
    for marker in 0..4 {
        fixture.packets.send(Header::default(), &numbered(mac(2), BROADCAST, marker, 60))?;
        let received = rx.receive(TIMEOUT)?.with_context(|| format!("frame {marker} is lost"))?;
        assert_eq!(number(&received.frame), Some(marker));
    }
    Ok(())
}

#[test]
fn frames_available_before_the_ring_starts_are_sent() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&RawOptions::net())?;
    let placement = tests::driver::raw::RawDevice::default_placement(1, SIZE);
    let mut ring = net.device.lay_out(1, placement)?;
    let (address, len) = good(&mut ring);
    for _ in 0..4 {
        ring.add_chain(&[Desc::readable(address, len)]);
    }
    net.device.start(1, &ring)?;
    for _ in 0..4 {
        let passed = fixture.packets.receive(TIMEOUT)?.context("a frame is lost")?;
        assert_eq!(number(&passed.frame), Some(99));
        ring.wait_used(TIMEOUT).context("it does not come back")?;
    }
    Ok(())
}

/// Sends and receives many frames at once, so that batches and every kind of wake-up happen.
#[test]
fn many_frames_pass_in_order() -> Result<()> {
    for (what, options) in variants() {
        let fixture = TapFixture::new::<&str>([])?;
        let mut net = fixture.connect(&options)?;
        let (mut rx, mut tx) = net.pair(0, SIZE, 100)?;
        let mut sent = 0;
        let mut received = 0;
        while sent < 2000 {
            let frames: Vec<_> = (sent..sent + 50).map(|n| numbered(mac(1), BROADCAST, n, 60)).collect();
            tx.send_all(&frames).with_context(|| format!("{what}: after {sent}"))?;
            for frame in &frames {
                let passed =
                    fixture.packets.receive(TIMEOUT)?.with_context(|| format!("{what}: after {sent}"))?;
                assert_eq!(&passed.frame, frame, "{what}");
            }
            let frames: Vec<_> = (sent..sent + 50).map(|n| numbered(mac(2), BROADCAST, n, 1000)).collect();
            fixture.packets.blast(Header::default(), &frames, 50, TIMEOUT)?;
            for _ in 0..50 {
                let frame =
                    rx.receive(TIMEOUT)?.with_context(|| format!("{what}: frame {received} is lost"))?;
                assert_eq!(number(&frame.frame), Some(received), "{what}");
                received += 1;
                rx.post(&[2048]);
            }
            rx.ring.kick();
            fixture.packets.drain()?;
            sent += 50;
        }
    }
    Ok(())
}

#[test]
fn nothing_is_heard_of_a_daemon_with_nothing_to_do() -> Result<()> {
    let fixture = TapFixture::new::<&str>([])?;
    let mut net = fixture.connect(&RawOptions::net())?;
    let (mut rx, mut tx) = net.pair(0, SIZE, 64)?;
    fixture.check_passes(&mut rx, &mut tx, 1)?;
    std::thread::sleep(QUIET);
    let (before, start) = (cpu_time(fixture.daemon.pid())?, Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    let spent = cpu_time(fixture.daemon.pid())?.saturating_sub(before);
    assert!(spent < Duration::from_millis(5), "{spent:?} in {:?}", start.elapsed());
    Ok(())
}
