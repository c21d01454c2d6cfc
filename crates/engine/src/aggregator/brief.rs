//! The brief of a file at rest: what is kept of it in lists and in memory once nothing is left to be done.
//!
//! A file at rest is dropped, or it is assembled at its home and nowhere else, every datacenter that can be reached was
//! told, and nothing contradicts. Of millions of such files nobody needs the ledgers: their briefs take part in
//! comparisons (`rest.rs`), and what a request or a command needs of one is loaded from the store. Layout, integers
//! big-endian:
//!
//! | bytes | field |
//! | --- | --- |
//! | 1 | 0: not at rest, all that follows is zero; 1: assembled; 2: dropped |
//! | 1 + 2 | claim: epoch, home; zero if dropped |
//! | 16 | fingerprint of the facts |
//! | 8 | Unix ms at which it expires; 0: never |
//! | 32 | root; zero if dropped |

use super::{FileMemory, RecordSummary};
use crate::hash::Root;
use crate::ids::{DcId, HomeEpoch, Timestamp};
use crate::ledger::{Claim, FileState, Fingerprint};
use crate::metadata::MetadataRecord;

/// What is kept of a file at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Brief {
    pub(super) fingerprint: Fingerprint,
    /// The claim under which the home assembled it, and the root; `None` if it is dropped.
    pub(super) assembled: Option<(Claim, Root)>,
    pub(super) expires: Option<Timestamp>,
}

impl Brief {
    /// Bytes of a brief.
    pub const LEN: usize = 60;

    /// What the store's record and facts of a file come to; `None` if the file is not at rest.
    pub fn of(record: Option<&RecordSummary>, memory: &FileMemory) -> Option<Self> {
        if let Some((reason, tenant)) = memory.dropped() {
            let fingerprint = Fingerprint::of_drop(reason, tenant);
            return Some(Self { fingerprint, assembled: None, expires: None });
        }
        let (claim, root, size) = memory.settled()?;
        let record = record?;
        let metas = [(record.digest, record.tenant)];
        let fits = record.size.is_none_or(|shape| shape.size() == size);
        let expires = record.expiry_ms.map(|ms| memory.progress().unwrap_or_default().plus(ms));
        fits.then(|| Self {
            fingerprint: Fingerprint::of(&metas, &[size], claim, &[(root, size)]),
            assembled: Some((claim, root)),
            // Only the home expires a file.
            expires: expires.filter(|_| memory.own_claim() == Some(claim.epoch)),
        })
    }

    /// The brief of a stored file, as bytes: what a store keeps in its lists beside each file.
    pub fn of_stored(record: Option<&MetadataRecord>, facts: &[u8]) -> [u8; Self::LEN] {
        let memory = FileMemory::from_bytes(facts).unwrap_or_default();
        let record = record.map(RecordSummary::of);
        Self::of(record.as_ref(), &memory).map_or([0; Self::LEN], |brief| brief.to_bytes())
    }

    /// Whether a file is at rest at a datacenter whose store has it `whole`, or not.
    pub fn is_at_rest(&self, me: DcId, whole: bool) -> bool {
        match self.assembled {
            None => true,
            Some((claim, _)) if claim.home == me => whole,
            // An empty file can be taken over by anyone, so others than its home keep an eye on it.
            Some((_, root)) => !whole && root != Root::empty(),
        }
    }

    /// Where the file stands.
    pub fn state(&self) -> FileState {
        if self.assembled.is_some() { FileState::Assembled } else { FileState::Dropped }
    }

    /// The datacenter that has the file; `None` if it is dropped.
    pub fn home(&self) -> Option<DcId> {
        self.assembled.map(|(claim, _)| claim.home)
    }

