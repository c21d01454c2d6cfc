//! The plan of an upload: which chunks go next, and to which URL.
//!
//! The file falls into aligned stripes; a stripe belongs to one URL for as long as that answers. Stripes are opened
//! one at a time, so that a plan for the largest file takes no more memory than one for a small one. Chunks that
//! are held already stay in the plan: they are read and hashed for the root, but not sent.

use std::collections::VecDeque;
use std::ops::Range;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use sluice_engine::geometry::Geometry;
use sluice_engine::limits::MAX_RUN;
use sluice_engine::placement;

use crate::chunk_set::ChunkSet;

/// Stripes that are shuffled among each other: more would have to be kept in memory.
const SHUFFLE_WINDOW: u64 = 4096;

/// In which order chunks are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// From the first to the last.
    #[default]
    Ascending,
    /// Stripes shuffled, 4,096 at a time.
    Shuffled {
        /// The same seed gives the same order of stripes.
        seed: u64,
        /// Whether the requests inside a stripe are shuffled too.
        inside: bool,
    },
}

/// 1, 2, 4 or 8 chunks to read, hash, and perhaps send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    /// The chunks.
    pub(crate) chunks: Range<u64>,
    /// Whether they are to be sent.
    pub(crate) send: bool,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// This, at this URL.
    Job {
        /// The URL.
        url: usize,
        /// What.
        job: Job,
    },
    /// Nothing at any of these URLs now; others may give work back.
    Wait,
    /// All work is given out.
    Done,
}

/// The work that is left, by URL.
#[derive(Debug)]
pub(crate) struct Plan {
    file: Geometry,
    held: ChunkSet,
    /// Whether held chunks are jobs too: read and hashed, not sent.
    reads_held: bool,
    stripe_level: u8,
    stripes: u64,
    /// The next stripes to open, in reverse; refilled from `drawn` on.
    window: Vec<u64>,
    drawn: u64,
    order: Order,
    rng: StdRng,
    lanes: Vec<Lane>,
    /// What URLs that failed gave back.
    returned: VecDeque<VecDeque<Job>>,
    /// Jobs that were given out and not settled.
    out: usize,
}

/// Where work is looked for: first as it should be, then with URLs that cannot be asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    Own,
    Stranded,
}

#[derive(Debug, Default)]
struct Lane {
    open: VecDeque<VecDeque<Job>>,
    /// Chunks given to this URL so far.
    given: u64,
}

impl Plan {
    /// A plan over all chunks, of which `held` need no sending, for this many URLs.
    pub(crate) fn new(file: Geometry, held: ChunkSet, urls: usize, order: Order) -> Self {
        let stripe_level = placement::stripe_level(file, urls);
        let seed = match order {
            Order::Ascending => 0,
            Order::Shuffled { seed, .. } => seed,
        };
        Self {
            file,
            held,
            reads_held: true,
            stripe_level,
            stripes: file.chunks().div_ceil(1 << stripe_level),
            window: Vec::new(),
            drawn: 0,
            order,
            rng: StdRng::seed_from_u64(seed),
            lanes: (0..urls).map(|_| Lane::default()).collect(),
            returned: VecDeque::new(),
            out: 0,
        }
    }

    /// Begins anew with all that is not held; what is held is not even read again.
    pub(crate) fn refill(&mut self, held: ChunkSet) {
        let order = self.order;
        *self = Self { reads_held: false, ..Self::new(self.file, held, self.lanes.len(), order) };
    }

    /// What to do next, given the URLs worth asking and how busy each is. A job given out must come back through
    /// [`settled`](Self::settled) or [`give_back`](Self::give_back).
    pub(crate) fn next(&mut self, usable: &[(usize, usize)]) -> Next {
        // The least busy first; of equals the one that was given least, so that every datacenter gets some.
        let mut urls = usable.to_vec();
        urls.sort_by_key(|(url, in_flight)| (*in_flight, self.lanes[*url].given));
        for round in [Round::Own, Round::Stranded] {
            if round == Round::Stranded {
                self.reclaim(&urls);
            }
            for (url, _) in &urls {
                if let Some(job) = self.next_at(*url) {
                    self.lanes[*url].given += job.chunks.end - job.chunks.start;
                    self.out += 1;
                    return Next::Job { url: *url, job };
                }
            }
        }
        if self.out == 0 && self.is_drained() { Next::Done } else { Next::Wait }
    }

    /// A job is done for good.
    pub(crate) fn settled(&mut self) {
        self.out = self.out.saturating_sub(1);
    }

    /// A job failed at this URL: it and all that was left of its stripes go to whoever asks next.
    pub(crate) fn give_back(&mut self, url: usize, job: Job) {
        self.settled();
        let lane = &mut self.lanes[url];
        self.returned.push_front(VecDeque::from([job]));
        self.returned.extend(lane.open.drain(..).filter(|stripe| !stripe.is_empty()));
    }

    /// Takes what URLs hold that nobody may ask now: one that is being tried again, for instance.
    fn reclaim(&mut self, usable: &[(usize, usize)]) {
        for (url, lane) in self.lanes.iter_mut().enumerate() {
            if usable.iter().all(|(other, _)| *other != url) {
                self.returned.extend(lane.open.drain(..).filter(|stripe| !stripe.is_empty()));
            }
        }
    }

    fn is_drained(&self) -> bool {
        self.returned.is_empty()
            && self.window.is_empty()
            && self.drawn == self.stripes
            && self.lanes.iter().all(|lane| lane.open.iter().all(VecDeque::is_empty))
    }

