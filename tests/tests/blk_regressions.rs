//! Defects of `vhost-user-blk` that a review found, each as a front end or a driver runs into it.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::driver::fixture::{BlkFixture, IMAGE_LEN, RawSetup, check_serves, pattern};
use tests::driver::memory::SharedMemory;
use tests::driver::raw::{Layout, RawDevice, RawOptions};
use tests::driver::request::{HEADER_LEN, IOERR, OK, Outcome, Pending, Request, SECTOR, UNTOUCHED};
use tests::driver::ring::{Arena, Desc, INDIRECT, NEXT, NO_NOTIFY, Next, RawRing, linked};
use tests::driver::usage::{Footprint, cpu_time};
use tests::driver::wire::{config_body, vring_state};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags, VhostUserProtocolFeatures};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Long enough for a loaded machine; a daemon that works needs microseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough to see a request served that should not be.
const QUIET: Duration = Duration::from_millis(20);
/// Where `writeback` lies in the config space.
const WCE: u32 = 32;

/// Reads that are kept in a ring. Each has to come back exactly once, with its data.
struct Load {
    depth: usize,
    len: usize,
    /// By the head of the chain, with the first sector.
    pending: BTreeMap<u32, (Pending, u64)>,
    served: u64,
}

impl Load {
    fn new(depth: usize, len: usize) -> Self {
        Self { depth, len, pending: BTreeMap::new(), served: 0 }
    }

    /// Publishes `count` more reads, without a kick.
    fn publish(&mut self, ring: &mut RawRing, count: usize) {
        let places = IMAGE_LEN / self.len;
        for _ in 0..count {
            let place = (self.served as usize + self.pending.len()) % places;
            let sector = (place * self.len / SECTOR) as u64;
            let pending = ring.submit(&Request::read(sector, self.len).indirect());
            self.pending.insert(pending.head.into(), (pending, sector));
        }
    }

    /// Publishes as many as fit, and kicks if the device wants it.
    fn top_up(&mut self, ring: &mut RawRing) {
        let old = ring.avail_idx();
        self.publish(ring, self.depth - self.pending.len());
        if ring.avail_idx() != old && ring.wants_kick(old) {
            ring.kick();
        }
    }

    /// Takes the next one that came back, if there is one.
    fn take(&mut self, ring: &mut RawRing) -> Result<bool> {
        let new = usize::from(ring.used_idx().wrapping_sub(ring.used_seen()));
        ensure!(
            new <= self.pending.len(),
            "the used index is {} after {}, with {} requests in the ring",
            ring.used_idx(),
            ring.used_seen(),
            self.pending.len()
        );
        let Some((id, used_len)) = ring.pop_used() else { return Ok(false) };
        let (pending, sector) =
            self.pending.remove(&id).with_context(|| format!("chain {id} is not in the ring"))?;
        let data = pattern(sector * SECTOR as u64, self.len);
        let expected = Outcome { status: Some(OK), used_len: self.len as u32 + 1, data };
        ensure!(
            ring.outcome(&pending, used_len) == expected,
            "the read of sector {sector} failed, used length {used_len}"
        );
        self.served += 1;
        Ok(true)
    }

