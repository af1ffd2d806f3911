//! The 9P2000.L side, as far as the rows need it: message by message what Linux's client sends.

use anyhow::{Result, bail, ensure};

use super::client::{Bytes, Client, File, LISTING, Mode, Node, SMALL, Single, u16_at, u32_at, u64_at};
use super::lane::{DATA, HEADER, Lane, Shape};

const RLERROR: u8 = 7;
const TLOPEN: u8 = 12;
const TLCREATE: u8 = 14;
const TGETATTR: u8 = 24;
const TREADDIR: u8 = 40;
const TUNLINKAT: u8 = 76;
const TVERSION: u8 = 100;
const TATTACH: u8 = 104;
const TWALK: u8 = 110;
const TREAD: u8 = 116;
const TWRITE: u8 = 118;
const TCLUNK: u8 = 120;

/// What Linux clamps a larger one to.
const MSIZE: u32 = 512_000;
const NOTAG: u16 = !0;
const NOFID: u32 = !0;
const ROOT: u32 = 0;
/// The fid of what is forgotten again.
const SCRATCH: u32 = 1;
/// `P9_GETATTR_BASIC`.
const BASIC: u64 = 0x7ff;
/// size\[4\] type\[1\] tag\[2\].
const PREFIX: usize = 7;
/// `Rread` and `Rreaddir` before their data.
const RREAD: usize = 11;
/// `Rgetattr`: valid, qid, and the fields of the file.
const RGETATTR: usize = 160;
/// `Rlerror`, which any reply must have room for.
const RERROR: usize = 11;

const O_RDWR: u32 = 0o2;
const O_CREAT: u32 = 0o100;
const O_EXCL: u32 = 0o200;
const O_LARGEFILE: u32 = 0o100_000;
const O_DIRECTORY: u32 = 0o200_000;

/// A session.
pub struct NineP {
    lane: Lane,
    message: Bytes,
    next_fid: u32,
    listing: Vec<u8>,
}

impl NineP {
    /// Agrees on the version and attaches.
    pub fn new(lane: Lane) -> Result<Self> {
        let mut client =
            Self { lane, message: Bytes::default(), next_fid: SCRATCH + 1, listing: vec![0; LISTING] };
        client.begin(TVERSION).u32(MSIZE).u16(8).raw(b"9P2000.L");
        let reply = client.call_tagged(NOTAG, HEADER, 0)?;
        ensure!(u32_at(&reply, PREFIX) == MSIZE, "The server takes {} bytes", u32_at(&reply, PREFIX));
        client.begin(TATTACH).u32(ROOT).u32(NOFID).u16(4).raw(b"root").u16(0).u32(0);
        client.call(PREFIX + 13, 0)?;
        Ok(client)
    }

    fn begin(&mut self, kind: u8) -> &mut Bytes {
        self.message.start(PREFIX);
        self.message.0[4] = kind;
        &mut self.message
    }

    /// Fills in the size and the tag. `data` bytes follow behind the message.
    fn finish(&mut self, tag: u16, data: usize) {
        let size = (self.message.0.len() + data) as u32;
        self.message.0[..4].copy_from_slice(&size.to_le_bytes());
        self.message.0[5..7].copy_from_slice(&tag.to_le_bytes());
    }

    fn call_tagged(&mut self, tag: u16, reply: usize, received: usize) -> Result<[u8; 64]> {
        self.finish(tag, 0);
        let shape = Shape { reply: reply.max(RERROR), received, ..Shape::default() };
        self.lane.call(&self.message.0, shape)?;
        self.reply(0)
    }

    fn call(&mut self, reply: usize, received: usize) -> Result<[u8; 64]> {
        self.call_tagged(0, reply, received)
    }

    /// The start of the reply in a place, if it is no error.
    fn reply(&self, slot: usize) -> Result<[u8; 64]> {
        let mut reply = [0; 64];
        self.lane.read_reply(slot, &mut reply);
        if reply[4] == RLERROR {
            let error = std::io::Error::from_raw_os_error(u32_at(&reply, PREFIX).cast_signed());
            bail!("Message type {} failed: {error}", self.message.0[4]);
        }
        Ok(reply)
    }

    fn walk_to(&mut self, from: u32, to: u32, name: Option<&str>) -> Result<()> {
        let count = u16::from(name.is_some());
        self.begin(TWALK).u32(from).u32(to).u16(count);
        if let Some(name) = name {
            self.message.u16(name.len() as u16).raw(name.as_bytes());
        }
        let reply = self.call(PREFIX + 2 + 13 * usize::from(count), 0)?;
        ensure!(u16_at(&reply, PREFIX) == count, "Tried to walk to {name:?}");
        Ok(())
    }

    fn lopen(&mut self, fid: u32, flags: u32) -> Result<()> {
        self.begin(TLOPEN).u32(fid).u32(flags);
        self.call(PREFIX + 17, 0).map(drop)
    }

    fn clunk(&mut self, fid: u32) -> Result<()> {
        self.begin(TCLUNK).u32(fid);
        self.call(PREFIX, 0).map(drop)
    }

