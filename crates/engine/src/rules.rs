//! The safety rules that the simulation must be able to catch the breach of.
//!
//! In production all of them are in force, and nothing can switch one off. Tests can (feature `mutations`), to prove
//! that the simulation notices; they can also scale segments down, so that a small file has several.

use crate::limits::SEGMENT_LEVEL;

/// One safety rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// A copy is freed only after a fresh confirmation (design, step 7).
    ConfirmBeforeFree,
    /// Only the holder's newest generation counts (HAVE).
    NewestGeneration,
    /// Overlapping spans of different holders agree before the file is complete (design, step 6).
    OverlapsAgree,
    /// What was freed is retracted under a new generation.
    RetractFreed,
    /// A confirmation counts only from a claim above the asker's own (design, step 7).
    HigherClaim,
    /// Whoever hears that a higher incarnation of itself has spoken becomes one above it (hello).
    ExceedSeen,
    /// A home that is believed to have a file which it does not have claims it again.
    ClaimAgain,
    /// A new incarnation of a peer is told every revocation again.
    RevokeAgain,
}

/// Which rules are in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    broken: Option<Rule>,
    segment_level: u8,
}

impl Default for Rules {
    fn default() -> Self {
        Self::all()
    }
}

impl Rules {
    /// All rules.
    pub const fn all() -> Self {
        Self { broken: None, segment_level: SEGMENT_LEVEL }
    }

    /// All rules but one.
    #[cfg(feature = "mutations")]
    pub const fn without(rule: Rule) -> Self {
        Self { broken: Some(rule), segment_level: SEGMENT_LEVEL }
    }

    /// The same rules for segments of `2^level` chunks.
    #[cfg(feature = "mutations")]
    pub const fn with_segments_of(self, level: u8) -> Self {
        Self { segment_level: level, ..self }
    }

    pub(crate) const fn segment_level(self) -> u8 {
        self.segment_level
    }

    pub(crate) fn holds(self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    pub(crate) fn generations(self) -> bool {
        self.holds(Rule::NewestGeneration)
    }
}
