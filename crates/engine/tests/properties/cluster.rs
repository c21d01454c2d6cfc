//! A few datacenters without faults but for those a test asks for: a perfect network, stores that know values and no
//! bytes, and a clock that jumps to whatever is due next.

use std::collections::{BTreeMap, VecDeque};

use sluice_engine::aggregator::{
    Aggregator, Config, Effect, Event, FileMemory, Greeting, NodeEvent, NodeMemory, PullOutcome,
    RecordSummary, StoredFile,
};
use sluice_engine::command::{Command, Statement};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, RecordDigest, Root};
use sluice_engine::ids::{DcId, Generation, Timestamp};
use sluice_engine::ledger::{FileState, Page};
use sluice_engine::resolve::resolve;
use sluice_engine::rules::Rules;
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::SpanTree;

use crate::world::{TENANT, dc, file_id, span};

pub(crate) const FILE: u64 = 1;

/// What one datacenter has of the file.
struct Node {
    agg: Aggregator,
    held: SpanTree,
    values: Vec<ChainingValue>,
    record: Option<RecordSummary>,
    memory: FileMemory,
    node: NodeMemory,
    floor: Generation,
    generation: Generation,
    published: Option<Root>,
    dropped: bool,
    pages: BTreeMap<u64, Vec<u8>>,
}

/// Counts of what happened.
#[derive(Default, Debug)]
pub(crate) struct Counts {
    pub(crate) pages_out: u64,
    pub(crate) pages_in: u64,
    pub(crate) pages_lost: u64,
    pub(crate) commands: u64,
    pub(crate) most_spans: usize,
}

pub(crate) struct Cluster {
    pub(crate) now: u64,
    pub(crate) file: Geometry,
    nodes: BTreeMap<DcId, Node>,
    todo: VecDeque<(DcId, NodeEvent)>,
    /// Pairs that cannot reach one another.
    cut: Vec<(DcId, DcId)>,
    /// Whose claims reach nobody.
    pub(crate) unheard: Option<DcId>,
    /// How many pages will be found lost.
    pub(crate) lose_pages: u64,
    pub(crate) counts: Counts,
}

impl Cluster {
    /// Datacenters 1 to `count`, of which 1 is the home of a file with these values.
    pub(crate) fn new(count: u16, file: Geometry, values: &[ChainingValue], rules: Rules) -> Self {
        let ids: Vec<DcId> = (1..=count).map(dc).collect();
        let mut this = Self {
            now: 1_000_000,
            file,
            nodes: BTreeMap::new(),
            todo: VecDeque::new(),
            cut: Vec::new(),
            unheard: None,
            lose_pages: 0,
            counts: Counts::default(),
        };
        for &id in &ids {
            let config = Config { rules, ..Config::new(id, ids.iter().copied()) };
            let now = Timestamp::new(this.now);
            let (mut agg, effects) = Aggregator::start(config, NodeMemory::default(), now);
            agg.handle(NodeEvent::AllLoaded, now);
            let node = Node {
                agg,
                held: SpanTree::new(file),
                values: values.to_vec(),
                record: None,
                memory: FileMemory::default(),
                node: NodeMemory::default(),
                floor: Generation::new(0),
                generation: Generation::new(0),
                published: None,
                dropped: false,
                pages: BTreeMap::new(),
            };
            this.nodes.insert(id, node);
            this.apply(id, effects);
        }
        for &a in &ids {
            for &b in ids.iter().filter(|b| **b != a) {
                this.link(a, b);
            }
        }
        this.create(dc(1));
        this
    }

    /// A client sends the metadata here.
    pub(crate) fn create(&mut self, id: DcId) {
        let record = RecordSummary {
            digest: RecordDigest::from_bytes([1; 32]),
            tenant: TENANT,
            size: Some(self.file),
            expected_root: None,
            expiry_ms: None,
        };
        self.node(id).record = Some(record);
        self.feed(id, NodeEvent::File(file_id(FILE), Event::Created { record, home: id }));
        self.settle();
    }

    fn node(&mut self, id: DcId) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    /// The bytes that this datacenter's clients send differ.
    pub(crate) fn set_values(&mut self, id: DcId, values: Vec<ChainingValue>) {
        self.node(id).values = values;
    }

    pub(crate) fn state(&self, id: DcId) -> FileState {
        self.nodes[&id].agg.file(file_id(FILE)).map_or(FileState::Unheard, |file| file.state())
    }

    pub(crate) fn ledger(&self, id: DcId) -> &sluice_engine::ledger::Ledger {
        self.nodes[&id].agg.file(file_id(FILE)).unwrap().ledger()
    }

    pub(crate) fn published(&self, id: DcId) -> Option<Root> {
        self.nodes[&id].published
    }

