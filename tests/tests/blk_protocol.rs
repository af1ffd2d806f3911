//! vhost-user towards `vhost-user-blk`: config space, bad messages, stopping a ring, the dirty log.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result};
use tests::driver::fixture::{BlkFixture, IMAGE_LEN, RawSetup, check_serves, pattern};
use tests::driver::memory::SharedMemory;
use tests::driver::raw::{LOG_ALL, RawDevice, RawOptions};
use tests::driver::request::{IOERR, OK, Request};
use tests::driver::usage::Footprint;
use tests::driver::wire::{
    FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, GET_STATUS, SET_STATUS, WireFrontend, config_body, frame,
    vring_state,
};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtio_driver::VirtioBlkConfig;

/// Where `writeback` lies in the config space.
const WCE: u32 = 32;
const CONFIG_LEN: u32 = size_of::<VirtioBlkConfig>() as u32;
/// Config space that vhost-user can ask for.
const CONFIG_END: u32 = 256;
/// A dirty-log page.
const PAGE: u64 = 4096;

#[test]
fn the_config_space_describes_the_disk() -> Result<()> {
    let mut setup = RawSetup::new(&["--num-queues", "4"], &RawOptions::default())?;
    let config = setup.device.blk_config()?;
    assert_eq!(config.capacity.to_native(), IMAGE_LEN as u64 / 512);
    assert_eq!(config.blk_size.to_native(), 512);
    assert_eq!(config.num_queues.to_native(), 4);
    assert!((1..=1022).contains(&config.seg_max.to_native()), "seg_max {}", config.seg_max.to_native());
    for (what, value) in [
        ("max_discard_sectors", config.max_discard_sectors),
        ("max_discard_seg", config.max_discard_seg),
        ("discard_sector_alignment", config.discard_sector_alignment),
        ("max_write_zeroes_sectors", config.max_write_zeroes_sectors),
        ("max_write_zeroes_seg", config.max_write_zeroes_seg),
    ] {
        assert_ne!(value.to_native(), 0, "{what}");
    }
    assert_eq!(config.write_zeroes_may_unmap, 1);
    assert_eq!(config.writeback, 1, "writeback is the default");
    assert_eq!(setup.device.frontend.get_queue_num()?, 4);
    Ok(())
}

#[test]
fn the_config_space_follows_the_flags() -> Result<()> {
    let mut setup =
        RawSetup::new(&["--logical-block-size", "4096", "--cache", "writethrough"], &RawOptions::default())?;
    let config = setup.device.blk_config()?;
    assert_eq!(
        config.capacity.to_native(),
        IMAGE_LEN as u64 / 512,
        "capacity counts 512 bytes whatever the block size"
    );
    assert_eq!(config.blk_size.to_native(), 4096);
    assert_eq!(config.writeback, 0);
    Ok(())
}

#[test]
fn every_part_of_the_config_space_can_be_read_alone() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let full = setup.device.config(0, CONFIG_LEN)?;
    assert_ne!(full, vec![0; CONFIG_LEN as usize]);
    for offset in 0..CONFIG_LEN {
        for len in [1, 2, 4, 8, CONFIG_LEN - offset] {
            let mut expected = full[offset as usize..].to_vec();
            expected.resize(expected.len().max(len as usize), 0);
            assert_eq!(
                setup.device.config(offset, len)?,
                expected[..len as usize],
                "{len} bytes at {offset}"
            );
        }
    }
    // Fields of later specifications read as zero, as QEMU's config size may be larger than ours.
    let whole = setup.device.config(0, CONFIG_END)?;
    assert_eq!(whole[..CONFIG_LEN as usize], full);
    assert_eq!(setup.device.config(CONFIG_END - 1, 1)?, whole[CONFIG_END as usize - 1..]);
    let unknown = &whole[128..];
    assert_eq!(unknown, vec![0; unknown.len()], "nothing is defined there");
    Ok(())
}

