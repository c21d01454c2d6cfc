//! A store, served to the aggregator that has it.
//!
//! What changes the store is a task of its own, which a caller that goes away does not end: the next tenure begins when it
//! has ended, and then knows what it did.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State as AppState};
use axum::response::Response;
use axum::routing::post;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{ClientFileId, Generation, TenantId};
use sluice_node::shutdown::Shutdown;
use sluice_proto::calls::ByteStream;
use sluice_store::{ChunkStore, RunWriter, StoreError, Whole};
use tokio::sync::{OwnedRwLockReadGuard, oneshot};

use super::forms::{
    Answered, Begin, Begun, Chunk, ChunksOf, Facts, File, Floor, List, ListOf, NewRun, Numbered, OfShare,
    Part, Record, Refused, Rooted, Tail, WireFound, WireListed, WireOutcome, WireReceipt, WireSummary,
    WireUsage, bytes, encode_values, file, index, pairs, record, root, text,
};
use super::{
    BEGIN, DAMAGE, DAMAGED_FILES, DISCARD_ORPHAN, DROP_FILE, END, FREE, LIST, LISTED, LOSE, MARK, PAGE,
    PUBLISH, PUT_FACTS, PUT_KNOWN, PUT_MARK, PUT_PAGE, PUT_RECORD, PUT_SIZE, PUT_STATE, PUT_WHOLE, RAISE,
    READ_CHUNK, RECHECK, RENEW, RUN, STATES, SUMMARY, THERE, VALUES, VERIFY,
};
use crate::call::{Answer, Call, Flow, garbled};
use crate::forms::Nothing;
use crate::tenure::{NotHeld, Tenure, Tenures};

/// How long a renewal lasts.
const RENEWAL: Duration = Duration::from_millis(500);

/// How long the next bytes of a run may take.
const PAUSE: Duration = Duration::from_secs(60);

/// How long the rest of a run is read that is refused.
const DRAIN: Duration = Duration::from_secs(2);

/// Bytes of a run that are written at once.
const GATHER: usize = 256 << 10;

/// A store and whose it is.
#[derive(Clone)]
struct Shop {
    store: Arc<dyn ChunkStore>,
    tenures: Tenures,
    tasks: Shutdown,
}

type Served = AppState<Shop>;

/// What serves `store` to the aggregator that has it. What is begun runs on `tasks`.
pub fn serve_store(store: Arc<dyn ChunkStore>, tenures: Tenures, tasks: Shutdown) -> Router {
    Router::new()
        .route(THERE, post(async |_: Call<Nothing>| Answer(Ok(Nothing {}))))
        .route(BEGIN, post(begin))
        .route(RENEW, post(renew))
        .route(END, post(end))
        .route(PUT_RECORD, post(put_record))
        .route(PUT_SIZE, post(put_size))
        .route(PUT_WHOLE, post(put_whole))
        .route(PUT_KNOWN, post(put_known))
        .route(SUMMARY, post(summary))
        .route(LIST, post(list))
        .route(LISTED, post(listed))
        .route(RUN, post(run))
        .route(VALUES, post(values))
        .route(READ_CHUNK, post(read_chunk))
        .route(VERIFY, post(verify))
        .route(DAMAGE, post(damage))
        .route(DAMAGED_FILES, post(damaged_files))
        .route(PUT_MARK, post(put_mark))
        .route(MARK, post(mark))
        .route(LOSE, post(lose))
        .route(PUT_FACTS, post(put_facts))
        .route(PUBLISH, post(publish))
        .route(RECHECK, post(recheck))
        .route(FREE, post(free))
        .route(DROP_FILE, post(drop_file))
        .route(DISCARD_ORPHAN, post(discard_orphan))
        .route(RAISE, post(raise))
        .route(PUT_PAGE, post(put_page))
        .route(PAGE, post(page))
        .route(STATES, post(states))
        .route(PUT_STATE, post(put_state))
        .layer(DefaultBodyLimit::disable())
        .with_state(Shop { store, tenures, tasks })
}

impl Shop {
    /// Holds a tenure for as long as something is looked up.
    async fn held(&self, tenure: Option<Tenure>) -> Answered<OwnedRwLockReadGuard<()>> {
        Ok(self.tenures.enter(tenure.ok_or(Refused::NotHeld)?).await?)
    }

    /// Changes something under a tenure, to the end.
    async fn change<A, F>(
        &self,
        tenure: Option<Tenure>,
        change: impl FnOnce(Arc<dyn ChunkStore>) -> F,
    ) -> Answered<A>
    where
        A: Send + 'static,
        F: Future<Output = Answered<A>> + Send + 'static,
    {
        let guard = self.held(tenure).await?;
        let (sender, answer) = oneshot::channel();
        let change = change(self.store.clone());
        self.tasks.spawn(async move {
            let done = change.await;
            drop(guard);
            // Whoever asked may have gone.
            let _ = sender.send(done);
        });
        answer.await.unwrap_or_else(|_| Err(StoreError::Closing.into()))
    }
}

