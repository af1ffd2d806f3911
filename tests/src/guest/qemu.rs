//! A guest in QEMU: a q35 machine with virtio-pci devices and a stock Debian kernel.
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{BalloonOptions, Device, Guest, NetOptions, NinepOptions, Vmm, initramfs_of};
use crate::process::Process;
use crate::provision::{self, Kernel, Qemu};

/// A kernel that KVM runs boots in a second or two.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// What a guest that can be given memory can be given, MiB.
const MEMORY_TO_COME: u32 = 1024;

/// Virtio's number for memory balloons.
const BALLOON: u32 = 5;
/// The length of a balloon's configuration.
const BALLOON_CONFIG: u32 = 16;
/// Virtio's number for shared directories.
const NINEP: u32 = 9;

/// The command that runs `guest`. Its channel is standard input and output, its console standard error.
pub(super) fn command(guest: &Guest, kernel: &Kernel, initramfs: &Path) -> Result<Command> {
    let qemu = provision::qemu()?;
    let accelerator = accelerator(&qemu, kernel)?;
    let mut command = machine(guest, &qemu, kernel, initramfs, &accelerator);
    if let Some(path) = &guest.monitor {
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", escape(text(path)?)));
    }
    for (index, device) in guest.devices.iter().enumerate() {
        let id = format!("device{index}");
        match device {
            Device::Blk { socket, options } => {
                command.arg("-chardev").arg(chardev(&id, socket, options.reconnect)?);
                let queues = options.num_queues;
                command.arg("-device").arg(format!("vhost-user-blk-pci,chardev={id},num-queues={queues}"));
            }
            Device::Net { socket, options } => {
                let mode = if options.is_server { ",server=on" } else { "" };
                command.arg("-chardev").arg(chardev(&id, socket, options.reconnect)? + mode);
                command
                    .arg("-netdev")
                    .arg(format!("vhost-user,id={id}-net,chardev={id},queues={}", options.queue_pairs));
                command.arg("-device").arg(net_device(&id, options));
            }
            Device::Ninep { socket, options } => {
                command.arg("-chardev").arg(chardev(&id, socket, None)?);
                command.arg("-device").arg(ninep_device(&id, *options));
            }
            Device::NinepInProcess { path, tag, security_model } => {
                let path = text(path)?;
                command.arg("-fsdev").arg(format!(
                    "local,id={id},path={},security_model={security_model},multidevs=remap",
                    escape(path)
                ));
                command.arg("-device").arg(format!("virtio-9p-pci,fsdev={id},mount_tag={}", escape(tag)));
            }
            Device::Virtiofs { socket, tag } => {
                command.arg("-chardev").arg(chardev(&id, socket, None)?);
                command.arg("-device").arg(format!("vhost-user-fs-pci,chardev={id},tag={}", escape(tag)));
            }
            Device::Balloon { socket, options } => {
                command.arg("-chardev").arg(chardev(&id, socket, None)?);
                let place = if guest.hot_plug { ",id=balloon,bus=root-port" } else { "" };
                command.arg("-device").arg(balloon_device(&id, *options) + place);
            }
            Device::BalloonInProcess { device } => {
                command.arg("-device").arg(format!("virtio-balloon-pci,id=balloon{device}"));
            }
            Device::Debian => {
                let debian = provision::debian()?;
                command.arg("-drive").arg(format!(
                    "file={},format=raw,if=none,id={id},readonly=on,file.locking=off",
                    escape(text(&debian.image)?)
                ));
                command.arg("-device").arg(format!("virtio-blk-pci,drive={id},serial=debian"));
            }
        }
    }
    Ok(command)
}

/// A `-chardev` that connects to a daemon.
fn chardev(id: &str, socket: &Path, reconnect: Option<Duration>) -> Result<String> {
    let socket = text(socket)?;
    let reconnect = reconnect.map(|interval| format!(",reconnect-ms={}", interval.as_millis()));
    Ok(format!("socket,id={id},path={}{}", escape(socket), reconnect.unwrap_or_default()))
}

/// A path as a word of QEMU's options.
fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("QEMU cannot use {}", path.display()))
}

/// A `-device` for a daemon of a kind that QEMU has no device of its own for: virtio's number says what it is.
fn ninep_device(id: &str, options: NinepOptions) -> String {
    let NinepOptions { num_queues, queue_size, config_size } = options;
    format!(
        "vhost-user-test-device-pci,chardev={id},virtio-id={NINEP},num_vqs={num_queues},vq_size={queue_size},\
         config_size={config_size}"
    )
}

/// The same for a balloon.
fn balloon_device(id: &str, options: BalloonOptions) -> String {
    let BalloonOptions { num_queues, queue_size } = options;
    format!(
        "vhost-user-test-device-pci,chardev={id},virtio-id={BALLOON},num_vqs={num_queues},vq_size={queue_size},\
         config_size={BALLOON_CONFIG}"
    )
}

