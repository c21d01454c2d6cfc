//! What an aggregator remembers across restarts: of a file, and of its datacenter.
//!
//! Everything else is rebuilt: what is held from the chunk store, what others know by asking them (G5). Layouts,
//! integers big-endian:
//!
//! | bytes | of a file |
//! | --- | --- |
//! | 4 | `SLF` and version: 2 if two roots or two metadata records contradict, else 1 |
//! | 1 | flags: claim 1, own claim 2, root 4, conflict 8, unexpected root 16, drop 32, size without a root 64, another size 128 |
//! | 1 | in version 2, flags: two roots 1, two records 2 |
//! | 1 + 2 | claim: epoch, home |
//! | 1 | own claim: epoch |
//! | 8 + 32 | root: size, root |
//! | 8 | size without a root |
//! | 8 | another size, which contradicts it |
//! | 2·(8 + 32) | two roots: size, root |
//! | 2·(32 + 8) | two metadata records: digest, tenant |
//! | 8 + 1 + 2 + 32 | conflict: start, level, home, unexpected root |
//! | 1 + 8 | drop: reason, tenant |
//! | 1 + 3·n | datacenters that assembled the file: epoch, id |
//! | 8 | if more follows: Unix ms of the last progress of a finished file that will expire |
//!
//! | bytes | of a datacenter |
//! | --- | --- |
//! | 4 | `SLN` and version: 3 if it drains, else 2 if something is revoked, else 1 |
//! | 4 | incarnation |
//! | 1 + 6·n | peers: id, highest incarnation seen |
//! | 2 + 32·n | from version 2 on, revocations: tenant, session (nil: all of them), epoch; those of tenants first, rising |
//! | 1 + 8 | in version 3: phase of the drain; target and whether to evacuate, as DRAIN says them |

use std::collections::BTreeMap;

use crate::command::DropReason;
use crate::drain::{Drain, Phase};
use crate::geometry::Geometry;
use crate::hash::{RecordDigest, Root};
use crate::ids::{DcId, FileId, HomeEpoch, Incarnation, RevocationEpoch, TenantId, Timestamp};
use crate::ledger::{Claim, Disagreement, Fact, Ledger};
use crate::revocations::{Revocation, Revoked};
use crate::span::Place;

const FILE_MAGIC: [u8; 4] = *b"SLF\x01";
const CONTRADICTED_FILE_MAGIC: [u8; 4] = *b"SLF\x02";
const NODE_MAGIC: [u8; 4] = *b"SLN\x01";
const REVOKING_NODE_MAGIC: [u8; 4] = *b"SLN\x02";
const DRAINING_NODE_MAGIC: [u8; 4] = *b"SLN\x03";

/// Why bytes are no memory.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("not the memory of {of}: {reason}")]
pub struct MemoryError {
    /// Of what.
    pub of: &'static str,
    /// What is wrong.
    pub reason: &'static str,
}

/// What must be remembered of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileMemory {
    claim: Option<Claim>,
    own_claim: Option<HomeEpoch>,
    root: Option<(Root, u64)>,
    /// The size while there is no root: a record that leaves it open does not say.
    size: Option<Geometry>,
    /// A larger size that was said too.
    other_size: Option<Geometry>,
    /// Roots that contradict, with their sizes.
    roots: Option<[(Root, u64); 2]>,
    /// Metadata records that contradict.
    records: Option<[(RecordDigest, TenantId); 2]>,
    conflict: Option<Disagreement>,
    drop: Option<(DropReason, TenantId)>,
    assembled: Vec<Claim>,
    /// When a finished file that will expire progressed last: its time must not begin anew with the process.
    progress: Option<Timestamp>,
}

impl FileMemory {
    /// What to remember of a file that came whole, in one request, and whose home is here.
    pub fn of_whole(me: DcId, root: Root, size: Geometry, progress: Option<Timestamp>) -> Self {
        let claim = Claim { epoch: HomeEpoch::new(0), home: me };
        Self {
            claim: Some(claim),
            own_claim: Some(claim.epoch),
            root: Some((root, size.size())),
            assembled: vec![claim],
            progress,
            ..Self::default()
        }
    }

