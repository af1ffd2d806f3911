//! A share beside which there is something that must not be reached.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::share::Share;

/// What a file outside holds, which no client may ever see.
pub const SECRET: &str = "a secret of the host";

/// A share beside which a folder `outside` lies that has a `secret` and a folder.
pub struct Jail {
    /// The share.
    pub share: Share,
    /// The folder beside it.
    pub outside: PathBuf,
    before: Vec<String>,
}

impl Jail {
    /// Starts a daemon with more flags.
    pub fn new(args: &[&str]) -> Result<Self> {
        let share = Share::new(args)?;
        let outside = share.outside();
        fs::write(outside.join("secret"), SECRET)?;
        fs::create_dir(outside.join("dir"))?;
        fs::write(outside.join("dir/secret"), SECRET)?;
        let before = Self::look(&outside)?;
        Ok(Self { share, outside, before })
    }

    /// All that a client could change: names, attributes, contents.
    fn look(outside: &Path) -> Result<Vec<String>> {
        let mut all = Vec::new();
        let mut folders = vec![outside.to_owned()];
        while let Some(folder) = folders.pop() {
            let mut entries = fs::read_dir(&folder)?.collect::<Result<Vec<_>, _>>()?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let path = entry.path();
                let now = fs::symlink_metadata(&path)?;
                let content = if now.is_file() { fs::read(&path)? } else { Vec::new() };
                if now.is_dir() {
                    folders.push(path.clone());
                }
                let times = (now.mtime(), now.mtime_nsec(), now.ctime(), now.ctime_nsec());
                all.push(format!(
                    "{} {:o} {} {} {} {times:?} {content:?}",
                    path.display(),
                    now.mode(),
                    now.uid(),
                    now.gid(),
                    now.nlink()
                ));
            }
        }
        Ok(all)
    }

    /// Checks that nothing outside was changed.
    pub fn check(&self) -> Result<()> {
        let now = Self::look(&self.outside)?;
        ensure!(now == self.before, "Something outside was changed: {:?} became {now:?}", self.before);
        Ok(())
    }

    /// The inode numbers outside, by the qids that they would have.
    pub fn secrets(&self) -> Result<Vec<u64>> {
        ["", "secret", "dir", "dir/secret"]
            .iter()
            .map(|name| Ok(fs::metadata(self.outside.join(name))?.ino().wrapping_sub(2)))
            .collect()
    }
}