/// An answer that is bytes: 0 in front of them, 1 in front of a refusal, 2 if there are none.
fn bytes_answer(answer: Answered<Option<Bytes>>) -> Response {
    let (tag, bytes) = match answer {
        Ok(Some(bytes)) => (0, bytes),
        Ok(None) => (2, Bytes::new()),
        Err(refused) => (1, serde_json::to_vec(&refused).unwrap_or_default().into()),
    };
    let pieces = [Bytes::from(vec![tag]), bytes].map(Ok::<_, std::convert::Infallible>);
    Response::new(Body::from_stream(stream::iter(pieces)))
}

async fn begin(AppState(shop): Served, call: Call<Begin>) -> Answer<Answered<Begun>> {
    let begun = async {
        let share = call.arguments.of.share()?;
        let begun = shop.tenures.begin(share, call.arguments.fence).await;
        if begun == Err(NotHeld::Busy) {
            tracing::warn!(%share, "an aggregator waits: what was begun for the last one has not ended");
        }
        let tenure = begun?;
        tracing::info!(?tenure, "an aggregator has it");
        Ok(Begun { tenure: tenure.to_string(), usage: shop.store.usage().into() })
    };
    Answer(Ok(begun.await))
}

async fn renew(AppState(shop): Served, call: Call<Nothing>) -> Answer<Answered<WireUsage>> {
    let renewed = async {
        let renewal = shop.tenures.renew(call.tenure.ok_or(Refused::NotHeld)?)?;
        tokio::select! {
            () = tokio::time::sleep(RENEWAL) => {}
            // The process ends: its aggregator had better know.
            () = shop.tasks.draining() => return Err(Refused::NotHeld),
        }
        renewal.settle();
        Ok(shop.store.usage().into())
    };
    Answer(Ok(renewed.await))
}

async fn end(AppState(shop): Served, call: Call<Nothing>) -> Answer<Answered<()>> {
    if let Some(tenure) = call.tenure {
        shop.tenures.end(tenure);
    }
    Answer(Ok(Ok(())))
}

async fn put_record(AppState(shop): Served, call: Call<Record>) -> Answer<Answered<WireOutcome>> {
    let put = shop.change(call.tenure, |store| async move {
        Ok(store.put_record(&record(&call.arguments.record)?).await?.into())
    });
    Answer(Ok(put.await))
}

async fn put_size(AppState(shop): Served, call: Call<Numbered>) -> Answer<Answered<()>> {
    let put = shop.change(call.tenure, |store| async move {
        let Numbered { file: id, number } = call.arguments;
        let size = sluice_engine::geometry::Geometry::new(number).map_err(garbled)?;
        Ok(store.put_size(file(&id)?, size).await?)
    });
    Answer(Ok(put.await))
}

async fn put_whole(AppState(shop): Served, call: Call<Record>) -> Answer<Answered<WireOutcome>> {
    let put = shop.change(call.tenure, |store| async move {
        let Record { record: described, facts } = call.arguments;
        // Of what came over a wire nothing is believed.
        let whole = tokio::task::spawn_blocking(move || Whole::of(call.bytes)).await;
        let whole = whole.map_err(|_| StoreError::Closing)?;
        Ok(store.put_whole(&record(&described)?, &bytes(&facts)?, whole).await?.into())
    });
    Answer(Ok(put.await))
}

async fn put_known(AppState(shop): Served, call: Call<Record>) -> Answer<Answered<WireOutcome>> {
    let put = shop.change(call.tenure, |store| async move {
        let Record { record: described, facts } = call.arguments;
        Ok(store.put_known(&record(&described)?, &bytes(&facts)?).await?.into())
    });
    Answer(Ok(put.await))
}

async fn summary(AppState(shop): Served, call: Call<File>) -> Answer<Answered<Option<WireSummary>>> {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        Ok(store.summary(file(&call.arguments.file)?).await?.map(WireSummary::of))
    };
    Answer(Ok(found.await))
}

async fn list(AppState(shop): Served, call: Call<List>) -> Answer<Answered<Vec<WireFound>>> {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        let List { after, limit } = call.arguments;
        let found = store.list(after.as_deref().map(file).transpose()?, limit).await?;
        Ok(found.iter().map(WireFound::of).collect())
    };
    Answer(Ok(found.await))
}

