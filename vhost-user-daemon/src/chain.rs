//! From a descriptor chain to host memory: the only module that follows what a guest wrote into its descriptors.
//!
//! A chain is read once, when it is popped; what the guest changes afterwards has no effect on the lengths and
//! pointers used here. The data itself stays shared with the guest, so it is only ever copied or handed to the kernel
//! as iovecs, never borrowed as a Rust reference.
//!
//! Virtio 1.3 text, sections 2.7.4 to 2.7.5 (message framing, descriptor table, indirect descriptors).
#![expect(unsafe_code, reason = "guest memory is raw memory shared with another process")]

mod source;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use libc::iovec;
use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

pub use self::source::Source;
use crate::dirty::DirtyLog;
use crate::file_io::{preadv, pwritev};
use crate::memory::{Memory, guest_address, host_ptr, host_range};

/// Buffers that one chain may have: what `preadv` and `pwritev` take in one call (`UIO_MAXIOV`).
pub const MAX_SEGMENTS: usize = 1024;

/// Size of a descriptor in bytes.
pub(crate) const DESCRIPTOR_SIZE: usize = 16;

/// Why a chain cannot be served. It goes back to the guest with a used length of 0.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// A `next` field, or the head in the available ring, lies outside the descriptor table.
    #[error("Descriptor {index} lies outside a table of {size}")]
    IndexOutOfRange {
        /// The index found.
        index: u16,
        /// Number of descriptors in the table.
        size: u32,
    },
    /// More descriptors than the table has: the chain runs in a circle.
    #[error("Chain runs in a circle")]
    Cyclic,
    /// More than [`MAX_SEGMENTS`] buffers.
    #[error("Chain has more than {MAX_SEGMENTS} buffers")]
    TooManySegments,
    /// More than 4 GiB in one chain, which section 2.7.5.2 forbids.
    #[error("Chain is longer than 4 GiB")]
    TooLong,
    /// A buffer that is not wholly in guest memory.
    #[error("Buffer of {len} bytes at {addr:#x} lies outside guest memory")]
    OutsideMemory {
        /// Guest address of the first byte that is missing.
        addr: u64,
        /// Bytes that were to follow from there.
        len: u64,
    },
    /// A device-readable buffer after a device-writable one (section 2.7.4.2).
    #[error("Device-readable buffer after a device-writable one")]
    ReadableAfterWritable,
    /// An indirect table inside an indirect table (section 2.7.5.3.1).
    #[error("Indirect table inside an indirect table")]
    NestedIndirect,
    /// A descriptor with both INDIRECT and NEXT (section 2.7.5.3.1).
    #[error("Indirect table with a next descriptor")]
    IndirectWithNext,
    /// An indirect table of no descriptors, of a part of one, or of more than a `next` field can reach.
    #[error("Indirect table of {0} bytes")]
    IndirectLength(u32),
    /// The chain ends before what the device has to read or write in it.
    #[error("Chain is too short")]
    TooShort,
}

/// A chain that was popped: its buffers as iovecs into guest memory, device-readable ones first.
///
/// Reading consumes from the front. A `Chain` is meant to be used again and again, so that its vector is allocated
/// once. It holds on to the memory map that it was popped with until it is cleared.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    replayed: bool,
    memory: Option<Arc<Memory>>,
    segments: Vec<iovec>,
    /// `segments[first_readable..readable_end]` are device-readable, the rest from there device-writable.
    first_readable: usize,
    readable_end: usize,
    /// The byte that `take_last_byte` took off.
    last_byte: Option<*mut u8>,
}

// SAFETY: the pointers lead into the memory map that `memory` keeps mapped, which is shared by all threads anyway.
unsafe impl Send for Chain {}