#[test]
fn the_driver_switches_the_write_cache() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for value in [0, 1, 0, 0, 1] {
        setup.device.frontend.set_config(WCE, VhostUserConfigFlags::WRITABLE, &[value])?;
        assert_eq!(setup.device.config(WCE, 1)?, [value]);
        let data = pattern(4096, 512);
        assert_eq!(
            setup.ring.execute(&Request::write(8, &data))?.status,
            Some(OK),
            "write with writeback {value}"
        );
        assert_eq!(setup.ring.execute(&Request::flush())?.status, Some(OK), "flush with writeback {value}");
    }
    setup.check_alive()
}

#[test]
fn a_bad_config_write_is_refused_and_the_connection_lives() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let before = setup.device.config(0, CONFIG_LEN)?;
    let cases = [
        ("a new capacity", config_body(0, 8, 0, &[0; 8])),
        ("a block size", config_body(20, 4, 0, &512_u32.to_le_bytes())),
        ("a write cache that is neither on nor off", config_body(WCE, 1, 0, &[7])),
        ("behind the end", config_body(CONFIG_LEN, 1, 0, &[1])),
        ("far behind the end", config_body(1000, 1, 0, &[1])),
        ("an offset that overflows", config_body(u32::MAX, 1, 0, &[1])),
    ];
    for (what, body) in cases {
        let ack = setup.device.wire.acknowledged(FrontendReq::SET_CONFIG as u32, &body, &[]).context(what)?;
        assert_ne!(ack, 0, "{what}");
        assert_eq!(setup.device.config(0, CONFIG_LEN)?, before, "{what}");
        setup.check_alive().context(what)?;
    }
    Ok(())
}

#[test]
fn unknown_messages_are_refused_and_the_connection_lives() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for request in [45, 46, 100, 1000, u32::MAX] {
        for body in [&[][..], &[0; 8], &[0xFF; 100]] {
            let what = format!("request {request} with {} bytes", body.len());
            let ack = setup.device.wire.acknowledged(request, body, &[]).context(what.clone())?;
            assert_ne!(ack, 0, "{what}");
            setup.device.wire.send(request, FLAG_VERSION, body, &[])?;
            setup.device.blk_config().with_context(|| format!("after {what} without NEED_REPLY"))?;
            setup.check_alive().context(what)?;
        }
    }
    Ok(())
}

#[test]
fn messages_for_other_devices_are_refused_and_the_connection_lives() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let requests = [
        FrontendReq::SEND_RARP,
        FrontendReq::NET_SET_MTU,
        FrontendReq::IOTLB_MSG,
        FrontendReq::SET_VRING_ENDIAN,
        FrontendReq::CREATE_CRYPTO_SESSION,
        FrontendReq::CLOSE_CRYPTO_SESSION,
        FrontendReq::VRING_KICK,
    ];
    for request in requests {
        let ack = setup
            .device
            .wire
            .acknowledged(request as u32, &[0; 8], &[])
            .with_context(|| format!("{request:?}"))?;
        assert_ne!(ack, 0, "{request:?}");
        setup.check_alive().with_context(|| format!("{request:?}"))?;
    }
    Ok(())
}

