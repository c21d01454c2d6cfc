//! What can go wrong with a volume, one thing at a time.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sluice_engine::geometry::Run;
use sluice_engine::ids::{FileId, Generation};
use sluice_engine::limits::{CHUNK_LEN, SEGMENT_CHUNKS};
use sluice_engine::share::Share;
use sluice_store::fs::Disk;
use sluice_store::{Advice, ChunkStore, Chunks, FsOptions, FsStore, StoreError, Whole};
use tokio::time::timeout;

use crate::fs::options;
use crate::material::{FULL, TENANT, content, file, index, put, put_all, record, root, values};
use sluice_fault_disk::{Dice, FaultDisk, operations_of_this_thread};

const VOLUME: &str = "/volume";

fn open(disk: &FaultDisk) -> Arc<FsStore> {
    Arc::new(open_with(disk, options()).unwrap())
}

fn open_with(disk: &FaultDisk, options: FsOptions) -> Result<FsStore, StoreError> {
    FsStore::open_on(Arc::new(disk.clone()), VOLUME, options)
}

fn path(kind: &str, file: FileId, name: &str) -> String {
    format!("{VOLUME}/{kind}/{:03x}/{file}{name}", file.slot().number())
}

/// Waits for something that happens soon, in the background.
pub(crate) async fn soon(what: &str, mut happened: impl FnMut() -> bool) {
    for _ in 0..500 {
        if happened() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen");
}

#[tokio::test]
async fn a_volume_belongs_to_one_store_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), options()).unwrap();
    let error = FsStore::open(dir.path(), options()).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    assert_eq!(error.advice(), Advice::Stop);
    store.close().await.unwrap();
    FsStore::open(dir.path(), options()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_killed_can_be_opened_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(1, 2 * FULL);
    for life in 0..5u64 {
        let store = Arc::new(FsStore::open(dir.path(), options()).unwrap());
        put(&*store, file(1), 2 * life, &bytes).await.unwrap();
        let run = Run::new(index(100), 2).unwrap();
        let mut writer = store.begin_run(file(1), TENANT, run, 2 * CHUNK_LEN).await.unwrap();
        writer.write(bytes.slice(..FULL)).await.unwrap();
        let waiting = {
            let store = store.clone();
            tokio::spawn(async move { store.begin_run(file(1), TENANT, run, 2 * CHUNK_LEN).await.err() })
        };
        if life % 2 == 0 {
            store.kill();
            assert!(matches!(waiting.await.unwrap(), Some(StoreError::Closing)));
            assert!(matches!(store.put_state(Share::WHOLE, b"x").await, Err(StoreError::Closing)));
        } else {
            // A handle that nobody dropped yet must not keep the volume.
            waiting.abort();
            let _ = waiting.await;
            drop(store);
        }
        let next = FsStore::open(dir.path(), options()).unwrap();
        assert!(writer.write(bytes.slice(FULL..)).await.is_err(), "the old writer is cut off");
        assert!(writer.finish(None).await.is_err());
        let summary = next.summary(file(1)).await.unwrap().unwrap();
        assert_eq!(summary.held, [0..2 * life + 2]);
        for i in 0..2 * life + 2 {
            let half = (i as usize % 2) * FULL;
            assert_eq!(next.read_chunk(file(1), index(i)).await.unwrap(), bytes[half..half + FULL]);
        }
    }
}

#[tokio::test]
async fn what_is_no_volume_or_a_newer_one_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.txt"), "years of work").unwrap();
    let error = FsStore::open(dir.path(), options()).unwrap_err();
    assert!(matches!(error, StoreError::Unreadable { .. }), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let dir = tempfile::tempdir().unwrap();
    FsStore::open(dir.path(), options()).unwrap().close().await.unwrap();
    let header = dir.path().join("volume");
    let mut bytes = std::fs::read(&header).unwrap();
    bytes[3] = 9;
    std::fs::write(&header, &bytes).unwrap();
    let error = FsStore::open(dir.path(), options()).unwrap_err();
    assert!(matches!(error, StoreError::NewerVersion { got: 9, known: 3, .. }), "{error}");
    bytes[3] = 2;
    bytes[10] ^= 1;
    std::fs::write(&header, &bytes).unwrap();
    let error = FsStore::open(dir.path(), options()).unwrap_err();
    assert!(matches!(error, StoreError::Unreadable { .. }), "{error}");

    // A header that is gone does not make a volume with files a new one.
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), options()).unwrap();
    store.put_record(&record(1, None)).await.unwrap();
    store.close().await.unwrap();
    std::fs::remove_file(dir.path().join("volume")).unwrap();
    assert!(matches!(FsStore::open(dir.path(), options()), Err(StoreError::Unreadable { .. })));

    let missing = Path::new("/proc/nowhere/volume");
    assert!(matches!(FsStore::open(missing, options()), Err(StoreError::Unreadable { .. })));
}

