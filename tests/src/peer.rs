//! The other end of a port of `vhost-user-net` on a unix socket: what passt, slirp4netns, vfkit's peers and a VDE switch
//! say, and nothing else.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    recv, send, socket_with, sockopt,
};
use tempfile::TempDir;

/// Longest time to wait for anything of the daemon.
const LIMIT: Duration = Duration::from_secs(10);
/// Room for the longest frame.
const MAX_FRAME: usize = 1 << 17;
/// Bytes of a VDE switch's `struct request_v3`: magic, version and type, an address, a description.
const VDE_REQUEST: usize = 12 + VDE_ADDRESS + 128;
/// Bytes of a `sockaddr_un`.
const VDE_ADDRESS: usize = 110;

/// A way to keep frames apart on a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `--stream`: a length of 32 bits, big endian, before each frame.
    Stream,
    /// `--seqpacket`: one frame a message.
    Seqpacket,
    /// `--dgram`: one frame a datagram.
    Dgram,
    /// `--vde`: one frame a datagram, on sockets that were agreed on.
    Vde,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Stream, Self::Seqpacket, Self::Dgram, Self::Vde];

    /// The daemon's flag.
    pub fn flag(self) -> &'static str {
        match self {
            Self::Stream => "--stream",
            Self::Seqpacket => "--seqpacket",
            Self::Dgram => "--dgram",
            Self::Vde => "--vde",
        }
    }
}

/// Where a daemon finds its peer.
#[derive(Debug)]
pub struct Place {
    kind: Kind,
    folder: TempDir,
}

impl Place {
    /// A place where nobody is yet.
    pub fn new(kind: Kind) -> Result<Self> {
        Ok(Self { kind, folder: TempDir::with_prefix("peer-").context("Cannot make a folder for a socket")? })
    }

    /// What the daemon's flag takes.
    pub fn path(&self) -> PathBuf {
        match self.kind {
            Kind::Vde => self.folder.path().to_owned(),
            _ => self.folder.path().join("peer"),
        }
    }

    /// Opens the socket there.
    pub fn listen(&self) -> Result<Listener> {
        let path = self.path();
        let listener = match self.kind {
            Kind::Stream => Listener::Stream(OwnedFd::from(UnixListener::bind(&path)?)),
            Kind::Seqpacket => {
                let socket =
                    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
                bind(&socket, &SocketAddrUnix::new(&path)?)?;
                listen(&socket, 8)?;
                Listener::Seqpacket(socket)
            }
            Kind::Dgram => {
                Listener::Dgram(OwnedFd::from(UnixDatagram::bind(&path)?), self.folder.path().to_owned())
            }
            Kind::Vde => Listener::Vde(OwnedFd::from(UnixListener::bind(path.join("ctl"))?), path),
        };
        sockopt::set_socket_timeout(listener.socket(), sockopt::Timeout::Recv, Some(LIMIT))?;
        Ok(listener)
    }

