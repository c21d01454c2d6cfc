//! `sluice edge`, `session`, `worker` and `aggregator`: one role of a datacenter as a process, from a file that says where
//! everything is.

pub(crate) mod file;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use sluice_node::descriptors::raise_descriptors;
use sluice_node::role::Role;
use sluice_node::telemetry::{self, TelemetryError};

use self::file::RoleFile;
use crate::context::Context;
use crate::failure::Failure;
use crate::reload::{self, ConfigFile as _, Hangup};
use crate::signals::Signals;

pub(crate) const EDGE_EXAMPLES: &str = "\
An edge keeps nothing: run as many as you need, and stop or kill any of them at any time. Its
file looks like this; what is left out of it has a default, paths are relative to the file:
  role = \"edge\"
  dc = \"dc-a\"                          # the datacenter's name, as the keys have it
  keys = \"keys/roles/dc-a/edge\"        # made by `sluice admin key make`
  listen = \"0.0.0.0:8443\"              # where clients come in
  admin = \"127.0.0.1:9091\"             # /livez /startupz /readyz /metrics
  sessions = \"sessions.dc-a:8446\"      # each address of the name is a process
  workers = \"workers.dc-a:8445\"        # for `sluice dc` it is listen.inside of its file
                                        # several names: \"one:8445,other:8445\"
  memory = \"256MiB\"                    # for bodies in flight
  redis = \"redis://cache.dc-a:6379\"    # if there is one; what the processes share is kept there
  redis_password = \"redis-password\"    # the file of its password
  log = \"warn\"

Of a process that runs, log, memory, upload_rate, scrub_rate, keys and certificates are taken over when
the files change, at once at SIGHUP; one that makes no sense is logged, and nothing of it counts. All else counts from the
next start.

Examples:
  sluice config check /etc/sluice/edge.toml
  sluice edge --config /etc/sluice/edge.toml";

pub(crate) const SESSION_EXAMPLES: &str = "\
A session service turns tokens into session contexts, for edges. It keeps nothing. Its file looks
like this:
  role = \"session\"
  dc = \"dc-a\"
  keys = \"keys/roles/dc-a/session\"     # made by `sluice admin key make`
  listen = \"0.0.0.0:8446\"              # where edges ask
  admin = \"127.0.0.1:9092\"
  workers = \"workers.dc-a:8445\"        # they know when a drain has contexts renewed elsewhere
  redis = \"redis://cache.dc-a:6379\"    # if there is one; what the processes share is kept there
  redis_password = \"redis-password\"    # the file of its password
  log = \"warn\"
  [peers.dc-b]                         # where they are renewed then
  sessions = \"dc-b.example:8446\"       # of `sluice dc` its listen.inside, as workers = \"...\"

Examples:
  sluice session --config /etc/sluice/session.toml";

pub(crate) const WORKER_EXAMPLES: &str = "\
A worker keeps the volume in `data`, or the prefix of a bucket: one process for each datacenter. It
takes and gives chunks for edges, and lets one aggregator at a time reach the store. It may be
stopped or killed at any time, and started again: clients try again, and nothing that was
acknowledged is lost. Its file looks like this:
  role = \"worker\"
  dc = \"dc-a\"
  keys = \"keys/roles/dc-a/worker\"      # made by `sluice admin key make`
  listen = \"0.0.0.0:8445\"              # where edges and aggregators ask
  admin = \"127.0.0.1:9093\"
  aggregators = \"aggregators.dc-a:8447\" # each address of the name is a process
  data = \"/var/lib/sluice\"            # or, instead of it, a bucket: see `sluice dc --help`
  memory = \"256MiB\"                    # for bodies in flight and chunks read ahead
  upload_rate = \"1GiB\"                 # bytes a second of uploads that are taken; what is more waits,
                                       # or goes to a datacenter that has room
  redis = \"redis://cache.dc-a:6379\"    # if there is one; what the processes share is kept there
  redis_password = \"redis-password\"    # the file of its password
  log = \"warn\"
  [peers.dc-b]                         # where what is too much goes, and all of it in a drain
  url = \"https://dc-b.example:8443\"    # for clients that go where they are sent
  workers = \"dc-b.example:8445\"        # for all others: what listens there is dc-b's worker

