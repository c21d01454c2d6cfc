//! `loadtest idle`: what a TLS connection costs that says nothing, and one that has said something and is kept.

use std::fmt;

use anyhow::{Context, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;
use sluice_proto::http::About;

use crate::accounting::memory;
use crate::client::{Connection, Door};
use crate::server::{self, Server};

/// How many.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Connections.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=16_000))]
    connections: u32,

    /// Which door they knock at.
    #[arg(long, value_enum, default_value_t)]
    door: Door,

    #[command(flatten)]
    place: crate::Place,
}

/// What they cost.
#[derive(Debug, Serialize)]
struct Report {
    connections: u32,
    door: Door,
    resident_before_bytes: u64,
    /// KiB for each connection that has only shaken hands.
    silent_kib: f64,
    /// KiB for each that made a request and waits.
    kept_kib: f64,
}

/// Connections that are opened at once.
const BATCH: usize = 64;

/// Runs it.
pub(crate) async fn run(args: Args, json: bool) -> anyhow::Result<()> {
    ensure!(args.door != Door::Grpc, "an idle connection of gRPC is one of HTTP/2: --door http2");
    let count = args.connections as usize;
    allow_files(u64::from(args.connections))?;
    let sluice = server::binary(args.place.sluice.as_deref())?;
    let server = Server::start(&sluice, &args.place.directory(), 1)?;
    let targets = server.targets(args.door)?;
    let (_, target) = &targets[0];
    // What the first ones bring about is not theirs: code that is loaded, tables that are made.
    let mut first = open(target, BATCH).await?;
    ask(&mut first).await?;
    drop(first);

    let before = settled(&server).await?;
    let mut connections = open(target, count).await?;
    let silent = settled(&server).await?;
    ask(&mut connections).await?;
    let kept = settled(&server).await?;
    drop(connections);
    let each = |now: u64| now.saturating_sub(before) as f64 / 1024.0 / f64::from(args.connections);
    let report = Report {
        connections: args.connections,
        door: args.door,
        resident_before_bytes: before,
        silent_kib: each(silent),
        kept_kib: each(kept),
    };
    crate::answer(&report, json)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} TLS connections over {}; resident memory of the server",
            self.connections, self.door
        )?;
        writeln!(f, "silent after the handshake   {:>6.1} KiB each", self.silent_kib)?;
        writeln!(f, "kept after a request         {:>6.1} KiB each", self.kept_kib)?;
        Ok(())
    }
}

/// Has this process, and the server that it starts, open so many connections and a few files more.
fn allow_files(connections: u64) -> anyhow::Result<()> {
    let (wanted, limits) = (connections + 256, getrlimit(Resource::Nofile));
    if limits.current.is_some_and(|limit| limit < wanted) {
        let raised = Rlimit { current: Some(wanted), maximum: limits.maximum };
        setrlimit(Resource::Nofile, raised)
            .with_context(|| format!("{wanted} open files are needed: raise the limit with `ulimit -Hn`"))?;
    }
    Ok(())
}

async fn open(target: &crate::client::Target, count: usize) -> anyhow::Result<Vec<Connection>> {
    let mut connections = Vec::with_capacity(count);
    while connections.len() < count {
        let batch = BATCH.min(count - connections.len());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..batch {
            let target = target.clone();
            tasks.spawn(async move { target.connect().await });
        }
        while let Some(connection) = tasks.join_next().await {
            connections.push(connection??);
        }
    }
    Ok(connections)
}

async fn ask(connections: &mut [Connection]) -> anyhow::Result<()> {
    for connection in connections {
        let _: About = connection.json("GET", "/v1", None::<&()>).await?;
    }
    Ok(())
}

/// What is resident once it has stopped to fall: an allocator gives pages back after a while.
async fn settled(server: &Server) -> anyhow::Result<u64> {
    const STEP: std::time::Duration = std::time::Duration::from_millis(500);
    let mut last = memory(server.pid(), "VmRSS")?;
    loop {
        tokio::time::sleep(STEP).await;
        let now = memory(server.pid(), "VmRSS")?;
        if now.abs_diff(last) < 64 << 10 {
            return Ok(now);
        }
        last = now;
    }
}
