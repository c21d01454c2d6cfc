//! Assembly: the home of a complete file pulls what it lacks, in units of at most 4 GiB, and publishes it.
//!
//! Every pull names the span it lies in, and whoever carries it out checks each value against that span's, and each
//! chunk against its value. What is pulled is stored like any other chunk, so an interrupted assembly goes on where
//! it was.

use std::collections::BTreeMap;

use super::{Aggregator, Effect, File, PullOutcome};
use crate::geometry::Geometry;
use crate::ids::{DcId, FileId, Timestamp};
use crate::ledger::{Claim, Fact, FileState, Ledger};
use crate::limits::UNIT_LEVEL;
use crate::resolve::Resolution;
use crate::span::{Place, Span};

/// How many gaps are looked at in one go.
const MAX_GAPS: usize = 8;

/// Where an assembly stands.
#[derive(Clone, Debug, Default)]
pub(super) struct Assembly {
    pulling: BTreeMap<Place, DcId>,
    /// Holders that could not be reached, and until when they are not asked.
    shunned: BTreeMap<DcId, Timestamp>,
    publishing: bool,
    /// The store refused to publish: what is here may not be what the root says.
    refused: bool,
    /// The bytes of the only chunk were read, and do not give the root.
    contradicted: bool,
    retry_at: Option<Timestamp>,
}

impl Assembly {
    /// Whether the store refused to publish, and it must be found out why.
    pub(super) fn is_refused(&self) -> bool {
        self.refused
    }

    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.pulling.is_empty() && !self.publishing && !self.refused
    }

    /// The root of the only chunk was read again, after the store refused to publish it.
    pub(super) fn root_read(&mut self, contradicts: bool, again: Timestamp) {
        self.publishing = false;
        self.contradicted = contradicts;
        if !contradicts {
            self.refused = false;
            self.retry_at = Some(again);
        }
    }

    /// The store was read again, after chunks were lost on purpose or not.
    pub(super) fn reloaded(&mut self) {
        self.refused = false;
    }
}

impl File {
    pub(super) fn pulled(
        &mut self,
        me: DcId,
        place: Place,
        outcome: PullOutcome,
        now: Timestamp,
        retry_ms: u64,
    ) {
        let Some(holder) = self.assembly.pulling.remove(&place) else { return };
        let later = now.plus(retry_ms);
        match outcome {
            PullOutcome::Done => {
                let own = self.ledger.held_by(me).and_then(|(_, tree)| tree.covering(place));
                if own.is_none() {
                    // The store has it by now; the ledger should have heard.
                    self.recount_at = Some(now);
                    self.assembly.retry_at = Some(later);
                }
            }
            PullOutcome::Unreachable => {
                self.assembly.shunned.insert(holder, later);
            }
            PullOutcome::Missing => self.ledger.reject(holder, place),
            PullOutcome::Mismatch(at) => self.ledger.reject(holder, at),
            PullOutcome::StoreFailed => self.assembly.retry_at = Some(later),
        }
    }
}

impl File {
    /// What contradicted the root was removed, if it could be told; whoever said the same is not believed either.
    pub(super) fn resolved(&mut self, me: DcId, found: Option<&Resolution>, now: Timestamp, retry_ms: u64) {
        self.assembly.publishing = false;
        self.assembly.refused = false;
        self.assembly.contradicted = false;
        let (Some(found), Some(shape)) = (found, self.ledger.file()) else {
            // Perhaps it was no contradiction but the disk: try again, ever more slowly.
            self.assembly.retry_at = Some(now.plus(retry_ms * 16));
            self.wake_at(now.plus(retry_ms * 16));
            return;
        };
        let liars: Vec<DcId> = self
            .ledger
            .holders()
            .map(|(dc, ..)| dc)
            .filter(|dc| *dc != me && !found.trusted.contains(dc))
            .collect();
        for range in &found.lost {
            for place in Place::tile(range.clone(), UNIT_LEVEL, shape) {
                liars.iter().for_each(|liar| self.ledger.reject(*liar, place));
            }
        }
    }
}

