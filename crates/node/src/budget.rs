//! Budgets: memory, and how many things happen at once. Past a budget a request is refused before its body is read,
//! with a time to come back (G6).
//!
//! A budget is owned by the datacenter and shared by its services; a permit gives back on drop. Nothing has to be
//! stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prometheus_client::metrics::gauge::Gauge;
use sluice_proto::problem::{Problem, Refusal};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use crate::metrics::Metrics;

/// Memory is counted in units of 4 KiB, so that the count of a request fits the semaphore's 32 bits.
const UNIT: u64 = 4096;

/// A bounded amount of memory.
#[derive(Clone, Debug)]
pub struct MemoryBudget {
    units: Arc<Semaphore>,
    /// Bytes in all.
    total: Arc<AtomicU64>,
    /// Units that are granted or could be: more than in all while it shrinks. Whoever changes it holds the lock.
    units_there: Arc<Mutex<u64>>,
    used: Gauge,
    limit: Gauge,
}

/// Memory that was granted; given back on drop.
#[derive(Debug)]
pub struct MemoryPermit {
    _units: OwnedSemaphorePermit,
    bytes: u64,
    used: Gauge,
}

/// Bytes and the memory that they take.
struct Paid {
    bytes: Bytes,
    _permit: MemoryPermit,
}

impl AsRef<[u8]> for Paid {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl MemoryPermit {
    /// The same bytes, which give the memory back when the last view of them is gone, whoever has it.
    pub fn pay_for(self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Paid { bytes, _permit: self })
    }
}

/// What is counted of so many bytes.
fn whole_units(bytes: u64) -> u64 {
    (bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS as u64)
}

impl MemoryBudget {
    /// A budget of `bytes`, rounded down to 4 KiB.
    pub fn new(bytes: u64) -> Self {
        Self::with_gauge(bytes, Gauge::default())
    }

    /// The budget of a datacenter, which its metrics show.
    pub fn measured(bytes: u64, metrics: &Metrics) -> Self {
        Self::with_gauges(bytes, metrics.memory_used.clone(), metrics.memory_budget.clone())
    }

    /// A budget that shows what is used in a gauge, in bytes.
    pub fn with_gauge(bytes: u64, used: Gauge) -> Self {
        Self::with_gauges(bytes, used, Gauge::default())
    }

    fn with_gauges(bytes: u64, used: Gauge, limit: Gauge) -> Self {
        let units = whole_units(bytes);
        let total = Arc::new(AtomicU64::new(units * UNIT));
        limit.set(i64::try_from(units * UNIT).unwrap_or(i64::MAX));
        let units_there = Arc::new(Mutex::new(units));
        Self { units: Arc::new(Semaphore::new(units as usize)), total, units_there, used, limit }
    }

