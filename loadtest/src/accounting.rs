//! What processes and the machine spend, read from `/proc`: processor time, and the most memory that was resident.
//!
//! Processor time of a server is that of its process and all its descendants, so that a server of several processes
//! is counted whole. Nothing to stop.

use std::fs;
use std::io;
use std::ops::{Add, Sub};

use anyhow::{Context, ensure};
use serde::Serialize;

/// Processor time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct CpuTime {
    pub(crate) user: f64,
    pub(crate) system: f64,
}

impl CpuTime {
    pub(crate) fn total(self) -> f64 {
        self.user + self.system
    }

    /// The same, for each GiB of `bytes`.
    pub(crate) fn per_gib(self, bytes: u64) -> Self {
        let gib = bytes as f64 / f64::from(1 << 30);
        Self { user: self.user / gib, system: self.system / gib }
    }

    fn of_ticks(user: u64, system: u64) -> Self {
        let hertz = rustix::param::clock_ticks_per_second() as f64;
        Self { user: user as f64 / hertz, system: system as f64 / hertz }
    }
}

impl Add for CpuTime {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { user: self.user + other.user, system: self.system + other.system }
    }
}

impl Sub for CpuTime {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { user: self.user - other.user, system: self.system - other.system }
    }
}

/// What a process and its descendants, and the whole machine, have spent until now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    pub(crate) server: CpuTime,
    pub(crate) machine: CpuTime,
}

impl Spent {
    pub(crate) fn until_now(pid: u32) -> anyhow::Result<Self> {
        Ok(Self { server: of_family(pid)?, machine: of_machine()? })
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self { server: self.server - before.server, machine: self.machine - before.machine }
    }
}

fn of_family(pid: u32) -> anyhow::Result<CpuTime> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("the server (process {pid}) is gone"))?;
    let mut sum = parse_stat(&stat).context("/proc/PID/stat reads differently")?;
    // Children that end meanwhile are not waited for by a server that runs.
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
        sum = sum + of_family(child).unwrap_or_default();
    }
    Ok(sum)
}

/// The 14th and 15th fields of `/proc/PID/stat` (proc(5)); the second may hold spaces and brackets.
fn parse_stat(stat: &str) -> Option<CpuTime> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user = fields.next()?.parse().ok()?;
    let system = fields.next()?.parse().ok()?;
    Some(CpuTime::of_ticks(user, system))
}

fn of_machine() -> anyhow::Result<CpuTime> {
    let stat = fs::read_to_string("/proc/stat")?;
    parse_machine(&stat).context("/proc/stat reads differently")
}

/// The first line of `/proc/stat`: user and nice are user time, system, irq and softirq are system time.
fn parse_machine(stat: &str) -> Option<CpuTime> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = fields.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else { return None };
    Some(CpuTime::of_ticks(user + nice, system + irq + softirq))
}

/// Forgets the most memory that a process had resident, so that a new most is noted from here on.
pub(crate) fn reset_peak_memory(pid: u32) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5")
}

/// Bytes of a line of `/proc/PID/status`: `VmHWM` is the most that was resident, `VmRSS` what is.
pub(crate) fn memory(pid: u32, line: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("the server (process {pid}) is gone"))?;
    parse_memory(&status, line).with_context(|| format!("/proc/{pid}/status has no {line}"))
}

fn parse_memory(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Refuses if the filesystem of `path` has less than `needed` bytes, and some to spare.
pub(crate) fn check_room(path: &std::path::Path, needed: u64) -> anyhow::Result<()> {
    const SPARE: u64 = 1 << 30;
    let stat = rustix::fs::statvfs(path).with_context(|| format!("cannot look at {}", path.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    ensure!(
        free >= needed.saturating_add(SPARE),
        "{} has {} MiB free, this needs {} MiB and 1 GiB to spare: use a smaller --size, or another --dir",
        path.display(),
        free >> 20,
        needed >> 20,
    );
    Ok(())
}

/// The median; of an even number the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (half, odd) = (sorted.len() / 2, sorted.len() % 2 == 1);
    match (sorted.is_empty(), odd) {
        (true, _) => f64::NAN,
        (false, true) => sorted[half],
        (false, false) => f64::midpoint(sorted[half - 1], sorted[half]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(ticks: u64) -> f64 {
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64
    }

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_move_the_fields() {
        let stat = "77 (a) b) c) S 1 77 77 0 -1 4194560 500 0 0 0 300 45 0 0 20 0 9 0 100 1 2";
        assert_eq!(parse_stat(stat), Some(CpuTime { user: ticks(300), system: ticks(45) }));
        assert_eq!(parse_stat("77 (a) S 1 2"), None);
    }

    #[test]
    fn the_machines_system_time_has_interrupts_in_it() {
        let stat = "cpu  10 20 30 4000 50 6 7 8 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n";
        assert_eq!(parse_machine(stat), Some(CpuTime { user: ticks(30), system: ticks(43) }));
        assert_eq!(parse_machine("cpu  10 20\n"), None);
    }

    #[test]
    fn memory_is_read_by_the_whole_name_of_its_line() {
        let status = "Name:\tx\nVmHWMother:\t1 kB\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n";
        assert_eq!(parse_memory(status, "VmHWM"), Some(2 << 20));
        assert_eq!(parse_memory(status, "VmPeak"), None);
    }

    #[test]
    fn times_are_for_a_gib() {
        let spent = CpuTime { user: 1.0, system: 0.5 }.per_gib(512 << 20);
        assert_eq!(spent, CpuTime { user: 2.0, system: 1.0 });
        assert_eq!(spent.total(), 3.0);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn this_process_has_spent_something_and_its_children_count() {
        let pid = std::process::id();
        reset_peak_memory(pid).unwrap();
        let before = Spent::until_now(pid).unwrap();
        let mut hash = blake3::hash(b"x");
        // The system counts in hundredths of a second, and the machine apart from the process.
        loop {
            let spent = Spent::until_now(pid).unwrap().since(before);
            if spent.server.total() > 0.0 && spent.machine.total() > 0.0 {
                break;
            }
            (0..10_000).for_each(|_| hash = blake3::hash(hash.as_bytes()));
        }
        assert!(memory(pid, "VmHWM").unwrap() >= 1 << 20);
        assert!(of_family(u32::MAX).is_err());
    }

    #[test]
    fn a_disk_without_room_is_refused() {
        let error = check_room(std::path::Path::new("/"), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("--size"), "{error}");
        check_room(std::path::Path::new("/proc"), 0).unwrap_err();
    }
}
