//! Random work, the power cut at a random operation, and what must be there afterwards: all that was acknowledged,
//! with the right bytes; of what was not, all of one step or nothing of it. Each task has files of its own, so that
//! the checker knows exactly what may be; one file is shared by all.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::Root;
use sluice_engine::ids::{FileId, Generation};
use sluice_engine::share::Share;
use sluice_store::{ChunkStore, Chunks, FileSummary, FsOptions, FsStore, StoreError, Whole, WholeOutcome};

use crate::material::{FULL, TENANT, content, file, index, put, record, root, values};
use sluice_fault_disk::{Dice, FaultDisk, Faults};

const VOLUME: &str = "/volume";
const TASKS: u64 = 4;
const FILES: u64 = 3;
const STEPS: u64 = 10;
const SHARED: u128 = 1000;

fn options() -> FsOptions {
    FsOptions {
        journal_len: 24 << 10,
        reserve: 0,
        idle_files: 3,
        log_segment_len: 48 << 10,
        log_index: 12,
        ..FsOptions::default()
    }
}

/// What a file is known to be.
#[derive(Clone, Default, PartialEq)]
struct File {
    known: bool,
    size: Option<u64>,
    /// Whether there is a record, and the size that it says.
    recorded: bool,
    in_record: Option<u64>,
    facts: Vec<u8>,
    generation: Generation,
    dropped: bool,
    published: Option<Root>,
    chunks: BTreeMap<u64, Bytes>,
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chunks: Vec<_> = self.chunks.iter().map(|(i, bytes)| (i, bytes.len())).collect();
        let Self { known, size, facts, generation, dropped, published, .. } = self;
        write!(f, "known {known} size {size:?} facts {facts:?} generation {generation} dropped {dropped} ")?;
        write!(f, "published {published:?} chunks {chunks:?}")
    }
}

/// One step of work.
#[derive(Clone)]
enum Step {
    Record(Option<u64>),
    Size(u64),
    Whole(Bytes, Vec<u8>),
    Known(u64, Vec<u8>),
    Put(u64, Bytes),
    Facts(Vec<u8>),
    Lose(Vec<u64>),
    Publish(Root),
    Free,
    Drop(Vec<u8>),
    Discard,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record(size) => write!(f, "record of {size:?}"),
            Self::Size(size) => write!(f, "size {size}"),
            Self::Whole(bytes, _) => write!(f, "whole of {} bytes", bytes.len()),
            Self::Known(size, _) => write!(f, "known, of {size} bytes"),
            Self::Put(first, bytes) => write!(f, "{} bytes at chunk {first}", bytes.len()),
            Self::Facts(_) => f.write_str("facts"),
            Self::Lose(chunks) => write!(f, "lose {chunks:?}"),
            Self::Publish(root) => write!(f, "publish {root:?}"),
            Self::Free => f.write_str("free"),
            Self::Drop(_) => f.write_str("drop"),
            Self::Discard => f.write_str("discard"),
        }
    }
}

/// What the checker knows.
#[derive(Debug, Default)]
struct Model {
    files: BTreeMap<u128, (File, Option<Step>)>,
    /// Acknowledged chunks of the shared file, and what was tried.
    shared: BTreeMap<u64, Bytes>,
    tried: BTreeMap<u64, Vec<Bytes>>,
    /// Everything that happened, for whoever reads a failure.
    history: Vec<String>,
    /// The states that a share may have, if not only none.
    states: BTreeMap<Share, Vec<Vec<u8>>>,
    /// The floors that were acknowledged.
    floors: Vec<(Share, Generation)>,
}

/// Shares of more than one division.
fn choose_share(dice: &mut Dice) -> Share {
    let count = [1, 2, 4, 16][dice.below(4) as usize];
    Share::new(dice.below(count.into()) as u32, count).unwrap()
}

