//! What a file system promises beyond single messages: files without a name, replaced names, names of any bytes, deep
//! paths, large files, directories that change while they are read.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::Result;
use rustix::io::Errno;
use tests::driver::ninep::Share;
use tests::driver::ninep::flags::{self, REMOVEDIR};
use tests::driver::ninep::share::{ROOT, ninep_daemon, scratch};
use tests::driver::ninep::wire::{Dirent, SetAttr, Time};
use tests::netns::Namespace;

#[test]
fn a_file_without_a_name_is_whole() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    let closed = client.at("file")?;
    client.write(fid, 0, b"content")?;
    client.set_xattr(fid, "user.before", b"1", 0)?;
    let before = client.getattr(fid)?;
    client.unlinkat(ROOT, "file", 0)?;
    assert!(!share.join("file").exists());

    for fid in [fid, closed] {
        let attr = client.getattr(fid)?;
        assert_eq!((attr.nlink, attr.size, attr.qid.path), (0, before.size, before.qid.path));
        client.chmod(fid, 0o600)?;
        assert_eq!(client.getattr(fid)?.mode, 0o100_600);
        client.chown(fid, before.uid, before.gid)?;
        client.truncate(fid, 5)?;
        let times = SetAttr {
            valid: flags::SETATTR_MTIME | flags::SETATTR_MTIME_SET,
            mtime: Time { sec: 1_000_000, nsec: 5 },
            ..SetAttr::default()
        };
        client.setattr(fid, times)?;
        assert_eq!(client.getattr(fid)?.mtime, Time { sec: 1_000_000, nsec: 5 });
        assert_eq!(client.xattr(fid, "user.before")?, b"1");
        client.set_xattr(fid, "user.after", b"22", 0)?;
        assert_eq!(client.xattr(fid, "user.after")?, b"22");
        client.remove_xattr(fid, "user.after")?;
        // Open it once more by a clone, as Linux does.
        let again = client.clone_fid(fid)?;
        client.lopen(again, flags::RDWR)?;
        assert_eq!(client.read(again, 0, 100)?, b"conte");
        client.write(again, 0, b"CO")?;
        client.write(again, 0, b"co")?;
        client.fsync(again, 0)?;
        client.clunk(again)?;
        client.statfs(fid)?;
        client.chmod(fid, 0o644)?;
        client.truncate(fid, before.size)?;
        let again = client.clone_fid(fid)?;
        client.lopen(again, flags::WRONLY)?;
        client.write(again, 0, b"content")?;
    }
    assert_eq!(client.read(fid, 0, 100)?, b"content");
    assert_eq!(client.at("file"), Err(Errno::NOENT));
    Ok(())
}

#[test]
fn a_file_without_a_name_may_not_get_one_by_chance() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    client.write(fid, 0, b"old")?;
    client.unlinkat(ROOT, "file", 0)?;
    fs::write(share.join("file"), "new one")?;
    assert_eq!(client.read(fid, 0, 100)?, b"old");
    assert_eq!(client.getattr(fid)?.size, 3);
    client.truncate(fid, 0)?;
    client.chmod(fid, 0o777)?;
    assert_eq!(fs::read(share.join("file"))?, b"new one");
    assert_eq!(fs::metadata(share.join("file"))?.mode() & 0o777, 0o644);
    // Removing by that fid must not take the new file.
    let _ = client.remove(fid);
    assert_eq!(fs::read(share.join("file"))?, b"new one");
    Ok(())
}

#[test]
fn a_file_that_was_renamed_over_keeps_its_fid() -> Result<()> {
    let share = Share::plain()?;
    fs::write(share.join("old"), "old")?;
    fs::write(share.join("new"), "the new one")?;
    let mut client = share.client()?;
    let open = client.open("old", flags::RDWR)?;
    let closed = client.at("old")?;
    let before = client.getattr(open)?;
    let new = client.at("new")?;
    client.renameat(ROOT, "new", ROOT, "old")?;
    for fid in [open, closed] {
        let attr = client.getattr(fid)?;
        assert_eq!((attr.qid.path, attr.size, attr.nlink), (before.qid.path, 3, 0));
    }
    assert_eq!(client.read(open, 0, 100)?, b"old");
    assert_eq!(client.getattr(new)?.size, 11, "the fid went along with the file");
    assert_eq!(client.stat("old")?.qid.path, client.getattr(new)?.qid.path);
    client.lopen(closed, flags::RDONLY)?;
    assert_eq!(client.read(closed, 0, 100)?, b"old");
    Ok(())
}

