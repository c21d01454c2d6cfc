//! The world: datacenters, network, clients and faults, run event by event.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::ops::Range;

use sluice_engine::aggregator::{Aggregator, Config, Effect, Event, NodeEvent, NodeMemory, PullOutcome};
use sluice_engine::command::{Command, Statement};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::ChainingValue;
use sluice_engine::ids::{DcId, FileId, Generation, Incarnation, Nonce, Timestamp};
use sluice_engine::ledger::FileState;
use sluice_engine::resolve::resolve;
use sluice_engine::rules::Rules;
use sluice_engine::span::{Place, Span};

use super::check::{self, Violation};
use super::client::{Client, Plan};
use super::disk::{Disk, chunk_span, dc_name, root_of, tree_of, value_at};
use super::random::Random;

/// What to simulate.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Decides everything else.
    pub seed: u64,
    /// The rules under which the datacenters run.
    pub rules: Rules,
    /// Whether the trace is kept as text.
    pub trace: bool,
}

/// How it went.
pub struct Outcome {
    /// What was violated, if anything.
    pub violation: Option<Violation>,
    /// BLAKE3 of the whole trace.
    pub digest: [u8; 32],
    /// The trace, if it was asked for.
    pub trace: String,
    /// Figures, for the curious.
    pub figures: Figures,
}

/// Counts over one or more worlds.
#[derive(Clone, Copy, Default, Debug)]
pub struct Figures {
    pub steps: u64,
    pub commands: u64,
    pub lost: u64,
    pub doubled: u64,
    pub crashes: u64,
    pub disks_lost: u64,
    pub restores: u64,
    pub homes_lost: u64,
    pub takeovers: u64,
    pub files: u64,
    pub assembled: u64,
    pub conflicts: u64,
    pub dropped: u64,
    pub freed: u64,
    pub pages_out: u64,
    pub pages_in: u64,
    pub virtual_ms: u64,
}

impl Figures {
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.commands += other.commands;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.crashes += other.crashes;
        self.disks_lost += other.disks_lost;
        self.restores += other.restores;
        self.homes_lost += other.homes_lost;
        self.takeovers += other.takeovers;
        self.files += other.files;
        self.assembled += other.assembled;
        self.conflicts += other.conflicts;
        self.dropped += other.dropped;
        self.freed += other.freed;
        self.pages_out += other.pages_out;
        self.pages_in += other.pages_in;
        self.virtual_ms += other.virtual_ms;
    }
}

/// One datacenter.
pub struct Dc {
    pub id: DcId,
    pub disk: Disk,
    /// An old copy of the disk, to be restored one day.
    snapshot: Option<Disk>,
    pub agg: Option<Aggregator>,
    /// This process's clock is the world's and this.
    clock: u64,
    /// Counts processes, so that results of a dead one are not given to the next.
    pub process: u64,
    /// Which peers this process believes it can reach.
    links: BTreeSet<DcId>,
    pub gone: bool,
    /// Whether anything was lost with a disk, so that promises made before are void.
    pub disk_lost_at: Vec<u64>,
}

/// Something that will happen.
#[derive(Clone, Debug)]
enum Todo {
    Deliver(Command),
    Tick(DcId, u64),
    Job(DcId, u64, Job),
    Client(usize),
    Hello(DcId, DcId),
    Fault,
    Heal,
    Restart(DcId),
    Cut(DcId, DcId, bool),
}

/// An effect that takes a while.
#[derive(Clone, Debug)]
enum Job {
    Fetch { file: FileId, from: DcId },
    Restate { file: FileId, to: DcId, place: Place },
    LoadPage { file: FileId, segment: u64 },
    Pull { file: FileId, from: DcId, place: Place, under: Span },
    ReadRoot { file: FileId },
    Publish { file: FileId, root: sluice_engine::hash::Root },
    Recheck { file: FileId, to: DcId, nonce: Nonce },
    Free { file: FileId },
    Resolve { file: FileId, root: sluice_engine::hash::Root, others: BTreeMap<DcId, Vec<Span>> },
}

pub struct World {
    pub now: u64,
    pub random: Random,
    pub dcs: BTreeMap<DcId, Dc>,
    pub clients: Vec<Client>,
    queue: BTreeMap<(u64, u64), Todo>,
    queued: u64,
    cuts: BTreeSet<(DcId, DcId)>,
    pub calm: bool,
    rules: Rules,
    /// Segments are scaled down in some worlds, so that files have several.
    segment_level: Option<u8>,
    pub figures: Figures,
    trace: blake3::Hasher,
    text: Option<String>,
    pub violation: Option<Violation>,
    /// Acknowledged: file, datacenter, chunk.
    pub acked: BTreeMap<(FileId, DcId, u64), u32>,
    last_tick: BTreeMap<DcId, u64>,
}

