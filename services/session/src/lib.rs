//! The session service of Sluice.
