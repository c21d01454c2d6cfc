//! Runs on their way to a store in another process.
//!
//! A run is one call: its bytes are the body, once the store wants them, and what its values must be comes behind them.

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sluice_engine::geometry::Run;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{FileId, TenantId};
use sluice_node::telemetry;
use sluice_proto::calls::ByteStream;
use sluice_proto::problem::Refusal;
use sluice_store::{RunReceipt, RunWriter, StoreError};
use tokio::sync::{mpsc, oneshot, watch};

use super::forms::{Answered, NewRun, Tail, WireReceipt};
use super::{RUN, RemoteStore, unreachable};
use crate::caller::Head;

/// A run on its way to another process.
pub(super) struct RemoteRun {
    store: RemoteStore,
    count: u64,
    left: u64,
    len: u64,
    /// Room for one piece: the next is taken when this one has gone.
    pieces: mpsc::Sender<Bytes>,
    /// Held for its drop.
    under_way: UnderWay,
    receipt: oneshot::Receiver<Result<RunReceipt, StoreError>>,
}

/// A run under way, for whoever waits until there is none.
struct UnderWay(RemoteStore);

impl UnderWay {
    fn of(store: &RemoteStore) -> Self {
        store.0.runs.send_modify(|runs| *runs += 1);
        Self(store.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.0.runs.send_modify(|runs| *runs -= 1);
    }
}

impl RemoteRun {
    pub(super) async fn begin(
        store: RemoteStore,
        file: FileId,
        tenant: TenantId,
        run: Run,
        len: u64,
    ) -> Result<Box<dyn RunWriter>, StoreError> {
        if store.is_closed() {
            return Err(StoreError::Closing);
        }
        let under_way = UnderWay::of(&store);
        let count = run.count();
        let start = run.start().number();
        let arguments = NewRun { file: file.to_string(), tenant: tenant.number(), start, count, len };
        let (pieces, receiver) = mpsc::channel::<Bytes>(1);
        let body: ByteStream = stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|piece| (Ok(piece), receiver))
        })
        .boxed();
        let (sender, mut receipt) = oneshot::channel();
        let wanted = watch::Sender::new(false);
        let mut is_wanted = wanted.subscribe();
        let sending = store.clone();
        store.0.tasks.spawn(telemetry::carried(async move {
            let call = Head::own(RUN).under(sending.0.tenure);
            let whole = len + Tail::len(count);
            let sent =
                sending.0.caller.send::<Answered<WireReceipt>>(call, &arguments, whole, body, move || {
                    wanted.send_replace(true);
                });
            let answer = tokio::select! {
                sent = sent => match sent {
                    Ok(answer) => sending.answered(Ok(answer)),
                    Err(failed) => Err(unreachable(Refusal::from(failed))),
                },
                () = sending.over() => Err(sending.ended()),
            };
            // Whoever wrote it may have given it up.
            let _ = sender.send(answer.and_then(|receipt| receipt.parse().map_err(unreachable)));
        }));
        tokio::select! {
            answer = &mut receipt => Err(refused(answer)),
            // Fails once the call has ended: then there is an answer.
            Ok(_) = is_wanted.wait_for(|wanted| *wanted) => {
                Ok(Box::new(Self { store, count, left: len, len, pieces, under_way, receipt }))
            }
        }
    }

    async fn push(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        if self.pieces.send(bytes).await.is_ok() {
            return Ok(());
        }
        Err(refused((&mut self.receipt).await))
    }
}

/// Why a run was answered before its end.
fn refused(answer: Result<Result<RunReceipt, StoreError>, oneshot::error::RecvError>) -> StoreError {
    match answer {
        Ok(Err(error)) => error,
        Ok(Ok(_)) | Err(_) => unreachable("a run was answered before its end"),
    }
}

#[async_trait]
impl RunWriter for RemoteRun {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            let got = self.len - self.left + bytes.len() as u64;
            return Err(StoreError::Length { expected: self.len, got });
        };
        self.left = left;
        if bytes.is_empty() { Ok(()) } else { self.push(bytes).await }
    }

    async fn finish(
        mut self: Box<Self>,
        expected: Option<&[ChainingValue]>,
    ) -> Result<RunReceipt, StoreError> {
        if self.left > 0 {
            return Err(StoreError::Length { expected: self.len, got: self.len - self.left });
        }
        if let Some(got) = expected.map(|expected| expected.len() as u64).filter(|got| *got != self.count) {
            return Err(StoreError::Length { expected: self.count, got });
        }
        self.push(Tail::encode(self.count, expected)).await?;
        let Self { store, pieces, receipt, under_way: _under_way, .. } = *self;
        drop(pieces);
        let finished = receipt.await.unwrap_or_else(|_| Err(store.ended()));
        if let Err(StoreError::Unreachable { .. }) = finished {
            store.give_up("nobody knows what became of a run");
        }
        finished
    }
}