#[tokio::test]
async fn a_half_made_volume_is_made_again() {
    for after in 0..30 {
        let disk = FaultDisk::new();
        disk.faults(|faults| faults.power_off_after = Some(after));
        let first = open_with(&disk, options());
        let disk = disk.after_power_cut(&mut Dice(after));
        let store = open(&disk);
        store.put_record(&record(1, None)).await.unwrap();
        drop(first);
    }
}

#[tokio::test]
async fn a_flipped_bit_is_never_served() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let bytes = content(1, 3 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_all(&*store, file(1), &bytes).await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    disk.flip(&path("chunks", file(1), "/data-0"), CHUNK_LEN + 77);
    let error = store.read_chunk(file(1), index(1)).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { index: at, .. } if at == index(1)), "{error}");
    assert!(store.metrics().integrity_failures > 0);
    assert_eq!(store.read_chunk(file(1), index(2)).await.unwrap(), bytes[2 * FULL..]);
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes), "its values are intact");
    // It is fetched again from another holder.
    store.lose(file(1), &[index(1)]).await.unwrap();
    put(&*store, file(1), 1, &bytes.slice(FULL..2 * FULL)).await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    store.checkpoint().await.unwrap();
    // A damaged value is made again, since the bytes prove it, and so are all of them.
    for damaged in [&[2][..], &[0, 1, 2]] {
        for slot in damaged {
            disk.flip(&path("chunks", file(1), "/values-0"), 44 * slot + 5);
        }
        assert_eq!(store.read_chunk(file(1), index(2)).await.unwrap(), bytes[2 * FULL..]);
        assert_eq!(
            store.values(file(1), 0..3).await.unwrap(),
            values(0, &bytes).into_iter().map(Some).collect::<Vec<_>>()
        );
        assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    }
    // With damaged bytes beside it, it is as bad as those.
    disk.flip(&path("chunks", file(1), "/data-0"), 2 * CHUNK_LEN + 9);
    disk.flip(&path("chunks", file(1), "/values-0"), 44 * 2 + 5);
    assert!(matches!(store.read_chunk(file(1), index(2)).await, Err(StoreError::Corrupt { .. })));
    assert!(matches!(store.values(file(1), 0..3).await, Err(StoreError::Corrupt { .. })));
    assert!(store.recheck(file(1)).await.is_err());
    assert_eq!(store.read_chunk(file(1), index(1)).await.unwrap(), bytes[FULL..2 * FULL]);
    store.close().await.unwrap();
    // A damaged index is an error of that file, not of the volume.
    disk.flip(&path("index", file(1), ""), 40);
    let store = open(&disk);
    assert!(matches!(store.summary(file(1)).await, Err(StoreError::Unreadable { .. })));
    store.put_record(&record(2, None)).await.unwrap();
}