/// A descriptor as the guest wrote it.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Reads descriptor `index` of the table at `table`.
    ///
    /// # Safety
    /// `table` must point to at least `index + 1` mapped descriptors.
    unsafe fn read(table: *const u8, index: u16) -> Self {
        // SAFETY: inside the table as the caller promises. Volatile and unaligned because the guest may write at any
        // time and chooses the address of an indirect table.
        let raw: [u8; DESCRIPTOR_SIZE] = unsafe {
            table.add(usize::from(index) * DESCRIPTOR_SIZE).cast::<[u8; DESCRIPTOR_SIZE]>().read_volatile()
        };
        let value = u128::from_le_bytes(raw);
        Self {
            addr: value as u64,
            len: (value >> 64) as u32,
            flags: (value >> 96) as u16,
            next: (value >> 112) as u16,
        }
    }

    fn has(self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

impl Chain {
    /// Reads the chain that starts at descriptor `head` of a table of `size` descriptors at `table`. If it cannot be
    /// followed, only its last byte is kept, if that can be found.
    ///
    /// # Safety
    /// `table` must point to `size` descriptors inside `memory`.
    pub(crate) unsafe fn fill(
        &mut self,
        memory: &Arc<Memory>,
        table: *const u8,
        size: u16,
        head: u16,
    ) -> Result<(), ChainError> {
        self.clear();
        self.head = head;
        // SAFETY: as promised by the caller.
        let result = unsafe { self.walk(memory, table, u32::from(size), head, false, &mut 0) };
        if result.is_err() {
            self.clear();
            // SAFETY: as promised by the caller.
            self.last_byte = unsafe { last_byte(memory, table, u32::from(size), head, false) };
        }
        self.memory = Some(Arc::clone(memory));
        result
    }

    /// Follows the chain from descriptor `index` on.
    ///
    /// # Safety
    /// `table` must point to `size` descriptors inside `memory`.
    unsafe fn walk(
        &mut self,
        memory: &Memory,
        table: *const u8,
        size: u32,
        mut index: u16,
        indirect: bool,
        total: &mut u64,
    ) -> Result<(), ChainError> {
        let mut budget = size;
        loop {
            if u32::from(index) >= size {
                return Err(ChainError::IndexOutOfRange { index, size });
            }
            budget = budget.checked_sub(1).ok_or(ChainError::Cyclic)?;
            // SAFETY: index < size, and the caller promises a table of that size.
            let descriptor = unsafe { Descriptor::read(table, index) };

            if descriptor.has(VRING_DESC_F_INDIRECT) {
                if indirect {
                    return Err(ChainError::NestedIndirect);
                }
                if descriptor.has(VRING_DESC_F_NEXT) {
                    return Err(ChainError::IndirectWithNext);
                }
                let bytes = descriptor.len as usize;
                let count = bytes / DESCRIPTOR_SIZE;
                if count == 0 || !bytes.is_multiple_of(DESCRIPTOR_SIZE) || count > usize::from(u16::MAX) + 1 {
                    return Err(ChainError::IndirectLength(descriptor.len));
                }
                let table = host_ptr(memory, descriptor.addr, bytes)
                    .ok_or(ChainError::OutsideMemory { addr: descriptor.addr, len: bytes as u64 })?;
                // SAFETY: `host_ptr` found `count` whole descriptors in one region of `memory`.
                return unsafe { self.walk(memory, table, count as u32, 0, true, total) };
            }

            *total += u64::from(descriptor.len);
            if *total > u64::from(u32::MAX) {
                return Err(ChainError::TooLong);
            }
            self.push(memory, descriptor)?;
            if !descriptor.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// Adds the buffer of one descriptor; it becomes several segments where it crosses from one region to the next.
    fn push(&mut self, memory: &Memory, descriptor: Descriptor) -> Result<(), ChainError> {
        let writable = descriptor.has(VRING_DESC_F_WRITE);
        if !writable && self.readable_end < self.segments.len() {
            return Err(ChainError::ReadableAfterWritable);
        }
        let (mut addr, mut left) = (descriptor.addr, descriptor.len as usize);
        while left > 0 {
            let outside = ChainError::OutsideMemory { addr, len: left as u64 };
            let range = host_range(memory, addr, left).ok_or(outside)?;
            if self.segments.len() == MAX_SEGMENTS {
                return Err(ChainError::TooManySegments);
            }
            self.segments.push(iovec { iov_base: range.ptr.cast(), iov_len: range.len });
            left -= range.len;
            // A region that ends at the top of the address space has no next byte.
            addr = addr.checked_add(range.len as u64).filter(|_| left > 0).unwrap_or_default();
            if addr == 0 && left > 0 {
                return Err(outside);
            }
        }
        if !writable {
            self.readable_end = self.segments.len();
        }
        Ok(())
    }

    /// Forgets the buffers and lets go of the memory map.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.first_readable = 0;
        self.readable_end = 0;
        self.last_byte = None;
        self.memory = None;
    }

    /// Index of the first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Whether a process before this one had popped it and may have executed it, in part or as a whole, without the guest
    /// having been told.
    pub fn is_replayed(&self) -> bool {
        self.replayed
    }

    pub(crate) fn set_replayed(&mut self, replayed: bool) {
        self.replayed = replayed;
    }

    /// What is left of the device-readable part, as iovecs into guest memory.
    pub fn readable(&self) -> &[iovec] {
        &self.segments[self.first_readable..self.readable_end]
    }

    /// What is left of the device-writable part, as iovecs into guest memory.
    pub fn writable(&self) -> &[iovec] {
        &self.segments[self.readable_end..]
    }

    /// Guest addresses and lengths of what is left of the device-writable part: of the segments that
    /// [`Chain::writable`] returns.
    pub fn writable_ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let address = |segment: &iovec| {
            let address = guest_address(self.memory.as_ref()?, segment.iov_base.cast())?;
            Some((address, segment.iov_len as u64))
        };
        self.writable().iter().filter_map(address)
    }

    /// Bytes left in the device-readable part.
    pub fn readable_len(&self) -> u64 {
        total_len(self.readable())
    }

    /// Bytes left in the device-writable part.
    pub fn writable_len(&self) -> u64 {
        total_len(self.writable())
    }

    /// Fills `buf` from the front of the device-readable part, and takes these bytes off it.
    ///
    /// Fails without taking anything when the part is shorter than `buf`.
    pub fn read(&mut self, buf: &mut [u8]) -> Result<(), ChainError> {
        if self.readable_len() < buf.len() as u64 {
            return Err(ChainError::TooShort);
        }
        let mut done = 0;
        while done < buf.len() {
            let segment = &mut self.segments[self.first_readable];
            let len = segment.iov_len.min(buf.len() - done);
            // SAFETY: `len` bytes are left in the segment, which lies in the memory map held by `self.memory`, and in
            // `buf`. They cannot overlap: `buf` is memory of this process alone.
            unsafe { std::ptr::copy_nonoverlapping(segment.iov_base.cast(), buf[done..].as_mut_ptr(), len) };
            segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(len).cast();
            segment.iov_len -= len;
            if segment.iov_len == 0 {
                self.first_readable += 1;
            }
            done += len;
        }
        Ok(())
    }

    /// Copies `bytes` to the front of the device-writable part, as far as they fit, and returns how many did.
    /// Nothing is taken off; mark the bytes with [`Chain::log_written`].
    pub fn write(&self, bytes: &[u8]) -> usize {
        self.write_from(&mut Source::new(bytes), 0)
    }

    /// Moves bytes from `source` to the device-writable part, from its byte `offset` on, until one of both ends, and
    /// returns how many it were. Mark them with [`Chain::log_written`].
    pub fn write_from(&self, source: &mut Source<'_>, offset: usize) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for segment in self.writable() {
            if source.is_empty() {
                break;
            }
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let to = segment.iov_base.cast::<u8>().wrapping_add(skip);
            let room = segment.iov_len - std::mem::take(&mut skip);
            // SAFETY: `room` bytes are left in the segment, which lies in the memory map held by `self.memory`.
            done += unsafe { source.copy_to(to, room) };
        }
        done
    }

    /// Reads from `file`, from its byte `from` on, up to `len` bytes to the device-writable part, from its byte `offset` on,
    /// by one call of preadv2(2) with `flags`. Returns how many bytes it were. Mark them with [`Chain::log_written`].
    pub fn read_file(
        &self,
        file: BorrowedFd<'_>,
        from: u64,
        offset: usize,
        len: usize,
        flags: i32,
    ) -> io::Result<usize> {
        let mut space = self.written();
        space.skip(offset);
        let iovecs: Vec<iovec> = space.limit(len).iovecs().collect();
        // SAFETY: the iovecs lie in the memory map held by `self.memory`.
        unsafe { preadv(file, &iovecs, from, flags) }
    }

    /// Writes the first `len` bytes that are left of the device-readable part to `file`, at its byte `to`, by one call of
    /// pwritev2(2) with `flags`. Returns how many bytes it were.
    pub fn write_file(&self, file: BorrowedFd<'_>, to: u64, len: usize, flags: i32) -> io::Result<usize> {
        let iovecs: Vec<iovec> = self.source().limit(len).iovecs().collect();
        // SAFETY: the iovecs lie in the memory map held by `self.memory`.
        unsafe { pwritev(file, &iovecs, to, flags) }
    }

    /// What the device-writable part holds now, to be looked at. The guest may change it at any time.
    pub fn written(&self) -> Source<'_> {
        Source::of(self.writable())
    }

    /// What is left of the device-readable part, to be copied.
    pub fn source(&self) -> Source<'_> {
        Source::of(self.readable())
    }

    /// Takes the last byte off the device-writable part, for [`Chain::write_last_byte`]: devices put a status there.
    ///
    /// Fails when that part is empty.
    pub fn take_last_byte(&mut self) -> Result<(), ChainError> {
        if self.readable_end == self.segments.len() {
            return Err(ChainError::TooShort);
        }
        let last = self.segments.last_mut().ok_or(ChainError::TooShort)?;
        last.iov_len -= 1;
        self.last_byte = Some(last.iov_base.cast::<u8>().wrapping_add(last.iov_len));
        if last.iov_len == 0 {
            self.segments.pop();
        }
        Ok(())
    }

    /// Writes the byte that [`Chain::take_last_byte`] took off, or the last one of a chain that could not be followed,
    /// and marks it dirty. `false` if there is none.
    pub fn write_last_byte(&self, value: u8, log: &DirtyLog) -> bool {
        let (Some(memory), Some(ptr)) = (&self.memory, self.last_byte) else {
            return false;
        };
        // SAFETY: the byte was part of a segment of this chain, whose memory map `self.memory` still holds.
        unsafe { ptr.write_volatile(value) };
        if log.is_enabled() {
            log.mark_iovecs(memory, &[iovec { iov_base: ptr.cast(), iov_len: 1 }], 1);
        }
        true
    }

    /// Marks the first `written` bytes of the device-writable part as dirty, if the front end asked for a log.
    pub fn log_written(&self, written: u64, log: &DirtyLog) {
        if let (true, Some(memory)) = (log.is_enabled(), &self.memory) {
            log.mark_iovecs(memory, self.writable(), written);
        }
    }
}

