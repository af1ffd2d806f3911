//! Which user and group of the host a guest's user and group are.
//!
//! [`GuestId`] and [`HostId`] are types of their own, so that an id cannot get across without being mapped. Without
//! `--uid-map` and `--gid-map` the numbers are the same on both sides.

use std::str::FromStr;

use clap::ValueEnum;
use thiserror::Error;

/// A user or group as the guest numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestId(pub u32);

/// A user or group as the host numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostId(pub u32);

/// The user and the group nobody: what a guest sees of a host's id that is not mapped.
pub const NOBODY: u32 = 65_534;
/// The id that stands for none in system calls, (uid_t)-1.
const NO_ID: u32 = u32::MAX;

/// A run of ids that a map takes from one side to the other.
///
/// Parsed from `GUEST:HOST:COUNT`: the first id on each side and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    guest: u32,
    host: u32,
    count: u32,
}

/// Why a text is no range of ids, or ranges are no map.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum IdMapError {
    /// Not three numbers.
    #[error("'{0}' is no map of ids; write GUEST:HOST:COUNT, such as 0:100000:65536")]
    Syntax(String),
    /// A count of zero.
    #[error("The id map '{0}' maps nothing; give a count of at least 1")]
    Empty(String),
    /// Ids above 4294967294.
    #[error("The id map '{0}' goes beyond 4294967294, the largest id; lower its count")]
    Overflow(String),
    /// An id of the guest has two of the host.
    #[error("The id maps {0} and {1} both map id {2} of the guest; each id may be mapped once")]
    GuestOverlap(IdRange, IdRange, u32),
    /// Two ids of the guest have the same one of the host.
    #[error("The id maps {0} and {1} both map to id {2} of the host; each id may be mapped once")]
    HostOverlap(IdRange, IdRange, u32),
    /// Not two numbers.
    #[error("'{0}' is no user and group to squash to; write UID:GID, such as 65534:65534")]
    SquashTo(String),
}

impl std::fmt::Display for IdRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.guest, self.host, self.count)
    }
}

impl FromStr for IdRange {
    type Err = IdMapError;

    fn from_str(text: &str) -> Result<Self, IdMapError> {
        let numbers: Vec<u32> = text
            .split(':')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map_err(|_| IdMapError::Syntax(text.to_owned()))?;
        let [guest, host, count] = numbers[..] else {
            return Err(IdMapError::Syntax(text.to_owned()));
        };
        if count == 0 {
            return Err(IdMapError::Empty(text.to_owned()));
        }
        // The last id is below (uid_t)-1.
        let fits = |first: u32| first.checked_add(count).is_some();
        if !fits(guest) || !fits(host) {
            return Err(IdMapError::Overflow(text.to_owned()));
        }
        Ok(Self { guest, host, count })
    }
}

/// The first id that two runs of ids have in common.
fn overlap((a, a_count): (u32, u32), (b, b_count): (u32, u32)) -> Option<u32> {
    // No run goes beyond the largest number, which was checked when it was parsed.
    let first = a.max(b);
    (first < (a + a_count).min(b + b_count)).then_some(first)
}

/// A map of users or of groups, in both directions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    /// None: each id is itself.
    ranges: Vec<IdRange>,
}

impl IdMap {
    /// A map of these ranges; without any, each id is itself.
    pub fn new(ranges: Vec<IdRange>) -> Result<Self, IdMapError> {
        for (i, a) in ranges.iter().enumerate() {
            for b in &ranges[..i] {
                if let Some(id) = overlap((a.guest, a.count), (b.guest, b.count)) {
                    return Err(IdMapError::GuestOverlap(*b, *a, id));
                }
                if let Some(id) = overlap((a.host, a.count), (b.host, b.count)) {
                    return Err(IdMapError::HostOverlap(*b, *a, id));
                }
            }
        }
        Ok(Self { ranges })
    }

    /// The host's id; `None` if the guest's is not mapped.
    pub fn to_host(&self, GuestId(id): GuestId) -> Option<HostId> {
        if id == NO_ID {
            return None;
        }
        if self.ranges.is_empty() {
            return Some(HostId(id));
        }
        self.ranges.iter().find_map(|range| {
            let index = id.checked_sub(range.guest)?;
            (index < range.count).then(|| HostId(range.host + index))
        })
    }

    /// Whether the host's id is one of the guest's.
    pub fn knows(&self, HostId(id): HostId) -> bool {
        self.ranges.is_empty()
            || self
                .ranges
                .iter()
                .any(|range| id.checked_sub(range.host).is_some_and(|index| index < range.count))
    }