    pub(crate) fn holds(&self, id: DcId) -> u64 {
        self.nodes[&id].held.covered()
    }

    fn reaches(&self, a: DcId, b: DcId) -> bool {
        !self.cut.iter().any(|pair| *pair == (a, b) || *pair == (b, a))
    }

    fn link(&mut self, a: DcId, b: DcId) {
        if self.reaches(a, b) {
            self.todo.push_back((a, NodeEvent::Dial { peer: b }));
        }
    }

    /// Two datacenters no longer reach one another, or do again.
    pub(crate) fn cut(&mut self, a: DcId, b: DcId, cut: bool) {
        if cut {
            self.cut.push((a, b));
            self.todo.push_back((a, NodeEvent::LinkDown { peer: b }));
            self.todo.push_back((b, NodeEvent::LinkDown { peer: a }));
        } else {
            self.cut.retain(|pair| *pair != (a, b));
            self.link(a, b);
            self.link(b, a);
        }
        self.settle();
    }

    /// A client's chunks became durable here.
    pub(crate) fn put(&mut self, id: DcId, place: Place) {
        let file = self.file;
        let node = self.node(id);
        let span = span(file, place, &node.values);
        node.held.insert(span).unwrap();
        let generation = node.generation.max(node.floor);
        let event = Event::Stored { generation, spans: vec![span] };
        self.feed(id, NodeEvent::File(file_id(FILE), event));
        self.settle();
    }

    /// The process dies and another takes its place.
    pub(crate) fn restart(&mut self, id: DcId) {
        let now = Timestamp::new(self.now);
        let node = self.node(id);
        let config = node.agg.config().clone();
        let peers: Vec<DcId> = config.peers.iter().copied().collect();
        let (agg, effects) = Aggregator::start(config, node.node.clone(), now);
        node.agg = agg;
        self.todo.retain(|(to, _)| *to != id);
        self.apply(id, effects);
        for &peer in &peers {
            self.todo.push_back((peer, NodeEvent::LinkDown { peer: id }));
        }
        self.load(id);
        for &peer in &peers {
            self.link(id, peer);
            self.link(peer, id);
        }
        self.settle();
    }

    fn load(&mut self, id: DcId) {
        let node = self.node(id);
        let stored = StoredFile {
            tenant: TENANT,
            record: node.record,
            size: None,
            memory: node.memory.clone(),
            generation: node.generation.max(node.floor),
            spans: node.held.iter().collect(),
            chunks: node.held.covered(),
            published: node.published,
        };
        self.feed(id, NodeEvent::File(file_id(FILE), Event::Loaded(stored)));
        self.feed(id, NodeEvent::AllLoaded);
    }

    fn feed(&mut self, id: DcId, event: NodeEvent) {
        let now = Timestamp::new(self.now);
        let effects = self.node(id).agg.handle(event, now);
        let spans = self.nodes[&id].agg.file(file_id(FILE)).map_or(0, |file| file.ledger().spans());
        self.counts.most_spans = self.counts.most_spans.max(spans);
        self.apply(id, effects);
    }

    fn later(&mut self, id: DcId, event: Event) {
        self.todo.push_back((id, NodeEvent::File(file_id(FILE), event)));
    }

