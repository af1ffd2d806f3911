//! What the service manager is told: `sd_notify(3)`.
//!
//! The connection is made once, so that it lasts in a sandbox where the manager's socket cannot be found any more.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::OnceLock;

use log::warn;

/// The connection, if there is a manager that can be told.
static MANAGER: OnceLock<Option<UnixDatagram>> = OnceLock::new();

/// Connects to the manager that `$NOTIFY_SOCKET` names, if that was not done before.
pub fn connect() {
    manager();
}

/// Tells the manager about a new state, such as `READY=1`. Without a manager this does nothing.
pub fn send(state: &str) {
    if let Some(manager) = manager()
        && let Err(error) = manager.send(state.as_bytes())
    {
        complain(&error);
    }
}

fn manager() -> Option<&'static UnixDatagram> {
    let connect = || {
        let name = env::var_os("NOTIFY_SOCKET")?;
        connect_to(&name).inspect_err(complain).ok()
    };
    MANAGER.get_or_init(connect).as_ref()
}

fn connect_to(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

fn complain(error: &io::Error) {
    warn!("The service manager cannot be notified: {error}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_reached(manager: &UnixDatagram, name: &OsStr) {
        connect_to(name).unwrap().send(b"READY=1").unwrap();
        let mut buffer = [0; 100];
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
    }

    #[test]
    fn a_manager_with_a_path_is_reached() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        assert_reached(&UnixDatagram::bind(&path).unwrap(), path.as_os_str());
    }

    #[test]
    fn a_manager_with_an_abstract_name_is_reached() {
        let name = format!("vhost-user-daemon-test-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        assert_reached(&manager, OsStr::new(&format!("@{name}")));
    }

    #[test]
    fn a_manager_that_is_not_there_is_an_error() {
        assert!(connect_to(OsStr::new("/nonexistent/notify")).is_err());
        assert!(connect_to(OsStr::new("vsock:2:1234")).is_err());
    }
}
