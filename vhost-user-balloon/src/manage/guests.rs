//! The guests, by their balloons' control sockets.
//!
//! Each balloon has a thread that talks to it, so that one that hangs delays nobody else: what it did not say in time
//! is missing from a snapshot, and its guest is left alone.

mod poller;
pub mod view;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{error, warn};
use thiserror::Error;

use self::poller::Poller;
use self::watch::DirectoryWatch;
use super::api::GuestStatus;
use super::config::Config;
use super::event::What;
use super::model::Guest;

/// Balloons that are managed at most: each costs a thread and a connection.
pub const MAX_GUESTS: usize = 1024;

/// Why the balloons cannot be found.
#[derive(Debug, Error)]
pub enum GuestsError {
    /// The directory cannot be watched.
    #[error(
        "Directory {} cannot be watched: it has to exist, and to be readable for this user; \
         /proc/sys/fs/inotify bounds how many there can be",
        path.display()
    )]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two sockets have the same file name.
    #[error("Two sockets are called {0}, and so would be their guests: rename one")]
    SameName(String),
}

/// Where the balloons are, and what may be done to them.
#[derive(Debug, Default)]
pub struct GuestsOptions {
    /// Control sockets.
    pub sockets: Vec<PathBuf>,
    /// A directory in which control sockets come and go.
    pub directory: Option<PathBuf>,
    /// Nothing is sent to any balloon.
    pub dry_run: bool,
}

/// All balloons.
#[derive(Debug)]
pub struct Guests {
    given: BTreeMap<String, PathBuf>,
    watch: Option<DirectoryWatch>,
    dry_run: bool,
    config: Arc<Config>,
    /// The moment from which seconds are counted.
    epoch: Instant,
    pollers: BTreeMap<String, Poller>,
    /// The log says that the directory cannot be read, or that it holds too many sockets.
    complained: bool,
    /// Sockets that the log has said are called as others are.
    shadowed: BTreeSet<PathBuf>,
}

impl Guests {
    /// Finds the balloons. `epoch` is the moment from which all seconds are counted.
    ///
    /// Nothing is asked before the first [`poll`](Self::poll).
    pub fn new(options: &GuestsOptions, config: Arc<Config>, epoch: Instant) -> Result<Self, GuestsError> {
        let mut given = BTreeMap::new();
        for path in &options.sockets {
            let name = watch::name_of(path);
            if given.insert(name.clone(), path.clone()).is_some_and(|other| other != *path) {
                return Err(GuestsError::SameName(name));
            }
        }
        let watch = options.directory.as_deref().map(|path| {
            DirectoryWatch::new(path).map_err(|source| GuestsError::Watch { path: path.to_owned(), source })
        });
        Ok(Self {
            given,
            watch: watch.transpose()?,
            dry_run: options.dry_run,
            config,
            epoch,
            pollers: BTreeMap::new(),
            complained: false,
            shadowed: BTreeSet::new(),
        })
    }

    /// Changes what is wanted of the guests.
    pub fn configure(&mut self, config: Arc<Config>) {
        self.config = config;
        for (name, poller) in &self.pollers {
            poller.set_hands_off(self.dry_run || self.config.guest(name).ignore);
        }
    }

