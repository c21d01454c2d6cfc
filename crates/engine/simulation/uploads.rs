//! What clients do, and what a front door answers them.

use std::collections::BTreeMap;

use sluice_engine::aggregator::{Event, FileMemory, MeetsWhole, NodeEvent, RecordSummary};
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::Root;
use sluice_engine::ids::{DcId, FileId};
use sluice_engine::ledger::FileState;

use super::client::Plan;
use super::disk::{chunk_span, dc_name, root_of};
use super::world::{Dc, Todo, World, short};

impl World {
    /// A client does one thing, and comes back.
    pub fn client(&mut self, number: usize) {
        let alive = self.alive();
        let Some(dc) = self.random.pick(&alive) else {
            self.schedule(500, Todo::Client(number));
            return;
        };
        let id = self.clients[number].id;
        self.awake(dc, id);
        let client = &mut self.clients[number];
        if client.whole && !client.described {
            let record = client.record;
            self.clients[number].described = self.post(dc, number, record, 1);
        } else if client.whole && client.described && client.again > 0 {
            client.again -= 1;
            // The same again, at any datacenter; or what contradicts it.
            let content = if client.bad_chunk.take().is_some() { 2 } else { 1 };
            let record = client.other_record.take().unwrap_or(client.record);
            self.post(dc, number, record, content);
        } else if !client.described
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
        } else if client.described && !client.settled {
            let (shape, plan) = (client.shape, client.plan);
            let other = self.random.pick(&alive).filter(|other| plan == Plan::TwoSizes && *other != dc);
            let settled = self.settle(dc, id, shape);
            self.clients[number].settled = settled;
            if !settled && self.is_undescribed(id) {
                self.clients[number].described = false;
            }
            if let (Some(other), Ok(larger)) = (other, Geometry::new(shape.size() + (1 << 20))) {
                self.settle(other, id, larger);
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

    pub fn create(&mut self, dc: DcId, id: FileId, record: RecordSummary, home: DcId) -> bool {
        self.awake(dc, id);
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
        stored.record.get_or_insert(record);
        stored.tenant = Some(record.tenant);
        self.note(|| format!("client creates {} at {}", short(id), dc_name(dc)));
        self.feed(dc, NodeEvent::File(id, Event::Created { record, home }));
        if orphans && let Some(stored) = self.dcs[&dc].disk.stored(id, None) {
            self.feed(dc, NodeEvent::File(id, Event::Loaded(stored)));
        }
        // The answer may be lost with the process; then the client describes the file again elsewhere.
        self.dcs[&dc].agg.is_some()
    }

    /// Says how large a file is whose record leaves it open; whether that was acknowledged.
    pub fn settle(&mut self, dc: DcId, id: FileId, size: Geometry) -> bool {
        self.awake(dc, id);
        let Some(node) = self.dcs.get_mut(&dc).filter(|node| node.agg.is_some()) else { return false };
        let known = node.agg.as_ref().and_then(|agg| agg.file(id)).and_then(|file| file.ledger().file());
        let stored = node.disk.file(id);
        if stored.dropped {
            return true;
        }
        if stored.record.is_none() {
            return false;
        }
        if known.or(stored.size).is_some_and(|held| held != size) {
            // 409: the first stands.
            return true;
        }
        stored.size = Some(size);
        // Durable; the process may die before anyone hears of it.
        if !self.calm && self.random.below(20) == 0 {
            self.crash(dc);
            let delay = 100 + self.random.below(4_000);
            self.schedule(delay, Todo::Restart(dc));
            return false;
        }
        self.note(|| format!("client settles {} at {} bytes at {}", short(id), size.size(), dc_name(dc)));
        self.feed(dc, NodeEvent::File(id, Event::Settled { size }));
        if let Some(stored) = self.dcs[&dc].disk.stored(id, None).filter(|_| self.dcs[&dc].agg.is_some()) {
            self.feed(dc, NodeEvent::File(id, Event::Loaded(stored)));
        }
        self.dcs[&dc].agg.is_some() && (self.calm || !self.random.chance(10))
    }

    /// Sends a whole file in one request; whether it was acknowledged.
    pub fn post(&mut self, dc: DcId, number: usize, record: RecordSummary, content: u32) -> bool {
        let client = &self.clients[number];
        let (id, tenant, shape) = (client.id, client.tenant, client.shape);
        self.awake(dc, id);
        let now = self.clock(dc);
        let Some(agg) = self.dcs[&dc].agg.as_ref() else { return false };
        let chunks: BTreeMap<u64, u32> = (0..shape.chunks()).map(|index| (index, content)).collect();
        let Some(root) = root_of(id, shape, &chunks).or((shape.chunks() == 0).then(Root::empty)) else {
            return false;
        };
        let meets = agg.meets_whole(id, record.digest, root);
        let begun = match meets {
            MeetsWhole::Nothing(_) => false,
            MeetsWhole::Parts => true,
            MeetsWhole::Itself
            | MeetsWhole::Dropped
            | MeetsWhole::Conflict(_)
            | MeetsWhole::OtherMetadata
            | MeetsWhole::OtherBytes(_) => return true,
        };
        let stored = self.dcs.get_mut(&dc).expect("alive").disk.file(id);
        if stored.dropped || stored.published.is_some() {
            return true;
        }
        if begun || stored.record.is_some() || !stored.chunks.is_empty() {
            // It has begun already: it comes as a record and chunks.
            return self.create(dc, id, record, dc)
                && (0..shape.chunks()).all(|index| self.put(dc, number, index, content));
        }
        let progress = record.expiry_ms.map(|_| now);
        stored.memory = FileMemory::of_whole(dc, root, shape, progress).to_bytes();
        (stored.tenant, stored.record) = (Some(tenant), Some(record));
        (stored.chunks, stored.published) = (chunks, Some(root));
        // Durable; the process may die before anyone hears of it.
        if !self.calm && self.random.below(20) == 0 {
            self.crash(dc);
            let delay = 100 + self.random.below(4_000);
            self.schedule(delay, Todo::Restart(dc));
            return false;
        }
        self.note(|| format!("{} has {} whole ({content})", dc_name(dc), short(id)));
        if let Some(stored) = self.dcs[&dc].disk.stored(id, None) {
            self.feed(dc, NodeEvent::File(id, Event::Whole(stored)));
        }
        if self.dcs[&dc].disk.chunk(id, 0) == Some(content) {
            self.acked.insert((id, dc, 0), content);
        }
        self.dcs[&dc].agg.is_some() && (self.calm || !self.random.chance(10))
    }

    /// Sends one chunk; whether it was acknowledged.
    pub fn put(&mut self, dc: DcId, number: usize, index: u64, content: u32) -> bool {
        let (id, tenant) = (self.clients[number].id, self.clients[number].tenant);
        self.awake(dc, id);
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
            Event::StoredOrphan { tenant, chunks: index..index + 1 }
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
    pub fn resume(&mut self, number: usize) {
        let client = &self.clients[number];
        let (id, shape) = (client.id, client.shape);
        let mut missing: Option<Vec<u64>> = None;
        let mut over = false;
        let alive = self.alive();
        for dc in alive.iter().copied() {
            self.awake(dc, id);
            let Some(file) = self.dcs[&dc].agg.as_ref().and_then(|agg| agg.file(id)) else { continue };
            match file.state() {
                // Who is asked asks the home, if that can be reached: it may have lost its copy.
                FileState::Assembled => {
                    let home = file.ledger().claim().map(|claim| claim.home);
                    over |= home.is_none_or(|home| home == dc || !alive.contains(&home));
                }
                FileState::Conflict | FileState::Dropped => over = true,
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
        if (self.calm && self.clients[number].plan == Plan::NeverDescribe) || self.clients[number].removed {
            self.clients[number].done = true;
            return;
        }
        let shape_known = |dc: &Dc| {
            dc.agg.as_ref().and_then(|agg| agg.file(id)).is_some_and(|file| file.ledger().file().is_some())
        };
        if self.clients[number].plan.leaves_size_open() && !self.dcs.values().any(shape_known) {
            self.clients[number].settled = false;
        }
        if self.is_undescribed(id) && self.clients[number].plan != Plan::NeverDescribe {
            self.clients[number].described = false;
        }
        self.clients[number].todo.extend(missing.unwrap_or_default());
    }

    /// Whether no datacenter that can be asked has the record.
    fn is_undescribed(&self, id: FileId) -> bool {
        let alive = self.alive();
        let mut disks = alive.iter().map(|dc| &self.dcs[dc].disk);
        !disks.any(|disk| disk.files.get(&id).is_some_and(|file| file.record.is_some()))
    }
}
