//! Who holds a lock: a process of a client, with an open file description of its own for each inode that it locks.
//!
//! # Processes
//! A POSIX lock belongs to a process and an inode, whatever file of the process it was taken through: one that is taken
//! through a fid is given up through another. So an [`Owner`] is a client's process, and has the inode open for
//! itself, for reading and writing where that is possible. How a fid is open makes no difference then: flock(2)
//! takes an exclusive lock through a file that is open for reading, and Linux asks for it by the same Tlock as for that of
//! fcntl(2).
//!
//! An owner lives as long as a file through which it has locked ([`Holdings`]), or somebody who waits for it.
//!
//! # Whole files
//! Locks of flock(2) belong to an open file, and nothing in a Tlock tells them from those of a process. Linux also gives up
//! the whole file whenever one of the process's files is closed, as POSIX has it: were that done, a lock of flock(2) would
//! get lost when another file of the process, for the same inode, is closed. So a lock of the whole file, which is what
//! flock(2) takes, is given up by the file that it was taken through, and stays while another one of the process has such
//! a lock. For a POSIX lock this means: one that was taken on the whole file through one fid, and is given up as a whole
//! through another, stays on the host until the first one is done with it. Anything that no lock of flock(2)
//! can be in the way of (part of the file, or a kind that conflicts) shows that the locks are the process's, and
//! is done as POSIX has it.
//!
//! A child that shares its parent's open file may turn the parent's lock of flock(2) into another kind. The client's kernel
//! would not have let it if these were locks of processes, so that it is done in the parent's name.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;

use super::{Kind, check_range, try_lock};

/// A client's process, and the inode that it locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnerId {
    /// The inode: file system and number.
    inode: (u64, u64),
    /// The client's name, hashed: it may be long, and be another for each of a million owners.
    client: u64,
    process: u32,
}

type Table = Mutex<HashMap<OwnerId, Weak<Owner>>>;

/// The owners of a session, at most a fixed number of them.
#[derive(Debug)]
pub struct Owners {
    table: Arc<Table>,
    hasher: RandomState,
    limit: usize,
}

/// A process that has locked a file, or is about to.
#[derive(Debug)]
pub struct Owner {
    id: OwnerId,
    file: Arc<OwnedFd>,
    state: Mutex<State>,
    table: Weak<Table>,
}

#[derive(Debug, Default)]
struct State {
    /// Those that have taken locks which may still be there, by their address.
    holders: HashSet<usize>,
    /// Locks of the whole file, taken or waited for, by who took them: one that excludes, or some that share.
    whole: HashMap<usize, Kind>,
}

/// A file through which an owner locks.
#[derive(Debug)]
pub struct Holding(Arc<Owner>);

/// The owners that lock through a file: none for most, and one for most others.
#[derive(Debug, Default)]
pub struct Holdings(Mutex<Vec<Arc<Holding>>>);

/// A lock that is waited for. Dropped without [`LockRequest::keep`], it is not wanted any more.
#[derive(Debug)]
pub struct LockRequest {
    holding: Arc<Holding>,
    kind: Kind,
    range: (u64, u64),
    /// The lock of the whole file that there was before.
    before: Option<Kind>,
    progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Nobody waits yet.
    Refused,
    Waiting,
    Taken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is a single step, so a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_whole(range: (u64, u64)) -> bool {
    range == (0, 0)
}

impl Owners {
    /// Room for `limit`.
    pub fn new(limit: usize) -> Self {
        Self { table: Arc::default(), hasher: RandomState::new(), limit }
    }

    /// The identity of a client's process as the owner of locks on an inode (file system and number).
    pub fn id(&self, inode: (u64, u64), client: &[u8], process: u32) -> OwnerId {
        OwnerId { inode, client: self.hasher.hash_one(client), process }
    }

