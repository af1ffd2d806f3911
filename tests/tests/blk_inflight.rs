//! A daemon that is killed with requests in flight: its successor does them, each once more or for the first time, and
//! none is lost.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::driver::fixture::{BlkFixture, RawSetup, check_serves, pattern};
use tests::driver::raw::{RawDevice, RawOptions};
use tests::driver::request::{OK, Pending, Request};
use tests::driver::ring::RawRing;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};

const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a request.
const LEN: usize = 64 << 10;
/// Requests in flight: a ring of 128 descriptors has room for 42 chains of 3.
const COUNT: usize = 12;

fn options() -> RawOptions {
    RawOptions::default().with_protocol(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
}

/// The memory that the front end keeps for its daemons.
struct Kept {
    info: VhostUserInflight,
    file: File,
}

impl Kept {
    fn new(device: &mut RawDevice) -> Result<Self> {
        let wanted = VhostUserInflight::new(0, 0, 1, RawSetup::RING_SIZE);
        let (info, file) = device.frontend.get_inflight_fd(&wanted)?;
        ensure!(info.mmap_size >= 16 * u64::from(RawSetup::RING_SIZE), "{} bytes", info.mmap_size);
        Ok(Self { info, file })
    }

    fn hand_over(&self, device: &mut RawDevice) -> Result<()> {
        Ok(device.frontend.set_inflight_fd(&self.info, self.file.as_raw_fd())?)
    }
}

/// Kills the daemon, starts another, and gives it ring and memory as QEMU does.
fn replace(
    fixture: &mut BlkFixture,
    args: &[&str],
    device: &RawDevice,
    ring: &RawRing,
    kept: &Kept,
) -> Result<RawDevice> {
    fixture.replace_daemon(args)?;
    let memory = Arc::clone(device.memory());
    let mut device = RawDevice::connect_with(fixture.socket(), &options(), memory)?;
    kept.hand_over(&mut device)?;
    // The position is that of the very start, which is wrong by now: the used ring and the kept memory tell better.
    device.start(0, ring)?;
    Ok(device)
}

/// Waits until all of `pending` came back, each once and with success.
fn all_come_back(ring: &mut RawRing, pending: &[Pending]) -> Result<()> {
    let mut open: BTreeSet<u32> = pending.iter().map(|pending| pending.head.into()).collect();
    ensure!(open.len() == pending.len(), "heads are different");
    while !open.is_empty() {
        let (id, len) =
            ring.wait_used(PATIENCE).with_context(|| format!("{} are lost: {open:?}", open.len()))?;
        ensure!(open.remove(&id), "{id} came back twice, or was never sent");
        let pending = pending.iter().find(|pending| u32::from(pending.head) == id).context("sent")?;
        ensure!(ring.outcome(pending, len).status == Some(OK), "{id} failed");
    }
    ensure!(ring.used_idx() == ring.used_seen(), "nothing else came back");
    Ok(())
}

#[test]
fn requests_of_a_killed_daemon_are_done_by_the_next() -> Result<()> {
    for args in [&["--cache", "direct"][..], &["--cache", "writeback", "--io-engine", "io_uring"]] {
        let mut fixture = BlkFixture::new(args)?;
        let mut device = fixture.raw(&options())?;
        let kept = Kept::new(&mut device)?;
        kept.hand_over(&mut device)?;
        let mut ring = device.ring(0, RawSetup::RING_SIZE)?;
        check_serves(&mut ring)?;
        let mut taken_over = 0;
        for round in 0..12_u64 {
            let sector = |index: usize| (index * LEN / 512) as u64;
            let data = |index: usize| pattern((round + 1) << 32 | (index * LEN) as u64, LEN);
            let pending: Vec<_> =
                (0..COUNT).map(|index| ring.submit(&Request::write(sector(index), &data(index)))).collect();
            ring.kick();
            // From "has not looked yet" to "has done some".
            std::thread::sleep(Duration::from_micros(60 * round));
            fixture.daemon.kill();
            taken_over += ring.avail_idx().wrapping_sub(ring.used_idx());
            device = replace(&mut fixture, args, &device, &ring, &kept)?;
            all_come_back(&mut ring, &pending).with_context(|| format!("round {round}"))?;
            check_serves(&mut ring)?;
            for index in 0..COUNT {
                ensure!(
                    fixture.image_bytes((index * LEN) as u64, LEN)? == data(index),
                    "request {index} of round {round}"
                );
            }
        }
        assert!(taken_over > 0, "at least once the daemon is killed before it has done all");
    }
    Ok(())
}

#[test]
fn chains_that_were_completed_out_of_order_are_not_done_again() -> Result<()> {
    let args = ["--cache", "direct"];
    let mut fixture = BlkFixture::new(args)?;
    let mut device = fixture.raw(&options())?;
    let kept = Kept::new(&mut device)?;
    kept.hand_over(&mut device)?;
    let mut ring = device.ring(0, RawSetup::RING_SIZE)?;
    let mut pending: Vec<_> =
        (0..COUNT).map(|index| ring.submit(&Request::read((index * 2) as u64, 512))).collect();
    ring.kick();
    all_come_back(&mut ring, &pending)?;
    // As if the daemon had been killed with the third and the first in flight, taken in this order: it is allowed to
    // take any, so the successor must go by what is noted rather than by the used index.
    fixture.daemon.kill();
    let in_flight = [pending.swap_remove(2), pending.swap_remove(0)];
    for (counter, pending) in (1000_u64..).zip(&in_flight) {
        note_in_flight(&kept.file, pending.head, counter)?;
        ring.push_head(pending.head);
    }
    ring.publish();
    let _device = replace(&mut fixture, &args, &device, &ring, &kept)?;
    let order: Vec<_> = (0..2).map(|_| ring.wait_used(PATIENCE).map(|(id, _)| id)).collect();
    let expected: BTreeSet<_> = in_flight.iter().map(|pending| Some(pending.head.into())).collect();
    assert_eq!(order.into_iter().collect::<BTreeSet<_>>(), expected);
    check_serves(&mut ring)
}

/// Marks a chain as in flight, by the layout of the vhost-user text: a header of 16 bytes, then 16 for each descriptor.
fn note_in_flight(file: &File, head: u16, counter: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let entry = 16 + 16 * u64::from(head);
    file.write_all_at(&counter.to_ne_bytes(), entry + 8)?;
    file.write_all_at(&[1], entry)?;
    Ok(())
}

#[test]
fn memory_that_cannot_be_right_is_refused() -> Result<()> {
    let fixture = BlkFixture::new(["--num-queues", "1", "--queue-size", "128"])?;
    let mut device = fixture.raw(&options())?;
    let kept = Kept::new(&mut device)?;
    let file = tempfile::tempfile()?;
    file.set_len(64)?;
    assert!(device.frontend.set_inflight_fd(&kept.info, file.as_raw_fd()).is_err(), "the file is too small");
    kept.hand_over(&mut device)?;
    check_serves(&mut device.ring(0, RawSetup::RING_SIZE)?)?;
    drop(device);
    // There is no way to say no to this one but to end the connection.
    for (queues, size) in [(2, 128), (1, 256), (u16::MAX, u16::MAX)] {
        let mut device = fixture.raw(&options())?;
        assert!(device.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size)).is_err());
    }
    check_serves(&mut fixture.raw(&options())?.ring(0, RawSetup::RING_SIZE)?)
}