#[test]
fn fids_survive_whatever_happens_to_the_path() -> Result<()> {
    let share = Share::plain()?;
    fs::create_dir_all(share.join("a/b/c"))?;
    fs::write(share.join("a/b/c/file"), "1")?;
    let mut client = share.client()?;
    let dir = client.at("a/b/c")?;
    let file = client.at("a/b/c/file")?;
    // The host renames a directory above, and puts another one in its place.
    fs::rename(share.join("a"), share.join("z"))?;
    fs::create_dir_all(share.join("a/b/c"))?;
    fs::write(share.join("a/b/c/file"), "another")?;
    assert_eq!(client.getattr(file)?.size, 1);
    let below = client.at_fid(dir, &["file"])?;
    assert_eq!(client.getattr(below)?.qid, client.getattr(file)?.qid);
    client.create(dir, "made", 0o644)?;
    assert!(share.join("z/b/c/made").exists());
    client.renameat(dir, "made", dir, "renamed")?;
    assert!(share.join("z/b/c/renamed").exists());
    let up = client.at_fid(dir, &[".."])?;
    assert_eq!(client.getattr(up)?.qid.path, fs::metadata(share.join("z/b"))?.ino().wrapping_sub(2));
    // A directory that was removed has no entries and takes none.
    client.unlinkat(dir, "file", 0)?;
    client.unlinkat(dir, "renamed", 0)?;
    let above = client.at("z/b")?;
    client.unlinkat(above, "c", REMOVEDIR)?;
    assert_eq!(client.getattr(dir)?.mode & 0o170_000, 0o040_000);
    assert_eq!(client.create(dir, "x", 0o644), Err(Errno::NOENT));
    assert_eq!(client.mkdir(dir, "x", 0o755), Err(Errno::NOENT));
    assert_eq!(client.at_fid(dir, &["file"]), Err(Errno::NOENT));
    let open = client.clone_fid(dir)?;
    client.lopen(open, flags::RDONLY)?;
    assert_eq!(client.list(open), Ok(Vec::new()));
    Ok(())
}

#[test]
fn paths_may_be_longer_than_path_max() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let name = "d".repeat(200);
    let mut dir = client.clone_fid(ROOT)?;
    let mut fids = Vec::new();
    for level in 0..30 {
        client.mkdir(dir, &name, 0o755)?;
        fids.push(dir);
        dir = client.at_fid(dir, &[&name])?;
        assert_eq!(client.getattr(dir)?.nlink, 2, "level {level}");
    }
    let file = client.create(dir, "file", 0o644)?;
    client.write(file, 0, b"deep")?;
    assert_eq!(client.read(file, 0, 10)?, b"deep");
    client.set_xattr(file, "user.deep", b"1", 0)?;
    client.symlink(dir, "link", "file")?;
    client.link(dir, file, "second")?;
    client.renameat(dir, "second", dir, "third")?;
    client.chmod(file, 0o600)?;
    let open = client.clone_fid(dir)?;
    client.lopen(open, flags::RDONLY)?;
    assert_eq!(client.list(open)?.len(), 5);
    for _ in 0..30 {
        dir = client.at_fid(dir, &[".."])?;
    }
    assert_eq!(client.getattr(dir)?.qid.path, client.getattr(ROOT)?.qid.path);
    // The top directory moves with all that is below.
    client.renameat(ROOT, &name, ROOT, "top")?;
    assert_eq!(client.getattr(file)?.nlink, 2);
    Ok(())
}

