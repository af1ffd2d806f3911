//! Nothing outside of the shared folder is reached, whatever the guest asks for and whatever happens on the host.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::fs::{CWD, FileType, Mode, RenameFlags, mknodat, renameat_with};
use rustix::io::Errno;
use tests::driver::ninep::flags::{self, REMOVEDIR};
use tests::driver::ninep::jail::{Jail, SECRET};
use tests::driver::ninep::share::ROOT;
use tests::driver::ninep::wire::SetAttr;
use tests::driver::ninep::{Client, R, Share, T};

/// How often a race is tried. Each try is a few dozen microseconds of a window that is a few microseconds long.
const RACES: u32 = 3000;
/// A loaded machine tries for this long instead.
const RACE_LIMIT: Duration = Duration::from_secs(10);

/// Everything that a client could do with a fid that should not be one of outside; none of it may work on a target.
fn try_all(client: &mut Client, fid: u32) -> Result<()> {
    for open in [flags::RDONLY, flags::RDWR, flags::WRONLY | flags::TRUNC, flags::DIRECTORY] {
        let clone = client.clone_fid(fid)?;
        if client.lopen(clone, open).is_ok()
            && let Ok(data) = client.read(clone, 0, 4096)
        {
            assert!(!String::from_utf8_lossy(&data).contains(SECRET), "the secret is out");
        }
        client.clunk(clone)?;
    }
    let _ = client.walk(fid, 900, &["secret"]).map(|_| client.clunk(900));
    let _ = client.walk(fid, 900, &["dir", "secret"]).map(|_| client.clunk(900));
    for request in [
        T::Mkdir { dfid: fid, name: b"made", mode: 0o755, gid: 0 },
        T::Symlink { dfid: fid, name: b"made", target: b"x", gid: 0 },
        T::Mknod { dfid: fid, name: b"made", mode: 0o010_644, major: 0, minor: 0, gid: 0 },
        T::Unlinkat { dirfid: fid, name: b"secret", flags: 0 },
        T::Unlinkat { dirfid: fid, name: b"dir", flags: REMOVEDIR },
        T::Renameat { olddirfid: fid, oldname: b"secret", newdirfid: ROOT, newname: b"stolen" },
        T::Xattrcreate { fid, name: b"user.x", size: 0, flags: 0 },
    ] {
        client.call(&request);
    }
    Ok(())
}

#[test]
fn planted_links_are_data() -> Result<()> {
    // CVE-2016-9602 and CVE-2017-7471: the host, or another guest with the same share, planted links.
    let jail = Jail::new(&[])?;
    let outside = jail.outside.to_string_lossy().into_owned();
    let targets = [
        outside.clone(),
        format!("{outside}/secret"),
        "../outside".to_owned(),
        "../outside/secret".to_owned(),
        "..".to_owned(),
        "/".to_owned(),
        "/proc/self/root".to_owned(),
        "/proc/self/fd/3".to_owned(),
        "/proc/self/cwd".to_owned(),
        "./link-0".to_owned(),
        "link-9".to_owned(),
    ];
    let mut client = jail.share.client()?;
    for (i, target) in targets.iter().enumerate() {
        let name = format!("link-{i}");
        if i % 2 == 0 {
            symlink(target, jail.share.join(&name))?;
        } else {
            client.symlink(ROOT, &name, target)?;
        }
        let fid = client.at(&name)?;
        assert_eq!(client.getattr(fid)?.mode & 0o170_000, 0o120_000);
        assert_eq!(client.readlink(fid)?, target.as_bytes());
        for open in
            [flags::RDONLY, flags::RDWR, flags::RDONLY | flags::DIRECTORY, flags::WRONLY | flags::TRUNC]
        {
            let clone = client.clone_fid(fid)?;
            let error = client.lopen(clone, open).expect_err("a link is not opened");
            assert!(matches!(error, Errno::LOOP | Errno::NOTDIR), "{target}: {error:?}");
            client.clunk(clone)?;
        }
        assert_eq!(client.walk(ROOT, 800, &[&name, "secret"])?.len(), 1, "{target} is not followed");
        assert_eq!(client.walk(ROOT, 800, &[&name, ".."])?.len(), 1, "{target} is not followed");
        try_all(&mut client, fid)?;
        // By name in its directory.
        let clone = client.clone_fid(ROOT)?;
        let created = client.lcreate(clone, &name, flags::RDWR | flags::CREATE, 0o644);
        assert!(created.is_err(), "Tlcreate followed {target}");
        assert!(client.lcreate(clone, &name, flags::RDWR | flags::TRUNC, 0o644).is_err());
        let attach = client.attach(801, format!("/{name}").as_bytes());
        assert!(attach.is_err(), "Tattach followed {target}");
        assert!(client.attach(801, format!("/{name}/dir").as_bytes()).is_err());
        // Attributes are the link's own; those of its target stay.
        let _ = client.chmod(fid, 0o777);
        let _ = client.truncate(fid, 0);
        let valid = flags::SETATTR_MTIME | flags::SETATTR_ATIME;
        client.setattr(fid, SetAttr { valid, ..SetAttr::default() })?;
        client.chown(fid, rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())?;
    }
    jail.check()
}

