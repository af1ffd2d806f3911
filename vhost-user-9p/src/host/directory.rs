//! Reading directories.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use super::node::Node;

/// Bytes of entries that are fetched from the host at a time: a few hundred.
const BUFFER: usize = 16 << 10;

/// A directory that is open.
///
/// Entries come from the host in batches, and what a client has not asked for yet is kept: the next Treaddir begins
/// where the last one ended. Offsets are those of the host, so that they stay what they are when the directory changes.
#[derive(Debug)]
pub struct OpenDirectory {
    file: OwnedFd,
    dev: u64,
    entries: Vec<Entry>,
    names: Vec<u8>,
    /// The first of `entries` that was not given to the client yet.
    next: usize,
    /// The offset of that entry: where the client is expected to go on.
    position: u64,
}

/// An entry as the host has it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    ino: u64,
    /// Where the entry after this one is found.
    offset: u64,
    kind: u8,
    name_start: u32,
    name_len: u16,
}

/// An entry of a directory.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryEntry<'a> {
    /// Number of the file system.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Where the entry after this one is found.
    pub offset: u64,
    /// The type, as in readdir(3); 0 is unknown.
    pub kind: u8,
    /// The name; `.` and `..` are entries as well.
    pub name: &'a [u8],
}

impl OpenDirectory {
    fn new(file: OwnedFd, dev: u64) -> Self {
        Self { file, dev, entries: Vec::new(), names: Vec::new(), next: 0, position: 0 }
    }

    /// The directory, open for reading.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Gives the entries from `offset` on to `take`, until it returns `false` for one, which then is not taken, or until
    /// the end.
    pub fn read(
        &mut self,
        offset: u64,
        mut take: impl FnMut(&DirectoryEntry<'_>) -> bool,
    ) -> Result<(), Errno> {
        if offset != self.position || offset == 0 {
            self.forget();
            seek(&self.file, SeekFrom::Start(offset))?;
            self.position = offset;
        }
        loop {
            while let Some(entry) = self.entries.get(self.next) {
                let start = entry.name_start as usize;
                let given = DirectoryEntry {
                    dev: self.dev,
                    ino: entry.ino,
                    offset: entry.offset,
                    kind: entry.kind,
                    name: &self.names[start..start + usize::from(entry.name_len)],
                };
                if !take(&given) {
                    return Ok(());
                }
                self.position = entry.offset;
                self.next += 1;
            }
            if !self.fill()? {
                return Ok(());
            }
        }
    }

    fn forget(&mut self) {
        self.entries.clear();
        self.names.clear();
        self.next = 0;
    }

    /// Fetches more entries; `false` at the end.
    fn fill(&mut self) -> Result<bool, Errno> {
        self.forget();
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut raw = RawDir::new(self.file.as_fd(), &mut buffer);
        while let Some(entry) = raw.next() {
            let entry = match entry {
                // It was removed, and has no entries any more.
                Err(Errno::NOENT) => break,
                entry => entry?,
            };
            let name = entry.file_name().to_bytes();
            self.entries.push(Entry {
                ino: entry.ino(),
                offset: entry.next_entry_cookie(),
                kind: file_type(entry.file_type()),
                name_start: self.names.len() as u32,
                name_len: name.len() as u16,
            });
            self.names.extend_from_slice(name);
            if raw.is_buffer_empty() {
                break;
            }
        }
        Ok(!self.entries.is_empty())
    }
}

/// The type of an entry as readdir(3) has it.
fn file_type(kind: rustix::fs::FileType) -> u8 {
    use rustix::fs::FileType;
    match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    }
}

impl Node {
    /// Opens a directory for reading its entries.
    pub fn open_directory(self: &Arc<Self>) -> Result<OpenDirectory, Errno> {
        if !self.is_dir() {
            return Err(Errno::NOTDIR);
        }
        Ok(OpenDirectory::new(self.open(OFlags::RDONLY | OFlags::DIRECTORY)?, self.dev()))
    }
}
