//! Whose the guest's files are: the security models, maps of users, squashing, and which extended attributes are seen.
//!
//! These tests need root: only root can have files of several users.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{XattrFlags, lgetxattr, setxattr};
use rustix::io::Errno;
use tests::driver::ninep::flags::{self, NO_UNAME, XATTR_REPLACE};
use tests::driver::ninep::share::ROOT;
use tests::driver::ninep::{Client, R, Share, T};

/// Who nobody is.
const NOBODY: u32 = 65_534;
/// A fid for another user's attach.
const USER: u32 = 5000;

/// A share of a folder that everybody may write to, and a client with [`USER`] attached as `uid`.
fn share_as(uid: u32, args: &[&str]) -> Result<(Share, Client)> {
    ensure!(rustix::process::geteuid().is_root(), "This test makes files of several users, which needs root");
    let share = Share::new(args)?;
    fs::set_permissions(share.path(), Permissions::from_mode(0o777))?;
    let mut client = share.client()?;
    client.attach_as(USER, b"", b"", uid)?;
    Ok((share, client))
}

/// Makes a file, a directory, a link and a FIFO as that user with that group.
fn make_all(client: &mut Client, gid: u32) -> Result<()> {
    let fid = client.clone_fid(USER)?;
    let create = T::Lcreate { fid, name: b"file", flags: flags::RDWR | flags::CREATE, mode: 0o644, gid };
    for request in [
        create,
        T::Mkdir { dfid: USER, name: b"dir", mode: 0o755, gid },
        T::Symlink { dfid: USER, name: b"link", target: b"a/target", gid },
        T::Mknod { dfid: USER, name: b"fifo", mode: 0o010_640, major: 0, minor: 0, gid },
    ] {
        let reply = client.call(&request);
        ensure!(!matches!(reply.message(), R::Lerror { .. }), "{request:?}: {reply:?}");
    }
    Ok(())
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let host = fs::symlink_metadata(path)?;
    Ok((host.uid(), host.gid()))
}

fn xattr(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 256];
    let len = lgetxattr(path, name, &mut value)?;
    value.truncate(len);
    Ok(value)
}

#[test]
fn passthrough_acts_as_the_caller() -> Result<()> {
    let (share, mut client) = share_as(1234, &["--security-model", "passthrough"])?;
    make_all(&mut client, 2345)?;
    for name in ["file", "dir", "link", "fifo"] {
        assert_eq!(owner(&share.join(name))?, (1234, 2345), "{name}");
        let attr = client.stat(name)?;
        assert_eq!((attr.uid, attr.gid), (1234, 2345), "{name}");
    }
    // Permissions are checked by the guest: only there it is known which groups the user is in besides.
    fs::write(share.join("private"), "")?;
    fs::set_permissions(share.join("private"), Permissions::from_mode(0o600))?;
    let fid = client.at_fid(USER, &["private"])?;
    client.lopen(fid, flags::RDWR)?;
    // Root's own fids are root's, before and after.
    let fid = client.open("private", flags::RDWR)?;
    client.write(fid, 0, b"x")?;
    let root = client.create(ROOT, "of-root", 0o644)?;
    assert_eq!(client.getattr(root)?.uid, 0);
    let fid = client.clone_fid(USER)?;
    client.lcreate(fid, "of-user", flags::RDWR, 0o644)?;
    assert_eq!(owner(&share.join("of-user"))?.0, 1234);
    // The kernel clears the bits that would give another user's power away.
    fs::write(share.join("suid"), "x")?;
    fs::set_permissions(share.join("suid"), Permissions::from_mode(0o6777))?;
    let fid = client.at_fid(USER, &["suid"])?;
    client.lopen(fid, flags::RDWR)?;
    client.write(fid, 0, b"y")?;
    assert_eq!(fs::metadata(share.join("suid"))?.mode() & 0o7777, 0o777);
    Ok(())
}

