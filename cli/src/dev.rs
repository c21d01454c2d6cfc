//! `sluice dev`: whole datacenters in the foreground.

mod directory;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use etcetera::BaseStrategy;
use serde_json::json;
use sluice::cluster::{Cluster, ClusterConfig, Listen};
use sluice::datacenter::StartError;
use sluice::ports::ReservedPorts;
use sluice_engine::context::Scope;
use sluice_engine::ids::{DcId, TenantId};
use sluice_node::clock::{Clock, SystemClock};
use sluice_node::descriptors::raise_descriptors;
use sluice_node::material::ClusterMaterial;
use sluice_node::telemetry;
use sluice_node::token::TokenGrant;

use self::directory::Directory;
use crate::context::{Context, quoted};
use crate::failure::Failure;
use crate::signals::{STOP_WITHIN, Signals};

const EXAMPLES: &str = "\
Files, keys and ports stay in --data, so that the next run is the same cluster. Ctrl-C stops in
order, a second one at once.

Examples:
  sluice dev                                  two datacenters; then, in another shell:
  . ~/.local/share/sluice/dev/env             sets the command line up for them
  sluice put disk.img
  sluice dev --data /tmp/three --dcs 3 --listen 127.0.0.1:8443";

/// How long the token lives; each start makes a new one.
const TOKEN_LIFE: Duration = Duration::from_secs(365 * 86_400);

/// The one tenant.
const TENANT: TenantId = TenantId::new(1);

/// Which datacenters, and where.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Where files, keys and ports are kept; by default $XDG_DATA_HOME/sluice/dev.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Where clients come in: an address, or an address and the port of the first datacenter, the others taking
    /// the next ones. By default 127.0.0.1, and ports that are free.
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = listen_at)]
    listen: Option<ListenAt>,

    /// Bytes a second at which each datacenter reads again what it has stored, to find damage; 0: never.
    #[arg(long, value_name = "SIZE", default_value = "8MiB", value_parser = crate::size::parse)]
    scrub_rate: u64,

    /// Bytes a second of uploads that a datacenter takes, such as dc-a=8MiB, or 8MiB for each of them. What is more
    /// waits, or goes to one that has room. May be given several times.
    #[arg(long, value_name = "[DC=]SIZE", value_parser = upload_rate)]
    upload_rate: Vec<(Option<String>, u64)>,

    /// How many datacenters; by default as many as there were in --data, or 2.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=8))]
    dcs: Option<u16>,
}

/// Where edges are asked to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListenAt {
    /// There, on any free ports.
    Address(IpAddr),
    /// There, on this port and those after it.
    Port(SocketAddr),
}

fn listen_at(text: &str) -> Result<ListenAt, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(ListenAt::Address(address));
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 => Ok(ListenAt::Address(address.ip())),
        Ok(address) => Ok(ListenAt::Port(address)),
        Err(_) => Err("expected an address such as 127.0.0.1, 127.0.0.1:8443 or [::1]:8443".into()),
    }
}

/// How much which datacenter takes.
fn upload_rate(text: &str) -> Result<(Option<String>, u64), String> {
    match text.split_once('=') {
        Some((name, rate)) => Ok((Some(name.to_owned()), crate::size::parse(rate)?)),
        None => Ok((None, crate::size::parse(text)?)),
    }
}

/// Runs the datacenters until they are told to stop.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let telemetry = telemetry::init("warn", "dev", None)?;
    raise_descriptors();
    let path = data_directory(args.data)?;
    let directory = Directory::open(&path)?;
    let material = directory.material(args.dcs)?;
    let grant = TokenGrant::everything(TENANT, "dev", TOKEN_LIFE);
    let token = material.token_mint().map_err(StartError::from)?.mint(&grant, SystemClock.now())?;
    let operator = TokenGrant { scopes: vec![Scope::Operate], ..grant.clone() };
    let operator = material.token_mint().map_err(StartError::from)?.mint(&operator, SystemClock.now())?;
    let ca = material.ca_pem();
    let ports = reserve(&material, args.listen, &directory, context)?;
    let mut config = ClusterConfig { ports, ..ClusterConfig::new(material, directory.path()) };
    config.settings.aggregator.scrub_rate = args.scrub_rate;
    for name in args.upload_rate.iter().filter_map(|(name, _)| name.as_ref()) {
        if config.material.dc_named(name).is_none() {
            let message = format!("--upload-rate: there is no datacenter {name}");
            return Err(Failure::usage("configuration", message, "they are dc-a, dc-b and so on").into());
        }
    }
    config.upload_rates = args.upload_rate;
    let (signals, mut cluster) = Signals::start(Cluster::start_all(config)).await?;

    let listening = cluster.dcs().map(|dc| {
        let ports = &dc.ports;
        let listen =
            Listen { edge: ports.edge.address(), peer: ports.peer.address(), admin: ports.admin.address() };
        (dc.name().to_owned(), listen)
    });
    directory.keep_ports(&listening.collect())?;
    directory.equip_clients(&ca, &token, &cluster.urls())?;
    directory.equip_operator(&operator)?;
    announce(&cluster, &directory, context)?;

    signals.serve_until(context, STOP_WITHIN, |deadline| cluster.stop_all(deadline)).await;
    telemetry.finish().await;
    Ok(())
}