/// The last byte of a chain that is broken somewhere before, if the chain ends with a device-writable buffer.
///
/// # Safety
/// `table` must point to `size` descriptors inside `memory`.
unsafe fn last_byte(
    memory: &Memory,
    table: *const u8,
    size: u32,
    head: u16,
    indirect: bool,
) -> Option<*mut u8> {
    let mut index = head;
    // Longer than the table is a circle.
    for _ in 0..size {
        if u32::from(index) >= size {
            return None;
        }
        // SAFETY: index < size, and the caller promises a table of that size.
        let descriptor = unsafe { Descriptor::read(table, index) };
        if descriptor.has(VRING_DESC_F_INDIRECT) {
            let count = (descriptor.len as usize / DESCRIPTOR_SIZE).min(usize::from(u16::MAX) + 1);
            let table = host_ptr(memory, descriptor.addr, count * DESCRIPTOR_SIZE)?;
            // SAFETY: `host_ptr` found `count` whole descriptors in one region of `memory`.
            return if indirect { None } else { unsafe { last_byte(memory, table, count as u32, 0, true) } };
        }
        if !descriptor.has(VRING_DESC_F_NEXT) {
            let last = descriptor.addr.checked_add(u64::from(descriptor.len.checked_sub(1)?))?;
            return if descriptor.has(VRING_DESC_F_WRITE) { host_ptr(memory, last, 1) } else { None };
        }
        index = descriptor.next;
    }
    None
}

