//! What another datacenter is told of a file: derived from the ledger each time, never queued.
//!
//! Facts go to whoever must know them. Spans go to the home, merged: while chunks keep coming only whole stripes are
//! said, and the rest once the file has been quiet for a moment, so that a run of n chunks costs about 2·log2(n)
//! commands and not n.

use std::collections::BTreeMap;

use super::{Aggregator, File};
use crate::command::Statement;
use crate::ids::{DcId, FileId, Generation, Nonce, Sequence, Timestamp};
use crate::ledger::{Claim, Fact, FileState};
use crate::limits::STRIPE_LEVEL;
use crate::ranges::Ranges;
use crate::span::{Place, Span};

/// Partial stripes wait at most this many stripe intervals while chunks keep coming.
const PATIENCE: u64 = 5;

/// What one peer was told of one file.
#[derive(Clone, Debug, Default)]
pub(super) struct Tell {
    /// Whether it must know the facts.
    facts: bool,
    /// Facts that it has acknowledged.
    told: Vec<Statement>,
    /// Chunks that it has acknowledged, under the current generation.
    said: Ranges,
    /// That nothing is held (any more) must be said as of this generation.
    nothing: Option<Generation>,
    /// What waits for its acknowledgement, and since when.
    flights: BTreeMap<Sequence, (Statement, Timestamp)>,
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
    pub(super) fn note_unsaid(&mut self, now: Timestamp) {
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
            tell.said = Ranges::new();
            match self.ledger.held_by(me) {
                Some((_, tree)) if !tree.is_empty() => self.note_unsaid(now),
                Some((generation, _)) => tell.nothing = Some(generation.max(floor)),
                // Not even heard of here; but the home may remember what a lost disk held.
                None => tell.nothing = Some(floor),
            }
        }
    }

    /// This peer must know the facts.
    pub(super) fn tell_facts(&mut self, peer: DcId) {
        self.tell.entry(peer).or_default().facts = true;
    }

    /// The home must know that nothing is held as of this generation.
    pub(super) fn tell_nothing(&mut self, generation: Generation) {
        if let Some(claim) = self.ledger.claim() {
            let tell = self.tell.entry(claim.home).or_default();
            tell.nothing = Some(generation);
            tell.said = Ranges::new();
        }
    }

    /// Another home: it was told nothing yet.
    pub(super) fn home_changed(&mut self, me: DcId, before: Option<Claim>, now: Timestamp) {
        self.home = super::complete::HomeWork::default();
        self.assembly = super::assemble::Assembly::default();
        let Some(claim) = self.ledger.claim() else { return };
        if claim.home == me || before.is_some_and(|before| before.home == claim.home) {
            return;
        }
        self.tell.entry(claim.home).or_default().said = Ranges::new();
        if self.ledger.held_by(me).is_some_and(|(_, tree)| !tree.is_empty()) {
            self.note_unsaid(now);
        }
    }

    /// Everything held here moves to a new generation.
    pub(super) fn regenerate(&mut self, me: DcId, floor: Generation, now: Timestamp) {
        let held = self
            .ledger
            .held_by(me)
            .map(|(generation, tree)| (generation, tree.iter().collect::<Vec<Span>>()));
        let Some((generation, spans)) = held else { return };
        let generation = generation.max(floor);
        let _ = self.ledger.take(Fact::HaveNothing { holder: me, generation });
        for span in &spans {
            let _ = self.ledger.take(Fact::Have { holder: me, generation, span: *span });
        }
        for tell in self.tell.values_mut() {
            tell.said = Ranges::new();
            tell.flights.clear();
        }
        if spans.is_empty() {
            self.tell_nothing(generation);
        } else {
            self.note_unsaid(now);
        }
    }

    /// What was under way to this peer may be lost.
    pub(super) fn forget_flights(&mut self, peer: DcId) {
        if let Some(tell) = self.tell.get_mut(&peer) {
            tell.flights.clear();
        }
    }

    /// The peer acknowledged what was said under this number.
    pub(super) fn landed(&mut self, peer: DcId, sequence: Sequence) {
        let file = self.ledger.file();
        let Some(tell) = self.tell.get_mut(&peer) else { return };
        match tell.flights.remove(&sequence) {
            Some((Statement::Have { span, .. }, _)) => {
                if let Some(file) = file {
                    tell.said.insert(span.place.range(file));
                }
            }
            Some((Statement::HaveNothing { generation }, _)) => {
                tell.nothing = tell.nothing.filter(|untold| *untold != generation);
            }
            Some((statement, _)) => tell.told.push(statement),
            None => {}
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
        if let Some(home) = home.filter(|home| *home != self.me())
            && let Some(file) = self.files.get_mut(&id)
            && file.unsaid.is_some()
        {
            file.tell.entry(home).or_default();
        }
        let peers: Vec<DcId> = match self.files.get(&id) {
            Some(file) => file.tell.keys().copied().collect(),
            None => return,
        };
        for peer in peers {
            self.tell_peer(id, peer, home == Some(peer), now);
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

        let late: Vec<Sequence> = tell
            .flights
            .iter()
            .filter(|(_, (_, sent))| now.since(*sent) >= resend_ms)
            .map(|(sequence, _)| *sequence)
            .collect();
        for sequence in late {
            tell.flights.remove(&sequence);
            peer.flights.remove(&sequence);
        }

        let mut due: Vec<Statement> = Vec::new();
        if tell.facts {
            due = file.ledger.statements();
            due.extend(file.ledger.assembled_statement(me, Nonce::new(0)).filter(|_| !due.is_empty()));
            tell.told.retain(|told| due.contains(told));
            due.retain(|statement| !tell.told.contains(statement));
            if due.is_empty() {
                tell.facts = false;
            }
        }
        if is_home && file.ledger.state() != FileState::Dropped {
            if let Some(generation) = tell.nothing {
                if file.ledger.held_by(me).is_some_and(|(_, tree)| !tree.is_empty()) {
                    // Something is held again: saying that under the new generation says this too.
                    tell.nothing = None;
                } else {
                    due.push(Statement::HaveNothing { generation });
                }
            }
            let (spans, wake) = due_spans(file.unsaid, &file.ledger, me, &tell.said, &self.config, now);
            due.extend(spans);
            if let (Some(wake), Some(unsaid)) = (wake, &mut file.unsaid) {
                if now >= unsaid.stripes_at {
                    unsaid.stripes_at = now.plus(self.config.stripe_ms);
                }
                file.wake = Some(file.wake.map_or(wake, |at| at.min(wake)));
            } else if due.is_empty() && tell.flights.is_empty() {
                file.unsaid = None;
            }
        }
        due.retain(|statement| !tell.flights.values().any(|(flying, _)| flying == statement));

        if !peer.is_up() {
            if !due.is_empty() || file.unsaid.is_some() {
                peer.wait_for(id);
            }
            return;
        }
        for statement in due {
            let Some(peer) = self.peers.get(&to) else { return };
            if peer.flights.len() >= self.config.max_flights {
                if let Some(peer) = self.peers.get_mut(&to) {
                    peer.wait_for(id);
                }
                break;
            }
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

/// The spans that are due to be said to the home, and when to look again if more will be.
fn due_spans(
    unsaid: Option<Unsaid>,
    ledger: &crate::ledger::Ledger,
    me: DcId,
    said: &Ranges,
    config: &super::Config,
    now: Timestamp,
) -> (Vec<Statement>, Option<Timestamp>) {
    let (Some(unsaid), Some(file), Some((generation, tree))) = (unsaid, ledger.file(), ledger.held_by(me))
    else {
        return (Vec::new(), None);
    };
    let quiet_at = unsaid.last.plus(config.quiet_ms).min(unsaid.since.plus(PATIENCE * config.stripe_ms));
    let all = now >= quiet_at;
    if !all && now < unsaid.stripes_at {
        return (Vec::new(), Some(quiet_at.min(unsaid.stripes_at)));
    }
    let whole_stripe = |place: Place| place.level() >= STRIPE_LEVEL;
    let spans = tree
        .iter()
        .filter(|span| !said.covers(span.place.range(file)) && (all || whole_stripe(span.place)))
        .map(|span| Statement::Have { generation, span })
        .collect();
    (spans, (!all).then(|| quiet_at.min(now.plus(config.stripe_ms))))
}
