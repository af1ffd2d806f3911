//! Memory for virtual machines that are about to start: found before they do, and kept until they show up.
//!
//! What is reserved counts as used: the policy takes it from the guests that need it least, as it would for any other
//! need. A reservation is granted when the host really has the memory; in the order in which they were asked for, so
//! that a large one is not overtaken for ever by small ones.

use std::fmt::Write as _;

use super::api::{Reservation, ReservationRequest};
use super::event::{Size, What};
use super::model::{Guest, Snapshot};

/// How long somebody may wait, and how long memory may be kept, seconds.
pub const LONGEST_SECONDS: u64 = 24 * 60 * 60;

/// Reservations at the same time, at most.
pub const MAX_RESERVATIONS: usize = 1024;

/// A status of HTTP, and the reason for a person.
pub type Refusal = (u16, String);

/// All reservations.
#[derive(Debug, Default)]
pub struct Admission {
    /// In the order in which they were asked for.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    request: ReservationRequest,
    granted: bool,
    /// When it is given up, seconds: the wait is over, or it has expired.
    until: f64,
}

impl Entry {
    fn event(&self, make: impl FnOnce(String, u64) -> What) -> What {
        make(self.request.name.clone(), self.request.bytes)
    }
}

/// What has become of a reservation that somebody may wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// Whether the memory is there.
    pub result: Result<Reservation, Refusal>,
}

impl Admission {
    /// Begins to find memory. `snapshot` is the latest; `reserve` is what the host keeps for itself, bytes.
    ///
    /// Refused if it can never work: with 400 or 409.
    pub fn ask(
        &mut self,
        request: ReservationRequest,
        snapshot: &Snapshot,
        reserve: u64,
    ) -> Result<What, Refusal> {
        if request.name.is_empty() || request.name.len() > 255 || request.name.contains(char::is_control) {
            return Err((400, "The name has to be that of a guest: 1 to 255 characters on one line".into()));
        }
        if request.bytes == 0 {
            return Err((400, "No memory is asked for: bytes is 0".into()));
        }
        if request.timeout_s > LONGEST_SECONDS || request.expires_s > LONGEST_SECONDS {
            return Err((400, format!("timeout_s and expires_s are at most {LONGEST_SECONDS}")));
        }
        let name = &request.name;
        if self.entries.iter().any(|entry| entry.request.name == *name) {
            return Err((
                409,
                format!(
                    "There is a reservation for {name} already: end it by --cancel (DELETE /v1/reservations/{name}) first"
                ),
            ));
        }
        if snapshot.guests.iter().any(|guest| guest.name == *name && is_here(guest)) {
            return Err((409, format!("The guest {name} runs already, and has its memory")));
        }
        if self.entries.len() >= MAX_RESERVATIONS {
            return Err((409, format!("There are {MAX_RESERVATIONS} reservations already")));
        }
        let minimums = sum(snapshot.guests.iter().map(|guest| guest.min.min(guest.memory)));
        let capacity = capacity(snapshot, reserve);
        let left = capacity.saturating_sub(minimums).saturating_sub(self.reserved());
        if request.bytes > left {
            return Err((
                409,
                format!(
                    "{} does not fit: of the {} that the host has for guests, their minimums take {} and reservations {}",
                    Size(request.bytes),
                    Size(capacity),
                    Size(minimums),
                    Size(self.reserved())
                ),
            ));
        }
        let until = snapshot.now + seconds(request.timeout_s);
        let entry = Entry { request, granted: false, until };
        let event = entry.event(|guest, bytes| What::ReservationAsked { guest, bytes });
        self.entries.push(entry);
        Ok(event)
    }

