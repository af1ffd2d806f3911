//! The chapter of vhost-user-9p: a directory that host and guest have in common.
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, fcntl_lock};
use tempfile::TempDir;

use super::{Chapter, number, say, value, wait};
use crate::daemon::Daemon;
use crate::guest::{Guest, NinepOptions, Running};

const TAG: &str = "demo";
const GREETING: &str = "hello from the host";
/// Long enough to be seen waiting for.
const LOCKED: Duration = Duration::from_millis(500);
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// The daemon and its directory, next to which a file lies that the guest must not see.
pub(super) struct Ninep {
    daemon: Daemon,
    share: PathBuf,
    _folder: TempDir,
}

impl Ninep {
    /// Makes a directory and starts the daemon on it.
    pub(super) fn start() -> Result<Self> {
        let folder = TempDir::with_prefix("demo-").context("Cannot make a temporary folder")?;
        let share = folder.path().join("share");
        let secret = folder.path().join("secret");
        let make = || {
            fs::create_dir_all(share.join("tree"))?;
            fs::write(share.join("from-host"), GREETING)?;
            fs::write(share.join("locked"), "")?;
            fs::write(&secret, "not for the guest")?;
            symlink(&secret, share.join("outside"))
        };
        make().with_context(|| format!("Cannot make a directory to share at {}", share.display()))?;
        let daemon =
            Daemon::builder("vhost-user-9p").arg("--shared-dir").arg(&share).args(["--tag", TAG]).start()?;
        say("daemon", format!("vhost-user-9p, process {}, serves {}", daemon.pid(), share.display()));
        Ok(Self { daemon, share, _folder: folder })
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.share.join(name);
        fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))
    }

    /// The host renames the directory in which the guest works, and both go on with the file in it.
    fn follow_tree(&self, guest: &mut Running) -> Result<()> {
        wait(guest, "9p entered")?;
        let (tree, moved) = (self.share.join("tree"), self.share.join("moved"));
        let append = || {
            let mut log = File::options().append(true).open(tree.join("log"))?;
            log.write_all(b"the host\n")?;
            fs::rename(&tree, &moved)
        };
        append().context("The host cannot change what the guest has made")?;
        guest.send("moved")?;
        wait(guest, "9p followed")?;
        let log = self.read("moved/log")?;
        ensure!(log == "the guest\nthe host\nthe guest again\n", "The common file has\n{log}");
        ensure!(value(guest, "9p.tree")? == "/share/moved/log", "The guest does not see the new name");
        say(
            "tree",
            "guest and host append to one file by turns, and the host renames its directory in between",
        );
        Ok(())
    }

    fn follow_lock(&self, guest: &mut Running) -> Result<()> {
        let mut file = File::options()
            .write(true)
            .open(self.share.join("locked"))
            .context("Cannot open the file to be locked")?;
        fcntl_lock(&file, FlockOperation::LockExclusive).context("Cannot lock a file on the host")?;
        guest.send("locked")?;
        wait(guest, "9p locking")?;
        std::thread::sleep(LOCKED);
        file.write_all(b"the host is done").context("Cannot write to the locked file")?;
        drop(file);
        wait(guest, "9p locked")?;
        let (seen, seconds) = (value(guest, "9p.locked")?, number(guest, "9p.lock_seconds")?);
        ensure!(seen == "the host is done", "The guest got the host's lock too early, and read {seen:?}");
        say("lock", format!("the host has locked a file: the guest's flock waits for it, {seconds:.1} s"));
        Ok(())
    }
}

impl Chapter for Ninep {
    fn name(&self) -> &'static str {
        "9p"
    }

    fn attach(&self, guest: Guest) -> Guest {
        guest.ninep(self.daemon.socket(), NinepOptions::default()).program("flock")
    }

    fn script(&self) -> String {
        include_str!("ninep.sh").to_owned()
    }

    fn follow(&self, guest: &mut Running) -> Result<()> {
        wait(guest, "9p mounted")?;
        let read = value(guest, "9p.read")?;
        ensure!(read == GREETING, "The guest reads {read:?}, not {GREETING:?}");
        say("share", format!("the guest mounts it and reads a file of the host: \"{read}\""));
        wait(guest, "9p written")?;
        let written = self.read("from-guest")?;
        let mode = fs::metadata(self.share.join("from-guest"))
            .context("The guest's file is gone")?
            .permissions()
            .mode();
        ensure!(mode & 0o777 == 0o640, "The guest's file has the mode {mode:o}, not 640");
        say(
            "",
            format!("the host reads one of the guest: \"{}\", mode {:o}", written.trim_end(), mode & 0o777),
        );
        self.follow_tree(guest)?;
        wait(guest, "9p unlinked")?;
        let rest = value(guest, "9p.unlinked")?;
        ensure!(rest == "gone\nbut not lost", "The guest reads {rest:?} from the file that it has removed");
        ensure!(!self.share.join("scratch").exists(), "The file that the guest has removed is there");
        say(
            "unlinked",
            "a file that the guest has open is removed: it writes to it and reads it all the same",
        );
        self.follow_lock(guest)?;
        wait(guest, "9p confined")?;
        let link = value(guest, "9p.link")?;
        say("outside", format!("a link to {link}: there is nothing behind it for the guest"));
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let status = self.daemon.terminate(STOP_LIMIT)?;
        ensure!(status.success(), "vhost-user-9p ended with {status}:\n{}", self.daemon.stderr());
        Ok(())
    }
}
