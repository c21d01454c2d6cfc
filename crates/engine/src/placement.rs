//! Placement: which datacenter a chunk is sent to.
//!
//! Clients and spill place data in aligned stripes of 64 chunks, so that what one datacenter holds merges into few
//! spans and chunk-by-chunk bookkeeping never crosses a datacenter boundary.

use std::ops::Range;

use crate::geometry::Geometry;
use crate::limits::STRIPE_LEVEL;

/// log2 of the chunks in a stripe of this file, when it is spread over `targets` datacenters: 6, or less for a small
/// file, so that every datacenter gets some.
pub fn stripe_level(file: Geometry, targets: usize) -> u8 {
    let targets = targets.max(1) as u64;
    let mut level = STRIPE_LEVEL;
    while level > 0 && file.chunks().div_ceil(1 << level) < targets * 2 {
        level -= 1;
    }
    level
}

/// The chunks of each stripe, in order.
pub fn stripes(file: Geometry, targets: usize) -> impl Iterator<Item = Range<u64>> {
    let len = 1u64 << stripe_level(file, targets);
    let chunks = file.chunks();
    (0..chunks.div_ceil(len)).map(move |i| i * len..((i + 1) * len).min(chunks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CHUNK_LEN;

    #[test]
    fn small_files_still_reach_every_datacenter() {
        let file = |chunks: u64| Geometry::new(chunks * CHUNK_LEN).unwrap();
        assert_eq!(stripe_level(file(256), 2), 6);
        assert_eq!(stripe_level(file(16), 2), 2);
        assert_eq!(stripe_level(file(2), 2), 0);
        assert_eq!(stripe_level(file(1 << 20), 1), 6);
        let all: Vec<_> = stripes(file(130), 1).collect();
        assert_eq!(all, [0..64, 64..128, 128..130]);
    }
}