    /// Sees what has become of all reservations. Those that are told of with an error do not exist any more.
    pub fn look(&mut self, snapshot: &Snapshot, reserve: u64) -> (Vec<Outcome>, Vec<What>) {
        let (mut outcomes, mut events) = (Vec::new(), Vec::new());
        let now = snapshot.now;
        // Guests that have shown up need what is free as others do.
        self.entries.retain(|entry| {
            let name = &entry.request.name;
            let here = snapshot.guests.iter().any(|guest| guest.name == *name && is_here(guest));
            let expired = entry.granted && now >= entry.until;
            if here || expired {
                let reason = if here { "the guest is here" } else { "it did not show up in time" };
                events.push(What::ReservationEnded { guest: name.clone(), reason: reason.into() });
                if !entry.granted {
                    let refusal = (409, format!("The guest {name} runs already, and has its memory"));
                    outcomes.push(Outcome { name: name.clone(), result: Err(refusal) });
                }
            }
            !here && !expired
        });
        let granted = self.entries.iter().filter(|entry| entry.granted).map(|entry| entry.request.bytes);
        // Policies give all but the reserve, more or less: small changes are not worth a target. What lies in that must not
        // be waited for in vain.
        let mut free = snapshot.host.available.saturating_sub(reserve / 2).saturating_sub(sum(granted));
        for entry in &mut self.entries {
            if entry.granted {
                continue;
            }
            if entry.request.bytes > free {
                break;
            }
            free -= entry.request.bytes;
            entry.granted = true;
            entry.until = now + seconds(entry.request.expires_s);
            events.push(entry.event(|guest, bytes| What::ReservationGranted { guest, bytes }));
            outcomes.push(Outcome { name: entry.request.name.clone(), result: Ok(reservation(entry, now)) });
        }
        self.entries.retain(|entry| {
            let late = !entry.granted && now >= entry.until;
            if late {
                let reason = why_late(entry, free, snapshot);
                events.push(entry.event(|guest, bytes| What::ReservationRefused {
                    guest,
                    bytes,
                    reason: reason.clone(),
                }));
                outcomes.push(Outcome { name: entry.request.name.clone(), result: Err((504, reason)) });
            }
            !late
        });
        (outcomes, events)
    }

    /// Ends a reservation, if there is one.
    pub fn cancel(&mut self, name: &str) -> Option<What> {
        let at = self.entries.iter().position(|entry| entry.request.name == name)?;
        self.entries.remove(at);
        Some(What::ReservationEnded { guest: name.to_owned(), reason: "it was given up".into() })
    }

    /// What all reservations take, bytes.
    pub fn reserved(&self) -> u64 {
        sum(self.entries.iter().map(|entry| entry.request.bytes))
    }

    /// All reservations.
    pub fn list(&self, now: f64) -> Vec<Reservation> {
        self.entries.iter().map(|entry| reservation(entry, now)).collect()
    }
}

/// The host has given it memory, so that nothing is left to reserve.
fn is_here(guest: &Guest) -> bool {
    guest.memory > 0
}

/// What the host has for guests at all: what they hold, and what else there is, bytes.
fn capacity(snapshot: &Snapshot, reserve: u64) -> u64 {
    let held = sum(snapshot.guests.iter().map(|guest| guest.resident));
    held.saturating_add(snapshot.host.available).min(snapshot.host.total).saturating_sub(reserve)
}

fn why_late(entry: &Entry, free: u64, snapshot: &Snapshot) -> String {
    let mut reason = format!(
        "Of {}, {} was found within {} s",
        Size(entry.request.bytes),
        Size(free),
        entry.request.timeout_s
    );
    let alone: Vec<&str> = snapshot
        .guests
        .iter()
        .filter(|guest| guest.inactive || guest.usage.is_none())
        .map(|guest| guest.name.as_str())
        .collect();
    if !alone.is_empty() {
        let names = alone.iter().take(5).copied().collect::<Vec<_>>().join(", ");
        let more = if alone.len() > 5 { ", ..." } else { "" };
        // Writing to a string cannot fail.
        let _ = write!(reason, "; guests that could not be asked for memory: {names}{more}");
    }
    reason
}

