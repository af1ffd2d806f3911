//! Sockets that the daemon's parent opened: `--fd`, and systemd's socket activation.

use std::ffi::OsString;
use std::ops::Range;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, getpeername, sockopt};

use super::{Socket, SocketError, sys};

/// `SD_LISTEN_FDS_START` of `sd_listen_fds(3)`.
const LISTEN_FDS_START: RawFd = 3;

/// Takes over a socket that was passed by number, listening (libvirt, QEMU, systemd) or connected (crosvm, lxd).
pub(super) fn open(fd: RawFd) -> Result<Socket, SocketError> {
    classify(sys::inherited_fd(fd)?, fd)
}

fn classify(socket: OwnedFd, fd: RawFd) -> Result<Socket, SocketError> {
    let failed = |error: Errno| match error {
        Errno::NOTSOCK => SocketError::NotSocket { fd },
        Errno::NOTCONN => SocketError::Idle { fd },
        error => SocketError::Descriptor { fd, source: error.into() },
    };
    let family = sockopt::socket_domain(&socket).map_err(failed)?;
    let kind = sockopt::socket_type(&socket).map_err(failed)?;
    if (family, kind) != (AddressFamily::UNIX, SocketType::STREAM) {
        return Err(SocketError::WrongSocket { fd });
    }
    let listening = sockopt::socket_acceptconn(&socket).map_err(failed)?;
    if !listening {
        getpeername(&socket).map_err(failed)?;
    }
    // The parent chose the mode for its own event loop.
    rustix::io::ioctl_fionbio(&socket, false).map_err(failed)?;
    Ok(if listening {
        Socket::Listening(UnixListener::from(socket).into())
    } else {
        Socket::Connected(UnixStream::from(socket))
    })
}

