//! `sluice admin drain` and `undrain`: a datacenter hands its work over to another, or takes it up again.

use std::time::Duration;

use sluice_client::{Client, DrainRequest};
use sluice_engine::drain::Phase;
use sluice_proto::http::DrainStatus;
use tokio::time::Instant;

use crate::context::Context;
use crate::failure::Failure;
use crate::settings::duration;

const EXAMPLES: &str = "\
In three phases, one after the other, unless one is named: data (new chunks and files go to the
other datacenter), sessions (contexts are renewed there), channels (clients are told to go there).
Nothing fails meanwhile, and `undrain` takes all of it back. With --evacuate files that are here
move too, until this datacenter holds the sole copy of nothing, and can be switched off.

The token must be an operator's (`sluice admin token mint --operator`).

Examples:
  sluice admin drain dc-a --to dc-b
  sluice admin drain dc-a --to dc-b --phase data
  sluice admin drain dc-a --to dc-b --evacuate --wait 1h
  sluice admin undrain dc-a";

/// How often progress is asked for.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// Which drain.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The datacenter that hands over.
    dc: String,

    /// The datacenter that takes over.
    #[arg(long, value_name = "DC")]
    to: String,

    /// Go to this phase, forward or back, and no further: data, sessions or channels.
    #[arg(long, value_name = "PHASE", value_parser = phase)]
    phase: Option<Phase>,

    /// Move files too, so that the datacenter can be switched off.
    #[arg(long)]
    evacuate: bool,

    /// How long to wait until all of a phase has moved; the drain goes on after that.
    #[arg(long, value_name = "TIME", default_value = "10min")]
    wait: String,
}

/// Which drain to end.
#[derive(Debug, clap::Args)]
pub(crate) struct UndrainArgs {
    /// The datacenter that takes its work up again.
    dc: String,
}

fn phase(text: &str) -> Result<Phase, String> {
    let names = Phase::ALL.map(Phase::name).join(", ");
    Phase::from_name(text).ok_or_else(|| format!("expected one of {names}"))
}

/// Drains.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let client = client_of(&args.dc, context).await?;
    let deadline = Instant::now() + duration("wait", &args.wait)?;
    let phases = match args.phase {
        Some(phase) => vec![phase],
        None => Phase::ALL.to_vec(),
    };
    let Some(last) = phases.last().copied() else { return Ok(()) };
    for phase in phases {
        let (to, evacuate) = (args.to.clone(), args.evacuate);
        let mut status = client.drain(DrainRequest::Begin { to, phase, evacuate }).await?;
        let mut said = String::new();
        loop {
            let left = what_is_left(&status, phase, phase == last);
            let Some(left) = left else { break };
            if left != said {
                context.remark(&format!("{phase:<9} {left}"));
                said = left;
            }
            if Instant::now() >= deadline {
                context.answer(&status, || words(&status))?;
                let message = format!("{} still has {said}", args.dc);
                return Err(Failure::NotYet { code: "drain", message }.into());
            }
            tokio::time::sleep(ASK_EVERY).await;
            status = client.drain(DrainRequest::Show).await?;
        }
        context.remark(&format!("{phase:<9} done"));
        if phase == last {
            context.answer(&status, || words(&status))?;
        }
    }
    Ok(())
}

/// Ends a drain.
pub(crate) async fn undrain(args: UndrainArgs, context: &Context) -> anyhow::Result<()> {
    let status = client_of(&args.dc, context).await?.drain(DrainRequest::End).await?;
    context.answer(&status, || words(&status))
}

/// What has to move before a phase is done, if anything. Files take longest, and are waited for in the end.
fn what_is_left(status: &DrainStatus, phase: Phase, is_last: bool) -> Option<String> {
    let mut left = Vec::new();
    if status.bodies > 0 {
        left.push(format!("{} uploads under way", status.bodies));
    }
    if phase == Phase::Channels && status.connections > 0 {
        left.push(format!("{} connections", status.connections));
    }
    if is_last && status.evacuate && status.files_left > 0 {
        left.push(format!("{} files", status.files_left));
    }
    (!left.is_empty()).then(|| left.join(", "))
}

/// A client of one datacenter, by its name.
async fn client_of(dc: &str, context: &Context) -> anyhow::Result<Client> {
    let about = context.client_for_questions()?.about().await?;
    let Some(found) = about.dcs.iter().find(|known| known.name == dc) else {
        let known: Vec<&str> = about.dcs.iter().map(|dc| dc.name.as_str()).collect();
        let message = format!("there is no datacenter {dc}");
        return Err(Failure::usage("dc", message, format!("the cluster has {}", known.join(", "))).into());
    };
    let Some(url) = found.url.clone() else {
        let message = format!("nobody says where the edges of {dc} are");
        let hint = "give its URL alone with --url, or say it in the configuration of its peers";
        return Err(Failure::usage("dc", message, hint).into());
    };
    context.client(|config| config.urls = vec![url])
}

fn words(status: &DrainStatus) -> String {
    let DrainStatus { dc, phase, to, evacuate, files_left, bodies, connections } = status;
    let (Some(phase), Some(to)) = (phase, to) else { return format!("{dc:<9} does not drain\n") };
    let mut text = format!("{dc:<9} drains to {to}: {phase}\n");
    text.push_str(&format!("uploads   {bodies} under way, {connections} connections\n"));
    if *evacuate {
        text.push_str(&match files_left {
            0 => format!("files     none: {dc} holds the sole copy of nothing, and can be switched off\n"),
            left => format!("files     {left} left\n"),
        });
    }
    text
}
