//! The command line.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use clap::builder::{TypedValueParser, ValueParserFactory};
use clap::{ArgGroup, Parser, ValueEnum, value_parser};
use macaddr::MacAddr6;
use vhost_user_daemon::cli::{self, Capabilities, DeviceType, MAX_QUEUES, QueueSizeArgs, ServiceArgs};
use vhost_user_daemon::throttle::Limits;

use crate::pcap::MAX_SNAP_LEN;
use crate::switch::PortOptions;
use crate::vnet::Offloads;

/// What `--print-capabilities` prints.
pub const CAPABILITIES: Capabilities = Capabilities { device_type: DeviceType::Net, features: &[] };

/// Serves network interfaces to virtual machines, as virtio network devices over vhost-user.
///
/// An interface is attached to a tap of the kernel (--tap, --tap-fd), to a program behind a UNIX socket (--stream for passt
/// and others), or to a switch between several virtual machines (--switch).
#[derive(Debug, Parser)]
#[command(
    version,
    mut_arg("queue_size", |arg| arg.default_value("1024")),
    group = ArgGroup::new("port").args(["tap", "tap_fd", "stream", "seqpacket", "dgram", "vde"]),
    group = ArgGroup::new("host").args(["tap", "tap_fd", "stream", "seqpacket", "dgram", "vde", "switch"]).multiple(true).required(true),
    after_long_help = cli::qemu_example(
        "vhost-user-net",
        "--tap tap0",
        "-netdev vhost-user,id=net0,chardev=vu0 -device virtio-net-pci,netdev=net0",
    )
)]
pub struct Args {
    /// Attach to the tap NAME, which is created if it does not exist, or to a macvtap
    ///
    /// A tap made beforehand needs no privilege: ip tuntap add dev NAME mode tap user USER vnet_hdr; with multi_queue
    /// behind it for more than one queue pair. To create one takes CAP_NET_ADMIN. For a macvtap, NAME is the interface
    /// or its device node /dev/tapN. With --switch it is the way out of the switch, as are the other ports.
    #[arg(long, value_name = "NAME", help_heading = "Port")]
    pub tap: Option<String>,

    /// Attach to the tap whose queues were inherited as file descriptors N
    ///
    /// For programs that open the tap themselves, with IFF_VNET_HDR and one file descriptor for each queue pair.
    #[arg(long, value_name = "N[,N...]", value_delimiter = ',', value_parser = value_parser!(RawFd).range(3..), help_heading = "Port")]
    pub tap_fd: Option<Vec<RawFd>>,

    /// Attach to the program that listens on the UNIX stream socket PATH: passt, gvproxy, QEMU's -netdev stream
    ///
    /// The daemon connects, tries again until somebody listens, and again when the connection is lost; the guest sees
    /// the link going down and up.
    #[arg(long, value_name = "PATH", help_heading = "Port")]
    pub stream: Option<PathBuf>,

    /// Attach to the program that listens on the UNIX sequential packet socket PATH: slirp4netns --target-type=bess
    #[arg(long, value_name = "PATH", help_heading = "Port")]
    pub seqpacket: Option<PathBuf>,

    /// Attach to the program that has the UNIX datagram socket PATH: gvproxy -listen-vfkit
    #[arg(long, value_name = "PATH", help_heading = "Port")]
    pub dgram: Option<PathBuf>,

    /// Attach to the VDE switch with the control directory PATH
    #[arg(long, value_name = "PATH", help_heading = "Port")]
    pub vde: Option<PathBuf>,

    /// Connect several virtual machines, one for each --socket-path, by a switch inside the daemon
    ///
    /// It learns addresses. The other flags for ports give it a way out.
    #[arg(long, requires = "socket_path", help_heading = "Port")]
    pub switch: bool,

    /// Listen on a UNIX socket that is created at PATH; with --switch once for each virtual machine
    ///
    /// The virtual machine monitor connects to it as the vhost-user front end. Only the user who runs the daemon may
    /// connect, unless --socket-group is given. PATH and a lock file next to it (PATH.lock) are removed when the daemon
    /// ends.
    ///
    /// Behind PATH, a port of a switch takes ",isolated=on" (it reaches only ports that are not isolated), ",vlan=N" (it
    /// belongs to VLAN N, without tags) and ",mac=ADDRESS" (it may send from this address only, and the guest is told to
    /// use it).
    ///
    /// Without --socket-path and --fd, the socket is taken from systemd (LISTEN_FDS): write a .socket unit with one
    /// ListenStream=.
    #[arg(long, value_name = "PATH", conflicts_with = "fd", help_heading = "Socket")]
    pub socket_path: Vec<PortSocket>,

