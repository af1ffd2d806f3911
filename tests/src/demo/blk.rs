//! The chapter of vhost-user-blk: a disk from the partition table to the last block given back.
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::{Chapter, number, processors, say, value, wait};
use crate::daemon::Daemon;
use crate::guest::{BlkOptions, Guest, Running, Vmm};

const MIB: u32 = 1 << 20;
const DISK_MIB: u32 = 256;
/// Written with a checksum, which an emulated processor takes its time for.
const FILE_MIB: u32 = 32;
/// Written and read to measure the throughput.
const BULK_MIB: u32 = 128;
const SERIAL: &str = "demo-disk";
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// The daemon, its disk and where the image lies.
pub(super) struct Blk {
    daemon: Daemon,
    image: PathBuf,
    queues: u16,
    _folder: TempDir,
}

impl Blk {
    /// Makes a sparse image and starts the daemon on it.
    pub(super) fn start(vmm: Vmm) -> Result<Self> {
        let folder = TempDir::with_prefix("demo-").context("Cannot make a temporary folder")?;
        let image = folder.path().join("disk.img");
        File::create(&image)
            .and_then(|file| file.set_len(u64::from(DISK_MIB) * u64::from(MIB)))
            .with_context(|| format!("Cannot make a disk image at {}", image.display()))?;
        let queues = u16::try_from(processors(vmm))?;
        let daemon = Daemon::builder("vhost-user-blk")
            .arg("--blk-file")
            .arg(&image)
            .args(["--serial", SERIAL, "--num-queues", &queues.to_string()])
            .start()?;
        say("daemon", format!("vhost-user-blk, process {}, serves {}", daemon.pid(), image.display()));
        say("", format!("a raw image of {DISK_MIB} MiB that takes up {} KiB", used_kib(&image)?));
        Ok(Self { daemon, image, queues, _folder: folder })
    }
}

impl Chapter for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn attach(&self, guest: Guest) -> Guest {
        let options = BlkOptions { num_queues: self.queues, ..BlkOptions::default() };
        guest.blk(self.daemon.socket(), options).ext4().program("sfdisk")
    }

    fn script(&self) -> String {
        format!("FILE_MIB={FILE_MIB} BULK_MIB={BULK_MIB}\n{}", include_str!("blk.sh"))
    }

    fn follow(&self, guest: &mut Running) -> Result<()> {
        wait(guest, "blk seen")?;
        let mib = number(guest, "blk.bytes")? / f64::from(MIB);
        let (serial, queues) = (value(guest, "blk.serial")?, value(guest, "blk.queues")?);
        say("disk", format!("the guest sees /dev/vda: {mib} MiB, serial {serial}, {queues} queue(s)"));
        ensure!(serial == SERIAL, "The guest reads the serial number {serial:?}, not {SERIAL:?}");
        wait(guest, "blk formatted")?;
        say("", "a partition with ext4 on it, made by the guest");
        wait(guest, "blk verified")?;
        let sum = value(guest, "blk.sha256")?;
        say(
            "data",
            format!(
                "{FILE_MIB} MiB written, unmounted, read back: sha256 {}... is right",
                &sum[..12.min(sum.len())]
            ),
        );
        wait(guest, "blk measured")?;
        let rate = |key: &str| number(guest, key).map(|seconds| f64::from(BULK_MIB) / seconds.max(0.01));
        let (write, read) = (rate("blk.write_seconds")?, rate("blk.read_seconds")?);
        say("speed", format!("{write:.0} MiB/s written and synced, {read:.0} MiB/s read"));
        let before = used_kib(&self.image)?;
        guest.send("discard")?;
        wait(guest, "blk discarded")?;
        let after = used_kib(&self.image)?;
        say("discard", format!("files removed, fstrim: the image takes up {after} KiB after {before} KiB"));
        ensure!(after < before, "Discarding gave no blocks back to the host");
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let status = self.daemon.terminate(STOP_LIMIT)?;
        ensure!(status.success(), "vhost-user-blk ended with {status}:\n{}", self.daemon.stderr());
        Ok(())
    }
}

/// What an image occupies on the host.
fn used_kib(image: &PathBuf) -> Result<u64> {
    let data = fs::metadata(image).with_context(|| format!("Cannot look at {}", image.display()))?;
    // In units of 512 bytes whatever the file system's block size is.
    Ok(data.blocks() / 2)
}
