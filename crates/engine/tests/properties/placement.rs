//! Where runs go when a datacenter is at its limit or drains, whatever it and the others say of themselves.

use std::collections::BTreeMap;

use proptest::prelude::*;
use sluice_engine::drain::{Drain, Phase};
use sluice_engine::ids::{DcId, FileId, Timestamp};
use sluice_engine::placement::{Ask, Choice, FULL, Load, Placement, STALE_MS, Standing};

const LEN: u64 = 8 << 20;

#[derive(Clone, Debug)]
enum Step {
    /// Time passes.
    Wait(u64),
    /// A datacenter says how loaded it is.
    Says(u16, u64, u16),
    /// A link comes or goes.
    Link(u16, bool),
    /// A datacenter drains, or does not.
    Drains(u16, bool),
    /// A run asks for a place: file, stripe, whether it was passed here, pressure.
    Asks(u8, u64, bool, u16),
}

fn step() -> impl Strategy<Value = Step> {
    let room = prop_oneof![Just(0), 0..8 * LEN, Just(u64::MAX)];
    let pressure = prop_oneof![Just(0u16), 600u16..1200, Just(u16::MAX)];
    prop_oneof![
        1 => (0..2 * STALE_MS).prop_map(Step::Wait),
        3 => (2u16..5, room, pressure.clone()).prop_map(|(dc, room, pressure)| Step::Says(dc, room, pressure)),
        1 => (2u16..5, any::<bool>()).prop_map(|(dc, up)| Step::Link(dc, up)),
        1 => (2u16..5, any::<bool>()).prop_map(|(dc, drains)| Step::Drains(dc, drains)),
        8 => (0u8..3, 0u64..4, prop::bool::weighted(0.1), pressure)
            .prop_map(|(file, stripe, passed, pressure)| Step::Asks(file, stripe, passed, pressure)),
    ]
}

proptest! {
    #[test]
    fn runs_go_only_where_they_may(
        steps in prop::collection::vec(step(), 1..200),
        own in proptest::option::weighted(0.2, 2u16..5),
    ) {
        let drain = own.map(|target| Drain { phase: Phase::Data, target: DcId::new(target), evacuate: false });
        let mut others: BTreeMap<DcId, Standing> =
            (2..5).map(|dc| (DcId::new(dc), Standing { is_reachable: true, ..Standing::default() })).collect();
        let mut placement = Placement::default();
        let mut now = Timestamp::new(1_000_000);
        // To whom each stripe went, and what each was given since it last spoke.
        let mut stripes: BTreeMap<(u8, u64), DcId> = BTreeMap::new();
        let mut given: BTreeMap<DcId, u64> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Wait(ms) => now = now.plus(ms),
                Step::Says(dc, room, pressure) => {
                    // Two are never heard in the same millisecond.
                    now = now.plus(1);
                    let standing = others.get_mut(&DcId::new(dc)).unwrap();
                    standing.load = Some((Load { room, pressure }, now));
                    given.insert(DcId::new(dc), 0);
                }
                Step::Link(dc, up) => others.get_mut(&DcId::new(dc)).unwrap().is_reachable = up,
                Step::Drains(dc, drains) => {
                    let phase = Phase::Channels;
                    let drain = drains.then_some(Drain { phase, target: DcId::new(1), evacuate: true });
                    others.get_mut(&DcId::new(dc)).unwrap().drain = drain;
                }
                Step::Asks(name, stripe, is_passed, pressure) => {
                    let file = FileId::from_bytes([name; 16]);
                    let ask = Ask { file, start: stripe * 64 + 8, len: LEN, is_passed, pressure };
                    let choice = placement.choose(&ask, drain, &others, now);
                    if is_passed {
                        prop_assert_eq!(choice, Choice::Here, "never onwards");
                        continue;
                    }
                    let usable = |standing: &Standing| match standing.load {
                        Some((load, heard)) => {
                            standing.is_open() && now.since(heard) <= STALE_MS && load.pressure <= 900
                        }
                        None => false,
                    };
                    if drain.is_none() && !placement.spills() {
                        stripes.clear();
                    }
                    let Choice::There(dc) = choice else {
                        let nobody = !others.values().any(Standing::is_open);
                        prop_assert!(drain.is_none() || nobody, "who drains keeps nothing that it can pass");
                        continue;
                    };
                    let standing = others[&dc];
                    prop_assert!(standing.is_open(), "neither unreachable nor draining");
                    if drain.is_some() {
                        continue;
                    }
                    prop_assert!(usable(&standing), "neither stale nor busy");
                    prop_assert!(pressure >= 700, "there is room here");
                    let begun = stripes.insert((name, stripe), dc);
                    prop_assert!(pressure >= FULL || begun.is_some(), "no stripe begins while there is room");
                    if let Some(before) = begun.filter(|before| *before != dc) {
                        prop_assert!(!usable(&others[&before]), "a stripe stays where it was passed");
                    }
                    let (load, _) = standing.load.unwrap();
                    let sum = given.entry(dc).or_default();
                    prop_assert!(load.room == u64::MAX || *sum < load.room, "no more than there is room for");
                    *sum += LEN;
                }
            }
        }
    }
}
