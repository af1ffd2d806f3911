//! The live manager: looks, decides, sends, and begins again.

mod signals;

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vhost_user_daemon::control::{Endpoint, Server};
use vhost_user_daemon::socket::Socket;

use self::signals::Signals;
use super::account::percent;
use super::api::ManagerStatus;
use super::config::Config;
use super::desk::{Desk, Private, Public};
use super::event::What;
use super::guests::{Guests, GuestsOptions};
use super::host::HostSampler;
use super::host::psi::Trigger;
use super::model::Snapshot;
use super::policy::{Decider, Decision, Script};
use super::record::{Recorder, Tick};

/// How long a tick waits for balloons to answer: a daemon of this host does so in a millisecond.
const PATIENCE: Duration = Duration::from_millis(200);

/// However great the pressure is, it is not decided more often.
const SHORTEST_PERIOD: Duration = Duration::from_millis(200);

/// How often a directory is read although nobody said that it has changed: some file systems say nothing.
const SCAN_PERIOD: Duration = Duration::from_secs(10);

/// How long balloons are waited for at the end.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the manager is started with.
#[derive(Debug, Default)]
pub struct Options {
    /// The configuration; all defaults without one.
    pub config: Option<PathBuf>,
    /// The guests, and whether anything is sent to them.
    pub guests: GuestsOptions,
    /// Where the manager can be asked, and is told of new virtual machines.
    pub control_socket: Option<PathBuf>,
    /// Where everybody can read metrics.
    pub metrics_listen: Option<SocketAddr>,
    /// Where to write what was seen and decided, and how large that may become, bytes.
    pub record: Option<(PathBuf, u64)>,
    /// All guests get all of their memory back at the end.
    pub release_on_exit: bool,
}

/// The manager.
#[derive(Debug)]
pub struct Manager {
    options: Options,
    config: Arc<Config>,
    host: HostSampler,
    guests: Guests,
    decider: Decider,
    desk: Arc<Desk>,
    recorder: Option<Recorder>,
    /// The moment from which seconds are counted.
    epoch: Instant,
    ticks: u64,
    policy_failures: u64,
    /// The host could not be looked at the last time.
    host_lost: bool,
    /// What balloons were asked for at last, by name.
    decided: BTreeMap<String, u64>,
    scanned: Option<Instant>,
}

/// What has woken the loop.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a file descriptor of its own")]
struct Woken {
    end: bool,
    reload: bool,
    news: bool,
    changes: bool,
    pressure: bool,
    /// Triggers that will never trigger again.
    dead: Vec<usize>,
}

/// Reads a configuration, and checks its script. Without a path, it is all defaults.
pub fn load_config(path: Option<&Path>) -> Result<Config> {
    let Some(path) = path else { return Ok(Config::default()) };
    let config = Config::load(path)?;
    if let Some(script) = &config.script {
        Script::load(script, &config.policy)
            .check()
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("The script {} does not work", script.file.display()))?;
    }
    Ok(config)
}

impl Manager {
    /// Opens everything that is needed. Nothing is asked or sent yet.
    pub fn new(options: Options) -> Result<Self> {
        let config = load_config(options.config.as_deref())?;
        let host = HostSampler::new(&config.host.memory)?;
        Self::with_host(options, config, host)
    }

    fn with_host(options: Options, config: Config, host: HostSampler) -> Result<Self> {
        let config = Arc::new(config);
        let epoch = Instant::now();
        let guests = Guests::new(&options.guests, Arc::clone(&config), epoch)?;
        let recorder =
            match &options.record {
                Some((path, limit)) => Some(Recorder::open(path, *limit, &config).with_context(|| {
                    format!("{} cannot be written, where --record wants to", path.display())
                })?),
                None => None,
            };
        Ok(Self {
            decider: Decider::new(&config),
            desk: Desk::new().context("There are not enough file descriptors (ulimit -n)")?,
            options,
            config,
            host,
            guests,
            recorder,
            epoch,
            ticks: 0,
            policy_failures: 0,
            host_lost: false,
            decided: BTreeMap::new(),
            scanned: None,
        })
    }

