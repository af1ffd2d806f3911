//! Descriptor chains and rings that are badly made, and notifications in both directions.

use std::time::{Duration, Instant};

use anyhow::Result;
use tests::driver::fixture::{BlkFixture, RawSetup, check_serves, pattern};
use tests::driver::raw::{Layout, RawDevice, RawOptions};
use tests::driver::request::{HEADER_LEN, OK, Outcome, Pending, Request, SECTOR};
use tests::driver::ring::{
    Arena, Desc, INDIRECT, NEXT, NO_INTERRUPT, NO_NOTIFY, Next, Placement, RawRing, WRITE, linked,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Long enough for a loaded machine; a daemon that works needs microseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough to see a signal that should not come.
const QUIET: Duration = Duration::from_millis(100);

/// Publishes `chain`, which must come back with a used length of 0, and a good request after it.
fn check_returned(ring: &mut RawRing, what: &str, chain: &[Desc]) -> Result<()> {
    let head = ring.add_chain(chain);
    ring.kick();
    assert_eq!(ring.wait_used(PATIENCE), Some((head.into(), 0)), "{what}");
    check_serves(ring)
}

/// A header in guest memory that reads sector 0.
fn header(ring: &mut RawRing) -> Desc {
    let addr = ring.arena.alloc(HEADER_LEN, 16);
    ring.memory().write(addr, &[0; HEADER_LEN]);
    Desc::readable(addr, HEADER_LEN as u32)
}

/// A good read of one sector.
fn good(ring: &mut RawRing) -> Vec<Desc> {
    let data = ring.arena.alloc(SECTOR + 1, 16);
    vec![header(ring).with(NEXT), Desc::writable(data, SECTOR as u32 + 1)]
}

#[test]
fn chains_that_lead_nowhere_come_back_empty() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let ring = &mut setup.ring;
    let [head, tail] = good(ring)[..] else { unreachable!("two descriptors") };
    let size = ring.size();
    let cases: [(&str, Vec<Desc>); 6] = [
        ("a descriptor that is its own successor", vec![head.to(Next::Entry(0))]),
        ("two descriptors in a circle", vec![head, head.to(Next::Entry(0))]),
        ("a circle behind the header", vec![head, tail.with(NEXT).to(Next::Entry(1))]),
        ("next just outside of the table", vec![head.to(Next::Index(size))]),
        ("next 65535", vec![head.to(Next::Index(u16::MAX))]),
        ("a buffer to read behind one to write", vec![head, tail.with(NEXT), Desc::readable(head.addr, 16)]),
    ];
    for (what, chain) in cases {
        check_returned(ring, what, &chain)?;
    }
    Ok(())
}

#[test]
fn buffers_outside_of_memory_come_back_empty() -> Result<()> {
    for layout in [Layout::One, Layout::TwoWithGap, Layout::TwoAdjacent] {
        let mut setup = RawSetup::new(&[], &RawOptions::default().layout(layout))?;
        let end = setup.device.memory().end();
        let ring = &mut setup.ring;
        let header = header(ring).with(NEXT);
        let mut cases = vec![
            ("at the end of memory", end, 512),
            ("across the end of memory", end - 256, 512),
            ("far outside", 1 << 52, 512),
            ("at the last address", u64::MAX, 1),
            ("with a wrapping end", u64::MAX - 255, 512),
            ("longer than memory", 0, u32::MAX),
            ("long from the last page", end - 4096, u32::MAX),
        ];
        if layout == Layout::TwoWithGap {
            cases.push(("in the gap", Layout::FIRST_END, 512));
            cases.push(("across the start of the gap", Layout::FIRST_END - 256, 512));
            cases.push(("across the end of the gap", Layout::HIGH - 256, 512));
        }
        for (what, addr, len) in cases {
            let what = format!("{layout:?}: data {what}");
            let status = Desc::writable(ring.arena.alloc(1, 1), 1);
            check_returned(ring, &what, &[header, Desc::writable(addr, len).with(NEXT), status])?;
            check_returned(ring, &what, &[header, Desc::readable(addr, len).with(NEXT), status])?;
            check_returned(ring, &what, &[Desc::readable(addr, len).with(NEXT), status])?;
            check_returned(ring, &what, &[header, Desc::writable(addr, len)])?;
        }
    }
    Ok(())
}