    /// Takes all that are left.
    fn finish(&mut self, ring: &mut RawRing) -> Result<()> {
        let mut last = Instant::now();
        while !self.pending.is_empty() {
            if self.take(ring)? {
                last = Instant::now();
            } else {
                let (left, served) = (self.pending.len(), self.served);
                ensure!(last.elapsed() < PATIENCE, "{left} requests are lost after {served} were served");
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Keeps the ring full until `stop` is set, or nothing is served any more.
    fn run(&mut self, ring: &mut RawRing, stop: &AtomicBool) -> Result<()> {
        let mut last = Instant::now();
        while !stop.load(Ordering::Relaxed) && last.elapsed() < PATIENCE {
            self.top_up(ring);
            while self.take(ring)? {
                last = Instant::now();
            }
        }
        self.finish(ring)
    }
}

/// QEMU does this when a migration begins, to set or clear the flag of the dirty log.
#[test]
fn ring_addresses_that_are_sent_again_under_load_lose_no_completion() -> Result<()> {
    let RawSetup { mut ring, device, fixture: _fixture } =
        RawSetup::new(&["--io-engine", "sync"], &RawOptions::default())?;
    let config = device.vring_config(&ring.placement());
    // The fewer requests, the more often the used index is written, between which the message has to hit.
    for depth in [1, 8] {
        let mut load = Load::new(depth, SECTOR);
        let stop = AtomicBool::new(false);
        let mut sent = 0;
        std::thread::scope(|scope| {
            let driver = scope.spawn(|| load.run(&mut ring, &stop));
            let deadline = Instant::now() + Duration::from_millis(1500);
            let mut result = Ok(());
            while result.is_ok() && !driver.is_finished() && Instant::now() < deadline {
                result = device.frontend.set_vring_addr(0, &config);
                sent += 1;
            }
            stop.store(true, Ordering::Relaxed);
            let served = driver.join().expect("the driver does not panic");
            served.with_context(|| format!("{depth} at a time, after {sent} messages"))?;
            Ok::<(), anyhow::Error>(result?)
        })?;
        ensure!(load.served > 100 && sent > 100, "{} requests and {sent} messages are no test", load.served);
    }
    Ok(())
}

#[test]
fn a_new_call_eventfd_is_signalled_at_once_and_for_what_comes_after() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for round in 0..20 {
        setup.check_alive()?;
        let before = setup.ring.signals();
        let old = setup.ring.renew_call()?;
        setup.device.frontend.set_vring_call(0, setup.ring.call())?;
        assert!(setup.ring.signals() > before, "round {round}: the driver is told to look");

        let before = setup.ring.signals();
        let _ = old.read();
        setup.ring.set_used_event(setup.ring.used_seen());
        let pending = setup.ring.submit(&Request::read(0, SECTOR));
        setup.ring.kick();
        assert!(setup.ring.wait_used_count(1, PATIENCE), "round {round}: the request is served");
        assert_eq!(setup.ring.pop_used(), Some((pending.head.into(), SECTOR as u32 + 1)), "round {round}");
        let deadline = Instant::now() + PATIENCE;
        while setup.ring.signals() == before {
            assert!(Instant::now() < deadline, "round {round}: no call through the new eventfd");
            std::thread::sleep(Duration::from_micros(200));
        }
        assert!(old.read().is_err(), "round {round}: nothing through the old one");
    }
    Ok(())
}

/// QEMU caches the field and does not write it again after a reset or a reconnect, so that the guest would go on to
/// believe in what it chose.
#[test]
fn a_write_cache_that_was_switched_off_stays_off() -> Result<()> {
    let options = RawOptions::default().with_protocol(VhostUserProtocolFeatures::RESET_DEVICE);
    let mut setup = RawSetup::new(&[], &options)?;
    assert_eq!(setup.device.config(WCE, 1)?, [1]);
    setup.device.frontend.set_config(WCE, VhostUserConfigFlags::WRITABLE, &[0])?;
    assert_eq!(setup.device.config(WCE, 1)?, [0]);

    setup.device.frontend.reset_device()?;
    assert_eq!(setup.device.config(WCE, 1)?, [0], "after RESET_DEVICE");
    setup.device.frontend.set_features(setup.device.features())?;
    assert_eq!(setup.device.config(WCE, 1)?, [0], "after RESET_DEVICE and SET_FEATURES");

    let RawSetup { ring, device, fixture } = setup;
    drop((ring, device));
    let mut device = fixture.raw(&options)?;
    assert_eq!(device.config(WCE, 1)?, [0], "for the next front end");
    device.frontend.set_config(WCE, VhostUserConfigFlags::WRITABLE, &[1])?;
    assert_eq!(device.config(WCE, 1)?, [1], "until a driver switches it on");
    Ok(())
}

/// QEMU takes a region away and adds it again, while the guest runs, when its size or its neighbours change.
#[test]
fn requests_made_while_their_region_is_away_are_served_when_it_is_back() -> Result<()> {
    for (layout, event_idx) in [(Layout::One, true), (Layout::TwoWithGap, true), (Layout::TwoWithGap, false)]
    {
        let mut options = RawOptions::default()
            .layout(layout)
            .with_protocol(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        if !event_idx {
            options = options.without(VIRTIO_RING_F_EVENT_IDX);
        }
        let RawSetup { mut ring, mut device, fixture: _fixture } = RawSetup::new(&[], &options)?;
        check_serves(&mut ring)?;
        // It holds the ring and all buffers.
        let region = device.memory().table()[0];
        for round in 0..20 {
            let what = format!("{layout:?}, EVENT_IDX {event_idx}, round {round}");
            let mut load = Load::new(16, 4096);
            // Some are under way when the region goes.
            load.publish(&mut ring, 8);
            ring.kick();
            device.frontend.remove_mem_region(&region).with_context(|| what.clone())?;
            std::thread::sleep(QUIET);
            let used = ring.used_idx();
            load.publish(&mut ring, 8);
            ring.kick();
            std::thread::sleep(QUIET);
            assert_eq!(ring.used_idx(), used, "{what}: memory that was taken away is left alone");

            device.frontend.add_mem_region(&region).with_context(|| what.clone())?;
            load.finish(&mut ring).with_context(|| what.clone())?;
            check_serves(&mut ring).context(what)?;
        }
    }
    Ok(())
}

#[test]
fn a_new_kick_eventfd_takes_over_on_a_running_ring() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for round in 0..50 {
        setup.check_alive()?;
        // Kicked through the old one at the last moment.
        let pending = setup.ring.submit(&Request::read(0, SECTOR));
        setup.ring.kick();
        let old = setup.ring.renew_kick()?;
        setup.device.frontend.set_vring_kick(0, setup.ring.kick_fd())?;
        let used = setup.ring.wait_used(PATIENCE);
        assert_eq!(used, Some((pending.head.into(), SECTOR as u32 + 1)), "round {round}: the earlier kick");
        setup.check_alive().with_context(|| format!("round {round}: a kick through the new eventfd"))?;

        if round % 10 == 0 {
            let pid = setup.fixture.daemon.pid();
            old.write(1)?;
            let before = cpu_time(pid)?;
            std::thread::sleep(Duration::from_millis(300));
            let spent = cpu_time(pid)?.saturating_sub(before);
            assert!(spent < Duration::from_millis(50), "round {round}: {spent:?} of CPU time in 300 ms");
        }
    }
    Ok(())
}

#[test]
fn a_ring_may_be_enabled_between_a_reset_and_its_features() -> Result<()> {
    let options = RawOptions::default().with_protocol(VhostUserProtocolFeatures::RESET_DEVICE);
    let mut setup = RawSetup::new(&["--num-queues", "2"], &options)?;
    setup.check_alive()?;
    for round in 0..5 {
        setup.device.frontend.reset_device()?;
        for index in 0..2 {
            let enable = FrontendReq::SET_VRING_ENABLE as u32;
            let ack = setup.device.wire.acknowledged(enable, &vring_state(index, 1), &[])?;
            assert_eq!(ack, 0, "round {round}: ring {index} is enabled");
        }
        setup.device.blk_config().with_context(|| format!("round {round}: the connection is gone"))?;

        let (features, table) = (setup.device.features(), setup.device.memory().table());
        setup.device.frontend.set_features(features)?;
        setup.device.frontend.set_mem_table(&table)?;
        for index in 0..2 {
            let mut ring = setup.device.ring(index, RawSetup::RING_SIZE)?;
            for _ in 0..5 {
                check_serves(&mut ring).with_context(|| format!("round {round}: ring {index}"))?;
            }
        }
    }
    Ok(())
}

/// What a ring has gone through before a reset.
#[derive(Clone, Copy, Debug)]
enum Past {
    Announced,
    Enabled,
    Used,
}

#[test]
fn a_reset_ring_rests_until_it_is_started_anew() -> Result<()> {
    let options = RawOptions::default().with_protocol(VhostUserProtocolFeatures::RESET_DEVICE);
    let fixture = BlkFixture::new::<&str>([])?;
    for (past, kick) in [Past::Used, Past::Enabled, Past::Announced]
        .into_iter()
        .flat_map(|past| [(past, false), (past, true)])
    {
        let what = format!("{past:?} before the reset, kicked after it {kick}");
        let mut device = fixture.raw(&options)?;
        let mut ring = device.lay_out(0, RawDevice::default_placement(0, RawSetup::RING_SIZE))?;
        device.announce(0, &ring, 0)?;
        if !matches!(past, Past::Announced) {
            device.frontend.set_vring_enable(0, true)?;
        }
        if matches!(past, Past::Used) {
            check_serves(&mut ring)?;
        }
        device.frontend.reset_device()?;
        let used = ring.used_idx();
        // The ring's memory belongs to somebody else by now, and may hold anything.
        let _ = ring.submit(&Request::read(0, SECTOR));
        let enable = FrontendReq::SET_VRING_ENABLE as u32;
        assert_eq!(device.wire.acknowledged(enable, &vring_state(0, 1), &[])?, 0, "{what}");
        device.frontend.set_features(device.features())?;
        if kick {
            ring.kick();
        }
        std::thread::sleep(QUIET);
        assert_eq!(ring.used_idx(), used, "{what}: the old ring is left alone");
        check_serves(&mut device.ring(0, RawSetup::RING_SIZE)?).context(what)?;
    }
    Ok(())
}

/// A header in guest memory that reads sector 0.
fn header(ring: &mut RawRing) -> Desc {
    let addr = ring.arena.alloc(HEADER_LEN, 16);
    ring.memory().write(addr, &[0; HEADER_LEN]);
    Desc::readable(addr, HEADER_LEN as u32)
}

/// Linux looks at the status byte and not at the used length, and an old status may well be 0.
#[test]
fn a_refused_chain_with_a_place_for_a_status_fails() -> Result<()> {
    const OUTSIDE: u64 = 1 << 50;
    let mut setup = RawSetup::plain()?;
    let ring = &mut setup.ring;
    let data = [
        ("data to write", Desc::writable(OUTSIDE, SECTOR as u32)),
        ("data to read", Desc::readable(OUTSIDE, SECTOR as u32)),
    ];
    for ((what, data), status_len, indirect) in data
        .into_iter()
        .flat_map(|data| [(data, 1, false), (data, 1, true), (data, 16, false), (data, 16, true)])
    {
        let what = format!("{what}, {status_len} bytes at the end, indirect {indirect}");
        let status = ring.arena.alloc(status_len, 16);
        ring.memory().write(status, &vec![0; status_len]);
        let mut chain = linked(vec![header(ring), data, Desc::writable(status, status_len as u32)]);
        if indirect {
            let table = ring.write_indirect(&chain);
            chain = vec![Desc::readable(table, 48).with(INDIRECT)];
        }
        let head = ring.add_chain(&chain);
        ring.kick();
        assert_eq!(ring.wait_used(PATIENCE), Some((head.into(), 0)), "{what}");
        let mut expected = vec![0; status_len];
        expected[status_len - 1] = IOERR;
        assert_eq!(ring.memory().read_vec(status, status_len), expected, "{what}");
    }
    setup.check_alive()
}

#[test]
fn a_chain_without_an_end_changes_nothing() -> Result<()> {
    const ROOM: usize = SECTOR + 1;
    let mut setup = RawSetup::plain()?;
    let ring = &mut setup.ring;
    let room = ring.arena.alloc(ROOM, 16);
    ring.memory().write(room, &[UNTOUCHED; ROOM]);
    let header = header(ring).with(NEXT);
    let data = Desc::writable(room, SECTOR as u32).with(NEXT);
    let status = Desc::writable(room + SECTOR as u64, 1).with(NEXT);
    let cases = [
        ("data that is its own successor", vec![header, data.to(Next::Entry(1))]),
        ("a status that leads back to the data", vec![header, data, status.to(Next::Entry(1))]),
        ("a status that is its own successor", vec![header, data, status.to(Next::Entry(2))]),
        ("a status that leads back to the header", vec![header, data, status.to(Next::Entry(0))]),
    ];
    for (what, chain) in cases {
        for indirect in [false, true] {
            let what = format!("{what}, indirect {indirect}");
            let chain = if indirect {
                let table = ring.write_indirect(&chain);
                vec![Desc::readable(table, 16 * chain.len() as u32).with(INDIRECT)]
            } else {
                chain.clone()
            };
            let head = ring.add_chain(&chain);
            ring.kick();
            assert_eq!(ring.wait_used(PATIENCE), Some((head.into(), 0)), "{what}");
            assert_eq!(ring.memory().read_vec(room, ROOM), [UNTOUCHED; ROOM], "{what}");
        }
    }
    setup.check_alive()
}

#[test]
fn memory_may_be_announced_in_any_order() -> Result<()> {
    for (layout, high) in [(Layout::TwoWithGap, Layout::HIGH), (Layout::TwoAdjacent, Layout::FIRST_END)] {
        let fixture = BlkFixture::new::<&str>([])?;
        let mut device = fixture.raw(&RawOptions::default().layout(layout))?;
        let mut table = device.memory().table();
        table.reverse();
        device.frontend.set_mem_table(&table).with_context(|| format!("{layout:?}"))?;
        let mut ring = device.ring(0, RawSetup::RING_SIZE)?;
        check_serves(&mut ring).with_context(|| format!("{layout:?}: buffers in the low region"))?;
        ring.arena = Arena::new(high, 1 << 20);
        check_serves(&mut ring).with_context(|| format!("{layout:?}: buffers in the high region"))?;
    }
    Ok(())
}

#[test]
fn memory_that_reaches_beyond_its_file_is_refused() -> Result<()> {
    const LEN: u64 = 1 << 20;
    let options = RawOptions::default().with_protocol(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let mut setup = RawSetup::new(&[], &options)?;
    let file = SharedMemory::new(LEN as usize)?;
    let cases = [
        ("a page more than there is", LEN + 4096, 0),
        ("a page too far inside", LEN, 4096),
        ("far more than there is", 1 << 40, 0),
        ("behind the end", 4096, LEN),
        ("with a wrapping end", LEN, u64::MAX - 4095),
    ];
    for (what, size, offset) in cases {
        for (request, head) in [(FrontendReq::SET_MEM_TABLE, 1_u64), (FrontendReq::ADD_MEM_REG, 0)] {
            let what = format!("{request:?}: {what}");
            // Away from all that was announced before.
            let body: Vec<u8> = [head, 1 << 40, size, file.address(), offset]
                .into_iter()
                .flat_map(u64::to_le_bytes)
                .collect();
            let ack = setup.device.wire.acknowledged(request as u32, &body, &[file.as_fd()]);
            assert_ne!(ack.with_context(|| what.clone())?, 0, "{what}");
            setup.check_alive().with_context(|| format!("{what}: the memory from before"))?;
        }
    }
    let RawSetup { ring, device, fixture } = setup;
    drop((ring, device));
    check_serves(&mut fixture.raw(&options)?.ring(0, RawSetup::RING_SIZE)?)
}

#[test]
fn a_stopped_ring_asks_for_kicks() -> Result<()> {
    let options = RawOptions::default().without(VIRTIO_RING_F_EVENT_IDX);
    let RawSetup { mut ring, mut device, fixture: _fixture } =
        RawSetup::new(&["--io-engine", "sync"], &options)?;
    let mut load = Load::new(32, 16 << 10);
    let end = Instant::now() + PATIENCE;
    let mut busy = 0;
    while busy < 20 && Instant::now() < end {
        load.top_up(&mut ring);
        // The ring is stopped while the worker is at it, which it shows by not wanting kicks. On a loaded machine it may
        // be done before that is seen.
        while ring.used_flags() & NO_NOTIFY == 0 && ring.used_idx() != ring.avail_idx() {
            ensure!(Instant::now() < end + PATIENCE, "nothing happens after {busy} rounds");
            std::hint::spin_loop();
        }
        busy += u32::from(ring.used_flags() & NO_NOTIFY != 0);
        let base = device.frontend.get_vring_base(0)?;
        assert_eq!(ring.used_flags(), 0, "after {busy} rounds");
        device.start_from(0, &ring, base as u16)?;
        ring.kick();
        load.finish(&mut ring).with_context(|| format!("after {busy} rounds"))?;
    }
    ensure!(busy > 0, "the worker was never seen at work");
    Ok(())
}

#[test]
fn a_ring_size_that_cannot_be_is_refused_and_the_connection_lives() -> Result<()> {
    let fixture = BlkFixture::new(["--queue-size", "64"])?;
    let mut device = fixture.raw(&RawOptions::default())?;
    for size in [0, 1 << 31, 3, 63, 65, 100, 128, 256, 32_768, 65_536 + 64, u32::MAX] {
        let set_size = FrontendReq::SET_VRING_NUM as u32;
        let ack = device.wire.acknowledged(set_size, &vring_state(0, size), &[])?;
        assert_ne!(ack, 0, "size {size}");
        check_serves(&mut device.ring(0, 64)?).with_context(|| format!("after size {size}"))?;
        device.frontend.get_vring_base(0)?;
    }
    Ok(())
}

/// Without FLUSH a driver has no means to make a write durable, so that no write cache may be left.
#[test]
fn there_is_no_write_cache_for_a_driver_that_cannot_flush() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    for (options, writeback) in
        [(RawOptions::default().without(VIRTIO_BLK_F_FLUSH), 0), (RawOptions::default(), 1)]
    {
        let mut device = fixture.raw(&options)?;
        assert_eq!(device.blk_config()?.writeback, writeback);
        check_serves(&mut device.ring(0, 64)?)?;
    }
    Ok(())
}

#[test]
fn more_config_space_than_there_can_be_reads_as_nothing() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for len in [257, 512, 4000] {
        let body = config_body(0, len, 0, &vec![0; len as usize]);
        let reply = setup.device.wire.call(FrontendReq::GET_CONFIG as u32, &body, &[])?;
        assert_eq!(reply.body, config_body(0, 0, 0, &[]), "{len} bytes");
        setup.device.blk_config().with_context(|| format!("after {len} bytes"))?;
        setup.check_alive().with_context(|| format!("after {len} bytes"))?;
    }
    Ok(())
}

/// A chain of one request has to fit into the ring: its data, a header and a status.
#[test]
fn the_longest_request_fits_into_the_ring() -> Result<()> {
    for (size, seg_max) in [("2", 1), ("4", 2), ("16", 14), ("128", 126), ("1024", 126)] {
        let fixture = BlkFixture::new(["--queue-size", size])?;
        let config = fixture.raw(&RawOptions::default())?.blk_config()?;
        assert_eq!(config.seg_max.to_native(), seg_max, "--queue-size {size}");
    }
    Ok(())
}

#[test]
fn a_ring_that_is_restarted_again_and_again_loses_nothing() -> Result<()> {
    // Eight at a time of those that the disk itself has to serve.
    const LEN: usize = 64 << 10;
    let RawSetup { mut ring, mut device, fixture } =
        RawSetup::new(&["--cache", "direct"], &RawOptions::default())?;
    let mut load = Load::new(8, LEN);
    let mut before = None;
    let mut in_flight = 0;
    for round in 0..50_u64 {
        load.top_up(&mut ring);
        // The ring stops anywhere between the first and the last.
        let until = Instant::now() + Duration::from_micros(round * 20);
        while Instant::now() < until {
            load.take(&mut ring)?;
            load.top_up(&mut ring);
        }
        let seen = ring.used_idx();
        let base = device.frontend.get_vring_base(0)? as u16;
        assert_eq!(base, ring.used_idx(), "round {round}: what was taken is given back");
        in_flight += u32::from(base != seen);
        device.start_from(0, &ring, base)?;
        // As QEMU does, for what was left in the ring.
        ring.kick();
        if round == 5 {
            before = Some(Footprint::of(fixture.daemon.pid())?);
        }
    }
    load.finish(&mut ring)?;
    check_serves(&mut ring)?;
    assert_eq!(ring.used_idx(), ring.used_seen(), "nothing comes back twice");
    ensure!(in_flight > 0, "no ring was stopped with requests in flight");
    let (before, after) = (before.context("a footprint")?, Footprint::of(fixture.daemon.pid())?);
    assert!(after.fds <= before.fds, "file descriptors leak: {before:?} -> {after:?}");
    assert!(after.threads <= before.threads, "threads leak: {before:?} -> {after:?}");
    Ok(())
}

/// QEMU keeps the connection when a device is unplugged, and announces everything anew for the next one: `SET_OWNER`
/// once more, and the memory that the daemon still has.
#[test]
fn a_device_that_is_plugged_again_starts_from_nothing() -> Result<()> {
    let mut setup = RawSetup::new(
        &[],
        &RawOptions::default()
            .layout(Layout::TwoWithGap)
            .with_protocol(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS),
    )?;
    for round in 0..3 {
        setup.check_alive().with_context(|| format!("round {round}"))?;
        setup.device.frontend.get_vring_base(0)?;
        let owner = FrontendReq::SET_OWNER as u32;
        assert_eq!(setup.device.wire.acknowledged(owner, &[], &[])?, 0, "round {round}");
        for region in setup.device.memory().table() {
            setup.device.frontend.add_mem_region(&region).with_context(|| format!("round {round}"))?;
        }
        setup.ring = setup.device.ring(0, RawSetup::RING_SIZE)?;
    }
    Ok(())
}

/// QEMU without `share=on` has no memory to announce, and tries again and again.
#[test]
fn memory_that_is_not_shared_is_named_as_the_cause() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    let mut device = fixture.raw(&RawOptions::default())?;
    let nothing = [0; 8];
    let table = FrontendReq::SET_MEM_TABLE as u32;
    assert_eq!(device.wire.acknowledged(table, &nothing, &[])?, 0, "a table of no regions");
    assert!(device.ring(0, RawSetup::RING_SIZE).is_err());
    fixture.daemon.wait_stderr("share=on", PATIENCE)?;
    device.blk_config()?;
    Ok(())
}

/// Requests in flight are not taken up a second time because the memory map changes.
#[test]
fn requests_in_flight_survive_a_change_of_the_memory_map() -> Result<()> {
    let options = RawOptions::default()
        .layout(Layout::TwoWithGap)
        .with_protocol(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
    for args in [&["--cache", "direct"][..], &[][..]] {
        let RawSetup { mut ring, mut device, fixture: _fixture } = RawSetup::new(args, &options)?;
        check_serves(&mut ring)?;
        // Of no use to the ring.
        let region = device.memory().table()[1];
        for round in 0..50 {
            let mut load = Load::new(24, 4096);
            load.publish(&mut ring, 12);
            ring.kick();
            std::thread::sleep(Duration::from_micros(100 * (round % 5)));
            device.frontend.remove_mem_region(&region)?;
            load.publish(&mut ring, 4);
            ring.kick();
            device.frontend.add_mem_region(&region)?;
            load.finish(&mut ring).with_context(|| format!("{args:?} round {round}"))?;
        }
        check_serves(&mut ring)?;
        ensure!(ring.used_idx() == ring.used_seen(), "Nothing comes back twice");
    }
    Ok(())
}
