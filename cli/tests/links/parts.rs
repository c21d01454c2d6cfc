//! Datacenters each of which has a Redis and an S3 server of its own, at its place, on links that are slow and cut.

use crate::can_be_apart;
use crate::site::{Kept, Site};
use crate::weather::{PATIENT, send_all, send_few};

/// MiB a second that a link carries.
const SLOW: u32 = 8;

#[test]
fn datacenters_of_buckets_on_slow_links_that_are_cut_end_with_equal_bytes() {
    if !can_be_apart() {
        return;
    }
    let Some(site) = Site::keeping(Kept::Buckets, 2, PATIENT) else { return };
    site.start_all();
    site.network.throttle(SLOW);
    let mut sent = send_all(&site, 60, &[1, 2]);
    for (from, to) in [(1, 2), (2, 1)] {
        site.network.cut(from, to, true);
    }
    site.linked(&[(1, 2)]);
    sent.extend(send_all(&site, 61, &[1]));
    // Its own Redis forgets everything, and its process begins anew, while it is alone.
    site.forget(2);
    site.kill(2);
    site.start(2);
    sent.extend(send_few(&site, 62, &[2]));
    for (from, to) in [(1, 2), (2, 1)] {
        site.network.cut(from, to, false);
    }
    site.linked(&[]);
    // In one direction.
    site.network.cut(2, 1, true);
    site.linked(&[(1, 2)]);
    for (seed, dc) in [(63, 1), (64, 2)] {
        sent.extend(send_few(&site, seed, &[dc]));
    }
    site.network.cut(2, 1, false);
    site.linked(&[]);
    for (id, bytes) in &sent {
        site.equal(&[1, 2], *id, bytes);
    }
    println!("{} files, {} packets lost, {:?}", sent.len(), site.network.lost(), site.quiet());
}
