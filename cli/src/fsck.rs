//! `sluice fsck`: what is in the volumes of a directory, and what of it is damaged. Writes nothing.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice::datacenter::StartError;
use sluice_store::StoreError;
use sluice_store::fs::{self, CheckOptions, CheckProgress, Finding, FindingKind, VolumeReport};

use crate::context::Context;
use crate::dev::data_directory;
use crate::failure::Failure;
use crate::size;

const EXAMPLES: &str = "\
The directory is that of `sluice dev`, or one volume. A volume that a process uses is refused.

Exit codes: 0 sound, 2 no volume there, 5 something is damaged, 6 a process uses it.

Examples:
  sluice fsck --data data         every byte is read and hashed
  sluice fsck --quick             only that everything is there, and as long as it should be";

/// How often it is said how far it is.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Findings of one kind that are written out for people.
const SHOWN: usize = 20;

/// Ranges that are written out for people.
const RANGES_SHOWN: usize = 12;

/// What to check.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The directory; by default that of `sluice dev`.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Do not read and hash the bytes of chunks.
    #[arg(long)]
    quick: bool,
}

/// Checks.
pub(crate) async fn run(args: Args, context: &Context) -> anyhow::Result<()> {
    let path = data_directory(args.data)?;
    let stop = Arc::new(AtomicBool::new(false));
    // Dropped when Ctrl-C ends the command: the thread then ends with its file.
    let _stop = StopOnDrop(stop.clone());
    let quiet = context.json;
    let work = move || check(&path, !args.quick, quiet, &stop);
    let reports = tokio::task::spawn_blocking(work).await??;
    let sound = reports.iter().all(VolumeReport::is_sound);
    let volumes: Vec<Value> = reports.iter().map(object).collect();
    context.answer(&json!({ "sound": sound, "volumes": volumes }), || reports.iter().map(words).collect())?;
    if sound {
        return Ok(());
    }
    let damaged: u64 = reports.iter().flat_map(damages).map(|(_, count)| count).sum();
    let message = format!(
        "{} damaged",
        if damaged == 1 { "1 thing is".into() } else { format!("{damaged} things are") }
    );
    Err(Failure::Damaged { message, hint: "nothing was changed; what to do stands with each" }.into())
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Checks every volume at or under `path`. Blocks.
fn check(path: &Path, hash_bytes: bool, quiet: bool, stop: &AtomicBool) -> anyhow::Result<Vec<VolumeReport>> {
    let volumes = volumes(path)?;
    let _lock = keep(path)?;
    let mut reports = Vec::new();
    for volume in volumes {
        let mut said = Instant::now();
        let mut progress = |done: CheckProgress| {
            if stop.load(Ordering::Relaxed) {
                // Nobody waits for the result any more, and nothing was begun that needs an end.
                std::process::exit(crate::failure::INTERRUPTED.into());
            }
            if !quiet && said.elapsed() >= LINE_EVERY {
                said = Instant::now();
                let CheckProgress { files, of_files, bytes } = done;
                let bytes = size::words(bytes);
                eprintln!("{}: {files} of {of_files} files, {bytes}", volume.display());
            }
        };
        let options = CheckOptions { hash_bytes, progress: &mut progress };
        reports.push(fs::check(&volume, options).map_err(StartError::from)?);
    }
    Ok(reports)
}

/// The volumes at or under a directory. In that of `sluice dev` every directory but that of the keys must be one.
fn volumes(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let is_volume =
        |path: &Path| ["volume", "checkpoint", "index"].iter().any(|name| path.join(name).exists());
    let unreadable = |error| StartError::of_reading(path, error);
    let entries = std::fs::read_dir(path).map_err(unreadable)?;
    let mut volumes = Vec::new();
    if is_volume(path) {
        volumes.push(path.to_path_buf());
    } else {
        let is_cluster = path.join("keys").is_dir();
        for entry in entries {
            let entry = entry.map_err(unreadable)?;
            let place = entry.path();
            if is_volume(&place) || (is_cluster && place.is_dir() && entry.file_name() != "keys") {
                volumes.push(place);
            }
        }
        volumes.sort();
    }
    if volumes.is_empty() {
        let message = format!("{} is no volume, and holds none", path.display());
        let hint = "give the directory of sluice dev, or one of a datacenter in it";
        return Err(Failure::usage("no-volume", message, hint).into());
    }
    for volume in &volumes {
        // What may not be read is not damaged.
        match File::open(volume.join("volume")) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(StartError::of_reading(volume, error).into());
            }
            Ok(_) | Err(_) => {}
        }
    }
    Ok(volumes)
}