#[test]
fn malformed_messages_do_no_harm_beyond_their_connection() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    check_serves(&mut fixture.raw(&RawOptions::default())?.ring(0, 64)?)?;
    let memory = SharedMemory::new(4096)?;
    let version = FLAG_VERSION;
    let request = |request: FrontendReq| request as u32;
    let huge_region = {
        let mut body = 1_u64.to_le_bytes().to_vec();
        for field in [0, u64::MAX, 0x1000, 0] {
            body.extend(field.to_le_bytes());
        }
        body
    };
    let cases: Vec<(&str, Vec<u8>, usize)> = vec![
        ("nothing", vec![], 0),
        ("half a header", vec![1, 0, 0, 0, 1, 0], 0),
        ("noise", (0..=255).cycle().take(1000).collect(), 0),
        ("version 0", frame(request(FrontendReq::GET_FEATURES), 0, 0, &[]), 0),
        ("version 3", frame(request(FrontendReq::GET_FEATURES), 3, 0, &[]), 0),
        ("a reply", frame(request(FrontendReq::GET_FEATURES), version | FLAG_REPLY, 0, &[]), 0),
        ("reserved flags", frame(request(FrontendReq::GET_FEATURES), version | 0xFFFF_FFF0, 0, &[]), 0),
        (
            "an announced body that never comes",
            frame(request(FrontendReq::SET_FEATURES), version, 8, &[1, 2]),
            0,
        ),
        (
            "an announced body of 4 GiB",
            frame(request(FrontendReq::SET_FEATURES), version, u32::MAX, &[0; 64]),
            0,
        ),
        ("a body too short", frame(request(FrontendReq::SET_FEATURES), version, 4, &[0; 4]), 0),
        ("a body too long", frame(request(FrontendReq::SET_FEATURES), version, 16, &[0; 16]), 0),
        ("all features", frame(request(FrontendReq::SET_FEATURES), version, 8, &[0xFF; 8]), 0),
        (
            "memory without a descriptor",
            frame(request(FrontendReq::SET_MEM_TABLE), version, 40, &huge_region),
            0,
        ),
        (
            "memory larger than its file",
            frame(request(FrontendReq::SET_MEM_TABLE), version, 40, &huge_region),
            1,
        ),
        ("descriptors that nobody asked for", frame(request(FrontendReq::GET_FEATURES), version, 0, &[]), 8),
        ("ring 200", frame(request(FrontendReq::SET_VRING_NUM), version, 8, &vring_state(200, 64)), 0),
        ("ring size 0", frame(request(FrontendReq::SET_VRING_NUM), version, 8, &vring_state(0, 0)), 0),
        ("ring size 100", frame(request(FrontendReq::SET_VRING_NUM), version, 8, &vring_state(0, 100)), 0),
        (
            "ring size 65536",
            frame(request(FrontendReq::SET_VRING_NUM), version, 8, &vring_state(0, 65_536)),
            0,
        ),
        (
            "a ring before its memory",
            frame(request(FrontendReq::SET_VRING_ADDR), version, 40, &[0x11; 40]),
            0,
        ),
        (
            "a ring enabled at once",
            frame(request(FrontendReq::SET_VRING_ENABLE), version, 8, &vring_state(0, 1)),
            0,
        ),
        ("a kick without a descriptor", frame(request(FrontendReq::SET_VRING_KICK), version, 8, &[0; 8]), 0),
        (
            "a base that is asked for at once",
            frame(request(FrontendReq::GET_VRING_BASE), version, 8, &[0; 8]),
            0,
        ),
        ("a log without a descriptor", frame(request(FrontendReq::SET_LOG_BASE), version, 16, &[0; 16]), 0),
        (
            "a log larger than its file",
            frame(request(FrontendReq::SET_LOG_BASE), version, 16, &[0x7F; 16]),
            1,
        ),
    ];
    // While one is served, the daemon has let go of those before it.
    let footprint = || -> Result<Footprint> {
        let mut device = fixture.raw(&RawOptions::default())?;
        let mut ring = device.ring(0, 64)?;
        check_serves(&mut ring)?;
        Ok(Footprint::of(fixture.daemon.pid())?)
    };
    let before = footprint()?;
    for (what, bytes, fds) in &cases {
        for owned in [false, true] {
            let wire = WireFrontend::connect(fixture.socket())?;
            if owned {
                wire.send(request(FrontendReq::SET_OWNER), version, &[], &[])?;
            }
            // The daemon may close the connection while more is on its way.
            let _ = wire.send_bytes(bytes, &vec![memory.as_fd(); *fds]);
            drop(wire);
            let mut device = fixture.raw(&RawOptions::default()).with_context(|| format!("after {what}"))?;
            check_serves(&mut device.ring(0, 64)?).with_context(|| format!("after {what}"))?;
        }
    }
    let after = footprint()?;
    assert!(after.fds <= before.fds, "file descriptors leak: {before:?} -> {after:?}");
    Ok(())
}

#[test]
fn the_device_status_is_kept() -> Result<()> {
    let options = RawOptions::default().with_protocol(VhostUserProtocolFeatures::STATUS);
    let mut setup = RawSetup::new(&[], &options)?;
    for status in [1_u64, 3, 11, 15] {
        assert_eq!(setup.device.wire.acknowledged(SET_STATUS, &status.to_le_bytes(), &[])?, 0);
        assert_eq!(setup.device.wire.call(GET_STATUS, &[], &[])?.value()?, status);
    }
    setup.check_alive()
}

