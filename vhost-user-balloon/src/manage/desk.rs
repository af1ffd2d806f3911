//! What the manager's loop and its control socket share, and how requests are answered.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::log;
use rustix::event::{EventfdFlags, eventfd};
use vhost_user_daemon::control::{Bell, Feed, Handler, Method, Reply, Request, Response};

use super::admission::{Admission, LONGEST_SECONDS, Outcome, Refusal};
use super::api::{ManagerStatus, Reservation, ReservationRequest};
use super::event::{Event, What, describe};
use super::metrics;
use super::model::Snapshot;
use super::policy;

/// A manager that has not decided for so long is not healthy.
const UNHEALTHY: Duration = Duration::from_secs(10);

/// How much longer than its client a wait for memory lasts at most: the manager's answer is the better one.
const SLACK: Duration = Duration::from_secs(5);

/// Events that a new reader is told of, at most.
const PAST_EVENTS: usize = vhost_user_daemon::control::KEPT_EVENTS;

/// What is shared.
#[derive(Debug)]
pub struct Desk {
    state: Mutex<State>,
    bell: Bell,
    feed: Feed,
    /// Wakes the manager's loop.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    status: ManagerStatus,
    admission: Admission,
    /// Who waits for a reservation.
    waits: Vec<(String, Arc<Wait>)>,
    /// What was seen last; `None` before the first look.
    latest: Option<Latest>,
    /// When it was decided at last.
    decided: Option<Instant>,
}

#[derive(Debug)]
struct Latest {
    snapshot: Snapshot,
    /// What the host keeps for itself, bytes.
    reserve: u64,
}

/// A client that waits. It has gone when nobody else has this.
type Wait = Mutex<Option<Result<Reservation, Refusal>>>;

impl Desk {
    /// A desk before the first look at anything.
    pub fn new() -> io::Result<Arc<Self>> {
        let bell = Bell::new()?;
        let lost = |events| serde_json::to_string(&Event::now(What::Lost { events })).unwrap_or_default();
        let feed = Feed::new(&bell, lost);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { state: Mutex::default(), bell, feed, wake }))
    }

    /// The bell of the control socket's server.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Readable when something has come that should not wait for the next tick, until [`take_wake`](Self::take_wake).
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Forgets that something has come.
    pub fn take_wake(&self) {
        // It does not block, and nothing is to be had from it.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Tells everybody who listens.
    pub fn tell(&self, what: What) {
        log!(what.level(), "{what}");
        self.feed.publish(&Event::now(what));
    }

    /// Tells of an event of the policy.
    pub fn tell_of_policy(&self, event: policy::Event) {
        let (level, text) = describe(&event);
        log!(level, "{text}");
        self.feed.publish(&Event::now(event));
    }

    /// Sees what becomes of reservations, now that the host and its guests look like this. Gives what is reserved, bytes.
    pub fn admit(&self, snapshot: &Snapshot, reserve: u64) -> u64 {
        let mut state = self.lock();
        let State { admission, waits, .. } = &mut *state;
        // Who has gone while waiting does not want it any more.
        let (mut outcomes, mut events) = (Vec::new(), Vec::new());
        for (name, _) in waits.iter().filter(|(_, wait)| Arc::strong_count(wait) == 1) {
            events.extend(admission.cancel(name));
        }
        waits.retain(|(_, wait)| Arc::strong_count(wait) > 1);
        let (looked, news) = admission.look(snapshot, reserve);
        outcomes.extend(looked);
        events.extend(news);
        let told = !outcomes.is_empty();
        for Outcome { name, result } in outcomes {
            if let Some(at) = waits.iter().position(|(waiting, _)| *waiting == name) {
                let (_, wait) = waits.swap_remove(at);
                *wait.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            }
        }
        let reserved = admission.reserved();
        state.latest = Some(Latest { snapshot: snapshot.clone(), reserve });
        drop(state);
        for event in events {
            self.tell(event);
        }
        if told {
            self.bell.ring();
        }
        reserved
    }

    /// Shows a new status: it was decided.
    pub fn show(&self, status: ManagerStatus) {
        let mut state = self.lock();
        state.status = status;
        state.decided = Some(Instant::now());
    }

    /// Changes the status that is shown.
    pub fn amend(&self, change: impl FnOnce(&mut ManagerStatus)) {
        change(&mut self.lock().status);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> Response {
        let state = self.lock();
        let healthy = state.decided.is_some_and(|at| at.elapsed() < UNHEALTHY);
        if healthy {
            Response::text("text/plain", "ok\n".into())
        } else {
            Response::fault(503, "The manager has not decided anything for ten seconds: its log says why")
        }
    }

    fn reserve(&self, request: ReservationRequest) -> Reply {
        let mut state = self.lock();
        let State { admission, latest, waits, .. } = &mut *state;
        let Some(latest) = latest else {
            return Response::fault(503, "The manager has not looked at the host yet: try again").into();
        };
        let name = request.name.clone();
        let timeout = Duration::from_secs(request.timeout_s.min(LONGEST_SECONDS));
        let event = match admission.ask(request, &latest.snapshot, latest.reserve) {
            Ok(event) => event,
            Err((status, reason)) => return Response::fault(status, &reason).into(),
        };
        let wait = Arc::new(Wait::default());
        waits.push((name, Arc::clone(&wait)));
        drop(state);
        self.tell(event);
        // It does not block: when the counter is full, the loop is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        Reply::Later {
            deadline: Instant::now() + timeout + SLACK,
            ready: Box::new(move |_| {
                let result = wait.lock().unwrap_or_else(PoisonError::into_inner).take()?;
                Some(match result {
                    Ok(reservation) => Response::json(&reservation),
                    Err((status, reason)) => Response::fault(status, &reason),
                })
            }),
        }
    }

    fn cancel(&self, name: &str) -> Response {
        let mut state = self.lock();
        let Some(event) = state.admission.cancel(name) else {
            return Response::fault(404, &format!("There is no reservation for {name}"));
        };
        let wait = state.waits.iter().position(|(waiting, _)| waiting == name);
        if let Some(at) = wait {
            let (_, wait) = state.waits.swap_remove(at);
            let refusal = (409, "The reservation was given up by somebody else".into());
            *wait.lock().unwrap_or_else(PoisonError::into_inner) = Some(Err(refusal));
        }
        drop(state);
        self.tell(event);
        self.bell.ring();
        Response::no_content()
    }
}

