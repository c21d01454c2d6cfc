//! What goes to and comes from a store in another process. Errors: `errors.rs`.

use std::ops::Range;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use sluice_proto::problem::Refusal;
use sluice_store::{FileSummary, Found, Listed, RecordOutcome, RunReceipt, StoreError, Usage, WholeOutcome};
use uuid::Uuid;

use super::errors::WireStoreError;
use crate::call::{garbled, misunderstood};
use crate::tenure::NotHeld;

/// An answer of a store: what was asked for, or why not.
pub(super) type Answered<A> = Result<A, Refused>;

/// Why a store does not do it. It did nothing.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Refused {
    /// The caller does not have the store.
    NotHeld,
    /// It is divided into other shares.
    NoShare,
    /// A tenure began under this fence, which is higher.
    Fence(u64),
    /// What it was asked makes no sense to it.
    Garbled(String),
    Store(WireStoreError),
}

impl From<NotHeld> for Refused {
    fn from(why: NotHeld) -> Self {
        match why {
            NotHeld::Another | NotHeld::Busy => Self::NotHeld,
            NotHeld::NoShare => Self::NoShare,
            NotHeld::Fence(highest) => Self::Fence(highest),
        }
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self::Garbled(refusal.detail)
    }
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        Self::Store(error.into())
    }
}

pub(super) fn file(text: &str) -> Result<FileId, Refusal> {
    text.parse().map_err(garbled)
}

pub(super) fn index(number: u64) -> Result<ChunkIndex, Refusal> {
    ChunkIndex::new(number).map_err(garbled)
}

pub(super) fn value(text: &str) -> Result<ChainingValue, Refusal> {
    text.parse().map_err(garbled)
}

pub(super) fn root(text: &str) -> Result<Root, Refusal> {
    text.parse().map_err(garbled)
}

pub(super) fn bytes(text: &str) -> Result<Vec<u8>, Refusal> {
    STANDARD.decode(text).map_err(garbled)
}

pub(super) fn record(text: &str) -> Result<MetadataRecord, Refusal> {
    MetadataRecord::from_bytes(&bytes(text)?).map_err(garbled)
}

pub(super) fn text(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// A file by its id inside.
#[derive(Serialize, Deserialize)]
pub(super) struct File {
    pub(super) file: String,
}

/// A chunk of a file.
#[derive(Serialize, Deserialize)]
pub(super) struct Chunk {
    pub(super) file: String,
    pub(super) index: u64,
}

/// Chunks of a file.
#[derive(Serialize, Deserialize)]
pub(super) struct ChunksOf {
    pub(super) file: String,
    pub(super) chunks: Vec<u64>,
}

/// A range of chunks of a file.
#[derive(Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) file: String,
    pub(super) start: u64,
    pub(super) end: u64,
}

/// A metadata record, and what is known of its file: both in base64.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) record: String,
    pub(super) facts: String,
}

/// A file, and a number of it: its size, or a segment.
#[derive(Serialize, Deserialize)]
pub(super) struct Numbered {
    pub(super) file: String,
    pub(super) number: u64,
}

/// A file, and what is known of it.
#[derive(Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) file: String,
    pub(super) tenant: Option<u64>,
    pub(super) facts: String,
}

/// A file, and its root.
#[derive(Serialize, Deserialize)]
pub(super) struct Rooted {
    pub(super) file: String,
    pub(super) root: String,
}

/// Which files to list.
#[derive(Serialize, Deserialize)]
pub(super) struct List {
    pub(super) after: Option<String>,
    pub(super) limit: usize,
}

/// Which files of a tenant to list.
#[derive(Serialize, Deserialize)]
pub(super) struct ListOf {
    pub(super) tenant: u64,
    pub(super) after: Option<Uuid>,
    pub(super) limit: usize,
}

/// A run that is about to come. Behind its bytes come [`Tail`]s.
#[derive(Serialize, Deserialize)]
pub(super) struct NewRun {
    pub(super) file: String,
    pub(super) tenant: u64,
    pub(super) start: u64,
    pub(super) count: u64,
    pub(super) len: u64,
}

/// What follows the bytes of a run: 1 if a value of each chunk must be met, and those values, or zeros.
pub(super) struct Tail;

impl Tail {
    pub(super) const fn len(count: u64) -> u64 {
        1 + 32 * count
    }

    pub(super) fn encode(count: u64, expected: Option<&[ChainingValue]>) -> Bytes {
        let mut tail = BytesMut::with_capacity(Self::len(count) as usize);
        tail.put_u8(u8::from(expected.is_some()));
        for value in expected.unwrap_or_default() {
            tail.extend_from_slice(value.as_bytes());
        }
        tail.resize(Self::len(count) as usize, 0);
        tail.freeze()
    }

