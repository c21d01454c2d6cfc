//! The world: datacenters, network, clients and faults, run event by event.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use sluice_engine::aggregator::{Aggregator, Config, Effect, Event, NodeEvent, NodeMemory};
use sluice_engine::command::Command;
use sluice_engine::drain::{Drain, Phase};
use sluice_engine::ids::{DcId, FileId, Timestamp};
use sluice_engine::ledger::FileState;
use sluice_engine::revocations::Revocation;
use sluice_engine::rules::Rules;
use sluice_engine::share::Share;

use super::check::{self, Violation};
use super::client::Client;
use super::disk::{Disk, dc_name};
use super::figures::Figures;
use super::jobs::Job;
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
    /// The share that all files are in, and all aggregators are about.
    pub share: Share,
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

/// One datacenter.
pub struct Dc {
    pub id: DcId,
    pub disk: Disk,
    /// An old copy of the disk, to be restored one day.
    pub snapshot: Option<Disk>,
    pub agg: Option<Aggregator>,
    /// This process's clock is the world's and this.
    pub clock: u64,
    /// Counts processes, so that results of a dead one are not given to the next.
    pub process: u64,
    /// Which peers this process believes it can reach.
    pub links: BTreeSet<DcId>,
    pub gone: bool,
    /// Whether anything was lost with a disk, so that promises made before are void.
    pub disk_lost_at: Vec<u64>,
}

/// Something that will happen.
#[derive(Clone, Debug)]
pub enum Todo {
    Deliver(Command),
    Tick(DcId, u64),
    Job(DcId, u64, Job),
    /// A process hears what became of its jobs.
    Report(DcId, u64, FileId, Vec<Event>),
    Client(usize),
    Hello(DcId, DcId),
    Fault,
    Revoke,
    Heal,
    Restart(DcId),
    /// A process loads the next file of its store, if there is one left.
    Load(DcId, u64),
    Cut(DcId, DcId, bool),
    /// A datacenter hands everything over to another, or takes its work up again.
    Drain(DcId, Option<DcId>),
}

pub struct World {
    pub now: u64,
    pub random: Random,
    pub dcs: BTreeMap<DcId, Dc>,
    pub clients: Vec<Client>,
    pub queue: BTreeMap<(u64, u64), Todo>,
    pub queued: u64,
    pub cuts: BTreeSet<(DcId, DcId)>,
    pub calm: bool,
    pub rules: Rules,
    pub share: Share,
    /// Segments are scaled down in some worlds, so that files have several.
    pub segment_level: Option<u8>,
    pub figures: Figures,
    pub trace: blake3::Hasher,
    pub text: Option<String>,
    pub violation: Option<Violation>,
    /// Acknowledged: file, datacenter, chunk.
    pub acked: BTreeMap<(FileId, DcId, u64), u32>,
    pub last_tick: BTreeMap<DcId, u64>,
    /// Revoked and durable: what, and where it was said.
    pub revoked: Vec<(Revocation, DcId)>,
}