    /// The guest's id; [`NOBODY`] if the host's is not mapped.
    pub fn to_guest(&self, HostId(id): HostId) -> GuestId {
        if self.ranges.is_empty() {
            return GuestId(id);
        }
        let mapped = self.ranges.iter().find_map(|range| {
            let index = id.checked_sub(range.host)?;
            (index < range.count).then(|| GuestId(range.guest + index))
        });
        mapped.unwrap_or(GuestId(NOBODY))
    }
}

/// Which of the guest's ids are replaced: `--squash`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Squash {
    /// None.
    #[default]
    None,
    /// User 0 and group 0.
    Root,
    /// Every user and every group.
    All,
}

/// What squashed ids become: `--squash-to`. Parsed from `UID:GID`, ids of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SquashTo {
    /// The user.
    pub uid: HostId,
    /// The group.
    pub gid: HostId,
}

impl Default for SquashTo {
    fn default() -> Self {
        Self { uid: HostId(NOBODY), gid: HostId(NOBODY) }
    }
}

impl FromStr for SquashTo {
    type Err = IdMapError;

    fn from_str(text: &str) -> Result<Self, IdMapError> {
        let id = |number: &str| number.parse().ok().filter(|id| *id != NO_ID).map(HostId);
        text.split_once(':')
            .and_then(|(uid, gid)| Some(Self { uid: id(uid)?, gid: id(gid)? }))
            .ok_or_else(|| IdMapError::SquashTo(text.to_owned()))
    }
}

impl std::fmt::Display for SquashTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.uid.0, self.gid.0)
    }
}

/// The users and groups of a guest on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// The users.
    pub uids: IdMap,
    /// The groups.
    pub gids: IdMap,
    /// What is replaced before it is mapped.
    pub squash: Squash,
    /// By what.
    pub squash_to: SquashTo,
}

impl Ids {
    /// The host's user; `None` if the guest's is not mapped: the guest gets `EINVAL` (or `EPERM`, if it is the caller).
    pub fn uid_to_host(&self, uid: GuestId) -> Option<HostId> {
        if self.squashes(uid) { Some(self.squash_to.uid) } else { self.uids.to_host(uid) }
    }

    /// The host's group, as [`Ids::uid_to_host`].
    pub fn gid_to_host(&self, gid: GuestId) -> Option<HostId> {
        if self.squashes(gid) { Some(self.squash_to.gid) } else { self.gids.to_host(gid) }
    }

    /// The guest's user; [`NOBODY`] if the host's is not mapped.
    pub fn uid_to_guest(&self, uid: HostId) -> GuestId {
        self.uids.to_guest(uid)
    }

    /// The guest's group, as [`Ids::uid_to_guest`].
    pub fn gid_to_guest(&self, gid: HostId) -> GuestId {
        self.gids.to_guest(gid)
    }

    /// Whether any user of the guest is somebody else on the host.
    pub fn is_guarded(&self) -> bool {
        self.squash != Squash::None || !self.uids.ranges.is_empty() || !self.gids.ranges.is_empty()
    }

