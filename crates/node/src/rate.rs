//! A cap on bytes a second: what comes waits its turn, and what would wait too long is refused.
//!
//! Owned by the datacenter's workers. Whoever takes bytes is given the moment from which on they may flow; that moment
//! moves on by as long as they last at the capped rate, so that the long run is exact whatever the sizes. Nothing has to
//! be stopped: waiting ends with the request, which gives its turn back.

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

/// Bytes of uploads a second, capped or not. Clones share the cap.
#[derive(Clone, Debug, Default)]
pub struct UploadRate(Option<Arc<Capped>>);

#[derive(Debug)]
struct Capped {
    /// Bytes a second, not 0.
    rate: u64,
    began: Instant,
    /// When all that was let in will have flowed, since `began`.
    free_at: Mutex<Duration>,
}

impl Capped {
    fn lock(&self) -> MutexGuard<'_, Duration> {
        // One number, whole at any time.
        self.free_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lasts(&self, len: u64) -> Duration {
        Duration::from_micros((u128::from(len) * 1_000_000 / u128::from(self.rate)) as u64)
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
        let capped = bytes_per_second.filter(|rate| *rate > 0).map(|rate| {
            Arc::new(Capped { rate, began: Instant::now(), free_at: Mutex::new(Duration::ZERO) })
        });
        Self(capped)
    }

    /// Waits until `len` bytes may flow, or refuses with [`Problem::Overloaded`] if that would take too long.
    pub async fn take(&self, len: u64) -> Result<(), Refusal> {
        let Some(capped) = &self.0 else { return Ok(()) };
        let lasts = capped.lasts(len);
        let (wait, mut waiting) = {
            let now = capped.began.elapsed();
            let mut free_at = capped.lock();
            let turn = (*free_at).max(now.saturating_sub(SLACK));
            let wait = turn.saturating_sub(now);
            if wait > PATIENCE {
                let detail =
                    format!("{} bytes a second are the limit, and {wait:.1?} of them wait", capped.rate);
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
        let Some(capped) = &self.0 else { return Load { room: u64::MAX, pressure: 0 } };
        let backlog = capped.backlog();
        let thousandths = backlog.as_millis() * u128::from(FULL) / BACKLOG.as_millis();
        let free = BACKLOG.saturating_sub(backlog).as_millis() as u64;
        let room = u128::from(capped.rate) * u128::from(free) / BACKLOG.as_millis();
        Load { room: room as u64, pressure: u16::try_from(thousandths).unwrap_or(u16::MAX) }
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