pub const FAULTS_END: u64 = 60_000;
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
        share: scenario.share,
        segment_level: None,
        figures: Figures::default(),
        trace: blake3::Hasher::new(),
        text: scenario.trace.then(String::new),
        violation: None,
        acked: BTreeMap::new(),
        last_tick: BTreeMap::new(),
        revoked: Vec::new(),
        random,
    };
    world.segment_level = world.random.chance(60).then(|| 2 + world.random.below(3) as u8);
    let files = 2 + world.random.below(4);
    for number in 0..files {
        let client = Client::new(
            scenario.seed.wrapping_mul(64).wrapping_add(number),
            &mut world.random,
            &ids,
            scenario.share,
        );
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
    if world.random.chance(35) {
        let (from, to) = (world.random.pick(&ids), world.random.pick(&ids));
        if let (Some(from), Some(to)) = (from, to) {
            let at = 2_000 + world.random.below(FAULTS_END + 5_000);
            world.schedule(at, Todo::Drain(from, Some(to)));
            if world.random.chance(40) {
                let end = at + 3_000 + world.random.below(30_000);
                world.schedule(end, Todo::Drain(from, None));
            }
        }
    }
    let at = world.random.below(3_000);
    world.schedule(at, Todo::Fault);
    world.schedule(FAULTS_END, Todo::Heal);
    for _ in 0..world.random.below(6) {
        let at = world.random.below(FAULTS_END);
        world.schedule(at, Todo::Revoke);
    }

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
    pub fn schedule(&mut self, delay: u64, todo: Todo) {
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

    pub fn clock(&self, dc: DcId) -> Timestamp {
        Timestamp::new(self.now + self.dcs[&dc].clock)
    }

    pub fn config(&self, me: DcId) -> Config {
        Config {
            rules: match self.segment_level {
                Some(level) => self.rules.with_segments_of(level),
                None => self.rules,
            },
            share: self.share,
            compare_ms: 5_000,
            ask_ms: 500,
            orphan_grace_ms: 90_000,
            takeover_ms: Some(20_000),
            absent_ms: 15_000,
            ..Config::new(me, self.dcs.keys().copied())
        }
    }

    pub fn boot(&mut self, id: DcId) {
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
        self.load(id);
    }

    /// Gives the files of a store to its process: those at rest at once, the others one after the other, and now and
    /// then so slowly that much happens before.
    fn load(&mut self, id: DcId) {
        let disk = &self.dcs[&id].disk;
        let (resting, others): (Vec<_>, Vec<_>) = disk
            .files
            .keys()
            .map(|file| (*file, disk.brief(*file, id)))
            .partition(|(_, brief)| brief.is_some());
        let resting = resting.into_iter().filter_map(|(file, brief)| Some((file, brief?))).collect();
        self.feed(id, NodeEvent::AtRest(resting));
        if self.random.chance(50) {
            for (file, _) in others {
                self.awake(id, file);
            }
        }
        let process = self.dcs[&id].process;
        self.schedule(0, Todo::Load(id, process));
    }

    /// Loads one more file of the store.
    fn load_next(&mut self, id: DcId, process: u64) {
        let Some(agg) = self.dcs[&id].agg.as_ref().filter(|_| self.dcs[&id].process == process) else {
            return;
        };
        let mut files = self.dcs[&id].disk.files.keys().copied();
        match files.find(|file| agg.is_asleep(*file) && agg.state(*file) == FileState::Unheard) {
            Some(file) => {
                self.awake(id, file);
                let delay = self.random.below(1_500);
                self.schedule(delay, Todo::Load(id, process));
            }
            None => self.feed(id, NodeEvent::AllLoaded),
        }
    }

    /// Has a process read what its store has of a file, unless it is in memory: what every request does first.
    pub fn awake(&mut self, id: DcId, file: FileId) {
        let Some(agg) = self.dcs[&id].agg.as_ref() else { return };
        if agg.is_asleep(file) {
            let stored = self.dcs[&id].disk.stored(file, None);
            self.feed(id, NodeEvent::File(file, stored.map_or(Event::Absent, Event::Loaded)));
        }
    }

    /// Has a datacenter hand everything over, if it may, or end that.
    fn drain(&mut self, id: DcId, target: Option<DcId>) {
        let drain = target.map(|target| Drain { phase: Phase::Data, target, evacuate: true });
        let Some(agg) = self.dcs[&id].agg.as_ref() else { return };
        if drain.is_some_and(|drain| agg.may_drain(drain).is_err()) {
            return;
        }
        self.figures.drains += u64::from(drain.is_some());
        self.note(|| format!("{} drains: {drain:?}", dc_name(id)));
        self.feed(id, NodeEvent::Drain(drain));
    }

    /// Gives an event to a datacenter and applies what follows.
    pub fn feed(&mut self, id: DcId, event: NodeEvent) {
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

    pub fn apply(&mut self, id: DcId, effects: Vec<Effect>) {
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

    pub fn apply_one(&mut self, id: DcId, effect: Effect) {
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
            Effect::Hello { peer, greeting } => return self.greet(id, peer, greeting),
            Effect::Answer { peer, greeting, welcome } => return self.answer(peer, id, greeting, welcome),
            Effect::CloseLink(peer) => {
                if dc.links.remove(&peer) {
                    self.feed(id, NodeEvent::LinkDown { peer });
                }
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
            Effect::Revoked(revocation) => {
                check::revoked(self, id, revocation);
                return;
            }
            Effect::Changed(_) | Effect::Refused { .. } => return,
            Effect::Wake(file) => Job::Wake { file },
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

    pub fn step(&mut self, todo: Todo) {
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
            Todo::Report(id, process, file, events) => {
                for event in events {
                    if self.dcs[&id].process == process {
                        self.note(|| format!("{} hears of {}: {event:?}", dc_name(id), short(file)));
                        self.feed(id, NodeEvent::File(file, event));
                    }
                }
            }
            Todo::Client(number) => self.client(number),
            Todo::Hello(a, b) => self.hello(a, b),
            Todo::Fault => self.fault(),
            Todo::Revoke => self.revoke(),
            Todo::Heal => self.heal(),
            Todo::Restart(id) => self.boot(id),
            Todo::Load(id, process) => self.load_next(id, process),
            Todo::Drain(id, target) => self.drain(id, target),
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
}

pub fn short(file: FileId) -> String {
    file.to_string()[..8].to_string()
}
