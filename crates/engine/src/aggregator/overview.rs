//! What an aggregator tells of all its files at once, for metrics: how many stand where, since when the one that waits
//! longest waits to be assembled, and what peers have not acknowledged. It is kept as things change, so that asking costs
//! the same however many files there are; nothing is decided by it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Aggregator, File};
use crate::ids::{DcId, FileId, Timestamp};
use crate::ledger::FileState;

/// Counts of the files that are not at rest.
#[derive(Clone, Debug, Default)]
pub(super) struct Overview {
    files: BTreeMap<FileState, u64>,
    /// Complete files whose home is here, by the time since when.
    assembling: BTreeSet<(Timestamp, FileId)>,
}

/// As what a file is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    state: Option<FileState>,
    assembling: Option<Timestamp>,
}

/// What a peer was told, or is to be told, and has not acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Commands under way, and files that wait until it can be reached or has room.
    pub count: usize,
    /// Since when it acknowledges nothing, though there is something; `None` if there is nothing.
    pub since: Option<Timestamp>,
}

impl Overview {
    /// Counts a file as `now_as` and no longer as `before`.
    fn count(&mut self, id: FileId, before: Counted, now_as: Counted) {
        if before == now_as {
            return;
        }
        if let Some(count) = before.state.and_then(|state| self.files.get_mut(&state)) {
            *count -= 1;
        }
        if let Some(state) = now_as.state {
            *self.files.entry(state).or_default() += 1;
        }
        if let Some(since) = before.assembling {
            self.assembling.remove(&(since, id));
        }
        self.assembling.extend(now_as.assembling.map(|since| (since, id)));
    }

    /// A file is in memory no longer.
    pub(super) fn forget(&mut self, id: FileId, file: &File) {
        self.count(id, file.counted, Counted::default());
    }
}

impl Aggregator {
    /// Counts a file as what it is now.
    pub(super) fn count_file(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let state = file.ledger.state();
        let waits = state == FileState::Complete && file.ledger.claim().is_some_and(|claim| claim.home == me);
        let before = file.counted;
        file.counted = Counted {
            state: Some(state).filter(|state| *state != FileState::Unheard),
            assembling: waits.then(|| before.assembling.unwrap_or(now)),
        };
        self.overview.count(id, before, file.counted);
    }

    /// How many files stand where. Those that are not loaded yet after a start are not among them, nor are chunks without
    /// metadata.
    pub fn counts(&self) -> impl Iterator<Item = (FileState, u64)> {
        let (dropped, assembled) = self.rest.counts();
        let states = [
            FileState::Receiving,
            FileState::Complete,
            FileState::Assembled,
            FileState::Conflict,
            FileState::Dropped,
        ];
        states.into_iter().map(move |state| {
            let awake = self.overview.files.get(&state).copied().unwrap_or_default();
            let resting = match state {
                FileState::Dropped => dropped,
                FileState::Assembled => assembled,
                FileState::Unheard | FileState::Receiving | FileState::Complete | FileState::Conflict => 0,
            };
            (state, awake + resting)
        })
    }

    /// Since when the file that waits longest is complete and not assembled, though its home is here.
    pub fn assembling_since(&self) -> Option<Timestamp> {
        self.overview.assembling.first().map(|(since, _)| *since)
    }

    /// What a peer has not acknowledged.
    pub fn backlog(&self, peer: DcId) -> Backlog {
        self.peers.get(&peer).map(super::peer::Peer::backlog).unwrap_or_default()
    }
}
