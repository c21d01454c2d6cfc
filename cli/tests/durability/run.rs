//! One run: a directory, the files that clients know of, and lives of the process one after the other.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use sluice_fault_disk::Dice;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::file::File;
use crate::process::{Dev, sound};
use crate::verify::{verify, verify_gone};
use crate::web::Web;
use crate::work::{Counts, World, work};

/// Files that are worked on at once.
const FILES: usize = 6;

/// Files that have ended and are looked at again.
const REMEMBERED: usize = 24;

/// Lines of the processes' logs that a failure shows.
const LAST_LINES: usize = 200;

/// A run.
pub(crate) struct Run {
    pub(crate) dice: Dice,
    pub(crate) home: TempDir,
    /// The directory of the process.
    pub(crate) data: PathBuf,
    runtime: Runtime,
    world: Arc<World>,
    gone: Vec<File>,
}

/// A life of the process that has begun.
pub(crate) struct Life {
    dev: Dev,
    web: Web,
}

impl Run {
    /// A run in a new directory; `data` is in it.
    pub(crate) fn new(seed: u64, data: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self {
            dice: Dice(seed),
            data: home.path().join(data),
            home,
            runtime,
            world: Arc::new(World::default()),
            gone: Vec::new(),
        }
    }

    /// What happened so far.
    pub(crate) fn counts(&self) -> Counts {
        self.world.counts()
    }

    /// Starts the process, and compares what is there with what its clients were told.
    pub(crate) fn begin(&mut self) -> Result<Life, String> {
        let dev = Dev::start(self.home.path(), &self.data)?;
        let web = Web::new(&self.data, &dev.urls);
        self.check(&web)?;
        Ok(Life { dev, web })
    }

    /// Has clients work until so many answers came, and a moment longer; then `end` ends the life as it likes. An error
    /// if anything was answered that must not be.
    pub(crate) fn live(
        &mut self,
        life: Life,
        answers: u64,
        end: impl FnOnce(&mut Dice, Dev),
    ) -> Result<(), String> {
        self.renew(FILES);
        self.world.ask_again();
        let pause = Duration::from_micros(self.dice.below(4_000));
        let workers = self.runtime.block_on(async {
            let workers = work(&self.world, &life.web, &mut self.dice, answers).await;
            // Not always in the moment after an answer.
            tokio::time::sleep(pause).await;
            workers
        });
        end(&mut self.dice, life.dev);
        self.runtime.block_on(workers.end());
        self.world.wrong.lock().unwrap().take().map_or(Ok(()), Err)
    }

    /// One more life, to its end: everything is finished, read and ended.
    pub(crate) fn finish(&mut self) -> Result<(), String> {
        let Life { dev, web } = self.begin()?;
        self.world.ask_again();
        self.runtime.block_on(async { work(&self.world, &web, &mut self.dice, u64::MAX).await.end().await });
        if let Some(wrong) = self.world.wrong.lock().unwrap().take() {
            return Err(wrong);
        }
        self.renew(0);
        assert!(self.world.files.lock().unwrap().is_empty());
        for file in &self.gone {
            self.runtime.block_on(verify_gone(&web, file))?;
        }
        assert_eq!(dev.stop(), Some(0), "in order");
        self.sound()
    }

    /// The last that the processes said, for whoever has to find out what went wrong.
    pub(crate) fn said(&self) -> String {
        let log = std::fs::read_to_string(self.home.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }

    /// Has the volumes checked, between two lives.
    pub(crate) fn sound(&self) -> Result<(), String> {
        sound(self.home.path(), &self.data)
    }

    /// Checks every file against what is known of it.
    fn check(&mut self, web: &Web) -> Result<(), String> {
        let files = std::mem::take(&mut *self.world.files.lock().unwrap());
        let looks: Vec<_> = files.iter().map(|file| (file, self.dice.one_in(2))).collect();
        let some: Vec<&File> = self.gone.iter().filter(|_| self.dice.one_in(4)).collect();
        let looks = looks.into_iter().chain(some.into_iter().map(|file| (file, false)));
        let checks = stream::iter(looks).map(|(file, read)| verify(web, file, read)).buffer_unordered(4);
        let result = self.runtime.block_on(checks.try_collect::<()>());
        *self.world.files.lock().unwrap() = files;
        result
    }

    /// Puts new files in the place of those with which nothing is left to do.
    fn renew(&mut self, files: usize) {
        let mut all = self.world.files.lock().unwrap();
        let (done, mut left): (Vec<File>, Vec<File>) = all.drain(..).partition(File::is_done);
        self.gone.extend(done);
        let forgotten = self.gone.len().saturating_sub(REMEMBERED);
        self.gone.drain(..forgotten);
        while left.len() < files {
            left.push(File::new(&mut self.dice));
        }
        *all = left;
    }
}
