//! A request on its way: a chain, the message in it, and its reply.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;
use vhost_user_daemon::Chain;
use vhost_user_daemon::dirty::DirtyLog;

use crate::pool::Job;
use crate::protocol::request::Header;
use crate::protocol::{
    ERROR_SIZE, HEADER_SIZE, MAX_WALK, NO_TAG, Qid, Reply, Request, WRITE_HEADER_SIZE, kind,
};
use crate::server::{Buffers, Call, Fid, Outcome, Session};

/// Bytes of the longest message, apart from the data of a Twrite. No name has more than 255 bytes and no link's target
/// more than 4095, so that nothing that makes sense is longer.
const MAX_MESSAGE: usize = 128 << 10;

/// Memory that a task keeps for the next message, in bytes.
const KEEP: usize = 8 << 10;

/// A chain with the request in it.
#[derive(Debug, Default)]
pub struct Task {
    /// Names the task among those of its worker.
    pub ticket: u64,
    /// The queue that the chain is from.
    pub queue: usize,
    /// The chain. Of a Twrite, its data is left to be read.
    pub chain: Chain,
    /// The message without the data of a Twrite.
    message: Vec<u8>,
    /// Bytes of the message with it.
    len: usize,
    /// What the reply is made in.
    pub reply: Reply,
    /// The fids that the request names.
    pub call: Call,
    /// Names the request to the client.
    pub tag: u16,
}

/// Why a chain gets no reply: there is no room for one, or nothing that it could answer.
#[derive(Debug)]
pub struct NoReply;

impl Task {
    /// Takes the message out of the chain.
    pub fn read_message(&mut self) -> Result<(), NoReply> {
        self.len = self.chain.readable_len() as usize;
        self.message.clear();
        self.tag = NO_TAG;
        if self.len < HEADER_SIZE || self.chain.writable_len() < ERROR_SIZE as u64 {
            return Err(NoReply);
        }
        self.take(WRITE_HEADER_SIZE.min(self.len))?;
        let header = Header::decode(&self.message).ok_or(NoReply)?;
        self.tag = header.tag;
        if header.kind != kind::TWRITE {
            // What is longer is no message that makes sense: it is cut, and fails to decode.
            let end = self.len.min(header.size as usize).min(MAX_MESSAGE);
            self.take(end.saturating_sub(self.message.len()))?;
            if end == MAX_MESSAGE {
                self.len = end;
            }
        }
        Ok(())
    }

    fn take(&mut self, count: usize) -> Result<(), NoReply> {
        let start = self.message.len();
        self.message.resize(start + count, 0);
        self.chain.read(&mut self.message[start..]).map_err(|_| NoReply)
    }

    /// Bytes of the message, as its header says.
    pub fn message_len(&self) -> usize {
        Header::decode(&self.message).map_or(0, |header| header.size as usize)
    }

    /// What the message asks for.
    pub fn request(&self) -> Result<Request<'_>, crate::protocol::DecodeError> {
        Request::decode(&self.message, self.len)
    }

    /// Executes the request here, to the end or as far as `may_wait` allows, with the message borrowed apart.
    pub fn execute(&mut self, session: &Session, may_wait: bool) -> Outcome {
        let Self { message, len, chain, call, reply, .. } = self;
        match Request::decode(message, *len) {
            Ok(request) => session.execute(&request, call, &ChainBuffers(chain), may_wait, reply),
            // It was decoded before.
            Err(error) => {
                session.fail(crate::server::session::decode_errno(error), reply);
                Outcome::Replied
            }
        }
    }

    /// Whether the request is a read that can be done to memory of our own, where the file system says if it would wait.
    fn is_cancellable(&self) -> bool {
        matches!(self.request(), Ok(Request::Read { .. }))
            && self.call.fid.as_ref().is_some_and(|fid| {
                fid.node.pace().knows_nowait() && fid.file().is_ok_and(|file| !file.is_direct())
            })
    }

    /// Writes the reply to the chain, and returns its length: 0 if there is none.
    pub fn write_reply(&mut self, log: &DirtyLog) -> u32 {
        if self.reply.is_empty() {
            return 0;
        }
        if self.reply.len() as u64 > self.chain.writable_len() {
            // Checked before anything was done, where the length is known.
            self.reply.error(Errno::MSGSIZE.raw_os_error().unsigned_abs());
        }
        self.reply.finish(self.tag);
        if self.chain.write(self.reply.bytes()) < self.reply.bytes().len() {
            return 0;
        }
        let len = self.reply.len();
        self.chain.log_written(len as u64, log);
        len as u32
    }

    /// Forgets the request, to be used for another one.
    pub fn clear(&mut self) {
        self.chain.clear();
        self.call = Call::default();
        self.reply.shrink(KEEP);
        self.message.clear();
        self.message.shrink_to(KEEP);
    }
}

