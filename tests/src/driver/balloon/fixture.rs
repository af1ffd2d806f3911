//! `vhost-user-balloon` as most tests want it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::control::Control;
use super::driver::{Driver, Options};
use crate::daemon::{self, Builder, Daemon};
use crate::process;

/// Names another program to test, one that takes the flags of `vhost-user-balloon`.
const PROGRAM_VARIABLE: &str = "VHOST_USER_BALLOON";
/// Longest time to wait for what happens a little later; a loaded machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How often to look at what nothing signals.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Prepares to start `vhost-user-balloon`.
pub fn balloon_daemon() -> Builder {
    let builder = Daemon::builder("vhost-user-balloon");
    match std::env::var_os(PROGRAM_VARIABLE) {
        Some(program) => builder.program(program),
        None => builder,
    }
}

/// A command that runs `vhost-user-balloon` to its end, for starts that are meant to fail.
pub fn balloon_command() -> Result<Command> {
    Ok(Command::new(match std::env::var_os(PROGRAM_VARIABLE) {
        Some(program) => program.into(),
        None => daemon::binary("vhost-user-balloon")?,
    }))
}

/// A running daemon and its control socket.
pub struct BalloonFixture {
    /// The daemon.
    pub daemon: Daemon,
    /// Daemons that were killed; the first one's folder holds the socket.
    predecessors: Vec<Daemon>,
    folder: TempDir,
}

impl BalloonFixture {
    /// Starts a daemon with more flags.
    pub fn new<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Result<Self> {
        // A socket's path is limited to 107 bytes, so the folder lies in the short default place.
        let folder = TempDir::with_prefix("balloon-").context("Cannot make a folder for a control socket")?;
        let control = folder.path().join("control");
        let daemon = with_args(balloon_daemon().arg("--control-socket").arg(control), args).start()?;
        Ok(Self { daemon, predecessors: Vec::new(), folder })
    }

    /// Starts a daemon without more flags.
    pub fn plain() -> Result<Self> {
        Self::new::<&str>([])
    }

    /// Starts a daemon that keeps a state file, with more flags.
    pub fn with_state(args: &[&str]) -> Result<Self> {
        let folder = TempDir::with_prefix("balloon-").context("Cannot make a folder for a control socket")?;
        let daemon = with_args(with_state(balloon_daemon(), folder.path()), args).start()?;
        Ok(Self { daemon, predecessors: Vec::new(), folder })
    }

    /// Starts another daemon that keeps a state file on the same sockets, with more flags, after the last one has ended.
    pub fn start_again(&mut self, args: &[&str]) -> Result<()> {
        let builder = with_state(balloon_daemon(), self.folder.path()).socket(self.socket());
        let daemon = with_args(builder, args).start()?;
        self.predecessors.push(std::mem::replace(&mut self.daemon, daemon));
        Ok(())
    }

    /// Where the daemon listens for front ends.
    pub fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    /// The control socket.
    pub fn control(&self) -> Control {
        Control::new(&self.control_path())
    }

    /// Where the control socket is.
    pub fn control_path(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    /// What `vhost-user-balloon ctl` prints when it is told this.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let mut command = balloon_command()?;
        command.arg("ctl").arg("--socket").arg(self.control_path()).args(args);
        Ok(String::from_utf8(process::run(command, PATIENCE)?.stdout)?)
    }

    /// The state file, if the daemon keeps one.
    pub fn state_file(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Connects a driver, and waits until the daemon has taken notice of its memory and queues.
    pub fn driver(&self, options: &Options) -> Result<Driver> {
        let driver = Driver::connect(self.socket(), options);
        let driver = driver.with_context(|| format!("Cannot connect a driver:\n{}", self.daemon.stderr()))?;
        self.wait_until("the driver is seen", || Ok(self.control().status()?["activity"] != "absent"))?;
        Ok(driver)
    }

    /// Waits until `done` says yes.
    pub fn wait_until(&self, what: &str, done: impl FnMut() -> Result<bool>) -> Result<()> {
        self.wait_until_for(PATIENCE, what, done)
    }

    /// Waits until `done` says yes, but no longer than this.
    pub fn wait_until_for(
        &self,
        limit: Duration,
        what: &str,
        done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        wait_until_for(limit, what, done)
            .with_context(|| format!("The daemon said:\n{}", self.daemon.stderr()))
    }

    /// Waits until a number of the status is this, such as `actual_bytes` or `counters/duplicates`.
    pub fn wait_number(&self, name: &str, expected: u64) -> Result<()> {
        let control = self.control();
        let mut last = 0;
        let waited = wait_until(name, || {
            last = control.number(name)?;
            Ok(last == expected)
        });
        waited.with_context(|| format!("{name} is {last} instead of {expected}; {}", self.daemon.stderr()))
    }

    /// Ends the daemon as a supervisor does, and checks that it ends well.
    pub fn stop(mut self) -> Result<()> {
        let status = self.daemon.terminate(PATIENCE)?;
        if !status.success() {
            bail!("The daemon ended by {status}:\n{}", self.daemon.stderr());
        }
        Ok(())
    }
}

/// Adds flags, and one that lets the balloon take all of a guest's memory unless they say something else.
fn with_args<A: AsRef<OsStr>>(builder: Builder, args: impl IntoIterator<Item = A>) -> Builder {
    const MINIMUM: &str = "--min-guest-memory";
    let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let has_minimum = args.iter().any(|arg| arg == MINIMUM);
    let builder = builder.args(args);
    if has_minimum { builder } else { builder.args([MINIMUM, "0"]) }
}

fn with_state(builder: Builder, folder: &Path) -> Builder {
    let state = folder.join("state");
    builder.arg("--control-socket").arg(folder.join("control")).arg("--state-file").arg(state)
}

/// Calls `done` until it says yes.
pub fn wait_until(what: &str, done: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_until_for(PATIENCE, what, done)
}

fn wait_until_for(limit: Duration, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !done()? {
        if Instant::now() > deadline {
            bail!("Not within {} s: {what}", limit.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}
