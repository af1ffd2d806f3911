//! What a process tries in its sandbox. Each case ends with a panic if something is not as it should be.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::sys::call;
use log::LevelFilter;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, XattrFlags, chmodat, fchmod, fstat, linkat,
    mkdirat, mknodat, openat, openat2, readlinkat, renameat, setxattr, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{geteuid, umask};
use rustix::thread::{CapabilitySet, capabilities, capability_is_in_bounding_set, no_new_privs};
use seccompiler::{SeccompAction, SeccompFilter};
use vhost_user_daemon::control::{
    Bell, Client, ClientError, Endpoint, Handler, Reply, Request, Response, Server,
};
use vhost_user_daemon::log::Format;
use vhost_user_daemon::sandbox::{Confinement, Entered, Needs, Sandbox, SandboxChoice, SandboxError};
use vhost_user_daemon::socket::{Socket, SocketOptions};
use vhost_user_daemon::{
    ConfigNotifier, Device, Progress, RING_FEATURES, ServeOptions, SharedRing, Worker, serve,
};

/// Runs a case.
pub fn run(case: &str) {
    vhost_user_daemon::log::init(Some(LevelFilter::Info), Format::Text);
    match case {
        "files" => files(),
        "moved" => moved(),
        "attacks" => attacks(),
        "listening" => listening(),
        "control" => control(),
        "stranger" => stranger(),
        "client" => client(),
        "serving" => serving(),
        "refusals" => refusals(),
        "without-namespaces" => without_namespaces(),
        "without-anything" => without_anything(),
        "owners" => owners(),
        "mounts" => mounts(),
        other => panic!("No case {other}"),
    }
}

fn base() -> PathBuf {
    env::var_os("TEST_BASE").unwrap().into()
}

fn choice() -> SandboxChoice {
    clap::ValueEnum::from_str(&env::var("TEST_CHOICE").unwrap(), false).unwrap()
}

/// A sandbox with the directory that is shared and the one that is read-only.
fn sandbox() -> Sandbox {
    let mut sandbox = Sandbox::new(choice());
    assert_eq!(sandbox.directory(&base().join("share"), false), 0);
    // Relative to the working directory.
    assert_eq!(sandbox.directory(Path::new("read-only"), true), 1);
    sandbox
}

fn say(line: &str) {
    println!("{line}");
}

fn wait() {
    assert_eq!(io::stdin().read(&mut [0]).unwrap(), 1);
}

fn open_in(directory: impl AsFd, name: &str, flags: OFlags) -> Result<File, Errno> {
    openat(directory, name, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR).map(File::from)
}

fn read_in(directory: impl AsFd, name: &str) -> Result<String, Errno> {
    let mut text = String::new();
    open_in(directory, name, OFlags::RDONLY)?.read_to_string(&mut text).unwrap();
    Ok(text)
}

fn path_of(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

#[track_caller]
#[expect(clippy::needless_pass_by_value, reason = "what is possible against expectation is of no use")]
fn assert_refused<T>(result: Result<T, Errno>, expected: &[Errno]) {
    match result {
        Ok(_) => panic!("It is possible"),
        Err(error) => assert!(expected.contains(&error), "{error}"),
    }
}

/// There is no such file, as far as this process knows.
const HIDDEN: &[Errno] = &[Errno::NOENT, Errno::ACCESS, Errno::LOOP, Errno::XDEV];

fn files() {
    let entered = sandbox().enter(&mut []).unwrap();
    let namespace = matches!(entered.confinement, Confinement::Namespace { .. });
    assert_eq!(namespace, choice() == SandboxChoice::Namespace);
    let share = &entered.directories[0];
    let read_only = &entered.directories[1];
    assert!(share.is_mount_root == namespace && read_only.is_mount_root == namespace);

    changes_inside(share.fd.as_fd());
    descriptors(&entered, share.fd.as_fd());
    nothing_is_written(read_only.fd.as_fd(), namespace);

    let secret = base().join("outside/secret");
    assert_refused(read_in(CWD, secret.to_str().unwrap()), HIDDEN);
    assert_refused(read_in(&share.fd, "../outside/secret"), HIDDEN);
    assert_refused(read_in(&share.fd, "sub/../../outside/secret"), HIDDEN);
    assert_refused(read_in(&share.fd, "link"), HIDDEN);
    assert_refused(open_in(&share.fd, "../outside/new", OFlags::CREATE | OFlags::WRONLY), HIDDEN);
    assert_refused(
        renameat(&share.fd, "file", &share.fd, "../outside/file"),
        &[Errno::NOENT, Errno::ACCESS, Errno::XDEV, Errno::ROFS],
    );
    for path in [
        "/etc/passwd",
        "/proc/version",
        "/proc/1/environ",
        "/proc/self/environ",
        "/proc/self/root/etc/passwd",
        "/dev/null",
    ] {
        assert_refused(read_in(CWD, path), HIDDEN);
    }
    if namespace {
        // All that there is.
        let mut names: Vec<_> = fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["0", "1", "proc"]);
        for path in ["/proc", "/proc/self"] {
            assert_eq!(fs::read_dir(path).unwrap().count(), 1);
        }
        let parent = open_in(&share.fd, "..", OFlags::PATH).unwrap();
        assert_refused(mkdirat(&parent, "new", Mode::RWXU), &[Errno::ROFS]);
        assert_refused(mkdirat(&entered.proc_self_fd, "../new", Mode::RWXU), &[Errno::ROFS]);
        // Not even links within.
        assert_refused(read_in(&share.fd, "inner-link"), &[Errno::LOOP]);
    }
    assert_eq!(readlinkat(&share.fd, "inner-link", Vec::new()).unwrap().as_bytes(), b"file");
}

