//! A guest that has the share mounted goes on when the daemon was killed and another one has its state file.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use tempfile::TempDir;
use tests::driver::ninep::client::Client;
use tests::driver::ninep::flags::{self, LOCK_SUCCESS, LOCK_WRLCK, RDONLY, RDWR, REMOVEDIR};
use tests::driver::ninep::message::{R, T};
use tests::driver::ninep::resume::Kept;
use tests::driver::ninep::share::{ROOT, Share, ninep_command};
use tests::driver::ninep::wire::{Data, Lock};
use tests::process;

/// Longest time for a daemon to end.
const END: Duration = Duration::from_secs(20);

/// A share whose daemon has a state file, and a guest.
struct Setup {
    share: Share,
    client: Client,
    kept: Kept,
    folder: TempDir,
    args: Vec<String>,
}

impl Setup {
    fn new(more: &[&str]) -> Result<Self> {
        let folder = TempDir::new()?;
        let state = folder.path().join("state").display().to_string();
        let args: Vec<String> =
            ["--state-file", &state].iter().chain(more).map(ToString::to_string).collect();
        let share = Share::new(&args)?;
        let mut client = share.connect(&Kept::options())?;
        let kept = Kept::new(&mut client)?;
        client.start_session()?;
        Ok(Self { share, client, kept, folder, args })
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// The two state files, the one that counts first.
    fn states(&self) -> Result<[PathBuf; 2]> {
        let (first, second) = (self.state(), self.folder.path().join("state.2"));
        Ok(if fs::metadata(&first)?.len() > 0 { [first, second] } else { [second, first] })
    }

    fn start(&mut self) -> Result<()> {
        let args: Vec<_> = self.args.iter().map(String::as_str).collect();
        self.share.replace_daemon(&args)
    }

    fn resume(&mut self) -> Result<()> {
        Ok(self.kept.resume(&mut self.client, self.share.socket())?)
    }

    /// Kills the daemon, starts another, and goes on with it.
    fn crash(&mut self) -> Result<()> {
        self.share.daemon.kill();
        self.start()?;
        self.resume()
    }
}

fn whole(kind: u8) -> Lock {
    Lock { kind, start: 0, length: 0, proc_id: 1, client_id: b"guest".to_vec() }
}

/// Makes some of everything, has `restart` done, and looks whether it is all there.
fn everything_goes_on(restart: impl Fn(&mut Setup) -> Result<()>) -> Result<()> {
    let mut setup = Setup::new(&[])?;
    let client = &mut setup.client;
    client.mkdir(ROOT, "dir", 0o755)?;
    let dir = client.at("dir")?;
    for index in 0..200 {
        let fid = client.create(dir, format!("file{index}"), 0o644)?;
        client.clunk(fid)?;
    }
    let named = client.at("dir/file7")?;
    client.renameat(dir, "file7", ROOT, "renamed")?;
    let written = client.create(ROOT, "written", 0o644)?;
    client.write(written, 0, b"before ")?;
    let append = client.open("written", flags::WRONLY | flags::APPEND)?;
    client.renameat(ROOT, "written", dir, "moved")?;
    let reader = client.open("renamed", RDONLY)?;
    let listed = client.clone_fid(dir)?;
    client.lopen(listed, RDONLY | flags::DIRECTORY)?;
    let first = client.readdir(listed, 0, 2000)?;
    ensure!(first.len() > 2 && first.len() < 200, "{} entries", first.len());
    let link = setup.share.join("link");
    std::os::unix::fs::symlink("target", &link)?;
    let link = client.at("link")?;
    let clunked = client.at("dir")?;
    client.clunk(clunked)?;
    assert_eq!(client.lock(written, &whole(LOCK_WRLCK), 0)?, LOCK_SUCCESS);

    restart(&mut setup)?;
    let client = &mut setup.client;
    let renamed = fs::metadata(setup.share.join("renamed"))?;
    ensure!(client.getattr(named)?.qid.path.wrapping_add(2) == renamed.ino());
    client.chmod(named, 0o600)?;
    ensure!(fs::metadata(setup.share.join("renamed"))?.mode() & 0o777 == 0o600);
    client.write(written, 7, b"after ")?;
    client.write(append, 0, b"end")?;
    ensure!(client.read(written, 0, 100)? == b"before after end");
    ensure!(fs::read(setup.share.join("dir/moved"))? == b"before after end");
    ensure!(client.read(reader, 0, 100)? == b"");
    assert_eq!(client.write(reader, 0, b"x").unwrap_err(), Errno::BADF, "it is open for reading");
    // The directory from where it was.
    let mut listing: Vec<_> = first.iter().map(|entry| entry.name.clone()).collect();
    let mut offset = first.last().context("there are entries")?.offset;
    loop {
        let more = client.readdir(listed, offset, 2000)?;
        let Some(last) = more.last() else { break };
        offset = last.offset;
        listing.extend(more.iter().map(|entry| entry.name.clone()));
    }
    ensure!(
        listing.len() == 202 && listing.iter().collect::<BTreeSet<_>>().len() == 202,
        "{}",
        listing.len()
    );
    ensure!(client.readlink(link)? == b"target");
    assert_eq!(client.getattr(clunked).unwrap_err(), Errno::BADF, "this one had ended");
    // The lock is there again, for others on the host.
    let other = fs::File::options().write(true).open(setup.share.join("dir/moved"))?;
    ensure!(!can_lock(&other)?, "the lock is held");
    client.clunk(written)?;
    ensure!(can_lock(&other)?, "the lock is gone with the fid");
    let child = client.at_fid(dir, &["file9"])?;
    client.getattr(child)?;
    let up = client.at_fid(dir, &[".."])?;
    ensure!(client.getattr(up)?.qid == client.getattr(ROOT)?.qid);
    client.check_serves()?;
    setup.share.daemon.wait_stderr("session goes on", END)
}

fn can_lock(file: &fs::File) -> Result<bool> {
    match rustix::fs::fcntl_lock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {
            rustix::fs::fcntl_lock(file, rustix::fs::FlockOperation::Unlock)?;
            Ok(true)
        }
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[test]
fn a_guest_outlives_a_daemon_that_was_killed() -> Result<()> {
    everything_goes_on(Setup::crash)
}

#[test]
fn a_guest_outlives_several_daemons() -> Result<()> {
    everything_goes_on(|setup| (0..3).try_for_each(|_| setup.crash()))
}

#[test]
fn a_guest_outlives_an_upgrade() -> Result<()> {
    everything_goes_on(|setup| {
        let status = setup.share.daemon.terminate(END)?;
        ensure!(status.success(), "{status}");
        setup.start()?;
        setup.resume()
    })
}

#[test]
fn a_guest_outlives_its_connection() -> Result<()> {
    everything_goes_on(Setup::resume)
}

#[test]
fn requests_in_flight_are_answered_by_the_next_daemon() -> Result<()> {
    let mut setup = Setup::new(&[])?;
    let mut model = Vec::new();
    let file = setup.client.create(ROOT, "file", 0o644)?;
    for round in 0..12_u64 {
        let client = &mut setup.client;
        let data = vec![round as u8 + 1; 60_000];
        let mut pending = Vec::new();
        let mut send = |client: &mut Client, request: &T<'_>| {
            let tag = client.submit(request);
            pending.push((tag, format!("{request:?}").chars().take(60).collect::<String>()));
        };
        let opened = client.clone_fid(ROOT)?;
        let gone = client.at("file")?;
        let new = client.new_fid();
        for part in 0..4 {
            let offset = (round * 4 + part) * data.len() as u64;
            send(client, &T::Write { fid: file, offset, data: Data(&data) });
        }
        let name = format!("new{round}");
        send(client, &T::Walk { fid: ROOT, newfid: new, names: vec![b"file"] });
        let flags = flags::RDWR | flags::CREATE | flags::EXCL;
        send(client, &T::Lcreate { fid: opened, name: name.as_bytes(), flags, mode: 0o644, gid: 0 });
        send(client, &T::Clunk { fid: gone });
        send(client, &T::Getattr { fid: ROOT, mask: flags::GETATTR_ALL });
        // From "has not looked yet" to "has done some".
        std::thread::sleep(Duration::from_micros(60 * round));
        setup.crash()?;
        let client = &mut setup.client;
        for (tag, what) in pending {
            let reply = client.wait(tag);
            ensure!(!matches!(reply.message(), R::Lerror { .. }), "round {round}: {what}: {reply:?}");
        }
        model.extend(data.repeat(4));
        ensure!(client.write(opened, 0, b"made")? == 4);
        client.getattr(new)?;
        assert_eq!(client.getattr(gone).unwrap_err(), Errno::BADF);
        ensure!(fs::read(setup.share.join(&name))? == b"made");
        ensure!(fs::read(setup.share.join("file"))? == model, "round {round}");
    }
    Ok(())
}

#[test]
fn what_is_lost_is_an_error() -> Result<()> {
    let mut setup = Setup::new(&[])?;
    let client = &mut setup.client;
    let nameless = client.create(ROOT, "nameless", 0o644)?;
    client.unlinkat(ROOT, "nameless", 0)?;
    let replaced = client.create(ROOT, "replaced", 0o644)?;
    let locked = client.create(ROOT, "locked", 0o644)?;
    assert_eq!(client.lock(locked, &whole(LOCK_WRLCK), 0)?, LOCK_SUCCESS);
    let gone_dir = client.mkdir(ROOT, "gone", 0o755).and_then(|_| client.at("gone"))?;
    let attribute = client.clone_fid(locked)?;
    client.xattrcreate(attribute, "user.x", 3, 0)?;
    client.write(attribute, 0, b"ab")?;
    setup.share.daemon.kill();
    fs::remove_file(setup.share.join("replaced"))?;
    fs::write(setup.share.join("replaced"), "by the host")?;
    fs::remove_dir(setup.share.join("gone"))?;
    let other = fs::File::options().write(true).open(setup.share.join("locked"))?;
    ensure!(can_lock(&other)?, "the lock was the daemon's");
    rustix::fs::fcntl_lock(&other, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    setup.start()?;
    setup.resume()?;
    let client = &mut setup.client;
    for fid in [nameless, replaced, locked] {
        assert_eq!(client.write(fid, 0, b"x").unwrap_err(), Errno::IO);
        assert_eq!(client.read(fid, 0, 10).unwrap_err(), Errno::IO);
        client.fsync(fid, 0).unwrap_err();
    }
    for fid in [nameless, replaced, gone_dir] {
        assert_eq!(client.getattr(fid).unwrap_err(), Errno::STALE);
    }
    assert_eq!(client.write(attribute, 2, b"c").unwrap_err(), Errno::IO);
    assert_eq!(client.clunk(attribute).unwrap_err(), Errno::IO, "the attribute was not set");
    assert_eq!(client.getattr(attribute).unwrap_err(), Errno::BADF);
    for fid in [nameless, replaced, locked, gone_dir] {
        client.clunk(fid)?;
    }
    ensure!(fs::read(setup.share.join("replaced"))? == b"by the host");
    client.check_serves()?;
    setup.share.daemon.wait_stderr("are lost", END)
}

#[test]
fn without_handles_files_are_found_by_their_paths() -> Result<()> {
    let mut setup = Setup::new(&["--sandbox", "landlock"])?;
    let client = &mut setup.client;
    client.mkdir(ROOT, "dir", 0o755)?;
    let dir = client.at("dir")?;
    let open = client.create(dir, "open", 0o644)?;
    let named = client.at("dir/open")?;
    let made = client.create(dir, "moved", 0o644)?;
    client.clunk(made)?;
    let moved = client.at("dir/moved")?;
    client.renameat(dir, "moved", ROOT, "elsewhere")?;
    setup.crash()?;
    let client = &mut setup.client;
    client.write(open, 0, b"content")?;
    ensure!(client.getattr(named)?.size == 7);
    assert_eq!(client.getattr(moved).unwrap_err(), Errno::STALE);
    let again = client.at("elsewhere")?;
    client.getattr(again)?;
    client.at_fid(dir, &["open"])?;
    Ok(())
}

#[test]
fn nothing_is_made_or_cut_when_files_are_opened_again() -> Result<()> {
    let mut setup = Setup::new(&[])?;
    fs::write(setup.share.join("file"), "content")?;
    let fid = setup.client.open("file", RDWR | flags::TRUNC)?;
    setup.client.write(fid, 0, b"new")?;
    setup.crash()?;
    ensure!(setup.client.read(fid, 0, 10)? == b"new");
    Ok(())
}

#[test]
fn a_fresh_guest_is_not_concerned() -> Result<()> {
    let mut setup = Setup::new(&[])?;
    let fid = setup.client.create(ROOT, "file", 0o644)?;
    setup.crash()?;
    let mut fresh = {
        let Setup { client, .. } = &mut setup;
        client.version(8192)?;
        client
    };
    for fid in [fid, ROOT] {
        assert_eq!(fresh.getattr(fid).unwrap_err(), Errno::BADF);
    }
    fresh.attach(ROOT, b"")?;
    let again = fresh.at("file")?;
    // From then on it is this session that goes on.
    setup.crash()?;
    fresh = &mut setup.client;
    fresh.getattr(again)?;
    if again != fid {
        assert_eq!(fresh.getattr(fid).unwrap_err(), Errno::BADF);
    }
    fresh.mkdir(ROOT, "dir", 0o755)?;
    fresh.unlinkat(ROOT, "dir", REMOVEDIR)?;
    Ok(())
}

#[test]
fn without_a_state_file_the_guest_gets_errors() -> Result<()> {
    let mut share = Share::plain()?;
    let mut client = share.connect(&Kept::options())?;
    let kept = Kept::new(&mut client)?;
    client.start_session()?;
    share.replace_daemon(&[])?;
    kept.resume(&mut client, share.socket())?;
    assert_eq!(client.getattr(ROOT).unwrap_err(), Errno::IO);
    share.daemon.wait_stderr("--state-file", END)?;
    // It may mount again.
    client.start_session()?;
    client.check_serves()
}

#[test]
fn a_record_that_was_cut_off_is_left_out() -> Result<()> {
    let mut setup = Setup::new(&[])?;
    let kept = setup.client.create(ROOT, "kept", 0o644)?;
    let state = setup.states()?[0].clone();
    let len = fs::metadata(&state)?.len();
    let cut = setup.client.create(ROOT, "cut", 0o644)?;
    setup.share.daemon.kill();
    fs::File::options().write(true).open(&state)?.set_len(len + 5)?;
    setup.start()?;
    setup.resume()?;
    setup.client.write(kept, 0, b"x")?;
    assert_eq!(setup.client.getattr(cut).unwrap_err(), Errno::BADF);
    // What comes then stands where the rest was.
    let later = setup.client.create(ROOT, "later", 0o644)?;
    setup.crash()?;
    setup.client.write(later, 0, b"x")?;
    setup.client.write(kept, 0, b"x")?;
    Ok(())
}

/// Starts a daemon that must not start, and returns what it says.
fn refused(setup: &Setup) -> Result<String> {
    let mut command = ninep_command()?;
    command.arg("--shared-dir").arg(setup.share.path()).args(&setup.args);
    command.arg("--socket-path").arg(setup.folder.path().join("socket"));
    Ok(process::run(command, END).err().context("It was to be refused")?.to_string())
}

#[test]
fn what_is_no_state_file_is_refused() -> Result<()> {
    let mut setup = Setup::new(&[])?;
    let text = refused(&setup)?;
    ensure!(text.contains("in use"), "{text}");
    setup.share.daemon.kill();
    let state = setup.states()?[0].clone();
    let whole = fs::read(&state)?;
    ensure!(fs::metadata(&state)?.permissions().mode() & 0o777 == 0o600);
    let write = |path: &Path, bytes: &[u8]| fs::write(path, bytes);
    for (bytes, expected) in [
        (b"a diary of somebody else, which is longer".to_vec(), "no state file"),
        (b"short".to_vec(), "no state file"),
        ([&whole[..30], b"garbage"].concat(), "damaged"),
    ] {
        write(&state, &bytes)?;
        if expected == "damaged" {
            fs::write(&state, &whole)?;
            fs::File::options().write(true).open(&state)?.write_all_at(b"garbage", 30)?;
        }
        let text = refused(&setup)?;
        ensure!(text.contains(expected) && text.contains("state"), "{text}");
    }
    Ok(())
}
