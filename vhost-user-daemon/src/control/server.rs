//! The thread that serves all clients.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::error;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, UCred,
    accept_with, send, sendmsg, socketpair,
};
use rustix::process::{Gid, Uid, getegid, geteuid, getpid};
use thiserror::Error;

use super::connection::{Connection, Next};
use super::{Bell, Handler, Response};
use crate::socket::{Listener, Socket};
use crate::{error_limited, warn_limited};

/// How many clients an endpoint has at the same time. One more replaces a client that is between two requests, or is
/// refused.
pub const MAX_CLIENTS: usize = 8;

/// How long nobody is accepted after the process was out of file descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// The user that stands for all who have no number in a user namespace (/proc/sys/kernel/overflowuid).
const OVERFLOW_UID: u32 = 65534;

/// Why a control socket cannot be served.
#[derive(Debug, Error)]
pub enum ControlError {
    /// It was connected, or is to be connected to.
    #[error("The control socket does not listen: give it a path of its own")]
    NotListening,
    /// The thread cannot be started.
    #[error("The control socket cannot be served: raise the limits of the process (ulimit -n, -u)")]
    Start(#[source] io::Error),
}

/// Where clients come from, and who answers them.
pub struct Endpoint {
    door: Door,
    handler: Arc<dyn Handler>,
}

impl Endpoint {
    /// A UNIX socket, for the user who runs the daemon and for root: what [`Socket::open_private`] opened. The socket is
    /// removed with the server.
    pub fn socket(socket: Socket, handler: Arc<dyn Handler>) -> Self {
        Self { door: Door::Socket(socket), handler }
    }

    /// A TCP port, for everybody who reaches it: for what is no secret, such as [metrics](super::metrics).
    pub fn tcp(listener: TcpListener, handler: Arc<dyn Handler>) -> Self {
        Self { door: Door::Tcp(listener), handler }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("door", &self.door).finish_non_exhaustive()
    }
}

/// What clients connect to.
#[derive(Debug)]
enum Door {
    Socket(Socket),
    Tcp(TcpListener),
}

/// A thread that serves clients. Dropping it ends the thread, closes all connections, and removes the sockets.
#[derive(Debug)]
pub struct Server {
    bell: Bell,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to serve. `bell` is what other threads ring to reach this server; no other server has it.
    pub fn start(bell: &Bell, endpoints: Vec<Endpoint>) -> Result<Self, ControlError> {
        let failed = |error: Errno| ControlError::Start(error.into());
        let access = Access::new();
        let mut entrances = Vec::new();
        for Endpoint { door, handler } in endpoints {
            let entrance = match door {
                Door::Socket(socket) => {
                    let name = socket.to_string();
                    let Socket::Listening(listener) = socket else { return Err(ControlError::NotListening) };
                    Entrance::new(Gate::Guarded { listener, name, access }, handler)
                }
                Door::Tcp(listener) => Entrance::new(Gate::Open(listener), handler),
            };
            ioctl_fionbio(entrance.gate.as_fd(), true).map_err(failed)?;
            entrances.push(entrance);
        }
        let stopping = Arc::new(AtomicBool::new(false));
        let thread = {
            let (bell, stopping) = (bell.clone(), Arc::clone(&stopping));
            thread::Builder::new()
                .name("control".into())
                .spawn(move || serve(&bell, &stopping, entrances))
                .map_err(ControlError::Start)?
        };
        Ok(Self { bell: bell.clone(), stopping, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported where it happened.
            let _ = thread.join();
        }
    }
}

/// Who may use a socket.
#[derive(Clone, Copy, Debug)]
struct Access {
    owner: u32,
    /// Root has no number here, and looks like every other user but the owner. The socket's mode has kept those out.
    root_is_hidden: bool,
}

impl Access {
    fn new() -> Self {
        Self { owner: geteuid().as_raw(), root_is_hidden: root_is_hidden() }
    }

