use super::*;
use crate::server::saved::SavedRole;
use std::fs;

fn lock() -> SavedLock {
    SavedLock { owner: (b"guest".to_vec(), 1), exclusive: Some(true), start: 0, end: 10 }
}

fn session() -> SavedSession {
    SavedSession { msize: 8192, shares: Vec::new() }
}

fn saved(uid: u32) -> SavedFid {
    let node = crate::host::node::SavedNode::nowhere(1, 2);
    SavedFid { uid, share: 0, root: node.clone(), node, role: SavedRole::File(2) }
}

/// Fid, user, and number of locks.
type Summary = Vec<(u32, u32, usize)>;

/// The fids of the file at `path`, with their users and the number of their locks.
fn load(path: &Path) -> Result<Option<Summary>, StateError> {
    let loaded = Journal::open(path)?.load();
    Ok(loaded.map(|loaded| {
        let mut fids: Vec<_> =
            loaded.fids.iter().map(|(fid, saved, locks)| (*fid, saved.uid, locks.len())).collect();
        fids.sort_unstable();
        fids
    }))
}

#[test]
fn what_is_written_is_there_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    assert_eq!(load(&path).unwrap(), None);
    let journal = Journal::open(&path).unwrap();
    assert!(matches!(Journal::open(&path), Err(StateError::InUse { .. })));
    journal.begin(session());
    journal.fid(1, saved(10));
    journal.fid(2, saved(20));
    journal.fid(1, saved(11));
    journal.locked(1, lock());
    journal.gone(2);
    journal.gone(7);
    drop(journal);
    assert_eq!(load(&path).unwrap(), Some(vec![(1, 11, 1)]));
    let journal = Journal::open(&path).unwrap();
    journal.fid(3, saved(30));
    drop(journal);
    assert_eq!(load(&path).unwrap(), Some(vec![(1, 11, 1), (3, 30, 0)]));
    Journal::open(&path).unwrap().begin(session());
    assert_eq!(load(&path).unwrap(), Some(vec![]));
}

#[test]
fn it_does_not_grow_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let journal = Journal::open(&path).unwrap();
    journal.begin(session());
    journal.fid(1, saved(1));
    journal.locked(1, lock());
    for round in 0..200_000 {
        journal.fid(2, saved(round));
        journal.gone(2);
    }
    journal.fid(3, saved(3));
    drop(journal);
    assert_eq!(load(&path).unwrap(), Some(vec![(1, 1, 1), (3, 3, 0)]));
    let len = |path: &str| fs::metadata(dir.path().join(path)).unwrap().len();
    assert!(len("state") + len("state.2") < 2 << 20);
}

#[test]
fn a_file_that_is_cut_off_holds_what_came_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let journal = Journal::open(&path).unwrap();
    journal.begin(session());
    journal.fid(1, saved(1));
    journal.fid(2, saved(2));
    drop(journal);
    let active = dir.path().join("state.2");
    let whole = fs::read(&active).unwrap();
    let mut seen = Vec::new();
    for len in (HEADER..=whole.len()).rev() {
        fs::write(&active, &whole[..len]).unwrap();
        let fids = load(&path).unwrap().map(|fids| fids.len());
        if seen.last() != Some(&fids) {
            seen.push(fids);
        }
    }
    assert_eq!(seen, [Some(2), Some(1), Some(0), None]);
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&active, bytes).unwrap();
        // A length may become one that says that the record was cut off.
        match load(&path) {
            Err(StateError::Foreign { .. }) => assert!(at < HEADER),
            Err(StateError::Damaged { .. }) => assert!(at >= HEADER),
            Err(error) => panic!("{error}"),
            Ok(fids) => assert!(fids.is_none_or(|fids| fids.len() < 2), "{at}"),
        }
    }
    fs::write(&path, "something else").unwrap();
    assert!(matches!(load(&path), Err(StateError::Foreign { .. })));
}
