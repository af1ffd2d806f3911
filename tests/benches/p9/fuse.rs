//! The FUSE side (virtiofs), as far as the rows need it: Linux's `include/uapi/linux/fuse.h`.
//!
//! As in Linux, nobody waits for the answers to RELEASE and FORGET (which has none). They go to the request queue here, so
//! that one queue carries all the work. FLUSH, which Linux sends at every close(2) and waits for, is left out.

use anyhow::{Result, bail, ensure};

use super::client::{Bytes, Client, File, LISTING, Mode, Node, SMALL, Single, u32_at, u64_at};
use super::lane::{HEADER, Lane, Shape};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const UNLINK: u32 = 10;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const CREATE: u32 = 35;

const MAJOR: u32 = 7;
const MINOR: u32 = 38;
/// ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, DONT_MASK, PARALLEL_DIROPS, MAX_PAGES.
const CAPABILITIES: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 18 | 1 << 22;
const ROOT: Node = 1;
/// `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// `struct fuse_entry_out`, `fuse_attr_out`, `fuse_open_out` and `fuse_write_out`.
const ENTRY: usize = 128;
const ATTR: usize = 104;
const OPENED: usize = 16;
const WRITTEN: usize = 8;

const O_RDWR: u32 = 0o2;
const O_CREAT: u32 = 0o100;
const O_EXCL: u32 = 0o200;
const O_LARGEFILE: u32 = 0o100_000;
const O_DIRECTORY: u32 = 0o200_000;

/// A session.
pub struct Fuse {
    lane: Lane,
    message: Bytes,
    listing: Vec<u8>,
}

impl Fuse {
    /// Agrees on the version.
    pub fn new(lane: Lane) -> Result<Self> {
        let mut client = Self { lane, message: Bytes::default(), listing: vec![0; LISTING] };
        client.begin(INIT, 0).u32(MAJOR).u32(MINOR).u32(128 << 10).u32(CAPABILITIES).raw(&[0; 48]);
        let reply = client.call(HEADER, 0)?;
        ensure!(u32_at(&reply, OUT_HEADER) == MAJOR, "The server speaks {}", u32_at(&reply, OUT_HEADER));
        Ok(client)
    }

    fn begin(&mut self, opcode: u32, node: Node) -> &mut Bytes {
        self.message.start(IN_HEADER);
        self.message.0[4..8].copy_from_slice(&opcode.to_le_bytes());
        self.message.0[16..24].copy_from_slice(&node.to_le_bytes());
        &mut self.message
    }

    fn finish(&mut self, unique: u64, data: usize) {
        let size = (self.message.0.len() + data) as u32;
        self.message.0[..4].copy_from_slice(&size.to_le_bytes());
        self.message.0[8..16].copy_from_slice(&unique.to_le_bytes());
    }

    fn call(&mut self, reply: usize, received: usize) -> Result<[u8; OUT_HEADER + ENTRY + OPENED]> {
        self.finish(0, 0);
        self.lane.call(&self.message.0, Shape { reply, received, ..Shape::default() })?;
        self.reply(0)
    }

    fn reply(&self, slot: usize) -> Result<[u8; OUT_HEADER + ENTRY + OPENED]> {
        let mut reply = [0; OUT_HEADER + ENTRY + OPENED];
        self.lane.read_reply(slot, &mut reply);
        match u32_at(&reply, 4).cast_signed() {
            0 => Ok(reply),
            error => {
                let error = std::io::Error::from_raw_os_error(-error);
                bail!("Operation {} failed: {error}", u32_at(&self.message.0, 4))
            }
        }
    }

    fn post(&mut self, reply: usize) -> Result<()> {
        self.finish(0, 0);
        self.lane.post(&self.message.0, reply)
    }

    fn forget(&mut self, node: Node) -> Result<()> {
        self.begin(FORGET, node).u64(1);
        self.post(0)
    }

    fn release(&mut self, opcode: u32, file: File) -> Result<()> {
        self.begin(opcode, file.node).u64(file.handle).u32(O_LARGEFILE).u32(0).u64(0);
        self.post(OUT_HEADER)
    }

    fn open_as(&mut self, opcode: u32, node: Node, flags: u32) -> Result<File> {
        self.begin(opcode, node).u32(flags).u32(0);
        let reply = self.call(OUT_HEADER + OPENED, 0)?;
        Ok(File { node, handle: u64_at(&reply, OUT_HEADER) })
    }

    fn transfer(&mut self, opcode: u32, file: File, offset: u64, len: usize) {
        self.begin(opcode, file.node).u64(file.handle).u64(offset).u32(len as u32);
        self.message.u32(0).u64(0).u32(O_LARGEFILE).u32(0);
    }

