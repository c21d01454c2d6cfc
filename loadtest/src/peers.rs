//! `loadtest peers`: the same bytes through Sluice and through nginx, in turn, by the same client.
//!
//! A machine that does other things, too, makes every figure worthless but one: the ratio of two that were taken one
//! right after the other. So the two take turns after a warm-up, and what counts is the median of the pairs' ratios.
//!
//! Sluice runs one datacenter, as nginx is one server; over TLS 1.3 and the same cipher, with as many connections. It
//! takes the file in runs of 8 chunks, verifies and syncs them, and an upload ends when the file is complete. nginx
//! takes one file for each connection by PUT, and neither verifies nor syncs.

use std::fmt;

use anyhow::{Context, ensure};
use serde::Serialize;

use crate::accounting::{check_room, median};
use crate::client::{Door, Target};
use crate::content::Content;
use crate::measure::{Begun, Cost};
use crate::nginx::{self, Nginx};
use crate::server::{self, Server};
use crate::size::Size;
use crate::upload::{Lanes, Small, Until};

/// What to compare.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Bytes of the file.
    #[arg(long, default_value = "1GiB")]
    size: Size,

    /// Pairs of measurements, after one that warms up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,

    /// Connections to either server.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    connections: u16,

    /// Worker processes of nginx; by default one for each processor, as Sluice has threads.
    #[arg(long)]
    workers: Option<usize>,

    /// Files of 1 KiB in each measurement of small ones.
    #[arg(long, default_value_t = 4000)]
    small: u64,

    #[command(flatten)]
    place: crate::Place,
}

/// Connections over which small files are sent.
const SMALL_LANES: usize = 16;
const SMALL_LEN: u64 = 1 << 10;

/// What was compared.
#[derive(Debug, Serialize)]
struct Report {
    size: u64,
    pairs: u32,
    connections: u16,
    nginx: String,
    nginx_workers: usize,
    rows: Vec<Row>,
}

/// One kind of work, by both.
#[derive(Debug, Serialize)]
struct Row {
    work: &'static str,
    unit: &'static str,
    sluice: Side,
    nginx: Side,
    /// Medians of the ratios of the pairs, Sluice's figure over nginx's.
    ratio: Side,
}

/// Medians of one side, or of ratios.
#[derive(Clone, Copy, Debug, Serialize)]
struct Side {
    wall: f64,
    server_cpu: f64,
    machine_system: f64,
}

/// One server, made ready.
enum Peer {
    Sluice(Server),
    Nginx(Nginx),
}

impl Peer {
    fn pid(&self) -> u32 {
        match self {
            Self::Sluice(server) => server.pid(),
            Self::Nginx(nginx) => nginx.pid(),
        }
    }

    fn targets(&self) -> anyhow::Result<Vec<(String, Target)>> {
        match self {
            Self::Sluice(server) => server.targets(Door::Http1),
            Self::Nginx(nginx) => Ok(vec![("nginx".to_owned(), nginx.target().clone())]),
        }
    }

    /// Takes the file in, gives it back, and takes small ones; verifies what it gives if asked to.
    async fn round(&self, content: &Content, args: &Args, nth: u32) -> anyhow::Result<Vec<Cost>> {
        let (pid, size) = (self.pid(), args.size.bytes());
        let verify = nth == 0;
        // Anew each time: neither server keeps connections that are idle while the other has its turn.
        let targets = self.targets()?;
        let mut lanes = Lanes::open(&targets, args.connections.into()).await?;
        match self {
            Self::Sluice(_) => {
                let begun = Begun::now(pid)?;
                let (id, _) = lanes.upload(content, size, Until::Complete).await?;
                let upload = begun.end()?;
                settle();
                lanes.wait(id, Until::Assembled).await?;
                let path = format!("/v1/files/{id}/content");
                if verify {
                    ensure!(lanes.hash(&path, size).await? == content.hash(size), "sluice gave other bytes");
                }
                let begun = Begun::now(pid)?;
                lanes.download(&[path], size).await?;
                let download = begun.end()?;
                lanes.remove(id).await?;
                settle();
                let mut small = Lanes::open(&targets, SMALL_LANES).await?;
                let begun = Begun::now(pid)?;
                small.small(content, Small::Create, args.small, SMALL_LEN).await?;
                Ok(vec![upload, download, begun.end()?])
            }
            Self::Nginx(_) => {
                let begun = Begun::now(pid)?;
                let paths = lanes.put_whole(content, size, "/file").await?;
                let upload = begun.end()?;
                settle();
                let begun = Begun::now(pid)?;
                lanes.download(&paths, size).await?;
                let download = begun.end()?;
                for path in paths {
                    lanes.delete(&path).await?;
                }
                settle();
                let mut small = Lanes::open(&targets, SMALL_LANES).await?;
                let begun = Begun::now(pid)?;
                let put = Small::Put { prefix: format!("/small-{nth}") };
                small.small(content, put, args.small, SMALL_LEN).await?;
                Ok(vec![upload, download, begun.end()?])
            }
        }
    }
}

/// Has the system write what it put off, so that nobody pays for the other.
fn settle() {
    rustix::fs::sync();
}

