//! `sluice demo`: the whole way of one file through two datacenters, of which one dies on the way.
//!
//! Everything happens in this process, over real sockets with real TLS, in a directory that is gone afterwards. The
//! stages are played one after the other ([`play`]); whatever ends them, success, failure or Ctrl-C, the datacenters
//! are ended and the directory is removed before the command returns.

mod input;
mod scratch;
mod watch;

use std::future::Future;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::HumanCount;
use serde_json::{Map, Value, json};
use sluice::cluster::{Cluster, ClusterConfig};
use sluice::datacenter::StartError;
use sluice_aggregator::Traffic;
use sluice_client::{
    Client, ClientConfig, ClientError, DownloadOptions, Order, Target, Token, UploadOptions, WaitFor,
};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::Root;
use sluice_engine::ids::{ClientFileId, DcId, FileId, TenantId};
use sluice_node::clock::{Clock, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::telemetry;
use sluice_node::token::TokenGrant;
use sluice_proto::http::{FileStatus, State};
use uuid::Uuid;

use self::input::Input;
use self::scratch::Scratch;
use self::watch::{Seen, Watch};
use crate::context::Context;
use crate::failure::{Failure, INTERRUPTED};
use crate::progress::Progress;
use crate::signals::Signals;
use crate::size::{self, count};

const EXAMPLES: &str = "\
Two datacenters in this process, real TLS between all of them, no network and no root needed. The
file goes to both in shuffled order; dc-b is killed at 60 % and comes back; the file is read back
through dc-b, and compared with the input, as is the reassembled file at its home, dc-a.

Examples:
  sluice demo
  sluice demo disk.img
  sluice demo --size 2GiB --seed 7
  sluice demo --keep /tmp/demo          leaves both datacenters' directories there to look at";

const A: DcId = DcId::new(1);
const B: DcId = DcId::new(2);

const TENANT: TenantId = TenantId::new(1);

/// dc-b is killed when this much is acknowledged, in percent.
const KILL_AT: u64 = 60;

/// Requests at once. Their chunks may all be acknowledged in one moment: fewer of them, and the kill comes nearer to
/// [`KILL_AT`].
const JOBS: usize = 4;

/// How long one state may take to be reached while nothing moves.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a server is asked to wait for a state in one request.
const POLL: Duration = Duration::from_secs(2);

/// How long the datacenters may take to close when their directories are kept.
const DEADLINE: Duration = Duration::from_secs(10);

/// What to send through, and what to leave behind.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file to send; without it, pseudo-random bytes.
    file: Option<PathBuf>,

    /// How many pseudo-random bytes.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size::parse, conflicts_with = "file")]
    size: u64,

    /// Where pseudo-random bytes and the order of chunks come from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Use this directory, new or empty, and leave it there.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Plays the demo.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    // What happens to dc-b is no news here; RUST_LOG says otherwise.
    telemetry::init("off", "demo", None)?;
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    let scratch = Scratch::open(args.keep.as_deref())?;
    let mut stage = Stage::new(context);
    let mut cluster = None;
    let outcome = tokio::select! {
        outcome = play(&args, &scratch, &mut cluster, &mut stage) => outcome,
        () = signals.next() => Err(Failure::Interrupted.into()),
    };
    let tidied = async {
        if let Some(cluster) = &mut cluster {
            if args.keep.is_some() {
                cluster.stop_all(DEADLINE).await;
            } else {
                cluster.kill_all().await;
            }
        }
        scratch.close()
    };
    let tidied = tokio::select! {
        tidied = tidied => tidied,
        () = signals.next() => std::process::exit(INTERRUPTED.into()),
    };
    outcome?;
    tidied?;
    stage.finish()
}

