//! Measures what `vhost-user-net` costs for each frame, against what the host side costs alone.
//!
//! The unit is CPU time of the daemon's process (all threads, kernel work on their behalf included) for each frame that
//! its own counters show. Wall time and rates depend on who else runs on the machine.
//!
//! - tap: DPDK's testpmd is the driver. The floor is one thread that writes the same frame to a tap of its own, or reads
//!   from one at which the same sender sends, in the same namespace and in turns with the daemon.
//! - switch: two guests on one switch, driven by a thread of this process that only passes buffers around, or two testpmds.
//! - stream: such a guest, and a peer in this process.
//!
//! Everything happens in network namespaces made here.
#![expect(clippy::cast_precision_loss, reason = "figures for people")]

mod floor;
mod frame;
mod guest;
mod peer;
mod subject;
mod sys;
mod workload;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use tests::driver::net::LONG_HEADER_LEN;

use workload::{WORKLOADS, Workload};

/// Measures the CPU time of vhost-user-net for each frame, in turns with what a tap costs by itself.
///
/// Prints medians, and the median of the ratios of neighbouring runs. "slept" is how many frames passed for each time that
/// a thread went to sleep: a wake-up costs more than a frame.
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p tests --bench net --", max_term_width = 110)]
struct Args {
    /// How often to run each workload
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each run takes, in seconds
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Run only workloads whose name contains this text (see --list)
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// List the workloads and end
    #[arg(long)]
    list: bool,
    /// Do not count system calls, which takes perf and root
    #[arg(long)]
    no_syscalls: bool,
    /// More flags for vhost-user-net, separated by spaces
    #[arg(long, default_value = "", allow_hyphen_values = true, value_name = "FLAGS")]
    flags: String,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

/// What one run showed.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    frames: u64,
    /// Of these, those larger than the MTU of Ethernet.
    large: u64,
    /// Frames for which there was no buffer.
    lost: u64,
    cpu: Duration,
    elapsed: Duration,
    /// How often a thread waited.
    sleeps: u64,
}

impl Run {
    /// CPU time per frame in nanoseconds.
    fn cost(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.frames as f64
    }

    fn rate(&self) -> f64 {
        self.frames as f64 / self.elapsed.as_secs_f64()
    }

    fn per_sleep(&self) -> f64 {
        self.frames as f64 / self.sleeps.max(1) as f64
    }
}

/// All runs of one workload.
struct Outcome {
    name: &'static str,
    ours: Vec<Run>,
    /// The same without a daemon, by what it is called.
    floors: Vec<(&'static str, Vec<Run>)>,
    calls: Option<(Run, Vec<(String, u64)>)>,
    idle: Duration,
    rss_kib: usize,
    threads: usize,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn median_of(runs: &[Run], field: impl Fn(&Run) -> f64) -> f64 {
    median(runs.iter().map(field).collect())
}

fn print_costs(outcomes: &[Outcome]) {
    println!();
    println!(
        "{:<21} {:>8} {:>8} {:>6} {:>6} {:>7}  {:<20} {:>8} {:>7} {:>8}",
        "workload", "ns/frame", "kframe/s", "slept", "large", "lost", "floor", "ns/frame", "slept", "ratio"
    );
    for Outcome { name, ours, floors, .. } in outcomes {
        let share =
            |field: fn(&Run) -> u64| 100.0 * median_of(ours, |run| field(run) as f64 / run.frames as f64);
        print!(
            "{name:<21} {:>8.0} {:>8.0} {:>6.0} {:>5.0}% {:>6.2}%",
            median_of(ours, Run::cost),
            median_of(ours, Run::rate) / 1000.0,
            median_of(ours, Run::per_sleep),
            share(|run| run.large),
            share(|run| run.lost)
        );
        for (index, (label, floor)) in floors.iter().enumerate() {
            if index > 0 {
                print!("\n{:61}", "");
            }
            // Neighbouring runs saw the same state of the machine.
            let ratios = ours.iter().zip(floor).map(|(ours, floor)| ours.cost() / floor.cost());
            let slept = if floor.iter().any(|run| run.sleeps > 0) {
                format!("{:.0}", median_of(floor, Run::per_sleep))
            } else {
                "-".to_owned()
            };
            print!(
                "  {label:<20} {:>8.0} {slept:>7} {:>7.2}x",
                median_of(floor, Run::cost),
                median(ratios.collect())
            );
        }
        println!();
    }
}

fn print_calls(outcomes: &[Outcome]) {
    println!();
    println!("{:<21} {:>12} {:>12}  system calls per frame", "workload", "calls/frame", "frames/call");
    for outcome in outcomes {
        let Some((run, calls)) = &outcome.calls else { continue };
        let each = |count: u64| count as f64 / run.frames as f64;
        let all = calls.iter().find(|(name, _)| name == "all").map_or(f64::NAN, |(_, count)| each(*count));
        print!("{:<21} {all:>12.3} {:>12.1} ", outcome.name, 1.0 / all);
        for (name, count) in calls {
            if name != "all" && each(*count) >= 0.0005 {
                print!(" {name} {:.3}", each(*count));
            }
        }
        println!();
    }
}

fn print_rest(outcomes: &[Outcome]) {
    println!();
    println!("{:<21} {:>14} {:>14} {:>8}", "connected and idle", "CPU us/s", "resident KiB", "threads");
    for Outcome { name, idle, rss_kib, threads, .. } in outcomes {
        let idle = idle.as_secs_f64() * 1e6 / workload::REST.as_secs_f64();
        println!("{name:<21} {idle:>14.1} {rss_kib:>14} {threads:>8}");
    }
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg").map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let chosen = |workload: &&Workload| args.only.as_ref().is_none_or(|text| workload.name.contains(text));
    let workloads: Vec<&Workload> = WORKLOADS.iter().filter(chosen).collect();
    if args.list {
        for workload in &workloads {
            println!("{}", workload.name);
        }
        return Ok(());
    }
    if workloads.is_empty() {
        bail!("No workload has such a name: see --list");
    }
    println!("{} processors, load average before: {}", std::thread::available_parallelism()?, load_average());
    let mut outcomes = Vec::new();
    for workload in workloads {
        outcomes.push(workload::run(workload, &args).with_context(|| format!("Workload {}", workload.name))?);
    }
    print_costs(&outcomes);
    print_calls(&outcomes);
    print_rest(&outcomes);
    println!("\nLoad average after: {}", load_average());
    Ok(())
}
