//! The keys of a cluster as they are now, and how they give way to others.
//!
//! Everything that is made anew in a rotation is in one snapshot, [`Keys`], that clones of a material share and
//! [`renew`](super::ClusterMaterial::renew) replaces as a whole. A kind of key is rotated in three steps, between which
//! every process has to take over what changed; each raises the revision by one:
//!
//! | step | the second key | what may be met then |
//! | --- | --- | --- |
//! | 1 | is made: [`Stage::Next`] | everybody knows it, nobody uses it |
//! | 2 | changes places with the first: [`Stage::Previous`] | everybody uses the new one, the old one still counts |
//! | 3 | is dropped | the old one ended |
//!
//! So a process that is one step behind, or ahead, understands all others, and is understood. Keys end by revision and
//! never by time: whatever is signed with one that ended is refused, whenever it was signed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use sluice_engine::ids::{DcId, KeyId};
use sluice_engine::keys::{ClusterTag, KeyRing, PublicKey, Purpose, SigningKey};

use super::MaterialError;
use crate::tls::Trust;
use crate::token::TokenVerifier;

/// What is made anew apart from all else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum KeyKind {
    /// With which datacenters sign commands.
    Commands,
    /// With which session services sign contexts.
    Contexts,
    /// With which tokens are minted.
    Tokens,
    /// The secret of TLS tickets.
    Tickets,
    /// The CA: its key, and all certificates.
    Ca,
}

impl KeyKind {
    /// All of them, in order.
    pub const ALL: [Self; 5] = [Self::Commands, Self::Contexts, Self::Tokens, Self::Tickets, Self::Ca];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Commands => "commands",
            Self::Contexts => "contexts",
            Self::Tokens => "tokens",
            Self::Tickets => "tickets",
            Self::Ca => "ca",
        }
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// What it is called when it is not what it was.
    const fn whose(self) -> &'static str {
        match self {
            Self::Commands => "the keys of commands",
            Self::Contexts => "the keys of contexts",
            Self::Tokens => "the key of tokens",
            Self::Tickets => "the secret of TLS tickets",
            Self::Ca => "the CA",
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where a rotation stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// The second key is known, and not used yet.
    Next,
    /// The second key was used, and still counts.
    Previous,
}

impl Stage {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Next => "next",
            Self::Previous => "previous",
        }
    }

    /// The stage with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Next, Self::Previous].into_iter().find(|stage| stage.name() == name)
    }
}

/// The key that is used, and during a rotation another that counts as well.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Pair<T> {
    pub(super) current: T,
    pub(super) other: Option<T>,
}

impl<T> Pair<T> {
    pub(super) const fn new(current: T) -> Self {
        Self { current, other: None }
    }

    /// Both, the one that is used first.
    pub(super) fn all(&self) -> impl Iterator<Item = &T> {
        [&self.current].into_iter().chain(&self.other)
    }

    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut T> {
        [&mut self.current].into_iter().chain(&mut self.other)
    }

    /// One step on from `stage`: `make` a second one, have the two change places, or drop the second.
    pub(super) fn step<E>(
        &mut self,
        stage: Option<Stage>,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<(), E> {
        match (stage, &mut self.other) {
            (None, other) => *other = Some(make()?),
            (Some(Stage::Next), Some(next)) => std::mem::swap(&mut self.current, next),
            (Some(Stage::Next), None) => {}
            (Some(Stage::Previous), other) => *other = None,
        }
        Ok(())
    }
}

/// PKCS#8 of a secret key that only its holder uses.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct PrivateKey(pub(super) Vec<u8>);

/// The public half of a signing key, and its secret half where it is kept.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct SigningMaterial {
    pub(super) id: KeyId,
    pub(super) public: [u8; 32],
    pub(super) seed: Option<[u8; 32]>,
}

/// The key of tokens, and its secret half for whoever mints them.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct TokenKey {
    pub(super) public: [u8; 32],
    pub(super) secret: Option<PrivateKey>,
}

/// A CA, and its key for whoever issues certificates.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Ca {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) key: Option<PrivateKey>,
}

/// With which a datacenter signs.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct DcKeys {
    pub(super) commands: Pair<SigningMaterial>,
    pub(super) contexts: Pair<SigningMaterial>,
}

impl DcKeys {
    fn of(&self, purpose: Purpose) -> &Pair<SigningMaterial> {
        match purpose {
            Purpose::Command => &self.commands,
            Purpose::Context => &self.contexts,
        }
    }
}

/// All keys of a revision.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct KeySet {
    /// How many steps of rotations were made.
    pub(super) revision: u64,
    /// The rotations that are under way.
    pub(super) stages: BTreeMap<KeyKind, Stage>,
    pub(super) dcs: BTreeMap<DcId, DcKeys>,
    pub(super) tokens: Pair<TokenKey>,
    pub(super) tickets: Option<Pair<[u8; 32]>>,
    pub(super) ca: Pair<Ca>,
}

