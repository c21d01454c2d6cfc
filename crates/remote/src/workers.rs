//! [`Workers`], from process to process.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::extract::State as AppState;
use axum::response::Response;
use axum::routing::post;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sluice_engine::context::SignedContext;
use sluice_engine::drain::Phase;
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::{ClientFileId, DcId};
use sluice_engine::limits::MAX_RUN;
use sluice_engine::metadata::MetadataFields;
use sluice_engine::span::Place;
use sluice_proto::calls::{
    ByteStream, DrainOrder, Leaving, ListQuery, NewFile, Opened, PutChunks, Wait, Way, Workers,
};
use sluice_proto::http::{About, ChunkReceipt, DrainStatus, FilePage, FileStatus, TreeNode};
use sluice_proto::problem::Refusal;
use uuid::Uuid;

use crate::call::{Answer, Call, Flow, bytes_answer, garbled};
use crate::caller::{Caller, Head};
use crate::forms::{Ask, Created, File, List, Nothing, Part, Settle, Tree, Whole, WireOpened};

const CREATE: &str = "/v1/workers/create";
const ADMIT_WHOLE: &str = "/v1/workers/admit-whole";
const CREATE_WHOLE: &str = "/v1/workers/create-whole";
const SETTLE: &str = "/v1/workers/settle";
const PUT: &str = "/v1/workers/put";
const STATUS: &str = "/v1/workers/status";
const LIST: &str = "/v1/workers/list";
const OPEN: &str = "/v1/workers/open";
const READ: &str = "/v1/workers/read";
const TREE: &str = "/v1/workers/tree";
const REMOVE: &str = "/v1/workers/remove";
const ABOUT: &str = "/v1/workers/about";
const DRAIN: &str = "/v1/workers/drain";
const LEAVING: &str = "/v1/workers/leaving";

#[derive(Serialize, Deserialize)]
struct Create {
    id: Uuid,
    size: Option<u64>,
    expiry_secs: u64,
    expected_root: Option<String>,
    name: String,
    content_type: String,
    user: BTreeMap<String, String>,
    home: Option<String>,
    #[serde(default)]
    way: Way,
}

#[derive(Serialize, Deserialize)]
struct Put {
    id: Uuid,
    start: u64,
    len: u64,
    /// In hexadecimal digits.
    expected: Option<Vec<String>>,
    #[serde(default)]
    way: Way,
}

#[derive(Serialize, Deserialize)]
struct WireLeaving {
    phase: Option<String>,
    #[serde(default)]
    target: Option<u16>,
    to: Option<String>,
}

impl WireLeaving {
    fn of(Leaving { phase, target, to }: Leaving) -> Self {
        Self { phase: phase.map(|phase| phase.name().into()), target: target.map(DcId::number), to }
    }

    /// A phase that this version does not know is none that it could act on.
    fn parse(self) -> Leaving {
        let phase = self.phase.as_deref().and_then(Phase::from_name);
        Leaving { phase, target: self.target.map(DcId::new), to: self.to }
    }
}

impl Create {
    fn of(new: NewFile) -> Self {
        let NewFile { id, fields, home, way } = new;
        let MetadataFields { size, expiry_secs, expected_root, name, content_type, user } = fields;
        let expected_root = expected_root.map(|root| root.to_string());
        Self { id: id.uuid(), size, expiry_secs, expected_root, name, content_type, user, home, way }
    }

    fn parse(self) -> Result<NewFile, Refusal> {
        let Self { id, size, expiry_secs, expected_root, name, content_type, user, home, way } = self;
        let expected_root = expected_root.map(|root| root.parse::<Root>()).transpose().map_err(garbled)?;
        let fields = MetadataFields { size, expiry_secs, expected_root, name, content_type, user };
        Ok(NewFile { id: ClientFileId::new(id), fields, home, way })
    }
}

impl Put {
    fn parse(self, body: ByteStream) -> Result<PutChunks, Refusal> {
        let Self { id, start, len, expected, way } = self;
        let value = |text: String| text.parse::<ChainingValue>().map_err(garbled);
        let expected: Option<Vec<_>> =
            expected.map(|values| values.into_iter().map(value).collect()).transpose()?;
        if expected.as_ref().is_some_and(|values| values.len() > usize::from(MAX_RUN)) {
            return Err(garbled("more values than a run has chunks"));
        }
        let start = ChunkIndex::new(start).map_err(garbled)?;
        Ok(PutChunks { id: ClientFileId::new(id), start, len, expected, body, way })
    }
}