    /// The owner, if it has locked anything.
    pub fn find(&self, id: &OwnerId) -> Option<Arc<Owner>> {
        lock(&self.table).get(id).and_then(Weak::upgrade)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        lock(&self.table).len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The owner, which is made if it is new. `ENOLCK`: there are too many.
    fn get(
        &self,
        id: OwnerId,
        open: impl FnOnce() -> Result<Arc<OwnedFd>, Errno>,
    ) -> Result<Arc<Owner>, Errno> {
        if let Some(owner) = self.find(&id) {
            return Ok(owner);
        }
        if self.len() >= self.limit {
            return Err(Errno::NOLCK);
        }
        // Opening may take its time.
        let file = open()?;
        let new = Arc::new(Owner { id, file, state: Mutex::default(), table: Arc::downgrade(&self.table) });
        let mut table = lock(&self.table);
        // Another thread may have been faster.
        let owner = table.get(&id).and_then(Weak::upgrade).unwrap_or_else(|| {
            table.insert(id, Arc::downgrade(&new));
            Arc::clone(&new)
        });
        drop(table);
        Ok(owner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let Some(table) = self.table.upgrade() else { return };
        let mut table = lock(&table);
        // There may be a new one by now.
        if table.get(&self.id).is_some_and(|owner| owner.strong_count() == 0) {
            table.remove(&self.id);
        }
    }
}

impl Owner {
    /// The file, as this owner has it open.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Gives up `length` bytes from `start` (0: up to the end of the file), as far as they are not another open file's of
    /// the process. `through`: the file by which that is asked.
    ///
    /// Errors as for [`try_lock`].
    pub fn unlock(&self, through: &Holdings, start: u64, length: u64) -> Result<(), Errno> {
        let holdings = lock(&through.0);
        let mine = holdings.iter().find(|holding| ptr::eq(holding.owner(), self));
        let mut state = lock(&self.state);
        if is_whole((start, length)) {
            if let Some(holding) = mine {
                state.forget(holding.address());
            }
            if let Some((&holding, &kind)) = state.whole.iter().next()
                && try_lock(self.file(), kind, 0, 0) == Ok(true)
            {
                state.holders.insert(holding);
                return Ok(());
            }
            state.holders.clear();
        }
        state.whole.clear();
        try_lock(self.file(), Kind::Unlock, start, length).map(drop)
    }
}

impl State {
    /// Notes a lock that was taken.
    fn took(&mut self, holding: usize, kind: Kind, range: (u64, u64)) {
        self.holders.insert(holding);
        // Open files with locks of their own would have been in the way of each other.
        self.whole.retain(|_, other| kind == Kind::Read && *other == Kind::Read);
        if is_whole(range) {
            self.whole.insert(holding, kind);
        } else {
            self.whole.remove(&holding);
        }
    }

    /// Notes that a file has no locks any more; whether it had any.
    fn forget(&mut self, holding: usize) -> bool {
        self.whole.remove(&holding);
        self.holders.remove(&holding)
    }

    fn is_locked(&self) -> bool {
        !self.holders.is_empty()
    }
}

impl Holding {
    fn address(&self) -> usize {
        ptr::from_ref(self).addr()
    }

    fn owner(&self) -> &Owner {
        &self.0
    }

    /// Takes a lock, as [`try_lock`] does, or returns what is to be waited for.
    pub fn lock(self: Arc<Self>, kind: Kind, start: u64, length: u64) -> Result<Option<LockRequest>, Errno> {
        let range = (start, length);
        let mut state = lock(&self.0.state);
        if try_lock(self.0.file(), kind, start, length)? {
            state.took(self.address(), kind, range);
            return Ok(None);
        }
        let before = state.whole.get(&self.address()).copied();
        drop(state);
        Ok(Some(LockRequest { holding: self, kind, range, before, progress: Progress::Refused }))
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if state.forget(self.address()) && !state.is_locked() {
            // Other files that have locked before keep the owner, but nothing is held through them. Giving up never fails.
            let _ = try_lock(self.0.file(), Kind::Unlock, 0, 0);
        }
    }
}

impl Holdings {
    /// The part that `id` has in the locks of this file, before it takes one of `kind` on `length` bytes from `start`. An
    /// owner that is new has the file opened by `open`.
    ///
    /// `EINVAL`, `EOVERFLOW`: no such range. `ENOLCK`: there are too many owners.
    pub fn enter(
        &self,
        owners: &Owners,
        id: OwnerId,
        (kind, start, length): (Kind, u64, u64),
        open: impl FnOnce() -> Result<Arc<OwnedFd>, Errno>,
    ) -> Result<Arc<Holding>, Errno> {
        check_range(start, length)?;
        let mut holdings = lock(&self.0);
        if let Some(holding) = holdings.iter().find(|holding| holding.owner().id == id)
            && lock(&holding.0.state).is_locked()
        {
            return Ok(Arc::clone(holding));
        }
        if is_whole((start, length)) {
            let excludes = |other: Kind| kind == Kind::Write || other == Kind::Write;
            let inherited = holdings.iter().find(|holding| {
                lock(&holding.0.state).whole.get(&holding.address()).is_some_and(|kind| excludes(*kind))
            });
            if let Some(holding) = inherited {
                return Ok(Arc::clone(holding));
            }
        }
        if let Some(holding) = holdings.iter().find(|holding| holding.owner().id == id) {
            return Ok(Arc::clone(holding));
        }
        // Those that have come and gone.
        holdings.retain(|holding| Arc::strong_count(holding) > 1 || lock(&holding.0.state).is_locked());
        let holding = Arc::new(Holding(owners.get(id, open)?));
        holdings.push(Arc::clone(&holding));
        Ok(holding)
    }
}

impl LockRequest {
    /// Shared or exclusive.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// First byte, and number of bytes; 0 is up to the end of the file.
    pub fn range(&self) -> (u64, u64) {
        self.range
    }

    /// The file as its owner has it open: the lock is to be taken through this.
    pub fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.holding.0.file)
    }

