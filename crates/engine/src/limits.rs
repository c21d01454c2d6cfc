//! Every limit of the cluster that the wire or the disk depends on, in one place.
//!
//! A limit here is part of the protocol: two datacenters that disagree on one would refuse each other's facts.
//! Tunable budgets (memory, rates, timeouts) are settings, and live with the service that spends them.

/// Bytes in a full chunk: 1 MiB, which is exactly a BLAKE3 subtree of 2^10 leaves.
pub const CHUNK_LEN: u64 = 1 << 20;

/// The most bytes a file may hold: 34 PiB.
pub const MAX_FILE_LEN: u64 = 34 << 50;

/// The most chunks a file may hold: 36,507,222,016.
pub const MAX_CHUNKS: u64 = MAX_FILE_LEN / CHUNK_LEN;

/// The highest level of a span. The top node of a file of more than 2^35 chunks has level 36 and is never a span,
/// because the root is hashed differently from every other node.
pub const MAX_LEVEL: u8 = 35;

/// The most chunks one request may carry.
pub const MAX_RUN: u8 = 8;

/// log2 of the chunks in a stripe: clients and spill place data in aligned runs of 64 chunks.
pub const STRIPE_LEVEL: u8 = 6;

/// Chunks in a stripe.
pub const STRIPE_CHUNKS: u64 = 1 << STRIPE_LEVEL;

/// log2 of the chunks in a segment of 64 GiB.
pub const SEGMENT_LEVEL: u8 = 16;

/// Chunks in a segment.
pub const SEGMENT_CHUNKS: u64 = 1 << SEGMENT_LEVEL;

/// log2 of the chunks in the largest unit that is pulled, or whose chunk values are listed, in one go: 4 GiB.
pub const UNIT_LEVEL: u8 = 12;

/// Chunks in a unit.
pub const UNIT_CHUNKS: u64 = 1 << UNIT_LEVEL;

/// Number of slots, for good: the first 12 bits of a [`FileId`](crate::ids::FileId).
pub const SLOTS: u16 = 1 << 12;

/// The longest file name, in bytes of UTF-8.
pub const MAX_NAME_LEN: usize = 1024;

/// The longest content type, in bytes of ASCII.
pub const MAX_CONTENT_TYPE_LEN: usize = 255;

/// The most entries of user metadata.
pub const MAX_USER_ENTRIES: usize = 64;

/// The longest key of user metadata, in bytes.
pub const MAX_USER_KEY_LEN: usize = 128;

/// The longest value of user metadata, in bytes.
pub const MAX_USER_VALUE_LEN: usize = 2048;

/// The longest metadata record, in bytes.
pub const MAX_RECORD_LEN: usize = 16 << 10;

/// The longest expiry a file may ask for, in seconds: ten years.
pub const MAX_EXPIRY_SECS: u64 = 10 * 365 * 86_400;

/// The most revocations that a datacenter remembers, and how many there may be before it says no new ones itself: the
/// rest is for what others say. As they are stored they take a little more than 200 KiB.
pub const MAX_REVOCATIONS: usize = 6 << 10;
/// See [`MAX_REVOCATIONS`].
pub const MAX_OWN_REVOCATIONS: usize = 4 << 10;

/// The most datacenters in a cluster: what a session context and an outbox are sized for.
pub const MAX_DCS: usize = 64;

/// The longest a session context may live, in milliseconds: 5 minutes.
pub const MAX_CONTEXT_LIFE_MS: u64 = 5 * 60 * 1000;

/// How far the clocks of two datacenters may differ before contexts and tokens suffer, in milliseconds.
pub const CLOCK_TOLERANCE_MS: u64 = 60 * 1000;
