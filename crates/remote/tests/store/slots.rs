//! What a worker asks the aggregator that has its store: what comes through, and who answers.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::{ChunkIndex, Geometry, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, FileId, TenantId};
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::share::Share;
use sluice_engine::span::Place as Node;
use sluice_node::access::Revocations;
use sluice_node::budget::MemoryBudget;
use sluice_node::clock::SystemClock;
use sluice_node::metrics::Metrics;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_node::token::TokenGrant;
use sluice_proto::calls::{
    Admission, ChunkSource, DrainOrder, ListQuery, Opened, Sessions, Slots, Used, Wait,
};
use sluice_proto::http::{About, DrainStatus, FilePage, FileStatus, TreeNode};
use sluice_proto::problem::{Problem, Refusal};
use sluice_remote::{Answers, Caller, CallerConfig, Door, Owned, RemoteSlots, Tenure, serve_slots};
use sluice_session::MemorySessions;
use sluice_store::ChunkStore;
use tokio::net::TcpSocket;

use crate::material::{client, content, file, index, record, values};
use crate::place::{ME, Place};

/// Slots that say what they were asked.
#[derive(Default)]
struct Fake {
    admission: Mutex<Option<Admission>>,
    reported: Mutex<Vec<(FileId, ChunkIndex)>>,
}

fn said<T>(what: String) -> Result<T, Refusal> {
    Err(Refusal::new(Problem::InvalidMetadata, what))
}

#[async_trait]
impl Slots for Fake {
    async fn create(
        &self,
        _: &SignedContext,
        record: MetadataRecord,
        home: Option<String>,
        beside: Used,
    ) -> Result<(bool, FileStatus), Refusal> {
        said(format!("{record:?} {home:?} {beside:?}"))
    }
    async fn create_whole(
        &self,
        _: &SignedContext,
        record: MetadataRecord,
        bytes: Bytes,
        _: Used,
    ) -> Result<Option<(bool, FileStatus)>, Refusal> {
        if bytes.is_empty() { Ok(None) } else { said(format!("{record:?} {}", bytes.len())) }
    }
    async fn settle(
        &self,
        _: &SignedContext,
        id: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        said(format!("{id} {}", size.size()))
    }
    async fn admit_more(
        &self,
        _: &SignedContext,
        id: ClientFileId,
        bytes: u64,
        beside: Used,
    ) -> Result<(), Refusal> {
        said(format!("{id} {bytes} {beside:?}"))
    }
    async fn used(&self, _: &SignedContext, file: Option<FileId>) -> Result<Used, Refusal> {
        Ok(Used { has: file.is_some(), ..BESIDE })
    }
    async fn admit(&self, _: &SignedContext, file: FileId, _: Used) -> Result<Admission, Refusal> {
        let admission = *self.admission.lock().unwrap();
        admission.map_or_else(|| said(file.to_string()), Ok)
    }
    async fn register(
        &self,
        _: &SignedContext,
        file: FileId,
        run: Run,
        values: &[ChainingValue],
    ) -> Result<bool, Refusal> {
        said(format!("{file} {run:?} {values:?}"))
    }
    async fn status(
        &self,
        _: &SignedContext,
        id: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        said(format!("{id} {wait:?}"))
    }
    async fn list(&self, _: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        Ok(FilePage { files: Vec::new(), next: query.after.map(|id| id.uuid()) })
    }
    async fn open(&self, _: &SignedContext, id: ClientFileId) -> Result<Opened, Refusal> {
        said(id.to_string())
    }
    async fn locate(
        &self,
        _: &SignedContext,
        _: ClientFileId,
        range: Range<u64>,
    ) -> Result<Vec<ChunkSource>, Refusal> {
        let source =
            |at: u64| ChunkSource { value: ChainingValue::from_bytes([at as u8; 32]), local: at % 2 == 1 };
        Ok(range.map(source).collect())
    }
    async fn fetch(
        &self,
        _: &SignedContext,
        _: ClientFileId,
        index: ChunkIndex,
        _: ChainingValue,
    ) -> Result<Bytes, Refusal> {
        Ok(content(index.number(), 1 << 20))
    }
    async fn report_damage(&self, file: FileId, index: ChunkIndex) {
        self.reported.lock().unwrap().push((file, index));
    }
    async fn tree(&self, _: &SignedContext, id: ClientFileId, place: Node) -> Result<TreeNode, Refusal> {
        said(format!("{id} {place}"))
    }
    async fn remove(&self, _: &SignedContext, _: ClientFileId) -> Result<(), Refusal> {
        Ok(())
    }
    async fn about(&self, _: &SignedContext) -> Result<About, Refusal> {
        Ok(About { cluster: "test".into(), dc: "dc-a".into(), dcs: Vec::new(), version: "1".into() })
    }
    async fn drain(&self, _: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        said(format!("{order:?}"))
    }
}

