//! How datacenters stand: how loaded each is (LOAD), and whether it hands its work over (DRAIN). Neither is a fact: the
//! newest sequence number wins, nothing is acknowledged, and what is lost is said again.

use super::{Aggregator, Effect};
use crate::command::Statement;
use crate::drain::{Drain, DrainError};
use crate::ids::{DcId, FileId, Sequence, Timestamp};
use crate::ledger::FileState;
use crate::placement::{FULL, Load, Standing, Standings};

/// While nothing changes, LOAD is said this often, in milliseconds.
const SAY_EVERY_MS: u64 = 2_000;

/// While there is pressure, it is said this often.
const SAY_PRESSED_MS: u64 = 500;

/// For how long it is said that a drain has ended.
const SAY_ENDED_MS: u64 = 60_000;

/// A change of the pressure by this much is said at once.
const NOTABLE: u16 = 100;

/// What a peer said of itself last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Said {
    load: Option<(Sequence, Load, Timestamp)>,
    drain: Option<(Sequence, Option<Drain>)>,
}

impl Said {
    /// Whether it hands its work over.
    pub(super) fn drain(&self) -> Option<Drain> {
        self.drain.and_then(|(_, drain)| drain)
    }
}

/// What this datacenter says of itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Own {
    pub(super) drain: Option<Drain>,
    /// Whether this process drained or ended a drain, so that a peer may not have heard the last of it.
    has_drained: bool,
    /// When the drain is said again, and until when one that has ended is.
    say_drain_at: Option<Timestamp>,
    say_drain_until: Timestamp,
    load: Load,
    said: Option<(Load, Timestamp)>,
    /// When files are looked for next that are to move.
    pub(super) evacuate_at: Timestamp,
}

impl Own {
    pub(super) fn remembered(drain: Option<Drain>) -> Self {
        Self { drain, has_drained: drain.is_some(), ..Self::default() }
    }

    fn is_due(&self, now: Timestamp) -> bool {
        let Some((said, at)) = self.said else { return true };
        let pressed = self.load.pressure.max(said.pressure) >= NOTABLE;
        self.load.pressure.abs_diff(said.pressure) >= NOTABLE
            || (self.load.pressure >= FULL) != (said.pressure >= FULL)
            || now.since(at) >= if pressed { SAY_PRESSED_MS } else { SAY_EVERY_MS }
    }
}

impl Aggregator {
    /// How this datacenter hands its work over, if it does.
    pub fn drain(&self) -> Option<Drain> {
        self.own.drain
    }

    /// What is known of every other datacenter, and of the own drain.
    pub fn standings(&self, at: Timestamp) -> Standings {
        let standing = |(dc, peer): (&DcId, &super::peer::Peer)| {
            let load = peer.said.load.map(|(_, load, heard)| (load, heard));
            let drain = peer.said.drain();
            (*dc, Standing { is_reachable: peer.is_up(), load, drain })
        };
        Standings { drain: self.own.drain, others: self.peers.iter().map(standing).collect(), at }
    }

    /// Whether this drain can begin, or go on, now.
    pub fn may_drain(&self, drain: Drain) -> Result<(), DrainError> {
        let target = drain.target;
        if target == self.me() {
            return Err(DrainError::Itself);
        }
        let Some(peer) = self.peers.get(&target) else { return Err(DrainError::Unknown(target)) };
        if !peer.is_up() {
            return Err(DrainError::Down(target));
        }
        if peer.said.drain().is_some() {
            return Err(DrainError::TargetDrains(target));
        }
        let to_me = |peer: &super::peer::Peer| {
            peer.is_up() && peer.said.drain().is_some_and(|drain| drain.target == self.me())
        };
        match self.peers.iter().find(|(_, peer)| to_me(peer)) {
            Some((dc, _)) => Err(DrainError::IsTarget(*dc)),
            None => Ok(()),
        }
    }

    /// Files of which something is here that others may need: chunks, or the duty to assemble them.
    pub fn files_left(&self) -> u64 {
        let me = self.me();
        let here = |file: &super::File| {
            let is_home = file.ledger.claim().is_some_and(|claim| claim.home == me);
            let ended = file.ledger.state() == FileState::Dropped;
            !ended
                && (is_home || file.published || file.orphan.is_some() || file.ledger.chunks_held_by(me) > 0)
        };
        self.files.values().filter(|file| here(file)).count() as u64 + self.rest.homed_at(me)
    }

    /// How loaded this datacenter is now.
    pub(super) fn loaded(&mut self, load: Load, now: Timestamp) {
        self.own.load = load;
        if self.own.is_due(now) {
            self.own.said = Some((load, now));
            for peer in self.reachable() {
                self.say_standing(peer, false, now);
            }
        }
    }

    /// When the drain is said again.
    pub(super) fn next_drain_said(&self) -> Option<Timestamp> {
        self.own.say_drain_at
    }