#[test]
fn names_do_not_lead_out() -> Result<()> {
    // CVE-2016-7116, and pull request 14 of rust-p9: `..` and names with slashes.
    let jail = Jail::new(&[])?;
    let outside = jail.outside.to_string_lossy().into_owned();
    fs::create_dir_all(jail.share.join("a/b"))?;
    fs::write(jail.share.join("file"), "")?;
    let mut client = jail.share.client()?;
    let file = client.at("file")?;
    let absolute = format!("{outside}/secret");
    let names = [
        "../outside",
        "../outside/secret",
        "a/../../outside/secret",
        absolute.as_str(),
        "a/b",
        "/",
        "//",
        "a/",
        "./../outside",
        "..\0",
        "a\0b",
        "",
        ".",
    ];
    let secrets = jail.secrets()?;
    for name in names {
        for fid in [ROOT, client.at("a")?] {
            client.expect_error(&T::Walk { fid, newfid: 700, names: vec![name.as_bytes()] }, Errno::NOENT);
            let name = name.as_bytes();
            let at = T::Renameat { olddirfid: fid, oldname: name, newdirfid: ROOT, newname: b"stolen" };
            let to = T::Renameat { olddirfid: ROOT, oldname: b"file", newdirfid: fid, newname: name };
            let clone = client.clone_fid(fid)?;
            for request in [
                at,
                to,
                T::Rename { fid: file, dfid: fid, name },
                T::Link { dfid: fid, fid: file, name },
                T::Mkdir { dfid: fid, name, mode: 0o755, gid: 0 },
                T::Symlink { dfid: fid, name, target: b"x", gid: 0 },
                T::Mknod { dfid: fid, name, mode: 0o010_644, major: 0, minor: 0, gid: 0 },
                T::Unlinkat { dirfid: fid, name, flags: 0 },
                T::Unlinkat { dirfid: fid, name, flags: REMOVEDIR },
                T::Lcreate { fid: clone, name, flags: flags::RDWR, mode: 0o644, gid: 0 },
            ] {
                let reply = client.call(&request);
                assert!(matches!(reply.message(), R::Lerror { .. }), "{request:?}: {reply:?}");
            }
        }
    }
    for (steps, names) in
        [(1, vec![".."]), (4, vec!["..", "..", "outside", "secret"]), (4, vec!["a", "b", "..", ".."])]
    {
        let qids = client.walk(ROOT, 701, &names).unwrap_or_default();
        assert!(qids.len() <= steps && qids.iter().all(|qid| !secrets.contains(&qid.path)), "{names:?}");
        if qids.len() == names.len() {
            assert_eq!(client.getattr(701)?.qid.path, client.getattr(ROOT)?.qid.path);
            client.clunk(701)?;
        }
    }
    // What `..` is called in the root's listing is the root, or at least nothing of outside.
    let root = client.open("", flags::RDONLY)?;
    for entry in client.list(root)? {
        assert!(!secrets.contains(&entry.qid.path));
    }
    jail.check()
}

#[test]
fn an_attach_stays_inside() -> Result<()> {
    let jail = Jail::new(&[])?;
    fs::create_dir_all(jail.share.join("a/b"))?;
    let mut client = jail.share.client()?;
    let outside = jail.outside.to_string_lossy().into_owned();
    for aname in
        ["..", "/..", "/a/../..", "/../outside", "a/../../outside", &outside, "/a/b/../../../outside"]
    {
        if let Ok(qid) = client.attach(600, aname.as_bytes()) {
            assert!(!jail.secrets()?.contains(&qid.path), "{aname} is outside");
            assert_eq!(client.walk(600, 601, &["secret"]), Err(Errno::NOENT));
            client.clunk(600)?;
        }
    }
    // Inside of a subdirectory's attach the rest of the share is outside.
    client.attach(602, b"/a")?;
    client.walk(602, 603, &["..", "..", ".."])?;
    assert_eq!(client.getattr(603)?.qid, client.getattr(602)?.qid);
    assert_eq!(client.at_fid(602, &["..", "b", "..", "..", "b"]).map(drop), Ok(()));
    jail.check()
}

