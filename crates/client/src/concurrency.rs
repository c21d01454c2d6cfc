//! How many requests one URL is given at once: pure decisions, from what became of requests and when.
//!
//! More are tried while that makes the whole faster: at first twice as many each round, later half as many again now
//! and then. Fewer are kept when they are as fast. A datacenter that pushes back gets half of what it had, one that
//! loses more requests than chance would a third less, once for all that were under way together. One that says that
//! requests waited there for each other gets fewer each round, down to two: what more places would bring then, they
//! would take from others. A round is as long as it takes to see every place used; one in which places
//! stayed free says nothing.
//!
//! Time is passed in, as the time since some beginning. `tests` runs it against simulated links.

use std::time::Duration;

/// Places at the beginning: enough that a short upload does not crawl, and no burden.
const FIRST: f64 = 4.0;

/// Places that are kept where requests wait for each other: one waits while another is received.
const CROWDED: f64 = 2.0;

/// What doubling, trying half as many again, and trying a third less must bring, as a factor of the rate.
const DOUBLED: f64 = 1.15;
const MORE: f64 = 1.06;
const FEWER: f64 = 0.98;

/// The step of a trial.
const STEP: f64 = 1.5;

/// Rounds between trials, at first and at most: those that bring nothing become rare.
const FIRST_PAUSE: u32 = 2;
const LONGEST_PAUSE: u32 = 16;

/// The shortest round, in requests and in time.
const MIN_ACKS: f64 = 4.0;
const MIN_ROUND: Duration = Duration::from_millis(20);

/// How much the last round counts in the rate.
const FRESH: f64 = 0.3;

/// So many losses are no chance, when each answer in between takes away this part of what was counted.
const STRAIN: f64 = 2.0;
const RELIEF: f64 = 0.9;

/// The places of one URL.
#[derive(Clone, Debug)]
pub(crate) struct Concurrency {
    /// The most there may ever be.
    ceiling: f64,
    /// Whether the number is found out, rather than given.
    adapts: bool,
    limit: f64,
    phase: Phase,
    round: Round,
    pause: u32,
    /// Losses, the older the less.
    strain: f64,
    /// When it last shrank.
    shrank: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Doubling, as long as that pays. `best` is the rate of the round before.
    Opening { best: f64 },
    /// As it is for some more rounds; then a trial, upwards or down.
    Steady { rate: Option<f64>, rounds: u32, up: bool },
    /// Another number for a round; what came of `from` was `rate`. The first round still has requests from before.
    Trial { from: f64, rate: f64, up: bool, mixed: bool },
}

#[derive(Clone, Copy, Debug, Default)]
struct Round {
    began: Option<Duration>,
    bytes: u64,
    acks: f64,
    /// Of these, requests that waited for others.
    waited: f64,
    /// Whether every place was used at some time.
    full: bool,
}

impl Concurrency {
    /// Up to `ceiling` places: as many as pay, or all.
    pub(crate) fn new(ceiling: usize, adapts: bool) -> Self {
        let ceiling = ceiling.max(1) as f64;
        Self {
            ceiling,
            adapts,
            limit: if adapts { FIRST.min(ceiling) } else { ceiling },
            phase: Phase::Opening { best: 0.0 },
            round: Round::default(),
            pause: FIRST_PAUSE,
            strain: 0.0,
            shrank: None,
        }
    }

    /// How many requests there may be at once.
    pub(crate) fn limit(&self) -> usize {
        self.limit as usize
    }

    /// A request that carried `bytes` was answered; with it there were `in_flight`. At a `busy` datacenter it had to wait
    /// for others.
    pub(crate) fn acknowledged(&mut self, now: Duration, bytes: u64, in_flight: usize, busy: bool) {
        self.strain *= RELIEF;
        if !self.adapts {
            // Back to what was asked for, one more each round.
            self.limit = (self.limit + 1.0 / self.limit).min(self.ceiling);
            return;
        }
        let Some(began) = self.round.began else {
            self.round = Round { began: Some(now), ..Round::default() };
            return;
        };
        self.round.bytes += bytes;
        self.round.acks += 1.0;
        self.round.waited += f64::from(u8::from(busy));
        self.round.full |= in_flight >= self.limit();
        let took = now.saturating_sub(began);
        if self.round.acks < self.limit.max(MIN_ACKS) || took < MIN_ROUND {
            return;
        }
        let Round { bytes, full, acks, waited, .. } = self.round;
        self.round = Round { began: Some(now), ..Round::default() };
        if waited * 2.0 > acks {
            self.give_way();
        } else if full {
            self.judge(bytes as f64 / took.as_secs_f64());
        }
    }

