//! Counts over worlds.

/// Counts over one or more worlds.
#[derive(Clone, Copy, Default, Debug)]
pub struct Figures {
    pub steps: u64,
    pub commands: u64,
    pub lost: u64,
    pub doubled: u64,
    pub crashes: u64,
    pub disks_lost: u64,
    pub restores: u64,
    pub homes_lost: u64,
    pub takeovers: u64,
    pub files: u64,
    pub assembled: u64,
    pub conflicts: u64,
    pub dropped: u64,
    pub freed: u64,
    pub lies: u64,
    pub revocations: u64,
    pub drains: u64,
    pub pages_out: u64,
    pub pages_in: u64,
    pub virtual_ms: u64,
}

impl Figures {
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.commands += other.commands;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.crashes += other.crashes;
        self.disks_lost += other.disks_lost;
        self.restores += other.restores;
        self.homes_lost += other.homes_lost;
        self.takeovers += other.takeovers;
        self.files += other.files;
        self.assembled += other.assembled;
        self.conflicts += other.conflicts;
        self.dropped += other.dropped;
        self.freed += other.freed;
        self.lies += other.lies;
        self.revocations += other.revocations;
        self.drains += other.drains;
        self.pages_out += other.pages_out;
        self.pages_in += other.pages_in;
        self.virtual_ms += other.virtual_ms;
    }
}
