//! A cgroup (version 2) in which all guests live, in place of the host: the kernel's
//! `Documentation/admin-guide/cgroup-v2.rst`, section "Memory Interface Files".

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::{HostError, SwapCounters, read};

/// A directory of cgroup version 2.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
}

/// What a cgroup has.
#[derive(Debug)]
pub(super) struct Memory {
    /// The most that it may have, bytes: the smallest limit on the way up. `u64::MAX` if there is none.
    pub limit: u64,
    /// What is left up to that limit, bytes, if nothing is reclaimed.
    room: u64,
    /// What it has and can do without: its cache of files, bytes.
    reclaimable: u64,
    /// What went to swap and came back.
    pub swap: SwapCounters,
}

impl Memory {
    /// What the cgroup can have without swapping, bytes.
    pub fn available(&self) -> u64 {
        self.room.saturating_add(self.reclaimable).min(self.limit)
    }
}

impl Cgroup {
    pub fn new(path: &Path) -> Result<Self, HostError> {
        if !path.join("memory.current").is_file() {
            return Err(HostError::NoCgroup(path.to_owned()));
        }
        Ok(Self { path: path.to_owned() })
    }

    pub fn pressure_path(&self) -> PathBuf {
        self.path.join("memory.pressure")
    }

    pub fn memory(&self, page_size: u64) -> Result<Memory, HostError> {
        let stat =
            read(self.path.join("memory.stat"), "the cgroup has to exist as long as the manager runs")?;
        let stat: HashMap<&str, u64> = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
            .collect();
        let of = |name| stat.get(name).copied();
        // Not "file": that counts the guests' memory, which is shared and cannot be dropped.
        let reclaimable = ["active_file", "inactive_file", "slab_reclaimable"]
            .into_iter()
            .filter_map(of)
            .fold(0, u64::saturating_add);
        let (limit, room) = self.limit_and_room()?;
        let pages = |name| of(name).map(|pages| pages.saturating_mul(page_size));
        // Kernels before 6.13 do not count swap traffic by cgroup. There, what was missed tells of reads, and the
        // space in use of writes: too few are seen if pages come back at the same time.
        let swap = SwapCounters {
            read: pages("pswpin").or_else(|| pages("workingset_refault_anon")).unwrap_or(0),
            written: pages("pswpout")
                .or_else(|| self.number("memory.swap.current").ok().flatten())
                .unwrap_or(0),
        };
        Ok(Memory { limit, room, reclaimable, swap })
    }

    /// The smallest limit, and the least room, of the cgroup and those that it is in: a child cannot have more than
    /// its parent.
    fn limit_and_room(&self) -> Result<(u64, u64), HostError> {
        let mut limit = u64::MAX;
        let mut room = u64::MAX;
        for path in self.path.ancestors() {
            let cgroup = Self { path: path.to_owned() };
            // The root of the hierarchy has no limits, and above it is no cgroup.
            let Some(current) = cgroup
                .number("memory.current")
                .or_else(|error| if path == self.path { Err(error) } else { Ok(None) })?
            else {
                break;
            };
            // Over memory.high the kernel makes the guests wait and reclaims: no place to be.
            for file in ["memory.max", "memory.high"] {
                if let Ok(Some(bytes)) = cgroup.number(file) {
                    limit = limit.min(bytes);
                    room = room.min(bytes.saturating_sub(current));
                }
            }
        }
        Ok((limit, room))
    }

    /// A file with one number, or "max", which is `None`.
    fn number(&self, file: &str) -> Result<Option<u64>, HostError> {
        let path = self.path.join(file);
        let text = read(path.clone(), "the cgroup has to exist as long as the manager runs")?;
        match text.trim() {
            "max" => Ok(None),
            number => number.parse().map(Some).map_err(|_| HostError::Missing { path, what: "a number" }),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs;

    /// Files as in a directory of cgroup version 2.
    pub(in crate::manage::host) fn fake_cgroup(directory: &Path, max: &str, current: u64, cache: u64) {
        fs::create_dir_all(directory).unwrap();
        let write = |file: &str, text: &str| fs::write(directory.join(file), text).unwrap();
        write("memory.max", &format!("{max}\n"));
        write("memory.high", "max\n");
        write("memory.current", &format!("{current}\n"));
        write("memory.swap.current", "8192\n");
        write(
            "memory.stat",
            &format!(
                "anon 1\nfile {current}\nshmem {current}\ninactive_file {cache}\nactive_file 0\n\
                 slab_reclaimable 0\nworkingset_refault_anon 2\n"
            ),
        );
        write(
            "memory.pressure",
            "some avg10=9.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=4.00 avg60=0.00 avg300=0.00 total=1\n",
        );
    }

    #[test]
    fn the_guests_memory_is_no_file_cache() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.slice");
        fake_cgroup(&path, "4194304", 3 << 20, 1 << 20);
        let memory = Cgroup::new(&path).unwrap().memory(4096).unwrap();
        assert_eq!((memory.limit, memory.available()), (4 << 20, 2 << 20));
        assert_eq!(memory.swap, SwapCounters { read: 8192, written: 8192 });
        fs::write(path.join("memory.high"), "2097152\n").unwrap();
        let memory = Cgroup::new(&path).unwrap().memory(4096).unwrap();
        assert_eq!((memory.limit, memory.available()), (2 << 20, 1 << 20));
        let stat = "pswpin 5\npswpout 6\nworkingset_refault_anon 2\n";
        fs::write(path.join("memory.stat"), stat).unwrap();
        let memory = Cgroup::new(&path).unwrap().memory(4096).unwrap();
        assert_eq!(memory.swap, SwapCounters { read: 5 * 4096, written: 6 * 4096 });
    }

    #[test]
    fn limits_on_the_way_up_count() {
        let directory = tempfile::tempdir().unwrap();
        let (parent, child) = (directory.path().join("p"), directory.path().join("p/c"));
        fake_cgroup(&parent, "5000000", 4_000_000, 0);
        fake_cgroup(&child, "9000000", 2_000_000, 0);
        let memory = Cgroup::new(&child).unwrap().memory(4096).unwrap();
        assert_eq!((memory.limit, memory.available()), (5_000_000, 1_000_000));
    }

    #[test]
    fn a_cgroup_that_is_gone_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.slice");
        fake_cgroup(&path, "max", 1, 0);
        let cgroup = Cgroup::new(&path).unwrap();
        fs::write(path.join("memory.current"), "no number").unwrap();
        let error = cgroup.memory(4096).unwrap_err();
        assert!(error.to_string().ends_with("memory.current does not say a number"), "{error}");
        fs::remove_dir_all(&path).unwrap();
        assert!(cgroup.memory(4096).is_err());
    }
}
