//! What happens to a balloon, a line for each event.

use anyhow::bail;

use super::Session;
use super::units::size;
use crate::api::{Event, What};

impl Session<'_> {
    /// Prints events until the daemon ends.
    pub(super) fn events(&mut self, past: usize) -> anyhow::Result<()> {
        for event in self.client.stream::<Event>(&format!("/v1/events?past={past}"))? {
            self.print(&event?, |event| format!("{} {}\n", time(event.ts_ms), describe(&event.what)))?;
        }
        bail!("The daemon on socket {} has ended", self.client.path().display())
    }
}

/// The time of day (UTC) of milliseconds since 1970.
fn time(ms: u64) -> String {
    let seconds = ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60, ms % 1000)
}

fn describe(what: &What) -> String {
    match what {
        What::Connected => "A front end has connected".into(),
        What::Disconnected => "The front end has left".into(),
        What::DriverStarted { guest_memory_bytes } => {
            format!("A driver has started, in a guest of {}", size(*guest_memory_bytes))
        }
        What::Target { requested_bytes, target_bytes } if requested_bytes == target_bytes => {
            format!("Target {}", size(*target_bytes))
        }
        What::Target { requested_bytes, target_bytes } => {
            format!("Target {} ({} were asked for)", size(*target_bytes), size(*requested_bytes))
        }
        What::Actual { actual_bytes, target_bytes, resident_bytes } => {
            format!(
                "Balloon {} of {}, resident {}",
                size(*actual_bytes),
                size(*target_bytes),
                size(*resident_bytes)
            )
        }
        What::Reached { actual_bytes, resident_bytes } => {
            format!("Target reached: balloon {}, resident {}", size(*actual_bytes), size(*resident_bytes))
        }
        What::Stalled { actual_bytes, target_bytes } => {
            format!(
                "Stalled at {} of {}: the guest has nothing to give",
                size(*actual_bytes),
                size(*target_bytes)
            )
        }
        What::OomDeflated { bytes, actual_bytes } => {
            format!(
                "The guest is short of memory: it took {} back, balloon {}",
                size(*bytes),
                size(*actual_bytes)
            )
        }
        What::DeflateHeld { bytes } => {
            format!("The guest wants {} back, and waits for huge pages of the host", size(*bytes))
        }
        What::DeflateResumed => "There are huge pages: the guest goes on".into(),
        What::ReleaseFailed { reason } => format!("Memory could not be given to the host: {reason}"),
        What::Lost { events } => format!("{events} events are missing here: they came too fast"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_of_the_day() {
        assert_eq!(time(0), "00:00:00.000");
        assert_eq!(time(86_400_000 * 20_000 + 3_600_000 * 23 + 59 * 60_000 + 1_002), "23:59:01.002");
    }
}
