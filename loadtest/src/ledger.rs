//! `loadtest ledger`: the ledger of a very large file, whose stripes come from three datacenters in no order.
//!
//! What is driven is the engine's own ledger, as an aggregator drives it: a fact for each stripe, and each segment
//! handed out as a page once it is whole. The root that it finds is compared with one that is computed here from the
//! same values, without any of the engine's trees. Only the ledger's time counts, not that of making values.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, ensure};
use blake3::hazmat::{Mode, merge_subtrees_non_root, merge_subtrees_root};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use sluice_engine::geometry::Geometry;
use sluice_engine::hash::{ChainingValue, RecordDigest};
use sluice_engine::ids::{DcId, Generation, HomeEpoch, TenantId};
use sluice_engine::ledger::{Claim, Fact, Ledger, Verdict};
use sluice_engine::limits::{SEGMENT_CHUNKS, STRIPE_LEVEL};
use sluice_engine::rules::Rules;
use sluice_engine::span::{Place, Span};

use crate::accounting::{memory, reset_peak_memory};
use crate::size::Size;

/// Which file.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Bytes of the file, at most 34 PiB.
    #[arg(long, default_value = "34PiB")]
    size: Size,

    /// Stripes that may come in any order.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    window: u64,
}

/// After how many facts the spans in memory are counted.
const LOOK: usize = 64;

/// Datacenters that have stripes, each stripe one of them.
const HOLDERS: u64 = 3;

/// What it came to.
#[derive(Debug, Serialize)]
struct Report {
    size: u64,
    window: u64,
    spans: u64,
    /// Processor time of the ledger. On a machine that does nothing else it is as long as the clock says.
    cpu_s: f64,
    spans_per_cpu_s: f64,
    /// The most spans that were in memory.
    spans_in_memory: usize,
    pages: u64,
    /// The most memory of this whole process.
    peak_rss_bytes: u64,
    root: String,
}

/// Runs it.
pub(crate) fn run(args: &Args, json: bool) -> anyhow::Result<()> {
    let pid = std::process::id();
    reset_peak_memory(pid)?;
    let size = args.size.bytes();
    let file = Geometry::new(size)?;
    ensure!(file.chunks() > SEGMENT_CHUNKS, "--size must be above 64GiB: smaller files have no pages");
    let Driven { spans, pages, most, time, root } = drive(file, args.window)?;
    let report = Report {
        size,
        window: args.window,
        spans,
        cpu_s: time.as_secs_f64(),
        spans_per_cpu_s: spans as f64 / time.as_secs_f64(),
        spans_in_memory: most,
        pages,
        peak_rss_bytes: memory(pid, "VmHWM")?,
        root,
    };
    crate::answer(&report, json)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} TiB in {} spans of 64 chunks from {HOLDERS} datacenters, on one core",
            self.size >> 40,
            self.spans
        )?;
        let rate = self.spans_per_cpu_s / 1e6;
        writeln!(
            f,
            "{rate:.2} million spans for a second of processor time, {:.1} s in the ledger",
            self.cpu_s
        )?;
        writeln!(
            f,
            "{} spans in memory at most, {} pages, peak RSS {} MiB",
            self.spans_in_memory,
            self.pages,
            self.peak_rss_bytes >> 20
        )?;
        writeln!(f, "root {} as computed apart", self.root)?;
        Ok(())
    }
}

/// What a ledger did.
struct Driven {
    spans: u64,
    pages: u64,
    most: usize,
    time: Duration,
    root: String,
}

