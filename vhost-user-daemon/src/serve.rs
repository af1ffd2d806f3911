//! The life of a daemon: accept a front end, serve it, listen again, and end in order on SIGTERM or SIGINT.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::{error, info, warn};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;

use crate::backend::Backend;
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

/// How long to wait before accepting again when the process is out of file descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

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
        "A connection cannot be served: raise the limits of the process (ulimit -n, -u), or lower --num-queues"
    )]
    Connection(#[source] io::Error),
}

/// How [`serve`] goes on after a connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServeOptions {
    /// End when the front end leaves, instead of listening again.
    pub exit_on_disconnect: bool,
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
    options: ServeOptions,
) -> Result<(), ServeError> {
    raise_file_limit();
    let signals = Signals::install().map_err(ServeError::Signals)?;
    notify_supervisor(NotifyState::Ready);
    let serve_one = |stream: UnixStream, queue: Option<&UnixListener>| {
        let connection = Connection::start(device, notifier, stream).map_err(ServeError::Connection)?;
        serve_connection(connection, &signals, queue).map_err(ServeError::Wait)
    };
    match socket {
        Socket::Connected(stream) => {
            serve_one(stream.try_clone().map_err(ServeError::Connection)?, None)?;
            Ok(())
        }
        Socket::Listening(listener) => loop {
            if wait(&[signals.as_fd(), listener.as_fd()]).map_err(ServeError::Wait)? == 0 {
                return Ok(());
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    if serve_one(stream, Some(listener))? == Ended::Signal || options.exit_on_disconnect {
                        return Ok(());
                    }
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    error!("A front end cannot be accepted: {error}");
                    thread::sleep(ACCEPT_RETRY);
                }
            }
        },
    }
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Disconnect,
    Signal,
}

/// Serves one front end; others that come to `queue` meanwhile wait there.
fn serve_connection<D: Device>(
    connection: Connection<D>,
    signals: &Signals,
    queue: Option<&UnixListener>,
) -> io::Result<Ended> {
    info_limited!("A front end has connected");
    let mut fds = vec![signals.as_fd(), connection.ended.as_fd()];
    fds.extend(queue.map(AsFd::as_fd));
    let ended = loop {
        match wait(&fds)? {
            0 => break Ended::Signal,
            1 => break Ended::Disconnect,
            _ => {
                info_limited!("Another front end waits until this one leaves");
                fds.pop();
            }
        }
    };
    if ended == Ended::Signal {
        info!("Asked to end: completing what is in flight");
        notify_supervisor(NotifyState::Stopping);
    }
    connection.close();
    Ok(ended)
}

/// Lets the process open as many files as it may: each connection takes about six for a queue.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // The old limit does for most, and what does not fit fails with an error of its own.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn notify_supervisor(state: NotifyState<'_>) {
    // Without a supervisor that listens this does nothing.
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!("The service manager cannot be notified: {error}");
    }
}

/// SIGTERM and SIGINT as a file descriptor that becomes readable, and stays so.
struct Signals(UnixStream);

impl Signals {
    /// Catches the signals, and starts the thread that ends the process if it has not ended some time after: no matter
    /// which other thread hangs, and in what.
    fn install() -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
        }
        let watched = receiver.try_clone()?;
        thread::Builder::new().name("watchdog".into()).spawn(move || {
            if wait(&[watched.as_fd()]).is_ok() {
                thread::sleep(DRAIN_TIMEOUT);
                error!("Requests in flight did not finish within {} seconds", DRAIN_TIMEOUT.as_secs());
                std::process::exit(1);
            }
        })?;
        Ok(Self(receiver))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of `fds` is readable or closed, and gives the place of the first that is.
fn wait(fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        match poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {
                if let Some(first) = polled.iter().position(|fd| !fd.revents().is_empty()) {
                    return Ok(first);
                }
            }
        }
    }
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
        let stopping = Arc::clone(&backend);
        let link = Link::new(LinkParts {
            front: front.try_clone()?,
            inner,
            device: Arc::clone(device),
            log,
            inflight,
            notifier: notifier.clone(),
            nudge: Box::new(move |queue| stopping.nudge(queue)),
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
    fn close(mut self) {
        self.backend.stop();
        // Fails when the front end was first.
        let _ = self.front.shutdown(std::net::Shutdown::Both);
        match self.link.join() {
            Ok(Ok(())) => info_limited!("The front end has left"),
            Ok(Err(error)) => warn_limited!("The connection to the front end has ended: {error}"),
            Err(_) => error!("The connection to the front end has ended by a bug"),
        }
        // The link closed the private socket, which ends the daemon's thread. Its error says just that.
        let _ = self.daemon.wait();
        drop(self.daemon);
        sys::close_forgotten(self.backend.take_exit_events());
    }
}

/// The crate's error as an I/O error.
fn io_error(error: &vhost_user_backend::Error) -> io::Error {
    io::Error::other(error.to_string())
}
