//! What an administrator does to a virtual machine with a balloon, at moments that suit nobody.
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::driver::balloon::BalloonFixture;
use tests::driver::balloon::control::Control;
use tests::guest::qmp::Monitor;
use tests::guest::{BalloonOptions, Guest, Running, Vmm};

const MIB: u64 = 1 << 20;
const STEP: Duration = Duration::from_secs(240);

/// A daemon, a guest in QEMU and its monitor.
struct Machine {
    fixture: BalloonFixture,
    guest: Running,
    monitor: Monitor,
    _folder: TempDir,
}

impl Machine {
    fn new(configure: impl FnOnce(Guest) -> Guest) -> Result<Self> {
        let fixture = BalloonFixture::new(["--stats-interval", "1"])?;
        let folder = TempDir::with_prefix("monitor-")?;
        let path: &Path = &folder.path().join("qmp");
        let guest = Guest::new(Vmm::Qemu)
            .timeout(Duration::from_secs(480))
            .balloon(fixture.socket(), BalloonOptions::default())
            .script("announce up\nawait end")
            .monitor(path);
        let guest = configure(guest).spawn()?;
        Ok(Self { fixture, guest, monitor: Monitor::connect(path)?, _folder: folder })
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.monitor.execute(command, arguments)
    }

    /// Gives the guest a target after the other, and asks for this and that, while `operate` does something else.
    fn under_load(&mut self, operate: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let ended = AtomicBool::new(false);
        let control = self.fixture.control();
        thread::scope(|scope| {
            let load = scope.spawn(|| load(&control, &ended));
            let result = operate(self);
            ended.store(true, Ordering::SeqCst);
            let loaded = load.join().expect("the load does not panic");
            // The first error is mostly the cause of the other.
            result?;
            loaded
        })
    }

    /// The balloon has this many MiB, as all say who know it.
    fn check_size(&self, mib: u64) -> Result<()> {
        let control = self.fixture.control();
        control.set_target(mib * MIB)?;
        self.fixture.wait_until_for(STEP, &format!("the balloon has {mib} MiB"), || {
            let status = control.status()?;
            Ok(status["actual_bytes"] == mib * MIB
                && status["ballooned_bytes"] == mib * MIB
                && status["pending_bytes"] == 0)
        })
    }

    /// All went well.
    fn end(mut self) -> Result<()> {
        let counters = self.fixture.control().status()?["counters"].clone();
        for name in ["out_of_range", "duplicates", "malformed", "release_errors"] {
            assert_eq!(counters[name], 0, "{name}: {counters}");
        }
        self.guest.send("end")?;
        self.guest.wait()?.check()?;
        self.fixture.stop()
    }
}

fn load(control: &Control, ended: &AtomicBool) -> Result<()> {
    for size in [10, 100, 0, 64, 30].into_iter().cycle() {
        control.set_target(size * MIB)?;
        // 409 is an answer, too: there is no driver at the moment.
        control.request("GET", "/v1/statistics?fresh=1&timeout_ms=20", None)?;
        if ended.load(Ordering::SeqCst) {
            break;
        }
    }
    Ok(())
}

#[test]
fn a_guest_is_paused_again_and_again_while_targets_come() -> Result<()> {
    let mut machine = Machine::new(|guest| guest)?;
    // From before its kernel is there.
    machine.under_load(|machine| {
        for round in 0..100 {
            machine.execute("stop", &json!({})).with_context(|| format!("Round {round}"))?;
            machine.execute("cont", &json!({}))?;
        }
        machine.guest.wait_for("up", STEP)?;
        for round in 0..1000 {
            machine
                .execute("stop", &json!({}))
                .with_context(|| format!("Round {round} of a guest that is up"))?;
            machine.execute("cont", &json!({}))?;
        }
        Ok(())
    })?;
    machine.check_size(32)?;
    // What QEMU cannot do with it, it says.
    let migration = machine.execute("migrate", &json!({ "uri": "exec:cat >/dev/null" }));
    assert!(migration.is_err_and(|error| error.to_string().contains("non-migratable")));
    machine.check_size(0)?;
    machine.end()
}

#[test]
fn a_guest_is_reset_again_and_again_while_targets_come() -> Result<()> {
    let mut machine = Machine::new(Guest::may_reboot)?;
    machine.under_load(|machine| {
        let mut seen = 0;
        for round in 0..3 {
            seen = machine.guest.wait_for_text(seen, "announce up", STEP)?;
            // The driver is there since a moment, and the balloon is being filled.
            thread::sleep(Duration::from_millis(100 * round));
            for _ in 0..=round {
                machine.execute("system_reset", &json!({}))?;
            }
        }
        machine.guest.wait_for_text(seen, "announce up", STEP)?;
        Ok(())
    })?;
    machine.check_size(32)?;
    assert!(machine.fixture.control().number("counters/driver_starts")? >= 4);
    machine.check_size(0)?;
    machine.end()
}

#[test]
fn a_balloon_is_removed_and_memory_is_added_while_targets_come() -> Result<()> {
    let mut machine = Machine::new(Guest::hot_plug)?;
    machine.guest.wait_for("up", STEP)?;
    machine.under_load(|machine| {
        for round in 1..=2 {
            machine.execute("device_del", &json!({ "id": "balloon" }))?;
            machine.monitor.wait_deleted("balloon")?;
            let device = json!({
                "driver": "vhost-user-test-device-pci", "id": "balloon", "bus": "root-port", "chardev": "device0",
                "virtio-id": 5, "num_vqs": 5, "vq_size": 128, "config_size": 16,
            });
            machine.execute("device_add", &device)?;
            let starts = || machine.fixture.control().number("counters/driver_starts");
            machine.fixture.wait_until_for(STEP, "the driver has started", || Ok(starts()? > round))?;
            let memory =
                json!({ "qom-type": "memory-backend-memfd", "id": format!("memory{round}"), "size": 128 * MIB,
                    "share": true });
            machine.execute("object-add", &memory)?;
            let dimm = json!({ "driver": "pc-dimm", "id": format!("dimm{round}"), "memdev": format!("memory{round}") });
            machine.execute("device_add", &dimm)?;
            let total = (256 + round * 128) * MIB;
            machine.fixture.wait_until_for(STEP, "the new memory is seen", || {
                Ok(machine.fixture.control().number("guest_memory_bytes")? == total)
            })?;
        }
        Ok(())
    })?;
    // More than the guest had at first.
    machine.check_size(320)?;
    machine.check_size(0)?;
    machine.end()
}
