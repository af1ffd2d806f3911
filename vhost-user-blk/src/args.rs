//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use vhost_user_daemon::cli::{self, Capabilities, CommonArgs, DeviceType, QueueArgs};

use crate::image::{EngineChoice, ImageOptions};
use crate::request::ID_BYTES;

/// What `--print-capabilities` prints.
pub const CAPABILITIES: Capabilities =
    Capabilities { device_type: DeviceType::Block, features: &["read-only", "blk-file"] };

/// Serves a disk image or block device to a virtual machine, as a virtio block device over vhost-user.
#[derive(Debug, Parser)]
#[command(
    version,
    after_long_help = cli::qemu_example(
        "vhost-user-blk",
        "--blk-file disk.img",
        "-device vhost-user-blk-pci,chardev=vu0",
    )
)]
pub struct Args {
    /// Disk image (raw) or block device to serve
    ///
    /// It stays locked while it is served, so that no other process that keeps to QEMU's locks can write to it.
    #[arg(long, value_name = "PATH", help_heading = "Disk")]
    pub blk_file: PathBuf,

    /// Refuse writes, and tell the guest so
    #[arg(long, alias = "readonly", help_heading = "Disk")]
    pub read_only: bool,

    /// Serial number that the guest sees, at most 20 ASCII characters
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true, value_parser = parse_serial, help_heading = "Disk")]
    pub serial: Serial,

    /// Smallest unit that the guest may read or write, in bytes [default: what the image needs, mostly 512]
    #[arg(long, value_name = "BYTES", value_parser = ["512", "4096"], help_heading = "Disk")]
    pub logical_block_size: Option<String>,

    /// How writes reach the disk
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Cache::Writeback, help_heading = "Disk")]
    pub cache: Cache,

    /// How I/O is done
    #[arg(long, value_enum, value_name = "ENGINE", default_value_t = EngineChoice::Auto, help_heading = "Disk")]
    pub io_engine: EngineChoice,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub queues: QueueArgs,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub common: CommonArgs,
}

/// The write cache modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Through the host's page cache; durable when the guest flushes
    Writeback,
    /// Through the host's page cache; every write is durable before it completes, whatever the guest chooses
    Writethrough,
    /// Past the host's page cache (O_DIRECT); durable when the guest flushes
    Direct,
}

/// A serial number, padded with zeroes.
pub type Serial = [u8; ID_BYTES];

fn parse_serial(text: &str) -> Result<Serial, String> {
    if text.len() > ID_BYTES || !text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        return Err(format!("at most {ID_BYTES} printable ASCII characters are possible"));
    }
    let mut serial = [0; ID_BYTES];
    serial[..text.len()].copy_from_slice(text.as_bytes());
    Ok(serial)
}

impl Args {
    /// How the image is to be opened.
    pub fn image_options(&self) -> ImageOptions {
        ImageOptions {
            path: self.blk_file.clone(),
            read_only: self.read_only,
            direct: self.cache == Cache::Direct,
            logical_block_size: self.logical_block_size.as_ref().and_then(|size| size.parse().ok()),
        }
    }
}
