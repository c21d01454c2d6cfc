//! Opening a volume: making a new one, or reading what the last process left.
//!
//! Only the header, the checkpoint and the journals are read; a file's own state is read when somebody asks for it.
//! What is believed is synced first: the last process may have died between writing and syncing.

use std::collections::HashMap;
use std::fmt::Display;
use std::io;
use std::path::Path;
use std::sync::Arc;

use sluice_engine::ids::FileId;

use super::FsOptions;
use super::aside::{self, Aside};
use super::change::{Change, Record};
use super::checkpoint::Checkpoint;
use super::committer::MAX_BATCH;
use super::damage::{self, Marks};
use super::disk::{Disk, DiskFile, Open};
use super::frame::BLOCK;
use super::gate::{GatedDisk, ReplaceError};
use super::journal::{self, Journal};
use super::layout::{DIRS, Layout};
use super::log::{self, Log, Tail};
use super::shared::VolumeState;
use super::volume::{self, Header, HeaderError, VolumeId};
use crate::StoreError;

/// What a directory may hold before it is a volume: what is made first, and what a filesystem puts into its root.
const HARMLESS: [&str; 7] =
    ["lock", "lost+found", "journal-0", "journal-1", "checkpoint", "checkpoint.tmp", "volume.tmp"];

/// What was found.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) disk: GatedDisk,
    pub(crate) layout: Layout,
    pub(crate) header: Header,
    pub(crate) volume: VolumeState,
    pub(crate) journal: Journal,
    /// What the journals say of each file.
    pub(crate) pending: HashMap<FileId, Vec<(u64, Change)>>,
    /// What was set aside.
    pub(crate) aside: Aside,
    /// If two journals are in force: the older one, and the first batch after it.
    pub(crate) older: Option<(u64, u64)>,
    pub(crate) next_trash: u64,
    /// Chunks that are known to be damaged.
    pub(crate) damage: Marks,
    pub(crate) log: Log,
    pub(crate) tail: Tail,
    /// Frames of the log that are damaged though they were acknowledged.
    pub(crate) damaged: u64,
}

