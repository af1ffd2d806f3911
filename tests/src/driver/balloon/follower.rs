//! A driver that lives by itself, as a guest's does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};

use super::driver::{Driver, LINUX_REQUEST, Role};
use super::memory::PAGE;

/// How often it looks at its target.
const LOOK_EVERY: Duration = Duration::from_micros(500);
/// The number of the statistic "free memory".
const FREE_MEMORY: u16 = 4;
/// The number of the statistic "total memory".
const TOTAL_MEMORY: u16 = 5;
/// The number of the statistic "available memory".
const AVAILABLE_MEMORY: u16 = 6;

/// A driver in a thread of its own, which does what it is asked for. Its statistics say that all memory that is not in the
/// balloon is free.
pub struct Follower {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Driver>>>,
}

impl Follower {
    /// Lets `driver` live, whose balloon is empty.
    pub fn new(driver: Driver) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        Self { ends, thread: Some(thread::spawn(move || follow(driver, &told))) }
    }

    /// Ends its life; what it has in the balloon stays there.
    pub fn end(mut self) -> Result<Driver> {
        self.ends.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("It has ended")?;
        thread.join().unwrap_or_else(|_| anyhow::bail!("A driver has panicked"))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

fn follow(mut driver: Driver, ends: &AtomicBool) -> Result<Driver> {
    let pfns = driver.pages.all();
    let total = driver.pages.memory().regions().iter().map(|region| region.len as u64).sum();
    let mut size = 0;
    let stats = |size: u32| {
        let free = total - u64::from(size) * PAGE;
        [(FREE_MEMORY, free), (TOTAL_MEMORY, total), (AVAILABLE_MEMORY, free)]
    };
    driver.give_stats(&stats(size));
    while !ends.load(Ordering::Relaxed) {
        let target = driver.config()?.num_pages.min(pfns.len() as u32);
        if target != size {
            let step = LINUX_REQUEST as u32;
            let next = target.clamp(size.saturating_sub(step), size + step);
            driver.follow(&pfns, size, next)?;
            size = next;
            continue;
        }
        if driver.is_done(Role::Stats) {
            driver.stats_wanted()?;
            driver.give_stats(&stats(size));
        }
        thread::sleep(LOOK_EVERY);
    }
    Ok(driver)
}