    pub(super) fn decode(tail: &[u8]) -> Result<Option<Vec<ChainingValue>>, Refusal> {
        let Some((must, values)) = tail.split_first() else { return Err(garbled("a run without a tail")) };
        let (values, []) = values.as_chunks::<32>() else { return Err(garbled("a tail that is cut off")) };
        Ok((*must == 1).then(|| values.iter().map(|value| ChainingValue::from_bytes(*value)).collect()))
    }
}

impl NewRun {
    pub(super) fn run(&self) -> Result<Run, Refusal> {
        Run::new(index(self.start)?, self.count).map_err(garbled)
    }
}

/// [`RunReceipt`] on the wire.
#[derive(Serialize, Deserialize)]
pub(super) struct WireReceipt {
    values: Vec<String>,
    new_chunks: u64,
}

impl WireReceipt {
    pub(super) fn of(receipt: &RunReceipt) -> Self {
        let values = receipt.values.iter().map(ToString::to_string).collect();
        Self { values, new_chunks: receipt.new_chunks }
    }

    pub(super) fn parse(self) -> Result<RunReceipt, Refusal> {
        let values = self.values.iter().map(|text| value(text)).collect::<Result<_, _>>()?;
        Ok(RunReceipt { values, new_chunks: self.new_chunks })
    }
}

/// Whether something was new.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum WireOutcome {
    Stored,
    Known,
    Begun,
}

impl From<RecordOutcome> for WireOutcome {
    fn from(outcome: RecordOutcome) -> Self {
        match outcome {
            RecordOutcome::Stored => Self::Stored,
            RecordOutcome::Known => Self::Known,
        }
    }
}

impl From<WholeOutcome> for WireOutcome {
    fn from(outcome: WholeOutcome) -> Self {
        match outcome {
            WholeOutcome::Stored => Self::Stored,
            WholeOutcome::Known => Self::Known,
            WholeOutcome::Begun => Self::Begun,
        }
    }
}

impl From<WireOutcome> for WholeOutcome {
    fn from(outcome: WireOutcome) -> Self {
        match outcome {
            WireOutcome::Stored => Self::Stored,
            WireOutcome::Known => Self::Known,
            WireOutcome::Begun => Self::Begun,
        }
    }
}

impl WireOutcome {
    pub(super) fn of_record(self) -> Result<RecordOutcome, Refusal> {
        match self {
            Self::Stored => Ok(RecordOutcome::Stored),
            Self::Known => Ok(RecordOutcome::Known),
            Self::Begun => Err(misunderstood("a record is no file that was begun")),
        }
    }
}

/// [`FileSummary`] on the wire. Ranges are pairs: how far behind the one before it begins, and its length.
#[derive(Serialize, Deserialize)]
pub(super) struct WireSummary {
    tenant: u64,
    record: Option<String>,
    size: Option<u64>,
    facts: String,
    generation: u64,
    held: Vec<(u64, u64)>,
    held_bytes: u64,
    published: Option<String>,
    in_log: bool,
}

impl WireSummary {
    pub(super) fn of(summary: FileSummary) -> Self {
        let FileSummary { tenant, record, size, facts, generation, held, held_bytes, published, in_log } =
            summary;
        Self {
            tenant: tenant.number(),
            record: record.map(|record| text(&record.to_bytes())),
            size: size.map(Geometry::size),
            facts: text(&facts),
            generation: generation.number(),
            held: pairs(&held),
            held_bytes,
            published: published.map(|root| root.to_string()),
            in_log,
        }
    }

    pub(super) fn parse(self) -> Result<FileSummary, Refusal> {
        let Self { tenant, record: described, size, facts, generation, held, held_bytes, published, in_log } =
            self;
        Ok(FileSummary {
            tenant: TenantId::new(tenant),
            record: described.as_deref().map(record).transpose()?,
            size: size.map(|size| Geometry::new(size).map_err(garbled)).transpose()?,
            facts: bytes(&facts)?,
            generation: Generation::new(generation),
            held: ranges(&held)?,
            held_bytes,
            published: published.as_deref().map(root).transpose()?,
            in_log,
        })
    }
}

/// Rising ranges as pairs.
pub(super) fn pairs(ranges: &[Range<u64>]) -> Vec<(u64, u64)> {
    let mut end = 0;
    let pair = |range: &Range<u64>| {
        let pair = (range.start - end, range.end - range.start);
        end = range.end;
        pair
    };
    ranges.iter().map(pair).collect()
}

/// Pairs as rising ranges.
pub(super) fn ranges(pairs: &[(u64, u64)]) -> Result<Vec<Range<u64>>, Refusal> {
    let mut end = 0u64;
    let range = |(gap, len): &(u64, u64)| {
        let start = end.checked_add(*gap)?;
        end = start.checked_add(*len)?;
        Some(start..end)
    };
    pairs.iter().map(range).collect::<Option<_>>().ok_or_else(|| garbled("ranges past every end"))
}

/// [`Found`] on the wire.
#[derive(Serialize, Deserialize)]
pub(super) struct WireFound {
    file: String,
    brief: Option<String>,
    whole: bool,
}