fn reservation(entry: &Entry, now: f64) -> Reservation {
    Reservation {
        name: entry.request.name.clone(),
        bytes: entry.request.bytes,
        granted: entry.granted,
        remaining_s: (entry.until - now).max(0.0).round() as u64,
    }
}

fn sum(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

#[expect(clippy::cast_precision_loss, reason = "at most a day")]
fn seconds(seconds: u64) -> f64 {
    seconds.min(LONGEST_SECONDS) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manage::model::Host;

    const GIB: u64 = 1 << 30;

    fn request(name: &str, gib: u64) -> ReservationRequest {
        ReservationRequest { name: name.into(), bytes: gib * GIB, timeout_s: 10, expires_s: 100 }
    }

    fn guest(name: &str, min: u64) -> Guest {
        Guest { name: name.into(), memory: 4 * GIB, min, max: 4 * GIB, resident: 4 * GIB, ..Guest::default() }
    }

    /// 16 GiB, of which two guests have 4 GiB each, with a minimum of 1 GiB.
    fn snapshot(now: f64, available: u64) -> Snapshot {
        Snapshot {
            now,
            host: Host { total: 16 * GIB, available: available * GIB, ..Host::default() },
            guests: vec![guest("a", GIB), guest("b", GIB)],
            reserved: 0,
        }
    }

    fn names(outcomes: &[Outcome]) -> Vec<(&str, u16)> {
        outcomes
            .iter()
            .map(|outcome| {
                (outcome.name.as_str(), outcome.result.as_ref().err().map_or(200, |(status, _)| *status))
            })
            .collect()
    }

    #[test]
    fn memory_that_is_there_is_granted_at_the_next_look() {
        let mut admission = Admission::default();
        let event = admission.ask(request("c", 4), &snapshot(0.0, 6), GIB).unwrap();
        assert_eq!(event, What::ReservationAsked { guest: "c".into(), bytes: 4 * GIB });
        assert_eq!(admission.reserved(), 4 * GIB);
        let (outcomes, events) = admission.look(&snapshot(1.0, 6), GIB);
        let granted = Reservation { name: "c".into(), bytes: 4 * GIB, granted: true, remaining_s: 100 };
        assert_eq!(outcomes, [Outcome { name: "c".into(), result: Ok(granted.clone()) }]);
        assert_eq!(events, [What::ReservationGranted { guest: "c".into(), bytes: 4 * GIB }]);
        assert_eq!(admission.list(1.0), [granted]);
        // Told of once.
        assert_eq!(admission.look(&snapshot(2.0, 6), GIB), (vec![], vec![]));
    }

    #[test]
    fn memory_that_has_to_be_found_is_waited_for_in_order() {
        let mut admission = Admission::default();
        admission.ask(request("large", 6), &snapshot(0.0, 4), GIB).unwrap();
        admission.ask(request("small", 1), &snapshot(0.0, 4), GIB).unwrap();
        // There is enough for the small one, which came later.
        assert_eq!(admission.look(&snapshot(1.0, 4), GIB).0, []);
        let (outcomes, _) = admission.look(&snapshot(2.0, 7), GIB);
        assert_eq!(names(&outcomes), [("large", 200)]);
        // What is granted is not there for others.
        assert_eq!(admission.look(&snapshot(3.0, 7), GIB).0, []);
        let (outcomes, _) = admission.look(&snapshot(4.0, 8), GIB);
        assert_eq!(names(&outcomes), [("small", 200)]);
    }

    #[test]
    fn what_is_not_found_in_time_is_given_up() {
        let mut admission = Admission::default();
        admission.ask(request("c", 6), &snapshot(0.0, 4), GIB).unwrap();
        assert_eq!(admission.look(&snapshot(9.0, 4), GIB).0, []);
        let (outcomes, events) = admission.look(&snapshot(10.0, 4), GIB);
        assert_eq!(names(&outcomes), [("c", 504)]);
        let reason = &outcomes[0].result.as_ref().unwrap_err().1;
        assert_eq!(
            reason,
            "Of 6.0 GiB, 3.5 GiB was found within 10 s; guests that could not be asked for memory: a, b"
        );
        assert!(matches!(&events[..], [What::ReservationRefused { .. }]));
        assert_eq!(admission.reserved(), 0);
    }

    #[test]
    fn what_minimums_and_reservations_leave_is_the_most() {
        let mut admission = Admission::default();
        // 8 GiB of guests and 4 GiB free, less a reserve of 1 and minimums of 2.
        let (status, reason) = admission.ask(request("c", 10), &snapshot(0.0, 4), GIB).unwrap_err();
        assert_eq!(status, 409);
        assert_eq!(
            reason,
            "10.0 GiB does not fit: of the 11.0 GiB that the host has for guests, their minimums take 2.0 GiB and \
             reservations 0 B"
        );
        admission.ask(request("c", 5), &snapshot(0.0, 4), GIB).unwrap();
        assert_eq!(admission.ask(request("d", 5), &snapshot(0.0, 4), GIB).unwrap_err().0, 409);
        admission.ask(request("d", 4), &snapshot(0.0, 4), GIB).unwrap();
    }

    #[test]
    fn requests_that_make_no_sense_are_refused() {
        let mut admission = Admission::default();
        let snapshot = snapshot(0.0, 6);
        admission.ask(request("c", 1), &snapshot, 0).unwrap();
        let mut refused = |request| admission.ask(request, &snapshot, 0).unwrap_err().0;
        assert_eq!(refused(request("", 1)), 400);
        assert_eq!(refused(request("a\nb", 1)), 400);
        assert_eq!(refused(request("d", 0)), 400);
        assert_eq!(refused(ReservationRequest { timeout_s: u64::MAX, ..request("d", 1) }), 400);
        assert_eq!(refused(ReservationRequest { bytes: u64::MAX, ..request("d", 1) }), 409);
        assert_eq!(refused(request("c", 1)), 409);
        assert_eq!(refused(request("a", 1)), 409);
    }

    #[test]
    fn a_reservation_ends_with_its_guest_its_time_or_its_owner() {
        let mut admission = Admission::default();
        for name in ["c", "d", "e", "f"] {
            admission.ask(request(name, 1), &snapshot(0.0, 4), GIB).unwrap();
        }
        assert_eq!(admission.look(&snapshot(1.0, 4), GIB).0.len(), 3);
        // Its socket is there, but nothing boots yet.
        let mut next = snapshot(2.0, 4);
        next.guests.push(Guest { memory: 0, ..guest("c", GIB) });
        assert_eq!(admission.look(&next, GIB), (vec![], vec![]));
        next.guests[2].memory = GIB;
        let (outcomes, events) = admission.look(&next, GIB);
        // What it had is that of the next one, until it uses it.
        assert_eq!(names(&outcomes), [("f", 200)]);
        assert!(matches!(&events[0], What::ReservationEnded { guest, .. } if guest == "c"));
        assert!(admission.cancel("d").is_some() && admission.cancel("d").is_none());
        let (_, events) = admission.look(&snapshot(101.0, 4), GIB);
        let reason = "it did not show up in time".to_owned();
        assert_eq!(events, [What::ReservationEnded { guest: "e".into(), reason }]);
        assert_eq!(admission.reserved(), GIB);
    }

    #[test]
    fn a_guest_that_starts_before_its_memory_is_found_ends_the_wait() {
        let mut admission = Admission::default();
        admission.ask(request("c", 6), &snapshot(0.0, 4), GIB).unwrap();
        let mut next = snapshot(1.0, 4);
        next.guests.push(guest("c", GIB));
        assert_eq!(names(&admission.look(&next, GIB).0), [("c", 409)]);
    }
}
