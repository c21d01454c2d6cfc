//! Where a file stands, in the words of the HTTP door: as this datacenter knows it, and as its home does.

use std::ops::Range;
use std::sync::Arc;

use sluice_engine::aggregator::File;
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::Geometry;
use sluice_engine::ids::{ClientFileId, DcId, FileId};
use sluice_engine::ledger::FileState;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::ranges::Ranges;
use sluice_proto::http::{FileStatus, Holder, State};
use sluice_proto::peer::StatusRequest;
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::FileSummary;

use crate::AggregatorService;
use crate::links::{Peer, STATUS};
use crate::refusal::{dropped, of_store};

/// Ranges listed for one holder, or as missing.
const MAX_RANGES: usize = 1_000;

/// Damaged chunks of one file that are looked for at others.
const MAX_DAMAGED: usize = 100_000;

/// What a peer answered.
enum Answer {
    /// It knows the file.
    Known(Box<FileStatus>),
    /// It does not.
    Unknown,
    /// It cannot be asked.
    Silent,
    /// The file is gone.
    Dropped,
}

/// What the ledger says, before names are put to it.
struct Facts {
    state: FileState,
    size: Option<Geometry>,
    conflict: Option<String>,
    home: DcId,
    home_epoch: u8,
    root: Option<String>,
    missing_chunks: u64,
    missing: Vec<[u64; 2]>,
    damaged: Vec<[u64; 2]>,
    holders: Vec<(DcId, u64, Vec<[u64; 2]>)>,
}

/// `damaged` are the chunks of the own copy that are.
fn facts(file: &File, me: DcId, damaged: &[Range<u64>]) -> Option<Facts> {
    let ledger = file.ledger();
    let claim = ledger.claim()?;
    let pair = |range: Range<u64>| [range.start, range.end];
    let chunks = ledger.file().map_or(0, |shape| shape.chunks());
    let assembled = file.state() == FileState::Assembled;
    let holders = ledger.holders().filter(|(dc, ..)| ledger.chunks_held_by(*dc) > 0).map(|(dc, _, tree)| {
        let (ranges, _) = tree.ranges(MAX_RANGES);
        (dc, ledger.chunks_held_by(dc), ranges.into_iter().map(pair).collect())
    });
    let mut holders: Vec<_> = holders.collect();
    if let Some(copy) = ledger.best_copy().filter(|copy| ledger.is_assembled_at(copy.home))
        && !holders.iter().any(|(dc, ..)| *dc == copy.home)
    {
        // Who assembled the file says so once, and not span by span.
        holders.push((copy.home, chunks, std::iter::once([0, chunks]).filter(|_| chunks > 0).collect()));
    }
    // What the own copy lacks and nobody else has.
    let mut lost = Ranges::new();
    for chunk in damaged.iter().cloned().flatten().take(MAX_DAMAGED) {
        let mut others = ledger.holders().filter(|(dc, ..)| *dc != me);
        if !others.any(|(_, _, tree)| tree.has(chunk)) {
            lost.insert(chunk..chunk + 1);
        }
    }
    let lost: Vec<Range<u64>> = lost.iter().collect();
    Some(Facts {
        state: file.standing(me),
        size: ledger.file(),
        conflict: ledger.conflict_reason(),
        home: claim.home,
        home_epoch: claim.epoch.number(),
        root: ledger.root().map(|root| root.to_string()),
        missing_chunks: match assembled {
            true => lost.iter().map(|range| range.end - range.start).sum(),
            false => chunks.saturating_sub(ledger.union().covered()),
        },
        missing: match assembled {
            true => lost.into_iter().take(MAX_RANGES).map(pair).collect(),
            false => ledger.missing(0..chunks, MAX_RANGES).into_iter().map(pair).collect(),
        },
        damaged: damaged.iter().take(MAX_RANGES).cloned().map(pair).collect(),
        holders,
    })
}

/// The state's name on the wire.
pub(crate) fn state(state: FileState) -> State {
    match state {
        FileState::Unheard | FileState::Receiving => State::Receiving,
        FileState::Complete => State::Complete,
        FileState::Assembled => State::Assembled,
        FileState::Conflict => State::Conflict,
        FileState::Dropped => State::Dropped,
    }
}

