//! The calls between services, as traits.
//!
//! The edge calls [`Sessions`], [`Workers`] and [`Tenants`], workers call [`Slots`] and [`Placing`]. In one process the composition
//! passes the services themselves; as separate processes it passes what asks them over the network. Every call carries the signed session context,
//! and whoever acts on it verifies it itself (G4).

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;
use serde::{Deserialize, Serialize};
use sluice_engine::context::SignedContext;
use sluice_engine::drain::Phase;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, DcId, FileId, TenantId};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::placement::{Ask, Choice, Standings, WorkerId, WorkerLoad};
use sluice_engine::span::Place;

use crate::http::{
    About, ChunkReceipt, DrainStatus, FilePage, FileStatus, Revoke, RevokedTokens, State, TenantStatus,
    TreeNode,
};
use crate::problem::Refusal;

/// Bytes that arrive or leave, in order. An error ends them, and is never taken for their end.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, Refusal>> + Send>>;

/// How long to wait for a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// The state, or one that comes after it. `conflict` and `dropped` always end the wait.
    pub state: State,
    /// How long at most.
    pub timeout: Duration,
}

/// Which files to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListQuery {
    /// Only those in this state.
    pub state: Option<State>,
    /// Only those with ids above.
    pub after: Option<ClientFileId>,
    /// How many at most.
    pub limit: usize,
}

/// What a tenant has in a datacenter, or in some of its shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    /// Bytes that are stored.
    pub bytes: u64,
    /// Files that are listed.
    pub files: u64,
    /// Whether the file that was asked about is one of them.
    pub has: bool,
}

impl Used {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            files: self.files.saturating_add(other.files),
            has: self.has || other.has,
        }
    }
}

/// A complete file, opened for reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its metadata.
    pub record: MetadataRecord,
    /// Its shape.
    pub file: Geometry,
    /// Its root.
    pub root: Root,
}

/// The session service.
#[async_trait]
pub trait Sessions: Send + Sync + 'static {
    /// The signed context of the session that this token stands for; begins one with the token's first request.
    async fn context(&self, token: &str) -> Result<SignedContext, Refusal>;
}

/// What who runs the cluster asks of a datacenter about any tenant: with the scope `operate`.
#[async_trait]
pub trait Tenants: Send + Sync + 'static {
    /// Voids tokens, and the contexts that came of them: durable when this returns, in force in this datacenter, and told
    /// to the others until they know it.
    async fn revoke(&self, context: &SignedContext, revoke: Revoke) -> Result<RevokedTokens, Refusal>;

    /// What is known of a tenant. Of one of whom nothing is known nothing is revoked.
    async fn tenant(&self, context: &SignedContext, tenant: TenantId) -> Result<TenantStatus, Refusal>;
}

/// The workers of a datacenter: what an edge may ask for.
#[async_trait]
pub trait Workers: Send + Sync + 'static {
    /// Creates a file, durably. Returns whether it was new here.
    async fn create(&self, context: &SignedContext, new: NewFile) -> Result<(bool, FileStatus), Refusal>;

    /// Whether a file of `len` bytes may come whole: asked before its bytes are, and counted against the tenant's rate.
    async fn admit_whole(&self, context: &SignedContext, id: ClientFileId, len: u64) -> Result<(), Refusal>;

    /// Creates a file of at most one chunk with all its bytes, durable and assembled when this returns. Returns whether
    /// it was new here.
    async fn create_whole(
        &self,
        context: &SignedContext,
        new: NewFile,
        bytes: Bytes,
    ) -> Result<(bool, FileStatus), Refusal>;

    /// Settles the size of a file that was created without one. The same size again is a success.
    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal>;

    /// Takes the chunks of a run that begins at `start` and has `len` bytes.
    async fn put_chunks(&self, context: &SignedContext, put: PutChunks) -> Result<ChunkReceipt, Refusal>;

    /// Where the file stands; with `wait`, answers when the state is reached or time is up.
    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal>;

    /// The tenant's files that this datacenter knows.
    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal>;

    /// Opens a complete file.
    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal>;

    /// The bytes `[range)` of a complete file, each chunk verified before its first byte is given out. The range
    /// lies inside the file.
    async fn read(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<ByteStream, Refusal>;

    /// The chunk values under a node of at most [`UNIT_LEVEL`](sluice_engine::limits::UNIT_LEVEL), and its proof.
    async fn tree(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<TreeNode, Refusal>;

    /// Ends a file for good.
    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal>;

    /// Where the caller is.
    async fn about(&self, context: &SignedContext) -> Result<About, Refusal>;

    /// Does what an operator wants of the datacenter's drain, durably.
    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal>;

    /// Where the clients of the datacenter should go. Whoever may ask workers may know.
    async fn leaving(&self) -> Result<Leaving, Refusal>;
}

/// By which way a file or a run came, and so how it may go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// From a client, who stays where it is.
    #[default]
    Direct,
    /// From a client that goes where it is sent.
    Follows,
    /// From another datacenter, or sent on by one: it goes no further.
    Passed,
}