/// Bytes in all of `iovecs`. A chain has at most 4 GiB.
fn total_len(iovecs: &[iovec]) -> u64 {
    iovecs.iter().map(|iovec| iovec.iov_len as u64).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
    /// The table lies at the start of the first region; a gap of one page lies between the second and the third.
    const REGIONS: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x8000), (0x1_1000, 0x1000)];
    const TABLE_SIZE: u16 = 16;

    fn memory() -> Arc<Memory> {
        let ranges = REGIONS.map(|(start, len)| (GuestAddress(start), len));
        Arc::new(Memory::from_ranges(&ranges).unwrap())
    }

    fn bytes(descriptors: &[(u64, u32, u16, u16)]) -> Vec<u8> {
        descriptors
            .iter()
            .flat_map(|(addr, len, flags, next)| {
                let raw = u128::from(*addr)
                    | u128::from(*len) << 64
                    | u128::from(*flags) << 96
                    | u128::from(*next) << 112;
                raw.to_le_bytes()
            })
            .collect()
    }

    /// Follows a chain from the first of `descriptors`.
    fn chain(memory: &Arc<Memory>, descriptors: &[(u64, u32, u16, u16)]) -> Result<Chain, ChainError> {
        memory.write_slice(&bytes(descriptors), GuestAddress(0)).unwrap();
        let table = host_ptr(memory, 0, usize::from(TABLE_SIZE) * DESCRIPTOR_SIZE).unwrap();
        let mut chain = Chain::default();
        // SAFETY: `host_ptr` found the whole table.
        unsafe { chain.fill(memory, table, TABLE_SIZE, 0) }.map(|()| chain)
    }

    #[test]
    fn a_source_is_copied_in_any_pieces_to_any_place() {
        let memory = memory();
        memory.write_slice(b"0123456789", GuestAddress(0x1000)).unwrap();
        let chain = chain(
            &memory,
            &[
                (0x1000, 4, NEXT, 1),
                (0x1004, 6, NEXT, 2),
                (0x2000, 3, NEXT | WRITE, 3),
                (0x3000, 9, WRITE, 0),
            ],
        )
        .unwrap();
        for cut in 0..=10 {
            for offset in 0..13 {
                memory.write_slice(&[b'.'; 3], GuestAddress(0x2000)).unwrap();
                memory.write_slice(&[b'.'; 9], GuestAddress(0x3000)).unwrap();
                let mut source = chain.source();
                let mut start = vec![0; cut];
                assert_eq!(source.read(&mut start), cut);
                assert_eq!(source.iovecs().map(|iovec| iovec.iov_len).sum::<usize>(), 10 - cut);
                let written = chain.write_from(&mut source, offset);
                assert_eq!(written, (10 - cut).min(12_usize.saturating_sub(offset)));
                assert_eq!(source.len(), 10 - cut - written);
                let mut expected = [b'.'; 12];
                if offset < 12 {
                    expected[offset..offset + written].copy_from_slice(&b"0123456789"[cut..cut + written]);
                }
                let mut now = [0; 12];
                memory.read_slice(&mut now[..3], GuestAddress(0x2000)).unwrap();
                memory.read_slice(&mut now[3..], GuestAddress(0x3000)).unwrap();
                assert_eq!(now, expected);
            }
        }
        let mut limited = Source::new(b"abcdef").limit(4);
        limited.skip(1);
        let mut rest = [0; 8];
        assert_eq!(limited.read(&mut rest), 3);
        assert_eq!(&rest[..3], b"bcd");
        assert!(limited.is_empty());
    }

    #[test]
    fn header_data_and_last_byte_come_apart_wherever_the_buffers_end() {
        let memory = memory();
        memory.write_slice(b"headerdata", GuestAddress(0x1000)).unwrap();
        let mut chain = chain(
            &memory,
            &[
                (0x1000, 4, NEXT, 1),
                (0x1004, 6, NEXT, 2),
                (0x2000, 3, NEXT | WRITE, 3),
                (0x3000, 1, WRITE, 0),
            ],
        )
        .unwrap();
        let mut header = [0; 6];
        chain.read(&mut header).unwrap();
        assert_eq!(&header, b"header");
        assert_eq!((chain.readable_len(), chain.writable_len()), (4, 4));
        assert_eq!(chain.read(&mut [0; 5]), Err(ChainError::TooShort));
        chain.take_last_byte().unwrap();
        assert_eq!(chain.write(b"abcdef"), 3);
        assert!(chain.write_last_byte(7, &DirtyLog::default()));
        let mut data = [0; 3];
        memory.read_slice(&mut data, GuestAddress(0x2000)).unwrap();
        assert_eq!(&data, b"abc");
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), 7);
    }

    #[test]
    fn a_buffer_may_cross_regions_that_touch_and_no_others() {
        let memory = memory();
        let across = chain(&memory, &[(0x7f00, 0x200, WRITE, 0)]).unwrap();
        assert_eq!(
            across.writable().iter().map(|segment| segment.iov_len).collect::<Vec<_>>(),
            [0x100, 0x100]
        );
        assert_eq!(
            chain(&memory, &[(0xff00, 0x200, WRITE, 0)]).unwrap_err(),
            ChainError::OutsideMemory { addr: 0x1_0000, len: 0x100 }
        );
    }

    #[test]
    fn what_is_wrong_with_a_chain_is_named() {
        let memory = memory();
        let ok = (0x1000, 1, 0, 0);
        let indirect = |len, flags| (0x4000, len, INDIRECT | flags, 1);
        memory.write_slice(&bytes(&[(0x4000, 16, INDIRECT, 0)]), GuestAddress(0x4000)).unwrap();
        for (descriptors, error) in [
            (vec![(0x1000, 1, NEXT, 16)], ChainError::IndexOutOfRange { index: 16, size: 16 }),
            (vec![(0x1000, 1, NEXT, 0)], ChainError::Cyclic),
            (vec![(0x1000, 1, NEXT, 1), (0x1000, 1, NEXT, 0)], ChainError::Cyclic),
            (vec![(0x1000, 1, NEXT | WRITE, 1), ok], ChainError::ReadableAfterWritable),
            (vec![(u64::MAX, 2, 0, 0)], ChainError::OutsideMemory { addr: u64::MAX, len: 2 }),
            (
                vec![(0x1000, u32::MAX, NEXT, 1), ok],
                ChainError::OutsideMemory { addr: 0x1_0000, len: 0xffff_ffff - 0xf000 },
            ),
            (vec![indirect(16, NEXT), ok], ChainError::IndirectWithNext),
            (vec![indirect(0, 0)], ChainError::IndirectLength(0)),
            (vec![indirect(24, 0)], ChainError::IndirectLength(24)),
            (vec![indirect(16, 0)], ChainError::NestedIndirect),
            (vec![(0x2_0000, 16, INDIRECT, 0)], ChainError::OutsideMemory { addr: 0x2_0000, len: 16 }),
        ] {
            assert_eq!(chain(&memory, &descriptors).unwrap_err(), error, "{descriptors:x?}");
        }
    }

    #[test]
    fn buffers_and_bytes_are_bounded() {
        let memory = memory();
        let table: Vec<_> = (1..=MAX_SEGMENTS as u16 + 1).map(|next| (0x1000, 1, NEXT, next)).collect();
        memory.write_slice(&bytes(&table), GuestAddress(0x2000)).unwrap();
        let len = (table.len() * DESCRIPTOR_SIZE) as u32;
        assert_eq!(chain(&memory, &[(0x2000, len, INDIRECT, 0)]).unwrap_err(), ChainError::TooManySegments);
    }

    proptest! {
        /// Whatever stands in a table, a chain holds only guest memory.
        #[test]
        fn garbage_leads_nowhere_else(
            descriptors in prop::collection::vec(
                (
                    prop_oneof![0u64..0x1_3000, any::<u64>()],
                    prop_oneof![0u32..0x400, any::<u32>()],
                    0u16..8,
                    0u16..20,
                ),
                usize::from(TABLE_SIZE),
            ),
        ) {
            let memory = memory();
            if let Ok(chain) = chain(&memory, &descriptors) {
                prop_assert!(chain.readable().len() + chain.writable().len() <= MAX_SEGMENTS);
                for segment in chain.readable().iter().chain(chain.writable()) {
                    let start = crate::memory::guest_address(&memory, segment.iov_base.cast());
                    let last = segment.iov_base.cast::<u8>().wrapping_add(segment.iov_len - 1);
                    let end = crate::memory::guest_address(&memory, last);
                    prop_assert_eq!(end.unwrap() - start.unwrap(), segment.iov_len as u64 - 1);
                }
            }
        }
    }
}
