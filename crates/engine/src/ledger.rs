//! The ledger: what a datacenter's aggregator knows of one file.
//!
//! A ledger is a set of facts in normal form. Taking a fact is a join: it commutes with every other and doing it
//! twice is doing it once, so equal sets of facts give equal ledgers whatever the order (G3). What is *derived* from
//! the facts (state, coverage, agreement) is a pure function of them; what is *cached* to derive it (values of finer
//! spans, which overlaps were compared) can be dropped and asked for again.
//!
//! | fact | join |
//! | --- | --- |
//! | metadata, sizes, roots | the two smallest different ones: one is the value, two are a conflict |
//! | home claims | the highest (epoch, datacenter) |
//! | spans by holder | the newest generation, and in it the union |
//! | assembled | per datacenter, the highest claim it was said under |
//! | conflict, drop | the smallest |

mod agreement;
mod compared;
mod fact;
mod page;
mod summaries;

pub use agreement::Verdict;
pub(crate) use compared::Fingerprint;
pub use fact::{Claim, Disagreement, Fact, FactError, Taken};
pub use page::{Page, PageError};

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use self::summaries::Summaries;
use crate::command::DropReason;
use crate::geometry::Geometry;
use crate::hash::{ChainingValue, RecordDigest, Root};
use crate::ids::{DcId, Generation, TenantId};
use crate::ranges::Ranges;
use crate::rules::Rules;
use crate::span::{Place, Span};
use crate::span_tree::{Insertion, SpanTree};

/// Where a file stands, as far as this ledger knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileState {
    /// No metadata is known.
    Unheard,
    /// Chunks are missing, or not compared yet.
    Receiving,
    /// Every chunk is somewhere, and they merge to one root.
    Complete,
    /// The home has the whole file.
    Assembled,
    /// Contradicting facts exist.
    Conflict,
    /// Gone.
    Dropped,
}

/// The two smallest different values of what should be one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sole<T>(Vec<T>);

impl<T: Ord + Copy> Sole<T> {
    const fn new() -> Self {
        Self(Vec::new())
    }

    fn join(&mut self, value: T) -> bool {
        match self.0.binary_search(&value) {
            Ok(_) => false,
            Err(2..) => false,
            Err(at) => {
                self.0.insert(at, value);
                self.0.truncate(2);
                true
            }
        }
    }

    /// The smallest.
    fn first(&self) -> Option<T> {
        self.0.first().copied()
    }

    /// Both of two that contradict.
    fn both(&self) -> Option<[T; 2]> {
        self.0.first_chunk().copied()
    }

    fn is_contradicted(&self) -> bool {
        self.0.len() > 1
    }
}

/// What one datacenter says it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holding {
    generation: Generation,
    /// Since which generation what is in pages counts.
    since: Generation,
    tree: SpanTree,
    /// Coverage fingerprint of what was moved to pages.
    paged_hash: u64,
    paged_chunks: u64,
}

impl Holding {
    fn new(generation: Generation, file: Geometry) -> Self {
        Self { generation, since: generation, tree: SpanTree::new(file), paged_hash: 0, paged_chunks: 0 }
    }
}

/// What is known of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    metas: Sole<(RecordDigest, TenantId)>,
    sizes: Sole<u64>,
    claim: Option<Claim>,
    roots: Sole<(Root, u64)>,
    assembled: BTreeMap<DcId, Claim>,
    conflict: Option<Disagreement>,
    drop: Option<(DropReason, TenantId)>,
    holders: BTreeMap<DcId, Holding>,
    /// Everything that any holder has, merged across holders. Its values mean something once overlaps agree.
    union: SpanTree,
    /// Whether two holders ever overlapped since the union was last rebuilt.
    overlaps: bool,
    /// Segments whose spans were moved to pages.
    paged: Summaries,
    /// Paged segments whose page must be read: more was said of them, or not all of it counts any more.
    recalled: BTreeSet<u64>,
    /// What was said of paged segments since, until their pages are read.
    late: page::Late,
    /// Holders that cannot be reached, and so long that what only they have counts as missing. Not a fact: a view.
    absent: BTreeSet<DcId>,
    agreed: BTreeMap<(DcId, DcId), Ranges>,
    /// Values that were missing when overlaps were last compared.
    wanted: BTreeSet<(DcId, Place)>,
    /// Values finer than the spans, of places that were wanted and no others.
    details: BTreeMap<(DcId, Place), ChainingValue>,
    rules: Rules,
}

