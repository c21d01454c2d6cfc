//! Placement: which datacenter a chunk is sent to.
//!
//! Clients and spill place data in aligned stripes of 64 chunks, so that what one datacenter holds merges into few
//! spans and chunk-by-chunk bookkeeping never crosses a datacenter boundary.
//!
//! [`Placement`] is what a datacenter decides by when it cannot, or should not, take a run itself. It is pure: who asks
//! says how loaded the datacenter is, and what it knows of the others.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use crate::drain::Drain;
use crate::geometry::Geometry;
use crate::ids::{DcId, FileId, Timestamp};
use crate::limits::STRIPE_LEVEL;

/// log2 of the chunks in a stripe of this file, when it is spread over `targets` datacenters: 6, or less for a small
/// file, so that every datacenter gets some.
pub fn stripe_level(file: Geometry, targets: usize) -> u8 {
    let targets = targets.max(1) as u64;
    let mut level = STRIPE_LEVEL;
    while level > 0 && file.chunks().div_ceil(1 << level) < targets * 2 {
        level -= 1;
    }
    level
}

/// The chunks of each stripe, in order.
pub fn stripes(file: Geometry, targets: usize) -> impl Iterator<Item = Range<u64>> {
    let len = 1u64 << stripe_level(file, targets);
    let chunks = file.chunks();
    (0..chunks.div_ceil(len)).map(move |i| i * len..((i + 1) * len).min(chunks))
}

/// A pressure at which a datacenter is at one of its limits.
pub const FULL: u16 = 1000;

/// Passing on ends when the pressure falls below this.
const EASY: u16 = 700;

/// A datacenter under more pressure than this is given nothing.
const BUSY: u16 = 900;

/// What a datacenter said of its load counts for so long, in milliseconds. It is said at least every 2 s.
pub const STALE_MS: u64 = 6_000;

/// What a datacenter has room for is passed to it for so long ahead, in milliseconds.
const AHEAD_MS: u64 = 1_000;

/// Stripes that are remembered. Past that the oldest is forgotten, and may go to another datacenter.
const MAX_STRIPES: usize = 4_096;

/// How loaded a datacenter is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Bytes of uploads a second that it could take beside what it takes now; the largest number: no limit is known.
    pub room: u64,
    /// Thousandths of the tightest of its limits that are in use; [`FULL`] and more: it is at that limit.
    pub pressure: u16,
}

/// What a worker says of its load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerLoad {
    /// How loaded it is.
    pub load: Load,
    /// Bodies of uploads that flow into the store by way of it.
    pub bodies: u64,
    /// Whether bodies come to it. The keeper of a bucket has room that nobody can use if edges know only its porters.
    pub is_asked: bool,
}

/// A worker of a datacenter, for as long as its process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(u64);

impl WorkerId {
    /// A number that no other worker of the datacenter has.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// The workers of a datacenter whose loads are known at once. What more of them say is left out.
const MAX_WORKERS: usize = 1_024;

/// The loads of a datacenter's workers, as each said it last. What is older than [`STALE_MS`] is forgotten.
#[derive(Clone, Debug, Default)]
pub struct Loads(BTreeMap<WorkerId, (WorkerLoad, Timestamp)>);

impl Loads {
    /// Notes what a worker says of its load, and returns that of all of them: the room together of those that are asked, or of
    /// all while none is, and the highest pressure. Clients come to all that are asked alike, and who is at a limit is not
    /// hidden by one that nobody asks.
    pub fn note(&mut self, worker: WorkerId, said: WorkerLoad, now: Timestamp) -> Load {
        self.forget(now);
        if self.0.len() < MAX_WORKERS || self.0.contains_key(&worker) {
            self.0.insert(worker, (said, now));
        }
        let all = || self.0.values().map(|(said, _)| said);
        let is_any_asked = all().any(|said| said.is_asked);
        let with_room = all().filter(|said| said.is_asked || !is_any_asked);
        let room = with_room.fold(0u64, |room, said| room.saturating_add(said.load.room));
        Load { room, pressure: all().map(|said| said.load.pressure).max().unwrap_or_default() }
    }

    /// Bodies of uploads that flow into the store by way of all of them.
    pub fn bodies(&mut self, now: Timestamp) -> u64 {
        self.forget(now);
        self.0.values().fold(0u64, |bodies, (said, _)| bodies.saturating_add(said.bodies))
    }

    fn forget(&mut self, now: Timestamp) {
        self.0.retain(|_, (_, said)| now.since(*said) <= STALE_MS);
    }
}

/// What is known of another datacenter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Whether it can be reached.
    pub is_reachable: bool,
    /// The load that it said last, and when that was heard.
    pub load: Option<(Load, Timestamp)>,
    /// Whether it hands over its own work.
    pub drain: Option<Drain>,
}

