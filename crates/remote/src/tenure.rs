//! Whose a store is: one aggregator's at a time.
//!
//! A worker that owns a volume lets one aggregator at a time change it. That one's *tenure* is a number that nobody can
//! guess, and goes with every call in both directions: the store refuses what comes under another, and an aggregator
//! refuses a worker whose store is another's. So an aggregator that was given up, hangs, or is cut off changes nothing
//! and registers nothing any more, whatever it believes of itself.
//!
//! A tenure stands as long as its holder renews it. A renewal is a call that lasts; when its connection breaks, the
//! process at its other end has gone, and the next one need not wait. Before a new tenure begins, what was begun under
//! the one before has ended, so that nobody reads what is about to change.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sluice_node::clock::random_bytes;
use tokio::sync::{Mutex as AsyncMutex, OwnedRwLockReadGuard, RwLock, watch};
use tokio::time::Instant;

/// How long a tenure stands without a renewal under way: longer than a hiccup, and short enough that the next aggregator
/// answers within 5 s of when the last one hung.
pub(crate) const LEASE: Duration = Duration::from_secs(3);

/// How long what was begun under one tenure may hold the next one up, before it is tried again.
const ENDING: Duration = Duration::from_secs(30);

/// One aggregator's time with a store.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tenure([u8; 16]);

impl Tenure {
    fn new() -> Self {
        Self(random_bytes())
    }
}

impl fmt::Display for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Enough to tell it from others.
        write!(f, "Tenure({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}

impl FromStr for Tenure {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes()))
    }
}

/// Why a tenure does not begin, or does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotHeld {
    #[error("another aggregator has the store")]
    Another,
    #[error("what was begun under the last tenure has not ended")]
    Busy,
}

/// The tenures of one store. A clone means the same.
#[derive(Clone)]
pub struct Tenures(Arc<Inner>);

struct Inner {
    holder: Mutex<Option<Holder>>,
    /// Held by what is under way, and for a moment by whoever begins.
    work: Arc<RwLock<()>>,
    beginning: AsyncMutex<()>,
    current: watch::Sender<Option<Tenure>>,
}

struct Holder {
    tenure: Tenure,
    renewed: Instant,
    /// Renewals under way.
    watching: usize,
}

impl Default for Tenures {
    fn default() -> Self {
        Self(Arc::new(Inner {
            holder: Mutex::new(None),
            work: Arc::default(),
            beginning: AsyncMutex::new(()),
            current: watch::Sender::new(None),
        }))
    }
}

impl fmt::Debug for Tenures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tenures({:?})", *self.0.current.borrow())
    }
}

impl Tenures {
    /// Nobody's yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whose the store is, as it changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Tenure>> {
        self.0.current.subscribe()
    }

    /// Begins a tenure, unless another stands.
    pub(crate) async fn begin(&self) -> Result<Tenure, NotHeld> {
        let _alone = self.0.beginning.lock().await;
        self.change(|holder| match holder {
            Some(held) if held.watching > 0 || held.renewed.elapsed() < LEASE => Err(NotHeld::Another),
            Some(_) | None => {
                *holder = None;
                Ok(())
            }
        })?;
        let ended = tokio::time::timeout(ENDING, self.0.work.write()).await;
        let _ended = ended.map_err(|_| NotHeld::Busy)?;
        let tenure = Tenure::new();
        self.change(|holder| *holder = Some(Holder { tenure, renewed: Instant::now(), watching: 0 }));
        Ok(tenure)
    }

    /// Begins something under a tenure, which lasts until the guard is dropped.
    pub(crate) async fn enter(&self, tenure: Tenure) -> Result<OwnedRwLockReadGuard<()>, NotHeld> {
        let guard = self.0.work.clone().read_owned().await;
        if *self.0.current.borrow() == Some(tenure) { Ok(guard) } else { Err(NotHeld::Another) }
    }

    /// Keeps a tenure for as long as the answer lives, and for a [`LEASE`] after it was [settled](Renewal::settle). One
    /// that is dropped before ends it.
    pub(crate) fn renew(&self, tenure: Tenure) -> Result<Renewal, NotHeld> {
        self.change(|holder| match holder {
            Some(held) if held.tenure == tenure => {
                held.watching += 1;
                Ok(Renewal { tenures: self.clone(), tenure, settled: false })
            }
            Some(_) | None => Err(NotHeld::Another),
        })
    }

    /// Ends a tenure.
    pub(crate) fn end(&self, tenure: Tenure) {
        self.change(|holder| {
            holder.take_if(|held| held.tenure == tenure);
        });
    }

    fn change<T>(&self, change: impl FnOnce(&mut Option<Holder>) -> T) -> T {
        let mut holder = self.0.holder.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut holder);
        let now = holder.as_ref().map(|held| held.tenure);
        self.0.current.send_if_modified(|current| std::mem::replace(current, now) != now);
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
        self.tenures.change(|holder| {
            let Some(held) = holder.as_mut().filter(|held| held.tenure == tenure) else { return };
            held.watching -= 1;
            if settled {
                held.renewed = Instant::now();
            } else if held.watching == 0 {
                tracing::warn!("the aggregator that had the store is gone");
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
        let tenures = Tenures::new();
        let first = tenures.begin().await.unwrap();
        assert_eq!(first.to_string().parse(), Ok(first));
        assert_eq!(tenures.begin().await, Err(NotHeld::Another));
        tokio::time::advance(LEASE / 2).await;
        tenures.renew(first).unwrap().settle();
        tokio::time::advance(LEASE / 2).await;
        assert_eq!(tenures.begin().await, Err(NotHeld::Another));
        let renewal = tenures.renew(first).unwrap();
        tokio::time::advance(LEASE * 2).await;
        assert_eq!(tenures.begin().await, Err(NotHeld::Another), "it is being kept");
        renewal.settle();
        tokio::time::advance(LEASE).await;
        let second = tenures.begin().await.unwrap();
        assert_ne!(first, second);
        assert!(tenures.renew(first).is_err() && tenures.enter(first).await.is_err());
        // Who has gone is not waited for.
        drop(tenures.renew(second).unwrap());
        let third = tenures.begin().await.unwrap();
        tenures.end(second);
        assert!(tenures.enter(third).await.is_ok());
        tenures.end(third);
        assert_eq!(*tenures.watch().borrow(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_begun_ends_before_the_next_begins() {
        let tenures = Tenures::new();
        let first = tenures.begin().await.unwrap();
        let work = tenures.enter(first).await.unwrap();
        tenures.end(first);
        assert_eq!(tenures.begin().await, Err(NotHeld::Busy));
        let next = tokio::spawn({
            let tenures = tenures.clone();
            async move { tenures.begin().await }
        });
        tokio::task::yield_now().await;
        assert_eq!(*tenures.watch().borrow(), None);
        drop(work);
        let next = next.await.unwrap().unwrap();
        assert_eq!(*tenures.watch().borrow(), Some(next));
    }
}
