//! From the command line to interfaces that are served.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, bail};
use log::info;
use vhost_user_daemon::serve::{Served, serve_all};
use vhost_user_daemon::socket::{Socket, SocketOptions, inherited_fd};
use vhost_user_daemon::{ConfigNotifier, ServeOptions, hold_signals};

use crate::args::{Args, OffloadChoice, PortSocket};
use crate::counters::Counters;
use crate::device::{Attachment, Nic, NicOptions};
use crate::pcap::Capture;
use crate::port::peer::{Address, Peer};
use crate::port::tap::{LinkMonitor, Tap, TapOptions};
use crate::switch::{Member, PortOptions, SwitchBuilder, Uplink, UplinkPort};

/// An interface, and all that belongs to it.
struct Interface {
    nic: Arc<Nic>,
    notifier: ConfigNotifier,
    name: String,
}

/// Opens what the command line names, and serves it until the daemon is asked to end.
pub fn run(args: &Args) -> anyhow::Result<()> {
    args.service.init_log();
    check(args)?;
    let port = if has_port(args) { Some(open_port(args)?) } else { None };
    hold_signals().context("Signals cannot be held back")?;
    let sockets = sockets(args)?;
    // Last, as it empties the file.
    let capture = match &args.pcap {
        Some(path) => Some(Arc::new(Capture::create(path, args.pcap_snaplen)?)),
        None => None,
    };
    let mut reports: Vec<(String, Arc<Counters>)> = Vec::new();
    let mut monitor = None;
    let interfaces = if args.switch {
        let (interfaces, uplink) = switched(args, port, capture.as_ref())?;
        reports.extend(uplink.map(|counters| ("the way out".into(), counters)));
        interfaces
    } else {
        let port = port.context("A port is needed (try --help)")?;
        let interface = single(args, port, capture.as_ref());
        if let Attachment::Tap(tap) = interface.nic.attachment() {
            let nic = Arc::clone(&interface.nic);
            monitor = Some(
                LinkMonitor::start(Arc::clone(tap), interface.nic.is_link_up(), move |up| nic.set_link(up))
                    .context("The state of the tap cannot be watched")?,
            );
        }
        vec![interface]
    };
    reports.extend(
        interfaces.iter().map(|interface| (interface.name.clone(), Arc::clone(interface.nic.counters()))),
    );
    info!("vhost-user-net {} serves {}", env!("CARGO_PKG_VERSION"), description(args));
    let report = Arc::new(move || {
        for (name, counters) in &reports {
            info!("Counters of {name}: {counters}");
        }
    });
    let served: Vec<_> = interfaces
        .iter()
        .zip(&sockets)
        .map(|(Interface { nic, notifier, .. }, socket)| Served { device: nic, notifier, socket })
        .collect();
    let options = ServeOptions {
        exit_on_disconnect: args.service.exit_on_disconnect,
        on_report: Some(Arc::clone(&report) as _),
    };
    let result = serve_all(&served, &options).context("Serving has ended");
    report();
    if let Some(capture) = &capture {
        capture.flush();
    }
    drop(monitor);
    result
}

/// What flags say together, as far as clap does not know it.
fn check(args: &Args) -> anyhow::Result<()> {
    let alone = |choice| args.offloads.contains(&choice) && args.offloads.len() > 1;
    if alone(OffloadChoice::All) || alone(OffloadChoice::None) {
        bail!("--offloads all and --offloads none stand alone: leave the others out");
    }
    if args.switch {
        return Ok(());
    }
    if args.socket_path.len() > 1 {
        bail!(
            "Several virtual machines need a switch between them: add --switch, or leave one --socket-path"
        );
    }
    if args.socket_path.iter().any(|socket| socket.options != PortOptions::default()) {
        bail!("isolated=, vlan= and mac= behind --socket-path are for the ports of a switch: add --switch");
    }
    if address(args).is_some() && args.num_queue_pairs > 1 {
        bail!("A peer behind a socket has one pair of queues: leave --num-queue-pairs out");
    }
    Ok(())
}

/// The one interface of a daemon without a switch.
fn single(args: &Args, port: UplinkPort, capture: Option<&Arc<Capture>>) -> Interface {
    let attachment = match port {
        UplinkPort::Tap(tap) => Attachment::Tap(Arc::new(tap)),
        UplinkPort::Peer(peer) => Attachment::Peer(Mutex::new(Some(peer))),
    };
    let notifier = ConfigNotifier::default();
    let nic = nic_options(args, args.mac);
    let nic = Nic::new(nic, attachment, notifier.clone(), Arc::default(), capture.cloned());
    Interface { nic: Arc::new(nic), notifier, name: "the interface".into() }
}