#[test]
fn bad_indirect_tables_come_back_empty() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let end = setup.device.memory().end();
    let ring = &mut setup.ring;
    let chain = linked(good(ring));
    let [head, tail] = chain[..] else { unreachable!("two descriptors") };
    let table = ring.write_indirect(&chain);
    let nested = ring.write_indirect(&[Desc::readable(table, 32).with(INDIRECT)]);
    let behind = ring.write_indirect(&[head, Desc::readable(table, 32).with(INDIRECT)]);
    let circle = ring.write_indirect(&[head, tail.with(NEXT).to(Next::Entry(0))]);
    let own = ring.write_indirect(&[head.to(Next::Entry(0))]);
    let outside = ring.write_indirect(&[head.to(Next::Index(2)), tail]);
    let stray = ring.write_indirect(&[head, Desc::writable(end, 513)]);
    // The longest table that a next index can reach, of which each entry is a buffer: more than any I/O call takes.
    let many = vec![Desc::readable(head.addr, 1).with(NEXT); 20_000];
    let many = ring.write_indirect(&many);

    let indirect = |addr, len| Desc::readable(addr, len).with(INDIRECT);
    let cases = [
        ("a table of length 0", vec![indirect(table, 0)]),
        ("a table of 15 bytes", vec![indirect(table, 15)]),
        ("a table of 33 bytes", vec![indirect(table, 33)]),
        ("a table of u32::MAX bytes", vec![indirect(table, u32::MAX)]),
        ("a table outside of memory", vec![indirect(end, 32)]),
        ("a table across the end of memory", vec![indirect(end - 16, 32)]),
        ("a table at a wrapping address", vec![indirect(u64::MAX - 15, 32)]),
        ("a table in a table", vec![indirect(nested, 16)]),
        ("a table behind a buffer in a table", vec![indirect(behind, 32)]),
        ("a table and a successor", vec![indirect(table, 32).with(NEXT), tail]),
        ("a circle in a table", vec![indirect(circle, 32)]),
        ("an own successor in a table", vec![indirect(own, 16)]),
        ("next outside of the table", vec![indirect(outside, 32)]),
        ("next in the part of a table that is cut off", vec![indirect(table, 16)]),
        ("a buffer outside of memory in a table", vec![indirect(stray, 32)]),
        ("a chain of 20,000 buffers", vec![indirect(many, 20_000 * 16)]),
    ];
    for (what, chain) in cases {
        check_returned(ring, what, &chain)?;
    }
    Ok(())
}

#[test]
fn unusual_but_valid_chains_are_served() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let ring = &mut setup.ring;
    let data = pattern(0, SECTOR);
    let chain = linked(good(ring));
    let [head, tail] = chain[..] else { unreachable!("two descriptors") };
    let table = ring.write_indirect(&chain);
    let scattered = ring.write_indirect(&[head.to(Next::Entry(2)), Desc::readable(u64::MAX, 1), tail]);
    let cases = [
        ("a table behind the header", vec![head, Desc::readable(table + 16, 16).with(INDIRECT)]),
        ("a table with entries that nothing leads to", vec![Desc::readable(table, 32).with(INDIRECT)]),
        (
            "a table whose order is that of its next fields",
            vec![Desc::readable(scattered, 48).with(INDIRECT)],
        ),
        ("the write flag on a table means nothing", vec![Desc::readable(table, 32).with(INDIRECT | WRITE)]),
        ("unknown flags mean nothing", vec![head.with(0x8000), tail.with(0x4000)]),
        ("an empty buffer in between", vec![head, Desc::writable(tail.addr, 0).with(NEXT), tail]),
    ];
    for (what, chain) in cases {
        ring.memory().write(tail.addr, &[0xFF; SECTOR + 1]);
        let id = ring.add_chain(&chain);
        ring.kick();
        assert_eq!(ring.wait_used(PATIENCE), Some((id.into(), SECTOR as u32 + 1)), "{what}");
        assert_eq!(ring.memory().read_vec(tail.addr, SECTOR), data, "{what}");
        assert_eq!(ring.memory().read_vec(tail.addr + SECTOR as u64, 1), [OK], "{what}");
    }
    setup.check_alive()
}

#[test]
fn a_chain_as_long_as_the_ring_is_served() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    let mut device = fixture.raw(&RawOptions::default())?;
    let mut ring = device.ring(0, 64)?;
    let cuts: Vec<usize> = (1..=62).map(|i| i * SECTOR).collect();
    let read = Request::read(3, 62 * SECTOR).cut(&[16], &cuts);
    let (chain, _) = ring.prepare(&read);
    assert_eq!(chain.len(), 64);
    let outcome = ring.execute(&read)?;
    assert_eq!(outcome.status, Some(OK));
    assert_eq!(outcome.used_len as usize, 62 * SECTOR + 1);
    assert_eq!(outcome.data, pattern(3 * 512, 62 * SECTOR));
    Ok(())
}

