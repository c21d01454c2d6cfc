//! Calls between processes, over real TLS: what comes through, what does not, and who is let in.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use sluice_engine::context::SignedContext;
use sluice_engine::drain::Phase;
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, DcId, TenantId, Timestamp};
use sluice_engine::metadata::MetadataFields;
use sluice_engine::span::Place;
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::budget::MemoryBudget;
use sluice_node::clock::{ManualClock, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls;
use sluice_node::token::TokenGrant;
use sluice_proto::calls::{
    ByteStream, DrainOrder, Leaving, ListQuery, NewFile, Opened, PutChunks, Sessions, Wait, Way, Workers,
};
use sluice_proto::http::{About, ChunkReceipt, DrainStatus, FilePage, FileStatus, TreeNode};
use sluice_proto::problem::{Problem, Refusal};
use sluice_remote::{
    Answers, Caller, CallerConfig, Door, MovingSessions, RemoteSessions, RemoteWorkers, serve_passed,
    serve_sessions, serve_workers,
};
use sluice_session::MemorySessions;
use uuid::Uuid;

const ME: DcId = DcId::new(1);
const OTHER: DcId = DcId::new(2);

/// Who has nothing to ask whom in one datacenter: the first the second.
const ASKS_NOTHING: [(Role, Role); 10] = [
    (Role::Edge, Role::Edge),
    (Role::Session, Role::Edge),
    (Role::Worker, Role::Edge),
    (Role::Aggregator, Role::Edge),
    (Role::Session, Role::Session),
    (Role::Worker, Role::Session),
    (Role::Aggregator, Role::Session),
    (Role::Edge, Role::Aggregator),
    (Role::Session, Role::Aggregator),
    (Role::Aggregator, Role::Aggregator),
];

/// Who passes nothing on to whom in another datacenter.
const PASSES_NOTHING: [(Role, Role); 12] = [
    (Role::Edge, Role::Edge),
    (Role::Session, Role::Edge),
    (Role::Worker, Role::Edge),
    (Role::Aggregator, Role::Edge),
    (Role::Edge, Role::Session),
    (Role::Aggregator, Role::Session),
    (Role::Edge, Role::Worker),
    (Role::Aggregator, Role::Worker),
    (Role::Edge, Role::Aggregator),
    (Role::Session, Role::Aggregator),
    (Role::Worker, Role::Aggregator),
    (Role::Aggregator, Role::Aggregator),
];

/// Workers that take what they are given, and refuse what they are told to.
#[derive(Default)]
struct Fake {
    refuse_puts: AtomicBool,
    taken: AtomicUsize,
    /// Where it says that it is.
    named: Option<&'static str>,
}

fn no<T>() -> Result<T, Refusal> {
    Err(Refusal::new(Problem::VolumeFull, "0 bytes are left")
        .hint("wait")
        .retry_after(Duration::from_millis(1500)))
}

#[async_trait]
impl Workers for Fake {
    async fn create(&self, _: &SignedContext, new: NewFile) -> Result<(bool, FileStatus), Refusal> {
        // What arrived is told by what is refused.
        Err(Refusal::new(Problem::InvalidMetadata, format!("{new:?}")))
    }
    async fn admit_whole(&self, _: &SignedContext, _: ClientFileId, _: u64) -> Result<(), Refusal> {
        Ok(())
    }

    async fn create_whole(
        &self,
        _: &SignedContext,
        _: NewFile,
        bytes: Bytes,
    ) -> Result<(bool, FileStatus), Refusal> {
        Err(Refusal::new(Problem::InvalidMetadata, format!("{} bytes", bytes.len())))
    }
    async fn settle(
        &self,
        _: &SignedContext,
        _: ClientFileId,
        size: Geometry,
    ) -> Result<FileStatus, Refusal> {
        Err(Refusal::new(Problem::SizeConflict, size.size().to_string()))
    }
    async fn put_chunks(&self, _: &SignedContext, put: PutChunks) -> Result<ChunkReceipt, Refusal> {
        if self.refuse_puts.load(Ordering::SeqCst) {
            return no();
        }
        let mut body = put.body;
        let mut len = 0;
        while let Some(piece) = body.try_next().await? {
            len += piece.len() as u64;
            self.taken.fetch_add(piece.len(), Ordering::SeqCst);
        }
        let values = put.expected.unwrap_or_default().iter().map(ToString::to_string).collect();
        let start = put.start.number();
        Ok(ChunkReceipt {
            dc: "dc-a".into(),
            start,
            values,
            new_chunks: u64::from(len == put.len),
            provisional: false,
            busy: true,
        })
    }
    async fn status(
        &self,
        _: &SignedContext,
        _: ClientFileId,
        wait: Option<Wait>,
    ) -> Result<FileStatus, Refusal> {
        Err(Refusal::new(Problem::Incomplete, format!("{wait:?}")))
    }
    async fn list(&self, _: &SignedContext, query: ListQuery) -> Result<FilePage, Refusal> {
        Ok(FilePage { files: Vec::new(), next: query.after.map(|id| id.uuid()) })
    }
    async fn open(&self, _: &SignedContext, _: ClientFileId) -> Result<Opened, Refusal> {
        Err(Refusal::not_found())
    }
    async fn read(
        &self,
        _: &SignedContext,
        _: ClientFileId,
        range: Range<u64>,
    ) -> Result<ByteStream, Refusal> {
        let good = (0..range.end).map(|at| Ok(Bytes::from(vec![at as u8; 70_000])));
        let bad = (range.start > 0).then(no::<Bytes>);
        Ok(stream::iter(good.chain(bad)).boxed())
    }
    async fn tree(&self, _: &SignedContext, _: ClientFileId, place: Place) -> Result<TreeNode, Refusal> {
        Err(Refusal::new(Problem::Range, place.to_string()))
    }
    async fn remove(&self, _: &SignedContext, _: ClientFileId) -> Result<(), Refusal> {
        Ok(())
    }
    async fn about(&self, _: &SignedContext) -> Result<About, Refusal> {
        let dc = self.named.unwrap_or("dc-a").to_owned();
        Ok(About { cluster: "test".into(), dc, dcs: Vec::new(), version: "1".into() })
    }
    async fn drain(&self, _: &SignedContext, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        Err(Refusal::new(Problem::Precondition, format!("{order:?}")))
    }
    async fn leaving(&self) -> Result<Leaving, Refusal> {
        Ok(Leaving {
            phase: Some(Phase::Channels),
            target: Some(DcId::new(2)),
            to: Some("https://dc-b".into()),
        })
    }
}

/// Answers edges.
fn serve(door: Door, routes: axum::Router, memory: MemoryBudget, tasks: &Shutdown) {
    door.serve([(Role::Edge, Answers { routes, memory, tasks: tasks.clone() })], tasks);
}

struct Bed {
    material: Arc<ClusterMaterial>,
    fake: Arc<Fake>,
    tasks: Shutdown,
    workers: String,
    sessions: String,
    context: SignedContext,
    token: String,
    metrics: Metrics,
}

impl Bed {
    async fn new() -> Self {
        tls::install_provider();
        let dcs = [(ME, "dc-a"), (DcId::new(2), "dc-b")];
        let material = Arc::new(ClusterMaterial::generate("test", &dcs).unwrap());
        let (fake, tasks) = (Arc::new(Fake::default()), Shutdown::new());
        let open = |role, routes| {
            let door = Door::bind(([127, 0, 0, 1], 0).into(), &material, ME, role).unwrap();
            let address = door.address().unwrap().to_string();
            let tasks = tasks.clone();
            let passed = Answers {
                routes: serve_passed(fake.clone()),
                memory: MemoryBudget::new(64 << 20),
                tasks: tasks.clone(),
            };
            let door = if role == Role::Worker { door.taking([(Role::Worker, passed)]) } else { door };
            serve(door, routes, MemoryBudget::new(64 << 20), &tasks);
            address
        };
        let sessions = MemorySessions::new(ME, &material, SystemClock::shared(), Revocations::new())
            .map(Arc::new)
            .unwrap();
        let grant = TokenGrant::everything(TenantId::new(7), "seven", Duration::from_secs(600));
        let now = SystemClock::shared().now();
        let token = material.token_mint().unwrap().mint(&grant, now).unwrap();
        let context = sessions.context(&token).await.unwrap();
        let workers = open(Role::Worker, serve_workers(fake.clone()));
        let sessions = open(Role::Session, serve_sessions(sessions));
        Self { material, fake, tasks, workers, sessions, context, token, metrics: Metrics::new("dc-a") }
    }

    fn caller(&self, me: Role, whom: Role, address: &str) -> Caller {
        let (address, patience) = (address.to_owned(), Duration::from_secs(5));
        Caller::new(
            CallerConfig { dc: ME, of: ME, me, whom, address, patience },
            &self.material,
            &Shutdown::new(),
            &self.metrics.outgoing_calls,
        )
        .unwrap()
    }

    fn remote(&self) -> RemoteWorkers {
        RemoteWorkers::new(self.caller(Role::Edge, Role::Worker, &self.workers))
    }
}

fn id() -> ClientFileId {
    ClientFileId::new(Uuid::from_u128(7))
}

/// A body that counts what was asked of it.
fn body(pieces: usize, asked: &Arc<AtomicUsize>) -> ByteStream {
    let asked = asked.clone();
    stream::iter(0..pieces)
        .map(move |_| {
            asked.fetch_add(1, Ordering::SeqCst);
            Ok(Bytes::from(vec![1; 65_536]))
        })
        .boxed()
}

fn put(len: u64, body: ByteStream) -> PutChunks {
    let expected = Some(vec![ChainingValue::from_bytes([3; 32])]);
    PutChunks { id: id(), start: ChunkIndex::new(64).unwrap(), len, expected, body, way: Way::Direct }
}

/// Sessions of another datacenter, of which it is said how it answers.
struct There {
    says: Result<SignedContext, Problem>,
    asked: AtomicUsize,
}

#[async_trait]
impl Sessions for There {
    async fn context(&self, _: &str) -> Result<SignedContext, Refusal> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.says.clone().map_err(|problem| Refusal::new(problem, "not from there"))
    }
}

