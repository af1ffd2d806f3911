//! Tells when an interface goes up or down.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use super::Tap;

/// A thread that watches whether a tap [is up](Tap::is_up). It ends when this is dropped, or when the interface is deleted.
///
/// It sleeps until the kernel announces a change of any interface of the network namespace (rtnetlink(7),
/// `RTMGRP_LINK`), and then looks at its own. A tap of another namespace is looked at once a second.
#[derive(Debug)]
pub struct LinkMonitor {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl LinkMonitor {
    /// Watches `tap`, which was up or not when the caller last looked, and calls `changed` on a thread of its own with each
    /// new state from then on.
    pub fn start(
        tap: Arc<Tap>,
        was_up: bool,
        changed: impl FnMut(bool) + Send + 'static,
    ) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, libc::RTMGRP_LINK as u32))?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let thread = {
            let stop = Arc::clone(&stop);
            thread::Builder::new()
                .name("link-monitor".to_owned())
                .spawn(move || watch(&tap, &socket, &stop, was_up, changed))?
        };
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for LinkMonitor {
    fn drop(&mut self) {
        // An eventfd that was never written to takes any number.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(tap: &Tap, socket: &OwnedFd, stop: &OwnedFd, was_up: bool, mut changed: impl FnMut(bool)) {
    let mut was_up = was_up;
    loop {
        let is_up = tap.is_up();
        if is_up != was_up {
            was_up = is_up;
            changed(is_up);
        }
        if !tap.exists() {
            return;
        }
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        let timeout = if tap.is_local() { None } else { Some(&second) };
        let mut fds = [
            PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                log::error!("Cannot wait for changes of {}: {error}; its link state is frozen", tap.name());
                return;
            }
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        discard_messages(socket);
    }
}

/// Empties the socket. What the messages say does not matter, and neither do those that were lost (`ENOBUFS`).
fn discard_messages(socket: &OwnedFd) {
    let mut buffer = [0; 64];
    while matches!(recv(socket, &mut buffer, RecvFlags::DONTWAIT), Ok(_) | Err(Errno::NOBUFS | Errno::INTR)) {
    }
}
