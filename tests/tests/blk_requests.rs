//! Every kind of disk request: its effect, its status byte and its used length.

use anyhow::Result;
use tests::driver::fixture::{IMAGE_LEN, RawSetup, pattern};
use tests::driver::raw::RawOptions;
use tests::driver::request::{
    HEADER_LEN, IOERR, OK, Outcome, Request, SECTOR, Segment, UNMAP, UNSUPP, UNTOUCHED,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

const SECTORS: u64 = (IMAGE_LEN / SECTOR) as u64;
const MIB: usize = 1 << 20;
/// Sectors in a MiB.
const MIB_SECTORS: u32 = (MIB / SECTOR) as u32;

/// The request fails with `status`, and the next good one is served.
fn check_refused(setup: &mut RawSetup, what: &str, request: &Request, status: u8) -> Result<()> {
    let outcome = setup.ring.execute(request)?;
    assert_eq!(outcome.status, Some(status), "{what}: status, used length {}", outcome.used_len);
    let range = 1..=request.writable as u32;
    assert!(
        range.contains(&outcome.used_len),
        "{what}: used length {} is not in {range:?}",
        outcome.used_len
    );
    setup.check_alive()
}

/// Makes a request of segments.
type Kind = fn(&[Segment]) -> Request;

fn done(data: Vec<u8>) -> Outcome {
    Outcome { status: Some(OK), used_len: data.len() as u32 + 1, data }
}

#[test]
fn in_fills_the_buffers_in_every_split() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let expected = done(pattern(8 * 512, 4096));
    let splits: [(&str, &[usize], &[usize]); 6] = [
        ("header, data, status", &[16], &[4096]),
        ("header in four parts", &[1, 5, 12], &[4096]),
        ("status at the end of the data", &[16], &[]),
        ("data in odd parts", &[16], &[1, 2, 515, 1000, 4095, 4096]),
        ("data in many parts", &[16], &(0..64).map(|i| i * 64 + 7).collect::<Vec<_>>()),
        ("status with the last byte of data", &[3], &[512, 4095]),
    ];
    for (what, readable, writable) in splits {
        let request = Request::read(8, 4096).cut(readable, writable);
        assert_eq!(setup.ring.execute(&request)?, expected, "{what}");
        assert_eq!(setup.ring.execute(&request.indirect())?, expected, "{what}, indirect");
    }
    Ok(())
}

#[test]
fn out_writes_the_buffers_in_every_split() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let splits: [(&str, &[usize]); 5] = [
        ("header, data", &[16]),
        ("header and data in one buffer", &[]),
        ("header and some data in one buffer", &[16 + 100]),
        ("header in parts, the last with data", &[7, 600]),
        ("data in odd parts", &[16, 17, 529, 1001, 4000]),
    ];
    for (round, (what, readable)) in (0..).zip(splits) {
        for indirect in [false, true] {
            let sector = 100 + round * 32 + u64::from(indirect) * 16;
            let data = pattern((sector + 7777) * 512, 4096);
            let mut request = Request::write(sector, &data).cut(readable, &[]);
            request.indirect = indirect;
            assert_eq!(setup.ring.execute(&request)?, done(Vec::new()), "{what}, indirect {indirect}");
            assert_eq!(
                setup.ring.execute(&Request::read(sector, 4096))?,
                done(data.clone()),
                "{what}: read back"
            );
            assert_eq!(setup.fixture.image_bytes(sector * 512, 4096)?, data, "{what}: in the image");
            let around = setup.fixture.image_bytes(sector * 512 + 4096, 512)?;
            assert_eq!(around, pattern(sector * 512 + 4096, 512), "{what}: the sector behind is untouched");
        }
    }
    Ok(())
}

#[test]
fn the_first_and_the_last_sector_are_served() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for sector in [0, SECTORS - 1] {
        let data = pattern(sector * 512, SECTOR);
        assert_eq!(setup.ring.execute(&Request::read(sector, SECTOR))?, done(data.clone()));
        assert_eq!(setup.ring.execute(&Request::write(sector, &data))?, done(Vec::new()));
    }
    Ok(())
}

