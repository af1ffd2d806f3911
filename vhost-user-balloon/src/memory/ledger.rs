//! The pages in the balloon, and which of them were given back to the host.
//!
//! Pages are noted by the file that they lie in and their place in it, not by guest address: front ends send the memory
//! map again and again, cut into regions in different ways, and come back after a broken connection, and the files stay
//! the same.
//!
//! A page that comes into the balloon is only noted. What can be given back is then done by [`Ledger::release`], block by
//! block of 2 MiB: blocks that are complete first, because that takes one call and leaves the huge page of a block
//! whole until all of it goes; the rest when it is asked for. The caller decides when, and must call it before it tells
//! the guest anything if the guest does not promise to ask for its pages before it uses them again
//! (`VIRTIO_BALLOON_F_MUST_TELL_HOST`).

mod blocks;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use self::blocks::{Block, FileLedger, unit_blocks};
use super::bits::{BLOCK, BLOCK_PAGES, Bits, PAGE};
use super::file::{Backing, MemoryFile};

/// A part of the guest's memory, and where it lies.
#[derive(Clone, Debug)]
pub struct Region {
    /// Where the guest sees it.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// The file.
    pub file: MemoryFile,
    /// Where it begins in the file.
    pub offset: u64,
}

/// What is given back to the host, and in which pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// Pages of the file's own size: 4 KiB, or its huge pages.
    Auto,
    /// At least this many bytes, a power of two: keeps the huge pages of a guest whole.
    AtLeast(u64),
    /// Nothing: some device has the guest's memory pinned.
    Nothing,
}

/// What became of a page number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// It came, or went.
    Changed,
    /// It was there already, or was not there.
    Unchanged,
    /// The guest has no such page.
    OutOfRange,
}

/// The host has no huge page for a page that the guest wants back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoHugePage;

/// Whether [`Ledger::release`] may take blocks of which only a part can be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Complete blocks only: more is about to come.
    Complete,
    /// All.
    All,
}

/// What was given back, from the beginning on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes for which the host was told that they are free.
    pub bytes: u64,
    /// Calls of fallocate(2).
    pub calls: u64,
    /// Time that they took.
    pub time: Duration,
    /// Those that failed.
    pub errors: u64,
}

/// The pages in the balloon.
#[derive(Debug)]
pub struct Ledger {
    granularity: Granularity,
    /// The guest asks for its pages before it uses them.
    told: bool,
    /// The driver that gave the pages is the one that uses the balloon now.
    confirmed: bool,
    regions: Vec<Region>,
    /// The region of the last page number.
    last_region: usize,
    files: Vec<FileLedger>,
    /// Blocks with something to give back, by file and number: those that are complete, and all others in the order in
    /// which they came. What is not so any more is skipped.
    complete: VecDeque<(usize, u64)>,
    queue: VecDeque<(usize, u64)>,
    ballooned: u64,
    released: u64,
    totals: Totals,
    /// Why giving back failed at last, until it is asked for.
    failure: Option<io::Error>,
}

impl Ledger {
    /// Nothing is known of the guest, and the balloon is empty.
    pub fn new(granularity: Granularity) -> Self {
        Self {
            granularity,
            told: false,
            confirmed: false,
            regions: Vec::new(),
            last_region: 0,
            files: Vec::new(),
            complete: VecDeque::new(),
            queue: VecDeque::new(),
            ballooned: 0,
            released: 0,
            totals: Totals::default(),
            failure: None,
        }
    }

    /// The guest's memory is `regions` from now on. What lies in other files is forgotten.
    pub fn set_regions(&mut self, mut regions: Vec<Region>) {
        regions.sort_by_key(|region| region.guest);
        self.last_region = 0;
        let mut files: Vec<FileLedger> = Vec::new();
        for region in &regions {
            if files.iter().any(|file| file.id == region.file.id()) {
                continue;
            }
            let known = self.files.iter().position(|file| file.id == region.file.id());
            let mut file =
                known.map_or_else(|| FileLedger::new(&region.file), |index| self.files.swap_remove(index));
            file.file = Some(region.file.clone());
            files.push(file);
        }
        self.files = files;
        self.regions = regions;
        self.choose_units();
    }

    /// Whether the guest asks for its pages before it uses them (`VIRTIO_BALLOON_F_MUST_TELL_HOST`). Without that no
    /// huge page of hugetlbfs is given back: the host may not have one when the guest touches it, and that would kill
    /// the virtual machine.
    pub fn set_told(&mut self, told: bool) {
        if self.told != told {
            self.told = told;
            self.choose_units();
        }
    }

    /// Lets go of the files: the front end has left. What is in the balloon is remembered in case it comes back, and left
    /// alone until [`Ledger::confirm`] or [`Ledger::clear`] says what became of it.
    pub fn detach(&mut self) {
        self.regions.clear();
        self.files.iter_mut().for_each(|file| file.file = None);
        self.confirmed = false;
        self.choose_units();
    }

