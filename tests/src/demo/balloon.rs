//! The chapter of vhost-user-balloon: memory that goes back to the host, and to the guest again.
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::{Chapter, number, say, wait};
use crate::daemon::{self, Daemon};
use crate::guest::{BalloonOptions, Guest, Running};
use crate::process;

const MIB: u64 = 1 << 20;
const GUEST_MIB: u32 = 512;
/// What a program of the guest uses, and gives up at once.
const FILL_MIB: u64 = 300;
/// Of so many pairs of files of a MiB the guest removes every second one.
const PIECES: u64 = 120;
/// The balloon.
const BALLOON_MIB: u64 = 224;
/// A program needs so much more than the guest has, while the balloon has this size.
const MORE_MIB: u64 = 16;
/// Linux reports what has been free for two seconds, a part of it each time.
const REPORT_LIMIT: Duration = Duration::from_secs(90);
/// How long nothing has to be reported for all to have been.
const QUIET: Duration = Duration::from_secs(4);
const COMMAND_LIMIT: Duration = Duration::from_secs(90);
const STOP_LIMIT: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The daemon, and where it takes commands.
pub(super) struct Balloon {
    daemon: Daemon,
    program: PathBuf,
    control: PathBuf,
    _folder: TempDir,
}

impl Balloon {
    /// Starts the daemon.
    pub(super) fn start() -> Result<Self> {
        let folder = TempDir::with_prefix("demo-").context("Cannot make a temporary folder")?;
        let control = folder.path().join("control");
        let program = daemon::binary("vhost-user-balloon")?;
        let daemon = Daemon::builder("vhost-user-balloon").arg("--control-socket").arg(&control).start()?;
        say("daemon", format!("vhost-user-balloon, process {}, is a memory balloon", daemon.pid()));
        say("", format!("export VHOST_USER_BALLOON_SOCKET={}", control.display()));
        Ok(Self { daemon, program, control, _folder: folder })
    }

    /// Runs `vhost-user-balloon ctl` as a person would, and shows what it says, but for the lines that do not begin with
    /// one of `wanted`; all of them if there are none.
    fn ctl(&self, title: &str, args: &[&str], wanted: &[&str]) -> Result<()> {
        say(title, format!("$ vhost-user-balloon ctl {}", args.join(" ")));
        let mut command = Command::new(&self.program);
        command.arg("ctl").args(args).env("VHOST_USER_BALLOON_SOCKET", &self.control);
        let output = process::run(command, COMMAND_LIMIT)?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if wanted.is_empty() || wanted.iter().any(|word| line.starts_with(word)) {
                say("", format!("  {line}"));
            }
        }
        Ok(())
    }

    fn follow_inflation(&self, guest: &mut Running) -> Result<()> {
        guest.send("scatter")?;
        wait(guest, "balloon scattered")?;
        std::thread::sleep(QUIET);
        let before = guest.resident()?;
        say(
            "pieces",
            format!(
                "of {} files of 1 MiB every second one is removed: such pieces are not reported, and the host",
                2 * PIECES
            ),
        );
        say("", format!("still holds {} MiB. The balloon takes them", before / MIB));
        let start = Instant::now();
        self.ctl("balloon", &["target", &format!("{BALLOON_MIB}M"), "--wait"], &[])?;
        let (seconds, after) = (start.elapsed().as_secs_f64(), guest.resident()?);
        say("", format!("measured: {} MiB became {} MiB, in {seconds:.1} s", before / MIB, after / MIB));
        // Some of what the guest gives it has never touched, and that the host did not hold.
        ensure!(after + 50 * MIB < before, "The balloon has returned only {} MiB", (before - after) / MIB);
        Ok(())
    }

    fn follow_need(&self, guest: &mut Running) -> Result<()> {
        guest.send("need")?;
        wait(guest, "balloon survived")?;
        let (available, needed) = (number(guest, "balloon.before")?, number(guest, "balloon.needed")?);
        let kills = number(guest, "balloon.kills")?;
        ensure!(kills == 0.0, "{kills} processes of the guest were killed for want of memory");
        ensure!(available < needed, "The guest had {available} bytes to begin with");
        say(
            "need",
            format!(
                "a program needs {} MiB, and the guest has {}: it takes the rest out of the balloon, and",
                needed as u64 / MIB,
                available as u64 / MIB
            ),
        );
        say("", "nothing is killed (deflate on OOM)");
        self.ctl("", &["status"], &["Balloon", "Guest ", "Resident", "Trouble"])
    }

    fn follow_deflation(&self, guest: &mut Running) -> Result<()> {
        self.ctl("given back", &["target", "0", "--wait"], &[])?;
        guest.send("again")?;
        wait(guest, "balloon used")?;
        say("", format!("the guest's own files are as they were, and it uses {FILL_MIB} MiB again"));
        Ok(())
    }
}

/// The guest uses memory and frees it, and the host gets it without having asked.
fn follow_reports(guest: &mut Running) -> Result<()> {
    let before = guest.resident()?;
    guest.send("fill")?;
    wait(guest, "balloon filled")?;
    let full = guest.resident()?;
    say(
        "memory",
        format!(
            "a guest of {GUEST_MIB} MiB, for which the host holds {} MiB, uses {FILL_MIB} more: {} MiB",
            before / MIB,
            full / MIB
        ),
    );
    guest.send("free")?;
    wait(guest, "balloon freed")?;
    let freed = Instant::now();
    let (mut lowest, mut at) = (full, freed);
    while at.elapsed() < QUIET || lowest + FILL_MIB * MIB * 8 / 10 > full {
        ensure!(
            freed.elapsed() < REPORT_LIMIT,
            "{} s after {FILL_MIB} MiB were freed the host still holds {} of {} MiB",
            REPORT_LIMIT.as_secs(),
            lowest / MIB,
            full / MIB
        );
        let resident = guest.resident()?;
        if resident < lowest {
            (lowest, at) = (resident, Instant::now());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    say(
        "reporting",
        format!(
            "it frees them: Linux reports free pages, and the host is back at {} MiB after {:.1} s",
            lowest / MIB,
            (at - freed).as_secs_f64()
        ),
    );
    Ok(())
}

impl Chapter for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn attach(&self, guest: Guest) -> Guest {
        guest.memory_mib(GUEST_MIB).balloon(self.daemon.socket(), BalloonOptions::default())
    }

    fn script(&self) -> String {
        format!("FILL_MIB={FILL_MIB} PIECES={PIECES} MORE_MIB={MORE_MIB}\n{}", include_str!("balloon.sh"))
    }

    fn follow(&self, guest: &mut Running) -> Result<()> {
        wait(guest, "balloon up")?;
        follow_reports(guest)?;
        self.follow_inflation(guest)?;
        self.ctl(
            "statistics",
            &["stats", "--fresh"],
            &["available_memory", "free_memory", "disk_caches", "total_memory", "balloon"],
        )?;
        self.follow_need(guest)?;
        self.follow_deflation(guest)
    }

    fn finish(&mut self) -> Result<()> {
        let status = self.daemon.terminate(STOP_LIMIT)?;
        ensure!(status.success(), "vhost-user-balloon ended with {status}:\n{}", self.daemon.stderr());
        Ok(())
    }
}
