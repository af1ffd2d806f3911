//! What a program may rely on, with each way of caching.
use std::fmt::Write;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tests::guest::{Guest, Vmm};
use tests::outcomes::{Limit, Outcome, Outcomes};
use tests::process;
use tests::provision::{self, Series};
use tests::share::{Cache, Share, default_model};

const LIMIT: Duration = Duration::from_secs(5 * 60);
const PROBES: &str = include_str!("probes.py");

/// What no server can change.
fn limits(series: Series, cache: Cache) -> Vec<Limit> {
    let mut limits = Vec::new();
    if matches!(cache, Cache::None | Cache::Readahead) {
        limits.push(("shared_mapping", "Linux has nowhere to keep what is written to the mapping"));
    }
    if series == Series::OldStable {
        limits.push(("writing_clears_the_suid_bit", "Linux 6.1 does not ask for it"));
        if cache == Cache::Loose {
            limits.push(("beyond_four_gibibytes", "Linux 6.1 reckons a cached file's blocks from its size"));
        }
    }
    limits
}

fn on_host() -> Outcomes {
    let root = provision::debian().unwrap().folder;
    let folder = TempDir::with_prefix("probes-").unwrap();
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(&libraries).arg(root.join("usr/bin/python3"));
    command.env("PYTHONHOME", root.join("usr")).args(["-B", "-c", PROBES]).arg(folder.path());
    let output = process::run(command, LIMIT).unwrap();
    Outcomes::parse(&String::from_utf8(output.stdout).unwrap())
}

fn probes(series: Series, caches: &[Cache]) {
    let folder = TempDir::with_prefix("probes-").unwrap();
    // Attributes of the host's own kind are for those who ask for them.
    let share = Share::of(folder.path(), "probes", default_model(), &["--xattr", "all"]).unwrap();
    // Linux keeps access control lists only if told to.
    let mut script = "debian_up\ncp /probes.py /debian/tmp\nSHARE_OPTIONS=,posixacl\n".to_owned();
    for cache in caches.iter().map(|cache| cache.option()) {
        write!(
            script,
            "share_up probes {cache}\nmount -o bind /mnt /debian/mnt\nmkdir /mnt/{cache}\n\
             debian python3 -B /tmp/probes.py /mnt/{cache} >/tmp/output\n\
             report {cache} \"$(cat /tmp/output)\"\numount /debian/mnt\numount /mnt\n"
        )
        .unwrap();
    }
    let report = share
        .attach(Guest::new(Vmm::Qemu).kernel(series))
        .debian()
        .file("probes.py", PROBES)
        .timeout(LIMIT)
        .script(script)
        .run()
        .unwrap()
        .check()
        .unwrap();
    let host = on_host();
    let mut complaints = String::new();
    for &cache in caches {
        let guest = Outcomes::parse(report.value(cache.option()).unwrap());
        println!("{series:?}, {cache:?}: failed {:?}", guest.names(Outcome::Failed));
        if let Err(error) = guest.check_against(&host, &limits(series, cache)) {
            writeln!(complaints, "cache={}: {error}", cache.option()).unwrap();
        }
    }
    assert!(complaints.is_empty(), "{complaints}");
    share.stop().unwrap();
}

#[test]
fn programs_find_what_they_rely_on() {
    probes(Series::Stable, &Cache::ALL);
}

#[test]
fn programs_find_it_on_the_old_kernel() {
    probes(Series::OldStable, &[Cache::None, Cache::Mmap, Cache::Loose]);
}
