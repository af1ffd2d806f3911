//! A Debian whose root is a shared directory.
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tests::guest::{Guest, Running, Vmm};
use tests::process;
use tests::provision::{self, PASSWORD, Series};
use tests::share::{Cache, Share, default_model};

const LIMIT: Duration = Duration::from_secs(8 * 60);
const STEP: Duration = Duration::from_secs(4 * 60);

/// A login prompt on the guest's channel. Debian's own unit for it waits for udev, which is not installed.
const LOGIN: &str = "
[Unit]
After=systemd-user-sessions.service
[Service]
ExecStart=-/sbin/agetty --keep-baud 115200 ttyS1 dumb
Restart=always
StandardInput=tty
StandardOutput=tty
TTYPath=/dev/ttyS1
TTYReset=yes
";

/// A Debian to be written to.
fn install(root: &Path) {
    let debian = provision::debian().unwrap();
    let mut copy = Command::new("cp");
    copy.args(["-a", "--reflink=auto"]).arg(debian.folder.join(".")).arg(root);
    process::run(copy, STEP).unwrap();
    let units = root.join("etc/systemd/system");
    fs::write(units.join("login.service"), LOGIN).unwrap();
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants).unwrap();
    symlink("../login.service", wants.join("login.service")).unwrap();
    // The console only carries messages.
    symlink("/dev/null", units.join("serial-getty@ttyS0.service")).unwrap();
    fs::copy(debian.package, root.join("root/package.deb")).unwrap();
    if default_model() != "passthrough" {
        give_to_root(root).unwrap();
    }
}

/// Makes the guest's root the owner of a copy that belongs to whoever runs the tests, in the way of mapped attributes. (It
/// matters: programs that run as their owner are to run as root.)
fn give_to_root(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let data = fs::symlink_metadata(path)?;
    if data.is_dir() {
        for entry in fs::read_dir(path)? {
            give_to_root(&entry?.path())?;
        }
    } else if !data.is_file() {
        // Links have no attributes of their own.
        return Ok(());
    }
    let mode = data.permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(mode.mode() | 0o200))?;
    for name in ["user.virtfs.uid", "user.virtfs.gid"] {
        rustix::fs::lsetxattr(path, name, &0_u32.to_le_bytes(), rustix::fs::XattrFlags::empty())?;
    }
    fs::set_permissions(path, mode)
}

/// A shell on the guest's channel.
struct Shell {
    guest: Running,
    position: usize,
}

impl Shell {
    fn expect(&mut self, text: &str) -> String {
        let start = self.position;
        self.position = self.guest.wait_for_text(start, text, STEP).unwrap();
        self.guest.text(start, self.position)
    }

    /// Runs a command, which must succeed, and returns its output.
    fn run(&mut self, command: &str) -> String {
        // The terminal shows what is typed as well: the mark is not in it.
        self.guest.send(&format!("{command}; echo 'en''d' $?")).unwrap();
        let output = self.expect("end ");
        let status = self.expect("\n");
        assert_eq!(status.trim(), "0", "{command}: {output}");
        output
    }
}

fn debian_boots(series: Series, cache: Cache) {
    let folder = TempDir::with_prefix("root-").unwrap();
    let root = folder.path().join("root");
    install(&root);
    let share = Share::of(&root, "root", default_model(), &[] as &[&str]).unwrap();
    let guest = share
        .attach(Guest::new(Vmm::Qemu).kernel(series).memory_mib(512).cpus(2))
        .script(format!("share_up root {}", cache.option()))
        .new_root("/mnt")
        .timeout(LIMIT)
        .spawn()
        .unwrap();
    let mut shell = Shell { guest, position: 0 };
    shell.expect("ninep login: ");
    shell.guest.send("root").unwrap();
    shell.expect("Password: ");
    shell.guest.send(PASSWORD).unwrap();
    shell.expect("# ");
    assert!(shell.run("findmnt -n -o FSTYPE /").contains("9p"));
    shell.run("dpkg -i /root/package.deb");
    assert!(shell.run("hello").contains("Hello, world!"));
    shell.run("dpkg --configure --pending");
    let output = shell
        .run("echo $(dpkg --verify hello; dpkg --audit; systemctl --failed --no-pager --no-legend) enough");
    assert!(output.lines().any(|line| line.trim() == "enough"), "{output}");
    shell.guest.send("systemctl poweroff").unwrap();
    let console = shell.guest.wait_power_off().unwrap();
    assert!(console.contains("Power down"), "{console}");
    let status = fs::read_to_string(root.join("var/lib/dpkg/status")).unwrap();
    assert!(status.contains("Package: hello\nStatus: install ok installed\n"));
    assert!(root.join("usr/bin/hello").exists());
    share.stop().unwrap();
}

#[test]
fn a_debian_boots_and_installs_a_package() {
    debian_boots(Series::Stable, Cache::Loose);
}

#[test]
#[ignore = "takes minutes, and is part of the whole matrix"]
fn uncached() {
    debian_boots(Series::Stable, Cache::None);
}

#[test]
#[ignore = "takes minutes, and is part of the whole matrix"]
fn with_mmap() {
    debian_boots(Series::Stable, Cache::Mmap);
}

#[test]
#[ignore = "takes minutes, and is part of the whole matrix"]
fn on_the_old_kernel() {
    debian_boots(Series::OldStable, Cache::Loose);
}
