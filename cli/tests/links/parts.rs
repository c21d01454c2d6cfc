//! Datacenters each of which has a Redis and an S3 server of its own, at its place, on links that are slow and cut.

use sluice_fault_s3::Garage;
use sluice_redis::testing::{Server, available};

use crate::can_be_apart;
use crate::network::Network;
use crate::site::Site;
use crate::weather::{PATIENT, send_all};

/// MiB a second that a link carries.
const SLOW: u32 = 8;

#[test]
fn datacenters_of_buckets_on_slow_links_that_are_cut_end_with_equal_bytes() {
    if !can_be_apart() || !available() {
        return;
    }
    let network = Network::new(2);
    // Processes that a thread starts are where it is.
    let parts = [1, 2].map(|dc| network.at_once(dc, || (Server::start(), Garage::start())));
    let [(one, Some(first)), (two, Some(second))] = &parts else { return };
    let site = Site::on(network, 2, |dc| {
        let (redis, garage) = if dc == 1 { (one, first) } else { (two, second) };
        let (endpoint, bucket, region) = (garage.endpoint(), garage.bucket(), garage.region());
        let s3 = format!(
            "endpoint = \"{endpoint}\", bucket = \"{bucket}\", region = \"{region}\", credentials = \"s3.toml\""
        );
        format!("store = {{ s3 = {{ {s3} }} }}\nredis = \"{}\"\n{PATIENT}", redis.url())
    });
    let key = first.key();
    site.write("s3.toml", &format!("key_id = \"{}\"\nsecret = \"{}\"\n", key.id, key.secret));
    site.start_all();
    site.network.throttle(SLOW);
    let mut sent = send_all(&site, 60, &[1, 2]);
    for (from, to) in [(1, 2), (2, 1)] {
        site.network.cut(from, to, true);
    }
    site.linked(&[(1, 2)]);
    sent.extend(send_all(&site, 61, &[1]));
    // Its own Redis forgets everything, and its process begins anew, while it is alone.
    site.network.at_once(2, || two.cli(&["FLUSHALL"]));
    site.kill(2);
    site.start(2);
    sent.extend(send_all(&site, 62, &[2]));
    for (from, to) in [(1, 2), (2, 1)] {
        site.network.cut(from, to, false);
    }
    site.linked(&[]);
    for (id, bytes) in &sent {
        site.equal(&[1, 2], *id, bytes);
    }
    println!("{} files, {} packets lost, {:?}", sent.len(), site.network.lost(), site.quiet());
}
