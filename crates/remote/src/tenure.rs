//! Whose a store is: for each share of the slots, one aggregator's at a time.
//!
//! A worker that owns a volume lets one aggregator at a time change the files of a share. That one's *tenure* is a number
//! that nobody can guess, and goes with every call in both directions: the store refuses what comes under another, and an
//! aggregator refuses a worker whose store is another's. So an aggregator that was given up, hangs, or is cut off changes
//! nothing and registers nothing any more, whatever it believes of itself.
//!
//! A tenure stands as long as its holder renews it. A renewal is a call that lasts; when its connection breaks, the
//! process at its other end has gone, and the next one need not wait. Before a new tenure begins, what was begun under
//! the one before has ended, so that nobody reads what is about to change.
//!
//! Where aggregators agree through Redis on who has which share, a tenure also has a fence, and none begins under a lower one
//! than there was: who was told before Redis forgot something gives way to whoever was told after.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sluice_engine::share::{Share, Shares};
use sluice_node::clock::random_bytes;
use tokio::sync::{Mutex as AsyncMutex, OwnedRwLockReadGuard, RwLock, watch};
use tokio::time::Instant;

/// How long a tenure stands without a renewal under way: longer than a hiccup, and short enough that the next aggregator
/// answers within 5 s of when the last one hung.
pub(crate) const LEASE: Duration = Duration::from_secs(3);

/// How long what was begun under one tenure may hold the next one up, before it is tried again.
const ENDING: Duration = Duration::from_secs(30);

/// One aggregator's time with a share of a store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tenure {
    share: Share,
    secret: [u8; 16],
}

impl Tenure {
    fn new(share: Share) -> Self {
        Self { share, secret: random_bytes() }
    }

    /// Of which share.
    pub fn share(self) -> Share {
        self.share
    }
}

/// What can be part of a host's name: `3-16-` and 32 hexadecimal digits.
impl fmt::Display for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (index, count) = (self.share.index(), self.share.of().count());
        write!(f, "{index}-{count}-{:032x}", u128::from_be_bytes(self.secret))
    }
}

impl fmt::Debug for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Enough to tell it from others.
        write!(f, "Tenure({} {:02x}{:02x}…)", self.share, self.secret[0], self.secret[1])
    }
}

/// Text that is no tenure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no tenure")]
pub struct BadTenure;

impl FromStr for Tenure {
    type Err = BadTenure;

    fn from_str(text: &str) -> Result<Self, BadTenure> {
        let mut parts = text.splitn(3, '-');
        let mut part = || parts.next().ok_or(BadTenure);
        let (index, count, secret) = (part()?, part()?, part()?);
        let number = |text: &str| text.parse().map_err(|_| BadTenure);
        let share = Share::new(number(index)?, number(count)?).map_err(|_| BadTenure)?;
        let secret = u128::from_str_radix(secret, 16).map_err(|_| BadTenure)?;
        Ok(Self { share, secret: secret.to_be_bytes() })
    }
}

/// Why a tenure does not begin, or does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotHeld {
    #[error("another aggregator has it")]
    Another,
    #[error("what was begun under the last tenure has not ended")]
    Busy,
    #[error("slots are divided otherwise here")]
    NoShare,
    #[error("the fence is below {0}")]
    Fence(u64),
}

/// The tenures of one store. A clone means the same.
#[derive(Clone)]
pub struct Tenures(Arc<BTreeMap<Share, Turns>>);

/// The tenures of one share, one after the other.
#[derive(Default)]
struct Turns {
    state: Mutex<State>,
    /// Held by what is under way, and for a moment by whoever begins.
    work: Arc<RwLock<()>>,
    beginning: AsyncMutex<()>,
    current: watch::Sender<Option<Tenure>>,
}

#[derive(Default)]
struct State {
    holder: Option<Holder>,
    /// The highest fence under which a tenure began.
    fence: u64,
}

