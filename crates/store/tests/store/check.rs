//! Checking a volume: what is sound is called sound, what is damaged is found, and nothing is written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sluice_fault_disk::Dice;
use sluice_store::fs::{CheckOptions, FindingKind, VolumeReport, check};
use sluice_store::{ChunkStore, Chunks, FsStore, StoreError};

use crate::fs::options;
use crate::material::{FULL, TENANT, content, file, index, listed, put, put_all, record, root};

fn checked(path: &Path, hash_bytes: bool) -> VolumeReport {
    check(path, CheckOptions { hash_bytes, progress: &mut |_| {} }).unwrap()
}

/// Every file under a directory, and its bytes.
fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.append(&mut snapshot(&path));
        } else {
            all.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
    all
}

fn kinds(report: &VolumeReport) -> Vec<FindingKind> {
    report.counts.keys().copied().collect()
}

/// A published file, one of one chunk, one that is not whole, an orphan, one that ended, and one in the journal only.
async fn fill(path: &Path) -> FsStore {
    let store = FsStore::open(path, options()).unwrap();
    let whole = content(1, 2 * FULL + 99);
    store.put_record(&record(1, Some(whole.len() as u64))).await.unwrap();
    put_all(&store, file(1), &whole).await.unwrap();
    store.publish(file(1), root(&whole)).await.unwrap();
    store.put_page(file(1), 0, b"a page").await.unwrap();
    let small = content(2, 500);
    store.put_record(&record(2, Some(500))).await.unwrap();
    put_all(&store, file(2), &small).await.unwrap();
    store.publish(file(2), root(&small)).await.unwrap();
    store.put_record(&record(3, Some(9 * FULL as u64))).await.unwrap();
    put(&store, file(3), 4, &content(3, FULL)).await.unwrap();
    put(&store, file(4), 7, &content(4, FULL)).await.unwrap();
    store.drop_file(file(5), TENANT, b"ended").await.unwrap();
    store.checkpoint().await.unwrap();
    store.put_record(&record(6, Some(FULL as u64))).await.unwrap();
    put(&store, file(6), 0, &content(6, FULL)).await.unwrap();
    store
}

#[tokio::test]
async fn a_volume_in_use_is_refused_and_says_by_whom() {
    let dir = tempfile::tempdir().unwrap();
    let store = fill(dir.path()).await;
    let error = check(dir.path(), CheckOptions { hash_bytes: true, progress: &mut |_| {} }).unwrap_err();
    let me = format!("in use by process {}", std::process::id());
    assert!(matches!(error, StoreError::InUse { .. }) && error.to_string().contains(&me), "{error}");
    store.kill();
    assert!(checked(dir.path(), true).is_sound());
}

#[tokio::test]
async fn what_is_sound_is_called_sound_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = fill(dir.path()).await;
    store.kill();
    let before = snapshot(dir.path());
    let mut told = 0;
    let report = check(dir.path(), CheckOptions { hash_bytes: true, progress: &mut |_| told += 1 }).unwrap();
    assert!(report.is_sound() && report.findings.is_empty(), "{report:?}");
    assert_eq!((report.files, report.published, report.chunks), (6, 2, 7), "{report:?}");
    assert!(report.batches > 0 && told >= 6, "{report:?}");
    assert!(checked(dir.path(), false).is_sound());
    assert_eq!(snapshot(dir.path()), before);
    // The same when all is in its files.
    FsStore::open(dir.path(), options()).unwrap().close().await.unwrap();
    let closed = checked(dir.path(), true);
    assert!(closed.is_sound(), "{closed:?}");
    assert_eq!((closed.files, closed.chunks, closed.batches), (6, 7, 0));
}

