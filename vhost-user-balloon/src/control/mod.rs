//! The control socket of a balloon: what [`api`](crate::api) says, over HTTP.
//!
//! | module | holds |
//! |---|---|
//! | `routes` | the requests, and what is wrong with them |
//! | `firecracker` | those of them that Firecracker has too |
//! | [`metrics`] | a balloon, or many, as Prometheus reads them |
//!
//! ```no_run
//! use std::sync::Arc;
//! use vhost_user_balloon::control::{self, Announcer, Controlled};
//! use vhost_user_daemon::control::Bell;
//! use vhost_user_daemon::socket::Socket;
//!
//! # fn run(balloon: fn(Announcer) -> Arc<dyn Controlled>) -> anyhow::Result<()> {
//! let socket = Socket::open_private("/run/vm1.control".as_ref())?;
//! let bell = Bell::new()?;
//! let feed = control::feed(&bell);
//! let balloon = balloon(Announcer::new(&bell, &feed));
//! let server = control::serve(&bell, feed, socket, balloon)?;
//! # Ok(()) }
//! ```

mod firecracker;
pub mod metrics;
mod routes;

use std::sync::Arc;

use vhost_user_daemon::control::{Bell, ControlError, Endpoint, Feed, Server};
use vhost_user_daemon::socket::Socket;

pub use self::routes::Routes;
use crate::api::{Event, Statistics, Status, Target, What};
use crate::device::{Balloon, Observer, TargetError};

/// A balloon, as the control socket sees it. Nothing here blocks.
pub trait Controlled: Send + Sync + 'static {
    /// Everything about it.
    fn status(&self) -> Status;

    /// Asks for another size.
    fn set_target(&self, target: Target) -> Result<(), TargetError>;

    /// What the guest said at last; `None` if it has said nothing.
    fn statistics(&self) -> Option<Statistics>;

    /// Asks the guest for statistics, and gives the number of this request; `None` if the guest has none to give. When
    /// they come, [`Announcer::statistics_came`] is called.
    fn ask_statistics(&self) -> Option<u64>;

    /// The answer to a request, or to a later one.
    fn statistics_after(&self, request: u64) -> Option<Statistics>;

    /// Asks for statistics this often from now on, in seconds; 0: only on demand.
    fn set_statistics_interval(&self, seconds: u64);

    /// What it offers to the guest.
    fn offered(&self) -> Offered;
}

/// What a balloon offers to a guest for as long as the daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// The guest takes memory back when it is short of it.
    pub deflate_on_oom: bool,
    /// The guest reports free pages.
    pub free_page_reporting: bool,
}

impl Controlled for Balloon {
    fn status(&self) -> Status {
        self.status()
    }

    fn set_target(&self, target: Target) -> Result<(), TargetError> {
        self.set_target(target)
    }

    fn statistics(&self) -> Option<Statistics> {
        self.statistics()
    }

    fn ask_statistics(&self) -> Option<u64> {
        self.ask_statistics()
    }

    fn statistics_after(&self, request: u64) -> Option<Statistics> {
        self.statistics_after(request)
    }

    fn set_statistics_interval(&self, seconds: u64) {
        self.set_statistics_interval(seconds);
    }

    fn offered(&self) -> Offered {
        let options = self.options();
        Offered { deflate_on_oom: options.deflate_on_oom, free_page_reporting: options.reporting }
    }
}

/// A feed of a balloon's events.
pub fn feed(bell: &Bell) -> Feed {
    Feed::new(bell, |events| {
        // Two numbers and a word: nothing that could not be written.
        serde_json::to_string(&Event::now(What::Lost { events })).unwrap_or_default()
    })
}

/// Tells those who listen on the control socket what happens to a balloon.
#[derive(Clone, Debug)]
pub struct Announcer {
    bell: Bell,
    feed: Feed,
}

impl Announcer {
    /// Tells the clients of the server that `bell` and `feed` belong to.
    pub fn new(bell: &Bell, feed: &Feed) -> Self {
        Self { bell: bell.clone(), feed: feed.clone() }
    }
}

impl Observer for Announcer {
    fn happened(&self, what: What) {
        self.feed.publish(&Event::now(what));
    }

    fn statistics_came(&self) {
        self.bell.ring();
    }
}

/// Serves a balloon's control socket until what it returns is dropped.
pub fn serve(
    bell: &Bell,
    feed: Feed,
    socket: Socket,
    balloon: Arc<dyn Controlled>,
) -> Result<Server, ControlError> {
    Server::start(bell, vec![Endpoint::socket(socket, Arc::new(Routes::new(balloon, feed)))])
}
