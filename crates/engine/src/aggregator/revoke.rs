//! Revocations: taken, remembered, and told to every peer until it has acknowledged them.
//!
//! A peer that has acknowledged one has it on its disk. It can forget it only together with its disk, and begins a new
//! incarnation then; a new incarnation is told everything again. So nothing has to be compared: a peer that was away, or
//! came back without what it knew, learns all of it from whoever knows it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Aggregator, Effect};
use crate::command::{Kind, Verified};
use crate::ids::{Incarnation, Sequence, Timestamp};
use crate::revocations::{Revocation, Revoking, Whose};
use crate::rules::Rule;

/// Revocations on their way to one peer.
const FLIGHTS: usize = 64;

/// What a peer was told.
#[derive(Clone, Debug, Default)]
pub(super) struct Telling {
    /// Which incarnation of it.
    to: Option<Incarnation>,
    /// What it must still be told.
    untold: BTreeSet<Whose>,
    /// What waits for its acknowledgement, and since when.
    flights: BTreeMap<Sequence, (Whose, Timestamp)>,
}

impl Telling {
    /// What was under way may be lost.
    fn take_back(&mut self, is_late: impl Fn(Timestamp) -> bool) {
        let late = self.flights.iter().filter(|(_, (_, sent))| is_late(*sent));
        let late: Vec<Sequence> = late.map(|(sequence, _)| *sequence).collect();
        for sequence in late {
            self.untold.extend(self.flights.remove(&sequence).map(|(whose, _)| whose));
        }
    }

    pub(super) fn forget_flights(&mut self) {
        self.take_back(|_| true);
    }

    /// Whether that was the number of a revocation.
    pub(super) fn landed(&mut self, sequence: Sequence) -> bool {
        self.flights.remove(&sequence).is_some()
    }

    /// When what is under way counts as lost.
    pub(super) fn next_timeout(&self, resend_ms: u64) -> Option<Timestamp> {
        self.flights.values().map(|(_, sent)| sent.plus(resend_ms)).min()
    }
}

impl Aggregator {
    /// A peer says that something is revoked.
    pub(super) fn told_of_revocation(&mut self, verified: &Verified, revocation: Revocation) {
        match self.take_revocation(revocation) {
            Revoking::New | Revoking::Known => self.acknowledge(verified),
            // It will say it again, and there may be room then.
            Revoking::Full => {
                let reason = "more revocations than a datacenter remembers: revoke whole tenants".to_owned();
                self.refuse(verified.command().from, Kind::Revoke, reason);
            }
        }
    }

    /// Takes what somebody says who may.
    pub(super) fn take_revocation(&mut self, revocation: Revocation) -> Revoking {
        let taken = self.revoked.take(revocation);
        if taken == Revoking::New {
            // On the disk before anybody is told, or told that it is known.
            self.effects.push(Effect::PersistNode(self.node_memory()));
            self.effects.push(Effect::Revoked(revocation));
            for peer in self.peers.values_mut() {
                peer.revocations.untold.insert(revocation.whose());
            }
        }
        taken
    }

    /// Says what peers must still be told, as far as there is room.
    pub(super) fn tell_revocations(&mut self, now: Timestamp) {
        let resend_ms = self.config.resend_ms;
        let again = self.config.rules.holds(Rule::RevokeAgain);
        let mut due = Vec::new();
        for (dc, peer) in &mut self.peers {
            let (is_up, seen) = (peer.is_up(), peer.seen());
            let telling = &mut peer.revocations;
            if telling.to != Some(seen) {
                if again || telling.to.is_none() {
                    telling.flights.clear();
                    telling.untold = self.revoked.iter().map(Revocation::whose).collect();
                }
                telling.to = Some(seen);
            }
            telling.take_back(|sent| now.since(sent) >= resend_ms);
            let room = FLIGHTS.saturating_sub(telling.flights.len());
            for _ in 0..if is_up { room } else { 0 } {
                let Some(whose) = telling.untold.pop_first() else { break };
                // One that another covers meanwhile is not said any more.
                due.extend(self.revoked.about(whose).map(|revocation| (*dc, revocation)));
            }
        }
        for (dc, revocation) in due {
            let sequence = self.say(dc, revocation.subject(), revocation.statement(), now);
            if let Some(peer) = self.peers.get_mut(&dc) {
                peer.revocations.flights.insert(sequence, (revocation.whose(), now));
            }
        }
    }
}
