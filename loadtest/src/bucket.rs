//! `loadtest bucket`: what a datacenter costs whose store is an S3 bucket: its processor time beside that of the S3 server
//! for the same bytes, and how many requests it makes there.
//!
//! Files of two lengths are uploaded and downloaded. What the longer one needs more is what each 8 MiB cost; the rest is
//! what a file costs. Every file has other bytes: the server stores a block once that it is given twice, and would have less
//! to do.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use sluice_engine::limits::{CHUNK_LEN, MAX_RUN};
use sluice_fault_s3::Garage;

use crate::accounting::{Spent, check_room, median};
use crate::content::Content;
use crate::fleet::{Fleet, Kept};
use crate::server;
use crate::size::Size;
use crate::upload::{Lanes, Until};

/// Bytes of a request of the client.
const RUN: u64 = MAX_RUN as u64 * CHUNK_LEN;

/// How many times as long as the other the longer file is.
const TIMES: u64 = 4;

/// How long no request must have come for the work of a file to be over.
const QUIET: Duration = Duration::from_secs(1);

/// How long that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Bytes of the longer file; the other has a fourth of them.
    #[arg(long, default_value = "1GiB")]
    size: Size,

    /// Requests at once.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,

    /// Measurements, after one that warms up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    /// Measure edge, porter, keeper, aggregator and session service as processes of their own, and not one `sluice dc`.
    #[arg(long)]
    apart: bool,

    #[command(flatten)]
    place: crate::Place,
}

/// Into how many processes the datacenter is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Layout {
    /// One `sluice dc`.
    OneProcess,
    /// One for each role, and a porter.
    Apart,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OneProcess => "one process",
            Self::Apart => "a process for each role, and a porter",
        })
    }
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Report {
    layout: Layout,
    size: u64,
    connections: u16,
    runs: u32,
    server: String,
    work: Vec<Row>,
    requests: Vec<Requests>,
}

/// Medians of one kind of work with the longer file, in seconds a GiB.
#[derive(Debug, Serialize)]
struct Row {
    work: &'static str,
    /// Processor time of the datacenter.
    sluice: f64,
    /// That of each of its processes, by name.
    processes: BTreeMap<&'static str, f64>,
    /// Processor time of the S3 server.
    server: f64,
    /// Median of the ratios of the runs.
    ratio: f64,
    wall: f64,
}

/// Medians of the requests to the S3 server, each attempt counted.
#[derive(Debug, Serialize)]
struct Requests {
    work: &'static str,
    per_8_mib: f64,
    per_file: f64,
    /// Of the longer file, those that there were, by kind.
    kinds: BTreeMap<String, f64>,
}

/// Kinds of work, in the order in which they are measured.
const WORK: [&str; 3] = ["upload, until durable", "upload, until assembled", "download"];

/// Which of them requests are shown of.
const COUNTED: [usize; 2] = [1, 2];

/// A datacenter, and the server that has its bucket, which ends after it.
struct Datacenter {
    fleet: Fleet,
    garage: Garage,
}

impl Datacenter {
    fn start(layout: Layout, sluice: &Path, parent: &Path) -> anyhow::Result<Self> {
        let garage = Garage::start_in(parent).context("the S3 server Garage is needed")?;
        let fleet = match layout {
            Layout::OneProcess => Fleet::one(sluice, parent, &garage)?,
            Layout::Apart => Fleet::apart(sluice, parent, Kept::Bucket(&garage))?,
        };
        Ok(Self { fleet, garage })
    }

    async fn requests(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        Ok(by_kind(&self.fleet.metrics().await?))
    }

    async fn read(&self) -> anyhow::Result<Reading> {
        let spent = self.fleet.pids().map(|(name, pid)| Ok((name, Spent::until_now(pid)?.server.total())));
        Ok(Reading {
            processes: spent.collect::<anyhow::Result<_>>()?,
            server: self.garage.cpu().as_secs_f64(),
            requests: self.requests().await?,
        })
    }

    /// Waits until nothing more is asked of the bucket: runs are deleted after their file was assembled.
    async fn quiet(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut before = self.requests().await?;
        loop {
            tokio::time::sleep(QUIET).await;
            let now = self.requests().await?;
            if now == before {
                return Ok(());
            }
            ensure!(began.elapsed() < PATIENCE, "requests to the bucket do not end");
            before = now;
        }
    }