#[test]
fn reply_ack_answers_every_message_once() -> Result<()> {
    let setup = RawSetup::plain()?;
    let features = setup.device.features().to_le_bytes();
    for _ in 0..10 {
        let flags = FLAG_VERSION | FLAG_NEED_REPLY;
        setup.device.wire.send(FrontendReq::SET_FEATURES as u32, flags, &features, &[])?;
        let ack = setup.device.wire.receive()?;
        assert_eq!((ack.request, ack.value()?), (FrontendReq::SET_FEATURES as u32, 0));
        assert_eq!(ack.flags & FLAG_REPLY, FLAG_REPLY);
        // A message with a reply of its own gets no acknowledgement on top: the next reply is that of the next call.
        setup.device.wire.send(FrontendReq::GET_FEATURES as u32, flags, &[], &[])?;
        assert_eq!(setup.device.wire.receive()?.request, FrontendReq::GET_FEATURES as u32);
    }
    Ok(())
}

#[test]
fn a_stopped_ring_has_everything_it_took_in_the_used_ring() -> Result<()> {
    for cache in ["writeback", "direct"] {
        let mut setup = RawSetup::new(&["--cache", cache], &RawOptions::default())?;
        let mut expected_base = 0;
        for round in 0..30 {
            let pending: Vec<_> = (0..32)
                .map(|i| {
                    let request = Request::read(i * 64, 4096).indirect();
                    let (chain, writable) = setup.ring.prepare(&request);
                    (setup.ring.add_chain(&chain), writable, i * 64 * 512)
                })
                .collect();
            setup.ring.kick();
            // The ring stops anywhere in the batch.
            std::thread::sleep(Duration::from_micros(round * 20));
            let base = setup.device.frontend.get_vring_base(0)?;
            let used = setup.ring.used_idx();
            assert_eq!(base, u32::from(used), "--cache {cache}, round {round}: what was taken is given back");
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(
                setup.ring.used_idx(),
                used,
                "--cache {cache}, round {round}: nothing comes after the reply"
            );

            let mut taken = 0;
            let mut take = |setup: &mut RawSetup, (id, len): (u32, u32)| {
                let (_, writable, offset) =
                    pending.iter().find(|p| u32::from(p.0) == id).expect("a chain of this round");
                assert_eq!(len, 4097, "round {round}");
                assert_eq!(setup.ring.memory().read_vec(writable[0].0, 4096), pattern(*offset, 4096));
                assert_eq!(setup.ring.memory().read_vec(writable[1].0, 1), [OK]);
                taken += 1;
            };
            while let Some(used) = setup.ring.pop_used() {
                take(&mut setup, used);
            }
            // On from there: the rest is served, and nothing twice.
            setup.device.start(0, &setup.ring)?;
            setup.ring.kick();
            while let Some(used) =
                setup.ring.wait_used(Duration::from_millis(if taken_all(&setup) { 0 } else { 5000 }))
            {
                take(&mut setup, used);
            }
            assert_eq!(taken, 32, "--cache {cache}, round {round}");
            expected_base += 32;
            assert_eq!(setup.ring.used_idx(), expected_base);
        }
    }
    Ok(())
}

fn taken_all(setup: &RawSetup) -> bool {
    setup.ring.used_seen() == setup.ring.avail_idx()
}

#[test]
fn a_disabled_ring_rests_until_it_is_enabled() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    setup.check_alive()?;
    setup.device.frontend.set_vring_enable(0, false)?;
    let before = setup.ring.used_idx();
    let pending = setup.ring.submit(&Request::read(0, 512));
    setup.ring.kick();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(setup.ring.used_idx(), before, "a disabled ring serves nothing");
    setup.device.frontend.set_vring_enable(0, true)?;
    setup.ring.kick();
    assert_eq!(setup.ring.wait_used(Duration::from_secs(10)), Some((pending.head.into(), 513)));
    setup.check_alive()
}

