//! Gets what the tests need besides Rust: QEMU, guest kernels, User Mode Linux and the guests' programs.
//!
//! On a Debian host everything comes from Debian packages that a private apt instance fetches and verifies, unpacked
//! into a cache outside the source tree; nothing is installed, and an ordinary user can do it. Each part is fetched
//! when it is first asked for. Which packages these are says `table`; where the host's apt gets Debian from is
//! read from `/etc/apt`.
//!
//! Environment variables take precedence, and are the way on other hosts:
//!
//! | variable | names |
//! |---|---|
//! | `VHOST_USER_TEST_QEMU` | `qemu-system-x86_64`, 11.1 or newer |
//! | `VHOST_USER_TEST_KERNEL` | an x86-64 kernel: a bzImage, or a vmlinux with PVH |
//! | `VHOST_USER_TEST_MODULES` | its `/lib/modules/VERSION`; without it all drivers count as built in |
//! | `VHOST_USER_TEST_OLD_KERNEL` | a kernel of an older series (6.1) |
//! | `VHOST_USER_TEST_OLD_MODULES` | its modules, likewise |
//! | `VHOST_USER_TEST_UML` | a User Mode Linux |
//! | `VHOST_USER_TEST_UML_MODULES` | its modules; without it all drivers count as built in |
//! | `VHOST_USER_TEST_BUSYBOX` | a busybox |
//! | `VHOST_USER_TEST_CACHE` | the cache's folder, instead of `vhost-user-tests` in the user's cache folder |
//! | `VHOST_USER_TEST_MIRROR` | the Debian mirror to use |
//! | `VHOST_USER_TEST_ACCEL` | `kvm` or `tcg`: how QEMU runs its guests, instead of finding out whether KVM works |
mod apt;
mod bzimage;
mod cache;
mod crates;
mod debian;
mod modules;
mod program;
mod sources;
mod table;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

pub use self::crates::c_source;
pub use self::debian::{DebianRoot, PASSWORD, debian};
pub use self::modules::{Module, Modules};
pub use self::program::Program;

use self::apt::{Apt, Debian};
use self::cache::Cache;
pub(crate) use self::cache::progress;
use self::table::Component;
use crate::process;

/// Part of every cache key: raise it when the way of unpacking changes, so that old results are not used.
const RECIPE: u32 = 1;
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// QEMU with its own libraries.
#[derive(Debug, Clone)]
pub struct Qemu {
    system: Program,
    /// The cached packages; `None` for a QEMU of the host.
    root: Option<PathBuf>,
}

impl Qemu {
    /// `qemu-system-x86_64`, ready for its arguments.
    pub fn system(&self) -> Command {
        let mut command = self.system.command();
        if let Some(root) = &self.root {
            command.env("QEMU_MODULE_DIR", modules_of_qemu(root));
            for folder in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(root.join(folder));
            }
        }
        command
    }

    /// `qemu-img`, which reaches a daemon with `--image-opts driver=virtio-blk-vhost-user,path=SOCKET`.
    pub fn img(&self) -> Result<Command> {
        self.tool("qemu-img")
    }

    /// `qemu-io`, which reaches a daemon with `--image-opts driver=virtio-blk-vhost-user,path=SOCKET`.
    pub fn io(&self) -> Result<Command> {
        self.tool("qemu-io")
    }

    fn tool(&self, name: &str) -> Result<Command> {
        let Some(root) = &self.root else {
            let path =
                find_in_path(name).with_context(|| format!("There is no {name} on the PATH; install it"))?;
            return Ok(Command::new(path));
        };
        let mut command = Program::in_root(root, name)?.command();
        command.env("QEMU_MODULE_DIR", modules_of_qemu(root));
        Ok(command)
    }
}

/// Where the parts of QEMU lie that it loads when they are asked for.
fn modules_of_qemu(root: &Path) -> PathBuf {
    root.join("usr/lib/x86_64-linux-gnu/qemu")
}

/// A kernel for a QEMU guest.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What QEMU's `-kernel` takes.
    pub image: PathBuf,
    /// Its modules.
    pub modules: Modules,
}

/// A User Mode Linux.
#[derive(Debug, Clone)]
pub struct Uml {
    /// The program.
    pub program: PathBuf,
    /// Its modules.
    pub modules: Modules,
}

/// QEMU 11.1 or newer.
pub fn qemu() -> Result<Qemu> {
    if let Some(path) = variable("VHOST_USER_TEST_QEMU")? {
        return Ok(Qemu { system: Program::of_host(&path)?, root: None });
    }
    match Debian::detect() {
        Ok(debian) => {
            let root =
                fetch(&debian, &table::QEMU, &[], |full, slim, _| program::keep(&table::QEMU, full, slim))?;
            Ok(Qemu { system: Program::in_root(&root, "qemu-system-x86_64")?, root: Some(root) })
        }
        Err(why) => {
            let path = on_path("qemu-system-x86_64", "QEMU 11.1 or newer", "VHOST_USER_TEST_QEMU", &why)?;
            check_qemu(&path)?;
            Ok(Qemu { system: Program::of_host(&path)?, root: None })
        }
    }
}

