//! The requests, and their answers.

use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost_user_daemon::control::metrics::Page;
use vhost_user_daemon::control::{Feed, Handler, Method, Reply, Request, Response};

use super::{Controlled, firecracker, metrics};
use crate::api::Target;
use crate::device::TargetError;

/// How long a guest may take to give its statistics, unless the request says otherwise.
const STATISTICS_TIMEOUT: u64 = 1000;

/// The longest that can be asked for, milliseconds.
const MAX_STATISTICS_TIMEOUT: u64 = 60_000;

/// Answers the requests of [`api`](crate::api).
pub struct Routes {
    balloon: Arc<dyn Controlled>,
    feed: Feed,
}

impl Routes {
    /// Answers for `balloon`, whose events go to `feed`.
    pub fn new(balloon: Arc<dyn Controlled>, feed: Feed) -> Self {
        Self { balloon, feed }
    }

    fn route(&self, request: &Request) -> Result<Reply, Response> {
        let balloon = &*self.balloon;
        let allowed = match (&*request.path, request.method) {
            ("/v1/status", Method::Get) => return Ok(Response::json(&balloon.status()).into()),
            ("/v1/target", Method::Put) => return set_target(balloon, request).map(Reply::Now),
            ("/v1/statistics", Method::Get) => return self.statistics(request),
            ("/v1/events", Method::Get) => {
                return Ok(Reply::Stream(self.feed.subscribe(parameter(request, "past", 0)?)));
            }
            ("/metrics", Method::Get) => {
                let mut page = Page::new();
                metrics::write(&mut page, &[(&[], &balloon.status())]);
                return Ok(page.into_response().into());
            }
            ("/healthz", Method::Get) => return Ok(Response::text("text/plain", "ok\n".into()).into()),
            ("/balloon", Method::Get) => return Ok(firecracker::configuration(balloon).into()),
            ("/balloon", Method::Put | Method::Patch) => {
                return firecracker::update(balloon, request).map(Reply::Now);
            }
            ("/balloon/statistics", Method::Get) => return firecracker::statistics(balloon).map(Reply::Now),
            ("/balloon/statistics", Method::Patch) => {
                return firecracker::set_interval(balloon, request).map(Reply::Now);
            }
            ("/v1/status" | "/v1/statistics" | "/v1/events" | "/metrics" | "/healthz", _) => "GET",
            ("/v1/target", _) => "PUT",
            ("/balloon", _) => "GET, PUT, PATCH",
            ("/balloon/statistics", _) => "GET, PATCH",
            _ => return Err(Response::not_found(request)),
        };
        Err(Response::method_not_allowed(allowed))
    }

    /// `GET /v1/statistics`: what is known, or with `fresh=1` what the guest answers now.
    fn statistics(&self, request: &Request) -> Result<Reply, Response> {
        if parameter(request, "fresh", 0_u8)? == 0 {
            return match self.balloon.statistics() {
                Some(statistics) => Ok(Response::json(&statistics).into()),
                None => Err(Response::fault(
                    409,
                    "The guest has given no statistics yet: ask it now (fresh=1, or ctl stats --fresh), or at an interval",
                )),
            };
        }
        let timeout = parameter(request, "timeout_ms", STATISTICS_TIMEOUT)?;
        if timeout > MAX_STATISTICS_TIMEOUT {
            return Err(Response::fault(400, &format!("timeout_ms is at most {MAX_STATISTICS_TIMEOUT}")));
        }
        let Some(number) = self.balloon.ask_statistics() else {
            return Err(Response::fault(
                409,
                "The guest has no statistics to give: its balloon driver does not run, or has none",
            ));
        };
        let balloon = Arc::clone(&self.balloon);
        Ok(Reply::Later {
            deadline: Instant::now() + Duration::from_millis(timeout),
            ready: Box::new(move |expired| match balloon.statistics_after(number) {
                Some(statistics) => Some(Response::json(&statistics)),
                None if expired => {
                    let message = format!(
                        "The guest has not given statistics within {timeout} ms: it may be paused, or overloaded"
                    );
                    Some(Response::fault(504, &message))
                }
                None => None,
            }),
        })
    }
}

impl Handler for Routes {
    fn handle(&self, request: &Request) -> Reply {
        self.route(request).unwrap_or_else(Reply::Now)
    }
}

/// `PUT /v1/target`.
fn set_target(balloon: &dyn Controlled, request: &Request) -> Result<Response, Response> {
    let target: Target = request.json()?;
    balloon.set_target(target).map_err(|error| {
        let status = match error {
            TargetError::MemoryUnknown => 409,
            TargetError::NotOne | TargetError::TooLarge(_) => 400,
        };
        Response::fault(status, &error.to_string())
    })?;
    Ok(Response::json(&balloon.status()))
}

/// A number of the query.
fn parameter<T: FromStr>(request: &Request, name: &str, default: T) -> Result<T, Response> {
    match request.query(name) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| {
            Response::fault(400, &format!("{name}={text} in the query: a whole number is needed"))
        }),
    }
}
