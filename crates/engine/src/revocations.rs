//! What has been revoked: a set of REVOKE facts, which joins like any other.
//!
//! A token and the contexts that come of it carry an epoch: the Unix milliseconds at which it was minted. A
//! revocation voids whatever is of an older epoch: all of a tenant, or one session, which is one token. Of two that
//! concern the same the higher counts, and one of a session that its tenant's covers is not kept.
//!
//! The set is bounded by [`MAX_REVOCATIONS`], since it is kept for good: a token may outlive any pause. What lies past
//! [`MAX_OWN_REVOCATIONS`] is for what others say. Whoever gets there revokes whole tenants, which takes one entry and
//! frees those of their sessions.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::command::Statement;
use crate::ids::{FileId, RevocationEpoch, SessionId, TenantId};
use crate::limits::{MAX_OWN_REVOCATIONS, MAX_REVOCATIONS};

/// One REVOKE fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revocation {
    /// Whose tokens.
    pub tenant: TenantId,
    /// Which of them; `None`: all.
    pub session: Option<SessionId>,
    /// Those of an older epoch are void.
    pub epoch: RevocationEpoch,
}

impl Revocation {
    /// What a REVOKE says.
    pub fn of(file: FileId, tenant: TenantId, epoch: RevocationEpoch) -> Self {
        let session = (file != FileId::NIL).then(|| SessionId::new(Uuid::from_bytes(*file.as_bytes())));
        Self { tenant, session, epoch }
    }

    /// What stands where other commands have a file: the session, or nil.
    pub fn subject(self) -> FileId {
        self.session.map_or(FileId::NIL, |session| FileId::from_bytes(*session.uuid().as_bytes()))
    }

    /// As it is said.
    pub const fn statement(self) -> Statement {
        Statement::Revoke { epoch: self.epoch, tenant: self.tenant }
    }

    pub(crate) const fn whose(self) -> Whose {
        (self.tenant, self.session)
    }
}

/// Whom a revocation concerns.
pub(crate) type Whose = (TenantId, Option<SessionId>);

/// What came of a revocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revoking {
    /// It says something new.
    New,
    /// All of it was known.
    Known,
    /// There is no room for it.
    Full,
}

/// Everything that has been revoked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revoked {
    tenants: BTreeMap<TenantId, RevocationEpoch>,
    sessions: BTreeMap<(TenantId, SessionId), RevocationEpoch>,
}

impl Revoked {
    /// Takes a fact.
    pub fn take(&mut self, revocation: Revocation) -> Revoking {
        let Revocation { tenant, session, epoch } = revocation;
        if epoch <= self.epoch_of(tenant)
            || self.epoch_at(revocation.whose()).is_some_and(|known| epoch <= known)
        {
            return Revoking::Known;
        }
        let freed = match session {
            Some(_) => 0,
            None => self.of_tenant(tenant).filter(|(_, of_session)| *of_session <= epoch).count(),
        };
        let grows = self.epoch_at(revocation.whose()).is_none();
        if grows && self.len() - freed >= MAX_REVOCATIONS {
            return Revoking::Full;
        }
        match session {
            Some(session) => {
                self.sessions.insert((tenant, session), epoch);
            }
            None => {
                self.tenants.insert(tenant, epoch);
                self.sessions.retain(|(of, _), of_session| *of != tenant || *of_session > epoch);
            }
        }
        Revoking::New
    }

    /// Whether this datacenter may say something new: what is left of the room is for what others say.
    pub fn has_room(&self) -> bool {
        self.len() < MAX_OWN_REVOCATIONS
    }

    /// Whether a token or context of this epoch is void.
    pub fn is_revoked(&self, tenant: TenantId, session: SessionId, epoch: RevocationEpoch) -> bool {
        epoch < self.epoch_of(tenant)
            || self.sessions.get(&(tenant, session)).is_some_and(|oldest| epoch < *oldest)
    }

    /// Those of the tenant of an older epoch are void.
    pub fn epoch_of(&self, tenant: TenantId) -> RevocationEpoch {
        self.tenants.get(&tenant).copied().unwrap_or_default()
    }

    /// Sessions of a tenant that are revoked one by one.
    pub fn sessions_of(&self, tenant: TenantId) -> usize {
        self.of_tenant(tenant).count()
    }

    /// All of it: by tenant those of sessions, after those of all tenants.
    pub fn iter(&self) -> impl Iterator<Item = Revocation> {
        let tenants = self.tenants.iter().map(|(tenant, epoch)| Revocation {
            tenant: *tenant,
            session: None,
            epoch: *epoch,
        });
        let sessions = self.sessions.iter().map(|((tenant, session), epoch)| Revocation {
            tenant: *tenant,
            session: Some(*session),
            epoch: *epoch,
        });
        tenants.chain(sessions)
    }

