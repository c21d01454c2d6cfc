//! Pages of the ledger: finished segments leave memory, and come back when they are needed.
//!
//! The home hands a segment out once it is whole and agreed. It reads a page again when more is said of its segment,
//! when a holder in it does not count any more, and when it is the segment's turn to be pulled. One page of a file is
//! read at a time. A lost page costs asking everyone in it again, and the own store.

use std::collections::BTreeSet;

use super::{Aggregator, Effect, File};
use crate::command::Statement;
use crate::ids::{DcId, FileId, Timestamp};
use crate::ledger::{FileState, Page};
use crate::span::Place;

/// After how many retry intervals a page that was not answered for is asked for again.
const PATIENCE: u64 = 32;

/// What is under way with the pages of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages {
    /// Segments of which something was said since they were last looked at.
    touched: BTreeSet<u64>,
    /// The page that is being read, and since when.
    loading: Option<(u64, Timestamp)>,
    /// The page that was read last.
    last: Option<u64>,
    /// The page that the assembly waits for.
    needed: Option<u64>,
}

impl File {
    /// Something was said of a place: its segment may be finished.
    pub(super) fn touch(&mut self, place: Place) {
        if let Some(shape) = self.ledger.file() {
            let range = place.range(shape);
            let len = self.ledger.segment_chunks();
            if shape.chunks() > len && !range.is_empty() {
                self.pages.touched.extend([range.start / len, (range.end - 1) / len]);
            }
        }
    }

    /// Every segment may be finished.
    pub(super) fn touch_all(&mut self) {
        let len = self.ledger.segment_chunks();
        if let Some(shape) = self.ledger.file().filter(|shape| shape.chunks() > len) {
            self.pages.touched.extend(0..shape.chunks().div_ceil(len));
        }
    }

    /// The assembly cannot go on without this page.
    pub(super) fn need_page(&mut self, segment: u64) {
        self.pages.needed = Some(segment);
    }
}

impl Aggregator {
    /// Hands finished segments out, and reads those that are needed.
    pub(super) fn advance_pages(&mut self, id: FileId, now: Timestamp) {
        let me = self.me();
        let wait_ms = self.config.retry_ms.saturating_mul(PATIENCE);
        let Some(file) = self.files.get_mut(&id) else { return };
        let touched = std::mem::take(&mut file.pages.touched);
        let needed = file.pages.needed.take();
        let is_home = file.ledger.claim().is_some_and(|claim| claim.home == me);
        let state = file.ledger.state();
        let judging = file.assembly.is_refused();
        if is_home && file.record.is_some() && !file.published && !judging {
            for segment in touched {
                let page = match state {
                    FileState::Receiving => file.ledger.page_out(segment),
                    FileState::Complete | FileState::Assembled => file.ledger.page_out_others(segment, me),
                    FileState::Unheard | FileState::Conflict | FileState::Dropped => None,
                };
                self.effects.extend(page.map(|page| Effect::StorePage(id, page)));
            }
        }
        if (!is_home || judging) && file.ledger.paged().next().is_some() {
            // Another home must be told what is here, and that is told from memory. Whoever contradicts the root is
            // found in memory as well.
            file.ledger.recall_all();
        }
        let next = needed.filter(|segment| file.ledger.is_paged(*segment));
        let Some(segment) =
            next.or_else(|| file.ledger.recalled_after(file.pages.last)).filter(|_| !file.published)
        else {
            return;
        };
        if let Some((_, since)) = file.pages.loading {
            let again = since.plus(wait_ms);
            if now < again {
                file.wake_at(again);
                return;
            }
        }
        file.pages.loading = Some((segment, now));
        file.pages.last = Some(segment);
        file.wake_at(now.plus(wait_ms));
        self.effects.push(Effect::LoadPage(id, segment));
    }

    /// A page was read.
    pub(super) fn page_loaded(&mut self, id: FileId, page: Option<&Page>, now: Timestamp) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let asked = file.pages.loading.take().map(|(segment, _)| segment);
        let Some(page) = page else {
            if let Some(segment) = asked {
                self.page_lost(id, segment, now);
            }
            return;
        };
        file.ledger.page_in(page);
        file.pages.touched.insert(page.segment);
        if let Some(claim) = file.ledger.claim().filter(|claim| claim.home != me) {
            file.owe_all(me, claim.home, now);
        }
    }

    /// A page was lost: whoever is in it says it again.
    fn page_lost(&mut self, id: FileId, segment: u64, now: Timestamp) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        let holders: Vec<DcId> = file.ledger.lose_page(segment);
        let Some(place) = file.ledger.place_of_segment(segment) else { return };
        for holder in holders {
            if holder == me {
                self.effects.push(Effect::Restate { file: id, to: me, place });
            } else {
                self.say(holder, id, Statement::WantSpans { place }, now);
            }
        }
    }
}
