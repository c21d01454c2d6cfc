//! What another datacenter is told of a file: derived from the ledger each time, never queued.
//!
//! Facts go to whoever must know them. Spans go to the home, merged: while chunks keep coming only whole stripes are
//! said, and the rest once the file has been quiet for a moment, so that a run of n chunks costs about 2·log2(n)
//! commands and not n.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Aggregator, Config, File};
use crate::command::Statement;
use crate::ids::{DcId, FileId, Generation, Incarnation, Nonce, Sequence, Timestamp};
use crate::ledger::{Claim, Fact, FileState, Ledger};
use crate::limits::STRIPE_LEVEL;
use crate::ranges::Ranges;
use crate::span::Span;

/// Partial stripes wait at most this many stripe intervals while chunks keep coming.
const PATIENCE: u64 = 5;

/// While spans are on their way, everything is said again at most once in this many comparisons.
const RESTATE_EVERY: u64 = 16;

/// What one peer was told of one file.
#[derive(Clone, Debug, Default)]
pub(super) struct Tell {
    /// Whether it must know the facts.
    facts: bool,
    /// Facts that it has acknowledged.
    told: Vec<Statement>,
    /// Chunks held here that it must still be told of, being the home.
    owed: Ranges,
    /// That nothing is held (any more) must be said as of this generation.
    nothing: Option<Generation>,
    /// What waits for its acknowledgement, and since when.
    flights: BTreeMap<Sequence, (Statement, Timestamp)>,
    /// When a span was last said.
    spoke: Timestamp,
    /// When a comparison last made everything be said again, and to which incarnation.
    restated: Option<(Incarnation, Timestamp)>,
}

impl Tell {
    /// Takes back what was under way: it may be lost.
    fn take_back(&mut self, ledger: &Ledger, is_late: impl Fn(Timestamp) -> bool) -> Vec<Sequence> {
        let late: Vec<Sequence> = self
            .flights
            .iter()
            .filter(|(_, (_, sent))| is_late(*sent))
            .map(|(sequence, _)| *sequence)
            .collect();
        for sequence in &late {
            if let (Some((Statement::Have { span, .. }, _)), Some(shape)) =
                (self.flights.remove(sequence), ledger.file())
            {
                self.owed.insert(span.place.range(shape));
            }
        }
        late
    }

    /// Whether nothing that was said waits for its acknowledgement.
    pub(super) fn is_still(&self) -> bool {
        self.flights.is_empty()
    }

    /// Whether nothing is left to be said.
    pub(super) fn is_done(&self) -> bool {
        !self.facts && self.owed.is_empty() && self.nothing.is_none() && self.flights.is_empty()
    }

    /// Whether spans are on their way, or were just now.
    fn is_busy(&self, now: Timestamp, resend_ms: u64) -> bool {
        !self.owed.is_empty()
            || now.since(self.spoke) < resend_ms
            || self.flights.values().any(|(statement, _)| matches!(statement, Statement::Have { .. }))
    }
}

/// Chunks came that the home was not told of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unsaid {
    since: Timestamp,
    last: Timestamp,
    stripes_at: Timestamp,
}

impl File {
    /// Chunks came: the home will be told.
    pub(super) fn owe(&mut self, me: DcId, spans: &[Span], now: Timestamp) {
        let (Some(shape), Some(claim)) = (self.ledger.file(), self.ledger.claim()) else { return };
        if claim.home == me || spans.is_empty() {
            return;
        }
        let tell = self.tell.entry(claim.home).or_default();
        spans.iter().for_each(|span| tell.owed.insert(span.place.range(shape)));
        self.note_unsaid(now);
    }

    /// All that is held here is to be said to this home.
    pub(super) fn owe_all(&mut self, me: DcId, home: DcId, now: Timestamp) {
        let Some((_, tree)) = self.ledger.held_by(me).filter(|(_, tree)| !tree.is_empty()) else { return };
        let tell = self.tell.entry(home).or_default();
        tree.iter().for_each(|span| tell.owed.insert(span.place.range(tree.file())));
        self.note_unsaid(now);
    }

    fn note_unsaid(&mut self, now: Timestamp) {
        match &mut self.unsaid {
            Some(unsaid) => unsaid.last = now,
            None => self.unsaid = Some(Unsaid { since: now, last: now, stripes_at: now }),
        }
    }

    /// Everything said to this peer is said again.
    pub(super) fn restate_to(&mut self, me: DcId, floor: Generation, peer: DcId, now: Timestamp) {
        let tell = self.tell.entry(peer).or_default();
        tell.facts = true;
        tell.told.clear();
        if self.ledger.claim().is_some_and(|claim| claim.home == peer) {
            if self.ledger.chunks_held_by(me) > 0 {
                self.owe_all(me, peer, now);
            } else {
                // Not even heard of here, perhaps; but the home may remember what a lost disk held.
                let held = self.ledger.held_by(me).map(|(generation, _)| generation.max(floor));
                tell.nothing = held.or(Some(floor));
                tell.owed = Ranges::new();
            }
        }
    }

