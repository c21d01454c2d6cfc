//! A peer: its link, what was said to it and not acknowledged yet, and the incarnations of both ends.

use std::collections::{BTreeMap, BTreeSet};

use super::{Aggregator, Backlog, Effect};
use crate::command::{Command, Statement, Verified};
use crate::ids::{DcId, FileId, Generation, Incarnation, Sequence, Timestamp};
use crate::rules::Rule;

/// How many files may wait for a peer to be reachable, or to have room. Past that, comparing finds them.
const MAX_WAITING: usize = 1 << 16;

/// How many files a peer may have asked for in vain and be remembered for.
const MAX_ASKERS: usize = 1 << 12;

/// By how many incarnations a peer may be ahead in what it has seen of this datacenter. More were never begun: it
/// would use up the numbers.
const MAX_SKIPPED: u32 = 1 << 20;

/// How many echoes of comparisons are remembered.
const MAX_ECHOES: usize = 1 << 12;

/// What two datacenters tell each other before anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Which incarnation speaks.
    pub incarnation: Incarnation,
    /// The highest incarnation of the other that it had seen before.
    pub seen: Incarnation,
}

/// What is kept of a peer.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    up: bool,
    /// Since when it is down.
    pub(super) down_since: Timestamp,
    /// Whether it may have heard from this incarnation of ours.
    greeted: bool,
    /// Whether it was told of this incarnation by a hello that is not answered (yet).
    called: bool,
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
    /// What it was told of what is revoked.
    pub(super) revocations: super::revoke::Telling,
    /// What it said of itself.
    pub(super) said: super::standing::Said,
    /// When a comparison of a range was last sent back.
    echoes: BTreeMap<(u8, FileId), Timestamp>,
}

