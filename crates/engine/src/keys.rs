//! Ed25519 keys: who may sign what, and as which datacenter.
//!
//! A key is bound to one datacenter, and a [`KeyRing`] to one purpose; the purpose's domain string and the cluster
//! tag are signed with every message, so that no signature can be carried from one purpose or cluster to another.

use std::collections::BTreeMap;
use std::fmt;

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use crate::ids::{DcId, KeyId};

/// Bytes in a signature.
pub const SIGNATURE_LEN: usize = 64;

/// Tells clusters apart: 32 bytes that are signed and never sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ClusterTag([u8; 32]);

impl ClusterTag {
    /// The tag of the cluster with this name.
    pub fn of_name(name: &str) -> Self {
        Self(blake3::derive_key("sluice 2026-11 cluster tag v1", name.as_bytes()))
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for ClusterTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterTag({})", hex::encode(&self.0[..4]))
    }
}

/// What a key is used for, and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Purpose {
    /// Commands between datacenters.
    Command,
    /// Session contexts.
    Context,
}

impl Purpose {
    const fn domain(self) -> &'static [u8] {
        match self {
            Self::Command => b"sluice/command/v1\0",
            Self::Context => b"sluice/context/v1\0",
        }
    }

    fn message(self, cluster: &ClusterTag, body: &[u8]) -> Vec<u8> {
        [self.domain(), cluster.as_bytes(), body].concat()
    }
}

/// A public key, and whose it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PublicKey {
    /// The datacenter it is bound to.
    pub dc: DcId,
    /// The 32 bytes of the key.
    pub bytes: [u8; 32],
}

/// Why a seed is no key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not an Ed25519 seed of 32 bytes")]
pub struct BadSeed;

/// A secret key of one datacenter for one purpose.
pub struct SigningKey {
    purpose: Purpose,
    cluster: ClusterTag,
    dc: DcId,
    id: KeyId,
    pair: Ed25519KeyPair,
}

impl SigningKey {
    /// The key that 32 random bytes stand for.
    pub fn from_seed(
        purpose: Purpose,
        cluster: ClusterTag,
        dc: DcId,
        id: KeyId,
        seed: &[u8],
    ) -> Result<Self, BadSeed> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| BadSeed)?;
        Ok(Self { purpose, cluster, dc, id, pair })
    }

    /// The datacenter the key is bound to.
    pub fn dc(&self) -> DcId {
        self.dc
    }

    /// The key's id.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey { dc: self.dc, bytes }
    }

    /// Signs a body. Ed25519 is deterministic: the same body gives the same signature.
    pub fn sign(&self, body: &[u8]) -> [u8; SIGNATURE_LEN] {
        let mut signature = [0; SIGNATURE_LEN];
        signature.copy_from_slice(self.pair.sign(&self.purpose.message(&self.cluster, body)).as_ref());
        signature
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({:?}, {}, key {})", self.purpose, self.dc, self.id)
    }
}

/// Why a signature does not count.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// The key is not (or no longer, or not yet) in the ring. It may come with a later configuration.
    #[error("key {0} is not known here")]
    Unknown(KeyId),
    /// The key speaks for another datacenter.
    #[error("key {key} belongs to {owner}, not to {claimed}")]
    WrongDc {
        /// The key.
        key: KeyId,
        /// Whom it belongs to.
        owner: DcId,
        /// Who the message says it is from.
        claimed: DcId,
    },
    /// The signature is not that of this body in this cluster.
    #[error("the signature does not hold")]
    Signature,
}

impl KeyError {
    /// The error's name in the protocol.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "key-unknown",
            Self::WrongDc { .. } => "key-owner",
            Self::Signature => "signature",
        }
    }
}

/// The public keys that are good for one purpose.
#[derive(Clone, Debug)]
pub struct KeyRing {
    purpose: Purpose,
    cluster: ClusterTag,
    keys: BTreeMap<KeyId, PublicKey>,
}

impl KeyRing {
    /// A ring of these keys.
    pub fn new(
        purpose: Purpose,
        cluster: ClusterTag,
        keys: impl IntoIterator<Item = (KeyId, PublicKey)>,
    ) -> Self {
        Self { purpose, cluster, keys: keys.into_iter().collect() }
    }

    /// Checks that `key` is known, speaks for `dc`, and signed `body`.
    pub fn verify(&self, key: KeyId, dc: DcId, body: &[u8], signature: &[u8]) -> Result<(), KeyError> {
        let public = self.keys.get(&key).ok_or(KeyError::Unknown(key))?;
        if public.dc != dc {
            return Err(KeyError::WrongDc { key, owner: public.dc, claimed: dc });
        }
        UnparsedPublicKey::new(&ED25519, &public.bytes)
            .verify(&self.purpose.message(&self.cluster, body), signature)
            .map_err(|_| KeyError::Signature)
    }
}
