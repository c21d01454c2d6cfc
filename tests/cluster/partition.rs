//! Datacenters that cannot reach one another.

use sluice::datacenter::DatacenterSettings;
use sluice_client::WaitFor;
use sluice_engine::hash::Root;
use sluice_proto::http::State;

use crate::bed::{A, B, Bed, MIB, chunk, noise};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_of_a_partition_take_chunks_and_agree_when_it_heals() {
    for both_ways in [false, true] {
        let mut bed = Bed::reserve(2, DatacenterSettings::default());
        let (to_b, to_a) = (bed.wire(A, B).await, bed.wire(B, A).await);
        for dc in [A, B] {
            bed.cluster.start(dc).await.unwrap();
        }
        let before = bed.upload(&[A, B], noise(80, 3 * MIB), WaitFor::Assembled).await;
        let bytes = noise(81, 6 * MIB);
        let id = bed.create(A, bytes.len()).await;
        to_b.cut();
        if both_ways {
            to_a.cut();
        }
        for index in 0..6 {
            let dc = if index % 2 == 0 { A } else { B };
            let taken = bed.put(dc, id, index, chunk(&bytes, index as usize)).await.unwrap();
            assert!(taken.status.is_success(), "{:?}", taken.body);
        }
        // What was assembled before is still served where it is.
        assert!(bed.read(A, before.id, before.root).await.len() == 3 * MIB);
        to_b.mend();
        to_a.mend();
        let root = Root::of_bytes(&bytes);
        for dc in [A, B] {
            assert_eq!(bed.reach(dc, id, State::Assembled).await.root, Some(root.to_string()));
            assert!(bed.read(dc, id, root).await == bytes);
        }
    }
}
