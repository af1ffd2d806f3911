//! A guest in User Mode Linux: a kernel that runs as a process of the host and is a vhost-user front end itself.
//!
//! It boots in a second and computes at native speed, but each of its system calls is expensive. The packaged
//! kernels have one processor, and their virtio devices do not come back when a daemon is restarted.
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::StatVfsMountFlags;

use super::{Device, Guest};
use crate::provision::Uml;

/// Virtio's number for network interfaces.
const NET: u32 = 1;
/// Virtio's number for block devices.
const BLK: u32 = 2;
/// Virtio's number for memory balloons.
const BALLOON: u32 = 5;

/// The command that runs `guest`. Its channel is standard input and output, its console standard error.
pub(super) fn command(guest: &Guest, uml: &Uml, initramfs: &Path, scratch: &Path) -> Result<Command> {
    ensure!(guest.cpus == 1, "User Mode Linux has one processor; ask QEMU for {}", guest.cpus);
    ensure!(
        !guest.huge_pages && guest.monitor.is_none(),
        "User Mode Linux has neither huge pages nor QEMU's monitor; ask QEMU for them"
    );
    let mut command = Command::new(&uml.program);
    command.arg(format!("mem={}M", guest.memory_mib));
    command.arg(format!("initrd={}", word(initramfs)?));
    // Without these it makes a folder in the user's home.
    command.arg(format!("uml_dir={}/", word(scratch)?)).arg("umid=guest");
    // The first virtual terminal is the console, the second the channel; no others, which would open windows.
    command.args(["con0=null,fd:2", "con1=fd:0,fd:1", "con=null", "ssl=null"]);
    command.args(["quiet", "loglevel=4", "panic=-1", "oops=panic"]);
    for device in &guest.devices {
        match device {
            Device::Blk { socket, options } => {
                ensure!(
                    options.num_queues == 1,
                    "User Mode Linux uses one queue; ask QEMU for {}",
                    options.num_queues
                );
                command.arg(format!("virtio_uml.device={}:{BLK}", word(socket)?));
            }
            Device::Net { socket, options } => {
                ensure!(
                    options.queue_pairs == 1,
                    "User Mode Linux uses one pair of queues; ask QEMU for {}",
                    options.queue_pairs
                );
                ensure!(
                    !options.is_server && options.reconnect.is_none(),
                    "User Mode Linux connects to a daemon, and only once; ask QEMU for more"
                );
                ensure!(
                    options.mac.is_none() && options.mtu.is_none() && options.device.is_empty(),
                    "User Mode Linux knows no options of a network interface; tell the daemon"
                );
                command.arg(format!("virtio_uml.device={}:{NET}", word(socket)?));
            }
            // It takes as many queues as it uses, of a size of its own.
            Device::Balloon { socket, .. } => {
                command.arg(format!("virtio_uml.device={}:{BALLOON}", word(socket)?));
            }
            Device::BalloonInProcess { .. }
            | Device::Ninep { .. }
            | Device::NinepInProcess { .. }
            | Device::Virtiofs { .. }
            | Device::Debian => {
                bail!(
                    "Debian's User Mode Linux has no 9p over virtio, and no devices of QEMU; ask QEMU for them"
                )
            }
        }
    }
    for variable in ["TMPDIR", "TMP", "TEMP"] {
        command.env_remove(variable);
    }
    if !fits_in_shared_memory(guest.memory_mib) {
        command.env("TMPDIR", scratch);
    }
    Ok(command)
}

/// The kernel's command line has no way to quote.
fn word(path: &Path) -> Result<&str> {
    let word = path.to_str().filter(|path| !path.contains([' ', ':', '"']));
    word.with_context(|| format!("User Mode Linux cannot use the path {}", path.display()))
}

/// Whether `/dev/shm` can hold a guest's memory: large enough, and code may run in it. It would be used in any case,
/// and a guest in one that is too small dies of a bus error.
fn fits_in_shared_memory(mib: u32) -> bool {
    rustix::fs::statvfs("/dev/shm").is_ok_and(|data| {
        !data.f_flag.contains(StatVfsMountFlags::NOEXEC)
            && data.f_bavail * data.f_frsize / (1 << 20) > u64::from(mib)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_the_command_line_would_split_are_refused() {
        assert_eq!(word(Path::new("/tmp/a")).unwrap(), "/tmp/a");
        assert!(word(Path::new("/tmp/a b")).is_err());
    }
}
