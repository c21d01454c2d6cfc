//! Requests to the bucket: each with a timeout, a bounded number of attempts with jitter between them, and counted.
//!
//! What matters about a request that failed is whether it may still take effect. An attempt whose answer did not come may
//! have been done, and may yet be done much later: that is [`BucketError::Unknown`], and [`Put::may_land_again`] where a
//! later attempt succeeded. The client library's own attempts are switched off, because they hide the difference.
//!
//! Nothing here runs by itself. [`Bucket::kill`] ends waiting, and lets no request begin any more.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier};
use aws_smithy_http_client::{Builder, tls};
use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::S3Options;
use crate::StoreError;

/// The most keys in one page of a list, and in one request that deletes.
pub(crate) const PAGE: usize = 1000;

/// Connections that are kept open while nothing happens.
const IDLE_CONNECTIONS: usize = 32;

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum S3Request {
    /// PutObject.
    Put,
    /// GetObject.
    Get,
    /// HeadObject.
    Head,
    /// ListObjectsV2.
    List,
    /// DeleteObjects.
    Delete,
    /// CreateMultipartUpload.
    CreateUpload,
    /// UploadPart.
    UploadPart,
    /// UploadPartCopy.
    CopyPart,
    /// CompleteMultipartUpload.
    CompleteUpload,
    /// AbortMultipartUpload.
    AbortUpload,
    /// ListMultipartUploads.
    ListUploads,
}

impl S3Request {
    /// All kinds.
    pub const ALL: [Self; 11] = [
        Self::Put,
        Self::Get,
        Self::Head,
        Self::List,
        Self::Delete,
        Self::CreateUpload,
        Self::UploadPart,
        Self::CopyPart,
        Self::CompleteUpload,
        Self::AbortUpload,
        Self::ListUploads,
    ];

    /// What S3 calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Put => "PutObject",
            Self::Get => "GetObject",
            Self::Head => "HeadObject",
            Self::List => "ListObjectsV2",
            Self::Delete => "DeleteObjects",
            Self::CreateUpload => "CreateMultipartUpload",
            Self::UploadPart => "UploadPart",
            Self::CopyPart => "UploadPartCopy",
            Self::CompleteUpload => "CompleteMultipartUpload",
            Self::AbortUpload => "AbortMultipartUpload",
            Self::ListUploads => "ListMultipartUploads",
        }
    }

    /// Whether it changes nothing.
    fn asks(self) -> bool {
        match self {
            Self::Get | Self::Head | Self::List | Self::ListUploads => true,
            Self::Put
            | Self::Delete
            | Self::CreateUpload
            | Self::UploadPart
            | Self::CopyPart
            | Self::CompleteUpload
            | Self::AbortUpload => false,
        }
    }

    /// The right that it needs, as policies call it.
    pub(crate) fn right(self) -> &'static str {
        match self {
            Self::Put | Self::CreateUpload | Self::UploadPart | Self::CopyPart | Self::CompleteUpload => {
                "s3:PutObject"
            }
            Self::Get | Self::Head => "s3:GetObject",
            Self::List => "s3:ListBucket",
            Self::Delete => "s3:DeleteObject",
            Self::AbortUpload => "s3:AbortMultipartUpload",
            Self::ListUploads => "s3:ListBucketMultipartUploads",
        }
    }
}

/// Counters of a bucket since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct S3Metrics {
    requests: [u64; S3Request::ALL.len()],
    /// Attempts after the first.
    pub retries: u64,
    /// Times that the server asked to be spared (503 SlowDown).
    pub slow_downs: u64,
    /// Requests of which it is not known whether they took effect.
    pub unknown: u64,
    /// Bytes sent in bodies.
    pub bytes_sent: u64,
    /// Bytes received in bodies.
    pub bytes_received: u64,
    /// Objects and uploads that nobody referred to, and that were removed.
    pub swept: u64,
    /// Times that bytes did not match their value, or objects contradicted each other.
    pub integrity_failures: u64,
}