impl KeySet {
    /// What is public of a kind, of every datacenter: that by which it is told apart. Of tickets the secret itself.
    fn public(&self, kind: KeyKind) -> Vec<(DcId, Vec<u8>)> {
        self.public_of(kind, 2)
    }

    /// What is used of a kind, of every datacenter.
    fn used(&self, kind: KeyKind) -> Vec<(DcId, Vec<u8>)> {
        self.public_of(kind, 1)
    }

    /// The first so many of each pair.
    fn public_of(&self, kind: KeyKind, count: usize) -> Vec<(DcId, Vec<u8>)> {
        let signing = |purpose| {
            let keys = self
                .dcs
                .iter()
                .flat_map(move |(dc, keys)| keys.of(purpose).all().take(count).map(move |key| (*dc, key)));
            keys.map(|(dc, key)| (dc, [&key.id.number().to_be_bytes()[..], &key.public].concat())).collect()
        };
        let shared = |bytes: &[u8]| (DcId::EVERY, bytes.to_vec());
        match kind {
            KeyKind::Commands => signing(Purpose::Command),
            KeyKind::Contexts => signing(Purpose::Context),
            KeyKind::Tokens => self.tokens.all().take(count).map(|key| shared(&key.public)).collect(),
            KeyKind::Tickets => {
                self.tickets.iter().flat_map(|pair| pair.all().take(count)).map(|key| shared(key)).collect()
            }
            KeyKind::Ca => self.ca.all().take(count).map(|ca| shared(&ca.certificate)).collect(),
        }
    }

    /// Whether there are two of a kind.
    fn is_double(&self, kind: KeyKind) -> bool {
        let mut dcs = self.dcs.values();
        match kind {
            KeyKind::Commands => dcs.all(|keys| keys.commands.other.is_some()),
            KeyKind::Contexts => dcs.all(|keys| keys.contexts.other.is_some()),
            KeyKind::Tokens => self.tokens.other.is_some(),
            KeyKind::Tickets => self.tickets.as_ref().is_none_or(|tickets| tickets.other.is_some()),
            KeyKind::Ca => self.ca.other.is_some(),
        }
    }

    /// Whether the next step in the rotation of a kind can be made: the key that is used after it is here, and its secret.
    pub(super) fn check_step(&self, kind: KeyKind) -> Result<(), MaterialError> {
        fn after<T>(pair: &Pair<T>, stage: Option<Stage>) -> Option<&T> {
            match stage {
                Some(Stage::Next) => pair.other.as_ref(),
                None | Some(Stage::Previous) => Some(&pair.current),
            }
        }
        let stage = self.stages.get(&kind).copied();
        let signs = |pair: &Pair<SigningMaterial>| after(pair, stage).is_some_and(|key| key.seed.is_some());
        let is_here = match kind {
            KeyKind::Commands => self.dcs.values().all(|keys| signs(&keys.commands)),
            KeyKind::Contexts => self.dcs.values().all(|keys| signs(&keys.contexts)),
            KeyKind::Tokens => after(&self.tokens, stage).is_some_and(|key| key.secret.is_some()),
            KeyKind::Tickets => self.tickets.as_ref().is_some_and(|pair| after(pair, stage).is_some()),
            KeyKind::Ca => after(&self.ca, stage).is_some_and(|ca| ca.key.is_some()),
        };
        if is_here {
            Ok(())
        } else {
            Err(MaterialError::Absent(format!("what is used next of {}", kind.whose())))
        }
    }

    /// The same without secrets of which `held` has none.
    pub(super) fn no_more_than(mut self, held: &Self) -> Self {
        for (dc, keys) in &mut self.dcs {
            let has = |purpose| {
                held.dcs.get(dc).is_some_and(|held| held.of(purpose).all().any(|key| key.seed.is_some()))
            };
            if !has(Purpose::Command) {
                keys.commands.all_mut().for_each(|key| key.seed = None);
            }
            if !has(Purpose::Context) {
                keys.contexts.all_mut().for_each(|key| key.seed = None);
            }
        }
        if held.tickets.is_none() {
            self.tickets = None;
        }
        if held.tokens.all().all(|key| key.secret.is_none()) {
            self.tokens.all_mut().for_each(|key| key.secret = None);
        }
        if held.ca.all().all(|ca| ca.key.is_none()) {
            self.ca.all_mut().for_each(|ca| ca.key = None);
        }
        self
    }

