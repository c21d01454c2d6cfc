//! The S3 backend on a real server.

use std::sync::Arc;
use std::time::Duration;

use sluice_fault_s3::{Garage, Key};
use sluice_store::{ChunkStore, S3Credentials, S3Options, S3Store};

use crate::contract::{Backend, contract_tests};

/// A bucket of a server, with what tests want of it.
pub(crate) fn options(endpoint: String, garage: &Garage, key: &Key) -> S3Options {
    let credentials = S3Credentials { key_id: key.id.clone(), secret: key.secret.clone() };
    S3Options {
        prefix: "dc-a/".into(),
        // Two parts: tests see files of several segments.
        segment_chunks: 16,
        pause: Duration::from_millis(5),
        longest_pause: Duration::from_millis(50),
        // Tests count requests.
        look_every: Duration::from_secs(3600),
        ..S3Options::new(endpoint, garage.bucket().into(), garage.region().into(), credentials)
    }
}

struct Bucket(Garage);

impl Backend for Bucket {
    async fn open(&self) -> Arc<dyn ChunkStore> {
        let Self(garage) = self;
        Arc::new(S3Store::open(options(garage.endpoint(), garage, garage.key())).await.unwrap())
    }
}

contract_tests!(match Garage::start() {
    Some(garage) => Bucket(garage),
    None => return,
});