    fn next_at(&mut self, url: usize) -> Option<Job> {
        loop {
            while let Some(stripe) = self.lanes[url].open.front_mut() {
                match stripe.pop_front() {
                    Some(job) => return Some(job),
                    None => {
                        self.lanes[url].open.pop_front();
                    }
                }
            }
            let stripe = match self.returned.pop_front() {
                Some(stripe) => stripe,
                None => self.open_stripe()?,
            };
            self.lanes[url].open.push_back(stripe);
        }
    }

    fn open_stripe(&mut self) -> Option<VecDeque<Job>> {
        if self.window.is_empty() {
            let end = self.stripes.min(self.drawn.saturating_add(SHUFFLE_WINDOW));
            self.window = (self.drawn..end).rev().collect();
            self.drawn = end;
            match self.order {
                Order::Ascending => {}
                Order::Shuffled { .. } => self.window.shuffle(&mut self.rng),
            }
        }
        let stripe = self.window.pop()?;
        let start = stripe << self.stripe_level;
        let end = (start + (1 << self.stripe_level)).min(self.file.chunks());
        let mut jobs = Vec::new();
        for (part, held) in self.held.cut(start..end) {
            if self.reads_held || !held {
                jobs.extend(runs(part).map(|chunks| Job { chunks, send: !held }));
            }
        }
        match self.order {
            Order::Ascending | Order::Shuffled { inside: false, .. } => {}
            Order::Shuffled { inside: true, .. } => jobs.shuffle(&mut self.rng),
        }
        Some(jobs.into())
    }
}

/// Cuts chunks into the fewest aligned runs of 1, 2, 4 or 8.
pub(crate) fn runs(chunks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = chunks.start;
    std::iter::from_fn(move || {
        if at >= chunks.end {
            return None;
        }
        let mut count = u64::from(MAX_RUN);
        while !at.is_multiple_of(count) || at + count > chunks.end {
            count /= 2;
        }
        let run = at..at + count;
        at = run.end;
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_engine::limits::CHUNK_LEN;

    fn has(set: &ChunkSet, chunk: u64) -> bool {
        set.ranges().any(|range| range.contains(&chunk))
    }

    fn plan(chunks: u64, held: ChunkSet, urls: usize, order: Order) -> Plan {
        Plan::new(Geometry::new(chunks * CHUNK_LEN).unwrap(), held, urls, order)
    }

    fn drain(plan: &mut Plan, usable: &[(usize, usize)]) -> Vec<(usize, Job)> {
        let mut all = Vec::new();
        loop {
            match plan.next(usable) {
                Next::Job { url, job } => {
                    plan.settled();
                    all.push((url, job));
                }
                Next::Done => return all,
                Next::Wait => panic!("nothing is out"),
            }
        }
    }

    #[test]
    fn every_chunk_comes_once_in_every_order_and_every_url_gets_some() {
        for order in [Order::Ascending, Order::Shuffled { seed: 7, inside: true }] {
            for chunks in [1, 2, 5, 64, 130, 257] {
                let mut held = ChunkSet::new();
                held.insert(3..4);
                held.insert(60..77);
                let jobs = drain(&mut plan(chunks, held.clone(), 2, order), &[(0, 0), (1, 0)]);
                let mut seen = ChunkSet::new();
                for (_, job) in &jobs {
                    let len = job.chunks.end - job.chunks.start;
                    assert!(len.is_power_of_two() && len <= 8 && job.chunks.start.is_multiple_of(len));
                    for chunk in job.chunks.clone() {
                        assert!(!has(&seen, chunk));
                        assert_eq!(job.send, !has(&held, chunk));
                    }
                    seen.insert(job.chunks.clone());
                }
                assert_eq!(seen.len(), chunks);
                if chunks > 1 {
                    assert!(jobs.iter().any(|(url, _)| *url == 0) && jobs.iter().any(|(url, _)| *url == 1));
                }
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_order() {
        let order = Order::Shuffled { seed: 42, inside: true };
        let first = drain(&mut plan(300, ChunkSet::new(), 2, order), &[(0, 0)]);
        let again = drain(&mut plan(300, ChunkSet::new(), 2, order), &[(0, 0)]);
        assert_eq!(first, again);
        assert_ne!(first, drain(&mut plan(300, ChunkSet::new(), 2, Order::Ascending), &[(0, 0)]));
    }

    #[test]
    fn a_failed_url_gives_its_stripe_to_another() {
        let mut plan = plan(256, ChunkSet::new(), 2, Order::Ascending);
        let Next::Job { url: 1, job } = plan.next(&[(1, 0)]) else { panic!("a job at 1") };
        assert_eq!(job.chunks, 0..8);
        plan.give_back(1, job);
        let Next::Job { url: 0, job } = plan.next(&[(0, 0)]) else { panic!("a job at 0") };
        assert_eq!(job.chunks, 0..8);
        let Next::Job { url: 0, job } = plan.next(&[(0, 1)]) else { panic!("a job at 0") };
        assert_eq!(job.chunks, 8..16);
        assert_eq!(plan.next(&[]), Next::Wait);
    }

    #[test]
    fn the_largest_file_is_planned_lazily() {
        let file = Geometry::new(sluice_engine::limits::MAX_FILE_LEN).unwrap();
        let mut plan = Plan::new(file, ChunkSet::new(), 2, Order::Shuffled { seed: 1, inside: false });
        assert!(matches!(plan.next(&[(0, 0)]), Next::Job { .. }));
        assert!(plan.window.len() < SHUFFLE_WINDOW as usize);
    }
}
