//! A guest's memory, and what the host holds of it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustix::fs::{MemfdFlags, SeekFrom, fstat, memfd_create, seek};
use rustix::io::Errno;

use crate::driver::memory::SharedMemory;
use crate::driver::raw::{GuestMemory, Region};

/// The unit in which a balloon counts, whatever the guest's pages are.
pub const PAGE: u64 = 4096;
/// A huge page of x86-64.
pub const BLOCK: u64 = 2 << 20;
/// Pages of a block.
pub const BLOCK_PAGES: u64 = BLOCK / PAGE;

/// The start of memory, where the rings and their buffers lie. It is never put into the balloon.
pub const RINGS: u64 = 8 << 20;
/// What is left of the default memory for the balloon.
pub const REST: u64 = 24 << 20;

/// What a guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A memfd of small pages, as QEMU's memory-backend-memfd makes it.
    Memfd,
    /// A memfd of huge pages, which have to be there.
    Huge,
    /// A file in a tmpfs, as User Mode Linux has it.
    Tmpfs,
}

impl Backing {
    /// Makes zeroed memory.
    pub fn file(self, len: u64) -> io::Result<SharedMemory> {
        let file = match self {
            Self::Memfd => {
                File::from(memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?)
            }
            Self::Huge => {
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
                File::from(memfd_create("guest", flags)?)
            }
            Self::Tmpfs => tempfile::tempfile_in("/dev/shm")?,
        };
        file.set_len(len)?;
        SharedMemory::of_file(file, len as usize)
    }
}

/// How a guest's memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One region from address 0.
    One(Backing),
    /// Two regions of one file with a gap between them, as a QEMU q35 has them with more than 2 GiB.
    Split(Backing),
    /// The second region starts in the middle of a huge page of the guest, and elsewhere in one of the file.
    Skewed(Backing),
    /// The second region is of a file of its own that lies around it on both sides, as User Mode Linux has it.
    Inside(Backing),
}

impl Shape {
    /// The guest address of the second region, if there are two: 4 GiB and sometimes more.
    pub const HIGH: u64 = 4 << 30;

    /// All shapes of small pages.
    pub const SMALL: [Self; 5] = [
        Self::One(Backing::Memfd),
        Self::One(Backing::Tmpfs),
        Self::Split(Backing::Memfd),
        Self::Skewed(Backing::Memfd),
        Self::Inside(Backing::Tmpfs),
    ];

    /// What the memory is made of.
    pub fn backing(self) -> Backing {
        let (Self::One(backing) | Self::Split(backing) | Self::Skewed(backing) | Self::Inside(backing)) =
            self;
        backing
    }

    /// Makes memory with [`RINGS`] bytes from address 0 on and [`REST`] more.
    pub fn memory(self) -> io::Result<GuestMemory> {
        self.memory_of(REST)
    }

    /// Makes memory with [`RINGS`] bytes from address 0 on and `rest` more.
    pub fn memory_of(self, rest: u64) -> io::Result<GuestMemory> {
        let part = |file: &Arc<SharedMemory>, start, offset, len| Region {
            start,
            file: Arc::clone(file),
            offset: offset as usize,
            len: len as usize,
        };
        let regions = match self {
            Self::One(backing) => vec![Region::new(0, backing.file(RINGS + rest)?)],
            Self::Split(backing) => {
                let file = Arc::new(backing.file(RINGS + rest)?);
                let low = RINGS + rest / 2 / BLOCK * BLOCK;
                vec![part(&file, 0, 0, low), part(&file, Self::HIGH, low, RINGS + rest - low)]
            }
            Self::Skewed(backing) => {
                let (before, skew) = (0x4f000, 0x13000);
                let file = Arc::new(backing.file(before + rest)?);
                let high = part(&file, Self::HIGH + skew, before, rest);
                vec![Region::new(0, backing.file(RINGS)?), high]
            }
            Self::Inside(backing) => {
                let file = Arc::new(backing.file(3 * BLOCK + rest)?);
                let high = part(&file, Self::HIGH + BLOCK, BLOCK, rest);
                vec![Region::new(0, backing.file(RINGS)?), high]
            }
        };
        Ok(GuestMemory::of_regions(regions))
    }
}

/// What a page holds, as far as [`Pages`] wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Only zeroes.
    Zero,
    /// What [`Pages::mark`] wrote with this number.
    Marked(u64),
    /// Anything else.
    Mixed,
}

/// A guest's memory by the numbers of its pages.
#[derive(Clone, Debug)]
pub struct Pages {
    memory: Arc<GuestMemory>,
}