impl WireFound {
    pub(super) fn of(found: &Found) -> Self {
        let brief = found.brief.map(|brief| text(&brief));
        Self { file: found.file.to_string(), brief, whole: found.whole }
    }

    pub(super) fn parse(self) -> Result<Found, Refusal> {
        let brief = |text: String| bytes(&text)?.try_into().map_err(|_| garbled("not a brief"));
        let brief = self.brief.map(brief).transpose()?;
        Ok(Found { file: file(&self.file)?, brief, whole: self.whole })
    }
}

/// [`Listed`] on the wire.
#[derive(Serialize, Deserialize)]
pub(super) struct WireListed {
    client: Uuid,
    size: u64,
    name: String,
    brief: String,
}

impl WireListed {
    pub(super) fn of(listed: Listed) -> Self {
        let Listed { client, size, name, brief } = listed;
        Self { client: client.uuid(), size, name, brief: text(&brief) }
    }

    pub(super) fn parse(self) -> Result<Listed, Refusal> {
        let brief = bytes(&self.brief)?.try_into().map_err(|_| garbled("not a brief"))?;
        Ok(Listed { client: ClientFileId::new(self.client), size: self.size, name: self.name, brief })
    }
}

/// [`Usage`] on the wire: how full the store is.
#[derive(Serialize, Deserialize)]
pub(super) struct WireUsage {
    free: u64,
    read_only: bool,
}

impl From<Usage> for WireUsage {
    fn from(Usage { free, read_only }: Usage) -> Self {
        Self { free, read_only }
    }
}

impl From<WireUsage> for Usage {
    fn from(WireUsage { free, read_only }: WireUsage) -> Self {
        Self { free, read_only }
    }
}

/// A tenure that is asked for.
#[derive(Serialize, Deserialize)]
pub(super) struct Begin {
    #[serde(flatten)]
    pub(super) of: OfShare,
    /// What Redis gave with the lease of the share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) fence: Option<u64>,
}

/// What is kept of a share.
#[derive(Serialize, Deserialize)]
pub(super) struct OfShare {
    share: String,
}

impl OfShare {
    pub(super) fn of(share: Share) -> Self {
        Self { share: share.to_string() }
    }

    pub(super) fn share(&self) -> Result<Share, Refusal> {
        self.share.parse().map_err(garbled)
    }
}

/// A floor for the generations of a share.
#[derive(Serialize, Deserialize)]
pub(super) struct Floor {
    #[serde(flatten)]
    pub(super) of: OfShare,
    pub(super) number: u64,
}

/// A tenure that begins.
#[derive(Serialize, Deserialize)]
pub(super) struct Begun {
    pub(super) tenure: String,
    pub(super) usage: WireUsage,
}

/// Values of chunks, 33 bytes each: 1 and the value, or zeros.
pub(super) fn encode_values(values: &[Option<ChainingValue>]) -> Bytes {
    let mut all = BytesMut::with_capacity(33 * values.len());
    for value in values {
        all.put_u8(u8::from(value.is_some()));
        all.extend_from_slice(value.map_or([0; 32], |value| *value.as_bytes()).as_slice());
    }
    all.freeze()
}

pub(super) fn decode_values(bytes: &[u8]) -> Result<Vec<Option<ChainingValue>>, Refusal> {
    let (values, []) = bytes.as_chunks::<33>() else { return Err(misunderstood("values that are cut off")) };
    let value = |[there, value @ ..]: &[u8; 33]| (*there == 1).then(|| ChainingValue::from_bytes(*value));
    Ok(values.iter().map(value).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_ranges_tails_and_values_come_back() {
        let held = vec![0..3, 5..6, 1 << 34..(1 << 34) + 7];
        let summary = FileSummary {
            tenant: TenantId::new(7),
            record: None,
            size: Some(Geometry::new(9).unwrap()),
            facts: vec![1, 2, 3],
            generation: Generation::new(1 << 40),
            held: held.clone(),
            held_bytes: 5,
            published: Some(Root::from_bytes([5; 32])),
            in_log: true,
        };
        assert_eq!(WireSummary::of(summary.clone()).parse().unwrap(), summary);
        assert_eq!(ranges(&pairs(&held)).unwrap(), held);
        assert!(ranges(&[(u64::MAX, 1)]).is_err());
        let value = ChainingValue::from_bytes([3; 32]);
        for expected in [None, Some(vec![value; 4])] {
            let tail = Tail::encode(4, expected.as_deref());
            assert_eq!(tail.len() as u64, Tail::len(4));
            assert_eq!(Tail::decode(&tail).unwrap(), expected);
            assert!(Tail::decode(&tail[1..]).is_err());
        }
        let values = vec![Some(value), None];
        assert_eq!(decode_values(&encode_values(&values)).unwrap(), values);
        assert!(decode_values(&[1]).is_err());
    }
}