    fn shape(&mut self, slot: usize, what: Single) -> Shape {
        let shape = match what {
            Single::Getattr(node) => {
                self.begin(GETATTR, node).u32(0).u32(0).u64(0);
                Shape { reply: OUT_HEADER + ATTR, ..Shape::default() }
            }
            Single::Read { file, offset, len } => {
                self.transfer(READ, file, offset, len);
                Shape { reply: OUT_HEADER, received: len, ..Shape::default() }
            }
            Single::Write { file, offset, len } => {
                self.transfer(WRITE, file, offset, len);
                Shape { sent: len, reply: OUT_HEADER + WRITTEN, ..Shape::default() }
            }
        };
        self.finish(slot as u64, shape.sent);
        Shape { request: self.message.0.len(), ..shape }
    }
}

impl Client for Fuse {
    fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }

    fn root(&self) -> Node {
        ROOT
    }

    fn look_up(&mut self, parent: Node, name: &str) -> Result<Node> {
        self.begin(LOOKUP, parent).raw(name.as_bytes()).raw(&[0]);
        let reply = self.call(OUT_HEADER + ENTRY, 0)?;
        Ok(u64_at(&reply, OUT_HEADER))
    }

    fn open(&mut self, node: Node, mode: Mode) -> Result<File> {
        match mode {
            Mode::Read => self.open_as(OPEN, node, O_LARGEFILE),
            Mode::Both => self.open_as(OPEN, node, O_RDWR | O_LARGEFILE),
        }
    }

    fn push(&mut self, slot: usize, what: Single) {
        let shape = self.shape(slot, what);
        self.lane.write_request(slot, &self.message.0);
        self.lane.push(slot, shape);
    }

    fn check(&mut self, slot: usize, what: Single, len: usize) -> Result<()> {
        let reply = self.reply(slot)?;
        ensure!(u64_at(&reply, 8) == slot as u64, "Request {} was in place {slot}", u64_at(&reply, 8));
        let expected = match what {
            Single::Getattr(_) => OUT_HEADER + ATTR,
            Single::Read { len, .. } => OUT_HEADER + len,
            Single::Write { .. } => OUT_HEADER + WRITTEN,
        };
        ensure!(
            u32_at(&reply, 0) as usize == expected && len == expected,
            "{what:?} was answered by {len} bytes that claim to be {}",
            u32_at(&reply, 0)
        );
        if let Single::Write { len, .. } = what {
            ensure!(u32_at(&reply, OUT_HEADER) as usize == len, "A short write");
        }
        Ok(())
    }

    fn stat(&mut self, folder: Node, name: &str) -> Result<()> {
        let node = self.look_up(folder, name)?;
        self.forget(node)
    }

    fn read_file(&mut self, folder: Node, name: &str) -> Result<()> {
        let node = self.look_up(folder, name)?;
        let file = self.open_as(OPEN, node, O_LARGEFILE)?;
        self.transfer(READ, file, 0, SMALL);
        let reply = self.call(OUT_HEADER, SMALL)?;
        ensure!(u32_at(&reply, 0) as usize == OUT_HEADER + SMALL, "A short read");
        self.release(RELEASE, file)?;
        self.forget(node)
    }

    fn make_file(&mut self, folder: Node, name: &str) -> Result<()> {
        self.begin(CREATE, folder).u32(O_RDWR | O_CREAT | O_EXCL | O_LARGEFILE).u32(0o644).u32(0).u32(0);
        self.message.raw(name.as_bytes()).raw(&[0]);
        let reply = self.call(OUT_HEADER + ENTRY + OPENED, 0)?;
        let file = File { node: u64_at(&reply, OUT_HEADER), handle: u64_at(&reply, OUT_HEADER + ENTRY) };
        self.transfer(WRITE, file, 0, SMALL);
        self.finish(0, SMALL);
        let shape = Shape { sent: SMALL, reply: OUT_HEADER + WRITTEN, ..Shape::default() };
        self.lane.call(&self.message.0, shape)?;
        self.reply(0)?;
        self.release(RELEASE, file)?;
        self.begin(UNLINK, folder).raw(name.as_bytes()).raw(&[0]);
        self.call(OUT_HEADER, 0)?;
        self.forget(file.node)
    }

    fn list(&mut self, folder: Node) -> Result<usize> {
        let file = self.open_as(OPENDIR, folder, O_DIRECTORY | O_LARGEFILE)?;
        let (mut count, mut offset) = (0, 0);
        loop {
            self.transfer(READDIR, file, offset, LISTING);
            let reply = self.call(OUT_HEADER, LISTING)?;
            let len = u32_at(&reply, 0) as usize - OUT_HEADER;
            if len == 0 {
                break;
            }
            self.lane.read_data(0, &mut self.listing[..len]);
            // ino u64, off u64, namelen u32, type u32, name, padding to 8
            let mut at = 0;
            while at < len {
                offset = u64_at(&self.listing, at + 8);
                at += 24 + (u32_at(&self.listing, at + 16) as usize).next_multiple_of(8);
                count += 1;
            }
        }
        self.release(RELEASEDIR, file)?;
        Ok(count)
    }
}
