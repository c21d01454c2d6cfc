//! Facts: what can be known of a file, and who may state it.

use crate::command::{DropReason, Statement};
use crate::geometry::Geometry;
use crate::hash::{RecordDigest, Root};
use crate::ids::{DcId, Generation, HomeEpoch, TenantId};
use crate::span::{Place, PlaceError, Span};

/// A claim to be a file's home. The highest wins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Claim {
    /// Raised by a takeover.
    pub epoch: HomeEpoch,
    /// Who is the home.
    pub home: DcId,
}

/// One thing that is known of a file. Every fact but the local expectation travels as a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The file exists.
    Meta {
        /// Who is its home.
        claim: Claim,
        /// Its shape; `None` while the size is unknown.
        size: Option<Geometry>,
        /// Who owns it.
        tenant: TenantId,
        /// Names the metadata record.
        digest: RecordDigest,
    },
    /// A holder has these chunks.
    Have {
        /// Who.
        holder: DcId,
        /// As of when.
        generation: Generation,
        /// Which.
        span: Span,
    },
    /// A holder has nothing but what it says under this generation.
    HaveNothing {
        /// Who.
        holder: DcId,
        /// As of when.
        generation: Generation,
    },
    /// The file is complete.
    Root {
        /// Its shape.
        size: Geometry,
        /// Its root.
        root: Root,
    },
    /// A home has the whole file.
    Assembled {
        /// The claim under which it assembled it.
        claim: Claim,
        /// The file's shape.
        size: Geometry,
        /// Its root.
        root: Root,
    },
    /// Holders disagree, or the root is not the expected one.
    Conflict(Disagreement),
    /// The file is gone.
    Drop {
        /// Why.
        reason: DropReason,
        /// Who owned it.
        tenant: TenantId,
    },
}

/// What a home found to contradict.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Disagreement {
    /// Where holders disagree.
    pub place: Place,
    /// The root that came instead of the expected one.
    pub found: Option<Root>,
    /// Who found it.
    pub home: DcId,
}

impl Fact {
    /// The fact that a command states, if its kind states one; `Err` if the sender may not state it.
    pub fn of(from: DcId, statement: &Statement) -> Result<Option<Self>, FactError> {
        Ok(Some(match *statement {
            Statement::Meta { epoch, home, size, tenant, digest } => {
                Self::Meta { claim: Claim { epoch, home }, size, tenant, digest }
            }
            Statement::Have { generation, span } => Self::Have { holder: from, generation, span },
            Statement::HaveNothing { generation } => Self::HaveNothing { holder: from, generation },
            Statement::Root { size, root, .. } => Self::Root { size, root },
            Statement::Assembled { epoch, home, size, root, .. } => {
                if home != from {
                    return Err(FactError::NotTheHolder { from, home });
                }
                Self::Assembled { claim: Claim { epoch, home }, size, root }
            }
            Statement::Drop { reason, tenant } => Self::Drop { reason, tenant },
            Statement::Conflict { home, place, found } => Self::Conflict(Disagreement { place, found, home }),
            Statement::MetaRequest
            | Statement::Unknown
            | Statement::WantSpans { .. }
            | Statement::WantFiles { .. }
            | Statement::Confirm { .. }
            | Statement::Revoke { .. }
            | Statement::Load(_)
            | Statement::Drain { .. }
            | Statement::SessionMove { .. }
            | Statement::Ack { .. } => return Ok(None),
        }))
    }
}

/// Why a fact is refused for good.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum FactError {
    /// The span does not fit the file.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Only the holder says that it has assembled a file.
    #[error("{from} says that {home} assembled the file; only the holder may")]
    NotTheHolder {
        /// Who spoke.
        from: DcId,
        /// Of whom.
        home: DcId,
    },
}

/// What taking a fact changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The ledger knows more now.
    New,
    /// It was known, or made void by something newer.
    Known,
    /// The ledger cannot use it before it knows the file's shape: say it again later.
    NotYet,
}
