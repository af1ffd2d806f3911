//! Serves a directory over vhost-user as a 9P file system.

use std::process::ExitCode;

use vhost_user_9p::args::{Args, CAPABILITIES};
use vhost_user_9p::run::run;
use vhost_user_daemon::cli;

fn main() -> ExitCode {
    let args: Args = cli::parse(&CAPABILITIES);
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&*error),
    }
}
