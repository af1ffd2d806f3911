//! Directories that are shared with guests, by the daemon or by QEMU itself.
//!
//! QEMU's own virtio-9p is what the daemon is compared with: `VHOST_USER_TEST_9P=qemu` runs the same tests on it.
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::guest::{Guest, NinepOptions};

const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Who serves a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// `vhost-user-9p`.
    Daemon,
    /// QEMU's virtio-9p.
    Qemu,
}

impl Server {
    /// The one that `VHOST_USER_TEST_9P` names: `daemon` (also without the variable) or `qemu`.
    pub fn of_environment() -> Result<Self> {
        match std::env::var("VHOST_USER_TEST_9P").as_deref() {
            Ok("daemon" | "") | Err(_) => Ok(Self::Daemon),
            Ok("qemu") => Ok(Self::Qemu),
            Ok(other) => bail!("VHOST_USER_TEST_9P is {other}; it can be daemon or qemu"),
        }
    }
}

/// A directory and who serves it. A guest mounts it by its tag.
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
    tag: String,
    security_model: &'static str,
    daemon: Option<Daemon>,
    _folder: Option<TempDir>,
}

impl Share {
    /// Shares a new, empty directory, of which everything is the guest's: root of the guest may give files to anybody.
    /// Where the tests run as root the files have the owners that the guest sees, otherwise they are kept in extended
    /// attributes.
    pub fn new(tag: &str) -> Result<Self> {
        let folder = TempDir::with_prefix("share-").context("Cannot make a folder to share")?;
        // Others than its owner are to be able to enter: the guest's users.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).context("Cannot open the folder for others")?;
        let path = folder.path().to_owned();
        Ok(Self { _folder: Some(folder), ..Self::of(path, tag, default_model(), &[] as &[&str])? })
    }

    /// Shares `path` under `tag` with one of the security models that daemon and QEMU have in common. `args` are more
    /// arguments of the daemon; QEMU knows none of them.
    pub fn of(
        path: impl Into<PathBuf>,
        tag: &str,
        security_model: &'static str,
        args: &[impl AsRef<OsStr>],
    ) -> Result<Self> {
        let path = path.into();
        let daemon = match Server::of_environment()? {
            Server::Qemu => None,
            Server::Daemon => {
                let daemon = Daemon::builder("vhost-user-9p").arg("--shared-dir").arg(&path);
                let daemon = daemon.args(["--tag", tag, "--security-model", security_model]).args(args);
                Some(daemon.start()?)
            }
        };
        Ok(Self { path, tag: tag.to_owned(), security_model, daemon, _folder: None })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The daemon; `None` if QEMU serves the directory.
    pub fn daemon(&self) -> Option<&Daemon> {
        self.daemon.as_ref()
    }

    /// Attaches the share to a guest. A daemon has one guest at a time.
    #[must_use]
    pub fn attach(&self, guest: Guest) -> Guest {
        match &self.daemon {
            Some(daemon) => guest.ninep(daemon.socket(), NinepOptions::default()),
            None => guest.ninep_in_process(&self.path, &self.tag, self.security_model),
        }
    }

    /// Ends the daemon as its user would, and looks at what it says about that.
    pub fn stop(mut self) -> Result<()> {
        if let Some(daemon) = &mut self.daemon {
            let status = daemon.terminate(STOP_LIMIT)?;
            ensure!(status.success(), "{status}: {}", daemon.stderr());
        }
        Ok(())
    }
}

/// The security model that lets a guest's root act as root, whoever runs the tests.
pub fn default_model() -> &'static str {
    if rustix::process::geteuid().is_root() { "passthrough" } else { "mapped-xattr" }
}

/// How a guest caches what it reads from a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: each access asks the server. Files cannot be mapped for shared writing.
    None,
    /// File contents that were read, ahead of time.
    Readahead,
    /// File contents, written back later; so that files can be mapped.
    Mmap,
    /// Everything, and it is never asked for again: for a directory that nobody else changes.
    Loose,
}

impl Cache {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::None, Self::Readahead, Self::Mmap, Self::Loose];

    /// The value of the mount option `cache=`.
    ///
    /// 6.1 does not know `readahead`; `extended` says whether the kernel takes it.
    pub fn option(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Readahead => "readahead",
            Self::Mmap => "mmap",
            Self::Loose => "loose",
        }
    }
}
