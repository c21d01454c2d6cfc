//! What an aggregator asks its driver to do, strictly in this order.

#[cfg(doc)]
use super::Event;
use std::collections::BTreeMap;

use super::{FileMemory, Greeting, NodeMemory};
use crate::command::{Command, Kind};
use crate::hash::{RecordDigest, Root};
use crate::ids::{DcId, FileId, Generation, Nonce, TenantId};
use crate::ledger::Page;
use crate::revocations::Revocation;
use crate::span::{Place, Span};

/// Something to do. Results come back as events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Remember this of the file, durably, before any later effect.
    Persist(FileId, FileMemory),
    /// Remember this of the datacenter, durably, before any later effect.
    PersistNode(NodeMemory),
    /// Raise every file's generation to at least this, durably, before any later effect.
    RaiseGenerations(Generation),
    /// Sign and send, if the peer can be reached; otherwise drop it.
    Send(Command),
    /// Say this to a peer that is dialled. One for each [`NodeEvent::Dial`](super::NodeEvent::Dial), in their order.
    Hello {
        /// The peer.
        peer: DcId,
        /// What to say.
        greeting: Greeting,
    },
    /// Answer this to a peer that said hello. One for each [`NodeEvent::Hello`](super::NodeEvent::Hello), in their order.
    Answer {
        /// The peer.
        peer: DcId,
        /// What to answer. The peer learns from it what it must exceed, also if it is not welcome.
        greeting: Greeting,
        /// Whether it may speak. Whoever spoke for this datacenter over an earlier link is heard no longer then;
        /// otherwise this link is closed after the answer.
        welcome: bool,
    },
    /// Close the link to a peer: one of its ends is an older incarnation than one that spoke. Both begin again with a
    /// hello.
    CloseLink(DcId),
    /// Read what the store has of a file: [`Event::Loaded`](super::Event::Loaded) or
    /// [`Event::Absent`](super::Event::Absent).
    Wake(FileId),
    /// Fetch the metadata record from a peer, make it durable, and say [`Event::Loaded`] or [`Event::FetchFailed`].
    FetchRecord {
        /// The file.
        file: FileId,
        /// Who should have it.
        from: DcId,
        /// Names it.
        digest: RecordDigest,
    },
    /// Read what the own store holds under a place: [`Event::Restated`] with every span of it, as large as they get
    /// but one level finer than the place at least (a single chunk as it is). Generation and spans are read together.
    Restate {
        /// The file.
        file: FileId,
        /// For whom.
        to: DcId,
        /// Under which place.
        place: Place,
    },
    /// Keep a page of the ledger, in place of an older one of that segment.
    StorePage(FileId, Page),
    /// Read a page: [`Event::PageLoaded`], also if there is none. One of a file is asked for at a time.
    LoadPage(FileId, u64),
    /// Pull what is missing here under `place` from a holder that says it has `under`: [`Event::Pulled`].
    Pull {
        /// The file.
        file: FileId,
        /// The holder.
        from: DcId,
        /// What to pull: at most a unit.
        place: Place,
        /// The span it lies in, whose value everything is checked against.
        under: Span,
    },
    /// Read the only chunk of a file and hash it as a whole: [`Event::RootRead`].
    ReadRoot(FileId),
    /// Publish the file, of which every chunk is here: [`Event::Published`].
    Publish(FileId, Root),
    /// Check the published copy again: [`Event::Rechecked`].
    Recheck {
        /// The file.
        file: FileId,
        /// Who asks.
        to: DcId,
        /// To be repeated.
        nonce: Nonce,
    },
    /// Free the chunks here; the file is confirmed elsewhere: [`Event::Freed`].
    Free(FileId),
    /// Every chunk is here, and they do not merge to the root: find out with [`resolve`](crate::resolve::resolve) which
    /// of them contradict it, remove those, and say [`Event::Resolved`], then [`Event::Loaded`].
    Resolve {
        /// The file.
        file: FileId,
        /// The root that stands.
        root: Root,
        /// What every other holder says.
        others: BTreeMap<DcId, Vec<Span>>,
    },
    /// Remember the drop, durably, before any later effect; then remove the chunks.
    Drop(FileId, TenantId, FileMemory),
    /// Remove an orphan: every datacenter has said for long enough that it does not know it.
    DiscardOrphan(FileId),
    /// What is known of the file changed: wake whoever waits.
    Changed(FileId),
    /// Tokens and contexts are void from now on.
    Revoked(Revocation),
    /// A peer said something that it should not; for logs and metrics.
    Refused {
        /// Who.
        peer: DcId,
        /// What kind of command.
        kind: Kind,
        /// Why.
        reason: String,
    },
}