    /// Says the drain again, since nobody acknowledges it; one that has ended for a while. Whoever was away for longer hears
    /// of it when its link comes up.
    pub(super) fn say_drain_when_due(&mut self, now: Timestamp) {
        if self.own.say_drain_at.is_none_or(|at| now < at) {
            return;
        }
        let goes_on = self.own.drain.is_some() || now < self.own.say_drain_until;
        self.own.say_drain_at = goes_on.then(|| now.plus(SAY_EVERY_MS));
        for peer in self.reachable() {
            self.say_drain(peer, now);
        }
    }

    /// Begins, changes or ends the drain of this datacenter. Whether it may begin was [asked](Self::may_drain) before.
    pub(super) fn set_drain(&mut self, drain: Option<Drain>, now: Timestamp) {
        if drain == self.own.drain {
            return;
        }
        self.own.drain = drain;
        self.own.has_drained = true;
        self.own.evacuate_at = now;
        self.own.say_drain_at = Some(now.plus(SAY_EVERY_MS));
        self.own.say_drain_until = now.plus(SAY_ENDED_MS);
        self.effects.push(Effect::PersistNode(self.node_memory()));
        for peer in self.reachable() {
            self.say_standing(peer, true, now);
        }
    }

    /// Says how this datacenter stands; of its drain only if asked to, for most never drain.
    pub(super) fn say_standing(&mut self, to: DcId, with_drain: bool, now: Timestamp) {
        if self.own.said.is_some() {
            self.say(to, FileId::NIL, Statement::Load(self.own.load), now);
        }
        if with_drain {
            self.say_drain(to, now);
            if self.own.drain.is_some() {
                self.own.say_drain_at.get_or_insert(now.plus(SAY_EVERY_MS));
            }
        }
    }

    fn say_drain(&mut self, to: DcId, now: Timestamp) {
        let drain = self.own.drain;
        let left = if drain.is_some() { self.files_left() } else { 0 };
        self.say(to, FileId::NIL, Statement::Drain { drain, left }, now);
    }

    fn reachable(&self) -> Vec<DcId> {
        self.peers.iter().filter(|(_, peer)| peer.is_up()).map(|(dc, _)| *dc).collect()
    }

