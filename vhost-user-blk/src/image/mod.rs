//! The host side of a disk: an image file or block device, opened, locked and probed, and the engines that do I/O on
//! it. Nothing here knows of virtio.

mod blocking;
mod engine;
mod lock;
mod operation;
mod sys;
mod uring;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use log::warn;
use rustix::fs::{AtFlags, FallocateFlags, StatxFlags, fallocate, ioctl_blkpbszget, ioctl_blksszget, statx};
use thiserror::Error;

pub use self::engine::{Engine, EngineChoice, EngineError};
pub use self::operation::{Job, Operation, Range};

/// The unit of virtio-blk, whatever the block size.
pub const SECTOR: u64 = 512;

/// `STATX_DIOALIGN`: tells how O_DIRECT wants to be aligned (Linux 6.1).
const STATX_DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);

/// How to open an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The file or block device.
    pub path: PathBuf,
    /// No writes.
    pub read_only: bool,
    /// Past the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Bytes, a power of two of at least 512; found out if not given.
    pub logical_block_size: Option<u32>,
}

/// Why an image cannot be served.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The path cannot be opened.
    #[error("Disk image {path} cannot be opened: check that it exists, and who may open it")]
    Open {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file system has no O_DIRECT.
    #[error(
        "Disk image {path} lies on a file system without O_DIRECT: choose --cache writeback or writethrough"
    )]
    NoDirect {
        /// As given.
        path: PathBuf,
    },
    /// A directory, pipe, terminal, ...
    #[error("Disk image {path} is {kind}: give a regular file or a block device")]
    Kind {
        /// As given.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Another format than raw, which the guest would overwrite.
    #[error(
        "Disk image {path} is in the format {format}, only raw is served: `qemu-img convert -O raw` makes one"
    )]
    Format {
        /// As given.
        path: PathBuf,
        /// Its name.
        format: &'static str,
    },
    /// Nothing can be stored.
    #[error(
        "Disk image {path} has {size} bytes, less than one block of {block}: make it larger, for example with `truncate --size 10G`"
    )]
    TooSmall {
        /// As given.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Bytes of a logical block.
        block: u32,
    },
    /// Another process serves the image.
    #[error(
        "Disk image {path} is in use by another process: end that one, or serve it with --read-only in both"
    )]
    Locked {
        /// As given.
        path: PathBuf,
    },
    /// The file system cannot say whether the image is locked.
    #[error("Disk image {path} cannot be locked")]
    Lock {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// O_DIRECT needs larger blocks than asked for.
    #[error(
        "Disk image {path} needs blocks of {needed} bytes past the page cache: choose --logical-block-size {needed}, or --cache writeback"
    )]
    BlockSize {
        /// As given.
        path: PathBuf,
        /// Bytes.
        needed: u32,
    },
    /// A size or an alignment cannot be found out.
    #[error("Properties of disk image {path} cannot be read")]
    Probe {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    BlockDevice,
}

/// An image that is open and locked.
#[derive(Debug)]
pub struct Image {
    file: File,
    kind: Kind,
    size: u64,
    logical_block_size: u32,
    physical_block_size: u32,
    read_only: bool,
    discard: bool,
    /// Requirements of O_DIRECT; `None` if the page cache is used.
    direct: Option<DirectAlignment>,
    /// The page cache can be asked whether it has the data (`RWF_NOWAIT`).
    nowait: bool,
    /// The file system turned out to have no zeroing of ranges.
    no_zero_range: AtomicBool,
    /// Something that was written could not be stored, so that no flush can be believed any more.
    lost_writes: AtomicBool,
}

/// What O_DIRECT asks for, in bytes, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DirectAlignment {
    memory: u32,
    offset: u32,
}

