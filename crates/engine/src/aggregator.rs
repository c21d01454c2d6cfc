//! The aggregator of a datacenter: `(state, event, now) -> effects`.
//!
//! It owns the ledgers of the datacenter's files, tells other datacenters what they need to know, sees when a file is
//! whole, plans its assembly, and decides what may be freed. It is level-triggered: an event changes what is known,
//! and [`advance`](Aggregator::handle) then derives, from what is known alone, what must be done next. Losing a
//! message or an effect's result therefore costs time and nothing else.
//!
//! The driver applies effects strictly in the order given; [`Effect::Persist`] and [`Effect::Drop`] are durable
//! before a later [`Effect::Send`] leaves. Files: `receive.rs` (what peers say), `whole.rs` (files that come in one
//! request), `peer.rs` (links, flights, acknowledgements), `tell.rs` (what
//! another datacenter is told), `compare.rs` (WANT_FILES), `orphan.rs`, `complete.rs` (home duties), `assemble.rs`,
//! `release.rs` (CONFIRM before anything is freed), `standing.rs` (LOAD and DRAIN), `evacuate.rs`, `pages.rs`, `revoke.rs`,
//! `memory.rs` (what outlives the process), `overview.rs` (what metrics tell).

mod assemble;
mod brief;
mod compare;
mod complete;
mod config;
mod effect;
mod evacuate;
mod event;
mod memory;
mod orphan;
mod overview;
mod pages;
mod peer;
mod receive;
mod release;
mod rest;
mod revoke;
mod standing;
mod tell;
mod whole;

pub use brief::Brief;
pub use config::Config;
pub use effect::Effect;
pub use event::{Event, NodeEvent, PullOutcome, RecordSummary, StoredFile};
pub use memory::{FileMemory, MemoryError, NodeMemory};
pub use overview::Backlog;
pub use peer::Greeting;
pub use whole::MeetsWhole;

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{DcId, FileId, Generation, HomeEpoch, Incarnation, TenantId, Timestamp};
use crate::ledger::{Claim, Fact, FileState, Ledger, Taken};
use crate::revocations::Revoked;
use crate::rules::Rules;
use crate::span::Place;

/// What the aggregator keeps of one file.
#[derive(Clone, Debug)]
pub struct File {
    ledger: Ledger,
    record: Option<RecordSummary>,
    /// The highest claim that this datacenter made for itself.
    own_claim: Option<HomeEpoch>,
    /// Whether the file was published here.
    published: bool,
    orphan: Option<orphan::Orphan>,
    tell: BTreeMap<DcId, tell::Tell>,
    /// Since when, and until when last, chunks came that the home was not told of.
    unsaid: Option<tell::Unsaid>,
    fetch: Option<complete::Fetch>,
    home: complete::HomeWork,
    assembly: assemble::Assembly,
    pages: pages::Pages,
    release: Option<release::Release>,
    rechecks: BTreeMap<DcId, release::Recheck>,
    /// When the own store is asked again what it holds, after an answer that was void.
    recount_at: Option<Timestamp>,
    /// How often a comparison with a holder found a difference, since it last said something new.
    disputes: BTreeMap<DcId, u32>,
    last_progress: Timestamp,
    /// What the store remembers of it.
    stored: FileMemory,
    /// Until when it stays in memory because somebody asked for it.
    awake_until: Option<Timestamp>,
    /// The tenant under whose orphans it is counted.
    counted_for: Option<TenantId>,
    /// As what it is counted among all files.
    counted: overview::Counted,
    /// When it wants to be looked at.
    wake: Option<Timestamp>,
    /// Under which time it stands in the table of what is due.
    queued: Option<Timestamp>,
}

impl File {
    fn new(rules: Rules, now: Timestamp) -> Self {
        Self {
            ledger: Ledger::new(rules),
            record: None,
            own_claim: None,
            published: false,
            orphan: None,
            tell: BTreeMap::new(),
            unsaid: None,
            fetch: None,
            home: complete::HomeWork::default(),
            assembly: assemble::Assembly::default(),
            pages: pages::Pages::default(),
            release: None,
            rechecks: BTreeMap::new(),
            recount_at: None,
            disputes: BTreeMap::new(),
            last_progress: now,
            stored: FileMemory::default(),
            awake_until: None,
            counted_for: None,
            counted: overview::Counted::default(),
            wake: None,
            queued: None,
        }
    }

