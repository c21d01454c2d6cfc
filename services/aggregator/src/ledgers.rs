//! The ledger task: the one owner of the engine's aggregator.
//!
//! Events come in over a bounded channel, are handled in batches, and their effects applied strictly in order: what
//! must be durable is awaited before anything later is sent. Effects that take time are carried out elsewhere
//! (`carry.rs`) and come back as events. The task ends when its datacenter drains and nothing waits any more, or is
//! killed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use sluice_engine::aggregator::{Aggregator, Effect, Event, FileMemory, Greeting, NodeEvent, NodeMemory};
use sluice_engine::command::{Command, Statement};
use sluice_engine::ids::{FileId, Incarnation, TenantId, Timestamp};
use sluice_engine::revocations::{Revocation, Revoking};
use sluice_proto::problem::{Problem, Refusal};
use sluice_store::{Advice, ChunkStore, StoreError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::{AggregatorError, AggregatorService, carry, refusal};

/// Inputs that may wait: enough that a burst of registrations does not stall workers, few enough to bound memory.
const INPUTS: usize = 1024;

/// How soon the store is asked again to remember what it refused, and how many files at a time.
const KEEP_AGAIN: Duration = Duration::from_secs(1);
const KEEP_SOME: usize = 64;

/// Inputs handled before their effects are applied: they share one group commit.
const BATCH: usize = 128;

/// Waiters for a change of any file. Past that, waiting is refused.
const MAX_WAITERS: usize = 1 << 16;

type Question = Box<dyn FnOnce(&Aggregator) + Send>;

/// Something for the ledger task.
pub(crate) enum Input {
    /// An event, and whom to tell once its effects are durable, or why they are not.
    Event(Box<NodeEvent>, Option<Settled>),
    /// The beginning of a link, and who waits for what is to be said at it.
    Greet(Box<NodeEvent>, oneshot::Sender<Greeted>),
    /// A question.
    Ask(Question),
    /// Say when what is known of a file changes.
    Watch(FileId, oneshot::Sender<()>),
}

/// What to say at the beginning of a link, and whether the other may speak.
pub(crate) struct Greeted {
    pub(crate) greeting: Greeting,
    pub(crate) welcome: bool,
}

/// Whoever waits until what is known of a file, or of the datacenter, is durable.
pub(crate) struct Settled {
    file: Option<FileId>,
    done: oneshot::Sender<Result<(), StoreError>>,
}

/// What must be remembered of a file, and could not be stored yet.
enum Unkept {
    Facts(FileMemory),
    End(TenantId, FileMemory),
}

/// A handle to the ledger task.
#[derive(Clone)]
pub(crate) struct Ledgers(mpsc::Sender<Input>);

/// The handle, and what goes to the task.
pub(crate) fn channel() -> (Ledgers, mpsc::Receiver<Input>) {
    let (sender, receiver) = mpsc::channel(INPUTS);
    (Ledgers(sender), receiver)
}

impl Ledgers {
    async fn send(&self, input: Input) -> Result<(), Refusal> {
        self.0.send(input).await.map_err(|_| refusal::stopping())
    }

    /// Gives an event to the engine; returns once what follows is durable.
    pub(crate) async fn settle(&self, file: FileId, event: Event) -> Result<(), Refusal> {
        self.settle_node(Some(file), NodeEvent::File(file, event)).await
    }

    /// Revokes tokens: durable here when this returns, and told to every peer from then on.
    pub(crate) async fn revoke(&self, revocation: Revocation) -> Result<(), Refusal> {
        let fits = move |aggregator: &Aggregator| {
            let mut revoked = aggregator.revoked().clone();
            aggregator.revoked().has_room() || revoked.take(revocation) == Revoking::Known
                // All of a tenant takes the place of its sessions.
                || (revocation.session.is_none() && revoked.len() <= aggregator.revoked().len())
        };
        if !self.ask(fits).await? {
            let detail = "as many tokens are revoked one by one as a datacenter remembers";
            return Err(Refusal::new(Problem::RevocationsFull, detail)
                .hint("revoke all tokens of a tenant instead: that takes the place of those of its own"));
        }
        self.settle_node(None, NodeEvent::Revoke(revocation)).await
    }

    /// The same as [`settle`](Self::settle) for an event that concerns a file, or the datacenter.
    pub(crate) async fn settle_node(&self, file: Option<FileId>, event: NodeEvent) -> Result<(), Refusal> {
        let (done, settled) = oneshot::channel();
        let settling = Settled { file, done };
        self.send(Input::Event(Box::new(event), Some(settling))).await?;
        let settled = settled.await.map_err(|_| refusal::stopping())?;
        settled.map_err(|error| refusal::of_store(&error))
    }

    /// Gives an event to the engine.
    pub(crate) async fn tell(&self, event: NodeEvent) {
        // Nobody is left to tell when the task has ended.
        let _ = self.send(Input::Event(Box::new(event), None)).await;
    }

    /// Begins a link with [`NodeEvent::Dial`] or [`NodeEvent::Hello`]; returns what to say, once the incarnation that
    /// says it is durable.
    pub(crate) async fn greet(&self, event: NodeEvent) -> Result<Greeted, Refusal> {
        let (sender, greeted) = oneshot::channel();
        self.send(Input::Greet(Box::new(event), sender)).await?;
        greeted.await.map_err(|_| refusal::stopping())
    }

    /// Asks the engine.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Aggregator) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let (sender, answer) = oneshot::channel();
        let question = Box::new(move |aggregator: &Aggregator| {
            // Whoever asked may have gone.
            let _ = sender.send(question(aggregator));
        });
        self.send(Input::Ask(question)).await?;
        answer.await.map_err(|_| refusal::stopping())
    }

    /// Something that ends when what is known of a file changes. Look after asking for it, not before.
    pub(crate) async fn watch(&self, file: FileId) -> Result<oneshot::Receiver<()>, Refusal> {
        let (sender, changed) = oneshot::channel();
        self.send(Input::Watch(file, sender)).await?;
        Ok(changed)
    }
}

