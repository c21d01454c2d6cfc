//! Measures the filesystem backend: `throughput DIR [writers] [MiB]` stores a file through concurrent writers of runs
//! of 8 MiB that come in pieces of 64 KiB, and reads it again, verified.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use sluice_engine::geometry::{ChunkIndex, Run};
use sluice_engine::ids::{FileId, TenantId};
use sluice_engine::limits::CHUNK_LEN;
use sluice_store::{ChunkStore, Chunks, FsOptions, FsStore, StoreError};

const TENANT: TenantId = TenantId::new(1);
const RUN_CHUNKS: u64 = 8;
const RUN_LEN: u64 = RUN_CHUNKS * CHUNK_LEN;
const PIECE: usize = 64 << 10;

async fn write_runs(
    store: Arc<FsStore>,
    file: FileId,
    next: Arc<AtomicU64>,
    runs: u64,
    bytes: Bytes,
) -> Result<(), StoreError> {
    loop {
        let at = next.fetch_add(1, Ordering::Relaxed);
        if at >= runs {
            return Ok(());
        }
        let run = Run::new(ChunkIndex::new(at * RUN_CHUNKS)?, RUN_CHUNKS)?;
        let mut writer = store.begin_run(file, TENANT, run, RUN_LEN).await?;
        for start in (0..bytes.len()).step_by(PIECE) {
            writer.write(bytes.slice(start..start + PIECE)).await?;
        }
        writer.finish(None).await?;
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: throughput DIR [writers] [MiB]")?;
    let writers: u64 = arguments.next().map_or(Ok(8), |text| text.parse())?;
    let runs = arguments.next().map_or(Ok(1024), |text| text.parse::<u64>())? / RUN_CHUNKS;
    let store = Arc::new(FsStore::open(&dir, FsOptions::default())?);
    let file = FileId::from_bytes(*uuid::Uuid::now_v7().as_bytes());
    let bytes = Bytes::from_iter((0..RUN_LEN).map(|i| (i * 31 % 251) as u8));
    let gib = (runs * RUN_LEN) as f64 / (1u64 << 30) as f64;

    let start = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..writers)
        .map(|_| tokio::spawn(write_runs(store.clone(), file, next.clone(), runs, bytes.clone())))
        .collect();
    for task in tasks {
        task.await??;
    }
    let took = start.elapsed().as_secs_f64();
    println!("stored {gib:.2} GiB in {took:.2} s: {:.2} GiB/s; {:?}", gib / took, store.metrics());

    let start = Instant::now();
    for chunk in 0..runs * RUN_CHUNKS {
        store.read_chunk(file, ChunkIndex::new(chunk)?).await?;
    }
    let took = start.elapsed().as_secs_f64();
    println!("read and verified it in {took:.2} s: {:.2} GiB/s", gib / took);
    store.drop_file(file, TENANT, b"").await?;
    store.close().await?;
    Ok(())
}