impl File {
    /// What the file is after a step that succeeded.
    fn after(&self, step: &Step) -> Self {
        let mut file = self.clone();
        match step {
            Step::Record(size) => {
                if let Some(size) = size {
                    file.settle(*size);
                }
                (file.known, file.recorded, file.in_record) = (true, true, *size);
            }
            Step::Size(size) => file.settle(*size),
            Step::Whole(bytes, facts) => {
                (file.known, file.recorded, file.size) = (true, true, Some(bytes.len() as u64));
                file.in_record = file.size;
                (file.facts, file.published) = (facts.clone(), Some(root(bytes)));
                file.chunks = [(0, bytes.clone())].into();
            }
            Step::Known(size, facts) => {
                (file.known, file.recorded, file.size) = (true, true, Some(*size));
                file.in_record = file.size;
                file.facts.clone_from(facts);
            }
            Step::Put(first, bytes) => {
                file.known = true;
                for (i, chunk) in bytes.chunks(FULL).enumerate() {
                    file.chunks.insert(first + i as u64, bytes.slice_ref(chunk));
                }
            }
            Step::Facts(facts) => file.facts.clone_from(facts),
            Step::Lose(chunks) => {
                file.chunks.retain(|i, _| !chunks.contains(i));
                file.published = None;
                file.generation = Generation::new(file.generation.number() + 1);
            }
            Step::Publish(root) => file.published = Some(*root),
            Step::Free => {
                file.chunks.clear();
                file.published = None;
                file.generation = Generation::new(file.generation.number() + 1);
            }
            Step::Drop(facts) => {
                file.chunks.clear();
                (file.known, file.dropped, file.published) = (true, true, None);
                file.facts.clone_from(facts);
            }
            Step::Discard => file = Self::default(),
        }
        file
    }

    /// Keeps what fits a file of this size.
    fn settle(&mut self, size: u64) {
        let (chunks, before) = (size.div_ceil(FULL as u64), self.chunks.len());
        self.chunks.retain(|i, bytes| {
            *i < chunks && bytes.len() as u64 == (size - i * FULL as u64).min(FULL as u64)
        });
        if self.chunks.len() != before {
            self.generation = Generation::new(self.generation.number() + 1);
        }
        self.size = Some(size);
    }

    /// Why what is stored is not this file; `None` if it is.
    async fn differs(&self, store: &FsStore, n: u128, found: Option<&FileSummary>) -> Option<String> {
        let Some(found) = found else {
            return self.known.then(|| "it is unknown".into());
        };
        if !self.known {
            return Some("it is known".into());
        }
        let expected = self.recorded.then(|| record(n, self.in_record));
        if self.size.is_some() && !self.dropped && found.size.map(|shape| shape.size()) != self.size {
            return Some(format!("size: {found:?}"));
        }
        // Of a dropped file the record may go.
        let expected = expected.filter(|_| !self.dropped || found.record.is_some());
        if found.record != expected || found.facts != self.facts || found.published != self.published {
            return Some(format!("record, facts or publication: {found:?}"));
        }
        if found.generation < self.generation {
            return Some(format!("the generation fell to {}", found.generation));
        }
        let held: Vec<u64> = found.held.iter().cloned().flatten().collect();
        if held != self.chunks.keys().copied().collect::<Vec<_>>() {
            return Some(format!("chunks {held:?}"));
        }
        let bytes: u64 = self.chunks.values().map(|bytes| bytes.len() as u64).sum();
        if bytes != found.held_bytes {
            return Some(format!("{} bytes", found.held_bytes));
        }
        let read = store.read_chunk(file(n), index(0)).await;
        if self.dropped != matches!(read, Err(StoreError::Dropped(_))) {
            return Some(format!("dropped: {read:?}"));
        }
        for (i, bytes) in &self.chunks {
            match store.read_chunk(file(n), index(*i)).await {
                Ok(read) if read == bytes => {}
                other => return Some(format!("chunk {i}: {:?}", other.map(|read| read.len()))),
            }
            let value = store.values(file(n), *i..i + 1).await;
            if !value.as_ref().is_ok_and(|value| value[0] == Some(values(*i, bytes)[0])) {
                return Some(format!("value {i}: {value:?}"));
            }
        }
        match self.published {
            Some(root) => match store.recheck(file(n)).await {
                Ok(found) if found == root => None,
                other => Some(format!("recheck: {other:?}")),
            },
            None => None,
        }
    }