async fn listed(AppState(shop): Served, call: Call<ListOf>) -> Answer<Answered<Vec<WireListed>>> {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        let ListOf { tenant, after, limit } = call.arguments;
        let listed = store.listed(TenantId::new(tenant), after.map(ClientFileId::new), limit).await?;
        Ok(listed.into_iter().map(WireListed::of).collect())
    };
    Answer(Ok(found.await))
}

async fn run(AppState(shop): Served, mut flow: Flow<NewRun>) -> Answer<Answered<WireReceipt>> {
    let written = async {
        let new = &flow.arguments;
        let tenure = flow.tenure.ok_or(Refused::NotHeld)?;
        let held = shop.held(flow.tenure).await?;
        let (id, run) = (file(&new.file)?, new.run()?);
        let mut writer = tokio::select! {
            writer = shop.store.begin_run(id, TenantId::new(new.tenant), run, new.len) => writer?,
            // Another writer may take long, and the next tenure does not wait for it.
            () = ended(&shop.tenures, tenure) => return Err(Refused::NotHeld),
        };
        // Looked at, a body is asked for: what was refused until here costs no bytes.
        let expected = match take(&shop, tenure, new, &mut flow.body, &mut *writer).await {
            Ok(expected) => expected,
            Err(refused) => {
                drop((writer, held));
                // Closed with bytes on the line, the connection would take the answer with it.
                let rest = flow.body.for_each(|_| std::future::ready(()));
                let _ = tokio::time::timeout(DRAIN, rest).await;
                return Err(refused);
            }
        };
        let (sender, answer) = oneshot::channel();
        shop.tasks.spawn(async move {
            let done = writer.finish(expected.as_deref()).await;
            drop(held);
            // Whoever asked may have gone.
            let _ = sender.send(done);
        });
        Ok(WireReceipt::of(&answer.await.unwrap_or(Err(StoreError::Closing))?))
    };
    Answer(Ok(written.await))
}

/// Writes the bytes of a run as they come; what its values must be follows them.
async fn take(
    shop: &Shop,
    tenure: Tenure,
    new: &NewRun,
    body: &mut ByteStream,
    writer: &mut dyn RunWriter,
) -> Answered<Option<Vec<ChainingValue>>> {
    let (mut left, mut gathered) = (new.len, BytesMut::new());
    loop {
        // Nothing is taken under a tenure that has ended, and nothing keeps the next from beginning.
        let piece = tokio::select! {
            piece = tokio::time::timeout(PAUSE, body.next()) => piece.map_err(garbled)?,
            () = ended(&shop.tenures, tenure) => return Err(Refused::NotHeld),
        };
        let Some(piece) = piece.transpose()? else { break };
        gathered.extend_from_slice(&piece);
        while left > 0 && (gathered.len() >= GATHER || gathered.len() as u64 >= left) {
            let part = gathered.split_to(gathered.len().min(GATHER).min(left as usize)).freeze();
            left -= part.len() as u64;
            writer.write(part).await?;
        }
        if left == 0 && gathered.len() as u64 > Tail::len(new.count) {
            return Err(garbled("a run is longer than it said").into());
        }
    }
    if left > 0 || gathered.len() as u64 != Tail::len(new.count) {
        return Err(garbled("a run is shorter than it said").into());
    }
    Ok(Tail::decode(&gathered)?)
}

/// Returns once a tenure has ended.
async fn ended(tenures: &Tenures, tenure: Tenure) {
    let mut current = tenures.watch(tenure.share());
    // The sender lives as long as the tenures do.
    let _ = current.wait_for(|now| *now != Some(tenure)).await;
}

async fn values(AppState(shop): Served, call: Call<Part>) -> Response {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        let Part { file: id, start, end } = call.arguments;
        Ok(Some(encode_values(&store.values(file(&id)?, start..end).await?)))
    };
    bytes_answer(found.await)
}

async fn read_chunk(AppState(shop): Served, call: Call<Chunk>) -> Response {
    let read = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        let Chunk { file: id, index: at } = call.arguments;
        Ok(Some(store.read_chunk(file(&id)?, index(at)?).await?))
    };
    bytes_answer(read.await)
}

async fn verify(AppState(shop): Served, call: Call<Chunk>) -> Answer<Answered<u64>> {
    let verified = shop.change(call.tenure, |store| async move {
        let Chunk { file: id, index: at } = call.arguments;
        Ok(store.verify(file(&id)?, index(at)?).await?)
    });
    Answer(Ok(verified.await))
}

async fn damage(AppState(shop): Served, call: Call<File>) -> Answer<Answered<Vec<(u64, u64)>>> {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        Ok(pairs(&store.damage(file(&call.arguments.file)?).await?))
    };
    Answer(Ok(found.await))
}

async fn damaged_files(AppState(shop): Served, call: Call<Nothing>) -> Answer<Answered<Vec<String>>> {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        Ok(store.damaged_files().await?.iter().map(ToString::to_string).collect())
    };
    Answer(Ok(found.await))
}

