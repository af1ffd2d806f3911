//! A QEMU without a guest: `-accel qtest` runs no processor and obeys commands on a socket.
//!
//! The machine's memory is a file that this process maps, so that the ring, the buffers and the completions are memory for
//! both sides. The device is set up through the socket, as firmware and a driver would do it ("Virtio Over PCI Bus" of the
//! virtio specification). Kicks go past the socket: QEMU makes an eventfd for its queue, which KVM would write to when the
//! guest writes to the register, and this process takes that eventfd over and writes to it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tests::driver::memory::SharedMemory;
use tests::driver::raw::GuestMemory;
use tests::driver::ring::Placement;
use tests::process::Process;
use tests::provision;

use super::lane::MEMORY;

const START_LIMIT: Duration = Duration::from_secs(20);
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// The device's slot on the root bus.
const SLOT: u32 = 4;
/// Where the device's registers are to lie: behind the memory, before anything of the machine.
const REGISTERS: u32 = 0xc000_0000;
/// `VIRTIO_PCI_VENDOR` and `VIRTIO_ID_9P` as a modern device.
const VENDOR_AND_DEVICE: u32 = 0x1049_1af4;

// PCI: the ports of the configuration space, and registers in it.
const CONFIG_ADDRESS: u64 = 0xcf8;
const CONFIG_DATA: u64 = 0xcfc;
const COMMAND: u32 = 0x04;
const BAR_0: u32 = 0x10;
const CAPABILITIES: u32 = 0x34;
/// Answer at the addresses of the BARs, and access memory.
const MEMORY_AND_MASTER: u32 = 2 | 4;
/// A capability of the vendor, and the one of virtio that says where the common configuration is.
const VENDOR_CAPABILITY: u32 = 9;
const COMMON_CONFIG: u32 = 1;

// `struct virtio_pci_common_cfg`.
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;

// Bits of the status: ACKNOWLEDGE and DRIVER, FEATURES_OK, DRIVER_OK.
const SEEN: u32 = 1 | 2;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;