    /// Manages until SIGTERM or SIGINT.
    pub fn run(mut self) -> Result<()> {
        let signals = Signals::install().context("Signal handlers cannot be installed")?;
        let _server = self.serve()?;
        info!(
            "Managing balloons every {} s with the {} policy{}",
            self.config.policy.period_seconds,
            self.policy_name(),
            if self.options.guests.dry_run { "; a dry run: nothing is sent" } else { "" }
        );
        let mut triggers = self.host.triggers();
        let (mut next, mut last) = (Instant::now(), None::<Instant>);
        loop {
            let woken = self.wait(&signals, &triggers, next).context("Waiting for events failed")?;
            if woken.end {
                break;
            }
            if woken.reload {
                signals.take_reload();
                if self.reload() {
                    triggers = self.host.triggers();
                }
            }
            if woken.changes {
                self.scan();
            }
            for at in woken.dead.iter().rev() {
                triggers.remove(*at);
            }
            if woken.pressure {
                self.desk.tell(What::Pressure);
            }
            if woken.news {
                self.desk.take_wake();
            }
            if woken.pressure || woken.news {
                next = next.min(last.map_or_else(Instant::now, |last| last + SHORTEST_PERIOD));
            }
            let now = Instant::now();
            if now >= next {
                self.tick();
                last = Some(now);
                next = now + self.period();
            }
        }
        if self.options.release_on_exit {
            info!("Ending: all guests get their memory back");
            self.guests.release(RELEASE_TIMEOUT);
        } else {
            info!("Ending: balloons keep their sizes");
        }
        Ok(())
    }

    /// Starts to answer on the control socket and the TCP port, if there are any.
    fn serve(&self) -> Result<Option<Server>> {
        let mut endpoints = Vec::new();
        if let Some(path) = &self.options.control_socket {
            let socket = Socket::open_private(path)?;
            endpoints.push(Endpoint::socket(socket, Arc::new(Private(Arc::clone(&self.desk)))));
        }
        if let Some(address) = self.options.metrics_listen {
            let listener = TcpListener::bind(address)
                .with_context(|| format!("{address} cannot be listened on: choose a port that is free"))?;
            info!("Metrics are at http://{}/metrics", listener.local_addr()?);
            endpoints.push(Endpoint::tcp(listener, Arc::new(Public(Arc::clone(&self.desk)))));
        }
        if endpoints.is_empty() {
            return Ok(None);
        }
        Ok(Some(Server::start(self.desk.bell(), endpoints)?))
    }

    fn period(&self) -> Duration {
        Duration::from_secs_f64(self.config.policy.period_seconds).max(SHORTEST_PERIOD)
    }

    fn policy_name(&self) -> String {
        match &self.config.script {
            None => "built-in".into(),
            Some(script) => script.file.display().to_string(),
        }
    }

    /// Waits until something happens, or until `next`.
    fn wait(&self, signals: &Signals, triggers: &[Trigger], next: Instant) -> io::Result<Woken> {
        let changes = self.guests.changes();
        let mut fds = vec![
            readable(signals.end()),
            readable(signals.reload()),
            readable(self.desk.wake()),
            // In place of none: something that never is readable again.
            changes.map_or_else(|| wait_for(signals.end(), PollFlags::empty()), readable),
        ];
        let first_trigger = fds.len();
        fds.extend(triggers.iter().map(|trigger| wait_for(trigger.as_fd(), PollFlags::PRI)));
        let timeout = next.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut woken = Woken {
            end: !fds[0].revents().is_empty(),
            reload: !fds[1].revents().is_empty(),
            news: !fds[2].revents().is_empty(),
            changes: changes.is_some() && !fds[3].revents().is_empty(),
            ..Woken::default()
        };
        for (index, fd) in fds[first_trigger..].iter().enumerate() {
            let revents = fd.revents();
            if revents.contains(PollFlags::ERR) {
                woken.dead.push(index);
            } else {
                woken.pressure |= revents.contains(PollFlags::PRI);
            }
        }
        Ok(woken)
    }

    fn scan(&mut self) {
        self.scanned = Some(Instant::now());
        self.guests.scan().into_iter().for_each(|event| self.desk.tell(event));
    }

    /// Looks at everything, decides, and sends.
    fn tick(&mut self) {
        if self.scanned.is_none_or(|at| at.elapsed() >= SCAN_PERIOD) {
            self.scan();
        }
        self.guests.poll(PATIENCE).into_iter().for_each(|event| self.desk.tell(event));
        let now = self.epoch.elapsed().as_secs_f64();
        let host = match self.host.sample(now) {
            Ok(host) => host,
            Err(error) => {
                if !self.host_lost {
                    let reason = format!("{:#}", anyhow::Error::from(error));
                    self.desk.tell(What::HostLost { reason });
                }
                self.host_lost = true;
                return;
            }
        };
        if std::mem::take(&mut self.host_lost) {
            self.desk.tell(What::HostBack);
        }
        let mut snapshot = Snapshot { now, host, guests: self.guests.snapshot(now), reserved: 0 };
        let reserve = percent(host.total, self.config.policy.reserve_percent);
        snapshot.reserved = self.desk.admit(&snapshot, reserve);
        let decision = self.decider.decide(&snapshot);
        self.ticks += 1;
        self.policy_failures += u64::from(decision.fallback);
        self.send(&snapshot, &decision);
        self.record(&snapshot, &decision);
        self.desk.show(self.status(&snapshot, &decision));
        decision.events.into_iter().for_each(|event| self.desk.tell_of_policy(event));
    }

