//! The command line.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Parser, value_parser};
use vhost_user_daemon::cli::{self, Capabilities, CommonArgs, DeviceType, QueueArgs};
use vhost_user_daemon::sandbox::SandboxArgs;

use crate::config::MAX_TAG;
use crate::host::SecurityModel;
use crate::host::idmap::{IdRange, Squash, SquashTo};
use crate::host::qid::{Multidevs, QidVersion};
use crate::host::xattr::XattrPolicy;
use crate::server::{Locks, MIN_MSIZE, StatfsType};

/// What `--print-capabilities` prints.
pub const CAPABILITIES: Capabilities = Capabilities { device_type: DeviceType::NineP, features: &[] };

/// Serves a directory to a virtual machine, as a virtio 9P device over vhost-user.
///
/// In a Linux guest: mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap share /mnt
#[derive(Debug, Parser)]
#[command(
    version,
    mut_arg("queue_size", |arg| arg.default_value("256")),
    mut_arg("num_queues", |arg| {
        arg.default_value("1")
            .hide_default_value(false)
            .help("Offer up to N queues")
            .long_help("Offer up to N queues\n\nLinux uses one. One thread serves them all, with the help of --threads.")
    }),
    after_long_help = cli::qemu_example(
        "vhost-user-9p",
        "--shared-dir /srv/guest",
        "-device vhost-user-test-device-pci,chardev=vu0,virtio-id=9,num_vqs=1,vq_size=256,config_size=64",
    )
)]
pub struct Args {
    /// Directory to serve
    ///
    /// The guest can reach nothing outside of it, whatever links lie in it. A guest mounts it by the tag alone, or a
    /// directory in it with aname=/PATH.
    #[arg(long, value_name = "PATH", help_heading = "Share")]
    pub shared_dir: PathBuf,

    /// Name by which the guest mounts the device
    #[arg(long, value_name = "TAG", default_value = "share", value_parser = parse_tag, help_heading = "Share")]
    pub tag: String,

    /// Serve the directory PATH as well, to guests that mount with aname=NAME
    #[arg(long, value_name = "NAME=PATH", value_parser = OsStringValueParser::new().try_map(|text| parse_export(&text)), help_heading = "Share")]
    pub export: Vec<Export>,

    /// Refuse all changes
    #[arg(long, alias = "readonly", help_heading = "Share")]
    pub read_only: bool,

