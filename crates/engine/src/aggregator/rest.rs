//! Files at rest: those of which nothing is left to be done, as briefs instead of ledgers.
//!
//! A file goes to rest when [`advance`](Aggregator::handle) finds it dropped, or small, assembled at its home and told
//! to every peer that can be reached. What is kept of it takes part in comparisons: for each slot and home there is a sum of
//! what its files would contribute, so that comparing costs the same however many there are. When somebody asks for
//! one or says something of it, it is [woken](Effect::Wake): the store is read, and what was asked or said waits until
//! then. So do files that nobody has loaded yet after a start.

use std::collections::{BTreeMap, BTreeSet};

use super::{Aggregator, Brief, Effect, Event, File, NodeEvent};
use crate::command::Verified;
use crate::hash::Root;
use crate::ids::{DcId, FileId, Timestamp};
use crate::ledger::{Claim, FileState, Fingerprint};

/// The most files that are being woken at once for what peers say; what they say of others is not heard, and is said
/// again or found by the next comparison.
const MAX_WAKING: usize = 4096;

/// The most that waits for one file.
const MAX_PARKED: usize = 16;

/// Bits of a file's id that make its slot.
const SLOT_BITS: u8 = 12;

/// Sums of what files contribute to a comparison: it does not matter in what order they are added, and what was added
/// can be taken away again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sum([u64; 4]);

impl Sum {
    /// What a file contributes.
    pub(super) fn of(id: FileId, digest: &[u8; 32]) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(id.as_bytes()).update(digest);
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(hash.finalize().as_bytes().as_chunks::<8>().0) {
            *word = u64::from_be_bytes(*bytes);
        }
        Self(words)
    }

    pub(super) fn add(&mut self, other: Self) {
        for (word, other) in self.0.iter_mut().zip(other.0) {
            *word = word.wrapping_add(other);
        }
    }

    fn take(&mut self, other: Self) {
        for (word, other) in self.0.iter_mut().zip(other.0) {
            *word = word.wrapping_sub(other);
        }
    }

    /// The digest of a set of files.
    pub(super) fn digest(self) -> [u8; 32] {
        let mut out = [0; 32];
        for (bytes, word) in out.as_chunks_mut::<8>().0.iter_mut().zip(self.0) {
            *bytes = word.to_be_bytes();
        }
        out
    }
}

/// What is kept of a file: with its id, 40 bytes.
#[derive(Clone, Copy, Debug)]
struct Resting {
    fingerprint: Fingerprint,
    /// The claim under which its home assembled it; `None` if it was dropped.
    claim: Option<Claim>,
}

impl Resting {
    /// What it contributes to a comparison in which its home takes part, or does not.
    fn sum(&self, id: FileId, with_home: bool) -> Sum {
        Sum::of(id, &self.fingerprint.digest(self.claim.filter(|_| with_home)))
    }
}

/// The files of one slot and home.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: usize,
    with_home: Sum,
    without: Sum,
}

/// What waits for a file that is being woken.
#[derive(Clone, Debug)]
struct Waking {
    since: Timestamp,
    parked: Vec<Parked>,
    /// Peers that know something else of it, and are told what is known here.
    tell: BTreeSet<DcId>,
}

#[derive(Clone, Debug)]
enum Parked {
    Heard(Box<Verified>),
    Event(Box<Event>),
}

/// All files at rest.
#[derive(Clone, Debug)]
pub(super) struct Rest {
    files: BTreeMap<FileId, Resting>,
    /// Those of them that were dropped; the others are assembled.
    dropped: u64,
    sums: BTreeMap<(u16, Option<DcId>), Sums>,
    expiring: BTreeMap<FileId, Timestamp>,
    waking: BTreeMap<FileId, Waking>,
    /// While not all files of the store are known: those that were looked for and are not there.
    looked_for: Option<BTreeSet<FileId>>,
    /// Peers whose comparison left something out because too much was being woken.
    unfinished: BTreeSet<DcId>,
}

