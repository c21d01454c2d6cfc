//! Freeing a copy: only when the home, asked with a fresh nonce, has checked its own again, and its claim is above
//! the asker's. Of two datacenters that assembled a file, the one with the highest claim therefore keeps it.

use super::{Aggregator, Effect, File};
use crate::command::Statement;
use crate::hash::Root;
use crate::ids::{DcId, FileId, Generation, Incarnation, Nonce, Timestamp};
use crate::ledger::{Claim, Fact, FileState};
use crate::rules::Rule;

/// Questions are repeated at intervals that double up to 2^3 times the first. An answer counts until the question is
/// repeated, so this also bounds how old it can be.
const MAX_BACKOFF: u32 = 3;

/// After this many milliseconds a check that was not answered is asked of the store again.
const RECHECK_PATIENCE_MS: u64 = 600_000;

/// A check of the own copy that is under way for a peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recheck {
    /// The newest that the peer asked with: checking a large copy takes longer than a question stands.
    nonce: Nonce,
    since: Timestamp,
}

/// A confirmation that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Release {
    nonce: Nonce,
    to: DcId,
    asked_at: Timestamp,
    /// How often it was asked for.
    tries: u32,
    freeing: bool,
}

impl File {
    /// Whether the chunks here are being freed: nothing is promised of them any more.
    pub(super) fn is_freeing(&self) -> bool {
        self.release.is_some_and(|release| release.freeing)
    }
}

impl Aggregator {
    /// Whose confirmation would let this datacenter free its copy.
    fn keeper(&self, id: FileId) -> Option<Claim> {
        let file = self.files.get(&id)?;
        if file.ledger.state() != FileState::Assembled {
            return None;
        }
        if !self.config.rules.holds(Rule::HigherClaim) {
            return file.ledger.copies().find(|copy| copy.home != self.me());
        }
        let copy = file.ledger.best_copy()?;
        let above = file.own_claim.is_none_or(|epoch| copy > Claim { epoch, home: self.me() });
        // Its claim must have come as well: as long as this datacenter takes itself for the home, it says that it has the
        // file, and goes on saying so when the other's disk is lost.
        let is_home = file.ledger.claim() == Some(copy);
        (above && is_home && copy.home != self.me()).then_some(copy)
    }

    pub(super) fn advance_release(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let wait_ms = self.config.retry_ms * 4;
        let keeper = self.keeper(id);
        let Some(file) = self.files.get_mut(&id) else { return };
        let holds = file.published || file.ledger.chunks_held_by(me) > 0;
        let Some(keeper) = keeper.filter(|_| holds) else {
            file.release = None;
            return;
        };
        if !self.config.rules.holds(Rule::ConfirmBeforeFree) {
            if !file.release.is_some_and(|release| release.freeing) {
                file.release = Some(Release {
                    nonce: Nonce::new(0),
                    to: keeper.home,
                    asked_at: now,
                    tries: 0,
                    freeing: true,
                });
                self.effects.push(Effect::Free(id));
            }
            return;
        }
        let mut tries = 0;
        if let Some(release) = file.release.filter(|release| release.to == keeper.home) {
            tries = release.tries + 1;
            let again = release.asked_at.plus(wait_ms << release.tries.min(MAX_BACKOFF));
            if release.freeing {
                return;
            }
            if now < again {
                file.wake_at(again);
                return;
            }
        }
        let Some(peer) = self.peers.get_mut(&keeper.home) else { return };
        if !peer.is_up() {
            peer.wait_for(id);
            file.wake_at(now.plus(self.config.compare_ms));
            return;
        }
        // Unique for good, because the sequence it goes with is.
        let nonce = Nonce::new((u64::from(self.incarnation.number()) << 32) | (u64::from(self.spoken) + 1));
        file.release = Some(Release { nonce, to: keeper.home, asked_at: now, tries, freeing: false });
        file.wake_at(now.plus(wait_ms << tries.min(MAX_BACKOFF)));
        self.say(keeper.home, id, Statement::Confirm { nonce }, now);
    }