/// All that a file server does.
fn changes_inside(share: BorrowedFd<'_>) {
    assert_eq!(read_in(share, "file").unwrap(), "share/file");
    let beneath = openat2(share, "sub", OFlags::PATH, Mode::empty(), ResolveFlags::BENEATH).unwrap();
    assert_eq!(read_in(&beneath, "inner").unwrap(), "share/sub/inner");

    let mut file = open_in(share, "new", OFlags::CREATE | OFlags::EXCL | OFlags::RDWR).unwrap();
    file.write_all(b"written and cut").unwrap();
    file.set_len(7).unwrap();
    drop(open_in(CWD, &path_of(&file), OFlags::RDWR | OFlags::APPEND).unwrap());
    drop(open_in(share, "sub/inner", OFlags::WRONLY | OFlags::TRUNC).unwrap());
    linkat(share, "new", share, "sub/linked", AtFlags::empty()).unwrap();
    linkat(CWD, path_of(&file), share, "sub/linked-again", AtFlags::SYMLINK_FOLLOW).unwrap();
    renameat(share, "new", share, "sub/moved").unwrap();
    mkdirat(share, "directory", Mode::RWXU).unwrap();
    renameat(share, "directory", &beneath, "directory").unwrap();
    unlinkat(&beneath, "directory", AtFlags::REMOVEDIR).unwrap();
    unlinkat(&beneath, "linked", AtFlags::empty()).unwrap();
    symlinkat("anywhere", share, "new-link").unwrap();
    mknodat(share, "fifo", FileType::Fifo, Mode::RUSR, 0).unwrap();
    mknodat(share, "socket", FileType::Socket, Mode::RUSR, 0).unwrap();
    let names = Dir::new(openat(share, ".", OFlags::RDONLY, Mode::empty()).unwrap()).unwrap();
    assert!(names.map(Result::unwrap).any(|entry| entry.file_name() == c"fifo"));
    // A file without a name gets one.
    let unnamed = open_in(share, ".", OFlags::TMPFILE | OFlags::RDWR).unwrap();
    linkat(CWD, path_of(&unnamed), share, "named", AtFlags::SYMLINK_FOLLOW).unwrap();
}

/// A descriptor that only stands for a file is opened for good.
fn descriptors(entered: &Entered, share: BorrowedFd<'_>) {
    let file = open_in(share, "file", OFlags::PATH | OFlags::NOFOLLOW).unwrap();
    let number = file.as_raw_fd().to_string();
    let path = path_of(&file);
    let try_all = || {
        assert_eq!(read_in(&entered.proc_self_fd, &number).unwrap(), "share/file");
        assert_eq!(read_in(CWD, &path).unwrap(), "share/file");
        drop(open_in(&entered.proc_self_fd, &number, OFlags::RDWR).unwrap());
    };
    try_all();
    thread::scope(|scope| scope.spawn(try_all).join().unwrap());
    chmodat(&entered.proc_self_fd, &number, Mode::from_raw_mode(0o600), AtFlags::empty()).unwrap();
    chmodat(CWD, &path, Mode::from_raw_mode(0o4711), AtFlags::empty()).unwrap();
    setxattr(&path, "user.test", b"value", XattrFlags::empty()).unwrap();
    fs::metadata(path).unwrap();
}