impl Default for Rest {
    fn default() -> Self {
        Self {
            files: BTreeMap::new(),
            dropped: 0,
            sums: BTreeMap::new(),
            expiring: BTreeMap::new(),
            waking: BTreeMap::new(),
            looked_for: Some(BTreeSet::new()),
            unfinished: BTreeSet::new(),
        }
    }
}

impl Rest {
    fn insert(&mut self, id: FileId, brief: &Brief) {
        // What is known of it now takes the place of what was, in the sums too.
        self.remove(id);
        let claim = brief.assembled.map(|(claim, _)| claim);
        let resting = Resting { fingerprint: brief.fingerprint, claim };
        let sums = self.sums.entry((id.slot().number(), claim.map(|claim| claim.home))).or_default();
        sums.count += 1;
        sums.with_home.add(resting.sum(id, true));
        sums.without.add(resting.sum(id, false));
        self.dropped += u64::from(claim.is_none());
        self.files.insert(id, resting);
        if let Some(at) = brief.expires {
            self.expiring.insert(id, at);
        }
    }

    fn remove(&mut self, id: FileId) -> Option<Timestamp> {
        let resting = self.files.remove(&id)?;
        self.dropped -= u64::from(resting.claim.is_none());
        let key = (id.slot().number(), resting.claim.map(|claim| claim.home));
        if let Some(sums) = self.sums.get_mut(&key) {
            sums.count -= 1;
            sums.with_home.take(resting.sum(id, true));
            sums.without.take(resting.sum(id, false));
            if sums.count == 0 {
                self.sums.remove(&key);
            }
        }
        self.expiring.remove(&id)
    }

    /// How many were dropped, and how many are assembled.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.dropped, self.files.len() as u64 - self.dropped)
    }

    /// What the files of a range contribute to a comparison between two datacenters, and how many they are.
    pub(super) fn sum(&self, pair: [DcId; 2], prefix: FileId, bits: u8) -> (Sum, usize) {
        let mut sum = Sum::default();
        let mut count = 0;
        let takes_part = |home: Option<DcId>| home.is_some_and(|home| pair.contains(&home));
        if bits <= SLOT_BITS {
            let first = prefix.slot().number();
            let last = first | (0xFFF >> bits);
            for (&(_, home), sums) in self.sums.range((first, None)..=(last, Some(DcId::EVERY))) {
                sum.add(if takes_part(home) { sums.with_home } else { sums.without });
                count += sums.count;
            }
            return (sum, count);
        }
        for (id, resting) in self.within(prefix, bits) {
            sum.add(resting.sum(id, takes_part(resting.claim.map(|claim| claim.home))));
            count += 1;
        }
        (sum, count)
    }

    fn within(&self, prefix: FileId, bits: u8) -> impl Iterator<Item = (FileId, &Resting)> {
        let below = move |id: &FileId| is_below(*id, prefix, bits);
        self.files.range(prefix..).map(|(id, resting)| (*id, resting)).take_while(move |(id, _)| below(id))
    }

    /// The files of a range.
    pub(super) fn ids(&self, prefix: FileId, bits: u8) -> Vec<FileId> {
        self.within(prefix, bits).map(|(id, _)| id).collect()
    }

    /// Some that have this home and are not being woken, at most so many together with those that are. One that the store
    /// was asked for `again_ms` ago or earlier is not: it could not be read, and is asked for again.
    pub(super) fn some_homed_at(
        &self,
        home: DcId,
        limit: usize,
        now: Timestamp,
        again_ms: u64,
    ) -> Vec<FileId> {
        let is_asked = |waking: &Waking| now.since(waking.since) < again_ms;
        let asked = self.waking.values().filter(|waking| is_asked(waking)).count();
        let slots = self.sums.keys().filter(|(_, of)| *of == Some(home)).map(|(slot, _)| *slot);
        let ids = slots.flat_map(move |slot| {
            let prefix =
                FileId::from_bytes((u128::from(slot) << (u128::BITS - u32::from(SLOT_BITS))).to_be_bytes());
            let here = move |resting: &Resting| resting.claim.is_some_and(|claim| claim.home == home);
            self.within(prefix, SLOT_BITS).filter(move |(_, resting)| here(resting)).map(|(id, _)| id)
        });
        ids.filter(|id| !self.waking.get(id).is_some_and(is_asked))
            .take(limit.saturating_sub(asked))
            .collect()
    }

    /// How many have this home.
    pub(super) fn homed_at(&self, home: DcId) -> u64 {
        self.sums.iter().filter(|((_, of), _)| *of == Some(home)).map(|(_, sums)| sums.count as u64).sum()
    }

    /// Whether not all files of the store are known yet.
    pub(super) fn is_loading(&self) -> bool {
        self.looked_for.is_some()
    }
}

