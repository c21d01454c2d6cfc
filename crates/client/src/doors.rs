//! All URLs of a cluster, and which of them are worth asking.
//!
//! A URL that fails rests: the pause doubles with each further failure and has jitter, or is as long as the server
//! asked for. After it one request tries the URL; only when that succeeds do the others follow. Failures of
//! requests that were in flight together count once. A URL that pushes back (408, 429, 503) also gets fewer requests
//! at once from then on, and more again as it takes them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::{Instant, timeout_at};

use crate::config::{MAX_JOBS, RetryPolicy};
use crate::door::Door;
use crate::error::ClientError;
use crate::event::{Event, SharedObserver};

/// The URLs of one client, shared by all its calls.
#[derive(Debug)]
pub(crate) struct Doors {
    doors: Vec<Arc<Door>>,
    policy: RetryPolicy,
    health: Mutex<Vec<Health>>,
    /// Rung when a URL may have become usable.
    changed: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Health {
    /// In a row.
    failures: u32,
    failed_at: Option<Instant>,
    rests_until: Option<Instant>,
    in_flight: usize,
    /// Requests that it may have in flight: halved when it pushes back, raised by one for each round that it takes.
    limit: f64,
}

/// Which URL is asked first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    /// The first of the configuration.
    Configured,
    /// The one with the fewest requests in flight.
    Idlest,
    /// This one.
    Url(usize),
}

/// Whether a failure or a success changed what others should think of the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Down,
    Up,
    Same,
}

/// A request in flight; dropping it without a verdict gives the place back.
pub(crate) struct Ticket<'a> {
    doors: &'a Doors,
    /// The URL.
    pub(crate) url: usize,
    begun: Instant,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut health = self.doors.health();
        health[self.url].in_flight = health[self.url].in_flight.saturating_sub(1);
        drop(health);
        self.doors.changed.notify_waiters();
    }
}

impl Ticket<'_> {
    /// The URL's door.
    pub(crate) fn door(&self) -> Arc<Door> {
        self.doors.doors[self.url].clone()
    }

    /// Counts the request as a success of its URL.
    pub(crate) fn succeeded(&self, observer: &SharedObserver) {
        let turn = {
            let mut health = self.doors.health();
            let health = &mut health[self.url];
            let was_down = health.failures > 0;
            health.limit = (health.limit + 1.0 / health.limit).min(MAX_JOBS as f64);
            // A success that began before the last failure proves nothing about now.
            if health.failed_at.is_none_or(|at| at < self.begun) {
                (health.failures, health.rests_until) = (0, None);
                if was_down { Turn::Up } else { Turn::Same }
            } else {
                Turn::Same
            }
        };
        match turn {
            Turn::Up => observer.observe(&Event::UrlUp { url: self.url }),
            Turn::Down | Turn::Same => {}
        }
    }

    /// Counts the request as a failure of its URL, which then rests.
    pub(crate) fn failed(&self, error: &ClientError, observer: &SharedObserver) {
        let turn = {
            let now = Instant::now();
            let mut health = self.doors.health();
            let health = &mut health[self.url];
            let counted = health.failed_at.is_some_and(|at| at >= self.begun);
            let was_up = health.failures == 0;
            if !counted {
                health.failures = health.failures.saturating_add(1);
                health.failed_at = Some(now);
                if error.is_push_back() {
                    health.limit = (health.in_flight as f64 / 2.0).max(1.0);
                }
            }
            let pause = self.doors.pause(health.failures).max(error.retry_after().unwrap_or_default());
            let until = if counted { health.rests_until.unwrap_or(now).max(now) } else { now + pause };
            health.rests_until = Some(until);
            if was_up { Turn::Down } else { Turn::Same }
        };
        match turn {
            Turn::Down => observer.observe(&Event::UrlDown { url: self.url, error }),
            Turn::Up | Turn::Same => {}
        }
    }
}

