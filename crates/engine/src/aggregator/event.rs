//! What an aggregator is told: the results of effects, what clients did, what peers said.

use std::ops::Range;

#[cfg(doc)]
use super::{Aggregator, Effect};
use super::{Brief, FileMemory};
use crate::command::{DropReason, Verified};
use crate::drain::Drain;
use crate::geometry::Geometry;
use crate::hash::{RecordDigest, Root};
use crate::ids::{DcId, FileId, Generation, Incarnation, Nonce, TenantId};
use crate::ledger::Page;
use crate::metadata::MetadataRecord;
use crate::placement::Load;
use crate::resolve::Resolution;
use crate::revocations::Revocation;
use crate::span::{Place, Span};

/// What a datacenter keeps of a metadata record in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordSummary {
    /// Names it.
    pub digest: RecordDigest,
    /// Who owns the file.
    pub tenant: TenantId,
    /// The file's shape.
    pub size: Option<Geometry>,
    /// The root that the client expects.
    pub expected_root: Option<Root>,
    /// Milliseconds after the last progress at which the file expires.
    pub expiry_ms: Option<u64>,
}

impl RecordSummary {
    /// What is kept of this record.
    pub fn of(record: &MetadataRecord) -> Self {
        Self {
            digest: record.digest(),
            tenant: record.tenant(),
            size: record.geometry(),
            expected_root: record.expected_root(),
            expiry_ms: record.expiry_secs().map(|secs| secs.saturating_mul(1000)),
        }
    }
}

/// What a datacenter finds of a file in its store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// Whose it is.
    pub tenant: TenantId,
    /// The metadata record, if it is there.
    pub record: Option<RecordSummary>,
    /// What the aggregator remembered.
    pub memory: FileMemory,
    /// The size, as far as the store knows it: from the record, or settled since.
    pub size: Option<Geometry>,
    /// The generation of what is held.
    pub generation: Generation,
    /// What is held; empty while the shape is unknown.
    pub spans: Vec<Span>,
    /// Number of chunks held.
    pub chunks: u64,
    /// The root under which the file was published.
    pub published: Option<Root>,
}

/// How a pull ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullOutcome {
    /// Everything under the place is here now.
    Done,
    /// The holder could not be reached, or did not answer in time.
    Unreachable,
    /// The holder does not have it (any more).
    Missing,
    /// What the holder sent does not hash to what it says, here.
    Mismatch(Place),
    /// The own store refused.
    StoreFailed,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A client's metadata record is durable here. `home` is the datacenter that the client asked for, or this one.
    Created {
        /// The record.
        record: RecordSummary,
        /// Where the file should be reassembled.
        home: DcId,
    },
    /// A client said how large the file is whose record, which is here, leaves that open. Whether another size stands
    /// was asked before; if it came from elsewhere since, the two are a conflict.
    Settled {
        /// The file's shape.
        size: Geometry,
    },
    /// What the store has of a file: at start, after a record was fetched, after a loss. What was read under an older
    /// generation than the newest that was reported counts for the record and what is remembered, not for the chunks.
    Loaded(StoredFile),
    /// A client's whole file is durable and published here, with what is to be remembered of it, in one.
    Whole(StoredFile),
    /// The store's answer to [`Effect::Wake`](super::Effect::Wake) where it knows nothing of the file.
    Absent,
    /// Chunks of a known file are durable here.
    Stored {
        /// Under this generation, the store's when they became durable.
        generation: Generation,
        /// Their spans.
        spans: Vec<Span>,
    },
    /// Chunks of a file that this datacenter has not heard of are durable here.
    StoredOrphan {
        /// Whose they are.
        tenant: TenantId,
        /// Which.
        chunks: Range<u64>,
    },
    /// The owner ends the file.
    Remove {
        /// Why.
        reason: DropReason,
        /// Who owns it.
        tenant: TenantId,
    },
    /// A client asks for a file whose metadata record is not here: fetch it.
    Wanted,
    /// Take the file over: its home is lost.
    TakeOver,
    /// The record could not be fetched.
    FetchFailed,
    /// The store's answer to [`Effect::Restate`].
    Restated {
        /// For whom; this datacenter itself if it wants to compare.
        to: DcId,
        /// The generation of what is held, as of the same moment. If more was freed or lost since, the answer is void.
        generation: Generation,
        /// What is held there, one level or more finer than what was asked for.
        spans: Vec<Span>,
    },
    /// The store's answer to [`Effect::LoadPage`]; `None` if the page is lost.
    PageLoaded {
        /// The page.
        page: Option<Page>,
    },
    /// A pull ended. What it brought came as [`Event::Stored`] before.
    Pulled {
        /// What was pulled.
        place: Place,
        /// How it ended.
        outcome: PullOutcome,
    },
    /// The root of a file of one chunk, from its bytes; `None` if they could not be read.
    RootRead {
        /// The root.
        root: Option<Root>,
    },
    /// An [`Effect::Publish`] ended.
    Published {
        /// Whether the file is assembled now.
        ok: bool,
    },
    /// An [`Effect::Resolve`] ended; `None` if nothing gives the root.
    Resolved {
        /// What contradicted the root, and was removed.
        resolution: Option<Resolution>,
    },
    /// The copy here was checked again; `None` if it is not good.
    Rechecked {
        /// Who asked.
        to: DcId,
        /// To be repeated.
        nonce: Nonce,
        /// The root of the copy.
        root: Option<Root>,
    },
    /// The chunks here were freed; nothing is held as of this generation.
    Freed {
        /// The new generation.
        generation: Generation,
    },
}

/// Something that happened between datacenters, or to this one as a whole.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "events are made and consumed at once, never kept in bulk")]
pub enum NodeEvent {
    /// A peer is dialled: [`Effect::Hello`](super::Effect::Hello) is what it is told first, and once its answer is here
    /// comes [`NodeEvent::LinkUp`].
    Dial {
        /// The peer.
        peer: DcId,
    },
    /// A peer dialled and said hello: [`Effect::Answer`](super::Effect::Answer).
    Hello {
        /// The peer.
        peer: DcId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// The highest incarnation of this datacenter that it has seen.
        seen_of_me: Incarnation,
    },
    /// A peer that was dialled answered. It takes nothing from an incarnation older than what it has seen; this
    /// datacenter becomes one above that then, and closes the link.
    LinkUp {
        /// The peer.
        peer: DcId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// The highest incarnation of this datacenter that it had seen before.
        seen_of_me: Incarnation,
    },
    /// A peer cannot be reached any more.
    LinkDown {
        /// The peer.
        peer: DcId,
    },
    /// Something happened to one file.
    File(FileId, Event),
    /// Files of the store that are at rest, as found at the start.
    AtRest(Vec<(FileId, Brief)>),
    /// All files of the store have been loaded or are at rest.
    AllLoaded,
    /// A peer said something.
    Received(Verified),
    /// Somebody who may do so revokes tokens; that there is room was seen before.
    Revoke(Revocation),
    /// How loaded this datacenter is, a few times a second: peers are told as often as they need.
    Load(Load),
    /// An operator begins, changes or ends the drain of this datacenter; whether it may was
    /// [asked](Aggregator::may_drain).
    Drain(Option<Drain>),
    /// Time passed; see [`Aggregator::next_timeout`].
    Tick,
}
