//! The JSON bodies of the HTTP door `/v1`.
//!
//! Unknown members are refused in requests and ignored in answers, so that a newer server can say more.
//! Hashes are 64 hexadecimal digits; chunk ranges are `[first, end)` pairs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Body of `POST /v1/files`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateFile {
    /// The UUID by which the client knows the file; made by the server (v7) if absent. Send one, so that a retry at
    /// another datacenter means the same file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Uuid>,
    /// Size in bytes; absent: it is settled later, with `PATCH /v1/files/{id}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// File name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Content type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub content_type: String,
    /// User metadata.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Seconds after the last progress at which the file expires; 0 or absent: never.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub expires_in: u64,
    /// The BLAKE3 hash that the whole file must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_root: Option<String>,
    /// Name of the datacenter that should reassemble the file; by default the one asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<String>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Body of `PATCH /v1/files/{id}`: what was left open when the file was created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SettleFile {
    /// Size in bytes.
    pub size: u64,
}

/// Body of `POST /v1/admin/revocations`: which tokens are void.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// Number of the tenant.
    pub tenant: u64,
    /// Id of the one token (`jti`); absent: all that the tenant has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Uuid>,
    /// Tokens of an older epoch are void; absent: of a tenant those minted until now, of a session all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
}

/// Answer of `POST /v1/admin/revocations`: durable in the datacenter that answers, on its way to the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokedTokens {
    /// Number of the tenant.
    pub tenant: u64,
    /// Id of the one token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Uuid>,
    /// Tokens of an older epoch are void.
    pub epoch: u64,
    /// Name of the datacenter.
    pub dc: String,
}

/// Answer of `GET /v1/admin/tenants/{tenant}`: what the datacenter that answers knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantStatus {
    /// Number of the tenant.
    pub tenant: u64,
    /// Name of the datacenter.
    pub dc: String,
    /// Tokens of an older epoch, in Unix milliseconds, are void; 0: none are.
    pub revoked_before: u64,
    /// Tokens that are revoked one by one beside.
    pub revoked_sessions: u64,
    /// Bytes stored in this datacenter.
    pub stored_bytes: u64,
    /// Files that this datacenter lists, unfinished or finished, wherever their bytes are; an older one does not say.
    #[serde(default)]
    pub files: u64,
}

/// Where a file stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Chunks are missing.
    Receiving,
    /// Every chunk is in some datacenter, and they merge to one root.
    Complete,
    /// The home has the whole file.
    Assembled,
    /// Contradicting facts exist; held, not served.
    Conflict,
    /// Gone.
    Dropped,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Receiving, Self::Complete, Self::Assembled, Self::Conflict, Self::Dropped];

    /// The state's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::Complete => "complete",
            Self::Assembled => "assembled",
            Self::Conflict => "conflict",
            Self::Dropped => "dropped",
        }
    }

    /// The state with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// Body of `PUT /v1/drain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartDrain {
    /// Name of the datacenter that takes over.
    pub to: String,
    /// `data`, `sessions` or `channels`.
    pub phase: String,
    /// Whether files move too.
    #[serde(default)]
    pub evacuate: bool,
}

/// Answer of `GET`, `PUT` and `DELETE /v1/drain`: whether the datacenter that answers hands its work over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainStatus {
    /// The datacenter.
    pub dc: String,
    /// How far it hands over; null: it does not drain.
    pub phase: Option<String>,
    /// To whom.
    pub to: Option<String>,
    /// Whether files move too.
    pub evacuate: bool,
    /// Files of which chunks are here, or which are to be assembled here.
    pub files_left: u64,
    /// Bodies of uploads that flow into its store by way of all of its workers, as these said a moment ago.
    pub bodies: u64,
    /// Connections of clients to the edge that answers, without the one that asks.
    pub connections: u64,
}

/// What one datacenter holds of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The datacenter.
    pub dc: String,
    /// Number of chunks.
    pub chunks: u64,
    /// Which, as `[first, end)` pairs; at most 1,000.
    pub ranges: Vec<[u64; 2]>,
}

