//! A peer: its link, what was said to it and not acknowledged yet, and the incarnations of both ends.

use std::collections::{BTreeMap, BTreeSet};

use super::{Aggregator, Backlog, Effect};
use crate::command::{Command, Statement, Verified};
use crate::ids::{DcId, FileId, Generation, Incarnation, Sequence, Timestamp};

/// How many files may wait for a peer to be reachable, or to have room. Past that, comparing finds them.
const MAX_WAITING: usize = 1 << 16;

/// How many files a peer may have asked for in vain and be remembered for.
const MAX_ASKERS: usize = 1 << 12;

/// By how many incarnations a peer may be ahead in what it has seen of this datacenter. More were never begun: it
/// would use up the numbers.
const MAX_SKIPPED: u32 = 1 << 20;

/// How many echoes of comparisons are remembered.
const MAX_ECHOES: usize = 1 << 12;

/// What is kept of a peer.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    up: bool,
    /// Since when it is down.
    pub(super) down_since: Timestamp,
    /// Whether this incarnation of ours has spoken to it.
    greeted: bool,
    /// Its highest incarnation seen.
    seen: Incarnation,
    /// Since when it acknowledges nothing, though there is something to be acknowledged.
    behind_since: Option<Timestamp>,
    /// What waits for an acknowledgement.
    pub(super) flights: BTreeMap<Sequence, FileId>,
    /// Files of which it must still be told something.
    pub(super) waiting: BTreeSet<FileId>,
    /// Files it asked for that were not known.
    pub(super) asked_for: BTreeSet<FileId>,
    pub(super) next_compare: Timestamp,
    /// When a comparison of a range was last sent back.
    echoes: BTreeMap<(u8, FileId), Timestamp>,
}