impl Ledger {
    /// A ledger without facts.
    pub fn new(rules: Rules) -> Self {
        Self {
            metas: Sole::new(),
            sizes: Sole::new(),
            claim: None,
            roots: Sole::new(),
            assembled: BTreeMap::new(),
            conflict: None,
            drop: None,
            holders: BTreeMap::new(),
            union: SpanTree::new(Geometry::largest()),
            overlaps: false,
            paged: Summaries::default(),
            recalled: BTreeSet::new(),
            late: page::Late::default(),
            absent: BTreeSet::new(),
            agreed: BTreeMap::new(),
            wanted: BTreeSet::new(),
            details: BTreeMap::new(),
            rules,
        }
    }

    /// Takes a fact.
    pub fn take(&mut self, fact: Fact) -> Result<Taken, FactError> {
        let new = match fact {
            Fact::Meta { claim, size, tenant, digest } => {
                let known = self.metas.join((digest, tenant));
                let sized = size.is_some_and(|size| self.take_size(size));
                let claimed = Some(claim) > self.claim;
                if claimed {
                    self.claim = Some(claim);
                }
                known | sized | claimed
            }
            Fact::Have { holder, generation, span } => return self.take_have(holder, generation, span),
            Fact::HaveNothing { holder, generation } => {
                if self.file().is_none() {
                    return Ok(Taken::NotYet);
                }
                self.counts_spans() && self.raise(holder, generation)
            }
            Fact::Root { size, root } => self.take_size(size) | self.roots.join((root, size.size())),
            Fact::Assembled { claim, size, root } => {
                let said = self.assembled.get(&claim.home).copied();
                let raised = Some(claim) > said;
                if raised {
                    self.assembled.insert(claim.home, claim);
                }
                self.take_size(size) | self.roots.join((root, size.size())) | raised
            }
            Fact::Conflict(found) => {
                let lower = self.conflict.is_none_or(|known| found < known);
                if lower {
                    self.conflict = Some(found);
                }
                lower
            }
            Fact::Drop { reason, tenant } => {
                let lower = self.drop.is_none_or(|known| (reason, tenant) < known);
                if lower {
                    self.drop = Some((reason, tenant));
                    self.forget_spans();
                }
                lower
            }
        };
        Ok(if new { Taken::New } else { Taken::Known })
    }

    fn take_size(&mut self, size: Geometry) -> bool {
        let new = self.sizes.join(size.size());
        if new {
            self.forget_spans();
        }
        new
    }

    /// Whether spans mean anything: not once the file is dropped, nor while two sizes contradict, so that it does not
    /// matter which of these facts came first.
    fn counts_spans(&self) -> bool {
        self.drop.is_none() && !self.sizes.is_contradicted()
    }

    fn forget_spans(&mut self) {
        self.holders.clear();
        self.union = SpanTree::new(self.file().unwrap_or(Geometry::largest()));
        self.overlaps = false;
        self.paged = Summaries::default();
        self.recalled.clear();
        self.late = page::Late::default();
        self.agreed.clear();
        self.wanted.clear();
        self.details.clear();
    }

