//! The one call on taps that no crate here wraps.
#![expect(unsafe_code, reason = "an ioctl on taps")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `TUNSETOFFLOAD` with all that lets large TCP segments through whole.
pub fn take_large_frames(tap: impl AsFd) -> io::Result<()> {
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: the request takes a number.
    let result = unsafe {
        libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(offloads))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