#[test]
fn flush_succeeds_whatever_its_sector_says() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    assert_eq!(setup.ring.execute(&Request::flush())?, done(Vec::new()));
    let request = Request::new(VIRTIO_BLK_T_FLUSH, u64::MAX, &[], 0);
    assert_eq!(setup.ring.execute(&request)?, done(Vec::new()), "the sector of a flush means nothing");
    Ok(())
}

#[test]
fn get_id_returns_the_serial_padded_with_zeros() -> Result<()> {
    let mut setup = RawSetup::new(&["--serial", "disk-7"], &RawOptions::default())?;
    let mut id = b"disk-7".to_vec();
    id.resize(20, 0);
    assert_eq!(setup.ring.execute(&Request::id(20))?, done(id.clone()));
    let split = Request::id(20).cut(&[16], &[3, 19]);
    assert_eq!(setup.ring.execute(&split)?, done(id), "split");
    check_refused(&mut setup, "room for 19 of 20 bytes", &Request::id(19), IOERR)?;
    check_refused(&mut setup, "no room", &Request::id(0), IOERR)
}

#[test]
fn a_serial_of_full_length_has_no_terminator() -> Result<()> {
    let mut setup = RawSetup::new(&["--serial", "12345678901234567890"], &RawOptions::default())?;
    assert_eq!(setup.ring.execute(&Request::id(20))?, done(b"12345678901234567890".to_vec()));
    Ok(())
}

#[test]
fn unknown_requests_are_unsupported() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for kind in [2, 3, 5, 7, 9, 10, 12, 99, 0x8000_0000, u32::MAX] {
        check_refused(&mut setup, &format!("type {kind}"), &Request::new(kind, 0, &[], 0), UNSUPP)?;
        let with_data = Request::new(kind, 0, &[0; 512], 512);
        check_refused(&mut setup, &format!("type {kind} with data"), &with_data, UNSUPP)?;
    }
    Ok(())
}

#[test]
fn transfers_outside_of_the_disk_fail_and_change_nothing() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let cases = [
        ("starts at the end", SECTORS),
        ("starts behind the end", SECTORS + 1),
        ("ends behind the end", SECTORS - 1),
        ("sector u64::MAX", u64::MAX),
        ("its byte offset overflows", u64::MAX / 512 + 1),
        ("its byte offset is the largest signed number", i64::MAX as u64 / 512),
        ("its end overflows", u64::MAX / 512),
    ];
    for (what, sector) in cases {
        check_refused(&mut setup, &format!("IN {what}"), &Request::read(sector, 1024), IOERR)?;
        check_refused(&mut setup, &format!("OUT {what}"), &Request::write(sector, &[0; 1024]), IOERR)?;
    }
    assert_eq!(setup.fixture.image().metadata()?.len(), IMAGE_LEN as u64, "the image has not grown");
    assert_eq!(setup.fixture.image_bytes(0, IMAGE_LEN)?, pattern(0, IMAGE_LEN), "the image is unchanged");
    Ok(())
}

#[test]
fn transfers_of_a_wrong_shape_fail() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let sector = [0; SECTOR];
    let cases = [
        ("IN without data", Request::read(0, 0)),
        ("OUT without data", Request::write(0, &[])),
        ("IN of a part of a sector", Request::read(0, 511)),
        ("IN of a sector and a byte", Request::read(0, 513)),
        ("OUT of a part of a sector", Request::write(0, &sector[..100])),
        ("OUT of a sector and a byte", Request::write(0, &[0; 513])),
        ("IN with data to read", Request::new(VIRTIO_BLK_T_IN, 0, &sector, 0)),
        ("OUT with data to write", Request::new(VIRTIO_BLK_T_OUT, 0, &[], SECTOR)),
        ("OUT with data in both directions", Request::new(VIRTIO_BLK_T_OUT, 0, &sector, SECTOR)),
        ("header of 15 bytes", Request::read(0, SECTOR).truncated(HEADER_LEN - 1)),
        ("header of 1 byte", Request::flush().truncated(1)),
        ("no header", Request::read(0, SECTOR).truncated(0)),
    ];
    for (what, request) in cases {
        check_refused(&mut setup, what, &request, IOERR)?;
    }
    assert_eq!(setup.fixture.image_bytes(0, MIB)?, pattern(0, MIB), "the image is unchanged");
    Ok(())
}