    /// What is known of the file.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The metadata record, if it is here.
    pub fn record(&self) -> Option<&RecordSummary> {
        self.record.as_ref()
    }

    /// Whether chunks are here for a file that nobody has described yet.
    pub fn is_orphan(&self) -> bool {
        self.orphan.is_some()
    }

    /// Whether this datacenter has published the whole file.
    pub fn is_published(&self) -> bool {
        self.published
    }

    /// Where the file stands. A file with an unmet expectation is in conflict.
    pub fn state(&self) -> FileState {
        self.ledger.state()
    }

    /// Where the file stands for whoever wants to send or to read it. What is complete stays so, whatever was lost since;
    /// but the home that knows of chunks which nobody has is receiving them again.
    pub fn standing(&self, me: DcId) -> FileState {
        let is_home = self.ledger.claim().is_some_and(|claim| claim.home == me);
        match self.state() {
            FileState::Complete if is_home && !self.ledger.union().is_whole() => FileState::Receiving,
            state => state,
        }
    }

    /// Asks to be looked at again at `at`, or earlier.
    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }

    /// What must outlive the process.
    pub fn memory(&self) -> FileMemory {
        let expires = self.record.is_some_and(|record| record.expiry_ms.is_some());
        FileMemory::of(&self.ledger, self.own_claim, expires.then_some(self.last_progress))
    }
}

/// The state of a datacenter's aggregator.
#[derive(Clone, Debug)]
pub struct Aggregator {
    config: Config,
    incarnation: Incarnation,
    /// Sequence numbers used in this incarnation.
    spoken: u32,
    generation_floor: Generation,
    /// The floor when this process started: nothing it hears of was stored or read under an older generation.
    first_floor: Generation,
    peers: BTreeMap<DcId, peer::Peer>,
    files: BTreeMap<FileId, File>,
    rest: rest::Rest,
    overview: overview::Overview,
    revoked: Revoked,
    /// Chunks here of files that nobody has described yet.
    orphans: BTreeMap<(TenantId, FileId), u64>,
    /// When which file wants to be looked at.
    due: BTreeSet<(Timestamp, FileId)>,
    /// A file of which more is about to be heard, before anything is derived from it.
    held_back: Option<FileId>,
    own: standing::Own,
    effects: Vec<Effect>,
}

impl Aggregator {
    /// An aggregator that has just started, with what it remembers. Its incarnation is one above the last, and every
    /// generation is raised with it: what an earlier incarnation said counts no longer, so that a restored or damaged
    /// disk cannot leave a promise behind that nobody keeps.
    ///
    /// Of no file anything is known then: each counts as asleep until it is loaded, is found at rest, or
    /// [`NodeEvent::AllLoaded`] says that there is none left.
    pub fn start(config: Config, memory: NodeMemory, now: Timestamp) -> (Self, Vec<Effect>) {
        let incarnation = Incarnation::new(memory.incarnation.number().saturating_add(1));
        let peers = config.peers.iter().map(|&dc| {
            let seen = memory.seen.get(&dc).copied().unwrap_or_default();
            (dc, peer::Peer::new(seen, now))
        });
        let mut this = Self {
            incarnation,
            spoken: 0,
            generation_floor: Generation::floor_of(incarnation),
            first_floor: Generation::floor_of(incarnation),
            peers: peers.collect(),
            files: BTreeMap::new(),
            rest: rest::Rest::default(),
            overview: overview::Overview::default(),
            revoked: memory.revoked,
            orphans: BTreeMap::new(),
            due: BTreeSet::new(),
            held_back: None,
            own: standing::Own::remembered(memory.drain),
            effects: Vec::new(),
            config,
        };
        this.effects.push(Effect::PersistNode(this.node_memory()));
        this.effects.push(Effect::RaiseGenerations(this.generation_floor));
        this.effects.extend(this.revoked.iter().map(Effect::Revoked));
        let effects = std::mem::take(&mut this.effects);
        (this, effects)
    }

