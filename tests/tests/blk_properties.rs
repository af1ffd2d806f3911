//! Properties that hold for any request layout and for any garbage in a ring.

use std::cell::RefCell;
use std::time::Duration;

use anyhow::Result;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tests::driver::fixture::{BlkFixture, RawSetup, check_serves, pattern};
use tests::driver::raw::RawOptions;
use tests::driver::request::{OK, Outcome, Request, SECTOR};
use tests::driver::ring::{Desc, INDIRECT, NEXT, Next, WRITE};

fn runner(cases: u32) -> TestRunner {
    // A failure prints its input, which is then written down as a test of its own.
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

/// Places to cut bytes, in order.
fn cuts(most: usize) -> impl Strategy<Value = Vec<usize>> {
    vec(0..40 * SECTOR, 0..most).prop_map(|mut cuts| {
        cuts.sort_unstable();
        cuts
    })
}

#[test]
fn any_split_of_a_request_moves_the_same_data() -> Result<()> {
    let setup = RefCell::new(RawSetup::plain()?);
    let splits = (
        0..1024_u64,
        1..=32_usize,
        cuts(40),
        cuts(40),
        any::<bool>(),
        prop_oneof![Just(1), Just(16), Just(512), Just(4096)],
        any::<u32>(),
    );
    runner(400).run(&splits, |(sector, sectors, readable, writable, indirect, align, generation)| {
        let mut setup = setup.borrow_mut();
        let data = pattern((1 << 40) + u64::from(generation) * 8, sectors * SECTOR);
        let mut write = Request::write(sector, &data).cut(&readable, &[]);
        let mut read = Request::read(sector, data.len()).cut(&[3, 11], &writable);
        for request in [&mut write, &mut read] {
            request.indirect = indirect;
            request.align = align;
        }
        let outcome = setup.ring.execute(&write).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(outcome, Outcome { status: Some(OK), used_len: 1, data: Vec::new() });
        let outcome = setup.ring.execute(&read).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(outcome.status, Some(OK));
        prop_assert_eq!(outcome.used_len as usize, data.len() + 1);
        prop_assert!(outcome.data == data, "what was written is read");
        Ok(())
    })?;
    Ok(())
}

/// A descriptor of which each part may be sane or not.
fn garbage() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        0..0x10_0000_u64,
        0..0x100_0000_u64,
        any::<u64>(),
        Just(u64::MAX),
        Just(0x100_0000 - 100)
    ];
    let len = prop_oneof![0..64_u32, 0..100_000_u32, any::<u32>(), Just(512), Just(u32::MAX)];
    let flags = prop_oneof![0..8_u16, Just(NEXT), Just(NEXT | WRITE), Just(INDIRECT), any::<u16>()];
    let next = prop_oneof![
        Just(Next::Following),
        (0..40_u16).prop_map(Next::Entry),
        any::<u16>().prop_map(Next::Index)
    ];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

#[test]
fn garbage_in_a_ring_never_harms_the_daemon() -> Result<()> {
    let fixture = BlkFixture::new::<&str>([])?;
    let cases = (
        vec(garbage(), 1..40),
        vec(garbage(), 1..40),
        vec(prop_oneof![0..40_u16, any::<u16>()], 1..16),
        prop_oneof![9 => Just(None), 1 => any::<u16>().prop_map(Some)],
        vec(any::<u8>(), 4096),
    );
    runner(150).run(&cases, |(chain, table, heads, jump, memory)| {
        let attempt = || -> Result<()> {
            let mut device = fixture.raw(&RawOptions::default())?;
            let mut ring = device.ring(0, 64)?;
            // Any content, but a request of no known type where the sane chain has its header: the disk keeps what it
            // holds, by which the check at the end knows it.
            let at = ring.arena.alloc(memory.len(), 16);
            ring.memory().write(at, &memory);
            ring.memory().write(at, &pattern(0, 64));
            let indirect = ring.write_indirect(&table);
            let mut chain = chain.clone();
            chain.push(Desc::readable(indirect, table.len() as u32 * 16).with(INDIRECT));
            chain.push(Desc::readable(at, 600).with(NEXT));
            ring.write_descs(&chain);
            for head in &heads {
                ring.push_head(*head);
            }
            ring.push_head(chain.len() as u16 - 2);
            ring.publish();
            if let Some(index) = jump {
                ring.set_avail_idx(index);
            }
            ring.kick();
            ring.wait_used_count(1, Duration::from_millis(2));
            drop((ring, device));

            let mut device = fixture.raw(&RawOptions::default())?;
            check_serves(&mut device.ring(0, 64)?)
        };
        attempt().map_err(|error| TestCaseError::fail(format!("{error:#}")))
    })?;
    Ok(())
}
