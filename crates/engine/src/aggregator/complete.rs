//! What the home of a file does until it is complete, and what makes a datacenter the home: records, verdicts,
//! takeover, expiry.

use std::collections::BTreeSet;

use super::{Aggregator, Config, Effect, File, StoredFile};
use crate::command::{DropReason, Statement};
use crate::hash::Root;
use crate::ids::{DcId, FileId, Generation, HomeEpoch, Timestamp};
use crate::ledger::{Claim, Disagreement, Fact, FileState, Verdict};
use crate::span::{Place, Span};

/// After how many questions, each given twice the time of the one before, a holder that answers none of them is not
/// believed.
const MAX_UNANSWERED: u32 = 6;

/// A metadata record that is being fetched.
#[derive(Clone, Debug)]
pub(super) struct Fetch {
    /// How often it was tried.
    tries: usize,
    under_way: bool,
    next: Timestamp,
    /// Who spoke of the file last.
    speaker: Option<DcId>,
}

impl Fetch {
    /// How long to wait after a failure: doubling, up to 32 times the first.
    fn pause(&self, retry_ms: u64) -> u64 {
        retry_ms << self.tries.min(5)
    }
}

/// What the home is waiting for before it can say ROOT.
#[derive(Clone, Debug, Default)]
pub(super) struct HomeWork {
    /// Values that holders were asked for.
    asked: BTreeSet<(DcId, Place)>,
    /// Until when to wait for them.
    patience: Option<Timestamp>,
    /// How often nothing at all was answered.
    unanswered: u32,
    reading_root: bool,
}

impl HomeWork {
    /// A holder said something of a place.
    pub(super) fn answered(&mut self, from: DcId, place: Place) {
        if self.asked.remove(&(from, place)) {
            self.unanswered = 0;
        }
    }
}

impl File {
    /// A claim became known; it may name this datacenter.
    pub(super) fn heard_of(&mut self, claim: Claim, me: DcId) {
        if claim.home == me {
            self.own_claim = self.own_claim.max(Some(claim.epoch));
        }
    }

    /// The record is wanted here.
    pub(super) fn want_record(&mut self, now: Timestamp) {
        if self.record.is_none() && self.fetch.is_none() {
            self.fetch = Some(Fetch { tries: 0, under_way: false, next: now, speaker: None });
        }
    }

    /// A peer says that the file exists. Whoever has just got the record says so, and nobody else may have it.
    pub(super) fn spoken_of(&mut self, from: DcId, now: Timestamp) {
        if let Some(fetch) = &mut self.fetch {
            fetch.speaker = Some(from);
            fetch.tries = 0;
            fetch.next = fetch.next.min(now);
        }
    }

    pub(super) fn fetch_failed(&mut self, now: Timestamp, retry_ms: u64) {
        if let Some(fetch) = &mut self.fetch {
            fetch.under_way = false;
            fetch.tries += 1;
            fetch.next = now.plus(fetch.pause(retry_ms));
        }
    }

    /// Whether another home could do anything for the file: it is not assembled, or chunks of it are still here. So may be
    /// all of it: then others, who never heard that the lost home had assembled it, hear it of this one.
    fn may_change_home(&self, me: DcId) -> bool {
        match self.ledger.state() {
            FileState::Receiving | FileState::Complete => true,
            FileState::Assembled => {
                let empty = self.ledger.file().is_some_and(|file| file.chunks() == 0);
                self.published || empty || self.ledger.chunks_held_by(me) > 0
            }
            FileState::Unheard | FileState::Conflict | FileState::Dropped => false,
        }
    }

    /// Whether what is known of the file is remembered here: where its record is.
    pub(super) fn is_worth_remembering(&self) -> bool {
        self.record.is_some()
    }

    /// Takes spans that are durable here, as of a generation.
    pub(super) fn take_own(
        &mut self,
        config: &Config,
        floor: Generation,
        generation: Generation,
        spans: &[Span],
        now: Timestamp,
    ) {
        let me = config.me;
        if self.ledger.file().is_none() && !spans.is_empty() {
            // They have no places yet; the record will find them.
            self.want_record(now);
            return;
        }
        if self.ledger.counts_since(me).is_some_and(|since| generation < since) {
            // Something was freed or lost since, perhaps these.
            self.recount_at = Some(now.plus(config.retry_ms));
            return;
        }
        let newest = self.ledger.held_by(me).map(|(newest, _)| newest);
        let generation = generation.max(newest.unwrap_or_default()).max(floor);
        for &span in spans {
            let _ = self.ledger.take(Fact::Have { holder: me, generation, span });
            self.touch(span.place);
        }
        self.owe(me, spans, now);
    }

