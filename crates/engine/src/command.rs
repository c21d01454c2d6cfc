//! The command: one 160-byte signed message between datacenters.
//!
//! 96 bytes of body and 64 of signature, integers big-endian:
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 3 + 1 | `SLC`, version 1 |
//! | 4 | 1 | kind |
//! | 5 | 1 | aux, by kind |
//! | 6 | 2 | source DC |
//! | 8 | 2 | destination DC (0xFFFF: every DC) |
//! | 10 | 2 | home DC, by kind |
//! | 12 | 4 | key id |
//! | 16 | 16 | FileId (or session UUID) |
//! | 32 | 8 | A |
//! | 40 | 8 | B |
//! | 48 | 32 | digest |
//! | 80 | 8 | sequence |
//! | 88 | 2 | source slot |
//! | 90 | 6 | sent at, Unix ms |
//! | 96 | 64 | Ed25519 over `"sluice/command/v1\0"` ‖ cluster tag ‖ body |
//!
//! What each kind says is a [`Statement`]; its table of fields stands in `statement.rs`.

mod statement;

pub use statement::{DropReason, Kind, Statement};

use crate::geometry::GeometryError;
use crate::ids::{DcId, FileId, KeyId, Sequence, Slot, Timestamp};
use crate::keys::{KeyError, KeyRing, SIGNATURE_LEN, SigningKey};
use crate::span::PlaceError;

/// Bytes in a command.
pub const COMMAND_LEN: usize = 160;

/// Bytes of a command that are signed.
pub const BODY_LEN: usize = COMMAND_LEN - SIGNATURE_LEN;

const MAGIC: [u8; 3] = *b"SLC";
const VERSION: u8 = 1;

/// A command before it is signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Who speaks.
    pub from: DcId,
    /// To whom; [`DcId::EVERY`] for all.
    pub to: DcId,
    /// Orders what one slot of one datacenter says.
    pub sequence: Sequence,
    /// The slot that speaks.
    pub slot: Slot,
    /// When, for people and metrics; no outcome depends on it. 48 bits are sent.
    pub sent_at: Timestamp,
    /// What file or session it is about; nil for none.
    pub file: FileId,
    /// What is said of it.
    pub statement: Statement,
}

/// A command whose signature, cluster, sender and destination were verified; the only kind the ledger takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    command: Command,
    digest: [u8; 32],
}

impl Verified {
    /// The command.
    pub fn command(&self) -> &Command {
        &self.command
    }

    /// BLAKE3 of the 160 bytes: what an ACK repeats.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }
}

/// Why 160 bytes are no command for this datacenter.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommandError {
    /// Not 160 bytes.
    #[error("a command has {COMMAND_LEN} bytes, got {got}")]
    Length {
        /// Bytes that came.
        got: usize,
    },
    /// The first three bytes are wrong.
    #[error("expected the magic SLC")]
    Magic,
    /// A version this process does not speak.
    #[error("expected version {VERSION}, got {got}")]
    Version {
        /// The version that came.
        got: u8,
    },
    /// No such kind.
    #[error("no kind {got}")]
    Kind {
        /// The kind that came.
        got: u8,
    },
    /// A field that this kind does not use is not zero.
    #[error("{field} must be zero in {kind}")]
    Reserved {
        /// The kind.
        kind: Kind,
        /// The field.
        field: &'static str,
    },
    /// A field has a value that this kind does not allow.
    #[error("{field} of {kind} is out of range")]
    Field {
        /// The kind.
        kind: Kind,
        /// The field.
        field: &'static str,
    },
    /// A span that can be in no file.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A size that no file can have.
    #[error(transparent)]
    Size(#[from] GeometryError),
    /// No such slot.
    #[error("no slot {got}")]
    Slot {
        /// The slot that came.
        got: u16,
    },
    /// A slot that does not own the file.
    #[error("slot {got} does not own the file, slot {expected} does")]
    SlotOfFile {
        /// The file's slot.
        expected: u16,
        /// The slot that came.
        got: u16,
    },
    /// The key is unknown, another datacenter's, or did not sign this in this cluster.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The command says it is from here, or from everyone.
    #[error("{got} is no peer of this datacenter")]
    Sender {
        /// The sender that came.
        got: DcId,
    },
    /// The command is for another datacenter.
    #[error("the command is for {got}, this is {me}")]
    Destination {
        /// The destination that came.
        got: DcId,
        /// This datacenter.
        me: DcId,
    },
}

impl CommandError {
    /// The error's name in the protocol.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Length { .. } => "length",
            Self::Magic => "magic",
            Self::Version { .. } => "version",
            Self::Kind { .. } => "kind",
            Self::Reserved { .. } => "reserved",
            Self::Field { .. } => "field",
            Self::Place(error) => error.code(),
            Self::Size(error) => error.code(),
            Self::Slot { .. } => "slot",
            Self::SlotOfFile { .. } => "slot-of-file",
            Self::Key(error) => error.code(),
            Self::Sender { .. } => "sender",
            Self::Destination { .. } => "destination",
        }
    }
}

