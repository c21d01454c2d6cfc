//! What must always hold, and what must have come of it in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use sluice_engine::aggregator::{Aggregator, File, NodeMemory};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::Root;
use sluice_engine::ids::{DcId, FileId, Generation};
use sluice_engine::ledger::FileState;
use sluice_engine::revocations::{Revocation, Revoked, Revoking};
use sluice_engine::span::Span;

use super::client::Plan;
use super::disk::{dc_name, root_of, value_at};
use super::world::{World, short};

/// A rule that was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which.
    pub rule: &'static str,
    /// How.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.detail)
    }
}

/// The roots that a datacenter knows before an event.
pub fn roots_said(world: &World, dc: DcId) -> BTreeSet<FileId> {
    let agg = world.dcs[&dc].agg.as_ref();
    agg.map(|agg| agg.files().filter(|(_, file)| file.ledger().root().is_some()).map(|(id, _)| id).collect())
        .unwrap_or_default()
}

/// Judges what an event changed.
pub fn after_event(world: &mut World, dc: DcId, before: &BTreeSet<FileId>) {
    let Some(agg) = world.dcs[&dc].agg.as_ref() else { return };
    let mut broken = None;
    for (id, file) in agg.files() {
        let ledger = file.ledger();
        if ledger.root().is_none()
            || before.contains(&id)
            // Read from its disk again, where its own bytes gave it, and not found now.
            || world.dcs[&dc].disk.files.get(&id).is_some_and(|file| file.published.is_some())
            || ledger.claim().is_none_or(|claim| claim.home != dc)
        {
            continue;
        }
        // G2: a home that learns the root has spans that cover the file, or was told by another home. Whoever it
        // counts on must have the same bytes wherever two of them overlap.
        let mut seen: BTreeMap<u64, (DcId, u32)> = BTreeMap::new();
        for (holder, _, tree) in ledger.holders().filter(|(holder, ..)| !ledger.is_absent(*holder)) {
            for index in tree.iter().flat_map(|span| span.place.range(tree.file())) {
                let Some(content) = world.dcs[&holder].disk.chunk(id, index) else { continue };
                match seen.get(&index) {
                    Some((other, held)) if *held != content && !told_by_another(world, id, dc) => {
                        broken = Some(format!(
                            "{} says ROOT of {} while {} and {} differ in chunk {index}",
                            dc_name(dc),
                            short(id),
                            dc_name(*other),
                            dc_name(holder)
                        ));
                    }
                    Some(_) => {}
                    None => {
                        seen.insert(index, (holder, content));
                    }
                }
            }
        }
    }
    let miscounted = miscounted(agg, dc);
    if let Some(detail) = broken {
        world.violate("G2 integrity", detail);
    }
    if let Some(detail) = miscounted {
        world.violate("counts", detail);
    }
}

/// What metrics tell of all files, if counting them gives something else.
fn miscounted(agg: &Aggregator, dc: DcId) -> Option<String> {
    let awake = |state| agg.files().filter(|(_, file)| file.state() == state).count() as u64;
    let told: BTreeMap<FileState, u64> = agg.counts().collect();
    let live = [FileState::Receiving, FileState::Complete, FileState::Conflict];
    let ended = [FileState::Assembled, FileState::Dropped];
    let wrong = live.into_iter().find(|state| told.get(state) != Some(&awake(*state)));
    let sum: u64 = ended.iter().filter_map(|state| told.get(state)).sum();
    let all = ended.into_iter().map(awake).sum::<u64>() + agg.resting() as u64;
    let waits = |file: &File| {
        file.state() == FileState::Complete && file.ledger().claim().is_some_and(|claim| claim.home == dc)
    };
    let assembling = agg.files().any(|(_, file)| waits(file));
    (wrong.is_some() || sum != all || agg.assembling_since().is_some() != assembling)
        .then(|| format!("{} counts {told:?}, {:?}", dc_name(dc), agg.assembling_since()))
}

