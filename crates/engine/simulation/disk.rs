//! What survives a crash: the part that the chunk store plays.

use std::collections::BTreeMap;

use sluice_engine::aggregator::{Brief, FileMemory, RecordSummary, StoredFile};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{DcId, FileId, Generation, TenantId};
use sluice_engine::ledger::Page;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::{SpanTree, merge_chunks};

/// Stands for the bytes of a chunk: two chunks are equal if this is.
pub type Content = u32;

/// The value of a chunk with this content.
pub fn value(file: FileId, index: u64, content: Content) -> ChainingValue {
    let mut input = file.as_bytes().to_vec();
    input.extend_from_slice(&index.to_be_bytes());
    input.extend_from_slice(&content.to_be_bytes());
    ChainingValue::from_bytes(*blake3::hash(&input).as_bytes())
}

pub fn chunk_span(file: FileId, index: u64, content: Content) -> Span {
    let index = ChunkIndex::new(index).expect("simulated files are small");
    Span::new(Place::of_chunk(index), value(file, index.number(), content))
}

/// The root of a file of these chunks.
pub fn root_of(file: FileId, shape: Geometry, chunks: &BTreeMap<u64, Content>) -> Option<Root> {
    if shape.chunks() == 1 {
        let value = value(file, 0, *chunks.get(&0)?);
        return Some(Root::of_bytes(value.as_bytes()));
    }
    tree_of(file, shape, chunks).root()
}

pub fn tree_of(file: FileId, shape: Geometry, chunks: &BTreeMap<u64, Content>) -> SpanTree {
    let mut tree = SpanTree::new(shape);
    for (&index, &content) in chunks {
        let _ = tree.insert(chunk_span(file, index, content));
    }
    tree
}

/// The value of a node from the chunks under it, if they are all there.
pub fn value_at(
    file: FileId,
    shape: Geometry,
    place: Place,
    chunks: &BTreeMap<u64, Content>,
) -> Option<ChainingValue> {
    let values: Option<Vec<ChainingValue>> = place
        .range(shape)
        .map(|index| chunks.get(&index).map(|content| value(file, index, *content)))
        .collect();
    merge_chunks(shape, place, &values?)
}

#[derive(Clone, Default)]
pub struct DiskFile {
    pub tenant: Option<TenantId>,
    pub record: Option<RecordSummary>,
    /// What was settled, where the record leaves the size open.
    pub size: Option<Geometry>,
    pub memory: Vec<u8>,
    pub generation: Generation,
    pub chunks: BTreeMap<u64, Content>,
    pub published: Option<Root>,
    pub dropped: bool,
    pub pages: BTreeMap<u64, Page>,
}

#[derive(Clone, Default)]
pub struct Disk {
    pub node: Vec<u8>,
    pub floor: Generation,
    pub files: BTreeMap<FileId, DiskFile>,
}

impl Disk {
    pub fn file(&mut self, id: FileId) -> &mut DiskFile {
        self.files.entry(id).or_default()
    }

    pub fn chunk(&self, id: FileId, index: u64) -> Option<Content> {
        self.files.get(&id)?.chunks.get(&index).copied()
    }

    /// The brief of a file at rest.
    pub fn brief(&self, id: FileId, me: DcId) -> Option<Brief> {
        let file = self.files.get(&id)?;
        let memory = FileMemory::from_bytes(&file.memory).expect("the simulation does not damage memories");
        let brief = Brief::of(file.record.as_ref(), &memory)?;
        let small = file.record.and_then(|record| record.size).is_some_and(|shape| shape.chunks() <= 1);
        let clean = file.published.is_some() || file.chunks.is_empty();
        let rests = clean && (file.dropped || small) && brief.is_at_rest(me, file.published.is_some());
        rests.then_some(brief)
    }

    /// What an aggregator is given when it loads the file.
    pub fn stored(&self, id: FileId, shape: Option<Geometry>) -> Option<StoredFile> {
        let file = self.files.get(&id)?;
        let size = file.record.and_then(|record| record.size).or(file.size);
        let shape = size.or(shape);
        let spans = shape.map(|shape| tree_of(id, shape, &file.chunks).iter().collect()).unwrap_or_default();
        Some(StoredFile {
            tenant: file.tenant?,
            record: file.record,
            memory: FileMemory::from_bytes(&file.memory).expect("the simulation does not damage memories"),
            size,
            generation: file.generation.max(self.floor),
            spans,
            chunks: file.chunks.len() as u64,
            published: file.published,
        })
    }
}

pub fn dc_name(dc: DcId) -> String {
    format!("dc-{}", (b'a' + (dc.number() as u8 - 1)) as char)
}