    fn shape(&mut self, slot: usize, what: Single) -> Shape {
        let shape = match what {
            Single::Getattr(node) => {
                self.begin(TGETATTR).u32(node as u32).u64(BASIC);
                Shape { reply: RGETATTR, ..Shape::default() }
            }
            Single::Read { file, offset, len } => {
                self.begin(TREAD).u32(file.node as u32).u64(offset).u32(len as u32);
                Shape { reply: RREAD, received: len, ..Shape::default() }
            }
            Single::Write { file, offset, len } => {
                self.begin(TWRITE).u32(file.node as u32).u64(offset).u32(len as u32);
                Shape { sent: len, reply: RERROR, ..Shape::default() }
            }
        };
        self.finish(slot as u16, shape.sent);
        Shape { request: self.message.0.len(), ..shape }
    }
}

impl Client for NineP {
    fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }

    fn root(&self) -> Node {
        ROOT.into()
    }

    fn look_up(&mut self, parent: Node, name: &str) -> Result<Node> {
        let fid = self.next_fid;
        self.next_fid += 1;
        self.walk_to(parent as u32, fid, Some(name))?;
        Ok(fid.into())
    }

    fn open(&mut self, node: Node, mode: Mode) -> Result<File> {
        let flags = match mode {
            Mode::Read => O_LARGEFILE,
            Mode::Both => O_RDWR | O_LARGEFILE,
        };
        self.lopen(node as u32, flags)?;
        Ok(File { node, handle: 0 })
    }

    fn push(&mut self, slot: usize, what: Single) {
        let shape = self.shape(slot, what);
        self.lane.write_request(slot, &self.message.0);
        self.lane.push(slot, shape);
    }

    fn check(&mut self, slot: usize, what: Single, len: usize) -> Result<()> {
        let reply = self.reply(slot)?;
        ensure!(usize::from(u16_at(&reply, 5)) == slot, "Tag {} was in place {slot}", u16_at(&reply, 5));
        let done = match what {
            Single::Getattr(_) => reply[4] == TGETATTR + 1 && len == RGETATTR,
            Single::Read { len: count, .. } => {
                u32_at(&reply, PREFIX) as usize == count && len == RREAD + count
            }
            Single::Write { len: count, .. } => u32_at(&reply, PREFIX) as usize == count && len == RERROR,
        };
        ensure!(done, "{what:?} was answered by {:?}, {len} bytes", &reply[..RREAD]);
        Ok(())
    }

    fn stat(&mut self, folder: Node, name: &str) -> Result<()> {
        self.walk_to(folder as u32, SCRATCH, Some(name))?;
        self.single(Single::Getattr(SCRATCH.into()))?;
        self.clunk(SCRATCH)
    }

    fn read_file(&mut self, folder: Node, name: &str) -> Result<()> {
        self.walk_to(folder as u32, SCRATCH, Some(name))?;
        self.lopen(SCRATCH, O_LARGEFILE)?;
        let file = File { node: SCRATCH.into(), handle: 0 };
        self.single(Single::Read { file, offset: 0, len: SMALL })?;
        self.clunk(SCRATCH)
    }

    fn make_file(&mut self, folder: Node, name: &str) -> Result<()> {
        self.walk_to(folder as u32, SCRATCH, None)?;
        self.begin(TLCREATE).u32(SCRATCH).u16(name.len() as u16).raw(name.as_bytes());
        self.message.u32(O_RDWR | O_CREAT | O_EXCL | O_LARGEFILE).u32(0o644).u32(0);
        self.call(PREFIX + 17, 0)?;
        let file = File { node: SCRATCH.into(), handle: 0 };
        self.single(Single::Write { file, offset: 0, len: SMALL })?;
        self.clunk(SCRATCH)?;
        self.begin(TUNLINKAT).u32(folder as u32).u16(name.len() as u16).raw(name.as_bytes()).u32(0);
        self.call(PREFIX, 0).map(drop)
    }

    fn list(&mut self, folder: Node) -> Result<usize> {
        self.walk_to(folder as u32, SCRATCH, None)?;
        self.lopen(SCRATCH, O_DIRECTORY | O_LARGEFILE)?;
        let (mut count, mut offset) = (0, 0);
        loop {
            self.begin(TREADDIR).u32(SCRATCH).u64(offset).u32(LISTING as u32);
            let reply = self.call(RREAD, LISTING)?;
            let len = u32_at(&reply, PREFIX) as usize;
            if len == 0 {
                break;
            }
            self.lane.read_data(0, &mut self.listing[..len]);
            // qid[13] offset[8] type[1] name[s]
            let mut at = 0;
            while at < len {
                offset = u64_at(&self.listing, at + 13);
                at += 24 + usize::from(u16_at(&self.listing, at + 22));
                count += 1;
            }
        }
        self.clunk(SCRATCH)?;
        Ok(count)
    }
}

const _: () = assert!(DATA + RREAD <= MSIZE as usize && LISTING <= DATA);
