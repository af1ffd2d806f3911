//! The folder outside the source tree where unpacked packages are kept between runs.
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// Whoever holds a lock this long is stuck: every command under it has a shorter limit of its own.
const LOCK_LIMIT: Duration = Duration::from_secs(30 * 60);

/// The cache's folder.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache where the environment says.
    pub(super) fn open() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = variable("VHOST_USER_TEST_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("vhost-user-tests")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/vhost-user-tests")))
            .context("Nowhere to keep downloads: set VHOST_USER_TEST_CACHE to a folder")?;
        Self::at(&root)
    }

    fn at(root: &Path) -> Result<Self> {
        let make = || {
            // Others may read what is downloaded, but not plant programs that the tests would run.
            fs::DirBuilder::new().recursive(true).mode(0o755).create(root)?;
            fs::canonicalize(root)
        };
        let root = make().with_context(|| {
            format!("Cannot make the folder {} (VHOST_USER_TEST_CACHE names another one)", root.display())
        })?;
        Ok(Self { root })
    }

    /// Where things lie that are not keyed, such as apt's lists.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of `name`, which `build` fills when there is none for this `recipe` yet.
    ///
    /// `build` gets an empty folder that becomes visible only when it is complete, and the path that it will have
    /// then. Several processes may ask at once: one builds, the others wait.
    pub(super) fn entry(
        &self,
        name: &str,
        recipe: &impl Hash,
        build: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let mut hasher = DefaultHasher::new();
        recipe.hash(&mut hasher);
        // Contents may name their own path (a program's loader), so a cache that was moved is a different one.
        self.root.hash(&mut hasher);
        let entry = self.root.join(format!("{name}-{:016x}", hasher.finish()));
        if entry.is_dir() {
            return Ok(entry);
        }
        let _lock = self.lock(name)?;
        if entry.is_dir() {
            return Ok(entry);
        }
        let start = Instant::now();
        let scratch = tempfile::Builder::new()
            .prefix(&format!(".{name}-"))
            .tempdir_in(&self.root)
            .with_context(|| format!("Cannot make a folder in {}", self.root.display()))?;
        let content = scratch.path().join("content");
        fs::create_dir(&content).with_context(|| format!("Cannot make {}", content.display()))?;
        build(&content, &entry).with_context(|| format!("Cannot prepare {name}"))?;
        fs::rename(&content, &entry).with_context(|| format!("Cannot move {name} into the cache"))?;
        if start.elapsed() >= Duration::from_secs(1) {
            progress(&format!("{name} is ready after {} s", start.elapsed().as_secs()));
        }
        Ok(entry)
    }

    /// Keeps other processes from preparing `name` until the result is dropped.
    pub(super) fn lock(&self, name: &str) -> Result<File> {
        let path = self.root.join(format!(".{name}.lock"));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("Cannot open {}", path.display()))?;
        let deadline = Instant::now() + LOCK_LIMIT;
        let mut told = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(e) => return Err(e).with_context(|| format!("Cannot lock {}", path.display())),
            }
            if !told {
                progress(&format!("waiting for another process that prepares {name}"));
                told = true;
            }
            if Instant::now() >= deadline {
                bail!("Another process holds {} for too long; end it, or remove the file", path.display());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Tells the person at the terminal what takes time.
pub(crate) fn progress(text: &str) {
    // Not `eprintln!`: the test harness hides that until a test fails, and a first download takes a minute.
    let _ = writeln!(io::stderr(), "tests: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_built_once_per_recipe() {
        let folder = tempfile::TempDir::new().unwrap();
        let cache = Cache::at(&folder.path().join("cache")).unwrap();
        let build = |content: &Path, _: &Path| Ok(fs::write(content.join("file"), "1")?);
        let first = cache.entry("thing", &1, build).unwrap();
        assert_eq!(fs::read_to_string(first.join("file")).unwrap(), "1");
        assert_eq!(cache.entry("thing", &1, |_, _| bail!("built again")).unwrap(), first);
        assert_ne!(cache.entry("thing", &2, build).unwrap(), first);
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let folder = tempfile::TempDir::new().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let error = cache.entry("thing", &1, |_, _| bail!("no network")).unwrap_err();
        assert_eq!(format!("{error:#}"), "Cannot prepare thing: no network");
        cache.entry("thing", &1, |_, _| Ok(())).unwrap();
    }

    #[test]
    fn two_at_once_build_one_entry() {
        let folder = tempfile::TempDir::new().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let builds = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let count = |_: &Path, _: &Path| {
                        builds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(50));
                        Ok(())
                    };
                    cache.entry("thing", &1, count).unwrap();
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }
}
