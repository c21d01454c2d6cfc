//! Under which traces chunks came: so that what is done with them later, here and in other datacenters, follows from the
//! requests that brought them. Kept only of traces that are recorded, and only while somebody collects spans; bounded, and
//! forgotten at a restart. Nothing but traces depends on it.

use std::collections::VecDeque;
use std::num::NonZero;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use lru::LruCache;
use sluice_engine::command::{Command, Statement};
use sluice_engine::ids::FileId;
use sluice_engine::span::Place;
use sluice_node::telemetry;
use sluice_proto::trace::TraceContext;
use tracing::Span;

/// Files of which something is kept, and ranges of chunks of each.
const FILES: NonZero<usize> = NonZero::new(1024).expect("not zero");
const RANGES: usize = 64;

/// Other traces that one span is linked to.
const LINKS: usize = 8;

type Came = VecDeque<(Range<u64>, TraceContext)>;

/// Where chunks came from.
#[derive(Debug)]
pub(crate) struct Traces(Mutex<LruCache<FileId, Came>>);

impl Default for Traces {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(FILES)))
    }
}

/// The chunks of a place; past the end of its file there are none.
pub(crate) fn chunks_of(place: Place) -> Range<u64> {
    place.start()
        ..place.start().saturating_add(1u64.checked_shl(u32::from(place.level())).unwrap_or(u64::MAX))
}

impl Traces {
    /// Chunks come with the step at hand.
    pub(crate) fn note(&self, file: FileId, chunks: Range<u64>) {
        let Some(step) = telemetry::recorded() else { return };
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let came = files.get_or_insert_mut(file, Came::new);
        if came.len() == RANGES {
            came.pop_front();
        }
        came.push_back((chunks, step));
    }

    /// The newest step with which any of these chunks came.
    pub(crate) fn newest(&self, file: FileId, chunks: &Range<u64>) -> Option<TraceContext> {
        self.touching(file, chunks).into_iter().next()
    }

    /// Makes a span follow from the newest step with which any of these chunks came, and links it to those of other traces.
    pub(crate) fn follow(&self, span: &Span, file: FileId, chunks: &Range<u64>) {
        if telemetry::is_exporting() {
            let mut steps = self.touching(file, chunks).into_iter();
            if let Some(newest) = steps.next() {
                telemetry::follow(span, newest);
                telemetry::links(span, steps.filter(|step| step.id() != newest.id()).take(LINKS));
            }
        }
    }

    /// One step of each trace, the newest first.
    fn touching(&self, file: FileId, chunks: &Range<u64>) -> Vec<TraceContext> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut steps: Vec<TraceContext> = Vec::new();
        for (range, step) in files.get(&file).into_iter().flat_map(|came| came.iter().rev()) {
            let touches = range.start < chunks.end && chunks.start < range.end;
            if touches && !steps.iter().any(|other| other.id() == step.id()) {
                steps.push(*step);
            }
        }
        steps
    }
}

/// The chunks that a command says are held by whoever sends it.
pub(crate) fn chunks_told(command: &Command) -> Option<Range<u64>> {
    if let Statement::Have { span, .. } = &command.statement { Some(chunks_of(span.place)) } else { None }
}
