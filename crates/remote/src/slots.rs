//! [`Slots`], from process to process: a worker asks the aggregator that has a share of its store (`owner.rs`).

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::extract::State as AppState;
use axum::response::Response;
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, FileId};
use sluice_engine::limits::{MAX_RUN, UNIT_CHUNKS};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use sluice_engine::span::Place;
use sluice_proto::calls::{Admission, ChunkSource, DrainOrder, ListQuery, Opened, Slots, Used, Wait};
use sluice_proto::http::{About, DrainStatus, FilePage, FileStatus, TreeNode};
use sluice_proto::problem::Refusal;
use uuid::Uuid;

use crate::call::{Answer, Call, bytes_answer, garbled, misunderstood};
use crate::caller::{Caller, Head};
use crate::forms::{Ask, Created, File, List, Nothing, Part, Settle, Tree, Whole, WireOpened};
use crate::owner::Owner;
use crate::tenure::Tenures;

const CREATE: &str = "/v1/slots/create";
const CREATE_WHOLE: &str = "/v1/slots/create-whole";
const SETTLE: &str = "/v1/slots/settle";
const ADMIT_MORE: &str = "/v1/slots/admit-more";
const USED: &str = "/v1/slots/used";
const ADMIT: &str = "/v1/slots/admit";
const REGISTER: &str = "/v1/slots/register";
const STATUS: &str = "/v1/slots/status";
const LIST: &str = "/v1/slots/list";
const OPEN: &str = "/v1/slots/open";
const LOCATE: &str = "/v1/slots/locate";
const FETCH: &str = "/v1/slots/fetch";
const REPORT_DAMAGE: &str = "/v1/slots/report-damage";
const TREE: &str = "/v1/slots/tree";
const REMOVE: &str = "/v1/slots/remove";
const ABOUT: &str = "/v1/slots/about";
const DRAIN: &str = "/v1/slots/drain";

#[derive(Serialize, Deserialize)]
struct Create {
    /// The metadata record, in base64.
    record: String,
    home: Option<String>,
    #[serde(default)]
    beside: Used,
}

#[derive(Serialize, Deserialize)]
struct FileOf {
    /// The file's id inside.
    file: String,
    #[serde(default)]
    beside: Used,
}

#[derive(Serialize, Deserialize)]
struct More {
    #[serde(flatten)]
    whole: Whole,
    #[serde(default)]
    beside: Used,
}

