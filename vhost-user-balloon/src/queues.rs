//! Which queue is which.
//!
//! The virtio text numbers the queues 0 to 4 (1.3, section 5.5.2). Linux numbers only those that it uses, so that queues
//! after a feature that was not negotiated move down, and reporting is queue 3 or even 2. Both are served: as Linux does,
//! until a queue is used that it would not have.

use crate::config::Features;

/// Queues of the device.
pub const QUEUES: usize = 5;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pages that the guest gives.
    Inflate,
    /// Pages that it takes back.
    Deflate,
    /// A buffer with statistics.
    Statistics,
    /// Reports of free pages.
    Reporting,
}

/// What each queue is for, given the features that were negotiated and the queues that are in use. `None` for those that
/// nobody should use.
pub fn roles(features: Features, running: [bool; QUEUES]) -> [Option<Role>; QUEUES] {
    let statistics = features.contains(Features::STATISTICS).then_some(Role::Statistics);
    let reporting = features.contains(Features::REPORTING).then_some(Role::Reporting);
    let mut roles = [Some(Role::Inflate), Some(Role::Deflate), None, None, None];
    let used = 2 + usize::from(statistics.is_some()) + usize::from(reporting.is_some());
    if running.iter().skip(used).any(|running| *running) {
        roles[2] = statistics;
        roles[4] = reporting;
    } else {
        for (queue, role) in (2..).zip(statistics.into_iter().chain(reporting)) {
            roles[queue] = Some(role);
        }
    }
    roles
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For all subsets of the features: both ways to number the queues are understood, and no queue has two roles.
    #[test]
    fn both_layouts_of_all_feature_subsets_are_understood() {
        for bits in 0..64 {
            let features = Features::from_bits_truncate(bits);
            let statistics = features.contains(Features::STATISTICS);
            let reporting = features.contains(Features::REPORTING);
            let optional = [(statistics, Role::Statistics, 2), (reporting, Role::Reporting, 4)];
            let mut compact = vec![Role::Inflate, Role::Deflate];
            let mut fixed = vec![(0, Role::Inflate), (1, Role::Deflate)];
            for (present, role, number) in optional {
                if present {
                    compact.push(role);
                    fixed.push((number, role));
                }
            }
            let compact: Vec<_> = compact.into_iter().enumerate().collect();
            for layout in [compact, fixed] {
                let mut running = [false; QUEUES];
                for (number, _) in &layout {
                    running[*number] = true;
                }
                let roles = roles(features, running);
                for (number, role) in &layout {
                    assert_eq!(roles[*number], Some(*role), "{features:?} {layout:?}");
                }
                assert_eq!(roles.iter().flatten().count(), layout.len(), "{features:?} {layout:?}");
            }
        }
    }
}
