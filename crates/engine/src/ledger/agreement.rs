//! Whether what the holders say covers the file and agrees: what stands between spans and a root.
//!
//! Overlapping spans of two holders are nested, because both are nodes of one tree. Equal places are compared
//! directly; otherwise the holder of the larger span is asked for its value at the smaller place (WANT_SPANS).

use super::Ledger;
use crate::geometry::Geometry;
use crate::hash::{ChainingValue, Root};
use crate::ids::DcId;
use crate::rules::Rule;
use crate::span::{Place, Span};
use crate::span_tree::SpanTree;

/// How many comparisons may be under way for one file.
const MAX_WANTED: usize = 64;

/// What follows from the spans in a ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Chunks are missing.
    Open,
    /// Two holders have different bytes here.
    Disagree(Place),
    /// These values are needed to go on: from whom, and where.
    Compare(Vec<(DcId, Place)>),
    /// These pages are needed to go on ([`Ledger::recalled`]).
    Unpage(Vec<u64>),
    /// One chunk, of this value: only its bytes give the root.
    OneChunk(ChainingValue),
    /// Everything is there and agrees.
    Whole(Root),
}

/// What comparing some of the overlaps gave.
enum Comparison {
    Agree,
    Disagree(Place),
    Want(Vec<(DcId, Place)>),
}

impl Ledger {
    /// What follows from the spans. Remembers what it compared, so that asking again costs little.
    pub fn verdict(&mut self) -> Verdict {
        let Some(file) = self.file() else { return Verdict::Open };
        if file.chunks() > 0 && !self.union.is_whole() {
            return Verdict::Open;
        }
        let unpage: Vec<u64> = self.recalled().take(MAX_WANTED).collect();
        if !unpage.is_empty() {
            return Verdict::Unpage(unpage);
        }
        if self.overlaps && self.rules.holds(Rule::OverlapsAgree) {
            match self.compare(None) {
                Comparison::Agree => {}
                Comparison::Disagree(place) => return Verdict::Disagree(place),
                Comparison::Want(wanted) => {
                    // Answers to what is no longer wanted are of no use, and make room.
                    self.wanted = wanted.iter().copied().collect();
                    return Verdict::Compare(wanted);
                }
            }
        }
        if file.chunks() == 1 {
            return match self.union.iter().next() {
                Some(span) => Verdict::OneChunk(span.value),
                None => Verdict::Open,
            };
        }
        match self.union.root() {
            Some(root) => Verdict::Whole(root),
            None => Verdict::Open,
        }
    }

    /// Whether the overlaps of one whole segment agree; pairs that need values count as not.
    pub(super) fn segment_agrees(&mut self, place: Place) -> bool {
        !self.overlaps || matches!(self.compare(Some(place)), Comparison::Agree)
    }

    /// Compares every overlap (of one place, or of the file) that was not compared before.
    fn compare(&mut self, only: Option<Place>) -> Comparison {
        let holders: Vec<DcId> =
            self.holders.keys().filter(|dc| !self.absent.contains(dc)).copied().collect();
        let mut wanted = Vec::new();
        for (i, &a) in holders.iter().enumerate() {
            for &b in &holders[i + 1..] {
                let (Some(left), Some(right)) = (self.holders.get(&a), self.holders.get(&b)) else {
                    continue;
                };
                let spans: Vec<Span> = match only {
                    Some(place) => left.tree.overlapping(place),
                    None => left.tree.iter().collect(),
                };
                let mut agreed = self.agreed.remove(&(a, b)).unwrap_or_default();
                let file = left.tree.file();
                let mut disagree = None;
                'pair: for x in spans {
                    for y in right.tree.overlapping(x.place) {
                        let fine = if x.place.contains(y.place) { y } else { x };
                        if agreed.covers(fine.place.range(file)) {
                            continue;
                        }
                        let values = (
                            self.value_at(a, &left.tree, fine.place, file),
                            self.value_at(b, &right.tree, fine.place, file),
                        );
                        match values {
                            (Some(p), Some(q)) if p == q => agreed.insert(fine.place.range(file)),
                            (Some(_), Some(_)) => {
                                disagree = Some(fine.place);
                                break 'pair;
                            }
                            (None, _) => wanted.push((a, fine.place)),
                            (_, None) => wanted.push((b, fine.place)),
                        }
                        if wanted.len() >= MAX_WANTED {
                            break 'pair;
                        }
                    }
                }
                self.agreed.insert((a, b), agreed);
                if let Some(place) = disagree {
                    return Comparison::Disagree(place);
                }
            }
        }
        if only.is_none() {
            // What was compared is in `agreed`; its values are no longer needed.
            self.forget_details(&wanted);
        }
        if wanted.is_empty() { Comparison::Agree } else { Comparison::Want(wanted) }
    }

    /// Forgets the finer values that no pending comparison needs.
    fn forget_details(&mut self, wanted: &[(DcId, Place)]) {
        if wanted.is_empty() {
            self.wanted.clear();
            self.details.clear();
        }
        let near =
            |place: &Place| wanted.iter().any(|(_, want)| want.contains(*place) || place.contains(*want));
        self.details.retain(|(_, place), _| near(place));
    }

    /// The value of a holder's own node: kept as such, stated in detail, or merged from details.
    fn value_at(&self, holder: DcId, tree: &SpanTree, place: Place, file: Geometry) -> Option<ChainingValue> {
        if let Some(value) = tree.value(place) {
            return Some(value);
        }
        if let Some(value) = self.details.get(&(holder, place)) {
            return Some(*value);
        }
        let (left, right) = place.children(file)?;
        let left = self.details.get(&(holder, left))?;
        Some(ChainingValue::merge(left, self.details.get(&(holder, right))?))
    }
}