    pub(super) fn heard_load(&mut self, from: DcId, sequence: Sequence, load: Load, now: Timestamp) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        if peer.said.load.is_none_or(|(newest, ..)| newest < sequence) {
            peer.said.load = Some((sequence, load, now));
        }
    }

    pub(super) fn heard_drain(&mut self, from: DcId, sequence: Sequence, drain: Option<Drain>) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        if peer.said.drain.is_none_or(|(newest, _)| newest < sequence) {
            peer.said.drain = Some((sequence, drain));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregator::{Config, NodeEvent, NodeMemory};
    use crate::command::Command;
    use crate::drain::Phase;
    use crate::ids::Incarnation;

    const NOW: Timestamp = Timestamp::new(1_000_000);
    const A: DcId = DcId::new(1);
    const B: DcId = DcId::new(2);
    const C: DcId = DcId::new(3);
    const DRAIN: Drain = Drain { phase: Phase::Data, target: B, evacuate: true };

    fn started(me: DcId, memory: NodeMemory) -> Aggregator {
        Aggregator::start(Config::new(me, [A, B, C]), memory, NOW).0
    }

    fn link(aggregator: &mut Aggregator, peer: DcId) -> Vec<Statement> {
        let seen_of_me = Incarnation::new(0);
        let up = NodeEvent::LinkUp { peer, incarnation: Incarnation::new(1), seen_of_me };
        said(aggregator.handle(up, NOW), peer)
    }

    fn said(effects: Vec<Effect>, to: DcId) -> Vec<Statement> {
        let standing =
            |statement: &Statement| matches!(statement, Statement::Load(_) | Statement::Drain { .. });
        let sent = effects.into_iter().filter_map(|effect| match effect {
            Effect::Send(command) if command.to == to => Some(command.statement),
            _ => None,
        });
        sent.filter(standing).collect()
    }

    fn heard(count: u32, statement: Statement) -> NodeEvent {
        let sequence = Sequence::of(Incarnation::new(1), count);
        let (file, slot) = (FileId::NIL, FileId::NIL.slot());
        let command = Command { from: B, to: A, sequence, slot, sent_at: NOW, file, statement };
        NodeEvent::Received(command.trusted())
    }

    #[test]
    fn load_is_said_when_it_changes_and_now_and_then() {
        let mut a = started(A, NodeMemory::default());
        link(&mut a, B);
        let mut at = |ms, pressure| {
            let load = Load { room: 7, pressure };
            said(a.handle(NodeEvent::Load(load), NOW.plus(ms)), B)
        };
        let says = |pressure| vec![Statement::Load(Load { room: 7, pressure })];
        assert_eq!(at(0, 0), says(0));
        assert_eq!(at(1_999, 0), []);
        assert_eq!(at(2_000, 0), says(0));
        assert_eq!(at(2_001, 99), [], "hardly anything");
        assert_eq!(at(2_002, 100), says(100));
        assert_eq!(at(2_501, 100), []);
        assert_eq!(at(2_502, 100), says(100), "more often under pressure");
        assert_eq!(at(2_503, 999), says(999));
        assert_eq!(at(2_504, 1_000), says(1_000), "at the limit");
    }

    #[test]
    fn the_newest_sequence_wins() {
        let mut a = started(A, NodeMemory::default());
        link(&mut a, B);
        let load = |pressure| Statement::Load(Load { room: 7, pressure });
        a.handle(heard(5, load(5)), NOW);
        a.handle(heard(4, load(4)), NOW.plus(1));
        assert_eq!(a.standings(NOW).others[&B].load, Some((Load { room: 7, pressure: 5 }, NOW)));
        let drain = Drain { phase: Phase::Channels, target: C, evacuate: false };
        a.handle(heard(7, Statement::Drain { drain: None, left: 0 }), NOW);
        a.handle(heard(6, Statement::Drain { drain: Some(drain), left: 1 }), NOW);
        assert_eq!(a.standings(NOW).others[&B].drain, None);
        a.handle(heard(8, Statement::Drain { drain: Some(drain), left: 1 }), NOW);
        assert!(!a.standings(NOW).others[&B].is_open());
    }

    #[test]
    fn a_drain_is_said_remembered_and_taken_back() {
        let mut a = started(A, NodeMemory::default());
        link(&mut a, B);
        let begun = a.handle(NodeEvent::Drain(Some(DRAIN)), NOW);
        let kept = begun.iter().find_map(|effect| match effect {
            Effect::PersistNode(memory) => Some(memory.clone()),
            _ => None,
        });
        let says = |drain| Statement::Drain { drain, left: 0 };
        assert_eq!(said(begun, B), [says(Some(DRAIN))]);
        let mut again = started(A, NodeMemory::from_bytes(&kept.unwrap().to_bytes()).unwrap());
        assert_eq!(again.drain(), Some(DRAIN));
        assert_eq!(link(&mut again, B), [says(Some(DRAIN))], "a restart does not end it");
        assert_eq!(said(again.handle(NodeEvent::Drain(None), NOW), B), [says(None)]);
        // And again, for it may be lost; in a share that says no load, too.
        let mut at = NOW;
        let mut times = 0;
        while let Some(due) = again.next_timeout().filter(|due| *due < NOW.plus(120_000)) {
            at = due.max(at.plus(1));
            times +=
                said(again.handle(NodeEvent::Tick, at), B).iter().filter(|one| **one == says(None)).count();
        }
        assert!((29..=31).contains(&times), "{times}");
    }

    #[test]
    fn a_drain_is_said_again_while_it_lasts() {
        let mut a = started(A, NodeMemory::default());
        link(&mut a, B);
        a.handle(NodeEvent::Drain(Some(DRAIN)), NOW);
        let again = |a: &mut Aggregator, ms| said(a.handle(NodeEvent::Tick, NOW.plus(ms)), B);
        assert_eq!(again(&mut a, 1_999), []);
        for ms in [2_000, 4_000, 200_000] {
            assert_eq!(again(&mut a, ms), [Statement::Drain { drain: Some(DRAIN), left: 0 }]);
        }
    }

    #[test]
    fn only_to_who_can_take_it() {
        let mut a = started(A, NodeMemory::default());
        let to = |target| Drain { target, ..DRAIN };
        assert_eq!(a.may_drain(to(A)), Err(DrainError::Itself));
        assert_eq!(a.may_drain(to(DcId::new(9))), Err(DrainError::Unknown(DcId::new(9))));
        assert_eq!(a.may_drain(to(B)), Err(DrainError::Down(B)));
        link(&mut a, B);
        link(&mut a, C);
        assert_eq!(a.may_drain(to(B)), Ok(()));
        a.handle(heard(1, Statement::Drain { drain: Some(to(C)), left: 0 }), NOW);
        assert_eq!(a.may_drain(to(B)), Err(DrainError::TargetDrains(B)));
        assert_eq!(a.may_drain(to(C)), Ok(()));
        a.handle(heard(2, Statement::Drain { drain: Some(to(A)), left: 0 }), NOW);
        assert_eq!(a.may_drain(to(C)), Err(DrainError::IsTarget(B)));
        a.handle(NodeEvent::LinkDown { peer: B }, NOW);
        assert_eq!(a.may_drain(to(C)), Ok(()), "one that is gone is waited for by nobody");
    }
}
