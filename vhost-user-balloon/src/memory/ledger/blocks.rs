//! A file with memory of the guest, and the blocks of it that have pages in the balloon.

use std::collections::HashMap;
use std::ops::Range;

use super::super::bits::{BLOCK_PAGES, Bits};
use super::super::file::{Backing, FileId, MemoryFile};

/// The pages of a block that are in the balloon.
#[derive(Clone, Debug, Default)]
pub(super) struct Block {
    /// Those that the guest gave.
    pub ballooned: Bits,
    /// Those of them that the host has.
    pub released: Bits,
    /// It is in the queue of those that are complete.
    pub complete: bool,
    /// It is in the queue of the others.
    pub queued: bool,
}

impl Block {
    /// Whether there is nothing to remember of it.
    pub fn is_unused(&self) -> bool {
        self.ballooned.is_empty() && !self.complete && !self.queued
    }
}

/// A file and the blocks of it that have pages in the balloon.
#[derive(Debug)]
pub(super) struct FileLedger {
    /// Which file it is.
    pub id: FileId,
    /// The file, as long as a front end shares it.
    pub file: Option<MemoryFile>,
    /// What its pages are.
    pub backing: Backing,
    /// Pages that can only be given back together: a power of two. 0: none can.
    pub unit: u64,
    /// The blocks, by their place in the file.
    pub blocks: HashMap<u64, Block, foldhash::fast::RandomState>,
}

/// The blocks of the unit of `unit` pages, more than one block, that block `number` belongs to.
pub(super) fn unit_blocks(unit: u64, number: u64) -> Range<u64> {
    let blocks = unit / BLOCK_PAGES as u64;
    let first = number / blocks * blocks;
    first..first + blocks
}

impl FileLedger {
    /// Nothing of `file` is in the balloon.
    pub fn new(file: &MemoryFile) -> Self {
        Self { id: file.id(), file: None, backing: file.backing(), unit: 0, blocks: HashMap::default() }
    }

    /// Whether all blocks of the unit of block `number`, which is larger than a block, are in the balloon.
    pub fn is_whole(&self, number: u64) -> bool {
        unit_blocks(self.unit, number)
            .all(|number| self.blocks.get(&number).is_some_and(|block| block.ballooned.is_full()))
    }
}
