//! Two Linux guests that exchange data: over the switch of `vhost-user-net`, and over a bridge of the kernel between two
//! taps, each served by a `vhost-user-net` of its own.
//!
//! The guests run in User Mode Linux, and their own share of the work is the larger one: look at the daemons' CPU time for
//! each GiB as well as at the throughput. That of the kernel's bridge is spent in system calls of the daemons, so it is
//! counted there.
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tests::daemon::Daemon;
use tests::driver::lan::net_daemon;
use tests::driver::usage::cpu_time;
use tests::guest::{Guest, NetOptions, Running, Vmm};
use tests::netns::Namespace;

const STEP: Duration = Duration::from_secs(120);

/// Measures TCP from guest to guest, over the switch and over a bridge of the kernel, in turns.
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p tests --bench net_guests --", max_term_width = 110)]
struct Args {
    /// How often to measure each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How long each run takes, in seconds
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one run showed.
#[derive(Clone, Copy)]
struct Outcome {
    gbit_per_second: f64,
    cpu_seconds_per_gib: f64,
}

/// What is between the guests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    Switch,
    Bridge,
}

/// The daemons, and what they need.
struct Network {
    daemons: Vec<Daemon>,
    _namespace: Option<Namespace>,
}

impl Network {
    fn new(between: Between) -> Result<Self> {
        let macs = ["52:54:00:00:00:01", "52:54:00:00:00:02"];
        if between == Between::Switch {
            let builder = net_daemon().arg("--switch");
            let builder = macs.iter().fold(builder, |builder, mac| builder.port(&format!(",mac={mac}")));
            return Ok(Self { daemons: vec![builder.start()?], _namespace: None });
        }
        let namespace = Namespace::new()?;
        namespace.ip("link add br0 type bridge")?;
        namespace.ip("link set br0 up")?;
        let mut daemons = Vec::new();
        for (index, mac) in macs.iter().enumerate() {
            let tap = format!("tap{index}");
            namespace.add_tap(&tap, 1)?;
            namespace.ip(&format!("link set {tap} master br0"))?;
            namespace.ip(&format!("link set {tap} up"))?;
            let daemon = net_daemon().inside(&namespace.root()).args(["--tap", &tap, "--mac", mac]);
            daemons.push(daemon.start()?);
        }
        Ok(Self { daemons, _namespace: Some(namespace) })
    }

    fn guest(&self, index: usize, script: &str) -> Result<Running> {
        let sockets: Vec<_> = self.daemons.iter().flat_map(Daemon::sockets).collect();
        let script = format!("net_up eth0 192.0.2.{}/24\n{script}", index + 1);
        Guest::new(Vmm::Uml)
            .net(sockets[index], NetOptions::default())
            .program("iperf3")
            .timeout(Duration::from_secs(300))
            .script(script)
            .spawn()
    }

    fn cpu_time(&self) -> Result<Duration> {
        let mut sum = Duration::ZERO;
        for daemon in &self.daemons {
            sum += cpu_time(daemon.pid())?;
        }
        Ok(sum)
    }
}

fn measure(between: Between, seconds: u32) -> Result<Outcome> {
    let network = Network::new(between)?;
    let mut server = network.guest(
        0,
        "
iperf3 --server --one-off --forceflush >&2 &
announce ready
await end
",
    )?;
    server.wait_for("ready", STEP)?;
    let client = format!(
        "
wait_ping 192.0.2.1
announce ready
await begin
iperf3 --client 192.0.2.1 --time {seconds} --format m >/tmp/result
announce done
cat /tmp/result >&2
report mbits $(awk '/receiver/ {{ print $7 }}' /tmp/result)
"
    );
    let mut client = network.guest(1, &client)?;
    client.wait_for("ready", STEP)?;
    let before = network.cpu_time()?;
    client.send("begin")?;
    client.wait_for("done", STEP)?;
    let cpu = network.cpu_time()?.checked_sub(before).context("the clock ran backwards")?;
    let report = client.wait()?.check()?;
    server.send("end")?;
    server.wait()?.check()?;
    let mbits: f64 = report.value("mbits")?.trim().parse()?;
    ensure!(mbits > 0.0, "Nothing was transferred");
    let gib = mbits * 1e6 / 8.0 * f64::from(seconds) / f64::from(1 << 30);
    Ok(Outcome { gbit_per_second: mbits / 1000.0, cpu_seconds_per_gib: cpu.as_secs_f64() / gib })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut pairs = Vec::new();
    println!("{:>8} {:>14} {:>16}", "", "Gbit/s", "CPU s per GiB");
    for _ in 0..args.rounds {
        let switch = measure(Between::Switch, args.seconds)?;
        let bridge = measure(Between::Bridge, args.seconds)?;
        for (name, outcome) in [("switch", switch), ("bridge", bridge)] {
            println!("{name:>8} {:>14.2} {:>16.3}", outcome.gbit_per_second, outcome.cpu_seconds_per_gib);
        }
        pairs.push((switch, bridge));
    }
    let speed = median(pairs.iter().map(|(switch, bridge)| switch.gbit_per_second / bridge.gbit_per_second));
    let cpu =
        median(pairs.iter().map(|(switch, bridge)| switch.cpu_seconds_per_gib / bridge.cpu_seconds_per_gib));
    println!("Median of the pairs, switch / bridge: throughput {speed:.2}, CPU time {cpu:.2}");
    Ok(())
}
