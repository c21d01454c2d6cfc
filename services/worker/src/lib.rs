//! The workers of Sluice.
