//! `loadtest run`: a cluster of its own under a load of one's choice.

use std::fmt;
use std::path::PathBuf;

use anyhow::ensure;
use serde::Serialize;
use uuid::Uuid;

use crate::accounting::{check_room, memory, reset_peak_memory};
use crate::client::Door;
use crate::content::Content;
use crate::grpc::Streams;
use crate::measure::{Begun, Cost, Percentiles, histogram};
use crate::plot;
use crate::server::{self, Server, Traffic};
use crate::size::Size;
use crate::upload::{Acknowledged, Lanes, Until};

/// What to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Bytes of each file.
    #[arg(long, default_value = "1GiB")]
    size: Size,

    /// Files, one after the other.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    files: u32,

    /// Requests at once.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: u16,

    /// Which door to use.
    #[arg(long, value_enum, default_value_t)]
    door: Door,

    /// Datacenters, to which requests go in turn.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=8))]
    dcs: u16,

    /// How far a file must be before the next begins.
    #[arg(long, value_enum, default_value_t)]
    until: Until,

    /// Write a plot of throughput and latency to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    #[command(flatten)]
    place: crate::Place,
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Report {
    size: u64,
    files: u32,
    concurrency: u16,
    door: Door,
    dcs: u16,
    upload: Direction,
    acknowledgement_ms: Percentiles,
    between_dcs: Traffic,
    download: Direction,
    verified: bool,
}

/// What one direction took, for all files.
#[derive(Debug, Serialize)]
struct Direction {
    bytes: u64,
    cost: Cost,
    server_cpu_s_per_gib: f64,
    machine_system_s_per_gib: f64,
    peak_rss_bytes: u64,
}

impl Direction {
    fn of(bytes: u64, cost: Cost, pid: u32) -> anyhow::Result<Self> {
        Ok(Self {
            bytes,
            cost,
            server_cpu_s_per_gib: cost.server.per_gib(bytes).total(),
            machine_system_s_per_gib: cost.machine.per_gib(bytes).system,
            peak_rss_bytes: memory(pid, "VmHWM")?,
        })
    }
}

/// Runs it.
pub(crate) async fn run(args: Args, json: bool) -> anyhow::Result<()> {
    let size = args.size.bytes();
    ensure!(size > 0, "--size must be above 0");
    let bytes = size * u64::from(args.files);
    let place = args.place.directory();
    // What is sent to one datacenter is copied to the home before it is freed.
    check_room(&place, bytes * 2)?;
    let sluice = server::binary(args.place.sluice.as_deref())?;
    let content = Content::new(args.place.seed);
    let server = Server::start(&sluice, &place, args.dcs)?;
    let pid = server.pid();
    let targets = server.targets(args.door)?;
    let at_once = args.concurrency.into();
    let mut way = match args.door {
        Door::Http1 | Door::Http2 => Way::Http(Lanes::open(&targets, at_once).await?),
        Door::Grpc => Way::Grpc(Streams::open(&targets, at_once).await?),
    };

    reset_peak_memory(pid)?;
    let traffic = server.traffic().await?;
    let begun = Begun::now(pid)?;
    let mut acknowledged: Vec<Acknowledged> = Vec::new();
    let mut ids = Vec::new();
    for _ in 0..args.files {
        let before = begun.elapsed();
        let (id, runs) = way.upload(&content, size, args.until).await?;
        acknowledged.extend(runs.into_iter().map(|run| Acknowledged { at: before + run.at, ..run }));
        ids.push(id);
    }
    let upload = Direction::of(bytes, begun.end()?, pid)?;
    let between_dcs = server.traffic().await?.since(traffic);

    // Reading needs the root; neither this nor what follows an upload is to count for the download.
    let expected = content.hash(size).to_string();
    let mut verified = true;
    for id in &ids {
        way.wait(*id, Until::Assembled).await?;
        verified &= way.root(*id).await? == Some(expected.clone());
    }
    reset_peak_memory(pid)?;
    let begun = Begun::now(pid)?;
    for id in &ids {
        way.download(*id, size).await?;
    }
    let download = Direction::of(bytes, begun.end()?, pid)?;
    verified &= way.hash(ids[0], size).await?.to_string() == expected;
    ensure!(verified, "what came back is not what was sent");

    let latencies = histogram(acknowledged.iter().map(|run| run.latency))?;
    let report = Report {
        size,
        files: args.files,
        concurrency: args.concurrency,
        door: args.door,
        dcs: args.dcs,
        upload,
        acknowledgement_ms: Percentiles::of(&latencies),
        between_dcs,
        download,
        verified,
    };
    if let Some(path) = &args.svg {
        plot::draw(path, &report.title(), &acknowledged, &latencies)?;
    }
    crate::answer(&report, json)
}

