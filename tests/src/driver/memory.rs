//! Memory that is shared with a daemon: a file, mostly a memfd, and its mapping.
#![expect(unsafe_code, reason = "maps memory that another process reads and writes at the same time")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A mapped file. All access is by copy, because the other side may write at any time.
#[derive(Debug)]
pub struct SharedMemory {
    file: File,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value, and every access goes through raw copies or atomics.
unsafe impl Send for SharedMemory {}
// SAFETY: as for `Send`; racing copies can tear data, which is what shared memory is, but nothing is borrowed from it.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Creates `len` zero bytes.
    pub fn new(len: usize) -> io::Result<Self> {
        let file = File::from(memfd_create("test-memory", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        Self::of_file(file, len)
    }

    /// Maps the first `len` bytes of a file, such as one that is another program's guest memory.
    pub fn of_file(file: File, len: usize) -> io::Result<Self> {
        Self::map(file, len, MapFlags::SHARED)
    }

    /// Maps the first `len` bytes of a file such that what is written stays in this process: what a front end does that
    /// was not told to share its memory.
    pub fn private(file: File, len: usize) -> io::Result<Self> {
        Self::map(file, len, MapFlags::PRIVATE)
    }

    fn map(file: File, len: usize, flags: MapFlags) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice cannot overlap an object of this process.
        let base =
            unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0)? };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, base, len })
    }

    /// The address in this process, which vhost-user calls the user address.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The start of the mapping; it stays valid as long as this value.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} are outside of {} bytes of shared memory",
            self.len
        );
        self.base.as_ptr().wrapping_add(offset)
    }

    /// Copies out `out.len()` bytes.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let from = self.at(offset, out.len());
        // SAFETY: `at` checked the range, and `out` is memory of this process alone.
        unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
    }

    /// Copies in `data`.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let to = self.at(offset, data.len());
        // SAFETY: `at` checked the range, and `data` is memory of this process alone.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) }
    }

    /// Sets `len` bytes to `value`.
    pub fn fill(&self, offset: usize, len: usize, value: u8) {
        let to = self.at(offset, len);
        // SAFETY: `at` checked the range.
        unsafe { ptr::write_bytes(to, value, len) }
    }

    /// Reads a ring index or flags, after which everything that was written before it is visible.
    pub fn load_u16(&self, offset: usize) -> u16 {
        u16::from_le(self.atomic(offset).load(Ordering::Acquire))
    }

    /// Writes a ring index or flags, which makes everything written before it visible.
    ///
    /// Sequentially consistent, since both sides store one index and then load the other's.
    pub fn store_u16(&self, offset: usize, value: u16) {
        self.atomic(offset).store(value.to_le(), Ordering::SeqCst);
    }

    fn atomic(&self, offset: usize) -> &AtomicU16 {
        let field = self.at(offset, 2);
        assert_eq!(offset % 2, 0, "an atomic field is aligned");
        // SAFETY: in range and aligned as checked above; the mapping lives as long as `self`.
        unsafe { AtomicU16::from_ptr(field.cast()) }
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for SharedMemory {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `of_file` with this length and nothing borrows from it any more.
        // A failure could only mean a wrong address or length.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}