/// The socket on which QEMU takes commands.
pub struct Qtest {
    socket: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Qtest {
    fn new(socket: UnixStream) -> Result<Self> {
        socket.set_read_timeout(Some(REPLY_LIMIT))?;
        let reader = BufReader::new(socket.try_clone()?);
        Ok(Self { socket, reader })
    }

    fn command(&mut self, command: &str) -> Result<String> {
        writeln!(self.socket, "{command}")?;
        let mut line = String::new();
        self.reader.read_line(&mut line).context("QEMU does not answer on its qtest socket")?;
        ensure!(line.starts_with("OK"), "QEMU refused the command {command:?}: {line:?}");
        Ok(line)
    }

    /// Reads by a command such as `readl`.
    fn read(&mut self, command: &str, address: u64) -> Result<u32> {
        let answer = self.command(&format!("{command} {address:#x}"))?;
        let digits = answer.trim_end().trim_start_matches("OK 0x");
        Ok(u64::from_str_radix(digits, 16).with_context(|| format!("Not a number: {answer:?}"))? as u32)
    }

    /// Writes by a command such as `writel`.
    fn write(&mut self, command: &str, address: u64, value: u32) -> Result<()> {
        self.command(&format!("{command} {address:#x} {value:#x}")).map(drop)
    }

    fn select(&mut self, register: u32) -> Result<()> {
        self.write("outl", CONFIG_ADDRESS, 1 << 31 | SLOT << 11 | register)
    }

    fn read_pci(&mut self, register: u32) -> Result<u32> {
        self.select(register)?;
        self.read("inl", CONFIG_DATA)
    }

    fn write_pci(&mut self, register: u32, value: u32) -> Result<()> {
        self.select(register)?;
        self.write("outl", CONFIG_DATA, value)
    }
}

/// QEMU with a 9P device on `share`, ready for requests at `placement`.
pub struct Machine {
    /// The process.
    pub process: Process,
    /// The machine's memory.
    pub memory: Arc<GuestMemory>,
    /// What kicks the queue.
    pub kick: OwnedFd,
    /// The socket.
    pub qtest: Qtest,
}

impl Machine {
    /// Starts it, with its files in `folder`.
    pub fn start(folder: &Path, share: &Path, placement: Placement, features: u64) -> Result<Self> {
        let (socket, ram) = (folder.join("qtest"), folder.join("ram"));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&ram)?;
        file.set_len(MEMORY as u64)?;
        let listener = UnixListener::bind(&socket)?;
        listener.set_nonblocking(true)?;
        let mut command = provision::qemu()?.system();
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-qtest-log", "none"]);
        command.args(["-M", "q35,accel=qtest,memory-backend=memory"]);
        command.arg("-m").arg(format!("{}M", MEMORY >> 20));
        command.arg("-object").arg(format!(
            "memory-backend-file,id=memory,size={}M,mem-path={},share=on",
            MEMORY >> 20,
            ram.display()
        ));
        command.arg("-fsdev").arg(format!(
            "local,id=share,path={},security_model=passthrough,multidevs=remap",
            share.display()
        ));
        command.arg("-device").arg(format!("virtio-9p-pci,fsdev=share,mount_tag=share,addr={SLOT}"));
        command.arg("-qtest").arg(format!("unix:{}", socket.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = Process::spawn(command).context("Cannot start QEMU")?;
        let deadline = Instant::now() + START_LIMIT;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if process.wait(Duration::from_millis(5))?.is_some() || Instant::now() > deadline {
                bail!("QEMU does not connect to its qtest socket: {}", process.stderr().text());
            }
        };
        stream.set_nonblocking(false)?;
        let memory = Arc::new(GuestMemory::of(SharedMemory::of_file(file, MEMORY)?));
        let mut qtest = Qtest::new(stream)?;
        let kick = set_up(&mut qtest, process.pid(), placement, features)
            .with_context(|| format!("Cannot set up QEMU's 9P device: {}", process.stderr().text()))?;
        Ok(Self { process, memory, kick, qtest })
    }
}

/// Gives the device's registers their place and returns where the common configuration is.
fn find(qtest: &mut Qtest) -> Result<u64> {
    let found = qtest.read_pci(0)?;
    // A transitional device has another number, and the same capabilities.
    ensure!(found == VENDOR_AND_DEVICE || found == 0x1009_1af4, "Slot {SLOT} has device {found:#x}");
    let mut capability = qtest.read_pci(CAPABILITIES)? & 0xff;
    while capability != 0 {
        let head = qtest.read_pci(capability)?;
        if head & 0xff == VENDOR_CAPABILITY && head >> 24 == COMMON_CONFIG {
            let bar = BAR_0 + 4 * (qtest.read_pci(capability + 4)? & 0xff);
            qtest.write_pci(bar, REGISTERS)?;
            qtest.write_pci(bar + 4, 0)?;
            let command = qtest.read_pci(COMMAND)? & 0xffff;
            qtest.write_pci(COMMAND, command | MEMORY_AND_MASTER)?;
            return Ok(u64::from(REGISTERS) + u64::from(qtest.read_pci(capability + 8)?));
        }
        capability = head >> 8 & 0xff;
    }
    bail!("The device has no common configuration")
}

/// "Device Initialization" of the virtio specification, with one queue. Returns its kick.
fn set_up(qtest: &mut Qtest, pid: u32, placement: Placement, features: u64) -> Result<OwnedFd> {
    let base = find(qtest)?;
    qtest.write("writeb", base + DEVICE_STATUS, 0)?;
    qtest.write("writeb", base + DEVICE_STATUS, SEEN)?;
    let mut offered = 0;
    for half in [0, 1] {
        qtest.write("writel", base + DEVICE_FEATURE_SELECT, half)?;
        offered |= u64::from(qtest.read("readl", base + DEVICE_FEATURE)?) << (32 * half);
        qtest.write("writel", base + DRIVER_FEATURE_SELECT, half)?;
        qtest.write("writel", base + DRIVER_FEATURE, (features >> (32 * half)) as u32)?;
    }
    ensure!(offered & features == features, "It does not offer the features {:#x}", features & !offered);
    qtest.write("writeb", base + DEVICE_STATUS, SEEN | FEATURES_OK)?;
    ensure!(
        qtest.read("readb", base + DEVICE_STATUS)? & FEATURES_OK != 0,
        "It does not take its own features"
    );
    qtest.write("writew", base + QUEUE_SELECT, 0)?;
    let size = qtest.read("readw", base + QUEUE_SIZE)?;
    ensure!(size == u32::from(placement.size), "Its queue has {size} descriptors");
    for (register, address) in
        [(QUEUE_DESC, placement.desc), (QUEUE_DRIVER, placement.avail), (QUEUE_DEVICE, placement.used)]
    {
        qtest.write("writel", base + register, address as u32)?;
        qtest.write("writel", base + register + 4, (address >> 32) as u32)?;
    }
    qtest.write("writew", base + QUEUE_ENABLE, 1)?;
    let before = eventfds(pid)?;
    qtest.write("writeb", base + DEVICE_STATUS, SEEN | FEATURES_OK | DRIVER_OK)?;
    let after = eventfds(pid)?;
    let new: Vec<i32> = after.difference(&before).copied().collect();
    let &[kick] = &new[..] else { bail!("QEMU has made the eventfds {new:?} for one queue") };
    let pid = Pid::from_raw(pid.cast_signed()).context("No process id")?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    pidfd_getfd(&process, kick, PidfdGetfdFlags::empty()).context("Cannot take over QEMU's eventfd")
}

/// The numbers of a process's eventfds.
fn eventfds(pid: u32) -> Result<BTreeSet<i32>> {
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let is_eventfd =
            fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().contains("[eventfd"));
        if is_eventfd {
            numbers.extend(entry.file_name().to_string_lossy().parse::<i32>().ok());
        }
    }
    Ok(numbers)
}