type Served = AppState<Arc<dyn Workers>>;

/// What serves `workers` to other processes.
pub fn serve_workers(workers: Arc<dyn Workers>) -> Router {
    Router::new()
        .route(CREATE, post(create))
        .route(ADMIT_WHOLE, post(admit_whole))
        .route(CREATE_WHOLE, post(create_whole))
        .route(SETTLE, post(settle))
        .route(PUT, post(put))
        .route(STATUS, post(status))
        .route(LIST, post(list))
        .route(OPEN, post(open))
        .route(READ, post(read))
        .route(TREE, post(tree))
        .route(REMOVE, post(remove))
        .route(ABOUT, post(about))
        .route(DRAIN, post(drain))
        .route(LEAVING, post(leaving))
        .with_state(workers)
}

/// What serves to session services what they may ask of `workers`: where clients should go.
pub fn serve_leaving(workers: Arc<dyn Workers>) -> Router {
    Router::new().route(LEAVING, post(leaving)).with_state(workers)
}

/// What serves to other datacenters what they may ask of `workers`: to take what they pass on. Whatever a caller says, it
/// goes no further.
pub fn serve_passed(workers: Arc<dyn Workers>) -> Router {
    Router::new()
        .route(CREATE, post(create_passed))
        .route(CREATE_WHOLE, post(create_whole_passed))
        .route(PUT, post(put_passed))
        .with_state(workers)
}

async fn create_passed(workers: Served, mut call: Call<Create>) -> Answer<Created> {
    call.arguments.way = Way::Passed;
    create(workers, call).await
}

async fn create_whole_passed(workers: Served, mut call: Call<Create>) -> Answer<Created> {
    call.arguments.way = Way::Passed;
    create_whole(workers, call).await
}

async fn put_passed(workers: Served, mut flow: Flow<Put>) -> Answer<ChunkReceipt> {
    flow.arguments.way = Way::Passed;
    put(workers, flow).await
}

async fn create(AppState(workers): Served, call: Call<Create>) -> Answer<Created> {
    let answer = async {
        let (new, status) = workers.create(&call.context?, call.arguments.parse()?).await?;
        Ok(Created { new, status })
    };
    Answer(answer.await)
}

async fn admit_whole(AppState(workers): Served, call: Call<Whole>) -> Answer<Nothing> {
    let answer = async {
        let (id, len) = call.arguments.parse();
        workers.admit_whole(&call.context?, id, len).await
    };
    Answer(answer.await.map(|()| Nothing {}))
}

async fn create_whole(AppState(workers): Served, call: Call<Create>) -> Answer<Created> {
    let answer = async {
        let new = call.arguments.parse()?;
        let (new, status) = workers.create_whole(&call.context?, new, call.bytes).await?;
        Ok(Created { new, status })
    };
    Answer(answer.await)
}

async fn settle(AppState(workers): Served, call: Call<Settle>) -> Answer<FileStatus> {
    let answer = async {
        let (id, size) = call.arguments.parse()?;
        workers.settle(&call.context?, id, size).await
    };
    Answer(answer.await)
}

async fn put(AppState(workers): Served, flow: Flow<Put>) -> Answer<ChunkReceipt> {
    let answer = async { workers.put_chunks(&flow.context?, flow.arguments.parse(flow.body)?).await };
    Answer(answer.await)
}

async fn status(AppState(workers): Served, call: Call<Ask>) -> Answer<FileStatus> {
    let (id, wait) = call.arguments.parse();
    let answer = async { workers.status(&call.context?, id, wait).await };
    Answer(answer.await)
}

async fn list(AppState(workers): Served, call: Call<List>) -> Answer<FilePage> {
    let query = call.arguments.parse();
    let answer = async { workers.list(&call.context?, query).await };
    Answer(answer.await)
}

async fn open(AppState(workers): Served, call: Call<File>) -> Answer<WireOpened> {
    let answer = async { workers.open(&call.context?, call.arguments.parse()).await };
    Answer(answer.await.map(WireOpened::of))
}

async fn read(AppState(workers): Served, call: Call<Part>) -> Response {
    let (id, range) = call.arguments.parse();
    let answer = async { workers.read(&call.context?, id, range).await };
    bytes_answer(answer.await)
}

