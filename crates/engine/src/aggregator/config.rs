//! What an aggregator is told about its surroundings.

use std::collections::BTreeSet;

use crate::ids::DcId;
use crate::rules::Rules;
use crate::share::Share;

/// Times and limits of an aggregator, all in milliseconds or counts.
#[derive(Clone, Debug)]
pub struct Config {
    /// This datacenter.
    pub me: DcId,
    /// Whose files it is about. It is given no others, and says nothing of them.
    pub share: Share,
    /// Every other datacenter of the cluster.
    pub peers: BTreeSet<DcId>,
    /// Spans are said once no chunk of the file came for this long.
    pub quiet_ms: u64,
    /// While chunks keep coming, whole stripes are said this often.
    pub stripe_ms: u64,
    /// What was not acknowledged is said again after this long.
    pub resend_ms: u64,
    /// How often all that is known is compared with each peer.
    pub compare_ms: u64,
    /// How often the others are asked about an unknown file.
    pub ask_ms: u64,
    /// How long every datacenter must say UNKNOWN before an orphan goes.
    pub orphan_grace_ms: u64,
    /// After how long what only a silent holder has counts as missing.
    pub absent_ms: u64,
    /// After how long a silent home is taken over; `None`: only when told to.
    pub takeover_ms: Option<u64>,
    /// How long a file that was asked for stays in memory, though nothing is left to be done.
    pub awake_ms: u64,
    /// How long after an attempt (a pull, a fetch, a confirmation) failed it is tried again.
    pub retry_ms: u64,
    /// Pulls of one file under way at once.
    pub max_pulls: usize,
    /// Commands to one peer that may wait for their acknowledgement.
    pub max_flights: usize,
    /// The safety rules.
    pub rules: Rules,
}

impl Config {
    /// The defaults of a datacenter among these peers.
    pub fn new(me: DcId, peers: impl IntoIterator<Item = DcId>) -> Self {
        Self {
            me,
            share: Share::WHOLE,
            peers: peers.into_iter().filter(|dc| *dc != me).collect(),
            quiet_ms: 30,
            stripe_ms: 1_000,
            resend_ms: 1_000,
            compare_ms: 30_000,
            ask_ms: 2_000,
            orphan_grace_ms: 3_600_000,
            absent_ms: 60_000,
            takeover_ms: None,
            awake_ms: 2_000,
            retry_ms: 500,
            max_pulls: 4,
            max_flights: 256,
            rules: Rules::all(),
        }
    }
}
