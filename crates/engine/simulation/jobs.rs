//! Effects that take a while: what stores and bulk transfers do.

use std::collections::BTreeMap;
use std::ops::Range;

use sluice_engine::aggregator::{Event, PullOutcome};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{DcId, FileId, Generation, Nonce};
use sluice_engine::resolve::resolve;
use sluice_engine::span::{Place, Span};

use super::check;
use super::disk::{chunk_span, root_of, tree_of, value_at};
use super::world::{Todo, World};

/// An effect that takes a while.
#[derive(Clone, Debug)]
pub enum Job {
    Wake { file: FileId },
    Fetch { file: FileId, from: DcId },
    Restate { file: FileId, to: DcId, place: Place },
    LoadPage { file: FileId, segment: u64 },
    Pull { file: FileId, from: DcId, place: Place, under: Span },
    ReadRoot { file: FileId },
    Publish { file: FileId, root: Root },
    Recheck { file: FileId, to: DcId, nonce: Nonce },
    Free { file: FileId },
    Resolve { file: FileId, root: Root, others: BTreeMap<DcId, Vec<Span>> },
}

impl World {
    pub fn known_shape(&self, id: DcId, file: FileId) -> Option<Geometry> {
        self.dcs[&id].agg.as_ref()?.file(file)?.ledger().file()
    }

    /// An effect that took a while ends.
    pub fn finish(&mut self, id: DcId, job: Job) {
        let shape_of = |world: &Self, file| world.known_shape(id, file);
        match job {
            Job::Wake { file } => {
                // Now and then a read fails, and is asked for again.
                if self.calm || !self.random.chance(5) {
                    let stored = self.dcs[&id].disk.stored(file, None);
                    self.report(id, file, vec![stored.map_or(Event::Absent, Event::Loaded)]);
                }
            }
            Job::Fetch { file, from } => {
                let record = self.dcs[&from].disk.files.get(&file).and_then(|file| file.record);
                let event = match record.filter(|_| self.reaches(id, from)) {
                    Some(record) => {
                        let stored = self.dcs.get_mut(&id).expect("alive").disk.file(file);
                        if !stored.dropped {
                            stored.tenant = Some(record.tenant);
                            stored.record.get_or_insert(record);
                            if let Some(shape) = record.size {
                                stored.chunks.retain(|index, _| *index < shape.chunks());
                            }
                        }
                        self.dcs[&id].disk.stored(file, None).map_or(Event::FetchFailed, Event::Loaded)
                    }
                    None => Event::FetchFailed,
                };
                self.report(id, file, vec![event]);
            }
            Job::Restate { file, to, place } => {
                let Some(shape) = shape_of(self, file) else { return };
                let Some(stored) = self.dcs[&id].disk.files.get(&file) else { return };
                let generation = stored.generation.max(self.dcs[&id].disk.floor);
                let spans = finer(file, shape, place, &stored.chunks);
                self.report(id, file, vec![Event::Restated { to, generation, spans }]);
            }
            Job::LoadPage { file, segment } => {
                self.figures.pages_in += 1;
                let lost = !self.calm && self.random.chance(10);
                if lost && let Some(file) = self.dcs.get_mut(&id).expect("alive").disk.files.get_mut(&file) {
                    file.pages.clear();
                }
                let page =
                    self.dcs[&id].disk.files.get(&file).and_then(|file| file.pages.get(&segment).cloned());
                self.report(id, file, vec![Event::PageLoaded { page }]);
            }
            Job::Pull { file, from, place, under } => self.pull(id, file, from, place, under),
            Job::ReadRoot { file } => {
                let chunks =
                    self.dcs[&id].disk.files.get(&file).map(|file| file.chunks.clone()).unwrap_or_default();
                let root = shape_of(self, file).and_then(|shape| root_of(file, shape, &chunks));
                self.report(id, file, vec![Event::RootRead { root }]);
            }
            Job::Publish { file, root } => {
                let Some(shape) = shape_of(self, file) else { return };
                let stored = self.dcs.get_mut(&id).expect("alive").disk.file(file);
                let ok = !stored.dropped
                    && stored.chunks.len() as u64 == shape.chunks()
                    && root_of(file, shape, &stored.chunks) == Some(root);
                if ok {
                    stored.published = Some(root);
                }
                self.report(id, file, vec![Event::Published { ok }]);
            }
            Job::Recheck { file, to, nonce } => {
                let stored = self.dcs[&id].disk.files.get(&file);
                let root = stored.filter(|stored| !stored.dropped).and_then(|stored| {
                    stored.published?;
                    root_of(file, shape_of(self, file)?, &stored.chunks)
                });
                self.report(id, file, vec![Event::Rechecked { to, nonce, root }]);
            }
            Job::Resolve { file, root, others } => {
                let Some(shape) = shape_of(self, file) else { return };
                let held =
                    self.dcs[&id].disk.files.get(&file).map(|file| file.chunks.clone()).unwrap_or_default();
                let own: Vec<ChainingValue> =
                    held.iter().map(|(index, content)| super::disk::value(file, *index, *content)).collect();
                let resolution = resolve(shape, root, &own, &others);
                let chunks: Vec<Range<u64>> =
                    resolution.iter().flat_map(|found| found.lost.clone()).collect();
                if chunks.is_empty() {
                    self.report(id, file, vec![Event::Resolved { resolution }]);
                    return;
                }
                check::before_lose(self, id, file, &chunks);
                let dc = self.dcs.get_mut(&id).expect("alive");
                let floor = dc.disk.floor;
                let stored = dc.disk.file(file);
                stored.generation = stored.generation.max(floor).next();
                stored.chunks.retain(|index, _| !chunks.iter().any(|range| range.contains(index)));
                self.acked.retain(|(f, dc, index), _| {
                    (*f, *dc) != (file, id) || !chunks.iter().any(|r| r.contains(index))
                });
                let stored = self.dcs[&id].disk.stored(file, shape_of(self, file));
                let loaded = stored.map(Event::Loaded);
                self.report(id, file, [Event::Resolved { resolution }].into_iter().chain(loaded).collect());
            }
            Job::Free { file } => {
                check::before_free(self, id, file);
                let dc = self.dcs.get_mut(&id).expect("alive");
                let floor = dc.disk.floor;
                let stored = dc.disk.file(file);
                stored.generation = stored.generation.max(floor).next();
                stored.chunks.clear();
                stored.published = None;
                let generation = stored.generation;
                self.figures.freed += 1;
                self.acked.retain(|(f, dc, _), _| (*f, *dc) != (file, id));
                self.report(id, file, vec![Event::Freed { generation }]);
            }
        }
    }

