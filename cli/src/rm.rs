//! `sluice rm`: remove a file for good.

use std::io::{BufRead, Write};

use anyhow::Context as _;
use serde_json::json;
use sluice_client::UnfinishedUploads;
use uuid::Uuid;

use crate::context::{Context, is_interactive};
use crate::failure::Failure;
use crate::settings::state_dir;

const EXAMPLES: &str = "\
The id is never used again. Asks first on a terminal; elsewhere it needs --yes.

Examples:
  sluice rm 0193e4a0-7b1c-7def-8123-456789abcdef
  sluice rm $id --yes";

/// Which file.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file's id.
    id: Uuid,

    /// Do not ask.
    #[arg(long, short)]
    yes: bool,
}

/// Removes it.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let client = context.client_for_questions()?;
    if !args.yes {
        if !is_interactive() {
            let message = format!("removing {} needs a yes, and nobody can be asked", args.id);
            return Err(Failure::usage("not-confirmed", message, "give --yes").into());
        }
        let status = client.status(args.id).await?;
        let size = status.size.map_or("of open size".into(), |size| format!("{size} bytes"));
        let question = format!("Remove {} ({:?}, {size}) for good? [y/N] ", args.id, status.name);
        if !tokio::task::spawn_blocking(move || ask(&question)).await?? {
            return Err(Failure::usage("not-confirmed", "nothing was removed", "answer y").into());
        }
    }
    let removed = client.remove(args.id).await;
    // An upload that is given up must not be carried on, also if the cluster never heard of it.
    if removed.as_ref().err().is_none_or(|error| error.code() == "not-found") {
        UnfinishedUploads::at(state_dir()?.join("uploads")).forget_id(args.id)?;
    }
    removed?;
    context.answer(&json!({ "id": args.id, "removed": true }), || args.id.to_string())
}

fn ask(question: &str) -> anyhow::Result<bool> {
    let mut stderr = std::io::stderr().lock();
    stderr.write_all(question.as_bytes()).and_then(|()| stderr.flush()).context("cannot ask")?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