    /// Whether a process that runs with these keys can go on with `fresh`: of the same revision, with more of it at most,
    /// or of a later one, of which each kind has something in common with what is known now.
    pub(super) fn check_followed_by(&self, fresh: &Self) -> Result<(), MaterialError> {
        if fresh.revision < self.revision {
            return Err(MaterialError::Older { held: self.revision, came: fresh.revision });
        }
        let is_same = fresh.revision == self.revision;
        for kind in KeyKind::ALL {
            let (held, came) = (self.public(kind), fresh.public(kind));
            // A part of the material has no secret of tickets.
            if kind == KeyKind::Tickets && held.is_empty() {
                continue;
            }
            // Whoever says that it knows a key has it.
            let stage = fresh.stages.get(&kind).copied();
            if stage == Some(Stage::Next) && !fresh.is_double(kind) {
                return Err(MaterialError::Absent(format!("the next of {}", kind.whose())));
            }
            let goes_on = if is_same {
                came.starts_with(&held)
            } else if fresh.revision == self.revision + 1 {
                // One step on, what is used then is known now.
                fresh.used(kind).iter().all(|key| held.contains(key))
            } else {
                let is_known = |dc| came.iter().any(|key| key.0 == dc && held.contains(key));
                held.iter().all(|(dc, _)| is_known(*dc))
            };
            if !goes_on || is_same && self.stages.get(&kind) != fresh.stages.get(&kind) {
                return Err(MaterialError::Changed(kind.whose()));
            }
        }
        // Who signs with a key goes on signing.
        for (dc, keys) in &self.dcs {
            for purpose in [Purpose::Command, Purpose::Context] {
                let has = |keys: &DcKeys| keys.of(purpose).current.seed.is_some();
                if has(keys) && !fresh.dcs.get(dc).is_some_and(has) {
                    return Err(MaterialError::Absent(format!("{purpose:?} of {dc}")));
                }
            }
        }
        Ok(())
    }
}

/// All keys of a revision, ready to be used.
pub(super) struct Keys {
    pub(super) set: KeySet,
    pub(super) command_ring: Arc<KeyRing>,
    pub(super) context_ring: Arc<KeyRing>,
    pub(super) tokens: Arc<TokenVerifier>,
    pub(super) trust: Arc<Trust>,
    signing: BTreeMap<(Purpose, DcId), Arc<SigningKey>>,
}

impl Keys {
    /// The keys of the cluster with this name.
    pub(super) fn new(cluster: &str, set: KeySet) -> Result<Self, MaterialError> {
        let tag = ClusterTag::of_name(cluster);
        let mut signing = BTreeMap::new();
        for (dc, keys) in &set.dcs {
            for purpose in [Purpose::Command, Purpose::Context] {
                let key = &keys.of(purpose).current;
                let Some(seed) = &key.seed else { continue };
                let made = SigningKey::from_seed(purpose, tag, *dc, key.id, seed).map_err(|error| {
                    MaterialError::Issue { what: "a signing key", reason: error.to_string() }
                })?;
                signing.insert((purpose, *dc), Arc::new(made));
            }
        }
        let ring = |purpose| {
            let keys = set.dcs.iter().flat_map(|(dc, keys)| {
                let of_dc = keys.of(purpose).all();
                of_dc.map(|key| (key.id, PublicKey { dc: *dc, bytes: key.public }))
            });
            Arc::new(KeyRing::new(purpose, tag, keys))
        };
        let publics: Vec<[u8; 32]> = set.tokens.all().map(|key| key.public).collect();
        let cas: Vec<CertificateDer<'static>> = set.ca.all().map(|ca| ca.certificate.clone()).collect();
        let trust = Trust::new(&cas)
            .map_err(|error| MaterialError::Issue { what: "trust in the CA", reason: error.to_string() })?;
        Ok(Self {
            command_ring: ring(Purpose::Command),
            context_ring: ring(Purpose::Context),
            tokens: Arc::new(TokenVerifier::new(cluster, &publics)),
            trust: Arc::new(trust),
            signing,
            set,
        })
    }

    /// The key with which `dc` signs, if its secret half is here.
    pub(super) fn signing(&self, purpose: Purpose, dc: DcId) -> Result<Arc<SigningKey>, MaterialError> {
        let key = self.signing.get(&(purpose, dc)).cloned();
        key.ok_or_else(|| MaterialError::Absent(format!("{purpose:?} of {dc}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_goes_through_a_rotation_and_ends_with_one() {
        let mut pair = Pair::new(1);
        let mut stage = None;
        let mut seen = Vec::new();
        for after in [Some(Stage::Next), Some(Stage::Previous), None, Some(Stage::Next)] {
            pair.step(stage, || Ok::<_, ()>(seen.len() + 2)).unwrap();
            seen.push(pair.all().copied().collect::<Vec<_>>());
            stage = after;
        }
        assert_eq!(seen, [vec![1, 2], vec![2, 1], vec![2], vec![2, 5]]);
        for kind in KeyKind::ALL {
            assert_eq!(KeyKind::from_name(kind.name()), Some(kind));
        }
        for stage in [Stage::Next, Stage::Previous] {
            assert_eq!(Stage::from_name(stage.name()), Some(stage));
        }
        assert_eq!((KeyKind::from_name("x"), Stage::from_name("")), (None, None));
    }
}