    /// Takes what the store has. `false` if that is less than was said of it since, under a newer generation than the
    /// store had when it was read.
    pub(super) fn load(
        &mut self,
        config: &Config,
        floor: Generation,
        generation: Generation,
        stored: &StoredFile,
        now: Timestamp,
    ) -> bool {
        let me = config.me;
        for fact in stored.memory.facts() {
            let _ = self.ledger.take(fact);
        }
        self.own_claim = self.own_claim.max(stored.memory.own_claim());
        if let Some(record) = stored.record {
            self.record = Some(record);
            self.fetch = None;
            let unclaimed = Claim { epoch: HomeEpoch::new(0), home: me };
            let claim = self.ledger.claim().max(stored.memory.claim()).unwrap_or(unclaimed);
            if claim.home == me {
                self.own_claim = self.own_claim.max(Some(claim.epoch));
            }
            let (tenant, digest) = (record.tenant, record.digest);
            let size = record.size.or(stored.size);
            let _ = self.ledger.take(Fact::Meta { claim, size, tenant, digest });
            for size in stored.memory.sizes() {
                let _ = self.ledger.take(Fact::Meta { claim, size: Some(size), tenant, digest });
            }
        } else if stored.chunks > 0 && self.ledger.state() == FileState::Unheard {
            self.found_orphan(stored.tenant, stored.chunks, config, now);
        }
        // How long a finished file is kept does not begin anew because it was read again.
        self.last_progress = stored.memory.progress().map_or(now, |at| at.min(now));
        self.assembly.reloaded();
        if self.ledger.counts_since(me).is_some_and(|since| generation < since) {
            // Read before something was freed or lost: what is really here must be asked again.
            self.recount_at = Some(now.plus(config.retry_ms));
            return true;
        }
        let newest = self.ledger.held_by(me).map(|(newest, _)| newest);
        if newest.is_some_and(|newest| generation < newest) && stored.chunks < self.ledger.chunks_held_by(me)
        {
            return false;
        }
        if stored.chunks > 0 && stored.spans.is_empty() && self.ledger.file().is_some() {
            // Whoever read it did not know the size.
            self.recount_at = Some(now);
        }
        let generation = generation.max(floor);
        let _ = self.ledger.take(Fact::HaveNothing { holder: me, generation });
        for &span in &stored.spans {
            let _ = self.ledger.take(Fact::Have { holder: me, generation, span });
        }
        for tell in self.tell.keys().copied().collect::<Vec<_>>() {
            self.restate_to(me, floor, tell, now);
        }
        self.published = stored.published.is_some() && self.ledger.file().is_some();
        if let (Some(root), Some(size)) = (stored.published, self.ledger.file()) {
            let epoch = self.own_claim.unwrap_or_default();
            let _ = self.ledger.take(Fact::Assembled { claim: Claim { epoch, home: me }, size, root });
        }
        if let Some(claim) = self.ledger.claim().filter(|claim| claim.home != me) {
            self.owe_all(me, claim.home, now);
        }
        // A home that has the whole file counts on nobody.
        let is_settled = self
            .ledger
            .claim()
            .is_some_and(|claim| claim.home == me || self.ledger.is_assembled_at(claim.home));
        if stored.spans.is_empty() && !is_settled {
            self.tell_nothing(generation);
        }
        true
    }
}

