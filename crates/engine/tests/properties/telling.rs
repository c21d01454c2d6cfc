//! What a holder says to a home: few commands for many chunks, and never more under way than there is room for.

use std::collections::BTreeMap;

use sluice_engine::aggregator::{Aggregator, Config, Effect, Event, NodeEvent, NodeMemory};
use sluice_engine::command::{Command, Kind, Statement};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::RecordDigest;
use sluice_engine::ids::{FileId, HomeEpoch, Incarnation, Sequence, Timestamp};
use sluice_engine::ranges::Ranges;
use sluice_engine::span::Span;

use crate::world::{TENANT, chunk, dc, file_id, shape, value};

/// A holder, and a home that answers after a while.
struct Holder {
    agg: Aggregator,
    now: u64,
    /// What the home answers, and when.
    answers: BTreeMap<(u64, Sequence), ()>,
    /// Sent and neither answered nor due again.
    flying: BTreeMap<Sequence, u64>,
    said: BTreeMap<FileId, Ranges>,
    haves: u64,
    most_flying: usize,
    round_trip: u64,
    answering: bool,
    counter: u32,
}

impl Holder {
    fn new(max_flights: usize, round_trip: u64) -> Self {
        let config = Config { max_flights, ..Config::new(dc(2), [dc(1)]) };
        let (mut agg, _) = Aggregator::start(config, NodeMemory::default(), Timestamp::new(0));
        agg.handle(NodeEvent::AllLoaded, Timestamp::new(0));
        let mut this = Self {
            agg,
            now: 1_000_000,
            answers: BTreeMap::new(),
            flying: BTreeMap::new(),
            said: BTreeMap::new(),
            haves: 0,
            most_flying: 0,
            round_trip,
            answering: true,
            counter: 0,
        };
        let (incarnation, seen_of_me) = (Incarnation::new(1), Incarnation::new(0));
        this.feed(NodeEvent::LinkUp { peer: dc(1), incarnation, seen_of_me });
        this
    }

    fn feed(&mut self, event: NodeEvent) {
        let resend_ms = self.agg.config().resend_ms;
        let effects = self.agg.handle(event, Timestamp::new(self.now));
        self.flying.retain(|_, sent| self.now - *sent < resend_ms);
        for effect in effects {
            let Effect::Send(command) = effect else { continue };
            // Answers and questions are not kept until they are acknowledged.
            let answer = matches!(command.statement, Statement::HaveNothing { .. } | Statement::Unknown);
            if answer || matches!(command.statement.kind(), Kind::WantFiles | Kind::Ack | Kind::MetaRequest) {
                continue;
            }
            if let Statement::Have { span, .. } = command.statement {
                self.haves += 1;
                let file = self.agg.file(command.file).unwrap().ledger().file().unwrap();
                self.said.entry(command.file).or_default().insert(span.place.range(file));
            }
            self.flying.insert(command.sequence, self.now);
            self.most_flying = self.most_flying.max(self.flying.len());
            if self.answering {
                self.answers.insert((self.now + self.round_trip, command.sequence), ());
            }
        }
        assert!(self.flying.len() <= self.agg.config().max_flights, "{} under way", self.flying.len());
    }

    fn hear(&mut self, file: FileId, statement: Statement) {
        self.counter += 1;
        let command = Command {
            from: dc(1),
            to: dc(2),
            sequence: Sequence::of(Incarnation::new(1), self.counter),
            slot: file.slot(),
            sent_at: Timestamp::new(self.now),
            file,
            statement,
        };
        self.feed(NodeEvent::Received(command.trusted()));
    }

    fn meta(&mut self, file: FileId, size: Geometry) {
        let digest = RecordDigest::from_bytes([1; 32]);
        let (epoch, home) = (HomeEpoch::new(0), dc(1));
        self.hear(file, Statement::Meta { epoch, home, size: Some(size), tenant: TENANT, digest });
    }

    fn stored(&mut self, file: FileId, index: u64) {
        let generation = sluice_engine::ids::Generation::floor_of(self.agg.incarnation());
        let spans = vec![Span::new(chunk(index), value(index, 0))];
        self.feed(NodeEvent::File(file, Event::Stored { generation, spans }));
    }

