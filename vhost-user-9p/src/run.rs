//! From the command line to a directory that is served.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use log::{info, warn};
use rustix::fs::{Access, AtFlags, CWD, Mode, accessat};
use rustix::io::Errno;
use rustix::process::geteuid;
use vhost_user_daemon::sandbox::{CapabilitySet, Confinement, Needs, Sandbox};
use vhost_user_daemon::socket::Socket;
use vhost_user_daemon::{ConfigNotifier, ServeOptions, hold_signals, serve};

use crate::args::Args;
use crate::device::{DeviceOptions, Ninep};
use crate::host::idmap::{IdMap, Ids, Squash};
use crate::host::proc_fd::ProcFd;
use crate::host::{Host, Options, SecurityModel, Share, identity, mapped};
use crate::server::{Journal, Server, ServerOptions};

/// Opens what the command line names, and serves it until the daemon is asked to end.
pub fn run(args: &Args) -> anyhow::Result<()> {
    args.common.service.init_log();
    let model = security_model(args)?;
    let mut options = host_options(args, model)?;
    for (index, export) in args.export.iter().enumerate() {
        if args.export[..index].iter().any(|other| other.name == export.name) {
            bail!("--export {}= is given twice: leave one out", String::from_utf8_lossy(&export.name));
        }
        if export.name.starts_with(b"/") {
            bail!(
                "--export {}= would hide that path of --shared-dir: choose a name without a '/' in front",
                String::from_utf8_lossy(&export.name)
            );
        }
    }
    let journal = args.state_file.as_deref().map(Journal::open).transpose()?.map(Arc::new);
    hold_signals().context("Signals cannot be held back")?;
    let mut socket = Socket::from_args(&args.common.socket)?;
    for path in directories(args) {
        warn_of_permissions(path, args.read_only);
    }
    // The guest has applied its user's umask.
    rustix::process::umask(Mode::empty());
    let entered = sandbox(args, model).enter(&mut [&mut socket])?;
    // Landlock refuses files that are found by their handles and have no known place in the tree.
    options.file_handles = entered.capabilities.contains(CapabilitySet::DAC_READ_SEARCH)
        && entered.confinement != Confinement::Landlock;
    let host = Arc::new(Host::new(options, ProcFd::from(entered.proc_self_fd)));
    let names = std::iter::once(&b""[..]).chain(args.export.iter().map(|export| &export.name[..]));
    let shares = names
        .zip(entered.directories)
        .map(|(name, directory)| Share::new(&host, name.to_vec(), directory.fd, directory.is_mount_root))
        .collect::<Result<_, _>>()
        .context("The attributes of a shared directory cannot be read")?;
    let server = Arc::new(Server::new(shares, server_options(args)));
    let device = Arc::new(Ninep::new(&server, device_options(args), journal));
    info!(
        "vhost-user-9p {} serves {} as {}{}",
        env!("CARGO_PKG_VERSION"),
        args.shared_dir.display(),
        args.tag,
        if args.read_only { ", read-only" } else { "" }
    );
    let exit_on_disconnect = args.common.service.exit_on_disconnect;
    let options = ServeOptions { exit_on_disconnect, ..ServeOptions::default() };
    serve(&device, &ConfigNotifier::default(), &socket, &options).context("Serving has ended")
}

/// The directories that are served.
fn directories(args: &Args) -> impl Iterator<Item = &Path> {
    std::iter::once(&*args.shared_dir).chain(args.export.iter().map(|export| &*export.path))
}

/// Says what the daemon's user may not do in a directory: the guest would get errors that nobody there can explain.
fn warn_of_permissions(path: &Path, read_only: bool) {
    let may = |access| accessat(CWD, path, access, AtFlags::EACCESS) != Err(Errno::ACCESS);
    let (user, path) = (geteuid().as_raw(), path.display());
    if !may(Access::READ_OK | Access::EXEC_OK) {
        warn!(
            "User {user} may not read {path}, so the guest cannot: let the user read it, or run the daemon as another"
        );
    } else if !read_only && !may(Access::WRITE_OK) {
        warn!(
            "User {user} may not write to {path}, so the guest cannot: let the user write to it, or add --read-only"
        );
    }
}

