//! How fast a tenant may go: a bucket of bytes that fills with time, one for all who act for the tenant in one place.
//!
//! What is kept is the moment until which all that was taken is paid for. Something may be taken while that moment is at
//! most [`BURST_MS`] away, whatever its size: a large request is paid for afterwards, by those that come next. So the rate
//! holds over any longer while, no request is too large for it, and a tenant that was quiet gets a second of it at once.
//!
//! Tokens of one tenant may grant different rates. Each takes at its own, from the same bucket.

use crate::ids::Timestamp;

/// How far a tenant may be ahead of its rate, in milliseconds.
pub const BURST_MS: u64 = 1_000;

/// What a request costs at least, in bytes, so that a rate bounds requests as well.
pub const REQUEST_COST: u64 = 16 << 10;

/// The longest that anybody is told to wait, in milliseconds.
pub const MAX_WAIT_MS: u64 = 60_000;

/// One tenant's bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Until when all that was taken is paid for, in microseconds.
    paid_until: u64,
    /// When it was last looked at.
    seen: Timestamp,
}

impl Bucket {
    /// Takes `bytes` at `rate` bytes a second (0: no limit), or says in how many milliseconds to come back.
    pub fn take(&mut self, rate: u64, bytes: u64, now: Timestamp) -> Result<(), u64> {
        if rate == 0 {
            return Ok(());
        }
        // A clock that was set back must not make anybody wait for it.
        let back = self.seen.since(now).saturating_mul(1000);
        self.paid_until = self.paid_until.saturating_sub(back);
        self.seen = now;
        let now = now.number().saturating_mul(1000);
        let ahead = self.paid_until.saturating_sub(now);
        if let Some(over) = ahead.checked_sub(BURST_MS * 1000).filter(|over| *over > 0) {
            return Err(over.div_ceil(1000).min(MAX_WAIT_MS));
        }
        let cost = u128::from(bytes.max(REQUEST_COST)) * 1_000_000 / u128::from(rate);
        self.paid_until = now.max(self.paid_until).saturating_add(u64::try_from(cost).unwrap_or(u64::MAX));
        Ok(())
    }

    /// Whether it is as good as new.
    pub fn is_full(&self, now: Timestamp) -> bool {
        self.paid_until <= now.number().saturating_mul(1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn at(ms: u64) -> Timestamp {
        Timestamp::new(1_763_640_000_000 + ms)
    }

    #[test]
    fn a_second_at_once_and_then_the_rate() {
        let mut bucket = Bucket::default();
        let taken = (0..100).take_while(|_| bucket.take(10 * MIB, MIB, at(0)).is_ok()).count();
        assert_eq!(taken, 11, "a second, and one that is paid for afterwards");
        assert_eq!(bucket.take(10 * MIB, MIB, at(0)), Err(100));
        assert_eq!(bucket.take(10 * MIB, MIB, at(99)), Err(1));
        assert_eq!(bucket.take(10 * MIB, MIB, at(100)), Ok(()));
        assert!(!bucket.is_full(at(1_199)) && bucket.is_full(at(1_200)));
    }

    #[test]
    fn no_request_is_too_large_and_small_ones_cost_something() {
        let mut bucket = Bucket::default();
        assert_eq!(bucket.take(MIB, 8 * MIB, at(0)), Ok(()));
        assert_eq!(bucket.take(MIB, 0, at(0)), Err(7_000));
        assert_eq!(bucket.take(1, 0, at(7_000)), Ok(()), "another token of the tenant, a slower one");
        assert_eq!(bucket.take(MIB, 0, at(7_000)), Err(MAX_WAIT_MS));
        let mut small = Bucket::default();
        let taken = (0..1_000).take_while(|_| small.take(MIB, 1, at(0)).is_ok()).count();
        assert_eq!(taken as u64, MIB / REQUEST_COST + 1);
        assert_eq!(small.take(0, MIB, at(0)), Ok(()), "no limit");
    }

    #[test]
    fn a_clock_that_is_set_back_costs_nobody_its_way() {
        let mut bucket = Bucket::default();
        bucket.take(MIB, 2 * MIB, at(3_600_000)).unwrap();
        assert_eq!(bucket.take(MIB, MIB, at(0)), Err(1_000));
        assert_eq!(bucket.take(MIB, MIB, at(1_000)), Ok(()));
    }

    proptest! {
        #[test]
        fn over_any_while_the_rate_holds(
            rate in 1u64..1 << 40,
            asked in proptest::collection::vec((0u64..8 << 20, 0u64..3_000), 1..200),
        ) {
            let (mut bucket, mut now, mut taken, mut last) = (Bucket::default(), 0, 0u128, 0);
            for (bytes, pause) in asked {
                now += pause;
                if bucket.take(rate, bytes, at(now)).is_ok() {
                    last = bytes.max(REQUEST_COST);
                    taken += u128::from(last);
                }
            }
            // All but the last was paid for within a second, to the microsecond of each.
            let paid = u128::from(rate) * u128::from(now + BURST_MS) / 1000;
            prop_assert!(taken <= paid + u128::from(last) + 200 * u128::from(rate) / 1_000_000 + 200);
        }

        #[test]
        fn whoever_waits_as_long_as_told_is_let_in(rate in 1u64..1 << 40, bytes in 0u64..8 << 20) {
            let mut bucket = Bucket::default();
            let mut now = 0;
            for _ in 0..20 {
                if let Err(wait) = bucket.take(rate, bytes, at(now)) {
                    now += wait;
                    prop_assert!(wait == MAX_WAIT_MS || bucket.take(rate, bytes, at(now)).is_ok());
                }
            }
        }
    }
}
