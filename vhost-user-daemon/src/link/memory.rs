//! Memory regions on their way to the stock daemon: checked, and brought into the form that it takes.
//!
//! vhost-user text, sections "Memory region description" and "Single memory region description".

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, fstat};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::message::{Refusal, body, body_prefix};
use super::wire::Message;
use crate::device::SharedRegion;

/// A part of guest memory, and the file that it is mapped from.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Region {
    guest_address: u64,
    size: u64,
    user_address: u64,
    mmap_offset: u64,
}

/// The number of regions, or nothing, in front of them.
const HEAD: usize = 8;

/// The body of an `ADD_MEM_REG`.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Added {
    padding: [u8; HEAD],
    region: Region,
}

/// A `SET_MEM_TABLE` of exactly the regions that it is about, sorted by guest address; and these regions, each as the
/// body of an `ADD_MEM_REG`. They also have to please `may`.
///
/// Gaps of vhost and vm-memory: User Mode Linux (6.12) always sends room for two regions, and no order is demanded by the
/// text, but the stock crates insist on both.
pub(super) fn table(message: &Message, may: MayShare<'_>) -> Result<(Message, Vec<Vec<u8>>), Refusal> {
    let count = body_prefix::<u32>(message)? as usize;
    let regions = message.body.get(HEAD..).unwrap_or_default();
    let (regions, _) = <[Region]>::ref_from_prefix_with_elems(regions, count)
        .map_err(|_| Refusal::new(format!("{count} regions in {} bytes", message.body.len())))?;
    if message.fds.len() != count {
        return Err(Refusal::new(format!("{count} regions with {} files", message.fds.len())));
    }
    let mut sorted: Vec<(&Region, &OwnedFd)> = regions.iter().zip(&message.fds).collect();
    sorted.sort_by_key(|(region, _)| region.guest_address);
    let shared: Vec<_> = sorted.iter().map(|(region, fd)| shared(region, fd)).collect();
    may(&shared).map_err(Refusal::new)?;
    let mut body = message.body[..HEAD].to_vec();
    let mut fds = Vec::with_capacity(count);
    for (region, fd) in sorted {
        check(region, fd)?;
        body.extend(region.as_bytes());
        // Out of file descriptors is the only way to fail.
        fds.push(fd.try_clone().map_err(|error| Refusal::new(format!("Region cannot be mapped: {error}")))?);
    }
    let added = regions.iter().map(|region| Added { padding: [0; HEAD], region: *region }.as_bytes().into());
    let added = added.collect();
    Ok((Message { request: message.request, need_reply: message.need_reply, body, fds }, added))
}

/// What the device says to regions: the reason if it cannot work with them.
pub(super) type MayShare<'a> = &'a dyn Fn(&[SharedRegion<'_>]) -> Result<(), String>;

fn shared<'a>(region: &Region, fd: &'a OwnedFd) -> SharedRegion<'a> {
    let Region { guest_address, size, mmap_offset, .. } = *region;
    SharedRegion { guest_address, size, offset: mmap_offset, file: fd.as_fd() }
}

/// Whether two bodies of `ADD_MEM_REG` or `REM_MEM_REG` are about the same part of guest memory.
pub(super) fn is_same(left: &[u8], right: &[u8]) -> bool {
    match (Added::read_from_bytes(left), Added::read_from_bytes(right)) {
        (Ok(Added { region: left, .. }), Ok(Added { region: right, .. })) => {
            (left.guest_address, left.size) == (right.guest_address, right.size)
        }
        _ => false,
    }
}

/// Checks the region of an `ADD_MEM_REG`, which also has to please `may`.
pub(super) fn check_added(message: &Message, may: MayShare<'_>) -> Result<(), Refusal> {
    let Added { region, .. } = body(message)?;
    match &message.fds[..] {
        [fd] => check(&region, fd).and_then(|()| may(&[shared(&region, fd)]).map_err(Refusal::new)),
        fds => Err(Refusal::new(format!("One region with {} files", fds.len()))),
    }
}

/// Refuses a region that reaches beyond its file: the first access to it would kill this process. (A front end that
/// shortens the file later still can; it only harms its own guest.)
fn check(region: &Region, fd: &OwnedFd) -> Result<(), Refusal> {
    let stat = fstat(fd).map_err(|error| Refusal::new(format!("File of a region: {error}")))?;
    let end = region.mmap_offset.checked_add(region.size);
    let is_regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if is_regular && end.is_none_or(|end| end > stat.st_size as u64) {
        return Err(Refusal::new(format!(
            "Region of {} bytes at {} reaches beyond its file of {} bytes",
            region.size, region.mmap_offset, stat.st_size
        )));
    }
    Ok(())
}
