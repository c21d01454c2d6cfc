//! Recording a run whose bytes have all come: compared with what has a record, agreed on with what is durable, and
//! registered once its object is there. Who puts the object, this process or a porter (`keeper.rs`), makes no difference.

use std::sync::Arc;
use std::time::Instant;

use sluice_engine::geometry::Run;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::TenantId;

use super::bucket::S3Request;
use super::entry::Entry;
use super::keeper::Landed;
use super::keys::{Epoch, Life};
use super::lock;
use super::pieces::Piece;
use super::shared::{Gone, Plan, Shared};
use super::writer::Seat;
use crate::StoreError;

/// A run of which all bytes have come.
#[derive(Debug)]
pub(crate) struct Recording {
    pub(crate) run: Run,
    pub(crate) tenant: TenantId,
    pub(crate) len: u64,
    /// The value of each chunk.
    pub(crate) values: Vec<ChainingValue>,
}

/// A run that contradicts nothing, and may be put.
#[derive(Clone, Debug)]
pub(crate) struct Agreed {
    /// Under which key.
    pub(crate) key: String,
    /// How many of its chunks have no record.
    pub(crate) new_chunks: u64,
    life: Life,
    piece: Piece,
    /// What had been retired by then: an object that was let in before may have been deleted since.
    retired: u64,
    /// Chunks that are damaged, and whose bytes these are.
    mends: Vec<u64>,
}

impl Recording {
    /// The run as it is in the bucket.
    pub(crate) fn piece(&self, epoch: Epoch) -> Result<Piece, StoreError> {
        Piece::new(self.run, self.len, &self.values, epoch).ok_or(StoreError::Length {
            expected: self.run.count() * sluice_engine::limits::CHUNK_LEN,
            got: self.len,
        })
    }

    /// Compares the run with what has a record, and makes sure, durably, that nothing which may be there contradicts it.
    /// `None` if all of it has a record.
    pub(crate) async fn agree(
        &self,
        shared: &Arc<Shared>,
        seat: &Seat,
    ) -> Result<Option<Agreed>, StoreError> {
        let entry = seat.entry();
        let damage = shared.damage(entry.file);
        let is_damaged = |chunk: u64| damage.covers(chunk..chunk + 1);
        let held = match shared.values(entry, self.run.range()).await {
            Ok(held) => held,
            Err(StoreError::NoFile(_)) => vec![None; self.values.len()],
            Err(error) => return Err(error),
        };
        let mut new_chunks = 0;
        for ((chunk, held), got) in self.run.range().zip(&held).zip(&self.values) {
            match held {
                Some(held) if held != got => {
                    let index = self.run.index(chunk - self.run.start().number());
                    return Err(StoreError::ChunkConflict { index, held: *held, got: *got });
                }
                Some(_) if !is_damaged(chunk) => {}
                Some(_) | None => new_chunks += 1,
            }
        }
        if new_chunks == 0 {
            let stands = seat.stands(&lock(&entry.live));
            return if stands { Ok(None) } else { Err(seat.lost()) };
        }
        let (piece, mends) = (
            self.piece(shared.fence.epoch())?,
            self.run.range().filter(|chunk| is_damaged(*chunk)).collect(),
        );
        let life = self.prepare(shared, entry).await?;
        let retired = lock(&entry.live).retired;
        let key = piece.key(entry.file, life);
        if shared.is_leaving(&key) {
            let reason = "an earlier object of the same name is being deleted".into();
            return Err(StoreError::Io { operation: S3Request::Put.name().into(), reason });
        }
        Ok(Some(Agreed { key, new_chunks, life, piece, retired, mends }))
    }

    /// Makes sure that the file is known, and that nothing which may be there contradicts the run. The life that it is
    /// part of.
    async fn prepare(&self, shared: &Arc<Shared>, entry: &Arc<Entry>) -> Result<Life, StoreError> {
        let (file, tenant) = (entry.file, self.tenant);
        let (range, values) = (self.run.range(), self.values.clone());
        shared
            .change_here(entry, move |live, _| {
                if live.state.dropped {
                    return Err(StoreError::Dropped(file));
                }
                let mut state = live.state.clone();
                if !state.is_known() {
                    (state.tenant, state.life) = (Some(tenant), Life::begin());
                }
                // It is not in one record any more.
                state.in_lists = false;
                for (chunk, value) in range.zip(&values) {
                    // What has a record agrees already; what has none may be disputed, or land yet.
                    live.avoid(&mut state, chunk, Some(*value));
                }
                let life = state.life;
                Ok(if state == live.state {
                    Plan::Known(life)
                } else {
                    Plan::Write(Box::new(state), Gone::Nothing, life)
                })
            })
            .await
    }
}

impl Agreed {
    /// Ends the run, by what became of its object.
    pub(crate) async fn settle(
        &self,
        shared: &Arc<Shared>,
        seat: &Seat,
        landed: Landed,
    ) -> Result<(), StoreError> {
        match landed {
            Landed::No => Ok(()),
            Landed::Unknown => {
                self.doubt(seat.entry());
                Ok(())
            }
            Landed::Yes => {
                self.register(seat)?;
                self.unvoid(shared, seat.entry()).await?;
                if !self.mends.is_empty() {
                    shared.mend(seat.entry(), self.mends.clone(), self.piece.name()).await?;
                }
                Ok(())
            }
        }
    }

    /// It may be there, now or later: what comes instead must contradict nothing.
    pub(crate) fn doubt(&self, entry: &Entry) {
        let mut live = lock(&entry.live);
        if live.state.life == self.life && !live.state.dropped {
            live.doubtful.insert(self.piece.name(), (self.piece.clone(), Instant::now()));
        }
    }

    /// The object is there: from now on its chunks have a record, unless they may not have one any more.
    fn register(&self, seat: &Seat) -> Result<(), StoreError> {
        let mut live = lock(&seat.entry().live);
        let is_there = live.state.life == self.life && live.retired == self.retired;
        let stands = seat.stands(&live) && is_there && !live.state.dropped;
        let fits = live.state.geometry().map(|geometry| geometry.run(self.piece.run.start(), self.piece.len));
        let refused = match fits {
            Some(Err(error)) => Some(error.into()),
            Some(Ok(_)) | None => None,
        };
        if stands && refused.is_none() {
            live.doubtful.remove(&self.piece.name());
            live.pieces.add(self.piece.clone());
            return Ok(());
        }
        drop(live);
        self.doubt(seat.entry());
        Err(refused.unwrap_or_else(|| seat.lost()))
    }

    /// Lets chunks of this run count again that were lost before: their bytes have just been written.
    async fn unvoid(&self, shared: &Arc<Shared>, entry: &Arc<Entry>) -> Result<(), StoreError> {
        let name = self.piece.name();
        if !lock(&entry.live).state.void.contains_key(&name) {
            return Ok(());
        }
        shared
            .change_here(entry, move |live, _| {
                let mut state = live.state.clone();
                state.void.remove(&name);
                Ok(Plan::Write(Box::new(state), Gone::Nothing, ()))
            })
            .await
    }
}
