//! A disk in memory that behaves as badly as a real one may. For tests only.
//!
//! What was written and not synced is in the cache only: when the power goes, each page of it is lost, kept, or torn
//! between sectors, each on its own, and each name that its directory was not synced for is the old or the new one.
//! Syncs can fail (and then drop what they should have written, as Linux does), reads can fail, room can run out,
//! writes can hang, and syncs can lie, to prove that a test would notice.
//!
//! [`FaultDisk`] is a tree of nodes ([`Node`]), which a mount can show to a process; as a [`Disk`](sluice_store::fs::Disk)
//! it goes under a chunk store in the same process. It belongs to whoever holds it, and runs nothing by itself.

#![allow(clippy::unwrap_used, reason = "for tests: a disk that another thread broke is no disk")]

mod dice;
mod disk;
mod model;

pub use dice::Dice;
pub use disk::operations_of_this_thread;
pub use model::{FaultDisk, Faults, Node, PAGE, ROOT};