/// A `-device` of a network interface. Its boot ROM is not part of the cached QEMU.
fn net_device(id: &str, options: &NetOptions) -> String {
    let mut words = vec!["virtio-net-pci".to_owned(), format!("netdev={id}-net"), "romfile=".to_owned()];
    if options.queue_pairs > 1 {
        // An interrupt for each queue, one for the control queue and one for changes of the configuration.
        words.extend(["mq=on".to_owned(), format!("vectors={}", 2 * options.queue_pairs + 2)]);
    }
    if let Some([a, b, c, d, e, f]) = options.mac {
        words.push(format!("mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"));
    }
    words.extend(options.mtu.map(|mtu| format!("host_mtu={mtu}")));
    words.join(",") + options.device
}

fn machine(guest: &Guest, qemu: &Qemu, kernel: &Kernel, initramfs: &Path, accelerator: &str) -> Command {
    let mut command = qemu.system();
    let memory = guest.memory_mib;
    // The daemons map the guest's memory, so it is shared. No default devices: they would need ROMs.
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    if !guest.may_reboot {
        command.arg("-no-reboot");
    }
    command.args(["-M", "q35,memory-backend=memory", "-cpu", "max", "-accel", accelerator]);
    let huge = if guest.huge_pages { ",hugetlb=on,hugetlbsize=2M" } else { "" };
    command.arg("-object").arg(format!("memory-backend-memfd,id=memory,size={memory}M,share=on{huge}"));
    let slots =
        if guest.hot_plug { format!(",slots=4,maxmem={}M", memory + MEMORY_TO_COME) } else { String::new() };
    command.arg("-m").arg(format!("{memory}M{slots}")).arg("-smp").arg(guest.cpus.to_string());
    if guest.hot_plug {
        command.args(["-device", "pcie-root-port,id=root-port,chassis=1"]);
    }
    // Should this process be killed, the guest goes with it.
    command.args(["-run-with", "exit-with-parent=on"]);
    command.args(["-chardev", "file,id=console,path=/proc/self/fd/2", "-serial", "chardev:console"]);
    command.args(["-chardev", "stdio,id=channel,signal=off", "-serial", "chardev:channel"]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
    // Without `no_timer_check` a busy host makes the kernel give up on its timer.
    command.arg("-append").arg(
        "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off nokaslr no_timer_check \
         random.trust_cpu=on",
    );
    command
}

/// In QEMU's options a comma ends a value unless it is doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// The accelerator that `VHOST_USER_TEST_ACCEL` names, else KVM where it really runs the kernel, else emulation.
fn accelerator(qemu: &Qemu, kernel: &Kernel) -> Result<String> {
    const TCG: &str = "tcg,thread=multi";
    match std::env::var("VHOST_USER_TEST_ACCEL").as_deref() {
        Ok("kvm") => return Ok("kvm".to_owned()),
        Ok("tcg") => return Ok(TCG.to_owned()),
        Ok("") | Err(_) => {}
        Ok(other) => bail!("VHOST_USER_TEST_ACCEL is {other}; it can be kvm or tcg"),
    }
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(TCG.to_owned());
    }
    // A device /dev/kvm proves little: a nested one may not know an instruction that the kernel uses.
    let answer = provision::remember("kvm-probe", &host_key(kernel), || {
        provision::progress("finding out whether KVM runs guests here");
        Ok(if kvm_runs(qemu, kernel)? { "kvm" } else { TCG }.to_owned())
    })?;
    Ok(answer)
}

/// What the answer to "does KVM work" depends on.
fn host_key(kernel: &Kernel) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo").lines().find(|line| line.starts_with("model name")).map(str::to_owned);
    let release = read("/proc/sys/kernel/osrelease");
    format!("{release}{}{}", cpu.unwrap_or_default(), kernel.image.display())
}

fn kvm_runs(qemu: &Qemu, kernel: &Kernel) -> Result<bool> {
    let guest = Guest::new(Vmm::Qemu).script("true");
    let initramfs = initramfs_of(&guest, &kernel.modules)?;
    let mut command = machine(&guest, qemu, kernel, initramfs.path(), "kvm");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let process = Process::spawn(command).context("Cannot start QEMU")?;
    let deadline = Instant::now() + PROBE_LIMIT;
    let up = |bytes: &[u8]| super::transcript::Transcript::parse(bytes).up.then_some(());
    while Instant::now() < deadline {
        let look_again = deadline.min(Instant::now() + Duration::from_millis(200));
        if process.stdout().wait_until(look_again, up).is_some() {
            return Ok(true);
        }
        // After an error inside KVM, QEMU stops the guest and stays.
        let complaint = process.stderr().text();
        if complaint.contains("KVM internal error") || process.stdout().is_closed() {
            return Ok(false);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_are_doubled() {
        assert_eq!(escape("/tmp/a,b"), "/tmp/a,,b");
    }

    #[test]
    fn a_network_interface_has_the_interrupts_that_it_needs() {
        assert_eq!(net_device("x", &NetOptions::default()), "virtio-net-pci,netdev=x-net,romfile=");
        let options = NetOptions {
            queue_pairs: 2,
            mac: Some([2, 0, 0, 0, 0, 10]),
            mtu: Some(9000),
            device: ",mrg_rxbuf=off",
            ..NetOptions::default()
        };
        let expected = "virtio-net-pci,netdev=x-net,romfile=,mq=on,vectors=6,mac=02:00:00:00:00:0a,host_mtu=9000,\
            mrg_rxbuf=off";
        assert_eq!(net_device("x", &options), expected);
    }
}