/// Whether a file is in the range of a prefix.
pub(super) fn is_below(id: FileId, prefix: FileId, bits: u8) -> bool {
    bits == 0 || (id.as_u128() ^ prefix.as_u128()) >> (u128::BITS - u32::from(bits)) == 0
}

impl File {
    /// The file's brief, if nothing is left to be done.
    fn brief(&mut self, me: DcId, is_told: impl Fn(DcId, &super::tell::Tell) -> bool) -> Option<Brief> {
        let is_idle = self.orphan.is_none()
            && self.unsaid.is_none()
            && self.fetch.is_none()
            && self.release.is_none()
            && self.rechecks.is_empty()
            && self.recount_at.is_none()
            && self.assembly.is_idle();
        if !is_idle || !self.tell.iter().all(|(peer, tell)| is_told(*peer, tell)) {
            return None;
        }
        match self.ledger.state() {
            FileState::Dropped => {}
            FileState::Assembled => {
                let chunks = self.ledger.file()?.chunks();
                let is_home = self.ledger.claim()?.home == me;
                let others = self.ledger.holders().filter(|(dc, ..)| *dc != me);
                let clean = others.into_iter().all(|(dc, ..)| self.ledger.chunks_held_by(dc) == 0);
                let here = self.ledger.chunks_held_by(me) > 0;
                // An empty file can be taken over by anyone, so others than its home keep an eye on it.
                let settled = if is_home { self.published } else { !self.published && !here && chunks == 1 };
                if chunks > 1 || !clean || !settled {
                    return None;
                }
            }
            FileState::Unheard | FileState::Receiving | FileState::Complete | FileState::Conflict => {
                return None;
            }
        }
        Brief::of(self.record.as_ref(), &self.memory())
    }
}

impl Aggregator {
    /// Where a file stands, also if it is at rest. Of a file that is not loaded yet nothing is known.
    pub fn state(&self, id: FileId) -> FileState {
        match (self.files.get(&id), self.rest.files.get(&id)) {
            (Some(file), _) => file.state(),
            (None, Some(resting)) if resting.claim.is_some() => FileState::Assembled,
            (None, Some(_)) => FileState::Dropped,
            (None, None) => FileState::Unheard,
        }
    }

    /// What lists tell of a file: where it stands, its home, and its root if that is in memory.
    pub fn standing(&self, id: FileId) -> (FileState, Option<DcId>, Option<Root>) {
        match self.files.get(&id) {
            Some(file) => {
                let home = file.ledger.claim().map(|claim| claim.home);
                (file.standing(self.config.me), home, file.ledger.root())
            }
            None => {
                let claim = self.rest.files.get(&id).and_then(|resting| resting.claim);
                (self.state(id), claim.map(|claim| claim.home), None)
            }
        }
    }

    /// Digest of what this datacenter and a peer should both know of a file, as they compare it.
    pub fn digest_with(&self, id: FileId, peer: DcId) -> Option<[u8; 32]> {
        let pair = [self.me(), peer];
        let resting = self.rest.files.get(&id);
        match self.files.get(&id) {
            Some(file) => file.ledger.digest_between(self.me(), peer),
            None => resting
                .map(|file| file.fingerprint.digest(file.claim.filter(|claim| pair.contains(&claim.home)))),
        }
    }

