//! What a driver asks for: guest bytes to a typed request.
//!
//! Virtio 1.3 text, section 5.2.6 (block device, device operation). Everything here is pure and total: any bytes give a
//! request or the status that refuses it.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::image::{Range, SECTOR};

/// Bytes of the serial number that GET_ID returns, padded with zeroes (5.2.6, `VIRTIO_BLK_ID_BYTES`).
pub const ID_BYTES: usize = 20;

/// Segments that one DISCARD or WRITE_ZEROES may have.
pub const MAX_SEGMENTS: u32 = 32;

/// Sectors that one segment of a DISCARD or WRITE_ZEROES may have: 1 GiB, so that a single request does not keep the
/// host's file system busy for long.
pub const MAX_SEGMENT_SECTORS: u32 = 1 << 21;

/// The start of every request (5.2.6, `struct virtio_blk_req`).
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// What to do.
    pub kind: U32,
    /// Reserved; the priority with some old drivers.
    pub reserved: U32,
    /// Where, in units of 512 bytes. Only IN and OUT use it.
    pub sector: U64,
}

/// One range of a DISCARD or WRITE_ZEROES (5.2.6, `struct virtio_blk_discard_write_zeroes`).
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Segment {
    /// First sector.
    pub sector: U64,
    /// Number of sectors.
    pub num_sectors: U32,
    /// Bit 0: may be unmapped. The rest is reserved.
    pub flags: U32,
}

/// The status byte at the end of a request (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed, or out of range.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// The device does not know or not offer this.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What a request has to keep to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the disk.
    pub capacity: u64,
    /// Bytes of a logical block.
    pub block_size: u32,
    /// Nothing may be written.
    pub read_only: bool,
    /// DISCARD is offered.
    pub discard: bool,
}

/// A request that keeps to the limits. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read the whole device-writable data from this offset.
    In {
        /// First byte on the disk.
        offset: u64,
    },
    /// Write the whole device-readable data to this offset.
    Out {
        /// First byte on the disk.
        offset: u64,
    },
    /// Make what was written durable.
    Flush,
    /// Return the serial number.
    GetId,
    /// Give the ranges up; they are parsed by [`parse_segments`].
    Discard,
    /// Zero the ranges; they are parsed by [`parse_segments`].
    WriteZeroes,
}

