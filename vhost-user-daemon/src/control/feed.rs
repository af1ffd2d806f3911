//! What wakes the server, and what it tells those who listen: bells and feeds.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use serde::Serialize;

/// How many events a [`Feed`] keeps for readers that are late.
pub const KEPT_EVENTS: usize = 1024;

/// Wakes the thread of a [`Server`](super::Server).
///
/// Clones ring the same server. Ring it when a [`Reply::Later`](super::Reply::Later) may be ready.
#[derive(Clone, Debug)]
pub struct Bell(Arc<OwnedFd>);

impl Bell {
    /// A bell for one server.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Wakes the server. Never blocks, and costs a system call.
    pub fn ring(&self) {
        // When the counter is full, it has been rung often enough.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Forgets that it was rung.
    pub(super) fn hush(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Readable after it was rung.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Events, in the order in which they happened, for any number of readers.
///
/// Clones are the same feed. The last [`KEPT_EVENTS`] are kept, and who reads more slowly than they come is told how
/// many are lost.
#[derive(Clone, Debug)]
pub struct Feed {
    bell: Bell,
    lost: fn(u64) -> String,
    ring: Arc<Mutex<Ring>>,
}

/// The last events, each a line of JSON.
#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Box<str>>,
    /// How many came before the first of `lines`.
    gone: u64,
}

impl Feed {
    /// An empty feed, whose events ring `bell`. `lost` writes the event, as one line of JSON without its end, that
    /// tells a reader how many are missing.
    pub fn new(bell: &Bell, lost: fn(u64) -> String) -> Self {
        Self { bell: bell.clone(), lost, ring: Arc::default() }
    }

    /// Appends an event. Never waits for a reader.
    pub fn publish(&self, event: &impl Serialize) {
        match serde_json::to_string(event) {
            Ok(line) => {
                let mut ring = self.lock();
                if ring.lines.len() == KEPT_EVENTS {
                    ring.lines.pop_front();
                    ring.gone += 1;
                }
                ring.lines.push_back(line.into_boxed_str());
            }
            Err(error) => log::error!("An event cannot be written: {error}"),
        }
        self.bell.ring();
    }

    /// Follows the feed, beginning with the last `past` events.
    pub fn subscribe(&self, past: usize) -> Subscription {
        let ring = self.lock();
        let next = ring.gone + ring.lines.len().saturating_sub(past) as u64;
        drop(ring);
        Subscription { feed: self.clone(), next }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reader's place in a [`Feed`].
#[derive(Debug)]
pub struct Subscription {
    feed: Feed,
    /// The number of the next event.
    next: u64,
}

impl Subscription {
    /// Appends lines to `output`, until there are no more or it has `limit` bytes.
    pub(super) fn read(&mut self, output: &mut Vec<u8>, limit: usize) {
        let ring = self.feed.lock();
        let lost = ring.gone.saturating_sub(self.next);
        if lost != 0 {
            output.extend_from_slice((self.feed.lost)(lost).as_bytes());
            output.push(b'\n');
            self.next = ring.gone;
        }
        for line in ring.lines.iter().skip((self.next - ring.gone) as usize) {
            if output.len() >= limit {
                break;
            }
            output.extend_from_slice(line.as_bytes());
            output.push(b'\n');
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed() -> Feed {
        Feed::new(&Bell::new().unwrap(), |lost| format!("lost {lost}"))
    }

    fn read(subscription: &mut Subscription, limit: usize) -> String {
        let mut output = Vec::new();
        subscription.read(&mut output, limit);
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn readers_are_independent() {
        let feed = feed();
        feed.publish(&1);
        let (mut new, mut all) = (feed.subscribe(0), feed.subscribe(10));
        feed.publish(&2);
        feed.publish(&3);
        assert_eq!(read(&mut new, 1000), "2\n3\n");
        assert_eq!(read(&mut new, 1000), "");
        assert_eq!(read(&mut all, 3), "1\n2\n");
        feed.publish(&4);
        assert_eq!(read(&mut all, 1000), "3\n4\n");
        assert_eq!(read(&mut new, 1000), "4\n");
        assert_eq!(read(&mut feed.subscribe(2), 1000), "3\n4\n");
    }

    #[test]
    fn a_reader_that_is_late_is_told() {
        let feed = feed();
        let mut late = feed.subscribe(0);
        (0..KEPT_EVENTS as u64 + 7).for_each(|event| feed.publish(&event));
        let text = read(&mut late, usize::MAX);
        assert!(text.starts_with("lost 7\n7\n8\n"), "{text}");
        assert!(text.ends_with(&format!("{}\n", KEPT_EVENTS + 6)));
        assert_eq!(text.lines().count(), KEPT_EVENTS + 1);
        feed.publish(&"again");
        assert_eq!(read(&mut late, usize::MAX), "\"again\"\n");
    }

    #[test]
    fn a_bell_that_nobody_hears_stays_quick() {
        let bell = Bell::new().unwrap();
        let feed = Feed::new(&bell, |_| String::new());
        (0..10_000).for_each(|event| feed.publish(&event));
        assert_eq!(feed.lock().lines.len(), KEPT_EVENTS);
        bell.hush();
    }
}
