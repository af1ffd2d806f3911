//! A whole Debian in a folder, made without root and without running anything of it.
//!
//! The packages are unpacked, and the few things that their maintainer scripts would do for a system that boots to a login
//! prompt are done here. dpkg's database says that they are installed, so that further packages can be, with their
//! scripts, once it runs.
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::apt::{self, Apt, Debian};
use super::cache::{Cache, progress};
use super::{RECIPE, program, table};
use crate::process;

const TOOL_LIMIT: Duration = Duration::from_secs(5 * 60);

/// The password of root in [`DebianRoot::folder`].
pub const PASSWORD: &str = "ninep";
/// [`PASSWORD`] as crypt(3) knows it.
const PASSWORD_HASH: &str =
    "$6$vhostuser$.QAQ4eXpeedcEnZsKQAs2SpaUUkr29sK7nI/gIzaytHladJN/fWIgPf5Go.LA4acLqIk4OucWHFuLu.wHve0F/";

/// What no test looks at: a quarter of all files.
const UNNEEDED: [&str; 4] = ["usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man"];

/// Files as the maintainer scripts of the packages would have made them.
const FILES: [(&str, &str); 9] = [
    ("etc/fstab", ""),
    ("etc/hostname", "ninep\n"),
    ("etc/hosts", "127.0.0.1 localhost ninep\n"),
    ("etc/machine-id", "00000000000000000000000000000009\n"),
    ("etc/pam.d/common-account", "account required pam_unix.so\n"),
    ("etc/pam.d/common-auth", "auth required pam_unix.so\n"),
    ("etc/pam.d/common-password", "password required pam_unix.so\n"),
    ("etc/pam.d/common-session", "session required pam_unix.so\n"),
    ("etc/pam.d/common-session-noninteractive", "session required pam_unix.so\n"),
];

/// Folders that they would have made, and symbolic links.
const FOLDERS: [&str; 7] = ["media", "mnt", "opt", "srv", "var/mail", "var/opt", "var/spool/mail"];
const LINKS: [(&str, &str); 3] = [("run", "var/run"), ("../run/lock", "var/lock"), ("mawk", "usr/bin/awk")];

/// A Debian.
#[derive(Debug, Clone)]
pub struct DebianRoot {
    /// The tree, to be copied by whoever wants to write to it. It belongs to whoever runs the tests.
    pub folder: PathBuf,
    /// The same as an ext4 file system, for a guest's disk.
    pub image: PathBuf,
    /// A package to install, `hello`.
    pub package: PathBuf,
}

/// Fetches and puts together what [`table::DEBIAN`] lists, unless the cache has it.
pub fn debian() -> Result<DebianRoot> {
    let debian = Debian::detect().map_err(|why| why.context("No Debian root for the guests"))?;
    let cache = Cache::open()?;
    let recipe = (
        format!("{:?}{:?}", table::DEBIAN, table::INSTALLED),
        format!("{UNNEEDED:?}{FILES:?}{FOLDERS:?}{LINKS:?}{PASSWORD_HASH}{REGISTER}"),
        RECIPE,
    );
    let place = cache.entry("debian", &recipe, |content, _| {
        let scratch = tempfile::Builder::new().prefix(".unpack-").tempdir_in(cache.root());
        let scratch = scratch.context("Cannot make a folder in the cache")?;
        let apt = Apt::open(&cache, &debian)?;
        let (archives, extra) = (scratch.path().join("archives"), scratch.path().join("extra"));
        apt.download(&table::DEBIAN, &archives)?;
        apt.download(&table::INSTALLED, &extra)?;
        drop(apt);
        progress("putting a Debian together");
        let root = content.join("root");
        apt::unpack(&archives, &root)?;
        for folder in UNNEEDED {
            let folder = root.join(folder);
            fs::remove_dir_all(&folder).with_context(|| format!("Cannot remove {}", folder.display()))?;
        }
        register(&apt::archives_in(&archives)?, &root)?;
        configure(&root)?;
        let packages = apt::archives_in(&extra)?;
        ensure!(packages.len() == 1, "apt-get downloaded {packages:?} where one package was asked for");
        fs::copy(&packages[0], content.join("package.deb")).context("Cannot keep the package")?;
        image(&root, &content.join("root.ext4"))
    })?;
    Ok(DebianRoot {
        folder: place.join("root"),
        image: place.join("root.ext4"),
        package: place.join("package.deb"),
    })
}

/// Enters unpacked packages into the database of the dpkg in `root`.
fn register(archives: &[PathBuf], root: &Path) -> Result<()> {
    let database = root.join("var/lib/dpkg");
    // One shell for all: it is a loop of a few programs for two hundred packages.
    let mut command = Command::new("sh");
    command.arg("-ec").arg(REGISTER).arg("sh").arg(&database).args(archives);
    process::run(command, TOOL_LIMIT).context("Cannot write the database of dpkg").map(|_| ())
}

