//! Linux guests on vhost-user-blk: what a disk is for.
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use tests::daemon::Daemon;
use tests::guest::{BlkOptions, Guest, Vmm};

const MIB: u64 = 1 << 20;
const STEP: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(20);

/// An empty disk and a daemon that serves it.
struct Disk {
    image: PathBuf,
    daemon: Daemon,
    _folder: TempDir,
}

impl Disk {
    fn new(mib: u64, args: &[&str]) -> Self {
        let folder = TempDir::with_prefix("blk-guest-").unwrap();
        let image = folder.path().join("disk.img");
        File::create(&image).unwrap().set_len(mib * MIB).unwrap();
        let daemon =
            Daemon::builder("vhost-user-blk").arg("--blk-file").arg(&image).args(args).start().unwrap();
        Self { image, daemon, _folder: folder }
    }

    /// What the image occupies on the host.
    fn used(&self) -> u64 {
        fs::metadata(&self.image).unwrap().blocks() * 512
    }

    fn stop(&mut self) {
        let status = self.daemon.terminate(STOP).unwrap();
        assert!(status.success(), "{status}: {}", self.daemon.stderr());
    }
}

/// How many queues a guest of this kind can use.
fn queues(vmm: Vmm) -> u16 {
    match vmm {
        Vmm::Qemu => 2,
        Vmm::Uml => 1,
    }
}

fn a_disk_keeps_a_file_system(vmm: Vmm) {
    let queues = queues(vmm);
    let mut disk = Disk::new(256, &["--serial", "guest-test-1", "--num-queues", &queues.to_string()]);
    let mut guest = Guest::new(vmm)
        .cpus(queues.into())
        .blk(disk.daemon.socket(), BlkOptions { num_queues: queues, ..BlkOptions::default() })
        .ext4()
        .program("sfdisk")
        .timeout(Duration::from_secs(240))
        .script(include_str!("blk_guest/file_system.sh"))
        .spawn()
        .unwrap();
    guest.wait_for("written", STEP).unwrap();
    let written = disk.used();
    guest.send("discard").unwrap();
    guest.wait_for("discarded", STEP).unwrap();
    let discarded = disk.used();
    let report = guest.wait().unwrap().check().unwrap();

    assert_eq!(report.number("bytes").unwrap(), 256 * MIB);
    assert_eq!(report.value("serial").unwrap(), "guest-test-1");
    assert_eq!(report.number("queues").unwrap(), u64::from(queues));
    assert_eq!(report.number("read_only").unwrap(), 0);
    assert_eq!(report.number("files").unwrap(), 60);
    assert!(written > 24 * MIB, "{written} bytes written");
    assert!(discarded + 24 * MIB <= written, "{written} bytes before the discard, {discarded} after it");
    disk.stop();
}

fn a_read_only_disk_refuses_writes(vmm: Vmm) {
    let mut disk = Disk::new(16, &["--read-only"]);
    fs::OpenOptions::new().write(true).open(&disk.image).unwrap().write_all_at(b"precious", 0).unwrap();
    let report = Guest::new(vmm)
        .blk(disk.daemon.socket(), BlkOptions::default())
        .script(
            r"
wait_path /dev/vda
[ -b /dev/vda ]
report read_only $(cat /sys/block/vda/ro)
report content $(head -c 8 /dev/vda)
if dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=notrunc,fsync; then exit 9; fi
",
        )
        .run()
        .unwrap()
        .check()
        .unwrap();
    assert_eq!(report.number("read_only").unwrap(), 1);
    assert_eq!(report.value("content").unwrap(), "precious");
    disk.stop();
    assert!(fs::read(&disk.image).unwrap().starts_with(b"precious"));
}

/// Writes numbered blocks one after the other, each synced before it is reported.
const WRITE_BLOCKS: &str = r"
wait_path /dev/vda
[ -b /dev/vda ]
# Opened once: User Mode Linux removes the device with its daemon, and then the path would be a plain file's.
exec 4<>/dev/vda
n=0
while [ $n -lt 400 ]; do
    printf 'block %06d' $n | dd bs=4096 conv=sync,fsync >&4
    report synced $n
    [ $n -ne 40 ] || announce busy
    n=$((n + 1))
done
";