/// A setup whose writes to guest memory are logged from [`LogSetup::set_logging`] on.
struct LogSetup {
    setup: RawSetup,
    log: SharedMemory,
}

impl LogSetup {
    fn new(args: &[&str]) -> Result<Self> {
        let options = RawOptions::default().with_protocol(VhostUserProtocolFeatures::LOG_SHMFD);
        let setup = RawSetup::new(args, &options)?;
        let offered = setup.device.frontend.get_features()?;
        assert_ne!(offered & 1 << LOG_ALL, 0, "LOG_ALL is offered");
        let log = SharedMemory::new((setup.device.memory().end() / PAGE / 8) as usize)?;
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.len() as u64,
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        setup.device.frontend.set_log_base(0, Some(region)).context("SET_LOG_BASE")?;
        Ok(Self { setup, log })
    }

    fn set_logging(&self, on: bool) -> Result<()> {
        let features = self.setup.device.features() | if on { 1 << LOG_ALL } else { 0 };
        Ok(self.setup.device.frontend.set_features(features)?)
    }

    /// The guest pages that are marked; takes the marks away.
    fn marked(&self) -> Vec<u64> {
        let mut bits = vec![0; self.log.len()];
        self.log.read(0, &mut bits);
        self.log.fill(0, bits.len(), 0);
        (0..bits.len() as u64 * 8).filter(|page| bits[*page as usize / 8] & 1 << (page % 8) != 0).collect()
    }

    /// Does `request`, each buffer on pages of its own, and checks the marks against what the device had to write.
    fn check(&mut self, what: &str, mut request: Request, status: u8, data_written: bool) -> Result<()> {
        request.align = PAGE;
        let pending = self.setup.ring.submit(&request);
        self.setup.ring.kick();
        let (_, used_len) = self.setup.ring.wait_used(Duration::from_secs(10)).context("no answer")?;
        assert_eq!(self.setup.ring.outcome(&pending, used_len).status, Some(status), "{what}");
        let (status, data) = pending.writable.split_last().context("a status byte")?;
        let mut expected =
            vec![RawDevice::default_placement(0, RawSetup::RING_SIZE).used / PAGE, status.0 / PAGE];
        if data_written {
            for (addr, len) in data {
                expected.extend(addr / PAGE..(addr + *len as u64).div_ceil(PAGE));
            }
        }
        expected.sort_unstable();
        assert_eq!(self.marked(), expected, "{what}: pages of the used ring, the status byte and the data");
        Ok(())
    }
}

#[test]
fn the_dirty_log_has_exactly_what_was_written() -> Result<()> {
    for args in [&["--cache", "writeback"][..], &["--cache", "direct"], &["--io-engine", "sync"]] {
        let mut log = LogSetup::new(args)?;
        log.setup.check_alive()?;
        assert_eq!(log.marked(), [0_u64; 0], "nothing is logged before LOG_ALL");
        log.set_logging(true)?;
        // What the device writes to the ring by itself after it was told.
        log.setup.check_alive()?;
        log.marked();

        log.check("IN", Request::read(0, 3 * 4096), OK, true)?;
        log.check("IN in parts", Request::read(0, 4096).cut(&[16], &[512, 1536, 4096]), OK, true)?;
        log.check(
            "IN in parts, indirect",
            Request::read(0, 4096).cut(&[16], &[512, 4096]).indirect(),
            OK,
            true,
        )?;
        log.check("OUT", Request::write(0, &pattern(0, 8192)), OK, false)?;
        log.check("FLUSH", Request::flush(), OK, false)?;
        log.check("GET_ID", Request::id(20), OK, true)?;
        log.check("IN behind the end", Request::read(u64::MAX, 4096), IOERR, false)?;

        let table = log.setup.device.memory().table();
        log.setup.device.frontend.set_mem_table(&table)?;
        log.check("IN after a new memory table", Request::read(0, 4096), OK, true)?;

        log.set_logging(false)?;
        log.setup.check_alive()?;
        log.marked();
        log.setup.check_alive()?;
        assert_eq!(log.marked(), [0_u64; 0], "nothing is logged after LOG_ALL was cleared");
    }
    Ok(())
}
