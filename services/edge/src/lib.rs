//! The edges of Sluice.
