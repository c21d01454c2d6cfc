//! The aggregator of a datacenter: `(state, event, now) -> effects`.
//!
//! It owns the ledgers of the datacenter's files, tells other datacenters what they need to know, sees when a file is
//! whole, plans its assembly, and decides what may be freed. It is level-triggered: an event changes what is known,
//! and [`advance`](Aggregator::handle) then derives, from what is known alone, what must be done next. Losing a
//! message or an effect's result therefore costs time and nothing else.
//!
//! The driver applies effects strictly in the order given; [`Effect::Persist`] and [`Effect::Drop`] are durable
//! before a later [`Effect::Send`] leaves. Files: `peer.rs` (links, flights, acknowledgements), `tell.rs` (what
//! another datacenter is told), `compare.rs` (WANT_FILES), `orphan.rs`, `complete.rs` (home duties), `assemble.rs`,
//! `release.rs` (CONFIRM before anything is freed), `pages.rs`, `memory.rs` (what outlives the process).

mod assemble;
mod compare;
mod complete;
mod memory;
mod orphan;
mod pages;
mod peer;
mod release;
mod tell;

pub use memory::{FileMemory, MemoryError, NodeMemory};

use std::collections::{BTreeMap, BTreeSet};

use crate::command::{Command, DropReason, Kind, Statement, Verified};
use crate::geometry::Geometry;
use crate::hash::{RecordDigest, Root};
use crate::ids::{DcId, FileId, Generation, HomeEpoch, Incarnation, Nonce, TenantId, Timestamp};
use crate::ledger::{Claim, Fact, FileState, Ledger, Page, Taken};
use crate::resolve::Resolution;
use crate::rules::Rules;
use crate::span::{Place, Span};

/// Times and limits of an aggregator, all in milliseconds or counts.
#[derive(Clone, Debug)]
pub struct Config {
    /// This datacenter.
    pub me: DcId,
    /// Every other datacenter of the cluster.
    pub peers: BTreeSet<DcId>,
    /// Spans are said once no chunk of the file came for this long.
    pub quiet_ms: u64,
    /// While chunks keep coming, whole stripes are said this often.
    pub stripe_ms: u64,
    /// What was not acknowledged is said again after this long.
    pub resend_ms: u64,
    /// How often all that is known is compared with each peer.
    pub compare_ms: u64,
    /// How often the others are asked about an unknown file.
    pub ask_ms: u64,
    /// How long every datacenter must say UNKNOWN before an orphan goes.
    pub orphan_grace_ms: u64,
    /// After how long what only a silent holder has counts as missing.
    pub absent_ms: u64,
    /// After how long a silent home is taken over; `None`: only when told to.
    pub takeover_ms: Option<u64>,
    /// How long after an attempt (a pull, a fetch, a confirmation) failed it is tried again.
    pub retry_ms: u64,
    /// Pulls of one file under way at once.
    pub max_pulls: usize,
    /// Commands to one peer that may wait for their acknowledgement.
    pub max_flights: usize,
    /// The safety rules.
    pub rules: Rules,
}

impl Config {
    /// The defaults of a datacenter among these peers.
    pub fn new(me: DcId, peers: impl IntoIterator<Item = DcId>) -> Self {
        Self {
            me,
            peers: peers.into_iter().filter(|dc| *dc != me).collect(),
            quiet_ms: 30,
            stripe_ms: 1_000,
            resend_ms: 1_000,
            compare_ms: 30_000,
            ask_ms: 2_000,
            orphan_grace_ms: 3_600_000,
            absent_ms: 60_000,
            takeover_ms: None,
            retry_ms: 500,
            max_pulls: 4,
            max_flights: 256,
            rules: Rules::all(),
        }
    }
}

/// What a datacenter keeps of a metadata record in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordSummary {
    /// Names it.
    pub digest: RecordDigest,
    /// Who owns the file.
    pub tenant: TenantId,
    /// The file's shape.
    pub size: Option<Geometry>,
    /// The root that the client expects.
    pub expected_root: Option<Root>,
    /// Milliseconds after the last progress at which the file expires.
    pub expiry_ms: Option<u64>,
}