/// Through which door files go.
enum Way {
    Http(Lanes),
    Grpc(Streams),
}

impl Way {
    async fn upload(
        &mut self,
        content: &Content,
        size: u64,
        until: Until,
    ) -> anyhow::Result<(Uuid, Vec<Acknowledged>)> {
        match self {
            Self::Http(lanes) => lanes.upload(content, size, until).await,
            Self::Grpc(streams) => streams.upload(content, size, until).await,
        }
    }

    async fn wait(&mut self, id: Uuid, until: Until) -> anyhow::Result<()> {
        match self {
            Self::Http(lanes) => lanes.wait(id, until).await,
            Self::Grpc(streams) => streams.wait(id, until).await,
        }
    }

    async fn root(&mut self, id: Uuid) -> anyhow::Result<Option<String>> {
        match self {
            Self::Http(lanes) => lanes.root(id).await,
            Self::Grpc(streams) => streams.root(id).await,
        }
    }

    async fn download(&mut self, id: Uuid, size: u64) -> anyhow::Result<()> {
        match self {
            Self::Http(lanes) => lanes.download(&[format!("/v1/files/{id}/content")], size).await,
            Self::Grpc(streams) => streams.download(id, size).await,
        }
    }

    async fn hash(&mut self, id: Uuid, size: u64) -> anyhow::Result<blake3::Hash> {
        match self {
            Self::Http(lanes) => lanes.hash(&format!("/v1/files/{id}/content"), size).await,
            Self::Grpc(streams) => streams.hash(id, size).await,
        }
    }
}

impl Report {
    /// What was run.
    fn title(&self) -> String {
        let Self { files, concurrency, door, dcs, .. } = self;
        format!("{files} × {} MiB, {concurrency} at once over {door}, {dcs} datacenters", self.size >> 20)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; server: user + system time of its process", self.title())?;
        writeln!(
            f,
            "{:<10} {:>8} {:>9} {:>14} {:>22} {:>10}",
            "", "wall s", "MiB/s", "server s/GiB", "machine system s/GiB", "peak MiB"
        )?;
        for (name, direction) in [("upload", &self.upload), ("download", &self.download)] {
            writeln!(
                f,
                "{name:<10} {:>8.2} {:>9.0} {:>14.2} {:>22.2} {:>10}",
                direction.cost.wall_s,
                direction.bytes as f64 / f64::from(1 << 20) / direction.cost.wall_s,
                direction.server_cpu_s_per_gib,
                direction.machine_system_s_per_gib,
                direction.peak_rss_bytes >> 20,
            )?;
        }
        let Percentiles { p50, p90, p99, p999, max } = self.acknowledgement_ms;
        writeln!(
            f,
            "acknowledged in  p50 {p50:.1}  p90 {p90:.1}  p99 {p99:.1}  p99.9 {p999:.1}  max {max:.1} ms"
        )?;
        let Traffic { commands, command_bytes, pulled_bytes } = self.between_dcs;
        writeln!(
            f,
            "between DCs      {commands} commands, {command_bytes} bytes; {} MiB pulled",
            pulled_bytes >> 20
        )?;
        writeln!(f, "read back        equal to what was sent, and to the root")?;
        Ok(())
    }
}
