//! What is there, compared with what was answered: everything acknowledged, with the right values; nothing that was
//! never sent; whole files equal; what has ended, gone.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::Root;
use sluice_engine::limits::MAX_LEVEL;
use sluice_engine::span::Place;
use sluice_proto::http::{FileStatus, State, TreeNode};

use crate::file::{DCS, File, NAMES};
use crate::web::{Answer, Web};

/// How long datacenters may take to find one another again, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was found of a file at a datacenter.
enum Found {
    /// It is not what it should be.
    Wrong(String),
    /// It cannot be said now.
    NotYet(String),
    /// All is well.
    Good,
}

use Found::{Good, NotYet, Wrong};

/// Checks a file at every datacenter; why it is not as it should be.
pub(crate) async fn verify(web: &Web, file: &File, read: bool) -> Result<(), String> {
    for dc in 0..DCS {
        eventually(file, dc, async || look(web, file, dc, read).await).await?;
    }
    Ok(())
}

/// Checks that a file that has ended is gone everywhere.
pub(crate) async fn verify_gone(web: &Web, file: &File) -> Result<(), String> {
    for dc in 0..DCS {
        let gone = async || match get(web, file, dc, "").await {
            Ok(answer) if answer.status == StatusCode::GONE => Good,
            // Nobody needs to know a file of which nobody has anything; whoever said that it ended does.
            Ok(answer) if answer.status == StatusCode::NOT_FOUND && file.ended.is_empty() => Good,
            Ok(answer) if file.ended.contains(&dc) => Wrong(format!("it has ended: {answer:?}")),
            Ok(answer) => NotYet(format!("{answer:?}")),
            Err(found) => found,
        };
        eventually(file, dc, gone).await?;
    }
    Ok(())
}

async fn eventually(file: &File, dc: usize, look: impl AsyncFn() -> Found) -> Result<(), String> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        let what = match look().await {
            Good => return Ok(()),
            Wrong(what) => what,
            NotYet(_) if began.elapsed() < PATIENCE => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(500));
                continue;
            }
            NotYet(what) => format!("still after {:?}: {what}", began.elapsed()),
        };
        let File { id, todo, begun, created, sent, acknowledged, ending, ended, .. } = file;
        return Err(format!(
            "file {id} of {} chunks at {}: {what}\ncreated at {created:?}, sent {sent:?}, acknowledged \
             {acknowledged:?}, ending {ending} {ended:?}, unanswered {begun:?}, to do {todo:?}",
            file.chunks(),
            NAMES[dc],
        ));
    }
}

async fn get(web: &Web, file: &File, dc: usize, rest: &str) -> Result<Answer, Found> {
    match web.ask(dc, Method::GET, file.id, rest, &[], "").await {
        Ok(answer) if answer.passes() => Err(NotYet(format!("{rest}: {answer:?}"))),
        Ok(answer) => Ok(answer),
        Err(error) => Err(NotYet(format!("{rest}: {error:?}"))),
    }
}

async fn look(web: &Web, file: &File, dc: usize, read: bool) -> Found {
    match try_look(web, file, dc, read).await {
        Ok(()) => Good,
        Err(found) => found,
    }
}

async fn try_look(web: &Web, file: &File, dc: usize, read: bool) -> Result<(), Found> {
    let wrong = |what: String| Err(Wrong(what));
    let answer = get(web, file, dc, "").await?;
    match answer.status {
        StatusCode::GONE if file.ending => return Ok(()),
        StatusCode::NOT_FOUND if file.created.is_empty() => return Ok(()),
        _ if file.ended.contains(&dc) => return wrong(format!("it has ended here: {answer:?}")),
        StatusCode::OK => {}
        _ => return wrong(format!("status: {answer:?}")),
    }
    let status: FileStatus = answer.json().map_err(Wrong)?;
    let unsent = file.chunks() - file.sent.len() as u64;
    if status.size != Some(file.bytes.len() as u64) || status.state == State::Conflict {
        return wrong(format!("{status:?}"));
    }
    let whole = matches!(status.state, State::Complete | State::Assembled);
    if status.missing_chunks < unsent || (whole && unsent > 0) {
        return wrong(format!("{unsent} chunks were never sent: {status:?}"));
    }
    let root = Root::of_bytes(&file.bytes).to_string();
    if status.root.as_ref().is_some_and(|it| *it != root) {
        return wrong(format!("the root is {root}: {status:?}"));
    }
    for [from, to] in status.holders.iter().flat_map(|holder| &holder.ranges) {
        if (*from..*to).any(|chunk| !file.sent.contains(&chunk)) {
            return wrong(format!("somebody holds what was never sent: {status:?}"));
        }
    }
    if file.chunks() > 0 {
        tree(web, file, dc).await?;
    }
    if read && whole {
        let answer = get(web, file, dc, "/content").await?;
        match answer.status {
            StatusCode::OK if answer.body == file.bytes => {}
            StatusCode::GONE if file.ending => {}
            StatusCode::CONFLICT => return Err(NotYet("it is complete elsewhere".into())),
            status => return wrong(format!("content: {status}, {} bytes", answer.body.len())),
        }
    }
    Ok(())
}

/// The values of chunks, as one datacenter knows them.
async fn tree(web: &Web, file: &File, dc: usize) -> Result<(), Found> {
    let shape = Geometry::new(file.bytes.len() as u64).unwrap();
    for place in Place::tile(0..shape.chunks(), MAX_LEVEL, shape) {
        let rest = format!("/tree?start={}&level={}", place.start(), place.level());
        let answer = get(web, file, dc, &rest).await?;
        match answer.status {
            StatusCode::OK => {}
            StatusCode::GONE if file.ending => return Ok(()),
            _ => return Err(Wrong(format!("tree: {answer:?}"))),
        }
        let node: TreeNode = answer.json().map_err(Wrong)?;
        let range = place.range(shape);
        if node.chunk_values.len() as u64 != range.end - range.start {
            return Err(Wrong(format!("tree: {node:?}")));
        }
        for (chunk, value) in range.zip(node.chunk_values) {
            leaf(web, file, dc, chunk, value).await?;
        }
    }
    Ok(())
}

/// The value of one chunk, as one datacenter knows it.
async fn leaf(web: &Web, file: &File, dc: usize, chunk: u64, value: Option<String>) -> Result<(), Found> {
    match value {
        Some(value) if value != file.values[chunk as usize] => {
            Err(Wrong(format!("chunk {chunk} has value {value}")))
        }
        Some(_) if !file.sent.contains(&chunk) => {
            Err(Wrong(format!("chunk {chunk} was never sent, and is there")))
        }
        // What went since it was asked for has a root in the next answer.
        None if file.acknowledged.contains(&(dc, chunk)) => {
            let again = get(web, file, dc, "").await?;
            let later = again.status == StatusCode::GONE && file.ending;
            let later = later || again.json::<FileStatus>().is_ok_and(|it| it.state >= State::Complete);
            let what = format!("chunk {chunk} was acknowledged, and is not there");
            Err(if later { NotYet(what) } else { Wrong(what) })
        }
        Some(_) | None => Ok(()),
    }
}
