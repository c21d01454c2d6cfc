//! Who is turned away at the doors inside a cluster, in the log.
//!
//! Whoever calls there shows a certificate of the cluster. One that does not count is a mistake or an attack, so each reason
//! is said at once, and from then on once a minute at the most, with how often it was: whoever calls does not decide how much
//! is logged. A door owns its [`Strangers`]; nothing has to be stopped.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::Error;

/// How long nothing more is said for the same reason.
const SILENCE: Duration = Duration::from_secs(60);

/// Who was turned away at one door.
#[derive(Debug)]
pub struct Strangers {
    door: &'static str,
    /// By the reason, of which there are as many as the code has.
    seen: Mutex<BTreeMap<&'static str, Seen>>,
}

/// How often a reason was met.
#[derive(Debug, Default)]
struct Seen {
    said: Option<Instant>,
    /// Since then.
    times: u64,
}

impl Strangers {
    /// Nobody yet, at the door of this name.
    pub fn at(door: &'static str) -> Self {
        Self { door, seen: Mutex::default() }
    }

    /// A handshake failed. Certificates that do not count are worth a warning, on either side; whoever looked in and went
    /// away, or speaks something else, is none of ours.
    pub fn failed(&self, from: Option<SocketAddr>, error: &io::Error) {
        let why = match error.get_ref().and_then(|cause| cause.downcast_ref::<Error>()) {
            Some(Error::InvalidCertificate(_)) => "a caller shows a certificate that does not count",
            Some(Error::NoCertificatesPresented) => "a caller shows no certificate",
            Some(Error::AlertReceived(_)) => "a caller does not take the certificate of this door",
            Some(_) | None => {
                tracing::debug!(door = self.door, %error, "a caller's handshake failed");
                return;
            }
        };
        self.turned_away(why, from, error);
    }

    /// Somebody was turned away, for a reason that has few names, and with what else there is to say.
    pub fn turned_away(&self, why: &'static str, from: Option<SocketAddr>, error: &dyn fmt::Display) {
        if let Some(times) = self.met(why, Instant::now()) {
            let from = from.map(tracing::field::display);
            tracing::warn!(door = self.door, from, %error, times, "{why}");
        }
    }

    /// How often a reason was met since it was said, this time included, if it is to be said again.
    fn met(&self, why: &'static str, now: Instant) -> Option<u64> {
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = all.entry(why).or_default();
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
    fn a_reason_is_said_at_once_and_then_seldom_with_how_often_it_was() {
        let (door, now) = (Strangers::at("peer"), Instant::now());
        assert_eq!(door.met("foreign", now), Some(1));
        for ms in 0..1000 {
            assert_eq!(door.met("foreign", now + Duration::from_millis(59 * ms)), None);
        }
        assert_eq!(door.met("expired", now), Some(1), "another reason");
        assert_eq!(door.met("foreign", now + SILENCE), Some(1001));
        assert_eq!(door.met("foreign", now + SILENCE + Duration::from_secs(1)), None);
        assert_eq!(door.met("foreign", now + 2 * SILENCE), Some(2));
    }
}
