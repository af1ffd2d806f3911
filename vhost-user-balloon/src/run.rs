//! From the command line to a balloon that is served.

use std::sync::Arc;

use anyhow::{Context, ensure};
use log::{info, warn};
use vhost_user_daemon::control::Bell;
use vhost_user_daemon::socket::Socket;
use vhost_user_daemon::{ConfigNotifier, ServeOptions, hold_signals, serve};

use crate::args::Args;
use crate::control::{self, Announcer, Controlled};
use crate::device::Balloon;
use crate::state_file::StateFile;

/// Opens what the command line names, and serves the balloon until the daemon is asked to end.
pub fn run(args: &Args) -> anyhow::Result<()> {
    args.common.service.init_log();
    let (device, control) = (&args.common.socket.socket_path, &args.control.control_socket);
    ensure!(
        device.is_none() || device != control,
        "--socket-path and --control-socket are the same: virtual machine monitors and commands need a socket each"
    );
    let state_file = args.state_file.as_deref().map(StateFile::open).transpose()?;
    hold_signals().context("Signals cannot be held back")?;
    let control_socket = args.control.open()?;
    let socket = Socket::from_args(&args.common.socket)?;
    if args.no_discard {
        warn!(
            "Nothing is given back to the host (--no-discard): the balloon only limits what the guest uses"
        );
    }
    let bell = Bell::new().context("The control socket cannot be served")?;
    let feed = control::feed(&bell);
    let notifier = ConfigNotifier::default();
    let balloon = Arc::new(Balloon::new(
        args.balloon_options(),
        notifier.clone(),
        Box::new(Announcer::new(&bell, &feed)),
        state_file,
    ));
    let _server = control_socket
        .map(|socket| control::serve(&bell, feed, socket, Arc::clone(&balloon) as Arc<dyn Controlled>))
        .transpose()?;
    info!(
        "vhost-user-balloon {} serves a balloon{}",
        env!("CARGO_PKG_VERSION"),
        match balloon.status().requested_bytes {
            0 => String::new(),
            bytes => format!(" of {} MiB", bytes >> 20),
        }
    );
    let exit_on_disconnect = args.common.service.exit_on_disconnect;
    let options = ServeOptions { exit_on_disconnect, ..ServeOptions::default() };
    serve(&balloon, &notifier, &socket, &options).context("Serving has ended")
}
