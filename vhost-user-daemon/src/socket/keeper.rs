//! A process that stays outside of the sandbox, and does for the daemon's sockets what takes their paths: it connects
//! to a front end that listens, and removes the daemon's own socket in the end.
//!
//! The daemon itself must not be able to: a descriptor of the socket's directory, of `/run` for example, would be a
//! way out of any namespace, and open to all that the daemon's user may do there. Besides, the daemon has given up the
//! capabilities that it may take to remove a file there.
//!
//! It obeys two requests, each of one byte, and knows from before which paths they are about. It waits without using
//! any CPU, and ends with the daemon, whatever becomes of that: signals are for the daemon alone. If the daemon is
//! killed, it leaves everything as it is. By then the lock is free, and the socket's place may be another daemon's.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};

use super::Socket;

/// Remove the socket and its lock file. Answered when it is done.
const REMOVE: u8 = b'r';
/// Connect. Answered with an error number, and the connection if that is 0.
const CONNECT: u8 = b'c';

/// The daemon's end of the way to the keeper, for one socket.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Has the files of the socket removed, before the daemon lets go of its lock.
    pub fn remove(&self) {
        let answer = send(&self.0, &[REMOVE], SendFlags::NOSIGNAL)
            .and_then(|_| recv(&self.0, &mut [0; 1], RecvFlags::empty()));
        if !matches!(answer, Ok((1, _))) {
            log::warn!(
                "The socket and its lock file cannot be removed: the process that would do it was killed"
            );
        }
    }

    /// Has a connection made.
    pub fn connect(&self) -> Result<OwnedFd, Errno> {
        send(&self.0, &[CONNECT], SendFlags::NOSIGNAL)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut answer = [0; size_of::<i32>()];
        let received =
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut answer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if received.bytes != answer.len() {
            return Err(Errno::PIPE);
        }
        let connection = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match i32::from_le_bytes(answer) {
            0 => connection.ok_or(Errno::PROTO),
            error => Err(Errno::from_raw_os_error(error)),
        }
    }
}

/// The keeper's side: its ends of the links, and the sockets as they were before.
pub(crate) struct Keeper<'a> {
    kept: Vec<(OwnedFd, &'a Socket)>,
}

/// What makes the daemon's sockets independent of their paths, once the keeper runs.
pub(crate) struct Links(Vec<Option<Link>>);

impl<'a> Keeper<'a> {
    /// Prepares a keeper of those of the `sockets` that have a path.
    pub fn new(sockets: &'a [&mut Socket]) -> Result<(Self, Links), Errno> {
        let mut kept = Vec::new();
        let mut links = Vec::new();
        for socket in sockets {
            links.push(if socket.needs_path() {
                let flags = SocketFlags::CLOEXEC;
                let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
                kept.push((theirs, &**socket));
                Some(Link(ours))
            } else {
                None
            });
        }
        Ok((Self { kept }, Links(links)))
    }

    /// Nobody needs it.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The file descriptors that it needs.
    pub fn fds(&self) -> Vec<RawFd> {
        let links = self.kept.iter().map(|(link, _)| link.as_raw_fd());
        let directories = self.kept.iter().filter_map(|(_, socket)| match socket {
            Socket::Listening(listener) => listener.directory().map(|fd| fd.as_raw_fd()),
            Socket::Connecting(_) | Socket::Connected(_) => None,
        });
        links.chain(directories).collect()
    }

    /// Obeys until the daemon has ended.
    pub fn run(mut self) {
        while !self.kept.is_empty() {
            let mut fds: Vec<_> = self
                .kept
                .iter()
                .map(|(link, _)| PollFd::from_borrowed_fd(link.as_fd(), PollFlags::IN))
                .collect();
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                // Out of memory. The files stay for the next daemon, as if this one had been killed.
                Err(_) => return,
            }
            let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            let mut ready = ready.into_iter();
            self.kept.retain(|(link, socket)| !ready.next().unwrap_or(false) || obey(link, socket).is_ok());
        }
    }
}

/// Obeys one request. An error if there will be no more.
fn obey(link: &OwnedFd, socket: &Socket) -> Result<(), Errno> {
    let mut request = [0];
    let (length, _) = recv(link, &mut request, RecvFlags::empty())?;
    match (length, request[0], socket) {
        (1, REMOVE, Socket::Listening(listener)) => {
            listener.remove_files();
            send(link, &[REMOVE], SendFlags::NOSIGNAL)?;
            Ok(())
        }
        (1, CONNECT, Socket::Connecting(target)) => {
            let connection = target.connect_by_path();
            let error = connection.as_ref().err().map_or(0, |error| error.raw_os_error());
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<_> = connection.iter().map(AsFd::as_fd).collect();
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            sendmsg(link, &[IoSlice::new(&error.to_le_bytes())], &mut control, SendFlags::NOSIGNAL)?;
            Ok(())
        }
        _ => Err(Errno::PROTO),
    }
}

impl Links {
    /// Gives each of the `sockets` its link.
    pub fn hand_out(self, sockets: &mut [&mut Socket]) {
        for (socket, link) in sockets.iter_mut().zip(self.0) {
            if let Some(link) = link {
                socket.keep_by(link);
            }
        }
    }
}
