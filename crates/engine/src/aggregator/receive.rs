//! What other datacenters say: facts are taken and acknowledged, questions answered.

use super::{Aggregator, Effect, File};
use crate::command::{Kind, Statement, Verified};
use crate::ids::{DcId, FileId, Timestamp};
use crate::ledger::{Claim, Fact, FileState, Taken};
use crate::revocations::Revocation;
use crate::rules::Rule;

impl Aggregator {
    /// Whether something that was said is about files of another share: whoever says it divides the slots otherwise, or
    /// speaks to the wrong one.
    pub(super) fn is_elsewhere(&self, verified: &Verified) -> bool {
        let (share, id) = (self.config.share, verified.command().file);
        match verified.command().statement {
            Statement::WantFiles { bits, .. } => bits < share.bits() || !share.has(id),
            statement => statement.is_about_a_file() && !share.has(id),
        }
    }

    /// Takes what a peer said.
    pub(super) fn received(&mut self, verified: &Verified, now: Timestamp) {
        let command = verified.command();
        let (from, id) = (command.from, command.file);
        if !self.heard(from, command.sequence.incarnation()) {
            return;
        }
        match command.statement {
            Statement::MetaRequest => self.asked(id, from, now),
            Statement::Unknown => {
                if let Some(file) = self.files.get_mut(&id) {
                    file.said_unknown(from, now);
                }
                self.advance(id, now);
            }
            Statement::WantSpans { place } => {
                let holds = |file: &&File| file.ledger.chunks_held_by(self.config.me) > 0;
                let holding = self.files.get(&id).filter(holds);
                if let Some(shape) = holding.and_then(|file| file.ledger.file()) {
                    match place.check(shape) {
                        Ok(()) => self.effects.push(Effect::Restate { file: id, to: from, place }),
                        Err(error) => self.refuse(from, Kind::WantSpans, error.to_string()),
                    }
                } else {
                    let held = self.files.get(&id).and_then(|file| file.ledger.held_by(self.config.me));
                    let generation = held.map_or(self.generation_floor, |(generation, _)| {
                        generation.max(self.generation_floor)
                    });
                    self.say(from, id, Statement::HaveNothing { generation }, now);
                }
            }
            Statement::WantFiles { bits, digest } => self.compare(from, id, bits, digest, now),
            Statement::Confirm { nonce } => self.asked_to_confirm(id, from, nonce, now),
            Statement::Ack { sequence, .. } => self.acknowledged(from, sequence, now),
            Statement::Assembled { epoch, home, .. } if home == self.config.me => {
                if self.reminded(id, Claim { epoch, home }, now) {
                    self.acknowledge(verified);
                }
                self.advance(id, now);
            }
            Statement::Assembled { nonce, .. } if nonce.number() != 0 => {
                self.take_fact(from, id, &command.statement, now);
                self.confirmed(id, from, &command.statement, now);
                self.advance(id, now);
            }
            Statement::Meta { .. }
            | Statement::Have { .. }
            | Statement::HaveNothing { .. }
            | Statement::Root { .. }
            | Statement::Assembled { .. }
            | Statement::Conflict { .. }
            | Statement::Drop { .. } => {
                if self.take_fact(from, id, &command.statement, now) {
                    self.acknowledge(verified);
                }
                self.advance(id, now);
            }
            Statement::Revoke { epoch, tenant } => {
                self.told_of_revocation(verified, Revocation::of(id, tenant, epoch));
            }
            Statement::Load(load) => self.heard_load(from, command.sequence, load, now),
            Statement::Drain { drain, .. } => self.heard_drain(from, command.sequence, drain),
            Statement::SessionMove { .. } => {
                // About no file: the driver hands these to the services that they concern.
            }
        }
    }

    /// A peer believes that this datacenter has assembled the file, under this claim of its own. If it has not, its disk
    /// was lost with the copy, or is an older one: it claims the file again, and the copy counts no more. Whether that
    /// may be acknowledged.
    fn reminded(&mut self, id: FileId, said: Claim, now: Timestamp) -> bool {
        let Some(file) = self.files.get(&id) else { return false };
        if file.ledger.state() == FileState::Dropped {
            return true;
        }
        // Whoever says it says META as well, which may not have come yet.
        let Some(claim) = file.ledger.claim().filter(|claim| *claim >= said) else { return false };
        let has_it = file.published || file.ledger.is_assembled_at(claim.home);
        if claim > said || has_it || !self.config.rules.holds(Rule::ClaimAgain) {
            return true;
        }
        self.claim_next(id, now)
    }

