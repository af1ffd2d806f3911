//! Sets a target, and waits until the balloon has it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;

use super::units::size;
use super::{Session, status};
use crate::api::{Activity, Status, Target};

/// How often the balloon is looked at.
const STEP: Duration = Duration::from_millis(50);

/// How long a balloon that is called stalled may stand still before that is believed: the daemon may speak of the target
/// before.
const STALL: Duration = Duration::from_secs(4);

impl Session<'_> {
    pub(super) fn set_target(
        &mut self,
        balloon_bytes: Option<u64>,
        guest_bytes: Option<u64>,
        wait: Option<Duration>,
    ) -> anyhow::Result<()> {
        let target = Target { balloon_bytes, guest_bytes };
        let mut status: Status = self.client.put("/v1/target", &target)?;
        let (outcome, reached) = match wait {
            Some(timeout) => self.wait(&mut status, timeout)?,
            None => (String::new(), true),
        };
        if reached {
            return self.print(&status, |status| summary(status, wait.is_some()));
        }
        bail!("The balloon has {} of {}: {outcome}", size(status.actual_bytes), size(status::wanted(&status)))
    }

    /// Waits until the balloon is as it shall be, or why it is not.
    fn wait(&mut self, status: &mut Status, timeout: Duration) -> anyhow::Result<(String, bool)> {
        let deadline = Instant::now() + timeout;
        let wanted = status.requested_bytes;
        let mut moved = (status.actual_bytes, Instant::now());
        loop {
            if status.activity == Activity::Idle && status.pending_bytes == 0 {
                return Ok((String::new(), true));
            }
            if status.requested_bytes != wanted {
                return Ok(("somebody else has set another target".into(), false));
            }
            if status.actual_bytes != moved.0 {
                moved = (status.actual_bytes, Instant::now());
            }
            let stalled = status.activity == Activity::Stalled && moved.1.elapsed() >= STALL;
            if stalled || Instant::now() >= deadline {
                let activity = status::activity(status.activity);
                let is_moving = matches!(status.activity, Activity::Inflating | Activity::Deflating);
                let why =
                    if is_moving { format!("still {activity} after {timeout:.0?}") } else { activity.into() };
                return Ok((why, false));
            }
            thread::sleep(STEP);
            *status = self.client.get("/v1/status")?;
        }
    }
}

/// What was asked for and what there is, in one line.
fn summary(status: &Status, waited: bool) -> String {
    let (target, minimum) = (size(status::wanted(status)), status::minimum(status));
    let resident = size(status.resident_bytes);
    if waited {
        format!("The balloon is {target}{minimum}; the host holds {resident} of the guest's memory\n")
    } else if status.guest_memory_bytes == 0 {
        format!("The balloon will be {target} when a driver uses it\n")
    } else {
        let actual = size(status.actual_bytes);
        format!("The balloon is {actual}, and is asked to be {target}{minimum}\n")
    }
}
