//! What who runs the cluster asks about tenants, and says of their tokens.

use async_trait::async_trait;
use sluice_engine::context::{Scope, SignedContext};
use sluice_engine::ids::{RevocationEpoch, SessionId, TenantId};
use sluice_engine::revocations::Revocation;
use sluice_proto::calls::{Tenants, Used};
use sluice_proto::http::{Revoke, RevokedTokens, TenantStatus};
use sluice_proto::problem::{Problem, Refusal};
use uuid::Uuid;

use crate::AggregatorService;

#[async_trait]
impl Tenants for AggregatorService {
    async fn revoke(&self, context: &SignedContext, revoke: Revoke) -> Result<RevokedTokens, Refusal> {
        let operator = self.parts.access.require(context, Scope::Operate)?;
        let Revoke { tenant, session, epoch } = revoke;
        if session.is_some_and(|session| session.is_nil()) {
            return Err(Refusal::new(Problem::InvalidParameter, "the nil UUID names no token"));
        }
        let epoch = match (epoch, session) {
            (Some(epoch), _) => epoch,
            (None, Some(session)) => epoch_of(session),
            // What is minted in this very millisecond counts.
            (None, None) => self.parts.clock.now().number(),
        };
        let revocation = Revocation {
            tenant: TenantId::new(tenant),
            session: session.map(SessionId::new),
            epoch: RevocationEpoch::new(epoch),
        };
        self.ledgers.revoke(revocation).await?;
        tracing::info!(tenant, ?session, epoch, by = %operator.session, "tokens are revoked");
        Ok(RevokedTokens { tenant, session, epoch, dc: self.dc_name(self.parts.dc) })
    }

    async fn tenant(&self, context: &SignedContext, tenant: TenantId) -> Result<TenantStatus, Refusal> {
        self.parts.access.require(context, Scope::Operate)?;
        let known = self.ledgers.ask(move |aggregator| {
            (aggregator.revoked().epoch_of(tenant), aggregator.revoked().sessions_of(tenant))
        });
        let (before, sessions) = known.await?;
        let Used { bytes: stored_bytes, files, .. } = self.used_by(tenant, None).await?;
        Ok(TenantStatus {
            tenant: tenant.number(),
            dc: self.dc_name(self.parts.dc),
            revoked_before: before.number(),
            revoked_sessions: sessions as u64,
            stored_bytes,
            files,
        })
    }
}

/// An epoch above that of the token with this id. A token is minted with the time that its UUIDv7 begins with as its
/// epoch, so that a later revocation of its whole tenant covers this one; of another kind of id nothing is known.
fn epoch_of(session: Uuid) -> u64 {
    match session.get_version_num() {
        7 => {
            let ms = session.as_bytes()[..6].iter().fold(0, |ms, byte| ms << 8 | u64::from(*byte));
            ms + 1
        }
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_older_than_the_epoch_at_which_it_is_revoked() {
        let session: Uuid = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
        assert_eq!(epoch_of(session), 0x0193_e4a0_7b1d);
        assert_eq!(epoch_of(Uuid::from_u128(42)), u64::MAX);
    }
}
