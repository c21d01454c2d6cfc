//! What goes wrong, until all faults end.

use sluice_engine::aggregator::NodeEvent;
use sluice_engine::command::{Command, Statement};
use sluice_engine::ids::{DcId, FileId, RevocationEpoch, Sequence, TenantId};
use sluice_engine::revocations::Revocation;

use super::client::Plan;
use super::disk::{Disk, chunk_span, dc_name};
use super::world::{Todo, World, short};

impl World {
    pub fn crash(&mut self, id: DcId) {
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

    pub fn fault(&mut self) {
        if self.calm {
            return;
        }
        let alive = self.alive();
        if let Some(id) = self.random.pick(&alive) {
            match self.random.below(16) {
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
                14 | 15 => self.lie(id),
                _ => {}
            }
        }
        let delay = 300 + self.random.below(6_000);
        self.schedule(delay, Todo::Fault);
    }

    /// Somebody revokes a token, or all of a tenant, at some datacenter. Few of each, so that they meet.
    pub fn revoke(&mut self) {
        let alive = self.alive();
        let Some(id) = self.random.pick(&alive) else { return };
        let subject = match self.random.below(4) {
            0 => FileId::NIL,
            number => FileId::from_bytes([number as u8; 16]),
        };
        let (tenant, epoch) = (1 + self.random.below(2), 1 + self.random.below(4));
        let revocation = Revocation::of(subject, TenantId::new(tenant), RevocationEpoch::new(epoch));
        self.note(|| format!("{} is to revoke {revocation:?}", dc_name(id)));
        let process = self.dcs[&id].process;
        self.feed(id, NodeEvent::Revoke(revocation));
        // Whoever asked is told so once it is durable; a process that died before told nobody.
        if self.dcs[&id].process == process {
            self.figures.revocations += 1;
            self.revoked.push((revocation, id));
        }
    }

    /// A datacenter says that it has a chunk which it does not have.
    fn lie(&mut self, id: DcId) {
        let number = self.random.below(self.clients.len() as u64) as usize;
        self.awake(id, self.clients[number].id);
        let client = &self.clients[number];
        let (file, chunks, plan) = (client.id, client.shape.chunks(), client.plan);
        let known = self.dcs[&id].agg.as_ref().and_then(|agg| agg.file(file));
        let Some(home) = known.and_then(|file| file.ledger().claim()).map(|claim| claim.home) else { return };
        // Of two versions of a chunk a lie may be the only one that reaches the home in time.
        if home == id || chunks == 0 || plan == Plan::Contradict || !self.dcs.contains_key(&home) {
            return;
        }
        let index = self.random.below(chunks);
        if self.dcs[&id].disk.chunk(file, index).is_some() {
            return;
        }
        self.figures.lies += 1;
        self.note(|| format!("{} lies about chunk {index} of {}", dc_name(id), short(file)));
        let incarnation = self.dcs[&id].agg.as_ref().map(|agg| agg.incarnation()).unwrap_or_default();
        let generation = self.generation(id, file);
        let command = Command {
            from: id,
            to: home,
            // Nobody waits for the acknowledgement of this number.
            sequence: Sequence::of(incarnation, u32::MAX),
            slot: file.slot(),
            sent_at: self.clock(id),
            file,
            statement: Statement::Have { generation, span: chunk_span(file, index, 1) },
        };
        let delay = self.random.below(500);
        self.schedule(delay, Todo::Deliver(command));
    }

    /// Replaces a disk by an older state; what only it had is nobody's fault.
    pub fn lose_disk(&mut self, id: DcId, old: Disk) {
        let now = self.now;
        let dc = self.dcs.get_mut(&id).expect("configured");
        dc.disk_lost_at.push(now);
        dc.disk = old;
        self.acked.retain(|(_, dc, _), _| *dc != id);
        // Nobody else may have been told.
        self.revoked.retain(|(_, dc)| *dc != id);
    }

    pub fn heal(&mut self) {
        self.calm = true;
        self.cuts.clear();
        self.note(|| "all faults end".into());
        let ids: Vec<DcId> = self.dcs.keys().copied().collect();
        for id in ids {
            self.boot(id);
        }
    }
}
