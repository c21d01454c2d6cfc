//! The subcommands, and what happens around each: settings, Ctrl-C, errors, exit codes.
//!
//! To add one: a module with `Args` (clap) and `run`, a variant of [`Verb`], and an arm in [`dispatch`].

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde_json::json;
use sluice_client::ExitClass;

use crate::context::Context;
use crate::failure::{Failure, report};
use crate::settings::Flags;
use sluice_node::role::Role;
use sluice_node::telemetry;
use tracing::Instrument as _;

use crate::{admin, command, config, dc, demo, dev, fsck, get, ls, put, rm, role, status};

/// How long tasks may take to end after the result is known.
const SHUTDOWN: Duration = Duration::from_secs(2);

const EXAMPLES: &str = "\
Examples:
  sluice demo                     see it work, without a cluster
  sluice dev                      a cluster of your own, on this machine
  export SLUICE_URL=https://dc-a.example:8443,https://dc-b.example:8443
  export SLUICE_TOKEN_FILE=~/.sluice/token SLUICE_CA=~/.sluice/ca.pem
  id=$(sluice put disk.img)       send a file, print its id
  sluice status $id               where it stands, and who holds what
  sluice get $id -o copy.img      read it back, verified
  sluice ls --state receiving     what is not finished

Exit codes:
  0 done    1 unexpected    2 usage    3 not found    4 not allowed
  5 integrity or conflict   6 try again later         130 interrupted";

/// Send files to a Sluice cluster over any of its datacenters, and read them back verified.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Print one JSON object on standard output.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) flags: Flags,

    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show all of it: two datacenters here, one of which dies on the way.
    Demo(demo::Args),
    /// Run whole datacenters here, in the foreground.
    Dev(dev::Args),
    /// Run one datacenter here, in the foreground, as a file describes it.
    Dc(dc::Args),
    /// Run one edge of a datacenter here, in the foreground, as a file describes it.
    #[command(after_help = role::EDGE_EXAMPLES)]
    Edge(role::Args),
    /// Run one session service of a datacenter here, in the foreground, as a file describes it.
    #[command(after_help = role::SESSION_EXAMPLES)]
    Session(role::Args),
    /// Run the worker of a datacenter here, in the foreground, as a file describes it.
    #[command(after_help = role::WORKER_EXAMPLES)]
    Worker(role::Args),
    /// Run one aggregator of a datacenter here, in the foreground, as a file describes it.
    #[command(after_help = role::AGGREGATOR_EXAMPLES)]
    Aggregator(role::Args),
    /// Send a file; running it again carries on.
    Put(put::Args),
    /// Read a file back, verified; running it again carries on.
    Get(get::Args),
    /// Where a file stands, or without an id where the cluster does.
    Status(status::Args),
    /// List files.
    Ls(ls::Args),
    /// Remove a file for good.
    Rm(rm::Args),
    /// Check a volume that no process uses, and say what is damaged.
    Fsck(fsck::Args),
    /// What only who runs a cluster does: keys, tokens, tenants, drain.
    #[command(subcommand)]
    Admin(admin::Action),
    /// Commands between datacenters.
    #[command(subcommand)]
    Command(command::Action),
    /// Settings: where they come from, and whether a file of them is sound.
    #[command(subcommand)]
    Config(config::Action),
}

impl Verb {
    /// What it is called, if it asks a cluster.
    fn asks(&self) -> Option<&'static str> {
        match self {
            Self::Put(_) => Some("sluice put"),
            Self::Get(_) => Some("sluice get"),
            Self::Status(_) => Some("sluice status"),
            Self::Ls(_) => Some("sluice ls"),
            Self::Rm(_) => Some("sluice rm"),
            Self::Demo(_)
            | Self::Dev(_)
            | Self::Dc(_)
            | Self::Edge(_)
            | Self::Session(_)
            | Self::Worker(_)
            | Self::Aggregator(_)
            | Self::Fsck(_)
            | Self::Admin(_)
            | Self::Command(_)
            | Self::Config(_) => None,
        }
    }

    /// Whether it deals with signals itself, because there is something to end in order.
    fn minds_signals(&self) -> bool {
        match self {
            Self::Demo(_)
            | Self::Dev(_)
            | Self::Dc(_)
            | Self::Edge(_)
            | Self::Session(_)
            | Self::Worker(_)
            | Self::Aggregator(_) => true,
            Self::Put(_)
            | Self::Get(_)
            | Self::Status(_)
            | Self::Ls(_)
            | Self::Rm(_)
            | Self::Fsck(_)
            | Self::Admin(_)
            | Self::Command(_)
            | Self::Config(_) => false,
        }
    }
}

async fn dispatch(verb: Verb, context: &Context) -> anyhow::Result<()> {
    match verb {
        Verb::Demo(args) => demo::run(args, context).await,
        Verb::Dev(args) => dev::run(args, context).await,
        Verb::Dc(args) => dc::run(args, context).await,
        Verb::Edge(args) => role::run(Role::Edge, args, context).await,
        Verb::Session(args) => role::run(Role::Session, args, context).await,
        Verb::Worker(args) => role::run(Role::Worker, args, context).await,
        Verb::Aggregator(args) => role::run(Role::Aggregator, args, context).await,
        Verb::Put(args) => put::run(args, context).await,
        Verb::Get(args) => get::run(args, context).await,
        Verb::Status(args) => status::run(args, context).await,
        Verb::Ls(args) => ls::run(args, context).await,
        Verb::Rm(args) => rm::run(args, context).await,
        Verb::Fsck(args) => fsck::run(args, context).await,
        Verb::Admin(action) => admin::run(action, context).await,
        Verb::Command(action) => command::run(action, context),
        Verb::Config(action) => config::run(action, context),
    }
}

/// Runs a command that asks a cluster as the beginning of a trace, which goes on in whatever it asks for.
async fn asking(
    command: Option<&'static str>,
    work: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let Some(command) = command else { return work.await };
    let Some(telemetry) = telemetry::init_traces("cli").map_err(role::not_begun)? else { return work.await };
    let span = tracing::info_span!("command", otel.name = command, otel.kind = "client");
    let result = work.instrument(span).await;
    telemetry.finish().await;
    result
}

/// Threads for what blocks (disk, mostly): more of them wait, and cost memory, for the same disk.
const MAX_BLOCKING: usize = 32;

/// Runs the command line to its end.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return not_understood(&error),
    };
    let context = Context::new(cli.json, cli.flags);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .max_blocking_threads(MAX_BLOCKING)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return report(&error.into(), &context),
    };
    let minds_signals = cli.verb.minds_signals();
    let asks = cli.verb.asks();
    let result = runtime.block_on(async {
        tokio::select! {
            result = asking(asks, dispatch(cli.verb, &context)) => result,
            () = interrupted(), if !minds_signals => Err(Failure::Interrupted.into()),
        }
    });
    // A read that blocks on a pipe must not keep an interrupted process.
    runtime.shutdown_timeout(SHUTDOWN);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error, &context),
    }
}

/// Help and versions, too, are what clap calls errors.
fn not_understood(error: &clap::Error) -> ExitCode {
    // With both closed there is nobody left to tell.
    let _ = error.print();
    if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
        let rendered = error.render().to_string();
        let message = rendered.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        let object = json!({ "error": {
            "code": "usage", "message": message, "hint": "see --help", "trace": null, "dc": null,
            "exit": error.exit_code(), "resume": null,
        }});
        let _ = writeln!(std::io::stdout().lock(), "{object}");
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(ExitClass::Unexpected.code()))
}

async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_err() {
        // Without the handler, the signal itself ends the process.
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