impl Aggregator {
    /// Fetches the metadata record if it is needed here: by the home, by a holder, or by a client.
    pub(super) fn advance_fetch(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let retry_ms = self.config.retry_ms;
        let Some(file) = self.files.get_mut(&id) else { return };
        let (Some(claim), Some(digest)) = (file.ledger.claim(), file.ledger.record_digest()) else { return };
        if file.record.is_some() || file.ledger.state() == FileState::Dropped {
            file.fetch = None;
            return;
        }
        // What is small and finished is listed everywhere.
        let is_small = file.ledger.file().is_some_and(|file| file.chunks() <= 1);
        let is_listed = is_small && file.ledger.state() == FileState::Assembled;
        if claim.home == me || is_listed || file.ledger.chunks_held_by(me) > 0 {
            file.want_record(now);
        }
        let Some(fetch) = &mut file.fetch else { return };
        if fetch.under_way || now < fetch.next {
            if !fetch.under_way {
                let next = fetch.next;
                file.wake_at(next);
            }
            return;
        }
        // Who spoke of it last, then the home, then everyone in turn, of those who can be asked.
        let first = fetch.speaker.into_iter().chain([claim.home]);
        let everyone = first.chain(self.config.peers.iter().copied());
        let is_up = |dc: &DcId| self.peers.get(dc).is_some_and(super::peer::Peer::is_up);
        let everyone: Vec<DcId> = everyone.filter(is_up).collect();
        match everyone.get(fetch.tries % everyone.len().max(1)).copied() {
            Some(from) => {
                fetch.under_way = true;
                self.effects.push(Effect::FetchRecord { file: id, from, digest });
            }
            None => {
                fetch.tries += 1;
                fetch.next = now.plus(fetch.pause(retry_ms));
                let next = fetch.next;
                file.wake_at(next);
            }
        }
    }

    /// The home stops counting on holders that have been silent for too long.
    pub(super) fn advance_absence(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        if file.published || file.ledger.claim().is_none_or(|claim| claim.home != me) {
            return;
        }
        for (dc, peer) in &self.peers {
            if file.ledger.chunks_held_by(*dc) == 0 {
                continue;
            }
            let until = peer.down_since.plus(self.config.absent_ms);
            let is_absent = !peer.is_up() && now >= until;
            if file.ledger.set_absent(*dc, is_absent) && !is_absent {
                file.touch_all();
            }
            if !peer.is_up() && now < until {
                file.wake_at(until);
            }
        }
    }

    /// Looks whether a file whose home is here is whole.
    pub(super) fn advance_home(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let retry_ms = self.config.retry_ms;
        let Some(file) = self.files.get_mut(&id) else { return };
        let is_home = file.ledger.claim().is_some_and(|claim| claim.home == me);
        if !is_home || file.record.is_none() || file.ledger.state() != FileState::Receiving {
            return;
        }
        if let Some(until) = file.home.patience.filter(|until| now < *until && !file.home.asked.is_empty()) {
            file.wake_at(until);
            return;
        }
        match file.ledger.verdict() {
            Verdict::Open => {}
            Verdict::Whole(root) => self.found_root(id, root),
            Verdict::Disagree(place) => {
                self.found_conflict(id, Disagreement { place, found: None, home: me })
            }
            Verdict::OneChunk(_) => {
                let here = file.ledger.chunks_held_by(me) > 0;
                if here && !file.home.reading_root {
                    file.home.reading_root = true;
                    self.effects.push(Effect::ReadRoot(id));
                }
            }
            // They are being read already.
            Verdict::Unpage(_) => {}
            Verdict::Compare(wanted) if file.home.unanswered >= MAX_UNANSWERED => {
                // Whoever cannot say what it has there is not believed to have it. It will say what it has.
                file.home.unanswered = 0;
                for (holder, place) in wanted {
                    file.ledger.reject(holder, place);
                    if holder == me {
                        file.recount_at = Some(now);
                    }
                }
                file.wake_at(now.plus(retry_ms));
            }
            Verdict::Compare(wanted) => {
                let until = now.plus(retry_ms << file.home.unanswered);
                if !file.home.asked.is_empty() {
                    file.home.unanswered += 1;
                }
                file.home.patience = Some(until);
                file.home.asked = wanted.iter().copied().collect();
                file.wake_at(until);
                let shape = file.ledger.file();
                for (holder, place) in wanted {
                    let Some(family) = shape.and_then(|shape| place.family(shape)) else { continue };
                    if holder == me {
                        self.effects.push(Effect::Restate { file: id, to: me, place: family.parent });
                    } else {
                        self.say(holder, id, Statement::WantSpans { place: family.parent }, now);
                    }
                }
            }
        }
    }

