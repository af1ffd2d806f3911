//! `vhost-user-balloon` as a device: features, queues of either numbering, the config space, and the ways in which a
//! connection can go on.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::driver::balloon::control::Control;
use tests::driver::balloon::driver::Config;
use tests::driver::balloon::fixture::wait_until;
use tests::driver::balloon::memory::{BLOCK_PAGES, PAGE, RINGS};
use tests::driver::balloon::{
    BalloonFixture, DEFLATE_ON_OOM, Driver, FREE_PAGE_HINT, MUST_TELL_HOST, Numbering, Options, PAGE_POISON,
    REPORTING, Role, STATS_VQ, Shape,
};
use tests::driver::raw::{RawDevice, RawOptions};
use tests::driver::ring::Arena;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The number of the statistic "free memory".
const FREE_MEMORY: u16 = 4;
/// The device's own features.
const DEVICE_FEATURES: [u32; 5] = [MUST_TELL_HOST, STATS_VQ, DEFLATE_ON_OOM, PAGE_POISON, REPORTING];

/// What the daemon offers.
fn offered(fixture: &BalloonFixture) -> Result<u64> {
    let options = RawOptions { features: 0, ..RawOptions::net() };
    let device = RawDevice::connect(fixture.socket(), &options)?;
    Ok(device.frontend.get_features()?)
}

#[test]
fn the_features_are_those_that_are_served() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let all = offered(&fixture)?;
    let expected = DEVICE_FEATURES.into_iter().chain([
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
    ]);
    for bit in expected {
        assert_ne!(all & 1 << bit, 0, "{bit} is missing in {all:#x}");
    }
    // What a guest hints at may be in use again before the daemon hears of it.
    assert_eq!(all & 1 << FREE_PAGE_HINT, 0, "{all:#x}");
    for (flag, bit) in [("--free-page-reporting", REPORTING), ("--deflate-on-oom", DEFLATE_ON_OOM)] {
        let fixture = BalloonFixture::new([flag, "off"])?;
        assert_eq!(offered(&fixture)?, all & !(1 << bit), "{flag} off");
    }
    let mut device = RawDevice::connect(fixture.socket(), &RawOptions::net())?;
    assert_eq!(device.frontend.get_queue_num()?, 5, "User Mode Linux wants five, whatever it uses");
    Ok(())
}

/// Checks that pages go and come as they should, all kinds that the driver has queues for.
fn check_memory(driver: &mut Driver) -> Result<()> {
    let pages = driver.pages.clone();
    let fragments = [pages.block(2).start + 3, pages.block(2).start + 5, pages.block(3).end - 1];
    let given: Vec<u64> = pages.block(0).chain(fragments).collect();
    let kept: Vec<u64> =
        pages.block(1).chain(pages.block(2).filter(|pfn| !fragments.contains(pfn))).collect();
    pages.mark_all(given.iter().chain(&kept).copied(), 1);
    let before = pages.resident()?;
    driver.inflate_all(given.iter().copied())?;
    if driver.options().has(MUST_TELL_HOST) {
        wait_until("the host has the pages", || Ok(pages.there(given.iter().copied())?.is_empty()))?;
    } else {
        pages.check_gone(given.iter().copied()).context("The driver may use them after the answer")?;
    }
    assert_eq!(before - pages.resident()?, given.len() as u64 * PAGE, "what the host holds of the memory");
    driver.deflate_all(given.iter().copied())?;
    pages.mark_all(given.iter().copied(), 2);
    if driver.options().has(REPORTING) {
        let reported = pages.block(5);
        pages.mark_all(reported.clone(), 1);
        driver.report(&[
            (reported.start, BLOCK_PAGES / 2),
            (reported.start + BLOCK_PAGES / 2, BLOCK_PAGES / 2 - 1),
        ])?;
        let (gone, left) = (reported.start..reported.end - 1, reported.end - 1);
        pages.check_gone(gone)?;
        pages.check_marked([left], 1)?;
    }
    pages.check_marked(given, 2)?;
    pages.check_marked(kept, 1)
}

/// Checks that statistics come when they are asked for. The device has the buffer before and after.
fn check_stats(driver: &mut Driver, control: &Control, value: u64) -> Result<()> {
    let answer = driver.answer_stats(control.ask_statistics(), &[(FREE_MEMORY, value)])?;
    ensure!(answer["free_memory"] == value, "{value} is said to be free: {answer}");
    Ok(())
}

