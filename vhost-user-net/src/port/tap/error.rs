//! Why there is no tap, each case with what would help.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be that of an interface.
    #[error(
        "Interface name {name:?} is not valid: use 1 to 15 characters without spaces, '/', ':' and '%', or the path of \
         a macvtap device"
    )]
    Name {
        /// The name.
        name: String,
    },

    /// The kernel has no tun driver, or the container has no device node.
    #[error(
        "/dev/net/tun does not exist: load the driver with `sudo modprobe tun`; in a container, pass it on with \
         `--device /dev/net/tun`"
    )]
    NoTun,

    /// A device node of a macvtap interface is missing.
    #[error(
        "{} does not exist: create the interface with `sudo ip link add link UPLINK name NAME type macvtap mode bridge`; \
         in a container, pass its device on with `--device /dev/tapN`, N being the interface's index",
        path.display()
    )]
    NoMacvtap {
        /// The path of the node.
        path: PathBuf,
    },

    /// The device node belongs to somebody else, or the container's rules forbid it.
    #[error(
        "No permission to open {path}: allow it with `sudo setfacl -m u:$USER:rw {path}`; in a container, pass it on with \
         `--device {path}`",
        path = path.display()
    )]
    Denied {
        /// The path of the node.
        path: PathBuf,
    },

    /// The device node cannot be opened for another reason.
    #[error("Cannot open {}", path.display())]
    Open {
        /// The path of the node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// Interfaces are created by the privileged only.
    #[error(
        "Creating tap {name} needs CAP_NET_ADMIN: create it beforehand with `sudo ip tuntap add dev {name} mode tap user \
         $USER vnet_hdr{}` and `sudo ip link set {name} up`",
        multi_queue(*.queues)
    )]
    CreateDenied {
        /// The name of the interface.
        name: String,
        /// Queue pairs wanted.
        queues: usize,
    },

    /// The interface was made for another user.
    #[error(
        "Tap {name} belongs to another user: run the daemon as that user or with CAP_NET_ADMIN, or create the tap again \
         with `sudo ip tuntap del dev {name} mode tap{multi_queue}` and `sudo ip tuntap add dev {name} mode tap user \
         $USER vnet_hdr{multi_queue}`",
        multi_queue = multi_queue(*.queues)
    )]
    AttachDenied {
        /// The name of the interface.
        name: String,
        /// Queue pairs wanted.
        queues: usize,
    },

    /// A tap with one queue has its one user already.
    #[error("Tap {name} is in use by another process: stop that or choose another tap")]
    InUse {
        /// The name of the interface.
        name: String,
    },

    /// The interface is of another kind.
    #[error("Interface {name} is {kind}, not a tap: choose another name, or attach a tap to it by a bridge")]
    NotTap {
        /// The name of the interface.
        name: String,
        /// What it is.
        kind: String,
    },

    /// More than one queue is wanted of a tap that has one.
    #[error(
        "Tap {name} was created without multi_queue and has 1 queue, {queues} are wanted: create it again with `sudo ip \
         tuntap del dev {name} mode tap` and `sudo ip tuntap add dev {name} mode tap user $USER vnet_hdr multi_queue`, \
         or use one queue pair"
    )]
    SingleQueue {
        /// The name of the interface.
        name: String,
        /// Queue pairs wanted.
        queues: usize,
    },

    /// The interface has no room for so many queues.
    #[error(
        "Tap {name} has no room for {queues} queues (256 with those of other processes): use fewer queue pairs"
    )]
    TooManyQueues {
        /// The name of the interface.
        name: String,
        /// Queue pairs wanted.
        queues: usize,
    },

    /// The interface already passes frames in another format, to another process.
    #[error(
        "Tap {name} is in use by a process that opened it without IFF_VNET_HDR or IFF_NO_PI: stop that or choose another \
         tap"
    )]
    NoHeader {
        /// The name of the interface.
        name: String,
    },

    /// No descriptor at all.
    #[error("No file descriptor is given: pass one for each queue of the tap")]
    NoFd,

    /// The descriptor is another kind of file.
    #[error("File descriptor {fd} is not a tap: open /dev/net/tun (or a macvtap device) for it")]
    FdNotTap {
        /// Its number.
        fd: RawFd,
    },

    /// `/dev/net/tun` without a `TUNSETIFF`, or the interface is gone.
    #[error(
        "File descriptor {fd} belongs to no interface: attach it to a tap with TUNSETIFF before it is passed"
    )]
    FdUnattached {
        /// Its number.
        fd: RawFd,
    },

    /// The flags of `TUNSETIFF` do not fit.
    #[error(
        "File descriptor {fd} (interface {name}) was opened {problem}: the flags of TUNSETIFF must be {}",
        if *.queues > 1 { "IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE for several queues" }
        else { "IFF_TAP | IFF_NO_PI | IFF_VNET_HDR" }
    )]
    FdFlags {
        /// Its number.
        fd: RawFd,
        /// The name of the interface.
        name: String,
        /// What is wrong, such as "without IFF_VNET_HDR".
        problem: &'static str,
        /// How many descriptors there are.
        queues: usize,
    },

    /// The descriptors are queues of several interfaces.
    #[error(
        "File descriptor {fd} is a queue of interface {name}, others are of {other}: pass queues of one interface"
    )]
    FdInterface {
        /// Its number.
        fd: RawFd,
        /// Its interface.
        name: String,
        /// The interface of the first.
        other: String,
    },

    /// The MTU cannot be set.
    #[error(
        "Cannot set the MTU of {name} to {mtu}: set it beforehand with `sudo ip link set {name} mtu {mtu}`"
    )]
    Mtu {
        /// The name of the interface.
        name: String,
        /// Bytes.
        mtu: u16,
        /// Why.
        source: io::Error,
    },

    /// A new interface does not come up.
    #[error("Cannot bring tap {name} up")]
    Up {
        /// The name of the interface.
        name: String,
        /// Why.
        source: io::Error,
    },

    /// The kernel refuses for a reason that has no remedy known here.
    #[error("Cannot set up tap {name} ({call})")]
    Setup {
        /// The name of the interface.
        name: String,
        /// The system call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The word that `ip tuntap` wants for a tap with several queues.
fn multi_queue(queues: usize) -> &'static str {
    if queues > 1 { " multi_queue" } else { "" }
}
