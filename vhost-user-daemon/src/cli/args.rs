//! The flags that daemons share.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Args, ValueEnum, value_parser};
use log::LevelFilter;

use crate::log::Format;
use crate::socket::{Socket, SocketError};

/// Queues that a daemon can serve at most: `vhost-user-backend` assigns queues to workers by a mask of 64 bits.
pub const MAX_QUEUES: u16 = 64;

/// Entries that a queue can have at most. The virtio specification allows 32768, QEMU and the other front ends 1024.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// The flags of a daemon that serves one device: where it gets its socket from, what it logs, and when it ends.
#[derive(Args, Clone, Debug, Default)]
pub struct CommonArgs {
    /// The flags about the socket.
    #[command(flatten)]
    pub socket: SocketArgs,

    /// The flags about everything else.
    #[command(flatten)]
    pub service: ServiceArgs,
}

/// Where a daemon gets its one socket from: [`Socket::from_args`](crate::socket::Socket::from_args).
///
/// A daemon with several sockets has flags of its own for them, and flattens [`ServiceArgs`].
#[expect(clippy::doc_markdown, reason = "--help shows these comments as they are")]
#[derive(Args, Clone, Debug, Default)]
pub struct SocketArgs {
    /// Listen on a UNIX socket that is created at PATH
    ///
    /// The virtual machine monitor connects to it as the vhost-user front end. Only the user who runs the daemon
    /// may connect, unless --socket-group is given. PATH and a lock file next to it (PATH.lock) are removed when the
    /// daemon ends; a socket that a killed daemon left behind is replaced, one that is in use is not.
    ///
    /// Without --socket-path and --fd, the socket is taken from systemd (LISTEN_FDS): write a .socket unit with one
    /// ListenStream=.
    #[arg(long, value_name = "PATH", conflicts_with = "fd", help_heading = "Socket")]
    pub socket_path: Option<PathBuf>,

    /// Connect to --socket-path, on which the virtual machine monitor listens, instead of listening on it
    ///
    /// For a monitor that is the server: QEMU with server=on for the chardev, DPDK's virtio-user with server=1. The
    /// daemon tries until somebody listens, and again when the connection has ended, unless --exit-on-disconnect is
    /// given. It neither makes nor removes files.
    #[arg(long, requires = "socket_path", conflicts_with_all = ["fd", "socket_group"], help_heading = "Socket")]
    pub client: bool,

    /// Use the socket that was inherited as file descriptor N
    ///
    /// For programs that start the daemon and prepare its socket, such as libvirt. N is a UNIX stream socket that
    /// either listens or is already connected to the front end; the daemon sees which. Numbers 0 to 2 are the standard
    /// streams.
    #[arg(long, value_name = "N", value_parser = value_parser!(RawFd).range(3..), help_heading = "Socket")]
    pub fd: Option<RawFd>,

    /// Let members of GROUP (a name or a number) connect to --socket-path
    #[arg(long, value_name = "GROUP", requires = "socket_path", help_heading = "Socket")]
    pub socket_group: Option<String>,
}

/// Where a daemon can be asked and told things while it serves: [`control`](crate::control).
#[expect(clippy::doc_markdown, reason = "--help shows these comments as they are")]
#[derive(Args, Clone, Debug, Default)]
pub struct ControlArgs {
    /// Listen for commands on a UNIX socket that is created at PATH
    ///
    /// It speaks HTTP and JSON, so that scripts can use it as well: curl --unix-socket PATH http://localhost/healthz.
    /// Only the user who runs the daemon and root may connect. As with --socket-path, PATH and PATH.lock are removed
    /// when the daemon ends, and a socket that is in use is not replaced. It is another socket than --socket-path, on
    /// which virtual machine monitors connect.
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    pub control_socket: Option<PathBuf>,
}

impl ControlArgs {
    /// Listens on the socket, if there is to be one. Call it before the [sandbox](crate::sandbox) closes, and give it
    /// to the sandbox.
    pub fn open(&self) -> Result<Option<Socket>, SocketError> {
        self.control_socket.as_deref().map(Socket::open_private).transpose()
    }
}

/// When a daemon ends and what it logs, however many sockets it has.
#[expect(clippy::doc_markdown, reason = "--help shows these comments as they are")]
#[derive(Args, Clone, Debug, Default)]
pub struct ServiceArgs {
    /// Exit after the first front end has disconnected
    ///
    /// By default the daemon waits for the next one, so that a virtual machine can be restarted on its own. A
    /// connected socket given by --fd ends the daemon with its connection in any case.
    #[arg(long, help_heading = "Socket")]
    pub exit_on_disconnect: bool,

    /// Log messages up to this level of detail [default: info]
    ///
    /// If it is not given, the environment variable RUST_LOG can select levels by module, e.g.
    /// RUST_LOG=info,vhost_user_daemon::link=debug.
    #[arg(long, value_name = "LEVEL", help_heading = "Logging")]
    pub log_level: Option<LogLevel>,

    /// Write the log, which goes to stderr, as lines of text or as JSON objects
    ///
    /// A JSON object has the members ts, level, target and message, and takes one line.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t, help_heading = "Logging")]
    pub log_format: Format,
}

impl ServiceArgs {
    /// Starts the logger as these flags ask for; see [`log::init`](crate::log::init).
    pub fn init_log(&self) {
        crate::log::init(self.log_level.map(LevelFilter::from), self.log_format);
    }
}