/// Whoever drains renews contexts at its target, and only such as count here: that its clock is an hour ahead, or that it has
/// keys that nobody here knows, ends no session.
#[tokio::test]
async fn a_context_of_the_target_that_does_not_count_here_is_one_of_our_own() {
    tls::install_provider();
    let dcs = [(ME, "dc-a"), (OTHER, "dc-b")];
    let material = ClusterMaterial::generate("test", &dcs).unwrap();
    let stranger = ClusterMaterial::generate("test", &dcs).unwrap();
    let now = SystemClock::shared().now();
    let grant = TokenGrant::everything(TenantId::new(7), "seven", Duration::from_secs(7200));
    let token = material.token_mint().unwrap().mint(&grant, now).unwrap();
    let issued = async |of: &ClusterMaterial, at: Timestamp| {
        let token = of.token_mint().unwrap().mint(&grant, at).unwrap();
        let clock = ManualClock::at(at);
        MemorySessions::new(OTHER, of, clock, Revocations::new()).unwrap().context(&token).await.unwrap()
    };
    let hour = 3_600_000;
    // Whoever cannot be asked, or answers what is of no use, is not asked again at once.
    let cases = [
        (Ok(issued(&material, now).await), true, 5),
        (Ok(issued(&material, now.plus(hour)).await), false, 1),
        (Ok(issued(&material, Timestamp::new(now.number() - hour)).await), false, 1),
        (Ok(issued(&stranger, now).await), false, 1),
        (Err(Problem::Forbidden), false, 5),
        (Err(Problem::Unavailable), false, 1),
    ];
    let verifier = ContextVerifier::new(&material, ME, SystemClock::shared(), Revocations::new());
    let verifier = Arc::new(verifier);
    let moving_to = |there: &Arc<There>| {
        let own = MemorySessions::new(ME, &material, SystemClock::shared(), Revocations::new()).unwrap();
        let leaving = Leaving { phase: Some(Phase::Sessions), target: Some(OTHER), to: None };
        let others: BTreeMap<DcId, Arc<dyn Sessions>> = [(OTHER, there.clone() as _)].into();
        let leaving = tokio::sync::watch::channel(leaving).1;
        MovingSessions::new(Arc::new(own), others, leaving, verifier.clone(), &Metrics::new("dc-a"))
    };
    for (says, is_theirs, asked) in cases {
        let there = Arc::new(There { says, asked: AtomicUsize::new(0) });
        let moving = moving_to(&there);
        for _ in 0..5 {
            let context = moving.context(&token).await.unwrap();
            let context = verifier.verify(&context).unwrap();
            assert_eq!(context.issuer == OTHER, is_theirs, "{:?}", there.says);
        }
        assert_eq!(there.asked.load(Ordering::SeqCst), asked, "{:?}", there.says);
    }
    let there = Arc::new(There { says: Err(Problem::RevokedToken), asked: AtomicUsize::new(0) });
    assert_eq!(moving_to(&there).context(&token).await.unwrap_err().problem, Problem::RevokedToken);
}