    /// This peer knows something else. While spans are on their way that is no wonder, and saying all of a large file
    /// again each time would never end.
    pub(super) fn restate_if_settled(
        &mut self,
        config: &Config,
        floor: Generation,
        peer: DcId,
        seen: Incarnation,
        now: Timestamp,
    ) {
        let tell = self.tell.entry(peer).or_default();
        let again_ms = config.compare_ms.saturating_mul(RESTATE_EVERY);
        let lately = tell.restated.is_some_and(|(to, at)| to == seen && now.since(at) < again_ms);
        if lately && tell.is_busy(now, config.resend_ms) {
            tell.facts = true;
            tell.told.clear();
            return;
        }
        tell.restated = Some((seen, now));
        self.restate_to(config.me, floor, peer, now);
    }

    /// This peer must know the facts.
    pub(super) fn tell_facts(&mut self, peer: DcId) {
        self.tell.entry(peer).or_default().facts = true;
    }

    /// The home must know that nothing is held as of this generation.
    pub(super) fn tell_nothing(&mut self, generation: Generation) {
        self.unsaid = None;
        if let Some(claim) = self.ledger.claim() {
            let tell = self.tell.entry(claim.home).or_default();
            tell.nothing = Some(generation);
            tell.owed = Ranges::new();
        }
    }

    /// Another home: it was told nothing yet.
    pub(super) fn home_changed(&mut self, me: DcId, before: Option<Claim>, now: Timestamp) {
        self.home = super::complete::HomeWork::default();
        self.assembly = super::assemble::Assembly::default();
        let Some(claim) = self.ledger.claim() else { return };
        if before.is_some_and(|before| before.home == claim.home) {
            return;
        }
        for tell in self.tell.values_mut() {
            tell.owed = Ranges::new();
        }
        if claim.home != me {
            self.owe_all(me, claim.home, now);
        }
    }

    /// Everything held here moves to a new generation.
    pub(super) fn regenerate(&mut self, me: DcId, floor: Generation, now: Timestamp) {
        for tell in self.tell.values_mut() {
            tell.flights.clear();
        }
        let Some((generation, _)) = self.ledger.held_by(me) else { return };
        if self.is_freeing() {
            // By now they may be gone, and under this generation that would be a lie.
            let _ = self.ledger.take(Fact::HaveNothing { holder: me, generation: floor });
        } else {
            self.ledger.lift(me, floor);
        }
        if self.ledger.chunks_held_by(me) == 0 {
            self.tell_nothing(generation.max(floor));
        } else if let Some(claim) = self.ledger.claim().filter(|claim| claim.home != me) {
            self.owe_all(me, claim.home, now);
        }
    }

    /// What was under way to this peer may be lost.
    pub(super) fn forget_flights(&mut self, peer: DcId) {
        if let Some(tell) = self.tell.get_mut(&peer) {
            tell.take_back(&self.ledger, |_| true);
        }
    }

    /// The peer acknowledged what was said under this number.
    pub(super) fn landed(&mut self, peer: DcId, sequence: Sequence) {
        let Some(tell) = self.tell.get_mut(&peer) else { return };
        match tell.flights.remove(&sequence) {
            Some((Statement::HaveNothing { generation }, _)) => {
                tell.nothing = tell.nothing.filter(|untold| *untold != generation);
            }
            Some((Statement::Have { .. }, _)) | None => {}
            Some((statement, _)) => tell.told.push(statement),
        }
    }
}

impl Aggregator {
    /// Every peer must know the facts of this file.
    pub(super) fn tell_everyone(&mut self, id: FileId) {
        let Some(file) = self.files.get_mut(&id) else { return };
        for peer in self.peers.keys() {
            file.tell_facts(*peer);
        }
    }

    /// Those who asked for the file in vain hear of it now.
    pub(super) fn tell_askers(&mut self, id: FileId) {
        let Some(file) = self.files.get_mut(&id) else { return };
        if file.ledger.state() == FileState::Unheard {
            return;
        }
        for (dc, peer) in &mut self.peers {
            if peer.asked_for.remove(&id) {
                file.tell_facts(*dc);
            }
        }
    }

    /// Says what is due to be said of a file.
    pub(super) fn advance_telling(&mut self, id: FileId, now: Timestamp) {
        self.tell_askers(id);
        let home = self.files.get(&id).and_then(|file| file.ledger.claim()).map(|claim| claim.home);
        let peers: Vec<DcId> = match self.files.get(&id) {
            Some(file) => file.tell.keys().copied().collect(),
            None => return,
        };
        for peer in peers {
            self.tell_peer(id, peer, home == Some(peer), now);
        }
        if let Some(file) = self.files.get_mut(&id)
            && matches!(file.ledger.state(), FileState::Assembled | FileState::Dropped)
        {
            // Hardly anything will be said of it again: what was told is not worth its memory.
            file.tell.retain(|_, tell| !tell.is_done());
        }
        if let Some(file) = self.files.get_mut(&id)
            && (home == Some(self.config.me) || file.ledger.state() == FileState::Dropped)
        {
            file.unsaid = None;
        }
    }