/// What a datacenter finds of a file in its store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// Whose it is.
    pub tenant: TenantId,
    /// The metadata record, if it is there.
    pub record: Option<RecordSummary>,
    /// What the aggregator remembered.
    pub memory: FileMemory,
    /// The generation of what is held.
    pub generation: Generation,
    /// What is held; empty while the shape is unknown.
    pub spans: Vec<Span>,
    /// Number of chunks held.
    pub chunks: u64,
    /// The root under which the file was published.
    pub published: Option<Root>,
}

/// How a pull ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullOutcome {
    /// Everything under the place is here now.
    Done,
    /// The holder could not be reached, or did not answer in time.
    Unreachable,
    /// The holder does not have it (any more).
    Missing,
    /// What the holder sent does not hash to what it says, here.
    Mismatch(Place),
    /// The own store refused.
    StoreFailed,
}

/// Something that happened.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "events are made and consumed at once, never kept in bulk")]
pub enum Event {
    /// A client's metadata record is durable here. `home` is the datacenter that the client asked for, or this one.
    Created {
        /// The record.
        record: RecordSummary,
        /// Where the file should be reassembled.
        home: DcId,
    },
    /// What the store has of a file: at start, after a record was fetched, after a loss. What was read under an older
    /// generation than the newest that was reported counts for the record and what is remembered, not for the chunks.
    Loaded(StoredFile),
    /// Chunks of a known file are durable here.
    Stored {
        /// Under this generation, the store's when they became durable.
        generation: Generation,
        /// Their spans.
        spans: Vec<Span>,
    },
    /// Chunks of a file that this datacenter has not heard of are durable here.
    StoredOrphan {
        /// Whose they are.
        tenant: TenantId,
    },
    /// The owner ends the file.
    Remove {
        /// Why.
        reason: DropReason,
        /// Who owns it.
        tenant: TenantId,
    },
    /// A client asks for a file whose metadata record is not here: fetch it.
    Wanted,
    /// Take the file over: its home is lost.
    TakeOver,
    /// The record could not be fetched.
    FetchFailed,
    /// The store's answer to [`Effect::Restate`].
    Restated {
        /// For whom; this datacenter itself if it wants to compare.
        to: DcId,
        /// The generation of what is held, as of the same moment. If more was freed or lost since, the answer is void.
        generation: Generation,
        /// What is held there, one level or more finer than what was asked for.
        spans: Vec<Span>,
    },
    /// The store's answer to [`Effect::LoadPage`]; `None` if the page is lost.
    PageLoaded {
        /// The page.
        page: Option<Page>,
    },
    /// A pull ended. What it brought came as [`Event::Stored`] before.
    Pulled {
        /// What was pulled.
        place: Place,
        /// How it ended.
        outcome: PullOutcome,
    },
    /// The root of a file of one chunk, from its bytes; `None` if they could not be read.
    RootRead {
        /// The root.
        root: Option<Root>,
    },
    /// An [`Effect::Publish`] ended.
    Published {
        /// Whether the file is assembled now.
        ok: bool,
    },
    /// An [`Effect::Resolve`] ended; `None` if nothing gives the root.
    Resolved {
        /// What contradicted the root, and was removed.
        resolution: Option<Resolution>,
    },
    /// The copy here was checked again; `None` if it is not good.
    Rechecked {
        /// Who asked.
        to: DcId,
        /// To be repeated.
        nonce: Nonce,
        /// The root of the copy.
        root: Option<Root>,
    },
    /// The chunks here were freed; nothing is held as of this generation.
    Freed {
        /// The new generation.
        generation: Generation,
    },
}

