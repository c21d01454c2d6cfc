//! The network: loses, doubles, delays and reorders commands, and finds out who reaches whom.

use sluice_engine::aggregator::{Greeting, NodeEvent};
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
            self.feed(a, NodeEvent::Dial { peer: b });
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

    /// `b` hears the hello of `a`, who dialled.
    pub fn greet(&mut self, a: DcId, b: DcId, greeting: Greeting) {
        if self.reaches(a, b) {
            let Greeting { incarnation, seen } = greeting;
            self.feed(b, NodeEvent::Hello { peer: a, incarnation, seen_of_me: seen });
        }
    }

    /// `a`, who dialled `b`, hears the answer, and is hung up on unless it is welcome.
    pub fn answer(&mut self, a: DcId, b: DcId, mut greeting: Greeting, welcome: bool) {
        // A connection may break after the hello and before the answer.
        if !self.reaches(a, b) || (!self.calm && self.random.chance(2)) {
            self.note(|| format!("{} hears no answer of {}", dc_name(a), dc_name(b)));
            return;
        }
        if !self.calm && self.random.chance(1) {
            // Somebody spoke in its name.
            let mine = self.dcs[&a].agg.as_ref().map_or(0, |agg| agg.incarnation().number());
            greeting.seen = Incarnation::new(mine + self.random.below(3) as u32);
        }
        let how = if welcome { "reaches" } else { "is hung up on by" };
        self.note(|| format!("{} {how} {}", dc_name(a), dc_name(b)));
        if let Some(dc) = self.dcs.get_mut(&a) {
            dc.links.insert(b);
        }
        let Greeting { incarnation, seen } = greeting;
        self.feed(a, NodeEvent::LinkUp { peer: b, incarnation, seen_of_me: seen });
        if !welcome && self.dcs.get_mut(&a).is_some_and(|dc| dc.links.remove(&b)) {
            self.feed(a, NodeEvent::LinkDown { peer: b });
        }
    }
}