impl Pages {
    /// Looks at `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory }
    }

    /// The memory itself.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The numbers of the pages that a balloon may take, in rising order.
    pub fn all(&self) -> Vec<u64> {
        let regions = self.memory.regions().iter().map(Region::range);
        regions.flat_map(|range| range.start.max(RINGS) / PAGE..range.end / PAGE).collect()
    }

    /// The first page of each whole block of the file behind the pages that a balloon may take.
    pub fn blocks(&self) -> Vec<u64> {
        let is_whole = |&pfn: &u64| {
            let (_, offset, left) = self.memory.find(pfn * PAGE);
            offset.is_multiple_of(BLOCK as usize) && left >= BLOCK as usize
        };
        self.all().into_iter().filter(is_whole).collect()
    }

    /// The pages of block `index` of [`Pages::blocks`].
    pub fn block(&self, index: usize) -> Range<u64> {
        let first = self.blocks()[index];
        first..first + BLOCK_PAGES
    }

    /// What the host holds of the memory, in bytes.
    pub fn resident(&self) -> io::Result<u64> {
        let mut seen = BTreeSet::new();
        let mut bytes = 0;
        for region in self.memory.regions() {
            let stat = fstat(region.file.as_fd())?;
            if seen.insert((stat.st_dev, stat.st_ino)) {
                bytes += stat.st_blocks as u64 * 512;
            }
        }
        Ok(bytes)
    }

    /// Whether the host holds a page. Not for huge pages, whose file system cannot tell.
    pub fn is_there(&self, pfn: u64) -> io::Result<bool> {
        let (file, offset, _) = self.memory.find(pfn * PAGE);
        match seek(file.as_fd(), SeekFrom::Data(offset as u64)) {
            Ok(at) => Ok(at == offset as u64),
            Err(Errno::NXIO) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Those of `pfns` that the host holds.
    pub fn there(&self, pfns: impl IntoIterator<Item = u64>) -> io::Result<Vec<u64>> {
        let mut there = Vec::new();
        for pfn in pfns {
            if self.is_there(pfn)? {
                there.push(pfn);
            }
        }
        Ok(there)
    }

    /// Checks that the host holds none of `pfns`.
    pub fn check_gone(&self, pfns: impl IntoIterator<Item = u64>) -> Result<()> {
        let there = self.there(pfns)?;
        ensure!(there.is_empty(), "The host still holds {}", describe(&there));
        Ok(())
    }

    /// Checks that the host holds all of `pfns`.
    pub fn check_there(&self, pfns: impl IntoIterator<Item = u64>) -> Result<()> {
        let pfns: Vec<u64> = pfns.into_iter().collect();
        let there: BTreeSet<u64> = self.there(pfns.iter().copied())?.into_iter().collect();
        let gone: Vec<u64> = pfns.into_iter().filter(|pfn| !there.contains(pfn)).collect();
        ensure!(gone.is_empty(), "The host has lost {}", describe(&gone));
        Ok(())
    }

    /// Fills a page with what tells its number and `mark`.
    pub fn mark(&self, pfn: u64, mark: u64) {
        let word = word(pfn, mark).to_le_bytes();
        let mut page = word.repeat(PAGE as usize / 8);
        page[8..16].copy_from_slice(&mark.to_le_bytes());
        self.memory.write(pfn * PAGE, &page);
    }

    /// Marks pages by `mark`.
    pub fn mark_all(&self, pfns: impl IntoIterator<Item = u64>, mark: u64) {
        pfns.into_iter().for_each(|pfn| self.mark(pfn, mark));
    }

    /// What a page holds. The host holds it afterwards, whatever it did before.
    pub fn content(&self, pfn: u64) -> Content {
        let page = self.memory.read_vec(pfn * PAGE, PAGE as usize);
        let (words, _) = page.as_chunks::<8>();
        if words.iter().all(|word| *word == [0; 8]) {
            return Content::Zero;
        }
        let mark = u64::from_le_bytes(words[1]);
        let expected = word(pfn, mark).to_le_bytes();
        let is_marked = words.iter().enumerate().all(|(index, word)| index == 1 || *word == expected);
        if is_marked { Content::Marked(mark) } else { Content::Mixed }
    }

    /// Checks that `pfns` hold what was marked by `mark`.
    pub fn check_marked(&self, pfns: impl IntoIterator<Item = u64>, mark: u64) -> Result<()> {
        let bad: Vec<u64> =
            pfns.into_iter().filter(|&pfn| self.content(pfn) != Content::Marked(mark)).collect();
        let first = bad.first().map(|&pfn| self.content(pfn));
        ensure!(bad.is_empty(), "{} do not hold mark {mark}, the first {first:?}", describe(&bad));
        Ok(())
    }

    /// The memory's only file.
    pub fn file(&self) -> Result<&SharedMemory> {
        let region = self.memory.regions().first().context("There is no memory")?;
        Ok(&region.file)
    }
}

/// A word of a marked page that no other page has.
fn word(pfn: u64, mark: u64) -> u64 {
    (pfn << 20).wrapping_add(mark).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

/// The numbers of some pages, for messages.
fn describe(pfns: &[u64]) -> String {
    let some: Vec<String> = pfns.iter().take(8).map(|pfn| format!("{pfn:#x}")).collect();
    format!("{} pages ({}{})", pfns.len(), some.join(" "), if pfns.len() > 8 { " ..." } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_where_they_are_said_to_be() {
        for shape in Shape::SMALL {
            let pages = Pages::new(Arc::new(shape.memory().unwrap()));
            let all = pages.all();
            assert_eq!(all.len() as u64, REST / PAGE, "{shape:?}");
            assert_eq!(pages.resident().unwrap(), 0);
            pages.mark(all[5], 7);
            assert_eq!(pages.resident().unwrap(), PAGE, "{shape:?}");
            assert_eq!(pages.there(all.iter().copied()).unwrap(), [all[5]]);
            assert_eq!(pages.content(all[5]), Content::Marked(7));
            assert_eq!(pages.content(all[6]), Content::Zero);
            assert_eq!(pages.there(all.iter().copied()).unwrap(), all[5..7]);
            assert!(pages.blocks().len() as u64 >= REST / BLOCK - 1, "{shape:?}");
        }
    }
}