/// All stages, in order.
async fn play(
    args: &Args,
    scratch: &Scratch,
    cluster: &mut Option<Cluster>,
    stage: &mut Stage<'_>,
) -> anyhow::Result<()> {
    let input = match &args.file {
        Some(path) => Input::of_file(path),
        None => {
            scratch.check_room(args.size.saturating_mul(3))?;
            Input::generate(&scratch.path().join("input"), args.size, args.seed).await
        }
    }?;
    if args.file.is_some() {
        scratch.check_room(input.source().size().saturating_mul(2))?;
    }
    let file = Geometry::new(input.source().size()).map_err(ClientError::from)?;
    stage.note("size", file.size());
    stage.note("chunks", file.chunks());
    stage.note("seed", args.seed);
    stage.note("kept", scratch.kept());

    let cluster = cluster.insert(start(scratch, stage).await?);
    let token = token(cluster)?;
    let (both, a, b) = (cluster.urls(), url(cluster, A), url(cluster, B));
    let client = client(cluster, &token, both)?;

    let (id, root) = upload(args.seed, &input, file, &client, cluster, stage).await?;

    let before = Instant::now();
    let via_a = self::client(cluster, &token, vec![a])?;
    let status = reach(&via_a, id, State::Complete, cluster).await?;
    let traffic = cluster.all_traffic();
    same("the root of the complete file", status.root.as_deref(), root)?;
    let commands = count(traffic.commands_sent, "command");
    let bytes = count(traffic.command_bytes_sent, "byte");
    stage.note("root", root.to_string());
    stage.note("commands", traffic.commands_sent);
    stage.note("command_bytes", traffic.command_bytes_sent);
    stage.line("complete", &format!("root {root}   between DCs: {commands}, {bytes}"), before);

    let before = Instant::now();
    reach(&via_a, id, State::Assembled, cluster).await?;
    let pulled = cluster.traffic(A).pulled_bytes;
    stage.note("pulled_bytes", pulled);
    stage.line("assemble", &format!("{} pulled", size::words(pulled)), before);

    let before = Instant::now();
    let via_b = self::client(cluster, &token, vec![b])?;
    reach(&via_b, id, State::Complete, cluster).await?;
    let read = read_back(&via_b, id, root).await?;
    stage.note("read_root", read.to_string());
    same("what was read back via dc-b", Some(&read.to_string()), root)?;
    stage.line("read", "via dc-b: equal", before);

    let before = Instant::now();
    let reassembled = reassembled(cluster, id, file).await?;
    stage.note("reassembled_root", reassembled.to_string());
    same("the reassembled file at dc-a", Some(&reassembled.to_string()), root)?;
    stage.line("compare", "reassembled at dc-a: equal", before);
    Ok(())
}

async fn start(scratch: &Scratch, stage: &mut Stage<'_>) -> anyhow::Result<Cluster> {
    let before = Instant::now();
    let material =
        ClusterMaterial::generate("demo", &[(A, "dc-a"), (B, "dc-b")]).map_err(StartError::from)?;
    let cluster = Cluster::start_all(ClusterConfig::new(material, scratch.path())).await?;
    let dcs: Map<String, Value> = cluster.dcs().map(|dc| (dc.name().to_owned(), dc.url().into())).collect();
    let words: Vec<String> = cluster.dcs().map(|dc| format!("{} {}", dc.name(), dc.url())).collect();
    stage.note("dcs", dcs);
    stage.line("start", &words.join("   "), before);
    Ok(cluster)
}

fn token(cluster: &Cluster) -> anyhow::Result<Token> {
    let mint = cluster.material().token_mint().map_err(StartError::from)?;
    let grant = TokenGrant::everything(TENANT, "demo", Duration::from_secs(86_400));
    Ok(Token::new(&mint.mint(&grant, SystemClock.now())?))
}

fn url(cluster: &Cluster, dc: DcId) -> String {
    cluster.config(dc).map(|config| config.url()).unwrap_or_default()
}

fn client(cluster: &Cluster, token: &Token, urls: Vec<String>) -> anyhow::Result<Client> {
    let mut config = ClientConfig::new(urls, token.clone(), cluster.material().ca_pem().into_bytes());
    (config.jobs, config.adaptive) = (JOBS, false);
    config.retry.retry_for = PATIENCE;
    config.retry.longest_pause = Duration::from_millis(500);
    Ok(Client::new(config)?)
}