/// Answers on the control socket.
#[derive(Debug)]
pub struct Private(
    /// What is shared with the loop.
    pub Arc<Desk>,
);

impl Handler for Private {
    fn handle(&self, request: &Request) -> Reply {
        let desk = &self.0;
        let allow = |methods| Response::method_not_allowed(methods).into();
        match (request.method, &*request.path) {
            (Method::Get, "/v1/status") => Response::json(&desk.lock().status).into(),
            (Method::Get, "/v1/events") => {
                let past = request.query("past").and_then(|past| past.parse().ok()).unwrap_or(0);
                Reply::Stream(desk.feed.subscribe(PAST_EVENTS.min(past)))
            }
            (Method::Get, "/v1/reservations") => {
                let state = desk.lock();
                let now = state.latest.as_ref().map_or(0.0, |latest| latest.snapshot.now);
                Response::json(&state.admission.list(now)).into()
            }
            (Method::Post, "/v1/reservations") => match request.json() {
                Ok(wanted) => desk.reserve(wanted),
                Err(response) => response.into(),
            },
            (_, "/v1/status" | "/v1/events") => allow("GET"),
            (_, "/v1/reservations") => allow("GET, POST"),
            (method, path) => match path.strip_prefix("/v1/reservations/") {
                Some(name) if method == Method::Delete => desk.cancel(name).into(),
                Some(_) => allow("DELETE"),
                None => public(desk, request).into(),
            },
        }
    }
}

/// Answers on the TCP port, to everybody: what is no secret.
#[derive(Debug)]
pub struct Public(
    /// What is shared with the loop.
    pub Arc<Desk>,
);

impl Handler for Public {
    fn handle(&self, request: &Request) -> Reply {
        public(&self.0, request).into()
    }
}

fn public(desk: &Desk, request: &Request) -> Response {
    match (request.method, &*request.path) {
        (Method::Get, "/metrics") => metrics::page(&desk.lock().status).into_response(),
        (Method::Get, "/healthz") => desk.health(),
        (_, "/metrics" | "/healthz") => Response::method_not_allowed("GET"),
        _ => Response::not_found(request),
    }
}

#[cfg(test)]
mod tests;
