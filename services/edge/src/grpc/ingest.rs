//! `sluice.v1.Ingest`: each call parsed, passed on to the workers, and answered.

use std::future::Future;
use std::ops::Range;
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::ChunkIndex;
use sluice_proto::calls::{ByteStream, ListQuery, PutChunks, Way};
use sluice_proto::http::{ChunkReceipt, FileStatus as HttpStatus};
use sluice_proto::ingest::{
    AboutReply, AboutRequest, CreateReply, CreateRequest, DeleteReply, DeleteRequest, FileStatus, ListReply,
    ListRequest, Opened, PutRequest, ReadRequest, ReadResponse, Receipt, SettleRequest, StatusRequest,
    TreeReply, TreeRequest, UploadRequest, UploadResponse, ingest_server,
};
use sluice_proto::problem::{Problem, Refusal};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::call::{Call, Caller};
use super::{convert, upload};
use crate::answer::invalid;
use crate::chunks::count;
use crate::files::{count_whole, end, page_limit, place, settled, wait_for};
use crate::routes::{file_id, log};

/// What metrics call this door.
pub(super) const DOOR: &str = "grpc";

/// Bytes in one message of a file on its way out.
const PIECE: usize = 64 << 10;

/// The service. Who is calling, and what is served with, comes with each call.
pub(super) struct Ingest;

/// Who calls, and what is asked.
fn caller<Q>(request: Request<Q>) -> Result<(Call, SignedContext, Q), Status> {
    let (_, mut extensions, message) = request.into_parts();
    // `grpc::serve` found out before it let the call through.
    let caller = extensions.remove::<Caller>();
    let Caller { call, context } = caller.ok_or_else(|| Status::internal("nobody is calling"))?;
    Ok((call, context, message))
}

/// Answers a call.
async fn reply<Q, A, F>(
    request: Request<Q>,
    handle: impl FnOnce(Call, SignedContext, Q) -> F,
) -> Result<Response<A>, Status>
where
    F: Future<Output = Result<A, Refusal>>,
{
    let (call, context, message) = caller(request)?;
    handle(call.clone(), context, message).await.map(Response::new).map_err(|refusal| {
        log(&refusal);
        call.status(&refusal)
    })
}

#[tonic::async_trait]
impl ingest_server::Ingest for Ingest {
    async fn about(&self, request: Request<AboutRequest>) -> Result<Response<AboutReply>, Status> {
        reply(request, |call, context, AboutRequest {}| async move {
            call.app.parts.workers.about(&context).await.map(convert::about)
        })
        .await
    }

    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<CreateReply>, Status> {
        let began = Instant::now();
        reply(request, |call, context, request| async move {
            let is_whole = request.body.is_some();
            let result = create(&call, &context, request).await;
            if is_whole {
                count_whole(&call.app, DOOR, began, &result);
            }
            let (created, status) = result?;
            Ok(CreateReply { created, status: Some(convert::status(status)) })
        })
        .await
    }