/// Sends the file, hashes it meanwhile as `b3sum` would, and kills and restarts dc-b on the way.
async fn upload(
    seed: u64,
    input: &Input,
    file: Geometry,
    client: &Client,
    cluster: &mut Cluster,
    stage: &mut Stage<'_>,
) -> anyhow::Result<(Uuid, Root)> {
    let before = Instant::now();
    let options = UploadOptions {
        name: input.name().to_owned(),
        order: Order::Shuffled { seed, inside: true },
        wait: WaitFor::Acknowledged,
        ..UploadOptions::default()
    };
    let progress = stage.progress("sent");
    let (watch, mut seen) = Watch::begin(progress.as_ref().map(Progress::observer));
    let sending = async { Ok(client.upload(input.source(), &options, watch).await?) };
    let threshold = (file.chunks() * KILL_AT).div_ceil(100);
    let incident = async {
        let created =
            seen.wait_for(|seen| seen.created.is_some()).await.ok().and_then(|seen| seen.created.clone());
        if let Some((id, home)) = created {
            suspended(progress.as_ref(), || {
                stage.line(
                    "create",
                    &format!("{id}  {}  home {home}", count(file.chunks(), "chunk")),
                    before,
                );
            });
        }
        if threshold >= file.chunks() {
            return Ok(None);
        }
        let Ok(at) =
            seen.wait_for(|seen| seen.acknowledged() >= threshold).await.map(|seen| seen.acknowledged())
        else {
            return Ok(None);
        };
        let down = Instant::now();
        cluster.kill(B).await;
        cluster.start(B).await?;
        Ok(Some(Incident { at, down: down.elapsed() }))
    };
    let (sent, incident, hash) = try_all(sending, incident, input.hash()).await?;
    drop(progress);
    let root = sent.root;
    same("the root that the client computed", Some(&root.to_string()), hash)?;

    let seen: Seen = seen.borrow().clone();
    let shares: Vec<String> = seen
        .chunks
        .iter()
        .enumerate()
        .map(|(nth, (dc, chunks))| match nth {
            0 => format!("{} to {dc}", count(*chunks, "chunk")),
            _ => format!("{} to {dc}", HumanCount(*chunks)),
        })
        .collect();
    let shares = if shares.is_empty() { "nothing to send".to_owned() } else { shares.join(", ") };
    let happened = match &incident {
        Some(Incident { at, down }) => format!(
            "dc-b killed at {} %, back after {:.1} s",
            at * 100 / file.chunks().max(1),
            down.as_secs_f64()
        ),
        None => "too few chunks to kill dc-b between them".to_owned(),
    };
    stage.note("id", sent.id.to_string());
    stage.note("input_root", hash.to_string());
    stage.note("sent", json!(seen.chunks));
    stage.note(
        "killed",
        incident.map(|Incident { at, down }| {
            json!({ "dc": "dc-b", "at_chunks": at, "back_after_ms": down.as_millis() as u64 })
        }),
    );
    stage.line("upload", &format!("{shares}   {happened}"), before);
    Ok((sent.id, root))
}

/// What happened to dc-b.
struct Incident {
    /// Chunks acknowledged when it was killed.
    at: u64,
    /// From the decision to kill it until it served again.
    down: Duration,
}

/// Awaits all three, or the first failure.
async fn try_all<A, B, C>(
    a: impl Future<Output = anyhow::Result<A>>,
    b: impl Future<Output = anyhow::Result<B>>,
    c: impl Future<Output = anyhow::Result<C>>,
) -> anyhow::Result<(A, B, C)> {
    tokio::try_join!(a, b, c)
}

/// Runs `act` while no bar is in the way.
fn suspended(progress: Option<&Progress>, act: impl FnOnce()) {
    match progress {
        Some(progress) => progress.suspend(act),
        None => act(),
    }
}

/// Waits for a state for as long as something moves.
async fn reach(client: &Client, id: Uuid, state: State, cluster: &Cluster) -> anyhow::Result<FileStatus> {
    let mut last: Option<(State, u64, Traffic)> = None;
    let mut moved = Instant::now();
    loop {
        let status = client.wait(id, state, POLL).await?;
        match status.state {
            State::Conflict => {
                let detail = status.conflict.unwrap_or_default();
                return Err(ClientError::Conflict { id, dc: status.dc, detail }.into());
            }
            State::Dropped => return Err(ClientError::Dropped { id, dc: status.dc }.into()),
            reached if reached >= state => return Ok(status),
            State::Receiving | State::Complete | State::Assembled => {}
        }
        let now = Some((status.state, status.missing_chunks, cluster.all_traffic()));
        if last != now {
            (last, moved) = (now, Instant::now());
        }
        if moved.elapsed() >= PATIENCE {
            let missing_chunks = status.missing_chunks;
            let (state, expected, after) = (status.state, state, moved.elapsed());
            return Err(ClientError::Unsettled { id, state, expected, missing_chunks, after }.into());
        }
    }
}

