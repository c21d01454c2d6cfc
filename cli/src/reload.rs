//! What a process of a file reads again while it runs: the file, for what is logged and how much memory there is, and
//! its keys, for certificates. When they change, and at SIGHUP.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use sluice::live::Live;
use sluice_node::clock::{Clock as _, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::telemetry::LogLevel;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

/// How often the files are looked at.
const EVERY: Duration = Duration::from_secs(5);

/// How many files of keys are looked at, and how deep they lie.
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
    /// Whether all else is the same in both.
    fn is_like(&self, other: &Self) -> bool;
}

/// Reads again what `file` came from, until the handle is dropped.
pub(crate) fn watch<F: ConfigFile>(
    path: PathBuf,
    file: F,
    log: LogLevel,
    live: Live,
) -> anyhow::Result<AbortOnDropHandle<()>> {
    let mut hangup = signal(SignalKind::hangup()).context("cannot listen for signals")?;
    live.metrics.config_reloaded.set(1);
    let mut watch = Watch { path, file, log, live, resizing: None };
    let mut seen = watch.fingerprint();
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let asked = tokio::select! {
                signal = hangup.recv() => signal.is_some(),
                () = tokio::time::sleep(EVERY) => false,
            };
            let now = watch.fingerprint();
            if asked || now != seen {
                seen = now;
                watch.reload();
            }
        }
    })))
}

struct Watch<F> {
    path: PathBuf,
    /// What is in force.
    file: F,
    log: LogLevel,
    live: Live,
    /// Waits until memory that is no longer there was given back.
    resizing: Option<AbortOnDropHandle<()>>,
}

impl<F: ConfigFile> Watch<F> {
    fn reload(&mut self) {
        let result = self.try_reload();
        let path = self.path.display();
        match result {
            Ok(done) => {
                self.live.metrics.config_reloaded.set(1);
                tracing::info!(%path, done, "configuration was read again");
            }
            // What ran goes on as it was.
            Err(error) => {
                self.live.metrics.config_reloaded.set(0);
                tracing::error!(%path, error = format!("{error:#}"), "configuration was not taken over");
            }
        }
    }

    fn try_reload(&mut self) -> anyhow::Result<String> {
        let file = F::read(&self.path)?;
        file.check()?;
        let mut done = Vec::new();
        let fresh = ClusterMaterial::load(file.keys())?;
        let renewed = self.live.material.renew(&fresh, SystemClock.now())?;
        if renewed > 0 {
            done.push(format!("{renewed} certificates"));
        }
        if file.log() != self.file.log() {
            self.log.set(file.log())?;
            done.push("log".to_owned());
        }
        if let Some(memory) = file.memory().filter(|memory| Some(*memory) != self.file.memory()) {
            // One change after the other: the last one waits until the one before it is through.
            let (budget, before) = (self.live.memory.clone(), self.resizing.take());
            self.resizing = Some(AbortOnDropHandle::new(tokio::spawn(async move {
                if let Some(before) = before {
                    let _ = before.await;
                }
                budget.resize(memory).await;
            })));
            done.push("memory".to_owned());
        }
        if !file.is_like(&self.file) {
            let path = self.path.display();
            tracing::warn!(%path, "changes of anything but log, memory and certificates count from the next start");
        }
        self.file = file;
        Ok(if done.is_empty() { "nothing changed".to_owned() } else { done.join(", ") })
    }

    /// What the files hold, as far as they can be read.
    fn fingerprint(&self) -> blake3::Hash {
        let mut files = vec![self.path.clone()];
        // What cannot be listed cannot be loaded either, and that is told then.
        let _ = find(self.file.keys(), MAX_DEPTH, &mut files);
        files.sort_unstable();
        let mut hash = blake3::Hasher::new();
        for file in files {
            let content = fs::read(&file).map_or(blake3::Hash::from([0; 32]), |bytes| blake3::hash(&bytes));
            hash.update(file.as_os_str().as_encoded_bytes()).update(content.as_bytes());
        }
        hash.finalize()
    }
}

/// The files below a directory. Names that begin with a dot are how a mounted secret is replaced, and no keys.
fn find(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || found.len() >= MAX_FILES {
            continue;
        }
        match fs::metadata(&path)? {
            metadata if metadata.is_dir() && depth > 0 => find(&path, depth - 1, found)?,
            metadata if metadata.is_file() => found.push(path),
            _ => {}
        }
    }
    Ok(())
}
