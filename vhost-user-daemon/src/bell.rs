//! What a worker waits for while something is in flight: a doorbell that others ring, and kicks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use std::{io, mem::MaybeUninit};

use rustix::event::{Timespec, epoll};

/// Waits for a doorbell, and for kicks that nobody reads.
pub struct Bell {
    epoll: OwnedFd,
    watched: Vec<Arc<OwnedFd>>,
}

impl Bell {
    /// Waits for `doorbell` to become readable. It is read by whoever acts on it.
    pub fn new(doorbell: BorrowedFd<'_>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, doorbell, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        Ok(Self { epoll, watched: Vec::new() })
    }

    /// Waits for the doorbell, for a write to one of `kicks`, or until `timeout`.
    pub fn wait(&mut self, timeout: Duration, kicks: &[Arc<OwnedFd>]) {
        self.watch(kicks);
        let timeout = Timespec::try_from(timeout).ok();
        let mut events = [MaybeUninit::uninit(); 2];
        // Returning early does no harm.
        let _ = epoll::wait(&self.epoll, &mut events, timeout.as_ref());
    }

    fn watch(&mut self, kicks: &[Arc<OwnedFd>]) {
        let same = |(watched, kick)| Arc::ptr_eq(watched, kick);
        if self.watched.len() == kicks.len() && self.watched.iter().zip(kicks).all(same) {
            return;
        }
        for watched in self.watched.drain(..) {
            // It is open, so this cannot fail.
            let _ = epoll::delete(&self.epoll, watched.as_fd());
        }
        for kick in kicks {
            // Each write is reported once. Level-triggered, a kick that nobody reads would end every wait at once.
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            // Without it a kick is seen a little later, when the wait is over.
            let _ = epoll::add(&self.epoll, kick.as_fd(), epoll::EventData::new_u64(1), flags);
            self.watched.push(Arc::clone(kick));
        }
    }
}
