//! fsx: random reads, writes, mappings and truncations of one file, each read compared with what should be there.
use std::fmt::Write;
use std::time::Duration;

use tempfile::TempDir;
use tests::guest::{Guest, Vmm};
use tests::process;
use tests::provision::{self, Series};
use tests::share::{Cache, Share};

const LIMIT: Duration = Duration::from_secs(10 * 60);
/// Any number: a failure is to come again.
const SEED: u32 = 9;

/// Operations for each way of caching.
fn config(cache: Cache) -> String {
    // A file that is not cached cannot be mapped for shared writing; and a mapping for reading is a cache that writes do
    // not go through, which Linux leaves stale.
    let (mapread, mapwrite) = match cache {
        Cache::None | Cache::Readahead => (0, 0),
        Cache::Mmap | Cache::Loose => (10, 10),
    };
    format!(
        "[weights]\nclose_open = 1\nread = 10\nwrite = 10\ntruncate = 5\nfsync = 1\nfdatasync = 1\nsendfile = 1\n\
         mapread = {mapread}\nmapwrite = {mapwrite}\n"
    )
}

fn fsx(series: Series, caches: &[Cache], operations: u32) {
    let share = Share::new("suite").unwrap();
    let mut guest = share.attach(Guest::new(Vmm::Qemu).kernel(series)).program("fsx").timeout(LIMIT);
    let mut script = String::new();
    let folder = TempDir::new().unwrap();
    for &cache in caches {
        let option = cache.option();
        writeln!(
            script,
            "share_up suite {option}\nfsx -f /config-{option} -N {operations} -S {SEED} -P /tmp /mnt/{option}\n\
             umount /mnt"
        )
        .unwrap();
        guest = guest.file(&format!("config-{option}"), config(cache));
        // The same on the host.
        let file = folder.path().join(option);
        std::fs::write(file.with_extension("toml"), config(cache)).unwrap();
        let mut command = provision::program("fsx").unwrap().command();
        command.arg("-f").arg(file.with_extension("toml")).args(["-N", &operations.to_string()]);
        command.args(["-S", &SEED.to_string(), "-P"]).arg(folder.path()).arg(&file);
        process::run(command, LIMIT).unwrap();
    }
    let report = guest.script(script).run().unwrap().check().unwrap();
    assert_eq!(report.stdout.matches("All operations completed").count(), caches.len(), "{}", report.stdout);
    for cache in caches {
        let files =
            [share.path(), folder.path()].map(|path| std::fs::read(path.join(cache.option())).unwrap());
        assert!(files[0] == files[1], "guest and host have other files with cache={}", cache.option());
    }
    share.stop().unwrap();
}

#[test]
fn every_read_returns_what_was_written() {
    fsx(Series::Stable, &Cache::ALL, 1_000);
}

#[test]
#[ignore = "takes minutes, and is part of the whole matrix"]
fn for_long() {
    fsx(Series::Stable, &Cache::ALL, 10_000);
}

#[test]
#[ignore = "takes minutes, and is part of the whole matrix"]
fn on_the_old_kernel() {
    fsx(Series::OldStable, &[Cache::None, Cache::Mmap, Cache::Loose], 10_000);
}
