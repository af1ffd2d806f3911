//! A private apt instance: it resolves and downloads Debian packages, and never touches the host's own.
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use super::cache::{Cache, progress};
use super::table::{Component, SUITES, TESTING};
use super::{find_in_path, sources};
use crate::process::{self, Process};

const UPDATE_LIMIT: Duration = Duration::from_secs(5 * 60);
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(20 * 60);
const UNPACK_LIMIT: Duration = Duration::from_secs(5 * 60);
const QUERY_LIMIT: Duration = Duration::from_secs(60);
/// Lists older than this may name packages that the mirror no longer has.
const LISTS_AGE_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);
/// How often a running download is reported.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// What a host needs to have to fetch Debian packages.
#[derive(Debug)]
pub(super) struct Debian {
    mirror: String,
    keyring: &'static str,
}

impl Debian {
    /// Looks at the host; the error says what it lacks.
    pub(super) fn detect() -> Result<Self> {
        ensure!(cfg!(target_arch = "x86_64"), "the guests are x86-64 only");
        for program in ["apt-get", "apt-cache", "dpkg", "dpkg-deb"] {
            ensure!(
                find_in_path(program).is_some(),
                "this host has no {program} to fetch Debian packages with"
            );
        }
        let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).exists()).context(
            "this host lacks the keys that Debian packages are verified with (package debian-archive-keyring)",
        )?;
        let mirror = std::env::var("VHOST_USER_TEST_MIRROR")
            .ok()
            .filter(|mirror| !mirror.is_empty())
            .or_else(|| sources::host_mirror(Path::new("/etc/apt")))
            .context(
                "/etc/apt names no Debian mirror (VHOST_USER_TEST_MIRROR can, such as http://HOST/debian)",
            )?;
        Ok(Self { mirror, keyring })
    }

    fn sources_list(&self) -> String {
        let line =
            |suite| format!("deb [arch=amd64 signed-by={}] {} {suite} main\n", self.keyring, self.mirror);
        SUITES.map(line).concat()
    }
}

/// A private apt instance inside the cache.
#[derive(Debug)]
pub(super) struct Apt {
    folder: PathBuf,
    /// Held as long as the instance is used: apt's lists are shared by all components.
    _lock: fs::File,
}

