//! What a check finds, in words: what is wrong, what that means, what to do.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use sluice_engine::ids::{ClientFileId, FileId};

/// The most findings that are listed; the rest is counted.
const MAX_FINDINGS: usize = 1_000;

/// What kind of thing was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FindingKind {
    /// The volume's header is damaged or missing.
    Header,
    /// The checkpoint is damaged or missing.
    Checkpoint,
    /// A journal is damaged before its end, or missing.
    Journal,
    /// A frame of the log is damaged though it was acknowledged.
    Log,
    /// The index of a file is damaged.
    Index,
    /// Values of chunks are damaged.
    Values,
    /// Bytes of chunks are damaged or missing.
    Bytes,
    /// A published file is no whole, or of another root.
    Root,
    /// Something cannot be read at all.
    Unreadable,
    /// A page of a ledger, or another cache, is damaged.
    Cache,
    /// The last batch of a journal, or frame of the log, was never finished.
    TornTail,
    /// Something is left over that nobody needs.
    Leftover,
    /// Something is there that Sluice did not make.
    Unknown,
}

impl FindingKind {
    /// Every kind.
    pub const ALL: [Self; 13] = [
        Self::Header,
        Self::Checkpoint,
        Self::Journal,
        Self::Log,
        Self::Index,
        Self::Values,
        Self::Bytes,
        Self::Root,
        Self::Unreadable,
        Self::Cache,
        Self::TornTail,
        Self::Leftover,
        Self::Unknown,
    ];

    /// A word for it.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Checkpoint => "checkpoint",
            Self::Journal => "journal",
            Self::Log => "log",
            Self::Index => "index",
            Self::Values => "values",
            Self::Bytes => "bytes",
            Self::Root => "root",
            Self::Unreadable => "unreadable",
            Self::Cache => "cache",
            Self::TornTail => "torn-tail",
            Self::Leftover => "leftover",
            Self::Unknown => "unknown",
        }
    }

    /// Whether something is lost by it, or may be.
    pub const fn is_damage(self) -> bool {
        match self {
            Self::Header
            | Self::Checkpoint
            | Self::Journal
            | Self::Log
            | Self::Index
            | Self::Values
            | Self::Bytes
            | Self::Root
            | Self::Unreadable => true,
            Self::Cache | Self::TornTail | Self::Leftover | Self::Unknown => false,
        }
    }

    /// What it means.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Header => "the volume does not open; its files may be sound",
            Self::Checkpoint => "the volume does not open: nobody knows which of the journals' batches count",
            Self::Journal => {
                "the volume does not open: what was acknowledged last is in there, and part of it is lost"
            }
            Self::Log => {
                "the volume opens without what is damaged: files that came whole are missing, or ended ones are back"
            }
            Self::Index => "nothing is known of this file but its bytes; it is neither served nor counted",
            Self::Values => "these chunks cannot be verified; they are never served",
            Self::Bytes => "these chunks are lost here; they are never served",
            Self::Root => {
                "the file is published, and cannot be what its root says; it is not served from here"
            }
            Self::Unreadable => "nobody knows what is in there",
            Self::Cache => "nothing is lost: it is a cache, and what was in it is found out again",
            Self::TornTail => {
                "nothing is lost: a batch that was never acknowledged is cut off when the volume opens"
            }
            Self::Leftover => "nothing is lost: what nobody needs is removed when the volume opens",
            Self::Unknown => "Sluice did not make it, and leaves it alone",
        }
    }

    /// What to do about it.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Header | Self::Checkpoint | Self::Journal => {
                "restore the volume from a copy; or keep it aside, begin with an empty directory, and send again \
                 what other datacenters do not have: sluice put says what is missing"
            }
            Self::Log => {
                "start the datacenter: files that others know are told again; send again what sluice status does not \
                 find. The segment is kept as it is"
            }
            Self::Index => "restore this index from a copy, or end the file with sluice rm and send it again",
            Self::Values | Self::Bytes => {
                "start the datacenter: its scrub fetches them again from whoever has them, or says in sluice status \
                 what has to be sent again"
            }
            Self::Root => {
                "start the datacenter, and read the file at another one; else end it and send it again"
            }
            Self::Unreadable => "look for errors of the disk in the system's log; check owner and mode",
            Self::Cache | Self::TornTail | Self::Leftover => "nothing",
            Self::Unknown => "move it elsewhere if it is in the way",
        }
    }
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// Where.
    pub path: PathBuf,
    /// Of which file.
    pub file: Option<FileId>,
    /// What its client calls it, if its metadata record is there.
    pub client: Option<ClientFileId>,
    /// Which of its chunks.
    pub chunks: Vec<Range<u64>>,
    /// What exactly.
    pub detail: String,
}

/// What a check found in a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeReport {
    /// The volume.
    pub path: PathBuf,
    /// Whether bytes were hashed.
    pub hashed: bool,
    /// Files of which anything is known, ended ones too.
    pub files: u64,
    /// Files that are published.
    pub published: u64,
    /// Chunks with a record.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Batches in the journals that are in force.
    pub batches: u64,
    /// The first 1,000 findings.
    pub findings: Vec<Finding>,
    /// How many there were of each kind.
    pub counts: BTreeMap<FindingKind, u64>,
}

impl VolumeReport {
    pub(super) fn add(&mut self, finding: Finding) {
        *self.counts.entry(finding.kind).or_default() += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }

    /// Whether nothing is damaged.
    pub fn is_sound(&self) -> bool {
        !self.counts.keys().any(|kind| kind.is_damage())
    }
}