    /// Connect to --socket-path, on which the virtual machine monitor listens, instead of listening on it
    ///
    /// For a monitor that is the server: QEMU with server=on for the chardev, DPDK's virtio-user with server=1. The
    /// daemon tries until somebody listens, and again when the connection has ended, unless --exit-on-disconnect is given.
    #[arg(long, requires = "socket_path", conflicts_with_all = ["fd", "socket_group"], help_heading = "Socket")]
    pub client: bool,

    /// Use the socket that was inherited as file descriptor N, listening or connected
    #[arg(long, value_name = "N", value_parser = value_parser!(RawFd).range(3..), conflicts_with = "switch", help_heading = "Socket")]
    pub fd: Option<RawFd>,

    /// Let members of GROUP (a name or a number) connect to --socket-path
    #[arg(long, value_name = "GROUP", requires = "socket_path", help_heading = "Socket")]
    pub socket_group: Option<String>,

    /// Hardware address that the guest shall use [default: that of the monitor or the guest's choice]
    ///
    /// QEMU has its own, mac= of the device, and does not ask.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_mac, conflicts_with = "switch", help_heading = "Interface")]
    pub mac: Option<[u8; 6]>,

    /// MTU that the guest shall use, and that a tap is set to, in bytes
    ///
    /// With QEMU also say host_mtu=N for the device.
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(68..), help_heading = "Interface")]
    pub mtu: Option<u16>,

    /// What guest and host may leave undone in a frame for the other side to do, if it can
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        value_enum,
        default_value = "all",
        help_heading = "Interface"
    )]
    pub offloads: Vec<OffloadChoice>,

    /// Limit what a guest receives, e.g. bytes=100M,packets=50k
    ///
    /// In each second; :N behind a number is the burst that may come at once. Frames wait in the port, or are dropped by a
    /// switch. k, M and G are powers of 1000, Ki, Mi and Gi of 1024. The limit is for each queue pair.
    #[arg(long, value_name = "LIMIT", help_heading = "Interface")]
    pub rate_limit_rx: Option<Limits>,

    /// Limit what a guest transmits, e.g. bytes=12500k:1M
    ///
    /// Frames wait in the guest.
    #[arg(long, value_name = "LIMIT", help_heading = "Interface")]
    pub rate_limit_tx: Option<Limits>,

    /// Record all frames in FILE, for Wireshark and tcpdump
    #[arg(long, value_name = "FILE", help_heading = "Interface")]
    pub pcap: Option<PathBuf>,

    /// Bytes of each frame to record
    #[arg(long, value_name = "N", default_value_t = MAX_SNAP_LEN, value_parser = value_parser!(u32).range(1..=i64::from(MAX_SNAP_LEN)), requires = "pcap", help_heading = "Interface")]
    pub pcap_snaplen: u32,

    /// Offer N pairs of queues, each served by a thread of its own
    ///
    /// A guest uses as many as the monitor says (queues= in QEMU), and that may not be more than this.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = value_parser!(u16).range(1..=i64::from(MAX_QUEUES - 1) / 2),
        help_heading = "Queues"
    )]
    pub num_queue_pairs: u16,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub queues: QueueSizeArgs,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub service: ServiceArgs,
}

/// The values of `--offloads`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OffloadChoice {
    /// Everything that the port can do
    All,
    /// Nothing
    None,
    /// Checksums of TCP and UDP; the others need it
    Csum,
    /// Segmentation of TCP
    Tso,
    /// Segmentation of UDP
    Uso,
    /// Fragmentation of UDP
    Ufo,
}

impl Args {
    /// What may be offered.
    pub fn offloads(&self) -> Offloads {
        self.offloads.iter().fold(Offloads::empty(), |offloads, choice| {
            offloads
                | match choice {
                    OffloadChoice::All => Offloads::all(),
                    OffloadChoice::None => Offloads::empty(),
                    OffloadChoice::Csum => Offloads::CSUM,
                    OffloadChoice::Tso => Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN,
                    OffloadChoice::Uso => Offloads::CSUM | Offloads::USO4 | Offloads::USO6,
                    OffloadChoice::Ufo => Offloads::CSUM | Offloads::UFO,
                }
        })
    }
}

/// A socket, and what the port of a switch behind it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSocket {
    /// The path.
    pub path: PathBuf,
    /// What is written behind it.
    pub options: PortOptions,
}

impl ValueParserFactory for PortSocket {
    type Parser = PortSocketParser;

    fn value_parser() -> PortSocketParser {
        PortSocketParser
    }
}

/// Parses `PATH[,isolated=on][,vlan=N][,mac=ADDRESS]`.
#[derive(Clone)]
pub struct PortSocketParser;