/// The task.
pub(crate) struct LedgerTask {
    aggregator: Aggregator,
    inputs: mpsc::Receiver<Input>,
    service: Arc<AggregatorService>,
    now: Box<dyn Fn() -> Timestamp + Send>,
    waiters: HashMap<FileId, Vec<oneshot::Sender<()>>>,
    waiting: usize,
    /// Who waits for the greetings that the engine is about to give, in their order. As many as inputs in a batch.
    greeting: VecDeque<oneshot::Sender<Greeted>>,
    /// As whom it speaks.
    incarnation: Incarnation,
    /// Files of which the store refused what must be remembered: until it takes it, a restart forgets it, so nobody is
    /// told that it is so.
    unkept: HashMap<FileId, Unkept>,
    /// The same of the datacenter.
    unkept_node: Option<NodeMemory>,
    /// Whether a revocation is part of that.
    unkept_revocation: bool,
    kept_at: Instant,
}

impl LedgerTask {
    pub(crate) fn new(
        aggregator: Aggregator,
        inputs: mpsc::Receiver<Input>,
        service: Arc<AggregatorService>,
        now: Box<dyn Fn() -> Timestamp + Send>,
    ) -> Self {
        Self {
            incarnation: aggregator.incarnation(),
            aggregator,
            inputs,
            service,
            now,
            waiters: HashMap::new(),
            waiting: 0,
            greeting: VecDeque::new(),
            unkept: HashMap::new(),
            unkept_node: None,
            unkept_revocation: false,
            kept_at: Instant::now(),
        }
    }

    /// Applies the first effects: without its incarnation on disk, an aggregator must not speak.
    pub(crate) async fn begin(self, effects: Vec<Effect>) -> Result<Self, AggregatorError> {
        for effect in effects {
            match effect {
                Effect::PersistNode(memory) => {
                    self.service.parts.store.put_state(self.service.parts.share, &memory.to_bytes()).await?
                }
                Effect::RaiseGenerations(floor) => {
                    self.service.parts.store.raise_generations(self.service.parts.share, floor).await?
                }
                Effect::Revoked(revocation) => {
                    self.service.parts.revocations.apply(revocation);
                }
                other => debug!(?other, "not an effect of a start"),
            }
        }
        Ok(self)
    }