    fn take_have(&mut self, holder: DcId, generation: Generation, span: Span) -> Result<Taken, FactError> {
        let Some(file) = self.file() else { return Ok(Taken::NotYet) };
        span.place.check(file)?;
        if !self.counts_spans() {
            return Ok(Taken::Known);
        }
        let raised = self.raise(holder, generation);
        let Some(holding) = self.holders.get_mut(&holder) else { return Ok(Taken::Known) };
        if self.rules.generations() && generation < holding.generation {
            return Ok(Taken::Known);
        }
        let segment = span.place.start() >> self.rules.segment_level();
        let in_one = span.place.level() <= self.rules.segment_level();
        if in_one && self.paged.contains(segment) && holding.tree.covering(span.place).is_none() {
            // Whether it is new only the page can tell.
            return Ok(self.keep_for_page(segment, (holder, generation, span)));
        }
        let grown = match holding.tree.insert(span) {
            Ok(Insertion::Grown(_)) => {
                if !self.absent.contains(&holder) {
                    let covered = self.union.covered();
                    // What the union keeps where holders overlap does not matter: it is used once they agree.
                    let _ = self.union.insert(span);
                    self.overlaps |= self.union.covered() - covered < span.place.chunks(file);
                    if !in_one {
                        self.recall(span.place);
                    }
                }
                true
            }
            Ok(Insertion::Known) => false,
            Ok(Insertion::Covered(_)) => self.take_detail(holder, span),
            // A holder never says two things in one generation, unless it lies: the first stands, and whoever pulls
            // the bytes finds out.
            Err(_) => false,
        };
        Ok(if raised | grown { Taken::New } else { Taken::Known })
    }

    /// Keeps a finer value that a comparison waits for. Any other is not kept, so that nobody can fill the memory
    /// with them.
    fn take_detail(&mut self, holder: DcId, span: Span) -> bool {
        let file = self.union.file();
        let is_wanted = self.wanted.contains(&(holder, span.place))
            || span.place.family(file).is_some_and(|family| self.wanted.contains(&(holder, family.parent)));
        is_wanted && self.details.insert((holder, span.place), span.value) != Some(span.value)
    }

    /// Moves a holder to a newer generation, in which it holds nothing yet.
    fn raise(&mut self, holder: DcId, generation: Generation) -> bool {
        let Some(file) = self.file() else { return false };
        let Some(holding) = self.holders.get_mut(&holder) else {
            self.holders.insert(holder, Holding::new(generation, file));
            return true;
        };
        if generation <= holding.generation {
            return false;
        }
        if !self.rules.generations() {
            holding.generation = generation;
            return true;
        }
        *holding = Holding::new(generation, file);
        self.begin_again(holder);
        true
    }

    /// Nothing that a holder said counts any more; its holding is empty.
    fn begin_again(&mut self, holder: DcId) {
        self.agreed.retain(|(a, b), _| *a != holder && *b != holder);
        self.wanted.retain(|(dc, _)| *dc != holder);
        self.details.retain(|(dc, _), _| *dc != holder);
        self.void_pages_of(holder);
        self.rebuild_union();
    }

    /// Does not believe anything that a holder said until it says it again: what it says and what is known here do
    /// not become equal.
    pub fn doubt(&mut self, holder: DcId) {
        let Some(file) = self.file() else { return };
        let Some(holding) = self.holders.get_mut(&holder) else { return };
        *holding = Holding { generation: holding.generation, ..Holding::new(holding.since, file) };
        self.begin_again(holder);
    }

    /// Moves a holder to a newer generation in which it holds the same: for this datacenter's own spans, which it
    /// says again. Takes [`Fact::HaveNothing`] and every span again, in one.
    pub fn lift(&mut self, holder: DcId, generation: Generation) {
        if self.file().is_none() || !self.counts_spans() {
            return;
        }
        match self.holders.get_mut(&holder) {
            Some(holding) => holding.generation = holding.generation.max(generation),
            None => {
                self.raise(holder, generation);
            }
        }
    }

    fn rebuild_union(&mut self) {
        let Some(file) = self.file() else { return };
        let level = self.rules.segment_level();
        let mut union = SpanTree::new(file);
        self.overlaps = false;
        for (segment, value) in self.paged.valid() {
            if let Some(value) = value {
                // Never contradicts: the tree was empty there.
                let place = Place::clipped(segment << level, level, file);
                let _ = union.insert(Span::new(place, value));
            }
        }
        for holding in
            self.holders.iter().filter(|(dc, _)| !self.absent.contains(dc)).map(|(_, holding)| holding)
        {
            for span in holding.tree.iter() {
                let alone = union.overlapping(span.place).is_empty();
                let grown = matches!(union.insert(span), Ok(Insertion::Grown(_)));
                self.overlaps |= !(alone && grown);
            }
        }
        let uncovered =
            |segment: &u64| union.covering(Place::clipped(segment << level, level, file)).is_none();
        let open: Vec<u64> = self.paged.valid().map(|(segment, _)| segment).filter(uncovered).collect();
        for segment in open {
            // The larger span that had this segment is gone.
            self.paged.set_void(segment);
            self.recalled.insert(segment);
        }
        self.union = union;
    }