struct Holder {
    tenure: Tenure,
    renewed: Instant,
    /// Renewals under way.
    watching: usize,
}

impl fmt::Debug for Tenures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.0.values().filter_map(|turns| *turns.current.borrow());
        f.debug_list().entries(held).finish()
    }
}

impl Tenures {
    /// Nobody's yet, in so many shares.
    pub fn new(shares: Shares) -> Self {
        Self(Arc::new(shares.all().map(|share| (share, Turns::default())).collect()))
    }

    fn turns(&self, share: Share) -> Result<&Turns, NotHeld> {
        self.0.get(&share).ok_or(NotHeld::NoShare)
    }

    /// The shares.
    pub fn shares(&self) -> impl Iterator<Item = Share> {
        self.0.keys().copied()
    }

    /// Whose a share is, as it changes.
    pub(crate) fn watch(&self, share: Share) -> watch::Receiver<Option<Tenure>> {
        let none = || watch::channel(None).1;
        self.0.get(&share).map_or_else(none, |turns| turns.current.subscribe())
    }

    /// Begins a tenure, unless another stands, or one began under a higher fence.
    pub(crate) async fn begin(&self, share: Share, fence: Option<u64>) -> Result<Tenure, NotHeld> {
        let turns = self.turns(share)?;
        let _alone = turns.beginning.lock().await;
        turns.change(|State { holder, fence: highest }| match holder {
            Some(held) if held.watching > 0 || held.renewed.elapsed() < LEASE => Err(NotHeld::Another),
            _ if fence.is_some_and(|fence| fence < *highest) => Err(NotHeld::Fence(*highest)),
            Some(_) | None => {
                *holder = None;
                Ok(())
            }
        })?;
        let ended = tokio::time::timeout(ENDING, turns.work.write()).await;
        let _ended = ended.map_err(|_| NotHeld::Busy)?;
        let tenure = Tenure::new(share);
        turns.change(|state| {
            state.fence = state.fence.max(fence.unwrap_or(0));
            state.holder = Some(Holder { tenure, renewed: Instant::now(), watching: 0 });
        });
        Ok(tenure)
    }

    /// Begins something under a tenure, which lasts until the guard is dropped.
    pub(crate) async fn enter(&self, tenure: Tenure) -> Result<OwnedRwLockReadGuard<()>, NotHeld> {
        let turns = self.turns(tenure.share)?;
        let guard = turns.work.clone().read_owned().await;
        if *turns.current.borrow() == Some(tenure) { Ok(guard) } else { Err(NotHeld::Another) }
    }

    /// Keeps a tenure for as long as the answer lives, and for a [`LEASE`] after it was [settled](Renewal::settle). One
    /// that is dropped before ends it.
    pub(crate) fn renew(&self, tenure: Tenure) -> Result<Renewal, NotHeld> {
        self.turns(tenure.share)?.change(|state| match &mut state.holder {
            Some(held) if held.tenure == tenure => {
                held.watching += 1;
                Ok(Renewal { tenures: self.clone(), tenure, settled: false })
            }
            Some(_) | None => Err(NotHeld::Another),
        })
    }

    /// Ends a tenure.
    pub(crate) fn end(&self, tenure: Tenure) {
        if let Ok(turns) = self.turns(tenure.share) {
            turns.change(|state| {
                state.holder.take_if(|held| held.tenure == tenure);
            });
        }
    }
}

impl Turns {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut state);
        let now = state.holder.as_ref().map(|held| held.tenure);
        self.current.send_if_modified(|current| std::mem::replace(current, now) != now);
        changed
    }
}

/// A tenure that is being kept.
pub(crate) struct Renewal {
    tenures: Tenures,
    tenure: Tenure,
    settled: bool,
}