/// The series of a kernel for [`qemu`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Series {
    /// That of Debian's stable release, 6.12.
    #[default]
    Stable,
    /// That of the release before, 6.1.
    OldStable,
}

impl Series {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Stable, Self::OldStable];

    /// The environment variables that name a kernel of this series, and its modules.
    fn variables(self) -> (&'static str, &'static str) {
        match self {
            Self::Stable => ("VHOST_USER_TEST_KERNEL", "VHOST_USER_TEST_MODULES"),
            Self::OldStable => ("VHOST_USER_TEST_OLD_KERNEL", "VHOST_USER_TEST_OLD_MODULES"),
        }
    }

    fn component(self) -> &'static Component {
        match self {
            Self::Stable => &table::KERNEL,
            Self::OldStable => &table::OLD_KERNEL,
        }
    }
}

/// A kernel for [`qemu`].
pub fn kernel(series: Series) -> Result<Kernel> {
    let (image, modules) = series.variables();
    if let Some(image) = variable(image)? {
        return Ok(Kernel { image, modules: modules_of_variable(modules)? });
    }
    let debian = Debian::detect()
        .map_err(|why| why.context(format!("No kernel for the guests: set {image} (and {modules})")))?;
    let folder = fetch(&debian, series.component(), &table::KERNEL_MODULES, |full, slim, _| {
        let image = only_entry(&full.join("boot"), "vmlinuz-")?;
        let bytes = fs::read(&image).with_context(|| format!("Cannot read {}", image.display()))?;
        let kernel = bzimage::extract(&bytes).with_context(|| format!("Cannot use {}", image.display()))?;
        fs::write(slim.join("vmlinux"), kernel).context("Cannot write the kernel")?;
        let tree = only_entry(&full.join("usr/lib/modules"), "")?;
        Modules::open(&tree)?.keep(&table::KERNEL_MODULES, &slim.join("modules"))
    })?;
    Ok(Kernel { image: folder.join("vmlinux"), modules: Modules::open(&folder.join("modules"))? })
}

/// A User Mode Linux with the virtio transport.
pub fn uml() -> Result<Uml> {
    if let Some(program) = variable("VHOST_USER_TEST_UML")? {
        return Ok(Uml { program, modules: modules_of_variable("VHOST_USER_TEST_UML_MODULES")? });
    }
    let debian = Debian::detect()
        .map_err(|why| why.context("No User Mode Linux for the guests: set VHOST_USER_TEST_UML"))?;
    let folder = fetch(&debian, &table::UML, &table::UML_MODULES, |full, slim, place| {
        program::keep(&table::UML, full, slim)?;
        let mut patch = Program::in_root(slim, "patchelf")?.command();
        let libraries = place.join("usr/lib/x86_64-linux-gnu");
        patch.arg("--set-interpreter").arg(libraries.join("ld-linux-x86-64.so.2"));
        patch.arg("--set-rpath").arg(&libraries).arg(slim.join("usr/bin/linux.uml"));
        process::run(patch, COMMAND_LIMIT)?;
        let tree = only_entry(&full.join("usr/lib/uml/modules"), "")?;
        Modules::open(&tree)?.keep(&table::UML_MODULES, &slim.join("modules"))
    })?;
    Ok(Uml { program: folder.join("usr/bin/linux.uml"), modules: Modules::open(&folder.join("modules"))? })
}

/// The guests' busybox.
pub fn busybox() -> Result<Program> {
    if let Some(path) = variable("VHOST_USER_TEST_BUSYBOX")? {
        return Program::of_host(&path);
    }
    packaged(&table::BUSYBOX, "busybox", "VHOST_USER_TEST_BUSYBOX")
}

/// A program for a guest that `table` knows, or on a host that is not Debian, that the host has.
pub fn program(name: &str) -> Result<Program> {
    if crates::has(name) {
        return Program::in_root(&crates::root()?, name);
    }
    let component = table::PROGRAMS.iter().find(|component| component.programs.contains(&name));
    let component =
        component.with_context(|| format!("No package in the table of programs has {name}; add one"))?;
    packaged(component, name, "the PATH")
}

/// DPDK's `dpdk-testpmd`, with the drivers that the tests use.
pub fn testpmd() -> Result<Command> {
    // Not by its own option `-d`, which refuses a cache below a folder such as /tmp.
    Ok(program("dpdk-testpmd")?.command_with(table::DPDK.plugins))
}