    /// Carries chunks from one store to another, each checked against the span it lies in.
    pub fn pull(&mut self, id: DcId, file: FileId, from: DcId, place: Place, under: Span) {
        let Some(shape) = self.known_shape(id, file) else { return };
        let theirs =
            self.dcs[&from].disk.files.get(&file).map(|file| file.chunks.clone()).unwrap_or_default();
        let mut events = Vec::new();
        let outcome = if !self.reaches(id, from) {
            PullOutcome::Unreachable
        } else {
            match tree_of(file, shape, &theirs).overlapping(under.place).first() {
                Some(span) if span.place.contains(under.place) => {
                    match value_at(file, shape, under.place, &theirs) {
                        Some(value) if value == under.value => {
                            let mut outcome = PullOutcome::Done;
                            let mut stored = Vec::new();
                            for index in place.range(shape) {
                                // A pull may be cut off anywhere.
                                if !self.calm && self.random.below(60) == 0 {
                                    outcome = PullOutcome::Unreachable;
                                    break;
                                }
                                let content = theirs[&index];
                                let mine = self.dcs.get_mut(&id).expect("alive").disk.file(file);
                                if mine.dropped {
                                    outcome = PullOutcome::StoreFailed;
                                    break;
                                }
                                match mine.chunks.get(&index) {
                                    Some(held) if *held != content => {
                                        outcome = PullOutcome::StoreFailed;
                                        break;
                                    }
                                    Some(_) => {}
                                    None => {
                                        mine.chunks.insert(index, content);
                                        stored.push(chunk_span(file, index, content));
                                    }
                                }
                            }
                            let generation = self.generation(id, file);
                            events.push(Event::Stored { generation, spans: stored });
                            outcome
                        }
                        Some(_) => PullOutcome::Mismatch(place),
                        None => PullOutcome::Missing,
                    }
                }
                Some(_) | None => PullOutcome::Missing,
            }
        };
        events.push(Event::Pulled { place, outcome });
        self.report(id, file, events);
    }

    /// A process hears what became of a job, now or after others that ended later.
    fn report(&mut self, id: DcId, file: FileId, events: Vec<Event>) {
        let delay = match self.random.below(20) {
            0..=9 => 0,
            10..=18 => self.random.below(300),
            _ => self.random.below(4_000),
        };
        let process = self.dcs[&id].process;
        self.schedule(delay, Todo::Report(id, process, file, events));
    }

    pub fn generation(&self, id: DcId, file: FileId) -> Generation {
        let disk = &self.dcs[&id].disk;
        disk.files.get(&file).map_or(disk.floor, |file| file.generation.max(disk.floor))
    }
}

/// What a store says when asked for what it holds under a place, one level or more finer.
fn finer(file: FileId, shape: Geometry, place: Place, chunks: &BTreeMap<u64, u32>) -> Vec<Span> {
    let children = place.children(shape).map_or_else(|| vec![place], |(left, right)| vec![left, right]);
    let mut spans = Vec::new();
    for child in children {
        match value_at(file, shape, child, chunks) {
            Some(value) => spans.push(Span::new(child, value)),
            None => spans.extend(
                tree_of(file, shape, chunks)
                    .overlapping(child)
                    .into_iter()
                    .filter(|span| child.contains(span.place)),
            ),
        }
    }
    spans
}
