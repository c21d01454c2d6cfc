//! Where the other datacenters are, as the files of datacenters and aggregators say it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use sluice_aggregator::PeerAddress;
use sluice_node::material::ClusterMaterial;

use crate::failure::Failure;

/// Another datacenter.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Peer {
    /// `host:port` of its port for peers.
    address: String,
    /// Where clients find it.
    url: Option<String>,
    /// `host:port` at which its workers take what is passed to them: what its own file calls `inside`.
    workers: Option<String>,
}

/// Where every other datacenter of `material` is, for the one called `me`.
pub(crate) fn addresses(
    peers: &BTreeMap<String, Peer>,
    me: &str,
    keys: &Path,
    material: &ClusterMaterial,
) -> anyhow::Result<Vec<PeerAddress>> {
    for name in peers.keys() {
        if name == me {
            let message = format!("peers.{name} is the datacenter itself");
            return Err(Failure::usage("configuration", message, "leave it out").into());
        }
        if material.dc_named(name).is_none() {
            return Err(unknown("peers", name, keys, material).into());
        }
    }
    let others = material.dcs().filter(|(_, name)| *name != me);
    others
        .map(|(dc, name)| match peers.get(name) {
            Some(Peer { address, url, workers }) => {
                let (address, edge_url) = (address.clone(), url.clone());
                Ok(PeerAddress { dc, address, edge_url, workers: workers.clone() })
            }
            None => {
                let message = format!("the cluster has {name}, and the file does not say where it is");
                let hint = format!("add [peers.{name}] with address = \"host:port\"");
                Err(Failure::usage("configuration", message, hint).into())
            }
        })
        .collect()
}

/// That a name is no datacenter of the keys.
pub(crate) fn unknown(key: &str, name: &str, keys: &Path, material: &ClusterMaterial) -> Failure {
    let known: Vec<&str> = material.dcs().map(|(_, name)| name).collect();
    let message = format!("{key}: {name} is not in {}", keys.display());
    Failure::usage("configuration", message, format!("the keys are those of {}", known.join(", ")))
}