    /// Whether the store must be read before anything can be said of a file.
    pub fn is_asleep(&self, id: FileId) -> bool {
        let is_sought = || self.rest.looked_for.as_ref().is_some_and(|looked_for| !looked_for.contains(&id));
        !self.files.contains_key(&id) && (self.rest.files.contains_key(&id) || is_sought())
    }

    /// Whether not all files of the store are known yet.
    pub fn is_loading(&self) -> bool {
        self.rest.is_loading()
    }

    /// Number of files at rest.
    pub fn resting(&self) -> usize {
        self.rest.files.len()
    }

    /// Files of the store that are at rest.
    pub(super) fn at_rest(&mut self, briefs: &[(FileId, Brief)]) {
        for (id, brief) in briefs {
            if !self.files.contains_key(id) && !self.rest.files.contains_key(id) {
                self.lay_down(*id, brief);
            }
        }
    }

    /// Every file of the store is known.
    pub(super) fn all_loaded(&mut self, now: Timestamp) {
        self.rest.looked_for = None;
        let sought: Vec<FileId> =
            self.rest.waking.keys().filter(|id| !self.is_asleep(**id)).copied().collect();
        for id in sought {
            self.woken(id, now);
        }
        for peer in self.peers.values_mut() {
            peer.next_compare = now;
        }
    }

    fn lay_down(&mut self, id: FileId, brief: &Brief) {
        self.rest.insert(id, brief);
        if let Some(at) = brief.expires {
            self.due.insert((at, id));
        }
    }

    /// A file is loaded, or is not there: it is no longer at rest.
    pub(super) fn rises(&mut self, id: FileId) {
        if let Some(looked_for) = &mut self.rest.looked_for {
            looked_for.insert(id);
        }
        if let Some(at) = self.rest.remove(id) {
            self.due.remove(&(at, id));
        }
    }

    /// The store knows nothing of a file.
    pub(super) fn absent(&mut self, id: FileId, now: Timestamp) {
        self.rises(id);
        self.woken(id, now);
    }