impl Command {
    /// The 96 bytes that are signed.
    pub fn to_body(&self, key: KeyId) -> [u8; BODY_LEN] {
        let fields = self.statement.fields();
        let mut body = [0; BODY_LEN];
        body[0..3].copy_from_slice(&MAGIC);
        body[3] = VERSION;
        body[4] = fields.kind as u8;
        body[5] = fields.aux;
        body[6..8].copy_from_slice(&self.from.number().to_be_bytes());
        body[8..10].copy_from_slice(&self.to.number().to_be_bytes());
        body[10..12].copy_from_slice(&fields.home.number().to_be_bytes());
        body[12..16].copy_from_slice(&key.number().to_be_bytes());
        body[16..32].copy_from_slice(self.file.as_bytes());
        body[32..40].copy_from_slice(&fields.a.to_be_bytes());
        body[40..48].copy_from_slice(&fields.b.to_be_bytes());
        body[48..80].copy_from_slice(&fields.digest);
        body[80..88].copy_from_slice(&self.sequence.number().to_be_bytes());
        body[88..90].copy_from_slice(&self.slot.number().to_be_bytes());
        body[90..96].copy_from_slice(&self.sent_at.number().to_be_bytes()[2..]);
        body
    }

    /// The 160 bytes.
    pub fn sign(&self, key: &SigningKey) -> [u8; COMMAND_LEN] {
        let mut bytes = [0; COMMAND_LEN];
        let body = self.to_body(key.id());
        bytes[..BODY_LEN].copy_from_slice(&body);
        bytes[BODY_LEN..].copy_from_slice(&key.sign(&body));
        bytes
    }

    /// Reads 160 bytes without asking whose they are: for people, and for what comes before [`verify`](Self::verify).
    pub fn decode(bytes: &[u8]) -> Result<(Self, KeyId), CommandError> {
        let bytes: &[u8; COMMAND_LEN] =
            bytes.try_into().map_err(|_| CommandError::Length { got: bytes.len() })?;
        if bytes[0..3] != MAGIC {
            return Err(CommandError::Magic);
        }
        if bytes[3] != VERSION {
            return Err(CommandError::Version { got: bytes[3] });
        }
        let kind = Kind::from_byte(bytes[4]).ok_or(CommandError::Kind { got: bytes[4] })?;
        let fields = statement::Fields {
            kind,
            aux: bytes[5],
            home: DcId::new(u16_at(bytes, 10)),
            a: u64_at(bytes, 32),
            b: u64_at(bytes, 40),
            digest: array_at(bytes, 48),
        };
        let file = FileId::from_bytes(array_at(bytes, 16));
        let statement = Statement::from_fields(fields, file)?;
        let slot_number = u16_at(bytes, 88);
        let slot = Slot::new(slot_number).ok_or(CommandError::Slot { got: slot_number })?;
        if kind.is_about_a_file() && slot != file.slot() {
            return Err(CommandError::SlotOfFile { expected: file.slot().number(), got: slot_number });
        }
        let mut sent_at = [0; 8];
        sent_at[2..].copy_from_slice(&bytes[90..96]);
        let command = Self {
            from: DcId::new(u16_at(bytes, 6)),
            to: DcId::new(u16_at(bytes, 8)),
            sequence: Sequence::new(u64_at(bytes, 80)),
            slot,
            sent_at: Timestamp::new(u64::from_be_bytes(sent_at)),
            file,
            statement,
        };
        Ok((command, KeyId::new(u32::from_be_bytes(array_at(bytes, 12)))))
    }

    /// Reads 160 bytes and verifies, in this order, their form, destination, sender, key and signature.
    pub fn verify(bytes: &[u8], ring: &KeyRing, me: DcId) -> Result<Verified, CommandError> {
        let (command, key) = Self::decode(bytes)?;
        if command.to != me && command.to != DcId::EVERY {
            return Err(CommandError::Destination { got: command.to, me });
        }
        if command.from == me || command.from == DcId::EVERY {
            return Err(CommandError::Sender { got: command.from });
        }
        ring.verify(key, command.from, &bytes[..BODY_LEN], &bytes[BODY_LEN..])?;
        Ok(Verified { command, digest: *blake3::hash(bytes).as_bytes() })
    }

    /// Takes a command as verified that never was on a wire: for simulations, where the network cannot forge.
    #[cfg(feature = "mutations")]
    pub fn trusted(self) -> Verified {
        let digest = *blake3::hash(&self.to_body(KeyId::new(0))).as_bytes();
        Verified { command: self, digest }
    }
}

fn array_at<const N: usize>(bytes: &[u8; COMMAND_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn u16_at(bytes: &[u8; COMMAND_LEN], at: usize) -> u16 {
    u16::from_be_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8; COMMAND_LEN], at: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, at))
}

#[cfg(test)]
mod tests;