#[test]
fn a_head_outside_of_the_table_is_ignored() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for head in [RawSetup::RING_SIZE, RawSetup::RING_SIZE + 1, u16::MAX] {
        setup.ring.push_head(head);
        setup.ring.publish();
        setup.ring.kick();
        setup.check_alive()?;
        assert_eq!(setup.ring.used_idx(), setup.ring.used_seen(), "nothing came back for head {head}");
    }
    Ok(())
}

#[test]
fn an_avail_index_that_jumps_stops_the_ring_and_no_more() -> Result<()> {
    for jump in [RawSetup::RING_SIZE + 1, 0x8000, u16::MAX] {
        let mut setup = RawSetup::new(&["--num-queues", "2"], &RawOptions::default())?;
        setup.check_alive()?;
        let mut other = setup.device.ring(1, 16)?;
        setup.ring.set_avail_idx(setup.ring.avail_idx().wrapping_add(jump));
        setup.ring.kick();
        std::thread::sleep(QUIET);
        assert_eq!(setup.ring.used_idx(), setup.ring.used_seen(), "nothing is served after a jump by {jump}");
        check_serves(&mut other)?;

        drop((setup.ring, other, setup.device));
        let mut device = setup.fixture.raw(&RawOptions::default())?;
        check_serves(&mut device.ring(0, 128)?)?;
    }
    Ok(())
}

#[test]
fn rings_and_buffers_may_lie_in_any_region() -> Result<()> {
    for (layout, high) in [(Layout::TwoWithGap, Layout::HIGH), (Layout::TwoAdjacent, Layout::FIRST_END)] {
        let fixture = BlkFixture::new::<&str>([])?;
        let mut device = fixture.raw(&RawOptions::default().layout(layout))?;
        // Each part of the ring in another place, the used ring at its minimal alignment.
        let placement =
            Placement { size: 64, desc: high + 0x1_0010, avail: 0x40_0002, used: high + 0x3_0004, base: 0 };
        let mut ring = device.ring_at(0, placement)?;
        check_serves(&mut ring)?;
        ring.arena = Arena::new(high + 0x10_0000, 1 << 20);
        check_serves(&mut ring)?;
    }
    Ok(())
}

#[test]
fn a_buffer_may_lie_across_two_regions_that_touch() -> Result<()> {
    let mut setup = RawSetup::new(&[], &RawOptions::default().layout(Layout::TwoAdjacent))?;
    let ring = &mut setup.ring;
    let across = Layout::FIRST_END - 700;
    let data = ring.arena.alloc(HEADER_LEN + 1, 16);
    ring.memory().write(data, &[0; HEADER_LEN]);
    let chain =
        linked(vec![Desc::readable(data, 16), Desc::writable(across, 4096), Desc::writable(data + 16, 1)]);
    let head = ring.add_chain(&chain);
    ring.kick();
    assert_eq!(ring.wait_used(PATIENCE), Some((head.into(), 4097)));
    assert_eq!(ring.memory().read_vec(across, 4096), pattern(0, 4096));
    setup.check_alive()
}

#[test]
fn ring_indices_wrap_around() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    let mut device = fixture.raw(&RawOptions::default())?;
    let placement = Placement { base: 65_500, ..RawDevice::default_placement(0, 16) };
    let mut ring = device.ring_at(0, placement)?;
    for _ in 0..100 {
        check_serves(&mut ring)?;
    }
    assert_eq!(ring.used_idx(), 64, "100 requests after 65,500");
    Ok(())
}

/// Publishes `count` reads at once, without a kick.
fn publish_batch(ring: &mut RawRing, count: u16) -> Vec<Pending> {
    let pending = (0..count)
        .map(|i| {
            let (chain, writable) = ring.prepare(&Request::read(u64::from(i) * 8, SECTOR).indirect());
            let head = ring.write_descs(&chain);
            ring.push_head(head);
            Pending { head, writable }
        })
        .collect();
    ring.publish();
    pending
}

/// Takes `pending.len()` used entries, in any order, and checks each.
fn take_batch(ring: &mut RawRing, pending: &[Pending]) {
    for _ in pending {
        let (id, used_len) = ring.pop_used().expect("the whole batch is there");
        let number = pending.iter().position(|p| u32::from(p.head) == id).expect("a chain of this batch");
        let data = pattern(number as u64 * 8 * 512, SECTOR);
        let expected = Outcome { status: Some(OK), used_len: SECTOR as u32 + 1, data };
        assert_eq!(ring.outcome(&pending[number], used_len), expected, "request {number} of the batch");
    }
}

fn wait_signals(ring: &mut RawRing, more_than: u64) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    while ring.signals() <= more_than && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    ring.signals()
}