    /// Uploads and downloads a file of this length, and says what each kind of work took.
    async fn turn(&self, content: &Content, size: u64, connections: usize) -> anyhow::Result<Vec<Cost>> {
        let mut lanes = Lanes::open(&self.fleet.targets(), connections).await?;
        let (before, began) = (self.read().await?, Instant::now());
        let (id, _) = lanes.upload(content, size, Until::Acknowledged).await?;
        let durable = self.read().await?.since(&before, began.elapsed());
        lanes.wait(id, Until::Assembled).await?;
        let wall = began.elapsed();
        self.quiet().await?;
        let assembled = self.read().await?.since(&before, wall);
        let expected = content.hash(size);
        ensure!(lanes.root(id).await? == Some(expected.to_string()), "the root is another one");
        let path = format!("/v1/files/{id}/content");
        let (before, began) = (self.read().await?, Instant::now());
        lanes.download(std::slice::from_ref(&path), size).await?;
        let download = self.read().await?.since(&before, began.elapsed());
        ensure!(lanes.hash(&path, size).await? == expected, "what came back is not what was sent");
        lanes.remove(id).await?;
        self.quiet().await?;
        // So that nobody pays for the other.
        rustix::fs::sync();
        Ok(vec![durable, assembled, download])
    }
}

/// What was spent and asked until a moment.
struct Reading {
    /// Of the datacenter, by process.
    processes: BTreeMap<&'static str, f64>,
    /// Of the S3 server.
    server: f64,
    requests: BTreeMap<String, u64>,
}

/// The same, of a stretch of work.
struct Cost {
    processes: BTreeMap<&'static str, f64>,
    server: f64,
    wall: f64,
    requests: BTreeMap<String, u64>,
}

impl Reading {
    fn since(self, before: &Self, wall: Duration) -> Cost {
        let more = |(kind, count): (String, u64)| {
            let count = count - before.requests.get(&kind).copied().unwrap_or(0);
            (count > 0).then_some((kind, count))
        };
        let spent = self.processes.into_iter().map(|(name, spent)| (name, spent - before.processes[name]));
        Cost {
            processes: spent.collect(),
            server: self.server - before.server,
            wall: wall.as_secs_f64(),
            requests: self.requests.into_iter().filter_map(more).collect(),
        }
    }
}

impl Cost {
    /// Processor time of the datacenter.
    fn sluice(&self) -> f64 {
        self.processes.values().sum()
    }

    fn asked(&self) -> f64 {
        self.requests.values().sum::<u64>() as f64
    }
}

/// Requests to the bucket by kind, as the metrics of all processes tell them together.
fn by_kind(text: &str) -> BTreeMap<String, u64> {
    let samples = text.lines().filter_map(|line| {
        let (labels, count) = line.strip_prefix("sluice_bucket_requests_total{")?.rsplit_once("} ")?;
        let (_, kind) = labels.split_once("request=\"")?;
        Some((kind.split('"').next()?, count.parse::<u64>().ok()?))
    });
    let mut kinds = BTreeMap::<String, u64>::new();
    for (kind, count) in samples {
        *kinds.entry(kind.to_owned()).or_default() += count;
    }
    kinds
}

/// What a unit costs and what a file does, from the costs of two numbers of units.
fn line((few, cost_of_few): (u64, f64), (many, cost_of_many): (u64, f64)) -> (f64, f64) {
    let slope = (cost_of_many - cost_of_few) / (many - few) as f64;
    (slope, cost_of_few - slope * few as f64)
}

