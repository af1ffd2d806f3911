//! The host side: which pages are in the balloon, and how they are given back to the host.
//!
//! | module | holds |
//! |---|---|
//! | [`bits`] | a set of the pages of one block of 2 MiB |
//! | [`ledger`] | the pages in the balloon, by file |
//! | [`file`](mod@file) | a file with guest memory: holes, huge pages, what is resident |
//! | [`check`] | whether the memory that a front end shares can be given back at all |
//!
//! Nothing here knows of virtio. Guest memory is never read or written here: reading a page that was given back would
//! take a new one from the host.

pub mod bits;
pub mod check;
pub mod file;
pub mod ledger;

pub use self::bits::PAGE;
pub use self::file::MemoryFile;
pub use self::ledger::{Granularity, Ledger, NoHugePage, Noted, Region, Urgency};
