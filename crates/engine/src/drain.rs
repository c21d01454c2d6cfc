//! Drain: a datacenter hands its work over to another, in three phases, each of which contains the ones before it.

use std::fmt;

use crate::ids::DcId;

/// How far a datacenter hands over.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Phase {
    /// New chunks and files go to the target.
    Data = 1,
    /// Session contexts are renewed at the target.
    Sessions = 2,
    /// Clients are told to go to the target, and their channels end.
    Channels = 3,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 3] = [Self::Data, Self::Sessions, Self::Channels];

    /// The phase's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Sessions => "sessions",
            Self::Channels => "channels",
        }
    }

    /// The phase with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.name() == name)
    }

    /// The phase with this number.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Data),
            2 => Some(Self::Sessions),
            3 => Some(Self::Channels),
            _ => None,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a datacenter that drains does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drain {
    /// How far it has come.
    pub phase: Phase,
    /// Who takes its work over.
    pub target: DcId,
    /// Whether files that are here move too, so that it can be switched off for good.
    pub evacuate: bool,
}

const EVACUATE: u64 = 1 << 16;

impl Drain {
    /// The target and whether to evacuate, as one number: the target's in the low 16 bits, then one bit.
    pub(crate) fn packed(self) -> u64 {
        u64::from(self.target.number()) | if self.evacuate { EVACUATE } else { 0 }
    }

    /// The drain in this phase, from [`packed`](Self::packed); `None` if there is no such drain.
    pub(crate) fn from_packed(phase: Phase, packed: u64) -> Option<Self> {
        let target = DcId::new((packed & 0xFFFF) as u16);
        let known = packed & !(EVACUATE | 0xFFFF) == 0 && target != DcId::EVERY;
        known.then_some(Self { phase, target, evacuate: packed & EVACUATE != 0 })
    }
}

/// Why a datacenter does not drain.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum DrainError {
    /// The target is the datacenter itself.
    #[error("a datacenter cannot hand over to itself")]
    Itself,
    /// The target is no datacenter of the cluster.
    #[error("{0} is no other datacenter of this cluster")]
    Unknown(DcId),
    /// The target cannot be reached now.
    #[error("{0} cannot be reached")]
    Down(DcId),
    /// The target hands its own work over.
    #[error("{0} is draining itself")]
    TargetDrains(DcId),
    /// Another datacenter hands over to this one.
    #[error("{0} is draining to this datacenter")]
    IsTarget(DcId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_packs_into_a_number() {
        for evacuate in [false, true] {
            let drain = Drain { phase: Phase::Sessions, target: DcId::new(2), evacuate };
            assert_eq!(Drain::from_packed(Phase::Sessions, drain.packed()), Some(drain));
        }
        for bad in [1 << 17 | 2, u64::MAX, 0xFFFF] {
            assert_eq!(Drain::from_packed(Phase::Data, bad), None);
        }
        for phase in Phase::ALL {
            assert_eq!(Phase::from_byte(phase as u8), Some(phase));
            assert_eq!(Phase::from_name(phase.name()), Some(phase));
        }
        assert_eq!((Phase::from_byte(0), Phase::from_byte(4)), (None, None));
    }
}
