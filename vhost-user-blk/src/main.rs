//! Serves a disk image or block device over vhost-user.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use log::info;
use vhost_user_blk::args::{Args, CAPABILITIES, Cache};
use vhost_user_blk::device::{Disk, DiskOptions};
use vhost_user_blk::image::Image;
use vhost_user_daemon::socket::Socket;
use vhost_user_daemon::{ConfigNotifier, ServeOptions, cli, hold_signals, serve};

fn main() -> ExitCode {
    let args: Args = cli::parse(&CAPABILITIES);
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&*error),
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    args.common.service.init_log();
    let image = Image::open(&args.image_options())?;
    let (size, block_size, read_only) = (image.size(), image.logical_block_size(), image.is_read_only());
    let disk = Arc::new(Disk::new(
        image,
        DiskOptions {
            serial: args.serial,
            num_queues: args.queues.num_queues,
            queue_size: args.queues.size.queue_size,
            writeback: args.cache != Cache::Writethrough,
            engine: args.io_engine,
        },
    ));
    disk.check_engine()?;
    hold_signals().context("Signals cannot be held back")?;
    let socket = Socket::from_args(&args.common.socket)?;
    info!(
        "vhost-user-blk {} serves {}: {} bytes in blocks of {}{}",
        env!("CARGO_PKG_VERSION"),
        args.blk_file.display(),
        size,
        block_size,
        if read_only { ", read-only" } else { "" }
    );
    let exit_on_disconnect = args.common.service.exit_on_disconnect;
    let options = ServeOptions { exit_on_disconnect, ..ServeOptions::default() };
    serve(&disk, &ConfigNotifier::default(), &socket, &options).context("Serving has ended")
}
