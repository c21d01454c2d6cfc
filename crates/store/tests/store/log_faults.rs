//! What can go wrong with the log, one thing at a time.

use std::sync::Arc;
use std::time::Duration;

use sluice_fault_disk::{Dice, FaultDisk};
use sluice_store::fs::{CheckOptions, Disk, FindingKind, Open, check_on};
use sluice_store::{Advice, ChunkStore, Chunks, FsOptions, FsStore, StoreError, Whole, WholeOutcome};

use crate::faults::soon;
use crate::fs::options;
use crate::material::{TENANT, content, file, index, put, record, root};

const VOLUME: &str = "/volume";

fn open(disk: &FaultDisk, options: FsOptions) -> FsStore {
    FsStore::open_on(Arc::new(disk.clone()), VOLUME, options).unwrap()
}

/// Puts whole files, one frame each.
async fn put_wholes(store: &FsStore, range: std::ops::Range<u128>, len: usize) {
    for n in range {
        store
            .put_whole(&record(n, Some(len as u64)), b"facts", Whole::of(content(n as u64, len)))
            .await
            .unwrap();
    }
}

async fn is_there(store: &FsStore, n: u128, len: usize) -> bool {
    store.read_chunk(file(n), index(0)).await.is_ok_and(|bytes| bytes == content(n as u64, len))
}

