//! What a request changes, decided by the committer alone, one after the other, against what is durable.

use sluice_engine::ids::{FileId, Generation, TenantId};
use sluice_engine::metadata::MetadataRecord;

use super::change::{Change, Published};
use super::entry::Live;
use super::log::record::{Body, LogRecord};
use super::request::{Answer, Request};
use super::state::{FileState, Origin};
use crate::{RecordOutcome, StoreError, WholeOutcome};

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Plan {
    /// Nothing changes; the answer is durable already.
    Known(Answer),
    /// The change becomes durable, then the answer is given.
    Write(Change, Answer),
    /// The record becomes durable in the log, then the answer is given.
    Log(LogRecord, Answer),
    /// The same; the file's bytes stay what they are, and are still to be added.
    LogAgain(LogRecord, Answer),
}

/// What the log says of a file whose bytes are not here (any more).
fn known(file: FileId, state: &FileState, generation: Generation, answer: Answer) -> Plan {
    let facts = state.facts.clone();
    let tenant = state.tenant.unwrap_or(TenantId::new(0));
    let body = match &state.record {
        Some(record) => Body::Known { record: record.clone() },
        None => Body::Dropped { client: None },
    };
    Plan::Log(LogRecord { file, tenant, generation, facts, body }, answer)
}

/// Decides.
pub(crate) fn plan(
    file: FileId,
    live: &Live,
    floor: Generation,
    request: &Request,
) -> Result<Plan, StoreError> {
    let state = &live.state;
    let must_be_known = || if state.is_known() { Ok(()) } else { Err(StoreError::NoFile(file)) };
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
            must_be_known()?;
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
        Request::Whole { record, facts, whole } => {
            alive()?;
            if let Some(held) = state.record.as_ref().filter(|held| *held != &**record) {
                return Err(crate::conflict(held, record));
            }
            match state.published {
                Some(held) if held.root == whole.root() => {
                    return Ok(Plan::Known(Answer::Whole(WholeOutcome::Known)));
                }
                Some(held) => {
                    return Err(StoreError::WrongRoot { expected: held.root, got: Some(whole.root()) });
                }
                None => {}
            }
            // Held already, or being held: whoever compares chunks finds out whether it is the same.
            let begun = state.origin == Origin::Journal || !live.claims.is_empty();
            if begun || state.is_known() {
                return Ok(Plan::Known(Answer::Whole(WholeOutcome::Begun)));
            }
            let body = Body::Whole { record: (**record).clone(), whole: whole.clone() };
            let (tenant, generation) = (record.tenant(), state.generation);
            let record = LogRecord { file, tenant, generation, facts: facts.clone(), body };
            Ok(Plan::Log(record, Answer::Whole(WholeOutcome::Stored)))
        }
        Request::Known { record, facts } => {
            alive()?;
            match &state.record {
                Some(held) if *held == **record => Ok(Plan::Known(Answer::Whole(WholeOutcome::Known))),
                Some(held) => Err(crate::conflict(held, record)),
                None if state.origin == Origin::None && live.claims.is_empty() => {
                    let body = Body::Known { record: (**record).clone() };
                    let (tenant, generation) = (record.tenant(), state.generation);
                    let record = LogRecord { file, tenant, generation, facts: facts.clone(), body };
                    Ok(Plan::Log(record, Answer::Whole(WholeOutcome::Stored)))
                }
                None => Ok(Plan::Known(Answer::Whole(WholeOutcome::Begun))),
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
            must_be_known()?;
            if state.is_in_log() {
                if state.facts == *facts {
                    return Ok(Plan::Known(Answer::Done));
                }
                let state = FileState { facts: facts.clone(), ..state.clone() };
                let again = known(file, &state, state.generation, Answer::Done);
                return Ok(match again {
                    Plan::Log(record, answer) if state.published.is_some() => Plan::LogAgain(record, answer),
                    other => other,
                });
            }
            Ok(Plan::Write(Change::Facts(facts.clone()), Answer::Done))
        }
        Request::Lose(chunks) => {
            must_be_known()?;
            alive()?;
            if state.is_in_log() {
                let loses = chunks.iter().any(|chunk| state.has(chunk.number()));
                let again = known(file, state, next, Answer::Generation(next));
                return Ok(match again {
                    Plan::Log(record, answer) if state.published.is_some() && !loses => {
                        Plan::LogAgain(record, answer)
                    }
                    other => other,
                });
            }
            let change = Change::Lost { generation: next, chunks: chunks.clone() };
            Ok(Plan::Write(change, Answer::Generation(next)))
        }
        Request::Publish { published, losses } => {
            must_be_known()?;
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
            must_be_known()?;
            alive()?;
            if state.is_in_log() {
                return Ok(known(file, state, next, Answer::Generation(next)));
            }
            Ok(Plan::Write(Change::Freed { generation: next }, Answer::Generation(next)))
        }
        Request::Drop { tenant, facts } => {
            if state.dropped && state.facts == *facts {
                return Ok(Plan::Known(Answer::Done));
            }
            if state.origin != Origin::Journal {
                // Also what was never heard of: its id must not be used, and needs no file of its own for that.
                let client = state.record.as_ref().map(MetadataRecord::client_id);
                let (tenant, generation) = (state.tenant.unwrap_or(*tenant), state.generation);
                let body = Body::Dropped { client };
                let record = LogRecord { file, tenant, generation, facts: facts.clone(), body };
                return Ok(Plan::Log(record, Answer::Done));
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
