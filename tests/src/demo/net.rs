//! The chapter of vhost-user-net: a way out through passt, and a switch between two guests.
use std::cell::RefCell;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::outside::{self, Outside};
use super::{Chapter, number, say, value, wait};
use crate::daemon::Daemon;
use crate::guest::{Guest, NetOptions, Running, Vmm};

/// Sent outside and back, and from guest to guest.
const FILE_MIB: u32 = 32;
const STOP_LIMIT: Duration = Duration::from_secs(10);
const COUNTERS_LIMIT: Duration = Duration::from_secs(10);
/// As large as passt takes them: as its socket has no segmentation offload, this is what makes TCP fast.
const MTU: u16 = 65520;

/// The daemons, what they are attached to, and the second guest.
pub(super) struct Net {
    vmm: Vmm,
    switch: Daemon,
    /// The daemon on passt; without namespaces there is none.
    way_out: Option<(Daemon, Outside)>,
    second: RefCell<Option<Running>>,
}

impl Net {
    /// Starts a daemon on passt and one that is a switch.
    pub(super) fn start(vmm: Vmm) -> Result<Self> {
        let way_out = match Outside::start() {
            Ok(outside) => {
                say(
                    "daemon",
                    format!(
                        "passt, process {}, a network stack in a namespace of an ordinary user",
                        outside.pid()
                    ),
                );
                let daemon = Daemon::builder("vhost-user-net")
                    .arg("--stream")
                    .arg(outside.socket())
                    .args(["--mtu", &MTU.to_string()])
                    .start()?;
                say("", format!("vhost-user-net, process {}, is attached to it", daemon.pid()));
                Some((daemon, outside))
            }
            Err(error) => {
                say("skipped", format!("a guest's way out by passt. {error:#}"));
                None
            }
        };
        let switch = Daemon::builder("vhost-user-net").arg("--switch").port("").port("").start()?;
        say("daemon", format!("vhost-user-net, process {}, is a switch for two guests", switch.pid()));
        Ok(Self { vmm, switch, way_out, second: RefCell::default() })
    }
}

impl Chapter for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn attach(&self, guest: Guest) -> Guest {
        let guest = guest.net(self.switch.socket(), on_switch(self.vmm, 1));
        let Some((daemon, _)) = &self.way_out else { return guest };
        // QEMU does not ask the daemon.
        let mtu = (self.vmm == Vmm::Qemu).then_some(MTU);
        let options = NetOptions { mtu, ..NetOptions::default() };
        guest.net(daemon.socket(), options).file("guest/udhcpc", include_bytes!("udhcpc.sh"))
    }

    fn script(&self) -> String {
        format!(
            "NET_MIB={FILE_MIB} OUTSIDE={} SERVER={} PORT={}\n{}",
            if self.way_out.is_some() { "yes" } else { "no" },
            outside::SERVER,
            outside::PORT,
            include_str!("net.sh")
        )
    }

    fn follow(&self, guest: &mut Running) -> Result<()> {
        if let Some((_, outside)) = &self.way_out {
            follow_outside(guest, outside)?;
        }
        wait(guest, "net ready")?;
        let second = Guest::new(self.vmm).net(&self.switch.sockets()[1], on_switch(self.vmm, 2));
        let mut second = second.timeout(super::SHELL_LIMIT).script(include_str!("neighbour.sh")).spawn()?;
        wait(&mut second, "ready")?;
        say("switch", "a second guest is up; both have an eth0 on the switch");
        guest.send("neighbour")?;
        wait(guest, "net pinged")?;
        let rtt = number(guest, "net.rtt")?;
        say("", format!("10.0.0.1 pings 10.0.0.2: the answer takes {rtt:.2} ms"));
        wait(guest, "net copied")?;
        wait(&mut second, "received")?;
        ensure!(
            value(&second, "sha256")? == value(guest, "net.sha256")?,
            "The second guest received another file than the first one sent"
        );
        let rate = f64::from(FILE_MIB) / number(guest, "net.copy_seconds")?.max(0.01);
        say("", format!("{FILE_MIB} MiB from guest to guest by TCP: the sha256 is right, {rate:.0} MiB/s"));
        *self.second.borrow_mut() = Some(second);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        if let Some(mut second) = self.second.take() {
            second.send("end")?;
            second.wait()?.check()?;
        }
        self.switch.signal(Signal::USR1)?;
        self.switch.wait_stderr("socket1: ", COUNTERS_LIMIT)?;
        say("counters", "what the switch has counted for both, asked by SIGUSR1:");
        let log = self.switch.stderr();
        for counters in
            log.lines().filter_map(|line| Some(line.split_once("Counters of ")?.1.split_once(": ")?.1))
        {
            say("", counters);
        }
        let way_out = self.way_out.as_mut().map(|(daemon, _)| daemon);
        for daemon in [Some(&mut self.switch), way_out].into_iter().flatten() {
            let status = daemon.terminate(STOP_LIMIT)?;
            ensure!(status.success(), "vhost-user-net ended with {status}:\n{}", daemon.stderr());
        }
        Ok(())
    }
}

/// The interface of the guest with this number on the switch: QEMU would give the same address to each guest.
fn on_switch(vmm: Vmm, number: u8) -> NetOptions {
    let mac = (vmm == Vmm::Qemu).then_some([0x52, 0x54, 0, 0, 0, number]);
    NetOptions { mac, ..NetOptions::default() }
}

/// Tells how the guest gets its address from passt, and reaches the server.
fn follow_outside(guest: &mut Running, outside: &Outside) -> Result<()> {
    wait(guest, "net configured").with_context(|| format!("passt said:\n{}", outside.messages()))?;
    let (mac, address) = (value(guest, "net.mac")?, value(guest, "net.address")?);
    say("nic", format!("the guest sees eth1: hardware address {mac}, MTU {}", value(guest, "net.mtu")?));
    say("", format!("passt answers its DHCP: it is {address}, like the host"));
    ensure!(address.starts_with(outside::HOST), "The guest got {address}, not {}", outside::HOST);
    wait(guest, "net outside").with_context(|| format!("passt said:\n{}", outside.messages()))?;
    let rate = f64::from(2 * FILE_MIB) / number(guest, "net.outside_seconds")?.max(0.01);
    say(
        "tcp",
        format!(
            "{FILE_MIB} MiB to {} outside and back: the sha256 is right, {rate:.0} MiB/s",
            outside::SERVER
        ),
    );
    Ok(())
}