#[test]
fn a_directory_that_was_moved_out_leads_nowhere() -> Result<()> {
    let jail = Jail::new(&[])?;
    fs::create_dir_all(jail.share.join("moving/deep/er"))?;
    let mut client = jail.share.client()?;
    let deep = client.at("moving/deep/er")?;
    let top = client.at("moving")?;
    fs::rename(jail.share.join("moving"), jail.outside.join("moved"))?;
    // What is held may be used on, as a process in a chroot could; but there is no way up and out of it.
    for (fid, steps) in [(deep, 6), (top, 4)] {
        for count in 1..=steps {
            let names = vec![".."; count];
            let qids = client.walk(fid, 500, &names).unwrap_or_default();
            let outside = fs::metadata(&jail.outside)?.ino().wrapping_sub(2);
            let above = fs::metadata(jail.outside.join(".."))?.ino().wrapping_sub(2);
            assert!(
                qids.iter().all(|qid| qid.path != outside && qid.path != above),
                "`..` {count} times is outside: {qids:?}"
            );
            if qids.len() == names.len() {
                assert_eq!(client.at_fid(500, &["secret"]), Err(Errno::NOENT));
                assert_eq!(client.at_fid(500, &["outside"]), Err(Errno::NOENT));
                client.clunk(500)?;
            }
        }
    }
    fs::rename(jail.outside.join("moved"), jail.share.join("moving"))?;
    let up = client.at_fid(deep, &["..", "..", ".."])?;
    assert_eq!(client.getattr(up)?.qid.path, client.getattr(ROOT)?.qid.path);
    drop(client);
    fs::remove_dir_all(jail.share.join("moving"))?;
    jail.check()
}

/// Swaps `a` and `b` as fast as it can until it is dropped.
struct Swapper {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Swapper {
    fn start(a: PathBuf, b: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE).expect("both are there");
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Swapper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the swapping thread ends well");
        }
    }
}

#[test]
fn a_directory_that_becomes_a_link_in_the_middle_of_a_walk() -> Result<()> {
    // CVE-2016-9602: the check and the use of a path are two moments.
    let jail = Jail::new(&[])?;
    let share = &jail.share;
    fs::create_dir_all(share.join("a/dir"))?;
    fs::write(share.join("a/secret"), "harmless")?;
    fs::write(share.join("a/dir/secret"), "harmless")?;
    symlink(&jail.outside, share.join("b"))?;
    let secrets = jail.secrets()?;
    let mut client = share.client()?;
    let swapper = Swapper::start(share.join("a"), share.join("b"));
    let mut through = 0;
    let start = Instant::now();
    for _ in (0..RACES).take_while(|_| start.elapsed() < RACE_LIMIT) {
        let qids = client.walk(ROOT, 400, &["a", "dir", "secret"]).unwrap_or_default();
        assert!(qids.iter().all(|qid| !secrets.contains(&qid.path)), "{qids:?} is outside");
        if qids.len() == 3 {
            through += 1;
            if client.lopen(400, flags::RDWR).is_ok() {
                assert_eq!(client.read(400, 0, 100)?, b"harmless");
                client.write(400, 0, b"harmless")?;
            }
            client.clunk(400)?;
        }
        if client.walk(ROOT, 401, &["a"]).is_ok() {
            // A link or a directory by now: whatever is made is made inside.
            let _ = client.mkdir(401, "made", 0o755);
            let _ = client.unlinkat(401, "made", REMOVEDIR);
            if client.lcreate(401, "created", flags::RDWR | flags::CREATE, 0o644).is_ok() {
                client.clunk(401)?;
            } else {
                let _ = client.unlinkat(401, "secret2", 0);
                client.clunk(401)?;
            }
        }
        if let Ok(qid) = client.attach(402, b"/a/dir") {
            assert!(!secrets.contains(&qid.path), "Tattach is outside");
            client.clunk(402)?;
        }
    }
    drop(swapper);
    println!("{through} of at most {RACES} walks went through");
    assert!(!jail.outside.join("created").exists());
    jail.check()
}

