//! A socket on which a daemon is asked and told things while it serves: HTTP/1.1 with JSON, and metrics.
//!
//! | module | holds |
//! |---|---|
//! | `server` | [`Server`]: one thread, which serves all clients and waits for none |
//! | `connection` | one client: what it sends, what it still has to be sent |
//! | `http` | [`Request`], [`Response`], and how they look on the wire |
//! | `feed` | [`Bell`], [`Feed`]: how other threads reach the server, without ever waiting for it |
//! | [`client`] | the other end: [`Client`] |
//! | [`metrics`] | pages that Prometheus reads |
//!
//! # How to use it
//!
//! Requests are answered by a [`Handler`], on the server's thread, so it must not block. What takes time is a
//! [`Reply::Later`], which is asked again each time somebody rings the server's [`Bell`].
//!
//! ```
//! use std::sync::Arc;
//! use vhost_user_daemon::control::{Bell, Client, Endpoint, Handler, Method, Reply, Request, Response, Server};
//! use vhost_user_daemon::socket::Socket;
//!
//! struct Health;
//!
//! impl Handler for Health {
//!     fn handle(&self, request: &Request) -> Reply {
//!         Reply::Now(match (request.method, &*request.path) {
//!             (Method::Get, "/healthz") => Response::json(&"well"),
//!             _ => Response::not_found(request),
//!         })
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("control");
//! let socket = Socket::open_private(&path)?; // before the sandbox closes, and it is given to the sandbox
//! let bell = Bell::new()?;
//! let server = Server::start(&bell, vec![Endpoint::socket(socket, Arc::new(Health))])?; // inside the sandbox
//! let health: String = Client::new(&path).get("/healthz")?;
//! # assert_eq!(health, "well");
//! # Ok(()) }
//! ```
//!
//! # Who may connect
//!
//! The socket's mode is 0600, and who connects is asked for nevertheless (SO_PEERCRED): only the user who runs the
//! daemon and root may. In the [sandbox](crate::sandbox) of a user namespace all other users look alike, root among
//! them, and the mode alone keeps them out. A TCP endpoint is open to everybody who reaches it.

pub mod client;
mod connection;
mod feed;
mod http;
pub mod metrics;
mod server;

use std::fmt;
use std::time::Instant;

pub use self::client::{Client, ClientError};
pub use self::feed::{Bell, Feed, KEPT_EVENTS, Subscription};
pub use self::http::{MAX_BODY, MAX_HEAD, Method, Request, Response};
pub use self::server::{ControlError, Endpoint, MAX_CLIENTS, Server};

/// Answers requests.
pub trait Handler: Send + Sync {
    /// Answers `request`. It is called on the thread that serves all clients, and must not wait for anything.
    fn handle(&self, request: &Request) -> Reply;
}

/// What becomes of a request.
pub enum Reply {
    /// It is answered.
    Now(Response),

    /// It is answered once something has happened elsewhere. Other clients are served meanwhile.
    Later {
        /// When the waiting ends.
        deadline: Instant,
        /// Asked at once, each time the [`Bell`] was rung, and finally with `true` when `deadline` has passed: then
        /// `None` is answered as 504. Dropped unanswered when the client leaves.
        ready: Box<dyn FnMut(bool) -> Option<Response> + Send>,
    },

    /// It is answered by the events of a feed, for as long as the client wants.
    Stream(Subscription),
}

impl From<Response> for Reply {
    fn from(response: Response) -> Self {
        Self::Now(response)
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now(response) => f.debug_tuple("Now").field(response).finish(),
            Self::Later { deadline, .. } => {
                f.debug_struct("Later").field("deadline", deadline).finish_non_exhaustive()
            }
            Self::Stream(subscription) => f.debug_tuple("Stream").field(subscription).finish(),
        }
    }
}