    /// Works off what is due now.
    pub(crate) fn settle(&mut self) {
        while let Some((id, event)) = self.todo.pop_front() {
            self.feed(id, event);
        }
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, ms: u64) {
        let end = self.now + ms;
        loop {
            self.settle();
            let next = self.nodes.values().filter_map(|node| node.agg.next_timeout()).min();
            match next.map(|at| at.number().max(self.now + 1)).filter(|at| *at <= end) {
                Some(at) => self.now = at,
                None => break,
            }
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                self.feed(id, NodeEvent::Tick);
            }
        }
        self.now = end;
    }

    fn apply(&mut self, id: DcId, effects: Vec<Effect>) {
        for effect in effects {
            self.apply_one(id, effect);
        }
    }

    fn apply_one(&mut self, id: DcId, effect: Effect) {
        let file = self.file;
        match effect {
            Effect::Persist(_, memory) => self.node(id).memory = memory,
            Effect::PersistNode(memory) => self.node(id).node = memory,
            Effect::RaiseGenerations(floor) => self.node(id).floor = floor,
            Effect::Send(command) => self.send(command),
            Effect::Hello { peer, greeting: Greeting { incarnation, seen } } => {
                self.todo.push_back((peer, NodeEvent::Hello { peer: id, incarnation, seen_of_me: seen }));
            }
            Effect::Answer { peer, greeting: Greeting { incarnation, seen }, welcome } => {
                assert!(welcome, "{id} hangs up on {peer}");
                self.todo.push_back((peer, NodeEvent::LinkUp { peer: id, incarnation, seen_of_me: seen }));
            }
            Effect::Wake(_) => self.load(id),
            Effect::FetchRecord { from, .. } => match self.nodes[&from].record {
                Some(record) if self.reaches(id, from) => {
                    self.node(id).record = Some(record);
                    self.load(id);
                }
                Some(_) | None => self.later(id, Event::FetchFailed),
            },
            Effect::Restate { to, place, .. } => {
                let node = self.node(id);
                let children = place.children(file).map_or(vec![place], |(left, right)| vec![left, right]);
                let mut spans = Vec::new();
                for child in children {
                    let found: Vec<Span> = node.held.overlapping(child);
                    match found[..] {
                        [one] if one.place.contains(child) => {
                            spans.push(crate::world::span(file, child, &node.values))
                        }
                        _ => spans.extend(found),
                    }
                }
                let generation = node.generation.max(node.floor);
                self.later(id, Event::Restated { to, generation, spans });
            }
            Effect::StorePage(_, page) => {
                self.counts.pages_out += 1;
                self.node(id).pages.insert(page.segment, page.to_bytes());
            }
            Effect::LoadPage(_, segment) => {
                self.counts.pages_in += 1;
                let page = self.nodes[&id].pages.get(&segment).map(|bytes| Page::from_bytes(bytes).unwrap());
                let lost = self.lose_pages > 0;
                if lost {
                    self.lose_pages -= 1;
                    self.counts.pages_lost += 1;
                }
                self.later(id, Event::PageLoaded { page: page.filter(|_| !lost) });
            }
            Effect::Pull { from, place, under, .. } => {
                let theirs = &self.nodes[&from];
                let outcome = if !self.reaches(id, from) {
                    PullOutcome::Unreachable
                } else if theirs.held.covering(under.place).is_none() {
                    PullOutcome::Missing
                } else if crate::world::span(file, under.place, &theirs.values) != under {
                    PullOutcome::Mismatch(place)
                } else {
                    PullOutcome::Done
                };
                if outcome == PullOutcome::Done {
                    let pulled = crate::world::span(file, place, &theirs.values);
                    let node = self.node(id);
                    let generation = node.generation.max(node.floor);
                    node.held.insert(pulled).unwrap();
                    self.later(id, Event::Stored { generation, spans: vec![pulled] });
                }
                self.later(id, Event::Pulled { place, outcome });
            }
            Effect::ReadRoot(_) => panic!("a file of several segments has more than one chunk"),
            Effect::Publish(_, root) => {
                let node = self.node(id);
                let ok = node.held.is_whole() && node.held.root() == Some(root);
                node.published = ok.then_some(root);
                self.later(id, Event::Published { ok });
            }
            Effect::Recheck { to, nonce, .. } => {
                let root = self.nodes[&id].published;
                self.later(id, Event::Rechecked { to, nonce, root });
            }
            Effect::Free(_) => {
                let node = self.node(id);
                node.generation = node.generation.max(node.floor).next();
                node.held = SpanTree::new(file);
                node.published = None;
                let generation = node.generation;
                self.later(id, Event::Freed { generation });
            }
            Effect::Resolve { root, others, .. } => {
                let resolution = resolve(file, root, &self.nodes[&id].values, &others);
                self.later(id, Event::Resolved { resolution });
            }
            Effect::Drop(..) => {
                let node = self.node(id);
                node.dropped = true;
                node.held = SpanTree::new(file);
            }
            Effect::CloseLink(peer) => panic!("{id} closes its link to {peer}"),
            Effect::DiscardOrphan(_) | Effect::Changed(_) => {}
            Effect::Revoked(_) => panic!("nobody revoked anything"),
            Effect::Refused { peer, kind, reason } => panic!("{id} refuses {kind} of {peer}: {reason}"),
        }
    }

    fn send(&mut self, command: Command) {
        self.counts.commands += 1;
        if let Statement::Have { generation, span } = command.statement {
            let node = &self.nodes[&command.from];
            let newest = node.generation.max(node.floor);
            assert!(
                generation < newest
                    || node
                        .held
                        .overlapping(span.place)
                        .iter()
                        .any(|held| { held.place.contains(span.place) || span.place.contains(held.place) }),
                "{} does not hold {}",
                command.from,
                span.place
            );
        }
        let is_unheard =
            self.unheard == Some(command.from) && matches!(command.statement, Statement::Meta { .. });
        if self.reaches(command.from, command.to) && !is_unheard {
            self.todo.push_back((command.to, NodeEvent::Received(command.trusted())));
        }
    }
}