/// What an operator wants of the drain of a datacenter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DrainOrder {
    /// See it.
    Show,
    /// Begin it, or change how it goes on.
    Begin {
        /// Name of the datacenter that takes over.
        to: String,
        /// How far to hand over.
        #[serde(with = "phase_name")]
        phase: Phase,
        /// Whether files move too.
        evacuate: bool,
        /// Whether to see only if it may be: nothing changes.
        #[serde(default)]
        is_trial: bool,
    },
    /// End it: the datacenter takes its work up again.
    End,
}

/// A phase by its name.
mod phase_name {
    use serde::{Deserialize, Deserializer, Serializer};
    use sluice_engine::drain::Phase;

    pub(super) fn serialize<S: Serializer>(phase: &Phase, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(phase.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Phase, D::Error> {
        let name = String::deserialize(from)?;
        Phase::from_name(&name).ok_or_else(|| serde::de::Error::custom("no phase of a drain"))
    }
}

/// Where the clients of a datacenter should go, if it hands them over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaving {
    /// How far it hands over; `None`: it does not.
    pub phase: Option<Phase>,
    /// Which datacenter takes over; `None` also while it cannot.
    pub target: Option<DcId>,
    /// Where clients find the datacenter that takes over, if that is known.
    pub to: Option<String>,
}

/// The workers of other datacenters, for what had better not be taken here.
pub trait Elsewhere: Send + Sync + 'static {
    /// Where this goes.
    fn choose(&self, ask: &Ask) -> Choice;

    /// Where clients find this datacenter, if that is known.
    fn url(&self, dc: DcId) -> Option<String>;

    /// The workers of this datacenter, if there is a way to them.
    fn workers(&self, dc: DcId) -> Option<Arc<dyn Workers>>;

    /// So many bytes were passed to this datacenter, or their client sent there.
    fn passed(&self, dc: DcId, bytes: u64);

    /// Shows in metrics to whom is passed on, now that so many thousandths of the tightest limit here are in use.
    fn show(&self, pressure: u16);

    /// This datacenter could not be asked: nothing is to be passed to it for a moment.
    fn failed(&self, dc: DcId);

    /// Where clients should go; `None`: that is not known yet.
    fn leaving(&self) -> Option<Leaving>;

    /// Whether there is a way to the datacenter with this name, for clients or what is passed.
    fn has_way_to(&self, name: &str) -> bool;
}

/// A file to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// The id by which the client knows it.
    pub id: ClientFileId,
    /// What the client says of it.
    pub fields: sluice_engine::metadata::MetadataFields,
    /// Name of the datacenter that should be its home.
    pub home: Option<String>,
    /// By which way it came.
    pub way: Way,
}

