//! Between the messages of `ingest.proto` and what workers take and give. Everything a client sends is parsed here.

use bytes::Bytes;
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::ids::ClientFileId;
use sluice_engine::limits::MAX_RUN;
use sluice_engine::metadata::MetadataFields;
use sluice_node::clock;
use sluice_proto::calls::{NewFile, Way};
use sluice_proto::http;
use sluice_proto::ingest::{
    AboutReply, ChunkRange, CreateRequest, Datacenter, FileEntry, FileStatus, Holder, ListReply, ProofNode,
    Receipt, State, TreeReply,
};
use sluice_proto::problem::Refusal;

use crate::answer::invalid;
use crate::files::make_whole;
use crate::routes::file_id;

/// Bytes of a hash.
const HASH: usize = 32;

/// A file to create.
pub(super) fn new_file(request: CreateRequest) -> Result<(NewFile, Option<Bytes>), Refusal> {
    let CreateRequest { id, size, name, content_type, metadata, expires_in, expected_root, home, body } =
        request;
    let mut new = NewFile {
        id: if id.is_empty() { clock::new_file_id() } else { file_id(&id)? },
        fields: MetadataFields {
            size,
            expiry_secs: expires_in,
            expected_root: optional_root("expected_root", &expected_root)?,
            name,
            content_type,
            user: metadata,
        },
        home: (!home.is_empty()).then_some(home),
        way: Way::Direct,
    };
    if let Some(body) = &body {
        make_whole(&mut new, body.len() as u64)?;
    }
    Ok((new, body))
}

/// A root, unless there is none.
pub(super) fn optional_root(what: &str, bytes: &[u8]) -> Result<Option<Root>, Refusal> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let bytes = <[u8; HASH]>::try_from(bytes);
    let bytes = bytes.map_err(|_| invalid(format!("{what} is no hash, expected {HASH} bytes")))?;
    Ok(Some(Root::from_bytes(bytes)))
}

/// The values that chunks must have, unless there are none.
pub(super) fn optional_values(bytes: &[u8]) -> Result<Option<Vec<ChainingValue>>, Refusal> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let (values, rest) = bytes.as_chunks::<HASH>();
    if !rest.is_empty() || values.len() > usize::from(MAX_RUN) {
        let len = bytes.len();
        return Err(invalid(format!("{len} bytes of values came, expected {HASH} for each chunk")));
    }
    Ok(Some(values.iter().map(|value| ChainingValue::from_bytes(*value)).collect()))
}

/// The state that a client names, unless it names none.
pub(super) fn optional_state(number: i32) -> Result<Option<http::State>, Refusal> {
    match State::try_from(number) {
        Ok(State::Unspecified) => Ok(None),
        Ok(State::Receiving) => Ok(Some(http::State::Receiving)),
        Ok(State::Complete) => Ok(Some(http::State::Complete)),
        Ok(State::Assembled) => Ok(Some(http::State::Assembled)),
        Ok(State::Conflict) => Ok(Some(http::State::Conflict)),
        Ok(State::Dropped) => Ok(Some(http::State::Dropped)),
        Err(_) => Err(invalid(format!("there is no state {number}"))),
    }
}

/// The id above which a list begins, unless it begins at the beginning.
pub(super) fn optional_id(text: &str) -> Result<Option<ClientFileId>, Refusal> {
    (!text.is_empty()).then(|| file_id(text)).transpose()
}

fn state(state: http::State) -> i32 {
    let state = match state {
        http::State::Receiving => State::Receiving,
        http::State::Complete => State::Complete,
        http::State::Assembled => State::Assembled,
        http::State::Conflict => State::Conflict,
        http::State::Dropped => State::Dropped,
    };
    state.into()
}

/// The bytes of a hash in hexadecimal digits; none for none. What the inside says is one.
fn hash(digits: Option<&str>) -> Bytes {
    digits.and_then(|digits| hex::decode(digits).ok()).unwrap_or_default().into()
}

pub(super) fn about(about: http::About) -> AboutReply {
    let http::About { cluster, dc, dcs, version } = about;
    let dcs = dcs.into_iter().map(|http::DcInfo { name, url, reachable, drain: _ }| Datacenter {
        name,
        url: url.unwrap_or_default(),
        reachable,
    });
    AboutReply { cluster, dc, dcs: dcs.collect(), version }
}

fn ranges(ranges: Vec<[u64; 2]>) -> Vec<ChunkRange> {
    ranges.into_iter().map(|[first, end]| ChunkRange { first, end }).collect()
}

pub(super) fn status(status: http::FileStatus) -> FileStatus {
    let holders = status.holders.into_iter();
    FileStatus {
        id: status.id.to_string(),
        size: status.size,
        chunks: status.chunks,
        name: status.name,
        content_type: status.content_type,
        metadata: status.metadata,
        expires_in: status.expires_in.unwrap_or(0),
        expected_root: hash(status.expected_root.as_deref()),
        state: state(status.state),
        conflict: status.conflict.unwrap_or_default(),
        home: status.home,
        home_epoch: status.home_epoch.into(),
        root: hash(status.root.as_deref()),
        dc: status.dc,
        home_answered: status.home_answered,
        missing_chunks: status.missing_chunks,
        missing: ranges(status.missing),
        holders: holders
            .map(|holder| Holder { dc: holder.dc, chunks: holder.chunks, ranges: ranges(holder.ranges) })
            .collect(),
    }
}

pub(super) fn list(page: http::FilePage) -> ListReply {
    let files = page.files.into_iter().map(|file| FileEntry {
        id: file.id.to_string(),
        size: file.size,
        name: file.name,
        state: state(file.state),
        home: file.home,
        root: hash(file.root.as_deref()),
    });
    ListReply { files: files.collect(), next: page.next.map(|id| id.to_string()).unwrap_or_default() }
}

pub(super) fn receipt(receipt: http::ChunkReceipt) -> Receipt {
    let http::ChunkReceipt { dc, start, values, new_chunks, provisional, busy } = receipt;
    Receipt { dc, start, values: hash(Some(&values.concat())), new_chunks, provisional, busy }
}

pub(super) fn tree(node: http::TreeNode) -> TreeReply {
    let proof = node.proof.into_iter().map(|http::ProofNode { start, level, value }| ProofNode {
        start,
        level: level.into(),
        value: hash(Some(&value)),
    });
    TreeReply {
        start: node.start,
        level: node.level.into(),
        value: hash(node.value.as_deref()),
        chunk_values: node.chunk_values.iter().map(|value| hash(value.as_deref())).collect(),
        proof: proof.collect(),
        root: hash(node.root.as_deref()),
    }
}