#[test]
fn users_can_be_others_on_the_host() -> Result<()> {
    let args = ["--uid-map", "0:100000:1000", "--gid-map", "0:200000:1000"];
    let (share, mut client) = share_as(5, &[&["--security-model", "passthrough"][..], &args].concat())?;
    chown(share.path(), Some(100_000), Some(200_000))?;
    make_all(&mut client, 6)?;
    for name in ["file", "dir", "link", "fifo"] {
        assert_eq!(owner(&share.join(name))?, (100_005, 200_006), "{name}");
        let attr = client.stat(name)?;
        assert_eq!((attr.uid, attr.gid), (5, 6), "{name}");
    }
    client.attach_as(USER + 1, b"", b"", 0)?;
    let fid = client.at_fid(USER + 1, &["file"])?;
    client.chown(fid, 7, 8)?;
    assert_eq!(owner(&share.join("file"))?, (100_007, 200_008));
    // Nobody has an identity behind the end of a map.
    assert!(client.chown(fid, 1000, 8).is_err());
    assert!(client.chown(fid, 7, 5000).is_err());
    assert_eq!(owner(&share.join("file"))?, (100_007, 200_008));
    fs::write(share.join("of-host-root"), "")?;
    let attr = client.stat("of-host-root")?;
    assert_eq!((attr.uid, attr.gid), (NOBODY, NOBODY), "an owner whom the guest does not know");
    Ok(())
}

#[test]
fn root_can_be_squashed() -> Result<()> {
    for (args, uid, expected) in [
        (&["--squash", "root"][..], 0, (NOBODY, NOBODY)),
        (&["--squash", "root"], 1234, (1234, 2345)),
        (&["--squash", "all"], 1234, (NOBODY, NOBODY)),
        (&["--squash", "all", "--squash-to", "77:88"], 1234, (77, 88)),
    ] {
        let (share, mut client) = share_as(uid, &[&["--security-model", "passthrough"][..], args].concat())?;
        make_all(&mut client, if uid == 0 { 0 } else { 2345 })?;
        for name in ["file", "dir", "link", "fifo"] {
            assert_eq!(owner(&share.join(name))?, expected, "{args:?}, user {uid}, {name}");
        }
    }
    Ok(())
}

#[test]
fn mapped_files_are_as_qemu_has_them() -> Result<()> {
    let (share, mut client) = share_as(1234, &["--security-model", "mapped-xattr"])?;
    make_all(&mut client, 2345)?;
    for (name, mode) in
        [("file", 0o100_644_u32), ("dir", 0o040_755), ("link", 0o120_777), ("fifo", 0o010_640)]
    {
        let path = share.join(name);
        assert_eq!(owner(&path)?, (0, 0), "{name} is the daemon's own");
        let host = fs::symlink_metadata(&path)?;
        assert_eq!(host.mode(), if name == "dir" { 0o040_700 } else { 0o100_600 }, "{name}");
        let attr = client.stat(name)?;
        assert_eq!((attr.uid, attr.gid), (1234, 2345), "{name}");
        assert_eq!(attr.mode & 0o170_000, mode & 0o170_000, "{name}");
        assert_eq!(xattr(&path, "user.virtfs.uid")?, 1234_u32.to_le_bytes(), "{name}");
        assert_eq!(xattr(&path, "user.virtfs.gid")?, 2345_u32.to_le_bytes(), "{name}");
        assert_eq!(xattr(&path, "user.virtfs.mode")?[..4], attr.mode.to_le_bytes(), "{name}");
    }
    assert_eq!(client.stat("file")?.mode, 0o100_644);
    assert_eq!(fs::read(share.join("link"))?, b"a/target");
    let link = client.at("link")?;
    assert_eq!(client.readlink(link)?, b"a/target");
    assert_eq!(client.stat("link")?.size, 8);
    // A device node is none on the host.
    client.mknod(ROOT, "null", 0o020_666, (1, 3))?;
    assert!(fs::metadata(share.join("null"))?.is_file());
    assert_eq!(client.stat("null")?.mode, 0o020_666);
    assert_eq!(xattr(&share.join("null"), "user.virtfs.rdev")?, rustix::fs::makedev(1, 3).to_le_bytes());
    assert_eq!(client.open("null", flags::RDWR), Err(Errno::NXIO));
    assert_eq!(client.open("fifo", flags::RDONLY), Err(Errno::NXIO));
    assert_eq!(client.open("link", flags::RDONLY), Err(Errno::LOOP));
    // Changes of identity and mode go to the attributes only.
    let fid = client.at("file")?;
    client.chown(fid, 7, 8)?;
    client.chmod(fid, 0o4711)?;
    assert_eq!((owner(&share.join("file"))?, fs::metadata(share.join("file"))?.mode()), ((0, 0), 0o100_600));
    assert_eq!(xattr(&share.join("file"), "user.virtfs.uid")?, 7_u32.to_le_bytes());
    assert_eq!(xattr(&share.join("file"), "user.virtfs.mode")?[..4], 0o104_711_u32.to_le_bytes());
    let attr = client.getattr(fid)?;
    assert_eq!((attr.uid, attr.gid, attr.mode), (7, 8, 0o104_711));
    // The listing knows them too.
    let dir = client.open("", flags::RDONLY)?;
    for entry in client.list(dir)? {
        let kind = match entry.name.as_slice() {
            b"link" => 10,
            b"fifo" => 1,
            b"null" => 2,
            b"file" => 8,
            _ => 4,
        };
        // Or it does not say.
        assert!(entry.kind == kind || entry.kind == 0, "{entry:?}");
    }
    Ok(())
}