#[derive(Serialize, Deserialize)]
struct Use {
    file: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Register {
    file: String,
    start: u64,
    /// In hexadecimal digits.
    values: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Chunk {
    id: Uuid,
    index: u64,
    value: String,
}

#[derive(Serialize, Deserialize)]
struct Damage {
    file: String,
    index: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WireAdmission {
    Known(u64),
    Open,
    Provisional,
}

impl Create {
    fn of(record: &MetadataRecord, home: Option<String>, beside: Used) -> Self {
        Self { record: STANDARD.encode(record.to_bytes()), home, beside }
    }

    fn parse(self) -> Result<(MetadataRecord, Option<String>, Used), Refusal> {
        let record = STANDARD.decode(self.record).map_err(garbled)?;
        Ok((MetadataRecord::from_bytes(&record).map_err(garbled)?, self.home, self.beside))
    }
}

impl FileOf {
    fn of(file: FileId, beside: Used) -> Self {
        Self { file: file.to_string(), beside }
    }

    fn parse(&self) -> Result<(FileId, Used), Refusal> {
        Ok((self.file.parse().map_err(garbled)?, self.beside))
    }
}

impl Register {
    fn parse(self) -> Result<(FileId, Run, Vec<ChainingValue>), Refusal> {
        let file = self.file.parse().map_err(garbled)?;
        if self.values.len() > usize::from(MAX_RUN) {
            return Err(garbled("more values than a run has chunks"));
        }
        let start = ChunkIndex::new(self.start).map_err(garbled)?;
        let run = Run::new(start, self.values.len() as u64).map_err(garbled)?;
        let values = self.values.iter().map(|value| value.parse().map_err(garbled));
        Ok((file, run, values.collect::<Result<_, _>>()?))
    }
}

type Served = AppState<Arc<dyn Slots>>;

/// What serves `slots` to workers: to be [owned](crate::Owned) under a tenure; or to porters.
pub fn serve_slots(slots: Arc<dyn Slots>) -> Router {
    Router::new()
        .route(CREATE, post(create))
        .route(CREATE_WHOLE, post(create_whole))
        .route(SETTLE, post(settle))
        .route(ADMIT_MORE, post(admit_more))
        .route(USED, post(used))
        .route(ADMIT, post(admit))
        .route(REGISTER, post(register))
        .route(STATUS, post(status))
        .route(LIST, post(list))
        .route(OPEN, post(open))
        .route(LOCATE, post(locate))
        .route(FETCH, post(fetch))
        .route(REPORT_DAMAGE, post(report_damage))
        .route(TREE, post(tree))
        .route(REMOVE, post(remove))
        .route(ABOUT, post(about))
        .route(DRAIN, post(drain))
        .with_state(slots)
}

async fn create(AppState(slots): Served, call: Call<Create>) -> Answer<Created> {
    let answer = async {
        let (record, home, beside) = call.arguments.parse()?;
        let (new, status) = slots.create(&call.context?, record, home, beside).await?;
        Ok(Created { new, status })
    };
    Answer(answer.await)
}

async fn create_whole(AppState(slots): Served, call: Call<Create>) -> Answer<Option<Created>> {
    let answer = async {
        let (record, _, beside) = call.arguments.parse()?;
        let created = slots.create_whole(&call.context?, record, call.bytes, beside).await?;
        Ok(created.map(|(new, status)| Created { new, status }))
    };
    Answer(answer.await)
}

async fn settle(AppState(slots): Served, call: Call<Settle>) -> Answer<FileStatus> {
    let answer = async {
        let (id, size) = call.arguments.parse()?;
        slots.settle(&call.context?, id, size).await
    };
    Answer(answer.await)
}

async fn admit_more(AppState(slots): Served, call: Call<More>) -> Answer<Nothing> {
    let answer = async {
        let More { whole, beside } = call.arguments;
        let (id, bytes) = whole.parse();
        slots.admit_more(&call.context?, id, bytes, beside).await
    };
    Answer(answer.await.map(|()| Nothing {}))
}

async fn admit(AppState(slots): Served, call: Call<FileOf>) -> Answer<WireAdmission> {
    let answer = async {
        let (file, beside) = call.arguments.parse()?;
        Ok(match slots.admit(&call.context?, file, beside).await? {
            Admission::Known(shape) => WireAdmission::Known(shape.size()),
            Admission::Open => WireAdmission::Open,
            Admission::Provisional => WireAdmission::Provisional,
        })
    };
    Answer(answer.await)
}

async fn register(AppState(slots): Served, call: Call<Register>) -> Answer<bool> {
    let answer = async {
        let (file, run, values) = call.arguments.parse()?;
        slots.register(&call.context?, file, run, &values).await
    };
    Answer(answer.await)
}

async fn status(AppState(slots): Served, call: Call<Ask>) -> Answer<FileStatus> {
    let (id, wait) = call.arguments.parse();
    let answer = async { slots.status(&call.context?, id, wait).await };
    Answer(answer.await)
}

async fn list(AppState(slots): Served, call: Call<List>) -> Answer<FilePage> {
    let query = call.arguments.parse();
    let answer = async { slots.list(&call.context?, query).await };
    Answer(answer.await)
}

async fn open(AppState(slots): Served, call: Call<File>) -> Answer<WireOpened> {
    let answer = async { slots.open(&call.context?, call.arguments.parse()).await };
    Answer(answer.await.map(WireOpened::of))
}

async fn locate(AppState(slots): Served, call: Call<Part>) -> Answer<Vec<(String, bool)>> {
    let (id, range) = call.arguments.parse();
    let answer = async {
        let sources = slots.locate(&call.context?, id, range).await?;
        Ok(sources.iter().map(|source| (source.value.to_string(), source.local)).collect())
    };
    Answer(answer.await)
}

async fn fetch(AppState(slots): Served, call: Call<Chunk>) -> Response {
    let answer = async {
        let Chunk { id, index, value } = call.arguments;
        let (index, value) = (ChunkIndex::new(index).map_err(garbled)?, value.parse().map_err(garbled)?);
        let bytes = slots.fetch(&call.context?, ClientFileId::new(id), index, value).await?;
        Ok(stream::once(async move { Ok(bytes) }).boxed())
    };
    bytes_answer(answer.await)
}

async fn report_damage(AppState(slots): Served, call: Call<Damage>) -> Answer<Nothing> {
    let answer = async {
        let file = call.arguments.file.parse().map_err(garbled)?;
        slots.report_damage(file, ChunkIndex::new(call.arguments.index).map_err(garbled)?).await;
        Ok(Nothing {})
    };
    Answer(answer.await)
}

async fn tree(AppState(slots): Served, call: Call<Tree>) -> Answer<TreeNode> {
    let answer = async {
        let (id, place) = call.arguments.parse()?;
        slots.tree(&call.context?, id, place).await
    };
    Answer(answer.await)
}

async fn remove(AppState(slots): Served, call: Call<File>) -> Answer<Nothing> {
    let answer = async { slots.remove(&call.context?, call.arguments.parse()).await };
    Answer(answer.await.map(|()| Nothing {}))
}

async fn used(AppState(slots): Served, call: Call<Use>) -> Answer<Used> {
    let answer = async {
        let file = call.arguments.file.map(|file| file.parse().map_err(garbled)).transpose()?;
        slots.used(&call.context?, file).await
    };
    Answer(answer.await)
}

async fn drain(AppState(slots): Served, call: Call<DrainOrder>) -> Answer<DrainStatus> {
    let answer = async { slots.drain(&call.context?, call.arguments).await };
    Answer(answer.await)
}

async fn about(AppState(slots): Served, call: Call<Nothing>) -> Answer<About> {
    let answer = async { slots.about(&call.context?).await };
    Answer(answer.await)
}

/// The slots of another process: of whichever has a share of this process's store.
#[derive(Clone, Debug)]
pub struct RemoteSlots(Owner);

impl RemoteSlots {
    /// Those of a share, asked by way of `caller`, under the tenure that stands in `tenures`.
    pub fn new(caller: Caller, tenures: Tenures, share: Share) -> Self {
        Self(Owner::new(caller, tenures, share))
    }

    /// Those that the worker asks which keeps the bucket, by way of `caller`.
    pub fn of_keeper(caller: Caller) -> Self {
        Self(Owner::keeper(caller))
    }
}

#[async_trait]
impl Slots for RemoteSlots {
    async fn create(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        home: Option<String>,
        beside: Used,
    ) -> Result<(bool, FileStatus), Refusal> {
        let Created { new, status } = self.0.ask(CREATE, context, &Create::of(&record, home, beside)).await?;
        Ok((new, status))
    }

    async fn create_whole(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        bytes: Bytes,
        beside: Used,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        let arguments = Create::of(&record, None, beside);
        let call = Head::of(CREATE_WHOLE, context);
        let created: Option<Created> = self.0.ask_with(call, &arguments, bytes, Duration::ZERO).await?;
        Ok(created.map(|Created { new, status }| (new, status)))
    }

    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        self.0.ask(SETTLE, context, &Settle::of(id, size)).await
    }

    async fn admit_more(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        bytes: u64,
        beside: Used,
    ) -> Result<(), Refusal> {
        let more = More { whole: Whole::of(id, bytes), beside };
        self.0.ask::<Nothing>(ADMIT_MORE, context, &more).await.map(|_| ())
    }

    async fn used(&self, context: &SignedContext, file: Option<FileId>) -> Result<Used, Refusal> {
        self.0.ask(USED, context, &Use { file: file.map(|file| file.to_string()) }).await
    }

    async fn admit(&self, context: &SignedContext, file: FileId, beside: Used) -> Result<Admission, Refusal> {
        Ok(match self.0.ask(ADMIT, context, &FileOf::of(file, beside)).await? {
            WireAdmission::Known(size) => Admission::Known(Geometry::new(size).map_err(misunderstood)?),
            WireAdmission::Open => Admission::Open,
            WireAdmission::Provisional => Admission::Provisional,
        })
    }

    async fn register(
        &self,
        context: &SignedContext,
        file: FileId,
        run: Run,
        values: &[ChainingValue],
    ) -> Result<bool, Refusal> {
        let values = values.iter().map(ToString::to_string).collect();
        let arguments = Register { file: file.to_string(), start: run.start().number(), values };
        self.0.ask(REGISTER, context, &arguments).await
    }

    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        let longer = wait.map_or(Duration::ZERO, |wait| wait.timeout);
        self.0.ask_with(Head::of(STATUS, context), &Ask::of(id, wait), Bytes::new(), longer).await
    }

    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        self.0.ask(LIST, context, &List::of(query)).await
    }

    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal> {
        self.0.ask::<WireOpened>(OPEN, context, &File::of(id)).await?.parse()
    }

