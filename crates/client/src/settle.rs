//! After the last acknowledgement: until the cluster itself says that it has everything.
//!
//! A datacenter that dies for good right after it acknowledged takes chunks with it. The status then shows them
//! missing; when two rounds in a row do, and nobody that answers holds them, they are sent again.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::Root;
use sluice_engine::limits::UNIT_LEVEL;
use sluice_engine::span::Place;
use sluice_proto::http::{FileStatus, Holder, State};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::Client;
use crate::chunk_set::ChunkSet;
use crate::door::Door;
use crate::doors::First;
use crate::error::ClientError;
use crate::event::Event;
use crate::upload::Upload;

/// How long the server is asked to wait, at first and at most.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// How long chunks must be missing while no home answers: one that restarts has them still.
const HOME_GRACE: Duration = Duration::from_secs(10);

/// A home that assembles slower than this, in bytes a second, is given up on.
const SLOWEST_ASSEMBLY: u64 = 16 << 20;

impl Upload {
    /// Waits until the file has reached `wanted` with this root, and sends again what was lost on the way.
    pub(crate) async fn settle(
        self: &Arc<Self>,
        wanted: State,
        root: Root,
    ) -> Result<FileStatus, ClientError> {
        let doors = self.client.doors();
        let patience = doors.policy().retry_for.max(Duration::from_secs(self.file.size() / SLOWEST_ASSEMBLY));
        let mut seen = None;
        let mut changed_at = Instant::now();
        let mut suspects = ChunkSet::new();
        let mut suspected_at = Instant::now();
        let mut pause = FIRST_WAIT;
        loop {
            let (id, longest) = (self.id, pause.min(LONGEST_WAIT));
            let wait = move |door: Arc<Door>| async move { door.status(id, Some((wanted, longest))).await };
            let ask = |door: Arc<Door>| self.creation.with(door, wait);
            let asked_at = Instant::now();
            let (_, status) = doors.anywhere(First::Idlest, &self.observer, ask).await?;
            check_alive(&status)?;
            check_root(&status, root)?;
            if status.state >= wanted {
                return Ok(status);
            }
            self.observer.observe(&Event::Waiting { state: status.state });
            if status.missing_chunks > 0 && self.can_resend() {
                let answers = self.client.statuses(id, Some(&self.creation), &self.observer).await?.known;
                let lost = lost(&answers);
                let still = lost.common(&suspects);
                let grace = match answers.iter().any(|(_, answer)| answer.home_answered) {
                    true => Duration::ZERO,
                    false => HOME_GRACE,
                };
                if still.is_empty() {
                    (suspects, suspected_at) = (lost, Instant::now());
                } else if suspected_at.elapsed() >= grace {
                    self.resend(&still).await?;
                    suspects = ChunkSet::new();
                    changed_at = Instant::now();
                    pause = FIRST_WAIT;
                    continue;
                }
            }
            let now = (status.state, status.missing_chunks);
            if seen != Some(now) {
                (seen, changed_at) = (Some(now), Instant::now());
            } else if changed_at.elapsed() > patience {
                return Err(ClientError::Unsettled {
                    id,
                    state: status.state,
                    expected: wanted,
                    missing_chunks: status.missing_chunks,
                    after: changed_at.elapsed(),
                });
            }
            // A server that does not wait as it was asked to is not asked in a tight loop.
            if asked_at.elapsed() < longest / 2 {
                sleep(doors.pause(1)).await;
            }
            pause *= 2;
        }
    }
}

/// Ends in an error if the file can get no further.
pub(crate) fn check_alive(status: &FileStatus) -> Result<(), ClientError> {
    match status.state {
        State::Receiving | State::Complete | State::Assembled => Ok(()),
        State::Conflict => Err(ClientError::Conflict {
            id: status.id,
            dc: status.dc.clone(),
            detail: status.conflict.clone().unwrap_or_else(|| "it does not say why".into()),
        }),
        State::Dropped => Err(ClientError::Dropped { id: status.id, dc: status.dc.clone() }),
    }
}

fn check_root(status: &FileStatus, ours: Root) -> Result<(), ClientError> {
    let Some(theirs) = &status.root else { return Ok(()) };
    let theirs: Root = theirs.parse()?;
    if theirs == ours {
        Ok(())
    } else {
        Err(ClientError::RootMismatch { id: status.id, dc: status.dc.clone(), ours, theirs })
    }
}

/// What need not be sent: all that any answer says somebody holds.
pub(crate) fn held(answers: &[(usize, FileStatus)]) -> ChunkSet {
    let mut held = ChunkSet::new();
    for (_, status) in answers {
        for holder in &status.holders {
            held.insert_all(&ChunkSet::of_pairs(&holder.ranges));
        }
        let missing = ChunkSet::of_pairs(&status.missing);
        // A list that was cut short says nothing of what comes after it.
        let known_to = if missing.len() == status.missing_chunks {
            status.chunks
        } else {
            missing.ranges().last().map_or(0, |range| range.end)
        };
        held.insert_all(&missing.complement(known_to));
    }
    // What is damaged where it is said to be, and sound nowhere, is mended by whoever sends it again.
    for (_, status) in answers {
        let damaged = ChunkSet::of_pairs(&status.damaged).common(&ChunkSet::of_pairs(&status.missing));
        held = held.without(&damaged);
    }
    // While the size is open there is no telling what lies past the end.
    let chunks = answers.iter().filter(|(_, status)| status.size.is_some()).map(|(_, status)| status.chunks);
    match chunks.min() {
        Some(chunks) => held.common(&ChunkSet::new().complement(chunks)),
        None => held,
    }
}

