//! `cargo demo`: boots a guest on the daemons and shows what it sees.
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match tests::demo::run(&tests::demo::Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("The demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