#[tokio::test]
async fn arguments_answers_and_refusals_come_through_as_they_are() {
    let bed = Bed::new().await;
    let (remote, context) = (bed.remote(), &bed.context);
    let fields = MetadataFields {
        size: Some(3),
        name: "größe.txt".into(),
        user: [("k".into(), "v".into())].into(),
        ..MetadataFields::default()
    };
    let new = NewFile { id: id(), fields, home: Some("dc-b".into()), way: Way::Follows };
    let refused = remote.create(context, new.clone()).await.unwrap_err();
    assert_eq!((refused.problem, refused.detail), (Problem::InvalidMetadata, format!("{new:?}")));
    let refused = remote.create_whole(context, new, Bytes::from(vec![0; 1 << 20])).await.unwrap_err();
    assert_eq!(refused.detail, "1048576 bytes");
    let size = Geometry::new(9).unwrap();
    assert_eq!(remote.settle(context, id(), size).await.unwrap_err().detail, "9");
    let wait = Some(Wait { state: sluice_proto::http::State::Complete, timeout: Duration::from_secs(3) });
    assert_eq!(remote.status(context, id(), wait).await.unwrap_err().detail, format!("{wait:?}"));
    let query = ListQuery { state: None, after: Some(id()), limit: 5 };
    assert_eq!(remote.list(context, query).await.unwrap().next, Some(id().uuid()));
    let refused = remote.open(context, id()).await.unwrap_err();
    assert_eq!((refused.problem, refused.hint.is_some()), (Problem::NotFound, true));
    let place = Place::new(64, 6).unwrap();
    assert_eq!(remote.tree(context, id(), place).await.unwrap_err().detail, place.to_string());
    remote.remove(context, id()).await.unwrap();
    assert_eq!(remote.about(context).await.unwrap().dc, "dc-a");
    let begin =
        DrainOrder::Begin { to: "dc-b".into(), phase: Phase::Sessions, evacuate: true, is_trial: false };
    for order in [DrainOrder::Show, begin, DrainOrder::End] {
        let refused = remote.drain(context, order.clone()).await.unwrap_err();
        assert_eq!(refused.detail, format!("{order:?}"));
    }
    let leaving = remote.leaving().await.unwrap();
    assert_eq!((leaving.phase, leaving.to.as_deref()), (Some(Phase::Channels), Some("https://dc-b")));
}

