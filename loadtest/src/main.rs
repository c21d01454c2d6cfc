//! `loadtest`: what Sluice costs and how fast it is, on this machine, beside a peer.
//!
//! ```sh
//! cargo run --release -p loadtest -- run --size 1GiB --concurrency 8 --svg run.svg
//! cargo run --release -p loadtest -- peers
//! ```
//!
//! Everything that a measurement starts or writes is owned by a value on the stack of [`run`], and goes with it: at
//! the end, at an error, and at SIGINT or SIGTERM, which only drop that future.

mod accounting;
mod bucket;
mod client;
mod content;
mod fleet;
mod grpc;
mod idle;
mod ledger;
mod measure;
mod nginx;
mod peers;
mod plot;
mod roles;
mod run;
mod server;
mod size;
mod upload;

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

/// Measure Sluice on this machine. Figures of different runs or machines cannot be compared; ratios within one can.
#[derive(Debug, Parser)]
#[command(name = "loadtest", version)]
struct Cli {
    /// Print one JSON object on standard output.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// A cluster of its own: time, processor time, memory and latency of uploads and downloads.
    Run(run::Args),
    /// Sluice and nginx in turn, with the same bytes and the same client.
    Peers(peers::Args),
    /// A datacenter in one process and in four, in turn: what it costs to have roles apart.
    Roles(roles::Args),
    /// A datacenter whose store is an S3 bucket, and what it costs beside the S3 server.
    ///
    /// Starts the S3 server Garage, one `sluice dc` that keeps its files there, and a client, all on this machine. They
    /// share its processors, so times on the wall say nothing about any of them: compare processor time. Nothing is
    /// scrubbed meanwhile, and every file has other bytes, since Garage stores the same ones only once.
    ///
    /// With `--apart` each role is a process of its own, and one porter carries the bytes past the worker that keeps the
    /// bucket. Processor time and requests are those of all processes together; what each of them spent is said, too.
    ///
    /// The `garage` that is first on the path is measured, or else the one in cargo's directory. One that was built for
    /// CI is hardly optimised, costs more than Garage has to, and so makes the ratio too good. One that is optimised:
    /// `cargo install garage --version 2.5.0 --locked --root DIR`, and `DIR/bin` on the path.
    Bucket(bucket::Args),
    /// What the ledger of a very large file costs.
    Ledger(ledger::Args),
    /// What idle TLS connections cost.
    Idle(idle::Args),
}

/// Where a measurement finds its server, and leaves its data.
#[derive(Debug, clap::Args)]
struct Place {
    /// The `sluice` to measure; by default the one built beside this program.
    #[arg(long, value_name = "FILE")]
    sluice: Option<PathBuf>,

    /// The directory for data, on the disk to measure; by default the system's for temporary files.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// What the bytes that are sent are made from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Place {
    fn directory(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(std::env::temp_dir)
    }
}

/// Exit code of a program that was interrupted.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return report(&error.into()),
    };
    let ended = runtime.block_on(async {
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::select! {
            ended = run(cli) => ended.map(|()| ExitCode::SUCCESS),
            _ = interrupt.recv() => Ok(ExitCode::from(INTERRUPTED)),
            _ = terminate.recv() => Ok(ExitCode::from(INTERRUPTED)),
        }
    });
    ended.unwrap_or_else(|error: anyhow::Error| report(&error))
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.verb {
        Verb::Run(args) => run::run(args, cli.json).await,
        Verb::Peers(args) => peers::run(args, cli.json).await,
        Verb::Roles(args) => roles::run(args, cli.json).await,
        Verb::Bucket(args) => bucket::run(args, cli.json).await,
        Verb::Ledger(args) => {
            let json = cli.json;
            // It computes and never waits; a signal must get through meanwhile.
            tokio::task::spawn_blocking(move || ledger::run(&args, json))
                .await
                .context("the ledger panicked")?
        }
        Verb::Idle(args) => idle::run(args, cli.json).await,
    }
}

fn report(error: &anyhow::Error) -> ExitCode {
    remark(&format!("error: {error:#}"));
    ExitCode::FAILURE
}

/// Writes what was measured to standard output: one JSON object, or else the words.
fn answer(report: &(impl Serialize + Display), json: bool) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string_pretty(report)? + "\n" } else { report.to_string() };
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // Whoever reads has read enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}

/// Writes a remark to standard error.
fn remark(text: &str) {
    // With standard error closed there is nobody left to tell.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
