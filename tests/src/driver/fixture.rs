//! `vhost-user-blk` on a scratch image, as most tests want it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::blk::{Disk, Options};
use super::raw::{RawDevice, RawOptions};
use super::request::{OK, Outcome, Request, SECTOR};
use super::ring::RawRing;
use crate::daemon::{self, Builder, Daemon};

/// Names another program to test, one that takes the flags of `vhost-user-blk`.
const PROGRAM_VARIABLE: &str = "VHOST_USER_BLK";

/// The size of [`BlkFixture::new`]'s image.
pub const IMAGE_LEN: usize = 16 << 20;

/// Bytes that tell where they lie: each 8 bytes are their own offset, mixed.
pub fn pattern(offset: u64, len: usize) -> Vec<u8> {
    assert!(offset.is_multiple_of(8) && len.is_multiple_of(8), "the pattern is made of numbers of 8 bytes");
    (0..len as u64 / 8)
        .flat_map(|i| (offset + i * 8 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes())
        .collect()
}

/// A folder in `target`, which lies on a real file system rather than on tmpfs.
pub fn scratch() -> io::Result<TempDir> {
    let base = std::env::current_exe()?;
    let base = base.parent().ok_or_else(|| io::Error::other("A test program lies in a folder"))?;
    tempfile::Builder::new().prefix("blk-").tempdir_in(base)
}

/// Prepares to start `vhost-user-blk`.
pub fn blk_daemon() -> Builder {
    let builder = Daemon::builder("vhost-user-blk");
    match std::env::var_os(PROGRAM_VARIABLE) {
        Some(program) => builder.program(program),
        None => builder,
    }
}

/// A command that runs `vhost-user-blk` to its end, for starts that are meant to fail.
pub fn blk_command() -> Result<Command> {
    Ok(Command::new(match std::env::var_os(PROGRAM_VARIABLE) {
        Some(program) => program.into(),
        None => daemon::binary("vhost-user-blk")?,
    }))
}

/// A running daemon and its image, which is full of [`pattern`].
pub struct BlkFixture {
    /// The daemon.
    pub daemon: Daemon,
    /// Daemons that were killed; the first one's folder holds the socket.
    predecessors: Vec<Daemon>,
    image: PathBuf,
    _folder: TempDir,
}

impl BlkFixture {
    /// Starts a daemon with more flags on an image of [`IMAGE_LEN`] bytes.
    pub fn new<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::with_len(IMAGE_LEN, args)
    }

    /// Starts a daemon with more flags on an image of `len` bytes.
    pub fn with_len<A: AsRef<OsStr>>(len: usize, args: impl IntoIterator<Item = A>) -> Result<Self> {
        let folder = scratch().context("Cannot make a folder for an image")?;
        let image = folder.path().join("image");
        fs::write(&image, pattern(0, len)).context("Cannot write an image")?;
        // Allocated blocks are what discard tests count.
        File::open(&image)?.sync_all()?;
        let daemon = blk_daemon().arg("--blk-file").arg(&image).args(args).start()?;
        Ok(Self { daemon, predecessors: Vec::new(), image, _folder: folder })
    }

    /// Kills the daemon, and starts another on the same socket and image.
    pub fn replace_daemon(&mut self, args: &[&str]) -> Result<()> {
        self.daemon.kill();
        let daemon =
            blk_daemon().socket(self.socket()).arg("--blk-file").arg(&self.image).args(args).start()?;
        self.predecessors.push(std::mem::replace(&mut self.daemon, daemon));
        Ok(())
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    /// The image's path.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Connects the well-behaved driver.
    pub fn disk(&self, options: &Options) -> Result<Disk> {
        Disk::open(self.socket(), options).context("Cannot open the disk")
    }

    /// Connects a device by hand.
    pub fn raw(&self, options: &RawOptions) -> Result<RawDevice> {
        RawDevice::connect(self.socket(), options).context("Cannot connect the raw device")
    }

    /// Bytes of the image, past the daemon.
    pub fn image_bytes(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        File::open(&self.image)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// How many bytes the image takes on the host.
    pub fn allocated(&self) -> io::Result<u64> {
        let image = File::open(&self.image)?;
        // Blocks that were only reserved so far do not count before this.
        image.sync_all()?;
        Ok(image.metadata()?.blocks() * 512)
    }
}

/// A daemon with a device connected by hand, which has one ring.
pub struct RawSetup {
    /// The ring, number 0.
    pub ring: RawRing,
    /// The device.
    pub device: RawDevice,
    /// The daemon and its image.
    pub fixture: BlkFixture,
}

impl RawSetup {
    /// Number of descriptors of the ring.
    pub const RING_SIZE: u16 = 128;

    /// Starts a daemon with more flags and connects to it.
    pub fn new(args: &[&str], options: &RawOptions) -> Result<Self> {
        let fixture = BlkFixture::new(args)?;
        let mut device = fixture.raw(options)?;
        let ring = device.ring(0, Self::RING_SIZE)?;
        Ok(Self { ring, device, fixture })
    }

    /// Starts a daemon without flags and connects with default options.
    pub fn plain() -> Result<Self> {
        Self::new(&[], &RawOptions::default())
    }

    /// Checks that the ring still works: the last sector reads as it was written at the start.
    pub fn check_alive(&mut self) -> Result<()> {
        check_serves(&mut self.ring)
    }
}

/// Checks that `ring` serves a good request: the last sector reads as it was written at the start.
pub fn check_serves(ring: &mut RawRing) -> Result<()> {
    let at = (IMAGE_LEN - SECTOR) as u64;
    let outcome =
        ring.execute(&Request::read(at / SECTOR as u64, SECTOR)).context("A good request is not served")?;
    let expected = Outcome { status: Some(OK), used_len: SECTOR as u32 + 1, data: pattern(at, SECTOR) };
    anyhow::ensure!(outcome == expected, "A good request failed: {:?}, {}", outcome.status, outcome.used_len);
    Ok(())
}
