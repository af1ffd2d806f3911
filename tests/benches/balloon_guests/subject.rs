//! A guest with a balloon, whoever serves it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;
use tests::driver::balloon::BalloonFixture;
use tests::driver::usage::cpu_time;
use tests::guest::qmp::Monitor;
use tests::guest::{BalloonOptions, Guest, Running, Vmm};

const STEP: Duration = Duration::from_secs(120);

/// Whose balloon it is, and in which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Ours, User Mode Linux: computes natively.
    Uml,
    /// Ours, QEMU with its emulator.
    Qemu,
    /// QEMU's, in the same guest.
    QemuOwn,
}

impl Subject {
    /// As the tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uml => "vhost-user-balloon, UML",
            Self::Qemu => "vhost-user-balloon, QEMU (TCG)",
            Self::QemuOwn => "QEMU's virtio-balloon, QEMU (TCG)",
        }
    }
}

/// A running guest, whose memory was all used.
pub struct Machine {
    running: Running,
    daemon: Option<BalloonFixture>,
    monitor: Option<Monitor>,
    _folder: TempDir,
}

impl Machine {
    /// Boots a guest of `memory` MiB and lets it execute `fill`, which uses it.
    pub fn start(subject: Subject, memory: u32, reporting: bool, huge: bool, fill: &str) -> Result<Self> {
        let folder = TempDir::with_prefix("balloon-")?;
        let monitor = folder.path().join("monitor");
        let vmm = if subject == Subject::Uml { Vmm::Uml } else { Vmm::Qemu };
        let mut guest = Guest::new(vmm).memory_mib(memory).timeout(Duration::from_secs(400));
        if huge {
            guest = guest.huge_pages();
        }
        let mut daemon = None;
        guest = if subject == Subject::QemuOwn {
            guest.balloon_in_process(if reporting { ",free-page-reporting=on" } else { "" }).monitor(&monitor)
        } else {
            let reporting = if reporting { "on" } else { "off" };
            let fixture = BalloonFixture::new(["--free-page-reporting", reporting])?;
            let guest = guest.balloon(fixture.daemon.socket(), BalloonOptions::default());
            daemon = Some(fixture);
            guest
        };
        let script =
            format!("{fill}\nannounce filled\nawait free\nrm -r /fill/*\nannounce freed\nawait end\n");
        let mut running = guest.script(script).spawn()?;
        running.wait_for("filled", STEP)?;
        let monitor = (subject == Subject::QemuOwn).then(|| Monitor::connect(&monitor)).transpose()?;
        Ok(Self { running, daemon, monitor, _folder: folder })
    }

    /// Frees the guest's memory.
    pub fn free(&mut self) -> Result<()> {
        self.running.send("free")?;
        self.running.wait_for("freed", STEP)
    }

    /// The same, and lets the guest come to rest.
    pub fn settle(&mut self) -> Result<()> {
        self.free()?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }

    /// Asks for a balloon of `bytes`.
    pub fn set_target(&mut self, bytes: u64) -> Result<()> {
        if let Some(daemon) = &self.daemon {
            return daemon.control().set_target(bytes).map(drop);
        }
        let monitor = self.monitor.as_mut().context("no monitor")?;
        let all = monitor.execute("query-memory-size-summary", &json!({}))?["base-memory"]
            .as_u64()
            .context("no memory")?;
        monitor.execute("balloon", &json!({ "value": all - bytes })).map(drop)
    }

    /// What the guest says the balloon is, bytes.
    pub fn actual(&mut self) -> Result<u64> {
        if let Some(daemon) = &self.daemon {
            return daemon.control().number("actual_bytes");
        }
        let monitor = self.monitor.as_mut().context("no monitor")?;
        let all = monitor.execute("query-memory-size-summary", &json!({}))?["base-memory"]
            .as_u64()
            .context("no memory")?;
        let left = monitor.execute("query-balloon", &json!({}))?["actual"].as_u64().context("no size")?;
        Ok(all - left)
    }

    /// What the host holds of the guest's memory, bytes.
    pub fn resident(&self) -> Result<u64> {
        self.running.resident()
    }

    /// CPU time of the daemon, and of the guest's process.
    pub fn cpu(&self) -> Result<(Duration, Duration)> {
        let daemon = self.daemon.as_ref().map(|daemon| cpu_time(daemon.daemon.pid())).transpose()?;
        Ok((daemon.unwrap_or_default(), cpu_time(self.running.pid())?))
    }

    /// Powers the guest off.
    pub fn end(mut self) -> Result<()> {
        self.running.send("end")?;
        ensure!(self.running.wait()?.check().is_ok(), "The guest has failed");
        Ok(())
    }
}
