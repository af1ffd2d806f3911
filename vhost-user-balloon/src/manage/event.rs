//! What the manager tells of: lines of its event stream, and of its log.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use log::Level;
use serde::{Deserialize, Serialize};

use super::policy;
use super::rails::Why;

/// Something that happened: a line of the event stream. `what` is a [`What`], or a [`policy::Event`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Event<T> {
    /// Milliseconds since 1970.
    pub ts_ms: u64,
    /// What.
    #[serde(flatten)]
    pub what: T,
}

impl<T> Event<T> {
    /// An event of this moment.
    pub fn now(what: T) -> Self {
        Self { ts_ms: unix_ms(), what }
    }
}

/// Milliseconds since 1970. 0 on a host whose clock is that wrong.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis().try_into().unwrap_or(u64::MAX))
}

/// What happened.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[expect(missing_docs, reason = "guests are named, sizes are bytes, reasons are for people")]
pub enum What {
    /// A balloon's control socket has shown up.
    GuestAppeared { guest: String, socket: String },
    /// It has gone.
    GuestVanished { guest: String },
    /// A guest has booted.
    GuestStarted { guest: String },
    /// A guest's virtual machine has ended, or its front end has let go of the balloon.
    GuestEnded { guest: String },
    /// A balloon does not answer, or not as it should: its guest is left alone until it does.
    GuestLost { guest: String, reason: String },
    /// It answers again.
    GuestBack { guest: String },
    /// A balloon does not do what it was asked for: its guest is left alone for a minute.
    GuestStuck { guest: String, reason: String },
    /// What a guest says of its memory makes no sense.
    GuestNonsense { guest: String },
    /// A balloon was asked to have another size; in a dry run, it would have been.
    Target { guest: String, balloon_bytes: u64, memory_bytes: u64, why: Why },
    /// The kernel has woken the manager because tasks wait for memory.
    Pressure,
    /// There is a new configuration.
    ConfigurationLoaded { path: String },
    /// There would be, if it had no mistakes; the old one stays.
    ConfigurationRefused { path: String, reason: String },
    /// The host cannot be looked at: nothing is decided.
    HostLost { reason: String },
    /// It can be again.
    HostBack,
    /// The recording cannot be written: it has ended.
    RecordFailed { reason: String },
    /// Memory is wanted for a virtual machine.
    ReservationAsked { guest: String, bytes: u64 },
    /// It is there.
    ReservationGranted { guest: String, bytes: u64 },
    /// It cannot be, or was not in time.
    ReservationRefused { guest: String, bytes: u64, reason: String },
    /// It is not kept any more.
    ReservationEnded { guest: String, reason: String },
    /// The reader was too slow: so many events are missing here.
    Lost { events: u64 },
}

