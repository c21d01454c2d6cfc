//! Names of things: datacenters, tenants, files, slots, keys, sessions, and the counters that order them.
//!
//! Each is its own type, so that none can be passed for another. Parsing happens here, once; afterwards the type is
//! the proof.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::limits::SLOTS;

/// A failure domain: one datacenter. `0xFFFF` is no datacenter but the address of all of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DcId(u16);

impl DcId {
    /// The address of every datacenter.
    pub const EVERY: Self = Self(0xFFFF);

    /// The id with this number.
    pub const fn new(number: u16) -> Self {
        Self(number)
    }

    /// The number of this id.
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for DcId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::EVERY { f.write_str("every dc") } else { write!(f, "dc#{}", self.0) }
    }
}

impl fmt::Debug for DcId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Who owns files. Numbers are given out by whoever issues tokens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TenantId(u64);

impl TenantId {
    /// The tenant with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number of this tenant.
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tenant#{}", self.0)
    }
}

/// Why a text is no id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected a UUID such as 0193e4a0-7b1c-7def-8123-456789abcdef, got {got:?}")]
pub struct BadId {
    /// The text that came, cut to 64 characters.
    pub got: String,
}

/// Parses any version of UUID, hyphenated or not.
fn parse_uuid(text: &str) -> Result<Uuid, BadId> {
    Uuid::try_parse(text).map_err(|_| BadId { got: text.chars().take(64).collect() })
}

/// The UUID by which a client knows its file; any version, unique only within its tenant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClientFileId(Uuid);

impl ClientFileId {
    /// Wraps a UUID.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The UUID.
    pub const fn uuid(self) -> Uuid {
        self.0
    }
}

impl fmt::Display for ClientFileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for ClientFileId {
    type Err = BadId;
    fn from_str(text: &str) -> Result<Self, BadId> {
        parse_uuid(text).map(Self)
    }
}

/// The name of a file on the wire, on disk and in keys: a UUIDv8 that only its tenant can derive, so that tenants
/// cannot collide with, block or probe one another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId([u8; 16]);

impl FileId {
    /// The context string of the derivation; changing it changes every id.
    pub const CONTEXT: &'static str = "sluice 2026-11 file id v1";

    /// The nil id, which names no file: commands that are about no file carry it.
    pub const NIL: Self = Self([0; 16]);

    /// Derives the id: the first 16 bytes of BLAKE3 `derive_key` over tenant (8 bytes, big-endian) ‖ UUID (16
    /// bytes), with the version (8) and variant bits of RFC 9562 written over them.
    pub fn derive(tenant: TenantId, client: ClientFileId) -> Self {
        let mut input = [0; 24];
        input[..8].copy_from_slice(&tenant.0.to_be_bytes());
        input[8..].copy_from_slice(client.0.as_bytes());
        let key = blake3::derive_key(Self::CONTEXT, &input);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&key[..16]);
        Self(*uuid::Builder::from_custom_bytes(bytes).as_uuid().as_bytes())
    }

    /// Wraps the bytes of an id that was derived elsewhere.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The slot that owns the file: the first 12 bits.
    pub const fn slot(self) -> Slot {
        Slot(((self.0[0] as u16) << 4) | (self.0[1] as u16 >> 4))
    }

    /// The id as a number, for ordering by prefix.
    pub const fn as_u128(self) -> u128 {
        u128::from_be_bytes(self.0)
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Uuid::from_bytes(self.0), f)
    }
}

impl fmt::Debug for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for FileId {
    type Err = BadId;
    fn from_str(text: &str) -> Result<Self, BadId> {
        parse_uuid(text).map(|uuid| Self(*uuid.as_bytes()))
    }
}

/// One of the 4,096 parts that the files of a datacenter are divided into.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(u16);

impl Slot {
    /// The slot with this number, if there is one.
    pub const fn new(number: u16) -> Option<Self> {
        if number < SLOTS { Some(Self(number)) } else { None }
    }

