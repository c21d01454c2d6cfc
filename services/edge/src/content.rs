//! Bytes on their way out: `GET` and `HEAD /v1/files/{id}/content`, with ranges and conditions (RFC 9110, sections 13
//! and 14). The root is the strong validator: equal roots are equal bytes.

use std::fmt::Write;
use std::ops::Range;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use sluice_proto::calls::Opened;
use sluice_proto::problem::{Problem, Refusal};

use crate::App;
use crate::answer::{Answer, Refused};
use crate::files::{PathOf, path};
use crate::routes::{Caller, file_id};

/// What a request for content comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Selection {
    /// The client has it already.
    NotModified,
    /// All of it.
    Whole,
    /// A part.
    Part(Range<u64>),
}

/// `GET /v1/files/{id}/content`
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    id: PathOf<String>,
    headers: HeaderMap,
) -> Answer {
    let id = file_id(&path(id)?)?;
    let opened = app.parts.workers.open(&context, id).await?;
    let (mut response, range) = head_of(&opened, &headers)?;
    if let Some(range) = range {
        *response.body_mut() = Body::from_stream(app.parts.workers.read(&context, id, range).await?);
    }
    Ok(response)
}

/// `HEAD /v1/files/{id}/content`
pub(crate) async fn head(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    id: PathOf<String>,
    headers: HeaderMap,
) -> Answer {
    let id = file_id(&path(id)?)?;
    let opened = app.parts.workers.open(&context, id).await?;
    head_of(&opened, &headers).map(|(response, _)| response)
}

/// The head of the answer, and which bytes belong to it.
fn head_of(opened: &Opened, headers: &HeaderMap) -> Result<(Response, Option<Range<u64>>), Refused> {
    let size = opened.file.size();
    let etag = format!("\"{}\"", opened.root);
    let selection = select(headers, &etag, size)?;
    let mut response = Response::new(Body::empty());
    let out = response.headers_mut();
    insert(out, header::ETAG, etag);
    out.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    let (status, range) = match selection {
        Selection::NotModified => (StatusCode::NOT_MODIFIED, None),
        Selection::Whole => (StatusCode::OK, Some(0..size)),
        Selection::Part(range) => {
            insert(out, header::CONTENT_RANGE, format!("bytes {}-{}/{size}", range.start, range.end - 1));
            (StatusCode::PARTIAL_CONTENT, Some(range))
        }
    };
    if let Some(range) = &range {
        out.insert(header::CONTENT_LENGTH, HeaderValue::from(range.end - range.start));
        let kind = opened.record.content_type();
        let kind = if kind.is_empty() { "application/octet-stream" } else { kind };
        insert(out, header::CONTENT_TYPE, kind.to_owned());
        insert(out, header::CONTENT_DISPOSITION, disposition(opened.record.name()));
        // What a tenant calls text/html is not to run in a browser under this name.
        out.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        out.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    }
    *response.status_mut() = status;
    Ok((response, range))
}

fn insert(headers: &mut HeaderMap, name: header::HeaderName, value: String) {
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(name, value);
    }
}

/// Weighs the conditions in the order of RFC 9110, section 13.2.2.
fn select(headers: &HeaderMap, etag: &str, size: u64) -> Result<Selection, Refused> {
    if headers.contains_key(header::IF_MATCH) && !names(headers, &header::IF_MATCH, etag, false) {
        let detail = format!("the file's root is {etag}, If-Match names others");
        return Err(Refusal::new(Problem::Precondition, detail).into());
    }
    if names(headers, &header::IF_NONE_MATCH, etag, true) {
        return Ok(Selection::NotModified);
    }
    // A date can not match, since files have none that a client could know.
    let same = headers.get(header::IF_RANGE).is_none_or(|value| value == etag);
    let Some(range) = headers.get(header::RANGE).filter(|_| same) else { return Ok(Selection::Whole) };
    match range.to_str().ok().and_then(one_range) {
        None => Ok(Selection::Whole),
        Some(asked) => match asked.within(size) {
            Some(range) => Ok(Selection::Part(range)),
            None => {
                let refused = Refusal::new(Problem::Range, format!("the file has {size} bytes"));
                let value = HeaderValue::try_from(format!("bytes */{size}"));
                let refused = Refused::from(refused);
                Err(match value {
                    Ok(value) => refused.with(header::CONTENT_RANGE, value),
                    Err(_) => refused,
                })
            }
        },
    }
}

/// Whether a list of entity tags names this one.
fn names(headers: &HeaderMap, name: &header::HeaderName, etag: &str, weak: bool) -> bool {
    let tags = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    tags.flat_map(|text| text.split(',')).map(str::trim).any(|tag| {
        let tag = if weak { tag.strip_prefix("W/").unwrap_or(tag) } else { tag };
        tag == "*" || tag == etag
    })
}

/// One range of bytes, as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AskedRange {
    /// From here to there, both included.
    FromTo(u64, u64),
    /// The last so many.
    Last(u64),
}