    /// What to remember of a ledger.
    pub fn of(ledger: &Ledger, own_claim: Option<HomeEpoch>, progress: Option<Timestamp>) -> Self {
        Self {
            progress: progress.filter(|_| ledger.root().is_some() && ledger.dropped().is_none()),
            claim: ledger.claim(),
            own_claim,
            root: ledger.root().zip(ledger.file()).map(|(root, file)| (root, file.size())),
            size: ledger.file().filter(|_| ledger.root().is_none()),
            other_size: ledger.other_size(),
            roots: ledger.two_roots(),
            records: ledger.two_records(),
            conflict: ledger.disagreement(),
            drop: ledger.dropped(),
            assembled: ledger.copies().collect(),
        }
    }

    /// The remembered home.
    pub fn claim(&self) -> Option<Claim> {
        self.claim
    }

    /// The remembered shape: that of the smallest size, should two contradict.
    pub fn size(&self) -> Option<Geometry> {
        self.sizes().next()
    }

    /// The remembered sizes: one, or two that contradict.
    pub(super) fn sizes(&self) -> impl Iterator<Item = Geometry> {
        let rooted = self.root.and_then(|(_, size)| Geometry::new(size).ok());
        self.size.or(rooted).into_iter().chain(self.other_size)
    }

    /// The highest epoch in which this datacenter claimed to be the home.
    pub fn own_claim(&self) -> Option<HomeEpoch> {
        self.own_claim
    }

    /// When a finished file that will expire progressed last.
    pub fn progress(&self) -> Option<Timestamp> {
        self.progress
    }

    /// Why the file was dropped, and who owned it.
    pub fn dropped(&self) -> Option<(DropReason, TenantId)> {
        self.drop
    }

    /// The root under which exactly one datacenter, the home, has assembled the file, and the file's size; `None` if
    /// that is not how it stands.
    pub(super) fn settled(&self) -> Option<(Claim, Root, u64)> {
        let (claim, (root, size)) = (self.claim?, self.root?);
        let contradicted = self.other_size.is_some() || self.roots.is_some() || self.records.is_some();
        let open = self.conflict.is_some() || self.drop.is_some() || contradicted;
        let settled = self.assembled == [claim] && !open;
        settled.then_some((claim, root, size))
    }

    /// The remembered facts, to be taken by a fresh ledger.
    pub fn facts(&self) -> Vec<Fact> {
        let mut facts = Vec::new();
        if let Some((reason, tenant)) = self.drop {
            facts.push(Fact::Drop { reason, tenant });
        }
        if let Some((root, size)) = self.root
            && let Ok(size) = Geometry::new(size)
        {
            facts.push(Fact::Root { size, root });
            facts.extend(self.assembled.iter().map(|&claim| Fact::Assembled { claim, size, root }));
        }
        for (root, size) in self.roots.into_iter().flatten() {
            facts.extend(Geometry::new(size).ok().map(|size| Fact::Root { size, root }));
        }
        if let Some(claim) = self.claim {
            let records = self.records.into_iter().flatten();
            facts.extend(records.map(|(digest, tenant)| Fact::Meta { claim, size: None, tenant, digest }));
        }
        facts.extend(self.conflict.map(Fact::Conflict));
        facts
    }