impl AggregatorService {
    /// What this datacenter knows of a file by itself; `None` if it does not know it.
    pub(crate) async fn own_status(
        self: &Arc<Self>,
        context: &SignedContext,
        id: ClientFileId,
    ) -> Result<Option<FileStatus>, Refusal> {
        let session = self.parts.access.verify(context)?;
        let file = FileId::derive(session.tenant, id);
        let me = self.parts.dc;
        let damaged = self.parts.store.damage(file).await.map_err(|error| of_store(&error))?;
        let asked = self.look(file, move |aggregator| {
            let file = aggregator.file(file)?;
            Some((file.state(), file.record().is_some(), facts(file, me, &damaged)))
        });
        match asked.await? {
            None | Some((FileState::Unheard, ..)) => Ok(None),
            Some((FileState::Dropped, ..)) => Err(dropped()),
            Some((_, true, Some(facts))) => {
                let summary = self.summary(file).await?;
                let held = summary.held;
                let record = summary.record.ok_or_else(no_record)?;
                Ok(Some(self.describe(&record, facts, &held)))
            }
            Some((_, false, _)) => {
                self.ledgers
                    .tell(sluice_engine::aggregator::NodeEvent::File(
                        file,
                        sluice_engine::aggregator::Event::Wanted,
                    ))
                    .await;
                Err(no_metadata())
            }
            Some((_, true, None)) => Ok(None),
        }
    }

    /// The metadata record, which must be here.
    pub(crate) async fn record(&self, file: FileId) -> Result<MetadataRecord, Refusal> {
        self.summary(file).await?.record.ok_or_else(no_record)
    }

    async fn summary(&self, file: FileId) -> Result<FileSummary, Refusal> {
        let summary = self.parts.store.summary(file).await.map_err(|error| of_store(&error))?;
        summary.ok_or_else(no_record)
    }

    /// Puts names to what the ledger says. While the size is open it says nothing of chunks: what is `held` here does.
    fn describe(&self, record: &MetadataRecord, mut facts: Facts, held: &[Range<u64>]) -> FileStatus {
        let shape = facts.size;
        let me = self.parts.dc;
        if shape.is_none() && !held.is_empty() {
            let chunks = held.iter().map(|range| range.end - range.start).sum();
            let ranges = held.iter().take(MAX_RANGES).map(|range| [range.start, range.end]).collect();
            facts.holders = vec![(me, chunks, ranges)];
        }
        let mut holders: Vec<Holder> = facts
            .holders
            .into_iter()
            .map(|(dc, chunks, ranges)| Holder { dc: self.dc_name(dc), chunks, ranges })
            .collect();
        holders.sort_by(|a, b| a.dc.cmp(&b.dc));
        FileStatus {
            id: record.client_id().uuid(),
            size: shape.map(Geometry::size),
            chunks: shape.map_or(0, Geometry::chunks),
            name: record.name().to_owned(),
            content_type: record.content_type().to_owned(),
            metadata: record.user().clone(),
            expires_in: record.expiry_secs(),
            expected_root: record.expected_root().map(|root| root.to_string()),
            state: state(facts.state),
            conflict: facts.conflict,
            home: self.dc_name(facts.home),
            home_epoch: facts.home_epoch,
            root: facts.root,
            dc: self.dc_name(me),
            home_answered: facts.home == me,
            missing_chunks: facts.missing_chunks,
            missing: facts.missing,
            damaged: facts.damaged,
            holders,
        }
    }