impl AskedRange {
    /// The bytes of a file of this size; `None` if there are none.
    fn within(self, size: u64) -> Option<Range<u64>> {
        let range = match self {
            Self::FromTo(first, last) => first..last.saturating_add(1).min(size),
            Self::Last(count) => size.saturating_sub(count)..size,
        };
        (!range.is_empty()).then_some(range)
    }
}

/// Reads `bytes=a-b`, `bytes=a-` or `bytes=-n`. Several ranges, other units and malformed ones are ignored, as
/// RFC 9110 allows.
fn one_range(text: &str) -> Option<AskedRange> {
    let (unit, range) = text.split_once('=')?;
    let (first, last) = range.trim().split_once('-')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    match (first, last) {
        ("", last) => number(last).map(AskedRange::Last),
        (first, "") => number(first).map(|first| AskedRange::FromTo(first, u64::MAX)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(AskedRange::FromTo(first, last))
        }
    }
}

/// Digits, and nothing else; more than 64 bits are as good as the largest number.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

/// `Content-Disposition` with the file's name (RFC 6266): in ASCII for old clients, in full for others. A path or a
/// quote in it stays harmless.
fn disposition(name: &str) -> String {
    if name.is_empty() {
        return "attachment".to_owned();
    }
    let plain: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || " !#$&+-.^_`|~()[]{},=@".contains(c) { c } else { '_' })
        .collect();
    let mut full = String::with_capacity(name.len() * 3);
    for byte in name.bytes() {
        // attr-char of RFC 8187.
        if byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte) {
            full.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(full, "%{byte:02X}");
        }
    }
    format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{full}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETAG: &str = "\"abc\"";

    fn selected(pairs: &[(header::HeaderName, &'static str)]) -> Result<Selection, Problem> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, HeaderValue::from_static(value));
        }
        select(&headers, ETAG, 10).map_err(|refused| refused.refusal().problem)
    }

    #[test]
    fn ranges_are_cut_exactly() {
        let range = |text| selected(&[(header::RANGE, text)]);
        assert_eq!(range("bytes=0-0"), Ok(Selection::Part(0..1)));
        assert_eq!(range("bytes=3-"), Ok(Selection::Part(3..10)));
        assert_eq!(range("Bytes=9-99999999999999999999999"), Ok(Selection::Part(9..10)));
        assert_eq!(range("bytes=-4"), Ok(Selection::Part(6..10)));
        assert_eq!(range("bytes=-40"), Ok(Selection::Part(0..10)));
        for outside in ["bytes=10-", "bytes=99999999999999999999999-", "bytes=-0", "bytes=10-11"] {
            assert_eq!(range(outside), Err(Problem::Range), "{outside}");
        }
        for ignored in ["bytes=0-1,3-4", "bytes=4-3", "lines=1-2", "bytes=", "bytes=a-b", "bytes=+1-2", "x"] {
            assert_eq!(range(ignored), Ok(Selection::Whole), "{ignored}");
        }
        assert_eq!(AskedRange::FromTo(0, u64::MAX).within(0), None);
    }

    #[test]
    fn conditions_are_weighed_in_order() {
        use header::{IF_MATCH, IF_NONE_MATCH, IF_RANGE, RANGE};
        assert_eq!(selected(&[(IF_MATCH, "\"x\", \"abc\"")]), Ok(Selection::Whole));
        assert_eq!(selected(&[(IF_MATCH, "*")]), Ok(Selection::Whole));
        assert_eq!(selected(&[(IF_MATCH, "W/\"abc\"")]), Err(Problem::Precondition), "strong comparison");
        assert_eq!(selected(&[(IF_MATCH, "\"x\""), (IF_NONE_MATCH, "*")]), Err(Problem::Precondition));
        assert_eq!(selected(&[(IF_NONE_MATCH, "W/\"abc\"")]), Ok(Selection::NotModified), "weak comparison");
        assert_eq!(selected(&[(IF_NONE_MATCH, "\"x\""), (IF_NONE_MATCH, "*")]), Ok(Selection::NotModified));
        assert_eq!(selected(&[(RANGE, "bytes=1-1"), (IF_RANGE, ETAG)]), Ok(Selection::Part(1..2)));
        assert_eq!(selected(&[(RANGE, "bytes=1-1"), (IF_RANGE, "\"x\"")]), Ok(Selection::Whole));
        let date = "Wed, 21 Oct 2015 07:28:00 GMT";
        assert_eq!(selected(&[(RANGE, "bytes=99-"), (IF_RANGE, date)]), Ok(Selection::Whole));
    }

    #[test]
    fn names_are_encoded_safely() {
        assert_eq!(disposition(""), "attachment");
        assert_eq!(disposition("a b.iso"), "attachment; filename=\"a b.iso\"; filename*=UTF-8''a%20b.iso");
        assert_eq!(
            disposition("ü\"\\/;x"),
            "attachment; filename=\"_____x\"; filename*=UTF-8''%C3%BC%22%5C%2F%3Bx"
        );
        assert!(HeaderValue::try_from(disposition("日本\u{202E}\u{7f}")).is_ok());
    }
}