impl What {
    /// How much it matters.
    pub fn level(&self) -> Level {
        match self {
            Self::GuestLost { .. }
            | Self::GuestStuck { .. }
            | Self::GuestNonsense { .. }
            | Self::ConfigurationRefused { .. }
            | Self::HostLost { .. }
            | Self::RecordFailed { .. }
            | Self::ReservationRefused { .. } => Level::Warn,
            // These come every second.
            Self::Target { .. } | Self::Pressure | Self::Lost { .. } => Level::Debug,
            _ => Level::Info,
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestAppeared { guest, socket } => write!(f, "Guest {guest} is managed at {socket}"),
            Self::GuestVanished { guest } => write!(f, "Guest {guest} is gone"),
            Self::GuestStarted { guest } => write!(f, "Guest {guest} has started"),
            Self::GuestEnded { guest } => write!(f, "Guest {guest} has ended"),
            Self::GuestLost { guest, reason } => {
                write!(f, "Guest {guest} is left alone: its balloon does not answer: {reason}")
            }
            Self::GuestBack { guest } => write!(f, "Guest {guest}'s balloon answers again"),
            Self::GuestStuck { guest, reason } => {
                write!(f, "Guest {guest} is left alone for a minute: {reason}")
            }
            Self::GuestNonsense { guest } => {
                write!(f, "Guest {guest}'s statistics make no sense, and are not used")
            }
            Self::Target { guest, balloon_bytes, memory_bytes, why } => write!(
                f,
                "Guest {guest} is left {}: its balloon's target is {} ({why})",
                Size(*memory_bytes),
                Size(*balloon_bytes)
            ),
            Self::Pressure => write!(f, "The kernel reports memory pressure"),
            Self::ConfigurationLoaded { path } => write!(f, "The configuration {path} is in use"),
            Self::ConfigurationRefused { path, reason } => {
                write!(f, "The configuration {path} is not used, the old one stays: {reason}")
            }
            Self::HostLost { reason } => write!(f, "Nothing is decided: {reason}"),
            Self::HostBack => write!(f, "The host can be looked at again"),
            Self::RecordFailed { reason } => {
                write!(
                    f,
                    "The recording has ended, and goes on after a reload (SIGHUP) or a restart: {reason}"
                )
            }
            Self::ReservationAsked { guest, bytes } => {
                write!(f, "Memory is wanted for {guest}: {}", Size(*bytes))
            }
            Self::ReservationGranted { guest, bytes } => {
                write!(f, "Memory is reserved for {guest}: {}", Size(*bytes))
            }
            Self::ReservationRefused { guest, bytes, reason } => {
                write!(f, "Memory for {guest} was not found ({}): {reason}", Size(*bytes))
            }
            Self::ReservationEnded { guest, reason } => {
                write!(f, "Memory for {guest} is not reserved any more: {reason}")
            }
            Self::Lost { events } => write!(f, "{events} events are missing here"),
        }
    }
}

/// How much an event of the policy matters, and what it says, for a person.
pub(super) fn describe(event: &policy::Event) -> (Level, String) {
    use policy::Event;
    match event {
        Event::Mode { mode, before } => (Level::Info, format!("Memory is {mode:?}, and was {before:?}")),
        Event::PolicyFailed { reason } => {
            (Level::Warn, format!("The built-in policy decides, because the script does not work: {reason}"))
        }
        Event::PolicyRecovered => (Level::Info, "The script works again".into()),
        Event::HostCritical => (Level::Warn, "The host is about to run out of memory".into()),
        Event::HostRecovered => (Level::Info, "The host has memory again".into()),
        Event::OverBudget { missing } => (
            Level::Warn,
            format!("The guests need {} more than there is, and none can be asked for it", Size(*missing)),
        ),
        Event::GuestEmergency { guest } => (Level::Warn, format!("Guest {guest} is out of memory")),
        Event::NoProgress { guest, target, balloon } => (
            Level::Warn,
            format!(
                "Guest {guest} is not asked for memory for a minute: its balloon has {} instead of {}",
                Size(*balloon),
                Size(*target)
            ),
        ),
    }
}

/// Shows a number of bytes with a unit, as people read it.
#[derive(Clone, Copy, Debug)]
pub struct Size(
    /// Bytes.
    pub u64,
);

impl fmt::Display for Size {
    #[expect(clippy::cast_precision_loss, reason = "it is rounded")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        let text = match self.0 {
            0..=1023 => format!("{} B", self.0),
            1024..=1_048_575 => format!("{:.0} KiB", bytes / 1024.0),
            1_048_576..=1_073_741_823 => format!("{:.0} MiB", bytes / f64::from(1 << 20)),
            _ => format!("{:.1} GiB", bytes / f64::from(1 << 30)),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_line() {
        let event = Event { ts_ms: 5, what: What::GuestVanished { guest: "a".into() } };
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(line, r#"{"ts_ms":5,"event":"guest-vanished","guest":"a"}"#);
        assert_eq!(serde_json::from_str::<Event<What>>(&line).unwrap(), event);
        assert!(Event::now(What::Pressure).ts_ms > 1_700_000_000_000);
    }

    #[test]
    fn sizes_are_readable() {
        let sizes = [0, 1023, 1024, 5 << 20, 3 << 29].map(|bytes| Size(bytes).to_string());
        assert_eq!(sizes, ["0 B", "1023 B", "1 KiB", "5 MiB", "1.5 GiB"]);
        assert_eq!(format!("{:>7}", Size(1024)), "  1 KiB");
    }
}
