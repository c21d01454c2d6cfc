//! What others do wrong, in the log: who does it does not decide how much is logged.
//!
//! The same is said at once, and from then on once a minute at the most, with how often it was. Whoever says it owns its
//! [`Seldom`]; nothing has to be stopped.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long nothing more is said of the same.
const SILENCE: Duration = Duration::from_secs(60);

/// What was met lately. Everything that counts as different is kept for good: of that there may be only so much as the code and
/// the cluster's keys know, and never what somebody else makes up.
#[derive(Debug)]
pub struct Seldom<K>(Mutex<BTreeMap<K, Seen>>);

/// How often something was met.
#[derive(Debug, Default)]
struct Seen {
    said: Option<Instant>,
    /// Since then.
    times: u64,
}

impl<K> Default for Seldom<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Ord> Seldom<K> {
    /// How often something was met since it was said, this time included, if it is to be said again.
    pub fn met(&self, what: K) -> Option<u64> {
        self.met_at(what, Instant::now())
    }

    fn met_at(&self, what: K, now: Instant) -> Option<u64> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = all.entry(what).or_default();
        seen.times += 1;
        if seen.said.is_some_and(|said| now.duration_since(said) < SILENCE) {
            return None;
        }
        seen.said = Some(now);
        Some(std::mem::take(&mut seen.times))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_is_said_at_once_and_then_seldom_with_how_often_it_was() {
        let (seldom, now) = (Seldom::default(), Instant::now());
        assert_eq!(seldom.met_at("foreign", now), Some(1));
        for ms in 0..1000 {
            assert_eq!(seldom.met_at("foreign", now + Duration::from_millis(59 * ms)), None);
        }
        assert_eq!(seldom.met_at("expired", now), Some(1), "something else");
        assert_eq!(seldom.met_at("foreign", now + SILENCE), Some(1001));
        assert_eq!(seldom.met_at("foreign", now + SILENCE + Duration::from_secs(1)), None);
        assert_eq!(seldom.met_at("foreign", now + 2 * SILENCE), Some(2));
    }
}
