//! Compares `vhost-user-9p` with virtiofsd and with QEMU's own virtio-9p, on the virtqueue, without a guest.
//!
//! One thread of this process is the driver. It writes requests of 9P2000.L or FUSE to a ring in shared memory, kicks only
//! when the device asks for it, and finds completions by looking at the used ring without a pause; so what is measured is
//! the server, its wake-up, and the ring. QEMU runs no guest either (`-accel qtest`): its memory is a file, and it is kicked
//! by the eventfd that KVM would write to.
#![expect(clippy::cast_precision_loss, reason = "figures for people")]

mod client;
mod fuse;
mod lane;
mod ninep;
mod qtest;
mod subject;
mod work;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use tempfile::TempDir;

use subject::{Kind, Setting, Subject};
use work::{ROWS, Row, Sample, Tree};

/// Measures vhost-user-9p, virtiofsd and QEMU's virtio-9p in turns, on one tree, with one driver.
///
/// Prints for each row the medians of wall time and of the server's CPU time (all of its threads) per operation, both in
/// microseconds, and the medians of the ratios of neighbouring runs.
///
/// The driver takes a processor of its own, and the server another one. Where others use them too, only `chrt -r 1` in front
/// of the program keeps them out; do not run it for long like that.
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p tests --bench p9 --", max_term_width = 110)]
struct Args {
    /// How often to run each row
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each run takes, in seconds
    #[arg(long, default_value_t = 0.15)]
    seconds: f64,
    /// Where to put the tree
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Run only rows whose name contains this text (see --list)
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// The servers to compare [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    subjects: Vec<Kind>,
    /// The most bytes of data in a descriptor; Linux has one for each page
    #[arg(long, default_value_t = 4096)]
    piece: usize,
    /// List the rows and end
    #[arg(long)]
    list: bool,
    /// More flags for vhost-user-9p, separated by spaces
    #[arg(long, default_value = "", allow_hyphen_values = true, value_name = "FLAGS")]
    flags: String,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// All samples of one row, subject by subject.
struct Outcome {
    row: Row,
    samples: Vec<Vec<Sample>>,
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Outcome {
    fn median(&self, subject: usize, field: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples[subject].iter().map(field))
    }

    /// The median of the ratios of neighbouring runs, which saw the same state of the machine.
    fn ratio(&self, of: usize, to: usize, field: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples[of].iter().zip(&self.samples[to]).map(|(of, to)| field(of) / field(to)))
    }
}

fn print_costs(kinds: &[Kind], outcomes: &[Outcome]) {
    println!("\nMicroseconds per operation: wall / CPU of the server");
    print!("{:<38}", "");
    for kind in kinds {
        print!(" {:>17}", kind.label());
    }
    println!();
    for outcome in outcomes {
        print!("{:<38}", outcome.row.name);
        for subject in 0..kinds.len() {
            let (wall, cpu) = (outcome.median(subject, Sample::wall), outcome.median(subject, Sample::cpu));
            print!(" {:>17}", format!("{wall:.2} / {cpu:.2}"));
        }
        println!();
    }
}

fn print_ratios(kinds: &[Kind], outcomes: &[Outcome]) {
    for (ours, kind) in kinds.iter().enumerate().filter(|(_, kind)| kind.is_ours()) {
        println!("\nTimes what \"{}\" takes: wall / CPU", kind.label());
        let others: Vec<usize> = (0..kinds.len()).filter(|index| !kinds[*index].is_ours()).collect();
        print!("{:<38}", "");
        for &other in &others {
            print!(" {:>17}", kinds[other].label());
        }
        println!();
        for outcome in outcomes {
            print!("{:<38}", outcome.row.name);
            for &other in &others {
                let wall = outcome.ratio(other, ours, Sample::wall);
                let cpu = outcome.ratio(other, ours, Sample::cpu);
                print!(" {:>17}", format!("{wall:.2} / {cpu:.2}"));
            }
            println!();
        }
    }
}

fn print_requests(kinds: &[Kind], outcomes: &[Outcome]) {
    println!("\nPer operation: requests / kicks that the server asked for");
    print!("{:<38}", "");
    for kind in kinds {
        print!(" {:>17}", kind.label());
    }
    println!();
    for outcome in outcomes {
        print!("{:<38}", outcome.row.name);
        for subject in 0..kinds.len() {
            let requests = outcome.median(subject, |sample| sample.requests as f64 / sample.count as f64);
            let kicks = outcome.median(subject, |sample| sample.kicks as f64 / sample.count as f64);
            print!(" {:>17}", format!("{requests:.1} / {kicks:.2}"));
        }
        println!();
    }
}

/// One run of every row by every subject, all of them connected at once.
fn round(args: &Args, kinds: &[Kind], setting: &Setting, outcomes: &mut [Outcome]) -> Result<()> {
    let mut subjects = Vec::new();
    for kind in kinds {
        let mut subject = Subject::start(*kind, setting)?;
        let tree = Tree::find(subject.client.as_mut()).with_context(|| subject.words())?;
        subjects.push((subject, tree));
    }
    for outcome in outcomes {
        for ((subject, tree), samples) in subjects.iter_mut().zip(&mut outcome.samples) {
            let duration = Duration::from_secs_f64(args.seconds);
            let sample = work::run(subject, tree, outcome.row.work, duration).with_context(|| {
                format!("{}: {}\n{}", subject.kind.label(), outcome.row.name, subject.words())
            })?;
            samples.push(sample);
        }
    }
    Ok(())
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg").map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let chosen = |row: &&Row| args.only.as_ref().is_none_or(|text| row.name.contains(text));
    let rows: Vec<Row> = ROWS.iter().filter(chosen).copied().collect();
    if args.list {
        for row in &rows {
            println!("{}", row.name);
        }
        return Ok(());
    }
    ensure!(!rows.is_empty(), "No row has such a name: see --list");
    ensure!(
        args.piece >= 4096,
        "A descriptor has a page of data at least, or a chain would not fit in the ring"
    );
    let kinds = if args.subjects.is_empty() { Kind::value_variants() } else { &args.subjects[..] };
    let share = TempDir::with_prefix_in("p9-share-", &args.dir).context("Cannot make a folder to share")?;
    work::make_tree(share.path())?;
    let setting = Setting { share: share.path(), piece: args.piece, flags: &args.flags };
    println!("{} processors, load average before: {}", std::thread::available_parallelism()?, load_average());
    let new = |row| Outcome { row, samples: vec![Vec::new(); kinds.len()] };
    let mut outcomes: Vec<Outcome> = rows.into_iter().map(new).collect();
    for _ in 0..args.rounds {
        round(&args, kinds, &setting, &mut outcomes)?;
    }
    print_costs(kinds, &outcomes);
    print_ratios(kinds, &outcomes);
    print_requests(kinds, &outcomes);
    println!("\nLoad average after: {}", load_average());
    Ok(())
}
