//! What a subject is asked to do, whichever protocol it speaks.

use anyhow::{Result, ensure};

use super::lane::Lane;

/// A name for a file or folder in the protocol: a fid, or a node id.
pub type Node = u64;

/// A request that stands for itself, so that many of them can be outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Single {
    /// The attributes of a node.
    Getattr(Node),
    /// A read of an open file.
    Read { file: File, offset: u64, len: usize },
    /// A write to an open file.
    Write { file: File, offset: u64, len: usize },
}

/// An open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File {
    /// What was opened.
    pub node: Node,
    /// What the server calls the open file, where that is another name.
    pub handle: u64,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For reading.
    Read,
    /// For reading and writing.
    Both,
}

/// The bytes that small reads and writes move.
pub const SMALL: usize = 4096;
/// The most bytes of a listing that are asked for at once.
pub const LISTING: usize = 128 << 10;

/// A session of one protocol.
pub trait Client {
    /// The queue that it uses.
    fn lane(&mut self) -> &mut Lane;
    /// The shared folder.
    fn root(&self) -> Node;
    /// Finds a name for good.
    fn look_up(&mut self, parent: Node, name: &str) -> Result<Node>;
    /// Opens a node for good.
    fn open(&mut self, node: Node, mode: Mode) -> Result<File>;
    /// Writes a request to a place and queues it.
    fn push(&mut self, slot: usize, what: Single);
    /// Checks the reply to a request; `len` bytes were written.
    fn check(&mut self, slot: usize, what: Single, len: usize) -> Result<()>;
    /// Looks a name up, gets its attributes and forgets it: stat(2) on an uncached file.
    fn stat(&mut self, folder: Node, name: &str) -> Result<()>;
    /// open(2), a read of [`SMALL`] bytes, close(2).
    fn read_file(&mut self, folder: Node, name: &str) -> Result<()>;
    /// open(2) that creates, a write of [`SMALL`] bytes, close(2), unlink(2).
    fn make_file(&mut self, folder: Node, name: &str) -> Result<()>;
    /// Lists a folder to its end and returns how many entries there were, `.` and `..` included.
    fn list(&mut self, folder: Node) -> Result<usize>;

    /// One request by itself.
    fn single(&mut self, what: Single) -> Result<()> {
        self.push(0, what);
        self.lane().publish()?;
        let (slot, len) = self.lane().wait()?;
        ensure!(slot == 0, "Place {slot} was answered");
        self.check(slot, what, len)
    }

    /// A path from the shared folder.
    fn walk(&mut self, path: &str) -> Result<Node> {
        let mut node = self.root();
        for name in path.split('/').filter(|name| !name.is_empty()) {
            node = self.look_up(node, name)?;
        }
        Ok(node)
    }
}

/// Little-endian fields, one after the other.
#[derive(Default)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    /// Starts anew with a header's room of `len` bytes.
    pub fn start(&mut self, len: usize) -> &mut Self {
        self.0.clear();
        self.0.resize(len, 0);
        self
    }

    /// Appends raw bytes.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends a number of two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends a number of four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends a number of eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }
}

/// The number of two bytes at `at`.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The number of four bytes at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

/// The number of eight bytes at `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
