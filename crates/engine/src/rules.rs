//! The safety rules that the simulation must be able to catch the breach of.
//!
//! In production all of them are in force, and nothing can switch one off. Tests can (feature `mutations`), to prove
//! that the simulation notices.

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
}

/// Which rules are in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    broken: Option<Rule>,
}

impl Rules {
    /// All rules.
    pub const fn all() -> Self {
        Self { broken: None }
    }

    /// All rules but one.
    #[cfg(feature = "mutations")]
    pub const fn without(rule: Rule) -> Self {
        Self { broken: Some(rule) }
    }

    pub(crate) fn holds(self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    pub(crate) fn generations(self) -> bool {
        self.holds(Rule::NewestGeneration)
    }
}
