//! The states of shares, each a chain of objects of its own: what an aggregator writes waits for no other.
//!
//! Body in a [sealed](crate::sealed) envelope `SLK`:
//!
//! | bytes | field |
//! | --- | --- |
//! | 8 | version: the highest of the links counts |
//! | 2 | [share](crate::share) |
//! | 4 + n | state |
//!
//! The state of [`Share::WHOLE`] is in the [node](super::node), which also says of which other shares there are states.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures_util::{StreamExt, TryStreamExt, stream};
use sluice_engine::share::Share;
use tokio::sync::Semaphore;

use super::bucket::Bucket;
use super::chain::Chain;
use super::node::Node;
use super::shared::Shared;
use super::{READERS, keys, lock};
use crate::StoreError;
use crate::sealed::{self, FormatError, Reader, push_block};
use crate::share;

const MAGIC: [u8; 4] = *b"SLK\x01";

/// The bytes of version `version`.
fn encode(version: u64, share: Share, state: &[u8]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    share::push(&mut body, share);
    push_block(&mut body, state);
    sealed::seal(MAGIC, &body)
}

/// Reads a link: its version, and what it says.
fn decode(share: Share, bytes: &[u8]) -> Result<(u64, Vec<u8>), FormatError> {
    let mut body = Reader(sealed::unseal(MAGIC, bytes)?);
    let version = body.u64()?;
    if share::read(&mut body)? != share {
        return Err(FormatError::Misplaced("share"));
    }
    let state = share::read_state(&mut body)?;
    body.end()?;
    Ok((version, state))
}

/// The state of one share.
#[derive(Debug)]
pub(crate) struct State {
    /// One permit: whoever replaces the state has it until that is durable.
    turn: Semaphore,
    /// The state, as it is durable, and where it is written next.
    now: Mutex<(Vec<u8>, Chain)>,
}

impl Default for State {
    fn default() -> Self {
        Self { turn: Semaphore::new(1), now: Mutex::default() }
    }
}

/// The states of all shares but the whole.
pub(crate) type States = BTreeMap<Share, Arc<State>>;

/// Reads those of all shares that have one.
pub(crate) async fn read(bucket: &Bucket, node: &Node) -> Result<States, StoreError> {
    let read = async |share: Share| {
        let decode = |bytes: &[u8]| decode(share, bytes);
        let (chain, state) = Chain::read(bucket, |link| keys::state(share, link), decode).await?;
        let now = Mutex::new((state.unwrap_or_default(), chain));
        Ok((share, Arc::new(State { now, ..State::default() })))
    };
    let shares: Vec<Share> = node.shares.iter().copied().collect();
    stream::iter(shares).map(read).buffer_unordered(READERS).try_collect().await
}

impl Shared {
    /// The states of all shares that have one.
    pub(crate) fn all_states(&self) -> share::States {
        let mut all = share::States::new();
        share::put_state(&mut all, Share::WHOLE, self.node(|node| node.state.clone()));
        for (share, state) in &*lock(&self.states) {
            share::put_state(&mut all, *share, lock(&state.now).0.clone());
        }
        all
    }

    /// Replaces the state of a share, durably.
    pub(crate) async fn replace_state(
        self: &Arc<Self>,
        share: Share,
        bytes: Vec<u8>,
    ) -> Result<(), StoreError> {
        if share == Share::WHOLE {
            let replace = move |node: &mut Node| {
                node.state = bytes;
                true
            };
            return self.change_node(replace).await;
        }
        self.change_node(move |node| node.shares.insert(share)).await?;
        let shared = self.clone();
        self.to_its_end(async move {
            let state = lock(&shared.states).entry(share).or_default().clone();
            let Ok(_turn) = state.turn.acquire().await else { return Err(StoreError::Closing) };
            let mut chain = lock(&state.now).1;
            let record = encode(chain.next_version(), share, &bytes);
            let written = chain.write(&shared.bucket, |link| keys::state(share, link), record).await;
            let mut now = lock(&state.now);
            now.1 = chain;
            written?;
            now.0 = bytes;
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAX_STATE_LEN;

    #[test]
    fn golden_bytes() {
        let share = Share::new(3, 16).unwrap();
        let bytes = encode(7, share, b"state");
        assert_eq!(bytes[..27], *b"SLK\x01\0\0\0\x13\0\0\0\0\0\0\0\x07\x04\x03\0\0\0\x05state");
        assert_eq!(decode(share, &bytes), Ok((7, b"state".to_vec())));
        assert_eq!(decode(Share::WHOLE, &bytes), Err(FormatError::Misplaced("share")));
        let long = encode(7, share, &vec![0; MAX_STATE_LEN + 1]);
        assert_eq!(decode(share, &long), Err(FormatError::Impossible("length of a state")));
        assert!(decode(share, &encode(7, share, &vec![0; MAX_STATE_LEN])).is_ok());
    }
}
