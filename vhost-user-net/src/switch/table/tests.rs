use std::thread;

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn mac(number: u8) -> Mac {
    [2, 0, 0, 0, 0, number]
}

/// A table with ports 0 to 3, which may learn 4 addresses each.
fn table() -> (Table, Instant) {
    let start = Instant::now();
    let table = Table::new(16, start);
    for port in 0..4 {
        table.open(port, 4).unwrap();
    }
    (table, start)
}

#[test]
fn what_is_learned_is_found_in_its_vlan() {
    let (table, now) = table();
    assert_eq!(table.lookup(0, mac(1), now), None);
    assert_eq!(table.learn(2, 0, mac(1), now), Learned::New);
    assert_eq!(table.learn(2, 0, mac(1), now), Learned::Known);
    assert_eq!(table.lookup(0, mac(1), now), Some(2));
    assert_eq!(table.lookup(1, mac(1), now), None);
    assert_eq!(table.learn(3, 1, mac(1), now), Learned::New);
    assert_eq!((table.lookup(0, mac(1), now), table.lookup(1, mac(1), now)), (Some(2), Some(3)));
    assert_eq!(table.len(), 2);
}

#[test]
fn an_address_ages_out_unless_it_is_seen() {
    let (table, start) = table();
    table.learn(0, 0, mac(1), start);
    table.learn(0, 0, mac(2), start);
    let later = start + SECOND * (AGEING_SECONDS - 1);
    assert_eq!(table.learn(0, 0, mac(1), later), Learned::Known);
    let later = start + AGEING;
    assert_eq!((table.lookup(0, mac(1), later), table.lookup(0, mac(2), later)), (Some(0), None));
    // A sender that cached the answer hears of it a little later.
    let generation = table.generation();
    table.age(later);
    assert_eq!((table.generation(), table.len()), (generation, 2));
    table.age(later + AGEING_SLACK);
    assert_ne!(table.generation(), generation);
    assert_eq!(table.len(), 1);
    // It comes back as new.
    assert_eq!(table.learn(0, 0, mac(2), later), Learned::New);
}

#[test]
fn an_expired_address_that_nobody_removed_comes_back_with_a_new_generation() {
    let (table, start) = table();
    table.learn(0, 0, mac(1), start);
    let generation = table.generation();
    assert_eq!(table.learn(0, 0, mac(1), start + AGEING), Learned::New);
    assert_ne!(table.generation(), generation);
    assert_eq!(table.len(), 1);
}

#[test]
fn an_address_moves_once_a_second_at_most() {
    let (table, start) = table();
    table.learn(0, 0, mac(1), start);
    assert_eq!(table.learn(1, 0, mac(1), start), Learned::Held);
    assert_eq!(table.learn(1, 0, mac(1), start + SECOND), Learned::Moved);
    let generation = table.generation();
    for _ in 0..100 {
        assert_eq!(table.learn(0, 0, mac(1), start + SECOND), Learned::Held);
        assert_eq!(table.learn(1, 0, mac(1), start + SECOND), Learned::Known);
    }
    assert_eq!(table.generation(), generation);
    assert_eq!(table.lookup(0, mac(1), start + SECOND), Some(1));
}

#[test]
fn a_flood_of_addresses_neither_grows_the_table_nor_touches_other_ports() {
    let (table, start) = table();
    for number in 0..4 {
        assert_eq!(table.learn(0, 0, mac(number + 1), start), Learned::New);
    }
    let mut changes = 0;
    for number in 0..100_000u32 {
        let [_, a, b, c] = number.to_be_bytes();
        let generation = table.generation();
        table.learn(1, 0, [6, 6, 6, a, b, c], start + SECOND);
        changes += u32::from(generation != table.generation());
    }
    assert_eq!((table.len(), changes), (8, 4));
    for number in 0..4 {
        // A port that is full takes no address from another.
        assert_eq!(table.learn(1, 0, mac(number + 1), start + SECOND), Learned::Full);
        assert_eq!(table.lookup(0, mac(number + 1), start + SECOND), Some(0));
    }
    assert_eq!(table.learn(2, 0, mac(9), start + SECOND), Learned::New);
    // When they are aged out there is room again.
    assert_eq!(table.learn(1, 0, mac(10), start + AGEING), Learned::Full);
    assert_eq!(table.learn(1, 0, mac(10), start + AGEING + SECOND), Learned::New);
}

#[test]
fn the_quotas_together_keep_to_the_capacity() {
    let (table, now) = table();
    assert_eq!(table.open(4, 1), Err(TableError::Capacity { quota: 1, free: 0 }));
    assert_eq!(table.open(3, 1), Err(TableError::PortOpen(3)));
    table.close(3);
    assert_eq!(table.open(4, 5), Err(TableError::Capacity { quota: 5, free: 4 }));
    assert_eq!(table.open(4, 4), Ok(()));
    assert_eq!(table.learn(3, 0, mac(1), now), Learned::Full);
}

