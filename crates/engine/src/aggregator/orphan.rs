//! Orphans: chunks of a file that this datacenter has not heard of.
//!
//! They are kept, and the others are asked. Silence is not an answer: an orphan goes only when every configured
//! datacenter has said UNKNOWN for a whole grace period.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Aggregator, Config, Effect, File};
use crate::command::Statement;
use crate::ids::{DcId, FileId, TenantId, Timestamp};
use crate::ledger::FileState;
use crate::ranges::Ranges;

/// Questions are repeated at intervals that double up to this many times the first.
const MAX_BACKOFF: u64 = 16;

/// Chunks that nobody has described yet.
#[derive(Clone, Debug)]
pub(super) struct Orphan {
    tenant: TenantId,
    since: Timestamp,
    next_ask: Timestamp,
    interval_ms: u64,
    /// How many chunks were here when the store was read.
    found: u64,
    /// Which came since.
    came: Ranges,
    /// First and last time that each peer said UNKNOWN.
    unknown: BTreeMap<DcId, (Timestamp, Timestamp)>,
}

impl File {
    pub(super) fn note_orphan(
        &mut self,
        tenant: TenantId,
        chunks: Range<u64>,
        config: &Config,
        now: Timestamp,
    ) {
        match &mut self.orphan {
            Some(orphan) => {
                orphan.since = now;
                orphan.came.insert(chunks);
            }
            None if self.ledger.state() == FileState::Unheard => {
                let mut came = Ranges::new();
                came.insert(chunks);
                self.orphan = Some(Orphan {
                    tenant,
                    since: now,
                    next_ask: now,
                    interval_ms: config.ask_ms,
                    found: 0,
                    came,
                    unknown: BTreeMap::new(),
                });
            }
            // The metadata came while the chunk was written: fetching the record finds the chunk, or looking again.
            None if self.record.is_none() => self.want_record(now),
            None => self.recount_at = Some(now),
        }
    }

    pub(super) fn said_unknown(&mut self, from: DcId, now: Timestamp) {
        if let Some(orphan) = &mut self.orphan {
            orphan.unknown.entry(from).or_insert((now, now)).1 = now;
        }
    }

    /// The store was read, and has so many chunks of a file that nobody has described.
    pub(super) fn found_orphan(&mut self, tenant: TenantId, chunks: u64, config: &Config, now: Timestamp) {
        self.note_orphan(tenant, 0..0, config, now);
        if let Some(orphan) = &mut self.orphan {
            orphan.found = chunks;
            orphan.came = Ranges::new();
        }
    }

    /// Whose chunks wait here for their metadata.
    pub fn orphan_tenant(&self) -> Option<TenantId> {
        self.orphan.as_ref().map(|orphan| orphan.tenant)
    }
}

impl Aggregator {
    /// Counts the chunks of an orphan for its tenant, or no longer.
    pub(super) fn count_orphan(&mut self, id: FileId) {
        let Some(file) = self.files.get_mut(&id) else { return };
        let chunks =
            |orphan: &Orphan| orphan.found + orphan.came.iter().map(|r| r.end - r.start).sum::<u64>();
        let now = file.orphan.as_ref().map(|orphan| (orphan.tenant, chunks(orphan)));
        if let Some(tenant) = std::mem::replace(&mut file.counted_for, now.map(|(tenant, _)| tenant)) {
            self.orphans.remove(&(tenant, id));
        }
        if let Some((tenant, chunks)) = now {
            self.orphans.insert((tenant, id), chunks);
        }
    }

    /// Forgets a file of which nothing is known.
    pub(super) fn forget(&mut self, id: FileId) {
        let Some(file) = self.files.remove(&id) else { return };
        self.overview.forget(id, &file);
        if let Some(tenant) = file.counted_for {
            self.orphans.remove(&(tenant, id));
        }
    }

    pub(super) fn advance_orphan(&mut self, id: FileId, now: Timestamp) {
        let Some(file) = self.files.get_mut(&id) else { return };
        if file.ledger.state() != FileState::Unheard {
            if file.orphan.take().is_some() {
                file.want_record(now);
            }
            return;
        }
        let Some(orphan) = &mut file.orphan else { return };
        let grace = self.config.orphan_grace_ms;
        let given_up = self.config.peers.iter().all(|peer| {
            orphan
                .unknown
                .get(peer)
                .is_some_and(|(first, last)| last.since(*first) >= grace && *first >= orphan.since)
        });
        if given_up && now.since(orphan.since) >= grace {
            self.effects.push(Effect::DiscardOrphan(id));
            self.effects.push(Effect::Changed(id));
            if let Some(at) = file.queued {
                self.due.remove(&(at, id));
            }
            self.forget(id);
            return;
        }
        // An answer from before the last chunk came is no answer to it.
        let since = orphan.since;
        orphan.unknown.retain(|_, (first, _)| *first >= since);
        let ask = now >= orphan.next_ask;
        if ask {
            orphan.next_ask = now.plus(orphan.interval_ms);
            orphan.interval_ms =
                (orphan.interval_ms * 2).min(self.config.ask_ms * MAX_BACKOFF).min(grace.max(1));
        }
        let next = orphan.next_ask;
        file.wake_at(next);
        if ask {
            let up: Vec<DcId> =
                self.peers.iter().filter(|(_, peer)| peer.is_up()).map(|(dc, _)| *dc).collect();
            for peer in up {
                self.say(peer, id, Statement::MetaRequest, now);
            }
        }
    }
}