fn drive(file: Geometry, window: u64) -> anyhow::Result<Driven> {
    let mut ledger = Ledger::new(Rules::all());
    let claim = Claim { epoch: HomeEpoch::new(1), home: DcId::new(1) };
    let (tenant, digest) = (TenantId::new(2), RecordDigest::from_bytes([1; 32]));
    ledger.take(Fact::Meta { claim, size: Some(file), tenant, digest })?;
    let stripes = file.chunks().div_ceil(1 << STRIPE_LEVEL);
    let mut random = Random(7);
    let mut apart = Apart::default();
    let mut facts = Vec::new();
    let (mut pages, mut most, mut time) = (0, 0, Duration::ZERO);
    for first in (0..stripes).step_by(usize::try_from(window)?) {
        facts.clear();
        for stripe in first..(first + window).min(stripes) {
            let place = Place::clipped(stripe << STRIPE_LEVEL, STRIPE_LEVEL, file);
            let value = random.value();
            apart.push(value);
            let holder = DcId::new(1 + random.below(HOLDERS) as u16);
            let span = Span::new(place, ChainingValue::from_bytes(value));
            facts.push(Fact::Have { holder, generation: Generation::new(1), span });
        }
        for i in (1..facts.len()).rev() {
            facts.swap(i, random.below(i as u64 + 1) as usize);
        }
        let begun = processor_time();
        for (nth, fact) in facts.drain(..).enumerate() {
            let Fact::Have { span, .. } = fact else { continue };
            ledger.take(fact)?;
            // A page belongs to the store, which is not what is measured.
            pages += u64::from(ledger.page_out(span.place.start() / SEGMENT_CHUNKS).is_some());
            if nth.is_multiple_of(LOOK) {
                most = most.max(ledger.spans());
            }
        }
        time += processor_time() - begun;
    }
    let begun = processor_time();
    let verdict = ledger.verdict();
    time += processor_time() - begun;
    let expected = apart.root().context("a file of one stripe")?;
    let Verdict::Whole(root) = verdict else { anyhow::bail!("the ledger says {verdict:?}") };
    ensure!(root.to_string() == expected.to_string(), "the ledger found root {root}, it is {expected}");
    Ok(Driven { spans: stripes, pages, most, time, root: root.to_string() })
}

/// What this thread has spent: others on the machine do not make the ledger slower.
fn processor_time() -> Duration {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(spent.tv_sec.unsigned_abs(), spent.tv_nsec.unsigned_abs() as u32)
}

/// The root of values that come in order: one for each power of two in their number, as BLAKE3 itself keeps them.
#[derive(Default)]
struct Apart {
    stack: Vec<[u8; 32]>,
    count: u64,
}

impl Apart {
    fn push(&mut self, value: [u8; 32]) {
        // Merging waits for the next value: the last merge of all is another one.
        for _ in 0..self.count.trailing_zeros().min(self.stack.len() as u32) {
            self.merge();
        }
        self.stack.push(value);
        self.count += 1;
    }

    fn merge(&mut self) {
        if let (Some(right), Some(left)) = (self.stack.pop(), self.stack.pop()) {
            self.stack.push(merge_subtrees_non_root(&left, &right, Mode::Hash));
        }
    }

    fn root(mut self) -> Option<blake3::Hash> {
        while self.stack.len() > 2 {
            self.merge();
        }
        let (right, left) = (self.stack.pop()?, self.stack.pop()?);
        Some(merge_subtrees_root(&left, &right, Mode::Hash))
    }
}

/// Numbers from a seed (SplitMix64), cheap enough not to be noticed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    fn value(&mut self) -> [u8; 32] {
        let mut value = [0; 32];
        value.chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&self.next().to_le_bytes()));
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_computed_apart_is_what_blake3_says() {
        use blake3::hazmat::HasherExt;
        // Leaves of 1 KiB stand for stripes: the tree above them is the same.
        let bytes: Vec<u8> = (0..40_000u32).flat_map(u32::to_le_bytes).take(37 * 1024 - 100).collect();
        for leaves in [2, 3, 4, 5, 8, 21, 37] {
            let bytes = &bytes[..bytes.len().min(leaves * 1024)];
            let mut apart = Apart::default();
            for (i, leaf) in bytes.chunks(1024).enumerate() {
                let mut hasher = blake3::Hasher::new();
                hasher.set_input_offset(i as u64 * 1024).update(leaf);
                apart.push(hasher.finalize_non_root());
            }
            assert_eq!(apart.root(), Some(blake3::hash(bytes)), "{leaves} leaves");
        }
        assert_eq!(Apart::default().root(), None);
    }

    #[test]
    fn the_ledger_of_64_tib_is_a_window_and_finds_the_root() {
        let file = Geometry::new((64 << 40) - 12_345).unwrap();
        let driven = drive(file, 4096).unwrap();
        assert_eq!(driven.spans, 1 << 20);
        assert_eq!(driven.pages, file.chunks().div_ceil(SEGMENT_CHUNKS));
        // Twice, for the holder's and the union's tree, a window, and the segments that it leaves unfinished.
        assert!(driven.most < 2 * (4096 + 2048), "{} spans in memory", driven.most);
    }
}
