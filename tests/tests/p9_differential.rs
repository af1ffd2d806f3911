//! Random sequences of operations, applied to a folder by system calls and to a share by 9P: the results, the errors
//! and the trees that are left must be the same.

use std::cell::RefCell;
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Result, ensure};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use rustix::fs::Mode;
use rustix::io::Errno;
use tests::driver::ninep::Share;
use tests::driver::ninep::share::scratch;

mod p9_differential {
    pub mod local;
    pub mod remote;
}

use p9_differential::local::Local;
use p9_differential::remote::Remote;

/// Sequences for each fixed seed, and for a random one.
const CASES: u32 = 150;
/// Files that are open at once.
const SLOTS: usize = 4;

/// A path below the top: few names, so that operations meet.
type Place = Vec<&'static str>;

/// What is done.
#[derive(Clone, Debug)]
enum Op {
    Mkdir(Place, u32),
    Create { slot: usize, place: Place, exclusive: bool, truncate: bool, mode: u32 },
    Open { slot: usize, place: Place, write: bool, truncate: bool, append: bool },
    Close(usize),
    Write { slot: usize, offset: u64, len: usize },
    Read { slot: usize, offset: u64, len: usize },
    Truncate { slot: usize, size: u64 },
    StatOpen(usize),
    ChmodOpen(usize, u32),
    Sync(usize),
    Unlink(Place),
    Rmdir(Place),
    Rename(Place, Place),
    Link(Place, Place),
    Symlink(Place, &'static str),
    Readlink(Place),
    Fifo(Place),
    Stat(Place),
    Chmod(Place, u32),
    TruncateAt(Place, u64),
    Times(Place, i64, i64),
    List(Place),
    SetXattr { place: Place, name: &'static str, len: usize, create: bool, replace: bool },
    GetXattr(Place, &'static str),
    RemoveXattr(Place, &'static str),
    ListXattr(Place),
}

/// A result that can be compared.
type Outcome = Result<String, Errno>;

/// One of the two ways to do it.
trait Subject {
    fn apply(&mut self, op: &Op) -> Outcome;
}

/// Bytes that tell offset and length.
fn content(offset: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| (offset as usize + i + len) as u8).collect()
}

/// What is compared of a file's attributes. A directory's size is the file system's own affair.
fn describe(mode: u32, nlink: u64, size: u64, uid: u32, gid: u32, mtime: Option<(i64, i64)>) -> String {
    let size = if mode & 0o170_000 == 0o040_000 { 0 } else { size };
    // A time that was set is of the past; any other is now, which is no two times the same.
    let mtime = mtime.filter(|&(sec, _)| sec < 1_000_000_000);
    format!("mode {mode:o}, {nlink} links, {size} bytes, {uid}:{gid}, {mtime:?}")
}

fn place() -> impl Strategy<Value = Place> {
    vec(prop_oneof![3 => Just("a"), 2 => Just("b"), 1 => Just("c")], 1..=3)
}

fn op() -> impl Strategy<Value = Op> {
    let slot = || 0..SLOTS;
    let mode =
        || prop_oneof![Just(0o644), Just(0o755), Just(0o600), Just(0o4711), Just(0o1777), Just(0o2750)];
    let offset = || prop_oneof![0..100_u64, 4000..9000_u64, Just(1 << 20), Just(5 << 30)];
    let len = || prop_oneof![0..200_usize, 1000..5000_usize, Just(70_000)];
    let name = || prop_oneof![3 => Just("user.x"), 2 => Just("user.y"), 1 => Just("unknown.z")];
    prop_oneof![
        4 => (place(), mode()).prop_map(|(place, mode)| Op::Mkdir(place, mode)),
        5 => (slot(), place(), any::<bool>(), any::<bool>(), mode()).prop_map(
            |(slot, place, exclusive, truncate, mode)| Op::Create { slot, place, exclusive, truncate, mode }
        ),
        4 => (slot(), place(), any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2)).prop_map(
            |(slot, place, write, truncate, append)| Op::Open { slot, place, write, truncate, append }
        ),
        1 => slot().prop_map(Op::Close),
        4 => (slot(), offset(), len()).prop_map(|(slot, offset, len)| Op::Write { slot, offset, len }),
        3 => (slot(), offset(), len()).prop_map(|(slot, offset, len)| Op::Read { slot, offset, len }),
        1 => (slot(), offset()).prop_map(|(slot, size)| Op::Truncate { slot, size }),
        3 => slot().prop_map(Op::StatOpen),
        1 => (slot(), mode()).prop_map(|(slot, mode)| Op::ChmodOpen(slot, mode)),
        1 => slot().prop_map(Op::Sync),
        3 => place().prop_map(Op::Unlink),
        2 => place().prop_map(Op::Rmdir),
        5 => (place(), place()).prop_map(|(from, to)| Op::Rename(from, to)),
        3 => (place(), place()).prop_map(|(from, to)| Op::Link(from, to)),
        2 => (place(), prop_oneof![Just("a"), Just("../a"), Just("/etc/passwd"), Just("nowhere")])
            .prop_map(|(place, target)| Op::Symlink(place, target)),
        1 => place().prop_map(Op::Readlink),
        1 => place().prop_map(Op::Fifo),
        3 => place().prop_map(Op::Stat),
        2 => (place(), mode()).prop_map(|(place, mode)| Op::Chmod(place, mode)),
        1 => (place(), offset()).prop_map(|(place, size)| Op::TruncateAt(place, size)),
        1 => (place(), 0..999_999_999_i64, 0..999_999_999_i64)
            .prop_map(|(place, sec, nsec)| Op::Times(place, sec, nsec)),
        2 => place().prop_map(Op::List),
        2 => (place(), name(), 0..300_usize, prop::bool::weighted(0.3), prop::bool::weighted(0.3)).prop_map(
            |(place, name, len, create, replace)| {
                // Linux's removexattr is a replacement by nothing, so that one cannot be asked for.
                let len = if replace { len.max(1) } else { len };
                Op::SetXattr { place, name, len, create, replace: replace && !create }
            }
        ),
        1 => (place(), name()).prop_map(|(place, name)| Op::GetXattr(place, name)),
        1 => (place(), name()).prop_map(|(place, name)| Op::RemoveXattr(place, name)),
        1 => place().prop_map(Op::ListXattr),
    ]
}

/// All that lies below a folder, a line for each file.
fn tree(top: &Path) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let host = fs::symlink_metadata(&path)?;
            let kind = host.file_type();
            if !kind.is_symlink() {
                // An ordinary user looks at what nobody may read, too, and removes it afterwards.
                fs::set_permissions(&path, Permissions::from_mode(0o700))?;
            }
            let content = if kind.is_symlink() {
                format!("to {}", fs::read_link(&path)?.display())
            } else if kind.is_dir() {
                folders.push(path.clone());
                String::new()
            } else if kind.is_fifo() || host.len() > 10 << 20 {
                String::new()
            } else {
                format!("{:x}", checksum(&fs::read(&path)?))
            };
            let mtime = Some((host.mtime(), host.mtime_nsec()));
            let name = path.strip_prefix(top)?.display().to_string();
            let attributes = describe(host.mode(), host.nlink(), host.len(), host.uid(), host.gid(), mtime);
            lines.push(format!("{name}: {attributes}, {content}, {:?}", xattrs(&path)?));
        }
    }
    lines.sort();
    Ok(lines)
}