    /// How many facts.
    pub fn len(&self) -> usize {
        self.tenants.len() + self.sessions.len()
    }

    /// Whether nothing is revoked.
    pub fn is_empty(&self) -> bool {
        self.tenants.is_empty() && self.sessions.is_empty()
    }

    /// The fact about this, if there is one.
    pub(crate) fn about(&self, (tenant, session): Whose) -> Option<Revocation> {
        self.epoch_at((tenant, session)).map(|epoch| Revocation { tenant, session, epoch })
    }

    fn epoch_at(&self, (tenant, session): Whose) -> Option<RevocationEpoch> {
        match session {
            None => self.tenants.get(&tenant).copied(),
            Some(session) => self.sessions.get(&(tenant, session)).copied(),
        }
    }

    fn of_tenant(&self, tenant: TenantId) -> impl Iterator<Item = (SessionId, RevocationEpoch)> {
        let (first, last) = (SessionId::new(Uuid::nil()), SessionId::new(Uuid::max()));
        self.sessions.range((tenant, first)..=(tenant, last)).map(|((_, session), epoch)| (*session, *epoch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn revocation(tenant: u64, session: Option<u128>, epoch: u64) -> Revocation {
        let session = session.map(|number| SessionId::new(Uuid::from_u128(number)));
        Revocation { tenant: TenantId::new(tenant), session, epoch: RevocationEpoch::new(epoch) }
    }

    fn is_revoked(set: &Revoked, tenant: u64, session: u128, epoch: u64) -> bool {
        let session = SessionId::new(Uuid::from_u128(session));
        set.is_revoked(TenantId::new(tenant), session, RevocationEpoch::new(epoch))
    }

    #[test]
    fn older_epochs_are_void_and_a_revocation_never_falls() {
        let mut set = Revoked::default();
        assert_eq!(set.take(revocation(7, None, 5)), Revoking::New);
        assert_eq!(set.take(revocation(7, None, 4)), Revoking::Known);
        assert!(is_revoked(&set, 7, 1, 4) && !is_revoked(&set, 7, 1, 5) && !is_revoked(&set, 8, 1, 4));
        assert_eq!(set.take(revocation(7, Some(1), 9)), Revoking::New);
        assert!(is_revoked(&set, 7, 1, 8) && !is_revoked(&set, 7, 2, 8));
        assert_eq!(set.take(revocation(7, Some(2), 5)), Revoking::Known, "the tenant's covers it");
        assert_eq!(set.len(), 2);
        assert_eq!(set.take(revocation(7, None, 9)), Revoking::New);
        assert_eq!(set.iter().collect::<Vec<_>>(), [revocation(7, None, 9)]);
    }

    #[test]
    fn a_full_set_takes_what_makes_room() {
        let mut set = Revoked::default();
        for number in 1..=MAX_REVOCATIONS as u128 {
            assert_eq!(set.has_room(), set.len() < MAX_OWN_REVOCATIONS);
            assert_eq!(set.take(revocation(7, Some(number), 5)), Revoking::New);
        }
        assert_eq!(set.take(revocation(7, Some(u128::MAX), 5)), Revoking::Full);
        assert_eq!(set.take(revocation(8, None, 5)), Revoking::Full);
        assert_eq!(set.take(revocation(7, Some(1), 6)), Revoking::New, "of one that is there");
        assert_eq!(set.take(revocation(7, None, 5)), Revoking::New);
        assert_eq!(set.len(), 2);
        assert!(is_revoked(&set, 7, u128::MAX, 4));
    }

    fn any_revocation() -> impl Strategy<Value = Revocation> {
        (1u64..4, proptest::option::of(1u128..4), 0u64..6).prop_map(|(t, s, e)| revocation(t, s, e))
    }

    proptest! {
        #[test]
        fn the_order_makes_no_difference(
            facts in proptest::collection::vec(any_revocation(), 0..20),
            order: proptest::sample::Index,
        ) {
            let (mut one, mut other) = (Revoked::default(), Revoked::default());
            facts.iter().for_each(|fact| { one.take(*fact); });
            let at = order.index(facts.len().max(1));
            facts.iter().skip(at).chain(facts.iter().take(at).rev()).chain(&facts).for_each(|fact| {
                other.take(*fact);
            });
            prop_assert_eq!(&one, &other);
            for fact in facts {
                let session = fact.session.unwrap_or(SessionId::new(Uuid::from_u128(3)));
                let before = RevocationEpoch::new(fact.epoch.number().saturating_sub(1));
                prop_assert!(fact.epoch == before || one.is_revoked(fact.tenant, session, before));
            }
        }

        #[test]
        fn what_is_said_is_what_was_meant(fact in any_revocation()) {
            let Statement::Revoke { epoch, tenant } = fact.statement() else { unreachable!() };
            prop_assert_eq!(Revocation::of(fact.subject(), tenant, epoch), fact);
        }
    }
}
