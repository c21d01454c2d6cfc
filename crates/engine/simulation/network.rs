//! The network: loses, doubles, delays and reorders commands, and finds out who reaches whom.

use sluice_engine::aggregator::{Aggregator, NodeEvent, NodeMemory};
use sluice_engine::command::{Command, Statement};
use sluice_engine::ids::{DcId, Incarnation};

use super::check;
use super::disk::dc_name;
use super::world::{Todo, World, short};

impl World {
    pub fn send(&mut self, command: Command) {
        self.figures.commands += 1;
        let (from, to) = (command.from, command.to);
        self.note(|| {
            format!("{} -> {}: {} {}", dc_name(from), dc_name(to), short(command.file), command.statement)
        });
        if let (Statement::Have { generation, span }, Some(shape)) =
            (command.statement, self.known_shape(from, command.file))
        {
            check::have_said(self, from, command.file, shape, generation, span);
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
            let far = match self.random.below(100) {
                0 => 60_000,
                1..=5 => 3_000,
                _ => 120,
            };
            let delay = 1 + self.random.below(far);
            self.schedule(delay, Todo::Deliver(command));
        }
    }

    pub fn reaches(&self, a: DcId, b: DcId) -> bool {
        !self.cuts.contains(&(a, b))
            && !self.cuts.contains(&(b, a))
            && self.dcs[&a].agg.is_some()
            && self.dcs[&b].agg.is_some()
    }

    /// `a` looks whether it reaches `b`.
    pub fn hello(&mut self, a: DcId, b: DcId) {
        let reach = self.reaches(a, b);
        let linked = self.dcs[&a].links.contains(&b);
        if reach && !linked {
            let agg = |id: DcId| self.dcs[&id].agg.as_ref();
            let memory = |id: DcId| NodeMemory::from_bytes(&self.dcs[&id].disk.node).expect("undamaged");
            if let Some(theirs) = agg(b).map(Aggregator::incarnation) {
                let mut seen_of_me = memory(b).seen.get(&a).copied().unwrap_or(Incarnation::new(0));
                if !self.calm && self.random.chance(1) {
                    // Somebody spoke in our name.
                    let mine = agg(a).map_or(0, |agg| agg.incarnation().number());
                    seen_of_me = Incarnation::new(mine + self.random.below(3) as u32);
                }
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
}