/// The descriptors that systemd passed: `sd_listen_fds(3)` on the variables that `variable` looks up. As many as are
/// `wanted`, if that is said, and at least one.
///
/// The close-on-exec flag is left alone: its absence is what [`sys::inherited_fd`] goes by.
/// The variables stay in the environment: removing them is not thread-safe, and `LISTEN_PID` already keeps children
/// from believing that they are meant.
pub(super) fn listen_fds(
    variable: impl Fn(&str) -> Option<OsString>,
    pid: u32,
    wanted: Option<usize>,
) -> Result<Range<RawFd>, SocketError> {
    let number = |name: &'static str| match variable(name) {
        None => Ok(None),
        Some(value) => match value.to_str().and_then(|text| text.parse::<u32>().ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(SocketError::ListenVariable { name, value }),
        },
    };
    if number("LISTEN_PID")? != Some(pid) {
        return Err(SocketError::NoSource);
    }
    let count = number("LISTEN_FDS")?.unwrap_or(0);
    if count == 0 {
        return Err(SocketError::NoSource);
    }
    let wanted = wanted.unwrap_or(count as usize);
    let end = RawFd::try_from(count).ok().and_then(|count| LISTEN_FDS_START.checked_add(count));
    match end {
        Some(end) if wanted == count as usize => Ok(LISTEN_FDS_START..end),
        _ => Err(SocketError::ListenCount { count, wanted }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::SocketArgs;
    use rustix::io::{FdFlags, fcntl_setfd};
    use rustix::net::socket;
    use std::fs::File;
    use std::net::TcpListener;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixDatagram;
    use std::process::{Command, Output, Stdio};
    use std::{env, io, iter};

    /// Makes a descriptor look like one that was inherited.
    fn pass(fd: impl Into<OwnedFd>) -> RawFd {
        let fd = fd.into();
        fcntl_setfd(&fd, FdFlags::empty()).unwrap();
        fd.into_raw_fd()
    }

    fn listener() -> UnixListener {
        let directory = tempfile::tempdir().unwrap();
        UnixListener::bind(directory.path().join("sock")).unwrap()
    }

    fn open_fd(fd: RawFd) -> Result<Socket, SocketError> {
        Socket::from_args(&SocketArgs { fd: Some(fd), ..SocketArgs::default() })
    }

    #[test]
    fn a_listening_socket_listens_in_blocking_mode() {
        let listener = listener();
        listener.set_nonblocking(true).unwrap();
        let path = listener.local_addr().unwrap().as_pathname().unwrap().to_owned();
        let socket = open_fd(pass(listener)).unwrap();
        assert_eq!(socket.to_string(), format!("inherited listening socket {}", path.display()));
        let Socket::Listening(listener) = socket else { panic!("{socket:?}") };
        assert!(!rustix::fs::fcntl_getfl(&listener).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
        assert_eq!(rustix::io::fcntl_getfd(&listener).unwrap(), FdFlags::CLOEXEC);
        assert!(listener.path().is_none() && listener.directory().is_none());
    }

    #[test]
    fn a_connected_socket_is_connected_even_if_the_peer_has_gone() {
        let (ours, peer) = UnixStream::pair().unwrap();
        drop(peer);
        let socket = open_fd(pass(ours)).unwrap();
        assert!(matches!(socket, Socket::Connected(_)), "{socket:?}");
        assert_eq!(socket.to_string(), "inherited connection");
    }

    #[test]
    fn closing_the_connection_reaches_the_peer() {
        let (ours, peer) = UnixStream::pair().unwrap();
        drop(open_fd(pass(ours)).unwrap());
        assert_eq!(io::Read::read(&mut &peer, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(open_fd(pass(file)), Err(SocketError::NotSocket { .. })));

        let datagram = UnixDatagram::unbound().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let seqpacket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        for fd in [pass(datagram), pass(tcp), pass(seqpacket)] {
            assert!(matches!(open_fd(fd), Err(SocketError::WrongSocket { .. })));
        }

        let idle = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        assert!(matches!(open_fd(pass(idle)), Err(SocketError::Idle { .. })));

        let error = open_fd(RawFd::MAX).unwrap_err();
        assert!(error.to_string().starts_with("File descriptor 2147483647 is not open: "), "{error}");
    }

    fn listen_fds_of(variables: &[(&str, &str)], wanted: Option<usize>) -> Result<Vec<RawFd>, SocketError> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
        listen_fds(find, 42, wanted).map(Iterator::collect)
    }

    #[test]
    fn systemd_passes_as_many_sockets_as_are_wanted() {
        let of = |count: &str, wanted| listen_fds_of(&[("LISTEN_PID", "42"), ("LISTEN_FDS", count)], wanted);
        assert_eq!(of("1", Some(1)).unwrap(), [3]);
        assert_eq!(of("3", Some(3)).unwrap(), [3, 4, 5]);
        assert_eq!(of("2", None).unwrap(), [3, 4]);
        for (count, wanted) in [("2", Some(1)), ("1", Some(2)), ("4294967295", Some(1)), ("4294967295", None)]
        {
            let error = of(count, wanted).unwrap_err();
            assert!(matches!(error, SocketError::ListenCount { .. }), "{error}");
            assert!(error.to_string().contains(&format!("passed {count} sockets")), "{error}");
        }
    }

    #[test]
    fn variables_for_nobody_or_somebody_else_are_ignored() {
        for variables in [
            &[][..],
            &[("LISTEN_FDS", "1")],
            &[("LISTEN_PID", "42")],
            &[("LISTEN_PID", "42"), ("LISTEN_FDS", "0")],
            &[("LISTEN_PID", "41"), ("LISTEN_FDS", "2")],
            &[("LISTEN_PID", "41"), ("LISTEN_FDS", "x")],
        ] {
            for wanted in [None, Some(1)] {
                let error = listen_fds_of(variables, wanted).unwrap_err();
                assert!(matches!(error, SocketError::NoSource), "{variables:?}: {error}");
            }
        }
    }

    #[test]
    fn variables_that_are_no_numbers_are_named() {
        for (variables, name) in [
            ([("LISTEN_PID", "x"), ("LISTEN_FDS", "1")], "LISTEN_PID"),
            ([("LISTEN_PID", "42"), ("LISTEN_FDS", "-1")], "LISTEN_FDS"),
        ] {
            let error = listen_fds_of(&variables, None).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    /// Not a test of its own: runs in a child process of the tests below.
    #[test]
    #[ignore = "child of other tests"]
    fn child() {
        let number = |name| env::var(name).ok().map(|number| number.parse().unwrap());
        let sockets = match number("TEST_WANTED") {
            Some(wanted) => Socket::from_systemd(Some(wanted as usize)),
            None => Socket::from_args(&SocketArgs { fd: number("TEST_FD"), ..SocketArgs::default() })
                .map(|socket| vec![socket]),
        };
        match sockets {
            Ok(sockets) => sockets.iter().for_each(|socket| eprintln!("opened: {socket}")),
            Err(error) => eprintln!("failed: {error}"),
        }
    }

    /// Runs [`child`] with `socket` on its stdin, after the shell commands `setup`.
    fn run_child(socket: impl Into<Stdio>, setup: &str) -> String {
        let arguments = ["--exact", "socket::inherited::tests::child", "--ignored", "--nocapture"];
        let Output { status, stderr, .. } = Command::new("sh")
            .args(["-c", &format!(r#"{setup}; exec "$0" "$@""#)])
            .arg(env::current_exe().unwrap())
            .args(arguments)
            .stdin(socket)
            .output()
            .unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(status.success(), "{stderr}");
        stderr
    }

    #[test]
    fn sockets_reach_a_new_process() {
        let listen = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1";
        let output = run_child(OwnedFd::from(listener()), listen);
        assert!(output.contains("opened: inherited listening socket"), "{output}");

        let (ours, _peer) = UnixStream::pair().unwrap();
        let output = run_child(OwnedFd::from(ours), "exec 9<&0 </dev/null; export TEST_FD=9");
        assert!(output.contains("opened: inherited connection"), "{output}");

        let listen = "exec 3<&0 4<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=2 TEST_WANTED=2";
        let output = run_child(OwnedFd::from(listener()), listen);
        assert_eq!(output.matches("opened: inherited listening socket").count(), 2, "{output}");

        for setup in ["unset LISTEN_PID", "export LISTEN_PID=1 LISTEN_FDS=1"] {
            let output = run_child(File::open("/dev/null").unwrap(), setup);
            assert!(output.contains("failed: No socket is given: use --socket-path or --fd"), "{output}");
        }
    }

    #[test]
    fn messages_are_one_sentence_without_a_period() {
        for error in iter::once(SocketError::NoSource).chain([
            SocketError::NotSocket { fd: 3 },
            SocketError::Idle { fd: 3 },
            SocketError::WrongSocket { fd: 3 },
        ]) {
            let text = error.to_string();
            assert!(
                text.starts_with(char::is_uppercase) && !text.ends_with('.') && !text.contains('\n'),
                "{text}"
            );
        }
    }
}