    /// The number, below 4,096.
    pub const fn number(self) -> u16 {
        self.0
    }
}

/// What a client logged in to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(Uuid);

impl SessionId {
    /// Wraps a UUID.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The UUID.
    pub const fn uuid(self) -> Uuid {
        self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name($inner);

        impl $name {
            /// Wraps a number.
            pub const fn new(number: $inner) -> Self {
                Self(number)
            }

            /// The number.
            pub const fn number(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

counter! {
    /// Names a signing key: never reused, bound to one datacenter and one algorithm.
    KeyId(u32)
}
counter! {
    /// How often a datacenter's process has started (or been told that it is a copy): the high half of a
    /// [`Sequence`], and of every [`Generation`] that follows a restored disk.
    Incarnation(u32)
}
counter! {
    /// Orders what a holder says it holds of one file; only the newest generation counts.
    Generation(u64)
}
counter! {
    /// Orders the claims to be a file's home. A takeover raises it.
    HomeEpoch(u8)
}
counter! {
    /// A number that a confirmation must repeat, so that an old one cannot stand for a new one.
    Nonce(u64)
}
counter! {
    /// Contexts of an epoch older than a revocation's are void.
    RevocationEpoch(u64)
}
counter! {
    /// A moment, in Unix milliseconds. The engine only ever compares moments that one clock gave.
    Timestamp(u64)
}
counter! {
    /// Rises per source datacenter and slot; the incarnation is in the high 32 bits.
    Sequence(u64)
}

impl Sequence {
    /// The `count`-th sequence number of an incarnation.
    pub const fn of(incarnation: Incarnation, count: u32) -> Self {
        Self(((incarnation.0 as u64) << 32) | count as u64)
    }

    /// The incarnation in the high half.
    pub const fn incarnation(self) -> Incarnation {
        Incarnation((self.0 >> 32) as u32)
    }
}

impl Generation {
    /// The first generation after the disk of this incarnation was found to be an older copy: above every one that
    /// an earlier incarnation can have used.
    pub const fn floor_of(incarnation: Incarnation) -> Self {
        Self((incarnation.0 as u64) << 32)
    }

    /// The next generation.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl HomeEpoch {
    /// The next epoch, unless there is none: a file whose home was taken over 255 times stays where it is.
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(epoch) => Some(Self(epoch)),
            None => None,
        }
    }
}

impl Timestamp {
    /// This moment and `ms` milliseconds.
    pub const fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds since `earlier`; zero if it lies ahead.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_id_is_a_uuid_v8_bound_to_its_tenant() {
        let client: ClientFileId = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
        let id = FileId::derive(TenantId::new(1), client);
        assert_eq!(id.to_string(), "8e415f9f-b3bf-8dfe-98f9-1e736bec61c8");
        assert_ne!(id, FileId::derive(TenantId::new(2), client));
        let uuid = Uuid::from_bytes(*id.as_bytes());
        assert_eq!(uuid.get_version_num(), 8);
        assert_eq!(uuid.get_variant(), uuid::Variant::RFC4122);
    }

    #[test]
    fn slot_is_the_first_twelve_bits() {
        let mut bytes = [0; 16];
        bytes[0] = 0xAB;
        bytes[1] = 0xCD;
        assert_eq!(FileId::from_bytes(bytes).slot().number(), 0xABC);
        assert_eq!(Slot::new(4096), None);
    }

    #[test]
    fn malformed_uuids_are_refused_with_what_came() {
        for text in ["", "x", "0193e4a0-7b1c-7def-8123-456789abcdeg", "0193e4a07b1c7def8123456789abcdef0"] {
            let error = text.parse::<ClientFileId>().unwrap_err();
            assert_eq!(error.got, text);
        }
    }

    #[test]
    fn sequence_carries_its_incarnation() {
        let sequence = Sequence::of(Incarnation::new(7), 9);
        assert_eq!(sequence.number(), 7 << 32 | 9);
        assert_eq!(sequence.incarnation(), Incarnation::new(7));
    }
}
