//! Compares `vhost-user-blk` with the reference `qemu-storage-daemon`.
//!
//! The client is the userspace driver of this package, in interrupt mode as a real guest: it asks for a call signal and
//! sleeps. Absolute figures depend on the machine; the ratios and the CPU time per request are what to look at.
#![expect(clippy::cast_precision_loss, reason = "figures for people")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use rustix::fs::{Advice, fadvise};
use rustix::process::Signal;
use tempfile::TempDir;
use tests::daemon::Daemon;
use tests::driver::blk::{Disk, Op, Options, Queue};
use tests::driver::fixture::{blk_daemon, scratch};
use tests::driver::usage::{Footprint, cpu_time};
use tests::process::Process;

const REFERENCE: &str = "qemu-storage-daemon";
const START_LIMIT: Duration = Duration::from_secs(10);
const WARM_UP: Duration = Duration::from_millis(200);
const MIB: u64 = 1 << 20;

/// Measures vhost-user-blk and qemu-storage-daemon in turns, on the same image, with the same client.
///
/// Prints for each workload the median of requests per second and of the backend's CPU time per request (all threads,
/// kernel workers of the process included), and the median of the ratios of neighbouring runs.
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p tests --bench blk --", max_term_width = 110)]
struct Args {
    /// How often to run the list of workloads
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How long each run takes, in seconds
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// The image's size
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    size: u64,
    /// Where to put the image; needs direct I/O, so not tmpfs [default: the build folder]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Run only workloads whose name contains this text (see --list)
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// List the workloads and end
    #[arg(long)]
    list: bool,
    /// Count system calls per request with strace instead; slows the backend, the counts stay exact
    #[arg(long)]
    syscalls: bool,
    /// More flags for vhost-user-blk, separated by spaces
    #[arg(long, default_value = "", allow_hyphen_values = true, value_name = "FLAGS")]
    flags: String,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug)]
struct Workload {
    name: &'static str,
    direct: bool,
    write: bool,
    random: bool,
    block: usize,
    depth: usize,
}

const fn workload(
    name: &'static str,
    direct: bool,
    write: bool,
    random: bool,
    block: usize,
    depth: usize,
) -> Workload {
    Workload { name, direct, write, random, block, depth }
}

const WORKLOADS: [Workload; 13] = [
    workload("cached randread 4k QD1", false, false, true, 4096, 1),
    workload("cached randread 4k QD32", false, false, true, 4096, 32),
    workload("cached randread 4k QD128", false, false, true, 4096, 128),
    workload("direct randread 4k QD1", true, false, true, 4096, 1),
    workload("direct randread 4k QD32", true, false, true, 4096, 32),
    workload("direct randread 4k QD128", true, false, true, 4096, 128),
    workload("direct randwrite 4k QD1", true, true, true, 4096, 1),
    workload("direct randwrite 4k QD32", true, true, true, 4096, 32),
    workload("direct randwrite 4k QD128", true, true, true, 4096, 128),
    workload("cached read 64k QD32", false, false, false, 65536, 32),
    workload("cached write 64k QD32", false, true, false, 65536, 32),
    workload("direct read 64k QD32", true, false, false, 65536, 32),
    workload("direct write 64k QD32", true, true, false, 65536, 32),
];

/// The two backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    Ours,
    Reference,
}

/// A backend that runs, until this is dropped.
enum Running {
    Ours(Daemon),
    Reference { process: Process, socket: PathBuf, _folder: TempDir },
}

