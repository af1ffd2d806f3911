//! Why a process could not be confined.

use std::io;
use std::path::PathBuf;

use rustix::process::geteuid;

/// Why [`Sandbox::enter`](super::Sandbox::enter) failed. The process may be half confined then, and has to end.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Only the calling thread would be confined. A bug of the daemon, which enters too late.
    #[error("The sandbox is entered by a process that has {count} threads already, where only one may be")]
    Threads {
        /// How many there are.
        count: usize,
    },

    /// The system has no /proc at its place, so that no descriptor can be opened again.
    #[error("Cannot open /proc/self/fd: mount proc on /proc")]
    Proc(#[source] io::Error),

    /// What is to stay reachable is missing, is not a directory, or is not accessible.
    #[error(
        "Cannot open directory {}: check that it exists and that user {} may search it and those above it",
        path.display(), geteuid().as_raw()
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The process that looks after the sockets cannot be started.
    #[error("Cannot start a process that looks after the socket: raise the limit of processes (ulimit -u)")]
    Keeper(#[source] io::Error),

    /// The kernel, its configuration or the surrounding container refuses namespaces.
    #[error(
        "Cannot enter the namespaces of the sandbox (step: {step}): run the daemon with CAP_SYS_ADMIN, or allow \
         user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, \
         kernel.apparmor_restrict_unprivileged_userns=0; a container's seccomp profile), or use --sandbox landlock \
         or --sandbox none"
    )]
    Namespace {
        /// What was refused.
        step: &'static str,
        /// Why.
        source: io::Error,
    },

    /// Without CAP_SYS_ADMIN it takes a user namespace, in which the other capabilities say nothing about host files.
    #[error(
        "The daemon needs capabilities ({capabilities}) that it would lose in a user namespace: give it \
         CAP_SYS_ADMIN as well, or use --sandbox landlock or --sandbox none"
    )]
    CapabilitiesLost {
        /// Their names.
        capabilities: String,
    },

    /// The kernel has no Landlock, or one that is too old to allow renames between directories (before 5.19).
    #[error(
        "Landlock is not available: boot a kernel from 5.19 on with landlock among its security modules (lsm=), or \
         use --sandbox namespace or --sandbox none"
    )]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),

    /// Capabilities cannot be given up.
    #[error("Cannot give up privileges (step: {step})")]
    Privileges {
        /// What was refused.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}