/// Something that happened between datacenters, or to this one as a whole.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "events are made and consumed at once, never kept in bulk")]
pub enum NodeEvent {
    /// A peer can be reached. Both sides said which incarnation they are, and which they have seen of the other.
    LinkUp {
        /// The peer.
        peer: DcId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// The highest incarnation of this datacenter that it has seen.
        seen_of_me: Incarnation,
    },
    /// A peer cannot be reached any more.
    LinkDown {
        /// The peer.
        peer: DcId,
    },
    /// Something happened to one file.
    File(FileId, Event),
    /// A peer said something.
    Received(Verified),
    /// Time passed; see [`Aggregator::next_timeout`].
    Tick,
}

/// Something to do. Results come back as events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Remember this of the file, durably, before any later effect.
    Persist(FileId, FileMemory),
    /// Remember this of the datacenter, durably, before any later effect.
    PersistNode(NodeMemory),
    /// Raise every file's generation to at least this, durably, before any later effect.
    RaiseGenerations(Generation),
    /// Sign and send, if the peer can be reached; otherwise drop it.
    Send(Command),
    /// Close the link to a peer: it is an older incarnation.
    CloseLink(DcId),
    /// Fetch the metadata record from a peer, make it durable, and say [`Event::Loaded`] or [`Event::FetchFailed`].
    FetchRecord {
        /// The file.
        file: FileId,
        /// Who should have it.
        from: DcId,
        /// Names it.
        digest: RecordDigest,
    },
    /// Read what the own store holds under a place: [`Event::Restated`] with every span of it, as large as they get
    /// but one level finer than the place at least (a single chunk as it is). Generation and spans are read together.
    Restate {
        /// The file.
        file: FileId,
        /// For whom.
        to: DcId,
        /// Under which place.
        place: Place,
    },
    /// Keep a page of the ledger, in place of an older one of that segment.
    StorePage(FileId, Page),
    /// Read a page: [`Event::PageLoaded`], also if there is none. One of a file is asked for at a time.
    LoadPage(FileId, u64),
    /// Pull what is missing here under `place` from a holder that says it has `under`: [`Event::Pulled`].
    Pull {
        /// The file.
        file: FileId,
        /// The holder.
        from: DcId,
        /// What to pull: at most a unit.
        place: Place,
        /// The span it lies in, whose value everything is checked against.
        under: Span,
    },
    /// Read the only chunk of a file and hash it as a whole: [`Event::RootRead`].
    ReadRoot(FileId),
    /// Publish the file, of which every chunk is here: [`Event::Published`].
    Publish(FileId, Root),
    /// Check the published copy again: [`Event::Rechecked`].
    Recheck {
        /// The file.
        file: FileId,
        /// Who asks.
        to: DcId,
        /// To be repeated.
        nonce: Nonce,
    },
    /// Free the chunks here; the file is confirmed elsewhere: [`Event::Freed`].
    Free(FileId),
    /// Every chunk is here, and they do not merge to the root: find out with [`resolve`](crate::resolve::resolve) which
    /// of them contradict it, remove those, and say [`Event::Resolved`], then [`Event::Loaded`].
    Resolve {
        /// The file.
        file: FileId,
        /// The root that stands.
        root: Root,
        /// What every other holder says.
        others: BTreeMap<DcId, Vec<Span>>,
    },
    /// Remember the drop, durably, before any later effect; then remove the chunks.
    Drop(FileId, TenantId, FileMemory),
    /// Remove an orphan: every datacenter has said for long enough that it does not know it.
    DiscardOrphan(FileId),
    /// What is known of the file changed: wake whoever waits.
    Changed(FileId),
    /// A peer said something that it should not; for logs and metrics.
    Refused {
        /// Who.
        peer: DcId,
        /// What kind of command.
        kind: Kind,
        /// Why.
        reason: String,
    },
}

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

    /// Asks to be looked at again at `at`, or earlier.
    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }

    /// What must outlive the process.
    fn memory(&self) -> FileMemory {
        FileMemory::of(&self.ledger, self.own_claim)
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
    /// When which file wants to be looked at.
    due: BTreeSet<(Timestamp, FileId)>,
    effects: Vec<Effect>,
}