    /// A request that began at `begun` was refused because there is too much to do.
    pub(crate) fn pushed_back(&mut self, now: Duration, begun: Duration, in_flight: usize) {
        self.shrink(now, begun, (in_flight as f64).min(self.limit) / 2.0);
    }

    /// A request that began at `begun` got no answer.
    pub(crate) fn lost(&mut self, now: Duration, begun: Duration) {
        self.strain += 1.0;
        if self.strain >= STRAIN {
            self.shrink(now, begun, self.limit / STEP);
        }
    }

    /// Most of a round waited for others.
    fn give_way(&mut self) {
        self.limit = (self.limit / STEP).max(self.limit.min(CROWDED));
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.phase = Phase::Steady { rate: None, rounds: self.pause, up: true };
    }

    fn shrink(&mut self, now: Duration, begun: Duration, to: f64) {
        if self.shrank.is_some_and(|at| begun <= at) {
            // Of the same crowd as the one that was answered for already.
            return;
        }
        self.limit = to.max(1.0);
        self.shrank = Some(now);
        self.strain = 0.0;
        self.round = Round::default();
        self.phase = Phase::Steady { rate: None, rounds: self.pause, up: true };
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// A round had this rate.
    fn judge(&mut self, rate: f64) {
        self.phase = match self.phase {
            Phase::Opening { best } if rate > best * DOUBLED && self.limit < self.ceiling => {
                self.limit = (self.limit * 2.0).min(self.ceiling);
                Phase::Opening { best: rate }
            }
            Phase::Opening { best } => {
                if rate <= best * DOUBLED {
                    self.limit = (self.limit / 2.0).max(1.0);
                }
                self.steady(rate.max(best))
            }
            Phase::Steady { rate: known, rounds, up } => {
                let known = known.map_or(rate, |known| known + FRESH * (rate - known));
                if rounds > 1 {
                    Phase::Steady { rate: Some(known), rounds: rounds - 1, up }
                } else {
                    self.begin_trial(known, up)
                }
            }
            Phase::Trial { from, rate: known, up, mixed: true } => {
                Phase::Trial { from, rate: known, up, mixed: false }
            }
            Phase::Trial { from, rate: known, up, mixed: false } => {
                let pays = if up { rate > known * MORE } else { rate >= known * FEWER };
                if pays {
                    self.pause = FIRST_PAUSE;
                    Phase::Steady { rate: Some(rate), rounds: self.pause, up }
                } else {
                    self.limit = from;
                    self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                    Phase::Steady { rate: Some(known), rounds: self.pause, up: !up }
                }
            }
        };
    }

    fn steady(&self, rate: f64) -> Phase {
        Phase::Steady { rate: Some(rate), rounds: self.pause, up: true }
    }

    fn begin_trial(&mut self, rate: f64, up: bool) -> Phase {
        let from = self.limit;
        let tried = |up: bool| match up {
            true => (from * STEP).ceil().min(self.ceiling),
            false => (from / STEP).floor().max(1.0),
        };
        let up = if tried(up) == from { !up } else { up };
        if tried(up) == from {
            return self.steady(rate);
        }
        self.limit = tried(up);
        Phase::Trial { from, rate, up, mixed: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = (1 << 20) as f64;
    const BODY: f64 = 8.0 * MIB;

    /// A link to a server, and what becomes of requests on it.
    #[derive(Clone, Copy)]
    struct Link {
        /// Bytes a second that all have together, and that one can have.
        whole: f64,
        each: f64,
        /// Milliseconds there and back.
        round_trip: u64,
        /// Requests that the server takes at once; it refuses others, to come back after a second.
        takes: usize,
        /// Requests that it receives at once; others wait, and are told so.
        turns: usize,
        /// Of a thousand requests so many are lost, and nothing moves while there are more than `breaks_over`.
        loses: u64,
        breaks_over: usize,
    }

    const CLEAN: Link = Link {
        whole: 100.0 * MIB,
        each: 100.0 * MIB,
        round_trip: 1,
        takes: usize::MAX,
        turns: usize::MAX,
        loses: 0,
        breaks_over: usize::MAX,
    };

    struct Outcome {
        /// Bytes a second in the second half.
        rate: f64,
        refused: u64,
        lost: u64,
        answered: u64,
        limit: usize,
        most: usize,
    }

    struct Request {
        begun: u64,
        left: f64,
        is_lost: bool,
        waited: bool,
    }

    /// A client that always has something to send, for this many seconds in steps of a millisecond.
    fn run(link: Link, mut concurrency: Concurrency, secs: u64) -> Outcome {
        let ms = Duration::from_millis;
        let mut out = Outcome { rate: 0.0, refused: 0, lost: 0, answered: 0, limit: 0, most: 0 };
        let mut flying: Vec<Request> = Vec::new();
        let (mut rests_until, mut dice) = (0, 1_u64);
        for now in 0..secs * 1000 {
            while now >= rests_until && flying.len() < concurrency.limit() {
                // A generator of Knuth's: the same run each time.
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let is_lost = (dice >> 33) % 1000 < link.loses;
                let waited = flying.len() >= link.turns;
                flying.push(Request { begun: now, left: BODY, is_lost, waited });
            }
            out.most = out.most.max(flying.len());
            let crowd = flying.len();
            let mut at = 0;
            let sending = flying.iter().filter(|r| now >= r.begun + link.round_trip).count().max(1);
            while at < flying.len() {
                let in_flight = flying.len();
                let request = &mut flying[at];
                let waited = now - request.begun;
                let over = if waited < link.round_trip {
                    None
                } else if waited == link.round_trip && at >= link.takes {
                    out.refused += 1;
                    concurrency.pushed_back(ms(now), ms(request.begun), in_flight);
                    rests_until = now + 1000;
                    Some(())
                } else if waited > link.round_trip + 5000 {
                    out.lost += 1;
                    concurrency.lost(ms(now), ms(request.begun));
                    Some(())
                } else {
                    if crowd <= link.breaks_over {
                        request.left -= (link.whole / sending as f64).min(link.each) / 1000.0;
                    }
                    (request.left <= 0.0 && !request.is_lost).then(|| {
                        out.answered += 1;
                        out.rate += if now >= secs * 500 { BODY } else { 0.0 };
                        concurrency.acknowledged(ms(now), BODY as u64, in_flight, request.waited);
                    })
                };
                match over {
                    Some(()) => drop(flying.remove(at)),
                    None => at += 1,
                }
            }
        }
        out.rate /= secs as f64 / 2.0;
        out.limit = concurrency.limit();
        out
    }

    fn auto() -> Concurrency {
        Concurrency::new(32, true)
    }

    #[test]
    fn a_long_link_is_filled() {
        // Each connection has a window of 2 MiB: one carries a twelfth of the link.
        let link = Link { each: 100.0 * MIB / 12.0, round_trip: 240, ..CLEAN };
        let out = run(link, auto(), 60);
        // Twice as many would bring a tenth more: that is where it stops.
        assert!(out.rate > 0.75 * link.whole, "{:.1} MiB/s with {}", out.rate / MIB, out.limit);
        let four = run(link, Concurrency::new(4, false), 60);
        assert!(out.rate > 2.5 * four.rate, "four carry {:.1} MiB/s", four.rate / MIB);
    }

    #[test]
    fn no_more_are_used_than_pay() {
        // One connection fills it.
        let out = run(CLEAN, auto(), 60);
        assert!(out.rate > 0.95 * CLEAN.whole, "{:.1} MiB/s", out.rate / MIB);
        assert!(out.limit <= 4 && out.most <= 8, "{} in the end, {} at most", out.limit, out.most);
    }

    #[test]
    fn a_link_that_becomes_shorter_is_given_back() {
        let mut concurrency = auto();
        concurrency.limit = 32.0;
        concurrency.phase = Phase::Steady { rate: None, rounds: 1, up: true };
        let out = run(CLEAN, concurrency, 120);
        assert!(out.limit <= 8, "{} in the end", out.limit);
        assert!(out.rate > 0.95 * CLEAN.whole);
    }

    #[test]
    fn a_server_that_is_full_is_left_alone_when_it_asks_and_then_used_as_far_as_it_goes() {
        let link = Link { each: 10.0 * MIB, takes: 6, ..CLEAN };
        let out = run(link, auto(), 120);
        let most = 6.0 * link.each;
        assert!(out.rate > 0.5 * most, "{:.1} of {:.1} MiB/s with {}", out.rate / MIB, most / MIB, out.limit);
        assert!(out.refused * 10 < out.answered, "{} refused, {} answered", out.refused, out.answered);
        assert!(out.limit <= 9, "{}", out.limit);
    }

    #[test]
    fn where_requests_wait_for_each_other_room_is_made() {
        // More would carry more, and take it from whom the others belong to.
        let link = Link { each: 5.0 * MIB, turns: 8, ..CLEAN };
        for first in [4.0, 32.0] {
            let mut concurrency = auto();
            concurrency.limit = first;
            concurrency.phase = Phase::Steady { rate: None, rounds: 1, up: true };
            let out = run(link, concurrency, 120);
            assert!((4..=24).contains(&out.limit), "{}", out.limit);
            assert!(out.rate > 4.0 * link.each, "{:.1} MiB/s with {}", out.rate / MIB, out.limit);
        }
        let mut concurrency = auto();
        concurrency.limit = 32.0;
        for now in 0..1000 {
            concurrency.acknowledged(Duration::from_millis(10 * now), 1, 32, true);
        }
        assert_eq!(concurrency.limit(), 2);
    }

    #[test]
    fn losses_shrink_it_and_chance_does_not_starve_it() {
        let link = Link { each: 10.0 * MIB, round_trip: 50, loses: 20, ..CLEAN };
        let out = run(link, auto(), 120);
        assert!(
            out.lost > 0 && out.rate > 0.3 * link.whole,
            "{:.1} MiB/s with {}",
            out.rate / MIB,
            out.limit
        );
        // A line that breaks down under more than ten is not kept broken.
        let fragile = Link { each: 8.0 * MIB, breaks_over: 10, ..CLEAN };
        let out = run(fragile, auto(), 120);
        assert!(out.limit <= 12, "{}", out.limit);
        assert!(out.rate > 0.5 * 10.0 * fragile.each, "{:.1} MiB/s", out.rate / MIB);
    }

    #[test]
    fn one_crowd_shrinks_it_once_and_one_is_always_left() {
        let mut concurrency = Concurrency::new(16, false);
        assert_eq!(concurrency.limit(), 16);
        let ms = Duration::from_millis;
        for _ in 0..8 {
            concurrency.pushed_back(ms(100), ms(10), 16);
        }
        assert_eq!(concurrency.limit(), 8);
        concurrency.lost(ms(500), ms(450));
        assert_eq!(concurrency.limit(), 8, "one loss is chance");
        for round in 1..20 {
            concurrency.lost(ms(1000 * round), ms(1000 * round - 1));
        }
        assert_eq!(concurrency.limit(), 1);
        for _ in 0..1000 {
            concurrency.acknowledged(ms(30_000), 1, 1, false);
        }
        assert_eq!(concurrency.limit(), 16, "what was asked for, and no more");
    }

    #[test]
    fn the_same_run_decides_the_same() {
        let link = Link { each: 10.0 * MIB, round_trip: 50, loses: 20, takes: 20, ..CLEAN };
        let (one, two) = (run(link, auto(), 20), run(link, auto(), 20));
        assert_eq!((one.answered, one.limit, one.refused), (two.answered, two.limit, two.refused));
    }
}
