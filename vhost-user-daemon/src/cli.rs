//! The command line that all daemons share, spelled once.
//!
//! It follows "Backend program conventions" of QEMU's `docs/interop/vhost-user.rst`, which libvirt relies on:
//! `--socket-path` or `--fd`, `--print-capabilities`, no daemonizing, and an early exit with one line on stderr and
//! a status other than 0 when something is wrong.
//!
//! A daemon flattens what it needs into its own flags:
//!
//! ```
//! use vhost_user_daemon::cli::{self, Capabilities, CommonArgs, DeviceType, QueueArgs};
//!
//! const CAPABILITIES: Capabilities =
//!     Capabilities { device_type: DeviceType::Block, features: &["read-only", "blk-file"] };
//!
//! /// Serves a disk image to a virtual machine.
//! #[derive(clap::Parser)]
//! #[command(
//!     version,
//!     after_long_help = cli::qemu_example(
//!         "vhost-user-blk",
//!         "--blk-file disk.img",
//!         "-device vhost-user-blk-pci,chardev=vu0",
//!     )
//! )]
//! struct Args {
//!     #[command(flatten)]
//!     common: CommonArgs,
//!     #[command(flatten)]
//!     queues: QueueArgs,
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     # if true { return std::process::ExitCode::SUCCESS }
//!     let args: Args = cli::parse(&CAPABILITIES);
//!     match serve(&args) {
//!         Ok(()) => std::process::ExitCode::SUCCESS,
//!         Err(error) => cli::fail(&error),
//!     }
//! }
//! # fn serve(_: &Args) -> Result<(), std::io::Error> { Ok(()) }
//! ```

mod args;

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{self, ExitCode};

use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches};
use serde::Serialize;

pub use args::{
    CommonArgs, ControlArgs, LogLevel, MAX_QUEUE_SIZE, MAX_QUEUES, QueueArgs, QueueSizeArgs, ServiceArgs,
    SocketArgs,
};

const PRINT_CAPABILITIES: &str = "print-capabilities";

/// What `--print-capabilities` tells management software: `VHostUserBackendCapabilities` of QEMU's
/// `docs/interop/vhost-user.json`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Capabilities {
    /// The device that the daemon implements.
    #[serde(rename = "type")]
    pub device_type: DeviceType,
    /// The optional flags of the convention for this device type that the daemon has. Only `block` has any:
    /// `read-only` and `blk-file`. Printed even if empty, because libvirt wants an array.
    pub features: &'static [&'static str],
}

/// The values of QEMU's `VHostUserBackendType` that the daemons of this workspace need.
///
/// No other name may be made up: libvirt refuses every installed backend when one has a type that it does not know.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceType {
    /// virtio-9p
    #[serde(rename = "9p")]
    NineP,
    /// virtio-balloon
    Balloon,
    /// virtio-blk
    Block,
    /// virtio-net
    Net,
}

/// Parses a size of memory: digits with one of the suffixes `k`, `M`, `G`, `T`, which are powers of 1024, as everywhere
/// where memory is sold. `MiB` and the like mean the same.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|_| "write a number of bytes, or one with a suffix such as 512M or 4G".into())
}

/// The `Command` of a daemon: its own flags and those that [`parse`] answers itself. Man pages are made from it.
pub fn command<A: CommandFactory>() -> Command {
    A::command().arg(
        Arg::new(PRINT_CAPABILITIES)
            .long(PRINT_CAPABILITIES)
            .action(ArgAction::SetTrue)
            .help("Print the device type and optional features as JSON, and exit")
            .long_help(
                "Print the device type and optional features as JSON, and exit\n\n\
                 For management software (QEMU's docs/interop/vhost-user.json). All other arguments are ignored.",
            ),
    )
}

/// Parses the process's command line, and ends the process where that is all there is to do.
///
/// `--print-capabilities`, wherever it stands and whatever surrounds it, prints `capabilities` on stdout and exits
/// with status 0, as do `--help` and `--version`. A bad command line prints one line on stderr and exits with
/// status 1.
pub fn parse<A: CommandFactory + FromArgMatches>(capabilities: &Capabilities) -> A {
    match parse_from(std::env::args_os().collect(), capabilities) {
        Ok(args) => args,
        Err(Outcome::Print(text)) => {
            // Nobody is left to be told when stdout is closed; the status says it.
            let written = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
            process::exit(i32::from(written.is_err()))
        }
        Err(Outcome::Fail(message)) => {
            complain(&message);
            process::exit(1)
        }
    }
}