    /// The bytes to store.
    pub fn to_bytes(&self) -> Vec<u8> {
        let contradicted = self.roots.is_some() || self.records.is_some();
        let mut out = if contradicted { CONTRADICTED_FILE_MAGIC } else { FILE_MAGIC }.to_vec();
        let found = self.conflict.and_then(|conflict| conflict.found);
        let flags = [
            self.claim.is_some(),
            self.own_claim.is_some(),
            self.root.is_some(),
            self.conflict.is_some(),
            found.is_some(),
            self.drop.is_some(),
            self.size.is_some(),
            self.other_size.is_some(),
        ];
        out.push(flags.iter().enumerate().fold(0, |bits, (i, flag)| bits | u8::from(*flag) << i));
        if contradicted {
            out.push(u8::from(self.roots.is_some()) | u8::from(self.records.is_some()) << 1);
        }
        if let Some(claim) = self.claim {
            push_claim(&mut out, claim);
        }
        out.extend(self.own_claim.map(HomeEpoch::number));
        if let Some((root, size)) = self.root {
            out.extend_from_slice(&size.to_be_bytes());
            out.extend_from_slice(root.as_bytes());
        }
        let sizes = self.size.into_iter().chain(self.other_size);
        out.extend(sizes.flat_map(|size| size.size().to_be_bytes()));
        for (root, size) in self.roots.iter().flatten() {
            out.extend_from_slice(&size.to_be_bytes());
            out.extend_from_slice(root.as_bytes());
        }
        for (digest, tenant) in self.records.iter().flatten() {
            out.extend_from_slice(digest.as_bytes());
            out.extend_from_slice(&tenant.number().to_be_bytes());
        }
        if let Some(Disagreement { place, found, home }) = self.conflict {
            out.extend_from_slice(&place.start().to_be_bytes());
            out.push(place.level());
            out.extend_from_slice(&home.number().to_be_bytes());
            out.extend_from_slice(&found.map_or([0; 32], |root| *root.as_bytes()));
        }
        if let Some((reason, tenant)) = self.drop {
            out.push(reason as u8);
            out.extend_from_slice(&tenant.number().to_be_bytes());
        }
        out.push(self.assembled.len().min(255) as u8);
        for claim in self.assembled.iter().take(255) {
            push_claim(&mut out, *claim);
        }
        out.extend(self.progress.into_iter().flat_map(|at| at.number().to_be_bytes()));
        out
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote; nothing at all is an empty memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MemoryError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let mut rest = Reader { bytes, of: "a file" };
        let contradicted = match rest.array::<4>()? {
            FILE_MAGIC => false,
            CONTRADICTED_FILE_MAGIC => true,
            _ => return Err(rest.error("magic or version")),
        };
        let [flags] = rest.array()?;
        let [more] = if contradicted { rest.array()? } else { [0] };
        let has = |i: u8| flags & 1 << i != 0;
        let claim = if has(0) { Some(rest.claim()?) } else { None };
        let own_claim = if has(1) { Some(HomeEpoch::new(rest.array::<1>()?[0])) } else { None };
        let root = if has(2) { Some(rest.root()?) } else { None };
        let size = if has(6) { Some(rest.size()?) } else { None };
        let other_size = if has(7) { Some(rest.size()?) } else { None };
        let roots = if more & 1 != 0 { Some([rest.root()?, rest.root()?]) } else { None };
        let records = if more & 2 != 0 { Some([rest.record()?, rest.record()?]) } else { None };
        let conflict = if has(3) {
            let start = u64::from_be_bytes(rest.array()?);
            let [level] = rest.array()?;
            let place = Place::new(start, level).map_err(|_| rest.error("place"))?;
            let home = DcId::new(u16::from_be_bytes(rest.array()?));
            let root = Root::from_bytes(rest.array()?);
            Some(Disagreement { place, found: has(4).then_some(root), home })
        } else {
            None
        };
        let drop = if has(5) {
            let reason =
                DropReason::from_byte(rest.array::<1>()?[0]).ok_or_else(|| rest.error("drop reason"))?;
            Some((reason, TenantId::new(u64::from_be_bytes(rest.array()?))))
        } else {
            None
        };
        let [count] = rest.array()?;
        let assembled = (0..count).map(|_| rest.claim()).collect::<Result<_, _>>()?;
        let progress = match rest.bytes {
            [] => None,
            _ => Some(Timestamp::new(u64::from_be_bytes(rest.array()?))),
        };
        if !rest.bytes.is_empty() {
            return Err(rest.error("trailing bytes"));
        }
        let memory = Self {
            claim,
            own_claim,
            root,
            size,
            other_size,
            roots,
            records,
            conflict,
            drop,
            assembled,
            progress,
        };
        if memory.to_bytes() == bytes { Ok(memory) } else { Err(rest.error("not canonical")) }
    }
}

/// What must be remembered of a datacenter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeMemory {
    /// The last incarnation that may have spoken.
    pub incarnation: Incarnation,
    /// The highest incarnation seen of each peer.
    pub seen: BTreeMap<DcId, Incarnation>,
    /// What has been revoked.
    pub revoked: Revoked,
    /// How it hands its work over, if it does.
    pub drain: Option<Drain>,
}