impl Apt {
    /// Sets the instance up, with lists that are fresh enough.
    pub(super) fn open(cache: &Cache, debian: &Debian) -> Result<Self> {
        let lock = cache.lock("apt")?;
        let apt = Self { folder: cache.root().join("apt"), _lock: lock };
        for folder in ["state/lists/partial", "cache/archives/partial", "empty"] {
            let folder = apt.folder.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        }
        // An empty status: nothing counts as installed, so a closure is complete down to the C library.
        apt.write("status", "")?;
        let sources = debian.sources_list();
        let changed = fs::read_to_string(apt.folder.join("sources.list")).ok().as_ref() != Some(&sources);
        apt.write("sources.list", &sources)?;
        // It counts only where a row names it, and not for what a row of an older suite depends on.
        apt.write("preferences", &format!("Package: *\nPin: release n={TESTING}\nPin-Priority: 50\n"))?;
        apt.write("apt.conf", &apt.configuration()?)?;
        if changed || apt.lists_age().is_none_or(|age| age > LISTS_AGE_LIMIT) {
            apt.update()?;
        }
        Ok(apt)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        use std::io::Write;
        let path = self.folder.join(name);
        // A mirror's URI may carry a password.
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("Cannot write {}", path.display()))
    }

    /// Read by apt after the host's own settings, of which the proxies and time limits stay in force.
    fn configuration(&self) -> Result<String> {
        let folder =
            self.folder.to_str().filter(|folder| !folder.contains(['"', '\\'])).with_context(|| {
                format!("apt cannot work in the folder {}: its name is too unusual", self.folder.display())
            })?;
        Ok(format!(
            r#"// The host's hooks after an update or an installation are about the host's own packages.
#clear APT::Update;
#clear DPkg;
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "{folder}/preferences";
Dir::Etc::preferencesparts "{folder}/empty";
APT::Architecture "amd64";
#clear APT::Architectures;
APT::Architectures {{ "amd64"; }};
APT::Default-Release "";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
// The cache has a lock of its own.
Debug::NoLocking "true";
"#
        ))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-q").arg("-c").arg(self.folder.join("apt.conf"));
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").env_remove("APT_CONFIG");
        command
    }

    fn lists_age(&self) -> Option<Duration> {
        let modified = fs::metadata(self.folder.join("updated")).ok()?.modified().ok()?;
        SystemTime::now().duration_since(modified).ok()
    }

    fn update(&self) -> Result<()> {
        progress("fetching Debian's lists of packages");
        let mut command = self.command("apt-get");
        command.arg("update");
        process::run(command, UPDATE_LIMIT)
            .context("Cannot fetch Debian's lists of packages; is the mirror of /etc/apt reachable?")?;
        self.write("updated", "")
    }

    /// Downloads a component's packages into `archives`.
    pub(super) fn download(&self, component: &Component, archives: &Path) -> Result<()> {
        let attempt = || self.try_download(component, archives);
        if let Err(error) = attempt() {
            // The mirror has moved on since the lists were fetched: newer lists name what it has now.
            if self.lists_age().is_some_and(|age| age < Duration::from_secs(60)) {
                return Err(error);
            }
            self.update()?;
            attempt()?;
        }
        check_minimum(component, archives)
    }

    fn try_download(&self, component: &Component, archives: &Path) -> Result<()> {
        let partial = archives.join("partial");
        fs::create_dir_all(&partial).with_context(|| format!("Cannot make {}", partial.display()))?;
        if !component.packages.is_empty() {
            let mut command = self.command("apt-get");
            command.arg("-o").arg(format!("Dir::Cache::archives={}", archives.display()));
            command
                .args(["-y", "--download-only", "-t", component.suite, "install"])
                .args(component.packages);
            fetch(command, component.name, archives)?;
        }
        let mut bare: Vec<String> = component.bare.iter().map(|&name| name.to_owned()).collect();
        if let Some((package, prefix)) = component.current {
            bare.push(self.dependency(package, component.suite, prefix)?);
        }
        if !bare.is_empty() {
            let mut command = self.command("apt-get");
            command.current_dir(archives).args(["-t", component.suite, "download"]).args(bare);
            fetch(command, component.name, archives)?;
        }
        Ok(())
    }

    /// The package that `package` of `suite` depends on and whose name begins with `prefix`.
    fn dependency(&self, package: &str, suite: &str, prefix: &str) -> Result<String> {
        let mut command = self.command("apt-cache");
        command.args(["depends", &format!("{package}/{suite}")]);
        let output = process::run(command, QUERY_LIMIT)?;
        parse_dependency(&String::from_utf8_lossy(&output.stdout), prefix)
            .with_context(|| format!("{package} of Debian {suite} depends on no {prefix}*"))
    }
}

/// Runs an apt-get that downloads to `archives`, and tells how far it is.
fn fetch(mut command: Command, name: &str, archives: &Path) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    progress(&format!("downloading {name}"));
    let mut process = Process::spawn(command).context("Cannot start apt-get")?;
    let start = Instant::now();
    loop {
        if let Some(status) = process.wait(PROGRESS_INTERVAL).context("Cannot wait for apt-get")? {
            let output = process.stdout().text() + &process.stderr().text();
            ensure!(
                status.success(),
                "Cannot download {name} from Debian: apt-get ended with {}:\n{}",
                process::describe(status),
                process::tail(&output, 15)
            );
            return Ok(());
        }
        let (megabytes, seconds) = (size_of_files(archives) / 1_000_000, start.elapsed().as_secs());
        progress(&format!("downloading {name}: {megabytes} MB after {seconds} s"));
        if start.elapsed() >= DOWNLOAD_LIMIT {
            bail!("Downloading {name} took more than {} minutes; {megabytes} MB came", seconds / 60);
        }
    }
}