/// Says what `header` asks for, with `readable` bytes of data after it, and `writable` bytes before the status.
pub fn parse(header: &Header, readable: u64, writable: u64, limits: &Limits) -> Result<Request, Status> {
    let kind = header.kind.get();
    let is_write = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
    if is_write && limits.read_only {
        return Err(Status::IoError);
    }
    match kind {
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => {
            let (data, other) = if is_write { (readable, writable) } else { (writable, readable) };
            if data == 0 || other != 0 {
                return Err(Status::IoError);
            }
            let offset = header.sector.get().checked_mul(SECTOR).ok_or(Status::IoError)?;
            check_range(offset, data, limits)?;
            Ok(if is_write { Request::Out { offset } } else { Request::In { offset } })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID if writable < ID_BYTES as u64 => Err(Status::IoError),
        VIRTIO_BLK_T_GET_ID => Ok(Request::GetId),
        VIRTIO_BLK_T_DISCARD if limits.discard => check_segments(readable, Request::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => check_segments(readable, Request::WriteZeroes),
        _ => Err(Status::Unsupported),
    }
}

/// Says which ranges the segments of a DISCARD or WRITE_ZEROES name; empty ones are left out.
pub fn parse_segments(
    request: Request,
    segments: &[Segment],
    limits: &Limits,
    ranges: &mut Vec<Range>,
) -> Result<(), Status> {
    /// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`
    const UNMAP: u32 = 1;
    let known_flags = if request == Request::WriteZeroes { UNMAP } else { 0 };
    ranges.clear();
    // All are looked at before any is changed.
    for segment in segments {
        let flags = segment.flags.get();
        if flags & !known_flags != 0 {
            return Err(Status::Unsupported);
        }
        if segment.num_sectors.get() > MAX_SEGMENT_SECTORS {
            return Err(Status::IoError);
        }
        let offset = segment.sector.get().checked_mul(SECTOR).ok_or(Status::IoError)?;
        let len = u64::from(segment.num_sectors.get()) * SECTOR;
        check_range(offset, len, limits)?;
        if len > 0 {
            ranges.push(Range { offset, len, unmap: flags & UNMAP != 0 });
        }
    }
    Ok(())
}

fn check_segments(readable: u64, request: Request) -> Result<Request, Status> {
    let size = size_of::<Segment>() as u64;
    if readable == 0 || !readable.is_multiple_of(size) || readable / size > u64::from(MAX_SEGMENTS) {
        return Err(Status::IoError);
    }
    Ok(request)
}

/// Whether whole blocks of the disk are meant, all of which exist.
fn check_range(offset: u64, len: u64, limits: &Limits) -> Result<(), Status> {
    let block = u64::from(limits.block_size);
    let fits = offset <= limits.capacity && len <= limits.capacity - offset;
    if fits && offset.is_multiple_of(block) && len.is_multiple_of(block) {
        Ok(())
    } else {
        Err(Status::IoError)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { capacity: 1 << 20, block_size: 512, read_only: false, discard: true };

    fn header(kind: u32, sector: u64) -> Header {
        Header { kind: kind.into(), reserved: 0.into(), sector: sector.into() }
    }

    #[test]
    fn transfers_stay_inside_the_disk() {
        let last = (1 << 20) / 512 - 1;
        let read = |sector, len| parse(&header(VIRTIO_BLK_T_IN, sector), 0, len, &LIMITS);
        assert_eq!(read(last, 512), Ok(Request::In { offset: (1 << 20) - 512 }));
        for (sector, len) in
            [(last, 1024), (last + 1, 512), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 0), (0, 511)]
        {
            assert_eq!(read(sector, len), Err(Status::IoError), "sector {sector}, {len} bytes");
        }
    }

    #[test]
    fn data_goes_one_way_only() {
        for (kind, readable, writable) in
            [(VIRTIO_BLK_T_IN, 512, 512), (VIRTIO_BLK_T_OUT, 512, 512), (VIRTIO_BLK_T_IN, 512, 0)]
        {
            assert_eq!(parse(&header(kind, 0), readable, writable, &LIMITS), Err(Status::IoError));
        }
    }

    #[test]
    fn blocks_larger_than_a_sector_are_whole() {
        let limits = Limits { block_size: 4096, ..LIMITS };
        assert_eq!(parse(&header(VIRTIO_BLK_T_IN, 8), 0, 4096, &limits), Ok(Request::In { offset: 4096 }));
        assert_eq!(parse(&header(VIRTIO_BLK_T_IN, 1), 0, 4096, &limits), Err(Status::IoError));
        assert_eq!(parse(&header(VIRTIO_BLK_T_IN, 0), 0, 512, &limits), Err(Status::IoError));
    }

    #[test]
    fn a_read_only_disk_refuses_every_change() {
        let limits = Limits { read_only: true, discard: false, ..LIMITS };
        for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(parse(&header(kind, 0), 512, 0, &limits), Err(Status::IoError));
        }
        assert_eq!(parse(&header(VIRTIO_BLK_T_FLUSH, 0), 0, 0, &limits), Ok(Request::Flush));
    }

    #[test]
    fn flags_of_segments() {
        let segment = |flags: u32| Segment { sector: 8.into(), num_sectors: 8.into(), flags: flags.into() };
        let mut ranges = Vec::new();
        let mut parse = |request, flags| {
            parse_segments(request, &[segment(flags)], &LIMITS, &mut ranges).map(|()| ranges.clone())
        };
        let range = |unmap| Range { offset: 4096, len: 4096, unmap };
        assert_eq!(parse(Request::WriteZeroes, 1), Ok(vec![range(true)]));
        assert_eq!(parse(Request::WriteZeroes, 2), Err(Status::Unsupported));
        assert_eq!(parse(Request::Discard, 0), Ok(vec![range(false)]));
        assert_eq!(parse(Request::Discard, 1), Err(Status::Unsupported));
    }

    proptest! {
        /// Whatever the guest writes, what comes out lies on the disk.
        #[test]
        fn nothing_reaches_beyond_the_disk(
            kind in prop_oneof![0u32..16, any::<u32>()],
            sector in any::<u64>(),
            readable in prop_oneof![(0u64..3000), any::<u32>().prop_map(u64::from)],
            writable in prop_oneof![(0u64..3000), any::<u32>().prop_map(u64::from)],
            capacity_blocks in 1u64..1 << 50,
        ) {
            let limits = Limits { capacity: capacity_blocks * 512, ..LIMITS };
            match parse(&header(kind, sector), readable, writable, &limits) {
                Ok(Request::In { offset }) => prop_assert!(u128::from(offset) + u128::from(writable) <= u128::from(limits.capacity)),
                Ok(Request::Out { offset }) => prop_assert!(u128::from(offset) + u128::from(readable) <= u128::from(limits.capacity)),
                _ => {}
            }
        }

        #[test]
        fn no_range_reaches_beyond_the_disk(
            segments in prop::collection::vec((any::<u64>(), any::<u32>(), 0u32..3), 0..40),
            small in prop::collection::vec((0u64..5000, 0u32..5000, 0u32..2), 0..40),
        ) {
            for list in [segments, small] {
                let list: Vec<Segment> = list
                    .iter()
                    .map(|(sector, num, flags)| Segment { sector: (*sector).into(), num_sectors: (*num).into(), flags: (*flags).into() })
                    .collect();
                let mut ranges = Vec::new();
                if parse_segments(Request::WriteZeroes, &list, &LIMITS, &mut ranges).is_ok() {
                    for range in ranges {
                        prop_assert!(range.len > 0 && range.offset + range.len <= LIMITS.capacity);
                    }
                }
            }
        }
    }
}