impl NodeMemory {
    /// What a share begins with: what was remembered of it, and what counts of `others`, shares that had files in common with
    /// it when the slots were divided otherwise. Nothing that they may have said is said again as if it were new. It drains
    /// if the last of them did: each begins above all before it.
    #[must_use]
    pub fn succeeding(self, others: impl IntoIterator<Item = Self>) -> Self {
        let mut all = self;
        for other in others {
            if other.incarnation > all.incarnation {
                all.drain = other.drain;
            }
            all.incarnation = all.incarnation.max(other.incarnation);
            for (dc, incarnation) in other.seen {
                let seen = all.seen.entry(dc).or_default();
                *seen = incarnation.max(*seen);
            }
            for revocation in other.revoked.iter() {
                all.revoked.take(revocation);
            }
        }
        all
    }

    /// The bytes to store.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = match (self.drain, self.revoked.is_empty()) {
            (Some(_), _) => DRAINING_NODE_MAGIC,
            (None, false) => REVOKING_NODE_MAGIC,
            (None, true) => NODE_MAGIC,
        }
        .to_vec();
        out.extend_from_slice(&self.incarnation.number().to_be_bytes());
        out.push(self.seen.len().min(255) as u8);
        for (dc, incarnation) in self.seen.iter().take(255) {
            out.extend_from_slice(&dc.number().to_be_bytes());
            out.extend_from_slice(&incarnation.number().to_be_bytes());
        }
        if !self.revoked.is_empty() || self.drain.is_some() {
            // Bounded below what the number has room for.
            out.extend_from_slice(&(self.revoked.len() as u16).to_be_bytes());
        }
        for revocation in self.revoked.iter() {
            out.extend_from_slice(&revocation.tenant.number().to_be_bytes());
            out.extend_from_slice(revocation.subject().as_bytes());
            out.extend_from_slice(&revocation.epoch.number().to_be_bytes());
        }
        if let Some(drain) = self.drain {
            out.push(drain.phase as u8);
            out.extend_from_slice(&drain.packed().to_be_bytes());
        }
        out
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote; nothing at all is the memory of a new datacenter.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MemoryError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let mut rest = Reader { bytes, of: "a datacenter" };
        let (revoking, drains) = match rest.array::<4>()? {
            NODE_MAGIC => (false, false),
            REVOKING_NODE_MAGIC => (true, false),
            DRAINING_NODE_MAGIC => (true, true),
            _ => return Err(rest.error("magic or version")),
        };
        let incarnation = Incarnation::new(u32::from_be_bytes(rest.array()?));
        let [count] = rest.array()?;
        let mut seen = BTreeMap::new();
        for _ in 0..count {
            let dc = DcId::new(u16::from_be_bytes(rest.array()?));
            seen.insert(dc, Incarnation::new(u32::from_be_bytes(rest.array()?)));
        }
        let mut revoked = Revoked::default();
        let revocations = if revoking { u16::from_be_bytes(rest.array()?) } else { 0 };
        for _ in 0..revocations {
            let tenant = TenantId::new(u64::from_be_bytes(rest.array()?));
            let subject = FileId::from_bytes(rest.array()?);
            let epoch = RevocationEpoch::new(u64::from_be_bytes(rest.array()?));
            revoked.take(Revocation::of(subject, tenant, epoch));
        }
        let drain = if drains { Some(rest.drain()?) } else { None };
        if !rest.bytes.is_empty() {
            return Err(rest.error("trailing bytes"));
        }
        let memory = Self { incarnation, seen, revoked, drain };
        if memory.to_bytes() == bytes { Ok(memory) } else { Err(rest.error("not canonical")) }
    }
}

fn push_claim(out: &mut Vec<u8>, claim: Claim) {
    out.push(claim.epoch.number());
    out.extend_from_slice(&claim.home.number().to_be_bytes());
}

struct Reader<'a> {
    bytes: &'a [u8],
    of: &'static str,
}

