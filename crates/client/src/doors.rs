//! All URLs of a cluster, and which of them are worth asking.
//!
//! A URL that fails rests: the pause doubles with each further failure and has jitter, or is as long as the server
//! asked for. After it one request tries the URL; only when that succeeds do the others follow. Failures of
//! requests that were in flight together count once. How many requests a URL gets at once is `concurrency.rs`'s to
//! say.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::{Instant, timeout_at};

use crate::concurrency::Concurrency;
use crate::config::RetryPolicy;
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
    /// From when on time is counted for decisions.
    began: Instant,
}

#[derive(Clone, Debug)]
struct Health {
    /// In a row.
    failures: u32,
    failed_at: Option<Instant>,
    rests_until: Option<Instant>,
    in_flight: usize,
    /// How many it may have in flight.
    concurrency: Concurrency,
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

    /// Counts the request as a success of its URL, which carried so many bytes of chunks, and found it `busy` or not.
    pub(crate) fn carried(&self, bytes: u64, busy: bool, observer: &SharedObserver) {
        {
            let now = self.doors.began.elapsed();
            let mut health = self.doors.health();
            let health = &mut health[self.url];
            let in_flight = health.in_flight;
            health.concurrency.acknowledged(now, bytes, in_flight, busy);
        }
        self.succeeded(observer);
    }

    /// Counts the request as a success of its URL.
    pub(crate) fn succeeded(&self, observer: &SharedObserver) {
        let turn = {
            let mut health = self.doors.health();
            let health = &mut health[self.url];
            let was_down = health.failures > 0;
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
            }
            let since = |at: Instant| at.saturating_duration_since(self.doors.began);
            let in_flight = health.in_flight;
            if error.is_push_back() {
                health.concurrency.pushed_back(since(now), since(self.begun), in_flight);
            } else {
                health.concurrency.lost(since(now), since(self.begun));
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
    pub(crate) fn new(doors: Vec<Door>, policy: RetryPolicy, concurrency: Concurrency) -> Self {
        let health = Health { failures: 0, failed_at: None, rests_until: None, in_flight: 0, concurrency };
        Self {
            health: Mutex::new(vec![health; doors.len()]),
            doors: doors.into_iter().map(Arc::new).collect(),
            policy,
            changed: Notify::new(),
            began: Instant::now(),
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

    /// Whether the last that is known of this URL is a failure.
    pub(crate) fn is_down(&self, url: usize) -> bool {
        self.health()[url].failures > 0
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
        self.anywhere_for(first, 0, observer, call).await
    }

    /// The same for a call that carries so many bytes of chunks.
    pub(crate) async fn anywhere_for<T, C>(
        &self,
        first: First,
        bytes: u64,
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
                    match bytes {
                        0 => ticket.succeeded(observer),
                        _ => ticket.carried(bytes, false, observer),
                    }
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
            && if self.failures == 0 {
                self.in_flight < self.concurrency.limit()
            } else {
                self.in_flight == 0
            }
    }
}

/// The error of a call that ran out of time.
pub(crate) fn gave_up(after: Duration, last: Option<ClientError>) -> ClientError {
    match last {
        Some(last) => ClientError::GaveUp { after, last: Box::new(last) },
        None => ClientError::Task { cause: "no URL was free to be asked".into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ClientConfig, Token};
    use crate::refused::{Operation, Refused};
    use sluice_proto::problem::Problem;

    fn refusal(problem: Problem, after: Option<u64>) -> ClientError {
        ClientError::Refused(Box::new(Refused {
            dc: "dc-a".into(),
            operation: Operation::Chunks { start: 0, count: 8 },
            code: problem.code().into(),
            problem: Some(problem),
            status: problem.status(),
            detail: "x".into(),
            hint: None,
            trace: None,
            retry_after: after.map(Duration::from_secs),
        }))
    }

    fn client(urls: &[&str]) -> crate::Client {
        let key = rcgen::KeyPair::generate().unwrap();
        let ca = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
        let urls = urls.iter().map(|url| (*url).to_owned()).collect();
        crate::Client::new(ClientConfig::new(urls, Token::new("t"), ca.pem().into_bytes())).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_url_that_asks_to_be_left_alone_is() {
        let client = client(&["https://a", "https://b"]);
        let (doors, observer) = (client.doors(), crate::unobserved());
        let crowd: Vec<Ticket<'_>> = (0..4).map(|_| doors.enter(0)).collect();
        assert_eq!(doors.usable(), [(1, 0)], "at first four at once are enough");
        tokio::time::advance(Duration::from_millis(10)).await;
        for ticket in crowd {
            ticket.failed(&refusal(Problem::Overloaded, Some(7)), &observer);
        }
        assert_eq!(doors.usable(), [(1, 0)]);
        tokio::time::advance(Duration::from_millis(6_900)).await;
        assert_eq!(doors.usable(), [(1, 0)], "not a moment earlier than it asked for");
        tokio::time::advance(Duration::from_millis(200)).await;
        assert_eq!(doors.usable(), [(0, 0), (1, 0)]);
        // One tries; then half of what it had.
        let one = doors.enter(0);
        assert_eq!(doors.usable(), [(1, 0)]);
        tokio::time::advance(Duration::from_millis(10)).await;
        one.carried(8 << 20, false, &observer);
        drop(one);
        let two: Vec<Ticket<'_>> = (0..2).map(|_| doors.enter(0)).collect();
        assert_eq!(doors.usable(), [(1, 0)]);
        drop(two);
    }
}
