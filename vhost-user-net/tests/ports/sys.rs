//! Frames through a tap, and queues as other programs open them.
#![expect(unsafe_code, reason = "buffers of system calls, and an ioctl")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use libc::{c_int, iovec};
use vhost_user_net::port::tap::Tap;

/// The next frame of a queue with its header, if one waits.
pub fn read(tap: &Tap, queue: usize) -> Option<Vec<u8>> {
    let mut frame = vec![0; Tap::MAX_FRAME];
    let (head, rest) = frame.split_at_mut(7);
    let buffers = [head, rest].map(|part| iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
    // SAFETY: the buffers are two parts of `frame`, which nobody else uses.
    match unsafe { tap.read(queue, &buffers) } {
        Ok(len) => {
            frame.truncate(len);
            Some(frame)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => panic!("Cannot read from queue {queue}: {error}"),
    }
}

/// Writes a frame with its header.
pub fn write(tap: &Tap, queue: usize, frame: &[u8]) -> io::Result<usize> {
    let (head, rest) = frame.split_at(frame.len().min(7));
    let buffers =
        [head, rest].map(|part| iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    // SAFETY: the buffers are two parts of `frame`, which the call only reads.
    unsafe { tap.write(queue, &buffers) }
}

/// `/dev/net/tun`, attached to the interface with these flags.
pub fn queue(name: &str, flags: c_int) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETIFF takes an `ifreq`.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

/// Moves the calling thread to a new network namespace.
pub fn enter_new_network() {
    // SAFETY: the call touches no memory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "a new network namespace: {}", io::Error::last_os_error());
}