impl Standing {
    /// Whether it could take anything at all: it can be reached and does not drain.
    pub fn is_open(&self) -> bool {
        self.is_reachable && self.drain.is_none()
    }
}

/// How a datacenter and the others stand, as its aggregator knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standings {
    /// Whether this datacenter hands its work over.
    pub drain: Option<Drain>,
    /// The others.
    pub others: BTreeMap<DcId, Standing>,
    /// When that was so, by the aggregator's clock.
    pub at: Timestamp,
}

impl Standings {
    /// The datacenter that takes over from this one, if this one hands its work over and that one can take it now.
    pub fn hands_over_to(&self) -> Option<DcId> {
        let target = self.drain?.target;
        self.others.get(&target).is_some_and(Standing::is_open).then_some(target)
    }
}

/// A run of chunks, or a whole small file, for which a place is sought.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// The file.
    pub file: FileId,
    /// Its first chunk.
    pub start: u64,
    /// Its bytes; 0: metadata, which only a drain moves.
    pub len: u64,
    /// Whether another datacenter passed it here.
    pub is_passed: bool,
    /// Thousandths of the tightest limit here that are in use.
    pub pressure: u16,
}

/// Where a run goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Here, and now or when there is room.
    Here,
    /// To this datacenter.
    There(DcId),
}

/// What one datacenter may still be given on account of what it said.
#[derive(Clone, Copy, Debug)]
struct Credit {
    /// When that was heard.
    heard: Timestamp,
    left: u64,
}

/// Decides where runs go that came to one datacenter.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// Whether it passes on at present, because it was at a limit.
    spills: bool,
    /// To whom stripes were passed since then.
    stripes: BTreeMap<(FileId, u64), DcId>,
    order: VecDeque<(FileId, u64)>,
    credits: BTreeMap<DcId, Credit>,
}

impl Placement {
    /// Whether the datacenter passes on at present.
    pub fn spills(&self) -> bool {
        self.spills
    }

    /// To whom the datacenter passes on at this pressure, because it is at a limit: whoever was given something since then,
    /// and can be reached.
    pub fn passes_to(&self, pressure: u16, others: &BTreeMap<DcId, Standing>) -> BTreeSet<DcId> {
        if !self.spills || pressure < EASY {
            return BTreeSet::new();
        }
        let is_open = |dc: &DcId| others.get(dc).is_some_and(Standing::is_open);
        self.stripes.values().copied().filter(is_open).collect()
    }

    /// Where this run goes, given the datacenter's own drain and what is known of the others.
    ///
    /// What was passed is never passed again. While the datacenter drains everything goes to the target, or to whoever
    /// is open. Otherwise it passes on from when it is at a limit until the pressure has fallen well below that, and then
    /// only what it has no room for; a stripe of which something was passed goes to one and the same datacenter. Never
    /// to one that cannot be reached, drains, has not said lately how loaded it is, or has no room.
    pub fn choose(
        &mut self,
        ask: &Ask,
        drain: Option<Drain>,
        others: &BTreeMap<DcId, Standing>,
        now: Timestamp,
    ) -> Choice {
        if ask.is_passed {
            return Choice::Here;
        }
        if let Some(drain) = drain {
            let is_open = |dc: &DcId| others.get(dc).is_some_and(Standing::is_open);
            let there = Some(drain.target).filter(is_open).or_else(|| others.keys().copied().find(is_open));
            return there.map_or(Choice::Here, Choice::There);
        }
        if ask.len == 0 {
            return Choice::Here;
        }
        self.spills = ask.pressure >= if self.spills { EASY } else { FULL };
        if !self.spills {
            self.stripes.clear();
            self.order.clear();
            return Choice::Here;
        }
        let stripe = (ask.file, ask.start >> STRIPE_LEVEL);
        if let Some(dc) = self.stripes.get(&stripe).copied()
            && let Some(room) = self.room(dc, others, now)
        {
            return self.give(dc, room, ask.len);
        }
        if ask.pressure < FULL {
            return Choice::Here;
        }
        // Of equals the first, so that every edge passes a stripe to the same.
        let roomiest = others
            .keys()
            .filter_map(|dc| self.room(*dc, others, now).map(|room| (room, std::cmp::Reverse(*dc))))
            .max();
        let Some((room, std::cmp::Reverse(dc))) = roomiest else { return Choice::Here };
        if room > 0 {
            self.remember(stripe, dc);
        }
        self.give(dc, room, ask.len)
    }

