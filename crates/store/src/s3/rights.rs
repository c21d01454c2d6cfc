//! Does everything once that the store will need to do, so that a right that is missing is named at the start.

use bytes::Bytes;

use super::S3Options;
use super::bucket::{Bucket, BucketError, S3Request};
use crate::StoreError;

/// Checks that the bucket can be used.
pub(crate) async fn check(bucket: &Bucket, options: &S3Options) -> Result<(), StoreError> {
    let key = format!("check/{:032x}", rand::random::<u128>());
    let of = |kind: S3Request| move |error: BucketError| named(options, kind, error);
    let _ = bucket.put(&key, Bytes::from_static(b"check")).await.map_err(of(S3Request::Put))?;
    let rest = async {
        bucket.get(&key, 5).await.map_err(of(S3Request::Get))?;
        bucket.list("check/", None, 1).await.map_err(of(S3Request::List))?;
        let upload = bucket.create_upload(&key).await.map_err(of(S3Request::CreateUpload))?;
        match bucket.copy_part((&key, &upload), 1, &key, 0..5).await {
            // Too short to be copied is no matter of rights.
            Ok(_) | Err(BucketError::Refused(_)) => {}
            Err(error) => return Err(of(S3Request::CopyPart)(error)),
        }
        bucket.list_uploads("check/", None).await.map_err(of(S3Request::ListUploads))?;
        bucket.abort_upload((&key, &upload)).await.map_err(of(S3Request::AbortUpload))?;
        Ok(())
    };
    let rest = rest.await;
    let deleted = bucket.delete_page(std::slice::from_ref(&key)).await.map_err(of(S3Request::Delete));
    rest?;
    match deleted?.pop() {
        None => Ok(()),
        Some((_, code)) => Err(of(S3Request::Delete)(BucketError::Denied(code))),
    }
}

/// What a failure at the start says to whoever set it up.
pub(crate) fn named(options: &S3Options, kind: S3Request, error: BucketError) -> StoreError {
    let place = options.place();
    match error {
        BucketError::Denied(reason) => StoreError::NoRight { right: kind.right().into(), place, reason },
        BucketError::NoBucket => {
            StoreError::Unreadable { path: place, reason: "there is no such bucket".into() }
        }
        BucketError::Closing => StoreError::Closing,
        BucketError::NotFound | BucketError::Refused(_) | BucketError::Unknown(_) => {
            StoreError::Unreachable { reason: format!("{place}: {}: {error}", kind.name()) }
        }
    }
}
