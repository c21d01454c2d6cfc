//! Who of several aggregators should have which share, by what Redis says of who is there.
//!
//! Each says that it is there as long as the worker answers it, and has a lease of every share that falls to it
//! ([`Share::falls_to`]). A share goes to another process only once that one is there. What a lease is for is guarded by
//! the worker too, which lets one process at a time have a share ([`Tenures`](sluice_remote::Tenures)): so a Redis that is
//! down, or forgets leases, takes no share from anybody. Who finds no Redis takes whatever the worker lets it have.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sluice_engine::share::{Share, Shares};
use sluice_node::shutdown::Shutdown;
use sluice_redis::lease::{Asked, Fence, Lease, Leases, Wanted};
use sluice_redis::members::Members;
use tokio::sync::watch;
use tokio::time::Instant;

/// How long a process that says nothing counts as being there, and its leases last. A new owner is to answer within 5 s.
pub(crate) const LIFE: Duration = Duration::from_secs(3);

/// How often it says that it is there.
const SAY: Duration = Duration::from_millis(500);

/// What falls to this process, and under which fences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Falls(BTreeMap<Share, Option<u64>>);

impl Falls {
    /// The first, and all of them once this process has that: so one has all, and others stand by.
    fn after_the_first(shares: Shares, has: &BTreeSet<Share>) -> Self {
        let has_first = has.iter().any(|share| share.is_first());
        Self(shares.all().filter(|share| has_first || share.is_first()).map(|share| (share, None)).collect())
    }

    /// The fence under which a share falls to this process, if it does.
    pub(crate) fn fence(&self, share: Share) -> Option<Option<u64>> {
        self.0.get(&share).copied()
    }
}

/// Divides shares among processes by what Redis says.
pub(crate) struct Division {
    pub(crate) members: Members,
    pub(crate) leases: Leases,
    pub(crate) shares: Shares,
    /// Whether the worker answers this process.
    pub(crate) is_able: watch::Receiver<bool>,
    /// Shares that this process has with the worker.
    pub(crate) has: watch::Receiver<BTreeSet<Share>>,
    /// Fences that the worker found too low.
    pub(crate) above: Arc<Above>,
}

/// The highest fence that the worker knows of a share, where one that Redis gave was lower: its clock was set back, say.
pub(crate) type Above = Mutex<BTreeMap<Share, Fence>>;

impl Division {
    /// Divides until `tasks` drain; then says that this process is gone, once it has nothing any more.
    pub(crate) async fn run(mut self, falls: watch::Sender<Falls>, tasks: Shutdown) {
        let mut held: BTreeMap<Share, Lease> = BTreeMap::new();
        let mut heard = Instant::now();
        while !tasks.is_draining() {
            match self.divide(&mut held, &falls).await {
                Ok(()) => heard = Instant::now(),
                // Nobody knows who is there: the worker sees to it that a share has one owner.
                Err(_) if heard.elapsed() >= LIFE => {
                    held.clear();
                    say(&falls, Falls(self.shares.all().map(|share| (share, None)).collect()));
                }
                Err(error) => tracing::debug!(%error, "Redis did not say who is there"),
            }
            tokio::select! {
                () = tasks.draining() => {}
                () = tokio::time::sleep(SAY) => {}
                // Others may wait for what it no longer has.
                Ok(()) = self.has.changed() => {}
            }
        }
        // Others may take each share as soon as it is given back.
        let mut told = self.members.leave().await.map(|_| ());
        falls.send_replace(Falls::default());
        loop {
            let has = self.has.borrow_and_update().clone();
            let given: Vec<Lease> =
                held.extract_if(.., |share, _| !has.contains(share)).map(|(_, lease)| lease).collect();
            told = told.and(self.leases.release(&given).await);
            // The sender lives as long as the process.
            if has.is_empty() || self.has.changed().await.is_err() {
                break;
            }
        }
        if let Err(error) = told {
            tracing::debug!(%error, "Redis does not know yet that this process is gone");
        }
    }

    async fn divide(
        &mut self,
        held: &mut BTreeMap<Share, Lease>,
        falls: &watch::Sender<Falls>,
    ) -> Result<(), sluice_redis::RedisError> {
        let is_able = *self.is_able.borrow_and_update();
        let there = if is_able { self.members.announce().await? } else { self.members.leave().await? };
        let me = self.members.me();
        let has = self.has.borrow_and_update().clone();
        let falls_here =
            |share: &Share| share.falls_to(me, has.contains(share), there.iter().map(String::as_str));
        let mine: BTreeSet<Share> = self.shares.all().filter(falls_here).collect();
        // A lease is given up once its share is, so that it never has two owners by anybody's account.
        let over = |share: &Share| !mine.contains(share) && !has.contains(share);
        let given: Vec<Lease> = held.extract_if(.., |share, _| over(share)).map(|(_, lease)| lease).collect();
        if !given.is_empty() {
            self.leases.release(&given).await?;
        }
        let wanted: Vec<Share> = mine.union(&has).copied().collect();
        let named: Vec<Wanted> = {
            let above = self.above.lock().unwrap_or_else(PoisonError::into_inner);
            let above = |share: &Share| above.get(share).copied().unwrap_or_default();
            wanted.iter().map(|share| Wanted { name: name(*share), above: above(share) }).collect()
        };
        let asked = self.leases.take(&named).await?;
        let mut fall = Falls::default();
        for (share, asked) in wanted.into_iter().zip(asked) {
            match asked {
                Asked::Held(lease) => {
                    if mine.contains(&share) {
                        fall.0.insert(share, Some(lease.fence.number()));
                    }
                    held.insert(share, lease);
                }
                Asked::Taken { by, .. } => {
                    held.remove(&share);
                    // Redis forgot the lease while it was held. Whoever has the share keeps it.
                    if mine.contains(&share) && has.contains(&share) {
                        fall.0.insert(share, None);
                    }
                    tracing::debug!(%share, by, "another has the lease");
                }
            }
        }
        say(falls, fall);
        Ok(())
    }
}

/// Gives all shares to whichever process has the first, where there is no Redis, until `tasks` drain.
pub(crate) async fn undivided(
    shares: Shares,
    mut has: watch::Receiver<BTreeSet<Share>>,
    falls: watch::Sender<Falls>,
    tasks: Shutdown,
) {
    loop {
        say(&falls, Falls::after_the_first(shares, &has.borrow_and_update()));
        tokio::select! {
            () = tasks.draining() => break,
            Ok(()) = has.changed() => {}
        }
    }
    falls.send_replace(Falls::default());
}

fn say(falls: &watch::Sender<Falls>, fall: Falls) {
    falls.send_if_modified(|known| {
        let changed = *known != fall;
        *known = fall;
        changed
    });
}

fn name(share: Share) -> String {
    format!("share-{}-{}", share.index(), share.of().count())
}