/// Why [`parse`] does not return.
#[derive(Debug, PartialEq)]
enum Outcome {
    Print(String),
    Fail(String),
}

fn parse_from<A>(arguments: Vec<OsString>, capabilities: &Capabilities) -> Result<A, Outcome>
where
    A: CommandFactory + FromArgMatches,
{
    let flag = format!("--{PRINT_CAPABILITIES}");
    if arguments.iter().skip(1).any(|argument| argument == flag.as_str()) {
        let mut json =
            serde_json::to_string(capabilities).map_err(|error| Outcome::Fail(error.to_string()))?;
        json.push('\n');
        return Err(Outcome::Print(json));
    }
    let mut command = command::<A>();
    command
        .try_get_matches_from_mut(arguments)
        .and_then(|matches| A::from_arg_matches(&matches))
        .map_err(|error| outcome(&error))
}

fn outcome(error: &clap::Error) -> Outcome {
    let text = error.render();
    if error.use_stderr() {
        Outcome::Fail(one_line(&text.to_string()))
    } else {
        Outcome::Print(text.to_string())
    }
}

/// Makes one line of clap's message: what is wrong, then its tips. Usage is left to `--help`.
///
/// clap writes paragraphs: "error: ...", any number of "  tip: ...", "Usage: ...", "For more information, ...".
fn one_line(message: &str) -> String {
    let mut paragraphs =
        message.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    let what = paragraphs.next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let mut line = capitalized(what);
    for tip in paragraphs.filter_map(|paragraph| paragraph.strip_prefix("tip: ").map(str::to_owned)) {
        let _ = write!(line, "; {tip}");
    }
    line.push_str(" (try --help)");
    line
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().into_iter().flat_map(char::to_uppercase).chain(chars).collect()
}

/// Reports the error that ends a daemon as one line on stderr, `program: what: why`, and returns status 1.
///
/// The line is text whatever `--log-format` and `--log-level` say, because management software shows it to its
/// user. Return the value from `main` rather than exiting, so that the socket is cleaned up on the way out:
/// `anyhow` errors are passed as `cli::fail(&*error)`.
pub fn fail(error: &(dyn Error + 'static)) -> ExitCode {
    complain(&chain(error));
    ExitCode::FAILURE
}

/// An error and its sources, separated by colons, on one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn complain(message: &str) {
    let name = std::env::args_os().next();
    // A stderr that is closed leaves only the exit status.
    let _ = writeln!(io::stderr(), "{}: {message}", program_name(name.as_deref()));
}

/// The name by which a program was called, without its directory.
fn program_name(called: Option<&OsStr>) -> String {
    let name = called.map(Path::new).and_then(Path::file_name);
    name.map_or_else(|| "vhost-user".into(), |name| name.to_string_lossy().into_owned())
}