impl S3Metrics {
    /// Attempts of one kind.
    pub fn requests(&self, kind: S3Request) -> u64 {
        self.requests[kind as usize]
    }

    /// Attempts of all kinds.
    pub fn all_requests(&self) -> u64 {
        self.requests.iter().sum()
    }
}

/// The same, while they count.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    requests: [AtomicU64; S3Request::ALL.len()],
    retries: AtomicU64,
    slow_downs: AtomicU64,
    unknown: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    pub(crate) swept: AtomicU64,
    pub(crate) integrity_failures: AtomicU64,
}

impl Counters {
    pub(crate) fn read(&self) -> S3Metrics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        S3Metrics {
            requests: S3Request::ALL.map(|kind| read(&self.requests[kind as usize])),
            retries: read(&self.retries),
            slow_downs: read(&self.slow_downs),
            unknown: read(&self.unknown),
            bytes_sent: read(&self.bytes_sent),
            bytes_received: read(&self.bytes_received),
            swept: read(&self.swept),
            integrity_failures: read(&self.integrity_failures),
        }
    }
}

/// Counts.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Why a request failed, after all its attempts.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum BucketError {
    /// There is no such object, or it has no such bytes.
    #[error("no such object")]
    NotFound,
    /// There is no such bucket.
    #[error("there is no such bucket")]
    NoBucket,
    /// The credentials do not allow it.
    #[error("not allowed: {0}")]
    Denied(String),
    /// The server says that it did not do it; or what was asked is not known, and nothing took effect.
    #[error("{0}")]
    Refused(String),
    /// Whether it was done, or is done later, is not known.
    #[error("{0}")]
    Unknown(String),
    /// The store is closing, and nothing was sent.
    #[error("the store is closing")]
    Closing,
}

impl BucketError {
    /// As an error of the store.
    pub(crate) fn in_store(&self, kind: S3Request) -> StoreError {
        match self {
            Self::Closing => StoreError::Closing,
            Self::NotFound | Self::NoBucket | Self::Denied(_) | Self::Refused(_) | Self::Unknown(_) => {
                StoreError::Io { operation: kind.name().into(), reason: self.to_string() }
            }
        }
    }
}

/// An object that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Put {
    /// An earlier attempt, whose answer did not come, may put the same bytes again, at any time.
    pub(crate) may_land_again: bool,
}

/// An object in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its key, without the prefix.
    pub(crate) key: String,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// When it was made, as the server tells.
    pub(crate) modified: Option<SystemTime>,
}

/// An unfinished upload in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unfinished {
    /// The key that it would become, without the prefix.
    pub(crate) key: String,
    /// Which.
    pub(crate) upload: String,
    /// When it began, as the server tells.
    pub(crate) begun: Option<SystemTime>,
}

/// A bucket, and a prefix in it.
pub(crate) struct Bucket {
    client: Client,
    bucket: String,
    prefix: String,
    options: S3Options,
    slots: Semaphore,
    /// Closed when no request may begin any more.
    alive: Semaphore,
    pub(crate) counters: Counters,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bucket({}/{})", self.bucket, self.prefix)
    }
}

type Answer<T, E> = Result<T, SdkError<E, aws_sdk_s3::config::http::HttpResponse>>;

/// What one attempt came to.
enum Attempt {
    NotFound,
    NoBucket,
    Denied(String),
    /// Not done. Whether another attempt makes sense.
    Refused(String, bool),
    Unknown(String),
}