    /// Stops (or begins again) to count on a holder that cannot be reached. The pages in which it stands must be read
    /// again; whether anything changed.
    pub fn set_absent(&mut self, holder: DcId, is_absent: bool) -> bool {
        let changed = if is_absent { self.absent.insert(holder) } else { self.absent.remove(&holder) };
        if !changed {
            return false;
        }
        if is_absent {
            self.void_pages_of(holder);
        } else if let Some(holding) = self.holders.get(&holder) {
            // Nothing of it was compared with what is in pages.
            let places: Vec<Place> = holding.tree.iter().map(|span| span.place).collect();
            places.into_iter().for_each(|place| self.recall(place));
        }
        self.rebuild_union();
        true
    }

    /// Whether this holder is not counted on at present.
    pub fn is_absent(&self, holder: DcId) -> bool {
        self.absent.contains(&holder)
    }

    /// Removes what a holder says of a place, because its bytes turned out not to be what it says. It is believed
    /// again when it says so again.
    pub fn reject(&mut self, holder: DcId, place: Place) {
        if let Some(holding) = self.holders.get_mut(&holder) {
            if let Some(span) = holding.tree.covering(place) {
                holding.tree.cut(span.place);
            }
            holding.tree.cut(place);
            // What it says there next was compared with nobody yet.
            self.agreed.retain(|(a, b), _| *a != holder && *b != holder);
            self.details.retain(|(dc, _), _| *dc != holder);
            self.rebuild_union();
        }
    }

    /// The file's shape; `None` while no size is known.
    pub fn file(&self) -> Option<Geometry> {
        self.sizes.first().and_then(|size| Geometry::new(size).ok())
    }

    /// A larger size that was said too: the two contradict.
    pub fn other_size(&self) -> Option<Geometry> {
        self.sizes.0.get(1).and_then(|size| Geometry::new(*size).ok())
    }

    /// Two roots that contradict, with the sizes that were said with them.
    pub fn two_roots(&self) -> Option<[(Root, u64); 2]> {
        self.roots.both()
    }

    /// Two metadata records that contradict, and whose they were said to be.
    pub fn two_records(&self) -> Option<[(RecordDigest, TenantId); 2]> {
        self.metas.both()
    }

    /// Where the file stands.
    pub fn state(&self) -> FileState {
        let contradicted =
            self.metas.is_contradicted() || self.sizes.is_contradicted() || self.roots.is_contradicted();
        if self.drop.is_some() {
            FileState::Dropped
        } else if contradicted {
            FileState::Conflict
        } else if self.roots.first().is_some() {
            match self.claim {
                Some(claim) if self.is_assembled_at(claim.home) => FileState::Assembled,
                Some(_) | None => FileState::Complete,
            }
        } else if self.conflict.is_some() {
            FileState::Conflict
        } else if self.metas.first().is_some() {
            FileState::Receiving
        } else {
            FileState::Unheard
        }
    }

    /// What contradicts what, for a person; `None` unless the state is `conflict`.
    pub fn conflict_reason(&self) -> Option<String> {
        if self.state() != FileState::Conflict {
            return None;
        }
        Some(if self.metas.is_contradicted() {
            "two different metadata records were sent".into()
        } else if self.sizes.is_contradicted() {
            "two different sizes were sent".into()
        } else if self.roots.is_contradicted() {
            "two different roots were found".into()
        } else {
            match self.conflict {
                Some(Disagreement { found: Some(root), .. }) => {
                    format!("the bytes hash to {root}, which is not the expected root")
                }
                Some(Disagreement { place, .. }) => {
                    format!("different bytes were sent for chunks {place} in different datacenters")
                }
                None => "contradicting facts".into(),
            }
        })
    }

    /// The home, and the epoch of its claim.
    pub fn claim(&self) -> Option<Claim> {
        self.claim
    }