/// Opens the volume at `path`, making it if the directory is empty or missing.
pub(crate) fn open(disk: Arc<dyn Disk>, path: &Path, options: &FsOptions) -> Result<Recovered, StoreError> {
    let layout = Layout::new(path);
    let unreadable = |reason: &dyn Display| StoreError::Unreadable {
        path: path.display().to_string(),
        reason: reason.to_string(),
    };
    let is_volume = look(&*disk, path).map_err(|error| unreadable(&error))?;
    let disk = GatedDisk::lock(disk, &layout.lock()).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => StoreError::in_use(path, &layout.lock()),
        _ => unreadable(&error),
    })?;
    if !is_volume {
        create(&disk, &layout, options).map_err(|error| unreadable(&error))?;
    }
    let bytes = disk.read(&layout.volume()).map_err(|error| unreadable(&error))?;
    let mut header = volume::decode(&bytes).map_err(|error| match error {
        HeaderError::Newer(got) => StoreError::NewerVersion {
            path: path.display().to_string(),
            got: got.into(),
            known: volume::VERSION.into(),
        },
        HeaderError::Format(error) => unreadable(&format_args!("header: {error}")),
    })?;
    if header.version < volume::LOG {
        // Processes that know nothing of the log must not open it any more.
        header.version = volume::LOG;
        disk.create_dir(&layout.dir("log")).map_err(|error| unreadable(&error))?;
        replace(&disk, &layout.volume(), &volume::encode(header)).map_err(|error| unreadable(&error))?;
    }
    let id = header.id;
    let bytes =
        disk.read(&layout.checkpoint()).map_err(|error| unreadable(&format_args!("checkpoint: {error}")))?;
    let checkpoint =
        Checkpoint::decode(id, &bytes).map_err(|error| unreadable(&format_args!("checkpoint: {error}")))?;
    disk.sync_dir(path).map_err(|error| unreadable(&error))?;

    let mut volume = checkpoint.volume;
    let mut pending: HashMap<FileId, Vec<(u64, Change)>> = HashMap::new();
    let capacity = capacity(options);
    let (first, mut seq) = (checkpoint.journal + 1, checkpoint.next_seq);
    let mut files = Vec::new();
    let mut journals = Vec::new();
    for number in [first, first + 1] {
        let file = disk
            .open(&layout.journal(number), Open::Existing)
            .map_err(|error| unreadable(&format_args!("journal: {error}")))?;
        let bytes = read_synced(&*file).map_err(|error| unreadable(&format_args!("journal: {error}")))?;
        let replay = journal::replay(id, number, seq, &bytes).map_err(|error| unreadable(&error))?;
        if replay.torn {
            tracing::info!(number, end = replay.end, "a batch that was never acknowledged was cut off");
        }
        for batch in replay.batches {
            for record in batch.records {
                match record {
                    Record::File(file, change) => pending.entry(file).or_default().push((batch.seq, change)),
                    Record::Volume(change) => volume.apply(change),
                }
            }
            seq = batch.seq + 1;
        }
        // Fails only on a full disk, where what was reserved before must do.
        if let Err(error) = file.allocate(capacity) {
            tracing::warn!(number, %error, "cannot reserve room for the journal");
        }
        files.push(file);
        journals.push((number, replay.end, seq));
    }
    let in_second = journals[1].1 > 0;
    let (number, end, next_seq) = journals[usize::from(in_second)];
    // They were opened in the order of their numbers.
    files.rotate_left((first % 2) as usize);
    let files = <[_; 2]>::try_from(files).map_err(|_| unreadable(&"journals"))?;
    let journal = Journal { volume: id, files, number, end, next_seq, capacity };
    let older = in_second.then_some((first, journals[0].2));

    let aside = match disk.read(&layout.aside()) {
        Ok(bytes) => {
            aside::decode(id, &bytes).map_err(|error| unreadable(&format_args!("set aside: {error}")))?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Aside::new(),
        Err(error) => return Err(unreadable(&format_args!("set aside: {error}"))),
    };

    let trash = disk.list(&layout.dir("trash")).map_err(|error| unreadable(&error))?;
    let next_trash = trash.iter().filter_map(|name| name.parse::<u64>().ok()).max().map_or(0, |max| max + 1);
    let damage = match disk.read(&layout.damage()) {
        // What is forgotten here a scrub finds again.
        Ok(bytes) => damage::decode(id, &bytes).unwrap_or_else(|error| {
            tracing::error!(%error, "the marks of damaged chunks are damaged themselves");
            Marks::new()
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Marks::new(),
        Err(error) => return Err(unreadable(&format_args!("marks of damage: {error}"))),
    };
    let (log, tail, damaged) =
        log::recover(&disk, &layout, id, options.log_index).map_err(|error| unreadable(&error))?;
    Ok(Recovered {
        disk,
        layout,
        header,
        volume,
        journal,
        pending,
        aside,
        older,
        next_trash,
        log,
        tail,
        damaged,
        damage,
    })
}

/// Whether the directory is a volume; if not, it may become one. An error if it must not.
fn look(disk: &dyn Disk, path: &Path) -> io::Result<bool> {
    let names = match disk.list(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            disk.create_dir(path)?;
            Vec::new()
        }
        result => result?,
    };
    if names.iter().any(|name| name == "volume") {
        return Ok(true);
    }
    for name in names {
        let left_by_us =
            DIRS.contains(&name.as_str()) && disk.list(&path.join(&name)).is_ok_and(|names| names.is_empty());
        if !left_by_us && !HARMLESS.contains(&name.as_str()) {
            return Err(io::Error::other(format!("it is no volume, and holds {name:?}")));
        }
    }
    Ok(false)
}

/// Makes a volume; the header comes last, so that a half-made one is made again.
fn create(disk: &GatedDisk, layout: &Layout, options: &FsOptions) -> io::Result<()> {
    for name in DIRS {
        disk.create_dir(&layout.dir(name))?;
    }
    for number in 0..2 {
        let file = disk.open(&layout.journal(number), Open::Create)?;
        file.allocate(capacity(options))?;
        file.sync_data()?;
    }
    let mut id = VolumeId([0; 16]);
    rustix::rand::getrandom(&mut id.0, rustix::rand::GetRandomFlags::empty())?;
    let checkpoint = Checkpoint { journal: 0, next_seq: 1, volume: VolumeState::default() };
    replace(disk, &layout.checkpoint(), &checkpoint.encode(id))?;
    disk.sync_dir(layout.root())?;
    replace(disk, &layout.volume(), &volume::encode(Header { id, version: volume::LOG }))?;
    disk.sync_dir(layout.root())?;
    match layout.root().parent() {
        Some(parent) if !parent.as_os_str().is_empty() => disk.sync_dir(parent),
        Some(_) | None => Ok(()),
    }
}

fn replace(disk: &GatedDisk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    disk.replace(path, bytes).map_err(|error| match error {
        ReplaceError::Write(error) | ReplaceError::Sync(error) => error,
    })
}

/// Bytes to reserve for each journal: the mark at which it is checkpointed, and room for what comes meanwhile.
fn capacity(options: &FsOptions) -> u64 {
    (options.journal_len + 2 * MAX_BATCH as u64).next_multiple_of(BLOCK as u64)
}

/// Reads what is on the device. A sync that failed in an earlier process may have left pages in the cache that look
/// clean and never got there.
fn read_synced(file: &dyn DiskFile) -> io::Result<Vec<u8>> {
    file.sync_data()?;
    file.forget_cache()?;
    let len = usize::try_from(file.length()?).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    file.read_at(0, len)
}
