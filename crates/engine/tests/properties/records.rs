//! The metadata record when whoever took it has gone: who is asked for it, and what a client that brings it again makes
//! of the file.

use sluice_engine::aggregator::{Aggregator, Config, Effect, Event, NodeEvent, NodeMemory, RecordSummary};
use sluice_engine::command::{Command, Statement};
use sluice_engine::hash::RecordDigest;
use sluice_engine::ids::{DcId, FileId, Incarnation, Sequence, Timestamp};
use sluice_engine::ledger::Claim;
use sluice_engine::span::Span;

use crate::world::{TENANT, chunk, claim, dc, file_id, shape, value};

const TAKEOVER_MS: u64 = 600_000;

/// Datacenter 2 of three, linked to those that are up, which has heard of one file.
struct Two {
    agg: Aggregator,
    now: u64,
    heard: u32,
    /// Who was asked for the record, and when.
    asked: Vec<(u64, DcId)>,
    /// What it said to others.
    said: Vec<(DcId, Statement)>,
    /// How often it asked its own store what is there.
    recounts: usize,
}

fn file() -> FileId {
    file_id(1)
}

fn record() -> RecordSummary {
    let digest = RecordDigest::from_bytes([1; 32]);
    RecordSummary { tenant: TENANT, size: Some(shape(4)), digest, expected_root: None, expiry_ms: None }
}

fn meta(claim: Claim) -> Statement {
    let RecordSummary { tenant, size, digest, .. } = record();
    Statement::Meta { epoch: claim.epoch, home: claim.home, size, tenant, digest }
}

impl Two {
    fn new() -> Self {
        let config = Config { takeover_ms: Some(TAKEOVER_MS), ..Config::new(dc(2), [dc(1), dc(3)]) };
        let (mut agg, _) = Aggregator::start(config, NodeMemory::default(), Timestamp::new(0));
        agg.handle(NodeEvent::AllLoaded, Timestamp::new(0));
        let mut this =
            Self { agg, now: 1_000_000, heard: 0, asked: Vec::new(), said: Vec::new(), recounts: 0 };
        [1, 3].into_iter().for_each(|peer| this.link(peer));
        this
    }

    fn link(&mut self, peer: u16) {
        let (incarnation, seen_of_me) = (Incarnation::new(1), Incarnation::new(0));
        self.feed(NodeEvent::LinkUp { peer: dc(peer), incarnation, seen_of_me });
    }

    fn feed(&mut self, event: NodeEvent) {
        for effect in self.agg.handle(event, Timestamp::new(self.now)) {
            match effect {
                Effect::FetchRecord { from, .. } => self.asked.push((self.now, from)),
                Effect::Send(command) => self.said.push((command.to, command.statement)),
                Effect::Restate { to, .. } if to == dc(2) => self.recounts += 1,
                _ => {}
            }
        }
    }

    fn happens(&mut self, event: Event) {
        self.feed(NodeEvent::File(file(), event));
    }

    fn hear(&mut self, from: u16, statement: Statement) {
        self.heard += 1;
        let command = Command {
            from: dc(from),
            to: dc(2),
            sequence: Sequence::of(Incarnation::new(1), self.heard),
            slot: file().slot(),
            sent_at: Timestamp::new(self.now),
            file: file(),
            statement,
        };
        self.feed(NodeEvent::Received(command.trusted()));
    }

    /// Lets time pass, in which nobody has the record.
    fn pass(&mut self, ms: u64) {
        let end = self.now + ms;
        while let Some(at) = self.agg.next_timeout().filter(|at| at.number() <= end) {
            self.now = at.number().max(self.now + 1);
            let before = self.asked.len();
            self.feed(NodeEvent::Tick);
            if self.asked.len() > before {
                self.happens(Event::FetchFailed);
            }
        }
        self.now = end;
    }

    fn claim(&self) -> Option<Claim> {
        self.agg.file(file()).and_then(|file| file.ledger().claim())
    }
}

/// A file of which chunks are here, and the home of which has died before it gave its record to anybody.
fn bereft(home: u16) -> Two {
    let mut two = Two::new();
    two.hear(home, meta(claim(0, home)));
    let generation = two.agg.generation(file());
    two.happens(Event::Stored { generation, spans: vec![Span::new(chunk(0), value(0, 0))] });
    assert_eq!(two.asked.last(), Some(&(two.now, dc(home))), "the home is asked first");
    two.feed(NodeEvent::LinkDown { peer: dc(home) });
    two.happens(Event::FetchFailed);
    two
}

#[test]
fn while_the_home_is_gone_only_those_are_asked_that_can_be() {
    let mut two = bereft(1);
    two.asked.clear();
    two.pass(60_000);
    assert!(two.asked.len() > 2 && two.asked.iter().all(|(_, from)| *from == dc(3)), "{:?}", two.asked);
}

#[test]
fn whoever_speaks_of_a_file_is_asked_for_its_record_at_once() {
    let mut two = bereft(1);
    two.pass(300_000);
    // It says nothing that was not known, but that it knows the file, too.
    two.asked.clear();
    two.hear(3, meta(claim(0, 1)));
    assert_eq!(two.asked, [(two.now, dc(3))]);
}

#[test]
fn a_client_that_brings_the_record_again_makes_this_the_home_if_it_ranks_above_the_one_that_is_gone() {
    let mut two = bereft(1);
    two.said.clear();
    two.happens(Event::Created { record: record(), home: dc(2) });
    assert_eq!(two.claim(), Some(claim(0, 2)));
    assert!(two.said.contains(&(dc(3), meta(claim(0, 2)))), "the others hear of it: {:?}", two.said);
    // The old home comes back, and says what it has said before.
    two.link(1);
    two.hear(1, meta(claim(0, 1)));
    assert_eq!(two.claim(), Some(claim(0, 2)));
    assert!(two.said.contains(&(dc(1), meta(claim(0, 2)))), "and so does it: {:?}", two.said);
}

#[test]
fn a_client_that_brings_the_record_again_lets_this_take_over_from_a_home_that_ranks_above() {
    for names_the_home in [false, true] {
        let mut two = bereft(3);
        two.pass(TAKEOVER_MS * 3);
        assert_eq!(two.claim(), Some(claim(0, 3)), "without its record nobody takes a file over");
        let home = if names_the_home { dc(3) } else { dc(2) };
        let mut two = bereft(3);
        two.happens(Event::Created { record: record(), home });
        assert_eq!(two.claim(), Some(claim(0, 3)));
        two.pass(TAKEOVER_MS * 3);
        assert_eq!(two.claim(), Some(claim(1, 2)));
        two.link(3);
        two.hear(3, meta(claim(0, 3)));
        assert_eq!(two.claim(), Some(claim(1, 2)));
        assert!(two.said.contains(&(dc(3), meta(claim(1, 2)))), "{:?}", two.said);
    }
}

#[test]
fn a_chunk_that_was_on_its_way_when_the_record_came_is_found() {
    let mut two = Two::new();
    two.happens(Event::StoredOrphan { tenant: TENANT, chunks: 0..1 });
    two.happens(Event::Created { record: record(), home: dc(2) });
    two.recounts = 0;
    two.happens(Event::StoredOrphan { tenant: TENANT, chunks: 1..2 });
    assert!(two.recounts > 0, "its own store is asked what is there");
}