impl Aggregator {
    /// An aggregator that has just started, with what it remembers. Its incarnation is one above the last, and every
    /// generation is raised with it: what an earlier incarnation said counts no longer, so that a restored or damaged
    /// disk cannot leave a promise behind that nobody keeps.
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
            due: BTreeSet::new(),
            effects: Vec::new(),
            config,
        };
        this.effects.push(Effect::PersistNode(this.node_memory()));
        this.effects.push(Effect::RaiseGenerations(this.generation_floor));
        let effects = std::mem::take(&mut this.effects);
        (this, effects)
    }

    /// Takes an event, and returns what must be done, in order.
    pub fn handle(&mut self, event: NodeEvent, now: Timestamp) -> Vec<Effect> {
        match event {
            NodeEvent::LinkUp { peer, incarnation, seen_of_me } => {
                self.link_up(peer, incarnation, seen_of_me, now);
            }
            NodeEvent::LinkDown { peer } => self.link_down(peer, now),
            NodeEvent::File(id, event) => {
                self.file_event(id, event, now);
                self.advance(id, now);
            }
            NodeEvent::Received(verified) => self.received(&verified, now),
            NodeEvent::Tick => {}
        }
        while let Some(&(at, id)) = self.due.first() {
            if at > now {
                break;
            }
            self.due.pop_first();
            if let Some(file) = self.files.get_mut(&id) {
                file.wake = None;
                file.queued = None;
            }
            self.advance(id, now);
        }
        self.compare_when_due(now);
        self.serve_waiting(now);
        std::mem::take(&mut self.effects)
    }

    /// When [`NodeEvent::Tick`] is due at the latest.
    pub fn next_timeout(&self) -> Option<Timestamp> {
        let files = self.due.first().map(|(at, _)| *at);
        let peers = self.peers.values().filter_map(peer::Peer::next_compare).min();
        files.into_iter().chain(peers).min()
    }

    /// What is known of a file.
    pub fn file(&self, id: FileId) -> Option<&File> {
        self.files.get(&id)
    }

    /// Every file, in order of id.
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
                self.effects.push(Effect::Persist(id, file.memory()));
                self.tell_everyone(id);
                if sized && before.0.is_some() {
                    self.restate_own(id);
                }
            }
            Event::Loaded(stored) => {
                let generation = stored.generation.max(first_floor);
                let counts = file.load(&self.config, floor, generation, &stored, now);
                if file.is_worth_remembering() {
                    self.effects.push(Effect::Persist(id, file.memory()));
                }
                self.effects.push(Effect::Changed(id));
                if !counts {
                    self.retract(id, now);
                }
            }
            Event::Stored { generation, spans } => {
                if !spans.is_empty() {
                    file.last_progress = now;
                }
                file.take_own(&self.config, floor, generation.max(first_floor), &spans, now);
                self.effects.push(Effect::Changed(id));
            }
            Event::StoredOrphan { tenant } => file.note_orphan(tenant, &self.config, now),
            Event::Remove { reason, tenant } => {
                let dropped = file.ledger.take(Fact::Drop { reason, tenant });
                if dropped == Ok(Taken::New) {
                    self.drop_file(id, tenant);
                    self.tell_everyone(id);
                }
            }
            Event::Wanted => file.want_record(now),
            Event::TakeOver => self.take_over(id),
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
        self.effects.push(Effect::Drop(id, tenant, file.memory()));
        self.effects.push(Effect::Changed(id));
    }

    /// Takes what a peer said.
    fn received(&mut self, verified: &Verified, now: Timestamp) {
        let command = verified.command();
        let (from, id) = (command.from, command.file);
        if !self.heard(from, command.sequence.incarnation()) {
            return;
        }
        match command.statement {
            Statement::MetaRequest => self.asked(id, from, now),
            Statement::Unknown => {
                if let Some(file) = self.files.get_mut(&id) {
                    file.said_unknown(from, now);
                }
                self.advance(id, now);
            }
            Statement::WantSpans { place } => {
                let holds = |file: &&File| file.ledger.chunks_held_by(self.config.me) > 0;
                let holding = self.files.get(&id).filter(holds);
                if let Some(shape) = holding.and_then(|file| file.ledger.file()) {
                    match place.check(shape) {
                        Ok(()) => self.effects.push(Effect::Restate { file: id, to: from, place }),
                        Err(error) => self.refuse(from, Kind::WantSpans, error.to_string()),
                    }
                } else {
                    let held = self.files.get(&id).and_then(|file| file.ledger.held_by(self.config.me));
                    let generation = held.map_or(self.generation_floor, |(generation, _)| {
                        generation.max(self.generation_floor)
                    });
                    self.say(from, id, Statement::HaveNothing { generation }, now);
                }
            }
            Statement::WantFiles { bits, digest } => self.compare(from, id, bits, digest, now),
            Statement::Confirm { nonce } => self.asked_to_confirm(id, from, nonce, now),
            Statement::Ack { sequence, .. } => self.acknowledged(from, sequence, now),
            Statement::Assembled { nonce, .. } if nonce.number() != 0 => {
                self.take_fact(from, id, &command.statement, now);
                self.confirmed(id, from, &command.statement, now);
                self.advance(id, now);
            }
            Statement::Meta { .. }
            | Statement::Have { .. }
            | Statement::HaveNothing { .. }
            | Statement::Root { .. }
            | Statement::Assembled { .. }
            | Statement::Conflict { .. }
            | Statement::Drop { .. } => {
                if self.take_fact(from, id, &command.statement, now) {
                    self.acknowledge(verified);
                }
                self.advance(id, now);
            }
            Statement::Revoke { .. }
            | Statement::Load { .. }
            | Statement::Drain { .. }
            | Statement::SessionMove { .. } => {
                // About no file: the driver hands these to the services that they concern.
            }
        }
    }

    /// Takes the fact that a peer stated; whether it may be acknowledged.
    fn take_fact(&mut self, from: DcId, id: FileId, statement: &Statement, now: Timestamp) -> bool {
        let me = self.me();
        let fact = match Fact::of(from, statement) {
            Ok(Some(fact)) => fact,
            Ok(None) => return false,
            Err(error) => {
                self.refuse(from, statement.kind(), error.to_string());
                return true;
            }
        };
        let known = self.files.contains_key(&id);
        let file = self.file_mut(id, now);
        let before = (file.ledger.state(), file.ledger.claim(), file.ledger.file());
        let taken = file.ledger.take(fact);
        if let Statement::Have { span, .. } = statement {
            file.home.answered(from, span.place);
            file.touch(span.place);
        }
        let after = (file.ledger.state(), file.ledger.claim(), file.ledger.file());
        match taken {
            Ok(Taken::New) => {
                file.last_progress = now;
                if let Fact::Have { holder, .. } = fact {
                    file.disputes.remove(&holder);
                }
                if let Fact::Meta { claim, .. } = fact {
                    file.heard_of(claim, me);
                }
                if before.1 != after.1 {
                    file.home_changed(me, before.1, now);
                }
                let memory = self.files.get(&id).map(File::memory);
                if let Fact::Drop { tenant, .. } = fact {
                    self.drop_file(id, tenant);
                } else if before != after
                    && let (Some(memory), Some(file)) = (memory, self.files.get(&id))
                    && file.is_worth_remembering()
                {
                    self.effects.push(Effect::Persist(id, memory));
                }
                if before.2 != after.2 {
                    // What is here has places only now.
                    self.restate_own(id);
                }
                self.effects.push(Effect::Changed(id));
                true
            }
            Ok(Taken::Known) => true,
            Ok(Taken::NotYet) => {
                if !known {
                    self.files.remove(&id);
                }
                false
            }
            Err(error) => {
                if !known {
                    self.files.remove(&id);
                }
                self.refuse(from, statement.kind(), error.to_string());
                true
            }
        }
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

    fn refuse(&mut self, peer: DcId, kind: Kind, reason: String) {
        self.effects.push(Effect::Refused { peer, kind, reason });
    }

    /// Derives from what is known of a file what must be done next.
    fn advance(&mut self, id: FileId, now: Timestamp) {
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
            self.files.remove(&id);
            return;
        }
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
