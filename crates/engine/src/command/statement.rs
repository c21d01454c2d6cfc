//! What a command says, by kind. Fields a kind does not use are zero, and anything else is refused.
//!
//! | kind | | aux · home · A · B · digest |
//! | --- | --- | --- |
//! | META_REQUEST | 1 | – |
//! | META | 2 | home epoch · home · size (MAX: unknown) · tenant · metadata digest |
//! | UNKNOWN | 3 | – |
//! | HAVE | 4 | level · – · start · generation · chaining value (level 255, zero digest: nothing as of this generation) |
//! | WANT_SPANS | 5 | level · – · start · – · – |
//! | WANT_FILES | 6 | prefix bits · – · – · – · set digest (FileId holds the prefix) |
//! | ROOT | 7 | home epoch · home · size · – · root |
//! | ASSEMBLED | 8 | home epoch · home · size · nonce (0: announcement) · root |
//! | CONFIRM | 9 | – · – · – · nonce · – |
//! | DROP | 10 | reason · – · – · tenant · – |
//! | REVOKE | 11 | – · – · epoch · tenant · – (FileId holds the session, or nil) |
//! | LOAD | 12 | – · – · room · pressure · – |
//! | DRAIN | 13 | phase (0: none) · – · files left · target, and 2^16 to evacuate · – |
//! | SESSION_MOVE | 14 | phase · – · counter · counter · – (FileId holds the session) |
//! | ACK | 15 | – · – · sequence · – · BLAKE3 of the command |
//! | CONFLICT | 16 | level · home · start · – · zero: holders disagree there; else: the root that was not expected |
//!
//! CONFLICT is ours on top of the design: HAVE goes to the home alone, so only the home sees two holders disagree,
//! and without a fact to say so the others would wait for ever (see ARCHITECTURE.md).

use std::fmt;

use crate::command::CommandError;
use crate::drain::{Drain, Phase};
use crate::geometry::Geometry;
use crate::hash::{ChainingValue, RecordDigest, Root};
use crate::ids::{DcId, FileId, Generation, HomeEpoch, Nonce, RevocationEpoch, Sequence, TenantId};
use crate::limits::MAX_CHUNKS;
use crate::placement::Load;
use crate::span::{Place, Span};