fn attempt<E: ProvideErrorMetadata + fmt::Debug>(
    error: SdkError<E, aws_sdk_s3::config::http::HttpResponse>,
) -> Attempt {
    match error {
        SdkError::ConstructionFailure(failure) => Attempt::Refused(format!("{failure:?}"), false),
        SdkError::TimeoutError(_) => Attempt::Unknown("no answer in time".into()),
        SdkError::DispatchFailure(failure) => {
            let mut reason = String::from("the connection failed");
            let mut source = failure.as_connector_error().map(|error| error as &dyn std::error::Error);
            while let Some(error) = source {
                reason = error.to_string();
                source = error.source();
            }
            Attempt::Unknown(reason)
        }
        SdkError::ResponseError(_) => Attempt::Unknown("the answer was cut or garbled".into()),
        SdkError::ServiceError(service) => {
            let status = service.raw().status().as_u16();
            let meta = service.err().meta();
            let code = meta.code().unwrap_or("without a code").to_owned();
            let said = format!("{status} {code}: {}", meta.message().unwrap_or("no message"));
            match (status, code.as_str()) {
                (_, "NoSuchBucket") => Attempt::NoBucket,
                // 416: the bytes that were asked for are past its end.
                (404 | 416, _) | (_, "NoSuchKey") => Attempt::NotFound,
                (401 | 403, _) => Attempt::Denied(said),
                (429 | 503, _) | (_, "SlowDown") => Attempt::Refused(said, true),
                (400..=499, _) => Attempt::Refused(said, false),
                // 500, and 200 with an error inside: it may have been done.
                (_, _) => Attempt::Unknown(said),
            }
        }
        _ => Attempt::Unknown("the client failed in a way that is not known".into()),
    }
}