/// The sandbox with the directories that are served.
fn sandbox(args: &Args, model: SecurityModel) -> Sandbox {
    let mut sandbox = Sandbox::new(args.sandbox.sandbox);
    for path in directories(args) {
        sandbox.directory(path, args.read_only);
    }
    let other_users = CapabilitySet::SETUID | CapabilitySet::SETGID;
    sandbox.keep_capabilities(match model {
        SecurityModel::Passthrough => identity::KEPT,
        SecurityModel::MappedXattr | SecurityModel::None => identity::KEPT - other_users,
    });
    if args.xattr.as_ref().is_some_and(|xattr| xattr.allows(b"trusted.")) {
        // The kernel shows them to nobody else.
        sandbox.keep_capabilities(CapabilitySet::SYS_ADMIN);
    }
    if identity::can_find_by_handle() {
        sandbox.need(Needs::FILE_HANDLES);
    }
    if model != SecurityModel::MappedXattr {
        sandbox.need(Needs::HOST_OWNERS);
    }
    sandbox
}

fn security_model(args: &Args) -> anyhow::Result<SecurityModel> {
    let may = identity::can_impersonate();
    match args.security_model {
        Some(SecurityModel::Passthrough) if !may => bail!(
            "--security-model passthrough needs root, or the capabilities CHOWN, DAC_OVERRIDE, FOWNER, SETGID and SETUID: \
             run the daemon as root, or choose mapped-xattr or none"
        ),
        Some(model) => Ok(model),
        None if may => Ok(SecurityModel::Passthrough),
        None => Ok(SecurityModel::None),
    }
}

fn host_options(args: &Args, model: SecurityModel) -> anyhow::Result<Options> {
    let maps = !args.uid_map.is_empty() || !args.gid_map.is_empty() || args.squash != Squash::None;
    if maps && model != SecurityModel::Passthrough {
        bail!(
            "--uid-map, --gid-map and --squash need --security-model passthrough, which needs root: run the daemon as \
             root, or leave them out"
        );
    }
    if (args.fmode.is_some() || args.dmode.is_some()) && model != SecurityModel::MappedXattr {
        bail!("--fmode and --dmode are for --security-model mapped-xattr: choose that, or leave them out");
    }
    let ids = Ids {
        uids: IdMap::new(args.uid_map.clone()).context("--uid-map")?,
        gids: IdMap::new(args.gid_map.clone()).context("--gid-map")?,
        squash: args.squash,
        squash_to: args.squash_to.unwrap_or_default(),
    };
    let xattr = args.xattr.clone().unwrap_or_default();
    let xattr = match model {
        SecurityModel::MappedXattr => xattr.mapped(),
        _ if ids.is_guarded() => xattr.without_acls(),
        _ => xattr,
    };
    Ok(Options {
        model,
        fmode: args.fmode.unwrap_or(mapped::DEFAULT_FILE_MODE),
        dmode: args.dmode.unwrap_or(mapped::DEFAULT_DIRECTORY_MODE),
        xattr,
        ids,
        multidevs: args.multidevs,
        qid_version: args.qid_version,
        direct_io: args.direct_io,
        file_handles: false,
    })
}

fn server_options(args: &Args) -> ServerOptions {
    ServerOptions {
        read_only: args.read_only,
        locks: args.locks,
        statfs_type: args.statfs_type,
        max_msize: args.max_msize,
        max_fids: args.max_fids as usize,
        max_open: args.max_open_files as usize,
    }
}

fn device_options(args: &Args) -> DeviceOptions {
    DeviceOptions {
        tag: args.tag.clone().into_bytes(),
        num_queues: args.queues.num_queues,
        queue_size: args.queues.size.queue_size,
        threads: args.threads.into(),
        poll_limit: Duration::from_micros(args.poll_us.into()),
    }
}
