//! `loadtest bucket`: what a datacenter costs whose store is an S3 bucket: its processor time beside that of the S3 server
//! for the same bytes, and how many requests it makes there.
//!
//! Files of two lengths are uploaded and downloaded. What the longer one needs more is what each 8 MiB cost; the rest is
//! what a file costs. Every file has other bytes: the server stores a block once that it is given twice, and would have less
//! to do.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use serde_json::Value;
use sluice_engine::limits::{CHUNK_LEN, MAX_RUN};
use sluice_fault_s3::Garage;
use tempfile::TempDir;

use crate::accounting::{Spent, check_room, median};
use crate::client::{Door, Target};
use crate::content::Content;
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

    #[command(flatten)]
    place: crate::Place,
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Report {
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

/// A datacenter in a bucket.
struct Datacenter {
    process: Child,
    target: Target,
    admin: SocketAddr,
    garage: Garage,
    _directory: TempDir,
}

impl Datacenter {
    fn start(sluice: &Path, parent: &Path) -> anyhow::Result<Self> {
        let garage = Garage::start_in(parent).context("the S3 server Garage is needed")?;
        let directory = tempfile::Builder::new().prefix("sluice-load-").tempdir_in(parent)?;
        let home = directory.path();
        let run = |arguments: &[&str]| {
            let output = Command::new(sluice).args(arguments).current_dir(home).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        run(&["admin", "key", "make", "keys", "--cluster", "load", "--dc", "dc-a"])?;
        run(&["admin", "token", "mint", "--keys", "keys/authority", "--tenant", "1", "--out", "token"])?;
        let key = garage.key();
        std::fs::write(
            home.join("s3.toml"),
            format!("key_id = \"{}\"\nsecret = \"{}\"\n", key.id, key.secret),
        )?;
        let any = "127.0.0.1:0";
        let config = format!(
            "dc = \"dc-a\"\nkeys = \"keys/dc-a\"\nscrub_rate = \"0\"\n\
             listen = {{ edge = \"{any}\", peer = \"{any}\", admin = \"{any}\" }}\n\
             store = {{ s3 = {{ endpoint = \"{}\", bucket = \"{}\", region = \"{}\", credentials = \"s3.toml\" }} }}\n",
            garage.endpoint(),
            garage.bucket(),
            garage.region()
        );
        std::fs::write(home.join("dc.toml"), config)?;
        let mut process = Command::new(sluice)
            .args(["--json", "dc", "--config"])
            .arg(home.join("dc.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(home.join("remarks"))?)
            .spawn()
            .with_context(|| format!("cannot start {}", sluice.display()))?;
        let mut line = String::new();
        let read = process.stdout.take().map(|stdout| BufReader::new(stdout).read_line(&mut line));
        let said: Value = serde_json::from_str(&line).unwrap_or_default();
        let found = (|| {
            let (Some(Ok(_)), Some(edge), Some(admin)) = (read, said["url"].as_str(), said["admin"].as_str())
            else {
                let remarks = std::fs::read_to_string(home.join("remarks")).unwrap_or_default();
                bail!("the datacenter did not start: {}", remarks.trim());
            };
            let (ca, token) =
                (std::fs::read(home.join("keys/ca.pem"))?, std::fs::read_to_string(home.join("token"))?);
            let target =
                Target::new(server::address(edge)?, "localhost", &ca, Door::Http1, Some(token.trim()))?;
            Ok((target, server::address(admin)?))
        })();
        match found {
            Ok((target, admin)) => Ok(Self { process, target, admin, garage, _directory: directory }),
            Err(error) => {
                server::stop(&mut process);
                Err(error)
            }
        }
    }

    async fn requests(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        Ok(by_kind(&server::metrics(self.admin).await?))
    }

    async fn read(&self) -> anyhow::Result<Reading> {
        Ok(Reading {
            sluice: Spent::until_now(self.process.id())?.server.total(),
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
        let targets = [("dc-a".to_owned(), self.target.clone())];
        let mut lanes = Lanes::open(&targets, connections).await?;
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

impl Drop for Datacenter {
    fn drop(&mut self) {
        server::stop(&mut self.process);
    }
}

/// What was spent and asked until a moment.
struct Reading {
    sluice: f64,
    server: f64,
    requests: BTreeMap<String, u64>,
}

/// The same, of a stretch of work.
struct Cost {
    sluice: f64,
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
        Cost {
            sluice: self.sluice - before.sluice,
            server: self.server - before.server,
            wall: wall.as_secs_f64(),
            requests: self.requests.into_iter().filter_map(more).collect(),
        }
    }
}

impl Cost {
    fn asked(&self) -> f64 {
        self.requests.values().sum::<u64>() as f64
    }
}

/// Requests to the bucket by kind, as metrics tell them.
fn by_kind(text: &str) -> BTreeMap<String, u64> {
    let samples = text.lines().filter_map(|line| {
        let (labels, count) = line.strip_prefix("sluice_bucket_requests_total{")?.rsplit_once("} ")?;
        let (_, kind) = labels.split_once("request=\"")?;
        Some((kind.split('"').next()?.to_owned(), count.parse().ok()?))
    });
    samples.collect()
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
    let datacenter = Datacenter::start(&sluice, &place)?;
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
            let Cost { sluice, server, .. } = costs[1][1];
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
    let work = WORK.iter().enumerate().map(|(at, work)| Row {
        work,
        sluice: of(&|costs| costs[1][at].sluice / gib),
        server: of(&|costs| costs[1][at].server / gib),
        ratio: of(&|costs| costs[1][at].sluice / costs[1][at].server),
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
        let Self { size, connections, runs, server, work, requests } = self;
        let mib = size >> 20;
        writeln!(f, "{mib} MiB over {connections} connections, medians of {runs} runs; {server}")?;
        writeln!(f, "user + system s/GiB; client and both servers share the machine, wall is of all three")?;
        writeln!(f, "{:<24} {:>7} {:>7} {:>7} {:>7}", "", "sluice", "garage", "ratio", "wall")?;
        for Row { work, sluice, server, ratio, wall } in work {
            writeln!(f, "{work:<24} {sluice:>7.2} {server:>7.2} {ratio:>7.2} {wall:>7.2}")?;
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
    fn requests_are_counted_by_kind() {
        let text = "# TYPE sluice_bucket_requests counter\n\
                    sluice_bucket_requests_total{dc=\"dc-a\",request=\"PutObject\"} 17\n\
                    sluice_bucket_requests_total{request=\"GetObject\",dc=\"dc-a\"} 3\n\
                    sluice_bucket_retries_total{dc=\"dc-a\"} 5\n";
        let expected = [("GetObject".to_owned(), 3), ("PutObject".to_owned(), 17)];
        assert_eq!(by_kind(text), BTreeMap::from(expected));
    }
}