    /// A step to take next.
    fn choose(&self, dice: &mut Dice) -> Step {
        let whole: Option<Vec<u8>> = self.size.and_then(|size| {
            let chunks: Vec<u8> = self.chunks.values().flatten().copied().collect();
            (chunks.len() as u64 == size).then_some(chunks)
        });
        let size = |dice: &mut Dice| if dice.one_in(3) { FULL as u64 + 700 } else { 3000 };
        if !self.known && dice.one_in(2) {
            let (bytes, facts) = (content(dice.below(2), 3000), dice.roll().to_be_bytes().to_vec());
            return match dice.below(8) {
                0 => Step::Known(3000, facts),
                1 => Step::Whole(content(3, 30_000), facts),
                _ => Step::Whole(bytes, facts),
            };
        }
        match dice.below(20) {
            0..3 if self.recorded && self.in_record.is_none() => Step::Size(size(dice)),
            0..3 if self.recorded && dice.one_in(2) => {
                Step::Whole(content(dice.below(2), 3000), dice.roll().to_be_bytes().to_vec())
            }
            0..3 => Step::Record(match dice.below(4) {
                0 => None,
                _ => Some(size(dice)),
            }),
            3..6 => Step::Facts(dice.roll().to_be_bytes().to_vec()),
            6 => Step::Lose(self.chunks.keys().copied().filter(|i| i % 2 == 0).collect()),
            7..11 => match whole {
                Some(whole) => Step::Publish(root(&whole)),
                None => self.choose_put(dice),
            },
            11 => Step::Free,
            12 if dice.one_in(3) => Step::Drop(vec![1; 5]),
            13 if dice.one_in(2) => Step::Discard,
            _ => self.choose_put(dice),
        }
    }

    fn choose_put(&self, dice: &mut Dice) -> Step {
        match self.size {
            Some(3000) => Step::Put(0, content(dice.below(2), 3000)),
            Some(size) if dice.one_in(2) => Step::Put(0, content(dice.below(2), size as usize)),
            Some(_) => Step::Put(1, content(dice.below(2), 700)),
            None if dice.one_in(12) => Step::Put(2 * dice.below(4), content(dice.roll(), FULL + 9)),
            None => Step::Put(dice.below(9), content(dice.roll(), 1 + dice.below(9000) as usize)),
        }
    }
}

async fn take(store: &FsStore, n: u128, step: &Step) -> Result<(), StoreError> {
    let id = file(n);
    match step {
        Step::Record(size) => store.put_record(&record(n, *size)).await.map(|_| ()),
        Step::Size(size) => store.put_size(id, Geometry::new(*size).unwrap()).await,
        Step::Whole(bytes, facts) => {
            let record = record(n, Some(bytes.len() as u64));
            match store.put_whole(&record, facts, Whole::of(bytes.clone())).await? {
                WholeOutcome::Stored => Ok(()),
                // Nothing changed.
                WholeOutcome::Known | WholeOutcome::Begun => Err(StoreError::NoFile(id)),
            }
        }
        Step::Known(size, facts) => match store.put_known(&record(n, Some(*size)), facts).await? {
            WholeOutcome::Stored => Ok(()),
            WholeOutcome::Known | WholeOutcome::Begun => Err(StoreError::NoFile(id)),
        },
        Step::Put(first, bytes) => put(store, id, *first, bytes).await.map(|_| ()),
        Step::Facts(facts) => store.put_facts(id, facts).await,
        Step::Lose(chunks) => {
            let chunks: Vec<_> = chunks.iter().map(|i| index(*i)).collect();
            store.lose(id, &chunks).await.map(|_| ())
        }
        Step::Publish(root) => store.publish(id, *root).await,
        Step::Free => store.free(id).await.map(|_| ()),
        Step::Drop(facts) => store.drop_file(id, TENANT, facts).await,
        Step::Discard => match store.discard_orphan(id).await {
            Ok(false) => Err(StoreError::NoFile(id)),
            other => other.map(|_| ()),
        },
    }
}

/// Whether an error leaves open what became of the step.
fn leaves_open(error: &StoreError) -> bool {
    matches!(error, StoreError::Closing | StoreError::ReadOnly { .. } | StoreError::Io { .. })
}

