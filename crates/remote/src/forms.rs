//! Arguments and answers that several calls share, in JSON.

use std::ops::Range;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sluice_engine::geometry::Geometry;
use sluice_engine::ids::ClientFileId;
use sluice_engine::metadata::MetadataRecord;
use sluice_engine::span::Place;
use sluice_proto::calls::{ListQuery, Opened, Wait};
use sluice_proto::http::{FileStatus, State};
use sluice_proto::problem::Refusal;
use uuid::Uuid;

use crate::call::{garbled, misunderstood};

/// The longest that a caller may wait for a state.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// Nothing to be said.
#[derive(Serialize, Deserialize)]
pub(crate) struct Nothing {}

/// A file by its client's id.
#[derive(Serialize, Deserialize)]
pub(crate) struct File {
    id: Uuid,
}

impl File {
    pub(crate) fn of(id: ClientFileId) -> Self {
        Self { id: id.uuid() }
    }

    pub(crate) fn parse(self) -> ClientFileId {
        ClientFileId::new(self.id)
    }
}

/// A file that is to come whole, with so many bytes.
#[derive(Serialize, Deserialize)]
pub(crate) struct Whole {
    /// A caller of an earlier version does not say which: that is nobody's, and counts as a new one.
    #[serde(default)]
    id: Uuid,
    len: u64,
}

impl Whole {
    pub(crate) fn of(id: ClientFileId, len: u64) -> Self {
        Self { id: id.uuid(), len }
    }

    pub(crate) fn parse(self) -> (ClientFileId, u64) {
        (ClientFileId::new(self.id), self.len)
    }
}

/// Whether a file was new, and where it stands.
#[derive(Serialize, Deserialize)]
pub(crate) struct Created {
    pub(crate) new: bool,
    pub(crate) status: FileStatus,
}

/// A file and its size.
#[derive(Serialize, Deserialize)]
pub(crate) struct Settle {
    id: Uuid,
    size: u64,
}

impl Settle {
    pub(crate) fn of(id: ClientFileId, size: Geometry) -> Self {
        Self { id: id.uuid(), size: size.size() }
    }

    pub(crate) fn parse(self) -> Result<(ClientFileId, Geometry), Refusal> {
        Ok((ClientFileId::new(self.id), Geometry::new(self.size).map_err(garbled)?))
    }
}

/// A file, and how long to wait for a state of it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Ask {
    id: Uuid,
    state: Option<State>,
    timeout_ms: u64,
}

impl Ask {
    pub(crate) fn of(id: ClientFileId, wait: Option<Wait>) -> Self {
        let timeout_ms = wait.map_or(0, |wait| u64::try_from(wait.timeout.as_millis()).unwrap_or(u64::MAX));
        Self { id: id.uuid(), state: wait.map(|wait| wait.state), timeout_ms }
    }

    pub(crate) fn parse(self) -> (ClientFileId, Option<Wait>) {
        let timeout = Duration::from_millis(self.timeout_ms).min(MAX_WAIT);
        (ClientFileId::new(self.id), self.state.map(|state| Wait { state, timeout }))
    }
}

/// Which files to list.
#[derive(Serialize, Deserialize)]
pub(crate) struct List {
    state: Option<State>,
    after: Option<Uuid>,
    limit: usize,
}

impl List {
    pub(crate) fn of(ListQuery { state, after, limit }: ListQuery) -> Self {
        Self { state, after: after.map(|id| id.uuid()), limit }
    }

    pub(crate) fn parse(self) -> ListQuery {
        ListQuery { state: self.state, after: self.after.map(ClientFileId::new), limit: self.limit }
    }
}

/// A range of a file: of bytes, or of chunks.
#[derive(Serialize, Deserialize)]
pub(crate) struct Part {
    id: Uuid,
    start: u64,
    end: u64,
}

impl Part {
    pub(crate) fn of(id: ClientFileId, range: Range<u64>) -> Self {
        Self { id: id.uuid(), start: range.start, end: range.end }
    }

    pub(crate) fn parse(self) -> (ClientFileId, Range<u64>) {
        (ClientFileId::new(self.id), self.start..self.end)
    }
}

/// A place in a file.
#[derive(Serialize, Deserialize)]
pub(crate) struct Tree {
    id: Uuid,
    start: u64,
    level: u8,
}

impl Tree {
    pub(crate) fn of(id: ClientFileId, place: Place) -> Self {
        Self { id: id.uuid(), start: place.start(), level: place.level() }
    }

    pub(crate) fn parse(self) -> Result<(ClientFileId, Place), Refusal> {
        Ok((ClientFileId::new(self.id), Place::new(self.start, self.level).map_err(garbled)?))
    }
}

/// A complete file.
#[derive(Serialize, Deserialize)]
pub(crate) struct WireOpened {
    /// The metadata record, in base64.
    record: String,
    size: u64,
    root: String,
}

impl WireOpened {
    pub(crate) fn of(Opened { record, file, root }: Opened) -> Self {
        Self { record: STANDARD.encode(record.to_bytes()), size: file.size(), root: root.to_string() }
    }

    pub(crate) fn parse(self) -> Result<Opened, Refusal> {
        let record = STANDARD.decode(self.record).map_err(misunderstood)?;
        Ok(Opened {
            record: MetadataRecord::from_bytes(&record).map_err(misunderstood)?,
            file: Geometry::new(self.size).map_err(misunderstood)?,
            root: self.root.parse().map_err(misunderstood)?,
        })
    }
}