    /// The home knows the root.
    fn found_root(&mut self, id: FileId, root: Root) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let (Some(record), Some(size)) = (file.record, file.ledger.file()) else { return };
        if record.expected_root.is_some_and(|expected| expected != root)
            && let Ok(place) = Place::new(0, 0)
        {
            self.found_conflict(id, Disagreement { place, found: Some(root), home: me });
            return;
        }
        let _ = file.ledger.take(Fact::Root { size, root });
        self.settled(id);
    }

    fn found_conflict(&mut self, id: FileId, found: Disagreement) {
        if let Some(file) = self.files.get_mut(&id) {
            let _ = file.ledger.take(Fact::Conflict(found));
            self.settled(id);
        }
    }

    /// A new fact of ours: remember it, then tell everyone.
    pub(super) fn settled(&mut self, id: FileId) {
        if let Some(file) = self.files.get(&id) {
            if file.is_worth_remembering() {
                self.persist(id);
            }
            self.effects.push(Effect::Changed(id));
        }
        self.tell_everyone(id);
    }

    pub(super) fn root_read(&mut self, id: FileId, root: Option<Root>, now: Timestamp) {
        let retry_ms = self.config.retry_ms;
        let Some(file) = self.files.get_mut(&id) else { return };
        file.home.reading_root = false;
        if file.assembly.is_refused() {
            let contradicts = root.is_some() && root != file.ledger.root();
            file.assembly.root_read(contradicts, now.plus(retry_ms));
        }
        match root {
            Some(root) if file.ledger.state() == FileState::Receiving => self.found_root(id, root),
            Some(_) => {}
            None => file.wake_at(now.plus(retry_ms)),
        }
    }

    /// Becomes the home of a file whose home is lost. Needs the metadata record.
    pub(super) fn take_over(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let is_elsewhere = file.ledger.claim().is_some_and(|claim| claim.home != me);
        if is_elsewhere && file.record.is_some() && file.may_change_home(me) {
            self.claim_next(id, now);
        }
    }

    /// Claims a file for this datacenter, above every claim that is known; whether it could.
    pub(super) fn claim_next(&mut self, id: FileId, now: Timestamp) -> bool {
        let home = self.me();
        let Some(file) = self.files.get_mut(&id) else { return false };
        let (size, before) = (file.ledger.file(), file.ledger.claim());
        let record = file.ledger.record_digest().zip(file.ledger.tenant());
        let epoch = before.and_then(|claim| claim.epoch.next());
        let (Some((digest, tenant)), Some(epoch)) = (record, epoch) else { return false };
        file.own_claim = Some(epoch);
        let claim = Claim { epoch, home };
        let _ = file.ledger.take(Fact::Meta { claim, size, tenant, digest });
        file.home_changed(home, before, now);
        // It may be whole already, and then nothing more comes that would make anyone look.
        file.wake_at(now);
        self.settled(id);
        true
    }

    /// Expires a file whose home is here, and takes over one whose home has been silent for too long.
    pub(super) fn advance_expiry(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let (Some(claim), Some(record)) = (file.ledger.claim(), file.record) else { return };
        if file.ledger.state() == FileState::Dropped {
            return;
        }
        if claim.home == me {
            let Some(expiry_ms) = record.expiry_ms else { return };
            let at = file.last_progress.plus(expiry_ms);
            if now < at {
                file.wake_at(at);
                return;
            }
            let (reason, tenant) = (DropReason::Expired, record.tenant);
            let _ = file.ledger.take(Fact::Drop { reason, tenant });
            self.drop_file(id, tenant);
            self.tell_everyone(id);
            return;
        }
        let Some(takeover_ms) = self.config.takeover_ms.filter(|_| file.may_change_home(me)) else { return };
        let down_since = match self.peers.get(&claim.home) {
            Some(home) if home.is_up() => return,
            Some(home) => home.down_since,
            // No datacenter of this cluster (any more).
            None => file.last_progress,
        };
        // One after the other, so that usually only the first does.
        let rank = self.config.peers.iter().filter(|peer| **peer < me && **peer != claim.home).count() as u64;
        let at = down_since.plus(takeover_ms.saturating_mul(rank + 1));
        if now < at {
            file.wake_at(at);
        } else {
            self.take_over(id, now);
        }
    }
}