impl Bucket {
    /// A client of a bucket. Nothing is sent yet.
    pub(crate) fn new(options: S3Options) -> Self {
        let http = Builder::new()
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc))
            .build_https();
        let credentials = Credentials::new(
            options.credentials.key_id.clone(),
            options.credentials.secret.clone(),
            None,
            None,
            "sluice",
        );
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(options.region.clone()))
            .endpoint_url(options.endpoint.clone())
            .credentials_provider(credentials)
            .force_path_style(true)
            .http_client(http)
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::builder().connect_timeout(options.connect).build())
            // The signature covers the body already, and what is read is hashed.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .build();
        Self {
            client: Client::from_conf(config),
            bucket: options.bucket.clone(),
            prefix: options.prefix.clone(),
            slots: Semaphore::new(options.requests),
            alive: Semaphore::new(0),
            counters: Counters::default(),
            options,
        }
    }

    /// Lets no request begin any more.
    pub(crate) fn kill(&self) {
        self.alive.close();
    }

    /// Whether requests may begin.
    pub(crate) fn is_alive(&self) -> bool {
        !self.alive.is_closed()
    }

    /// Waits until no request may begin any more.
    pub(crate) async fn killed(&self) {
        // Nobody ever adds a permit: it ends with the semaphore.
        let _ = self.alive.acquire().await;
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Sends until it succeeds, is refused for good, or there were enough attempts. Whether an earlier attempt may still
    /// take effect comes with the answer.
    async fn send<T, E, F>(
        &self,
        kind: S3Request,
        patience: Duration,
        mut request: impl FnMut() -> F,
    ) -> Result<(T, bool), BucketError>
    where
        F: Future<Output = Answer<T, E>> + Send,
        E: ProvideErrorMetadata + fmt::Debug,
    {
        // What only asks takes no effect.
        let asks = kind.asks();
        let mut earlier: Option<String> = None;
        let mut pause = self.options.pause;
        for left in (0..self.options.attempts.max(1)).rev() {
            if !self.is_alive() {
                return Err(earlier.map_or(BucketError::Closing, BucketError::Unknown));
            }
            let outcome = {
                let Ok(_slot) = self.slots.acquire().await else { return Err(BucketError::Closing) };
                add(&self.counters.requests[kind as usize], 1);
                // The client's futures are as large as they are deep.
                let request: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(request());
                tokio::select! {
                    outcome = timeout(patience, request) => outcome,
                    () = self.killed() => return Err(BucketError::Unknown("the store was stopped".into())),
                }
            };
            let said = match outcome {
                Ok(Ok(answer)) => return Ok((answer, earlier.is_some())),
                Ok(Err(error)) => attempt(error),
                Err(_) => Attempt::Unknown(format!("no answer within {patience:?}")),
            };
            let (reason, again) = match said {
                Attempt::NotFound if earlier.is_none() => return Err(BucketError::NotFound),
                Attempt::NotFound => ("no such object".to_owned(), false),
                Attempt::NoBucket => return Err(BucketError::NoBucket),
                Attempt::Denied(reason) if earlier.is_none() => return Err(BucketError::Denied(reason)),
                Attempt::Denied(reason) => (reason, false),
                Attempt::Refused(reason, again) => {
                    if again {
                        add(&self.counters.slow_downs, 1);
                    }
                    (reason, again)
                }
                Attempt::Unknown(reason) => {
                    earlier = Some(reason.clone()).filter(|_| !asks);
                    (reason, true)
                }
            };
            if left == 0 || !again {
                if asks {
                    return Err(BucketError::Refused(reason));
                }
                if earlier.is_some() {
                    add(&self.counters.unknown, 1);
                    return Err(BucketError::Unknown(reason));
                }
                return Err(BucketError::Refused(reason));
            }
            add(&self.counters.retries, 1);
            tracing::debug!(request = kind.name(), %reason, "a request is sent again");
            let jittered = pause.mul_f64(0.5 + rand::random::<f64>() / 2.0);
            tokio::select! {
                () = tokio::time::sleep(jittered) => {}
                () = self.killed() => {}
            }
            pause = (pause * 2).min(self.options.longest_pause);
        }
        Err(BucketError::Closing)
    }

    /// Puts an object. Once this returns it is durable.
    pub(crate) async fn put(&self, key: &str, bytes: Bytes) -> Result<Put, BucketError> {
        add(&self.counters.bytes_sent, bytes.len() as u64);
        let (_, may_land_again) = self
            .send(S3Request::Put, self.options.patience, || {
                let body = ByteStream::from(bytes.clone());
                self.client.put_object().bucket(&self.bucket).key(self.key(key)).body(body).send()
            })
            .await?;
        Ok(Put { may_land_again })
    }

    /// The bytes of an object, at most `most` of them: more are refused.
    pub(crate) async fn get(&self, key: &str, most: u64) -> Result<Bytes, BucketError> {
        self.get_part(key, None, most).await
    }

    /// Some of the bytes of an object.
    pub(crate) async fn get_range(
        &self,
        key: &str,
        range: std::ops::Range<u64>,
    ) -> Result<Bytes, BucketError> {
        let most = range.end - range.start;
        self.get_part(key, Some(range), most).await
    }

    async fn get_part(
        &self,
        key: &str,
        range: Option<std::ops::Range<u64>>,
        most: u64,
    ) -> Result<Bytes, BucketError> {
        let header = range.map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let (body, _) = self
            .send(S3Request::Get, self.options.patience, || async {
                let answer = self
                    .client
                    .get_object()
                    .bucket(&self.bucket)
                    .key(self.key(key))
                    .set_range(header.clone())
                    .send()
                    .await?;
                // Nobody says that the server keeps to what was asked.
                if answer
                    .content_length()
                    .is_some_and(|len| u64::try_from(len).map_or(true, |len| len > most))
                {
                    return Ok(None);
                }
                let body = answer.body.collect().await;
                body.map(|body| Some(body.into_bytes())).map_err(SdkError::construction_cut)
            })
            .await?;
        let body = body.filter(|body| body.len() as u64 <= most);
        let body = body.ok_or_else(|| BucketError::Refused(format!("more than {most} bytes came")))?;
        add(&self.counters.bytes_received, body.len() as u64);
        Ok(body)
    }

    /// The length of an object.
    pub(crate) async fn head(&self, key: &str) -> Result<u64, BucketError> {
        let (answer, _) = self
            .send(S3Request::Head, self.options.patience, || {
                self.client.head_object().bucket(&self.bucket).key(self.key(key)).send()
            })
            .await?;
        Ok(answer.content_length().and_then(|len| u64::try_from(len).ok()).unwrap_or(0))
    }

    /// Up to `limit` objects whose keys begin with `prefix`, in order of their keys, after `after`; and whether there are
    /// more. Says what is there, and nothing about what is not.
    pub(crate) async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<Listed>, bool), BucketError> {
        let (answer, _) = self
            .send(S3Request::List, self.options.patience, || {
                self.client
                    .list_objects_v2()
                    .bucket(&self.bucket)
                    .prefix(self.key(prefix))
                    .set_start_after(after.map(|after| self.key(after)))
                    .max_keys(limit.min(PAGE) as i32)
                    .send()
            })
            .await?;
        let listed = answer.contents().iter().filter_map(|object| {
            Some(Listed {
                key: object.key()?.strip_prefix(&self.prefix)?.to_owned(),
                len: u64::try_from(object.size()?).ok()?,
                modified: object.last_modified().and_then(|at| SystemTime::try_from(*at).ok()),
            })
        });
        Ok((listed.collect(), answer.is_truncated().unwrap_or(false)))
    }

    /// Deletes objects, a page at a time; those that are gone already count as deleted. Returns those of which it is not
    /// known that they are gone.
    pub(crate) async fn delete(&self, keys: Vec<String>) -> Vec<String> {
        let mut left = Vec::new();
        for keys in keys.chunks(PAGE) {
            match self.delete_page(keys).await {
                Ok(refused) => left.extend(refused.into_iter().map(|(key, _)| key)),
                Err(error) => {
                    tracing::warn!(%error, objects = keys.len(), "objects cannot be deleted now");
                    left.extend_from_slice(keys);
                }
            }
        }
        left
    }

    /// Deletes up to a page of objects, and returns those that the server did not delete, each with why.
    pub(crate) async fn delete_page(&self, keys: &[String]) -> Result<Vec<(String, String)>, BucketError> {
        let ids = keys.iter().map(|key| ObjectIdentifier::builder().key(self.key(key)).build());
        let ids = ids.collect::<Result<Vec<_>, _>>();
        let delete = ids.and_then(|ids| Delete::builder().set_objects(Some(ids)).quiet(true).build());
        let delete = delete.map_err(|error| BucketError::Refused(error.to_string()))?;
        let (answer, _) = self
            .send(S3Request::Delete, self.options.patience, || {
                self.client.delete_objects().bucket(&self.bucket).delete(delete.clone()).send()
            })
            .await?;
        let failed = answer.errors().iter().filter(|error| error.code() != Some("NoSuchKey"));
        let named = failed.filter_map(|error| {
            let key = error.key()?.strip_prefix(&self.prefix)?.to_owned();
            Some((key, error.code().unwrap_or("without a code").to_owned()))
        });
        Ok(named.collect())
    }

    /// Begins an upload in parts.
    pub(crate) async fn create_upload(&self, key: &str) -> Result<String, BucketError> {
        let (answer, _) = self
            .send(S3Request::CreateUpload, self.options.patience, || {
                self.client.create_multipart_upload().bucket(&self.bucket).key(self.key(key)).send()
            })
            .await?;
        let upload = answer.upload_id().map(str::to_owned);
        upload.ok_or_else(|| BucketError::Refused("the upload that was begun has no id".into()))
    }

    /// Uploads a part.
    pub(crate) async fn upload_part(
        &self,
        (key, upload): (&str, &str),
        number: i32,
        bytes: Bytes,
    ) -> Result<CompletedPart, BucketError> {
        add(&self.counters.bytes_sent, bytes.len() as u64);
        let (answer, _) = self
            .send(S3Request::UploadPart, self.options.patience, || {
                self.client
                    .upload_part()
                    .bucket(&self.bucket)
                    .key(self.key(key))
                    .upload_id(upload)
                    .part_number(number)
                    .body(ByteStream::from(bytes.clone()))
                    .send()
            })
            .await?;
        Ok(CompletedPart::builder().part_number(number).set_e_tag(answer.e_tag().map(str::to_owned)).build())
    }

    /// Copies a part from another object, on the server.
    pub(crate) async fn copy_part(
        &self,
        (key, upload): (&str, &str),
        number: i32,
        source: &str,
        range: std::ops::Range<u64>,
    ) -> Result<CompletedPart, BucketError> {
        // Prefixes need no escape (they are checked), and neither do keys.
        let source = format!("{}/{}", self.bucket, self.key(source));
        let (answer, _) = self
            .send(S3Request::CopyPart, self.options.patience, || {
                self.client
                    .upload_part_copy()
                    .bucket(&self.bucket)
                    .key(self.key(key))
                    .upload_id(upload)
                    .part_number(number)
                    .copy_source(&source)
                    .copy_source_range(format!("bytes={}-{}", range.start, range.end - 1))
                    .send()
            })
            .await?;
        let tag = answer.copy_part_result().and_then(|part| part.e_tag()).map(str::to_owned);
        Ok(CompletedPart::builder().part_number(number).set_e_tag(tag).build())
    }

    /// Ends an upload in parts, which becomes an object.
    pub(crate) async fn complete_upload(
        &self,
        (key, upload): (&str, &str),
        parts: Vec<CompletedPart>,
    ) -> Result<(), BucketError> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        self.send(S3Request::CompleteUpload, self.options.long_patience, || {
            self.client
                .complete_multipart_upload()
                .bucket(&self.bucket)
                .key(self.key(key))
                .upload_id(upload)
                .multipart_upload(parts.clone())
                .send()
        })
        .await?;
        Ok(())
    }

    /// Gives an upload up. Whether it was there: one that was completed or given up is not.
    pub(crate) async fn abort_upload(&self, (key, upload): (&str, &str)) -> Result<bool, BucketError> {
        let aborted = self
            .send(S3Request::AbortUpload, self.options.patience, || {
                self.client
                    .abort_multipart_upload()
                    .bucket(&self.bucket)
                    .key(self.key(key))
                    .upload_id(upload)
                    .send()
            })
            .await;
        match aborted {
            Ok(_) => Ok(true),
            Err(BucketError::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A page of the uploads that were not finished, from where the last page ended.
    pub(crate) async fn list_uploads(
        &self,
        prefix: &str,
        after: Option<(String, String)>,
    ) -> Result<(Vec<Unfinished>, Option<(String, String)>), BucketError> {
        let (key_marker, upload_marker) = after.unzip();
        let (answer, _) = self
            .send(S3Request::ListUploads, self.options.patience, || {
                self.client
                    .list_multipart_uploads()
                    .bucket(&self.bucket)
                    .prefix(self.key(prefix))
                    .set_key_marker(key_marker.clone())
                    .set_upload_id_marker(upload_marker.clone())
                    .max_uploads(PAGE as i32)
                    .send()
            })
            .await?;
        let uploads = answer.uploads().iter().filter_map(|upload| {
            Some(Unfinished {
                key: upload.key()?.strip_prefix(&self.prefix)?.to_owned(),
                upload: upload.upload_id()?.to_owned(),
                begun: upload.initiated().and_then(|at| SystemTime::try_from(*at).ok()),
            })
        });
        let next = answer.next_key_marker().zip(answer.next_upload_id_marker());
        let next = next.filter(|_| answer.is_truncated() == Some(true));
        Ok((uploads.collect(), next.map(|(key, upload)| (key.to_owned(), upload.to_owned()))))
    }
}

/// Bytes of a body that stopped coming.
trait Cut {
    fn construction_cut(error: aws_sdk_s3::primitives::ByteStreamError) -> Self;
}

impl<E> Cut for SdkError<E, aws_sdk_s3::config::http::HttpResponse> {
    fn construction_cut(error: aws_sdk_s3::primitives::ByteStreamError) -> Self {
        Self::timeout_error(error)
    }
}

/// A bucket that many use.
pub(crate) type SharedBucket = Arc<Bucket>;