#[test]
fn a_file_that_becomes_something_else_before_it_is_opened() -> Result<()> {
    // CVE-2023-2861: a FIFO or device that takes a file's place would hang the server or do harm.
    let jail = Jail::new(&[])?;
    let share = &jail.share;
    fs::write(share.join("file"), "harmless")?;
    mknodat(CWD, share.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0)?;
    symlink("../outside/secret", share.join("link"))?;
    let mut client = share.client()?;
    for other in ["fifo", "link"] {
        let swapper = Swapper::start(share.join("file"), share.join(other));
        let start = Instant::now();
        for _ in (0..RACES).take_while(|_| start.elapsed() < RACE_LIMIT) {
            let Ok(fid) = client.at("file") else { continue };
            match client.lopen(fid, flags::RDWR) {
                Ok(_) => assert_eq!(client.read(fid, 0, 100)?, b"harmless"),
                Err(error) => assert!(matches!(error, Errno::NXIO | Errno::LOOP), "{error:?}"),
            }
            client.clunk(fid)?;
            // By name, where the kernel looks at what is there.
            let fid = client.clone_fid(ROOT)?;
            if client.lcreate(fid, "file", flags::RDWR | flags::CREATE, 0o644).is_ok() {
                assert_eq!(client.read(fid, 0, 100)?, b"harmless");
            }
            client.clunk(fid)?;
        }
        drop(swapper);
        // Whatever the last swap left.
        if !fs::symlink_metadata(share.join("file"))?.is_file() {
            renameat_with(CWD, share.join("file"), CWD, share.join(other), RenameFlags::EXCHANGE)?;
        }
    }
    jail.check()
}

#[test]
fn a_fifo_in_the_place_of_a_new_file_blocks_nobody() -> Result<()> {
    let share = Share::plain()?;
    mknodat(CWD, share.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0)?;
    let mut client = share.client()?;
    for open in [flags::RDONLY, flags::WRONLY, flags::RDWR] {
        let fid = client.clone_fid(ROOT)?;
        let result = client.lcreate(fid, "fifo", open | flags::CREATE, 0o644);
        assert_eq!(result, Err(Errno::NXIO), "flags {open:#o}");
        assert_eq!(client.lcreate(fid, "fifo", open | flags::CREATE | flags::EXCL, 0o644), Err(Errno::EXIST));
        client.clunk(fid)?;
    }
    client.check_serves()
}

#[test]
fn renames_race_with_everything_else() -> Result<()> {
    // CVE-2018-19364, CVE-2018-19489 and CVE-2026-48004: the path of a fid changed while another request used it.
    let share = Share::plain()?;
    let mut client = share.client()?;
    client.mkdir(ROOT, "a", 0o755)?;
    client.mkdir(ROOT, "b", 0o755)?;
    let (a, b) = (client.at("a")?, client.at("b")?);
    let open = client.open("a", flags::RDONLY)?;
    let file = client.create(a, "file", 0o644)?;
    for round in 0..200_u32 {
        let (from, to) = if round % 2 == 0 { (a, b) } else { (b, a) };
        let requests = [
            T::Renameat { olddirfid: from, oldname: b"file", newdirfid: to, newname: b"file" },
            T::Readdir { fid: open, offset: 0, count: 65536 },
            T::Walk { fid: from, newfid: 2000 + round, names: vec![b"file"] },
            T::Getattr { fid: file, mask: flags::GETATTR_ALL },
            T::Rename { fid: file, dfid: from, name: b"other" },
            T::Renameat { olddirfid: ROOT, oldname: b"a", newdirfid: ROOT, newname: b"c" },
            T::Rename { fid: file, dfid: to, name: b"file" },
            T::Renameat { olddirfid: ROOT, oldname: b"c", newdirfid: ROOT, newname: b"a" },
        ];
        let tags: Vec<u16> = requests.iter().map(|request| client.prepare(request)).collect();
        for &tag in &tags {
            client.post(tag);
        }
        client.kick();
        for (request, tag) in requests.iter().zip(tags) {
            let reply = client.wait(tag);
            client.check(request, tag, &reply);
            if matches!(request, T::Getattr { .. } | T::Readdir { .. }) {
                assert!(!matches!(reply.message(), R::Lerror { .. }), "{request:?}: {reply:?}");
            }
        }
        // In whatever order they ran, the file has one name, and things go back to the start of a round.
        assert_eq!(client.getattr(file)?.nlink, 1);
        let _ = client.renameat(ROOT, "c", ROOT, "a");
        client.rename(file, to, "file")?;
    }
    Ok(())
}

#[test]
fn the_daemon_sees_no_more_than_it_must() -> Result<()> {
    // With a namespace the daemon's own root is the share: even a mistake of its own would not lead out.
    let jail = Jail::new(&["--sandbox", "namespace"])?;
    let mut client = jail.share.client()?;
    client.check_serves()?;
    let root = PathBuf::from(format!("/proc/{}/root", jail.share.daemon.pid()));
    for path in ["etc/passwd", "proc/self/environ", "usr/bin/env"] {
        assert!(!root.join(path).exists(), "the daemon could open /{path}");
    }
    let outside = jail.outside.strip_prefix("/")?.join("secret");
    assert!(!root.join(outside).exists(), "the daemon could open the secret");
    Ok(())
}
