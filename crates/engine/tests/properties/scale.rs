//! The ledger of a very large file stays small.

use sluice_engine::aggregator::{Aggregator, Config, Effect, Event, NodeEvent, NodeMemory, RecordSummary};
use sluice_engine::command::{Command, Statement};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ids::{DcId, Incarnation, Sequence, Timestamp};
use sluice_engine::ledger::{Fact, FileState, Ledger, Verdict};
use sluice_engine::limits::{CHUNK_LEN, MAX_FILE_LEN, SEGMENT_CHUNKS, STRIPE_LEVEL};
use sluice_engine::rules::Rules;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::SpanTree;

use crate::world::{TENANT, claim, dc, file_id, generation, value};

/// Numbers from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// The places of a level in order, but shuffled within each window: as stripes come from a fast client.
fn windowed(file: Geometry, level: u8, window: u64) -> impl Iterator<Item = Place> {
    let places = file.chunks().div_ceil(1 << level);
    let mut random = Random(7);
    (0..places.div_ceil(window)).flat_map(move |block| {
        let mut order: Vec<u64> = (block * window..((block + 1) * window).min(places)).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i as u64 + 1) as usize);
        }
        order.into_iter().map(move |i| Place::clipped(i << level, level, file))
    })
}

fn span_of(place: Place) -> Span {
    Span::new(place, value(place.start(), u64::from(place.level())))
}

fn root_of(file: Geometry, level: u8) -> Root {
    let mut tree = SpanTree::new(file);
    let len = 1u64 << level;
    for start in (0..file.chunks()).step_by(len as usize) {
        tree.insert(span_of(Place::clipped(start, level, file))).unwrap();
    }
    tree.root().unwrap()
}

/// The home's aggregator, with all stripes of a file from itself and two others.
#[test]
fn a_home_keeps_a_window_and_not_the_file() {
    let tebibytes: u64 = if cfg!(debug_assertions) { 1 } else { 64 };
    let file = Geometry::new((tebibytes << 40) - 5).unwrap();
    const WINDOW: usize = 2_500;
    let (me, id, now) = (dc(1), file_id(1), Timestamp::new(1));
    let config = Config::new(me, [dc(2), dc(3)]);
    let (mut home, _) = Aggregator::start(config, NodeMemory::default(), now);
    home.handle(NodeEvent::AllLoaded, now);
    let record = RecordSummary {
        digest: RecordDigest::from_bytes([1; 32]),
        tenant: TENANT,
        size: Some(file),
        expected_root: None,
        expiry_ms: None,
    };
    home.handle(NodeEvent::File(id, Event::Created { record, home: me }), now);
    let mine = home.incarnation();
    let mut pages = 0;
    let mut most = 0;
    for (count, place) in windowed(file, STRIPE_LEVEL, WINDOW as u64).enumerate() {
        // Which datacenter has a stripe is mixed, too.
        let holder = 1 + (place.start() >> STRIPE_LEVEL) % 3;
        let span = span_of(place);
        let event = if holder == 1 {
            let generation = sluice_engine::ids::Generation::floor_of(mine);
            NodeEvent::File(id, Event::Stored { generation, spans: vec![span] })
        } else {
            let command = Command {
                from: DcId::new(holder as u16),
                to: me,
                sequence: Sequence::of(Incarnation::new(1), count as u32),
                slot: id.slot(),
                sent_at: now,
                file: id,
                statement: Statement::Have { generation: generation(1), span },
            };
            NodeEvent::Received(command.trusted())
        };
        let effects = home.handle(event, now);
        pages += effects.iter().filter(|effect| matches!(effect, Effect::StorePage(..))).count();
        let loads = effects.iter().filter(|effect| matches!(effect, Effect::LoadPage(..))).count();
        if home.file(id).unwrap().state() == FileState::Receiving {
            assert_eq!(loads, 0, "nothing is read back before the file is complete");
        }
        let spans = home.file(id).unwrap().ledger().spans();
        most = most.max(spans);
        assert!(spans < 2 * (WINDOW + 2 * 1_024), "{spans} spans after {count} stripes");
    }
    let ledger = home.file(id).unwrap().ledger();
    assert_eq!(ledger.root(), Some(root_of(file, STRIPE_LEVEL)));
    assert_eq!(pages as u64, file.chunks().div_ceil(SEGMENT_CHUNKS));
    println!("{tebibytes} TiB: {pages} pages, at most {most} spans in memory, {} at the end", ledger.spans());
}

/// The largest file there is, in larger spans, through the ledger alone.
#[test]
fn the_largest_file_is_a_window_and_a_summary_of_each_segment() {
    const LEVEL: u8 = 14;
    const WINDOW: usize = 256;
    let size = if cfg!(debug_assertions) { 1 << 50 } else { MAX_FILE_LEN };
    let file = Geometry::new(size - CHUNK_LEN / 2).unwrap();
    let mut ledger = Ledger::new(Rules::all());
    let digest = RecordDigest::from_bytes([1; 32]);
    ledger.take(Fact::Meta { claim: claim(0, 1), size: Some(file), tenant: TENANT, digest }).unwrap();
    let mut most = 0;
    for place in windowed(file, LEVEL, WINDOW as u64) {
        let holder = dc(1 + ((place.start() >> LEVEL) % 3) as u16);
        ledger.take(Fact::Have { holder, generation: generation(1), span: span_of(place) }).unwrap();
        let _ = ledger.page_out(place.start() / SEGMENT_CHUNKS);
        most = most.max(ledger.spans());
    }
    assert!(most < 6 * WINDOW, "{most} spans");
    assert_eq!(ledger.verdict(), Verdict::Whole(root_of(file, LEVEL)));
    println!("{} PiB: at most {most} spans in memory, {} pages", size >> 50, ledger.paged().count());
}

/// Judging whose bytes contradict a root does not try every combination over every chunk.
#[test]
fn resolving_a_large_file_costs_little_more_than_hashing_it_once() {
    let chunks: u64 = if cfg!(debug_assertions) { 1 << 14 } else { 1 << 20 };
    let file = crate::world::shape(chunks);
    let right: Vec<ChainingValue> = (0..chunks).map(|i| value(i, 0)).collect();
    let mut own = right.clone();
    own[77] = value(77, 1);
    let mut tree = SpanTree::new(file);
    for place in Place::tile(0..chunks, 10, file) {
        tree.insert(crate::world::span(file, place, &right)).unwrap();
    }
    // Seven liars, and one who is right.
    let others = (1..=8u16).map(|holder| {
        let at = if holder == 8 { 77 } else { u64::from(holder) * 1_000 };
        let version = if holder == 8 { 0 } else { 9 };
        (dc(holder), vec![Span::new(crate::world::chunk(at), value(at, version))])
    });
    let found = sluice_engine::resolve::resolve(file, tree.root().unwrap(), &own, &others.collect()).unwrap();
    assert_eq!(found.lost, std::slice::from_ref(&(77..78)));
    assert_eq!(found.trusted, [dc(8)].into());
}
