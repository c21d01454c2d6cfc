//! Upload of a small file in one request: metadata and bytes together, assembled when it is answered.

use std::sync::Arc;

use sluice_engine::geometry::Geometry;
use sluice_engine::hash::Root;
use sluice_proto::http::{FileStatus, State};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::Client;
use crate::door::Door;
use crate::doors::First;
use crate::error::ClientError;
use crate::event::{Event, SharedObserver};
use crate::settle;
use crate::source::{BufferPool, Source};
use crate::upload::{UploadOptions, Uploaded};

impl Client {
    /// Uploads a file of at most one chunk of which nothing is known yet. Returns `None` if it is not as far then as is
    /// wanted, because something of it had come before: it goes on like any other file.
    pub(crate) async fn upload_whole(
        &self,
        id: Uuid,
        file: Geometry,
        source: &Source,
        options: &UploadOptions,
        observer: &SharedObserver,
    ) -> Result<Option<Uploaded>, ClientError> {
        let (reader, size) = (source.clone(), file.size());
        let read = spawn_blocking(move || {
            let bytes = reader.read(0, size as usize, &Arc::<BufferPool>::default())?;
            reader.check_unchanged()?;
            Ok::<_, ClientError>((Root::of_bytes(&bytes), bytes))
        });
        let (root, bytes) = read.await.map_err(|error| ClientError::Task { cause: error.to_string() })??;
        if let Some(expected) = options.expected_root.filter(|expected| *expected != root) {
            return Err(ClientError::ExpectedRoot { expected, got: root });
        }
        let chunks = file.chunks();
        observer.observe(&Event::Planned { chunks, bytes: size, held: 0 });
        let body = Arc::new(options.create_file(id, Some(size)));
        let create = |door: Arc<Door>| {
            let (body, bytes) = (body.clone(), bytes.clone());
            async move { door.create_whole(id, &body, bytes).await }
        };
        let (url, (new, status)) = self.doors().anywhere(First::Configured, observer, create).await?;
        let FileStatus { dc, state, .. } = &status;
        observer.observe(&Event::Created { id, url, dc, new });
        settle::check_alive(&status)?;
        let far_enough = *state >= options.wait.state().unwrap_or(State::Complete);
        if !far_enough || status.root.as_deref() != Some(&root.to_string()) {
            return Ok(None);
        }
        if new && chunks > 0 {
            let provisional = false;
            observer.observe(&Event::Acknowledged {
                url,
                dc,
                start: 0,
                count: chunks,
                bytes: size,
                provisional,
            });
        } else if chunks > 0 {
            observer.observe(&Event::Skipped { start: 0, count: chunks, bytes: size });
        }
        Ok(Some(Uploaded {
            id,
            size,
            root,
            state: *state,
            chunks_sent: if new { chunks } else { 0 },
            chunks_skipped: if new { 0 } else { chunks },
            home: status.home,
        }))
    }
}