/// An NFS server and where its file system drivers lie (`Plugins_Dir` of its configuration).
pub fn nfs_server() -> Result<(Command, PathBuf)> {
    let program = program("ganesha.nfsd")?;
    let plugins = match program.own_libraries() {
        Some(libraries) => libraries.join("ganesha"),
        None => "/usr/lib/ganesha".into(),
    };
    Ok((program.command(), plugins))
}

fn packaged(component: &Component, name: &str, remedy: &str) -> Result<Program> {
    match Debian::detect() {
        Ok(debian) => {
            let root = fetch(&debian, component, &[], |full, slim, _| program::keep(component, full, slim))?;
            Ok(Program::in_root(&root, name)?.with_plugins(component.plugins))
        }
        Err(why) => Program::of_host(&on_path(name, name, remedy, &why)?),
    }
}

/// A remembered answer that was expensive to find, for everything that `key` describes.
pub(crate) fn remember(name: &str, key: &str, find: impl FnOnce() -> Result<String>) -> Result<String> {
    let folder = Cache::open()?.entry(name, &(key, RECIPE), |content, _| {
        fs::write(content.join("answer"), find()?).context("Cannot write the answer")
    })?;
    let path = folder.join("answer");
    fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))
}

/// Fetches and unpacks a component unless the cache has it. `keep` copies what is worth keeping from the unpacked
/// packages (first argument) to the cache's folder (second), which will be at the third when it is complete; what
/// `extra` lists has an influence on that.
fn fetch(
    debian: &Debian,
    component: &Component,
    extra: &[&str],
    keep: impl FnOnce(&Path, &Path, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let cache = Cache::open()?;
    let recipe = (format!("{component:?}"), extra, RECIPE);
    cache.entry(component.name, &recipe, |slim, place| {
        let scratch = tempfile::Builder::new().prefix(".unpack-").tempdir_in(cache.root());
        let scratch =
            scratch.with_context(|| format!("Cannot make a folder in {}", cache.root().display()))?;
        let (archives, full) = (scratch.path().join("archives"), scratch.path().join("full"));
        Apt::open(&cache, debian)?.download(component, &archives)?;
        apt::unpack(&archives, &full)?;
        keep(&full, slim, place)
    })
}

/// The one entry of `folder` that begins with `prefix`.
fn only_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let list = || -> std::io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
        let matches = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(prefix);
        Ok(entries.iter().filter(|entry| matches(entry)).map(fs::DirEntry::path).collect())
    };
    let mut entries = list().with_context(|| format!("Cannot list {}", folder.display()))?;
    match (entries.pop(), entries.is_empty()) {
        (Some(entry), true) => Ok(entry),
        _ => bail!("There is not exactly one {prefix}* in {}", folder.display()),
    }
}

/// The existing file or folder that an environment variable names.
fn variable(name: &str) -> Result<Option<PathBuf>> {
    let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let path = fs::canonicalize(&value)
        .with_context(|| format!("Cannot use {}, which {name} names", Path::new(&value).display()))?;
    Ok(Some(path))
}

fn modules_of_variable(name: &str) -> Result<Modules> {
    variable(name)?.map_or_else(|| Ok(Modules::default()), |folder| Modules::open(&folder))
}

/// A program of the host, where Debian packages cannot be had.
fn on_path(program: &str, what: &str, remedy: &str, why: &anyhow::Error) -> Result<PathBuf> {
    find_in_path(program).with_context(|| {
        format!(
            "{what} is needed, and {why:#}. Install it; {remedy} may name {program} where it is not found"
        )
    })
}

fn check_qemu(path: &Path) -> Result<()> {
    let mut command = Command::new(path);
    command.arg("--version");
    let output = process::run(command, COMMAND_LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version =
        qemu_version(&text).with_context(|| format!("Cannot tell the version of {}", path.display()))?;
    ensure!(
        version >= (11, 1),
        "{} is QEMU {}.{}, and 11.1 or newer is needed; VHOST_USER_TEST_QEMU may name another one",
        path.display(),
        version.0,
        version.1
    );
    Ok(())
}

/// Reads `QEMU emulator version 11.1.3 (...)`.
fn qemu_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_once("version ")?.1.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Where a program is that the PATH, or the folders of the administrator, have.
fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let is_program = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    folders.map(|folder| folder.join(program)).find(is_program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu_are_read() {
        let text = "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright";
        assert_eq!(qemu_version(text), Some((11, 1)));
        assert_eq!(qemu_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(qemu_version("something else"), None);
    }

    #[test]
    fn programs_are_found_on_the_path() {
        assert!(find_in_path("sh").is_some());
        assert_eq!(find_in_path("no-such-program"), None);
    }

    #[test]
    fn a_program_outside_the_table_is_an_error_that_says_what_to_do() {
        let error = program("no-such-program").unwrap_err().to_string();
        assert_eq!(error, "No package in the table of programs has no-such-program; add one");
    }
}
