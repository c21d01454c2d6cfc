//! [`Slots`], from process to process.
//!
//! A worker asks the aggregator that has its store, and names its tenure with every call; any other aggregator refuses.
//! All of these calls may be repeated: whoever makes them again, because an answer was lost, is told the same. So a call
//! is made again, for a while, when nobody was reached, an answer was lost, or the aggregator is just being replaced: what
//! a client has sent must not be sent again for that.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::extract::{Request, State as AppState};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, FileId};
use sluice_engine::limits::{MAX_RUN, UNIT_CHUNKS};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::span::Place;
use sluice_node::clock::random_bytes;
use sluice_proto::calls::{Admission, ChunkSource, DrainOrder, ListQuery, Opened, Slots, Wait};
use sluice_proto::http::{About, DrainStatus, FilePage, FileStatus, TreeNode};
use sluice_proto::problem::{Problem, Refusal};
use tokio::time::Instant;
use uuid::Uuid;

use crate::call::{Answer, Call, bytes_answer, garbled, misunderstood, tenure};
use crate::caller::{Caller, Failed, Head};
use crate::forms::{Ask, Created, File, List, Nothing, Part, Settle, Tree, Whole, WireOpened};
use crate::tenure::{Tenure, Tenures};

const CREATE: &str = "/v1/slots/create";
const CREATE_WHOLE: &str = "/v1/slots/create-whole";
const SETTLE: &str = "/v1/slots/settle";
const ADMIT_MORE: &str = "/v1/slots/admit-more";
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

/// For how long a call is made again: as long as it takes another aggregator to be there, and a little more.
const TRY_FOR: Duration = Duration::from_secs(8);

/// The shortest and the longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

#[derive(Serialize, Deserialize)]
struct Create {
    /// The metadata record, in base64.
    record: String,
    home: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct FileOf {
    /// The file's id inside.
    file: String,
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
    fn of(record: &MetadataRecord, home: Option<String>) -> Self {
        Self { record: STANDARD.encode(record.to_bytes()), home }
    }

    fn parse(self) -> Result<(MetadataRecord, Option<String>), Refusal> {
        let record = STANDARD.decode(self.record).map_err(garbled)?;
        Ok((MetadataRecord::from_bytes(&record).map_err(garbled)?, self.home))
    }
}

impl FileOf {
    fn of(file: FileId) -> Self {
        Self { file: file.to_string() }
    }

