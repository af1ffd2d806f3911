//! `ctl`: a balloon's control socket on the command line.
//!
//! | module | holds |
//! |---|---|
//! | `target` | `target`, `setmem`: sets a target, and waits for it |
//! | `status` | `status` as a table |
//! | `statistics` | `stats`, `dommemstat`: once or again and again |
//! | `events` | `events` as lines |
//! | `units` | sizes and times for people |
//!
//! With `--json`, what is printed is what the daemon sent, one JSON value for each line.

mod events;
mod statistics;
mod status;
mod target;
mod units;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;
use vhost_user_daemon::control::Client;

use crate::api::{StatisticsInterval, Status};
use crate::sizes;

/// The flags and commands of `ctl`.
#[derive(Args, Clone, Debug)]
#[command(arg_required_else_help = false)]
pub struct CtlArgs {
    /// The --control-socket of the daemon
    #[arg(
        long,
        alias = "control-socket",
        value_name = "PATH",
        env = "VHOST_USER_BALLOON_SOCKET",
        global = true
    )]
    pub socket: Option<PathBuf>,

    /// Print JSON, one value on each line, instead of tables
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `ctl`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show the balloon: its size, what the host got back, what the guest says
    Status,

    /// Set the size of the balloon, or what is left to the guest
    Target(TargetArgs),

    /// Set what is left to the guest, as `virsh setmem` does
    Setmem(SetmemArgs),

    /// Show what the guest says of its memory
    Stats(StatsArgs),

    /// Show what the guest says of its memory, as `virsh dommemstat` does: names, order, and KiB
    Dommemstat(FreshArgs),

    /// Show what happens, until the daemon ends or you press Ctrl-C
    Events(EventsArgs),

    /// Have the guest asked for statistics every so many seconds; 0: only on demand
    Interval {
        /// Seconds
        #[arg(value_name = "SECONDS")]
        seconds: u64,
    },
}

/// The flags of `target`.
#[derive(Args, Clone, Debug)]
#[group(id = "size", required = true, multiple = false, args = ["bytes", "guest"])]
pub struct TargetArgs {
    /// Size of the balloon: what the guest is to do without. Bytes, or with a unit: 512M, 1.5G (of 1024)
    #[arg(value_name = "BYTES", value_parser = sizes::parse)]
    pub bytes: Option<u64>,

    /// Instead of the balloon's size, what is left to the guest
    #[arg(long, value_name = "BYTES", value_parser = sizes::parse)]
    pub guest: Option<u64>,

    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// The flags of `setmem`.
#[derive(Args, Clone, Debug)]
pub struct SetmemArgs {
    /// What is left to the guest. As with virsh, a number without a unit is KiB; or with a unit: 512M, 1.5G (of 1024)
    #[arg(value_name = "SIZE", value_parser = units::parse_kib)]
    pub size: u64,

    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// The flag about waiting.
#[derive(Args, Clone, Debug)]
pub struct WaitArgs {
    /// Wait until the balloon has this size and the host has the memory; fail after SECONDS [default: 60]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "60", value_parser = units::parse_seconds)]
    pub wait: Option<Duration>,
}

/// The flags of `stats`.
#[derive(Args, Clone, Debug)]
pub struct StatsArgs {
    /// Print a line every so many seconds, with the rates in between, until you press Ctrl-C [default: 1]
    ///
    /// The guest is asked for each line, unless it is asked at an interval anyway.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = units::parse_seconds)]
    pub watch: Option<Duration>,

    /// Whether to ask the guest.
    #[command(flatten)]
    pub fresh: FreshArgs,
}

/// The flag about old numbers.
#[derive(Args, Clone, Copy, Debug)]
pub struct FreshArgs {
    /// Ask the guest now, instead of showing what it said at last
    #[arg(long)]
    pub fresh: bool,
}

/// The flags of `events`.
#[derive(Args, Clone, Debug)]
pub struct EventsArgs {
    /// Begin with the last N events
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub past: usize,
}

/// Does what the command says, and prints the result on stdout.
pub fn run(args: &CtlArgs) -> anyhow::Result<()> {
    match run_to(args, &mut io::stdout().lock()) {
        // `| head` has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => result,
    }
}

/// Does what the command says, and prints the result on `output`.
pub fn run_to(args: &CtlArgs, output: &mut dyn Write) -> anyhow::Result<()> {
    let path = args.socket.as_deref().context(
        "No socket is given: use --socket with the --control-socket of the daemon, or set VHOST_USER_BALLOON_SOCKET",
    )?;
    let mut session = Session { client: Client::new(path), json: args.json, output };
    match &args.command {
        Command::Status => {
            let status: Status = session.client.get("/v1/status")?;
            session.print(&status, status::table)
        }
        Command::Target(args) => session.set_target(args.bytes, args.guest, args.wait.wait),
        Command::Setmem(args) => session.set_target(None, Some(args.size), args.wait.wait),
        Command::Stats(args) => match args.watch {
            Some(interval) => session.watch(interval, args.fresh.fresh),
            None => session.stats(args.fresh.fresh),
        },
        Command::Dommemstat(args) => session.dommemstat(args.fresh),
        Command::Events(args) => session.events(args.past),
        Command::Interval { seconds } => {
            let body = StatisticsInterval { stats_polling_interval_s: *seconds };
            Ok(session.client.patch("/balloon/statistics", &body)?)
        }
    }
}

/// A daemon to talk to, and where the answers go.
struct Session<'a> {
    client: Client,
    json: bool,
    output: &'a mut dyn Write,
}

impl Session<'_> {
    /// Prints a value: as JSON, or as the table that is made of it.
    fn print<T: Serialize>(&mut self, value: &T, table: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        if self.json {
            serde_json::to_writer(&mut *self.output, value).map_err(io::Error::from)?;
            writeln!(self.output)?;
        } else {
            self.output.write_all(table(value).as_bytes())?;
        }
        Ok(self.output.flush()?)
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Lines of a name and what is said of it, in two columns.
fn columns(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let lines: Vec<_> = rows.iter().map(|(name, text)| format!("{name:width$}  {text}\n")).collect();
    lines.concat()
}