    /// What waited for a file happens now.
    pub(super) fn woken(&mut self, id: FileId, now: Timestamp) {
        let Some(waking) = self.rest.waking.remove(&id) else { return };
        let floor = self.generation_floor;
        for peer in waking.tell {
            let seen = self.peers.get(&peer).map(super::peer::Peer::seen).unwrap_or_default();
            if let Some(file) = self.files.get_mut(&id) {
                file.restate_if_settled(&self.config, floor, peer, seen, now);
            }
        }
        // All of it came before now: a root is not said of the first half of what contradicts the other.
        self.held_back = Some(id);
        for parked in waking.parked {
            if self.is_asleep(id) {
                // What came before it was all there was to do, and the file is at rest again.
                self.park(id, parked, now);
                continue;
            }
            match parked {
                Parked::Heard(verified) => self.received(&verified, now),
                Parked::Event(event) => self.file_event(id, *event, now),
            }
        }
        self.held_back = None;
        if !self.is_asleep(id) {
            self.advance(id, now);
        }
        if self.rest.waking.is_empty() {
            for peer in std::mem::take(&mut self.rest.unfinished) {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.next_compare = now;
                }
            }
        }
    }

    /// Takes a file that is asleep out of the way of an event; whether the event has to wait.
    pub(super) fn parks(&mut self, event: &NodeEvent, now: Timestamp) -> bool {
        let (id, parked) = match event {
            NodeEvent::File(id, event) => match event {
                // What the store says, and what it took.
                Event::Loaded(_) | Event::Whole(_) | Event::Absent => return false,
                _ => (*id, Parked::Event(Box::new(event.clone()))),
            },
            NodeEvent::Received(verified) if verified.command().statement.is_about_a_file() => {
                (verified.command().file, Parked::Heard(Box::new(*verified)))
            }
            NodeEvent::Received(_)
            | NodeEvent::Dial { .. }
            | NodeEvent::Hello { .. }
            | NodeEvent::LinkUp { .. }
            | NodeEvent::LinkDown { .. }
            | NodeEvent::AtRest(_)
            | NodeEvent::AllLoaded
            | NodeEvent::Revoke(_)
            | NodeEvent::Load(_)
            | NodeEvent::Drain(_)
            | NodeEvent::Tick => return false,
        };
        if !self.is_asleep(id) {
            return false;
        }
        self.park(id, parked, now);
        true
    }

    /// Has a file woken for what has to wait until then.
    fn park(&mut self, id: FileId, parked: Parked, now: Timestamp) {
        let is_local = matches!(parked, Parked::Event(_));
        if self.wake(id, is_local, now)
            && let Some(waking) = self.rest.waking.get_mut(&id)
            && waking.parked.len() < MAX_PARKED
        {
            waking.parked.push(parked);
        }
    }

    /// How long the store has for an answer before it is asked again.
    pub(super) fn wake_again_ms(&self) -> u64 {
        self.config.retry_ms.saturating_mul(10)
    }

    /// Asks the store for a file; whether that is under way now.
    pub(super) fn wake(&mut self, id: FileId, is_local: bool, now: Timestamp) -> bool {
        let again_ms = self.wake_again_ms();
        let is_full = self.rest.waking.len() >= MAX_WAKING;
        match self.rest.waking.get_mut(&id) {
            Some(waking) if now.since(waking.since) < again_ms => return true,
            Some(waking) => waking.since = now,
            None if is_full && !is_local => return false,
            None => {
                let waking = Waking { since: now, parked: Vec::new(), tell: BTreeSet::new() };
                self.rest.waking.insert(id, waking);
            }
        }
        self.effects.push(Effect::Wake(id));
        true
    }

    /// Wakes a file that is due: it expires.
    pub(super) fn wake_when_due(&mut self, id: FileId, now: Timestamp) {
        if self.rest.files.contains_key(&id) && !self.wake(id, true, now) {
            self.due.insert((now.plus(self.config.retry_ms), id));
        }
    }

    /// A peer knows something else of these files at rest: it is told what is known here.
    pub(super) fn tell_of_resting(&mut self, ids: Vec<FileId>, peer: DcId, now: Timestamp) {
        for id in ids {
            if self.wake(id, false, now) {
                if let Some(waking) = self.rest.waking.get_mut(&id) {
                    waking.tell.insert(peer);
                }
            } else {
                self.rest.unfinished.insert(peer);
            }
        }
    }

    /// Lays a file down if nothing is left to be done; whether it did.
    pub(super) fn lay_to_rest(&mut self, id: FileId, now: Timestamp) -> bool {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return false };
        if file.awake_until.is_some_and(|until| now < until) {
            if matches!(file.ledger.state(), FileState::Assembled | FileState::Dropped) {
                let until = file.awake_until.unwrap_or(now);
                file.wake_at(until);
            }
            return false;
        }
        let peers = &self.peers;
        // Who cannot be reached, or has too much to hear already, finds out by comparing.
        let brief = file.brief(me, |peer, tell| match peers.get(&peer) {
            Some(peer) => tell.is_done() || (tell.is_still() && (!peer.is_up() || peer.is_swamped(id))),
            None => true,
        });
        let Some(brief) = brief else { return false };
        if brief.assembled.is_some() {
            self.persist(id);
        }
        if let Some(file) = self.files.remove(&id) {
            self.overview.forget(id, &file);
            if let Some(at) = file.queued {
                self.due.remove(&(at, id));
            }
        }
        for peer in self.peers.values_mut() {
            peer.waiting.remove(&id);
        }
        self.lay_down(id, &brief);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::HomeEpoch;

    fn brief(n: u8, home: u16) -> Brief {
        let claim = Claim { epoch: HomeEpoch::new(0), home: DcId::new(home) };
        Brief {
            fingerprint: Fingerprint([n; 16]),
            assembled: (home > 0).then_some((claim, Root::empty())),
            expires: None,
        }
    }

    fn id(n: u32) -> FileId {
        FileId::from_bytes(*blake3::hash(&n.to_be_bytes()).as_bytes().first_chunk().unwrap())
    }

    #[test]
    fn sums_of_a_range_are_those_of_its_files() {
        let mut rest = Rest::default();
        for n in 0..3000 {
            rest.insert(id(n), &brief(n as u8, (n % 4) as u16));
        }
        for n in 0..1000 {
            rest.remove(id(3 * n));
        }
        assert_eq!(rest.files.len(), 2000);
        let pair = [DcId::new(1), DcId::new(3)];
        for bits in [0, 4, 8, 12, 16, 20] {
            let mut seen = 0;
            let mut prefixes: Vec<u128> = rest
                .files
                .keys()
                .map(|id| id.as_u128().checked_shr(128 - u32::from(bits)).unwrap_or(0))
                .collect();
            prefixes.dedup();
            for prefix in prefixes {
                let prefix = prefix.checked_shl(128 - u32::from(bits)).unwrap_or(0);
                let prefix = FileId::from_bytes(prefix.to_be_bytes());
                let (sum, count) = rest.sum(pair, prefix, bits);
                let mut expected = Sum::default();
                for (id, resting) in rest.files.iter().filter(|(id, _)| is_below(**id, prefix, bits)) {
                    let with_home = resting.claim.is_some_and(|claim| pair.contains(&claim.home));
                    expected.add(resting.sum(*id, with_home));
                }
                assert_eq!((sum, count), (expected, rest.ids(prefix, bits).len()), "{bits} bits");
                seen += count;
            }
            assert_eq!(seen, 2000, "{bits} bits");
        }
        for n in 0..3000 {
            rest.remove(id(n));
        }
        assert!(rest.sums.is_empty());
    }

    /// A home that begins again is told two things of one chunk while it reads what it has of the file.
    #[test]
    fn no_root_is_said_of_half_of_what_waited() {
        use crate::aggregator::{Config, FileMemory, NodeMemory, RecordSummary, StoredFile};
        use crate::command::{Command, Statement};
        use crate::geometry::Geometry;
        use crate::hash::{ChainingValue, RecordDigest};
        use crate::ids::{Generation, Incarnation, Sequence, TenantId};
        use crate::ledger::{Fact, Ledger};
        use crate::span::{Place, Span};

        let [me, b, c] = [1, 2, 3].map(DcId::new);
        let (now, file) = (Timestamp::new(1_000_000), id(7));
        let config = Config::new(me, [me, b, c]);
        let (tenant, size) = (TenantId::new(7), Geometry::new(2 << 20).unwrap());
        let (claim, digest) =
            (Claim { epoch: HomeEpoch::new(0), home: me }, RecordDigest::from_bytes([9; 32]));
        let mut ledger = Ledger::new(config.rules);
        ledger.take(Fact::Meta { claim, size: Some(size), tenant, digest }).unwrap();
        let memory = FileMemory::of(&ledger, Some(claim.epoch), None);
        let (mut home, _) = Aggregator::start(config, NodeMemory::default(), now);
        let span =
            |start, value| Span::new(Place::new(start, 0).unwrap(), ChainingValue::from_bytes([value; 32]));
        for (from, value) in [(b, 1), (c, 2)] {
            let generation = Generation::floor_of(Incarnation::new(1));
            let statement = Statement::Have { generation, span: span(1, value) };
            let sequence = Sequence::of(Incarnation::new(1), 1);
            let command =
                Command { from, to: me, sequence, slot: file.slot(), sent_at: now, file, statement };
            home.handle(NodeEvent::Received(command.trusted()), now);
        }
        let record = RecordSummary { digest, tenant, size: Some(size), expected_root: None, expiry_ms: None };
        let stored = StoredFile {
            tenant,
            record: Some(record),
            size: Some(size),
            memory,
            generation: Generation::new(1),
            spans: vec![span(0, 0)],
            chunks: 1,
            published: None,
        };
        home.handle(NodeEvent::File(file, Event::Loaded(stored)), now);
        assert_eq!((home.state(file), home.file(file).unwrap().ledger().root()), (FileState::Conflict, None));
    }

    #[test]
    fn a_file_at_rest_takes_few_bytes() {
        assert!(size_of::<FileId>() + size_of::<Resting>() <= 40, "{}", size_of::<Resting>());
    }
}