fn nothing_is_written(directory: BorrowedFd<'_>, namespace: bool) {
    let refused = if namespace { Errno::ROFS } else { Errno::ACCESS };
    assert_eq!(read_in(directory, "file").unwrap(), "read-only/file");
    for flags in [OFlags::WRONLY, OFlags::RDWR, OFlags::RDONLY | OFlags::TRUNC] {
        assert_refused(open_in(directory, "file", flags), &[refused]);
    }
    assert_refused(open_in(directory, "new", OFlags::CREATE | OFlags::WRONLY), &[refused]);
    assert_refused(mkdirat(directory, "new", Mode::RWXU), &[refused]);
    assert_refused(unlinkat(directory, "file", AtFlags::empty()), &[refused]);
    let file = open_in(directory, "file", OFlags::RDONLY).unwrap();
    if namespace {
        assert_refused(fchmod(&file, Mode::RWXU), &[refused]);
        assert_refused(setxattr(path_of(&file), "user.test", b"value", XattrFlags::empty()), &[refused]);
    }
    let file = open_in(directory, "file", OFlags::PATH).unwrap();
    assert_refused(open_in(CWD, &path_of(&file), OFlags::WRONLY), &[refused]);
}

/// A directory that is open when the host moves it out.
fn moved() {
    let entered = sandbox().enter(&mut []).unwrap();
    let sub = openat(&entered.directories[0].fd, "sub", OFlags::PATH, Mode::empty()).unwrap();
    say("open");
    wait();
    // It is `outside/sub` now.
    assert_refused(read_in(&sub, "../secret"), HIDDEN);
    assert_refused(open_in(&sub, "../new", OFlags::CREATE | OFlags::WRONLY), HIDDEN);
    if entered.directories[0].is_mount_root {
        assert_refused(statat(&sub, "..", AtFlags::empty()), HIDDEN);
    }
}

