//! A cgroup that limits the memory of guests, as an administrator would give them one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// Where cgroups are.
const ROOT: &str = "/sys/fs/cgroup";

/// How often a cgroup of version 1 is told of in the words of version 2.
const MIRROR_EVERY: Duration = Duration::from_millis(50);

/// A cgroup that counts and limits memory, removed when it is dropped; its processes have to be gone then.
///
/// Where the kernel's memory controller is still used in version 1, the files of version 2 that a program looks at are
/// written by a thread, from what the kernel says in the older ones.
#[derive(Debug)]
pub struct MemoryCgroup {
    path: PathBuf,
    mirror: Option<Mirror>,
}

impl MemoryCgroup {
    /// Makes one with a limit of `limit` bytes. Needs root.
    pub fn new(limit: u64) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name =
            format!("vhost-user-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"));
        if controllers.is_ok_and(|controllers| controllers.split(' ').any(|name| name.trim() == "memory")) {
            // The children of the root have the controllers that it passes on.
            fs::write(Path::new(ROOT).join("cgroup.subtree_control"), "+memory").context(
                "The memory controller cannot be passed on to a cgroup, which this test needs: run it as root",
            )?;
            let path = Path::new(ROOT).join(name);
            make(&path)?;
            let cgroup = Self { path, mirror: None };
            fs::write(cgroup.path.join("memory.max"), limit.to_string())?;
            // Swap would let the guests have more than the limit.
            let _ = fs::write(cgroup.path.join("memory.swap.max"), "0");
            return Ok(cgroup);
        }
        let older = Path::new(ROOT).join("memory");
        if !older.join("memory.limit_in_bytes").exists() {
            bail!("There is no memory controller under {ROOT}, which this test needs");
        }
        let path = older.join(name);
        make(&path)?;
        let mut cgroup = Self { path, mirror: None };
        fs::write(cgroup.path.join("memory.limit_in_bytes"), limit.to_string())?;
        let _ = fs::write(cgroup.path.join("memory.swappiness"), "0");
        cgroup.mirror = Some(Mirror::new(&cgroup.path)?);
        Ok(cgroup)
    }

    /// The directory with its files, as those of version 2.
    pub fn path(&self) -> &Path {
        self.mirror.as_ref().map_or(&self.path, |mirror| mirror.folder.path())
    }

    /// Takes a process in, with all that it starts from now on. What it has touched so far is not counted.
    pub fn add(&self, pid: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("Process {pid} cannot be put into a cgroup"))
    }

    /// The most memory that it has had so far, bytes.
    pub fn peak(&self) -> Result<u64> {
        let file = if self.mirror.is_some() { "memory.max_usage_in_bytes" } else { "memory.peak" };
        Ok(fs::read_to_string(self.path.join(file))?.trim().parse()?)
    }

    /// Processes that the kernel has killed because of the limit.
    pub fn oom_kills(&self) -> Result<u64> {
        let file = if self.mirror.is_some() { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.path.join(file))?;
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).context("no oom_kill")?;
        Ok(kills.parse()?)
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        self.mirror = None;
        // Processes that were killed take a moment to be gone.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
        eprintln!("The cgroup {} is left: it has processes", self.path.display());
    }
}

fn make(path: &Path) -> Result<()> {
    fs::create_dir(path)
        .with_context(|| format!("{} cannot be made, which this test needs: run it as root", path.display()))
}

/// A directory that is kept as version 2 would have it.
#[derive(Debug)]
struct Mirror {
    folder: TempDir,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mirror {
    fn new(source: &Path) -> Result<Self> {
        let folder = TempDir::with_prefix("cgroup-")?;
        write(source, folder.path())?;
        let ended = Arc::new(AtomicBool::new(false));
        let (source, target, end) = (source.to_owned(), folder.path().to_owned(), Arc::clone(&ended));
        let thread = thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                // What fails now may work the next time; a reader keeps the last state.
                let _ = write(&source, &target);
                thread::sleep(MIRROR_EVERY);
            }
        });
        Ok(Self { folder, ended, thread: Some(thread) })
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Says in `target`, in the words of version 2, what `source` says in those of version 1.
fn write(source: &Path, target: &Path) -> Result<()> {
    let stat = fs::read_to_string(source.join("memory.stat"))?;
    let file = |name: &str| fs::read_to_string(source.join(name));
    // At once, for readers that look in between.
    let put = |name: &str, text: &str| -> Result<()> {
        let new = target.join(format!(".{name}"));
        fs::write(&new, text)?;
        Ok(fs::rename(new, target.join(name))?)
    };
    let own: Vec<&str> = stat.lines().filter(|line| !line.starts_with("total_")).collect();
    put("memory.stat", &own.join("\n"))?;
    put("memory.max", &file("memory.limit_in_bytes")?)?;
    put("memory.current", &file("memory.usage_in_bytes")?)
}
