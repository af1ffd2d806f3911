//! Linux guests with a balloon: memory really leaves a guest and comes back.
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;
use tests::driver::balloon::BalloonFixture;
use tests::driver::balloon::huge::{HugePages, available};
use tests::driver::balloon::memory::{BLOCK, PAGE};
use tests::guest::qmp::Monitor;
use tests::guest::{BalloonOptions, Guest, Running, Vmm};
use tests::provision::Series;

const MIB: u64 = 1 << 20;
const STEP: Duration = Duration::from_secs(240);

/// A guest on a daemon's balloon.
fn guest(vmm: Vmm, fixture: &BalloonFixture) -> Guest {
    Guest::new(vmm).timeout(Duration::from_secs(480)).balloon(fixture.socket(), BalloonOptions::default())
}

/// Asks for a balloon of so many MiB and waits until the guest has it, and the host what was in it.
fn resize(fixture: &BalloonFixture, mib: u64) -> Result<()> {
    fixture.control().set_target(mib * MIB)?;
    wait_size(fixture, mib)
}

fn wait_size(fixture: &BalloonFixture, mib: u64) -> Result<()> {
    fixture.wait_until_for(STEP, &format!("the balloon has {mib} MiB"), || {
        let status = fixture.control().status()?;
        Ok(status["actual_bytes"] == mib * MIB
            && status["ballooned_bytes"] == mib * MIB
            && status["pending_bytes"] == 0)
    })
}

fn wait_resident(fixture: &BalloonFixture, guest: &Running, what: &str, most: u64) -> Result<()> {
    let mut last = 0;
    let waited = fixture.wait_until_for(STEP, what, || {
        last = guest.resident()?;
        Ok(last <= most)
    });
    waited.with_context(|| format!("The host holds {} MiB instead of {}", last / MIB, most / MIB))
}

/// Nothing bad was said, and the daemon ends well.
fn finish(fixture: BalloonFixture, guest: Running) -> Result<tests::guest::Report> {
    let counters = fixture.control().status()?["counters"].clone();
    for name in ["out_of_range", "duplicates", "malformed", "release_errors"] {
        assert_eq!(counters[name], 0, "{name}: {counters}");
    }
    let report = guest.wait()?.check()?;
    fixture.stop()?;
    Ok(report)
}

/// Fills nearly all memory of a guest of 256 MiB once, so that the host holds it, and lets it go.
const FILL_AND_FREE: &str = "
fill 150
rm /fill/file
";

fn memory_leaves_the_guest_and_comes_back(vmm: Vmm) {
    let fixture = BalloonFixture::new(["--free-page-reporting", "off", "--deflate-on-oom", "off"]).unwrap();
    let script = format!(
        "
report total $(meminfo MemTotal)
{FILL_AND_FREE}
announce filled
await inflated
report inflated $(balloon_size)
report less $(meminfo MemTotal)
announce looked
await deflated
report deflated $(balloon_size)
report again $(meminfo MemTotal)
fill 120
[ $(cat /fill/file | wc -c) = $((120 * 1048576)) ]
rm /fill/file
"
    );
    let mut guest = guest(vmm, &fixture).script(script).spawn().unwrap();
    guest.wait_for("filled", STEP).unwrap();
    let full = guest.resident().unwrap();
    resize(&fixture, 100).unwrap();
    let resident = guest.resident().unwrap();
    // Some of what it gives it had never used.
    assert!(resident + 60 * MIB <= full, "{} MiB became {}", full / MIB, resident / MIB);
    assert_eq!(fixture.control().number("resident_bytes").unwrap(), resident);
    let released = fixture.control().number("released_bytes").unwrap();
    assert_eq!(released, 100 * MIB);
    guest.send("inflated").unwrap();
    guest.wait_for("looked", STEP).unwrap();
    resize(&fixture, 0).unwrap();
    guest.send("deflated").unwrap();
    let report = finish(fixture, guest).unwrap();
    assert_eq!(report.number("inflated").unwrap(), 100 * MIB / PAGE);
    assert_eq!(report.number("deflated").unwrap(), 0);
    let total = report.number("total").unwrap();
    assert_eq!(report.number("less").unwrap(), total - 100 * MIB);
    assert_eq!(report.number("again").unwrap(), total);
}