    /// Whether this user or group is replaced. What a replaced user may do is then the host's to check
    /// ([`assume_unprivileged`](super::identity::assume_unprivileged)), for the guest's own check was for another one.
    pub fn squashes(&self, GuestId(id): GuestId) -> bool {
        match self.squash {
            Squash::None => false,
            // Nobody in particular is as trusted as root, who could be it.
            Squash::Root => id == 0 || id == NO_ID,
            Squash::All => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(ranges: &[&str]) -> Result<IdMap, IdMapError> {
        IdMap::new(ranges.iter().map(|range| range.parse().unwrap()).collect())
    }

    #[test]
    fn without_a_map_ids_are_the_same() {
        let map = IdMap::default();
        for id in [0, 1000, NOBODY, u32::MAX - 1] {
            assert_eq!(map.to_host(GuestId(id)), Some(HostId(id)));
            assert_eq!(map.to_guest(HostId(id)), GuestId(id));
        }
        // (uid_t)-1 would leave an owner as it is.
        assert_eq!(map.to_host(GuestId(u32::MAX)), None);
    }

    #[test]
    fn ranges_map_both_ways() {
        let map = map(&["0:100000:1000", "1000:1000:1", "2000:0:1"]).unwrap();
        for (guest, host) in [(0, 100_000), (999, 100_999), (1000, 1000), (2000, 0)] {
            assert_eq!(map.to_host(GuestId(guest)), Some(HostId(host)));
            assert_eq!(map.to_guest(HostId(host)), GuestId(guest));
        }
        for guest in [1001, 1999, 2001, u32::MAX] {
            assert_eq!(map.to_host(GuestId(guest)), None);
        }
        for host in [1, 999, 1001, 99_999, 101_000, u32::MAX] {
            assert_eq!(map.to_guest(HostId(host)), GuestId(NOBODY));
        }
    }

    #[test]
    fn every_id_can_be_mapped_but_the_last() {
        let map = map(&["0:0:4294967295"]).unwrap();
        assert_eq!(map.to_host(GuestId(u32::MAX - 1)), Some(HostId(u32::MAX - 1)));
        assert_eq!(map.to_host(GuestId(u32::MAX)), None);
        for text in ["1:0:4294967295", "0:1:4294967295", "4294967295:0:1"] {
            assert_eq!(text.parse::<IdRange>(), Err(IdMapError::Overflow(text.into())));
        }
    }

    #[test]
    fn texts_that_are_no_ranges_are_refused() {
        for text in ["", "1", "1:2", "1:2:3:4", "a:0:1", "-1:0:1", "0:0:4294967296", "0: 0:1"] {
            assert_eq!(text.parse::<IdRange>(), Err(IdMapError::Syntax(text.into())), "{text}");
        }
        assert_eq!("0:0:0".parse::<IdRange>(), Err(IdMapError::Empty("0:0:0".into())));
    }

    #[test]
    fn overlaps_are_refused() {
        let error = map(&["0:1000:10", "9:2000:10"]).unwrap_err();
        assert!(matches!(error, IdMapError::GuestOverlap(_, _, 9)));
        assert_eq!(
            error.to_string(),
            "The id maps 0:1000:10 and 9:2000:10 both map id 9 of the guest; each id may be mapped once"
        );
        let error = map(&["0:1000:10", "10:0:1", "20:995:6"]).unwrap_err();
        assert!(matches!(error, IdMapError::HostOverlap(_, _, 1000)));
        assert!(map(&["0:1000:10", "10:1010:10"]).is_ok());
    }

    #[test]
    fn squashed_ids_are_replaced_before_the_map() {
        let mut ids = Ids { uids: map(&["1000:5000:10"]).unwrap(), ..Ids::default() };
        assert_eq!(ids.uid_to_host(GuestId(0)), None);
        ids.squash = Squash::Root;
        assert_eq!(ids.uid_to_host(GuestId(0)), Some(HostId(NOBODY)));
        assert_eq!(ids.gid_to_host(GuestId(0)), Some(HostId(NOBODY)));
        assert_eq!(ids.uid_to_host(GuestId(1001)), Some(HostId(5001)));
        assert_eq!(ids.gid_to_host(GuestId(1)), Some(HostId(1)));
        assert!(ids.squashes(GuestId(0)) && !ids.squashes(GuestId(1)));
        ids.squash = Squash::All;
        ids.squash_to = "7:8".parse().unwrap();
        assert_eq!(ids.uid_to_host(GuestId(1001)), Some(HostId(7)));
        assert_eq!(ids.gid_to_host(GuestId(1)), Some(HostId(8)));
        // Nobody in particular is squashed like everybody.
        assert_eq!(ids.uid_to_host(GuestId(u32::MAX)), Some(HostId(7)));
        assert!(ids.is_guarded() && ids.uids.knows(HostId(5009)) && !ids.uids.knows(HostId(1001)));
        assert_eq!(ids.uid_to_guest(HostId(5001)), GuestId(1001));
    }

    #[test]
    fn what_to_squash_to_is_parsed() {
        assert_eq!("0:65534".parse(), Ok(SquashTo { uid: HostId(0), gid: HostId(65_534) }));
        assert_eq!(SquashTo::default().to_string(), "65534:65534");
        for text in ["", "1", "1:", ":1", "1:2:3", "4294967295:0", "0:4294967295"] {
            assert_eq!(text.parse::<SquashTo>(), Err(IdMapError::SquashTo(text.into())), "{text}");
        }
    }
    proptest! {
        #[test]
        fn what_is_mapped_comes_back(
            ranges in proptest::collection::vec((0..200_u32, 0..200_u32, 1..30_u32), 1..6),
            id in 0..250_u32,
        ) {
            let ranges = ranges.into_iter().map(|(guest, host, count)| IdRange { guest, host, count });
            if let Ok(map) = IdMap::new(ranges.collect()) {
                if let Some(host) = map.to_host(GuestId(id)) {
                    prop_assert_eq!(map.to_guest(host), GuestId(id));
                }
                let guest = map.to_guest(HostId(id));
                prop_assert!(guest == GuestId(NOBODY) || map.to_host(guest) == Some(HostId(id)));
            }
        }
    }
}