    /// The file's root; `None` if it is dropped.
    pub fn root(&self) -> Option<Root> {
        self.assembled.map(|(_, root)| root)
    }

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0] = if self.assembled.is_some() { 1 } else { 2 };
        if let Some((claim, root)) = self.assembled {
            out[1] = claim.epoch.number();
            out[2..4].copy_from_slice(&claim.home.number().to_be_bytes());
            out[28..].copy_from_slice(root.as_bytes());
        }
        out[4..20].copy_from_slice(&self.fingerprint.0);
        out[20..28].copy_from_slice(&self.expires.unwrap_or_default().number().to_be_bytes());
        out
    }

    /// Reads a brief; `None` if the file is not at rest.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let number = |at: usize| bytes[at..at + 8].iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        let claim = Claim {
            epoch: HomeEpoch::new(bytes[1]),
            home: DcId::new(u16::from_be_bytes([bytes[2], bytes[3]])),
        };
        let (mut fingerprint, mut root) = ([0; 16], [0; 32]);
        fingerprint.copy_from_slice(&bytes[4..20]);
        root.copy_from_slice(&bytes[28..]);
        let assembled = match bytes[0] {
            1 => Some((claim, Root::from_bytes(root))),
            2 => None,
            _ => return None,
        };
        let expires = Some(Timestamp::new(number(20))).filter(|at| at.number() > 0);
        Some(Self { fingerprint: Fingerprint(fingerprint), assembled, expires })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::DropReason;
    use crate::geometry::Geometry;
    use crate::ids::{ClientFileId, TenantId};
    use crate::ledger::{Fact, Ledger};
    use crate::metadata::MetadataFields;
    use crate::rules::Rules;

    const ME: DcId = DcId::new(3);

    fn record() -> MetadataRecord {
        let client: ClientFileId = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
        let fields = MetadataFields { size: Some(0), expiry_secs: 2, ..Default::default() };
        MetadataRecord::new(TenantId::new(7), client, fields).unwrap()
    }

    #[test]
    fn golden_bytes_and_round_trip() {
        let size = Geometry::new(0).unwrap();
        let memory = FileMemory::of_whole(ME, Root::empty(), size, Some(Timestamp::new(5)));
        let bytes = Brief::of_stored(Some(&record()), &memory.to_bytes());
        assert_eq!(bytes[..4], [1, 0, 0, 3]);
        assert_eq!(bytes[20..28], 2005u64.to_be_bytes());
        assert_eq!(bytes[28..], *Root::empty().as_bytes());
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "ecf272c8c5ab40188976b167cf04a283ef8d5388a88c1c01d140a34c8ea51b82"
        );
        let brief = Brief::from_bytes(&bytes).unwrap();
        assert_eq!((brief.state(), brief.home(), brief.to_bytes()), (FileState::Assembled, Some(ME), bytes));
        assert_eq!(Brief::of_stored(Some(&record()), &[]), [0; Brief::LEN]);
        assert_eq!(Brief::from_bytes(&[0; Brief::LEN]), None);
    }

    #[test]
    fn a_brief_compares_like_the_ledger_it_stands_for() {
        let record = RecordSummary::of(&record());
        let size = Geometry::new(0).unwrap();
        let memory = FileMemory::of_whole(ME, Root::empty(), size, None);
        let claim = memory.claim().unwrap();
        let mut ledger = Ledger::new(Rules::all());
        let (tenant, digest) = (record.tenant, record.digest);
        ledger.take(Fact::Meta { claim, size: record.size, tenant, digest }).unwrap();
        for fact in memory.facts() {
            ledger.take(fact).unwrap();
        }
        let brief = Brief::of(Some(&record), &memory).unwrap();
        let (other, third) = (DcId::new(1), DcId::new(9));
        assert_eq!(ledger.digest_between(ME, other), Some(brief.fingerprint.digest(Some(claim))));
        assert_eq!(ledger.digest_between(third, other), Some(brief.fingerprint.digest(None)));
        let reason = DropReason::Deleted;
        ledger.take(Fact::Drop { reason, tenant }).unwrap();
        let gone = Brief::of(None, &FileMemory::of(&ledger, None, None)).unwrap();
        assert_eq!(gone.state(), FileState::Dropped);
        assert_eq!(ledger.digest_between(ME, other), Some(gone.fingerprint.digest(None)));
    }
}