#[test]
fn mapped_attributes_are_not_the_guests_to_forge() -> Result<()> {
    // CVE-2017-7493: metadata of the mapping that the guest itself may write.
    let (share, mut client) = share_as(1234, &["--security-model", "mapped-xattr", "--xattr", "all"])?;
    make_all(&mut client, 2345)?;
    let fid = client.at("file")?;
    for name in
        ["user.virtfs.uid", "user.virtfs.gid", "user.virtfs.mode", "user.virtfs.rdev", "user.virtfs.x"]
    {
        let before = xattr(&share.join("file"), name);
        assert!(client.set_xattr(fid, name, &[0; 4], 0).is_err(), "{name} was set");
        assert!(client.set_xattr(fid, name, &[0; 4], XATTR_REPLACE).is_err(), "{name} was replaced");
        assert!(client.remove_xattr(fid, name).is_err(), "{name} was removed");
        assert!(client.xattr(fid, name).is_err(), "{name} was read");
        assert_eq!(xattr(&share.join("file"), name), before);
    }
    client.set_xattr(fid, "user.own", b"1", 0)?;
    assert_eq!(client.xattr(fid, "")?, b"user.own\0");
    // Values that the host or an older server left, of wrong lengths or kinds.
    for (i, value) in [&b""[..], b"1", b"\xff\xff\xff\xff", &[0xff; 200]].into_iter().enumerate() {
        let path = share.join(format!("odd-{i}"));
        fs::write(&path, "content")?;
        for name in ["user.virtfs.uid", "user.virtfs.gid", "user.virtfs.mode", "user.virtfs.rdev"] {
            setxattr(&path, name, value, XattrFlags::empty())?;
        }
        let name = format!("odd-{i}");
        if let Ok(fid) = client.at(&name) {
            // Whatever it is now, it is not followed or opened as something that it is not.
            let _ = client.getattr(fid);
            let _ = client.readlink(fid);
            let _ = client.lopen(fid, flags::RDONLY);
            client.clunk(fid)?;
        }
    }
    // A link in the host's sense, below a tree that has only mapped ones, is data as ever.
    std::os::unix::fs::symlink("../outside", share.join("planted"))?;
    assert!(client.open("planted", flags::RDONLY).is_err());
    assert_eq!(client.walk(ROOT, 9000, &["planted", "secret"]).map_or(1, |qids| qids.len()), 1);
    client.check_serves()
}

#[test]
fn without_a_model_all_belongs_to_the_daemon() -> Result<()> {
    let (share, mut client) = share_as(1234, &["--security-model", "none"])?;
    make_all(&mut client, 2345)?;
    for name in ["file", "dir", "link", "fifo"] {
        assert_eq!(owner(&share.join(name))?, (0, 0), "{name}");
        let attr = client.stat(name)?;
        assert_eq!((attr.uid, attr.gid), (0, 0), "{name}");
    }
    Ok(())
}