#[test]
fn a_pinned_address_neither_moves_nor_ages() {
    let (table, start) = table();
    table.learn(1, 0, mac(1), start);
    assert_eq!(table.pin(0, 0, mac(1), start), Ok(()));
    assert_eq!(table.pin(0, 0, mac(1), start), Ok(()));
    assert_eq!(table.pin(1, 0, mac(1), start), Err(TableError::Pinned(0)));
    assert_eq!(table.pin(9, 0, mac(2), start), Err(TableError::PortClosed(9)));
    assert_eq!(table.pin(0, 0, [0xff; 6], start), Err(TableError::Group));
    let later = start + 10 * AGEING;
    assert_eq!(table.learn(1, 0, mac(1), later), Learned::Pinned);
    assert_eq!(table.learn(0, 0, mac(1), later), Learned::Known);
    table.age(later);
    assert_eq!(table.lookup(0, mac(1), later), Some(0));
    // Beside its four learned ones, and what was learned at port 1 gave its place back.
    for number in 2..6 {
        assert_eq!(table.learn(0, 0, mac(number), later), Learned::New);
        assert_eq!(table.learn(1, 1, mac(number), later), Learned::New);
    }
    assert_eq!(table.learn(0, 0, mac(6), later), Learned::Full);
    table.close(0);
    assert_eq!(table.lookup(0, mac(1), later), None);
}

#[test]
fn a_port_that_closes_takes_its_addresses_with_it() {
    let (table, now) = table();
    table.learn(0, 0, mac(1), now);
    table.learn(1, 0, mac(2), now);
    let generation = table.generation();
    table.close(0);
    assert_ne!(table.generation(), generation);
    assert_eq!((table.lookup(0, mac(1), now), table.lookup(0, mac(2), now)), (None, Some(1)));
    assert_eq!(table.learn(0, 0, mac(1), now), Learned::Full);
    table.open(0, 4).unwrap();
    assert_eq!(table.learn(0, 0, mac(1), now), Learned::New);
}

#[test]
fn no_station_has_a_group_address() {
    let (table, now) = table();
    for source in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0; 6]] {
        assert_eq!(table.learn(0, 0, source, now), Learned::Invalid);
    }
    assert_eq!(table.len(), 0);
}

#[test]
fn threads_that_cache_by_generation_never_keep_an_answer_that_is_wrong() {
    let (table, start) = table();
    thread::scope(|scope| {
        let table = &table;
        // An address that wanders from port to port, each move with the port number that its second says.
        let mover = scope.spawn(move || {
            for second in 1..2000u16 {
                let now = start + SECOND * u32::from(second);
                let learned = table.learn(second % 4, 0, mac(1), now);
                assert!(matches!(learned, Learned::New | Learned::Moved), "{learned:?}");
            }
        });
        scope.spawn(move || {
            // In this order, as `generation` asks for.
            let look_up = || (table.generation(), table.lookup(0, mac(1), start));
            let mut cached = look_up();
            while !mover.is_finished() {
                if table.generation() != cached.0 {
                    cached = look_up();
                }
            }
            // Nothing changes any more: what is cached is either current or known not to be.
            let current = table.lookup(0, mac(1), start);
            assert!(cached.0 != table.generation() || cached.1 == current);
            assert_eq!(current, Some(1999 % 4));
        });
    });
}

/// What a table does, without any care for its cost.
#[derive(Default)]
struct Model {
    quotas: BTreeMap<Port, usize>,
    /// VLAN, address, port, pinned, since, seen.
    entries: Vec<(u16, Mac, Port, bool, u32, u32)>,
}

impl Model {
    fn expire(&mut self, now: u32) {
        self.entries.retain(|&(.., pinned, _, seen)| pinned || now - seen < AGEING_SECONDS);
    }

    fn find(&mut self, vlan: u16, mac: Mac) -> Option<&mut (u16, Mac, Port, bool, u32, u32)> {
        self.entries.iter_mut().find(|entry| entry.0 == vlan && entry.1 == mac)
    }

