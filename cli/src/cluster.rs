//! Several datacenters of one cluster in this process.
//!
//! A [`Cluster`] owns its datacenters and their ports. Each can be stopped, killed and started again while the
//! others go on; the ports stay reserved meanwhile, so that it comes back where it was. Dropping the cluster kills
//! all of them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use sluice_aggregator::{PeerAddress, Traffic};
use sluice_engine::ids::DcId;
use sluice_node::clock::{SharedClock, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::shutdown::Stopped;

use crate::datacenter::{Datacenter, DatacenterConfig, DatacenterSettings, StartError};
use crate::place::StorePlace;
use crate::ports::{ReservedPort, ReservedPorts};
use crate::ways::OtherDc;

/// Where a datacenter is asked to listen; port 0 takes any free one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// For clients.
    pub edge: SocketAddr,
    /// For other datacenters.
    pub peer: SocketAddr,
    /// For probes and scrapers.
    pub admin: SocketAddr,
}

impl Default for Listen {
    /// Any free ports of loopback.
    fn default() -> Self {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self { edge: any, peer: any, admin: any }
    }
}

impl Listen {
    /// Reserves its ports.
    pub fn reserve(self) -> Result<ReservedPorts, StartError> {
        let reserve =
            |address| ReservedPort::reserve(address).map_err(|error| StartError::of_port(address, error));
        Ok(ReservedPorts {
            edge: reserve(self.edge)?,
            peer: reserve(self.peer)?,
            admin: reserve(self.admin)?,
        })
    }
}

/// What makes a cluster.
#[derive(Debug)]
pub struct ClusterConfig {
    /// Keys and certificates of every datacenter.
    pub material: ClusterMaterial,
    /// Holds a directory for each datacenter, by its name.
    pub directory: PathBuf,
    /// Where datacenters listen; those that are not named take any free ports of loopback.
    pub ports: BTreeMap<DcId, ReservedPorts>,
    /// What time it is.
    pub clock: SharedClock,
    /// What each datacenter spends.
    pub settings: DatacenterSettings,
    /// Bytes of uploads a second that a datacenter takes: the one of this name, or each. The last one counts.
    pub upload_rates: Vec<(Option<String>, u64)>,
}

impl ClusterConfig {
    /// Any free ports, the machine's clock, and what is usual.
    pub fn new(material: ClusterMaterial, directory: impl Into<PathBuf>) -> Self {
        Self {
            material,
            directory: directory.into(),
            ports: BTreeMap::new(),
            clock: SystemClock::shared(),
            settings: DatacenterSettings::default(),
            upload_rates: Vec::new(),
        }
    }
}

/// A cluster whose datacenters run, or some of them.
#[derive(Debug)]
pub struct Cluster {
    material: ClusterMaterial,
    members: BTreeMap<DcId, Member>,
}

#[derive(Debug)]
struct Member {
    config: DatacenterConfig,
    /// Kept for its workers, between its lives too.
    _inside: ReservedPort,
    running: Option<Datacenter>,
    /// What it sent and pulled in its earlier lives.
    earlier: Traffic,
}

impl Cluster {
    /// A cluster with its ports reserved, and nothing running yet.
    pub fn new(config: ClusterConfig) -> Result<Self, StartError> {
        let ClusterConfig { material, directory, mut ports, clock, settings, upload_rates } = config;
        let mut reserved = BTreeMap::new();
        for (dc, _) in material.dcs() {
            let ports = ports.remove(&dc).map_or_else(|| Listen::default().reserve(), Ok)?;
            let any = Listen::default().admin;
            let inside = ReservedPort::reserve(any).map_err(|error| StartError::of_port(any, error))?;
            reserved.insert(dc, (Arc::new(ports), inside));
        }
        let mut members = BTreeMap::new();
        for (dc, name) in material.dcs() {
            let Some((ports, inside)) = reserved.remove(&dc) else { continue };
            let mut settings = settings.clone();
            for (whose, rate) in &upload_rates {
                if whose.as_deref().is_none_or(|whose| whose == name) {
                    settings.worker.upload_rate = Some(*rate);
                }
            }
            let config = DatacenterConfig {
                dc,
                material: Arc::new(material.only(dc)?),
                place: StorePlace::Directory(directory.join(name)),
                ports,
                inside: Some(inside.address()),
                url: None,
                peers: Vec::new(),
                others: Vec::new(),
                clock: clock.clone(),
                redis: None,
                settings,
            };
            let earlier = Traffic::default();
            members.insert(dc, Member { config, _inside: inside, running: None, earlier });
        }
        let everyone: Vec<PeerAddress> = members.values().map(|member| address(&member.config)).collect();
        let ways: Vec<OtherDc> = members.values().map(|member| way(&member.config)).collect();
        for (dc, member) in &mut members {
            member.config.peers = everyone.iter().filter(|peer| peer.dc != *dc).cloned().collect();
            member.config.others = ways.iter().filter(|other| other.dc != *dc).cloned().collect();
        }
        Ok(Self { material, members })
    }