impl Doors {
    pub(crate) fn new(doors: Vec<Door>, policy: RetryPolicy) -> Self {
        let health =
            Health { failures: 0, failed_at: None, rests_until: None, in_flight: 0, limit: MAX_JOBS as f64 };
        Self {
            health: Mutex::new(vec![health; doors.len()]),
            doors: doors.into_iter().map(Arc::new).collect(),
            policy,
            changed: Notify::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.doors.len()
    }

    pub(crate) fn policy(&self) -> &RetryPolicy {
        &self.policy
    }

    /// The URLs that are worth asking now, in order of the configuration, and how many requests each has in flight.
    pub(crate) fn usable(&self) -> Vec<(usize, usize)> {
        let now = Instant::now();
        let health = self.health();
        let usable = health.iter().enumerate().filter(|(_, health)| health.is_usable(now));
        usable.map(|(url, health)| (url, health.in_flight)).collect()
    }

    /// Rings when a request that is in flight now, of any call, has ended.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// When the next URL has rested enough; `None` if none rests.
    pub(crate) fn next_awake(&self) -> Option<Instant> {
        let now = Instant::now();
        self.health().iter().filter_map(|health| health.rests_until.filter(|until| *until > now)).min()
    }

    /// Takes a place at this URL.
    pub(crate) fn enter(&self, url: usize) -> Ticket<'_> {
        self.health()[url].in_flight += 1;
        Ticket { doors: self, url, begun: Instant::now() }
    }

    /// Waits until some URL that is not set aside may be worth asking, or `deadline`.
    pub(crate) async fn wait(&self, deadline: Instant, aside: &[usize]) {
        let notified = self.changed.notified();
        if self.usable().iter().any(|(url, _)| !aside.contains(url)) {
            return;
        }
        // Either the time has come, or a place was given back: both mean "look again".
        let _ = timeout_at(self.next_awake().map_or(deadline, |at| at.min(deadline)), notified).await;
    }

    /// Makes `call` at one URL after another until one answers. A refusal that time does not heal ends it at once,
    /// but for `not-found` and for damage: another datacenter may know the file, or have it whole.
    pub(crate) async fn anywhere<T, C>(
        &self,
        first: First,
        observer: &SharedObserver,
        call: impl Fn(Arc<Door>) -> C,
    ) -> Result<(usize, T), ClientError>
    where
        C: Future<Output = Result<T, ClientError>>,
    {
        let begun = Instant::now();
        let deadline = begun + self.policy.retry_for;
        let mut aside: Vec<usize> = Vec::new();
        let mut verdict: Option<ClientError> = None;
        let mut last = None;
        loop {
            let mut usable = self.usable();
            usable.retain(|(url, _)| !aside.contains(url));
            match first {
                First::Configured => {}
                First::Idlest => usable.sort_by_key(|(_, in_flight)| *in_flight),
                First::Url(wanted) => usable.sort_by_key(|(url, _)| *url != wanted),
            }
            let Some((url, _)) = usable.first().copied() else {
                // Whoever does not answer may yet know better than damage, but is not waited for to deny a file.
                let late = aside.len() == self.len() || Instant::now() >= deadline;
                match verdict {
                    Some(error) if late || error.is_not_found() => return Err(error),
                    None if late => return Err(gave_up(begun.elapsed(), last)),
                    Some(_) | None => self.wait(deadline, &aside).await,
                }
                continue;
            };
            let ticket = self.enter(url);
            match call(ticket.door()).await {
                Ok(answer) => {
                    ticket.succeeded(observer);
                    return Ok((url, answer));
                }
                Err(error) if error.is_not_found() => {
                    ticket.succeeded(observer);
                    aside.push(url);
                    verdict = verdict.or(Some(error));
                }
                Err(error) if error.is_damage() => {
                    ticket.succeeded(observer);
                    observer.observe(&Event::Damaged { url, error: &error });
                    aside.push(url);
                    verdict = Some(error);
                }
                Err(error) if error.is_transient() => {
                    ticket.failed(&error, observer);
                    last = Some(error);
                    if Instant::now() >= deadline {
                        return Err(gave_up(begun.elapsed(), last));
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A pause before trying the same URL again, with jitter.
    pub(crate) fn pause(&self, failures: u32) -> Duration {
        let doubled = self.policy.first_pause.saturating_mul(1 << failures.saturating_sub(1).min(16));
        doubled.min(self.policy.longest_pause).mul_f64(rand::random_range(0.5..1.0))
    }

    fn health(&self) -> MutexGuard<'_, Vec<Health>> {
        // Counters stay meaningful whatever a panicking holder left.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    fn is_usable(&self, now: Instant) -> bool {
        self.rests_until.is_none_or(|until| until <= now)
            && if self.failures == 0 { (self.in_flight as f64) < self.limit } else { self.in_flight == 0 }
    }
}

/// The error of a call that ran out of time.
pub(crate) fn gave_up(after: Duration, last: Option<ClientError>) -> ClientError {
    match last {
        Some(last) => ClientError::GaveUp { after, last: Box::new(last) },
        None => ClientError::Task { cause: "no URL was free to be asked".into() },
    }
}