/// Whether another datacenter knows the root as well, so that it may have come from there.
fn told_by_another(world: &World, id: FileId, me: DcId) -> bool {
    let knows = |dc: &super::world::Dc| {
        dc.gone
            || dc.agg.as_ref().and_then(|agg| agg.file(id)).is_some_and(|file| file.ledger().root().is_some())
            || dc.agg.as_ref().is_some_and(|agg| agg.is_asleep(id))
            || dc.agg.is_none()
    };
    world.dcs.values().any(|dc| dc.id != me && knows(dc))
}

/// G1, and "nothing is freed that is still needed": asked before a datacenter frees its copy.
pub fn before_free(world: &mut World, dc: DcId, file: FileId) {
    let freed: Vec<u64> =
        world.dcs[&dc].disk.files.get(&file).map(|f| f.chunks.keys().copied().collect()).unwrap_or_default();
    let whole = |other: &super::world::Dc| {
        other.id != dc && other.disk.files.get(&file).is_some_and(|f| f.published.is_some())
    };
    let dropped = world.dcs.values().any(|other| other.disk.files.get(&file).is_some_and(|f| f.dropped));
    let somewhere = dropped || world.dcs.values().any(whole);
    // A copy that went with its disk after it was confirmed is not the asker's fault.
    let just_now = |other: &super::world::Dc| other.disk_lost_at.iter().any(|at| world.now - at < 20_000);
    let excused = world.dcs.values().any(|other| other.id != dc && just_now(other));
    if !somewhere && !freed.is_empty() && !excused {
        let detail = format!(
            "{} frees {} chunks of {}, and nobody has the file",
            dc_name(dc),
            freed.len(),
            short(file)
        );
        world.violate("G1 durability", detail);
    }
}

/// Chunks that contradict a root may go only if others have the right ones.
pub fn before_lose(world: &mut World, dc: DcId, file: FileId, chunks: &[Range<u64>]) {
    let disks_lost = world.dcs.values().any(|other| !other.disk_lost_at.is_empty());
    let elsewhere =
        |index| world.dcs.values().any(|other| other.id != dc && other.disk.chunk(file, index).is_some());
    let only_here = chunks.iter().cloned().flatten().find(|index| !elsewhere(*index));
    if let Some(index) = only_here.filter(|_| !disks_lost) {
        let detail =
            format!("{} gives up chunk {index} of {}, and nobody else has it", dc_name(dc), short(file));
        world.violate("G1 durability", detail);
    }
}

/// HAVE means durable here, now, with these bytes; unless the store has a newer generation already, of which the
/// process has not heard: then what is said is void.
pub fn have_said(
    world: &mut World,
    dc: DcId,
    file: FileId,
    shape: Geometry,
    generation: Generation,
    span: Span,
) {
    if generation < world.generation(dc, file) {
        return;
    }
    let held = world.dcs[&dc].disk.files.get(&file).map(|f| f.chunks.clone()).unwrap_or_default();
    if value_at(file, shape, span.place, &held) != Some(span.value) {
        let detail =
            format!("{} says that it has {} of {}, and does not", dc_name(dc), span.place, short(file));
        world.violate("G1 durability", detail);
    }
}

/// An orphan goes only if nobody can ever describe it.
pub fn orphan_discarded(world: &mut World, dc: DcId, file: FileId) {
    world.acked.retain(|(f, d, _), _| (*f, *d) != (file, dc));
    let described = world
        .dcs
        .values()
        .filter(|other| other.agg.is_some())
        .any(|other| other.disk.files.get(&file).is_some_and(|f| f.record.is_some()));
    let lost = world.dcs.values().any(|other| !other.disk_lost_at.is_empty());
    if described
        && !lost
        && world.clients.iter().any(|client| client.id == file && client.plan == Plan::Upload)
    {
        world.violate(
            "orphans",
            format!("{} discards chunks of {}, which is described", dc_name(dc), short(file)),
        );
    }
}