/// A port that nobody else is given.
fn reserve() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket
}

/// What a tenant has in other shares.
const BESIDE: Used = Used { bytes: 5, files: 6, has: false };

/// An aggregator that answers at `at` under a tenure.
fn answer(place: &Place, at: &TcpSocket, fake: &Arc<Fake>, tenure: Tenure) -> Shutdown {
    let tasks = Shutdown::new();
    let door = Door::bind(at.local_addr().unwrap(), &place.material, ME, Role::Aggregator).unwrap();
    let (owned, memory) = (Owned::default(), MemoryBudget::new(64 << 20));
    owned.add(tenure, serve_slots(fake.clone()), tasks.clone());
    let routes = owned.routes();
    door.serve([(Role::Worker, Answers { routes, memory, tasks: tasks.clone() })], &tasks);
    tasks
}

fn caller(place: &Place, me: Role, at: &[&TcpSocket]) -> Caller {
    let at: Vec<String> = at.iter().map(|at| at.local_addr().unwrap().to_string()).collect();
    let (address, patience) = (at.join(","), Duration::from_secs(20));
    let config = CallerConfig { dc: ME, of: ME, me, whom: Role::Aggregator, address, patience };
    Caller::new(config, &place.material, &Shutdown::new(), &Metrics::new("dc-a").outgoing_calls).unwrap()
}

