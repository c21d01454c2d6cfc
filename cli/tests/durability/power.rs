//! The same process on a disk that fails under it: power that goes, syncs and reads that fail, room that runs out.
//!
//! Needs `/dev/fuse`, and to be root or to have `fusermount3`.

use std::path::Path;

use serde_json::Value;
use sluice_fault_disk::{FaultDisk, Faults, PAGE};

use crate::mount::Mount;
use crate::process::{Dev, sluice};
use crate::run::Run;

/// A run on a disk that fails.
struct Machine {
    run: Run,
    disk: FaultDisk,
    mount: Option<Mount>,
}

/// Whether a disk can be shown to a process here. A machine that cannot says so, loudly; one that must fails.
fn can_mount() -> bool {
    let place = tempfile::tempdir().unwrap();
    let Err(error) = Mount::on(place.path(), &FaultDisk::new()) else { return true };
    let why = format!(
        "no disk that fails can be mounted over FUSE ({error}): is there /dev/fuse, and fusermount3?"
    );
    assert!(std::env::var_os("CI").is_none(), "these tests must run in CI, and {why}");
    eprintln!("\nNOT RUN: {why}\n");
    false
}

impl Machine {
    fn new(seed: u64) -> Self {
        let run = Run::new(seed, "disk/data");
        let mut machine = Self { run, disk: FaultDisk::new(), mount: None };
        std::fs::create_dir(machine.place()).unwrap();
        machine.mount();
        machine
    }

    fn place(&self) -> std::path::PathBuf {
        self.run.home.path().join("disk")
    }

    fn mount(&mut self) {
        // The old one goes first.
        self.mount = None;
        self.mount =
            Some(Mount::on(&self.place(), &self.disk).expect("a mount; as root, or with fusermount3"));
    }

    /// One life: clients work, something goes wrong under them, and goes on being wrong for some answers; the process
    /// dies, perhaps the power with it, and the next one finds a disk without faults, but `lasting` ones.
    fn live(&mut self, faults: &Faults, cut: bool, lasting: &Faults) -> Result<(), String> {
        let begun = self.run.begin()?;
        let (before, after) = (1 + self.run.dice.below(12), 1 + self.run.dice.below(8));
        let disk = self.disk.clone();
        let soon = disk.operations() + self.run.dice.below(1_500);
        // In the middle of anything.
        let power_off_after = cut.then_some(soon);
        disk.faults(|now| *now = Faults { power_off_after, ..faults.clone() });
        self.run.live(begun, before + after, |_, dev| dev.kill())?;
        self.disk = if cut { disk.after_power_cut(&mut self.run.dice) } else { disk.after_kill() };
        self.disk.faults(|faults| *faults = lasting.clone());
        self.mount();
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Before its directory.
        self.mount = None;
    }
}

#[test]
fn what_was_acknowledged_survives_power_cuts() {
    if !can_mount() {
        return;
    }
    let cuts = crate::number("SLUICE_CUTS").unwrap_or(40);
    let mut machine = Machine::new(crate::seed("power cuts"));
    for life in 0..cuts {
        let lived =
            machine.live(&Faults::default(), true, &Faults::default()).and_then(|()| machine.run.sound());
        lived.unwrap_or_else(|wrong| panic!("life {life}: {wrong}\n{}", machine.run.said()));
    }
    machine.run.finish().unwrap_or_else(|wrong| panic!("at the end: {wrong}\n{}", machine.run.said()));
    println!("{cuts} power cuts: {:?}", machine.run.counts());
}

