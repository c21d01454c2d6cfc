//! What the committer is asked, and what it answers.

use std::sync::Arc;

use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::ids::{Generation, TenantId};
use sluice_engine::metadata::MetadataRecord;

use super::change::{Chunk, Published};
use super::disk::DiskFile;
use super::entry::Name;
use crate::claims::ClaimId;
use crate::{RecordOutcome, Whole, WholeOutcome};

/// What is asked of a file.
#[derive(Debug)]
pub(crate) enum Request {
    Metadata(Box<MetadataRecord>),
    Size(Geometry),
    Whole { record: Box<MetadataRecord>, facts: Vec<u8>, whole: Whole },
    Known { record: Box<MetadataRecord>, facts: Vec<u8> },
    Run { claim: ClaimId, tenant: TenantId, chunks: Vec<Chunk>, data: Arc<dyn DiskFile>, segment: u64 },
    Facts(Vec<u8>),
    Lose(Vec<ChunkIndex>),
    Publish { published: Published, losses: u64 },
    Free,
    Drop { tenant: TenantId, facts: Vec<u8> },
    Discard,
}

/// What is answered.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Done,
    Record(RecordOutcome),
    Whole(WholeOutcome),
    Generation(Generation),
    Discarded(bool),
}

impl Request {
    /// Whether the request may share a batch with others of the same file that may.
    pub(crate) fn commutes(&self) -> bool {
        match self {
            // Claims keep runs apart.
            Self::Run { .. } | Self::Facts(_) => true,
            Self::Metadata(_)
            | Self::Size(_)
            | Self::Whole { .. }
            | Self::Known { .. }
            | Self::Lose(_)
            | Self::Publish { .. }
            | Self::Free
            | Self::Drop { .. }
            | Self::Discard => false,
        }
    }

    /// The claim that it ends, whatever comes of it.
    pub(crate) fn claim(&self) -> Option<ClaimId> {
        if let Self::Run { claim, .. } = self { Some(*claim) } else { None }
    }

    /// The name of a file that must be durable before it.
    pub(crate) fn name(&self) -> Option<Name> {
        if let Self::Run { segment, .. } = self { Some(Name::Data(*segment)) } else { None }
    }

    /// The file whose bytes must be durable before it.
    pub(crate) fn into_data(self) -> Option<Arc<dyn DiskFile>> {
        if let Self::Run { data, .. } = self { Some(data) } else { None }
    }
}
