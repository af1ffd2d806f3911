//! The 9P server: sessions, fids, and what the messages do to files. It knows nothing of virtio.
//!
//! | module | holds |
//! |---|---|
//! | [`session`] | what lasts from one Tversion to the next, and which request is answered by what |
//! | [`fid`] | the client's handles for files |
//! | [`place`] | which thread a request is executed by |
//! | [`journal`], [`saved`], `recover` | the state file, by which a session outlives the process |
//! | `walk`, `file`, `entry`, `attributes`, `directory`, `xattr`, `lock` | the requests, by what they are about |
//!
//! # A request's way
//! [`Session::prepare`] looks up the fids that a request names, in the order in which requests arrive. From then on it
//! holds what they stood for at that moment, and [`Session::execute`] may run in any thread: a Tclunk that arrives
//! behind it does not take the file away, it only ends the name. That is all the order there is between requests of one
//! client: one that depends on another is sent after that one's reply.
//!
//! A fid never changes. What changes its meaning (Tlopen, Tlcreate, Txattrcreate) puts a new one in its place, if the old
//! one still is there.

pub mod fid;
pub mod journal;
pub mod place;
pub mod saved;
pub mod session;

mod attributes;
mod directory;
mod entry;
mod file;
mod lock;
mod recover;
mod walk;
mod xattr;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::ValueEnum;
use rustix::io::Errno;

pub use self::fid::{Fid, Role};
pub use self::journal::Journal;
pub use self::lock::reply_lock;
pub use self::place::Place;
pub use self::session::{Call, Outcome, Session};

use crate::host::Share;

/// The smallest message size that a client may ask for.
pub const MIN_MSIZE: u32 = 4096;

/// Whose locks the guest's locks meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Locks {
    /// Those of other guests, and of programs on the host
    Host,
    /// Those of the same guest only: the host is not asked
    None,
}

/// The type of file system that statfs(2) names in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StatfsType {
    /// 9P
    #[value(name = "9p")]
    NineP,
    /// The host's, from which programs may draw wrong conclusions
    Host,
}

/// What a server allows.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Nothing is changed.
    pub read_only: bool,
    /// Whose locks the guest's locks meet.
    pub locks: Locks,
    /// What statfs(2) says.
    pub statfs_type: StatfsType,
    /// The largest message, in bytes.
    pub max_msize: u32,
    /// Fids of a session.
    pub max_fids: usize,
    /// Files and directories that are open for I/O in a session, and as many owners of locks.
    pub max_open: usize,
}

/// Directories, and how they are served.
#[derive(Debug)]
pub struct Server {
    options: ServerOptions,
    shares: Vec<Arc<Share>>,
}

impl Server {
    /// Serves `shares`, of which one at most has an empty name: that is where clients attach that give none.
    pub fn new(shares: Vec<Arc<Share>>, options: ServerOptions) -> Self {
        Self { options, shares }
    }

    /// What it allows.
    pub fn options(&self) -> &ServerOptions {
        &self.options
    }

    /// What it serves.
    pub fn shares(&self) -> &[Arc<Share>] {
        &self.shares
    }

    /// Fails if nothing is to be changed: `EROFS`. The one place that knows.
    fn check_writable(&self) -> Result<(), Errno> {
        if self.options.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }
}

/// Where the data of a request lies: the buffers of the transport.
pub trait Buffers {
    /// Bytes that a reply may have.
    fn space(&self) -> usize;

    /// Reads `file` from its byte `from` on, by one preadv2(2) with `flags`, up to `len` bytes to the reply's buffers
    /// behind their first `offset`. Returns how many it were.
    fn read_file(
        &self,
        file: BorrowedFd<'_>,
        from: u64,
        offset: usize,
        len: usize,
        flags: i32,
    ) -> Result<usize, Errno>;

    /// Writes the first `len` bytes of a Twrite's data to `file` at its byte `to`, by one pwritev2(2). Returns how many it
    /// were.
    fn write_file(&self, file: BorrowedFd<'_>, to: u64, len: usize) -> Result<usize, Errno>;

    /// Copies the front of a Twrite's data.
    fn copy_data(&self, to: &mut [u8]) -> usize;
}

/// A share of something of which there is a limited amount, given back when it is dropped.
#[derive(Debug)]
struct Reserved {
    amount: usize,
    used: Arc<AtomicUsize>,
}

impl Reserved {
    /// Takes `amount` of what `used` counts, if it does not exceed `limit` then.
    fn take(used: &Arc<AtomicUsize>, amount: usize, limit: usize) -> Option<Self> {
        let fits = |now: usize| now.checked_add(amount).filter(|then| *then <= limit);
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        Some(Self { amount, used: Arc::clone(used) })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.used.fetch_sub(self.amount, Ordering::Relaxed);
    }
}
