//! The control connection of a VDE switch: it hands out a datagram socket, and lasts as long as the port.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send};
use tempfile::TempPath;

use super::datagram::{Datagram, bind_near, unconnected};
use super::{closed, socket_to};

const MAGIC: u32 = 0xfeed_face;
const VERSION: u32 = 3;
/// A port with any number.
const NEW_PORT: u32 = 0;
/// Bytes of a `sockaddr_un`: a family of 16 bits and a path.
const ADDRESS: usize = 110;
/// Bytes of the description that the switch shows in its list of ports.
const DESCRIPTION: usize = 128;

/// The control connection of a port.
#[derive(Debug)]
pub(super) struct Control(OwnedFd);

impl Control {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// An error if the switch has gone.
    pub(super) fn check(&self) -> io::Result<()> {
        match recv(&self.0, &mut [0; 64], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(closed()),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A port that was asked for.
#[derive(Debug)]
pub(super) struct Handshake {
    control: OwnedFd,
    data: OwnedFd,
    path: TempPath,
    reply: [u8; ADDRESS],
    received: usize,
}

impl Handshake {
    /// Asks the switch at `path`, its directory or the socket `ctl` in it.
    pub(super) fn start(path: &Path) -> io::Result<Self> {
        let control = if path.is_dir() { path.join("ctl") } else { path.to_owned() };
        let control = socket_to(&control, SocketType::STREAM)?;
        let data = unconnected()?;
        let own = bind_near(&data, path)?;
        // The switch reads the request at once or not at all; an empty socket has room for it.
        let request = request(&own);
        let sent = send(&control, &request, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        if sent < request.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(Self { control, data, path: own, reply: [0; ADDRESS], received: 0 })
    }

    /// Gives the port once the switch has answered, and itself as long as it has not.
    pub(super) fn finish(mut self) -> io::Result<Result<(Control, Datagram), Self>> {
        while self.received < ADDRESS {
            match recv(&self.control, &mut self.reply[self.received..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(closed()),
                Ok((_, received)) => self.received += received,
                Err(Errno::AGAIN) => return Ok(Err(self)),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        connect(&self.data, &SocketAddrUnix::new(answer(&self.reply)?)?)?;
        Ok(Ok((Control(self.control), Datagram::adopt(self.data, self.path))))
    }
}

/// The bytes of `struct request_v3`, in the byte order of the host.
fn request(own: &Path) -> Vec<u8> {
    let mut request = Vec::with_capacity(12 + ADDRESS + DESCRIPTION);
    for word in [MAGIC, VERSION, NEW_PORT] {
        request.extend(word.to_ne_bytes());
    }
    request.extend((libc::AF_UNIX as u16).to_ne_bytes());
    request.extend(own.as_os_str().as_bytes());
    request.resize(12 + ADDRESS, 0);
    request.extend(format!("vhost-user-net PID={}", std::process::id()).bytes());
    request.resize(12 + ADDRESS + DESCRIPTION, 0);
    request
}

/// The path of the switch's data socket.
fn answer(reply: &[u8; ADDRESS]) -> io::Result<PathBuf> {
    let (family, path) = reply.split_at(2);
    let path = path.split(|&byte| byte == 0).next().unwrap_or_default();
    if family != (libc::AF_UNIX as u16).to_ne_bytes() || path.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is not that of a VDE switch"));
    }
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
}