#[test]
fn every_set_of_features_works_with_either_numbering_in_every_life() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    for set in 0..1_u32 << DEVICE_FEATURES.len() {
        let left_out = DEVICE_FEATURES.iter().enumerate().filter(|(index, _)| set & 1 << index == 0);
        let options = left_out.fold(Options::default(), |options, (_, &bit)| options.without(bit));
        for numbering in Numbering::ALL {
            let options = Options { numbering, ..options };
            let has_stats = options.has(STATS_VQ);
            let what = format!("features {:#x}, {numbering:?}", options.raw.features & 0x3f);
            let mut driver = fixture.driver(&options).with_context(|| what.clone())?;
            if has_stats {
                driver.give_stats(&[(FREE_MEMORY, 1)]);
            }
            check_memory(&mut driver).with_context(|| format!("{what}: at first"))?;
            if has_stats {
                check_stats(&mut driver, &control, 1 << 20).with_context(|| format!("{what}: at first"))?;
            }
            for life in ["stopped", "reconnected", "reset", "rebooted"] {
                let what = format!("{what}: {life}");
                let is_new = matches!(life, "reset" | "rebooted");
                match life {
                    "stopped" => driver.stop().and_then(|()| driver.cont()),
                    "reconnected" => driver.reconnect(fixture.socket()),
                    "reset" => driver.reset(),
                    _ => driver.reboot(),
                }
                .with_context(|| what.clone())?;
                if has_stats && is_new {
                    driver.give_stats(&[(FREE_MEMORY, 1)]);
                }
                check_memory(&mut driver).with_context(|| what.clone())?;
                if has_stats {
                    check_stats(&mut driver, &control, 2 << 20).with_context(|| what)?;
                }
            }
        }
    }
    assert_eq!(control.number("counters/duplicates")?, 0);
    assert_eq!(control.number("counters/malformed")?, 0);
    fixture.stop()
}

#[test]
fn memory_of_every_shape_is_returned() -> Result<()> {
    for shape in Shape::SMALL {
        for feature in [None, Some(MUST_TELL_HOST)] {
            let fixture = BalloonFixture::plain()?;
            let options = Options::default().shape(shape);
            let options = feature.map_or(options, |feature| options.without(feature));
            let what = format!("{shape:?}, without {feature:?}");
            let mut driver = fixture.driver(&options)?;
            check_memory(&mut driver).context(what.clone())?;
            // All there is, and no byte more.
            let all = driver.pages.all();
            driver.pages.mark_all(all.iter().copied(), 5);
            driver.inflate_all(all.iter().copied())?;
            let pages = driver.pages.clone();
            wait_until("nothing is left", || Ok(pages.resident()? == RINGS)).context(what.clone())?;
            driver.deflate_all(all.iter().copied())?;
            pages.mark_all(all.iter().copied(), 6);
            pages.check_marked(all, 6).context(what)?;
            fixture.stop()?;
        }
    }
    Ok(())
}

#[test]
fn queues_of_any_size_work() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    for ring_size in [1, 2, 64, 1024] {
        for event_idx in [true, false] {
            let options = Options { ring_size, ..Options::default() };
            let options = if event_idx { options } else { options.without(VIRTIO_RING_F_EVENT_IDX) };
            let mut driver = fixture.driver(&options)?;
            let pages = driver.pages.clone();
            for round in 0..20 {
                let given = pages.block(round % 3);
                pages.mark_all(given.clone(), 1);
                driver.inflate_all(given.clone())?;
                wait_until("pages are gone", || Ok(pages.there(given.clone())?.is_empty()))
                    .with_context(|| format!("{ring_size} descriptors, event index {event_idx}"))?;
                driver.deflate_all(given)?;
            }
        }
    }
    // What crosvm asks for.
    let options = Options::default();
    let memory = std::sync::Arc::new(options.shape.memory_of(options.rest)?);
    let mut driver = Driver::connect_without_rings(fixture.socket(), &options, memory)?;
    for (slot, role) in (0..).zip(options.roles()) {
        let at = RINGS + slot * (2 << 20);
        let mut placement = RawDevice::default_placement(0, 32768);
        let (desc, avail, used) = (at, at + (512 << 10), at + (640 << 10));
        (placement.desc, placement.avail, placement.used) = (desc, avail, used);
        let index = options.index(role);
        let mut ring = driver.device.ring_at(index, placement)?;
        ring.arena = Arena::new(at + (1 << 20), 1 << 20);
        driver.put_ring(role, ring);
    }
    driver.check_serves()
}