    /// Lets time pass, answers and timers included.
    fn until(&mut self, end: u64) {
        loop {
            let timer = self.agg.next_timeout().map(|at| at.number().max(self.now + 1));
            let answer = self.answers.keys().next().map(|(at, _)| *at);
            let Some(at) = timer.into_iter().chain(answer).min().filter(|at| *at <= end) else { break };
            self.now = at.max(self.now);
            match answer.filter(|at| *at <= self.now) {
                Some(_) => {
                    let ((_, sequence), ()) = self.answers.pop_first().unwrap();
                    self.flying.remove(&sequence);
                    self.hear(FileId::NIL, Statement::Ack { sequence, digest: [0; 32] });
                }
                None => self.feed(NodeEvent::Tick),
            }
        }
        self.now = end;
    }
}

/// Chunks of each stripe in any order, stripe by stripe, one every `every_ms`.
fn upload(holder: &mut Holder, file: FileId, chunks: u64, every_ms: u64) {
    let mut random = 12_345u64;
    for stripe in (0..chunks).step_by(64) {
        let mut order: Vec<u64> = (stripe..(stripe + 64).min(chunks)).collect();
        for i in (1..order.len()).rev() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            order.swap(i, (random >> 33) as usize % (i + 1));
        }
        for index in order {
            holder.stored(file, index);
            holder.until(holder.now + every_ms);
        }
    }
    holder.until(holder.now + 5_000);
}

#[test]
fn four_shuffled_stripes_cost_a_handful_of_commands() {
    let file = file_id(1);
    for (every_ms, most) in [(1, 4), (4, 4), (10, 5), (25, 30)] {
        let mut holder = Holder::new(256, 20);
        holder.meta(file, shape(1_000));
        upload(&mut holder, file, 256, every_ms);
        assert!(holder.said[&file].covers(0..256));
        assert!(holder.haves <= most, "{} commands at one chunk in {every_ms} ms", holder.haves);
    }
}

/// A minute and more of chunks without a pause: what is partial is said every few seconds, not with every chunk.
#[test]
fn a_long_upload_costs_stripes_and_not_chunks() {
    let file = file_id(1);
    let mut holder = Holder::new(256, 150);
    holder.meta(file, shape(100_000));
    upload(&mut holder, file, 6_400, 10);
    assert!(holder.said[&file].covers(0..6_400));
    assert!(holder.haves < 500, "{} commands for 100 stripes", holder.haves);
}

#[test]
fn no_more_is_under_way_than_there_is_room_for() {
    let mut holder = Holder::new(16, 20);
    let files: Vec<FileId> = (1..=500).map(file_id).collect();
    for &file in &files {
        holder.meta(file, shape(1_000));
        for index in 0..5 {
            holder.stored(file, index * 2);
        }
    }
    holder.until(holder.now + 20_000);
    assert_eq!(holder.most_flying, 16);
    for file in &files {
        assert!((0..5).all(|i| holder.said[file].covers(i * 2..i * 2 + 1)), "{file} was not told of");
    }
}

/// A home that answers nothing for a minute costs no more than what is under way, and is told everything afterwards.
#[test]
fn a_deaf_home_is_told_later() {
    let mut holder = Holder::new(16, 20);
    holder.answering = false;
    let file = file_id(1);
    holder.meta(file, shape(10_000));
    for index in 0..2_000 {
        holder.stored(file, index * 2);
    }
    holder.until(holder.now + 60_000);
    assert!(holder.haves < 16 * 70, "{} commands", holder.haves);
    holder.answering = true;
    holder.said.clear();
    holder.until(holder.now + 30_000);
    assert!((0..2_000).filter(|i| !holder.said[&file].covers(i * 2..i * 2 + 1)).count() == 0);
}

/// Whoever only asks for files leaves no trace.
#[test]
fn questions_about_unknown_files_cost_no_memory() {
    let mut holder = Holder::new(16, 20);
    for number in 1..2_000 {
        let file = file_id(number);
        holder.hear(file, Statement::MetaRequest);
        holder.hear(file, Statement::Unknown);
        let place = sluice_engine::span::Place::new(0, 3).unwrap();
        holder.hear(file, Statement::WantSpans { place });
        let span = Span::new(chunk(1), value(1, 0));
        holder.hear(file, Statement::Have { generation: crate::world::generation(3), span });
        holder.hear(file, Statement::HaveNothing { generation: crate::world::generation(3) });
        holder.feed(NodeEvent::File(file, Event::Wanted));
    }
    assert_eq!(holder.agg.files().count(), 0);
}
