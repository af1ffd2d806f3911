//! Seccomp: system calls that no daemon makes are refused.
//!
//! A list of what is allowed would be stricter, and wrong: which calls a C library makes for the same function depends
//! on its version, the architecture and the moment, and a daemon that is killed in its sleep after an upgrade helps
//! nobody. So this lists what is refused, by purpose, and a refused call fails with EPERM instead of killing. All of
//! it is what a process that was taken over would try next: run a program, attack another process or the kernel,
//! reach the network, leave the namespaces, or go around this filter (io_uring, the x32 calls).

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::Needs;

/// Refused whatever their arguments.
const REFUSED: &[c_long] = &[
    // Other programs. (`clone` can only make threads, see below.)
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Other namespaces, other mounts.
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // The kernel itself: its parts with the longest lists of holes, and its settings.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_personality,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_settimeofday,
    libc::SYS_adjtimex,
];

/// Refused as well, on the architecture that has them.
#[cfg(target_arch = "x86_64")]
const REFUSED_HERE: &[c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_kexec_file_load,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[c_long] = &[];

/// Flags with which `unshare` and `clone` make namespaces.
const NAMESPACES: [c_int; 8] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
    0x80, // CLONE_NEWTIME
];

/// The filter for a process that needs `needs`. An error on an architecture for which it cannot be made.
pub(super) fn filter(needs: Needs) -> Result<BpfProgram, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().chain(REFUSED_HERE).map(|number| (*number, Vec::new())).collect();
    if !needs.contains(Needs::IO_URING) {
        // It opens files and sockets without a system call for each.
        for number in [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register] {
            rules.insert(number, Vec::new());
        }
    }
    if !needs.contains(Needs::FILE_HANDLES) {
        // Finds files anywhere on a file system, shared or not.
        rules.insert(libc::SYS_open_by_handle_at, Vec::new());
    }
    rules.insert(libc::SYS_socket, vec![rule(SeccompCmpOp::Ne, libc::AF_UNIX)?]);
    // A thread may still have a working directory of its own.
    let unshare: Result<_, _> = NAMESPACES.into_iter().map(has_bit).collect();
    rules.insert(libc::SYS_unshare, unshare?);
    let no_thread = SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64);
    rules.insert(libc::SYS_clone, vec![rule(no_thread, 0)?]);
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch)?;
    let listed: BpfProgram = filter.try_into()?;
    Ok(unknown_calls().into_iter().chain(listed).collect())
}

/// The first argument is such a number.
fn rule(is: SeccompCmpOp, number: c_int) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Dword, is, number as u64)?])
}

/// The first argument has this bit.
fn has_bit(bit: c_int) -> Result<SeccompRule, BackendError> {
    rule(SeccompCmpOp::MaskedEq(bit as u64), bit)
}

/// The beginning of the filter: calls that the kernel does not have, as the process is to believe (ENOSYS).
///
/// `clone3`, whose flags no filter can see; every C library falls back to `clone`. And the x32 calls, which are other
/// numbers for the calls in the list.
fn unknown_calls() -> [sock_filter; 4] {
    /// The number of the system call in `struct seccomp_data`.
    const NUMBER: u32 = 0;
    /// `__X32_SYSCALL_BIT`. No architecture has a call with such a number of its own.
    const X32: u32 = 0x4000_0000;
    let statement = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    [
        statement((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, NUMBER),
        statement((libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16, 1, 0, X32),
        statement((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, 0, 1, libc::SYS_clone3 as u32),
        statement((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}