    pub(crate) async fn run(mut self) {
        let tasks = self.service.parts.tasks.clone();
        loop {
            let due = self.aggregator.next_timeout();
            let wait =
                due.map_or(Duration::from_secs(3600), |at| Duration::from_millis(at.since((self.now)())));
            let is_kept = self.unkept.is_empty() && self.unkept_node.is_none();
            let wait = if is_kept { wait } else { wait.min(KEEP_AGAIN) };
            let mut effects = Vec::new();
            let mut settled = Vec::new();
            tokio::select! {
                input = self.inputs.recv() => match input {
                    Some(input) => self.take(input, &mut effects, &mut settled),
                    None => return,
                },
                () = tasks.draining(), if self.inputs.is_empty() => return,
                () = tokio::time::sleep(wait) => {
                    effects.extend(self.aggregator.handle(NodeEvent::Tick, (self.now)()));
                }
            }
            for _ in 1..BATCH {
                match self.inputs.try_recv() {
                    Ok(input) => self.take(input, &mut effects, &mut settled),
                    Err(_) => break,
                }
            }
            self.apply(effects).await;
            for Settled { file, done } in settled {
                let kept = match file {
                    Some(file) => self.keep_again(file).await,
                    None => self.keep_node_again().await,
                };
                // Whoever waited may have gone; what it waited for stays.
                let _ = done.send(kept);
            }
            self.keep_some_again().await;
        }
    }

    fn take(&mut self, input: Input, effects: &mut Vec<Effect>, settled: &mut Vec<Settled>) {
        match input {
            Input::Event(event, done) => {
                effects.extend(self.aggregator.handle(*event, (self.now)()));
                settled.extend(done);
            }
            Input::Greet(event, waiter) => {
                effects.extend(self.aggregator.handle(*event, (self.now)()));
                self.greeting.push_back(waiter);
            }
            Input::Ask(question) => question(&self.aggregator),
            Input::Watch(file, sender) => {
                if self.waiting >= MAX_WAITERS {
                    self.waiters.values_mut().for_each(|all| all.retain(|waiter| !waiter.is_closed()));
                    self.waiters.retain(|_, all| !all.is_empty());
                    self.waiting = self.waiters.values().map(Vec::len).sum();
                }
                // Past the bound the sender is dropped, which looks like a change: the waiter looks again, later.
                if self.waiting < MAX_WAITERS {
                    self.waiting += 1;
                    self.waiters.entry(file).or_default().push(sender);
                }
            }
        }
    }

    async fn apply(&mut self, effects: Vec<Effect>) {
        let store = self.service.parts.store.clone();
        for effect in effects {
            match effect {
                Effect::Persist(file, memory) => {
                    self.keep(file, Unkept::Facts(memory)).await;
                }
                Effect::PersistNode(memory) => {
                    if memory.incarnation > self.incarnation {
                        self.incarnation = memory.incarnation;
                        self.service.metrics.reincarnations.inc();
                        warn!(
                            incarnation = memory.incarnation.number(),
                            "begins again: all that is held is said anew"
                        );
                    }
                    self.unkept_node = Some(memory);
                    if let Err(failed) = self.keep_node_again().await {
                        error!(%failed, "what must be remembered of the datacenter could not be stored");
                    }
                }
                Effect::RaiseGenerations(floor) => {
                    if let Err(failed) = store.raise_generations(self.service.parts.share, floor).await {
                        error!(%failed, "generations could not be raised");
                    }
                }
                Effect::Drop(file, tenant, memory) => {
                    self.keep(file, Unkept::End(tenant, memory)).await;
                }
                // What would be forgotten is not acknowledged: whoever said it says it again.
                Effect::Send(Command { statement: Statement::Ack { .. }, .. }) if self.unkept_revocation => {}
                Effect::Send(command) => self.service.links.send(&command, &self.service.traces),
                Effect::Hello { greeting, .. } => self.greet(Greeted { greeting, welcome: true }),
                Effect::Answer { greeting, welcome, .. } => self.greet(Greeted { greeting, welcome }),
                Effect::Revoked(revocation) => {
                    self.unkept_revocation |= self.unkept_node.is_some();
                    if self.service.parts.revocations.apply(revocation) == Revoking::Full {
                        error!(?revocation, "there is no room for what is revoked");
                    }
                }
                Effect::CloseLink(peer) => self.service.links.close(peer),
                Effect::Changed(file) => {
                    self.service.usage.note(&self.aggregator, file);
                    for waiter in self.waiters.remove(&file).unwrap_or_default() {
                        self.waiting -= 1;
                        let _ = waiter.send(());
                    }
                }
                Effect::Refused { peer, kind, reason } => {
                    self.service.metrics.received(kind.name(), "refused");
                    if let Some(times) = self.service.refused.met((peer, kind.name())) {
                        warn!(%peer, %kind, reason, times, "a peer said what it should not");
                    }
                }
                Effect::Wake(_)
                | Effect::FetchRecord { .. }
                | Effect::Restate { .. }
                | Effect::StorePage(..)
                | Effect::LoadPage(..)
                | Effect::Pull { .. }
                | Effect::ReadRoot(..)
                | Effect::Publish(..)
                | Effect::Recheck { .. }
                | Effect::Free(..)
                | Effect::Resolve { .. }
                | Effect::DiscardOrphan(..) => {
                    let service = self.service.clone();
                    self.service.parts.tasks.spawn(carry::carry(service, effect));
                }
            }
        }
    }