#[test]
fn names_are_bytes() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let long = [b'n'; 255];
    let all: Vec<u8> = (1..=255).filter(|&byte| byte != b'/').collect();
    let names: [&[u8]; 12] = [
        b"plain",
        b"with space",
        b"\xff\xfe not UTF-8 \x80",
        b"\n\r\t",
        b"...",
        b"-rf",
        b"*?[a]\\",
        "\u{e9}\u{4e2d}\u{1f4c1}".as_bytes(),
        b"e\xcc\x81",
        b".hidden",
        &all,
        &long,
    ];
    for name in names {
        let fid = client.create(ROOT, name, 0o644)?;
        client.write(fid, 0, name)?;
        client.clunk(fid)?;
        assert_eq!(fs::read(share.join(OsStr::from_bytes(name)))?, name);
        assert_eq!(client.at_fid(ROOT, &[name]).and_then(|fid| client.getattr(fid))?.size, name.len() as u64);
    }
    let dir = client.open("", flags::RDONLY)?;
    let listed: BTreeSet<Vec<u8>> = client.list(dir)?.into_iter().map(|entry| entry.name).collect();
    let mut expected: BTreeSet<Vec<u8>> = names.iter().map(|name| name.to_vec()).collect();
    expected.extend([b".".to_vec(), b"..".to_vec()]);
    assert_eq!(listed, expected);
    for name in names {
        client.unlinkat(ROOT, name, 0)?;
    }
    assert_eq!(fs::read_dir(share.path())?.count(), 0);
    Ok(())
}

#[test]
fn files_may_be_large_and_sparse() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o644)?;
    let far = (5 << 30) + 123;
    assert_eq!(client.write(fid, far, b"far away")?, 8);
    let attr = client.getattr(fid)?;
    assert_eq!(attr.size, far + 8);
    assert!(attr.blocks < 1000, "{} blocks", attr.blocks);
    assert_eq!(client.read(fid, far - 2, 100)?, b"\0\0far away");
    assert_eq!(client.read(fid, 3 << 30, 5000)?, vec![0; 5000]);
    let host = fs::File::open(share.join("file"))?;
    let mut bytes = [0; 8];
    host.read_exact_at(&mut bytes, far)?;
    assert_eq!(&bytes, b"far away");
    client.truncate(fid, (4 << 30) + 1)?;
    assert_eq!(host.metadata()?.len(), (4 << 30) + 1);
    Ok(())
}

#[test]
fn hard_links_are_one_file() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let first = client.create(ROOT, "first", 0o644)?;
    client.link(ROOT, first, "second")?;
    let second = client.open("second", flags::RDWR)?;
    assert_eq!(client.getattr(first)?.qid, client.getattr(second)?.qid);
    client.write(first, 0, b"written by one name")?;
    assert_eq!(client.read(second, 0, 100)?, b"written by one name");
    client.unlinkat(ROOT, "first", 0)?;
    assert_eq!(client.getattr(first)?.nlink, 1);
    client.chmod(first, 0o600)?;
    assert_eq!(client.getattr(second)?.mode, 0o100_600);
    // A link to a symlink is one to the link itself.
    client.symlink(ROOT, "link", "second")?;
    let link = client.at("link")?;
    client.link(ROOT, link, "link2")?;
    assert_eq!(client.stat("link2")?.qid, client.stat("link")?.qid);
    assert_eq!(fs::read_link(share.join("link2"))?.as_os_str(), "second");
    // A file whose last name is gone cannot be linked back: link(2) refuses it with ENOENT.
    client.unlinkat(ROOT, "second", 0)?;
    assert_eq!(client.link(ROOT, first, "back"), Err(Errno::NOENT));
    Ok(())
}

#[test]
fn appending_fids_write_at_the_end_together() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let first = client.create(ROOT, "log", 0o644)?;
    client.clunk(first)?;
    let open = flags::WRONLY | flags::APPEND;
    let (first, second) = (client.open("log", open)?, client.open("log", open)?);
    let mut expected = Vec::new();
    for i in 0..50_u8 {
        let line = [b'a' + i % 26, b'\n'];
        client.write(if i % 3 == 0 { first } else { second }, 0, &line)?;
        expected.extend(line);
    }
    assert_eq!(fs::read(share.join("log"))?, expected);
    Ok(())
}

#[test]
fn modes_of_special_bits_are_the_hosts() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    let fid = client.create(ROOT, "file", 0o4755)?;
    assert_eq!(fs::metadata(share.join("file"))?.mode(), 0o104_755);
    client.chmod(fid, 0o1777)?;
    assert_eq!(fs::metadata(share.join("file"))?.mode(), 0o101_777);
    client.mkdir(ROOT, "dir", 0o1777)?;
    assert_eq!(fs::metadata(share.join("dir"))?.mode(), 0o041_777);
    // Bits of the file's type are not for chmod.
    client.chmod(fid, 0o020_644)?;
    assert_eq!(fs::metadata(share.join("file"))?.mode(), 0o100_644);
    Ok(())
}