    /// Takes the fact that a peer stated; whether it may be acknowledged.
    pub(super) fn take_fact(
        &mut self,
        from: DcId,
        id: FileId,
        statement: &Statement,
        now: Timestamp,
    ) -> bool {
        let me = self.me();
        let fact = match Fact::of(from, statement) {
            Ok(Some(fact)) => fact,
            Ok(None) => return false,
            Err(error) => {
                self.refuse(from, statement.kind(), error.to_string());
                return true;
            }
        };
        let known = self.files.contains_key(&id);
        let file = self.file_mut(id, now);
        let before = (file.ledger.state(), file.ledger.claim(), file.ledger.file());
        let taken = file.ledger.take(fact);
        if let Statement::Have { span, .. } = statement {
            file.home.answered(from, span.place);
            file.touch(span.place);
        }
        if let (Statement::Meta { .. }, Ok(Taken::New | Taken::Known)) = (statement, &taken) {
            file.spoken_of(from, now);
        }
        let after = (file.ledger.state(), file.ledger.claim(), file.ledger.file());
        match taken {
            Ok(Taken::New) => {
                file.last_progress = now;
                if let Fact::Have { holder, .. } = fact {
                    file.disputes.remove(&holder);
                }
                if let Fact::Meta { claim, .. } = fact {
                    file.heard_of(claim, me);
                }
                if before.1 != after.1 {
                    file.home_changed(me, before.1, now);
                }
                if let Fact::Drop { tenant, .. } = fact {
                    self.drop_file(id, tenant);
                } else if before != after && self.files.get(&id).is_some_and(File::is_worth_remembering) {
                    self.persist(id);
                }
                if before.2 != after.2 {
                    // What is here has places only now.
                    self.restate_own(id);
                }
                self.effects.push(Effect::Changed(id));
                true
            }
            Ok(Taken::Known) => true,
            Ok(Taken::NotYet) => {
                if !known {
                    self.forget(id);
                }
                false
            }
            Err(error) => {
                if !known {
                    self.forget(id);
                }
                self.refuse(from, statement.kind(), error.to_string());
                true
            }
        }
    }

    pub(super) fn refuse(&mut self, peer: DcId, kind: Kind, reason: String) {
        self.effects.push(Effect::Refused { peer, kind, reason });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregator::{Config, NodeEvent, NodeMemory};
    use crate::command::Command;
    use crate::ids::{Incarnation, Sequence};
    use crate::share::{Share, Shares};

    const NOW: Timestamp = Timestamp::new(1_000_000);
    const A: DcId = DcId::new(1);
    const B: DcId = DcId::new(2);

    fn heard(file: FileId, statement: Statement) -> NodeEvent {
        let sequence = Sequence::of(Incarnation::new(1), 1);
        let command = Command { from: B, to: A, sequence, slot: file.slot(), sent_at: NOW, file, statement };
        NodeEvent::Received(command.trusted())
    }

    #[test]
    fn a_share_speaks_of_its_own_files_only() {
        let share = Share::new(3, 16).unwrap();
        let config = Config { share, ..Config::new(A, [A, B]) };
        let (mut a, _) = Aggregator::start(config, NodeMemory::default(), NOW);
        a.handle(NodeEvent::AllLoaded, NOW);
        let up = NodeEvent::LinkUp {
            peer: B,
            incarnation: Incarnation::new(1),
            seen_of_me: Incarnation::default(),
        };
        let effects = a.handle(up, NOW);
        let compares = |effect: &Effect| match effect {
            Effect::Send(Command { file, statement: Statement::WantFiles { bits, .. }, .. }) => {
                Some((*file, *bits))
            }
            _ => None,
        };
        assert_eq!(effects.iter().find_map(compares), Some((share.first(), 4)));
        let refused = |effects: Vec<Effect>| effects.iter().any(|it| matches!(it, Effect::Refused { .. }));
        let want = |bits| Statement::WantFiles { bits, digest: [1; 32] };
        for other in Shares::new(16).unwrap().all() {
            let file = FileId::from_bytes((other.first().as_u128() | 9).to_be_bytes());
            for statement in [Statement::MetaRequest, want(4), want(8)] {
                let is_refused = refused(a.handle(heard(file, statement), NOW));
                assert_eq!(is_refused, other != share, "{other}: {statement}");
                assert!(a.file(file).is_none());
            }
        }
        assert!(refused(a.handle(heard(share.first(), want(0)), NOW)), "all files are more than its own");
    }
}