    fn tell_peer(&mut self, id: FileId, to: DcId, is_home: bool, now: Timestamp) {
        let me = self.me();
        let resend_ms = self.config.resend_ms;
        let Some(peer) = self.peers.get_mut(&to) else { return };
        let Some(file) = self.files.get_mut(&id) else { return };
        let Some(tell) = file.tell.get_mut(&to) else { return };

        for sequence in tell.take_back(&file.ledger, |sent| now.since(sent) >= resend_ms) {
            peer.flights.remove(&sequence);
        }
        let mut due: Vec<Statement> = Vec::new();
        if tell.facts {
            due = file.ledger.statements();
            if let Some(assembled) =
                file.ledger.assembled_statement(me, Nonce::new(0)).filter(|_| !due.is_empty())
            {
                // That it is assembled says its root.
                due.retain(|statement| !matches!(statement, Statement::Root { .. }));
                due.push(assembled);
            }
            if file.ledger.is_assembled_at(to) {
                // A home that lost its disk has to learn what is believed of it.
                due.extend(file.ledger.assembled_statement(to, Nonce::new(0)));
            }
            tell.told.retain(|told| due.contains(told));
            due.retain(|statement| !tell.told.contains(statement));
            tell.facts = !due.is_empty();
        }
        let is_dropped = file.ledger.state() == FileState::Dropped;
        if !is_home || is_dropped {
            tell.owed = Ranges::new();
            tell.nothing = None;
        } else if let Some(generation) = tell.nothing {
            if file.ledger.chunks_held_by(me) > 0 {
                // Something is held again: saying that under the new generation says this too.
                tell.nothing = None;
            } else if file.ledger.file().is_some() {
                // Before the size is known nobody can use it.
                due.push(Statement::HaveNothing { generation });
            }
        }
        if !peer.is_up() {
            if !due.is_empty() || !tell.owed.is_empty() {
                peer.wait_for(id);
            }
            return;
        }
        due.retain(|statement| !tell.flights.values().any(|(flying, _)| flying == statement));

        let room = self.config.max_flights.saturating_sub(peer.flights.len());
        let mut is_full = due.len() > room;
        due.truncate(room);
        if !tell.owed.is_empty() {
            // What came back unacknowledged waited long enough.
            let overdue = Unsaid { since: tell.spoke, last: tell.spoke, stripes_at: tell.spoke };
            let unsaid = file.unsaid.get_or_insert(overdue);
            let patience = PATIENCE * self.config.stripe_ms;
            let quiet_at = unsaid.last.plus(self.config.quiet_ms).min(unsaid.since.plus(patience));
            let all = now >= quiet_at;
            if all || now >= unsaid.stripes_at {
                let room = room - due.len();
                let mut spans = due_spans(&tell.owed, &file.ledger, me, all, room + 1);
                is_full |= spans.len() > room;
                spans.truncate(room);
                if let Some((generation, tree)) = file.ledger.held_by(me) {
                    for span in spans {
                        tell.owed.remove(span.place.range(tree.file()));
                        due.push(Statement::Have { generation, span });
                        tell.spoke = now;
                    }
                }
                if !is_full {
                    unsaid.stripes_at = now.plus(self.config.stripe_ms);
                }
                if all && !is_full {
                    // What was owed and is not held any more is owed no longer.
                    tell.owed = Ranges::new();
                    file.unsaid = None;
                }
            }
            if let Some(unsaid) = file.unsaid.filter(|_| !is_full) {
                file.wake_at(quiet_at.min(unsaid.stripes_at));
            }
        }
        if is_full {
            peer.wait_for(id);
        }
        for statement in due {
            let sequence = self.say(to, id, statement, now);
            if let Some(peer) = self.peers.get_mut(&to) {
                peer.flights.insert(sequence, id);
            }
            if let Some(tell) = self.files.get_mut(&id).and_then(|file| file.tell.get_mut(&to)) {
                tell.flights.insert(sequence, (statement, now));
            }
        }
        if let Some(file) = self.files.get_mut(&id) {
            let first =
                file.tell.get(&to).and_then(|tell| tell.flights.values().map(|(_, sent)| *sent).min());
            if let Some(sent) = first {
                file.wake_at(sent.plus(resend_ms));
            }
        }
    }
}

/// The first spans that hold something that is owed, whole stripes or all of them.
fn due_spans(owed: &Ranges, ledger: &Ledger, me: DcId, all: bool, limit: usize) -> Vec<Span> {
    let Some((_, tree)) = ledger.held_by(me) else { return Vec::new() };
    let mut spans: Vec<Span> = Vec::new();
    let mut said_to = 0;
    for range in owed.iter() {
        let range: Range<u64> = range.start.max(said_to)..range.end;
        for span in tree.within(range) {
            if spans.len() == limit {
                return spans;
            }
            if all || span.place.level() >= STRIPE_LEVEL {
                said_to = span.place.range(tree.file()).end;
                spans.push(span);
            }
        }
    }
    spans
}
