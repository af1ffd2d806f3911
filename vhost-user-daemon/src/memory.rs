//! Guest memory as the front end handed it over, and the way from a guest address to a host pointer.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A snapshot of the guest's memory map.
///
/// It carries no dirty bitmap: the one of `vhost-user-backend` costs half a microsecond a request even when nobody
/// asked for logging, and forgets regions that are added while logging. [`DirtyLog`](crate::dirty::DirtyLog) does it
/// instead.
pub type Memory = GuestMemoryMmap<()>;

/// The current memory map of a connection; `SET_MEM_TABLE`, `ADD_MEM_REG` and `REM_MEM_REG` replace it.
pub type SharedMemory = GuestMemoryAtomic<Memory>;

/// An empty memory map, as a connection has it before the front end sends one.
pub fn empty() -> SharedMemory {
    SharedMemory::new(Memory::new())
}

/// A region of guest memory, and the file that the front end shares it by.
#[derive(Clone, Debug)]
pub struct MappedRegion {
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in `file`.
    pub offset: u64,
    /// The file.
    pub file: Arc<File>,
}

/// The regions of `memory`, sorted by guest address.
pub fn regions(memory: &Memory) -> impl Iterator<Item = MappedRegion> + '_ {
    // All of them come from front ends, which share them by files.
    memory.iter().filter_map(|region| {
        let place = region.file_offset()?;
        Some(MappedRegion {
            guest_address: region.start_addr().0,
            size: region.len(),
            offset: place.start(),
            file: Arc::clone(place.arc()),
        })
    })
}

/// A piece of guest memory, mapped here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostRange {
    /// Where it starts in this process.
    pub ptr: *mut u8,
    /// Bytes from `ptr` on that lie in the region, at most what was asked for.
    pub len: usize,
}

/// The host range of the guest bytes from `addr` on: `len` bytes, or fewer where the region ends before.
/// `None` if `addr` lies in no region.
pub(crate) fn host_range(memory: &Memory, addr: u64, len: usize) -> Option<HostRange> {
    let region = memory.find_region(GuestAddress(addr))?;
    let offset = addr - region.start_addr().0;
    let left = region.len() - offset;
    // Only arithmetic: the offset was just checked to lie inside the region's mapping.
    let ptr = region.as_ptr().wrapping_add(offset as usize);
    Some(HostRange { ptr, len: len.min(usize::try_from(left).unwrap_or(usize::MAX)) })
}

/// The host pointer of `len` guest bytes at `addr`, if all of them lie in one region.
pub(crate) fn host_ptr(memory: &Memory, addr: u64, len: usize) -> Option<*mut u8> {
    host_range(memory, addr, len).filter(|range| range.len == len).map(|range| range.ptr)
}

/// The guest address of a byte mapped at `ptr`, the inverse of [`host_range`].
pub(crate) fn guest_address(memory: &Memory, ptr: *const u8) -> Option<u64> {
    memory.iter().find_map(|region| {
        let offset = (ptr as usize).checked_sub(region.as_ptr() as usize)? as u64;
        (offset < region.len()).then(|| region.start_addr().0 + offset)
    })
}

/// The current map of `shared`, kept alive as long as the result is held.
pub(crate) fn snapshot(shared: &SharedMemory) -> Arc<Memory> {
    use vm_memory::GuestAddressSpace;
    shared.memory().into_inner()
}