impl Aggregator {
    pub(super) fn advance_assembly(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let retry_ms = self.config.retry_ms;
        let linked: Vec<DcId> =
            self.peers.iter().filter(|(_, peer)| peer.is_up()).map(|(dc, _)| *dc).collect();
        let Some(file) = self.files.get_mut(&id) else { return };
        let is_home = file.ledger.claim().is_some_and(|claim| claim.home == me);
        if !is_home || file.record.is_none() || file.assembly.publishing {
            return;
        }
        if file.published {
            if file.ledger.state() == FileState::Complete {
                // It was assembled under an earlier claim.
                self.announce(id);
            }
            return;
        }
        let Some(shape) = file.ledger.file() else { return };
        let root = file.ledger.root();
        let complete =
            root.is_some() && matches!(file.ledger.state(), FileState::Complete | FileState::Assembled);
        // The root of one chunk is in its bytes, so they are pulled before it is known.
        let one_chunk = shape.chunks() == 1
            && file.ledger.state() == FileState::Receiving
            && file.ledger.union().is_whole();
        if !complete && !one_chunk {
            return;
        }
        if let Some(at) = file.assembly.retry_at {
            if now < at {
                file.wake_at(at);
                return;
            }
            file.assembly.retry_at = None;
        }
        if file.ledger.holds_all(me) {
            if file.assembly.refused && file.ledger.paged().next().is_some() {
                // What the others say is needed in memory first.
                self.advance_pages(id, now);
                return;
            }
            if let (true, Some(root)) = (complete, root) {
                file.assembly.publishing = true;
                if file.assembly.refused && shape.chunks() == 1 && !file.assembly.contradicted {
                    self.effects.push(Effect::ReadRoot(id));
                } else if file.assembly.refused {
                    let others = file.ledger.holders().filter(|(dc, ..)| *dc != me);
                    let others = others.map(|(dc, _, tree)| (dc, tree.iter().collect())).collect();
                    self.effects.push(Effect::Resolve { file: id, root, others });
                } else {
                    self.effects.push(Effect::Publish(id, root));
                }
            }
            return;
        }
        file.assembly.shunned.retain(|_, until| now < *until);
        let room = self.config.max_pulls.saturating_sub(file.assembly.pulling.len());
        let usable = |dc: DcId| linked.contains(&dc) && !file.assembly.shunned.contains_key(&dc);
        let Plan { pulls, page } = plan(&file.ledger, shape, me, &file.assembly.pulling, room, &usable);
        if let Some(segment) = page {
            file.need_page(segment);
        }
        if pulls.is_empty() && file.assembly.pulling.is_empty() {
            file.wake_at(now.plus(retry_ms));
        }
        for (from, place, under) in pulls {
            file.assembly.pulling.insert(place, from);
            self.effects.push(Effect::Pull { file: id, from, place, under });
        }
        self.advance_pages(id, now);
    }

    pub(super) fn published(&mut self, id: FileId, ok: bool, now: Timestamp) {
        let retry_ms = self.config.retry_ms;
        let Some(file) = self.files.get_mut(&id) else { return };
        file.assembly.publishing = false;
        if !ok {
            let at = now.plus(retry_ms);
            file.assembly.retry_at = Some(at);
            file.assembly.refused = true;
            file.wake_at(at);
            return;
        }
        if file.ledger.root().is_none()
            || file.own_claim.is_none()
            || file.ledger.state() == FileState::Dropped
        {
            return;
        }
        file.published = true;
        file.last_progress = now;
        self.announce(id);
    }

    /// Says that the file is assembled here, under the highest claim of this datacenter.
    fn announce(&mut self, id: FileId) {
        let home = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let (Some(size), Some(root), Some(epoch)) = (file.ledger.file(), file.ledger.root(), file.own_claim)
        else {
            return;
        };
        let _ = file.ledger.take(Fact::Assembled { claim: Claim { epoch, home }, size, root });
        self.settled(id);
    }
}

struct Plan {
    pulls: Vec<(DcId, Place, Span)>,
    page: Option<u64>,
}

/// What to pull next: the first gaps of the own copy, from whoever holds them.
fn plan(
    ledger: &Ledger,
    shape: Geometry,
    me: DcId,
    pulling: &BTreeMap<Place, DcId>,
    room: usize,
    usable: &dyn Fn(DcId) -> bool,
) -> Plan {
    let mut plan = Plan { pulls: Vec::new(), page: None };
    let gaps = match ledger.held_by(me) {
        Some((_, tree)) => tree.gaps(0..shape.chunks(), MAX_GAPS + pulling.len()),
        None => std::iter::once(0..shape.chunks()).collect(),
    };
    for gap in gaps {
        // A gap can be petabytes long; only its beginning is looked at.
        let end = gap.end.min(gap.start.saturating_add(ledger.segment_chunks()));
        let segment = gap.start / ledger.segment_chunks();
        if ledger.is_paged(segment) {
            plan.page = plan.page.or(Some(segment));
            continue;
        }
        for unit in Place::tile(gap.start..end, UNIT_LEVEL, shape) {
            for (dc, _, tree) in ledger.holders().filter(|(dc, ..)| *dc != me && usable(*dc)) {
                for under in tree.overlapping(unit) {
                    if plan.pulls.len() >= room {
                        return plan;
                    }
                    let place = if under.place.contains(unit) { unit } else { under.place };
                    let taken = pulling.keys().chain(plan.pulls.iter().map(|(_, place, _)| place));
                    if !taken.into_iter().any(|other| other.contains(place) || place.contains(*other)) {
                        plan.pulls.push((dc, place, under));
                    }
                }
            }
        }
    }
    plan
}
