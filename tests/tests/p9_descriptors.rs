//! A guest has more fids than the daemon may have files open.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use tests::driver::ninep::client::Client;
use tests::driver::ninep::flags;
use tests::driver::ninep::share::{ROOT, Share, ninep_daemon, scratch};
use tests::netns::Namespace;

/// What the daemon may have open: half of it for fids.
const LIMIT: u32 = 128;
const FILES: usize = 5000;
const FOLDERS: usize = 20;

fn name(index: usize) -> String {
    format!("d{}/f{index}", index % FOLDERS)
}

fn fill(path: &Path) -> Result<()> {
    for folder in 0..FOLDERS {
        fs::create_dir(path.join(format!("d{folder}")))?;
    }
    for index in 0..FILES {
        fs::write(path.join(name(index)), format!("content {index}"))?;
    }
    Ok(())
}

/// Who the daemon is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum User {
    /// Root, who finds files by their handles.
    Root,
    /// Somebody else, who finds them by their paths.
    Ordinary,
}

/// Starts a daemon with few descriptors and calls `test` with a fid for each file.
fn with_fids(user: User, test: impl FnOnce(&Share, &mut Client, &[u32]) -> Result<()>) -> Result<()> {
    let folder = scratch()?;
    let path = folder.path().join("share");
    fs::create_dir(&path)?;
    fill(&path)?;
    let namespace = Namespace::new()?;
    let builder = ninep_daemon().file_limit(LIMIT);
    let builder = if user == User::Root { builder } else { builder.inside(&namespace.ordinary_user()) };
    let share = Share::by(builder, &path, [] as [&str; 0])?;
    let mut client = share.client()?;
    let folders: Vec<_> =
        (0..FOLDERS).map(|folder| client.at(format!("d{folder}"))).collect::<Result<_, _>>()?;
    let mut fids = Vec::new();
    for index in 0..FILES {
        let fid = client.new_fid();
        client.walk(folders[index % FOLDERS], fid, &[format!("f{index}")])?;
        fids.push(fid);
    }
    ensure!(open_files(&share)? < LIMIT as usize, "the daemon keeps to its limit");
    test(&share, &mut client, &fids).with_context(|| share.daemon.stderr())
}

fn open_files(share: &Share) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", share.daemon.pid()))?.count())
}

fn check(share: &Share, client: &mut Client, index: usize, fid: u32, path: &str) -> Result<()> {
    let expected = fs::metadata(share.join(path))?;
    let attr = client.getattr(fid).with_context(|| format!("getattr of file {index}"))?;
    ensure!(attr.qid.path.wrapping_add(2) == expected.ino(), "file {index} is another one");
    let opened = client.clone_fid(fid)?;
    client.lopen(opened, flags::RDWR).with_context(|| format!("open of file {index}"))?;
    ensure!(client.read_full(opened, 100)? == format!("content {index}").as_bytes(), "content of {index}");
    client.clunk(opened)?;
    Ok(())
}

/// Everything works through fids whose descriptors were closed long ago, and are closed meanwhile (CVE-2021-20181: a server
/// that closed what was in use).
fn old_fids_work(user: User) -> Result<()> {
    with_fids(user, |share, client, fids| {
        for (index, fid) in fids.iter().enumerate() {
            check(share, client, index, *fid, &name(index))?;
        }
        for index in (0..FILES).step_by(7) {
            client.chmod(fids[index], 0o640)?;
            ensure!(fs::metadata(share.join(name(index)))?.mode() & 0o777 == 0o640);
        }
        // By old fids of directories too.
        let folder = client.at("d3")?;
        for fid in &fids[..200] {
            client.getattr(*fid)?;
        }
        client.renameat(folder, "f3", ROOT, "moved")?;
        client.unlinkat(folder, "f23", 0)?;
        ensure!(share.join("moved").exists() && !share.join("d3/f23").exists());
        client.mkdir(folder, "new", 0o755)?;
        client.link(folder, fids[4], "linked")?;
        ensure!(fs::metadata(share.join("d3/linked"))?.ino() == fs::metadata(share.join(name(4)))?.ino());
        // And they end, every one.
        for fid in fids {
            client.clunk(*fid)?;
        }
        client.check_serves()
    })
}

#[test]
fn old_fids_work_for_root() -> Result<()> {
    old_fids_work(User::Root)
}

#[test]
fn old_fids_work_for_an_ordinary_user() -> Result<()> {
    old_fids_work(User::Ordinary)
}

#[test]
fn what_the_guest_or_the_host_renames_is_found_by_its_handle() -> Result<()> {
    with_fids(User::Root, |share, client, fids| {
        let folder = client.at("d0")?;
        client.renameat(folder, "f0", ROOT, "by guest")?;
        fs::rename(share.join(name(1)), share.join("by host"))?;
        fs::rename(share.join("d2"), share.join("renamed"))?;
        check(share, client, 0, fids[0], "by guest")?;
        check(share, client, 1, fids[1], "by host")?;
        check(share, client, 2, fids[2], "renamed/f2")?;
        check(share, client, 22, fids[22], "renamed/f22")?;
        // Another one of the same name is another one.
        fs::remove_file(share.join(name(3)))?;
        fs::write(share.join(name(3)), "other")?;
        assert_eq!(client.getattr(fids[3]).unwrap_err(), Errno::STALE);
        Ok(())
    })
}

#[test]
fn what_is_renamed_is_not_mistaken_for_another_without_handles() -> Result<()> {
    with_fids(User::Ordinary, |share, client, fids| {
        fs::rename(share.join(name(1)), share.join("by host"))?;
        fs::rename(share.join(name(2)), share.join(name(3)))?;
        fs::remove_file(share.join(name(4)))?;
        fs::write(share.join(name(4)), "other")?;
        std::os::unix::fs::symlink("f25", share.join(name(1)))?;
        for fid in &fids[1..=4] {
            assert_eq!(client.getattr(*fid).unwrap_err(), Errno::STALE, "{fid}");
        }
        check(share, client, 5, fids[5], &name(5))
    })
}

#[test]
fn open_files_are_kept_when_they_lose_their_names() -> Result<()> {
    for user in [User::Root, User::Ordinary] {
        with_fids(user, |share, client, fids| {
            let open: Vec<_> = (0..10).map(|index| fids[index]).collect();
            for fid in &open {
                client.lopen(*fid, flags::RDWR)?;
            }
            for fid in &fids[10..300] {
                client.getattr(*fid)?;
            }
            for index in 0..10 {
                fs::remove_file(share.join(name(index)))?;
            }
            for fid in &fids[10..300] {
                client.getattr(*fid)?;
            }
            for fid in open {
                ensure!(client.getattr(fid)?.nlink == 0);
                client.chmod(fid, 0o600)?;
                client.truncate(fid, 3)?;
                ensure!(client.read(fid, 0, 100)? == b"con");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn open_files_may_use_up_all() -> Result<()> {
    with_fids(User::Root, |share, client, fids| {
        let mut open = Vec::new();
        let error = loop {
            let fid = fids[open.len()];
            match client.lopen(fid, flags::RDONLY) {
                Ok(_) => open.push(fid),
                Err(error) => break error,
            }
            ensure!(open.len() < LIMIT as usize, "{} files are open", open.len());
        };
        assert_eq!(error, Errno::NFILE);
        ensure!(open.len() > LIMIT as usize / 4, "only {} can be open", open.len());
        for fid in open {
            ensure!(client.read(fid, 0, 100)?.starts_with(b"content"));
            client.clunk(fid)?;
        }
        check(share, client, 4999, fids[4999], &name(4999))
    })
}
