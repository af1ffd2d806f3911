//! A private connection to a [`VhostUserDaemon`](vhost_user_backend::VhostUserDaemon) of this process.
//!
//! The crate can only accept from a listener or connect to a path. The listener made here has a name of the kernel's
//! choice in the abstract namespace, room for exactly one connection, and that one is ours before anybody else can be
//! accepted: if another process got in first, our own connect finds the queue full and fails.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen, socket_with,
};

/// How often another process may get in between.
const ATTEMPTS: usize = 8;

/// A listener with one pending connection, and the other end of that connection.
pub(crate) fn pair() -> io::Result<(UnixListener, UnixStream)> {
    let mut result = attempt();
    for _ in 1..ATTEMPTS {
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => result = attempt(),
            done => return done,
        }
    }
    result
}

fn attempt() -> io::Result<(UnixListener, UnixStream)> {
    let listener = unix_socket()?;
    // Binding to no name at all makes the kernel choose a free one.
    bind(&listener, &SocketAddrUnix::new_unnamed())?;
    // A backlog of 0 admits one pending connection.
    listen(&listener, 0)?;
    let name = getsockname(&listener)?;
    let stream = unix_socket()?;
    rustix::io::ioctl_fionbio(&stream, true)?;
    connect(&stream, &name)?;
    rustix::io::ioctl_fionbio(&stream, false)?;
    Ok((listener.into(), stream.into()))
}

fn unix_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn the_pair_is_connected_and_nobody_else_gets_in() {
        let (listener, mut ours) = pair().unwrap();
        let stranger = unix_socket().unwrap();
        rustix::io::ioctl_fionbio(&stranger, true).unwrap();
        let name = getsockname(&listener).unwrap();
        assert_eq!(connect(&stranger, &name), Err(rustix::io::Errno::AGAIN));
        let (mut accepted, _) = listener.accept().unwrap();
        ours.write_all(b"x").unwrap();
        let mut byte = [0];
        accepted.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