/// What `dpkg --unpack` and `--configure` leave, as dpkg(5) and deb-control(5) describe it: a status of all packages, and
/// their lists of files and maintainer scripts.
const REGISTER: &str = r#"
database=$1; shift
mkdir -p "$database/info" "$database/updates" "$database/triggers" "$database/parts"
: >"$database/status"; : >"$database/available"; echo 1 >"$database/info/format"
for archive in "$@"; do
    control=$(mktemp -d)
    dpkg-deb --control "$archive" "$control"
    name=$(sed -n 's/^Package: //p' "$control/control")
    architecture=$(sed -n 's/^Architecture: //p' "$control/control")
    # Packages of several architectures may be installed side by side only if they say so.
    ! grep -q '^Multi-Arch: same' "$control/control" || name=$name:$architecture
    { sed '/^Package: /a Status: install ok installed' "$control/control"
      if [ -e "$control/conffiles" ]; then
          echo Conffiles:
          dpkg-deb --fsys-tarfile "$archive" >"$control/tar"
          sed -n 's,^/,,p' "$control/conffiles" | while read -r file; do
              sum=$(tar -xOf "$control/tar" "./$file" 2>/dev/null | md5sum | cut -d ' ' -f 1)
              echo " /$file $sum"
          done
          rm -f "$control/tar"
      fi
      echo; } >>"$database/status"
    dpkg-deb --fsys-tarfile "$archive" | tar -t | sed 's,^\.,,; s,/$,,; s,^$,/.,' >"$database/info/$name.list"
    rm "$control/control"
    for file in "$control"/*; do
        [ ! -e "$file" ] || mv "$file" "$database/info/$name.${file##*/}"
    done
    rmdir "$control"
done
"#;

/// Does what is left of the maintainer scripts' work.
fn configure(root: &Path) -> Result<()> {
    let write = |path: &str, text: &str| {
        let path = root.join(path);
        fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))
    };
    for folder in FOLDERS {
        let folder = root.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    }
    for (target, link) in LINKS {
        let link = root.join(link);
        if link.symlink_metadata().is_err() {
            symlink(target, &link).with_context(|| format!("Cannot make the link {}", link.display()))?;
        }
    }
    for (path, text) in FILES {
        write(path, text)?;
    }
    // base-passwd: its master files, and a password for root instead of none.
    let read = |name: &str| {
        let path = root.join("usr/share/base-passwd").join(name);
        fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))
    };
    let passwd = read("passwd.master")?.replace("root:*:", "root:x:");
    write("etc/passwd", &passwd)?;
    write("etc/group", &read("group.master")?)?;
    let shadow = passwd.lines().filter_map(|line| line.split(':').next()).map(|name| {
        let password = if name == "root" { PASSWORD_HASH } else { "*" };
        format!("{name}:{password}:20000:0:99999:7:::\n")
    });
    write("etc/shadow", &shadow.collect::<String>())?;
    // systemd: its users, and no first boot.
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut sysusers = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    sysusers.arg("--library-path").arg(format!("{0}:{0}/systemd", libraries.display()));
    sysusers.arg(root.join("usr/bin/systemd-sysusers")).arg("--root").arg(root);
    process::run(sysusers, TOOL_LIMIT).context("Cannot make the users of systemd")?;
    // It left them without any permission, and whoever runs the tests is to copy them.
    for file in ["etc/gshadow", "etc/shadow"] {
        let path = root.join(file);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640))
            .with_context(|| format!("Cannot protect {}", path.display()))?;
    }
    for folder in ["etc", "var"] {
        write(&format!("{folder}/.updated"), "")?;
    }
    Ok(())
}

/// Makes a file system of `root` that has room for nothing else.
fn image(root: &Path, image: &Path) -> Result<()> {
    let mut du = Command::new("du");
    du.args(["-s", "-k", "--apparent-size"]).arg(root);
    let output = process::run(du, TOOL_LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let kib: u64 =
        text.split_whitespace().next().and_then(|number| number.parse().ok()).context("No size")?;
    // A quarter for blocks that are not full, and for the file system's own.
    let size = format!("{}k", kib * 5 / 4 + 16 * 1024);
    let mut mke2fs = program("mke2fs")?.command();
    mke2fs.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d"]);
    mke2fs.arg(root).arg(image).arg(size);
    process::run(mke2fs, TOOL_LIMIT).context("Cannot make a file system of the Debian root").map(|_| ())
}
