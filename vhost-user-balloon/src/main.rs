//! Serves a memory balloon over vhost-user, talks to one, or manages many.

use std::process::ExitCode;

use vhost_user_balloon::args::{Args, CAPABILITIES, Command};
use vhost_user_balloon::ctl;
use vhost_user_balloon::manage;
use vhost_user_balloon::run::run;
use vhost_user_daemon::cli;

fn main() -> ExitCode {
    let args: Args = cli::parse(&CAPABILITIES);
    let result = match &args.command {
        None => run(&args),
        Some(Command::Ctl(args)) => ctl::run(args),
        Some(Command::Manage(args)) => manage::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&*error),
    }
}
