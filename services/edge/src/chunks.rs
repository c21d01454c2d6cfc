//! Chunks on their way in: `PUT /v1/files/{id}/chunks/{index}`.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use futures_util::StreamExt;
use http::{HeaderMap, StatusCode, header};
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::hash::ChainingValue;
use sluice_engine::limits::{CHUNK_LEN, MAX_RUN};
use sluice_proto::calls::PutChunks;
use sluice_proto::http::ChunkReceipt;
use sluice_proto::problem::{Problem, Refusal};

use crate::App;
use crate::accept::READ_BUFFER;
use crate::answer::{Answer, invalid, json, sent_on};
use crate::files::{PathOf, path};
use crate::routes::{Caller, file_id, way};

/// The value that each chunk of the body must have: 64 hexadecimal digits each, separated by commas.
const CHUNK_VALUE: &str = "chunk-value";

/// What is buffered of a body at most: by its connection, and on its way into the store. Who has a turn there uses more,
/// but only so many have one.
const BUFFERED: u64 = READ_BUFFER as u64 + (48 << 10);

/// What metrics call this door.
pub(crate) const DOOR: &str = "http";

/// `PUT /v1/files/{id}/chunks/{index}`
pub(crate) async fn put(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    parameters: PathOf<(String, String)>,
    request: Request,
) -> Answer {
    let began = Instant::now();
    let target = request.uri().path().to_owned();
    let result = take(&app, &context, parameters, request).await;
    count(&app, DOOR, began, &result);
    let receipt = result.map_err(|refusal| sent_on(refusal, &target))?;
    let status = if receipt.provisional { StatusCode::ACCEPTED } else { StatusCode::OK };
    json(status, &receipt)
}

/// Counts what became of a run that came through a door.
pub(crate) fn count(app: &App, door: &'static str, began: Instant, result: &Result<ChunkReceipt, Refusal>) {
    let metrics = &app.parts.metrics;
    match result {
        Ok(receipt) => {
            metrics.chunk_ack.observe(began.elapsed().as_secs_f64());
            let outcome = match (receipt.provisional, receipt.new_chunks) {
                (true, _) => "provisional",
                (false, 0) => "known",
                (false, _) => "stored",
            };
            metrics.count_chunks(door, outcome, receipt.values.len() as u64);
        }
        Err(refusal) => {
            metrics.count_chunks(door, refusal.problem.code(), 1);
            if refusal.problem == Problem::Timeout {
                metrics.count_shed("slow-body");
            }
        }
    }
}

async fn take(
    app: &App,
    context: &SignedContext,
    parameters: PathOf<(String, String)>,
    request: Request,
) -> Result<ChunkReceipt, Refusal> {
    let (id, index) = path(parameters)?;
    let id = file_id(&id)?;
    let number = index.parse().map_err(|_| invalid(format!("{index:?} is no chunk index")))?;
    let start =
        ChunkIndex::new(number).map_err(|error| Refusal::new(Problem::ChunkIndex, error.to_string()))?;
    refuse_encoding(request.headers())?;
    let len = content_length(request.headers())?;
    let expected = chunk_values(request.headers())?;
    let way = way(&request);
    // Its bytes go to the store as they arrive.
    let _memory = app.parts.memory.try_take(len.min(BUFFERED)).inspect_err(|_| {
        app.parts.metrics.count_shed("memory");
    })?;
    let body = request.into_body().into_data_stream().map(|piece| {
        piece.map_err(|_| {
            Refusal::new(Problem::Truncated, "the body ended early").hint("send the chunk again")
        })
    });
    let put = PutChunks { id, start, len, expected, body: body.boxed(), way };
    app.parts.workers.put_chunks(context, put).await
}

/// Refuses a body that is encoded: it would be stored as it comes.
pub(crate) fn refuse_encoding(headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            Err(Refusal::new(Problem::Encoding, "the body is encoded, and would be stored like that")
                .hint("send the bytes themselves, without Content-Encoding"))
        }
        Some(_) | None => Ok(()),
    }
}

pub(crate) fn content_length(headers: &HeaderMap) -> Result<u64, Refusal> {
    let Some(value) = headers.get(header::CONTENT_LENGTH) else {
        return Err(Refusal::new(Problem::LengthRequired, "the request has no Content-Length")
            .hint(format!("a full chunk has {CHUNK_LEN} bytes")));
    };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    length.ok_or_else(|| invalid("Content-Length is no number"))
}

fn chunk_values(headers: &HeaderMap) -> Result<Option<Vec<ChainingValue>>, Refusal> {
    let mut values = Vec::new();
    for header in headers.get_all(CHUNK_VALUE) {
        let text = header.to_str().map_err(|_| invalid("Chunk-Value is not hexadecimal"))?;
        for value in text.split(',') {
            if values.len() == usize::from(MAX_RUN) {
                return Err(invalid(format!("Chunk-Value has more than {MAX_RUN} values")));
            }
            values.push(value.trim().parse().map_err(|error| invalid(format!("Chunk-Value: {error}")))?);
        }
    }
    Ok((!values.is_empty()).then_some(values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn chunk_values_are_a_list_of_at_most_eight() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CHUNK_VALUE, HeaderValue::from_str(text).unwrap());
            chunk_values(&headers).map(|values| values.map(|values| values.len())).map_err(|r| r.problem)
        };
        let one = "ab".repeat(32);
        assert_eq!(chunk_values(&HeaderMap::new()).unwrap(), None);
        assert_eq!(of(&one), Ok(Some(1)));
        assert_eq!(of(&[one.as_str(); 8].join(", ")), Ok(Some(8)));
        for bad in ["", "ab", &[one.as_str(); 9].join(","), &format!("{one},")] {
            assert_eq!(of(bad), Err(Problem::InvalidParameter), "{bad}");
        }
    }
}