    /// Changes how much it is. More is there at once; less when what was granted is given back, and nobody is granted
    /// any until then. Returns when it is so. Who no longer waits gives the change up, and another can be made.
    pub async fn resize(&self, bytes: u64) {
        let wanted = whole_units(bytes);
        let mut there = self.units_there.lock().await;
        self.total.store(wanted * UNIT, Ordering::Relaxed);
        self.limit.set(i64::try_from(wanted * UNIT).unwrap_or(i64::MAX));
        self.units.add_permits(wanted.saturating_sub(*there) as usize);
        *there = wanted.max(*there);
        while *there > wanted {
            let part = u32::try_from(*there - wanted).unwrap_or(u32::MAX);
            let Ok(permit) = self.units.acquire_many(part).await else { return };
            permit.forget();
            *there -= u64::from(part);
        }
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes that are granted now.
    pub fn used(&self) -> u64 {
        self.total().saturating_sub(self.units.available_permits() as u64 * UNIT)
    }

    /// Takes `bytes`, or refuses with [`Problem::Overloaded`].
    pub fn try_take(&self, bytes: u64) -> Result<MemoryPermit, Refusal> {
        let units = self.units_of(bytes)?;
        let permit = self.units.clone().try_acquire_many_owned(units).map_err(|_| self.refusal(bytes))?;
        Ok(self.permit(permit, units))
    }

    /// Takes `bytes`, waiting at most `patience` in line with others.
    pub async fn take(&self, bytes: u64, patience: Duration) -> Result<MemoryPermit, Refusal> {
        let units = self.units_of(bytes)?;
        match tokio::time::timeout(patience, self.units.clone().acquire_many_owned(units)).await {
            Ok(Ok(permit)) => Ok(self.permit(permit, units)),
            Ok(Err(_)) | Err(_) => Err(self.refusal(bytes)),
        }
    }

    fn units_of(&self, bytes: u64) -> Result<u32, Refusal> {
        // More than the whole budget never fits, and must not wait for it.
        if bytes > self.total() {
            Err(self.refusal(bytes))
        } else {
            u32::try_from(bytes.div_ceil(UNIT)).map_err(|_| self.refusal(bytes))
        }
    }

    fn permit(&self, permit: OwnedSemaphorePermit, units: u32) -> MemoryPermit {
        let bytes = u64::from(units) * UNIT;
        self.used.inc_by(i64::try_from(bytes).unwrap_or(i64::MAX));
        MemoryPermit { _units: permit, bytes, used: self.used.clone() }
    }

    fn refusal(&self, bytes: u64) -> Refusal {
        Refusal::new(
            Problem::Overloaded,
            format!("{bytes} bytes of memory are needed, {} of {} are in use", self.used(), self.total()),
        )
        .hint("come back after Retry-After, or use another datacenter")
    }
}

impl MemoryPermit {
    /// Bytes that were granted.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for MemoryPermit {
    fn drop(&mut self) {
        self.used.dec_by(i64::try_from(self.bytes).unwrap_or(i64::MAX));
    }
}

/// A bounded number of things at once.
#[derive(Clone, Debug)]
pub struct Concurrency {
    slots: Arc<Semaphore>,
    limit: usize,
    what: &'static str,
}

/// One of them; given back on drop.
#[derive(Debug)]
pub struct ConcurrencyPermit(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Concurrency {
    /// At most `limit` of `what` (`"requests"`) at once.
    pub fn new(what: &'static str, limit: usize) -> Self {
        let limit = limit.clamp(1, Semaphore::MAX_PERMITS);
        Self { slots: Arc::new(Semaphore::new(limit)), limit, what }
    }

    /// How many go on now.
    pub fn used(&self) -> usize {
        self.limit - self.slots.available_permits()
    }

    /// Takes one, or refuses with [`Problem::Overloaded`].
    pub fn try_take(&self) -> Result<ConcurrencyPermit, Refusal> {
        self.slots.clone().try_acquire_owned().map(ConcurrencyPermit).map_err(|_| {
            Refusal::new(Problem::Overloaded, format!("{} {} are the limit at once", self.limit, self.what))
                .hint("come back after Retry-After, or use another datacenter")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn memory_past_the_budget_is_refused_with_a_time_to_come_back() {
        let gauge = Gauge::default();
        let budget = MemoryBudget::with_gauge(16 << 10, gauge.clone());
        let permit = budget.try_take(10_000).unwrap();
        assert_eq!((permit.bytes(), budget.used(), gauge.get()), (12 << 10, 12 << 10, 12 << 10));
        let refusal = budget.try_take(8 << 10).unwrap_err();
        assert_eq!(refusal.problem, Problem::Overloaded);
        assert!(refusal.retry_after.is_some());
        assert!(budget.take(8 << 10, Duration::from_millis(10)).await.is_err());
        drop(permit);
        assert_eq!((budget.used(), gauge.get()), (0, 0));
        assert!(budget.take(16 << 10, Duration::from_millis(10)).await.is_ok());
        assert!(budget.take((16 << 10) + 1, Duration::MAX).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_budget_grows_at_once_and_shrinks_when_memory_is_given_back() {
        let budget = MemoryBudget::new(16 << 10);
        let permit = budget.try_take(16 << 10).unwrap();
        budget.resize(32 << 10).await;
        assert_eq!((budget.total(), budget.used()), (32 << 10, 16 << 10));
        let more = budget.try_take(16 << 10).unwrap();
        let (shrinking, told) = (budget.clone(), budget.clone());
        let shrunk = tokio::spawn(async move { shrinking.resize(8 << 10).await });
        tokio::task::yield_now().await;
        drop(more);
        assert_eq!(told.total(), 8 << 10);
        assert!(!shrunk.is_finished() && told.try_take(4096).is_err(), "one is too many still");
        drop(permit);
        shrunk.await.unwrap();
        assert_eq!(budget.used(), 0);
        let all = budget.try_take(8 << 10).unwrap();
        assert!(budget.try_take(4096).is_err());
        // Less was a mistake, and is taken back before it could come about.
        let mistake = tokio::time::timeout(Duration::from_secs(1), budget.resize(4096)).await;
        assert!(mistake.is_err());
        budget.resize(16 << 10).await;
        assert!(budget.try_take(12 << 10).is_err());
        drop((budget.try_take(8 << 10).unwrap(), all));
        assert!(budget.try_take(16 << 10).is_ok());
        budget.resize(8 << 10).await;
        assert!(budget.try_take((8 << 10) + 1).is_err());
    }

    #[test]
    fn concurrency_is_given_back() {
        let limit = Concurrency::new("requests", 1);
        let one = limit.try_take().unwrap();
        assert_eq!(limit.try_take().unwrap_err().problem, Problem::Overloaded);
        drop(one);
        assert_eq!(limit.used(), 0);
        assert!(limit.try_take().is_ok());
    }
}
