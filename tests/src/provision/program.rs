//! Programs with the shared libraries that they need, from unpacked packages or from the host.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::table::Component;
use crate::process;

const LIST_LIMIT: Duration = Duration::from_secs(60);
/// Where a Debian package's libraries and the loader lie.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// Where a package may have libraries of its own besides.
const OWN_LIBRARIES: [&str; 1] = ["usr/lib/ganesha"];
const LOADER: &str = "ld-linux-x86-64.so.2";

/// A program and what it loads when it starts.
#[derive(Debug, Clone)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// What starts it; `None` for a static program.
    pub loader: Option<PathBuf>,
    /// Its shared libraries.
    pub libraries: Vec<PathBuf>,
    /// A program of the host starts as it is; others need their own loader and libraries.
    of_host: bool,
}

impl Program {
    /// The program `name` of an unpacked root.
    pub(super) fn in_root(root: &Path, name: &str) -> Result<Self> {
        let path =
            ["usr/bin", "usr/sbin", "usr/libexec"].into_iter().map(|folder| root.join(folder).join(name));
        let path = path
            .clone()
            .find(|path| path.exists())
            .with_context(|| format!("There is no program {name} in {}", root.display()))?;
        let loader = root.join(LIBRARIES).join(LOADER);
        if is_static(&path)? {
            return Ok(Self { path, loader: None, libraries: Vec::new(), of_host: false });
        }
        let libraries = list_libraries(root, &loader, &path)?;
        Ok(Self { path, loader: Some(loader), libraries, of_host: false })
    }

    /// The same with libraries that it loads by name.
    pub(super) fn with_plugins(mut self, plugins: &[&str]) -> Self {
        if let Some(folder) = self.own_libraries() {
            let plugins: Vec<PathBuf> = plugins.iter().map(|plugin| folder.join(plugin)).collect();
            self.libraries.extend(plugins);
        }
        self
    }

    /// A program of the host.
    pub(super) fn of_host(path: &Path) -> Result<Self> {
        let path = path.to_owned();
        if is_static(&path)? {
            return Ok(Self { path, loader: None, libraries: Vec::new(), of_host: true });
        }
        let mut ldd = Command::new("ldd");
        ldd.arg(&path);
        let output = process::run(ldd, LIST_LIMIT)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let loader =
            text.lines().filter_map(|line| line.trim().split(' ').next()).find(|word| word.starts_with('/'));
        let loader = loader.with_context(|| format!("Cannot tell what loads {}", path.display()))?;
        Ok(Self { loader: Some(loader.into()), libraries: parse_libraries(&text), path, of_host: true })
    }

    /// The folder of the libraries that came with it; `None` for a program of the host.
    pub(super) fn own_libraries(&self) -> Option<&Path> {
        if self.of_host { None } else { self.loader.as_deref().and_then(Path::parent) }
    }

    /// A command that runs it on the host.
    pub fn command(&self) -> Command {
        self.command_with(&[])
    }

    /// The same, with more libraries loaded from the start, by their names in the program's own folder. One of the host
    /// has to know by itself what it loads.
    pub fn command_with(&self, libraries: &[&str]) -> Command {
        match (&self.loader, self.of_host) {
            (Some(loader), false) => {
                let mut command = Command::new(loader);
                if let Some(name) = self.path.file_name() {
                    command.arg("--argv0").arg(name);
                }
                if let Some(folder) = loader.parent() {
                    command.arg("--library-path").arg(folder);
                }
                if !libraries.is_empty() {
                    command.arg("--preload").arg(libraries.join(":"));
                }
                command.arg(&self.path);
                command
            }
            _ => Command::new(&self.path),
        }
    }
}

