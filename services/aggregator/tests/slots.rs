//! What workers ask of an aggregator, past the doors that derive a file's name from who asks.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::sync::Arc;

use sluice_aggregator::{AggregatorMetrics, AggregatorParts, AggregatorSettings, Listener, PeerPort};
use sluice_engine::context::{Scope, SessionContext, SignedContext};
use sluice_engine::geometry::{ChunkIndex, Run};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, DcId, FileId, RevocationEpoch, SessionId, TenantId, Timestamp};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::{MetadataFields, MetadataRecord};
use sluice_engine::share::Share;
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::clock::{Clock as _, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::rate::ScrubRate;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls;
use sluice_proto::calls::{Admission, Slots, Used};
use sluice_proto::problem::Problem;
use sluice_store::{ChunkStore, FsOptions, FsStore};
use uuid::Uuid;

const ME: DcId = DcId::new(1);

fn context(material: &ClusterMaterial, tenant: u64) -> SignedContext {
    let now = SystemClock.now();
    let context = SessionContext {
        session: SessionId::new(Uuid::from_u128(tenant.into())),
        tenant: TenantId::new(tenant),
        scopes: [Scope::Read, Scope::Write].into_iter().collect(),
        rate: 0,
        quota: 0,
        quota_files: 0,
        revocation: RevocationEpoch::new(3),
        issuer: ME,
        issued_at: Timestamp::new(now.number()),
        ends_at: now.plus(60_000),
        allowed: [].into(),
    };
    context.sign(&material.context_key(ME).unwrap())
}

/// A worker derives a file's name from its session. One that does not finds out nothing, and changes nothing.
#[tokio::test]
async fn a_file_of_another_tenant_is_none_whoever_says_its_name() {
    tls::install_provider();
    let dir = tempfile::tempdir().unwrap();
    let material = Arc::new(ClusterMaterial::generate("test", &[(ME, "dc-a")]).unwrap());
    let store: Arc<dyn ChunkStore> = Arc::new(FsStore::open(dir.path(), FsOptions::default()).unwrap());
    let (clock, revocations, tasks) = (SystemClock::shared(), Revocations::new(), Shutdown::new());
    let metrics = Metrics::new("dc-a");
    let port = Listener::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let port = PeerPort::open(port, &material, ME, &tasks).unwrap();
    let parts = AggregatorParts {
        dc: ME,
        share: Share::WHOLE,
        material: material.clone(),
        store,
        access: Arc::new(ContextVerifier::new(&material, ME, clock.clone(), revocations.clone())),
        revocations,
        metrics: AggregatorMetrics::new(&metrics, ME, &material),
        clock,
        tasks: tasks.clone(),
        scrub_rate: ScrubRate::new(0),
        settings: AggregatorSettings::default(),
    };
    let slots = sluice_aggregator::start(parts, &port, None, Vec::new()).await.unwrap();
    let (own, others) = (context(&material, 7), context(&material, 8));
    let run = Run::from_len(ChunkIndex::new(0).unwrap(), CHUNK_LEN).unwrap();
    let (ours, theirs) = ([ChainingValue::from_bytes([1; 32])], [ChainingValue::from_bytes([2; 32])]);

    let tenant = TenantId::new(7);
    let (id, orphan) = (ClientFileId::new(Uuid::from_u128(1)), ClientFileId::new(Uuid::from_u128(2)));
    let fields = MetadataFields { size: Some(2 * CHUNK_LEN), ..MetadataFields::default() };
    let record = MetadataRecord::new(tenant, id, fields).unwrap();
    slots.create(&own, record, None, Used::default()).await.unwrap();
    let orphan = FileId::derive(tenant, orphan);
    assert!(slots.register(&own, orphan, run, &ours).await.unwrap(), "without metadata");
    for file in [FileId::derive(tenant, id), orphan] {
        let asked = slots.admit(&others, file, Used::default()).await;
        assert_eq!(asked.unwrap_err().problem, Problem::NotFound);
        let said = slots.register(&others, file, run, &theirs).await;
        assert_eq!(said.unwrap_err().problem, Problem::NotFound);
    }
    // Nothing was taken note of: what is ours contradicts nothing.
    let file = FileId::derive(tenant, id);
    assert!(!slots.register(&own, file, run, &ours).await.unwrap());
    assert!(matches!(slots.admit(&own, file, Used::default()).await.unwrap(), Admission::Known(_)));
    assert_eq!(slots.admit(&own, orphan, Used::default()).await.unwrap(), Admission::Provisional);
    tasks.kill().await;
}