    /// What statfs(2) in the guest says of the type of file system
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = StatfsType::NineP, help_heading = "Share")]
    pub statfs_type: StatfsType,

    /// What is done about directories on several file systems, whose inode numbers may be the same
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Multidevs::Remap, help_heading = "Share")]
    pub multidevs: Multidevs,

    /// What tells a caching guest that a file has changed
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = QidVersion::Change, help_heading = "Share")]
    pub qid_version: QidVersion,

    /// Whose the guest's files are on the host [default: passthrough if the daemon may, otherwise none]
    #[arg(long, value_enum, value_name = "MODEL", help_heading = "Users")]
    pub security_model: Option<SecurityModel>,

    /// COUNT users of the guest from GUEST on are those of the host from HOST on; the others are not known
    #[arg(long, value_name = "GUEST:HOST:COUNT", help_heading = "Users")]
    pub uid_map: Vec<IdRange>,

    /// The same for groups
    #[arg(long, value_name = "GUEST:HOST:COUNT", help_heading = "Users")]
    pub gid_map: Vec<IdRange>,

    /// Users and groups of the guest that are somebody else on the host, which then checks the permissions of all users
    #[arg(long, value_enum, value_name = "WHO", default_value_t = Squash::None, help_heading = "Users")]
    pub squash: Squash,

    /// Who they are on the host [default: 65534:65534]
    #[arg(long, value_name = "UID:GID", requires = "squash", help_heading = "Users")]
    pub squash_to: Option<SquashTo>,

    /// Permissions of new files on the host, with --security-model mapped-xattr [default: 600]
    #[arg(long, value_name = "OCTAL", value_parser = parse_mode, help_heading = "Users")]
    pub fmode: Option<u32>,

    /// Permissions of new directories on the host, with --security-model mapped-xattr [default: 700]
    #[arg(long, value_name = "OCTAL", value_parser = parse_mode, help_heading = "Users")]
    pub dmode: Option<u32>,

    /// Extended attributes that the guest may see and change: prefixes with commas between, all, or none
    ///
    /// [default: user.,security.,system.posix_acl_]
    #[arg(long, value_name = "PREFIX,...", help_heading = "Users")]
    pub xattr: Option<XattrPolicy>,

    /// Whose locks the guest's locks meet
    #[arg(long, value_enum, value_name = "WHOSE", default_value_t = Locks::Host, help_heading = "Share")]
    pub locks: Locks,

    /// Pass O_DIRECT on to the host
    ///
    /// Otherwise the guest's direct I/O goes through the host's page cache, and need not be aligned as the host's storage
    /// wants it.
    #[arg(long, help_heading = "Share")]
    pub direct_io: bool,

    /// Largest message that a guest may ask for with msize=, in bytes
    #[arg(long, value_name = "BYTES", default_value = "1M", value_parser = parse_msize, help_heading = "Limits")]
    pub max_msize: u32,

    /// Files that the guest may have names for at a time (fids)
    ///
    /// A guest that caches (cache=loose) has one for each file that it remembers. They may be more than the daemon may have
    /// files open (ulimit -n): those that were not used for a while are found again by their file handles if the daemon has
    /// CAP_DAC_READ_SEARCH, otherwise by their paths, unless they were renamed meanwhile (ESTALE).
    #[arg(long, value_name = "N", default_value_t = 1 << 20, value_parser = value_parser!(u32).range(16..), help_heading = "Limits")]
    pub max_fids: u32,

    /// Files and directories that the guest may have open at a time
    #[arg(long, value_name = "N", default_value_t = 1 << 16, value_parser = value_parser!(u32).range(16..), help_heading = "Limits")]
    pub max_open_files: u32,

    /// Keep what a guest has open in this file, so that it can go on when the daemon is restarted or was killed
    ///
    /// The front end has to connect again by itself. The file need not outlive the host: a path below /run is best. A second
    /// file, PATH.2, is used by turns. What cannot be kept are files without a name and, unless the daemon has
    /// CAP_DAC_READ_SEARCH, files that were renamed.
    #[arg(long, value_name = "PATH", help_heading = "Share")]
    pub state_file: Option<PathBuf>,

    /// Threads for what has to wait for the host's storage
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = value_parser!(u16).range(1..=64), help_heading = "Queues")]
    pub threads: u16,

    /// Watch an idle queue for N microseconds before sleeping, as long as that pays; 0 is not at all
    ///
    /// It makes answers to a guest that waits for each of them faster, for up to N microseconds of CPU time in each pause.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = value_parser!(u32).range(..=1000), help_heading = "Queues")]
    pub poll_us: u32,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub sandbox: SandboxArgs,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub queues: QueueArgs,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub common: CommonArgs,
}

/// A further directory to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// What the guest gives as aname.
    pub name: Vec<u8>,
    /// The directory.
    pub path: PathBuf,
}

fn parse_export(text: &OsStr) -> Result<Export, String> {
    let bytes = text.as_bytes();
    match bytes.iter().position(|byte| *byte == b'=') {
        Some(at) if at > 0 && at + 1 < bytes.len() => {
            Ok(Export { name: bytes[..at].to_vec(), path: OsStr::from_bytes(&bytes[at + 1..]).into() })
        }
        _ => Err("a name, '=', and the path of a directory are expected".into()),
    }
}

fn parse_tag(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_TAG || text.contains(',') {
        return Err(format!("1 to {MAX_TAG} bytes without a comma are possible"));
    }
    Ok(text.into())
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "permissions are an octal number up to 777".into())
}

fn parse_msize(text: &str) -> Result<u32, String> {
    // Beyond what buffers of one chain can hold.
    const MAX: u64 = 4 << 20;
    parse_size::parse_size(text)
        .ok()
        .filter(|size| (u64::from(MIN_MSIZE)..=MAX).contains(size))
        .map(|size| size as u32)
        .ok_or_else(|| format!("a size from {MIN_MSIZE} bytes to 4M is possible"))
}