#[test]
fn xattrs_belong_to_files_of_any_kind() -> Result<()> {
    let share = Share::new(["--xattr", "all"])?;
    let mut client = share.client()?;
    client.mkdir(ROOT, "dir", 0o755)?;
    client.symlink(ROOT, "link", "dir")?;
    let dir = client.at("dir")?;
    client.set_xattr(dir, "user.d", b"on a directory", 0)?;
    assert_eq!(client.xattr(dir, "user.d")?, b"on a directory");
    // The kernel allows none of user.* on links, whatever they point to.
    let link = client.at("link")?;
    assert_eq!(client.set_xattr(link, "user.d", b"x", 0), Err(Errno::PERM));
    assert!(client.xattr(link, "user.d").is_err());
    assert_eq!(client.xattr(dir, "user.d")?, b"on a directory");
    assert!(client.xattr(link, "").is_ok_and(|list| list.is_empty()));
    // A fid that is open has them too.
    let open = client.open("dir", flags::RDONLY)?;
    assert_eq!(client.xattr(open, "user.d")?, b"on a directory");
    if rustix::process::geteuid().is_root() {
        client.set_xattr(dir, "trusted.t", b"t", 0)?;
        assert_eq!(client.xattr(dir, "trusted.t")?, b"t");
        let mut value = [0; 8];
        assert_eq!(rustix::fs::lgetxattr(share.join("dir"), "trusted.t", &mut value)?, 1);
    }
    Ok(())
}

#[test]
fn a_directory_that_changes_shows_what_stays() -> Result<()> {
    let share = Share::plain()?;
    for i in 0..600 {
        fs::write(share.join(format!("stays-{i}")), "")?;
        fs::write(share.join(format!("goes-{i}")), "")?;
    }
    let mut client = share.client()?;
    let dir = client.open("", flags::RDONLY)?;
    let mut seen: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    let mut offset = 0;
    let mut round = 0;
    loop {
        let entries = client.readdir(dir, offset, 2000)?;
        let Some(last) = entries.last() else { break };
        offset = last.offset;
        for Dirent { name, .. } in entries {
            *seen.entry(name).or_default() += 1;
        }
        for i in 20 * round..20 * (round + 1) {
            // By the host and by the client in turn.
            if i % 2 == 0 {
                let _ = fs::remove_file(share.join(format!("goes-{i}")));
            } else {
                let _ = client.unlinkat(ROOT, format!("goes-{i}"), 0);
            }
            fs::write(share.join(format!("comes-{i}")), "")?;
        }
        round += 1;
        assert!(round < 2000, "the directory has an end");
    }
    assert!(seen.values().all(|&count| count == 1), "no entry twice");
    for i in 0..600 {
        assert_eq!(seen.get(format!("stays-{i}").as_bytes()), Some(&1), "stays-{i}");
    }
    // From the start all is as it is now.
    let listed: BTreeSet<Vec<u8>> = client.list(dir)?.into_iter().map(|entry| entry.name).collect();
    let host: BTreeSet<Vec<u8>> = fs::read_dir(share.path())?
        .map(|entry| entry.map(|entry| entry.file_name().as_bytes().to_vec()))
        .chain([Ok(b".".to_vec()), Ok(b"..".to_vec())])
        .collect::<Result<_, _>>()?;
    assert_eq!(listed, host);
    Ok(())
}

#[test]
fn a_directory_is_read_by_several_at_once() -> Result<()> {
    let share = Share::plain()?;
    for i in 0..200 {
        fs::write(share.join(format!("file-{i}")), "")?;
    }
    let mut client = share.client()?;
    let (one, two) = (client.open("", flags::RDONLY)?, client.open("", flags::RDONLY)?);
    let (mut of_one, mut of_two) = (Vec::<Dirent>::new(), Vec::<Dirent>::new());
    loop {
        let at = |entries: &[Dirent]| entries.last().map_or(0, |entry| entry.offset);
        let first = client.readdir(one, at(&of_one), 300)?;
        let second = client.readdir(two, at(&of_two), 700)?;
        if first.is_empty() && second.is_empty() {
            break;
        }
        of_one.extend(first);
        of_two.extend(second);
    }
    assert_eq!(of_one.len(), 202);
    assert_eq!(of_one, of_two);
    // Back to the middle and to the start.
    assert_eq!(client.readdir(one, of_one[99].offset, 4096)?[0], of_one[100]);
    assert_eq!(client.readdir(one, 0, 4096)?[0], of_one[0]);
    Ok(())
}