    /// Readable when sockets have come or gone, until [`scan`](Self::scan).
    pub fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(AsFd::as_fd)
    }

    /// Looks which balloons there are.
    pub fn scan(&mut self) -> Vec<What> {
        let mut found = BTreeMap::new();
        if let Some(watch) = &self.watch {
            match watch.take_changes().and_then(|()| watch.sockets()) {
                Ok(sockets) => {
                    found = sockets;
                    self.complained &= self.pollers.len() == MAX_GUESTS;
                }
                Err(error) => {
                    if !self.complained {
                        error!("Directory {} cannot be read: {error}", watch.path().display());
                    }
                    self.complained = true;
                    // It may come back, and the guests have not gone because of that.
                    found = self
                        .pollers
                        .iter()
                        .map(|(name, poller)| (name.clone(), poller.path().to_owned()))
                        .collect();
                }
            }
        }
        for (name, path) in &self.given {
            if let Some(other) = found.insert(name.clone(), path.clone()).filter(|other| other != path)
                && self.shadowed.insert(other.clone())
            {
                warn!(
                    "{} is not managed: a guest called {name} was given by --socket {}, rename one of the sockets",
                    other.display(),
                    path.display()
                );
            }
        }
        let mut events = Vec::new();
        self.pollers.retain(|name, poller| {
            let stays = found.get(name).is_some_and(|path| path == poller.path());
            if !stays {
                events.push(What::GuestVanished { guest: name.clone() });
            }
            stays
        });
        for (name, path) in found {
            if self.pollers.contains_key(&name) {
                continue;
            }
            if self.pollers.len() == MAX_GUESTS {
                if !self.complained {
                    warn!("{} and others are not managed: there are {MAX_GUESTS} guests", path.display());
                }
                self.complained = true;
                break;
            }
            let hands_off = self.dry_run || self.config.guest(&name).ignore;
            match Poller::start(&name, &path, hands_off, self.epoch) {
                Ok(poller) => {
                    let socket = path.display().to_string();
                    events.push(What::GuestAppeared { guest: name.clone(), socket });
                    self.pollers.insert(name, poller);
                }
                Err(error) => {
                    warn!("Guest {name} is not managed, for want of a thread (ulimit -u): {error}");
                    break;
                }
            }
        }
        events
    }

    /// Asks all balloons, and waits for their answers: for no longer than `patience`, and not for those that did not
    /// answer the last time.
    pub fn poll(&mut self, patience: Duration) -> Vec<What> {
        let awaited: Vec<&Poller> = self.pollers.values().filter(|poller| poller.ask()).collect();
        let deadline = Instant::now() + patience;
        for poller in awaited {
            poller.wait(deadline);
        }
        self.pollers.values().flat_map(Poller::take_events).collect()
    }

    /// The guests as a policy sees them `now`, sorted by name, without those that are to be ignored.
    ///
    /// To be called once for each snapshot: events such as killed processes are told of once.
    pub fn snapshot(&self, now: f64) -> Vec<Guest> {
        let stale = self.config.policy.stale_seconds;
        self.pollers
            .iter()
            .map(|(name, poller)| (name, poller, self.config.guest(name)))
            .filter(|(_, _, settings)| !settings.ignore)
            .map(|(name, poller, settings)| poller.with_view(|view| view.guest(now, name, &settings, stale)))
            .collect()
    }

    /// Begins to ask a balloon for another size, in bytes, unless there is a newer wish before it could be sent. Nothing
    /// happens to guests that are to be ignored, and in a dry run.
    pub fn send(&self, name: &str, balloon_bytes: u64) {
        if let Some(poller) = self.pollers.get(name) {
            poller.send(balloon_bytes);
        }
    }

    /// Gives all guests all of their memory back, and waits for at most `patience` until their balloons know.
    pub fn release(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        self.pollers.values().for_each(|poller| poller.send(0));
        self.pollers.values().for_each(|poller| poller.wait(deadline));
    }

    /// What is known of all guests, the ignored ones too; `shown` are the guests of the latest snapshot.
    pub fn status(&self, now: f64, shown: &[Guest]) -> Vec<GuestStatus> {
        let stale = self.config.policy.stale_seconds;
        self.pollers
            .iter()
            .map(|(name, poller)| {
                let settings = self.config.guest(name);
                let guest = match shown.iter().find(|guest| guest.name == *name) {
                    Some(guest) => guest.clone(),
                    None => poller.with_view(|view| view.guest(now, name, &settings, stale)),
                };
                GuestStatus {
                    socket: poller.path().display().to_string(),
                    guest,
                    wish_bytes: None,
                    decided_bytes: None,
                    ignored: settings.ignore,
                    oom_kills: poller.with_view(|view| view.oom_kills_in_all()),
                    failure: poller.failure(),
                }
            })
            .collect()
    }

    /// Where the control socket of a guest is.
    pub fn socket(&self, name: &str) -> Option<&Path> {
        self.pollers.get(name).map(Poller::path)
    }
}

#[cfg(test)]
pub(super) mod tests;