impl TypedValueParser for PortSocketParser {
    type Value = PortSocket;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<PortSocket, clap::Error> {
        let invalid = |reason: String| {
            let flag = arg.map_or_else(String::new, ToString::to_string);
            let text = format!("invalid value '{}' for '{flag}': {reason}\n", value.to_string_lossy());
            clap::Error::raw(clap::error::ErrorKind::ValueValidation, text).with_cmd(command)
        };
        let mut pieces = value.as_bytes().split(|byte| *byte == b',').peekable();
        let mut path = pieces.next().unwrap_or_default().to_vec();
        let mut options = PortOptions::default();
        for piece in pieces {
            let text = String::from_utf8_lossy(piece);
            match text.split_once('=') {
                Some(("isolated", "on")) => options.isolated = true,
                Some(("isolated", "off")) => options.isolated = false,
                Some(("isolated", _)) => return Err(invalid("isolated= takes on or off".into())),
                Some(("vlan", id)) => {
                    let id = id.parse().ok().filter(|id| (1..=4094).contains(id));
                    options.vlan =
                        Some(id.ok_or_else(|| invalid("vlan= takes a number from 1 to 4094".into()))?);
                }
                Some(("mac", mac)) => options.mac = Some(parse_mac(mac).map_err(invalid)?),
                Some((key, _)) if key.bytes().all(|byte| byte.is_ascii_lowercase()) => {
                    return Err(invalid(format!("{key}= is none of isolated=, vlan= and mac=")));
                }
                // A comma may be part of the path.
                _ if options == PortOptions::default() => {
                    path.push(b',');
                    path.extend_from_slice(piece);
                }
                _ => return Err(invalid(format!("{text} is none of isolated=, vlan= and mac="))),
            }
        }
        if path.is_empty() {
            return Err(invalid("a path is needed".into()));
        }
        Ok(PortSocket { path: OsString::from_vec(path).into(), options })
    }
}

/// Parses a hardware address of one interface.
fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let mac: MacAddr6 =
        text.parse().map_err(|_| format!("'{text}' is no address such as 52:54:00:12:34:56"))?;
    if mac.is_multicast() || mac.is_nil() {
        return Err(format!(
            "{mac} is not the address of one interface: the first byte must be even, and not all zero"
        ));
    }
    Ok(mac.into_array())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost_user_daemon::cli::command;

    fn parse(arguments: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["vhost-user-net"], arguments].concat())
    }

    #[test]
    fn the_definition_is_consistent() {
        command::<Args>().debug_assert();
    }

    #[test]
    fn a_port_is_needed_and_only_one() {
        assert!(parse(&["--socket-path=s"]).unwrap_err().to_string().contains("--tap"));
        assert!(parse(&["--socket-path=s", "--tap=a", "--stream=b"]).is_err());
        let args = parse(&["--socket-path=s", "--tap=a"]).unwrap();
        assert_eq!((args.num_queue_pairs, args.queues.queue_size), (1, 1024));
        assert_eq!(args.offloads(), Offloads::all());
    }

    #[test]
    fn ports_of_a_switch() {
        let args = parse(&[
            "--switch",
            "--socket-path=/run/a,b.sock",
            "--socket-path=/run/c.sock,isolated=on,vlan=7,mac=52:54:00:00:00:01",
            "--tap=up0",
        ])
        .unwrap();
        assert_eq!(args.socket_path[0].path, PathBuf::from("/run/a,b.sock"));
        let options = args.socket_path[1].options;
        assert_eq!(
            options,
            PortOptions { isolated: true, vlan: Some(7), mac: Some([0x52, 0x54, 0, 0, 0, 1]) }
        );
        for wrong in [
            "s,vlan=0",
            "s,vlan=4095",
            "s,isolated=maybe",
            "s,mac=01:00:00:00:00:00",
            "s,vlan=1,x",
            "s,isolate=on",
            "",
        ] {
            let message = parse(&["--switch", &format!("--socket-path={wrong}")]).unwrap_err().to_string();
            assert!(message.contains("--socket-path"), "{message}");
        }
        assert!(parse(&["--switch"]).is_err());
    }

    #[test]
    fn offloads_bring_what_they_need() {
        let args = parse(&["--tap=a", "--offloads=tso"]).unwrap();
        assert_eq!(args.offloads(), Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN);
        assert_eq!(parse(&["--tap=a", "--offloads=none"]).unwrap().offloads(), Offloads::empty());
    }

    #[test]
    fn bounds_are_enforced() {
        for wrong in [
            "--mtu=67",
            "--mtu=65536",
            "--num-queue-pairs=0",
            "--num-queue-pairs=32",
            "--mac=x",
            "--tap-fd=2",
        ] {
            assert!(parse(&["--tap=a", wrong]).is_err(), "{wrong}");
        }
    }
}