/// Runs it.
pub(crate) async fn run(args: Args, json: bool) -> anyhow::Result<()> {
    let version = nginx::version().context("nginx is not installed: apt-get install nginx-light")?;
    let size = args.size.bytes();
    ensure!(size > 0, "--size must be above 0");
    let place = args.place.directory();
    check_room(&place, size * 2)?;
    let sluice = server::binary(args.place.sluice.as_deref())?;
    let workers = match args.workers {
        Some(workers) => workers,
        None => std::thread::available_parallelism()?.get(),
    };
    let content = Content::new(args.place.seed);
    let peers =
        [Peer::Sluice(Server::start(&sluice, &place, 1)?), Peer::Nginx(Nginx::start(&place, workers).await?)];
    for peer in &peers {
        peer.round(&content, &args, 0).await?;
    }
    let mut rounds = Vec::new();
    for pair in 1..=args.pairs {
        let mut costs = Vec::new();
        for peer in &peers {
            costs.push(peer.round(&content, &args, pair).await?);
        }
        if !json {
            let upload = costs.iter().map(|costs| costs[0].server.per_gib(size).total());
            let upload: Vec<String> = upload.map(|cpu| format!("{cpu:.2}")).collect();
            crate::remark(&format!(
                "pair {pair} of {}: upload {} server CPU-s/GiB",
                args.pairs,
                upload.join(" and ")
            ));
        }
        rounds.push(costs);
    }
    let kinds = [
        ("upload", "s/GiB", size as f64 / f64::from(1 << 30)),
        ("download", "s/GiB", size as f64 / f64::from(1 << 30)),
        ("1 KiB files, 16 connections", "ms each", args.small as f64 / 1000.0),
    ];
    let rows = kinds.iter().enumerate().map(|(kind, (work, unit, amount))| {
        let pairs: Vec<[Side; 2]> =
            rounds.iter().map(|costs| [0, 1].map(|side| Side::of(costs[side][kind], *amount))).collect();
        Row {
            work,
            unit,
            sluice: Side::median(pairs.iter().map(|pair| pair[0])),
            nginx: Side::median(pairs.iter().map(|pair| pair[1])),
            ratio: Side::median(pairs.iter().map(|[a, b]| a.over(*b))),
        }
    });
    let report = Report {
        size,
        pairs: args.pairs,
        connections: args.connections,
        nginx: version,
        nginx_workers: workers,
        rows: rows.collect(),
    };
    crate::answer(&report, json)
}

impl Side {
    /// What a measurement comes to for each unit.
    fn of(cost: Cost, amount: f64) -> Self {
        Self {
            wall: cost.wall_s / amount,
            server_cpu: cost.server.total() / amount,
            machine_system: cost.machine.system / amount,
        }
    }

    fn over(self, other: Self) -> Self {
        Self {
            wall: self.wall / other.wall,
            server_cpu: self.server_cpu / other.server_cpu,
            machine_system: self.machine_system / other.machine_system,
        }
    }

    fn median(sides: impl Iterator<Item = Self>) -> Self {
        let sides: Vec<Self> = sides.collect();
        let of = |part: fn(&Self) -> f64| median(&sides.iter().map(part).collect::<Vec<_>>());
        Self {
            wall: of(|side| side.wall),
            server_cpu: of(|side| side.server_cpu),
            machine_system: of(|side| side.machine_system),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} MiB over {} connections, medians of {} pairs; {} with {} workers, PUT over TLS 1.3",
            self.size >> 20,
            self.connections,
            self.pairs,
            self.nginx,
            self.nginx_workers
        )?;
        writeln!(f, "{:<29} {:<8} {:>22} {:>22} {:>22}", "", "", "wall", "server CPU", "machine system")?;
        let heads = "sluice   nginx  ratio";
        writeln!(f, "{:<29} {:<8} {heads:>22} {heads:>22} {heads:>22}", "", "")?;
        for Row { work, unit, sluice, nginx, ratio } in &self.rows {
            write!(f, "{work:<29} {unit:<8}")?;
            for part in [|s: &Side| s.wall, |s: &Side| s.server_cpu, |s: &Side| s.machine_system] {
                write!(f, " {:>7.3} {:>7.3} {:>6.2}", part(sluice), part(nginx), part(ratio))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accounting::CpuTime;

    fn cost(wall_s: f64, user: f64) -> Cost {
        let server = CpuTime { user, system: 1.0 };
        Cost { wall_s, server, machine: CpuTime { user: 9.0, system: 4.0 } }
    }

    #[test]
    fn the_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_medians() {
        let pairs = [(1.0, 2.0), (4.0, 2.0), (9.0, 3.0)];
        let ratios = pairs.map(|(a, b)| Side::of(cost(a, 0.0), 2.0).over(Side::of(cost(b, 1.0), 2.0)));
        let ratio = Side::median(ratios.into_iter());
        assert_eq!((ratio.wall, ratio.server_cpu, ratio.machine_system), (2.0, 0.5, 1.0));
        assert_eq!(Side::of(cost(3.0, 2.0), 2.0).server_cpu, 1.5);
    }
}