#[test]
fn every_part_of_the_config_space_can_be_read_alone() -> Result<()> {
    let fixture = BalloonFixture::new(["--size", "300M"])?;
    let mut driver = fixture.driver(&Options::default())?;
    // Once the queues are served: their start sets the size to 0.
    driver.check_serves()?;
    // More than this guest has is not for it to see, so this is about a smaller one.
    fixture.control().set_target(7 * PAGE)?;
    driver.set_actual(0x0102_0304)?;
    driver.set_config(Config::POISON_VAL, &0xaabb_ccdd_u32.to_le_bytes())?;
    let config = driver.config()?;
    let expected =
        Config { num_pages: 7, actual: 0x0102_0304, free_page_hint_cmd_id: 0, poison_val: 0xaabb_ccdd };
    assert_eq!(config, expected);
    let whole = driver.device.config(0, Config::LEN)?;
    for offset in 0..Config::LEN {
        for len in 1..=Config::LEN - offset {
            let (from, to) = (offset as usize, (offset + len) as usize);
            assert_eq!(driver.device.config(offset, len)?, whole[from..to], "{len} bytes at {offset}");
        }
    }
    // QEMU may be told of a larger one.
    let padded = driver.device.config(0, 64)?;
    assert_eq!(padded[..16], whole);
    assert_eq!(padded[16..], [0; 48]);
    Ok(())
}

#[test]
fn the_driver_writes_what_is_its_own() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let mut driver = fixture.driver(&Options::default())?;
    // Once the queues are served: their start sets the size to 0.
    driver.check_serves()?;
    fixture.control().set_target(16 * PAGE)?;
    // A whole write has an old target in it.
    driver.set_whole_config(Config { num_pages: 9, actual: 3, free_page_hint_cmd_id: 5, poison_val: 0 })?;
    let expected = Config { num_pages: 16, actual: 3, free_page_hint_cmd_id: 0, poison_val: 0 };
    assert_eq!(driver.config()?, expected);
    fixture.wait_number("actual_bytes", 3 * PAGE)?;
    // Byte by byte, as a legacy driver writes.
    for (offset, byte) in (Config::ACTUAL..).zip(0x0000_1005_u32.to_le_bytes()) {
        driver.set_config(offset, &[byte])?;
    }
    assert_eq!(driver.config()?.actual, 0x1005);
    fixture.wait_number("actual_bytes", 0x1005 * PAGE)?;
    // Two fields and parts of others.
    driver.set_config(2, &[9, 9, 7, 0, 0, 0, 9, 9])?;
    assert_eq!(driver.config()?, Config { actual: 7, ..expected });
    for (what, offset, bytes) in [
        ("behind the end", Config::LEN, &[1][..]),
        ("across the end", Config::LEN - 2, &[1; 4]),
        ("far behind the end", 2000, &[1]),
    ] {
        // It may be refused or not taken notice of.
        let _ = driver.set_config(offset, bytes);
        let config = driver.config().context(what)?;
        assert_eq!((config.num_pages, config.actual), (16, 7), "{what}");
    }
    driver.check_serves()
}

#[test]
fn the_driver_hears_of_a_new_target() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    let mut driver = fixture.driver(&Options::default())?;
    assert_eq!(driver.config()?.num_pages, 0);
    for target in [1, 5000, 300, 300, 0] {
        let status = control.set_target(target * PAGE)?;
        assert_eq!(status["target_bytes"], target * PAGE, "{status}");
        driver.wait_target(target as u32)?;
    }
    // Bytes are taken as whole pages.
    control.put("/v1/target", &json!({ "guest_bytes": driver.pages.memory().end() - 100 * PAGE }))?;
    driver.wait_target(100)?;
    let answer =
        control.request("PUT", "/v1/target", Some(&json!({ "balloon_bytes": 1, "guest_bytes": 1 })))?;
    assert_eq!(answer.status, 400, "{}", answer.body);
    fixture.stop()
}

