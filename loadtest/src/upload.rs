//! One file through Sluice: created, sent in runs over several connections, complete; read back; removed.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use sluice_engine::limits::{CHUNK_LEN, MAX_RUN};
use sluice_proto::http::{ChunkReceipt, CreateFile, FileStatus, State};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::client::{Connection, Target};
use crate::content::{Content, ContentBody};

/// A run that was acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acknowledged {
    /// When, counted from the beginning of the upload.
    pub(crate) at: Duration,
    /// How long it took, from before its first byte was sent.
    pub(crate) latency: Duration,
    pub(crate) bytes: u64,
}

/// How far a file must be before an upload ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Until {
    /// Every run acknowledged: durable somewhere.
    Acknowledged,
    /// Known to be whole, and its root confirmed.
    #[default]
    Complete,
    /// In one piece at its home.
    Assembled,
}

/// Connections to the datacenters of a cluster.
pub(crate) struct Lanes(Vec<Connection>);

impl Lanes {
    /// `count` lanes, dealt out to the datacenters in turn.
    pub(crate) async fn open(targets: &[(String, Target)], count: usize) -> anyhow::Result<Self> {
        let mut lanes = Vec::new();
        for (nth, (_, target)) in targets.iter().enumerate() {
            let share = (count + targets.len() - 1 - nth) / targets.len();
            lanes.extend(target.lanes(share.max(1)).await?);
        }
        Ok(Self(lanes))
    }

    fn first(&mut self) -> &mut Connection {
        &mut self.0[0]
    }

    /// Uploads the first `size` bytes of the content, and answers with its id and what was acknowledged.
    pub(crate) async fn upload(
        &mut self,
        content: &Content,
        size: u64,
        until: Until,
    ) -> anyhow::Result<(Uuid, Vec<Acknowledged>)> {
        let id = Uuid::now_v7();
        let began = Instant::now();
        let create = CreateFile { id: Some(id), size: Some(size), ..CreateFile::default() };
        let _: FileStatus = self.first().json("POST", "/v1/files", Some(&create)).await?;
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        for mut lane in self.0.drain(..) {
            let (content, next) = (content.clone(), next.clone());
            tasks.spawn(async move {
                let mut done = Vec::new();
                loop {
                    let Some(run) = nth_run(size, next.fetch_add(1, Ordering::Relaxed)) else {
                        return Ok::<_, anyhow::Error>((lane, done));
                    };
                    let path = format!("/v1/files/{id}/chunks/{}", run.start / CHUNK_LEN);
                    let (asked, bytes) = (Instant::now(), run.end - run.start);
                    let receipt = lane.put("PUT", &path, content.body(run)).await?;
                    let latency = asked.elapsed();
                    let receipt: ChunkReceipt = serde_json::from_slice(&receipt)?;
                    ensure!(receipt.new_chunks == bytes.div_ceil(CHUNK_LEN), "{path} was there already");
                    done.push(Acknowledged { at: began.elapsed(), latency, bytes });
                }
            });
        }
        let mut all = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            let (lane, done) = ended??;
            self.0.push(lane);
            all.extend(done);
        }
        all.sort_by_key(|acknowledged| acknowledged.at);
        self.wait(id, until).await?;
        Ok((id, all))
    }

    /// Waits until a file is so far.
    pub(crate) async fn wait(&mut self, id: Uuid, until: Until) -> anyhow::Result<()> {
        let wanted = match until {
            Until::Acknowledged => return Ok(()),
            Until::Complete => State::Complete,
            Until::Assembled => State::Assembled,
        };
        loop {
            let path = format!("/v1/files/{id}?wait={}&timeout=60", wanted.name());
            let status: FileStatus = self.first().json("GET", &path, None::<&()>).await?;
            if status.state == wanted || status.state == State::Assembled {
                return Ok(());
            }
            ensure!(
                matches!(status.state, State::Receiving | State::Complete),
                "the file is {:?}",
                status.state
            );
        }
    }

    /// The root of a complete file, as the cluster tells it.
    pub(crate) async fn root(&mut self, id: Uuid) -> anyhow::Result<Option<String>> {
        let status: FileStatus = self.first().json("GET", &format!("/v1/files/{id}"), None::<&()>).await?;
        Ok(status.root)
    }

    pub(crate) async fn remove(&mut self, id: Uuid) -> anyhow::Result<()> {
        self.first().delete(&format!("/v1/files/{id}")).await
    }

    /// Reads `size` bytes, a part over each lane: of one path, or of the paths of [`put_whole`](Self::put_whole), each
    /// a part.
    pub(crate) async fn download(&mut self, paths: &[String], size: u64) -> anyhow::Result<()> {
        let parts = parts(size, self.0.len() as u64);
        let mut tasks = JoinSet::new();
        let mut idle = self.0.split_off(parts.len());
        for (nth, (mut lane, part)) in self.0.drain(..).zip(parts).enumerate() {
            let len = part.end - part.start;
            let (path, range) = match paths {
                [path] => (path.clone(), part),
                paths => (paths[nth].clone(), 0..len),
            };
            tasks.spawn(async move {
                let got = lane.get(&path, range, |_| {}).await?;
                ensure!(got == len, "{path}: {got} bytes came, expected {len}");
                Ok::<_, anyhow::Error>(lane)
            });
        }
        while let Some(ended) = tasks.join_next().await {
            self.0.push(ended??);
        }
        self.0.append(&mut idle);
        Ok(())
    }

    /// Reads a path over one lane, and hashes what comes.
    pub(crate) async fn hash(&mut self, path: &str, size: u64) -> anyhow::Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let take = |bytes: &[u8]| {
            hasher.update(bytes);
        };
        self.first().get(path, 0..size, take).await?;
        Ok(hasher.finalize())
    }

    /// Puts the first `size` bytes of the content as one file for each lane, and answers with their paths: what a
    /// server does that knows no chunks.
    pub(crate) async fn put_whole(
        &mut self,
        content: &Content,
        size: u64,
        prefix: &str,
    ) -> anyhow::Result<Vec<String>> {
        let parts = parts(size, self.0.len() as u64);
        let mut tasks = JoinSet::new();
        let mut idle = self.0.split_off(parts.len());
        for (nth, (mut lane, part)) in self.0.drain(..).zip(parts).enumerate() {
            let (content, path) = (content.clone(), format!("{prefix}-{nth:03}"));
            tasks.spawn(async move {
                lane.put("PUT", &path, content.body(part)).await?;
                Ok::<_, anyhow::Error>((lane, path))
            });
        }
        let mut paths = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            let (lane, path) = ended??;
            self.0.push(lane);
            paths.push(path);
        }
        self.0.append(&mut idle);
        paths.sort();
        Ok(paths)
    }

    pub(crate) async fn delete(&mut self, path: &str) -> anyhow::Result<()> {
        self.first().delete(path).await
    }

    /// Sends `count` files of `len` bytes, one request each, over all lanes at once, and answers with the latencies.
    pub(crate) async fn small(
        &mut self,
        content: &Content,
        request: Small,
        count: u64,
        len: u64,
    ) -> anyhow::Result<Vec<Duration>> {
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        for mut lane in self.0.drain(..) {
            let (content, next, request) = (content.clone(), next.clone(), request.clone());
            tasks.spawn(async move {
                let mut latencies = Vec::new();
                loop {
                    let nth = next.fetch_add(1, Ordering::Relaxed);
                    if nth >= count {
                        return Ok::<_, anyhow::Error>((lane, latencies));
                    }
                    let body = content.body(nth * len..(nth + 1) * len);
                    let asked = Instant::now();
                    match &request {
                        Small::Put { prefix } => {
                            lane.put("PUT", &format!("{prefix}-{nth}"), body).await?;
                        }
                        Small::Create => create_small(&mut lane, body).await?,
                    }
                    latencies.push(asked.elapsed());
                }
            });
        }
        let mut all = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            let (lane, latencies) = ended??;
            self.0.push(lane);
            all.extend(latencies);
        }
        Ok(all)
    }
}