#[test]
fn the_host_and_the_guest_see_each_others_changes() -> Result<()> {
    let share = Share::plain()?;
    let mut client = share.client()?;
    fs::write(share.join("file"), "by the host")?;
    let fid = client.open("file", flags::RDWR)?;
    assert_eq!(client.read(fid, 0, 100)?, b"by the host");
    client.write(fid, 3, b"THE")?;
    assert_eq!(fs::read(share.join("file"))?, b"by THE host");
    fs::write(share.join("file"), "shorter")?;
    assert_eq!(client.read(fid, 0, 100)?, b"shorter");
    assert_eq!(client.getattr(fid)?.size, 7);
    fs::remove_file(share.join("file"))?;
    assert_eq!(client.at("file"), Err(Errno::NOENT));
    assert_eq!(client.getattr(fid)?.nlink, 0);
    Ok(())
}

/// A share in a namespace of its own, with a tmpfs mounted at `mount` below it, and its folder.
fn with_mount(args: &[&str]) -> Result<(Share, Namespace, tempfile::TempDir)> {
    let folder = scratch()?;
    fs::create_dir(folder.path().join("mount"))?;
    fs::write(folder.path().join("file"), "")?;
    let namespace = Namespace::new()?;
    let mut command = namespace.command("sh");
    // Files until one of them has the inode number of a file outside is too much to ask; small numbers come first.
    command.args(["-c", "mount -t tmpfs tmpfs \"$1\" && cd \"$1\" && mkdir sub && touch a b sub/c", "sh"]);
    command.arg(folder.path().join("mount"));
    tests::process::run(command, std::time::Duration::from_secs(60))?;
    let share = Share::by(ninep_daemon().inside(&namespace.root()), folder.path(), args)?;
    Ok((share, namespace, folder))
}

#[test]
fn files_of_two_file_systems_have_different_qids() -> Result<()> {
    let (share, _namespace, folder) = with_mount(&[])?;
    // The shared folder and a mount of the same kind collide often: each root has one of few numbers.
    let mut client = share.client()?;
    let mut paths = BTreeMap::new();
    for name in ["", "file", "mount", "mount/a", "mount/b", "mount/sub", "mount/sub/c"] {
        let qid = client.stat(name)?.qid;
        assert_eq!(paths.insert(qid.path, name), None, "{name} is a file of its own");
        assert_eq!(client.stat(name)?.qid, qid, "{name} keeps its qid");
    }
    let own = fs::metadata(folder.path().join("file"))?.ino().wrapping_sub(2);
    assert_eq!(client.stat("file")?.qid.path, own, "the first device's numbers are the host's");
    // What a directory says of its entries is what they say themselves, but for the mount point's own entry in its
    // parent, where every file system has the inode below the mount.
    let dir = client.open("mount", flags::RDONLY)?;
    for entry in client.list(dir)? {
        match entry.name.as_slice() {
            b"." => assert_eq!(entry.qid.path, client.stat("mount")?.qid.path),
            b".." => {}
            name => {
                let path = [b"mount/", name].concat();
                assert_eq!(entry.qid.path, client.stat(&path)?.qid.path, "{}", String::from_utf8_lossy(name));
            }
        }
    }
    // `..` leads out of the mount again.
    let inside = client.at("mount/sub")?;
    let root = client.at_fid(inside, &["..", ".."])?;
    assert_eq!(client.getattr(root)?.qid.path, client.getattr(ROOT)?.qid.path);
    Ok(())
}

#[test]
fn other_file_systems_can_be_forbidden() -> Result<()> {
    let (share, _namespace, _folder) = with_mount(&["--multidevs", "forbid"])?;
    let mut client = share.client()?;
    client.stat("file")?;
    assert!(
        client.at("mount").is_err() || client.at("mount/a").is_err(),
        "nothing below the mount is reached"
    );
    Ok(())
}