#[test]
fn a_driver_that_comes_later_finds_its_target() -> Result<()> {
    let fixture = BalloonFixture::new(["--size", "4M"])?;
    let mut driver = fixture.driver(&Options::default())?;
    assert_eq!(driver.config()?.num_pages, 1024);
    driver.close();
    fixture.control().set_target(2 << 20)?;
    let mut driver = fixture.driver(&Options::default())?;
    assert_eq!(driver.config()?.num_pages, 512);
    fixture.stop()
}

#[test]
fn a_front_end_that_does_not_listen_harms_nobody() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    // No channel at all.
    let mut options = Options::default();
    options.raw.protocol.remove(VhostUserProtocolFeatures::BACKEND_REQ);
    let mut driver = fixture.driver(&options)?;
    control.set_target(8 * PAGE)?;
    assert_eq!(driver.config()?.num_pages, 8);
    driver.check_serves()?;
    driver.close();
    // One that nobody reads.
    let mut driver = fixture.driver(&Options::default())?;
    for target in 0..3000 {
        control.set_target(target % 5000 * PAGE)?;
    }
    assert_eq!(driver.config()?.num_pages, 2999);
    driver.check_serves()?;
    // One message does for all, and others follow when it is read.
    driver.config_changed()?;
    let channel = driver.channel.as_ref().context("There is no channel")?;
    channel.set_nonblocking(true)?;
    assert!(channel.receive().is_err(), "there is more than one message");
    channel.set_nonblocking(false)?;
    control.set_target(PAGE)?;
    driver.wait_target(1)?;
    // One that is closed.
    driver.channel = None;
    control.set_target(2 * PAGE)?;
    assert_eq!(driver.config()?.num_pages, 2);
    driver.check_serves()?;
    fixture.stop()
}

#[test]
fn a_driver_that_follows_its_target_reaches_it() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let control = fixture.control();
    let mut events = control.events()?;
    let mut driver = fixture.driver(&Options::default())?;
    let pages = driver.pages.clone();
    let all = pages.all();
    pages.mark_all(all.iter().copied(), 1);
    let full = pages.resident()?;
    let mut size = 0;
    for target in [1000_u32, 5000, 700, 0] {
        control.set_target(u64::from(target) * PAGE)?;
        driver.wait_target(target)?;
        driver.follow(&all, size, target)?;
        pages.mark_all(all.iter().copied().skip(target as usize), 2);
        size = target;
        fixture.wait_number("actual_bytes", u64::from(target) * PAGE)?;
        fixture.wait_number("ballooned_bytes", u64::from(target) * PAGE)?;
        fixture.wait_number("resident_bytes", full - u64::from(target) * PAGE)?;
        assert_eq!(pages.resident()?, full - u64::from(target) * PAGE);
        let event = events.wait_for("reached")?;
        assert_eq!(event["actual_bytes"], u64::from(target) * PAGE, "{event}");
        assert_eq!(control.status()?["activity"], "idle");
    }
    pages.check_marked(all.iter().copied(), 2)?;
    let status = control.status()?;
    assert_eq!(status["guest_memory_bytes"], driver.pages.memory().end(), "{status}");
    assert_eq!(status["connected"], true, "{status}");
    driver.close();
    fixture.wait_until("the front end has left", || Ok(control.status()?["connected"] == false))?;
    fixture.stop()
}

#[test]
fn requests_to_queues_that_were_not_agreed_on_are_left_alone() -> Result<()> {
    // Rings that are started by a driver that did not take their features.
    let fixture = BalloonFixture::plain()?;
    let options = Options::default().without(REPORTING).without(STATS_VQ);
    let mut driver = fixture.driver(&options)?;
    let pages = driver.pages.clone();
    pages.mark_all(pages.block(0), 1);
    for index in 2..5 {
        let ring = driver.device.ring(index, 16)?;
        driver.put_ring(Role::Reporting, ring);
        driver.submit(Role::Reporting, &[&[1; 64]]);
        let addr = pages.block(0).start * PAGE;
        driver.submit_chain(Role::Reporting, &[tests::driver::ring::Desc::writable(addr, 4096)]);
    }
    driver.check_serves()?;
    pages.check_marked(pages.block(0), 1)?;
    driver.check_serves()
}
