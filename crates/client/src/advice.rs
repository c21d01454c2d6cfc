//! What to do about an error: try again, change something, or stop; and how a process ends.

use std::io;
use std::time::Duration;

use sluice_proto::problem::Problem;

use crate::error::ClientError;
use crate::refused::Refused;

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// The same call may succeed later, or elsewhere.
    Retry,
    /// The call, its input or its configuration must change.
    Fix,
    /// Neither helps: someone has to look.
    Stop,
}

/// How a process should end: its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitClass {
    /// Something failed that should not.
    Unexpected = 1,
    /// The call makes no sense as it is.
    Usage = 2,
    /// No such file.
    NotFound = 3,
    /// The token does not allow it.
    NotAllowed = 4,
    /// Bytes, values or facts contradict one another.
    Integrity = 5,
    /// It may work later.
    TryLater = 6,
}

impl ExitClass {
    /// The exit code.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

impl ClientError {
    /// Whether trying again, changing something, or neither helps.
    pub fn advice(&self) -> Advice {
        match self {
            Self::Refused(refused) => match refused.status {
                408 | 429 | 503 => Advice::Retry,
                500.. => Advice::Stop,
                _ => match refused.problem {
                    Some(Problem::Incomplete) => Advice::Retry,
                    Some(Problem::ChunkConflict | Problem::Conflict) => Advice::Stop,
                    Some(_) | None => Advice::Fix,
                },
            },
            Self::Unreachable { .. }
            | Self::GaveUp { .. }
            | Self::Unsettled { .. }
            | Self::Incomplete { .. }
            | Self::Busy { .. } => Advice::Retry,
            Self::Config(_)
            | Self::Untrusted { .. }
            | Self::SentAway { .. }
            | Self::ExpectedRoot { .. }
            | Self::Dropped { .. }
            | Self::SizeDiffers { .. }
            | Self::Source { .. }
            | Self::Input { .. }
            | Self::SourceChanged { .. }
            | Self::ChangedSince { .. }
            | Self::Target { .. }
            | Self::NotAFile { .. }
            | Self::Exists { .. }
            | Self::Range { .. }
            | Self::Geometry(_)
            | Self::Hash(_) => Advice::Fix,
            Self::Malformed { .. }
            | Self::RootMismatch { .. }
            | Self::Content { .. }
            | Self::Proof { .. }
            | Self::Conflict { .. }
            | Self::Task { .. } => Advice::Stop,
        }
    }

    /// How a process that fails with this should end.
    pub fn exit_class(&self) -> ExitClass {
        match self {
            Self::Refused(refused) => refused_exit(refused),
            Self::Unreachable { .. }
            | Self::GaveUp { .. }
            | Self::Unsettled { .. }
            | Self::Incomplete { .. }
            | Self::Busy { .. } => ExitClass::TryLater,
            Self::Config(_)
            | Self::Untrusted { .. }
            | Self::SentAway { .. }
            | Self::NotAFile { .. }
            | Self::Exists { .. }
            | Self::Range { .. }
            | Self::Geometry(_)
            | Self::Hash(_) => ExitClass::Usage,
            Self::Source { cause, .. }
                if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) =>
            {
                ExitClass::Usage
            }
            Self::Dropped { .. } => ExitClass::NotFound,
            Self::RootMismatch { .. }
            | Self::ExpectedRoot { .. }
            | Self::Content { .. }
            | Self::Proof { .. }
            | Self::Conflict { .. }
            | Self::SizeDiffers { .. }
            | Self::SourceChanged { .. }
            | Self::ChangedSince { .. } => ExitClass::Integrity,
            Self::Malformed { .. }
            | Self::Source { .. }
            | Self::Input { .. }
            | Self::Target { .. }
            | Self::Task { .. } => ExitClass::Unexpected,
        }
    }