/// What a device does not give back now it may give back later: until bytes have proven to be those that were recorded,
/// they replace nothing.
#[tokio::test]
async fn only_the_right_bytes_replace_what_cannot_be_read() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let bytes = content(1, 2 * FULL);
    store.put_record(&record(1, Some(4 * CHUNK_LEN))).await.unwrap();
    put(&*store, file(1), 2, &bytes).await.unwrap();
    let wrong: Bytes = bytes.iter().map(|byte| byte ^ 1).collect::<Vec<_>>().into();
    for way in [1, 2, 3] {
        disk.faults(|faults| faults.failing_read = Some("data-"));
        for chunk in [2, 3] {
            let error = store.verify(file(1), index(chunk)).await.unwrap_err();
            assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
        }
        disk.faults(|faults| faults.failing_read = None);
        // Whole, cut short, and right in its first chunk only.
        let run = Run::new(index(2), 2).unwrap();
        let mut writer = store.begin_run(file(1), TENANT, run, 2 * CHUNK_LEN).await.unwrap();
        let pieces = match way {
            1 => vec![wrong.clone()],
            2 => vec![wrong.slice(..FULL / 2)],
            _ => vec![bytes.slice(..FULL), wrong.slice(FULL..)],
        };
        for piece in pieces {
            // It may be refused at once.
            let _ = writer.write(piece).await;
        }
        let error = writer.finish(None).await.unwrap_err();
        assert!(matches!(error, StoreError::ChunkConflict { .. } | StoreError::Length { .. }), "{error}");
        for chunk in [2, 3] {
            assert_eq!(store.verify(file(1), index(chunk)).await.unwrap(), CHUNK_LEN);
        }
    }
    assert!(store.damaged_files().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_stops_neither_the_journal_nor_the_other_files_and_loses_no_change() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let bytes = content(1, 3 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put(&*store, file(1), 0, &bytes.slice(..FULL)).await.unwrap();
    store.checkpoint().await.unwrap();
    put(&*store, file(1), 1, &bytes.slice(FULL..2 * FULL)).await.unwrap();
    store.kill();
    let damaged = path("index", file(1), "");
    disk.flip(&damaged, 40);

    // The journal has a change for which there is no place, at this start and at the next ones.
    let mut disk = disk.after_kill();
    for life in 0..3u64 {
        let store = open(&disk);
        assert!(matches!(store.summary(file(1)).await, Err(StoreError::Unreadable { .. })));
        timeout(Duration::from_secs(60), store.checkpoint()).await.expect("it ends").unwrap();
        assert_eq!(store.damaged_files().await.unwrap(), [file(1)]);
        for n in 2..9 {
            put(&*store, file(n), life, &content(n as u64, FULL)).await.unwrap();
        }
        store.checkpoint().await.unwrap();
        let refused = put(&*store, file(1), 2, &bytes.slice(2 * FULL..)).await.unwrap_err();
        assert!(matches!(refused, StoreError::Unreadable { .. }), "{refused}");
        assert_eq!(store.list(None, 99).await.unwrap().len(), 8);
        store.kill();
        disk = disk.after_power_cut(&mut Dice(life));
    }

    // The index can be read again: all changes are there, and in their place after the next checkpoint.
    disk.flip(&damaged, 40);
    for _ in 0..2 {
        let store = open(&disk);
        assert_eq!(store.summary(file(1)).await.unwrap().unwrap().held, [0..2]);
        assert_eq!(store.read_chunk(file(1), index(1)).await.unwrap(), bytes[FULL..2 * FULL]);
        // A journal without changes needs no checkpoint.
        store.put_state(Share::WHOLE, b"something").await.unwrap();
        store.checkpoint().await.unwrap();
        assert!(store.damaged_files().await.unwrap().is_empty());
        store.kill();
        disk = disk.after_power_cut(&mut Dice(7));
    }
    let names = disk.list(Path::new(VOLUME)).unwrap();
    assert!(!names.contains(&"aside".to_owned()), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_set_aside_comes_back_when_its_place_can_be_read_while_the_store_is_open() {
    let name: &'static str = Box::leak(file(1).to_string().into_boxed_str());
    for ends in [false, true] {
        let disk = FaultDisk::new();
        let store = open(&disk);
        let bytes = content(1, 3 * FULL);
        store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
        store.checkpoint().await.unwrap();
        put(&*store, file(1), 0, &bytes.slice(..FULL)).await.unwrap();
        store.kill();
        let disk = disk.after_kill();
        disk.faults(|faults| faults.failing_read = Some(name));
        let store = open(&disk);
        store.checkpoint().await.unwrap();
        assert_eq!(store.damaged_files().await.unwrap(), [file(1)]);
        disk.faults(|faults| faults.failing_read = None);
        assert_eq!(store.summary(file(1)).await.unwrap().unwrap().held, std::slice::from_ref(&(0..1)));
        if ends {
            // What comes after is not undone by what came back.
            store.drop_file(file(1), TENANT, b"end").await.unwrap();
        } else {
            put(&*store, file(1), 1, &bytes.slice(FULL..2 * FULL)).await.unwrap();
        }
        store.checkpoint().await.unwrap();
        assert!(store.damaged_files().await.unwrap().is_empty());
        store.kill();
        let store = open(&disk.after_power_cut(&mut Dice(3)));
        let summary = store.summary(file(1)).await.unwrap().unwrap();
        if ends {
            assert_eq!((summary.held.len(), &summary.facts[..]), (0, &b"end"[..]));
        } else {
            assert_eq!(summary.held, std::slice::from_ref(&(0..2)));
        }
    }
}

#[tokio::test]
async fn a_torn_tail_is_cut_and_a_damaged_journal_is_refused() {
    let disk = FaultDisk::new();
    let store = open_with(&disk, FsOptions { journal_len: 1 << 20, ..options() }).unwrap();
    for n in 0..4 {
        store.put_record(&record(n, None)).await.unwrap();
    }
    store.kill();
    let torn = disk.after_kill();
    torn.flip("/volume/journal-1", 3 * 4096 + 60);
    let store = open(&torn);
    assert_eq!(store.list(None, 9).await.unwrap().len(), 3, "the last batch is as if it never was");
    store.put_record(&record(7, None)).await.unwrap();
    store.kill();
    assert_eq!(open(&torn.after_kill()).list(None, 9).await.unwrap().len(), 4);

    disk.flip("/volume/journal-1", 4096 + 60);
    let error = open_with(&disk.after_kill(), options()).unwrap_err();
    assert!(matches!(&error, StoreError::Unreadable { reason, .. } if reason.contains("batch 2")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_runs_and_takes_what_makes_room() {
    let disk = FaultDisk::new();
    let options = FsOptions { reserve: 2 << 20, ..options() };
    let store = open_with(&disk, options.clone()).unwrap();
    // Room for eight chunks above the reserve.
    let capacity = disk.used() + (10 << 20) / 4096 + 10;
    disk.faults(|faults| faults.capacity = Some(capacity));
    let bytes = content(1, FULL);
    let mut stored = 0;
    let error = loop {
        // What was known of the free room is old by then.
        tokio::time::sleep(Duration::from_millis(110)).await;
        match put(&store, file(stored), 0, &bytes).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
        assert!(stored < 20, "it is full");
    };
    assert!(matches!(error, StoreError::Full { reserve, .. } if reserve == 2 << 20), "{error}");
    assert_eq!(error.advice(), Advice::Retry);
    assert!(stored >= 6, "{stored}");
    assert_eq!(store.summary(file(stored)).await.unwrap(), None, "nothing is recorded");
    assert_eq!(store.usage().free / CHUNK_LEN, 0);

    // Not even the reserve is left: the room for records still is.
    disk.faults(|faults| faults.capacity = Some(0));
    for n in 0..stored {
        assert_eq!(put(&store, file(n), 0, &bytes).await.unwrap().new_chunks, 0);
        assert_eq!(store.read_chunk(file(n), index(0)).await.unwrap(), bytes);
        store.put_record(&record(n, Some(CHUNK_LEN))).await.unwrap();
    }
    for n in 0..stored {
        match n % 2 {
            0 => store.drop_file(file(n), TENANT, b"").await.unwrap(),
            _ => assert!(store.free(file(n)).await.unwrap() > Generation::new(1)),
        }
    }
    disk.faults(|faults| faults.capacity = Some(capacity));
    soon("room", || store.usage().free > 6 * CHUNK_LEN).await;
    put(&store, file(1), 0, &bytes).await.unwrap();
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_finds_no_room_records_nothing() {
    let disk = FaultDisk::new();
    let store = open_with(&disk, FsOptions { reserve: 0, ..options() }).unwrap();
    let bytes = content(1, FULL);
    let run = Run::new(index(0), 1).unwrap();
    let mut writer = store.begin_run(file(1), TENANT, run, CHUNK_LEN).await.unwrap();
    let capacity = disk.used() + 20;
    disk.faults(|faults| faults.capacity = Some(capacity));
    assert!(matches!(writer.write(bytes.clone()).await, Err(StoreError::Full { .. })));
    assert!(matches!(writer.finish(None).await, Err(StoreError::Full { .. })));
    assert_eq!(store.summary(file(1)).await.unwrap(), None);
    disk.faults(|faults| faults.capacity = None);
    soon("room", || store.usage().free > CHUNK_LEN).await;
    put(&store, file(1), 0, &bytes).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_ends_writing_and_acknowledges_nothing() {
    for failing in ["data-", "journal-"] {
        let disk = FaultDisk::new();
        let store = open(&disk);
        let (bytes, other) = (content(1, FULL), content(2, FULL));
        put(&*store, file(1), 0, &bytes).await.unwrap();
        disk.faults(|faults| faults.failing_sync = Some(failing));
        let error = put(&*store, file(1), 1, &other).await.unwrap_err();
        assert!(matches!(error, StoreError::ReadOnly { .. }), "{error}");
        assert_eq!(error.advice(), Advice::Retry);
        // The disk recovers; what it lost is not believed all the same.
        disk.faults(|faults| faults.failing_sync = None);
        assert!(store.usage().read_only);
        for result in [
            put(&*store, file(1), 1, &other).await.map(|_| ()),
            put(&*store, file(2), 0, &other).await.map(|_| ()),
            store.put_record(&record(1, None)).await.map(|_| ()),
            store.put_state(Share::WHOLE, b"state").await,
            store.lose(file(1), &[index(0)]).await.map(|_| ()),
            store.recheck(file(1)).await.map(|_| ()),
        ] {
            assert!(matches!(result, Err(StoreError::ReadOnly { .. })), "{result:?}");
        }
        assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), bytes);
        assert!(matches!(store.read_chunk(file(1), index(1)).await, Err(StoreError::Missing { .. })));
        store.close().await.unwrap();
        let store = open(&disk.after_power_cut(&mut Dice(1)));
        assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), bytes);
        assert!(!store.usage().read_only);
        put(&*store, file(1), 1, &other).await.unwrap();
        assert_eq!(store.read_chunk(file(1), index(1)).await.unwrap(), other);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_sync_puts_in_doubt_is_read_again_from_the_device() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let bytes = content(1, FULL);
    // The device lies about the first chunk: only the cache has it.
    disk.faults(|faults| faults.lying_sync = Some("data-"));
    put(&*store, file(1), 0, &bytes).await.unwrap();
    disk.faults(|faults| {
        faults.lying_sync = None;
        faults.failing_sync = Some("data-");
    });
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), bytes);
    assert!(matches!(put(&*store, file(1), 1, &bytes).await, Err(StoreError::ReadOnly { .. })));
    soon("doubt", || store.metrics().integrity_failures > 0).await;
    assert!(matches!(store.read_chunk(file(1), index(0)).await, Err(StoreError::Corrupt { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_claim_is_taken_over() {
    let disk = FaultDisk::new();
    let store = open_with(&disk, FsOptions { stall: Duration::from_millis(300), ..options() }).unwrap();
    let bytes = content(1, FULL);
    let run = Run::new(index(0), 1).unwrap();
    let mut stalled = store.begin_run(file(1), TENANT, run, CHUNK_LEN).await.unwrap();
    stalled.write(content(2, 200_000)).await.unwrap();
    // A writer that makes progress, however slow, keeps its claim.
    for _ in 0..8 {
        let waiting = timeout(Duration::from_millis(100), store.begin_run(file(1), TENANT, run, CHUNK_LEN));
        assert!(waiting.await.is_err());
        stalled.write(content(3, 10)).await.unwrap();
    }
    let receipt = timeout(Duration::from_secs(5), put(&store, file(1), 0, &bytes)).await.unwrap().unwrap();
    assert_eq!(receipt.values, values(0, &bytes));
    let error = stalled.write(content(2, 100)).await.unwrap_err();
    assert!(matches!(error, StoreError::ClaimLost), "{error}");
    assert!(matches!(stalled.finish(None).await, Err(StoreError::ClaimLost)));
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_claim_is_not_taken_over_before_its_last_write_returned() {
    for dropped in [false, true] {
        let disk = FaultDisk::new();
        let stall = Duration::from_millis(100);
        let store = Arc::new(open_with(&disk, FsOptions { stall, ..options() }).unwrap());
        let (bytes, old) = (content(1, FULL), content(2, FULL));
        let run = Run::new(index(0), 1).unwrap();
        let mut stalled = store.begin_run(file(1), TENANT, run, CHUNK_LEN).await.unwrap();
        disk.faults(|faults| faults.hanging_write = Some("data-"));
        let hung = tokio::spawn(async move { stalled.write(old).await });
        soon("a hung write", || disk.hung() == 1).await;
        if dropped {
            hung.abort();
        }
        let next = {
            let (store, bytes) = (store.clone(), bytes.clone());
            tokio::spawn(async move { put(&*store, file(1), 0, &bytes).await })
        };
        tokio::time::sleep(4 * stall).await;
        assert_eq!(disk.hung(), 1, "the next writer waits");
        assert!(!next.is_finished());
        disk.faults(|faults| faults.hanging_write = None);
        let receipt = timeout(Duration::from_secs(5), next).await.unwrap().unwrap().unwrap();
        assert_eq!(receipt.values, values(0, &bytes));
        assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), bytes, "no old write came after");
        assert_eq!(hung.await.is_err(), dropped);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_hangs_delays_and_acknowledges_nothing() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let bytes = content(1, FULL);
    disk.faults(|faults| faults.hanging_write = Some("journal-"));
    let hung = {
        let (store, bytes) = (store.clone(), bytes.clone());
        tokio::spawn(async move { put(&*store, file(1), 0, &bytes).await })
    };
    soon("a hung write", || disk.hung() == 1).await;
    assert_eq!(store.summary(file(1)).await.unwrap(), None, "nothing is shown before it is durable");
    assert!(!hung.is_finished());
    disk.faults(|faults| faults.hanging_write = None);
    hung.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_on_a_disk_that_hangs_can_be_killed_and_keeps_the_volume_until_the_disk_answers() {
    let disk = FaultDisk::new();
    let stall = Duration::from_millis(100);
    let store = Arc::new(open_with(&disk, FsOptions { stall, ..options() }).unwrap());
    let bytes = content(1, FULL);
    put(&*store, file(1), 0, &bytes).await.unwrap();
    disk.faults(|faults| faults.hanging_write = Some("journal-"));
    let unanswered = {
        let (store, bytes) = (store.clone(), bytes.clone());
        tokio::spawn(async move { put(&*store, file(1), 1, &bytes).await })
    };
    soon("a hung write", || disk.hung() == 1).await;
    // Twice, as whoever kills a store also drops it.
    for _ in 0..2 {
        let store = store.clone();
        let killed = tokio::task::spawn_blocking(move || store.kill());
        timeout(Duration::from_secs(60), killed).await.expect("kill returns").unwrap();
    }
    assert_eq!(disk.hung(), 1);
    // What hangs may still be written: until then nobody else may.
    assert!(matches!(open_with(&disk, options()), Err(StoreError::InUse { .. })));
    disk.faults(|faults| faults.hanging_write = None);
    assert!(unanswered.await.unwrap().is_err(), "nothing is acknowledged after the end");
    let mut next = None;
    soon("the volume is given up", || {
        next = open_with(&disk, options()).ok();
        next.is_some()
    })
    .await;
    assert_eq!(next.unwrap().read_chunk(file(1), index(0)).await.unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_never_got_a_record_are_swept() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let empty = disk.used();
    let run = Run::new(index(0), 8).unwrap();
    let begin = async |store: &FsStore| {
        let mut writer = store.begin_run(file(1), TENANT, run, 8 * CHUNK_LEN).await.unwrap();
        writer.write(content(1, 8 * FULL)).await.unwrap();
        writer
    };
    let writer = begin(&store).await;
    assert!(disk.used() > empty + 2000);
    drop(writer);
    soon("a sweep", || disk.used() < empty + 100).await;
    // The same after a crash.
    let writer = begin(&store).await;
    store.kill();
    drop(writer);
    let disk = disk.after_kill();
    assert!(disk.used() > empty + 2000);
    let store = open(&disk);
    soon("a sweep", || disk.used() < empty + 100).await;
    put(&*store, file(1), 0, &content(1, 8 * FULL)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_whose_index_is_missing_are_kept_until_it_is_back_or_the_file_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let open = || FsStore::open(dir.path(), options()).unwrap();
    let place = |kind: &str, n: u128| {
        dir.path().join(kind).join(format!("{:03x}", file(n).slot().number())).join(file(n).to_string())
    };
    let bytes = |n: u64| content(n, 2 * FULL);
    let store = open();
    for n in 1..=4 {
        store.put_record(&record(n, Some(2 * CHUNK_LEN))).await.unwrap();
        put_all(&store, file(n), &bytes(n as u64)).await.unwrap();
        store.publish(file(n), root(&bytes(n as u64))).await.unwrap();
    }
    store.close().await.unwrap();
    drop(store);
    let aside = dir.path().join("index").join("aside.tmp");
    std::fs::rename(place("index", 1), &aside).unwrap();
    (2..=4).for_each(|n| std::fs::remove_file(place("index", n)).unwrap());

    let store = open();
    soon("all are found", || store.metrics().integrity_failures == 4).await;
    for n in 1..=4 {
        assert_eq!(store.summary(file(n)).await.unwrap(), None);
        let error = store.read_chunk(file(n), index(0)).await.unwrap_err();
        assert!(matches!(error, StoreError::NoFile(_)), "{error}");
    }
    // An upload that is given up takes nothing away.
    drop(store.begin_run(file(1), TENANT, Run::new(index(0), 1).unwrap(), CHUNK_LEN).await.unwrap());
    // One is sent again, with another content for all anybody knows; one is ended, and one comes whole.
    store.put_record(&record(2, Some(2 * CHUNK_LEN))).await.unwrap();
    put_all(&store, file(2), &bytes(5)).await.unwrap();
    store.publish(file(2), root(&bytes(5))).await.unwrap();
    store.drop_file(file(3), TENANT, b"ended").await.unwrap();
    store.put_whole(&record(4, Some(9)), b"", Whole::of(content(4, 9))).await.unwrap();
    for n in 3..=4 {
        soon("what has no use goes", || !place("chunks", n).exists()).await;
    }
    assert!(place("chunks", 1).join("data-0").exists());
    store.close().await.unwrap();
    drop(store);

    // Of the first the index comes back.
    std::fs::rename(&aside, place("index", 1)).unwrap();
    let store = open();
    for (n, seed) in [(1, 1), (2, 5)] {
        for i in 0..2 {
            let got = store.read_chunk(file(n), index(i)).await.unwrap();
            assert!(got == bytes(seed).slice(i as usize * FULL..(i as usize + 1) * FULL), "{n} {i}");
        }
    }
    assert_eq!(store.read_chunk(file(4), index(0)).await.unwrap(), content(4, 9));
    store.close().await.unwrap();
    assert_eq!(store.metrics().integrity_failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_many_segments_are_cut_at_the_right_places() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let size = 34 << 50;
    store.put_record(&record(1, Some(size))).await.unwrap();
    let bytes = content(1, 2 * FULL);
    let last = size / CHUNK_LEN - 2;
    let places = [0, SEGMENT_CHUNKS - 2, SEGMENT_CHUNKS, 5 * SEGMENT_CHUNKS + 2, last];
    for first in places {
        put(&*store, file(1), first, &bytes).await.unwrap();
    }
    store.checkpoint().await.unwrap();
    store.kill();
    let store = open(&disk.after_kill());
    let summary = store.summary(file(1)).await.unwrap().unwrap();
    let around = SEGMENT_CHUNKS - 2..SEGMENT_CHUNKS + 2;
    let far = 5 * SEGMENT_CHUNKS + 2..5 * SEGMENT_CHUNKS + 4;
    assert_eq!(summary.held, [0..2, around.clone(), far, last..last + 2]);
    for first in places {
        assert_eq!(store.read_chunk(file(1), index(first + 1)).await.unwrap(), bytes[FULL..]);
    }
    let found = store.values(file(1), around).await.unwrap();
    assert!(found.iter().all(Option::is_some));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_committed_together() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let bytes = content(1, 100);
    put(&*store, file(0), 0, &bytes).await.unwrap();
    let before = store.metrics();
    disk.faults(|faults| faults.hanging_write = Some("journal-"));
    let runs: Vec<_> = (1..65u64)
        .map(|i| {
            let (store, bytes) = (store.clone(), bytes.clone());
            tokio::spawn(async move { put(&*store, file(u128::from(i % 2)), i, &bytes).await })
        })
        .collect();
    soon("a hung write", || disk.hung() == 1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    disk.faults(|faults| faults.hanging_write = None);
    for run in runs {
        run.await.unwrap().unwrap();
    }
    let after = store.metrics();
    assert_eq!(after.records - before.records, 64);
    assert!(after.batches - before.batches <= 4, "{before:?} {after:?}");
    assert!(after.syncs - before.syncs <= 24, "{before:?} {after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_go_on_under_load_and_little_is_read_at_the_next_start() {
    let disk = FaultDisk::new();
    let store = open_with(&disk, FsOptions { idle_files: 50, ..options() }).unwrap();
    for n in 0..300 {
        store.put_record(&record(n, Some(10))).await.unwrap();
        put(&store, file(n), 0, &content(n as u64, 10)).await.unwrap();
    }
    let metrics = store.metrics();
    assert!(metrics.checkpoints > 3, "{metrics:?}");
    store.close().await.unwrap();
    let before = operations_of_this_thread();
    let store = open(&disk);
    let took = operations_of_this_thread() - before;
    assert!((1..60).contains(&took), "{took} operations before it serves");
    assert_eq!(store.list(None, 1000).await.unwrap().len(), 300);
    for n in 0..300 {
        assert_eq!(store.read_chunk(file(n), index(0)).await.unwrap(), content(n as u64, 10));
    }
}

#[tokio::test]
async fn damage_is_remembered_confirmed_to_nobody_and_mended_by_the_same_bytes_only() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    let bytes = content(1, 3 * FULL);
    store.put_record(&record(1, Some(bytes.len() as u64))).await.unwrap();
    put_all(&*store, file(1), &bytes).await.unwrap();
    store.publish(file(1), root(&bytes)).await.unwrap();
    assert_eq!(store.verify(file(1), index(1)).await.unwrap(), CHUNK_LEN);
    disk.flip(&path("chunks", file(1), "/data-0"), CHUNK_LEN + 77);
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes), "nobody looked at the bytes");
    assert!(matches!(store.verify(file(1), index(1)).await, Err(StoreError::Corrupt { .. })));
    assert!(matches!(store.recheck(file(1)).await, Err(StoreError::Corrupt { .. })));
    assert_eq!(
        (store.damage(file(1)).await.unwrap(), store.damaged_files().await.unwrap()),
        (vec![1..2], vec![file(1)])
    );
    // What is published stays so, and what is sound of it is read.
    assert_eq!(store.summary(file(1)).await.unwrap().unwrap().published, Some(root(&bytes)));
    assert_eq!(store.read_chunk(file(1), index(2)).await.unwrap(), bytes[2 * FULL..]);

    // After a power cut too.
    store.kill();
    let disk = disk.after_power_cut(&mut Dice(1));
    let store = open(&disk);
    assert_eq!(store.damage(file(1)).await.unwrap(), [1..2]);
    assert!(matches!(store.recheck(file(1)).await, Err(StoreError::Corrupt { .. })));
    assert!(matches!(store.read_chunk(file(1), index(1)).await, Err(StoreError::Corrupt { .. })));

    let other = put(&*store, file(1), 1, &content(9, FULL)).await.unwrap_err();
    assert!(matches!(other, StoreError::ChunkConflict { .. }), "{other}");
    assert_eq!(store.damage(file(1)).await.unwrap(), [1..2]);
    let receipt = put(&*store, file(1), 1, &bytes.slice(FULL..2 * FULL)).await.unwrap();
    assert_eq!(receipt.new_chunks, 1);
    assert!(store.damage(file(1)).await.unwrap().is_empty());
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));
    store.kill();
    let disk = disk.after_power_cut(&mut Dice(2));
    let store = open(&disk);
    assert_eq!(store.verify(file(1), index(1)).await.unwrap(), CHUNK_LEN);
    assert!(
        store.damage(file(1)).await.unwrap().is_empty() && store.damaged_files().await.unwrap().is_empty()
    );
    assert_eq!(store.recheck(file(1)).await.unwrap(), root(&bytes));

    // A chunk that is forgotten, a file that ends: no mark stays.
    for end in 0..2 {
        disk.flip(&path("chunks", file(1), "/data-0"), 5);
        assert!(store.verify(file(1), index(0)).await.is_err());
        match end {
            0 => drop(store.lose(file(1), &[index(0)]).await.unwrap()),
            _ => store.drop_file(file(1), TENANT, b"end").await.unwrap(),
        }
        assert!(store.damaged_files().await.unwrap().is_empty());
        if end == 0 {
            put(&*store, file(1), 0, &bytes.slice(..FULL)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_sector_that_cannot_be_read_is_damage_until_it_can() {
    let disk = FaultDisk::new();
    let store = open(&disk);
    put(&*store, file(1), 0, &content(1, FULL)).await.unwrap();
    disk.faults(|faults| faults.failing_read = Some("data-"));
    assert!(matches!(store.verify(file(1), index(0)).await, Err(StoreError::Corrupt { .. })));
    disk.faults(|faults| faults.failing_read = None);
    assert!(matches!(store.read_chunk(file(1), index(0)).await, Err(StoreError::Corrupt { .. })));
    assert_eq!(store.verify(file(1), index(0)).await.unwrap(), CHUNK_LEN);
    assert_eq!(store.read_chunk(file(1), index(0)).await.unwrap(), content(1, FULL));
    assert!(matches!(store.verify(file(1), index(1)).await, Err(StoreError::Missing { .. })));
    assert_eq!(store.scrub_mark(Share::WHOLE).await.unwrap(), None);
    store.put_scrub_mark(Share::WHOLE, b"here").await.unwrap();
    assert_eq!(store.scrub_mark(Share::WHOLE).await.unwrap(), Some(b"here".to_vec()));
}
