//! `sluice ls`: list files.

use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;
use sluice_client::ListFilter;
use sluice_proto::http::{FileEntry, FilePage, State};
use uuid::Uuid;

use crate::context::Context;

const EXAMPLES: &str = "\
Lists what the datacenter that answers knows, by id. With more than --limit, the id to go on after
is printed on standard error, and is `next` in JSON.

Examples:
  sluice ls
  sluice ls --state receiving --limit 20
  sluice ls --after 0193e4a0-7b1c-7def-8123-456789abcdef";

/// The most files that a server gives in one page.
const MAX_PAGE: usize = 1000;

/// Which files.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Only those in this state.
    #[arg(long, value_parser = states())]
    state: Option<State>,

    /// How many at most.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,

    /// Only those with ids above.
    #[arg(long, value_name = "ID")]
    after: Option<Uuid>,
}

fn states() -> impl TypedValueParser<Value = State> {
    PossibleValuesParser::new(State::ALL.map(State::name))
        .try_map(|name| State::from_name(&name).ok_or("no such state"))
}

/// Lists them.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let client = context.client_for_questions()?;
    let mut files: Vec<FileEntry> = Vec::new();
    let mut after = args.after;
    let mut next = None;
    while files.len() < args.limit {
        let limit = (args.limit - files.len()).min(MAX_PAGE);
        let filter = ListFilter { state: args.state, limit: Some(limit), after };
        let page = client.list(filter).await?;
        let more = page.next.filter(|next| after != Some(*next));
        files.extend(page.files);
        next = more;
        match more {
            Some(_) => after = more,
            None => break,
        }
    }
    let page = FilePage { files, next };
    context.answer(&page, || page.files.iter().map(line).collect())?;
    if let Some(next) = page.next.filter(|_| !context.json) {
        context.remark(&format!("more: sluice ls --after {next}"));
    }
    Ok(())
}

fn line(file: &FileEntry) -> String {
    let size = file.size.map_or("open".into(), |size| size.to_string());
    format!("{}  {:<9}  {size:>16}  {:<8}  {}\n", file.id, file.state.name(), file.home, file.name)
}