/// The interfaces on a switch, and the counters of the way out if there is one.
fn switched(
    args: &Args,
    port: Option<UplinkPort>,
    capture: Option<&Arc<Capture>>,
) -> anyhow::Result<(Vec<Interface>, Option<Arc<Counters>>)> {
    let mut builder = SwitchBuilder::default();
    let mut members = Vec::new();
    for PortSocket { path, options } in &args.socket_path {
        let counters: Arc<Counters> = Arc::default();
        let member = Member::new(
            args.num_queue_pairs.into(),
            &args.rate_limit_rx.unwrap_or_default(),
            Arc::clone(&counters),
        );
        let member = Arc::new(member);
        let port = builder.member(Arc::clone(&member), *options);
        members.push((path, options, port, member, counters));
    }
    let mut uplink = None;
    if let Some(port) = port {
        let counters: Arc<Counters> = Arc::default();
        let port = Uplink::new(port, Arc::clone(&counters), capture.cloned())
            .context("The way out of the switch cannot be set up")?;
        let port = Arc::new(port);
        let index = builder.uplink(Arc::clone(&port));
        uplink = Some((port, index, counters));
    }
    let switch = builder.build().context("The switch cannot be set up")?;
    let interface = |(path, options, port, member, counters): (&_, &PortOptions, _, _, _)| {
        let path: &std::path::PathBuf = path;
        let notifier = ConfigNotifier::default();
        let attachment = Attachment::Switch { switch: Arc::clone(&switch), port, member };
        let nic = nic_options(args, options.mac);
        let nic = Nic::new(nic, attachment, notifier.clone(), counters, capture.cloned());
        Interface { nic: Arc::new(nic), notifier, name: path.display().to_string() }
    };
    let interfaces = members.into_iter().map(interface).collect();
    if let Some((port, index, _)) = &uplink {
        port.start(Arc::clone(&switch), *index).context("The thread of the way out cannot be started")?;
    }
    Ok((interfaces, uplink.map(|(_, _, counters)| counters)))
}

fn nic_options(args: &Args, mac: Option<[u8; 6]>) -> NicOptions {
    NicOptions {
        mac,
        mtu: args.mtu,
        queue_pairs: args.num_queue_pairs,
        queue_size: args.queues.queue_size,
        offloads: args.offloads(),
        rx_limits: args.rate_limit_rx.unwrap_or_default(),
        tx_limits: args.rate_limit_tx.unwrap_or_default(),
    }
}

/// Whether the command line names a tap or a peer.
fn has_port(args: &Args) -> bool {
    args.tap.is_some() || args.tap_fd.is_some() || address(args).is_some()
}

fn address(args: &Args) -> Option<Address> {
    let address = |path: &Option<_>, kind: fn(_) -> Address| path.clone().map(kind);
    address(&args.stream, Address::Stream)
        .or_else(|| address(&args.seqpacket, Address::Seqpacket))
        .or_else(|| address(&args.dgram, Address::Dgram))
        .or_else(|| address(&args.vde, Address::Vde))
}

/// The tap or peer that the command line names.
fn open_port(args: &Args) -> anyhow::Result<UplinkPort> {
    let queues = if args.switch { 1 } else { args.num_queue_pairs.into() };
    let options = TapOptions { queues, mtu: args.mtu };
    if let Some(name) = &args.tap {
        return Ok(UplinkPort::Tap(Tap::open(name, &options)?));
    }
    if let Some(numbers) = &args.tap_fd {
        if numbers.len() != queues {
            bail!(
                "--tap-fd has {} file descriptors for {queues} queue pairs: each needs one (--num-queue-pairs)",
                numbers.len()
            );
        }
        let fds: Vec<OwnedFd> =
            numbers.iter().map(|number| inherited_fd(*number)).collect::<Result<_, _>>()?;
        return Ok(UplinkPort::Tap(Tap::from_fds(fds, &options)?));
    }
    let address = address(args).context("A port is needed (try --help)")?;
    let mut peer = Peer::new(address);
    // Who waits for somebody that is not there learns about it now.
    peer.connect(Instant::now());
    Ok(UplinkPort::Peer(Box::new(peer)))
}

/// One socket for each interface.
fn sockets(args: &Args) -> anyhow::Result<Vec<Socket>> {
    if let Some(fd) = args.fd {
        return Ok(vec![Socket::inherited(fd)?]);
    }
    if args.socket_path.is_empty() {
        return Ok(Socket::from_systemd(Some(1))?);
    }
    let open = |socket: &PortSocket| {
        Socket::open(&SocketOptions {
            path: socket.path.clone(),
            group: args.socket_group.clone(),
            client: args.client,
        })
    };
    Ok(args.socket_path.iter().map(open).collect::<Result<_, _>>()?)
}

fn description(args: &Args) -> String {
    let port = [
        args.tap.as_ref().map(|name| format!("interface {name}")),
        args.tap_fd.as_ref().map(|_| "an inherited tap".into()),
        args.stream.as_deref().map(|path| at("stream", path)),
        args.seqpacket.as_deref().map(|path| at("seqpacket", path)),
        args.dgram.as_deref().map(|path| at("dgram", path)),
        args.vde.as_deref().map(|path| at("vde", path)),
    ];
    let port = port.into_iter().flatten().next();
    match (args.switch, port) {
        (true, Some(port)) => format!("a switch with {} ports and {port}", args.socket_path.len()),
        (true, None) => format!("a switch with {} ports", args.socket_path.len()),
        (false, port) => port.unwrap_or_default(),
    }
}

fn at(kind: &str, path: &Path) -> String {
    format!("{kind} {}", path.display())
}