#[test]
fn a_disk_that_fails_loses_nothing_that_was_acknowledged() {
    if !can_mount() {
        return;
    }
    let mut machine = Machine::new(crate::seed("faults"));
    let rounds = crate::number("SLUICE_CUTS").unwrap_or(40) / 10;
    for round in 0..rounds {
        let failing_sync =
            |name| Faults { failing_sync: Some(name), failed_sync_reverts: true, ..Faults::default() };
        let failing_read = |name| Faults { failing_read: Some(name), ..Faults::default() };
        let lives = [
            ("syncs of data fail", failing_sync("data-")),
            ("syncs of the journal fail", failing_sync("journal-")),
            ("syncs of values fail", failing_sync("values-")),
            ("reads of chunks fail", failing_read("data-")),
            ("reads of values fail", failing_read("values-")),
            ("there is no room", Faults { capacity: Some(0), ..Faults::default() }),
        ];
        for (name, faults) in lives {
            let cut = machine.run.dice.one_in(2);
            let lived = machine.live(&faults, cut, &Faults::default());
            lived.unwrap_or_else(|wrong| panic!("round {round}, {name}: {wrong}\n{}", machine.run.said()));
        }
    }
    machine.run.finish().unwrap_or_else(|wrong| panic!("at the end: {wrong}\n{}", machine.run.said()));
    println!("{} faults: {:?}", 6 * rounds, machine.run.counts());
}

#[test]
fn a_disk_that_lies_about_syncs_is_noticed() {
    if !can_mount() {
        return;
    }
    let seed = crate::seed("lies");
    for lie in [
        Faults { lying_sync: Some("data-"), ..Faults::default() },
        Faults { lying_sync: Some("journal-"), ..Faults::default() },
        Faults { lying_dirs: true, ..Faults::default() },
    ] {
        let mut machine = Machine::new(seed);
        machine.disk.faults(|faults| *faults = lie.clone());
        let noticed = (0..40).any(|_| {
            let lived = machine.live(&lie, true, &lie).and_then(|()| machine.run.sound());
            lived.inspect_err(|wrong| println!("{lie:?}: {}", wrong.lines().next().unwrap_or(""))).is_err()
        });
        assert!(noticed, "{lie:?}");
    }
}

#[test]
fn a_full_disk_says_so_and_goes_on_when_there_is_room() {
    if !can_mount() {
        return;
    }
    let machine = Machine::new(crate::seed("full"));
    let (home, data) = (machine.run.home.path(), machine.run.data.clone());
    let dev = Dev::start(home, &data).unwrap();
    // More than the disk has, with what is kept back for records: runs that begin together are let in together.
    std::fs::write(home.join("disk.img"), vec![7; 100 << 20]).unwrap();
    let room = |bytes: u64| {
        let capacity = machine.disk.used() + (64 << 20) / PAGE as u64 + bytes / PAGE as u64;
        machine.disk.faults(|faults| faults.capacity = Some(capacity));
    };
    room(9 << 20);
    let full = command(home, &data, &["put", "disk.img", "--retry-for", "2s", "--json"]);
    let error = &full.1["error"];
    assert_eq!((full.0, error["code"].as_str()), (Some(6), Some("volume-full")), "{}", full.1);
    assert!(error["hint"].is_string() && error["resume"].is_string(), "{}", full.1);
    room(400 << 20);
    let done = command(home, &data, &["put", "disk.img", "--wait", "assembled", "--json"]);
    assert_eq!((done.0, done.1["state"].as_str()), (Some(0), Some("assembled")), "{}", done.1);
    assert!(done.1["chunks_skipped"].as_u64() > Some(0), "it went on where it was: {}", done.1);
    assert_eq!(dev.stop(), Some(0));
}

/// Runs a command for the cluster in `data`; its exit code and its answer.
fn command(home: &Path, data: &Path, args: &[&str]) -> (Option<i32>, Value) {
    let mut command = sluice(home, args);
    for line in std::fs::read_to_string(data.join("env")).unwrap().lines() {
        let (name, value) = line.strip_prefix("export ").unwrap().split_once('=').unwrap();
        command.env(name, value.trim_matches('\''));
    }
    let output = command.output().unwrap();
    let answer = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{error}: {}", String::from_utf8_lossy(&output.stderr));
    });
    (output.status.code(), answer)
}
