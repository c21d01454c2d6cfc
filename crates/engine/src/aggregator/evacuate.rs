//! Evacuation: a datacenter that drains for good names the target the home of every file whose home is here.
//!
//! That is a claim with a higher epoch, like one of a takeover, and all else follows from it: the target fetches the record,
//! is told what is held here, pulls it and assembles; and this datacenter frees its copy when the target, asked with a fresh
//! nonce, has checked its own. So a target that vanishes half-way costs nothing but time. Files that are not complete stay
//! here until they are: their chunks are freed by nothing less than a confirmation.

use super::{Aggregator, File};
use crate::ids::{DcId, FileId, Timestamp};
use crate::ledger::{Claim, Fact, FileState};

/// How often files are looked for that are to be handed over, in milliseconds.
const EVERY_MS: u64 = 500;

/// Files that are handed over at a time, and files at rest that are woken for it at once.
const MAX_HANDED: usize = 1_024;
const MAX_WOKEN: usize = 64;

impl File {
    /// Whether its home is here and could be another.
    fn may_be_handed_over(&self, me: DcId) -> bool {
        let is_home =
            self.ledger.claim().is_some_and(|claim| claim.home == me && claim.epoch.next().is_some());
        let lives = match self.ledger.state() {
            FileState::Receiving | FileState::Complete | FileState::Assembled => true,
            FileState::Unheard | FileState::Conflict | FileState::Dropped => false,
        };
        is_home && lives && self.record.is_some() && !self.is_freeing()
    }
}

impl Aggregator {
    /// Who takes the files over, if they are to move and it could take them now.
    fn heir(&self) -> Option<DcId> {
        let drain = self.own.drain.filter(|drain| drain.evacuate)?;
        let peer = self.peers.get(&drain.target)?;
        (peer.is_up() && peer.said.drain().is_none()).then_some(drain.target)
    }

    /// When files are looked for next, if they are to move.
    pub(super) fn next_evacuation(&self) -> Option<Timestamp> {
        self.heir().map(|_| self.own.evacuate_at)
    }

    /// Hands some files over that are still homed here, and wakes some that are at rest.
    pub(super) fn evacuate_when_due(&mut self, now: Timestamp) {
        if now < self.own.evacuate_at || self.rest.is_loading() {
            return;
        }
        let Some(heir) = self.heir() else { return };
        self.own.evacuate_at = now.plus(EVERY_MS);
        let me = self.me();
        let here = self.files.iter().filter(|(_, file)| file.may_be_handed_over(me));
        let here: Vec<FileId> = here.map(|(id, _)| *id).take(MAX_HANDED).collect();
        for id in here {
            self.hand_over(id, heir, now);
            self.advance(id, now);
        }
        for id in self.rest.some_homed_at(me, MAX_WOKEN, now, self.wake_again_ms()) {
            self.wake(id, true, now);
        }
    }

    fn hand_over(&mut self, id: FileId, heir: DcId, now: Timestamp) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let (Some(record), Some(before)) = (file.record, file.ledger.claim()) else { return };
        let Some(epoch) = before.epoch.next() else { return };
        let claim = Claim { epoch, home: heir };
        let (size, tenant, digest) = (record.size.or(file.ledger.file()), record.tenant, record.digest);
        let _ = file.ledger.take(Fact::Meta { claim, size, tenant, digest });
        file.home_changed(me, Some(before), now);
        file.wake_at(now);
        self.settled(id);
    }
}