    /// The driver that gave the pages goes on.
    pub fn confirm(&mut self) {
        if !self.confirmed {
            self.confirmed = true;
            self.choose_units();
        }
    }

    /// The driver that gave the pages does not run. Whether it is the one that comes next is not known, so that nothing
    /// is given back until [`Ledger::confirm`] or [`Ledger::clear`] says so.
    pub fn suspend(&mut self) {
        if self.confirmed {
            self.confirmed = false;
            self.choose_units();
        }
    }

    /// The driver has started from nothing, so that no page is in the balloon. Huge pages of hugetlbfs are taken from the
    /// host again; `Err` if there are not enough.
    pub fn clear(&mut self) -> Result<(), NoHugePage> {
        let mut result = Ok(());
        for file in &mut self.files {
            let blocks = std::mem::take(&mut file.blocks);
            if let (Backing::Huge(size), Some(fd)) = (file.backing, &file.file) {
                let units_of = |(number, block): (&u64, &Block)| {
                    let place = |page: usize| number * BLOCK + page as u64 * PAGE;
                    let units = |run: Range<usize>| place(run.start) / size..=(place(run.end) - 1) / size;
                    block.released.runs().flat_map(units).collect::<Vec<_>>()
                };
                let mut units: Vec<u64> = blocks.iter().flat_map(units_of).collect();
                units.sort_unstable();
                units.dedup();
                for unit in units {
                    // All are tried: somebody may be adding pages.
                    result = result.and(fd.populate(unit * size, size).map_err(|_| NoHugePage));
                }
            }
        }
        self.confirmed = true;
        self.choose_units();
        result
    }

    /// The guest gives page `pfn`, a guest address divided by 4096.
    pub fn inflate(&mut self, pfn: u64) -> Noted {
        let Some((index, page)) = self.locate(pfn) else { return Noted::OutOfRange };
        let (number, bit) = (page / BLOCK_PAGES as u64, (page % BLOCK_PAGES as u64) as usize);
        let file = &mut self.files[index];
        let block = file.blocks.entry(number).or_default();
        if !block.ballooned.insert(bit) {
            return Noted::Unchanged;
        }
        self.ballooned += 1;
        self.enqueue(index, number, bit);
        Noted::Changed
    }

    /// The guest takes page `pfn` back. Once this returns, the page is not given to the host any more, and the guest may
    /// be told. Fails if the host has no huge page for it: then it is to be tried again.
    pub fn deflate(&mut self, pfn: u64) -> Result<Noted, NoHugePage> {
        let Some((index, page)) = self.locate(pfn) else { return Ok(Noted::OutOfRange) };
        let (number, bit) = (page / BLOCK_PAGES as u64, (page % BLOCK_PAGES as u64) as usize);
        let file = &mut self.files[index];
        let known = |bits: fn(&Block) -> &Bits| {
            file.blocks.get(&number).is_some_and(|block| bits(block).contains(bit))
        };
        let (was_there, was_released) = (known(|block| &block.ballooned), known(|block| &block.released));
        if let (Backing::Huge(size), Some(fd)) = (file.backing, &file.file) {
            // Also for a page that is not known: a process before this one may have given it back.
            let kept = was_there && !was_released;
            if !kept && fd.populate(page * PAGE / size * size, size).is_err() {
                return Err(NoHugePage);
            }
        }
        if !was_there {
            return Ok(Noted::Unchanged);
        }
        // What was given back together comes back together: a huge page is there as a whole or not at all. With hugetlbfs it
        // is one of them that has just come back, however many went together.
        let unit = match file.backing {
            Backing::Huge(size) => size / PAGE,
            Backing::Ordinary(_) => file.unit.max(1),
        };
        let first = page / unit * unit;
        let siblings = first / BLOCK_PAGES as u64..=(first + unit - 1) / BLOCK_PAGES as u64;
        for sibling in siblings.filter(|_| was_released) {
            if let Some(block) = file.blocks.get_mut(&sibling) {
                let start = first.saturating_sub(sibling * BLOCK_PAGES as u64) as usize;
                let end = (first + unit - sibling * BLOCK_PAGES as u64).min(BLOCK_PAGES as u64) as usize;
                self.released -= block.released.remove_range(start..end) as u64;
            }
        }
        if let Some(block) = file.blocks.get_mut(&number) {
            block.ballooned.remove(bit);
            if block.is_unused() {
                file.blocks.remove(&number);
            }
        }
        self.ballooned -= 1;
        Ok(Noted::Changed)
    }

    /// Whether [`Ledger::release`] would find something.
    pub fn has_pending(&self, urgency: Urgency) -> bool {
        !self.complete.is_empty() || urgency == Urgency::All && !self.queue.is_empty()
    }