/// FNV-1a: only to compare.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn xattrs(path: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0; 4096];
    let len = rustix::fs::llistxattr(path, &mut names)?;
    let mut all = Vec::new();
    for name in names[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 4096];
        let len = rustix::fs::lgetxattr(path, name, &mut value)?;
        all.push((String::from_utf8_lossy(name).into_owned(), value[..len].to_vec()));
    }
    all.sort();
    Ok(all)
}

/// Runs sequences with a source of chance.
fn run(rng: TestRng) -> Result<()> {
    run_with(rng, &[], true)
}

/// The same towards a daemon with more flags, and perhaps without a look at the trees on the host.
fn run_with(rng: TestRng, args: &[&str], compares_trees: bool) -> Result<()> {
    // What a guest's umask took away is gone before a request is sent.
    rustix::process::umask(Mode::empty());
    let share = Share::new(args)?;
    let folder = scratch()?;
    let state = RefCell::new((share.client()?, 0));
    let config =
        Config { cases: CASES, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    TestRunner::new_with_rng(config, rng).run(&vec(op(), 1..80), |ops| {
        let (client, number) = &mut *state.borrow_mut();
        *number += 1;
        let name = format!("case-{number}");
        let mut attempt = || -> Result<(), TestCaseError> {
            let fail = |error: &dyn std::fmt::Display| TestCaseError::fail(error.to_string());
            let (here, there) = (folder.path().join(&name), share.join(&name));
            for top in [&here, &there] {
                fs::create_dir(top).map_err(|error| fail(&error))?;
            }
            let mut local = Local::new(&here).map_err(|error| fail(&error))?;
            let mut remote = Remote::new(client, &name).map_err(|error| fail(&error))?;
            for (step, op) in ops.iter().enumerate() {
                if !compares_trees && local.is_the_guests(op) {
                    continue;
                }
                let (mut expected, mut found) = (local.apply(op), remote.apply(op));
                if !compares_trees && matches!(op, Op::List(_)) {
                    (expected, found) = (expected.map(without_kinds), found.map(without_kinds));
                }
                prop_assert_eq!(found, expected, "step {}, {:?}: by 9P (left) and by system calls", step, op);
            }
            drop((local, remote));
            let expected = tree(&here).map_err(|error| fail(&error))?;
            let found = tree(&there).map_err(|error| fail(&error))?;
            if compares_trees {
                prop_assert_eq!(found, expected, "the trees that 9P (left) and system calls leave");
            }
            for top in [&here, &there] {
                fs::remove_dir_all(top).map_err(|error| fail(&error))?;
            }
            Ok(())
        };
        attempt()
    })?;
    Ok(())
}

/// A listing that does not say what a file on the host is to the guest.
fn without_kinds(listing: String) -> String {
    ["RegularFile", "Fifo", "Symlink"].iter().fold(listing, |text, kind| text.replace(kind, "another kind"))
}

fn seeded(seed: u8) -> TestRng {
    TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32])
}

#[test]
fn the_first_sequences_do_the_same() -> Result<()> {
    run(seeded(1))
}

#[test]
fn the_second_sequences_do_the_same() -> Result<()> {
    run(seeded(2))
}

#[test]
fn the_third_sequences_do_the_same() -> Result<()> {
    run(seeded(3))
}

#[test]
fn mapped_files_look_the_same() -> Result<()> {
    // On the host they do not. There, the modes that the guest gave keep nobody out, as they keep root out of nothing.
    ensure!(
        rustix::process::geteuid().is_root(),
        "This test compares with what root may do, so it needs root"
    );
    run_with(seeded(4), &["--security-model", "mapped-xattr"], false)
}

#[test]
fn any_sequence_does_the_same() -> Result<()> {
    // A failure prints its sequence, which is then written down as a test of its own.
    let seed: [u8; 32] = std::array::from_fn(|_| rand_byte());
    println!("seed {seed:?}");
    run(TestRng::from_seed(RngAlgorithm::ChaCha, &seed))
}

/// A byte that nobody knows before.
fn rand_byte() -> u8 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() as u8
}
