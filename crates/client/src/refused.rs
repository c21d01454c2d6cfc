//! What was asked of a datacenter, and how it refused.

use std::fmt;
use std::time::Duration;

use sluice_proto::problem::Problem;
use uuid::Uuid;

/// What a request was about; how errors name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Asking where it is.
    About,
    /// Creating a file.
    Create {
        /// The file.
        id: Uuid,
    },
    /// Saying how large a file is that was created without a size.
    Settle {
        /// The file.
        id: Uuid,
    },
    /// Sending chunks.
    Chunks {
        /// The first.
        start: u64,
        /// How many.
        count: u64,
    },
    /// Asking where a file stands.
    Status {
        /// The file.
        id: Uuid,
    },
    /// Listing files.
    List,
    /// Asking for, or changing, the drain of a datacenter.
    Drain,
    /// Ending a file.
    Remove {
        /// The file.
        id: Uuid,
    },
    /// Voiding tokens of a tenant.
    Revoke {
        /// Number of the tenant.
        tenant: u64,
    },
    /// Asking where a tenant stands.
    Tenant {
        /// Number of the tenant.
        tenant: u64,
    },
    /// Reading the chunk values under a node.
    Tree {
        /// The first chunk.
        start: u64,
        /// log2 of the number of chunks.
        level: u8,
    },
    /// Reading chunks.
    Content {
        /// The first.
        start: u64,
        /// How many.
        count: u64,
    },
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::About => f.write_str("the question where it is"),
            Self::Create { id } => write!(f, "the metadata of {id}"),
            Self::Settle { id } => write!(f, "the size of {id}"),
            Self::Chunks { start, count: 1 } => write!(f, "chunk {start}"),
            Self::Chunks { start, count } => write!(f, "chunks {start} to {}", start + count - 1),
            Self::Status { id } => write!(f, "the status of {id}"),
            Self::List => f.write_str("the list of files"),
            Self::Drain => f.write_str("the drain"),
            Self::Remove { id } => write!(f, "the removal of {id}"),
            Self::Revoke { tenant } => write!(f, "the revocation of tokens of tenant {tenant}"),
            Self::Tenant { tenant } => write!(f, "the question about tenant {tenant}"),
            Self::Tree { start, level } => write!(f, "the chunk values from {start} at level {level}"),
            Self::Content { start, count: 1 } => write!(f, "the content of chunk {start}"),
            Self::Content { start, count } => {
                write!(f, "the content of chunks {start} to {}", start + count - 1)
            }
        }
    }
}

/// A request that a datacenter refused, in its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The datacenter.
    pub dc: String,
    /// What it refused.
    pub operation: Operation,
    /// The code of the problem; `None` in `problem` if this library does not know it.
    pub code: String,
    /// The kind of the problem.
    pub problem: Option<Problem>,
    /// The HTTP status.
    pub status: u16,
    /// What was expected and what came.
    pub detail: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// The trace of the request.
    pub trace: Option<String>,
    /// When to come back.
    pub retry_after: Option<Duration>,
}
