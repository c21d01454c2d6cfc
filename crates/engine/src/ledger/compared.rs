//! What one datacenter tells another of a file, and the digest by which two find out whether they know the same.

use super::{Claim, Disagreement, FileState, Ledger};
use crate::command::{DropReason, Statement};
use crate::geometry::Geometry;
use crate::hash::{RecordDigest, Root};
use crate::ids::{DcId, Generation, HomeEpoch, Nonce, TenantId};

/// Names what is known of a file apart from who holds or assembled it: two ledgers with the same one know the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fingerprint(pub(crate) [u8; 16]);

impl Fingerprint {
    /// Of a file that is gone.
    pub(crate) fn of_drop(reason: DropReason, tenant: TenantId) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(b"drop").update(&[reason as u8]).update(&tenant.number().to_be_bytes());
        Self::cut(&hash)
    }

    /// Of a file with these facts.
    pub(crate) fn of(
        metas: &[(RecordDigest, TenantId)],
        sizes: &[u64],
        claim: Claim,
        roots: &[(Root, u64)],
    ) -> Self {
        let mut hash = blake3::Hasher::new();
        for (digest, tenant) in metas {
            hash.update(b"meta").update(digest.as_bytes()).update(&tenant.number().to_be_bytes());
        }
        for size in sizes {
            hash.update(b"size").update(&size.to_be_bytes());
        }
        hash.update(&[claim.epoch.number()]).update(&claim.home.number().to_be_bytes());
        for (root, size) in roots {
            hash.update(b"root").update(root.as_bytes()).update(&size.to_be_bytes());
        }
        Self::cut(&hash)
    }

    fn cut(hash: &blake3::Hasher) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finalize().as_bytes()[..16]);
        Self(bytes)
    }

    fn hasher(self) -> blake3::Hasher {
        let mut hash = blake3::Hasher::new();
        hash.update(&self.0);
        hash
    }

    /// What [`Ledger::digest_between`] gives for a file of which nothing else is known than this, and under which
    /// claim one of the two assembled it, if one of them did.
    pub(crate) fn digest(self, assembled: Option<Claim>) -> [u8; 32] {
        let mut hash = self.hasher();
        if let Some(claim) = assembled {
            push_assembled(&mut hash, claim.home, claim);
        }
        *hash.finalize().as_bytes()
    }
}

fn push_assembled(hash: &mut blake3::Hasher, dc: DcId, claim: Claim) {
    hash.update(b"assembled").update(&dc.number().to_be_bytes()).update(&[claim.epoch.number()]);
}

impl Ledger {
    /// The statements that give another ledger what this one knows, apart from spans.
    pub fn statements(&self) -> Vec<Statement> {
        let mut out = Vec::new();
        if let Some((reason, tenant)) = self.drop {
            // Absorbing: nothing else matters any more.
            out.push(Statement::Drop { reason, tenant });
            return out;
        }
        let Some(claim) = self.claim else { return out };
        for &(digest, tenant) in &self.metas.0 {
            let meta = |size| Statement::Meta { epoch: claim.epoch, home: claim.home, size, tenant, digest };
            if self.sizes.0.is_empty() {
                // Whoever holds a chunk must hear of the file before its size is settled.
                out.push(meta(None));
            }
            out.extend(self.sizes.0.iter().map(|&size| meta(Geometry::new(size).ok())));
        }
        for &(root, size) in &self.roots.0 {
            // A size is in the set only because a shape was made of it.
            let Ok(size) = Geometry::new(size) else { continue };
            out.push(Statement::Root { epoch: claim.epoch, home: claim.home, size, root });
        }
        if let Some(Disagreement { place, found, home }) = self.conflict {
            out.push(Statement::Conflict { home, place, found });
        }
        out
    }

    /// The statement by which `home` says that it has assembled the file.
    pub fn assembled_statement(&self, home: DcId, nonce: Nonce) -> Option<Statement> {
        let claim = self.assembled_by(home)?;
        let (size, root) = (self.file()?, self.root()?);
        Some(Statement::Assembled { epoch: claim.epoch, home: claim.home, size, nonce, root })
    }

    /// Digest of what every datacenter should know of this file, apart from who holds or assembled it. `None` if
    /// nothing is known.
    fn fingerprint(&self) -> Option<Fingerprint> {
        if let Some((reason, tenant)) = self.drop {
            return Some(Fingerprint::of_drop(reason, tenant));
        }
        let claim = self.claim.unwrap_or(Claim { epoch: HomeEpoch::new(0), home: DcId::EVERY });
        let known = self.state() != FileState::Unheard;
        known.then(|| Fingerprint::of(&self.metas.0, &self.sizes.0, claim, &self.roots.0))
    }

    /// Digest of what two datacenters should both know of this file: everything but spans, and the coverage of each
    /// of the two where the other is the home. `None` if there is nothing to compare.
    pub fn digest_between(&self, a: DcId, b: DcId) -> Option<[u8; 32]> {
        let mut hash = self.fingerprint()?.hasher();
        if self.drop.is_some() {
            return Some(*hash.finalize().as_bytes());
        }
        for dc in [a.min(b), a.max(b)] {
            if let Some(claim) = self.assembled_by(dc).filter(|_| self.is_assembled_at(dc)) {
                push_assembled(&mut hash, dc, claim);
            }
            // What a holder says of nothing is not compared: a generation without spans has no weight.
            let other = if dc == a { b } else { a };
            if self.claim.is_some_and(|claim| claim.home == other) && self.chunks_held_by(dc) > 0 {
                let (generation, coverage) = self.coverage(dc);
                hash.update(b"have")
                    .update(&generation.number().to_be_bytes())
                    .update(&coverage.to_be_bytes());
            }
        }
        if let Some(found) = self.conflict {
            hash.update(b"conflict")
                .update(&found.place.start().to_be_bytes())
                .update(&[found.place.level()]);
            hash.update(&found.found.map_or([0; 32], |root| *root.as_bytes()));
            hash.update(&found.home.number().to_be_bytes());
        }
        Some(*hash.finalize().as_bytes())
    }

    /// A fingerprint of which chunks a holder has, the same however they are merged or paged.
    fn coverage(&self, dc: DcId) -> (Generation, u64) {
        let Some(holding) = self.holders.get(&dc) else { return (Generation::new(0), 0) };
        let file = holding.tree.file();
        let hash = holding
            .tree
            .iter()
            .fold(holding.paged_hash, |hash, span| hash ^ self.coverage_hash(span.place, file));
        (holding.generation, hash)
    }
}