    /// Blocks that wait for being given back.
    pub fn pending_blocks(&self) -> usize {
        self.complete.len() + self.queue.len()
    }

    /// Gives pages of one block back to the host, and returns how many it were. `None` if there are no more.
    pub fn release(&mut self, urgency: Urgency) -> Option<u64> {
        loop {
            let (next, is_complete) = match (self.complete.pop_front(), urgency) {
                (Some(next), _) => (next, true),
                (None, Urgency::All) => (self.queue.pop_front()?, false),
                (None, Urgency::Complete) => return None,
            };
            let (index, number) = next;
            let Some(file) = self.files.get_mut(index) else { continue };
            if let Some(block) = file.blocks.get_mut(&number) {
                *if is_complete { &mut block.complete } else { &mut block.queued } = false;
                if block.is_unused() {
                    file.blocks.remove(&number);
                }
            }
            let released = self.release_block(index, number);
            if released > 0 {
                return Some(released);
            }
        }
    }

    /// Gives back what the guest reported as free: `len` bytes at guest address `address`. It may use them again as soon as
    /// it is told that the report was read. Returns how many bytes were given back.
    pub fn report(&mut self, address: u64, len: u64) -> u64 {
        let (mut address, end) = (address, address.saturating_add(len));
        let mut given_back = 0;
        while address < end {
            let Some(region) =
                self.regions.iter().find(|region| address.wrapping_sub(region.guest) < region.len)
            else {
                break;
            };
            let within = address - region.guest;
            let len = (end - address).min(region.len - within);
            address += len;
            // The guest takes a huge page back without asking, and if the host has none then, that kills it.
            let unit = match (self.granularity, region.file.backing()) {
                (Granularity::Nothing, _) | (_, Backing::Huge(_)) => continue,
                (Granularity::Auto, backing) => backing.page_size(),
                (Granularity::AtLeast(size), backing) => size.max(backing.page_size()),
            };
            let start = region.offset + within;
            let (first, last) = (start.next_multiple_of(unit), (start + len) / unit * unit);
            if first < last {
                let result = timed(&mut self.totals, last - first, || region.file.punch(first, last - first));
                match result {
                    Ok(()) => given_back += last - first,
                    Err(error) => self.failure = Some(error),
                }
            }
        }
        given_back
    }

    /// Bytes in the balloon.
    pub fn ballooned_bytes(&self) -> u64 {
        self.ballooned * PAGE
    }

    /// Bytes in the balloon that were given back.
    pub fn released_bytes(&self) -> u64 {
        self.released * PAGE
    }

    /// Bytes in the balloon that will be given back soon.
    pub fn pending_bytes(&self) -> u64 {
        let block = |(index, number): &(usize, u64)| {
            let file = self.files.get(*index)?;
            Some((file, file.blocks.get(number)?))
        };
        // One that is in both queues is counted once.
        let queued = self.queue.iter().filter_map(block).filter(|(_, block)| !block.complete);
        let pages = |(file, block): (&FileLedger, &Block)| {
            let unit = file.unit.clamp(1, BLOCK_PAGES as u64) as usize;
            block.ballooned.whole_units(unit).without(&block.released).len()
        };
        self.complete.iter().filter_map(block).chain(queued).map(pages).sum::<usize>() as u64 * PAGE
    }

    /// Bytes of the guest's memory.
    pub fn guest_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// Bytes of the host's memory that the guest's files hold: all of them, whoever touched them.
    pub fn resident_bytes(&self) -> u64 {
        self.files.iter().filter_map(|file| file.file.as_ref()).map(MemoryFile::resident_bytes).sum()
    }

    /// What was given back from the beginning on.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Why giving back failed at last, if it did since this was last called.
    pub fn take_failure(&mut self) -> Option<io::Error> {
        self.failure.take()
    }

    /// The file of page `pfn`, and its page there, if all of it is memory of the guest.
    fn locate(&mut self, pfn: u64) -> Option<(usize, u64)> {
        let address = pfn.checked_mul(PAGE)?;
        let holds = |region: &Region| {
            address.checked_sub(region.guest).is_some_and(|within| within + PAGE <= region.len)
        };
        if !self.regions.get(self.last_region).is_some_and(holds) {
            let after = self.regions.partition_point(|region| region.guest <= address);
            self.last_region = after.checked_sub(1)?;
        }
        let region = self.regions.get(self.last_region).filter(|region| holds(region))?;
        let offset = region.offset.checked_add(address - region.guest)?;
        if !offset.is_multiple_of(PAGE) {
            return None;
        }
        let index = self.files.iter().position(|file| file.id == region.file.id())?;
        Some((index, offset / PAGE))
    }