#[tokio::test]
async fn a_body_is_asked_for_once_it_is_wanted() {
    let bed = Bed::new().await;
    let (remote, asked) = (bed.remote(), Arc::new(AtomicUsize::new(0)));
    bed.fake.refuse_puts.store(true, Ordering::SeqCst);
    let refused = remote.put_chunks(&bed.context, put(1 << 20, body(16, &asked))).await.unwrap_err();
    assert_eq!((refused.problem, refused.hint.as_deref()), (Problem::VolumeFull, Some("wait")));
    assert_eq!(refused.retry_after, Some(Duration::from_millis(1500)));
    assert_eq!(asked.load(Ordering::SeqCst), 0, "nothing of it was read");
    bed.fake.refuse_puts.store(false, Ordering::SeqCst);
    for _ in 0..3 {
        let receipt = remote.put_chunks(&bed.context, put(1 << 20, body(16, &asked))).await.unwrap();
        assert_eq!((receipt.start, receipt.new_chunks, receipt.busy), (64, 1, true));
        assert_eq!(receipt.values, [ChainingValue::from_bytes([3; 32]).to_string()]);
    }
    assert_eq!(bed.fake.taken.load(Ordering::SeqCst), 3 << 20);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_refused_in_its_own_words_and_is_no_end() {
    let bed = Bed::new().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let trickles = || Err(Refusal::new(Problem::Timeout, "the body trickles"));
    let broken = body(3, &asked).chain(stream::once(async move { trickles() })).boxed();
    let refused = bed.remote().put_chunks(&bed.context, put(1 << 20, broken)).await.unwrap_err();
    assert_eq!((refused.problem, refused.detail.as_str()), (Problem::Timeout, "the body trickles"));
    let read = bed.remote().read(&bed.context, id(), 0..9).await.unwrap();
    let whole: Vec<Bytes> = read.try_collect().await.unwrap();
    assert_eq!(whole.iter().map(Bytes::len).sum::<usize>(), 9 * 70_000);
    let read = bed.remote().read(&bed.context, id(), 1..9).await.unwrap();
    let broken = read.try_collect::<Vec<Bytes>>().await.unwrap_err();
    assert_eq!(broken.problem, Problem::Unavailable);
}

#[tokio::test]
async fn a_body_has_the_length_that_was_declared() {
    let bed = Bed::new().await;
    let asked = Arc::new(AtomicUsize::new(0));
    for (pieces, problem) in [(15, Problem::Truncated), (17, Problem::ChunkLength)] {
        let put = put(1 << 20, body(pieces, &asked));
        assert_eq!(bed.remote().put_chunks(&bed.context, put).await.unwrap_err().problem, problem);
    }
}

#[tokio::test]
async fn what_is_collected_is_paid_for() {
    let bed = Bed::new().await;
    let door = Door::bind(([127, 0, 0, 1], 0).into(), &bed.material, ME, Role::Worker).unwrap();
    let address = door.address().unwrap().to_string();
    let memory = MemoryBudget::new(64 << 10);
    serve(door, serve_workers(bed.fake.clone()), memory.clone(), &bed.tasks);
    let small = RemoteWorkers::new(bed.caller(Role::Edge, Role::Worker, &address));
    let new = || NewFile { id: id(), fields: MetadataFields::default(), home: None, way: Way::Direct };
    let refused = small.create_whole(&bed.context, new(), Bytes::from(vec![0; 1 << 20])).await.unwrap_err();
    assert_eq!(refused.problem, Problem::Overloaded);
    let refused = small.create_whole(&bed.context, new(), Bytes::from(vec![0; 9])).await.unwrap_err();
    assert_eq!(refused.detail, "9 bytes");
    assert_eq!(memory.used(), 0);
}

#[tokio::test]
async fn who_has_nothing_to_ask_is_not_answered() {
    let bed = Bed::new().await;
    // An aggregator may ask some workers, and these have no store of their own.
    for me in [Role::Session, Role::Worker, Role::Aggregator] {
        let stranger = RemoteWorkers::new(bed.caller(me, Role::Worker, &bed.workers));
        let refused = stranger.about(&bed.context).await.unwrap_err();
        assert_eq!(refused.problem, Problem::Unavailable, "{me}");
    }
    // A worker is no session service, whoever says so; and the other datacenter's edges are not this one's.
    let misled = RemoteWorkers::new(bed.caller(Role::Edge, Role::Session, &bed.workers));
    assert!(misled.about(&bed.context).await.is_err());
    let (dc, address) = (DcId::new(2), bed.workers.clone());
    let patience = Duration::from_secs(5);
    let config = CallerConfig { dc, of: dc, me: Role::Edge, whom: Role::Worker, address, patience };
    let elsewhere = RemoteWorkers::new(
        Caller::new(config, &bed.material, &Shutdown::new(), &bed.metrics.outgoing_calls).unwrap(),
    );
    assert!(elsewhere.about(&bed.context).await.is_err());
    // Another cluster's keys have the same names, and another CA.
    let other = ClusterMaterial::generate("test", &[(ME, "dc-a")]).unwrap();
    let config = CallerConfig {
        dc: ME,
        of: ME,
        me: Role::Edge,
        whom: Role::Worker,
        address: bed.workers.clone(),
        patience,
    };
    let foreign = RemoteWorkers::new(
        Caller::new(config, &other, &Shutdown::new(), &bed.metrics.outgoing_calls).unwrap(),
    );
    assert!(foreign.about(&bed.context).await.is_err());
    assert!(bed.remote().about(&bed.context).await.is_ok());
}

#[tokio::test]
async fn every_door_lets_in_the_roles_of_the_table_and_no_others() {
    let bed = Bed::new().await;
    // There is an answer for everybody, so that it is the door that decides.
    let everybody = || {
        Role::ALL.map(|role| {
            let (routes, memory) = (serve_workers(bed.fake.clone()), MemoryBudget::new(64 << 20));
            (role, Answers { routes, memory, tasks: bed.tasks.clone() })
        })
    };
    for whom in Role::ALL {
        let door = Door::bind(([127, 0, 0, 1], 0).into(), &bed.material, ME, whom).unwrap();
        let at = door.address().unwrap();
        door.taking(everybody()).serve(everybody(), &bed.tasks);
        for me in Role::ALL {
            for (dc, may, forbidden) in
                [(ME, whom.answers(me), &ASKS_NOTHING[..]), (OTHER, whom.takes_from(me), &PASSES_NOTHING[..])]
            {
                let (address, patience) = (at.to_string(), Duration::from_secs(5));
                let config = CallerConfig { dc, of: ME, me, whom, address, patience };
                let tasks = Shutdown::new();
                let caller = Caller::new(config, &bed.material, &tasks, &bed.metrics.outgoing_calls).unwrap();
                let asked = RemoteWorkers::new(caller).about(&bed.context).await;
                let refused = asked.err().map(|refusal| refusal.problem);
                assert_eq!(refused, (!may).then_some(Problem::Unavailable), "{me} of {dc} asks {whom}");
                assert_eq!(!may, forbidden.contains(&(me, whom)), "{me} of {dc} asks {whom}");
            }
        }
        // A datacenter's own certificate says nothing of a role.
        for dc in [ME, OTHER] {
            let mut tls = rustls::ClientConfig::clone(&tls::peer_client(&bed.material, dc).unwrap());
            tls.alpn_protocols = vec![b"http/1.1".to_vec()];
            let name = tls::role_name(&bed.material, ME, whom).unwrap();
            let kept_out = heard(Arc::new(tls), name, at).await;
            assert!(kept_out.contains("close_notify"), "{kept_out}");
        }
    }
}

/// What keeps somebody out: in the handshake or, since TLS 1.3 looks at a client last, with what is read after it.
async fn heard(
    tls: Arc<rustls::ClientConfig>,
    name: rustls::pki_types::ServerName<'static>,
    at: std::net::SocketAddr,
) -> String {
    use tokio::io::AsyncReadExt;
    let stream = tokio::net::TcpStream::connect(at).await.unwrap();
    let error = match tokio_rustls::TlsConnector::from(tls).connect(name, stream).await {
        Err(error) => error,
        Ok(mut stream) => {
            let read = tokio::time::timeout(Duration::from_secs(10), stream.read_u8()).await;
            read.expect("an end").expect_err("let in")
        }
    };
    error.to_string()
}

#[tokio::test]
async fn a_certificate_that_has_expired_is_refused_on_either_side_until_it_is_renewed() {
    let bed = Bed::new().await;
    let now = SystemClock::shared().now();
    let long_ago = Timestamp::new(now.number() - 11 * 365 * 86_400_000);
    let expired = Arc::new(bed.material.reissued_at(long_ago).unwrap());
    let name = || tls::role_name(&bed.material, ME, Role::Worker).unwrap();
    // Of a caller.
    let shows = tls::role_client(&expired, ME, Role::Edge).unwrap();
    let kept_out = heard(shows, name(), bed.workers.parse().unwrap()).await;
    assert!(kept_out.contains("CertificateExpired"), "{kept_out}");
    let config = CallerConfig {
        dc: ME,
        of: ME,
        me: Role::Edge,
        whom: Role::Worker,
        address: bed.workers.clone(),
        patience: Duration::from_secs(5),
    };
    let tasks = Shutdown::new();
    let caller = Caller::new(config, &expired, &tasks, &bed.metrics.outgoing_calls).unwrap();
    let late = RemoteWorkers::new(caller);
    assert_eq!(late.about(&bed.context).await.unwrap_err().problem, Problem::Unavailable);
    // Of a door.
    let door = Door::bind(([127, 0, 0, 1], 0).into(), &expired, ME, Role::Worker).unwrap();
    let at = door.address().unwrap();
    serve(door, serve_workers(bed.fake.clone()), MemoryBudget::new(64 << 20), &bed.tasks);
    let kept_out = heard(tls::role_client(&bed.material, ME, Role::Edge).unwrap(), name(), at).await;
    assert!(kept_out.contains("certificate expired"), "{kept_out}");
    let at = at.to_string();
    let remote = || RemoteWorkers::new(bed.caller(Role::Edge, Role::Worker, &at));
    assert_eq!(remote().about(&bed.context).await.unwrap_err().problem, Problem::Unavailable);

    expired.renew(&bed.material, now).unwrap();
    assert!(late.about(&bed.context).await.is_ok());
    assert!(remote().about(&bed.context).await.is_ok());
}

#[tokio::test]
async fn the_workers_of_another_datacenter_may_pass_on_and_nothing_else() {
    let bed = Bed::new().await;
    let other = |me| {
        let (dc, of, whom, address) = (DcId::new(2), ME, Role::Worker, bed.workers.clone());
        let config = CallerConfig { dc, of, me, whom, address, patience: Duration::from_secs(5) };
        RemoteWorkers::new(
            Caller::new(config, &bed.material, &Shutdown::new(), &bed.metrics.outgoing_calls).unwrap(),
        )
    };
    let (workers, asked) = (other(Role::Worker), Arc::new(AtomicUsize::new(0)));
    let receipt = workers.put_chunks(&bed.context, put(1 << 20, body(16, &asked))).await.unwrap();
    assert_eq!((receipt.dc.as_str(), receipt.new_chunks), ("dc-a", 1));
    // Whatever the caller says, it was passed, and goes no further.
    let new = NewFile { id: id(), fields: MetadataFields::default(), home: None, way: Way::Direct };
    let refused = workers.create(&bed.context, new.clone()).await.unwrap_err();
    assert_eq!(refused.detail, format!("{:?}", NewFile { way: Way::Passed, ..new.clone() }));
    assert!(
        workers.create_whole(&bed.context, new, Bytes::new()).await.unwrap_err().detail.contains("0 bytes")
    );
    assert!(workers.about(&bed.context).await.is_err());
    assert!(workers.remove(&bed.context, id()).await.is_err());
    assert!(workers.list(&bed.context, ListQuery { state: None, after: None, limit: 5 }).await.is_err());
    for me in [Role::Edge, Role::Session, Role::Aggregator] {
        let (stranger, asked) = (other(me), Arc::new(AtomicUsize::new(0)));
        let refused = stranger.put_chunks(&bed.context, put(1 << 20, body(16, &asked))).await.unwrap_err();
        assert_eq!((refused.problem, asked.load(Ordering::SeqCst)), (Problem::Unavailable, 0), "{me}");
    }
}

#[tokio::test]
async fn a_process_that_is_gone_is_unavailable_and_another_one_of_its_name_is_asked() {
    let bed = Bed::new().await;
    let remote = bed.remote();
    assert!(remote.about(&bed.context).await.is_ok());
    bed.tasks.kill().await;
    assert_eq!(remote.about(&bed.context).await.unwrap_err().problem, Problem::Unavailable);
    let (again, at) = (Shutdown::new(), bed.workers.parse().unwrap());
    let door = Door::bind(at, &bed.material, ME, Role::Worker).unwrap();
    serve(door, serve_workers(bed.fake.clone()), MemoryBudget::new(64 << 20), &again);
    assert!(remote.about(&bed.context).await.is_ok());
}

#[tokio::test]
async fn how_long_calls_take_is_counted_by_method_and_outcome() {
    let bed = Bed::new().await;
    let (remote, context, asked) = (bed.remote(), &bed.context, Arc::new(AtomicUsize::new(0)));
    let counted = |method: &str, outcome: &str| {
        let labels =
            format!(r#"rpc_system_name="sluice",rpc_method="{method}",rpc_response_status_code="{outcome}""#);
        let line = format!(r#"rpc_client_call_duration_seconds_count{{dc="dc-a",{labels}}} "#);
        let text = bed.metrics.encode().unwrap();
        let times = text.lines().find_map(|said| said.strip_prefix(&line)?.parse().ok());
        times.unwrap_or(0)
    };
    for times in 1..3 {
        remote.about(context).await.unwrap();
        assert_eq!(counted("workers/about", "OK"), times);
    }
    remote.open(context, id()).await.unwrap_err();
    assert_eq!((counted("workers/open", "not-found"), counted("workers/open", "OK")), (1, 0));
    remote.put_chunks(context, put(1 << 20, body(16, &asked))).await.unwrap();
    bed.fake.refuse_puts.store(true, Ordering::SeqCst);
    remote.put_chunks(context, put(1 << 20, body(16, &asked))).await.unwrap_err();
    assert_eq!((counted("workers/put", "OK"), counted("workers/put", "volume-full")), (1, 1));
    // What is answered with bytes lasts for as long as they come.
    let mut read = remote.read(context, id(), 0..9).await.unwrap();
    assert_eq!(counted("workers/read", "OK"), 0);
    while read.try_next().await.unwrap().is_some() {}
    drop(read);
    assert_eq!(counted("workers/read", "OK"), 1);
    let broken = remote.read(context, id(), 1..9).await.unwrap();
    broken.try_collect::<Vec<Bytes>>().await.unwrap_err();
    assert_eq!(counted("workers/read", "unavailable"), 1);
    let mut given_up = Box::pin(remote.about(context));
    assert!(futures_util::poll!(&mut given_up).is_pending());
    drop(given_up);
    assert_eq!(counted("workers/about", "CANCELLED"), 1);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let nobody = RemoteWorkers::new(bed.caller(Role::Edge, Role::Worker, &nobody));
    nobody.about(context).await.unwrap_err();
    assert_eq!(counted("workers/about", "unreached"), 1);
}

#[tokio::test]
async fn contexts_are_kept_and_outlive_the_session_service() {
    let bed = Bed::new().await;
    let clock = ManualClock::at(Timestamp::new(SystemClock::shared().now().number()));
    let verifier = ContextVerifier::new(&bed.material, ME, clock.clone(), Revocations::new());
    let caller = bed.caller(Role::Edge, Role::Session, &bed.sessions);
    let sessions = RemoteSessions::new(caller, Arc::new(verifier), clock.clone());
    let first = sessions.context(&bed.token).await.unwrap();
    let refused = sessions.context("no.token.at-all").await.unwrap_err();
    assert_eq!(refused.problem, Problem::InvalidToken);
    bed.tasks.kill().await;
    assert!(sessions.context(&bed.token).await.unwrap() == first);
    // Near its end a new one is wanted; while there is none the old one is good for as long as it lives.
    clock.advance(299_000);
    assert!(sessions.context(&bed.token).await.unwrap() == first);
    clock.advance(70_000);
    assert_eq!(sessions.context(&bed.token).await.unwrap_err().problem, Problem::Unavailable);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_by_name() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let bed = Bed::new().await;
    let tls = tls::role_client(&bed.material, ME, Role::Edge).unwrap();
    let name = tls::role_name(&bed.material, ME, Role::Worker).unwrap();
    for (head, said) in [
        ("content-length: 0\r\n\r\n", "a call that makes no sense"),
        ("content-length: 4\r\n\r\n\u{7f}\u{7f}\u{7f}\u{7f}", "arguments are cut off"),
        ("content-length: 6\r\n\r\n\0\0\0\u{2}{}", "missing field `id`"),
    ] {
        let stream = tokio::net::TcpStream::connect(&bed.workers).await.unwrap();
        let mut stream =
            tokio_rustls::TlsConnector::from(tls.clone()).connect(name.clone(), stream).await.unwrap();
        let request = format!("POST /v1/workers/open HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains(said), "{answer}");
    }
}

#[tokio::test]
async fn a_process_that_a_name_has_only_now_gets_its_share_of_a_caller_who_is_never_idle() {
    let bed = Bed::new().await;
    let reserved = tokio::net::TcpSocket::new_v4().unwrap();
    reserved.bind(([127, 0, 0, 1], 0).into()).unwrap();
    reserved.set_reuseaddr(true).unwrap();
    let later = reserved.local_addr().unwrap();
    let caller = || bed.caller(Role::Edge, Role::Worker, &format!("{}, {later}", bed.workers));
    let busy = RemoteWorkers::new(caller());
    let renewing = RemoteWorkers::new(caller().renewing(Duration::ZERO));
    // The one that is not there is passed over.
    for _ in 0..4 {
        assert_eq!(busy.about(&bed.context).await.unwrap().dc, "dc-a");
    }
    let door = Door::bind(later, &bed.material, ME, Role::Worker).unwrap();
    let new = Arc::new(Fake { named: Some("the new one"), ..Fake::default() });
    serve(door, serve_workers(new), MemoryBudget::new(64 << 20), &bed.tasks);
    let mut names = std::collections::BTreeSet::new();
    for _ in 0..4 {
        names.insert(renewing.about(&bed.context).await.unwrap().dc);
        assert_eq!(busy.about(&bed.context).await.unwrap().dc, "dc-a", "its connection is not a minute old");
    }
    assert_eq!(names.len(), 2, "{names:?}");
}
