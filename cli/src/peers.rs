//! Where the other datacenters are, as the files of datacenters and aggregators say it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use sluice::ways::OtherDc;
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
    /// `host:port` of its session services, if they are processes of their own.
    sessions: Option<String>,
}

/// Another datacenter, as an aggregator sees it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Linked {
    /// `host:port` of its port for peers.
    address: String,
    /// Where clients find it.
    url: Option<String>,
}

/// Another datacenter, as a worker or a session service sees it: where it takes what moves there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Way {
    /// Where clients find it.
    url: Option<String>,
    /// `host:port` at which its workers take what is passed to them; of one process also where contexts are renewed.
    workers: Option<String>,
    /// `host:port` of its session services, if they are processes of their own.
    sessions: Option<String>,
}

impl Peer {
    /// What an aggregator needs of it.
    pub(crate) fn linked(&self) -> Linked {
        Linked { address: self.address.clone(), url: self.url.clone() }
    }

    /// What a worker and a session service need of it.
    pub(crate) fn way(&self) -> Way {
        Way { url: self.url.clone(), workers: self.workers.clone(), sessions: self.sessions.clone() }
    }
}

/// Where every other datacenter of `material` is, for the one called `me`.
pub(crate) fn addresses(
    peers: &BTreeMap<String, Linked>,
    me: &str,
    keys: &Path,
    material: &ClusterMaterial,
) -> anyhow::Result<Vec<PeerAddress>> {
    check_names(peers.keys(), me, keys, material)?;
    for (name, Linked { address, url }) in peers {
        check_address(&format!("peers.{name}.address"), address)?;
        check_url(&format!("peers.{name}.url"), url.as_deref())?;
    }
    let others = material.dcs().filter(|(_, name)| *name != me);
    others
        .map(|(dc, name)| match peers.get(name) {
            Some(Linked { address, url }) => {
                Ok(PeerAddress { dc, address: address.clone(), edge_url: url.clone() })
            }
            None => {
                let message = format!("the cluster has {name}, and the file does not say where it is");
                let hint = format!("add [peers.{name}] with address = \"host:port\"");
                Err(Failure::usage("configuration", message, hint).into())
            }
        })
        .collect()
}

/// Where other datacenters take what moves there; to one that is not among them nothing does.
pub(crate) fn ways(
    peers: &BTreeMap<String, Way>,
    me: &str,
    keys: &Path,
    material: &ClusterMaterial,
) -> anyhow::Result<Vec<OtherDc>> {
    check_names(peers.keys(), me, keys, material)?;
    for (name, Way { url, workers, sessions }) in peers {
        check_url(&format!("peers.{name}.url"), url.as_deref())?;
        for (key, address) in [("workers", workers), ("sessions", sessions)] {
            address.as_ref().map_or(Ok(()), |at| check_address(&format!("peers.{name}.{key}"), at))?;
        }
    }
    let way = |(name, Way { url, workers, sessions }): (&String, &Way)| {
        let (url, workers, sessions) = (url.clone(), workers.clone(), sessions.clone());
        material.dc_named(name).map(|dc| OtherDc { dc, url, workers, sessions })
    };
    Ok(peers.iter().filter_map(way).collect())
}

fn check_names<'a>(
    names: impl Iterator<Item = &'a String>,
    me: &str,
    keys: &Path,
    material: &ClusterMaterial,
) -> anyhow::Result<()> {
    for name in names {
        if name == me {
            let message = format!("peers.{name} is the datacenter itself");
            return Err(Failure::usage("configuration", message, "leave it out").into());
        }
        if material.dc_named(name).is_none() {
            return Err(unknown("peers", name, keys, material).into());
        }
    }
    Ok(())
}

/// Whether clients can be sent to a URL.
pub(crate) fn check_url(key: &str, url: Option<&str>) -> anyhow::Result<()> {
    let Some(url) = url else { return Ok(()) };
    let parsed = url::Url::parse(url).ok();
    if parsed.is_some_and(|url| url.scheme() == "https" && url.has_host()) {
        return Ok(());
    }
    let message = format!("{key} is {url:?}, expected https://host:port");
    Err(Failure::usage("configuration", message, "clients come in over TLS only").into())
}

/// Whether processes can be asked at an address: one or several of `host:port`.
pub(crate) fn check_address(key: &str, address: &str) -> anyhow::Result<()> {
    for one in address.split(',').map(str::trim) {
        let host = one.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0));
        let is_sound = |host: &str| match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && !host.contains([':', '/', ' ', '@']),
        };
        if !host.is_some_and(|(host, _)| is_sound(host)) {
            let message = format!("{key} is {address:?}, expected host:port");
            let hint = "a name or an address and a port, without a scheme; several with commas between them";
            return Err(Failure::usage("configuration", message, hint).into());
        }
    }
    Ok(())
}

/// That a name is no datacenter of the keys.
pub(crate) fn unknown(key: &str, name: &str, keys: &Path, material: &ClusterMaterial) -> Failure {
    let known: Vec<&str> = material.dcs().map(|(_, name)| name).collect();
    let message = format!("{key}: {name} is not in {}", keys.display());
    Failure::usage("configuration", message, format!("the keys are those of {}", known.join(", ")))
}