    /// The same with all of it running.
    pub async fn start_all(config: ClusterConfig) -> Result<Self, StartError> {
        let mut cluster = Self::new(config)?;
        let starts = cluster.members.values_mut().map(Member::start);
        let results = join_all(starts).await;
        if let Some(error) = results.into_iter().find_map(Result::err) {
            cluster.kill_all().await;
            return Err(error);
        }
        Ok(cluster)
    }

    /// Starts a datacenter that is not running, from its disk, where it was.
    pub async fn start(&mut self, dc: DcId) -> Result<(), StartError> {
        match self.members.get_mut(&dc) {
            Some(member) => member.start().await,
            None => Ok(()),
        }
    }

    /// Stops a datacenter in order; see [`Datacenter::stop`].
    pub async fn stop(&mut self, dc: DcId, deadline: Duration) -> Stopped {
        match self.members.get_mut(&dc) {
            Some(member) => member.stop(deadline).await,
            None => Stopped::Clean,
        }
    }

    /// Kills a datacenter; see [`Datacenter::kill`].
    pub async fn kill(&mut self, dc: DcId) {
        if let Some(member) = self.members.get_mut(&dc) {
            member.kill().await;
        }
    }

    /// Stops every datacenter in order, all at the same time.
    pub async fn stop_all(&mut self, deadline: Duration) -> Stopped {
        let stopped = join_all(self.members.values_mut().map(|member| member.stop(deadline))).await;
        let killed = stopped.iter().map(|stopped| match stopped {
            Stopped::Clean => 0,
            Stopped::Killed { tasks } => *tasks,
        });
        match killed.sum() {
            0 => Stopped::Clean,
            tasks => Stopped::Killed { tasks },
        }
    }

    /// Kills every datacenter.
    pub async fn kill_all(&mut self) {
        join_all(self.members.values_mut().map(Member::kill)).await;
    }

    /// The datacenters, in order of number.
    pub fn dcs(&self) -> impl Iterator<Item = &DatacenterConfig> {
        self.members.values().map(|member| &member.config)
    }

    /// What makes one of them.
    pub fn config(&self, dc: DcId) -> Option<&DatacenterConfig> {
        self.members.get(&dc).map(|member| &member.config)
    }

    /// The same, to be changed before its next start.
    pub fn config_mut(&mut self, dc: DcId) -> Option<&mut DatacenterConfig> {
        self.members.get_mut(&dc).map(|member| &mut member.config)
    }

    /// One that runs.
    pub fn running(&self, dc: DcId) -> Option<&Datacenter> {
        self.members.get(&dc).and_then(|member| member.running.as_ref())
    }

    /// Where clients find each, in order of number.
    pub fn urls(&self) -> Vec<String> {
        self.dcs().map(DatacenterConfig::url).collect()
    }

    /// Keys and certificates of all.
    pub fn material(&self) -> &ClusterMaterial {
        &self.material
    }

    /// What one datacenter sent and pulled, in all its lives.
    pub fn traffic(&self, dc: DcId) -> Traffic {
        self.members.get(&dc).map(Member::traffic).unwrap_or_default()
    }

    /// What all of them sent and pulled, in all their lives.
    pub fn all_traffic(&self) -> Traffic {
        self.members.values().map(Member::traffic).fold(Traffic::default(), sum)
    }
}

impl Member {
    async fn start(&mut self) -> Result<(), StartError> {
        if self.running.is_none() {
            self.running = Some(Datacenter::start(&self.config).await?);
        }
        Ok(())
    }

    async fn stop(&mut self, deadline: Duration) -> Stopped {
        self.earlier = self.traffic();
        match self.running.take() {
            Some(datacenter) => datacenter.stop(deadline).await,
            None => Stopped::Clean,
        }
    }

    async fn kill(&mut self) {
        self.earlier = self.traffic();
        if let Some(datacenter) = self.running.take() {
            datacenter.kill().await;
        }
    }

    fn traffic(&self) -> Traffic {
        match &self.running {
            Some(datacenter) => sum(self.earlier, datacenter.traffic()),
            None => self.earlier,
        }
    }
}

fn sum(a: Traffic, b: Traffic) -> Traffic {
    Traffic {
        commands_sent: a.commands_sent + b.commands_sent,
        command_bytes_sent: a.command_bytes_sent + b.command_bytes_sent,
        pulled_bytes: a.pulled_bytes + b.pulled_bytes,
        served_bytes: a.served_bytes + b.served_bytes,
    }
}

fn address(config: &DatacenterConfig) -> PeerAddress {
    let address = config.ports.peer.address().to_string();
    PeerAddress { dc: config.dc, address, edge_url: Some(config.url()) }
}

fn way(config: &DatacenterConfig) -> OtherDc {
    let workers = config.inside.map(|address| address.to_string());
    OtherDc { dc: config.dc, url: Some(config.url()), workers, sessions: None }
}
