//! The system calls of a sandbox that no crate offers safely.
#![expect(unsafe_code, reason = "namespaces, mount attributes, fork, and filters of system calls")]

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::mount::MountAttrFlags;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use seccompiler::sock_filter;

/// Moves the process, which has one thread, into new namespaces.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: what is unsafe is to stop sharing the table of file descriptors, which is none of the namespaces.
    unsafe { unshare_unsafe(flags & !UnshareFlags::FILES) }?;
    Ok(())
}

/// `mount_setattr(2)`: adds attributes to a mount, and to all mounts beneath it if `recursive`.
pub(super) fn add_mount_attributes(
    mount: impl AsFd,
    flags: MountAttrFlags,
    recursive: bool,
) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: flags.bits().into(), attr_clr: 0, propagation: 0, userns_fd: 0 };
    let how = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string with an end, and the size is that of the structure, of which the kernel keeps no
    // pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            how,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Starts a child process that does `run` and ends. It has no open files but the standard streams and `keep`, and gets
/// no signal that can be blocked. This returns when the other files are closed there: a lock, for example, is this
/// process's alone again.
///
/// The process must have one thread only.
pub(super) fn start_child(keep: &[RawFd], run: impl FnOnce()) -> io::Result<()> {
    let (mut closed, open) = io::pipe()?;
    // SAFETY: the process has one thread, so all locks and all of memory are consistent in the child. It ends below
    // without running anything of what the parent had in mind: no destructors, no exit handlers.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            block_signals();
            close_all_but(keep);
            let status = catch_unwind(AssertUnwindSafe(run)).map_or(1, |()| 0);
            // SAFETY: ends the child, as promised.
            unsafe { libc::_exit(status) }
        }
        _ => {
            drop(open);
            // Ends when the child has closed its copy.
            closed.read_to_end(&mut Vec::new()).map(drop)
        }
    }
}

fn block_signals() {
    let mut all = MaybeUninit::uninit();
    // SAFETY: the set is filled by the first call, and outlives the second, which has no place for the old one.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
    }
}

/// Closes all descriptors from 3 up but `keep`. Whatever owned them must not be used or dropped any more.
fn close_all_but(keep: &[RawFd]) {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    keep.push(RawFd::MAX);
    let mut first = 3;
    for fd in keep {
        if first < fd {
            // SAFETY: a system call without pointers. Who calls has promised the rest.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = first.max(fd.saturating_add(1));
    }
}

/// Makes `attempt` in a child process, and returns what it said went wrong.
///
/// For what cannot be undone. The process must have one thread only.
pub(super) fn attempt_in_child(
    attempt: impl FnOnce() -> Result<(), String>,
) -> io::Result<Result<(), String>> {
    let (mut reader, mut writer) = io::pipe()?;
    // SAFETY: the process has one thread, so all locks and all of memory are consistent in the child. It ends below
    // without running anything of what the parent had in mind: no destructors, no exit handlers.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            let result = catch_unwind(AssertUnwindSafe(attempt)).unwrap_or_else(|_| Err("a bug".into()));
            let status = match result {
                Ok(()) => 0,
                Err(message) => {
                    // What is lost is only the wording.
                    let _ = writer.write_all(message.as_bytes());
                    1
                }
            };
            // SAFETY: ends the child, as promised.
            unsafe { libc::_exit(status) }
        }
        pid => {
            drop(writer);
            let mut message = String::new();
            let read = reader.read_to_string(&mut message);
            let mut status = 0;
            // SAFETY: the child is ours, and the status is an integer that outlives the call.
            while unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            read?;
            Ok(match status {
                0 => Ok(()),
                _ if message.is_empty() => Err("The attempt was killed".into()),
                _ => Err(message),
            })
        }
    }
}

/// `seccomp(2)`: filters the system calls of this thread, and of those that it starts.
pub(super) fn install_filter(program: &[sock_filter]) -> io::Result<()> {
    let mut program: Vec<libc::sock_filter> = program
        .iter()
        .map(|line| libc::sock_filter { code: line.code, jt: line.jt, jf: line.jf, k: line.k })
        .collect();
    let length = program.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // Kernels before 5.16 switch off speculation for filtered processes unless told that they do not run foreign
    // code, which makes all of them slower.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: the program and the vector that it points to live until the call is over, and the kernel copies them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