    /// Notes that it is waited for from now on. Another file of the process that gives its lock up leaves this one alone.
    pub fn begin(&mut self) {
        self.progress = Progress::Waiting;
        if is_whole(self.range) {
            lock(&self.holding.0.state).whole.insert(self.holding.address(), self.kind);
        }
    }

    /// Notes that the lock was taken.
    pub fn keep(mut self) {
        self.progress = Progress::Taken;
        lock(&self.holding.0.state).took(self.holding.address(), self.kind, self.range);
    }

    /// Gives up the lock, which was taken, but nobody is to have it.
    ///
    /// If the process has other locks, what it had in the range is not known: a read lock stays, which is too much rather
    /// than too little, until the process gives up the range or the file.
    pub fn release(self) {
        let state = lock(&self.holding.0.state);
        let kind = if state.is_locked() { Kind::Read } else { Kind::Unlock };
        // It fails only where the lock could not have been taken.
        let _ = try_lock(self.holding.0.file(), kind, self.range.0, self.range.1);
    }
}

impl Drop for LockRequest {
    fn drop(&mut self) {
        if self.progress != Progress::Waiting || !is_whole(self.range) {
            return;
        }
        let mut state = lock(&self.holding.0.state);
        match self.before {
            Some(kind) => state.whole.insert(self.holding.address(), kind),
            None => state.whole.remove(&self.holding.address()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::super::test;
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use tempfile::NamedTempFile;

    fn open(file: &NamedTempFile) -> Result<Arc<OwnedFd>, Errno> {
        openat(CWD, file.path(), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map(Arc::new)
    }

    struct Fixture {
        file: NamedTempFile,
        observer: Arc<OwnedFd>,
        owners: Owners,
    }

    impl Fixture {
        fn new(limit: usize) -> Self {
            let file = NamedTempFile::new().unwrap();
            let observer = open(&file).unwrap();
            Self { file, observer, owners: Owners::new(limit) }
        }

        fn id(&self, process: u32) -> OwnerId {
            self.owners.id((1, 2), b"guest", process)
        }

        fn lock(
            &self,
            through: &Holdings,
            process: u32,
            (kind, start, length): (Kind, u64, u64),
        ) -> Result<Option<LockRequest>, Errno> {
            let wanted = (kind, start, length);
            let holding = through.enter(&self.owners, self.id(process), wanted, || open(&self.file))?;
            holding.lock(kind, start, length)
        }

        fn take(&self, through: &Holdings, process: u32, wanted: (Kind, u64, u64)) {
            assert!(self.lock(through, process, wanted).unwrap().is_none());
        }

        /// The lock that is in a writer's way: kind, start, length.
        fn seen(&self) -> Option<(Kind, u64, u64)> {
            let conflict = test(self.observer.as_fd(), Kind::Write, 0, 0).unwrap();
            conflict.map(|conflict| (conflict.kind, conflict.start, conflict.length))
        }
    }

    #[test]
    fn owners_end_with_their_files() {
        let fixture = Fixture::new(2);
        let (one, two) = (Holdings::default(), Holdings::default());
        fixture.take(&one, 1, (Kind::Write, 0, 1));
        fixture.take(&two, 1, (Kind::Write, 1, 1));
        fixture.take(&two, 2, (Kind::Write, 2, 1));
        assert_eq!(fixture.owners.len(), 2);
        assert_eq!(fixture.lock(&one, 3, (Kind::Write, 3, 1)).unwrap_err(), Errno::NOLCK);
        drop(two);
        assert_eq!(fixture.owners.len(), 1);
        fixture.take(&one, 3, (Kind::Write, 2, 1));
        drop(one);
        assert!(fixture.owners.is_empty());
        assert_eq!(fixture.seen(), None);
    }

    #[test]
    fn a_file_that_has_given_up_keeps_nothing() {
        let fixture = Fixture::new(9);
        let (one, two) = (Holdings::default(), Holdings::default());
        fixture.take(&one, 1, (Kind::Write, 0, 0));
        fixture.owners.find(&fixture.id(1)).unwrap().unlock(&one, 0, 0).unwrap();
        assert_eq!(fixture.seen(), None);
        fixture.take(&two, 1, (Kind::Read, 5, 5));
        assert_eq!(fixture.seen(), Some((Kind::Read, 5, 5)));
        drop(two);
        assert_eq!(fixture.seen(), None);
    }

    #[test]
    fn ranges_are_checked_before_anything_is_opened() {
        let fixture = Fixture::new(9);
        let one = Holdings::default();
        assert_eq!(fixture.lock(&one, 1, (Kind::Write, u64::MAX, 1)).unwrap_err(), Errno::INVAL);
        assert_eq!(fixture.lock(&one, 1, (Kind::Write, 1, u64::MAX)).unwrap_err(), Errno::OVERFLOW);
        assert!(fixture.owners.is_empty());
    }

    #[test]
    fn a_lock_that_is_waited_for_is_nobody_elses_to_give_up() {
        let fixture = Fixture::new(9);
        let (one, two) = (Holdings::default(), Holdings::default());
        let observer = fixture.observer.as_fd();
        assert_eq!(try_lock(observer, Kind::Read, 0, 1), Ok(true));
        let mut request = fixture.lock(&one, 1, (Kind::Write, 0, 0)).unwrap().unwrap();
        request.begin();
        assert_eq!(try_lock(observer, Kind::Unlock, 0, 0), Ok(true));
        // As if the waiting thread had got it, but nobody had been told yet.
        assert_eq!(try_lock(request.file().as_fd(), Kind::Write, 0, 0), Ok(true));
        fixture.owners.find(&fixture.id(1)).unwrap().unlock(&two, 0, 0).unwrap();
        assert_eq!(fixture.seen(), Some((Kind::Write, 0, 0)));
        request.keep();
        drop(two);
        assert_eq!(fixture.seen(), Some((Kind::Write, 0, 0)));
        drop(one);
        assert_eq!(fixture.seen(), None);
    }

    #[test]
    fn what_was_waited_for_in_vain_leaves_nothing_but_older_locks() {
        let fixture = Fixture::new(9);
        let one = Holdings::default();
        let observer = fixture.observer.as_fd();
        for older in [false, true] {
            if older {
                fixture.take(&one, 1, (Kind::Read, 0, 0));
            }
            for taken in [false, true] {
                assert_eq!(try_lock(observer, Kind::Read, 0, 1), Ok(true));
                let mut request = fixture.lock(&one, 1, (Kind::Write, 0, 0)).unwrap().unwrap();
                request.begin();
                assert_eq!(try_lock(observer, Kind::Unlock, 0, 0), Ok(true));
                if taken {
                    assert_eq!(try_lock(request.file().as_fd(), Kind::Write, 0, 0), Ok(true));
                    request.release();
                } else {
                    drop(request);
                }
                assert_eq!(fixture.seen(), older.then_some((Kind::Read, 0, 0)));
            }
        }
    }
}