#[tokio::test]
async fn damage_is_named_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path()).await.close().await.unwrap();
    let of = |n: u128, name: &str| {
        let shard = format!("{:03x}", file(n).slot().number());
        dir.path().join("chunks").join(shard).join(file(n).to_string()).join(name)
    };
    let index_of = |n: u128| {
        dir.path().join("index").join(format!("{:03x}", file(n).slot().number())).join(file(n).to_string())
    };
    let flipped = |path: &Path, at: usize, hash_bytes: bool| {
        let sound = std::fs::read(path).unwrap();
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
        let report = checked(dir.path(), hash_bytes);
        std::fs::write(path, sound).unwrap();
        report
    };
    let bytes = flipped(&of(1, "data-0"), FULL + 5, true);
    assert_eq!(kinds(&bytes), [FindingKind::Bytes]);
    let found = &bytes.findings[0];
    assert_eq!((found.file, &found.chunks[..]), (Some(file(1)), &[1..2][..]), "{found:?}");
    assert_eq!(found.client, Some(record(1, None).client_id()));
    assert!(flipped(&of(1, "data-0"), FULL + 5, false).is_sound(), "nobody looked");
    // 44 bytes a value.
    assert_eq!(kinds(&flipped(&of(1, "values-0"), 2 * 44 + 3, false)), [FindingKind::Values]);
    assert_eq!(kinds(&flipped(&of(1, "page-0"), 9, false)), [FindingKind::Cache]);
    assert!(flipped(&of(1, "page-0"), 9, false).is_sound(), "a cache");
    assert_eq!(kinds(&flipped(&index_of(1), 30, false)), [FindingKind::Index]);
    assert_eq!(kinds(&flipped(&dir.path().join("checkpoint"), 30, false)), [FindingKind::Checkpoint]);
    assert_eq!(kinds(&flipped(&dir.path().join("volume"), 20, false)), [FindingKind::Header]);

    for (gone, kind) in [
        (of(1, "data-0"), FindingKind::Bytes),
        (of(1, "values-0"), FindingKind::Values),
        (of(2, "data-0"), FindingKind::Bytes),
        (index_of(1), FindingKind::Index),
        (index_of(4), FindingKind::Index),
        (dir.path().join("journal-1"), FindingKind::Journal),
        (dir.path().join("volume"), FindingKind::Header),
    ] {
        let aside = dir.path().join("index").join("aside.tmp");
        std::fs::rename(&gone, &aside).unwrap();
        let report = checked(dir.path(), false);
        std::fs::rename(&aside, &gone).unwrap();
        assert!(report.counts.contains_key(&kind), "{gone:?}: {report:?}");
    }
    let cut = std::fs::File::options().write(true).open(of(1, "data-0")).unwrap();
    cut.set_len(2 * FULL as u64).unwrap();
    let short = checked(dir.path(), false);
    assert_eq!((kinds(&short), &short.findings[0].chunks[..]), (vec![FindingKind::Bytes], &[2..3][..]));

    std::fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    std::fs::rename(of(4, "data-0"), of(4, "other")).unwrap();
    std::fs::remove_file(index_of(4)).unwrap();
    // Without values nothing was acknowledged.
    std::fs::remove_file(of(4, "values-0")).unwrap();
    let report = checked(dir.path(), false);
    assert!(report.counts.contains_key(&FindingKind::Unknown), "{report:?}");
    assert!(report.counts.contains_key(&FindingKind::Leftover), "{report:?}");
}

#[tokio::test]
async fn a_damaged_journal_and_a_torn_tail_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), options()).unwrap();
    for n in 0..4 {
        store.put_record(&record(n, None)).await.unwrap();
    }
    store.kill();
    let journal = dir.path().join("journal-1");
    let sound = std::fs::read(&journal).unwrap();
    for (batch, kind) in [(3, FindingKind::TornTail), (1, FindingKind::Journal)] {
        let mut bytes = sound.clone();
        bytes[batch * 4096 + 60] ^= 1;
        std::fs::write(&journal, bytes).unwrap();
        let report = checked(dir.path(), true);
        assert_eq!((kinds(&report), report.is_sound()), (vec![kind], !kind.is_damage()), "{report:?}");
        let opens = FsStore::open(dir.path(), options()).is_ok();
        assert_eq!(opens, report.is_sound(), "the store takes it for the same");
    }
    assert!(matches!(
        check("/proc/nowhere", CheckOptions { hash_bytes: true, progress: &mut |_| {} }),
        Err(StoreError::Unreadable { .. })
    ));
}

/// Whatever is flipped: either it is found, or nothing of what was stored is any different.
#[tokio::test]
async fn no_flip_escapes() {
    let seed = std::env::var("SLUICE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    println!("SLUICE_SEED={seed}");
    let mut dice = Dice(seed);
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path()).await.kill();
    let files: Vec<PathBuf> = snapshot(dir.path()).into_keys().collect();
    let copy = tempfile::tempdir().unwrap();
    let expected = {
        fill(copy.path()).await.kill();
        all_of(copy.path()).await
    };
    for path in files {
        let sound = std::fs::read(&path).unwrap();
        // A journal is mostly room that was reserved.
        let used = sound.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        for _ in 0..3 {
            if used == 0 {
                break;
            }
            let at = dice.below(used as u64) as usize;
            let mut bytes = sound.clone();
            bytes[at] ^= 1 << dice.below(8);
            std::fs::write(&path, &bytes).unwrap();
            let report = checked(dir.path(), true);
            if report.findings.is_empty() {
                // It hit room that nothing is in.
                let copy = tempfile::tempdir().unwrap();
                for (path, bytes) in snapshot(dir.path()) {
                    let path = copy.path().join(path.strip_prefix(dir.path()).unwrap());
                    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                    std::fs::write(path, bytes).unwrap();
                }
                std::fs::create_dir_all(copy.path().join("trash")).unwrap();
                assert_eq!(all_of(copy.path()).await, expected, "{path:?} at {at}");
            }
            std::fs::write(&path, &sound).unwrap();
        }
    }
    assert_eq!(all_of(dir.path()).await, expected);
}

/// Everything that a volume gives out.
async fn all_of(path: &Path) -> Vec<String> {
    let store = FsStore::open(path, options()).unwrap();
    let mut all = Vec::new();
    for id in listed(&store, None, 99).await {
        let summary = store.summary(id).await.unwrap().unwrap();
        all.push(format!("{summary:?}"));
        for chunk in summary.held.into_iter().flatten() {
            all.push(format!("{:?}", store.read_chunk(id, index(chunk)).await.map(|bytes| root(&bytes))));
        }
    }
    all
}
