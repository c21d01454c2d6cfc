//! A file as its client knows it: what it is to be, what is still to be done with it, and what was answered.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::ChainingValue;
use sluice_fault_disk::Dice;
use uuid::Uuid;

/// Bytes of a chunk.
pub(crate) const MIB: usize = 1 << 20;

/// How many datacenters there are.
pub(crate) const DCS: usize = 2;

/// The names of the datacenters.
pub(crate) const NAMES: [&str; DCS] = ["dc-a", "dc-b"];

/// One thing that a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Send the metadata.
    Create { dc: usize },
    /// Send metadata and bytes of a small file in one request.
    Whole { dc: usize },
    /// Send a run of chunks.
    Put { dc: usize, start: u64, count: u64 },
    /// Send other bytes than the value that is announced.
    PutWrong { dc: usize, chunk: u64 },
    /// Wait until the file is assembled.
    Await { dc: usize },
    /// Read all of it.
    Read { dc: usize },
    /// End it.
    Delete { dc: usize, early: bool },
}

impl Action {
    /// Whether it makes sense only when all before it was answered.
    pub(crate) fn waits(self) -> bool {
        match self {
            Self::Create { .. } | Self::Whole { .. } | Self::Put { .. } | Self::PutWrong { .. } => false,
            Self::Await { .. } | Self::Read { .. } => true,
            Self::Delete { early, .. } => !early,
        }
    }
}

/// A file, and what its client was told of it.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) id: Uuid,
    pub(crate) bytes: Bytes,
    /// The value of each chunk.
    pub(crate) values: Vec<String>,
    /// What is still to be done, in this order.
    pub(crate) todo: VecDeque<Action>,
    /// What was begun and not answered.
    pub(crate) begun: Vec<Action>,
    /// Who took the metadata.
    pub(crate) created: BTreeSet<usize>,
    /// Chunks that were sent to anyone, answered or not.
    pub(crate) sent: BTreeSet<u64>,
    /// Chunks that were acknowledged, and by whom.
    pub(crate) acknowledged: BTreeSet<(usize, u64)>,
    /// Whether anybody was asked to end it.
    pub(crate) ending: bool,
    /// Who said that it has ended.
    pub(crate) ended: BTreeSet<usize>,
}

impl File {
    /// A file and what is done with it, all from the dice.
    pub(crate) fn new(dice: &mut Dice) -> Self {
        let id = Uuid::from_u64_pair(dice.roll(), dice.roll());
        let last = match dice.below(3) {
            0 => MIB,
            1 => 1 + dice.below(2000) as usize,
            _ => 1 + dice.below(MIB as u64) as usize,
        };
        let len = match dice.below(12) {
            0 => 0,
            1..=4 => last,
            _ => (1 + dice.below(11) as usize) * MIB + last,
        };
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(id.as_bytes()).finalize_xof().fill(&mut bytes);
        let values: Vec<String> = (0..)
            .zip(bytes.chunks(MIB))
            .map(|(i, chunk)| {
                ChainingValue::of_chunk(ChunkIndex::new(i).unwrap(), chunk).unwrap().to_string()
            })
            .collect();
        let todo = script(dice, values.len() as u64);
        Self {
            id,
            bytes: Bytes::from(bytes),
            values,
            todo,
            begun: Vec::new(),
            created: BTreeSet::new(),
            sent: BTreeSet::new(),
            acknowledged: BTreeSet::new(),
            ending: false,
            ended: BTreeSet::new(),
        }
    }

    pub(crate) fn chunks(&self) -> u64 {
        self.values.len() as u64
    }

    /// The bytes of a run.
    pub(crate) fn run(&self, start: u64, count: u64) -> Bytes {
        let from = start as usize * MIB;
        self.bytes.slice(from..(from + count as usize * MIB).min(self.bytes.len()))
    }

    /// Whether nothing is left to do.
    pub(crate) fn is_done(&self) -> bool {
        self.todo.is_empty() && self.begun.is_empty()
    }
}

/// Runs of 1, 2, 4 and 8 in any order, to either datacenter, some of them twice; the metadata first or in between;
/// now and then bytes that are not what was announced, a hole, an end that comes early.
fn script(dice: &mut Dice, chunks: u64) -> VecDeque<Action> {
    if chunks <= 1 && !dice.one_in(3) {
        return whole(dice);
    }
    let mut script = Vec::new();
    let mut at = 0;
    while at < chunks {
        let fits = [8, 4, 2, 1].into_iter().filter(|count| at.is_multiple_of(*count) && at + count <= chunks);
        let fits: Vec<u64> = fits.collect();
        let count = fits[dice.below(fits.len() as u64) as usize];
        script.push(Action::Put { dc: dice.below(2) as usize, start: at, count });
        at += count;
    }
    shuffle(dice, &mut script);
    let has_hole = !script.is_empty() && dice.one_in(6);
    if has_hole {
        script.pop();
    }
    for i in 0..script.len() {
        let Action::Put { dc, start, count } = script[i] else { continue };
        let at = dice.below(script.len() as u64 + 1) as usize;
        match dice.below(10) {
            // The same again, to the same datacenter or the other.
            0 => script.insert(at, Action::Put { dc, start, count }),
            1 => script.insert(at, Action::Put { dc: 1 - dc, start, count }),
            // A part of it, in another run.
            2 => script.insert(at, Action::Put { dc, start: start + dice.below(count), count: 1 }),
            3 => script.insert(at, Action::PutWrong { dc, chunk: start + dice.below(count) }),
            _ => {}
        }
    }
    let created_at = if dice.one_in(3) { dice.below(script.len() as u64 + 1) as usize } else { 0 };
    let home = dice.below(2) as usize;
    script.insert(created_at, Action::Create { dc: home });
    if dice.one_in(8) {
        // A client that got no answer asks the other one.
        script.insert(created_at + 1, Action::Create { dc: 1 - home });
    }
    let dc = dice.below(2) as usize;
    if dice.one_in(6) {
        let at = created_at + 1 + dice.below((script.len() - created_at) as u64) as usize;
        script.insert(at, Action::Delete { dc, early: true });
    } else if !has_hole {
        script.extend([Action::Await { dc }, Action::Read { dc }, Action::Read { dc: 1 - dc }]);
    }
    script.push(Action::Delete { dc: dice.below(2) as usize, early: false });
    script.into()
}

/// A small file in one request; now and then the same again, to the same datacenter or the other, and an early end.
fn whole(dice: &mut Dice) -> VecDeque<Action> {
    let dc = dice.below(2) as usize;
    let mut script = vec![Action::Whole { dc }];
    if dice.one_in(4) {
        script.push(Action::Whole { dc: dice.below(2) as usize });
    }
    let dc = dice.below(2) as usize;
    if dice.one_in(6) {
        script.push(Action::Delete { dc, early: true });
    } else {
        script.extend([Action::Await { dc }, Action::Read { dc }, Action::Read { dc: 1 - dc }]);
    }
    script.push(Action::Delete { dc: dice.below(2) as usize, early: false });
    script.into()
}

fn shuffle<T>(dice: &mut Dice, items: &mut [T]) {
    for i in (1..items.len()).rev() {
        items.swap(i, dice.below(i as u64 + 1) as usize);
    }
}
