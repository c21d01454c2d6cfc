//! Why Redis did not do what it was asked.

use std::time::Duration;

use redis::{ErrorKind, ServerErrorKind};

/// Why a call failed. All but [`Refused`](Self::Refused) may pass by itself.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RedisError {
    /// It lets us in under another password or user only, or lets the user do less than is needed.
    #[error("Redis at {address} refuses us: {reason}")]
    Refused {
        /// `host:port`.
        address: String,
        /// What it said.
        reason: String,
    },
    /// There is no connection to it.
    #[error("Redis at {address} cannot be reached: {reason}")]
    Unreachable {
        /// `host:port`.
        address: String,
        /// Why not.
        reason: String,
    },
    /// It takes no writes, since it follows another.
    #[error("Redis at {address} is a replica, and takes no writes")]
    Replica {
        /// `host:port`.
        address: String,
    },
    /// It did not answer in time. Whether it did what it was asked is not known.
    #[error("Redis at {address} did not answer within {} ms", patience.as_millis())]
    Slow {
        /// `host:port`.
        address: String,
        /// How long it had.
        patience: Duration,
    },
    /// It answered with an error, or with what was not asked for.
    #[error("Redis at {address} answered: {reason}")]
    Failed {
        /// `host:port`.
        address: String,
        /// What it said.
        reason: String,
    },
}

impl RedisError {
    /// The error's name in metrics.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "refused",
            Self::Unreachable { .. } => "unreachable",
            Self::Replica { .. } => "replica",
            Self::Slow { .. } => "slow",
            Self::Failed { .. } => "failed",
        }
    }

    /// Whether another connection may help.
    pub(crate) const fn ends_connection(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Unreachable { .. } | Self::Replica { .. } | Self::Slow { .. } => {
                true
            }
            Self::Failed { .. } => false,
        }
    }

    /// What the library says, in our words.
    pub(crate) fn of(address: &str, patience: Duration, error: &redis::RedisError) -> Self {
        let (address, reason) = (address.to_owned(), error.to_string());
        match (error.kind(), error.code()) {
            (ErrorKind::AuthenticationFailed, _)
            | (ErrorKind::Server(ServerErrorKind::NoPerm), _)
            | (_, Some("NOAUTH" | "WRONGPASS" | "NOPERM")) => Self::Refused { address, reason },
            (ErrorKind::Server(ServerErrorKind::ReadOnly), _) => Self::Replica { address },
            (
                ErrorKind::Server(
                    ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown | ServerErrorKind::ClusterDown,
                )
                | ErrorKind::Parse,
                _,
            ) => Self::Unreachable { address, reason },
            (ErrorKind::Io, _) if error.is_timeout() => Self::Slow { address, patience },
            (ErrorKind::Io, _) => Self::Unreachable { address, reason },
            _ => Self::Failed { address, reason },
        }
    }
}
