//! The command line of `vhost-user-balloon manage`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use log::LevelFilter;
use vhost_user_daemon::cli::{self, LogLevel};
use vhost_user_daemon::log::Format;

use super::api::{default_expiry, default_timeout};

/// Shares the host's memory among all guests with a balloon.
///
/// Once a second, and when the kernel reports pressure, it looks at the host and at all balloons, decides how much
/// memory each guest should have, and tells the balloons. While the host has memory to spare, nothing is taken from any
/// guest.
///
/// A balloon is a request: a guest can refuse. Limit each virtual machine's cgroup (memory.high, memory.max) as well. KSM
/// does not help: it does not merge the guests' memory, which is shared with their devices.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ManageArgs {
    /// Something else than to manage.
    #[command(subcommand)]
    pub command: Option<ManageCommand>,

    /// How to manage.
    #[command(flatten)]
    pub live: LiveArgs,
}

/// Something else than to manage.
#[derive(Clone, Debug, Subcommand)]
pub enum ManageCommand {
    /// Show the host and the guests as a manager sees them
    Status(StatusArgs),
    /// Follow the events of a manager, one line of JSON each
    Events(ControlArgs),
    /// Have memory found for a virtual machine that is about to start
    ///
    /// Waits until the memory is there, and ends with status 0; it is kept until a guest of this name shows up. Ends with
    /// status 1 if the memory can never be there, or is not in time.
    Reserve(ReserveArgs),
    /// Check a configuration and its script
    Check(CheckArgs),
    /// Try a policy on a recording: what it would have decided, against what was done
    Replay(ReplayArgs),
    /// Compare policies in a simulation
    Simulate(SimulateArgs),
}

/// The flags of the live manager.
#[derive(Args, Clone, Debug, Default)]
pub struct LiveArgs {
    /// Manage the balloon whose control socket is at PATH (several times for several)
    ///
    /// The guest is called as the file, without .sock or .control. The socket is open to the daemon's user and to root: run
    /// the manager as one of them.
    #[arg(long, value_name = "PATH", help_heading = "Guests")]
    pub socket: Vec<PathBuf>,

    /// Manage all balloons whose control sockets are in the directory PATH: they may come and go
    ///
    /// Those are the sockets NAME.control and NAME.sock. Keep the sockets of the virtual machines' devices elsewhere.
    #[arg(long, value_name = "PATH", help_heading = "Guests")]
    pub directory: Option<PathBuf>,

    /// Configuration, a TOML file; SIGHUP reads it again
    #[arg(long, value_name = "PATH", help_heading = "Policy")]
    pub config: Option<PathBuf>,

    /// Decide, log and record, but send nothing to any balloon
    #[arg(long, help_heading = "Policy")]
    pub dry_run: bool,

    /// Give all guests all of their memory back at the end
    ///
    /// Otherwise the balloons keep their sizes.
    #[arg(long, help_heading = "Policy")]
    pub release_on_exit: bool,

    /// Answer requests on a UNIX socket that is created at PATH: HTTP with JSON, for the own user and root
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    pub control_socket: Option<PathBuf>,

    /// Serve metrics of the host and all guests, for Prometheus, on this TCP port: to everybody who reaches it
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = parse_listen, help_heading = "Control")]
    pub metrics_listen: Option<SocketAddr>,

    /// Record what was seen and decided, for "manage replay"
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    pub record: Option<PathBuf>,

    /// When the recording has this size, it becomes PATH.1, and a new one is begun
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "256M",
        value_parser = cli::parse_bytes,
        requires = "record",
        help_heading = "Control"
    )]
    pub record_size: u64,

    /// Log messages up to this level of detail [default: info]
    #[arg(long, value_name = "LEVEL", help_heading = "Logging")]
    pub log_level: Option<LogLevel>,

    /// Write the log, which goes to stderr, as lines of text or as JSON objects
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t, help_heading = "Logging")]
    pub log_format: Format,
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "write an address and a port, such as 127.0.0.1:9100 or [::]:9100".into())
}

impl LiveArgs {
    /// Starts the logger as these flags ask for.
    pub fn init_log(&self) {
        vhost_user_daemon::log::init(self.log_level.map(LevelFilter::from), self.log_format);
    }
}

/// Where the manager is.
#[derive(Args, Clone, Debug)]
pub struct ControlArgs {
    /// The manager's --control-socket
    #[arg(long, value_name = "PATH")]
    pub control_socket: PathBuf,
}

