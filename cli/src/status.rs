//! `sluice status`: where a file stands, or the cluster.

use std::time::Duration;

use sluice_client::Client;
use sluice_proto::http::{About, FileStatus, State};
use uuid::Uuid;

use crate::context::Context;

const EXAMPLES: &str = "\
Examples:
  sluice status                   the cluster and its datacenters
  sluice status $id               state, root, missing chunks, who holds what
  sluice status $id --watch       again with every change, until it is assembled";

/// How often a watched file is asked for.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Ranges that are written out for people.
const RANGES_SHOWN: usize = 12;

/// Whose status.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file's id; the cluster if absent.
    id: Option<Uuid>,

    /// Go on until the file is assembled, in conflict or gone.
    #[arg(long, requires = "id")]
    watch: bool,
}

/// Shows it.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let client = context.client_for_questions()?;
    match args.id {
        None => {
            let about = client.about().await?;
            context.answer(&about, || about_words(&about))
        }
        Some(id) if args.watch => watch(&client, id, context).await,
        Some(id) => {
            let status = client.status(id).await?;
            context.answer(&status, || words(&status))
        }
    }
}

async fn watch(client: &Client, id: Uuid, context: &Context) -> anyhow::Result<()> {
    let mut last = None;
    loop {
        let status = client.status(id).await?;
        // Who answers may change from one time to the next; that alone is no news.
        let seen = FileStatus { dc: String::new(), ..status.clone() };
        if last.as_ref() != Some(&seen) {
            context.answer(&status, || words(&status))?;
            last = Some(seen);
        }
        match status.state {
            State::Assembled | State::Conflict | State::Dropped => return Ok(()),
            State::Receiving | State::Complete => tokio::time::sleep(WATCH_EVERY).await,
        }
    }
}

fn about_words(about: &About) -> String {
    let mut text = format!("cluster   {}, version {}, asked {}\n", about.cluster, about.version, about.dc);
    for dc in &about.dcs {
        let state = if dc.reachable { "reachable" } else { "not reachable" };
        let url = dc.url.as_deref().unwrap_or("-");
        let drain = dc.drain.as_ref().map_or_else(String::new, |drain| format!("   drains: {drain}"));
        text.push_str(&format!("{:<9} {state}   {url}{drain}\n", dc.name));
    }
    text
}

fn words(status: &FileStatus) -> String {
    let mut text = format!("file      {}", status.id);
    if !status.name.is_empty() {
        text.push_str(&format!("   {}", status.name));
    }
    text.push_str(&format!(
        "\nstate     {}, home {} (epoch {}), asked {}\nsize      {}\n",
        status.state.name(),
        status.home,
        status.home_epoch,
        status.dc,
        match status.size {
            Some(size) => format!("{size} bytes, {} chunks", status.chunks),
            None => "not settled: the upload goes on, or was given up".into(),
        }
    ));
    if !status.home_answered {
        let home = &status.home;
        text.push_str(&format!(
            "home      {home} does not answer: if it stays away, another takes the file over\n"
        ));
    }
    if let Some(root) = &status.root {
        text.push_str(&format!("root      {root}\n"));
    }
    if let Some(conflict) = &status.conflict {
        text.push_str(&format!("conflict  {conflict}\n"));
    }
    if status.missing_chunks > 0 {
        let doubt = if status.home_answered { "" } else { ", as far as is known without the home" };
        text.push_str(&format!(
            "missing   {} chunks: {}{doubt}\n",
            status.missing_chunks,
            ranges(&status.missing)
        ));
    }
    if !status.damaged.is_empty() {
        text.push_str(&format!(
            "damaged   {}: sending the file again under this id mends it\n",
            ranges(&status.damaged)
        ));
    }
    for holder in &status.holders {
        text.push_str(&format!("{:<9} {} chunks: {}\n", holder.dc, holder.chunks, ranges(&holder.ranges)));
    }
    text
}

fn ranges(pairs: &[[u64; 2]]) -> String {
    let mut shown: Vec<String> = pairs
        .iter()
        .take(RANGES_SHOWN)
        .map(|[first, end]| match end.saturating_sub(*first) {
            1 => first.to_string(),
            _ => format!("{first}-{}", end.saturating_sub(1)),
        })
        .collect();
    if pairs.len() > RANGES_SHOWN {
        shown.push("…".into());
    }
    shown.join(" ")
}