/// Finds `  Depends: PREFIX...` in the answer of `apt-cache depends`.
fn parse_dependency(answer: &str, prefix: &str) -> Option<String> {
    let depends = answer.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    depends.map(str::to_owned).find(|name| name.starts_with(prefix))
}

/// All bytes in a folder and its `partial` subfolder.
fn size_of_files(folder: &Path) -> u64 {
    let size = |path: PathBuf| -> u64 {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.metadata().ok())
            .filter(fs::Metadata::is_file)
            .map(|data| data.len())
            .sum()
    };
    size(folder.to_owned()) + size(folder.join("partial"))
}

/// The downloaded packages.
pub(super) fn archives_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> std::io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
    };
    let mut archives = list().with_context(|| format!("Cannot list {}", folder.display()))?;
    archives.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    archives.sort();
    Ok(archives)
}

fn check_minimum(component: &Component, archives: &Path) -> Result<()> {
    let Some((package, minimum)) = component.minimum else {
        return Ok(());
    };
    let version = archives_in(archives)?
        .iter()
        .find_map(|path| version_of_archive(path.file_name()?.to_str()?, package))
        .with_context(|| format!("apt-get downloaded no {package}"))?;
    let mut command = Command::new("dpkg");
    command.args(["--compare-versions", &version, "ge", minimum]);
    ensure!(
        process::run_unchecked(command, QUERY_LIMIT)?.status.success(),
        "{package} {minimum} or newer is needed, and the mirror's {} has {version}; is it up to date?",
        component.suite
    );
    Ok(())
}

/// The version in a package's file name (`NAME_VERSION_ARCH.deb`, where a colon is written `%3a`).
fn version_of_archive(file: &str, package: &str) -> Option<String> {
    let (version, _) = file.strip_prefix(package)?.strip_prefix('_')?.rsplit_once('_')?;
    Some(version.replace("%3a", ":"))
}

/// Unpacks all downloaded packages into `root`.
pub(super) fn unpack(archives: &Path, root: &Path) -> Result<()> {
    // Packages of releases before the merge of /bin and /usr/bin must land in one place as well.
    for folder in ["bin", "sbin", "lib", "lib64"] {
        let merge = || -> std::io::Result<()> {
            fs::create_dir_all(root.join("usr").join(folder))?;
            std::os::unix::fs::symlink(format!("usr/{folder}"), root.join(folder))
        };
        merge().with_context(|| format!("Cannot make {folder} in {}", root.display()))?;
    }
    for archive in archives_in(archives)? {
        // Not `dpkg-deb --extract`, which would put a folder in the place of such a link.
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "dpkg-deb --fsys-tarfile \"$1\" | tar -xp --keep-directory-symlink -C \"$2\"",
            "sh",
        ]);
        command.arg(&archive).arg(root);
        process::run(command, UNPACK_LIMIT)
            .with_context(|| format!("Cannot unpack {}", archive.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_file_names() {
        let file = "qemu-system-x86_1%3a11.1.3+ds-1~bpo13+1_amd64.deb";
        assert_eq!(version_of_archive(file, "qemu-system-x86").unwrap(), "1:11.1.3+ds-1~bpo13+1");
        assert_eq!(version_of_archive(file, "qemu-system"), None);
    }

    #[test]
    fn a_dependency_is_found_by_its_prefix() {
        let answer = "linux-image-amd64\n  Depends: linux-image-6.12.107+deb13-amd64\n |Recommends: x\n";
        assert_eq!(parse_dependency(answer, "linux-image-").unwrap(), "linux-image-6.12.107+deb13-amd64");
        assert_eq!(parse_dependency(answer, "linux-headers-"), None);
    }

    #[test]
    fn sources_are_signed_and_only_of_the_tables_suites() {
        let debian = Debian { mirror: "http://mirror.example/debian".into(), keyring: KEYRINGS[0] };
        let list = debian.sources_list();
        assert_eq!(list.lines().count(), SUITES.len());
        assert!(
            list.lines().all(|line| line.contains("signed-by=/usr/share/keyrings/debian-archive-keyring"))
        );
    }
}
