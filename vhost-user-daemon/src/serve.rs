//! The life of a daemon: accept a front end, serve it, listen again, and end in order on SIGTERM or SIGINT.
//!
//! Each socket has a thread that waits for front ends and serves them one after the other. The thread that called
//! waits for signals, and for the others to end.

mod arrivals;
mod notify;
mod signals;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::{error, info};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;

use self::arrivals::Arrivals;
pub(crate) use self::notify::connect as connect_to_service_manager;
pub use self::signals::hold_signals;
use self::signals::{Signals, wait};
use crate::backend::Backend;
use crate::cli::chain;
use crate::device::Device;
use crate::dirty::DirtyLog;
use crate::link::{self, ConfigNotifier, Link, LinkParts};
use crate::memory;
use crate::ring::SharedInflight;
use crate::socket::Socket;
use crate::sys;
use crate::{info_limited, warn_limited};

/// How long requests in flight may take to finish after SIGTERM.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a daemon cannot go on.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Signals cannot be received.
    #[error("Signal handlers cannot be installed")]
    Signals(#[source] io::Error),
    /// Waiting for the socket or a signal failed.
    #[error("Waiting for a front end failed")]
    Wait(#[source] io::Error),
    /// There are not enough threads, files or memory for a connection. What the stock crates had begun stays, so there
    /// is no going on.
    #[error(
        "A connection cannot be served: raise the limits of the process (ulimit -n, -u), or offer fewer queues"
    )]
    Connection(#[source] io::Error),
}

/// What [`serve`] does beside serving.
#[derive(Clone, Default)]
pub struct ServeOptions {
    /// End when the front end leaves, instead of waiting for the next one.
    ///
    /// With several sockets: end when each of them has had a front end, and none has one any more. Until then a front
    /// end may come back.
    pub exit_on_disconnect: bool,

    /// Called on SIGUSR1, on the thread that called [`serve`]: logs the counters of the device, say. Several signals
    /// may be one call, and once the daemon has to end there are no more calls. Without it the signal is ignored.
    pub on_report: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for ServeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServeOptions")
            .field("exit_on_disconnect", &self.exit_on_disconnect)
            .field("on_report", &self.on_report.is_some())
            .finish()
    }
}

/// A device and where its front end is met: one of several for [`serve_all`].
pub struct Served<'a, D: Device> {
    /// The device.
    pub device: &'a Arc<D>,
    /// The device's way to the front end of the moment. Each device has its own.
    pub notifier: &'a ConfigNotifier,
    /// The socket.
    pub socket: &'a Socket,
}

/// Serves `device` on `socket` until SIGTERM or SIGINT, or until the front end leaves where nobody else can come.
///
/// Front ends are served one at a time; another one waits in the socket's queue. `notifier` is the device's way to
/// the front end of the moment.
///
/// On a signal nothing more is popped, and what is in flight is completed. Should that take longer than
/// [`DRAIN_TIMEOUT`], the process ends with exit code 1.
pub fn serve<D: Device>(
    device: &Arc<D>,
    notifier: &ConfigNotifier,
    socket: &Socket,
    options: &ServeOptions,
) -> Result<(), ServeError> {
    serve_all(&[Served { device, notifier, socket }], options)
}

/// Serves several devices at once, each on a socket of its own, as [`serve`] does one.
///
/// A front end that comes or goes does not disturb the others. On a signal all devices end, within the same
/// [`DRAIN_TIMEOUT`]. An error of one of them is an error of the process: the others end in the same way, and then it
/// is returned. Without a signal and an error this returns when nobody else can come to any socket.
pub fn serve_all<D: Device>(served: &[Served<'_, D>], options: &ServeOptions) -> Result<(), ServeError> {
    raise_file_limit();
    let signals = Signals::install().map_err(ServeError::Signals)?;
    let presence = Presence::new(served.len());
    let (running, guard) = UnixStream::pair().map_err(ServeError::Wait)?;
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, served) in served.iter().enumerate() {
            let thread = guard.try_clone().and_then(|guard| {
                let (signals, presence) = (&signals, &presence);
                thread::Builder::new().name(format!("socket{index}")).spawn_scoped(scope, move || {
                    let _guard = guard;
                    let place = Place { index, presence, signals, options };
                    let result = serve_socket(served, &place);
                    if let Err(error) = &result {
                        error!("Error on {}: {}", served.socket, chain(error));
                        signals.end();
                    }
                    result
                })
            });
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    // The scope waits for those that were started.
                    signals.end();
                    return Err(ServeError::Connection(error));
                }
            }
        }
        drop(guard);
        notify::send("READY=1");
        let supervised = supervise(&signals, running.as_fd(), options);
        if supervised.is_err() {
            signals.end();
        }
        let results = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        // All are waited for, and the first error is returned.
        results.fold(Ok(()), Result::and).and(supervised.map_err(ServeError::Wait))
    })
}

/// Answers signals until the process has to end, or `running` is closed by the last of the threads that serve.
fn supervise(signals: &Signals, running: BorrowedFd<'_>, options: &ServeOptions) -> io::Result<()> {
    loop {
        match wait(&[signals.ending(), running, signals.report()], None)? {
            Some(0) => {
                info!("Ending: completing what is in flight");
                notify::send("STOPPING=1");
                return Ok(());
            }
            Some(1) => return Ok(()),
            _ => {
                signals.take_report();
                if let Some(report) = &options.on_report {
                    report();
                }
            }
        }
    }
}