/// Adds to `held` what lies beyond answers whose lists of ranges were cut short, by asking for the chunk values
/// there: a value that is known is that of a chunk that is held.
pub(crate) async fn survey(
    client: &Client,
    id: Uuid,
    file: Geometry,
    answers: &[(usize, FileStatus)],
    held: &mut ChunkSet,
) {
    let mut questions = Vec::new();
    for (url, status) in answers {
        let Some(from) = status.holders.iter().filter_map(cut_short_at).min() else { continue };
        let places = Place::tile(from..file.chunks(), UNIT_LEVEL, file);
        questions.extend(places.into_iter().map(|place| (*url, place)));
    }
    let asked = stream::iter(questions).map(|(url, place)| async move {
        let ticket = client.doors().enter(url);
        (place, ticket.door().tree(id, place.start(), place.level()).await)
    });
    let mut asked = std::pin::pin!(asked.buffer_unordered(client.jobs()));
    while let Some((place, node)) = asked.next().await {
        // Without an answer the chunks are sent, and at worst sent again.
        let Ok(node) = node else { continue };
        for (chunk, value) in place.range(file).zip(&node.chunk_values) {
            if value.is_some() {
                held.insert(chunk..chunk + 1);
            }
        }
    }
}

/// Where a holder's list of ranges was cut short; `None` if it says all.
fn cut_short_at(holder: &Holder) -> Option<u64> {
    let said = ChunkSet::of_pairs(&holder.ranges);
    (said.len() < holder.chunks).then(|| said.ranges().last().map_or(0, |range| range.end))
}

/// What every answer calls missing, and no datacenter that answered holds itself.
fn lost(answers: &[(usize, FileStatus)]) -> ChunkSet {
    let mut lost: Option<ChunkSet> = None;
    let mut held = ChunkSet::new();
    for (_, status) in answers {
        let missing = ChunkSet::of_pairs(&status.missing);
        lost = Some(lost.map_or_else(|| missing.clone(), |lost| lost.common(&missing)));
        for holder in status.holders.iter().filter(|holder| holder.dc == status.dc) {
            held.insert_all(&ChunkSet::of_pairs(&holder.ranges));
        }
    }
    lost.unwrap_or_default().without(&held)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(
        dc: &str,
        missing: &[[u64; 2]],
        missing_chunks: u64,
        holders: &[(&str, [u64; 2])],
    ) -> FileStatus {
        FileStatus {
            id: uuid::Uuid::nil(),
            size: Some(100 << 20),
            chunks: 100,
            name: String::new(),
            content_type: String::new(),
            metadata: Default::default(),
            expires_in: None,
            expected_root: None,
            state: State::Receiving,
            conflict: None,
            home: "dc-a".into(),
            home_epoch: 0,
            root: None,
            dc: dc.into(),
            home_answered: true,
            missing_chunks,
            missing: missing.to_vec(),
            damaged: Vec::new(),
            holders: holders
                .iter()
                .map(|(dc, range)| Holder {
                    dc: (*dc).into(),
                    chunks: range[1] - range[0],
                    ranges: vec![*range],
                })
                .collect(),
        }
    }

    #[test]
    fn what_any_answer_has_is_held() {
        let a = status("dc-a", &[[40, 100]], 60, &[("dc-a", [0, 40])]);
        let b = status("dc-b", &[[0, 50]], 50, &[("dc-b", [50, 100])]);
        let held = held(&[(0, a), (1, b)]);
        assert_eq!(held.ranges().collect::<Vec<_>>(), [0..40, 50..100]);
    }

    #[test]
    fn a_list_cut_short_claims_nothing_after_it() {
        let a = status("dc-a", &[[10, 20]], 60, &[]);
        assert_eq!(held(&[(0, a)]).ranges().collect::<Vec<_>>(), [0..10, 20..20].map(|r| r)[..1].to_vec());
    }

    #[test]
    fn lost_is_what_all_miss_and_nobody_here_has() {
        // dc-b holds 50..60 and has not told its home yet; dc-c does not answer.
        let a = status("dc-a", &[[40, 60], [80, 90]], 30, &[("dc-a", [0, 40]), ("dc-c", [60, 80])]);
        let b = status("dc-b", &[[0, 50], [60, 100]], 90, &[("dc-b", [50, 60])]);
        let lost = lost(&[(0, a), (1, b)]);
        assert_eq!(lost.ranges().collect::<Vec<_>>(), [40..50, 80..90]);
        assert!(super::lost(&[]).is_empty());
    }
}