    /// Bytes that a datacenter may be given now; `None` if it may be given nothing whatever room it has.
    fn room(&mut self, dc: DcId, others: &BTreeMap<DcId, Standing>, now: Timestamp) -> Option<u64> {
        let standing = others.get(&dc).filter(|standing| standing.is_open())?;
        let (load, heard) = standing.load?;
        if now.since(heard) > STALE_MS || load.pressure > BUSY {
            return None;
        }
        let credit = self.credits.entry(dc).or_insert(Credit { heard: Timestamp::new(0), left: 0 });
        if credit.heard != heard {
            let left = match load.room {
                u64::MAX => u64::MAX,
                room => room.saturating_mul(AHEAD_MS) / 1000,
            };
            *credit = Credit { heard, left };
        }
        Some(credit.left)
    }

    /// Gives a run to a datacenter that has so much room: it may be a little more, or runs would never fit.
    fn give(&mut self, dc: DcId, room: u64, len: u64) -> Choice {
        if room == 0 {
            return Choice::Here;
        }
        if let Some(credit) = self.credits.get_mut(&dc)
            && credit.left != u64::MAX
        {
            credit.left = credit.left.saturating_sub(len);
        }
        Choice::There(dc)
    }

    fn remember(&mut self, stripe: (FileId, u64), dc: DcId) {
        if self.stripes.insert(stripe, dc).is_none() {
            self.order.push_back(stripe);
        }
        while self.order.len() > MAX_STRIPES {
            if let Some(oldest) = self.order.pop_front() {
                self.stripes.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain::Phase;
    use crate::limits::CHUNK_LEN;

    #[test]
    fn small_files_still_reach_every_datacenter() {
        let file = |chunks: u64| Geometry::new(chunks * CHUNK_LEN).unwrap();
        assert_eq!(stripe_level(file(256), 2), 6);
        assert_eq!(stripe_level(file(16), 2), 2);
        assert_eq!(stripe_level(file(2), 2), 0);
        assert_eq!(stripe_level(file(1 << 20), 1), 6);
        let all: Vec<_> = stripes(file(130), 1).collect();
        assert_eq!(all, [0..64, 64..128, 128..130]);
    }

    #[test]
    fn the_load_of_a_datacenter_is_that_of_the_workers_that_say_theirs() {
        let (mut loads, load) = (Loads::default(), |room, pressure| Load { room, pressure });
        let asked = |room, pressure| WorkerLoad { load: load(room, pressure), bodies: 0, is_asked: true };
        let [one, other] = [1, 2].map(WorkerId::new);
        assert_eq!(loads.note(one, asked(10, 1000), NOW), load(10, 1000));
        assert_eq!(loads.note(other, asked(5, 301), NOW.plus(200)), load(15, 1000));
        assert_eq!(loads.note(one, asked(u64::MAX, 0), NOW.plus(400)), load(u64::MAX, 301));
        // One that is gone is forgotten.
        assert_eq!(loads.note(other, asked(7, 8), NOW.plus(400 + STALE_MS + 1)), load(7, 8));
        for n in 3..3000 {
            loads.note(WorkerId::new(n), asked(1, 0), NOW.plus(10_000));
        }
        assert!(loads.0.len() <= MAX_WORKERS);
    }

    #[test]
    fn who_is_not_asked_has_no_room_beside_those_that_are_but_its_pressure_counts() {
        let (mut loads, load) = (Loads::default(), |room, pressure| Load { room, pressure });
        let says = |room, pressure, is_asked| WorkerLoad { load: load(room, pressure), bodies: 0, is_asked };
        let [keeper, one, other] = [1, 2, 3].map(WorkerId::new);
        // It is alone, and may be asked any moment.
        assert_eq!(loads.note(keeper, says(u64::MAX, 0, false), NOW), load(u64::MAX, 0));
        assert_eq!(loads.note(one, says(10, 200, true), NOW), load(10, 200));
        assert_eq!(loads.note(keeper, says(u64::MAX, 300, false), NOW.plus(200)), load(10, 300));
        assert_eq!(loads.note(other, says(0, 1000, true), NOW.plus(400)), load(10, 1000));
        assert_eq!(loads.note(one, says(0, 1000, true), NOW.plus(400)), load(0, 1000));
        assert_eq!(loads.note(keeper, says(5, 0, true), NOW.plus(600)), load(5, 1000));
        assert_eq!(
            loads.note(keeper, says(5, 0, false), NOW.plus(600 + STALE_MS)),
            load(5, 0),
            "its porters are gone"
        );
    }

    #[test]
    fn the_bodies_of_a_datacenter_are_those_of_all_its_workers_that_are_there() {
        let mut loads = Loads::default();
        let mut says = |worker, bodies, is_asked, now| {
            let said = WorkerLoad { load: Load::default(), bodies, is_asked };
            loads.note(WorkerId::new(worker), said, now);
            loads.bodies(now)
        };
        assert_eq!(says(1, 2, true, NOW), 2);
        assert_eq!(says(2, 3, false, NOW.plus(200)), 5);
        assert_eq!(says(1, 1, true, NOW.plus(400)), 4);
        assert_eq!(says(3, u64::MAX, true, NOW.plus(400)), u64::MAX);
        assert_eq!(loads.bodies(NOW.plus(400 + STALE_MS + 1)), 0, "they are gone");
    }

    const NOW: Timestamp = Timestamp::new(1_000_000);
    const B: DcId = DcId::new(2);
    const C: DcId = DcId::new(3);

    fn file(n: u8) -> FileId {
        FileId::from_bytes([n; 16])
    }

    fn ask(start: u64, pressure: u16) -> Ask {
        Ask { file: file(1), start, len: 8 * CHUNK_LEN, is_passed: false, pressure }
    }

    fn with_room(room: u64) -> Standing {
        Standing { is_reachable: true, load: Some((Load { room, pressure: 100 }, NOW)), drain: None }
    }

    #[test]
    fn it_passes_on_at_its_limit_and_stops_when_there_is_room() {
        let others = BTreeMap::from([(B, with_room(u64::MAX))]);
        let mut placement = Placement::default();
        let to = |placement: &Placement, pressure| Vec::from_iter(placement.passes_to(pressure, &others));
        assert_eq!(placement.choose(&ask(0, FULL - 1), None, &others, NOW), Choice::Here, "not yet");
        assert!(to(&placement, FULL).is_empty());
        assert_eq!(placement.choose(&ask(8, FULL), None, &others, NOW), Choice::There(B));
        assert_eq!((to(&placement, EASY), to(&placement, EASY - 1)), (vec![B], vec![]));
        assert!(placement.passes_to(FULL, &BTreeMap::new()).is_empty(), "nobody is there any more");
        assert_eq!(
            placement.choose(&ask(16, EASY), None, &others, NOW),
            Choice::There(B),
            "the stripe goes on"
        );
        assert_eq!(placement.choose(&ask(64, EASY), None, &others, NOW), Choice::Here, "no other begins");
        assert!(placement.spills());
        assert_eq!(placement.choose(&ask(24, EASY - 1), None, &others, NOW), Choice::Here);
        assert_eq!(placement.choose(&ask(32, FULL - 1), None, &others, NOW), Choice::Here);
        assert!(!placement.spills());
        assert!(to(&placement, FULL).is_empty());
    }

    #[test]
    fn a_datacenter_is_given_no_more_than_it_has_room_for() {
        let mut others = BTreeMap::from([(B, with_room(24 * CHUNK_LEN)), (C, with_room(8 * CHUNK_LEN))]);
        let mut placement = Placement::default();
        let mut given = |others: &BTreeMap<DcId, Standing>, stripes: std::ops::Range<u64>| -> Vec<Choice> {
            stripes.map(|i| placement.choose(&ask(i * 64, FULL), None, others, NOW)).collect()
        };
        let (b, c) = (Choice::There(B), Choice::There(C));
        let first = given(&others, 0..6);
        assert_eq!(first.iter().filter(|choice| **choice == b).count(), 3, "{first:?}");
        assert_eq!(first.iter().filter(|choice| **choice == c).count(), 1, "{first:?}");
        assert_eq!(first[4..], [Choice::Here; 2]);
        others
            .insert(C, Standing { load: Some((Load { room: 1, pressure: 0 }, NOW.plus(1))), ..with_room(0) });
        assert_eq!(given(&others, 6..7), [c], "it said something new");
        assert_eq!(given(&others, 0..1), [Choice::Here], "that stripe waits for dc-b");
    }

    #[test]
    fn who_drains_passes_everything_to_the_target_or_whoever_is_open() {
        let drain = Drain { phase: Phase::Data, target: C, evacuate: false };
        let silent = Standing { is_reachable: true, ..Standing::default() };
        let mut others = BTreeMap::from([(B, silent), (C, silent)]);
        let mut placement = Placement::default();
        let mut choose = |others: &_| placement.choose(&ask(0, 0), Some(drain), others, NOW);
        assert_eq!(choose(&others), Choice::There(C));
        others.insert(C, Standing { drain: Some(Drain { target: B, ..drain }), ..silent });
        assert_eq!(choose(&others), Choice::There(B));
        others.insert(B, Standing::default());
        assert_eq!(choose(&others), Choice::Here, "no request fails for that");
    }
}
