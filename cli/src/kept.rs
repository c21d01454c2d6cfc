//! Where files are kept, as the files of datacenters and workers say it.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use sluice::place::StorePlace;
use sluice_store::{S3Credentials, S3Options};

use crate::failure::Failure;

/// Where files are kept that are in no directory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Store {
    s3: Bucket,
}

impl Store {
    /// Paths in it are relative to this directory.
    pub(crate) fn relative_to(&mut self, directory: &Path) {
        self.s3.credentials = directory.join(&self.s3.credentials);
    }
}

/// A prefix of a bucket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bucket {
    endpoint: String,
    bucket: String,
    region: String,
    /// The file of the key that the bucket is asked with.
    credentials: PathBuf,
    /// What every key begins with: the datacenter's name and a slash, unless the file says.
    prefix: Option<String>,
}

/// What the file of a key says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Credentials {
    key_id: String,
    secret: String,
}

/// Where `dc` keeps its files; of so many bytes of memory for bodies a bucket gets a half beside.
pub(crate) fn place(
    data: Option<&Path>,
    store: Option<&Store>,
    dc: &str,
    memory: u64,
) -> anyhow::Result<StorePlace> {
    match (data, store) {
        (Some(data), None) => Ok(StorePlace::Directory(data.to_owned())),
        (None, Some(Store { s3 })) => Ok(StorePlace::Bucket(Box::new(bucket(s3, dc, memory)?))),
        (Some(_), Some(_)) | (None, None) => {
            let message = "expected either data or store: where the datacenter keeps its files";
            let hint =
                "data = \"a directory\", or store = { s3 = { endpoint, bucket, region, credentials } }";
            Err(Failure::usage("configuration", message, hint).into())
        }
    }
}

/// The bucket of a porter, which another worker keeps.
pub(crate) fn carried(
    data: Option<&Path>,
    store: Option<&Store>,
    dc: &str,
    memory: u64,
) -> anyhow::Result<Box<S3Options>> {
    match (data, store) {
        (None, Some(Store { s3 })) => Ok(Box::new(bucket(s3, dc, memory)?)),
        (Some(_), _) | (None, None) => {
            let message = "keeper is given, and not the bucket that it keeps";
            let hint = "store = { s3 = { .. } } as the keeper has it; a volume (data) belongs to one process";
            Err(Failure::usage("configuration", message, hint).into())
        }
    }
}

fn bucket(bucket: &Bucket, dc: &str, memory: u64) -> anyhow::Result<S3Options> {
    let Bucket { endpoint, bucket, region, credentials: path, prefix } = bucket;
    let hint = "a file with two lines: key_id = \"...\" and secret = \"...\"";
    let text = std::fs::read_to_string(path).map_err(|error| {
        let message = format!("store.s3.credentials: cannot read {}: {error}", path.display());
        Failure::usage("configuration", message, hint)
    })?;
    // What the parser says of it might show the secret.
    let Credentials { key_id, secret } = toml::from_str(&text).map_err(|_| {
        let message = format!("store.s3.credentials: {} is no file of credentials", path.display());
        Failure::usage("configuration", message, hint)
    })?;
    let credentials = S3Credentials { key_id, secret };
    let options = S3Options {
        prefix: prefix.clone().unwrap_or_else(|| format!("{dc}/")),
        bodies: (memory / 2).max(S3Options::MIN_BODIES),
        ..S3Options::new(endpoint.clone(), bucket.clone(), region.clone(), credentials)
    };
    options.check().map_err(|(key, reason)| {
        let message = format!("store.s3.{key}: {reason}");
        Failure::usage("configuration", message, "such as endpoint = \"https://s3.example:443\"")
    })?;
    Ok(options)
}
