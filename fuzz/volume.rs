//! A volume of which a file was changed behind its back: it opens or says why not, and never gives out other bytes.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use bolero::TypeGenerator;
use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Run};
use sluice_engine::hash::Root;
use sluice_engine::ids::{ClientFileId, FileId, Generation, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_engine::metadata::{MetadataFields, MetadataRecord};
use sluice_engine::share::Share;
use sluice_store::{ChunkStore, Chunks, FsOptions, FsStore, StoreError, Whole};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::mangle::Edit;
use crate::times;

const TENANT: TenantId = TenantId::new(7);

/// Opening and reading all of it takes milliseconds; a machine that is busy may take a thousand times as long.
const BOUND: Duration = Duration::from_secs(60);

fn options() -> FsOptions {
    // The log's index is written down early, so that there are runs of it.
    let (log_segment_len, log_index) = (1 << 20, 4);
    FsOptions { journal_len: 16 << 10, reserve: 0, log_segment_len, log_index, ..FsOptions::default() }
}

fn client(n: u128) -> ClientFileId {
    ClientFileId::new(Uuid::from_u128(n))
}

fn content(n: u128) -> Bytes {
    let lengths = if SMALL.contains(&n) { [0, 77, 3000] } else { [77, 3000, CHUNK_LEN as usize + 5] };
    let mut bytes = vec![0; lengths[n as usize % 3]];
    blake3::Hasher::new().update(&n.to_be_bytes()).finalize_xof().fill(&mut bytes);
    bytes.into()
}

async fn put(store: &FsStore, file: FileId, bytes: &Bytes) {
    for (index, chunk) in bytes.chunks(CHUNK_LEN as usize).enumerate() {
        let start = ChunkIndex::new(index as u64).unwrap();
        let run = Run::from_len(start, chunk.len() as u64).unwrap();
        let mut writer = store.begin_run(file, TENANT, run, chunk.len() as u64).await.unwrap();
        writer.write(Bytes::copy_from_slice(chunk)).await.unwrap();
        writer.finish(None).await.unwrap();
    }
}

/// Files that went in chunk by chunk.
const CHUNKED: Range<u128> = 0..6;

/// Files that went in whole.
const SMALL: Range<u128> = 6..12;

/// One volume that was closed in order, and the same as a power cut left it: with all of it in the journal.
struct Templates {
    closed: TempDir,
    cut: TempDir,
    runtime: Runtime,
}

static TEMPLATES: LazyLock<Templates> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (closed, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    runtime.block_on(async {
        let store = FsStore::open(cut.path(), options()).unwrap();
        for n in CHUNKED {
            let bytes = content(n);
            let fields = MetadataFields { size: Some(bytes.len() as u64), ..Default::default() };
            let record = MetadataRecord::new(TENANT, client(n), fields).unwrap();
            let file = record.file_id();
            if n != 4 {
                store.put_record(&record).await.unwrap();
            }
            put(&store, file, &bytes).await;
            store.put_facts(file, &[n as u8; 30]).await.unwrap();
            if n % 2 == 1 {
                store.publish(file, Root::of_bytes(&bytes)).await.unwrap();
            }
            if n == 2 {
                store.put_page(file, 0, &[5; 67]).await.unwrap();
                store.lose(file, &[ChunkIndex::new(0).unwrap()]).await.unwrap();
            }
        }
        for n in SMALL {
            let bytes = content(n);
            let fields = MetadataFields { size: Some(bytes.len() as u64), ..Default::default() };
            let record = MetadataRecord::new(TENANT, client(n), fields).unwrap();
            if n == 6 {
                store.put_known(&record, b"elsewhere").await.unwrap();
            } else {
                store.put_whole(&record, b"here", Whole::of(bytes)).await.unwrap();
            }
            if n == 7 {
                store.drop_file(record.file_id(), TENANT, b"gone").await.unwrap();
            }
        }
        for share in [Share::WHOLE, Share::new(3, 16).unwrap()] {
            store.put_state(share, b"what a datacenter remembers").await.unwrap();
            store.raise_generations(share, Generation::new(1 << 32)).await.unwrap();
        }
        // Nothing moves any more in what is copied.
        store.kill();
        copy(cut.path(), closed.path());
        FsStore::open(closed.path(), options()).unwrap().close().await.unwrap();
    });
    Templates { closed, cut, runtime }
});

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).map(|_| ()).unwrap()
        }
    }
}

fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path())
            } else {
                found.push(entry.path())
            }
        }
    }
    found.sort();
    found
}

/// What happens to one file of the volume.
#[derive(Clone, Debug, TypeGenerator)]
enum Harm {
    Edits(Vec<Edit>),
    Gone,
    Empty,
    Instead(Vec<u8>),
}

fn harm(path: &Path, harm: &Harm, others: &[Vec<u8>]) {
    match harm {
        Harm::Edits(edits) => {
            let mut bytes = fs::read(path).unwrap();
            // Behind what was written there are megabytes of zeros.
            let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            let rest = bytes.split_off(written.clamp(bytes.len().min(8 << 10), bytes.len().min(64 << 10)));
            edits.iter().take(4).for_each(|edit| edit.apply(&mut bytes, others));
            bytes.extend_from_slice(&rest);
            fs::write(path, bytes).unwrap();
        }
        Harm::Gone => fs::remove_file(path).unwrap(),
        Harm::Empty => fs::write(path, b"").unwrap(),
        Harm::Instead(bytes) => fs::write(path, bytes).unwrap(),
    }
}

#[test]
fn volumes() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("volume");
    let iterations = times(60);
    bolero::check!().with_type::<(bool, u16, Harm)>().with_iterations(iterations).for_each(
        |(closed, which, what)| {
            let templates = &*TEMPLATES;
            let template = if *closed { &templates.closed } else { &templates.cut };
            if directory.exists() {
                fs::remove_dir_all(&directory).unwrap();
            }
            copy(template.path(), &directory);
            let all = files(&directory);
            let victim = &all[usize::from(*which) % all.len()];
            harm(victim, what, &[b"JUNK".to_vec()]);
            let began = Instant::now();
            templates.runtime.block_on(read_back(&directory));
            assert!(began.elapsed() < BOUND, "{:?} after {what:?} at {}", began.elapsed(), victim.display());
        },
    );
}

/// Opens and reads; everything that is given out must be what was stored.
async fn read_back(directory: &Path) {
    let store = match FsStore::open(directory, options()) {
        Ok(store) => store,
        Err(error) => {
            assert!(!matches!(error, StoreError::InUse { .. }), "{error}");
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    for n in CHUNKED.start..SMALL.end {
        let file = FileId::derive(TENANT, client(n));
        let bytes = content(n);
        if let Ok(Some(summary)) = store.summary(file).await {
            if let Some(record) = summary.record {
                assert_eq!((record.file_id(), record.client_id()), (file, client(n)));
                assert_eq!(record.geometry().map(|shape| shape.size()), Some(bytes.len() as u64));
            }
            if let Some(root) = summary.published {
                assert_eq!(root, Root::of_bytes(&bytes));
            }
        }
        for (index, chunk) in bytes.chunks(CHUNK_LEN as usize).enumerate() {
            let index = ChunkIndex::new(index as u64).unwrap();
            if let Ok(read) = store.read_chunk(file, index).await {
                assert_eq!(read, chunk, "other bytes for chunk {index} of file {n}");
            }
        }
        let _ = store.page(file, 0).await;
    }
    if let Ok(listed) = store.listed(TENANT, None, 1000).await {
        assert!(listed.iter().all(|entry| SMALL.map(client).any(|client| client == entry.client)));
    }
    if let Ok(states) = store.states().await {
        assert!(states.len() <= 2 && states.values().all(|state| state == b"what a datacenter remembers"));
    }
    // It goes on working, or says that it cannot.
    let file = FileId::derive(TENANT, client(1000));
    let record =
        MetadataRecord::new(TENANT, client(1000), MetadataFields { size: Some(9), ..Default::default() });
    if store.put_record(&record.unwrap()).await.is_ok() {
        let summary = store.summary(file).await.unwrap();
        assert!(summary.is_some_and(|summary| summary.record.is_some()));
    }
    let _ = store.close().await;
}