fn free_pages_return_by_themselves(vmm: Vmm) {
    let fixture = BalloonFixture::plain().unwrap();
    let script = "fill 150\nannounce filled\nawait free\nrm /fill/file\nannounce freed\nawait end";
    let mut guest = guest(vmm, &fixture).script(script).spawn().unwrap();
    guest.wait_for("filled", STEP).unwrap();
    let full = guest.resident().unwrap();
    assert!(full > 150 * MIB, "{} MiB", full / MIB);
    guest.send("free").unwrap();
    guest.wait_for("freed", STEP).unwrap();
    wait_resident(&fixture, &guest, "free pages have returned", full - 120 * MIB).unwrap();
    let control = fixture.control();
    assert_ne!(control.number("counters/reports").unwrap(), 0);
    assert_eq!(control.number("counters/reported_kept_bytes").unwrap(), 0);
    assert_eq!(control.number("ballooned_bytes").unwrap(), 0);
    guest.send("end").unwrap();
    finish(fixture, guest).unwrap();
}

fn the_guest_tells_of_its_memory(vmm: Vmm) {
    let fixture = BalloonFixture::plain().unwrap();
    let script = "
wait_path /sys/bus/virtio/drivers/virtio_balloon/virtio0
report total $(meminfo MemTotal)
announce up
await filled
fill 50
announce filled
await end
";
    let mut guest = guest(vmm, &fixture).script(script).spawn().unwrap();
    guest.wait_for("up", STEP).unwrap();
    let control = fixture.control();
    let fresh = || control.fresh_statistics();
    let number =
        |value: &serde_json::Value, name: &str| value[name].as_u64().unwrap_or_else(|| panic!("{value}"));
    let before = fresh().unwrap();
    let total: u64 = guest.values()["total"].parse().unwrap();
    assert_eq!(number(&before, "total_memory"), total);
    assert!(number(&before, "free_memory") > 100 * MIB && number(&before, "free_memory") < total, "{before}");
    for name in ["available_memory", "disk_caches", "major_faults", "minor_faults", "swap_in", "swap_out"] {
        number(&before, name);
    }
    guest.send("filled").unwrap();
    guest.wait_for("filled", STEP).unwrap();
    let after = fresh().unwrap();
    assert!(
        number(&after, "free_memory") + 40 * MIB < number(&before, "free_memory"),
        "{before} became {after}"
    );
    // By themselves, too.
    let interval = json!({ "stats_polling_interval_s": 1 });
    let answer = control.request("PATCH", "/balloon/statistics", Some(&interval)).unwrap();
    assert!((200..300).contains(&answer.status), "{answer:?}");
    let update = || control.get("/v1/statistics").map(|value| value["last_update"].as_u64());
    let first = update().unwrap();
    fixture.wait_until("statistics are renewed", || Ok(update()? > first)).unwrap();
    guest.send("end").unwrap();
    finish(fixture, guest).unwrap();
}

/// A process that needs what is in the balloon gets it instead of being killed.
fn a_guest_that_is_short_of_memory_takes_it_back(vmm: Vmm) {
    // What is on its way to be reported would be missing in what the guest says is available.
    let args = ["--min-guest-memory", "32M", "--free-page-reporting", "off"];
    let fixture = BalloonFixture::new(args).unwrap();
    let script = "
announce up
await inflated
report size $(head -c 36m /dev/zero | tail -c 32m | wc -c)
announce survived
await end
";
    let mut guest = guest(vmm, &fixture).script(script).spawn().unwrap();
    guest.wait_for("up", STEP).unwrap();
    let control = fixture.control();
    let available = control.fresh_statistics().unwrap();
    let available = available["available_memory"].as_u64().unwrap();
    // Some 20 MiB are left to the guest, too little for what comes.
    resize(&fixture, available / MIB - 20).unwrap();
    let mut events = control.events().unwrap().with_limit(STEP).unwrap();
    // What comes within a second of a new target is taken for a guest that makes up its mind.
    std::thread::sleep(Duration::from_millis(1200));
    guest.send("inflated").unwrap();
    events.wait_for("oom-deflated").unwrap();
    guest.wait_for("survived", STEP).unwrap();
    assert!(control.number("counters/oom_deflated_bytes").unwrap() > 0);
    // The target stays, and is tried for again on demand.
    let target = control.number("target_bytes").unwrap();
    assert_eq!(target, (available / MIB - 20) * MIB);
    assert!(control.number("actual_bytes").unwrap() < target);
    resize(&fixture, target / MIB).unwrap();
    resize(&fixture, 0).unwrap();
    guest.send("end").unwrap();
    let report = finish(fixture, guest).unwrap();
    assert_eq!(report.number("size").unwrap(), 32 * MIB);
}