async fn context(place: &Place) -> SignedContext {
    let clock = SystemClock::shared();
    let sessions = MemorySessions::new(ME, &place.material, clock.clone(), Revocations::new()).unwrap();
    let grant = TokenGrant::everything(TenantId::new(7), "seven", Duration::from_secs(600));
    let token = place.material.token_mint().unwrap().mint(&grant, clock.now()).unwrap();
    sessions.context(&token).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_worker_asks_comes_through_as_it_is() {
    let (place, at, fake) = (Place::new(), reserve(), Arc::new(Fake::default()));
    let (_, tenures) = place.start();
    let held = place.take().await.unwrap();
    let _answers = answer(&place, &at, &fake, held.tenure());
    let slots = RemoteSlots::new(caller(&place, Role::Worker, &[&at]), tenures.clone(), Share::WHOLE);
    let context = &context(&place).await;
    let detail = |refusal: Refusal| {
        assert_eq!(refusal.problem, Problem::InvalidMetadata);
        refusal.detail
    };
    let new = record(1, Some(9));
    let created = slots.create(context, new.clone(), Some("dc-b".into()), BESIDE).await.unwrap_err();
    assert_eq!(detail(created), format!("{new:?} {:?} {BESIDE:?}", Some("dc-b")));
    assert!(slots.create_whole(context, new.clone(), Bytes::new(), BESIDE).await.unwrap().is_none());
    let whole = slots.create_whole(context, new.clone(), content(1, 1 << 20), BESIDE).await.unwrap_err();
    assert_eq!(detail(whole), format!("{new:?} 1048576"));
    let size = Geometry::new(9).unwrap();
    assert_eq!(detail(slots.settle(context, client(1), size).await.unwrap_err()), format!("{} 9", client(1)));
    assert_eq!(
        detail(slots.admit_more(context, client(1), 9, BESIDE).await.unwrap_err()),
        format!("{} 9 {BESIDE:?}", client(1))
    );
    assert_eq!(slots.used(context, None).await.unwrap(), BESIDE);
    assert!(slots.used(context, Some(file(1))).await.unwrap().has);
    assert_eq!(detail(slots.admit(context, file(1), BESIDE).await.unwrap_err()), file(1).to_string());
    for admission in [Admission::Known(size), Admission::Open, Admission::Provisional] {
        *fake.admission.lock().unwrap() = Some(admission);
        assert_eq!(slots.admit(context, file(1), BESIDE).await.unwrap(), admission);
    }
    let (run, of_run) = (Run::new(index(8), 2).unwrap(), values(8, &content(1, 2 << 20)));
    let registered = slots.register(context, file(1), run, &of_run).await.unwrap_err();
    assert_eq!(detail(registered), format!("{} {run:?} {of_run:?}", file(1)));
    let listed = ListQuery { state: None, after: Some(client(3)), limit: 5 };
    assert_eq!(slots.list(context, listed).await.unwrap().next, Some(client(3).uuid()));
    let sources = slots.locate(context, client(1), 7..9).await.unwrap();
    assert_eq!(sources.iter().map(|source| source.local).collect::<Vec<_>>(), [true, false]);
    assert_eq!(sources[1].value, ChainingValue::from_bytes([8; 32]));
    let fetched = slots.fetch(context, client(1), index(5), of_run[0]).await.unwrap();
    assert!(fetched == content(5, 1 << 20));
    slots.report_damage(file(1), index(4)).await;
    assert_eq!(*fake.reported.lock().unwrap(), [(file(1), index(4))]);
    let place_of = Node::new(64, 6).unwrap();
    let tree = slots.tree(context, client(1), place_of).await.unwrap_err();
    assert_eq!(detail(tree), format!("{} {place_of}", client(1)));
    slots.remove(context, client(1)).await.unwrap();
    assert_eq!(slots.about(context).await.unwrap().dc, "dc-a");
    let refused = slots.drain(context, DrainOrder::End).await.unwrap_err();
    assert_eq!(refused.detail, "End");
    // An edge asks workers, and no aggregator.
    let stranger = RemoteSlots::new(caller(&place, Role::Edge, &[&at]), tenures, Share::WHOLE);
    assert_eq!(stranger.about(context).await.unwrap_err().problem, Problem::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_waits_for_the_aggregator_that_has_the_store_and_believes_no_other() {
    let (place, one, other, fake) = (Place::new(), reserve(), reserve(), Arc::new(Fake::default()));
    let (_, tenures) = place.start();
    let caller = caller(&place, Role::Worker, &[&one, &other]);
    let slots = Arc::new(RemoteSlots::new(caller, tenures, Share::WHOLE));
    let context = context(&place).await;
    // Nobody has the store yet.
    let asked = tokio::spawn({
        let (slots, context) = (slots.clone(), context.clone());
        async move { slots.about(&context).await }
    });
    let first = place.take().await.unwrap();
    let answers = answer(&place, &one, &fake, first.tenure());
    assert_eq!(asked.await.unwrap().unwrap().dc, "dc-a");
    // Another has it, and this one does not know yet.
    first.close().await.unwrap();
    let second = place.take().await.unwrap();
    let asked = tokio::spawn({
        let (slots, context) = (slots.clone(), context.clone());
        async move { slots.admit(&context, file(1), Used::default()).await }
    });
    let known = Arc::new(Fake::default());
    *known.admission.lock().unwrap() = Some(Admission::Open);
    *fake.admission.lock().unwrap() = Some(Admission::Provisional);
    let _answers = answer(&place, &other, &known, second.tenure());
    // What that one is asked it refuses, and is not asked again, though it is there.
    assert_eq!(asked.await.unwrap().unwrap(), Admission::Open);
    answers.kill().await;
}
