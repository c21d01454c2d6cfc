//! Why a request is refused: one list for every door.
//!
//! The code of a problem (`chunk-length`) is the last part of the RFC 9457 `type`, the word in brackets of the CLI's
//! error line, and the reason in a gRPC status.

use std::fmt;
use std::time::Duration;

macro_rules! problems {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $status:literal, $title:literal;)*) => {
        /// The kind of a problem.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Problem {
            $($(#[$doc])* $name,)*
        }

        impl Problem {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The word that names it on every wire.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// Its HTTP status.
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }

            /// What it is, in a few words that are always the same.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }
        }
    };
}

problems! {
    /// Another datacenter takes it; said only to clients that go where they are sent.
    Elsewhere = "elsewhere", 307, "Another datacenter takes it";
    /// The id is no UUID.
    InvalidId = "invalid-id", 400, "The file id is not a UUID";
    /// The metadata is malformed or over a limit.
    InvalidMetadata = "invalid-metadata", 400, "The metadata is not acceptable";
    /// A parameter or header is malformed.
    InvalidParameter = "invalid-parameter", 400, "A parameter is not acceptable";
    /// The chunk lies past the end of the file.
    ChunkIndex = "chunk-index", 400, "The file has no such chunk";
    /// The body does not have the length of the chunks.
    ChunkLength = "chunk-length", 400, "The body has the wrong length";
    /// Not 1, 2, 4 or 8 aligned chunks.
    ChunkAlignment = "chunk-alignment", 400, "A request carries 1, 2, 4 or 8 aligned chunks";
    /// The stream ended before the declared length.
    Truncated = "truncated", 400, "The body ended early";
    /// More was sent than the receiver had granted.
    CreditExceeded = "credit-exceeded", 400, "More was sent than was granted";
    /// No token.
    Unauthenticated = "unauthenticated", 401, "A bearer token is needed";
    /// A token that does not count.
    InvalidToken = "invalid-token", 401, "The token is not valid here";
    /// A token or context past its end.
    ExpiredToken = "expired-token", 401, "The token has expired";
    /// A revoked token or session.
    RevokedToken = "revoked-token", 401, "The token was revoked";
    /// The session may not do this.
    Forbidden = "forbidden", 403, "The session may not do this";
    /// The tenant's quota is used up.
    Quota = "quota", 403, "The quota is used up";
    /// No such file, or another tenant's.
    NotFound = "not-found", 404, "No such file";
    /// No such path.
    NoRoute = "no-route", 404, "No such path";
    /// The path does not take this method.
    Method = "method", 405, "The path does not take this method";
    /// The client took too long.
    Timeout = "timeout", 408, "The request took too long to arrive";
    /// Another metadata record stands.
    MetadataConflict = "metadata-conflict", 409, "The file has other metadata";
    /// Another size stands, or chunks lie past it.
    SizeConflict = "size-conflict", 409, "The size contradicts what is known of the file";
    /// A short chunk of a file whose size is not known here.
    SizeOpen = "size-open", 409, "The size of the file is not settled yet";
    /// The chunk is stored with other bytes.
    ChunkConflict = "chunk-conflict", 409, "The chunk is stored with other bytes";
    /// The file is in conflict.
    Conflict = "conflict", 409, "Contradicting facts exist about the file";
    /// The file is not complete.
    Incomplete = "incomplete", 409, "The file is not complete yet";
    /// The file was deleted, aborted, or expired.
    Dropped = "dropped", 410, "The file is gone";
    /// A length must be declared.
    LengthRequired = "length-required", 411, "Content-Length is needed";
    /// A condition of the request does not hold.
    Precondition = "precondition", 412, "A condition of the request does not hold";
    /// The body or the file is too large.
    TooLarge = "too-large", 413, "Too large";
    /// The content is encoded in a way that is not taken.
    Encoding = "encoding", 415, "The content encoding is not taken";
    /// The range lies outside the file.
    Range = "range", 416, "The range lies outside the file";
    /// The bytes do not have the announced value.
    ChunkValue = "chunk-value", 422, "The bytes do not have the announced value";
    /// Too many requests, or too many provisional chunks.
    RateLimited = "rate-limited", 429, "Too many requests";
    /// More tokens are revoked one by one than a datacenter remembers.
    RevocationsFull = "revocations-full", 409, "Too many tokens are revoked one by one";
    /// A bug or an unexpected failure.
    Internal = "internal", 500, "Something failed that should not";
    /// A datacenter that must be asked cannot be reached, or state is not known yet.
    Unavailable = "unavailable", 503, "It cannot be found out now";
    /// The metadata of the file is not here, nor at anybody who can be asked.
    NoMetadata = "no-metadata", 503, "The file's metadata is not here";
    /// No room in memory or in a queue.
    Overloaded = "overloaded", 503, "The datacenter is at its limit";
    /// The volume is full.
    VolumeFull = "volume-full", 503, "The volume is full";
    /// The volume refuses writes.
    ReadOnly = "read-only", 503, "The volume is read-only";
    /// The process is stopping.
    Stopping = "stopping", 503, "The process is stopping";
}

impl Problem {
    /// The kind with this code.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|problem| problem.code() == code)
    }

    /// Whether the same request may succeed later.
    pub const fn is_retryable(self) -> bool {
        matches!(self.status(), 408 | 429 | 503)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// A request that was refused: what was expected, what came, and what to do.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail} ({problem})")]
pub struct Refusal {
    /// The kind.
    pub problem: Problem,
    /// What was expected and what came.
    pub detail: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// When to come back.
    pub retry_after: Option<Duration>,
    /// Where else to go: the URL of a datacenter, of [`Problem::Elsewhere`].
    pub to: Option<String>,
}

impl Refusal {
    /// A refusal of this kind.
    pub fn new(problem: Problem, detail: impl Into<String>) -> Self {
        let retry_after = problem.is_retryable().then_some(Duration::from_secs(1));
        Self { problem, detail: detail.into(), hint: None, retry_after, to: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Says when to come back.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Sends a client to the datacenter at `url`.
    pub fn elsewhere(detail: impl Into<String>, url: impl Into<String>) -> Self {
        Self { to: Some(url.into()), ..Self::new(Problem::Elsewhere, detail) }
    }

    /// The one answer for a file that does not exist and for another tenant's.
    pub fn not_found() -> Self {
        Self::new(Problem::NotFound, "no such file")
            .hint("create it with POST /v1/files, or check the id and the tenant of the token")
    }
}