#[test]
fn a_request_without_a_status_byte_comes_back_empty() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let nothing = Outcome { status: None, used_len: 0, data: Vec::new() };
    let cases = [
        ("IN", Request::read(0, 0).without_status()),
        ("OUT", Request::write(0, &[0; SECTOR]).without_status()),
        ("FLUSH", Request::flush().without_status()),
        ("unknown", Request::new(77, 0, &[], 0).without_status()),
        ("short header", Request::flush().without_status().truncated(4)),
    ];
    for (what, request) in cases {
        assert_eq!(setup.ring.execute(&request)?, nothing, "{what}");
        setup.check_alive()?;
    }
    Ok(())
}

#[test]
fn a_failed_read_leaves_its_buffer_alone() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let outcome = setup.ring.execute(&Request::read(SECTORS, SECTOR))?;
    assert_eq!(outcome.status, Some(IOERR));
    assert_eq!(outcome.data, [UNTOUCHED; SECTOR]);
    Ok(())
}

#[test]
fn discard_gives_blocks_back_to_the_host() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let before = setup.fixture.allocated()?;
    let request = Request::discard(&[Segment::new(4 * u64::from(MIB_SECTORS), 4 * MIB_SECTORS)]);
    assert_eq!(setup.ring.execute(&request)?, done(Vec::new()));
    let after = setup.fixture.allocated()?;
    assert!(after + 4 * MIB as u64 <= before + 64 * 1024, "4 MiB are given back: {before} -> {after} bytes");
    assert_eq!(setup.fixture.image().metadata()?.len(), IMAGE_LEN as u64, "the disk keeps its size");
    assert_eq!(setup.fixture.image_bytes(4 * MIB as u64 - 4096, 4096)?, pattern(4 * MIB as u64 - 4096, 4096));
    assert_eq!(setup.fixture.image_bytes(8 * MIB as u64, 4096)?, pattern(8 * MIB as u64, 4096));
    let read = setup.ring.execute(&Request::read(4 * u64::from(MIB_SECTORS), 4096))?;
    assert_eq!(read, done(vec![0; 4096]), "a hole reads as zeros");
    Ok(())
}

#[test]
fn write_zeroes_keeps_or_gives_back_blocks_as_asked() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let before = setup.fixture.allocated()?;
    let kept = Segment::new(2 * u64::from(MIB_SECTORS), MIB_SECTORS);
    assert_eq!(setup.ring.execute(&Request::write_zeroes(&[kept]))?, done(Vec::new()));
    assert_eq!(setup.fixture.image_bytes(2 * MIB as u64, MIB)?, vec![0; MIB]);
    let zeroed = setup.fixture.allocated()?;
    assert!(zeroed + 64 * 1024 >= before, "without UNMAP the blocks stay: {before} -> {zeroed} bytes");

    let given = Segment::new(6 * u64::from(MIB_SECTORS), MIB_SECTORS).flags(UNMAP);
    assert_eq!(setup.ring.execute(&Request::write_zeroes(&[given]))?, done(Vec::new()));
    assert_eq!(setup.fixture.image_bytes(6 * MIB as u64, MIB)?, vec![0; MIB]);
    let unmapped = setup.fixture.allocated()?;
    assert!(unmapped + MIB as u64 <= zeroed + 64 * 1024, "with UNMAP they go: {zeroed} -> {unmapped} bytes");

    for at in [2 * MIB - 4096, 3 * MIB, 6 * MIB - 4096, 7 * MIB] {
        assert_eq!(setup.fixture.image_bytes(at as u64, 4096)?, pattern(at as u64, 4096), "around, at {at}");
    }
    Ok(())
}