    fn allows(self, uid: u32) -> bool {
        uid == self.owner || uid == 0 || self.root_is_hidden && uid == OVERFLOW_UID
    }
}

/// Whether this is a user namespace in which root has no number.
///
/// There is no /proc in a sandbox that could tell. A message "from root" is sent to nobody: it is refused with EINVAL
/// if there is no root, and with EPERM, or not at all, if there is.
fn root_is_hidden() -> bool {
    let refusal = || {
        let (ours, _theirs) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let root = UCred { pid: getpid(), uid: Uid::ROOT, gid: Gid::from_raw(getegid().as_raw()) };
        control.push(SendAncillaryMessage::ScmCredentials(root));
        sendmsg(&ours, &[io::IoSlice::new(&[0])], &mut control, SendFlags::DONTWAIT)
    };
    refusal() == Err(Errno::INVAL)
}

/// A listening socket, and who may pass.
enum Gate {
    Guarded { listener: Listener, name: String, access: Access },
    Open(TcpListener),
}

impl Gate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Guarded { listener, .. } => listener.as_fd(),
            Self::Open(listener) => listener.as_fd(),
        }
    }

    /// The next client; `None` if it may not pass.
    fn accept(&self) -> Result<Option<OwnedFd>, Errno> {
        let client = accept_with(self.as_fd(), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        if let Self::Guarded { name, access, .. } = self {
            // Not by rustix, whose process numbers are never 0, as one of another PID namespace is.
            let peer = getsockopt(&client, PeerCredentials)
                .map_err(|error| Errno::from_raw_os_error(error as i32))?;
            if !access.allows(peer.uid()) {
                warn_limited!(
                    "Refused process {} of user {} on control {name}: only user {} and root may use it",
                    peer.pid(),
                    peer.uid(),
                    access.owner
                );
                return Ok(None);
            }
        }
        Ok(Some(client))
    }
}

/// An endpoint with its clients.
struct Entrance {
    gate: Gate,
    handler: Arc<dyn Handler>,
    clients: Vec<Connection>,
    /// Nobody is accepted before.
    resting_until: Option<Instant>,
}

impl Entrance {
    fn new(gate: Gate, handler: Arc<dyn Handler>) -> Self {
        Self { gate, handler, clients: Vec::new(), resting_until: None }
    }

    /// Lets one client in.
    fn accept(&mut self, now: Instant) {
        match self.gate.accept() {
            Ok(Some(client)) if self.make_room() => self.clients.push(Connection::new(client, now)),
            Ok(Some(client)) => {
                let mut answer = Vec::new();
                let message =
                    format!("{MAX_CLIENTS} clients are being served: try again later, or end one of them");
                Response::fault(503, &message).write(&mut answer, false, false);
                // If it does not fit into the socket, the client learns as much from the end of the connection.
                let _ = send(&client, &answer, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            }
            Ok(None) | Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                error_limited!("A client of the control socket cannot be accepted: {error}");
                self.resting_until = Some(now + ACCEPT_RETRY);
            }
        }
    }

    /// Sees to it that there is room for a client, if need be by sending away the one that has been idle longest.
    fn make_room(&mut self) -> bool {
        if self.clients.len() < MAX_CLIENTS {
            return true;
        }
        let idle =
            self.clients.iter().enumerate().filter_map(|(index, client)| Some((client.idle_since()?, index)));
        match idle.min() {
            Some((_, index)) => {
                self.clients.swap_remove(index);
                true
            }
            None => false,
        }
    }
}

/// Serves until it has to stop.
fn serve(bell: &Bell, stopping: &AtomicBool, mut entrances: Vec<Entrance>) {
    // The first look at everything needs no reason.
    let mut again = true;
    while !stopping.load(Ordering::Acquire) {
        let mut now = Instant::now();
        for entrance in &mut entrances {
            entrance.resting_until = entrance.resting_until.filter(|until| *until > now);
        }
        let deadlines = entrances.iter().flat_map(|entrance| {
            entrance.clients.iter().filter_map(Connection::deadline).chain(entrance.resting_until)
        });
        let timeout = if again { Some(now) } else { deadlines.min() }
            .map(|at| timespec(at.saturating_duration_since(now)));
        // The bell, and for each entrance itself and its clients.
        let mut fds = vec![PollFd::from_borrowed_fd(bell.as_fd(), PollFlags::IN)];
        for entrance in &entrances {
            let wanted = if entrance.resting_until.is_none() { PollFlags::IN } else { PollFlags::empty() };
            fds.push(PollFd::from_borrowed_fd(entrance.gate.as_fd(), wanted));
            fds.extend(
                entrance
                    .clients
                    .iter()
                    .map(|client| PollFd::from_borrowed_fd(client.fd(), client.interest())),
            );
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                // Out of memory.
                error!("Waiting for clients of the control socket failed: {error}");
                thread::sleep(ACCEPT_RETRY);
            }
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        let mut ready = ready.into_iter();
        if ready.next().is_some_and(|flags| !flags.is_empty()) {
            bell.hush();
        }
        now = Instant::now();
        again = false;
        for entrance in &mut entrances {
            let arrival = ready.next().is_some_and(|flags| flags.contains(PollFlags::IN));
            let handler = &entrance.handler;
            entrance.clients.retain_mut(|client| {
                let flags = ready.next().unwrap_or(PollFlags::empty());
                let next = client.advance(&**handler, flags, now);
                again |= next == Next::Again;
                next != Next::Drop
            });
            if arrival {
                entrance.accept(now);
            }
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
