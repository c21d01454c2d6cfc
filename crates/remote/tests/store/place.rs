//! A worker's store on a disk, behind a door that can be shut.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use sluice_engine::ids::DcId;
use sluice_engine::share::{Share, Shares};
use sluice_node::budget::MemoryBudget;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls;
use sluice_remote::{Answers, Caller, CallerConfig, Door, NoTenure, RemoteStore, Tenures, serve_store};
use sluice_store::{ChunkStore, FsOptions, FsStore};

use tokio::net::TcpSocket;

use crate::contract::Backend;

pub(crate) const ME: DcId = DcId::new(1);

/// A place where one worker after the other has the same volume.
pub(crate) struct Place {
    pub(crate) material: Arc<ClusterMaterial>,
    directory: tempfile::TempDir,
    /// Reserved, so that each worker is where the last one was.
    at: TcpSocket,
    worker: Mutex<Option<Worker>>,
    /// Of aggregators.
    pub(crate) tasks: Shutdown,
}

/// A running one.
struct Worker {
    store: Arc<FsStore>,
    tasks: Shutdown,
}

impl Place {
    pub(crate) fn new() -> Self {
        tls::install_provider();
        let at = TcpSocket::new_v4().unwrap();
        at.bind(([127, 0, 0, 1], 0).into()).unwrap();
        at.set_reuseaddr(true).unwrap();
        let dcs = [(ME, "dc-a"), (DcId::new(2), "dc-b")];
        Self {
            material: Arc::new(ClusterMaterial::generate("test", &dcs).unwrap()),
            directory: tempfile::tempdir().unwrap(),
            at,
            worker: Mutex::new(None),
            tasks: Shutdown::new(),
        }
    }

    /// Starts the worker, with what it knows of tenures.
    pub(crate) fn start(&self) -> (Arc<FsStore>, Tenures) {
        let store = Arc::new(FsStore::open(self.directory.path(), FsOptions::default()).unwrap());
        let (tasks, tenures) = (Shutdown::new(), Tenures::new(Shares::ONE));
        let door = Door::bind(self.at.local_addr().unwrap(), &self.material, ME, Role::Worker).unwrap();
        let routes = serve_store(store.clone(), tenures.clone(), tasks.clone());
        let answers = Answers { routes, memory: MemoryBudget::new(64 << 20), tasks: tasks.clone() };
        door.serve([(Role::Aggregator, answers)], &tasks);
        *self.worker.lock().unwrap() = Some(Worker { store: store.clone(), tasks });
        (store, tenures)
    }

    /// Ends the worker as a kill would.
    pub(crate) async fn kill(&self) {
        let worker = self.worker.lock().unwrap().take();
        if let Some(Worker { store, tasks }) = worker {
            tasks.kill().await;
            store.kill();
        }
    }

    pub(crate) fn caller(&self, me: Role) -> Caller {
        let (address, patience) = (self.at.local_addr().unwrap().to_string(), Duration::from_secs(20));
        let config = CallerConfig { dc: ME, of: ME, me, whom: Role::Worker, address, patience };
        Caller::new(config, &self.material, &Shutdown::new(), &Metrics::new("dc-a").outgoing_calls).unwrap()
    }

    /// Has an aggregator take the store.
    pub(crate) async fn take(&self) -> Result<RemoteStore, NoTenure> {
        RemoteStore::begin(self.caller(Role::Aggregator), Share::WHOLE, None, &self.tasks).await
    }
}

impl Backend for Place {
    async fn open(&self) -> Arc<dyn ChunkStore> {
        let worker = self.worker.lock().unwrap().take();
        if let Some(Worker { store, tasks }) = worker {
            tasks.stop(Duration::from_secs(1)).await;
            store.close().await.unwrap();
        }
        self.start();
        Arc::new(self.take().await.unwrap())
    }
}