#[test]
fn write_zeroes_of_odd_sectors_touches_nothing_else() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    for flags in [0, UNMAP] {
        let sector = 1001 + 100 * u64::from(flags);
        let request = Request::write_zeroes(&[Segment::new(sector, 3).flags(flags)]);
        assert_eq!(setup.ring.execute(&request)?, done(Vec::new()), "flags {flags}");
        let mut expected = pattern((sector - 8) * 512, 19 * SECTOR);
        expected[8 * SECTOR..11 * SECTOR].fill(0);
        assert_eq!(setup.fixture.image_bytes((sector - 8) * 512, 19 * SECTOR)?, expected, "flags {flags}");
    }
    Ok(())
}

#[test]
fn all_segments_of_a_request_are_served() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let config = setup.device.blk_config()?;
    let kinds: [(&str, u32, Kind); 2] = [
        ("DISCARD", config.max_discard_seg.to_native(), Request::discard),
        ("WRITE_ZEROES", config.max_write_zeroes_seg.to_native(), Request::write_zeroes),
    ];
    for (round, (what, limit, request)) in (0..).zip(kinds) {
        assert!(limit >= 2, "{what} takes several segments");
        let segments: Vec<_> =
            (0..limit.min(16)).map(|i| Segment::new(8192 * round + u64::from(i) * 64, 8)).collect();
        let request = request(&segments).cut(&[16, 20, 40], &[]);
        assert_eq!(setup.ring.execute(&request)?, done(Vec::new()), "{what} of {} segments", segments.len());
        for segment in segments {
            let bytes = setup.fixture.image_bytes(segment.sector * 512, 16 * SECTOR)?;
            assert_eq!(bytes[..8 * SECTOR], [0; 8 * SECTOR], "{what} at sector {}", segment.sector);
            let behind = pattern((segment.sector + 8) * 512, 8 * SECTOR);
            assert_eq!(bytes[8 * SECTOR..], behind, "{what} behind sector {}", segment.sector);
        }
    }
    Ok(())
}

#[test]
fn a_segment_of_no_sectors_is_done_at_once() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let before = setup.fixture.image_bytes(0, 8 * SECTOR)?;
    for request in [Request::discard, Request::write_zeroes] {
        for sector in [0, SECTORS] {
            let request = request(&[Segment::new(sector, 0), Segment::new(0, 0)]);
            assert_eq!(setup.ring.execute(&request)?, done(Vec::new()), "at sector {sector}");
        }
    }
    assert_eq!(setup.fixture.image_bytes(0, 8 * SECTOR)?, before);
    Ok(())
}

