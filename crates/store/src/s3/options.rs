//! Where a bucket is, what it is asked as, and what may be spent on it.

use std::fmt;
use std::time::Duration;

use sluice_engine::limits::{CHUNK_LEN, SEGMENT_CHUNKS};

use super::{assemble, keys};

/// The longest run, in bytes: what the budget for bodies must hold at least.
const LONGEST_RUN: u64 = 8 * CHUNK_LEN;

/// What the bucket is asked as. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct S3Credentials {
    /// The id of the access key.
    pub key_id: String,
    /// The secret.
    pub secret: String,
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("S3Credentials(..)")
    }
}

/// Where the bucket is, and what may be spent on it.
#[derive(Clone, Debug)]
pub struct S3Options {
    /// URL of the server: `https://` or, where nobody listens in, `http://`.
    pub endpoint: String,
    /// The bucket, which exists.
    pub bucket: String,
    /// Its region, as the server calls it.
    pub region: String,
    /// What every key begins with: empty, or letters, digits and `-_.` in components that each end with `/`.
    pub prefix: String,
    /// What the bucket is asked as.
    pub credentials: S3Credentials,
    /// Bytes of memory for bodies on their way: at least 8 MiB.
    pub bodies: u64,
    /// Bytes of memory for values of assembled files: 2 MiB for each 64 GiB that are read at random.
    pub values_memory: u64,
    /// Requests at once.
    pub requests: usize,
    /// How long connecting may take.
    pub connect: Duration,
    /// How long one attempt of a request may take.
    pub patience: Duration,
    /// How long one attempt to complete an upload in parts may take.
    pub long_patience: Duration,
    /// Attempts of a request.
    pub attempts: u32,
    /// The pause after the first attempt; it doubles with each.
    pub pause: Duration,
    /// The longest pause between attempts.
    pub longest_pause: Duration,
    /// How long a writer may make no progress before another that wants its chunks takes them over, and for how long runs
    /// are waited for when the store closes.
    pub stall: Duration,
    /// How long the keeper of a bucket waits to be told what became of a run that a porter puts. The porter tries for two
    /// thirds of it.
    pub porter_patience: Duration,
    /// Files that are kept in memory while nobody uses them.
    pub idle_files: usize,
    /// Chunks of a segment: each segment of a whole file is one object. A multiple of 8, at most 65,536 (64 GiB in 8,192
    /// parts), and what tests make smaller.
    pub segment_chunks: u64,
    /// How old something must be that nobody refers to before it is removed.
    pub grace: Duration,
    /// How often it is looked whether another process keeps the bucket meanwhile.
    pub look_every: Duration,
    /// How often the bucket is swept.
    pub sweep_every: Duration,
}

impl S3Options {
    /// The least memory for bodies: what one request may carry.
    pub const MIN_BODIES: u64 = LONGEST_RUN;

    /// A bucket with the usual budgets.
    pub fn new(endpoint: String, bucket: String, region: String, credentials: S3Credentials) -> Self {
        Self {
            endpoint,
            bucket,
            region,
            prefix: String::new(),
            credentials,
            bodies: 128 << 20,
            values_memory: 32 << 20,
            requests: 64,
            connect: Duration::from_secs(5),
            patience: Duration::from_secs(30),
            long_patience: Duration::from_secs(300),
            attempts: 5,
            pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(5),
            stall: Duration::from_secs(10),
            porter_patience: Duration::from_secs(90),
            idle_files: 10_000,
            segment_chunks: SEGMENT_CHUNKS,
            grace: Duration::from_secs(24 * 3600),
            look_every: Duration::from_secs(5),
            sweep_every: Duration::from_secs(6 * 3600),
        }
    }

    /// The bucket and the prefix, for people.
    pub fn place(&self) -> String {
        format!("s3://{}/{} at {}", self.bucket, self.prefix, self.endpoint)
    }

    /// Whether these make sense; if not, which does not and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let url = self.endpoint.strip_prefix("https://").or(self.endpoint.strip_prefix("http://"));
        if url.is_none_or(|host| host.is_empty() || host.starts_with('/')) {
            return Err(("endpoint", format!("{:?} is no URL of http or https", self.endpoint)));
        }
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if self.bucket.len() < 3 || self.bucket.len() > 63 || !self.bucket.bytes().all(is_plain) {
            return Err(("bucket", format!("{:?} is no name of a bucket", self.bucket)));
        }
        if self.region.is_empty() || !self.region.bytes().all(is_plain) {
            return Err(("region", format!("{:?} is no name of a region", self.region)));
        }
        let components = self.prefix.strip_suffix('/').map(|prefix| prefix.split('/'));
        let is_sound =
            |part: &str| !part.is_empty() && part.bytes().all(is_plain) && part != "." && part != "..";
        let fits = self.prefix.is_empty() || components.is_some_and(|mut all| all.all(is_sound));
        if !fits || self.prefix.len() > keys::MAX_PREFIX_LEN {
            let expected = "letters, digits and -_. in components that each end with /";
            return Err(("prefix", format!("{:?} is no prefix: expected {expected}", self.prefix)));
        }
        if self.bodies < LONGEST_RUN {
            return Err((
                "bodies",
                format!("{} bytes do not hold one request of {LONGEST_RUN}", self.bodies),
            ));
        }
        let parts = self.segment_chunks / assemble::PART_CHUNKS;
        let is_whole = self.segment_chunks.is_multiple_of(assemble::PART_CHUNKS);
        if !is_whole || parts == 0 || self.segment_chunks > SEGMENT_CHUNKS {
            return Err(("segment_chunks", format!("{} is no length of a segment", self.segment_chunks)));
        }
        Ok(())
    }
}
