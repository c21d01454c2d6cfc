//! What a caller may watch while a file goes up or comes down.

use std::sync::Arc;

use sluice_proto::http::State;
use uuid::Uuid;

use crate::error::ClientError;

/// One thing that happened. URLs are named by their index in [`ClientConfig::urls`](crate::ClientConfig::urls).
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The metadata is durable in a datacenter.
    Created {
        /// The file.
        id: Uuid,
        /// The URL.
        url: usize,
        /// The datacenter.
        dc: &'a str,
        /// Whether it was new there.
        new: bool,
    },
    /// How much there is to do.
    Planned {
        /// Chunks in all.
        chunks: u64,
        /// Bytes in all.
        bytes: u64,
        /// Chunks that are already where they should be.
        held: u64,
    },
    /// Chunks are durable in a datacenter.
    Acknowledged {
        /// The URL.
        url: usize,
        /// The datacenter.
        dc: &'a str,
        /// The first chunk.
        start: u64,
        /// Number of chunks.
        count: u64,
        /// Number of bytes.
        bytes: u64,
        /// Whether that datacenter has not seen the metadata yet.
        provisional: bool,
    },
    /// Chunks need not be sent or fetched: they are there.
    Skipped {
        /// The first chunk.
        start: u64,
        /// Number of chunks.
        count: u64,
        /// Number of bytes.
        bytes: u64,
    },
    /// Chunks came, were verified, and are written.
    Fetched {
        /// The URL.
        url: usize,
        /// The first chunk.
        start: u64,
        /// Number of chunks.
        count: u64,
        /// Number of bytes.
        bytes: u64,
    },
    /// A URL stopped being useful for now; its work goes elsewhere.
    UrlDown {
        /// The URL.
        url: usize,
        /// What failed.
        error: &'a ClientError,
    },
    /// A URL is useful again.
    UrlUp {
        /// The URL.
        url: usize,
    },
    /// A URL sent what does not hash to what it must; another one is asked.
    Damaged {
        /// The URL.
        url: usize,
        /// What does not fit.
        error: &'a ClientError,
    },
    /// Chunks that were acknowledged are missing and are sent again.
    Resending {
        /// Number of chunks.
        chunks: u64,
    },
    /// Everything is sent; the file has this state.
    Waiting {
        /// The state.
        state: State,
    },
}

/// Takes events, quickly: it is called between requests, and must not block.
pub trait Observer: Send + Sync + 'static {
    /// Takes one event.
    fn observe(&self, event: &Event<'_>);
}

impl<F: Fn(&Event<'_>) + Send + Sync + 'static> Observer for F {
    fn observe(&self, event: &Event<'_>) {
        self(event);
    }
}

/// An observer shared by the tasks of one call.
pub type SharedObserver = Arc<dyn Observer>;

/// An observer that looks away.
pub fn unobserved() -> SharedObserver {
    Arc::new(|_: &Event<'_>| {})
}
