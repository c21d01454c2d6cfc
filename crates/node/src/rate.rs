//! A cap on bytes a second: what comes waits its turn, and what would wait too long is refused.
//!
//! Owned by the datacenter's workers. Whoever takes bytes is given the moment from which on they may flow; that moment
//! moves on by as long as they last at the capped rate, so that the long run is exact whatever the sizes. Nothing has to
//! be stopped: waiting ends with the request, which gives its turn back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sluice_engine::placement::{FULL, Load};
use sluice_proto::problem::{Problem, Refusal};
use tokio::time::Instant;

/// The longest that bytes wait for their turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was not used lately can be caught up with: waking late must not cost anything.
const SLACK: Duration = Duration::from_millis(100);

/// So much work that waits is a full load: more of it had better go elsewhere.
const BACKLOG: Duration = Duration::from_secs(1);

/// Bytes of uploads a second, capped or not, as it may change. Clones share the cap.
#[derive(Clone, Debug)]
pub struct UploadRate(Arc<Capped>);

#[derive(Debug)]
struct Capped {
    /// Bytes a second; 0: as many as come.
    rate: AtomicU64,
    began: Instant,
    /// When all that was let in will have flowed, since `began`.
    free_at: Mutex<Duration>,
}

impl Capped {
    fn lock(&self) -> MutexGuard<'_, Duration> {
        // One number, whole at any time.
        self.free_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rate(&self) -> Option<u64> {
        Some(self.rate.load(Ordering::Relaxed)).filter(|rate| *rate > 0)
    }

    fn backlog(&self) -> Duration {
        self.lock().saturating_sub(self.began.elapsed())
    }
}

/// A turn that is waited for; dropped before it came, it is given back.
struct Waiting<'a> {
    capped: &'a Capped,
    lasts: Duration,
    has_come: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.has_come {
            let mut free_at = self.capped.lock();
            *free_at = free_at.saturating_sub(self.lasts);
        }
    }
}

impl UploadRate {
    /// At most so many bytes a second; `None` or 0: as many as come.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        let rate = AtomicU64::new(bytes_per_second.unwrap_or(0));
        Self(Arc::new(Capped { rate, began: Instant::now(), free_at: Mutex::new(Duration::ZERO) }))
    }

    /// The same from now on. What waits already comes when it was to come.
    pub fn set(&self, bytes_per_second: Option<u64>) {
        self.0.rate.store(bytes_per_second.unwrap_or(0), Ordering::Relaxed);
    }

    /// Waits until `len` bytes may flow, or refuses with [`Problem::Overloaded`] if that would take too long.
    pub async fn take(&self, len: u64) -> Result<(), Refusal> {
        let capped = &*self.0;
        let Some(rate) = capped.rate() else { return Ok(()) };
        let lasts = Duration::from_micros((u128::from(len) * 1_000_000 / u128::from(rate)) as u64);
        let (wait, mut waiting) = {
            let now = capped.began.elapsed();
            let mut free_at = capped.lock();
            let turn = (*free_at).max(now.saturating_sub(SLACK));
            let wait = turn.saturating_sub(now);
            if wait > PATIENCE {
                let detail = format!("{rate} bytes a second are the limit, and {wait:.1?} of them wait");
                return Err(Refusal::new(Problem::Overloaded, detail)
                    .hint("come back after Retry-After, or use another datacenter")
                    .retry_after(wait - PATIENCE / 2));
            }
            *free_at = turn + lasts;
            (wait, Waiting { capped, lasts, has_come: false })
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        waiting.has_come = true;
        Ok(())
    }

    /// How much of it is in use: [`FULL`] when work for a second waits.
    pub fn load(&self) -> Load {
        let capped = &*self.0;
        let Some(rate) = capped.rate() else { return Load { room: u64::MAX, pressure: 0 } };
        let backlog = capped.backlog();
        let thousandths = backlog.as_millis() * u128::from(FULL) / BACKLOG.as_millis();
        let free = BACKLOG.saturating_sub(backlog).as_millis() as u64;
        let room = u128::from(rate) * u128::from(free) / BACKLOG.as_millis();
        Load { room: room as u64, pressure: u16::try_from(thousandths).unwrap_or(u16::MAX) }
    }
}

/// Bytes a second at which what is stored is read again, as it may change. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ScrubRate(Arc<AtomicU64>);

impl ScrubRate {
    /// So many; 0: none.
    pub fn new(bytes_per_second: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes_per_second)))
    }

    /// How many now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// So many from now on.
    pub fn set(&self, bytes_per_second: u64) {
        self.0.store(bytes_per_second, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn the_long_run_is_exact_and_what_waits_shows() {
        let rate = UploadRate::new(Some(4 * MIB));
        assert_eq!(rate.load(), Load { room: 4 * MIB, pressure: 0 });
        let began = Instant::now();
        rate.take(8 * MIB).await.unwrap();
        assert!(began.elapsed().is_zero(), "at once");
        let Load { room, pressure } = rate.load();
        assert!(room == 0 && pressure > FULL, "{pressure}");
        for _ in 0..9 {
            rate.take(8 * MIB).await.unwrap();
        }
        // The tenth began when the nine before it had flowed.
        let slack = Duration::from_millis(150);
        let waited = began.elapsed();
        assert!(waited <= Duration::from_secs(18) && waited + slack >= Duration::from_secs(18), "{waited:?}");
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        let Load { room, pressure } = rate.load();
        assert!(room > 0 && pressure < FULL, "{room} {pressure}");
        let free = UploadRate::new(Some(0));
        assert_eq!((free.take(u64::MAX).await.is_ok(), free.load().room), (true, u64::MAX));
        // It may change while it is used.
        let clone = free.clone();
        free.set(Some(MIB));
        assert_eq!(clone.load().room, MIB);
        clone.set(None);
        assert_eq!(free.load().room, u64::MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn what_would_wait_too_long_is_refused_and_who_leaves_gives_the_turn_back() {
        let rate = UploadRate::new(Some(MIB));
        rate.take(8 * MIB).await.unwrap();
        let refusal = rate.take(MIB).await.unwrap_err();
        assert_eq!(refusal.problem, Problem::Overloaded);
        assert!(refusal.retry_after.is_some_and(|after| after > Duration::from_secs(1)));
        tokio::time::advance(Duration::from_secs(4)).await;
        let gone = tokio::time::timeout(Duration::from_secs(1), rate.take(100 * MIB)).await;
        assert!(gone.is_err());
        rate.take(MIB).await.unwrap();
    }
}
