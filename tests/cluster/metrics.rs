//! What metrics tell of a datacenter as a whole, and that each of them moves.

use sluice_node::clock::{Clock, SystemClock};

use crate::bed::{A, B, Bed, MIB, chunk, eventually, noise};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_volume_keys_and_build_are_told_of() {
    let bed = Bed::start(1).await;
    let metric = async |name: &str, labels: &str| bed.metric(A, name, labels).await;
    assert_eq!(metric("sluice_build_info", "version=").await, 1.0);
    assert!(metric("sluice_memory_budget_bytes", "").await > 0.0);
    assert_eq!(metric("sluice_volume_readonly", "").await, 0.0);
    assert!(metric("sluice_volume_free_bytes", "").await > 0.0);
    let now = SystemClock.now().number() as f64 / 1e3;
    for purpose in ["ca", "edge", "peer", "inside"] {
        let labels = format!("purpose=\"{purpose}\"");
        let left = metric("sluice_key_expiry_timestamp_seconds", &labels).await - now;
        assert!((86_400.0..1e9).contains(&left), "{purpose}: {left} s");
    }
    for reason in sluice_node::metrics::SHED_REASONS {
        let labels = format!("reason=\"{reason}\"}} 0");
        let url = bed.cluster.config(A).unwrap().admin_url();
        let text = reqwest::get(format!("{url}/metrics")).await.unwrap().text().await.unwrap();
        assert!(text.contains(&format!("sluice_shed_total{{dc=\"dc-a\",{labels}")), "{text}");
    }

    let files = async |state: &str| metric("sluice_files{", &format!("state=\"{state}\"")).await;
    let syncs = metric("sluice_store_sync_seconds_count", "").await;
    let bytes = noise(1, 2 * MIB);
    let id = bed.create(A, bytes.len()).await;
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
    assert_eq!((files("receiving").await, files("assembled").await), (1.0, 0.0));
    assert!(metric("sluice_store_sync_seconds_count", "").await > syncs);
    assert!(metric("sluice_store_sync_seconds_sum", "").await > 0.0);
    let slowest = metric("sluice_store_sync_seconds_bucket", "le=\"+Inf\"").await;
    assert!(slowest > syncs);
    assert_eq!(metric("sluice_store_written_bytes_total", "").await, MIB as f64);
    bed.put_ok(A, id, 1, chunk(&bytes, 1)).await;
    eventually("an assembled file", async || (files("assembled").await == 1.0).then_some(())).await;
    assert_eq!(files("receiving").await + files("complete").await, 0.0);
    bed.delete(A, id).await;
    eventually("a dropped file", async || (files("dropped").await == 1.0).then_some(())).await;
    assert_eq!(files("assembled").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_for_a_peer_says_for_how_long() {
    let mut bed = Bed::reserve(2, Default::default());
    // What dc-a dials can be cut: it hears of dc-b's chunks then, and cannot fetch them.
    let wire = bed.wire(A, B).await;
    for dc in [A, B] {
        bed.cluster.start(dc).await.unwrap();
    }
    let peer = "peer=\"dc-b\"";
    let metric = async |name: &str, labels: &str| bed.metric(A, name, labels).await;
    eventually("a link", async || (metric("sluice_peer_up", peer).await == 1.0).then_some(())).await;
    let bytes = noise(2, 2 * MIB);
    let id = bed.create(A, bytes.len()).await;
    eventually("nothing left to be said", async || {
        (metric("sluice_peer_backlog", peer).await == 0.0).then_some(())
    })
    .await;
    assert_eq!(metric("sluice_peer_lag_seconds", peer).await, 0.0);
    assert_eq!(metric("sluice_assembly_lag_seconds", "").await, 0.0);
    let calls = async |method: &str, outcome: &str| {
        let labels =
            format!(r#"rpc_method="sluice.peer.v1.Peer/{method}",rpc_response_status_code="{outcome}""#);
        metric("rpc_client_call_duration_seconds_count", &labels).await
    };
    assert!(calls("Link", "OK").await >= 1.0);
    assert_eq!(calls("Chunks", "OK").await, 0.0);

    wire.cut();
    eventually("a lost link", async || (metric("sluice_peer_up", peer).await == 0.0).then_some(())).await;
    bed.put_ok(A, id, 0, chunk(&bytes, 0)).await;
    bed.put_ok(B, id, 1, chunk(&bytes, 1)).await;
    eventually("a file that waits for its assembly", async || {
        (metric("sluice_assembly_lag_seconds", "").await > 0.2).then_some(())
    })
    .await;
    assert_eq!(metric("sluice_files{", "state=\"complete\"").await, 1.0);
    eventually("a peer that is behind", async || {
        (metric("sluice_peer_lag_seconds", peer).await > 0.2).then_some(())
    })
    .await;
    assert!(metric("sluice_peer_backlog", peer).await >= 1.0);
    let refused = async || (calls("Link", "UNAVAILABLE").await >= 1.0).then_some(());
    eventually("a call that reaches nobody", refused).await;

    wire.mend();
    eventually("nobody waits", async || {
        let waits =
            metric("sluice_assembly_lag_seconds", "").await + metric("sluice_peer_lag_seconds", peer).await;
        (waits == 0.0 && metric("sluice_files{", "state=\"assembled\"").await == 1.0).then_some(())
    })
    .await;
    assert!(metric("sluice_pulled_bytes_total", "").await >= MIB as f64);
    assert!(calls("Chunks", "OK").await >= 1.0);
    assert!(bed.metric(B, "sluice_served_bytes_total", "").await >= MIB as f64);
}