/// Runs it.
pub(crate) async fn run(args: Args, json: bool) -> anyhow::Result<()> {
    let size = args.size.bytes();
    let shorter = size / TIMES;
    ensure!(
        size > 0 && size.is_multiple_of(TIMES * RUN),
        "--size must be a multiple of {} MiB, so that both files are whole requests",
        (TIMES * RUN) >> 20
    );
    let place = args.place.directory();
    // What was removed stays for a while.
    check_room(&place, (size + shorter) * (u64::from(args.runs) + 1))?;
    let sluice = server::binary(args.place.sluice.as_deref())?;
    let layout = if args.apart { Layout::Apart } else { Layout::OneProcess };
    let datacenter = Datacenter::start(layout, &sluice, &place)?;
    let mut seeds = args.place.seed..;
    let mut rounds = Vec::new();
    for run in 0..=args.runs {
        let mut costs = Vec::new();
        for len in [shorter, size] {
            let content = Content::new(seeds.next().context("no seed is left")?);
            costs.push(datacenter.turn(&content, len, args.connections.into()).await?);
        }
        // The first is for getting warm.
        if run > 0 {
            let (sluice, server) = (costs[1][1].sluice(), costs[1][1].server);
            if !json {
                crate::remark(&format!(
                    "run {run} of {}: upload {sluice:.2} s, {server:.2} s of Garage, ratio {:.2}",
                    args.runs,
                    sluice / server
                ));
            }
            rounds.push(costs);
        }
    }
    let of = |figure: &dyn Fn(&[Vec<Cost>]) -> f64| {
        median(&rounds.iter().map(|costs| figure(costs)).collect::<Vec<f64>>())
    };
    let gib = size as f64 / f64::from(1 << 30);
    let names: Vec<&'static str> = datacenter.fleet.pids().map(|(name, _)| name).collect();
    let work = WORK.iter().enumerate().map(|(at, work)| Row {
        work,
        sluice: of(&|costs| costs[1][at].sluice() / gib),
        processes: names
            .iter()
            .map(|name| (*name, of(&|costs| costs[1][at].processes[name] / gib)))
            .collect(),
        server: of(&|costs| costs[1][at].server / gib),
        ratio: of(&|costs| costs[1][at].sluice() / costs[1][at].server),
        wall: of(&|costs| costs[1][at].wall / gib),
    });
    let requests = COUNTED.iter().map(|&at| {
        let fit = |costs: &[Vec<Cost>]| {
            line((shorter / RUN, costs[0][at].asked()), (size / RUN, costs[1][at].asked()))
        };
        let kinds = rounds.iter().flat_map(|costs| costs[1][at].requests.keys());
        let count = |kind: &String| of(&|costs| costs[1][at].requests.get(kind).copied().unwrap_or(0) as f64);
        Requests {
            work: WORK[at],
            per_8_mib: of(&|costs| fit(costs).0),
            per_file: of(&|costs| fit(costs).1),
            kinds: kinds.map(|kind| (kind.clone(), count(kind))).collect(),
        }
    });
    let report = Report {
        layout,
        size,
        connections: args.connections,
        runs: args.runs,
        server: datacenter.garage.version(),
        work: work.collect(),
        requests: requests.collect(),
    };
    crate::answer(&report, json)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layout, size, connections, runs, server, work, requests } = self;
        let mib = size >> 20;
        writeln!(f, "{mib} MiB over {connections} connections, medians of {runs} runs")?;
        writeln!(f, "sluice: {layout}; garage: {server}")?;
        writeln!(
            f,
            "user + system s/GiB; client, sluice and garage share the machine, wall is of all three"
        )?;
        writeln!(f, "{:<24} {:>7} {:>7} {:>7} {:>7}", "", "sluice", "garage", "ratio", "wall")?;
        for Row { work, sluice, server, ratio, wall, .. } in work {
            writeln!(f, "{work:<24} {sluice:>7.2} {server:>7.2} {ratio:>7.2} {wall:>7.2}")?;
        }
        if *layout == Layout::Apart {
            writeln!(f)?;
            writeln!(f, "of sluice, each process")?;
            for Row { work, processes, .. } in work {
                let shares: Vec<String> =
                    processes.iter().map(|(name, spent)| format!("{spent:.2} {name}")).collect();
                writeln!(f, "{work:<24} {}", shares.join(", "))?;
            }
        }
        writeln!(f)?;
        writeln!(f, "requests to the bucket, from files of {mib} and {} MiB", mib / TIMES)?;
        writeln!(f, "{:<24} {:>7} {:>7}   of {mib} MiB", "", "8 MiB", "a file")?;
        for Requests { work, per_8_mib, per_file, kinds } in requests {
            let kinds: Vec<String> = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            writeln!(f, "{work:<24} {per_8_mib:>7.2} {per_file:>7.1}   {}", kinds.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_longer_file_costs_more_is_what_a_unit_costs() {
        assert_eq!(line((4, 19.0), (16, 43.0)), (2.0, 11.0));
    }

    #[test]
    fn requests_of_all_processes_are_counted_by_kind() {
        let text = "# TYPE sluice_bucket_requests counter\n\
                    sluice_bucket_requests_total{dc=\"dc-a\",request=\"PutObject\"} 17\n\
                    sluice_bucket_requests_total{request=\"GetObject\",dc=\"dc-a\"} 3\n\
                    sluice_bucket_retries_total{dc=\"dc-a\"} 5\n\
                    # EOF\n\
                    sluice_bucket_requests_total{dc=\"dc-a\",request=\"PutObject\"} 4\n\
                    sluice_bucket_requests_total{dc=\"dc-a\",request=\"HeadObject\"} 1\n";
        let expected = [("GetObject", 3), ("HeadObject", 1), ("PutObject", 21)];
        let expected = expected.map(|(kind, count)| (kind.to_owned(), count));
        assert_eq!(by_kind(text), BTreeMap::from(expected));
    }
}
