//! Volumes that earlier versions wrote, as they were committed then: today's code opens them, and finds in them what was
//! put there.
//!
//! `fixtures/volume-N` was written by the first process of format version N: `closed`, in order, with everything in the
//! files where it stays; `killed`, with everything in the journal. Old ones stay as they are. For a new version, raise
//! [`NEWEST`], and run `UPDATE=1 cargo nextest run -p sluice-store fixtures`, which writes what is not there yet.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use sluice_engine::ids::Generation;
use sluice_store::fs::{CheckOptions, FindingKind, check};
use sluice_store::{ChunkStore, FsOptions, FsStore, StoreError};

use crate::material::{FULL, TENANT, file, index, put, record, root};

/// The newest version of which there is a fixture.
const NEWEST: u32 = 1;

/// How a volume was left.
const ENDINGS: [&str; 2] = ["closed", "killed"];

fn fixture(version: u32, ending: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/volume-{version}/{ending}"))
}

fn options() -> FsOptions {
    FsOptions { reserve: 0, ..FsOptions::default() }
}

/// Bytes that a repository can keep.
fn whole() -> Bytes {
    let mut bytes = vec![b'A'; FULL];
    bytes.extend_from_slice(&[b'B'; 99]);
    Bytes::from(bytes)
}

fn damaged() -> Bytes {
    Bytes::from(vec![b'D'; 77])
}

/// One of everything that a volume can say.
async fn fill(path: &Path) -> FsStore {
    let store = FsStore::open(path, options()).unwrap();
    // Published, with a page.
    store.put_record(&record(1, Some(FULL as u64 + 99))).await.unwrap();
    put(&store, file(1), 0, &whole().slice(..FULL)).await.unwrap();
    put(&store, file(1), 1, &whole().slice(FULL..)).await.unwrap();
    store.publish(file(1), root(&whole())).await.unwrap();
    store.put_facts(file(1), b"facts of one").await.unwrap();
    store.put_page(file(1), 0, b"a page").await.unwrap();
    // Of unknown size.
    store.put_record(&record(2, None)).await.unwrap();
    // Without metadata.
    put(&store, file(3), 0, &Bytes::from_static(b"a provisional chunk")).await.unwrap();
    // Ended, freed, discarded; a chunk lost.
    store.drop_file(file(4), TENANT, b"facts of four").await.unwrap();
    for n in [5, 6, 7] {
        put(&store, file(n), 0, &Bytes::from_static(b"for a while")).await.unwrap();
    }
    store.free(file(5)).await.unwrap();
    assert!(store.discard_orphan(file(6)).await.unwrap());
    store.lose(file(7), &[index(0)]).await.unwrap();
    // Damaged.
    store.put_record(&record(8, Some(77))).await.unwrap();
    put(&store, file(8), 0, &damaged()).await.unwrap();
    store.publish(file(8), root(&damaged())).await.unwrap();
    let shard = format!("{:03x}", file(8).slot().number());
    let data = path.join("chunks").join(shard).join(file(8).to_string()).join("data-0");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[5] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    assert!(matches!(store.verify(file(8), index(0)).await, Err(StoreError::Corrupt { .. })));
    store.put_scrub_mark(b"how far").await.unwrap();
    store.put_state(b"state of the volume").await.unwrap();
    store.raise_generations(Generation::new(5)).await.unwrap();
    store
}

/// Compares everything with what [`fill`] put there.
async fn expect(store: &FsStore) {
    let known = store.list(None, 99).await.unwrap();
    let mut expected: Vec<_> = [1, 2, 3, 4, 5, 7, 8].map(file).into();
    expected.sort();
    assert_eq!(known, expected);
    let summary = async |n| store.summary(file(n)).await.unwrap().unwrap();

    let one = summary(1).await;
    assert_eq!(one.record, Some(record(1, Some(FULL as u64 + 99))));
    assert_eq!((&one.facts[..], one.published), (&b"facts of one"[..], Some(root(&whole()))));
    assert_eq!((one.held.as_slice(), one.held_bytes), (&[0..2][..], FULL as u64 + 99));
    assert_eq!(one.generation, Generation::new(5));
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), whole()[..FULL]);
    assert_eq!(store.read_chunk(file(1), index(1)).await.unwrap(), whole()[FULL..]);
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&whole()));
    assert_eq!(store.page(file(1), 0).await.unwrap(), Some(b"a page".to_vec()));

    assert_eq!(summary(2).await.record, Some(record(2, None)));
    let three = summary(3).await;
    assert_eq!((three.tenant, three.record, three.held.as_slice()), (TENANT, None, &[0..1][..]));
    assert_eq!(store.read_chunk(file(3), index(0)).await.unwrap(), &b"a provisional chunk"[..]);
    assert_eq!(summary(4).await.facts, b"facts of four");
    assert!(matches!(store.read_chunk(file(4), index(0)).await, Err(StoreError::Dropped(_))));
    for n in [5, 7] {
        assert!(summary(n).await.held.is_empty());
    }
    assert_eq!(summary(8).await.published, Some(root(&damaged())));
    assert_eq!(store.damage(file(8)), [0..1]);
    assert!(matches!(store.read_chunk(file(8), index(0)).await, Err(StoreError::Corrupt { .. })));
    assert_eq!(store.scrub_mark().await.unwrap(), Some(b"how far".to_vec()));
    assert_eq!(store.state().await.unwrap(), b"state of the volume");
}

/// Copies a volume, without what belongs to the process that made it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (name, target) = (entry.file_name().into_string().unwrap(), to.join(entry.file_name()));
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else if name != "lock" {
            let mut bytes = std::fs::read(entry.path()).unwrap();
            if name.starts_with("journal-") {
                // What was reserved and never written.
                let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                bytes.truncate(used.next_multiple_of(4096));
            }
            std::fs::write(target, bytes).unwrap();
        }
    }
}

#[tokio::test]
async fn volumes_of_every_version_are_read() {
    if std::env::var_os("UPDATE").is_some() {
        for ending in ENDINGS.into_iter().filter(|ending| !fixture(NEWEST, ending).exists()) {
            let dir = tempfile::tempdir().unwrap();
            let store = fill(dir.path()).await;
            match ending {
                "closed" => store.close().await.unwrap(),
                _ => store.kill(),
            }
            copy(dir.path(), &fixture(NEWEST, ending));
        }
    }
    for version in 1..=NEWEST {
        for ending in ENDINGS {
            println!("version {version}, {ending}");
            let dir = tempfile::tempdir().unwrap();
            copy(&fixture(version, ending), dir.path());
            // A repository keeps no empty directories.
            for name in ["index", "chunks", "trash"] {
                std::fs::create_dir_all(dir.path().join(name)).unwrap();
            }
            let report = check(dir.path(), CheckOptions { hash_bytes: true, progress: &mut |_| {} }).unwrap();
            assert_eq!(report.counts, [(FindingKind::Bytes, 1)].into(), "{report:#?}");
            assert_eq!((report.files, report.batches > 0), (7, ending == "killed"), "{report:#?}");
            // As it is, and as today's code leaves it.
            for _ in 0..2 {
                let store = FsStore::open(dir.path(), options()).unwrap();
                expect(&store).await;
                store.close().await.unwrap();
            }
        }
    }
}
