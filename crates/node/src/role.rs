//! What a process of a datacenter is for, and who may call it.
//!
//! A role is proven by a certificate of the cluster's CA whose one name is the role's in one datacenter
//! ([`ClusterMaterial::role_tls_name`](crate::material::ClusterMaterial::role_tls_name)). Between datacenters workers call
//! each other, to pass on what is too much, and session services, to have contexts renewed where clients move to; a
//! datacenter of one process does both as a worker. For all else the datacenters' own certificates count.

use std::fmt;
use std::str::FromStr;

/// What a process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Ends clients' channels.
    Edge,
    /// Issues session contexts.
    Session,
    /// Takes, stores and reads chunks.
    Worker,
    /// Knows who has what, and talks to other datacenters.
    Aggregator,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Edge, Self::Session, Self::Worker, Self::Aggregator];

    /// Its name, in names of files and certificates.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Session => "session",
            Self::Worker => "worker",
            Self::Aggregator => "aggregator",
        }
    }

    /// Whether a process of this role answers `caller`: edges ask sessions and workers; workers ask aggregators about files,
    /// which ask workers about the store; sessions ask workers where clients go; and porters the worker that keeps their
    /// bucket.
    pub const fn answers(self, caller: Self) -> bool {
        match self {
            Self::Edge => false,
            Self::Session => matches!(caller, Self::Edge),
            Self::Worker => true,
            Self::Aggregator => matches!(caller, Self::Worker),
        }
    }

    /// Whether a process of this role takes what `caller` in another datacenter passes on.
    pub const fn takes_from(self, caller: Self) -> bool {
        matches!((self, caller), (Self::Worker | Self::Session, Self::Worker | Self::Session))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no role.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected edge, session, worker or aggregator")]
pub struct NoRole;

impl FromStr for Role {
    type Err = NoRole;

    fn from_str(text: &str) -> Result<Self, NoRole> {
        Self::ALL.into_iter().find(|role| role.name() == text).ok_or(NoRole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_answers_only_who_has_to_ask_it() {
        let calls: Vec<(Role, Role)> = Role::ALL
            .into_iter()
            .flat_map(|caller| Role::ALL.map(|called| (caller, called)))
            .filter(|(caller, called)| called.answers(*caller))
            .collect();
        let expected = [
            (Role::Edge, Role::Session),
            (Role::Edge, Role::Worker),
            (Role::Session, Role::Worker),
            (Role::Worker, Role::Worker),
            (Role::Worker, Role::Aggregator),
            (Role::Aggregator, Role::Worker),
        ];
        assert_eq!(calls, expected);
        let passes = |role: &Role| Role::ALL.into_iter().any(|caller| role.takes_from(caller));
        assert_eq!(Role::ALL.into_iter().filter(passes).collect::<Vec<_>>(), [Role::Session, Role::Worker]);
        assert!(Role::Worker.takes_from(Role::Worker) && !Role::Worker.takes_from(Role::Edge));
        assert_eq!("worker".parse(), Ok(Role::Worker));
        assert_eq!("door".parse::<Role>(), Err(NoRole));
    }
}