impl Reader<'_> {
    fn error(&self, reason: &'static str) -> MemoryError {
        MemoryError { of: self.of, reason }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MemoryError> {
        let (head, rest) = self.bytes.split_first_chunk().ok_or_else(|| self.error("cut short"))?;
        self.bytes = rest;
        Ok(*head)
    }

    fn size(&mut self) -> Result<Geometry, MemoryError> {
        Geometry::new(u64::from_be_bytes(self.array()?)).map_err(|_| self.error("size"))
    }

    fn root(&mut self) -> Result<(Root, u64), MemoryError> {
        let size = u64::from_be_bytes(self.array()?);
        Ok((Root::from_bytes(self.array()?), size))
    }

    fn record(&mut self) -> Result<(RecordDigest, TenantId), MemoryError> {
        let digest = RecordDigest::from_bytes(self.array()?);
        Ok((digest, TenantId::new(u64::from_be_bytes(self.array()?))))
    }

    fn drain(&mut self) -> Result<Drain, MemoryError> {
        let [phase] = self.array()?;
        let packed = u64::from_be_bytes(self.array()?);
        let drain = Phase::from_byte(phase).and_then(|phase| Drain::from_packed(phase, packed));
        drain.ok_or_else(|| self.error("drain"))
    }

    fn claim(&mut self) -> Result<Claim, MemoryError> {
        let [epoch] = self.array()?;
        Ok(Claim { epoch: HomeEpoch::new(epoch), home: DcId::new(u16::from_be_bytes(self.array()?)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::FileState;

    #[test]
    fn file_memory_round_trips_with_golden_bytes() {
        let claim = Claim { epoch: HomeEpoch::new(2), home: DcId::new(3) };
        let memory = FileMemory {
            claim: Some(claim),
            own_claim: Some(HomeEpoch::new(1)),
            root: Some((Root::empty(), 5)),
            size: None,
            other_size: None,
            roots: None,
            records: None,
            conflict: Some(Disagreement {
                place: Place::new(8, 3).unwrap(),
                found: Some(Root::empty()),
                home: DcId::new(3),
            }),
            drop: Some((DropReason::Expired, TenantId::new(9))),
            assembled: vec![claim],
            progress: None,
        };
        let bytes = memory.to_bytes();
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "5b2b74b9c70d97cee8254e0ee4cf62924010bc81d1fa31a1dd1960a7e93dfbff"
        );
        assert_eq!(FileMemory::from_bytes(&bytes), Ok(memory));
        assert!(FileMemory::from_bytes(&bytes[..bytes.len() - 1]).is_err());
        assert_eq!(FileMemory::from_bytes(&[]), Ok(FileMemory::default()));
        assert_eq!(FileMemory::from_bytes(&FileMemory::default().to_bytes()), Ok(FileMemory::default()));
        let size = |bytes| Geometry::new(bytes).ok();
        let two = FileMemory { size: size(5), other_size: size(7), ..FileMemory::default() };
        assert_eq!(hex::encode(two.to_bytes()), "534c4601c00000000000000005000000000000000700");
        assert_eq!(FileMemory::from_bytes(&two.to_bytes()), Ok(two));
        let empty = Geometry::new(0).unwrap();
        let whole = FileMemory::of_whole(DcId::new(3), Root::empty(), empty, Some(Timestamp::new(77)));
        let bytes = whole.to_bytes();
        assert_eq!(bytes[..9], *b"SLF\x01\x07\0\0\x03\0");
        assert_eq!(bytes[bytes.len() - 8..], 77u64.to_be_bytes());
        assert_eq!(FileMemory::from_bytes(&bytes), Ok(whole));
    }

    #[test]
    fn a_file_that_was_in_conflict_is_in_conflict_again() {
        let me = DcId::new(1);
        let claim = Claim { epoch: HomeEpoch::new(0), home: me };
        let (tenant, size) = (TenantId::new(9), Geometry::new(5).unwrap());
        let meta = |n| {
            let digest = RecordDigest::from_bytes([n; 32]);
            Fact::Meta { claim, size: Some(size), tenant, digest }
        };
        let root = |n| Fact::Root { size, root: Root::from_bytes([n; 32]) };
        let assembled = |n| Fact::Assembled { claim, size, root: Root::from_bytes([n; 32]) };
        for facts in [
            vec![meta(1), root(1), root(2)],
            vec![meta(1), assembled(1), assembled(2)],
            vec![meta(1), meta(2)],
            vec![meta(1), meta(2), assembled(1)],
            vec![meta(2), meta(1), root(2), root(1)],
        ] {
            let mut ledger = Ledger::new(crate::rules::Rules::all());
            for fact in &facts {
                ledger.take(*fact).unwrap();
            }
            assert_eq!(ledger.state(), FileState::Conflict);
            let memory = FileMemory::of(&ledger, None, None);
            assert_eq!(memory.settled(), None);
            let bytes = memory.to_bytes();
            assert_eq!(bytes[..4], CONTRADICTED_FILE_MAGIC);
            let memory = FileMemory::from_bytes(&bytes).unwrap();
            let mut again = Ledger::new(crate::rules::Rules::all());
            for fact in memory.facts() {
                again.take(fact).unwrap();
            }
            // What the own store has of it is one of each.
            again.take(facts[0]).unwrap();
            assert_eq!(again.state(), FileState::Conflict, "{facts:?}");
            assert_eq!((again.two_roots(), again.two_records()), (ledger.two_roots(), ledger.two_records()));
        }
    }

    #[test]
    fn a_share_speaks_as_nobody_did_before_it() {
        let memory = |incarnation, seen, drain| NodeMemory {
            incarnation: Incarnation::new(incarnation),
            seen: [(DcId::new(2), Incarnation::new(seen))].into(),
            drain,
            ..NodeMemory::default()
        };
        let drain = Some(Drain { phase: Phase::Data, target: DcId::new(2), evacuate: false });
        let other = memory(7, 3, drain);
        let first = NodeMemory::default().succeeding([other.clone(), memory(2, 5, None)]);
        assert_eq!(first, memory(7, 5, drain));
        assert_eq!(memory(1, 1, drain).succeeding([memory(3, 3, None)]), memory(3, 3, None));
        assert_eq!(memory(8, 1, drain).succeeding([other]), memory(8, 3, drain));
    }

    #[test]
    fn node_memory_round_trips_with_golden_bytes() {
        let memory = NodeMemory {
            incarnation: Incarnation::new(7),
            seen: [(DcId::new(2), Incarnation::new(4))].into(),
            revoked: Revoked::default(),
            drain: None,
        };
        let bytes = memory.to_bytes();
        assert_eq!(hex::encode(&bytes), "534c4e010000000701000200000004");
        assert_eq!(NodeMemory::from_bytes(&bytes), Ok(memory.clone()));
        assert!(NodeMemory::from_bytes(&bytes[..9]).is_err());

        let mut revoking = memory.clone();
        let of = |subject, epoch| {
            let epoch = RevocationEpoch::new(epoch);
            Revocation::of(FileId::from_bytes([subject; 16]), TenantId::new(9), epoch)
        };
        revoking.revoked.take(of(0, 5));
        revoking.revoked.take(of(7, 6));
        let bytes = revoking.to_bytes();
        let tenant = "0000000000000009";
        let (all, one) = ("00".repeat(16), "07".repeat(16));
        let expected = format!(
            "534c4e0200000007010002000000040002{tenant}{all}0000000000000005{tenant}{one}0000000000000006"
        );
        assert_eq!(hex::encode(&bytes), expected);
        assert_eq!(NodeMemory::from_bytes(&bytes), Ok(revoking));
        assert!(NodeMemory::from_bytes(&bytes[..bytes.len() - 1]).is_err());
        // Nothing that is not there counts, nor what another covers: there is one way to write it.
        let none = [&bytes[..15], &[0, 0]].concat();
        assert!(NodeMemory::from_bytes(&none).is_err());
        let drain = Drain { phase: Phase::Sessions, target: DcId::new(2), evacuate: true };
        let draining = NodeMemory { drain: Some(drain), ..memory };
        let bytes = draining.to_bytes();
        assert_eq!(hex::encode(&bytes), "534c4e0300000007010002000000040000020000000000010002");
        assert_eq!(NodeMemory::from_bytes(&bytes), Ok(draining));
        for (at, byte) in [(15, 1), (17, 0), (17, 4), (21, 1), (24, 0xFF)] {
            let mut bad = bytes.clone();
            bad[at] = byte;
            if at == 24 {
                bad[25] = byte;
            }
            assert!(NodeMemory::from_bytes(&bad).is_err(), "{byte} at {at}");
        }
    }
}
