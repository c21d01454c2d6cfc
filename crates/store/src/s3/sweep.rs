//! Finds and removes what nobody refers to: runs and objects of lives that ended, uploads that were never finished, names of
//! files that are not in lists any more.
//!
//! What a list shows is believed, what it does not show means nothing: whether a file is known is asked of its own record,
//! by key. Only what is older than the grace goes, so that nothing goes that is just being made. What a list shows of a
//! file that is known, and its entry does not have, is added to it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sluice_engine::ids::FileId;

use super::bucket::{Listed, PAGE, S3Request, add};
use super::entry::{Live, assembled_keys};
use super::keys::{self, Part};
use super::lock;
use super::pieces::Piece;
use super::shared::Shared;
use crate::StoreError;

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Objects that were looked at.
    pub seen: u64,
    /// Objects that were removed.
    pub objects: u64,
    /// Uploads that were given up.
    pub uploads: u64,
    /// Runs that are there and were not known to be.
    pub found: u64,
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
enum What {
    Of(Part),
    Names,
    Checks,
}

impl What {
    fn prefix(self) -> String {
        match self {
            Self::Of(part) => part.prefix(),
            Self::Names => "names/".to_owned(),
            Self::Checks => "check/".to_owned(),
        }
    }
}

/// What becomes of an object.
enum Fate {
    Stays,
    Goes,
    /// It is a run that was not known, and is now.
    IsNew,
    /// It is a run that is there in a later epoch.
    IsEarlier,
}

impl Shared {
    /// Looks at everything once.
    pub(crate) async fn sweep(self: &Arc<Self>) -> Result<Swept, StoreError> {
        let mut swept = Swept::default();
        for what in [
            What::Of(Part::Incoming),
            What::Of(Part::Assembled),
            What::Of(Part::Values),
            What::Of(Part::Pages),
            What::Names,
            What::Checks,
        ] {
            self.sweep_objects(what, &mut swept).await?;
        }
        self.sweep_uploads(&mut swept).await?;
        add(&self.bucket.counters.swept, swept.objects + swept.uploads);
        Ok(swept)
    }

    async fn sweep_objects(self: &Arc<Self>, what: What, swept: &mut Swept) -> Result<(), StoreError> {
        let prefix = what.prefix();
        let mut after: Option<String> = None;
        loop {
            let listed = self.bucket.list(&prefix, after.as_deref(), PAGE).await;
            let (page, more) = listed.map_err(|error| error.in_store(S3Request::List))?;
            after = page.last().map(|last| last.key.clone());
            swept.seen += page.len() as u64;
            let mut going = Vec::new();
            for object in page.into_iter().filter(|object| self.is_old(object.modified)) {
                let key = object.key.clone();
                match self.fate(what, &object).await? {
                    Fate::Stays => {}
                    Fate::Goes | Fate::IsEarlier => going.push(key),
                    Fate::IsNew => swept.found += 1,
                }
            }
            let count = going.len();
            if count > 0 {
                swept.objects += (count - self.bucket.delete(going).await.len()) as u64;
            }
            if !more || after.is_none() {
                return Ok(());
            }
        }
    }

    /// What becomes of an object that is older than the grace.
    async fn fate(&self, what: What, object: &Listed) -> Result<Fate, StoreError> {
        match what {
            What::Of(part) => {
                let Some((file, rest)) = part.parse(&object.key) else { return Ok(Fate::Stays) };
                let entry = self.entry(file).await?;
                let verdict = fate(part, file, &mut lock(&entry.live), rest, object);
                match verdict {
                    Fate::Goes => {}
                    // Its place is taken, whatever the record says.
                    Fate::IsEarlier => return Ok(Fate::Goes),
                    Fate::Stays | Fate::IsNew => return Ok(verdict),
                }
                // Memory may be behind if somebody else writes here too, which nobody should. What goes is gone.
                let (chain, state) = self.read_record(file).await?;
                Ok(fate(part, file, &mut Live::read(chain, state, Vec::new()), rest, object))
            }
            What::Names => {
                let Some((tenant, client)) = keys::parse_name(&object.key) else { return Ok(Fate::Stays) };
                let entry = self.entry(FileId::derive(tenant, client)).await?;
                let live = lock(&entry.live);
                let stays = live.state.in_lists && !live.state.dropped;
                Ok(if stays { Fate::Stays } else { Fate::Goes })
            }
            What::Checks => Ok(Fate::Goes),
        }
    }

    async fn sweep_uploads(self: &Arc<Self>, swept: &mut Swept) -> Result<(), StoreError> {
        for prefix in [Part::Assembled.prefix(), "check/".to_owned()] {
            let mut after = None;
            loop {
                let listed = self.bucket.list_uploads(&prefix, after).await;
                let (page, next) = listed.map_err(|error| error.in_store(S3Request::ListUploads))?;
                for upload in page.into_iter().filter(|upload| self.is_old(upload.begun)) {
                    if lock(&self.uploads).contains(&upload.upload) {
                        continue;
                    }
                    let aborted = self.bucket.abort_upload((&upload.key, &upload.upload)).await;
                    swept.uploads += u64::from(matches!(aborted, Ok(true)));
                }
                after = next;
                if after.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn is_old(&self, made: Option<SystemTime>) -> bool {
        let age = made.and_then(|made| SystemTime::now().duration_since(made).ok());
        age.is_some_and(|age| age >= self.options.grace)
    }

    /// Sweeps now and then, until it is dropped.
    pub(crate) async fn sweep_for_ever(self: Arc<Self>) {
        loop {
            tokio::time::sleep(jittered(self.options.sweep_every)).await;
            match self.sweep().await {
                Ok(swept) => tracing::info!(?swept, "swept the bucket"),
                Err(StoreError::Closing) => return,
                Err(error) => tracing::warn!(%error, "the bucket cannot be swept now"),
            }
        }
    }
}

/// Half of it to all of it, so that datacenters that start together do not sweep together.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

/// The same, of an object of a file.
fn fate(part: Part, file: FileId, live: &mut Live, rest: &str, object: &Listed) -> Fate {
    if live.state.dropped || !live.state.is_known() {
        return Fate::Goes;
    }
    let Some((life, name)) = keys::parse_life(rest) else { return Fate::Stays };
    let is_of_now = life == live.state.life;
    match part {
        Part::Incoming if !is_of_now => Fate::Goes,
        Part::Incoming => {
            let Some((run, values, epoch)) = keys::parse_incoming(name) else { return Fate::Stays };
            let Some(piece) = Piece::new(run, object.len, &values, epoch) else { return Fate::Stays };
            let known = live.pieces.piece(piece.name()).map(|known| known.epoch);
            // The same run is there in a later epoch.
            if known.is_some_and(|known| known > epoch) {
                return Fate::IsEarlier;
            }
            let is_known = known == Some(epoch);
            if live.state.published().is_some() && !is_known {
                return Fate::Goes;
            }
            // One that a request failed to register may be contradicted before long; it stays in doubt.
            if is_known || live.doubtful.contains_key(&piece.name()) {
                return Fate::Stays;
            }
            live.pieces.add(piece);
            Fate::IsNew
        }
        // What a life leaves behind is found when it is over: until then the same object may be made again.
        Part::Assembled | Part::Values => {
            let kept = live.state.assembled.as_ref().map(|whole| assembled_keys(file, life, whole));
            let other_root = kept.is_some_and(|kept| !kept.contains(&object.key));
            if is_of_now && !other_root { Fate::Stays } else { Fate::Goes }
        }
        Part::Pages | Part::Files => Fate::Stays,
    }
}