/// One task: steps on its own files, and now and then on the shared one, until the store is gone.
async fn work(store: Arc<FsStore>, model: Arc<Mutex<Model>>, task: u64, mut dice: Dice) {
    for _ in 0..STEPS {
        if dice.one_in(4) {
            let i = dice.below(6);
            let bytes = content(dice.below(2), 2000);
            model.lock().unwrap().tried.entry(i).or_default().push(bytes.clone());
            match put(&*store, file(SHARED), i, &bytes).await {
                Ok(_) => {
                    let held = model.lock().unwrap().shared.insert(i, bytes.clone());
                    assert!(held.is_none_or(|held| held == bytes), "chunk {i} changed");
                }
                Err(StoreError::ChunkConflict { .. }) => {}
                Err(error) if leaves_open(&error) => return,
                Err(error) => panic!("{error}"),
            }
        } else if task == 0 && dice.one_in(4) {
            let share = choose_share(&mut dice);
            let state = if dice.one_in(8) { Vec::new() } else { dice.roll().to_be_bytes().to_vec() };
            let nothing = || vec![Vec::new()];
            model.lock().unwrap().states.entry(share).or_insert_with(nothing).push(state.clone());
            match store.put_state(share, &state).await {
                Ok(()) => drop(model.lock().unwrap().states.insert(share, vec![state])),
                Err(_) => return,
            }
        } else if task == 1 && dice.one_in(6) {
            let (share, floor) = (choose_share(&mut dice), Generation::new(dice.below(30)));
            match store.raise_generations(share, floor).await {
                Ok(()) => model.lock().unwrap().floors.push((share, floor)),
                Err(_) => return,
            }
        } else {
            let n = u128::from(task * FILES + dice.below(FILES));
            let (step, before) = {
                let mut model = model.lock().unwrap();
                let (file, pending) = model.files.entry(n).or_default();
                let step = file.choose(&mut dice);
                *pending = Some(step.clone());
                (step, file.clone())
            };
            let result = take(&store, n, &step).await;
            let mut model = model.lock().unwrap();
            model.history.push(format!("file {n}: {step:?}: {:?}", result.as_ref().err()));
            let (file, pending) = model.files.get_mut(&n).unwrap();
            match result {
                Ok(()) => {
                    *file = before.after(&step);
                    *pending = None;
                }
                Err(error) if leaves_open(&error) => return,
                Err(_) => *pending = None,
            }
        }
    }
}

/// Checks everything against the model, and takes over what was found where both outcomes were right.
async fn check(store: &FsStore, model: &mut Model) -> Result<(), String> {
    let mut known = Vec::new();
    for (n, (expected, pending)) in &mut model.files {
        let found = store.summary(file(*n)).await.map_err(|error| format!("file {n}: {error}"))?;
        if let Some(wrong) = expected.differs(store, *n, found.as_ref()).await {
            let after = pending.as_ref().map(|step| expected.after(step));
            let also = match &after {
                Some(after) => after.differs(store, *n, found.as_ref()).await,
                None => Some("nothing else was asked".into()),
            };
            if let Some(also) = also {
                let of_file = format!("file {n}:");
                let history: Vec<_> = model
                    .history
                    .iter()
                    .filter(|line| line.starts_with(&of_file) || line.starts_with('-'))
                    .collect();
                return Err(format!(
                    "file {n}: {wrong}; or {also}; {pending:?} of {expected:?}: {history:#?}"
                ));
            }
            if let Some(after) = after {
                *expected = after;
            }
        }
        *pending = None;
        if let Some(found) = found {
            let floors = model.floors.iter().filter(|(share, _)| share.has(file(*n)));
            if floors.map(|(_, floor)| *floor).max().is_some_and(|floor| found.generation < floor) {
                return Err(format!("file {n}: generation {} is below the floor", found.generation));
            }
            expected.generation = found.generation;
            known.push(file(*n));
        }
    }
    let found = store.summary(file(SHARED)).await.map_err(|error| format!("shared: {error}"))?;
    let held: Vec<u64> = found.iter().flat_map(|found| found.held.iter().cloned().flatten()).collect();
    if found.is_some() {
        known.push(file(SHARED));
    }
    for i in model.shared.keys() {
        if !held.contains(i) {
            return Err(format!("shared chunk {i} is gone"));
        }
    }
    for i in held {
        let bytes = store.read_chunk(file(SHARED), index(i)).await.map_err(|error| error.to_string())?;
        let acknowledged = model.shared.entry(i).or_insert_with(|| bytes.clone());
        if *acknowledged != bytes || !model.tried[&i].contains(&bytes) {
            return Err(format!("shared chunk {i} has other bytes"));
        }
    }
    let mut states = store.states().await.map_err(|error| error.to_string())?;
    for (share, may) in &mut model.states {
        let state = states.remove(share).unwrap_or_default();
        if !may.contains(&state) {
            return Err(format!("another state of share {share}"));
        }
        *may = vec![state];
    }
    if let Some(share) = states.keys().next() {
        return Err(format!("a state of share {share}, which has none"));
    }
    known.sort_unstable();
    let listed = store.list(None, 1000).await.map_err(|error| error.to_string())?;
    let listed: Vec<FileId> = listed.into_iter().map(|found| found.file).collect();
    if listed != known {
        return Err(format!("listed {listed:?}, known {known:?}"));
    }
    Ok(())
}

