//! What a process of a file reads again while it runs: the file, for what is logged, how much memory there is and how fast it
//! takes uploads and reads again what is stored, and its keys and certificates. When they change, and at SIGHUP.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use sluice::live::Live;
use sluice_node::clock::{Clock as _, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::telemetry::LogLevel;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio_util::task::AbortOnDropHandle;

/// How often the files are looked at.
const EVERY: Duration = Duration::from_secs(5);

/// How many files of keys are looked at, and how deep they lie at most.
const MAX_FILES: usize = 1000;
const MAX_DEPTH: usize = 4;

/// A file that describes a process.
pub(crate) trait ConfigFile: Sized + Send + Sync + 'static {
    /// Reads it.
    fn read(path: &Path) -> anyhow::Result<Self>;
    /// Whether it describes something that could start.
    fn check(&self) -> anyhow::Result<()>;
    /// The directory of the keys.
    fn keys(&self) -> &Path;
    /// What is logged.
    fn log(&self) -> &str;
    /// Bytes of memory for bodies in flight; `None` for a role that has no such setting.
    fn memory(&self) -> Option<u64>;
    /// Bytes of uploads a second that are taken.
    fn upload_rate(&self) -> Option<u64>;
    /// Bytes a second at which what is stored is read again; `None` for a role that has no such setting.
    fn scrub_rate(&self) -> Option<u64>;
    /// Whether all else is the same in both.
    fn is_like(&self, other: &Self) -> bool;
}

/// SIGHUP, from when it is made: the signal no longer ends the process.
#[derive(Debug)]
pub(crate) struct Hangup(Signal);

impl Hangup {
    /// Begins to listen.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        Ok(Self(signal(SignalKind::hangup()).context("cannot listen for signals")?))
    }
}

/// Reads again what `file` came from, until the handle is dropped. What changed while the process started counts, too.
pub(crate) fn watch<F: ConfigFile>(
    path: PathBuf,
    file: F,
    log: LogLevel,
    live: Live,
    mut hangup: Hangup,
) -> AbortOnDropHandle<()> {
    let mut watch = Watch {
        path,
        log,
        level: file.log().to_owned(),
        memory: file.memory(),
        rates: (file.upload_rate(), file.scrub_rate()),
        started: file,
        live,
        failed: None,
        resizing: None,
    };
    AbortOnDropHandle::new(tokio::spawn(async move {
        // Of what was taken over last; none if that failed, so that it is tried again.
        let mut seen = None;
        loop {
            let (path, keys) = (watch.path.clone(), watch.started.keys().to_owned());
            let now = spawn_blocking(move || fingerprint(path, &keys)).await.ok();
            if seen.is_none() || now != seen {
                seen = now.filter(|_| watch.reload());
            }
            tokio::select! {
                signal = hangup.0.recv() => if signal.is_some() {
                    seen = None;
                },
                () = tokio::time::sleep(EVERY) => {}
            }
        }
    }))
}

struct Watch<F> {
    path: PathBuf,
    /// What the process runs with, but for what follows.
    started: F,
    log: LogLevel,
    level: String,
    memory: Option<u64>,
    /// Of uploads, and of the scrub.
    rates: (Option<u64>, Option<u64>),
    live: Live,
    /// Why it was not taken over the last time: said once.
    failed: Option<String>,
    /// Waits until memory that is no longer there was given back. A newer change takes its place.
    resizing: Option<AbortOnDropHandle<()>>,
}

impl<F: ConfigFile> Watch<F> {
    /// Whether all is as the files say.
    fn reload(&mut self) -> bool {
        let result = self.try_reload();
        let path = self.path.display();
        self.live.metrics.config_reloaded.set(i64::from(result.is_ok()));
        match result {
            Ok(done) => {
                if !done.is_empty() || self.failed.take().is_some() {
                    tracing::info!(%path, done = done.join(", "), "configuration was taken over");
                }
                true
            }
            // What ran goes on as it was.
            Err(error) => {
                let error = format!("{error:#}");
                if self.failed.as_ref() != Some(&error) {
                    tracing::error!(%path, error, "configuration was not taken over");
                }
                self.failed = Some(error);
                false
            }
        }
    }

    fn try_reload(&mut self) -> anyhow::Result<Vec<String>> {
        let file = F::read(&self.path)?;
        file.check()?;
        let mut done = Vec::new();
        let fresh = ClusterMaterial::load(self.started.keys())?;
        let material = &self.live.material;
        let revision = material.revision();
        let renewed = material.renew(&fresh, SystemClock.now())?;
        if material.revision() != revision {
            done.push(format!("keys of revision {}", material.revision()));
        }
        if renewed > 0 {
            done.push(format!("{renewed} certificates"));
        }
        if file.log() != self.level {
            self.log.set(file.log())?;
            file.log().clone_into(&mut self.level);
            done.push("log".to_owned());
        }
        if let Some(memory) = file.memory().filter(|memory| Some(*memory) != self.memory) {
            let budget = self.live.memory.clone();
            self.resizing =
                Some(AbortOnDropHandle::new(tokio::spawn(async move { budget.resize(memory).await })));
            self.memory = Some(memory);
            done.push("memory".to_owned());
        }
        let rates = (file.upload_rate(), file.scrub_rate());
        if rates.0 != self.rates.0 {
            self.live.set_upload_rate(rates.0);
            done.push("upload_rate".to_owned());
        }
        if let Some(rate) = rates.1.filter(|rate| Some(*rate) != self.rates.1) {
            self.live.set_scrub_rate(rate);
            done.push("scrub_rate".to_owned());
        }
        self.rates = rates;
        if !file.is_like(&self.started) {
            let path = self.path.display();
            tracing::warn!(%path, "changes of anything but log, memory, rates, keys and certificates count from the next start");
        }
        Ok(done)
    }
}

/// Which files there are, and when they were written.
fn fingerprint(path: PathBuf, keys: &Path) -> blake3::Hash {
    let mut files = vec![path];
    find(keys, MAX_DEPTH, &mut files);
    files.sort_unstable();
    let mut hash = blake3::Hasher::new();
    for file in files {
        hash.update(file.as_os_str().as_encoded_bytes());
        if let Ok(metadata) = fs::metadata(&file) {
            let numbers =
                [metadata.ino(), metadata.len(), metadata.ctime() as u64, metadata.ctime_nsec() as u64];
            numbers.iter().for_each(|number| {
                hash.update(&number.to_be_bytes());
            });
        }
    }
    hash.finalize()
}

/// The files of keys below a directory. Names that begin with a dot are how a mounted secret is replaced, and no keys.
fn find(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    // What cannot be read is missed when it is loaded.
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || found.len() >= MAX_FILES {
            continue;
        }
        let is_key = path.extension().is_some_and(|kind| ["pem", "key", "json"].iter().any(|of| kind == *of));
        if is_key {
            found.push(path);
        } else if depth > 0 && path.is_dir() {
            find(&path, depth - 1, found);
        }
    }
}
