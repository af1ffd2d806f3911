//! System calls that no crate offers safely, because no program should make them.
#![expect(unsafe_code, reason = "attacks")]

use std::io;

/// Makes a system call, of up to five integers, which is expected to fail or to harm nobody.
pub fn call(number: libc::c_long, arguments: &[libc::c_long]) -> io::Result<libc::c_long> {
    let argument = |index| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: the callers pass no pointers but null, so the kernel writes nowhere.
    let result =
        unsafe { libc::syscall(number, argument(0), argument(1), argument(2), argument(3), argument(4)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
