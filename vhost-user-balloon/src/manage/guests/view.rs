//! What a balloon's answers, one after the other, say of its guest.

use std::collections::VecDeque;

use crate::api::{Activity, GuestStatistics, Statistics, Status};
use crate::manage::config::GuestSettings;
use crate::manage::host::rate;
use crate::manage::model::{Guest, Usage};

/// How long a guest is left alone whose balloon did not do what it was asked for, seconds.
pub const INACTIVE_SECONDS: f64 = 60.0;

/// How long sizes of the balloon are remembered, seconds: longer than statistics are believed.
const HISTORY_SECONDS: f64 = 30.0;

/// Two statistics that are nearer in time make no rate, seconds.
const SHORTEST: f64 = 0.2;

/// Statistics that are so much newer are new ones, even if they say the same, seconds.
const SURELY_NEW: f64 = 0.5;

/// No guest has more memory than this, bytes: a daemon can be as wrong as a guest, and sums over all guests must not
/// overflow because of it. 64 TiB.
const LARGEST: u64 = 1 << 46;

/// Something about a guest that is worth an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// Its driver has started anew: the guest has booted.
    Started,
    /// Its front end is gone.
    Ended,
    /// Its balloon does not do what it was asked for.
    Stuck(Activity),
    /// What it says of itself makes no sense.
    Nonsense,
}

/// What is known of a guest, by its balloon's answers.
#[derive(Debug, Default)]
pub struct View {
    /// The last answer, and when it came, seconds.
    last: Option<(f64, Status)>,
    /// The last request had no answer, or a bad one.
    unreachable: bool,
    /// Sizes of the balloon and when they were seen: oldest first.
    sizes: VecDeque<(f64, u64)>,
    measured: Option<Measured>,
    /// Processes killed, that no snapshot has told of yet.
    oom_kills: u64,
    /// Processes killed in all.
    oom_kills_in_all: u64,
    /// Until then the guest is left alone, seconds.
    inactive_until: f64,
    nonsense: bool,
}

/// Statistics of a guest.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// When they were made, seconds.
    at: f64,
    guest: GuestStatistics,
    swap_in: f64,
    swap_out: f64,
    major_faults: f64,
}

impl View {
    /// Takes an answer that came at `now`, in seconds as for [`HostSampler::sample`].
    ///
    /// [`HostSampler::sample`]: crate::manage::host::HostSampler::sample
    pub fn answer(&mut self, now: f64, status: Status) -> Vec<Noted> {
        let mut noted = Vec::new();
        let before = self.last.take().map(|(_, status)| status);
        if let Some(before) = &before {
            if before.connected && !status.connected {
                noted.push(Noted::Ended);
            }
            // A daemon that was restarted counts from nothing, and its guest may be the same: better once too often.
            if (before.pid, before.counters.driver_starts) != (status.pid, status.counters.driver_starts) {
                noted.push(Noted::Started);
                let Self { oom_kills, oom_kills_in_all, .. } = *self;
                *self = Self { oom_kills, oom_kills_in_all, ..Self::default() };
            }
        }
        self.unreachable = false;
        self.sizes.push_back((now, status.actual_bytes));
        while self.sizes.front().is_some_and(|(at, _)| now - at > HISTORY_SECONDS) {
            self.sizes.pop_front();
        }
        if let Activity::Stalled | Activity::Held = status.activity {
            if before.is_none_or(|before| before.activity != status.activity) {
                noted.push(Noted::Stuck(status.activity));
            }
            self.inactive_until = now + INACTIVE_SECONDS;
        }
        if let Some(statistics) = &status.statistics {
            self.measure(now, statistics);
            // There may be statistics of a guest that is gone.
            let nonsense = !is_absent(&status) && !makes_sense(&statistics.guest, memory(&status));
            if nonsense && !self.nonsense {
                noted.push(Noted::Nonsense);
            }
            self.nonsense = nonsense;
        }
        self.last = Some((now, status));
        noted
    }

    /// Takes note that the balloon did not answer, or not as it should.
    pub fn no_answer(&mut self) {
        self.unreachable = true;
    }