impl Running {
    fn start(backend: Backend, image: &Path, direct: bool, queue_size: usize, flags: &str) -> Result<Self> {
        match backend {
            Backend::Ours => {
                let mut builder = blk_daemon().arg("--blk-file").arg(image).args(flags.split_whitespace());
                builder = builder.args(["--queue-size", &queue_size.to_string()]);
                if direct {
                    builder = builder.args(["--cache", "direct"]);
                }
                Ok(Self::Ours(builder.start()?))
            }
            Backend::Reference => {
                let folder = TempDir::with_prefix("vhost-user-")?;
                let socket = folder.path().join("socket");
                let cache = if direct { "on" } else { "off" };
                let image = image.display();
                let mut command = Command::new(REFERENCE);
                command
                    .arg("--blockdev")
                    .arg(format!("driver=file,node-name=f,filename={image},aio=io_uring,cache.direct={cache}"))
                    .args(["--blockdev", "driver=raw,node-name=d,file=f", "--object", "iothread,id=io0", "--export"])
                    .arg(format!(
                        "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={},num-queues=1,\
                         iothread=io0",
                        socket.display()
                    ))
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped());
                let process = Process::spawn(command).context("Cannot start qemu-storage-daemon")?;
                Ok(Self::Reference { process, socket, _folder: folder })
            }
        }
    }

    fn pid(&self) -> u32 {
        match self {
            Self::Ours(daemon) => daemon.pid(),
            Self::Reference { process, .. } => process.pid(),
        }
    }

    fn socket(&self) -> &Path {
        match self {
            Self::Ours(daemon) => daemon.socket(),
            Self::Reference { socket, .. } => socket,
        }
    }

    fn stderr(&self) -> String {
        match self {
            Self::Ours(daemon) => daemon.stderr(),
            Self::Reference { process, .. } => process.stderr().text(),
        }
    }

    /// Connects as soon as the backend listens.
    fn open(&mut self, options: &Options) -> Result<Disk> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match Disk::open(self.socket(), options) {
                Ok(disk) => return Ok(disk),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
                        && Instant::now() < deadline
                        && !self.has_ended()? =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => bail!("Cannot open the disk: {error}\n{}", self.stderr()),
            }
        }
    }

    fn has_ended(&mut self) -> io::Result<bool> {
        match self {
            Self::Ours(daemon) => Ok(daemon.wait(Duration::ZERO).is_ok()),
            Self::Reference { process, .. } => Ok(process.wait(Duration::ZERO)?.is_some()),
        }
    }

    /// Starts a backend and connects to it.
    ///
    /// Tries again for a while: the lock on the image can outlive the backend that was killed before, for a moment.
    fn connected(backend: Backend, image: &Path, workload: &Workload, flags: &str) -> Result<(Self, Disk)> {
        let options = Options { depth: workload.depth, max_transfer: workload.block, ..Options::default() };
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let attempt = Self::start(backend, image, workload.direct, options.queue_size().max(128), flags)
                .and_then(|mut running| running.open(&options).map(|disk| (running, disk)));
            if attempt.is_ok() || Instant::now() >= deadline {
                return attempt;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Offsets of one workload after the other.
struct Offsets {
    blocks: u64,
    block: u64,
    random: bool,
    state: u64,
}

impl Offsets {
    fn new(workload: &Workload, size: u64) -> Self {
        let block = workload.block as u64;
        Self { blocks: size / block, block, random: workload.random, state: 0x2545_F491_4F6C_DD1D }
    }

    fn next(&mut self) -> u64 {
        if self.random {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        } else {
            self.state = self.state.wrapping_add(1);
        }
        self.state % self.blocks * self.block
    }
}

/// Keeps the queue full for `duration`. Returns the number of requests and the time they took.
fn drive(
    queue: &mut Queue,
    workload: &Workload,
    offsets: &mut Offsets,
    duration: Duration,
) -> Result<(u64, Duration)> {
    // Looking at the clock for each request would be a cost of the client.
    const LOOK_EVERY: u32 = 16;
    let start = Instant::now();
    let (len, write) = (workload.block, workload.write);
    let (mut until_look, mut failed) = (0, 0_u64);
    let completed = queue.run(
        workload.depth,
        |_| {
            if until_look == 0 {
                if start.elapsed() >= duration {
                    return None;
                }
                until_look = LOOK_EVERY;
            }
            until_look -= 1;
            let offset = offsets.next();
            Some(if write { Op::Write { offset, len } } else { Op::Read { offset, len } })
        },
        |_, result, _| failed += u64::from(result.is_err()),
    )?;
    if failed > 0 {
        bail!("{failed} of {completed} requests failed");
    }
    Ok((completed, start.elapsed()))
}

/// What one run showed.
#[derive(Clone, Copy, Debug)]
struct Figures {
    /// Requests per second.
    rate: f64,
    /// The backend's CPU time per request in microseconds.
    cpu: f64,
}

/// Brings the page cache to the same state before each run.
fn prepare(image: &Path, direct: bool) -> Result<()> {
    let mut file = File::open(image)?;
    file.sync_all()?;
    if direct {
        fadvise(&file, 0, None, Advice::DontNeed)?;
    } else {
        let mut buffer = vec![0; MIB as usize];
        while file.read(&mut buffer)? > 0 {}
    }
    Ok(())
}

fn measure(backend: Backend, image: &Path, workload: &Workload, args: &Args) -> Result<Figures> {
    prepare(image, workload.direct)?;
    let (running, mut disk) = Running::connected(backend, image, workload, &args.flags)?;
    let mut offsets = Offsets::new(workload, disk.capacity()?);
    let queue = disk.queue(0);
    drive(queue, workload, &mut offsets, WARM_UP)?;
    let before = cpu_time(running.pid())?;
    let (requests, elapsed) = drive(queue, workload, &mut offsets, Duration::from_secs_f64(args.seconds))?;
    let cpu = cpu_time(running.pid())?.saturating_sub(before);
    let requests = requests as f64;
    Ok(Figures { rate: requests / elapsed.as_secs_f64(), cpu: cpu.as_secs_f64() * 1e6 / requests })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn median_of(runs: &[Figures], field: impl Fn(&Figures) -> f64) -> f64 {
    median(runs.iter().map(field).collect())
}

fn thousands(rate: f64) -> String {
    format!("{:.1}k", rate / 1000.0)
}

fn compare(image: &Path, workloads: &[Workload], backends: &[Backend], args: &Args) -> Result<()> {
    let mut runs: BTreeMap<(usize, bool), Vec<Figures>> = BTreeMap::new();
    for round in 1..=args.rounds {
        for (index, workload) in workloads.iter().enumerate() {
            for &backend in backends {
                let figures = measure(backend, image, workload, args)
                    .with_context(|| format!("{backend:?}, {}", workload.name))?;
                eprintln!(
                    "round {round} {:<27} {:<10} {:>9} {:>8.2} us",
                    workload.name,
                    format!("{backend:?}"),
                    thousands(figures.rate),
                    figures.cpu
                );
                runs.entry((index, backend == Backend::Reference)).or_default().push(figures);
            }
        }
    }
    println!();
    println!("{:<27} {:^20} {:^20} {:^17}", "", "vhost-user-blk", REFERENCE, "ratio");
    println!(
        "{:<27} {:>9} {:>10} {:>9} {:>10} {:>8} {:>8}",
        "workload", "IOPS", "CPU us/IO", "IOPS", "CPU us/IO", "IOPS", "CPU"
    );
    for (index, workload) in workloads.iter().enumerate() {
        let ours = &runs[&(index, false)];
        print!("{:<27} {:>9}", workload.name, thousands(median_of(ours, |run| run.rate)));
        print!(" {:>10.2}", median_of(ours, |run| run.cpu));
        if let Some(reference) = runs.get(&(index, true)) {
            // Neighbouring runs saw the same state of the machine.
            let ratio = |field: fn(&Figures) -> f64| {
                median(
                    ours.iter()
                        .zip(reference)
                        .map(|(ours, reference)| field(ours) / field(reference))
                        .collect(),
                )
            };
            print!(" {:>9}", thousands(median_of(reference, |run| run.rate)));
            print!(" {:>10.2}", median_of(reference, |run| run.cpu));
            print!(" {:>7.2}x {:>7.2}x", ratio(|run| run.rate), ratio(|run| run.cpu));
        }
        println!();
    }
    Ok(())
}

/// What a connected backend takes while nobody asks for anything.
fn idle(image: &Path, backends: &[Backend], args: &Args) -> Result<()> {
    const REST: Duration = Duration::from_secs(2);
    let workload = &WORKLOADS[1];
    println!();
    println!("{:<27} {:>16} {:>16} {:>9}", "connected and idle", "CPU us/s", "resident KiB", "threads");
    for &backend in backends {
        prepare(image, false)?;
        let (running, mut disk) = Running::connected(backend, image, workload, &args.flags)?;
        let mut offsets = Offsets::new(workload, disk.capacity()?);
        drive(disk.queue(0), workload, &mut offsets, WARM_UP)?;
        std::thread::sleep(WARM_UP);
        let before = cpu_time(running.pid())?;
        std::thread::sleep(REST);
        let cpu = cpu_time(running.pid())?.saturating_sub(before);
        let footprint = Footprint::of(running.pid())?;
        let name = if backend == Backend::Ours { "vhost-user-blk" } else { REFERENCE };
        let cpu = cpu.as_secs_f64() * 1e6 / REST.as_secs_f64();
        println!("{name:<27} {cpu:>16.1} {:>16} {:>9}", footprint.rss_kib, footprint.threads);
    }
    Ok(())
}

/// Counts system calls with `strace -c`.
fn syscalls(image: &Path, workloads: &[Workload], backends: &[Backend], args: &Args) -> Result<()> {
    for workload in workloads {
        for &backend in backends {
            let (requests, calls) = count_syscalls(backend, image, workload, args)?;
            let total: u64 = calls.iter().map(|(_, count)| count).sum();
            print!(
                "{:<27} {:<10} {:>6.2} per request:",
                workload.name,
                format!("{backend:?}"),
                total as f64 / requests
            );
            for (name, count) in calls {
                let each = count as f64 / requests;
                if each >= 0.005 {
                    print!("  {name} {each:.2}");
                }
            }
            println!();
        }
    }
    Ok(())
}

fn count_syscalls(
    backend: Backend,
    image: &Path,
    workload: &Workload,
    args: &Args,
) -> Result<(f64, Vec<(String, u64)>)> {
    prepare(image, workload.direct)?;
    let (running, mut disk) = Running::connected(backend, image, workload, &args.flags)?;
    let mut offsets = Offsets::new(workload, disk.capacity()?);
    let queue = disk.queue(0);
    drive(queue, workload, &mut offsets, WARM_UP)?;

    let folder = TempDir::new()?;
    let summary = folder.path().join("summary");
    let mut command = Command::new("strace");
    command.args(["-c", "-f", "-p", &running.pid().to_string(), "-o"]).arg(&summary);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut strace =
        Process::spawn(command).context("Cannot start strace, which --syscalls needs: install it")?;
    // It says "Process N attached" for each thread and nothing when it is done with all.
    let attached = |text: &[u8]| String::from_utf8_lossy(text).contains("attached").then_some(());
    if strace.stderr().wait_until(Instant::now() + START_LIMIT, attached).is_none() {
        bail!("strace cannot attach: {}", strace.stderr().text());
    }
    std::thread::sleep(WARM_UP);
    let (requests, _) = drive(queue, workload, &mut offsets, Duration::from_secs_f64(args.seconds))?;
    strace.signal(Signal::INT)?;
    strace.wait(START_LIMIT)?.context("strace does not end")?;
    let calls = parse_strace(&fs::read_to_string(&summary)?);
    if calls.is_empty() {
        bail!("strace counted nothing: {}", strace.stderr().text());
    }
    Ok((requests as f64, calls))
}

/// The calls of a summary of `strace -c`, of which each line is `% seconds usecs/call calls [errors] name`.
fn parse_strace(summary: &str) -> Vec<(String, u64)> {
    summary
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            fields.first()?.parse::<f64>().ok()?;
            let name = fields.last().filter(|name| **name != "total")?;
            Some(((*name).to_owned(), fields.get(3)?.parse().ok()?))
        })
        .collect()
}

fn main() -> Result<()> {
    let args = Args::parse();
    let chosen = |workload: &&Workload| args.only.as_ref().is_none_or(|text| workload.name.contains(text));
    let workloads: Vec<Workload> = WORKLOADS.iter().filter(chosen).copied().collect();
    if args.list {
        for workload in &workloads {
            println!("{}", workload.name);
        }
        return Ok(());
    }
    if workloads.is_empty() {
        bail!("No workload has such a name: see --list");
    }

    let reference = Command::new(REFERENCE).arg("--version").output();
    let backends = match &reference {
        Ok(output) if output.status.success() => {
            let version = String::from_utf8_lossy(&output.stdout);
            println!("Reference: {}", version.lines().next().unwrap_or(REFERENCE));
            vec![Backend::Ours, Backend::Reference]
        }
        _ => {
            println!("{REFERENCE} is not installed, so only vhost-user-blk is measured.");
            println!(
                "It comes with the package qemu-utils (Debian, Ubuntu), qemu-img (Fedora) or qemu (Arch)."
            );
            vec![Backend::Ours]
        }
    };

    let folder = match &args.dir {
        Some(dir) => tempfile::Builder::new().prefix("blk-bench-").tempdir_in(dir)?,
        None => scratch()?,
    };
    let image = folder.path().join("image");
    let mut file = File::create(&image)?;
    for number in 0..args.size {
        // No zeros and no two equal parts, for the sake of file systems that find such things.
        let part: Vec<u8> = (0..MIB / 8)
            .flat_map(|i| (number * MIB + i).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes())
            .collect();
        file.write_all(&part)?;
    }
    file.sync_all()?;
    println!("Image: {} MiB at {}", args.size, image.display());

    if args.syscalls {
        return syscalls(&image, &workloads, &backends, &args);
    }
    compare(&image, &workloads, &backends, &args)?;
    idle(&image, &backends, &args)
}