    /// Notes that page `bit` of a block has come, if something can be given back now because of it.
    fn enqueue(&mut self, index: usize, number: u64, bit: usize) {
        let file = &mut self.files[index];
        let unit = file.unit;
        if unit == 0 || !self.confirmed {
            return;
        }
        let Some(block) = file.blocks.get_mut(&number) else { return };
        if block.ballooned.is_full() {
            if unit > BLOCK_PAGES as u64 && !file.is_whole(number) {
                return;
            }
            if let Some(block) = file.blocks.get_mut(&number).filter(|block| !block.complete) {
                block.complete = true;
                self.complete.push_back((index, number));
            }
            return;
        }
        let unit = unit.min(BLOCK_PAGES as u64) as usize;
        let first = bit / unit * unit;
        if !block.queued && block.ballooned.contains_all(&(first..first + unit)) {
            block.queued = true;
            self.queue.push_back((index, number));
        }
    }

    fn release_block(&mut self, index: usize, number: u64) -> u64 {
        let Some(file) = self.files.get_mut(index) else { return 0 };
        let Some(fd) = file.file.clone() else { return 0 };
        if file.unit > BLOCK_PAGES as u64 {
            return self.release_large_unit(index, number, &fd);
        }
        let unit = file.unit as usize;
        let Some(block) = file.blocks.get_mut(&number) else { return 0 };
        if unit == 0 {
            return 0;
        }
        let known = block.released;
        let mut whole = block.ballooned.whole_units(unit);
        if !self.told {
            // The guest may have begun to use what was given back before, and not have said so yet.
            whole = whole.without(&known);
        }
        let mut released = 0;
        for run in whole.runs().filter(|run| !known.contains_all(run)) {
            // All of a run, also what was given back before: a hole costs nothing, and where the kernel has put a huge
            // page over a neighbour that came back, it goes.
            let (start, len) = (number * BLOCK + run.start as u64 * PAGE, run.len() as u64 * PAGE);
            match timed(&mut self.totals, len, || fd.punch(start, len)) {
                Ok(()) => {
                    let before = block.released.len();
                    block.released.insert_range(run);
                    released += (block.released.len() - before) as u64;
                }
                Err(error) => self.failure = Some(error),
            }
        }
        self.released += released;
        released * PAGE
    }

    /// Gives back a huge page of several blocks, if all of it is in the balloon.
    fn release_large_unit(&mut self, index: usize, number: u64, fd: &MemoryFile) -> u64 {
        let file = &mut self.files[index];
        let blocks = unit_blocks(file.unit, number);
        if !file.is_whole(number) || file.blocks[&number].released.is_full() {
            return 0;
        }
        let (start, len) = (blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK);
        match timed(&mut self.totals, len, || fd.punch(start, len)) {
            Ok(()) => {
                let mut released = 0;
                for number in blocks {
                    if let Some(block) = file.blocks.get_mut(&number) {
                        released += (BLOCK_PAGES - block.released.len()) as u64;
                        block.released = Bits::ALL;
                    }
                }
                self.released += released;
                released * PAGE
            }
            Err(error) => {
                self.failure = Some(error);
                0
            }
        }
    }

    /// Finds out in which pieces the files can be given back, and what of them can be given back now.
    fn choose_units(&mut self) {
        let (granularity, told) = (self.granularity, self.told);
        self.complete.clear();
        self.queue.clear();
        (self.ballooned, self.released) = (0, 0);
        for (index, file) in self.files.iter_mut().enumerate() {
            let own = file.backing.page_size();
            file.unit = match (granularity, file.backing) {
                (Granularity::Nothing, _) => 0,
                (_, Backing::Huge(_)) if !told => 0,
                // Page by page, for it may use what came with an earlier request before the rest of the piece has come.
                (_, Backing::Ordinary(_)) if !told => 1,
                (Granularity::Auto, _) => own / PAGE,
                (Granularity::AtLeast(size), _) => size.max(own) / PAGE,
            };
            let unit = file.unit.min(BLOCK_PAGES as u64) as usize;
            for (number, block) in &mut file.blocks {
                self.ballooned += block.ballooned.len() as u64;
                self.released += block.released.len() as u64;
                (block.complete, block.queued) = (false, false);
                if self.confirmed
                    && unit > 0
                    && !block.ballooned.whole_units(unit).without(&block.released).is_empty()
                {
                    block.queued = true;
                    self.queue.push_back((index, *number));
                }
            }
        }
    }
}

/// Does `act`, which gives `len` bytes back, and counts it.
fn timed(totals: &mut Totals, len: u64, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let start = Instant::now();
    let result = act();
    totals.time += start.elapsed();
    totals.calls += 1;
    match &result {
        Ok(()) => totals.bytes += len,
        Err(_) => totals.errors += 1,
    }
    result
}

#[cfg(test)]
mod tests;
