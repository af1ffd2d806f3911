//! Programs that people use: each works on the share as it does on the host's own file system.
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tests::guest::{Guest, Vmm};
use tests::process;
use tests::provision::{self, Series};
use tests::share::{Cache, Share};

const LIMIT: Duration = Duration::from_secs(10 * 60);

/// Runs a script in the Debian, with `folder` as `/mnt`.
fn on_host(script: &str, folder: &Path) -> String {
    let root = provision::debian().unwrap().folder;
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    // Mounts in a namespace of its own: other tests use the same root.
    command.args(["--mount", "--propagation", "private", "--", "sh", "-ec"]).arg(
        "mount --rbind /dev \"$1/dev\"; mount --rbind /proc \"$1/proc\"; mount -t tmpfs tmp \"$1/tmp\"; \
         mount --bind \"$2\" \"$1/mnt\"; cp \"$4\" \"$1/tmp\"; \
         exec chroot \"$1\" /usr/bin/env -i PATH=/usr/bin:/usr/sbin HOME=/tmp LC_ALL=C.UTF-8 sh -exc \"$3\"",
    );
    command.arg("sh").arg(root).arg(folder).arg(script).arg(provision::c_source().unwrap());
    let output = process::run(command, LIMIT).unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn in_guest(series: Series, cache: Cache, script: &str, share: &Share) -> String {
    let source = std::fs::read(provision::c_source().unwrap()).unwrap();
    let report = share
        .attach(Guest::new(Vmm::Qemu).kernel(series).memory_mib(512).cpus(2))
        .debian()
        .file("zlib.tar", source)
        .file("suite.sh", script)
        .timeout(LIMIT)
        .script(format!(
            "share_up suite {}\ndebian_up /mnt\ncp /zlib.tar /suite.sh /debian/tmp\n\
             debian sh -ex /tmp/suite.sh >/tmp/output\ncat /tmp/output\numount /debian/mnt\numount /mnt\n",
            cache.option()
        ))
        .run()
        .unwrap()
        .check()
        .unwrap();
    println!("{series:?}, {cache:?}: {:?}", report.total);
    report.stdout
}

/// Runs a script on the host and in a guest: it succeeds on both, and says the same.
fn same(series: Series, cache: Cache, script: &str) {
    let folder = TempDir::with_prefix("suite-").unwrap();
    let share = Share::new("suite").unwrap();
    let host = on_host(script, folder.path());
    assert_eq!(in_guest(series, cache, script, &share), host);
    share.stop().unwrap();
}

const FIO: &str = include_str!("fio.sh");
const GIT: &str = include_str!("git.sh");
const BUILD: &str = include_str!("build.sh");
const DBENCH: &str = include_str!("dbench.sh");

#[test]
fn git_clones_what_fsck_finds_nothing_wrong_with() {
    same(Series::Stable, Cache::Mmap, GIT);
}

macro_rules! whole_matrix {
    ($($name:ident: $script:ident, $series:ident, $cache:ident;)*) => {
        $(
            #[test]
            #[ignore = "takes minutes, and is part of the whole matrix"]
            fn $name() {
                same(Series::$series, Cache::$cache, $script);
            }
        )*
    };
}

whole_matrix! {
    git_uncached: GIT, Stable, None;
    git_with_readahead: GIT, Stable, Readahead;
    git_with_loose: GIT, Stable, Loose;
    git_on_the_old_kernel: GIT, OldStable, None;
    git_on_the_old_kernel_with_loose: GIT, OldStable, Loose;
    fio_uncached: FIO, Stable, None;
    fio_with_readahead: FIO, Stable, Readahead;
    fio_with_mmap: FIO, Stable, Mmap;
    fio_with_loose: FIO, Stable, Loose;
    fio_on_the_old_kernel: FIO, OldStable, None;
    fio_on_the_old_kernel_with_mmap: FIO, OldStable, Mmap;
    build_uncached: BUILD, Stable, None;
    build_with_mmap: BUILD, Stable, Mmap;
    build_with_loose: BUILD, Stable, Loose;
    build_on_the_old_kernel: BUILD, OldStable, None;
    dbench_uncached: DBENCH, Stable, None;
    dbench_with_mmap: DBENCH, Stable, Mmap;
    dbench_with_loose: DBENCH, Stable, Loose;
    dbench_on_the_old_kernel: DBENCH, OldStable, None;
}