    /// Whether the same request may succeed at once at another datacenter, or here later.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. }) || self.is_push_back()
    }

    /// Whether a datacenter has too much to do, or cannot tell now.
    pub(crate) fn is_push_back(&self) -> bool {
        matches!(self, Self::Refused(refused) if matches!(refused.status, 408 | 429 | 503))
    }

    /// Whether a datacenter that answers cannot find something out, for want of another.
    pub(crate) fn is_unavailable(&self) -> bool {
        matches!(self, Self::Refused(refused) if refused.problem == Some(Problem::Unavailable))
    }

    /// Whether a datacenter that answers lacks the metadata of the file, for want of another.
    pub(crate) fn lacks_metadata(&self) -> bool {
        matches!(self, Self::Refused(refused) if refused.problem == Some(Problem::NoMetadata))
    }

    /// Whether a datacenter says that it knows no such file.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(refused) if refused.problem == Some(Problem::NotFound))
    }

    /// Whether what a datacenter sent does not hash to what it must.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::Content { .. } | Self::Proof { .. })
    }

    /// How long the server asks to be left alone.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        self.refused()?.retry_after
    }
}

fn refused_exit(refused: &Refused) -> ExitClass {
    match refused.problem {
        Some(
            Problem::ChunkConflict
            | Problem::Conflict
            | Problem::MetadataConflict
            | Problem::SizeConflict
            | Problem::ChunkValue,
        ) => {
            return ExitClass::Integrity;
        }
        Some(Problem::Incomplete) => return ExitClass::TryLater,
        // Like a quota, it is for somebody else to lift.
        Some(Problem::RevocationsFull) => return ExitClass::NotAllowed,
        Some(_) | None => {}
    }
    match refused.status {
        401 | 403 => ExitClass::NotAllowed,
        404 | 410 => ExitClass::NotFound,
        408 | 429 | 503 => ExitClass::TryLater,
        409 | 422 => ExitClass::Integrity,
        300..500 => ExitClass::Usage,
        _ => ExitClass::Unexpected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refused::Operation;

    fn refused(problem: Problem) -> ClientError {
        ClientError::Refused(Box::new(Refused {
            dc: "dc-a".into(),
            operation: Operation::Chunks { start: 17, count: 1 },
            code: problem.code().into(),
            problem: Some(problem),
            status: problem.status(),
            detail: "length 1048575, expected 1048576".into(),
            hint: None,
            trace: None,
            retry_after: None,
        }))
    }

    #[test]
    fn a_refusal_names_who_what_and_why() {
        let error = refused(Problem::ChunkLength);
        assert_eq!(error.to_string(), "dc-a refused chunk 17: length 1048575, expected 1048576");
        assert_eq!(error.code(), "chunk-length");
        assert_eq!(error.dc(), Some("dc-a"));
    }

    #[test]
    fn every_problem_has_its_exit_class() {
        for problem in Problem::ALL {
            let error = refused(*problem);
            assert_eq!(error.is_transient(), problem.is_retryable(), "{problem}");
            let expected = match problem {
                Problem::Internal => ExitClass::Unexpected,
                Problem::NotFound | Problem::NoRoute | Problem::Dropped => ExitClass::NotFound,
                Problem::Unauthenticated
                | Problem::InvalidToken
                | Problem::ExpiredToken
                | Problem::RevokedToken
                | Problem::Forbidden
                | Problem::Quota
                | Problem::RevocationsFull => ExitClass::NotAllowed,
                Problem::ChunkConflict
                | Problem::Conflict
                | Problem::MetadataConflict
                | Problem::SizeConflict
                | Problem::SizeOpen
                | Problem::ChunkValue => ExitClass::Integrity,
                Problem::Incomplete => ExitClass::TryLater,
                other if other.is_retryable() => ExitClass::TryLater,
                _ => ExitClass::Usage,
            };
            assert_eq!(error.exit_class(), expected, "{problem}");
        }
    }

    #[test]
    fn giving_up_keeps_the_last_words() {
        let error = ClientError::GaveUp {
            after: Duration::from_secs(9),
            last: Box::new(refused(Problem::VolumeFull)),
        };
        assert_eq!((error.code(), error.exit_class()), ("volume-full", ExitClass::TryLater));
    }
}
