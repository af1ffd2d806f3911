//! A thread that talks to one balloon.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::de::IgnoredAny;
use vhost_user_daemon::control::{Client, ClientError};

use super::view::{Noted, View};
use crate::api::{Activity, Status, Target};
use crate::manage::event::What;

/// How long a balloon may take for an answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// New statistics, for which the guest may take a tenth of a second. It is asked at every look, whatever the balloon's own
/// interval: how large a balloon was when old ones were made is not known well enough while it moves.
const STATISTICS: &str = "/v1/statistics?fresh=1&timeout_ms=100";

/// Bytes that an answer may have: a balloon says a few thousand.
const MAX_ANSWER: usize = 64 << 10;

/// What the thread needs: the answers are small, and are read by a small parser.
const STACK: usize = 256 << 10;

/// The thread's handle. Dropping it ends the thread, though not before a request that is under way is over.
#[derive(Debug)]
pub(super) struct Poller {
    path: PathBuf,
    desk: Arc<Desk>,
}

/// What the thread and the manager share.
#[derive(Debug, Default)]
struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a wish or a fact of its own")]
struct State {
    /// The status is wanted.
    due: bool,
    /// A size that is to be sent.
    target: Option<u64>,
    /// A request is under way.
    busy: bool,
    /// Nothing may be sent.
    hands_off: bool,
    /// The thread has to end.
    end: bool,
    view: View,
    /// Why the last request had no good answer.
    failure: Option<String>,
    /// The last answer did not come in time: nobody waits for the next.
    slow: bool,
    events: Vec<What>,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Poller {
    pub fn start(name: &str, path: &Path, hands_off: bool, epoch: Instant) -> io::Result<Self> {
        let desk =
            Arc::new(Desk { state: Mutex::new(State { hands_off, ..State::default() }), ..Desk::default() });
        let talk = Talk {
            name: name.to_owned(),
            desk: Arc::clone(&desk),
            client: Client::new(path),
            epoch,
            has_statistics: false,
        };
        thread::Builder::new().name("balloon".into()).stack_size(STACK).spawn(move || talk.run())?;
        Ok(Self { path: path.to_owned(), desk })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn set_hands_off(&self, hands_off: bool) {
        let mut state = self.desk.lock();
        state.hands_off = hands_off;
        if hands_off {
            state.target = None;
        }
    }

    /// Asks for the status, unless an answer is still to come. Gives whether the answer is worth waiting for.
    pub fn ask(&self) -> bool {
        let mut state = self.desk.lock();
        if state.busy {
            return false;
        }
        state.due = true;
        self.desk.changed.notify_all();
        !state.slow
    }

    /// Waits until the thread has nothing to do, or until `deadline`.
    pub fn wait(&self, deadline: Instant) {
        let mut state = self.desk.lock();
        while state.busy || state.due || state.target.is_some() {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                state.slow = true;
                return;
            }
            (state, _) =
                self.desk.changed.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has the balloon asked for another size, in bytes.
    pub fn send(&self, balloon_bytes: u64) {
        let mut state = self.desk.lock();
        if !state.hands_off {
            state.target = Some(balloon_bytes);
            self.desk.changed.notify_all();
        }
    }

    pub fn take_events(&self) -> Vec<What> {
        std::mem::take(&mut self.desk.lock().events)
    }

    pub fn failure(&self) -> Option<String> {
        self.desk.lock().failure.clone()
    }

    pub fn with_view<T>(&self, look: impl FnOnce(&mut View) -> T) -> T {
        look(&mut self.desk.lock().view)
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.desk.lock().end = true;
        self.desk.changed.notify_all();
    }
}

/// The thread.
struct Talk {
    name: String,
    desk: Arc<Desk>,
    client: Client,
    epoch: Instant,
    /// The guest has statistics to give.
    has_statistics: bool,
}

impl Talk {
    fn run(mut self) {
        self.client.set_timeout(TIMEOUT);
        self.client.set_max_answer(MAX_ANSWER);
        let desk = Arc::clone(&self.desk);
        let mut state = desk.lock();
        loop {
            if state.end {
                return;
            }
            let target = state.target.take();
            if !state.due && target.is_none() {
                state = desk.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.due = false;
            state.busy = true;
            drop(state);
            let answer = self.request(target);
            let now = self.epoch.elapsed().as_secs_f64();
            state = desk.lock();
            state.busy = false;
            self.keep(&mut state, now, answer);
            desk.changed.notify_all();
        }
    }

    /// Asks for the status, or for another size, whose answer is the status too.
    fn request(&mut self, target: Option<u64>) -> Result<Status, ClientError> {
        if let Some(bytes) = target {
            let target = Target { balloon_bytes: Some(bytes), guest_bytes: None };
            return self.client.put("/v1/target", &target);
        }
        if self.has_statistics
            && let Err(error) = self.client.get::<IgnoredAny>(STATISTICS)
            && !matches!(error, ClientError::Refused { .. })
        {
            return Err(error);
        }
        // If the guest gave none, here are the old ones, and how old they are.
        let status: Status = self.client.get("/v1/status")?;
        self.has_statistics = status.features.iter().any(|feature| feature == "statistics");
        Ok(status)
    }

    fn keep(&self, state: &mut State, now: f64, answer: Result<Status, ClientError>) {
        let guest = || self.name.clone();
        match answer {
            Ok(status) => {
                state.slow = false;
                if state.failure.take().is_some() {
                    state.events.push(What::GuestBack { guest: guest() });
                }
                for noted in state.view.answer(now, status) {
                    state.events.push(match noted {
                        Noted::Started => What::GuestStarted { guest: guest() },
                        Noted::Ended => What::GuestEnded { guest: guest() },
                        Noted::Stuck(activity) => {
                            What::GuestStuck { guest: guest(), reason: why_stuck(activity) }
                        }
                        Noted::Nonsense => What::GuestNonsense { guest: guest() },
                    });
                }
            }
            Err(error) => {
                state.slow |= matches!(error, ClientError::Timeout { .. });
                state.view.no_answer();
                let reason = format!("{:#}", anyhow::Error::from(error));
                if state.failure.is_none() {
                    state.events.push(What::GuestLost { guest: guest(), reason: reason.clone() });
                }
                state.failure = Some(reason);
            }
        }
    }
}

fn why_stuck(activity: Activity) -> String {
    match activity {
        Activity::Held => "it takes back huge pages that the host does not have",
        _ => "its balloon does not get where it should: it has nothing to give",
    }
    .into()
}
