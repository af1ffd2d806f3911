//! File descriptors of a namespace for a process outside of it.
//!
//! A socket belongs to the namespace that its maker was in, and so does a tap. A process with several threads cannot
//! enter another user namespace, so the small program `open-inside` does, and passes what it opened through a socket.
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::packet::PacketSocket;
use super::{Namespace, TUN, check_tun, sys};
use crate::daemon;
use crate::process::{self, Process};

/// Longest time until the program has opened something.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// Most queues of a tap here.
const MAX_FDS: usize = 16;

/// How a tap is opened.
#[derive(Debug, Clone, Copy)]
pub struct TapOptions {
    /// How many queues to open.
    pub queues: u16,
    /// `IFF_MULTI_QUEUE`.
    pub multi_queue: bool,
    /// The size of the frames' virtio-net headers; `None` for none at all (no `IFF_VNET_HDR`).
    pub header_len: Option<u8>,
}

impl Default for TapOptions {
    fn default() -> Self {
        Self { queues: 1, multi_queue: false, header_len: Some(12) }
    }
}

/// Opens (and makes, if there is none) a tap, one file descriptor a queue. It goes away with the last of them unless
/// it is persistent.
pub fn tap(namespace: &Namespace, name: &str, options: TapOptions) -> Result<Vec<OwnedFd>> {
    check_tun()?;
    let header = options.header_len.map_or("none".to_owned(), |len| len.to_string());
    let (queues, multi_queue) = (options.queues.to_string(), options.multi_queue.to_string());
    fds(namespace, &["tap", name, &queues, &multi_queue, &header])
}

/// A packet socket on an interface.
pub fn packet(namespace: &Namespace, interface: &str) -> Result<PacketSocket> {
    Ok(PacketSocket::new(one(namespace, &["packet", interface])?))
}

/// A TCP socket that listens at `ADDRESS:PORT`.
pub fn tcp_listener(namespace: &Namespace, address: &str) -> Result<TcpListener> {
    Ok(one(namespace, &["tcp-listener", address])?.into())
}

/// A TCP connection to `ADDRESS:PORT`.
pub fn tcp_connection(namespace: &Namespace, address: &str) -> Result<TcpStream> {
    Ok(one(namespace, &["tcp-connection", address])?.into())
}

/// A UDP socket at `ADDRESS:PORT`.
pub fn udp_socket(namespace: &Namespace, address: &str) -> Result<UdpSocket> {
    Ok(one(namespace, &["udp", address])?.into())
}

fn one(namespace: &Namespace, what: &[&str]) -> Result<OwnedFd> {
    fds(namespace, what)?.pop().context("open-inside sent nothing")
}

fn fds(namespace: &Namespace, what: &[&str]) -> Result<Vec<OwnedFd>> {
    let (ours, theirs) = UnixStream::pair().context("Cannot make a pair of sockets")?;
    let mut command = Command::new(daemon::helper("open-inside")?);
    command.args(what);
    let mut command = namespace.root().wrap(&command);
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = Process::spawn(command).context("Cannot start open-inside")?;
    let status = process.wait(OPEN_LIMIT)?;
    let status = status.with_context(|| format!("open-inside {what:?} did not end in time"))?;
    if !status.success() {
        bail!(
            "Cannot open {what:?} inside ({}): {}",
            process::describe(status),
            process.stderr().text().trim()
        );
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&ours, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)
        .context("Cannot receive what open-inside opened")?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            fds.extend(more);
        }
    }
    Ok(fds)
}

/// What the program `open-inside` does: opens what its arguments say, and sends it through its standard input.
pub fn serve(args: &[String]) -> Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let fds: Vec<OwnedFd> = match args[..] {
        ["tap", name, queues, multi_queue, header] => {
            open_tap(name, queues.parse()?, multi_queue == "true", header)?
        }
        ["packet", interface] => {
            let socket =
                rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
            let index = rustix::net::netdevice::name_to_index(&socket, interface)
                .with_context(|| format!("There is no interface {interface}"))?;
            vec![sys::packet_socket(index).context("Cannot make a packet socket")?]
        }
        ["tcp-listener", address] => vec![TcpListener::bind(address)?.into()],
        ["tcp-connection", address] => vec![TcpStream::connect(address)?.into()],
        ["udp", address] => vec![UdpSocket::bind(address)?.into()],
        _ => bail!("Unknown arguments {args:?}"),
    };
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "{} are more than {MAX_FDS}", fds.len());
    sendmsg(std::io::stdin(), &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)
        .context("Cannot send what was opened")?;
    Ok(())
}

fn open_tap(name: &str, queues: u16, multi_queue: bool, header: &str) -> Result<Vec<OwnedFd>> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if header != "none" {
        flags |= libc::IFF_VNET_HDR;
    }
    let open = |_| {
        let tun = OwnedFd::from(File::options().read(true).write(true).open(TUN)?);
        sys::tun_set_iff(tun.as_fd(), name, flags).with_context(|| format!("Cannot open the tap {name}"))?;
        if header != "none" {
            sys::tun_set_header_len(tun.as_fd(), header.parse()?)?;
        }
        Ok(tun)
    };
    (0..queues).map(open).collect()
}