/// Text for a daemon's `after_long_help`: how to run `daemon` with its own `flags`, and QEMU with `device`, which
/// refers to the socket as chardev `vu0`.
pub fn qemu_example(daemon: &str, flags: &str, device: &str) -> String {
    // QEMU's generic device does not wait for a connection, and with it refuses to start (11.1).
    let reconnect = if device.contains("vhost-user-test-device") { "" } else { ",reconnect-ms=1000" };
    format!(
        "Example (the guest's memory must be shared with the daemon, hence the memory-backend-memfd):

  {daemon} --socket-path /tmp/vu0.sock {flags} &
  qemu-system-x86_64 -accel kvm -machine q35,memory-backend=mem0 -m 1G \\
    -object memory-backend-memfd,id=mem0,size=1G,share=on \\
    -chardev socket,id=vu0,path=/tmp/vu0.sock{reconnect} \\
    {device}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Error as IoError;
    use std::path::PathBuf;

    const CAPABILITIES: Capabilities =
        Capabilities { device_type: DeviceType::Block, features: &["read-only", "blk-file"] };

    /// Serves a disk image to a virtual machine.
    #[derive(clap::Parser, Debug)]
    #[command(
        name = "vhost-user-blk",
        version = "1.2.3",
        after_long_help = qemu_example("vhost-user-blk", "--blk-file a.img", "-device vhost-user-blk-pci,chardev=vu0")
    )]
    struct TestArgs {
        #[command(flatten)]
        common: CommonArgs,
        #[command(flatten)]
        queues: QueueArgs,
        /// The disk image
        #[arg(long, value_name = "PATH")]
        blk_file: PathBuf,
    }

    fn parse(arguments: &[&str]) -> Result<TestArgs, Outcome> {
        let arguments = ["/usr/bin/vhost-user-blk"].iter().chain(arguments).map(OsString::from).collect();
        parse_from(arguments, &CAPABILITIES)
    }

    fn parse_with_file(arguments: &[&str]) -> Result<TestArgs, Outcome> {
        parse(&[&["--blk-file", "a.img"], arguments].concat())
    }

    #[track_caller]
    fn failure(arguments: &[&str]) -> String {
        match parse_with_file(arguments) {
            Err(Outcome::Fail(message)) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        command::<TestArgs>().debug_assert();
    }

    #[test]
    fn capabilities_are_printed_whatever_else_is_given() {
        let expected = "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n";
        for arguments in [
            &["--print-capabilities"][..],
            &["--no-such-flag", "--print-capabilities"],
            &["--print-capabilities", "--fd=x", "--socket-path=a"],
            &["--socket-path", "--print-capabilities"],
            &["--help", "--print-capabilities"],
            &["--", "--print-capabilities"],
        ] {
            assert_eq!(parse(arguments).unwrap_err(), Outcome::Print(expected.into()), "{arguments:?}");
        }
    }

    #[test]
    fn device_types_are_those_of_qemu() {
        let names = [DeviceType::NineP, DeviceType::Balloon, DeviceType::Block, DeviceType::Net]
            .map(|device_type| serde_json::to_string(&Capabilities { device_type, features: &[] }).unwrap());
        assert_eq!(
            names,
            ["9p", "balloon", "block", "net"].map(|name| format!(r#"{{"type":"{name}","features":[]}}"#))
        );
    }

    #[test]
    fn bad_flags_are_named_on_one_line() {
        assert_eq!(
            failure(&["--num-queue", "2"]),
            "Unexpected argument '--num-queue' found; a similar argument exists: '--num-queues' (try --help)"
        );
        assert_eq!(
            failure(&["--log-level", "loud"]),
            "Invalid value 'loud' for '--log-level <LEVEL>' [possible values: off, error, warn, info, debug, trace] \
             (try --help)"
        );
        assert_eq!(
            failure(&["--socket-path=a", "--fd=3"]),
            "The argument '--socket-path <PATH>' cannot be used with '--fd <N>' (try --help)"
        );
        assert_eq!(
            failure(&["--socket-group=kvm"]),
            "The following required arguments were not provided: --socket-path <PATH> (try --help)"
        );
        assert_eq!(
            parse(&[]).unwrap_err(),
            Outcome::Fail(
                "The following required arguments were not provided: --blk-file <PATH> (try --help)".into()
            )
        );
    }

    #[test]
    fn help_and_version_are_not_errors() {
        let Err(Outcome::Print(help)) = parse(&["--help"]) else { panic!("no help") };
        for part in [
            "Socket:",
            "Queues:",
            "Logging:",
            "--print-capabilities",
            "[default: one for each CPU of the host, at most 16]",
            "share=on",
        ] {
            assert!(help.contains(part), "{part} is missing:\n{help}");
        }
        assert_eq!(parse(&["--version"]).unwrap_err(), Outcome::Print("vhost-user-blk 1.2.3\n".into()));
    }

    #[test]
    fn an_error_chain_is_one_line() {
        #[derive(Debug, thiserror::Error)]
        #[error("Cannot open a.img,\n  the disk image")]
        struct Outer(#[source] IoError);
        let error = Outer(IoError::from_raw_os_error(2));
        assert_eq!(
            chain(&error),
            "Cannot open a.img, the disk image: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn the_program_is_named_without_its_directory() {
        assert_eq!(program_name(Some(OsStr::new("/usr/libexec/vhost-user-blk"))), "vhost-user-blk");
        assert_eq!(program_name(Some(OsStr::new(""))), "vhost-user");
        assert_eq!(program_name(None), "vhost-user");
    }
}