async fn put_mark(AppState(shop): Served, call: Call<OfShare>) -> Answer<Answered<()>> {
    let put = shop.change(call.tenure, |store| async move {
        Ok(store.put_scrub_mark(call.arguments.share()?, &call.bytes).await?)
    });
    Answer(Ok(put.await))
}

async fn mark(AppState(shop): Served, call: Call<OfShare>) -> Answer<Answered<Option<String>>> {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        Ok(shop.store.scrub_mark(call.arguments.share()?).await?.map(|mark| text(&mark)))
    };
    Answer(Ok(found.await))
}

async fn lose(AppState(shop): Served, call: Call<ChunksOf>) -> Answer<Answered<u64>> {
    let lost = shop.change(call.tenure, |store| async move {
        let ChunksOf { file: id, chunks } = call.arguments;
        let chunks = chunks.into_iter().map(index).collect::<Result<Vec<_>, _>>()?;
        Ok(store.lose(file(&id)?, &chunks).await?.number())
    });
    Answer(Ok(lost.await))
}

async fn put_facts(AppState(shop): Served, call: Call<Facts>) -> Answer<Answered<()>> {
    let put = shop.change(call.tenure, |store| async move {
        let Facts { file: id, facts, .. } = call.arguments;
        Ok(store.put_facts(file(&id)?, &bytes(&facts)?).await?)
    });
    Answer(Ok(put.await))
}

async fn publish(AppState(shop): Served, call: Call<Rooted>) -> Answer<Answered<()>> {
    let published = shop.change(call.tenure, |store| async move {
        Ok(store.publish(file(&call.arguments.file)?, root(&call.arguments.root)?).await?)
    });
    Answer(Ok(published.await))
}

async fn recheck(AppState(shop): Served, call: Call<File>) -> Answer<Answered<String>> {
    let checked = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        Ok(store.recheck(file(&call.arguments.file)?).await?.to_string())
    };
    Answer(Ok(checked.await))
}

async fn free(AppState(shop): Served, call: Call<File>) -> Answer<Answered<u64>> {
    let freed = shop.change(call.tenure, |store| async move {
        Ok(store.free(file(&call.arguments.file)?).await?.number())
    });
    Answer(Ok(freed.await))
}

async fn drop_file(AppState(shop): Served, call: Call<Facts>) -> Answer<Answered<()>> {
    let dropped = shop.change(call.tenure, |store| async move {
        let Facts { file: id, tenant, facts } = call.arguments;
        let tenant = TenantId::new(tenant.ok_or_else(|| garbled("whose the file is, is missing"))?);
        Ok(store.drop_file(file(&id)?, tenant, &bytes(&facts)?).await?)
    });
    Answer(Ok(dropped.await))
}

async fn discard_orphan(AppState(shop): Served, call: Call<File>) -> Answer<Answered<bool>> {
    let discarded = shop.change(call.tenure, |store| async move {
        Ok(store.discard_orphan(file(&call.arguments.file)?).await?)
    });
    Answer(Ok(discarded.await))
}

async fn raise(AppState(shop): Served, call: Call<Floor>) -> Answer<Answered<()>> {
    let raised = shop.change(call.tenure, |store| async move {
        let Floor { of, number } = call.arguments;
        Ok(store.raise_generations(of.share()?, Generation::new(number)).await?)
    });
    Answer(Ok(raised.await))
}

async fn put_page(AppState(shop): Served, call: Call<Numbered>) -> Answer<Answered<()>> {
    let put = shop.change(call.tenure, |store| async move {
        let Numbered { file: id, number } = call.arguments;
        Ok(store.put_page(file(&id)?, number, &call.bytes).await?)
    });
    Answer(Ok(put.await))
}

async fn page(AppState(shop): Served, call: Call<Numbered>) -> Response {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        let store = &shop.store;
        let Numbered { file: id, number } = call.arguments;
        Ok(store.page(file(&id)?, number).await?.map(Bytes::from))
    };
    bytes_answer(found.await)
}

async fn states(AppState(shop): Served, call: Call<Nothing>) -> Answer<Answered<Vec<(String, String)>>> {
    let found = async {
        let _held = shop.held(call.tenure).await?;
        let states = shop.store.states().await?;
        Ok(states.iter().map(|(share, state)| (share.to_string(), text(state))).collect())
    };
    Answer(Ok(found.await))
}

async fn put_state(AppState(shop): Served, call: Call<OfShare>) -> Answer<Answered<()>> {
    let put = shop.change(call.tenure, |store| async move {
        Ok(store.put_state(call.arguments.share()?, &call.bytes).await?)
    });
    Answer(Ok(put.await))
}
