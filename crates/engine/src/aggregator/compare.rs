//! Comparing what two datacenters know (WANT_FILES): only ranges of files that differ are split and restated.

use super::rest::{Sum, is_below};
use super::{Aggregator, File};
use crate::command::Statement;
use crate::ids::{DcId, FileId, Generation, Timestamp};
use crate::ledger::FileState;
use crate::span::Span;

/// Ranges with at most this many files are restated rather than split.
const LEAF_FILES: usize = 32;

/// Bits by which a range is split.
const SPLIT_BITS: u8 = 4;

/// After this many comparisons in a row that found a difference, and nothing new from the holder in between, the home
/// forgets what it knows of the holder, who is about to say everything again.
const MAX_DISPUTES: u32 = 4;

impl File {
    /// Something is known here otherwise than at a peer, and perhaps it is what that peer holds. What it says adds to
    /// what is known and takes nothing away.
    fn dispute(&mut self, me: DcId, from: DcId) {
        let is_home = self.ledger.claim().is_some_and(|claim| claim.home == me);
        let open = matches!(self.ledger.state(), FileState::Receiving | FileState::Complete);
        if !is_home || !open || self.ledger.chunks_held_by(from) == 0 {
            self.disputes.remove(&from);
            return;
        }
        let disputes = self.disputes.entry(from).or_default();
        *disputes += 1;
        if *disputes > MAX_DISPUTES {
            self.disputes.remove(&from);
            self.ledger.doubt(from);
        }
    }
}

/// What is known of a range of files.
struct Compared {
    /// The sum over all of them.
    digest: [u8; 32],
    /// Those in memory.
    awake: Vec<FileId>,
    /// How many are at rest.
    resting: usize,
}

impl Aggregator {
    /// Begins to compare with every reachable peer for which it is time.
    pub(super) fn compare_when_due(&mut self, now: Timestamp) {
        if self.rest.is_loading() {
            // What is not known yet would look as if it were not there.
            return;
        }
        let due: Vec<DcId> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.next_compare().is_some_and(|at| at <= now))
            .map(|(dc, _)| *dc)
            .collect();
        for dc in due {
            if let Some(peer) = self.peers.get_mut(&dc) {
                peer.next_compare = now.plus(self.config.compare_ms);
            }
            let (prefix, bits) = (self.config.share.first(), self.config.share.bits());
            let digest = self.range_digest(dc, prefix, bits).digest;
            self.say(dc, prefix, Statement::WantFiles { bits, digest }, now);
        }
    }

    /// A peer wants to compare a range.
    pub(super) fn compare(&mut self, from: DcId, prefix: FileId, bits: u8, digest: [u8; 32], now: Timestamp) {
        if self.rest.is_loading() {
            return;
        }
        let Compared { digest: mine, awake: ids, resting } = self.range_digest(from, prefix, bits);
        if mine == digest {
            return;
        }
        if ids.len() + resting > LEAF_FILES && bits + SPLIT_BITS <= Statement::MAX_PREFIX_BITS {
            let bits = bits + SPLIT_BITS;
            for part in 0..1u128 << SPLIT_BITS {
                let prefix = prefix.as_u128() | part << (u128::BITS - u32::from(bits));
                let prefix = FileId::from_bytes(prefix.to_be_bytes());
                let digest = self.range_digest(from, prefix, bits).digest;
                self.say(from, prefix, Statement::WantFiles { bits, digest }, now);
            }
            return;
        }
        let floor = self.generation_floor;
        let seen = self.peers.get(&from).map(super::peer::Peer::seen).unwrap_or_default();
        for id in ids {
            if let Some(file) = self.files.get_mut(&id) {
                file.dispute(self.config.me, from);
                file.restate_if_settled(&self.config, floor, from, seen, now);
            }
            self.advance(id, now);
        }
        self.tell_of_resting(self.rest.ids(prefix, bits), from, now);
        let every_ms = self.config.resend_ms;
        if self.peers.get_mut(&from).is_some_and(|peer| peer.may_echo(bits, prefix, now, every_ms)) {
            self.say(from, prefix, Statement::WantFiles { bits, digest: mine }, now);
        }
    }

    /// What this datacenter and a peer should both know of a range.
    fn range_digest(&self, peer: DcId, prefix: FileId, bits: u8) -> Compared {
        let (mut sum, resting) = self.rest.sum([self.me(), peer], prefix, bits);
        let mut awake = Vec::new();
        for (id, file) in self.files.range(prefix..).take_while(|(id, _)| is_below(**id, prefix, bits)) {
            if let Some(digest) = file.ledger.digest_between(self.me(), peer) {
                sum.add(Sum::of(*id, &digest));
                awake.push(*id);
            }
        }
        Compared { digest: sum.digest(), awake, resting }
    }

    /// What the own store holds under a place was read: for a peer that asked, or to compare it here.
    pub(super) fn restated(
        &mut self,
        id: FileId,
        to: DcId,
        generation: Generation,
        spans: Vec<Span>,
        now: Timestamp,
    ) {
        let me = self.me();
        let Some(file) = self.files.get_mut(&id) else { return };
        if file.ledger.state() == FileState::Dropped {
            return;
        }
        if to == me {
            spans.iter().for_each(|span| file.home.answered(me, span.place));
            file.take_own(&self.config, self.generation_floor, generation, &spans, now);
            return;
        }
        let newest = file.ledger.held_by(me).map(|(newest, _)| newest);
        if file.ledger.counts_since(me).is_some_and(|since| generation < since) {
            // Read before something was freed or lost: it may be what went. Whoever asked will ask again.
            return;
        }
        let generation = generation.max(newest.unwrap_or_default());
        for span in spans {
            self.say(to, id, Statement::Have { generation, span }, now);
        }
    }

    /// A peer asks whether this file is known.
    pub(super) fn asked(&mut self, id: FileId, from: DcId, now: Timestamp) {
        let (me, floor) = (self.me(), self.generation_floor);
        let known = |file: &&mut File| file.ledger.state() != FileState::Unheard;
        match self.files.get_mut(&id).filter(known) {
            Some(file) => {
                file.restate_to(me, floor, from, now);
                self.advance(id, now);
            }
            None => {
                if let Some(peer) = self.peers.get_mut(&from) {
                    peer.remember_asker(id);
                }
                self.say(from, id, Statement::Unknown, now);
            }
        }
    }
}
