//! The guests' root file system: a cpio archive that the kernel unpacks into memory.
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use cpio::newc::{self, ModeFileType};

use crate::process;
use crate::provision::{Module, Program};

const LIST_LIMIT: Duration = Duration::from_secs(30);
/// Where the guest finds shared libraries, whichever distribution they come from.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// An archive in the making.
#[derive(Debug)]
pub(super) struct Initramfs {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Initramfs {
    /// A root with the folders and device nodes that every guest needs.
    pub(super) fn new() -> Result<Self> {
        let mut archive = Self { bytes: Vec::new(), names: BTreeSet::new() };
        for folder in ["dev", "proc", "sys", "tmp", "mnt"] {
            archive.folders(&format!("{folder}/"))?;
        }
        // The kernel opens the console for the first process before that can mount /dev.
        archive.device("dev/console", 0o600, 5, 1)?;
        archive.device("dev/null", 0o666, 1, 3)?;
        Ok(archive)
    }

    /// Adds a file, and the folders that it lies in. A path that exists already keeps its content.
    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let path = path.trim_start_matches('/');
        self.folders(path)?;
        if !self.names.insert(path.to_owned()) {
            return Ok(());
        }
        let entry = newc::Builder::new(path).mode(mode).set_mode_file_type(ModeFileType::Regular);
        self.entry(entry, content).with_context(|| format!("Cannot add {path} to the guest"))
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.folders(path)?;
        if !self.names.insert(path.to_owned()) {
            return Ok(());
        }
        let entry = newc::Builder::new(path).mode(0o777).set_mode_file_type(ModeFileType::Symlink);
        self.entry(entry, target.as_bytes()).with_context(|| format!("Cannot add {path} to the guest"))
    }

    /// Adds busybox as the shell and under the names of all its commands.
    pub(super) fn busybox(&mut self, busybox: &Program) -> Result<()> {
        self.libraries(busybox)?;
        self.host_file("bin/busybox", 0o755, &busybox.path)?;
        for name in applets(busybox)? {
            self.link(&format!("bin/{name}"), "busybox")?;
        }
        Ok(())
    }

    /// Adds a program with its libraries to the guest's `/usr/bin`.
    pub(super) fn program(&mut self, program: &Program) -> Result<()> {
        self.libraries(program)?;
        self.host_file(&format!("usr/bin/{}", file_name(&program.path)?), 0o755, &program.path)
    }

    /// Adds kernel modules and the list that tells init in which order they load.
    pub(super) fn modules(&mut self, modules: &[Module]) -> Result<()> {
        let mut list = String::new();
        for module in modules {
            self.file(&format!("guest/modules/{}.ko", module.name), 0o644, &module.object)?;
            list.push_str(&module.name);
            list.push('\n');
        }
        self.file("guest/modules.list", 0o644, list.as_bytes())
    }

    /// The finished archive.
    pub(super) fn finish(self) -> Result<Vec<u8>> {
        newc::trailer(self.bytes).context("Cannot finish the guest's root file system")
    }

    fn libraries(&mut self, program: &Program) -> Result<()> {
        for library in &program.libraries {
            self.host_file(&format!("{LIBRARIES}/{}", file_name(library)?), 0o755, library)?;
        }
        if let Some(loader) = &program.loader {
            // The path that x86-64 programs name, whichever copy it is.
            self.host_file("lib64/ld-linux-x86-64.so.2", 0o755, loader)?;
        }
        Ok(())
    }

    fn host_file(&mut self, path: &str, mode: u32, source: &Path) -> Result<()> {
        let content = std::fs::read(source).with_context(|| format!("Cannot read {}", source.display()))?;
        self.file(path, mode, &content)
    }

    /// Adds the folders above `path`.
    fn folders(&mut self, path: &str) -> Result<()> {
        for (end, _) in path.match_indices('/') {
            let folder = &path[..end];
            if self.names.insert(folder.to_owned()) {
                let entry =
                    newc::Builder::new(folder).mode(0o755).set_mode_file_type(ModeFileType::Directory);
                self.entry(entry, &[]).with_context(|| format!("Cannot add {folder} to the guest"))?;
            }
        }
        Ok(())
    }

    fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        self.names.insert(path.to_owned());
        let entry = newc::Builder::new(path).mode(mode).set_mode_file_type(ModeFileType::Char);
        let entry = entry.rdev_major(major).rdev_minor(minor);
        self.entry(entry, &[]).with_context(|| format!("Cannot add {path} to the guest"))
    }

    fn entry(&mut self, entry: newc::Builder, content: &[u8]) -> Result<()> {
        // Files with equal numbers and several links would be taken for one file.
        let number = u32::try_from(self.names.len())?;
        let mut writer = entry.ino(number).nlink(1).write(&mut self.bytes, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

fn file_name(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.with_context(|| format!("{} has no usable name", path.display()))
}

fn applets(busybox: &Program) -> Result<Vec<String>> {
    let mut command: Command = busybox.command();
    command.arg("--list");
    let output = process::run(command, LIST_LIMIT).context("Cannot list the commands of busybox")?;
    let text = String::from_utf8(output.stdout).map_err(io::Error::other)?;
    Ok(text.lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}