#[test]
fn bad_segments_are_refused_and_change_nothing() -> Result<()> {
    let mut setup = RawSetup::plain()?;
    let config = setup.device.blk_config()?;
    let kinds: [(&str, u32, u32, u32, Kind); 2] = [
        (
            "DISCARD",
            VIRTIO_BLK_T_DISCARD,
            config.max_discard_seg.to_native(),
            config.max_discard_sectors.to_native(),
            Request::discard,
        ),
        (
            "WRITE_ZEROES",
            VIRTIO_BLK_T_WRITE_ZEROES,
            config.max_write_zeroes_seg.to_native(),
            config.max_write_zeroes_sectors.to_native(),
            Request::write_zeroes,
        ),
    ];
    for (name, kind, max_segments, max_sectors, request) in kinds {
        assert!(max_segments < 4096, "{name} has a limit of segments");
        let good = Segment::new(0, 8);
        let cases = [
            ("no segment", request(&[]), IOERR),
            ("15 bytes of segment", Request::new(kind, 0, &[0; 15], 0), IOERR),
            ("a segment and a byte", Request::new(kind, 0, &[0; 17], 0), IOERR),
            ("too many segments", request(&vec![good; max_segments as usize + 1]), IOERR),
            ("too many sectors", request(&[Segment::new(0, max_sectors.saturating_add(1))]), IOERR),
            ("start at the end", request(&[Segment::new(SECTORS, 1)]), IOERR),
            ("end behind the end", request(&[Segment::new(SECTORS - 1, 2)]), IOERR),
            ("sector u64::MAX", request(&[Segment::new(u64::MAX, 1)]), IOERR),
            ("overflow", request(&[Segment::new(u64::MAX / 512, 8)]), IOERR),
            ("a reserved flag", request(&[good.flags(2)]), UNSUPP),
            ("all flags", request(&[good.flags(u32::MAX)]), UNSUPP),
        ];
        for (what, request, status) in cases {
            check_refused(&mut setup, &format!("{name}: {what}"), &request, status)?;
        }
        if max_segments >= 2 {
            // The first segment alone would be fine: a request is checked before any of it is carried out.
            let request = request(&[good, Segment::new(SECTORS, 1)]);
            check_refused(&mut setup, &format!("{name}: bad second segment"), &request, IOERR)?;
        }
    }
    let unmap = Request::discard(&[Segment::new(0, 8).flags(UNMAP)]);
    check_refused(&mut setup, "DISCARD with UNMAP", &unmap, UNSUPP)?;
    assert_eq!(setup.fixture.image_bytes(0, IMAGE_LEN)?, pattern(0, IMAGE_LEN), "the image is unchanged");
    Ok(())
}

#[test]
fn a_read_only_disk_refuses_to_change() -> Result<()> {
    let options = RawOptions::default()
        .with(VIRTIO_BLK_F_RO)
        .without(VIRTIO_BLK_F_DISCARD)
        .without(VIRTIO_BLK_F_WRITE_ZEROES)
        .without(VIRTIO_BLK_F_CONFIG_WCE);
    let mut setup = RawSetup::new(&["--read-only"], &options)?;
    check_refused(&mut setup, "OUT", &Request::write(0, &[0; SECTOR]), IOERR)?;
    for request in [Request::discard(&[Segment::new(0, 8)]), Request::write_zeroes(&[Segment::new(0, 8)])] {
        let status = setup.ring.execute(&request)?.status;
        assert!(matches!(status, Some(IOERR | UNSUPP)), "status {status:?}");
        setup.check_alive()?;
    }
    assert_eq!(
        setup.ring.execute(&Request::flush())?,
        done(Vec::new()),
        "there is nothing to flush, which is fine"
    );
    assert_eq!(setup.fixture.image_bytes(0, IMAGE_LEN)?, pattern(0, IMAGE_LEN), "the image is unchanged");
    Ok(())
}

#[test]
fn every_cache_mode_and_engine_serves_the_same() -> Result<()> {
    for cache in ["writeback", "writethrough", "direct"] {
        for engine in ["io_uring", "sync"] {
            let what = format!("--cache {cache} --io-engine {engine}");
            let options = RawOptions::default();
            let mut setup = RawSetup::new(&["--cache", cache, "--io-engine", engine], &options)?;
            let data = pattern(1 << 30, 8192);
            // Buffers at odd addresses and of odd lengths: direct I/O cannot use them as they are.
            let mut write = Request::write(33, &data).cut(&[5, 16, 16 + 100, 16 + 4097], &[]);
            write.align = 1;
            let mut read = Request::read(32, 3 * 4096).cut(&[16], &[511, 513, 5000]);
            read.align = 1;
            assert_eq!(setup.ring.execute(&write)?, done(Vec::new()), "{what}");
            assert_eq!(setup.ring.execute(&Request::flush())?, done(Vec::new()), "{what}");
            let mut expected = pattern(32 * 512, 3 * 4096);
            expected[512..512 + 8192].copy_from_slice(&data);
            assert_eq!(setup.ring.execute(&read)?, done(expected.clone()), "{what}");
            assert_eq!(setup.fixture.image_bytes(32 * 512, 3 * 4096)?, expected, "{what}");
        }
    }
    Ok(())
}
