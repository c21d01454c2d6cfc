//! What the demo sees of the upload while it goes on.

use std::collections::BTreeMap;
use std::sync::Arc;

use sluice_client::{Event, Observer, SharedObserver};
use tokio::sync::watch;
use uuid::Uuid;

/// What has happened so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// The file's id, and the datacenter that took the metadata, which makes it the home.
    pub(super) created: Option<(Uuid, String)>,
    /// Chunks acknowledged, by datacenter.
    pub(super) chunks: BTreeMap<String, u64>,
}

impl Seen {
    /// Chunks acknowledged by anyone.
    pub(super) fn acknowledged(&self) -> u64 {
        self.chunks.values().sum()
    }
}

/// Counts, and passes on to whoever draws.
pub(super) struct Watch {
    seen: watch::Sender<Seen>,
    next: Option<SharedObserver>,
}

impl Watch {
    /// The observer to give to the upload, and what it has seen. When the upload is over the receiver is closed.
    pub(super) fn begin(next: Option<SharedObserver>) -> (SharedObserver, watch::Receiver<Seen>) {
        let (seen, receiver) = watch::channel(Seen::default());
        (Arc::new(Self { seen, next }), receiver)
    }
}

impl Observer for Watch {
    fn observe(&self, event: &Event<'_>) {
        match event {
            Event::Created { id, dc, .. } => {
                self.seen.send_modify(|seen| seen.created = Some((*id, (*dc).to_owned())));
            }
            Event::Acknowledged { dc, count, .. } => {
                self.seen.send_modify(|seen| *seen.chunks.entry((*dc).to_owned()).or_default() += count);
            }
            // That dc-b does not answer for a while is the point.
            Event::UrlDown { .. } => return,
            Event::Planned { .. }
            | Event::Skipped { .. }
            | Event::Fetched { .. }
            | Event::UrlUp { .. }
            | Event::Damaged { .. }
            | Event::Resending { .. }
            | Event::Waiting { .. } => {}
        }
        if let Some(next) = &self.next {
            next.observe(event);
        }
    }
}