    /// Removes the socket, as a program does that ends.
    pub fn remove(&self) -> Result<()> {
        for name in ["peer", "ctl", "data"] {
            match std::fs::remove_file(self.folder.path().join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A socket that a daemon will come to.
#[derive(Debug)]
pub enum Listener {
    /// Of [`Kind::Stream`].
    Stream(OwnedFd),
    /// Of [`Kind::Seqpacket`].
    Seqpacket(OwnedFd),
    /// Of [`Kind::Dgram`]: the socket, and the folder that it is in.
    Dgram(OwnedFd, PathBuf),
    /// Of [`Kind::Vde`]: the control socket, and the folder for others.
    Vde(OwnedFd, PathBuf),
}

impl Listener {
    fn socket(&self) -> &OwnedFd {
        match self {
            Self::Stream(socket)
            | Self::Seqpacket(socket)
            | Self::Dgram(socket, _)
            | Self::Vde(socket, _) => socket,
        }
    }

    /// Waits for the daemon.
    pub fn accept(&self) -> Result<Peer> {
        let accepted = || -> Result<OwnedFd> {
            let socket = retry_on_intr(|| accept_with(self.socket(), SocketFlags::CLOEXEC))
                .context("Nobody connects")?;
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LIMIT))?;
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(LIMIT))?;
            Ok(socket)
        };
        Ok(match self {
            Self::Stream(_) => Peer::Stream(accepted()?.into()),
            Self::Seqpacket(_) => Peer::Messages { socket: accepted()?, control: None },
            Self::Dgram(socket, folder) => {
                let socket = UnixDatagram::from(socket.try_clone()?);
                socket.connect(wait_for_daemon(folder)?).context("The daemon's own socket is not there")?;
                socket.set_write_timeout(Some(LIMIT))?;
                Peer::Messages { socket: socket.into(), control: None }
            }
            Self::Vde(_, folder) => {
                let data = folder.join("data");
                let socket = UnixDatagram::bind(&data)?;
                let mut control = loop {
                    let mut control = UnixStream::from(accepted()?);
                    let mut request = [0; VDE_REQUEST];
                    control.read_exact(&mut request).context("The request of a VDE port is too short")?;
                    ensure!(request[..4] == 0xfeed_face_u32.to_ne_bytes(), "No magic in {request:02x?}");
                    ensure!(request[4..8] == 3_u32.to_ne_bytes(), "Another version in {request:02x?}");
                    match socket.connect(path_in(&request[14..12 + VDE_ADDRESS])) {
                        Ok(()) => break control,
                        // A daemon that was not answered in a second has taken its socket away, and comes again.
                        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error).context("The daemon's own socket is not there"),
                    }
                };
                socket.set_read_timeout(Some(LIMIT))?;
                socket.set_write_timeout(Some(LIMIT))?;
                let mut answer = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
                answer.extend(data.as_os_str().as_bytes());
                answer.resize(VDE_ADDRESS, 0);
                control.write_all(&answer)?;
                Peer::Messages { socket: socket.into(), control: Some(control) }
            }
        })
    }
}

/// The socket that a daemon has bound next to its peer's.
fn wait_for_daemon(folder: &Path) -> Result<PathBuf> {
    let deadline = Instant::now() + LIMIT;
    loop {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().as_bytes().starts_with(b".vhost-user-net-") {
                return Ok(entry.path());
            }
        }
        ensure!(Instant::now() < deadline, "No daemon comes to {}", folder.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn path_in(bytes: &[u8]) -> &Path {
    let path = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    Path::new(std::ffi::OsStr::from_bytes(path))
}

/// A connection to a daemon.
#[derive(Debug)]
pub enum Peer {
    /// Of [`Kind::Stream`].
    Stream(UnixStream),
    /// Of the others.
    Messages {
        /// One message is one frame.
        socket: OwnedFd,
        /// Stays open as long as the port of a VDE switch.
        control: Option<UnixStream>,
    },
}

impl Peer {
    /// Sends a frame.
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        match self {
            Self::Stream(_) => self.send_bytes(&prefixed(frame)),
            Self::Messages { socket, .. } => {
                retry_on_intr(|| send(&*socket, frame, SendFlags::NOSIGNAL))
                    .context("The daemon does not take a frame")?;
                Ok(())
            }
        }
    }

    /// Sends bytes of a stream as they are.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let Self::Stream(stream) = self else { anyhow::bail!("Messages have no parts") };
        stream.write_all(bytes).context("The daemon does not take what is sent")
    }

    /// The next frame.
    pub fn receive(&mut self) -> Result<Vec<u8>> {
        match self {
            Self::Stream(stream) => {
                let mut len = [0; 4];
                stream.read_exact(&mut len).context("A frame does not arrive")?;
                let mut frame = vec![0; u32::from_be_bytes(len) as usize];
                stream.read_exact(&mut frame).context("A frame ends early")?;
                Ok(frame)
            }
            Self::Messages { socket, .. } => {
                let mut frame = vec![0; MAX_FRAME];
                let (len, _) = retry_on_intr(|| recv(&*socket, &mut frame[..], RecvFlags::empty()))
                    .context("A frame does not arrive")?;
                frame.truncate(len);
                Ok(frame)
            }
        }
    }

    /// Waits until the daemon has ended the connection.
    pub fn wait_closed(&mut self) -> Result<()> {
        let Self::Stream(stream) = self else { anyhow::bail!("Messages do not end") };
        let mut rest = [0; 4096];
        loop {
            match stream.read(&mut rest) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error).context("The daemon keeps the connection"),
            }
        }
    }
}

/// A frame with its length before it.
pub fn prefixed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}