/// The driver is removed, which takes everything back, and loaded again, which gives it again.
fn a_driver_is_unloaded_and_loaded_again(vmm: Vmm) {
    let fixture = BalloonFixture::new(["--size", "64M"]).unwrap();
    let script = "
pages=$((64 * 256))
for round in 1 2 3; do
    wait_balloon $pages
    announce inflated $round
    await unload
    rmmod virtio_balloon
    [ $(balloon_size) = 0 ]
    fill 100
    rm /fill/file
    announce unloaded $round
    await load
    insmod /guest/modules/virtio_balloon.ko
done
wait_balloon $pages
announce end
await end
";
    let mut guest = guest(vmm, &fixture).script(script).spawn().unwrap();
    for round in 1..=3 {
        guest.wait_for(&format!("inflated {round}"), STEP).unwrap();
        wait_size(&fixture, 64).unwrap();
        guest.send("unload").unwrap();
        guest.wait_for(&format!("unloaded {round}"), STEP).unwrap();
        wait_size(&fixture, 0).unwrap();
        guest.send("load").unwrap();
    }
    guest.wait_for("end", STEP).unwrap();
    wait_size(&fixture, 64).unwrap();
    assert_eq!(fixture.control().number("counters/driver_starts").unwrap(), 4);
    resize(&fixture, 0).unwrap();
    guest.send("end").unwrap();
    finish(fixture, guest).unwrap();
}