/// The values of `--log-level`, from the least to the most talkative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "each is the level of the same name of the `log` crate")]
pub enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::Off,
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

/// How many queues a daemon offers and how long they are.
///
/// A device that does not count single queues flattens [`QueueSizeArgs`] and has a flag of its own.
#[derive(Args, Clone, Debug)]
pub struct QueueArgs {
    /// Offer up to N queues [default: one for each CPU of the host, at most 16]
    ///
    /// A guest uses as many as it has virtual CPUs, or as the front end says (num-queues= in QEMU), and that may not
    /// be more than this. Each is served by a thread of its own.
    #[arg(
        long,
        value_name = "N",
        default_value_t = default_queues(),
        hide_default_value = true,
        value_parser = value_parser!(u16).range(1..=i64::from(MAX_QUEUES)),
        help_heading = "Queues"
    )]
    pub num_queues: u16,

    /// The flags about a queue's length.
    #[command(flatten)]
    pub size: QueueSizeArgs,
}

/// How long the queues of a daemon are.
#[derive(Args, Clone, Debug)]
pub struct QueueSizeArgs {
    /// Offer queues of up to N entries, a power of two
    ///
    /// Longer queues keep more requests in flight; the front end may choose shorter ones.
    #[arg(long, value_name = "N", default_value = "256", value_parser = queue_size, help_heading = "Queues")]
    pub queue_size: u16,
}

/// Guests seldom have more virtual CPUs than their host has real ones, and a queue that is not used costs a thread.
fn default_queues() -> u16 {
    const MOST: usize = 16;
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MOST) as u16)
}

/// Parses `--queue-size`. The split ring of the virtio specification needs a power of two.
fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if (2..=MAX_QUEUE_SIZE).contains(&size) && size.is_power_of_two() => Ok(size),
        _ => Err(format!("a power of two from 2 to {MAX_QUEUE_SIZE} is needed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::path::Path;

    #[derive(Parser, Debug)]
    struct TestArgs {
        #[command(flatten)]
        common: CommonArgs,
        #[command(flatten)]
        queues: QueueArgs,
        #[command(flatten)]
        control: ControlArgs,
    }

    fn parse(arguments: &[&str]) -> Result<TestArgs, clap::Error> {
        TestArgs::try_parse_from([&["daemon"], arguments].concat())
    }

    #[track_caller]
    fn failure(arguments: &[&str]) -> String {
        parse(arguments).unwrap_err().to_string()
    }

    #[test]
    fn defaults() {
        let args = parse(&[]).unwrap();
        let CommonArgs { socket, service } = args.common;
        assert_eq!(socket.socket_path, None);
        assert_eq!(socket.fd, None);
        assert!(!socket.client);
        assert_eq!(service.log_level, None);
        assert_eq!(service.log_format, Format::Text);
        assert!(!service.exit_on_disconnect);
        assert_eq!(args.control.control_socket, None);
        assert!(args.control.open().unwrap().is_none());
        assert!((1..=16).contains(&args.queues.num_queues));
        assert_eq!(args.queues.size.queue_size, 256);
    }

    #[test]
    fn every_flag_is_taken() {
        let args = parse(&[
            "--socket-path=/run/x.sock",
            "--socket-group=kvm",
            "--log-level=off",
            "--log-format=json",
            "--exit-on-disconnect",
            "--num-queues=8",
            "--queue-size=1024",
            "--control-socket=/run/x.control",
        ])
        .unwrap();
        assert_eq!(args.control.control_socket.as_deref(), Some(Path::new("/run/x.control")));
        let CommonArgs { socket, service } = args.common;
        assert_eq!(socket.socket_path.as_deref(), Some(Path::new("/run/x.sock")));
        assert_eq!(socket.socket_group.as_deref(), Some("kvm"));
        assert_eq!(service.log_level, Some(LogLevel::Off));
        assert_eq!(service.log_format, Format::Json);
        assert!(service.exit_on_disconnect);
        assert_eq!(args.queues.num_queues, 8);
        assert_eq!(args.queues.size.queue_size, 1024);
        assert_eq!(parse(&["--fd=7"]).unwrap().common.socket.fd, Some(7));
        assert!(parse(&["--socket-path=/run/x.sock", "--client"]).unwrap().common.socket.client);
    }

    #[test]
    fn a_client_needs_a_path_and_nothing_else() {
        assert!(failure(&["--client"]).contains("--socket-path <PATH>"));
        for other in ["--fd=3", "--socket-group=kvm"] {
            let message = failure(&["--client", other, "--socket-path=/run/x.sock"]);
            assert!(message.contains("cannot be used with"), "{message}");
        }
    }

    #[test]
    fn bounds_are_enforced() {
        for size in ["0", "1", "3", "2048", "65536", "-2", "x", ""] {
            let message = failure(&[&format!("--queue-size={size}")]);
            assert!(message.contains("--queue-size"), "{message}");
        }
        assert!(failure(&["--queue-size=3"]).contains("a power of two from 2 to 1024 is needed"));
        for count in ["0", "65", "-1", "65537"] {
            assert!(failure(&[&format!("--num-queues={count}")]).contains("1..=64"));
        }
        for fd in ["-1", "0", "2", "2147483648", "x"] {
            assert!(failure(&[&format!("--fd={fd}")]).contains("--fd"));
        }
        assert!(failure(&["--socket-path="]).contains("--socket-path"));
    }
}