const NOTHING_LEVEL: u8 = 255;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// The kind of a command.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[repr(u8)]
        pub enum Kind {
            $($(#[$doc])* $name = $number,)*
        }

        impl Kind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The name in words of the design, such as `WANT_SPANS`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            pub(super) const fn from_byte(byte: u8) -> Option<Self> {
                match byte { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    /// Who knows this file?
    MetaRequest = 1, "META_REQUEST";
    /// This file exists.
    Meta = 2, "META";
    /// I do not know it.
    Unknown = 3, "UNKNOWN";
    /// Durable here.
    Have = 4, "HAVE";
    /// Say again what you hold, finer.
    WantSpans = 5, "WANT_SPANS";
    /// Compare what we know.
    WantFiles = 6, "WANT_FILES";
    /// Complete.
    Root = 7, "ROOT";
    /// The home has it.
    Assembled = 8, "ASSEMBLED";
    /// Show that you still hold it.
    Confirm = 9, "CONFIRM";
    /// Aborted, deleted or expired.
    Drop = 10, "DROP";
    /// Contexts are void.
    Revoke = 11, "REVOKE";
    /// How loaded a datacenter is.
    Load = 12, "LOAD";
    /// A datacenter hands over its work.
    Drain = 13, "DRAIN";
    /// A session moves.
    SessionMove = 14, "SESSION_MOVE";
    /// Taken.
    Ack = 15, "ACK";
    /// Two holders disagree.
    Conflict = 16, "CONFLICT";
}

impl Kind {
    /// Whether the FileId of this kind names one file, whose slot then speaks.
    pub const fn is_about_a_file(self) -> bool {
        match self {
            Self::MetaRequest
            | Self::Meta
            | Self::Unknown
            | Self::Have
            | Self::WantSpans
            | Self::Root
            | Self::Assembled
            | Self::Confirm
            | Self::Drop
            | Self::Conflict => true,
            Self::WantFiles | Self::Revoke | Self::Load | Self::Drain | Self::SessionMove | Self::Ack => {
                false
            }
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a file is gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum DropReason {
    /// Its client gave it up before it was complete.
    Aborted = 1,
    /// Its owner deleted it.
    Deleted = 2,
    /// Its time ran out.
    Expired = 3,
}

impl DropReason {
    /// The reason with this number.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Aborted),
            2 => Some(Self::Deleted),
            3 => Some(Self::Expired),
            _ => None,
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aborted => "aborted",
            Self::Deleted => "deleted",
            Self::Expired => "expired",
        })
    }
}

/// What a command says of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statement {
    /// Who knows this file?
    MetaRequest,
    /// This file exists, and this is its home.
    Meta {
        /// How often the file was taken over before this claim.
        epoch: HomeEpoch,
        /// The home that is claimed.
        home: DcId,
        /// The shape; `None` while the size is unknown.
        size: Option<Geometry>,
        /// Who owns the file.
        tenant: TenantId,
        /// Names the metadata record.
        digest: RecordDigest,
    },
    /// I do not know it, and will tell you if I learn of it.
    Unknown,
    /// These chunks are durable here.
    Have {
        /// The holder's generation.
        generation: Generation,
        /// What is held.
        span: Span,
    },
    /// I hold nothing as of this generation.
    HaveNothing {
        /// The holder's generation.
        generation: Generation,
    },
    /// Say again what you hold under this place, one level or more finer.
    WantSpans {
        /// Under which node.
        place: Place,
    },
    /// Compare what we know of the files whose ids begin with this prefix (in the command's FileId).
    WantFiles {
        /// Length of the prefix in bits, at most 48.
        bits: u8,
        /// Digest of what the asker knows.
        digest: [u8; 32],
    },
    /// The file is complete.
    Root {
        /// The epoch of the home that says so.
        epoch: HomeEpoch,
        /// The home that says so.
        home: DcId,
        /// The shape.
        size: Geometry,
        /// The root.
        root: Root,
    },
    /// The home has the whole file.
    Assembled {
        /// The epoch of the home that says so.
        epoch: HomeEpoch,
        /// The home that says so.
        home: DcId,
        /// The shape.
        size: Geometry,
        /// Repeats a [`Statement::Confirm`]; 0 in an announcement.
        nonce: Nonce,
        /// The root.
        root: Root,
    },
    /// Show that you still hold it: I want to free mine.
    Confirm {
        /// To be repeated in the answer; not 0.
        nonce: Nonce,
    },
    /// The file is gone for good.
    Drop {
        /// Why.
        reason: DropReason,
        /// Who owned it.
        tenant: TenantId,
    },
    /// Contexts older than this epoch are void.
    Revoke {
        /// The first epoch that still counts.
        epoch: RevocationEpoch,
        /// Whose.
        tenant: TenantId,
    },
    /// How loaded a datacenter is; the newest sequence wins.
    Load(Load),
    /// Whether a datacenter hands over its work; the newest sequence wins.
    Drain {
        /// How; `None`: it does not.
        drain: Option<Drain>,
        /// Files of which something is here that is to move.
        left: u64,
    },
    /// A session moves to the destination.
    SessionMove {
        /// The phase; 0: none.
        phase: u8,
        /// Progress.
        counters: [u64; 2],
    },
    /// Durable here, or to be had again by a WANT.
    Ack {
        /// The sequence of the command.
        sequence: Sequence,
        /// BLAKE3 of the command.
        digest: [u8; 32],
    },
    /// Holders disagree about this place, or the root is not the one the client expects.
    Conflict {
        /// The home that saw it.
        home: DcId,
        /// Where; the first chunk if it is the root.
        place: Place,
        /// The root that came instead of the expected one.
        found: Option<Root>,
    },
}

/// The fields of a command that its kind gives a meaning.
#[derive(Clone, Copy)]
pub(super) struct Fields {
    pub(super) kind: Kind,
    pub(super) aux: u8,
    pub(super) home: DcId,
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) digest: [u8; 32],
}

impl Fields {
    const fn of(kind: Kind) -> Self {
        Self { kind, aux: 0, home: DcId::new(0), a: 0, b: 0, digest: [0; 32] }
    }

    /// Refuses every field that is not zero and whose name is not in `used`.
    fn only(&self, used: &[&'static str]) -> Result<(), CommandError> {
        let zero = [
            ("aux", self.aux == 0),
            ("home", self.home.number() == 0),
            ("A", self.a == 0),
            ("B", self.b == 0),
            ("digest", self.digest == [0; 32]),
        ];
        for (field, is_zero) in zero {
            if !is_zero && !used.contains(&field) {
                return Err(CommandError::Reserved { kind: self.kind, field });
            }
        }
        Ok(())
    }

    fn bad(&self, field: &'static str) -> CommandError {
        CommandError::Field { kind: self.kind, field }
    }

    fn home(&self) -> Result<DcId, CommandError> {
        if self.home == DcId::EVERY { Err(self.bad("home")) } else { Ok(self.home) }
    }
}

impl Statement {
    /// Whether it says or asks something of one file, and not of a range of them, a session or a datacenter.
    pub const fn is_about_a_file(&self) -> bool {
        match self {
            Self::MetaRequest
            | Self::Meta { .. }
            | Self::Unknown
            | Self::Have { .. }
            | Self::HaveNothing { .. }
            | Self::WantSpans { .. }
            | Self::Root { .. }
            | Self::Assembled { .. }
            | Self::Confirm { .. }
            | Self::Drop { .. }
            | Self::Conflict { .. } => true,
            Self::WantFiles { .. }
            | Self::Revoke { .. }
            | Self::Load(_)
            | Self::Drain { .. }
            | Self::SessionMove { .. }
            | Self::Ack { .. } => false,
        }
    }

    /// The kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::MetaRequest => Kind::MetaRequest,
            Self::Meta { .. } => Kind::Meta,
            Self::Unknown => Kind::Unknown,
            Self::Have { .. } | Self::HaveNothing { .. } => Kind::Have,
            Self::WantSpans { .. } => Kind::WantSpans,
            Self::WantFiles { .. } => Kind::WantFiles,
            Self::Root { .. } => Kind::Root,
            Self::Assembled { .. } => Kind::Assembled,
            Self::Confirm { .. } => Kind::Confirm,
            Self::Drop { .. } => Kind::Drop,
            Self::Revoke { .. } => Kind::Revoke,
            Self::Load(_) => Kind::Load,
            Self::Drain { .. } => Kind::Drain,
            Self::SessionMove { .. } => Kind::SessionMove,
            Self::Ack { .. } => Kind::Ack,
            Self::Conflict { .. } => Kind::Conflict,
        }
    }

    pub(super) fn fields(&self) -> Fields {
        let zero = Fields::of(self.kind());
        match *self {
            Self::MetaRequest | Self::Unknown => zero,
            Self::Meta { epoch, home, size, tenant, digest } => Fields {
                aux: epoch.number(),
                home,
                a: size.map_or(u64::MAX, Geometry::size),
                b: tenant.number(),
                digest: *digest.as_bytes(),
                ..zero
            },
            Self::Have { generation, span } => Fields {
                aux: span.place.level(),
                a: span.place.start(),
                b: generation.number(),
                digest: *span.value.as_bytes(),
                ..zero
            },
            Self::HaveNothing { generation } => Fields { aux: NOTHING_LEVEL, b: generation.number(), ..zero },
            Self::WantSpans { place } => Fields { aux: place.level(), a: place.start(), ..zero },
            Self::WantFiles { bits, digest } => Fields { aux: bits, digest, ..zero },
            Self::Root { epoch, home, size, root } => {
                Fields { aux: epoch.number(), home, a: size.size(), digest: *root.as_bytes(), ..zero }
            }
            Self::Assembled { epoch, home, size, nonce, root } => Fields {
                aux: epoch.number(),
                home,
                a: size.size(),
                b: nonce.number(),
                digest: *root.as_bytes(),
                ..zero
            },
            Self::Confirm { nonce } => Fields { b: nonce.number(), ..zero },
            Self::Drop { reason, tenant } => Fields { aux: reason as u8, b: tenant.number(), ..zero },
            Self::Revoke { epoch, tenant } => Fields { a: epoch.number(), b: tenant.number(), ..zero },
            Self::Load(Load { room, pressure }) => Fields { a: room, b: u64::from(pressure), ..zero },
            Self::Drain { drain: None, .. } => zero,
            Self::Drain { drain: Some(drain), left } => {
                Fields { aux: drain.phase as u8, a: left, b: drain.packed(), ..zero }
            }
            Self::SessionMove { phase, counters: [a, b] } => Fields { aux: phase, a, b, ..zero },
            Self::Ack { sequence, digest } => Fields { a: sequence.number(), digest, ..zero },
            Self::Conflict { home, place, found } => Fields {
                aux: place.level(),
                home,
                a: place.start(),
                digest: found.map_or([0; 32], |root| *root.as_bytes()),
                ..zero
            },
        }
    }

    pub(super) fn from_fields(fields: Fields, file: FileId) -> Result<Self, CommandError> {
        let Fields { kind, aux, a, b, digest, .. } = fields;
        let used: &[&'static str] = match kind {
            Kind::MetaRequest | Kind::Unknown => &[],
            Kind::Meta => &["aux", "home", "A", "B", "digest"],
            Kind::Have if aux == NOTHING_LEVEL => &["aux", "B"],
            Kind::Have => &["aux", "A", "B", "digest"],
            Kind::WantSpans => &["aux", "A"],
            Kind::WantFiles => &["aux", "digest"],
            Kind::Root => &["aux", "home", "A", "digest"],
            Kind::Assembled => &["aux", "home", "A", "B", "digest"],
            Kind::Confirm => &["B"],
            Kind::Drop => &["aux", "B"],
            Kind::Revoke | Kind::Load => &["A", "B"],
            Kind::Drain | Kind::SessionMove => &["aux", "A", "B"],
            Kind::Ack => &["A", "digest"],
            Kind::Conflict => &["aux", "home", "A", "digest"],
        };
        fields.only(used)?;
        Ok(match kind {
            Kind::MetaRequest => Self::MetaRequest,
            Kind::Meta => Self::Meta {
                epoch: HomeEpoch::new(aux),
                home: fields.home()?,
                size: if a == u64::MAX { None } else { Some(Geometry::new(a)?) },
                tenant: TenantId::new(b),
                digest: RecordDigest::from_bytes(digest),
            },
            Kind::Unknown => Self::Unknown,
            Kind::Have if aux == NOTHING_LEVEL => Self::HaveNothing { generation: Generation::new(b) },
            Kind::Have => Self::Have {
                generation: Generation::new(b),
                span: Span::new(Place::new(a, aux)?, ChainingValue::from_bytes(digest)),
            },
            Kind::WantSpans => Self::WantSpans { place: Place::new(a, aux)? },
            Kind::WantFiles => {
                if aux > Self::MAX_PREFIX_BITS {
                    return Err(fields.bad("aux"));
                }
                if u32::from(aux) < u128::BITS && (file.as_u128() << aux) != 0 {
                    return Err(CommandError::Reserved { kind, field: "FileId after the prefix" });
                }
                Self::WantFiles { bits: aux, digest }
            }
            Kind::Root => Self::Root {
                epoch: HomeEpoch::new(aux),
                home: fields.home()?,
                size: Geometry::new(a)?,
                root: Root::from_bytes(digest),
            },
            Kind::Assembled => Self::Assembled {
                epoch: HomeEpoch::new(aux),
                home: fields.home()?,
                size: Geometry::new(a)?,
                nonce: Nonce::new(b),
                root: Root::from_bytes(digest),
            },
            Kind::Confirm => {
                if b == 0 {
                    return Err(fields.bad("B"));
                }
                Self::Confirm { nonce: Nonce::new(b) }
            }
            Kind::Drop => Self::Drop {
                reason: DropReason::from_byte(aux).ok_or_else(|| fields.bad("aux"))?,
                tenant: TenantId::new(b),
            },
            Kind::Revoke => Self::Revoke { epoch: RevocationEpoch::new(a), tenant: TenantId::new(b) },
            Kind::Load => {
                let pressure = u16::try_from(b).map_err(|_| fields.bad("B"))?;
                Self::Load(Load { room: a, pressure })
            }
            Kind::Drain if (aux, a, b) == (0, 0, 0) => Self::Drain { drain: None, left: 0 },
            Kind::Drain => {
                let phase = Phase::from_byte(aux).ok_or_else(|| fields.bad("aux"))?;
                let drain = Drain::from_packed(phase, b).ok_or_else(|| fields.bad("B"))?;
                Self::Drain { drain: Some(drain), left: a }
            }
            Kind::SessionMove => Self::SessionMove { phase: aux, counters: [a, b] },
            Kind::Ack => Self::Ack { sequence: Sequence::new(a), digest },
            Kind::Conflict => Self::Conflict {
                home: fields.home()?,
                place: Place::new(a, aux)?,
                found: (digest != [0; 32]).then_some(Root::from_bytes(digest)),
            },
        })
    }

    /// The longest prefix of a WANT_FILES, in bits.
    pub const MAX_PREFIX_BITS: u8 = 48;
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind();
        match self {
            Self::MetaRequest | Self::Unknown => write!(f, "{kind}"),
            Self::Meta { epoch, home, size, tenant, digest } => {
                write!(f, "{kind} home {home} epoch {epoch}, ")?;
                match size {
                    Some(size) => write!(f, "{} bytes", size.size())?,
                    None => f.write_str("size unknown")?,
                }
                write!(f, ", {tenant}, record {digest}")
            }
            Self::Have { generation, span } => {
                let end = (span.place.start() + (1 << span.place.level())).min(MAX_CHUNKS) - 1;
                write!(
                    f,
                    "{kind} chunks {}..={end} (level {}), generation {generation}, value {}",
                    span.place.start(),
                    span.place.level(),
                    span.value
                )
            }
            Self::HaveNothing { generation } => write!(f, "{kind} nothing as of generation {generation}"),
            Self::WantSpans { place } => write!(f, "{kind} under {place}"),
            Self::WantFiles { bits, digest } => {
                write!(f, "{kind} prefix of {bits} bits, set {}", hex::encode(&digest[..8]))
            }
            Self::Root { epoch, home, size, root } => {
                write!(f, "{kind} {root}, {} bytes, home {home} epoch {epoch}", size.size())
            }
            Self::Assembled { epoch, home, size, nonce, root } => {
                write!(f, "{kind} {root}, {} bytes, home {home} epoch {epoch}", size.size())?;
                if nonce.number() == 0 { Ok(()) } else { write!(f, ", nonce {nonce}") }
            }
            Self::Confirm { nonce } => write!(f, "{kind} nonce {nonce}"),
            Self::Drop { reason, tenant } => write!(f, "{kind} {reason}, {tenant}"),
            Self::Revoke { epoch, tenant } => write!(f, "{kind} before epoch {epoch}, {tenant}"),
            Self::Load(Load { room, pressure }) => {
                write!(f, "{kind} at {pressure} ‰, ")?;
                match *room {
                    u64::MAX => f.write_str("room without a limit"),
                    room => write!(f, "room for {room} bytes a second"),
                }
            }
            Self::Drain { drain: None, .. } => write!(f, "{kind} none"),
            Self::Drain { drain: Some(Drain { phase, target, evacuate }), left } => {
                let how = if *evacuate { ", everything moves" } else { "" };
                write!(f, "{kind} of {phase} to {target}{how}, {left} files left")
            }
            Self::SessionMove { phase, counters: [a, b] } => write!(f, "{kind} phase {phase}: {a} {b}"),
            Self::Ack { sequence, digest } => {
                write!(f, "{kind} of sequence {}, command {}", sequence.number(), hex::encode(&digest[..8]))
            }
            Self::Conflict { home, place, found: None } => {
                write!(f, "{kind} of holders at {place}, seen by {home}")
            }
            Self::Conflict { home, found: Some(root), .. } => {
                write!(f, "{kind}: unexpected root {root}, seen by {home}")
            }
        }
    }
}