impl Image {
    /// Opens, checks and locks an image. The lock is held until the image is dropped.
    pub fn open(options: &ImageOptions) -> Result<Self, ImageError> {
        let path = || options.path.clone();
        let probe = |source| ImageError::Probe { path: path(), source };
        // Without O_NONBLOCK, opening a pipe would wait for its other end.
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(flags | libc::O_NONBLOCK)
                .open(&options.path)
        };
        let kind = check_kind(&options.path)?;
        let mut file = match open(if options.direct { libc::O_DIRECT } else { 0 }) {
            Err(error) if options.direct && error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(ImageError::NoDirect { path: path() });
            }
            result => result.map_err(|source| ImageError::Open { path: path(), source })?,
        };

        match lock::lock_patiently(&file, options.read_only) {
            Ok(lock::Outcome::Locked) => {}
            Ok(lock::Outcome::Busy) => return Err(ImageError::Locked { path: path() }),
            Ok(lock::Outcome::Unsupported) => {
                warn!(
                    "Disk image {} lies on a file system without locks: keep other writers away",
                    path().display()
                );
            }
            Err(source) => return Err(ImageError::Lock { path: path(), source }),
        }

        if let Some(format) = other_format(&options.path).map_err(probe)? {
            return Err(ImageError::Format { path: path(), format });
        }
        let direct = options.direct.then(|| direct_alignment(&file, kind)).transpose().map_err(probe)?;
        let (device_logical, physical_block_size) = match kind {
            Kind::File => (SECTOR as u32, file.metadata().map_err(probe)?.blksize() as u32),
            Kind::BlockDevice => (
                ioctl_blksszget(&file).map_err(|error| probe(error.into()))?,
                ioctl_blkpbszget(&file).map_err(|error| probe(error.into()))?,
            ),
        };
        let needed = direct.map_or(0, |direct| direct.offset).max(device_logical).max(SECTOR as u32);
        let logical_block_size = options.logical_block_size.unwrap_or(needed);
        if direct.is_some() && logical_block_size < needed {
            return Err(ImageError::BlockSize { path: path(), needed });
        }

        let bytes = file.seek(SeekFrom::End(0)).map_err(probe)?;
        let size = bytes - bytes % u64::from(logical_block_size);
        if size == 0 {
            return Err(ImageError::TooSmall { path: path(), size: bytes, block: logical_block_size });
        }
        if size < bytes {
            warn!(
                "The last {} bytes of disk image {} are no whole block and stay out of reach",
                bytes - size,
                path().display()
            );
        }
        let discard = !options.read_only && can_discard(&file, kind, bytes).map_err(probe)?;
        let nowait = direct.is_none() && blocking::supports_nowait(&file);
        Ok(Self {
            file,
            kind,
            size,
            logical_block_size,
            // A power of two that Linux guests accept, whatever the file system recommends.
            physical_block_size: physical_block_size.clamp(logical_block_size, 1 << 16).next_power_of_two(),
            read_only: options.read_only,
            discard,
            direct,
            nowait,
            no_zero_range: AtomicBool::new(false),
            lost_writes: AtomicBool::new(false),
        })
    }

    /// Bytes, a multiple of the logical block size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that are read or written at least.
    pub fn logical_block_size(&self) -> u32 {
        self.logical_block_size
    }

    /// Bytes that are best read or written at once: at least a logical block, a power of two.
    pub fn physical_block_size(&self) -> u32 {
        self.physical_block_size
    }

    /// Whether it was opened without the right to write.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether discarded ranges go back to the host.
    pub fn can_discard(&self) -> bool {
        self.discard
    }
}

/// Says what the path leads to, before opening it does harm (a tape would rewind).
fn check_kind(path: &Path) -> Result<Kind, ImageError> {
    let metadata =
        std::fs::metadata(path).map_err(|source| ImageError::Open { path: path.to_owned(), source })?;
    let file_type = metadata.file_type();
    let kind = if file_type.is_file() {
        return Ok(Kind::File);
    } else if file_type.is_block_device() {
        return Ok(Kind::BlockDevice);
    } else if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a pipe"
    } else if file_type.is_char_device() {
        "a character device"
    } else {
        "a socket"
    };
    Err(ImageError::Kind { path: path.to_owned(), kind })
}