impl Peer {
    pub(super) fn new(seen: Incarnation, now: Timestamp) -> Self {
        Self {
            up: false,
            down_since: now,
            greeted: false,
            seen,
            behind_since: None,
            flights: BTreeMap::new(),
            waiting: BTreeSet::new(),
            asked_for: BTreeSet::new(),
            next_compare: now,
            echoes: BTreeMap::new(),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    pub(super) fn seen(&self) -> Incarnation {
        self.seen
    }

    pub(super) fn next_compare(&self) -> Option<Timestamp> {
        self.up.then_some(self.next_compare)
    }

    /// Takes note of whether there is something that it has not acknowledged.
    pub(super) fn note_backlog(&mut self, now: Timestamp) {
        let is_behind = !self.flights.is_empty() || !self.waiting.is_empty();
        self.behind_since = is_behind.then(|| self.behind_since.unwrap_or(now));
    }

    /// What it has not acknowledged.
    pub(super) fn backlog(&self) -> Backlog {
        Backlog { count: self.flights.len() + self.waiting.len(), since: self.behind_since }
    }

    pub(super) fn wait_for(&mut self, id: FileId) {
        if self.waiting.len() < MAX_WAITING {
            self.waiting.insert(id);
        }
    }

    /// Whether it has so much to hear that this file does not even wait for it.
    pub(super) fn is_swamped(&self, id: FileId) -> bool {
        self.waiting.len() >= MAX_WAITING && !self.waiting.contains(&id)
    }

    pub(super) fn remember_asker(&mut self, id: FileId) {
        if self.asked_for.len() < MAX_ASKERS {
            self.asked_for.insert(id);
        }
    }

    /// Whether a range may be sent back for comparison: once in `every_ms`, so that two sides that cannot agree do
    /// not keep each other busy.
    pub(super) fn may_echo(&mut self, bits: u8, prefix: FileId, now: Timestamp, every_ms: u64) -> bool {
        if self.echoes.len() >= MAX_ECHOES {
            self.echoes.retain(|_, at| now.since(*at) < every_ms);
        }
        let last = self.echoes.get(&(bits, prefix));
        let may = self.echoes.len() < MAX_ECHOES && last.is_none_or(|at| now.since(*at) >= every_ms);
        if may {
            self.echoes.insert((bits, prefix), now);
        }
        may
    }
}

impl Aggregator {
    pub(super) fn link_up(
        &mut self,
        dc: DcId,
        incarnation: Incarnation,
        seen_of_me: Incarnation,
        now: Timestamp,
    ) {
        let mine = self.incarnation;
        let Some(peer) = self.peers.get_mut(&dc) else {
            self.effects.push(Effect::CloseLink(dc));
            return;
        };
        let burns = seen_of_me.number().saturating_sub(mine.number()) > MAX_SKIPPED;
        if incarnation < peer.seen || burns {
            self.effects.push(Effect::CloseLink(dc));
            return;
        }
        let newer = incarnation > peer.seen;
        peer.seen = incarnation;
        // Somebody spoke in our name: this disk is an older copy, or it was copied.
        let outdated = seen_of_me > mine || (seen_of_me == mine && !peer.greeted);
        peer.up = true;
        peer.greeted = true;
        peer.next_compare = now;
        if outdated {
            self.reincarnate(Incarnation::new(seen_of_me.number().saturating_add(1)), now);
        } else if newer {
            self.effects.push(Effect::PersistNode(self.node_memory()));
        }
        // Whoever did not count on it counts on it again.
        let absent = |file: &super::File| file.ledger.is_absent(dc);
        let ids: Vec<FileId> =
            self.files.iter().filter(|(_, file)| absent(file)).map(|(id, _)| *id).collect();
        for id in ids {
            self.advance(id, now);
        }
        // What waits to be said to this peer is served after every event; pulls and fetches have their own timers.
    }

    /// Says what waits for peers that can be reached and have room.
    pub(super) fn serve_waiting(&mut self, now: Timestamp) {
        let peers: Vec<DcId> = self.peers.keys().copied().collect();
        for dc in peers {
            let waiting = self.peers.get(&dc).map_or(0, |peer| peer.waiting.len());
            for _ in 0..waiting {
                let max_flights = self.config.max_flights;
                let has_room = |peer: &&mut Peer| peer.up && peer.flights.len() < max_flights;
                let Some(peer) = self.peers.get_mut(&dc).filter(has_room) else { break };
                let Some(id) = peer.waiting.pop_first() else { break };
                self.advance(id, now);
            }
        }
    }

    pub(super) fn link_down(&mut self, dc: DcId, now: Timestamp) {
        let Some(peer) = self.peers.get_mut(&dc) else { return };
        if !peer.up {
            return;
        }
        peer.up = false;
        peer.down_since = now;
        let flights = std::mem::take(&mut peer.flights);
        for id in flights.into_values() {
            if let Some(file) = self.files.get_mut(&id) {
                file.forget_flights(dc);
            }
            peer.wait_for(id);
        }
        // Whatever counts on this peer has a clock running from now: as a home, or as a holder.
        let concerned = |file: &super::File| {
            file.ledger.claim().is_some_and(|claim| claim.home == dc) || file.ledger.chunks_held_by(dc) > 0
        };
        let ids: Vec<FileId> =
            self.files.iter().filter(|(_, file)| concerned(file)).map(|(id, _)| *id).collect();
        for id in ids {
            self.advance(id, now);
        }
    }

    /// Takes note of a peer's incarnation from what it says; whether it is a peer at all. What an older incarnation
    /// said still counts.
    pub(super) fn heard(&mut self, from: DcId, incarnation: Incarnation) -> bool {
        let Some(peer) = self.peers.get_mut(&from) else { return false };
        if incarnation > peer.seen {
            peer.seen = incarnation;
            self.effects.push(Effect::PersistNode(self.node_memory()));
        }
        true
    }

    /// Becomes a new incarnation, in which everything held is said again under a new generation.
    pub(super) fn reincarnate(&mut self, incarnation: Incarnation, now: Timestamp) {
        self.incarnation = incarnation;
        self.spoken = 0;
        self.generation_floor = Generation::floor_of(incarnation);
        self.effects.push(Effect::PersistNode(self.node_memory()));
        self.effects.push(Effect::RaiseGenerations(self.generation_floor));
        for peer in self.peers.values_mut() {
            peer.flights.clear();
        }
        let (me, floor) = (self.me(), self.generation_floor);
        let ids: Vec<FileId> = self.files.keys().copied().collect();
        for id in ids {
            if let Some(file) = self.files.get_mut(&id) {
                file.regenerate(me, floor, now);
            }
            self.advance(id, now);
        }
    }

    /// Sends a statement; its sequence number tells it from every other.
    pub(super) fn say(&mut self, to: DcId, file: FileId, statement: Statement, now: Timestamp) -> Sequence {
        if self.spoken == u32::MAX {
            self.incarnation = Incarnation::new(self.incarnation.number().saturating_add(1));
            self.spoken = 0;
            self.effects.push(Effect::PersistNode(self.node_memory()));
        }
        self.spoken += 1;
        let sequence = Sequence::of(self.incarnation, self.spoken);
        self.effects.push(Effect::Send(Command {
            from: self.me(),
            to,
            sequence,
            slot: file.slot(),
            sent_at: now,
            file,
            statement,
        }));
        sequence
    }

    /// Acknowledges a fact.
    pub(super) fn acknowledge(&mut self, verified: &Verified) {
        let command = verified.command();
        let statement = Statement::Ack { sequence: command.sequence, digest: *verified.digest() };
        self.say(command.from, FileId::NIL, statement, command.sent_at);
    }

    /// A peer has taken what was said under this sequence number.
    pub(super) fn acknowledged(&mut self, from: DcId, sequence: Sequence, now: Timestamp) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        let Some(id) = peer.flights.remove(&sequence) else { return };
        peer.behind_since = Some(now);
        if let Some(file) = self.files.get_mut(&id) {
            file.landed(from, sequence);
        }
        self.advance(id, now);
    }
}