    fn parse(&self) -> Result<FileId, Refusal> {
        self.file.parse().map_err(garbled)
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

/// What serves `slots` to the workers whose store is theirs under `held`.
pub fn serve_slots(slots: Arc<dyn Slots>, held: Tenure) -> Router {
    Router::new()
        .route(CREATE, post(create))
        .route(CREATE_WHOLE, post(create_whole))
        .route(SETTLE, post(settle))
        .route(ADMIT_MORE, post(admit_more))
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
        .layer(middleware::from_fn_with_state(held, under))
}

/// Refuses whoever has another tenure in mind: one of the two is late.
async fn under(AppState(held): AppState<Tenure>, request: Request, next: Next) -> Response {
    if tenure(request.headers()) == Some(held) {
        next.run(request).await
    } else {
        let late = Refusal::new(Problem::Stopping, "this aggregator does not have the worker's store");
        Answer::<()>(Err(late)).into_response()
    }
}

async fn create(AppState(slots): Served, call: Call<Create>) -> Answer<Created> {
    let answer = async {
        let (record, home) = call.arguments.parse()?;
        let (new, status) = slots.create(&call.context?, record, home).await?;
        Ok(Created { new, status })
    };
    Answer(answer.await)
}

async fn create_whole(AppState(slots): Served, call: Call<Create>) -> Answer<Option<Created>> {
    let answer = async {
        let (record, _) = call.arguments.parse()?;
        let created = slots.create_whole(&call.context?, record, call.bytes).await?;
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

async fn admit_more(AppState(slots): Served, call: Call<Whole>) -> Answer<Nothing> {
    let answer = async {
        let (id, bytes) = call.arguments.parse();
        slots.admit_more(&call.context?, id, bytes).await
    };
    Answer(answer.await.map(|()| Nothing {}))
}

async fn admit(AppState(slots): Served, call: Call<FileOf>) -> Answer<WireAdmission> {
    let answer = async {
        Ok(match slots.admit(&call.context?, call.arguments.parse()?).await? {
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

async fn drain(AppState(slots): Served, call: Call<DrainOrder>) -> Answer<DrainStatus> {
    let answer = async { slots.drain(&call.context?, call.arguments).await };
    Answer(answer.await)
}

async fn about(AppState(slots): Served, call: Call<Nothing>) -> Answer<About> {
    let answer = async { slots.about(&call.context?).await };
    Answer(answer.await)
}

/// The slots of another process: of the aggregator that has this process's store.
#[derive(Clone, Debug)]
pub struct RemoteSlots {
    caller: Caller,
    tenures: Tenures,
}

impl RemoteSlots {
    /// Asked by way of `caller`, under the tenure that stands in `tenures`.
    pub fn new(caller: Caller, tenures: Tenures) -> Self {
        Self { caller, tenures }
    }

    async fn ask<A: DeserializeOwned>(
        &self,
        path: &'static str,
        context: &SignedContext,
        arguments: &impl Serialize,
    ) -> Result<A, Refusal> {
        self.ask_with(Head::of(path, context), arguments, Bytes::new(), Duration::ZERO).await
    }

    async fn ask_with<A: DeserializeOwned>(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        bytes: Bytes,
        longer: Duration,
    ) -> Result<A, Refusal> {
        let answer = self.ask_bytes(call, arguments, bytes, longer).await?;
        serde_json::from_slice(&answer).map_err(misunderstood)
    }

    /// Makes a call, again and again for a while.
    async fn ask_bytes(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        bytes: Bytes,
        longer: Duration,
    ) -> Result<Bytes, Refusal> {
        let until = Instant::now() + TRY_FOR;
        let mut pause = PAUSES.0;
        loop {
            let tenure = self.tenure(until).await?;
            let mut current = self.tenures.watch();
            let answer = tokio::select! {
                answer = self.caller.ask_bytes(call.under(tenure), arguments, bytes.clone(), longer) => answer,
                // One that hangs answers nobody, and another has the store now.
                _ = current.wait_for(|now| *now != Some(tenure)) => Err(Failed::Unknown(no_aggregator())),
            };
            let failed = match answer {
                Ok(answer) => return Ok(answer),
                Err(Failed::Refused(refusal)) if refusal.problem != Problem::Stopping => return Err(refusal),
                Err(failed) => Refusal::from(failed),
            };
            if Instant::now() + pause >= until {
                return Err(failed);
            }
            // Up to half as much again, so that many do not come back in step.
            let jitter = u32::from(random_bytes::<1>()[0]);
            tokio::time::sleep(pause + pause * jitter / 512).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// The tenure that stands, or comes until then.
    async fn tenure(&self, until: Instant) -> Result<Tenure, Refusal> {
        let mut current = self.tenures.watch();
        let found = current.wait_for(Option::is_some);
        match tokio::time::timeout_at(until, found).await {
            Ok(Ok(found)) => found.ok_or_else(no_aggregator),
            Ok(Err(_)) | Err(_) => Err(no_aggregator()),
        }
    }
}

fn no_aggregator() -> Refusal {
    Refusal::new(Problem::Unavailable, "no aggregator of this datacenter has the store now")
}

#[async_trait]
impl Slots for RemoteSlots {
    async fn create(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        home: Option<String>,
    ) -> Result<(bool, FileStatus), Refusal> {
        let Created { new, status } = self.ask(CREATE, context, &Create::of(&record, home)).await?;
        Ok((new, status))
    }

    async fn create_whole(
        &self,
        context: &SignedContext,
        record: MetadataRecord,
        bytes: Bytes,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        let arguments = Create::of(&record, None);
        let call = Head::of(CREATE_WHOLE, context);
        let created: Option<Created> = self.ask_with(call, &arguments, bytes, Duration::ZERO).await?;
        Ok(created.map(|Created { new, status }| (new, status)))
    }

    async fn settle(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        self.ask(SETTLE, context, &Settle::of(id, size)).await
    }

    async fn admit_more(&self, context: &SignedContext, id: ClientFileId, bytes: u64) -> Result<(), Refusal> {
        self.ask::<Nothing>(ADMIT_MORE, context, &Whole::of(id, bytes)).await.map(|_| ())
    }

    async fn admit(&self, context: &SignedContext, file: FileId) -> Result<Admission, Refusal> {
        Ok(match self.ask(ADMIT, context, &FileOf::of(file)).await? {
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
        self.ask(REGISTER, context, &arguments).await
    }

    async fn status(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        let longer = wait.map_or(Duration::ZERO, |wait| wait.timeout);
        self.ask_with(Head::of(STATUS, context), &Ask::of(id, wait), Bytes::new(), longer).await
    }

    async fn list(&self, context: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        self.ask(LIST, context, &List::of(query)).await
    }

    async fn open(&self, context: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal> {
        self.ask::<WireOpened>(OPEN, context, &File::of(id)).await?.parse()
    }

    async fn locate(
        &self,
        context: &SignedContext,
        id: ClientFileId,
        range: Range<u64>,
    ) -> Result<Vec<ChunkSource>, Refusal> {
        let sources: Vec<(String, bool)> = self.ask(LOCATE, context, &Part::of(id, range)).await?;
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
        self.ask_bytes(Head::of(FETCH, context), &arguments, Bytes::new(), Duration::ZERO).await
    }

    async fn report_damage(&self, file: FileId, index: ChunkIndex) {
        let arguments = Damage { file: file.to_string(), index: index.number() };
        let call = Head::own(REPORT_DAMAGE);
        let told = self.ask_with::<Nothing>(call, &arguments, Bytes::new(), Duration::ZERO).await;
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
        self.ask(TREE, context, &Tree::of(id, place)).await
    }

    async fn remove(&self, context: &SignedContext, id: ClientFileId) -> Result<(), Refusal> {
        self.ask::<Nothing>(REMOVE, context, &File::of(id)).await.map(|_| ())
    }

    async fn drain(&self, context: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        self.ask(DRAIN, context, &order).await
    }

    async fn about(&self, context: &SignedContext) -> Result<About, Refusal> {
        self.ask(ABOUT, context, &Nothing {}).await
    }
}