/// Checked throughout.
pub fn always(world: &mut World) {
    let mut broken: Option<(&'static str, String)> = None;
    // G1: what was acknowledged is on that disk, unless it was freed, dropped or lost with the disk.
    for ((file, dc, index), content) in &world.acked {
        let Some(stored) = world.dcs[dc].disk.files.get(file) else {
            broken = Some(("G1 durability", format!("{} forgot {}", dc_name(*dc), short(*file))));
            continue;
        };
        if !stored.dropped && stored.chunks.get(index) != Some(content) {
            let detail = format!("{} lost chunk {index} of {}", dc_name(*dc), short(*file));
            broken = Some(("G1 durability", detail));
        }
    }
    for client in &world.clients {
        let good = root_of(client.id, client.shape, &client.contents);
        for dc in world.dcs.values() {
            // G2: what is published is what one client meant, byte for byte, unless it sent two versions.
            if let Some(stored) = dc.disk.files.get(&client.id)
                && let Some(root) = stored.published
            {
                if root_of(client.id, client.shape, &stored.chunks) != Some(root) {
                    broken = Some((
                        "G2 integrity",
                        format!("{} published other bytes of {}", dc_name(dc.id), short(client.id)),
                    ));
                }
                if client.plan != Plan::Contradict && Some(root) != good {
                    broken = Some((
                        "G2 integrity",
                        format!("{} published a wrong root of {}", dc_name(dc.id), short(client.id)),
                    ));
                }
            }
            let Some(file) = dc.agg.as_ref().and_then(|agg| agg.file(client.id)) else { continue };
            let known: Option<Root> = file.ledger().root();
            if known.is_some() && client.plan != Plan::Contradict && known != good {
                broken = Some((
                    "G2 integrity",
                    format!("{} knows a wrong root of {}", dc_name(dc.id), short(client.id)),
                ));
            }
        }
        // Two datacenters that assembled the file have the same bytes.
        let roots: BTreeSet<Root> =
            world.dcs.values().filter_map(|dc| dc.disk.files.get(&client.id)?.published).collect();
        let in_conflict = world
            .dcs
            .values()
            .any(|dc| dc.agg.as_ref().is_some_and(|agg| agg.state(client.id) == FileState::Conflict));
        if roots.len() > 1 && world.calm && world.now > 120_000 && !in_conflict {
            broken = Some(("G3 convergence", format!("{} was assembled with two roots", short(client.id))));
        }
    }
    if let Some((rule, detail)) = broken {
        world.violate(rule, detail);
    }
}

/// What counts as revoked in a process is on its disk: after a crash it still does.
pub fn revoked(world: &mut World, dc: DcId, revocation: Revocation) {
    let memory = NodeMemory::from_bytes(&world.dcs[&dc].disk.node).expect("undamaged");
    if !is_in(&memory.revoked, revocation) {
        world.violate("G4 authority", format!("{} forgets {revocation:?} with its process", dc_name(dc)));
    }
}

/// Whether all that a fact voids is void.
fn is_in(set: &Revoked, fact: Revocation) -> bool {
    set.clone().take(fact) == Revoking::Known
}

/// Whether everybody who lives knows every revocation, and the same ones; or who does not.
fn revocations_converged(world: &World) -> Result<(), String> {
    let mut first: Option<(DcId, &Revoked)> = None;
    for dc in world.dcs.values() {
        let Some(agg) = &dc.agg else { continue };
        if let Some((revocation, _)) = world.revoked.iter().find(|(fact, _)| !is_in(agg.revoked(), *fact)) {
            return Err(format!("{} does not know {revocation:?}", dc_name(dc.id)));
        }
        match first {
            Some((other, set)) if set != agg.revoked() => {
                return Err(format!("{} and {} revoke differently", dc_name(other), dc_name(dc.id)));
            }
            Some(_) => {}
            None => first = Some((dc.id, agg.revoked())),
        }
    }
    Ok(())
}

/// Whether nothing more is expected to happen.
pub fn is_finished(world: &World) -> bool {
    revocations_converged(world).is_ok()
        && world.clients.iter().all(|client| end_of(world, client.id).is_ok())
}

/// Where a file ended, the same everywhere; or why it has not.
fn end_of(world: &World, id: FileId) -> Result<Option<FileState>, String> {
    let Some(client) = world.clients.iter().find(|client| client.id == id) else { return Ok(None) };
    let live: Vec<&super::world::Dc> = world.dcs.values().filter(|dc| dc.agg.is_some()).collect();
    let states: BTreeMap<DcId, FileState> = live
        .iter()
        .map(|dc| (dc.id, dc.agg.as_ref().map_or(FileState::Unheard, |agg| agg.state(id))))
        .collect();
    let distinct: BTreeSet<FileState> = states.values().copied().collect();
    if client.plan == Plan::NeverDescribe {
        // An orphan goes only when every configured datacenter has spoken, and one that is gone does not.
        let silent = world.dcs.values().any(|dc| dc.gone);
        let orphans = !silent && live.iter().any(|dc| dc.disk.files.contains_key(&id));
        return if orphans { Err(format!("orphans of {} remain", short(id))) } else { Ok(None) };
    }
    // What is said to be assembled is so, unless its home is gone and cannot be asked any more.
    let home_of = |dc: &super::world::Dc| dc.agg.as_ref()?.standing(id).1;
    let is_away = |home: DcId| world.dcs.get(&home).is_none_or(|dc| dc.gone);
    let nobody = !world.dcs.values().any(|dc| dc.disk.files.get(&id).is_some_and(|f| f.published.is_some()));
    let says = |dc: &&&super::world::Dc| states[&dc.id] == FileState::Assembled;
    let liar = live.iter().filter(says).find(|dc| home_of(dc).is_none_or(|home| !is_away(home)));
    if let Some(liar) = liar.filter(|_| nobody) {
        return Err(format!("{} says that {} is assembled, and nobody has it", dc_name(liar.id), short(id)));
    }
    if (client.done || client.plan == Plan::Contradict) && !can_finish(world, id) {
        return Ok(None);
    }
    let [state] = distinct.iter().copied().collect::<Vec<_>>()[..] else {
        return Err(format!("{} stands differently: {states:?}", short(id)));
    };
    if client.plan == Plan::TwoSizes && state == FileState::Receiving {
        // The size that came first may be the one for which the client has no bytes.
        let size_of = |dc: &&super::world::Dc| dc.agg.as_ref()?.file(id)?.ledger().file();
        let sizes: BTreeSet<u64> = live.iter().filter_map(size_of).map(Geometry::size).collect();
        if sizes.len() == 1 && sizes.iter().all(|size| *size > client.shape.size()) {
            return Ok(None);
        }
    }
    match state {
        FileState::Dropped | FileState::Conflict => Ok(Some(state)),
        FileState::Unheard | FileState::Receiving | FileState::Complete => {
            Err(format!("{} is still {state:?} everywhere", short(id)))
        }
        FileState::Assembled => {
            let copies: Vec<DcId> = live
                .iter()
                .filter(|dc| dc.disk.files.get(&id).is_some_and(|file| file.published.is_some()))
                .map(|dc| dc.id)
                .collect();
            let spare: Vec<DcId> = live
                .iter()
                .filter(|dc| {
                    dc.disk
                        .files
                        .get(&id)
                        .is_some_and(|file| file.published.is_none() && !file.chunks.is_empty())
                })
                .map(|dc| dc.id)
                .collect();
            match (&copies[..], &spare[..]) {
                ([], _) => Err(format!("{} is assembled, and nobody has it", short(id))),
                ([copy], []) if is_left_behind(world, *copy) => {
                    Err(format!("{} is still at {copy}, which hands everything over", short(id)))
                }
                ([_], []) => Ok(Some(state)),
                _ => Err(format!("{}: copies at {copies:?}, chunks kept at {spare:?}", short(id))),
            }
        }
    }
}

/// Whether a datacenter hands everything over to one that could take it, so that no finished file may stay there.
fn is_left_behind(world: &World, dc: DcId) -> bool {
    let Some(agg) = world.dcs[&dc].agg.as_ref() else { return false };
    let takes = |target: DcId| world.dcs[&target].agg.as_ref().is_some_and(|agg| agg.drain().is_none());
    agg.drain().is_some_and(|drain| drain.evacuate && takes(drain.target))
}

/// Whether what is left on the disks is enough: a file that lost its record or a chunk with a disk cannot be finished
/// without its client.
fn can_finish(world: &World, id: FileId) -> bool {
    if world.dcs.values().all(|dc| dc.disk_lost_at.is_empty()) {
        return true;
    }
    let Some(client) = world.clients.iter().find(|client| client.id == id) else { return false };
    if client.plan == Plan::Contradict {
        // The right one of two versions may be gone, and the other cannot be told from it.
        return false;
    }
    let shape_known = |dc: &super::world::Dc| {
        dc.agg.as_ref().and_then(|agg| agg.file(id)).is_some_and(|file| file.ledger().file().is_some())
    };
    if client.plan.leaves_size_open() && !world.dcs.values().any(shape_known) {
        // Whoever was told of the size lost its disk before it told others.
        return false;
    }
    let files: Vec<_> = world.dcs.values().filter_map(|dc| dc.disk.files.get(&id)).collect();
    let has = |index: u64| files.iter().any(|file| file.chunks.contains_key(&index));
    // An empty file has no chunk to lose: it can be finished wherever its record is.
    files.iter().any(|file| file.record.is_some())
        && (0..client.shape.chunks()).all(has)
        && !files.iter().any(|file| file.dropped)
}

/// Checked at the end: everything that can finish has finished, the same everywhere.
pub fn finally(world: &mut World) {
    if let Err(detail) = revocations_converged(world) {
        world.violate("G3 convergence", detail);
    }
    let ids: Vec<FileId> = world.clients.iter().map(|client| client.id).collect();
    for id in ids {
        match end_of(world, id) {
            Ok(Some(FileState::Assembled)) => world.figures.assembled += 1,
            Ok(Some(FileState::Conflict)) => {
                world.figures.conflicts += 1;
                let client = world.clients.iter().find(|client| client.id == id);
                let expected = |plan| {
                    matches!(
                        plan,
                        Plan::Contradict | Plan::WrongExpectation | Plan::TwoRecords | Plan::TwoSizes
                    )
                };
                if !client.is_some_and(|client| expected(client.plan)) {
                    world.violate("G3 convergence", format!("{} is in conflict without a cause", short(id)));
                }
            }
            Ok(Some(FileState::Dropped)) => {
                world.figures.dropped += 1;
                let client = world.clients.iter().find(|client| client.id == id);
                if !client.is_some_and(|client| matches!(client.plan, Plan::Remove | Plan::Expire)) {
                    world.violate("G1 durability", format!("{} was dropped by nobody", short(id)));
                }
            }
            Ok(_) => {}
            Err(detail) => world.violate("progress", detail),
        }
    }
    let takeovers = world
        .dcs
        .values()
        .filter_map(|dc| dc.agg.as_ref())
        .flat_map(|agg| agg.files())
        .filter(|(_, file)| file.ledger().claim().is_some_and(|claim| claim.epoch.number() > 0))
        .map(|(id, _)| id)
        .collect::<BTreeSet<_>>();
    world.figures.takeovers += takeovers.len() as u64;
}