/// Checks the blocks of [`WRITE_BLOCKS`] up to `last`.
fn check_blocks(disk: &Disk, last: u64) {
    let image = File::open(&disk.image).unwrap();
    for n in 0..=last {
        let expected = format!("block {n:06}");
        let mut found = vec![0; expected.len()];
        image.read_exact_at(&mut found, n * 4096).unwrap();
        assert_eq!(String::from_utf8_lossy(&found), expected, "block {n} of {last}");
    }
}

/// What a guest was told is on the disk is there, although the daemon was ended in the middle of its work.
fn synced_writes_survive_a_sigterm(vmm: Vmm) {
    let mut disk = Disk::new(64, &[]);
    let guest = Guest::new(vmm).blk(disk.daemon.socket(), BlkOptions::default()).script(WRITE_BLOCKS);
    let mut guest = guest.spawn().unwrap();
    guest.wait_for("busy", STEP).unwrap();
    disk.stop();
    // The guest's last reports may still be on their way: they are about the time before the daemon ended.
    std::thread::sleep(Duration::from_secs(1));
    let last: u64 = guest.values()["synced"].parse().unwrap();
    guest.kill();
    check_blocks(&disk, last);
}

/// QEMU connects again to a daemon that takes the place of one that crashed, and the guest notices a pause at most.
#[test]
fn a_guest_outlives_a_crash_of_the_daemon() {
    let mut disk = Disk::new(64, &[]);
    let options = BlkOptions { reconnect: Some(Duration::from_millis(100)), ..BlkOptions::default() };
    let guest = Guest::new(Vmm::Qemu).blk(disk.daemon.socket(), options).script(WRITE_BLOCKS);
    let mut guest = guest.spawn().unwrap();
    guest.wait_for("busy", STEP).unwrap();
    disk.daemon.kill();
    let socket = disk.daemon.socket();
    let _successor =
        Daemon::builder("vhost-user-blk").socket(socket).arg("--blk-file").arg(&disk.image).start().unwrap();
    let report = guest.wait().unwrap().check().unwrap();
    assert_eq!(report.number("synced").unwrap(), 399);
    check_blocks(&disk, 399);
}

/// Four writers, so that requests are in flight and complete in any order. A line is 8 bytes.
const WRITE_AT_ONCE: &str = r#"
    wait_path /dev/vda
    for writer in 0 1 2 3; do
        { yes "writer$writer" | dd of=/dev/vda bs=64k seek=$((writer * 512)) count=512 iflag=fullblock oflag=direct \
            conv=notrunc && echo done > /tmp/done$writer; } &
    done
    announce busy
    wait
    report done "$(cat /tmp/done? | wc -l)"
"#;

#[test]
fn no_request_is_lost_when_the_daemon_is_killed_again_and_again() {
    let mut disk = Disk::new(128, &["--cache", "direct"]);
    let options = BlkOptions { reconnect: Some(Duration::from_millis(100)), ..BlkOptions::default() };
    let guest = Guest::new(Vmm::Qemu).blk(disk.daemon.socket(), options).script(WRITE_AT_ONCE);
    let mut guest = guest.spawn().unwrap();
    guest.wait_for("busy", STEP).unwrap();
    let socket = disk.daemon.socket().to_owned();
    let mut killed = Vec::new();
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(400));
        disk.daemon.kill();
        let successor = Daemon::builder("vhost-user-blk")
            .socket(&socket)
            .arg("--blk-file")
            .arg(&disk.image)
            .args(["--cache", "direct"])
            .start()
            .unwrap();
        killed.push(std::mem::replace(&mut disk.daemon, successor));
    }
    let report = guest.wait().unwrap().check().unwrap();
    assert_eq!(report.number("done").unwrap(), 4);
    let image = fs::read(&disk.image).unwrap();
    for (writer, part) in image.chunks(32 * MIB as usize).enumerate() {
        let line = format!("writer{writer}\n");
        assert!(part.chunks(line.len()).all(|chunk| chunk == line.as_bytes()), "what writer {writer} wrote");
    }
}

tests::for_both_guests!(
    a_disk_keeps_a_file_system,
    a_read_only_disk_refuses_writes,
    synced_writes_survive_a_sigterm
);