/// Whether the image begins as one of another format does. Serving it as raw would show the guest nonsense, and its first
/// write would destroy what is in it.
fn other_format(path: &Path) -> io::Result<Option<&'static str>> {
    const FORMATS: [(&[u8], &str); 4] =
        [(b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx"), (b"conectix", "vpc")];
    // Not through the image's own descriptor, which may ask for aligned reads.
    let mut start = Vec::new();
    File::open(path)?.take(8).read_to_end(&mut start)?;
    Ok(FORMATS.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, name)| *name))
}

/// What O_DIRECT asks for on this file: statx(2) says it, or else the block size of the device.
fn direct_alignment(file: &File, kind: Kind) -> io::Result<DirectAlignment> {
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, STATX_DIOALIGN)?;
    if StatxFlags::from_bits_retain(stat.stx_mask).contains(STATX_DIOALIGN) && stat.stx_dio_offset_align > 0 {
        return Ok(DirectAlignment {
            memory: stat.stx_dio_mem_align.max(1),
            offset: stat.stx_dio_offset_align,
        });
    }
    let block = match kind {
        Kind::BlockDevice => ioctl_blksszget(file)?,
        // Not every file system tells, and older kernels never do. None asks for more than a page.
        Kind::File if blocking::takes_direct_sectors(file) => SECTOR as u32,
        Kind::File => 4096,
    };
    Ok(DirectAlignment { memory: block, offset: block })
}

/// Whether ranges can be given back.
fn can_discard(file: &File, kind: Kind, size: u64) -> io::Result<bool> {
    match kind {
        // Behind the end there is nothing to lose.
        Kind::File => Ok(fallocate(
            file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            size.next_multiple_of(4096),
            4096,
        )
        .is_ok()),
        Kind::BlockDevice => {
            let device = file.metadata()?.rdev();
            let base = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
            // A partition has its queue in the directory above.
            let limit = ["queue", "../queue"]
                .iter()
                .find_map(|queue| std::fs::read_to_string(format!("{base}/{queue}/discard_max_bytes")).ok());
            Ok(limit.is_some_and(|limit| limit.trim() != "0"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(path: &Path) -> ImageOptions {
        ImageOptions { path: path.to_owned(), read_only: false, direct: false, logical_block_size: None }
    }

    fn image_of(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn only_whole_blocks_count() {
        let file = image_of(3 * 4096 + 700);
        let image = Image::open(&options(file.path())).unwrap();
        assert_eq!(image.size(), 3 * 4096 + 512);
        drop(image);
        let blocks = ImageOptions { logical_block_size: Some(4096), ..options(file.path()) };
        assert_eq!(Image::open(&blocks).unwrap().size(), 3 * 4096);
    }

    #[test]
    fn what_is_no_disk_is_named() {
        let small = image_of(511);
        assert!(matches!(
            Image::open(&options(small.path())),
            Err(ImageError::TooSmall { size: 511, block: 512, .. })
        ));
        let directory = tempfile::tempdir().unwrap();
        for (path, expected) in
            [(directory.path(), "a directory"), (Path::new("/dev/null"), "a character device")]
        {
            assert!(
                matches!(Image::open(&options(path)), Err(ImageError::Kind { kind, .. }) if kind == expected)
            );
        }
        assert!(matches!(
            Image::open(&options(&directory.path().join("none"))),
            Err(ImageError::Open { .. })
        ));
    }

    #[test]
    fn other_formats_are_not_taken_for_raw() {
        let file = image_of(4096);
        std::fs::write(file.path(), [b"QFI\xfb".as_slice(), &[0; 4092]].concat()).unwrap();
        let result = Image::open(&options(file.path()));
        assert!(matches!(result, Err(ImageError::Format { format: "qcow2", .. })));
    }

    #[test]
    fn a_second_writer_is_kept_away() {
        let file = image_of(4096);
        let _first = Image::open(&options(file.path())).unwrap();
        assert!(matches!(Image::open(&options(file.path())), Err(ImageError::Locked { .. })));
    }
}
