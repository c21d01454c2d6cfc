//! What a file was created with, for as long as its upload lasts: datacenters that lack it are told again.
//!
//! Who took the metadata may die before anybody has fetched it. The others may have heard of the file and hold chunks of
//! it, but without its record none of them can be its home, and none says what it holds. The same request makes the same
//! record wherever it is sent, so it is sent again, to all that answer.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::join_all;
use sluice_proto::http::{CreateFile, FileStatus};
use uuid::Uuid;

use crate::Client;
use crate::door::Door;
use crate::doors::First;
use crate::error::ClientError;
use crate::event::{Event, SharedObserver};
use crate::settle;

/// The metadata of a file that was created.
pub(crate) struct Creation {
    pub(crate) client: Client,
    pub(crate) id: Uuid,
    body: CreateFile,
    observer: SharedObserver,
    /// The URL that took it.
    pub(crate) url: usize,
    /// URLs that were told because they took or refused chunks of a file that they may not have heard of.
    told: Mutex<BTreeSet<usize>>,
}

impl Creation {
    /// Creates the file at the first URL that answers; where it stands then.
    pub(crate) async fn begin(
        client: &Client,
        id: Uuid,
        body: CreateFile,
        first: First,
        observer: &SharedObserver,
    ) -> Result<(Self, FileStatus), ClientError> {
        let body = Arc::new(body);
        let create = |door: Arc<Door>| {
            let body = body.clone();
            async move { door.create(id, &body).await }
        };
        let (url, (new, status)) = client.doors().anywhere(first, observer, create).await?;
        observer.observe(&Event::Created { id, url, dc: &status.dc, new });
        settle::check_alive(&status)?;
        Ok((Self::at(client, id, Arc::unwrap_or_clone(body), url, observer), status))
    }

    /// A file that is there, and was created with this at `url` or elsewhere.
    pub(crate) fn at(
        client: &Client,
        id: Uuid,
        body: CreateFile,
        url: usize,
        observer: &SharedObserver,
    ) -> Self {
        let (client, observer) = (client.clone(), observer.clone());
        Self { client, id, body, observer, url, told: Mutex::default() }
    }

    /// Makes `call` at a URL, which is told of the file first if it lacks the metadata.
    pub(crate) async fn with<T, C>(
        &self,
        door: Arc<Door>,
        call: impl Fn(Arc<Door>) -> C,
    ) -> Result<T, ClientError>
    where
        C: Future<Output = Result<T, ClientError>>,
    {
        match call(door.clone()).await {
            Err(error) if error.lacks_metadata() => {
                self.tell(&door).await?;
                call(door).await
            }
            result => result,
        }
    }

    /// A URL took chunks of a file that it has not heard of. Usually it is about to; not if whoever knows has gone.
    pub(crate) async fn unheard_of(&self, door: &Door) -> Result<(), ClientError> {
        if !self.client.doors().is_down(self.url) || !self.told().insert(door.url) {
            return Ok(());
        }
        match self.tell(door).await {
            // The next chunk that it takes like this gives another try.
            Err(error) if error.is_transient() => {
                self.told().remove(&door.url);
                Ok(())
            }
            told => told,
        }
    }

    /// A URL failed to take chunks. If it refuses them for now, its room for those of files that it has not heard of may be
    /// used up, and then it takes no more that would say so.
    pub(crate) async fn refused_by(&self, door: &Door, error: &ClientError) -> Result<(), ClientError> {
        if error.refused().is_some() { self.unheard_of(door).await } else { Ok(()) }
    }

    /// Tells one URL, then all others that are well of what that made of it.
    async fn tell(&self, door: &Door) -> Result<(), ClientError> {
        let status = self.create_at(door, &self.body).await?;
        settle::check_alive(&status)?;
        self.tell_others(door.url, &status.home).await;
        Ok(())
    }

    /// Tells all URLs that are well, but for one that knows: what they hold of the file they say once they know it.
    pub(crate) async fn tell_others(&self, knower: usize, home: &str) {
        // One home is enough.
        let body = CreateFile { home: Some(home.to_owned()), ..self.body.clone() };
        let doors = self.client.doors();
        let others = (0..doors.len()).filter(|url| *url != knower && !doors.is_down(*url));
        let told = others.map(async |url| {
            let ticket = doors.enter(url);
            match self.create_at(&ticket.door(), &body).await {
                Ok(_) => ticket.succeeded(&self.observer),
                Err(error) if error.is_transient() => ticket.failed(&error, &self.observer),
                // What it has against the file it says to whoever sends it something.
                Err(_) => ticket.succeeded(&self.observer),
            }
        });
        join_all(told).await;
    }

    async fn create_at(&self, door: &Door, body: &CreateFile) -> Result<FileStatus, ClientError> {
        let (new, status) = door.create(self.id, body).await?;
        self.observer.observe(&Event::Created { id: self.id, url: door.url, dc: &status.dc, new });
        Ok(status)
    }

    fn told(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        // Each change is whole.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
