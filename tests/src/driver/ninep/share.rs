//! `vhost-user-9p` on a temporary folder, as most tests want it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::client::{Client, Options};
use crate::daemon::{self, Builder, Daemon};

/// Names another program to test, one that takes the flags of `vhost-user-9p`.
const PROGRAM_VARIABLE: &str = "VHOST_USER_9P";

/// The fid that [`Share::client`] attaches to the share.
pub const ROOT: u32 = 0;

/// Prepares to start `vhost-user-9p`.
pub fn ninep_daemon() -> Builder {
    let builder = Daemon::builder("vhost-user-9p");
    match std::env::var_os(PROGRAM_VARIABLE) {
        Some(program) => builder.program(program),
        None => builder,
    }
}

/// A command that runs `vhost-user-9p` to its end, for starts that are meant to fail.
pub fn ninep_command() -> Result<Command> {
    Ok(Command::new(match std::env::var_os(PROGRAM_VARIABLE) {
        Some(program) => program.into(),
        None => daemon::binary("vhost-user-9p")?,
    }))
}

/// A folder in `target`, which lies on a real file system rather than on tmpfs.
pub fn scratch() -> Result<TempDir> {
    let base = std::env::current_exe()?;
    let base = base.parent().context("A test program lies in a folder")?;
    tempfile::Builder::new().prefix("9p-").tempdir_in(base).context("Cannot make a folder")
}

/// A running daemon and the folder that it shares.
pub struct Share {
    /// The daemon.
    pub daemon: Daemon,
    /// Daemons that were killed; the first one's folder holds the socket.
    predecessors: Vec<Daemon>,
    path: PathBuf,
    folder: Option<TempDir>,
}

impl Share {
    /// Starts a daemon with more flags on an empty folder. Beside the folder is another, for what must not be reached.
    pub fn new<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Result<Self> {
        let folder = scratch()?;
        std::fs::create_dir(folder.path().join("share"))?;
        std::fs::create_dir(folder.path().join("outside"))?;
        let mut share = Self::on(&folder.path().join("share"), args)?;
        share.folder = Some(folder);
        Ok(share)
    }

    /// Starts a daemon without more flags.
    pub fn plain() -> Result<Self> {
        Self::new::<&str>([])
    }

    /// Starts a daemon with more flags on a folder that is there.
    pub fn on<A: AsRef<OsStr>>(path: &Path, args: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::by(ninep_daemon(), path, args)
    }

    /// Starts a daemon that was prepared in some special way, with more flags, on a folder that is there.
    pub fn by<A: AsRef<OsStr>>(
        builder: Builder,
        path: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Self> {
        let daemon = builder.arg("--shared-dir").arg(path).args(args).start()?;
        Ok(Self { daemon, predecessors: Vec::new(), path: path.to_owned(), folder: None })
    }

    /// Starts a second daemon with more flags on the same folder.
    pub fn another<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::on(&self.path, args)
    }

    /// Kills the daemon, and starts another on the same socket and folder.
    pub fn replace_daemon(&mut self, args: &[&str]) -> Result<()> {
        self.daemon.kill();
        let daemon =
            ninep_daemon().socket(self.socket()).arg("--shared-dir").arg(&self.path).args(args).start()?;
        self.predecessors.push(std::mem::replace(&mut self.daemon, daemon));
        Ok(())
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    /// The shared folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path below the shared folder.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.path.join(path)
    }

    /// A folder beside the shared one, which must not be reached.
    pub fn outside(&self) -> PathBuf {
        self.path.with_file_name("outside")
    }

    /// Connects without a word of 9P.
    pub fn connect(&self, options: &Options) -> Result<Client> {
        Client::connect(self.socket(), options)
            .with_context(|| format!("Cannot connect to the daemon:\n{}", self.daemon.stderr()))
    }

    /// Connects, agrees on a version, and attaches [`ROOT`].
    pub fn client(&self) -> Result<Client> {
        self.client_with(&Options::default())
    }

    /// The same with options.
    pub fn client_with(&self, options: &Options) -> Result<Client> {
        let mut client = self.connect(options)?;
        client.start_session()?;
        Ok(client)
    }

    /// Checks that a client, and a new one too, are still served.
    pub fn check_alive(&self, client: &mut Client) -> Result<()> {
        client.start_session().context("The connection is not served any more")?;
        client.check_serves()
    }
}

impl Client {
    /// Agrees on a version and attaches [`ROOT`]. What the session had before is gone.
    pub fn start_session(&mut self) -> Result<()> {
        let asked = self.options().msize;
        let (msize, version) = self.version(asked)?;
        ensure!(
            version == super::flags::VERSION,
            "The daemon speaks {:?}",
            String::from_utf8_lossy(&version)
        );
        ensure!(msize <= asked, "The daemon answers an msize of {msize} to {asked}");
        self.attach(ROOT, b"")?;
        Ok(())
    }

    /// Checks that [`ROOT`] is served.
    pub fn check_serves(&mut self) -> Result<()> {
        let attr = self.getattr(ROOT).context("A good request is refused")?;
        ensure!(attr.mode & 0o170_000 == 0o040_000, "The root is no directory: {attr:?}");
        Ok(())
    }
}