const FAULTS_END: u64 = 60_000;
const END: u64 = FAULTS_END + 240_000;
const MAX_STEPS: u64 = 400_000;

/// Runs one world to its end, or to its first violation.
pub fn run(scenario: Scenario) -> Outcome {
    let mut random = Random::new(scenario.seed);
    let count = 2 + random.below(4);
    let ids: Vec<DcId> = (1..=count as u16).map(DcId::new).collect();
    let mut world = World {
        now: 0,
        dcs: ids
            .iter()
            .map(|&id| {
                let dc = Dc {
                    id,
                    disk: Disk::default(),
                    snapshot: None,
                    agg: None,
                    clock: 0,
                    process: 0,
                    links: BTreeSet::new(),
                    gone: false,
                    disk_lost_at: Vec::new(),
                };
                (id, dc)
            })
            .collect(),
        clients: Vec::new(),
        queue: BTreeMap::new(),
        queued: 0,
        cuts: BTreeSet::new(),
        calm: false,
        rules: scenario.rules,
        segment_level: None,
        figures: Figures::default(),
        trace: blake3::Hasher::new(),
        text: scenario.trace.then(String::new),
        violation: None,
        acked: BTreeMap::new(),
        last_tick: BTreeMap::new(),
        random,
    };
    world.segment_level = world.random.chance(60).then(|| 2 + world.random.below(3) as u8);
    let files = 2 + world.random.below(4);
    for number in 0..files {
        let client =
            Client::new(scenario.seed.wrapping_mul(64).wrapping_add(number), &mut world.random, &ids);
        world.note(|| {
            format!(
                "client {number}: file {} of {} chunks, {:?}",
                client.id,
                client.shape.chunks(),
                client.plan
            )
        });
        world.clients.push(client);
        let at = world.random.below(5_000);
        world.schedule(at, Todo::Client(number as usize));
    }
    world.figures.files = files;
    for &id in &ids {
        world.boot(id);
        for &other in ids.iter().filter(|other| **other != id) {
            let at = world.random.below(200);
            world.schedule(at, Todo::Hello(id, other));
        }
    }
    let at = world.random.below(3_000);
    world.schedule(at, Todo::Fault);
    world.schedule(FAULTS_END, Todo::Heal);

    while let Some((&key, _)) = world.queue.first_key_value() {
        let Some(todo) = world.queue.remove(&key) else { break };
        if key.0 > END || world.figures.steps >= MAX_STEPS || world.violation.is_some() {
            break;
        }
        world.now = key.0;
        world.figures.steps += 1;
        world.step(todo);
        if world.violation.is_none() && world.figures.steps.is_multiple_of(16) {
            check::always(&mut world);
            if world.calm && world.now > FAULTS_END + 20_000 && check::is_finished(&world) {
                break;
            }
        }
    }
    if world.violation.is_none() {
        check::always(&mut world);
    }
    if world.violation.is_none() {
        check::finally(&mut world);
    }
    world.figures.virtual_ms = world.now;
    if let Some(violation) = world.violation.clone() {
        world.note(|| format!("VIOLATION {violation}"));
    }
    Outcome {
        violation: world.violation,
        digest: *world.trace.finalize().as_bytes(),
        trace: world.text.unwrap_or_default(),
        figures: world.figures,
    }
}

impl World {
    fn schedule(&mut self, delay: u64, todo: Todo) {
        self.queued += 1;
        self.queue.insert((self.now + delay, self.queued), todo);
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let line = line();
        self.trace.update(line.as_bytes());
        self.trace.update(&self.now.to_be_bytes());
        if let Some(text) = &mut self.text {
            let _ = writeln!(text, "{:>7} {line}", self.now);
        }
    }