#[tokio::test]
async fn the_index_of_the_log_is_a_cache() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume");
    let options = FsOptions { log_index: 8, ..options() };
    let store = FsStore::open(&path, options.clone()).unwrap();
    put_wholes(&store, 0..60, 900).await;
    for n in 0..30 {
        store.drop_file(file(n), TENANT, b"gone").await.unwrap();
    }
    let all = async |store: &FsStore| {
        (store.list(None, 1000).await.unwrap().len(), store.listed(TENANT, None, 1000).await.unwrap())
    };
    let before = all(&store).await;
    assert_eq!((before.0, before.1.len()), (60, 30));
    soon("a manifest", || path.join("log/manifest").exists()).await;
    store.close().await.unwrap();
    drop(store);
    for kind in ["run-", "manifest", "nothing"] {
        for entry in std::fs::read_dir(path.join("log")).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name().to_string_lossy().starts_with(kind) {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
        let store = FsStore::open(&path, options.clone()).unwrap();
        assert_eq!(all(&store).await, before, "without {kind}");
        for n in 0..60 {
            assert_eq!(is_there(&store, n, 900).await, n >= 30, "without {kind}");
        }
        store.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_file_is_not_undone_by_the_journal_of_what_came_before_it() {
    let options = FsOptions { idle_files: 0, stall: Duration::from_millis(100), ..options() };
    let disk = FaultDisk::new();
    let store = open(&disk, options.clone());
    put(&store, file(1), 0, &content(7, 500)).await.unwrap();
    // A checkpoint that does not end: two journals are in force, and the newer says that the file is discarded.
    disk.faults(|faults| faults.hanging_write = Some("checkpoint"));
    for n in (1000..2000).take_while(|_| disk.hung() == 0) {
        store.put_record(&record(n, Some(3 << 20))).await.unwrap();
    }
    soon("a hung checkpoint", || disk.hung() == 1).await;
    assert!(store.discard_orphan(file(1)).await.unwrap());
    store.kill();
    let next = disk.after_kill();
    disk.faults(|faults| faults.hanging_write = None);

    let store = open(&next, options.clone());
    soon("the older journal is done with", || store.metrics().checkpoints == 1).await;
    for n in 2..40 {
        assert_eq!(store.summary(file(n)).await.unwrap(), None, "it takes the place of others in memory");
    }
    let bytes = content(1, 500);
    let put = store.put_whole(&record(1, Some(500)), b"facts", Whole::of(bytes.clone())).await.unwrap();
    store.kill();
    let store = open(&next.after_power_cut(&mut Dice(1)), options);
    assert_eq!(is_there(&store, 1, 500).await, put == WholeOutcome::Stored, "{put:?}");
}

#[tokio::test]
async fn a_torn_frame_is_cut_and_a_damaged_one_is_reported_and_costs_only_what_it_held() {
    let disk = FaultDisk::new();
    let options = FsOptions { log_segment_len: 1 << 20, ..options() };
    let store = open(&disk, options.clone());
    put_wholes(&store, 0..4, 1000).await;
    store.kill();

    // A torn frame at the end was never acknowledged.
    let torn = disk.after_kill();
    torn.flip("/volume/log/log-1", 3 * 4096 + 700);
    let store = open(&torn, options.clone());
    assert_eq!(store.summary(file(3)).await.unwrap(), None);
    assert_eq!(store.metrics().integrity_failures, 0);
    put_wholes(&store, 3..5, 1000).await;
    store.kill();
    let store = open(&torn.after_kill(), options.clone());
    for n in 0..5 {
        assert!(is_there(&store, n, 1000).await, "file {n}");
    }
    store.kill();

    // Damage with intact frames behind it is reported. What was damaged is not served, and all else is.
    let damaged = disk.after_kill();
    damaged.flip("/volume/log/log-1", 4096 + 700);
    let store = open(&damaged, options.clone());
    assert_eq!(store.metrics().integrity_failures, 1);
    for n in 0..4 {
        assert_eq!(is_there(&store, n, 1000).await, n != 1, "file {n}");
    }
    put_wholes(&store, 1..2, 1000).await;
    assert!(is_there(&store, 1, 1000).await, "it can be sent again");
}

#[tokio::test]
async fn a_check_finds_what_is_damaged_in_the_log() {
    let disk = FaultDisk::new();
    let options = FsOptions { log_segment_len: 1 << 20, ..options() };
    let store = open(&disk, options.clone());
    put_wholes(&store, 0..4, 1000).await;
    store.drop_file(file(3), TENANT, b"gone").await.unwrap();
    store.close().await.unwrap();
    drop(store);
    let check = |disk: &FaultDisk| {
        let options = CheckOptions { hash_bytes: true, progress: &mut |_| {} };
        check_on(Arc::new(disk.clone()), VOLUME, options).unwrap()
    };
    let report = check(&disk);
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert_eq!((report.files, report.published, report.chunks, report.bytes), (4, 3, 3, 3000));
    disk.flip("/volume/log/log-1", 4096 + 700);
    let report = check(&disk);
    assert!(!report.is_sound());
    assert_eq!(report.counts, [(FindingKind::Log, 1)].into());
    assert_eq!((report.files, report.published), (3, 2));
    disk.flip("/volume/log/log-1", 4096 + 700);
    disk.flip("/volume/log/log-1", 4 * 4096 + 60);
    let report = check(&disk);
    assert!(report.is_sound(), "the last frame may have been torn");
    assert_eq!(report.counts, [(FindingKind::TornTail, 1)].into());
}

#[tokio::test]
async fn intact_records_of_a_damaged_frame_are_kept() {
    let disk = FaultDisk::new();
    let options = FsOptions { log_segment_len: 1 << 20, ..options() };
    let store = open(&disk, options.clone());
    // While the first is written, the others gather to one frame.
    disk.faults(|faults| faults.hanging_write = Some("log-"));
    let store = Arc::new(store);
    let puts: Vec<_> = (0..8)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { put_wholes(&store, n..n + 1, 600).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    disk.faults(|faults| faults.hanging_write = None);
    for put in puts {
        put.await.unwrap();
    }
    put_wholes(&store, 8..9, 600).await;
    store.kill();
    let frames = store.metrics();
    assert_eq!(frames.log_records, 9);
    let disk = disk.after_kill();
    // Some byte of one of the files that gathered, wherever it went.
    let segment = disk.open("/volume/log/log-1".as_ref(), Open::ReadOnly).unwrap();
    let bytes = segment.read_at(0, 1 << 20).unwrap();
    let at = bytes.windows(600).position(|window| window == content(3, 600)).unwrap();
    disk.flip("/volume/log/log-1", at as u64 + 300);
    let store = open(&disk, options);
    assert_eq!(store.metrics().integrity_failures, 1);
    let mut there = 0;
    for n in 0..9 {
        there += u64::from(is_there(&store, n, 600).await);
    }
    assert_eq!(there, 8, "one record is lost, and it is known that one is");
}

#[tokio::test]
async fn a_flipped_bit_of_a_whole_file_is_never_served() {
    let disk = FaultDisk::new();
    let store = open(&disk, options());
    put_wholes(&store, 0..3, 5000).await;
    disk.flip("/volume/log/log-1", 4900);
    let error = store.read_chunk(file(0), index(0)).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    assert!(matches!(store.recheck(file(0)).await, Err(StoreError::Corrupt { .. })));
    assert!(store.metrics().integrity_failures > 0);
    assert!(is_there(&store, 1, 5000).await);
    // It comes again from whoever has it.
    store.lose(file(0), &[index(0)]).await.unwrap();
    put(&store, file(0), 0, &content(0, 5000)).await.unwrap();
    store.publish(file(0), root(&content(0, 5000))).await.unwrap();
    assert!(is_there(&store, 0, 5000).await);
    store.close().await.unwrap();
    drop(store);
    let store = open(&disk, options());
    assert!(is_there(&store, 0, 5000).await);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_an_error_of_its_file_and_not_of_the_volume() {
    let disk = FaultDisk::new();
    let options = FsOptions { log_index: 2, idle_files: 0, ..options() };
    let store = open(&disk, options.clone());
    put_wholes(&store, 0..3, 1000).await;
    soon("the index is written down", || disk.holds("/volume/log/manifest")).await;
    store.kill();
    let disk = disk.after_kill();
    let store = open(&disk, options);
    disk.flip("/volume/log/log-1", 44 + 30);
    let error = store.summary(file(0)).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreadable { path, .. } if path.ends_with("log-1")), "{error}");
    assert_eq!(error.advice(), Advice::Stop);
    assert!(is_there(&store, 1, 1000).await);
    assert_eq!(store.list(None, 9).await.unwrap().len(), 3);
}

#[tokio::test]
async fn a_sync_that_fails_under_the_log_ends_all_writing() {
    let disk = FaultDisk::new();
    let store = open(&disk, options());
    put_wholes(&store, 0..1, 100).await;
    disk.faults(|faults| faults.failing_sync = Some("log-"));
    let error = store.put_whole(&record(1, Some(5)), b"", Whole::of(content(1, 5))).await.unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly { .. }), "{error}");
    assert_eq!(error.advice(), Advice::Retry);
    assert!(store.usage().read_only);
    assert!(store.put_record(&record(2, None)).await.is_err());
    assert!(is_there(&store, 0, 100).await, "what is there is still served");
    store.kill();
    let store = open(&disk.after_power_cut(&mut Dice(1)), options());
    assert!(is_there(&store, 0, 100).await);
    put_wholes(&store, 1..2, 100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_whole_files_and_takes_what_makes_room() {
    let disk = FaultDisk::new();
    let options = FsOptions { reserve: 2 << 20, log_segment_len: 512 << 10, log_index: 32, ..options() };
    let store = open(&disk, options.clone());
    let capacity = disk.used() + (6 << 20) / 4096;
    disk.faults(|faults| faults.capacity = Some(capacity));
    let (mut stored, len) = (0, 60_000);
    let error = loop {
        match store
            .put_whole(&record(stored, Some(len)), b"", Whole::of(content(stored as u64, len as usize)))
            .await
        {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 200, "it is full");
    };
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert_eq!(error.advice(), Advice::Retry);
    assert!(stored > 30, "{stored}");
    assert_eq!(store.summary(file(stored)).await.unwrap(), None, "nothing is remembered");
    // Nothing is left at all: files can still be dropped, and that makes room.
    let used = disk.used();
    disk.faults(|faults| faults.capacity = Some(used));
    for n in 0..stored {
        // What is kept back for this is little here; whoever tries again finds the room that was made.
        let mut tries = 0;
        while let Err(error) = store.drop_file(file(n), TENANT, b"gone").await {
            assert!(matches!(error, StoreError::Full { .. }) && tries < 1000, "file {n}: {error}");
            tries += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    disk.faults(|faults| faults.capacity = Some(capacity));
    put_dropped_until_collected(&store).await;
    // What was known of the free room is old by then.
    tokio::time::sleep(Duration::from_millis(110)).await;
    put_wholes(&store, 500..510, 60_000).await;
    store.close().await.unwrap();
    drop(store);
    let store = open(&disk, options);
    for n in 0..stored {
        assert!(matches!(store.read_chunk(file(n), index(0)).await, Err(StoreError::Dropped(_))), "file {n}");
    }
    for n in 500..510 {
        assert!(is_there(&store, n, 60_000).await, "file {n}");
    }
}

/// Drops more, so that the keeper is asked again, until garbage was collected.
async fn put_dropped_until_collected(store: &FsStore) {
    for n in 1000..3000 {
        store.drop_file(file(n), TENANT, b"").await.unwrap();
        if store.metrics().log_collected > 4 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("garbage was not collected: {:?}", store.metrics());
}

#[tokio::test]
async fn a_volume_of_the_first_version_is_opened_and_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), options()).unwrap();
    put(&store, file(1), 0, &content(1, 10)).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    std::fs::remove_dir_all(dir.path().join("log")).unwrap();
    let header = std::fs::read(dir.path().join("volume")).unwrap();
    let mut first = header.clone();
    first[3] = 1;
    let body = first.len() - 16;
    let check = blake3::hash(&first[..body]);
    first[body..].copy_from_slice(&check.as_bytes()[..16]);
    std::fs::write(dir.path().join("volume"), &first).unwrap();
    for _ in 0..2 {
        let store = FsStore::open(dir.path(), options()).unwrap();
        assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), content(1, 10));
        store.put_whole(&record(2, Some(3)), b"", Whole::of(content(2, 3))).await.unwrap();
        store.close().await.unwrap();
    }
    assert_eq!(std::fs::read(dir.path().join("volume")).unwrap(), header, "older processes keep away");
}
