//! Many datagrams in one system call.
#![expect(unsafe_code, reason = "sendmmsg and recvmmsg, which take arrays of pointers")]

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{iovec, mmsghdr};

/// Datagrams in one call.
pub(super) const BATCH: usize = 32;

/// A datagram that was received into a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    /// Bytes in the slot.
    pub(super) len: usize,
    /// Whether the datagram was longer.
    pub(super) truncated: bool,
}

/// Sends parts of `bytes`, given by beginning and length, each as one datagram; at most [`BATCH`] of them. Returns how
/// many were sent, at least one. An error is that of the first.
pub(super) fn send_many(fd: BorrowedFd<'_>, bytes: &[u8], parts: &[(usize, usize)]) -> io::Result<usize> {
    let count = parts.len().min(BATCH);
    let mut iovecs = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
    for (iovec, &(start, len)) in iovecs.iter_mut().zip(parts) {
        let part = &bytes[start..start + len];
        *iovec = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
    }
    let mut messages = messages(&mut iovecs);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the first `count` messages refer to parts of `bytes`, which are only read.
    let result = unsafe { libc::sendmmsg(fd.as_raw_fd(), messages.as_mut_ptr(), count as u32, flags as _) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Receives datagrams, at most [`BATCH`], each into `stride` bytes of `slots`. What came is appended to `received`: at
/// least one.
pub(super) fn receive_many(
    fd: BorrowedFd<'_>,
    slots: &mut [u8],
    stride: usize,
    received: &mut Vec<Received>,
) -> io::Result<()> {
    let mut iovecs = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
    let mut count = 0;
    for (iovec, slot) in iovecs.iter_mut().zip(slots.chunks_exact_mut(stride)) {
        *iovec = libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() };
        count += 1;
    }
    let mut messages = messages(&mut iovecs);
    // SAFETY: the first `count` messages refer to slots, which are borrowed mutably and do not overlap.
    let result = unsafe {
        libc::recvmmsg(
            fd.as_raw_fd(),
            messages.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT as _,
            std::ptr::null_mut(),
        )
    };
    let result = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
    received.extend(messages[..result].iter().map(|message| Received {
        len: (message.msg_len as usize).min(stride),
        truncated: message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
    }));
    Ok(())
}

/// A message for each iovec.
fn messages(iovecs: &mut [iovec; BATCH]) -> [mmsghdr; BATCH] {
    // SAFETY: all zeroes is a valid `mmsghdr`.
    let mut messages: [mmsghdr; BATCH] = unsafe { zeroed() };
    for (message, iovec) in messages.iter_mut().zip(iovecs) {
        message.msg_hdr.msg_iov = iovec;
        message.msg_hdr.msg_iovlen = 1;
    }
    messages
}