/// Chunks on their way in.
pub struct PutChunks {
    /// The file.
    pub id: ClientFileId,
    /// The first chunk.
    pub start: ChunkIndex,
    /// Length of the body, as declared.
    pub len: u64,
    /// The value that each chunk must have, one per chunk.
    pub expected: Option<Vec<ChainingValue>>,
    /// The body.
    pub body: ByteStream,
    /// By which way it came.
    pub way: Way,
}

/// What a worker may do with a chunk of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The file is known, and has this shape.
    Known(Geometry),
    /// The file is known, and its size is not settled: only full chunks may come.
    Open,
    /// The file is not known here: the chunk is provisional.
    Provisional,
}

/// A chunk of a complete file: its verified value, and whether this datacenter's own store has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSource {
    /// Proven to lead to the root.
    pub value: ChainingValue,
    /// Whether it can be read from the own store.
    pub local: bool,
}

/// The aggregator of a datacenter that tells the others how loaded it is, as whoever places chunks sees it.
#[async_trait]
pub trait Placing: Send + Sync + 'static {
    /// Says how loaded a worker of the datacenter is now, and is told how the datacenter and the others stand.
    async fn exchange(&self, worker: WorkerId, said: WorkerLoad) -> Result<Standings, Refusal>;
}

/// The aggregators of a datacenter: what a worker may ask the owner of a file's slot for.
#[async_trait]
pub trait Slots: Send + Sync + 'static {
    /// Makes a metadata record durable and registers it. Returns whether it was new here. `beside` is what the tenant has
    /// in other shares, here and below: it counts toward quotas.
    async fn create(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        home: Option<String>,
        beside: Used,
    ) -> Result<(bool, FileStatus), Refusal>;

    /// Makes a file of at most one chunk durable and published with its record, and registers it. Returns whether it was
    /// new here; `None` if something of it is here already, so that it must come as a record and chunks.
    async fn create_whole(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        bytes: Bytes,
        beside: Used,
    ) -> Result<Option<(bool, FileStatus)>, Refusal>;

    /// Settles the size of a file that was created without one, durably. Refuses another size than the one that stands.
    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal>;

    /// Whether a file that comes whole, with so many bytes, is within the quotas of the session's token.
    async fn admit_more(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        bytes: u64,
        beside: Used,
    ) -> Result<(), Refusal>;

    /// Whether chunks of the file may come: asked before a body is read. Refuses dropped files, files in conflict,
    /// provisional chunks over the tenant's cap, and everything once the quota of the session's token is used up.
    async fn admit(&self, context: &SignedContext, file: FileId, beside: Used) -> Result<Admission, Refusal>;

    /// What the tenant of a context has here, and whether a file is part of it.
    async fn used(&self, context: &SignedContext, file: Option<FileId>) -> Result<Used, Refusal>;

    /// Registers a run that is durable in the own store. Returns whether it is still provisional.
    async fn register(
        &self,
        context: &SignedContext,
        file: FileId,
        run: Run,
        values: &[ChainingValue],
    ) -> Result<bool, Refusal>;

    /// Where the file stands.
    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal>;

    /// The tenant's files that this datacenter knows.
    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal>;

    /// Opens a complete file.
    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal>;

    /// For each chunk of `range` (inside one unit of 4,096 chunks) of a complete file: its value, and whether it is
    /// here.
    async fn locate(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<Vec<ChunkSource>, Refusal>;

    /// The bytes of a chunk that another datacenter holds, verified against `value`.
    async fn fetch(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        index: ChunkIndex,
        value: ChainingValue,
    ) -> Result<Bytes, Refusal>;

    /// Reports a chunk of the own store that did not hash to its value, so that it is retracted and repaired.
    async fn report_damage(&self, file: FileId, index: ChunkIndex);

    /// The chunk values under a node, and its proof.
    async fn tree(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<TreeNode, Refusal>;

    /// Ends a file for good.
    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal>;

    /// Where the caller is.
    async fn about(&self, context: &SignedContext) -> Result<About, Refusal>;

    /// Does what an operator wants of the datacenter's drain, durably. What flows through workers and edges they add.
    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal>;
}