#[test]
fn only_allowed_xattrs_are_seen() -> Result<()> {
    let (share, mut client) =
        share_as(0, &["--xattr", "user.a,trusted.", "--security-model", "passthrough"])?;
    fs::write(share.join("file"), "")?;
    for name in ["user.a", "user.ab", "user.b", "trusted.t"] {
        setxattr(share.join("file"), name, b"v", XattrFlags::empty())?;
    }
    let fid = client.at("file")?;
    let list = client.xattr(fid, "")?;
    let mut names: Vec<&[u8]> = list.split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"trusted.t"[..], b"user.a", b"user.ab"]);
    assert_eq!(client.xattr(fid, "trusted.t")?, b"v");
    assert!(client.xattr(fid, "user.b").is_err());
    assert!(client.set_xattr(fid, "user.b", b"w", 0).is_err());
    assert!(client.remove_xattr(fid, "user.b").is_err());
    assert_eq!(xattr(&share.join("file"), "user.b")?, b"v");
    let (share, mut client) = share_as(0, &["--xattr", "none"])?;
    fs::write(share.join("file"), "")?;
    setxattr(share.join("file"), "user.a", b"v", XattrFlags::empty())?;
    let fid = client.at("file")?;
    assert!(client.xattr(fid, "user.a").is_err());
    assert!(client.set_xattr(fid, "user.a", b"w", 0).is_err());
    Ok(())
}

/// With squashing and maps, a guest is nobody to what belongs to the host's root, whoever it says that it is.
#[test]
fn what_belongs_to_others_is_checked_by_the_host() -> Result<()> {
    const MAPS: [&str; 4] = ["--uid-map", "0:100000:65536", "--gid-map", "0:100000:65536"];
    let (all, root) = (["--squash", "all"], ["--squash", "root"]);
    for (args, uid) in [
        (&all[..], 0),
        (&all, NO_UNAME),
        (&root, 0),
        (&root, 1),
        (&root, NO_UNAME),
        (&MAPS, 0),
        (&MAPS, 1000),
        (&MAPS, NO_UNAME),
    ] {
        let what = format!("{args:?} as {uid}");
        let (share, mut client) = share_as(uid, &[&["--security-model", "passthrough"][..], args].concat())?;
        let private = share.join("private");
        fs::write(&private, "secret")?;
        fs::set_permissions(&private, Permissions::from_mode(0o600))?;
        fs::create_dir_all(share.join("own/sub"))?;
        fs::set_permissions(share.join("own"), Permissions::from_mode(0o700))?;
        let fid = client.at_fid(USER, &["private"])?;
        assert!(client.chmod(fid, 0o4755).is_err(), "{what}: chmod");
        assert!(client.chown(fid, 1, 1).is_err(), "{what}: chown");
        assert!(client.truncate(fid, 0).is_err(), "{what}: truncate");
        let capability = [1, 0, 0, 2, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let attribute = client.clone_fid(fid)?;
        assert!(
            client.set_xattr(attribute, "security.capability", &capability, 0).is_err(),
            "{what}: setcap"
        );
        assert_eq!(client.mknod(USER, "disk", 0o060_666, (8, 0)), Err(Errno::PERM), "{what}: a device");
        for flags in [flags::RDONLY, flags::RDWR] {
            let open = client.clone_fid(fid)?;
            assert_eq!(client.lopen(open, flags), Err(Errno::ACCESS), "{what}: open");
        }
        assert_eq!(client.attach_as(USER + 1, b"", b"/own/sub", uid), Err(Errno::ACCESS), "{what}: attach");
        // An access control list would name users of the host.
        assert!(client.set_xattr(fid, "system.posix_acl_access", &[2, 0, 0, 0], 0).is_err(), "{what}: ACL");
        let host = fs::metadata(&private)?;
        assert_eq!((host.mode(), host.uid(), host.len()), (0o100_600, 0, 6), "{what}");
        assert_eq!(xattr(&private, "security.capability"), Err(Errno::NODATA), "{what}");
        // What is the user's own is not affected.
        let fid = client.clone_fid(USER)?;
        let create = T::Lcreate { fid, name: b"mine", flags: flags::RDWR, mode: 0o644, gid: 5 };
        assert!(!matches!(client.call(&create).message(), R::Lerror { .. }), "{what}: create");
        client.chmod(fid, 0o600)?;
        client.write(fid, 0, b"x")?;
        assert_ne!(fs::metadata(share.join("mine"))?.uid(), 0, "{what}");
    }
    Ok(())
}