/// The flags of `status`.
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    /// Where the manager is.
    #[command(flatten)]
    pub control: ControlArgs,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The flags of `reserve`.
#[derive(Args, Clone, Debug)]
pub struct ReserveArgs {
    /// Where the manager is.
    #[command(flatten)]
    pub control: ControlArgs,

    /// What the guest will be called: the name of its control socket without .sock or .control
    #[arg(long)]
    pub name: String,

    /// The memory that it needs, such as 4G
    #[arg(value_name = "BYTES", value_parser = cli::parse_bytes, required_unless_present = "cancel")]
    pub bytes: Option<u64>,

    /// Wait for the memory for so long
    #[arg(long, value_name = "SECONDS", default_value_t = default_timeout())]
    pub timeout: u64,

    /// Keep it for so long for a guest that does not show up
    #[arg(long, value_name = "SECONDS", default_value_t = default_expiry())]
    pub expires: u64,

    /// End the reservation of this name instead
    #[arg(long, conflicts_with = "bytes")]
    pub cancel: bool,
}

/// The flags of `check`.
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// Configuration, a TOML file
    #[arg(long, value_name = "PATH")]
    pub config: PathBuf,
}

/// The flags of `replay`.
#[derive(Args, Clone, Debug)]
pub struct ReplayArgs {
    /// The recording
    #[arg(value_name = "FILE")]
    pub recording: PathBuf,

    /// Decide by this configuration instead of the recording's
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,

    /// Decide by this script
    #[arg(long, value_name = "PATH")]
    pub script: Option<PathBuf>,

    /// Print each decision as well
    #[arg(long)]
    pub decisions: bool,

    /// Print JSON, one line each
    #[arg(long)]
    pub json: bool,
}

/// The flags of `simulate`.
#[derive(Args, Clone, Debug)]
pub struct SimulateArgs {
    /// Take the parameters of the built-in policy, and the script if there is one, from this configuration
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,

    /// Compare with this script too
    #[arg(long, value_name = "PATH")]
    pub script: Option<PathBuf>,

    /// The loads are random, and the same for the same number
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, FromArgMatches, Parser};

    #[derive(Debug, Parser)]
    struct Main {
        #[command(subcommand)]
        command: Command,
    }

    #[derive(Debug, Subcommand)]
    enum Command {
        Manage(Box<ManageArgs>),
    }

    fn parse(arguments: &str) -> Result<ManageArgs, clap::Error> {
        let words = format!("x manage {arguments}");
        let matches = Main::command().try_get_matches_from(words.split_whitespace())?;
        let Command::Manage(args) = Main::from_arg_matches(&matches)?.command;
        Ok(*args)
    }

    #[test]
    fn the_definition_is_consistent() {
        Main::command().debug_assert();
    }

    #[test]
    fn managing_needs_no_word_of_its_own() {
        let args =
            parse("--socket a.sock --socket b.sock --directory d --record r --record-size 1G --dry-run")
                .unwrap();
        assert!(args.command.is_none() && args.live.dry_run);
        assert_eq!((args.live.socket.len(), args.live.record_size), (2, 1 << 30));
        assert_eq!(parse("--directory d").unwrap().live.record_size, 256 << 20);
        parse("--record-size 5").unwrap_err();
        parse("--record r --record-size much").unwrap_err();
    }

    #[test]
    fn other_words_have_their_own_flags() {
        let args = parse("reserve --control-socket M --name vm7 4G").unwrap();
        let Some(ManageCommand::Reserve(reserve)) = args.command else { panic!("{args:?}") };
        assert_eq!((reserve.bytes, reserve.timeout, reserve.expires), (Some(4 << 30), 60, 300));
        parse("reserve --control-socket M --name vm7 --cancel").unwrap();
        parse("reserve --control-socket M --name vm7").unwrap_err();
        parse("reserve --control-socket M --name vm7 --cancel 4G").unwrap_err();
        parse("--dry-run status --control-socket M").unwrap_err();
        for line in [
            "status --control-socket M --json",
            "events --control-socket M",
            "check --config f",
            "replay f --script s --json --decisions",
            "simulate --seed 5",
        ] {
            assert!(parse(line).unwrap().command.is_some(), "{line}");
        }
    }
}
