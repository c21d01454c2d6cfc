//! A small record that is replaced as a whole, in a place where a request may land late.
//!
//! S3 orders nothing: a PUT that was given up after its time may overwrite what was put since. So a key is written again
//! only as long as every earlier PUT to it was answered. After one that was not, the next version goes to the next *link*
//! of the chain, a key of its own. Links have no gaps, and the last one has the newest version, so that reading needs no
//! list: the links are read one after the other until there is none. Nearly always there is one.

use bytes::Bytes;

use super::bucket::{Bucket, BucketError, S3Request};
use crate::StoreError;
use crate::sealed::FormatError;

/// The longest record, in bytes.
pub(crate) const MAX_RECORD: u64 = 4 << 20;

/// How far a chain has come. Whoever writes has it for itself meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    link: u32,
    version: u64,
    /// The link is there.
    exists: bool,
    /// Something else may still land there.
    doubtful: bool,
}

impl Chain {
    /// Reads the newest version, if there is one.
    pub(crate) async fn read<T>(
        bucket: &Bucket,
        key: impl Fn(u32) -> String,
        decode: impl Fn(&[u8]) -> Result<(u64, T), FormatError>,
    ) -> Result<(Self, Option<T>), StoreError> {
        let mut chain = Self::default();
        let mut newest = None;
        for link in 0.. {
            let key = key(link);
            match bucket.get(&key, MAX_RECORD).await {
                Ok(bytes) => {
                    let (version, record) = decode(&bytes)
                        .map_err(|error| StoreError::Unreadable { path: key, reason: error.to_string() })?;
                    if version >= chain.version {
                        chain.version = version;
                        newest = Some(record);
                    }
                    (chain.link, chain.exists) = (link, true);
                }
                // The first may have been deleted late, after it was written anew together with the second.
                Err(BucketError::NotFound) if link == 0 => {}
                Err(BucketError::NotFound) => break,
                Err(error) => return Err(error.in_store(S3Request::Get)),
            }
        }
        Ok((chain, newest))
    }

    /// The version of the next record: above that of every record that may ever be read.
    pub(crate) fn next_version(&self) -> u64 {
        self.version + 1
    }

    /// Makes the next version durable.
    pub(crate) async fn write(
        &mut self,
        bucket: &Bucket,
        key: impl Fn(u32) -> String,
        record: Vec<u8>,
    ) -> Result<(), StoreError> {
        let record = Bytes::from(record);
        if record.len() as u64 > MAX_RECORD {
            let (got, limit) = (record.len(), MAX_RECORD as usize);
            return Err(StoreError::TooLarge { what: "what is known of a file".into(), got, limit });
        }
        self.version += 1;
        loop {
            if self.exists && self.doubtful {
                (self.link, self.exists, self.doubtful) = (self.link + 1, false, false);
            }
            match bucket.put(&key(self.link), record.clone()).await {
                Ok(put) => {
                    self.exists = true;
                    let overtaken = self.doubtful;
                    self.doubtful |= put.may_land_again;
                    if !overtaken {
                        return Ok(());
                    }
                    // Something older may still land here: the next link is what counts.
                }
                Err(error) => {
                    self.doubtful |= matches!(error, BucketError::Unknown(_));
                    return Err(error.in_store(S3Request::Put));
                }
            }
        }
    }

    /// Deletes all links. Whether it is known that they are gone.
    pub(crate) async fn delete(&mut self, bucket: &Bucket, key: impl Fn(u32) -> String) -> bool {
        let gone = bucket.delete((0..=self.link).map(key).collect()).await.is_empty();
        if gone {
            (self.link, self.exists, self.doubtful) = (0, false, true);
        }
        gone
    }
}
