//! The part of Firecracker's API that is about its balloon (`src/firecracker/swagger/firecracker.yaml` of Firecracker):
//! what is done has status 204, and all that is wrong has status 400.
//!
//! What Firecracker takes before a machine starts is a flag of the daemon here: it can be repeated, and not changed.

use vhost_user_daemon::control::{Request, Response};

use super::Controlled;
use crate::api::{FirecrackerBalloon, StatisticsInterval, Target};

/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// The longest interval of statistics, seconds: Firecracker's.
const MAX_INTERVAL: u64 = u16::MAX as u64;

/// `GET /balloon`.
pub(super) fn configuration(balloon: &dyn Controlled) -> Response {
    let status = balloon.status();
    let offered = balloon.offered();
    Response::json(&FirecrackerBalloon {
        amount_mib: status.requested_bytes / MIB,
        deflate_on_oom: Some(offered.deflate_on_oom),
        stats_polling_interval_s: Some(status.statistics_interval_s),
        free_page_hinting: Some(false),
        free_page_reporting: Some(offered.free_page_reporting),
    })
}

/// `PUT /balloon` and `PATCH /balloon`.
pub(super) fn update(balloon: &dyn Controlled, request: &Request) -> Result<Response, Response> {
    let wanted: FirecrackerBalloon = request.json()?;
    let offered = balloon.offered();
    let cannot = |what: &str, flag: &str| {
        Err(Response::fault(
            400,
            &format!("{what} cannot be changed while the daemon runs: start it with {flag}"),
        ))
    };
    if wanted.deflate_on_oom.is_some_and(|wanted| wanted != offered.deflate_on_oom) {
        return cannot("deflate_on_oom", "--deflate-on-oom on or off");
    }
    if wanted.free_page_reporting.is_some_and(|wanted| wanted != offered.free_page_reporting) {
        return cannot("free_page_reporting", "--free-page-reporting on or off");
    }
    if wanted.free_page_hinting == Some(true) {
        return Err(Response::fault(
            400,
            "There is no free_page_hinting: guests may use such pages again before they are taken. Use \
             free_page_reporting",
        ));
    }
    let interval = wanted.stats_polling_interval_s;
    interval.map_or(Ok(()), check_interval)?;
    // Too much for the device as well, if it overflows.
    let bytes = wanted.amount_mib.saturating_mul(MIB);
    balloon
        .set_target(Target { balloon_bytes: Some(bytes), guest_bytes: None })
        .map_err(|error| Response::fault(400, &error.to_string()))?;
    if let Some(seconds) = interval {
        balloon.set_statistics_interval(seconds);
    }
    Ok(Response::no_content())
}

/// `GET /balloon/statistics`.
pub(super) fn statistics(balloon: &dyn Controlled) -> Result<Response, Response> {
    match balloon.statistics() {
        Some(statistics) => Ok(Response::json(&statistics)),
        None => Err(Response::fault(
            400,
            "There are no statistics: set stats_polling_interval_s, and wait until the guest's balloon driver runs",
        )),
    }
}

/// `PATCH /balloon/statistics`.
pub(super) fn set_interval(balloon: &dyn Controlled, request: &Request) -> Result<Response, Response> {
    let StatisticsInterval { stats_polling_interval_s: seconds } = request.json()?;
    check_interval(seconds)?;
    balloon.set_statistics_interval(seconds);
    Ok(Response::no_content())
}

fn check_interval(seconds: u64) -> Result<(), Response> {
    if seconds <= MAX_INTERVAL {
        Ok(())
    } else {
        Err(Response::fault(400, &format!("stats_polling_interval_s is at most {MAX_INTERVAL}")))
    }
}