/// Copies what `component` keeps from the unpacked packages in `full` to `slim`.
pub(super) fn keep(component: &Component, full: &Path, slim: &Path) -> Result<()> {
    let libraries = slim.join(LIBRARIES);
    fs::create_dir_all(&libraries).with_context(|| format!("Cannot make {}", libraries.display()))?;
    let loader = full.join(LIBRARIES).join(LOADER);
    let copy_libraries = |of: &Path| -> Result<()> {
        for library in list_libraries(full, &loader, of)? {
            // Flat, wherever it lay: the programs are started with this one folder as their library path.
            let name = library.file_name().with_context(|| format!("{} has no name", library.display()))?;
            copy(&library, &libraries.join(name))?;
        }
        copy(&loader, &libraries.join(LOADER))
    };
    for name in component.programs {
        let program = Program::in_root(full, name)?;
        copy(&program.path, &slim.join("usr/bin").join(name))?;
        if program.loader.is_some() {
            copy_libraries(&program.path)?;
        }
    }
    for plugin in component.plugins {
        let path = Path::new(LIBRARIES).join(plugin);
        copy(&full.join(&path), &slim.join(&path))?;
        copy_libraries(&full.join(&path))?;
    }
    for file in component.files {
        copy(&full.join(file), &slim.join(file))?;
    }
    Ok(())
}

/// Copies a file, following links, and makes the folder that it goes to.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    let copy = || {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(from, to)
    };
    copy().with_context(|| format!("Cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn list_libraries(root: &Path, loader: &Path, object: &Path) -> Result<Vec<PathBuf>> {
    ensure!(loader.exists(), "{} has no {LOADER} for {}", root.display(), object.display());
    let mut command = Command::new(loader);
    // The host's preloads and paths are for the host's C library.
    command.env_remove("LD_PRELOAD").env_remove("LD_LIBRARY_PATH");
    let folders = [LIBRARIES].into_iter().chain(OWN_LIBRARIES).map(|folder| root.join(folder));
    let path = std::env::join_paths(folders).with_context(|| format!("Cannot use {}", root.display()))?;
    command.arg("--library-path").arg(path).arg("--list").arg(object);
    let output = process::run(command, LIST_LIMIT)
        .with_context(|| format!("Cannot list the shared libraries of {}", object.display()))?;
    Ok(parse_libraries(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads the lines `NAME => PATH (ADDRESS)` that the loader and ldd print.
fn parse_libraries(text: &str) -> Vec<PathBuf> {
    let paths = text.lines().filter_map(|line| Some(line.split_once(" => ")?.1.rsplit_once(" (")?.0));
    paths.filter(|path| path.starts_with('/')).map(PathBuf::from).collect()
}

/// Whether an ELF file asks for no loader.
fn is_static(path: &Path) -> Result<bool> {
    let bytes = fs::read(path).with_context(|| format!("Cannot read {}", path.display()))?;
    asks_for_no_loader(&bytes).with_context(|| format!("{} is no 64-bit ELF program", path.display()))
}

fn asks_for_no_loader(elf: &[u8]) -> Option<bool> {
    /// `PT_INTERP`: the program header that names the loader.
    const INTERPRETER: [u8; 4] = 3_u32.to_le_bytes();
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let short = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?).into());
    let table = usize::try_from(u64::from_le_bytes(elf.get(0x20..0x28)?.try_into().ok()?)).ok()?;
    let (size, count): (usize, usize) = (short(0x36)?, short(0x38)?);
    for index in 0..count {
        let at = table.checked_add(index * size)?;
        if elf.get(at..at.checked_add(4)?)? == INTERPRETER {
            return Some(false);
        }
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_the_loaders_list() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\
            \tlibfdisk.so.1 => /root/usr/lib/libfdisk.so.1 (0x00007f24)\n\
            \tlibc.so.6 => /root/usr/lib/libc.so.6 (0x00007f23)\n\
            \t/root/ld-linux-x86-64.so.2 (0x00007f26)\n";
        let paths = ["/root/usr/lib/libfdisk.so.1", "/root/usr/lib/libc.so.6"].map(PathBuf::from);
        assert_eq!(parse_libraries(text), paths);
    }

    #[test]
    fn a_dynamic_program_asks_for_a_loader() {
        let shell = fs::read("/bin/sh").unwrap();
        assert_eq!(asks_for_no_loader(&shell), Some(false));
        assert_eq!(asks_for_no_loader(b"#!/bin/sh"), None);
        // A table that begins behind the end of the file.
        assert_eq!(asks_for_no_loader(&shell[..0x40]), None);
    }

    #[test]
    fn a_program_of_the_host_brings_its_libraries() {
        let shell = Program::of_host(Path::new("/bin/sh")).unwrap();
        assert!(shell.loader.is_some_and(|loader| loader.exists()));
        assert!(shell.libraries.iter().any(|path| path.to_string_lossy().contains("libc.so")));
    }
}