#[test]
fn with_event_idx_a_batch_makes_few_calls() -> Result<()> {
    const BATCH: u16 = 64;
    let mut setup = RawSetup::plain()?;
    let ring = &mut setup.ring;

    // A call for the first entry, as a driver asks that has been waiting.
    let before = ring.signals();
    ring.set_used_event(ring.used_seen());
    let pending = publish_batch(ring, BATCH);
    ring.kick();
    assert!(ring.wait_used_count(BATCH, PATIENCE), "the batch is served");
    assert!(wait_signals(ring, before) > before, "there is a call for the first entry");
    std::thread::sleep(QUIET);
    let calls = ring.signals() - before;
    assert!(calls <= 4, "{calls} calls for {BATCH} requests");
    take_batch(ring, &pending);

    // A call for the last entry only.
    let before = ring.signals();
    ring.set_used_event(ring.used_seen().wrapping_add(BATCH - 1));
    let pending = publish_batch(ring, BATCH);
    ring.kick();
    assert!(wait_signals(ring, before) > before, "there is a call for the last entry");
    assert_eq!(ring.used_idx().wrapping_sub(ring.used_seen()), BATCH, "which comes when all are there");
    std::thread::sleep(QUIET);
    assert_eq!(ring.signals() - before, 1, "and no other");
    take_batch(ring, &pending);

    // No call at all: the index asked for has passed already.
    let before = ring.signals();
    ring.set_used_event(ring.used_seen().wrapping_sub(1));
    let pending = publish_batch(ring, BATCH);
    ring.kick();
    assert!(ring.wait_used_count(BATCH, PATIENCE), "the batch is served");
    std::thread::sleep(QUIET);
    assert_eq!(ring.signals(), before, "no call was asked for");
    take_batch(ring, &pending);
    setup.check_alive()
}

#[test]
fn without_event_idx_no_interrupt_is_honoured() -> Result<()> {
    const BATCH: u16 = 64;
    let mut setup = RawSetup::new(&[], &RawOptions::default().without(VIRTIO_RING_F_EVENT_IDX))?;
    setup.check_alive()?;
    let ring = &mut setup.ring;

    ring.set_avail_flags(NO_INTERRUPT);
    let before = ring.signals();
    for _ in 0..4 {
        let pending = publish_batch(ring, BATCH);
        ring.kick();
        assert!(ring.wait_used_count(BATCH, PATIENCE), "the batch is served");
        take_batch(ring, &pending);
    }
    std::thread::sleep(QUIET);
    assert_eq!(ring.signals(), before, "no call while the driver wants none");

    ring.set_avail_flags(0);
    let pending = publish_batch(ring, BATCH);
    ring.kick();
    assert!(ring.wait_used_count(BATCH, PATIENCE), "the batch is served");
    assert!(wait_signals(ring, before) > before, "a call when the driver wants it again");
    take_batch(ring, &pending);
    setup.check_alive()
}

#[test]
fn an_idle_device_asks_for_kicks() -> Result<()> {
    for event_idx in [false, true] {
        let mut options = RawOptions::default();
        if !event_idx {
            options = options.without(VIRTIO_RING_F_EVENT_IDX);
        }
        let mut setup = RawSetup::new(&[], &options)?;
        for _ in 0..200 {
            setup.check_alive()?;
            let wants_kick = |ring: &RawRing| {
                if event_idx {
                    ring.avail_event() == ring.avail_idx()
                } else {
                    ring.used_flags() & NO_NOTIFY == 0
                }
            };
            let deadline = Instant::now() + PATIENCE;
            while !wants_kick(&setup.ring) {
                assert!(
                    Instant::now() < deadline,
                    "the device never asks for a kick (EVENT_IDX {event_idx})"
                );
                std::thread::yield_now();
            }
        }
    }
    Ok(())
}

#[test]
fn no_wake_up_is_lost_when_the_driver_kicks_only_on_demand() -> Result<()> {
    for event_idx in [false, true] {
        let mut options = RawOptions::default();
        if !event_idx {
            options = options.without(VIRTIO_RING_F_EVENT_IDX);
        }
        let mut setup = RawSetup::new(&[], &options)?;
        let ring = &mut setup.ring;
        for round in 0..3000_u16 {
            let count = 1 + round % 7;
            let old = ring.avail_idx();
            let pending = publish_batch(ring, count);
            let wanted = ring.wants_kick(old);
            if wanted {
                ring.kick();
            }
            for _ in 0..count {
                let (id, _) = ring.wait_used(PATIENCE).unwrap_or_else(|| {
                    panic!("round {round} hangs (EVENT_IDX {event_idx}, kicked {wanted})");
                });
                assert!(pending.iter().any(|p| u32::from(p.head) == id), "chain {id} was not published");
            }
        }
    }
    Ok(())
}
