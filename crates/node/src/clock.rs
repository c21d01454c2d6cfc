//! The clock, and everything else that comes by chance: what services pass into the engine as arguments.
//!
//! Owned by the composition, which gives every service of a datacenter the same clock. Nothing here has to be
//! stopped.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use sluice_engine::ids::{ClientFileId, Nonce, Timestamp};
use uuid::Uuid;

/// Tells the time. It may jump: no outcome of a merge depends on it.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// This moment, in Unix milliseconds.
    fn now(&self) -> Timestamp;
}

/// A clock that several services share.
pub type SharedClock = Arc<dyn Clock>;

/// The clock of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl SystemClock {
    /// The clock of the machine, to be shared.
    pub fn shared() -> SharedClock {
        Arc::new(Self)
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        // A clock before 1970 reads as 1970: everything signed is then "not yet" valid, and refused.
        let ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        Timestamp::new(u64::try_from(ms).unwrap_or(u64::MAX))
    }
}

/// A clock that stands still until it is set: for tests.
#[derive(Debug)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// A clock that stands at this moment.
    pub fn at(now: Timestamp) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(now.number())))
    }

    /// Moves the clock on.
    pub fn advance(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }

    /// Sets the clock, forwards or backwards.
    pub fn set(&self, now: Timestamp) {
        self.0.store(now.number(), Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::new(self.0.load(Ordering::SeqCst))
    }
}

/// Random bytes, good for keys.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes[..]);
    bytes
}

/// A nonce that was never used before. Never zero: zero says "no nonce".
pub fn random_nonce() -> Nonce {
    loop {
        let number = rand::random();
        if number != 0 {
            return Nonce::new(number);
        }
    }
}

/// The id of a file whose client sent none: a UUIDv7.
pub fn new_file_id() -> ClientFileId {
    ClientFileId::new(Uuid::now_v7())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = ManualClock::at(Timestamp::new(5));
        assert_eq!(clock.now(), Timestamp::new(5));
        clock.advance(2);
        assert_eq!(clock.now(), Timestamp::new(7));
        assert!(SystemClock.now() > Timestamp::new(1_700_000_000_000));
    }

    #[test]
    fn chance_does_not_repeat_itself() {
        assert_ne!(random_bytes::<32>(), random_bytes::<32>());
        assert_ne!(random_nonce(), random_nonce());
        assert_eq!(new_file_id().uuid().get_version_num(), 7);
    }
}