    /// The balloon's last answer, if there was any.
    pub fn status(&self) -> Option<&Status> {
        self.last.as_ref().map(|(_, status)| status)
    }

    /// How old the last answer is, seconds.
    pub fn age(&self, now: f64) -> Option<f64> {
        self.last.as_ref().map(|(at, _)| now - at)
    }

    /// The guest as a policy sees it. Statistics that are older than `stale_seconds` are not passed on.
    ///
    /// Processes that were killed are told of once: call it once for each snapshot.
    pub fn guest(&mut self, now: f64, name: &str, settings: &GuestSettings, stale_seconds: f64) -> Guest {
        let Some((answered, status)) = &self.last else {
            return Guest {
                name: name.to_owned(),
                min: settings.min,
                max: settings.max,
                shares: settings.shares,
                inactive: true,
                ..Guest::default()
            };
        };
        let memory = memory(status);
        let lost = self.unreachable || now - answered > stale_seconds;
        let absent = is_absent(status);
        let min = settings.min.max(status.min_guest_memory_bytes);
        let usage = if lost || absent { None } else { self.usage(now, status, stale_seconds) };
        let guest = Guest {
            name: name.to_owned(),
            memory,
            min: if memory > 0 { min.min(memory) } else { min },
            max: settings.max.min(memory).max(min.min(memory)),
            shares: settings.shares,
            balloon: status.actual_bytes.min(memory),
            target: status.target_bytes.min(memory),
            // What the host holds of it cannot be more than it is; more would be taken for memory that can be shared.
            resident: status.resident_bytes.min(memory),
            usage: usage.map(|usage| Usage { oom_kills: self.oom_kills, ..usage }),
            inactive: lost || absent || now < self.inactive_until,
            stuck: !lost && status.activity == Activity::Stalled,
            deflates_on_oom: deflates_on_oom(status),
        };
        if guest.usage.is_some() {
            self.oom_kills = 0;
        }
        guest
    }

    /// Processes that the guest killed for want of memory, since the first answer.
    pub fn oom_kills_in_all(&self) -> u64 {
        self.oom_kills_in_all
    }

    /// Keeps new statistics, and how fast counters grow.
    fn measure(&mut self, now: f64, statistics: &Statistics) {
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of some days")]
        let at = now - statistics.age_ms as f64 / 1000.0;
        let guest = statistics.guest;
        let mut measured = Measured { at, guest, swap_in: 0.0, swap_out: 0.0, major_faults: 0.0 };
        if let Some(last) = &self.measured {
            let seconds = at - last.at;
            let new = seconds > SURELY_NEW || (seconds >= SHORTEST && guest != last.guest);
            if !new {
                return;
            }
            let rate = |of: fn(&GuestStatistics) -> Option<u64>| match (of(&last.guest), of(&guest)) {
                (Some(before), Some(after)) => rate(before, after, seconds),
                _ => 0.0,
            };
            measured.swap_in = rate(|guest| guest.swap_in);
            measured.swap_out = rate(|guest| guest.swap_out);
            measured.major_faults = rate(|guest| guest.major_faults);
            if let (Some(before), Some(after)) = (last.guest.oom_kill, guest.oom_kill) {
                let kills = after.saturating_sub(before);
                self.oom_kills = self.oom_kills.saturating_add(kills);
                self.oom_kills_in_all = self.oom_kills_in_all.saturating_add(kills);
            }
        }
        self.measured = Some(measured);
    }

    /// What the guest says of itself, as if it had said it now.
    fn usage(&self, now: f64, status: &Status, stale_seconds: f64) -> Option<Usage> {
        let measured = self.measured.as_ref()?;
        let guest = &measured.guest;
        if now - measured.at > stale_seconds || !makes_sense(guest, memory(status)) {
            return None;
        }
        // The balloon has moved since the guest looked. What it uses itself has not, as far as one knows; so the balloon
        // has moved by what was free. Otherwise a balloon that inflates quickly would hide what its guest needs.
        let then = self.size_at(measured.at)?;
        let moved = |bytes: u64| bytes.saturating_add(then).saturating_sub(status.actual_bytes);
        let total = guest.total_memory?;
        let total = if deflates_on_oom(status) { total } else { moved(total).min(memory(status)) };
        Some(Usage {
            total,
            available: moved(available(guest)?).min(total),
            free: moved(guest.free_memory.unwrap_or(0)).min(total),
            balloon: None,
            swap_in: measured.swap_in,
            swap_out: measured.swap_out,
            major_faults: measured.major_faults,
            oom_kills: 0,
        })
    }