    fn greet(&mut self, greeted: Greeted) {
        if let Some(waiter) = self.greeting.pop_front() {
            // Whoever dialled may have gone.
            let _ = waiter.send(greeted);
        }
    }

    /// Has the store remember something of a file.
    async fn keep(&mut self, file: FileId, what: Unkept) {
        // What came before is part of it; an end stays one.
        let what = match (self.unkept.remove(&file), what) {
            (Some(Unkept::End(tenant, _)), Unkept::Facts(memory)) => Unkept::End(tenant, memory),
            (_, what) => what,
        };
        if let Err(failed) = try_to_keep(&*self.service.parts.store, file, &what).await {
            error!(%file, %failed, "what must be remembered of a file could not be stored");
            // What the store will never take, as of a file that it does not have, is not asked again.
            if failed.advice() == Advice::Retry {
                self.unkept.insert(file, what);
            }
        }
    }

    /// Tries again what the store refused of a file.
    async fn keep_again(&mut self, file: FileId) -> Result<(), StoreError> {
        let Some(what) = self.unkept.get(&file) else { return Ok(()) };
        try_to_keep(&*self.service.parts.store, file, what).await?;
        self.unkept.remove(&file);
        Ok(())
    }

    /// Tries again what the store refused of the datacenter.
    async fn keep_node_again(&mut self) -> Result<(), StoreError> {
        let Some(memory) = &self.unkept_node else { return Ok(()) };
        self.service.parts.store.put_state(self.service.parts.share, &memory.to_bytes()).await?;
        self.unkept_node = None;
        self.unkept_revocation = false;
        Ok(())
    }

    /// Tries again what the store refused of some files, now and then.
    async fn keep_some_again(&mut self) {
        let all_kept = self.unkept.is_empty() && self.unkept_node.is_none();
        if all_kept || self.kept_at.elapsed() < KEEP_AGAIN {
            return;
        }
        self.kept_at = Instant::now();
        if self.keep_node_again().await.is_err() {
            return;
        }
        let files: Vec<FileId> = self.unkept.keys().copied().take(KEEP_SOME).collect();
        for file in files {
            if self.keep_again(file).await.is_err() {
                // It refuses the others too, most likely.
                return;
            }
        }
    }
}

async fn try_to_keep(store: &dyn ChunkStore, file: FileId, what: &Unkept) -> Result<(), StoreError> {
    match what {
        Unkept::Facts(memory) => store.put_facts(file, &memory.to_bytes()).await,
        Unkept::End(tenant, memory) => store.drop_file(file, *tenant, &memory.to_bytes()).await,
    }
}

/// Waits for a change of a file, at most so long; whether there was one.
pub(crate) async fn changed(watch: oneshot::Receiver<()>, patience: Duration) -> bool {
    // A dropped sender counts as a change: look again, but not at once.
    match tokio::time::timeout(patience, watch).await {
        Ok(Ok(())) => true,
        Ok(Err(_)) => {
            tokio::time::sleep(Duration::from_millis(50).min(patience)).await;
            true
        }
        Err(_) => false,
    }
}

/// The refusal of a request whose answer did not come in time.
pub(crate) fn too_slow(what: &str) -> Refusal {
    Refusal::new(Problem::Unavailable, format!("{what} did not answer in time"))
}