Beside one that keeps a bucket there may be any number of others, porters, that keep nothing: chunks
go through them past the keeper, which only says what is where. Their files are the same, but that
they ask the keeper instead of aggregators; edges are told all of them in workers = \"...\":
  keeper = \"worker.dc-a:8445\"         # instead of aggregators; store = { s3 = ... } as the keeper has it

Examples:
  sluice config check /etc/sluice/worker.toml
  sluice worker --config /etc/sluice/worker.toml";

pub(crate) const AGGREGATOR_EXAMPLES: &str = "\
An aggregator knows which chunks of which file are where, talks to other datacenters, and
assembles files. It has no disk: what it knows it reads from the worker's store, and what must
not be forgotten is kept there. Run two or more: with Redis, and keys made with --shares, they
divide the files among themselves; without, one has all and the others stand by. When one is gone
others answer for its files within 5 s. Its file looks like this:
  role = \"aggregator\"
  dc = \"dc-a\"
  keys = \"keys/roles/dc-a/aggregator\"  # made by `sluice admin key make`
  listen = \"0.0.0.0:8447\"              # where workers ask
  peer = \"0.0.0.0:8444\"                # where other datacenters come in
  admin = \"127.0.0.1:9094\"             # /readyz: it has its part, or stands by
  workers = \"workers.dc-a:8445\"
  url = \"https://dc-a.example:8443\"    # where clients find the datacenter's edges
  scrub_rate = \"8MiB\"                  # bytes a second that are read again; 0: never
  takeover_after = \"10min\"             # unfinished files of a datacenter that is gone
  absent_after = \"1min\"                # until what only such a datacenter has is missing
  memory = \"64MiB\"                     # for calls that arrive
  redis = \"redis://cache.dc-a:6379\"    # if there is one; what the processes share is kept there
  redis_password = \"redis-password\"    # the file of its password
  log = \"warn\"
  [peers.dc-b]
  address = \"dc-b.example:8444\"
  url = \"https://dc-b.example:8443\"

Examples:
  sluice config check /etc/sluice/aggregator.toml
  sluice aggregator --config /etc/sluice/aggregator.toml";

/// Which process.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file that describes it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// How long requests in flight may take to finish, after a signal.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    stop_within: Duration,
}

/// Runs a process of `role` until it is told to stop.
pub(crate) async fn run(role: Role, args: Args, context: &Context) -> anyhow::Result<()> {
    let file = RoleFile::read(&args.config)?;
    if file.role() != role {
        let message = format!("{} describes a process of role {}", args.config.display(), file.role());
        let hint = format!("run it with `sluice {} --config`", file.role());
        return Err(Failure::usage("configuration", message, hint).into());
    }
    let telemetry = telemetry::init(file.log(), role.name(), Some(file.dc())).map_err(not_begun)?;
    raise_descriptors();
    let hangup = Hangup::listen()?;
    let (signals, process) = Signals::start(file.start()).await?;
    let (listen, admin) = (process.address().to_string(), format!("http://{}", process.admin_address()));
    let object = json!({ "role": role.name(), "listen": listen, "admin": admin });
    context.answer(&object, || format!("{role:<10} {listen}   admin {admin}\n"))?;
    let _watching = reload::watch(args.config, file, telemetry.level(), process.live().clone(), hangup);
    signals.serve_until(context, args.stop_within, |deadline| process.stop(deadline)).await;
    telemetry.finish().await;
    Ok(())
}

/// Why a process neither logs nor traces as it was told.
pub(crate) fn not_begun(error: TelemetryError) -> Failure {
    let hint = match &error {
        TelemetryError::Level(_) => "such as warn or info",
        TelemetryError::Export(_) => {
            "OTEL_* say where spans go; without OTEL_EXPORTER_OTLP_ENDPOINT none are exported"
        }
        TelemetryError::Twice => "this is a bug",
    };
    Failure::usage("configuration", error.to_string(), hint)
}