/// Answer of `GET` and `PATCH /v1/files/{id}`, and of `POST /v1/files`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStatus {
    /// The client's UUID.
    pub id: Uuid,
    /// Size in bytes; null while it is not settled. Until then nothing is missing, and each datacenter knows only of
    /// the chunks that it holds itself.
    pub size: Option<u64>,
    /// Number of chunks; 0 while the size is not settled.
    pub chunks: u64,
    /// File name.
    pub name: String,
    /// Content type.
    pub content_type: String,
    /// User metadata.
    pub metadata: BTreeMap<String, String>,
    /// Seconds after the last progress at which the file expires; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<u64>,
    /// The root that the client expects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_root: Option<String>,
    /// Where the file stands.
    pub state: State,
    /// What contradicts what, in state `conflict`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<String>,
    /// The datacenter that reassembles it.
    pub home: String,
    /// How often the file was taken over.
    pub home_epoch: u8,
    /// BLAKE3 of the whole file, once complete.
    pub root: Option<String>,
    /// The datacenter that answers.
    pub dc: String,
    /// Whether the home was asked; otherwise only what this datacenter knows is counted, and `missing` may be too
    /// long.
    pub home_answered: bool,
    /// Number of chunks that no known holder has.
    pub missing_chunks: u64,
    /// Which, as `[first, end)` pairs; at most 1,000, then `missing_chunks` says more.
    pub missing: Vec<[u64; 2]>,
    /// Chunks of the assembled file that were found damaged on the home's disk, as `[first, end)` pairs; at most 1,000.
    /// Those that nobody else has are also in `missing`: send them again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<[u64; 2]>,
    /// Who holds what.
    pub holders: Vec<Holder>,
}

/// Answer of `GET /v1/files`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePage {
    /// The files, in order of id.
    pub files: Vec<FileEntry>,
    /// Where the next page begins (`?after=`); absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Uuid>,
}

/// One file of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// The client's UUID.
    pub id: Uuid,
    /// Size in bytes; null while it is not settled.
    pub size: Option<u64>,
    /// File name.
    pub name: String,
    /// Where the file stands, as far as the datacenter that answers knows.
    pub state: State,
    /// The datacenter that reassembles it.
    pub home: String,
    /// BLAKE3 of the whole file, once complete.
    pub root: Option<String>,
}

/// Answer of `PUT /v1/files/{id}/chunks/{index}`: with 200 durable, with 202 durable but provisional.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkReceipt {
    /// The datacenter in which the chunks are durable.
    pub dc: String,
    /// The first chunk.
    pub start: u64,
    /// The value of each chunk.
    pub values: Vec<String>,
    /// How many of them were not there before.
    pub new_chunks: u64,
    /// Whether this datacenter has not seen the metadata yet.
    pub provisional: bool,
    /// Whether it had to wait for others that were being received: more requests at once bring nothing here.
    #[serde(default)]
    pub busy: bool,
}

/// Answer of `GET /v1/files/{id}/tree?start&level`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeNode {
    /// The first chunk.
    pub start: u64,
    /// log2 of the number of chunks.
    pub level: u8,
    /// The value of the node, if all of it is known here.
    pub value: Option<String>,
    /// The value of each chunk under it, null where it is not known here.
    pub chunk_values: Vec<Option<String>>,
    /// The values beside the way up to the root, lowest first; empty before the file is complete.
    pub proof: Vec<ProofNode>,
    /// BLAKE3 of the whole file, once complete.
    pub root: Option<String>,
}

/// One value beside the way up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofNode {
    /// The first chunk of the node.
    pub start: u64,
    /// Its level.
    pub level: u8,
    /// Its value.
    pub value: String,
}

/// Answer of `GET /v1`: where am I?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Name of the cluster.
    pub cluster: String,
    /// The datacenter that answers.
    pub dc: String,
    /// Every datacenter.
    pub dcs: Vec<DcInfo>,
    /// Version of the server.
    pub version: String,
}

/// One datacenter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DcInfo {
    /// Its name.
    pub name: String,
    /// Where its edges answer; absent if not known to the one asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Whether the one asked can reach it.
    pub reachable: bool,
    /// The phase of its drain, and to whom, such as `data to dc-b`; absent: it does not drain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<String>,
}

/// An error, after RFC 9457 (`application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemDetails {
    /// `/problems/` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it is, in words that are always the same.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What was expected and what came.
    pub detail: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The datacenter that refuses.
    pub dc: String,
    /// The trace of the request.
    pub trace: String,
}

impl ProblemDetails {
    /// The code: the last part of the type.
    pub fn code(&self) -> &str {
        self.kind.rsplit('/').next().unwrap_or_default()
    }
}