/// How a small file is sent in one request.
#[derive(Clone, Debug)]
pub(crate) enum Small {
    /// `PUT` of a path that begins with this.
    Put { prefix: String },
    /// To Sluice.
    Create,
}

/// Creates a file with its bytes, which is durable and assembled then.
async fn create_small(lane: &mut Connection, body: ContentBody) -> anyhow::Result<()> {
    let create = CreateFile { id: Some(Uuid::now_v7()), ..CreateFile::default() };
    let status = lane.create(&create, body).await?;
    ensure!(status.state == State::Assembled, "file {} is {:?}", status.id, status.state);
    Ok(())
}

/// The n-th request of an upload: whole runs, then what is left in runs that are still aligned.
pub(crate) fn nth_run(size: u64, nth: u64) -> Option<Range<u64>> {
    let longest = u64::from(MAX_RUN) * CHUNK_LEN;
    let whole = size / longest;
    if nth < whole {
        return Some(nth * longest..(nth + 1) * longest);
    }
    // The rest is shorter than the longest run: one run of each power of two that is in their number.
    let chunks = (size % longest).div_ceil(CHUNK_LEN);
    let mut at = whole * longest;
    let powers = (0..=u64::from(MAX_RUN).ilog2()).rev().map(|power| 1 << power);
    for (i, count) in powers.filter(|count| chunks & count != 0).enumerate() {
        let end = (at + count * CHUNK_LEN).min(size);
        if i as u64 == nth - whole {
            return Some(at..end);
        }
        at = end;
    }
    None
}

/// `[0, size)` in `count` parts of about the same length, none of them empty.
pub(crate) fn parts(size: u64, count: u64) -> Vec<Range<u64>> {
    let share = size.div_ceil(count.max(1)).max(1);
    (0..count)
        .map(|nth| nth * share..((nth + 1) * share).min(size))
        .take_while(|part| part.start < part.end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_aligned_powers_of_two_and_cover_the_file() {
        for size in [
            1,
            CHUNK_LEN,
            8 * CHUNK_LEN,
            8 * CHUNK_LEN + 1,
            8 * CHUNK_LEN - 3,
            15 * CHUNK_LEN - 3,
            29 * CHUNK_LEN + 7,
        ] {
            let mut at = 0;
            let runs: Vec<_> = (0..).map_while(|nth| nth_run(size, nth)).collect();
            for run in &runs {
                let chunks = (run.end - run.start).div_ceil(CHUNK_LEN);
                assert_eq!(run.start, at, "{size}");
                assert!(chunks.is_power_of_two() && chunks <= 8, "{size}: {run:?}");
                assert!((run.start / CHUNK_LEN).is_multiple_of(chunks), "{size}: {run:?}");
                at = run.end;
            }
            assert_eq!(at, size);
        }
        assert_eq!(nth_run(0, 0), None);
    }

    #[test]
    fn parts_cover_and_none_is_empty() {
        assert_eq!(parts(10, 3), [0..4, 4..8, 8..10]);
        assert_eq!(parts(2, 4), [0..1, 1..2]);
        assert_eq!(parts(5, 1), std::slice::from_ref(&(0..5)));
        assert!(parts(0, 3).is_empty());
    }
}
