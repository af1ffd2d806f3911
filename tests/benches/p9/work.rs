//! What is measured: the rows, and one run of a row.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::client::{Client, File, Mode, Node, Single};
use super::lane::{DATA, SLOTS};
use super::subject::Subject;

/// Entries of the folder that is listed.
const ENTRIES: usize = 1000;
/// The length of the files that are read and written.
const FILE_LEN: usize = 64 << 20;
/// The folder five levels down.
const DEEP: &str = "a/b/c/d/e";
/// The part of a run that comes before it.
const WARM_UP: u32 = 10;
/// Replies between two looks at the clock while many requests are outstanding.
const LOOK_EVERY: u64 = 32;

/// One kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Getattr { depth: usize },
    Stat { deep: bool },
    ReadFile,
    MakeFile,
    List,
    Read { len: usize, depth: usize },
    Write { len: usize, depth: usize },
}

/// A row of the tables.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// What is done.
    pub work: Work,
}

const fn row(name: &'static str, work: Work) -> Row {
    Row { name, work }
}

const KIB: usize = 1 << 10;

/// All rows.
pub const ROWS: [Row; 14] = [
    row("getattr QD1", Work::Getattr { depth: 1 }),
    row("getattr QD32", Work::Getattr { depth: 32 }),
    row("walk+getattr+clunk, depth 0", Work::Stat { deep: false }),
    row("walk+getattr+clunk, depth 5", Work::Stat { deep: true }),
    row("open+read 4K+close, depth 5", Work::ReadFile),
    row("create+write 4K+close+unlink, depth 5", Work::MakeFile),
    row("opendir+readdir 1000+close", Work::List),
    row("read 4K QD1", Work::Read { len: 4 * KIB, depth: 1 }),
    row("read 4K QD16", Work::Read { len: 4 * KIB, depth: 16 }),
    row("write 4K QD16", Work::Write { len: 4 * KIB, depth: 16 }),
    row("read 128K QD1", Work::Read { len: 128 * KIB, depth: 1 }),
    row("read 128K QD16", Work::Read { len: 128 * KIB, depth: 16 }),
    row("read 480K QD16", Work::Read { len: DATA, depth: 16 }),
    row("write 480K QD16", Work::Write { len: DATA, depth: 16 }),
];

/// Makes the tree that is shared.
pub fn make_tree(share: &Path) -> Result<()> {
    let make = || -> std::io::Result<()> {
        fs::create_dir_all(share.join(DEEP))?;
        fs::create_dir(share.join("many"))?;
        for index in 0..ENTRIES {
            fs::write(share.join(format!("many/entry-{index:04}")), [])?;
        }
        for file in ["file".to_owned(), format!("{DEEP}/file")] {
            fs::write(share.join(file), [7; 4096])?;
        }
        for file in ["in", "out"] {
            fs::write(share.join(file), vec![7; FILE_LEN])?;
        }
        Ok(())
    };
    make().with_context(|| format!("Cannot make the tree in {}", share.display()))
}

/// What a session has found in the tree.
#[derive(Clone, Copy, Debug)]
pub struct Tree {
    root: Node,
    deep: Node,
    file: Node,
    many: Node,
    input: File,
    output: File,
}

impl Tree {
    /// Looks everything up.
    pub fn find(client: &mut dyn Client) -> Result<Self> {
        let (input, output) = (client.walk("in")?, client.walk("out")?);
        Ok(Self {
            root: client.root(),
            deep: client.walk(DEEP)?,
            file: client.walk("file")?,
            many: client.walk("many")?,
            input: client.open(input, Mode::Read)?,
            output: client.open(output, Mode::Both)?,
        })
    }
}

/// What one run showed.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Operations.
    pub count: u64,
    /// How long they took.
    pub elapsed: Duration,
    /// What the server spent on them.
    pub cpu: Duration,
    /// Requests and kicks that they took.
    pub requests: u64,
    /// How often the server asked to be woken.
    pub kicks: u64,
}