/// A few lives of one volume. The error is what was wrong.
async fn live(seed: u64, faults: Faults) -> Result<(), String> {
    let mut dice = Dice(seed);
    let mut disk = FaultDisk::new();
    disk.faults(|now| *now = faults.clone());
    let model = Arc::new(Mutex::new(Model::default()));
    for _ in 0..4 {
        let open = |disk: &FaultDisk| FsStore::open_on(Arc::new(disk.clone()), VOLUME, options());
        // The power may also go while the volume is opened or checked.
        if dice.one_in(3) {
            let after = disk.operations() + dice.below(60);
            disk.faults(|faults| faults.power_off_after = Some(after));
            drop(open(&disk));
            disk = disk.after_power_cut(&mut dice);
            disk.faults(|now| *now = faults.clone());
        }
        let store = Arc::new(open(&disk).map_err(|error| error.to_string())?);
        {
            let mut taken = std::mem::take(&mut *model.lock().unwrap());
            check(&store, &mut taken).await?;
            *model.lock().unwrap() = taken;
        }
        let ending = dice.below(8);
        if ending > 1 {
            let after = disk.operations() + dice.below(500);
            disk.faults(|faults| faults.power_off_after = Some(after));
        }
        if dice.one_in(5) {
            let (disk, delay) = (disk.clone(), Duration::from_micros(dice.below(20_000)));
            let failing = ["data-", "journal-", "log-"][dice.below(3) as usize];
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                disk.faults(|faults| faults.failing_sync = Some(failing));
            });
        }
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| tokio::spawn(work(store.clone(), model.clone(), task, Dice(dice.roll()))))
            .collect();
        for task in tasks {
            task.await.map_err(|error| error.to_string())?;
        }
        model.lock().unwrap().history.push(format!("- ending {ending}, {:?}", store.metrics()));
        match ending {
            0 => store.close().await.map_err(|error| error.to_string())?,
            _ => store.kill(),
        }
        drop(store);
        disk =
            if ending == 1 || dice.one_in(4) { disk.after_kill() } else { disk.after_power_cut(&mut dice) };
        disk.faults(|now| *now = faults.clone());
    }
    let store = FsStore::open_on(Arc::new(disk), VOLUME, options()).map_err(|error| error.to_string())?;
    let mut taken = std::mem::take(&mut *model.lock().unwrap());
    check(&store, &mut taken).await
}

/// `SLUICE_SEED` runs one seed, `SLUICE_SEEDS` another number of them.
fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse::<u64>().ok());
    match number("SLUICE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SLUICE_SEEDS").unwrap_or(default),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_every_power_cut() {
    for seed in seeds(200) {
        if let Err(wrong) = live(seed, Faults::default()).await {
            panic!("seed {seed}: {wrong}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_lies_about_syncs_is_noticed() {
    for faults in [
        Faults { lying_sync: Some("data-"), ..Faults::default() },
        Faults { lying_sync: Some("journal-"), ..Faults::default() },
        Faults { lying_sync: Some("log-"), ..Faults::default() },
        Faults { lying_sync: Some("values-"), ..Faults::default() },
        Faults { lying_dirs: true, ..Faults::default() },
    ] {
        let mut noticed = false;
        for seed in 0..200 {
            if live(seed, faults.clone()).await.is_err() {
                noticed = true;
                break;
            }
        }
        assert!(noticed, "{faults:?}");
    }
}
