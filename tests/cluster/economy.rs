//! What goes between datacenters.

use sluice_client::WaitFor;
use sluice_proto::http::State;

use crate::bed::{A, B, Bed, MIB, noise};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_most_one_command_for_every_two_chunks() {
    let bed = Bed::start(2).await;
    let sent = bed.upload(&[A, B], noise(50, 256 * MIB), WaitFor::Assembled).await;
    bed.reach(B, sent.id, State::Assembled).await;
    let (all, home) = (bed.cluster.all_traffic(), bed.cluster.traffic(A));
    assert!(all.commands_sent <= 128, "{} commands for 256 chunks", all.commands_sent);
    assert_eq!(all.command_bytes_sent, all.commands_sent * 160);
    let elsewhere = 256 * MIB as u64 - home.pulled_bytes;
    assert!(home.pulled_bytes > 0 && elsewhere > 0, "both got some: {home:?}");
    assert_eq!(bed.cluster.traffic(B).pulled_bytes, 0, "nothing went where it was not needed");
}