fn attacks() {
    let parent = rustix::process::getppid().unwrap();
    let entered = sandbox().enter(&mut []).unwrap();
    assert_ne!(entered.confinement, Confinement::None);
    let share = entered.directories[0].fd.as_fd();
    let try_all = || {
        // From Linux 6.12 on.
        assert_refused(rustix::process::test_kill_process(parent), &[Errno::PERM]);
        for program in ["/bin/true".into(), format!("{}/program", path_of(share))] {
            Command::new(program).spawn().unwrap_err();
        }
        let error = TcpStream::connect("127.0.0.1:1").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert_eq!(UdpSocket::bind("127.0.0.1:0").unwrap_err().kind(), ErrorKind::PermissionDenied);
        UnixStream::pair().unwrap();
        assert_refused(rustix::mount::unmount("/", rustix::mount::UnmountFlags::DETACH), &[Errno::PERM]);
        assert_refused(rustix::process::chroot("/"), &[Errno::PERM]);
        let flags = rustix::mount::OpenTreeFlags::empty();
        assert_refused(rustix::mount::open_tree(CWD, "/", flags), &[Errno::PERM]);
        let owner = capabilities(None).unwrap();
        assert!(owner.effective.is_empty() && owner.permitted.is_empty() && owner.inheritable.is_empty());
    };
    try_all();
    thread::scope(|scope| scope.spawn(try_all).join().unwrap());
    assert!(no_new_privs().unwrap());
    if geteuid().is_root() {
        assert!(!capability_is_in_bounding_set(CapabilitySet::SYS_ADMIN).unwrap());
    }
    thread::spawn(|| {
        // Threads may do this, and no more.
        call(libc::SYS_unshare, &[libc::CLONE_FS.into()]).unwrap();
        for flags in [libc::CLONE_NEWNS, libc::CLONE_NEWUSER | libc::CLONE_FS, libc::CLONE_NEWNET] {
            assert_eq!(
                call(libc::SYS_unshare, &[flags.into()]).unwrap_err().raw_os_error(),
                Some(libc::EPERM)
            );
        }
        assert_eq!(call(libc::SYS_io_uring_setup, &[1, 0]).unwrap_err().raw_os_error(), Some(libc::EPERM));
        let handle = call(libc::SYS_open_by_handle_at, &[0, 0, 0]);
        assert_eq!(handle.unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(call(libc::SYS_clone3, &[0, 0]).unwrap_err().raw_os_error(), Some(libc::ENOSYS));
        let no_thread = [libc::SIGCHLD.into(), 0, 0, 0, 0];
        assert_eq!(call(libc::SYS_clone, &no_thread).unwrap_err().raw_os_error(), Some(libc::EPERM));
        #[cfg(target_arch = "x86_64")]
        {
            const X32: libc::c_long = 0x4000_0000;
            assert_eq!(call(libc::SYS_getpid | X32, &[]).unwrap_err().raw_os_error(), Some(libc::ENOSYS));
        }
    })
    .join()
    .unwrap();
}

fn socket(client: bool) -> Socket {
    // Relative to the working directory.
    let path = if client { "run/socket" } else { "socket" };
    Socket::open(&SocketOptions { path: path.into(), client, ..SocketOptions::default() }).unwrap()
}

fn listening() {
    let mut socket = socket(false);
    sandbox().enter(&mut [&mut socket]).unwrap();
    say("listening");
    let Socket::Listening(listener) = &socket else { panic!("{socket:?}") };
    listener.accept().unwrap();
    say("accepted");
    wait();
    // In a sandbox, the directory is for others to open.
    assert_eq!(listener.directory().is_some(), choice() == SandboxChoice::None);
    if choice() == SandboxChoice::Namespace {
        let open: Vec<_> =
            fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(open.len() > 3);
        for fd in open {
            assert!(!fd.join("../../../../../../etc/passwd").exists(), "{} leads out", fd.display());
        }
    }
    drop(socket);
}

struct Well;

impl Handler for Well {
    fn handle(&self, _: &Request) -> Reply {
        Response::json(&"well").into()
    }
}

fn control() {
    let mut socket = Socket::open_private(Path::new("socket")).unwrap();
    sandbox().enter(&mut [&mut socket]).unwrap();
    let endpoint = Endpoint::socket(socket, Arc::new(Well));
    let _server = Server::start(&Bell::new().unwrap(), vec![endpoint]).unwrap();
    say("listening");
    wait();
}

fn stranger() {
    let error = Client::new(Path::new("socket")).get::<String>("/").unwrap_err();
    assert!(matches!(error, ClientError::Closed { .. }), "{error}");
}

fn client() {
    let mut socket = socket(true);
    sandbox().enter(&mut [&mut socket]).unwrap();
    let Socket::Connecting(target) = &socket else { panic!("{socket:?}") };
    let error = target.connect().unwrap_err();
    assert!(error.to_string().contains("Nobody listens"), "{error}");
    say("nobody");
    for _ in 0..2 {
        wait();
        target.connect().unwrap();
        say("connected");
    }
}

struct Dummy;

impl Device for Dummy {
    type Worker = Dummy;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> u16 {
        16
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn set_features(&self, _features: u64) {}

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn write_config(&self, _offset: usize, _data: &[u8]) -> bool {
        false
    }

    fn reset(&self) {}

    fn new_worker(self: &Arc<Self>, _index: usize) -> io::Result<Dummy> {
        Ok(Dummy)
    }
}

impl Worker for Dummy {
    fn pass(&mut self, _rings: &[SharedRing]) -> Progress {
        Progress::Idle
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn wait(&mut self, _timeout: Duration, _kicks: &[Arc<OwnedFd>]) {}
}

fn serving() {
    let mut socket = socket(false);
    sandbox().enter(&mut [&mut socket]).unwrap();
    say("entered");
    serve(&Arc::new(Dummy), &ConfigNotifier::default(), &socket, &ServeOptions::default()).unwrap();
}

fn refusals() {
    let error = |sandbox: Sandbox| sandbox.enter(&mut []).unwrap_err();

    let mut missing = Sandbox::new(choice());
    missing.directory(&base().join("missing"), false);
    let text = error(missing).to_string();
    assert!(
        text.starts_with(&format!("Cannot open directory {}", base().join("missing").display())),
        "{text}"
    );
    let mut file = Sandbox::new(choice());
    file.directory(&base().join("share/file"), false);
    assert!(
        matches!(error(file), SandboxError::Directory { source, .. } if source.kind() == ErrorKind::NotADirectory)
    );

    let (stop, stopped) = std::sync::mpsc::channel();
    let other = thread::spawn(move || stopped.recv());
    assert!(matches!(error(sandbox()), SandboxError::Threads { count: 2 }));
    stop.send(()).unwrap();
    other.join().unwrap().unwrap();
    let entered = sandbox().enter(&mut []).unwrap();
    assert!(matches!(entered.confinement, Confinement::Namespace { .. }));
}

/// Makes system calls fail, as the seccomp profile of a container does.
fn forbid(calls: &[libc::c_long], error: libc::c_int) {
    let rules: BTreeMap<_, _> = calls.iter().map(|number| (*number, Vec::new())).collect();
    let architecture = env::consts::ARCH.try_into().unwrap();
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(error as u32), architecture)
            .unwrap();
    let program: seccompiler::BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

fn without_namespaces() {
    forbid(&[libc::SYS_unshare], libc::EPERM);
    let mut explicit = Sandbox::new(SandboxChoice::Namespace);
    explicit.directory(&base(), false);
    let error = explicit.enter(&mut []).unwrap_err();
    assert!(matches!(error, SandboxError::Namespace { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("--sandbox none") && text.contains("user.max_user_namespaces"), "{text}");

    let entered = sandbox().enter(&mut []).unwrap();
    assert_eq!(entered.confinement, Confinement::Landlock);
    assert_refused(read_in(CWD, "/etc/passwd"), HIDDEN);
}

fn without_anything() {
    forbid(&[libc::SYS_unshare], libc::EPERM);
    forbid(&[libc::SYS_landlock_create_ruleset], libc::EOPNOTSUPP);
    let error = Sandbox::new(SandboxChoice::Landlock).enter(&mut []).unwrap_err();
    assert!(matches!(error, SandboxError::Landlock(_)), "{error}");

    let entered = sandbox().enter(&mut []).unwrap();
    assert_eq!(entered.confinement, Confinement::None);
    let directory = &entered.directories[0];
    assert!(!directory.is_mount_root);
    assert_eq!(read_in(&directory.fd, "file").unwrap(), "share/file");
    // What there is is used all the same.
    assert_eq!(UdpSocket::bind("127.0.0.1:0").unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert!(capabilities(None).unwrap().permitted.is_empty());
}

fn owners() {
    let asked = CapabilitySet::CHOWN | CapabilitySet::DAC_OVERRIDE | CapabilitySet::SYS_BOOT;
    let mut sandbox = sandbox();
    sandbox.need(Needs::HOST_OWNERS);
    if geteuid().is_root() {
        sandbox.keep_capabilities(CapabilitySet::SETUID);
    }
    umask(Mode::RWXG | Mode::RWXO);
    let all_users = fs::read_to_string("/proc/self/uid_map").unwrap().contains(&u32::MAX.to_string());
    sandbox.keep_capabilities(asked);
    let had = capabilities(None).unwrap().permitted;
    let owner = fs::metadata("/").unwrap().uid();
    let directory = fs::metadata(base().join("share")).unwrap();
    let entered = sandbox.enter(&mut []).unwrap();

    let asked = if geteuid().is_root() { asked | CapabilitySet::SETUID } else { asked };
    let left = capabilities(None).unwrap();
    assert_eq!((left.permitted, left.effective), (asked & had, asked & had));
    assert_eq!(entered.capabilities, asked & had);
    assert!(left.inheritable.is_empty());
    let share = entered.directories[0].fd.as_fd();
    let stat = fstat(share).unwrap();
    assert_eq!((stat.st_uid, stat.st_gid), (directory.uid(), directory.gid()));
    // A thread may act as another user, and find its descriptors still.
    let other = if geteuid().is_root() && all_users { 65534 } else { geteuid().as_raw() };
    let act = || {
        call(libc::SYS_setfsuid, &[other.into()]).unwrap();
        assert_eq!(call(libc::SYS_setfsuid, &[other.into()]).unwrap(), libc::c_long::from(other));
        let file = open_in(share, "file", OFlags::PATH).unwrap();
        assert_eq!(read_in(CWD, &path_of(&file)).unwrap(), "share/file");
        let number = file.as_raw_fd().to_string();
        assert_eq!(read_in(&entered.proc_self_fd, &number).unwrap(), "share/file");
    };
    thread::scope(|scope| scope.spawn(act).join().unwrap());
    if geteuid().is_root() {
        assert!(matches!(entered.confinement, Confinement::Namespace { user: false, .. }));
    } else {
        // The files of others keep their owner.
        assert_eq!(entered.confinement, Confinement::Landlock);
        assert_eq!(statat(CWD, "/", AtFlags::empty()).unwrap().st_uid, owner);
    }
    for capability in [CapabilitySet::SYS_ADMIN, CapabilitySet::NET_ADMIN, CapabilitySet::SETPCAP] {
        if geteuid().is_root() {
            assert!(!capability_is_in_bounding_set(capability).unwrap());
        }
    }
}

fn mounts() {
    let entered = sandbox().enter(&mut []).unwrap();
    let share = entered.directories[0].fd.as_fd();
    read_in(share, "sub/inner").unwrap();
    say("entered");
    wait();
    read_in(share, "sub/new").unwrap();
    assert_refused(read_in(share, "sub/inner"), &[Errno::NOENT]);
    say("mounted");
    wait();
    read_in(share, "sub/inner").unwrap();
}