/// Reads the whole file through a client, and hashes it as `b3sum` would.
async fn read_back(client: &Client, id: Uuid, root: Root) -> anyhow::Result<Root> {
    let hasher = Arc::new(Mutex::new(blake3::Hasher::new()));
    let target = Target::Writer(Box::new(HashWriter(hasher.clone())));
    let options = DownloadOptions { range: None, expected_root: Some(root) };
    client.download(id, target, &options, sluice_client::unobserved()).await?;
    let hash = hasher.lock().unwrap_or_else(PoisonError::into_inner).finalize();
    Ok(Root::from_bytes(*hash.as_bytes()))
}

struct HashWriter(Arc<Mutex<blake3::Hasher>>);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Hashes the file that dc-a has published, from its own disk alone.
async fn reassembled(cluster: &Cluster, id: Uuid, file: Geometry) -> anyhow::Result<Root> {
    let lost = |message: String| Failure::Integrity { code: "not-reassembled", message };
    let home = cluster.running(A).ok_or_else(|| lost("dc-a does not run".into()))?;
    let (store, id) = (home.store().clone(), FileId::derive(TENANT, ClientFileId::new(id)));
    let summary = store.summary(id).await.map_err(StartError::from)?;
    if summary.and_then(|summary| summary.published).is_none() {
        return Err(lost("dc-a has not published the file".into()).into());
    }
    let mut hasher = blake3::Hasher::new();
    for chunk in 0..file.chunks() {
        let index = ChunkIndex::new(chunk).map_err(ClientError::from)?;
        let bytes = store.read_chunk(id, index).await.map_err(|error| lost(format!("dc-a: {error}")))?;
        hasher.update(&bytes);
    }
    Ok(Root::from_bytes(*hasher.finalize().as_bytes()))
}

/// Fails unless `what` has the expected root.
fn same(what: &str, got: Option<&str>, expected: Root) -> anyhow::Result<()> {
    let expected = expected.to_string();
    if got == Some(expected.as_str()) {
        return Ok(());
    }
    let message = format!("{what} is {}, expected {expected}", got.unwrap_or("unknown"));
    Err(Failure::Integrity { code: "root-mismatch", message }.into())
}

/// Tells of one stage after the other, and collects the figures.
struct Stage<'a> {
    context: &'a Context,
    begun: Instant,
    figures: Map<String, Value>,
    times: Map<String, Value>,
}

impl<'a> Stage<'a> {
    fn new(context: &'a Context) -> Self {
        Self { context, begun: Instant::now(), figures: Map::new(), times: Map::new() }
    }

    fn note(&mut self, key: &str, value: impl Into<Value>) {
        self.figures.insert(key.to_owned(), value.into());
    }

    /// A stage has ended.
    fn line(&mut self, name: &str, words: &str, since: Instant) {
        let took = since.elapsed();
        self.times.insert(name.to_owned(), (took.as_millis() as u64).into());
        if !self.context.json {
            self.say(&format!("{name:<9} {words}   {:.1} s", took.as_secs_f64()));
        }
    }

    fn say(&self, line: &str) {
        // With standard output closed the exit code still tells.
        let _ = writeln!(std::io::stdout().lock(), "{line}");
    }

    /// A bar, unless nobody looks.
    fn progress(&self, verb: &'static str) -> Option<Progress> {
        (!self.context.json).then(|| Progress::start(verb))
    }

    fn finish(mut self) -> anyhow::Result<()> {
        let seconds = self.begun.elapsed().as_secs_f64();
        self.note("ok", true);
        self.note("seconds", (seconds * 1000.0).round() / 1000.0);
        let times = std::mem::take(&mut self.times);
        self.note("stages_ms", times);
        self.context.answer(&self.figures, || format!("OK {seconds:.1} s"))
    }
}