    /// Takes an event, and returns what must be done, in order.
    pub fn handle(&mut self, event: NodeEvent, now: Timestamp) -> Vec<Effect> {
        let event = match event {
            NodeEvent::Received(verified) if self.is_elsewhere(&verified) => {
                let command = verified.command();
                let reason = format!("it is not about files of share {}", self.config.share);
                self.refuse(command.from, command.statement.kind(), reason);
                NodeEvent::Tick
            }
            event if self.parks(&event, now) => NodeEvent::Tick,
            event => event,
        };
        match event {
            NodeEvent::Dial { peer } => self.dial(peer),
            NodeEvent::Hello { peer, incarnation, seen_of_me } => {
                self.hello(peer, Greeting { incarnation, seen: seen_of_me }, now);
            }
            NodeEvent::LinkUp { peer, incarnation, seen_of_me } => {
                self.link_up(peer, Greeting { incarnation, seen: seen_of_me }, now);
            }
            NodeEvent::LinkDown { peer } => self.link_down(peer, now),
            NodeEvent::File(id, event) => {
                self.file_event(id, event, now);
                self.advance(id, now);
            }
            NodeEvent::Received(verified) => self.received(&verified, now),
            NodeEvent::Revoke(revocation) => {
                self.take_revocation(revocation);
            }
            NodeEvent::AtRest(briefs) => self.at_rest(&briefs),
            NodeEvent::AllLoaded => self.all_loaded(now),
            NodeEvent::Load(load) => self.loaded(load, now),
            NodeEvent::Drain(drain) => self.set_drain(drain, now),
            NodeEvent::Tick => {}
        }
        while let Some(&(at, id)) = self.due.first() {
            if at > now {
                break;
            }
            self.due.pop_first();
            match self.files.get_mut(&id) {
                Some(file) => {
                    file.wake = None;
                    file.queued = None;
                    self.advance(id, now);
                }
                None => self.wake_when_due(id, now),
            }
        }
        self.evacuate_when_due(now);
        self.say_drain_when_due(now);
        self.compare_when_due(now);
        self.serve_waiting(now);
        self.peers.values_mut().for_each(|peer| peer.note_backlog(now));
        self.tell_revocations(now);
        std::mem::take(&mut self.effects)
    }

    /// When [`NodeEvent::Tick`] is due at the latest.
    pub fn next_timeout(&self) -> Option<Timestamp> {
        let files = self.due.first().map(|(at, _)| *at);
        let peers = self.peers.values().filter_map(peer::Peer::next_compare).min();
        let peers = peers.filter(|_| !self.rest.is_loading());
        let resend_ms = self.config.resend_ms;
        let told = self.peers.values().filter_map(|peer| peer.revocations.next_timeout(resend_ms)).min();
        let evacuation = self.next_evacuation().filter(|_| !self.rest.is_loading());
        files.into_iter().chain(peers).chain(told).chain(evacuation).chain(self.next_drain_said()).min()
    }

    /// What is known of a file that is not [asleep](Self::is_asleep).
    pub fn file(&self, id: FileId) -> Option<&File> {
        self.files.get(&id)
    }

    /// Files of a tenant that nobody has described yet, and chunks of them here.
    pub fn orphans(&self, tenant: TenantId) -> (usize, u64) {
        let last = FileId::from_bytes([0xFF; 16]);
        let all = self.orphans.range((tenant, FileId::NIL)..=(tenant, last));
        all.fold((0, 0), |(files, sum), (_, chunks)| (files + 1, sum + chunks))
    }

    /// Chunks here of this file of a tenant, if nobody has described it yet.
    pub fn orphan_chunks(&self, tenant: TenantId, file: FileId) -> u64 {
        self.orphans.get(&(tenant, file)).copied().unwrap_or(0)
    }

    /// What has been revoked.
    pub fn revoked(&self) -> &Revoked {
        &self.revoked
    }

    /// Every file that is not asleep, in order of id.
    pub fn files(&self) -> impl Iterator<Item = (FileId, &File)> {
        self.files.iter().map(|(id, file)| (*id, file))
    }

    /// This process's incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The highest incarnation of a peer that was seen.
    pub fn seen(&self, peer: DcId) -> Incarnation {
        self.peers.get(&peer).map(peer::Peer::seen).unwrap_or_default()
    }