/// The directory that was named, or the usual one.
pub(crate) fn data_directory(named: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    match named {
        Some(path) => Ok(path),
        None => {
            let strategy = etcetera::base_strategy::Xdg::new().context("there is no home directory")?;
            Ok(strategy.data_dir().join("sluice/dev"))
        }
    }
}

/// Reserves the ports that were asked for, or else those of the last time, or else any.
fn reserve(
    material: &ClusterMaterial,
    asked: Option<ListenAt>,
    directory: &Directory,
    context: &Context,
) -> anyhow::Result<BTreeMap<DcId, ReservedPorts>> {
    let mut kept = directory.ports();
    let mut reserved = BTreeMap::new();
    for (nth, (dc, name)) in (0..).zip(material.dcs()) {
        let last = kept.remove(name);
        let fallback = Listen::default();
        let ports = match asked {
            Some(ListenAt::Port(first)) => {
                let port = first.port().checked_add(nth).ok_or_else(|| {
                    let message = format!("there are too few ports after {first}");
                    Failure::usage("listen", message, "give a lower port")
                })?;
                let edge = SocketAddr::new(first.ip(), port);
                // Only the edge's port was asked for by anyone: the others may move.
                Listen { edge, ..last.unwrap_or_default() }
                    .reserve()
                    .or_else(|_| Listen { edge, ..fallback }.reserve())?
            }
            Some(ListenAt::Address(_)) | None => {
                let edge = match asked {
                    Some(ListenAt::Address(ip)) => SocketAddr::new(ip, 0),
                    Some(ListenAt::Port(_)) | None => fallback.edge,
                };
                let last = last.filter(|last| asked.is_none() || last.edge.ip() == edge.ip());
                let again = last.map(|last| (last, last.reserve()));
                match again {
                    Some((_, Ok(ports))) => ports,
                    Some((last, Err(error))) => {
                        let ports =
                            Listen { edge: SocketAddr::new(last.edge.ip(), 0), ..fallback }.reserve()?;
                        context.remark(&format!("{error}: {name} moves to {}", ports.edge.address()));
                        ports
                    }
                    None => Listen { edge, ..fallback }.reserve()?,
                }
            }
        };
        reserved.insert(dc, ports);
    }
    Ok(reserved)
}

/// Says where everything is.
fn announce(cluster: &Cluster, directory: &Directory, context: &Context) -> anyhow::Result<()> {
    let (ca, token, env) = (directory.file("ca.pem"), directory.file("token"), directory.file("env"));
    let dcs: Vec<_> = cluster
        .dcs()
        .map(|dc| json!({ "name": dc.name(), "url": dc.url(), "admin": dc.admin_url() }))
        .collect();
    let object = json!({ "dcs": dcs, "ca": ca, "token_file": token, "env": env, "data": directory.path() });
    context.answer(&object, || {
        let mut text = String::new();
        for dc in cluster.dcs() {
            text.push_str(&format!("{:<7} {}   admin {}\n", dc.name(), dc.url(), dc.admin_url()));
        }
        text.push_str(&format!("{:<7} {}\n{:<7} {}\n", "ca", ca.display(), "token", token.display()));
        text.push_str(&format!("{:<7} . {}\n", "shell", quoted(&env.to_string_lossy())));
        text
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_with_and_without_ports() {
        let ip: IpAddr = [127, 0, 0, 1].into();
        assert_eq!(listen_at("127.0.0.1"), Ok(ListenAt::Address(ip)));
        assert_eq!(listen_at("127.0.0.1:0"), Ok(ListenAt::Address(ip)));
        assert_eq!(listen_at("127.0.0.1:8443"), Ok(ListenAt::Port(SocketAddr::new(ip, 8443))));
        assert!(matches!(listen_at("::1"), Ok(ListenAt::Address(IpAddr::V6(_)))));
        assert!(matches!(listen_at("[::1]:1"), Ok(ListenAt::Port(SocketAddr::V6(_)))));
        for text in ["", "8443", ":8443", "localhost", "127.0.0.1:70000"] {
            assert!(listen_at(text).is_err(), "{text}");
        }
    }
}
