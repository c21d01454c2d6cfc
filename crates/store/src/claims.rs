//! Claims: who may write a chunk that has no record yet.
//!
//! A run claims all of its chunks or waits. While a blocking write is on its way the claim is busy, and a busy claim
//! is never given to anybody else, not even after its writer is gone or was told that it lost: an old write must
//! have landed before the next writer starts.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Names a claim within its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClaimId(u64);

#[derive(Debug)]
struct Claim {
    run: Range<u64>,
    /// Chunks of the run that are to be written; the others have a record and are compared.
    chunks: Vec<u64>,
    /// When bytes last came or went.
    progress: Instant,
    /// A blocking write is on its way.
    busy: bool,
    /// The run waits for its record.
    committing: bool,
    /// The writer must fail: somebody took over, or what it compared with is gone.
    lost: bool,
    /// The writer is gone.
    abandoned: bool,
}

/// The claims of one file.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    next: u64,
    claims: BTreeMap<ClaimId, Claim>,
}

/// Whether a run may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It has its claim.
    Taken(ClaimId),
    /// Another writer is at one of its chunks. Ask again when a claim was released, or at that moment.
    Wait(Option<Instant>),
}

impl Claims {
    /// Claims `chunks`, those of `run` without a record, taking over claims without progress for `stall`.
    pub(crate) fn take(&mut self, run: Range<u64>, chunks: Vec<u64>, now: Instant, stall: Duration) -> Turn {
        let mut wait = false;
        let mut until: Option<Instant> = None;
        let mut stalled = Vec::new();
        for (id, claim) in &mut self.claims {
            if !claim.chunks.iter().any(|chunk| chunks.contains(chunk)) {
                continue;
            }
            let deadline = claim.progress + stall;
            if claim.committing || claim.lost || claim.abandoned {
                wait = true;
            } else if deadline > now {
                wait = true;
                until = Some(until.map_or(deadline, |until| until.min(deadline)));
            } else if claim.busy {
                claim.lost = true;
                wait = true;
            } else {
                stalled.push(*id);
            }
        }
        if wait {
            return Turn::Wait(until);
        }
        for id in stalled {
            self.claims.remove(&id);
        }
        let id = ClaimId(self.next);
        self.next += 1;
        let claim = Claim {
            run,
            chunks,
            progress: now,
            busy: false,
            committing: false,
            lost: false,
            abandoned: false,
        };
        self.claims.insert(id, claim);
        Turn::Taken(id)
    }

    /// Whether the claim still stands.
    pub(crate) fn stands(&self, id: ClaimId) -> bool {
        self.claims.get(&id).is_some_and(|claim| !claim.lost)
    }

    /// Whether nobody holds a claim.
    pub(crate) fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// Notes that bytes came; `false` if the claim is lost.
    pub(crate) fn progress(&mut self, id: ClaimId, now: Instant) -> bool {
        match self.claims.get_mut(&id) {
            Some(claim) if !claim.lost => {
                claim.progress = now;
                true
            }
            Some(_) | None => false,
        }
    }

    /// A blocking write begins; `false` if the claim is lost.
    pub(crate) fn enter(&mut self, id: ClaimId, now: Instant) -> bool {
        let stands = self.progress(id, now);
        if let Some(claim) = self.claims.get_mut(&id).filter(|_| stands) {
            claim.busy = true;
        }
        stands
    }

    /// The blocking write returned.
    pub(crate) fn leave(&mut self, id: ClaimId, now: Instant) {
        if let Some(claim) = self.claims.get_mut(&id) {
            claim.busy = false;
            claim.progress = now;
            if claim.lost || claim.abandoned {
                self.claims.remove(&id);
            }
        }
    }

    /// The run is handed to the committer; `false` if the claim is lost.
    pub(crate) fn commit(&mut self, id: ClaimId) -> bool {
        match self.claims.get_mut(&id) {
            Some(claim) if !claim.lost => {
                claim.committing = true;
                true
            }
            Some(_) | None => false,
        }
    }

    /// The writer is gone. A claim that is busy or committing stays until that ends.
    pub(crate) fn abandon(&mut self, id: ClaimId) {
        if let Some(claim) = self.claims.get_mut(&id) {
            if claim.committing {
                return;
            }
            if claim.busy {
                claim.abandoned = true;
            } else {
                self.claims.remove(&id);
            }
        }
    }

    /// The committer is done with the run.
    pub(crate) fn release(&mut self, id: ClaimId) {
        self.claims.remove(&id);
    }

    /// Takes the claims from every writer whose run holds a chunk for which `hit` is true.
    pub(crate) fn revoke(&mut self, hit: impl Fn(&Range<u64>) -> bool) {
        self.claims.retain(|_, claim| {
            if !hit(&claim.run) {
                return true;
            }
            claim.lost = true;
            claim.busy || claim.committing
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(10);

    fn taken(turn: Turn) -> ClaimId {
        match turn {
            Turn::Taken(id) => id,
            Turn::Wait(_) => panic!("{turn:?}"),
        }
    }

    #[test]
    fn a_stalled_claim_is_taken_over_only_when_its_write_returned() {
        let mut claims = Claims::default();
        let start = Instant::now();
        let first = taken(claims.take(0..2, vec![0, 1], start, STALL));
        assert_eq!(claims.take(1..2, vec![1], start, STALL), Turn::Wait(Some(start + STALL)));
        let second = taken(claims.take(2..3, vec![2], start, STALL));
        assert!(claims.enter(first, start));
        let late = start + STALL;
        assert_eq!(claims.take(1..2, vec![1], late, STALL), Turn::Wait(None));
        assert!(!claims.stands(first));
        claims.abandon(first);
        assert_eq!(claims.take(1..2, vec![1], late, STALL), Turn::Wait(None));
        claims.leave(first, late);
        taken(claims.take(1..2, vec![1], late, STALL));
        assert!(!claims.enter(first, late));
        assert!(claims.stands(second));
    }

    #[test]
    fn a_committing_claim_is_never_taken_over() {
        let mut claims = Claims::default();
        let start = Instant::now();
        let first = taken(claims.take(0..1, vec![0], start, STALL));
        assert!(claims.commit(first));
        claims.abandon(first);
        assert_eq!(claims.take(0..1, vec![0], start + 2 * STALL, STALL), Turn::Wait(None));
        claims.release(first);
        assert!(claims.is_empty());
    }

    #[test]
    fn compared_chunks_block_nobody_but_can_be_revoked() {
        let mut claims = Claims::default();
        let start = Instant::now();
        let reader = taken(claims.take(0..2, vec![], start, STALL));
        let writer = taken(claims.take(0..2, vec![1], start, STALL));
        claims.revoke(|run| run.contains(&0));
        assert!(!claims.stands(reader) && !claims.stands(writer));
        assert!(claims.is_empty());
    }
}
