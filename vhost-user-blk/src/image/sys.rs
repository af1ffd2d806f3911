//! The system calls that no crate offers safely for guest memory, locks and block devices.
//!
//! Guest memory is shared with the guest, so a Rust slice over it must never exist: the calls below take iovecs.
#![expect(unsafe_code, reason = "system calls on raw guest memory, and ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use libc::{c_int, iovec};

/// Copies `from` to `buffers`, from byte `skip` of them on.
///
/// # Safety
/// The buffers must be mapped, and be none of this process's own objects.
pub(super) unsafe fn scatter(from: &[u8], buffers: &[iovec], skip: usize) {
    let mut from = from;
    for (ptr, len) in pieces(buffers, skip, from.len()) {
        let (now, rest) = from.split_at(len);
        // SAFETY: `len` bytes of the buffer as promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), ptr, len) };
        from = rest;
    }
}

/// Copies `buffers`, from byte `skip` of them on, until `to` is full.
///
/// # Safety
/// As for [`scatter`].
pub(super) unsafe fn gather(buffers: &[iovec], skip: usize, to: &mut [u8]) {
    let mut done = 0;
    for (ptr, len) in pieces(buffers, skip, to.len()) {
        // SAFETY: `len` bytes of the buffer as promised by the caller, and `pieces` gives no more than `to.len()` in all.
        unsafe { std::ptr::copy_nonoverlapping(ptr, to[done..].as_mut_ptr(), len) };
        done += len;
    }
}

/// `len` bytes of `buffers` after the first `skip`, piece by piece.
fn pieces(buffers: &[iovec], mut skip: usize, mut len: usize) -> impl Iterator<Item = (*mut u8, usize)> {
    buffers.iter().filter_map(move |buffer| {
        let skipped = skip.min(buffer.iov_len);
        skip -= skipped;
        let now = len.min(buffer.iov_len - skipped);
        len -= now;
        (now > 0).then(|| (buffer.iov_base.cast::<u8>().wrapping_add(skipped), now))
    })
}

/// What an open file description asks of a byte range (fcntl(2), "Open file description locks").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    /// Take the range for reading, beside other readers.
    Shared,
    /// Give the range back.
    Release,
}

fn flock(kind: c_int, start: i64) -> libc::flock {
    // SAFETY: all zeroes is a valid `flock`.
    let mut flock: libc::flock = unsafe { std::mem::zeroed() };
    flock.l_type = kind as i16;
    flock.l_whence = libc::SEEK_SET as i16;
    flock.l_start = start;
    flock.l_len = 1;
    flock
}

/// Locks or unlocks one byte of `file` for its open file description, without waiting.
pub(super) fn lock_byte(file: &File, byte: i64, lock: Lock) -> io::Result<()> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Release => libc::F_UNLCK,
    };
    let flock = flock(kind, byte);
    // SAFETY: F_OFD_SETLK reads the structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const flock) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether another open file description holds a lock on the byte.
pub(super) fn byte_is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let mut flock = flock(libc::F_WRLCK, byte);
    // SAFETY: F_OFD_GETLK reads and writes the structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut flock) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(flock.l_type != libc::F_UNLCK as i16)
}

/// `_IO(0x12, 119)` and `_IO(0x12, 127)` of linux/fs.h; each takes the first byte and the length.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;

/// Tells a block device that the range is not needed any more; what it reads afterwards is undefined.
pub(super) fn block_discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    block_ioctl(file, BLKDISCARD, offset, len)
}

/// Zeroes a range of a block device, by its own means or by writing.
pub(super) fn block_zeroout(file: &File, offset: u64, len: u64) -> io::Result<()> {
    block_ioctl(file, BLKZEROOUT, offset, len)
}

fn block_ioctl(file: &File, request: libc::Ioctl, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: both requests read two 64-bit numbers.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_exactly_what_is_asked_for() {
        let base = 0x1000 as *mut libc::c_void;
        let buffers = [3, 0, 5, 2].map(|len| iovec { iov_base: base, iov_len: len });
        let lens = |skip, len| {
            pieces(&buffers, skip, len).map(|(ptr, len)| (ptr as usize - 0x1000, len)).collect::<Vec<_>>()
        };
        assert_eq!(lens(0, 10), [(0, 3), (0, 5), (0, 2)]);
        assert_eq!(lens(2, 3), [(2, 1), (0, 2)]);
        assert_eq!(lens(3, 5), [(0, 5)]);
        assert_eq!(lens(7, 9), [(4, 1), (0, 2)]);
        assert_eq!(lens(10, 1), []);
    }
}