    /// The generation under which something that is stored now is held.
    pub fn generation(&self, id: FileId) -> Generation {
        let held = self.files.get(&id).and_then(|file| file.ledger.held_by(self.config.me));
        held.map_or(self.generation_floor, |(generation, _)| generation.max(self.generation_floor))
    }

    /// Whether a peer can be reached.
    pub fn is_linked(&self, peer: DcId) -> bool {
        self.peers.get(&peer).is_some_and(peer::Peer::is_up)
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn node_memory(&self) -> NodeMemory {
        NodeMemory {
            incarnation: self.incarnation,
            seen: self.peers.iter().map(|(dc, peer)| (*dc, peer.seen())).collect(),
            revoked: self.revoked.clone(),
            drain: self.own.drain,
        }
    }

    fn me(&self) -> DcId {
        self.config.me
    }

    fn file_mut(&mut self, id: FileId, now: Timestamp) -> &mut File {
        let rules = self.config.rules;
        self.files.entry(id).or_insert_with(|| File::new(rules, now))
    }

    fn file_event(&mut self, id: FileId, event: Event, now: Timestamp) {
        let me = self.me();
        let rules = self.config.rules;
        let floor = self.generation_floor;
        let first_floor = self.first_floor;
        let file = self.files.entry(id).or_insert_with(|| File::new(rules, now));
        match event {
            Event::Created { record, home } => {
                file.record = Some(record);
                file.last_progress = now;
                // A home that is no datacenter of this cluster would never assemble anything.
                let home = if self.peers.contains_key(&home) { home } else { me };
                let claim = Claim { epoch: HomeEpoch::new(0), home };
                let before = (file.ledger.claim(), file.ledger.file());
                if home == me {
                    file.own_claim = file.own_claim.max(Some(claim.epoch));
                }
                let fact =
                    Fact::Meta { claim, size: record.size, tenant: record.tenant, digest: record.digest };
                // Local facts are never refused.
                let _ = file.ledger.take(fact);
                if before.0 != file.ledger.claim() {
                    file.home_changed(me, before.0, now);
                }
                let sized = before.1 != file.ledger.file();
                self.persist(id);
                self.tell_everyone(id);
                if sized && before.0.is_some() {
                    self.restate_own(id);
                }
            }
            Event::Settled { size } => {
                let (Some(record), Some(claim)) = (file.record, file.ledger.claim()) else { return };
                file.last_progress = now;
                let (tenant, digest) = (record.tenant, record.digest);
                let settled = file.ledger.take(Fact::Meta { claim, size: Some(size), tenant, digest });
                if settled == Ok(Taken::New) {
                    self.settled(id);
                    self.restate_own(id);
                }
            }
            Event::Loaded(stored) => {
                file.awake_until = Some(now.plus(self.config.awake_ms));
                self.take_stored(id, &stored, now);
                self.woken(id, now);
            }
            Event::Whole(stored) => {
                self.take_stored(id, &stored, now);
                self.tell_everyone(id);
                self.woken(id, now);
            }
            Event::Absent => self.absent(id, now),
            Event::Stored { generation, spans } => {
                if !spans.is_empty() {
                    file.last_progress = now;
                }
                file.take_own(&self.config, floor, generation.max(first_floor), &spans, now);
                self.effects.push(Effect::Changed(id));
            }
            Event::StoredOrphan { tenant, chunks } => file.note_orphan(tenant, chunks, &self.config, now),
            Event::Remove { reason, tenant } => {
                let dropped = file.ledger.take(Fact::Drop { reason, tenant });
                if dropped == Ok(Taken::New) {
                    self.drop_file(id, tenant);
                    self.tell_everyone(id);
                }
            }
            Event::Wanted => file.want_record(now),
            Event::TakeOver => self.take_over(id, now),
            Event::FetchFailed => file.fetch_failed(now, self.config.retry_ms),
            Event::Restated { to, generation, spans } => {
                self.restated(id, to, generation.max(first_floor), spans, now)
            }
            Event::PageLoaded { page } => self.page_loaded(id, page.as_ref(), now),
            Event::Pulled { place, outcome } => file.pulled(me, place, outcome, now, self.config.retry_ms),
            Event::RootRead { root } => self.root_read(id, root, now),
            Event::Published { ok } => self.published(id, ok, now),
            Event::Resolved { resolution } => {
                file.resolved(me, resolution.as_ref(), now, self.config.retry_ms)
            }
            Event::Rechecked { to, nonce, root } => self.rechecked(id, to, nonce, root, now),
            Event::Freed { generation } => self.freed(id, generation, now),
        }
    }

    /// Takes what the store has of a file.
    fn take_stored(&mut self, id: FileId, stored: &StoredFile, now: Timestamp) {
        let (floor, first_floor) = (self.generation_floor, self.first_floor);
        self.rises(id);
        self.file_mut(id, now).stored.clone_from(&stored.memory);
        let Some(file) = self.files.get_mut(&id) else { return };
        let counts = file.load(&self.config, floor, stored.generation.max(first_floor), stored, now);
        if file.is_worth_remembering() {
            self.persist(id);
        }
        self.effects.push(Effect::Changed(id));
        if !counts {
            self.retract(id, now);
        }
    }

    /// Has the store remember what it does not remember yet.
    fn persist(&mut self, id: FileId) {
        let Some(file) = self.files.get_mut(&id) else { return };
        let memory = file.memory();
        if memory != file.stored {
            file.stored = memory.clone();
            self.effects.push(Effect::Persist(id, memory));
        }
    }

    /// Forgets all that matters no more once a file is dropped, and drops it durably.
    fn drop_file(&mut self, id: FileId, tenant: TenantId) {
        let Some(file) = self.files.get_mut(&id) else { return };
        file.orphan = None;
        file.unsaid = None;
        file.fetch = None;
        file.home = complete::HomeWork::default();
        file.assembly = assemble::Assembly::default();
        file.release = None;
        file.rechecks = BTreeMap::new();
        file.recount_at = None;
        file.published = false;
        file.stored = file.memory();
        self.effects.push(Effect::Drop(id, tenant, file.memory()));
        self.effects.push(Effect::Changed(id));
    }

    /// Asks the own store what it holds of a file, to be taken as facts.
    fn restate_own(&mut self, id: FileId) {
        let me = self.me();
        let Some(file) = self.files.get(&id).filter(|file| file.record.is_some()) else { return };
        let Some(shape) = file.ledger.file() else { return };
        let places = match Place::top_children(shape) {
            Some((left, right)) => vec![left, right],
            None => Place::tile(0..shape.chunks(), 0, shape),
        };
        self.effects.extend(places.into_iter().map(|place| Effect::Restate { file: id, to: me, place }));
    }

    /// Asks the own store again, a while after an answer that was void.
    fn advance_recount(&mut self, id: FileId, now: Timestamp) {
        let Some(file) = self.files.get_mut(&id) else { return };
        let Some(at) = file.recount_at else { return };
        if now < at {
            file.wake_at(at);
        } else {
            file.recount_at = None;
            self.restate_own(id);
        }
    }

    /// Derives from what is known of a file what must be done next.
    fn advance(&mut self, id: FileId, now: Timestamp) {
        if self.held_back == Some(id) {
            return;
        }
        self.advance_orphan(id, now);
        self.advance_fetch(id, now);
        self.advance_recount(id, now);
        self.advance_absence(id, now);
        self.advance_pages(id, now);
        self.advance_home(id, now);
        self.advance_assembly(id, now);
        self.advance_release(id, now);
        self.advance_expiry(id, now);
        self.advance_telling(id, now);
        let Some(file) = self.files.get_mut(&id) else { return };
        if file.ledger.state() == FileState::Unheard && file.record.is_none() && file.orphan.is_none() {
            // Nothing is known and nothing is here: whoever only asked leaves no trace.
            if let Some(at) = file.queued {
                self.due.remove(&(at, id));
            }
            self.forget(id);
            return;
        }
        self.count_orphan(id);
        self.count_file(id, now);
        if self.lay_to_rest(id, now) {
            return;
        }
        let Some(file) = self.files.get_mut(&id) else { return };
        if file.queued != file.wake {
            if let Some(at) = file.queued {
                self.due.remove(&(at, id));
            }
            if let Some(at) = file.wake {
                self.due.insert((at, id));
            }
            file.queued = file.wake;
        }
    }
}
