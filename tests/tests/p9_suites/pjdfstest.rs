//! pjdfstest: what POSIX says about each system call that names a file.
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tests::guest::{Guest, Vmm};
use tests::outcomes::{Limit, Outcome, Outcomes};
use tests::process;
use tests::provision::{self, Series};
use tests::share::{Cache, Server, Share, default_model};

const LIMIT: Duration = Duration::from_secs(10 * 60);

/// All features that a Linux file system may have.
const CONFIG: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
# Longer than a tick of the host's clock for file times.
naptime = 0.01
[dummy_auth]
entries = [["nobody", "NOGROUP"], ["daemon", "daemon"]]
"#;

/// What no server can change.
const LIMITS: [Limit; 2] = [
    (
        "utimensat::subsecond",
        "Linux's 9p cuts the times that utimensat() sets to seconds before it sends them",
    ),
    (
        "link::link_count_max",
        "glibc tells the limit by the type of the file system, and none for 9P: it is skipped",
    ),
];

/// What Linux does not ask for again when it caches everything.
const LOOSE_LIMITS: [Limit; 5] = {
    const WHY: &str =
        "the number of links of a file that was renamed over is cached, and not asked for again";
    [
        ("rename::to_multiply_linked::regular", WHY),
        ("rename::to_multiply_linked::fifo", WHY),
        ("rename::to_multiply_linked::block", WHY),
        ("rename::to_multiply_linked::char", WHY),
        ("rename::to_multiply_linked::socket", WHY),
    ]
};

fn config(group: &str) -> String {
    CONFIG.replace("NOGROUP", group)
}

fn on_host(folder: &Path) -> Outcomes {
    let config_file = folder.with_extension("toml");
    std::fs::write(&config_file, config("nogroup")).unwrap();
    let mut command = provision::program("pjdfstest").unwrap().command();
    command.env("NO_COLOR", "1").arg("--configuration-file").arg(&config_file).arg("--path").arg(folder);
    // It ends with an error when one test fails; which ones that are it says.
    let output = process::run_unchecked(command, LIMIT).unwrap();
    Outcomes::parse(&String::from_utf8_lossy(&output.stdout))
}

fn in_guest(series: Series, cache: Cache, share: &Share) -> Outcomes {
    let script = format!(
        "share_up suite {}\nexport NO_COLOR=1\npjdfstest --configuration-file /config --path /mnt || true\numount /mnt\n",
        cache.option()
    );
    let report = share
        .attach(Guest::new(Vmm::Qemu).kernel(series))
        .program("pjdfstest")
        .file("etc/passwd", "root:x:0:0::/:\ndaemon:x:1:1::/:\nnobody:x:65534:65534::/:\n")
        .file("etc/group", "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n")
        .file("config", config("nogroup"))
        .timeout(LIMIT)
        .script(script)
        .run()
        .unwrap()
        .check()
        .unwrap();
    Outcomes::parse(&report.stdout)
}

fn pjdfstest(series: Series, cache: Cache, security_model: &'static str) {
    let folder = TempDir::with_prefix("pjdfstest-").unwrap();
    let host_folder = folder.path().join("host");
    let guest_folder = folder.path().join("guest");
    for path in [folder.path(), &host_folder, &guest_folder] {
        std::fs::create_dir_all(path).unwrap();
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let share = Share::of(guest_folder, "suite", security_model, &[] as &[&str]).unwrap();
    let guest = in_guest(series, cache, &share);
    println!(
        "{series:?}, {cache:?}, {security_model}: {} passed, {} skipped, failed {:?}",
        guest.count(Outcome::Passed),
        guest.count(Outcome::Skipped),
        guest.names(Outcome::Failed)
    );
    let mut limits = LIMITS.to_vec();
    if cache == Cache::Loose {
        limits.extend(LOOSE_LIMITS);
    }
    guest.check_against(&on_host(&host_folder), &limits).unwrap();
    if Server::of_environment().unwrap() == Server::Daemon && cache == Cache::None {
        assert!(guest.count(Outcome::Failed) <= 1, "{:?}", guest.names(Outcome::Failed));
    }
    share.stop().unwrap();
}

#[test]
fn everything_passes() {
    pjdfstest(Series::Stable, Cache::None, default_model());
}

macro_rules! whole_matrix {
    ($($name:ident: $series:ident, $cache:ident, $model:expr;)*) => {
        $(
            #[test]
            #[ignore = "takes minutes, and is part of the whole matrix"]
            fn $name() {
                pjdfstest(Series::$series, Cache::$cache, $model);
            }
        )*
    };
}

whole_matrix! {
    with_readahead: Stable, Readahead, default_model();
    with_mmap: Stable, Mmap, default_model();
    with_loose: Stable, Loose, default_model();
    with_mapped_attributes: Stable, None, "mapped-xattr";
    on_the_old_kernel: OldStable, None, default_model();
    on_the_old_kernel_with_mmap: OldStable, Mmap, default_model();
    on_the_old_kernel_with_loose: OldStable, Loose, default_model();
}