impl Peer {
    pub(super) fn new(seen: Incarnation, now: Timestamp) -> Self {
        Self {
            up: false,
            down_since: now,
            greeted: false,
            called: false,
            seen,
            behind_since: None,
            flights: BTreeMap::new(),
            waiting: BTreeSet::new(),
            asked_for: BTreeSet::new(),
            next_compare: now,
            revocations: super::revoke::Telling::default(),
            said: super::standing::Said::default(),
            echoes: BTreeMap::new(),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    /// Whether it may have heard of this incarnation from us. Of a peer that this disk never heard of it is not believed:
    /// a hello to which no answer came may have been heard, but rather the disk is another than the one that was, and
    /// one incarnation too many costs less than one too few.
    fn may_know_us(&self, was_greeted: bool) -> bool {
        was_greeted && self.seen > Incarnation::default()
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
    /// A peer is dialled.
    pub(super) fn dial(&mut self, dc: DcId) {
        let greeting = Greeting { incarnation: self.incarnation, seen: self.seen(dc) };
        if let Some(peer) = self.peers.get_mut(&dc) {
            // An earlier hello may have been heard, although no answer came.
            peer.greeted |= peer.called;
            peer.called = true;
        }
        self.effects.push(Effect::Hello { peer: dc, greeting });
    }

    /// A peer dialled.
    pub(super) fn hello(&mut self, dc: DcId, theirs: Greeting, now: Timestamp) {
        let seen = self.seen(dc);
        let known_to = |peer: &Peer| peer.may_know_us(peer.greeted || peer.called);
        let is_peer = self.peers.get(&dc).map(known_to);
        let welcome = is_peer.is_some() && theirs.incarnation >= seen && !self.burns(theirs.seen);
        if welcome {
            self.notice(dc, theirs.incarnation);
        }
        if is_peer.is_some_and(|known| self.is_outdated(theirs.seen, known)) {
            self.exceed(theirs.seen, now);
        }
        if let Some(peer) = self.peers.get_mut(&dc) {
            peer.greeted = true;
        }
        let greeting = Greeting { incarnation: self.incarnation, seen };
        self.effects.push(Effect::Answer { peer: dc, greeting, welcome });
    }

    /// A peer answered our hello.
    pub(super) fn link_up(&mut self, dc: DcId, theirs: Greeting, now: Timestamp) {
        let Some(peer) = self.peers.get_mut(&dc) else {
            self.effects.push(Effect::CloseLink(dc));
            return;
        };
        let (known, seen) = (peer.may_know_us(peer.greeted), peer.seen);
        peer.greeted = true;
        peer.called = false;
        let outdated = self.is_outdated(theirs.seen, known);
        if theirs.incarnation >= seen {
            self.notice(dc, theirs.incarnation);
        }
        if outdated {
            self.exceed(theirs.seen, now);
        }
        if outdated || theirs.incarnation < seen || self.burns(theirs.seen) {
            self.effects.push(Effect::CloseLink(dc));
            return;
        }
        if let Some(peer) = self.peers.get_mut(&dc) {
            peer.up = true;
            peer.next_compare = now;
        }
        self.say_standing(dc, true, now);
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
        peer.revocations.forget_flights();
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
        self.notice(from, incarnation);
        self.peers.contains_key(&from)
    }

    /// Takes note of a peer's incarnation.
    fn notice(&mut self, from: DcId, incarnation: Incarnation) {
        if let Some(peer) = self.peers.get_mut(&from).filter(|peer| incarnation > peer.seen) {
            peer.seen = incarnation;
            self.effects.push(Effect::PersistNode(self.node_memory()));
        }
    }

    /// Whether a peer claims to have seen more of this datacenter than can be.
    fn burns(&self, seen_of_me: Incarnation) -> bool {
        seen_of_me.number().saturating_sub(self.incarnation.number()) > MAX_SKIPPED
    }

    /// Whether somebody spoke in our name: this disk is lost, or an older copy, or it was copied. `known`: whether the
    /// peer may have heard of this incarnation from us.
    fn is_outdated(&self, seen_of_me: Incarnation, known: bool) -> bool {
        let same = seen_of_me == self.incarnation && !known;
        self.config.rules.holds(Rule::ExceedSeen)
            && (seen_of_me > self.incarnation || same)
            && !self.burns(seen_of_me)
    }

    /// Becomes the incarnation above one that a peer has seen.
    fn exceed(&mut self, seen_of_me: Incarnation, now: Timestamp) {
        self.reincarnate(Incarnation::new(seen_of_me.number().saturating_add(1)), now);
    }

    /// Speaks as a new incarnation from now on, of which nobody has heard.
    fn speak_as(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
        self.spoken = 0;
        for peer in self.peers.values_mut() {
            peer.greeted = false;
            peer.called = false;
        }
        self.effects.push(Effect::PersistNode(self.node_memory()));
    }

    /// Becomes a new incarnation, in which everything held is said again under a new generation.
    pub(super) fn reincarnate(&mut self, incarnation: Incarnation, now: Timestamp) {
        self.speak_as(incarnation);
        self.generation_floor = Generation::floor_of(incarnation);
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
            self.speak_as(Incarnation::new(self.incarnation.number().saturating_add(1)));
        }
        self.spoken += 1;
        if let Some(peer) = self.peers.get_mut(&to).filter(|peer| peer.up) {
            peer.greeted = true;
        }
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
        if peer.revocations.landed(sequence) {
            return;
        }
        let Some(id) = peer.flights.remove(&sequence) else { return };
        peer.behind_since = Some(now);
        if let Some(file) = self.files.get_mut(&id) {
            file.landed(from, sequence);
        }
        self.advance(id, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregator::{Config, NodeEvent, NodeMemory};

    const A: DcId = DcId::new(1);
    const B: DcId = DcId::new(2);
    const NOW: Timestamp = Timestamp::new(1_000_000);

    /// A process of a datacenter: its aggregator, and what its disk remembers.
    struct Life {
        agg: Aggregator,
        memory: NodeMemory,
        floor: Generation,
        links: usize,
    }

    impl Life {
        fn start(me: DcId, memory: NodeMemory) -> Self {
            let (agg, effects) = Aggregator::start(Config::new(me, [A, B]), memory, NOW);
            let mut this =
                Self { agg, memory: NodeMemory::default(), floor: Generation::default(), links: 0 };
            this.apply(effects);
            this.feed(NodeEvent::AllLoaded);
            this
        }

        fn feed(&mut self, event: NodeEvent) -> Option<(Greeting, bool)> {
            let effects = self.agg.handle(event, NOW);
            self.apply(effects)
        }

        /// What it says or answers. By then its disk remembers as whom it speaks.
        fn apply(&mut self, effects: Vec<Effect>) -> Option<(Greeting, bool)> {
            let mut said = None;
            for effect in effects {
                match effect {
                    Effect::PersistNode(memory) => self.memory = memory,
                    Effect::RaiseGenerations(floor) => self.floor = floor,
                    Effect::Hello { greeting, .. } => said = Some((greeting, true)),
                    Effect::Answer { greeting, welcome, .. } => said = Some((greeting, welcome)),
                    Effect::CloseLink(_) => self.links = 0,
                    _ => {}
                }
                if let Some((greeting, _)) = said {
                    assert_eq!(self.memory.incarnation, greeting.incarnation);
                    assert_eq!(self.floor, Generation::floor_of(greeting.incarnation));
                }
            }
            said
        }

        fn dial(&mut self, to: DcId) -> Greeting {
            self.feed(NodeEvent::Dial { peer: to }).unwrap().0
        }

        fn hear(&mut self, from: DcId, Greeting { incarnation, seen }: Greeting) -> (Greeting, bool) {
            self.feed(NodeEvent::Hello { peer: from, incarnation, seen_of_me: seen }).unwrap()
        }

        fn answered(&mut self, from: DcId, Greeting { incarnation, seen }: Greeting, welcome: bool) {
            self.links = 1;
            self.feed(NodeEvent::LinkUp { peer: from, incarnation, seen_of_me: seen });
            if !welcome {
                self.links = 0;
            }
            if self.links == 0 {
                self.feed(NodeEvent::LinkDown { peer: from });
            }
        }

        fn number(&self) -> u32 {
            self.agg.incarnation().number()
        }
    }

    /// `a` dials `b` once; whether it may speak.
    fn call(a: &mut Life, b: &mut Life) -> bool {
        let (from, to) = (a.agg.me(), b.agg.me());
        let hello = a.dial(to);
        let (answer, welcome) = b.hear(from, hello);
        a.answered(to, answer, welcome);
        assert_eq!(a.links == 1, a.agg.is_linked(to));
        a.links == 1
    }

    /// A datacenter in its `lives`th life, and another that has seen it.
    fn after(lives: u32) -> (Life, Life) {
        let mut b = Life::start(B, NodeMemory::default());
        let mut a = Life::start(A, NodeMemory::default());
        for _ in 1..lives {
            assert!(call(&mut a, &mut b));
            a = Life::start(A, a.memory);
        }
        assert!(call(&mut a, &mut b) && call(&mut b, &mut a));
        assert_eq!((a.number(), b.number(), b.agg.seen(A).number()), (lives, 1, lives));
        (a, b)
    }

    #[test]
    fn a_lost_disk_is_told_what_was_seen_and_exceeds_it() {
        let (_, mut b) = after(3);
        let mut a = Life::start(A, NodeMemory::default());
        assert!(!call(&mut a, &mut b), "the first life is over");
        assert_eq!((a.number(), b.agg.seen(A).number()), (4, 3));
        assert!(call(&mut a, &mut b) && call(&mut b, &mut a));
        assert_eq!((a.number(), b.agg.seen(A).number()), (4, 4));
    }

    #[test]
    fn a_lost_disk_learns_it_from_whoever_calls_first() {
        let (_, mut b) = after(3);
        let mut a = Life::start(A, NodeMemory::default());
        assert!(call(&mut b, &mut a), "it exceeds what was seen before it answers");
        assert_eq!((a.number(), b.agg.seen(A).number()), (4, 4));
        assert!(call(&mut a, &mut b));
        assert_eq!(a.number(), 4);
    }

    #[test]
    fn a_lost_disk_whose_first_hello_got_no_answer_is_noticed() {
        // The life that was lost was the first as well.
        for b_calls in [false, true] {
            let (_, mut b) = after(1);
            let mut a = Life::start(A, NodeMemory::default());
            let hello = a.dial(B);
            b.hear(A, hello);
            assert_eq!(if b_calls { call(&mut b, &mut a) } else { call(&mut a, &mut b) }, b_calls);
            assert_eq!(a.number(), 2);
            assert!(call(&mut a, &mut b) && call(&mut b, &mut a));
            assert_eq!((a.number(), b.agg.seen(A).number()), (2, 2));
        }
    }

    #[test]
    fn two_lost_disks_have_nothing_to_exceed() {
        let mut a = Life::start(A, NodeMemory::default());
        let mut b = Life::start(B, NodeMemory::default());
        assert!(call(&mut a, &mut b) && call(&mut b, &mut a));
        assert_eq!((a.number(), b.number()), (1, 1));
    }

    #[test]
    fn a_restored_copy_and_a_clone_are_exceeded() {
        let (a, mut b) = after(2);
        // Both are the third life, by their own disks.
        let (mut first, mut second) = (Life::start(A, a.memory.clone()), Life::start(A, a.memory));
        assert!(call(&mut first, &mut b));
        assert!(!call(&mut second, &mut b), "somebody spoke as the third");
        assert_eq!((first.number(), second.number()), (3, 4));
        assert!(call(&mut second, &mut b));
        assert!(!call(&mut first, &mut b));
        assert_eq!(first.number(), 5, "as long as both run, each is told of the other");
    }

    #[test]
    fn an_answer_that_was_lost_makes_nobody_begin_again() {
        let (mut a, mut b) = after(2);
        a = Life::start(A, a.memory);
        for _ in 0..3 {
            let hello = a.dial(B);
            assert!(b.hear(A, hello).1);
        }
        assert!(call(&mut a, &mut b));
        assert_eq!((a.number(), b.agg.seen(A).number()), (3, 3));
        // Both call at once, and each hears of itself from the other before its answer.
        a = Life::start(A, a.memory);
        let hello = a.dial(B);
        assert!(b.hear(A, hello).1);
        assert!(call(&mut b, &mut a));
        assert_eq!(a.number(), 4);
    }

    #[test]
    fn a_peer_cannot_use_up_the_incarnations() {
        let (mut a, _) = after(2);
        let liar = Greeting { incarnation: Incarnation::new(1), seen: Incarnation::new(u32::MAX) };
        assert!(!a.hear(B, liar).1);
        a.dial(B);
        a.answered(B, liar, true);
        assert_eq!((a.number(), a.agg.is_linked(B)), (2, false));
    }
}