impl Sample {
    fn each(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e6 / self.count as f64
    }

    /// Microseconds per operation.
    pub fn wall(&self) -> f64 {
        self.each(self.elapsed)
    }

    /// The server's CPU time per operation in microseconds.
    pub fn cpu(&self) -> f64 {
        self.each(self.cpu)
    }
}

/// Does `work` for a while, after a warm-up.
pub fn run(subject: &mut Subject, tree: &Tree, work: Work, duration: Duration) -> Result<Sample> {
    go(subject.client.as_mut(), tree, work, duration / WARM_UP)?;
    let cpu = subject.cpu_time()?;
    let lane = subject.client.lane();
    let (requests, kicks) = (lane.requests, lane.kicks);
    let start = Instant::now();
    let count = go(subject.client.as_mut(), tree, work, duration)?;
    subject.client.lane().drain()?;
    let elapsed = start.elapsed();
    let cpu = subject.cpu_time()?.saturating_sub(cpu);
    let lane = subject.client.lane();
    Ok(Sample { count, elapsed, cpu, requests: lane.requests - requests, kicks: lane.kicks - kicks })
}

/// Does `work` until `duration` is over. Returns how often.
fn go(client: &mut dyn Client, tree: &Tree, work: Work, duration: Duration) -> Result<u64> {
    let file = tree.file;
    let end = Instant::now() + duration;
    match work {
        Work::Getattr { depth } => many(client, depth, end, |_| Single::Getattr(file)),
        Work::Read { len, depth } => many(client, depth, end, |index| Single::Read {
            file: tree.input,
            offset: offset(index, len),
            len,
        }),
        Work::Write { len, depth } => many(client, depth, end, |index| Single::Write {
            file: tree.output,
            offset: offset(index, len),
            len,
        }),
        Work::Stat { deep: false } => again(end, || client.stat(tree.root, "file")),
        Work::Stat { deep: true } => again(end, || client.stat(tree.deep, "file")),
        Work::ReadFile => again(end, || client.read_file(tree.deep, "file")),
        Work::MakeFile => again(end, || client.make_file(tree.deep, "new")),
        Work::List => again(end, || {
            let count = client.list(tree.many)?;
            ensure!(count == ENTRIES + 2, "The folder has {count} entries");
            Ok(())
        }),
    }
}

fn offset(index: u64, len: usize) -> u64 {
    index % (FILE_LEN / len) as u64 * len as u64
}

fn again(end: Instant, mut operation: impl FnMut() -> Result<()>) -> Result<u64> {
    let mut count = 0;
    loop {
        operation()?;
        count += 1;
        if Instant::now() >= end {
            return Ok(count);
        }
    }
}

/// Keeps `depth` requests outstanding, and waits for the last of them.
fn many(client: &mut dyn Client, depth: usize, end: Instant, next: impl Fn(u64) -> Single) -> Result<u64> {
    let mut what = [next(0); SLOTS];
    let (mut sent, mut done) = (0, 0);
    let mut over = false;
    for (slot, what) in what.iter_mut().enumerate().take(depth) {
        *what = next(sent);
        client.push(slot, *what);
        sent += 1;
    }
    client.lane().publish()?;
    while done < sent {
        let mut first = Some(client.lane().wait()?);
        let before = sent;
        // All that came since the last look, and then one look at whether the server wants to be woken.
        while let Some((slot, len)) = first.take().or_else(|| client.lane().poll()) {
            client.check(slot, what[slot], len)?;
            done += 1;
            if done % LOOK_EVERY == 0 || depth == 1 {
                over = Instant::now() >= end;
            }
            if !over {
                what[slot] = next(sent);
                client.push(slot, what[slot]);
                sent += 1;
            }
        }
        if sent > before {
            client.lane().publish()?;
        }
    }
    Ok(done)
}