    pub fn violate(&mut self, rule: &'static str, detail: String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { rule, detail });
        }
    }

    pub fn alive(&self) -> Vec<DcId> {
        self.dcs.values().filter(|dc| dc.agg.is_some()).map(|dc| dc.id).collect()
    }

    fn clock(&self, dc: DcId) -> Timestamp {
        Timestamp::new(self.now + self.dcs[&dc].clock)
    }

    fn config(&self, me: DcId) -> Config {
        Config {
            rules: match self.segment_level {
                Some(level) => self.rules.with_segments_of(level),
                None => self.rules,
            },
            compare_ms: 5_000,
            ask_ms: 500,
            orphan_grace_ms: 90_000,
            takeover_ms: Some(20_000),
            absent_ms: 15_000,
            ..Config::new(me, self.dcs.keys().copied())
        }
    }

    fn boot(&mut self, id: DcId) {
        if self.dcs[&id].gone || self.dcs[&id].agg.is_some() {
            return;
        }
        // A new process's clock may be an hour off in either direction.
        let clock = 3_600_000 + self.random.below(3_600_000);
        let config = self.config(id);
        let dc = self.dcs.get_mut(&id).expect("configured");
        dc.clock = clock;
        dc.process += 1;
        dc.links.clear();
        let memory = NodeMemory::from_bytes(&dc.disk.node).expect("undamaged");
        let now = Timestamp::new(self.now + clock);
        let (agg, effects) = Aggregator::start(config, memory, now);
        dc.agg = Some(agg);
        self.note(|| format!("{} starts", dc_name(id)));
        self.apply(id, effects);
        let stored: Vec<_> = {
            let disk = &self.dcs[&id].disk;
            disk.files.keys().filter_map(|file| Some((*file, disk.stored(*file, None)?))).collect()
        };
        for (file, stored) in stored {
            self.feed(id, NodeEvent::File(file, Event::Loaded(stored)));
        }
    }

    fn crash(&mut self, id: DcId) {
        let dc = self.dcs.get_mut(&id).expect("configured");
        if dc.agg.take().is_none() {
            return;
        }
        dc.process += 1;
        dc.links.clear();
        self.last_tick.remove(&id);
        self.figures.crashes += 1;
        self.note(|| format!("{} crashes", dc_name(id)));
        for other in self.alive() {
            if self.dcs.get_mut(&other).is_some_and(|dc| dc.links.remove(&id)) {
                self.feed(other, NodeEvent::LinkDown { peer: id });
            }
        }
    }

    /// Gives an event to a datacenter and applies what follows.
    fn feed(&mut self, id: DcId, event: NodeEvent) {
        let now = self.clock(id);
        let before = check::roots_said(self, id);
        let Some(agg) = self.dcs.get_mut(&id).and_then(|dc| dc.agg.as_mut()) else { return };
        let effects = agg.handle(event, now);
        check::after_event(self, id, &before);
        self.apply(id, effects);
        let timeout = self.dcs[&id].agg.as_ref().and_then(Aggregator::next_timeout);
        if let Some(at) = timeout {
            let at = at.number().saturating_sub(self.dcs[&id].clock).max(self.now + 1);
            let queued = self.last_tick.get(&id).copied().unwrap_or(0);
            if queued <= self.now || at < queued {
                self.last_tick.insert(id, at);
                let process = self.dcs[&id].process;
                self.schedule(at - self.now, Todo::Tick(id, process));
            }
        }
    }

    fn apply(&mut self, id: DcId, effects: Vec<Effect>) {
        for effect in effects {
            // A process may die between any two effects.
            if !self.calm && self.random.below(4_000) == 0 {
                self.crash(id);
                let delay = 100 + self.random.below(5_000);
                self.schedule(delay, Todo::Restart(id));
                return;
            }
            self.apply_one(id, effect);
        }
    }

    fn apply_one(&mut self, id: DcId, effect: Effect) {
        if !matches!(effect, Effect::Send(_) | Effect::Changed(_)) {
            self.note(|| format!("{} does {effect:?}", dc_name(id)));
        }
        let process = self.dcs[&id].process;
        let dc = self.dcs.get_mut(&id).expect("configured");
        let job = match effect {
            Effect::Persist(file, memory) => {
                dc.disk.file(file).memory = memory.to_bytes();
                return;
            }
            Effect::PersistNode(memory) => {
                dc.disk.node = memory.to_bytes();
                return;
            }
            Effect::RaiseGenerations(floor) => {
                dc.disk.floor = dc.disk.floor.max(floor);
                return;
            }
            Effect::Send(command) => return self.send(command),
            Effect::CloseLink(peer) => {
                dc.links.remove(&peer);
                return;
            }
            Effect::StorePage(file, page) => {
                self.figures.pages_out += 1;
                dc.disk.file(file).pages.insert(page.segment, page);
                return;
            }
            Effect::Drop(file, tenant, memory) => {
                let file = dc.disk.file(file);
                file.tenant = Some(tenant);
                file.memory = memory.to_bytes();
                file.chunks.clear();
                file.published = None;
                file.dropped = true;
                return;
            }
            Effect::DiscardOrphan(file) => {
                check::orphan_discarded(self, id, file);
                if let Some(dc) = self.dcs.get_mut(&id)
                    && dc.disk.files.get(&file).is_some_and(|file| file.record.is_none())
                {
                    dc.disk.files.remove(&file);
                }
                return;
            }
            Effect::Changed(_) | Effect::Refused { .. } => return,
            Effect::FetchRecord { file, from, .. } => Job::Fetch { file, from },
            Effect::Restate { file, to, place } => Job::Restate { file, to, place },
            Effect::LoadPage(file, segment) => Job::LoadPage { file, segment },
            Effect::Pull { file, from, place, under } => Job::Pull { file, from, place, under },
            Effect::ReadRoot(file) => Job::ReadRoot { file },
            Effect::Publish(file, root) => Job::Publish { file, root },
            Effect::Recheck { file, to, nonce } => Job::Recheck { file, to, nonce },
            Effect::Free(file) => Job::Free { file },
            Effect::Resolve { file, root, others } => Job::Resolve { file, root, others },
        };
        let delay = 1 + self.random.below(150);
        self.schedule(delay, Todo::Job(id, process, job));
    }

    fn send(&mut self, command: Command) {
        self.figures.commands += 1;
        let (from, to) = (command.from, command.to);
        self.note(|| {
            format!("{} -> {}: {} {}", dc_name(from), dc_name(to), short(command.file), command.statement)
        });
        if let (Statement::Have { span, .. }, Some(shape)) =
            (command.statement, self.known_shape(from, command.file))
        {
            check::have_said(self, from, command.file, shape, span);
        }
        if !self.dcs[&from].links.contains(&to) {
            return;
        }
        let copies = if self.calm {
            1
        } else if self.cuts.contains(&(from, to)) || self.random.chance(30) {
            self.figures.lost += 1;
            0
        } else if self.random.chance(50) {
            self.figures.doubled += 1;
            2
        } else {
            1
        };
        for _ in 0..copies {
            let far = if self.random.chance(5) { 3_000 } else { 120 };
            let delay = 1 + self.random.below(far);
            self.schedule(delay, Todo::Deliver(command));
        }
    }

    fn reaches(&self, a: DcId, b: DcId) -> bool {
        !self.cuts.contains(&(a, b))
            && !self.cuts.contains(&(b, a))
            && self.dcs[&a].agg.is_some()
            && self.dcs[&b].agg.is_some()
    }

    fn step(&mut self, todo: Todo) {
        match todo {
            Todo::Deliver(command) => {
                // The wire carries bytes: what is delivered is what they decode to.
                let body = command.to_body(sluice_engine::ids::KeyId::new(0));
                let mut bytes = [0; sluice_engine::command::COMMAND_LEN];
                bytes[..body.len()].copy_from_slice(&body);
                match Command::decode(&bytes) {
                    Ok((decoded, _)) => {
                        self.note(|| format!("{} hears #{}", dc_name(command.to), command.sequence));
                        self.feed(command.to, NodeEvent::Received(decoded.trusted()));
                    }
                    Err(error) => self.violate("codec", format!("{command:?} does not decode: {error}")),
                }
            }
            Todo::Tick(id, process) => {
                if self.dcs[&id].process == process {
                    self.last_tick.insert(id, 0);
                    self.feed(id, NodeEvent::Tick);
                }
            }
            Todo::Job(id, process, job) => {
                if self.dcs[&id].process == process {
                    self.finish(id, job);
                }
            }
            Todo::Client(number) => self.client(number),
            Todo::Hello(a, b) => self.hello(a, b),
            Todo::Fault => self.fault(),
            Todo::Heal => self.heal(),
            Todo::Restart(id) => self.boot(id),
            Todo::Cut(a, b, cut) => {
                if cut {
                    self.cuts.insert((a, b));
                } else {
                    self.cuts.remove(&(a, b));
                }
                self.note(|| {
                    format!("{} -> {} {}", dc_name(a), dc_name(b), if cut { "is cut" } else { "heals" })
                });
            }
        }
    }

    /// `a` looks whether it reaches `b`.
    fn hello(&mut self, a: DcId, b: DcId) {
        let reach = self.reaches(a, b);
        let linked = self.dcs[&a].links.contains(&b);
        if reach && !linked {
            let agg = |id: DcId| self.dcs[&id].agg.as_ref();
            let memory = |id: DcId| NodeMemory::from_bytes(&self.dcs[&id].disk.node).expect("undamaged");
            if let Some(theirs) = agg(b).map(Aggregator::incarnation) {
                let seen_of_me = memory(b).seen.get(&a).copied().unwrap_or(Incarnation::new(0));
                if let Some(dc) = self.dcs.get_mut(&a) {
                    dc.links.insert(b);
                }
                self.note(|| format!("{} reaches {}", dc_name(a), dc_name(b)));
                self.feed(a, NodeEvent::LinkUp { peer: b, incarnation: theirs, seen_of_me });
            }
        } else if !reach && linked {
            if let Some(dc) = self.dcs.get_mut(&a) {
                dc.links.remove(&b);
            }
            self.note(|| format!("{} no longer reaches {}", dc_name(a), dc_name(b)));
            self.feed(a, NodeEvent::LinkDown { peer: b });
        }
        if !self.dcs[&a].gone {
            let delay = 200 + self.random.below(800);
            self.schedule(delay, Todo::Hello(a, b));
        }
    }

    fn fault(&mut self) {
        if self.calm {
            return;
        }
        let alive = self.alive();
        if let Some(id) = self.random.pick(&alive) {
            match self.random.below(14) {
                0..=3 => {
                    self.crash(id);
                    let delay = 50 + self.random.below(8_000);
                    self.schedule(delay, Todo::Restart(id));
                }
                4..=8 => {
                    let others: Vec<DcId> = self.dcs.keys().copied().filter(|other| *other != id).collect();
                    if let Some(other) = self.random.pick(&others) {
                        let heal = 500 + self.random.below(15_000);
                        self.schedule(0, Todo::Cut(id, other, true));
                        self.schedule(heal, Todo::Cut(id, other, false));
                        if self.random.chance(40) {
                            self.schedule(0, Todo::Cut(other, id, true));
                            self.schedule(heal, Todo::Cut(other, id, false));
                        }
                    }
                }
                9 | 10 => {
                    let disk = self.dcs[&id].disk.clone();
                    self.dcs.get_mut(&id).expect("alive").snapshot = Some(disk);
                    self.note(|| format!("{} is copied", dc_name(id)));
                }
                11 => {
                    if let Some(old) = self.dcs[&id].snapshot.clone() {
                        self.crash(id);
                        self.figures.restores += 1;
                        self.note(|| format!("{} is restored from its copy", dc_name(id)));
                        self.lose_disk(id, old);
                        let delay = 50 + self.random.below(3_000);
                        self.schedule(delay, Todo::Restart(id));
                    }
                }
                12 if self.random.chance(50) => {
                    self.crash(id);
                    self.figures.disks_lost += 1;
                    self.note(|| format!("{} loses its disk", dc_name(id)));
                    self.lose_disk(id, Disk::default());
                    let delay = 50 + self.random.below(3_000);
                    self.schedule(delay, Todo::Restart(id));
                }
                13 if self.random.chance(40) && self.dcs.values().filter(|dc| !dc.gone).count() > 2 => {
                    self.crash(id);
                    self.figures.homes_lost += 1;
                    self.note(|| format!("{} is lost for good", dc_name(id)));
                    self.lose_disk(id, Disk::default());
                    self.dcs.get_mut(&id).expect("alive").gone = true;
                }
                _ => {}
            }
        }
        let delay = 300 + self.random.below(6_000);
        self.schedule(delay, Todo::Fault);
    }

    /// Replaces a disk by an older state; what only it had is nobody's fault.
    fn lose_disk(&mut self, id: DcId, old: Disk) {
        let now = self.now;
        let dc = self.dcs.get_mut(&id).expect("configured");
        dc.disk_lost_at.push(now);
        dc.disk = old;
        self.acked.retain(|(_, dc, _), _| *dc != id);
    }

    fn heal(&mut self) {
        self.calm = true;
        self.cuts.clear();
        self.note(|| "all faults end".into());
        let ids: Vec<DcId> = self.dcs.keys().copied().collect();
        for id in ids {
            self.boot(id);
        }
    }

    fn known_shape(&self, id: DcId, file: FileId) -> Option<Geometry> {
        self.dcs[&id].agg.as_ref()?.file(file)?.ledger().file()
    }

    /// An effect that took a while ends.
    fn finish(&mut self, id: DcId, job: Job) {
        let shape_of = |world: &Self, file| world.known_shape(id, file);
        match job {
            Job::Fetch { file, from } => {
                let record = self.dcs[&from].disk.files.get(&file).and_then(|file| file.record);
                let event = match record.filter(|_| self.reaches(id, from)) {
                    Some(record) => {
                        let stored = self.dcs.get_mut(&id).expect("alive").disk.file(file);
                        if !stored.dropped {
                            stored.tenant = Some(record.tenant);
                            stored.record.get_or_insert(record);
                            let shape = record.size.expect("known");
                            stored.chunks.retain(|index, _| *index < shape.chunks());
                        }
                        self.dcs[&id].disk.stored(file, None).map_or(Event::FetchFailed, Event::Loaded)
                    }
                    None => Event::FetchFailed,
                };
                self.feed(id, NodeEvent::File(file, event));
            }
            Job::Restate { file, to, place } => {
                let Some(shape) = shape_of(self, file) else { return };
                let Some(stored) = self.dcs[&id].disk.files.get(&file) else { return };
                let generation = stored.generation.max(self.dcs[&id].disk.floor);
                let spans = finer(file, shape, place, &stored.chunks);
                self.feed(id, NodeEvent::File(file, Event::Restated { to, generation, spans }));
            }
            Job::LoadPage { file, segment } => {
                self.figures.pages_in += 1;
                let lost = !self.calm && self.random.chance(10);
                if lost && let Some(file) = self.dcs.get_mut(&id).expect("alive").disk.files.get_mut(&file) {
                    file.pages.clear();
                }
                let page =
                    self.dcs[&id].disk.files.get(&file).and_then(|file| file.pages.get(&segment).cloned());
                self.feed(id, NodeEvent::File(file, Event::PageLoaded { page }));
            }
            Job::Pull { file, from, place, under } => self.pull(id, file, from, place, under),
            Job::ReadRoot { file } => {
                let chunks =
                    self.dcs[&id].disk.files.get(&file).map(|file| file.chunks.clone()).unwrap_or_default();
                let root = shape_of(self, file).and_then(|shape| root_of(file, shape, &chunks));
                self.feed(id, NodeEvent::File(file, Event::RootRead { root }));
            }
            Job::Publish { file, root } => {
                let Some(shape) = shape_of(self, file) else { return };
                let stored = self.dcs.get_mut(&id).expect("alive").disk.file(file);
                let ok = !stored.dropped
                    && stored.chunks.len() as u64 == shape.chunks()
                    && root_of(file, shape, &stored.chunks) == Some(root);
                if ok {
                    stored.published = Some(root);
                }
                self.feed(id, NodeEvent::File(file, Event::Published { ok }));
            }
            Job::Recheck { file, to, nonce } => {
                let stored = self.dcs[&id].disk.files.get(&file);
                let root = stored.filter(|stored| !stored.dropped).and_then(|stored| {
                    stored.published?;
                    root_of(file, shape_of(self, file)?, &stored.chunks)
                });
                self.feed(id, NodeEvent::File(file, Event::Rechecked { to, nonce, root }));
            }
            Job::Resolve { file, root, others } => {
                let Some(shape) = shape_of(self, file) else { return };
                let held =
                    self.dcs[&id].disk.files.get(&file).map(|file| file.chunks.clone()).unwrap_or_default();
                let own: Vec<ChainingValue> =
                    held.iter().map(|(index, content)| super::disk::value(file, *index, *content)).collect();
                let resolution = resolve(shape, root, &own, &others);
                let chunks: Vec<Range<u64>> =
                    resolution.iter().flat_map(|found| found.lost.clone()).collect();
                self.feed(id, NodeEvent::File(file, Event::Resolved { resolution }));
                if chunks.is_empty() || self.dcs[&id].agg.is_none() {
                    return;
                }
                check::before_lose(self, id, file, &chunks);
                let dc = self.dcs.get_mut(&id).expect("alive");
                let floor = dc.disk.floor;
                let stored = dc.disk.file(file);
                stored.generation = stored.generation.max(floor).next();
                stored.chunks.retain(|index, _| !chunks.iter().any(|range| range.contains(index)));
                self.acked.retain(|(f, dc, index), _| {
                    (*f, *dc) != (file, id) || !chunks.iter().any(|r| r.contains(index))
                });
                if let Some(stored) = self.dcs[&id].disk.stored(file, shape_of(self, file)) {
                    self.feed(id, NodeEvent::File(file, Event::Loaded(stored)));
                }
            }
            Job::Free { file } => {
                check::before_free(self, id, file);
                let dc = self.dcs.get_mut(&id).expect("alive");
                let floor = dc.disk.floor;
                let stored = dc.disk.file(file);
                stored.generation = stored.generation.max(floor).next();
                stored.chunks.clear();
                stored.published = None;
                let generation = stored.generation;
                self.figures.freed += 1;
                self.acked.retain(|(f, dc, _), _| (*f, *dc) != (file, id));
                self.feed(id, NodeEvent::File(file, Event::Freed { generation }));
            }
        }
    }

    /// Carries chunks from one store to another, each checked against the span it lies in.
    fn pull(&mut self, id: DcId, file: FileId, from: DcId, place: Place, under: Span) {
        let Some(shape) = self.known_shape(id, file) else { return };
        let theirs =
            self.dcs[&from].disk.files.get(&file).map(|file| file.chunks.clone()).unwrap_or_default();
        let outcome = if !self.reaches(id, from) {
            PullOutcome::Unreachable
        } else {
            match tree_of(file, shape, &theirs).overlapping(under.place).first() {
                Some(span) if span.place.contains(under.place) => {
                    match value_at(file, shape, under.place, &theirs) {
                        Some(value) if value == under.value => {
                            let mut outcome = PullOutcome::Done;
                            let mut stored = Vec::new();
                            for index in place.range(shape) {
                                // A pull may be cut off anywhere.
                                if !self.calm && self.random.below(60) == 0 {
                                    outcome = PullOutcome::Unreachable;
                                    break;
                                }
                                let content = theirs[&index];
                                let mine = self.dcs.get_mut(&id).expect("alive").disk.file(file);
                                if mine.dropped {
                                    outcome = PullOutcome::StoreFailed;
                                    break;
                                }
                                match mine.chunks.get(&index) {
                                    Some(held) if *held != content => {
                                        outcome = PullOutcome::StoreFailed;
                                        break;
                                    }
                                    Some(_) => {}
                                    None => {
                                        mine.chunks.insert(index, content);
                                        stored.push(chunk_span(file, index, content));
                                    }
                                }
                            }
                            let generation = self.generation(id, file);
                            self.feed(id, NodeEvent::File(file, Event::Stored { generation, spans: stored }));
                            outcome
                        }
                        Some(_) => PullOutcome::Mismatch(place),
                        None => PullOutcome::Missing,
                    }
                }
                Some(_) | None => PullOutcome::Missing,
            }
        };
        self.feed(id, NodeEvent::File(file, Event::Pulled { place, outcome }));
    }

    fn generation(&self, id: DcId, file: FileId) -> Generation {
        let disk = &self.dcs[&id].disk;
        disk.files.get(&file).map_or(disk.floor, |file| file.generation.max(disk.floor))
    }

    /// A client does one thing, and comes back.
    fn client(&mut self, number: usize) {
        let alive = self.alive();
        let Some(dc) = self.random.pick(&alive) else {
            self.schedule(500, Todo::Client(number));
            return;
        };
        let client = &mut self.clients[number];
        let id = client.id;
        if !client.described
            && client.plan != Plan::NeverDescribe
            && (self.random.chance(85) || client.todo.is_empty())
        {
            client.described = true;
            let record = client.record;
            let home = client.home.unwrap_or(dc);
            if !self.create(dc, id, record, home) {
                self.clients[number].described = false;
            }
        } else if let Some(other) =
            client.other_record.filter(|_| !client.described_twice && client.described)
        {
            client.described_twice = true;
            if !self.create(dc, id, other, dc) {
                self.clients[number].described_twice = false;
            }
        } else if let Some(index) = client.todo.pop() {
            let content = client.contents[&index];
            if client.bad_chunk == Some(index) {
                client.bad_chunk = None;
                self.put(dc, number, index, 2);
            }
            // Now and then the same chunk goes to two datacenters.
            let again = self.random.chance(15);
            let targets = self.alive();
            let target = self.random.pick(&targets).unwrap_or(dc);
            if !self.put(target, number, index, content) {
                self.clients[number].todo.insert(0, index);
            } else if again && let Some(other) = self.random.pick(&targets) {
                self.put(other, number, index, content);
            }
        } else if client.plan == Plan::Remove && !client.removed {
            client.removed = true;
            let tenant = client.tenant;
            let known = self.dcs[&dc]
                .agg
                .as_ref()
                .and_then(|agg| agg.file(id))
                .is_some_and(|file| file.record().is_some());
            if known {
                self.note(|| format!("client removes {} at {}", short(id), dc_name(dc)));
                let reason = sluice_engine::command::DropReason::Deleted;
                self.feed(dc, NodeEvent::File(id, Event::Remove { reason, tenant }));
            } else {
                self.clients[number].removed = false;
                self.resume(number);
            }
        } else {
            self.resume(number);
        }
        if !self.clients[number].done {
            let delay = if self.clients[number].todo.is_empty() { 1_000 } else { 5 + self.random.below(300) };
            self.schedule(delay, Todo::Client(number));
        }
    }

    fn create(
        &mut self,
        dc: DcId,
        id: FileId,
        record: sluice_engine::aggregator::RecordSummary,
        home: DcId,
    ) -> bool {
        let Some(node) = self.dcs.get_mut(&dc).filter(|node| node.agg.is_some()) else { return false };
        let stored = node.disk.file(id);
        if stored.dropped {
            return true;
        }
        if stored.record.is_some_and(|held| held.digest != record.digest) {
            // 409: the first stands.
            return true;
        }
        let orphans = stored.record.is_none() && !stored.chunks.is_empty();
        stored.record = Some(record);
        stored.tenant = Some(record.tenant);
        self.note(|| format!("client creates {} at {}", short(id), dc_name(dc)));
        self.feed(dc, NodeEvent::File(id, Event::Created { record, home }));
        if orphans && let Some(stored) = self.dcs[&dc].disk.stored(id, None) {
            self.feed(dc, NodeEvent::File(id, Event::Loaded(stored)));
        }
        // The answer may be lost with the process; then the client describes the file again elsewhere.
        self.dcs[&dc].agg.is_some()
    }

    /// Sends one chunk; whether it was acknowledged.
    fn put(&mut self, dc: DcId, number: usize, index: u64, content: u32) -> bool {
        let (id, tenant) = (self.clients[number].id, self.clients[number].tenant);
        let Some(agg) = self.dcs[&dc].agg.as_ref() else { return false };
        let known = agg.file(id);
        let state = known.map_or(FileState::Unheard, |file| file.state());
        match state {
            FileState::Dropped | FileState::Conflict => return true,
            FileState::Unheard | FileState::Receiving | FileState::Complete | FileState::Assembled => {}
        }
        let node = self.dcs.get_mut(&dc).expect("alive");
        let stored = node.disk.file(id);
        if stored.dropped {
            return true;
        }
        stored.tenant.get_or_insert(tenant);
        match stored.chunks.get(&index) {
            Some(held) if *held != content => {
                // 409: the first stays.
                self.note(|| format!("{} refuses chunk {index} of {}", dc_name(dc), short(id)));
                return true;
            }
            Some(_) => {}
            None => {
                stored.chunks.insert(index, content);
            }
        }
        // Durable; the process may die before anyone hears of it.
        if !self.calm && self.random.below(150) == 0 {
            self.crash(dc);
            let delay = 100 + self.random.below(4_000);
            self.schedule(delay, Todo::Restart(dc));
            return false;
        }
        self.note(|| format!("{} has chunk {index} of {} ({content})", dc_name(dc), short(id)));
        let event = if state == FileState::Unheard {
            Event::StoredOrphan { tenant }
        } else {
            let generation = self.generation(dc, id);
            Event::Stored { generation, spans: vec![chunk_span(id, index, content)] }
        };
        self.feed(dc, NodeEvent::File(id, event));
        if self.dcs[&dc].disk.chunk(id, index) == Some(content) {
            self.acked.insert((id, dc, index), content);
        }
        // The answer may be lost on the way.
        self.dcs[&dc].agg.is_some() && (self.calm || !self.random.chance(10))
    }

    /// All was sent: ask what is missing, and send that again.
    fn resume(&mut self, number: usize) {
        let client = &self.clients[number];
        let (id, shape) = (client.id, client.shape);
        let mut missing: Option<Vec<u64>> = None;
        let mut over = false;
        for dc in self.alive() {
            let Some(file) = self.dcs[&dc].agg.as_ref().and_then(|agg| agg.file(id)) else { continue };
            match file.state() {
                FileState::Assembled | FileState::Conflict | FileState::Dropped => over = true,
                FileState::Receiving | FileState::Complete => {
                    // The home knows best; without it, what the reachable ones hold together counts.
                    let home = file.ledger().claim().map(|claim| claim.home);
                    if home == Some(dc) {
                        missing = Some(
                            file.ledger().missing(0..shape.chunks(), 1_000).into_iter().flatten().collect(),
                        );
                    }
                }
                FileState::Unheard => {}
            }
        }
        // Whoever hears that the file is assembled goes home, whatever happens to it later.
        if over && (self.calm || self.random.chance(5)) {
            self.clients[number].done = true;
        }
        if over {
            return;
        }
        if missing.is_none() {
            // Nobody reachable is the home: send what nobody reachable has, and describe the file again.
            let alive = self.alive();
            let held = |index: &u64| alive.iter().any(|dc| self.dcs[dc].disk.chunk(id, *index).is_some());
            missing = Some((0..shape.chunks()).filter(|index| !held(index)).collect());
        }
        let recorded = |dc: &Dc| dc.disk.files.get(&id).is_some_and(|file| file.record.is_some());
        if (self.calm && self.clients[number].plan == Plan::NeverDescribe) || self.clients[number].removed {
            self.clients[number].done = true;
            return;
        }
        if !self.dcs.values().any(recorded) && self.clients[number].plan != Plan::NeverDescribe {
            self.clients[number].described = false;
        }
        self.clients[number].todo.extend(missing.unwrap_or_default());
    }
}

/// What a store says when asked for what it holds under a place, one level or more finer.
fn finer(file: FileId, shape: Geometry, place: Place, chunks: &BTreeMap<u64, u32>) -> Vec<Span> {
    let children = place.children(shape).map_or_else(|| vec![place], |(left, right)| vec![left, right]);
    let mut spans = Vec::new();
    for child in children {
        match value_at(file, shape, child, chunks) {
            Some(value) => spans.push(Span::new(child, value)),
            None => spans.extend(
                tree_of(file, shape, chunks)
                    .overlapping(child)
                    .into_iter()
                    .filter(|span| child.contains(span.place)),
            ),
        }
    }
    spans
}

pub fn short(file: FileId) -> String {
    file.to_string()[..8].to_string()
}