    fn send(&mut self, snapshot: &Snapshot, decision: &Decision) {
        self.decided.retain(|name, _| snapshot.guests.iter().any(|guest| guest.name == *name));
        for order in &decision.orders {
            self.guests.send(&order.guest, order.balloon_bytes);
            let before = self.decided.insert(order.guest.clone(), order.balloon_bytes);
            // In a dry run it is the same again and again.
            if before != Some(order.balloon_bytes) {
                let memory = snapshot.guests.iter().find(|guest| guest.name == order.guest);
                let memory = memory.map_or(0, |guest| guest.memory);
                self.desk.tell(What::Target {
                    guest: order.guest.clone(),
                    balloon_bytes: order.balloon_bytes,
                    memory_bytes: memory.saturating_sub(order.balloon_bytes),
                    why: order.why,
                });
            }
        }
    }

    fn record(&mut self, snapshot: &Snapshot, decision: &Decision) {
        let Some(recorder) = &mut self.recorder else { return };
        let dry_run = self.options.guests.dry_run;
        if let Err(error) = recorder.tick(Tick::now(snapshot, &decision.wishes, &decision.orders, dry_run)) {
            self.recorder = None;
            self.desk.tell(What::RecordFailed { reason: error.to_string() });
        }
    }

    fn status(&self, snapshot: &Snapshot, decision: &Decision) -> ManagerStatus {
        let mut guests = self.guests.status(snapshot.now, &snapshot.guests);
        for guest in &mut guests {
            let name = &guest.guest.name;
            guest.wish_bytes = decision.wishes.get(name).copied();
            guest.decided_bytes = self.decided.get(name).copied();
        }
        let assessment = &decision.assessment;
        ManagerStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            dry_run: self.options.guests.dry_run,
            uptime_s: self.epoch.elapsed().as_secs(),
            ticks: self.ticks,
            policy: self.policy_name(),
            policy_failures: self.policy_failures,
            host: snapshot.host,
            mode: assessment.mode,
            critical: assessment.critical,
            budget_bytes: assessment.budget,
            overcommitted_bytes: assessment.overcommitted(),
            reserved_bytes: snapshot.reserved,
            guests,
        }
    }

    /// Reads the configuration again. Gives whether it is in use.
    fn reload(&mut self) -> bool {
        let Some(path) = self.options.config.clone() else {
            warn!("There is no configuration to read again: the manager was started without --config");
            return false;
        };
        let shown = path.display().to_string();
        let loaded = load_config(Some(&path)).and_then(|config| {
            let host = if config.host == self.config.host {
                None
            } else {
                Some(HostSampler::new(&config.host.memory)?)
            };
            Ok((config, host))
        });
        match loaded {
            Ok((config, host)) => {
                if let Some(host) = host {
                    self.host = host;
                }
                self.use_config(config);
                self.desk.tell(What::ConfigurationLoaded { path: shown });
                true
            }
            Err(error) => {
                let reason = format!("{error:#}");
                self.desk.tell(What::ConfigurationRefused { path: shown, reason });
                false
            }
        }
    }

    fn use_config(&mut self, config: Config) {
        self.decider.configure(&config);
        self.config = Arc::new(config);
        self.guests.configure(Arc::clone(&self.config));
        let Some((path, limit)) = &self.options.record else { return };
        let recorded = match &mut self.recorder {
            Some(recorder) => recorder.configure(&self.config),
            // It has ended, because the disk was full: there may be room again.
            None => Recorder::open(path, *limit, &self.config).map(|recorder| self.recorder = Some(recorder)),
        };
        if let Err(error) = recorded {
            self.recorder = None;
            self.desk.tell(What::RecordFailed { reason: error.to_string() });
        }
    }
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    wait_for(fd, PollFlags::IN)
}

fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags) -> PollFd<'_> {
    PollFd::from_borrowed_fd(fd, flags)
}

#[cfg(test)]
mod tests;
