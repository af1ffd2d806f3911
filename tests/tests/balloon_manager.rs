//! The manager with guests that together want more than there is: three of User Mode Linux in a cgroup, of which each in
//! turn needs much memory for some seconds. Reports of free pages are off, so that it is the manager who makes room.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tests::cgroup::MemoryCgroup;
use tests::daemon;
use tests::driver::balloon::control::Control;
use tests::driver::balloon::fixture::balloon_daemon;
use tests::guest::{BalloonOptions, Guest, Running, Vmm};
use tests::process::Process;

const MIB: u64 = 1 << 20;
/// Memory of each guest. One that was busy keeps about 310 MiB, if nobody takes them.
const GUEST: u64 = 400;
/// What all of them may have together: less than three that were busy, and more than two.
const LIMIT: u64 = 800;
/// How much a busy guest uses, in steps.
const STEPS: u32 = 10;
const STEP_MIB: u32 = 25;
/// The defaults are for guests of some GiB.
const SMALL_GUESTS: &str = "[policy]\ncushion = \"32M\"\n[guests.defaults]\nmin = \"100M\"\n";
const PATIENCE: Duration = Duration::from_secs(120);

/// A guest with its balloon.
struct Member {
    running: Running,
    _daemon: daemon::Daemon,
    control: Control,
}

/// Starts a guest whose script becomes busy and idle again whenever it is told to.
fn member(name: &str, folder: &Path, cgroup: &MemoryCgroup) -> Result<Member> {
    let control = folder.join(format!("{name}.control"));
    let daemon = balloon_daemon()
        .arg("--control-socket")
        .arg(&control)
        .args(["--free-page-reporting", "off", "--min-guest-memory", "100M"])
        .start()?;
    let script = format!(
        "
mkdir /work
mount -t tmpfs -o size=100% work /work
head -c {STEP_MIB}m /dev/urandom >/work/0
sum=$(md5sum </work/0)
round=0
announce ready
while read -r order; do
    case $order in
    work)
        for n in $(seq {STEPS}); do cat /work/0 >/work/$n; sleep 0.7; done
        for n in $(seq {STEPS}); do [ \"$(md5sum </work/$n)\" = \"$sum\" ]; done
        rm /work/[1-9]*
        round=$((round + 1))
        announce done $round
        ;;
    end) break ;;
    esac
done
report kills $(awk '$1 == \"oom_kill\" {{ print $2 }}' /proc/vmstat)
"
    );
    let mut running = Guest::new(Vmm::Uml)
        .memory_mib(GUEST as u32)
        .balloon(daemon.socket(), BalloonOptions::default())
        .timeout(Duration::from_secs(300))
        .script(script)
        .spawn()?;
    // Before it has touched much: what it has so far is not counted.
    cgroup.add(running.pid())?;
    running.wait_for("ready", PATIENCE)?;
    Ok(Member { running, _daemon: daemon, control: Control::new(&control) })
}

/// Lets three guests be busy in turns, twice, under a manager with this configuration; returns the manager's last status.
fn manage(configuration: &str) -> Result<Value> {
    let folder = TempDir::with_prefix("manager-")?;
    let guests = folder.path().join("guests");
    std::fs::create_dir(&guests)?;
    let cgroup = MemoryCgroup::new(LIMIT * MIB)?;
    let file = folder.path().join("manager.toml");
    let memory = format!("[host]\nmemory = \"{}\"\n", cgroup.path().display());
    std::fs::write(&file, format!("{SMALL_GUESTS}{memory}{configuration}"))?;
    let desk = folder.path().join("manager.control");
    let mut command = Command::new(daemon::binary("vhost-user-balloon")?);
    command.arg("manage").arg("--directory").arg(&guests).arg("--config").arg(&file);
    command.arg("--control-socket").arg(&desk).stderr(Stdio::piped());
    let mut manager = Process::spawn(command)?;
    let result = let_them_work(&guests, &cgroup, &desk);
    manager.kill();
    result.with_context(|| format!("The manager says:\n{}", manager.stderr().text()))
}

/// Lets three guests be busy in turns, twice, while a manager is at work whose control socket is `desk`.
fn let_them_work(folder: &Path, cgroup: &MemoryCgroup, desk: &Path) -> Result<Value> {
    let names = ["one", "two", "three"];
    let mut members = Vec::new();
    for name in names {
        members.push(member(name, folder, cgroup)?);
    }
    let mut highest = 0;
    for round in 1..=2 {
        let done = format!("done {round}");
        for index in 0..members.len() {
            members[index].running.send("work")?;
            let start = Instant::now();
            while members[index].running.wait_for(&done, Duration::from_millis(100)).is_err() {
                let mut sum = 0;
                for member in &members {
                    sum += member.running.resident()?;
                }
                highest = highest.max(sum);
                ensure!(
                    start.elapsed() < PATIENCE,
                    "A busy guest does not get on\n{}",
                    members[index].running.console()
                );
            }
        }
    }
    let status = Control::new(desk).get("/v1/status")?;
    let mut balloons = 0;
    for member in &members {
        balloons += member.control.number("counters/inflated_bytes")?;
    }
    for mut member in members {
        member.running.send("end")?;
        let report = member.running.wait()?.check()?;
        ensure!(report.number("kills")? == 0, "A guest has killed a process for want of memory");
    }
    ensure!(cgroup.oom_kills()? == 0, "The kernel has killed a guest");
    ensure!(highest <= LIMIT * MIB, "The guests had {} MiB together", highest / MIB);
    ensure!(balloons > 0, "Nothing was taken from any guest, so that this shows nothing");
    println!(
        "The guests had {} MiB together at most, the cgroup {} MiB; {} MiB were taken from guests",
        highest / MIB,
        cgroup.peak()? / MIB,
        balloons / MIB
    );
    Ok(status)
}

#[test]
fn guests_that_want_more_than_there_is_share_it() -> Result<()> {
    let status = manage("")?;
    ensure!(status["guests"].as_array().is_some_and(|guests| guests.len() == 3), "{status}");
    Ok(())
}

#[test]
fn a_policy_of_ones_own_shares_it_as_well() -> Result<()> {
    let script =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../vhost-user-balloon/policies/proportional.rhai");
    let script = script.canonicalize().context("The example script is missing")?;
    manage(&format!("[script]\nfile = \"{}\"\n", script.display())).map(drop)
}