/// Keeps `sluice dev` from starting in the directory meanwhile.
fn keep(path: &Path) -> anyhow::Result<Option<File>> {
    let name = path.join("lock");
    let lock = match File::open(&name) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StartError::of_reading(path, error).into()),
    };
    // That of a volume is taken when the volume is checked.
    if path.join("volume").exists() {
        return Ok(None);
    }
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(TryLockError::WouldBlock) => Err(StartError::Store(StoreError::in_use(path, &name)).into()),
        Err(TryLockError::Error(error)) => Err(StartError::of_reading(path, error).into()),
    }
}

fn damages(report: &VolumeReport) -> impl Iterator<Item = (FindingKind, u64)> {
    report.counts.iter().map(|(kind, count)| (*kind, *count)).filter(|(kind, _)| kind.is_damage())
}

fn object(report: &VolumeReport) -> Value {
    let counts: BTreeMap<&str, u64> =
        report.counts.iter().map(|(kind, count)| (kind.code(), *count)).collect();
    let finding = |finding: &Finding| {
        let Finding { kind, path, file, client, chunks, detail } = finding;
        let chunks: Vec<[u64; 2]> = chunks.iter().map(|range| [range.start, range.end]).collect();
        json!({
            "kind": kind.code(), "damage": kind.is_damage(), "path": path, "detail": detail, "chunks": chunks,
            "file": file.map(|file| file.to_string()), "id": client.map(|client| client.to_string()),
            "meaning": kind.meaning(), "advice": kind.advice(),
        })
    };
    json!({
        "path": report.path, "sound": report.is_sound(), "hashed": report.hashed, "files": report.files,
        "published": report.published, "chunks": report.chunks, "bytes": report.bytes,
        "batches": report.batches, "counts": counts,
        "findings": report.findings.iter().map(finding).collect::<Vec<_>>(),
    })
}

fn words(report: &VolumeReport) -> String {
    let verdict = if report.is_sound() { "sound" } else { "damaged" };
    let mut text = format!(
        "{}: {verdict}; {}, {} of them published; {}, {} {}\n",
        report.path.display(),
        size::count(report.files, "file"),
        report.published,
        size::count(report.chunks, "chunk"),
        size::words(report.bytes),
        if report.hashed { "hashed" } else { "not hashed" },
    );
    for (kind, count) in &report.counts {
        text.push_str(&format!("  {} ({count})\n", kind.code()));
        let mut shown = 0;
        for finding in report.findings.iter().filter(|finding| finding.kind == *kind).take(SHOWN) {
            shown += 1;
            text.push_str(&format!("    {}\n", finding.path.display()));
            if let Some(client) = finding.client {
                text.push_str(&format!("      file {client}\n"));
            }
            if !finding.chunks.is_empty() {
                text.push_str(&format!("      chunks {}\n", ranges(finding)));
            }
            text.push_str(&format!("      {}\n", finding.detail));
        }
        if *count > shown {
            text.push_str(&format!("    and {} more\n", count - shown));
        }
        text.push_str(&format!("    means: {}\n    to do: {}\n", kind.meaning(), kind.advice()));
    }
    text
}

fn ranges(finding: &Finding) -> String {
    let word = |range: &std::ops::Range<u64>| match range.end - range.start {
        1 => range.start.to_string(),
        _ => format!("{}-{}", range.start, range.end - 1),
    };
    let mut words: Vec<String> = finding.chunks.iter().take(RANGES_SHOWN).map(word).collect();
    if finding.chunks.len() > RANGES_SHOWN {
        words.push(format!("and {} more ranges", finding.chunks.len() - RANGES_SHOWN));
    }
    words.join(", ")
}