/// What a guest holds is not touched, and what it gets is empty or its own, while its memory goes to and fro.
fn memory_keeps_what_it_holds(vmm: Vmm) {
    let fixture = BalloonFixture::plain().unwrap();
    let script = "
fill 40
mv /fill/file /fill/kept
head -c 1000000 /dev/urandom >/fill/mixed
expected=$(cat /fill/kept /fill/mixed | sha256sum)
{
    # Somebody who needs memory all the time, and finds in it what he wrote.
    while [ ! -e /tmp/stop ]; do
        cp /fill/kept /fill/copy
        cmp /fill/kept /fill/copy || echo bad >>/tmp/bad
        rm /fill/copy
    done
    echo done >/tmp/done
} &
announce up
await end
echo stop >/tmp/stop
wait_path /tmp/done
[ ! -e /tmp/bad ]
[ \"$(cat /fill/kept /fill/mixed | sha256sum)\" = \"$expected\" ]
";
    let mut guest = guest(vmm, &fixture).script(script).spawn().unwrap();
    guest.wait_for("up", STEP).unwrap();
    for round in 0..5 {
        resize(&fixture, 60 + round).unwrap();
        resize(&fixture, round).unwrap();
    }
    resize(&fixture, 0).unwrap();
    guest.send("end").unwrap();
    finish(fixture, guest).unwrap();
}

#[test]
fn a_guest_that_boots_anew_fills_its_balloon_again() -> Result<()> {
    let fixture = BalloonFixture::new(["--size", "64M"])?;
    let script = "
wait_balloon $((64 * 256))
announce inflated
read -r what
[ $what = end ] || reboot -f
";
    let mut guest = guest(Vmm::Qemu, &fixture).may_reboot().script(script).spawn()?;
    let mut seen = 0;
    for round in 1..=3 {
        seen = guest.wait_for_text(seen, "announce inflated", STEP)?;
        wait_size(&fixture, 64)?;
        assert_eq!(fixture.control().number("counters/driver_starts")?, round);
        guest.send(if round < 3 { "again" } else { "end" })?;
    }
    finish(fixture, guest)?;
    Ok(())
}

/// The kernel of the release before.
#[test]
fn an_older_guest_has_a_balloon_too() -> Result<()> {
    let fixture = BalloonFixture::new(["--size", "64M"])?;
    let script =
        format!("wait_balloon $((64 * 256))\n{FILL_AND_FREE}\nannounce up\nawait end\nwait_balloon 0");
    let script = script.replace("fill 150", "fill 100");
    let mut guest = guest(Vmm::Qemu, &fixture).kernel(Series::OldStable).script(script).spawn()?;
    guest.wait_for("up", STEP)?;
    let before = guest.resident()?;
    let fresh = fixture.control().fresh_statistics()?;
    assert_eq!(fresh["actual_mib"], 64, "{fresh}");
    resize(&fixture, 120)?;
    wait_resident(&fixture, &guest, "the host has memory back", before - 30 * MIB)?;
    resize(&fixture, 0)?;
    guest.send("end")?;
    finish(fixture, guest)?;
    Ok(())
}

#[test]
fn a_balloon_is_unplugged_and_plugged_in_again() -> Result<()> {
    let fixture = BalloonFixture::new(["--size", "64M"])?;
    let script = "
device=$(dirname $(readlink -f /sys/bus/virtio/drivers/virtio_balloon/virtio*))
for round in 1 2 3; do
    wait_balloon $((64 * 256))
    echo 1 >$device/remove
    [ ! -e $device ]
    [ $(balloon_size) = 0 ]
    fill 100
    rm /fill/file
    echo 1 >/sys/bus/pci/rescan
    wait_path $device
done
wait_balloon $((64 * 256))
announce up
await end
";
    let mut guest = guest(Vmm::Qemu, &fixture).script(script).spawn()?;
    guest.wait_for("up", STEP)?;
    wait_size(&fixture, 64)?;
    assert_eq!(fixture.control().number("counters/driver_starts")?, 4);
    resize(&fixture, 0)?;
    guest.send("end")?;
    finish(fixture, guest)?;
    Ok(())
}

/// The regions of a q35 machine: 2 GiB from address 0, and the rest from 4 GiB on.
#[test]
fn a_guest_of_five_gib_gives_from_both_regions() -> Result<()> {
    let fixture = BalloonFixture::plain()?;
    let script = "
report total $(meminfo MemTotal)
fill 50
announce up
await inflated
cat /fill/file /fill/file >/fill/more
[ $(head -c 1048576 /fill/more | sha256sum | cut -c 1-64) = $(sha256sum </fill/seed | cut -c 1-64) ]
rm /fill/more
announce used
await end
";
    let mut guest = guest(Vmm::Qemu, &fixture).memory_mib(5120).script(script).spawn()?;
    guest.wait_for("up", STEP)?;
    let status = fixture.control().status()?;
    assert_eq!(status["guest_memory_bytes"], 5120 * MIB, "{status}");
    let before = guest.resident()?;
    // More than either region has.
    resize(&fixture, 3300)?;
    assert!(guest.resident()? < before + 64 * MIB);
    guest.send("inflated")?;
    guest.wait_for("used", STEP)?;
    resize(&fixture, 0)?;
    guest.send("end")?;
    finish(fixture, guest)?;
    Ok(())
}

#[test]
fn huge_pages_return_to_the_host() -> Result<()> {
    let huge = HugePages::new(128)?;
    let fixture = BalloonFixture::plain()?;
    let script = format!(
        "{FILL_AND_FREE}\nannounce filled\nawait deflated\nfill 150\nrm /fill/file\nannounce used\nawait end"
    );
    let mut guest = guest(Vmm::Qemu, &fixture).huge_pages().script(script).spawn()?;
    guest.wait_for("filled", STEP)?;
    resize(&fixture, 120)?;
    let returned = available()? * BLOCK;
    assert!(returned > 60 * MIB, "{} of 120 MiB", returned / MIB);
    assert_eq!(fixture.control().number("released_bytes")?, returned);
    // Another guest takes them, and this one waits until it ends.
    let thief = huge.take(available()?)?;
    let mut events = fixture.control().events()?.with_limit(STEP)?;
    fixture.control().set_target(0)?;
    events.wait_for("deflate-held")?;
    assert_eq!(fixture.control().status()?["activity"], "held");
    drop(thief);
    wait_size(&fixture, 0)?;
    guest.send("deflated")?;
    guest.wait_for("used", STEP)?;
    guest.send("end")?;
    finish(fixture, guest)?;
    Ok(())
}

#[test]
fn a_paused_guest_goes_on_with_its_balloon() -> Result<()> {
    let fixture = BalloonFixture::new(["--stats-interval", "1"])?;
    let folder = TempDir::with_prefix("monitor-")?;
    let monitor: &Path = &folder.path().join("qmp");
    let script = "announce up\nawait end";
    let mut guest = guest(Vmm::Qemu, &fixture).monitor(monitor).script(script).spawn()?;
    guest.wait_for("up", STEP)?;
    let mut monitor = Monitor::connect(monitor)?;
    let control = fixture.control();
    let mut size = 0;
    for round in 0..6 {
        size = if size == 0 { 100 } else { 0 };
        control.set_target(size * MIB)?;
        // In the middle of it, at different moments.
        std::thread::sleep(Duration::from_millis(30 * round));
        for _ in 0..3 {
            monitor.execute("stop", &json!({}))?;
            monitor.execute("cont", &json!({}))?;
        }
        wait_size(&fixture, size)?;
        let fresh = control.fresh_statistics()?;
        assert_eq!(fresh["actual_mib"], size, "{fresh}");
    }
    // The interval goes on, too.
    let update = || control.get("/v1/statistics").map(|value| value["last_update"].as_u64());
    let first = update()?;
    fixture.wait_until("statistics are renewed", || Ok(update()? > first))?;
    guest.send("end")?;
    finish(fixture, guest)?;
    Ok(())
}

/// QEMU's generic device dies of a notice while no driver uses it or the guest is paused.
#[test]
fn a_target_that_is_set_while_nobody_can_be_told_is_told_later() -> Result<()> {
    let fixture = BalloonFixture::new(["--stats-interval", "0"])?;
    let folder = TempDir::with_prefix("monitor-")?;
    let monitor: &Path = &folder.path().join("qmp");
    let script = "
announce up
await end
";
    let mut guest = guest(Vmm::Qemu, &fixture).monitor(monitor).script(script).spawn()?;
    let mut monitor = Monitor::connect(monitor)?;
    let control = fixture.control();
    // The guest's kernel is not there yet.
    control.set_target(8 * MIB)?;
    control.set_target(16 * MIB)?;
    guest.wait_for("up", STEP)?;
    wait_size(&fixture, 16)?;
    for size in [64, 0, 32] {
        monitor.execute("stop", &json!({}))?;
        control.set_target(size * MIB)?;
        monitor.execute("cont", &json!({}))?;
        wait_size(&fixture, size)?;
    }
    guest.send("end")?;
    finish(fixture, guest)?;
    Ok(())
}

/// A guest without a daemon lives on. It does without what it had given: its balloon, and up to 128 MiB of free pages that it was just reporting, to nobody.
#[test]
fn a_guest_outlives_its_daemon() -> Result<()> {
    let mut fixture = BalloonFixture::new(["--size", "64M"])?;
    let script = "
wait_balloon $((64 * 256))
announce inflated
await stopped
fill 150
rm /fill/file
announce freed
await killed
fill 80
rm /fill/file
";
    let mut guest = guest(Vmm::Qemu, &fixture).memory_mib(512).script(script).spawn()?;
    guest.wait_for("inflated", STEP)?;
    fixture.daemon.signal(Signal::STOP)?;
    guest.send("stopped")?;
    guest.wait_for("freed", STEP)?;
    // The guest reports two seconds after it has freed something.
    std::thread::sleep(Duration::from_secs(4));
    fixture.daemon.kill();
    guest.send("killed")?;
    guest.wait()?.check()?;
    Ok(())
}

tests::for_both_guests!(
    memory_leaves_the_guest_and_comes_back,
    free_pages_return_by_themselves,
    the_guest_tells_of_its_memory,
    a_guest_that_is_short_of_memory_takes_it_back,
    a_driver_is_unloaded_and_loaded_again,
    memory_keeps_what_it_holds,
);
