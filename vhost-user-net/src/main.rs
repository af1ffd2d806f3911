//! Serves network interfaces over vhost-user.

use std::process::ExitCode;

use vhost_user_daemon::cli;
use vhost_user_net::args::{Args, CAPABILITIES};
use vhost_user_net::run::run;

fn main() -> ExitCode {
    let args: Args = cli::parse(&CAPABILITIES);
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&*error),
    }
}
