//! What can go wrong, in one enum, with what to do about it.
//!
//! An error's text says what was expected and what came. Its [`code`](ClientError::code) is the word by which a
//! script tells it from others: the server's problem code, or one of ours. [`advice`](ClientError::advice) says
//! whether trying again can help, [`exit_class`](ClientError::exit_class) how a process should end.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sluice_engine::geometry::GeometryError;
use sluice_engine::hash::{BadHash, Root};
use sluice_proto::http::State;
use sluice_proto::problem::Problem;
use uuid::Uuid;

use crate::config::ConfigError;
use crate::refused::{Operation, Refused};

/// What failed in a client's call.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The configuration makes no client.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A datacenter refused.
    #[error("{} refused {}: {}", .0.dc, .0.operation, .0.detail)]
    Refused(Box<Refused>),
    /// No answer came: no connection, one that broke, or one that stood still.
    #[error("{at} did not answer {operation}: {cause}")]
    Unreachable {
        /// The datacenter, or its URL while its name is not known.
        at: String,
        /// What was asked.
        operation: Operation,
        /// What happened to the connection.
        cause: String,
    },
    /// The certificate at a URL is not one that the configured CA vouches for.
    #[error("{at} is not to be trusted with {operation}: {cause}")]
    Untrusted {
        /// The URL.
        at: String,
        /// What was to be asked.
        operation: Operation,
        /// What is wrong with the certificate.
        cause: String,
    },
    /// A request was to be sent on to a host that is none of the cluster's.
    #[error("{at} sends {operation} on to {to}: {cause}")]
    SentAway {
        /// The datacenter, or its URL.
        at: String,
        /// What was asked.
        operation: Operation,
        /// Where to.
        to: String,
        /// Why that is not followed.
        cause: String,
    },
    /// An answer came that is none of Sluice's.
    #[error("{at} gave an answer to {operation} that is not understood: {cause}")]
    Malformed {
        /// The datacenter, or its URL.
        at: String,
        /// What was asked.
        operation: Operation,
        /// What is wrong with it.
        cause: String,
        /// The trace of the request.
        trace: Option<String>,
    },
    /// It was tried again for as long as allowed.
    #[error("gave up after {} s without progress; last: {last}", after.as_secs())]
    GaveUp {
        /// How long nothing had worked.
        after: Duration,
        /// The last failure.
        last: Box<ClientError>,
    },
    /// The file did not reach the state that was waited for.
    #[error("file {id} is {} after {} s, expected {}: {missing_chunks} chunks missing", state.name(), after.as_secs(), expected.name())]
    Unsettled {
        /// The file.
        id: Uuid,
        /// Where it stands.
        state: State,
        /// The state that was waited for.
        expected: State,
        /// Chunks that no known holder has.
        missing_chunks: u64,
        /// How long nothing had changed.
        after: Duration,
    },
    /// The root of the bytes here is not the root there.
    #[error("{dc} reports root {theirs} for file {id}, the bytes sent have {ours}")]
    RootMismatch {
        /// The file.
        id: Uuid,
        /// The datacenter that reports it.
        dc: String,
        /// The root of the source.
        ours: Root,
        /// The root that came.
        theirs: Root,
    },
    /// The bytes do not have the root that the caller expects.
    #[error("the source has root {got}, expected {expected}")]
    ExpectedRoot {
        /// What was expected.
        expected: Root,
        /// What the bytes give.
        got: Root,
    },
    /// Bytes came that are not the file's.
    #[error("{dc} sent bytes for chunk {chunk} that do not hash to its value")]
    Content {
        /// The datacenter that sent them.
        dc: String,
        /// The chunk.
        chunk: u64,
    },
    /// Chunk values came that do not lead to the file's root.
    #[error("{dc} sent chunk values from {start} at level {level} that do not lead to root {root}")]
    Proof {
        /// The datacenter that sent them.
        dc: String,
        /// The first chunk.
        start: u64,
        /// log2 of the number of chunks.
        level: u8,
        /// The root they should lead to.
        root: Root,
    },
    /// Contradicting facts exist about the file.
    #[error("file {id} is in conflict, says {dc}: {detail}")]
    Conflict {
        /// The file.
        id: Uuid,
        /// The datacenter that says so.
        dc: String,
        /// What contradicts what.
        detail: String,
    },
    /// The file is not complete, so that it cannot be read.
    #[error("file {id} is {}, expected complete: {missing_chunks} of {chunks} chunks missing", state.name())]
    Incomplete {
        /// The file.
        id: Uuid,
        /// Where it stands.
        state: State,
        /// Chunks that no known holder has.
        missing_chunks: u64,
        /// Chunks in the file.
        chunks: u64,
    },
    /// The file was deleted, aborted, or expired.
    #[error("file {id} is gone, says {dc}")]
    Dropped {
        /// The file.
        id: Uuid,
        /// The datacenter that says so.
        dc: String,
    },
    /// The id names a file of another size.
    #[error("file {id} has {theirs} bytes, the source has {ours}")]
    SizeDiffers {
        /// The file.
        id: Uuid,
        /// Size of the source in bytes.
        ours: u64,
        /// Size of the file in bytes.
        theirs: u64,
    },
    /// The source cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// A stream failed before its end.
    #[error("the input of file {id} failed after {at} bytes: {cause}")]
    Input {
        /// The file.
        id: Uuid,
        /// Bytes that were read before.
        at: u64,
        /// What failed.
        cause: io::Error,
    },
    /// The source is not what it was when the upload began.
    #[error("{} changed during its upload: {detail}", path.display())]
    SourceChanged {
        /// The source.
        path: PathBuf,
        /// What was expected and what came.
        detail: String,
    },
    /// An earlier upload of this path was not finished, and the file has changed since.
    #[error("{} changed since its upload as {id} was interrupted: {detail}", path.display())]
    ChangedSince {
        /// The source.
        path: PathBuf,
        /// The unfinished upload.
        id: Uuid,
        /// What was expected and what came.
        detail: String,
    },
    /// The target cannot be written.
    #[error("cannot write {}: {cause}", path.display())]
    Target {
        /// The target.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// The target is a directory, a device, a pipe or a socket.
    #[error("{} is no file that could be replaced", path.display())]
    NotAFile {
        /// The target.
        path: PathBuf,
    },
    /// The target exists, and was not to be replaced.
    #[error("{} exists", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// Another process writes the same target.
    #[error("{} is being written by another process", path.display())]
    Busy {
        /// The target's `.part`.
        path: PathBuf,
    },
    /// The range lies outside the file.
    #[error("range {first}-{last} lies outside a file of {size} bytes")]
    Range {
        /// The first byte.
        first: u64,
        /// The last byte.
        last: u64,
        /// Size of the file in bytes.
        size: u64,
    },
    /// A size or an index that no file can have.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A text that is no hash.
    #[error(transparent)]
    Hash(#[from] BadHash),
    /// A bug of this library.
    #[error("a task of the client failed: {cause}")]
    Task {
        /// What is known of it.
        cause: String,
    },
}

impl ClientError {
    /// The word that names the kind of error: the server's problem code, or one of this library's.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused(refused) => &refused.code,
            Self::GaveUp { last, .. } => last.code(),
            Self::Config(_) => "configuration",
            Self::Unreachable { .. } => "unreachable",
            Self::Untrusted { .. } => "untrusted",
            Self::SentAway { .. } => "sent-away",
            Self::Malformed { .. } => "malformed-answer",
            Self::Unsettled { .. } => "unsettled",
            Self::RootMismatch { .. } => "root-mismatch",
            Self::ExpectedRoot { .. } => "expected-root",
            Self::Content { .. } => "content",
            Self::Proof { .. } => "proof",
            Self::Conflict { .. } => Problem::Conflict.code(),
            Self::Incomplete { .. } => Problem::Incomplete.code(),
            Self::Dropped { .. } => Problem::Dropped.code(),
            Self::SizeDiffers { .. } => "size-differs",
            Self::Source { .. } => "source",
            Self::Input { .. } => "input",
            Self::SourceChanged { .. } | Self::ChangedSince { .. } => "source-changed",
            Self::Target { .. } => "target",
            Self::NotAFile { .. } => "not-a-file",
            Self::Exists { .. } => "exists",
            Self::Busy { .. } => "busy",
            Self::Range { .. } => Problem::Range.code(),
            Self::Geometry(_) => "geometry",
            Self::Hash(_) => "hash",
            Self::Task { .. } => Problem::Internal.code(),
        }
    }

    /// The datacenter that the error comes from, or its URL.
    pub fn dc(&self) -> Option<&str> {
        match self {
            Self::Refused(refused) => Some(&refused.dc),
            Self::GaveUp { last, .. } => last.dc(),
            Self::Unreachable { at, .. }
            | Self::Untrusted { at, .. }
            | Self::SentAway { at, .. }
            | Self::Malformed { at, .. } => Some(at),
            Self::RootMismatch { dc, .. }
            | Self::Content { dc, .. }
            | Self::Proof { dc, .. }
            | Self::Conflict { dc, .. }
            | Self::Dropped { dc, .. } => Some(dc),
            Self::Config(_)
            | Self::Unsettled { .. }
            | Self::ExpectedRoot { .. }
            | Self::Incomplete { .. }
            | Self::SizeDiffers { .. }
            | Self::Source { .. }
            | Self::Input { .. }
            | Self::SourceChanged { .. }
            | Self::ChangedSince { .. }
            | Self::Target { .. }
            | Self::NotAFile { .. }
            | Self::Exists { .. }
            | Self::Busy { .. }
            | Self::Range { .. }
            | Self::Geometry(_)
            | Self::Hash(_)
            | Self::Task { .. } => None,
        }
    }

    /// The trace of the request that failed.
    pub fn trace(&self) -> Option<&str> {
        if let Self::Malformed { trace, .. } = self {
            return trace.as_deref();
        }
        self.refused()?.trace.as_deref()
    }

    /// The refusal, if it is one, also behind a giving up.
    pub fn refused(&self) -> Option<&Refused> {
        if let Self::GaveUp { last, .. } = self {
            return last.refused();
        }
        if let Self::Refused(refused) = self { Some(refused) } else { None }
    }

    /// What to do about it, in words.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Refused(refused) => refused.hint.clone(),
            Self::GaveUp { last, .. } => last.hint(),
            Self::Unreachable { .. } => Some("check the URL, the CA and whether the datacenter is up".into()),
            Self::Untrusted { .. } => Some("check that the CA is that of this cluster, and the URL".into()),
            Self::SentAway { .. } => {
                Some("the token goes to no other host; name it with --url if it is one of yours".into())
            }
            Self::Config(error) => Some(config_hint(error).into()),
            Self::Malformed { .. } => Some("check that the URL is that of a Sluice edge".into()),
            Self::Unsettled { id, .. } => {
                Some(format!("what was sent is safe; `sluice status {id}` shows who holds what"))
            }
            Self::RootMismatch { id, .. } => {
                Some(format!("the source changed during the upload, or {id} is another file: use a new id"))
            }
            Self::ExpectedRoot { .. } => Some("the source is not the file that was expected".into()),
            Self::Content { .. } | Self::Proof { .. } => {
                Some("the datacenter is damaged or not what it claims: tell its operator".into())
            }
            Self::Conflict { id, .. } => Some(format!("remove it with `sluice rm {id}` and send it again")),
            Self::Incomplete { id, .. } => {
                Some(format!("finish the upload; `sluice status {id}` shows what is missing"))
            }
            Self::Dropped { .. } => Some("the id is never used again: upload under a new one".into()),
            Self::SizeDiffers { .. } => Some("use a new id for this source".into()),
            Self::Input { id, .. } => Some(format!(
                "make the same stream again and put it with --id {id}, or give it up with `sluice rm {id}`"
            )),
            Self::SourceChanged { .. } => Some("send a file that stays as it is, under a new id".into()),
            Self::ChangedSince { id, .. } => Some(format!(
                "`sluice rm {id}` gives the unfinished upload up; or give a new --id to keep both"
            )),
            Self::NotAFile { .. } => Some("`-o -` writes to standard output, which goes anywhere".into()),
            Self::Exists { .. } => Some("use --force to replace it".into()),
            Self::Busy { .. } => Some("wait for it, or choose another target".into()),
            Self::Source { .. }
            | Self::Target { .. }
            | Self::Range { .. }
            | Self::Geometry(_)
            | Self::Hash(_)
            | Self::Task { .. } => None,
        }
    }
}

fn config_hint(error: &ConfigError) -> &'static str {
    match error {
        ConfigError::NoUrl | ConfigError::Url { .. } => "a URL looks like https://dc-a.example:8443",
        ConfigError::Token { .. } => "the token's file holds the token alone",
        ConfigError::Ca { .. } => "the CA's file holds certificates in PEM",
        ConfigError::Tls { .. } => "this is unexpected: report it",
        ConfigError::Jobs { .. } => "8 is a good number",
    }
}