    /// The balloon's size at some time: what was seen next to it.
    fn size_at(&self, at: f64) -> Option<u64> {
        let distance = |(seen, _): &&(f64, u64)| (seen - at).abs();
        let nearest = self.sizes.iter().min_by(|one, other| distance(one).total_cmp(&distance(other)));
        nearest.map(|(_, size)| *size)
    }
}

/// All of the guest's memory, bytes.
fn memory(status: &Status) -> u64 {
    status.guest_memory_bytes.min(LARGEST)
}

/// No guest uses the balloon.
fn is_absent(status: &Status) -> bool {
    !status.connected || status.activity == Activity::Absent || status.guest_memory_bytes == 0
}

fn deflates_on_oom(status: &Status) -> bool {
    status.features.iter().any(|feature| feature == "deflate-on-oom")
}

/// What a guest could have without swapping. Old guests do not say it, but what it is made of.
fn available(guest: &GuestStatistics) -> Option<u64> {
    guest.available_memory.or_else(|| Some(guest.free_memory?.saturating_add(guest.disk_caches?)))
}

/// Whether numbers that come from a guest fit together. A guest can write what it wants.
fn makes_sense(guest: &GuestStatistics, memory: u64) -> bool {
    let (Some(total), Some(available)) = (guest.total_memory, available(guest)) else { return false };
    total > 0 && total <= memory && available <= total && guest.free_memory.is_none_or(|free| free <= total)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::api::Counters;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// A guest of 4 GiB that has 3 GiB available, and says so with an age of `age_ms`.
    pub(crate) fn status(balloon: u64, age_ms: u64) -> Status {
        Status {
            version: "0".into(),
            pid: 1,
            connected: true,
            activity: Activity::Idle,
            guest_memory_bytes: 4 * GIB,
            resident_bytes: 2 * GIB,
            requested_bytes: balloon,
            target_bytes: balloon,
            actual_bytes: balloon,
            min_guest_memory_bytes: 0,
            ballooned_bytes: balloon,
            released_bytes: balloon,
            pending_bytes: 0,
            held_bytes: 0,
            features: vec!["statistics".into(), "deflate-on-oom".into()],
            statistics_interval_s: 1,
            statistics: Some(Statistics {
                age_ms,
                guest: GuestStatistics {
                    total_memory: Some(4 * GIB),
                    available_memory: Some(3 * GIB),
                    free_memory: Some(GIB),
                    swap_in: Some(0),
                    swap_out: Some(0),
                    major_faults: Some(0),
                    oom_kill: Some(0),
                    ..GuestStatistics::default()
                },
                ..Statistics::default()
            }),
            counters: Counters::default(),
        }
    }

    fn guest_mut(status: &mut Status) -> &mut GuestStatistics {
        &mut status.statistics.as_mut().unwrap().guest
    }

    fn look(view: &mut View, now: f64) -> Guest {
        view.guest(now, "a", &GuestSettings::default(), 5.0)
    }

    #[test]
    fn a_guest_that_never_answered_is_left_alone() {
        let mut view = View::default();
        let guest = look(&mut view, 0.0);
        assert!(guest.inactive && guest.usage.is_none() && guest.memory == 0);
        assert_eq!((guest.name.as_str(), guest.shares, guest.min), ("a", 1000, 256 * MIB));
    }

    #[test]
    fn counters_become_rates() {
        let mut view = View::default();
        view.answer(1.0, status(0, 0));
        let swap_in = |view: &mut View, now| look(view, now).usage.unwrap().swap_in as u64;
        assert_eq!(swap_in(&mut view, 1.0), 0);
        let mut next = status(0, 500);
        *guest_mut(&mut next) = GuestStatistics {
            swap_in: Some(6 * MIB),
            major_faults: Some(20),
            oom_kill: Some(2),
            ..*guest_mut(&mut next)
        };
        view.answer(3.5, next.clone());
        let usage = look(&mut view, 3.5).usage.unwrap();
        assert_eq!((usage.swap_in as u64, usage.major_faults as u64, usage.oom_kills), (3 * MIB, 10, 2));
        // The same statistics, half a second older: nothing new, and nobody is killed twice.
        next.statistics.as_mut().unwrap().age_ms = 1000;
        view.answer(4.0, next.clone());
        let usage = look(&mut view, 4.0).usage.unwrap();
        assert_eq!((usage.swap_in as u64, usage.oom_kills), (3 * MIB, 0));
        // New ones that say the same: it has stopped.
        next.statistics.as_mut().unwrap().age_ms = 0;
        view.answer(5.0, next);
        assert_eq!(swap_in(&mut view, 5.0), 0);
    }

    #[test]
    fn old_statistics_are_not_believed() {
        let mut view = View::default();
        view.answer(10.0, status(0, 4000));
        assert!(look(&mut view, 10.5).usage.is_some());
        let guest = look(&mut view, 11.5);
        assert!(guest.usage.is_none() && !guest.inactive);
        // Nor is anything else, in the end.
        assert!(look(&mut view, 15.5).inactive);
    }

    #[test]
    fn numbers_that_do_not_fit_together_are_not_believed() {
        let wrong: [fn(&mut GuestStatistics); 6] = [
            |guest| guest.total_memory = Some(0),
            |guest| guest.total_memory = Some(5 * GIB),
            |guest| guest.total_memory = None,
            |guest| guest.available_memory = Some(u64::MAX),
            |guest| guest.available_memory = None,
            |guest| guest.free_memory = Some(u64::MAX),
        ];
        for change in wrong {
            let mut view = View::default();
            let mut nonsense = status(0, 0);
            change(guest_mut(&mut nonsense));
            assert_eq!(view.answer(1.0, nonsense.clone()), [Noted::Nonsense]);
            assert_eq!(view.answer(2.0, nonsense), []);
            let guest = look(&mut view, 2.0);
            assert!(guest.usage.is_none() && !guest.inactive, "{guest:?}");
        }
        // Guests before Linux 4.6 know what is free and what is cached.
        let mut view = View::default();
        let mut old = status(0, 0);
        guest_mut(&mut old).available_memory = None;
        guest_mut(&mut old).disk_caches = Some(GIB);
        view.answer(1.0, old);
        assert_eq!(look(&mut view, 1.0).usage.unwrap().available, 2 * GIB);
    }

    #[test]
    fn a_balloon_that_moves_does_not_change_what_its_guest_uses() {
        for on_oom in [true, false] {
            let mut view = View::default();
            let with = |balloon, age_ms| {
                let mut status = status(balloon, age_ms);
                if !on_oom {
                    status.features.clear();
                }
                status
            };
            view.answer(1.0, with(0, 0));
            // It has grown by 2 GiB; the guest has not spoken again.
            view.answer(2.0, with(2 * GIB, 1000));
            let usage = look(&mut view, 2.0).usage.unwrap();
            assert_eq!((usage.available, usage.free), (GIB, 0));
            assert_eq!(usage.total, if on_oom { 4 * GIB } else { 2 * GIB });
            // It shrinks again, faster than the guest speaks.
            view.answer(3.0, with(GIB, 2000));
            let usage = look(&mut view, 3.0).usage.unwrap();
            assert_eq!((usage.available, usage.free), (2 * GIB, 0));
            assert_eq!(usage.total, if on_oom { 4 * GIB } else { 3 * GIB });
            // The guest has spoken since it moved, although nobody looked in between.
            view.answer(4.0, with(0, 100));
            assert_eq!(look(&mut view, 4.0).usage.unwrap().available, 3 * GIB);
        }
    }

    #[test]
    fn balloons_that_are_stuck_are_left_alone_for_a_minute() {
        for activity in [Activity::Stalled, Activity::Held] {
            let mut view = View::default();
            view.answer(1.0, status(0, 0));
            let stuck = Status { activity, ..status(0, 0) };
            assert_eq!(view.answer(2.0, stuck.clone()), [Noted::Stuck(activity)]);
            assert_eq!(view.answer(3.0, stuck), []);
            view.answer(4.0, status(0, 0));
            assert!(look(&mut view, 4.0).inactive);
            view.answer(62.0, status(0, 0));
            assert!(look(&mut view, 62.0).inactive);
            view.answer(64.0, status(0, 0));
            assert!(!look(&mut view, 64.0).inactive);
        }
    }

    #[test]
    fn a_daemon_that_does_not_answer_makes_its_guest_inactive() {
        let mut view = View::default();
        view.answer(1.0, status(GIB, 0));
        view.no_answer();
        let guest = look(&mut view, 1.5);
        assert!(guest.inactive && guest.usage.is_none());
        assert_eq!((guest.memory, guest.balloon, guest.resident), (4 * GIB, GIB, 2 * GIB));
        view.answer(2.0, status(GIB, 0));
        assert!(!look(&mut view, 2.0).inactive);
    }

    #[test]
    fn guests_come_and_go() {
        let mut view = View::default();
        view.answer(1.0, status(GIB, 0));
        let gone =
            Status { connected: false, activity: Activity::Absent, guest_memory_bytes: 0, ..status(0, 0) };
        assert_eq!(view.answer(2.0, gone), [Noted::Ended]);
        assert!(look(&mut view, 2.0).inactive);
        let mut anew = status(0, 0);
        anew.counters.driver_starts = 1;
        guest_mut(&mut anew).oom_kill = Some(7);
        assert_eq!(view.answer(3.0, anew), [Noted::Started]);
        let guest = look(&mut view, 3.0);
        // Its counters are those of another life.
        assert_eq!(guest.usage.unwrap().oom_kills, 0);
        assert!(!guest.inactive);
    }

    #[test]
    fn bounds_fit_the_guest() {
        let settings = GuestSettings { min: 8 * GIB, max: 16 * GIB, ..GuestSettings::default() };
        let mut view = View::default();
        view.answer(1.0, status(0, 0));
        let guest = view.guest(1.0, "a", &settings, 5.0);
        assert_eq!((guest.min, guest.max), (4 * GIB, 4 * GIB));
        let settings = GuestSettings { min: GIB, max: 2 * GIB, ..GuestSettings::default() };
        let floor = Status { min_guest_memory_bytes: 3 * GIB, ..status(u64::MAX, 0) };
        view.answer(2.0, floor);
        let guest = view.guest(2.0, "a", &settings, 5.0);
        assert_eq!((guest.min, guest.max, guest.balloon), (3 * GIB, 3 * GIB, 4 * GIB));
    }

    #[test]
    fn daemons_can_be_wrong_too() {
        let wrong = Status {
            guest_memory_bytes: u64::MAX,
            resident_bytes: u64::MAX,
            target_bytes: u64::MAX,
            min_guest_memory_bytes: u64::MAX,
            ..status(u64::MAX, 0)
        };
        let mut view = View::default();
        view.answer(1.0, wrong);
        let guest = look(&mut view, 1.0);
        assert_eq!((guest.memory, guest.max, guest.min), (LARGEST, LARGEST, LARGEST));
        assert_eq!((guest.resident, guest.balloon, guest.target), (LARGEST, LARGEST, LARGEST));
        // As many of these as there can be fit into a sum.
        let guests = super::super::MAX_GUESTS as u64;
        assert!(LARGEST.checked_mul(guests * 10).is_some());
        // More is held of it than there is of it.
        view.answer(2.0, Status { resident_bytes: u64::MAX, ..status(0, 0) });
        assert_eq!(look(&mut view, 2.0).resident, 4 * GIB);
    }

    #[test]
    fn a_balloon_that_stalls_is_stuck_as_long_as_it_does() {
        let mut view = View::default();
        view.answer(1.0, Status { activity: Activity::Stalled, ..status(0, 0) });
        let guest = look(&mut view, 1.0);
        assert!(guest.stuck && guest.inactive);
        view.answer(2.0, status(0, 0));
        let guest = look(&mut view, 2.0);
        assert!(!guest.stuck && guest.inactive);
    }
}