async fn tree(AppState(workers): Served, call: Call<Tree>) -> Answer<TreeNode> {
    let answer = async {
        let (id, place) = call.arguments.parse()?;
        workers.tree(&call.context?, id, place).await
    };
    Answer(answer.await)
}

async fn remove(AppState(workers): Served, call: Call<File>) -> Answer<Nothing> {
    let answer = async { workers.remove(&call.context?, call.arguments.parse()).await };
    Answer(answer.await.map(|()| Nothing {}))
}

async fn about(AppState(workers): Served, call: Call<Nothing>) -> Answer<About> {
    let answer = async { workers.about(&call.context?).await };
    Answer(answer.await)
}

async fn drain(AppState(workers): Served, call: Call<DrainOrder>) -> Answer<DrainStatus> {
    let answer = async { workers.drain(&call.context?, call.arguments).await };
    Answer(answer.await)
}

async fn leaving(AppState(workers): Served, _: Call<Nothing>) -> Answer<WireLeaving> {
    Answer(workers.leaving().await.map(WireLeaving::of))
}

/// The workers of other processes.
#[derive(Clone, Debug)]
pub struct RemoteWorkers(Caller);

impl RemoteWorkers {
    /// Asked by way of `caller`.
    pub fn new(caller: Caller) -> Self {
        Self(caller)
    }

    async fn ask<A: serde::de::DeserializeOwned>(
        &self,
        path: &'static str,
        context: &SignedContext,
        arguments: &impl Serialize,
    ) -> Result<A, Refusal> {
        Ok(self.0.ask(Head::of(path, context), arguments, Bytes::new(), Duration::ZERO).await?)
    }
}

#[async_trait]
impl Workers for RemoteWorkers {
    async fn create(&self, context: &SignedContext, new: NewFile) -> Result<(bool, FileStatus), Refusal> {
        let Created { new, status } = self.ask(CREATE, context, &Create::of(new)).await?;
        Ok((new, status))
    }

    async fn admit_whole(&self, context: &SignedContext, id: ClientFileId, len: u64) -> Result<(), Refusal> {
        self.ask::<Nothing>(ADMIT_WHOLE, context, &Whole::of(id, len)).await.map(|_| ())
    }

    async fn create_whole(
        &self,
        context: &SignedContext,
        new: NewFile,
        bytes: Bytes,
    ) -> Result<(bool, FileStatus), Refusal> {
        let arguments = Create::of(new);
        let Created { new, status } =
            self.0.ask(Head::of(CREATE_WHOLE, context), &arguments, bytes, Duration::ZERO).await?;
        Ok((new, status))
    }

    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        self.ask(SETTLE, context, &Settle::of(id, size)).await
    }

    async fn put_chunks(&self, context: &SignedContext, put: PutChunks) -> Result<ChunkReceipt, Refusal> {
        let PutChunks { id, start, len, expected, body, way } = put;
        let expected = expected.map(|values| values.iter().map(ToString::to_string).collect());
        let arguments = Put { id: id.uuid(), start: start.number(), len, expected, way };
        Ok(self.0.send(Head::of(PUT, context), &arguments, len, body, || {}).await?)
    }

    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        let longer = wait.map_or(Duration::ZERO, |wait| wait.timeout);
        Ok(self.0.ask(Head::of(STATUS, context), &Ask::of(id, wait), Bytes::new(), longer).await?)
    }

    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        self.ask(LIST, context, &List::of(query)).await
    }

    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal> {
        self.ask::<WireOpened>(OPEN, context, &File::of(id)).await?.parse()
    }

    async fn read(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<ByteStream, Refusal> {
        Ok(self.0.receive(Head::of(READ, context), &Part::of(id, range)).await?)
    }

    async fn tree(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<TreeNode, Refusal> {
        self.ask(TREE, context, &Tree::of(id, place)).await
    }

    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal> {
        self.ask::<Nothing>(REMOVE, context, &File::of(id)).await.map(|_| ())
    }

    async fn about(&self, context: &SignedContext) -> Result<About, Refusal> {
        self.ask(ABOUT, context, &Nothing {}).await
    }

    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        self.ask(DRAIN, context, &order).await
    }

    async fn leaving(&self) -> Result<Leaving, Refusal> {
        let asked = self.0.ask(Head::own(LEAVING), &Nothing {}, Bytes::new(), Duration::ZERO);
        Ok(WireLeaving::parse(asked.await?))
    }
}