    /// Where a file stands: the home is asked if it is elsewhere, and everyone if the file is not known here.
    pub(crate) async fn full_status(
        self: &Arc<Self>,
        context: &SignedContext,
        id: ClientFileId,
    ) -> Result<FileStatus, Refusal> {
        let own = self.own_status(context, id).await;
        let me = self.dc_name(self.parts.dc);
        match own {
            Ok(Some(own)) if own.home == me => Ok(FileStatus { home_answered: true, ..own }),
            // Only the home knows how its copy is; that there is one is known without it.
            Ok(Some(own)) if own.state == State::Assembled && !self.is_linked_to(&own.home).await => {
                Ok(FileStatus { home_answered: true, ..own })
            }
            Ok(Some(own)) => {
                let home =
                    self.parts.material.dc_named(&own.home).and_then(|dc| self.links.peer(dc).cloned());
                match home {
                    Some(home) => match self.ask_status(&home, context, id).await {
                        Answer::Known(theirs) => Ok(joined(own, *theirs, &me)),
                        Answer::Dropped => Err(dropped()),
                        Answer::Unknown | Answer::Silent => Ok(own),
                    },
                    None => Ok(own),
                }
            }
            Ok(None) => self.ask_everyone(context, id, &me).await,
            // The metadata is not here yet: somebody else has it.
            Err(refusal) if matches!(refusal.problem, Problem::Unavailable | Problem::NoMetadata) => {
                self.ask_everyone(context, id, &me).await.map_err(|_| refusal)
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// Whether a datacenter can be asked now.
    async fn is_linked_to(&self, name: &str) -> bool {
        let Some(dc) = self.parts.material.dc_named(name) else { return false };
        self.ledgers.ask(move |aggregator| aggregator.is_linked(dc)).await.unwrap_or(false)
    }

    async fn ask_everyone(
        self: &Arc<Self>,
        context: &SignedContext,
        id: ClientFileId,
        me: &str,
    ) -> Result<FileStatus, Refusal> {
        let asked = self.links.peers().cloned().map(|peer| {
            let (service, context) = (self.clone(), context.clone());
            async move { (service.ask_status(&peer, &context, id).await, peer) }
        });
        let mut silent = Vec::new();
        for (answer, peer) in futures_util::future::join_all(asked).await {
            match answer {
                Answer::Known(theirs) => return Ok(FileStatus { dc: me.to_owned(), ..*theirs }),
                Answer::Dropped => return Err(dropped()),
                Answer::Unknown => {}
                Answer::Silent => silent.push(peer.name.clone()),
            }
        }
        if silent.is_empty() {
            return Err(Refusal::not_found());
        }
        let detail = format!("the file is not known here, and {} cannot be asked", silent.join(", "));
        Err(Refusal::new(Problem::NoMetadata, detail)
            .hint("try again, or ask the datacenter that took the metadata; whoever sends the file can create it here"))
    }

    async fn ask_status(&self, peer: &Peer, context: &SignedContext, id: ClientFileId) -> Answer {
        let request = StatusRequest {
            context: context.as_bytes().to_vec().into(),
            id: id.uuid().as_bytes().to_vec().into(),
        };
        let mut client = peer.client();
        let refusal = match self.asked(peer, STATUS, client.status(request)).await {
            Ok(reply) => match reply.status {
                None => return Answer::Unknown,
                Some(json) => match serde_json::from_slice(&json) {
                    Ok(status) => return Answer::Known(Box::new(status)),
                    Err(error) => Refusal::new(Problem::Unavailable, error.to_string()),
                },
            },
            Err(refusal) => refusal,
        };
        tracing::debug!(peer = %peer.name, %refusal, "no status");
        if refusal.problem == Problem::Dropped { Answer::Dropped } else { Answer::Silent }
    }
}

fn no_record() -> Refusal {
    Refusal::new(Problem::Unavailable, "the file's metadata is not here")
}

/// The file is known, and not what it is called, for example. Who has its record is asked for it; after a loss that may be
/// nobody.
pub(crate) fn no_metadata() -> Refusal {
    Refusal::new(Problem::NoMetadata, "the file is known, but its metadata is not here (yet)")
        .hint("try again; if whoever took it is lost, create the file here, with the same metadata, and send what is missing")
}

/// The home's view, with what this datacenter has and may not have said yet.
fn joined(own: FileStatus, home: FileStatus, me: &str) -> FileStatus {
    if own.size.is_some() && home.size.is_none() {
        // The home has not heard of the size yet, and cannot tell what is missing.
        return own;
    }
    let knows = home.home == home.dc;
    let mut status = FileStatus { dc: me.to_owned(), home_answered: true, ..home };
    for holder in own.holders.into_iter().filter(|holder| holder.dc == me) {
        match status.holders.iter_mut().find(|known| known.dc == me) {
            Some(known) => *known = holder,
            None => status.holders.push(holder),
        }
    }
    status.root = status.root.or(own.root);
    // A state that is known here and ahead of the home's answer stays. That the file was complete, or assembled, says
    // nothing of what the home has lost since.
    if own.state > status.state && !(knows && matches!(own.state, State::Complete | State::Assembled)) {
        status.state = own.state;
        status.conflict = own.conflict.or(status.conflict);
    }
    status
}
