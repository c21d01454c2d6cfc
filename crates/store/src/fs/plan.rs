//! What a request changes, decided by the committer alone, one after the other, against what is durable.

use sluice_engine::ids::{FileId, Generation};

use super::change::{Change, Published};
use super::committer::{Answer, Request};
use super::entry::Live;
use crate::{RecordOutcome, StoreError};

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Plan {
    /// Nothing changes; the answer is durable already.
    Known(Answer),
    /// The change becomes durable, then the answer is given.
    Write(Change, Answer),
}

/// Decides.
pub(crate) fn plan(
    file: FileId,
    live: &Live,
    floor: Generation,
    request: &Request,
) -> Result<Plan, StoreError> {
    let state = &live.state;
    let known = || if state.is_known() { Ok(()) } else { Err(StoreError::NoFile(file)) };
    let alive = || if state.dropped { Err(StoreError::Dropped(file)) } else { Ok(()) };
    let next = state.generation(floor).next();
    match request {
        Request::Metadata(record) => {
            alive()?;
            match &state.record {
                Some(held) if *held == **record => Ok(Plan::Known(Answer::Record(RecordOutcome::Known))),
                Some(held) => Err(crate::conflict(held, record)),
                None => {
                    let misfits = record.geometry().is_some_and(|shape| !state.misfits(shape).is_empty());
                    let generation = if misfits { next } else { state.generation };
                    let change = Change::Metadata { generation, record: record.clone() };
                    Ok(Plan::Write(change, Answer::Record(RecordOutcome::Stored)))
                }
            }
        }
        Request::Size(geometry) => {
            known()?;
            alive()?;
            match state.geometry() {
                Some(held) if held == *geometry => Ok(Plan::Known(Answer::Done)),
                Some(held) => Err(StoreError::SizeConflict { held: held.size(), got: geometry.size() }),
                None => {
                    let generation =
                        if state.misfits(*geometry).is_empty() { state.generation } else { next };
                    Ok(Plan::Write(Change::Sized { generation, geometry: *geometry }, Answer::Done))
                }
            }
        }
        Request::Run { claim, tenant, chunks, .. } => {
            alive()?;
            if !live.claims.stands(*claim) {
                return Err(StoreError::ClaimLost);
            }
            if let Some(geometry) = state.geometry() {
                for chunk in chunks {
                    let (expected, got) = (geometry.chunk_len(chunk.index)?, u64::from(chunk.len));
                    if expected != got {
                        return Err(StoreError::Length { expected, got });
                    }
                }
            }
            Ok(Plan::Write(Change::Run { tenant: *tenant, chunks: chunks.clone() }, Answer::Done))
        }
        Request::Facts(facts) => {
            known()?;
            Ok(Plan::Write(Change::Facts(facts.clone()), Answer::Done))
        }
        Request::Lose(chunks) => {
            known()?;
            alive()?;
            let change = Change::Lost { generation: next, chunks: chunks.clone() };
            Ok(Plan::Write(change, Answer::Generation(next)))
        }
        Request::Publish { published, losses } => {
            known()?;
            alive()?;
            match state.published {
                Some(held) if held == *published => Ok(Plan::Known(Answer::Done)),
                Some(Published { root, .. }) => {
                    Err(StoreError::WrongRoot { expected: published.root, got: Some(root) })
                }
                // What was checked must still be there.
                None if live.losses != *losses => Err(StoreError::ClaimLost),
                None => Ok(Plan::Write(Change::Published(*published), Answer::Done)),
            }
        }
        Request::Free => {
            known()?;
            alive()?;
            Ok(Plan::Write(Change::Freed { generation: next }, Answer::Generation(next)))
        }
        Request::Drop { tenant, facts } => {
            if state.dropped && state.facts == *facts {
                return Ok(Plan::Known(Answer::Done));
            }
            Ok(Plan::Write(Change::Dropped { tenant: *tenant, facts: facts.clone() }, Answer::Done))
        }
        Request::Discard => {
            if state.record.is_some() || state.dropped {
                Ok(Plan::Known(Answer::Discarded(false)))
            } else if !state.is_known() {
                Ok(Plan::Known(Answer::Discarded(true)))
            } else {
                Ok(Plan::Write(Change::Discarded, Answer::Discarded(true)))
            }
        }
    }
}
