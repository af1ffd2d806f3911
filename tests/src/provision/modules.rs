//! Kernel modules: where they are, what they depend on, and in which order they load.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The modules of one kernel.
#[derive(Debug, Clone, Default)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    /// Names that are part of the kernel itself; `None` when nothing tells.
    builtin: Option<BTreeSet<String>>,
}

/// A module that is ready for `insmod`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The uncompressed object.
    pub object: Vec<u8>,
}

impl Modules {
    /// Finds the modules below `folder`, such as `/lib/modules/VERSION`.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut modules = Self::default();
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(&folder)
                .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
                .with_context(|| format!("Cannot list {}", folder.display()))?;
            for entry in entries {
                // Not following links: `build` points to the whole source of the kernel.
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(entry.path());
                } else if let Some((name, _)) =
                    entry.file_name().to_str().and_then(|name| name.split_once(".ko"))
                {
                    modules.files.insert(canonical(name), entry.path());
                }
            }
        }
        if let Ok(list) = fs::read_to_string(folder.join("modules.builtin")) {
            let names = list.lines().filter_map(|line| Path::new(line).file_stem()?.to_str());
            modules.builtin = Some(names.map(canonical).collect());
        }
        Ok(modules)
    }

    /// The modules `names` and all that they depend on, each after what it depends on.
    pub fn in_load_order<S: AsRef<str>>(&self, names: impl IntoIterator<Item = S>) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.visit(&canonical(name.as_ref()), &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<Module>) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            if self.builtin.as_ref().is_none_or(|builtin| builtin.contains(name)) {
                return Ok(());
            }
            bail!("The kernel has no module {name}");
        };
        let object = read_module(path)?;
        for dependency in dependencies(&object) {
            self.visit(&dependency, seen, order)
                .with_context(|| format!("{name} depends on {dependency}"))?;
        }
        order.push(Module { name: name.to_owned(), object });
        Ok(())
    }

    /// Writes the modules `names` and their dependencies, uncompressed, to a folder that [`Modules::open`] reads.
    pub(super) fn keep(&self, names: &[&str], folder: &Path) -> Result<()> {
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            fs::write(&path, bytes).with_context(|| format!("Cannot write {}", path.display()))
        };
        fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        for module in self.in_load_order(names)? {
            write(&format!("{}.ko", module.name), &module.object)?;
        }
        if let Some(builtin) = &self.builtin {
            let list: String = builtin.iter().flat_map(|name| [name, ".ko\n"]).collect();
            write("modules.builtin", list.as_bytes())?;
        }
        Ok(())
    }
}

/// File names may have hyphens where the kernel uses underscores.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let read = || -> Result<Vec<u8>> {
        let bytes = fs::read(path)?;
        let mut object = Vec::new();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => return Ok(bytes),
            Some("xz") => lzma_rust2::XzReader::new(&bytes[..], true).read_to_end(&mut object)?,
            Some("zst") => ruzstd::decoding::StreamingDecoder::new(&bytes[..])?.read_to_end(&mut object)?,
            _ => bail!("it is compressed in an unknown way (known are .xz and .zst)"),
        };
        Ok(object)
    };
    read().with_context(|| format!("Cannot read the kernel module {}", path.display()))
}

/// The names in a module's `depends=` entry: a string in the section `.modinfo`, which lists them by commas.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    // An entry begins where another one, or the padding before the section, ended.
    let begins = |at: &usize| object[*at..].starts_with(KEY) && (*at == 0 || object[*at - 1] == 0);
    let Some(at) = (0..object.len()).find(begins) else {
        return Vec::new();
    };
    let list = object[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let list = String::from_utf8_lossy(list);
    list.split(',').filter(|name| !name.is_empty()).map(canonical).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> tempfile::TempDir {
        let folder = tempfile::TempDir::new().unwrap();
        let kernel = folder.path().join("kernel/net");
        fs::create_dir_all(&kernel).unwrap();
        let module = |name: &str, depends: &str| {
            let info = format!("\x7fELF\0license=GPL\0depends={depends}\0intree=Y\0");
            fs::write(kernel.join(format!("{name}.ko")), info).unwrap();
        };
        module("9p", "9pnet,netfs");
        module("9pnet", "");
        module("9pnet-virtio", "9pnet,virtio");
        module("netfs", "");
        module("broken", "absent");
        fs::write(folder.path().join("modules.builtin"), "kernel/drivers/virtio/virtio.ko\n").unwrap();
        folder
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn dependencies_load_first_and_once() {
        let tree = tree();
        let modules = Modules::open(tree.path()).unwrap();
        let order = modules.in_load_order(["9p", "9pnet-virtio", "virtio"]).unwrap();
        assert_eq!(names(&order), ["9pnet", "netfs", "9p", "9pnet_virtio"]);
    }

    #[test]
    fn a_missing_module_is_an_error_that_says_who_needs_it() {
        let tree = tree();
        let modules = Modules::open(tree.path()).unwrap();
        let error = format!("{:#}", modules.in_load_order(["broken"]).unwrap_err());
        assert_eq!(error, "broken depends on absent: The kernel has no module absent");
    }

    #[test]
    fn what_was_kept_can_be_opened_again() {
        let (tree, kept) = (tree(), tempfile::TempDir::new().unwrap());
        Modules::open(tree.path()).unwrap().keep(&["9p"], kept.path()).unwrap();
        let modules = Modules::open(kept.path()).unwrap();
        assert_eq!(names(&modules.in_load_order(["9p", "virtio"]).unwrap()), ["9pnet", "netfs", "9p"]);
        assert!(modules.in_load_order(["9pnet_virtio"]).is_err());
    }

    #[test]
    fn without_a_list_everything_may_be_built_in() {
        assert_eq!(Modules::default().in_load_order(["virtio_blk"]).unwrap(), []);
    }

    #[test]
    fn only_a_whole_entry_counts() {
        assert_eq!(dependencies(b"x\0mydepends=no\0depends=a-b,c\0"), ["a_b", "c"]);
        assert_eq!(dependencies(b"depends=\0"), Vec::<String>::new());
        assert_eq!(dependencies(b"nothing"), Vec::<String>::new());
    }
}
