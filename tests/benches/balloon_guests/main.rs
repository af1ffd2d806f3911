//! How fast a balloon takes memory from a guest, how much of it the host really gets, and what that costs: for
//! `vhost-user-balloon` with User Mode Linux and with QEMU, and for QEMU's own virtio-balloon in the same guest.
//!
//! All of the guest's memory was in use before, and is free in the guest when the measurement begins: memory that the guest
//! never touched would be "returned" without ever having been there. "taken" is the time until the guest says that the
//! balloon has its size, "returned" the time until the host has what it gets. CPU time is that of the daemon and of the
//! guest's process together; most of it is the guest's.
#![expect(clippy::cast_precision_loss, reason = "memory of guests is far from having 2^52 bytes")]

mod subject;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use subject::{Machine, Subject};
use tests::driver::balloon::huge::HugePages;

const MIB: u64 = 1 << 20;
/// How often to look.
const TICK: Duration = Duration::from_millis(5);
/// How long nothing has to come back for all to be back.
const SETTLE: Duration = Duration::from_millis(500);
/// Longest time for anything.
const LIMIT: Duration = Duration::from_secs(120);

/// Measures balloons in guests, in turns.
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p tests --bench balloon_guests --", max_term_width = 110)]
struct Args {
    /// How often to measure each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Memory of the guest, MiB
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Size of the balloon, MiB
    #[arg(long, default_value_t = 512)]
    size: u64,
    /// Leave out what needs huge pages of the host, and so root
    #[arg(long)]
    no_huge_pages: bool,
    /// Only reports of free pages
    #[arg(long)]
    only_reporting: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one run showed.
#[derive(Clone, Copy)]
struct Outcome {
    taken: f64,
    returned: f64,
    deflated: f64,
    returned_mib: f64,
    daemon_cpu: f64,
    all_cpu: f64,
}

fn inflate(subject: Subject, args: &Args, huge: bool) -> Result<Outcome> {
    let fill = u64::from(args.memory) * 3 / 4;
    let mut machine = Machine::start(subject, args.memory, false, huge, &format!("fill {fill}"))?;
    machine.settle()?;
    let before = machine.resident()?;
    let cpu = machine.cpu()?;
    let start = Instant::now();
    let target = args.size * MIB;
    machine.set_target(target)?;
    let (mut taken, mut lowest, mut lowest_at) = (None, before, start);
    loop {
        let now = Instant::now();
        let resident = machine.resident()?;
        // The last pages come one by one from far away: they do not count.
        if resident + MIB < lowest {
            (lowest, lowest_at) = (resident, now);
        }
        if taken.is_none() && machine.actual()? == target {
            taken = Some(start.elapsed());
        }
        if taken.is_some() && lowest_at.elapsed() > SETTLE {
            break;
        }
        ensure!(start.elapsed() < LIMIT, "The balloon has {} of {target} bytes", machine.actual()?);
        std::thread::sleep(TICK);
    }
    let used = machine.cpu()?;
    let start_deflate = Instant::now();
    machine.set_target(0)?;
    while machine.actual()? != 0 {
        ensure!(start_deflate.elapsed() < LIMIT, "The balloon has {} bytes left", machine.actual()?);
        std::thread::sleep(TICK);
    }
    let deflated = start_deflate.elapsed();
    machine.end()?;
    let gib = args.size as f64 / 1024.0;
    let seconds = |time: Duration| time.as_secs_f64();
    Ok(Outcome {
        taken: gib / seconds(taken.unwrap_or(LIMIT)),
        returned: (before - lowest) as f64 / (1u64 << 30) as f64 / seconds(lowest_at - start).max(0.001),
        deflated: gib / seconds(deflated),
        returned_mib: (before - lowest) as f64 / MIB as f64,
        daemon_cpu: seconds(used.0.saturating_sub(cpu.0)) / gib,
        all_cpu: seconds((used.0 + used.1).saturating_sub(cpu.0 + cpu.1)) / gib,
    })
}

/// Seconds until half and 90 % of what a guest freed is back, and how much that is in MiB.
fn report(subject: Subject, args: &Args) -> Result<(f64, f64, f64)> {
    let fill = u64::from(args.memory) * 5 / 8;
    let mut machine = Machine::start(subject, args.memory, true, false, &format!("fill {fill}"))?;
    let before = machine.resident()?;
    let freed = fill * MIB;
    machine.free()?;
    let start = Instant::now();
    let (mut half, mut most) = (None, None);
    while start.elapsed() < LIMIT {
        let back = before.saturating_sub(machine.resident()?);
        let at = start.elapsed().as_secs_f64();
        if half.is_none() && back * 2 >= freed {
            half = Some(at);
        }
        if most.is_none() && back * 10 >= freed * 9 {
            most = Some(at);
            break;
        }
        std::thread::sleep(TICK);
    }
    let back = before.saturating_sub(machine.resident()?);
    machine.end()?;
    Ok((half.unwrap_or(f64::INFINITY), most.unwrap_or(f64::INFINITY), back as f64 / MIB as f64))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn table(title: &str, args: &Args, subjects: &[Subject], huge: bool) -> Result<()> {
    println!("\n{title}: a guest of {} MiB, a balloon of {} MiB", args.memory, args.size);
    println!(
        "{:>34} {:>12} {:>12} {:>12} {:>12} {:>14} {:>14}",
        "", "taken GiB/s", "back GiB/s", "deflate", "back MiB", "daemon s/GiB", "all CPU s/GiB"
    );
    let mut outcomes: Vec<(Subject, Vec<Outcome>)> =
        subjects.iter().map(|subject| (*subject, Vec::new())).collect();
    for _ in 0..args.rounds {
        for (subject, outcomes) in &mut outcomes {
            outcomes.push(inflate(*subject, args, huge)?);
        }
    }
    for (subject, outcomes) in &outcomes {
        let middle = |value: fn(&Outcome) -> f64| median(outcomes.iter().map(value));
        println!(
            "{:>34} {:>12.2} {:>12.2} {:>12.2} {:>12.0} {:>14.3} {:>14.3}",
            subject.name(),
            middle(|outcome| outcome.taken),
            middle(|outcome| outcome.returned),
            middle(|outcome| outcome.deflated),
            middle(|outcome| outcome.returned_mib),
            middle(|outcome| outcome.daemon_cpu),
            middle(|outcome| outcome.all_cpu),
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    println!("Medians of {} rounds, in turns.", args.rounds);
    let all = [Subject::Uml, Subject::Qemu, Subject::QemuOwn];
    if !args.only_reporting {
        table("Pages of 4 KiB", &args, &all, false)?;
        if !args.no_huge_pages {
            let _pool = HugePages::new(u64::from(args.memory) / 2)?;
            table("Huge pages of 2 MiB (hugetlbfs)", &args, &all[1..], true)?;
        }
    }
    println!("\nReports of free pages: {} MiB freed in a guest of {} MiB", args.memory * 5 / 8, args.memory);
    println!("{:>34} {:>12} {:>12} {:>12}", "", "50 % s", "90 % s", "back MiB");
    let mut reports: Vec<_> = all.iter().map(|subject| (*subject, Vec::new())).collect();
    for _ in 0..args.rounds {
        for (subject, reports) in &mut reports {
            reports.push(report(*subject, &args)?);
        }
    }
    for (subject, reports) in &reports {
        println!(
            "{:>34} {:>12.2} {:>12.2} {:>12.0}",
            subject.name(),
            median(reports.iter().map(|report| report.0)),
            median(reports.iter().map(|report| report.1)),
            median(reports.iter().map(|report| report.2)),
        );
    }
    Ok(())
}