    /// A peer wants to free its copy.
    pub(super) fn asked_to_confirm(&mut self, id: FileId, from: DcId, nonce: Nonce, now: Timestamp) {
        let good = |file: &&mut File| file.published && file.ledger.state() == FileState::Assembled;
        let Some(file) = self.files.get_mut(&id).filter(good) else { return };
        match file.rechecks.get_mut(&from).filter(|check| now.since(check.since) < RECHECK_PATIENCE_MS) {
            Some(check) => check.nonce = nonce,
            None => {
                file.rechecks.insert(from, Recheck { nonce, since: now });
                self.effects.push(Effect::Recheck { file: id, to: from, nonce });
            }
        }
    }

    /// The own copy was checked again.
    pub(super) fn rechecked(
        &mut self,
        id: FileId,
        to: DcId,
        nonce: Nonce,
        root: Option<Root>,
        now: Timestamp,
    ) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let nonce = file.rechecks.remove(&to).map_or(nonce, |check| check.nonce);
        let good = file.published && root.is_some() && root == file.ledger.root();
        // A copy that is itself about to go confirms nothing.
        let leaving = file.is_freeing();
        if good
            && !leaving
            && let Some(statement) = file.ledger.assembled_statement(me, nonce)
        {
            self.say(to, id, statement, now);
        }
    }

    /// A keeper answered.
    pub(super) fn confirmed(&mut self, id: FileId, from: DcId, statement: &Statement, _now: Timestamp) {
        let Statement::Assembled { epoch, home, nonce, root, .. } = *statement else { return };
        let strict = self.config.rules.holds(Rule::HigherClaim);
        let is_keeper = self.keeper(id).is_some_and(|keeper| keeper.home == from);
        let Some(file) = self.files.get_mut(&id) else { return };
        let above = file
            .own_claim
            .is_none_or(|own| Claim { epoch, home } > Claim { epoch: own, home: self.config.me });
        let asked = file
            .release
            .is_some_and(|release| release.to == from && release.nonce == nonce && !release.freeing);
        if asked
            && is_keeper
            && (above || !strict)
            && file.ledger.state() == FileState::Assembled
            && file.ledger.root() == Some(root)
        {
            if let Some(release) = &mut file.release {
                release.freeing = true;
            }
            self.effects.push(Effect::Free(id));
        }
    }

    /// The chunks here are gone.
    pub(super) fn freed(&mut self, id: FileId, generation: Generation, now: Timestamp) {
        let me = self.me();
        let retract = self.config.rules.holds(Rule::RetractFreed);
        let Some(file) = self.files.get_mut(&id) else { return };
        file.release = None;
        file.published = false;
        let newest = file.ledger.held_by(me).map(|(newest, _)| newest);
        self.effects.push(Effect::Changed(id));
        if !retract {
            file.unsaid = None;
            return;
        }
        if file.ledger.counts_since(me).is_some_and(|since| generation < since) {
            // What is here was read after this.
            return;
        }
        if newest.is_none_or(|newest| newest <= generation) {
            let _ = file.ledger.take(Fact::HaveNothing { holder: me, generation });
            if file.ledger.chunks_held_by(me) == 0 {
                file.tell_nothing(generation);
            }
            return;
        }
        self.retract(id, now);
    }

    /// What is here no more has been said again, under a newer generation than the store had when it went. Only a newer
    /// one still can take that back; what is really here the store knows.
    pub(super) fn retract(&mut self, id: FileId, now: Timestamp) {
        let holder = self.me();
        let next = Incarnation::new(self.incarnation.number().saturating_add(1));
        if let Some(file) = self.files.get_mut(&id) {
            let generation = Generation::floor_of(next);
            let _ = file.ledger.take(Fact::HaveNothing { holder, generation });
        }
        self.reincarnate(next, now);
        self.restate_own(id);
    }
}