    async fn locate(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<Vec<ChunkSource>, Refusal> {
        let sources: Vec<(String, bool)> = self.0.ask(LOCATE, context, &Part::of(id, range)).await?;
        if sources.len() as u64 > UNIT_CHUNKS {
            return Err(misunderstood("more chunks than a unit has"));
        }
        let parse = |(value, local): (String, bool)| {
            Ok(ChunkSource { value: value.parse().map_err(misunderstood)?, local })
        };
        sources.into_iter().map(parse).collect()
    }

    async fn fetch(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        index: ChunkIndex,
        value: ChainingValue,
    ) -> Result<Bytes, Refusal> {
        let arguments = Chunk { id: id.uuid(), index: index.number(), value: value.to_string() };
        self.0.ask_bytes(Head::of(FETCH, context), &arguments, Bytes::new(), Duration::ZERO).await
    }

    async fn report_damage(&self, file: FileId, index: ChunkIndex) {
        let arguments = Damage { file: file.to_string(), index: index.number() };
        let call = Head::own(REPORT_DAMAGE);
        let told = self.0.ask_with::<Nothing>(call, &arguments, Bytes::new(), Duration::ZERO).await;
        if let Err(refusal) = told {
            // The scrub finds it again.
            tracing::warn!(%file, %index, %refusal, "a damaged chunk could not be reported");
        }
    }

    async fn tree(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        place: Place,
    ) -> Result<TreeNode, Refusal> {
        self.0.ask(TREE, context, &Tree::of(id, place)).await
    }

    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal> {
        self.0.ask::<Nothing>(REMOVE, context, &File::of(id)).await.map(|_| ())
    }

    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        self.0.ask(DRAIN, context, &order).await
    }

    async fn about(&self, context: &SignedContext) -> Result<About, Refusal> {
        self.0.ask(ABOUT, context, &Nothing {}).await
    }
}