impl Renewal {
    /// It was kept; the next renewal follows.
    pub(crate) fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        let (tenure, settled) = (self.tenure, self.settled);
        let Ok(turns) = self.tenures.turns(tenure.share) else { return };
        turns.change(|State { holder, .. }| {
            let Some(held) = holder.as_mut().filter(|held| held.tenure == tenure) else { return };
            held.watching -= 1;
            if settled {
                held.renewed = Instant::now();
            } else if held.watching == 0 {
                tracing::warn!(share = %tenure.share, "the aggregator that had it is gone");
                *holder = None;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_stands_at_a_time_and_ends_when_nobody_renews_it() {
        let tenures = Tenures::new(Shares::ONE);
        let first = tenures.begin(Share::WHOLE, None).await.unwrap();
        assert_eq!(first.to_string().parse(), Ok(first));
        assert_eq!(tenures.begin(Share::WHOLE, None).await, Err(NotHeld::Another));
        tokio::time::advance(LEASE / 2).await;
        tenures.renew(first).unwrap().settle();
        tokio::time::advance(LEASE / 2).await;
        assert_eq!(tenures.begin(Share::WHOLE, None).await, Err(NotHeld::Another));
        let renewal = tenures.renew(first).unwrap();
        tokio::time::advance(LEASE * 2).await;
        assert_eq!(tenures.begin(Share::WHOLE, None).await, Err(NotHeld::Another), "it is being kept");
        renewal.settle();
        tokio::time::advance(LEASE).await;
        let second = tenures.begin(Share::WHOLE, None).await.unwrap();
        assert_ne!(first, second);
        assert!(tenures.renew(first).is_err() && tenures.enter(first).await.is_err());
        // Who has gone is not waited for.
        drop(tenures.renew(second).unwrap());
        let third = tenures.begin(Share::WHOLE, None).await.unwrap();
        tenures.end(second);
        assert!(tenures.enter(third).await.is_ok());
        tenures.end(third);
        assert_eq!(*tenures.watch(Share::WHOLE).borrow(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_begun_ends_before_the_next_begins() {
        let tenures = Tenures::new(Shares::ONE);
        let first = tenures.begin(Share::WHOLE, None).await.unwrap();
        let work = tenures.enter(first).await.unwrap();
        tenures.end(first);
        assert_eq!(tenures.begin(Share::WHOLE, None).await, Err(NotHeld::Busy));
        let next = tokio::spawn({
            let tenures = tenures.clone();
            async move { tenures.begin(Share::WHOLE, None).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(*tenures.watch(Share::WHOLE).borrow(), None);
        drop(work);
        let next = next.await.unwrap().unwrap();
        assert_eq!(*tenures.watch(Share::WHOLE).borrow(), Some(next));
    }

    #[tokio::test(start_paused = true)]
    async fn shares_are_had_apart_and_fences_never_fall() {
        let tenures = Tenures::new(Shares::new(4).unwrap());
        let share = |index| Share::new(index, 4).unwrap();
        let first = tenures.begin(share(0), Some(7)).await.unwrap();
        let other = tenures.begin(share(1), Some(3)).await.unwrap();
        assert!(tenures.enter(first).await.is_ok() && tenures.enter(other).await.is_ok());
        assert_eq!(other.to_string().parse(), Ok(other));
        assert_eq!(tenures.begin(Share::WHOLE, None).await, Err(NotHeld::NoShare));
        for tenure in [first, other] {
            tenures.end(tenure);
        }
        assert_eq!(tenures.begin(share(0), Some(6)).await, Err(NotHeld::Fence(7)));
        assert!(tenures.begin(share(1), Some(6)).await.is_ok());
        // Who was told nothing, since Redis is down, is no worse than whoever was told last.
        assert!(tenures.begin(share(0), None).await.is_ok());
        for text in ["", "0-4", "4-4-00", "0-3-00", "0-4-x", "0-4-"] {
            assert_eq!(text.parse::<Tenure>(), Err(BadTenure), "{text}");
        }
    }
}