    /// Names the metadata record (the smaller, should two contradict).
    pub fn record_digest(&self) -> Option<RecordDigest> {
        self.metas.first().map(|(digest, _)| digest)
    }

    /// Who owns the file.
    pub fn tenant(&self) -> Option<TenantId> {
        self.metas.first().map(|(_, tenant)| tenant).or(self.drop.map(|(_, tenant)| tenant))
    }

    /// The root, if exactly one is known.
    pub fn root(&self) -> Option<Root> {
        if self.roots.is_contradicted() { None } else { self.roots.first().map(|(root, _)| root) }
    }

    /// Whether a datacenter is the home, and said that it assembled the file since it claimed it last. A home that lost
    /// its copy claims the file again, and what it said before counts no more.
    pub fn is_assembled_at(&self, dc: DcId) -> bool {
        let claim = self.claim.filter(|claim| claim.home == dc);
        claim.is_some_and(|claim| self.assembled_by(dc) >= Some(claim))
    }

    /// The highest claim under which a datacenter said that it assembled the file.
    pub fn assembled_by(&self, dc: DcId) -> Option<Claim> {
        self.assembled.get(&dc).copied()
    }

    /// Who assembled the file under the highest claim.
    pub fn best_copy(&self) -> Option<Claim> {
        self.assembled.values().max().copied()
    }

    /// Every claim under which a datacenter said that it assembled the file.
    pub fn copies(&self) -> impl Iterator<Item = Claim> + '_ {
        self.assembled.values().copied()
    }

    /// What a home found to contradict.
    pub fn disagreement(&self) -> Option<Disagreement> {
        self.conflict
    }

    /// Why the file was dropped.
    pub fn dropped(&self) -> Option<(DropReason, TenantId)> {
        self.drop
    }

    /// Who holds anything in memory, with its generation.
    pub fn holders(&self) -> impl Iterator<Item = (DcId, Generation, &SpanTree)> {
        self.holders.iter().map(|(dc, holding)| (*dc, holding.generation, &holding.tree))
    }

    /// What a datacenter says it holds, without what is in pages.
    pub fn held_by(&self, dc: DcId) -> Option<(Generation, &SpanTree)> {
        self.holders.get(&dc).map(|holding| (holding.generation, &holding.tree))
    }

    /// Since which generation what a holder says counts: what was read or stored under an older one may have gone.
    pub(crate) fn counts_since(&self, dc: DcId) -> Option<Generation> {
        self.holders.get(&dc).map(|holding| holding.since)
    }

    /// Number of chunks a datacenter says it holds, pages included.
    pub fn chunks_held_by(&self, dc: DcId) -> u64 {
        self.holders.get(&dc).map_or(0, |holding| holding.tree.covered() + holding.paged_chunks)
    }

    /// Whether a datacenter says that it holds every chunk. While pages must be read, what is in memory decides.
    pub fn holds_all(&self, dc: DcId) -> bool {
        let Some(holding) = self.holders.get(&dc) else {
            return self.file().is_some_and(|file| file.chunks() == 0);
        };
        let chunks = holding.tree.file().chunks();
        holding.tree.is_whole()
            || (self.recalled.is_empty() && holding.tree.covered() + holding.paged_chunks == chunks)
    }

    /// What any holder has, merged.
    pub fn union(&self) -> &SpanTree {
        &self.union
    }

    /// Segments whose spans are in pages.
    pub fn paged(&self) -> impl Iterator<Item = u64> + '_ {
        self.paged.segments()
    }

    /// Whether the spans of this segment are in a page.
    pub fn is_paged(&self, segment: u64) -> bool {
        self.paged.contains(segment)
    }

    /// Number of spans in memory: what the ledger's size is proportional to.
    pub fn spans(&self) -> usize {
        self.union.len() + self.holders.values().map(|holding| holding.tree.len()).sum::<usize>()
    }

    /// The chunks of `range` that nobody has, as at most `limit` ranges, pages included.
    pub fn missing(&self, range: Range<u64>, limit: usize) -> Vec<Range<u64>> {
        match self.file() {
            Some(_) => self.union.gaps(range, limit),
            None => Vec::new(),
        }
    }
}