/// Which sockets have a front end.
struct Presence(Mutex<Vec<Attendance>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attendance {
    Expected,
    Present,
    Gone,
}

impl Presence {
    fn new(sockets: usize) -> Self {
        Self(Mutex::new(vec![Attendance::Expected; sockets]))
    }

    /// Notes what is known of socket `index`, and says whether all are gone.
    fn set(&self, index: usize, attendance: Attendance) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all[index] = attendance;
        all.iter().all(|attendance| *attendance == Attendance::Gone)
    }
}

/// One socket's place among all.
struct Place<'a> {
    index: usize,
    presence: &'a Presence,
    signals: &'a Signals,
    options: &'a ServeOptions,
}

/// Serves the front ends of one socket, one after the other.
fn serve_socket<D: Device>(served: &Served<'_, D>, place: &Place<'_>) -> Result<(), ServeError> {
    let mut arrivals = Arrivals::new(served.socket, place.signals);
    while let Some(stream) = arrivals.next()? {
        place.presence.set(place.index, Attendance::Present);
        let connection =
            Connection::start(served.device, served.notifier, stream).map_err(ServeError::Connection)?;
        info_limited!("Connected with a front end on {}", served.socket);
        wait_for_end(&connection, place.signals, arrivals.queue()).map_err(ServeError::Wait)?;
        connection.close(served.socket);
        if place.presence.set(place.index, Attendance::Gone) && place.options.exit_on_disconnect {
            place.signals.stop();
        }
    }
    Ok(())
}

/// Waits until the front end leaves or the daemon has to end. Others that come to `queue` meanwhile wait there.
fn wait_for_end<D: Device>(
    connection: &Connection<D>,
    signals: &Signals,
    queue: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut fds = vec![signals.stopped(), connection.ended.as_fd()];
    fds.extend(queue);
    while wait(&fds, None)? == Some(2) {
        info_limited!("Another front end waits until this one leaves");
        fds.pop();
    }
    Ok(())
}

/// Lets the process open as many files as it may: each connection takes about six for a queue.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // The old limit does for most, and what does not fit fails with an error of its own.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// A front end and all that serves it: the link's thread, the stock daemon's thread, and one thread for each queue.
struct Connection<D: Device> {
    front: UnixStream,
    link: JoinHandle<io::Result<()>>,
    /// Closed by the link's thread when it ends.
    ended: UnixStream,
    daemon: VhostUserDaemon<Arc<Backend<D>>>,
    backend: Arc<Backend<D>>,
}

impl<D: Device> Connection<D> {
    fn start(device: &Arc<D>, notifier: &ConfigNotifier, front: UnixStream) -> io::Result<Self> {
        front.set_nonblocking(false)?;
        let memory = memory::empty();
        let log = Arc::new(DirtyLog::default());
        let inflight = SharedInflight::default();
        let (listener, inner) = link::pair()?;
        let (ended, ending) = UnixStream::pair()?;
        let backend = Arc::new(Backend::new(
            Arc::clone(device),
            memory.clone(),
            Arc::clone(&log),
            Arc::clone(&inflight),
        )?);
        let (nudging, disabling) = (Arc::clone(&backend), Arc::clone(&backend));
        let link = Link::new(LinkParts {
            front: front.try_clone()?,
            inner,
            device: Arc::clone(device),
            log,
            inflight,
            notifier: notifier.clone(),
            nudge: Box::new(move |queue| nudging.nudge(queue)),
            disable: Box::new(move |queue| disabling.disable(queue)),
        });

        let mut daemon = VhostUserDaemon::new("vhost-user".into(), Arc::clone(&backend), memory)
            .map_err(|error| io_error(&error))?;
        let started = daemon.start(&mut Listener::from(listener)).map_err(|error| io_error(&error));
        let watched = started.and_then(|()| backend.watch(&daemon));
        let link = watched.and_then(|()| {
            thread::Builder::new().name("link".into()).spawn(move || {
                let _ending = ending;
                link.run()
            })
        });
        match link {
            Ok(link) => Ok(Self { front, link, ended, daemon, backend }),
            Err(error) => {
                drop(daemon);
                sys::close_forgotten(backend.take_exit_events());
                Err(error)
            }
        }
    }

    /// Completes what is in flight, and ends all threads of the connection.
    fn close(mut self, socket: &Socket) {
        self.backend.stop();
        // Fails when the front end was first.
        let _ = self.front.shutdown(std::net::Shutdown::Both);
        match self.link.join() {
            Ok(Ok(())) => info_limited!("The front end on {socket} has left"),
            Ok(Err(error)) => warn_limited!("The connection to the front end on {socket} has ended: {error}"),
            Err(_) => error!("The connection to the front end on {socket} has ended by a bug"),
        }
        // The link closed the private socket, which ends the daemon's thread. Its error says just that.
        let _ = self.daemon.wait();
        drop(self.daemon);
        sys::close_forgotten(self.backend.take_exit_events());
        self.backend.forget();
    }
}

/// The crate's error as an I/O error.
fn io_error(error: &vhost_user_backend::Error) -> io::Error {
    io::Error::other(error.to_string())
}
