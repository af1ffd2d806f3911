//! Huge pages for a test, which the kernel has to have.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};

use super::driver::{Driver, Options};
use super::fixture::BalloonFixture;
use super::memory::{BLOCK, Backing, Pages, Shape};
use crate::driver::memory::SharedMemory;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Huge pages that the memory of [`options`] takes.
pub const MEMORY: u64 = 16;

/// A driver's options for memory of huge pages.
pub fn options() -> Options {
    Options::default().shape(Shape::One(Backing::Huge))
}

/// A driver all of whose memory is in use.
pub fn driver_in_use(fixture: &BalloonFixture, options: &Options) -> Result<(Driver, Pages)> {
    let driver = fixture.driver(options)?;
    let pages = driver.pages.clone();
    pages.mark_all(pages.all(), 1);
    Ok((driver, pages))
}

/// Huge pages of 2 MiB that nobody else has. The pool gets its old size back when this is dropped.
pub struct HugePages {
    before: u64,
    _lock: Flock<File>,
}

impl HugePages {
    /// Makes exactly `count` pages available. Needs root, and as much free memory that is not in pieces.
    pub fn new(count: u64) -> Result<Self> {
        // One test at a time, whichever process it belongs to.
        let file = File::open(Path::new(POOL).join("nr_hugepages"))
            .context("This kernel has no huge pages of 2 MiB, which this test needs")?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        let before = number("nr_hugepages")?;
        let pages = Self { before, _lock: lock };
        resize(before - available()? + count)?;
        let found = available()?;
        ensure!(
            found == count,
            "There are {found} huge pages available after the kernel was asked for {count}; free some memory"
        );
        Ok(pages)
    }

    /// Takes `count` pages out of the pool, as another guest that starts would.
    pub fn take(&self, count: u64) -> Result<SharedMemory> {
        // A mapping reserves its pages, which nobody else gets then.
        Backing::Huge.file(count * BLOCK).with_context(|| format!("Cannot take {count} huge pages"))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = resize(self.before) {
            eprintln!("The pool of huge pages keeps another size than it had: {error:#}");
        }
    }
}

/// Pages that are neither in use nor promised to somebody.
pub fn available() -> Result<u64> {
    Ok(number("free_hugepages")? - number("resv_hugepages")?)
}

fn number(name: &str) -> Result<u64> {
    let text = fs::read_to_string(Path::new(POOL).join(name))?;
    text.trim().parse().with_context(|| format!("{name} is {text:?}"))
}

fn resize(count: u64) -> Result<()> {
    fs::write(Path::new(POOL).join("nr_hugepages"), count.to_string())
        .context("Cannot change the number of huge pages, which this test needs; run it as root")
}