    fn learn(&mut self, port: Port, vlan: u16, mac: Mac, now: u32) -> Learned {
        if mac[0] & 1 == 1 {
            return Learned::Invalid;
        }
        let known = self.find(vlan, mac).map(|entry| {
            if entry.2 == port {
                entry.5 = now;
                return Learned::Known;
            }
            match (entry.3, entry.4 == now) {
                (true, _) => Learned::Pinned,
                (false, true) => Learned::Held,
                (false, false) => Learned::Moved,
            }
        });
        let outcome = known.unwrap_or(Learned::New);
        if !matches!(outcome, Learned::New | Learned::Moved) {
            return outcome;
        }
        let learned = self.entries.iter().filter(|entry| entry.2 == port && !entry.3).count();
        if learned >= self.quotas.get(&port).copied().unwrap_or(0) {
            return Learned::Full;
        }
        self.forget(|entry| entry.0 == vlan && entry.1 == mac);
        self.entries.push((vlan, mac, port, false, now, now));
        outcome
    }

    fn forget(&mut self, which: impl Fn(&(u16, Mac, Port, bool, u32, u32)) -> bool) {
        self.entries.retain(|entry| !which(entry));
    }

    /// All that can be looked up.
    fn mappings(&self) -> Vec<(u16, Mac, Port)> {
        let mut mappings: Vec<_> = self.entries.iter().map(|entry| (entry.0, entry.1, entry.2)).collect();
        mappings.sort_unstable();
        mappings
    }
}

#[derive(Clone, Debug)]
enum Step {
    Open(Port, usize),
    Close(Port),
    Pin(Port, u16, Mac),
    Learn(Port, u16, Mac),
    Wait(u32),
    Age,
}

fn any_step() -> impl Strategy<Value = Step> {
    let address = || (0..2u16, prop_oneof![20 => (1..12u8).prop_map(mac), 1 => Just([0xff; 6])]);
    prop_oneof![
        1 => (0..5u16, 0..6usize).prop_map(|(port, quota)| Step::Open(port, quota)),
        1 => (0..5u16).prop_map(Step::Close),
        1 => (0..5u16, address()).prop_map(|(port, (vlan, mac))| Step::Pin(port, vlan, mac)),
        20 => (0..5u16, address()).prop_map(|(port, (vlan, mac))| Step::Learn(port, vlan, mac)),
        3 => prop_oneof![0..3u32, 100..320u32].prop_map(Step::Wait),
        1 => Just(Step::Age),
    ]
}

proptest! {
    #[test]
    fn does_what_the_model_does(steps in prop::collection::vec(any_step(), 1..200)) {
        let start = Instant::now();
        let table = Table::new(12, start);
        let mut model = Model::default();
        let mut seconds = 0;
        for step in steps {
            let now = start + SECOND * seconds;
            let before = (table.generation(), model.mappings());
            model.expire(seconds);
            match step {
                Step::Open(port, quota) => {
                    let free = 12 - model.quotas.values().sum::<usize>();
                    let is_open = model.quotas.contains_key(&port);
                    let expected = match (is_open, quota <= free) {
                        (true, _) => Err(TableError::PortOpen(port)),
                        (false, false) => Err(TableError::Capacity { quota, free }),
                        (false, true) => Ok(()),
                    };
                    if expected.is_ok() {
                        model.quotas.insert(port, quota);
                    }
                    prop_assert_eq!(table.open(port, quota), expected);
                }
                Step::Close(port) => {
                    model.quotas.remove(&port);
                    model.forget(|entry| entry.2 == port);
                    table.close(port);
                }
                Step::Pin(port, vlan, mac) => {
                    let there = model.find(vlan, mac).filter(|entry| entry.3).map(|entry| entry.2);
                    let expected = match there {
                        _ if mac[0] & 1 == 1 => Err(TableError::Group),
                        _ if !model.quotas.contains_key(&port) => Err(TableError::PortClosed(port)),
                        Some(other) if other != port => Err(TableError::Pinned(other)),
                        _ => {
                            model.forget(|entry| entry.0 == vlan && entry.1 == mac);
                            model.entries.push((vlan, mac, port, true, seconds, seconds));
                            Ok(())
                        }
                    };
                    prop_assert_eq!(table.pin(port, vlan, mac, now), expected);
                }
                Step::Learn(port, vlan, mac) => {
                    prop_assert_eq!(table.learn(port, vlan, mac, now), model.learn(port, vlan, mac, seconds));
                }
                Step::Wait(time) => seconds += time,
                Step::Age => table.age(now),
            }
            let now = start + SECOND * seconds;
            model.expire(seconds);
            for vlan in 0..2 {
                for number in 0..12 {
                    let expected = model.find(vlan, mac(number)).map(|entry| entry.2);
                    prop_assert_eq!(table.lookup(vlan, mac(number), now), expected);
                }
            }
            // What ages out is not a change before it is removed.
            let after = model.mappings();
            if after.iter().any(|mapping| !before.1.contains(mapping)) {
                prop_assert_ne!(table.generation(), before.0);
            }
            let pinned = model.entries.iter().filter(|entry| entry.3).count();
            prop_assert!(table.len() <= 12 + pinned);
        }
    }
}