/// Bytes of the reply to a request, as far as they are known before: what there has to be room for.
pub fn reply_size(request: &Request<'_>) -> usize {
    HEADER_SIZE
        + match request {
            Request::Version { .. } => 4 + 2 + 8,
            Request::Attach { .. }
            | Request::Symlink { .. }
            | Request::Mknod { .. }
            | Request::Mkdir { .. } => Qid::SIZE,
            Request::Walk { names, .. } => 2 + names.len().min(MAX_WALK) * Qid::SIZE,
            Request::Lopen { .. } | Request::Lcreate { .. } => Qid::SIZE + 4,
            Request::Statfs { .. } => 60,
            Request::Getattr { .. } => 153,
            Request::Xattrwalk { .. } => 8,
            Request::Getlock { range, .. } => 1 + 8 + 8 + 4 + 2 + range.client_id.len(),
            _ => 4,
        }
}

/// The buffers of a chain.
struct ChainBuffers<'a>(&'a Chain);

impl Buffers for ChainBuffers<'_> {
    fn space(&self) -> usize {
        self.0.writable_len() as usize
    }

    fn read_file(
        &self,
        file: BorrowedFd<'_>,
        from: u64,
        offset: usize,
        len: usize,
        flags: i32,
    ) -> Result<usize, Errno> {
        self.0.read_file(file, from, offset, len, flags).map_err(|error| errno(&error))
    }

    fn write_file(&self, file: BorrowedFd<'_>, to: u64, len: usize) -> Result<usize, Errno> {
        self.0.write_file(file, to, len, 0).map_err(|error| errno(&error))
    }

    fn copy_data(&self, to: &mut [u8]) -> usize {
        self.0.source().read(to)
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// What is done in another thread.
#[derive(Debug)]
pub enum Work {
    /// A whole request.
    Request(Box<Task>, Arc<Session>),
    /// A read of what is not cached, to memory of our own: if the client gives the request up meanwhile, the buffers in
    /// its chain may be in other use already.
    Read {
        /// The task that keeps the chain.
        ticket: u64,
        /// The file.
        fid: Arc<Fid>,
        /// Where to read.
        offset: u64,
        /// Most bytes to read.
        len: usize,
    },
}

/// What comes back from another thread.
#[derive(Debug)]
pub enum Done {
    /// The request was executed, as far as it can be.
    Request(Box<Task>, Outcome),
    /// This was read.
    Read {
        /// The task that keeps the chain.
        ticket: u64,
        /// The data.
        data: Result<Vec<u8>, Errno>,
    },
    /// A lock that was waited for is taken, or can't be had.
    Lock {
        /// The task that keeps the chain.
        ticket: u64,
        /// `EINTR`: it was given up.
        result: Result<(), Errno>,
    },
}

impl Job for Work {
    type Done = Done;

    fn run(self) -> Done {
        match self {
            Self::Request(mut task, session) => {
                // A read tries what is cached first: it goes to the client's buffers at once, which is not for one that may
                // be given up before it is done.
                let may_wait = !task.is_cancellable();
                let pace = task.call.fid.as_ref().map(|fid| Arc::clone(fid.node.pace()));
                let mark = pace.as_ref().map(|pace| pace.begin());
                let outcome = task.execute(&session, may_wait);
                if let (Some(pace), Some(mark)) = (pace, mark) {
                    pace.end(mark);
                }
                if matches!(outcome, Outcome::WouldWait) {
                    return Done::Request(task, outcome);
                }
                // Whoever uses a file last closes it, which may take as long as the request.
                task.call = Call::default();
                Done::Request(task, outcome)
            }
            Self::Read { ticket, fid, offset, len } => {
                let mut data = vec![0; len];
                let data = fid.file().and_then(|file| {
                    let count = rustix::io::pread(file.file(), &mut data, offset)?;
                    data.truncate(count);
                    Ok(data)
                });
                Done::Read { ticket, data }
            }
        }
    }
}
