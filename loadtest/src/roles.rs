//! `loadtest roles`: what it costs to run the roles of a datacenter as processes: the same upload and download through one
//! process and through four, in turns.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::ensure;
use serde::Serialize;

use crate::accounting::{Spent, check_room, median};
use crate::client::{Door, Target};
use crate::content::Content;
use crate::fleet::{Fleet, Kept};
use crate::server::{self, Server};
use crate::size::Size;
use crate::upload::{Lanes, Until};

/// The roles, in the order in which figures are shown.
const ROLES: [&str; 4] = ["edge", "worker", "aggregator", "session"];

/// What to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Bytes of the file.
    #[arg(long, default_value = "1GiB")]
    size: Size,

    /// Requests at once.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,

    /// How often each has its turn.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,

    #[command(flatten)]
    place: crate::Place,
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Report {
    size: u64,
    connections: u16,
    upload: Direction,
    download: Direction,
}

/// Medians of one direction, in seconds of processor time a GiB.
#[derive(Debug, Serialize)]
struct Direction {
    one_process: f64,
    processes: f64,
    roles: [f64; ROLES.len()],
    /// Median of the ratios of the pairs.
    ratio: f64,
}

/// Uploads and downloads once, and says what each of `pids` spent, in seconds a GiB.
async fn turn(
    targets: &[(String, Target)],
    pids: &[u32],
    content: &Content,
    args: &Args,
) -> anyhow::Result<[Vec<f64>; 2]> {
    let size = args.size.bytes();
    let spent = || pids.iter().map(|pid| Spent::until_now(*pid)).collect::<anyhow::Result<Vec<_>>>();
    let since = |before: Vec<Spent>| -> anyhow::Result<Vec<f64>> {
        let now = spent()?.into_iter().zip(before);
        Ok(now.map(|(now, before)| now.since(before).server.per_gib(size).total()).collect())
    };
    let mut lanes = Lanes::open(targets, args.connections.into()).await?;
    let before = spent()?;
    let (id, _) = lanes.upload(content, size, Until::Complete).await?;
    let upload = since(before)?;
    lanes.wait(id, Until::Assembled).await?;
    let expected = content.hash(size);
    ensure!(lanes.root(id).await? == Some(expected.to_string()), "the root is another one");
    let path = format!("/v1/files/{id}/content");
    let before = spent()?;
    lanes.download(std::slice::from_ref(&path), size).await?;
    let download = since(before)?;
    ensure!(lanes.hash(&path, size).await? == expected, "what came back is not what was sent");
    lanes.remove(id).await?;
    // So that nobody pays for the other.
    rustix::fs::sync();
    Ok([upload, download])
}

/// Runs it.
pub(crate) async fn run(args: Args, json: bool) -> anyhow::Result<()> {
    let size = args.size.bytes();
    ensure!(size > 0, "--size must be above 0");
    let place = args.place.directory();
    check_room(&place, size * 2)?;
    let sluice = server::binary(args.place.sluice.as_deref())?;
    let content = Content::new(args.place.seed);
    let (one, fleet) = (Server::start(&sluice, &place, 1)?, Fleet::apart(&sluice, &place, Kept::Volume)?);
    let pids: BTreeMap<&str, u32> = fleet.pids().collect();
    let pids = ROLES.map(|role| pids[role]);
    let mut rounds = Vec::new();
    for pair in 0..=args.pairs {
        let alone = turn(&one.targets(Door::Http1)?, &[one.pid()], &content, &args).await?;
        let many = turn(&fleet.targets(), &pids, &content, &args).await?;
        // The first is for getting warm.
        if pair > 0 {
            rounds.push((alone, many));
        }
    }
    let direction = |at: usize| {
        let of = |figure: &dyn Fn(&Vec<f64>, &Vec<f64>) -> f64| {
            let all: Vec<f64> = rounds.iter().map(|(alone, many)| figure(&alone[at], &many[at])).collect();
            median(&all)
        };
        let sum = |figures: &Vec<f64>| figures.iter().sum::<f64>();
        Direction {
            one_process: of(&|alone, _| sum(alone)),
            processes: of(&|_, many| sum(many)),
            roles: std::array::from_fn(|role| of(&|_, many| many[role])),
            ratio: of(&|alone, many| sum(many) / sum(alone)),
        }
    };
    let (upload, download) = (direction(0), direction(1));
    crate::answer(&Report { size, connections: args.connections, upload, download }, json)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size, connections, .. } = self;
        writeln!(f, "{} MiB over {connections} connections; user + system s/GiB, medians", size >> 20)?;
        write!(f, "{:<10} {:>11} {:>10} {:>7}", "", "one process", "processes", "ratio")?;
        ROLES.iter().try_for_each(|role| write!(f, " {role:>10}"))?;
        writeln!(f)?;
        for (name, direction) in [("upload", &self.upload), ("download", &self.download)] {
            let Direction { one_process, processes, roles, ratio } = direction;
            write!(f, "{name:<10} {one_process:>11.2} {processes:>10.2} {ratio:>7.2}")?;
            roles.iter().try_for_each(|spent| write!(f, " {spent:>10.2}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}