    async fn settle(&self, request: Request<SettleRequest>) -> Result<Response<FileStatus>, Status> {
        reply(request, |call, context, SettleRequest { id, size }| async move {
            let (id, size) = (file_id(&id)?, settled(size)?);
            call.app.parts.workers.settle(&context, id, size).await.map(convert::status)
        })
        .await
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<Receipt>, Status> {
        let began = Instant::now();
        reply(request, |call, context, request| async move {
            let result = put(&call, &context, request).await;
            count(&call.app, DOOR, began, &result);
            result.map(convert::receipt)
        })
        .await
    }

    type UploadStream = ReceiverStream<Result<UploadResponse, Status>>;

    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<Self::UploadStream>, Status> {
        let (call, context, requests) = caller(request)?;
        Ok(Response::new(upload::open(call, context, requests)))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<FileStatus>, Status> {
        reply(request, |call, context, StatusRequest { id, wait_for: state, timeout_secs }| async move {
            let id = file_id(&id)?;
            let wait = wait_for(convert::optional_state(state)?, timeout_secs.map(Into::into))?;
            call.app.parts.workers.status(&context, id, wait).await.map(convert::status)
        })
        .await
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListReply>, Status> {
        reply(request, |call, context, ListRequest { state, limit, after }| async move {
            let (state, after) = (convert::optional_state(state)?, convert::optional_id(&after)?);
            let limit = page_limit((limit != 0).then_some(limit as usize))?;
            let query = ListQuery { state, after, limit };
            call.app.parts.workers.list(&context, query).await.map(convert::list)
        })
        .await
    }

    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        reply(request, read).await
    }

    async fn tree(&self, request: Request<TreeRequest>) -> Result<Response<TreeReply>, Status> {
        reply(request, |call, context, TreeRequest { id, start, level }| async move {
            let id = file_id(&id)?;
            // A level that does not fit is one that is too high.
            let place = place(start, u8::try_from(level).unwrap_or(u8::MAX))?;
            call.app.parts.workers.tree(&context, id, place).await.map(convert::tree)
        })
        .await
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteReply>, Status> {
        reply(request, |call, context, DeleteRequest { id }| async move {
            end(&call.app, &context, file_id(&id)?).await.map(|()| DeleteReply {})
        })
        .await
    }
}

async fn create(
    call: &Call,
    context: &SignedContext,
    request: CreateRequest,
) -> Result<(bool, HttpStatus), Refusal> {
    let workers = &call.app.parts.workers;
    match convert::new_file(request)? {
        (new, Some(body)) => {
            workers.admit_whole(context, new.id, body.len() as u64).await?;
            // It is stored to its end, also when its client goes away, and the message's own memory with it.
            let memory = &call.app.parts.memory;
            let memory = memory.try_take(body.len() as u64).inspect_err(|_| {
                call.app.parts.metrics.count_shed("memory");
            })?;
            workers.create_whole(context, new, memory.pay_for(body)).await
        }
        (new, None) => workers.create(context, new).await,
    }
}

async fn put(call: &Call, context: &SignedContext, request: PutRequest) -> Result<ChunkReceipt, Refusal> {
    let PutRequest { id, index, data, value } = request;
    let (start, len) = (chunk_index(index)?, data.len() as u64);
    let expected = convert::optional_values(&value)?;
    let body = stream::once(async { Ok(data) }).boxed();
    let put = PutChunks { id: file_id(&id)?, start, len, expected, body, way: Way::Direct };
    call.app.parts.workers.put_chunks(context, put).await
}

/// The number of a chunk.
pub(super) fn chunk_index(number: u64) -> Result<ChunkIndex, Refusal> {
    ChunkIndex::new(number).map_err(|error| Refusal::new(Problem::ChunkIndex, error.to_string()))
}

async fn read(
    call: Call,
    context: SignedContext,
    request: ReadRequest,
) -> Result<BoxStream<'static, Result<ReadResponse, Status>>, Refusal> {
    let ReadRequest { id, offset, length, expected_root } = request;
    let (id, expected) = (file_id(&id)?, convert::optional_root("expected_root", &expected_root)?);
    let workers = &call.app.parts.workers;
    let file = workers.open(&context, id).await?;
    if expected.is_some_and(|root| root != file.root) {
        let detail = format!("the file's root is {}, another one is expected", file.root);
        return Err(Refusal::new(Problem::Precondition, detail));
    }
    let range = range(offset, length, file.file.size())?;
    let opened = Opened {
        size: file.file.size(),
        root: Bytes::copy_from_slice(file.root.as_bytes()),
        name: file.record.name().into(),
        content_type: file.record.content_type().into(),
        offset: range.start,
        length: range.end - range.start,
    };
    let bytes: ByteStream =
        if range.is_empty() { stream::empty().boxed() } else { workers.read(&context, id, range).await? };
    let first = ReadResponse { opened: Some(opened), data: Bytes::new() };
    let pieces = bytes.map_ok(|bytes| stream::iter(pieces(bytes)).map(Ok)).try_flatten();
    let rest = pieces.map_ok(|data| ReadResponse { opened: None, data }).map_err(move |refusal| {
        log(&refusal);
        call.status(&refusal)
    });
    Ok(stream::once(async { Ok(first) }.boxed()).chain(rest).boxed())
}

/// The bytes that are asked for. As with HTTP, a range that begins in the file ends with it, and one that does not is
/// refused; all of an empty file is empty.
fn range(offset: u64, length: Option<u64>, size: u64) -> Result<Range<u64>, Refusal> {
    let range = offset..offset.saturating_add(length.unwrap_or(u64::MAX)).min(size);
    let is_whole = offset == 0 && length.is_none();
    if range.is_empty() && !is_whole {
        return Err(Refusal::new(Problem::Range, format!("the file has {size} bytes")));
    }
    Ok(range)
}

/// The bytes as views of [`PIECE`] bytes.
fn pieces(mut bytes: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let piece = bytes.split_to(bytes.len().min(PIECE));
        (!piece.is_empty()).then_some(piece)
    })
}

/// A parameter that is none.
pub(super) fn misplaced(detail: impl Into<String>) -> Refusal {
    invalid(detail).hint("see UploadRequest in ingest.proto")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_with_the_file() {
        let of = |offset, length, size| range(offset, length, size).map_err(|refusal| refusal.problem);
        assert_eq!(of(0, None, 10), Ok(0..10));
        assert_eq!(of(3, Some(4), 10), Ok(3..7));
        assert_eq!(of(9, Some(u64::MAX), 10), Ok(9..10));
        assert_eq!(of(0, None, 0), Ok(0..0));
        for (offset, length, size) in
            [(10, None, 10), (0, Some(0), 10), (0, Some(1), 0), (u64::MAX, None, 10)]
        {
            assert_eq!(of(offset, length, size), Err(Problem::Range), "{offset} {length:?} {size}");
        }
    }

    #[test]
    fn bytes_are_cut_without_a_rest() {
        let lens = |len: usize| pieces(vec![7; len].into()).map(|piece| piece.len()).collect::<Vec<_>>();
        assert_eq!(lens(2 * PIECE + 1), [PIECE, PIECE, 1]);
        assert_eq!(lens(PIECE), [PIECE]);
        assert_eq!(lens(0), [0_usize; 0]);
    }
}
